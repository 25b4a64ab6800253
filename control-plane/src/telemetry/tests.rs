//! The store against one recorder, and against those who would fill it.

use super::{
    bounds::MAX_TEXT,
    edges::{EDGE_KEPT, MAX_EDGES_OF_ONE},
    history::{COARSE_KEPT, FINE, MAX_SERIES_OF_ONE},
    records::MAX_ATTEMPTS,
    sidecar::{MAX_APPLIED_TEXT, MAX_ENDPOINT_TEXT, MAX_ENDPOINTS_OF_ONE, MAX_NACKED},
    view::Quantiles,
    *,
};

fn reporter(n: u32) -> Reporter {
    Reporter {
        identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
        uid: PodUid::new(&format!("pod-{n}")).unwrap(),
    }
}

fn delta(route: &str, values: &[u64]) -> pb::RouteDelta {
    let mut histogram = histogram::empty();
    for value in values {
        histogram.record(*value).unwrap();
    }
    pb::RouteDelta {
        direction: Direction::Outbound as i32,
        parent: "shop/api:80".into(),
        route: route.into(),
        backend: "shop/api:80".into(),
        outcome: OutcomeClass::Ok as i32,
        count: values.len() as u64,
        first_byte: histogram::encode(&histogram).into(),
        duration: histogram::encode(&histogram).into(),
        retries: 0,
        protocol: "http1".into(),
    }
}

fn report(sequence: u64, routes: Vec<pb::RouteDelta>) -> pb::ReportRequest {
    pb::ReportRequest { sequence, session: "s".into(), routes, ..Default::default() }
}

const T0: u64 = 1_700_000_000_000;

#[test]
fn a_merge_of_many_sidecars_equals_one_recorder() {
    let mut store = Store::default();
    let mut one = histogram::empty();
    for pod in 0..10 {
        let values: Vec<u64> = (0..500).map(|n| 100 + n * 37 + u64::from(pod) * 1_001).collect();
        values.iter().for_each(|v| one.record(*v).unwrap());
        store.report(&reporter(pod), report(1, vec![delta("r", &values)]), T0 + u64::from(pod) * 1_000);
    }
    let rows = store.routes(&Filter::default(), Duration::from_secs(600), T0 + 30_000);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].count, 5_000);
    assert_eq!(rows[0].duration, Quantiles::of(&one));
    assert_eq!(rows[0].buckets.iter().map(|b| b.count).sum::<u64>(), 5_000);
}

#[test]
fn a_report_that_is_sent_again_is_counted_once() {
    let mut store = Store::default();
    assert_eq!(store.report(&reporter(1), report(1, vec![delta("r", &[5])]), T0), 1);
    assert_eq!(store.report(&reporter(1), report(1, vec![delta("r", &[5])]), T0), 1);
    assert_eq!(store.report(&reporter(1), report(2, vec![delta("r", &[5])]), T0), 2);
    assert_eq!(store.routes(&Filter::default(), FINE, T0)[0].count, 2);
    assert_eq!(store.repeated, 1);
    // A restarted sidecar counts from one again.
    let mut again = report(1, vec![delta("r", &[5])]);
    again.session = "t".into();
    store.report(&reporter(1), again, T0);
    assert_eq!(store.routes(&Filter::default(), FINE, T0)[0].count, 3);
}

#[test]
fn windows_forget_what_is_older() {
    let mut store = Store::default();
    store.report(&reporter(1), report(1, vec![delta("r", &[5; 10])]), T0);
    store.report(&reporter(1), report(2, vec![delta("r", &[5; 3])]), T0 + 120_000);
    let count = |store: &mut Store, window, at| {
        store.routes(&Filter::default(), Duration::from_secs(window), at).first().map_or(0, |row| row.count)
    };
    assert_eq!(count(&mut store, 10, T0 + 120_000), 3);
    assert_eq!(count(&mut store, 600, T0 + 120_000), 13);
    assert_eq!(count(&mut store, 3_600, T0 + 1_200_000), 13);
    assert_eq!(count(&mut store, 600, T0 + 1_200_000), 0);
    assert_eq!(count(&mut store, 3_600, T0 + 2 * 3_600_000), 0);
    assert_eq!(store.bytes(), 0);
}

#[test]
fn a_histogram_that_would_allocate_much_is_refused() {
    let mut store = Store::default();
    let mut lie = delta("r", &[5]);
    let mut bytes = lie.duration.to_vec();
    bytes[12..16].copy_from_slice(&5_u32.to_be_bytes());
    lie.duration = bytes.into();
    let mut long = delta("r", &[5]);
    let mut bytes = long.duration.to_vec();
    bytes[24..32].copy_from_slice(&u64::MAX.to_be_bytes());
    long.duration = bytes.into();
    let mut garbage = delta("r", &[5]);
    garbage.first_byte = vec![7; 41].into();
    store.report(&reporter(1), report(1, vec![lie, long, garbage]), T0);
    assert_eq!(store.refused, 3);
    assert!(store.routes(&Filter::default(), FINE, T0).is_empty());
}

#[test]
fn series_edges_and_bytes_are_bounded() {
    let mut store = Store::default();
    store.history.max_bytes = 2 * 1024 * 1024;
    let values: Vec<u64> = (1..2_000).map(|n| n * 500).collect();
    let template = delta("r", &values);
    for n in 0..4_u64 {
        let routes = (0..1_000).map(|m| pb::RouteDelta { route: format!("{n}-{m}"), ..template.clone() });
        let edge = |m| pb::Edge { caller_identity: format!("{n}-{m}"), count: 1, ..Default::default() };
        let mut report = report(n + 1, routes.collect());
        report.edges = (0..1_000).map(edge).collect();
        store.report(&reporter(1), report, T0 + n * 10_000);
    }
    store.routes(&Filter::default(), FINE, T0 + 400_000);
    assert!(store.history.series.ids.len() <= MAX_SERIES_OF_ONE + 8, "{}", store.history.series.ids.len());
    assert!(store.edges.all.len() <= MAX_EDGES_OF_ONE + 2);
    assert!(store.bytes() <= store.history.max_bytes, "{}", store.bytes());
    assert!(store.dropped > 0);
}

#[test]
fn what_one_sidecar_says_is_bounded_in_bytes() {
    let mut store = Store::default();
    let long = |n: usize| format!("{n:0>512}");
    let applied =
        (0..MAX_ITEMS).map(|n| pb::Applied { name: long(n), version: long(n), ..Default::default() });
    let endpoints = (0..MAX_ENDPOINTS_OF_ONE).map(|n| pb::EndpointState {
        uid: long(n),
        reason: long(n),
        ..Default::default()
    });
    let mut said = report(1, Vec::new());
    (said.applied, said.endpoints) = (applied.collect(), endpoints.collect());
    store.report(&reporter(1), said, T0);
    let sidecar = store.sidecars.values().next().unwrap();
    let text: usize =
        sidecar.applied.iter().map(|(key, version)| key.0.len() + key.1.len() + version.len()).sum();
    assert_eq!(text, sidecar.applied_text);
    assert!(text <= MAX_APPLIED_TEXT && text > MAX_APPLIED_TEXT - 2_048, "{text}");
    assert!(sidecar.endpoints.len() * 1_024 <= MAX_ENDPOINT_TEXT);
    assert!(store.dropped > 0);
}

#[test]
fn what_all_sidecars_say_is_kept_once_and_forgotten_with_the_last_of_them() {
    let mut store = Store::default();
    let say = |store: &mut Store, of: u32, sequence: u64, version: &str, now_ms: u64| {
        let applied = |n: u32| pb::Applied {
            type_url: "t".into(),
            name: format!("n{n}"),
            version: version.into(),
            removed: false,
        };
        let endpoint = |n: u32| pb::EndpointState {
            backend: "shop/api:80".into(),
            uid: format!("u{n}"),
            address: format!("10.0.0.{n}:80"),
            ..Default::default()
        };
        let (applied, endpoints) = ((0..20).map(applied).collect(), (0..10).map(endpoint).collect());
        store.report(
            &reporter(of),
            pb::ReportRequest { applied, endpoints, ..report(sequence, vec![delta("r", &[1])]) },
            now_ms,
        );
    };
    (0..50).for_each(|of| say(&mut store, of, 1, "v1", T0));
    // A type, twenty names, a version, ten endpoints.
    assert_eq!(store.texts.len(), 1 + 20 + 1 + 10);
    assert_eq!(store.applied("t", "n7").len(), 50);
    assert_eq!(store.endpoints().len(), 500);
    (0..50).for_each(|of| say(&mut store, of, 2, "v2", T0 + 60_000));
    store.forget_gone(T0 + 60_000);
    assert_eq!(store.texts.len(), 1 + 20 + 1 + 10, "nobody says v1 any more");
    assert_eq!(store.live(&reporter(3).uid, "t", "n7"), Some("v2"));
    store.forget_gone(T0 + 600_000);
    assert_eq!((store.texts.len(), store.applied("t", "n7").len()), (0, 0));
}

#[test]
fn applied_and_refused_follow_the_sidecars() {
    let mut store = Store::default();
    let applied = |version: &str| pb::Applied {
        type_url: "t".into(),
        name: "n".into(),
        version: version.into(),
        removed: false,
    };
    let mut first = report(1, vec![]);
    first.applied = vec![applied("v1")];
    store.report(&reporter(1), first, T0);
    let mut second = report(2, vec![]);
    second.nacked = vec![pb::Nacked {
        type_url: "t".into(),
        name: "n".into(),
        version: "v2".into(),
        reason: "no".into(),
    }];
    store.report(&reporter(1), second, T0);
    assert_eq!(store.applied("t", "n").into_values().collect::<Vec<_>>(), ["v1"]);
    assert_eq!(store.nacked().count(), 1);
    let mut third = report(3, vec![]);
    third.applied = vec![applied("v3")];
    store.report(&reporter(1), third, T0);
    assert_eq!(store.applied("t", "n").into_values().collect::<Vec<_>>(), ["v3"]);
    assert_eq!(store.nacked().count(), 0);
    store.forget_gone(T0 + 91_000);
    assert!(store.applied("t", "n").is_empty());
}

#[test]
fn filters_name_a_service_or_a_workload() {
    let mut store = Store::default();
    store.report(&reporter(1), report(1, vec![delta("r", &[5])]), T0);
    let rows = |store: &mut Store, service: Option<&str>, workload: Option<&str>| {
        let filter = Filter { service: service.map(str::to_owned), workload: workload.map(str::to_owned) };
        store.routes(&filter, FINE, T0).len()
    };
    assert_eq!(rows(&mut store, Some("shop/api"), None), 1);
    assert_eq!(rows(&mut store, Some("shop/api:80"), None), 1);
    assert_eq!(rows(&mut store, Some("shop/ap"), None), 0);
    assert_eq!(rows(&mut store, None, Some("shop")), 1);
    assert_eq!(rows(&mut store, None, Some("shop/api")), 0);
}

#[test]
fn a_sidecar_that_lies_fills_nothing_and_overflows_nothing() {
    let mut store = Store::default();
    let huge = "x".repeat(10_000);
    let names = |from: usize| {
        (from..from + MAX_ITEMS).map(|n| pb::Applied { name: format!("svc/a/{n}:80"), ..Default::default() })
    };
    for round in 0..3_u64 {
        let refused =
            (0..MAX_NACKED).map(|n| pb::Nacked { name: format!("{round}/{n}"), ..Default::default() });
        let attempt = pb::Attempt { endpoint: huge.clone(), outcome: huge.clone(), ..Default::default() };
        let record = pb::DecisionRecord {
            request_id: huge.clone(),
            reason: huge.clone(),
            attempts: vec![attempt; 30],
            ..Default::default()
        };
        let route = pb::RouteDelta { count: u64::MAX, retries: u64::MAX, ..delta("r", &[5]) };
        let edge = pb::Edge { count: u64::MAX, errors: u64::MAX, ..Default::default() };
        let lie = pb::ReportRequest {
            applied: names(usize::try_from(round).unwrap() * MAX_ITEMS).collect(),
            nacked: refused.collect(),
            records: vec![record],
            edges: vec![edge],
            endpoints: vec![pb::EndpointState { reason: huge.clone(), ..Default::default() }],
            gauges: Some(pb::Gauges { version: huge.clone(), ..Default::default() }),
            dropped: u64::MAX,
            ..report(round + 1, vec![route])
        };
        store.report(&reporter(1), lie, T0);
    }
    let row = &store.sidecars(T0)[0];
    assert_eq!((row.applied, row.nacked, row.dropped), (MAX_ITEMS, MAX_NACKED, u64::MAX));
    assert_eq!(row.version.len(), MAX_TEXT);
    assert_eq!(store.endpoints()[0].reason.len(), MAX_TEXT);
    let record = store.records().next().unwrap();
    assert_eq!((record.reason.len(), record.attempts.len()), (MAX_TEXT, MAX_ATTEMPTS));
    assert!(record.attempts.iter().all(|attempt| attempt.endpoint.len() == MAX_TEXT));
    assert_eq!(store.routes(&Filter::default(), FINE, T0)[0].count, u64::MAX);
    assert_eq!(store.edges()[0].count, u64::MAX);
    assert_eq!(store.dropped, 2 * (MAX_ITEMS + MAX_NACKED) as u64);
}

fn reporter_of(account: &str) -> Reporter {
    Reporter {
        identity: format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap(),
        uid: PodUid::new(&format!("{account}-1")).unwrap(),
    }
}

#[test]
fn one_workload_does_not_take_the_others_room() {
    let mut store = Store::default();
    let (hostile, honest) = (reporter_of("hostile"), reporter_of("honest"));
    // As much of everything as fits into its reports, in names and protocols of its own making.
    for sequence in 1..=3 {
        let routes = (0..MAX_ITEMS).map(|n| pb::RouteDelta {
            count: 1,
            protocol: format!("p{n}"),
            first_byte: bytes::Bytes::new(),
            duration: bytes::Bytes::new(),
            ..delta(&format!("{sequence}-{n}"), &[])
        });
        let edges = (0..MAX_ITEMS).map(|n| pb::Edge {
            caller_identity: format!("{sequence}-{n}"),
            service: format!("s{n}"),
            count: 1,
            ..Default::default()
        });
        let records =
            (0..MAX_ITEMS).map(|n| pb::DecisionRecord { request_id: n.to_string(), ..Default::default() });
        let flood = pb::ReportRequest {
            edges: edges.collect(),
            records: records.collect(),
            endpoints: vec![pb::EndpointState::default(); MAX_ITEMS],
            ..report(sequence, routes.collect())
        };
        store.report(&hostile, flood, T0);
        if sequence == 1 {
            let record = pb::DecisionRecord { request_id: "honest".into(), ..Default::default() };
            store.report(&honest, pb::ReportRequest { records: vec![record], ..report(1, vec![]) }, T0);
        }
    }
    let edge = pb::Edge { caller_identity: "friend".into(), count: 1, ..Default::default() };
    let own = pb::ReportRequest { edges: vec![edge], ..report(2, vec![delta("own", &[5])]) };
    store.report(&honest, own, T0);
    let rows = store.routes(&Filter { workload: Some("shop/honest".into()), ..Filter::default() }, FINE, T0);
    assert_eq!(rows.iter().map(|row| &*row.route).collect::<Vec<_>>(), ["own"]);
    let of = |rows: &[EdgeRow], callee: &str| rows.iter().filter(|e| e.callee.ends_with(callee)).count();
    let edges = store.edges();
    assert!(edges.iter().any(|e| e.caller == "friend"));
    assert!(of(&edges, "/hostile") <= MAX_EDGES_OF_ONE + 2, "{}", of(&edges, "/hostile"));
    assert!(store.history.series.ids.len() <= MAX_SERIES_OF_ONE + 10, "{}", store.history.series.ids.len());
    assert!(store.records().any(|record| record.request_id == "honest"));
    assert!(store.endpoints().len() <= MAX_ENDPOINTS_OF_ONE);
    assert!(store.dropped > 0);
    // What it would have counted is counted all the same.
    let hostile =
        store.routes(&Filter { workload: Some("shop/hostile".into()), ..Filter::default() }, FINE, T0);
    assert_eq!(hostile.iter().map(|row| row.count).sum::<u64>(), 3 * MAX_ITEMS as u64);
}

#[test]
fn one_workload_does_not_push_out_the_others_histograms() {
    let mut store = Store::default();
    store.history.max_bytes = 1024 * 1024;
    let (hostile, honest) = (reporter_of("hostile"), reporter_of("honest"));
    store.report(&honest, report(1, vec![delta("own", &[5, 50])]), T0);
    // Wide histograms, each its own series.
    let wide: Vec<u64> = (1..2_000).map(|n| n * 500).collect();
    let wide = delta("x", &wide);
    for sequence in 1..=12 {
        let routes = (0..50).map(|n| pb::RouteDelta { route: format!("{n}"), ..wide.clone() });
        store.report(&hostile, report(sequence, routes.collect()), T0 + sequence * 10_000);
    }
    let now = T0 + 130_000;
    let filter = |workload: &str| Filter { workload: Some(format!("shop/{workload}")), ..Filter::default() };
    let rows = store.routes(&filter("honest"), FINE * 60, now);
    assert_eq!(rows.iter().map(|row| row.count).collect::<Vec<_>>(), [2]);
    assert!(
        store.bytes() <= store.history.max_bytes && store.dropped > 0,
        "{} {}",
        store.bytes(),
        store.dropped
    );
    assert!(!store.routes(&filter("hostile"), FINE, now).is_empty(), "its newest are kept");
}

#[test]
fn what_nobody_reports_any_more_makes_room() {
    let mut store = Store::default();
    let names =
        |n: usize| (0..n).map(|n| pb::RouteDelta { count: 1, ..delta(&n.to_string(), &[]) }).collect();
    let edges = (0..100).map(|n| pb::Edge { caller_identity: n.to_string(), count: 1, ..Default::default() });
    let all = pb::ReportRequest { edges: edges.collect(), ..report(1, names(MAX_SERIES_OF_ONE)) };
    store.report(&reporter(1), all, T0);
    let later = T0 + (COARSE_KEPT + 2 * 60) * 1_000;
    store.report(&reporter(1), report(2, vec![delta("0", &[1])]), later);
    store.forget_gone(later);
    assert_eq!(store.history.series.ids.len(), 1);
    store.report(&reporter(1), report(3, vec![delta("another", &[1, 2])]), later);
    let rows = store.routes(&Filter::default(), FINE, later);
    let mut rows: Vec<_> = rows.iter().map(|row| (&*row.route, row.count)).collect();
    rows.sort_unstable();
    assert_eq!(rows, [("0", 1), ("another", 2)]);
    assert_eq!(store.edges().len(), 100, "who called yesterday is still of interest");
    store.forget_gone(T0 + u64::try_from(EDGE_KEPT.as_millis()).unwrap() + 1);
    assert!(store.edges().is_empty());
}
