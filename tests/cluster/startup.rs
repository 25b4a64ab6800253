//! What a sidecar costs a pod: the time to Ready, and memory.

use std::time::Duration;

use serde_json::{Value, json};
use weft_harness::cluster::Cluster;
use weft_harness::cluster::workloads::{INJECTED, namespace, pod, testapp};

use crate::mesh_or_skip;

const NAMESPACE: &str = "startup";
/// Each way; the kubelet looks once a second, so one says little.
const TIMES: usize = 5;

/// From the API server's word that the pod exists to its word that it is ready, as a watcher sees it.
fn time_to_ready(cluster: &Cluster, name: &str, spec: &Value, labels: &Value) -> Duration {
    let mut object = pod(NAMESPACE, name, spec.clone());
    object["metadata"]["labels"] = labels.clone();
    let began = std::time::Instant::now();
    cluster.apply_all(&[object]).unwrap();
    cluster
        .kubectl(["-n", NAMESPACE, "wait", "--for=condition=Ready", "--timeout=60s", "pod", name])
        .run()
        .unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.describe(NAMESPACE)));
    let took = began.elapsed();
    cluster.kubectl(["-n", NAMESPACE, "delete", "pod", name, "--wait=false"]).run().unwrap();
    took
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1_000.0
}

#[test]
fn a_sidecar_adds_little_to_a_pods_start_and_holds_little_memory() {
    let Some(cluster) = mesh_or_skip("a_sidecar_adds_little") else { return };
    cluster.forget(NAMESPACE).unwrap();
    cluster.apply_all(&[namespace(NAMESPACE, &[INJECTED])]).unwrap();
    let node = cluster.nodes()[1].name();
    let app = testapp("app", &["http", "--port", "8080", "--name", "app"]);
    let with = json!({"nodeName": node, "terminationGracePeriodSeconds": 5, "containers": [app]});
    // The same pod with containers that do nothing: one that ends at once, and a sidecar that is there at once and
    // that the kubelet probes as ours.
    let mut nothing = testapp("sidecar", &["http", "--port", "8081", "--name", "sidecar"]);
    nothing["restartPolicy"] = json!("Always");
    nothing["startupProbe"] =
        json!({"httpGet": {"path": "/", "port": 8081}, "periodSeconds": 1, "failureThreshold": 120});
    let mut without = with.clone();
    without["initContainers"] = json!([testapp("init", &["--help"]), nothing]);
    let injected = json!({"app": "with"});
    let plain = json!({"app": "without", "weft.dev/inject": "disabled"});
    // The first of a kind pays for what is read from disk.
    time_to_ready(&cluster, "first", &with, &injected);
    time_to_ready(&cluster, "first-plain", &without, &plain);
    let (mut meshed, mut bare) = (Vec::new(), Vec::new());
    for n in 0..TIMES {
        meshed.push(time_to_ready(&cluster, &format!("with-{n}"), &with, &injected));
        bare.push(time_to_ready(&cluster, &format!("without-{n}"), &without, &plain));
    }
    let (meshed, bare) = (median(meshed), median(bare));
    println!(
        "figure: ms from a pod's creation to Ready, median of {TIMES}: {meshed:.0} with the sidecar, {bare:.0} with \
         containers that do nothing: {:.0} added (bound 150)",
        meshed - bare
    );

    cluster.apply_all(&[pod(NAMESPACE, "idle", with)]).unwrap();
    cluster
        .kubectl(["-n", NAMESPACE, "wait", "--for=condition=Ready", "--timeout=60s", "pod/idle"])
        .run()
        .unwrap();
    let sidecar = cluster.process(NAMESPACE, "idle", "/usr/local/bin/weft-proxy").unwrap();
    let status = std::fs::read_to_string(format!("/proc/{sidecar}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim();
    let resident: f64 = resident.trim_end_matches(" kB").parse().unwrap();
    println!("figure: MiB that a sidecar holds in a pod: {:.1} (bound 12 in release)", resident / 1_024.0);
    cluster.leave(NAMESPACE).unwrap();
}
