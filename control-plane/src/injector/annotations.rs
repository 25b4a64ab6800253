//! What a pod says about its own sidecar, checked where it is read.
//!
//! Why a wrong value refuses the pod: a port that was to be skipped and is not, or the reverse, is found by an outage
//! or by nobody. All that is wrong is said at once, each with its annotation and what to write instead.
//! [`ALL`] is what there is: `weft inject --help` and the message about a misspelt one are made of it.

use std::{collections::BTreeMap, fmt};

use ipnet::IpNet;
use weft_core::ports;

use crate::{
    index::{parse_opaque_ports, parse_ports},
    resources::{INJECT, INJECTED, OPAQUE_PORTS, SKIP_INBOUND_PORTS, WEIGHT, values::GatewayDuration},
};

/// Ports that the app dials without the sidecar: `"25,6000-6100"`.
pub const SKIP_OUTBOUND_PORTS: &str = "weft.dev/skip-outbound-ports";
/// Networks that the app dials without the sidecar: `"10.9.0.0/16"`.
pub const SKIP_OUTBOUND_CIDRS: &str = "weft.dev/skip-outbound-cidrs";
/// What the sidecar logs: `debug`, or a filter such as `info,weft_proxy::inbound=debug`.
pub const LOG: &str = "weft.dev/log";
/// What the sidecar asks for: `50m`.
pub const CPU_REQUEST: &str = "weft.dev/proxy-cpu-request";
/// What the sidecar may have: `1`.
pub const CPU_LIMIT: &str = "weft.dev/proxy-cpu-limit";
/// What the sidecar asks for: `32Mi`.
pub const MEMORY_REQUEST: &str = "weft.dev/proxy-memory-request";
/// What the sidecar may have: `512Mi`.
pub const MEMORY_LIMIT: &str = "weft.dev/proxy-memory-limit";
/// How long an app that exits at once on SIGTERM is kept from hearing it: `5s`; `0s`: not at all.
pub const PRESTOP_SLEEP: &str = "weft.dev/prestop-sleep";
/// Why a pod that asked for a sidecar has none.
pub const NOT_INJECTED: &str = "weft.dev/not-injected";
/// Which version wrote the sidecar into the pod.
pub const VERSION: &str = "weft.dev/version";

/// A pod's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Whether it asks for a sidecar, or asks for none.
    pub inject: Option<bool>,
    /// As `weft-iptables` takes them.
    pub skip_inbound_ports: Option<String>,
    /// As `weft-iptables` takes them.
    pub skip_outbound_ports: Option<String>,
    /// As `weft-iptables` takes them.
    pub skip_outbound_cidrs: Option<String>,
    /// A log filter.
    pub log: Option<String>,
    /// Quantities by `requests.cpu`, `limits.memory` and so on.
    pub resources: BTreeMap<(&'static str, &'static str), String>,
    /// Seconds, if it says.
    pub prestop_sleep: Option<u64>,
}

/// One annotation that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which.
    pub annotation: String,
    /// Why, and what to write.
    pub reason: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "annotation {}: {}", self.annotation, self.reason)
    }
}

impl Annotations {
    /// Reads a pod's labels and annotations. A label says more than an annotation: webhooks are scoped by labels.
    ///
    /// # Errors
    /// Everything that cannot be used.
    pub fn read(
        labels: Option<&BTreeMap<String, String>>,
        annotations: Option<&BTreeMap<String, String>>,
    ) -> Result<Self, Vec<Wrong>> {
        let mut wrong = Vec::new();
        let mut read = Self::default();
        for (name, text) in annotations.into_iter().flatten().filter(|(name, _)| name.starts_with(PREFIX)) {
            if let Err(reason) = read.take(name, text.trim()) {
                wrong.push(Wrong { annotation: name.clone(), reason });
            }
        }
        if let Some(text) = labels.and_then(|labels| labels.get(INJECT)) {
            match enabled(text) {
                Ok(inject) => read.inject = Some(inject),
                Err(reason) => wrong.push(Wrong { annotation: format!("{INJECT} (label)"), reason }),
            }
        }
        if wrong.is_empty() { Ok(read) } else { Err(wrong) }
    }

    fn take(&mut self, name: &str, text: &str) -> Result<(), String> {
        match name {
            INJECT => self.inject = Some(enabled(text)?),
            // The controller reads it from the pod.
            OPAQUE_PORTS => {
                parse_opaque_ports(text)
                    .map_err(|reason| format!("{reason}: write \"3306\" or \"9000-9010\""))?;
            }
            SKIP_INBOUND_PORTS => self.skip_inbound_ports = port_list(text)?,
            SKIP_OUTBOUND_PORTS => self.skip_outbound_ports = port_list(text)?,
            SKIP_OUTBOUND_CIDRS => self.skip_outbound_cidrs = cidr_list(text)?,
            LOG => self.log = Some(log(text)?),
            CPU_REQUEST => self.resource("requests", "cpu", text)?,
            CPU_LIMIT => self.resource("limits", "cpu", text)?,
            MEMORY_REQUEST => self.resource("requests", "memory", text)?,
            MEMORY_LIMIT => self.resource("limits", "memory", text)?,
            PRESTOP_SLEEP => self.prestop_sleep = Some(sleep(text)?),
            WEIGHT if text.parse::<u32>().is_ok() => {}
            WEIGHT => return Err(format!("{text:?} is not a weight: write a number such as 2")),
            // Ours to write: the pod's owner has no say in them, and what they say is not read here.
            _ if WRITTEN.contains(&name) => {}
            _ => {
                let known = ALL.iter().map(|(known, ..)| *known).filter(|known| !WRITTEN.contains(known));
                let known: Vec<_> = known.collect();
                return Err(format!("there is no such annotation: known are {}", known.join(", ")));
            }
        }
        Ok(())
    }

    fn resource(&mut self, kind: &'static str, name: &'static str, text: &str) -> Result<(), String> {
        quantity(text)?;
        self.resources.insert((kind, name), text.to_owned());
        Ok(())
    }
}

fn enabled(text: &str) -> Result<bool, String> {
    match text {
        "enabled" => Ok(true),
        "disabled" => Ok(false),
        other => Err(format!("{other:?} is neither \"enabled\" nor \"disabled\"")),
    }
}

/// `weft-iptables` would refuse these too, but in a pod that has been scheduled by then.
fn port_list(text: &str) -> Result<Option<String>, String> {
    let ranges = parse_ports(text).map_err(|reason| format!("{reason}: write \"25\" or \"25,6000-6100\""))?;
    for (position, range) in ranges.iter().enumerate() {
        for own in [ports::OUTBOUND, ports::INBOUND, ports::ADMIN] {
            if range.contains(&own) {
                return Err(format!("{own} is a port of the sidecar itself, which is never captured"));
            }
        }
        let overlaps = |other: &&std::ops::RangeInclusive<u16>| {
            other.start() <= range.end() && range.start() <= other.end()
        };
        if let Some(other) = ranges[..position].iter().find(overlaps) {
            return Err(format!("{} and {} overlap", show(other), show(range)));
        }
    }
    let list: Vec<String> = ranges.iter().map(show).collect();
    Ok((!list.is_empty()).then(|| list.join(",")))
}

pub(super) fn show(range: &std::ops::RangeInclusive<u16>) -> String {
    if range.start() == range.end() {
        range.start().to_string()
    } else {
        format!("{}-{}", range.start(), range.end())
    }
}

fn cidr_list(text: &str) -> Result<Option<String>, String> {
    let mut nets: Vec<IpNet> = Vec::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let net: IpNet =
            item.parse().map_err(|_| format!("{item:?} is not a network: write 10.0.0.0/8 or fd00::/8"))?;
        if net.trunc() != net {
            return Err(format!("{item:?} has host bits set: write {}", net.trunc()));
        }
        if let Some(other) = nets.iter().find(|other| other.contains(&net) || net.contains(*other)) {
            return Err(format!("{other} and {net} overlap"));
        }
        nets.push(net);
    }
    let list: Vec<String> = nets.iter().map(ToString::to_string).collect();
    Ok((!list.is_empty()).then(|| list.join(",")))
}

fn log(text: &str) -> Result<String, String> {
    text.parse::<tracing_subscriber::filter::Targets>().map_err(|error| {
        format!("{text:?} is not a log filter ({error}): write debug, or info,weft_proxy::inbound=debug")
    })?;
    Ok(text.to_owned())
}

/// A Kubernetes quantity that is plainly above zero; the API server checks the rest.
fn quantity(text: &str) -> Result<(), String> {
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let known = ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"].contains(&unit);
    if known && number.parse::<f64>().is_ok_and(|number| number > 0.0) {
        return Ok(());
    }
    Err(format!("{text:?} is not a quantity: write 50m, 1, 64Mi or 1Gi"))
}

fn sleep(text: &str) -> Result<u64, String> {
    let GatewayDuration(time) = text.parse().map_err(|_| format!("{text:?} is not a duration: write 5s"))?;
    match time.as_secs() {
        seconds @ 0..=3_600 if time.subsec_nanos() == 0 => Ok(seconds),
        _ => Err(format!("{text:?}: write whole seconds, up to 1h; 0s for none")),
    }
}

const PREFIX: &str = "weft.dev/";
/// What the injector and the controller write themselves.
pub(super) const WRITTEN: [&str; 3] = [INJECTED, NOT_INJECTED, VERSION];
/// Every annotation of a pod, with what it says and an example.
pub const ALL: [(&str, &str, &str); 13] = [
    (
        INJECT,
        "whether the pod gets a sidecar; as a label it reaches pods of other namespaces, too",
        "disabled",
    ),
    (OPAQUE_PORTS, "ports that carry bytes and no requests; on a Service: its ports", "3306,9000-9010"),
    (SKIP_INBOUND_PORTS, "ports that are reached without the sidecar, in plaintext", "9090"),
    (SKIP_OUTBOUND_PORTS, "ports that the app dials without the sidecar", "25,6000-6100"),
    (SKIP_OUTBOUND_CIDRS, "networks that the app dials without the sidecar", "10.9.0.0/16"),
    (LOG, "what the sidecar logs", "info,weft_proxy::inbound=debug"),
    (CPU_REQUEST, "what the sidecar asks for", "50m"),
    (CPU_LIMIT, "what the sidecar may have", "1"),
    (MEMORY_REQUEST, "what the sidecar asks for", "32Mi"),
    (MEMORY_LIMIT, "what the sidecar may have", "512Mi"),
    (
        PRESTOP_SLEEP,
        "how long containers without a preStop hook are kept from hearing that they should end; 0s: not at all",
        "5s",
    ),
    (WEIGHT, "the pod's share of its services' requests; others have 1", "2"),
    (INJECTED, "written by the injector: the pod has a sidecar", "true"),
];

/// The same for people.
pub fn help() -> String {
    let line = |(name, what, example): &(&str, &str, &str)| format!("  {name}: {example:?}\n      {what}");
    format!("Annotations of a pod:\n{}", ALL.iter().map(line).collect::<Vec<_>>().join("\n"))
}
