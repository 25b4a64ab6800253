//! What a request tells of its endpoint, and what that brings about: a lease, its outcome, an ejection.
//!
//! Why the outcome is judged here and not by the balancer: a request ends long after it was sent, perhaps after the policy
//! that chose its endpoint has gone. It takes with it what it needs to speak of that endpoint, and nothing looks it up.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use super::slot::Slot;
use crate::{
    classify::{Failure, Outcome},
    eject::{Reason, State, Tracker},
    service::{Endpoint, HealthPolicy, LoadBalancing},
};

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

/// A connection to an endpoint broke off: whether it is still there is being found out, and requests go elsewhere as
/// long. Dropping it says that nothing was found out.
#[derive(Debug)]
pub struct Doubt {
    pub(super) shared: Rc<Shared>,
    pub(super) slot: Rc<Slot>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) since: Instant,
    pub(super) draw: f64,
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

/// What leases need of their balancer.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) lb: RefCell<LoadBalancing>,
    pub(super) health: RefCell<HealthPolicy>,
    /// The usual latency of a success, over all endpoints, in seconds.
    pub(super) usual: Cell<Option<f64>>,
    /// How many endpoints are ready, and how many of them are not in normal rotation.
    pub(super) ready: Cell<usize>,
    pub(super) out: Cell<usize>,
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

    /// This is the probe of an endpoint that could not be connected to: connect, and send nothing.
    pub fn only_connects(&self) -> bool {
        self.probe && self.slot.seen.borrow().tracker.reason() == Some(Reason::NoConnection)
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
            Outcome::Failure(failure) => {
                seen.latency.at_least(took.max(shared.slow()), now);
                seen.failing.learn(1.0, decay, now);
                let nobody = nobody(failure, took).filter(|_| policy.consecutive_failures > 0);
                let reason = if !seen.tracker.is_out() {
                    let counted = seen.tracker.failure(&policy, now);
                    let reason = nobody.or(counted)?;
                    if !shared.takes_out(&slot) {
                        return None;
                    }
                    reason
                } else if self.probe {
                    nobody.unwrap_or(Reason::ProbeFailed)
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

impl Doubt {
    /// What connecting to it brought. `Some` when this ejected the endpoint.
    pub fn settle(self, outcome: Outcome, now: Instant) -> Option<Ejection> {
        let took = now.saturating_duration_since(self.since);
        let Outcome::Failure(failure) = outcome else { return None };
        let mut seen = self.slot.seen.borrow_mut();
        let policy = self.shared.health.borrow();
        let reason = nobody(failure, took).filter(|_| policy.consecutive_failures > 0)?;
        if seen.tracker.is_out() {
            // By the requests that were cut off: that nobody is there any more only the question has shown.
            seen.tracker.found(reason);
            return None;
        }
        if !self.shared.takes_out(&self.slot) {
            return None;
        }
        let until = seen.tracker.eject(&policy, reason, now, self.draw);
        Some(Ejection { endpoint: self.endpoint.clone(), reason, until })
    }
}

impl Drop for Doubt {
    fn drop(&mut self) {
        self.slot.seen.borrow_mut().tracker.doubt(false);
    }
}

impl Shared {
    pub(super) fn new_slot(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Slot {
        let lb = self.lb.borrow();
        // Whoever joins is believed to be as fast as the others; the first ones get the given guess.
        let latency = self.usual.get().map_or(lb.ewma_initial, Duration::from_secs_f64);
        Slot::new(endpoint, lb.ewma_decay, latency, now)
    }

    pub(super) fn lease(self: &Rc<Self>, slot: Rc<Slot>, now: Instant, draw: f64) -> Lease {
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
    pub(super) fn most_out(&self) -> usize {
        let ready = self.ready.get();
        let share = usize::from(self.health.borrow().max_ejection_percent.min(100));
        (ready * share / 100).min(ready.saturating_sub(1))
    }

    /// Makes room for one more that is out of rotation, if the cap allows it.
    fn takes_out(&self, slot: &Slot) -> bool {
        let allowed = slot.is_ready.get() && self.out.get() < self.most_out();
        if allowed {
            self.out.set(self.out.get() + 1);
        }
        allowed
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

/// Whether a failure after so long means that nobody is there: one is enough.
fn nobody(failure: Failure, took: Duration) -> Option<Reason> {
    match failure {
        Failure::ConnectTimeout => (took >= SILENCE).then_some(Reason::NoConnection),
        Failure::Refused | Failure::Unreachable => Some(Reason::NoConnection),
        Failure::AppRefused => Some(Reason::AppRefuses),
        Failure::Status(_)
        | Failure::Grpc(_)
        | Failure::Reset
        | Failure::Malformed
        | Failure::Timeout
        | Failure::Identity
        | Failure::NotProcessed => None,
    }
}

/// Weight of one sample in the usual latency, and in the usual cost.
pub(super) const LEARN: f64 = 1.0 / 32.0;
/// Who gave up on a connection sooner (a request with a short deadline) knows that it is slow, not that it is silent.
const SILENCE: Duration = Duration::from_millis(500);
