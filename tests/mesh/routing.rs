//! Routes, weights, balancing, ejection and retries, as a client sees them.

use std::{collections::BTreeMap, time::Duration};

use weft_control_plane::cli::demo::mesh::{Mesh, Meshed, Workload, wait};
use weft_harness::apps::{Served, curl, load, mesh_or_skip, output, serve, service};

const API: &str = "http://10.96.0.10";

/// A service `api`, its versions and a client.
pub(super) struct World {
    pub(super) client: Meshed,
    apps: Vec<Served>,
    pub(super) mesh: Mesh,
}

/// `api` with two ports and its versions `v1` and `v2` behind one service each; `apps` are (name, arguments).
pub(super) fn world(test: &str, apps: &[(&str, &[&str])]) -> Option<World> {
    let mesh = mesh_or_skip(test)?;
    service(&mesh, "shop", "api", "10.96.0.10", &[("http", 80, 8080), ("http-alt", 8080, 8080)]).unwrap();
    service(&mesh, "shop", "v1", "10.96.0.11", &[("http", 80, 8080)]).unwrap();
    service(&mesh, "shop", "v2", "10.96.0.12", &[("http", 80, 8080)]).unwrap();
    let started = apps.iter().map(|(name, args)| serve(&mesh, Workload::new("shop", name), args).unwrap());
    let apps = started.collect();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    Some(World { client, apps, mesh })
}

fn route(mesh: &Mesh, rules: serde_json::Value) {
    let object = serde_json::json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "api"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "api", "port": 80}], "rules": rules},
    });
    mesh.write("route-api.yaml", &format!("{object:#}\n")).unwrap();
}

/// What callers of a service keep to, from now on.
fn policy(mesh: &Mesh, service: &str, spec: serde_json::Value) {
    crate::policy(mesh, service, spec);
    let object = format!("TrafficPolicy/shop/{service}");
    output(&mut mesh.weft(&["wait", &object, "--applied"])).unwrap();
}

fn served_by(world: &World, args: &[&str]) -> String {
    let headers = ["-o", "/dev/null", "-w", "%header{x-served-by} %{http_code} %header{weft-reason}"];
    curl(&world.client.pod, &[&headers[..], args].concat()).unwrap().trim().to_owned()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    wait(Duration::from_secs(10), || Ok(holds())).unwrap_or_else(|e| panic!("{what}: {e}"));
}

#[test]
fn rules_choose_by_path_header_query_and_method_and_a_miss_is_404() {
    let Some(world) = world("rules", &[("v1-1", &[]), ("v2-1", &[])]) else { return };
    let to = |name: &str| serde_json::json!([{"name": name, "port": 80}]);
    route(
        &world.mesh,
        serde_json::json!([
            {"matches": [{"path": {"type": "PathPrefix", "value": "/v2"}}], "backendRefs": to("v2")},
            {"matches": [{"path": {"type": "Exact", "value": "/h"}, "headers": [{"name": "version", "value": "two"}]}],
             "backendRefs": to("v2")},
            {"matches": [{"path": {"type": "PathPrefix", "value": "/q"}, "queryParams": [{"name": "v", "value": "2"}]}],
             "backendRefs": to("v2")},
            {"matches": [{"path": {"type": "RegularExpression", "value": "/r[0-9]+"}}], "backendRefs": to("v2")},
            {"matches": [{"path": {"type": "PathPrefix", "value": "/m"}, "method": "POST"}], "backendRefs": to("v2")},
            {"matches": [{"path": {"type": "PathPrefix", "value": "/gone"}}],
             "filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": "new.example", "statusCode": 301}}]},
            {"matches": [{"path": {"type": "PathPrefix", "value": "/old"}}], "backendRefs": to("v1"),
             "filters": [{"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/head"}}},
                         {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-set", "value": "yes"}]}}]},
            {"matches": [{"path": {"type": "PathPrefix", "value": "/h"}}, {"path": {"type": "PathPrefix", "value": "/q"}}],
             "backendRefs": to("v1")},
            {"matches": [{"path": {"type": "PathPrefix", "value": "/nobody"}}], "backendRefs": to("missing")}
        ]),
    );
    until("the route is live", || served_by(&world, &[&format!("{API}/v2/x")]) == "v2-1 200");
    for (args, expected) in [
        (&["/v2"][..], "v2-1 200"),
        (&["/v2example"], "404 outbound;no_route"),
        (&["/h", "-H", "version: two"], "v2-1 200"),
        (&["/h"], "v1-1 200"),
        (&["/q?v=2"], "v2-1 200"),
        (&["/q?v=3"], "v1-1 200"),
        (&["/r77"], "v2-1 200"),
        (&["/rx"], "404 outbound;no_route"),
        (&["/m", "-X", "POST"], "v2-1 200"),
        (&["/m"], "404 outbound;no_route"),
        (&["/gone"], "301"),
        (&["/nobody"], "500 outbound;backend_unresolved"),
    ] {
        let url = format!("{API}{}", args[0]);
        let args = [&[&*url], &args[1..]].concat();
        assert_eq!(served_by(&world, &args), expected, "{args:?}");
    }
    let head = curl(&world.client.pod, &[&format!("{API}/old")]).unwrap();
    assert!(head.starts_with("GET /head ") && head.contains("x-set: yes"), "{head}");
}

#[test]
fn weights_hold_and_a_change_is_seen_at_once() {
    let Some(world) = world("weights", &[("v1-1", &[]), ("v2-1", &[])]) else { return };
    let weights = |v1: u32, v2: u32| {
        route(
            &world.mesh,
            serde_json::json!([{"backendRefs": [
            {"name": "v1", "port": 80, "weight": v1}, {"name": "v2", "port": 80, "weight": v2}]}]),
        );
    };
    weights(90, 10);
    until("v1 answers", || served_by(&world, &[API]) == "v1-1 200");
    let summary =
        load(&world.mesh, &world.client.pod, &["--url", API, "--rate", "400", "--seconds", "5"]).unwrap();
    let share = summary.served_by["v2-1"] as f64 / summary.sent as f64;
    println!("figure: 90/10 over {} requests: {:.1} % to v2", summary.sent, share * 100.0);
    assert!((0.07..=0.13).contains(&share) && summary.failed == 0, "{summary:?}");
    weights(0, 1);
    // One answer of v2 says little: it had a tenth of them before.
    until("only v2 answers", || (0..10).all(|_| served_by(&world, &[API]) == "v2-1 200"));
    let summary =
        load(&world.mesh, &world.client.pod, &["--url", API, "--rate", "200", "--seconds", "1"]).unwrap();
    assert_eq!(summary.served_by, BTreeMap::from([("v2-1".to_owned(), summary.sent)]));
}

#[test]
fn a_slow_endpoint_gets_little_and_the_tail_is_half_of_round_robins() {
    let slow: &[&str] = &["--delay-ms", "400"];
    let fast: &[&str] = &["--delay-ms", "20"];
    let apps = [("api-1", slow), ("api-2", fast), ("api-3", fast), ("api-4", fast), ("api-5", fast)];
    let Some(world) = world("slow_endpoint", &apps) else { return };
    let run = |algorithm: &str| {
        policy(&world.mesh, "api", serde_json::json!({"loadBalancing": {"algorithm": algorithm}}));
        load(&world.mesh, &world.client.pod, &["--url", API, "--rate", "300", "--seconds", "6"]).unwrap()
    };
    let robin = run("RoundRobin");
    let ewma = run("PeakEwma");
    println!("figure: p99: round robin {:.1} ms, peak EWMA {:.1} ms", robin.p99_ms, ewma.p99_ms);
    println!("figure: to the slow one: {:?} of {}", ewma.served_by.get("api-1"), ewma.sent);
    assert_eq!((robin.failed, ewma.failed), (0, 0));
    assert!(ewma.p99_ms <= robin.p99_ms / 2.0, "{} {}", ewma.p99_ms, robin.p99_ms);
}

#[test]
fn a_failing_endpoint_is_ejected_and_one_that_refuses_costs_no_request() {
    let apps: [(&str, &[&str]); 3] = [("api-1", &["--fail-percent", "100"]), ("api-2", &[]), ("api-3", &[])];
    let Some(mut world) = world("ejection", &apps) else { return };
    // Peak EWMA avoids it before it has failed five times in a row; round robin must eject it.
    policy(&world.mesh, "api", serde_json::json!({"loadBalancing": {"algorithm": "RoundRobin"}}));
    let failing =
        load(&world.mesh, &world.client.pod, &["--url", API, "--rate", "200", "--seconds", "4"]).unwrap();
    let ejections = world.client.metric("weft_ejections_total", &[]).unwrap();
    println!(
        "figure: one of three fails at once: {} of {} failed, {ejections} ejections",
        failing.failed, failing.sent
    );
    assert!(failing.failed <= failing.sent / 20, "{failing:?}");
    assert!(ejections >= 1.0);
    // The app of another endpoint dies without a word: nothing was sent to it, so nothing fails.
    let _without_app = world.apps.remove(1).kill_app().unwrap();
    world.apps.remove(0);
    world.mesh.forget("api-1").unwrap();
    let args = ["--url", API, "--rate", "200", "--seconds", "3", "--half-post"];
    let refused = load(&world.mesh, &world.client.pod, &args).unwrap();
    assert_eq!(refused.failed, 0, "{refused:?}");
}

#[test]
fn retries_by_status_are_opt_in_and_bounded() {
    let Some(world) = world("retries", &[("api-1", &["--fail-percent", "50"])]) else { return };
    let args = ["--url", API, "--rate", "100", "--seconds", "3"];
    let before = load(&world.mesh, &world.client.pod, &args).unwrap();
    assert!(before.failed > before.sent / 4, "nothing is retried by status unless asked: {before:?}");
    policy(
        &world.mesh,
        "api",
        serde_json::json!({
            "retries": {"statuses": ["503"], "maxRetries": 3, "budget": {"percent": 20, "minPerSecond": 10, "window": "10s"}},
            "outlierEjection": {"consecutiveFailures": 0}
        }),
    );
    until("the policy is live", || {
        world.client.metric("weft_retries_total", &[]).unwrap() > 0.0 || {
            served_by(&world, &[API]);
            false
        }
    });
    let after = load(&world.mesh, &world.client.pod, &args).unwrap();
    let retries = world.client.metric("weft_retries_total", &[]).unwrap();
    println!(
        "figure: 50 % failing: {} failed of {} without retries, {} with; {retries} retries",
        before.failed, before.sent, after.failed
    );
    assert!(after.failed < before.failed);
    assert!(retries <= 0.2 * (after.sent as f64 + before.sent as f64) + 10.0 * 20.0, "{retries}");
}

#[test]
fn a_request_timeout_answers_504_with_a_reason() {
    let Some(world) = world("timeouts", &[("api-1", &["--delay-ms", "2000"])]) else { return };
    policy(&world.mesh, "api", serde_json::json!({"timeouts": {"request": "200ms"}}));
    until("the timeout holds", || served_by(&world, &[API]) == "504 outbound;timeout");
}

#[test]
fn callers_stay_on_their_node_or_with_one_endpoint_where_the_service_says_so() {
    let Some(mesh) = mesh_or_skip("reach") else { return };
    let on = |name: &str, node: &str| Workload { node: Some(node.to_owned()), ..Workload::new("shop", name) };
    let apps = [("api-1", "n1"), ("api-2", "n2"), ("api-3", "n2")];
    let apps: Vec<_> = apps.iter().map(|(name, node)| serve(&mesh, on(name, node), &[]).unwrap()).collect();
    let clients =
        [mesh.workload(on("client-1", "n1")).unwrap(), mesh.workload(on("client-2", "n2")).unwrap()];
    let says = |more: serde_json::Value| {
        let mut spec = serde_json::json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
            "selector": {"app": "api"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let object = serde_json::json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "shop", "name": "api"}, "spec": spec});
        mesh.write("service-api.yaml", &format!("{object:#}\n")).unwrap();
    };
    let served = |client: &Meshed| -> Vec<String> {
        let summary = load(&mesh, &client.pod, &["--url", API, "--rate", "100", "--seconds", "1"]).unwrap();
        assert_eq!(summary.failed, 0, "{summary:?}");
        summary.served_by.into_keys().collect()
    };
    let becomes = |what: &str, holds: &dyn Fn() -> bool| until(what, holds);
    says(serde_json::json!({}));
    becomes("everybody is asked", &|| {
        curl(&clients[0].pod, &["-f", API]).is_ok() && served(&clients[0]).len() == 3
    });
    says(serde_json::json!({"internalTrafficPolicy": "Local"}));
    becomes("their own node alone", &|| {
        served(&clients[0]) == ["api-1"] && served(&clients[1]) == ["api-2", "api-3"]
    });
    says(serde_json::json!({"sessionAffinity": "ClientIP"}));
    becomes("one endpoint each", &|| clients.iter().all(|client| served(client).len() == 1));
    // The same one with every connection, and from the next start of its sidecar on.
    assert_eq!(served(&clients[0]), served(&clients[0]));
    drop(apps);
}
