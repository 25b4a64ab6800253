//! Which endpoint takes the next request.
//!
//! Why power of two choices: two random endpoints and the cheaper of them comes close to the best of
//! all, costs the same for 3 and 10,000 endpoints, and does not send every caller to the same "best"
//! one. What makes it good is the cost, one number for everything that is known:
//!
//! `cost = latency × (1 + in-flight ÷ weight) × (1 + 100 × failing²)`
//!
//! - *latency* is a peak-EWMA, or the age of the oldest request that still waits for its first byte if
//!   that is more: a stalled endpoint is known to be slow before it answers;
//! - *weight* also draws the two candidates, so that it holds at low load, where nothing is in flight;
//! - *failing* is the recent share of failures. A failure also counts as an answer that took at least
//!   twice the usual time: an endpoint that fails fast must not look fast;
//! - an endpoint that joins later is drawn seldom at first (warm-up) and starts from the others' usual
//!   latency.
//!
//! Latency and failing fade together when nothing is measured, so every endpoint is tried again.
//! Ejection takes an endpoint out altogether: never more than the cap, never the last one. When it ends,
//! one request at a time probes.
//!
//! A balancer belongs to one worker: cells and `Rc`, no lock. A request holds a [`Lease`]; dropping it
//! says that the caller left, whatever else happened.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use rand_core::RngCore;

use crate::{
    classify::Outcome,
    eject::{Reason, State, Tracker},
    ewma::Ewma,
    identity::PodUid,
    policy::{Algorithm, BackendPolicy, Endpoint, EndpointHealth, HealthPolicy, LoadBalancing},
    random,
};

/// The endpoints of one backend, and what this worker knows about them.
#[derive(Debug)]
pub struct Balancer {
    shared: Rc<Shared>,
    /// All endpoints, in the policy's order.
    slots: Vec<Rc<Slot>>,
    /// Those that take new requests.
    ready: Vec<Rc<Slot>>,
    /// Running sums of the weights of `ready`; empty when all are equal.
    weights: Vec<u64>,
    /// Removed by the policy, with requests still on them.
    leaving: Vec<Rc<Slot>>,
    current: Option<(u64, Arc<[Arc<Endpoint>]>)>,
    /// Until when some endpoint of `ready` is drawn seldom.
    warming: Option<Instant>,
    cursor: usize,
}

/// Why there is no endpoint for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickError {
    /// The backend has no endpoints.
    #[error("no endpoints")]
    NoEndpoints,
    /// It has, but all of them are draining, not ready or have weight 0.
    #[error("no endpoint is ready")]
    NoneReady,
}

/// One request's hold on one endpoint. Dropping it says that the caller left.
#[derive(Debug)]
pub struct Lease {
    shared: Rc<Shared>,
    slot: Rc<Slot>,
    endpoint: Arc<Endpoint>,
    started: Instant,
    ticket: u64,
    first_byte: Option<Duration>,
    probe: bool,
    /// Drawn when picked, so that finishing needs no random source.
    draw: f64,
    finished: bool,
}

/// An outcome ejected an endpoint: for the log and a counter.
#[derive(Clone, Debug)]
pub struct Ejection {
    /// Which.
    pub endpoint: Arc<Endpoint>,
    /// Why.
    pub reason: Reason,
    /// Until when.
    pub until: Instant,
}

/// What an endpoint's place in the rotation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// In rotation.
    Healthy,
    /// Ejected.
    Ejected {
        /// When probing may begin.
        until: Instant,
    },
    /// One request at a time.
    Probing,
    /// Takes no new requests: draining, removed, or weight 0.
    Draining,
    /// Takes no new requests: the control plane says that it is not ready.
    NotReady,
}

/// One endpoint, for explanations.
#[derive(Clone, Debug)]
pub struct EndpointView {
    /// Which.
    pub endpoint: Arc<Endpoint>,
    /// What another request there is believed to cost.
    pub cost: Duration,
    /// Requests on it now.
    pub in_flight: u32,
    /// Its place in the rotation.
    pub state: Health,
    /// Why it was ejected last.
    pub reason: Option<Reason>,
    /// Requests so far.
    pub requests: u64,
}

/// What leases need of their balancer.
#[derive(Debug)]
struct Shared {
    lb: RefCell<LoadBalancing>,
    health: RefCell<HealthPolicy>,
    /// The usual latency of a success, over all endpoints, in seconds.
    usual: Cell<Option<f64>>,
    /// How many endpoints are ready, and how many of them are not in normal rotation.
    ready: Cell<usize>,
    out: Cell<usize>,
}

#[derive(Debug)]
struct Slot {
    endpoint: RefCell<Arc<Endpoint>>,
    in_flight: Cell<u32>,
    requests: Cell<u64>,
    /// Weight, and whether the slot stands in [`Balancer::ready`].
    weight: Cell<f64>,
    is_ready: Cell<bool>,
    removed: Cell<bool>,
    warm_from: Cell<Option<Instant>>,
    /// Smooth weighted round robin's credit.
    credit: Cell<f64>,
    seen: RefCell<Seen>,
}

#[derive(Debug)]
struct Seen {
    latency: Ewma,
    failing: Failing,
    tracker: Tracker,
    waiting: Waiting,
}

/// The recent share of failures; fades as the latency does.
#[derive(Clone, Copy, Debug)]
struct Failing {
    share: f64,
    at: Instant,
}

/// Starts of the requests that wait for their first byte, oldest first; constant time on average.
#[derive(Debug, Default)]
struct Waiting {
    first: u64,
    starts: VecDeque<Option<Instant>>,
}

impl Balancer {
    /// Without endpoints yet: [`Balancer::update`] brings them.
    pub fn new(lb: &LoadBalancing, health: &HealthPolicy) -> Self {
        let shared = Shared {
            lb: RefCell::new(lb.clone()),
            health: RefCell::new(health.clone()),
            usual: Cell::new(None),
            ready: Cell::new(0),
            out: Cell::new(0),
        };
        Self {
            shared: Rc::new(shared),
            slots: Vec::new(),
            ready: Vec::new(),
            weights: Vec::new(),
            leaving: Vec::new(),
            current: None,
            warming: None,
            cursor: 0,
        }
    }

    /// Takes the backend's endpoints and settings; free when nothing changed. An endpoint that stays (same
    /// pod, same address) keeps what is known about it; one that joins later warms up; one that
    /// left takes no new requests.
    pub fn update(&mut self, backend: &BackendPolicy, now: Instant) {
        if let Some((generation, endpoints)) = &self.current
            && *generation == backend.generation
            && Arc::ptr_eq(endpoints, &backend.endpoints)
        {
            return;
        }
        let is_first = self.current.is_none();
        self.current = Some((backend.generation, backend.endpoints.clone()));
        self.take_settings(backend);

        let key = |e: &Endpoint| (e.address, e.uid.clone());
        let old = std::mem::take(&mut self.slots);
        let mut known: HashMap<(SocketAddr, PodUid), Rc<Slot>> = HashMap::with_capacity(old.len());
        for slot in &old {
            slot.removed.set(true);
            let name = key(&slot.endpoint.borrow());
            known.insert(name, slot.clone());
        }
        for endpoint in backend.endpoints.iter() {
            let slot = match known.remove(&key(endpoint)) {
                Some(slot) => slot,
                None => Rc::new(self.shared.new_slot(endpoint, now)),
            };
            slot.removed.set(false);
            *slot.endpoint.borrow_mut() = endpoint.clone();
            let was_ready = slot.is_ready.replace(is_ready(endpoint));
            if !was_ready && !is_first {
                slot.warm_from.set(Some(now));
            }
            slot.weight.set(f64::from(endpoint.weight));
            self.slots.push(slot);
        }
        self.leaving.extend(old.into_iter().filter(|slot| slot.removed.get()));
        self.leaving.retain(|slot| {
            slot.is_ready.set(false);
            slot.in_flight.get() > 0
        });
        self.ready = self.slots.iter().filter(|slot| slot.is_ready.get()).cloned().collect();
        self.draw_by_weight();
        self.plan_warm_up(now);
        self.bound_ejections(now);
    }

    /// Chooses an endpoint. Those in `tried` are left out while another one is in rotation.
    ///
    /// # Errors
    /// No endpoint takes new requests.
    pub fn pick(
        &mut self,
        tried: &[SocketAddr],
        now: Instant,
        rng: &mut dyn RngCore,
    ) -> Result<Lease, PickError> {
        let slot = match &self.ready[..] {
            [] if self.slots.is_empty() => return Err(PickError::NoEndpoints),
            [] => return Err(PickError::NoneReady),
            [only] => only.clone(),
            _ => self.choose(tried, now, rng),
        };
        Ok(self.shared.lease(slot, now, random::unit(rng)))
    }

    /// What is known about every endpoint, those that left but still have requests included.
    pub fn endpoints(&self, now: Instant) -> Vec<EndpointView> {
        let leaving = self.leaving.iter().filter(|slot| slot.in_flight.get() > 0);
        self.slots.iter().chain(leaving).map(|slot| slot.view(now)).collect()
    }

    /// How many endpoints take new requests.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    fn choose(&mut self, tried: &[SocketAddr], now: Instant, rng: &mut dyn RngCore) -> Rc<Slot> {
        let algorithm = self.shared.lb.borrow().algorithm;
        let chosen = match algorithm {
            Algorithm::PeakEwma => self.two_choices(tried, now, rng, |slot| slot.cost(now)),
            Algorithm::LeastRequest => self.two_choices(tried, now, rng, Slot::load),
            Algorithm::RoundRobin => self.round_robin(tried, now),
            Algorithm::Random => self.draw(tried, now, rng).map(|at| self.ready[at].clone()),
        };
        chosen.or_else(|| self.least_bad(tried, now, algorithm)).unwrap_or_else(|| self.ready[0].clone())
    }

    fn two_choices(
        &self,
        tried: &[SocketAddr],
        now: Instant,
        rng: &mut dyn RngCore,
        cost: impl Fn(&Slot) -> f64,
    ) -> Option<Rc<Slot>> {
        let one = self.draw(tried, now, rng)?;
        let mut other = self.draw(tried, now, rng)?;
        if one == other && self.weights.is_empty() && !self.is_warming(now) {
            // Two different ones, unless weights ask that the heavy one may stand on both sides.
            other = self.draw_but(one, tried, now, rng);
        }
        let (one, other) = (&self.ready[one], &self.ready[other]);
        if tried.is_empty() {
            // A probe is due: costs remember the failures, so it would never win. First attempts only.
            if let Some(probe) = [one, other].into_iter().find(|slot| slot.seen.borrow().tracker.is_out()) {
                return Some(probe.clone());
            }
        }
        Some(if cost(other) < cost(one) { other.clone() } else { one.clone() })
    }

    /// One endpoint by weight that takes requests and was not tried; `None` after a few misses.
    fn draw(&self, tried: &[SocketAddr], now: Instant, rng: &mut dyn RngCore) -> Option<usize> {
        let warming = self.is_warming(now);
        for _ in 0..DRAWS {
            let at = match self.weights.last() {
                None => random::index(rng, self.ready.len()),
                Some(&total) => {
                    let point = random::below(rng, total);
                    self.weights.partition_point(|&sum| sum <= point)
                }
            };
            let slot = &self.ready[at];
            let is_cold = warming && random::unit(rng) > slot.warmth(now);
            if !is_cold && slot.takes(tried, now) {
                return Some(at);
            }
        }
        None
    }

    fn draw_but(&self, not: usize, tried: &[SocketAddr], now: Instant, rng: &mut dyn RngCore) -> usize {
        for _ in 0..DRAWS {
            // Uniform over all but `not`.
            let at = random::index(rng, self.ready.len() - 1);
            let at = if at >= not { at + 1 } else { at };
            if self.ready[at].takes(tried, now) {
                return at;
            }
        }
        not
    }

    /// Smooth weighted round robin: of weights 5, 1, 1 the heavy one is not chosen five times in a row.
    fn round_robin(&mut self, tried: &[SocketAddr], now: Instant) -> Option<Rc<Slot>> {
        if self.weights.is_empty() && !self.is_warming(now) {
            for _ in 0..self.ready.len() {
                self.cursor = (self.cursor + 1) % self.ready.len();
                if self.ready[self.cursor].takes(tried, now) {
                    return Some(self.ready[self.cursor].clone());
                }
            }
            return None;
        }
        let mut total = 0.0;
        let mut best: Option<&Rc<Slot>> = None;
        for slot in self.ready.iter().filter(|slot| slot.takes(tried, now)) {
            let weight = slot.weight.get() * slot.warmth(now);
            total += weight;
            slot.credit.set(slot.credit.get() + weight);
            if best.is_none_or(|best| slot.credit.get() > best.credit.get()) {
                best = Some(slot);
            }
        }
        let best = best?;
        best.credit.set(best.credit.get() - total);
        Some(best.clone())
    }

    /// When drawing finds none: the cheapest that takes requests and was not tried, else the cheapest that
    /// takes requests, else the cheapest of all (everything is ejected: better than an error).
    fn least_bad(&self, tried: &[SocketAddr], now: Instant, algorithm: Algorithm) -> Option<Rc<Slot>> {
        let rank = |slot: &Slot| {
            let available = slot.seen.borrow().tracker.available(now);
            let cost = match algorithm {
                Algorithm::PeakEwma => slot.cost(now),
                Algorithm::LeastRequest | Algorithm::RoundRobin | Algorithm::Random => slot.load(),
            };
            (!available, slot.is_tried(tried), cost)
        };
        let cheaper = |a: &(bool, bool, f64), b: &(bool, bool, f64)| {
            (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2)).is_lt()
        };
        let mut best = self.ready.first()?;
        let mut least = rank(best);
        for slot in &self.ready[1..] {
            let rank = rank(slot);
            if cheaper(&rank, &least) {
                (best, least) = (slot, rank);
            }
        }
        Some(best.clone())
    }

    fn take_settings(&mut self, backend: &BackendPolicy) {
        let lb = &backend.service.load_balancing;
        if *self.shared.lb.borrow() != *lb {
            *self.shared.lb.borrow_mut() = lb.clone();
            for slot in &self.slots {
                slot.seen.borrow_mut().latency.set_decay(lb.ewma_decay);
            }
        }
        if *self.shared.health.borrow() != backend.service.health {
            *self.shared.health.borrow_mut() = backend.service.health.clone();
        }
    }

    fn draw_by_weight(&mut self) {
        let mut total = 0;
        let sums = self.ready.iter().map(|slot| {
            total += u64::from(slot.endpoint.borrow().weight);
            total
        });
        self.weights = sums.collect();
        let first = self.ready.first().map(|slot| slot.weight.get());
        if self.ready.iter().all(|slot| Some(slot.weight.get()) == first) {
            self.weights.clear();
        }
        // Weights are relative: the average endpoint has 1.
        let average = total as f64 / self.ready.len().max(1) as f64;
        for slot in &self.ready {
            slot.weight.set(slot.weight.get() / average);
        }
        self.cursor = 0;
    }

    /// Warm-up shifts load to those that are warm, so it needs at least as many of them.
    fn plan_warm_up(&mut self, now: Instant) {
        let cold: Vec<_> = self.ready.iter().filter(|slot| slot.warmth(now) < 1.0).collect();
        if cold.len() * 2 > self.ready.len() {
            for slot in &cold {
                slot.warm_from.set(None);
            }
            self.warming = None;
            return;
        }
        self.warming = cold.iter().filter_map(|slot| slot.warm_from.get()).max().map(|from| from + WARM_UP);
    }

    /// Fewer endpoints than before: the cap, and "never the last one", hold for those that are left.
    fn bound_ejections(&mut self, now: Instant) {
        self.shared.ready.set(self.ready.len());
        let mut out: Vec<_> = self.ready.iter().filter(|slot| slot.seen.borrow().tracker.is_out()).collect();
        let most = self.shared.most_out();
        if out.len() > most {
            // Those that come back soonest come back now.
            out.sort_by_key(|slot| match slot.seen.borrow().tracker.state(now) {
                State::Ejected { until } => until,
                State::Healthy | State::Probing => now,
            });
            for slot in out.drain(..out.len() - most) {
                slot.seen.borrow_mut().tracker.restore(now);
            }
        }
        self.shared.out.set(out.len());
    }

    fn is_warming(&self, now: Instant) -> bool {
        self.warming.is_some_and(|until| now < until)
    }
}

impl Lease {
    /// Where the request goes.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// When it was taken.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The response began: the latency sample.
    pub fn first_byte(&mut self, now: Instant) {
        if self.first_byte.is_some() {
            return;
        }
        let took = now.saturating_duration_since(self.started);
        self.first_byte = Some(took);
        let mut seen = self.slot.seen.borrow_mut();
        seen.waiting.done(self.ticket);
        seen.latency.observe(took, now);
        if self.probe {
            seen.tracker.probe_answered(now);
        }
    }

    /// The request ended. `Some` when this ejected the endpoint.
    pub fn finish(mut self, outcome: Outcome, now: Instant) -> Option<Ejection> {
        self.finished = true;
        let took = self.first_byte.unwrap_or_else(|| now.saturating_duration_since(self.started));
        let (shared, slot) = (self.shared.clone(), self.slot.clone());
        let mut seen = slot.seen.borrow_mut();
        let seen = &mut *seen;
        slot.release();
        seen.waiting.done(self.ticket);
        let decay = seen.latency.decay();
        let policy = shared.health.borrow();
        match outcome {
            Outcome::Success | Outcome::ClientError => {
                if self.first_byte.is_none() {
                    seen.latency.observe(took, now);
                }
                shared.learn(took);
                seen.failing.learn(0.0, decay, now);
                if !seen.tracker.is_out() {
                    seen.tracker.success(&policy, now);
                } else if self.probe {
                    shared.restore(&slot, &mut seen.tracker, now);
                }
                None
            }
            Outcome::Cancelled => {
                if self.first_byte.is_none() {
                    // The caller had waited so long already: that much is known.
                    seen.latency.at_least(took, now);
                }
                if self.probe {
                    seen.tracker.probe_dropped();
                }
                None
            }
            Outcome::Failure(_) => {
                seen.latency.at_least(took.max(shared.slow()), now);
                seen.failing.learn(1.0, decay, now);
                let reason = if !seen.tracker.is_out() {
                    let reason = seen.tracker.failure(&policy, now)?;
                    if !slot.is_ready.get() || shared.out.get() >= shared.most_out() {
                        return None;
                    }
                    shared.out.set(shared.out.get() + 1);
                    reason
                } else if self.probe {
                    Reason::ProbeFailed
                } else {
                    return None; // sent before the ejection
                };
                let until = seen.tracker.eject(&policy, reason, now, self.draw);
                Some(Ejection { endpoint: self.endpoint.clone(), reason, until })
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.slot.release();
        let mut seen = self.slot.seen.borrow_mut();
        seen.waiting.done(self.ticket);
        if self.probe {
            seen.tracker.probe_dropped();
        }
    }
}

impl Shared {
    fn new_slot(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Slot {
        let lb = self.lb.borrow();
        // Whoever joins is believed to be as fast as the others; the first ones get the given guess.
        let initial = self.usual.get().map_or(lb.ewma_initial, Duration::from_secs_f64);
        let seen = Seen {
            latency: Ewma::new(lb.ewma_decay, initial, now),
            failing: Failing { share: 0.0, at: now },
            tracker: Tracker::new(now),
            waiting: Waiting::default(),
        };
        Slot {
            endpoint: RefCell::new(endpoint.clone()),
            in_flight: Cell::new(0),
            requests: Cell::new(0),
            weight: Cell::new(f64::from(endpoint.weight)),
            is_ready: Cell::new(false),
            removed: Cell::new(false),
            warm_from: Cell::new(None),
            credit: Cell::new(0.0),
            seen: RefCell::new(seen),
        }
    }

    fn lease(self: &Rc<Self>, slot: Rc<Slot>, now: Instant, draw: f64) -> Lease {
        slot.in_flight.set(slot.in_flight.get() + 1);
        slot.requests.set(slot.requests.get() + 1);
        let mut seen = slot.seen.borrow_mut();
        if seen.tracker.probe_settled(now) {
            self.restore(&slot, &mut seen.tracker, now);
        }
        let probe = seen.tracker.state(now) == State::Probing && seen.tracker.available(now);
        if probe {
            seen.tracker.probe_started(now);
        }
        let ticket = seen.waiting.join(now);
        drop(seen);
        let endpoint = slot.endpoint.borrow().clone();
        Lease {
            shared: self.clone(),
            slot,
            endpoint,
            started: now,
            ticket,
            first_byte: None,
            probe,
            draw,
            finished: false,
        }
    }

    fn restore(&self, slot: &Slot, tracker: &mut Tracker, now: Instant) {
        tracker.restore(now);
        if slot.is_ready.get() {
            self.out.set(self.out.get().saturating_sub(1));
        }
    }

    /// How many endpoints may be out of rotation: the cap, and never the last one.
    fn most_out(&self) -> usize {
        let ready = self.ready.get();
        let share = usize::from(self.health.borrow().max_ejection_percent.min(100));
        (ready * share / 100).min(ready.saturating_sub(1))
    }

    /// What a failure counts as at least: twice the usual latency.
    fn slow(&self) -> Duration {
        match self.usual.get() {
            Some(usual) => Duration::from_secs_f64(usual * 2.0),
            None => self.lb.borrow().ewma_initial,
        }
    }

    fn learn(&self, took: Duration) {
        let took = took.as_secs_f64();
        self.usual.set(Some(self.usual.get().map_or(took, |usual| usual + (took - usual) * LEARN)));
    }
}

impl Slot {
    fn takes(&self, tried: &[SocketAddr], now: Instant) -> bool {
        !self.is_tried(tried) && {
            let seen = self.seen.borrow();
            seen.tracker.available(now) || seen.tracker.probe_settled(now)
        }
    }

    fn is_tried(&self, tried: &[SocketAddr]) -> bool {
        !tried.is_empty() && tried.contains(&self.endpoint.borrow().address)
    }

    /// How much of its weight an endpoint gets that joined a moment ago.
    fn warmth(&self, now: Instant) -> f64 {
        let Some(from) = self.warm_from.get() else {
            return 1.0;
        };
        let age = now.saturating_duration_since(from).as_secs_f64();
        (age / WARM_UP.as_secs_f64()).clamp(COLDEST, 1.0)
    }

    /// Requests in flight, one more, by weight.
    fn load(&self) -> f64 {
        1.0 + f64::from(self.in_flight.get()) / self.weight.get().max(f64::MIN_POSITIVE)
    }

    fn cost(&self, now: Instant) -> f64 {
        let seen = self.seen.borrow();
        let keep = seen.latency.keep(now);
        let waited = seen.waiting.oldest().map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        let failing = seen.failing.now(seen.latency.decay(), now);
        let latency = (seen.latency.seconds() * keep).max(waited).max(SHORTEST_LATENCY);
        latency * self.load() * (1.0 + FAILING_COSTS * failing * failing)
    }

    fn release(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    fn view(&self, now: Instant) -> EndpointView {
        let endpoint = self.endpoint.borrow().clone();
        let tracker = &self.seen.borrow().tracker;
        let state = match (self.is_ready.get(), endpoint.health, tracker.state(now)) {
            (false, EndpointHealth::Unhealthy, _) if !self.removed.get() => Health::NotReady,
            (false, _, _) => Health::Draining,
            (true, _, State::Healthy) => Health::Healthy,
            (true, _, State::Ejected { until }) => Health::Ejected { until },
            (true, _, State::Probing) => Health::Probing,
        };
        EndpointView {
            cost: Duration::try_from_secs_f64(self.cost(now)).unwrap_or(Duration::MAX),
            in_flight: self.in_flight.get(),
            state,
            reason: tracker.reason(),
            requests: self.requests.get(),
            endpoint,
        }
    }
}

impl Failing {
    fn now(&self, decay: Duration, now: Instant) -> f64 {
        if self.share == 0.0 {
            return 0.0; // nearly always: no exponential needed
        }
        let idle = now.saturating_duration_since(self.at).as_secs_f64();
        self.share * (-idle / decay.as_secs_f64().max(f64::MIN_POSITIVE)).exp()
    }

    /// Takes one outcome: 1 failed, 0 did not.
    fn learn(&mut self, failed: f64, decay: Duration, now: Instant) {
        let share = self.now(decay, now);
        let share = share + (failed - share) * FAILING_LEARNS;
        *self = Self { share: if share < FORGOTTEN { 0.0 } else { share }, at: self.at.max(now) };
    }
}

impl Waiting {
    fn join(&mut self, now: Instant) -> u64 {
        self.starts.push_back(Some(now));
        self.first + self.starts.len() as u64 - 1
    }

    fn done(&mut self, ticket: u64) {
        let Some(at) = ticket.checked_sub(self.first) else {
            return;
        };
        if let Some(start) = self.starts.get_mut(at as usize) {
            *start = None;
        }
        while let Some(None) = self.starts.front() {
            self.starts.pop_front();
            self.first += 1;
        }
    }

    fn oldest(&self) -> Option<Instant> {
        self.starts.front().copied().flatten()
    }
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.health == EndpointHealth::Healthy && endpoint.weight > 0
}

/// How often a draw may miss before everything is looked at: at the default cap of half the endpoints
/// ejected, one pick in 4,096 looks.
const DRAWS: u32 = 12;
/// How long an endpoint that joined later warms up.
const WARM_UP: Duration = Duration::from_secs(10);
/// Its share at the beginning.
const COLDEST: f64 = 0.1;
/// Weight of one sample in the usual latency.
const LEARN: f64 = 1.0 / 32.0;
/// What an endpoint that always fails costs, in times of one that never does: 5 % of failures cost a
/// quarter more, a third of them twelve times as much.
const FAILING_COSTS: f64 = 100.0;
/// Weight of one outcome in the recent share of failures: five in a row make 41 %.
const FAILING_LEARNS: f64 = 0.1;
/// A share of failures that makes no difference.
const FORGOTTEN: f64 = 0.001;
/// Below this, differences of latency are noise: the clock and the scheduler.
const SHORTEST_LATENCY: f64 = 50e-6;
