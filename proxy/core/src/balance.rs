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
//! Two bad endpoints may meet: with three bad ones of ten, one pair in fifteen, far too much traffic. So
//! when the cheaper one is still much dearer than what is usually chosen, more are drawn.
//!
//! Latency and failing fade together when nothing is measured, so every endpoint is tried again.
//! Ejection takes an endpoint out altogether: never more than the cap, never the last one. When it ends,
//! one request at a time probes.
//!
//! Endpoints that are about to go serve while there are no others: every pod of a service may be at its end at once,
//! and what still answers is better than an error (KEP-1669).
//!
//! Where the service asks for it, a calling pod stays with one endpoint: the first, in an order that is the pod's own,
//! that takes requests. Nothing has to be remembered for it, so that it outlives the sidecar, and an endpoint that
//! comes or goes moves only its own callers.
//!
//! A balancer belongs to one worker: cells and `Rc`, no lock. A request holds a [`Lease`]; dropping it
//! says that the caller left, whatever else happened.

mod lease;
mod slot;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use rand_core::RngCore;

pub use self::{
    lease::{Doubt, Ejection, Lease},
    slot::{EndpointView, Health},
};
use self::{
    lease::{LEARN, Shared},
    slot::{Slot, WARM_UP},
};
use crate::{
    eject::{Reason, State},
    identity::PodUid,
    random,
    service::{Algorithm, BackendPolicy, Endpoint, EndpointHealth, HealthPolicy, LoadBalancing},
};

/// The endpoints of one backend, and what this worker knows about them.
#[derive(Debug)]
pub struct Balancer {
    shared: Rc<Shared>,
    /// All endpoints, in the policy's order.
    slots: Vec<Rc<Slot>>,
    /// Those that take new requests; where callers stay with one endpoint, this caller's first.
    ready: Vec<Rc<Slot>>,
    sticky: bool,
    /// Running sums of the weights of `ready`; empty when all are equal.
    weights: Vec<u64>,
    /// Removed by the policy, with requests still on them.
    leaving: Vec<Rc<Slot>>,
    current: Option<(u64, Arc<[Arc<Endpoint>]>)>,
    /// Until when some endpoint of `ready` is drawn seldom.
    warming: Option<Instant>,
    cursor: usize,
    /// What the chosen ones cost, on average.
    usual_cost: Cell<f64>,
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
            sticky: false,
            weights: Vec::new(),
            leaving: Vec::new(),
            current: None,
            warming: None,
            cursor: 0,
            usual_cost: Cell::new(f64::INFINITY),
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
        let none_ready = !backend.endpoints.iter().any(|endpoint| is_ready(endpoint));
        for endpoint in backend.endpoints.iter() {
            let slot = match known.remove(&key(endpoint)) {
                Some(slot) => slot,
                None => Rc::new(self.shared.new_slot(endpoint, now)),
            };
            slot.removed.set(false);
            *slot.endpoint.borrow_mut() = endpoint.clone();
            let was_ready =
                slot.is_ready.replace(is_ready(endpoint) || (none_ready && still_serves(endpoint)));
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
        self.sticky = backend.service.load_balancing.by_client;
        if self.sticky {
            self.ready.sort_by_cached_key(|slot| turn(backend.client, &slot.endpoint.borrow().uid));
        }
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

    /// A connection to this pod broke off. `None` if it is none of the endpoints, or one that is being asked already.
    pub fn doubt(
        &self,
        address: SocketAddr,
        uid: &PodUid,
        now: Instant,
        rng: &mut dyn RngCore,
    ) -> Option<Doubt> {
        let slot = self.ready.iter().find(|slot| {
            let endpoint = slot.endpoint.borrow();
            endpoint.address == address && endpoint.uid == *uid
        })?;
        let mut seen = slot.seen.borrow_mut();
        let known = seen.tracker.is_out() && seen.tracker.reason() == Some(Reason::NoConnection);
        if known || seen.tracker.is_doubted() {
            return None;
        }
        seen.tracker.doubt(true);
        let endpoint = slot.endpoint.borrow().clone();
        Some(Doubt {
            shared: self.shared.clone(),
            slot: slot.clone(),
            endpoint,
            since: now,
            draw: random::unit(rng),
        })
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
        if self.sticky
            && let Some(own) = self.ready.iter().find(|slot| slot.takes(tried, now))
        {
            return own.clone();
        }
        let algorithm = self.shared.lb.borrow().algorithm;
        let chosen = match algorithm {
            Algorithm::PeakEwma => self.two_choices(tried, now, rng, |slot| slot.cost(now)),
            Algorithm::LeastRequest => self.two_choices(tried, now, rng, Slot::load),
            Algorithm::RoundRobin => self.round_robin(tried, now),
            Algorithm::Random => self.draw(tried, now, rng).map(|at| self.ready[at].clone()),
        };
        chosen.or_else(|| self.least_bad(tried, now, algorithm)).unwrap_or_else(|| self.ready[0].clone())
    }

    fn two_choices<'a>(
        &'a self,
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
        let (mut best, mut least) = (one, cost(one));
        let mut consider = |slot: &'a Rc<Slot>| {
            let cost = cost(slot);
            if cost < least {
                (best, least) = (slot, cost);
            }
            least
        };
        let mut least = consider(other);
        for _ in 0..MORE_DRAWS {
            if least <= self.usual_cost.get() * TOO_DEAR {
                break;
            }
            least = consider(&self.ready[self.draw(tried, now, rng)?]);
        }
        let usual = self.usual_cost.get();
        let usual = match usual.is_finite() {
            // One dear pick must not make the next one look ordinary.
            true => usual + (least.min(usual * TOO_DEAR) - usual) * LEARN,
            false => least,
        };
        self.usual_cost.set(usual);
        Some(best.clone())
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

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.health == EndpointHealth::Healthy && endpoint.weight > 0
}

/// About to go, and not gone yet.
fn still_serves(endpoint: &Endpoint) -> bool {
    endpoint.health == EndpointHealth::Draining && endpoint.weight > 0
}

/// What tells one calling pod from another ([`BackendPolicy::client`]), now and after a restart of its sidecar.
pub fn client(pod: &PodUid) -> u64 {
    turn(0, pod)
}

/// An endpoint's place in one caller's own order of them.
fn turn(client: u64, endpoint: &PodUid) -> u64 {
    // FNV-1a, then a mix: names that differ in their last letter must not be neighbours.
    let start = client ^ 0xcbf2_9ce4_8422_2325;
    let hash = endpoint
        .as_str()
        .bytes()
        .fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}

/// How often a draw may miss before everything is looked at: at the default cap of half the endpoints
/// ejected, one pick in 4,096 looks.
const DRAWS: u32 = 12;
/// How much dearer than usual the cheaper of two must be for another draw: 12 in-flight requests
/// among neighbours with three, or four times their latency.
const TOO_DEAR: f64 = 4.0;
/// How many more draws at most: three bad ones of ten meet five times in 500 picks.
const MORE_DRAWS: u32 = 3;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::{
        backoff::Backoff,
        classify::{Failure, Outcome},
        name::ServiceName,
        service::Service,
    };

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    const MS: Duration = Duration::from_millis(1);
    const S: Duration = Duration::from_secs(1);
    const FAILED: Outcome = Outcome::Failure(Failure::Status(503));

    fn address(n: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 80))
    }

    fn endpoint(n: u16) -> Endpoint {
        Endpoint::new(PodUid::new(&format!("pod-{n}")).unwrap(), address(n))
    }

    fn service(algorithm: Algorithm) -> Service {
        let name = ServiceName { namespace: "ns".into(), name: "s".into(), port: 80 };
        let mut service = Service::new(name);
        service.load_balancing.algorithm = algorithm;
        service.health.backoff = Backoff::try_new(S, 60 * S, 0.0).unwrap();
        service
    }

    fn backend(
        service: Service,
        endpoints: impl IntoIterator<Item = Endpoint>,
        generation: u64,
    ) -> BackendPolicy {
        let endpoints = endpoints.into_iter().map(Arc::new).collect();
        BackendPolicy { service: Arc::new(service), endpoints, generation, resolved: true, client: 1 }
    }

    struct World {
        balancer: Balancer,
        service: Service,
        now: Instant,
        rng: SmallRng,
        generation: u64,
    }

    impl World {
        fn new(service: Service, endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
            let balancer = Balancer::new(&service.load_balancing, &service.health);
            let mut world =
                Self { balancer, service, now: origin(), rng: SmallRng::seed_from_u64(5), generation: 0 };
            world.update(endpoints);
            world
        }

        fn of(n: u16) -> Self {
            Self::new(service(Algorithm::PeakEwma), (0..n).map(endpoint))
        }

        fn update(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
            self.generation += 1;
            self.balancer.update(&backend(self.service.clone(), endpoints, self.generation), self.now);
        }

        fn pick(&mut self) -> Lease {
            self.balancer.pick(&[], self.now, &mut self.rng).unwrap()
        }

        /// One request at a time, each of `took`; says who got how many.
        fn run(&mut self, requests: u32, took: Duration) -> BTreeMap<SocketAddr, u32> {
            let mut seen = BTreeMap::new();
            for _ in 0..requests {
                let lease = self.pick();
                *seen.entry(lease.endpoint().address).or_default() += 1;
                self.now += took;
                lease.finish(Outcome::Success, self.now);
            }
            seen
        }

        /// Lets one endpoint fail until it is ejected.
        fn fail(&mut self, address: SocketAddr) -> Option<Ejection> {
            let others = self.balancer.endpoints(self.now).into_iter().map(|v| v.endpoint.address);
            let others: Vec<_> = others.filter(|other| *other != address).collect();
            (0..10).find_map(|_| {
                self.now += MS;
                let lease = self.balancer.pick(&others, self.now, &mut self.rng).unwrap();
                assert_eq!(lease.endpoint().address, address);
                lease.finish(FAILED, self.now)
            })
        }

        fn state(&self, address: SocketAddr) -> Health {
            let views = self.balancer.endpoints(self.now);
            views.iter().find(|view| view.endpoint.address == address).unwrap().state
        }
    }

    const ALL: [Algorithm; 4] =
        [Algorithm::PeakEwma, Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random];

    #[test]
    fn nobody_to_send_to() {
        let mut w = World::new(service(Algorithm::PeakEwma), []);
        assert_eq!(w.balancer.pick(&[], w.now, &mut w.rng).unwrap_err(), PickError::NoEndpoints);
        let draining = Endpoint { health: EndpointHealth::Draining, ..endpoint(1) };
        w.update([draining.clone()]);
        assert_eq!(w.pick().endpoint().address, address(1), "nobody else is left");
        let not_ready = Endpoint { health: EndpointHealth::Unhealthy, ..endpoint(2) };
        let no_weight = Endpoint { weight: 0, ..endpoint(3) };
        let gone = Endpoint { weight: 0, ..draining.clone() };
        w.update([gone, not_ready.clone(), no_weight.clone()]);
        assert_eq!(w.balancer.pick(&[], w.now, &mut w.rng).unwrap_err(), PickError::NoneReady);
        assert_eq!(w.state(address(2)), Health::NotReady);
        for algorithm in ALL {
            let mut w = World::new(
                service(algorithm),
                [draining.clone(), endpoint(7), not_ready.clone(), no_weight.clone(), endpoint(8)],
            );
            let seen = w.run(200, MS);
            assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [address(7), address(8)], "{algorithm:?}");
        }
    }

    #[test]
    fn those_about_to_go_serve_while_nobody_else_does() {
        for algorithm in ALL {
            let draining = |n| Endpoint { health: EndpointHealth::Draining, ..endpoint(n) };
            let not_ready = Endpoint { health: EndpointHealth::Unhealthy, ..endpoint(3) };
            let mut w = World::new(service(algorithm), [draining(1), draining(2), not_ready.clone()]);
            let seen = w.run(200, MS);
            assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [address(1), address(2)], "{algorithm:?}");
            // The first that is ready has it all, and they are left in peace.
            w.update([draining(1), draining(2), Endpoint { health: EndpointHealth::Healthy, ..not_ready }]);
            assert_eq!(w.run(50, MS).keys().copied().collect::<Vec<_>>(), [address(3)], "{algorithm:?}");
            assert_eq!(w.state(address(1)), Health::Draining);
        }
    }

    #[test]
    fn a_caller_stays_with_one_endpoint_and_callers_are_spread() {
        for algorithm in ALL {
            let mut by_client = service(algorithm);
            by_client.load_balancing.by_client = true;
            let mut firsts: BTreeMap<SocketAddr, u32> = BTreeMap::new();
            for client in 0..2_000 {
                let mut b = Balancer::new(&by_client.load_balancing, &by_client.health);
                let all = (0..10).map(|n| Arc::new(endpoint(n))).collect();
                let service = Arc::new(by_client.clone());
                let policy = BackendPolicy { service, endpoints: all, generation: 1, resolved: true, client };
                b.update(&policy, origin());
                let first = b.pick(&[], origin(), &mut SmallRng::seed_from_u64(client)).unwrap();
                *firsts.entry(first.endpoint().address).or_default() += 1;
            }
            assert!(firsts.len() == 10 && firsts.values().all(|n| (140..260).contains(n)), "{firsts:?}");
            let mut w = World::new(by_client, (0..10).map(endpoint));
            let seen = w.run(100, MS);
            assert_eq!(seen.len(), 1, "{algorithm:?} {seen:?}");
            let home = *seen.keys().next().unwrap();
            // Whoever else comes or goes moves nobody; its own end moves its callers, to one other.
            let other = (0..10).map(address).find(|address| *address != home);
            w.update((0..10).map(endpoint).filter(|endpoint| Some(endpoint.address) != other));
            assert_eq!(w.run(20, MS).keys().copied().collect::<Vec<_>>(), [home]);
            w.update((0..10).map(endpoint).filter(|e| e.address != home));
            let next = w.run(20, MS);
            assert!(next.len() == 1 && !next.contains_key(&home), "{next:?}");
            w.update((0..10).map(endpoint));
            assert_eq!(w.run(20, MS).keys().copied().collect::<Vec<_>>(), [home], "and back");
            assert!(w.fail(home).is_some());
            let other = w.pick();
            assert_ne!(other.endpoint().address, home, "what is ejected is nobody's home");
        }
    }

    #[test]
    fn equal_endpoints_share_equally() {
        for algorithm in ALL {
            let mut w = World::new(service(algorithm), (0..10).map(endpoint));
            let seen = w.run(10_000, MS);
            assert!(seen.values().all(|n| (800..1_200).contains(n)), "{algorithm:?} {seen:?}");
        }
    }

    #[test]
    fn weights_share_by_weight() {
        for algorithm in ALL {
            let heavy = Endpoint { weight: 9, ..endpoint(0) };
            let mut w = World::new(service(algorithm), [heavy, endpoint(1)]);
            let light = w.run(10_000, MS)[&address(1)];
            assert!((500..2_000).contains(&light), "{algorithm:?} {light}");
        }
        let mut w = World::new(
            service(Algorithm::RoundRobin),
            [(0, 5), (1, 1), (2, 1)].map(|(n, weight)| Endpoint { weight, ..endpoint(n) }),
        );
        let order: Vec<_> = (0..7).map(|_| w.pick().endpoint().address.ip().to_string()).collect();
        let last: Vec<_> = order.iter().map(|ip| ip.chars().last().unwrap_or_default()).collect();
        assert_eq!(last.iter().collect::<String>(), "0010200");
    }

    #[test]
    fn a_slow_endpoint_gets_little() {
        let mut w = World::of(5);
        let mut slow = 0;
        for _ in 0..2_000 {
            let lease = w.pick();
            let is_slow = lease.endpoint().address == address(3);
            slow += u32::from(is_slow);
            w.now += if is_slow { 200 * MS } else { 10 * MS };
            lease.finish(Outcome::Success, w.now);
        }
        assert!(slow <= 10, "{slow}");
    }

    #[test]
    fn a_stalled_endpoint_is_left_before_it_answers() {
        let mut w = World::of(2);
        w.run(200, 10 * MS);
        let (mut stalled, mut others) = (Vec::new(), 0);
        for _ in 0..200 {
            let lease = w.pick();
            w.now += 10 * MS;
            if lease.endpoint().address == address(1) {
                stalled.push(lease);
            } else {
                others += 1;
                lease.finish(Outcome::Success, w.now);
            }
        }
        assert!(stalled.len() <= 3 && others >= 197, "{} {others}", stalled.len());
    }

    #[test]
    fn failing_fast_attracts_nothing() {
        let mut s = service(Algorithm::PeakEwma);
        (s.health.consecutive_failures, s.health.success_rate) = (0, None);
        let mut w = World::new(s, (0..5).map(endpoint));
        let mut failed = 0;
        for _ in 0..5_000 {
            let lease = w.pick();
            let fails = lease.endpoint().address == address(2);
            failed += u32::from(fails);
            w.now += if fails { MS } else { 10 * MS };
            lease.finish(if fails { FAILED } else { Outcome::Success }, w.now);
        }
        // Without ejection: about one in a hundred, where a fair share is one in five.
        assert!(failed < 75, "{failed}");
    }

    #[test]
    fn tried_endpoints_are_left_out_while_another_is_there() {
        for algorithm in ALL {
            let mut w = World::new(service(algorithm), (0..3).map(endpoint));
            for _ in 0..100 {
                let tried = [address(0), address(2)];
                let lease = w.balancer.pick(&tried, w.now, &mut w.rng).unwrap();
                assert_eq!(lease.endpoint().address, address(1), "{algorithm:?}");
            }
            let all = [address(0), address(1), address(2)];
            assert!(w.balancer.pick(&all, w.now, &mut w.rng).is_ok());
        }
    }

    #[test]
    fn an_endpoint_that_does_not_answer_is_ejected_at_once_and_probed_by_connecting_only() {
        let silent = Outcome::Failure(Failure::ConnectTimeout);
        // Whatever an endpoint has cost before, it is drawn.
        let mut w = World::new(service(Algorithm::Random), (0..3).map(endpoint));
        let find = |w: &mut World, at: u16| {
            std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(at)).unwrap()
        };
        // A short deadline says nothing yet.
        let lease = find(&mut w, 1);
        assert!(lease.finish(silent, w.now + 100 * MS).is_none());
        let lease = find(&mut w, 1);
        assert!(!lease.only_connects());
        w.now += S;
        let mut until = lease.finish(silent, w.now).unwrap().until;
        for _ in 0..3 {
            w.now = until;
            let probe = find(&mut w, 1);
            assert!(probe.only_connects());
            assert!((0..200).all(|_| w.pick().endpoint().address != address(1)));
            w.now += S;
            let again = probe.finish(silent, w.now).unwrap();
            assert_eq!(again.reason, Reason::NoConnection);
            until = again.until;
        }
        w.now = until;
        find(&mut w, 1).finish(Outcome::Success, w.now);
        assert_eq!(w.state(address(1)), Health::Healthy);
        assert!(!find(&mut w, 1).only_connects());
        // A refusal comes at once and says as much.
        let refused = find(&mut w, 2).finish(Outcome::Failure(Failure::Refused), w.now).unwrap();
        assert_eq!(refused.reason, Reason::NoConnection);
        // So does a sidecar for its app; only a request finds out whether that is back.
        let mut w = World::of(3);
        let refused = find(&mut w, 2).finish(Outcome::Failure(Failure::AppRefused), w.now).unwrap();
        assert_eq!(refused.reason, Reason::AppRefuses);
        w.now = refused.until;
        let probe = find(&mut w, 2);
        assert!(!probe.only_connects());
        let again = probe.finish(Outcome::Failure(Failure::AppRefused), w.now).unwrap();
        assert_eq!(again.until - w.now, 2 * S);
    }

    #[test]
    fn an_endpoint_whose_connection_broke_gets_nothing_until_it_was_asked() {
        for algorithm in ALL {
            let mut w = World::new(service(algorithm), (0..3).map(endpoint));
            let uid = |n: u16| endpoint(n).uid;
            let doubt = |w: &mut World, n: u16| {
                let World { balancer, now, rng, .. } = w;
                balancer.doubt(address(n), &uid(n), *now, rng)
            };
            let gets = |w: &mut World, n: u16| (0..200).any(|_| w.pick().endpoint().address == address(n));
            // It is there: nothing is held against it. Asked once, however many connections broke.
            let asked = doubt(&mut w, 1).unwrap();
            assert!(doubt(&mut w, 1).is_none());
            assert!(!gets(&mut w, 1), "{algorithm:?}");
            assert_eq!(w.state(address(1)), Health::Healthy);
            assert!(asked.settle(Outcome::Success, w.now).is_none());
            assert!(gets(&mut w, 1), "{algorithm:?}");
            drop(doubt(&mut w, 1));
            assert!(gets(&mut w, 1), "{algorithm:?}");
            // Nobody is there: ejected, and from then on probed by connecting only.
            let asked = doubt(&mut w, 1).unwrap();
            let ejection = asked.settle(Outcome::Failure(Failure::Refused), w.now).unwrap();
            assert_eq!((ejection.endpoint.address, ejection.reason), (address(1), Reason::NoConnection));
            assert!(doubt(&mut w, 1).is_none());
            assert!(!gets(&mut w, 1), "{algorithm:?}");
            w.now = ejection.until;
            let probe =
                std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(1)).unwrap();
            assert!(probe.only_connects());
            probe.finish(Outcome::Success, w.now);
            // The cap holds: of three one may be out.
            let asked = doubt(&mut w, 1).unwrap();
            asked.settle(Outcome::Failure(Failure::Refused), w.now).unwrap();
            let asked = doubt(&mut w, 2).unwrap();
            assert!(asked.settle(Outcome::Failure(Failure::Refused), w.now).is_none());
            assert!(gets(&mut w, 2), "{algorithm:?}");
            // All of them doubted, and the only one: somebody gets it.
            let _doubts = [0, 2].map(|n| doubt(&mut w, n).unwrap());
            w.pick();
            // Ejected by requests that were cut off: the question still decides how it is probed.
            let mut w = World::new(service(algorithm), (0..3).map(endpoint));
            let until = w.fail(address(1)).unwrap().until;
            let asked = doubt(&mut w, 1).unwrap();
            assert!(asked.settle(Outcome::Failure(Failure::Refused), w.now).is_none());
            w.now = until;
            let probe =
                std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(1)).unwrap();
            assert!(probe.only_connects());
            drop(probe);
            // Another pod at the same address is another endpoint.
            let World { balancer, now, rng, .. } = &mut w;
            assert!(balancer.doubt(address(0), &uid(7), *now, rng).is_none());
        }
    }

    #[test]
    fn ejected_then_one_probe_then_healthy() {
        let mut w = World::of(3);
        let ejection = w.fail(address(1)).unwrap();
        assert_eq!(ejection.endpoint.address, address(1));
        assert_eq!(ejection.reason, Reason::ConsecutiveFailures(5));
        assert_eq!(w.state(address(1)), Health::Ejected { until: ejection.until });
        w.now = ejection.until - MS;
        assert!((0..200).all(|_| w.pick().endpoint().address != address(1)));
        w.now = ejection.until;
        assert_eq!(w.state(address(1)), Health::Probing);
        let mut probe =
            std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(1)).unwrap();
        assert!((0..200).all(|_| w.pick().endpoint().address != address(1)));
        probe.first_byte(w.now + MS);
        probe.finish(Outcome::Success, w.now + MS);
        assert_eq!(w.state(address(1)), Health::Healthy);
        // A failed probe ejects for longer.
        let ejection = w.fail(address(1)).unwrap();
        assert_eq!(ejection.until - w.now, 2 * S);
        w.now = ejection.until;
        let probe = std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(1)).unwrap();
        let again = probe.finish(FAILED, w.now).unwrap();
        assert_eq!((again.reason, again.until - w.now), (Reason::ProbeFailed, 4 * S));
    }

    #[test]
    fn a_dropped_probe_lets_the_next_one_go() {
        let mut w = World::of(2);
        w.now = w.fail(address(0)).unwrap().until;
        for _ in 0..3 {
            let probe =
                std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(0)).unwrap();
            drop(probe);
        }
        assert_eq!(w.state(address(0)), Health::Probing);
    }

    #[test]
    fn the_last_one_is_never_ejected() {
        let mut w = World::of(1);
        assert!(w.fail(address(0)).is_none());
        let mut s = service(Algorithm::PeakEwma);
        s.health.max_ejection_percent = 100;
        let mut w = World::new(s, (0..2).map(endpoint));
        assert!(w.fail(address(0)).is_some());
        assert!(w.fail(address(1)).is_none());
        // The healthy one leaves: the ejected one is the last, and comes back.
        w.update([endpoint(0)]);
        assert_eq!(w.state(address(0)), Health::Healthy);
    }

    #[test]
    fn updates_keep_what_is_known() {
        let mut w = World::of(4);
        w.fail(address(1)).unwrap();
        let held = std::iter::repeat_with(|| w.pick()).find(|l| l.endpoint().address == address(2)).unwrap();
        let replaced = Endpoint { uid: PodUid::new("another").unwrap(), ..endpoint(3) };
        w.update([endpoint(9), replaced, endpoint(1), endpoint(0)]);
        assert!(matches!(w.state(address(1)), Health::Ejected { .. }));
        assert_eq!(w.state(address(2)), Health::Draining);
        assert_eq!(w.state(address(9)), Health::Healthy);
        let of = |w: &World, a| w.balancer.endpoints(w.now).into_iter().find(|v| v.endpoint.address == a);
        assert_eq!(of(&w, address(3)).unwrap().requests, 0);
        assert!(of(&w, address(0)).unwrap().requests > 0);
        assert_eq!(of(&w, address(2)).unwrap().in_flight, 1);
        held.finish(FAILED, w.now);
        assert!(of(&w, address(2)).is_none());
        assert_eq!(w.balancer.ready(), 4);
    }

    #[test]
    fn who_joins_later_warms_up() {
        for algorithm in [Algorithm::PeakEwma, Algorithm::RoundRobin, Algorithm::Random] {
            let mut w = World::new(service(algorithm), (0..4).map(endpoint));
            w.run(400, 5 * MS);
            w.update((0..5).map(endpoint));
            let early = w.run(200, 5 * MS).get(&address(4)).copied().unwrap_or_default();
            w.now += 20 * S;
            w.run(400, 5 * MS);
            let late = w.run(1_000, 5 * MS)[&address(4)];
            assert!(early <= 20, "{algorithm:?} {early}");
            assert!((120..280).contains(&late), "{algorithm:?} {late}");
        }
    }

    #[test]
    fn in_flight_counts_every_way_out() {
        let mut w = World::of(1);
        let in_flight = |w: &World| w.balancer.endpoints(w.now)[0].in_flight;
        let (a, b, c) = (w.pick(), w.pick(), w.pick());
        assert_eq!(in_flight(&w), 3);
        drop(a);
        b.finish(Outcome::Cancelled, w.now);
        c.finish(FAILED, w.now);
        assert_eq!(in_flight(&w), 0);
    }

    #[test]
    fn an_update_without_change_is_free() {
        let mut w = World::of(3);
        let same = backend(w.service.clone(), (0..3).map(endpoint), 7);
        w.balancer.update(&same, w.now);
        let before = w.balancer.slots.clone();
        w.balancer.update(&same, w.now);
        assert!(before.iter().zip(&w.balancer.slots).all(|(a, b)| Rc::ptr_eq(a, b)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pick(bool),
        Finish(prop::sample::Index, u8),
        Doubt(u16, u8),
        Wait(u16),
        Update(Vec<(u16, u32, bool)>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let endpoints = prop::collection::btree_map(0u16..8, (0u32..4, any::<bool>()), 0..8);
        let endpoints = endpoints.prop_map(|all| all.into_iter().map(|(n, (w, h))| (n, w, h)).collect());
        prop_oneof![
            8 => any::<bool>().prop_map(Step::Pick),
            8 => (any::<prop::sample::Index>(), 0u8..6).prop_map(|(at, how)| Step::Finish(at, how)),
            1 => (0u16..8, 0u8..3).prop_map(|(of, how)| Step::Doubt(of, how)),
            2 => (0u16..3_000).prop_map(Step::Wait),
            1 => endpoints.prop_map(Step::Update),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever happens: the cap holds, the last one stays, nobody who takes no requests gets one, and
        /// in-flight counts are those of the leases held.
        #[test]
        fn invariants(
            steps in prop::collection::vec(step(), 1..200), algorithm in prop::sample::select(ALL.to_vec()),
            cap in 0u8..=100, seed in any::<u64>(),
        ) {
            let mut s = service(algorithm);
            s.health.max_ejection_percent = cap;
            s.health.consecutive_failures = 2;
            let mut w = World::new(s, (0..6).map(endpoint));
            w.rng = SmallRng::seed_from_u64(seed);
            let mut held: Vec<Lease> = Vec::new();
            let mut doubts = Vec::new();
            for step in steps {
                match step {
                    Step::Pick(again) => {
                        let tried: Vec<_> = held.last().filter(|_| again).iter().map(|l| l.endpoint().address).collect();
                        match w.balancer.pick(&tried, w.now, &mut w.rng) {
                            Ok(lease) => {
                                let last = !w.balancer.slots.iter().any(|slot| is_ready(&slot.endpoint.borrow()));
                                prop_assert!(is_ready(lease.endpoint()) || (last && still_serves(lease.endpoint())));
                                held.push(lease);
                            }
                            Err(_) => prop_assert_eq!(w.balancer.ready(), 0),
                        }
                    }
                    Step::Finish(at, how) if !held.is_empty() => {
                        let mut lease = held.swap_remove(at.index(held.len()));
                        match how {
                            0 => drop(lease),
                            1 => { lease.finish(Outcome::Cancelled, w.now); }
                            2 => { lease.first_byte(w.now); lease.finish(Outcome::Success, w.now); }
                            _ => { lease.finish(FAILED, w.now); }
                        }
                    }
                    Step::Finish(..) => {}
                    Step::Doubt(of, how) => {
                        let doubt = w.balancer.doubt(address(of), &endpoint(of).uid, w.now, &mut w.rng);
                        match (doubt, how) {
                            (Some(doubt), 0) => doubts.push(doubt),
                            (Some(doubt), 1) => { doubt.settle(Outcome::Failure(Failure::Refused), w.now); }
                            (doubt, _) => drop((doubt, doubts.pop())),
                        }
                    }
                    Step::Wait(ms) => w.now += Duration::from_millis(u64::from(ms)),
                    Step::Update(endpoints) => w.update(endpoints.into_iter().map(|(n, weight, up)| {
                        let health = if up { EndpointHealth::Healthy } else { EndpointHealth::Draining };
                        Endpoint { weight, health, ..endpoint(n) }
                    })),
                }
                let views = w.balancer.endpoints(w.now);
                let ready: Vec<_> = views.iter().filter(|v| !matches!(v.state, Health::Draining | Health::NotReady)).collect();
                let out = ready.iter().filter(|v| v.state != Health::Healthy).count();
                prop_assert_eq!(ready.len(), w.balancer.ready());
                prop_assert_eq!(out, w.balancer.shared.out.get());
                prop_assert!(out * 100 <= ready.len() * usize::from(cap));
                prop_assert!(ready.is_empty() || out < ready.len());
                let in_flight: u32 = views.iter().map(|v| v.in_flight).sum();
                prop_assert_eq!(in_flight as usize, held.len());
            }
        }
    }
}
