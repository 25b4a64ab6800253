//! What the control stream fed: every subscribed resource, and who needs it. [`join`] makes snapshots of them.
//!
//! Why the store runs no task: it is told what arrived and what is asked for, by the one task that owns the
//! stream, and never waits. The workers see only finished `Arc`s.
//!
//! What arrives is hostile: the messages are parsed by `weft_proto::convert`, refused resources leave the
//! last good one in force and are reported, and nothing grows beyond its bound.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tracing::{debug, info, warn};
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{
        Authorization, BackendKey, BackendPolicy, Endpoint, InboundPolicy, Place, RouteTable, Service,
        ServiceName,
    },
};
use weft_proto::{
    ads::{
        MAX_RESOURCES, ResourceType,
        client::{Change, Client},
    },
    convert::{self, workload::WorkloadResource},
    names::{Name, NameError},
    pb::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node},
};

use super::{Answer, Ask, Discovery, Inner, Known, Ranges, Watched, millis};
use crate::{
    config::Config,
    identity::Bundles,
    telemetry::{
        metrics::{Counter, Gauge, Shared},
        report::Reports,
    },
    tls::Trust,
};

mod dump;
mod join;

/// Owned by the task that owns the control stream.
pub(crate) struct Store {
    client: Client,
    state: State,
}

struct State {
    // Settings
    uid: PodUid,
    identity: SpiffeId,
    trust_domain: TrustDomain,
    idle: Duration,
    warm: Duration,
    /// How long a dead stream may look alive.
    silence: Duration,
    max_destinations: usize,
    // Where results go
    shared: Arc<Shared>,
    reports: Reports,
    known: Known,
    start: Instant,
    egress: watch::Sender<Option<Arc<Ranges>>>,
    inbound: watch::Sender<Option<Arc<InboundPolicy>>>,
    bundles: watch::Sender<Bundles>,
    // What is held
    held: BTreeMap<Name, Held>,
    refused: BTreeSet<Name>,
    destinations: BTreeMap<SocketAddr, Destination>,
    backends: HashMap<BackendKey, Built>,
    generation: u64,
    own: Own,
    // What this turn changed
    touched: BTreeSet<Name>,
    news: BTreeSet<Name>,
    subscriptions: Vec<(Name, bool)>,
    connected: Option<Instant>,
    last_contact: Instant,
}

/// One subscribed resource or collection.
struct Held {
    users: BTreeSet<User>,
    version: String,
    value: Value,
}

/// Who needs a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum User {
    /// This workload's own policy.
    Own,
    /// A destination.
    Destination(SocketAddr),
}

enum Value {
    /// Not answered yet.
    Pending,
    /// There is no such thing.
    Removed,
    Service(Arc<Service>),
    Route(Arc<Route>),
    Endpoints(Members),
    Authorization(Arc<Authorization>),
    Workload(Arc<WorkloadResource>),
    Trust,
}

struct Route {
    /// `None`: no rules; everything goes to the service itself.
    table: Option<RouteTable>,
    backends: Vec<ServiceName>,
}

/// A collection of endpoints.
#[derive(Default)]
struct Members {
    by_uid: BTreeMap<PodUid, Arc<Endpoint>>,
    complete: bool,
    /// Grows with each real change.
    generation: u64,
    /// The members as a snapshot takes them; made once a change.
    list: Option<Arc<[Arc<Endpoint>]>>,
}

/// One destination that somebody asked for.
struct Destination {
    needs: BTreeSet<Name>,
    watched: Option<Arc<Watched>>,
    /// Last asked for, while there is no policy that says so.
    used: Arc<AtomicU64>,
    /// When somebody outside the store was last seen to hold it.
    held_at: Instant,
    waiters: Vec<oneshot::Sender<()>>,
    warming: Option<Instant>,
    /// What a new snapshot lacks because it is said not to be there, and since when.
    absent: Option<(BTreeSet<Name>, Instant)>,
    /// What the published snapshot was made of: compared to see whether anything changed.
    made_of: Option<MadeOf>,
    /// What was missing when it was published all the same: it is not waited for twice.
    lacks: BTreeSet<Name>,
    /// Versions that are live in it.
    live: BTreeMap<Name, String>,
}

#[derive(Clone)]
struct MadeOf {
    service: Arc<Service>,
    route: Routes,
    backends: Vec<Arc<BackendPolicy>>,
}

/// What a service's route is.
#[derive(Clone)]
enum Routes {
    /// It names none: everything goes to the service itself.
    None,
    Known(Arc<Route>),
    /// It names one that was refused or does not come, and nothing was in force before: without it the service
    /// itself would get what a rule may keep from it.
    Unusable,
}

/// The newest policy of one backend.
struct Built {
    policy: Arc<BackendPolicy>,
    endpoints: u64,
    /// Where this workload was, if it matters.
    from: Place,
}

/// This workload's own policy.
#[derive(Default)]
struct Own {
    needs: BTreeSet<Name>,
    warming: Option<Instant>,
    live: BTreeMap<Name, String>,
    /// The parts of the published policy, by address; the settings are kept here, the rest is in it.
    made_of: Option<(Arc<WorkloadResource>, Vec<usize>)>,
    trust: Trust,
}

impl Store {
    /// A store that asks for this workload's own configuration, the discovery that it feeds, and what the
    /// discovery asks.
    pub(crate) fn new(
        config: &Config,
        shared: Arc<Shared>,
        reports: Reports,
        bundles: watch::Sender<Bundles>,
    ) -> (Self, Discovery, mpsc::UnboundedReceiver<Ask>) {
        let (egress, ranges) = watch::channel(None);
        let (inbound, policy) = watch::channel(None);
        let (ask, asked) = mpsc::unbounded_channel();
        let known: Known = Arc::new(RwLock::new(HashMap::new()));
        let start = Instant::now();
        let discovery = Discovery(Arc::new(Inner {
            hold: config.times.discovery_hold,
            start,
            waiters: Semaphore::new(config.limits.discovery_waiters),
            egress: ranges,
            inbound: policy,
            known: Arc::clone(&known),
            ask,
            shared: Arc::clone(&shared),
        }));
        let node = Node {
            id: config.pod_uid.to_string(),
            cluster: config.identity.namespace().to_owned(),
            user_agent_name: "weft-proxy".to_owned(),
            user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let state = State {
            uid: config.pod_uid.clone(),
            identity: config.identity.clone(),
            trust_domain: config.trust_domain.clone(),
            idle: config.times.discovery_idle,
            warm: config.times.discovery_warm,
            silence: config.times.ping + config.times.ping_timeout,
            max_destinations: config.limits.destinations,
            shared,
            reports,
            known,
            start,
            egress,
            inbound,
            bundles,
            held: BTreeMap::new(),
            refused: BTreeSet::new(),
            destinations: BTreeMap::new(),
            backends: HashMap::new(),
            generation: 0,
            own: Own::default(),
            touched: BTreeSet::new(),
            news: BTreeSet::new(),
            subscriptions: Vec::new(),
            connected: None,
            last_contact: start,
        };
        let mut store = Self { client: Client::new(node), state };
        store.state.join_own();
        store.settle();
        (store, discovery, asked)
    }

    /// How often [`Store::tick`] wants to be called.
    pub(crate) fn tick_every(&self) -> Duration {
        let shortest = (self.state.warm / 4).min(self.state.idle / 4);
        shortest.clamp(Duration::from_millis(10), Duration::from_secs(1))
    }

    /// A new stream is up.
    pub(crate) fn connected(&mut self) {
        self.state.connected = Some(Instant::now());
        self.client.connected();
    }

    /// The stream is gone.
    pub(crate) fn disconnected(&mut self) {
        self.state.connected = None;
        self.client.disconnected();
    }

    /// What to send next; called until there is nothing more.
    pub(crate) fn next_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        self.client.next_request()
    }

    /// A message has arrived.
    pub(crate) fn receive(&mut self, message: DeltaDiscoveryResponse) {
        let state = &mut self.state;
        state.last_contact = Instant::now();
        let receipt = self.client.receive(message, &mut |change| state.take(change));
        if let Some(reason) = receipt.refused {
            warn!(%reason, "a whole response was refused");
            state.shared.count(Counter::Nacks);
        }
        for name in state.touched.iter().filter(|name| matches!(name, Name::Collection(_))) {
            // A collection's version is where it would be resumed.
            let cursor = self.client.cursor(&name.to_string());
            if let (Some(held), Some(cursor)) = (state.held.get_mut(name), cursor) {
                held.version = cursor;
            }
        }
        self.settle();
    }

    /// Somebody asks.
    pub(crate) fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Resolve(address, reply) => self.state.resolve(address, reply),
            Ask::Dump(reply) => drop(reply.send(self.state.dump())),
        }
        self.settle();
    }

    /// Time has passed: publishes what has warmed long enough, evicts what is idle, keeps the gauges.
    pub(crate) fn tick(&mut self) {
        self.state.tick();
        self.settle();
    }

    /// Joins whatever changed, and tells the client what to ask for.
    fn settle(&mut self) {
        self.state.settle();
        for (name, wanted) in self.state.subscriptions.drain(..) {
            let text = name.to_string();
            if wanted {
                self.client.subscribe(name.resource_type(), &text);
            } else {
                self.client.unsubscribe(name.resource_type(), &text);
            }
        }
    }
}

impl State {
    /// One change; an error refuses the resource, and the last good one stays.
    fn take(&mut self, change: Change<'_>) -> Result<(), String> {
        match change {
            Change::Update { ty, name, version, body } => {
                let taken = self.update(ty, name, version, body);
                let parsed: Option<Name> = name.parse().ok();
                match &taken {
                    Ok(()) => {
                        if parsed.is_some_and(|name| self.refused.remove(&name)) {
                            self.reports.accepted(ty.type_url(), name);
                        }
                    }
                    Err(reason) => {
                        warn!(resource = ?name, version, %reason, "refused: the last good one stays in force");
                        self.shared.count(Counter::Nacks);
                        self.reports.nacked(ty.type_url(), name, version, reason);
                        if let Some(name) = parsed.filter(|_| self.refused.len() < MAX_RESOURCES) {
                            self.touched.insert(container(&name));
                            self.refused.insert(name);
                        }
                    }
                }
                taken
            }
            Change::Removed { ty: _, name } => {
                let name: Name = name.parse().map_err(|e: NameError| e.to_string())?;
                self.remove(&name);
                Ok(())
            }
            Change::CollectionComplete { collection } => self.complete(collection),
        }
    }

    fn update(&mut self, ty: ResourceType, text: &str, version: &str, body: &Bytes) -> Result<(), String> {
        let name: Name = text.parse().map_err(|e: NameError| e.to_string())?;
        if name.resource_type() != ty {
            return Err(format!("{text:?} is not the name of a {ty}"));
        }
        if !self.held.contains_key(&container(&name)) {
            return Ok(()); // unsubscribed meanwhile
        }
        let value = match &name {
            Name::Service(_) | Name::Address(_) | Name::Host(_) => {
                let service = convert::service::parse(body).map_err(|e| e.to_string())?;
                Value::Service(Arc::new(service))
            }
            Name::Route(_) => {
                let route = convert::route::parse(body).map_err(|e| e.to_string())?;
                if route.backends.len() > MAX_BACKENDS {
                    return Err(format!(
                        "it names {} backends; at most {MAX_BACKENDS} are taken",
                        route.backends.len()
                    ));
                }
                let table = (!route.rules.is_empty()).then(|| RouteTable::new(route.rules));
                Value::Route(Arc::new(Route { table, backends: route.backends }))
            }
            Name::Endpoint(service, uid) => {
                let endpoint =
                    convert::endpoint::parse(body, &service.namespace).map_err(|e| e.to_string())?;
                if endpoint.uid != *uid {
                    return Err(format!("endpoint says uid {}, its name says {uid}", endpoint.uid));
                }
                return self.member(service, uid, Some(endpoint));
            }
            Name::Authorization(..) => {
                let mut policy = convert::authz::parse(body).map_err(|e| e.to_string())?;
                policy.rules = policy.rules.indexed();
                Value::Authorization(Arc::new(policy))
            }
            Name::Workload(_) => {
                let workload = convert::workload::parse(body).map_err(|e| e.to_string())?;
                if workload.identity != self.identity {
                    return Err(format!(
                        "it is for {}, this workload is {}",
                        workload.identity, self.identity
                    ));
                }
                self.ranges(&workload);
                Value::Workload(Arc::new(workload))
            }
            Name::TrustBundle(domain) => {
                let bundle = convert::trust::parse(body).map_err(|e| e.to_string())?;
                let trust =
                    self.own.trust.with(domain, &bundle.roots, &bundle.crls).map_err(|e| e.to_string())?;
                self.own.trust = trust.clone();
                let own = *domain == self.trust_domain;
                info!(%domain, roots = bundle.roots.len(), sequence = bundle.sequence, "trust bundle");
                self.bundles.send_modify(|bundles| {
                    bundles.trust = trust;
                    if own {
                        bundles.sequence = Some(bundle.sequence);
                    }
                });
                Value::Trust
            }
            Name::Collection(_) | Name::Head(_) => return Ok(()), // the client's business
        };
        let Some(held) = self.held.get_mut(&name) else { return Ok(()) };
        let again = held.version == version;
        held.version = version.to_owned();
        held.value = match (value, &held.value) {
            // The same again, or in other words: whoever compares pointers sees no change. A version holds
            // the hash of what was compiled.
            (Value::Route(_), Value::Route(old)) if again => Value::Route(Arc::clone(old)),
            (Value::Authorization(_), Value::Authorization(old)) if again => {
                Value::Authorization(Arc::clone(old))
            }
            (Value::Service(new), Value::Service(old)) if new == *old => Value::Service(Arc::clone(old)),
            (Value::Workload(new), Value::Workload(old)) if new == *old => Value::Workload(Arc::clone(old)),
            (value, _) => value,
        };
        self.touched.insert(name);
        Ok(())
    }

    /// A member of a collection has changed or gone.
    fn member(
        &mut self,
        service: &ServiceName,
        uid: &PodUid,
        endpoint: Option<Endpoint>,
    ) -> Result<(), String> {
        let name = Name::Collection(service.clone());
        let Some(held) = self.held.get_mut(&name) else { return Ok(()) };
        if !matches!(held.value, Value::Endpoints(_)) {
            held.value = Value::Endpoints(Members::default());
        }
        let Value::Endpoints(members) = &mut held.value else { return Ok(()) };
        let changed = match endpoint {
            Some(new) if members.by_uid.get(uid).is_some_and(|old| **old == new) => false,
            Some(_) if members.by_uid.len() >= MAX_RESOURCES && !members.by_uid.contains_key(uid) => {
                return Err(format!("more than {MAX_RESOURCES} endpoints"));
            }
            Some(new) => {
                members.by_uid.insert(uid.clone(), Arc::new(new));
                true
            }
            None => members.by_uid.remove(uid).is_some(),
        };
        if changed {
            members.changed(&mut self.generation);
        }
        self.touched.insert(name);
        Ok(())
    }

    /// Every member of a collection has been told.
    fn complete(&mut self, collection: &str) -> Result<(), String> {
        let name: Name = collection.parse().map_err(|e: NameError| e.to_string())?;
        let Some(held) = self.held.get_mut(&name) else { return Ok(()) };
        if !matches!(held.value, Value::Endpoints(_)) {
            held.value = Value::Endpoints(Members::default());
        }
        if let Value::Endpoints(members) = &mut held.value {
            members.complete = true;
        }
        self.touched.insert(name);
        Ok(())
    }

    fn remove(&mut self, name: &Name) {
        if let Name::Endpoint(service, uid) = name {
            // Cannot fail: nothing is added.
            let _ = self.member(service, uid, None);
            if self.refused.remove(name) {
                self.reports.accepted(name.resource_type().type_url(), &name.to_string());
            }
            return;
        }
        let Some(held) = self.held.get_mut(name) else { return };
        let keeps = match held.value {
            Value::Authorization(_) | Value::Workload(_) | Value::Trust => true,
            Value::Pending | Value::Removed | Value::Service(_) | Value::Route(_) | Value::Endpoints(_) => {
                false
            }
        };
        if keeps {
            // Who may call, and whom to trust, is never weakened or lost by an absence.
            warn!(resource = %name, "the control plane says that it is gone: the last good one stays in force");
            return;
        }
        held.value = Value::Removed;
        held.version.clear();
        if self.refused.remove(name) {
            self.reports.accepted(name.resource_type().type_url(), &name.to_string());
        }
        self.touched.insert(name.clone());
    }

    fn ranges(&self, workload: &WorkloadResource) {
        let new = Ranges { mesh: workload.mesh_ranges.clone(), egress: workload.egress };
        self.egress.send_if_modified(|ranges| {
            let changed = ranges.as_deref() != Some(&new);
            if changed {
                *ranges = Some(Arc::new(new));
            }
            changed
        });
    }

    fn resolve(&mut self, address: SocketAddr, reply: oneshot::Sender<()>) {
        if !self.destinations.contains_key(&address) {
            if self.destinations.len() >= self.max_destinations && !self.make_room() {
                return; // dropping the reply refuses
            }
            debug!(%address, "new destination");
            let destination = Destination {
                needs: BTreeSet::new(),
                watched: None,
                used: Arc::new(AtomicU64::new(millis(self.start))),
                held_at: Instant::now(),
                waiters: Vec::new(),
                warming: None,
                absent: None,
                made_of: None,
                lacks: BTreeSet::new(),
                live: BTreeMap::new(),
            };
            self.destinations.insert(address, destination);
            self.join(address);
        }
        let answered = self.is_known(address);
        let now = millis(self.start);
        let Some(destination) = self.destinations.get_mut(&address) else { return };
        destination.used.store(now, Ordering::Relaxed);
        if answered {
            let _ = reply.send(());
        } else {
            destination.waiters.retain(|waiter| !waiter.is_closed());
            destination.waiters.push(reply);
        }
    }

    fn is_known(&self, address: SocketAddr) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).contains_key(&address)
    }

    fn know(&self, address: SocketAddr, answer: Option<Answer>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Some(answer) => drop(known.insert(address, answer)),
            None => drop(known.remove(&address)),
        }
    }

    /// Joins everything that uses what was touched.
    fn settle(&mut self) {
        while !self.touched.is_empty() {
            let touched = std::mem::take(&mut self.touched);
            let held = touched.iter().filter_map(|name| self.held.get(name));
            let users: BTreeSet<User> = held.flat_map(|held| held.users.iter().copied()).collect();
            for user in users {
                match user {
                    User::Own => self.join_own(),
                    User::Destination(address) => self.join(address),
                }
            }
            self.news.extend(touched);
        }
        let news = std::mem::take(&mut self.news);
        self.tell(&news);
        for destination in self.answered() {
            for waiter in destination {
                let _ = waiter.send(());
            }
        }
    }

    /// Waiters of destinations that have an answer now.
    fn answered(&mut self) -> Vec<Vec<oneshot::Sender<()>>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.destinations.iter_mut().filter(|(_, destination)| !destination.waiters.is_empty());
        let answered = waiting.filter(|(address, _)| known.contains_key(address));
        answered.map(|(_, destination)| std::mem::take(&mut destination.waiters)).collect()
    }

    /// Reports what is live now in everything that uses it.
    fn tell(&self, names: &BTreeSet<Name>) {
        for name in names {
            let Some(held) = self.held.get(name) else { continue };
            if matches!(held.value, Value::Pending) || held.users.is_empty() {
                continue;
            }
            let live = held.users.iter().all(|user| {
                let live = match user {
                    User::Own => Some(&self.own.live),
                    User::Destination(address) => self.destinations.get(address).map(|d| &d.live),
                };
                live.and_then(|live| live.get(name)) == Some(&held.version)
            });
            if !live {
                continue;
            }
            let url = name.resource_type().type_url();
            if matches!(held.value, Value::Removed) {
                self.reports.removed(url, &name.to_string());
            } else {
                self.reports.applied(url, &name.to_string(), &held.version);
            }
        }
    }

    /// Brings what a user needs in line with what it needs now.
    fn need(&mut self, user: User, before: &BTreeSet<Name>, after: &BTreeSet<Name>) {
        for name in after.difference(before) {
            let subscriptions = &mut self.subscriptions;
            let held = self.held.entry(name.clone()).or_insert_with(|| {
                subscriptions.push((name.clone(), true));
                Held { users: BTreeSet::new(), version: String::new(), value: Value::Pending }
            });
            held.users.insert(user);
        }
        for name in before.difference(after) {
            let Some(held) = self.held.get_mut(name) else { continue };
            held.users.remove(&user);
            if held.users.is_empty() {
                self.held.remove(name);
                self.refused.retain(|refused| container(refused) != *name);
                self.subscriptions.push((name.clone(), false));
                self.reports.forgotten(name.resource_type().type_url(), &name.to_string());
                if let Name::TrustBundle(domain) = name {
                    self.own.trust = self.own.trust.without(domain);
                    let trust = self.own.trust.clone();
                    self.bundles.send_modify(|bundles| bundles.trust = trust);
                }
            }
        }
    }

    fn tick(&mut self) {
        let contact = match self.connected {
            Some(_) => Duration::ZERO, // PINGs are answered, or it would not be up
            None => self.last_contact.elapsed(),
        };
        self.shared.set(Gauge::LastContact, i64::try_from(contact.as_secs()).unwrap_or(i64::MAX));
        self.shared.set(Gauge::NackedResources, i64::try_from(self.refused.len()).unwrap_or(i64::MAX));
        self.shared.set(Gauge::Destinations, i64::try_from(self.destinations.len()).unwrap_or(i64::MAX));
        if self.own.warming.is_some() {
            self.join_own();
        }
        let now = Instant::now();
        let mut warming = Vec::new();
        let mut idle = Vec::new();
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        for (address, destination) in &mut self.destinations {
            destination.waiters.retain(|waiter| !waiter.is_closed());
            if destination.warming.is_some() {
                warming.push(*address);
            }
            if destination.is_held() {
                destination.held_at = now;
            }
            let used = self.start + Duration::from_millis(destination.last_used());
            let unused = now.saturating_duration_since(used.max(destination.held_at));
            // While the control plane is away nothing that serves is given up: it could not be had again.
            let serves = known.contains_key(address);
            let awaited = !destination.waiters.is_empty();
            if unused >= self.idle && !awaited && (self.connected.is_some() || !serves) {
                idle.push(*address);
            }
        }
        drop(known);
        for address in warming {
            self.join(address);
        }
        for address in idle {
            self.evict(address);
        }
        self.backends.retain(|_, built| Arc::strong_count(&built.policy) > 1);
    }

    /// Gives up the destination that was unused for longest; false if all are in use.
    fn make_room(&mut self) -> bool {
        let free =
            self.destinations.iter().filter(|(_, d)| !d.is_held() && d.waiters.iter().all(|w| w.is_closed()));
        let oldest = free.min_by_key(|(_, d)| d.last_used()).map(|(address, _)| *address);
        oldest.is_some_and(|address| {
            self.evict(address);
            true
        })
    }

    fn evict(&mut self, address: SocketAddr) {
        // First nobody can find it any more; a worker that found it just now keeps its policy, and asks
        // again for the next connection.
        self.know(address, None);
        let Some(destination) = self.destinations.remove(&address) else { return };
        debug!(%address, "destination evicted");
        if let Some(watched) = &destination.watched {
            watched.remove();
        }
        self.need(User::Destination(address), &destination.needs, &BTreeSet::new());
    }
}

impl Members {
    fn changed(&mut self, generation: &mut u64) {
        *generation += 1;
        self.generation = *generation;
        self.list = None;
    }

    fn list(&mut self) -> Arc<[Arc<Endpoint>]> {
        let members = &self.by_uid;
        Arc::clone(self.list.get_or_insert_with(|| members.values().cloned().collect()))
    }
}

impl Destination {
    /// Whether anybody but the store holds it (the store has it here and in what is known).
    fn is_held(&self) -> bool {
        self.watched.as_ref().is_some_and(|watched| Arc::strong_count(watched) > 2)
    }

    fn last_used(&self) -> u64 {
        let watched = self.watched.as_ref().map_or(0, |watched| watched.used.load(Ordering::Relaxed));
        watched.max(self.used.load(Ordering::Relaxed))
    }
}

/// The name under which a resource is subscribed: an endpoint belongs to its collection.
fn container(name: &Name) -> Name {
    match name {
        Name::Endpoint(service, _) | Name::Head(service) => Name::Collection(service.clone()),
        Name::Service(_)
        | Name::Address(_)
        | Name::Host(_)
        | Name::Route(_)
        | Name::Collection(_)
        | Name::Authorization(..)
        | Name::TrustBundle(_)
        | Name::Workload(_) => name.clone(),
    }
}

/// Backends of one route: each is subscribed.
const MAX_BACKENDS: usize = 1_000;

/// Parts of policies for the tests of the data path.
#[cfg(test)]
pub(crate) mod testing {
    use super::{join::nothing, *};

    /// A service with every setting at its default, `<namespace>/<name>:<port>`.
    pub(crate) fn service(name: &str) -> Arc<Service> {
        let service = Arc::unwrap_or_clone(nothing(&name.parse().unwrap()));
        Arc::new(Service { mtls_required: false, ..service })
    }
}

#[cfg(test)]
mod tests;
