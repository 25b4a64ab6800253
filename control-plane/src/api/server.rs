//! HTTP/1 on loopback: `/api/v1/…` in JSON, `/live`, `/ready`, `/metrics`.
//!
//! Why it is bounded: it shows the whole mesh and merges histograms to do so. At most 16 questions are
//! worked on at a time, each for at most ten seconds, off the threads that serve sidecars.
//!
//! Why `/live` and `/ready` are not: whoever keeps a kubelet from its answer has the controller killed. They cost
//! nothing, wait for nobody, and no address but the kubelet's own can take all connections.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpListener, sync::Semaphore, sync::watch};
use tower::{ServiceBuilder, ServiceExt as _};
use weft_core::identity::PodUid;
use weft_proto::{ads::ResourceType, names::Name};

use super::{
    merge,
    status::{Facts, pod_name},
    types::{Anchor, Certs, Endpoints, Refusal, Rotated, Routes, Status, WorkloadCertificate},
};
use crate::{
    ca::{Ca, RootKeeper, RotateRoot},
    metrics::{Metrics, Sample},
    resources::values::GatewayDuration,
    serve::{
        Share, Shares, closed,
        identity::Certify,
        now_ms,
        published::Published,
        publisher::{self, State},
        replicas::Replicas,
        telemetry::Reports,
        tls::Peer,
    },
    telemetry::{Filter, Parts, Store},
};

/// What the API reads.
pub struct Api {
    /// The authority.
    pub ca: Arc<Ca>,
    /// What it issued.
    pub certify: Certify,
    /// What is published.
    pub published: Arc<Published>,
    /// Objects and problems.
    pub state: Arc<RwLock<State>>,
    /// What sidecars said.
    pub store: Arc<Mutex<Store>>,
    /// When they said that something is live.
    pub reports: Reports,
    /// Own metrics.
    pub metrics: Arc<Metrics>,
    /// The source, for people.
    pub source: String,
    /// Who keeps the roots, where that is not a folder.
    pub keeper: Option<Arc<dyn RootKeeper>>,
    /// The other controllers, where there may be some.
    pub replicas: Option<Replicas>,
}

/// What the others answered.
type Others = Vec<(String, Option<Bytes>)>;

/// An answer that is not 2xx.
struct Refused(StatusCode, String);

type Answer = Result<Response<Full<Bytes>>, Refused>;

/// Serves until `closing` says so; `probes_only` keeps the mesh from whoever is not on this machine.
pub async fn serve(
    listener: TcpListener,
    api: Arc<Api>,
    probes_only: bool,
    mut closing: watch::Receiver<bool>,
) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // The API itself is asked by whoever is on this machine, and by nobody else.
    let shares = if probes_only { Shares::for_all(MAX_OF_ONE) } else { Shares::new(MAX_OF_ONE) };
    let probed = api.clone();
    let work = ServiceBuilder::new()
        .load_shed()
        .concurrency_limit(MAX_REQUESTS)
        .timeout(REQUEST_TIMEOUT)
        .service_fn(move |request: Request<Incoming>| {
            let api = api.clone();
            async move {
                let (head, _) = request.into_parts();
                if probes_only && head.uri.path().starts_with("/api/") {
                    let reason = "the mesh is shown on loopback only".to_owned();
                    return Ok(Refused(StatusCode::NOT_FOUND, reason).response());
                }
                if let Some(asked) = rotation(&head) {
                    return Ok(api.rotate(asked).await.unwrap_or_else(Refused::response));
                }
                let others = api.ask_others(&head).await;
                // Merging is work: not on the threads that serve sidecars.
                let answered = tokio::task::spawn_blocking(move || api.answer(&head, others)).await;
                answered.map_err(std::io::Error::other)
            }
        });
    loop {
        let Ok(slot) = connections.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            biased;
            () = closed(&mut closing) => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        let Some(share) = Share::take(&shares, peer.ip()) else {
            tracing::debug!(%peer, "too many connections of one address");
            continue;
        };
        let (work, probed, mut closing) = (work.clone(), probed.clone(), closing.clone());
        tokio::spawn(async move {
            let _slot = (slot, share);
            let service = service_fn(move |request: Request<Incoming>| {
                let (work, probed) = (work.clone(), probed.clone());
                async move {
                    if matches!(request.uri().path(), "/live" | "/ready") {
                        return Ok(probed.answer(&request.into_parts().0, Others::new()));
                    }
                    let answer = work.oneshot(request).await.unwrap_or_else(|error| {
                        Refused(StatusCode::SERVICE_UNAVAILABLE, format!("try again: {error}")).response()
                    });
                    Ok::<_, Infallible>(answer)
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                () = closed(&mut closing) => connection.as_mut().graceful_shutdown(),
            }
            let _ = tokio::time::timeout(Duration::from_secs(2), connection).await;
        });
    }
}

impl Api {
    /// What this controller alone knows: the answer to another one.
    pub fn part(&self, head: &http::request::Parts) -> Response<Full<Bytes>> {
        self.answer(head, Others::new())
    }

    /// The status of the whole mesh.
    pub async fn whole_status(self: Arc<Self>) -> Option<Status> {
        let others = match &self.replicas {
            Some(replicas) => replicas.ask("/api/v1/status").await,
            None => Others::new(),
        };
        // Counting is work, as above.
        tokio::task::spawn_blocking(move || merge::status(self.status(), parts(others))).await.ok()
    }

    async fn ask_others(&self, head: &http::request::Parts) -> Others {
        let Some(replicas) = self.replicas.as_ref().filter(|_| head.method == Method::GET) else {
            return Others::new();
        };
        let path = match head.uri.path() {
            "/api/v1/routes" => "/api/v1/route-parts",
            path @ ("/api/v1/status" | "/api/v1/endpoints" | "/api/v1/edges" | "/api/v1/certs") => path,
            _ => return Others::new(),
        };
        match head.uri.query() {
            Some(query) => replicas.ask(&format!("{path}?{query}")).await,
            None => replicas.ask(path).await,
        }
    }

    fn answer(&self, head: &http::request::Parts, others: Others) -> Response<Full<Bytes>> {
        self.try_answer(head, others).unwrap_or_else(Refused::response)
    }

    fn try_answer(&self, head: &http::request::Parts, others: Others) -> Answer {
        let query = query(head.uri.query().unwrap_or_default());
        let get = head.method == Method::GET || head.method == Method::HEAD;
        match head.uri.path() {
            "/live" if get => Ok(text(StatusCode::OK, "live\n")),
            "/ready" if get => Ok(self.ready()),
            "/metrics" if get => Ok(text(StatusCode::OK, self.render_metrics())),
            "/api/v1/routes" if get => {
                let (window, mut all) = self.routes(&query)?;
                for part in parts(others).into_iter().filter_map(|(_, part)| part) {
                    all.add(part);
                }
                json(&Routes { window_s: window.as_secs(), rows: all.rows() })
            }
            "/api/v1/route-parts" if get => json(&self.routes(&query)?.1.wire()),
            "/api/v1/status" if get => json(&merge::status(self.status(), parts(others))),
            "/api/v1/endpoints" if get => json(&merge::endpoints(self.endpoints(&query), parts(others))),
            "/api/v1/edges" if get => json(&merge::edges(self.store().edges(), parts(others))),
            "/api/v1/certs" if get => json(&merge::certs(self.certs(), parts(others))),
            path @ ("/live"
            | "/ready"
            | "/metrics"
            | "/api/v1/routes"
            | "/api/v1/route-parts"
            | "/api/v1/status"
            | "/api/v1/endpoints"
            | "/api/v1/edges"
            | "/api/v1/certs"
            | "/api/v1/certs/rotate") => {
                Err(Refused(StatusCode::METHOD_NOT_ALLOWED, format!("{} is not for {path}", head.method)))
            }
            path => Err(Refused(StatusCode::NOT_FOUND, format!("there is no {path}"))),
        }
    }

    /// What this replica knows of everything.
    pub fn status(&self) -> Status {
        let facts = Facts {
            state: &self.state,
            published: &self.published,
            store: &self.store,
            reports: &self.reports,
        };
        facts.status(&self.source)
    }

    fn ready(&self) -> Response<Full<Bytes>> {
        match *self.published.synced().borrow() {
            true => text(StatusCode::OK, "ready\n"),
            false => text(StatusCode::SERVICE_UNAVAILABLE, "the source has not been read yet\n"),
        }
    }

    fn routes(&self, query: &BTreeMap<String, String>) -> Result<(Duration, Parts), Refused> {
        let window = match query.get("window") {
            None => DEFAULT_WINDOW,
            Some(text) => match text.parse::<GatewayDuration>() {
                Ok(window) if (MIN_WINDOW..=MAX_WINDOW).contains(&window.0) => window.0,
                Ok(_) | Err(_) => {
                    return Err(Refused(StatusCode::BAD_REQUEST, format!("window {text:?}: write 1s to 1h")));
                }
            },
        };
        let filter =
            Filter { service: query.get("service").cloned(), workload: query.get("workload").cloned() };
        let parts = self.store().parts(&filter, window, now_ms());
        Ok((window, parts))
    }

    fn endpoints(&self, query: &BTreeMap<String, String>) -> Endpoints {
        let mut rows = self.store().endpoints();
        if let Some(service) = query.get("service") {
            rows.retain(|row| {
                let rest = row.backend.strip_prefix(service.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
            });
        }
        let state = self.state();
        let uids = rows.iter().flat_map(|row| [&row.uid, &row.seen_by]);
        let pods =
            uids.filter_map(|uid| Some((uid.clone(), pod_name(&state.index, &PodUid::new(uid).ok()?))));
        let pods = pods.collect();
        Endpoints { rows, pods }
    }

    fn certs(&self) -> Certs {
        let anchor = |root: crate::ca::root::RootInfo| Anchor {
            serial: root.serial,
            not_before: seconds(root.not_before),
            not_after: seconds(root.not_after),
            signing: root.signs,
        };
        let mut workloads = self.certify.issued();
        let state = self.state();
        // What a pod that is gone leaves to run out tells nobody when to renew.
        let is_there =
            |uid: &str| PodUid::new(uid).is_ok_and(|uid| state.index.workload_name(&uid).is_some());
        if *self.published.synced().borrow() {
            workloads.retain(|workload| is_there(&workload.uid));
        }
        for workload in &mut workloads {
            if let Ok(uid) = PodUid::new(&workload.uid)
                && state.index.workload_name(&uid).is_some()
            {
                workload.pod = pod_name(&state.index, &uid);
            }
        }
        drop(state);
        let own = Certs {
            trust_domain: self.ca.trust_domain().to_string(),
            sequence: self.ca.bundle().borrow().sequence,
            anchors: self.ca.describe().into_iter().map(anchor).collect(),
            workloads,
        };
        let shown = Certs { workloads: self.presented(), ..Certs::default() };
        merge::certs(own, vec![(String::new(), Some(shown))])
    }

    /// What connected sidecars came with. A controller that has just begun has signed nothing yet.
    fn presented(&self) -> Vec<WorkloadCertificate> {
        let streams = self.published.subscribers.streams();
        let bundle = Name::TrustBundle(self.ca.trust_domain().clone()).to_string();
        let (state, store) = (self.state(), self.store());
        let in_force = |uid: &PodUid| {
            let version = store.live(uid, ResourceType::TrustBundle.type_url(), &bundle);
            version.and_then(publisher::sequence_of).unwrap_or(0)
        };
        let shown = |peer: &Arc<Peer>| WorkloadCertificate {
            pod: pod_name(&state.index, &peer.uid),
            uid: peer.uid.to_string(),
            identity: peer.identity.to_string(),
            serial: peer.certificate.serial.clone(),
            not_before: seconds(peer.certificate.not_before),
            not_after: seconds(peer.certificate.not_after),
            anchor: self.ca.root_by_key(&peer.certificate.authority),
            connected: true,
            bundle: in_force(&peer.uid),
        };
        streams.iter().map(shown).collect()
    }

    /// Refuses a step of a root's rotation that would cut off connected sidecars: those that do not trust the new root
    /// yet would believe nobody who has renewed, and nobody would believe those whose certificate is of the old one,
    /// once it is retired.
    async fn nobody_is_cut_off(&self, step: RotateRoot) -> Result<(), Refused> {
        let conflict = |reason: String| Refused(StatusCode::CONFLICT, reason);
        // A step that there is none to take of says that, and nothing of sidecars.
        let stays = match step {
            RotateRoot::Add => return Ok(()),
            RotateRoot::Activate => self.ca.has_coming_root().map(|()| String::new()),
            RotateRoot::Retire => self.ca.staying_root(),
        };
        let stays = stays.map_err(|error| conflict(error.to_string()))?;
        let others = match &self.replicas {
            Some(replicas) => replicas.ask("/api/v1/certs").await,
            None => Others::new(),
        };
        let others = parts(others);
        let silent: Vec<_> =
            others.iter().filter(|(_, part)| part.is_none()).map(|(name, _)| &**name).collect();
        if !silent.is_empty() {
            let silent = silent.join(", ");
            return Err(conflict(format!(
                "{silent} does not say which certificates its sidecars have: ask again, or --force"
            )));
        }
        let Certs { workloads, sequence, .. } = merge::certs(self.certs(), others);
        let has_followed = |workload: &WorkloadCertificate| match step {
            RotateRoot::Add => true,
            RotateRoot::Activate => workload.bundle >= sequence,
            RotateRoot::Retire => workload.anchor == stays,
        };
        let late = workloads.iter().filter(|workload| workload.connected && !has_followed(workload));
        let late: Vec<_> = late.map(|workload| &*workload.pod).collect();
        if late.is_empty() {
            return Ok(());
        }
        let named = late.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let named = match late.len().saturating_sub(NAMED) {
            0 => named,
            more => format!("{named} and {more} more"),
        };
        Err(conflict(match step {
            RotateRoot::Add | RotateRoot::Activate => format!(
                "{named} would believe nobody who renews: the new root is not trusted there yet. Wait until it is \
                 (`weft certs` shows who has which bundle), or --force"
            ),
            RotateRoot::Retire => format!(
                "nobody would believe {named} any more: their certificates are of the old root. Wait until they have \
                 renewed (`weft certs` shows who has), or --force"
            ),
        }))
    }

    async fn rotate(&self, asked: Result<Rotation, Refused>) -> Answer {
        let Rotation { step, force } = asked?;
        if let Some(step) = step.filter(|_| !force) {
            self.nobody_is_cut_off(step).await?;
        }
        let done = match &self.keeper {
            Some(keeper) => keeper.rotate(&self.ca, step).await,
            None => self.ca.rotate(step),
        };
        let bundle = done.map_err(|error| Refused(StatusCode::CONFLICT, error.to_string()))?;
        tracing::info!(sequence = bundle.sequence, roots = bundle.roots.len(), "certificates rotate");
        json(&Rotated { sequence: bundle.sequence })
    }

    fn render_metrics(&self) -> String {
        let (state, store) = (self.state(), self.store());
        let n = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let unusable = state.problems.len() + state.unpublished.len() + state.left_out.len();
        let sample = |name, help, value| Sample { name, help, value };
        let samples = [
            sample("ready", "Whether the source was read", u64::from(*self.published.synced().borrow())),
            sample("resources", "Published resources", n(self.published.len())),
            sample("objects", "Objects of the source", n(state.index.objects().count())),
            sample("problems", "What could not be used", n(unusable)),
            sample("sidecars", "Sidecars that report", n(store.sidecars(now_ms()).len())),
            sample("refused_resources", "Resources that sidecars refuse", n(store.nacked().count())),
            sample("telemetry_bytes", "Histograms kept", n(store.bytes())),
            sample("telemetry_dropped_total", "Telemetry left out", store.dropped),
            sample("telemetry_repeated_total", "Reports that came twice", store.repeated),
            sample("telemetry_refused_total", "Histograms refused", store.refused),
        ];
        self.metrics.render(&samples)
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The others' answers; what cannot be read is none.
fn parts<T: DeserializeOwned>(others: Others) -> Vec<merge::Part<T>> {
    let read = |body: Bytes| serde_json::from_slice(&body).ok();
    others.into_iter().map(|(name, body)| (name, body.and_then(read))).collect()
}

/// What is to be rotated.
struct Rotation {
    /// Without a step only certificates are renewed.
    step: Option<RotateRoot>,
    /// Whatever becomes of those who have not followed.
    force: bool,
}

/// Which step is asked for; `None`: this is no such question.
fn rotation(head: &http::request::Parts) -> Option<Result<Rotation, Refused>> {
    if head.uri.path() != "/api/v1/certs/rotate" || head.method != Method::POST {
        return None;
    }
    // Only a browser sends it, and no page of ours does.
    if head.headers.contains_key(header::ORIGIN) {
        return Some(Err(Refused(StatusCode::FORBIDDEN, "not for browsers".to_owned())));
    }
    let query = query(head.uri.query().unwrap_or_default());
    let step = match query.get("root").map(String::as_str) {
        None => None,
        Some("add") => Some(RotateRoot::Add),
        Some("activate") => Some(RotateRoot::Activate),
        Some("retire") => Some(RotateRoot::Retire),
        Some(other) => {
            let reason = format!("root {other:?}: write add, then activate, then retire");
            return Some(Err(Refused(StatusCode::BAD_REQUEST, reason)));
        }
    };
    Some(Ok(Rotation { step, force: query.get("force").is_some_and(|force| force == "true") }))
}

impl Refused {
    fn response(self) -> Response<Full<Bytes>> {
        let body = serde_json::json!(Refusal { error: self.1 }).to_string();
        respond(self.0, "application/json", body)
    }
}

fn json(value: &impl Serialize) -> Answer {
    let body = serde_json::to_vec(value)
        .map_err(|error| Refused(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(respond(StatusCode::OK, "application/json", body))
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    respond(status, "text/plain; version=0.0.4; charset=utf-8", body)
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response
}

/// `a=b&c=d`, percent-decoded; of equal names the last counts.
fn query(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                rest = &tail[2..];
            }
            (b'+', ..) => {
                bytes.push(b' ');
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn seconds(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Pods that a refusal names.
const NAMED: usize = 20;
const MAX_CONNECTIONS: usize = 1_024;
/// Connections of one address: a kubelet has one for each probe, a Prometheus one.
const MAX_OF_ONE: usize = 16;
const MAX_REQUESTS: usize = 16;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_WINDOW: Duration = Duration::from_secs(30);
const MIN_WINDOW: Duration = Duration::from_secs(1);
const MAX_WINDOW: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = query("service=shop%2Fapi%3A80&window=30s&empty&bad=%zz%4");
        assert_eq!(query["service"], "shop/api:80");
        assert_eq!(query["window"], "30s");
        assert_eq!(query["empty"], "");
        assert_eq!(query["bad"], "%zz%4");
    }
}
