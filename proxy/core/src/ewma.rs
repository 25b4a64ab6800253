//! Peak-EWMA: what one endpoint's latency is believed to be.
//!
//! Why peak: an endpoint that turns slow must be believed at once (its first slow answer *is* the
//! news), while one that turns fast must earn it over the decay time. Why decay toward zero when idle:
//! an endpoint that is not chosen is not measured, so its estimate fades until it is tried again.
//! Finagle's `PeakEwma`; the clock is a parameter here, and reading does not change the value.

use std::time::{Duration, Instant};

/// An estimate that jumps up, glides down and fades when idle.
#[derive(Clone, Debug)]
pub struct Ewma {
    decay: f64,
    seconds: f64,
    at: Instant,
}

impl Ewma {
    /// Starts from a guess. A decay of zero forgets at once.
    pub fn new(decay: Duration, initial: Duration, now: Instant) -> Self {
        Self { decay: decay.as_secs_f64().max(SHORTEST_DECAY), seconds: initial.as_secs_f64(), at: now }
    }

    /// Takes one measurement.
    pub fn observe(&mut self, rtt: Duration, now: Instant) {
        let rtt = rtt.as_secs_f64();
        let keep = self.keep(now);
        let faded = self.seconds * keep;
        self.seconds = if rtt > faded { rtt } else { faded + rtt * (1.0 - keep) };
        // A peak stays when the glide would take it down (both samples in one instant).
        self.at = self.at.max(now);
    }

    /// Takes a lower bound: raises the estimate, never lowers it.
    pub fn at_least(&mut self, rtt: Duration, now: Instant) {
        if rtt > self.get(now) {
            self.observe(rtt, now);
        }
    }

    /// The estimate now.
    pub fn get(&self, now: Instant) -> Duration {
        Duration::from_secs_f64(self.seconds * self.keep(now))
    }

    /// Changes the time constant; the estimate stays.
    pub fn set_decay(&mut self, decay: Duration) {
        self.decay = decay.as_secs_f64().max(SHORTEST_DECAY);
    }

    /// The time constant.
    pub fn decay(&self) -> Duration {
        Duration::from_secs_f64(self.decay)
    }

    /// Seconds before fading: [`Ewma::get`] is this times [`Ewma::keep`].
    pub(crate) fn seconds(&self) -> f64 {
        self.seconds
    }

    /// The share that has not faded since the last measurement.
    pub(crate) fn keep(&self, now: Instant) -> f64 {
        let idle = now.saturating_duration_since(self.at).as_secs_f64();
        (-idle / self.decay).exp()
    }
}

const SHORTEST_DECAY: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    const S: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn jumps_up_at_once() {
        let t = origin();
        let mut e = Ewma::new(10 * S, 30 * MS, t);
        e.observe(500 * MS, t + MS);
        assert!(e.get(t + MS) > 499 * MS);
    }

    #[test]
    fn glides_down_over_the_decay() {
        let t = origin();
        let mut e = Ewma::new(10 * S, S, t);
        for i in 1..=100 {
            e.observe(10 * MS, t + i * 100 * MS);
        }
        let got = e.get(t + 10 * S).as_secs_f64();
        // One time constant: 1/e of the old value and the rest of the new.
        assert!((got - (0.3679 + 0.0063)).abs() < 0.01, "{got}");
    }

    #[test]
    fn fades_when_idle_and_reading_changes_nothing() {
        let t = origin();
        let e = Ewma::new(10 * S, S, t);
        let first = e.get(t + 20 * S);
        assert_eq!(first, e.get(t + 20 * S));
        assert!((first.as_secs_f64() - 0.1353).abs() < 0.001);
        assert_eq!(e.get(t), S);
    }

    #[test]
    fn lower_bounds_only_raise() {
        let t = origin();
        let mut e = Ewma::new(10 * S, 100 * MS, t);
        e.at_least(10 * MS, t);
        assert_eq!(e.get(t), 100 * MS);
        e.at_least(S, t);
        assert_eq!(e.get(t), S);
    }

    #[test]
    fn time_that_runs_backwards_is_harmless() {
        let t = origin() + S;
        let mut e = Ewma::new(10 * S, 100 * MS, t);
        e.observe(50 * MS, t - S);
        assert!(e.get(t) <= 100 * MS && e.get(t) >= 50 * MS);
    }
}
