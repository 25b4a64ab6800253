//! Who calls whom, as the called pods say: the caller's name is what its certificate says there.

use std::{collections::HashMap, time::Duration};

use weft_core::identity::SpiffeId;
use weft_proto::pb::v1 as pb;

use super::{
    bounds::{OVERFLOW, cut, is_recent, less_one},
    view::EdgeRow,
};

/// Every edge that was used within a day.
#[derive(Default)]
pub(super) struct Edges {
    pub(super) all: HashMap<EdgeKey, EdgeCount>,
    /// How many of them each callee has.
    of: HashMap<SpiffeId, usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct EdgeKey {
    callee: SpiffeId,
    caller: String,
    service: String,
    method: String,
    mtls: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EdgeCount {
    count: u64,
    errors: u64,
    first_ms: u64,
    last_ms: u64,
}

impl Edges {
    /// Counts calls along one edge. Whether there was no room for it, and it is counted with others of its callee.
    pub(super) fn count(&mut self, callee: &SpiffeId, edge: pb::Edge, now_ms: u64) -> bool {
        let mut key = EdgeKey {
            callee: callee.clone(),
            caller: cut(edge.caller_identity),
            service: cut(edge.service),
            method: cut(edge.method),
            mtls: edge.mtls,
        };
        let own = self.of.get(&key.callee).copied().unwrap_or_default();
        let full = self.all.len() >= MAX_EDGES || own >= MAX_EDGES_OF_ONE;
        let overflows = full && !self.all.contains_key(&key);
        if overflows {
            // Nothing of the reporter's making: two such edges a workload.
            key.caller = OVERFLOW.to_owned();
            key.service = String::new();
            key.method = String::new();
        }
        if !self.all.contains_key(&key) {
            *self.of.entry(key.callee.clone()).or_default() += 1;
        }
        let count = self.all.entry(key).or_default();
        count.count = count.count.saturating_add(edge.count);
        count.errors = count.errors.saturating_add(edge.errors);
        count.last_ms = now_ms;
        if count.first_ms == 0 {
            count.first_ms = now_ms;
        }
        overflows
    }

    /// Who calls whom.
    pub(super) fn rows(&self) -> Vec<EdgeRow> {
        let row = |(key, count): (&EdgeKey, &EdgeCount)| EdgeRow {
            caller: key.caller.clone(),
            callee: key.callee.to_string(),
            service: key.service.clone(),
            method: key.method.clone(),
            mtls: key.mtls,
            count: count.count,
            errors: count.errors,
            first_seen_ms: count.first_ms,
            last_seen_ms: count.last_ms,
        };
        let mut rows: Vec<_> = self.all.iter().map(row).collect();
        rows.sort_by(|a, b| (&a.callee, &a.caller, &a.method).cmp(&(&b.callee, &b.caller, &b.method)));
        rows
    }

    /// Forgets edges that were not used for a day.
    pub(super) fn forget(&mut self, now_ms: u64) {
        let of = &mut self.of;
        self.all.retain(|key, count| {
            let kept = is_recent(count.last_ms, now_ms, EDGE_KEPT);
            if !kept {
                less_one(of, &key.callee);
            }
            kept
        });
    }
}

/// Distinct edges, and those of one callee.
pub(super) const MAX_EDGES: usize = 20_000;
pub(super) const MAX_EDGES_OF_ONE: usize = 2_000;
/// How long an edge is remembered that is not used.
pub(super) const EDGE_KEPT: Duration = Duration::from_secs(24 * 60 * 60);
