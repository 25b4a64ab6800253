//! Every metric family of the sidecar, on one screen; the worker-local recorder; the exact merge.
//!
//! Why recorders take no lock: a request is recorded on the thread that served it, into cells that only
//! that thread has. Who wants the numbers (the reporter every 10 s, a scrape) asks each worker over a
//! channel, and the worker hands its cells over whole and starts empty ones: nothing is counted twice,
//! nothing is lost, and merging HDR histograms is exact.
//!
//! Why two shapes of one sample: the controller gets the HDR histograms themselves (merged exactly, within
//! 1 %), `/metrics` gets classic Prometheus buckets filled from the same histograms.
//!
//! Everything an app can grow is bounded: beyond so many series or edges, samples go to one called
//! `overflow`, so that sums stay right.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, VecDeque},
    fmt::Write as _,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::{Histogram, serialization::Serializer as _, serialization::V2Serializer};
use tokio::sync::{Mutex, mpsc, oneshot};
use tracing::warn;
use weft_core::{
    balance::{EndpointView, Health},
    classify::Class,
    eject::Reason,
};
use weft_proto::pb::v1 as pb;

/// The plain counters: family, fixed labels, help. Variants that share a family stand together.
#[rustfmt::skip]
const COUNTERS: [(Counter, &str, &str, &str); Counter::COUNT] = {
    use Counter as C;
    const IN: &str = r#"direction="inbound""#;
    const OUT: &str = r#"direction="outbound""#;
    [
        (C::OutboundAccepted, "weft_connections_total", OUT, "Connections accepted"),
        (C::InboundAccepted, "weft_connections_total", IN, ""),
        (C::OutboundShed, "weft_connections_shed_total", OUT, "Connections closed at once: a limit was reached"),
        (C::InboundShed, "weft_connections_shed_total", IN, ""),
        (C::OutboundBytesSent, "weft_tcp_bytes_total", r#"direction="outbound",way="sent""#, "Opaque bytes"),
        (C::OutboundBytesReceived, "weft_tcp_bytes_total", r#"direction="outbound",way="received""#, ""),
        (C::InboundBytesSent, "weft_tcp_bytes_total", r#"direction="inbound",way="sent""#, ""),
        (C::InboundBytesReceived, "weft_tcp_bytes_total", r#"direction="inbound",way="received""#, ""),
        (C::AcceptErrors, "weft_accept_errors_total", "", "accept() failed (descriptors used up)"),
        (C::LoopsRefused, "weft_loops_refused_total", "", "Connections whose destination was one of our listeners"),
        (C::DetectTimeouts, "weft_detect_timeouts_total", "", "Connections whose client stayed silent"),
        (C::Connects, "weft_connects_total", r#"result="ok""#, "Connections opened to endpoints and apps"),
        (C::ConnectRefusals, "weft_connects_total", r#"result="refused""#, ""),
        (C::ConnectTimeouts, "weft_connects_total", r#"result="timeout""#, ""),
        (C::ConnectErrors, "weft_connects_total", r#"result="failed""#, ""),
        (C::IdentityMismatches, "weft_identity_mismatch_total", "", "Handshakes whose peer was not who it must be"),
        (C::WrongPod, "weft_wrong_pod_total", "", "Inbound connections that meant another pod"),
        (C::HandshakesFailed, "weft_handshakes_failed_total", "", "Inbound TLS handshakes that failed"),
        (C::PlaintextRefused, "weft_plaintext_refused_total", "", "Plaintext connections refused in strict mode"),
        (C::Denied, "weft_denied_total", "", "Requests and connections denied by authorization"),
        (C::PeerExpired, "weft_connections_ended_total", r#"reason="peer_expired""#, "Open connections that were made to end, by what their peer or we have lost: a certificate's time, trust, our own certificate"),
        (C::PeerUntrusted, "weft_connections_ended_total", r#"reason="peer_untrusted""#, ""),
        (C::OwnExpired, "weft_connections_ended_total", r#"reason="own_expired""#, ""),
        (C::Redispatched, "weft_redispatched_total", "", "Requests sent elsewhere because they were not sent or not processed"),
        (C::Retries, "weft_retries_total", "", "Attempts beyond the first, by policy"),
        (C::BudgetExhausted, "weft_retry_budget_exhausted_total", "", "Retries that the budget refused"),
        (C::ReplayOverflow, "weft_replay_overflow_total", "", "Request bodies too large to be sent again"),
        (C::Ejections, "weft_ejections_total", "", "Endpoints ejected"),
        (C::RequestsShed, "weft_requests_shed_total", "", "Requests refused because too many were in flight, or memory was short"),
        (C::Panics, "weft_panics_total", "", "Connections that ended in a panic"),
        (C::DiscoveryTimeouts, "weft_discovery_timeouts_total", "", "Destinations that the control plane did not answer in time"),
        (C::DiscoveryShed, "weft_discovery_shed_total", "", "Connections refused because too many waited for discovery"),
        (C::Reconnects, "weft_control_reconnects_total", "", "Times the control stream was opened"),
        (C::Nacks, "weft_control_nacks_total", "", "Resources refused"),
        (C::Renewals, "weft_certificate_renewals_total", r#"result="ok""#, "Certificates asked for"),
        (C::RenewalFailures, "weft_certificate_renewals_total", r#"result="failed""#, ""),
        (C::TelemetryDropped, "weft_telemetry_dropped_total", "", "Telemetry items dropped because a buffer was full"),
        (C::LogLinesDropped, "weft_log_lines_dropped_total", "", "Log lines dropped because the pipe was blocked"),
    ]
};

/// The gauges: family, fixed labels, help.
#[rustfmt::skip]
const GAUGES: [(Gauge, &str, &str, &str); Gauge::COUNT] = {
    use Gauge as G;
    const IN: &str = r#"direction="inbound""#;
    const OUT: &str = r#"direction="outbound""#;
    [
        (G::OutboundConnections, "weft_connections", OUT, "Connections open"),
        (G::InboundConnections, "weft_connections", IN, ""),
        (G::PooledConnections, "weft_pooled_connections", "", "Connections kept for reuse or in use"),
        (G::Connected, "weft_control_connected", "", "1 while the control stream is up"),
        (G::LastContact, "weft_control_last_contact_seconds", "", "Seconds since the control plane was last heard"),
        (G::NackedResources, "weft_control_nacked_resources", "", "Resources whose newest version was refused"),
        (G::Destinations, "weft_discovery_destinations", "", "Destinations subscribed"),
        (G::DiscoveryWaiters, "weft_discovery_waiters", "", "Connections that wait for discovery"),
        (G::CertificateNotAfter, "weft_certificate_not_after_seconds", "", "End of the workload certificate, Unix time; 0: none"),
        (G::TrustRoots, "weft_trust_roots", "", "Roots trusted, over all trust domains"),
    ]
};

const REQUESTS: (&str, &str) =
    ("weft_requests_total", "Requests, by class: ok, client_error, server_error, proxy");
const REQUEST_RETRIES: (&str, &str) =
    ("weft_request_retries_total", "Retries, by the class that the request ended in");
const FIRST_BYTE: (&str, &str) = (
    "weft_first_byte_seconds",
    "From the request's head to the first byte of the response's body, or its end",
);
const DURATION: (&str, &str) =
    ("weft_request_duration_seconds", "From the request's head to the end of the response");
const ERRORS: (&str, &str) =
    ("weft_proxy_errors_total", "Answers made by this sidecar, by the code of weft-reason");
const PROCESS_RSS: (&str, &str) = ("process_resident_memory_bytes", "Resident memory");
const PROCESS_FDS: (&str, &str) = ("process_open_fds", "Open descriptors");
const CONNTRACK: (&str, &str) =
    ("weft_conntrack_entries", "Connections that the kernel tracks in this network namespace");
const CONNTRACK_MAX: (&str, &str) = ("weft_conntrack_entries_max", "And how many it can");
const LOCAL_PORTS: (&str, &str) =
    ("weft_local_ports_used", "Local ports in use towards the address that takes most of them");
const LOCAL_PORTS_MAX: (&str, &str) = ("weft_local_ports_max", "Local ports that there are for one address");

/// Upper bounds of the classic buckets, in microseconds; +Inf follows.
const BUCKETS: [u64; 16] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// Which way a connection goes, seen from the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The app calls.
    Outbound,
    /// The app is called.
    Inbound,
}

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
    /// The caller's version label; empty if unknown.
    pub caller_version: Arc<str>,
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

macro_rules! closed_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)* }
        impl $name {
            const COUNT: usize = [$($name::$variant,)*].len();
        }
    };
}

closed_enum! {
    /// A plain counter; what each means stands in the table above.
    Counter {
        /// See the table.
        OutboundAccepted,
        /// See the table.
        InboundAccepted,
        /// See the table.
        OutboundShed,
        /// See the table.
        InboundShed,
        /// See the table.
        OutboundBytesSent,
        /// See the table.
        OutboundBytesReceived,
        /// See the table.
        InboundBytesSent,
        /// See the table.
        InboundBytesReceived,
        /// See the table.
        AcceptErrors,
        /// See the table.
        LoopsRefused,
        /// See the table.
        DetectTimeouts,
        /// See the table.
        Connects,
        /// See the table.
        ConnectRefusals,
        /// See the table.
        ConnectTimeouts,
        /// See the table.
        ConnectErrors,
        /// See the table.
        IdentityMismatches,
        /// See the table.
        WrongPod,
        /// See the table.
        HandshakesFailed,
        /// See the table.
        PlaintextRefused,
        /// See the table.
        Denied,
        /// See the table.
        PeerExpired,
        PeerUntrusted,
        OwnExpired,
        /// See the table.
        Redispatched,
        /// See the table.
        Retries,
        /// See the table.
        BudgetExhausted,
        /// See the table.
        ReplayOverflow,
        /// See the table.
        Ejections,
        /// See the table.
        RequestsShed,
        /// See the table.
        Panics,
        /// See the table.
        DiscoveryTimeouts,
        /// See the table.
        DiscoveryShed,
        /// See the table.
        Reconnects,
        /// See the table.
        Nacks,
        /// See the table.
        Renewals,
        /// See the table.
        RenewalFailures,
        /// See the table.
        TelemetryDropped,
        /// See the table.
        LogLinesDropped,
    }
}

closed_enum! {
    /// A level; what each means stands in the table above.
    Gauge {
        /// See the table.
        OutboundConnections,
        /// See the table.
        InboundConnections,
        /// See the table.
        PooledConnections,
        /// See the table.
        Connected,
        /// See the table.
        LastContact,
        /// See the table.
        NackedResources,
        /// See the table.
        Destinations,
        /// See the table.
        DiscoveryWaiters,
        /// See the table.
        CertificateNotAfter,
        /// See the table.
        TrustRoots,
    }
}

/// What is counted outside the workers: the control half's and the process' own numbers.
#[derive(Debug)]
pub struct Shared {
    counters: [AtomicU64; Counter::COUNT],
    gauges: [AtomicI64; Gauge::COUNT],
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
type EndpointName = (Arc<str>, Arc<str>, SocketAddr);

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
    first_byte_sum: u64,
    duration_sum: u64,
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
struct EdgeCount {
    count: u64,
    errors: u64,
}

/// A request for a worker's numbers.
pub struct Take(oneshot::Sender<Delta>);

/// What a worker recorded since it was last asked.
#[derive(Default)]
struct Delta {
    series: Vec<(SeriesKey, Class, Sample)>,
    counters: Vec<u64>,
    gauges: Vec<i64>,
    errors: BTreeMap<&'static str, u64>,
    edges: HashMap<EdgeKey, EdgeCount>,
    decisions: VecDeque<pb::DecisionRecord>,
    endpoints: Vec<EndpointReport>,
    dropped: u64,
}

/// Makes the channel over which a worker is asked: the sender goes to [`Registry::new`], the receiver to
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
    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.retries += other.retries;
        self.first_byte_sum += other.first_byte_sum;
        self.duration_sum += other.duration_sum;
        merge(&mut self.first_byte, other.first_byte.as_ref());
        merge(&mut self.duration, other.duration.as_ref());
    }
}

impl SeriesKey {
    fn overflow(&self) -> Self {
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
    fn overflow(&self) -> Self {
        let overflow: Arc<str> = OVERFLOW.into();
        Self {
            caller: Arc::clone(&overflow),
            caller_version: Arc::clone(&overflow),
            service: Arc::clone(&overflow),
            method: overflow,
            mtls: self.mtls,
        }
    }
}

impl Direction {
    /// Its label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            counters: std::array::from_fn(|_| AtomicU64::new(0)),
            gauges: std::array::from_fn(|_| AtomicI64::new(0)),
        }
    }
}

impl Shared {
    /// Adds one to a counter.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Adds to a counter.
    pub fn add(&self, counter: Counter, n: u64) {
        if let Some(cell) = self.counters.get(counter as usize) {
            cell.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// Moves a gauge up or down.
    pub fn gauge(&self, gauge: Gauge, by: i64) {
        if let Some(cell) = self.gauges.get(gauge as usize) {
            cell.fetch_add(by, Ordering::Relaxed);
        }
    }

    /// Sets a gauge.
    pub fn set(&self, gauge: Gauge, to: i64) {
        if let Some(cell) = self.gauges.get(gauge as usize) {
            cell.store(to, Ordering::Relaxed);
        }
    }

    /// A counter's value.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(counter as usize).map_or(0, |cell| cell.load(Ordering::Relaxed))
    }

    /// A gauge's value.
    pub fn level(&self, gauge: Gauge) -> i64 {
        self.gauges.get(gauge as usize).map_or(0, |cell| cell.load(Ordering::Relaxed))
    }
}

/// Everything that was recorded, merged over the workers. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    workers: Arc<[mpsc::Sender<Take>]>,
    shared: Arc<Shared>,
    merged: Arc<Mutex<Merged>>,
}

#[derive(Default)]
struct Merged {
    /// Since the start, for scrapes.
    totals: BTreeMap<SeriesKey, [Option<Box<Total>>; CLASSES.len()]>,
    counters: Vec<u64>,
    gauges: Vec<i64>,
    errors: BTreeMap<&'static str, u64>,
    /// Since the last report.
    pending: Pending,
    limit: usize,
}

/// What the next report carries.
#[derive(Default)]
struct Pending {
    series: BTreeMap<SeriesKey, [Option<Box<Sample>>; CLASSES.len()]>,
    edges: BTreeMap<EdgeKey, EdgeCount>,
    decisions: VecDeque<pb::DecisionRecord>,
    endpoints: Vec<EndpointReport>,
    dropped: u64,
}

#[derive(Default)]
struct Total {
    count: u64,
    retries: u64,
    first_byte: Buckets,
    duration: Buckets,
}

#[derive(Default)]
struct Buckets {
    counts: [u64; BUCKETS.len() + 1],
    sum: u64,
}

/// What was recorded since the last report, as the telemetry stream says it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReportDelta {
    /// Counts and histograms.
    pub routes: Vec<pb::RouteDelta>,
    /// Who called what.
    pub edges: Vec<pb::Edge>,
    /// Endpoints in use.
    pub endpoints: Vec<pb::EndpointState>,
    /// Why requests went as they did.
    pub records: Vec<pb::DecisionRecord>,
    /// Items dropped.
    pub dropped: u64,
}

impl Registry {
    /// A registry over these workers, of at most `limit` series.
    pub fn new(workers: Vec<mpsc::Sender<Take>>, shared: Arc<Shared>, limit: usize) -> Self {
        let merged = Merged { limit, ..Merged::default() };
        Self { workers: workers.into(), shared, merged: Arc::new(Mutex::new(merged)) }
    }

    /// The control half's own numbers.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Asks every worker and gives what was recorded since the last report.
    pub async fn report(&self) -> ReportDelta {
        let mut merged = self.merged.lock().await;
        self.collect(&mut merged).await;
        std::mem::take(&mut merged.pending).into_report()
    }

    /// Asks every worker and gives everything since the start as Prometheus text.
    pub async fn exposition(&self) -> String {
        let mut merged = self.merged.lock().await;
        self.collect(&mut merged).await;
        merged.render(&self.shared)
    }

    /// The level of a gauge over all workers, as of the last collection.
    pub async fn level(&self, gauge: Gauge) -> i64 {
        let merged = self.merged.lock().await;
        merged.gauges.get(gauge as usize).copied().unwrap_or(0) + self.shared.level(gauge)
    }

    async fn collect(&self, merged: &mut Merged) {
        let mut gauges = vec![0; Gauge::COUNT];
        let mut endpoints = Vec::new();
        for worker in self.workers.iter() {
            let (reply, answer) = oneshot::channel();
            let asked = async {
                worker.send(Take(reply)).await.ok()?;
                answer.await.ok()
            };
            // A worker that is too busy keeps its numbers for the next time.
            match tokio::time::timeout(TAKE_TIMEOUT, asked).await {
                Ok(Some(mut delta)) => {
                    for (sum, n) in gauges.iter_mut().zip(&delta.gauges) {
                        *sum += n;
                    }
                    endpoints.append(&mut delta.endpoints);
                    merged.add(delta);
                }
                Ok(None) => {}
                Err(_) => warn!("a worker did not hand over its metrics in time"),
            }
        }
        merged.gauges = gauges;
        merged.pending.endpoints(endpoints);
    }
}

impl Merged {
    fn add(&mut self, delta: Delta) {
        self.counters.resize(Counter::COUNT, 0);
        for (sum, n) in self.counters.iter_mut().zip(&delta.counters) {
            *sum += n;
        }
        for (code, n) in delta.errors {
            *self.errors.entry(code).or_default() += n;
        }
        for (key, class, sample) in delta.series {
            let known = self.totals.contains_key(&key) || self.totals.len() < self.limit + OVERFLOWS;
            let key = if known { key } else { key.overflow() };
            if let Some(total) = self.totals.entry(key.clone()).or_default().get_mut(class_index(class)) {
                total.get_or_insert_default().add(&sample);
            }
            if let Some(cell) = self.pending.series.entry(key).or_default().get_mut(class_index(class)) {
                cell.get_or_insert_default().merge(&sample);
            }
        }
        for (key, n) in delta.edges {
            let known = self.pending.edges.contains_key(&key) || self.pending.edges.len() < MAX_EDGES;
            let count = self.pending.edges.entry(if known { key } else { key.overflow() }).or_default();
            count.count += n.count;
            count.errors += n.errors;
        }
        self.pending.dropped += delta.dropped;
        for record in delta.decisions {
            if self.pending.decisions.len() >= MAX_DECISIONS {
                self.pending.decisions.pop_front();
                self.pending.dropped += 1;
            }
            self.pending.decisions.push_back(record);
        }
    }

    fn render(&self, shared: &Shared) -> String {
        let mut out = String::with_capacity(16 * 1024);
        let mut family = "";
        for (counter, name, labels, help) in COUNTERS {
            if family != name {
                head(&mut out, name, "counter", help);
                family = name;
            }
            let local = self.counters.get(counter as usize).copied().unwrap_or(0);
            line(&mut out, name, labels, local + shared.counter(counter));
        }
        for (gauge, name, labels, help) in GAUGES {
            if family != name {
                head(&mut out, name, "gauge", help);
                family = name;
            }
            let local = self.gauges.get(gauge as usize).copied().unwrap_or(0);
            line(&mut out, name, labels, local + shared.level(gauge));
        }
        head(&mut out, ERRORS.0, "counter", ERRORS.1);
        for (code, n) in &self.errors {
            line(&mut out, ERRORS.0, &format!("code=\"{}\"", escape(code)), n);
        }
        let process = Process::read();
        let range = local_port_range();
        for ((name, help), value) in [
            (PROCESS_RSS, process.rss),
            (PROCESS_FDS, process.fds),
            (CONNTRACK, process.conntrack),
            (CONNTRACK_MAX, process.conntrack_max),
            (LOCAL_PORTS, range.as_ref().map(local_ports_used)),
            (LOCAL_PORTS_MAX, range.map(|range| range.count() as u64)),
        ] {
            if let Some(value) = value {
                head(&mut out, name, "gauge", help);
                line(&mut out, name, "", value);
            }
        }
        let rows: Vec<(String, &Total)> = self
            .totals
            .iter()
            .flat_map(|(key, classes)| {
                CLASSES.iter().zip(classes).filter_map(move |(class, total)| {
                    total.as_deref().map(|total| (key.labels(*class), total))
                })
            })
            .collect();
        head(&mut out, REQUESTS.0, "counter", REQUESTS.1);
        for (labels, total) in &rows {
            line(&mut out, REQUESTS.0, labels, total.count);
        }
        head(&mut out, REQUEST_RETRIES.0, "counter", REQUEST_RETRIES.1);
        for (labels, total) in &rows {
            line(&mut out, REQUEST_RETRIES.0, labels, total.retries);
        }
        head(&mut out, FIRST_BYTE.0, "histogram", FIRST_BYTE.1);
        for (labels, total) in &rows {
            total.first_byte.render(&mut out, FIRST_BYTE.0, labels);
        }
        head(&mut out, DURATION.0, "histogram", DURATION.1);
        for (labels, total) in &rows {
            total.duration.render(&mut out, DURATION.0, labels);
        }
        out
    }
}

impl Pending {
    /// Several workers hold the same endpoint: requests add up, the costliest view and the worst state show.
    fn endpoints(&mut self, reports: Vec<EndpointReport>) {
        let mut by_name: BTreeMap<EndpointName, EndpointReport> = BTreeMap::new();
        // What an earlier collection (a scrape) counted is not reported yet: only its requests matter now.
        for mut old in std::mem::take(&mut self.endpoints) {
            if old.requests > 0 {
                old.in_flight = 0;
                by_name.insert(old.key(), old);
            }
        }
        for report in reports.into_iter().take(MAX_ENDPOINTS) {
            match by_name.entry(report.key()) {
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(report);
                }
                std::collections::btree_map::Entry::Occupied(mut place) => place.get_mut().merge(report),
            }
        }
        self.endpoints = by_name.into_values().collect();
    }

    fn into_report(self) -> ReportDelta {
        let mut routes = Vec::new();
        for (key, classes) in self.series {
            for (class, sample) in CLASSES.iter().zip(classes) {
                let Some(sample) = sample else { continue };
                routes.push(pb::RouteDelta {
                    direction: match key.direction {
                        Direction::Outbound => pb::Direction::Outbound,
                        Direction::Inbound => pb::Direction::Inbound,
                    }
                    .into(),
                    parent: key.parent.to_string(),
                    route: key.route.to_string(),
                    backend: key.backend.to_string(),
                    outcome: match class {
                        Class::Ok => pb::OutcomeClass::Ok,
                        Class::ClientError => pb::OutcomeClass::ClientError,
                        Class::ServerError => pb::OutcomeClass::ServerError,
                        Class::Proxy => pb::OutcomeClass::Proxy,
                    }
                    .into(),
                    count: sample.count,
                    first_byte: encode(sample.first_byte.as_ref()).into(),
                    duration: encode(sample.duration.as_ref()).into(),
                    retries: sample.retries,
                    protocol: key.protocol.to_owned(),
                });
            }
        }
        let edge = |(key, n): (EdgeKey, EdgeCount)| pb::Edge {
            caller_identity: key.caller.to_string(),
            caller_version: key.caller_version.to_string(),
            service: key.service.to_string(),
            method: key.method.to_string(),
            count: n.count,
            errors: n.errors,
            mtls: key.mtls,
        };
        let endpoint = |report: EndpointReport| pb::EndpointState {
            backend: report.backend.to_string(),
            uid: report.uid.to_string(),
            address: report.address.to_string(),
            cost_us: micros(report.cost),
            in_flight: report.in_flight,
            weight: report.weight,
            state: report.state.into(),
            ejected_for_ms: u64::try_from(report.ejected_for.as_millis()).unwrap_or(u64::MAX),
            reason: report.reason,
            requests: report.requests,
        };
        ReportDelta {
            routes,
            edges: self.edges.into_iter().map(edge).collect(),
            endpoints: self.endpoints.into_iter().map(endpoint).collect(),
            records: self.decisions.into(),
            dropped: self.dropped,
        }
    }
}

impl EndpointReport {
    fn key(&self) -> EndpointName {
        (Arc::clone(&self.backend), Arc::clone(&self.uid), self.address)
    }

    fn merge(&mut self, other: Self) {
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

impl Total {
    fn add(&mut self, sample: &Sample) {
        self.count += sample.count;
        self.retries += sample.retries;
        self.first_byte.add(sample.first_byte.as_ref(), sample.first_byte_sum);
        self.duration.add(sample.duration.as_ref(), sample.duration_sum);
    }
}

impl Buckets {
    fn add(&mut self, histogram: Option<&Histogram<u32>>, sum: u64) {
        let Some(histogram) = histogram else { return };
        self.sum += sum;
        for step in histogram.iter_recorded() {
            let value = histogram.lowest_equivalent(step.value_iterated_to());
            let bucket = BUCKETS.partition_point(|bound| *bound < value);
            if let Some(count) = self.counts.get_mut(bucket) {
                *count += u64::from(step.count_at_value());
            }
        }
    }

    fn render(&self, out: &mut String, name: &str, labels: &str) {
        if self.counts.iter().all(|n| *n == 0) {
            return;
        }
        let mut sum = 0;
        for (i, n) in self.counts.iter().enumerate() {
            sum += n;
            let _ = match BUCKETS.get(i) {
                Some(bound) => writeln!(out, "{name}_bucket{{{labels},le=\"{}\"}} {sum}", Seconds(*bound)),
                None => writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {sum}"),
            };
        }
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", Seconds(self.sum));
        let _ = writeln!(out, "{name}_count{{{labels}}} {sum}");
    }
}

impl SeriesKey {
    fn labels(&self, class: Class) -> String {
        format!(
            "direction=\"{}\",parent=\"{}\",route=\"{}\",backend=\"{}\",protocol=\"{}\",class=\"{}\"",
            self.direction.label(),
            escape(&self.parent),
            escape(&self.route),
            escape(&self.backend),
            self.protocol,
            match class {
                Class::Ok => "ok",
                Class::ClientError => "client_error",
                Class::ServerError => "server_error",
                Class::Proxy => "proxy",
            }
        )
    }
}

/// Microseconds, written as seconds without rounding.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (whole, part) = (self.0 / 1_000_000, self.0 % 1_000_000);
        if part == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{part:06}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

/// What the kernel says about this process.
pub(crate) struct Process {
    pub(crate) rss: Option<u64>,
    fds: Option<u64>,
    conntrack: Option<u64>,
    conntrack_max: Option<u64>,
}

impl Process {
    pub(crate) fn read() -> Self {
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
        let rss = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| {
            let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
            let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
            pages.checked_mul(u64::try_from(page).ok()?)
        });
        let fds = std::fs::read_dir("/proc/self/fd").ok().and_then(|dir| u64::try_from(dir.count()).ok());
        Self {
            rss,
            fds,
            conntrack: number("/proc/sys/net/netfilter/nf_conntrack_count"),
            conntrack_max: number("/proc/sys/net/netfilter/nf_conntrack_max"),
        }
    }
}

fn local_port_range() -> Option<std::ops::RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

/// Every destination has all local ports to itself, so the one that uses most of them is the first that cannot be
/// dialled any more. Some milliseconds with ten thousand connections: for a scrape, not for each report.
fn local_ports_used(range: &std::ops::RangeInclusive<u16>) -> u64 {
    let mut by_remote: HashMap<(String, String), u64> = HashMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Ok(text) = std::fs::read_to_string(table) else { continue };
        for line in text.lines().skip(1) {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let (Some(local), Some(remote)) = (fields.next(), fields.next()) else { continue };
            let Some((address, port)) = local.rsplit_once(':') else { continue };
            let ephemeral = u16::from_str_radix(port, 16).is_ok_and(|port| range.contains(&port));
            if ephemeral && !remote.ends_with(":0000") {
                *by_remote.entry((address.to_owned(), remote.to_owned())).or_default() += 1;
            }
        }
    }
    by_remote.into_values().max().unwrap_or(0)
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

fn encode(histogram: Option<&Histogram<u32>>) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(histogram) = histogram {
        // Writing to memory cannot fail; if the format could not hold it, the counts still go out.
        if V2Serializer::new().serialize(histogram, &mut out).is_err() {
            out.clear();
        }
    }
    out
}

fn micros(value: Duration) -> u64 {
    u64::try_from(value.as_micros()).unwrap_or(u64::MAX)
}

fn class_index(class: Class) -> usize {
    match class {
        Class::Ok => 0,
        Class::ClientError => 1,
        Class::ServerError => 2,
        Class::Proxy => 3,
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = if labels.is_empty() {
        writeln!(out, "{name} {value}")
    } else {
        writeln!(out, "{name}{{{labels}}} {value}")
    };
}

fn escape(label: &str) -> std::borrow::Cow<'_, str> {
    if label.contains(['\\', '"', '\n']) {
        return label.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n").into();
    }
    label.into()
}

const CLASSES: [Class; 4] = [Class::Ok, Class::ClientError, Class::ServerError, Class::Proxy];
/// The name of what did not fit.
const OVERFLOW: &str = "overflow";
/// How many series are called so: one a direction and protocol.
const OVERFLOWS: usize = 8;
/// Significant digits: values within 1 %.
const DIGITS: u8 = 2;
/// Longest recorded time, 35 minutes: histograms grow by powers of two, and readers accept up to an hour.
const MAX_MICROS: u64 = (1 << 31) - 1;
/// Distinct edges between two reports.
const MAX_EDGES: usize = 1_000;
/// Decision records between two reports.
const MAX_DECISIONS: usize = 200;
/// Endpoints in one report.
const MAX_ENDPOINTS: usize = 10_000;
/// A series nobody holds is forgotten after so many takes without a sample: 10 minutes of reports.
const IDLE_TAKES: u32 = 60;
/// A worker that does not answer in this time is left out of one collection.
const TAKE_TIMEOUT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn key(route: &str) -> SeriesKey {
        SeriesKey {
            direction: Direction::Outbound,
            parent: "shop/api:80".into(),
            route: route.into(),
            backend: "shop/api-v1:80".into(),
            protocol: "http1",
        }
    }

    fn edge(caller: &str) -> EdgeKey {
        EdgeKey {
            caller: caller.into(),
            caller_version: "".into(),
            service: "80".into(),
            method: "/".into(),
            mtls: true,
        }
    }

    /// Runs `test` with a registry over two recorders, served as workers serve them.
    async fn with_two(limit: usize, test: impl AsyncFnOnce(Registry, Recorder, Recorder)) {
        let local = tokio::task::LocalSet::new();
        let run = local.run_until(async {
            let (recorders, askers): (Vec<_>, Vec<_>) = (0..2)
                .map(|_| {
                    let (ask, asked) = channel();
                    let recorder = Recorder::new(limit);
                    tokio::task::spawn_local(recorder.clone().serve(asked));
                    (recorder, ask)
                })
                .unzip();
            let registry = Registry::new(askers, Arc::default(), limit);
            let [one, two] = <[_; 2]>::try_from(recorders).ok().unwrap();
            test(registry, one, two).await;
        });
        run.await;
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn every_counter_and_gauge_stands_at_its_place() {
        for (i, (counter, ..)) in COUNTERS.iter().enumerate() {
            assert_eq!(*counter as usize, i, "{counter:?}");
        }
        for (i, (gauge, ..)) in GAUGES.iter().enumerate() {
            assert_eq!(*gauge as usize, i, "{gauge:?}");
        }
    }

    #[tokio::test]
    async fn workers_are_merged_exactly_and_counted_once() {
        with_two(10, async |registry, one, two| {
            for (recorder, n) in [(&one, 30), (&two, 70)] {
                let series = recorder.series(&key("r"));
                for i in 1..=n {
                    series.record(Class::Ok, Some(MS), MS * i, 1);
                }
                recorder.count(Counter::Retries);
                recorder.gauge(Gauge::OutboundConnections, 2);
                recorder.error("no_route");
                recorder.edge(&edge("spiffe://x"), false);
            }
            let text = registry.exposition().await;
            let labels = r#"direction="outbound",parent="shop/api:80",route="r",backend="shop/api-v1:80",protocol="http1",class="ok""#;
            for line in [
                format!("weft_requests_total{{{labels}}} 100"),
                format!("weft_request_retries_total{{{labels}}} 100"),
                format!("weft_first_byte_seconds_bucket{{{labels},le=\"0.0005\"}} 0"),
                format!("weft_first_byte_seconds_bucket{{{labels},le=\"0.001\"}} 100"),
                format!("weft_request_duration_seconds_bucket{{{labels},le=\"0.01\"}} 20"),
                format!("weft_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}} 100"),
                format!("weft_request_duration_seconds_count{{{labels}}} 100"),
                format!("weft_request_duration_seconds_sum{{{labels}}} 2.95"),
                "weft_retries_total 2".to_owned(),
                "weft_connections{direction=\"outbound\"} 4".to_owned(),
                "weft_proxy_errors_total{code=\"no_route\"} 2".to_owned(),
            ] {
                assert!(text.lines().any(|have| have == line), "{line}\nnot in\n{text}");
            }
            // A scrape takes nothing from the report, and a report nothing from the next scrape.
            let report = registry.report().await;
            assert_eq!(report.routes.len(), 1);
            assert_eq!((report.routes[0].count, report.routes[0].retries), (100, 100));
            assert_eq!(report.edges[0].count, 2);
            assert_eq!(registry.report().await, ReportDelta::default());
            assert_eq!(registry.exposition().await.matches("} 100").count(), text.matches("} 100").count());
        })
        .await;
    }

    #[tokio::test]
    async fn histograms_survive_the_wire_within_a_percent_and_below_the_hour() {
        with_two(10, async |registry, one, two| {
            let values = [1, 17, 999, 12_345, 1_234_567, 59_000_000, u64::MAX / 2];
            for (i, micros) in values.into_iter().enumerate() {
                let recorder = if i % 2 == 0 { &one } else { &two };
                recorder.series(&key("r")).record(Class::Ok, None, Duration::from_micros(micros), 0);
            }
            let report = registry.report().await;
            assert!(report.routes[0].first_byte.is_empty());
            let bytes = &report.routes[0].duration;
            // The header, as a reader checks it before it decodes.
            assert!(u32::from_be_bytes(bytes[12..16].try_into().unwrap()) <= 2);
            assert!(u64::from_be_bytes(bytes[24..32].try_into().unwrap()) <= 3_600_000_000);
            let read: Histogram<u32> =
                hdrhistogram::serialization::Deserializer::new().deserialize(&mut &bytes[..]).unwrap();
            assert_eq!(read.len(), values.len() as u64);
            for micros in values {
                let kept = micros.min(MAX_MICROS);
                let found =
                    read.iter_recorded().any(|step| step.value_iterated_to().abs_diff(kept) * 100 <= kept);
                assert!(found, "{micros}");
            }
        })
        .await;
    }

    #[tokio::test]
    async fn beyond_the_limit_everything_is_one_series() {
        with_two(3, async |registry, one, _two| {
            for i in 0..50 {
                one.series(&key(&format!("r{i}"))).record(Class::Ok, None, MS, 0);
                one.edge(&edge(&format!("spiffe://{}", i)), i % 2 == 0);
            }
            let report = registry.report().await;
            assert_eq!(report.routes.len(), 4);
            assert_eq!(report.routes.iter().map(|route| route.count).sum::<u64>(), 50);
            let overflow = report.routes.iter().find(|route| route.route == OVERFLOW).unwrap();
            assert_eq!(overflow.count, 47);
            assert_eq!(report.edges.iter().map(|edge| edge.errors).sum::<u64>(), 25);
        })
        .await;
    }

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
    fn labels_are_escaped() {
        assert_eq!(escape("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
        assert_eq!(Seconds(2_950_000).to_string(), "2.95");
        assert_eq!(Seconds(60_000_000).to_string(), "60");
        assert_eq!(Seconds(1).to_string(), "0.000001");
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
