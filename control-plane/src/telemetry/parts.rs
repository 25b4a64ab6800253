//! What was counted in a window, by series: an answer that can be added to another controller's.
//!
//! Why histograms and not percentiles go between controllers: the p99 of the mesh is that of all requests, and no
//! arithmetic makes it out of two p99s.

use std::{collections::BTreeMap, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use weft_core::identity::SpiffeId;
use weft_proto::pb::v1::{Direction, OutcomeClass};

use super::{
    histogram,
    view::{self, OutcomeRow, Quantiles, RouteRow},
};

/// Which routes to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// `<ns>/<name>` or `<ns>/<name>:<port>`, as parent or backend.
    pub service: Option<String>,
    /// `<ns>` or `<ns>/<service account>` of the reporting workload.
    pub workload: Option<String>,
}

/// What one series is about; merged over all pods of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) workload: SpiffeId,
    pub(super) direction: i32,
    pub(super) parent: Arc<str>,
    pub(super) route: Arc<str>,
    pub(super) backend: Arc<str>,
    pub(super) protocol: Arc<str>,
    pub(super) outcome: i32,
}

/// What was counted of one series.
#[derive(Default)]
pub(super) struct Open {
    pub(super) count: u64,
    pub(super) retries: u64,
    pub(super) first_byte: Option<Histogram<u64>>,
    pub(super) duration: Option<Histogram<u64>>,
}

/// What was counted in a window, with its histograms.
#[derive(Default)]
pub struct Parts {
    pub(super) covered_ms: u64,
    pub(super) merged: BTreeMap<Key, BTreeMap<i32, Open>>,
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
            let decode = |text: &str| histogram::decode(&BASE64.decode(text).ok()?).ok().flatten();
            let more = Open {
                count: part.count,
                retries: part.retries,
                first_byte: decode(&part.first_byte),
                duration: decode(&part.duration),
            };
            self.merged.entry(key).or_default().entry(part.outcome).or_default().add(&more);
        }
    }

    /// For people.
    pub fn rows(self) -> Vec<RouteRow> {
        let covered_ms = self.covered_ms.max(1_000);
        self.merged.into_iter().map(|(key, outcomes)| row(&key, outcomes, covered_ms)).collect()
    }
}

impl Filter {
    pub(super) fn admits(&self, key: &Key) -> bool {
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

impl Open {
    /// Adds what was counted elsewhere.
    pub(super) fn add(&mut self, more: &Self) {
        self.count = self.count.saturating_add(more.count);
        self.retries = self.retries.saturating_add(more.retries);
        merge(&mut self.first_byte, more.first_byte.as_ref());
        merge(&mut self.duration, more.duration.as_ref());
    }
}

fn merge(total: &mut Option<Histogram<u64>>, more: Option<&Histogram<u64>>) {
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
        total.add(&open);
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
