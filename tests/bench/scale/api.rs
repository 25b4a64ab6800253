//! A stand-in for the Kubernetes API server: lists, watches, and the writes that a controller makes.
//!
//! What a real one does and this does not: authenticate, validate, admit, page its lists, speak protobuf, compact its
//! history, or be slow. What is measured is the controller's own part.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::sleep};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// The server; clones share it.
#[derive(Clone)]
pub(crate) struct Api(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    /// By collection (`/api/v1/services`), then by namespace and name.
    objects: BTreeMap<String, BTreeMap<Id, Value>>,
    version: u64,
    /// Every event, as a line: a watch begins where a list was.
    history: Vec<(u64, String, Bytes)>,
    watches: Vec<(String, mpsc::UnboundedSender<Bytes>)>,
    /// What was applied together, and goes when it is left out.
    files: BTreeMap<String, BTreeSet<(String, Id)>>,
}

/// Namespace and name.
type Id = (String, String);

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl Api {
    /// Serves on a port of its own.
    pub(crate) async fn start() -> Result<(Api, SocketAddr)> {
        let api = Api(Rc::default());
        for collection in SERVED {
            api.0.borrow_mut().objects.insert(collection.to_owned(), BTreeMap::new());
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let served = api.clone();
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = served.clone();
                tokio::task::spawn_local(async move {
                    let service = service_fn(move |request| answer(api.clone(), request));
                    // A client that leaves is no error.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok((api, address))
    }

    /// Makes the objects of one name exactly these.
    pub(crate) fn apply(&self, file: &str, items: Vec<Value>) {
        let mut state = self.0.borrow_mut();
        let mut there = BTreeSet::new();
        for item in items {
            let Some(collection) = collection(item["kind"].as_str().unwrap_or_default()) else { continue };
            let id = id(&item);
            there.insert((collection.to_owned(), id.clone()));
            state.put(collection, id, item);
        }
        let before = state.files.insert(file.to_owned(), there.clone()).unwrap_or_default();
        for (collection, id) in before.difference(&there) {
            state.delete(collection, id);
        }
    }
}

impl State {
    /// Tells nobody of what is no change.
    fn put(&mut self, collection: &str, id: Id, mut object: Value) -> Value {
        let old = self.objects.get(collection).and_then(|objects| objects.get(&id));
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        let next = (self.version + 1).to_string();
        let kept = |field: &str| old.map(|old| old["metadata"][field].clone()).filter(|kept| !kept.is_null());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = kept("uid").unwrap_or_else(|| json!(format!("made-{next}")));
        }
        if object["status"].is_null()
            && let Some(old) = old
        {
            object["status"] = old["status"].clone();
        }
        object["metadata"]["generation"] = json!(1);
        object["metadata"]["resourceVersion"] = kept("resourceVersion").unwrap_or_default();
        if old == Some(&object) {
            return object;
        }
        object["metadata"]["resourceVersion"] = json!(next);
        self.objects.entry(collection.to_owned()).or_default().insert(id, object.clone());
        self.tell(collection, kind, &object);
        object
    }

    fn delete(&mut self, collection: &str, id: &Id) {
        let gone = self.objects.get_mut(collection).and_then(|objects| objects.remove(id));
        if let Some(mut object) = gone {
            object["metadata"]["resourceVersion"] = json!((self.version + 1).to_string());
            self.tell(collection, "DELETED", &object);
        }
    }

    fn tell(&mut self, collection: &str, kind: &str, object: &Value) {
        self.version += 1;
        let line = Bytes::from(format!("{}\n", json!({"type": kind, "object": object})));
        self.watches.retain(|(of, watch)| of != collection || watch.send(line.clone()).is_ok());
        self.history.push((self.version, collection.to_owned(), line));
    }
}

async fn answer(api: Api, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let asked = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")));
    let (collection, namespace, name) = parse(head.uri.path());
    let mut state = api.0.borrow_mut();
    let Some(objects) = state.objects.get(&collection) else { return Ok(refuse(404, "NotFound")) };
    let key = (namespace.clone(), name.clone());
    let there = objects.get(&key).cloned();
    Ok(match (head.method, name.is_empty()) {
        (Method::GET, true) if asked("watch").is_some_and(|watch| watch == "true" || watch == "1") => {
            let since = asked("resourceVersion").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
            let seconds = asked("timeoutSeconds").and_then(|text| text.parse().ok()).unwrap_or(60);
            let (tell, told) = mpsc::unbounded_channel();
            let missed = state.history.iter().filter(|(at, of, _)| *at > since && *of == collection);
            for (_, _, line) in missed {
                // The other end is here.
                let _ = tell.send(line.clone());
            }
            state.watches.push((collection, tell));
            let lines = UnboundedReceiverStream::new(told).map(|line| Ok(Frame::data(line)));
            let lines = lines.take_until(Box::pin(sleep(Duration::from_secs(seconds))));
            Response::new(StreamBody::new(lines).boxed_unsync())
        }
        (Method::GET, true) => {
            let only = asked("fieldSelector").and_then(|text| text.strip_prefix("metadata.name%3D"));
            let items = objects.iter().filter(|((of, name), _)| {
                (namespace.is_empty() || *of == namespace) && only.is_none_or(|only| only == name)
            });
            let items: Vec<&Value> = items.map(|(_, object)| object).collect();
            let meta = json!({"resourceVersion": state.version.to_string()});
            send(
                StatusCode::OK,
                &json!({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items}),
            )
        }
        (Method::GET, false) => {
            there.map_or_else(|| refuse(404, "NotFound"), |there| send(StatusCode::OK, &there))
        }
        (Method::POST, _) => match objects.contains_key(&id(&body)) {
            true => refuse(409, "AlreadyExists"),
            false => send(StatusCode::CREATED, &state.put(&collection, id(&body), body)),
        },
        (Method::PUT, _) => send(StatusCode::OK, &state.put(&collection, key, body)),
        (Method::PATCH, _) => {
            let mut object = there.unwrap_or_else(|| json!({}));
            merge(&mut object, body);
            send(StatusCode::OK, &state.put(&collection, key, object))
        }
        _ => refuse(405, "MethodNotAllowed"),
    })
}

fn id(object: &Value) -> Id {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(&key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from,
    }
}

/// `/api/v1[/namespaces/<ns>]/<plural>[/<name>[/<sub>]]`, and the same below `/apis/<group>/<version>`.
fn parse(path: &str) -> (String, String, String) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let base = if parts.first() == Some(&"api") { 2 } else { 3 };
    let (root, rest) = parts.split_at(base.min(parts.len()));
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let part = |at: usize| rest.get(at).copied().unwrap_or_default().to_owned();
    (format!("/{}/{}", root.join("/"), part(0)), namespace.to_owned(), part(1))
}

fn send(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync());
    *response.status_mut() = status;
    response
}

fn refuse(code: u16, reason: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "reason": reason, "message": reason, "metadata": {}});
    send(StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &status)
}

fn collection(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "Service" => "/api/v1/services",
        "Pod" => "/api/v1/pods",
        "Namespace" => "/api/v1/namespaces",
        "Secret" => "/api/v1/secrets",
        "EndpointSlice" => "/apis/discovery.k8s.io/v1/endpointslices",
        "HTTPRoute" => "/apis/gateway.networking.k8s.io/v1/httproutes",
        "AuthorizationPolicy" => "/apis/weft.dev/v1alpha1/authorizationpolicies",
        "MeshConfig" => "/apis/weft.dev/v1alpha1/meshconfigs",
        _ => return None,
    })
}

const SERVED: [&str; 14] = [
    "/api/v1/services",
    "/api/v1/pods",
    "/api/v1/nodes",
    "/api/v1/namespaces",
    "/api/v1/secrets",
    "/api/v1/configmaps",
    "/apis/discovery.k8s.io/v1/endpointslices",
    "/apis/coordination.k8s.io/v1/leases",
    "/apis/events.k8s.io/v1/events",
    "/apis/gateway.networking.k8s.io/v1/httproutes",
    "/apis/gateway.networking.k8s.io/v1/grpcroutes",
    "/apis/weft.dev/v1alpha1/trafficpolicies",
    "/apis/weft.dev/v1alpha1/authorizationpolicies",
    "/apis/weft.dev/v1alpha1/meshconfigs",
];
