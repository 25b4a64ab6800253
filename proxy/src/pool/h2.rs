//! HTTP/2 connections: many requests on each, between sidecars and to whatever speaks it.
//!
//! Why whoever finds no room waits for the same new connection: a burst that opened one for each of its requests would
//! be as many handshakes. Why a connection is opened in a task of its own: the request that asked for it first may go away,
//! and others wait for it.

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _,
    future::{LocalBoxFuture, Shared},
};
use http::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};
use weft_core::classify::Failure;

use super::{
    CONNECTION_WINDOW, Cap, Checkout, DOWNLOAD_WINDOW, LocalExec, Pool, SEND_BUFFER, STREAMS_PER_CONNECTION,
    SendError, SendOptions, Sent, Use, describe, failure_of, not_processed, nothing_left, one_more,
};
use crate::{
    back::Sifted,
    belief::Belief,
    clock::now,
    connect::{ConnectError, Meshed},
    expect::{self, WEFT_CONTINUE},
    head,
    peer::Peer,
    pod_wide::Permit,
    tcp::{Prefixed, write_to_inner},
    telemetry::{metrics::Gauge, recorder::Recorder},
    tls::Alpn,
    upload::{Replay, Upload},
};

/// HTTP/2 PING: a half-open peer is noticed within their sum.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Data that a sidecar does not acknowledge for so long ends the connection; only where both ends always read.
const USER_TIMEOUT: Duration = Duration::from_secs(14);
/// How often a connection may be closed as soon as it is open before that counts as a failure of the endpoint.
const MAX_OPENED: usize = 3;

type Connecting = Shared<LocalBoxFuture<'static, Result<Rc<H2>, ConnectError>>>;

/// The connections to one peer.
#[derive(Default)]
pub(super) struct H2Peer {
    open: RefCell<Vec<Rc<H2>>>,
    connecting: RefCell<Option<Connecting>>,
}

/// One connection, and the requests on it.
pub(super) struct H2 {
    sender: RefCell<http2::SendRequest<Upload>>,
    in_flight: Cell<u32>,
    /// Of the peer's settings.
    max_streams: Rc<Cell<usize>>,
    /// Generation of the certificate that it was opened with.
    generation: u64,
    /// Its peer is believed no more: it takes nothing new.
    retired: Rc<Cell<bool>>,
    last_used: Cell<Instant>,
    used: Rc<Cell<bool>>,
    /// Counted among the connections of the service that it was opened for.
    _permit: Option<Permit>,
}

impl Pool {
    pub(super) async fn send_h2(
        &self,
        peer: &Peer,
        request: &mut Option<Request<Upload>>,
        options: &SendOptions<'_>,
    ) -> Result<Sent, SendError> {
        let gate = options.upload.and_then(Replay::gate);
        // A connection that closes before it takes the request gives it back; a second and a third is tried.
        let mut last = None;
        for _ in 0..3 {
            options.connected.set(false);
            let h2 = self.h2(peer, options.cap, options.connect_timeout).await.map_err(SendError::from)?;
            options.connected.set(true);
            h2.in_flight.set(h2.in_flight.get() + 1);
            let reused = h2.used.replace(true);
            if !reused && let Some(request) = &mut *request {
                head::unmark_unique(request.headers_mut());
            }
            h2.last_used.set(now());
            let checkout = Checkout(Use::H2(h2.clone()));
            let answered = {
                let mut sending =
                    pin!(h2.sender.borrow_mut().try_send_request(request.take().ok_or_else(nothing_left)?));
                match &gate {
                    None => sending.await,
                    Some(gate) => Box::pin(gate.patient(expect::PATIENCE_MESH, sending.as_mut())).await,
                }
            };
            match answered {
                Ok(mut response) => {
                    let mesh = matches!(peer, Peer::Mesh { .. });
                    if let Some(gate) = gate.filter(|_| mesh)
                        && response.headers().contains_key(WEFT_CONTINUE)
                    {
                        gate.open();
                        let real = expect::read_head(response.body_mut()).await;
                        let real = real.ok_or_else(|| {
                            SendError::new(Failure::Reset, "the answer broke off before its head", reused)
                        })?;
                        (*response.status_mut(), *response.headers_mut()) = real;
                    }
                    let private = mesh && head::has_private(response.headers());
                    let declined = private && head::restore_status(&mut response);
                    return Ok(Sent { response, checkout, private, upgrades_by_ok: !declined });
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) => {
                        *request = Some(unsent);
                        last = Some(error.into_error());
                    }
                    None => {
                        let error = error.into_error();
                        return Err(SendError::new(failure_of(&error), describe(&error), reused));
                    }
                },
            }
        }
        let detail = last.map_or_else(|| "closed".into(), |e| describe(&e));
        Err(SendError::new(Failure::NotProcessed, detail, true))
    }

    /// An open connection with room, or a new one that all who need it wait for together.
    pub(super) async fn h2(
        &self,
        peer: &Peer,
        cap: Option<Cap<'_>>,
        timeout: Duration,
    ) -> Result<Rc<H2>, ConnectError> {
        let entry = {
            let mut peers = self.0.h2.borrow_mut();
            match peers.get(peer) {
                Some(entry) => entry.clone(),
                None => peers.entry(peer.clone()).or_default().clone(),
            }
        };
        let mut failed = 0;
        while failed < MAX_OPENED {
            // Read each time: the certificate may be renewed while a connection is opened.
            let generation = match peer {
                Peer::Mesh { .. } => self.0.connector.generation(),
                Peer::Plain { .. } | Peer::App { .. } => 0,
            };
            if let Some(open) = entry.usable(generation) {
                return Ok(open);
            }
            let connecting = entry.connecting.borrow().clone();
            let connecting = match connecting {
                Some(connecting) => connecting,
                None => {
                    // Those of an older certificate end by themselves, and are nothing to send by.
                    let only = !entry.open.borrow().iter().any(|c| c.is_current(generation));
                    let permit = one_more(cap, only)?;
                    self.start_h2(peer, &entry, permit, timeout)
                }
            };
            let opened = connecting.await?;
            if opened.has_room(generation) {
                return Ok(opened);
            }
            // Filled by others who waited for it too, it was a good one: the next is for those who are left.
            if opened.in_flight.get() == 0 {
                failed += 1;
            }
        }
        Err(ConnectError::remote(Failure::NotProcessed, "each new connection was closed at once"))
    }

    /// Opens a connection in a task of its own: whoever waits may go away.
    fn start_h2(
        &self,
        peer: &Peer,
        entry: &Rc<H2Peer>,
        permit: Option<Permit>,
        timeout: Duration,
    ) -> Connecting {
        let pool = self.clone();
        let (peer, entry_of_task) = (peer.clone(), entry.clone());
        let task = tokio::task::spawn_local(async move {
            let opened = pool.open_h2(&peer, timeout).await;
            let result = opened.map(|h2| Rc::new(H2 { _permit: permit, ..h2 }));
            entry_of_task.connecting.borrow_mut().take();
            if let Ok(open) = &result {
                entry_of_task.open.borrow_mut().push(open.clone());
            }
            result
        });
        let connecting =
            async move { task.await.unwrap_or_else(|_| Err(ConnectError::own("the worker stopped"))) };
        let connecting = connecting.boxed_local().shared();
        *entry.connecting.borrow_mut() = Some(connecting.clone());
        connecting
    }

    async fn open_h2(&self, peer: &Peer, timeout: Duration) -> Result<H2, ConnectError> {
        let mut builder = http2::Builder::new(LocalExec);
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(DOWNLOAD_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(self.0.config.limits.header_list())
            // Until its SETTINGS nobody knows how many streams a peer takes; what is too much would wait within the
            // library, perhaps behind streams that never end.
            .initial_max_send_streams(0);
        match peer {
            Peer::Mesh { address, uid, identity } => {
                // Sidecars only: gRPC servers take a client that pings more often than every five minutes for an abuser,
                // and end its connection with all that is on it (gRFC A8). The kernel looks after those.
                builder
                    .keep_alive_interval(PING_INTERVAL)
                    .keep_alive_timeout(PING_TIMEOUT)
                    .keep_alive_while_idle(true);
                let Meshed { mut tls, generation, belief } =
                    self.0.connector.connect_mesh(*address, uid, identity, Alpn::H2, timeout).await?;
                // Fails only on a socket that is closed already.
                let _ = socket2::SockRef::from(tls.get_ref().0).set_tcp_user_timeout(Some(USER_TIMEOUT));
                let settings = self.0.connector.first_bytes(&mut tls, *address, timeout).await?;
                // Boxed: the library keeps a connection's task and its requests' tasks in one type, and moves each of
                // those eight times.
                let heard = Rc::new(Heard::default());
                let io = Hears {
                    inner: Box::new(Sifted::new(Prefixed::new(settings, tls))),
                    heard: heard.clone(),
                };
                let handshake = builder.handshake(TokioIo::new(io)).await;
                let (sender, connection) = handshake.map_err(|e| not_processed(&e))?;
                let (lost, peer) = (self.0.lost.clone(), peer.clone());
                let lost = move || {
                    // Nobody listens once the workers have ended.
                    let _ = lost.send(peer);
                };
                let (h2, driver) =
                    drive_h2(sender, connection, generation, &self.0.recorder, heard.clone(), lost);
                tokio::task::spawn_local(self.clone().guard(*address, belief, h2.retired.clone(), driver));
                self.streams_known(&heard, *address, timeout).await?;
                Ok(h2)
            }
            Peer::Plain { address, .. } | Peer::App { address, .. } => {
                let tcp = self.0.connector.connect(*address, peer.is_app(), timeout).await?;
                let heard = Rc::new(Heard::default());
                let io = Hears { inner: Sifted::new(tcp), heard: heard.clone() };
                let handshake = builder.handshake(TokioIo::new(io)).await;
                let (sender, connection) = handshake.map_err(|e| not_processed(&e))?;
                // A server without a sidecar closes its connections when it likes.
                let (h2, _driver) = drive_h2(sender, connection, 0, &self.0.recorder, heard.clone(), || ());
                self.streams_known(&heard, *address, timeout).await?;
                Ok(h2)
            }
        }
    }

    /// Waits for the SETTINGS that say how many streams a peer takes, or for the connection's end. Any server sends them
    /// first, unasked (RFC 9113 §3.4).
    async fn streams_known(
        &self,
        heard: &Heard,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<(), ConnectError> {
        tokio::time::timeout(timeout, heard.told.notified())
            .await
            .map_err(|_| self.0.connector.late(format!("{address} takes no streams")))
    }

    /// Ends a connection whose peer is believed no more: it takes nothing new, and what is in flight has the time of
    /// a drain. A task of its own, so that it costs the connection's exchanges nothing.
    async fn guard(
        self,
        address: SocketAddr,
        belief: Belief,
        retired: Rc<Cell<bool>>,
        mut driver: tokio::task::JoinHandle<()>,
    ) {
        let lost = tokio::select! {
            _ = &mut driver => return,
            lost = belief.lost(self.0.connector.material()) => lost,
        };
        self.0.recorder.count(lost.counter());
        tracing::info!(why = lost.as_str(), %address, "connection to a sidecar is to end");
        retired.set(true);
        if tokio::time::timeout(self.0.config.times.drain, &mut driver).await.is_err() {
            driver.abort();
        }
    }
}

impl H2Peer {
    /// Lets go of what is idle for too long, or takes nothing new (`generation`: of the certificate that peers are shown
    /// now) and has nothing left. Whether anything remains.
    pub(super) fn sweep(&self, now: Instant, generation: Option<u64>, longest: Duration) -> bool {
        let mut open = self.open.borrow_mut();
        open.retain(|c| {
            let current = !c.retired.get() && generation.is_none_or(|generation| c.generation == generation);
            let wanted = current && now.saturating_duration_since(c.last_used.get()) < longest;
            !c.sender.borrow().is_closed() && (c.in_flight.get() > 0 || wanted)
        });
        !open.is_empty()
    }

    fn usable(&self, generation: u64) -> Option<Rc<H2>> {
        let mut open = self.open.borrow_mut();
        // The common case first: one connection, open, with room.
        if let Some(first) = open.first()
            && first.has_room(generation)
        {
            return Some(first.clone());
        }
        // A connection made with an older certificate takes nothing new and ends with its last exchange.
        open.retain(|c| {
            let current = c.generation == generation && !c.retired.get();
            !c.sender.borrow().is_closed() && (current || c.in_flight.get() > 0)
        });
        open.iter().find(|c| c.has_room(generation)).cloned()
    }
}

impl H2 {
    /// One of its requests has ended.
    pub(super) fn let_go(&self) {
        self.in_flight.set(self.in_flight.get() - 1);
    }

    fn has_room(&self, generation: u64) -> bool {
        // At four fifths of the peer's own limit another connection is opened, so nothing queues behind
        // long streams.
        let peer = u32::try_from(self.max_streams.get()).unwrap_or(u32::MAX);
        let room = STREAMS_PER_CONNECTION.min((peer - peer / 5).max(1));
        self.in_flight.get() < room && self.is_current(generation)
    }

    /// Whether it may take anything new at all.
    fn is_current(&self, generation: u64) -> bool {
        self.generation == generation && !self.retired.get() && !self.sender.borrow().is_closed()
    }
}

/// What an HTTP/2 connection's driver waits for beside requests: the library reads SETTINGS in another task, and wakes
/// nobody for them.
#[derive(Default)]
struct Heard {
    /// Whether it still waits.
    done: Cell<bool>,
    driver: RefCell<Option<Waker>>,
    /// Once, when it is done: the stream limit is known, or the connection has ended.
    told: Notify,
}

/// A connection that wakes its driver when something came, as long as the stream limit is not known.
struct Hears<S> {
    inner: S,
    heard: Rc<Heard>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Hears<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if !self.heard.done.get()
            && polled.is_ready()
            && let Some(driver) = &*self.heard.driver.borrow()
        {
            // It runs after the task that reads, which will have understood by then what it has read.
            driver.wake_by_ref();
        }
        polled
    }
}

write_to_inner!(Hears);

/// Runs an HTTP/2 connection in a task, and keeps the peer's stream limit where the pool can read it. `lost` is called
/// when the other side ends a connection that has served, and that we had not given up.
fn drive_h2<T>(
    sender: http2::SendRequest<Upload>,
    connection: http2::Connection<T, Upload, LocalExec>,
    generation: u64,
    recorder: &Recorder,
    heard: Rc<Heard>,
    lost: impl FnOnce() + 'static,
) -> (H2, tokio::task::JoinHandle<()>)
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + 'static,
{
    let max_streams = Rc::new(Cell::new(connection.current_max_send_streams()));
    let limit = max_streams.clone();
    let mut connection = Box::pin(connection);
    let open = recorder.raise(Gauge::PooledConnections);
    let (used, retired) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    // Gone with the `H2`, when it was we who closed it.
    let (served, given_up) = (Rc::downgrade(&used), retired.clone());
    let mut lost = Some(lost);
    let driver = tokio::task::spawn_local(std::future::poll_fn(move |cx| {
        let _open = &open;
        let polled = connection.as_mut().poll(cx);
        let now = connection.current_max_send_streams();
        limit.set(now);
        if !heard.done.get() {
            if now > 0 || polled.is_ready() {
                heard.done.set(true);
                heard.told.notify_one();
            } else {
                *heard.driver.borrow_mut() = Some(cx.waker().clone());
            }
        }
        polled.map(|result| {
            if let Err(error) = result {
                tracing::debug!(%error, "HTTP/2 connection ended");
            }
            let unasked = served.upgrade().is_some_and(|served| served.get()) && !given_up.get();
            if let Some(lost) = lost.take().filter(|_| unasked) {
                lost();
            }
        })
    }));
    let h2 = H2 {
        sender: RefCell::new(sender),
        in_flight: Cell::new(0),
        max_streams,
        generation,
        retired,
        last_used: Cell::new(now()),
        used,
        _permit: None,
    };
    (h2, driver)
}
