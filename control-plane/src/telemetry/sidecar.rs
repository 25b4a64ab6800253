//! What one sidecar says of itself: what is live in it, what it refuses, which endpoints it sees.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use weft_core::identity::{PodUid, SpiffeId};
use weft_proto::pb::v1 as pb;

use super::{
    bounds::{MAX_ITEMS, cut, is_recent},
    texts::{EndpointName, Texts},
    view::{EndpointRow, SidecarRow},
};

/// Who reports: as the certificate says, never as the report says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reporter {
    /// The workload.
    pub identity: SpiffeId,
    /// The pod.
    pub uid: PodUid,
}

/// The newest that it said, within bounds.
pub(super) struct Sidecar {
    pub(super) reporter: Reporter,
    pub(super) session: String,
    pub(super) sequence: u64,
    pub(super) last_seen_ms: u64,
    pub(super) gauges: pb::Gauges,
    /// (type URL, name) → version that is live there.
    pub(super) applied: BTreeMap<Resource, Arc<str>>,
    /// Bytes of these.
    pub(super) applied_text: usize,
    /// (type URL, name) → (version, reason) of what it refused and has not accepted since.
    pub(super) nacked: BTreeMap<Resource, (String, String)>,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) dropped: u64,
}

/// Type URL and name.
type Resource = (Arc<str>, Arc<str>);

/// One endpoint as one sidecar sees it.
pub(super) struct Endpoint {
    name: Arc<EndpointName>,
    reason: Option<Arc<str>>,
    cost_us: u64,
    ejected_for_ms: u64,
    requests: u64,
    in_flight: u32,
    weight: u32,
    state: i32,
}

impl Sidecar {
    /// One that has said nothing yet.
    pub(super) fn new(reporter: &Reporter, now_ms: u64) -> Self {
        Self {
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
        }
    }

    /// Whether a report is a new one. What was said in another session is forgotten.
    pub(super) fn begin(&mut self, session: String, sequence: u64, now_ms: u64) -> bool {
        self.last_seen_ms = now_ms;
        let session = cut(session);
        if self.session != session {
            // Started anew: what was live in the process before is not known to be live in this one.
            self.session = session;
            self.applied.clear();
            self.applied_text = 0;
            self.nacked.clear();
        } else if sequence <= self.sequence {
            return false;
        }
        self.sequence = sequence;
        true
    }

    /// Takes the endpoints that it describes; says how many there was no room for.
    pub(super) fn take_endpoints(&mut self, endpoints: Vec<pb::EndpointState>, texts: &mut Texts) -> u64 {
        let told = endpoints.len();
        let endpoints =
            endpoints.into_iter().take(MAX_ENDPOINTS_OF_ONE).map(|said| Endpoint::new(said, texts));
        let within = endpoints.scan(0_usize, |bytes, endpoint| {
            *bytes += endpoint.bytes();
            (*bytes <= MAX_ENDPOINT_TEXT).then_some(endpoint)
        });
        self.endpoints = within.collect();
        self.endpoints.shrink_to_fit();
        (told - self.endpoints.len()) as u64
    }

    /// Whether it has said something lately.
    pub(super) fn is_there(&self, now_ms: u64) -> bool {
        is_recent(self.last_seen_ms, now_ms, SIDECAR_GONE)
    }

    /// For people.
    pub(super) fn row(&self, now_ms: u64) -> SidecarRow {
        SidecarRow {
            identity: self.reporter.identity.to_string(),
            uid: self.reporter.uid.to_string(),
            version: self.gauges.version.clone(),
            rss_bytes: self.gauges.rss_bytes,
            connections: self.gauges.connections,
            certificate_not_after: self.gauges.certificate_not_after,
            last_seen_s: now_ms.saturating_sub(self.last_seen_ms) / 1_000,
            applied: self.applied.len(),
            nacked: self.nacked.len(),
            dropped: self.dropped,
        }
    }

    /// Says how many names were left out: nobody subscribes to as many as are kept.
    pub(super) fn take_delivery(
        &mut self,
        applied: Vec<pb::Applied>,
        nacked: Vec<pb::Nacked>,
        texts: &mut Texts,
    ) -> u64 {
        let mut left_out = 0;
        for applied in applied.into_iter().take(MAX_ITEMS) {
            let key = (texts.keep(applied.type_url), texts.keep(applied.name));
            self.nacked.remove(&key);
            let names = key.0.len() + key.1.len();
            let before = self.applied.get(&key).map_or(0, |version| names + version.len());
            if applied.removed {
                self.applied.remove(&key);
                self.applied_text -= before;
                continue;
            }
            let version = texts.keep(applied.version);
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
            let key = (texts.keep(nacked.type_url), texts.keep(nacked.name));
            if self.nacked.len() < MAX_NACKED || self.nacked.contains_key(&key) {
                self.nacked.insert(key, (cut(nacked.version), cut(nacked.reason)));
            } else {
                left_out += 1;
            }
        }
        left_out
    }

    pub(super) fn endpoint_rows(&self) -> impl Iterator<Item = EndpointRow> {
        self.endpoints.iter().map(|endpoint| EndpointRow {
            seen_by: self.reporter.uid.to_string(),
            caller: self.reporter.identity.to_string(),
            backend: endpoint.name.backend.clone(),
            uid: endpoint.name.uid.clone(),
            address: endpoint.name.address.clone(),
            cost_ms: endpoint.cost_us as f64 / 1_000.0,
            in_flight: endpoint.in_flight,
            weight: endpoint.weight,
            state: endpoint.state().as_str_name().trim_start_matches("STATE_").to_ascii_lowercase(),
            ejected_for_ms: endpoint.ejected_for_ms,
            reason: endpoint.reason.as_deref().unwrap_or_default().to_owned(),
            requests: endpoint.requests,
        })
    }
}

impl Endpoint {
    fn new(mut said: pb::EndpointState, texts: &mut Texts) -> Self {
        Self {
            name: texts.keep_endpoint(&mut said),
            reason: (!said.reason.is_empty()).then(|| cut(said.reason).into()),
            cost_us: said.cost_us,
            ejected_for_ms: said.ejected_for_ms,
            requests: said.requests,
            in_flight: said.in_flight,
            weight: said.weight,
            state: said.state,
        }
    }

    /// As if nobody else spoke of it.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.name.len() + self.reason.as_ref().map_or(0, |reason| reason.len())
    }

    fn state(&self) -> pb::endpoint_state::State {
        pb::endpoint_state::State::try_from(self.state).unwrap_or_default()
    }
}

/// Endpoints that one sidecar describes.
pub(super) const MAX_ENDPOINTS_OF_ONE: usize = 5_000;
/// Bytes of what one sidecar says is live in it: 20,000 names of a usual length.
pub(super) const MAX_APPLIED_TEXT: usize = 4 * 1024 * 1024;
/// Bytes of the endpoints that one sidecar describes.
pub(super) const MAX_ENDPOINT_TEXT: usize = 2 * 1024 * 1024;
/// Resources that one sidecar refuses, with their reasons.
pub(super) const MAX_NACKED: usize = 1_000;
/// A sidecar that has said nothing for so long is gone.
pub(super) const SIDECAR_GONE: Duration = Duration::from_secs(90);
