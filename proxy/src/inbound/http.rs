//! One HTTP request to the app: authorize, forward, answer.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::{body::Incoming, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use weft_core::{
    authz::{self, Ask, Verdict},
    classify::{self, Class, Failure, Outcome},
    limit::{self, Refused},
    policy::{Authorization, PortPolicy},
    retry,
};

use super::{
    Caller,
    permission::{Permission, Permitted},
};
use crate::{
    accepted::{Accepted, Open},
    answer::{Body, Held, Tail},
    clock::now,
    direction::Direction,
    drain::{Graceful, Phase, RequestGuard},
    error::{Error, is_grpc},
    expect::{self, Gate},
    front::{self, Front, Head, Requests},
    head::{self, Outgoing, Provenance, WEFT_ATTEMPT},
    peer::Peer,
    pool::{self, Checkout, LocalExec, SendOptions, Sent},
    tcp::Prefixed,
    telemetry::{
        decision::Decision,
        exchange::Exchange,
        metrics::Counter,
        recorder::{Edge, EdgeKey, Series, SeriesKey},
    },
    upgraded::{self, Ended},
    upload::{Replay, Upload},
    worker::{RateLimits, Spoken, Worker, port_policy},
};

/// What of one request is kept so that a connection which the app closed while it was idle can be replaced.
const REPLAY: usize = 64 * 1024;
/// gRPC methods that one connection remembers where to count.
const METHODS: usize = 64;

/// Serves a caller's sidecar.
pub(super) async fn serve_mesh(
    worker: Rc<Worker>,
    tls: Box<TlsStream<Prefixed<TcpStream>>>,
    client: SocketAddr,
    original: SocketAddr,
    port: Arc<PortPolicy>,
    caller: Rc<Caller>,
    open: Rc<Open>,
) {
    let limits = &worker.config.limits;
    let server = Server::new(worker.clone(), original, port, caller.clone(), client, open);
    let requests = Requests::default();
    let io = Front::h2(tls, Bytes::new(), requests.clone(), Direction::Inbound, Head::of(&worker.config));
    // Boxed: the library moves a stream's future eight times on the way to its task.
    let service = service_fn(move |request| Box::pin(server.clone().handle_mesh(request)));
    let connection = h2_builder(&worker, limits.streams_mesh, limits.header_list())
        .serve_connection(TokioIo::new(io), service);
    let ended = run(&worker, connection, &caller).await;
    requests.report(&worker.recorder, &ended, Direction::Inbound, client, original);
}

/// Serves a caller outside the mesh.
pub(super) async fn serve_plain(
    worker: Rc<Worker>,
    accepted: Accepted,
    port: Arc<PortPolicy>,
    caller: Rc<Caller>,
    first: Bytes,
    h2: bool,
) {
    let Accepted { stream, client, original, open } = accepted;
    let server = Server::new(worker.clone(), original, port, caller.clone(), client, open);
    let limits = &worker.config.limits;
    let (requests, head) = (Requests::default(), Head::of(&worker.config));
    let ended = if h2 {
        let io = Front::h2(stream, first, requests.clone(), Direction::Inbound, head);
        let service = service_fn(move |request| {
            let server = server.clone();
            let gate = expect::gate(&request, false);
            let mut asked = server.ask(request, gate);
            Box::pin(async move {
                let handled = server.0.forward(&mut asked).await;
                Ok::<_, Infallible>(server.conclude(asked, handled, None))
            })
        });
        let header_list = u32::try_from(limits.header_bytes).unwrap_or(u32::MAX);
        let connection = h2_builder(&worker, limits.streams_outside, header_list)
            .serve_connection(TokioIo::new(io), service);
        run(&worker, connection, &caller).await
    } else {
        let io = Front::h1(stream, first, requests.clone(), Direction::Inbound, head);
        let of_service = requests.clone();
        let service = service_fn(move |request| {
            let (server, requests, in_progress) = (server.clone(), of_service.clone(), of_service.begin());
            let gate = expect::gate(&request, false);
            let mut asked = server.ask(request, gate);
            async move {
                let handled = server.0.forward(&mut asked).await;
                let (upload, refused) = (asked.replay.clone(), handled.is_err());
                let mut response = server.conclude(asked, handled, Some(&requests));
                requests.ends_after(upload.as_ref(), refused, &mut response).await;
                let ends = server.0.worker.drain.phase() >= Phase::LameDuck;
                if ends && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                    head::closes(&mut response);
                }
                Ok::<_, Infallible>(Requests::answered(in_progress, response))
            }
        });
        let mut builder = front::http1(limits);
        builder.timer(TokioTimer::new()).header_read_timeout(worker.config.times.keep_alive);
        let connection = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
        run(&worker, connection, &caller).await
    };
    requests.report(&worker.recorder, &ended, Direction::Inbound, client, original);
}

fn h2_builder(
    worker: &Worker,
    streams: u32,
    header_list: u32,
) -> hyper::server::conn::http2::Builder<LocalExec> {
    let mut builder = hyper::server::conn::http2::Builder::new(LocalExec);
    builder
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .enable_connect_protocol()
        .max_concurrent_streams(streams)
        // A caller whose app gives up all its requests at once is no attacker; the rate of it is bounded in `front`.
        .max_pending_accept_reset_streams(Some(streams as usize))
        .max_header_list_size(header_list)
        .initial_stream_window_size(pool::UPLOAD_WINDOW)
        .initial_connection_window_size(pool::CONNECTION_WINDOW)
        .max_send_buf_size(pool::SEND_BUFFER)
        .keep_alive_interval(worker.config.times.ping)
        .keep_alive_timeout(worker.config.times.ping_timeout);
    builder
}

/// Runs a connection until it ends, its caller is believed no more, or time is up.
async fn run<C: Graceful>(worker: &Rc<Worker>, connection: C, caller: &Caller) -> hyper::Result<()> {
    let mut serving = worker.drain.serve(connection, Direction::Inbound);
    // Behind a waker of its own: it is looked at when it has something to say, not at each read of the connection.
    let over = async {
        tokio::select! {
            why = caller.distrusted(worker) => Some(why.as_str()),
            () = worker.drain.cut() => None,
        }
    };
    let mut over: FuturesUnordered<_> = std::iter::once(over).collect();
    let ended = tokio::select! {
        biased;
        ended = &mut serving => Ok(ended),
        Some(why) = over.next() => match why {
            Some(why) => Err(why),
            None => return Ok(()),
        },
    };
    let ended = match ended {
        Ok(ended) => ended,
        Err(why) => {
            tracing::info!(why, client = %caller.address, "inbound connection is to end");
            // What is in flight was authorized while the caller was believed: it may finish, but not for ever.
            serving.finish();
            tokio::select! {
                ended = serving => ended,
                () = tokio::time::sleep(worker.config.times.drain) => return Ok(()),
                () = worker.drain.cut() => return Ok(()),
            }
        }
    };
    if let Err(error) = &ended {
        tracing::debug!(%error, client = %caller.address, "inbound connection ended");
    }
    ended
}

/// One connection to the app's port.
#[derive(Clone)]
struct Server(Rc<Inner>);

type Handled = Result<Response<Permitted>, Infallible>;

pub(super) struct Inner {
    pub(super) worker: Rc<Worker>,
    original: SocketAddr,
    caller: Rc<Caller>,
    client: SocketAddr,
    client_id: Option<HeaderValue>,
    /// The caller's, for `x-forwarded-for`.
    address: HeaderValue,
    parent: Arc<str>,
    /// The port's policy, and the generation of the one that it was taken from.
    seen: RefCell<(Option<u64>, Arc<PortPolicy>)>,
    /// How often the port may be asked, as of then.
    rate_limits: RefCell<Option<RateLimits>>,
    series: RefCell<[Option<Rc<Series>>; 3]>,
    edge: OnceCell<Rc<Edge>>,
    /// Of gRPC methods.
    edges: RefCell<HashMap<Box<str>, Rc<Edge>>>,
    /// Counted as open for as long as anything of it is.
    _open: Rc<Open>,
}

impl Server {
    fn new(
        worker: Rc<Worker>,
        original: SocketAddr,
        port: Arc<PortPolicy>,
        caller: Rc<Caller>,
        client: SocketAddr,
        open: Rc<Open>,
    ) -> Self {
        let address = HeaderValue::from_str(&caller.address.to_string());
        let address = address.unwrap_or_else(|_| HeaderValue::from_static("unknown"));
        let client_id = caller.identity.as_ref().and_then(|id| HeaderValue::from_str(id.as_str()).ok());
        Self(Rc::new(Inner {
            // The handshake may have taken long: the policy of now is read at the first request.
            seen: RefCell::new((None, port)),
            rate_limits: RefCell::default(),
            worker,
            original,
            caller,
            client,
            client_id,
            address,
            parent: original.port().to_string().into(),
            series: RefCell::default(),
            edge: OnceCell::new(),
            edges: RefCell::default(),
            _open: open,
        }))
    }

    /// A request of a sidecar.
    fn handle_mesh(self, request: Request<Incoming>) -> impl Future<Output = Handled> {
        let gate = expect::gate(&request, true);
        let mut asked = self.ask(request, gate.clone());
        async move {
            let Some(gate) = gate else {
                let handled = self.0.forward(&mut asked).await;
                return Ok(self.conclude(asked, handled, None));
            };
            // The app may ask for the body before it answers.
            let mut answer = Box::pin(async move {
                let handled = self.0.forward(&mut asked).await;
                self.conclude(asked, handled, None)
            });
            tokio::select! {
                biased;
                response = &mut answer => Ok(response),
                () = gate.opened() => Ok(Permitted::coming(answer)),
            }
        }
    }

    /// Takes a request as its caller sent it.
    fn ask(&self, mut request: Request<Incoming>, gate: Option<Gate>) -> Asked {
        let inner = &self.0;
        let worker = &inner.worker;
        // Counted before the question whether to refuse, so that a drain waits for it or it sees the drain.
        let guard = worker.drain.request();
        let mut exchange = Exchange::start(&worker.recorder, now());
        let grpc = is_grpc(request.headers());
        let (spoken, h2) = (inner.spoken(&request, grpc), request.version() == Version::HTTP_2);
        exchange.belongs_to(inner.series(spoken));
        let wants_upgrade =
            request.headers().contains_key(header::UPGRADE) || request.method() == Method::CONNECT;
        let upgrade = wants_upgrade.then(|| hyper::upgrade::on(&mut request));
        let mesh = inner.caller.identity.is_some();
        let attempt = request.headers().get(WEFT_ATTEMPT).filter(|_| mesh).cloned();
        let (mut decision, mut replay) = (Decision::default(), None);
        let outgoing = Outgoing::take(request, mesh).map(|(mut outgoing, body)| {
            outgoing.comes_from(Provenance { address: inner.address.clone(), id: inner.client_id.clone() });
            outgoing.expects = gate.is_some();
            replay =
                (!http_body::Body::is_end_stream(&body)).then(|| Replay::new(body, h2, REPLAY).behind(gate));
            if outgoing.upgrade.is_some() && outgoing.version != Version::HTTP_2 {
                // Between sidecars an upgrade is an extended CONNECT; what the app will see is what is authorized.
                outgoing.method = Method::GET;
            }
            decision.request(&outgoing.headers, &outgoing.path);
            outgoing
        });
        Asked { outgoing, replay, upgrade, attempt, grpc, h2, guard, exchange, decision }
    }

    /// The answer; `requests`: of an HTTP/1 connection.
    fn conclude(
        &self,
        asked: Asked,
        handled: Result<Forwarded, Error>,
        requests: Option<&Requests>,
    ) -> Response<Permitted> {
        let inner = &self.0;
        let Asked { outgoing, upgrade, grpc, h2, guard, exchange, decision, .. } = asked;
        let error = match (outgoing, handled) {
            (Ok(outgoing), Ok(forwarded)) => {
                let answered = Answered { outgoing, upgrade, grpc, guard, exchange, forwarded };
                return inner.respond(answered);
            }
            (Ok(_) | Err(_), Err(error)) | (Err(error), Ok(_)) => error,
        };
        let error = front::behind(error, requests);
        let mut response = inner.answer(&error, grpc, exchange, decision);
        if error.ends_connection() && !h2 {
            // What follows on the connection may be meant otherwise than we read it.
            head::closes(&mut response);
        }
        Permitted::of(response)
    }
}

/// One request, and what becomes known of it. It stays in one place until it is answered, and is lent to whatever is
/// done about it, as in `outbound`.
struct Asked {
    /// An error: it cannot be carried on.
    outgoing: Result<Outgoing, Error>,
    replay: Option<Replay>,
    upgrade: Option<OnUpgrade>,
    /// Of the caller's attempts, from the second on.
    attempt: Option<HeaderValue>,
    grpc: bool,
    /// The caller speaks HTTP/2.
    h2: bool,
    guard: RequestGuard,
    exchange: Exchange,
    decision: Decision,
}

/// What the app answered.
struct Forwarded {
    sent: Sent,
    outcome: Outcome,
    permission: Permission,
}

/// What an answer carries on with.
struct Answered {
    outgoing: Outgoing,
    upgrade: Option<OnUpgrade>,
    grpc: bool,
    guard: RequestGuard,
    exchange: Exchange,
    forwarded: Forwarded,
}

impl Inner {
    /// Every exit by error: recorded, logged, told.
    fn answer(&self, error: &Error, grpc: bool, exchange: Exchange, decision: Decision) -> Response<Body> {
        let answer = error.answer();
        if error.is_the_clients() {
            tracing::debug!(%error, destination = %self.original, client = %self.client, "nobody reads the answer");
            exchange.finish(error.class(), now());
            return error.response(Direction::Inbound, grpc).map(Body::full);
        }
        self.worker.recorder.error(answer.code);
        if *error == Error::Overloaded {
            self.worker.recorder.count(Counter::RequestsShed);
        }
        tracing::warn!(component = "inbound", code = answer.code, status = answer.status.as_u16(), %error,
            destination = %self.original, client = %self.client,
            caller = self.caller.identity.as_ref().map(|id| id.as_str()),
            request_id = decision.request_id(), last = decision.last(), "answered by the proxy");
        decision.keep(&self.worker.recorder, Direction::Inbound, &self.parent, error);
        exchange.finish(error.class(), now());
        error.response(Direction::Inbound, grpc).map(Body::full)
    }

    async fn forward(self: &Rc<Self>, asked: &mut Asked) -> Result<Forwarded, Error> {
        let Asked { outgoing, replay, attempt, grpc, exchange, decision, .. } = asked;
        let (outgoing, grpc) = (outgoing.as_mut().map_err(|error| error.clone())?, *grpc);
        let mesh = self.caller.identity.is_some();
        let path = outgoing.path.path();
        let port = self.port();
        let probe = self.is_probe(&port, outgoing);
        let permitted = if probe {
            Ok(())
        } else if self.caller.must_not_speak_plaintext(&port) {
            self.worker.recorder.count(Counter::PlaintextRefused);
            Err(Error::PlaintextRefused)
        } else {
            self.authorize(&port.authorization, outgoing)
        };
        // The kubelet is nobody's caller, and admitted in every mode: an edge would stand in the way of strict for ever.
        if !probe {
            // Whoever is refused does not choose what is remembered of it.
            exchange.is_of(self.edge(if grpc && permitted.is_ok() { path } else { "" }));
        }
        permitted?;
        let mut permission = Permission::new(self);
        if self.worker.drain.is_refusing() {
            return Err(Error::Draining);
        }
        // A pod whose probes fail is killed, which is what this is to avoid.
        if !probe && self.worker.limits.refuses_requests() {
            return Err(Error::Overloaded);
        }
        if !probe {
            self.limit_rate(outgoing)?;
        }
        if let Some(attempt) = attempt.take() {
            tracing::debug!(?attempt, request_id = decision.request_id(), "another attempt");
            outgoing.headers.insert(WEFT_ATTEMPT, attempt);
        }
        if !mesh {
            // A caller without a sidecar made none; between sidecars the caller's did.
            head::identify(&mut outgoing.headers, &mut *self.worker.rng.borrow_mut());
        }
        if mesh && outgoing.version == Version::HTTP_2 {
            head::mark_unique(&mut outgoing.headers);
        }
        let idempotent = retry::is_idempotent(&outgoing.method, &outgoing.headers);
        let sent = {
            let sending = pin!(self.send(outgoing, replay.as_ref(), idempotent));
            permission.hold(outgoing, sending).await?
        };
        let outcome = match classify::grpc_status(sent.response.headers()) {
            Some(code) if grpc => classify::grpc(code),
            _ => classify::status(sent.response.status()),
        };
        if let Some(replay) = replay {
            replay.forget();
        }
        Ok(Forwarded { sent, outcome, permission })
    }

    /// Whether the policy of this moment permits it: asked again about what is under way.
    pub(super) fn permits(&self, outgoing: &Outgoing) -> bool {
        let port = self.port();
        let admitted = !self.caller.must_not_speak_plaintext(&port)
            && self.verdict(&port.authorization, outgoing).is_permit();
        admitted || self.is_probe(&port, outgoing)
    }

    /// Whether it is the kubelet's question, whoever asks it.
    fn is_probe(&self, port: &PortPolicy, outgoing: &Outgoing) -> bool {
        self.caller.identity.is_none()
            && outgoing.upgrade.is_none()
            && authz::is_probe(&port.probes, &outgoing.method, outgoing.path.as_str())
    }

    fn verdict<'a>(&self, policy: &'a Authorization, outgoing: &Outgoing) -> Verdict<'a> {
        let ask = Ask::Http {
            method: &outgoing.method,
            host: outgoing.host(),
            path: outgoing.path.path(),
            headers: &outgoing.headers,
        };
        authz::authorize(policy, &self.caller.peer(), &ask)
    }

    /// Says that what was under way is broken off.
    pub(super) fn revoked(&self, outgoing: &Outgoing) {
        tracing::warn!(code = "denied", client = %self.client, destination = %self.original,
            caller = self.caller.identity.as_ref().map(|id| id.as_str()),
            method = %outgoing.method, path = outgoing.path.path(), "broken off: policy refuses it now");
    }

    /// Asks the policy of this moment.
    fn authorize(&self, policy: &Authorization, outgoing: &Outgoing) -> Result<(), Error> {
        match self.verdict(policy, outgoing) {
            Verdict::Permit { .. } => Ok(()),
            Verdict::Deny { rule, reason } => {
                self.worker.recorder.count(Counter::Denied);
                tracing::info!(reason = reason.name(), rule = rule.map(|r| r.object.to_string()),
                    caller = self.caller.identity.as_ref().map(|id| id.as_str()),
                    method = %outgoing.method, path = outgoing.path.path(), port = self.original.port(), "denied");
                match reason {
                    authz::DenyReason::Path(_) => Err(Error::PathNotCanonical),
                    authz::DenyReason::DenyRule
                    | authz::DenyReason::DenyRuleNeedsHttp
                    | authz::DenyReason::NoRuleAllows => Err(Error::Denied),
                }
            }
        }
    }

    /// Takes the request out of what the port may be asked.
    fn limit_rate(&self, outgoing: &Outgoing) -> Result<(), Error> {
        let limits = self.rate_limits.borrow();
        let Some(limits) = &*limits else { return Ok(()) };
        let ask = Ask::Http {
            method: &outgoing.method,
            host: outgoing.host(),
            path: outgoing.path.path(),
            headers: &outgoing.headers,
        };
        limit::take(limits, &self.caller.peer(), &ask, now()).map_err(|refused| match refused {
            Refused::Path(_) => Error::PathNotCanonical,
            Refused::Limit { limit, wait } => {
                self.worker.recorder.count(Counter::RateLimited);
                let wait = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                Error::RateLimited { limit: format!("{}/{}", limit.object, limit.name).into(), wait }
            }
        })
    }

    /// Sends to the app. An idle connection that the app closed at the moment of reuse is replaced, if the
    /// request may be sent twice.
    async fn send(
        &self,
        outgoing: &Outgoing,
        replay: Option<&Replay>,
        idempotent: bool,
    ) -> Result<Sent, Error> {
        let peer = Peer::App { address: self.original, h2: outgoing.version == Version::HTTP_2 };
        let (mut fresh, mut sent_before, connected) = (false, false, Cell::new(false));
        loop {
            let body = replay.map_or_else(Upload::none, Replay::attempt);
            let mut request = Some(outgoing.request(&peer, body, 1)?);
            let options = SendOptions {
                connect_timeout: self.worker.config.times.connect,
                idempotent,
                upload: replay,
                fresh,
                cap: None,
                connected: &connected,
            };
            match self.worker.pool.send(&peer, &mut request, &options).await {
                Ok(sent) => return Ok(sent),
                Err(error) => {
                    let unsent = error.failure == Failure::NotProcessed;
                    let replayable = replay.is_none_or(Replay::is_replayable);
                    let again = error.reused && !fresh && replayable;
                    // A stream that an app resets is its answer, and says nothing of a connection that was idle.
                    let closed_at_reuse = error.failure == Failure::Reset && !peer.is_h2();
                    if again && (unsent || (idempotent && closed_at_reuse)) {
                        (fresh, sent_before) = (true, !unsent);
                        continue;
                    }
                    if replay.is_some_and(Replay::source_failed) {
                        return Err(Error::UploadBroken);
                    }
                    tracing::debug!(detail = %error.detail, app = %self.original, "no answer from the app");
                    // An app that was just ending and one that died of what it was sent look alike. One other pod is
                    // given it, not one after the other.
                    let seen = sent_before && outgoing.headers.contains_key(WEFT_ATTEMPT);
                    return Err(if seen { Error::Reset } else { Error::from_failure(error.failure) });
                }
            }
        }
    }

    fn respond(self: &Rc<Self>, answered: Answered) -> Response<Permitted> {
        let Answered { outgoing, upgrade, grpc, guard, exchange, forwarded } = answered;
        let Forwarded { sent, outcome, permission } = forwarded;
        let status = sent.response.status();
        let switched =
            status == StatusCode::SWITCHING_PROTOCOLS || (sent.upgrades_by_ok && status == StatusCode::OK);
        if let (Some(asked), Some(client), true) = (outgoing.upgrade.clone(), upgrade, switched) {
            let (head, body) = sent.response.into_parts();
            let mut response = Response::from_parts(head, body);
            let server = hyper::upgrade::on(&mut response);
            let version = outgoing.version;
            // No request in flight any more: a drain does not wait for it. Only the app can end it well, and the
            // app hears that it must end when the drain is over.
            drop(guard);
            let carried = Carried { inner: self.clone(), outgoing, exchange, _checkout: sent.checkout };
            tokio::task::spawn_local(carried.carry(client, server));
            let (mut head, _) = response.into_parts();
            head::remove_connection_headers(&mut head.headers);
            head.headers.remove(header::CONTENT_LENGTH);
            head.extensions.clear();
            head.version = Version::default();
            let mut response = Response::from_parts(head, Body::empty());
            if self.caller.identity.is_some() || version != Version::HTTP_11 {
                *response.status_mut() = StatusCode::OK;
            } else {
                head::switching(&mut response, &asked);
            }
            return Permitted::of(response);
        }
        let (mut head, body) = sent.response.into_parts();
        let h2 = head.version == Version::HTTP_2;
        head::remove_connection_headers(&mut head.headers);
        head.version = Version::default();
        if outgoing.upgrade.is_some() && self.caller.identity.is_some() && head.status.is_success() {
            head::hide_status(&mut head);
        }
        let trailers_only = classify::grpc_status(&head.headers).is_some();
        let tail = Tail {
            lease: None,
            exchange,
            connection: Some(sent.checkout),
            held: Held::Inbound { _guard: guard },
            outcome,
            class: None,
            grpc: grpc && !trailers_only,
            seen_data: false,
        };
        Permitted::held(Response::from_parts(head, Body::watched(body, h2, tail)), permission, outgoing)
    }

    /// The port's policy: one comparison while nothing changes.
    fn port(&self) -> Arc<PortPolicy> {
        let generation = self.worker.policy_generation();
        let mut seen = self.seen.borrow_mut();
        if seen.0 != Some(generation) {
            if let Some(policy) = self.worker.inbound_policy() {
                seen.1 = port_policy(&policy, self.original.port()).clone();
                *self.rate_limits.borrow_mut() = self.worker.rate_limits(self.original.port());
            }
            seen.0 = Some(generation);
        }
        seen.1.clone()
    }

    fn spoken(&self, request: &Request<Incoming>, grpc: bool) -> Spoken {
        Spoken::of(head::app_version(request, self.caller.identity.is_some()), grpc)
    }

    fn series(&self, spoken: Spoken) -> Rc<Series> {
        let mut all = self.series.borrow_mut();
        let slot = match spoken {
            Spoken::Http1 => &mut all[0],
            Spoken::Http2 | Spoken::Tcp => &mut all[1],
            Spoken::Grpc => &mut all[2],
        };
        let series = slot.get_or_insert_with(|| {
            self.worker.recorder.series(&SeriesKey {
                direction: Direction::Inbound,
                parent: self.parent.clone(),
                route: "default".into(),
                backend: "".into(),
                protocol: spoken.as_str(),
            })
        });
        series.clone()
    }

    /// Who calls what: `method` is empty but for gRPC.
    fn edge(&self, method: &str) -> Rc<Edge> {
        if method.is_empty() {
            return self.edge.get_or_init(|| self.edge_to(method)).clone();
        }
        let mut edges = self.edges.borrow_mut();
        if let Some(known) = edges.get(method) {
            return known.clone();
        }
        if edges.len() >= METHODS {
            // The recorder, which has its own bound, knows them again.
            edges.clear();
        }
        edges.entry(method.into()).or_insert_with(|| self.edge_to(method)).clone()
    }

    fn edge_to(&self, method: &str) -> Rc<Edge> {
        self.worker.recorder.edge_of(&EdgeKey {
            caller: self.caller.identity.as_ref().map_or_else(|| "".into(), |id| id.as_str().into()),
            service: self.parent.clone(),
            method: method.into(),
            mtls: self.caller.identity.is_some(),
        })
    }
}

/// What lives as long as an upgraded connection.
struct Carried {
    /// The connection that it came by, counted as open; h1 gives it up at the upgrade.
    inner: Rc<Inner>,
    /// The request: it must stay permitted.
    outgoing: Outgoing,
    exchange: Exchange,
    _checkout: Checkout,
}

impl Carried {
    async fn carry(self, client: OnUpgrade, server: OnUpgrade) {
        let Inner { worker, caller, original, .. } = &*self.inner;
        let permits = |port: &PortPolicy| self.inner.verdict(&port.authorization, &self.outgoing).is_permit();
        let stop = async {
            tokio::select! {
                biased;
                code = caller.revoked(worker, original.port(), permits) => {
                    tracing::warn!(code, client = %caller.address, destination = %original, "upgraded connection ended");
                }
                () = worker.drain.cut() => {}
            }
        };
        let class = match upgraded::carry(client, server, stop).await {
            Ended::Well => Class::Ok,
            Ended::ByServer => Class::ServerError,
            Ended::Stopped | Ended::Never => Class::ClientError,
        };
        self.exchange.finish(class, now());
    }
}
