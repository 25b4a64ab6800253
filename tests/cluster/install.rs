//! An installation's whole life, by both helms: from nothing, to a mesh, to nothing.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use weft_harness::cluster::builds::{self, Piece};
use weft_harness::cluster::capture::occurrences;
use weft_harness::cluster::workloads::{INJECTED, deployment, namespace, server, service};
use weft_harness::cluster::{Cluster, images, weft};

use crate::cluster_or_skip;

/// Every object of the cluster that nobody makes or removes by the way.
fn objects(cluster: &Cluster) -> BTreeSet<String> {
    let kinds = cluster.kubectl(["api-resources", "--verbs=list", "-o", "name"]).run().unwrap();
    let passing = ["events", "events.events.k8s.io", "componentstatuses", "pods.metrics.k8s.io"];
    let kinds: Vec<_> = kinds.lines().filter(|kind| !passing.contains(kind)).collect();
    let template = "{range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}";
    let path = format!("jsonpath={template}");
    let listed = cluster.kubectl(["get", "-A", &kinds.join(","), "-o", &path]).run().unwrap();
    listed.lines().map(str::to_owned).collect()
}

/// What an app asks another one, until it is answered; the answer's lines.
fn asked(cluster: &Cluster, namespace: &str, from: &str, url: &str) -> String {
    let pod = cluster.pod(namespace, &format!("app={from}")).unwrap();
    let mut text = String::new();
    cluster
        .until(&format!("an answer from {url}"), || {
            let said = cluster.exec(namespace, &pod, "asks", &["/usr/local/bin/client", url])?;
            text = format!("{}{}", said.out, said.err);
            anyhow::ensure!(text.contains("[0] StatusCode=200"), "{text}");
            Ok(true)
        })
        .unwrap();
    text
}

/// A server and a client on each node.
fn demo(cluster: &Cluster, name: &str, labels: &[(&str, &str)]) {
    let mut objects = vec![namespace(name, labels)];
    for node in cluster.nodes() {
        let app = format!("on-{}", node.name());
        let asks = json!({
            "name": "asks", "image": images::ECHO, "imagePullPolicy": "IfNotPresent", "args": ["--port=7000"],
        });
        let spec = json!({"nodeName": node.name(), "containers": [server(&app), asks]});
        objects.extend([deployment(name, &app, 1, spec), service(name, &app)]);
    }
    cluster.apply_all(&objects).unwrap();
    for node in cluster.nodes() {
        cluster.rolled_out(name, &format!("on-{}", node.name())).unwrap();
    }
}

fn has_sidecar(pod: &Value) -> bool {
    let inits = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    inits.filter(|one| one["name"] == "weft-proxy" && one["restartPolicy"] == "Always").count() == 1
}

/// Every pod of the demo asks the other one, and nobody on the wire can read what.
fn speaks_in_secret(cluster: &Cluster) {
    demo(cluster, "install-plain", &[]);
    demo(cluster, "install-demo", &[INJECTED]);
    let pods = cluster.get("install-demo", &["pods"]).unwrap();
    let pods = pods["items"].as_array().unwrap();
    assert!(pods.len() == 2 && pods.iter().all(has_sidecar), "{pods:?}");

    let capture = cluster.capture().unwrap();
    for (namespace, path) in [("install-plain", "read-by-all"), ("install-demo", "read-by-none")] {
        for (from, to) in [("node-1", "node-2"), ("node-2", "node-1")] {
            for _ in 0..5 {
                asked(cluster, namespace, &format!("on-{from}"), &format!("http://on-{to}/{path}"));
            }
        }
    }
    let crossed = capture.end().unwrap();
    let (plain, secret) = (occurrences(&crossed, "read-by-all"), occurrences(&crossed, "read-by-none"));
    println!(
        "figure: paths of 10 meshed requests that are readable between the nodes: {secret} (bound 0); of 10 requests \
         without a mesh: {plain}; {} KB captured",
        crossed.len() / 1_000
    );
    assert!(plain >= 10, "the capture sees nothing: {plain}");
    assert_eq!(secret, 0);
    cluster.forget("install-plain").unwrap();
}

/// What the commands say of it, through the API server.
fn tells(cluster: &Cluster) {
    let routes = cluster.weft_json(&["routes", "install-demo/on-node-2"]).unwrap();
    let rows = routes["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["parent"] == "install-demo/on-node-2:80");
    let row = row.unwrap_or_else(|| panic!("{routes:#}"));
    assert!(row["count"].as_u64() > Some(0) && row["duration"]["p99_ms"].as_f64() > Some(0.0), "{row:#}");
    let shown = cluster.weft(&["routes"]).run().unwrap();
    assert!(shown.contains("install-demo/on-node-2:80"), "{shown}");

    let status = cluster.weft_json(&["status"]).unwrap();
    let sidecars = status["sidecars"].as_array().unwrap();
    assert_eq!(sidecars.iter().filter(|one| one["connected"] == true).count(), 2, "{sidecars:#?}");
    assert_eq!(status["problems"], json!([]));
    let check = cluster.weft(&["check"]).ask().unwrap();
    assert!(check.success && !check.out.contains("BAD"), "{}{}", check.out, check.err);
    assert!(check.out.contains("namespace install-demo: 2 pods have a sidecar"), "{}", check.out);
}

fn controllers(cluster: &Cluster, wanted: usize) {
    let what = format!("{wanted} controllers");
    cluster.until(&what, || Ok(cluster.controllers()?.len() == wanted)).unwrap();
    cluster.rolled_out(weft::NAMESPACE, "weft-controller").unwrap();
}

fn lives(helm: Piece) -> Option<()> {
    let cluster = cluster_or_skip(helm.folder)?;
    for namespace in ["install-plain", "install-demo"] {
        cluster.forget(namespace).unwrap();
    }
    cluster.uninstall_weft(helm).unwrap();
    let before = objects(&cluster);
    let said = cluster.weft(&["check"]).ask().unwrap();
    assert!(said.success && said.out.contains("Weft is not installed"), "{}{}", said.out, said.err);

    let began = std::time::Instant::now();
    cluster.install_weft(helm, &[]).unwrap();
    println!("figure: seconds of helm install, {}: {:.1}", helm.folder, began.elapsed().as_secs_f64());
    speaks_in_secret(&cluster);

    tells(&cluster);

    let upgrade = |values: &[&str]| cluster.install_weft(helm, values).unwrap();
    upgrade(&["controller.replicas=2"]);
    controllers(&cluster, 2);
    asked(&cluster, "install-demo", "on-node-1", "http://on-node-2/after-the-upgrade");
    // What is started now asks whichever controller it finds.
    cluster.restart("install-demo", "on-node-2").unwrap();
    asked(&cluster, "install-demo", "on-node-1", "http://on-node-2/after-a-restart");

    cluster.helm(helm, &["rollback", "weft", "1", "-n", "weft", "--wait"]).run().unwrap();
    controllers(&cluster, 1);
    asked(&cluster, "install-demo", "on-node-1", "http://on-node-2/after-the-rollback");

    // Pods that have a sidecar are the user's to restart; here they go.
    cluster.forget("install-demo").unwrap();
    cluster.helm_uninstall(helm).unwrap();
    // Helm leaves the namespace that it made, and what every namespace holds.
    let every = ["Namespace//weft", "ServiceAccount/weft/default", "ConfigMap/weft/kube-root-ca.crt"];
    let mut left = BTreeSet::new();
    let gone = cluster.until("the end of what the controller made", || {
        left = objects(&cluster).difference(&before).cloned().collect();
        left.retain(|object| !every.contains(&object.as_str()));
        Ok(left.is_empty())
    });
    println!("figure: objects that {} uninstall leaves: {} (bound 0)", helm.folder, left.len());
    assert!(gone.is_ok(), "left behind: {left:?}");
    cluster.forget(weft::NAMESPACE).unwrap();
    Some(())
}

#[test]
fn helm_3_installs_upgrades_rolls_back_and_leaves_nothing() {
    lives(builds::HELM3);
}

#[test]
fn helm_4_installs_upgrades_rolls_back_and_leaves_nothing() {
    lives(builds::HELM4);
}
