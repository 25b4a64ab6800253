//! The controller as one value: tests run it in their own process, `weft-controller` runs it as a program.
//!
//! Everything listens before anything is announced, so that a port in use is an error at start and not a
//! line in a log.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tonic::service::Routes;
use weft_proto::{
    ads::MAX_MESSAGE_LEN,
    pb::{
        ads::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
        v1::{identity_server::IdentityServer, telemetry_server::TelemetryServer},
    },
};

use crate::{
    api::server::{self, Api},
    ca::{Bundle, Ca, RootKeeper},
    config::{Cluster, Config, Source},
    index::Index,
    k8s::{self, live::Statuses, owner::Owner, roots::ClusterRoots, token::Reviewer},
    metrics::Metrics,
    serve::{
        Server,
        discovery::Discovery,
        identity::Certify,
        listen::listen,
        published::Published,
        publisher::Publisher,
        replicas::{Answers, Replicas},
        telemetry::Reports,
        tls::{self, Configs},
    },
    source::{Batch, Problem, dir},
    telemetry::Store,
    webhook::{Anchors, Webhook},
};

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    discovery: SocketAddr,
    identity: SocketAddr,
    api: SocketAddr,
    ca: Arc<Ca>,
    cluster_roots: Option<Arc<ClusterRoots>>,
    pub(crate) published: Arc<Published>,
    closing: watch::Sender<bool>,
    servers: usize,
    tasks: JoinSet<()>,
}

/// Runs a controller until `stop` ends, then until its connections have ended.
///
/// # Errors
/// What keeps it from starting, or a part of it that failed.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mut controller = Controller::start(config).await?;
    tokio::select! {
        () = stop => {}
        failed = controller.failed() => return Err(failed),
    }
    controller.stop().await;
    Ok(())
}

impl Controller {
    /// Starts everything.
    ///
    /// # Errors
    /// The state folder, a port, or a certificate.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let (ca, cluster) = open(&config).await.context("the certificate authority cannot be opened")?;
        let ca = Arc::new(ca);
        let (discovery_port, identity_port) = (listen(config.discovery)?, listen(config.identity)?);
        let api_port = listen(config.api)?;
        let probe_port = match config.probes {
            Some(address) => Some(listen(address)?),
            None => None,
        };
        let addresses = [&discovery_port, &identity_port, &api_port].map(TcpListener::local_addr);
        let [discovery, identity, api] = addresses;
        let (discovery, identity, api) = (discovery?, identity?, api?);

        let metrics = Arc::new(Metrics::default());
        let published = Arc::new(Published::new(config.trust_domain.clone()));
        let mut publisher = Publisher::new(published.clone(), Index::new(config.trust_domain.clone()));
        let bundle = ca.bundle();
        publisher.trust(&bundle.borrow());
        let state = publisher.state();
        let mut certify = Certify::new(ca.clone(), published.clone(), metrics.clone());
        if let Some(cluster) = &cluster {
            certify = certify.with_tokens(Reviewer::new(cluster.client.clone()));
        }
        let store = Arc::new(Mutex::new(Store::default()));
        let reports = Reports::new(store.clone(), published.clone(), metrics.clone());

        let first = bundle.borrow().clone();
        let configs = tls::configs(&ca, &first).context("the controller's own certificate")?;
        let discovery_tls = Arc::new(ArcSwap::new(configs.discovery.clone()));
        let identity_tls = Arc::new(ArcSwap::new(configs.identity.clone()));
        let client_tls = Arc::new(ArcSwap::new(configs.client.clone()));

        let (closing, closing_seen) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let server = Server {
            listener: identity_port,
            tls: identity_tls.clone(),
            routes: Routes::new(IdentityServer::new(certify.clone()).max_decoding_message_size(MAX_CERTIFY))
                .prepare(),
            client_auth: false,
            // One call a connection.
            max_age: Duration::from_secs(30),
            metrics: metrics.clone(),
        };
        tasks.spawn(server.run(closing_seen.clone()));
        let cluster_roots = cluster.as_ref().map(|cluster| cluster.roots.clone());
        let replicas = match &cluster {
            Some(cluster) => Some(Replicas::new(
                state.clone(),
                client_tls.clone(),
                cluster.settings.service(),
                cluster.settings.pod.clone(),
                &config.trust_domain,
            )?),
            None => None,
        };
        let api_server = Arc::new(Api {
            ca: ca.clone(),
            certify,
            published: published.clone(),
            state,
            store,
            reports: reports.clone(),
            metrics: metrics.clone(),
            source: config.source.to_string(),
            keeper: cluster_roots.clone().map(|roots| roots as Arc<dyn RootKeeper>),
            replicas,
        });
        let answering = api_server.clone();
        let routes = Routes::new(
            AggregatedDiscoveryServiceServer::new(Discovery::new(published.clone(), metrics.clone()))
                .max_decoding_message_size(MAX_MESSAGE_LEN)
                .max_encoding_message_size(MAX_MESSAGE_LEN),
        )
        .add_service(TelemetryServer::new(reports.clone()).max_decoding_message_size(MAX_MESSAGE_LEN))
        .add_service(Answers::new(&config.trust_domain, move |head| answering.part(head))?);
        let server = Server {
            listener: discovery_port,
            tls: discovery_tls.clone(),
            routes: routes.prepare(),
            client_auth: true,
            max_age: config.max_connection_age,
            metrics: metrics.clone(),
        };
        tasks.spawn(server.run(closing_seen.clone()));
        if let Some(port) = probe_port {
            tasks.spawn(server::serve(port, api_server.clone(), true, closing_seen.clone()));
        }
        let webhook_closing = closing_seen.clone();
        tasks.spawn(server::serve(api_port, api_server.clone(), false, closing_seen));

        let (batches, batches_seen) = mpsc::channel(1);
        let in_cluster = cluster.is_some();
        let last_good = match (&config.source, cluster) {
            (Source::Folder(folder), _) => {
                let kept = config.state_dir.join(LAST_GOOD_OBJECTS);
                tasks.spawn(dir::watch(folder.clone(), Some(kept), batches));
                LastGood::load(&config.state_dir)
            }
            (Source::Kubernetes(_), Some(InCluster { client, roots, owner, settings })) => {
                let (injected, injected_seen) = watch::channel(BTreeSet::new());
                let statuses = Statuses::default();
                let (leads, leads_seen) = watch::channel(false);
                let anchors =
                    Anchors { roots: roots.clone(), ca: ca.clone(), injected: injected_seen.clone() };
                let webhook = Webhook::new(
                    listen(settings.webhook)?,
                    settings.values.clone(),
                    Some(owner.clone()),
                    Some(anchors),
                );
                tasks.spawn(webhook.run(client.clone(), webhook_closing));
                tasks.spawn(k8s::watch::watch(client.clone(), statuses.clone(), injected, batches));
                let pod = settings.pod;
                let ask = move || api_server.clone().whole_status();
                tasks.spawn(k8s::lease::hold(client.clone(), pod.clone(), owner, leads));
                tasks.spawn(k8s::status::write(client, pod, statuses, leads_seen, ask));
                tasks.spawn(roots.clone().follow(ca.clone()));
                tasks.spawn(roots.publish(ca.clone(), injected_seen));
                LastGood::none()
            }
            (Source::Kubernetes(_), None) => anyhow::bail!("there is no client of the cluster"),
        };
        tasks.spawn(publish(publisher, batches_seen, ca.bundle(), metrics, published.clone(), last_good));
        tasks.spawn(keep_certified(ca.clone(), configs, discovery_tls, identity_tls, client_tls));
        tasks.spawn(async move {
            loop {
                sleep(TIDY_EVERY).await;
                reports.tidy();
            }
        });
        tracing::info!(%discovery, %identity, %api, trust_domain = %config.trust_domain,
            source = %config.source, "listening");
        let servers = SERVERS + usize::from(config.probes.is_some()) + usize::from(in_cluster);
        Ok(Self { discovery, identity, api, ca, cluster_roots, published, closing, servers, tasks })
    }

    /// Where policy and telemetry are served.
    pub fn discovery(&self) -> SocketAddr {
        self.discovery
    }

    /// Where certificates are served.
    pub fn identity(&self) -> SocketAddr {
        self.identity
    }

    /// Where the JSON API is served.
    pub fn api(&self) -> SocketAddr {
        self.api
    }

    /// Who keeps the roots, in a cluster.
    pub fn cluster_roots(&self) -> Option<&Arc<ClusterRoots>> {
        self.cluster_roots.as_ref()
    }

    /// The authority.
    pub fn ca(&self) -> &Arc<Ca> {
        &self.ca
    }

    /// Waits until the source has been read once.
    pub async fn synced(&self) {
        // Ends with the controller only.
        let _ = self.published.synced().wait_for(|synced| *synced).await;
    }

    /// Waits until a part ends that should not.
    pub async fn failed(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Err(error)) => anyhow::anyhow!("a part of the controller failed: {error}"),
            Some(Ok(())) | None => anyhow::anyhow!("a part of the controller ended"),
        }
    }

    /// Asks every sidecar to go elsewhere (GOAWAY), waits for a moment, and ends.
    pub async fn stop(mut self) {
        tracing::info!("draining");
        self.closing.send_replace(true);
        let deadline = Instant::now() + STOP;
        // The servers are the only ones that end by themselves.
        for _ in 0..self.servers {
            let _ = tokio::time::timeout_at(deadline, self.tasks.join_next()).await;
        }
        self.tasks.abort_all();
        tracing::info!("stopped");
    }
}

/// What a controller in a cluster has beside the rest.
struct InCluster {
    client: kube::Client,
    roots: Arc<ClusterRoots>,
    owner: Owner,
    settings: Box<Cluster>,
}

/// Opens the authority where it is kept.
async fn open(config: &Config) -> anyhow::Result<(Ca, Option<InCluster>)> {
    let (domain, lifetime) = (config.trust_domain.clone(), config.certificate_lifetime);
    match &config.source {
        Source::Folder(_) => Ok((Ca::open(&config.state_dir, domain, lifetime)?, None)),
        Source::Kubernetes(settings) => {
            let client = k8s::controllers_client(settings.server.as_ref()).await?;
            let Cluster { issuer_secret, cluster_role, .. } = &**settings;
            let owner = Owner::find(&client, cluster_role.as_deref()).await;
            let opened = ClusterRoots::open(client.clone(), issuer_secret, owner.clone(), domain, lifetime);
            let (roots, ca) = opened.await?;
            Ok((ca, Some(InCluster { client, roots, owner, settings: settings.clone() })))
        }
    }
}

/// The one task that writes.
async fn publish(
    mut publisher: Publisher,
    mut batches: mpsc::Receiver<Batch>,
    mut bundle: watch::Receiver<Bundle>,
    metrics: Arc<Metrics>,
    published: Arc<Published>,
    mut last_good: LastGood,
) {
    let mut held: Option<Instant> = None;
    let mut synced = false;
    let mut known: Vec<Problem> = Vec::new();
    loop {
        tokio::select! {
            batch = batches.recv() => {
                let Some(batch) = batch else { return };
                for problem in batch.problems.iter().filter(|problem| !known.contains(problem)) {
                    let object = problem.object.as_ref().map(ToString::to_string).unwrap_or_default();
                    tracing::warn!(at = %problem.origin, %object, field = %problem.path, reason = %problem.reason,
                        kept_last_good = problem.kept_last_good, "not usable");
                }
                known.clone_from(&batch.problems);
                metrics.batches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let listed = !batch.unlisted;
                publisher.apply(batch);
                if !synced && listed {
                    let wait = if last_good.lacks_most(publisher.counts()) { COLD_START_HOLD } else { Duration::ZERO };
                    if !wait.is_zero() && held.is_none() {
                        tracing::error!(was = ?last_good.0, now = ?publisher.counts(),
                            "most of what was there before the restart is gone: nothing is answered for 60 s unless it comes back");
                    }
                    held = Some(held.filter(|_| !wait.is_zero()).unwrap_or_else(|| Instant::now() + wait));
                }
            }
            changed = bundle.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = bundle.borrow_and_update().clone();
                publisher.trust(&now);
            }
            () = sleep_until(held.unwrap_or_else(Instant::now)), if held.is_some() => {
                held = None;
                synced = true;
                published.set_synced();
                tracing::info!(counts = ?publisher.counts(), "synced");
            }
        }
        if synced {
            last_good.save(publisher.counts());
        }
    }
}

/// How much there was when all was well. A controller that starts with an empty source and answers
/// "removed" to everybody is an outage.
#[derive(Debug)]
struct LastGood((usize, usize), Option<std::path::PathBuf>);

impl LastGood {
    fn load(state: &Path) -> Self {
        let path = state.join("last-good.json");
        let counts = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self(counts.unwrap_or_default(), Some(path))
    }

    /// Of a cluster: there a list is whole or an error.
    fn none() -> Self {
        Self((0, 0), None)
    }

    fn lacks_most(&self, now: (usize, usize)) -> bool {
        let lacks = |was: usize, is: usize| was > HOLD_ABOVE && is * 2 < was;
        lacks(self.0.0, now.0) || lacks(self.0.1, now.1)
    }

    fn save(&mut self, now: (usize, usize)) {
        let Some(path) = self.1.as_ref().filter(|_| now != self.0) else { return };
        self.0 = now;
        let text = serde_json::json!([now.0, now.1]).to_string();
        if let Err(error) = crate::disk::write(path, text.as_bytes(), 0o600) {
            tracing::warn!(%error, path = %path.display(), "the state folder cannot be written");
        }
    }
}

/// Keeps both servers' certificates fresh, and their trust in step with the roots.
async fn keep_certified(
    ca: Arc<Ca>,
    mut configs: Configs,
    discovery: Arc<ArcSwap<rustls::ServerConfig>>,
    identity: Arc<ArcSwap<rustls::ServerConfig>>,
    client: Arc<ArcSwap<rustls::ClientConfig>>,
) {
    let mut bundle = ca.bundle();
    loop {
        let wait = configs.renew_at.duration_since(SystemTime::now()).unwrap_or(RENEW_RETRY);
        tokio::select! {
            () = sleep(wait.max(RENEW_RETRY)) => {}
            changed = bundle.changed() => if changed.is_err() { return },
        }
        let now = bundle.borrow_and_update().clone();
        match tls::configs(&ca, &now) {
            Ok(new) => {
                discovery.store(new.discovery.clone());
                identity.store(new.identity.clone());
                client.store(new.client.clone());
                configs = new;
            }
            Err(error) => tracing::error!(%error, "the controller's own certificate could not be renewed"),
        }
    }
}

/// Beside the register of roots.
const LAST_GOOD_OBJECTS: &str = "last-good-objects.jsonl";
/// Beside that of the probes.
const SERVERS: usize = 3;
/// The webhook goes on for five seconds, then ends what it has.
const STOP: Duration = Duration::from_secs(8);
const TIDY_EVERY: Duration = Duration::from_secs(10);
const RENEW_RETRY: Duration = Duration::from_secs(1);
/// A signing request and a token.
const MAX_CERTIFY: usize = 64 * 1024;
const HOLD_ABOVE: usize = 20;
const COLD_START_HOLD: Duration = Duration::from_secs(60);
