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
