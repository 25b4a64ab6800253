//! What was counted when: histograms in slots of time, ten minutes of them fine and an hour coarse.
//!
//! Why encoded: a histogram in use takes up to 10 KiB, one at rest a few hundred bytes. The open slots are in use, and
//! have a form of their own for it (`counts`).
//!
//! Why whoever has most gives room: what bounds the whole must not be taken from those who report little.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use weft_core::identity::SpiffeId;

use super::{
    bounds::{OVERFLOW, is_recent, less_one},
    counts::Counts,
    histogram,
    parts::{Filter, Key, Open, Parts},
};

/// Everything that was counted within the hour.
pub(super) struct History {
    pub(super) series: Interner,
    fine: Ring,
    coarse: Ring,
    /// All histograms of closed steps together, encoded.
    pub(super) max_bytes: usize,
    /// When the first histogram came: before it there was not nothing, but nothing is known.
    first_ms: Option<u64>,
}

/// Series by number. A number is given away again an hour after its series was last reported: then no step
/// has it any more.
#[derive(Default)]
pub(super) struct Interner {
    keys: Vec<Option<(Key, u64)>>,
    pub(super) ids: HashMap<Key, u32>,
    free: Vec<u32>,
    of: HashMap<SpiffeId, usize>,
}

/// Steps of one width, the newest still open.
struct Ring {
    step_ms: u64,
    kept_ms: u64,
    open_start_ms: u64,
    open: HashMap<u32, Counted>,
    closed: VecDeque<Slot>,
    bytes: usize,
}

struct Slot {
    start_ms: u64,
    bytes: usize,
    samples: HashMap<u32, Sample>,
}

/// What was counted of one series, and is still added to.
#[derive(Default)]
pub(super) struct Counted {
    pub(super) count: u64,
    pub(super) retries: u64,
    pub(super) first_byte: Counts,
    pub(super) duration: Counts,
}

struct Sample {
    count: u64,
    retries: u64,
    first_byte: Vec<u8>,
    duration: Vec<u8>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            series: Interner::default(),
            fine: Ring::new(FINE, FINE_KEPT),
            coarse: Ring::new(COARSE, COARSE_KEPT),
            max_bytes: MAX_BYTES,
            first_ms: None,
        }
    }
}

impl History {
    /// Counts what a sidecar reported of one series.
    pub(super) fn count(&mut self, key: Key, counted: &Counted, now_ms: u64) {
        let id = self.series.id(key, now_ms);
        for ring in [&mut self.fine, &mut self.coarse] {
            ring.open.entry(id).or_default().add(counted);
        }
    }

    /// Something was reported, be it right or not: from now on it is known what there is.
    pub(super) fn begin(&mut self, now_ms: u64) {
        self.first_ms.get_or_insert(now_ms);
    }

    /// What was counted in a window that ends now, when steps that are over have been closed.
    pub(super) fn parts(&self, filter: &Filter, window: Duration, now_ms: u64) -> Parts {
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX).max(1_000);
        let ring = if window_ms <= self.fine.kept_ms { &self.fine } else { &self.coarse };
        // Whole steps: a rate counts the time that its requests come from.
        let since = now_ms.saturating_sub(window_ms);
        let since = since - since % ring.step_ms;
        let mut merged: BTreeMap<Key, BTreeMap<i32, Open>> = BTreeMap::new();
        for (key, id) in &self.series.ids {
            if !filter.admits(key) {
                continue;
            }
            let id = *id;
            let mut total = Open::default();
            ring.collect(id, since, &mut total);
            if total.count > 0 {
                let row = Key { outcome: 0, ..key.clone() };
                merged.entry(row).or_default().insert(key.outcome, total);
            }
        }
        let oldest = ring.oldest_ms().max(self.first_ms.unwrap_or(now_ms));
        let covered_ms = now_ms.saturating_sub(oldest.max(since)).max(1_000);
        Parts { covered_ms, merged }
    }

    /// Forgets series that stand in no step any more. Says how many histograms were too much.
    pub(super) fn forget(&mut self, now_ms: u64) -> u64 {
        // Steps that are too old must be gone before the numbers in them are given away.
        let dropped = self.advance(now_ms);
        let kept = Duration::from_secs(COARSE_KEPT) + COARSE;
        self.series.retain(|last_ms| is_recent(last_ms, now_ms, kept));
        dropped
    }

    /// Encoded histograms of closed steps, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.fine.bytes + self.coarse.bytes
    }

    /// Closes steps that are over; drops what is too old or too much. Says how many histograms were too much.
    pub(super) fn advance(&mut self, now_ms: u64) -> u64 {
        self.fine.advance(now_ms);
        self.coarse.advance(now_ms);
        if self.bytes() > self.max_bytes { self.make_room() } else { 0 }
    }

    /// Drops the oldest histograms of the workloads that have most.
    fn make_room(&mut self) -> u64 {
        let mut dropped = 0;
        let mut bytes_of: HashMap<&SpiffeId, usize> = HashMap::new();
        for slot in self.fine.closed.iter().chain(&self.coarse.closed) {
            for (id, sample) in &slot.samples {
                if let Some(workload) = self.series.workload(*id) {
                    *bytes_of.entry(workload).or_default() += sample.bytes();
                }
            }
        }
        // Everybody may keep the same; a little is made free, so that this is not done at every report.
        let mut all: Vec<usize> = bytes_of.values().copied().collect();
        all.sort_unstable();
        let (mut left, mut share) = (self.max_bytes - self.max_bytes / 8, 0);
        for (position, bytes) in all.iter().enumerate() {
            share = left / (all.len() - position);
            if *bytes > share {
                break;
            }
            left -= bytes;
        }
        let mut above: HashMap<SpiffeId, usize> = bytes_of
            .into_iter()
            .filter(|(_, bytes)| *bytes > share)
            .map(|(workload, bytes)| (workload.clone(), bytes - share))
            .collect();
        // Steps in order of age, whichever their width.
        let slots = self.fine.closed.iter().map(|slot| (slot.start_ms, false));
        let mut slots: Vec<_> =
            slots.chain(self.coarse.closed.iter().map(|slot| (slot.start_ms, true))).collect();
        slots.sort_unstable();
        for (start_ms, coarse) in slots {
            let ring = if coarse { &mut self.coarse } else { &mut self.fine };
            let Some(slot) = ring.closed.iter_mut().find(|slot| slot.start_ms == start_ms) else { continue };
            let (before, count) = (slot.bytes, slot.samples.len());
            slot.samples.retain(|id, sample| {
                let above = self.series.workload(*id).and_then(|workload| above.get_mut(workload));
                let Some(above) = above.filter(|above| **above > 0) else { return true };
                *above = above.saturating_sub(sample.bytes());
                slot.bytes -= sample.bytes();
                false
            });
            ring.bytes -= before - slot.bytes;
            dropped += (count - slot.samples.len()) as u64;
        }
        dropped
    }
}

impl Interner {
    fn id(&mut self, key: Key, now_ms: u64) -> u32 {
        if let Some(id) = self.ids.get(&key) {
            return self.seen(*id, now_ms);
        }
        let own = self.of.get(&key.workload).copied().unwrap_or_default();
        let key = if self.ids.len() < MAX_SERIES && own < MAX_SERIES_OF_ONE {
            key
        } else {
            // Nothing of the reporter's making: few a workload, by direction and outcome.
            let overflow: Arc<str> = OVERFLOW.into();
            Key {
                parent: overflow.clone(),
                route: overflow.clone(),
                backend: overflow.clone(),
                protocol: overflow,
                ..key
            }
        };
        if let Some(id) = self.ids.get(&key) {
            return self.seen(*id, now_ms);
        }
        *self.of.entry(key.workload.clone()).or_default() += 1;
        let id = self.free.pop().unwrap_or_else(|| {
            self.keys.push(None);
            u32::try_from(self.keys.len() - 1).unwrap_or(u32::MAX)
        });
        self.ids.insert(key.clone(), id);
        if let Some(slot) = self.keys.get_mut(id as usize) {
            *slot = Some((key, now_ms));
        }
        id
    }

    fn seen(&mut self, id: u32, now_ms: u64) -> u32 {
        if let Some(Some((_, last_ms))) = self.keys.get_mut(id as usize) {
            *last_ms = (*last_ms).max(now_ms);
        }
        id
    }

    fn workload(&self, id: u32) -> Option<&SpiffeId> {
        self.keys.get(id as usize)?.as_ref().map(|(key, _)| &key.workload)
    }

    /// Keeps the series that were last reported at a time that `keep` likes.
    fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        for (id, slot) in (0..).zip(&mut self.keys) {
            if let Some((key, _)) = slot.take_if(|(_, last_ms)| !keep(*last_ms)) {
                self.ids.remove(&key);
                self.free.push(id);
                less_one(&mut self.of, &key.workload);
            }
        }
    }
}

impl Ring {
    fn new(step: Duration, kept_s: u64) -> Self {
        Self {
            step_ms: u64::try_from(step.as_millis()).unwrap_or(u64::MAX),
            kept_ms: kept_s * 1_000,
            open_start_ms: 0,
            open: HashMap::new(),
            closed: VecDeque::new(),
            bytes: 0,
        }
    }

    fn advance(&mut self, now_ms: u64) {
        let start = now_ms - now_ms % self.step_ms;
        // A clock that went back leaves the open step open.
        if start > self.open_start_ms {
            let samples: HashMap<u32, Sample> =
                self.open.drain().map(|(id, open)| (id, Sample::of(&open))).collect();
            if !samples.is_empty() {
                let bytes = samples.values().map(Sample::bytes).sum();
                self.bytes += bytes;
                self.closed.push_back(Slot { start_ms: self.open_start_ms, bytes, samples });
            }
            self.open_start_ms = start;
        }
        while self.closed.front().is_some_and(|slot| slot.start_ms + self.kept_ms <= start) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(slot) = self.closed.pop_front() {
            self.bytes -= slot.bytes;
        }
    }

    fn oldest_ms(&self) -> u64 {
        self.closed.front().map_or(self.open_start_ms, |slot| slot.start_ms)
    }

    /// Adds what one series has since a time: whole steps, the one that `since` falls into included.
    fn collect(&self, id: u32, since: u64, total: &mut Open) {
        let slots = self.closed.iter().filter(|slot| slot.start_ms + self.step_ms > since);
        for sample in slots.filter_map(|slot| slot.samples.get(&id)) {
            total.add(&sample.open());
        }
        if let Some(open) = self.open.get(&id) {
            total.add(&Sample::of(open).open());
        }
    }
}

impl Counted {
    fn add(&mut self, more: &Self) {
        self.count = self.count.saturating_add(more.count);
        self.retries = self.retries.saturating_add(more.retries);
        self.first_byte.add(&more.first_byte);
        self.duration.add(&more.duration);
    }
}

impl Sample {
    fn of(counted: &Counted) -> Self {
        Self {
            count: counted.count,
            retries: counted.retries,
            first_byte: counted.first_byte.encode(),
            duration: counted.duration.encode(),
        }
    }

    fn open(&self) -> Open {
        // What was encoded here decodes here.
        let decode = |bytes: &[u8]| histogram::decode(bytes).ok().flatten();
        Open {
            count: self.count,
            retries: self.retries,
            first_byte: decode(&self.first_byte),
            duration: decode(&self.duration),
        }
    }

    fn bytes(&self) -> usize {
        self.first_byte.len() + self.duration.len() + size_of::<Self>() + size_of::<u32>()
    }
}

/// Fine steps: 10 s for 10 minutes.
pub(super) const FINE: Duration = Duration::from_secs(10);
pub(super) const FINE_KEPT: u64 = 10 * 60;
/// Coarse steps: 60 s for an hour.
pub(super) const COARSE: Duration = Duration::from_secs(60);
pub(super) const COARSE_KEPT: u64 = 60 * 60;
/// All histograms of closed steps together, encoded.
pub(super) const MAX_BYTES: usize = 32 * 1024 * 1024;
/// Distinct series, and those of one workload; the rest is counted under the overflow route.
pub(super) const MAX_SERIES: usize = 20_000;
pub(super) const MAX_SERIES_OF_ONE: usize = 2_000;
