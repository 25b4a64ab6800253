//! The exchange against a model: whatever happened, once both sides have nothing left to say, the client
//! holds what the server has, filtered by what the client wants and accepts.
//!
//! Why this test above all: each rule of the exchange is simple and its combinations are not. Two replicas
//! that lag behind each other, lost streams, refused resources, logs that forget, heads that fall due in
//! the middle of it: the sequences are random, and the client, the servers and the collections are the
//! real ones. `WEFT_MODEL_STEPS` sets how many steps are taken in all.

#![allow(clippy::unwrap_used)]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use proptest::{prelude::*, test_runner::TestRunner};
use weft_core::identity::PodUid;
use weft_proto::{
    ads::{
        Change, Client, Collection, Priority, ResourceType, Source, Stream, Versioned, client::Stats,
        server::HEAD_INTERVAL,
    },
    pb::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node},
};

const STEPS_A_CASE: usize = 150;
const REPLICAS: usize = 2;

#[derive(Clone, Debug)]
enum Op {
    Subscribe(usize),
    Unsubscribe(usize),
    /// Sets a resource, or a member of a collection.
    Publish(usize, usize),
    Remove(usize, usize),
    /// A collection gains so many members at once: more than one response.
    Burst(usize, usize),
    /// A collection comes to be without members, or goes with all of them.
    Toggle(usize),
    /// A replica learns what is true by now.
    Sync(usize),
    /// The stream breaks; the next one goes to that replica.
    Reconnect(usize),
    /// A replica loses its memory.
    Restart(usize),
    /// So many messages arrive on either side.
    Deliver(usize),
    /// Time passes: heads fall due, tombstones are forgotten.
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0..NAMES.len();
    prop_oneof![
        4 => name.clone().prop_map(Op::Subscribe),
        2 => name.clone().prop_map(Op::Unsubscribe),
        8 => (name.clone(), 0..8_usize).prop_map(|(name, member)| Op::Publish(name, member)),
        3 => (name.clone(), 0..8_usize).prop_map(|(name, member)| Op::Remove(name, member)),
        1 => (name.clone(), 200..700_usize).prop_map(|(name, n)| Op::Burst(name, n)),
        1 => name.prop_map(Op::Toggle),
        6 => (0..REPLICAS).prop_map(Op::Sync),
        2 => (0..REPLICAS).prop_map(Op::Reconnect),
        1 => (0..REPLICAS).prop_map(Op::Restart),
        8 => (1..6_usize).prop_map(Op::Deliver),
        1 => (1..1_500_u64).prop_map(Op::Wait),
    ]
}

const NAMES: [(ResourceType, &str); 8] = [
    (ResourceType::Service, "svc/shop/cart:80"),
    (ResourceType::Service, "svc/shop/pay:80"),
    (ResourceType::Service, "ip/10.0.0.1:80"),
    (ResourceType::Route, "route/shop/cart:80"),
    (ResourceType::Authorization, "authz/6f1c/0"),
    (ResourceType::Endpoint, "ep/shop/cart:80/*"),
    (ResourceType::Endpoint, "ep/shop/pay:80/*"),
    (ResourceType::Endpoint, "ep/shop/ship:80/*"),
];

// The model: what is true, and what a client that missed nothing would hold.

#[derive(Clone, Default)]
struct Truth {
    resources: BTreeMap<usize, u32>,
    collections: BTreeMap<usize, BTreeMap<String, u32>>,
    version: u32,
}

impl Truth {
    fn apply(&mut self, op: &Op) {
        self.version += 1;
        match op {
            Op::Publish(name, member) if is_collection(*name) => {
                self.collections.entry(*name).or_default().insert(uid(*member), self.version);
            }
            Op::Publish(name, _) => drop(self.resources.insert(*name, self.version)),
            Op::Remove(name, member) => {
                self.resources.remove(name);
                self.collections.get_mut(name).map(|members| members.remove(&uid(*member)));
            }
            Op::Burst(name, n) if is_collection(*name) => {
                let members = self.collections.entry(*name).or_default();
                members.extend((0..*n).map(|n| (uid(n), self.version)));
            }
            Op::Toggle(name) if is_collection(*name) && self.collections.remove(name).is_none() => {
                self.collections.insert(*name, BTreeMap::new());
            }
            Op::Burst(..) | Op::Toggle(_) => {}
            Op::Subscribe(_) | Op::Unsubscribe(_) | Op::Sync(_) | Op::Reconnect(_) => {}
            Op::Restart(_) | Op::Deliver(_) | Op::Wait(_) => {}
        }
    }

    /// What a client holds that wants these names; `None`: an older one, or nothing, for it refuses this.
    fn held(&self, wanted: &BTreeSet<usize>) -> BTreeMap<String, Option<u32>> {
        let good = |version: u32| (!is_refused(version)).then_some(version);
        let resources = self.resources.iter().filter(|(name, _)| wanted.contains(name));
        let mut held: BTreeMap<_, _> =
            resources.map(|(name, version)| (NAMES[*name].1.to_owned(), good(*version))).collect();
        for (name, members) in self.collections.iter().filter(|(name, _)| wanted.contains(name)) {
            let of = NAMES[*name].1.trim_end_matches('*');
            held.extend(members.iter().map(|(uid, version)| (format!("{of}{uid}"), good(*version))));
        }
        held
    }
}

fn is_collection(name: usize) -> bool {
    NAMES[name].0 == ResourceType::Endpoint
}

fn is_refused(version: u32) -> bool {
    version.is_multiple_of(5)
}

fn is_urgent(version: u32) -> bool {
    version.is_multiple_of(3)
}

fn uid(n: usize) -> String {
    format!("pod-{n}")
}

// The world: replicas that follow the truth when they are told, and one client.

struct Replica {
    resources: BTreeMap<(ResourceType, String), u32>,
    collections: BTreeMap<String, Collection>,
    epochs: u32,
}

impl Replica {
    fn sync(&mut self, id: usize, truth: &Truth, now: Instant) {
        let named = |name: &usize| NAMES[*name].1.to_owned();
        self.resources = truth.resources.iter().map(|(n, v)| ((NAMES[*n].0, named(n)), *v)).collect();
        self.collections.retain(|name, _| truth.collections.keys().any(|known| named(known) == *name));
        for (name, members) in &truth.collections {
            let collection = self.collections.entry(named(name)).or_insert_with(|| {
                self.epochs += 1;
                Collection::new(&format!("{id}-{}", self.epochs))
            });
            let members = members.iter().map(|(uid, version)| {
                let priority = if is_urgent(*version) { Priority::Urgent } else { Priority::Normal };
                (PodUid::new(uid).unwrap(), Bytes::from(version.to_string()), priority)
            });
            collection.replace(members, now);
        }
    }
}

impl Source for Replica {
    fn lookup(&self, ty: ResourceType, name: &str) -> Option<Versioned> {
        let version = self.resources.get(&(ty, name.to_owned()))?.to_string();
        Some(Versioned { version: version.as_str().into(), body: version.into() })
    }

    fn collection(&self, name: &str) -> Option<Collection> {
        self.collections.get(name).cloned()
    }
}

struct World {
    truth: Truth,
    replicas: Vec<Replica>,
    client: Client,
    stream: Stream,
    /// Which replica the stream goes to.
    at: usize,
    streams: u64,
    to_server: VecDeque<DeltaDiscoveryRequest>,
    to_client: VecDeque<DeltaDiscoveryResponse>,
    wanted: BTreeSet<usize>,
    /// What the client's shell keeps: filled by nothing but the callback.
    kept: RefCell<BTreeMap<String, u32>>,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let replica = |_| Replica { resources: BTreeMap::new(), collections: BTreeMap::new(), epochs: 0 };
        let mut world = Self {
            truth: Truth::default(),
            replicas: (0..REPLICAS).map(replica).collect(),
            client: Client::new(Node::default()),
            stream: Stream::new(0),
            at: 0,
            streams: 0,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            wanted: BTreeSet::new(),
            kept: RefCell::default(),
            now: Instant::now(),
        };
        world.reconnect(0);
        world
    }

    fn apply(&mut self, op: &Op) {
        self.truth.apply(op);
        match op {
            Op::Subscribe(name) => {
                self.wanted.insert(*name);
                self.client.subscribe(NAMES[*name].0, NAMES[*name].1);
            }
            Op::Unsubscribe(name) => {
                self.wanted.remove(name);
                self.client.unsubscribe(NAMES[*name].0, NAMES[*name].1);
                self.forget(NAMES[*name].1);
            }
            Op::Sync(id) => self.replicas[*id].sync(*id, &self.truth, self.now),
            Op::Reconnect(id) => self.reconnect(*id),
            Op::Restart(id) => {
                self.replicas[*id].collections.clear();
                self.replicas[*id].sync(*id, &self.truth, self.now);
                if self.at == *id {
                    self.reconnect(*id);
                }
            }
            Op::Deliver(n) => {
                for _ in 0..*n {
                    self.pump();
                    self.deliver();
                }
            }
            Op::Wait(seconds) => {
                self.now += Duration::from_secs(*seconds);
                for collection in self.replicas.iter().flat_map(|replica| replica.collections.values()) {
                    collection.prune(self.now);
                }
            }
            Op::Publish(..) | Op::Remove(..) | Op::Burst(..) | Op::Toggle(_) => {}
        }
    }

    fn reconnect(&mut self, id: usize) {
        self.at = id;
        self.streams += 1;
        self.stream = Stream::new(self.streams);
        self.to_server.clear();
        self.to_client.clear();
        self.client.disconnected();
        self.client.connected();
    }

    /// Both sides say what they have to say.
    fn pump(&mut self) {
        self.to_server.extend(std::iter::from_fn(|| self.client.next_request()));
        while let Some(response) = self.stream.next(&self.replicas[self.at], self.now) {
            self.to_client.push_back(response);
        }
    }

    /// One message arrives on each side.
    fn deliver(&mut self) {
        if let Some(request) = self.to_server.pop_front() {
            self.stream.receive(request).unwrap();
        }
        let Some(response) = self.to_client.pop_front() else { return };
        let mut gone = Vec::new();
        self.client.receive(response, &mut |change| {
            match change {
                Change::Update { name, body, .. } => {
                    let version: u32 = std::str::from_utf8(body).unwrap().parse().unwrap();
                    if is_refused(version) {
                        return Err("refused".to_owned());
                    }
                    self.kept.borrow_mut().insert(name.to_owned(), version);
                }
                Change::Removed { name, .. } => gone.push(name.to_owned()),
                Change::CollectionComplete { .. } => {}
            }
            Ok(())
        });
        // No name is both removed and updated in one response, so the order does not matter.
        gone.iter().for_each(|name| self.forget(name));
    }

    fn forget(&self, name: &str) {
        match name.strip_suffix('*') {
            Some(of) => self.kept.borrow_mut().retain(|name, _| !name.starts_with(of)),
            None => drop(self.kept.borrow_mut().remove(name)),
        }
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.pump();
            if self.to_server.is_empty() && self.to_client.is_empty() {
                return;
            }
            self.deliver();
        }
        panic!("client and server talk for ever");
    }

    fn check(&self) {
        let kept = self.kept.borrow();
        let mut want = self.truth.held(&self.wanted);
        // Of what the client refuses it may keep an older version, but not this one, and nothing else.
        want.retain(|name, version| version.is_some() || kept.contains_key(name));
        assert_eq!(kept.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
        for (name, version) in &*kept {
            assert!(!is_refused(*version), "{name} is kept in a version that was refused");
            assert!(want[name].is_none_or(|want| want == *version), "{name} is kept in an old version");
        }
        let held = ResourceType::ALL.into_iter().flat_map(|ty| self.client.held(ty).map(|(name, _)| name));
        assert_eq!(held.collect::<BTreeSet<_>>(), kept.keys().cloned().collect::<BTreeSet<_>>());
        for name in self.wanted.iter().filter(|name| is_collection(**name)) {
            let there = self.truth.collections.contains_key(name);
            assert_eq!(self.client.is_complete(NAMES[*name].1), there, "{}", NAMES[*name].1);
        }
        let Stats { mismatches, .. } = self.client.stats();
        assert_eq!(mismatches, 0, "a collection differed from what the server said");
    }
}

fn cases() -> u32 {
    let steps = std::env::var("WEFT_MODEL_STEPS").ok().and_then(|steps| steps.parse().ok());
    let steps: usize = steps.unwrap_or(10_000);
    u32::try_from(steps.div_ceil(STEPS_A_CASE)).unwrap().max(1)
}

#[test]
fn a_quiet_client_holds_what_the_server_has() {
    let config = ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() };
    let steps = config.cases as usize * STEPS_A_CASE;
    let run = |ops: Vec<Op>| {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
        }
        world.apply(&Op::Sync(world.at));
        world.settle();
        world.check();
        // And the heads that fall due find nothing to correct.
        world.now += HEAD_INTERVAL;
        world.settle();
        world.check();
        Ok(())
    };
    let held = TestRunner::new(config).run(&prop::collection::vec(op(), STEPS_A_CASE), run);
    held.unwrap_or_else(|violation| panic!("{violation}"));
    println!("figure: violations in {steps} steps of the model of subscriptions: 0 (bound 0)");
}
