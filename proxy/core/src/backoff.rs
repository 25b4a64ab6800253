//! How long to wait before trying again: exponential, jittered, bounded, validated when made.
//!
//! Why jitter *on top* of the schedule: a first wait below `min` would defeat `min`, and what must
//! spread is the crowd. Reconnects of a whole fleet are another matter: nobody waits for any single
//! one, so [`full_jitter`] spreads them over the whole interval.

use std::time::Duration;

use rand_core::RngCore;

use crate::random;

/// A schedule of waits: `min`, twice that, and so on up to `max`, each lengthened by up to `jitter`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    jitter: f64,
}

/// Why three numbers are not a schedule.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum InvalidBackoff {
    /// Without a first wait the schedule never grows.
    #[error("the shortest wait must be above zero")]
    MinIsZero,
    /// The bounds are the wrong way round.
    #[error("the longest wait {max:?} is below the shortest {min:?}")]
    MaxBelowMin {
        /// The shortest.
        min: Duration,
        /// The longest.
        max: Duration,
    },
    /// Jitter is a share of the wait.
    #[error("jitter {0} is not in 0.0..=1.0")]
    Jitter(f64),
    /// So that arithmetic on instants never overflows.
    #[error("the longest wait {0:?} is above one day")]
    TooLong(Duration),
}

impl Backoff {
    /// Between attempts of one request: 25 ms to 250 ms.
    pub const RETRY: Self =
        Self { min: Duration::from_millis(25), max: Duration::from_millis(250), jitter: 0.5 };
    /// How long an endpoint stays ejected: 1 s to 60 s.
    pub const EJECTION: Self =
        Self { min: Duration::from_secs(1), max: Duration::from_secs(60), jitter: 0.5 };

    /// Checks and takes a schedule.
    ///
    /// # Errors
    /// `min` of zero, `max` below `min` or above a day, or `jitter` outside `0.0..=1.0`.
    pub fn try_new(min: Duration, max: Duration, jitter: f64) -> Result<Self, InvalidBackoff> {
        if min.is_zero() {
            return Err(InvalidBackoff::MinIsZero);
        }
        if max < min {
            return Err(InvalidBackoff::MaxBelowMin { min, max });
        }
        if max > LONGEST {
            return Err(InvalidBackoff::TooLong(max));
        }
        if !(0.0..=1.0).contains(&jitter) {
            return Err(InvalidBackoff::Jitter(jitter));
        }
        Ok(Self { min, max, jitter })
    }

    /// The first wait, before jitter.
    pub fn min(&self) -> Duration {
        self.min
    }

    /// The longest wait, before jitter.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The share by which a wait may be lengthened.
    pub fn jitter(&self) -> f64 {
        self.jitter
    }

    /// The wait after `attempt` earlier ones (0: the first): in `base..=base * (1 + jitter)`.
    pub fn delay(&self, attempt: u32, rng: &mut dyn RngCore) -> Duration {
        self.delay_at(attempt, random::unit(rng))
    }

    /// [`Backoff::delay`] with the draw made earlier, in `0.0..=1.0`.
    pub(crate) fn delay_at(&self, attempt: u32, draw: f64) -> Duration {
        let base = doubled(self.min, self.max, attempt);
        base + base.mul_f64(self.jitter * draw)
    }
}

/// A wait anywhere in `0..=min(cap, base * 2^n)`: for a fleet that lost its server all at once.
pub fn full_jitter(base: Duration, cap: Duration, n: u32, rng: &mut dyn RngCore) -> Duration {
    doubled(base, cap, n).mul_f64(random::unit(rng))
}

fn doubled(base: Duration, cap: Duration, n: u32) -> Duration {
    let factor = 1u32.checked_shl(n).unwrap_or(u32::MAX);
    base.saturating_mul(factor).min(cap)
}

const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn refuses_what_is_no_schedule() {
        let ms = Duration::from_millis;
        assert_eq!(Backoff::try_new(ms(0), ms(1), 0.0), Err(InvalidBackoff::MinIsZero));
        assert!(matches!(Backoff::try_new(ms(2), ms(1), 0.0), Err(InvalidBackoff::MaxBelowMin { .. })));
        assert!(matches!(Backoff::try_new(ms(1), ms(2), 1.1), Err(InvalidBackoff::Jitter(_))));
        assert!(matches!(Backoff::try_new(ms(1), ms(2), f64::NAN), Err(InvalidBackoff::Jitter(_))));
        assert!(matches!(Backoff::try_new(ms(1), Duration::MAX, 0.0), Err(InvalidBackoff::TooLong(_))));
        assert!(Backoff::try_new(ms(1), ms(1), 1.0).is_ok());
    }

    #[test]
    fn the_constants_are_valid() {
        for b in [Backoff::RETRY, Backoff::EJECTION] {
            assert_eq!(Backoff::try_new(b.min(), b.max(), b.jitter()), Ok(b));
        }
    }

    proptest! {
        #[test]
        fn waits_stay_in_bounds_and_grow(
            min in 1u64..10_000, span in 0u64..100_000, jitter in 0.0f64..=1.0, attempt in any::<u32>(), seed in any::<u64>()
        ) {
            let b = Backoff::try_new(Duration::from_millis(min), Duration::from_millis(min + span), jitter).unwrap();
            let mut rng = SmallRng::seed_from_u64(seed);
            let got = b.delay(attempt, &mut rng);
            prop_assert!(got >= b.min());
            prop_assert!(got <= b.max().mul_f64(1.0 + jitter) + Duration::from_nanos(1));
            prop_assert!(b.delay_at(attempt, 0.0) <= b.delay_at(attempt.saturating_add(1), 0.0));
            let cap = Duration::from_millis(min + span);
            prop_assert!(full_jitter(Duration::from_millis(min), cap, attempt, &mut rng) <= cap);
        }
    }
}
