//! What a sidecar does when it cannot decide: nothing passes. The rows of "Fail closed" in `tests/BEHAVIOURS.md` that
//! only a running mesh can show.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use weft_control_plane::cli::demo::{
    mesh::{Meshed, Options, Workload, get, wait},
    netns::Pod,
};
use weft_core::ports;
use weft_harness::apps::{curl, serve_in, service, start, testapp};

use crate::{
    ECHO,
    established::{DRAIN, asks, deny, outcome, sends, status, streams},
    identity::{issuer_of, knock},
    inbound::policy,
    pair, pair_with,
};

/// What `/ready` says.
fn ready(sidecar: &Meshed) -> (u16, String) {
    let admin = SocketAddr::from(([127, 0, 0, 1], ports::ADMIN));
    sidecar.pod.enter(|| get(admin, "/ready")).unwrap().unwrap_or_default()
}

/// Connections that the sidecar has opened: to its app, or to other pods.
fn opened(sidecar: &Meshed) -> f64 {
    sidecar.metric("weft_connects_total", &[r#"result="ok""#]).unwrap()
}

#[test]
fn a_sidecar_without_certificate_or_policy_admits_nobody_and_calls_nobody() {
    let Some(pair) = pair("no_certificate", &[]) else { return };
    let ours = issuer_of(&pair.mesh.dir().join("state"));
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    // Nobody listens there.
    for (name, missing, lacks) in [
        ("nameless-1", "WEFT_CONTROLLER_IDENTITY", "certificate"),
        ("lawless-1", "WEFT_CONTROLLER", "configuration"),
    ] {
        let mut workload = Workload::new("shop", name);
        workload.env.insert(missing.to_owned(), "127.0.0.1:9".to_owned());
        let served = serve_in(&pair.mesh, pair.mesh.begin(workload).unwrap(), &[]).unwrap();
        let sidecar = &served.sidecar;
        wait(Duration::from_secs(10), || Ok(ready(sidecar).0 == 503)).unwrap();
        if lacks == "configuration" {
            // It has a name, and nobody has told it whom to admit.
            let has = || Ok(sidecar.metric("weft_certificate_not_after_seconds", &[])? > 0.0);
            wait(Duration::from_secs(10), has).unwrap();
        }
        assert!(ready(sidecar).1.contains(lacks), "{:?}", ready(sidecar));
        let direct = format!("http://{}:8080", sidecar.pod.ip);
        for caller in [&outsider, &pair.client.pod] {
            let answer = curl(caller, &["-o", "/dev/null", "-w", "%{http_code}", &direct]);
            assert!(!answer.as_ref().is_ok_and(|code| code == "200"), "{name}: {answer:?}");
        }
        let to = SocketAddr::new(sidecar.pod.ip.into(), 8080);
        let caller = ours.leaf("spiffe://cluster.local/ns/shop/sa/client", |_| {});
        let server_name = format!("{}.weft.internal", sidecar.uid);
        assert!(knock(&pair.client.pod, to, &server_name, Some(caller), Duration::ZERO).is_err());
        // Its own app's calls go nowhere, whatever the destination.
        for url in [ECHO, &format!("http://{}:8080", pair.server.sidecar.pod.ip)] {
            let answer = curl(&sidecar.pod, &["-o", "/dev/null", "-w", "%{http_code}", url]);
            assert!(!answer.as_ref().is_ok_and(|code| code == "200"), "{name}: {url}: {answer:?}");
        }
        assert_eq!(opened(sidecar), 0.0, "{name} connected to something");
        let told = sidecar.metric("weft_proxy_errors_total", &[r#"code="not_ready""#]).unwrap();
        assert!(told >= 3.0, "{name}: {told}");
        let log = std::fs::read_to_string(&sidecar.log).unwrap();
        assert!(log.contains("not_ready"), "{log}");
    }
}

#[test]
fn a_certificate_that_runs_out_ends_what_is_open_and_nothing_goes_in_plaintext() {
    let drain = format!("{}s", DRAIN.as_secs());
    let options =
        Options::with_env(&[("WEFT_DRAIN_TIMEOUT", &drain)]).controller(&["--certificate-lifetime", "10s"]);
    let Some(mut pair) = pair_with("own_certificate", options, &[]) else { return };
    let stream = streams(&pair.client.pod, &[&format!("{ECHO}/forever")]);
    let mut upload = asks(&pair.client.pod, &["-T", "-", "-w", " %{http_code}", &format!("{ECHO}/sink")]);
    sends(&mut upload);
    pair.mesh.kill_controller().unwrap();
    let (client, server) = (&pair.client, &pair.server.sidecar);
    let expired = |sidecar: &Meshed| {
        Ok::<_, anyhow::Error>(sidecar.metric("weft_certificate_not_after_seconds", &[])? == 0.0)
    };
    wait(Duration::from_secs(20), || Ok(expired(client)? || expired(server)?)).unwrap();
    sends(&mut upload);
    assert_eq!(
        outcome(upload),
        (true, "10 200".to_owned()),
        "what ends within the time of a drain ends well"
    );
    wait(Duration::from_secs(20), || Ok(expired(client)? && expired(server)?)).unwrap();
    assert!(!outcome(stream).0, "a broken answer does not look whole");
    for sidecar in [client, server] {
        assert!(ready(sidecar).0 == 503 && ready(sidecar).1.contains("certificate"), "{:?}", ready(sidecar));
    }
    let ended = client.metric("weft_connections_ended_total", &[r#"reason="own_expired""#]).unwrap()
        + server.metric("weft_connections_ended_total", &[r#"reason="own_expired""#]).unwrap();
    assert!(ended >= 1.0, "{ended}");
    let before = opened(server);
    let ours = issuer_of(&pair.mesh.dir().join("state"));
    let caller = ours.leaf("spiffe://cluster.local/ns/shop/sa/client", |_| {});
    let (to, name) = (SocketAddr::new(server.pod.ip.into(), 8080), format!("{}.weft.internal", server.uid));
    assert!(
        knock(&client.pod, to, &name, Some(caller), Duration::ZERO).is_err(),
        "mTLS without a certificate"
    );
    let refused: Vec<String> = (0..20).map(|_| status(&client.pod, ECHO)).collect();
    assert!(refused.iter().all(|answer| answer.starts_with("503 outbound;")), "{refused:?}");
    let plain = opened(server) - before;
    println!("figure: requests that an expired sidecar sent in plaintext: {plain} of 20 (bound 0)");
    assert_eq!(plain, 0.0);
    pair.mesh.start_controller().unwrap();
    // Both sidecars ask again after up to 30 s each, by chance.
    wait(Duration::from_secs(60), || Ok(status(&pair.client.pod, ECHO) == "200")).expect("it comes back");
}

#[test]
fn overload_refuses_what_is_new_and_skips_no_rule() {
    let few = Options::with_env(&[("WEFT_MAX_CONNECTIONS_PER_PEER", "4")]);
    let Some(pair) = pair_with("overload", few, &[]) else { return };
    let (client, server) = (&pair.client, &pair.server.sidecar);
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    deny(&pair, &["/private"]);
    let full: Vec<_> = (0..2).map(|_| streams(&client.pod, &[&format!("{ECHO}/forever")])).collect();
    crate::policy(&pair.mesh, "echo", serde_json::json!({"limits": {"maxRequests": 2}}));
    let answer = |url: &str| {
        let format = "%{http_code} %header{weft-reason} %header{retry-after}";
        curl(&client.pod, &["-o", "/dev/null", "-w", format, url]).unwrap()
    };
    wait(Duration::from_secs(10), || Ok(answer(ECHO) == "503 outbound;overloaded 1")).unwrap();
    assert!(client.metric("weft_requests_shed_total", &[]).unwrap() >= 1.0);
    drop(full);
    wait(Duration::from_secs(10), || Ok(status(&client.pod, ECHO) == "200")).expect("room again");

    // The called side: one peer's connections are bounded, others come in, and rules hold for them as ever.
    let address = SocketAddr::new(server.pod.ip.into(), 8080);
    let held: Vec<TcpStream> = outsider
        .enter(|| (0..4).map(|_| TcpStream::connect(address)).collect::<io::Result<_>>())
        .unwrap()
        .unwrap();
    let open = || Ok(server.metric("weft_connections", &["inbound"])? >= 4.0);
    wait(Duration::from_secs(10), open).unwrap();
    let shed = curl(&outsider, &["-o", "/dev/null", &format!("http://{address}/private")]).unwrap_err();
    // The reset may come before curl has looked at its connection.
    let refused = ["reset", "mpty reply", "Couldn't connect"];
    assert!(refused.iter().any(|word| shed.to_string().contains(word)), "{shed}");
    assert_eq!(server.metric("weft_connections_shed_total", &["inbound"]).unwrap(), 1.0);
    assert_eq!(status(&client.pod, ECHO), "200");
    assert_eq!(status(&client.pod, &format!("{ECHO}/private")), "403 inbound;denied");
    drop(held);
    wait(Duration::from_secs(10), || {
        Ok(status(&outsider, &format!("http://{address}/private")) == "403 inbound;denied")
    })
    .expect("room again");
}

#[test]
fn caps_hold_for_the_whole_sidecar_however_many_workers_it_has() {
    let Some(pair) = pair_with("caps", Options::with_env(&[("WEFT_WORKERS", "4")]), &[]) else { return };
    let client = &pair.client.pod;
    let full: Vec<_> = (0..2).map(|_| streams(client, &[&format!("{ECHO}/forever")])).collect();
    crate::policy(&pair.mesh, "echo", serde_json::json!({"limits": {"maxRequests": 2}}));
    // Each comes by a connection of its own, so by any of the workers.
    let refused = || Ok((0..16).all(|_| status(client, ECHO) == "503 outbound;overloaded"));
    wait(Duration::from_secs(15), refused).expect("the cap is the pod's");
    drop(full);
    wait(Duration::from_secs(10), || Ok(status(client, ECHO) == "200")).expect("room again");
}

#[test]
fn http_opens_no_more_connections_to_a_service_than_its_policy_allows() {
    let Some(pair) = pair("max_connections", &[]) else { return };
    let client = &pair.client.pod;
    // Without a sidecar there: a connection carries one request at a time.
    let legacy = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let _app = start(
        &mut testapp(&pair.mesh, &legacy, &["http", "--port", "8080", "--name", "legacy-1"]),
        &legacy,
        8080,
    )
    .unwrap();
    // Before the service: what has no policy yet would leave connections that may be used again.
    crate::policy(&pair.mesh, "legacy", serde_json::json!({"limits": {"maxConnections": 2}}));
    service(&pair.mesh, "shop", "legacy", "10.96.0.2", &[("web", 80, 8080)]).unwrap();
    let url = "http://10.96.0.2";
    let full: Vec<_> = (0..2).map(|_| streams(client, &[&format!("{url}/forever")])).collect();
    wait(Duration::from_secs(15), || Ok(status(client, url) == "503 outbound;overloaded"))
        .expect("no third connection");
    assert_eq!(status(client, ECHO), "200", "other services have their own");
    drop(full);
    wait(Duration::from_secs(10), || Ok(status(client, url) == "200")).expect("room again");
}

/// What a client hears that says `bytes`, with a pause before each piece, until the other side ends.
fn hears(pod: &Pod, to: SocketAddr, pieces: &[&str], pause: Duration) -> String {
    pod.enter(|| {
        let mut stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        for piece in pieces {
            std::thread::sleep(pause);
            if stream.write_all(piece.as_bytes()).is_err() {
                break;
            }
        }
        let mut heard = Vec::new();
        // How it ends is not the question; that it ends is.
        match stream.read_to_end(&mut heard) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Ok(_) | Err(_) => Ok(String::from_utf8_lossy(&heard).into_owned()),
        }
    })
    .unwrap()
    .expect("the connection should have been ended")
}

#[test]
fn silence_and_slow_bytes_do_not_pass_rules_about_http() {
    let impatient = Options::with_env(&[("WEFT_HEADER_TIMEOUT", "2s")]);
    let Some(pair) = pair_with("slow_bytes", impatient, &[]) else { return };
    let server = &pair.server.sidecar;
    let greets = &["tcp", "--port", "9100", "--greeting", "welcome"];
    let _app = start(&mut testapp(&pair.mesh, &server.pod, greets), &server.pod, 9100).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let direct = SocketAddr::new(server.pod.ip.into(), 9100);
    let ways = [(&outsider, direct), (&pair.client.pod, "10.96.0.1:91".parse().unwrap())];
    let welcomed = |pod: &Pod, to: SocketAddr| {
        pod.enter(|| {
            let mut welcome = [0; 7];
            TcpStream::connect(to)?.read_exact(&mut welcome)?;
            io::Result::Ok(welcome)
        })
        .unwrap()
    };
    for (pod, to) in ways {
        assert_eq!(
            &welcomed(pod, to).expect("the control: without rules a silent client is greeted"),
            b"welcome"
        );
    }
    policy(
        &pair,
        serde_json::json!({"action": "Allow", "rules": [{"to": [{"methods": ["GET"], "paths": ["/public"]}]}]}),
    );
    wait(Duration::from_secs(10), || Ok(status(&pair.client.pod, ECHO) == "403 inbound;denied")).unwrap();
    let (before, denied) = (opened(server), server.metric("weft_denied_total", &[]).unwrap());
    let at_once = Duration::ZERO;
    let private: Vec<String> =
        "GET /private HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".chars().map(String::from).collect();
    let private: Vec<&str> = private.iter().map(String::as_str).collect();
    let mut cases = 0;
    for (pod, to) in ways {
        for (case, pieces, pause) in [
            ("silence", &[][..], at_once),
            ("bytes of no protocol", &["hello\n"], at_once),
            ("a request that never becomes one", &["GE"], at_once),
            (
                "silence, then a request",
                &["GET /private HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"],
                Duration::from_secs(1),
            ),
            ("a request byte by byte", &private, Duration::from_millis(2)),
        ] {
            let heard = hears(pod, to, pieces, pause);
            assert!(heard.is_empty() || heard.starts_with("HTTP/1.1 403"), "{case}: {heard}");
            cases += 1;
        }
    }
    let passed = opened(server) - before;
    println!(
        "figure: undecided connections that reached an app behind rules about HTTP: {passed} of {cases} (bound 0)"
    );
    assert_eq!(passed, 0.0);
    assert!(server.metric("weft_denied_total", &[]).unwrap() >= denied + f64::from(cases / 2));
    assert!(server.metric("weft_detect_timeouts_total", &[]).unwrap() >= 1.0);
    let log = std::fs::read_to_string(&server.log).unwrap();
    assert!(log.lines().any(|line| line.contains("connection refused") && line.contains("denied")), "{log}");
}
