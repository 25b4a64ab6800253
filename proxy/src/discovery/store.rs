//! What the control stream fed: every subscribed resource, and the snapshots joined from them.
//!
//! Why joining is done here and not by the sender's order: a snapshot becomes live only when the service,
//! its route and the endpoints of every backend that the route names have all arrived, in whatever order.
//! The old snapshot serves meanwhile. If something stays missing, the new one is published after 15 s with
//! what is there, its unresolved backends marked; where an old one serves, so much later that a stream which died
//! without a word is found out first.
//!
//! Why a snapshot that lost a backend waits a moment, too: when one change switches a route to another backend
//! and deletes the old one, or takes back what an earlier one deleted, nothing says in which order that arrives,
//! and in between nobody could be served. Two seconds later a backend that is not there answers so.
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
        Arc, LazyLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use serde_json::json;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tracing::{debug, info, warn};
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{
        Action, Authorization, BackendKey, BackendPolicy, Endpoint, InboundPolicy, OutboundPolicy,
        RouteTable, Service, ServiceName,
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
                let policy = convert::authz::parse(body).map_err(|e| e.to_string())?;
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

    /// Joins one destination, and publishes it if it is whole, or if it has warmed for long enough.
    fn join(&mut self, address: SocketAddr) {
        let Some(mut destination) = self.destinations.remove(&address) else { return };
        let user = User::Destination(address);
        // Each round may reveal a need that is held already; a policy is three levels deep.
        let joined = loop {
            let earlier = destination.made_of.as_ref().map(|made_of| made_of.route.clone());
            // That there was no route is no last good one: it says nothing about what this one keeps away.
            let earlier = earlier.filter(|route| matches!(route, Routes::Known(_)));
            let joined = self.gather(address, earlier.unwrap_or(Routes::Unusable));
            let fresh = joined.needs.difference(&destination.needs).next().is_some();
            if !fresh {
                break joined;
            }
            let union = destination.needs.union(&joined.needs).cloned().collect();
            self.need(user, &destination.needs, &union);
            destination.needs = union;
        };
        match joined.found {
            Found::Pending => {}
            Found::Nothing => {
                self.shrink(user, &mut destination, joined.needs);
                destination.warming = None;
                destination.absent = None;
                destination.made_of = None;
                self.know(address, Some(Answer::Unknown(Arc::clone(&destination.used))));
                if let Some(watched) = destination.watched.as_ref().filter(|watched| !watched.removed()) {
                    info!(%address, service = %watched.policy().service.name, "destination is gone");
                    watched.remove();
                }
            }
            Found::Policy { made_of, mut missing, absent } => {
                let now = Instant::now();
                let since = *destination.warming.get_or_insert(now);
                // Without a stream nothing can arrive: what serves is better than what is half there.
                let waited =
                    |since: Instant| self.connected.map_or(Duration::ZERO, |up| since.max(up).elapsed());
                let lost: BTreeSet<Name> = absent.difference(&destination.lacks).cloned().collect();
                if destination.made_of.is_none() || lost.is_empty() {
                    destination.absent = None;
                } else if destination.absent.as_ref().is_none_or(|(names, _)| *names != lost) {
                    destination.absent = Some((lost, now));
                }
                let hopes = destination.absent.as_ref().is_some_and(|(_, since)| waited(*since) < HOPE);
                let whole = missing.is_subset(&destination.lacks);
                let patience = match destination.made_of {
                    Some(_) => self.warm + self.silence,
                    None => self.warm,
                };
                if (whole && !hopes) || waited(since) >= patience {
                    if !whole {
                        warn!(%address, service = %made_of.service.name, ?missing, "published although not whole");
                    }
                    destination.warming = None;
                    destination.absent = None;
                    missing.extend(absent);
                    destination.lacks = missing;
                    self.shrink(user, &mut destination, joined.needs);
                    self.publish(address, &mut destination, made_of);
                }
            }
        }
        self.destinations.insert(address, destination);
    }

    /// Drops needs of an older version, and notes which versions are live.
    fn shrink(&mut self, user: User, destination: &mut Destination, needs: BTreeSet<Name>) {
        self.need(user, &destination.needs, &needs);
        destination.needs = needs;
        destination.live = self.versions(&destination.needs);
        // What came in an earlier turn may only now be live.
        self.news.extend(destination.needs.iter().cloned());
    }

    fn versions(&self, needs: &BTreeSet<Name>) -> BTreeMap<Name, String> {
        let held = needs.iter().filter_map(|name| Some((name, self.held.get(name)?)));
        let answered = held.filter(|(_, held)| !matches!(held.value, Value::Pending));
        answered.map(|(name, held)| (name.clone(), held.version.clone())).collect()
    }

    fn publish(&mut self, address: SocketAddr, destination: &mut Destination, made_of: MadeOf) {
        let same = destination.made_of.as_ref().is_some_and(|old| old.is(&made_of));
        let table = match &made_of.route {
            Routes::None => RouteTable::to_service(&made_of.service),
            Routes::Unusable => RouteTable::unusable(),
            Routes::Known(route) => match &route.table {
                Some(table) => table.clone(),
                None => RouteTable::to_service(&made_of.service),
            },
        };
        let policy = || {
            Arc::new(OutboundPolicy {
                service: Arc::clone(&made_of.service),
                routes: table,
                backends: made_of.backends.clone(),
            })
        };
        match &destination.watched {
            Some(watched) if same && !watched.removed() => {}
            Some(watched) => watched.publish(policy()),
            None => {
                let used = destination.used.load(Ordering::Relaxed);
                destination.watched = Some(Arc::new(Watched::new(policy(), used)));
            }
        }
        destination.made_of = Some(made_of);
        if let Some(watched) = &destination.watched {
            self.know(address, Some(Answer::Service(Arc::clone(watched))));
        }
    }

    /// What a destination needs, and what there is of it. `earlier` is the route in force: it stays until its
    /// successor is known.
    fn gather(&mut self, address: SocketAddr, earlier: Routes) -> Joined {
        let root = Name::address(address);
        let mut needs = BTreeSet::from([root.clone()]);
        let service = match self.held.get(&root).map(|held| &held.value) {
            Some(Value::Service(service)) => Arc::clone(service),
            Some(Value::Removed) => return Joined { needs, found: Found::Nothing },
            _ => return Joined { needs, found: Found::Pending },
        };
        let (mut missing, mut absent) = (BTreeSet::new(), BTreeSet::new());
        let mut route = Routes::None;
        // A pod by its own address has no routes and no balancing.
        if let Some(name) = service.route.as_ref().filter(|_| service.pod.is_none()) {
            match name.parse::<Name>() {
                Ok(name) => {
                    route = match self.held.get(&name).map(|held| &held.value) {
                        Some(Value::Route(found)) => Routes::Known(Arc::clone(found)),
                        // On its way; one that is gone will come back, or the service will name it no more. One
                        // that was refused is not waited for.
                        _ => {
                            if !self.refused.contains(&name) {
                                missing.insert(name.clone());
                            }
                            earlier
                        }
                    };
                    needs.insert(name);
                }
                Err(error) => {
                    warn!(%error, "the name of no route: refusing");
                    route = Routes::Unusable;
                }
            }
        }
        let own = [service.name.clone()];
        let names = match &route {
            Routes::Known(route) if route.table.is_some() => &route.backends[..],
            Routes::Known(_) | Routes::None | Routes::Unusable => &own,
        };
        let mut backends = Vec::with_capacity(names.len());
        for name in names {
            backends.push(self.backend(name, &service, &mut needs, &mut missing, &mut absent));
        }
        Joined {
            needs,
            found: Found::Policy { made_of: MadeOf { service, route, backends }, missing, absent },
        }
    }

    /// The newest policy of a backend.
    fn backend(
        &mut self,
        name: &ServiceName,
        parent: &Arc<Service>,
        needs: &mut BTreeSet<Name>,
        missing: &mut BTreeSet<Name>,
        absent: &mut BTreeSet<Name>,
    ) -> Arc<BackendPolicy> {
        let (service, resolved) = if *name == parent.name {
            (Arc::clone(parent), true)
        } else {
            let key = Name::Service(name.clone());
            let found = match self.held.get(&key).map(|held| &held.value) {
                Some(Value::Service(service)) if service.name == *name => (Arc::clone(service), true),
                Some(Value::Removed | Value::Service(_)) => {
                    absent.insert(key.clone());
                    (nothing(name), false)
                }
                _ => {
                    if !self.refused.contains(&key) {
                        missing.insert(key.clone());
                    }
                    (nothing(name), false)
                }
            };
            needs.insert(key);
            found
        };
        let mut endpoints: Arc<[Arc<Endpoint>]> = Arc::default();
        let mut version = 0;
        if let Some(pod) = &service.pod {
            endpoints = Arc::new([Arc::clone(pod)]);
        } else if let Some(collection) = &service.endpoints {
            match collection.parse::<Name>() {
                Ok(key @ Name::Collection(_)) => {
                    match self.held.get_mut(&key).map(|held| &mut held.value) {
                        Some(Value::Endpoints(members)) => {
                            if !members.complete {
                                missing.insert(key.clone());
                            }
                            endpoints = members.list();
                            version = members.generation;
                        }
                        Some(Value::Removed) => drop(absent.insert(key.clone())),
                        _ => drop(missing.insert(key.clone())),
                    }
                    needs.insert(key);
                }
                Ok(_) | Err(_) => warn!(%collection, "not the name of a collection"),
            }
        }
        let key = service.key();
        if let Some(built) = self.backends.get(&key) {
            let policy = &built.policy;
            let same = Arc::ptr_eq(&policy.service, &service) || policy.service == service;
            if same && policy.resolved == resolved && built.endpoints == version {
                return Arc::clone(policy);
            }
        }
        self.generation += 1;
        let policy = Arc::new(BackendPolicy { service, endpoints, generation: self.generation, resolved });
        self.backends.insert(key, Built { policy: Arc::clone(&policy), endpoints: version });
        policy
    }

    /// Joins this workload's own policy. A port whose authorization was refused, or does not come, denies.
    fn join_own(&mut self) {
        let root = Name::Workload(self.uid.clone());
        let mut needs = BTreeSet::from([root.clone(), Name::TrustBundle(self.trust_domain.clone())]);
        let workload = match self.held.get(&root).map(|held| &held.value) {
            Some(Value::Workload(workload)) => Some(Arc::clone(workload)),
            _ => None,
        };
        if let Some(workload) = &workload {
            needs.extend(workload.trust_domains.iter().cloned().map(Name::TrustBundle));
            needs.extend(workload.authorizations().iter().filter_map(|name| name.parse::<Name>().ok()));
        }
        let before = std::mem::replace(&mut self.own.needs, needs.clone());
        self.need(User::Own, &before, &needs);
        // A bundle is live as soon as it is taken.
        for name in needs.iter().filter(|name| matches!(name, Name::TrustBundle(_))) {
            if let Some(held) = self.held.get(name).filter(|held| !matches!(held.value, Value::Pending)) {
                self.own.live.insert(name.clone(), held.version.clone());
            }
        }
        let Some(workload) = workload else { return };

        let since = *self.own.warming.get_or_insert_with(Instant::now);
        let waited = self.connected.map_or(Duration::ZERO, |up| since.max(up).elapsed());
        let patient = waited < self.warm;
        let joined = workload.join(|text| {
            let name: Name = text.parse().ok()?;
            match self.held.get(&name).map(|held| &held.value) {
                Some(Value::Authorization(policy)) => Some(Arc::clone(policy)),
                Some(Value::Pending) | None if patient && !self.refused.contains(&name) => None,
                _ => {
                    warn!(policy = text, "no usable authorization: the port denies");
                    Some(Arc::clone(&DENY))
                }
            }
        });
        let Some(policy) = joined else { return };
        self.own.warming = None;
        self.own.live = self.versions(&needs);
        self.news.extend(needs);
        let mut made_of = vec![Arc::as_ptr(&workload).addr()];
        let ports = policy.ports.values().chain([&policy.default_port]);
        made_of.extend(ports.map(|port| Arc::as_ptr(&port.authorization).addr()));
        // What the published policy was made of is alive in it: an address is not taken twice.
        let changed = self.own.made_of.as_ref().is_none_or(|(_, old)| *old != made_of);
        self.own.made_of = Some((Arc::clone(&workload), made_of));
        if changed {
            debug!(ports = policy.ports.len(), "own policy published");
            self.inbound.send_replace(Some(Arc::new(policy)));
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

    fn dump(&self) -> serde_json::Value {
        let resources: Vec<_> = self
            .held
            .iter()
            .map(|(name, held)| {
                let state = match &held.value {
                    Value::Pending => "pending".to_owned(),
                    Value::Removed => "removed".to_owned(),
                    Value::Endpoints(members) => format!("{} endpoints", members.by_uid.len()),
                    Value::Service(_)
                    | Value::Route(_)
                    | Value::Authorization(_)
                    | Value::Workload(_)
                    | Value::Trust => "held".to_owned(),
                };
                json!({ "name": name.to_string(), "version": held.version, "state": state,
                    "users": held.users.len(), "refused": self.refused.contains(name) })
            })
            .collect();
        let destinations: Vec<_> = self
            .destinations
            .iter()
            .map(|(address, destination)| {
                let policy = destination.watched.as_ref().map(|watched| watched.policy());
                json!({ "address": address.to_string(),
                    "service": policy.as_ref().map(|policy| policy.service.name.to_string()),
                    "rules": policy.as_ref().map(|policy| policy.routes.rules().len()),
                    "backends": policy.as_ref().map(|policy| policy.backends.iter().map(|backend| json!({
                        "service": backend.service.name.to_string(),
                        "endpoints": backend.endpoints.len(),
                        "generation": backend.generation,
                        "resolved": backend.resolved,
                    })).collect::<Vec<_>>()),
                    "warming": destination.warming.is_some(), "in_use": destination.is_held() })
            })
            .collect();
        let inbound = self.inbound.borrow();
        let ports = inbound.as_ref().map(|policy| {
            let port = |number: u16, port: &weft_core::policy::PortPolicy| {
                json!({ "port": number, "protocol": format!("{:?}", port.protocol),
                    "mtls": format!("{:?}", port.mtls), "rules": port.authorization.rules.len(),
                    "default": format!("{:?}", port.authorization.default),
                    "generation": port.authorization.generation })
            };
            let named = policy.ports.iter().map(|(number, policy)| port(*number, policy));
            named.chain([port(0, &policy.default_port)]).collect::<Vec<_>>()
        });
        let ranges = self.egress.borrow();
        json!({
            "connected": self.connected.is_some(),
            "resources": resources,
            "destinations": destinations,
            "inbound": ports,
            "mesh_ranges": ranges.as_ref().map(|ranges| {
                ranges.mesh.iter().take(1_000).map(ToString::to_string).collect::<Vec<_>>()
            }),
            "egress": ranges.as_ref().map(|ranges| format!("{:?}", ranges.egress)),
        })
    }
}

/// What came of looking at all that a destination needs.
struct Joined {
    needs: BTreeSet<Name>,
    found: Found,
}

enum Found {
    /// Not answered yet.
    Pending,
    /// The control plane said no.
    Nothing,
    /// A policy, what of it has not been answered yet, and what is said not to be there.
    Policy { made_of: MadeOf, missing: BTreeSet<Name>, absent: BTreeSet<Name> },
}

impl MadeOf {
    fn is(&self, other: &Self) -> bool {
        let route = match (&self.route, &other.route) {
            (Routes::Known(a), Routes::Known(b)) => Arc::ptr_eq(a, b),
            (Routes::None, Routes::None) | (Routes::Unusable, Routes::Unusable) => true,
            (Routes::Known(_) | Routes::None | Routes::Unusable, _) => false,
        };
        route
            && Arc::ptr_eq(&self.service, &other.service)
            && self.backends.len() == other.backends.len()
            && self.backends.iter().zip(&other.backends).all(|(a, b)| Arc::ptr_eq(a, b))
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

/// A service that does not exist: its share of requests is answered with 500.
fn nothing(name: &ServiceName) -> Arc<Service> {
    Arc::new(Service { mtls_required: true, ..Service::new(name.clone()) })
}

/// What holds where no authorization can be used.
static DENY: LazyLock<Arc<Authorization>> =
    LazyLock::new(|| Arc::new(Authorization { default: Action::Deny, rules: Vec::new(), generation: 0 }));
/// How long the snapshot before it serves instead of one that lost something: what takes its place may be on
/// its way.
const HOPE: Duration = Duration::from_secs(2);
/// Backends of one route: each is subscribed.
const MAX_BACKENDS: usize = 1_000;

/// Parts of policies for the tests of the data path.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A service with every setting at its default, `<namespace>/<name>:<port>`.
    pub(crate) fn service(name: &str) -> Arc<Service> {
        let service = Arc::unwrap_or_clone(nothing(&name.parse().unwrap()));
        Arc::new(Service { mtls_required: false, ..service })
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};
    use weft_core::policy::{Egress, MtlsMode};
    use weft_proto::{
        Any,
        pb::{ads::Resource, v1 as pb},
    };

    use super::*;
    use crate::discovery::{DiscoveryError, Target};

    const POD: &str = "uid-web-1";

    /// A store with its discovery, and a controller's side written by hand.
    struct World {
        store: Store,
        discovery: Discovery,
        asked: mpsc::UnboundedReceiver<Ask>,
        trust: watch::Receiver<Bundles>,
        reports: Reports,
        shared: Arc<Shared>,
        nonce: u64,
        version: u64,
    }

    impl World {
        fn new(settings: &[(&str, &str)]) -> Self {
            let config = Config::for_tests(settings);
            let (bundles, trust) = watch::channel(Bundles::default());
            let (shared, reports) = (Arc::new(Shared::default()), Reports::new());
            let (store, discovery, asked) =
                Store::new(&config, Arc::clone(&shared), reports.clone(), bundles);
            Self { store, discovery, asked, trust, reports, shared, nonce: 0, version: 0 }
        }

        /// Connected and configured, with `10.0.0.0/8` as the mesh.
        fn ready() -> Self {
            let mut world = Self::new(&[]);
            world.connect();
            world.configure(pb::workload_config::Egress::Allow);
            world.send(&[("authz/uid-web-1/0", authz(pb::authorization::Action::Allow))], &[]);
            world
        }

        fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
            self.store.connected();
            self.requests()
        }

        fn requests(&mut self) -> Vec<DeltaDiscoveryRequest> {
            std::iter::from_fn(|| self.store.next_request()).collect()
        }

        /// Names subscribed and unsubscribed since the last look.
        fn wanted(&mut self) -> (BTreeSet<String>, BTreeSet<String>) {
            let requests = self.requests();
            let names = |pick: fn(&DeltaDiscoveryRequest) -> &Vec<String>| {
                requests.iter().flat_map(|request| pick(request).clone()).collect()
            };
            (names(|r| &r.resource_names_subscribe), names(|r| &r.resource_names_unsubscribe))
        }

        fn configure(&mut self, egress: pb::workload_config::Egress) {
            let config = pb::WorkloadConfig {
                identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
                default_port: Some(pb::InboundPort {
                    mtls: pb::inbound_port::MtlsMode::Permissive.into(),
                    authz: format!("authz/{POD}/0"),
                    ..Default::default()
                }),
                mesh_ranges: vec!["10.0.0.0/8".into()],
                egress: egress.into(),
                trust_domains: vec!["cluster.local".into()],
                ..Default::default()
            };
            self.send(&[(&format!("self/{POD}"), Body::new("WorkloadConfig", &config))], &[]);
        }

        /// Sends resources and removals; gives the names that were refused.
        fn send(&mut self, resources: &[(&str, Body)], removed: &[&str]) -> Vec<String> {
            self.requests();
            let first = resources.first().map(|(name, _)| *name).or(removed.first().copied());
            let ty = first.and_then(|name| name.parse::<Name>().ok()).map(|name| name.resource_type());
            self.nonce += 1;
            self.version += 1;
            self.store.receive(DeltaDiscoveryResponse {
                type_url: ty.unwrap().type_url().into(),
                nonce: self.nonce.to_string(),
                resources: resources
                    .iter()
                    .map(|(name, body)| Resource {
                        version: self.version.to_string(),
                        name: (*name).into(),
                        resource: Some(Any { type_url: body.0.into(), value: body.1.clone() }),
                        ..Default::default()
                    })
                    .collect(),
                removed_resources: removed.iter().map(|name| (*name).into()).collect(),
                ..Default::default()
            });
            self.reports.refused().into_iter().map(|(_, name, ..)| name.to_string()).collect()
        }

        /// Sends a whole collection.
        fn send_all(&mut self, of: &str, endpoints: &[(&str, [u8; 4])]) {
            let head = |begin, complete| {
                Body::of(
                    weft_proto::ads::COLLECTION_HEAD_TYPE_URL,
                    &pb::CollectionHead { epoch: "e".into(), seq: 1, begin, complete, ..Default::default() },
                )
            };
            let head_name = format!("ep/{of}/$head");
            self.send(&[(&head_name, head(true, false))], &[]);
            for (uid, address) in endpoints {
                self.send(&[(&format!("ep/{of}/{uid}"), endpoint(uid, *address))], &[]);
            }
            self.send(&[(&head_name, head(false, true))], &[]);
        }

        /// Asks as a worker would, with the store answering.
        async fn resolve(&mut self, address: &str) -> Result<Target, DiscoveryError> {
            let discovery = self.discovery.clone();
            let address = address.parse().unwrap();
            let resolve = discovery.resolve(address);
            tokio::pin!(resolve);
            loop {
                tokio::select! {
                    biased;
                    result = &mut resolve => return result,
                    ask = self.asked.recv() => self.store.ask(ask.unwrap()),
                }
            }
        }

        /// Asks without waiting for an answer.
        async fn ask(&mut self, address: &str) {
            let discovery = self.discovery.clone();
            let address: SocketAddr = address.parse().unwrap();
            tokio::spawn(async move { discovery.resolve(address).await });
            let ask = self.asked.recv().await.unwrap();
            self.store.ask(ask);
        }

        async fn service(&mut self, address: &str) -> Arc<Watched> {
            match self.resolve(address).await {
                Ok(Target::Service(watched)) => watched,
                other => panic!("{address}: {other:?}"),
            }
        }

        /// What a destination was made of last.
        fn state_of(&self, address: &str) -> Arc<BackendPolicy> {
            let destination = &self.store.state.destinations[&address.parse::<SocketAddr>().unwrap()];
            Arc::clone(&destination.made_of.as_ref().unwrap().backends[0])
        }

        fn live(&self) -> BTreeSet<String> {
            self.reports.live().into_iter().map(|(_, name, _)| name.to_string()).collect()
        }
    }

    #[derive(Clone)]
    struct Body(&'static str, Bytes);

    impl Body {
        fn new(kind: &'static str, message: &impl prost::Message) -> Self {
            let ty = ResourceType::ALL.into_iter().find(|ty| ty.as_str() == kind).unwrap();
            Self::of(ty.type_url(), message)
        }

        fn of(url: &'static str, message: &impl prost::Message) -> Self {
            Self(url, message.encode_to_vec().into())
        }

        fn nonsense(kind: &'static str) -> Self {
            let ty = ResourceType::ALL.into_iter().find(|ty| ty.as_str() == kind).unwrap();
            Self(ty.type_url(), Bytes::from_static(&[0xff; 9]))
        }
    }

    fn authz(default: pb::authorization::Action) -> Body {
        Body::new("Authorization", &pb::Authorization { default: default.into(), ..Default::default() })
    }

    fn service(name: &str, route: bool) -> Body {
        let own = format!("shop/{name}:80");
        Body::new(
            "Service",
            &pb::Service {
                namespace: "shop".into(),
                name: name.into(),
                port: 80,
                route: if route { format!("route/{own}") } else { String::new() },
                endpoints: format!("ep/{own}/*"),
                ..Default::default()
            },
        )
    }

    fn endpoint(uid: &str, address: [u8; 4]) -> Body {
        Body::new(
            "Endpoint",
            &pb::Endpoint {
                address: Bytes::copy_from_slice(&address),
                port: 8_080,
                tunnel: pb::endpoint::Tunnel::None.into(),
                uid: uid.into(),
                ..Default::default()
            },
        )
    }

    fn route(backends: &[&str]) -> Body {
        let backend = |name: &&str| pb::route::Backend {
            service: format!("svc/shop/{name}:80"),
            weight: 1,
            filters: Vec::new(),
        };
        let rule = pb::route::Rule {
            backends: backends.iter().map(backend).collect(),
            name: "0".into(),
            object: Some(pb::ObjectRef {
                kind: "HTTPRoute".into(),
                namespace: "shop".into(),
                name: "r".into(),
            }),
            ..Default::default()
        };
        Body::new("Route", &pb::Route { rules: vec![rule], requires: Vec::new() })
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn endpoints(policy: &OutboundPolicy, backend: usize) -> Vec<String> {
        policy.backends[backend].endpoints.iter().map(|endpoint| endpoint.uid.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn it_begins_with_itself_and_its_own_trust() {
        let mut world = World::new(&[]);
        world.store.connected();
        assert_eq!(world.wanted().0, set(&["self/uid-web-1", "trust/cluster.local"]));
        assert_eq!(world.resolve("10.0.0.1:80").await.unwrap_err(), DiscoveryError::NotReady);
        world.configure(pb::workload_config::Egress::Allow);
        assert_eq!(world.wanted().0, set(&["authz/uid-web-1/0"]));
        // The ranges hold at once; the inbound policy waits for its authorization.
        assert!(matches!(world.resolve("192.0.2.1:443").await, Ok(Target::Outside)));
        assert!(world.discovery.inbound().borrow().is_none());
        world.send(&[("authz/uid-web-1/0", authz(pb::authorization::Action::Allow))], &[]);
        let policy = world.discovery.inbound().borrow().clone().unwrap();
        assert_eq!(policy.default_port.authorization.default, Action::Allow);
        assert_eq!(policy.default_port.mtls, MtlsMode::Permissive);
        assert_eq!(policy.egress, Egress::Allow);
        assert!(world.live().is_superset(&set(&["self/uid-web-1", "authz/uid-web-1/0"])));
    }

    #[tokio::test(start_paused = true)]
    async fn outside_the_ranges_nobody_is_asked() {
        let mut world = World::ready();
        world.store.disconnected();
        for i in 0..1_000 {
            let address = format!("192.0.{}.{}:443", i / 256, i % 256);
            assert!(matches!(world.resolve(&address).await, Ok(Target::Outside)));
        }
        assert!(world.asked.try_recv().is_err());
        world.connect();
        world.configure(pb::workload_config::Egress::Deny);
        assert!(matches!(world.resolve("[2001:db8::1]:443").await, Ok(Target::Denied)));
        assert!(matches!(world.resolve("[::ffff:192.0.2.1]:443").await, Ok(Target::Denied)));
    }

    #[tokio::test(start_paused = true)]
    async fn inside_the_ranges_silence_is_an_error_and_no_is_an_answer() {
        let mut world = World::ready();
        let before = Instant::now();
        assert_eq!(world.resolve("10.0.0.9:80").await.unwrap_err(), DiscoveryError::Timeout);
        assert_eq!(before.elapsed(), Duration::from_secs(2));
        assert_eq!(world.shared.counter(Counter::DiscoveryTimeouts), 1);
        assert_eq!(world.wanted().0, set(&["ip/10.0.0.9:80"]));
        world.send(&[], &["ip/10.0.0.9:80"]);
        assert!(matches!(world.resolve("10.0.0.9:80").await, Ok(Target::Outside)));
        // It stays an answer, without asking again, while the control plane is away.
        world.store.disconnected();
        advance(Duration::from_secs(3_600)).await;
        world.store.tick();
        assert!(matches!(world.resolve("10.0.0.9:80").await, Ok(Target::Outside)));
        assert!(world.asked.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_snapshot_is_live_only_when_whole() {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.wanted();
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        assert_eq!(world.wanted().0, set(&["route/shop/api:80", "ep/shop/api:80/*"]));
        world.send(&[("route/shop/api:80", route(&["v1", "v2", "api"]))], &[]);
        assert_eq!(world.wanted().0, set(&["svc/shop/v1:80", "svc/shop/v2:80"]));
        world.send(&[("svc/shop/v1:80", service("v1", false))], &["svc/shop/v2:80"]);
        assert_eq!(world.wanted().0, set(&["ep/shop/v1:80/*"]));
        world.send_all("shop/v1:80", &[("uid-1", [10, 1, 0, 1])]);
        assert_eq!(world.live().iter().filter(|name| name.contains("shop")).count(), 0);
        world.send_all("shop/api:80", &[("uid-2", [10, 1, 0, 2]), ("uid-3", [10, 1, 0, 3])]);

        let watched = world.service("10.0.0.1:80").await;
        let policy = watched.policy();
        assert_eq!(policy.routes.rules().len(), 1);
        let names: Vec<_> =
            policy.backends.iter().map(|b| (b.service.name.to_string(), b.resolved)).collect();
        let expected = [("shop/v1:80", true), ("shop/v2:80", false), ("shop/api:80", true)];
        assert_eq!(names, expected.map(|(name, resolved)| (name.to_owned(), resolved)));
        assert_eq!(endpoints(&policy, 0), ["uid-1"]);
        assert_eq!(endpoints(&policy, 1), [""; 0]);
        assert_eq!(endpoints(&policy, 2), ["uid-2", "uid-3"]);
        let live = world.live();
        for name in
            ["ip/10.0.0.1:80", "route/shop/api:80", "svc/shop/v1:80", "ep/shop/v1:80/*", "ep/shop/api:80/*"]
        {
            assert!(live.contains(name), "{name} in {live:?}");
        }
    }

    /// `10.0.0.1:80` is `shop/api:80` with one endpoint and no route.
    async fn with_api() -> (World, Arc<Watched>) {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
        world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
        let watched = world.service("10.0.0.1:80").await;
        (world, watched)
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_that_moves_on_from_a_deleted_backend_always_has_one() {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        world.send(&[("route/shop/api:80", route(&["old"]))], &[]);
        world.send_all("shop/api:80", &[]);
        world.send(&[("svc/shop/old:80", service("old", false))], &[]);
        world.send_all("shop/old:80", &[("uid-1", [10, 1, 0, 1])]);
        let watched = world.service("10.0.0.1:80").await;
        let serves = |uid: &str| {
            let policy = watched.policy();
            assert!(policy.backends[0].resolved);
            assert_eq!(endpoints(&policy, 0), [uid]);
        };
        // One change of the mesh; its removals arrive first, and the rest of it a little later.
        world.send(&[], &["ep/shop/old:80/*"]);
        serves("uid-1");
        world.send(&[], &["svc/shop/old:80"]);
        serves("uid-1");
        advance(Duration::from_millis(1_500)).await;
        world.store.tick();
        world.send(&[("route/shop/api:80", route(&["new"]))], &[]);
        // However long the new one takes.
        advance(Duration::from_secs(5)).await;
        world.store.tick();
        serves("uid-1");
        world.send(&[("svc/shop/new:80", service("new", false))], &[]);
        world.send_all("shop/new:80", &[("uid-2", [10, 1, 0, 2])]);
        serves("uid-2");
        assert!(!world.live().iter().any(|name| name.contains("old")), "{:?}", world.live());
    }

    #[tokio::test(start_paused = true)]
    async fn a_backend_that_is_gone_for_good_answers_so_a_moment_later() {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        world.send(&[("route/shop/api:80", route(&["old"]))], &[]);
        world.send_all("shop/api:80", &[]);
        world.send(&[("svc/shop/old:80", service("old", false))], &[]);
        world.send_all("shop/old:80", &[("uid-1", [10, 1, 0, 1])]);
        let watched = world.service("10.0.0.1:80").await;
        let resolved = || watched.policy().backends[0].resolved;
        world.send(&[], &["svc/shop/old:80"]);
        world.send(&[], &["ep/shop/old:80/*"]);
        // While there is no stream nothing can come in its place.
        world.store.disconnected();
        advance(HOPE * 2).await;
        world.store.tick();
        assert!(resolved());
        world.connect();
        advance(HOPE).await;
        world.store.tick();
        assert!(!resolved());
        // It comes back with other members, none of the old.
        world.send(&[("svc/shop/old:80", service("old", false))], &[]);
        world.send_all("shop/old:80", &[("uid-2", [10, 1, 0, 2])]);
        assert!(resolved());
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-2"]);
        // And the same within the moment.
        world.send(&[], &["ep/shop/old:80/*"]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-2"]);
        world.send_all("shop/old:80", &[("uid-3", [10, 1, 0, 3])]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-3"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_back_to_a_backend_that_was_deleted_waits_for_it_to_come_back() {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        world.send(&[("route/shop/api:80", route(&["a", "b"]))], &[]);
        world.send_all("shop/api:80", &[]);
        world.send(&[("svc/shop/a:80", service("a", false))], &["svc/shop/b:80"]);
        world.send_all("shop/a:80", &[("uid-1", [10, 1, 0, 1])]);
        let watched = world.service("10.0.0.1:80").await;
        let resolved =
            || watched.policy().backends.iter().map(|backend| backend.resolved).collect::<Vec<_>>();
        // Where nothing served before, what is not there is an answer at once, and changes are not held up by it.
        assert_eq!(resolved(), [true, false]);
        world.send(&[("ep/shop/a:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-1", "uid-2"]);
        world.send(&[("route/shop/api:80", route(&["a"]))], &[]);
        assert_eq!(resolved(), [true]);
        world.wanted();
        world.send(&[("route/shop/api:80", route(&["b"]))], &[]);
        assert_eq!(world.wanted().0, set(&["svc/shop/b:80"]));
        world.send(&[], &["svc/shop/b:80"]);
        assert_eq!((resolved(), endpoints(&watched.policy(), 0).len()), (vec![true], 2), "the one before");
        world.send(&[("svc/shop/b:80", service("b", false))], &[]);
        world.send_all("shop/b:80", &[("uid-9", [10, 1, 0, 9])]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-9"]);
    }

    #[tokio::test(start_paused = true)]
    async fn generations_grow_with_real_changes_only() {
        let (mut world, watched) = with_api().await;
        let (first, version) = (watched.policy(), watched.version());
        world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
        world.send(&[("ep/shop/api:80/uid-1", endpoint("uid-1", [10, 1, 0, 1]))], &[]);
        assert!(Arc::ptr_eq(&first, &watched.policy()));
        assert_eq!(watched.version(), version);

        world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
        let second = watched.policy();
        assert_eq!(endpoints(&second, 0), ["uid-1", "uid-2"]);
        assert!(second.backends[0].generation > first.backends[0].generation);
        // What stays is the same: a balancer sees by pointer.
        assert!(Arc::ptr_eq(&first.backends[0].endpoints[0], &second.backends[0].endpoints[0]));
        watched.changed_since(version).await;

        world.send(&[], &["ep/shop/api:80/uid-1"]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_old_snapshot_serves_until_the_new_one_is_whole() {
        let (mut world, watched) = with_api().await;
        let old = watched.policy();
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        assert!(Arc::ptr_eq(&old, &watched.policy()));
        world.send(&[("route/shop/api:80", route(&["v2"]))], &[]);
        world.send(&[("svc/shop/v2:80", service("v2", false))], &[]);
        assert!(Arc::ptr_eq(&old, &watched.policy()));
        world.send_all("shop/v2:80", &[("uid-9", [10, 1, 0, 9])]);
        let new = watched.policy();
        assert_eq!(new.backends.len(), 1);
        assert_eq!(endpoints(&new, 0), ["uid-9"]);
        // What only the old one needed is given up.
        assert_eq!(world.wanted().1, set(&["ep/shop/api:80/*"]));
    }

    #[tokio::test(start_paused = true)]
    async fn after_warming_long_enough_it_is_published_with_what_is_there() {
        let (mut world, watched) = with_api().await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        world.send(&[("route/shop/api:80", route(&["api", "v2"]))], &[]);
        // Away from the control plane nothing warms.
        world.store.disconnected();
        advance(Duration::from_secs(60)).await;
        world.store.tick();
        assert_eq!(watched.policy().backends.len(), 1);
        world.connect();
        // 15 s, and the time in which a dead stream is found out.
        advance(Duration::from_secs(29)).await;
        world.store.tick();
        assert_eq!(watched.policy().backends.len(), 1);
        advance(Duration::from_secs(1)).await;
        world.store.tick();
        let policy = watched.policy();
        assert_eq!(policy.backends.iter().map(|b| b.resolved).collect::<Vec<_>>(), [true, false]);
        // What is still missing is not waited for again.
        world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-1", "uid-2"]);
        // And made whole when the rest comes.
        world.send(&[("svc/shop/v2:80", service("v2", false))], &[]);
        world.send_all("shop/v2:80", &[("uid-9", [10, 1, 0, 9])]);
        assert_eq!(endpoints(&watched.policy(), 1), ["uid-9"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_that_is_refused_or_does_not_come_denies_where_nothing_was_in_force() {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
        assert_eq!(world.send(&[("route/shop/api:80", Body::nonsense("Route"))], &[]), ["route/shop/api:80"]);
        // At once: nobody waits for what was refused.
        let watched = world.service("10.0.0.1:80").await;
        assert!(!watched.policy().routes.is_usable() && watched.policy().routes.rules().is_empty());
        // The next version may be better.
        world.send(&[("route/shop/api:80", route(&["api"]))], &[]);
        assert!(watched.policy().routes.is_usable());
        assert_eq!(watched.policy().routes.rules().len(), 1);

        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &["route/shop/api:80"]);
        world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
        advance(Duration::from_secs(31)).await;
        world.store.tick();
        assert!(!world.service("10.0.0.1:80").await.policy().routes.is_usable());
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_route_that_is_refused_or_does_not_come_denies_although_all_passed_before() {
        for refused in [true, false] {
            let (mut world, watched) = with_api().await;
            assert!(watched.policy().routes.is_usable());
            world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
            if refused {
                world.send(&[("route/shop/api:80", Body::nonsense("Route"))], &[]);
            } else {
                assert!(watched.policy().routes.is_usable(), "it may be on its way");
                advance(Duration::from_secs(31)).await;
                world.store.tick();
            }
            assert!(!watched.policy().routes.is_usable());
            // The next version may be better, and the service may name none again.
            world.send(&[("route/shop/api:80", route(&["api"]))], &[]);
            assert_eq!(watched.policy().routes.rules().len(), 1);
            world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
            assert!(watched.policy().routes.is_usable());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_that_is_refused_or_gone_leaves_the_one_before_it_in_force() {
        let mut world = World::ready();
        world.ask("10.0.0.1:80").await;
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        world.send(&[("route/shop/api:80", route(&["api"]))], &[]);
        world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
        let watched = world.service("10.0.0.1:80").await;
        let before = watched.policy().routes.rules()[0].clone();
        world.send(&[("route/shop/api:80", Body::nonsense("Route"))], &[]);
        assert!(Arc::ptr_eq(&before, &watched.policy().routes.rules()[0]));
        world.send(&[], &["route/shop/api:80"]);
        advance(Duration::from_secs(31)).await;
        world.store.tick();
        world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-1", "uid-2"]);
        assert!(Arc::ptr_eq(&before, &watched.policy().routes.rules()[0]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_resource_changes_nothing_and_is_reported() {
        let (mut world, watched) = with_api().await;
        let old = watched.policy();
        let refused = world.send(&[("ip/10.0.0.1:80", Body::nonsense("Service"))], &[]);
        assert_eq!(refused, ["ip/10.0.0.1:80"]);
        assert!(world.requests().iter().any(|request| request.error_detail.is_some()));
        assert!(Arc::ptr_eq(&old, &watched.policy()));
        world.store.tick();
        assert_eq!(world.shared.level(Gauge::NackedResources), 1);
        let refused = world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
        assert!(refused.is_empty());
        world.store.tick();
        assert_eq!(world.shared.level(Gauge::NackedResources), 0);
        // An endpoint that says it is another.
        let refused = world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-3", [10, 1, 0, 3]))], &[]);
        assert_eq!(refused, ["ep/shop/api:80/uid-2"]);
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_destination_that_goes_and_comes_back() {
        let (mut world, watched) = with_api().await;
        world.send(&[], &["ip/10.0.0.1:80"]);
        assert!(watched.removed());
        assert!(matches!(world.resolve("10.0.0.1:80").await, Ok(Target::Outside)));
        assert_eq!(endpoints(&watched.policy(), 0), ["uid-1"]);
        world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
        world.send_all("shop/api:80", &[("uid-5", [10, 1, 0, 5])]);
        assert!(!watched.removed());
        let again = world.service("10.0.0.1:80").await;
        assert_eq!(endpoints(&again.policy(), 0), ["uid-5"]);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_destinations_are_given_up_but_never_while_disconnected() {
        let (mut world, watched) = with_api().await;
        world.wanted();
        let idle = Duration::from_secs(601);
        // Held.
        advance(idle).await;
        world.store.tick();
        assert!(world.wanted().1.is_empty());
        // Dropped, and the control plane is away.
        drop(watched);
        world.store.disconnected();
        advance(idle).await;
        world.store.tick();
        assert_eq!(endpoints(&world.service("10.0.0.1:80").await.policy(), 0), ["uid-1"]);
        // Back again: the time counts from the last use.
        world.connect();
        advance(Duration::from_secs(599)).await;
        world.store.tick();
        assert!(world.wanted().1.is_empty());
        advance(Duration::from_secs(2)).await;
        world.store.tick();
        assert_eq!(world.wanted().1, set(&["ip/10.0.0.1:80", "ep/shop/api:80/*"]));
        assert!(!world.live().contains("ip/10.0.0.1:80"));
    }

    #[tokio::test(start_paused = true)]
    async fn waiters_and_destinations_are_bounded() {
        let mut world = World::new(&[("WEFT_DISCOVERY_WAITERS", "3"), ("WEFT_MAX_DESTINATIONS", "2")]);
        world.connect();
        world.configure(pb::workload_config::Egress::Allow);
        for port in 1..=3 {
            let discovery = world.discovery.clone();
            tokio::spawn(async move { discovery.resolve(([10, 0, 0, 1], port).into()).await });
        }
        tokio::task::yield_now().await;
        let one_more =
            timeout(Duration::from_secs(1), world.discovery.resolve(([10, 0, 0, 1], 4).into())).await;
        assert_eq!(one_more.unwrap().unwrap_err(), DiscoveryError::Overloaded);
        assert_eq!(world.shared.level(Gauge::DiscoveryWaiters), 3);
        // Two destinations with waiters leave no room for a third.
        for _ in 0..3 {
            let ask = world.asked.recv().await.unwrap();
            world.store.ask(ask);
        }
        assert_eq!(world.store.state.destinations.len(), 2);
        advance(Duration::from_secs(3)).await;
        tokio::task::yield_now().await;
        assert_eq!(world.shared.level(Gauge::DiscoveryWaiters), 0);
        // Without waiters the oldest gives way.
        world.ask("10.0.0.1:9").await;
        assert_eq!(world.store.state.destinations.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_by_its_own_address() {
        let mut world = World::ready();
        world.ask("10.1.0.1:8080").await;
        let pod = pb::Service {
            namespace: "shop".into(),
            name: "api-1".into(),
            port: 8_080,
            pod: Some(pb::Endpoint {
                address: Bytes::from_static(&[10, 1, 0, 1]),
                port: 8_080,
                uid: "uid-1".into(),
                tunnel: pb::endpoint::Tunnel::Weft.into(),
                service_account: "api".into(),
                trust_domain: "cluster.local".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert!(world.send(&[("ip/10.1.0.1:8080", Body::new("Service", &pod))], &[]).is_empty());
        let policy = world.service("10.1.0.1:8080").await.policy();
        assert_eq!(endpoints(&policy, 0), ["uid-1"]);
        assert_eq!(policy.routes.rules().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_named_as_a_service_is_another_backend() {
        let (mut world, watched) = with_api().await;
        let before = watched.policy();
        world.ask("10.1.0.5:80").await;
        let pod = pb::Service {
            namespace: "shop".into(),
            name: "api".into(),
            port: 80,
            pod: Some(pb::Endpoint {
                address: Bytes::from_static(&[10, 1, 0, 5]),
                port: 80,
                uid: "uid-5".into(),
                tunnel: pb::endpoint::Tunnel::Weft.into(),
                service_account: "api".into(),
                trust_domain: "cluster.local".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        world.send(&[("ip/10.1.0.5:80", Body::new("Service", &pod))], &[]);
        let pod = world.service("10.1.0.5:80").await.policy();
        assert_ne!(pod.backends[0].service.key(), before.backends[0].service.key());
        // Told again, neither has changed; before, each made the other look changed, in turns.
        world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
        let again = world.state_of("10.0.0.1:80");
        assert!(
            Arc::ptr_eq(&again, &before.backends[0]),
            "{} {}",
            again.generation,
            before.backends[0].generation
        );
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_usable_authorization_a_port_denies() {
        let mut world = World::new(&[]);
        world.connect();
        world.configure(pb::workload_config::Egress::Allow);
        world.send(&[("authz/uid-web-1/0", Body::nonsense("Authorization"))], &[]);
        let policy = || world.discovery.inbound().borrow().clone().unwrap();
        assert_eq!(policy().default_port.authorization.default, Action::Deny);
        // An earlier one stays, whatever comes later.
        let mut world = World::ready();
        world.send(&[("authz/uid-web-1/0", Body::nonsense("Authorization"))], &[]);
        world.send(&[], &["authz/uid-web-1/0"]);
        world.send(&[], &["self/uid-web-1"]);
        let policy = world.discovery.inbound().borrow().clone().unwrap();
        assert_eq!(policy.default_port.authorization.default, Action::Allow);
    }

    #[tokio::test(start_paused = true)]
    async fn an_authorization_that_never_comes_denies_after_warming() {
        let mut world = World::new(&[]);
        world.connect();
        world.configure(pb::workload_config::Egress::Allow);
        assert!(world.discovery.inbound().borrow().is_none());
        advance(Duration::from_secs(15)).await;
        world.store.tick();
        let policy = world.discovery.inbound().borrow().clone().unwrap();
        assert_eq!(policy.default_port.authorization.default, Action::Deny);
        world.send(&[("authz/uid-web-1/0", authz(pb::authorization::Action::Allow))], &[]);
        let policy = world.discovery.inbound().borrow().clone().unwrap();
        assert_eq!(policy.default_port.authorization.default, Action::Allow);
    }

    #[tokio::test(start_paused = true)]
    async fn a_configuration_for_somebody_else_is_refused() {
        let mut world = World::new(&[]);
        world.connect();
        let other = pb::WorkloadConfig {
            identity: "spiffe://cluster.local/ns/shop/sa/other".into(),
            default_port: Some(pb::InboundPort {
                mtls: pb::inbound_port::MtlsMode::Strict.into(),
                authz: "authz/uid-web-1/0".into(),
                ..Default::default()
            }),
            egress: pb::workload_config::Egress::Allow.into(),
            ..Default::default()
        };
        let refused = world.send(&[("self/uid-web-1", Body::new("WorkloadConfig", &other))], &[]);
        assert_eq!(refused, ["self/uid-web-1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn trust_arrives_with_its_sequence_and_bad_trust_does_not() {
        let authority = crate::tls::testing::Authority::new("cluster.local");
        let mut world = World::ready();
        let bundle = |roots: Vec<Bytes>, sequence| {
            let bundle = pb::TrustBundle { roots_der: roots, sequence, ..Default::default() };
            Body::new("TrustBundle", &bundle)
        };
        let root = Bytes::copy_from_slice(&authority.root);
        world.send(&[("trust/cluster.local", bundle(vec![root], 3))], &[]);
        let now = world.trust.borrow().clone();
        assert_eq!((now.sequence, now.trust.roots("cluster.local")), (Some(3), 1));
        assert!(world.live().contains("trust/cluster.local"));
        // Not a certificate: webpki refuses what the conversion cannot judge.
        let refused =
            world.send(&[("trust/cluster.local", bundle(vec![Bytes::from_static(b"0\0")], 4))], &[]);
        assert_eq!(refused, ["trust/cluster.local"]);
        world.send(&[], &["trust/cluster.local"]);
        let now = world.trust.borrow().clone();
        assert_eq!((now.sequence, now.trust.roots("cluster.local")), (Some(3), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reconnect_asks_for_all_and_loses_nothing() {
        let (mut world, watched) = with_api().await;
        let old = watched.policy();
        world.store.disconnected();
        assert!(world.store.next_request().is_none());
        let names: BTreeSet<String> =
            world.connect().into_iter().flat_map(|request| request.resource_names_subscribe).collect();
        assert!(names.is_superset(&set(&["self/uid-web-1", "ip/10.0.0.1:80", "ep/shop/api:80/*"])));
        assert!(Arc::ptr_eq(&old, &watched.policy()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_dump_describes_what_is_held() {
        let (mut world, _watched) = with_api().await;
        let discovery = world.discovery.clone();
        let dump = tokio::spawn(async move { discovery.dump().await });
        let ask = world.asked.recv().await.unwrap();
        world.store.ask(ask);
        let dump = dump.await.unwrap();
        assert_eq!(dump["connected"], true);
        assert_eq!(dump["destinations"][0]["service"], "shop/api:80");
        assert_eq!(dump["destinations"][0]["in_use"], true);
        assert_eq!(dump["egress"], "Allow");
    }
}
