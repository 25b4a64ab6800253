//! Objects in compact form: what a mesh needs to know of a Service, an EndpointSlice and a Pod.
//!
//! Why not the objects themselves: a Pod is 10 KiB as Kubernetes has it, and 500 bytes of it matter to a mesh; and what
//! stands in one place here (who is ready, which port a name means, what an annotation says) is not read in two ways.

use std::{collections::BTreeMap, net::IpAddr, ops::RangeInclusive, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Pod, Service, ServiceSpec},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{EndpointHealth, Probe, Protocol, Reach},
};

use crate::resources::{INJECTED, OPAQUE_PORTS, SKIP_INBOUND_PORTS, WEIGHT, created, lookup, probes};

/// Namespace and name.
pub type Name = (Arc<str>, Arc<str>);

/// What versions and precedence need of an object's metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    pub(crate) uid: Option<Arc<str>>,
    pub(crate) generation: Option<i64>,
    pub(crate) created: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct ServiceEntry {
    pub(crate) meta: Meta,
    pub(crate) kind: ServiceKind,
    /// Those of its addresses that the cluster gave it.
    pub(crate) cluster_ips: Vec<IpAddr>,
    pub(crate) ports: Vec<ServicePort>,
    pub(crate) selector: BTreeMap<String, String>,
    pub(crate) publish_not_ready: bool,
    /// How far callers go for an endpoint.
    pub(crate) reach: Reach,
    /// Whether a calling pod stays with one.
    pub(crate) by_client: bool,
    /// What is wrong with its annotations, which count for nothing then.
    pub(crate) wrong: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ServiceKind {
    /// With addresses of its own.
    Addressed(Vec<IpAddr>),
    /// Callers dial pods.
    Headless,
    /// A DNS alias: nothing of the mesh.
    External,
}

#[derive(Clone, Debug)]
pub(crate) struct ServicePort {
    pub(crate) name: String,
    pub(crate) port: u16,
    pub(crate) target: Target,
    pub(crate) protocol: Protocol,
}

/// The pod's port that a service's port sends to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Number(u16),
    /// A container's port, which may differ from pod to pod.
    Name(String),
}

#[derive(Clone, Debug)]
pub(crate) struct SliceEntry {
    pub(crate) service: Name,
    pub(crate) ports: Vec<(String, u16)>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

#[derive(Clone, Debug)]
pub(crate) struct SliceEndpoint {
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) pod_uid: Option<PodUid>,
    pub(crate) pod_name: Option<Name>,
    pub(crate) health: EndpointHealth,
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) node: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodEntry {
    pub(crate) meta: Meta,
    pub(crate) uid: PodUid,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) identity: Option<SpiffeId>,
    pub(crate) injected: bool,
    pub(crate) skipped: Vec<RangeInclusive<u16>>,
    pub(crate) opaque: Vec<RangeInclusive<u16>>,
    pub(crate) weight: u32,
    pub(crate) zone: Arc<str>,
    /// Its own label says it, whatever its node's zone.
    pub(crate) has_own_zone: bool,
    pub(crate) node: Option<Arc<str>>,
    /// Its addresses are its node's, and no more its own than any other's there.
    pub(crate) host_network: bool,
    pub(crate) health: EndpointHealth,
    /// Its containers' ports by name.
    pub(crate) ports: Vec<(String, u16)>,
    /// What its kubelet asks of them.
    pub(crate) probes: BTreeMap<u16, Vec<Probe>>,
}

impl Meta {
    pub(crate) fn new(meta: &ObjectMeta) -> Self {
        Self { uid: meta.uid.as_deref().map(Into::into), generation: meta.generation, created: created(meta) }
    }

    /// `<uid>.<generation>.<hash>` where the API server gives the first two, else the hash alone: the same
    /// text on every controller that saw the same objects.
    pub fn version(&self, hash: u64) -> String {
        match (&self.uid, self.generation) {
            (Some(uid), Some(generation)) => format!("{uid}.{generation}.{hash:016x}"),
            _ => format!("{hash:016x}"),
        }
    }
}

impl ServiceEntry {
    pub(crate) fn new(service: &Service) -> Self {
        let spec = service.spec.as_ref();
        let ips = spec.map(|s| {
            let all = s.cluster_ips.iter().flatten().chain(&s.cluster_ip);
            let mut ips: Vec<&String> = Vec::new();
            for ip in all.chain(s.external_ips.iter().flatten()) {
                if !ips.contains(&ip) {
                    ips.push(ip);
                }
            }
            ips
        });
        let ips = ips.unwrap_or_default();
        let kind = if spec.is_some_and(|s| s.type_.as_deref() == Some("ExternalName")) {
            ServiceKind::External
        } else if ips.iter().any(|ip| *ip == "None") {
            ServiceKind::Headless
        } else {
            ServiceKind::Addressed(ips.iter().filter_map(|ip| ip.parse().ok()).collect())
        };
        let cluster_ips = spec.into_iter().flat_map(|s| s.cluster_ips.iter().flatten().chain(&s.cluster_ip));
        let cluster_ips = cluster_ips.filter_map(|ip| ip.parse().ok()).collect();
        let opaque = lookup(&service.metadata.annotations, OPAQUE_PORTS).map(parse_opaque_ports);
        let (opaque, wrong) = match opaque.transpose() {
            Ok(opaque) => (opaque.unwrap_or_default(), None),
            Err(reason) => (Vec::new(), Some(format!("annotation {OPAQUE_PORTS}: {reason}"))),
        };
        let ports = spec.and_then(|s| s.ports.as_ref()).into_iter().flatten();
        let ports =
            ports.filter(|port| port.protocol.as_deref().is_none_or(|p| p == "TCP")).filter_map(|port| {
                let number = u16::try_from(port.port).ok()?;
                let name = port.name.clone().unwrap_or_default();
                let target = match &port.target_port {
                    Some(IntOrString::Int(0)) | None => Target::Number(number),
                    Some(IntOrString::Int(target)) => Target::Number(u16::try_from(*target).ok()?),
                    Some(IntOrString::String(text)) => match text.parse() {
                        Ok(target) => Target::Number(target),
                        Err(_) => Target::Name(text.clone()),
                    },
                };
                let protocol = match is_in(&opaque, number) {
                    true => Protocol::Opaque,
                    false => declared_protocol(port.app_protocol.as_deref(), &name),
                };
                Some(ServicePort { name, port: number, target, protocol })
            });
        Self {
            meta: Meta::new(&service.metadata),
            kind,
            cluster_ips,
            ports: ports.collect(),
            selector: spec.and_then(|s| s.selector.clone()).unwrap_or_default(),
            publish_not_ready: spec.and_then(|s| s.publish_not_ready_addresses).unwrap_or_default(),
            reach: spec.map(reach).unwrap_or_default(),
            wrong,
            by_client: spec.is_some_and(|s| s.session_affinity.as_deref() == Some("ClientIP")),
        }
    }

    /// Addresses that callers may dial.
    pub(crate) fn vips(&self) -> &[IpAddr] {
        match &self.kind {
            ServiceKind::Addressed(vips) => vips,
            ServiceKind::Headless | ServiceKind::External => &[],
        }
    }

    pub(crate) fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == number)
    }
}

impl ServicePort {
    /// The port of `pod` that this one sends to.
    pub(crate) fn target_on(&self, pod: &PodEntry) -> Option<u16> {
        match &self.target {
            Target::Number(number) => Some(*number),
            Target::Name(name) => {
                pod.ports.iter().find(|(port_name, _)| port_name == name).map(|(_, port)| *port)
            }
        }
    }

    /// Whether a policy's `sectionName` means this port.
    pub(crate) fn is_named(&self, section: &str) -> bool {
        self.name == section || section.parse() == Ok(self.port)
    }
}

impl SliceEntry {
    pub(crate) fn new(namespace: &Arc<str>, slice: &EndpointSlice) -> Option<Self> {
        let service = lookup(&slice.metadata.labels, SERVICE_NAME)?;
        let ports = slice.ports.iter().flatten().filter(|p| p.protocol.as_deref().is_none_or(|p| p == "TCP"));
        let ports = ports
            .filter_map(|p| Some((p.name.clone().unwrap_or_default(), u16::try_from(p.port?).ok()?)))
            .collect();
        let endpoints = slice.endpoints.iter().flatten().map(|endpoint| {
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
            let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
            // One that goes away, and does not answer any more, is not even for want of others.
            let serving = conditions.and_then(|c| c.serving).unwrap_or(true);
            let health = match (terminating, ready) {
                (true, _) if serving => EndpointHealth::Draining,
                (false, true) => EndpointHealth::Healthy,
                (true, _) | (false, false) => EndpointHealth::Unhealthy,
            };
            let target =
                endpoint.target_ref.as_ref().filter(|t| t.kind.as_deref().is_none_or(|k| k == "Pod"));
            let pod_name = target.and_then(|t| {
                let namespace = t.namespace.as_deref().map_or_else(|| namespace.clone(), Into::into);
                Some((namespace, t.name.as_deref()?.into()))
            });
            SliceEndpoint {
                addresses: endpoint.addresses.iter().filter_map(|a| a.parse().ok()).collect(),
                pod_uid: target.and_then(|t| PodUid::new(t.uid.as_deref()?).ok()),
                pod_name,
                health,
                zone: endpoint.zone.as_deref().map(Into::into),
                node: endpoint.node_name.as_deref().map(Into::into),
            }
        });
        Some(Self { service: (namespace.clone(), service.into()), ports, endpoints: endpoints.collect() })
    }
}

impl PodEntry {
    /// `None` for a pod that will not run again.
    pub(crate) fn new(trust_domain: &TrustDomain, name: &Name, pod: &Pod) -> Option<Self> {
        let (meta, spec, status) = (&pod.metadata, pod.spec.as_ref(), pod.status.as_ref());
        let phase = status.and_then(|s| s.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            return None;
        }
        // Only a pod of somebody's folder has no uid; it gets one by name, stable and not a real one's.
        let uid = match meta.uid.as_deref().map(PodUid::new) {
            Some(Ok(uid)) => uid,
            Some(Err(_)) | None => {
                PodUid::new(&format!("x-{:016x}", hash(format!("{}/{}", name.0, name.1).as_bytes()))).ok()?
            }
        };
        let mut ips = Vec::new();
        let listed = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.as_str());
        for ip in status.and_then(|s| s.pod_ip.as_deref()).into_iter().chain(listed) {
            if let Ok(ip) = ip.parse()
                && !ips.contains(&ip)
            {
                ips.push(ip);
            }
        }
        let account =
            spec.and_then(|s| s.service_account_name.as_deref()).filter(|account| !account.is_empty());
        let not_ready = status
            .and_then(|s| s.conditions.as_ref())
            .into_iter()
            .flatten()
            .any(|c| c.type_ == "Ready" && c.status != "True");
        let health = match (meta.deletion_timestamp.is_some(), not_ready) {
            (true, _) => EndpointHealth::Draining,
            (false, true) => EndpointHealth::Unhealthy,
            (false, false) => EndpointHealth::Healthy,
        };
        let containers = spec.map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
        let ports = containers.into_iter().flatten().flat_map(|c| c.ports.iter().flatten());
        let ports = ports.filter(|p| p.protocol.as_deref().is_none_or(|p| p == "TCP"));
        Some(Self {
            meta: Meta::new(meta),
            uid,
            ips,
            labels: meta.labels.clone().unwrap_or_default(),
            identity: SpiffeId::new(trust_domain, &name.0, account.unwrap_or("default")).ok(),
            injected: lookup(&meta.annotations, INJECTED) == Some("true"),
            skipped: lookup(&meta.annotations, SKIP_INBOUND_PORTS)
                .and_then(|text| parse_ports(text).ok())
                .unwrap_or_default(),
            opaque: lookup(&meta.annotations, OPAQUE_PORTS)
                .and_then(|text| parse_opaque_ports(text).ok())
                .unwrap_or_default(),
            weight: lookup(&meta.annotations, WEIGHT).and_then(|text| text.parse().ok()).unwrap_or(1),
            zone: lookup(&meta.labels, ZONE).unwrap_or_default().into(),
            has_own_zone: lookup(&meta.labels, ZONE).is_some(),
            node: spec.and_then(|s| s.node_name.as_deref().map(Into::into)),
            host_network: spec.and_then(|s| s.host_network).unwrap_or_default(),
            health,
            ports: ports
                .filter_map(|p| {
                    Some((p.name.clone().unwrap_or_default(), u16::try_from(p.container_port).ok()?))
                })
                .collect(),
            probes: spec.map(probes::admitted).unwrap_or_default(),
        })
    }
}

impl PodEntry {
    /// Whether the pod says that a port carries bytes and no requests.
    pub(crate) fn is_opaque(&self, port: u16) -> bool {
        is_in(&self.opaque, port)
    }
}

fn is_in(ranges: &[RangeInclusive<u16>], port: u16) -> bool {
    ranges.iter().any(|range| range.contains(&port))
}

/// `Local` says who must not be asked, a distribution only who should be.
fn reach(spec: &ServiceSpec) -> Reach {
    match (spec.internal_traffic_policy.as_deref(), spec.traffic_distribution.as_deref()) {
        (Some("Local"), _) => Reach::Node,
        (_, Some("PreferSameNode")) => Reach::PreferNode,
        (_, Some("PreferSameZone" | "PreferClose")) => Reach::PreferZone,
        (_, Some(_) | None) => Reach::Anywhere,
    }
}

/// `3306,9000-9010`.
pub(crate) fn parse_ports(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (0 < first && first <= last).then_some(first..=last)
    };
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| range(part).ok_or_else(|| format!("{part:?} is not a port or a range of ports")))
        .collect()
}

/// The same of ports that carry bytes. Each is a policy of its own, so they are counted.
pub(crate) fn parse_opaque_ports(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let ranges = parse_ports(text)?;
    let ports: usize = ranges.iter().map(ExactSizeIterator::len).sum();
    if ports > MAX_OPAQUE {
        return Err(format!("{ports} ports, of {MAX_OPAQUE} at most: name those that the app listens on"));
    }
    Ok(ranges)
}

/// What `appProtocol`, or else the port's name up to its first `-`, declares. What is not known is looked at.
pub(crate) fn declared_protocol(app_protocol: Option<&str>, port_name: &str) -> Protocol {
    let known = |text: &str| match text.to_ascii_lowercase().as_str() {
        "http" | "http1" | "http/1.1" | "kubernetes.io/ws" => Some(Protocol::Http1),
        "http2" | "h2c" | "kubernetes.io/h2c" => Some(Protocol::Http2),
        "grpc" => Some(Protocol::Grpc),
        "tcp" => Some(Protocol::Opaque),
        "tls" | "https" | "kubernetes.io/wss" => Some(Protocol::Tls),
        _ => None,
    };
    match app_protocol {
        Some(text) => known(text).unwrap_or_default(),
        None => known(port_name.split('-').next().unwrap_or_default()).unwrap_or_default(),
    }
}

pub(crate) fn is_subset(wanted: &BTreeMap<String, String>, of: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| of.get(key) == Some(value))
}

/// FNV-1a: the same everywhere and for ever, which is what versions need (they are not secrets).
pub fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The label that says whose endpoints a slice has.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The label that says where a node, or a pod, is.
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";

/// Opaque ports of a pod.
const MAX_OPAQUE: usize = 128;
