//! All workers' numbers together: merged exactly, for a scrape and for the next report.
//!
//! Why two shapes of one sample: the controller gets the HDR histograms themselves (merged exactly, within
//! 1 %), `/metrics` gets classic Prometheus buckets filled from the same histograms.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use hdrhistogram::{Histogram, serialization::Serializer as _, serialization::V2Serializer};
use tokio::sync::{Mutex, mpsc, oneshot};
use tracing::warn;
use weft_core::classify::Class;
use weft_proto::pb::v1 as pb;

use super::{
    metrics::{
        CONNTRACK, CONNTRACK_MAX, COUNTERS, Counter, DURATION, ERRORS, FIRST_BYTE, GAUGES, Gauge,
        LOCAL_PORTS, LOCAL_PORTS_MAX, PROCESS_FDS, PROCESS_RSS, REQUEST_RETRIES, REQUESTS, Shared,
    },
    process::{Process, local_port_range, local_ports_used},
    recorder::{
        CLASSES, Delta, EdgeCount, EdgeKey, EndpointName, EndpointReport, MAX_DECISIONS, MAX_EDGES, Sample,
        SeriesKey, Take, class_index, micros,
    },
};

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
                    direction: pb::Direction::from(key.direction).into(),
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
            self.direction.as_str(),
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

/// Upper bounds of the classic buckets, in microseconds; +Inf follows.
const BUCKETS: [u64; 16] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// How many series are called so: one a direction and protocol.
const OVERFLOWS: usize = 8;
/// Endpoints in one report.
const MAX_ENDPOINTS: usize = 10_000;
/// A worker that does not answer in this time is left out of one collection.
const TAKE_TIMEOUT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::recorder::{
        MAX_MICROS, OVERFLOW, Recorder, channel,
        tests::{edge, key},
    };

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

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escape("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
        assert_eq!(Seconds(2_950_000).to_string(), "2.95");
        assert_eq!(Seconds(60_000_000).to_string(), "60");
        assert_eq!(Seconds(1).to_string(), "0.000001");
    }
}
