//! Failures with their story, the newest of each workload.

use std::collections::{BTreeMap, HashMap, VecDeque};

use weft_core::identity::SpiffeId;
use weft_proto::pb::v1 as pb;

use super::bounds::cut;

/// Failures, the newest last.
#[derive(Default)]
pub(super) struct Records {
    all: BTreeMap<u64, (SpiffeId, pb::DecisionRecord)>,
    of: HashMap<SpiffeId, VecDeque<u64>>,
    next: u64,
}

impl Records {
    /// Keeps a failure. Whether an older one had to go.
    pub(super) fn push(&mut self, of: &SpiffeId, record: pb::DecisionRecord) -> bool {
        let own = self.of.entry(of.clone()).or_default();
        let oldest = if own.len() >= MAX_RECORDS_OF_ONE {
            own.front().copied()
        } else if self.all.len() >= MAX_RECORDS {
            self.all.keys().next().copied()
        } else {
            None
        };
        own.push_back(self.next);
        self.all.insert(self.next, (of.clone(), cut_record(record)));
        self.next += 1;
        let dropped = oldest.and_then(|oldest| self.all.remove(&oldest));
        if let Some((owner, _)) = &dropped
            && let Some(own) = self.of.get_mut(owner)
        {
            // The oldest of all is the oldest of its owner's.
            own.pop_front();
            if own.is_empty() {
                self.of.remove(owner);
            }
        }
        dropped.is_some()
    }

    /// The newest last.
    pub(super) fn all(&self) -> impl DoubleEndedIterator<Item = &pb::DecisionRecord> {
        self.all.values().map(|(_, record)| record)
    }
}

/// Every text of a kept failure is bounded: ten thousand of them are kept.
fn cut_record(record: pb::DecisionRecord) -> pb::DecisionRecord {
    let attempt = |attempt: pb::Attempt| pb::Attempt {
        endpoint: cut(attempt.endpoint),
        outcome: cut(attempt.outcome),
        ..attempt
    };
    pb::DecisionRecord {
        request_id: cut(record.request_id),
        caller_identity: cut(record.caller_identity),
        service: cut(record.service),
        method: cut(record.method),
        route: cut(record.route),
        verdict: cut(record.verdict),
        reason: cut(record.reason),
        attempts: record.attempts.into_iter().take(MAX_ATTEMPTS).map(attempt).collect(),
        ..record
    }
}

/// Failures that are kept with their story, and those of one workload.
pub(super) const MAX_RECORDS: usize = 10_000;
pub(super) const MAX_RECORDS_OF_ONE: usize = 1_000;
/// Attempts of one failure.
pub(super) const MAX_ATTEMPTS: usize = 16;
