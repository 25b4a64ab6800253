//! A new root on a cluster that works: A, then A and B, then B, and nobody notices.

use anyhow::Context as _;
use weft_harness::cluster::Cluster;
use weft_harness::cluster::workloads::{INJECTED, deployment, namespace, server, service};

use serde_json::json;

use crate::mesh_or_skip;

const NAMESPACE: &str = "trust";

/// What each sidecar of the namespace says of itself.
fn metrics(cluster: &Cluster, name: &str, label: &str) -> anyhow::Result<Vec<f64>> {
    let pods = cluster.get(NAMESPACE, &["pods", "-o", "json"])?;
    let pods = pods["items"].as_array().context("pods")?;
    let names = pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str());
    names.map(|pod| cluster.metric(NAMESPACE, pod, name, label)).collect()
}

fn rotate(cluster: &Cluster, step: &str, live: impl Fn() -> anyhow::Result<bool>) {
    let began = std::time::Instant::now();
    // It is refused while a sidecar elsewhere in the mesh has not followed the step before.
    let mut refused = 0;
    let let_go = cluster.until(&format!("{step} to be let"), || {
        let done = cluster.weft(&["certs", "--rotate", step]).run();
        refused += u32::from(done.is_err());
        done.map(|_| true)
    });
    let_go.unwrap();
    println!("figure: times that a root's {step} was refused because somebody had not followed: {refused}");
    cluster.until(&format!("{step} to be live everywhere"), live).unwrap();
    println!(
        "figure: seconds until a root's {step} was live in every sidecar: {:.1}",
        began.elapsed().as_secs_f64()
    );
}

#[test]
fn a_root_is_replaced_under_load_and_a_killed_sidecar_comes_back() {
    let Some(cluster) = mesh_or_skip("a_root_is_replaced_under_load") else { return };
    cluster.forget(NAMESPACE).unwrap();
    let spec = json!({"containers": [server("web")]});
    let objects =
        [namespace(NAMESPACE, &[INJECTED]), deployment(NAMESPACE, "web", 2, spec), service(NAMESPACE, "web")];
    cluster.apply_all(&objects).unwrap();
    cluster.rolled_out(NAMESPACE, "web").unwrap();
    let before = cluster.restarts(NAMESPACE, "app=web").unwrap();
    let load = cluster.load_from(0, NAMESPACE, "http://web/", 200).unwrap();

    let trust =
        |roots: f64| Ok(metrics(&cluster, "weft_trust_roots", "")?.iter().all(|&trusted| trusted == roots));
    let renewals = || metrics(&cluster, "weft_certificate_renewals_total", "ok");
    // Each step is live when everybody has a certificate that was made after it. What is mounted is a minute behind
    // then, and need not be waited for: the stream has told the new root.
    for step in ["add", "activate"] {
        let before = renewals().unwrap();
        rotate(&cluster, step, || {
            Ok(trust(2.0)? && renewals()?.iter().zip(&before).all(|(now, then)| now > then))
        });
    }
    rotate(&cluster, "retire", || trust(1.0));
    load.more(200).unwrap();
    assert_eq!(cluster.restarts(NAMESPACE, "app=web").unwrap(), before, "a pod was restarted");
    load.none_failed(&cluster, "root A, A and B, B at 200/s").unwrap();

    // It comes back by what is mounted: the anchors of now, not those that it was started with.
    let pod = cluster.pod(NAMESPACE, "app=web").unwrap();
    let load = cluster.load_from(0, NAMESPACE, "http://web/", 200).unwrap();
    let sidecar = cluster.process(NAMESPACE, &pod, "/usr/local/bin/weft-proxy").unwrap();
    let killed = std::process::Command::new("kill").args(["-9", &sidecar.to_string()]).status().unwrap();
    assert!(killed.success());
    let began = std::time::Instant::now();
    cluster
        .until("another sidecar in the same pod", || {
            let again = cluster.process(NAMESPACE, &pod, "/usr/local/bin/weft-proxy")?;
            let ready = cluster.get(NAMESPACE, &["pod", &pod])?;
            let ready = ready["status"]["conditions"].as_array().context("conditions")?;
            Ok(again != sidecar && ready.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.describe(NAMESPACE)));
    println!(
        "figure: seconds until a killed sidecar's pod was ready again: {:.1}",
        began.elapsed().as_secs_f64()
    );
    load.more(200).unwrap();
    let seen = load.end(&cluster).unwrap();
    println!("figure: a sidecar of two killed at 200/s: {} of {} requests failed", seen.failed, seen.sent);
    // What was under way in it is lost with it, where it may not be sent twice; nothing else is.
    assert!(seen.failed <= 32, "{seen:?}");
    let after = cluster.restarts(NAMESPACE, "app=web").unwrap();
    let restarts = |all: &[(String, u64)]| all.iter().map(|(_, count)| count).sum::<u64>();
    assert_eq!(restarts(&after), restarts(&before) + 1, "{after:?}");
    cluster.leave(NAMESPACE).unwrap();
}
