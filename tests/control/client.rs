//! What a sidecar must do, told by a controller that is not ours: the real control half, over real sockets and TLS,
//! in front of a server that only says what a test writes.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_rustls::TlsAcceptor;
use weft_control_plane::{
    ca::{Ca, Claims, workload_subject},
    serve::tls,
};
use weft_proxy::{
    config::Config,
    control::{self, Control},
    discovery::Target,
};

use crate::{
    raw::{
        Body, CERTIFY, DELTA, LONG, Message, Messages, Outgoing, Request, Resource, Response, fields, frame,
        outgoing, url,
    },
    world::Folder,
};

const VIP: &str = "10.96.0.1:80";
const NAME: &str = "ip/10.96.0.1:80";
const OTHER: &str = "ip/10.96.0.2:80";

/// A controller that leaves every answer of policy to the test.
struct Fake {
    streams: mpsc::Receiver<Stream>,
    config: Arc<Config>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    _folder: Folder,
}

/// One policy stream of the sidecar.
struct Stream {
    requests: mpsc::Receiver<Request>,
    send: Outgoing,
}

impl Fake {
    async fn start(name: &str, settings: &[(&str, &str)]) -> Self {
        let folder = Folder::new(&format!("client-{name}"));
        let domain = weft_core::identity::TrustDomain::new("cluster.local").unwrap();
        let ca = Arc::new(Ca::open(&folder.0, domain, Duration::from_secs(3_600)).unwrap());
        let bundle = ca.bundle().borrow().clone();
        let configs = tls::configs(&ca, &bundle).unwrap();
        let claims = Claims::new("shop", "web", "web-1-uid", "", SystemTime::now() + LONG * 100);
        std::fs::write(folder.0.join("token"), ca.join_key().unwrap().sign(&claims)).unwrap();
        let (accepted, streams) = mpsc::channel(16);
        let mut addresses = Vec::new();
        let mut tasks = Vec::new();
        for config in [configs.discovery, configs.identity] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap().to_string());
            tasks.push(tokio::spawn(serve(
                listener,
                TlsAcceptor::from(config),
                ca.clone(),
                accepted.clone(),
            )));
        }
        let path = |name: &str| folder.0.join(name).display().to_string();
        let (anchors, token) = (path("trust-anchors.pem"), path("token"));
        let base = [
            ("WEFT_NAMESPACE", "shop"),
            ("WEFT_SERVICE_ACCOUNT", "web"),
            ("WEFT_POD_UID", "web-1-uid"),
            ("WEFT_TRUST_ANCHORS", &*anchors),
            ("WEFT_TOKEN_FILE", &*token),
            ("WEFT_CONTROLLER", &*addresses[0]),
            ("WEFT_CONTROLLER_IDENTITY", &*addresses[1]),
            ("WEFT_RECONNECT_BASE", "10ms"),
            ("WEFT_RECONNECT_CAP", "50ms"),
            ("WEFT_DISCOVERY_HOLD", "30s"),
        ];
        let find = |name: &str| {
            let all = settings.iter().chain(&base);
            all.clone().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        let config = Arc::new(Config::read(find).unwrap());
        Self { streams, config, tasks, _folder: folder }
    }

    /// A sidecar that has its own configuration, and its stream.
    async fn ready(name: &str, settings: &[(&str, &str)]) -> (Self, Control, Stream) {
        let mut fake = Self::start(name, settings).await;
        let control = control::start(&fake.config, &Arc::default(), Vec::new());
        let mut stream = fake.accept().await;
        stream.configure(&control).await;
        (fake, control, stream)
    }

    async fn accept(&mut self) -> Stream {
        timeout(LONG, self.streams.recv()).await.expect("the sidecar connects").unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, ca: Arc<Ca>, accepted: mpsc::Sender<Stream>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (tls, ca, accepted) = (tls.clone(), ca.clone(), accepted.clone());
        connections.spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let service =
                hyper::service::service_fn(move |request| answer(request, ca.clone(), accepted.clone()));
            let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = http2.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: http::Request<Incoming>,
    ca: Arc<Ca>,
    accepted: mpsc::Sender<Stream>,
) -> Result<http::Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let (send, body) = outgoing();
    let mut messages = Messages::new(request.into_body());
    if path == CERTIFY {
        let asked = fields(&messages.next().await.unwrap());
        let part = |n| asked.iter().find(|(field, ..)| *field == n).unwrap().2.clone();
        let token = String::from_utf8(part(2)).unwrap();
        let claims = ca.check_token(&token, SystemTime::now()).unwrap();
        let issued = ca.issue(&part(1), &workload_subject(ca.trust_domain(), &claims).unwrap()).unwrap();
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let answer = Message::default()
            .each(&issued.chain, |message, der| message.bytes(1, der))
            .each(&ca.bundle().borrow().roots, |message, der| message.bytes(2, der))
            .uint(3, seconds(issued.validity.not_after))
            .uint(4, seconds(SystemTime::now()));
        let _ = send.send(Ok(Frame::data(frame(&answer.done())))).await;
        let trailers = http::HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
        let _ = send.send(Ok(Frame::trailers(trailers))).await;
    } else if path == DELTA {
        let (heard, requests) = mpsc::channel(64);
        let _ = accepted.send(Stream { requests, send }).await;
        tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                if heard.send(Request::decode(&message)).await.is_err() {
                    return;
                }
            }
        });
    } else {
        // Telemetry: taken and not answered.
        tokio::spawn(async move {
            while messages.next().await.is_some() {}
            drop(send);
        });
    }
    Ok(http::Response::builder().header("content-type", "application/grpc").body(body).unwrap())
}

impl Stream {
    async fn next(&mut self) -> Request {
        timeout(LONG, self.requests.recv()).await.expect("a request in time").expect("the stream is open")
    }

    async fn is_quiet(&mut self) -> bool {
        timeout(Duration::from_millis(250), self.requests.recv()).await.is_err()
    }

    async fn send(&self, response: &Response) {
        let _ = self.send.send(Ok(Frame::data(frame(&response.encode())))).await;
    }

    /// Sends a response and takes its answer, which must be the next request with a nonce.
    async fn exchange(&mut self, response: &Response) -> Request {
        self.send(response).await;
        loop {
            let request = self.next().await;
            if !request.nonce.is_empty() {
                assert_eq!((&request.nonce, &request.ty), (&response.nonce, &response.ty));
                return request;
            }
        }
    }

    /// Waits for a subscription.
    async fn wanted(&mut self, name: &str) -> Request {
        loop {
            let request = self.next().await;
            if request.subscribe.iter().any(|wanted| wanted == name) {
                return request;
            }
        }
    }

    /// Gives the sidecar its own configuration.
    async fn configure(&mut self, control: &Control) {
        let port = Message::default().uint(3, 1).text(4, "authz/web-1-uid/0");
        let own = Message::default()
            .text(1, "spiffe://cluster.local/ns/shop/sa/web")
            .message(3, port)
            .text(4, "10.0.0.0/8")
            .uint(5, 1)
            .text(6, "cluster.local");
        let own = resource("WorkloadConfig", "self/web-1-uid", "1", own);
        let authorization =
            resource("Authorization", "authz/web-1-uid/0", "1", Message::default().uint(1, 1));
        let own = self.exchange(&response("WorkloadConfig", "n-own", vec![own])).await;
        let authorization = self.exchange(&response("Authorization", "n-authz", vec![authorization])).await;
        assert_eq!((own.error, authorization.error), (None, None));
        timeout(LONG, async {
            while !control.lacks().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("configured");
    }
}

fn resource(ty: &str, name: &str, version: &str, body: Message) -> Resource {
    Resource { name: name.to_owned(), version: version.to_owned(), body: Some((url(ty), body.done())) }
}

/// A service that tells its version by a setting.
fn service(name: &str, version: u64) -> Resource {
    let body = Message::default().text(1, "shop").text(2, "a").uint(3, 80).uint(6, version);
    resource("Service", name, &version.to_string(), body)
}

/// One that no sidecar takes: its port is 0.
fn refused(name: &str, version: u64) -> Resource {
    resource("Service", name, &version.to_string(), Message::default().text(1, "shop").text(2, "a"))
}

fn response(ty: &str, nonce: &str, resources: Vec<Resource>) -> Response {
    Response { ty: url(ty), nonce: nonce.to_owned(), resources, removed: Vec::new() }
}

fn removal(nonce: &str, name: &str) -> Response {
    Response { removed: vec![name.to_owned()], ..response("Service", nonce, Vec::new()) }
}

/// An app that wants to go somewhere.
fn ask(control: &Control, address: &str) -> tokio::task::JoinHandle<Option<u64>> {
    let (discovery, address): (_, SocketAddr) = (control.discovery.clone(), address.parse().unwrap());
    tokio::spawn(async move {
        match discovery.resolve(address).await.unwrap() {
            Target::Service(watched) => {
                u64::try_from(watched.policy().service.detect_timeout.as_millis()).ok()
            }
            Target::Outside | Target::Denied => None,
        }
    })
}

async fn live(control: &Control, address: &str) -> Option<u64> {
    timeout(LONG, ask(control, address)).await.unwrap().unwrap()
}

/// A sidecar that uses the service, in version 1.
async fn using(name: &str, settings: &[(&str, &str)]) -> (Fake, Control, Stream) {
    let (fake, control, mut stream) = Fake::ready(name, settings).await;
    let asking = ask(&control, VIP);
    stream.wanted(NAME).await;
    let ack = stream.exchange(&response("Service", "n-1", vec![service(NAME, 1)])).await;
    assert_eq!((ack.error, asking.await.unwrap()), (None, Some(1)));
    (fake, control, stream)
}

#[tokio::test]
async fn the_node_is_said_once_a_stream() {
    let mut fake = Fake::start("node", &[]).await;
    let control = control::start(&fake.config, &Arc::default(), Vec::new());
    for round in 0..2 {
        let mut stream = fake.accept().await;
        let first = stream.next().await;
        assert_eq!(first.node.as_deref(), Some("web-1-uid"));
        if round == 0 {
            stream.configure(&control).await;
        }
        let asking = ask(&control, VIP);
        // Whether asked for just now or told again: it is in no later request.
        loop {
            let later = stream.next().await;
            assert_eq!(later.node, None);
            if later.subscribe.iter().any(|name| name == NAME) {
                break;
            }
        }
        assert_eq!(stream.exchange(&response("Service", "n", vec![service(NAME, 1)])).await.node, None);
        asking.await.unwrap();
    }
}

#[tokio::test]
async fn a_reconnect_names_everything_again_with_the_versions_held_and_no_nonce() {
    let (mut fake, control, mut stream) = using("reconnect", &[]).await;
    let asking = ask(&control, "10.96.0.2:80");
    stream.wanted(OTHER).await;
    stream.exchange(&removal("n-2", OTHER)).await;
    asking.await.unwrap();
    // Every update's version counts, not only the first.
    stream.exchange(&response("Service", "n-3", vec![service(NAME, 7)])).await;
    for _ in 0..2 {
        drop(stream);
        stream = fake.accept().await;
        let mut first = Vec::new();
        while !first.iter().any(|request: &Request| request.ty == url("Service")) {
            first.push(stream.next().await);
        }
        assert!(first.iter().all(|request| request.nonce.is_empty() && request.error.is_none()), "{first:?}");
        assert!(first.iter().all(|request| request.unsubscribe.is_empty()), "{first:?}");
        let of = |ty: &str| first.iter().find(|request| request.ty == url(ty)).unwrap().clone();
        assert_eq!(of("Service").subscribe, [NAME, OTHER], "what is known to be missing, too");
        assert_eq!(of("Service").versions, [(NAME.to_owned(), "7".to_owned())]);
        assert_eq!(of("WorkloadConfig").versions, [("self/web-1-uid".to_owned(), "1".to_owned())]);
        assert_eq!(of("Authorization").subscribe, ["authz/web-1-uid/0"]);
        assert_eq!(of("TrustBundle").subscribe, ["trust/cluster.local"]);
    }
}

#[tokio::test]
async fn what_was_learnt_serves_while_there_is_no_stream() {
    let (mut fake, control, stream) = using("away", &[]).await;
    drop(stream);
    let stream = fake.accept().await;
    // The new one says nothing at all.
    assert_eq!(live(&control, VIP).await, Some(1));
    drop((stream, fake));
    assert_eq!(live(&control, VIP).await, Some(1));
    assert!(control.lacks().is_empty());
}

#[tokio::test]
async fn a_subscription_carries_no_nonce_and_no_type_begins_with_an_empty_request() {
    let (_fake, control, mut stream) = Fake::ready("spontaneous", &[]).await;
    let asking = ask(&control, VIP);
    let request = stream.wanted(NAME).await;
    // Its first request of services: without a name it would ask for everything.
    assert_eq!((&*request.nonce, &request.subscribe[..]), ("", &[NAME.to_owned()][..]));
    stream.exchange(&response("Service", "n", vec![service(NAME, 1)])).await;
    asking.await.unwrap();
    ask(&control, "10.96.0.2:80");
    let request = stream.wanted(OTHER).await;
    assert_eq!((&*request.nonce, request.error, request.versions), ("", None, vec![]));
}

#[tokio::test]
async fn every_response_has_exactly_one_answer_with_its_own_nonce() {
    let (_fake, control, mut stream) = using("answers", &[]).await;
    // Two at once, of one version; then one that changes nothing at all.
    stream.send(&response("Service", "n-a", vec![service(NAME, 2)])).await;
    stream.send(&response("Service", "n-b", vec![service(NAME, 2)])).await;
    stream.send(&response("Service", "n-c", vec![])).await;
    for nonce in ["n-a", "n-b", "n-c"] {
        let answer = stream.next().await;
        assert_eq!((&*answer.nonce, answer.error), (nonce, None));
        assert!(answer.subscribe.is_empty() && answer.unsubscribe.is_empty());
    }
    assert!(stream.is_quiet().await);
    assert_eq!(live(&control, VIP).await, Some(2));
}

#[tokio::test]
async fn a_response_that_names_a_resource_twice_is_refused_whole() {
    let (_fake, control, mut stream) = using("twice", &[]).await;
    let twice = response("Service", "n-2", vec![service(NAME, 2), service(NAME, 3)]);
    assert!(stream.exchange(&twice).await.error.is_some());
    let both =
        Response { removed: vec![NAME.to_owned()], ..response("Service", "n-3", vec![service(NAME, 2)]) };
    assert!(stream.exchange(&both).await.error.is_some());
    assert_eq!(live(&control, VIP).await, Some(1), "the last good one");
    assert_eq!(stream.exchange(&response("Service", "n-4", vec![service(NAME, 4)])).await.error, None);
    assert_eq!(live(&control, VIP).await, Some(4));
}

#[tokio::test]
async fn a_refused_resource_is_named_not_held_and_keeps_nobody_else_back() {
    let (mut fake, control, mut stream) = using("refused", &[]).await;
    let asking = ask(&control, "10.96.0.2:80");
    stream.wanted(OTHER).await;
    let mixed = response("Service", "n-2", vec![refused(NAME, 2), service(OTHER, 2)]);
    let nack = stream.exchange(&mixed).await;
    assert_eq!(nack.rejected, [(NAME.to_owned(), "2".to_owned())]);
    assert!(nack.error.unwrap().contains(NAME), "a reason for people");
    assert_eq!(asking.await.unwrap(), Some(2), "what was right was taken");
    assert_eq!(live(&control, VIP).await, Some(1));
    // It does not say that it holds what it refused: else nobody would ever send it again.
    drop(stream);
    let mut stream = fake.accept().await;
    let again = stream.wanted(NAME).await;
    assert_eq!(again.versions, [(NAME.to_owned(), "1".to_owned()), (OTHER.to_owned(), "2".to_owned())]);
    assert_eq!(stream.exchange(&response("Service", "n-1", vec![service(NAME, 3)])).await.error, None);
    assert_eq!(live(&control, VIP).await, Some(3));
}

#[tokio::test]
async fn a_resource_of_another_type_without_body_or_without_sense_is_refused() {
    let (_fake, control, mut stream) = using("bodies", &[]).await;
    let wrong_type = Resource { body: Some((url("Route"), Vec::new())), ..service(NAME, 2) };
    let no_body = Resource { body: None, ..service(NAME, 3) };
    let no_sense = Resource { body: Some((url("Service"), vec![0xff; 9])), ..service(NAME, 4) };
    for (nonce, bad) in [("n-2", wrong_type), ("n-3", no_body), ("n-4", no_sense)] {
        let nack = stream.exchange(&response("Service", nonce, vec![bad.clone()])).await;
        assert_eq!(nack.rejected, [(NAME.to_owned(), bad.version)]);
    }
    assert_eq!(live(&control, VIP).await, Some(1));
}

#[tokio::test]
async fn an_unknown_type_is_neither_answered_nor_the_end() {
    let (_fake, control, mut stream) = using("unknown", &[]).await;
    let strange =
        Response { ty: "type.googleapis.com/weft.v9.New".to_owned(), ..response("Service", "x", vec![]) };
    stream.send(&strange).await;
    // An answer would be a first request of that type, and ask for everything.
    assert!(stream.is_quiet().await);
    assert_eq!(stream.exchange(&response("Service", "n-2", vec![service(NAME, 2)])).await.error, None);
    assert_eq!(live(&control, VIP).await, Some(2));
}

#[tokio::test]
async fn what_nobody_asked_for_is_acknowledged_and_not_taken() {
    let (_fake, control, mut stream) = using("unwanted", &[]).await;
    let unwanted = response("Service", "n-2", vec![service("ip/10.96.0.77:80", 5), service(NAME, 2)]);
    assert_eq!(stream.exchange(&unwanted).await.error, None);
    assert_eq!(live(&control, VIP).await, Some(2));
    let asking = ask(&control, "10.96.0.77:80");
    stream.wanted("ip/10.96.0.77:80").await;
    assert!(!asking.is_finished());
    stream.exchange(&response("Service", "n-3", vec![service("ip/10.96.0.77:80", 6)])).await;
    assert_eq!(asking.await.unwrap(), Some(6));
}

#[tokio::test]
async fn a_removed_resource_is_forgotten_and_taken_when_it_comes_back() {
    let (mut fake, control, mut stream) = using("gone", &[]).await;
    assert_eq!(stream.exchange(&removal("n-2", NAME)).await.error, None);
    assert_eq!(live(&control, VIP).await, None);
    drop(stream);
    let mut stream = fake.accept().await;
    let again = stream.wanted(NAME).await;
    assert_eq!(again.versions, [], "it does not say that it holds it");
    stream.exchange(&response("Service", "n-1", vec![service(NAME, 3)])).await;
    assert_eq!(live(&control, VIP).await, Some(3));
}

#[tokio::test]
async fn what_is_dropped_and_wanted_again_is_asked_for_again() {
    let (_fake, control, mut stream) = using("idle", &[("WEFT_DISCOVERY_IDLE", "100ms")]).await;
    let dropped = loop {
        let request = stream.next().await;
        if !request.unsubscribe.is_empty() {
            break request;
        }
    };
    assert_eq!((&*dropped.nonce, &dropped.unsubscribe[..]), ("", &[NAME.to_owned()][..]));
    // What was under way is acknowledged, and dropped.
    assert_eq!(stream.exchange(&response("Service", "n-2", vec![service(NAME, 2)])).await.error, None);
    let asking = ask(&control, VIP);
    let again = stream.wanted(NAME).await;
    assert_eq!(again.versions, [], "nothing is held of it");
    stream.exchange(&response("Service", "n-3", vec![service(NAME, 3)])).await;
    assert_eq!(asking.await.unwrap(), Some(3));
}

#[tokio::test]
async fn a_collection_that_differs_from_its_head_is_asked_for_again() {
    let (_fake, control, mut stream) = Fake::ready("head", &[]).await;
    let asking = ask(&control, VIP);
    stream.wanted(NAME).await;
    let body = Message::default().text(1, "shop").text(2, "a").uint(3, 80).text(8, "ep/shop/a:80/*");
    stream.exchange(&response("Service", "n-1", vec![resource("Service", NAME, "1", body)])).await;
    stream.wanted("ep/shop/a:80/*").await;
    let head = |nonce: &str, count: u64, complete: u64| {
        let body =
            Message::default().text(1, "e").uint(2, 1).uint(3, count).uint(4, complete).uint(6, complete);
        let mut head = resource("Endpoint", "ep/shop/a:80/$head", "1", body);
        head.body.as_mut().unwrap().0 = url("CollectionHead");
        response("Endpoint", nonce, vec![head])
    };
    assert_eq!(stream.exchange(&head("n-1", 0, 1)).await.error, None);
    asking.await.unwrap();
    // What it should hold is what it holds; then it is not.
    stream.exchange(&head("n-2", 0, 0)).await;
    assert!(stream.is_quiet().await);
    stream.exchange(&head("n-3", 1, 0)).await;
    let again = stream.wanted("ep/shop/a:80/*").await;
    assert_eq!((&*again.nonce, again.versions), ("", vec![]), "from the beginning");
}
