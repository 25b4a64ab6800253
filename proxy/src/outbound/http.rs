//! One HTTP request of the app: match, pick, send, perhaps again, answer.

use std::{cell::Cell, convert::Infallible, net::SocketAddr, pin::pin, rc::Rc, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::{body::Incoming, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use weft_core::{
    balance::Lease,
    classify::{self, Class, Failure, Outcome},
    policy::{Filter, Rule},
    retry::{self, Attempts, Next, Stop},
    route::{self, RequestHead, RouteTable},
};

use crate::{
    accepted::{Accepted, Open},
    answer::{Body, Held, Tail},
    clock::now,
    direction::Direction,
    error::{APP_REFUSES, Error, RATE_LIMITED, WEFT_REASON, WEFT_UNSENT, is_grpc},
    expect,
    front::{self, Front, Head, Requests},
    head::{self, Outgoing, Upgrade},
    peer::{NOT_ACCEPTED, Peer},
    pod_wide::Permit,
    pool::{self, Cap, LocalExec, SendError, SendOptions, Sent},
    telemetry::{decision::Decision, exchange::Exchange, metrics::Counter},
    upgraded::{self, Ended},
    upload::{Replay, Upload},
    worker::{Backend, Destination, Resolved, Spoken, Worker},
};

/// Streams that one HTTP/2 connection of this pod's own app may have open: with `UPLOAD_WINDOW` each, all of them
/// together stay below `CONNECTION_WINDOW`, so stalled uploads never hold up another.
const APP_STREAMS: u32 = 500;

/// Serves a connection that speaks HTTP.
pub(super) async fn serve(
    worker: Rc<Worker>,
    accepted: Accepted,
    destination: Rc<Destination>,
    first: Bytes,
    h2: bool,
) {
    let Accepted { stream, client: address, original, open } = accepted;
    let client = Rc::new(Client { worker: worker.clone(), destination, address, open });
    let (requests, head) = (Requests::default(), Head::of(&worker.config));
    let limits = &worker.config.limits;
    let ended = if h2 {
        let io = Front::h2(stream, first, requests.clone(), Direction::Outbound, head);
        let service = service_fn(move |request| {
            let client = client.clone();
            let mut asked = client.ask(request);
            // Boxed: the library moves it eight times on the way to its task.
            Box::pin(async move {
                let handled = client.route(&mut asked).await;
                Ok::<_, Infallible>(client.conclude(asked, handled, None))
            })
        });
        let mut builder = hyper::server::conn::http2::Builder::new(LocalExec);
        builder
            .timer(TokioTimer::new())
            .auto_date_header(false)
            .enable_connect_protocol()
            .max_concurrent_streams(APP_STREAMS)
            .max_header_list_size(limits.header_bytes as u32)
            .initial_stream_window_size(pool::UPLOAD_WINDOW)
            .initial_connection_window_size(pool::CONNECTION_WINDOW)
            .max_send_buf_size(pool::SEND_BUFFER);
        let connection = builder.serve_connection(TokioIo::new(io), service);
        worker.drain.serve(connection, Direction::Outbound).await
    } else {
        let io = Front::h1(stream, first, requests.clone(), Direction::Outbound, head)
            .of_this_pod(address, original);
        let of_service = requests.clone();
        let service = service_fn(move |request| {
            let (client, requests, in_progress) = (client.clone(), of_service.clone(), of_service.begin());
            let mut asked = client.ask(request);
            async move {
                let handled = client.route(&mut asked).await;
                let (upload, refused) = (asked.replay(), handled.is_err());
                let mut response = client.conclude(asked, handled, Some(&requests));
                requests.ends_after(upload.as_ref(), refused, &mut response).await;
                Ok::<_, Infallible>(Requests::answered(in_progress, response))
            }
        });
        let mut builder = front::http1(limits);
        builder.header_read_timeout(None);
        let connection = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
        worker.drain.serve(connection, Direction::Outbound).await
    };
    requests.report(&worker.recorder, &ended, Direction::Outbound, address, original);
    if let Err(error) = ended {
        tracing::debug!(%error, client = %address, "connection from the app ended");
    }
}

/// A connection of the app.
struct Client {
    worker: Rc<Worker>,
    destination: Rc<Destination>,
    address: SocketAddr,
    /// Counted as open for as long as anything of it is.
    open: Rc<Open>,
}

/// One request, and what becomes known of it.
///
/// It stays in one place until it is answered, and is lent to whatever is done about it: an async function keeps room
/// for all that it was given by value, and each request would carry its own copies of itself.
struct Asked {
    /// An error: it cannot be carried on.
    message: Result<Message, Error>,
    resolved: Rc<Resolved>,
    spoken: Spoken,
    grpc: bool,
    /// The app speaks HTTP/2.
    h2: bool,
    exchange: Exchange,
    decision: Decision,
}

impl Asked {
    /// What sends its body, if it has one.
    fn replay(&self) -> Option<Replay> {
        self.message.as_ref().ok()?.replay.clone()
    }
}

/// What is sent, perhaps more than once.
struct Message {
    outgoing: Outgoing,
    replay: Option<Replay>,
    idempotent: bool,
    upgrade: Option<OnUpgrade>,
}

/// What all attempts of one request share.
#[derive(Clone, Copy)]
struct Matched<'a> {
    resolved: &'a Resolved,
    rule: &'a Arc<Rule>,
    rule_index: usize,
    /// What matched, where it was a prefix.
    prefix: Option<&'a str>,
    grpc: bool,
    spoken: Spoken,
}

/// One try to have it answered.
struct Attempt<'a> {
    matched: Matched<'a>,
    message: &'a Message,
    /// As the chosen backend is to see it.
    outgoing: &'a Outgoing,
    lease: &'a Lease,
    chosen: &'a weft_core::policy::BackendRef,
    number: u32,
    connected: &'a Cell<bool>,
}

/// The head of an answer, and what its body carries on with.
struct Answered {
    sent: Sent,
    lease: Lease,
    permit: Permit,
    outcome: Outcome,
    exchange: Exchange,
}

impl Client {
    /// Takes a request as the app sent it.
    fn ask(&self, mut request: Request<Incoming>) -> Asked {
        let exchange = Exchange::start(&self.worker.recorder, now());
        let (grpc, h2) = (is_grpc(request.headers()), request.version() == Version::HTTP_2);
        let spoken = Spoken::of(request.version(), grpc);
        let gate = expect::gate(&request, false);
        let wants_upgrade =
            request.headers().contains_key(header::UPGRADE) || request.method() == http::Method::CONNECT;
        let upgrade = wants_upgrade.then(|| hyper::upgrade::on(&mut request));
        let mut decision = Decision::default();
        let message = Outgoing::take(request, false).map(|(mut outgoing, body)| {
            outgoing.expects = gate.is_some();
            let replay = (!http_body::Body::is_end_stream(&body))
                .then(|| Replay::new(body, h2, pool::UPLOAD_WINDOW as usize).behind(gate));
            head::identify(&mut outgoing.headers, &mut *self.worker.rng.borrow_mut());
            decision.request(&outgoing.headers, &outgoing.path);
            let idempotent = retry::is_idempotent(&outgoing.method, &outgoing.headers);
            Message { outgoing, replay, idempotent, upgrade }
        });
        let resolved = self.destination.resolved(&self.worker);
        Asked { message, resolved, spoken, grpc, h2, exchange, decision }
    }

    /// The answer; `requests`: of an HTTP/1 connection.
    fn conclude(
        &self,
        asked: Asked,
        handled: Result<Response<Body>, Error>,
        requests: Option<&Requests>,
    ) -> Response<Body> {
        let Asked { resolved, spoken, grpc, h2, mut exchange, decision, .. } = asked;
        handled.unwrap_or_else(|error| {
            let error = front::behind(error, requests);
            if !exchange.has_series() {
                exchange.belongs_to(resolved.series(&self.worker.recorder, None, None, spoken));
            }
            let mut response = self.answer(&error, grpc, exchange, decision);
            if error.ends_connection() && !h2 {
                // What follows on the connection may be meant otherwise than we read it.
                head::closes(&mut response);
            }
            response
        })
    }

    /// Every exit by error: recorded, logged, told.
    fn answer(&self, error: &Error, grpc: bool, exchange: Exchange, decision: Decision) -> Response<Body> {
        let answer = error.answer();
        if error.is_the_clients() {
            tracing::debug!(%error, client = %self.address, "nobody reads the answer");
            exchange.finish(error.class(), now());
            return error.response(Direction::Outbound, grpc).map(Body::full);
        }
        self.worker.recorder.error(answer.code);
        if *error == Error::Overloaded {
            self.worker.recorder.count(Counter::RequestsShed);
        }
        let service = &self.destination.watched.policy().service.name;
        tracing::warn!(component = "outbound", code = answer.code, status = answer.status.as_u16(), %error,
            %service, destination = %self.destination.original, client = %self.address,
            request_id = decision.request_id(), attempts = decision.attempts(), last = decision.last(),
            "answered by the proxy");
        decision.keep(&self.worker.recorder, Direction::Outbound, &service.to_string(), error);
        exchange.finish(error.class(), now());
        error.response(Direction::Outbound, grpc).map(Body::full)
    }

    async fn route(&self, asked: &mut Asked) -> Result<Response<Body>, Error> {
        let Asked { message, resolved, spoken, grpc, exchange, decision, .. } = asked;
        let (resolved, spoken, grpc) = (&**resolved, *spoken, *grpc);
        let message = message.as_mut().map_err(|error| error.clone())?;
        let request_head = message.outgoing.head();
        let routes = &resolved.policy.routes;
        let found = route::find(routes, &request_head).ok_or_else(|| unmatched(routes))?;
        let (rule, rule_index, prefix) = (found.rule, found.index, found.prefix);
        if route::is_ambiguous(routes, &request_head, &found) {
            return Err(Error::PathNotCanonical);
        }
        decision.rule(&rule.label);
        exchange.belongs_to(resolved.series(&self.worker.recorder, Some(rule_index), None, spoken));
        if self.worker.limits.refuses_requests() {
            return Err(Error::Overloaded);
        }
        if !rule.filters.is_empty() {
            if let Some(redirect) = self.redirected(&rule.filters, &message.outgoing, resolved, prefix)? {
                exchange.take(now()).finish(Class::Ok, now());
                return Ok(redirect);
            }
            apply_filters(&rule.filters, &mut message.outgoing, prefix)?;
        }
        if let Some(replay) = &message.replay {
            replay.keeps(rule.retry.max_body);
        }
        resolved.budget.deposit(exchange.started());
        let asked = if grpc { head::grpc_timeout(&message.outgoing.headers) } else { None };
        let limit = [rule.timeouts.request, asked].into_iter().flatten().min();
        let deadline = limit.and_then(|limit| exchange.started().checked_add(limit));
        let deadline = deadline.map(tokio::time::Instant::from_std);
        let matched = Matched { resolved, rule, rule_index, prefix, grpc, spoken };
        let mut attempts = pin!(self.attempts(matched, message, deadline, exchange, decision));
        match deadline {
            None => attempts.await,
            // An attempt under way ends itself, so that its endpoint is held to account; this bounds the waits.
            Some(deadline) => {
                tokio::time::timeout_at(deadline, attempts.as_mut()).await.unwrap_or(Err(Error::Timeout))
            }
        }
    }

    async fn attempts(
        &self,
        matched: Matched<'_>,
        message: &mut Message,
        deadline: Option<tokio::time::Instant>,
        exchange: &mut Exchange,
        decision: &mut Decision,
    ) -> Result<Response<Body>, Error> {
        let Matched { resolved, rule, .. } = matched;
        let mut attempts = Attempts::new(&rule.retry, message.idempotent);
        let mut tried: Vec<SocketAddr> = Vec::new();
        loop {
            let chosen = route::pick_backend(rule, &mut *self.worker.rng.borrow_mut());
            let chosen = chosen.ok_or(Error::NoBackend)?;
            let backend = resolved.backends.get(chosen.backend).ok_or(Error::BackendUnresolved)?;
            let policy = &resolved.policy.backends[chosen.backend];
            exchange.belongs_to(resolved.series(
                &self.worker.recorder,
                Some(matched.rule_index),
                Some(chosen.backend),
                matched.spoken,
            ));
            if !policy.resolved {
                return Err(Error::BackendUnresolved);
            }
            // Boxed: hardly any backend has filters, and all requests carry the room for them.
            let edited = if chosen.filters.is_empty() {
                None
            } else {
                let redirect =
                    self.redirected(&chosen.filters, &message.outgoing, resolved, matched.prefix)?;
                if let Some(redirect) = redirect {
                    exchange.take(now()).finish(Class::Ok, now());
                    return Ok(redirect);
                }
                let mut edited = Box::new(message.outgoing.clone());
                apply_filters(&chosen.filters, &mut edited, matched.prefix)?;
                Some(edited)
            };
            let outgoing = edited.as_deref().unwrap_or(&message.outgoing);
            let permit = Permit::request(&backend.in_use, policy.service.limits.max_requests)
                .ok_or(Error::Overloaded)?;
            let lease = self.pick(backend, policy.service.limits.queue_wait, &tried).await?;
            if lease.only_connects() {
                let h2 = message.outgoing.version == Version::HTTP_2;
                let peer = Peer::of(lease.endpoint(), h2, &policy.service);
                self.worker.knock(lease, peer, self.worker.connect_timeout(rule));
                continue;
            }
            let address = lease.endpoint().address;
            let number = attempts.number();
            let connected = Cell::new(false);
            let try_ends = rule.timeouts.per_try.map(|limit| tokio::time::Instant::now() + limit);
            let attempt =
                Attempt { matched, message, outgoing, lease: &lease, chosen, number, connected: &connected };
            let sent = {
                let mut sent = pin!(self.send(&attempt));
                match [try_ends, deadline].into_iter().flatten().min() {
                    None => sent.await,
                    Some(ends) => match tokio::time::timeout_at(ends, sent.as_mut()).await {
                        Ok(sent) => sent,
                        // Before there was a connection nothing was sent, whatever the method.
                        Err(_) if !connected.get() => {
                            Err(SendError::new(Failure::ConnectTimeout, "no connection in time", false))
                        }
                        Err(_) => Err(SendError::new(Failure::Timeout, "no answer in time", false)),
                    },
                }
            };
            let now = now();
            let outcome = outcome(matched, message, &sent);
            let replayable = message.replay.as_ref().is_none_or(Replay::is_replayable);
            let over = deadline.is_some_and(|deadline| deadline.into_std() <= now);
            let capped = sent.as_ref().is_err_and(|error| error.capped);
            let next = if over || capped {
                Next::Stop(Stop::NotRetryable)
            } else {
                let mut rng = self.worker.rng.borrow_mut();
                attempts.next(outcome, replayable, &resolved.budget, now, &mut *rng)
            };
            if outcome != Outcome::Success {
                let answered =
                    sent.as_ref().map(|sent| sent.response.status()).map_err(|error| &*error.detail);
                decision.attempt(number, &lease, outcome, answered, now);
            }
            match next {
                Next::RetryAfter(delay) => {
                    self.count_retry(outcome);
                    exchange.retried();
                    exchange.settled(lease.finish(outcome, now));
                    drop((sent, permit));
                    tried.push(address);
                    if !delay.is_zero() {
                        tokio::time::sleep(delay).await;
                    }
                }
                Next::Stop(why) => {
                    if why == Stop::BudgetExhausted {
                        self.worker.recorder.count(Counter::BudgetExhausted);
                    } else if why == Stop::BodyGone {
                        self.worker.recorder.count(Counter::ReplayOverflow);
                    }
                    match sent {
                        Ok(sent) => {
                            let exchange = exchange.take(now);
                            let answered = Answered { sent, lease, permit, outcome, exchange };
                            return Ok(self.respond(matched, message, chosen, answered));
                        }
                        Err(error) => {
                            let blame = if error.local { Outcome::Cancelled } else { outcome };
                            exchange.settled(lease.finish(blame, now));
                            if over {
                                return Err(Error::Timeout);
                            }
                            if capped {
                                return Err(Error::Overloaded);
                            }
                            if message.replay.as_ref().is_some_and(Replay::source_failed) {
                                return Err(Error::UploadBroken);
                            }
                            return Err(Error::from_failure(error.failure));
                        }
                    }
                }
            }
        }
    }

    /// What the filters answer themselves, if they do: a redirect, or that they cannot be applied.
    fn redirected(
        &self,
        filters: &[Filter],
        outgoing: &Outgoing,
        resolved: &Resolved,
        prefix: Option<&str>,
    ) -> Result<Option<Response<Body>>, Error> {
        for filter in filters {
            match filter {
                Filter::Redirect(redirect) => {
                    let own;
                    let host = match outgoing.host() {
                        // HTTP/1.0 without Host: an address is the only name there is.
                        "" => {
                            own = SocketAddr::new(self.destination.original.ip(), 0).to_string();
                            own.trim_end_matches(":0")
                        }
                        host => host,
                    };
                    let head = RequestHead { host, ..outgoing.head() };
                    let port = resolved.policy.service.name.port;
                    let (status, location) = route::redirect(redirect, &head, "http", port, prefix);
                    let location = HeaderValue::try_from(location)
                        .map_err(|_| Error::InvalidFilter("the redirect's location".into()))?;
                    let mut response = Response::new(Body::empty());
                    *response.status_mut() = status;
                    response.headers_mut().insert(header::LOCATION, location);
                    edit_response(filters, response.headers_mut());
                    return Ok(Some(response));
                }
                Filter::Invalid { reason } => return Err(Error::InvalidFilter(reason.clone())),
                Filter::RequestHeaders(_) | Filter::ResponseHeaders(_) | Filter::Rewrite(_) => {}
            }
        }
        Ok(None)
    }

    /// An endpoint, or a bounded wait for one: while a lone pod restarts there is none for a moment.
    async fn pick(
        &self,
        backend: &Rc<Backend>,
        wait: std::time::Duration,
        tried: &[SocketAddr],
    ) -> Result<Lease, Error> {
        let pick = || {
            let mut rng = self.worker.rng.borrow_mut();
            backend.balancer.borrow_mut().pick(tried, now(), &mut *rng)
        };
        if let Ok(lease) = pick() {
            return Ok(lease);
        }
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let seen = self.destination.watched.version();
            // Takes over what may have come in since the request began.
            self.destination.resolved(&self.worker);
            if let Ok(lease) = pick() {
                return Ok(lease);
            }
            let changed = self.destination.watched.changed_since(seen);
            if backend.failfast.get() || tokio::time::timeout_at(deadline, changed).await.is_err() {
                backend.failfast.set(true);
                return Err(Error::NoEndpoint);
            }
        }
    }

    async fn send(&self, attempt: &Attempt<'_>) -> Result<Sent, SendError> {
        let Attempt { matched, message, outgoing, lease, chosen, number, connected } = attempt;
        let service = &matched.resolved.policy.backends[chosen.backend].service;
        let h2 = message.outgoing.version == Version::HTTP_2;
        let peer = Peer::of(lease.endpoint(), h2, service)
            .ok_or_else(|| SendError::new(Failure::Identity, NOT_ACCEPTED, false))?;
        let body = match &message.replay {
            None => Upload::none(),
            Some(replay) => replay.attempt(),
        };
        let mut request = Some(
            outgoing
                .request(&peer, body, *number)
                .map_err(|e| SendError::new(Failure::Unreachable, e.to_string(), false))?,
        );
        let cap = matched.resolved.backends.get(chosen.backend);
        let cap = cap.map(|backend| Cap { in_use: &backend.in_use, max: service.limits.max_connections });
        let options = SendOptions {
            connect_timeout: self.worker.connect_timeout(matched.rule),
            idempotent: message.idempotent,
            upload: message.replay.as_ref(),
            fresh: *number > 1,
            cap,
            connected,
        };
        let mut sent = self.worker.pool.send(&peer, &mut request, &options).await;
        if let (Peer::Plain { h2: false, .. }, Err(error)) = (&peer, &mut sent) {
            // The server closed an idle connection at the moment of reuse: as good as not sent, where sending twice
            // does no harm.
            if error.reused && error.failure == Failure::Reset && message.idempotent {
                error.failure = Failure::NotProcessed;
            }
        }
        sent
    }

    fn count_retry(&self, outcome: Outcome) {
        let sent = matches!(outcome, Outcome::Failure(failure) if failure.was_sent());
        self.worker.recorder.count(if sent { Counter::Retries } else { Counter::Redispatched });
    }

    fn respond(
        &self,
        matched: Matched<'_>,
        message: &mut Message,
        chosen: &weft_core::policy::BackendRef,
        answered: Answered,
    ) -> Response<Body> {
        let Answered { sent, lease, permit, outcome, exchange } = answered;
        if let Some(replay) = &message.replay {
            replay.forget();
        }
        let (mut head, body) = sent.response.into_parts();
        let reason = sent.private.then(|| head.headers.remove(WEFT_REASON)).flatten();
        let upgraded = message.outgoing.upgrade.take().filter(|_| {
            head.status == StatusCode::SWITCHING_PROTOCOLS
                || (sent.upgrades_by_ok && head.status == StatusCode::OK)
        });
        if let (Some(upgrade), Some(client)) = (upgraded, message.upgrade.take()) {
            let mut response = Response::from_parts(head, body);
            let server = hyper::upgrade::on(&mut response);
            let tail = Upgraded {
                exchange,
                lease: Some(lease),
                _permit: permit,
                _checkout: sent.checkout,
                _open: self.open.clone(),
            };
            let worker = self.worker.clone();
            tokio::task::spawn_local(async move { tail.carry(&worker, client, server).await });
            let (mut head, _) = response.into_parts();
            head::remove_connection_headers(&mut head.headers);
            head.headers.remove(header::CONTENT_LENGTH);
            return accepted_upgrade(head, &upgrade, message.outgoing.version);
        }
        head::remove_connection_headers(&mut head.headers);
        let made_by_peer = reason.is_some();
        if let Some(reason) = reason {
            head.headers.insert(WEFT_REASON, reason);
        }
        edit_response(&matched.rule.filters, &mut head.headers);
        edit_response(&chosen.filters, &mut head.headers);
        let h2 = head.version == Version::HTTP_2;
        let trailers_only = classify::grpc_status(&head.headers).is_some();
        let tail = Tail {
            lease: Some(lease),
            exchange,
            connection: Some(sent.checkout),
            held: Held::Outbound { _permit: permit },
            outcome,
            class: made_by_peer.then_some(Class::Proxy),
            grpc: matched.grpc && !trailers_only && !made_by_peer,
            seen_data: false,
        };
        Response::from_parts(head.without_version(), Body::watched(body, h2, tail))
    }
}

/// What an attempt's result says of its endpoint, as far as the head tells.
fn outcome(matched: Matched<'_>, message: &Message, sent: &Result<Sent, SendError>) -> Outcome {
    match sent {
        Err(_) if message.replay.as_ref().is_some_and(Replay::source_failed) => Outcome::Cancelled,
        Err(error) => Outcome::Failure(error.failure),
        Ok(sent) => {
            let head = &sent.response;
            if sent.private && head.headers().contains_key(WEFT_UNSENT) {
                let refused = head.headers().get(WEFT_REASON).is_some_and(|why| why == APP_REFUSES);
                return Outcome::Failure(if refused { Failure::AppRefused } else { Failure::NotProcessed });
            }
            let outcome = match classify::grpc_status(head.headers()) {
                Some(code) if matched.grpc => classify::grpc_under(code, &matched.rule.retry),
                _ => classify::status_under(head.status(), &matched.rule.retry),
            };
            let told = |why| sent.private && head.headers().get(WEFT_REASON).is_some_and(|said| said == why);
            if outcome.is_failure() && told(RATE_LIMITED) {
                // The caller's fault: the endpoint is none the worse for it, and another would only be asked more.
                return Outcome::ClientError;
            }
            outcome
        }
    }
}

/// The HTTP version of an answer is that of the connection it goes out by, not of the one it came in by.
trait WithoutVersion {
    fn without_version(self) -> Self;
}

impl WithoutVersion for http::response::Parts {
    fn without_version(mut self) -> Self {
        self.version = Version::default();
        self
    }
}

/// The answer to an accepted upgrade, in the client's HTTP version.
fn accepted_upgrade(head: http::response::Parts, upgrade: &Upgrade, version: Version) -> Response<Body> {
    let mut response = Response::from_parts(head.without_version(), Body::empty());
    response.extensions_mut().clear();
    if version == Version::HTTP_2 {
        *response.status_mut() = StatusCode::OK;
    } else {
        head::switching(&mut response, upgrade);
    }
    response
}

/// What lives as long as an upgraded connection.
struct Upgraded {
    exchange: Exchange,
    lease: Option<Lease>,
    _permit: Permit,
    _checkout: pool::Checkout,
    /// The app's connection, which HTTP has given up.
    _open: Rc<Open>,
}

impl Upgraded {
    async fn carry(mut self, worker: &Worker, client: OnUpgrade, server: OnUpgrade) {
        let outcome = match upgraded::carry(client, server, worker.drain.cut()).await {
            Ended::Well => Outcome::Success,
            Ended::ByServer => Outcome::Failure(Failure::Reset),
            Ended::Stopped | Ended::Never => Outcome::Cancelled,
        };
        let now = now();
        if let Some(lease) = self.lease.take() {
            self.exchange.settled(lease.finish(outcome, now));
        }
        self.exchange.finish(outcome.class(), now);
    }
}

/// Why no rule matches.
pub(super) fn unmatched(routes: &RouteTable) -> Error {
    if routes.is_usable() { Error::NoRoute } else { Error::RouteUnusable }
}

fn edit_response(filters: &[Filter], headers: &mut HeaderMap) {
    for filter in filters {
        if let Filter::ResponseHeaders(edit) = filter {
            route::edit_headers(edit, headers);
        }
    }
}

fn apply_filters(filters: &[Filter], outgoing: &mut Outgoing, prefix: Option<&str>) -> Result<(), Error> {
    for filter in filters {
        match filter {
            Filter::RequestHeaders(edit) => route::edit_headers(edit, &mut outgoing.headers),
            Filter::Rewrite(rewrite) => {
                let invalid = |what: &str| Error::InvalidFilter(what.into());
                if let Some(host) = &rewrite.host {
                    let authority = http::uri::Authority::try_from(&**host);
                    outgoing.authority = Some(authority.map_err(|_| invalid("the rewritten host"))?);
                }
                if let Some(edit) = &rewrite.path {
                    let mut path = route::rewrite_path(edit, prefix, outgoing.path.path());
                    if let Some(query) = outgoing.path.query() {
                        path.push('?');
                        path.push_str(query);
                    }
                    outgoing.path =
                        http::uri::PathAndQuery::try_from(path).map_err(|_| invalid("the rewritten path"))?;
                }
            }
            Filter::ResponseHeaders(_) | Filter::Redirect(_) | Filter::Invalid { .. } => {}
        }
    }
    Ok(())
}
