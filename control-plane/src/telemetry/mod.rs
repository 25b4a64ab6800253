//! What sidecars say, merged and kept within bounds: histograms, edges, endpoints, and what is live where.
//!
//! Why this is exact: a sidecar sends histograms (not percentiles), a merge adds their counts bucket by bucket,
//! and a report that is sent again is recognised by its sequence. So the p99 of a route over forty pods is the
//! p99 of all their requests, not a mean of forty p99s.
//!
//! Why it is bounded: every part of it comes from outside. Histograms live in slots of time, encoded; when the
//! bytes run out the oldest of whoever has most goes, and that is counted. Series, edges, failures and sidecars
//! have hard caps, each workload's far below everybody's together, so that one that reports nonsense takes
//! nobody else's room; what is above a cap is counted under one overflow name. What nobody reports any more is
//! forgotten.
//!
//! It is told the time and does no IO; `serve/telemetry.rs` feeds it and `api` reads it.

mod bounds;
mod counts;
mod edges;
mod histogram;
mod history;
mod parts;
mod records;
mod sidecar;
mod texts;
pub mod view;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use weft_core::identity::{PodUid, SpiffeId};
use weft_proto::pb::v1::{self as pb, Direction, OutcomeClass};

pub use bounds::OVERFLOW;
pub use parts::{Filter, Parts, WireParts};
pub use sidecar::Reporter;

use bounds::{MAX_ITEMS, cut};
use counts::Counts;
use edges::Edges;
use history::{Counted, History};
use parts::Key;
use records::Records;
use sidecar::Sidecar;
use texts::Texts;
use view::{EdgeRow, EndpointRow, RouteRow, SidecarRow};

/// Everything that sidecars of this controller have said. Times are milliseconds since 1970.
#[derive(Default)]
pub struct Store {
    sidecars: BTreeMap<PodUid, Sidecar>,
    history: History,
    edges: Edges,
    records: Records,
    texts: Texts,
    /// What was left out because a bound was reached.
    pub dropped: u64,
    /// Reports that arrived a second time.
    pub repeated: u64,
    /// Histograms that were refused: not ours, or too large.
    pub refused: u64,
}

impl Store {
    /// Takes one report; returns the sequence to acknowledge. A report that was counted before is only
    /// acknowledged again.
    pub fn report(&mut self, reporter: &Reporter, report: pb::ReportRequest, now_ms: u64) -> u64 {
        self.dropped += self.history.advance(now_ms);
        let sidecar =
            self.sidecars.entry(reporter.uid.clone()).or_insert_with(|| Sidecar::new(reporter, now_ms));
        if !sidecar.begin(report.session, report.sequence, now_ms) {
            self.repeated += 1;
            return sidecar.sequence;
        }
        sidecar.dropped = sidecar.dropped.saturating_add(report.dropped);
        self.dropped = self.dropped.saturating_add(sidecar.take_delivery(
            report.applied,
            report.nacked,
            &mut self.texts,
        ));
        if let Some(gauges) = report.gauges {
            sidecar.gauges = pb::Gauges { version: cut(gauges.version), ..gauges };
        }
        if !report.endpoints.is_empty() || !report.routes.is_empty() {
            self.dropped =
                self.dropped.saturating_add(sidecar.take_endpoints(report.endpoints, &mut self.texts));
        }
        if !report.routes.is_empty() {
            self.history.begin(now_ms);
        }
        for route in report.routes.into_iter().take(MAX_ITEMS) {
            self.route(&reporter.identity, route, now_ms);
        }
        for edge in report.edges.into_iter().take(MAX_ITEMS) {
            self.dropped += u64::from(self.edges.count(&reporter.identity, edge, now_ms));
        }
        for record in report.records.into_iter().take(MAX_ITEMS) {
            self.dropped += u64::from(self.records.push(&reporter.identity, record));
        }
        report.sequence
    }

    fn route(&mut self, workload: &SpiffeId, route: pb::RouteDelta, now_ms: u64) {
        let known = Direction::try_from(route.direction).is_ok_and(|d| d != Direction::Unspecified)
            && OutcomeClass::try_from(route.outcome).is_ok_and(|o| o != OutcomeClass::Unspecified);
        let first_byte = Counts::read(&route.first_byte);
        let duration = Counts::read(&route.duration);
        let (true, Ok(first_byte), Ok(duration)) = (known, first_byte, duration) else {
            self.refused += 1;
            return;
        };
        let key = Key {
            workload: workload.clone(),
            direction: route.direction,
            parent: cut(route.parent).into(),
            route: cut(route.route).into(),
            backend: cut(route.backend).into(),
            protocol: cut(route.protocol).into(),
            outcome: route.outcome,
        };
        let counted = Counted { count: route.count, retries: route.retries, first_byte, duration };
        self.history.count(key, &counted, now_ms);
    }

    /// A sidecar's streams have ended; it is forgotten when it does not come back. So are series that stand in
    /// no step any more, and edges that were not used for a day.
    pub fn forget_gone(&mut self, now_ms: u64) {
        self.sidecars.retain(|_, sidecar| sidecar.is_there(now_ms));
        self.dropped += self.history.forget(now_ms);
        self.edges.forget(now_ms);
        self.texts.tidy();
    }

    /// The version of one resource that is live in each sidecar that reported it.
    pub fn applied(&self, type_url: &str, name: &str) -> BTreeMap<PodUid, String> {
        let Some(key) = self.resource(type_url, name) else { return BTreeMap::new() };
        let live = self.sidecars.iter();
        live.filter_map(|(uid, sidecar)| Some((uid.clone(), sidecar.applied.get(&key)?.to_string())))
            .collect()
    }

    /// The version of one resource that is live in one sidecar.
    pub fn live(&self, uid: &PodUid, type_url: &str, name: &str) -> Option<&str> {
        self.sidecars.get(uid)?.applied.get(&self.resource(type_url, name)?).map(|version| &**version)
    }

    /// `None`: nobody has spoken of it.
    fn resource(&self, type_url: &str, name: &str) -> Option<(Arc<str>, Arc<str>)> {
        Some((self.texts.known(type_url)?, self.texts.known(name)?))
    }

    /// What sidecars refuse: (pod, type URL, name, version, reason).
    pub fn nacked(&self) -> impl Iterator<Item = (&PodUid, &str, &str, &str, &str)> {
        self.sidecars.iter().flat_map(|(uid, sidecar)| {
            sidecar.nacked.iter().map(move |((type_url, name), (version, reason))| {
                (uid, &**type_url, &**name, &**version, &**reason)
            })
        })
    }

    /// The failures that are kept, the newest last.
    pub fn records(&self) -> impl DoubleEndedIterator<Item = &pb::DecisionRecord> {
        self.records.all()
    }

    /// The routes of a window that ends now, one row a (workload, direction, parent, route, backend).
    pub fn routes(&mut self, filter: &Filter, window: Duration, now_ms: u64) -> Vec<RouteRow> {
        self.parts(filter, window, now_ms).rows()
    }

    /// The same, as it can be added to what other controllers have.
    pub fn parts(&mut self, filter: &Filter, window: Duration, now_ms: u64) -> Parts {
        self.dropped += self.history.advance(now_ms);
        self.history.parts(filter, window, now_ms)
    }

    /// Who calls whom.
    pub fn edges(&self) -> Vec<EdgeRow> {
        self.edges.rows()
    }

    /// Endpoints as the sidecars that use them see them.
    pub fn endpoints(&self) -> Vec<EndpointRow> {
        let mut rows: Vec<_> = self.sidecars.values().flat_map(Sidecar::endpoint_rows).collect();
        rows.sort_by(|a, b| (&a.backend, &a.address, &a.seen_by).cmp(&(&b.backend, &b.address, &b.seen_by)));
        rows
    }

    /// The sidecars that report here.
    pub fn sidecars(&self, now_ms: u64) -> Vec<SidecarRow> {
        self.sidecars.values().map(|sidecar| sidecar.row(now_ms)).collect()
    }

    /// Encoded histograms of closed steps, in bytes.
    pub fn bytes(&self) -> usize {
        self.history.bytes()
    }
}

#[cfg(test)]
mod tests;
