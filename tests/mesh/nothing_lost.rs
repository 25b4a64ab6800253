//! Whatever is replaced, rotated or away while requests go on: none fails, none is done twice, none reaches the wrong
//! pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use weft_control_plane::cli::demo::mesh::{Mesh, Meshed, Options, Workload, wait};
use weft_core::ports;
use weft_harness::apps::{
    Loading, Served, Summary, curl, load, mesh_with, output, rss_kib, serve, service, start, start_load,
    testapp,
};

use crate::rotate_root;

const API: &str = "http://10.96.0.10/";
/// gRPC streams that are open at any time, in seconds each.
const STREAMS: &str = "8";
const STREAM_SECONDS: u64 = 2;

/// A service `api` of three backends, and a client that calls it all the time: HTTP/1.1, HTTP/2 and gRPC in turn, and
/// gRPC streams beside. Each request has an id, which both ends write down.
struct Busy {
    // Apps and sidecars end before the mesh that they live in.
    loading: Loading,
    client: Meshed,
    backends: Vec<Served>,
    /// A pod of another service, at an address that was a backend's.
    other: Option<Served>,
    made: u32,
    rate: u32,
    stream_seconds: u64,
    /// What clients saw that have ended.
    before: Vec<Summary>,
    mesh: Mesh,
}

impl Busy {
    fn start(test: &str, rate: u32, controller_args: &[&str]) -> Option<Self> {
        Self::with_streams(test, rate, STREAM_SECONDS, controller_args)
    }

    fn with_streams(test: &str, rate: u32, stream_seconds: u64, controller_args: &[&str]) -> Option<Self> {
        // As in a cluster: a pod is given the time that its streams need.
        let drain = format!("{}s", 25 + stream_seconds);
        let env = [
            ("WEFT_RENEW_SPREAD", "200ms"),
            ("WEFT_RECONNECT_CAP", "1s"),
            ("WEFT_DRAIN_TIMEOUT", drain.as_str()),
        ];
        let mesh = mesh_with(test, Options::with_env(&env).controller(controller_args))?;
        service(&mesh, "shop", "api", "10.96.0.10", &[("http", 80, 8080)]).unwrap();
        service(&mesh, "shop", "other", "10.96.0.11", &[("http", 80, 8080)]).unwrap();
        let backends = (1..=3).map(|n| backend(&mesh, n)).collect();
        let client = mesh.workload(Workload::new("shop", "client")).unwrap();
        let loading = loading(&mesh, &client, rate, stream_seconds);
        let busy = Self {
            loading,
            client,
            backends,
            other: None,
            made: 3,
            rate,
            stream_seconds,
            before: Vec::new(),
            mesh,
        };
        busy.more_answered();
        Some(busy)
    }

    /// Waits until as many more requests were answered as are sent in half a second.
    fn more_answered(&self) {
        let answered = || self.client.metric("weft_requests_total", &["direction=\"outbound\""]).unwrap();
        let before = answered();
        wait(Duration::from_secs(20), || Ok(answered() > before + f64::from(self.rate) / 2.0)).unwrap();
    }

    fn add(&mut self) {
        self.made += 1;
        self.backends.push(backend(&self.mesh, self.made));
    }

    /// Another pod takes the client's place: the sidecar drains, the app ends when it has what it asked for, then the
    /// sidecar ends.
    fn replace_client(&mut self) {
        self.made += 1;
        let named = Workload { name: format!("client-{}", self.made), ..Workload::new("shop", "client") };
        let client = self.mesh.workload(named).unwrap();
        let loading = loading(&self.mesh, &client, self.rate, self.stream_seconds);
        let mut old = std::mem::replace(&mut self.client, client);
        let ending = std::mem::replace(&mut self.loading, loading);
        self.more_answered();
        self.mesh.set_state(&old, true, true).unwrap();
        old.drain().unwrap();
        self.before.push(ending.finish().unwrap());
        old.proxy.signal(Signal::SIGTERM).unwrap();
        old.proxy.wait(Duration::from_secs(10)).unwrap();
        let (pod, name) = (old.pod.clone(), old.workload.name.clone());
        drop(old);
        self.mesh.world.remove(&pod);
        self.mesh.forget(&name).unwrap();
    }

    /// Deletes the oldest backend; gives the address that is free now.
    fn delete(&mut self) -> Ipv4Addr {
        let oldest = self.backends.remove(0);
        delete(&self.mesh, oldest)
    }

    /// The address of a deleted backend goes to a pod of another service.
    fn reuse(&mut self, freed: Ipv4Addr) {
        if let Some(before) = self.other.take() {
            delete(&self.mesh, before);
        }
        let mut other = Workload::new("shop", &format!("other-{}", self.made));
        other.ip = Some(freed);
        self.other = Some(serve(&self.mesh, other, &[]).unwrap());
    }

    fn sidecars(&self) -> Vec<&Meshed> {
        let served = self.backends.iter().chain(&self.other).map(|served| &served.sidecar);
        served.chain([&self.client]).collect()
    }

    fn renew(&self) {
        self.renewed_after("leaves", |mesh| drop(mesh.post("/api/v1/certs/rotate").unwrap()));
    }

    fn rotate_root(&self, step: &str) {
        self.renewed_after(step, |mesh| rotate_root(mesh, step));
    }

    /// Rotates, and waits until every sidecar has a certificate that is newer.
    fn renewed_after(&self, what: &str, rotate: impl FnOnce(&Mesh)) {
        let renewals = |meshed: &&Meshed| meshed.metric("weft_certificate_renewals_total", &["ok"]).unwrap();
        let sidecars = self.sidecars();
        let before: Vec<_> = sidecars.iter().map(renewals).collect();
        rotate(&self.mesh);
        wait(Duration::from_secs(30), || {
            Ok(sidecars.iter().zip(&before).all(|(meshed, before)| renewals(meshed) > *before))
        })
        .unwrap_or_else(|error| panic!("not everybody renewed after {what}: {error}"));
    }

    fn trusts(&self, roots: f64) {
        let trusted = |meshed: &&Meshed| meshed.metric("weft_trust_roots", &[]).unwrap();
        let sidecars = self.sidecars();
        wait(Duration::from_secs(30), || Ok(sidecars.iter().all(|meshed| trusted(meshed) == roots)))
            .unwrap_or_else(|error| panic!("not everybody trusts {roots} roots: {error}"));
    }

    /// A → A+B → B, each step when everybody has followed the one before.
    fn replace_root(&self) {
        self.rotate_root("add");
        self.trusts(2.0);
        self.rotate_root("activate");
        self.retire_root();
    }

    fn retire_root(&self) {
        rotate_root(&self.mesh, "retire");
        self.trusts(1.0);
    }

    /// Ends the load and compares what both ends wrote down. `what` goes into the figure.
    fn nothing_lost(self, what: &str) {
        self.more_answered();
        let Self { loading, client, backends, other, rate, mesh, mut before, .. } = self;
        before.push(loading.finish().unwrap());
        let read = |name: &str| fs::read_to_string(mesh.dir().join(name)).unwrap_or_default();
        let (sent, arrived) = (read("sent"), read("seen"));
        let mut times = BTreeMap::<&str, u32>::new();
        for id in arrived.lines() {
            *times.entry(id).or_default() += 1;
        }
        let posts = sent.lines().filter(|line| line.contains(" POST "));
        let posts: BTreeSet<&str> = posts.filter_map(|line| line.split(' ').next()).collect();
        let twice = posts.iter().filter(|id| times.get(*id).copied().unwrap_or(0) > 1).count();
        // Both ends have written down what they did, in the form that is read here.
        assert!(!posts.is_empty() && posts.iter().any(|id| times.contains_key(id)), "{posts:?} {times:?}");
        let wrong = before.iter().flat_map(|summary| summary.served_by.keys());
        let wrong = wrong.filter(|by| !by.is_empty() && !by.starts_with("api-")).count();
        let sum = |of: fn(&Summary) -> u64| before.iter().map(of).sum::<u64>();
        let (sent, failed) = (sum(|summary| summary.sent), sum(|summary| summary.failed));
        let (ended, broken) = (sum(|summary| summary.streams.ended), sum(|summary| summary.streams.failed));
        let longest = before.iter().map(|summary| summary.streams.longest_s).fold(0.0, f64::max);
        println!(
            "figure: {what} at {rate}/s of HTTP/1.1, HTTP/2 and gRPC, two thirds with a body: {failed} of {sent} failed (bound 0), {twice} POSTs done twice (bound 0), {wrong} wrong pods (bound 0)"
        );
        println!(
            "figure: {what}: {broken} of {} gRPC streams of up to {longest:.0} s broken off (bound 0)",
            ended + broken
        );
        assert_eq!((failed, broken), (0, 0), "{before:?}");
        assert_eq!((twice, wrong), (0, 0), "{before:?}");
        assert!(ended > 0, "{before:?}");
        drop((client, backends, other));
    }
}

/// The client's app.
fn loading(mesh: &Mesh, client: &Meshed, rate: u32, stream_seconds: u64) -> Loading {
    let (rate, seconds, sent) = (rate.to_string(), stream_seconds.to_string(), mesh.dir().join("sent"));
    let mut args = vec!["--url", API, "--rate", &rate, "--seconds", "36000", "--half-post"];
    args.extend(["--kinds", "h1,h2,grpc", "--streams", STREAMS, "--stream-seconds", &seconds]);
    args.extend(["--ids", sent.to_str().unwrap()]);
    start_load(mesh, &client.pod, &args).unwrap()
}

fn backend(mesh: &Mesh, n: u32) -> Served {
    let seen = mesh.dir().join("seen");
    // Half of the apps end at once on SIGTERM, the others finish what they have.
    let habit = if n.is_multiple_of(2) { "exit" } else { "drain" };
    let args = ["--ids", seen.to_str().unwrap(), "--on-term", habit, "--delay-ms", "5"];
    serve(mesh, Workload::new("shop", &format!("api-{n}")), &args).unwrap()
}

/// What Kubernetes does to a pod that is deleted, in its order: the endpoint is terminating and the preStop hook
/// runs at t = 0, the app gets SIGTERM when the hook has ended, the sidecar when the app has.
fn delete(mesh: &Mesh, mut served: Served) -> Ipv4Addr {
    mesh.set_state(&served.sidecar, true, true).unwrap();
    served.sidecar.drain().unwrap();
    served.app.signal(Signal::SIGTERM).unwrap();
    served.app.wait(Duration::from_secs(10)).unwrap();
    served.sidecar.proxy.signal(Signal::SIGTERM).unwrap();
    served.sidecar.proxy.wait(Duration::from_secs(10)).unwrap();
    let (ip, name) = (served.sidecar.pod.ip, served.sidecar.workload.name.clone());
    let pod = served.sidecar.pod.clone();
    drop(served);
    mesh.world.remove(&pod);
    mesh.forget(&name).unwrap();
    ip
}

#[test]
fn rolling_restarts_lose_nothing_and_repeat_nothing() {
    rolling_restarts(4, 250);
}

#[test]
#[ignore = "soak: takes about four minutes; `make soak`"]
fn soak_twenty_rolling_restarts_at_500_a_second() {
    rolling_restarts(20, 500);
}

fn rolling_restarts(rounds: u32, rate: u32) {
    let Some(mut busy) = Busy::start("rolling_restarts", rate, &[]) else { return };
    for _ in 0..rounds {
        for place in 0..3 {
            busy.add();
            let freed = busy.delete();
            if place == 0 {
                busy.reuse(freed);
            }
        }
    }
    busy.nothing_lost(&format!("{rounds} rolling restarts of 3 backends"));
}

#[test]
fn both_sidecars_restart_while_streams_are_open_and_none_is_broken_off() {
    both_restart(1, 2);
}

#[test]
#[ignore = "soak: takes five minutes; `make soak`"]
fn soak_both_sidecars_restart_while_streams_of_half_a_minute_are_open() {
    both_restart(2, 30);
}

fn both_restart(rounds: u32, stream_seconds: u64) {
    let Some(mut busy) = Busy::with_streams("both_restart", 150, stream_seconds, &[]) else { return };
    for _ in 0..rounds {
        for _ in 0..3 {
            busy.add();
            busy.delete();
        }
        busy.replace_client();
    }
    busy.nothing_lost(&format!("{rounds} times every backend and the client replaced, sidecars too"));
}

#[test]
fn leaves_and_roots_are_replaced_under_load_and_nothing_is_lost() {
    rotations(2, Duration::ZERO);
}

#[test]
#[ignore = "soak: takes ten minutes; `make soak`"]
fn soak_leaves_are_replaced_every_twenty_seconds_for_ten_minutes_and_roots_between() {
    rotations(30, Duration::from_secs(20));
}

/// A root's three steps are taken in the middle.
fn rotations(times: u32, every: Duration) {
    let Some(busy) = Busy::start("rotations", 200, &[]) else { return };
    for n in 0..times {
        let begun = Instant::now();
        if n == times / 2 {
            busy.replace_root()
        } else {
            busy.renew()
        }
        busy.more_answered();
        std::thread::sleep(every.saturating_sub(begun.elapsed()));
    }
    let leaves = times - 1;
    busy.nothing_lost(&format!("{leaves} times all leaves and once the root replaced"));
}

#[test]
fn the_issuer_may_be_away_for_most_of_a_certificates_life() {
    issuer_away(15);
}

#[test]
#[ignore = "soak: takes two minutes; `make soak`"]
fn soak_the_issuer_is_away_for_most_of_a_long_certificates_life() {
    issuer_away(120);
}

fn issuer_away(life: u64) {
    let life_text = format!("{life}s");
    let Some(busy) = Busy::start("issuer_away", 100, &["--certificate-lifetime", &life_text]) else { return };
    busy.renew();
    let begun = Instant::now();
    let port = ports::IDENTITY.to_string();
    let refuse = |what: &str| {
        let rule =
            [what, "INPUT", "-p", "tcp", "--dport", &port, "-j", "REJECT", "--reject-with", "tcp-reset"];
        output(busy.mesh.controller_pod.command("iptables").args(rule)).unwrap();
    };
    refuse("-I");
    std::thread::sleep(Duration::from_secs_f64(life as f64 * 0.8).saturating_sub(begun.elapsed()));
    let failed =
        |meshed: &&Meshed| meshed.metric("weft_certificate_renewals_total", &["failed"]).unwrap() > 0.0;
    assert!(busy.sidecars().iter().all(failed), "nobody has noticed");
    refuse("-D");
    // Nobody's certificate of before is good any more when this ends.
    std::thread::sleep(Duration::from_secs(life + 1).saturating_sub(begun.elapsed()));
    busy.nothing_lost(&format!("the issuer away for 80 % of a certificate's {life} s"));
}

/// Writes files of a mesh's folder for as long as it is told to, from a thread beside the test's own.
struct Churn<'a> {
    source: PathBuf,
    stop: &'a AtomicBool,
    writes: &'a AtomicU64,
}

impl Churn<'_> {
    fn write(&self, file: &str, object: &serde_json::Value) {
        let temporary = self.source.with_file_name(format!("{file}.churn"));
        fs::write(&temporary, format!("{object:#}\n")).unwrap();
        fs::rename(&temporary, self.source.join(file)).unwrap();
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// A hundred times a second, who may do what, and where it goes. `who` names the policy that says who may.
    fn policies(&self, who: &str) {
        let (began, mut n) = (Instant::now(), 0);
        while !self.stop.load(Ordering::Relaxed) {
            match n % 3 {
                0 => self.write(
                    &format!("authz-{who}.yaml"),
                    &authorization(who, if n % 2 == 0 { &["/more"] } else { &[] }),
                ),
                1 => self.write("policy.yaml", &traffic_policy(n)),
                _ => self.write("route.yaml", &route(n)),
            }
            n += 1;
            std::thread::sleep((Duration::from_millis(10) * n).saturating_sub(began.elapsed()));
        }
    }

    /// Ten endpoints, a thousand, and ten again, within five seconds.
    fn endpoints(&self) {
        let mut many = false;
        while !self.stop.load(Ordering::Relaxed) {
            many = !many;
            for slice in 0..10 {
                self.write(
                    &format!("slice-{slice}.yaml"),
                    &endpoint_slice(slice, if many { 100 } else { 1 }),
                );
            }
            std::thread::sleep(Duration::from_millis(2_500));
        }
    }
}

/// `/` is allowed by each, `/private` by none.
fn authorization(name: &str, more: &[&str]) -> serde_json::Value {
    let paths = [&["/", "/public/*"], more].concat();
    serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"selector": {"matchLabels": {"app": "api"}}, "action": "Allow",
                 "rules": [{"from": [{"identities": ["spiffe://cluster.local/ns/shop/sa/client"]}],
                            "to": [{"paths": paths}]}]},
    })
}

fn traffic_policy(n: u32) -> serde_json::Value {
    serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {"namespace": "shop", "name": "api"},
        "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "api"}],
                 "retries": {"maxRetries": 1 + n % 3}},
    })
}

fn route(n: u32) -> serde_json::Value {
    serde_json::json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "api"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "api"}],
                 "rules": [{"backendRefs": [{"name": "api", "port": 80}],
                            "filters": [{"type": "RequestHeaderModifier",
                                         "requestHeaderModifier": {"set": [{"name": "x-route", "value": n.to_string()}]}}]}]},
    })
}

fn endpoint_slice(slice: u32, endpoints: u32) -> serde_json::Value {
    let endpoint = |n: u32| serde_json::json!({"addresses": [format!("198.18.{slice}.{}", n + 1)], "conditions": {"ready": true}});
    serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "shop", "name": format!("many-{slice}"),
                     "labels": {"kubernetes.io/service-name": "many"}},
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}

#[test]
fn policies_may_be_replaced_all_the_time_and_no_decision_is_wrong() {
    policy_churn(4);
}

#[test]
#[ignore = "soak: takes a minute; `make soak`"]
fn soak_policies_are_replaced_for_a_minute() {
    policy_churn(60);
}

fn policy_churn(seconds: u64) {
    let Some(busy) = Busy::start("policy_churn", 100, &[]) else { return };
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let churn = Churn { source: busy.mesh.source(), stop: &stop, writes: &writes };
    let apply = |paths: &[&str]| {
        let status = busy.mesh.api("/api/v1/status").unwrap();
        let ours = |o: &&serde_json::Value| o["kind"] == "AuthorizationPolicy" && o["name"] == "api";
        let before = status["objects"].as_array().unwrap().iter().find(ours).map(|o| o["version"].clone());
        churn.write("authz-api.yaml", &authorization("api", paths));
        let mut args = vec!["wait", "AuthorizationPolicy/shop/api", "--applied", "--timeout", "20s"];
        if let Some(before) = before.as_ref().and_then(|version| version.as_str()) {
            args.extend(["--after", before]);
        }
        output(&mut busy.mesh.weft(&args)).unwrap();
    };
    apply(&[]);
    let private = format!("{API}private");
    let (begun, seconds_text) = (Instant::now(), seconds.to_string());
    let denied = std::thread::scope(|scope| {
        scope.spawn(|| churn.policies("api"));
        let args = ["--url", &private, "--rate", "100", "--seconds", &seconds_text, "--connections", "8"];
        let denied = load(&busy.mesh, &busy.client.pod, &args);
        stop.store(true, Ordering::Relaxed);
        denied.unwrap()
    });
    let per_second = writes.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    assert_eq!(denied.statuses, BTreeMap::from([("403".to_owned(), denied.sent)]), "{denied:?}");
    let code = |url: &str| curl(&busy.client.pod, &["-o", "/dev/null", "-w", "%{http_code}", url]).unwrap();
    // The last of all those must have been read before another is waited for.
    churn.write("authz-api.yaml", &authorization("api", &["/done"]));
    let done = format!("{API}done");
    wait(Duration::from_secs(20), || Ok(code(&done) == "200")).unwrap();
    // What is said to be live is: at once, and at every backend, while others are replaced.
    let (extra, changes) = (format!("{API}extra"), 6 + seconds / 2);
    stop.store(false, Ordering::Relaxed);
    let wrong: usize = std::thread::scope(|scope| {
        scope.spawn(|| churn.policies("beside"));
        let _stops = Stops(&stop);
        let decided = |n| {
            let allowed = n % 2 == 0;
            apply(if allowed { &["/extra"] } else { &[] });
            (0..6).filter(|_| code(&extra) != if allowed { "200" } else { "403" }).count()
        };
        (0..changes).map(decided).sum()
    });
    println!(
        "figure: policies written {per_second:.0} times a second for {seconds} s: of {} requests that none of them allows {} were let through (bound 0); of {} decisions after {changes} of the changes were live {wrong} were wrong (bound 0)",
        denied.sent,
        denied.ok,
        changes * 6
    );
    assert_eq!(wrong, 0);
    busy.nothing_lost("policies replaced all the time, each of which allows this");
}

#[test]
fn endpoints_may_come_and_go_by_the_thousand_and_nothing_is_lost() {
    endpoint_churn(6);
}

#[test]
#[ignore = "soak: takes a minute; `make soak`"]
fn soak_endpoints_come_and_go_for_a_minute() {
    endpoint_churn(60);
}

fn endpoint_churn(seconds: u64) {
    let Some(busy) = Busy::start("endpoint_churn", 50, &[]) else { return };
    let _app = thousand_addresses(&busy.mesh);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let churn = Churn { source: busy.mesh.source(), stop: &stop, writes: &writes };
    for slice in 0..10 {
        churn.write(&format!("slice-{slice}.yaml"), &endpoint_slice(slice, 1));
    }
    let many = "http://10.96.0.20/";
    wait(Duration::from_secs(10), || Ok(curl(&busy.client.pod, &[many]).is_ok_and(|said| said == "ok")))
        .unwrap();
    let seen = || {
        let seen = busy.mesh.api("/api/v1/endpoints?service=shop/many").unwrap();
        seen["rows"].as_array().map_or(0, Vec::len)
    };
    let (mut largest, seconds_text) = (0, seconds.to_string());
    let summary = std::thread::scope(|scope| {
        scope.spawn(|| churn.endpoints());
        let args = ["--url", many, "--rate", "200", "--seconds", &seconds_text, "--half-post"];
        let mut loading = start_load(&busy.mesh, &busy.client.pod, &args).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(seconds) {
            largest = largest.max(seen());
            std::thread::sleep(Duration::from_millis(100));
        }
        let summary = loading.collect();
        stop.store(true, Ordering::Relaxed);
        summary.unwrap()
    });
    println!(
        "figure: 10, {largest} and 10 endpoints within 5 s, again and again for {seconds} s: {} of {} failed (bound 0)",
        summary.failed, summary.sent
    );
    assert_eq!(summary.failed, 0, "{summary:?}");
    assert!(largest >= 1_000, "{largest}");
    busy.nothing_lost("another service whose endpoints come and go");
}

/// A pod without a sidecar that answers at each of a thousand addresses, and a service `many` without a selector.
fn thousand_addresses(mesh: &Mesh) -> weft_control_plane::cli::demo::netns::Process {
    let pod = mesh.world.pod("thousand").unwrap();
    output(pod.command("ip").args(["route", "add", "local", "198.18.0.0/16", "dev", "lo"])).unwrap();
    let via = pod.ip.to_string();
    output(mesh.world.bridge().command("ip").args(["route", "add", "198.18.0.0/16", "via", &via])).unwrap();
    let app = start(&mut testapp(mesh, &pod, &["http", "--port", "8080", "--name", "thousand"]), &pod, 8080);
    let object = serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "many"},
        "spec": {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"],
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    });
    mesh.write("service-many.yaml", &format!("{object:#}\n")).unwrap();
    app.unwrap()
}

#[test]
fn everything_at_once_loses_nothing() {
    all_at_once(Duration::ZERO, Duration::from_secs(1), 150);
}

#[test]
#[ignore = "soak: takes ten minutes; `make soak`"]
fn soak_everything_at_once_for_ten_minutes() {
    all_at_once(Duration::from_secs(600), Duration::from_secs(10), 500);
}

/// Backends and roots are replaced and the controller, which is the issuer, is killed, while others replace policies
/// and endpoints all the time: rounds of all of it for so long, but one at least.
fn all_at_once(long: Duration, away: Duration, rate: u32) {
    let Some(mut busy) = Busy::start("all_at_once", rate, &["--certificate-lifetime", "60s"]) else { return };
    let _app = thousand_addresses(&busy.mesh);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let source: &Path = &busy.mesh.source();
    let begun = Instant::now();
    let mut rounds = 0;
    std::thread::scope(|scope| {
        let churn = || Churn { source: source.to_owned(), stop: &stop, writes: &writes };
        let (policies, endpoints) = (churn(), churn());
        scope.spawn(move || policies.policies("api"));
        scope.spawn(move || endpoints.endpoints());
        // The others end too when this does not go well.
        let _stops = Stops(&stop);
        loop {
            rounds += 1;
            busy.rotate_root("add");
            busy.trusts(2.0);
            let freed = busy.delete();
            busy.mesh.kill_controller().unwrap();
            std::thread::sleep(away);
            busy.mesh.start_controller().unwrap();
            busy.add();
            busy.reuse(freed);
            busy.rotate_root("activate");
            busy.retire_root();
            if begun.elapsed() >= long {
                break;
            }
        }
    });
    let (seconds, writes) = (begun.elapsed().as_secs(), writes.load(Ordering::Relaxed));
    busy.nothing_lost(&format!(
        "{rounds} times a backend and the root replaced and the controller killed in {seconds} s, with {writes} changes of policies and endpoints"
    ));
}

#[test]
#[ignore = "soak: takes ten minutes, or WEFT_SOAK_HOURS; `make soak`"]
fn soak_memory_and_descriptors_stay_as_they_are_for_hours() {
    let hours = std::env::var("WEFT_SOAK_HOURS").ok().map(|hours| hours.parse::<f64>().unwrap());
    let long = Duration::from_secs_f64(hours.unwrap_or(1.0 / 6.0) * 3_600.0);
    let Some(busy) = Busy::start("hours", 500, &[]) else { return };
    let began = Instant::now();
    // Every hour, or eight times where there is less.
    let every = (long / 8).min(Duration::from_secs(3_600));
    let mut rotations = 0;
    let mut samples: Vec<Vec<(f64, f64, usize)>> = vec![Vec::new(); busy.sidecars().len()];
    while began.elapsed() < long {
        if began.elapsed() >= every * (rotations + 1) {
            rotations += 1;
            busy.renew();
        }
        let at = began.elapsed().as_secs_f64() / 3_600.0;
        for (sidecar, samples) in busy.sidecars().iter().zip(&mut samples) {
            let id = sidecar.proxy.id();
            let descriptors = fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
            samples.push((at, rss_kib(id).unwrap() as f64 / 1_024.0, descriptors));
        }
        std::thread::sleep((long / 400).min(Duration::from_secs(60)));
    }
    let names: Vec<_> = busy.sidecars().iter().map(|sidecar| sidecar.workload.name.clone()).collect();
    for (name, samples) in names.iter().zip(&samples) {
        // What is learnt and filled once is no growth: all but the first quarter counts.
        let settled = &samples[samples.len() / 4..];
        let (slope, grown) = (slope(settled), settled.last().unwrap().1 - settled[0].1);
        let half = |half: &[(f64, f64, usize)]| half.iter().map(|sample| sample.2).max().unwrap();
        let (before, after) = settled.split_at(settled.len() / 2);
        let (before, after) = (half(before), half(after));
        println!(
            "figure: {name} for {:.1} h at 500/s in all, {rotations} rotations: {slope:+.2} MiB/h in memory (bound 1, from an hour on), {:.1} MiB at the end, at most {after} descriptors (bound {})",
            long.as_secs_f64() / 3_600.0,
            settled.last().unwrap().1,
            before + 8
        );
        // A slope of minutes is noise: an allocator takes and gives back more than that at once.
        assert!(
            if long < Duration::from_secs(3_600) { grown < 1.0 } else { slope < 1.0 },
            "{name}: {samples:?}"
        );
        assert!(after <= before + 8, "{name}: {samples:?}");
    }
    busy.nothing_lost(&format!("{:.1} h with {rotations} rotations", long.as_secs_f64() / 3_600.0));
}

/// Of the straight line through the first two of each, by least squares.
fn slope(samples: &[(f64, f64, usize)]) -> f64 {
    let n = samples.len() as f64;
    let (x, y) = samples.iter().fold((0.0, 0.0), |(x, y), sample| (x + sample.0 / n, y + sample.1 / n));
    let (over, under) = samples.iter().fold((0.0, 0.0), |(over, under), sample| {
        (over + (sample.0 - x) * (sample.1 - y), under + (sample.0 - x).powi(2))
    });
    over / under
}

struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
