//! One endpoint as the balancer knows it: what is on it, what was measured, and what another request would cost.
//!
//! Why the age of a request that waits counts as latency: an endpoint that has stalled says nothing, and its last answer was
//! a quick one.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    eject::{Reason, State, Tracker},
    ewma::Ewma,
    service::{Endpoint, EndpointHealth},
};

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

/// One endpoint, for as long as the policy names it or a request is on it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) endpoint: RefCell<Arc<Endpoint>>,
    pub(super) in_flight: Cell<u32>,
    pub(super) requests: Cell<u64>,
    /// Weight, and whether the slot stands in `ready`.
    pub(super) weight: Cell<f64>,
    pub(super) is_ready: Cell<bool>,
    pub(super) removed: Cell<bool>,
    pub(super) warm_from: Cell<Option<Instant>>,
    /// Smooth weighted round robin's credit.
    pub(super) credit: Cell<f64>,
    pub(super) seen: RefCell<Seen>,
}

/// What its requests have shown.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) latency: Ewma,
    pub(super) failing: Failing,
    pub(super) tracker: Tracker,
    pub(super) waiting: Waiting,
}

/// The recent share of failures; fades as the latency does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failing {
    share: f64,
    at: Instant,
}

/// Starts of the requests that wait for their first byte, oldest first; constant time on average.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    first: u64,
    starts: VecDeque<Option<Instant>>,
}

impl Slot {
    /// Of an endpoint that is believed to answer in `latency` at first.
    pub(super) fn new(endpoint: &Arc<Endpoint>, decay: Duration, latency: Duration, now: Instant) -> Self {
        let seen = Seen {
            latency: Ewma::new(decay, latency, now),
            failing: Failing { share: 0.0, at: now },
            tracker: Tracker::new(now),
            waiting: Waiting::default(),
        };
        Self {
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

    pub(super) fn takes(&self, tried: &[SocketAddr], now: Instant) -> bool {
        !self.is_tried(tried) && {
            let seen = self.seen.borrow();
            seen.tracker.available(now) || seen.tracker.probe_settled(now)
        }
    }

    pub(super) fn is_tried(&self, tried: &[SocketAddr]) -> bool {
        !tried.is_empty() && tried.contains(&self.endpoint.borrow().address)
    }

    /// How much of its weight an endpoint gets that joined a moment ago.
    pub(super) fn warmth(&self, now: Instant) -> f64 {
        let Some(from) = self.warm_from.get() else {
            return 1.0;
        };
        let age = now.saturating_duration_since(from).as_secs_f64();
        (age / WARM_UP.as_secs_f64()).clamp(COLDEST, 1.0)
    }

    /// Requests in flight, one more, by weight.
    pub(super) fn load(&self) -> f64 {
        1.0 + f64::from(self.in_flight.get()) / self.weight.get().max(f64::MIN_POSITIVE)
    }

    pub(super) fn cost(&self, now: Instant) -> f64 {
        let seen = self.seen.borrow();
        let keep = seen.latency.keep(now);
        let waited = seen.waiting.oldest().map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        let failing = seen.failing.now(seen.latency.decay(), now);
        let latency = (seen.latency.seconds() * keep).max(waited) + SHORTEST_LATENCY;
        latency * self.load() * (1.0 + FAILING_COSTS * failing * failing)
    }

    pub(super) fn release(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    pub(super) fn view(&self, now: Instant) -> EndpointView {
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
    pub(super) fn now(&self, decay: Duration, now: Instant) -> f64 {
        if self.share == 0.0 {
            return 0.0; // nearly always: no exponential needed
        }
        let idle = now.saturating_duration_since(self.at).as_secs_f64();
        let share = self.share * (-idle / decay.as_secs_f64().max(f64::MIN_POSITIVE)).exp();
        if share < FORGOTTEN { 0.0 } else { share }
    }

    /// Takes one outcome: 1 failed, 0 did not.
    pub(super) fn learn(&mut self, failed: f64, decay: Duration, now: Instant) {
        let share = self.now(decay, now);
        let share = share + (failed - share) * FAILING_LEARNS;
        *self = Self { share, at: self.at.max(now) };
    }
}

impl Waiting {
    pub(super) fn join(&mut self, now: Instant) -> u64 {
        self.starts.push_back(Some(now));
        self.first + self.starts.len() as u64 - 1
    }

    pub(super) fn done(&mut self, ticket: u64) {
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

    pub(super) fn oldest(&self) -> Option<Instant> {
        self.starts.front().copied().flatten()
    }
}

/// How long an endpoint that joined later warms up.
pub(super) const WARM_UP: Duration = Duration::from_secs(10);
/// Its share at the beginning.
const COLDEST: f64 = 0.1;
/// What an endpoint that always fails costs, in times of one that never does: 5 % of failures cost a
/// quarter more, a third of them twelve times as much.
const FAILING_COSTS: f64 = 100.0;
/// Weight of one outcome in the recent share of failures: five in a row make 41 %.
const FAILING_LEARNS: f64 = 0.1;
/// A share of failures that makes no difference.
const FORGOTTEN: f64 = 0.01;
/// Added to every latency: below it, differences are noise of the clock and the scheduler.
const SHORTEST_LATENCY: f64 = 50e-6;
