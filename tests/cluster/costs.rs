//! What a mesh costs a cluster: a pod's time to Ready, the memory of a sidecar and of a controller.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weft_harness::cluster::workloads::{INJECTED, namespace, pod, service, testapp};
use weft_harness::cluster::{Cluster, weft};

use crate::mesh_or_skip;

const NAMESPACE: &str = "costs";
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
    println!("figure: MiB that a sidecar holds in a pod: {:.1} (bound 12 in release)", resident(sidecar));
    cluster.leave(NAMESPACE).unwrap();
}

/// MiB of memory of a process.
fn resident(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim();
    resident.trim_end_matches(" kB").parse::<f64>().unwrap() / 1_024.0
}

/// How many of the cluster's objects a controller keeps, asked from inside its pod.
fn objects(controller: u32) -> Result<u64> {
    let pid = controller.to_string();
    let asked = Command::new("nsenter")
        .args(["--target", &pid, "--net", "curl", "-sf", "http://127.0.0.1:14080/metrics"])
        .output()?;
    let text = String::from_utf8(asked.stdout)?;
    let value = text.lines().find_map(|line| line.strip_prefix("weft_controller_objects "));
    Ok(value.with_context(|| format!("no such metric: {text}"))?.parse()?)
}

/// Pods of five services. They are held back from every node and said to run, so that the cluster has their
/// endpoints and not their processes.
#[test]
fn a_controller_with_five_hundred_pods_holds_less_than_92_mib() {
    const CROWD: &str = "crowd";
    const SERVICES: [&str; 5] = ["one", "two", "three", "four", "five"];
    let Some(cluster) = mesh_or_skip("a_controller_with_five_hundred_pods") else { return };
    cluster.forget(CROWD).unwrap();
    let controllers: Vec<_> = (cluster.controllers().unwrap().iter())
        .map(|pod| cluster.process(weft::NAMESPACE, pod, "/usr/local/bin/weft-controller").unwrap())
        .collect();
    let largest = || controllers.iter().copied().map(resident).fold(0.0, f64::max);
    let before = largest();
    let known: Vec<_> = controllers.iter().map(|pid| objects(*pid).unwrap()).collect();
    cluster.apply_all(&[namespace(CROWD, &[])]).unwrap();
    let services = SERVICES.map(|name| {
        let mut object = service(CROWD, name);
        object["spec"]["selector"].take();
        object
    });
    cluster.apply_all(&services).unwrap();
    let pods: Vec<_> = (0..500)
        .map(|n| {
            let name = SERVICES[n % SERVICES.len()];
            let mut object =
                pod(CROWD, name, json!({"containers": [testapp("app", &["http", "--port", "8080"])]}));
            object["metadata"]["name"] = json!(format!("{name}-{n}"));
            object["spec"]["schedulingGates"] = json!([{"name": "weft.dev/never"}]);
            let ip = format!("10.250.{}.{}", n / 250, n % 250 + 1);
            object["status"] = json!({
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                "conditions": [{"type": "Ready", "status": "True"}],
            });
            object
        })
        .collect();
    cluster.apply_all(&pods).unwrap();
    let said = json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string();
    cluster.kubectl(["replace", "--subresource=status", "-f", "-"]).input(&said).run().unwrap();
    // The cluster's own controller makes no endpoints of pods without a node.
    let slices = SERVICES.map(|name| {
        let endpoints: Vec<_> = pods
            .iter()
            .filter(|pod| pod["metadata"]["labels"]["app"] == name)
            .map(|pod| {
                json!({
                    "addresses": [pod["status"]["podIP"]],
                    "conditions": {"ready": true},
                    "targetRef": {"kind": "Pod", "namespace": CROWD, "name": pod["metadata"]["name"]},
                })
            })
            .collect();
        assert_eq!(endpoints.len(), 500 / SERVICES.len());
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": CROWD, "name": format!("{name}-all"), "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        })
    });
    cluster.apply_all(&slices).unwrap();
    cluster
        .until("each controller knows the pods, the services and their slices", || {
            let now: Result<Vec<_>> = controllers.iter().map(|pid| objects(*pid)).collect();
            Ok(now?.iter().zip(&known).all(|(now, before)| *now >= before + 510))
        })
        .unwrap();
    let after = largest();
    println!(
        "figure: MiB of the largest controller with 500 pods of 5 services: {after:.1}, {before:.1} without (bound 92)"
    );
    assert!(after <= 92.0, "{after} MiB");
    cluster.leave(CROWD).unwrap();
}
