//! What sidecars connect to: discovery and telemetry over mTLS, certificates over server-authenticated TLS.
//!
//! Why our own accept loop: a fleet that comes back at once must wait *before* the handshake, a handshake
//! that stalls must end, one connection must not live for ever on one replica, and the send buffer of a
//! stream must be small enough that ten thousand stalled readers fit in memory. `tonic`'s own server
//! offers none of the four.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rand::Rng as _;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;
use tower::ServiceExt as _;

use crate::metrics::Metrics;

pub mod discovery;
pub mod identity;
pub mod listen;
pub mod published;
pub mod publisher;
pub mod replicas;
pub mod subscribers;
pub mod telemetry;
pub mod tls;

#[cfg(test)]
mod wire_tests;

/// Tells the streams of one connection that it is about to end.
#[derive(Clone, Debug)]
pub struct Closing(pub watch::Receiver<bool>);

/// The address that a request came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CameFrom(pub(crate) IpAddr);

/// One listening port.
pub struct Server {
    /// Listening already, so that a port in use is an error at start.
    pub listener: TcpListener,
    /// Replaced when certificates change.
    pub tls: Arc<ArcSwap<ServerConfig>>,
    /// What it serves.
    pub routes: Routes,
    /// Whether clients show a certificate.
    pub client_auth: bool,
    /// How long a connection may live, ± 20 %.
    pub max_age: Duration,
    /// Own metrics.
    pub metrics: Arc<Metrics>,
}

impl Server {
    /// Serves until `closing` says so, then until its connections have ended or a few seconds have passed.
    pub async fn run(self, mut closing: watch::Receiver<bool>) {
        let server = Arc::new(self);
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let mut bucket = Bucket::new(ACCEPT_RATE, ACCEPT_RATE);
        let (all_of_one, new_of_one) = (Shares::new(MAX_OF_ONE), Shares::new(MAX_HANDSHAKES_OF_ONE));
        loop {
            // Whoever has to wait waits in the kernel's queue, where it costs nothing.
            if let Some(wait) = bucket.take(Instant::now()) {
                sleep(wait).await;
                continue;
            }
            let Ok(slot) = connections.clone().acquire_owned().await else { break };
            let Ok(handshake) = handshakes.clone().acquire_owned().await else { break };
            let accepted = tokio::select! {
                biased;
                () = closed(&mut closing) => break,
                accepted = server.listener.accept() => accepted,
            };
            let (stream, from) = match accepted {
                Ok((stream, peer)) => (stream, peer.ip()),
                Err(error) => {
                    // EMFILE and the like pass; a loop without a pause would not let them.
                    tracing::warn!(%error, "accept failed");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (Some(share), Some(new)) = (Share::take(&all_of_one, from), Share::take(&new_of_one, from))
            else {
                server.metrics.handshakes_failed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(peer = %from, "too many connections of one address");
                continue;
            };
            let (server, closing) = (server.clone(), closing.clone());
            tokio::spawn(async move {
                let _slot = (slot, share);
                let handshake = (handshake, new);
                server.metrics.connections.fetch_add(1, Ordering::Relaxed);
                match timeout(HANDSHAKE_TIMEOUT, server.handshake(stream)).await {
                    Ok(Ok((stream, peer))) => {
                        drop(handshake);
                        server.serve(stream, from, peer, closing).await;
                    }
                    Ok(Err(error)) => {
                        server.metrics.handshakes_failed.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!(%error, "handshake failed");
                    }
                    Err(_) => {
                        server.metrics.handshakes_failed.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!("handshake timed out");
                    }
                }
                server.metrics.connections.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
        let _ = timeout(DRAIN, connections.acquire_many(all)).await;
    }

    async fn handshake(
        &self,
        stream: TcpStream,
    ) -> io::Result<(tokio_rustls::server::TlsStream<TcpStream>, Option<tls::Peer>)> {
        stream.set_nodelay(true)?;
        let stream = TlsAcceptor::from(self.tls.load_full()).accept(stream).await?;
        if !self.client_auth {
            return Ok((stream, None));
        }
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let peer = tls::peer(certificates).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok((stream, Some(peer)))
    }

    async fn serve(
        &self,
        stream: tokio_rustls::server::TlsStream<TcpStream>,
        from: IpAddr,
        peer: Option<tls::Peer>,
        closing: watch::Receiver<bool>,
    ) {
        // A connection must not outlive the certificate that it came with.
        let mut age = self.max_age.mul_f64(rand::rng().random_range(0.8..1.2));
        if let Some(left) =
            peer.as_ref().and_then(|p| p.certificate.not_after.duration_since(SystemTime::now()).ok())
        {
            age = age.min(left);
        }
        serve_connection(stream, Some(CameFrom(from)), peer, self.routes.clone(), age, closing).await;
    }
}

/// Serves one connection whose other end is known, for `age` at most.
pub async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Option<tls::Peer>,
    routes: Routes,
    age: Duration,
    closing: watch::Receiver<bool>,
) {
    serve_connection(stream, None, peer, routes, age, closing).await;
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    from: Option<CameFrom>,
    peer: Option<tls::Peer>,
    routes: Routes,
    age: Duration,
    mut closing: watch::Receiver<bool>,
) {
    let (close, close_seen) = watch::channel(false);
    let service = routes.map_request(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Closing(close_seen.clone()));
        if let Some(from) = from {
            request.extensions_mut().insert(from);
        }
        if let Some(peer) = &peer {
            request.extensions_mut().insert(peer.clone());
        }
        request
    });
    let service = TowerToHyperService::new(service.map_err(|error: Infallible| match error {}));
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(16 * 1024)
        .keep_alive_interval(Some(PING_EVERY))
        .keep_alive_timeout(PING_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended");
            }
            return;
        }
        () = sleep(age) => {}
        () = closed(&mut closing) => {}
    }
    // GOAWAY first, then the streams end by themselves: the client comes back, to any replica.
    connection.as_mut().graceful_shutdown();
    close.send_replace(true);
    let _ = timeout(DRAIN, connection).await;
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Waits until a flag is set, or nobody is left to set it.
pub(crate) async fn closed(closing: &mut watch::Receiver<bool>) {
    while !*closing.borrow_and_update() {
        if closing.changed().await.is_err() {
            return;
        }
    }
}

/// Places by address. Why: silent connections of one address would keep everybody else waiting.
#[derive(Debug)]
pub(crate) struct Shares {
    of_one: usize,
    /// Whether our own host may have all: a laptop's whole mesh is there.
    own_has_all: bool,
    held: Mutex<HashMap<IpAddr, usize>>,
}

impl Shares {
    /// `of_one` for each address but our own.
    pub(crate) fn new(of_one: usize) -> Arc<Self> {
        Arc::new(Self { of_one, own_has_all: true, held: Mutex::default() })
    }

    /// `of_one` for each address.
    pub(crate) fn for_all(of_one: usize) -> Arc<Self> {
        Arc::new(Self { of_one, own_has_all: false, held: Mutex::default() })
    }
}

/// One place.
#[derive(Debug)]
pub(crate) struct Share(Arc<Shares>, IpAddr);

impl Share {
    /// `None`: that address has as many as it may.
    pub(crate) fn take(shares: &Arc<Shares>, peer: IpAddr) -> Option<Self> {
        let peer = peer.to_canonical();
        let mut held = shares.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.get(&peer).copied().unwrap_or_default();
        (count < shares.of_one || (shares.own_has_all && peer.is_loopback())).then(|| {
            held.insert(peer, count + 1);
            Self(shares.clone(), peer)
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.1);
            }
        }
    }
}

/// A token bucket that says how long to wait.
#[derive(Debug)]
pub struct Bucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    at: Option<Instant>,
}

impl Bucket {
    /// `rate` a second, and `burst` at once.
    pub fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, tokens: burst, at: None }
    }

    /// Takes one token; `Some`: there is none before so long.
    pub fn take(&mut self, now: Instant) -> Option<Duration> {
        if let Some(at) = self.at {
            let earned = now.saturating_duration_since(at).as_secs_f64() * self.rate;
            self.tokens = (self.tokens + earned).min(self.burst);
        }
        self.at = Some(now);
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return None;
        }
        Some(Duration::from_secs_f64((1.0 - self.tokens) / self.rate))
    }

    /// Whether it would be full by now: whoever has a full bucket need not be remembered.
    pub fn is_full(&self, now: Instant) -> bool {
        let earned =
            self.at.map_or(self.burst, |at| now.saturating_duration_since(at).as_secs_f64() * self.rate);
        self.tokens + earned >= self.burst
    }
}

/// Wakes one stream's task; `urgent` asks it not to wait out its pause.
#[derive(Debug, Default)]
pub struct Wake {
    notify: tokio::sync::Notify,
    urgent: AtomicBool,
    replaced: AtomicBool,
}

impl Wake {
    /// There is something to look at.
    pub fn wake(&self, urgent: bool) {
        if urgent {
            self.urgent.store(true, Ordering::Release);
        }
        self.notify.notify_one();
    }

    /// Newer streams have taken its place: it must end.
    pub fn replace(&self) {
        self.replaced.store(true, Ordering::Release);
        self.wake(true);
    }

    /// Whether it must end.
    pub fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::Acquire)
    }

    /// Waits for it; true if it is urgent.
    pub async fn woken(&self) -> bool {
        self.notify.notified().await;
        self.urgent.swap(false, Ordering::AcqRel)
    }
}

/// Connections of one port; 53 KiB each.
const MAX_CONNECTIONS: usize = 20_000;
/// Handshakes under way: each may cost a millisecond of CPU, once; whoever stays silent costs 20 KiB for ten seconds.
const MAX_HANDSHAKES: usize = 1_024;
/// … of which one address may have so many: dozens of silent pods leave the others their places.
const MAX_HANDSHAKES_OF_ONE: usize = 32;
/// Connections of one address.
const MAX_OF_ONE: usize = 1_024;
/// Connections a second, before the handshake.
const ACCEPT_RATE: f64 = 2_000.0;
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// h2's default of 400 KiB would let ten thousand stalled readers pin 4 GB.
const SEND_BUFFER: usize = 64 * 1024;
/// A sidecar has two streams.
const MAX_STREAMS: u32 = 16;
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long connections may take to end.
const DRAIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_take_everybodys_place() {
        let shares = Shares::new(2);
        let (hostile, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held: Vec<_> = (0..5).filter_map(|_| Share::take(&shares, hostile)).collect();
        assert_eq!(held.len(), 2);
        let one = Share::take(&shares, other);
        assert!(one.is_some());
        let loopback = |shares: &Arc<Shares>| -> Vec<_> {
            (0..5).filter_map(|_| Share::take(shares, IpAddr::from([127, 0, 0, 1]))).collect()
        };
        let own = loopback(&shares);
        assert_eq!((own.len(), loopback(&Shares::for_all(2)).len()), (5, 2));
        drop((held, one, own));
        assert!(shares.held.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_spreads_what_is_above_its_rate() {
        let mut bucket = Bucket::new(10.0, 2.0);
        let start = Instant::now();
        assert_eq!(bucket.take(start), None);
        assert_eq!(bucket.take(start), None);
        assert_eq!(bucket.take(start), Some(Duration::from_millis(100)));
        assert!(!bucket.is_full(start + Duration::from_millis(100)));
        assert_eq!(bucket.take(start + Duration::from_millis(100)), None);
        assert!(bucket.is_full(start + Duration::from_secs(1)));
    }
}
