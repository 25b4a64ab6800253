//! Passive health of one endpoint: Healthy → Ejected { until } → Probing → Healthy.
//!
//! Why two triggers: failures in a row catch an endpoint that is gone, within a handful of requests; a
//! success rate over a window catches one that fails every third request and would never fail
//! five times in a row. Why probing: when an ejection ends, nothing is known, so one request at a time
//! finds out. Why the backoff survives a short recovery: an endpoint that flaps is not a new one.
//!
//! Why one connection that does not come about is enough: nobody is there, whatever the requests before it said; and an
//! endpoint that swallows packets costs each request that meets it a second. A request is not sent to find out whether
//! it is back either: whoever probes it only connects.
//!
//! An app that is gone while its sidecar is there says so itself, in an answer: as good as a refused connection.
//!
//! Why doubt comes before ejection: a connection that breaks says that something happened, not what. A killed pod refuses
//! the next one, a restarted sidecar takes it. Until that is known nothing is sent there, and nothing is held against it.
//!
//! This file decides for one endpoint. Whether it *may* be ejected (never above the cap, never the last
//! one) is a matter of all of them: `balance.rs`.

use std::time::{Duration, Instant};

use crate::service::{HealthPolicy, SuccessRate};

/// Whether an endpoint takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Healthy,
    /// Not before `until`.
    Ejected {
        /// When probing may begin.
        until: Instant,
    },
    /// One request at a time, until one succeeds.
    Probing,
}

/// Why an endpoint is, or was last, ejected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// So many failures in a row.
    ConsecutiveFailures(u32),
    /// Too few successes in the window.
    SuccessRate {
        /// Share of successes.
        rate: f64,
        /// Of so many requests.
        requests: u32,
    },
    /// The probe after an ejection failed.
    ProbeFailed,
    /// A connection to it was refused, or did not come about in time.
    NoConnection,
    /// Its app refuses connections. Its sidecar does not, so that only a request finds out if it is back; one that it does
    /// not take is sent elsewhere.
    AppRefuses,
}

/// What was seen of one endpoint.
#[derive(Clone, Debug)]
pub struct Tracker {
    consecutive: u32,
    ring: [Bucket; BUCKETS],
    start: Instant,
    ejected: Option<Ejected>,
    /// How often it was ejected without a long enough recovery between: the backoff's exponent.
    times: u32,
    last: Option<(Reason, Duration)>,
    recovered: Option<Instant>,
    /// Somebody is finding out whether it is still there.
    doubted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Ejected {
    until: Instant,
    probe: Option<Probe>,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    since: Instant,
    answered: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    epoch: u64,
    good: u32,
    bad: u32,
}

impl Tracker {
    /// Nothing seen yet.
    pub fn new(now: Instant) -> Self {
        Self {
            consecutive: 0,
            ring: [Bucket::default(); BUCKETS],
            start: now,
            ejected: None,
            times: 0,
            last: None,
            recovered: None,
            doubted: false,
        }
    }

    /// Whether it takes requests.
    pub fn state(&self, now: Instant) -> State {
        match self.ejected {
            None => State::Healthy,
            Some(ejected) if now < ejected.until => State::Ejected { until: ejected.until },
            Some(_) => State::Probing,
        }
    }

    /// Whether it is in normal rotation, whatever the time.
    pub fn is_out(&self) -> bool {
        self.ejected.is_some()
    }

    /// Why it was ejected last, if it ever was.
    pub fn reason(&self) -> Option<Reason> {
        self.last.map(|(reason, _)| reason)
    }

    /// Whether somebody finds out if it is still there. The answer is not to be foreseen, so requests go elsewhere.
    pub fn is_doubted(&self) -> bool {
        self.doubted
    }

    /// Whether it is to be doubted from now on, or no more.
    pub fn doubt(&mut self, doubted: bool) {
        self.doubted = doubted;
    }

    /// Whether a request may go there now.
    pub fn available(&self, now: Instant) -> bool {
        !self.doubted
            && self.ejected.is_none_or(|ejected| {
                now >= ejected.until
                    && ejected
                        .probe
                        .is_none_or(|probe| now.saturating_duration_since(probe.since) >= PROBE_STALE)
            })
    }

    /// A probe leaves. Call it when a request goes to an endpoint in [`State::Probing`].
    pub fn probe_started(&mut self, now: Instant) {
        if let Some(ejected) = &mut self.ejected {
            ejected.probe = Some(Probe { since: now, answered: None });
        }
    }

    /// The probe's first byte arrived; not yet a success.
    pub fn probe_answered(&mut self, now: Instant) {
        if let Some(probe) = self.ejected.as_mut().and_then(|ejected| ejected.probe.as_mut()) {
            probe.answered = Some(now);
        }
    }

    /// The probe ended without telling anything (its caller left).
    pub fn probe_dropped(&mut self) {
        if let Some(ejected) = &mut self.ejected {
            ejected.probe = None;
        }
    }

    /// Whether the probe is a stream that was answered long enough ago to count as a success: streams
    /// may live for hours, and an endpoint that serves one is no longer suspect.
    pub fn probe_settled(&self, now: Instant) -> bool {
        let answered = self.ejected.and_then(|ejected| ejected.probe).and_then(|probe| probe.answered);
        answered.is_some_and(|at| now.saturating_duration_since(at) >= PROBE_SETTLES)
    }

    /// Counts one success.
    pub fn success(&mut self, policy: &HealthPolicy, now: Instant) {
        self.consecutive = 0;
        if let Some(bucket) = self.bucket(policy, now) {
            bucket.good = bucket.good.saturating_add(1);
        }
    }

    /// Counts one failure, and says whether the endpoint deserves to be ejected for it.
    pub fn failure(&mut self, policy: &HealthPolicy, now: Instant) -> Option<Reason> {
        self.consecutive = self.consecutive.saturating_add(1);
        if let Some(bucket) = self.bucket(policy, now) {
            bucket.bad = bucket.bad.saturating_add(1);
        }
        if policy.consecutive_failures > 0 && self.consecutive >= policy.consecutive_failures {
            return Some(Reason::ConsecutiveFailures(self.consecutive));
        }
        let want = policy.success_rate?;
        let (good, bad) = self.window(&want, now);
        let requests = good.saturating_add(bad);
        let rate = f64::from(good) / f64::from(requests.max(1));
        (requests >= want.min_requests.max(1) && rate < want.threshold)
            .then_some(Reason::SuccessRate { rate, requests })
    }

    /// Ejects it, for longer each time; `draw` in `0.0..=1.0` is the jitter. Says until when.
    pub fn eject(&mut self, policy: &HealthPolicy, reason: Reason, now: Instant, draw: f64) -> Instant {
        let well_since = self.recovered.map(|at| now.saturating_duration_since(at));
        if let (Some(well), Some((_, length))) = (well_since, self.last)
            && well >= length.max(policy.backoff.min()) * 2
        {
            self.times = 0;
        }
        let length = policy.backoff.delay_at(self.times, draw);
        self.times = self.times.saturating_add(1);
        self.last = Some((reason, length));
        self.recovered = None;
        let until = now + length;
        self.ejected = Some(Ejected { until, probe: None });
        until
    }

    /// It is ejected, and this is why, as is known only now: the time stays, and it is probed accordingly.
    pub fn found(&mut self, reason: Reason) {
        if let Some((last, _)) = &mut self.last {
            *last = reason;
        }
    }

    /// Back to normal rotation, with a clean record.
    pub fn restore(&mut self, now: Instant) {
        self.ejected = None;
        self.consecutive = 0;
        self.ring = [Bucket::default(); BUCKETS];
        self.recovered = Some(now);
    }

    fn epoch(&self, window: Duration, now: Instant) -> u64 {
        let length = (window.as_nanos() as u64 / BUCKETS as u64).max(1);
        // From BUCKETS on, so that a fresh bucket is older than any window.
        BUCKETS as u64 + now.saturating_duration_since(self.start).as_nanos() as u64 / length
    }

    fn bucket(&mut self, policy: &HealthPolicy, now: Instant) -> Option<&mut Bucket> {
        let epoch = self.epoch(policy.success_rate?.window, now);
        let bucket = &mut self.ring[(epoch % BUCKETS as u64) as usize];
        if bucket.epoch != epoch {
            *bucket = Bucket { epoch, ..Bucket::default() };
        }
        Some(bucket)
    }

    fn window(&self, rate: &SuccessRate, now: Instant) -> (u32, u32) {
        let newest = self.epoch(rate.window, now);
        let within = |b: &&Bucket| b.epoch <= newest && b.epoch + BUCKETS as u64 > newest;
        self.ring
            .iter()
            .filter(within)
            .fold((0, 0), |(good, bad), b| (good.saturating_add(b.good), bad.saturating_add(b.bad)))
    }
}

/// A tenth of the window is how exactly it slides.
const BUCKETS: usize = 10;
/// A probe that has said nothing for so long does not keep the next one away.
const PROBE_STALE: Duration = Duration::from_secs(10);
/// A stream that was answered so long ago is a success.
const PROBE_SETTLES: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backoff::Backoff;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    const S: Duration = Duration::from_secs(1);

    fn policy() -> HealthPolicy {
        HealthPolicy { backoff: Backoff::try_new(S, 60 * S, 0.0).unwrap(), ..HealthPolicy::default() }
    }

    #[test]
    fn five_failures_in_a_row() {
        let (t, p) = (origin(), HealthPolicy { success_rate: None, ..policy() });
        let mut tracker = Tracker::new(t);
        for round in 0..3 {
            for _ in 0..4 {
                assert_eq!(tracker.failure(&p, t), None, "{round}");
            }
            (0..20).for_each(|_| tracker.success(&p, t));
        }
        (0..4).for_each(|_| assert_eq!(tracker.failure(&p, t), None));
        assert_eq!(tracker.failure(&p, t), Some(Reason::ConsecutiveFailures(5)));
    }

    #[test]
    fn every_third_fails() {
        let (t, p) = (origin(), policy());
        let mut tracker = Tracker::new(t);
        let mut found = None;
        for i in 0..30u32 {
            let now = t + i * Duration::from_millis(100);
            match i % 3 {
                2 => found = found.or(tracker.failure(&p, now)),
                _ => tracker.success(&p, now),
            }
        }
        let Some(Reason::SuccessRate { rate, requests }) = found else { panic!("{found:?}") };
        assert!(rate < 0.8 && requests >= 10);
    }

    #[test]
    fn old_failures_are_forgotten() {
        let (t, p) = (origin(), policy());
        let mut tracker = Tracker::new(t);
        for i in 0..8 {
            (0..3).for_each(|_| assert_eq!(tracker.failure(&p, t + i * 11 * S), None));
            tracker.success(&p, t + i * 11 * S);
        }
    }

    #[test]
    fn nothing_ejects_when_the_policy_says_so() {
        let t = origin();
        let p = HealthPolicy { consecutive_failures: 0, success_rate: None, ..policy() };
        let mut tracker = Tracker::new(t);
        (0..1_000).for_each(|_| assert_eq!(tracker.failure(&p, t), None));
    }

    #[test]
    fn ejected_then_probing_one_at_a_time_then_healthy() {
        let (t, p) = (origin(), policy());
        let mut tracker = Tracker::new(t);
        let until = tracker.eject(&p, Reason::ConsecutiveFailures(5), t, 0.5);
        assert_eq!(until, t + S);
        assert_eq!(tracker.state(t), State::Ejected { until });
        assert!(!tracker.available(until - Duration::from_nanos(1)));
        assert_eq!(tracker.state(until), State::Probing);
        assert!(tracker.available(until));
        tracker.probe_started(until);
        assert!(!tracker.available(until));
        tracker.probe_dropped();
        assert!(tracker.available(until));
        tracker.probe_started(until);
        assert!(tracker.available(until + PROBE_STALE));
        tracker.restore(until);
        assert_eq!(tracker.state(until), State::Healthy);
        assert_eq!(tracker.reason(), Some(Reason::ConsecutiveFailures(5)));
    }

    #[test]
    fn a_stream_that_was_answered_settles_the_probe() {
        let (t, p) = (origin(), policy());
        let mut tracker = Tracker::new(t);
        let until = tracker.eject(&p, Reason::ProbeFailed, t, 0.0);
        tracker.probe_started(until);
        assert!(!tracker.probe_settled(until + 60 * S));
        tracker.probe_answered(until);
        assert!(!tracker.probe_settled(until + S));
        assert!(tracker.probe_settled(until + PROBE_SETTLES));
    }

    #[test]
    fn longer_each_time_until_it_was_well_for_long() {
        let (t, p) = (origin(), policy());
        let mut tracker = Tracker::new(t);
        let mut now = t;
        for want in [1, 2, 4, 8, 16, 32, 60, 60] {
            let until = tracker.eject(&p, Reason::ProbeFailed, now, 0.0);
            assert_eq!(until - now, want * S);
            now = until;
        }
        tracker.restore(now);
        let again = tracker.eject(&p, Reason::ConsecutiveFailures(5), now + 30 * S, 0.0);
        assert_eq!(again - (now + 30 * S), 60 * S);
        tracker.restore(again);
        let well = again + 121 * S;
        assert_eq!(tracker.eject(&p, Reason::ConsecutiveFailures(5), well, 0.0) - well, S);
    }
}
