//! A tiny API server for tests: lists, watches, and the few writes that the controller makes. It keeps what
//! a real one keeps (versions, conflicts, `404` for what has no CRD) and can go away and come back.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::broadcast, task::JoinHandle};
use tokio_stream::{StreamExt as _, wrappers::BroadcastStream};

/// Collection (`/api/v1/services`), namespace, name.
type Id = (String, String, String);

struct State {
    objects: BTreeMap<Id, Value>,
    version: u64,
    /// Collections that are served.
    kinds: BTreeSet<String>,
    /// What a token review answers, by token.
    tokens: BTreeMap<String, Value>,
    changes: broadcast::Sender<(Id, Value)>,
    /// Changes by version, for watches that begin a little later.
    history: Vec<(u64, Id, Value)>,
    /// Nothing before this version is remembered.
    forgotten: u64,
    /// Names whose status nobody may write.
    spoilt: BTreeSet<String>,
    /// Requests that wrote something, as `METHOD path`.
    writes: Vec<String>,
}

/// The server.
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
    serving: Option<JoinHandle<()>>,
}

pub(crate) const CORE: [&str; 6] = [
    "/api/v1/services",
    "/api/v1/pods",
    "/api/v1/nodes",
    "/api/v1/namespaces",
    "/apis/discovery.k8s.io/v1/endpointslices",
    ROLES,
];
pub(crate) const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
const WRITTEN: [&str; 4] = [
    "/api/v1/secrets",
    "/api/v1/configmaps",
    "/apis/coordination.k8s.io/v1/leases",
    "/apis/events.k8s.io/v1/events",
];
pub(crate) const POLICIES: [&str; 3] = [
    "/apis/weft.dev/v1alpha1/trafficpolicies",
    "/apis/weft.dev/v1alpha1/authorizationpolicies",
    "/apis/weft.dev/v1alpha1/meshconfigs",
];
pub(crate) const ROUTES: [&str; 2] =
    ["/apis/gateway.networking.k8s.io/v1/httproutes", "/apis/gateway.networking.k8s.io/v1/grpcroutes"];

impl Fake {
    pub(crate) async fn start() -> Self {
        let (changes, _) = broadcast::channel(1_024);
        let kinds = CORE.iter().chain(&WRITTEN).chain(&POLICIES).map(ToString::to_string).collect();
        let state = State {
            objects: BTreeMap::new(),
            version: 1,
            kinds,
            tokens: BTreeMap::new(),
            changes,
            history: Vec::new(),
            forgotten: 0,
            spoilt: BTreeSet::new(),
            writes: Vec::new(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut fake = Self { state: Arc::new(Mutex::new(state)), address, serving: None };
        fake.serve(listener);
        fake
    }

    pub(crate) fn uri(&self) -> http::Uri {
        format!("http://{}", self.address).parse().unwrap()
    }

    fn serve(&mut self, listener: TcpListener) {
        let state = self.state.clone();
        self.serving = Some(tokio::spawn(async move {
            // Its connections end with it.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let state = state.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let http = hyper::server::conn::http1::Builder::new();
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        }));
    }

    pub(crate) async fn go_away(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
        let mut state = self.state.lock().unwrap();
        state.history.clear();
        // Whoever watched has to list again: an API server forgets, too.
        state.forgotten = u64::MAX;
    }

    pub(crate) async fn come_back(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        {
            let mut state = self.state.lock().unwrap();
            state.version += 1;
            state.forgotten = state.version;
        }
        self.serve(listener);
    }

    /// Serves more kinds, as a CRD does that is installed.
    pub(crate) fn install(&self, kinds: &[&str]) {
        self.state.lock().unwrap().kinds.extend(kinds.iter().map(ToString::to_string));
    }

    /// Serves a kind no more, as a proxy in its place that knows of nothing.
    pub(crate) fn uninstall(&self, kind: &str) {
        let mut state = self.state.lock().unwrap();
        state.kinds.remove(kind);
        state.watches_end();
    }

    /// Refuses each status of an object, as a schema does that the object does not fit any more.
    pub(crate) fn spoil(&self, name: &str) {
        self.state.lock().unwrap().spoilt.insert(name.to_owned());
    }

    pub(crate) fn token(&self, token: &str, status: Value) {
        self.state.lock().unwrap().tokens.insert(token.to_owned(), status);
    }

    /// Applies objects of a YAML text, without namespace for those that have none.
    pub(crate) fn apply(&self, collection: &str, object: Value) {
        let meta = &object["metadata"];
        let text = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
        let id = (collection.to_owned(), text("namespace"), text("name"));
        self.state.lock().unwrap().put(id, object);
    }

    pub(crate) fn delete(&self, collection: &str, namespace: &str, name: &str) {
        let id = (collection.to_owned(), namespace.to_owned(), name.to_owned());
        let mut state = self.state.lock().unwrap();
        if let Some(object) = state.objects.remove(&id) {
            state.tell("DELETED", id, object);
        }
    }

    pub(crate) fn get(&self, collection: &str, namespace: &str, name: &str) -> Option<Value> {
        let id = (collection.to_owned(), namespace.to_owned(), name.to_owned());
        self.state.lock().unwrap().objects.get(&id).cloned()
    }

    pub(crate) fn writes(&self) -> Vec<String> {
        self.state.lock().unwrap().writes.clone()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

impl State {
    fn put(&mut self, id: Id, mut object: Value) -> Value {
        let old = self.objects.get(&id);
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.version += 1;
        let uid =
            old.map_or_else(|| json!(format!("uid-{}", self.version)), |old| old["metadata"]["uid"].clone());
        let meta = object["metadata"].as_object_mut().unwrap();
        meta.entry("uid").or_insert(uid);
        meta.insert("resourceVersion".to_owned(), json!(self.version.to_string()));
        self.objects.insert(id.clone(), object.clone());
        self.tell(kind, id, object.clone());
        object
    }

    /// Whoever watches has to ask again.
    fn watches_end(&mut self) {
        self.changes = broadcast::channel(1_024).0;
    }

    fn tell(&mut self, kind: &str, id: Id, object: Value) {
        if kind == "DELETED" {
            self.version += 1;
        }
        let event = json!({"type": kind, "object": object});
        self.history.push((self.version, id.clone(), event.clone()));
        let _ = self.changes.send((id, event));
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let body: Value = body
        .collect()
        .await
        .ok()
        .and_then(|body| serde_json::from_slice(&body.to_bytes()).ok())
        .unwrap_or_default();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let one = |name: &str| {
        query.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")).map(ToOwned::to_owned))
    };
    let (collection, namespace, name, sub) = parse(head.uri.path());
    let mut state = state.lock().unwrap();
    if head.method != Method::GET {
        state.writes.push(format!("{} {}", head.method, head.uri.path()));
    }
    if collection.ends_with("/tokenreviews") {
        let token = body["spec"]["token"].as_str().unwrap_or_default();
        let status = state.tokens.get(token).cloned().unwrap_or_else(|| json!({"authenticated": false}));
        return Ok(send(
            StatusCode::CREATED,
            &json!({"metadata": {}, "spec": body["spec"], "status": status}),
        ));
    }
    if !state.kinds.contains(&collection) {
        return Ok(refuse(404, "NotFound"));
    }
    let id = (collection.clone(), namespace.clone(), name.clone());
    let stale = |body: &Value, there: &Value| {
        let named = &body["metadata"]["resourceVersion"];
        !named.is_null() && *named != there["metadata"]["resourceVersion"]
    };
    if sub == "status" && state.spoilt.contains(&name) {
        return Ok(refuse(422, "Invalid"));
    }
    let answered = match (head.method.clone(), name.is_empty()) {
        (Method::GET, false) => match state.objects.get(&id) {
            Some(object) => send(StatusCode::OK, object),
            None => refuse(404, "NotFound"),
        },
        (Method::GET, true) => {
            let only =
                one("fieldSelector").map(|text| text.replace("%3D", "=").replace("metadata.name=", ""));
            let of = move |id: &Id| {
                id.0 == collection
                    && (namespace.is_empty() || id.1 == namespace)
                    && only.as_ref().is_none_or(|only| id.2 == *only)
            };
            if one("watch").is_some_and(|watch| watch == "true" || watch == "1") {
                let since: u64 = one("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0);
                if since < state.forgotten {
                    drop(of);
                    return Ok(refuse(410, "Expired"));
                }
                let missed: Vec<_> = state
                    .history
                    .iter()
                    .filter(|(version, ..)| *version > since)
                    .map(|(_, id, event)| Ok((id.clone(), event.clone())))
                    .collect();
                let changes =
                    tokio_stream::iter(missed).chain(BroadcastStream::new(state.changes.subscribe()));
                let changes = changes.filter_map(move |change| {
                    let (id, event) = change.ok()?;
                    of(&id).then(|| Ok(Frame::data(Bytes::from(format!("{event}\n")))))
                });
                return Ok(Response::new(StreamBody::new(changes).boxed()));
            }
            let items: Vec<_> =
                state.objects.iter().filter(|(id, _)| of(id)).map(|(_, o)| o.clone()).collect();
            let meta = json!({"resourceVersion": state.version.to_string()});
            send(
                StatusCode::OK,
                &json!({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items}),
            )
        }
        (Method::POST, _) => {
            let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let id = (collection, namespace, name);
            match state.objects.contains_key(&id) {
                true => refuse(409, "AlreadyExists"),
                false => send(StatusCode::CREATED, &state.put(id, body)),
            }
        }
        (Method::PUT, _) => match state.objects.get(&id) {
            Some(there) if stale(&body, there) => refuse(409, "Conflict"),
            Some(_) => send(StatusCode::OK, &state.put(id, body)),
            None => refuse(404, "NotFound"),
        },
        (Method::PATCH, _) => {
            let applied =
                head.headers.get("content-type").is_some_and(|t| t.as_bytes().ends_with(b"apply-patch+yaml"));
            match state.objects.get(&id).cloned() {
                Some(there) if stale(&body, &there) => refuse(409, "Conflict"),
                Some(mut there) => {
                    let only = if sub == "status" { json!({"status": body["status"]}) } else { body };
                    json_patch::merge(&mut there, &only);
                    send(StatusCode::OK, &state.put(id, there))
                }
                None if applied => send(StatusCode::CREATED, &state.put(id, body)),
                None => refuse(404, "NotFound"),
            }
        }
        _ => refuse(405, "MethodNotAllowed"),
    };
    Ok(answered)
}

/// `/api/v1[/namespaces/<ns>]/<plural>[/<name>[/<sub>]]`, and the same below `/apis/<group>/<version>`.
fn parse(path: &str) -> (String, String, String, String) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let base = if parts.first() == Some(&"api") { 2 } else { 3 };
    let (root, rest) = parts.split_at(base.min(parts.len()));
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let part = |at: usize| rest.get(at).copied().unwrap_or_default().to_owned();
    (format!("/{}/{}", root.join("/"), part(0)), namespace.to_owned(), part(1), part(2))
}

fn send(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed());
    *response.status_mut() = status;
    response
}

fn refuse(code: u16, reason: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "reason": reason, "message": reason, "metadata": {}});
    send(StatusCode::from_u16(code).unwrap(), &status)
}
