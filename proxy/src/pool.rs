//! Connections to endpoints and to the app: made, reused, and given up.
//!
//! Why it belongs to one worker: picking a connection takes no lock and no task. Between sidecars one HTTP/2
//! connection carries up to [`STREAMS_PER_CONNECTION`] exchanges; its connection window is larger than all of
//! their stream windows together, so a stalled stream can never hold up another. To the app, idle HTTP/1.1
//! connections are reused for a short time only, because the app may close one at the moment of reuse.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    error::Error as StdError,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::{
    FutureExt,
    future::{LocalBoxFuture, Shared},
};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rand::Rng as _;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
    sync::{Notify, broadcast, watch},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use weft_core::{
    classify::Failure,
    framing::Limits,
    identity::{PodUid, SpiffeId},
};

use crate::{
    back::{Back, BadAnswer, Due, Sifted},
    belief::Belief,
    config::Config,
    expect::{self, WEFT_CONTINUE},
    head,
    peer::Peer,
    pod_wide::{InUse, Permit},
    tcp::{Prefixed, is_our_own_want, keep_alive, write_to_inner},
    telemetry::{
        exchange::now,
        metrics::{Counter, Gauge, Recorder},
    },
    tls::{self, Alpn, Material, Role},
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
/// An app connection that was idle for longer is not reused for a request that must not be sent twice; for others
/// `WEFT_APP_IDLE_TIMEOUT` counts (Node closes at 5 s, some servers at 2 s).
const IDLE_LIMIT_UNSAFE: Duration = Duration::from_millis(100);
/// Idle connections kept to one app port.
const MAX_IDLE: usize = 128;
/// HTTP/2 PING: a half-open peer is noticed within their sum.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// A handshake gets at least so long.
const TLS_TIMEOUT: Duration = Duration::from_secs(2);
/// What is read of an app's answer before the caller takes it.
const READ_BUFFER: usize = 64 * 1024;
/// Data that a sidecar does not acknowledge for so long ends the connection; only where both ends always read.
const USER_TIMEOUT: Duration = Duration::from_secs(14);
/// How often a connection may be closed as soon as it is open before that counts as a failure of the endpoint.
const MAX_OPENED: usize = 3;
/// An app that listens accepts at once: within the call, unless its queue is full.
const OWN_ANSWERS: Duration = Duration::from_millis(20);
/// The source address by which inbound reaches its app: capture rules let it pass.
const INBOUND_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));

/// A socket that is about to be connected; `as_inbound`: to this pod's own app, which capture lets pass.
pub(crate) fn socket(address: SocketAddr, as_inbound: bool) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_nodelay(true)?;
    // Otherwise a read skips an urgent byte, and the app gets a stream with a hole.
    socket2::SockRef::from(&socket).set_out_of_band_inline(true)?;
    if as_inbound {
        // Without this a source address has only the 28,000 ephemeral ports for all destinations.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true);
        let source = match address {
            SocketAddr::V4(_) => INBOUND_SOURCE,
            SocketAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        };
        socket.bind(SocketAddr::new(source, 0))?;
    }
    Ok(socket)
}

/// A connection to exactly one pod.
pub(crate) struct Meshed {
    pub(crate) tls: TlsStream<TcpStream>,
    /// Of our certificate.
    generation: u64,
    /// For how long the pod is believed to be who it is.
    pub(crate) belief: Belief,
}

/// Why a connection could not be made; shared by all who waited for it.
#[derive(Clone, Debug)]
pub(crate) struct ConnectError {
    pub(crate) failure: Failure,
    pub(crate) detail: Arc<str>,
    /// It is this workload's own fault (no certificate): nothing is held against the endpoint.
    pub(crate) local: bool,
    /// The service has as many connections as it may.
    pub(crate) capped: bool,
}

impl ConnectError {
    fn capped() -> Self {
        let detail = "as many connections as there may be".into();
        Self { failure: Failure::NotProcessed, detail, local: true, capped: true }
    }

    fn remote(failure: Failure, detail: String) -> Self {
        Self { failure, detail: detail.into(), local: false, capped: false }
    }
}

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
    pub(crate) fn new(failure: Failure, detail: &str) -> Self {
        Self { failure, detail: detail.into(), reused: false, local: false, capped: false }
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
    material: watch::Receiver<Option<Arc<Material>>>,
    recorder: Recorder,
    /// Tells all workers of a sidecar to which a connection broke off that was in use.
    lost: broadcast::Sender<Peer>,
    h2: RefCell<HashMap<Peer, Rc<H2Peer>>>,
    h1: RefCell<HashMap<Peer, Rc<H1Peer>>>,
    configs: RefCell<HashMap<(SpiffeId, Alpn), Configured>>,
}

/// A TLS configuration and the generation of the certificate in it.
type Configured = (u64, Arc<rustls::ClientConfig>);

type Connecting = Shared<LocalBoxFuture<'static, Result<Rc<H2>, ConnectError>>>;

#[derive(Default)]
struct H2Peer {
    open: RefCell<Vec<Rc<H2>>>,
    connecting: RefCell<Option<Connecting>>,
}

struct H2 {
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

#[derive(Default)]
struct H1Peer {
    idle: RefCell<Vec<H1>>,
    /// Held by each connection, idle or in use.
    open: Rc<()>,
}

struct H1 {
    sender: http1::SendRequest<Upload>,
    due: Due,
    idle_since: Instant,
    /// How long it may be idle: our own limit, or less where the app has said so.
    idle_limit: Duration,
    used: bool,
    _open: Rc<()>,
    /// As of an [`H2`].
    _permit: Option<Permit>,
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
            if let Some(mut connection) = connection.take() {
                let mut idle = peer.idle.borrow_mut();
                if uploaded && !connection.sender.is_closed() && idle.len() < MAX_IDLE {
                    connection.idle_since = now;
                    connection.used = true;
                    idle.push(connection);
                }
            }
        }
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        match &self.0 {
            Use::H2(h2) => h2.in_flight.set(h2.in_flight.get() - 1),
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
        material: watch::Receiver<Option<Arc<Material>>>,
        recorder: Recorder,
        lost: broadcast::Sender<Peer>,
    ) -> Self {
        Self(Rc::new(Inner {
            config,
            material,
            recorder,
            lost,
            h2: RefCell::default(),
            h1: RefCell::default(),
            configs: RefCell::default(),
        }))
    }

    /// Sends a request and waits for the head of its response.
    pub(crate) async fn send(
        &self,
        peer: &Peer,
        request: Request<Upload>,
        options: SendOptions<'_>,
    ) -> Result<Sent, SendError> {
        match peer {
            Peer::Mesh { .. } | Peer::Plain { h2: true, .. } | Peer::App { h2: true, .. } => {
                self.send_h2(peer, request, options).await
            }
            Peer::Plain { h2: false, .. } | Peer::App { h2: false, .. } => {
                self.send_h1(peer, request, options).await
            }
        }
    }

    /// Whether a peer lets itself be connected to. Between sidecars, and where HTTP/2 is spoken, the connection stays
    /// for whoever comes next.
    pub(crate) async fn knock(&self, peer: &Peer, timeout: Duration) -> Result<(), ConnectError> {
        match peer {
            Peer::Mesh { .. } | Peer::Plain { h2: true, .. } | Peer::App { h2: true, .. } => {
                self.h2(peer, None, timeout).await.map(drop)
            }
            Peer::Plain { address, h2: false } => self.connect(*address, false, timeout).await.map(drop),
            Peer::App { address, h2: false } => self.connect(*address, true, timeout).await.map(drop),
        }
    }

    async fn send_h2(
        &self,
        peer: &Peer,
        mut request: Request<Upload>,
        options: SendOptions<'_>,
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
            if !reused {
                head::unmark_unique(request.headers_mut());
            }
            h2.last_used.set(now());
            let checkout = Checkout(Use::H2(h2.clone()));
            let sending = h2.sender.borrow_mut().try_send_request(request);
            let answered = match &gate {
                None => sending.await,
                Some(gate) => gate.patient(expect::PATIENCE_MESH, sending).await,
            };
            match answered {
                Ok(mut response) => {
                    let mesh = matches!(peer, Peer::Mesh { .. });
                    if let Some(gate) = gate.filter(|_| mesh)
                        && response.headers().contains_key(WEFT_CONTINUE)
                    {
                        gate.open();
                        let real = expect::read_head(response.body_mut()).await;
                        let real = real.ok_or_else(|| SendError {
                            failure: Failure::Reset,
                            detail: "the answer broke off before its head".into(),
                            reused,
                            local: false,
                            capped: false,
                        })?;
                        (*response.status_mut(), *response.headers_mut()) = real;
                    }
                    let private = mesh && head::has_private(response.headers());
                    let declined = private && head::restore_status(&mut response);
                    return Ok(Sent { response, checkout, private, upgrades_by_ok: !declined });
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) => {
                        request = unsent;
                        last = Some(error.into_error());
                    }
                    None => {
                        let error = error.into_error();
                        return Err(SendError {
                            failure: failure_of(&error),
                            detail: describe(&error),
                            reused,
                            local: false,
                            capped: false,
                        });
                    }
                },
            }
        }
        let detail = last.map_or_else(|| "closed".into(), |e| describe(&e));
        Err(SendError { failure: Failure::NotProcessed, detail, reused: true, local: false, capped: false })
    }

    async fn send_h1(
        &self,
        peer: &Peer,
        mut request: Request<Upload>,
        options: SendOptions<'_>,
    ) -> Result<Sent, SendError> {
        let entry = self.h1_peer(peer);
        let gate = options.upload.and_then(Replay::gate);
        if let Some(gate) = &gate {
            gate.opens_at_100(&mut request);
        }
        loop {
            options.connected.set(false);
            let mut connection = match entry.take_idle(options) {
                Some(idle) => idle,
                None => {
                    let mut permit = one_more(options.cap, Rc::strong_count(&entry.open) == 1);
                    if permit.is_err()
                        && let Some(idle) = entry.idle.borrow_mut().pop()
                    {
                        // Too old for this request, it gives way to it.
                        drop(idle);
                        permit = one_more(options.cap, false);
                    }
                    let permit = permit?;
                    let opened = self.open_h1(peer, options.connect_timeout).await?;
                    H1 { _permit: permit, _open: entry.open.clone(), ..opened }
                }
            };
            options.connected.set(true);
            let reused = connection.used;
            if connection.sender.ready().await.is_err() {
                if reused {
                    continue;
                }
                return Err(SendError {
                    failure: Failure::NotProcessed,
                    detail: "closed at once".into(),
                    reused,
                    local: false,
                    capped: false,
                });
            }
            connection.due.to(request.method());
            let sending = connection.sender.try_send_request(request);
            let answered = match &gate {
                None => sending.await,
                Some(gate) => gate.patient(expect::PATIENCE, sending).await,
            };
            match answered {
                Ok(response) => {
                    if let Some(announced) = head::keep_alive_timeout(response.headers()) {
                        connection.idle_limit = announced.min(self.0.config.times.app_idle);
                    }
                    let upload = options.upload.cloned();
                    let checkout = Checkout(Use::H1 { peer: entry, connection: Some(connection), upload });
                    return Ok(Sent { response, checkout, private: false, upgrades_by_ok: false });
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if reused => request = unsent,
                    unsent => {
                        let error = error.into_error();
                        let failure =
                            if unsent.is_some() { Failure::NotProcessed } else { failure_of(&error) };
                        return Err(SendError {
                            failure,
                            detail: describe(&error),
                            reused,
                            local: false,
                            capped: false,
                        });
                    }
                },
            }
        }
    }

    /// An open connection with room, or a new one that all who need it wait for together.
    async fn h2(&self, peer: &Peer, cap: Option<Cap<'_>>, timeout: Duration) -> Result<Rc<H2>, ConnectError> {
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
                Peer::Mesh { .. } => self.0.material.borrow().as_ref().map_or(0, |m| m.generation),
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
        Err(ConnectError {
            failure: Failure::NotProcessed,
            detail: "each new connection was closed at once".into(),
            local: false,
            capped: false,
        })
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
        let connecting = async move {
            task.await.unwrap_or_else(|_| {
                Err(ConnectError {
                    failure: Failure::Unreachable,
                    detail: "the worker stopped".into(),
                    local: true,
                    capped: false,
                })
            })
        };
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
                    self.connect_mesh(*address, uid, identity, Alpn::H2, timeout).await?;
                // Fails only on a socket that is closed already.
                let _ = socket2::SockRef::from(tls.get_ref().0).set_tcp_user_timeout(Some(USER_TIMEOUT));
                let settings = self.first_bytes(&mut tls, *address, timeout).await?;
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
                let source = matches!(peer, Peer::App { .. });
                let tcp = self.connect(*address, source, timeout).await?;
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
        tokio::time::timeout(timeout, heard.told.notified()).await.map_err(|_| {
            self.0.recorder.count(Counter::ConnectTimeouts);
            ConnectError::remote(Failure::ConnectTimeout, format!("{address} takes no streams"))
        })
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
            lost = belief.lost(self.0.material.clone()) => lost,
        };
        self.0.recorder.count(lost.counter());
        tracing::info!(why = lost.as_str(), %address, "connection to a sidecar is to end");
        retired.set(true);
        if tokio::time::timeout(self.0.config.times.drain, &mut driver).await.is_err() {
            driver.abort();
        }
    }

    /// A TLS 1.3 client has finished before the server has judged its certificate. A server that accepts sends its
    /// SETTINGS unasked; one that refuses sends an alert, and then it is known that nothing was sent.
    async fn first_bytes(
        &self,
        tls: &mut TlsStream<TcpStream>,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<Bytes, ConnectError> {
        let mut first = BytesMut::with_capacity(128);
        match tokio::time::timeout(timeout.max(TLS_TIMEOUT), tls.read_buf(&mut first)).await {
            Ok(Ok(n)) if n > 0 => Ok(first.freeze()),
            Ok(Ok(_)) => {
                Err(ConnectError::remote(Failure::NotProcessed, format!("{address} closed at once")))
            }
            Ok(Err(error)) => Err(self.tls_failed(address, &error)),
            Err(_) => {
                self.0.recorder.count(Counter::ConnectTimeouts);
                Err(ConnectError::remote(Failure::ConnectTimeout, format!("{address} says nothing")))
            }
        }
    }

    fn tls_failed(&self, address: SocketAddr, error: &io::Error) -> ConnectError {
        let failure = if tls::is_identity_failure(error) {
            self.0.recorder.count(Counter::IdentityMismatches);
            Failure::Identity
        } else {
            self.0.recorder.count(Counter::ConnectErrors);
            Failure::Unreachable
        };
        ConnectError::remote(failure, format!("{address}: {error}"))
    }

    fn h1_peer(&self, peer: &Peer) -> Rc<H1Peer> {
        let mut peers = self.0.h1.borrow_mut();
        match peers.get(peer) {
            Some(entry) => entry.clone(),
            None => peers.entry(peer.clone()).or_default().clone(),
        }
    }

    async fn open_h1(&self, peer: &Peer, timeout: Duration) -> Result<H1, ConnectError> {
        let tcp = self.connect(peer.address(), matches!(peer, Peer::App { .. }), timeout).await?;
        let due = Due::default();
        let limits = Limits { bytes: READ_BUFFER, fields: self.0.config.limits.headers };
        let io = TokioIo::new(Back::new(tcp, due.clone(), limits));
        let mut builder = http1::Builder::new();
        builder.max_headers(limits.fields).max_buf_size(limits.bytes);
        let handshake = builder.handshake(io).await;
        let (sender, connection) = handshake.map_err(|e| not_processed(&e))?;
        let open = self.0.recorder.raise(Gauge::PooledConnections);
        tokio::task::spawn_local(async move {
            let _open = open;
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "HTTP/1.1 connection to the app ended");
            }
        });
        Ok(H1 {
            sender,
            due,
            idle_since: now(),
            idle_limit: self.0.config.times.app_idle,
            used: false,
            _open: Rc::default(),
            _permit: None,
        })
    }

    /// Opens a TCP connection; `as_inbound` makes it come from the address that capture lets pass. An app that
    /// listens on one family only is reached on that one: which of a pod's addresses its callers use is not its choice.
    pub(crate) async fn connect(
        &self,
        address: SocketAddr,
        as_inbound: bool,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        let stream = match self.dial(address, as_inbound, timeout).await {
            Err(refused) if as_inbound && refused.failure == Failure::Refused => {
                let Some(other) = self.other_family(address) else { return Err(refused) };
                self.dial(other, as_inbound, timeout).await.map_err(|_| refused)?
            }
            dialled => dialled?,
        };
        self.0.recorder.count(Counter::Connects);
        Ok(stream)
    }

    /// This pod's address of the other family, if that is one of this pod's.
    fn other_family(&self, address: SocketAddr) -> Option<SocketAddr> {
        let own = &self.0.config.pod_ips;
        let other = own.iter().find(|ip| own.contains(&address.ip()) && ip.is_ipv4() != address.is_ipv4())?;
        Some(SocketAddr::new(*other, address.port()))
    }

    /// The same, to this address only and not yet counted as a success.
    async fn dial(
        &self,
        address: SocketAddr,
        as_inbound: bool,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        let connecting = async {
            let mut connecting = std::pin::pin!(socket(address, as_inbound)?.connect(address));
            if as_inbound && address.is_ipv6() {
                if let Ok(connected) = tokio::time::timeout(OWN_ANSWERS, &mut connecting).await {
                    return connected;
                }
                // The kernel drops a refusal by one of its own addresses to `::1`; one by `::1` arrives.
                let local = SocketAddr::new(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST), address.port());
                let refused = socket(local, as_inbound)?.connect(local).await.map(drop);
                refused.or_else(|e| {
                    if e.kind() == io::ErrorKind::ConnectionRefused { Err(e) } else { Ok(()) }
                })?;
            }
            connecting.await
        };
        let stream = match tokio::time::timeout(timeout, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.connect_failed(address, &error)),
            Err(_) => {
                self.0.recorder.count(Counter::ConnectTimeouts);
                return Err(ConnectError::remote(
                    Failure::ConnectTimeout,
                    format!("{address} did not accept within {timeout:?}"),
                ));
            }
        };
        keep_alive(&stream);
        Ok(stream)
    }

    fn connect_failed(&self, address: SocketAddr, error: &io::Error) -> ConnectError {
        let refused = [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionReset];
        let failure = if refused.contains(&error.kind()) {
            Failure::Refused
        } else if error.kind() == io::ErrorKind::TimedOut {
            Failure::ConnectTimeout
        } else {
            Failure::Unreachable
        };
        self.0.recorder.count(if failure == Failure::Refused {
            Counter::ConnectRefusals
        } else if failure == Failure::ConnectTimeout {
            Counter::ConnectTimeouts
        } else {
            Counter::ConnectErrors
        });
        let local = is_our_own_want(error);
        ConnectError { local, ..ConnectError::remote(failure, format!("{address}: {error}")) }
    }

    /// Opens an mTLS connection to exactly this pod under exactly this identity. Every failure up to here
    /// means that nothing was sent.
    pub(crate) async fn connect_mesh(
        &self,
        address: SocketAddr,
        uid: &PodUid,
        identity: &SpiffeId,
        alpn: Alpn,
        timeout: Duration,
    ) -> Result<Meshed, ConnectError> {
        let own = |detail: String| ConnectError {
            failure: Failure::Unreachable,
            detail: detail.into(),
            local: true,
            capped: false,
        };
        let material = self.0.material.borrow().clone();
        let material = material.ok_or_else(|| own("this workload has no certificate yet".to_owned()))?;
        if !material.validity.contains(material.clock().now(), Duration::ZERO) {
            return Err(own("this workload's certificate has expired".to_owned()));
        }
        let config = self
            .client_config(&material, identity, alpn)
            .map_err(|e| own(format!("TLS configuration: {e}")))?;
        let name = ServerName::try_from(uid.server_name())
            .map_err(|e| ConnectError::remote(Failure::Identity, format!("pod uid {uid}: {e}")))?;
        let tcp = self.dial(address, false, timeout).await?;
        let connecting = TlsConnector::from(config).connect(name, tcp);
        let tls = match tokio::time::timeout(timeout.max(TLS_TIMEOUT), connecting).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return Err(self.tls_failed(address, &error)),
            Err(_) => {
                self.0.recorder.count(Counter::ConnectTimeouts);
                return Err(ConnectError::remote(
                    Failure::ConnectTimeout,
                    format!("{address} did not finish its TLS handshake"),
                ));
            }
        };
        if tls.get_ref().1.alpn_protocol() != Some(alpn.name()) {
            self.0.recorder.count(Counter::IdentityMismatches);
            return Err(ConnectError::remote(Failure::Identity, format!("{address} does not speak Weft")));
        }
        let shown = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let belief = Belief::new(shown, Role::Server, Some(&material), rand::rng().random())
            .map_err(|e| ConnectError::remote(Failure::Identity, format!("{address}: {e}")))?;
        self.0.recorder.count(Counter::Connects);
        Ok(Meshed { tls, generation: material.generation, belief })
    }

    fn client_config(
        &self,
        material: &Arc<Material>,
        identity: &SpiffeId,
        alpn: Alpn,
    ) -> Result<Arc<rustls::ClientConfig>, tls::TlsError> {
        let mut configs = self.0.configs.borrow_mut();
        if let Some((generation, config)) = configs.get(&(identity.clone(), alpn))
            && *generation == material.generation
        {
            return Ok(config.clone());
        }
        let config = tls::client_config(material, identity, alpn)?;
        configs.retain(|_, (generation, _)| *generation == material.generation);
        configs.insert((identity.clone(), alpn), (material.generation, config.clone()));
        Ok(config)
    }

    /// Closes what has been idle for too long; called about once a second.
    pub(crate) fn sweep(&self, now: Instant) {
        let idle_for = |since: Instant| now.saturating_duration_since(since);
        self.0.h1.borrow_mut().retain(|_, peer| {
            peer.idle.borrow_mut().retain(|c| !c.sender.is_closed() && idle_for(c.idle_since) < c.idle_limit);
            !peer.idle.borrow().is_empty() || Rc::strong_count(peer) > 1
        });
        let newest = self.0.material.borrow().as_ref().map_or(0, |material| material.generation);
        self.0.h2.borrow_mut().retain(|key, peer| {
            let current =
                |c: &H2| !c.retired.get() && (c.generation == newest || !matches!(key, Peer::Mesh { .. }));
            peer.open.borrow_mut().retain(|c| {
                let wanted = current(c) && idle_for(c.last_used.get()) < self.0.config.times.pool_idle;
                !c.sender.borrow().is_closed() && (c.in_flight.get() > 0 || wanted)
            });
            !peer.open.borrow().is_empty() || Rc::strong_count(peer) > 1
        });
    }
}

impl H2Peer {
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

impl H1Peer {
    fn take_idle(&self, options: SendOptions<'_>) -> Option<H1> {
        if options.fresh {
            return None;
        }
        let now = now();
        let mut idle = self.idle.borrow_mut();
        while let Some(connection) = idle.pop() {
            let age = now.saturating_duration_since(connection.idle_since);
            if age >= connection.idle_limit || connection.sender.is_closed() {
                continue;
            }
            if age >= IDLE_LIMIT_UNSAFE && !options.idempotent {
                // What is too old for this request may do for another; those below are older still.
                idle.push(connection);
                return None;
            }
            return Some(connection);
        }
        None
    }
}

impl From<ConnectError> for SendError {
    fn from(error: ConnectError) -> Self {
        let ConnectError { failure, detail, local, capped } = error;
        Self { failure, detail, reused: false, local, capped }
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

fn not_processed(error: &hyper::Error) -> ConnectError {
    ConnectError { failure: Failure::NotProcessed, detail: describe(error), local: false, capped: false }
}

/// What an error after sending says about the request: not processed, or perhaps processed.
fn failure_of(error: &hyper::Error) -> Failure {
    if error.is_parse() {
        return Failure::Malformed;
    }
    let mut source: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            let refused = h2.is_reset() && h2.reason() == Some(h2::Reason::REFUSED_STREAM);
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
