//! What breaks without a word: killed backends, cut and lossy networks, addresses that swallow packets. Losses are
//! bounded, and each has a name.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use weft_control_plane::cli::demo::{
    mesh::{Mesh, Meshed, Workload, wait},
    netns::Pod,
};
use weft_core::ports;
use weft_harness::{
    apps::{Served, curl, load, mesh_or_skip, output, serve, service, start, start_load, testapp},
    link::{Link, Weather},
};

use crate::{ECHO, pair};

const API: &str = "http://10.96.0.10";

struct Three {
    client: Meshed,
    backends: Vec<Served>,
    mesh: Mesh,
}

/// A client and a service `api` of three backends.
fn three(test: &str, args: &[&str]) -> Option<Three> {
    let mesh = mesh_or_skip(test)?;
    service(&mesh, "shop", "api", "10.96.0.10", &[("http", 80, 8080)]).unwrap();
    let backend = |n: u32| serve(&mesh, Workload::new("shop", &format!("api-{n}")), args).unwrap();
    let backends = (1..=3).map(backend).collect();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    Some(Three { client, backends, mesh })
}

/// Gives callers of the three a policy, and waits until it is live.
fn keeps_to(three: &Three, spec: serde_json::Value) {
    crate::policy(&three.mesh, "api", spec);
    let mut wait_applied = three.mesh.weft(&["wait", "TrafficPolicy/shop/api", "--applied"]);
    curl(&three.client.pod, &[API]).unwrap();
    output(&mut wait_applied).unwrap();
}

/// What is idempotent is sent again when its answer was cut off.
fn retry_on_reset(three: &Three) {
    keeps_to(three, serde_json::json!({"retries": {"onReset": true, "maxRetries": 2}}));
}

/// From now on no packet reaches the pod or leaves it; nobody is told.
fn cut(pod: &Pod) {
    for chain in ["INPUT", "OUTPUT"] {
        let rule = ["-I", chain, "!", "-i", "lo", "-j", "DROP"];
        let rule = if chain == "OUTPUT" { ["-I", chain, "!", "-o", "lo", "-j", "DROP"] } else { rule };
        output(pod.command("iptables").args(rule)).unwrap();
    }
}

/// How many lines of an id file are of this kind and outcome.
fn counted(ids: &Path, what: &str) -> usize {
    std::fs::read_to_string(ids).unwrap().lines().filter(|line| line.ends_with(what)).count()
}

#[test]
fn a_killed_backend_costs_only_what_it_had_in_flight_and_each_loss_has_a_reason() {
    killed("killed", true);
}

#[test]
fn a_killed_app_whose_sidecar_lives_costs_no_more() {
    killed("killed-app", false);
}

/// The app alone, or the pod.
fn killed(test: &str, whole: bool) {
    let Some(mut three) = three(test, &["--delay-ms", "20"]) else { return };
    retry_on_reset(&three);
    let ids = three.mesh.dir().join("ids");
    let args =
        ["--url", API, "--rate", "200", "--seconds", "60", "--half-post", "--ids", ids.to_str().unwrap()];
    let loading = start_load(&three.mesh, &three.client.pod, &args).unwrap();
    let served = |three: &Three| three.client.metric("weft_requests_total", &["class=\"ok\""]).unwrap();
    wait(Duration::from_secs(20), || Ok(served(&three) > 200.0)).unwrap();
    let mut dead = three.backends.remove(0);
    let before = three.client.metric("weft_ejections_total", &[]).unwrap();
    let vain = tried_in_vain(&three);
    dead.app.signal(Signal::SIGKILL).unwrap();
    if whole {
        dead.sidecar.proxy.signal(Signal::SIGKILL).unwrap();
    }
    let killed = Instant::now();
    let ejected = || Ok(three.client.metric("weft_ejections_total", &[])? > before);
    wait(Duration::from_secs(10), ejected).unwrap();
    let ejected = killed.elapsed();
    let vain = tried_in_vain(&three) - vain;
    // That nobody is behind its sidecar only a request finds out, and after the first that broke it gets few.
    let soon = Duration::from_secs(if whole { 1 } else { 10 });
    // What had been on its way when it broke has been sent elsewhere.
    let then = served(&three);
    wait(Duration::from_secs(20), || Ok(served(&three) > then + 50.0)).unwrap();
    let (tried, since) = (tried_in_vain(&three), Instant::now());
    let then = served(&three);
    wait(Duration::from_secs(20), || Ok(served(&three) > then + 300.0)).unwrap();
    let late = tried_in_vain(&three) - tried;
    // That an app is back is found out by a request, after one second, two, four.
    let probes = if whole { 0.0 } else { since.elapsed().as_secs_f64() + 1.0 };
    let summary = loading.finish().unwrap();
    let (gets, posts) = (counted(&ids, "GET failed"), counted(&ids, "POST failed"));
    println!(
        "figure: kill -9 of 1 of 3 {} at {} requests: {gets} GET failed (bound 0), {posts} POST failed (bound 16: in flight), ejected after {} ms (bound {}) and {vain} tries in vain (bound 16), then tried by {late} (bound {probes:.0})",
        if whole { "backends" } else { "apps" },
        summary.sent,
        ejected.as_millis(),
        soon.as_millis()
    );
    assert_eq!(gets, 0, "{summary:?}");
    // 200/s for 20 ms on three backends are two at a time on each; a slow machine has more.
    assert!(posts <= 16, "{summary:?}");
    let named: u64 = summary.reasons.values().sum();
    assert_eq!((named, summary.errors.len()), (summary.failed, 0), "{summary:?}");
    assert!(ejected <= soon, "{ejected:?}");
    assert!(vain <= 16.0, "{vain} {summary:?}");
    assert!(late <= probes, "{late} {summary:?}");
}

/// Attempts that did not get an answer of their endpoint.
fn tried_in_vain(three: &Three) -> f64 {
    let names = ["weft_retries_total", "weft_redispatched_total", "weft_proxy_errors_total"];
    names.map(|name| three.client.metric(name, &[]).unwrap()).iter().sum()
}

#[test]
fn a_half_open_partition_is_noticed_within_fifteen_seconds() {
    let Some(three) = three("partition", &["--delay-ms", "5"]) else { return };
    retry_on_reset(&three);
    let args = ["--url", API, "--rate", "50", "--seconds", "60"];
    let loading = start_load(&three.mesh, &three.client.pod, &args).unwrap();
    let ok = || three.client.metric("weft_requests_total", &["class=\"ok\""]).unwrap();
    wait(Duration::from_secs(20), || Ok(ok() > 50.0)).unwrap();
    let connected = || {
        let sockets = output(three.client.app("ss").args(["-Htn", "state", "established"])).unwrap();
        sockets
            .lines()
            .filter(|line| line.contains(&format!("{}:8080", three.backends[0].sidecar.pod.ip)))
            .count()
    };
    assert!(connected() > 0);
    cut(&three.backends[0].sidecar.pod);
    let since = Instant::now();
    wait(Duration::from_secs(30), || Ok(connected() == 0)).unwrap();
    let noticed = since.elapsed();
    let then = ok();
    wait(Duration::from_secs(20), || Ok(ok() > then + 50.0)).unwrap();
    let summary = loading.finish().unwrap();
    println!(
        "figure: half-open partition noticed after {:.1} s (bound 15), {} of {} requests failed (bound 0), the slowest took {:.1} s",
        noticed.as_secs_f64(),
        summary.failed,
        summary.sent,
        summary.max_ms / 1_000.0
    );
    assert!(noticed <= Duration::from_secs(15), "{noticed:?}");
    assert_eq!(summary.failed, 0, "{summary:?}");
    assert!(summary.max_ms < 17_000.0, "{summary:?}");
}

#[test]
fn a_black_holed_endpoint_costs_a_connect_timeout_once() {
    black_hole(8);
}

#[test]
#[ignore = "soak: takes over a minute; `make soak`"]
fn soak_a_black_holed_endpoint_for_a_minute() {
    black_hole(62);
}

fn black_hole(seconds: u64) {
    let Some(three) = three("black_hole", &[]) else { return };
    // It was never connected to: nothing but a connection attempt can find out.
    cut(&three.backends[0].sidecar.pod);
    let seconds = seconds.to_string();
    let args = ["--url", API, "--rate", "100", "--seconds", &seconds, "--half-post"];
    let summary = load(&three.mesh, &three.client.pod, &args).unwrap();
    let timeouts = three.client.metric("weft_connects_total", &["timeout"]).unwrap();
    println!(
        "figure: one endpoint of three is a black hole for {seconds} s: {} requests waited for a connect timeout (bound: those of the first second), {} of {} failed (bound 0), {timeouts} attempts in all",
        summary.slow, summary.failed, summary.sent
    );
    assert_eq!(summary.failed, 0, "{summary:?}");
    // The first attempt is shared by those that wait for it; all later ones carry no request.
    assert!(summary.slow <= 10, "{summary:?}");
}

#[test]
fn opaque_connections_meet_a_black_hole_once() {
    let Some(three) = three("black_hole_tcp", &[]) else { return };
    let mut apps = Vec::new();
    for backend in &three.backends {
        let pod = &backend.sidecar.pod;
        apps.push(
            start(
                &mut testapp(&three.mesh, pod, &["tcp", "--port", "9100", "--greeting", "hi\n"]),
                pod,
                9100,
            )
            .unwrap(),
        );
    }
    service(&three.mesh, "shop", "api", "10.96.0.10", &[("http", 80, 8080), ("tcp-raw", 91, 9100)]).unwrap();
    cut(&three.backends[0].sidecar.pod);
    let greet = "for n in $(seq 60); do s=$(date +%s%N); exec 3<>/dev/tcp/10.96.0.10/91; read -r hi <&3; e=$(date +%s%N); \
                 exec 3>&-; echo $hi $(((e-s)/1000000)); done";
    let said = output(three.client.app("bash").args(["-c", greet])).unwrap();
    let times: Vec<u64> = said.lines().filter_map(|line| line.strip_prefix("hi ")?.parse().ok()).collect();
    let slow = times.iter().filter(|ms| **ms >= 900).count();
    println!(
        "figure: 60 opaque connections, one endpoint of three a black hole: {slow} waited for a connect timeout (bound 1)"
    );
    assert_eq!(times.len(), 60, "{said}");
    assert!(slow <= 1, "{times:?}");
}

#[test]
fn a_third_of_all_packets_may_be_lost_and_no_request_is_stuck() {
    let Some(three) = three("loss", &[]) else { return };
    // A lost first packet is sent again after a second, which is all that connecting may take unless somebody says more.
    keeps_to(&three, serde_json::json!({"timeouts": {"connect": "4s"}}));
    // The same way without a mesh: a client and a server without sidecars.
    let bare = three.mesh.world.pod("bare").unwrap();
    let bare_client = three.mesh.world.pod("bare-client").unwrap();
    let _app =
        start(&mut testapp(&three.mesh, &bare, &["http", "--port", "8080", "--name", "bare"]), &bare, 8080)
            .unwrap();
    for pod in three.backends.iter().map(|b| &b.sidecar.pod).chain([&bare]) {
        for (chain, at) in [("INPUT", "-i"), ("OUTPUT", "-o")] {
            let rule = ["-I", chain, at, "eth0", "-p", "tcp", "-m", "statistic", "--mode", "random"];
            let mut command = pod.command("iptables");
            // Both ways together: 30 % of the exchanges of one packet and its answer.
            output(command.args(rule).args(["--probability", "0.163", "-j", "DROP"])).unwrap();
        }
    }
    let to = |url: &str, pod: &Pod| {
        let args = ["--url", url, "--rate", "20", "--seconds", "6", "--connections", "16"];
        load(&three.mesh, pod, &args).unwrap()
    };
    let own = to(&format!("http://{}:8080", bare.ip), &bare_client);
    let mesh = to(API, &three.client.pod);
    println!(
        "figure: 30 % of packets lost: p99 {:.0} ms, the path's own {:.0} ms (bound 3x), {} of {} failed (bound 0)",
        mesh.p99_ms, own.p99_ms, mesh.failed, mesh.sent
    );
    assert_eq!(mesh.failed, 0, "{mesh:?}");
    assert!(mesh.p99_ms <= 3.0 * own.p99_ms.max(1_000.0), "{mesh:?}, without a mesh {own:?}");
}

#[test]
fn over_a_way_whose_delay_varies_no_request_is_stuck() {
    let delay = Duration::ZERO;
    // 20 ms ± 20 ms.
    let weather = Weather { delay, jitter: Duration::from_millis(40), bytes_per_second: None, seed: 7 };
    slow_way("varying_delay", "20 ms ± 20 ms each way", weather, "50");
}

#[test]
fn over_a_way_of_64_kbit_a_second_no_request_is_stuck() {
    let still = Duration::ZERO;
    let weather = Weather { delay: still, jitter: still, bytes_per_second: Some(8_000), seed: 7 };
    slow_way("narrow_way", "64 kbit/s", weather, "6");
}

/// A service beyond a slow way, and beside it the same way to a server without a mesh.
fn slow_way(test: &str, what: &str, weather: Weather, rate: &str) {
    let Some(pair) = pair(test, &[]) else { return };
    let pod = |name: &str| pair.mesh.world.pod(name).unwrap();
    let (bare, bare_client, way) = (pod("bare"), pod("bare-client"), pod("way"));
    let _app =
        start(&mut testapp(&pair.mesh, &bare, &["http", "--port", "8080", "--name", "bare"]), &bare, 8080)
            .unwrap();
    let server = pair.server.sidecar.pod.ip;
    let meshed = Link::start(&way, 9001, (server, 8080).into(), weather).unwrap();
    let own = Link::start(&way, 9002, (bare.ip, 8080).into(), weather).unwrap();
    // What the client's sidecar sends to its peer goes that way; the sidecar knows nothing of it.
    let user = ports::PROXY_UID.to_string();
    let (server, via) = (server.to_string(), format!("{}:{}", way.ip, meshed.port()));
    let mut divert = pair.client.pod.command("iptables");
    divert.args(["-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-d", &server, "--dport", "8080"]);
    output(divert.args(["-m", "owner", "--uid-owner", &user, "-j", "DNAT", "--to-destination", &via]))
        .unwrap();
    let began = Instant::now();
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    let first = began.elapsed();
    let to = |url: &str, pod: &Pod| {
        let args = ["--url", url, "--rate", rate, "--seconds", "6", "--half-post", "--connections", "16"];
        start_load(&pair.mesh, pod, &args).unwrap()
    };
    let mut loads =
        [to(&format!("http://{}:{}", way.ip, own.port()), &bare_client), to(ECHO, &pair.client.pod)];
    let [own, mesh] = loads.each_mut().map(|load| load.collect().unwrap());
    println!(
        "figure: {what}: p99 {:.0} ms, the path's own {:.0} ms (bound 3x), {} of {} failed (bound 0), the first request took {:.2} s with its handshake",
        mesh.p99_ms,
        own.p99_ms,
        mesh.failed,
        mesh.sent,
        first.as_secs_f64()
    );
    assert_eq!((own.failed, mesh.failed), (0, 0), "{own:?} {mesh:?}");
    // All of it went that way: nothing is faster than the way is.
    assert!(mesh.p50_ms >= 0.5 * own.p50_ms, "{mesh:?}, without a mesh {own:?}");
    // What a busy machine adds is no multiple of the path's own.
    assert!(mesh.p99_ms <= 3.0 * own.p99_ms + 200.0, "{mesh:?}, without a mesh {own:?}");
}
