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

mod histogram;
pub mod view;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use weft_core::identity::{PodUid, SpiffeId};
use weft_proto::pb::v1::{self as pb, Direction, OutcomeClass};

use self::view::{EdgeRow, EndpointRow, OutcomeRow, Quantiles, RouteRow, SidecarRow};

/// Fine steps: 10 s for 10 minutes.
const FINE: Duration = Duration::from_secs(10);
const FINE_KEPT: u64 = 10 * 60;
/// Coarse steps: 60 s for an hour.
const COARSE: Duration = Duration::from_secs(60);
const COARSE_KEPT: u64 = 60 * 60;
/// All histograms of closed steps together, encoded.
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// Distinct series, and those of one workload; the rest is counted under the overflow route.
const MAX_SERIES: usize = 20_000;
const MAX_SERIES_OF_ONE: usize = 2_000;
/// Distinct edges, and those of one callee.
const MAX_EDGES: usize = 20_000;
const MAX_EDGES_OF_ONE: usize = 2_000;
/// How long an edge is remembered that is not used.
const EDGE_KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// Failures that are kept with their story, and those of one workload.
const MAX_RECORDS: usize = 10_000;
const MAX_RECORDS_OF_ONE: usize = 1_000;
/// Endpoints that one sidecar describes.
const MAX_ENDPOINTS_OF_ONE: usize = 5_000;
/// Bytes of what one sidecar says is live in it: 20,000 names of a usual length.
const MAX_APPLIED_TEXT: usize = 4 * 1024 * 1024;
/// Bytes of the endpoints that one sidecar describes.
const MAX_ENDPOINT_TEXT: usize = 2 * 1024 * 1024;
/// One text of a report; longer ones are cut.
const MAX_TEXT: usize = 512;
/// Items of one list in one report.
const MAX_ITEMS: usize = 20_000;
/// Resources that one sidecar refuses, with their reasons.
const MAX_NACKED: usize = 1_000;
/// Attempts of one failure.
const MAX_ATTEMPTS: usize = 16;
/// A sidecar that has said nothing for so long is gone.
const SIDECAR_GONE: Duration = Duration::from_secs(90);
/// The name under which everything above a cap is counted.
pub const OVERFLOW: &str = "(overflow)";

/// Who reports: as the certificate says, never as the report says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reporter {
    /// The workload.
    pub identity: SpiffeId,
    /// The pod.
    pub uid: PodUid,
}

/// Everything that sidecars of this controller have said. Times are milliseconds since 1970.
pub struct Store {
    sidecars: BTreeMap<PodUid, Sidecar>,
    series: Interner,
    fine: Ring,
    coarse: Ring,
    edges: HashMap<EdgeKey, EdgeCount>,
    /// How many of them each callee has.
    edges_of: HashMap<SpiffeId, usize>,
    records: Records,
    /// All histograms of closed steps together, encoded.
    max_bytes: usize,
    /// When the first histogram came: before it there was not nothing, but nothing is known.
    first_ms: Option<u64>,
    /// What was left out because a bound was reached.
    pub dropped: u64,
    /// Reports that arrived a second time.
    pub repeated: u64,
    /// Histograms that were refused: not ours, or too large.
    pub refused: u64,
}

struct Sidecar {
    reporter: Reporter,
    session: String,
    sequence: u64,
    last_seen_ms: u64,
    gauges: pb::Gauges,
    /// (type URL, name) → version that is live there.
    applied: BTreeMap<(String, String), String>,
    /// Bytes of these.
    applied_text: usize,
    /// (type URL, name) → (version, reason) of what it refused and has not accepted since.
    nacked: BTreeMap<(String, String), (String, String)>,
    endpoints: Vec<pb::EndpointState>,
    dropped: u64,
}

/// What one series is about; merged over all pods of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    workload: SpiffeId,
    direction: i32,
    parent: Arc<str>,
    route: Arc<str>,
    backend: Arc<str>,
    protocol: Arc<str>,
    outcome: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EdgeKey {
    callee: SpiffeId,
    caller: String,
    service: String,
    method: String,
    mtls: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct EdgeCount {
    count: u64,
    errors: u64,
    first_ms: u64,
    last_ms: u64,
}

/// Series by number. A number is given away again an hour after its series was last reported: then no step
/// has it any more.
#[derive(Default)]
struct Interner {
    keys: Vec<Option<(Key, u64)>>,
    ids: HashMap<Key, u32>,
    free: Vec<u32>,
    of: HashMap<SpiffeId, usize>,
}

/// Failures, the newest last.
#[derive(Default)]
struct Records {
    all: BTreeMap<u64, (SpiffeId, pb::DecisionRecord)>,
    of: HashMap<SpiffeId, VecDeque<u64>>,
    next: u64,
}

/// Steps of one width, the newest still open.
struct Ring {
    step_ms: u64,
    kept_ms: u64,
    open_start_ms: u64,
    open: HashMap<u32, Open>,
    closed: VecDeque<Slot>,
    bytes: usize,
}

/// What was counted in a window, with its histograms.
#[derive(Default)]
pub struct Parts {
    covered_ms: u64,
    merged: BTreeMap<Key, BTreeMap<i32, Open>>,
}

/// [`Parts`] between controllers.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WireParts {
    covered_ms: u64,
    series: Vec<WirePart>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct WirePart {
    workload: String,
    direction: i32,
    parent: String,
    route: String,
    backend: String,
    protocol: String,
    outcome: i32,
    count: u64,
    retries: u64,
    first_byte: String,
    duration: String,
}

impl Parts {
    /// For another controller.
    pub fn wire(&self) -> WireParts {
        let encode = |histogram: &Option<Histogram<u64>>| {
            BASE64.encode(histogram.as_ref().map(histogram::encode).unwrap_or_default())
        };
        let part = |key: &Key, outcome: i32, open: &Open| WirePart {
            workload: key.workload.to_string(),
            direction: key.direction,
            parent: key.parent.to_string(),
            route: key.route.to_string(),
            backend: key.backend.to_string(),
            protocol: key.protocol.to_string(),
            outcome,
            count: open.count,
            retries: open.retries,
            first_byte: encode(&open.first_byte),
            duration: encode(&open.duration),
        };
        let series = self.merged.iter().flat_map(|(key, outcomes)| {
            outcomes.iter().map(move |(outcome, open)| part(key, *outcome, open))
        });
        WireParts { covered_ms: self.covered_ms, series: series.collect() }
    }

    /// Adds what another controller counted in the same window: histograms bucket by bucket, so that a quantile of the
    /// sum is that of all requests.
    pub fn add(&mut self, other: WireParts) {
        self.covered_ms = self.covered_ms.max(other.covered_ms);
        for part in other.series {
            let Ok(workload) = part.workload.parse() else { continue };
            let key = Key {
                workload,
                direction: part.direction,
                parent: part.parent.into(),
                route: part.route.into(),
                backend: part.backend.into(),
                protocol: part.protocol.into(),
                outcome: 0,
            };
            let total = self.merged.entry(key).or_default().entry(part.outcome).or_default();
            total.count = total.count.saturating_add(part.count);
            total.retries = total.retries.saturating_add(part.retries);
            let decode = |text: &str| histogram::decode(&BASE64.decode(text).ok()?).ok().flatten();
            add(&mut total.first_byte, decode(&part.first_byte).as_ref());
            add(&mut total.duration, decode(&part.duration).as_ref());
        }
    }

    /// For people.
    pub fn rows(self) -> Vec<RouteRow> {
        let covered_ms = self.covered_ms.max(1_000);
        self.merged.into_iter().map(|(key, outcomes)| row(&key, outcomes, covered_ms)).collect()
    }
}

#[derive(Default)]
struct Open {
    count: u64,
    retries: u64,
    first_byte: Option<Histogram<u64>>,
    duration: Option<Histogram<u64>>,
}

struct Slot {
    start_ms: u64,
    bytes: usize,
    samples: HashMap<u32, Sample>,
}

struct Sample {
    count: u64,
    retries: u64,
    first_byte: Vec<u8>,
    duration: Vec<u8>,
}

/// Which routes to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// `<ns>/<name>` or `<ns>/<name>:<port>`, as parent or backend.
    pub service: Option<String>,
    /// `<ns>` or `<ns>/<service account>` of the reporting workload.
    pub workload: Option<String>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            sidecars: BTreeMap::new(),
            series: Interner::default(),
            fine: Ring::new(FINE, FINE_KEPT),
            coarse: Ring::new(COARSE, COARSE_KEPT),
            edges: HashMap::new(),
            edges_of: HashMap::new(),
            records: Records::default(),
            max_bytes: MAX_BYTES,
            first_ms: None,
            dropped: 0,
            repeated: 0,
            refused: 0,
        }
    }
}

impl Store {
    /// Takes one report; returns the sequence to acknowledge. A report that was counted before is only
    /// acknowledged again.
    pub fn report(&mut self, reporter: &Reporter, report: pb::ReportRequest, now_ms: u64) -> u64 {
        self.advance(now_ms);
        let sidecar = self.sidecars.entry(reporter.uid.clone()).or_insert_with(|| Sidecar {
            reporter: reporter.clone(),
            session: String::new(),
            sequence: 0,
            last_seen_ms: now_ms,
            gauges: pb::Gauges::default(),
            applied: BTreeMap::new(),
            applied_text: 0,
            nacked: BTreeMap::new(),
            endpoints: Vec::new(),
            dropped: 0,
        });
        sidecar.last_seen_ms = now_ms;
        let session = cut(report.session);
        if sidecar.session != session {
            // Started anew: what was live in the process before is not known to be live in this one.
            sidecar.session = session;
            sidecar.sequence = 0;
            sidecar.applied.clear();
            sidecar.applied_text = 0;
            sidecar.nacked.clear();
        } else if report.sequence <= sidecar.sequence {
            self.repeated += 1;
            return sidecar.sequence;
        }
        sidecar.sequence = report.sequence;
        sidecar.dropped = sidecar.dropped.saturating_add(report.dropped);
        self.dropped = self.dropped.saturating_add(sidecar.take_delivery(report.applied, report.nacked));
        if let Some(gauges) = report.gauges {
            sidecar.gauges = pb::Gauges { version: cut(gauges.version), ..gauges };
        }
        if !report.endpoints.is_empty() || !report.routes.is_empty() {
            let told = report.endpoints.len();
            let endpoints = report.endpoints.into_iter().take(MAX_ENDPOINTS_OF_ONE).map(cut_endpoint);
            let within = endpoints.scan(0_usize, |text, endpoint| {
                *text += prost::Message::encoded_len(&endpoint);
                (*text <= MAX_ENDPOINT_TEXT).then_some(endpoint)
            });
            sidecar.endpoints = within.collect();
            let left_out = told - sidecar.endpoints.len();
            self.dropped = self.dropped.saturating_add(left_out as u64);
        }
        if !report.routes.is_empty() {
            self.first_ms.get_or_insert(now_ms);
        }
        for route in report.routes.into_iter().take(MAX_ITEMS) {
            self.route(reporter, route, now_ms);
        }
        for edge in report.edges.into_iter().take(MAX_ITEMS) {
            self.edge(reporter, edge, now_ms);
        }
        for record in report.records.into_iter().take(MAX_ITEMS) {
            self.dropped += u64::from(self.records.push(&reporter.identity, cut_record(record)));
        }
        report.sequence
    }

    /// A sidecar's streams have ended; it is forgotten when it does not come back. So are series that stand in
    /// no step any more, and edges that were not used for a day.
    pub fn forget_gone(&mut self, now_ms: u64) {
        let is_recent = |at: u64, kept: Duration| {
            now_ms.saturating_sub(at) < u64::try_from(kept.as_millis()).unwrap_or(u64::MAX)
        };
        self.sidecars.retain(|_, sidecar| is_recent(sidecar.last_seen_ms, SIDECAR_GONE));
        // Steps that are too old must be gone before the numbers in them are given away.
        self.advance(now_ms);
        self.series.retain(|last_ms| is_recent(last_ms, Duration::from_secs(COARSE_KEPT) + COARSE));
        let edges_of = &mut self.edges_of;
        self.edges.retain(|key, count| {
            let kept = is_recent(count.last_ms, EDGE_KEPT);
            if !kept {
                less_one(edges_of, &key.callee);
            }
            kept
        });
    }

    /// The version of one resource that is live in each sidecar that reported it.
    pub fn applied(&self, type_url: &str, name: &str) -> BTreeMap<PodUid, String> {
        let key = (type_url.to_owned(), name.to_owned());
        let live = self.sidecars.iter();
        live.filter_map(|(uid, sidecar)| Some((uid.clone(), sidecar.applied.get(&key)?.clone()))).collect()
    }

    /// The version of one resource that is live in one sidecar.
    pub fn live(&self, uid: &PodUid, type_url: &str, name: &str) -> Option<&str> {
        let key = (type_url.to_owned(), name.to_owned());
        self.sidecars.get(uid)?.applied.get(&key).map(String::as_str)
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
        self.records.all.values().map(|(_, record)| record)
    }

    /// The routes of a window that ends now, one row a (workload, direction, parent, route, backend).
    pub fn routes(&mut self, filter: &Filter, window: Duration, now_ms: u64) -> Vec<RouteRow> {
        self.parts(filter, window, now_ms).rows()
    }

    /// The same, as it can be added to what other controllers have.
    pub fn parts(&mut self, filter: &Filter, window: Duration, now_ms: u64) -> Parts {
        self.advance(now_ms);
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

    /// Who calls whom.
    pub fn edges(&self) -> Vec<EdgeRow> {
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
        let mut rows: Vec<_> = self.edges.iter().map(row).collect();
        rows.sort_by(|a, b| (&a.callee, &a.caller, &a.method).cmp(&(&b.callee, &b.caller, &b.method)));
        rows
    }

    /// Endpoints as the sidecars that use them see them.
    pub fn endpoints(&self) -> Vec<EndpointRow> {
        let mut rows: Vec<_> = self.sidecars.values().flat_map(Sidecar::endpoint_rows).collect();
        rows.sort_by(|a, b| (&a.backend, &a.address, &a.seen_by).cmp(&(&b.backend, &b.address, &b.seen_by)));
        rows
    }

    /// The sidecars that report here.
    pub fn sidecars(&self, now_ms: u64) -> Vec<SidecarRow> {
        let row = |sidecar: &Sidecar| SidecarRow {
            identity: sidecar.reporter.identity.to_string(),
            uid: sidecar.reporter.uid.to_string(),
            version: sidecar.gauges.version.clone(),
            rss_bytes: sidecar.gauges.rss_bytes,
            connections: sidecar.gauges.connections,
            certificate_not_after: sidecar.gauges.certificate_not_after,
            last_seen_s: now_ms.saturating_sub(sidecar.last_seen_ms) / 1_000,
            applied: sidecar.applied.len(),
            nacked: sidecar.nacked.len(),
            dropped: sidecar.dropped,
        };
        self.sidecars.values().map(row).collect()
    }

    /// Encoded histograms of closed steps, in bytes.
    pub fn bytes(&self) -> usize {
        self.fine.bytes + self.coarse.bytes
    }

    /// Closes steps that are over; drops what is too old or too much.
    fn advance(&mut self, now_ms: u64) {
        self.fine.advance(now_ms);
        self.coarse.advance(now_ms);
        if self.bytes() > self.max_bytes {
            self.make_room();
        }
    }

    /// Drops the oldest histograms of the workloads that have most.
    fn make_room(&mut self) {
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
            self.dropped += (count - slot.samples.len()) as u64;
        }
    }

    fn route(&mut self, reporter: &Reporter, route: pb::RouteDelta, now_ms: u64) {
        let known = Direction::try_from(route.direction).is_ok_and(|d| d != Direction::Unspecified)
            && OutcomeClass::try_from(route.outcome).is_ok_and(|o| o != OutcomeClass::Unspecified);
        let first_byte = histogram::decode(&route.first_byte);
        let duration = histogram::decode(&route.duration);
        let (true, Ok(first_byte), Ok(duration)) = (known, first_byte, duration) else {
            self.refused += 1;
            return;
        };
        let key = Key {
            workload: reporter.identity.clone(),
            direction: route.direction,
            parent: cut(route.parent).into(),
            route: cut(route.route).into(),
            backend: cut(route.backend).into(),
            protocol: cut(route.protocol).into(),
            outcome: route.outcome,
        };
        let id = self.series.id(key, now_ms);
        for ring in [&mut self.fine, &mut self.coarse] {
            let open = ring.open.entry(id).or_default();
            open.count = open.count.saturating_add(route.count);
            open.retries = open.retries.saturating_add(route.retries);
            add(&mut open.first_byte, first_byte.as_ref());
            add(&mut open.duration, duration.as_ref());
        }
    }

    fn edge(&mut self, reporter: &Reporter, edge: pb::Edge, now_ms: u64) {
        let mut key = EdgeKey {
            callee: reporter.identity.clone(),
            caller: cut(edge.caller_identity),
            service: cut(edge.service),
            method: cut(edge.method),
            mtls: edge.mtls,
        };
        let own = self.edges_of.get(&key.callee).copied().unwrap_or_default();
        let full = self.edges.len() >= MAX_EDGES || own >= MAX_EDGES_OF_ONE;
        if full && !self.edges.contains_key(&key) {
            self.dropped += 1;
            // Nothing of the reporter's making: two such edges a workload.
            key.caller = OVERFLOW.to_owned();
            key.service = String::new();
            key.method = String::new();
        }
        if !self.edges.contains_key(&key) {
            *self.edges_of.entry(key.callee.clone()).or_default() += 1;
        }
        let count = self.edges.entry(key).or_default();
        count.count = count.count.saturating_add(edge.count);
        count.errors = count.errors.saturating_add(edge.errors);
        count.last_ms = now_ms;
        if count.first_ms == 0 {
            count.first_ms = now_ms;
        }
    }
}

impl Sidecar {
    /// Says how many names were left out: nobody subscribes to as many as are kept.
    fn take_delivery(&mut self, applied: Vec<pb::Applied>, nacked: Vec<pb::Nacked>) -> u64 {
        let mut left_out = 0;
        for applied in applied.into_iter().take(MAX_ITEMS) {
            let key = (cut(applied.type_url), cut(applied.name));
            self.nacked.remove(&key);
            let names = key.0.len() + key.1.len();
            let before = self.applied.get(&key).map_or(0, |version| names + version.len());
            if applied.removed {
                self.applied.remove(&key);
                self.applied_text -= before;
                continue;
            }
            let version = cut(applied.version);
            let text = self.applied_text - before + names + version.len();
            let has_room = self.applied.len() < MAX_ITEMS || self.applied.contains_key(&key);
            if has_room && text <= MAX_APPLIED_TEXT {
                self.applied.insert(key, version);
                self.applied_text = text;
            } else {
                left_out += 1;
            }
        }
        for nacked in nacked.into_iter().take(MAX_ITEMS) {
            let key = (cut(nacked.type_url), cut(nacked.name));
            if self.nacked.len() < MAX_NACKED || self.nacked.contains_key(&key) {
                self.nacked.insert(key, (cut(nacked.version), cut(nacked.reason)));
            } else {
                left_out += 1;
            }
        }
        left_out
    }

    fn endpoint_rows(&self) -> impl Iterator<Item = EndpointRow> {
        self.endpoints.iter().map(|endpoint| EndpointRow {
            seen_by: self.reporter.uid.to_string(),
            caller: self.reporter.identity.to_string(),
            backend: endpoint.backend.clone(),
            uid: endpoint.uid.clone(),
            address: endpoint.address.clone(),
            cost_ms: endpoint.cost_us as f64 / 1_000.0,
            in_flight: endpoint.in_flight,
            weight: endpoint.weight,
            state: endpoint.state().as_str_name().trim_start_matches("STATE_").to_ascii_lowercase(),
            ejected_for_ms: endpoint.ejected_for_ms,
            reason: endpoint.reason.clone(),
            requests: endpoint.requests,
        })
    }
}

impl Records {
    /// Whether an older one had to go.
    fn push(&mut self, of: &SpiffeId, record: pb::DecisionRecord) -> bool {
        let own = self.of.entry(of.clone()).or_default();
        let oldest = if own.len() >= MAX_RECORDS_OF_ONE {
            own.front().copied()
        } else if self.all.len() >= MAX_RECORDS {
            self.all.keys().next().copied()
        } else {
            None
        };
        own.push_back(self.next);
        self.all.insert(self.next, (of.clone(), record));
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

fn less_one(counts: &mut HashMap<SpiffeId, usize>, of: &SpiffeId) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
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
                self.open.drain().map(|(id, open)| (id, open.close())).collect();
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
            total.count = total.count.saturating_add(sample.count);
            total.retries = total.retries.saturating_add(sample.retries);
            // What was encoded here decodes here.
            add(&mut total.first_byte, histogram::decode(&sample.first_byte).ok().flatten().as_ref());
            add(&mut total.duration, histogram::decode(&sample.duration).ok().flatten().as_ref());
        }
        if let Some(open) = self.open.get(&id) {
            total.count = total.count.saturating_add(open.count);
            total.retries = total.retries.saturating_add(open.retries);
            add(&mut total.first_byte, open.first_byte.as_ref());
            add(&mut total.duration, open.duration.as_ref());
        }
    }
}

impl Open {
    fn close(self) -> Sample {
        Sample {
            count: self.count,
            retries: self.retries,
            first_byte: self.first_byte.as_ref().map(histogram::encode).unwrap_or_default(),
            duration: self.duration.as_ref().map(histogram::encode).unwrap_or_default(),
        }
    }
}

impl Sample {
    fn bytes(&self) -> usize {
        self.first_byte.len() + self.duration.len() + size_of::<Self>() + size_of::<u32>()
    }
}

impl Filter {
    fn admits(&self, key: &Key) -> bool {
        let service = self.service.as_ref().is_none_or(|service| {
            [&key.parent, &key.backend].iter().any(|name| {
                ***name == **service
                    || name.strip_prefix(&**service).is_some_and(|rest| rest.starts_with(':'))
            })
        });
        let workload = self.workload.as_ref().is_none_or(|workload| {
            let (namespace, account) = workload.split_once('/').unwrap_or((workload, ""));
            key.workload.namespace() == namespace
                && (account.is_empty() || key.workload.service_account() == account)
        });
        service && workload
    }
}

fn add(total: &mut Option<Histogram<u64>>, more: Option<&Histogram<u64>>) {
    if let Some(more) = more {
        let total = total.get_or_insert_with(histogram::empty);
        // Cannot fail: the total resizes itself, and both have two digits.
        let _ = total.add(more);
    }
}

fn row(key: &Key, outcomes: BTreeMap<i32, Open>, window_ms: u64) -> RouteRow {
    let mut total = Open::default();
    let mut by_outcome = BTreeMap::new();
    let (mut ok, mut client_error) = (0, 0);
    for (outcome, open) in outcomes {
        let name = match OutcomeClass::try_from(outcome) {
            Ok(OutcomeClass::Ok) => {
                ok = open.count;
                "ok"
            }
            Ok(OutcomeClass::ClientError) => {
                client_error = open.count;
                "client_error"
            }
            Ok(OutcomeClass::ServerError) => "server_error",
            Ok(OutcomeClass::Proxy | OutcomeClass::Unspecified) | Err(_) => "proxy",
        };
        total.count = total.count.saturating_add(open.count);
        total.retries = total.retries.saturating_add(open.retries);
        add(&mut total.first_byte, open.first_byte.as_ref());
        add(&mut total.duration, open.duration.as_ref());
        let duration = open.duration.as_ref().map(Quantiles::of).unwrap_or_default();
        by_outcome.insert(name.to_owned(), OutcomeRow { count: open.count, duration });
    }
    RouteRow {
        workload: format!("{}/{}", key.workload.namespace(), key.workload.service_account()),
        direction: if key.direction == Direction::Inbound as i32 { "inbound" } else { "outbound" }.to_owned(),
        parent: key.parent.to_string(),
        route: key.route.to_string(),
        backend: key.backend.to_string(),
        protocol: key.protocol.to_string(),
        count: total.count,
        retries: total.retries,
        rate: total.count as f64 * 1_000.0 / window_ms as f64,
        // The caller's own mistakes are no failure of the route.
        success_rate: ok.saturating_add(client_error) as f64 / total.count.max(1) as f64,
        first_byte: total.first_byte.as_ref().map(Quantiles::of).unwrap_or_default(),
        duration: total.duration.as_ref().map(Quantiles::of).unwrap_or_default(),
        buckets: total.duration.as_ref().map(view::buckets).unwrap_or_default(),
        by_outcome,
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

fn cut_endpoint(endpoint: pb::EndpointState) -> pb::EndpointState {
    pb::EndpointState {
        backend: cut(endpoint.backend),
        uid: cut(endpoint.uid),
        address: cut(endpoint.address),
        reason: cut(endpoint.reason),
        ..endpoint
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let mut end = MAX_TEXT;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        // The rest must not stay allocated behind what is kept.
        text.shrink_to_fit();
    }
    text
}

#[cfg(test)]
mod tests;
