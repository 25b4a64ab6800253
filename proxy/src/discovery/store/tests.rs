//! The store as its stream and its workers see it: what arrives, what is asked for, what is published.

use tokio::time::{advance, timeout};
use weft_core::policy::{Action, Egress, MtlsMode, OutboundPolicy};
use weft_proto::{
    Any,
    pb::{ads::Resource, v1 as pb},
};

use super::{join::HOPE, *};
use crate::discovery::{DiscoveryError, Target};

const POD: &str = "uid-web-1";

/// A store with its discovery, and a controller's side written by hand.
struct World {
    store: Store,
    discovery: Discovery,
    asked: mpsc::UnboundedReceiver<Ask>,
    trust: watch::Receiver<Bundles>,
    reports: Reports,
    shared: Arc<Shared>,
    nonce: u64,
    version: u64,
}

impl World {
    fn new(settings: &[(&str, &str)]) -> Self {
        let config = Config::for_tests(settings);
        let (bundles, trust) = watch::channel(Bundles::default());
        let (shared, reports) = (Arc::new(Shared::default()), Reports::new());
        let (store, discovery, asked) = Store::new(&config, Arc::clone(&shared), reports.clone(), bundles);
        Self { store, discovery, asked, trust, reports, shared, nonce: 0, version: 0 }
    }

    /// Connected and configured, with `10.0.0.0/8` as the mesh.
    fn ready() -> Self {
        let mut world = Self::new(&[]);
        world.connect();
        world.configure(pb::workload_config::Egress::Allow);
        world.send(&[("authz/uid-web-1/0", authz(pb::authorization::Action::Allow))], &[]);
        world
    }

    fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.store.connected();
        self.requests()
    }

    fn requests(&mut self) -> Vec<DeltaDiscoveryRequest> {
        std::iter::from_fn(|| self.store.next_request()).collect()
    }

    /// Names subscribed and unsubscribed since the last look.
    fn wanted(&mut self) -> (BTreeSet<String>, BTreeSet<String>) {
        let requests = self.requests();
        let names = |pick: fn(&DeltaDiscoveryRequest) -> &Vec<String>| {
            requests.iter().flat_map(|request| pick(request).clone()).collect()
        };
        (names(|r| &r.resource_names_subscribe), names(|r| &r.resource_names_unsubscribe))
    }

    fn configure(&mut self, egress: pb::workload_config::Egress) {
        let config = pb::WorkloadConfig {
            identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
            default_port: Some(pb::InboundPort {
                mtls: pb::inbound_port::MtlsMode::Permissive.into(),
                authz: format!("authz/{POD}/0"),
                ..Default::default()
            }),
            mesh_ranges: vec!["10.0.0.0/8".into()],
            egress: egress.into(),
            trust_domains: vec!["cluster.local".into()],
            ..Default::default()
        };
        self.send(&[(&format!("self/{POD}"), Body::new("WorkloadConfig", &config))], &[]);
    }

    /// Sends resources and removals; gives the names that were refused.
    fn send(&mut self, resources: &[(&str, Body)], removed: &[&str]) -> Vec<String> {
        self.requests();
        let first = resources.first().map(|(name, _)| *name).or(removed.first().copied());
        let ty = first.and_then(|name| name.parse::<Name>().ok()).map(|name| name.resource_type());
        self.nonce += 1;
        self.version += 1;
        self.store.receive(DeltaDiscoveryResponse {
            type_url: ty.unwrap().type_url().into(),
            nonce: self.nonce.to_string(),
            resources: resources
                .iter()
                .map(|(name, body)| Resource {
                    version: self.version.to_string(),
                    name: (*name).into(),
                    resource: Some(Any { type_url: body.0.into(), value: body.1.clone() }),
                    ..Default::default()
                })
                .collect(),
            removed_resources: removed.iter().map(|name| (*name).into()).collect(),
            ..Default::default()
        });
        self.reports.refused().into_iter().map(|(_, name, ..)| name.to_string()).collect()
    }

    /// Sends a whole collection.
    fn send_all(&mut self, of: &str, endpoints: &[(&str, [u8; 4])]) {
        let head = |begin, complete| {
            Body::of(
                weft_proto::ads::COLLECTION_HEAD_TYPE_URL,
                &pb::CollectionHead { epoch: "e".into(), seq: 1, begin, complete, ..Default::default() },
            )
        };
        let head_name = format!("ep/{of}/$head");
        self.send(&[(&head_name, head(true, false))], &[]);
        for (uid, address) in endpoints {
            self.send(&[(&format!("ep/{of}/{uid}"), endpoint(uid, *address))], &[]);
        }
        self.send(&[(&head_name, head(false, true))], &[]);
    }

    /// Asks as a worker would, with the store answering.
    async fn resolve(&mut self, address: &str) -> Result<Target, DiscoveryError> {
        let discovery = self.discovery.clone();
        let address = address.parse().unwrap();
        let resolve = discovery.resolve(address);
        tokio::pin!(resolve);
        loop {
            tokio::select! {
                biased;
                result = &mut resolve => return result,
                ask = self.asked.recv() => self.store.ask(ask.unwrap()),
            }
        }
    }

    /// Asks without waiting for an answer.
    async fn ask(&mut self, address: &str) {
        let discovery = self.discovery.clone();
        let address: SocketAddr = address.parse().unwrap();
        tokio::spawn(async move { discovery.resolve(address).await });
        let ask = self.asked.recv().await.unwrap();
        self.store.ask(ask);
    }

    async fn service(&mut self, address: &str) -> Arc<Watched> {
        match self.resolve(address).await {
            Ok(Target::Service(watched)) => watched,
            other => panic!("{address}: {other:?}"),
        }
    }

    /// What a destination was made of last.
    fn state_of(&self, address: &str) -> Arc<BackendPolicy> {
        let destination = &self.store.state.destinations[&address.parse::<SocketAddr>().unwrap()];
        Arc::clone(&destination.made_of.as_ref().unwrap().backends[0])
    }

    fn live(&self) -> BTreeSet<String> {
        self.reports.live().into_iter().map(|(_, name, _)| name.to_string()).collect()
    }
}

#[derive(Clone)]
struct Body(&'static str, Bytes);

impl Body {
    fn new(kind: &'static str, message: &impl prost::Message) -> Self {
        let ty = ResourceType::ALL.into_iter().find(|ty| ty.as_str() == kind).unwrap();
        Self::of(ty.type_url(), message)
    }

    fn of(url: &'static str, message: &impl prost::Message) -> Self {
        Self(url, message.encode_to_vec().into())
    }

    fn nonsense(kind: &'static str) -> Self {
        let ty = ResourceType::ALL.into_iter().find(|ty| ty.as_str() == kind).unwrap();
        Self(ty.type_url(), Bytes::from_static(&[0xff; 9]))
    }
}

fn authz(default: pb::authorization::Action) -> Body {
    Body::new("Authorization", &pb::Authorization { default: default.into(), ..Default::default() })
}

fn service(name: &str, route: bool) -> Body {
    let own = format!("shop/{name}:80");
    Body::new(
        "Service",
        &pb::Service {
            namespace: "shop".into(),
            name: name.into(),
            port: 80,
            route: if route { format!("route/{own}") } else { String::new() },
            endpoints: format!("ep/{own}/*"),
            ..Default::default()
        },
    )
}

fn endpoint(uid: &str, address: [u8; 4]) -> Body {
    Body::new(
        "Endpoint",
        &pb::Endpoint {
            address: Bytes::copy_from_slice(&address),
            port: 8_080,
            tunnel: pb::endpoint::Tunnel::None.into(),
            uid: uid.into(),
            ..Default::default()
        },
    )
}

fn route(backends: &[&str]) -> Body {
    let backend = |name: &&str| pb::route::Backend {
        service: format!("svc/shop/{name}:80"),
        weight: 1,
        filters: Vec::new(),
    };
    let rule = pb::route::Rule {
        backends: backends.iter().map(backend).collect(),
        name: "0".into(),
        object: Some(pb::ObjectRef { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "r".into() }),
        ..Default::default()
    };
    Body::new("Route", &pb::Route { rules: vec![rule], requires: Vec::new() })
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn endpoints(policy: &OutboundPolicy, backend: usize) -> Vec<String> {
    policy.backends[backend].endpoints.iter().map(|endpoint| endpoint.uid.to_string()).collect()
}

#[tokio::test(start_paused = true)]
async fn it_begins_with_itself_and_its_own_trust() {
    let mut world = World::new(&[]);
    world.store.connected();
    assert_eq!(world.wanted().0, set(&["self/uid-web-1", "trust/cluster.local"]));
    assert_eq!(world.resolve("10.0.0.1:80").await.unwrap_err(), DiscoveryError::NotReady);
    world.configure(pb::workload_config::Egress::Allow);
    assert_eq!(world.wanted().0, set(&["authz/uid-web-1/0"]));
    // The ranges hold at once; the inbound policy waits for its authorization.
    assert!(matches!(world.resolve("192.0.2.1:443").await, Ok(Target::Outside)));
    assert!(world.discovery.inbound().borrow().is_none());
    world.send(&[("authz/uid-web-1/0", authz(pb::authorization::Action::Allow))], &[]);
    let policy = world.discovery.inbound().borrow().clone().unwrap();
    assert_eq!(policy.default_port.authorization.default, Action::Allow);
    assert_eq!(policy.default_port.mtls, MtlsMode::Permissive);
    assert_eq!(policy.egress, Egress::Allow);
    assert!(world.live().is_superset(&set(&["self/uid-web-1", "authz/uid-web-1/0"])));
}

#[tokio::test(start_paused = true)]
async fn outside_the_ranges_nobody_is_asked() {
    let mut world = World::ready();
    world.store.disconnected();
    for i in 0..1_000 {
        let address = format!("192.0.{}.{}:443", i / 256, i % 256);
        assert!(matches!(world.resolve(&address).await, Ok(Target::Outside)));
    }
    assert!(world.asked.try_recv().is_err());
    world.connect();
    world.configure(pb::workload_config::Egress::Deny);
    assert!(matches!(world.resolve("[2001:db8::1]:443").await, Ok(Target::Denied)));
    assert!(matches!(world.resolve("[::ffff:192.0.2.1]:443").await, Ok(Target::Denied)));
}

#[tokio::test(start_paused = true)]
async fn inside_the_ranges_silence_is_an_error_and_no_is_an_answer() {
    let mut world = World::ready();
    let before = Instant::now();
    assert_eq!(world.resolve("10.0.0.9:80").await.unwrap_err(), DiscoveryError::Timeout);
    assert_eq!(before.elapsed(), Duration::from_secs(2));
    assert_eq!(world.shared.counter(Counter::DiscoveryTimeouts), 1);
    assert_eq!(world.wanted().0, set(&["ip/10.0.0.9:80"]));
    world.send(&[], &["ip/10.0.0.9:80"]);
    assert!(matches!(world.resolve("10.0.0.9:80").await, Ok(Target::Outside)));
    // It stays an answer, without asking again, while the control plane is away.
    world.store.disconnected();
    advance(Duration::from_secs(3_600)).await;
    world.store.tick();
    assert!(matches!(world.resolve("10.0.0.9:80").await, Ok(Target::Outside)));
    assert!(world.asked.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_live_only_when_whole() {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.wanted();
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    assert_eq!(world.wanted().0, set(&["route/shop/api:80", "ep/shop/api:80/*"]));
    world.send(&[("route/shop/api:80", route(&["v1", "v2", "api"]))], &[]);
    assert_eq!(world.wanted().0, set(&["svc/shop/v1:80", "svc/shop/v2:80"]));
    world.send(&[("svc/shop/v1:80", service("v1", false))], &["svc/shop/v2:80"]);
    assert_eq!(world.wanted().0, set(&["ep/shop/v1:80/*"]));
    world.send_all("shop/v1:80", &[("uid-1", [10, 1, 0, 1])]);
    assert_eq!(world.live().iter().filter(|name| name.contains("shop")).count(), 0);
    world.send_all("shop/api:80", &[("uid-2", [10, 1, 0, 2]), ("uid-3", [10, 1, 0, 3])]);

    let watched = world.service("10.0.0.1:80").await;
    let policy = watched.policy();
    assert_eq!(policy.routes.rules().len(), 1);
    let names: Vec<_> = policy.backends.iter().map(|b| (b.service.name.to_string(), b.resolved)).collect();
    let expected = [("shop/v1:80", true), ("shop/v2:80", false), ("shop/api:80", true)];
    assert_eq!(names, expected.map(|(name, resolved)| (name.to_owned(), resolved)));
    assert_eq!(endpoints(&policy, 0), ["uid-1"]);
    assert_eq!(endpoints(&policy, 1), [""; 0]);
    assert_eq!(endpoints(&policy, 2), ["uid-2", "uid-3"]);
    let live = world.live();
    for name in
        ["ip/10.0.0.1:80", "route/shop/api:80", "svc/shop/v1:80", "ep/shop/v1:80/*", "ep/shop/api:80/*"]
    {
        assert!(live.contains(name), "{name} in {live:?}");
    }
}

/// `10.0.0.1:80` is `shop/api:80` with one endpoint and no route.
async fn with_api() -> (World, Arc<Watched>) {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
    world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
    let watched = world.service("10.0.0.1:80").await;
    (world, watched)
}

#[tokio::test(start_paused = true)]
async fn a_route_that_moves_on_from_a_deleted_backend_always_has_one() {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    world.send(&[("route/shop/api:80", route(&["old"]))], &[]);
    world.send_all("shop/api:80", &[]);
    world.send(&[("svc/shop/old:80", service("old", false))], &[]);
    world.send_all("shop/old:80", &[("uid-1", [10, 1, 0, 1])]);
    let watched = world.service("10.0.0.1:80").await;
    let serves = |uid: &str| {
        let policy = watched.policy();
        assert!(policy.backends[0].resolved);
        assert_eq!(endpoints(&policy, 0), [uid]);
    };
    // One change of the mesh; its removals arrive first, and the rest of it a little later.
    world.send(&[], &["ep/shop/old:80/*"]);
    serves("uid-1");
    world.send(&[], &["svc/shop/old:80"]);
    serves("uid-1");
    advance(Duration::from_millis(1_500)).await;
    world.store.tick();
    world.send(&[("route/shop/api:80", route(&["new"]))], &[]);
    // However long the new one takes.
    advance(Duration::from_secs(5)).await;
    world.store.tick();
    serves("uid-1");
    world.send(&[("svc/shop/new:80", service("new", false))], &[]);
    world.send_all("shop/new:80", &[("uid-2", [10, 1, 0, 2])]);
    serves("uid-2");
    assert!(!world.live().iter().any(|name| name.contains("old")), "{:?}", world.live());
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_is_gone_for_good_answers_so_a_moment_later() {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    world.send(&[("route/shop/api:80", route(&["old"]))], &[]);
    world.send_all("shop/api:80", &[]);
    world.send(&[("svc/shop/old:80", service("old", false))], &[]);
    world.send_all("shop/old:80", &[("uid-1", [10, 1, 0, 1])]);
    let watched = world.service("10.0.0.1:80").await;
    let resolved = || watched.policy().backends[0].resolved;
    world.send(&[], &["svc/shop/old:80"]);
    world.send(&[], &["ep/shop/old:80/*"]);
    // While there is no stream nothing can come in its place.
    world.store.disconnected();
    advance(HOPE * 2).await;
    world.store.tick();
    assert!(resolved());
    world.connect();
    advance(HOPE).await;
    world.store.tick();
    assert!(!resolved());
    // It comes back with other members, none of the old.
    world.send(&[("svc/shop/old:80", service("old", false))], &[]);
    world.send_all("shop/old:80", &[("uid-2", [10, 1, 0, 2])]);
    assert!(resolved());
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-2"]);
    // And the same within the moment.
    world.send(&[], &["ep/shop/old:80/*"]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-2"]);
    world.send_all("shop/old:80", &[("uid-3", [10, 1, 0, 3])]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-3"]);
}

#[tokio::test(start_paused = true)]
async fn a_route_back_to_a_backend_that_was_deleted_waits_for_it_to_come_back() {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    world.send(&[("route/shop/api:80", route(&["a", "b"]))], &[]);
    world.send_all("shop/api:80", &[]);
    world.send(&[("svc/shop/a:80", service("a", false))], &["svc/shop/b:80"]);
    world.send_all("shop/a:80", &[("uid-1", [10, 1, 0, 1])]);
    let watched = world.service("10.0.0.1:80").await;
    let resolved = || watched.policy().backends.iter().map(|backend| backend.resolved).collect::<Vec<_>>();
    // Where nothing served before, what is not there is an answer at once, and changes are not held up by it.
    assert_eq!(resolved(), [true, false]);
    world.send(&[("ep/shop/a:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-1", "uid-2"]);
    world.send(&[("route/shop/api:80", route(&["a"]))], &[]);
    assert_eq!(resolved(), [true]);
    world.wanted();
    world.send(&[("route/shop/api:80", route(&["b"]))], &[]);
    assert_eq!(world.wanted().0, set(&["svc/shop/b:80"]));
    world.send(&[], &["svc/shop/b:80"]);
    assert_eq!((resolved(), endpoints(&watched.policy(), 0).len()), (vec![true], 2), "the one before");
    world.send(&[("svc/shop/b:80", service("b", false))], &[]);
    world.send_all("shop/b:80", &[("uid-9", [10, 1, 0, 9])]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-9"]);
}

#[tokio::test(start_paused = true)]
async fn generations_grow_with_real_changes_only() {
    let (mut world, watched) = with_api().await;
    let (first, version) = (watched.policy(), watched.version());
    world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
    world.send(&[("ep/shop/api:80/uid-1", endpoint("uid-1", [10, 1, 0, 1]))], &[]);
    assert!(Arc::ptr_eq(&first, &watched.policy()));
    assert_eq!(watched.version(), version);

    world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
    let second = watched.policy();
    assert_eq!(endpoints(&second, 0), ["uid-1", "uid-2"]);
    assert!(second.backends[0].generation > first.backends[0].generation);
    // What stays is the same: a balancer sees by pointer.
    assert!(Arc::ptr_eq(&first.backends[0].endpoints[0], &second.backends[0].endpoints[0]));
    watched.changed_since(version).await;

    world.send(&[], &["ep/shop/api:80/uid-1"]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-2"]);
}

#[tokio::test(start_paused = true)]
async fn the_old_snapshot_serves_until_the_new_one_is_whole() {
    let (mut world, watched) = with_api().await;
    let old = watched.policy();
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    assert!(Arc::ptr_eq(&old, &watched.policy()));
    world.send(&[("route/shop/api:80", route(&["v2"]))], &[]);
    world.send(&[("svc/shop/v2:80", service("v2", false))], &[]);
    assert!(Arc::ptr_eq(&old, &watched.policy()));
    world.send_all("shop/v2:80", &[("uid-9", [10, 1, 0, 9])]);
    let new = watched.policy();
    assert_eq!(new.backends.len(), 1);
    assert_eq!(endpoints(&new, 0), ["uid-9"]);
    // What only the old one needed is given up.
    assert_eq!(world.wanted().1, set(&["ep/shop/api:80/*"]));
}

#[tokio::test(start_paused = true)]
async fn after_warming_long_enough_it_is_published_with_what_is_there() {
    let (mut world, watched) = with_api().await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    world.send(&[("route/shop/api:80", route(&["api", "v2"]))], &[]);
    // Away from the control plane nothing warms.
    world.store.disconnected();
    advance(Duration::from_secs(60)).await;
    world.store.tick();
    assert_eq!(watched.policy().backends.len(), 1);
    world.connect();
    // 15 s, and the time in which a dead stream is found out.
    advance(Duration::from_secs(29)).await;
    world.store.tick();
    assert_eq!(watched.policy().backends.len(), 1);
    advance(Duration::from_secs(1)).await;
    world.store.tick();
    let policy = watched.policy();
    assert_eq!(policy.backends.iter().map(|b| b.resolved).collect::<Vec<_>>(), [true, false]);
    // What is still missing is not waited for again.
    world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-1", "uid-2"]);
    // And made whole when the rest comes.
    world.send(&[("svc/shop/v2:80", service("v2", false))], &[]);
    world.send_all("shop/v2:80", &[("uid-9", [10, 1, 0, 9])]);
    assert_eq!(endpoints(&watched.policy(), 1), ["uid-9"]);
}

#[tokio::test(start_paused = true)]
async fn a_route_that_is_refused_or_does_not_come_denies_where_nothing_was_in_force() {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
    assert_eq!(world.send(&[("route/shop/api:80", Body::nonsense("Route"))], &[]), ["route/shop/api:80"]);
    // At once: nobody waits for what was refused.
    let watched = world.service("10.0.0.1:80").await;
    assert!(!watched.policy().routes.is_usable() && watched.policy().routes.rules().is_empty());
    // The next version may be better.
    world.send(&[("route/shop/api:80", route(&["api"]))], &[]);
    assert!(watched.policy().routes.is_usable());
    assert_eq!(watched.policy().routes.rules().len(), 1);

    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &["route/shop/api:80"]);
    world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
    advance(Duration::from_secs(31)).await;
    world.store.tick();
    assert!(!world.service("10.0.0.1:80").await.policy().routes.is_usable());
}

#[tokio::test(start_paused = true)]
async fn a_first_route_that_is_refused_or_does_not_come_denies_although_all_passed_before() {
    for refused in [true, false] {
        let (mut world, watched) = with_api().await;
        assert!(watched.policy().routes.is_usable());
        world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
        if refused {
            world.send(&[("route/shop/api:80", Body::nonsense("Route"))], &[]);
        } else {
            assert!(watched.policy().routes.is_usable(), "it may be on its way");
            advance(Duration::from_secs(31)).await;
            world.store.tick();
        }
        assert!(!watched.policy().routes.is_usable());
        // The next version may be better, and the service may name none again.
        world.send(&[("route/shop/api:80", route(&["api"]))], &[]);
        assert_eq!(watched.policy().routes.rules().len(), 1);
        world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
        assert!(watched.policy().routes.is_usable());
    }
}

#[tokio::test(start_paused = true)]
async fn a_route_that_is_refused_or_gone_leaves_the_one_before_it_in_force() {
    let mut world = World::ready();
    world.ask("10.0.0.1:80").await;
    world.send(&[("ip/10.0.0.1:80", service("api", true))], &[]);
    world.send(&[("route/shop/api:80", route(&["api"]))], &[]);
    world.send_all("shop/api:80", &[("uid-1", [10, 1, 0, 1])]);
    let watched = world.service("10.0.0.1:80").await;
    let before = watched.policy().routes.rules()[0].clone();
    world.send(&[("route/shop/api:80", Body::nonsense("Route"))], &[]);
    assert!(Arc::ptr_eq(&before, &watched.policy().routes.rules()[0]));
    world.send(&[], &["route/shop/api:80"]);
    advance(Duration::from_secs(31)).await;
    world.store.tick();
    world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-2", [10, 1, 0, 2]))], &[]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-1", "uid-2"]);
    assert!(Arc::ptr_eq(&before, &watched.policy().routes.rules()[0]));
}

#[tokio::test(start_paused = true)]
async fn a_refused_resource_changes_nothing_and_is_reported() {
    let (mut world, watched) = with_api().await;
    let old = watched.policy();
    let refused = world.send(&[("ip/10.0.0.1:80", Body::nonsense("Service"))], &[]);
    assert_eq!(refused, ["ip/10.0.0.1:80"]);
    assert!(world.requests().iter().any(|request| request.error_detail.is_some()));
    assert!(Arc::ptr_eq(&old, &watched.policy()));
    world.store.tick();
    assert_eq!(world.shared.level(Gauge::NackedResources), 1);
    let refused = world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
    assert!(refused.is_empty());
    world.store.tick();
    assert_eq!(world.shared.level(Gauge::NackedResources), 0);
    // An endpoint that says it is another.
    let refused = world.send(&[("ep/shop/api:80/uid-2", endpoint("uid-3", [10, 1, 0, 3]))], &[]);
    assert_eq!(refused, ["ep/shop/api:80/uid-2"]);
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-1"]);
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_goes_and_comes_back() {
    let (mut world, watched) = with_api().await;
    world.send(&[], &["ip/10.0.0.1:80"]);
    assert!(watched.removed());
    assert!(matches!(world.resolve("10.0.0.1:80").await, Ok(Target::Outside)));
    assert_eq!(endpoints(&watched.policy(), 0), ["uid-1"]);
    world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
    world.send_all("shop/api:80", &[("uid-5", [10, 1, 0, 5])]);
    assert!(!watched.removed());
    let again = world.service("10.0.0.1:80").await;
    assert_eq!(endpoints(&again.policy(), 0), ["uid-5"]);
}

#[tokio::test(start_paused = true)]
async fn idle_destinations_are_given_up_but_never_while_disconnected() {
    let (mut world, watched) = with_api().await;
    world.wanted();
    let idle = Duration::from_secs(601);
    // Held.
    advance(idle).await;
    world.store.tick();
    assert!(world.wanted().1.is_empty());
    // Dropped, and the control plane is away.
    drop(watched);
    world.store.disconnected();
    advance(idle).await;
    world.store.tick();
    assert_eq!(endpoints(&world.service("10.0.0.1:80").await.policy(), 0), ["uid-1"]);
    // Back again: the time counts from the last use.
    world.connect();
    advance(Duration::from_secs(599)).await;
    world.store.tick();
    assert!(world.wanted().1.is_empty());
    advance(Duration::from_secs(2)).await;
    world.store.tick();
    assert_eq!(world.wanted().1, set(&["ip/10.0.0.1:80", "ep/shop/api:80/*"]));
    assert!(!world.live().contains("ip/10.0.0.1:80"));
}

#[tokio::test(start_paused = true)]
async fn waiters_and_destinations_are_bounded() {
    let mut world = World::new(&[("WEFT_DISCOVERY_WAITERS", "3"), ("WEFT_MAX_DESTINATIONS", "2")]);
    world.connect();
    world.configure(pb::workload_config::Egress::Allow);
    for port in 1..=3 {
        let discovery = world.discovery.clone();
        tokio::spawn(async move { discovery.resolve(([10, 0, 0, 1], port).into()).await });
    }
    tokio::task::yield_now().await;
    let one_more = timeout(Duration::from_secs(1), world.discovery.resolve(([10, 0, 0, 1], 4).into())).await;
    assert_eq!(one_more.unwrap().unwrap_err(), DiscoveryError::Overloaded);
    assert_eq!(world.shared.level(Gauge::DiscoveryWaiters), 3);
    // Two destinations with waiters leave no room for a third.
    for _ in 0..3 {
        let ask = world.asked.recv().await.unwrap();
        world.store.ask(ask);
    }
    assert_eq!(world.store.state.destinations.len(), 2);
    advance(Duration::from_secs(3)).await;
    tokio::task::yield_now().await;
    assert_eq!(world.shared.level(Gauge::DiscoveryWaiters), 0);
    // Without waiters the oldest gives way.
    world.ask("10.0.0.1:9").await;
    assert_eq!(world.store.state.destinations.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_pod_by_its_own_address() {
    let mut world = World::ready();
    world.ask("10.1.0.1:8080").await;
    let pod = pb::Service {
        namespace: "shop".into(),
        name: "api-1".into(),
        port: 8_080,
        pod: Some(pb::Endpoint {
            address: Bytes::from_static(&[10, 1, 0, 1]),
            port: 8_080,
            uid: "uid-1".into(),
            tunnel: pb::endpoint::Tunnel::Weft.into(),
            service_account: "api".into(),
            trust_domain: "cluster.local".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(world.send(&[("ip/10.1.0.1:8080", Body::new("Service", &pod))], &[]).is_empty());
    let policy = world.service("10.1.0.1:8080").await.policy();
    assert_eq!(endpoints(&policy, 0), ["uid-1"]);
    assert_eq!(policy.routes.rules().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_named_as_a_service_is_another_backend() {
    let (mut world, watched) = with_api().await;
    let before = watched.policy();
    world.ask("10.1.0.5:80").await;
    let pod = pb::Service {
        namespace: "shop".into(),
        name: "api".into(),
        port: 80,
        pod: Some(pb::Endpoint {
            address: Bytes::from_static(&[10, 1, 0, 5]),
            port: 80,
            uid: "uid-5".into(),
            tunnel: pb::endpoint::Tunnel::Weft.into(),
            service_account: "api".into(),
            trust_domain: "cluster.local".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    world.send(&[("ip/10.1.0.5:80", Body::new("Service", &pod))], &[]);
    let pod = world.service("10.1.0.5:80").await.policy();
    assert_ne!(pod.backends[0].service.key(), before.backends[0].service.key());
    // Told again, neither has changed; before, each made the other look changed, in turns.
    world.send(&[("ip/10.0.0.1:80", service("api", false))], &[]);
    let again = world.state_of("10.0.0.1:80");
    assert!(
        Arc::ptr_eq(&again, &before.backends[0]),
        "{} {}",
        again.generation,
        before.backends[0].generation
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_usable_authorization_a_port_denies() {
    let mut world = World::new(&[]);
    world.connect();
    world.configure(pb::workload_config::Egress::Allow);
    world.send(&[("authz/uid-web-1/0", Body::nonsense("Authorization"))], &[]);
    let policy = || world.discovery.inbound().borrow().clone().unwrap();
    assert_eq!(policy().default_port.authorization.default, Action::Deny);
    // An earlier one stays, whatever comes later.
    let mut world = World::ready();
    world.send(&[("authz/uid-web-1/0", Body::nonsense("Authorization"))], &[]);
    world.send(&[], &["authz/uid-web-1/0"]);
    world.send(&[], &["self/uid-web-1"]);
    let policy = world.discovery.inbound().borrow().clone().unwrap();
    assert_eq!(policy.default_port.authorization.default, Action::Allow);
}

#[tokio::test(start_paused = true)]
async fn an_authorization_that_never_comes_denies_after_warming() {
    let mut world = World::new(&[]);
    world.connect();
    world.configure(pb::workload_config::Egress::Allow);
    assert!(world.discovery.inbound().borrow().is_none());
    advance(Duration::from_secs(15)).await;
    world.store.tick();
    let policy = world.discovery.inbound().borrow().clone().unwrap();
    assert_eq!(policy.default_port.authorization.default, Action::Deny);
    world.send(&[("authz/uid-web-1/0", authz(pb::authorization::Action::Allow))], &[]);
    let policy = world.discovery.inbound().borrow().clone().unwrap();
    assert_eq!(policy.default_port.authorization.default, Action::Allow);
}

#[tokio::test(start_paused = true)]
async fn a_configuration_for_somebody_else_is_refused() {
    let mut world = World::new(&[]);
    world.connect();
    let other = pb::WorkloadConfig {
        identity: "spiffe://cluster.local/ns/shop/sa/other".into(),
        default_port: Some(pb::InboundPort {
            mtls: pb::inbound_port::MtlsMode::Strict.into(),
            authz: "authz/uid-web-1/0".into(),
            ..Default::default()
        }),
        egress: pb::workload_config::Egress::Allow.into(),
        ..Default::default()
    };
    let refused = world.send(&[("self/uid-web-1", Body::new("WorkloadConfig", &other))], &[]);
    assert_eq!(refused, ["self/uid-web-1"]);
}

#[tokio::test(start_paused = true)]
async fn trust_arrives_with_its_sequence_and_bad_trust_does_not() {
    let authority = crate::tls::testing::Authority::new("cluster.local");
    let mut world = World::ready();
    let bundle = |roots: Vec<Bytes>, sequence| {
        let bundle = pb::TrustBundle { roots_der: roots, sequence, ..Default::default() };
        Body::new("TrustBundle", &bundle)
    };
    let root = Bytes::copy_from_slice(&authority.root);
    world.send(&[("trust/cluster.local", bundle(vec![root], 3))], &[]);
    let now = world.trust.borrow().clone();
    assert_eq!((now.sequence, now.trust.roots("cluster.local")), (Some(3), 1));
    assert!(world.live().contains("trust/cluster.local"));
    // Not a certificate: webpki refuses what the conversion cannot judge.
    let refused = world.send(&[("trust/cluster.local", bundle(vec![Bytes::from_static(b"0\0")], 4))], &[]);
    assert_eq!(refused, ["trust/cluster.local"]);
    world.send(&[], &["trust/cluster.local"]);
    let now = world.trust.borrow().clone();
    assert_eq!((now.sequence, now.trust.roots("cluster.local")), (Some(3), 1));
}

#[tokio::test(start_paused = true)]
async fn a_reconnect_asks_for_all_and_loses_nothing() {
    let (mut world, watched) = with_api().await;
    let old = watched.policy();
    world.store.disconnected();
    assert!(world.store.next_request().is_none());
    let names: BTreeSet<String> =
        world.connect().into_iter().flat_map(|request| request.resource_names_subscribe).collect();
    assert!(names.is_superset(&set(&["self/uid-web-1", "ip/10.0.0.1:80", "ep/shop/api:80/*"])));
    assert!(Arc::ptr_eq(&old, &watched.policy()));
}

#[tokio::test(start_paused = true)]
async fn the_dump_describes_what_is_held() {
    let (mut world, _watched) = with_api().await;
    let discovery = world.discovery.clone();
    let dump = tokio::spawn(async move { discovery.dump().await });
    let ask = world.asked.recv().await.unwrap();
    world.store.ask(ask);
    let dump = dump.await.unwrap();
    assert_eq!(dump["connected"], true);
    assert_eq!(dump["destinations"][0]["service"], "shop/api:80");
    assert_eq!(dump["destinations"][0]["in_use"], true);
    assert_eq!(dump["egress"], "Allow");
}
