//! An opaque connection of the app: one connection to one endpoint, bytes both ways.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{net::TcpStream, time::Instant};
use weft_core::{
    balance::Lease,
    classify::{Class, Failure, Outcome},
    detect::{Detected, server_bytes_are_http},
    policy::{Filter, Rule},
    retry::{Attempts, Next},
};

use crate::{
    accepted::Accepted,
    belief::Belief,
    clock::now,
    connect::{ConnectError, Meshed},
    detect::{self, Begun, First, FirstWord},
    direction::Direction,
    error::Error,
    peer::{NOT_ACCEPTED, Peer},
    pod_wide::Permit,
    tcp::{Broken, Moved, Prefixed, Stream, reset, splice_until},
    telemetry::{exchange::Exchange, metrics::Counter, recorder::SeriesKey},
    tls::Alpn,
    worker::{Destination, Resolved, Spoken, Worker},
};

/// Forwards a connection to a destination outside the mesh, as it is.
pub(super) async fn outside(worker: &Rc<Worker>, mut accepted: Accepted) {
    let mut exchange = Exchange::start(&worker.recorder, now());
    exchange.belongs_to(worker.recorder.series(&SeriesKey {
        direction: Direction::Outbound,
        parent: "outside".into(),
        route: "none".into(),
        backend: "".into(),
        protocol: Spoken::Tcp.as_str(),
    }));
    // The app's own timeout is the one that counts out there; this bound only ends what nobody waits for.
    let connecting = worker.connector.connect(accepted.original, false, Duration::from_secs(120));
    match connecting.await {
        Ok(mut server) => carry(worker, exchange, None, None, &mut accepted.stream, &mut server).await,
        Err(error) => refuse(worker, accepted, exchange, error),
    }
}

/// Carries a connection to one of the destination's endpoints.
pub(super) async fn to_service(
    worker: &Rc<Worker>,
    accepted: Accepted,
    destination: &Rc<Destination>,
    first: First,
) {
    let mut exchange = Exchange::start(&worker.recorder, now());
    match connect(worker, destination, &mut exchange).await {
        Ok((held, server)) => {
            let mut client = Prefixed::new(first.bytes, accepted.stream);
            match server {
                Server::Mesh(mut server) => {
                    let Meshed { tls, belief, .. } = &mut *server;
                    carry(worker, exchange, Some(held), Some(belief), &mut client, tls).await;
                }
                Server::Plain(mut server) => {
                    carry(worker, exchange, Some(held), None, &mut client, &mut server).await;
                }
            }
        }
        Err(error) => refuse(worker, accepted, exchange, error),
    }
}

/// The client is silent: connects, and lets whoever speaks first decide. Returns the connection when the client
/// turned out to speak something that is to be understood.
pub(super) async fn whoever_speaks(
    worker: &Rc<Worker>,
    mut accepted: Accepted,
    destination: &Rc<Destination>,
) -> Option<(Accepted, First)> {
    let mut exchange = Exchange::start(&worker.recorder, now());
    let (held, mut server) = match connect(worker, destination, &mut exchange).await {
        Ok(connected) => connected,
        Err(error) => {
            refuse(worker, accepted, exchange, error);
            return None;
        }
    };
    let header = worker.config.times.header;
    let spoke = match &mut server {
        Server::Mesh(server) => detect::whoever_speaks(&mut accepted.stream, &mut server.tls, header).await,
        Server::Plain(server) => detect::whoever_speaks(&mut accepted.stream, server, header).await,
    };
    let (asked, greeting) = match spoke {
        FirstWord::Client(Ok(Begun::Spoke(first))) => match first.detected {
            Detected::Http1 | Detected::Http2 => {
                // Nothing was sent on this connection: the request goes its own way.
                exchange.take(now()).discard();
                return Some((accepted, first));
            }
            Detected::Tls { .. } | Detected::Opaque | Detected::NeedMore => (first.bytes, Bytes::new()),
        },
        FirstWord::Client(Ok(Begun::Ended | Begun::Silent)) => (Bytes::new(), Bytes::new()),
        FirstWord::Client(Err(_)) => {
            exchange.finish(Class::ClientError, now());
            return None;
        }
        FirstWord::Server { greeting, asked } => {
            learn(destination, &greeting);
            (asked, greeting)
        }
        FirstWord::ServerBroke => {
            reset(&accepted.stream);
            exchange.finish(Class::ServerError, now());
            return None;
        }
    };
    let mut client = Prefixed::new(asked, accepted.stream);
    match server {
        Server::Mesh(server) => {
            let Meshed { tls, belief, .. } = *server;
            let mut server = Prefixed::new(greeting, tls);
            carry(worker, exchange, Some(held), Some(&belief), &mut client, &mut server).await;
        }
        Server::Plain(server) => {
            let mut server = Prefixed::new(greeting, server);
            carry(worker, exchange, Some(held), None, &mut client, &mut server).await;
        }
    }
    None
}

/// A server that spoke first will do so again. One that answers a silent client in HTTP (408) has not made its
/// port a server-first one.
fn learn(destination: &Destination, greeting: &[u8]) {
    if !greeting.is_empty() && !server_bytes_are_http(greeting) {
        destination.server_first.set(true);
    }
}

enum Server {
    Mesh(Box<Meshed>),
    Plain(TcpStream),
}

type Held = (Lease, Permit);

/// Picks an endpoint and connects; one that nothing was sent to may be followed by another.
async fn connect(
    worker: &Rc<Worker>,
    destination: &Rc<Destination>,
    exchange: &mut Exchange,
) -> Result<(Held, Server), Error> {
    let resolved = destination.resolved(worker);
    let (_, rule) = rule_for_bytes(&resolved)?;
    let mut attempts = Attempts::new(&rule.retry, false);
    let mut tried: Vec<SocketAddr> = Vec::new();
    resolved.budget.deposit(exchange.started());
    let wait = Instant::now() + resolved.policy.service.limits.queue_wait;
    loop {
        let seen = destination.watched.version();
        let resolved = destination.resolved(worker);
        let (index, rule) = rule_for_bytes(&resolved)?;
        let chosen = weft_core::route::pick_backend(rule, &mut *worker.rng.borrow_mut());
        let chosen = chosen.ok_or(Error::NoBackend)?;
        enforceable(&chosen.filters)?;
        let backend = resolved.backends.get(chosen.backend).ok_or(Error::BackendUnresolved)?;
        let policy = &resolved.policy.backends[chosen.backend];
        exchange.belongs_to(resolved.series(
            &worker.recorder,
            Some(index),
            Some(chosen.backend),
            Spoken::Tcp,
        ));
        if !policy.resolved {
            return Err(Error::BackendUnresolved);
        }
        let permit = Permit::connection(&backend.in_use, policy.service.limits.max_connections)
            .ok_or(Error::Overloaded)?;
        let picked = {
            let mut rng = worker.rng.borrow_mut();
            backend.balancer.borrow_mut().pick(&tried, now(), &mut *rng)
        };
        let Ok(mut lease) = picked else {
            let changed = destination.watched.changed_since(seen);
            if backend.failfast.get() || tokio::time::timeout_at(wait, changed).await.is_err() {
                backend.failfast.set(true);
                return Err(Error::NoEndpoint);
            }
            continue;
        };
        let timeout = worker.connect_timeout(rule);
        let endpoint = lease.endpoint().clone();
        if lease.only_connects() {
            let peer = Peer::of(&endpoint, false, &policy.service);
            worker.knock(lease, peer, timeout);
            continue;
        }
        let connected = match Peer::of(&endpoint, false, &policy.service) {
            Some(Peer::Mesh { address, uid, identity }) => {
                let connecting = worker.connector.connect_mesh(address, &uid, &identity, Alpn::Tcp, timeout);
                connecting.await.map(|meshed| Server::Mesh(Box::new(meshed)))
            }
            Some(peer) => worker.connector.connect(peer.address(), false, timeout).await.map(Server::Plain),
            None => Err(ConnectError::remote(Failure::Identity, NOT_ACCEPTED)),
        };
        let now = now();
        match connected {
            Ok(server) => {
                lease.first_byte(now);
                return Ok(((lease, permit), server));
            }
            Err(error) => {
                tracing::debug!(endpoint = %endpoint.address, detail = %error.detail, "no connection");
                let outcome = Outcome::Failure(error.failure);
                exchange.settled(lease.finish(if error.local { Outcome::Cancelled } else { outcome }, now));
                tried.push(endpoint.address);
                let next = {
                    let mut rng = worker.rng.borrow_mut();
                    attempts.next(outcome, true, &resolved.budget, now, &mut *rng)
                };
                match next {
                    Next::RetryAfter(delay) => {
                        worker.recorder.count(Counter::Redispatched);
                        exchange.retried();
                        tokio::time::sleep(delay).await;
                    }
                    Next::Stop(_) => return Err(Error::from_failure(error.failure)),
                }
            }
        }
    }
}

/// Bytes have no head to match: they go where a rule without conditions sends everything, else by the first.
fn rule_for_bytes(resolved: &Resolved) -> Result<(usize, &Arc<Rule>), Error> {
    let rules = resolved.policy.routes.rules();
    let open = rules.iter().position(|rule| rule.matches.is_empty()).unwrap_or(0);
    let rule = rules.get(open).ok_or_else(|| super::http::unmatched(&resolved.policy.routes))?;
    enforceable(&rule.filters).map(|()| (open, rule))
}

/// What answers a request with an error does not let bytes pass.
fn enforceable(filters: &[Filter]) -> Result<(), Error> {
    let invalid = filters.iter().find_map(|filter| match filter {
        Filter::Invalid { reason } => Some(reason),
        Filter::RequestHeaders(_) | Filter::ResponseHeaders(_) | Filter::Redirect(_) | Filter::Rewrite(_) => {
            None
        }
    });
    invalid.map_or(Ok(()), |reason| Err(Error::InvalidFilter(reason.clone())))
}

async fn carry<C: Stream, S: Stream>(
    worker: &Rc<Worker>,
    exchange: Exchange,
    held: Option<Held>,
    belief: Option<&Belief>,
    client: &mut C,
    server: &mut S,
) {
    let moved = Moved::default();
    let stop = async {
        let lost = async {
            match belief {
                Some(belief) => belief.lost(worker.material.clone()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            lost = lost => {
                worker.recorder.count(lost.counter());
                tracing::warn!(code = lost.as_str(), "connection ended");
            }
            () = worker.drain.cut() => {}
        }
    };
    let broken = splice_until(client, server, &moved, stop).await.err();
    worker.recorder.add(Counter::OutboundBytesSent, moved.up.get());
    worker.recorder.add(Counter::OutboundBytesReceived, moved.down.get());
    let outcome = match broken {
        None => Outcome::Success,
        Some(Broken::Client) => Outcome::Cancelled,
        Some(Broken::Server) => Outcome::Failure(Failure::Reset),
    };
    let now = now();
    if let Some((lease, _permit)) = held {
        // A connection that breaks after a while says little about the endpoint as it is now. One that brought nothing
        // does: behind a sidecar this is how an app that is down looks, and quick failures must not attract more.
        let worked = moved.down.get() > 0;
        let opened = if worked && broken.is_some() { Outcome::Cancelled } else { outcome };
        exchange.settled(lease.finish(opened, now));
    }
    exchange.finish(broken.map_or(Class::Ok, Broken::class), now);
}

/// The client sees a refusal, not a hang and not a clean end.
fn refuse(worker: &Worker, accepted: Accepted, exchange: Exchange, error: impl Into<Error>) {
    accepted.refuse(&worker.recorder, Direction::Outbound, &error.into());
    exchange.finish(Class::Proxy, now());
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        Self::from_failure(error.failure)
    }
}
