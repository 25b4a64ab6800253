//! The one writer: takes what the source saw, compiles what it touched, publishes what differs.
//!
//! Why the version is a hash of what is sent: replicas that saw the same objects say the same version
//! without talking to each other, and a change that changes nothing is sent to nobody.
//!
//! Why it reads its own writing: a policy that our own reader would refuse is not published. The last good
//! one stays and the reason is reported here, not by ten thousand sidecars. Where there was no good one, what
//! is published refuses every request with that reason: what goes to an address that nobody knows would be
//! passed on as it is.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, RwLock},
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use weft_core::{
    identity::PodUid,
    policy::{Authorization, Endpoint, EndpointHealth, Rule, ServiceName},
};
use weft_proto::{
    ads::{Collection, Priority, Versioned},
    convert::{self, trust::TrustResource},
    names::Name,
    pb::v1,
};

use super::{
    now_ms,
    published::{Published, Resource, encode, encode_service},
};
use crate::{
    ca::Bundle,
    index::{Index, Key, Meta, hash, outbound, room::LeftOut},
    source::{Batch, Problem},
};

/// What the API reads beside what is published.
#[derive(Debug)]
pub struct State {
    /// The objects.
    pub index: Index,
    /// What the source could not use.
    pub problems: Vec<Problem>,
    /// Objects that are nothing to the mesh.
    pub foreign: usize,
    /// Resources that could not be published: name and reason.
    pub unpublished: BTreeMap<Arc<str>, String>,
    /// Those of them under which nothing good was ever published: what is there refuses.
    pub refusing: BTreeSet<Arc<str>>,
    /// Policies that are in force nowhere under a name, though the others of that name are.
    pub left_out: BTreeMap<Arc<str>, Vec<LeftOut>>,
    /// Names that each key is published under.
    pub names: HashMap<Key, Vec<Arc<str>>>,
    /// What the objects say already and is about to be published: nobody can be up to date with that.
    pub pending: BTreeSet<Key>,
}

/// A name that one namespace is told something else under.
type Told = (Arc<str>, Arc<str>);

/// The writer.
#[derive(Debug)]
pub struct Publisher {
    published: Arc<Published>,
    state: Arc<RwLock<State>>,
    /// Whose a name is: two services may claim one address.
    owners: HashMap<Arc<str>, Key>,
    /// Names that a key gave up in this batch: taken back last, so that one that passes from one service to
    /// another is never seen to be gone.
    given_up: Vec<(Key, Arc<str>)>,
    /// The same of collections: a route that names another service is published before.
    emptied: Vec<(Key, Arc<str>)>,
    /// What each key is published as to single namespaces: (namespace, name).
    to_consumers: HashMap<Key, BTreeSet<Told>>,
    consumer_owners: HashMap<Told, Key>,
    given_up_to_consumers: Vec<(Key, Told)>,
    epoch: u64,
    generation: u64,
}

impl Publisher {
    /// A writer to `published`.
    pub fn new(published: Arc<Published>, index: Index) -> Self {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let state = State {
            index,
            problems: Vec::new(),
            foreign: 0,
            unpublished: BTreeMap::new(),
            refusing: BTreeSet::new(),
            left_out: BTreeMap::new(),
            names: HashMap::new(),
            pending: BTreeSet::new(),
        };
        Self {
            published,
            state: Arc::new(RwLock::new(state)),
            owners: HashMap::new(),
            given_up: Vec::new(),
            emptied: Vec::new(),
            to_consumers: HashMap::new(),
            consumer_owners: HashMap::new(),
            given_up_to_consumers: Vec::new(),
            // Differs from run to run and from replica to replica.
            epoch: rand::random(),
            // Grows over restarts, too.
            generation: started.as_secs() << 16,
        }
    }

    /// What the API reads.
    pub fn state(&self) -> Arc<RwLock<State>> {
        self.state.clone()
    }

    /// How many service ports and endpoints there are.
    pub fn counts(&self) -> (usize, usize) {
        let endpoints = self.published.collections.values().iter().map(Collection::len).sum();
        (self.read().index.service_names().count(), endpoints)
    }

    /// Takes one batch of the source.
    pub fn apply(&mut self, batch: Batch) {
        let mut dirty = BTreeSet::new();
        {
            let mut state = self.write();
            state.problems = batch.problems;
            state.foreign = batch.foreign;
            for event in batch.events {
                // Not `append`, which builds the whole set anew: a first batch has thousands of events.
                dirty.extend(state.index.apply(event));
            }
            state.pending.clone_from(&dirty);
        }
        self.publish(dirty);
        self.write().pending.clear();
    }

    /// Publishes the trust anchors.
    pub fn trust(&mut self, bundle: &Bundle) {
        let resource = TrustResource {
            roots: bundle.roots.iter().map(|root| Bytes::copy_from_slice(root)).collect(),
            crls: Vec::new(),
            sequence: bundle.sequence,
            refresh_hint: std::time::Duration::ZERO,
        };
        let body = encode(&v1::TrustBundle::from(&resource));
        let domain = self.read().index.trust_domain().clone();
        let version = bundle_version(bundle.sequence, hash(&body));
        self.set(&Name::TrustBundle(domain).to_string().into(), version, body, true);
    }

    fn publish(&mut self, dirty: BTreeSet<Key>) {
        // Endpoints first, then what names them; who may call before the settings that name it.
        let mut ordered: Vec<Key> = dirty.into_iter().collect();
        ordered.sort_by_key(|key| match key {
            Key::Workload(_) => 0,
            Key::Endpoints(_) => 1,
            Key::Address(_) => 2,
            Key::Service(_) => 3,
            Key::Route(_) => 4,
        });
        for key in ordered {
            match &key {
                Key::Service(name) => self.service(&key, name),
                Key::Route(name) => self.route(&key, name),
                Key::Endpoints(name) => self.endpoints(&key, name),
                Key::Address(ip) => self.address(*ip),
                Key::Workload(uid) => self.workload(&key, uid),
            }
        }
        for (key, name) in std::mem::take(&mut self.emptied) {
            self.published.collections.update([(name.clone(), None)]);
            self.write().names.remove(&key);
            self.published.subscribers.wake(&name, true);
        }
        for (key, told) in std::mem::take(&mut self.given_up_to_consumers) {
            if self.consumer_owners.get(&told) == Some(&key) {
                self.consumer_owners.remove(&told);
                self.tell_consumers(&told, None);
            }
        }
        for (key, name) in std::mem::take(&mut self.given_up) {
            // Somebody else may have taken the name since.
            if self.owners.get(&name) == Some(&key) {
                self.owners.remove(&name);
                self.published.resources.update([(name.clone(), None)]);
                self.wake(&name, true);
            }
        }
    }

    fn service(&mut self, key: &Key, name: &ServiceName) {
        let compiled = self.read().index.service(name);
        let Some((service, meta)) = compiled else {
            self.consumers(key, BTreeMap::new());
            return self.names(key, Vec::new());
        };
        let (mut body, mut hash) = encode_service(&service);
        let own: Arc<str> = Name::Service(name.clone()).to_string().into();
        let mut names = vec![own.clone()];
        for vip in &service.vips {
            names.push(Name::address((*vip, name.port).into()).to_string().into());
        }
        let error = convert::service::parse(&body).err();
        let reason = error.as_ref().map(ToString::to_string);
        let mut route = None;
        if self.refused(&own, error) {
            if !self.may_refuse(&own) {
                return;
            }
            let (refusing, name, rules) = outbound::refusing(&service, &reason.unwrap_or_default());
            (body, hash) = encode_service(&refusing);
            route = Some((Arc::from(Name::Route(name).to_string()), rules));
        }
        let version = meta.version(hash);
        for name in &names {
            self.set(name, version.clone(), body.clone(), false);
        }
        // Callers of some namespaces have a route of their own to it. What is refused is refused to all.
        let mut told = BTreeMap::new();
        let consumers = if route.is_none() { self.read().index.consumers(name) } else { BTreeSet::new() };
        for namespace in consumers {
            let compiled = self.read().index.service_from(name, &namespace);
            let Some((service, _)) = compiled else { continue };
            let (body, hash) = encode_service(&service);
            let versioned = Versioned { version: meta.version(hash).into(), body };
            told.extend(names.iter().map(|name| ((namespace.clone(), name.clone()), versioned.clone())));
        }
        self.consumers(key, told);
        if let Some((name, rules)) = route {
            self.set_route(&name, None, &meta, &rules);
            names.push(name);
        }
        self.names(key, names);
    }

    /// A key is told to single namespaces in exactly these ways now.
    fn consumers(&mut self, key: &Key, told: BTreeMap<Told, Versioned>) {
        let now: BTreeSet<Told> = told.keys().cloned().collect();
        for (told, versioned) in told {
            self.consumer_owners.insert(told.clone(), key.clone());
            self.tell_consumers(&told, Some(versioned));
        }
        let before = match now.is_empty() {
            true => self.to_consumers.remove(key),
            false => self.to_consumers.insert(key.clone(), now.clone()),
        };
        let gone = before.unwrap_or_default().into_iter().filter(|told| !now.contains(told));
        self.given_up_to_consumers.extend(gone.map(|told| (key.clone(), told)));
    }

    fn tell_consumers(&self, (namespace, name): &Told, versioned: Option<Versioned>) {
        let known = self.published.consumers.get(namespace);
        let old = known.as_ref().and_then(|own| own.get(name)).map(|old| &old.versioned.version);
        if old == versioned.as_ref().map(|new| &new.version) {
            return;
        }
        let mut own = known.map_or_else(HashMap::new, |own| HashMap::clone(&own));
        match versioned {
            Some(versioned) => own.insert(name.clone(), Resource { versioned, since_ms: now_ms() }),
            None => own.remove(name),
        };
        let own = (!own.is_empty()).then(|| Arc::new(own));
        self.published.consumers.update([(namespace.clone(), own)]);
        self.wake(name, false);
    }

    /// Whether what refuses may be published under a name: nothing good is.
    fn may_refuse(&self, name: &Arc<str>) -> bool {
        let mut state = self.write();
        let may = self.published.resource(name).is_none() || state.refusing.contains(name);
        if may {
            state.refusing.insert(name.clone());
        }
        may
    }

    /// `first` is the same route at the service's first port: a route of a megabyte at a thousand ports that say the
    /// same is kept once.
    fn set_route(&self, name: &Arc<str>, first: Option<&Arc<str>>, meta: &Meta, rules: &[Rule]) {
        let mut body = encode(&convert::route::to_pb(rules));
        let version = meta.version(hash(&body));
        if let Some(first) =
            first.filter(|first| *first != name).and_then(|first| self.published.resource(first))
            && first.versioned.body == body
        {
            body = first.versioned.body;
        }
        self.set(name, version, body, false);
    }

    fn route(&mut self, key: &Key, service: &ServiceName) {
        let mut namespaces = self.read().index.consumers(service);
        namespaces.insert(service.namespace.clone());
        let mut names = Vec::new();
        let first_port = self.read().index.first_port(service);
        for namespace in namespaces {
            let first = first_port.as_ref().map(|port| outbound::route_name(port, &namespace));
            let first: Option<Arc<str>> = first.map(|first| Name::Route(first).to_string().into());
            let compiled = self.read().index.route_from(service, &namespace);
            let Some((mut route, meta)) = compiled else { continue };
            let name: Arc<str> = Name::Route(outbound::route_name(service, &namespace)).to_string().into();
            names.push(name.clone());
            let error = convert::route::parse(&encode(&convert::route::to_pb(&route.rules))).err();
            let reason = error.as_ref().map(ToString::to_string);
            if self.refused(&name, error) {
                if !self.may_refuse(&name) {
                    continue;
                }
                route.refuse(service, &reason.unwrap_or_default());
            }
            self.set_route(&name, first.as_ref(), &meta, &route.rules);
        }
        self.names(key, names);
    }

    fn endpoints(&mut self, key: &Key, service: &ServiceName) {
        let compiled = self.read().index.endpoints(service);
        let name: Arc<str> = Name::Collection(service.clone()).to_string().into();
        let Some(endpoints) = compiled else {
            self.refused_members(service, &BTreeMap::new());
            return self.emptied.push((key.clone(), name));
        };
        let mut urgent = false;
        let refused = self.refused_members(service, &endpoints);
        let members: Vec<_> = endpoints
            .values()
            .filter(|endpoint| !refused.contains(&endpoint.uid))
            .map(|endpoint| {
                let priority = match endpoint.health {
                    EndpointHealth::Healthy => Priority::Normal,
                    EndpointHealth::Draining | EndpointHealth::Unhealthy => Priority::Urgent,
                };
                urgent |= priority == Priority::Urgent;
                (endpoint.uid.clone(), encode(&convert::endpoint::to_pb(endpoint)), priority)
            })
            .collect();
        let collection = self.published.collections.get(&*name).unwrap_or_else(|| {
            self.epoch = self.epoch.wrapping_add(1);
            let new = Collection::new(&format!("{:x}", self.epoch));
            self.published.collections.update([(name.clone(), Some(new.clone()))]);
            new
        });
        let before = collection.len();
        if collection.replace(members, Instant::now()) > 0 || before == 0 {
            // Fewer than before, or some that take nothing new: nobody may wait for that.
            urgent |= collection.len() < before;
            self.published.subscribers.wake(&name, urgent);
        }
        self.write().names.insert(key.clone(), vec![name]);
    }

    /// Endpoints that every sidecar would refuse: nobody is told of them, and why stands in the status.
    fn refused_members(
        &self,
        service: &ServiceName,
        endpoints: &BTreeMap<PodUid, Endpoint>,
    ) -> BTreeSet<PodUid> {
        let mut refused = BTreeMap::new();
        for endpoint in endpoints.values() {
            let body = encode(&convert::endpoint::to_pb(endpoint));
            if let Err(error) = convert::endpoint::parse(&body, &service.namespace) {
                tracing::error!(%service, uid = %endpoint.uid, %error, "endpoint not published");
                refused.insert(endpoint.uid.clone(), error.to_string());
            }
        }
        let prefix = format!("ep/{service}/");
        let is_stale = |name: &Arc<str>| name.starts_with(&*prefix);
        if !refused.is_empty() || self.read().unpublished.keys().any(is_stale) {
            let mut state = self.write();
            state.unpublished.retain(|name, _| !is_stale(name));
            let named = |(uid, reason): (&PodUid, &String)| (format!("{prefix}{uid}").into(), reason.clone());
            state.unpublished.extend(refused.iter().map(named));
        }
        refused.into_keys().collect()
    }

    fn address(&mut self, ip: IpAddr) {
        let address = self.read().index.pod_address(ip).map(Arc::new);
        if self.published.addresses.get(&ip) == address {
            return;
        }
        self.published.addresses.update([(ip, address)]);
        let name = match ip {
            IpAddr::V4(v4) => format!("ip/{v4}"),
            IpAddr::V6(v6) => format!("ip/[{v6}]"),
        };
        self.published.subscribers.wake(&name, true);
    }

    fn workload(&mut self, key: &Key, uid: &PodUid) {
        let compiled = self.read().index.workload(uid);
        let Some((policy, meta)) = compiled else {
            self.published.workloads.update([(uid.clone(), None)]);
            self.published.subscribers.wake_pod(uid);
            return self.names(key, Vec::new());
        };
        let (resource, authorizations) = convert::workload::split(&policy, uid);
        let mut names = Vec::new();
        for (name, authorization) in authorizations {
            let name: Arc<str> = name.into();
            self.authorization(&name, &meta, &authorization);
            names.push(name);
        }
        if self.published.workload(uid).as_ref() != Some(&policy.identity) {
            self.published.workloads.update([(uid.clone(), Some(policy.identity))]);
            self.published.subscribers.wake_pod(uid);
        }
        let body = encode(&v1::WorkloadConfig::from(&resource));
        let name: Arc<str> = Name::Workload(uid.clone()).to_string().into();
        if !self.refused(&name, convert::workload::parse(&body).err()) {
            self.set(&name, meta.version(hash(&body)), body, true);
        }
        names.push(name);
        self.names(key, names);
    }

    /// Publishes who may call one port: everything that the policies say, or as much of it as can be told.
    fn authorization(&mut self, name: &Arc<str>, meta: &Meta, whole: &Authorization) {
        let body = encode(&v1::Authorization::from(whole));
        if self.is_told(name, meta, &body) {
            return self.nothing_left_out(name);
        }
        let Err(error) = convert::authz::parse(&body) else {
            self.set_authorization(name, meta, whole);
            return self.nothing_left_out(name);
        };
        let (enforceable, left_out) = self.read().index.enforceable(whole);
        if self.read().left_out.get(name) != Some(&left_out) {
            for LeftOut { object, reason } in &left_out {
                tracing::error!(%name, %object, %reason, "a policy is not in force");
            }
            self.write().left_out.insert(name.clone(), left_out);
        }
        let body = encode(&v1::Authorization::from(&enforceable));
        let refused = convert::authz::parse(&body).is_err().then_some(error);
        if !self.refused(name, refused) && !self.is_told(name, meta, &body) {
            self.set_authorization(name, meta, &enforceable);
        }
    }

    /// Whether that is what is published. The version says nothing of the generation: a change that changes nothing has
    /// the same.
    fn is_told(&self, name: &str, meta: &Meta, body: &[u8]) -> bool {
        let version = meta.version(hash(body));
        self.published.resource(name).is_some_and(|told| *told.versioned.version == *version)
    }

    fn set_authorization(&mut self, name: &Arc<str>, meta: &Meta, authorization: &Authorization) {
        let mut message = v1::Authorization::from(authorization);
        let version = meta.version(hash(&encode(&message)));
        self.generation += 1;
        message.generation = self.generation;
        self.set(name, version, encode(&message), true);
    }

    fn nothing_left_out(&self, name: &Arc<str>) {
        self.write().left_out.remove(name);
        self.refused(name, None);
    }

    /// Publishes one version, if it differs, and wakes whom it concerns.
    fn set(&self, name: &Arc<str>, version: String, body: Bytes, urgent: bool) {
        if self.published.resource(name).is_some_and(|old| *old.versioned.version == *version) {
            return;
        }
        let versioned = Versioned { version: version.into(), body };
        let resource = Resource { versioned, since_ms: now_ms() };
        self.published.resources.update([(name.clone(), Some(resource))]);
        self.wake(name, urgent);
    }

    /// A key is published under exactly these names now; those that it had before are gone.
    fn names(&mut self, key: &Key, names: Vec<Arc<str>>) {
        let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = match names.is_empty() {
            true => state.names.remove(key),
            false => state.names.insert(key.clone(), names.clone()),
        };
        for name in &names {
            self.owners.insert(name.clone(), key.clone());
        }
        let gone: Vec<_> =
            before.unwrap_or_default().into_iter().filter(|name| !names.contains(name)).collect();
        for name in &gone {
            state.unpublished.remove(name);
            state.refusing.remove(name);
            state.left_out.remove(name);
        }
        drop(state);
        self.given_up.extend(gone.into_iter().map(|name| (key.clone(), name)));
    }

    fn wake(&self, name: &str, urgent: bool) {
        self.published.subscribers.wake(name, urgent);
        // The other spellings under which a service may be subscribed.
        if let Some(service) = name.strip_prefix("svc/")
            && let Some((namespace, rest)) = service.split_once('/')
            && let Some((service, port)) = rest.split_once(':')
        {
            let domain = self.read().index.trust_domain().clone();
            for suffix in [String::new(), ".svc".to_owned(), format!(".svc.{domain}")] {
                let host = format!("host/{service}.{namespace}{suffix}");
                self.published.subscribers.wake(&format!("{host}:{port}"), urgent);
                if port == "80" {
                    self.published.subscribers.wake(&host, urgent);
                }
            }
        }
    }

    /// Notes what our own reader would refuse.
    fn refused(&self, name: &Arc<str>, error: Option<convert::Invalid>) -> bool {
        let mut state = self.write();
        match error {
            None => {
                state.unpublished.remove(name);
                state.refusing.remove(name);
                false
            }
            Some(error) => {
                tracing::error!(%name, %error, "not published: the last good version stays");
                state.unpublished.insert(name.clone(), error.to_string());
                true
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Of a trust bundle. It begins with the sequence: what a sidecar says is in force there tells which bundle that is.
fn bundle_version(sequence: u64, hash: u64) -> String {
    format!("{sequence}.{hash:016x}")
}

/// The sequence in a version of a trust bundle.
pub fn sequence_of(version: &str) -> Option<u64> {
    version.split_once('.')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use weft_core::policy::{Action, Filter};

    use super::*;
    use crate::{
        index::{Event, tests::objects},
        resources::{Kind, Object, ObjectKey, Origin, policy::Limits},
    };

    fn batch(text: &str) -> Batch {
        let origin = Origin { file: "test.yaml".into(), line: 1 };
        let apply = |object| Event::Apply { object: Box::new(object), origin: origin.clone() };
        Batch { events: objects(text).into_iter().map(apply).collect(), ..Batch::default() }
    }

    fn publisher() -> (Publisher, Arc<Published>) {
        let domain = weft_core::identity::TrustDomain::new("cluster.local").unwrap();
        let published = Arc::new(Published::new(domain.clone()));
        (Publisher::new(published.clone(), Index::new(domain)), published)
    }

    #[test]
    fn an_endpoint_that_every_sidecar_would_refuse_is_told_to_none() {
        let (mut publisher, published) = publisher();
        let slice = |port: u16| {
            batch(&format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: shop}}\n\
                 spec: {{clusterIP: 10.96.0.1, ports: [{{port: 80}}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: a-1, namespace: shop, labels: {{kubernetes.io/service-name: a}}}}\n\
                 addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [10.0.0.1]}}]\n"
            ))
        };
        publisher.apply(slice(0));
        let members = || published.collections.get("ep/shop/a:80/*").unwrap().len();
        assert_eq!(members(), 0);
        assert_eq!(publisher.state().read().unwrap().unpublished.len(), 1);
        publisher.apply(slice(8080));
        assert_eq!(members(), 1);
        assert!(publisher.state().read().unwrap().unpublished.is_empty());
    }

    #[test]
    fn a_service_that_every_sidecar_would_refuse_is_not_unknown() {
        let (mut publisher, published) = publisher();
        let limited = |requests: u32| {
            let mut batch = batch(
                "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n\
                 spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n---\n\
                 apiVersion: weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: a, namespace: shop}\n\
                 spec: {targetRefs: [{kind: Service, name: a}], limits: {maxRequests: 1}}\n",
            );
            // What nothing said that is read from a source, since it would be refused there.
            for event in &mut batch.events {
                if let Event::Apply { object, .. } = event
                    && let Object::TrafficPolicy(policy) = &mut **object
                {
                    policy.spec.limits = Some(Limits { max_requests: Some(requests), ..Limits::default() });
                }
            }
            batch
        };
        let names = ["ip/10.96.0.1:80", "svc/shop/a:80", "route/shop/a.refused:80"];
        let there = || names.map(|name| published.resource(name).map(|resource| resource.versioned.body));
        let service = || convert::service::parse(&there()[0].clone().unwrap()).unwrap();
        publisher.apply(limited(0));
        // Nothing of it was ever good: every request gets the reason, and no endpoint is tried.
        assert_eq!(service().route.as_deref(), Some(names[2]));
        assert_eq!((service().endpoints, service().mtls_required), (None, true));
        let rules = convert::route::parse(&there()[2].clone().unwrap()).unwrap().rules;
        let [Filter::Invalid { reason }] = &rules[0].filters[..] else { panic!("{rules:?}") };
        assert!(reason.contains("max_requests"), "{reason}");
        assert_eq!(publisher.state().read().unwrap().unpublished.len(), 1);
        publisher.apply(limited(5));
        let good = there();
        assert_eq!((service().limits.max_requests, service().route), (5, None));
        assert_eq!(good[2], None);
        assert!(publisher.state().read().unwrap().unpublished.is_empty());
        // Now there is a good one, which stays.
        publisher.apply(limited(0));
        assert_eq!(there(), good);
        assert_eq!(publisher.state().read().unwrap().unpublished.len(), 1);
        publisher.apply(Batch {
            events: vec![Event::Delete(ObjectKey::new(Kind::Service, "shop", "a"))],
            ..Batch::default()
        });
        assert_eq!(there(), [None, None, None]);
        assert!(publisher.state().read().unwrap().unpublished.is_empty());
    }

    #[test]
    fn a_policy_that_does_not_fit_keeps_no_other_from_the_sidecars_and_is_forgotten_when_it_does() {
        let (mut publisher, published) = publisher();
        publisher.apply(batch(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop, uid: a-uid, annotations: \
             {weft.dev/injected: \"true\"}}\nstatus: {podIP: 10.0.0.1}\n",
        ));
        let policy = |name: &str, action: &str, count: usize| {
            let rules = vec!["{from: [{namespaces: [till]}]}"; count].join(", ");
            batch(&format!(
                "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{action: {action}, rules: [{rules}]}}\n"
            ))
        };
        let name = "authz/a-uid/0";
        let told = || convert::authz::parse(&published.resource(name).unwrap().versioned.body).unwrap();
        let state = publisher.state();
        let left_out = || state.read().unwrap().left_out.get(name).cloned().unwrap_or_default();
        publisher.apply(policy("a", "Allow", 1_000));
        let good = published.resource(name).unwrap().versioned;
        for more in ["b", "c", "d", "e"] {
            publisher.apply(policy(more, "Allow", 1_000));
        }
        let whom: Vec<_> = left_out().into_iter().map(|left| left.object.name.to_string()).collect();
        assert_eq!((told().rules.iter().count(), whom), (4_000, vec!["e".to_owned()]));
        // Before, the port was frozen from here on.
        publisher.apply(policy("now", "Deny", 1));
        assert!(told().rules.iter().any(|rule| rule.action == Action::Deny && &*rule.object.name == "now"));
        for gone in ["b", "c", "d", "e", "now"] {
            let key = ObjectKey::new(Kind::AuthorizationPolicy, "shop", gone);
            publisher.apply(Batch { events: vec![Event::Delete(key)], ..Batch::default() });
        }
        assert_eq!(left_out(), []);
        assert_eq!(published.resource(name).unwrap().versioned.version, good.version);
    }

    #[test]
    fn what_is_said_again_as_it_was_published_is_no_longer_refused() {
        let (mut publisher, published) = publisher();
        let pod = |account: &str| {
            batch(&format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: a, namespace: shop, uid: a-uid, annotations: \
                 {{weft.dev/injected: \"true\"}}}}\nspec: {{serviceAccountName: {account}}}\n\
                 status: {{podIP: 10.0.0.1}}\n"
            ))
        };
        publisher.apply(pod("web"));
        let name = "authz/a-uid/0";
        assert!(published.resource(name).is_some());
        publisher.write().unpublished.insert(name.into(), "as a policy had it that has gone".to_owned());
        publisher.apply(pod("web"));
        assert!(publisher.read().unpublished.is_empty());
    }

    #[test]
    fn a_consumer_route_is_told_to_its_namespace_alone_and_taken_back() {
        let (mut publisher, published) = publisher();
        let route = |namespace: &str, backend: &str| {
            batch(&format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: {namespace}}}\n\
                 spec:\n  parentRefs: [{{group: \"\", kind: Service, name: a, namespace: shop}}]\n  \
                 rules: [{{backendRefs: [{{name: {backend}, namespace: shop, port: 80}}]}}]\n"
            ))
        };
        publisher.apply(batch(
            "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n\
             spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n",
        ));
        let names = ["svc/shop/a:80", "ip/10.96.0.1:80", "host/a.shop", "host/a.shop.svc.cluster.local:80"];
        let seen = |from: &str| names.map(|name| published.lookup(name, from).unwrap());
        let route_of = |from: &str| {
            let seen = seen(from);
            assert!(seen.iter().all(|one| one.body == seen[0].body), "{seen:?}");
            convert::service::parse(&seen[0].body).unwrap().route.map(|route| route.to_string())
        };
        let plain = published.len();
        assert_eq!((route_of("shop"), route_of("till")), (None, None));
        publisher.apply(route("till", "a"));
        assert_eq!((route_of("shop"), route_of("other")), (None, None));
        assert_eq!(route_of("till").as_deref(), Some("route/shop/a.from.till:80"));
        assert!(published.resource("route/shop/a.from.till:80").is_some());
        assert_eq!(published.len(), plain + 3, "its route and two names of the service, for one namespace");
        publisher.apply(route("shop", "b"));
        assert_eq!(route_of("other").as_deref(), Some("route/shop/a:80"));
        assert_eq!(route_of("till").as_deref(), Some("route/shop/a.from.till:80"));
        for namespace in ["till", "shop"] {
            publisher.apply(Batch {
                events: vec![Event::Delete(ObjectKey::new(Kind::HttpRoute, namespace, "r"))],
                ..Batch::default()
            });
        }
        assert_eq!((route_of("shop"), route_of("till")), (None, None));
        assert_eq!(published.len(), plain);
        assert!(publisher.to_consumers.is_empty() && publisher.consumer_owners.is_empty());
    }

    #[test]
    fn a_route_that_says_the_same_at_each_port_is_kept_once() {
        let (mut publisher, published) = publisher();
        publisher.apply(batch(
            "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n\
             spec: {clusterIP: 10.96.0.1, ports: [{name: x, port: 90}, {name: y, port: 80}]}\n---\n\
             apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\n\
             spec:\n  parentRefs: [{group: \"\", kind: Service, name: a}]\n  \
             rules: [{backendRefs: [{name: a, port: 80}]}]\n",
        ));
        let body = |port: u16| published.resource(&format!("route/shop/a:{port}")).unwrap().versioned.body;
        assert_eq!((body(80), body(80).as_ptr()), (body(90), body(90).as_ptr()));
    }

    #[test]
    fn an_address_passes_from_one_service_to_another() {
        let (mut publisher, published) = publisher();
        let service = |name: &str| {
            batch(&format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{clusterIP: 10.96.0.1, ports: [{{port: 80}}]}}\n"
            ))
        };
        let gone = |name: &str| Event::Delete(ObjectKey::new(Kind::Service, "shop", name));
        let body = || published.resource("ip/10.96.0.1:80").map(|resource| resource.versioned.body);
        let of = |name: &str| published.resource(&format!("svc/shop/{name}:80")).map(|r| r.versioned.body);
        publisher.apply(service("m"));
        assert_eq!(body(), of("m"));
        // Renamed in one batch, to a name before and to one behind: whichever is compiled first.
        for (old, new) in [("m", "a"), ("a", "z")] {
            let mut renamed = service(new);
            renamed.events.push(gone(old));
            publisher.apply(renamed);
            assert!(body().is_some() && body() == of(new), "{new}");
            assert!(of(old).is_none());
        }
        // Both claim it, then the one that had it goes.
        publisher.apply(service("b"));
        assert_eq!(body(), of("b"), "of the same age the first name counts");
        publisher.apply(Batch { events: vec![gone("b")], ..Batch::default() });
        assert_eq!(body(), of("z"));
        publisher.apply(Batch { events: vec![gone("z")], ..Batch::default() });
        assert!(body().is_none());
    }
}
