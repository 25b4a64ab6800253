//! The retry budget: what share of requests may be tried again.
//!
//! Why a budget and not only a count per request: a count multiplies load exactly when a service
//! fails everywhere (three tries each is three times the traffic). A budget lets a few failures be
//! repaired and adds at most `ratio` to the load of an outage; the floor `min_per_second` keeps
//! retries alive for callers that send little.
//!
//! Why exact: one budget is shared by all workers of a pod. A withdrawal books first, counts
//! afterwards and undoes itself when the window is overdrawn, so racing workers may refuse one retry
//! too many but never grant one. Withdrawals are summed over one bucket more than deposits; therefore
//! in *every* sliding window `withdrawals <= ratio * deposits + min_per_second * window`, with no slack.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// What share of requests may be tried again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetParams {
    /// Retries per request, on average.
    pub ratio: f64,
    /// Retries per second that are always allowed.
    pub min_per_second: u32,
    /// Over which time both are counted.
    pub window: Duration,
}

/// The budget itself, shared by all workers.
#[derive(Debug)]
pub struct Budget {
    params: BudgetParams,
    start: Instant,
    bucket_nanos: u64,
    reserve: f64,
    deposits: [Count; SLOTS],
    withdrawals: [Count; SLOTS],
}

/// A count that belongs to one epoch: `epoch << COUNT_BITS | count`.
#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Default for BudgetParams {
    fn default() -> Self {
        Self { ratio: 0.2, min_per_second: 10, window: Duration::from_secs(10) }
    }
}

impl Budget {
    /// An empty window. A ratio that is not a number or below zero counts as zero, one above 100 as
    /// 100; the window is kept between 100 ms and one hour.
    pub fn new(params: BudgetParams, now: Instant) -> Self {
        let ratio = if params.ratio.is_nan() { 0.0 } else { params.ratio.clamp(0.0, 100.0) };
        let window = params.window.clamp(SHORTEST_WINDOW, LONGEST_WINDOW);
        Self {
            params: BudgetParams { ratio, window, ..params },
            start: now,
            bucket_nanos: (window.as_nanos() / BUCKETS as u128) as u64,
            reserve: f64::from(params.min_per_second) * window.as_secs_f64(),
            deposits: Default::default(),
            withdrawals: Default::default(),
        }
    }

    /// What it was made with, after bounding.
    pub fn params(&self) -> BudgetParams {
        self.params
    }

    /// One request (its first attempt) was made.
    pub fn deposit(&self, now: Instant) {
        let epoch = self.epoch(now);
        self.deposits[slot(epoch)].add(epoch);
    }

    /// Takes one retry out of the budget, or says that there is none left.
    pub fn try_withdraw(&self, now: Instant) -> bool {
        let epoch = self.epoch(now);
        let booked = self.withdrawals[slot(epoch)].add(epoch);
        let taken = sum(&self.withdrawals, epoch, SLOTS as u64);
        let given = sum(&self.deposits, epoch, BUCKETS as u64);
        if taken as f64 <= self.params.ratio * given as f64 + self.reserve {
            return true;
        }
        self.withdrawals[slot(booked)].undo(booked);
        false
    }

    fn epoch(&self, now: Instant) -> u64 {
        // From SLOTS on, so that a fresh zero is older than any window.
        SLOTS as u64 + now.saturating_duration_since(self.start).as_nanos() as u64 / self.bucket_nanos
    }
}

impl Count {
    /// Counts one in `epoch`, or in the newer epoch that another worker began; says which.
    fn add(&self, epoch: u64) -> u64 {
        let mut seen = self.0.load(Ordering::SeqCst);
        loop {
            let next = match (seen >> COUNT_BITS) < epoch {
                true => epoch << COUNT_BITS | 1,
                false if seen & COUNT_MASK == COUNT_MASK => return seen >> COUNT_BITS,
                false => seen + 1,
            };
            match self.0.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return next >> COUNT_BITS,
                Err(now) => seen = now,
            }
        }
    }

    fn undo(&self, epoch: u64) {
        // Gone already when the slot moved on to a newer epoch.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |seen| {
            (seen >> COUNT_BITS == epoch && seen & COUNT_MASK > 0).then(|| seen - 1)
        });
    }
}

fn slot(epoch: u64) -> usize {
    (epoch % SLOTS as u64) as usize
}

fn sum(counts: &[Count; SLOTS], epoch: u64, buckets: u64) -> u64 {
    let oldest = (epoch + 1).saturating_sub(buckets);
    let seen = counts.iter().map(|c| c.0.load(Ordering::SeqCst));
    seen.filter(|s| s >> COUNT_BITS >= oldest).map(|s| s & COUNT_MASK).sum()
}

/// A tenth of the window is how exactly it slides.
const BUCKETS: usize = 10;
/// One more: a sliding window touches eleven buckets.
const SLOTS: usize = BUCKETS + 1;
/// 268 million a bucket, and 2^36 epochs (21 years of the shortest bucket).
const COUNT_BITS: u32 = 28;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const SHORTEST_WINDOW: Duration = Duration::from_millis(100);
const LONGEST_WINDOW: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn params(ratio: f64, min_per_second: u32, window_ms: u64) -> BudgetParams {
        BudgetParams { ratio, min_per_second, window: Duration::from_millis(window_ms) }
    }

    #[test]
    fn the_floor_is_there_from_the_start_and_no_more() {
        let t = origin();
        let budget = Budget::new(BudgetParams::default(), t);
        assert_eq!((0..1_000).filter(|_| budget.try_withdraw(t)).count(), 100);
    }

    #[test]
    fn a_fifth_of_the_requests() {
        let t = origin();
        let budget = Budget::new(params(0.2, 0, 10_000), t);
        assert!(!budget.try_withdraw(t));
        (0..50).for_each(|_| budget.deposit(t));
        assert_eq!((0..50).filter(|_| budget.try_withdraw(t)).count(), 10);
    }

    #[test]
    fn what_was_taken_comes_back_after_the_window() {
        let t = origin();
        let budget = Budget::new(params(0.0, 1, 1_000), t);
        assert!(budget.try_withdraw(t));
        assert!(!budget.try_withdraw(t + Duration::from_millis(999)));
        assert!(budget.try_withdraw(t + Duration::from_millis(1_101)));
    }

    #[test]
    fn refused_withdrawals_leave_no_trace() {
        let t = origin();
        let budget = Budget::new(params(1.0, 0, 1_000), t);
        (0..100).for_each(|_| assert!(!budget.try_withdraw(t)));
        budget.deposit(t);
        assert!(budget.try_withdraw(t));
    }

    #[test]
    fn odd_parameters_are_bounded() {
        let t = origin();
        let budget = Budget::new(params(f64::NAN, 0, 0), t);
        budget.deposit(t);
        assert!(!budget.try_withdraw(t));
        assert_eq!(budget.params().window, SHORTEST_WINDOW);
    }

    #[test]
    fn workers_that_race_never_overdraw() {
        let t = origin();
        let budget = Budget::new(params(0.2, 10, 10_000), t);
        let granted: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let step = |_: &u32| {
                            budget.deposit(t);
                            budget.try_withdraw(t)
                        };
                        (0..2_000).filter(step).count()
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert!(granted <= 1_600 + 100, "{granted}");
        assert!(granted >= 1_500, "{granted}");
    }

    proptest! {
        /// In every sliding window, against a plain log of what happened.
        #[test]
        fn never_exceeded(
            steps in prop::collection::vec((0u64..400, 0u32..6, 0u32..6), 1..200),
            ratio in 0.0f64..2.0, floor in 0u32..4, window_ms in 100u64..3_000,
        ) {
            let t = origin();
            let budget = Budget::new(params(ratio, floor, window_ms), t);
            let window = Duration::from_millis(window_ms);
            let (mut now, mut deposits, mut withdrawals) = (t, Vec::new(), Vec::new());
            for (wait, requests, retries) in steps {
                now += Duration::from_millis(wait);
                for _ in 0..requests {
                    budget.deposit(now);
                    deposits.push(now);
                }
                for _ in 0..retries {
                    if !budget.try_withdraw(now) {
                        continue;
                    }
                    withdrawals.push(now);
                    let within = |log: &[Instant]| log.iter().filter(|&&at| at + window > now).count() as f64;
                    let most = ratio * within(&deposits) + f64::from(floor) * window.as_secs_f64();
                    prop_assert!(within(&withdrawals) <= most + 1e-9);
                }
            }
        }
    }
}
