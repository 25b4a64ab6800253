//! Environment → [`Config`], in one pass that reports every error at once.
//!
//! Why two stages: what was typed is text; what the program uses is checked and typed. A sidecar that
//! cannot work with its settings says all that is wrong with them, each with its variable and the fix,
//! and exits: nobody restarts it five times to find five typos. The effective result is printed at start,
//! defaults included, so that a log answers "with which limits did it run?".
//!
//! Every duration is a setting, so that a test can run hours in seconds: `250ms`, `10s`, `5m`, `2h`.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy, ports,
};

use crate::harden::Harden;

/// As many headers the HTTP/1 library reads into arrays on its stack. Told of any other number, be it smaller, it
/// allocates and fills two arrays for each head, which costs more than all that is decided about a request.
pub(crate) const HEADERS_ON_STACK: usize = 100;

/// What the fields that a sidecar adds to a head may take.
const ADDED_FIELDS: usize = 2 * 1024;

/// Where the admin socket is unless `WEFT_ADMIN_SOCKET` says otherwise.
pub const ADMIN_SOCKET: &str = "/var/run/weft/admin.sock";

/// All that the sidecar is told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who this workload is: from `WEFT_TRUST_DOMAIN`, `WEFT_NAMESPACE` and `WEFT_SERVICE_ACCOUNT`.
    pub identity: SpiffeId,
    /// `WEFT_TRUST_DOMAIN`
    pub trust_domain: TrustDomain,
    /// `WEFT_POD_NAME`
    pub pod_name: String,
    /// `WEFT_POD_UID`
    pub pod_uid: PodUid,
    /// `WEFT_POD_IPS`; empty: any.
    pub pod_ips: Vec<IpAddr>,
    /// `WEFT_TRUST_ANCHORS`: PEM, read again at each connection to the controller.
    pub trust_anchors: PathBuf,
    /// `WEFT_TOKEN_FILE`: read again at each use.
    pub token_file: PathBuf,
    /// `WEFT_CONTROLLER`: discovery and telemetry.
    pub controller: HostPort,
    /// `WEFT_CONTROLLER_IDENTITY`: certificates.
    pub controller_certify: HostPort,
    /// Who the controller must be: the service account `weft-controller` of namespace `weft`.
    pub controller_identity: SpiffeId,
    /// `WEFT_OUTBOUND_PORT`
    pub outbound_port: u16,
    /// `WEFT_INBOUND_PORT`
    pub inbound_port: u16,
    /// `WEFT_ADMIN_ADDR`: `/live`, `/ready`, `/metrics`.
    pub admin_addr: SocketAddr,
    /// `WEFT_ADMIN_SOCKET`: everything else.
    pub admin_socket: PathBuf,
    /// `WEFT_TCP_PROBES`: ports of the app that `/probe/<port>` of the open admin port tries.
    pub tcp_probes: Vec<u16>,
    /// `WEFT_WORKERS`
    pub workers: usize,
    /// `WEFT_LOG`: a filter such as `info,weft_proxy=debug`.
    pub log: String,
    /// `WEFT_LOG_FORMAT`
    pub log_format: LogFormat,
    /// `WEFT_HARDEN`
    pub harden: Harden,
    /// What an app or a peer may make grow.
    pub limits: GrowthLimits,
    /// How long things may take.
    pub times: Times,
    effective: Vec<(&'static str, String, bool)>,
    warnings: Vec<String>,
}

/// What an app or a peer may make grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrowthLimits {
    /// Connections open at a time in each direction (`WEFT_MAX_CONNECTIONS`).
    pub max_connections: usize,
    /// Inbound connections from one address (`WEFT_MAX_CONNECTIONS_PER_PEER`).
    pub max_connections_per_peer: usize,
    /// Bytes of a request's or response's head (`WEFT_MAX_HEADER_BYTES`).
    pub header_bytes: usize,
    /// Headers of a request or response (`WEFT_MAX_HEADERS`; as many as Envoy lets pass, and more of them cost more).
    pub headers: usize,
    /// HTTP/2 streams of one connection from an app or a peer outside the mesh (`WEFT_MAX_STREAMS_OUTSIDE`).
    pub streams_outside: u32,
    /// HTTP/2 streams of one connection between sidecars (`WEFT_MAX_STREAMS_MESH`).
    pub streams_mesh: u32,
    /// Connections that may wait for discovery (`WEFT_DISCOVERY_WAITERS`).
    pub discovery_waiters: usize,
    /// Destinations that may be subscribed (`WEFT_MAX_DESTINATIONS`).
    pub destinations: usize,
    /// Time series of requests (`WEFT_MAX_SERIES`).
    pub series: usize,
    /// Lines that may wait for a blocked log pipe (`WEFT_LOG_BUFFER_LINES`).
    pub log_lines: usize,
}

impl GrowthLimits {
    /// The same limit on a head as HTTP/2 between sidecars counts it, so that what the first sidecar lets pass the second
    /// one does: 32 bytes more a field, and the fields that sidecars add.
    pub(crate) fn header_list(&self) -> u32 {
        let bytes =
            self.header_bytes.saturating_add(self.headers.saturating_mul(32)).saturating_add(ADDED_FIELDS);
        u32::try_from(bytes).unwrap_or(u32::MAX)
    }
}

/// How long things may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Times {
    /// To open a connection, unless policy says otherwise (`WEFT_CONNECT_TIMEOUT`).
    pub connect: Duration,
    /// For a request's head, from its first byte (`WEFT_HEADER_TIMEOUT`).
    pub header: Duration,
    /// An idle keep-alive connection of a client (`WEFT_KEEP_ALIVE_TIMEOUT`).
    pub keep_alive: Duration,
    /// An idle connection to the app, for reuse (behaviours: HTTP/1 no. 7) (`WEFT_APP_IDLE_TIMEOUT`).
    pub app_idle: Duration,
    /// An idle connection to another sidecar (`WEFT_POOL_IDLE_TIMEOUT`).
    pub pool_idle: Duration,
    /// For a TLS handshake (`WEFT_HANDSHAKE_TIMEOUT`).
    pub handshake: Duration,
    /// How long peers are told while requests are still served (`WEFT_LAME_DUCK`).
    pub lame_duck: Duration,
    /// The whole drain, then connections are cut (`WEFT_DRAIN_TIMEOUT`).
    pub drain: Duration,
    /// A connection may wait for discovery (`WEFT_DISCOVERY_HOLD`).
    pub discovery_hold: Duration,
    /// A destination unused for so long is unsubscribed (`WEFT_DISCOVERY_IDLE`).
    pub discovery_idle: Duration,
    /// A snapshot that is not whole after this is published with what is there (`WEFT_DISCOVERY_WARM`).
    pub discovery_warm: Duration,
    /// Reconnects: base of the full jitter (`WEFT_RECONNECT_BASE`).
    pub reconnect_base: Duration,
    /// Reconnects: its cap (`WEFT_RECONNECT_CAP`).
    pub reconnect_cap: Duration,
    /// A stream that lived so long was healthy: the next reconnect starts from the base (`WEFT_RECONNECT_HEALTHY`).
    pub reconnect_healthy: Duration,
    /// HTTP/2 PING to the controller (`WEFT_PING_INTERVAL`).
    pub ping: Duration,
    /// And how long its answer may take (`WEFT_PING_TIMEOUT`).
    pub ping_timeout: Duration,
    /// One exchange with the controller: connect, handshake, certify (`WEFT_CONTROLLER_TIMEOUT`).
    pub controller: Duration,
    /// Between two telemetry reports (`WEFT_REPORT_INTERVAL`).
    pub report: Duration,
    /// Spread of renewals after a change of trust, so that a fleet does not renew together (`WEFT_RENEW_SPREAD`).
    pub renew_spread: Duration,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// A host name or address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Everything that is wrong with the environment.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<String>);

impl Config {
    /// Reads the process' environment.
    ///
    /// # Errors
    /// Every variable that is missing or wrong.
    pub fn from_env() -> Result<Self, ConfigErrors> {
        let mut config = Self::read(|name| std::env::var(name).ok())?;
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        config.warnings = names
            .filter(|name| config.looks_like_a_typo(name))
            .map(|name| format!("{name} is not a setting of weft-proxy: it has no effect"))
            .collect();
        Ok(config)
    }

    /// Reads settings from anywhere.
    ///
    /// # Errors
    /// Every variable that is missing or wrong.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigErrors> {
        let mut env = Reader { get, errors: Vec::new(), effective: Vec::new() };

        let trust_domain = env.with("WEFT_TRUST_DOMAIN", "cluster.local", |text| {
            TrustDomain::new(text).map_err(|e| e.to_string())
        });
        let namespace =
            env.required("WEFT_NAMESPACE", "the pod's namespace (downward API: metadata.namespace)");
        let account = env.required(
            "WEFT_SERVICE_ACCOUNT",
            "the pod's service account (downward API: spec.serviceAccountName)",
        );
        let pod_uid = env
            .required("WEFT_POD_UID", "the pod's uid (downward API: metadata.uid)")
            .and_then(|uid| env.check("WEFT_POD_UID", PodUid::new(&uid)));
        let pod_name = env.or("WEFT_POD_NAME", "");
        let pod_ips = env.with("WEFT_POD_IPS", "", |text| {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            items
                .map(|item| item.parse::<IpAddr>().map_err(|_| format!("{item:?} is not an IP address")))
                .collect::<Result<Vec<_>, _>>()
        });
        let identity = match (&trust_domain, &namespace, &account) {
            (Some(td), Some(ns), Some(sa)) => {
                env.check("WEFT_NAMESPACE, WEFT_SERVICE_ACCOUNT", SpiffeId::new(td, ns, sa))
            }
            _ => None, // already reported
        };
        let controller_identity = trust_domain.as_ref().and_then(|td| {
            env.check("WEFT_TRUST_DOMAIN", SpiffeId::new(td, CONTROLLER_NAMESPACE, CONTROLLER_ACCOUNT))
        });

        let trust_anchors = env.path("WEFT_TRUST_ANCHORS", "/var/run/weft/trust/roots.pem");
        let token_file = env.path("WEFT_TOKEN_FILE", "/var/run/secrets/tokens/weft-token");
        let controller = env
            .parsed::<HostPort>("WEFT_CONTROLLER", &format!("weft-controller.weft.svc:{}", ports::DISCOVERY));
        let controller_certify = env.parsed::<HostPort>(
            "WEFT_CONTROLLER_IDENTITY",
            &format!("weft-controller.weft.svc:{}", ports::IDENTITY),
        );

        let outbound_port = env.port("WEFT_OUTBOUND_PORT", ports::OUTBOUND);
        let inbound_port = env.port("WEFT_INBOUND_PORT", ports::INBOUND);
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, ports::ADMIN));
        let admin_addr = env.with("WEFT_ADMIN_ADDR", &any.to_string(), |text| {
            text.parse::<SocketAddr>().map_err(|_| format!("{text:?} is not <address>:<port>"))
        });
        let admin_socket = env.path("WEFT_ADMIN_SOCKET", ADMIN_SOCKET);
        if let (Some(outbound), Some(inbound), Some(admin)) = (outbound_port, inbound_port, admin_addr)
            && (outbound == inbound || outbound == admin.port() || inbound == admin.port())
        {
            env.error(format!(
                "WEFT_OUTBOUND_PORT ({outbound}), WEFT_INBOUND_PORT ({inbound}) and the port of \
                 WEFT_ADMIN_ADDR ({}) must differ",
                admin.port()
            ));
        }

        let tcp_probes = env.with("WEFT_TCP_PROBES", "", |text| {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            let port = |item: &str| item.parse::<u16>().ok().filter(|port| *port > 0);
            items
                .map(|item| port(item).ok_or_else(|| format!("{item:?} is not a port")))
                .collect::<Result<Vec<_>, _>>()
        });

        let workers = env.number("WEFT_WORKERS", 1, 1..=256);
        let log = env.or("WEFT_LOG", "info");
        if let Err(e) = log.parse::<tracing_subscriber::filter::Targets>() {
            env.error(format!("WEFT_LOG: {log:?} is not a log filter such as info,weft_proxy=debug: {e}"));
        }
        let log_format = env.with("WEFT_LOG_FORMAT", "json", |text| match text {
            "json" => Ok(LogFormat::Json),
            "text" => Ok(LogFormat::Text),
            other => Err(format!("{other:?} is neither json nor text")),
        });
        let harden = env.parsed::<Harden>("WEFT_HARDEN", "on");
        let limits = env.limits();
        let times = env.times();

        // Every `None` has left an error behind; the pattern only proves it to the compiler.
        let built = (|| {
            Some(Self {
                identity: identity?,
                trust_domain: trust_domain?,
                pod_name,
                pod_uid: pod_uid?,
                pod_ips: pod_ips?,
                trust_anchors,
                token_file,
                controller: controller?,
                controller_certify: controller_certify?,
                controller_identity: controller_identity?,
                outbound_port: outbound_port?,
                inbound_port: inbound_port?,
                admin_addr: admin_addr?,
                admin_socket,
                tcp_probes: tcp_probes?,
                workers: workers?,
                log,
                log_format: log_format?,
                harden: harden?,
                limits: limits?,
                times: times?,
                effective: std::mem::take(&mut env.effective),
                warnings: Vec::new(),
            })
        })();
        match built {
            Some(config) if env.errors.is_empty() => Ok(config),
            _ => Err(ConfigErrors(env.errors)),
        }
    }

    /// The effective settings: variable, value, whether it was set (else it is the default).
    pub fn effective(&self) -> &[(&'static str, String, bool)] {
        &self.effective
    }

    /// Variables that look like settings and are none.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn looks_like_a_typo(&self, name: &str) -> bool {
        // Kubernetes sets WEFT_CONTROLLER_SERVICE_HOST, WEFT_CONTROLLER_PORT_… for a Service of that name.
        let service =
            name.contains("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.contains("_PORT_");
        let service = service || name == "WEFT_CONTROLLER_PORT";
        name.starts_with("WEFT_") && !service && !self.effective.iter().any(|(known, ..)| *known == name)
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value, set) in &self.effective {
            writeln!(f, "{name}={value}{}", if *set { "" } else { "  (default)" })?;
        }
        Ok(())
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the environment has {} error(s):", self.0.len())?;
        for error in &self.0 {
            writeln!(f, "  - {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            return write!(f, "[{}]:{}", self.host, self.port);
        }
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not <host>:<port>");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let port: u16 = port.parse().map_err(|_| wrong())?;
        if host.is_empty() || port == 0 || (bracketed.is_none() && host.contains(':')) {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

/// Reads variables one by one, and goes on after an error.
struct Reader<G> {
    get: G,
    errors: Vec<String>,
    effective: Vec<(&'static str, String, bool)>,
}

impl<G: Fn(&str) -> Option<String>> Reader<G> {
    fn limits(&mut self) -> Option<GrowthLimits> {
        let max_connections = self.number("WEFT_MAX_CONNECTIONS", 20_000, 1..=1_000_000);
        let max_connections_per_peer = self.number("WEFT_MAX_CONNECTIONS_PER_PEER", 5_000, 1..=1_000_000);
        let header_bytes = self.number("WEFT_MAX_HEADER_BYTES", 64 * 1024, 8 * 1024..=1024 * 1024);
        let headers = self.number("WEFT_MAX_HEADERS", HEADERS_ON_STACK, 10..=10_000);
        let streams_outside = self.number("WEFT_MAX_STREAMS_OUTSIDE", 100, 1..=100_000);
        let streams_mesh = self.number("WEFT_MAX_STREAMS_MESH", 1_000, 1..=100_000);
        let discovery_waiters = self.number("WEFT_DISCOVERY_WAITERS", 1_000, 1..=100_000);
        let destinations = self.number("WEFT_MAX_DESTINATIONS", 10_000, 1..=100_000);
        let series = self.number("WEFT_MAX_SERIES", 2_000, 1..=100_000);
        let log_lines = self.number("WEFT_LOG_BUFFER_LINES", 4_096, 1..=1_000_000);
        Some(GrowthLimits {
            max_connections: max_connections?,
            max_connections_per_peer: max_connections_per_peer?,
            header_bytes: header_bytes?,
            headers: headers?,
            streams_outside: streams_outside.and_then(|n| u32::try_from(n).ok())?,
            streams_mesh: streams_mesh.and_then(|n| u32::try_from(n).ok())?,
            discovery_waiters: discovery_waiters?,
            destinations: destinations?,
            series: series?,
            log_lines: log_lines?,
        })
    }

    fn times(&mut self) -> Option<Times> {
        let connect = self.time("WEFT_CONNECT_TIMEOUT", policy::CONNECT_TIMEOUT);
        let header = self.time("WEFT_HEADER_TIMEOUT", Duration::from_secs(10));
        let keep_alive = self.time("WEFT_KEEP_ALIVE_TIMEOUT", Duration::from_secs(600));
        let app_idle = self.time("WEFT_APP_IDLE_TIMEOUT", Duration::from_secs(2));
        let pool_idle = self.time("WEFT_POOL_IDLE_TIMEOUT", Duration::from_secs(300));
        let handshake = self.time("WEFT_HANDSHAKE_TIMEOUT", Duration::from_secs(10));
        let lame_duck = self.time("WEFT_LAME_DUCK", Duration::from_secs(2));
        let drain = self.time("WEFT_DRAIN_TIMEOUT", Duration::from_secs(25));
        let discovery_hold = self.time("WEFT_DISCOVERY_HOLD", Duration::from_secs(2));
        let discovery_idle = self.time("WEFT_DISCOVERY_IDLE", Duration::from_secs(600));
        let discovery_warm = self.time("WEFT_DISCOVERY_WARM", Duration::from_secs(15));
        let reconnect_base = self.time("WEFT_RECONNECT_BASE", Duration::from_secs(1));
        let reconnect_cap = self.time("WEFT_RECONNECT_CAP", Duration::from_secs(30));
        let reconnect_healthy = self.time("WEFT_RECONNECT_HEALTHY", Duration::from_secs(30));
        let ping = self.time("WEFT_PING_INTERVAL", Duration::from_secs(10));
        let ping_timeout = self.time("WEFT_PING_TIMEOUT", Duration::from_secs(5));
        let controller = self.time("WEFT_CONTROLLER_TIMEOUT", Duration::from_secs(10));
        let report = self.time("WEFT_REPORT_INTERVAL", Duration::from_secs(10));
        let renew_spread = self.time("WEFT_RENEW_SPREAD", Duration::from_secs(5));
        Some(Times {
            connect: connect?,
            header: header?,
            keep_alive: keep_alive?,
            app_idle: app_idle?,
            pool_idle: pool_idle?,
            handshake: handshake?,
            lame_duck: lame_duck?,
            drain: drain?,
            discovery_hold: discovery_hold?,
            discovery_idle: discovery_idle?,
            discovery_warm: discovery_warm?,
            reconnect_base: reconnect_base?,
            reconnect_cap: reconnect_cap?,
            reconnect_healthy: reconnect_healthy?,
            ping: ping?,
            ping_timeout: ping_timeout?,
            controller: controller?,
            report: report?,
            renew_spread: renew_spread?,
        })
    }

    fn error(&mut self, error: String) {
        self.errors.push(error);
    }

    fn check<T, E: fmt::Display>(&mut self, name: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.error(format!("{name}: {e}"))).ok()
    }

    fn raw(&self, name: &str) -> Option<String> {
        (self.get)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn or(&mut self, name: &'static str, default: &str) -> String {
        let set = self.raw(name);
        let value = set.clone().unwrap_or_else(|| default.to_owned());
        self.effective.push((name, value.clone(), set.is_some()));
        value
    }

    fn required(&mut self, name: &'static str, what: &str) -> Option<String> {
        let Some(value) = self.raw(name) else {
            self.error(format!("{name} is not set: set it to {what}"));
            return None;
        };
        self.effective.push((name, value.clone(), true));
        Some(value)
    }

    fn with<T>(
        &mut self,
        name: &'static str,
        default: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.or(name, default);
        self.check(name, parse(&text))
    }

    fn parsed<T: FromStr<Err = String>>(&mut self, name: &'static str, default: &str) -> Option<T> {
        self.with(name, default, str::parse)
    }

    fn path(&mut self, name: &'static str, default: &str) -> PathBuf {
        self.or(name, default).into()
    }

    fn port(&mut self, name: &'static str, default: u16) -> Option<u16> {
        self.with(name, &default.to_string(), |text| match text.parse() {
            Ok(0) | Err(_) => Err(format!("{text:?} is not a port: use 1 to 65535")),
            Ok(port) => Ok(port),
        })
    }

    fn number(
        &mut self,
        name: &'static str,
        default: usize,
        range: std::ops::RangeInclusive<usize>,
    ) -> Option<usize> {
        self.with(name, &default.to_string(), |text| {
            let number = text.parse().ok().filter(|number| range.contains(number));
            number
                .ok_or_else(|| format!("{text:?} is not a number from {} to {}", range.start(), range.end()))
        })
    }

    fn time(&mut self, name: &'static str, default: Duration) -> Option<Duration> {
        self.with(name, &show_duration(default), parse_duration)
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration from 1ms to 24h such as 250ms, 10s, 5m or 2h");
    let unit = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..unit].parse().map_err(|_| wrong())?;
    let millis = match &text[unit..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let total = number.checked_mul(millis).filter(|total| (1..=86_400_000).contains(total));
    total.map(Duration::from_millis).ok_or_else(wrong)
}

fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        _ if !millis.is_multiple_of(1_000) => format!("{millis}ms"),
        _ if !millis.is_multiple_of(60_000) => format!("{}s", millis / 1_000),
        _ if !millis.is_multiple_of(3_600_000) => format!("{}m", millis / 60_000),
        _ => format!("{}h", millis / 3_600_000),
    }
}

/// Where the controller lives; its identity is not a setting, so that no setting can weaken it.
const CONTROLLER_NAMESPACE: &str = "weft";
const CONTROLLER_ACCOUNT: &str = "weft-controller";

/// A complete configuration for tests: everything at its default.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    impl Config {
        /// Workload `ns`/`sa` with pod uid `uid`; `more` overrides single variables.
        pub(crate) fn for_tests(more: &[(&str, &str)]) -> Self {
            let base =
                [("WEFT_NAMESPACE", "shop"), ("WEFT_SERVICE_ACCOUNT", "web"), ("WEFT_POD_UID", "uid-web-1")];
            let find = |name: &str| {
                let all = more.iter().chain(&base);
                all.clone().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            };
            Self::read(find).unwrap()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = Config::for_tests(&[]);
        assert_eq!(config.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(config.controller_identity.as_str(), "spiffe://cluster.local/ns/weft/sa/weft-controller");
        assert_eq!(config.times.discovery_hold, Duration::from_secs(2));
        assert_eq!(config.times.discovery_idle, Duration::from_secs(600));
        assert_eq!((config.limits.header_bytes, config.limits.headers), (65_536, 100));
        assert_eq!((config.limits.streams_outside, config.limits.streams_mesh), (100, 1_000));
        let text = config.to_string();
        assert!(text.contains("WEFT_DISCOVERY_IDLE=10m  (default)"), "{text}");
        assert!(text.contains("WEFT_POD_UID=uid-web-1\n"), "{text}");
    }

    #[test]
    fn every_error_is_reported_at_once_with_its_variable() {
        let errors = Config::read(|name| {
            Some(match name {
                "WEFT_NAMESPACE" => "Shop".into(),
                "WEFT_SERVICE_ACCOUNT" => "web".into(),
                "WEFT_POD_IPS" => "10.0.0.1, nonsense".into(),
                "WEFT_OUTBOUND_PORT" => "0".into(),
                "WEFT_CONTROLLER" => "controller".into(),
                "WEFT_MAX_HEADERS" => "many".into(),
                "WEFT_DISCOVERY_HOLD" => "2".into(),
                "WEFT_LOG" => "weft_proxy=loud".into(),
                _ => return None,
            })
        })
        .unwrap_err();
        let text = errors.to_string();
        for name in [
            "WEFT_NAMESPACE",
            "WEFT_POD_UID is not set",
            "WEFT_POD_IPS: \"nonsense\"",
            "WEFT_OUTBOUND_PORT: \"0\"",
            "WEFT_CONTROLLER: ",
            "WEFT_MAX_HEADERS: ",
            "WEFT_DISCOVERY_HOLD: ",
            "WEFT_LOG: ",
        ] {
            assert!(text.contains(name), "{name} missing in:\n{text}");
        }
        assert_eq!(errors.0.len(), 8, "{text}");
    }

    #[test]
    fn own_ports_may_not_collide() {
        let read = |inbound: &str| {
            let inbound = inbound.to_owned();
            Config::read(move |name| match name {
                "WEFT_NAMESPACE" | "WEFT_SERVICE_ACCOUNT" | "WEFT_POD_UID" => Some("x".into()),
                "WEFT_INBOUND_PORT" => Some(inbound.clone()),
                _ => None,
            })
        };
        assert!(read("14001").unwrap_err().to_string().contains("must differ"));
        assert!(read("15000").is_ok());
    }

    #[test]
    fn host_and_port() {
        let parse = |text: &str| text.parse::<HostPort>().map(|at| at.to_string());
        assert_eq!(parse("[::1]:80").as_deref(), Ok("[::1]:80"));
        assert_eq!(parse("name:80").as_deref(), Ok("name:80"));
        for wrong in ["name", ":80", "name:0", "::1:80", "name:x"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_round_trip() {
        for text in ["1ms", "250ms", "10s", "5m", "2h", "90s"] {
            assert_eq!(show_duration(parse_duration(text).unwrap()), text);
        }
        for wrong in ["", "10", "0s", "ms", "1d", "-1s", "25h", "99999999999999999999s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn typos_are_noticed_and_service_variables_are_not() {
        let config = Config::for_tests(&[]);
        assert!(config.looks_like_a_typo("WEFT_MAX_CONECTIONS"));
        for fine in ["WEFT_LOG", "WEFT_CONTROLLER_SERVICE_HOST", "WEFT_CONTROLLER_PORT", "PATH"] {
            assert!(!config.looks_like_a_typo(fine), "{fine}");
        }
    }
}
