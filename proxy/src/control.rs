//! The one stream to the control plane: dial, subscribe, answer, and come back.
//!
//! Why everything here is about losing it: the stream ends for good reasons (age, rolling restart) and bad
//! ones (a hung replica, a partition), and a fleet must neither notice nor return all at once. What was
//! learnt stays in force without limit; reconnects are spread over `rand(0, min(30 s, 1 s × 2ⁿ))`, and the
//! series starts over only after a stream that lived 30 s. A peer that no longer answers PINGs is left
//! after 15 s.
//!
//! A new certificate does not end the stream: the next connection shows it.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rand::seq::SliceRandom as _;
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info, warn};
use weft_core::backoff::full_jitter;
use weft_proto::{
    ads::MAX_MESSAGE_LEN,
    pb::ads::{
        DeltaDiscoveryResponse, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};

use crate::{
    config::{Config, HostPort, Times},
    discovery::{Ask, Discovery, store::Store},
    identity::{self, Bundles},
    telemetry::{
        metrics::{Counter, Gauge, Registry, Shared, Take},
        report::{self, Reports},
    },
    tls::{Material, TlsError, Trust, controller_config},
};

/// What the control half offers to the rest of the sidecar.
#[derive(Clone)]
pub struct Control {
    /// This workload's certificate; `None` while there is none.
    pub material: watch::Receiver<Option<Arc<Material>>>,
    /// Where connections go.
    pub discovery: Discovery,
    /// Everything that was recorded.
    pub registry: Registry,
    /// What is live and what was refused.
    pub reports: Reports,
    /// Whether the control stream is up.
    pub connected: watch::Receiver<bool>,
}

impl Control {
    /// Sends what has been recorded, and waits until the controller has taken it.
    pub async fn flush(&self) {
        self.reports.flush().await;
    }

    /// What this sidecar still lacks to serve; empty: ready.
    pub fn lacks(&self) -> Vec<&'static str> {
        let mut lacks = Vec::new();
        if self.material.borrow().is_none() {
            lacks.push("certificate");
        }
        if self.discovery.inbound().borrow().is_none() {
            lacks.push("configuration");
        }
        lacks
    }
}

/// Starts the control half on the current runtime: certificate, control stream and telemetry. `workers`
/// are the senders of [`crate::telemetry::metrics::channel`], one a worker.
pub fn start(config: &Arc<Config>, shared: &Arc<Shared>, workers: Vec<mpsc::Sender<Take>>) -> Control {
    let registry = Registry::new(workers, Arc::clone(shared), config.limits.series);
    let reports = Reports::new();
    let (bundles, trust) = watch::channel(Bundles::default());
    let material = identity::spawn(Arc::clone(config), trust, Arc::clone(shared));
    let (store, discovery, asked) = Store::new(config, Arc::clone(shared), reports.clone(), bundles);
    let (publish, connection) = watch::channel(None);
    let (up, connected) = watch::channel(false);
    let stream = Stream {
        config: Arc::clone(config),
        shared: Arc::clone(shared),
        material: material.clone(),
        store,
        asked,
        publish,
        up,
    };
    tokio::spawn(stream.run());
    tokio::spawn(report::run(Arc::clone(config), reports.clone(), registry.clone(), connection));
    Control { material, discovery, registry, reports, connected }
}

/// Why there is no connection to the controller.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No address.
    #[error("{0} does not resolve: {1}")]
    Resolve(HostPort, io::Error),
    /// No address answered; the last error.
    #[error("{0}: {1}")]
    Connect(HostPort, io::Error),
    /// It took too long.
    #[error("{0} did not answer in {1:?}")]
    Timeout(HostPort, Duration),
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// HTTP/2 could not be started.
    #[error("HTTP/2: {0}")]
    Http2(String),
}

/// Connects to one of a name's addresses, taken at random so that replicas share the load.
pub(crate) async fn dial(
    to: &HostPort,
    tls: Arc<rustls::ClientConfig>,
    limit: Duration,
) -> Result<TlsStream<TcpStream>, DialError> {
    let deadline = Instant::now() + limit;
    let timeout = || DialError::Timeout(to.clone(), limit);
    let resolve = tokio::net::lookup_host((to.host.as_str(), to.port));
    let found = timeout_at(deadline, resolve).await.map_err(|_| timeout())?;
    let mut addresses: Vec<_> =
        found.map_err(|e| DialError::Resolve(to.clone(), e))?.take(MAX_ADDRESSES).collect();
    addresses.shuffle(&mut rand::rng());
    let mut last = DialError::Resolve(to.clone(), io::Error::from(io::ErrorKind::NotFound));
    let share = limit / u32::try_from(addresses.len().clamp(1, MAX_TRIES)).unwrap_or(1);
    for address in addresses.into_iter().take(MAX_TRIES) {
        let attempt = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROLLER_NAME).map_err(io::Error::other)?;
            TlsConnector::from(Arc::clone(&tls)).connect(name, stream).await
        };
        match timeout_at(deadline.min(Instant::now() + share), attempt).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = DialError::Connect(to.clone(), error),
            Err(_) => last = timeout(),
        }
    }
    Err(last)
}

/// A gRPC channel over exactly this connection: when it ends, so does the channel, and whoever dials next
/// shows the newest certificate.
pub(crate) async fn one_shot(stream: TlsStream<TcpStream>, times: &Times) -> Result<Channel, DialError> {
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        std::future::ready(stream)
    });
    // Plain `http`: to tonic this is a connection like any other; TLS is ours.
    Endpoint::from_static("http://weft-controller.weft.internal")
        .http2_keep_alive_interval(times.ping)
        .keep_alive_timeout(times.ping_timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW * 2)
        .connect_with_connector(connector)
        .await
        .map_err(|e| DialError::Http2(e.to_string()))
}

struct Stream {
    config: Arc<Config>,
    shared: Arc<Shared>,
    material: watch::Receiver<Option<Arc<Material>>>,
    store: Store,
    asked: mpsc::UnboundedReceiver<Ask>,
    publish: watch::Sender<Option<Channel>>,
    up: watch::Sender<bool>,
}

impl Stream {
    async fn run(mut self) {
        let mut failures = 0;
        let mut wait = Duration::ZERO;
        let mut tick = tokio::time::interval(self.store.tick_every());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let connect = connect(Arc::clone(&self.config), self.material.clone(), wait);
            tokio::pin!(connect);
            let connected = loop {
                tokio::select! {
                    connected = &mut connect => break connected,
                    ask = self.asked.recv() => match ask {
                        Some(ask) => self.store.ask(ask),
                        None => return, // nobody can ask any more: the sidecar is gone
                    },
                    _ = tick.tick() => self.store.tick(),
                }
            };
            let started = Instant::now();
            let pushback = match connected {
                Ok(channel) => {
                    self.shared.count(Counter::Reconnects);
                    self.publish.send_replace(Some(channel.clone()));
                    let ended = self.serve(channel, &mut tick).await;
                    self.publish.send_replace(None);
                    self.up.send_replace(false);
                    self.store.disconnected();
                    self.shared.set(Gauge::Connected, 0);
                    let Some(ended) = ended else { return };
                    info!(reason = %ended, lived_s = started.elapsed().as_secs(), "control stream ended");
                    pushback(&ended)
                }
                Err(error) => {
                    warn!(%error, "no connection to the controller");
                    None
                }
            };
            let times = &self.config.times;
            if started.elapsed() >= times.reconnect_healthy {
                failures = 0;
            }
            wait = full_jitter(times.reconnect_base, times.reconnect_cap, failures, &mut rand::rng());
            wait = wait.max(pushback.unwrap_or_default());
            failures = failures.saturating_add(1);
            debug!(wait_ms = wait.as_millis() as u64, "reconnecting");
        }
    }

    /// One stream's life. `None` if the sidecar is gone.
    async fn serve(&mut self, channel: Channel, tick: &mut tokio::time::Interval) -> Option<Status> {
        let (send, receive) = mpsc::channel(4);
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_LEN);
        let call = client.delta_aggregated_resources(ReceiverStream::new(receive));
        tokio::pin!(call);
        let mut answers: Option<Streaming<DeltaDiscoveryResponse>> = None;
        let head_by = Instant::now() + self.config.times.controller;
        let mut out = VecDeque::new();
        self.store.connected();
        loop {
            while let Some(request) = self.store.next_request() {
                out.push_back(request);
            }
            tokio::select! {
                permit = send.reserve(), if !out.is_empty() => match (permit, out.pop_front()) {
                    (Ok(permit), Some(request)) => permit.send(request),
                    _ => return Some(Status::unavailable("the stream takes no more requests")),
                },
                head = &mut call, if answers.is_none() => match head {
                    Ok(head) => {
                        answers = Some(head.into_inner());
                        self.shared.set(Gauge::Connected, 1);
                        self.up.send_replace(true);
                        info!("control stream up");
                    }
                    Err(status) => return Some(status),
                },
                () = tokio::time::sleep_until(head_by), if answers.is_none() => {
                    return Some(Status::deadline_exceeded("the controller did not open the stream in time"));
                }
                message = next(&mut answers), if answers.is_some() => match message {
                    Ok(Some(message)) => self.store.receive(message),
                    Ok(None) => return Some(Status::ok("closed by the controller")),
                    Err(status) => return Some(status),
                },
                ask = self.asked.recv() => self.store.ask(ask?),
                _ = tick.tick() => self.store.tick(),
            }
        }
    }
}

async fn next(
    answers: &mut Option<Streaming<DeltaDiscoveryResponse>>,
) -> Result<Option<DeltaDiscoveryResponse>, Status> {
    match answers {
        Some(answers) => answers.message().await,
        None => std::future::pending().await,
    }
}

/// Waits, then for a certificate, then for a connection. The controller must be who the configuration says,
/// by the roots that are trusted now or by the anchor file as it stands: roots may have rotated while this
/// sidecar was cut off.
async fn connect(
    config: Arc<Config>,
    mut material: watch::Receiver<Option<Arc<Material>>>,
    wait: Duration,
) -> Result<Channel, DialError> {
    tokio::time::sleep(wait).await;
    let material = match material.wait_for(Option::is_some).await.map(|material| material.clone()) {
        Ok(Some(material)) => material,
        Ok(None) | Err(_) => std::future::pending().await, // the keeper is gone, and the sidecar with it
    };
    let trust = match Trust::from_file(&config.trust_domain, &config.trust_anchors) {
        Ok(anchors) => material.trust().merged(&anchors),
        Err(error) => {
            debug!(%error, "anchor file not used");
            material.trust().clone()
        }
    };
    let tls = controller_config(&trust, &config.controller_identity, Some(&material))?;
    let stream = dial(&config.controller, tls, config.times.controller).await?;
    one_shot(stream, &config.times).await
}

/// A busy controller says when to come back (gRPC retry pushback), within reason.
fn pushback(status: &Status) -> Option<Duration> {
    let text = status.metadata().get("grpc-retry-pushback-ms")?.to_str().ok()?;
    let millis: u64 = text.parse().ok()?;
    Some(Duration::from_millis(millis).min(MAX_PUSHBACK))
}

/// The controller's DNS name: what its certificate says beside its identity.
const CONTROLLER_NAME: &str = "weft-controller.weft.internal";
/// Addresses of a name that are looked at.
const MAX_ADDRESSES: usize = 64;
/// And tried at one go.
const MAX_TRIES: usize = 3;
/// Flow-control window of one stream: the largest message must not need many round trips.
const WINDOW: u32 = 1024 * 1024;
/// The longest wait that a controller may ask for.
const MAX_PUSHBACK: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pushback_is_taken_within_reason() {
        let with = |value: &'static str| {
            let mut status = Status::unavailable("busy");
            status.metadata_mut().insert("grpc-retry-pushback-ms", value.parse().unwrap());
            pushback(&status)
        };
        assert_eq!(with("1500"), Some(Duration::from_millis(1500)));
        assert_eq!(with("99999999"), Some(MAX_PUSHBACK));
        assert_eq!(with("-1"), None);
        assert_eq!(pushback(&Status::unavailable("")), None);
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_and_a_port_that_is_closed_are_told_apart() {
        let trust = Trust::default();
        let config = Config::for_tests(&[]);
        let tls = controller_config(&trust, &config.controller_identity, None).unwrap();
        let limit = Duration::from_secs(5);
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let closed = HostPort { host: closed.ip().to_string(), port: closed.port() };
        assert!(matches!(dial(&closed, Arc::clone(&tls), limit).await, Err(DialError::Connect(..))));
        let nowhere = HostPort { host: "does-not-exist.invalid".into(), port: 1 };
        assert!(matches!(
            dial(&nowhere, tls, limit).await,
            Err(DialError::Resolve(..) | DialError::Timeout(..))
        ));
    }
}
