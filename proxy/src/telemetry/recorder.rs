//! What one worker records: requests, edges, counts, levels and decisions, until somebody asks for them.
//!
//! Why recorders take no lock: a request is recorded on the thread that served it, into cells that only
//! that thread has. Who wants the numbers asks each worker over a channel, and the worker hands its cells over whole and
//! starts empty ones: nothing is counted twice, and nothing is lost.
//!
//! Everything an app can grow is bounded: beyond so many series or edges, samples go to one called
//! `overflow`, so that sums stay right.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio::sync::{mpsc, oneshot};
use weft_core::{
    balance::{EndpointView, Health},
    classify::Class,
    eject::Reason,
};
use weft_proto::pb::v1 as pb;

use super::metrics::{Counter, Gauge};
use crate::direction::Direction;

/// What one time series is about. `parent` is `<ns>/<name>:<port>` outbound and the pod's port inbound;
/// `route` is the rule's label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesKey {
    /// Which way.
    pub direction: Direction,
    /// The destination.
    pub parent: Arc<str>,
    /// The rule's label.
    pub route: Arc<str>,
    /// The backend, `<ns>/<name>:<port>`; empty if none was chosen.
    pub backend: Arc<str>,
    /// `http1`, `http2`, `grpc` or `tcp`.
    pub protocol: &'static str,
}

/// Who calls what.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EdgeKey {
    /// The caller's identity; empty: none (plaintext).
    pub caller: Arc<str>,
    /// The called service or port.
    pub service: Arc<str>,
    /// gRPC method or route template; empty for bytes.
    pub method: Arc<str>,
    /// Whether the caller came over mTLS.
    pub mtls: bool,
}

/// One endpoint as one worker sees it now.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointReport {
    /// `<ns>/<name>:<port>`.
    pub backend: Arc<str>,
    /// The pod.
    pub uid: Arc<str>,
    /// Its address.
    pub address: SocketAddr,
    /// Its cost.
    pub cost: Duration,
    /// Requests in flight.
    pub in_flight: u32,
    /// Its weight.
    pub weight: u32,
    /// Its health.
    pub state: pb::endpoint_state::State,
    /// How long it stays ejected.
    pub ejected_for: Duration,
    /// Why it is ejected.
    pub reason: String,
    /// Requests: so far from a worker, since the last report in a report.
    pub requests: u64,
}

/// One worker's recorder. Cheap to clone within its thread.
#[derive(Clone)]
pub struct Recorder(Rc<Local>);

struct Local {
    limit: usize,
    series: RefCell<HashMap<SeriesKey, Rc<Series>>>,
    counters: [Cell<u64>; Counter::COUNT],
    gauges: [Cell<i64>; Gauge::COUNT],
    errors: RefCell<BTreeMap<&'static str, u64>>,
    edges: RefCell<HashMap<EdgeKey, Rc<Edge>>>,
    decisions: RefCell<VecDeque<pb::DecisionRecord>>,
    dropped: Cell<u64>,
    endpoints: RefCell<Option<EndpointSource>>,
    /// Requests of each endpoint as of the last take.
    requests: RefCell<HashMap<EndpointName, u64>>,
}

/// One thing that a gauge counts for as long as it is there, however it ends.
pub(crate) struct Level {
    recorder: Recorder,
    gauge: Gauge,
}

impl Drop for Level {
    fn drop(&mut self) {
        self.recorder.gauge(self.gauge, -1);
    }
}

/// Backend, pod, address.
pub(super) type EndpointName = (Arc<str>, Arc<str>, SocketAddr);

type EndpointSource = Box<dyn FnMut() -> Vec<EndpointReport>>;

/// One time series of one worker: resolve it once, keep it, record into it.
pub struct Series {
    key: SeriesKey,
    cells: RefCell<[Option<Box<Sample>>; CLASSES.len()]>,
    idle: Cell<u32>,
}

/// Counts and histograms of one (series, class) since they were last taken.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Requests.
    pub count: u64,
    /// Retries of these.
    pub retries: u64,
    /// First bytes, microseconds; `None` while there was none.
    pub first_byte: Option<Histogram<u32>>,
    /// Durations, microseconds.
    pub duration: Option<Histogram<u32>>,
    pub(super) first_byte_sum: u64,
    pub(super) duration_sum: u64,
}

/// Requests of one caller: resolve it once, keep it, count into it.
#[derive(Default)]
pub struct Edge {
    count: Cell<u64>,
    errors: Cell<u64>,
}

impl Edge {
    /// Counts a request or connection.
    pub fn request(&self) {
        self.count.set(self.count.get() + 1);
    }

    /// Says of one that was counted that it failed, or was refused.
    pub fn error(&self) {
        self.errors.set(self.errors.get() + 1);
    }

    fn take(&self) -> EdgeCount {
        EdgeCount { count: self.count.take(), errors: self.errors.take() }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EdgeCount {
    pub(super) count: u64,
    pub(super) errors: u64,
}

/// A request for a worker's numbers.
pub struct Take(pub(super) oneshot::Sender<Delta>);

/// What a worker recorded since it was last asked.
#[derive(Default)]
pub(super) struct Delta {
    pub(super) series: Vec<(SeriesKey, Class, Sample)>,
    pub(super) counters: Vec<u64>,
    pub(super) gauges: Vec<i64>,
    pub(super) errors: BTreeMap<&'static str, u64>,
    pub(super) edges: HashMap<EdgeKey, EdgeCount>,
    pub(super) decisions: VecDeque<pb::DecisionRecord>,
    pub(super) endpoints: Vec<EndpointReport>,
    pub(super) dropped: u64,
}

/// Makes the channel over which a worker is asked: the sender goes to the registry, the receiver to
/// [`Recorder::serve`].
pub fn channel() -> (mpsc::Sender<Take>, mpsc::Receiver<Take>) {
    mpsc::channel(4)
}

impl Recorder {
    /// A recorder of at most `limit` series.
    pub fn new(limit: usize) -> Self {
        Self(Rc::new(Local {
            limit,
            series: RefCell::default(),
            counters: std::array::from_fn(|_| Cell::new(0)),
            gauges: std::array::from_fn(|_| Cell::new(0)),
            errors: RefCell::default(),
            edges: RefCell::default(),
            decisions: RefCell::default(),
            dropped: Cell::new(0),
            endpoints: RefCell::default(),
            requests: RefCell::default(),
        }))
    }

    /// The series of a key; beyond the limit, the overflow series of its direction and protocol.
    pub fn series(&self, key: &SeriesKey) -> Rc<Series> {
        let mut all = self.0.series.borrow_mut();
        if let Some(series) = all.get(key) {
            return Rc::clone(series);
        }
        let key = if all.len() < self.0.limit { key.clone() } else { key.overflow() };
        Rc::clone(
            all.entry(key.clone())
                .or_insert_with(|| Rc::new(Series { key, cells: RefCell::default(), idle: Cell::new(0) })),
        )
    }

    /// Adds one to a counter.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Adds to a counter.
    pub fn add(&self, counter: Counter, n: u64) {
        if let Some(cell) = self.0.counters.get(counter as usize) {
            cell.set(cell.get().saturating_add(n));
        }
    }

    /// Moves a gauge up by one until what it returns has gone.
    pub(crate) fn raise(&self, gauge: Gauge) -> Level {
        self.gauge(gauge, 1);
        Level { recorder: self.clone(), gauge }
    }

    /// Moves a gauge up or down.
    pub fn gauge(&self, gauge: Gauge, by: i64) {
        if let Some(cell) = self.0.gauges.get(gauge as usize) {
            cell.set(cell.get().saturating_add(by));
        }
    }

    /// Counts an answer that this sidecar made, by the code of its `weft-reason`.
    pub fn error(&self, code: &'static str) {
        *self.0.errors.borrow_mut().entry(code).or_default() += 1;
    }

    /// Counts one request from a caller to a service.
    pub fn edge(&self, key: &EdgeKey, error: bool) {
        let edge = self.edge_of(key);
        edge.request();
        if error {
            edge.error();
        }
    }

    /// Where requests from a caller to a service are counted.
    pub fn edge_of(&self, key: &EdgeKey) -> Rc<Edge> {
        let mut edges = self.0.edges.borrow_mut();
        if let Some(known) = edges.get(key) {
            return known.clone();
        }
        let key = if edges.len() >= MAX_EDGES { key.overflow() } else { key.clone() };
        edges.entry(key).or_default().clone()
    }

    /// Keeps why one request went as it did; the oldest gives way.
    pub fn decision(&self, record: pb::DecisionRecord) {
        let mut decisions = self.0.decisions.borrow_mut();
        if decisions.len() >= MAX_DECISIONS {
            decisions.pop_front();
            self.0.dropped.set(self.0.dropped.get() + 1);
            self.count(Counter::TelemetryDropped);
        }
        decisions.push_back(record);
    }

    /// Says how to list this worker's endpoints when the reporter asks.
    pub fn endpoints(&self, source: impl FnMut() -> Vec<EndpointReport> + 'static) {
        *self.0.endpoints.borrow_mut() = Some(Box::new(source));
    }

    /// Answers whoever asks for this worker's numbers; ends when nobody can ask any more. Spawned by the
    /// worker on its own thread.
    pub async fn serve(self, mut asked: mpsc::Receiver<Take>) {
        while let Some(Take(reply)) = asked.recv().await {
            // If the asker gave up meanwhile, the numbers go back: they are not lost.
            if let Err(delta) = reply.send(self.take()) {
                self.put_back(delta);
            }
        }
    }

    fn take(&self) -> Delta {
        let mut series = Vec::new();
        self.0.series.borrow_mut().retain(|key, one| {
            let mut any = false;
            for (class, cell) in CLASSES.iter().zip(one.cells.borrow_mut().iter_mut()) {
                if let Some(sample) = cell.take() {
                    any = true;
                    series.push((key.clone(), *class, *sample));
                }
            }
            one.idle.set(if any { 0 } else { one.idle.get().saturating_add(1) });
            // Nobody holds it and it has been quiet for long: make room.
            Rc::strong_count(one) > 1 || one.idle.get() < IDLE_TAKES
        });
        let mut endpoints = self.0.endpoints.borrow_mut().as_mut().map(|source| source()).unwrap_or_default();
        let mut requests = HashMap::with_capacity(endpoints.len());
        let mut before = self.0.requests.borrow_mut();
        for report in &mut endpoints {
            let so_far = report.requests;
            // Fewer than before: the endpoint was forgotten and came back.
            let counted = before.get(&report.key()).copied().filter(|n| *n <= so_far).unwrap_or(0);
            report.requests = so_far - counted;
            requests.insert(report.key(), so_far);
        }
        *before = requests;
        let mut edges = HashMap::new();
        self.0.edges.borrow_mut().retain(|key, edge| {
            let count = edge.take();
            if count.count > 0 || count.errors > 0 {
                edges.insert(key.clone(), count);
            }
            Rc::strong_count(edge) > 1
        });
        Delta {
            series,
            counters: self.0.counters.iter().map(Cell::take).collect(),
            gauges: self.0.gauges.iter().map(Cell::get).collect(),
            errors: self.0.errors.take(),
            edges,
            decisions: self.0.decisions.take(),
            endpoints,
            dropped: self.0.dropped.take(),
        }
    }

    fn put_back(&self, delta: Delta) {
        for (key, class, sample) in delta.series {
            let series = self.series(&key);
            let mut cells = series.cells.borrow_mut();
            if let Some(cell) = cells.get_mut(class_index(class)) {
                cell.get_or_insert_default().merge(&sample);
            }
        }
        for (cell, n) in self.0.counters.iter().zip(delta.counters) {
            cell.set(cell.get().saturating_add(n));
        }
        for (code, n) in delta.errors {
            *self.0.errors.borrow_mut().entry(code).or_default() += n;
        }
        for (key, n) in delta.edges {
            let edge = self.edge_of(&key);
            edge.count.set(edge.count.get() + n.count);
            edge.errors.set(edge.errors.get() + n.errors);
        }
        self.0.dropped.set(self.0.dropped.get() + delta.dropped);
        let mut decisions = self.0.decisions.borrow_mut();
        for record in delta.decisions.into_iter().rev().take(MAX_DECISIONS.saturating_sub(decisions.len())) {
            decisions.push_front(record);
        }
    }
}

/// What a worker's balancer knows of one endpoint, as a report. `requests` are those so far.
pub fn endpoint_report(backend: &Arc<str>, view: EndpointView, now: Instant) -> EndpointReport {
    use pb::endpoint_state::State;
    let (state, ejected_for) = match view.state {
        Health::Healthy => (State::Healthy, Duration::ZERO),
        Health::Ejected { until } => (State::Ejected, until.saturating_duration_since(now)),
        Health::Probing => (State::Probing, Duration::ZERO),
        Health::Draining | Health::NotReady => (State::Draining, Duration::ZERO),
    };
    let reason = match view.reason {
        Some(Reason::ConsecutiveFailures(n)) => format!("{n} failures in a row"),
        Some(Reason::SuccessRate { rate, requests }) => {
            format!("{:.1} % of {requests} requests succeeded", rate * 100.0)
        }
        Some(Reason::ProbeFailed) => "the probe failed".to_owned(),
        Some(Reason::NoConnection) => "it could not be connected to".to_owned(),
        Some(Reason::AppRefuses) => "its app refuses connections".to_owned(),
        None => String::new(),
    };
    EndpointReport {
        backend: Arc::clone(backend),
        uid: view.endpoint.uid.as_str().into(),
        address: view.endpoint.address,
        cost: view.cost,
        in_flight: view.in_flight,
        weight: view.endpoint.weight,
        state,
        ejected_for,
        reason,
        requests: view.requests,
    }
}

impl EndpointReport {
    pub(super) fn key(&self) -> EndpointName {
        (Arc::clone(&self.backend), Arc::clone(&self.uid), self.address)
    }

    pub(super) fn merge(&mut self, other: Self) {
        use pb::endpoint_state::State;
        let rank = |state: State| match state {
            State::Unspecified | State::Healthy => 0,
            State::Draining => 1,
            State::Probing => 2,
            State::Ejected => 3,
        };
        self.requests += other.requests;
        self.in_flight += other.in_flight;
        self.cost = self.cost.max(other.cost);
        if rank(other.state) > rank(self.state) {
            self.state = other.state;
            self.ejected_for = other.ejected_for;
            self.reason = other.reason;
        }
    }
}

impl Series {
    /// Records one finished request or connection.
    pub fn record(&self, class: Class, first_byte: Option<Duration>, full: Duration, retries: u32) {
        let mut cells = self.cells.borrow_mut();
        let Some(cell) = cells.get_mut(class_index(class)) else { return };
        let sample = cell.get_or_insert_default();
        sample.count += 1;
        sample.retries += u64::from(retries);
        if let Some(first_byte) = first_byte {
            record(&mut sample.first_byte, &mut sample.first_byte_sum, first_byte);
        }
        record(&mut sample.duration, &mut sample.duration_sum, full);
    }

    /// What it is about.
    pub fn key(&self) -> &SeriesKey {
        &self.key
    }
}

impl Sample {
    pub(super) fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.retries += other.retries;
        self.first_byte_sum += other.first_byte_sum;
        self.duration_sum += other.duration_sum;
        merge(&mut self.first_byte, other.first_byte.as_ref());
        merge(&mut self.duration, other.duration.as_ref());
    }
}

impl SeriesKey {
    pub(super) fn overflow(&self) -> Self {
        let overflow: Arc<str> = OVERFLOW.into();
        Self {
            direction: self.direction,
            parent: Arc::clone(&overflow),
            route: Arc::clone(&overflow),
            backend: overflow,
            protocol: self.protocol,
        }
    }
}

impl EdgeKey {
    pub(super) fn overflow(&self) -> Self {
        let overflow: Arc<str> = OVERFLOW.into();
        Self {
            caller: Arc::clone(&overflow),
            service: Arc::clone(&overflow),
            method: overflow,
            mtls: self.mtls,
        }
    }
}

fn record(histogram: &mut Option<Histogram<u32>>, sum: &mut u64, value: Duration) {
    let value = micros(value).clamp(1, MAX_MICROS);
    *sum += value;
    let histogram = match histogram {
        Some(histogram) => histogram,
        // Two significant digits always make one; if not, the sample is only counted.
        None => match Histogram::new(DIGITS) {
            Ok(new) => histogram.insert(new),
            Err(_) => return,
        },
    };
    // Cannot fail: it resizes itself, and the value is capped.
    let _ = histogram.record(value);
}

fn merge(into: &mut Option<Histogram<u32>>, from: Option<&Histogram<u32>>) {
    let Some(from) = from else { return };
    match into {
        // Cannot fail: both resize themselves.
        Some(into) => drop(into.add(from)),
        None => *into = Some(from.clone()),
    }
}

pub(super) fn micros(value: Duration) -> u64 {
    u64::try_from(value.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn class_index(class: Class) -> usize {
    match class {
        Class::Ok => 0,
        Class::ClientError => 1,
        Class::ServerError => 2,
        Class::Proxy => 3,
    }
}

pub(super) const CLASSES: [Class; 4] = [Class::Ok, Class::ClientError, Class::ServerError, Class::Proxy];
/// The name of what did not fit.
pub(super) const OVERFLOW: &str = "overflow";
/// Significant digits: values within 1 %.
const DIGITS: u8 = 2;
/// Longest recorded time, 35 minutes: histograms grow by powers of two, and readers accept up to an hour.
pub(super) const MAX_MICROS: u64 = (1 << 31) - 1;
/// Distinct edges between two reports.
pub(super) const MAX_EDGES: usize = 1_000;
/// Decision records between two reports.
pub(super) const MAX_DECISIONS: usize = 200;
/// A series nobody holds is forgotten after so many takes without a sample: 10 minutes of reports.
const IDLE_TAKES: u32 = 60;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::telemetry) fn key(route: &str) -> SeriesKey {
        SeriesKey {
            direction: Direction::Outbound,
            parent: "shop/api:80".into(),
            route: route.into(),
            backend: "shop/api-v1:80".into(),
            protocol: "http1",
        }
    }

    pub(in crate::telemetry) fn edge(caller: &str) -> EdgeKey {
        EdgeKey { caller: caller.into(), service: "80".into(), method: "/".into(), mtls: true }
    }

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn what_an_asker_gave_up_on_is_not_lost() {
        let recorder = Recorder::new(10);
        recorder.series(&key("r")).record(Class::Proxy, Some(MS), MS, 2);
        recorder.count(Counter::Denied);
        recorder.edge(&edge("spiffe://x"), true);
        recorder.decision(pb::DecisionRecord { request_id: "1".into(), ..Default::default() });
        let delta = recorder.take();
        recorder.series(&key("r")).record(Class::Proxy, Some(MS), MS, 2);
        recorder.put_back(delta);
        let delta = recorder.take();
        assert_eq!(delta.series[0].2.count, 2);
        assert_eq!(delta.series[0].2.duration.as_ref().unwrap().len(), 2);
        assert_eq!(delta.counters[Counter::Denied as usize], 1);
        assert_eq!((delta.edges.len(), delta.decisions.len()), (1, 1));
    }

    #[test]
    fn an_edge_is_kept_while_it_is_held_and_told_when_it_has_counted() {
        let recorder = Recorder::new(10);
        let held = recorder.edge_of(&edge("spiffe://x"));
        held.request();
        assert_eq!(recorder.take().edges.len(), 1);
        assert!(recorder.take().edges.is_empty());
        held.error();
        let late = recorder.take();
        assert_eq!(late.edges.values().map(|n| (n.count, n.errors)).collect::<Vec<_>>(), [(0, 1)]);
        drop(held);
        assert!(recorder.take().edges.is_empty());
        assert!(recorder.0.edges.borrow().is_empty());
    }

    #[test]
    fn decisions_are_bounded_and_the_oldest_goes() {
        let recorder = Recorder::new(10);
        for i in 0..MAX_DECISIONS + 5 {
            recorder.decision(pb::DecisionRecord { request_id: i.to_string(), ..Default::default() });
        }
        let delta = recorder.take();
        assert_eq!(delta.decisions.len(), MAX_DECISIONS);
        assert_eq!(delta.decisions[0].request_id, "5");
        assert_eq!(delta.dropped, 5);
    }

    #[test]
    fn a_quiet_series_nobody_holds_makes_room() {
        let recorder = Recorder::new(10);
        let held = recorder.series(&key("held"));
        drop(recorder.series(&key("dropped")));
        for _ in 0..=IDLE_TAKES {
            recorder.take();
        }
        assert_eq!(recorder.0.series.borrow().len(), 1);
        assert_eq!(&*held.key().route, "held");
    }

    #[test]
    fn requests_of_an_endpoint_are_told_as_differences() {
        let recorder = Recorder::new(10);
        let so_far = Rc::new(Cell::new(5));
        let source = Rc::clone(&so_far);
        recorder.endpoints(move || {
            vec![EndpointReport {
                backend: "b".into(),
                uid: "u".into(),
                address: SocketAddr::from(([10, 0, 0, 1], 80)),
                cost: MS,
                in_flight: 1,
                weight: 1,
                state: pb::endpoint_state::State::Healthy,
                ejected_for: Duration::ZERO,
                reason: String::new(),
                requests: source.get(),
            }]
        });
        assert_eq!(recorder.take().endpoints[0].requests, 5);
        so_far.set(12);
        assert_eq!(recorder.take().endpoints[0].requests, 7);
        so_far.set(3); // it was gone and came back
        assert_eq!(recorder.take().endpoints[0].requests, 3);
    }
}
