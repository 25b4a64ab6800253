//! A local rate limit: so many requests per second, with a burst.
//!
//! GCRA, "leaky bucket as a meter": the whole state is the theoretical arrival time of the next
//! request, one atomic that all workers of the pod share. No refill task, no lock, and a refusal
//! knows exactly when to come back (`retry-after`).

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The limit and its state.
#[derive(Debug)]
pub struct Limit {
    /// Nanoseconds between two requests at the full rate; `None`: nothing passes.
    interval: Option<u64>,
    /// Nanoseconds that a burst may run ahead.
    ahead: u64,
    origin: OnceLock<Instant>,
    /// Theoretical arrival time, in nanoseconds since `origin`.
    arrival: AtomicU64,
}

impl Limit {
    /// `rate_per_s` requests a second, `burst` of them at once (at least 1). A rate that is not above
    /// zero lets nothing pass.
    pub fn new(rate_per_s: f64, burst: u32) -> Self {
        let interval = (rate_per_s > 0.0).then(|| (1e9 / rate_per_s).clamp(1.0, LONGEST_INTERVAL) as u64);
        let ahead = interval.unwrap_or(0).saturating_mul(u64::from(burst.max(1) - 1));
        Self { interval, ahead, origin: OnceLock::new(), arrival: AtomicU64::new(0) }
    }

    /// Lets one request pass.
    ///
    /// # Errors
    /// How long until one would pass.
    pub fn allow(&self, now: Instant) -> Result<(), Duration> {
        let interval = self.interval.ok_or(Duration::MAX)?;
        let origin = *self.origin.get_or_init(|| now);
        let now = now.saturating_duration_since(origin).as_nanos() as u64;
        let mut arrival = self.arrival.load(Ordering::Relaxed);
        loop {
            if arrival > now.saturating_add(self.ahead) {
                return Err(Duration::from_nanos(arrival - now - self.ahead));
            }
            let next = arrival.max(now).saturating_add(interval);
            match self.arrival.compare_exchange_weak(arrival, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(seen) => arrival = seen,
            }
        }
    }
}

/// A day: slower limits are not rates.
const LONGEST_INTERVAL: f64 = 86_400e9;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_burst_then_the_rate() {
        let t = origin();
        let limit = Limit::new(10.0, 5);
        assert_eq!((0..20).filter(|_| limit.allow(t).is_ok()).count(), 5);
        let wait = limit.allow(t).unwrap_err();
        assert_eq!(wait, Duration::from_millis(100));
        assert!(limit.allow(t + wait - Duration::from_nanos(1)).is_err());
        assert!(limit.allow(t + wait).is_ok());
    }

    #[test]
    fn no_rate_lets_nothing_pass() {
        let t = origin();
        for rate in [0.0, -1.0, f64::NAN] {
            assert_eq!(Limit::new(rate, 10).allow(t), Err(Duration::MAX));
        }
    }

    proptest! {
        #[test]
        fn never_more_than_rate_and_burst(
            rate in 1.0f64..10_000.0, burst in 1u32..50, waits in prop::collection::vec(0u64..20_000, 1..300)
        ) {
            let t = origin();
            let limit = Limit::new(rate, burst);
            let (mut now, mut passed) = (t, 0u32);
            for wait in waits {
                now += Duration::from_micros(wait);
                match limit.allow(now) {
                    Ok(()) => passed += 1,
                    Err(wait) => {
                        now += wait;
                        prop_assert!(limit.allow(now).is_ok());
                        passed += 1;
                    }
                }
                let most = f64::from(burst) + rate * (now - t).as_secs_f64() * 1.000_1 + 1.0;
                prop_assert!(f64::from(passed) <= most, "{passed} > {most}");
            }
        }
    }
}
