//! What to capture: the options as typed, then the settings as the rules use them.
//!
//! Two stages, so that a mistake is named before a single rule stands. A wrong exclusion is never
//! harmless: it either captures what it should not, or lets out in plaintext what nobody will look for.
//! All mistakes are reported at once; a pod that fails at start should fail once, not once a typo.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;
use weft_core::ports;

/// What the user typed; [`Options::validate`] makes a [`Config`] of it.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// User id that the proxy runs as; its own connections are not captured (several allowed)
    #[arg(long = "proxy-uid", value_name = "UID", value_delimiter = ',', default_values_t = [ports::PROXY_UID], env = "WEFT_PROXY_UID")]
    pub proxy_uids: Vec<u32>,
    /// Group id that the proxy runs as, where a group and not a user tells it apart (several allowed)
    #[arg(long = "proxy-gid", value_name = "GID", value_delimiter = ',', env = "WEFT_PROXY_GID")]
    pub proxy_gids: Vec<u32>,
    /// The proxy's listener for connections that reach the pod
    #[arg(long, value_name = "PORT", default_value_t = ports::INBOUND, env = "WEFT_INBOUND_PORT")]
    pub inbound_port: u16,
    /// The proxy's listener for connections that the app opens
    #[arg(long, value_name = "PORT", default_value_t = ports::OUTBOUND, env = "WEFT_OUTBOUND_PORT")]
    pub outbound_port: u16,
    /// The proxy's open admin port, reachable from outside as it is
    #[arg(long, value_name = "PORT", default_value_t = ports::ADMIN, env = "WEFT_ADMIN_PORT")]
    pub admin_port: u16,
    /// Ports that reach the app without the proxy: "22,9100-9110"
    #[arg(long, value_name = "PORTS", value_delimiter = ',', env = "WEFT_EXCLUDE_INBOUND_PORTS")]
    pub exclude_inbound_ports: Vec<String>,
    /// Ports that the app dials without the proxy: "25,6000-6100"
    #[arg(long, value_name = "PORTS", value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_PORTS")]
    pub exclude_outbound_ports: Vec<String>,
    /// Networks that the app dials without the proxy: "10.9.0.0/16,fd00:9::/64"
    #[arg(long, value_name = "CIDRS", value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_CIDRS")]
    pub exclude_outbound_cidrs: Vec<String>,
    /// Capture these inbound ports only
    #[arg(long, value_name = "PORTS", value_delimiter = ',', env = "WEFT_ONLY_INBOUND_PORTS")]
    pub only_inbound_ports: Vec<String>,
    /// Capture these outbound ports only
    #[arg(long, value_name = "PORTS", value_delimiter = ',', env = "WEFT_ONLY_OUTBOUND_PORTS")]
    pub only_outbound_ports: Vec<String>,
    /// Capture connections to these networks only (with --only-outbound-ports: both must hold)
    #[arg(long, value_name = "CIDRS", value_delimiter = ',', env = "WEFT_ONLY_OUTBOUND_CIDRS")]
    pub only_outbound_cidrs: Vec<String>,
    /// Interfaces whose connections are left alone, both ways: "net1"
    #[arg(long, value_name = "NAMES", value_delimiter = ',', env = "WEFT_EXCLUDE_INTERFACES")]
    pub exclude_interfaces: Vec<String>,
    /// Which families to capture; without IPv6 in the pod, dual says so and goes on
    #[arg(long, value_enum, default_value_t = Families::Dual, env = "WEFT_FAMILIES")]
    pub families: Families,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            proxy_uids: vec![ports::PROXY_UID],
            proxy_gids: Vec::new(),
            inbound_port: ports::INBOUND,
            outbound_port: ports::OUTBOUND,
            admin_port: ports::ADMIN,
            exclude_inbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            exclude_outbound_cidrs: Vec::new(),
            only_inbound_ports: Vec::new(),
            only_outbound_ports: Vec::new(),
            only_outbound_cidrs: Vec::new(),
            exclude_interfaces: Vec::new(),
            families: Families::Dual,
        }
    }
}

/// Settings that can be enforced. Lists are sorted and free of overlaps, so that equal settings give
/// equal text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Users that are the proxy.
    pub(crate) proxy_uids: Vec<u32>,
    /// Groups that are the proxy.
    pub(crate) proxy_gids: Vec<u32>,
    /// The proxy's own listeners.
    pub(crate) own: OwnPorts,
    /// Inbound ports, as exclusions and as the only ones.
    pub(crate) inbound: PortFilter,
    /// Outbound ports, as exclusions and as the only ones.
    pub(crate) outbound: PortFilter,
    /// Outbound IPv4 networks.
    pub(crate) outbound_v4: NetFilter<Ipv4Net>,
    /// Outbound IPv6 networks.
    pub(crate) outbound_v6: NetFilter<Ipv6Net>,
    /// Interfaces left alone.
    pub(crate) interfaces: Vec<String>,
    /// Families to capture.
    pub(crate) families: Families,
    /// Whether any network limits what is captured: a family without one is then not captured.
    pub(crate) only_networks: bool,
}

/// The ports that the proxy itself listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OwnPorts {
    pub(crate) inbound: u16,
    pub(crate) outbound: u16,
    pub(crate) admin: u16,
}

/// Ports left alone, and ports that alone are captured (none: all).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortFilter {
    pub(crate) exclude: Vec<PortRange>,
    pub(crate) only: Vec<PortRange>,
}

/// Networks left alone, and networks that alone are captured (none: all).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetFilter<N> {
    pub(crate) exclude: Vec<N>,
    pub(crate) only: Vec<N>,
}

/// The families to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Families {
    /// IPv4, and IPv6 where the pod has it.
    Dual,
    /// IPv4 alone: IPv6 connections bypass the proxy.
    Ipv4,
    /// IPv6 alone: IPv4 connections bypass the proxy.
    Ipv6,
}

impl Families {
    /// The families, in the order in which rules are applied.
    pub fn list(self) -> &'static [Family] {
        match self {
            Self::Dual => &[Family::Ipv4, Family::Ipv6],
            Self::Ipv4 => &[Family::Ipv4],
            Self::Ipv6 => &[Family::Ipv6],
        }
    }
}

/// One family: one set of tables in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `iptables`.
    Ipv4,
    /// `ip6tables`.
    Ipv6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        })
    }
}

/// One port or an inclusive range of ports, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    pub(crate) fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// As `--dport` takes it.
    pub(crate) fn dport(self) -> String {
        if self.first == self.last { self.first.to_string() } else { format!("{}:{}", self.first, self.last) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// Why a text is not a [`PortRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPort {
    /// Port 0 names no service; in the rules it would mean something else than was meant.
    #[error("port 0 is not a port")]
    Zero,
    /// Neither a port nor a range.
    #[error("is neither a port (1 to 65535) nor a range such as 9100-9110")]
    Syntax,
    /// The range ends before it starts.
    #[error("ends before it starts")]
    Backward,
}

impl FromStr for PortRange {
    type Err = InvalidPort;

    fn from_str(text: &str) -> Result<Self, InvalidPort> {
        let port = |s: &str| -> Result<u16, InvalidPort> {
            // `u16::from_str` takes a leading plus; a port list does not.
            if s.is_empty() || !s.bytes().all(|b| b.is_ascii_digit()) {
                return Err(InvalidPort::Syntax);
            }
            match s.parse::<u16>() {
                Ok(0) => Err(InvalidPort::Zero),
                Ok(port) => Ok(port),
                Err(_) => Err(InvalidPort::Syntax),
            }
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if last < first { Err(InvalidPort::Backward) } else { Ok(Self { first, last }) }
    }
}

/// One way in which options cannot be enforced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A listener of the proxy on port 0.
    #[error("{option}: port 0 is not a port")]
    PortZero {
        /// The option at fault.
        option: &'static str,
    },
    /// A list entry that is no port and no range.
    #[error("{option}: {value:?} {reason}")]
    Port {
        /// The option at fault.
        option: &'static str,
        /// What was typed.
        value: String,
        /// What is wrong with it.
        reason: InvalidPort,
    },
    /// Two listeners of the proxy share a port.
    #[error("{first} and {second} are both {port}: the proxy needs a port for each")]
    SamePort {
        /// One option.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// The port that they share.
        port: u16,
    },
    /// A list entry holds one of the proxy's own ports.
    #[error("{option}: {value} holds {port}, the proxy's own {role} port, which is never captured")]
    OwnPort {
        /// The option at fault.
        option: &'static str,
        /// The range.
        value: PortRange,
        /// The port of the proxy in it.
        port: u16,
        /// What the proxy does there.
        role: &'static str,
    },
    /// Two entries of one list overlap: one of them is not what was meant.
    #[error("{option}: {first} and {second} overlap")]
    OverlappingPorts {
        /// The option at fault.
        option: &'static str,
        /// One entry.
        first: PortRange,
        /// The other.
        second: PortRange,
    },
    /// Not a network.
    #[error("{option}: {value:?} is not a network such as 10.0.0.0/8 or fd00::/8")]
    Cidr {
        /// The option at fault.
        option: &'static str,
        /// What was typed.
        value: String,
    },
    /// Bits behind the prefix are set: the network is wider than it looks.
    #[error("{option}: {value} has host bits set; the network is {network}")]
    HostBits {
        /// The option at fault.
        option: &'static str,
        /// What was typed.
        value: IpNet,
        /// The network that the rules would use.
        network: IpNet,
    },
    /// A network of a family that is not captured, so that the entry does nothing.
    #[error("{option}: {value} is {family}, but --families is {captured}")]
    WrongFamily {
        /// The option at fault.
        option: &'static str,
        /// What was typed.
        value: IpNet,
        /// Its family.
        family: Family,
        /// The only family captured.
        captured: Family,
    },
    /// An IPv4 network in IPv6 clothes: no packet ever carries such an address.
    #[error("{option}: {value} is an IPv4 network of the wrong family: write it as IPv4")]
    MappedCidr {
        /// The option at fault.
        option: &'static str,
        /// What was typed.
        value: IpNet,
    },
    /// Two networks of one list overlap.
    #[error("{option}: {first} and {second} overlap")]
    OverlappingCidrs {
        /// The option at fault.
        option: &'static str,
        /// One entry.
        first: IpNet,
        /// The other.
        second: IpNet,
    },
    /// Nothing tells the proxy's connections apart: they would be captured for ever.
    #[error("--proxy-uid, --proxy-gid: one is needed, or the proxy would capture itself")]
    NoProxy,
    /// Root as the proxy.
    #[error("{option}: 0 is root: every root process of the pod would bypass the proxy")]
    Root {
        /// The option at fault.
        option: &'static str,
    },
    /// A name that no interface can have.
    #[error("--exclude-interfaces: {value:?} is not an interface name")]
    Interface {
        /// What was typed.
        value: String,
    },
    /// The loopback interface has its own rules.
    #[error("--exclude-interfaces: lo has its own rules and cannot be listed")]
    Loopback,
}

/// Everything that is wrong with the options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid(pub Vec<ConfigError>);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

impl Config {
    /// The families to capture.
    pub fn families(&self) -> Families {
        self.families
    }
}

impl Options {
    /// Settings that can be enforced, or every reason why not.
    pub fn validate(&self) -> Result<Config, Invalid> {
        let mut errors = Vec::new();
        let own = self.own_ports(&mut errors);
        if self.proxy_uids.is_empty() && self.proxy_gids.is_empty() {
            errors.push(ConfigError::NoProxy);
        }
        let proxy_uids = owners("--proxy-uid", &self.proxy_uids, &mut errors);
        let proxy_gids = owners("--proxy-gid", &self.proxy_gids, &mut errors);
        let inbound = PortFilter {
            exclude: port_list("--exclude-inbound-ports", &self.exclude_inbound_ports, own, &mut errors),
            only: port_list("--only-inbound-ports", &self.only_inbound_ports, own, &mut errors),
        };
        let outbound = PortFilter {
            exclude: port_list("--exclude-outbound-ports", &self.exclude_outbound_ports, own, &mut errors),
            only: port_list("--only-outbound-ports", &self.only_outbound_ports, own, &mut errors),
        };
        let exclude =
            cidr_list("--exclude-outbound-cidrs", &self.exclude_outbound_cidrs, self.families, &mut errors);
        let only = cidr_list("--only-outbound-cidrs", &self.only_outbound_cidrs, self.families, &mut errors);
        let (exclude_v4, exclude_v6) = split(&exclude);
        let (only_v4, only_v6) = split(&only);
        let interfaces = interfaces(&self.exclude_interfaces, &mut errors);
        if !errors.is_empty() {
            return Err(Invalid(errors));
        }
        Ok(Config {
            proxy_uids,
            proxy_gids,
            own,
            inbound,
            outbound,
            outbound_v4: NetFilter { exclude: exclude_v4, only: only_v4 },
            outbound_v6: NetFilter { exclude: exclude_v6, only: only_v6 },
            interfaces,
            families: self.families,
            only_networks: !only.is_empty(),
        })
    }

    fn own_ports(&self, errors: &mut Vec<ConfigError>) -> OwnPorts {
        let own = [
            ("--inbound-port", self.inbound_port),
            ("--outbound-port", self.outbound_port),
            ("--admin-port", self.admin_port),
        ];
        for (i, &(first, port)) in own.iter().enumerate() {
            if port == 0 {
                errors.push(ConfigError::PortZero { option: first });
                continue;
            }
            for &(second, other) in &own[i + 1..] {
                if port == other {
                    errors.push(ConfigError::SamePort { first, second, port });
                }
            }
        }
        OwnPorts { inbound: self.inbound_port, outbound: self.outbound_port, admin: self.admin_port }
    }
}

impl OwnPorts {
    /// Each port with what the proxy does there.
    pub(crate) fn named(self) -> [(&'static str, u16); 3] {
        [("inbound", self.inbound), ("outbound", self.outbound), ("admin", self.admin)]
    }
}

fn owners(option: &'static str, ids: &[u32], errors: &mut Vec<ConfigError>) -> Vec<u32> {
    if ids.contains(&0) {
        errors.push(ConfigError::Root { option });
    }
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn port_list(
    option: &'static str,
    typed: &[String],
    own: OwnPorts,
    errors: &mut Vec<ConfigError>,
) -> Vec<PortRange> {
    let mut ranges: Vec<PortRange> = Vec::new();
    for value in entries(typed) {
        match value.parse::<PortRange>() {
            Ok(range) => ranges.push(range),
            Err(reason) => errors.push(ConfigError::Port { option, value: value.to_owned(), reason }),
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if pair[1].first <= pair[0].last {
            errors.push(ConfigError::OverlappingPorts { option, first: pair[0], second: pair[1] });
        }
    }
    for &value in &ranges {
        for (role, port) in own.named() {
            if value.contains(port) {
                errors.push(ConfigError::OwnPort { option, value, port, role });
            }
        }
    }
    ranges
}

fn cidr_list(
    option: &'static str,
    typed: &[String],
    families: Families,
    errors: &mut Vec<ConfigError>,
) -> Vec<IpNet> {
    let mut nets: Vec<IpNet> = Vec::new();
    for value in entries(typed) {
        // A bare address is the network of that one address.
        let parsed = value.parse::<IpNet>().or_else(|_| value.parse::<IpAddr>().map(IpNet::from));
        let Ok(net) = parsed else {
            errors.push(ConfigError::Cidr { option, value: value.to_owned() });
            continue;
        };
        let network = net.trunc();
        if network != net {
            errors.push(ConfigError::HostBits { option, value: net, network });
            continue;
        }
        if let IpNet::V6(v6) = net
            && v6.prefix_len() >= 96
            && v6.addr().to_ipv4_mapped().is_some()
        {
            errors.push(ConfigError::MappedCidr { option, value: net });
            continue;
        }
        let family = match net {
            IpNet::V4(_) => Family::Ipv4,
            IpNet::V6(_) => Family::Ipv6,
        };
        if let [captured] = *families.list()
            && captured != family
        {
            errors.push(ConfigError::WrongFamily { option, value: net, family, captured });
            continue;
        }
        nets.push(net);
    }
    nets.sort_unstable();
    for (i, first) in nets.iter().enumerate() {
        for second in &nets[i + 1..] {
            if first.contains(second) || second.contains(first) {
                errors.push(ConfigError::OverlappingCidrs { option, first: *first, second: *second });
            }
        }
    }
    nets
}

/// What one pod's owner and the installation exclude, together: of two lists the same may stand in both. What cannot
/// be read stays, for [`Options::validate`] to name.
pub fn merged_ports(own: Vec<String>, all: &[String]) -> Vec<String> {
    let both: Vec<String> = own.into_iter().chain(all.iter().cloned()).collect();
    let Ok(mut ranges) = entries(&both).map(str::parse::<PortRange>).collect::<Result<Vec<_>, _>>() else {
        return both;
    };
    ranges.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::new();
    for range in ranges {
        match merged.last_mut().filter(|last| range.first <= last.last) {
            Some(last) => last.last = last.last.max(range.last),
            None => merged.push(range),
        }
    }
    merged.iter().map(ToString::to_string).collect()
}

/// The same of networks.
pub fn merged_cidrs(own: Vec<String>, all: &[String]) -> Vec<String> {
    let both: Vec<String> = own.into_iter().chain(all.iter().cloned()).collect();
    let parse = |text: &str| text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let Ok(mut nets) = entries(&both).map(parse).collect::<Result<Vec<_>, _>>() else { return both };
    nets.sort_by_key(|net| (net.prefix_len(), *net));
    let mut merged: Vec<IpNet> = Vec::new();
    for net in nets {
        if !merged.iter().any(|wider| wider.contains(&net)) {
            merged.push(net);
        }
    }
    merged.iter().map(ToString::to_string).collect()
}

/// An empty value (an environment variable that is set but says nothing) is an empty list.
fn entries(typed: &[String]) -> impl Iterator<Item = &str> {
    typed.iter().map(|value| value.trim()).filter(|value| !value.is_empty())
}

fn split(nets: &[IpNet]) -> (Vec<Ipv4Net>, Vec<Ipv6Net>) {
    let mut v4 = Vec::new();
    let mut v6 = Vec::new();
    for net in nets {
        match net {
            IpNet::V4(net) => v4.push(*net),
            IpNet::V6(net) => v6.push(*net),
        }
    }
    (v4, v6)
}

fn interfaces(typed: &[String], errors: &mut Vec<ConfigError>) -> Vec<String> {
    let mut names = Vec::new();
    for name in entries(typed) {
        // The name goes into the rules as it is: nothing that could end a word or a line may pass,
        // and a trailing `+` is iptables' wildcard.
        let fits = name.len() < MAX_INTERFACE_NAME
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && !name.starts_with('-');
        if name == "lo" {
            errors.push(ConfigError::Loopback);
        } else if fits {
            names.push(name.to_owned());
        } else {
            errors.push(ConfigError::Interface { value: name.to_owned() });
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// The kernel's IFNAMSIZ: 15 bytes and a NUL.
const MAX_INTERFACE_NAME: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(values: &[&str]) -> Vec<String> {
        values.iter().map(|v| (*v).to_owned()).collect()
    }

    fn errors(options: &Options) -> Vec<String> {
        match options.validate() {
            Ok(config) => panic!("accepted: {config:?}"),
            Err(Invalid(errors)) => errors.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn without_options_ports_and_user_are_those_of_the_mesh() {
        let config = Options::default().validate().unwrap();
        assert_eq!(config.proxy_uids, [ports::PROXY_UID]);
        assert!(config.proxy_gids.is_empty());
        assert_eq!(config.own.named().map(|(_, port)| port), [14_006, 14_001, 14_021]);
    }

    #[test]
    fn every_mistake_is_named_and_all_at_once() {
        let options = Options {
            outbound_port: 0,
            admin_port: ports::INBOUND,
            exclude_inbound_ports: list(&["0", "22", "20-25", "14006", "9-8", "+7", "http", "1-70000"]),
            exclude_outbound_cidrs: list(&[
                "10.0.0.0/8",
                "10.1.0.0/16",
                "10.0.0.1/24",
                "ten",
                "::ffff:10.0.0.0/104",
            ]),
            exclude_interfaces: list(&["lo", "eth0 -j ACCEPT", "net+", "averyveryverylongname", "net1"]),
            ..Options::default()
        };
        assert_eq!(
            errors(&options),
            [
                "--inbound-port and --admin-port are both 14006: the proxy needs a port for each",
                "--outbound-port: port 0 is not a port",
                "--exclude-inbound-ports: \"0\" port 0 is not a port",
                "--exclude-inbound-ports: \"9-8\" ends before it starts",
                "--exclude-inbound-ports: \"+7\" is neither a port (1 to 65535) nor a range such as 9100-9110",
                "--exclude-inbound-ports: \"http\" is neither a port (1 to 65535) nor a range such as 9100-9110",
                "--exclude-inbound-ports: \"1-70000\" is neither a port (1 to 65535) nor a range such as 9100-9110",
                "--exclude-inbound-ports: 20-25 and 22 overlap",
                "--exclude-inbound-ports: 14006 holds 14006, the proxy's own inbound port, which is never captured",
                "--exclude-inbound-ports: 14006 holds 14006, the proxy's own admin port, which is never captured",
                "--exclude-outbound-cidrs: 10.0.0.1/24 has host bits set; the network is 10.0.0.0/24",
                "--exclude-outbound-cidrs: \"ten\" is not a network such as 10.0.0.0/8 or fd00::/8",
                "--exclude-outbound-cidrs: ::ffff:10.0.0.0/104 is an IPv4 network of the wrong family: write it as IPv4",
                "--exclude-outbound-cidrs: 10.0.0.0/8 and 10.1.0.0/16 overlap",
                "--exclude-interfaces: lo has its own rules and cannot be listed",
                "--exclude-interfaces: \"eth0 -j ACCEPT\" is not an interface name",
                "--exclude-interfaces: \"net+\" is not an interface name",
                "--exclude-interfaces: \"averyveryverylongname\" is not an interface name",
            ]
        );
    }

    #[test]
    fn a_network_of_a_family_that_is_not_captured_is_refused() {
        let v4 = Options {
            families: Families::Ipv4,
            exclude_outbound_cidrs: list(&["fd00::/8"]),
            ..Options::default()
        };
        assert_eq!(errors(&v4), ["--exclude-outbound-cidrs: fd00::/8 is ipv6, but --families is ipv4"]);
        let v6 = Options {
            families: Families::Ipv6,
            only_outbound_cidrs: list(&["10.0.0.0/8"]),
            ..Options::default()
        };
        assert_eq!(errors(&v6), ["--only-outbound-cidrs: 10.0.0.0/8 is ipv4, but --families is ipv6"]);
    }

    #[test]
    fn the_proxy_must_be_tellable_apart_and_is_never_root() {
        let nobody = Options { proxy_uids: vec![], ..Options::default() };
        assert_eq!(nobody.validate().unwrap_err().0, [ConfigError::NoProxy]);
        let root = Options { proxy_uids: vec![0], proxy_gids: vec![0], ..Options::default() };
        assert_eq!(
            root.validate().unwrap_err().0,
            [ConfigError::Root { option: "--proxy-uid" }, ConfigError::Root { option: "--proxy-gid" }]
        );
    }

    #[test]
    fn equal_settings_typed_in_another_order_are_equal() {
        let a = Options {
            exclude_outbound_ports: list(&["25", "6000-6100", ""]),
            exclude_outbound_cidrs: list(&["fd00:9::/64", "10.9.0.0/16", "10.8.0.1"]),
            ..Options::default()
        };
        let b = Options {
            exclude_outbound_ports: list(&["6000-6100", " 25 "]),
            exclude_outbound_cidrs: list(&["10.8.0.1/32", "10.9.0.0/16", "fd00:9::/64"]),
            ..Options::default()
        };
        assert_eq!(a.validate().unwrap(), b.validate().unwrap());
    }

    proptest! {
        #[test]
        fn what_passes_has_no_overlap_and_no_own_port(typed in prop::collection::vec("[0-9]{1,5}(-[0-9]{1,5})?", 0..6)) {
            let options = Options { exclude_inbound_ports: typed, ..Options::default() };
            if let Ok(config) = options.validate() {
                let ranges = config.inbound.exclude;
                prop_assert!(ranges.windows(2).all(|w| w[0].last < w[1].first));
                for range in ranges {
                    prop_assert!(range.first > 0 && range.first <= range.last);
                    prop_assert!(config.own.named().iter().all(|(_, port)| !range.contains(*port)));
                }
            }
        }

        #[test]
        fn no_option_can_write_a_rule_of_its_own(name in "\\PC{0,20}") {
            let options = Options { exclude_interfaces: vec![name], ..Options::default() };
            if let Ok(config) = options.validate() {
                for name in config.interfaces {
                    prop_assert!(!name.contains(char::is_whitespace) && !name.starts_with('-'));
                }
            }
        }
    }
}
