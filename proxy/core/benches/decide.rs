//! What one decision costs. `cargo bench -p weft-core`.
//!
//! The targets (both sidecars at about 24 µs a request): 100 route and 100 authorization rules within 5 %
//! of none, 1,000 authorization rules within 20 µs, a pick that does not grow with the endpoints.

#![expect(clippy::unwrap_used, reason = "a bench has nobody to tell")]

use std::{
    cell::RefCell,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use divan::{Bencher, black_box};
use http::{HeaderMap, Method};
use rand::{SeedableRng, rngs::SmallRng};
use weft_core::{
    authz::{Ask, Peer, authorize},
    balance::Balancer,
    budget::{Budget, BudgetParams},
    classify::Outcome,
    detect::detect,
    framing::{Framing, HeadLimits, Side},
    identity::{PodUid, SpiffeId},
    policy::{
        Action, Algorithm, Authorization, AuthzRule, AuthzRules, BackendPolicy, BackendRef, Endpoint,
        HttpMatch, Match, ObjectRef, PathMatch, RetryPolicy, RouteTable, Rule, Service, ServiceName,
        SourceMatch, StringMatch, Timeouts,
    },
    route::{RequestHead, find, pick_backend},
};

fn main() {
    divan::main();
}

fn object() -> ObjectRef {
    ObjectRef { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "web".into() }
}

fn rule(matches: Vec<Match>) -> Rule {
    let service = ServiceName { namespace: "shop".into(), name: "web".into(), port: 80 };
    let backend = |backend| BackendRef { service: service.clone(), backend, weight: 50, filters: vec![] };
    Rule {
        object: object(),
        name: "0".into(),
        label: "HTTPRoute/shop/web/0".into(),
        hosts: vec![],
        matches,
        filters: vec![],
        backends: vec![backend(0), backend(1)],
        timeouts: Timeouts::default(),
        retry: RetryPolicy::default(),
        created: 0,
    }
}

/// The last of `n` prefixes matches; one rule is the match-all rule.
#[divan::bench(args = [1, 10, 100, 1000])]
fn route(bencher: Bencher<'_, '_>, n: usize) {
    let prefix = |i: usize| Match {
        path: Some(PathMatch::Prefix(format!("/api/v1/resource-{i:04}").into())),
        ..Match::default()
    };
    let mut rules: Vec<_> = (1..n).map(|i| rule(vec![prefix(i)])).collect();
    rules.push(rule(vec![]));
    let table = RouteTable::new(rules);
    let path = format!("/api/v1/resource-{:04}/items/7", n - 1);
    let headers = HeaderMap::new();
    let head =
        RequestHead { method: &Method::GET, host: "web.shop", path: &path, query: None, headers: &headers };
    bencher.bench_local(|| find(black_box(&table), black_box(&head)).map(|found| found.index));
}

#[divan::bench]
fn weighted_backend(bencher: Bencher<'_, '_>) {
    let rule = rule(vec![]);
    let mut rng = SmallRng::seed_from_u64(1);
    bencher.bench_local(|| pick_backend(black_box(&rule), &mut rng).map(|backend| backend.backend));
}

/// Pick, first byte, finish.
#[divan::bench(args = [1, 10, 1000, 10000], consts = [0, 1])]
fn pick<const ROUND_ROBIN: usize>(bencher: Bencher<'_, '_>, n: u16) {
    let name = ServiceName { namespace: "shop".into(), name: "web".into(), port: 80 };
    let mut service = Service::new(name);
    if ROUND_ROBIN == 1 {
        service.load_balancing.algorithm = Algorithm::RoundRobin;
    }
    let mut balancer = Balancer::new(&service.load_balancing, &service.health);
    let endpoint = |i: u16| {
        let address = SocketAddr::from(([10, 0, (i >> 8) as u8, i as u8], 80));
        Arc::new(Endpoint::new(PodUid::new(&format!("pod-{i}")).unwrap(), address))
    };
    let endpoints = (0..n).map(endpoint).collect();
    let policy =
        BackendPolicy { service: Arc::new(service), endpoints, generation: 1, resolved: true, client: 0 };
    let start = origin();
    balancer.update(&policy, start);
    let world = RefCell::new((balancer, start, SmallRng::seed_from_u64(1)));
    bencher.bench_local(|| {
        let (balancer, now, rng) = &mut *world.borrow_mut();
        let mut lease = balancer.pick(&[], *now, rng).unwrap();
        *now += Duration::from_micros(100);
        lease.first_byte(*now);
        lease.finish(Outcome::Success, *now)
    });
}

/// The last of `n` rules allows. (Other kinds of rules: the unit tests of `authz`.)
#[divan::bench(args = [0, 1, 10, 100, 1000])]
fn authz(bencher: Bencher<'_, '_>, n: usize) {
    let id = |i: usize| format!("spiffe://cluster.local/ns/shop/sa/caller-{i:04}");
    let rule = |i: usize| AuthzRule {
        object: object(),
        action: Action::Allow,
        sources: vec![SourceMatch { identity: Some(StringMatch::Exact(id(i).into())), ..Default::default() }],
        http: vec![HttpMatch {
            methods: vec![Method::GET],
            paths: vec![StringMatch::Prefix("/api/".into())],
            ..Default::default()
        }],
    };
    let rules = AuthzRules::from((0..n).map(rule).collect::<Vec<_>>()).indexed();
    let policy = Authorization { default: Action::Deny, rules, generation: 1 };
    let caller: SpiffeId = id(n.saturating_sub(1)).parse().unwrap();
    let peer = Peer { identity: Some(&caller), address: [10, 0, 0, 1].into() };
    let headers = HeaderMap::new();
    let ask =
        Ask::Http { method: &Method::GET, host: "web.shop", path: "/api/v1/items/7", headers: &headers };
    bencher.bench_local(|| authorize(black_box(&policy), black_box(&peer), black_box(&ask)).is_permit());
}

/// A usual head, followed before it is parsed.
#[divan::bench(args = [0, 2, 8])]
fn follow_head(bencher: Bencher<'_, '_>, more: usize) {
    let mut head = String::from("GET /api/v1/items/7 HTTP/1.1\r\nHost: web.shop\r\n");
    for n in 0..more {
        head.push_str(&format!("x-header-{n}: a value of some thirty letters\r\n"));
    }
    head.push_str("\r\n");
    let mut framing = Framing::new(Side::Requests, HeadLimits { bytes: 65_536, fields: 200 });
    bencher.bench_local(|| framing.feed(black_box(head.as_bytes())).unwrap());
}

#[divan::bench]
fn detect_http1(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| detect(black_box(b"GET /api/v1/items/7 HTTP/1.1\r\nHost: web\r\n\r\n")));
}

#[divan::bench]
fn detect_http2(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| detect(black_box(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")));
}

#[divan::bench]
fn parse_identity(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| black_box("spiffe://cluster.local/ns/shop/sa/web").parse::<SpiffeId>());
}

#[divan::bench]
fn budget(bencher: Bencher<'_, '_>) {
    let now = origin();
    let budget = Budget::new(BudgetParams::default(), now);
    bencher.bench_local(|| {
        budget.deposit(now);
        budget.try_withdraw(now)
    });
}

#[expect(clippy::disallowed_methods, reason = "the origin of virtual time")]
fn origin() -> Instant {
    Instant::now()
}
