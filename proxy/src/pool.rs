//! Connections to endpoints and to the app: found, reused, and given up.
//!
//! Why it belongs to one worker: picking a connection takes no lock and no task. Between sidecars one HTTP/2
//! connection carries up to [`STREAMS_PER_CONNECTION`] exchanges; its connection window is larger than all of
//! their stream windows together, so a stalled stream can never hold up another. To the app, idle HTTP/1.1
//! connections are reused for a short time only, because the app may close one at the moment of reuse.

mod h1;
mod h2;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    error::Error as StdError,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::body::Incoming;
use tokio::sync::broadcast;
use weft_core::classify::Failure;

use self::{
    h1::{H1, H1Peer},
    h2::{H2, H2Peer},
};
use crate::{
    back::BadAnswer,
    config::Config,
    connect::{ConnectError, Connector},
    peer::Peer,
    pod_wide::{InUse, Permit},
    telemetry::recorder::Recorder,
    upload::{Replay, Upload},
};

/// Exchanges that one connection between sidecars carries before another is opened.
pub(crate) const STREAMS_PER_CONNECTION: u32 = 100;
/// What a sidecar takes of one request body before its app does: no more than a caller keeps for a replay.
pub(crate) const UPLOAD_WINDOW: u32 = 64 * 1024 - 1;
/// What a sidecar takes of one response body before its app does.
pub(crate) const DOWNLOAD_WINDOW: u32 = 128 * 1024;
/// Above `STREAMS_PER_CONNECTION * DOWNLOAD_WINDOW`.
pub(crate) const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// What HTTP/2 buffers of one stream before it stops reading the other side.
pub(crate) const SEND_BUFFER: usize = 128 * 1024;

/// Why there is no response.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) failure: Failure,
    pub(crate) detail: Arc<str>,
    /// The connection had served before: it may have been closed while idle.
    pub(crate) reused: bool,
    /// See [`ConnectError::local`].
    pub(crate) local: bool,
    /// See [`ConnectError::capped`].
    pub(crate) capped: bool,
}

impl SendError {
    /// An error of the endpoint.
    pub(crate) fn new(failure: Failure, detail: impl Into<Arc<str>>, reused: bool) -> Self {
        Self { failure, detail: detail.into(), reused, local: false, capped: false }
    }
}

/// A response head, and the connection that its body comes by.
pub(crate) struct Sent {
    pub(crate) response: Response<Incoming>,
    pub(crate) checkout: Checkout,
    /// It has private headers, and they are to be believed: it comes from a sidecar.
    pub(crate) private: bool,
    /// 200 accepts an upgrade, as HTTP/2 has it; otherwise 101 does.
    pub(crate) upgrades_by_ok: bool,
}

/// One worker's connections.
#[derive(Clone)]
pub(crate) struct Pool(Rc<Inner>);

struct Inner {
    config: Arc<Config>,
    connector: Connector,
    recorder: Recorder,
    /// Tells all workers of a sidecar to which a connection broke off that was in use.
    lost: broadcast::Sender<Peer>,
    h2: RefCell<HashMap<Peer, Rc<H2Peer>>>,
    h1: RefCell<HashMap<Peer, Rc<H1Peer>>>,
}

/// The use of one connection by one exchange.
pub(crate) struct Checkout(Use);

enum Use {
    H2(Rc<H2>),
    H1 { peer: Rc<H1Peer>, connection: Option<H1>, upload: Option<Replay> },
}

impl Checkout {
    /// The response is whole: the connection may be used again.
    pub(crate) fn give_back(mut self, now: Instant) {
        if let Use::H1 { peer, connection, upload } = &mut self.0 {
            let uploaded = upload.as_ref().is_none_or(Replay::is_ended);
            if let Some(connection) = connection.take().filter(|_| uploaded) {
                peer.give_back(connection, now);
            }
        }
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        match &self.0 {
            Use::H2(h2) => h2.let_go(),
            Use::H1 { upload, .. } => {
                if let Some(gate) = upload.as_ref().and_then(Replay::gate) {
                    // Its answer is whole or given up: a connection that waits for this body would wait for ever.
                    gate.shut();
                }
            }
        }
    }
}

/// What a request needs beside itself.
#[derive(Clone, Copy)]
pub(crate) struct SendOptions<'a> {
    pub(crate) connect_timeout: Duration,
    /// May be sent again if the connection turns out to have been closed while idle.
    pub(crate) idempotent: bool,
    pub(crate) upload: Option<&'a Replay>,
    /// Never an idle connection.
    pub(crate) fresh: bool,
    /// How many connections the service may have; `None`: as many as are needed.
    pub(crate) cap: Option<Cap<'a>>,
    /// Set once a connection is in hand: from then on the request may have been sent.
    pub(crate) connected: &'a Cell<bool>,
}

/// A service's connections, and how many there may be.
#[derive(Clone, Copy)]
pub(crate) struct Cap<'a> {
    pub(crate) in_use: &'a Arc<InUse>,
    pub(crate) max: u32,
}

/// Asks for one more. An endpoint's only connection is never refused: otherwise some endpoints of a service with more of
/// them than connections could not be reached at all.
fn one_more(cap: Option<Cap<'_>>, only: bool) -> Result<Option<Permit>, ConnectError> {
    let Some(Cap { in_use, max }) = cap else { return Ok(None) };
    let permit = if only { Permit::first_connection(in_use) } else { Permit::connection(in_use, max) };
    permit.map(Some).ok_or_else(ConnectError::capped)
}

impl Pool {
    pub(crate) fn new(
        config: Arc<Config>,
        connector: Connector,
        recorder: Recorder,
        lost: broadcast::Sender<Peer>,
    ) -> Self {
        Self(Rc::new(Inner {
            config,
            connector,
            recorder,
            lost,
            h2: RefCell::default(),
            h1: RefCell::default(),
        }))
    }

    /// Sends a request, which it takes, and waits for the head of its response.
    ///
    /// What is rare on the way (to open a connection, to wait for the app to ask for a body) is boxed where it is
    /// awaited, and the request is lent: every request carries the room for all that may happen to it, and pays for
    /// each byte of it when it is moved and when it is touched.
    pub(crate) async fn send(
        &self,
        peer: &Peer,
        request: &mut Option<Request<Upload>>,
        options: &SendOptions<'_>,
    ) -> Result<Sent, SendError> {
        if peer.is_h2() {
            self.send_h2(peer, request, options).await
        } else {
            self.send_h1(peer, request, options).await
        }
    }

    /// Whether a peer lets itself be connected to. Between sidecars, and where HTTP/2 is spoken, the connection stays
    /// for whoever comes next.
    pub(crate) async fn knock(&self, peer: &Peer, timeout: Duration) -> Result<(), ConnectError> {
        if peer.is_h2() {
            return self.h2(peer, None, timeout).await.map(drop);
        }
        self.0.connector.connect(peer.address(), peer.is_app(), timeout).await.map(drop)
    }

    /// Closes what has been idle for too long; called about once a second.
    pub(crate) fn sweep(&self, now: Instant) {
        self.0.h1.borrow_mut().retain(|_, peer| peer.sweep(now) || Rc::strong_count(peer) > 1);
        let (newest, longest) = (self.0.connector.generation(), self.0.config.times.pool_idle);
        self.0.h2.borrow_mut().retain(|peer, connections| {
            let generation = matches!(peer, Peer::Mesh { .. }).then_some(newest);
            connections.sweep(now, generation, longest) || Rc::strong_count(connections) > 1
        });
    }
}

impl From<ConnectError> for SendError {
    fn from(error: ConnectError) -> Self {
        let ConnectError { failure, detail, local, capped } = error;
        Self { failure, detail, reused: false, local, capped }
    }
}

/// A request is sent once, and again only where the connection gave it back.
fn nothing_left() -> SendError {
    SendError::new(Failure::NotProcessed, "the request was not given back", false)
}

fn not_processed(error: &hyper::Error) -> ConnectError {
    ConnectError::remote(Failure::NotProcessed, describe(error))
}

/// What an error after sending says about the request: not processed, or perhaps processed.
fn failure_of(error: &hyper::Error) -> Failure {
    if error.is_parse() {
        return Failure::Malformed;
    }
    let mut source: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<::h2::Error>() {
            let refused = h2.is_reset() && h2.reason() == Some(::h2::Reason::REFUSED_STREAM);
            // RFC 9113 §6.8: streams above the last id of a GOAWAY were not processed, whatever its code. h2 ends those at
            // or below it with an error of IO.
            let gone = h2.is_go_away() && h2.is_remote();
            return if refused || gone { Failure::NotProcessed } else { Failure::Reset };
        }
        if BadAnswer::is(cause) {
            return Failure::Malformed;
        }
        source = cause.source();
    }
    Failure::Reset
}

fn describe(error: &hyper::Error) -> Arc<str> {
    match error.source() {
        Some(source) => format!("{error}: {source}").into(),
        None => error.to_string().into(),
    }
}

/// Runs hyper's tasks on this worker's own thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalExec;

impl<F> hyper::rt::Executor<F> for LocalExec
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
