//! Rolling restarts: no request fails, none is done twice, none reaches the wrong pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use nix::sys::signal::Signal;
use weft_control_plane::cli::demo::mesh::Workload;
use weft_harness::apps::{Served, mesh_or_skip, serve, service, start_load};

/// What Kubernetes does to a pod that is deleted, in its order: the endpoint is terminating and the preStop hook
/// runs at t = 0, the app gets SIGTERM when the hook has ended, the sidecar when the app has.
fn delete(mesh: &weft_control_plane::cli::demo::mesh::Mesh, mut served: Served) -> Ipv4Addr {
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
    let rate = rate.to_string();
    let Some(mesh) = mesh_or_skip("rolling_restarts") else { return };
    service(&mesh, "shop", "api", "10.96.0.10", &[("http", 80, 8080)]).unwrap();
    service(&mesh, "shop", "other", "10.96.0.11", &[("http", 80, 8080)]).unwrap();
    let seen = mesh.dir().join("seen");
    let ids = seen.to_str().unwrap().to_owned();
    let start = |n: u32, ip: Option<Ipv4Addr>| {
        let mut workload = Workload::new("shop", &format!("api-{n}"));
        workload.ip = ip;
        // Half of the apps end at once on SIGTERM, the others finish what they have.
        let habit = if n.is_multiple_of(2) { "exit" } else { "drain" };
        serve(&mesh, workload, &["--ids", &ids, "--on-term", habit, "--delay-ms", "5"]).unwrap()
    };
    let mut backends: Vec<Served> = (1..=3).map(|n| start(n, None)).collect();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    let sent = mesh.dir().join("sent");
    let args = [
        "--url",
        "http://10.96.0.10/",
        "--rate",
        &rate,
        "--seconds",
        "3600",
        "--half-post",
        "--ids",
        sent.to_str().unwrap(),
    ];
    let loading = start_load(&mesh, &client.pod, &args).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let mut next = 4;
    let mut others: Vec<Served> = Vec::new();
    for round in 0..rounds {
        for (place, backend) in backends.iter_mut().enumerate() {
            let fresh = start(next, None);
            next += 1;
            let old = std::mem::replace(backend, fresh);
            let freed = delete(&mesh, old);
            if place == 0 {
                // The freed address goes to a pod of another service.
                others.clear();
                let mut other = Workload::new("shop", &format!("other-{round}"));
                other.ip = Some(freed);
                others.push(serve(&mesh, other, &[]).unwrap());
            }
        }
    }
    let summary = loading.finish().unwrap();
    let lines = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default();
    let arrived = lines(&seen);
    let mut times = BTreeMap::<&str, u32>::new();
    for id in arrived.lines() {
        *times.entry(id).or_default() += 1;
    }
    let asked = lines(&sent);
    let posts: BTreeSet<&str> =
        asked.lines().filter(|l| l.contains(" POST ")).filter_map(|l| l.split(' ').next()).collect();
    let duplicated = posts.iter().filter(|id| times.get(*id).copied().unwrap_or(0) > 1).count();
    let wrong = summary.served_by.keys().filter(|by| by.starts_with("other")).count();
    println!(
        "figure: {rounds} rolling restarts of 3 backends at {rate}/s, half POST: {} sent, {} failed, {duplicated} duplicated POSTs, {wrong} wrong pods",
        summary.sent, summary.failed
    );
    assert_eq!(summary.failed, 0, "{summary:?}");
    assert_eq!((duplicated, wrong), (0, 0));
    assert!(summary.served_by.len() > 3, "{:?}", summary.served_by);
}
