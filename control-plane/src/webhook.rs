//! What the API server asks before it stores an object: give this pod a sidecar, is this policy right?
//!
//! Why one server for both: one port, one certificate, one thing that can be down. Why a bound on everything: an
//! admission that hangs is a cluster that cannot deploy. What is asked is bounded in size, in time and in number, and
//! what is above the bound is told to come again rather than made to wait. The API server's address is nobody's to
//! know, so each address has the same share of everything: a pod that connects and says nothing, or says it slowly,
//! uses up its own.
//!
//! Why it goes on for some seconds when it is told to end: the API server and kube-proxy send here until they have heard
//! that it ends, and an admission that is refused is a pod that is not made.
//!
//! Why whoever injects also sees to the namespace's trust anchors: see `k8s/roots.rs`. It waits for a moment only, and
//! never decides about the pod.
//!
//! The two paths of injection differ only in what a pod that says nothing gets: `/inject` is for namespaces that ask
//! for sidecars, `/inject/asked` for pods that ask for themselves elsewhere.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use rustls::ServerConfig;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::{BoxError, ServiceBuilder, ServiceExt as _, service_fn};

use crate::{
    ca::Ca,
    index::validate,
    injector::{Outcome, Values, inject},
    k8s::{owner::Owner, roots::ClusterRoots},
    resources::{Header, Kind, Meaning, Object},
    serve::{Share, Shares, closed},
};

mod certificate;

/// The port that the Service `weft-controller` sends admission to.
pub const PORT: u16 = 14_012;
/// Where the API server asks for sidecars in namespaces that want them.
pub const INJECT_PATH: &str = "/inject";
/// Where it asks for pods that want one themselves.
pub const INJECT_ASKED_PATH: &str = "/inject/asked";
/// Where it asks whether an object of ours is right.
pub const VALIDATE_PATH: &str = "/validate";

/// One listening port.
pub struct Webhook {
    /// Listening already, so that a port in use is an error at start.
    listener: TcpListener,
    /// What sidecars are like.
    values: Arc<Values>,
    /// Whether anybody ever connected.
    asked: Arc<AtomicBool>,
    /// Of what it makes.
    owner: Option<Owner>,
    /// What injected pods mount.
    anchors: Option<Anchors>,
}

/// Who writes a namespace's trust anchors, and what they are.
#[derive(Clone)]
pub struct Anchors {
    /// Who writes.
    pub roots: Arc<ClusterRoots>,
    /// What.
    pub ca: Arc<Ca>,
    /// Namespaces with sidecars, as the cluster says: whoever reaches this port may ask in any name.
    pub injected: watch::Receiver<BTreeSet<Arc<str>>>,
}

impl Anchors {
    /// Before the first pod is stored: its kubelet would not find them, and wait longer each time.
    async fn ensure(&self, namespace: &str) {
        let Self { roots, ca, injected } = self;
        if !injected.borrow().contains(namespace) {
            return;
        }
        if timeout(ANCHORS_TIMEOUT, roots.ensure(ca, namespace, Some(ANCHORS_KNOWN))).await.is_err() {
            tracing::warn!(
                namespace,
                "the trust anchors are slow to be published: its first pods may have to wait"
            );
        }
    }
}

impl Webhook {
    /// A server of `values`, whose certificate is still to come.
    pub fn new(
        listener: TcpListener,
        values: Arc<Values>,
        owner: Option<Owner>,
        anchors: Option<Anchors>,
    ) -> Self {
        Self { listener, values, asked: Arc::default(), owner, anchors }
    }

    /// Serves with a certificate that `client`'s API server believes, until `closing` says so.
    pub async fn run(self, client: Client, closing: watch::Receiver<bool>) {
        let owner = self.owner.clone();
        self.run_with(async move |first| certificate::keep(client, owner, first).await, closing).await;
    }

    async fn run_with(
        self,
        keep: impl AsyncFnOnce(oneshot::Sender<Arc<ArcSwap<ServerConfig>>>),
        mut closing: watch::Receiver<bool>,
    ) {
        let (first, certified) = oneshot::channel();
        let keep = keep(first);
        let (close, seen) = watch::channel(false);
        let asked = self.asked.clone();
        let serve = async move {
            if let Ok(tls) = certified.await {
                self.serve(tls, seen).await;
            }
        };
        let end = async move {
            closed(&mut closing).await;
            // Whoever was never asked is not about to be.
            if asked.load(Ordering::Relaxed) {
                sleep(LINGER).await;
            }
            close.send_replace(true);
        };
        let both = async { tokio::join!(serve, end) };
        tokio::select! {
            () = keep => {}
            _ = both => {}
        }
    }

    async fn serve(&self, tls: Arc<ArcSwap<ServerConfig>>, mut closing: watch::Receiver<bool>) {
        let (values, anchors) = (self.values.clone(), self.anchors.clone());
        // Shed, not queued: the API server asks again in a second.
        let service = ServiceBuilder::new()
            .load_shed()
            .concurrency_limit(MAX_REQUESTS)
            .timeout(REQUEST_TIMEOUT)
            .service(service_fn(move |request| answer(request, values.clone(), anchors.clone())));
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (shares, reviews) = (Shares::for_all(MAX_OF_ONE), Shares::for_all(MAX_REQUESTS_OF_ONE));
        loop {
            let Ok(slot) = connections.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                biased;
                () = closed(&mut closing) => return,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok((stream, peer)) => (stream, peer.ip()),
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            self.asked.store(true, Ordering::Relaxed);
            let Some(share) = Share::take(&shares, peer) else {
                tracing::debug!(%peer, "too many connections of one address");
                continue;
            };
            let (tls, service, mut closing) = (tls.load_full(), service.clone(), closing.clone());
            let reviews = reviews.clone();
            tokio::spawn(async move {
                let _slot = (slot, share);
                let stream = match timeout(HANDSHAKE_TIMEOUT, handshake(tls, stream)).await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => return tracing::debug!(%error, "handshake failed"),
                    Err(_) => return tracing::debug!("handshake timed out"),
                };
                let mut builder = auto::Builder::new(TokioExecutor::new());
                builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
                builder
                    .http2()
                    .timer(TokioTimer::new())
                    .keep_alive_interval(IDLE)
                    .max_concurrent_streams(100);
                let asked = watch::Sender::new(0_usize);
                let mut under_way = asked.subscribe();
                let service = hyper::service::service_fn(move |request| {
                    let share = Share::take(&reviews, peer);
                    let (service, busy) = (service.clone(), Busy::new(&asked));
                    async move {
                        let _busy = busy;
                        let Some(_share) = share else { return Ok(too_many()) };
                        let answered = service.oneshot(request).await;
                        Ok::<_, Infallible>(answered.unwrap_or_else(|error| unanswered(&error)))
                    }
                });
                let connection = builder.serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                // The certificate that it began with is not for ever.
                let ended = tokio::select! {
                    ended = connection.as_mut() => Some(ended),
                    () = sleep(MAX_AGE) => None,
                    () = idle(&mut under_way) => None,
                    () = closed(&mut closing) => None,
                };
                let ended = match ended {
                    Some(ended) => ended,
                    None => {
                        connection.as_mut().graceful_shutdown();
                        timeout(REQUEST_TIMEOUT, connection).await.unwrap_or(Ok(()))
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "admission connection ended");
                }
            });
        }
    }
}

/// Waits until nothing was asked for a while.
async fn idle(under_way: &mut watch::Receiver<usize>) {
    loop {
        // Its sender lives as long as the connection.
        let _ = under_way.wait_for(|reviews| *reviews == 0).await;
        tokio::select! {
            () = sleep(IDLE) => return,
            _ = under_way.changed() => {}
        }
    }
}

/// One review under way on a connection.
struct Busy(watch::Sender<usize>);

impl Busy {
    fn new(of: &watch::Sender<usize>) -> Self {
        of.send_modify(|reviews| *reviews += 1);
        Self(of.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send_modify(|reviews| *reviews -= 1);
    }
}

async fn handshake(
    tls: Arc<ServerConfig>,
    stream: TcpStream,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    TlsAcceptor::from(tls).accept(stream).await
}

async fn answer(
    request: Request<Incoming>,
    values: Arc<Values>,
    anchors: Option<Anchors>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::POST {
        return Ok(text(StatusCode::METHOD_NOT_ALLOWED, "POST an AdmissionReview"));
    }
    let path = request.uri().path().to_owned();
    let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Ok(text(StatusCode::PAYLOAD_TOO_LARGE, &format!("the review: {error}"))),
    };
    Ok(match decide(&path, &body, &values) {
        Ok((review, namespace)) => {
            if let (Some(namespace), Some(anchors)) = (namespace, anchors) {
                anchors.ensure(&namespace).await;
            }
            let mut response = Response::new(Full::new(Bytes::from(review.to_string())));
            let json = http::HeaderValue::from_static("application/json");
            response.headers_mut().insert(http::header::CONTENT_TYPE, json);
            response
        }
        Err((status, reason)) => text(status, &reason),
    })
}

fn unanswered(error: &BoxError) -> Response<Full<Bytes>> {
    if error.is::<tower::timeout::error::Elapsed>() {
        return text(StatusCode::REQUEST_TIMEOUT, "the review took too long to arrive");
    }
    too_many()
}

fn too_many() -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::SERVICE_UNAVAILABLE, "too many reviews at a time: ask again");
    // Without it the API server does not.
    response.headers_mut().insert(http::header::RETRY_AFTER, http::HeaderValue::from_static("1"));
    response
}

fn text(status: StatusCode, reason: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{reason}\n"))));
    *response.status_mut() = status;
    response
}

/// What of an AdmissionReview matters here.
#[derive(Debug, Deserialize)]
struct Review {
    request: Asked,
}

#[derive(Debug, Deserialize)]
struct Asked {
    uid: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    operation: String,
    #[serde(default, rename = "dryRun")]
    dry_run: bool,
    #[serde(default)]
    object: Value,
}

/// What is decided about an object.
#[derive(Debug, Default, PartialEq)]
struct Decision {
    /// The reason not to admit it.
    denied: Option<String>,
    patch: Option<json_patch::Patch>,
    /// Whether the pod gets a sidecar by it.
    injects: bool,
    warnings: Vec<String>,
}

/// Answers one review: AdmissionReview in, AdmissionReview out.
///
/// # Errors
/// It is none, or nothing is asked at that path.
pub fn review(path: &str, body: &[u8], values: &Values) -> Result<Value, (StatusCode, String)> {
    decide(path, body, values).map(|(review, _)| review)
}

/// The same, and the namespace that gets a pod with a sidecar by it.
fn decide(path: &str, body: &[u8], values: &Values) -> Result<(Value, Option<String>), (StatusCode, String)> {
    let Review { request } = serde_json::from_slice(body)
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("not an AdmissionReview: {error}")))?;
    let decision = match path {
        // An object that goes needs nothing.
        _ if request.operation == "DELETE" => Decision::default(),
        INJECT_PATH => injection(&request, true, values),
        INJECT_ASKED_PATH => injection(&request, false, values),
        VALIDATE_PATH => validation(&request),
        _ => return Err((StatusCode::NOT_FOUND, format!("{path}: nothing is asked here"))),
    };
    let gets_a_sidecar = decision.injects && !request.dry_run && !request.namespace.is_empty();
    let namespace = gets_a_sidecar.then(|| request.namespace.clone());
    if let Some(reason) = &decision.denied {
        tracing::info!(namespace = %request.namespace, name = %request.name, path, %reason, "not admitted");
    }
    let mut response = json!({ "uid": request.uid, "allowed": decision.denied.is_none() });
    if let Some(reason) = decision.denied {
        response["status"] = json!({ "code": 422, "reason": "Invalid", "message": reason });
    }
    if let Some(patch) = decision.patch {
        let patch = serde_json::to_vec(&patch)
            .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("the patch: {error}")))?;
        response["patchType"] = "JSONPatch".into();
        response["patch"] = base64::prelude::BASE64_STANDARD.encode(patch).into();
    }
    if !decision.warnings.is_empty() {
        response["warnings"] = decision.warnings.into();
    }
    let review =
        json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response });
    Ok((review, namespace))
}

fn injection(request: &Asked, by_default: bool, values: &Values) -> Decision {
    let pod: Pod = match decode(&request.object) {
        Ok(pod) => pod,
        Err(reason) => return Decision { denied: Some(format!("weft: {reason}")), ..Decision::default() },
    };
    match inject(&pod, by_default, values) {
        Ok(Outcome::Inject(patch)) => Decision { patch: Some(patch), injects: true, ..Decision::default() },
        Ok(Outcome::Skip(reason, patch)) => Decision {
            patch: Some(patch),
            warnings: vec![format!("weft: no sidecar: {reason}")],
            ..Decision::default()
        },
        Ok(Outcome::Leave(_)) => Decision::default(),
        Err(refused) => Decision { denied: Some(format!("weft: {refused}")), ..Decision::default() },
    }
}

/// The same two steps that a source takes, so that what is admitted is what will be used.
fn validation(request: &Asked) -> Decision {
    let denied = |reason: String| Decision { denied: Some(format!("weft: {reason}")), ..Decision::default() };
    let header: Header = match decode(&request.object) {
        Ok(header) => header,
        Err(reason) => return denied(reason),
    };
    let kind = match header.meaning() {
        Meaning::Known(kind @ (Kind::TrafficPolicy | Kind::AuthorizationPolicy | Kind::MeshConfig)) => kind,
        // Never asked about; a route that is wrong in part says so in its status.
        Meaning::Known(_) | Meaning::List | Meaning::Foreign => return Decision::default(),
        Meaning::Bad(reason) => return denied(reason),
    };
    let mut track = serde_path_to_error::Track::new();
    let object = Object::decode(kind, serde_path_to_error::Deserializer::new(&request.object, &mut track));
    let object = match object {
        Ok(object) => object,
        Err(error) => return denied(format!("{}: {error}", track.path())),
    };
    match validate::object(&object) {
        Ok(()) => Decision::default(),
        Err(invalid) => denied(invalid.to_string()),
    }
}

fn decode<T: DeserializeOwned>(object: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(object).map_err(|error| format!("{}: {}", error.path(), error.inner()))
}

/// An object of the API server is 1.5 MiB at most, and a review holds the old one too.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// At a time: a review is microseconds of work, so this is for those whose body is slow to come.
const MAX_REQUESTS: usize = 64;
/// … of one address.
const MAX_REQUESTS_OF_ONE: usize = 24;
/// 30 KiB each.
const MAX_CONNECTIONS: usize = 1_024;
/// An API server has one or two.
const MAX_OF_ONE: usize = 16;
/// The webhook configurations say 10 s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(8);
/// Of those 10 s, for what a pod mounts; who waits longer writes it when the pod is there.
const ANCHORS_TIMEOUT: Duration = Duration::from_secs(1);
/// For how long it is believed that they are there: a namespace may be made anew.
const ANCHORS_KNOWN: Duration = Duration::from_secs(10);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(60);
const MAX_AGE: Duration = Duration::from_secs(30 * 60);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Until every node has heard that this replica ends.
const LINGER: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn ask(path: &str, object: Value) -> Value {
        let review = json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u-1", "namespace": "shop", "name": "x", "operation": "CREATE", "object": object } });
        let answer = self::review(path, review.to_string().as_bytes(), &Values::default()).unwrap();
        assert_eq!(answer["response"]["uid"], "u-1");
        answer["response"].clone()
    }

    fn pod(more: Value) -> Value {
        let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "generateName": "web-" },
            "spec": { "containers": [{ "name": "web", "image": "web:1" }] } });
        json_patch::merge(&mut pod, &more);
        pod
    }

    #[tokio::test]
    async fn a_webhook_that_ends_is_there_until_everybody_has_heard_of_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let webhook = Webhook::new(listener, Arc::default(), None, None);
        let key = rcgen::generate_simple_self_signed(vec!["weft".to_owned()]).unwrap();
        let tls = ServerConfig::builder_with_provider(crate::serve::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], key.signing_key.into())
            .unwrap();
        let (close, closing) = watch::channel(false);
        let certified = async move |first: oneshot::Sender<_>| {
            let _ = first.send(Arc::new(ArcSwap::from_pointee(tls)));
            std::future::pending().await
        };
        let running = tokio::spawn(webhook.run_with(certified, closing));
        let mut early = TcpStream::connect(address).await.unwrap();
        // It says nothing that is TLS: what is written back is that it was heard.
        early.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(early.read(&mut [0; 64]).await.is_ok());
        close.send_replace(true);
        let mut late = TcpStream::connect(address).await.unwrap();
        late.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(late.read(&mut [0; 64]).await.unwrap() > 0, "answered, be it with an alert");
        running.abort();
    }

    #[test]
    fn who_is_to_ask_again_is_told_when() {
        assert_eq!(too_many().headers()[http::header::RETRY_AFTER], "1");
    }

    #[test]
    fn a_pod_is_patched_as_weft_inject_does_it() {
        let answer = ask(INJECT_PATH, pod(json!({})));
        assert_eq!((&answer["allowed"], &answer["patchType"]), (&json!(true), &json!("JSONPatch")));
        let patch = base64::prelude::BASE64_STANDARD.decode(answer["patch"].as_str().unwrap()).unwrap();
        let mut patched = pod(json!({}));
        let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
        json_patch::patch(&mut patched, &patch).unwrap();
        assert_eq!(patched["spec"]["initContainers"][1]["name"], "weft-proxy");
        // A namespace that asks for none, and a pod that says nothing.
        let answer = ask(INJECT_ASKED_PATH, pod(json!({})));
        assert!(answer["allowed"] == true && answer["patch"].is_null(), "{answer}");
        let asks = pod(json!({ "metadata": { "labels": { "weft.dev/inject": "enabled" } } }));
        assert!(ask(INJECT_ASKED_PATH, asks)["patch"].is_string());
    }

    #[test]
    fn a_namespace_gets_its_anchors_with_its_first_sidecar_and_a_question_changes_nothing() {
        let asked = |path: &str, pod: Value, dry_run: bool| {
            let review = json!({ "request": { "uid": "u-1", "namespace": "shop", "operation": "CREATE",
                "dryRun": dry_run, "object": pod } });
            decide(path, review.to_string().as_bytes(), &Values::default()).unwrap().1
        };
        assert_eq!(asked(INJECT_PATH, pod(json!({})), false).as_deref(), Some("shop"));
        assert_eq!(asked(INJECT_PATH, pod(json!({})), true), None, "kubectl --dry-run=server");
        assert_eq!(asked(INJECT_ASKED_PATH, pod(json!({})), false), None);
        assert_eq!(asked(INJECT_PATH, pod(json!({ "spec": { "hostNetwork": true } })), false), None);
    }

    #[test]
    fn a_pod_on_the_nodes_network_is_admitted_with_a_warning() {
        let answer = ask(INJECT_PATH, pod(json!({ "spec": { "hostNetwork": true } })));
        assert_eq!(answer["allowed"], true);
        assert!(
            answer["warnings"][0].as_str().unwrap().starts_with("weft: no sidecar: hostNetwork"),
            "{answer}"
        );
    }

    #[test]
    fn a_refusal_names_the_annotation_and_the_fix() {
        let answer =
            ask(INJECT_PATH, pod(json!({ "metadata": { "annotations": { "weft.dev/log": "a=b" } } })));
        let message = answer["status"]["message"].as_str().unwrap();
        assert!(
            answer["allowed"] == false && message.starts_with("weft: annotation weft.dev/log:"),
            "{answer}"
        );
    }

    #[test]
    fn a_policy_is_refused_with_its_field_and_the_fix() {
        let policy = |kind: &str, spec: Value| {
            let object = json!({ "apiVersion": "weft.dev/v1alpha1", "kind": kind,
                "metadata": { "name": "x", "namespace": "shop" }, "spec": spec });
            let answer = ask(VALIDATE_PATH, object);
            (answer["allowed"] == true, answer["status"]["message"].as_str().unwrap_or_default().to_owned())
        };
        let target = json!([{ "kind": "Service", "name": "web" }]);
        assert_eq!(policy("TrafficPolicy", json!({ "targetRefs": target })), (true, String::new()));
        for (kind, spec, message) in [
            (
                "TrafficPolicy",
                json!({ "targetRefs": target, "timeouts": { "request": "soon" } }),
                "weft: spec.timeouts.request: \"soon\" is not a duration",
            ),
            ("TrafficPolicy", json!({}), "weft: spec.targetRefs: is empty"),
            (
                "AuthorizationPolicy",
                json!({ "rules": [{ "from": [{ "identitys": ["*"] }] }] }),
                "weft: spec.rules[0].from[0].identitys: unknown field",
            ),
            (
                "MeshConfig",
                json!({ "meshRanges": ["10.0.0.1/8"] }),
                "weft: spec.meshRanges[0]: \"10.0.0.1/8\" has",
            ),
        ] {
            let (allowed, said) = policy(kind, spec);
            assert!(!allowed && said.starts_with(message), "{said}");
        }
    }

    #[test]
    fn what_is_no_review_is_answered_and_not_admitted() {
        let values = Values::default();
        assert_eq!(review(INJECT_PATH, b"{}", &values).unwrap_err().0, StatusCode::BAD_REQUEST);
        let body = br#"{"request": {"uid": "1"}}"#;
        assert_eq!(review("/", body, &values).unwrap_err().0, StatusCode::NOT_FOUND);
        let answer = ask(INJECT_PATH, json!({ "metadata": 1 }));
        assert_eq!(answer["allowed"], false, "{answer}");
    }
}
