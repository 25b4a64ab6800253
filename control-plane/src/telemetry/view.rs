//! What the API says of telemetry: the types that the controller writes and `weft` reads.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// One route of one workload over a window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// `<namespace>/<service account>` of the reporting workload.
    pub workload: String,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// The destination: `<ns>/<name>:<port>` outbound, the pod's port inbound.
    pub parent: String,
    /// The rule's label.
    pub route: String,
    /// The backend, `<ns>/<name>:<port>`.
    pub backend: String,
    /// `http1`, `http2`, `grpc` or `tcp`.
    pub protocol: String,
    /// Requests in the window.
    pub count: u64,
    /// Retries and re-dispatches in the window.
    pub retries: u64,
    /// Requests per second.
    pub rate: f64,
    /// Share that did not fail, in `0.0..=1.0`; a client's own errors are no failure.
    pub success_rate: f64,
    /// To the first byte of the response's body.
    pub first_byte: Quantiles,
    /// To the end of the response.
    pub duration: Quantiles,
    /// Counts of `duration` on a logarithmic scale, for pictures.
    pub buckets: Vec<Bucket>,
    /// `ok`, `client_error`, `server_error`, `proxy`.
    pub by_outcome: BTreeMap<String, OutcomeRow>,
}

/// Quantiles in milliseconds, each right within 1 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50_ms: f64,
    /// 90 %.
    pub p90_ms: f64,
    /// 99 %.
    pub p99_ms: f64,
    /// 99.9 %.
    pub p999_ms: f64,
    /// The largest.
    pub max_ms: f64,
}

/// One bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Its upper bound, inclusive.
    pub up_to_ms: f64,
    /// How many.
    pub count: u64,
}

/// One outcome class of a route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OutcomeRow {
    /// How many.
    pub count: u64,
    /// How long.
    pub duration: Quantiles,
}

/// Who calls whom.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EdgeRow {
    /// The caller's identity; empty: plaintext.
    pub caller: String,
    /// The called workload's identity.
    pub callee: String,
    /// The called port or service.
    pub service: String,
    /// gRPC method or route template.
    pub method: String,
    /// Whether it came by mTLS.
    pub mtls: bool,
    /// Requests or connections.
    pub count: u64,
    /// Of them, failed or refused.
    pub errors: u64,
    /// Milliseconds since 1970.
    pub first_seen_ms: u64,
    /// Milliseconds since 1970.
    pub last_seen_ms: u64,
}

/// One endpoint as one sidecar sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// Pod uid of the sidecar that says so.
    pub seen_by: String,
    /// Its identity.
    pub caller: String,
    /// `<ns>/<name>:<port>`.
    pub backend: String,
    /// The endpoint's pod uid.
    pub uid: String,
    /// Its address.
    pub address: String,
    /// Cost of the next request there, as the balancer believes.
    pub cost_ms: f64,
    /// Requests on it.
    pub in_flight: u32,
    /// Weight.
    pub weight: u32,
    /// `healthy`, `ejected`, `probing` or `draining`.
    pub state: String,
    /// How long it stays ejected.
    pub ejected_for_ms: u64,
    /// Why.
    pub reason: String,
    /// Requests since the report before.
    pub requests: u64,
}

/// One sidecar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SidecarRow {
    /// Who.
    pub identity: String,
    /// Which pod.
    pub uid: String,
    /// Version of the proxy.
    pub version: String,
    /// Resident memory.
    pub rss_bytes: u64,
    /// Open connections.
    pub connections: u64,
    /// Seconds since 1970.
    pub certificate_not_after: i64,
    /// Seconds since its last report.
    pub last_seen_s: u64,
    /// Resources that are live there.
    pub applied: usize,
    /// Resources that it refuses.
    pub nacked: usize,
    /// Telemetry that it had to drop.
    pub dropped: u64,
}

impl Quantiles {
    /// Of a histogram in microseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let ms = |q: f64| histogram.value_at_quantile(q) as f64 / 1_000.0;
        Self {
            p50_ms: ms(0.5),
            p90_ms: ms(0.9),
            p99_ms: ms(0.99),
            p999_ms: ms(0.999),
            max_ms: histogram.max() as f64 / 1_000.0,
        }
    }
}

/// Four buckets an octave from 64 µs on, without the empty ones at both ends.
pub(super) fn buckets(histogram: &Histogram<u64>) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut bound = 64.0_f64;
    let mut values = histogram.iter_recorded().peekable();
    while let Some(next) = values.peek() {
        if (next.value_iterated_to() as f64) <= bound {
            let count = next.count_at_value();
            values.next();
            match buckets.last_mut() {
                Some(last) if last.up_to_ms == bound / 1_000.0 => last.count += count,
                _ => buckets.push(Bucket { up_to_ms: bound / 1_000.0, count }),
            }
        } else {
            if !buckets.is_empty() && buckets.last().is_some_and(|last| last.up_to_ms != bound / 1_000.0) {
                buckets.push(Bucket { up_to_ms: bound / 1_000.0, count: 0 });
            }
            bound *= 2.0_f64.powf(0.25);
        }
    }
    buckets
}
