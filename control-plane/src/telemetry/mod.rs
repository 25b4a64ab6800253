//! What sidecars say, merged and kept within bounds: histograms, edges, endpoints, and what is live where.
//!
//! Why this is exact: a sidecar sends histograms (not percentiles), a merge adds their counts bucket by bucket,
//! and a report that is sent again is recognised by its sequence. So the p99 of a route over forty pods is the
//! p99 of all their requests, not a mean of forty p99s.
//!
//! Why it is bounded: every part of it comes from outside. Histograms live in slots of time, encoded; when the
//! bytes run out the oldest slot goes, and that is counted. Series, edges and sidecars have hard caps, and what
//! is above a cap is counted under one overflow name.
//!
//! It is told the time and does no IO; `serve/telemetry.rs` feeds it and `api` reads it.

mod histogram;
pub mod view;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use hdrhistogram::Histogram;
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
/// Distinct series; the rest is counted under the overflow route.
const MAX_SERIES: usize = 20_000;
/// Distinct edges.
const MAX_EDGES: usize = 20_000;
/// Failures that are kept with their story.
const MAX_RECORDS: usize = 10_000;
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
    records: VecDeque<pb::DecisionRecord>,
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
    caller_version: String,
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

#[derive(Default)]
struct Interner {
    keys: Vec<Key>,
    ids: HashMap<Key, u32>,
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
            records: VecDeque::new(),
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
            sidecar.endpoints = report.endpoints.into_iter().take(MAX_ITEMS).map(cut_endpoint).collect();
        }
        if !report.routes.is_empty() {
            self.first_ms.get_or_insert(now_ms);
        }
        for route in report.routes.into_iter().take(MAX_ITEMS) {
            self.route(reporter, route);
        }
        for edge in report.edges.into_iter().take(MAX_ITEMS) {
            self.edge(reporter, edge, now_ms);
        }
        for record in report.records.into_iter().take(MAX_ITEMS) {
            if self.records.len() >= MAX_RECORDS {
                self.records.pop_front();
                self.dropped += 1;
            }
            self.records.push_back(cut_record(record));
        }
        report.sequence
    }

    /// A sidecar's streams have ended; it is forgotten when it does not come back.
    pub fn forget_gone(&mut self, now_ms: u64) {
        let gone = u64::try_from(SIDECAR_GONE.as_millis()).unwrap_or(u64::MAX);
        self.sidecars.retain(|_, sidecar| now_ms.saturating_sub(sidecar.last_seen_ms) < gone);
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
        self.records.iter()
    }

    /// The routes of a window that ends now, one row a (workload, direction, parent, route, backend).
    pub fn routes(&mut self, filter: &Filter, window: Duration, now_ms: u64) -> Vec<RouteRow> {
        self.advance(now_ms);
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX).max(1_000);
        let ring = if window_ms <= self.fine.kept_ms { &self.fine } else { &self.coarse };
        // Whole steps: a rate counts the time that its requests come from.
        let since = now_ms.saturating_sub(window_ms);
        let since = since - since % ring.step_ms;
        let mut merged: BTreeMap<Key, BTreeMap<i32, Open>> = BTreeMap::new();
        for (id, key) in self.series.keys.iter().enumerate() {
            if !filter.admits(key) {
                continue;
            }
            let Ok(id) = u32::try_from(id) else { continue };
            let mut total = Open::default();
            ring.collect(id, since, &mut total);
            if total.count > 0 {
                let row = Key { outcome: 0, ..key.clone() };
                merged.entry(row).or_default().insert(key.outcome, total);
            }
        }
        let oldest = ring.oldest_ms().max(self.first_ms.unwrap_or(now_ms));
        let covered_ms = now_ms.saturating_sub(oldest.max(since)).max(1_000);
        merged.into_iter().map(|(key, outcomes)| row(&key, outcomes, covered_ms)).collect()
    }

    /// Who calls whom.
    pub fn edges(&self) -> Vec<EdgeRow> {
        let row = |(key, count): (&EdgeKey, &EdgeCount)| EdgeRow {
            caller: key.caller.clone(),
            caller_version: key.caller_version.clone(),
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
        while self.bytes() > MAX_BYTES {
            let fine = self.fine.closed.front().map_or(u64::MAX, |slot| slot.start_ms);
            let coarse = self.coarse.closed.front().map_or(u64::MAX, |slot| slot.start_ms);
            let dropped = if coarse <= fine { self.coarse.drop_oldest() } else { self.fine.drop_oldest() };
            match dropped {
                Some(samples) => self.dropped += samples,
                None => break,
            }
        }
    }

    fn route(&mut self, reporter: &Reporter, route: pb::RouteDelta) {
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
        let id = self.series.id(key);
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
            caller_version: cut(edge.caller_version),
            service: cut(edge.service),
            method: cut(edge.method),
            mtls: edge.mtls,
        };
        if self.edges.len() >= MAX_EDGES && !self.edges.contains_key(&key) {
            self.dropped += 1;
            key.caller = OVERFLOW.to_owned();
            key.caller_version = String::new();
            key.method = String::new();
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
            if applied.removed {
                self.applied.remove(&key);
            } else if self.applied.len() < MAX_ITEMS || self.applied.contains_key(&key) {
                self.applied.insert(key, cut(applied.version));
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

impl Interner {
    fn id(&mut self, key: Key) -> u32 {
        if let Some(id) = self.ids.get(&key) {
            return *id;
        }
        let key = if self.keys.len() < MAX_SERIES {
            key
        } else {
            let overflow: Arc<str> = OVERFLOW.into();
            Key { parent: overflow.clone(), route: overflow.clone(), backend: overflow, ..key }
        };
        // Overflow keys are few: as many as workloads, directions, protocols and outcomes.
        let next = u32::try_from(self.keys.len()).unwrap_or(u32::MAX);
        *self.ids.entry(key.clone()).or_insert_with(|| {
            self.keys.push(key);
            next
        })
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

    fn drop_oldest(&mut self) -> Option<u64> {
        let slot = self.closed.pop_front()?;
        self.bytes -= slot.bytes;
        Some(slot.samples.len() as u64)
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
        caller_version: cut(record.caller_version),
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
