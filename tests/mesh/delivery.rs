//! Policy delivery: when a change is live, what an outage of the controller changes, and what bad YAML does.

use std::time::{Duration, Instant};

use weft_control_plane::cli::demo::mesh::wait;
use weft_harness::apps::{curl, service, start_load};

use crate::{ECHO, pair};

#[test]
fn the_controller_may_die_and_come_back_and_no_request_fails() {
    controller_away(5);
}

#[test]
#[ignore = "soak: takes five minutes; `make soak`"]
fn soak_the_controller_is_away_for_five_minutes() {
    controller_away(300);
}

fn controller_away(away: u64) {
    let Some(mut pair) = pair("controller_away", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    let seconds = (away + 60).to_string();
    let args = ["--url", ECHO, "--rate", "200", "--seconds", &seconds, "--half-post"];
    let loading = start_load(&pair.mesh, &pair.client.pod, &args).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    pair.mesh.kill_controller().unwrap();
    std::thread::sleep(Duration::from_secs(away));
    pair.mesh.start_controller().unwrap();
    // The sidecar finds its way back within the 30 s of its backoff, and what changes is streamed to it again.
    wait(Duration::from_secs(40), || Ok(pair.client.metric("weft_control_connected", &[])? == 1.0)).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("late", 81, 8080)]).unwrap();
    wait(Duration::from_secs(10), || {
        Ok(curl(&pair.client.pod, &[&format!("{ECHO}:81")]).is_ok_and(|said| said == "ok"))
    })
    .unwrap();
    let summary = loading.finish().unwrap();
    println!(
        "figure: controller killed for {away} s and started cold: {} of {} failed",
        summary.failed, summary.sent
    );
    assert_eq!(summary.failed, 0, "{summary:?}");
}

#[test]
fn a_restarted_sidecar_comes_back_by_itself() {
    let Some(mut pair) = pair("restarted_sidecar", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    pair.client.proxy.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    pair.client.proxy.wait(Duration::from_secs(5)).unwrap();
    let begun = Instant::now();
    pair.mesh.restart_proxy(&mut pair.client).unwrap();
    println!("figure: a restarted sidecar was ready after {} ms", begun.elapsed().as_millis());
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
}

#[test]
fn a_change_says_where_it_is_applied() {
    let Some(pair) = pair("applied", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    let route = serde_json::json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "echo"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "echo"}],
                 "rules": [{"backendRefs": [{"name": "echo", "port": 80}]}]}
    });
    let begun = Instant::now();
    pair.mesh.write("route.yaml", &format!("{route:#}\n")).unwrap();
    let mut command = pair.mesh.weft(&["wait", "HTTPRoute/shop/echo", "--applied", "--timeout", "10s"]);
    let said = weft_harness::apps::output(&mut command).unwrap();
    println!("figure: applied after {} ms: {said}", begun.elapsed().as_millis());
    let status = weft_harness::apps::output(&mut pair.mesh.weft(&["status"])).unwrap();
    assert!(status.contains("1/1"), "{status}");
}

#[test]
fn bad_documents_are_named_and_touch_only_what_they_are_about() {
    let Some(pair) = pair("bad_yaml", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    let bad = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {namespace: shop, name: bad}\n\
               spec:\n  parentRefs: [{kind: Service, group: \"\", name: echo}]\n  rules:\n  - timeouts: {request: soon}\n---\n\
               apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: other}\n\
               spec: {clusterIP: 10.96.0.77, ports: [{port: eighty}]}\n---\n\
               this: [is not\n---\n\
               apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: good}\n\
               spec: {clusterIP: 10.96.0.78, clusterIPs: [10.96.0.78], selector: {app: echo}, ports: [{port: 80, targetPort: 8080}]}\n";
    pair.mesh.write("mixed.yaml", bad).unwrap();
    wait(Duration::from_secs(10), || {
        Ok(curl(&pair.client.pod, &["http://10.96.0.78/"]).is_ok_and(|a| a == "ok"))
    })
    .unwrap();
    // What the bad route would have done nobody knows: its own service answers that, and nothing else is touched.
    wait(Duration::from_secs(10), || {
        Ok(curl(&pair.client.pod, &[ECHO]).is_ok_and(|answer| answer.contains("\"soon\" is not a duration")))
    })
    .unwrap();
    let status = pair.mesh.api("/api/v1/status").unwrap().to_string();
    for said in ["mixed.yaml", "ports[0].port"] {
        assert!(status.contains(said), "{said} in {status}");
    }
}

#[test]
fn certificates_rotate_under_load_and_no_request_fails() {
    let Some(pair) = pair("rotation", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    let args = ["--url", ECHO, "--rate", "200", "--seconds", "30", "--half-post"];
    let loading = start_load(&pair.mesh, &pair.client.pod, &args).unwrap();
    let renewals = || {
        pair.client.metric("weft_certificate_renewals_total", &["ok"]).unwrap()
            + pair.server.sidecar.metric("weft_certificate_renewals_total", &["ok"]).unwrap()
    };
    let before = renewals();
    curl(&pair.mesh.controller_pod, &["-X", "POST", "http://127.0.0.1:14080/api/v1/certs/rotate"]).unwrap();
    wait(Duration::from_secs(20), || Ok(renewals() >= before + 2.0)).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let summary = loading.finish().unwrap();
    println!("figure: both certificates rotated: {} of {} failed", summary.failed, summary.sent);
    assert_eq!(summary.failed, 0, "{summary:?}");
}
