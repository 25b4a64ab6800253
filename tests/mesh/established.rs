//! What is open already: it ends when policy would refuse it now, when its peer's certificate has run out and when the
//! root is retired that it was believed by; what can come to its end in the time of a drain does.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use weft_control_plane::cli::demo::{
    mesh::{Meshed, Options, Workload, wait},
    netns::{Pod, Process},
};
use weft_harness::apps::{curl, service, start, testapp};

use crate::{
    ECHO, Pair,
    identity::{call, issuer_of},
    inbound::{SWITCH, ends, policy, talk},
    pair_with, rotate_root,
};

/// How long the sidecars of these tests let what is open come to its end.
pub(crate) const DRAIN: Duration = Duration::from_secs(4);
/// What a busy machine may take on top of a bound.
const SLACK: Duration = Duration::from_secs(4);

fn draining(test: &str) -> Option<Pair> {
    let drain = format!("{}s", DRAIN.as_secs());
    pair_with(test, Options::with_env(&[("WEFT_DRAIN_TIMEOUT", &drain)]), &[])
}

/// A request that is not over yet: `curl` in a pod, its standard input and output in our hands.
pub(crate) fn asks(pod: &Pod, args: &[&str]) -> Process {
    let mut command = pod.command("curl");
    command.args(["-sS", "-N", "--max-time", "60"]).args(args);
    Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap()
}

/// The same, of which the first bytes have come.
pub(crate) fn streams(pod: &Pod, args: &[&str]) -> Process {
    let mut process = asks(pod, args);
    let mut first = [0; 6];
    process.child().stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"begun\n");
    process
}

/// Sends one more piece of an upload that `asks` has begun.
pub(crate) fn sends(upload: &mut Process) {
    upload.child().stdin.as_mut().unwrap().write_all(b"12345").unwrap();
}

/// Its end: whether it ended well, and what it printed.
pub(crate) fn outcome(mut process: Process) -> (bool, String) {
    drop(process.child().stdin.take());
    let mut text = String::new();
    process.child().stdout.take().unwrap().read_to_string(&mut text).unwrap();
    (process.wait(SLACK).unwrap().expect("it should have ended").success(), text)
}

pub(crate) fn status(pod: &Pod, url: &str) -> String {
    curl(pod, &["-o", "/dev/null", "-w", "%{http_code} %header{weft-reason}", url])
        .unwrap_or_else(|e| e.to_string())
}

/// Denies some paths, and waits until that is in force.
pub(crate) fn deny(pair: &Pair, paths: &[&str]) {
    policy(pair, serde_json::json!({"action": "Deny", "rules": [{"to": [{"paths": paths}]}]}));
    let last = format!("{ECHO}{}", paths.last().unwrap());
    wait(Duration::from_secs(10), || Ok(status(&pair.client.pod, &last) == "403 inbound;denied")).unwrap();
}

#[test]
fn an_open_stream_ends_when_policy_refuses_it_and_an_upload_may_finish() {
    let Some(pair) = draining("policy_refuses_streams") else { return };
    let (client, server) = (&pair.client.pod, &pair.server.sidecar);
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let direct = format!("http://{}:8080/forever", server.pod.ip);
    let forever = format!("{ECHO}/forever");
    let mut open = vec![streams(client, &[&forever]), streams(&outsider, &[&direct])];
    // One whose answer has not begun: it is on its way when the sidecar has connected to the app for it.
    let connects = || server.metric("weft_connects_total", &[r#"result="ok""#]).unwrap();
    let before = connects();
    let waits = asks(client, &["-H", "x-late: 1", "-w", "%{http_code}", "-o", "/dev/null", &forever]);
    wait(Duration::from_secs(10), || Ok(connects() > before)).unwrap();
    let before = connects();
    let mut upload = asks(client, &["-T", "-", "-w", " %{http_code}", &format!("{ECHO}/sink")]);
    sends(&mut upload);
    wait(Duration::from_secs(10), || Ok(connects() > before)).unwrap();
    open.push(waits);

    // Policy changes, and still permits them.
    deny(&pair, &["/elsewhere"]);
    assert!(open.iter_mut().all(Process::running) && upload.running(), "what is permitted stays");

    let refused = Instant::now();
    deny(&pair, &["/forever", "/sink"]);
    sends(&mut upload);
    assert_eq!(
        outcome(upload),
        (true, "10 200".to_owned()),
        "what ends within the time of a drain ends well"
    );
    let ended: Vec<_> = open.into_iter().map(outcome).collect();
    let took = refused.elapsed();
    assert_eq!(ended[2], (true, "403".to_owned()), "it had no answer yet, so it is told why");
    assert!(!ended[0].0 && !ended[1].0, "a broken answer does not look whole: {ended:?}");
    let denied = server.metric("weft_denied_total", &[]).unwrap();
    assert!(denied >= 3.0, "{denied}");
    let log = std::fs::read_to_string(&server.log).unwrap();
    assert_eq!(log.matches("broken off: policy refuses it now").count(), 3, "{log}");
    assert_eq!(status(client, ECHO), "200", "the connection that they shared goes on");
    println!(
        "figure: an open stream ends after policy refuses it: {:.1} s (bound {} s: the drain of {} s, and policy's way)",
        took.as_secs_f64(),
        (DRAIN + SLACK).as_secs(),
        DRAIN.as_secs()
    );
    assert!(took < DRAIN + SLACK, "{took:?}");
}

#[test]
fn what_a_retired_root_vouched_for_ends_with_a_drain() {
    let Some(pair) = draining("root_retired") else { return };
    let (client, server) = (&pair.client, &pair.server.sidecar);
    let _app =
        start(&mut testapp(&pair.mesh, &server.pod, &["tcp", "--port", "9100"]), &server.pod, 9100).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    let renewals = |of: &Meshed| of.metric("weft_certificate_renewals_total", &[r#"result="ok""#]).unwrap();
    let trusts = |n: f64| {
        for sidecar in [client, server] {
            wait(Duration::from_secs(10), || Ok(sidecar.metric("weft_trust_roots", &[])? == n)).unwrap();
        }
    };
    let opaque = talk(&client.pod, "10.96.0.1", 91, "talk\\n");
    let upgraded = talk(&client.pod, "10.96.0.1", 80, SWITCH);
    let mut stream = streams(&client.pod, &[&format!("{ECHO}/forever")]);
    let mut upload = asks(&client.pod, &["-T", "-", "-w", " %{http_code}", &format!("{ECHO}/sink")]);
    sends(&mut upload);

    rotate_root(&pair.mesh, "add");
    trusts(2.0);
    let before = [client, server].map(renewals);
    rotate_root(&pair.mesh, "activate");
    for (sidecar, before) in [client, server].into_iter().zip(before) {
        wait(Duration::from_secs(20), || Ok(renewals(sidecar) > before)).unwrap();
    }
    // Under the new root, between the sidecars' new certificates.
    let mut fresh = talk(&client.pod, "10.96.0.1", 91, "talk\\n");
    assert!(stream.running() && upload.running(), "renewals end nothing");

    let retired = Instant::now();
    rotate_root(&pair.mesh, "retire");
    trusts(1.0);
    sends(&mut upload);
    assert_eq!(
        outcome(upload),
        (true, "10 200".to_owned()),
        "what ends within the time of a drain ends well"
    );
    ends(opaque);
    ends(upgraded);
    assert!(!outcome(stream).0, "a broken answer does not look whole");
    let took = retired.elapsed();
    assert!(fresh.running(), "what the new root vouches for stays");
    assert_eq!(status(&client.pod, ECHO), "200");
    for sidecar in [client, server] {
        let ended = sidecar.metric("weft_connections_ended_total", &[r#"reason="peer_untrusted""#]).unwrap();
        assert!(ended >= 1.0, "{ended}");
    }
    println!(
        "figure: what is open ends after its root was retired: {:.1} s (bound {} s: the drain of {} s, and the bundle's way)",
        took.as_secs_f64(),
        (DRAIN + SLACK).as_secs(),
        DRAIN.as_secs()
    );
    assert!(took < DRAIN + SLACK, "{took:?}");
}

#[test]
fn a_connection_ends_with_its_callers_certificate() {
    let Some(pair) = draining("caller_expires") else { return };
    let server = &pair.server.sidecar;
    let _app =
        start(&mut testapp(&pair.mesh, &server.pod, &["tcp", "--port", "9100"]), &server.pod, 9100).unwrap();
    let ours = issuer_of(&pair.mesh.dir().join("state"));
    // In whole seconds, as certificates have it.
    let life = Duration::from_secs(4);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let begin = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
    let end = begin + life;
    let leaf = ours.leaf("spiffe://cluster.local/ns/shop/sa/client", |params| {
        params.not_before = begin.into();
        params.not_after = end.into();
    });
    let (to, name) = (SocketAddr::new(server.pod.ip.into(), 9100), format!("{}.weft.internal", server.uid));
    let heard = call(&pair.client.pod, to, &name, Some(leaf), Duration::ZERO, |stream| {
        stream.sock.set_read_timeout(Some(life + SLACK + SLACK))?;
        stream.write_all(b"hello")?;
        let mut heard = Vec::new();
        // The app never ends a connection by itself; how this one is ended is not the question.
        let ended = stream.read_to_end(&mut heard);
        assert!(!ended.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock), "it was not ended");
        Ok(heard)
    });
    let late = SystemTime::now().duration_since(end).expect("not before the certificate's end");
    assert_eq!(heard.unwrap(), b"hello");
    let ended = server.metric("weft_connections_ended_total", &[r#"reason="peer_expired""#]).unwrap();
    assert_eq!(ended, 1.0);
    println!(
        "figure: a connection ends after its caller's certificate: {:.1} s (bound {} s)",
        late.as_secs_f64(),
        SLACK.as_secs()
    );
    assert!(late < SLACK, "{late:?}");
}
