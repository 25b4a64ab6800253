//! The state of the mesh, and what a change of it touches. Pure: no runtime, no Kubernetes client.
//!
//! Why three steps: an event is *applied* here and answered with the keys whose policy may differ; a key
//! is *compiled* to core types in `outbound`, `endpoints` and `inbound`; publishing is elsewhere. A
//! compile reads state and nothing else, so two controllers that saw the same objects say the same.
//!
//! Why objects are kept in compact form: a Pod is 10 KiB as Kubernetes has it, and 500 bytes of it
//! matter to a mesh.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    ops::RangeInclusive,
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{Pod, Service, ServiceSpec},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{EndpointHealth, Probe, Protocol, Reach, ServiceName},
};

use crate::resources::{
    INJECTED, Kind, OPAQUE_PORTS, Object, ObjectKey, Origin, SKIP_INBOUND_PORTS, WEIGHT, created,
    gateway::{GrpcRouteSpec, HttpRouteSpec, ParentRef},
    lookup,
    policy::{AuthorizationPolicySpec, MeshConfigSpec, TargetRef, TrafficPolicySpec},
    probes,
};

pub mod conditions;
pub mod endpoints;
pub mod inbound;
pub mod outbound;
pub mod room;
pub mod validate;

/// What a source saw.
#[derive(Clone, Debug)]
pub enum Event {
    /// An object is there, new or changed.
    Apply {
        /// It.
        object: Box<Object>,
        /// Where it stands.
        origin: Origin,
    },
    /// An object is gone.
    Delete(ObjectKey),
    /// An authorization policy cannot be read and never could: the workloads that it is about are closed.
    Unreadable {
        /// The policy.
        key: ObjectKey,
        /// Labels of its workloads; empty: all of its namespace.
        labels: BTreeMap<String, String>,
    },
    /// A node's zone, if it has one (any more): its pods are there, unless their own label says where they are.
    Zone {
        /// The node.
        node: Arc<str>,
        /// Its zone.
        zone: Option<Arc<str>>,
    },
}

/// One thing that is compiled and published on its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// `svc/…`, and the addresses that mean it.
    Service(ServiceName),
    /// `route/…`.
    Route(ServiceName),
    /// `ep/…/*`.
    Endpoints(ServiceName),
    /// `ip/<pod-ip>:*`.
    Address(IpAddr),
    /// `self/<uid>` and `authz/<uid>/*`.
    Workload(PodUid),
}

/// Namespace and name.
pub type Name = (Arc<str>, Arc<str>);

/// The state.
#[derive(Debug)]
pub struct Index {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) services: BTreeMap<Name, ServiceEntry>,
    /// Services that are gone while an authorization policy names them: it is still about their pods.
    pub(crate) former: BTreeMap<Name, ServiceEntry>,
    pub(crate) slices: BTreeMap<Name, SliceEntry>,
    pub(crate) pods: BTreeMap<Name, PodEntry>,
    pub(crate) http_routes: BTreeMap<Name, RouteEntry<HttpRouteSpec>>,
    pub(crate) grpc_routes: BTreeMap<Name, RouteEntry<GrpcRouteSpec>>,
    pub(crate) traffic: BTreeMap<Name, PolicyEntry<TrafficPolicySpec>>,
    pub(crate) authz: BTreeMap<Name, PolicyEntry<AuthorizationPolicySpec>>,
    pub(crate) unreadable: BTreeMap<Name, BTreeMap<String, String>>,
    pub(crate) mesh: BTreeMap<Name, PolicyEntry<MeshConfigSpec>>,
    slices_of: BTreeMap<Name, BTreeSet<Name>>,
    /// Whom the slices of a service name: asked for each pod, where there are thousands of both.
    members: BTreeMap<Name, Members>,
    /// Services whose slices somebody else writes.
    selectorless: BTreeSet<Name>,
    /// Uids and addresses are reused and mistyped: everybody who claims one is kept, and who has it is
    /// decided when it is asked, so that the order of events decides nothing.
    by_uid: BTreeMap<PodUid, BTreeSet<Name>>,
    by_ip: BTreeMap<IpAddr, BTreeSet<Name>>,
    by_vip: BTreeMap<IpAddr, BTreeSet<Name>>,
    /// Services with parentRefs of routes in other namespaces, and those routes: consumer routes are few, and
    /// must not be looked for among all routes of all namespaces.
    consumer_routes: BTreeMap<Name, BTreeSet<ObjectKey>>,
    /// Pods that say of themselves what their services should: few, and not to be looked for among all.
    opaque_pods: BTreeSet<Name>,
    zones: BTreeMap<Arc<str>, Arc<str>>,
    origins: BTreeMap<ObjectKey, Placed>,
}

/// Where an object stands, and what tells one text of it from another.
#[derive(Clone, Debug)]
struct Placed {
    origin: Origin,
    version: String,
}

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

/// Whom slices name, and how often: one pod may be in two.
#[derive(Clone, Debug, Default)]
struct Members {
    by_uid: HashMap<PodUid, u32>,
    /// Where there is no uid.
    by_name: HashMap<Name, u32>,
    by_ip: HashMap<IpAddr, u32>,
}

impl Members {
    fn add(&mut self, slice: &SliceEntry) {
        for endpoint in &slice.endpoints {
            if let Some(uid) = &endpoint.pod_uid {
                *self.by_uid.entry(uid.clone()).or_default() += 1;
                continue;
            }
            if let Some(name) = &endpoint.pod_name {
                *self.by_name.entry(name.clone()).or_default() += 1;
            }
            for ip in &endpoint.addresses {
                *self.by_ip.entry(*ip).or_default() += 1;
            }
        }
    }

    fn remove(&mut self, slice: &SliceEntry) {
        for endpoint in &slice.endpoints {
            if let Some(uid) = &endpoint.pod_uid {
                one_less(&mut self.by_uid, uid);
                continue;
            }
            if let Some(name) = &endpoint.pod_name {
                one_less(&mut self.by_name, name);
            }
            for ip in &endpoint.addresses {
                one_less(&mut self.by_ip, ip);
            }
        }
    }

    fn has(&self, name: &Name, pod: &PodEntry) -> bool {
        self.by_uid.contains_key(&pod.uid)
            || self.by_name.contains_key(name)
            || pod.ips.iter().any(|ip| self.by_ip.contains_key(ip))
    }
}

fn one_less<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
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

#[derive(Clone, Debug)]
pub(crate) struct RouteEntry<S> {
    pub(crate) meta: Meta,
    pub(crate) spec: S,
    /// What is wrong with each rule by itself.
    pub(crate) problems: Vec<Option<outbound::RuleProblem>>,
}

#[derive(Clone, Debug)]
pub(crate) struct PolicyEntry<S> {
    pub(crate) meta: Meta,
    pub(crate) spec: S,
}

impl Index {
    /// An empty mesh whose own trust domain is `trust_domain`.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            services: BTreeMap::new(),
            former: BTreeMap::new(),
            slices: BTreeMap::new(),
            pods: BTreeMap::new(),
            http_routes: BTreeMap::new(),
            grpc_routes: BTreeMap::new(),
            traffic: BTreeMap::new(),
            authz: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            mesh: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            members: BTreeMap::new(),
            selectorless: BTreeSet::new(),
            by_uid: BTreeMap::new(),
            by_ip: BTreeMap::new(),
            by_vip: BTreeMap::new(),
            consumer_routes: BTreeMap::new(),
            opaque_pods: BTreeSet::new(),
            zones: BTreeMap::new(),
            origins: BTreeMap::new(),
        }
    }

    /// Takes one event; returns every key whose compiled policy may differ now.
    pub fn apply(&mut self, event: Event) -> BTreeSet<Key> {
        let key = match &event {
            Event::Apply { object, .. } => object.key(),
            Event::Delete(key) | Event::Unreadable { key, .. } => key.clone(),
            Event::Zone { node, zone } => return self.set_zone(node, zone.as_ref()),
        };
        let mut dirty = self.affected_by(&key);
        // Whose pods they are may change with each slice, and with the first and the last those that a service has by
        // its selector, too.
        let mut of_slice: BTreeSet<Name> = BTreeSet::new();
        if key.kind == Kind::EndpointSlice {
            of_slice.extend(self.slices.get(&name_of(&key)).map(|slice| slice.service.clone()));
            if let Event::Apply { object, .. } = &event
                && let Some(service) = lookup(&object.metadata().labels, SERVICE_NAME)
            {
                of_slice.insert((key.namespace.clone(), service.into()));
            }
        }
        let before: Vec<_> =
            of_slice.into_iter().map(|service| (self.pod_names_of(&service), service)).collect();
        match event {
            Event::Apply { object, origin } => {
                // Debug text shows every field, in a fixed order.
                let version = Meta::new(object.metadata()).version(hash(format!("{object:?}").as_bytes()));
                self.origins.insert(key.clone(), Placed { origin, version });
                self.insert(&key, *object);
            }
            Event::Delete(_) => {
                self.origins.remove(&key);
                self.remove(&key);
            }
            Event::Unreadable { labels, .. } => {
                self.unreadable.insert(name_of(&key), labels);
            }
            // Answered above.
            Event::Zone { .. } => {}
        }
        if key.kind == Kind::AuthorizationPolicy {
            self.forget_former(&key.namespace);
        }
        dirty.append(&mut self.affected_by(&key));
        for (before, service) in &before {
            self.affected_by_slices(service, before, &mut dirty);
        }
        dirty
    }

    /// What differs when a service has other slices: its endpoints, and the pods that came or went. The others are
    /// told nothing else than before, and are thousands.
    fn affected_by_slices(&self, name: &Name, before: &BTreeSet<Name>, keys: &mut BTreeSet<Key>) {
        let Some(service) = self.services.get(name) else { return };
        keys.extend(service.ports.iter().map(|port| Key::Endpoints(service_name(name, port.port))));
        if self.has_opaque_pods(&name.0) {
            // With its pods changes what it is said to speak.
            keys.extend(service.ports.iter().map(|port| Key::Service(service_name(name, port.port))));
        }
        let now = self.pod_names_of(name);
        for pod in before.symmetric_difference(&now).filter_map(|pod| self.pods.get(pod)) {
            keys.insert(Key::Workload(pod.uid.clone()));
            keys.extend(pod.ips.iter().copied().map(Key::Address));
        }
    }

    fn pod_names_of(&self, name: &Name) -> BTreeSet<Name> {
        let Some(service) = self.services.get(name) else { return BTreeSet::new() };
        self.pods_of(name, service).map(|(pod, _)| pod.clone()).collect()
    }

    /// Forgets the deleted services of a namespace that no authorization policy names any more.
    fn forget_former(&mut self, namespace: &Arc<str>) {
        let mut former = std::mem::take(&mut self.former);
        former.retain(|name, _| name.0 != *namespace || self.policies_about(name).next().is_some());
        self.former = former;
    }

    /// Authorization policies that name a service, be it there or not.
    fn policies_about<'a>(
        &'a self,
        service: &'a Name,
    ) -> impl Iterator<Item = (&'a Name, &'a AuthorizationPolicySpec)> {
        in_namespace(&self.authz, &service.0)
            .filter(|(_, policy)| policy.spec.target_refs.iter().any(|target| *target.name == *service.1))
            .map(|(name, policy)| (name, &policy.spec))
    }

    fn set_zone(&mut self, node: &Arc<str>, zone: Option<&Arc<str>>) -> BTreeSet<Key> {
        match zone {
            Some(zone) => self.zones.insert(node.clone(), zone.clone()),
            None => self.zones.remove(node),
        };
        let zone = zone.cloned().unwrap_or_default();
        let mut moved = Vec::new();
        let there = |pod: &PodEntry| pod.node.as_ref() == Some(node) && !pod.has_own_zone;
        for (name, pod) in self.pods.iter_mut().filter(|(_, pod)| there(pod)) {
            pod.zone = zone.clone();
            moved.push(name.clone());
        }
        let mut dirty = BTreeSet::new();
        for name in moved {
            self.affected_by_pod(&name, &mut dirty);
        }
        dirty
    }

    /// Where an object stands.
    pub fn origin(&self, key: &ObjectKey) -> Option<&Origin> {
        self.origins.get(key).map(|placed| &placed.origin)
    }

    /// Every object, with its origin and version.
    pub fn objects(&self) -> impl Iterator<Item = (&ObjectKey, &Origin, &str)> {
        self.origins.iter().map(|(key, placed)| (key, &placed.origin, &*placed.version))
    }

    /// Every port of every service that callers can name.
    pub fn service_names(&self) -> impl Iterator<Item = ServiceName> {
        self.services
            .iter()
            .filter(|(_, service)| service.kind != ServiceKind::External)
            .flat_map(|(name, service)| service.ports.iter().map(|port| service_name(name, port.port)))
    }

    /// Every workload.
    pub fn workloads(&self) -> impl Iterator<Item = &PodUid> {
        self.by_uid.keys()
    }

    /// A workload's namespace and pod name.
    pub fn workload_name(&self, uid: &PodUid) -> Option<&Name> {
        Some(self.pod_by_uid(uid)?.0)
    }

    /// Workloads that should have a sidecar now: pods that carry one, have an address and are not about to go.
    pub fn meshed(&self) -> impl Iterator<Item = (&PodUid, &SpiffeId)> {
        let runs =
            |pod: &&PodEntry| pod.injected && !pod.ips.is_empty() && pod.health != EndpointHealth::Draining;
        self.pods.values().filter(runs).filter_map(|pod| Some((&pod.uid, pod.identity.as_ref()?)))
    }

    /// One object's origin and version.
    pub fn object(&self, key: &ObjectKey) -> Option<(&Origin, &str)> {
        self.origins.get(key).map(|placed| (&placed.origin, &*placed.version))
    }

    /// What "applied N of M" of an object counts over. Endpoints are left out: they change without their service's
    /// doing, and a collection has no one version. And so is, for what there are thousands of, what it does to others.
    pub fn told_by(&self, key: &ObjectKey) -> BTreeSet<Key> {
        let name = name_of(key);
        match key.kind {
            Kind::Service => {
                let ports = self.services.get(&name).into_iter().flat_map(|service| &service.ports);
                ports.map(|port| Key::Service(service_name(&name, port.port))).collect()
            }
            Kind::Pod => self.pods.get(&name).map(|pod| Key::Workload(pod.uid.clone())).into_iter().collect(),
            Kind::EndpointSlice => BTreeSet::new(),
            Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TrafficPolicy
            | Kind::AuthorizationPolicy
            | Kind::MeshConfig => {
                let mut keys = self.affected_by(key);
                keys.retain(|key| match key {
                    Key::Service(_) | Key::Route(_) | Key::Workload(_) => true,
                    Key::Endpoints(_) | Key::Address(_) => false,
                });
                keys
            }
        }
    }

    /// Every key whose compile reads the object.
    pub fn affected_by(&self, key: &ObjectKey) -> BTreeSet<Key> {
        let name = name_of(key);
        let mut keys = BTreeSet::new();
        match key.kind {
            Kind::Service => {
                self.affected_by_service(&name, true, &mut keys);
                // Who may call them is said about the service, be it there or not.
                for (policy, spec) in self.policies_about(&name) {
                    let pods = in_namespace(&self.pods, &name.0)
                        .filter(|(pod_name, pod)| self.selects(policy, spec, pod_name, pod).is_some());
                    keys.extend(pods.map(|(_, pod)| Key::Workload(pod.uid.clone())));
                }
            }
            Kind::EndpointSlice => {
                let service = self.slices.get(&name).map(|slice| &slice.service);
                let service = service.and_then(|name| self.services.get_key_value(name));
                keys.extend(service.into_iter().flat_map(|(name, service)| {
                    service.ports.iter().map(|port| Key::Endpoints(service_name(name, port.port)))
                }));
            }
            Kind::Pod => self.affected_by_pod(&name, &mut keys),
            Kind::HttpRoute => {
                if let Some(route) = self.http_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, &mut keys);
                }
            }
            Kind::GrpcRoute => {
                if let Some(route) = self.grpc_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, &mut keys);
                    // It says what the pods' ports speak.
                    let parents = route.spec.parent_refs.iter().filter_map(|p| parent_service(&name, p));
                    for parent in parents.collect::<BTreeSet<_>>() {
                        self.affected_by_service(&parent, false, &mut keys);
                    }
                }
            }
            Kind::TrafficPolicy => {
                if let Some(policy) = self.traffic.get(&name) {
                    for target in &policy.spec.target_refs {
                        self.affected_by_target(&name.0, target, &mut keys);
                    }
                }
            }
            Kind::AuthorizationPolicy => {
                let selected = |pod: &&PodEntry, pod_name: &Name| {
                    let by_policy = self
                        .authz
                        .get(&name)
                        .is_some_and(|p| self.selects(&name, &p.spec, pod_name, pod).is_some());
                    by_policy
                        || self.unreadable.get(&name).is_some_and(|labels| is_subset(labels, &pod.labels))
                };
                let pods =
                    in_namespace(&self.pods, &name.0).filter(|(pod_name, pod)| selected(pod, pod_name));
                keys.extend(pods.map(|(_, pod)| Key::Workload(pod.uid.clone())));
            }
            Kind::MeshConfig => {
                if self.mesh.contains_key(&name) {
                    keys.extend(self.by_uid.keys().cloned().map(Key::Workload));
                }
            }
        }
        keys
    }

    fn affected_by_service(&self, name: &Name, policy_too: bool, keys: &mut BTreeSet<Key>) {
        let Some(service) = self.services.get(name) else { return };
        if policy_too {
            // Who else claims its addresses may lose or get them.
            let rivals: BTreeSet<_> =
                service.vips().iter().filter_map(|ip| self.by_vip.get(ip)).flatten().collect();
            for (rival, service) in rivals.into_iter().filter_map(|rival| self.services.get_key_value(rival))
            {
                keys.extend(service.ports.iter().map(|port| Key::Service(service_name(rival, port.port))));
            }
        }
        for port in &service.ports {
            let port = service_name(name, port.port);
            if policy_too {
                keys.insert(Key::Service(port.clone()));
                keys.insert(Key::Route(port.clone()));
            }
            if self.has_opaque_pods(&name.0) {
                // With its pods changes what it is said to speak.
                keys.insert(Key::Service(port.clone()));
            }
            keys.insert(Key::Endpoints(port));
        }
        // What a port speaks is declared by the services that send to it.
        for (_, pod) in self.pods_of(name, service) {
            keys.insert(Key::Workload(pod.uid.clone()));
            keys.extend(pod.ips.iter().copied().map(Key::Address));
        }
    }

    fn affected_by_pod(&self, name: &Name, keys: &mut BTreeSet<Key>) {
        let Some(pod) = self.pods.get(name) else { return };
        keys.insert(Key::Workload(pod.uid.clone()));
        keys.extend(pod.ips.iter().copied().map(Key::Address));
        // A service that claims the pod's address gets it, or loses it.
        for claimant in pod.ips.iter().filter_map(|ip| self.by_vip.get(ip)).flatten() {
            let ports = self.services.get(claimant).into_iter().flat_map(|service| &service.ports);
            keys.extend(ports.map(|port| Key::Service(service_name(claimant, port.port))));
        }
        // A slice that somebody wrote may name pods anywhere.
        let by_hand = self.selectorless.iter().filter(|service| service.0 != name.0);
        let by_hand = by_hand.filter_map(|service| self.services.get_key_value(service));
        for (service_name_, service) in in_namespace(&self.services, &name.0).chain(by_hand) {
            if self.is_pod_of(service_name_, service, name, pod) {
                if !pod.opaque.is_empty() {
                    self.affected_by_service(service_name_, true, keys);
                }
                keys.extend(
                    service.ports.iter().map(|p| Key::Endpoints(service_name(service_name_, p.port))),
                );
            }
        }
    }

    fn affected_by_parents(&self, route: &Name, parents: &[ParentRef], keys: &mut BTreeSet<Key>) {
        for parent in parents {
            let Some(service_key) = parent_service(route, parent) else { continue };
            let Some(service) = self.services.get(&service_key) else { continue };
            for port in service.ports.iter().filter(|p| parent.port.is_none_or(|only| only == p.port)) {
                keys.insert(Key::Service(service_name(&service_key, port.port)));
                keys.insert(Key::Route(service_name(&service_key, port.port)));
            }
        }
    }

    fn affected_by_target(&self, namespace: &Arc<str>, target: &TargetRef, keys: &mut BTreeSet<Key>) {
        let name = (namespace.clone(), target.name.as_str().into());
        match target.kind.as_str() {
            "Service" => {
                let Some(service) = self.services.get(&name) else { return };
                for port in &service.ports {
                    keys.insert(Key::Service(service_name(&name, port.port)));
                    keys.insert(Key::Route(service_name(&name, port.port)));
                }
            }
            "HTTPRoute" => {
                if let Some(route) = self.http_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, keys);
                }
            }
            "GRPCRoute" => {
                if let Some(route) = self.grpc_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, keys);
                }
            }
            _ => {}
        }
    }

    fn insert(&mut self, key: &ObjectKey, object: Object) {
        let name = name_of(key);
        self.remove(key);
        match object {
            Object::Service(service) => {
                let entry = ServiceEntry::new(&service);
                for ip in entry.vips() {
                    self.by_vip.entry(*ip).or_default().insert(name.clone());
                }
                self.former.remove(&name);
                if entry.selector.is_empty() {
                    self.selectorless.insert(name.clone());
                }
                self.services.insert(name, entry);
            }
            Object::EndpointSlice(slice) => {
                if let Some(entry) = SliceEntry::new(&name.0, &slice) {
                    self.slices_of.entry(entry.service.clone()).or_default().insert(name.clone());
                    self.members.entry(entry.service.clone()).or_default().add(&entry);
                    self.slices.insert(name, entry);
                }
            }
            Object::Pod(pod) => {
                if let Some(mut entry) = PodEntry::new(&self.trust_domain, &name, &pod) {
                    let node = entry.node.as_ref().filter(|_| !entry.has_own_zone);
                    if let Some(zone) = node.and_then(|node| self.zones.get(node)) {
                        entry.zone = zone.clone();
                    }
                    self.by_uid.entry(entry.uid.clone()).or_default().insert(name.clone());
                    if !entry.opaque.is_empty() {
                        self.opaque_pods.insert(name.clone());
                    }
                    for ip in entry.ips.iter().filter(|_| !entry.host_network) {
                        self.by_ip.entry(*ip).or_default().insert(name.clone());
                    }
                    self.pods.insert(name, entry);
                }
            }
            Object::HttpRoute(route) => {
                self.consumes(key, &route.spec.parent_refs, true);
                let (meta, problems) =
                    (Meta::new(&route.metadata), conditions::http_problems(&name, &route.spec));
                self.http_routes.insert(name, RouteEntry { meta, spec: route.spec, problems });
            }
            Object::GrpcRoute(route) => {
                self.consumes(key, &route.spec.parent_refs, true);
                let (meta, problems) =
                    (Meta::new(&route.metadata), conditions::grpc_problems(&name, &route.spec));
                self.grpc_routes.insert(name, RouteEntry { meta, spec: route.spec, problems });
            }
            Object::TrafficPolicy(policy) => {
                self.traffic
                    .insert(name, PolicyEntry { meta: Meta::new(&policy.metadata), spec: policy.spec });
            }
            Object::AuthorizationPolicy(policy) => {
                self.authz.insert(name, PolicyEntry { meta: Meta::new(&policy.metadata), spec: policy.spec });
            }
            Object::MeshConfig(config) => {
                self.mesh.insert(name, PolicyEntry { meta: Meta::new(&config.metadata), spec: config.spec });
            }
        }
    }

    fn remove(&mut self, key: &ObjectKey) {
        let name = name_of(key);
        match key.kind {
            Kind::Service => {
                self.selectorless.remove(&name);
                if let Some(old) = self.services.remove(&name) {
                    for ip in old.vips() {
                        unclaim(&mut self.by_vip, ip, &name);
                    }
                    // Without a selector nobody knows whose pods would be its.
                    if !old.selector.is_empty() && self.policies_about(&name).next().is_some() {
                        self.former.insert(name, old);
                    }
                }
            }
            Kind::EndpointSlice => {
                if let Some(old) = self.slices.remove(&name)
                    && let Some(slices) = self.slices_of.get_mut(&old.service)
                {
                    slices.remove(&name);
                    if slices.is_empty() {
                        self.slices_of.remove(&old.service);
                        self.members.remove(&old.service);
                    } else if let Some(members) = self.members.get_mut(&old.service) {
                        members.remove(&old);
                    }
                }
            }
            Kind::Pod => {
                self.opaque_pods.remove(&name);
                if let Some(old) = self.pods.remove(&name) {
                    unclaim(&mut self.by_uid, &old.uid, &name);
                    for ip in &old.ips {
                        unclaim(&mut self.by_ip, ip, &name);
                    }
                }
            }
            Kind::HttpRoute => {
                if let Some(old) = self.http_routes.remove(&name) {
                    self.consumes(key, &old.spec.parent_refs, false);
                }
            }
            Kind::GrpcRoute => {
                if let Some(old) = self.grpc_routes.remove(&name) {
                    self.consumes(key, &old.spec.parent_refs, false);
                }
            }
            Kind::TrafficPolicy => {
                self.traffic.remove(&name);
            }
            Kind::AuthorizationPolicy => {
                self.authz.remove(&name);
                self.unreadable.remove(&name);
            }
            Kind::MeshConfig => {
                self.mesh.remove(&name);
            }
        }
    }

    /// Notes, or forgets, which services of other namespaces a route is about.
    fn consumes(&mut self, route: &ObjectKey, parents: &[ParentRef], now: bool) {
        let name = name_of(route);
        for service in parents.iter().filter_map(|parent| parent_service(&name, parent)) {
            if service.0 == name.0 {
                continue;
            }
            let routes = self.consumer_routes.entry(service.clone()).or_default();
            if now {
                routes.insert(route.clone());
            } else {
                routes.remove(route);
            }
            if routes.is_empty() {
                self.consumer_routes.remove(&service);
            }
        }
    }

    fn has_opaque_pods(&self, namespace: &Arc<str>) -> bool {
        let first: Name = (namespace.clone(), "".into());
        self.opaque_pods.range(first..).next().is_some_and(|name| name.0 == *namespace)
    }

    /// Whether a pod that a service's port sends to says that it is opaque there: then it is for all callers.
    pub(crate) fn is_opaque_by_a_pod(&self, name: &Name, service: &ServiceEntry, port: &ServicePort) -> bool {
        let first: Name = (name.0.clone(), "".into());
        let of_namespace = self.opaque_pods.range(first..).take_while(|pod| pod.0 == name.0);
        let mut pods = of_namespace.filter_map(|pod| self.pods.get_key_value(pod));
        pods.any(|(pod_name, pod)| {
            port.target_on(pod).is_some_and(|target| pod.is_opaque(target))
                && self.is_pod_of(name, service, pod_name, pod)
        })
    }

    /// The pod with an address. One that goes away may be listed beside the one that has its address now.
    pub(crate) fn pod_by_ip(&self, ip: IpAddr) -> Option<(&Name, &PodEntry)> {
        let claims = self.by_ip.get(&ip)?.iter().filter_map(|name| self.pods.get_key_value(name));
        claims.min_by_key(|(name, pod)| {
            (pod.health == EndpointHealth::Draining, std::cmp::Reverse(pod.meta.created), *name)
        })
    }

    /// The pod with a uid: of two that wrongly have one, the older, so that nobody takes it from a pod.
    pub(crate) fn pod_by_uid(&self, uid: &PodUid) -> Option<(&Name, &PodEntry)> {
        let claims = self.by_uid.get(uid)?.iter().filter_map(|name| self.pods.get_key_value(name));
        claims.min_by_key(|(name, pod)| (pod.meta.created, *name))
    }

    /// Whether a service has a virtual address on a port. One service's external address may be another's
    /// cluster address, or a pod's: the cluster's word counts first, then the pod, then age, so that nobody
    /// takes over an address by claiming it.
    pub(crate) fn has_vip(&self, name: &Name, ip: IpAddr, port: u16) -> bool {
        let claims = self.by_vip.get(&ip).into_iter().flatten();
        let claims = claims.filter_map(|name| self.services.get_key_value(name));
        let first = claims
            .filter(|(_, service)| service.port(port).is_some())
            .min_by_key(|(name, service)| (!service.cluster_ips.contains(&ip), service.meta.created, *name));
        first.is_some_and(|(first, service)| {
            first == name && (service.cluster_ips.contains(&ip) || !self.by_ip.contains_key(&ip))
        })
    }

    /// Slices of a service, in name order.
    pub(crate) fn slices_of(&self, service: &Name) -> impl Iterator<Item = &SliceEntry> {
        self.slices_of.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name))
    }

    /// Pods that a service sends to: those of its slices, or, where there are none, of its selector.
    pub(crate) fn pods_of<'a>(
        &'a self,
        name: &'a Name,
        service: &'a ServiceEntry,
    ) -> impl Iterator<Item = (&'a Name, &'a PodEntry)> {
        in_namespace(&self.pods, &name.0)
            .filter(move |(pod_name, pod)| self.is_pod_of(name, service, pod_name, pod))
    }

    pub(crate) fn is_pod_of(
        &self,
        name: &Name,
        service: &ServiceEntry,
        pod_name: &Name,
        pod: &PodEntry,
    ) -> bool {
        match self.slices_of.contains_key(name) {
            true => self.is_in_slices_of(name, pod_name, pod),
            false => is_selected(name, service, pod_name, pod),
        }
    }

    /// The same for authorization: nobody waits for a slice to be written, and a pod that is in one is the
    /// service's whatever its labels say now.
    pub(crate) fn may_be_pod_of(
        &self,
        name: &Name,
        service: &ServiceEntry,
        pod_name: &Name,
        pod: &PodEntry,
    ) -> bool {
        is_selected(name, service, pod_name, pod) || self.is_in_slices_of(name, pod_name, pod)
    }

    fn is_in_slices_of(&self, name: &Name, pod_name: &Name, pod: &PodEntry) -> bool {
        self.members.get(name).is_some_and(|members| members.has(pod_name, pod))
    }

    /// The mesh-wide settings in force, and which object they come from.
    pub(crate) fn mesh_config(&self) -> Option<(&Name, &PolicyEntry<MeshConfigSpec>)> {
        self.mesh.iter().min_by_key(|(name, entry)| (entry.meta.created, (*name).clone()))
    }
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
    fn new(service: &Service) -> Self {
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
    fn new(namespace: &Arc<str>, slice: &EndpointSlice) -> Option<Self> {
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
    fn new(trust_domain: &TrustDomain, name: &Name, pod: &Pod) -> Option<Self> {
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

fn is_selected(name: &Name, service: &ServiceEntry, pod_name: &Name, pod: &PodEntry) -> bool {
    pod_name.0 == name.0 && !service.selector.is_empty() && is_subset(&service.selector, &pod.labels)
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

/// Takes one of several claims back.
fn unclaim<K: Ord>(claims: &mut BTreeMap<K, BTreeSet<Name>>, key: &K, name: &Name) {
    if let Some(names) = claims.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            claims.remove(key);
        }
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

/// The service that a parentRef names; `None` if it names something else.
pub(crate) fn parent_service(route: &Name, parent: &ParentRef) -> Option<Name> {
    let group_ok = parent.group.as_deref().is_some_and(|group| matches!(group, "" | "core"));
    let kind_ok = parent.kind.as_deref() == Some("Service");
    // A parentRef without group and kind means a Gateway.
    (kind_ok && (group_ok || parent.group.is_none())).then(|| {
        let namespace = parent.namespace.as_deref().map_or_else(|| route.0.clone(), Into::into);
        (namespace, parent.name.as_str().into())
    })
}

/// The objects of one namespace.
pub(crate) fn in_namespace<'a, V>(
    map: &'a BTreeMap<Name, V>,
    namespace: &Arc<str>,
) -> impl Iterator<Item = (&'a Name, &'a V)> + use<'a, V> {
    let namespace = namespace.clone();
    let first: Name = (namespace.clone(), "".into());
    map.range(first..).take_while(move |(name, _)| name.0 == namespace)
}

pub(crate) fn is_subset(wanted: &BTreeMap<String, String>, of: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| of.get(key) == Some(value))
}

pub(crate) fn service_name(name: &Name, port: u16) -> ServiceName {
    ServiceName { namespace: name.0.clone(), name: name.1.clone(), port }
}

fn name_of(key: &ObjectKey) -> Name {
    (key.namespace.clone(), key.name.clone())
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

/// Kinds in the order in which people look at them.
pub fn kinds() -> [Kind; 8] {
    [
        Kind::Service,
        Kind::HttpRoute,
        Kind::GrpcRoute,
        Kind::TrafficPolicy,
        Kind::AuthorizationPolicy,
        Kind::MeshConfig,
        Kind::Pod,
        Kind::EndpointSlice,
    ]
}

/// Opaque ports of a pod.
const MAX_OPAQUE: usize = 128;

/// Label keys that endpoints carry into telemetry.
pub(crate) const TELEMETRY_LABELS: [&str; 4] =
    ["app", "app.kubernetes.io/name", "version", "app.kubernetes.io/version"];

#[cfg(test)]
pub(crate) mod tests;
