//! What reaches a pod: requests that two readers could read differently, late and slow callers, and connections that
//! outlive the policy that admitted them.

use std::{
    io::Read as _,
    process::Stdio,
    sync::{Mutex, mpsc},
    time::Duration,
};

use weft_control_plane::cli::demo::{
    mesh::{Workload, wait},
    netns::{Pod, Process},
};
use weft_harness::{
    apps::{service, start, testapp},
    wire::Wire,
};

use crate::{ECHO_ADDRESS, Pair, pair, scripted};

/// Sends bytes from a pod to an address and reads until the other side ends; what was read.
fn said(pod: &Pod, address: &str, bytes: &str) -> String {
    let (host, port) = address.split_once(':').unwrap();
    let script =
        format!("exec 3<>/dev/tcp/{host}/{port}; printf '{bytes}' >&3; timeout 5 cat <&3; echo [ended: $?]");
    let output = pod.command("bash").args(["-c", &script]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A connection that says something, proves that it is answered, and stays open as long as it may.
pub(crate) fn talk(pod: &Pod, host: &str, port: u16, open: &str) -> Process {
    let script = format!(
        "exec 3<>/dev/tcp/{host}/{port}; printf '{open}' >&3; \
         while read -r -t 10 line <&3; do [[ $line == talk ]] && echo talking && break; done; cat <&3; echo ended"
    );
    let mut command = pod.command("bash");
    let mut process = Process::spawn(command.args(["-c", &script]).stdout(Stdio::piped())).unwrap();
    let mut first = [0; 8];
    process.child().stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"talking\n");
    process
}

pub(crate) fn ends(mut process: Process) {
    wait(Duration::from_secs(10), || Ok(!process.running())).expect("the connection should have been ended");
}

/// Whom the pods of `echo` admit.
pub(crate) fn policy(pair: &Pair, spec: serde_json::Value) {
    let mut all = serde_json::json!({"selector": {"matchLabels": {"app": "echo"}}});
    all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    let policy = serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "echo"}, "spec": all,
    });
    pair.mesh.write("authz.yaml", &format!("{policy:#}\n")).unwrap();
}

pub(crate) const SWITCH: &str =
    "GET /switch HTTP/1.1\\r\\nHost: a\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\ntalk\\n";

#[test]
fn a_request_that_could_be_read_in_two_ways_is_refused() {
    let Some(pair) = pair("two_ways", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", pair.server.sidecar.pod.ip);
    for (pod, address) in [(&pair.client.pod, "10.96.0.1:80"), (&outsider, &*server)] {
        let hosts = "GET /head HTTP/1.1\\r\\nHost: a\\r\\nHost: b\\r\\n\\r\\nGET /head HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n";
        let answer = said(pod, address, hosts);
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("connection: close"), "{answer}");
        assert!(!answer.contains("GET /head") && answer.ends_with("[ended: 0]\n"), "{answer}");
        let framed = "POST /head HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\nContent-Length: 5\\r\\n\
                      Transfer-Encoding: chunked\\r\\n\\r\\n3\\r\\nabc\\r\\n0\\r\\n\\r\\n";
        let answer = said(pod, address, framed);
        assert!(answer.starts_with("HTTP/1.1 400") && answer.ends_with("[ended: 0]\n"), "{answer}");
        assert!(answer.contains(";malformed_request") && !answer.contains("POST /head"), "{answer}");
    }
}

#[test]
fn a_caller_that_speaks_late_is_understood() {
    let Some(pair) = pair("late_caller", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let script = format!(
        "exec 3<>/dev/tcp/{}/8080; sleep 1; printf 'GET /head HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
         timeout 5 cat <&3",
        pair.server.sidecar.pod.ip
    );
    let output = outsider.command("bash").args(["-c", &script]).output().unwrap();
    let answer = String::from_utf8_lossy(&output.stdout);
    assert!(answer.contains(&format!("x-forwarded-for: {}", outsider.ip)), "{answer}");
}

#[test]
fn an_upgraded_connection_counts_and_ends_when_its_request_would_be_refused() {
    let Some(pair) = pair("upgrade_revoked", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let by_mesh = talk(&pair.client.pod, "10.96.0.1", 80, SWITCH);
    let outside = talk(&outsider, &pair.server.sidecar.pod.ip.to_string(), 8080, SWITCH);
    let open = |meshed: &weft_control_plane::cli::demo::mesh::Meshed, direction: &str| {
        meshed.metric("weft_connections", &[direction]).unwrap()
    };
    assert_eq!(open(&pair.client, "outbound"), 1.0);
    assert_eq!(open(&pair.server.sidecar, "inbound"), 2.0);
    policy(
        &pair,
        serde_json::json!({"action": "Deny", "rules": [{"to": [{"methods": ["GET"], "paths": ["/switch"]}]}]}),
    );
    ends(by_mesh);
    ends(outside);
    wait(Duration::from_secs(5), || Ok(open(&pair.client, "outbound") == 0.0)).unwrap();
}

/// An app that speaks bytes at the pair's server, as port 91 of its Service.
fn with_raw_port(pair: &Pair) -> Process {
    let pod = &pair.server.sidecar.pod;
    let app = start(&mut testapp(&pair.mesh, pod, &["tcp", "--port", "9100"]), pod, 9100).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    app
}

#[test]
fn an_open_plaintext_connection_ends_when_mtls_is_required() {
    let Some(pair) = pair("strict_later", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    let _app = with_raw_port(&pair);
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let opaque = talk(&outsider, &pod.ip.to_string(), 9100, "talk\\n");
    let upgraded = talk(&outsider, &pod.ip.to_string(), 8080, SWITCH);
    let mut by_mesh = talk(&pair.client.pod, "10.96.0.1", 91, "talk\\n");
    policy(&pair, serde_json::json!({"mtls": "Strict", "action": "Allow", "rules": [{}]}));
    ends(opaque);
    ends(upgraded);
    assert!(by_mesh.running(), "the mesh's own connection stays");
}

#[test]
fn a_caller_that_speaks_late_is_judged_by_what_it_says_where_only_identities_are_admitted() {
    let Some(pair) = pair("late_identity", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    let _app = with_raw_port(&pair);
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let address = format!("{}:9100", pod.ip);
    policy(
        &pair,
        serde_json::json!({"action": "Allow", "rules": [{"from": [{"identities": ["spiffe://cluster.local/ns/shop/sa/client"]}]}]}),
    );
    let refused = || {
        let mut stranger = Wire::dial(&outsider, &address)?;
        stranger.say("talk\n")?;
        Ok(!stranger.gone()?.starts_with(b"talk"))
    };
    wait(Duration::from_secs(10), refused).unwrap();
    // A ClientHello may be lost once, and comes a second later: only what is said decides.
    let mut late = Wire::dial(&outsider, &address).unwrap();
    assert!(late.is_silent_for(Duration::from_secs(1)).unwrap(), "it was judged before it spoke");
    let answer = late.ask("GET /head HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(answer.status(), 403, "{}", answer.head);
    drop(talk(&pair.client.pod, "10.96.0.1", 91, "talk\n"));
}

#[test]
fn an_upgraded_connection_that_is_broken_off_does_not_look_as_if_it_had_ended_well() {
    let (seen, ends) = mpsc::channel();
    let seen = Mutex::new(seen);
    let Some(world) = scripted("upgrade_reset", move |mut wire, _| {
        let head = wire.head()?;
        wire.say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")?;
        wire.until("go\n")?;
        if head.starts_with("GET /app-resets") {
            return wire.reset();
        }
        wire.say("gone\n")?;
        seen.lock().unwrap().send(wire.rest().is_ok())?;
        Ok(())
    }) else {
        return;
    };
    let legacy = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", world.server.pod.ip);
    for (pod, address) in [(&world.client.pod, ECHO_ADDRESS), (&legacy, &*server)] {
        let upgraded = |path: &str| {
            let mut wire = Wire::dial(pod, address).unwrap();
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
            wire.say(request).unwrap();
            assert!(wire.head().unwrap().starts_with("HTTP/1.1 101"), "{address}");
            wire.say("go\n").unwrap();
            wire
        };
        assert!(upgraded("/app-resets").rest().is_err(), "{address}: the app has reset");
        let mut wire = upgraded("/client-resets");
        wire.until("gone\n").unwrap();
        wire.reset().unwrap();
        assert!(!ends.recv().unwrap(), "{address}: the client has reset");
        let mut wire = upgraded("/client-ends");
        wire.until("gone\n").unwrap();
        wire.finish().unwrap();
        assert!(ends.recv().unwrap(), "{address}: the client has ended");
        assert_eq!(wire.rest().unwrap(), b"", "{address}: and so did the app");
    }
}
