//! Sidecars and replicas of the controller in a network that fails, seed by seed.
//!
//! Real on both sides: the sidecar's stream and store, the controller's publisher, discovery and connections, with
//! gRPC over HTTP/2 between them. Only sockets, TLS and the clock are not: bytes pass through `net`, which delays
//! them, cuts ways in one direction or both, and crashes servers; time is virtual and jumps to what happens next.
//!
//! What must hold, whatever happens: a sidecar that was told where a service is never loses it, never goes back to an
//! older version, and, once the faults have stopped, has the newest one. Each version deletes the backends that it
//! does not route to, so that what takes a place must be there before what it replaces goes. One gap is left, and
//! counted: a way that is cut just between "there is no such backend" and the route that no longer names it.
//!
//! A seed decides what happens to the network and the mesh. The jitter of reconnects is the programs' own, so a seed
//! that failed once may need some runs to fail again.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tonic::service::Routes;
use weft_control_plane::{
    index::{Event, Index},
    metrics::Metrics,
    resources::ObjectKey,
    serve::{
        connection,
        discovery::Discovery,
        published::Published,
        publisher::Publisher,
        tls::{Peer, Presented},
    },
    source::{
        Batch,
        yaml::{self, Document},
    },
};
use weft_core::{
    identity::{PodUid, TrustDomain},
    policy::OutboundPolicy,
};
use weft_proto::pb::ads::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use weft_proxy::{
    config::Config,
    control,
    discovery::{Discovery as Sidecar, Target, Watched},
};

use crate::{
    net::{Net, Way},
    world::{pod, route},
};

/// Each run in a world of its own.
#[test]
fn after_faults_every_sidecar_has_the_newest_version_and_none_lost_the_last_good() {
    simulate(0..QUICK);
}

#[test]
#[ignore = "soak: 1,000 seeds take minutes; `make soak`"]
fn soak_after_faults_every_sidecar_has_the_newest_version_in_a_thousand_worlds() {
    simulate(0..1_000);
}

fn simulate(seeds: std::ops::Range<u64>) {
    // One world that failed, again: `WEFT_SIM_SEED=17`.
    let seeds = match std::env::var("WEFT_SIM_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => seeds,
    };
    let count = seeds.end - seeds.start;
    let mut failed = Vec::new();
    let mut seen = Seen::default();
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        match runtime.unwrap().block_on(World::run(seed)) {
            Ok(one) => {
                if let Some(gap) = &one.gap {
                    println!("seed {seed}: {gap}");
                }
                seen.add(&one);
            }
            Err(violation) => {
                println!("seed {seed}: {violation}");
                failed.push(seed);
            }
        }
    }
    println!(
        "figure: violations in {count} simulated meshes ({} versions, {} faults, {} connections): {} (bound 0)",
        seen.versions,
        seen.faults,
        seen.connections,
        failed.len()
    );
    let bound = count.div_ceil(50);
    println!(
        "figure: simulated meshes in which a service had no backend for a moment: {} of {count} (bound {bound})",
        seen.gaps
    );
    println!(
        "figure: longest time from the last fault to the newest version everywhere: {} s (bound {} s)",
        seen.settled.as_secs(),
        SETTLE.as_secs()
    );
    assert!(failed.is_empty(), "seeds {failed:?}");
    assert!(seen.gaps <= bound, "{} gaps", seen.gaps);
}

/// What one run, or all, came to.
#[derive(Debug, Default)]
struct Seen {
    versions: u64,
    faults: u64,
    connections: u64,
    settled: Duration,
    /// The first time that a service had no backend any more.
    gap: Option<String>,
    /// Worlds in which there was one.
    gaps: u64,
}

impl Seen {
    fn add(&mut self, one: &Self) {
        self.versions += one.versions;
        self.faults += one.faults;
        self.connections += one.connections;
        self.settled = self.settled.max(one.settled);
        self.gaps += u64::from(one.gap.is_some());
    }
}

/// One version of the mesh: what every caller must end up with.
#[derive(Clone, Debug)]
struct Version {
    number: u64,
    /// Of each service in [`VIPS`]: the backend that it is routed to, and the pods of it.
    backends: Vec<(String, BTreeSet<String>)>,
}

impl Version {
    fn new(number: u64, rng: &mut SmallRng) -> Self {
        let backend = |_: &&str| {
            let name = format!("x{}", rng.random_range(0..4));
            let pods = (0..4).filter(|_| rng.random_bool(0.5)).map(|i| format!("{name}-{i}")).collect();
            (name, pods)
        };
        let mut backends: Vec<(String, BTreeSet<String>)> = VIPS.iter().map(backend).collect();
        // Two services of one backend have the same pods, and there is always one.
        let mut all: std::collections::BTreeMap<String, BTreeSet<String>> = std::collections::BTreeMap::new();
        for (name, pods) in &backends {
            all.entry(name.clone()).or_default().extend(pods.iter().cloned());
        }
        for (name, pods) in &mut backends {
            pods.clone_from(&all[name]);
            if pods.is_empty() {
                pods.insert(format!("{name}-0"));
            }
        }
        Self { number, backends }
    }

    fn yaml(&self) -> String {
        let mut all = "---\napiVersion: weft.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                       spec: {meshRanges: [10.0.0.0/8]}\n"
            .to_owned();
        for client in 0..CLIENTS {
            all += &pod(&format!("web-{client}"), "web", [10, 2, 0, client as u8]);
        }
        let mut written = BTreeSet::new();
        for ((service, vip), (backend, pods)) in ["a", "b"].into_iter().zip(VIPS).zip(&self.backends) {
            let ip = vip.split(':').next().unwrap_or_default();
            let _ = write!(
                all,
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: shop}}\n\
                 spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n---\napiVersion: weft.dev/v1alpha1\n\
                 kind: TrafficPolicy\nmetadata: {{name: {service}, namespace: shop}}\nspec:\n  targetRefs: \
                 [{{kind: Service, name: {service}}}]\n  timeouts: {{request: {}ms}}\n",
                BASE_MS + self.number
            );
            all += &route(service, backend);
            if written.insert(backend) {
                let _ = write!(
                    all,
                    "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {backend}, namespace: shop}}\n\
                     spec: {{selector: {{app: {backend}}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
                );
                for name in pods {
                    let number = |at: usize| name.as_bytes()[at] - b'0';
                    all += &pod(name, backend, [10, 1, number(1), number(3)]);
                }
            }
        }
        all
    }

    /// What of a policy is not of this version.
    fn differs(&self, service: usize, policy: &OutboundPolicy) -> Option<String> {
        let (backend, pods) = &self.backends[service];
        let now: BTreeSet<String> = policy
            .backends
            .iter()
            .flat_map(|backend| backend.endpoints.iter().map(|endpoint| endpoint.uid.to_string()))
            .collect();
        let wanted: BTreeSet<String> = pods.iter().map(|pod| format!("{pod}-uid")).collect();
        let named = policy.backends.first().map(|backend| backend.service.name.name.to_string());
        let same = number_of(policy) == self.number && named.as_ref() == Some(backend) && now == wanted;
        (!same).then(|| format!("{}, {named:?} with {now:?} instead of {self:?}", number_of(policy)))
    }
}

fn number_of(policy: &OutboundPolicy) -> u64 {
    policy.service.timeouts.request.map_or(0, |request| request.as_millis() as u64).saturating_sub(BASE_MS)
}

/// One replica of the controller.
struct Replica {
    publisher: Publisher,
    keys: BTreeSet<ObjectKey>,
    closing: watch::Sender<bool>,
    /// Ends with it, as suddenly.
    _tasks: JoinSet<()>,
}

impl Replica {
    fn start(id: usize, net: &Net, version: &Version) -> Self {
        let domain = TrustDomain::new("cluster.local").unwrap();
        let published = Arc::new(Published::new(domain.clone()));
        let mut publisher = Publisher::new(published.clone(), Index::new(domain));
        let mut keys = BTreeSet::new();
        publisher.apply(batch(version, &mut keys));
        published.set_synced();
        let service = Discovery::new(published, Arc::new(Metrics::default()));
        let routes = Routes::new(AggregatedDiscoveryServiceServer::new(service)).prepare();
        let (closing, closing_seen) = watch::channel(false);
        let mut accepted = net.listen(id);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Some((client, stream)) = accepted.recv().await {
                let now = SystemTime::now();
                let peer = Peer {
                    identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
                    uid: PodUid::new(&format!("web-{client}-uid")).unwrap(),
                    certificate: Presented {
                        serial: "1".to_owned(),
                        not_before: now,
                        not_after: now + AGE,
                        authority: Vec::new(),
                    },
                };
                connections.spawn(connection(stream, Some(peer), routes.clone(), AGE, closing_seen.clone()));
            }
        });
        Self { publisher, keys, closing, _tasks: tasks }
    }
}

/// The version as a source would report it to a replica that had those objects.
fn batch(version: &Version, keys: &mut BTreeSet<ObjectKey>) -> Batch {
    let mut events = Vec::new();
    let mut now = BTreeSet::new();
    for document in yaml::read(&"mesh.yaml".into(), &version.yaml()) {
        let Document::Object { object, origin, .. } = document else { panic!("{document:?}") };
        now.insert(object.key());
        events.push(Event::Apply { object, origin });
    }
    events.extend(keys.difference(&now).cloned().map(Event::Delete));
    *keys = now;
    Batch { events, ..Batch::default() }
}

/// One world.
struct World {
    rng: SmallRng,
    net: Net,
    version: Version,
    replicas: Vec<Option<Replica>>,
    seen: Seen,
}

impl World {
    /// A seed's run: `Err` is what did not hold.
    async fn run(seed: u64) -> Result<Seen, String> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let net = Net::new(rng.random(), Duration::from_millis(rng.random_range(1..500)));
        let version = Version::new(1, &mut rng);
        let replicas = (0..REPLICAS).map(|id| Some(Replica::start(id, &net, &version))).collect();
        let mut world = Self { rng, net, version, replicas, seen: Seen::default() };
        world.seen.versions = 1;

        let (violations, gaps) = (Violations::default(), Violations::default());
        let connections = Arc::new(Mutex::new(0));
        let mut observers = JoinSet::new();
        let held: Held = Arc::default();
        // Without anybody who asks, a sidecar ends.
        let mut sidecars = Vec::new();
        for client in 0..CLIENTS {
            let sidecar = world.sidecar(client, &connections);
            sidecars.push(sidecar.clone());
            for service in 0..VIPS.len() {
                let said = (violations.clone(), gaps.clone());
                observers.spawn(observe(sidecar.clone(), client, service, said, held.clone()));
            }
        }
        for _ in 0..STEPS {
            world.step().await;
        }
        world.heal();
        world.publish();
        let stopped = Instant::now();
        while let Err(differs) = world.has_settled(&held) {
            if stopped.elapsed() > SETTLE {
                let first = violations.lock().unwrap().first().cloned();
                let late = format!("{} s after the last fault: {differs}", SETTLE.as_secs());
                return Err(first.unwrap_or(late));
            }
            sleep(Duration::from_millis(250)).await;
        }
        world.seen.settled = stopped.elapsed();
        world.seen.gap = gaps.lock().unwrap().first().cloned();
        drop(sidecars);
        world.seen.connections = *connections.lock().unwrap();
        match violations.lock().unwrap().first() {
            Some(violation) => Err(violation.clone()),
            None => Ok(world.seen),
        }
    }

    fn sidecar(&mut self, client: usize, connections: &Arc<Mutex<u64>>) -> Sidecar {
        let uid = format!("web-{client}-uid");
        let settings = [
            ("WEFT_NAMESPACE", "shop"),
            ("WEFT_SERVICE_ACCOUNT", "web"),
            ("WEFT_POD_UID", &*uid),
            ("WEFT_TRUST_ANCHORS", "/none"),
            ("WEFT_TOKEN_FILE", "/none"),
            ("WEFT_CONTROLLER", "controller:1"),
            ("WEFT_CONTROLLER_IDENTITY", "controller:2"),
        ];
        let find =
            |name: &str| settings.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let config = Arc::new(Config::read(find).unwrap());
        let (net, connections) = (self.net.clone(), connections.clone());
        let mut rng = SmallRng::seed_from_u64(self.rng.random());
        let dial = move || {
            let (net, server) = (net.clone(), rng.random_range(0..REPLICAS));
            *connections.lock().unwrap() += 1;
            async move { net.connect(client, server).await }
        };
        control::follow(&config, &Arc::default(), dial).0
    }

    /// Something happens, and some time passes.
    async fn step(&mut self) {
        let replica = self.rng.random_range(0..REPLICAS);
        self.seen.faults += 1;
        match self.rng.random_range(0..10) {
            0..4 => {
                self.seen.faults -= 1;
                self.publish();
            }
            4 | 5 => {
                let way = Way {
                    client: self.rng.random_range(0..CLIENTS),
                    server: replica,
                    towards_server: self.rng.random(),
                };
                self.net.cut(way, true);
                if self.rng.random() {
                    self.net.cut(Way { towards_server: !way.towards_server, ..way }, true);
                }
            }
            6 => self.net.heal(),
            7 => {
                self.net.crash(replica);
                self.replicas[replica] = None;
            }
            8 => {
                // A rolling restart: it says goodbye, and is gone a little later.
                if let Some(leaving) = &self.replicas[replica] {
                    leaving.closing.send_replace(true);
                    sleep(Duration::from_millis(self.rng.random_range(0..6_000))).await;
                }
                self.net.crash(replica);
                self.replicas[replica] = Some(Replica::start(replica, &self.net, &self.version));
            }
            _ => self.restart(),
        }
        // Often little, sometimes longer than any timeout.
        let pause = self.rng.random::<f64>().powi(4) * 40_000.0;
        sleep(Duration::from_millis(pause as u64)).await;
    }

    fn publish(&mut self) {
        self.version = Version::new(self.version.number + 1, &mut self.rng);
        self.seen.versions += 1;
        for replica in self.replicas.iter_mut().flatten() {
            let batch = batch(&self.version, &mut replica.keys);
            replica.publisher.apply(batch);
        }
    }

    fn restart(&mut self) {
        for (id, replica) in self.replicas.iter_mut().enumerate().filter(|(_, replica)| replica.is_none()) {
            *replica = Some(Replica::start(id, &self.net, &self.version));
        }
    }

    fn heal(&mut self) {
        self.net.heal();
        self.restart();
    }

    fn has_settled(&self, held: &Held) -> Result<(), String> {
        let held = held.lock().unwrap();
        if held.len() < CLIENTS * VIPS.len() {
            return Err(format!("{} of {} are known", held.len(), CLIENTS * VIPS.len()));
        }
        let differs = held.iter().find_map(|(client, service, watched)| {
            let differs = self.version.differs(*service, &watched.policy())?;
            Some(format!("web-{client} has of {} {differs}", VIPS[*service]))
        });
        differs.map_or(Ok(()), Err)
    }
}

type Violations = Arc<Mutex<Vec<String>>>;
/// Client and service, and what a worker of that sidecar would use.
type Held = Arc<Mutex<Vec<(usize, usize, Arc<Watched>)>>>;

/// An app that calls a service all the time.
async fn observe(
    sidecar: Sidecar,
    client: usize,
    service: usize,
    (violations, gaps): (Violations, Violations),
    held: Held,
) {
    let watched = loop {
        match sidecar.resolve(VIPS[service].parse().unwrap()).await {
            Ok(Target::Service(watched)) => break watched,
            Ok(Target::Outside | Target::Denied) => {
                let said = format!("web-{client} was told that {} is not of the mesh", VIPS[service]);
                violations.lock().unwrap().push(said);
                return;
            }
            // Nobody could be asked yet.
            Err(_) => sleep(Duration::from_millis(500)).await,
        }
    };
    held.lock().unwrap().push((client, service, watched.clone()));
    let (mut newest, mut had) = (0, false);
    loop {
        let version = watched.version();
        let policy = watched.policy();
        let number = number_of(&policy);
        let served = policy.backends.iter().any(|backend| backend.resolved && !backend.endpoints.is_empty());
        let wrong = if watched.removed() {
            Some("it was taken away".to_owned())
        } else if number < newest {
            Some(format!("version {number} after {newest}"))
        } else {
            None
        };
        if let Some(wrong) = wrong {
            violations.lock().unwrap().push(format!("web-{client}, {}: {wrong}", VIPS[service]));
            return;
        }
        // What never was whole is published after a while as it is.
        let serves = served && policy.routes.is_usable();
        if had && !serves {
            let backends = policy
                .backends
                .iter()
                .map(|backend| (backend.service.name.to_string(), backend.resolved, backend.endpoints.len()));
            let backends: Vec<_> = backends.collect();
            let said = format!("web-{client}, {}: version {number} has only {backends:?}", VIPS[service]);
            gaps.lock().unwrap().push(said);
        }
        had = serves;
        newest = number;
        watched.changed_since(version).await;
    }
}

const VIPS: [&str; 2] = ["10.96.0.1:80", "10.96.0.2:80"];
const BASE_MS: u64 = 1_000;
const CLIENTS: usize = 3;
const REPLICAS: usize = 2;
const STEPS: usize = 30;
const QUICK: u64 = 8;
/// The longest wait between two attempts, a hung connection that must be found out, and an attempt that fails.
const SETTLE: Duration = Duration::from_secs(90);
/// No connection is too old in a world of minutes.
const AGE: Duration = Duration::from_secs(3_600);
