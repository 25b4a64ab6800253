//! The one stream to the control plane: subscribe, answer, and come back.
//!
//! Why everything here is about losing it: the stream ends for good reasons (age, rolling restart) and bad
//! ones (a hung replica, a partition), and a fleet must neither notice nor return all at once. What was
//! learnt stays in force without limit; reconnects are spread over `rand(0, min(30 s, 1 s × 2ⁿ))`, and the
//! series starts over only after a stream that lived 30 s. A peer that no longer answers PINGs is left
//! after 15 s.
//!
//! A new certificate does not end the stream: the next connection shows it.

use std::{collections::VecDeque, io, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};
use tracing::{debug, info, warn};
use weft_core::backoff::full_jitter;
use weft_proto::{
    ads::MAX_MESSAGE_LEN,
    pb::ads::{
        DeltaDiscoveryResponse, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};

use crate::{
    config::Config,
    dial::{DialError, dial, one_shot},
    discovery::{Ask, Discovery, store::Store},
    identity::{self, Bundles},
    telemetry::{
        metrics::{Counter, Gauge, Shared},
        recorder::Take,
        registry::Registry,
        report::{self, Reports},
    },
    tls::{Material, Trust, controller_config},
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
/// are the senders of [`crate::telemetry::recorder::channel`], one a worker.
pub fn start(config: &Arc<Config>, shared: &Arc<Shared>, workers: Vec<mpsc::Sender<Take>>) -> Control {
    let registry = Registry::new(workers, Arc::clone(shared), config.limits.series);
    let reports = Reports::new();
    let (bundles, trust) = watch::channel(Bundles::default());
    let material = identity::spawn(Arc::clone(config), trust, Arc::clone(shared));
    let (store, discovery, asked) = Store::new(config, Arc::clone(shared), reports.clone(), bundles);
    let (publish, connection) = watch::channel(None);
    let (up, connected) = watch::channel(false);
    let dial: Dial = {
        let (config, material) = (Arc::clone(config), material.clone());
        Box::new(move || Box::pin(connect(Arc::clone(&config), material.clone())))
    };
    tokio::spawn(report::run(Arc::clone(config), reports.clone(), registry.clone(), connection));
    let (config, shared) = (Arc::clone(config), Arc::clone(shared));
    tokio::spawn(Stream { config, shared, dial, store, asked, publish, up }.run());
    Control { material, discovery, registry, reports, connected }
}

/// Follows policy alone, over connections that the caller makes: the same stream without certificates and
/// telemetry, for whoever brings a network of his own, such as a simulated one.
pub fn follow<F, S>(
    config: &Arc<Config>,
    shared: &Arc<Shared>,
    mut dial: impl FnMut() -> F + Send + 'static,
) -> (Discovery, watch::Receiver<bool>)
where
    F: Future<Output = io::Result<S>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (bundles, _) = watch::channel(Bundles::default());
    let (store, discovery, asked) = Store::new(config, Arc::clone(shared), Reports::new(), bundles);
    let (publish, _) = watch::channel(None);
    let (up, connected) = watch::channel(false);
    let (config, shared) = (Arc::clone(config), Arc::clone(shared));
    let dial: Dial = {
        let config = Arc::clone(&config);
        Box::new(move || {
            let (config, stream) = (Arc::clone(&config), dial());
            Box::pin(async move {
                let to = &config.controller;
                let stream = timeout(config.times.controller, stream).await;
                let stream = stream.map_err(|_| DialError::Timeout(to.clone(), config.times.controller))?;
                one_shot(stream.map_err(|e| DialError::Connect(to.clone(), e))?, &config.times).await
            })
        })
    };
    tokio::spawn(Stream { config, shared, dial, store, asked, publish, up }.run());
    (discovery, connected)
}

/// Makes one connection to the controller.
type Dial = Box<dyn FnMut() -> Dialled + Send>;
type Dialled = Pin<Box<dyn Future<Output = Result<Channel, DialError>> + Send>>;

/// The connection that is being made; none for ever while none is.
async fn made(connect: &mut Option<Dialled>) -> Result<Channel, DialError> {
    match connect {
        Some(connect) => connect.await,
        None => std::future::pending().await,
    }
}

struct Stream {
    config: Arc<Config>,
    shared: Arc<Shared>,
    dial: Dial,
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
            let due = Instant::now() + wait;
            let mut connect = None;
            let connected = loop {
                tokio::select! {
                    () = tokio::time::sleep_until(due), if connect.is_none() => connect = Some((self.dial)()),
                    connected = made(&mut connect) => break connected,
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

/// Waits for a certificate, then for a connection. The controller must be who the configuration says,
/// by the roots that are trusted now or by the anchor file as it stands: roots may have rotated while this
/// sidecar was cut off.
async fn connect(
    config: Arc<Config>,
    mut material: watch::Receiver<Option<Arc<Material>>>,
) -> Result<Channel, DialError> {
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
    let tls =
        controller_config(&trust, &config.controller_identity, Some(&material), Some(material.clock()))?;
    let stream = dial(&config.controller, tls, config.times.controller).await?;
    one_shot(stream, &config.times).await
}

/// A busy controller says when to come back (gRPC retry pushback), within reason.
fn pushback(status: &Status) -> Option<Duration> {
    let text = status.metadata().get("grpc-retry-pushback-ms")?.to_str().ok()?;
    let millis: u64 = text.parse().ok()?;
    Some(Duration::from_millis(millis).min(MAX_PUSHBACK))
}

/// The longest wait that a controller may ask for.
const MAX_PUSHBACK: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use hyper_util::{
        rt::{TokioExecutor, TokioIo},
        service::TowerToHyperService,
    };
    use tonic::service::Routes;
    use weft_core::identity::SpiffeId;
    use weft_proto::{
        ads::ResourceType,
        pb::{
            ads::{
                DeltaDiscoveryRequest, Resource,
                aggregated_discovery_service_server::{
                    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
                },
            },
            v1::{self as pb, CertifyResponse},
        },
    };

    use super::*;
    use crate::tls::{
        self,
        testing::{self, Authority},
    };

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

    /// A controller in this process: issues certificates, serves resources, takes reports.
    struct FakeController {
        authority: Authority,
        state: Arc<State>,
        discovery: u16,
        identity: u16,
        dir: std::path::PathBuf,
        tasks: Vec<tokio::task::JoinHandle<()>>,
    }

    struct State {
        /// The identity that each ADS stream came with.
        peers: Mutex<Vec<SpiffeId>>,
        issued: AtomicUsize,
        tokens: Mutex<Vec<String>>,
        resources: watch::Sender<Resources>,
        reports: Mutex<Vec<pb::ReportRequest>>,
        /// Grows to end every ADS stream.
        epoch: watch::Sender<u64>,
        sign: Sign,
    }

    /// By name: type, message, version.
    type Resources = BTreeMap<String, (&'static str, Vec<u8>, u64)>;
    type Sign = Box<dyn Fn(&[u8]) -> CertifyResponse + Send + Sync>;

    #[derive(Clone)]
    struct Service(Arc<State>, Option<SpiffeId>);

    type Answers<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

    #[tonic::async_trait]
    impl pb::identity_server::Identity for Service {
        async fn certify(
            &self,
            request: tonic::Request<pb::CertifyRequest>,
        ) -> Result<tonic::Response<CertifyResponse>, Status> {
            let request = request.into_inner();
            self.0.tokens.lock().unwrap().push(request.token);
            self.0.issued.fetch_add(1, Ordering::SeqCst);
            Ok(tonic::Response::new((self.0.sign)(&request.csr_der)))
        }
    }

    #[tonic::async_trait]
    impl AggregatedDiscoveryService for Service {
        type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

        async fn delta_aggregated_resources(
            &self,
            request: tonic::Request<Streaming<DeltaDiscoveryRequest>>,
        ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
            let state = Arc::clone(&self.0);
            state.peers.lock().unwrap().push(self.1.clone().unwrap());
            let (send, receive) = mpsc::channel(16);
            let mut requests = request.into_inner();
            tokio::spawn(async move {
                let (mut resources, mut epoch) = (state.resources.subscribe(), state.epoch.subscribe());
                let mut wanted = BTreeMap::new();
                let mut nonce = 0;
                loop {
                    let due: Vec<_> = resources
                        .borrow_and_update()
                        .iter()
                        .filter(|(name, (.., version))| wanted.get(*name).is_some_and(|sent| sent < version))
                        .map(|(name, (url, body, version))| (name.clone(), *url, body.clone(), *version))
                        .collect();
                    for (name, url, body, version) in due {
                        nonce += 1;
                        wanted.insert(name.clone(), version);
                        let any = weft_proto::Any { type_url: url.into(), value: body.into() };
                        let resource = Resource {
                            name,
                            version: version.to_string(),
                            resource: Some(any),
                            ..Default::default()
                        };
                        let response = DeltaDiscoveryResponse {
                            type_url: url.into(),
                            nonce: format!("{nonce}"),
                            resources: vec![resource],
                            ..Default::default()
                        };
                        if send.send(Ok(response)).await.is_err() {
                            return;
                        }
                    }
                    tokio::select! {
                        request = requests.message() => match request {
                            Ok(Some(request)) => for name in request.resource_names_subscribe {
                                wanted.insert(name, 0);
                            },
                            _ => return,
                        },
                        _ = resources.changed() => {}
                        _ = epoch.changed() => {
                            let _ = send.send(Err(Status::unavailable("too old"))).await;
                            return;
                        }
                    }
                }
            });
            Ok(tonic::Response::new(Box::pin(ReceiverStream::new(receive))))
        }
    }

    #[tonic::async_trait]
    impl pb::telemetry_server::Telemetry for Service {
        type ReportStream = Answers<pb::ReportResponse>;

        async fn report(
            &self,
            request: tonic::Request<Streaming<pb::ReportRequest>>,
        ) -> Result<tonic::Response<Self::ReportStream>, Status> {
            let state = Arc::clone(&self.0);
            let (send, receive) = mpsc::channel(16);
            let mut requests = request.into_inner();
            tokio::spawn(async move {
                while let Ok(Some(report)) = requests.message().await {
                    let sequence = report.sequence;
                    state.reports.lock().unwrap().push(report);
                    if send.send(Ok(pb::ReportResponse { sequence })).await.is_err() {
                        return;
                    }
                }
            });
            Ok(tonic::Response::new(Box::pin(ReceiverStream::new(receive))))
        }
    }

    impl FakeController {
        /// `account` is who it says that it is.
        async fn start(account: &str) -> Self {
            static NUMBER: AtomicUsize = AtomicUsize::new(0);
            let authority = Authority::new("cluster.local");
            let id = authority.id("weft", account);
            let dir = std::env::temp_dir().join(format!(
                "weft-control-{}-{}",
                std::process::id(),
                NUMBER.fetch_add(1, Ordering::SeqCst)
            ));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("roots.pem"), &authority.pem).unwrap();
            std::fs::write(dir.join("token"), "the-token\n").unwrap();

            let (signer, root) = (Arc::clone(&authority.issuer), authority.root.clone());
            let sign = move |csr: &[u8]| {
                let csr = rcgen::CertificateSigningRequestParams::from_der(&csr.to_vec().into()).unwrap();
                let params = testing::leaf("spiffe://cluster.local/ns/shop/sa/web");
                let leaf = params.signed_by(&csr.public_key, &signer).unwrap();
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
                let now = i64::try_from(now.as_secs()).unwrap();
                CertifyResponse {
                    chain_der: vec![leaf.der().to_vec().into()],
                    roots_der: vec![root.to_vec().into()],
                    not_after: now + 3_600,
                    now,
                }
            };
            let state = Arc::new(State {
                peers: Mutex::default(),
                issued: AtomicUsize::new(0),
                tokens: Mutex::default(),
                resources: watch::Sender::new(BTreeMap::new()),
                reports: Mutex::default(),
                epoch: watch::Sender::new(0),
                sign: Box::new(sign),
            });
            let own = authority.material_of(&id);
            let mut mutual = rustls::ServerConfig::clone(
                &tls::server_config(&own, std::slice::from_ref(&authority.domain)).unwrap(),
            );
            mutual.alpn_protocols = vec![b"h2".to_vec()];
            let mut plain = testing::server_without_clients(&own);
            plain.alpn_protocols = vec![b"h2".to_vec()];
            let (discovery, one) = serve(mutual, Arc::clone(&state), |service| {
                Routes::new(AggregatedDiscoveryServiceServer::new(service.clone()))
                    .add_service(pb::telemetry_server::TelemetryServer::new(service))
            })
            .await;
            let (identity, two) = serve(plain, Arc::clone(&state), |service| {
                Routes::new(pb::identity_server::IdentityServer::new(service))
            })
            .await;
            Self { authority, state, discovery, identity, dir, tasks: vec![one, two] }
        }

        fn config(&self) -> Arc<Config> {
            let path = |name: &str| self.dir.join(name).display().to_string();
            let (anchors, token) = (path("roots.pem"), path("token"));
            let (discovery, identity) =
                (format!("127.0.0.1:{}", self.discovery), format!("localhost:{}", self.identity));
            Arc::new(Config::for_tests(&[
                ("WEFT_TRUST_ANCHORS", &anchors),
                ("WEFT_TOKEN_FILE", &token),
                ("WEFT_CONTROLLER", &discovery),
                ("WEFT_CONTROLLER_IDENTITY", &identity),
                ("WEFT_RECONNECT_BASE", "10ms"),
                ("WEFT_RECONNECT_CAP", "50ms"),
                ("WEFT_RENEW_SPREAD", "10ms"),
                ("WEFT_REPORT_INTERVAL", "50ms"),
            ]))
        }

        fn put(&self, name: &str, ty: ResourceType, message: &impl prost::Message) {
            let body = message.encode_to_vec();
            self.state.resources.send_modify(|resources| {
                let version = resources.values().map(|(.., version)| *version).max().unwrap_or(0) + 1;
                resources.insert(name.to_owned(), (ty.type_url(), body, version));
            });
        }

        fn put_roots(&self, sequence: u64, roots: &[&Authority]) {
            let bundle = pb::TrustBundle {
                roots_der: roots.iter().map(|root| root.root.to_vec().into()).collect(),
                sequence,
                ..Default::default()
            };
            self.put("trust/cluster.local", ResourceType::TrustBundle, &bundle);
        }

        fn configure(&self) {
            let config = pb::WorkloadConfig {
                identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
                default_port: Some(pb::InboundPort {
                    mtls: pb::inbound_port::MtlsMode::Strict.into(),
                    authz: "authz/uid-web-1/0".into(),
                    ..Default::default()
                }),
                egress: pb::workload_config::Egress::Allow.into(),
                trust_domains: vec!["cluster.local".into()],
                ..Default::default()
            };
            self.put("self/uid-web-1", ResourceType::WorkloadConfig, &config);
            let policy =
                pb::Authorization { default: pb::authorization::Action::Allow.into(), ..Default::default() };
            self.put("authz/uid-web-1/0", ResourceType::Authorization, &policy);
        }

        fn applied(&self) -> Vec<String> {
            let reports = self.state.reports.lock().unwrap();
            reports.iter().flat_map(|report| &report.applied).map(|applied| applied.name.clone()).collect()
        }
    }

    impl Drop for FakeController {
        fn drop(&mut self) {
            self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    async fn serve(
        config: rustls::ServerConfig,
        state: Arc<State>,
        routes: impl Fn(Service) -> Routes + Send + 'static,
    ) -> (u16, tokio::task::JoinHandle<()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                let peer = stream.get_ref().1.peer_certificates();
                let peer = peer.map(|certs| tls::peer_identity(certs).unwrap());
                let service = TowerToHyperService::new(routes(Service(Arc::clone(&state), peer)).prepare());
                connections.spawn(async move {
                    let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = http2.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (port, task)
    }

    /// Looks again and again: real sockets have no virtual time.
    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        for _ in 0..500 {
            if holds() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not in 5 s: {what}");
    }

    #[tokio::test]
    async fn from_a_token_to_a_live_configuration() {
        let controller = FakeController::start("weft-controller").await;
        let shared = Arc::new(Shared::default());
        let control = start(&controller.config(), &shared, Vec::new());
        until("certificate", || control.material.borrow().is_some()).await;
        assert_eq!(control.lacks(), ["configuration"]);
        assert_eq!(*controller.state.tokens.lock().unwrap(), ["the-token"]);
        controller.configure();
        until("configuration", || control.lacks().is_empty()).await;
        assert_eq!(
            controller.state.peers.lock().unwrap()[0].as_str(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        until("applied", || {
            let applied = controller.applied();
            ["self/uid-web-1", "authz/uid-web-1/0"].iter().all(|name| applied.iter().any(|one| one == name))
        })
        .await;
        timeout(Duration::from_secs(5), control.flush()).await.unwrap();
        let reports = controller.state.reports.lock().unwrap();
        for (i, report) in reports.iter().enumerate() {
            assert_eq!(report.sequence, i as u64 + 1);
            assert_eq!(report.session, reports[0].session);
        }
        assert!(reports.last().unwrap().gauges.as_ref().unwrap().certificate_not_after > 0);
    }

    #[tokio::test]
    async fn a_lost_stream_comes_back_and_everything_is_told_again() {
        let controller = FakeController::start("weft-controller").await;
        controller.configure();
        let shared = Arc::new(Shared::default());
        let control = start(&controller.config(), &shared, Vec::new());
        until("configuration", || control.lacks().is_empty()).await;
        let policy = control.discovery.inbound().borrow().clone().unwrap();
        for n in 2..=4 {
            controller.state.epoch.send_modify(|epoch| *epoch += 1);
            until("another stream", || controller.state.peers.lock().unwrap().len() == n).await;
        }
        assert_eq!(shared.counter(Counter::Reconnects), 4);
        assert!(Arc::ptr_eq(&policy, &control.discovery.inbound().borrow().clone().unwrap()));
        until("told again", || {
            controller.applied().iter().filter(|name| *name == "self/uid-web-1").count() >= 2
        })
        .await;
        assert_eq!(controller.state.issued.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_change_of_roots_is_live_at_once_and_renews() {
        let controller = FakeController::start("weft-controller").await;
        controller.configure();
        let control = start(&controller.config(), &Arc::default(), Vec::new());
        until("configuration", || control.lacks().is_empty()).await;
        let next = Authority::new("cluster.local");
        let generation = || control.material.borrow().as_ref().map_or(0, |material| material.generation);
        let roots = || control.material.borrow().as_ref().map_or(0, |m| m.trust().roots("cluster.local"));
        let issued = || controller.state.issued.load(Ordering::SeqCst);
        // The first bundle says what the issuer said already.
        let before = generation();
        controller.put_roots(7, &[&controller.authority]);
        until("first bundle", || generation() > before).await;
        // Then a root is added.
        controller.put_roots(8, &[&controller.authority, &next]);
        until("both roots", || roots() == 2).await;
        until("renewal", || issued() == 2).await;
        // The same sequence again is no reason.
        let before = generation();
        controller.put_roots(8, &[&next, &controller.authority]);
        until("the same in other words", || generation() > before).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(issued(), 2);
    }

    #[tokio::test]
    async fn roots_that_were_replaced_while_it_was_cut_off_make_it_renew() {
        let controller = FakeController::start("weft-controller").await;
        let shared = Arc::new(Shared::default());
        let control = start(&controller.config(), &shared, Vec::new());
        until("certificate", || control.material.borrow().is_some()).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(controller.state.issued.load(Ordering::SeqCst), 1, "known: no reason to renew");
        // This controller still shows its old root, so renewal fails until the file knows it again.
        let file = controller.dir.join("roots.pem");
        std::fs::write(&file, &Authority::new("cluster.local").pem).unwrap();
        until("an early renewal", || shared.counter(Counter::RenewalFailures) >= 1).await;
        assert!(control.material.borrow().is_some(), "kept until its end");
        std::fs::write(&file, &controller.authority.pem).unwrap();
        until("renewal", || controller.state.issued.load(Ordering::SeqCst) == 2).await;
    }

    #[tokio::test]
    async fn a_new_root_is_believed_as_soon_as_the_stream_says_it() {
        let controller = FakeController::start("weft-controller").await;
        controller.configure();
        let shared = Arc::new(Shared::default());
        let control = start(&controller.config(), &shared, Vec::new());
        until("configuration", || control.lacks().is_empty()).await;
        let old = Authority::new("cluster.local");
        let roots = || control.material.borrow().as_ref().map_or(0, |m| m.trust().roots("cluster.local"));
        controller.put_roots(1, &[&old, &controller.authority]);
        until("both roots", || roots() == 2).await;
        // What is mounted is a minute behind: it knows only the root that the controller signs by no longer.
        std::fs::write(controller.dir.join("roots.pem"), &old.pem).unwrap();
        controller.put_roots(2, &[&old, &controller.authority]);
        until("renewal", || controller.state.issued.load(Ordering::SeqCst) >= 2).await;
        assert_eq!(shared.counter(Counter::RenewalFailures), 0);
    }

    #[tokio::test]
    async fn nobody_else_is_the_controller() {
        let impostor = FakeController::start("web").await;
        impostor.configure();
        let shared = Arc::new(Shared::default());
        let control = start(&impostor.config(), &shared, Vec::new());
        until("failures", || shared.counter(Counter::RenewalFailures) >= 3).await;
        assert!(control.material.borrow().is_none());
        assert!(impostor.state.tokens.lock().unwrap().is_empty(), "the token went to somebody else");
    }
}
