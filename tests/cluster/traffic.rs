//! What a request must not notice: roll-outs, a controller that dies, an API server that is away, a node that is
//! emptied.

use anyhow::Result;
use serde_json::{Value, json};
use weft_harness::cluster::workloads::{INJECTED, Load, deployment, namespace, server, service};
use weft_harness::cluster::{Cluster, weft};

use crate::mesh_or_skip;

const NAMESPACE: &str = "traffic";
const URL: &str = "http://web/load";

/// Three replicas of a server on both nodes, and 200 requests a second from the first. All tests here share them. The
/// server ends as soon as it is told to and has no hook of its own: what its kept connections have just brought arrives
/// because the injector's preStop keeps it from hearing for a while.
fn loaded(cluster: &Cluster) -> Load {
    let spread = json!([{
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }]);
    let spec = json!({"containers": [server("web")], "topologySpreadConstraints": spread});
    let objects =
        [namespace(NAMESPACE, &[INJECTED]), deployment(NAMESPACE, "web", 3, spec), service(NAMESPACE, "web")];
    cluster.apply_all(&objects).unwrap();
    cluster.rolled_out(NAMESPACE, "web").unwrap();
    cluster.load_from(0, NAMESPACE, URL, 200).unwrap()
}

fn rolling_restarts(test: &str, times: u32) {
    let Some(cluster) = mesh_or_skip(test) else { return };
    let load = loaded(&cluster);
    for _ in 0..times {
        cluster.restart(NAMESPACE, "web").unwrap();
    }
    // The last of the old ones is still draining.
    cluster
        .until("the end of the old pods", || Ok(cluster.restarts(NAMESPACE, "app=web")?.len() == 3))
        .unwrap();
    load.more(200).unwrap();
    load.none_failed(&cluster, &format!("{times} rolling restarts of 3 replicas at 200/s")).unwrap();
}

#[test]
fn rolling_restarts_lose_no_request() {
    rolling_restarts("rolling_restarts_lose_no_request", 2);
}

#[test]
#[ignore = "soak: ten restarts take four minutes"]
fn soak_ten_rolling_restarts_lose_no_request() {
    rolling_restarts("soak_ten_rolling_restarts_lose_no_request", 10);
}

/// Endpoints change, and the mesh follows.
fn a_pod_is_replaced(cluster: &Cluster, load: &Load) {
    cluster
        .kubectl(["-n", NAMESPACE, "delete", "pod", &cluster.pod(NAMESPACE, "app=web").unwrap()])
        .run()
        .unwrap();
    cluster.rolled_out(NAMESPACE, "web").unwrap();
    load.more(200).unwrap();
}

/// A controller's pod, without the time to end well.
fn delete_at_once(cluster: &Cluster, controller: &str) -> Result<()> {
    cluster
        .kubectl(["-n", weft::NAMESPACE, "delete", "pod", controller, "--grace-period=0", "--force"])
        .run()
        .map(drop)
}

#[test]
fn a_killed_controller_loses_no_request() {
    let Some(cluster) = mesh_or_skip("a_killed_controller_loses_no_request") else { return };
    let load = loaded(&cluster);
    let [controller] = &cluster.controllers().unwrap()[..] else { panic!("one controller") };
    let process = cluster.process(weft::NAMESPACE, controller, "/usr/local/bin/weft-controller").unwrap();
    let kill = std::process::Command::new("kill").args(["-9", &process.to_string()]).status().unwrap();
    assert!(kill.success());
    load.more(400).unwrap();
    // The same pod again, and then another one in its place.
    cluster.rolled_out(weft::NAMESPACE, "weft-controller").unwrap();
    delete_at_once(&cluster, controller).unwrap();
    cluster.rolled_out(weft::NAMESPACE, "weft-controller").unwrap();
    // Endpoints change under the one that has just begun.
    a_pod_is_replaced(&cluster, &load);
    load.none_failed(&cluster, "controller killed, deleted, and an endpoint gone under the new one").unwrap();
}

#[test]
fn three_controllers_serve_at_once_and_losing_one_loses_no_request() {
    let Some(cluster) = mesh_or_skip("three_controllers_serve_at_once") else { return };
    let load = loaded(&cluster);
    let scale = |replicas: u32| -> Result<()> {
        let replicas = format!("--replicas={replicas}");
        cluster
            .kubectl(["-n", weft::NAMESPACE, "scale", "deployment", "weft-controller", &replicas])
            .run()?;
        cluster.rolled_out(weft::NAMESPACE, "weft-controller")
    };
    // Whichever controller is asked, it speaks for all, and every sidecar reports to one of them.
    let all_heard = || {
        cluster.until("a status of three controllers and four sidecars", || {
            let status = cluster.weft_json(&["status"])?;
            let heard = |replica: &&Value| replica["answered"] == true;
            let ours = |sidecar: &&Value| {
                sidecar["connected"] == true
                    && sidecar["pod"].as_str().is_some_and(|pod| pod.starts_with("traffic/"))
            };
            let count = |list: &str, of: &dyn Fn(&&Value) -> bool| {
                status[list].as_array().map_or(0, |all| all.iter().filter(of).count())
            };
            Ok(count("replicas", &heard) == 2 && count("sidecars", &ours) == 4)
        })
    };
    let lost = || -> Result<()> {
        scale(3)?;
        // What is started now asks whichever controller it finds.
        cluster.restart(NAMESPACE, "web")?;
        all_heard()?;
        delete_at_once(&cluster, &cluster.controllers()?[0])?;
        load.more(400)?;
        cluster.rolled_out(weft::NAMESPACE, "weft-controller")?;
        a_pod_is_replaced(&cluster, &load);
        all_heard()
    };
    let lost = lost();
    scale(1).unwrap();
    lost.unwrap();
    load.none_failed(&cluster, "one of three controllers lost, and an endpoint gone after it").unwrap();
}

/// Away for so many requests at 200 a second.
fn api_server_away(test: &str, requests: u64) {
    let Some(cluster) = mesh_or_skip(test) else { return };
    let load = loaded(&cluster);
    cluster.stop_api_server().unwrap();
    let away = load.more(requests);
    cluster.start_api_server().unwrap();
    away.unwrap();
    load.more(200).unwrap();
    // It is believed again.
    a_pod_is_replaced(&cluster, &load);
    load.none_failed(&cluster, &format!("API server away for {} s, then a pod deleted", requests / 200))
        .unwrap();
}

#[test]
fn an_api_server_that_is_away_loses_no_request() {
    api_server_away("an_api_server_that_is_away_loses_no_request", 4_000);
}

#[test]
#[ignore = "soak: away for two minutes"]
fn soak_an_api_server_that_is_away_for_two_minutes_loses_no_request() {
    api_server_away("soak_an_api_server_that_is_away_for_two_minutes", 24_000);
}

#[test]
fn a_drained_node_loses_no_request() {
    let Some(cluster) = mesh_or_skip("a_drained_node_loses_no_request") else { return };
    let load = loaded(&cluster);
    let node = cluster.nodes()[1].name();
    let drained = cluster
        .kubectl([
            "drain",
            &node,
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--force",
            "--timeout=120s",
        ])
        .run();
    let all_here = cluster.rolled_out(NAMESPACE, "web");
    cluster.kubectl(["uncordon", &node]).run().unwrap();
    drained.unwrap();
    all_here.unwrap();
    load.more(200).unwrap();
    load.none_failed(&cluster, "a drained node at 200/s").unwrap();
}
