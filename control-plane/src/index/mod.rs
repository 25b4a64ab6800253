//! The state of the mesh. Pure: no runtime, no Kubernetes client.
//!
//! Why three steps: an event is *applied* here and answered with the keys whose policy may differ (`affected`); a key
//! is *compiled* to core types in `outbound`, `endpoints` and `inbound`; publishing is elsewhere. A
//! compile reads state and nothing else, so two controllers that saw the same objects say the same.
//!
//! Below all of it, and without an index: `objects` (what is kept of each), `rules` and `traffic` (a route's rule and a
//! policy's settings as the core has them).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{EndpointHealth, ServiceName},
};

use crate::resources::{
    Kind, Object, ObjectKey, Origin,
    gateway::{GrpcRouteSpec, HttpRouteSpec, ParentRef},
    lookup,
    policy::{AuthorizationPolicySpec, MeshConfigSpec, TrafficPolicySpec},
};
use objects::is_subset;
use rules::RuleProblem;

mod affected;
pub mod conditions;
pub mod endpoints;
pub mod inbound;
mod objects;
pub mod outbound;
pub mod room;
mod rules;
mod traffic;
pub mod validate;

pub use objects::{Meta, Name, hash};
pub(crate) use objects::{
    PodEntry, SERVICE_NAME, ServiceEntry, ServiceKind, ServicePort, SliceEntry, ZONE, parse_opaque_ports,
    parse_ports,
};

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

#[derive(Clone, Debug)]
pub(crate) struct RouteEntry<S> {
    pub(crate) meta: Meta,
    pub(crate) spec: S,
    /// What is wrong with each rule by itself.
    pub(crate) problems: Vec<Option<RuleProblem>>,
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
        dirty.extend(self.affected_by(&key));
        for (before, service) in &before {
            self.affected_by_slices(service, before, &mut dirty);
        }
        dirty
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
                let (meta, problems) = (Meta::new(&route.metadata), rules::http_problems(&name, &route.spec));
                self.http_routes.insert(name, RouteEntry { meta, spec: route.spec, problems });
            }
            Object::GrpcRoute(route) => {
                self.consumes(key, &route.spec.parent_refs, true);
                let (meta, problems) = (Meta::new(&route.metadata), rules::grpc_problems(&name, &route.spec));
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

fn is_selected(name: &Name, service: &ServiceEntry, pod_name: &Name, pod: &PodEntry) -> bool {
    pod_name.0 == name.0 && !service.selector.is_empty() && is_subset(&service.selector, &pod.labels)
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

pub(crate) fn service_name(name: &Name, port: u16) -> ServiceName {
    ServiceName { namespace: name.0.clone(), name: name.1.clone(), port }
}

fn name_of(key: &ObjectKey) -> Name {
    (key.namespace.clone(), key.name.clone())
}

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

#[cfg(test)]
pub(crate) mod tests;
