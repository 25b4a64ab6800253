//! What one workload is told about itself: its ports, who may call them, and the mesh around it.
//!
//! Why the default flips: as soon as one allow policy selects a port, what no rule allows there is
//! denied. A list of who may call that lets everybody else in too would be no list.

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{
        Action, Authorization, AuthzRule, DETECT_TIMEOUT, Egress, InboundPolicy, MtlsMode, ObjectRef, Place,
        PortPolicy, Protocol, RateLimit, SourceMatch, StringMatch,
    },
};

use super::{
    Index, in_namespace,
    objects::{Meta, Name, PodEntry, declared_protocol, is_subset},
    rules::object_ref,
    traffic::{http, try_rate_limit},
};
use crate::resources::{
    Kind,
    policy::{self, AuthorizationPolicySpec, Mtls, Source},
    values::TextPattern,
};

/// Ports of a workload that a policy is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ports {
    /// All of them, named or not.
    All,
    /// These.
    Some(BTreeSet<u16>),
}

/// What a policy has to say to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Ports where its rules hold.
    pub(crate) ports: Option<Ports>,
    /// Ports that it closes: it names a Service, or a port of one, that is not there and never was, so that nobody
    /// knows what it was to protect.
    pub(crate) closes: Option<Ports>,
}

/// A policy that has something to say to a pod.
struct Selecting<'a> {
    name: &'a Name,
    spec: &'a AuthorizationPolicySpec,
    ports: Ports,
    /// How specific it is.
    rank: u8,
    /// See [`Reach::closes`].
    closes: bool,
}

impl Index {
    /// One workload's own policy; `None` if there is no such workload.
    pub fn workload(&self, uid: &PodUid) -> Option<(InboundPolicy, Meta)> {
        let (name, pod) = self.pod_by_uid(uid)?;
        let identity = pod.identity.clone()?;
        let mesh = self.mesh_config().map(|(_, entry)| entry.spec.clone()).unwrap_or_default();
        let policies = self.policies_of(name, pod);
        let mut numbers: BTreeSet<u16> = pod.ports.iter().map(|(_, port)| *port).collect();
        numbers.extend(self.service_targets(name, pod));
        for policy in &policies {
            if let Ports::Some(ports) = &policy.ports {
                numbers.extend(ports);
            }
        }
        numbers.extend(pod.probes.keys());
        numbers.extend(pod.opaque.iter().cloned().flatten());
        numbers.remove(&0);
        let port_policy = |port: Option<u16>| {
            Arc::new(PortPolicy {
                protocol: port.map_or(Protocol::Detect, |port| self.port_protocol(name, pod, port)),
                detect_timeout: DETECT_TIMEOUT,
                mtls: mtls(&policies, port, mesh.mtls),
                authorization: Arc::new(self.authorization(name, pod, &policies, port, mesh.authorization)),
                probes: port.and_then(|port| pod.probes.get(&port)).cloned().unwrap_or_default(),
                rate_limits: port.map_or_else(Vec::new, |port| self.rate_limits(name, pod, port)),
            })
        };
        let mut trust_domains = vec![self.trust_domain.clone()];
        for domain in &mesh.trust_domains {
            if !trust_domains.contains(&domain.0) {
                trust_domains.push(domain.0.clone());
            }
        }
        let policy = InboundPolicy {
            identity,
            ports: numbers.into_iter().map(|port| (port, port_policy(Some(port)))).collect(),
            default_port: port_policy(None),
            mesh_ranges: mesh_ranges(&mesh),
            egress: match mesh.egress {
                Some(policy::Action::Deny) => Egress::Deny,
                Some(policy::Action::Allow) | None => Egress::Allow,
            },
            trust_domains,
            place: Place { node: pod.node.clone().unwrap_or_default(), zone: pod.zone.clone() },
        };
        Some((policy, pod.meta.clone()))
    }

    /// Trust domains whose roots sidecars need.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The identity of a workload.
    pub fn identity(&self, uid: &PodUid) -> Option<SpiffeId> {
        self.pod_by_uid(uid)?.1.identity.clone()
    }

    /// What a pod's port speaks, by the services that send to it, else by its own name.
    pub(crate) fn port_protocol(&self, name: &Name, pod: &PodEntry, port: u16) -> Protocol {
        if pod.is_opaque(port) {
            return Protocol::Opaque;
        }
        let declared = in_namespace(&self.services, &name.0)
            .filter(|(service_name, service)| self.is_pod_of(service_name, service, name, pod))
            .flat_map(|(service_name, service)| service.ports.iter().map(move |p| (service_name, service, p)))
            .filter(|(_, _, p)| p.target_on(pod) == Some(port))
            .map(|(service_name, service, p)| self.protocol(service_name, service, p))
            .find(|protocol| *protocol != Protocol::Detect);
        declared.unwrap_or_else(|| {
            let own = pod.ports.iter().find(|(_, number)| *number == port);
            own.map_or(Protocol::Detect, |(name, _)| declared_protocol(None, name))
        })
    }

    /// Ports of a pod that services send to.
    pub(crate) fn service_targets<'a>(
        &'a self,
        name: &'a Name,
        pod: &'a PodEntry,
    ) -> impl Iterator<Item = u16> + 'a {
        in_namespace(&self.services, &name.0)
            .filter(move |(service_name, service)| self.is_pod_of(service_name, service, name, pod))
            .flat_map(move |(_, service)| service.ports.iter().filter_map(|port| port.target_on(pod)))
    }

    /// How often a pod's port may be asked: what is said of each service that sends to it.
    fn rate_limits(&self, name: &Name, pod: &PodEntry, port: u16) -> Vec<RateLimit> {
        // Hardly any namespace has one, and its pods may be thousands.
        if !in_namespace(&self.traffic, &name.0).any(|(_, policy)| policy.spec.rate_limits.is_some()) {
            return Vec::new();
        }
        let mut found: Vec<RateLimit> = Vec::new();
        for (service_name, service) in in_namespace(&self.services, &name.0) {
            if !self.is_pod_of(service_name, service, name, pod) {
                continue;
            }
            for sends in service.ports.iter().filter(|sends| sends.target_on(pod) == Some(port)) {
                let mut levels = self.named_service_levels(service_name, sends).into_iter();
                let said = levels.find_map(|(policy, spec)| Some((policy, spec.rate_limits.as_ref()?)));
                let Some((policy, limits)) = said else { continue };
                let object = object_ref(Kind::TrafficPolicy, policy);
                // What cannot be kept was refused when it was read.
                let limits =
                    limits.iter().enumerate().filter_map(|(i, l)| try_rate_limit(l, &object, i).ok());
                // One policy may be about several services of one pod.
                found.extend(limits.filter(|limit| !found.contains(limit)).collect::<Vec<_>>());
            }
        }
        found
    }

    /// Policies that select a pod.
    fn policies_of(&self, name: &Name, pod: &PodEntry) -> Vec<Selecting<'_>> {
        let mut found = Vec::new();
        for (policy_name, policy) in in_namespace(&self.authz, &name.0) {
            let spec = &policy.spec;
            let Some(reach) = self.selects(policy_name, spec, name, pod) else { continue };
            let whole_namespace = spec.target_refs.is_empty() && spec.selector.is_none();
            for (ports, closes) in [(reach.ports, false), (reach.closes, true)] {
                let Some(ports) = ports else { continue };
                let rank = match (&ports, closes || whole_namespace) {
                    (_, true) => 0,
                    (Ports::Some(_), false) => 2,
                    (Ports::All, false) => 1,
                };
                found.push(Selecting { name: policy_name, spec, ports, rank, closes });
            }
        }
        found
    }

    /// Which ports of a pod a policy is about; `None`: it is not about the pod.
    ///
    /// Why a Service that was deleted still counts here: the policy was not. Until somebody changes what it says, it
    /// is about the pods that its Service had, and those that would have become its.
    pub(crate) fn selects(
        &self,
        policy: &Name,
        spec: &AuthorizationPolicySpec,
        pod_name: &Name,
        pod: &PodEntry,
    ) -> Option<Reach> {
        if policy.0 != pod_name.0 {
            return None;
        }
        if let Some(selector) = &spec.selector
            && !is_subset(&selector.match_labels, &pod.labels)
        {
            return None;
        }
        let only = |ports: Ports| {
            if spec.ports.is_empty() {
                return Some(ports);
            }
            let wanted: BTreeSet<u16> = spec.ports.iter().copied().collect();
            let left = match ports {
                Ports::All => wanted,
                Ports::Some(targets) => targets.intersection(&wanted).copied().collect(),
            };
            (!left.is_empty()).then_some(Ports::Some(left))
        };
        if spec.target_refs.is_empty() {
            return only(Ports::All).map(|ports| Reach { ports: Some(ports), closes: None });
        }
        // A Service that never was can be about pods that no other one has. To close the others for a name that is
        // mistyped, or comes a moment before its Service, would be an outage.
        let nobodys = || {
            let mut services = in_namespace(&self.services, &pod_name.0);
            !services.any(|(name, service)| self.may_be_pod_of(name, service, pod_name, pod))
        };
        let (mut targets, mut unknown) = (BTreeSet::new(), false);
        for target in &spec.target_refs {
            let service_name: Name = (policy.0.clone(), target.name.as_str().into());
            let Some(service) = self.services.get(&service_name).or(self.former.get(&service_name)) else {
                unknown |= nobodys();
                continue;
            };
            if self.may_be_pod_of(&service_name, service, pod_name, pod) {
                let section = target.section_name.as_deref();
                let mut named =
                    service.ports.iter().filter(|port| section.is_none_or(|s| port.is_named(s))).peekable();
                unknown |= named.peek().is_none();
                targets.extend(named.filter_map(|port| port.target_on(pod)));
            }
        }
        let ports = (!targets.is_empty()).then_some(Ports::Some(targets)).and_then(only);
        let closes = unknown.then_some(Ports::All).and_then(only);
        (ports.is_some() || closes.is_some()).then_some(Reach { ports, closes })
    }

    fn authorization(
        &self,
        name: &Name,
        pod: &PodEntry,
        policies: &[Selecting<'_>],
        port: Option<u16>,
        mesh: Option<policy::Action>,
    ) -> Authorization {
        let mut default = match mesh {
            Some(policy::Action::Deny) => Action::Deny,
            Some(policy::Action::Allow) | None => Action::Allow,
        };
        let mut rules = Vec::new();
        for policy in policies {
            let Some(action) = action_of(policy.spec) else { continue };
            if !is_about(&policy.ports, port) {
                continue;
            }
            if action == Action::Allow {
                default = Action::Deny;
                // Whom it lets in, it lets in there, and nobody knows where that is.
                if policy.closes {
                    continue;
                }
            }
            let object = object_ref(Kind::AuthorizationPolicy, policy.name);
            rules.extend(rules_of(policy.spec, action, &object));
        }
        // A policy that was never readable closes what it is about: nobody knows whom it would have let in.
        for (policy_name, labels) in in_namespace(&self.unreadable, &name.0) {
            if is_subset(labels, &pod.labels) && !self.authz.contains_key(policy_name) {
                default = Action::Deny;
                rules.push(AuthzRule {
                    object: object_ref(Kind::AuthorizationPolicy, policy_name),
                    action: Action::Deny,
                    sources: Vec::new(),
                    http: Vec::new(),
                });
            }
        }
        Authorization { default, rules: rules.into(), generation: 0 }
    }
}

/// What a policy's rules do; `None`: it is only about mTLS.
pub(crate) fn action_of(spec: &AuthorizationPolicySpec) -> Option<Action> {
    match spec.action {
        Some(policy::Action::Allow) => Some(Action::Allow),
        Some(policy::Action::Deny) => Some(Action::Deny),
        None => (!spec.rules.is_empty()).then_some(Action::Allow),
    }
}

/// A policy's rules.
pub(crate) fn rules_of(
    spec: &AuthorizationPolicySpec,
    action: Action,
    object: &ObjectRef,
) -> impl Iterator<Item = AuthzRule> {
    spec.rules.iter().map(move |rule| AuthzRule {
        object: object.clone(),
        action,
        sources: rule.from.iter().flat_map(sources).collect(),
        http: rule.to.iter().map(http).collect(),
    })
}

fn is_about(ports: &Ports, port: Option<u16>) -> bool {
    match (ports, port) {
        (Ports::All, _) => true,
        (Ports::Some(ports), Some(port)) => ports.contains(&port),
        (Ports::Some(_), None) => false,
    }
}

/// The most specific policy that speaks of mTLS decides; among equals strict wins.
fn mtls(policies: &[Selecting<'_>], port: Option<u16>, mesh: Option<Mtls>) -> MtlsMode {
    let said = policies
        .iter()
        .filter(|policy| is_about(&policy.ports, port))
        .filter_map(|policy| Some((policy.rank, policy.closes, policy.spec.mtls? == Mtls::Strict)))
        .filter(|(_, closes, strict)| *strict || !closes)
        .map(|(rank, _, strict)| (rank, strict))
        .max();
    let strict = said.map_or(mesh == Some(Mtls::Strict), |(_, strict)| strict);
    if strict { MtlsMode::Strict } else { MtlsMode::Permissive }
}

/// How many conditions [`sources`] makes of one. Multiplied, never made: four lists of a thousand are 10¹².
pub(crate) fn combinations(source: &Source) -> usize {
    let lists =
        [source.identities.len(), source.namespaces.len(), source.trust_domains.len(), source.cidrs.len()];
    lists.into_iter().fold(1, |product, list| product.saturating_mul(list.max(1)))
}

/// How many values each of them has beside its own.
pub(crate) fn exceptions(source: &Source) -> usize {
    source.not_identities.len() + source.not_namespaces.len()
}

/// A source's lists become one condition for each combination: core asks for one value each.
pub(crate) fn sources(source: &Source) -> Vec<SourceMatch> {
    let each = |patterns: &[TextPattern]| -> Vec<Option<StringMatch>> {
        if patterns.is_empty() { vec![None] } else { patterns.iter().map(|p| Some(p.0.clone())).collect() }
    };
    let cidrs: Vec<Option<IpNet>> =
        if source.cidrs.is_empty() { vec![None] } else { source.cidrs.iter().map(|c| Some(c.0)).collect() };
    let not =
        |patterns: &[TextPattern]| -> Vec<StringMatch> { patterns.iter().map(|p| p.0.clone()).collect() };
    let mut found = Vec::new();
    for identity in each(&source.identities) {
        for namespace in each(&source.namespaces) {
            for trust_domain in each(&source.trust_domains) {
                for cidr in &cidrs {
                    found.push(SourceMatch {
                        identity: identity.clone(),
                        namespace: namespace.clone(),
                        trust_domain: trust_domain.clone(),
                        cidr: *cidr,
                        not_identities: not(&source.not_identities),
                        not_namespaces: not(&source.not_namespaces),
                    });
                }
            }
        }
    }
    found
}

/// Unless told, every private range is the mesh's: a pod that is dialled before anybody heard of it must
/// be asked about, never spoken to in plaintext because it looked foreign.
fn mesh_ranges(mesh: &policy::MeshConfigSpec) -> Vec<IpNet> {
    if mesh.mesh_ranges.is_empty() {
        return PRIVATE.iter().filter_map(|net| net.parse().ok()).collect();
    }
    mesh.mesh_ranges.iter().map(|cidr| cidr.0).collect()
}

/// RFC 1918, RFC 6598 and RFC 4193.
const PRIVATE: [&str; 5] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"];
