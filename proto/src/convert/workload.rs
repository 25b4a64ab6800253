//! `WorkloadConfig`: a sidecar's own settings.
//!
//! Why it is not yet an `InboundPolicy`: the authorization of each port is a resource of its own, so that a
//! change of one policy does not resend the rest. [`WorkloadResource::join`] puts them together, all or
//! nothing; [`split`] takes them apart again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use prost::Message as _;
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{
        Authorization, By, DETECT_TIMEOUT, Egress, InboundPolicy, MtlsMode, Place, PortPolicy, Probe,
        Protocol, Rate, RateLimit,
    },
};

use super::{
    Invalid, Problem, authz,
    common::{
        At, MAX_ITEMS, MAX_LABEL, cut, header_name, identity, in_range, millis, object, port, protocol,
        requires, some_text, text, to_millis, to_object, to_protocol, trust_domain,
    },
    decode,
};
use crate::{
    names::{Name, NameError},
    pb::v1::{
        self,
        inbound_port::{MtlsMode as PbMtls, probe::Kind as PbProbe},
        workload_config::Egress as PbEgress,
    },
};

/// Address ranges of a mesh: a large cluster has one range a node.
const MAX_RANGES: usize = 16_384;
/// Of one port: a pod has a few containers with three probes each.
const MAX_PROBES: usize = 64;
/// Of one port, and headers of one limit: each is looked at for each request.
const MAX_RATE_LIMITS: usize = 256;
const MAX_KEY_HEADERS: usize = 16;

/// A workload's settings, with its authorization policies by name.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadResource {
    /// Who the workload is.
    pub identity: SpiffeId,
    /// Ports that are named.
    pub ports: BTreeMap<u16, PortResource>,
    /// Every other port.
    pub default_port: PortResource,
    /// The mesh's own address ranges.
    pub mesh_ranges: Vec<IpNet>,
    /// What to do with destinations outside the mesh.
    pub egress: Egress,
    /// Trust domains whose identities are accepted; the names of the bundles to subscribe follow from it.
    pub trust_domains: Vec<TrustDomain>,
    /// Where the workload runs.
    pub place: Place,
}

/// One port of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct PortResource {
    /// What the app speaks there.
    pub protocol: Protocol,
    /// How long a silent client may keep detection waiting.
    pub detect_timeout: Duration,
    /// Whether plaintext is admitted.
    pub mtls: MtlsMode,
    /// Resource name of its authorization: what to subscribe next.
    pub authorization: Arc<str>,
    /// What is admitted without identity.
    pub probes: Vec<Probe>,
    /// How often it may be asked.
    pub rate_limits: Vec<RateLimit>,
}

/// Reads a workload's settings.
///
/// # Errors
/// The first field that cannot be taken.
pub fn parse(body: &[u8]) -> Result<WorkloadResource, Invalid> {
    WorkloadResource::try_from(&decode::<v1::WorkloadConfig>("WorkloadConfig", body)?)
}

/// Bytes that limits take in a message.
pub fn size(limits: &[RateLimit]) -> usize {
    let rate_limits = limits.iter().map(to_rate_limit).collect();
    v1::InboundPort { rate_limits, ..v1::InboundPort::default() }.encoded_len()
}

/// Takes a policy apart: the workload's settings, and each authorization under its resource name.
pub fn split(policy: &InboundPolicy, uid: &PodUid) -> (WorkloadResource, Vec<(String, Arc<Authorization>)>) {
    let mut authorizations = Vec::with_capacity(policy.ports.len() + 1);
    let mut port = |number: u16, port: &PortPolicy| {
        let name = Name::Authorization(uid.clone(), number).to_string();
        authorizations.push((name.clone(), Arc::clone(&port.authorization)));
        PortResource {
            protocol: port.protocol,
            detect_timeout: port.detect_timeout,
            mtls: port.mtls,
            authorization: name.into(),
            probes: port.probes.clone(),
            rate_limits: port.rate_limits.clone(),
        }
    };
    let resource = WorkloadResource {
        identity: policy.identity.clone(),
        ports: policy.ports.iter().map(|(number, policy)| (*number, port(*number, policy))).collect(),
        default_port: port(0, &policy.default_port),
        mesh_ranges: policy.mesh_ranges.clone(),
        egress: policy.egress,
        trust_domains: policy.trust_domains.clone(),
        place: policy.place.clone(),
    };
    (resource, authorizations)
}

impl WorkloadResource {
    /// Every authorization to subscribe, each once.
    pub fn authorizations(&self) -> BTreeSet<Arc<str>> {
        let named = self.ports.values().map(|port| Arc::clone(&port.authorization));
        named.chain([Arc::clone(&self.default_port.authorization)]).collect()
    }

    /// The whole policy, once every authorization is there; `None` before.
    pub fn join(
        &self,
        mut authorization: impl FnMut(&str) -> Option<Arc<Authorization>>,
    ) -> Option<InboundPolicy> {
        let mut port = |port: &PortResource| {
            Some(Arc::new(PortPolicy {
                protocol: port.protocol,
                detect_timeout: port.detect_timeout,
                mtls: port.mtls,
                authorization: authorization(&port.authorization)?,
                probes: port.probes.clone(),
                rate_limits: port.rate_limits.clone(),
            }))
        };
        Some(InboundPolicy {
            identity: self.identity.clone(),
            ports: self
                .ports
                .iter()
                .map(|(number, policy)| Some((*number, port(policy)?)))
                .collect::<Option<_>>()?,
            default_port: port(&self.default_port)?,
            mesh_ranges: self.mesh_ranges.clone(),
            egress: self.egress,
            trust_domains: self.trust_domains.clone(),
            place: self.place.clone(),
        })
    }
}

impl TryFrom<&v1::WorkloadConfig> for WorkloadResource {
    type Error = Invalid;

    fn try_from(pb: &v1::WorkloadConfig) -> Result<Self, Invalid> {
        let at = At::root("WorkloadConfig");
        requires(&at, &pb.requires)?;
        let mut ports = BTreeMap::new();
        at.each("ports", &pb.ports, usize::from(u16::MAX), |at, inbound| {
            let number = port(&at.field("port"), inbound.port)?;
            if ports.insert(number, port_resource(at, inbound)?).is_some() {
                return Err(at.field("port").bad(Problem::Duplicate(number.to_string())));
            }
            Ok(())
        })?;
        let zone = pb.locality.as_ref().map_or("", |locality| &locality.zone);
        let at_default = at.field("default_port");
        let default_port = pb.default_port.as_ref().ok_or_else(|| at_default.bad(Problem::Missing))?;
        in_range(&at_default.field("port"), default_port.port.into(), 0..=0)?;
        let egress = match PbEgress::try_from(pb.egress) {
            Ok(PbEgress::Allow) => Egress::Allow,
            Ok(PbEgress::Deny) => Egress::Deny,
            Ok(PbEgress::Unspecified) => {
                return Err(at.field("egress").bad(Problem::Unspecified("EGRESS_ALLOW or EGRESS_DENY")));
            }
            Err(_) => return Err(at.field("egress").bad(Problem::UnknownValue(pb.egress))),
        };
        Ok(Self {
            identity: identity(&at.field("identity"), &pb.identity)?,
            ports,
            default_port: port_resource(&at_default, default_port)?,
            mesh_ranges: at.each("mesh_ranges", &pb.mesh_ranges, MAX_RANGES, |at, range| {
                range.parse().map_err(|_| at.bad(Problem::Cidr(cut(range))))
            })?,
            egress,
            trust_domains: at
                .each("trust_domains", &pb.trust_domains, MAX_ITEMS, |at, name| trust_domain(at, name))?,
            place: Place {
                node: text(&at.field("node"), &pb.node, MAX_LABEL)?,
                zone: text(&at.field("locality").field("zone"), zone, MAX_LABEL)?,
            },
        })
    }
}

impl From<&WorkloadResource> for v1::WorkloadConfig {
    fn from(workload: &WorkloadResource) -> Self {
        let egress = match workload.egress {
            Egress::Allow => PbEgress::Allow,
            Egress::Deny => PbEgress::Deny,
        };
        Self {
            identity: workload.identity.to_string(),
            ports: workload.ports.iter().map(|(number, port)| to_port(*number, port)).collect(),
            default_port: Some(to_port(0, &workload.default_port)),
            mesh_ranges: workload.mesh_ranges.iter().map(ToString::to_string).collect(),
            egress: egress.into(),
            trust_domains: workload.trust_domains.iter().map(ToString::to_string).collect(),
            requires: Vec::new(),
            node: workload.place.node.to_string(),
            locality: (!workload.place.zone.is_empty())
                .then(|| v1::Locality { region: String::new(), zone: workload.place.zone.to_string() }),
        }
    }
}

fn port_resource(at: &At<'_>, port: &v1::InboundPort) -> Result<PortResource, Invalid> {
    let mtls = match PbMtls::try_from(port.mtls) {
        Ok(PbMtls::Permissive) => MtlsMode::Permissive,
        Ok(PbMtls::Strict) => MtlsMode::Strict,
        Ok(PbMtls::Unspecified) => {
            let problem = Problem::Unspecified("MTLS_MODE_PERMISSIVE or MTLS_MODE_STRICT");
            return Err(at.field("mtls").bad(problem));
        }
        Err(_) => return Err(at.field("mtls").bad(Problem::UnknownValue(port.mtls))),
    };
    let at_authz = at.field("authz");
    if port.authz.is_empty() {
        return Err(at_authz.bad(Problem::Missing));
    }
    let name: Name = port.authz.parse().map_err(|e: NameError| at_authz.bad(e))?;
    if !matches!(name, Name::Authorization(..)) {
        return Err(at_authz.bad(Problem::NameKind(cut(&port.authz), "authz/")));
    }
    Ok(PortResource {
        protocol: protocol(&at.field("protocol"), port.protocol)?,
        detect_timeout: millis(&at.field("detect_timeout_ms"), port.detect_timeout_ms)?
            .unwrap_or(DETECT_TIMEOUT),
        mtls,
        authorization: port.authz.as_str().into(),
        probes: at.each("probes", &port.probes, MAX_PROBES, probe)?,
        rate_limits: at.each("rate_limits", &port.rate_limits, MAX_RATE_LIMITS, rate_limit)?,
    })
}

fn probe(at: &At<'_>, probe: &v1::inbound_port::Probe) -> Result<Probe, Invalid> {
    match &probe.kind {
        Some(PbProbe::Get(path)) if Probe::is_path(path) => Ok(Probe::Get(path.as_str().into())),
        Some(PbProbe::Get(path)) => Err(at
            .field("get")
            .bad(Problem::Text(cut(path), "start it with /, without spaces and fragments"))),
        Some(PbProbe::GrpcHealth(true)) => Ok(Probe::GrpcHealth),
        Some(PbProbe::GrpcHealth(false)) | None => Err(at.bad(Problem::Missing)),
    }
}

fn rate_limit(at: &At<'_>, limit: &v1::RateLimit) -> Result<RateLimit, Invalid> {
    let per = Duration::from_millis(limit.per_ms.into());
    Ok(RateLimit {
        object: object(at, limit.object.as_ref())?,
        name: some_text(&at.field("name"), &limit.name, MAX_LABEL)?,
        rate: Rate::try_new(limit.requests, per, Some(limit.burst)).map_err(|e| at.bad(e))?,
        http: at.each("http", &limit.http, MAX_ITEMS, authz::http)?,
        by: By {
            identity: limit.by_identity,
            headers: at
                .each("by_headers", &limit.by_headers, MAX_KEY_HEADERS, |at, name| header_name(at, name))?,
        },
    })
}

fn to_rate_limit(limit: &RateLimit) -> v1::RateLimit {
    v1::RateLimit {
        object: to_object(&limit.object),
        name: limit.name.to_string(),
        requests: limit.rate.requests(),
        per_ms: to_millis(limit.rate.per()),
        burst: limit.rate.burst(),
        http: limit.http.iter().map(authz::to_http).collect(),
        by_identity: limit.by.identity,
        by_headers: limit.by.headers.iter().map(|name| name.as_str().to_owned()).collect(),
    }
}

fn to_port(number: u16, port: &PortResource) -> v1::InboundPort {
    let mtls = match port.mtls {
        MtlsMode::Permissive => PbMtls::Permissive,
        MtlsMode::Strict => PbMtls::Strict,
    };
    v1::InboundPort {
        port: number.into(),
        protocol: to_protocol(port.protocol),
        mtls: mtls.into(),
        authz: port.authorization.to_string(),
        detect_timeout_ms: Some(to_millis(port.detect_timeout)),
        probes: port.probes.iter().map(to_probe).collect(),
        rate_limits: port.rate_limits.iter().map(to_rate_limit).collect(),
    }
}

fn to_probe(probe: &Probe) -> v1::inbound_port::Probe {
    let kind = match probe {
        Probe::Get(path) => PbProbe::Get(path.to_string()),
        Probe::GrpcHealth => PbProbe::GrpcHealth(true),
    };
    v1::inbound_port::Probe { kind: Some(kind) }
}
