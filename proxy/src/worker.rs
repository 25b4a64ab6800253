//! What one data worker owns: its pools, balancers, destinations and telemetry, on one thread.
//!
//! Why nothing here is shared: a request takes no lock. What must hold for the pod as a whole (retry budgets, caps) is in
//! [`pod_wide`](crate::pod_wide); policy arrives as immutable snapshots that are compared by pointer.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::sync::{broadcast, watch};
use weft_core::{
    balance::{Balancer, Lease},
    budget::Budget,
    classify::{Failure, Outcome},
    limit::Limiter,
    policy::{BackendKey, InboundPolicy, OutboundPolicy, PortPolicy, Rule},
};

use crate::{
    clock::now,
    config::Config,
    connect::Connector,
    direction::Direction,
    discovery::{Discovery, Watched},
    drain::{Drain, LocalDrain},
    limits::ConnectionLimits,
    peer::Peer,
    pod_wide::{Budgets, Caps, InUse, Limiters},
    pool::Pool,
    telemetry::{
        exchange::Exchange,
        recorder::{EndpointReport, Recorder, Series, SeriesKey, endpoint_report},
    },
    tls::{self, Material},
    wakers::Wakers,
};

/// A destination that was not used for so long is forgotten here; discovery then counts its own time.
const DESTINATION_IDLE: Duration = Duration::from_secs(60);

/// One worker.
pub(crate) struct Worker {
    pub(crate) config: Arc<Config>,
    pub(crate) discovery: Discovery,
    pub(crate) material: watch::Receiver<Option<Arc<Material>>>,
    pub(crate) connector: Connector,
    pub(crate) pool: Pool,
    pub(crate) recorder: Recorder,
    pub(crate) drain: LocalDrain,
    pub(crate) limits: Arc<ConnectionLimits>,
    pub(crate) rng: RefCell<SmallRng>,
    inbound: RefCell<Option<Arc<InboundPolicy>>>,
    /// How often the app's ports may be asked: those that are limited.
    rate_limits: RefCell<HashMap<u16, RateLimits>>,
    /// Grows with each change of `inbound`.
    policy_generation: Cell<u64>,
    /// Who waits for one.
    pub(crate) policy_changes: Wakers,
    server_config: RefCell<Option<Configured>>,
    destinations: RefCell<HashMap<SocketAddr, Rc<Destination>>>,
    backends: RefCell<HashMap<BackendKey, Rc<Backend>>>,
    budgets: Budgets,
    caps: Caps,
    limiters: Limiters,
    /// Sidecars to which some worker of this pod lost a connection.
    lost: broadcast::Sender<Peer>,
}

/// The limits of one port, with what is counted of each.
pub(crate) type RateLimits = Rc<[Arc<Limiter>]>;

/// A TLS configuration, and the certificate's generation and the policy that it was made of.
type Configured = (u64, Arc<InboundPolicy>, Arc<rustls::ServerConfig>);

/// What a worker is made of; everything in it may cross threads.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) config: Arc<Config>,
    pub(crate) discovery: Discovery,
    pub(crate) material: watch::Receiver<Option<Arc<Material>>>,
    pub(crate) drain: Drain,
    pub(crate) limits: Arc<ConnectionLimits>,
    pub(crate) budgets: Budgets,
    pub(crate) caps: Caps,
    pub(crate) limiters: Limiters,
    pub(crate) lost: broadcast::Sender<Peer>,
}

/// One destination as this worker knows it.
pub(crate) struct Destination {
    pub(crate) original: SocketAddr,
    pub(crate) watched: Arc<Watched>,
    /// Learned: here the server speaks first, so detection need not wait for the client.
    pub(crate) server_first: Cell<bool>,
    current: RefCell<Rc<Resolved>>,
    last_used: Cell<Instant>,
}

/// A destination's policy with everything that this worker needs to act on it.
pub(crate) struct Resolved {
    pub(crate) policy: Arc<OutboundPolicy>,
    /// As `policy.backends`.
    pub(crate) backends: Vec<Rc<Backend>>,
    pub(crate) budget: Arc<Budget>,
    parent: Arc<str>,
    series: RefCell<Vec<Option<Rc<Series>>>>,
}

/// A service that requests are sent to, whatever destination they were meant for.
pub(crate) struct Backend {
    pub(crate) balancer: RefCell<Balancer>,
    pub(crate) name: Arc<str>,
    pub(crate) in_use: Arc<InUse>,
    /// A request has waited in vain: the next ones fail at once, until there is an endpoint again.
    pub(crate) failfast: Cell<bool>,
    generation: Cell<Option<u64>>,
}

/// What a request speaks, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Spoken {
    Http1,
    Http2,
    Grpc,
    Tcp,
}

impl Spoken {
    const ALL: usize = 4;

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }

    pub(crate) fn of(version: http::Version, grpc: bool) -> Self {
        match version {
            _ if grpc => Self::Grpc,
            http::Version::HTTP_2 => Self::Http2,
            _ => Self::Http1,
        }
    }
}

impl Worker {
    pub(crate) fn new(parts: Parts, recorder: Recorder) -> Rc<Self> {
        let lost = parts.lost.clone();
        let connector = Connector::new(parts.config.clone(), parts.material.clone(), recorder.clone());
        let pool = Pool::new(parts.config.clone(), connector.clone(), recorder.clone(), lost.clone());
        let worker = Rc::new(Self {
            drain: LocalDrain::new(parts.drain),
            limits: parts.limits,
            config: parts.config,
            inbound: RefCell::new(parts.discovery.inbound().borrow().clone()),
            policy_generation: Cell::new(0),
            policy_changes: Wakers::default(),
            discovery: parts.discovery,
            material: parts.material,
            connector,
            pool,
            recorder,
            rng: RefCell::new(SmallRng::from_rng(&mut rand::rng())),
            server_config: RefCell::default(),
            destinations: RefCell::default(),
            backends: RefCell::default(),
            budgets: parts.budgets,
            caps: parts.caps,
            limiters: parts.limiters,
            rate_limits: RefCell::default(),
            lost,
        });
        worker.limit_rates();
        let reported = Rc::downgrade(&worker);
        worker.recorder.endpoints(move || reported.upgrade().map_or_else(Vec::new, |w| w.report_endpoints()));
        worker
    }

    /// Follows policy and the way out, and sweeps what is idle; runs as long as the worker.
    pub(crate) async fn run(self: Rc<Self>) {
        tokio::task::spawn_local(self.drain.clone().follow());
        let following = self.clone();
        tokio::task::spawn_local(async move {
            let mut inbound = following.discovery.inbound();
            loop {
                *following.inbound.borrow_mut() = inbound.borrow_and_update().clone();
                following.limit_rates();
                following.policy_generation.set(following.policy_generation.get() + 1);
                following.policy_changes.wake();
                if inbound.changed().await.is_err() {
                    return;
                }
            }
        });
        tokio::task::spawn_local(self.clone().ask_after_the_lost());
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let now = now();
            self.pool.sweep(now);
            self.destinations.borrow_mut().retain(|_, d| {
                let idle = now.saturating_duration_since(d.last_used.get()) > DESTINATION_IDLE;
                Rc::strong_count(d) > 1 || !(idle || d.watched.removed())
            });
            // Backends live as long as a destination refers to them.
            self.backends.borrow_mut().retain(|_, b| Rc::strong_count(b) > 1);
        }
    }

    /// This workload's own policy.
    pub(crate) fn inbound_policy(&self) -> Option<Arc<InboundPolicy>> {
        self.inbound.borrow().clone()
    }

    /// How often a port of the app may be asked; `None`: as often as anybody likes.
    pub(crate) fn rate_limits(&self, port: u16) -> Option<RateLimits> {
        self.rate_limits.borrow().get(&port).cloned()
    }

    /// Takes over the limits of the policy of now. What was counted under one that is the same still counts: else every
    /// change of policy would be an occasion for as many requests again.
    fn limit_rates(&self) {
        let policy = self.inbound.borrow();
        let ports = policy.iter().flat_map(|policy| &policy.ports);
        let limited = ports.filter(|(_, port)| !port.rate_limits.is_empty()).map(|(number, port)| {
            let limiters = port.rate_limits.iter().map(|limit| {
                let (object, name) = (limit.object.clone(), limit.name.clone());
                let seed = rand::Rng::random(&mut *self.rng.borrow_mut());
                let new = || Limiter::new(limit.clone(), seed, now());
                self.limiters.of((*number, object, name), |known| known.limit() == limit, new)
            });
            (*number, limiters.collect())
        });
        // The old ones live until here.
        let limited = limited.collect();
        *self.rate_limits.borrow_mut() = limited;
    }

    /// How long a connection for a request under `rule` may take.
    pub(crate) fn connect_timeout(&self, rule: &Rule) -> Duration {
        rule.timeouts.connect.unwrap_or(self.config.times.connect)
    }

    /// In `0.0..1.0`: so that what belongs together does not all happen at once.
    pub(crate) fn jitter(&self) -> f64 {
        rand::Rng::random(&mut *self.rng.borrow_mut())
    }

    /// Grows with each change of [`Self::inbound_policy`].
    pub(crate) fn policy_generation(&self) -> u64 {
        self.policy_generation.get()
    }

    /// The TLS configuration for peers, made once per certificate and policy.
    pub(crate) fn server_config(&self, policy: &Arc<InboundPolicy>) -> Option<Arc<rustls::ServerConfig>> {
        let material = self.material.borrow().clone()?;
        let mut cached = self.server_config.borrow_mut();
        if let Some((generation, of, config)) = &*cached
            && *generation == material.generation
            && Arc::ptr_eq(of, policy)
        {
            return Some(config.clone());
        }
        match tls::server_config(&material, &policy.trust_domains) {
            Ok(config) => {
                *cached = Some((material.generation, policy.clone(), config.clone()));
                Some(config)
            }
            Err(error) => {
                tracing::error!(%error, "no TLS for inbound connections");
                None
            }
        }
    }

    /// The destination behind a watched policy; kept, with what was learned of it.
    pub(crate) fn destination(&self, original: SocketAddr, watched: Arc<Watched>) -> Rc<Destination> {
        let mut destinations = self.destinations.borrow_mut();
        if let Some(known) = destinations.get(&original)
            && Arc::ptr_eq(&known.watched, &watched)
        {
            known.last_used.set(now());
            return known.clone();
        }
        let current = RefCell::new(Rc::new(self.resolve(watched.policy())));
        let destination = Rc::new(Destination {
            original,
            watched,
            server_first: Cell::new(false),
            current,
            last_used: Cell::new(now()),
        });
        destinations.insert(original, destination.clone());
        destination
    }

    /// A destination that is in use here, without asking discovery.
    pub(crate) fn known_destination(&self, original: SocketAddr) -> Option<Rc<Destination>> {
        let destinations = self.destinations.borrow();
        let known = destinations.get(&original).filter(|d| !d.watched.removed())?;
        known.last_used.set(now());
        Some(known.clone())
    }

    fn resolve(&self, policy: Arc<OutboundPolicy>) -> Resolved {
        let now = now();
        let backends = policy.backends.iter().map(|backend| {
            let mut known = self.backends.borrow_mut();
            let service = &backend.service;
            let state = known.entry(service.key()).or_insert_with(|| {
                Rc::new(Backend {
                    balancer: RefCell::new(Balancer::new(&service.load_balancing, &service.health)),
                    name: service.name.to_string().into(),
                    in_use: self.caps.of(service.key(), |_| true, InUse::default),
                    failfast: Cell::new(false),
                    generation: Cell::new(None),
                })
            });
            // What is not known says nothing about the endpoints that others use under its last good list.
            if backend.resolved && state.generation.get().is_none_or(|g| g < backend.generation) {
                state.balancer.borrow_mut().update(backend, now);
                state.generation.set(Some(backend.generation));
                state.failfast.set(false);
            }
            state.clone()
        });
        let backends: Vec<_> = backends.collect();
        let (service, params) = (policy.service.key(), policy.service.retry.budget);
        let series = (policy.routes.rules().len() + 1) * (backends.len() + 1) * Spoken::ALL;
        Resolved {
            budget: self.budgets.of(service, |budget| budget.params() == params, || Budget::new(params, now)),
            parent: policy.service.name.to_string().into(),
            backends,
            series: RefCell::new(vec![None; series]),
            policy,
        }
    }

    /// Finds out beside all requests whether an endpoint answers again.
    pub(crate) fn knock(self: &Rc<Self>, lease: Lease, peer: Option<Peer>, timeout: Duration) {
        let worker = self.clone();
        tokio::task::spawn_local(async move {
            let outcome = match peer {
                Some(peer) => worker.knocked(&peer, timeout).await,
                None => Outcome::Failure(Failure::Identity),
            };
            let exchange = Exchange::start(&worker.recorder, now());
            exchange.settled(lease.finish(outcome, now()));
            exchange.discard();
        });
    }

    /// A worker whose connection broke tells all of them, and each asks for itself: requests of every worker go elsewhere
    /// until it knows, and none has to be sent to find out.
    async fn ask_after_the_lost(self: Rc<Self>) {
        let mut lost = self.lost.subscribe();
        loop {
            match lost.recv().await {
                Ok(peer) => self.ask_after(peer),
                // Who was missed is found out by a request.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    fn ask_after(self: &Rc<Self>, peer: Peer) {
        let Peer::Mesh { address, uid, .. } = &peer else { return };
        let doubts: Vec<_> = {
            let (backends, mut rng) = (self.backends.borrow(), self.rng.borrow_mut());
            let doubt = |b: &Rc<Backend>| b.balancer.borrow().doubt(*address, uid, now(), &mut *rng);
            backends.values().filter_map(doubt).collect()
        };
        if doubts.is_empty() {
            return;
        }
        let worker = self.clone();
        tokio::task::spawn_local(async move {
            let outcome = worker.knocked(&peer, worker.config.times.connect).await;
            let exchange = Exchange::start(&worker.recorder, now());
            for doubt in doubts {
                exchange.settled(doubt.settle(outcome, now()));
            }
            exchange.discard();
        });
    }

    async fn knocked(&self, peer: &Peer, timeout: Duration) -> Outcome {
        match self.pool.knock(peer, timeout).await {
            Ok(()) => Outcome::Success,
            Err(error) if error.local => Outcome::Cancelled,
            Err(error) => Outcome::Failure(error.failure),
        }
    }

    fn report_endpoints(&self) -> Vec<EndpointReport> {
        let now = now();
        let backends = self.backends.borrow();
        let views = backends.values().flat_map(|backend| {
            let views = backend.balancer.borrow().endpoints(now);
            views.into_iter().map(|view| endpoint_report(&backend.name, view, now)).collect::<Vec<_>>()
        });
        views.collect()
    }
}

impl Destination {
    /// The current policy, resolved for this worker: one pointer comparison while nothing changes.
    pub(crate) fn resolved(&self, worker: &Worker) -> Rc<Resolved> {
        let policy = self.watched.policy();
        {
            let current = self.current.borrow();
            if Arc::ptr_eq(&current.policy, &policy) {
                return current.clone();
            }
        }
        let resolved = Rc::new(worker.resolve(policy));
        *self.current.borrow_mut() = resolved.clone();
        resolved
    }
}

impl Resolved {
    /// The series of one rule and backend; resolved once, then an index.
    pub(crate) fn series(
        &self,
        recorder: &Recorder,
        rule: Option<usize>,
        backend: Option<usize>,
        spoken: Spoken,
    ) -> Rc<Series> {
        // Row 0 is what no rule matched; the last column is what chose no backend.
        let row = rule.map_or(0, |rule| rule + 1);
        let column = backend.unwrap_or(self.backends.len());
        let index = (row * (self.backends.len() + 1) + column) * Spoken::ALL + spoken as usize;
        let mut all = self.series.borrow_mut();
        if let Some(Some(series)) = all.get(index) {
            return series.clone();
        }
        let rule = rule.and_then(|rule| self.policy.routes.rules().get(rule));
        let series = recorder.series(&SeriesKey {
            direction: Direction::Outbound,
            parent: self.parent.clone(),
            route: rule.map_or_else(|| "none".into(), |r| r.label.clone()),
            backend: backend.map_or_else(|| "".into(), |b| self.backends[b].name.clone()),
            protocol: spoken.as_str(),
        });
        if let Some(slot) = all.get_mut(index) {
            *slot = Some(series.clone());
        }
        series
    }
}

/// The policy of one of this workload's ports.
pub(crate) fn port_policy(policy: &InboundPolicy, port: u16) -> &Arc<PortPolicy> {
    policy.ports.get(&port).unwrap_or(&policy.default_port)
}
