//! How HTTP/1.1 connections end while something is under way: by the client's half, by an app that does not read on, by
//! an app that says nothing.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use weft_control_plane::cli::demo::{
    mesh::{Options, Workload, wait},
    netns::Process,
};
use weft_harness::{
    apps::{output, service},
    wire::{Backend, Message, Wire, ok, within},
};

use crate::{
    ECHO, ECHO_ADDRESS,
    filters::{applied, http_route},
    pair_with, scripted,
};

const PATIENCE: Duration = Duration::from_secs(20);
/// More than all buffers on the way hold.
const UPLOAD: usize = 16 << 20;

#[test]
fn a_client_that_half_closes_still_gets_its_answer() {
    const LARGE: usize = 4 << 20;
    let Some(world) = scripted("half_closed", |mut wire, _| {
        while let Ok(request) = wire.message() {
            match request.head.split(' ').nth(1).unwrap_or_default() {
                "/slow" => {
                    std::thread::sleep(Duration::from_secs(2));
                    wire.say(ok("slow"))?;
                }
                "/large" => wire.say(ok(&"x".repeat(LARGE)))?,
                "/chunks" => {
                    wire.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                    for _ in 0..3 {
                        std::thread::sleep(Duration::from_millis(300));
                        wire.say("1\r\nc\r\n")?;
                    }
                    wire.say("0\r\n\r\n")?;
                }
                _ => wire.say(ok(&request.text()))?,
            }
        }
        Ok(())
    }) else {
        return;
    };
    let legacy = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", world.server.pod.ip);
    std::thread::scope(|scope| {
        for (pod, address) in [(&world.client.pod, ECHO_ADDRESS), (&legacy, &*server)] {
            for (requests, answers) in [
                (vec![("GET /slow", "")], vec!["slow".to_owned()]),
                (vec![("GET /large", "")], vec!["x".repeat(LARGE)]),
                (vec![("GET /chunks", "")], vec!["ccc".to_owned()]),
                (vec![("POST /post", "hello")], vec!["hello".to_owned()]),
                (
                    vec![("POST /one", "1"), ("GET /slow", ""), ("POST /three", "3")],
                    vec!["1".to_owned(), "slow".to_owned(), "3".to_owned()],
                ),
            ] {
                scope.spawn(move || {
                    let mut client = Wire::dial(pod, address).unwrap();
                    let texts = requests.iter().map(|(line, body)| {
                        format!("{line} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                    });
                    client.say(texts.collect::<String>()).unwrap();
                    client.finish().unwrap();
                    for expected in answers {
                        let answer = client.message().unwrap();
                        assert!(answer.text() == expected, "{requests:?} at {address}: {}", answer.head);
                    }
                    assert!(client.rest().unwrap().is_empty(), "the connection ends with its last answer");
                });
            }
        }
    });
}

#[test]
fn a_client_that_half_closes_and_goes_later_is_noticed_too() {
    let (tell, told) = mpsc::channel();
    let tell = Mutex::new(tell);
    let Some(world) = scripted("half_gone", move |mut wire, _| {
        let request = wire.message()?;
        let events = request.head.contains("/events");
        if events {
            wire.say("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")?;
        }
        tell.lock().unwrap().send("begun")?;
        wire.gone()?;
        tell.lock().unwrap().send("ended")?;
        Ok(())
    }) else {
        return;
    };
    for path in ["/quiet", "/events"] {
        let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
        client.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
        client.finish().unwrap();
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), "begun");
        if path == "/events" {
            client.until("data: 1\n\n").unwrap();
        }
        assert!(told.recv_timeout(Duration::from_millis(300)).is_err(), "it still waits: {path}");
        drop(client);
        let began = Instant::now();
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), "ended");
        println!(
            "figure: gone after a half-close {path}: its backend knew after {} ms",
            began.elapsed().as_millis()
        );
    }
}

/// Sends an upload of [`UPLOAD`] and does not look at the answer before all of it is sent.
fn blind(client: &mut Wire, path: &str, chunked: bool) -> Message {
    let framing =
        if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {UPLOAD}") };
    client.say(format!("POST {path} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n")).unwrap();
    let piece = "x".repeat(64 << 10);
    let piece = if chunked { format!("{:x}\r\n{piece}\r\n", piece.len()) } else { piece };
    for _ in 0..UPLOAD / (64 << 10) {
        client
            .say(&piece)
            .unwrap_or_else(|e| panic!("{path} chunked {chunked}: cut off while it sends: {e:#}"));
    }
    if chunked {
        client.say("0\r\n\r\n").unwrap();
    }
    client.message().unwrap_or_else(|e| panic!("{path} chunked {chunked}: {e:#}"))
}

#[test]
fn an_answer_that_comes_before_its_upload_has_ended_says_that_the_connection_ends() {
    let Some(world) = scripted("early", |mut wire, _| {
        loop {
            let head = wire.head()?;
            if head.contains("/refuse") {
                wire.say("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")?;
                // It stays open: what the client is told is not the app's to say.
                wire.rest()?;
                return Ok(());
            }
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            wire.exactly(length.map_or(Ok(0), str::parse)?)?;
            wire.say(ok("read"))?;
        }
    }) else {
        return;
    };
    let legacy = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", world.server.pod.ip);
    for (pod, address) in [(&world.client.pod, ECHO_ADDRESS), (&legacy, &*server)] {
        let mut client = Wire::dial(pod, address).unwrap();
        // One that the app reads leaves the connection as it was.
        let read = client.ask("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc").unwrap();
        assert_eq!((read.status(), read.header("connection")), (200, None), "{address}: {}", read.head);
        client
            .say(format!("POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: {UPLOAD}\r\n\r\nabc"))
            .unwrap();
        let refused = client.message().unwrap();
        assert_eq!((refused.status(), refused.text().as_str()), (413, "no"), "{address}");
        assert_eq!(refused.header("connection"), Some("close"), "{address}: {}", refused.head);
        client.say("x").unwrap();
        client.finish().unwrap();
        assert!(client.rest().unwrap().is_empty(), "{address}: it ends");
    }
}

#[test]
fn an_app_that_dies_of_a_request_takes_one_other_pod_with_it_at_most() {
    let Some(mesh) = weft_harness::apps::mesh_or_skip("poison") else { return };
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let died = Arc::new(Mutex::new(Vec::new()));
    let mut pods = Vec::new();
    for n in 1..=3 {
        let name = format!("echo-{n}");
        let pod = mesh.workload(Workload::new("shop", &name)).unwrap();
        let app = Arc::new(Mutex::new(None));
        let (died, itself) = (died.clone(), app.clone());
        let backend = Backend::start(&pod.pod, 8080, move |mut wire, _| {
            loop {
                if wire.head()?.contains("/poison") {
                    died.lock().unwrap().push(name.clone());
                    // Nobody listens any more when the connection breaks.
                    itself.lock().unwrap().take();
                    return wire.reset();
                }
                wire.say(ok(&name))?;
            }
        });
        *app.lock().unwrap() = Some(backend.unwrap());
        pods.push((pod, app));
    }
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    let mut wire = Wire::dial(&client.pod, ECHO_ADDRESS).unwrap();
    // Each has a connection that was used before.
    let mut known = std::collections::BTreeSet::new();
    assert!(within(PATIENCE, || {
        known.insert(wire.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap().text());
        known.len() == 3
    }));
    let answer = wire.ask("GET /poison HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(answer.status(), 502, "{}", answer.head);
    assert_eq!(died.lock().unwrap().len(), 2, "{died:?}");
}

#[test]
fn a_refusal_of_the_mesh_leaves_a_connection_open_whose_request_has_arrived() {
    let Some(world) = scripted("refused", |mut wire, _| {
        weft_harness::wire::answer_all(&mut wire, |request| ok(&request.text()))
    }) else {
        return;
    };
    let there = serde_json::json!([{
        "matches": [{"path": {"type": "PathPrefix", "value": "/there"}}],
        "backendRefs": [{"name": "echo", "port": 80}],
    }]);
    applied(&world.mesh, &http_route("shop", "echo", "echo", there));
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    for body in
        ["Content-Length: 3\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n"]
    {
        for (path, status) in [("/nowhere", 404), ("/there", 200)] {
            let answer = client.ask(format!("POST {path} HTTP/1.1\r\nHost: a\r\n{body}")).unwrap();
            assert_eq!(
                (answer.status(), answer.header("connection")),
                (status, None),
                "{path}: {}",
                answer.head
            );
        }
    }
    // What has not arrived is not waited for.
    client.say("POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na").unwrap();
    let refused = client.message().unwrap();
    assert_eq!((refused.status(), refused.header("connection")), (404, Some("close")), "{}", refused.head);
}

#[test]
fn an_answer_of_an_app_that_reads_no_further_reaches_even_a_client_that_looks_late() {
    let seen = Arc::new(Mutex::new(0));
    let count = seen.clone();
    let script = move |mut wire: Wire, _| {
        let head = wire.head()?;
        *count.lock().unwrap() += 1;
        wire.exactly(1_000)?;
        let close = if head.contains("/stay") { "" } else { "Connection: close\r\n" };
        wire.say(format!("HTTP/1.1 413 Too Large\r\n{close}Content-Length: 8\r\n\r\ntoo much"))?;
        if head.contains("/stay") {
            std::thread::sleep(Duration::from_millis(300));
        }
        // Closed with bytes unread: the kernel of the app sends a reset behind the answer.
        Ok(())
    };
    let Some(world) = scripted("early_reset", script.clone()) else { return };
    let legacy = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let _plain = Backend::start(&legacy, 8080, script).unwrap();
    let (server, outside) = (format!("{}:8080", world.server.pod.ip), format!("{}:8080", legacy.ip));
    let mut asked = 0;
    for (pod, address) in
        [(&world.client.pod, ECHO_ADDRESS), (&legacy, &*server), (&world.client.pod, &*outside)]
    {
        for (path, chunked) in [("/reset", false), ("/reset", true), ("/stay", false), ("/stay", true)] {
            let answer = blind(&mut Wire::dial(pod, address).unwrap(), path, chunked);
            assert_eq!((answer.status(), answer.text().as_str()), (413, "too much"), "{path} at {address}");
            asked += 1;
        }
    }
    let size = output(world.client.pod.command("bash").args([
        "-c",
        &format!("head -c {UPLOAD} /dev/zero | curl -sS -o /dev/null -w '%{{http_code}}' -H Expect: -T - {ECHO}/reset"),
    ]));
    assert_eq!(size.unwrap(), "413");
    assert_eq!(*seen.lock().unwrap(), asked + 1, "each was sent once");
}

#[test]
fn an_app_that_closes_without_a_word_costs_a_502_with_a_reason_and_no_post_is_sent_twice() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let saw = seen.clone();
    let Some(world) = scripted("no_word", move |mut wire, _| {
        while let Ok(head) = wire.head() {
            let mut request = Message { head, ..Message::default() };
            let path = request.head.split(' ').nth(1).unwrap_or_default().to_owned();
            saw.lock().unwrap().push(path.clone());
            match &*path {
                "/at-head" => return Ok(()),
                "/reset" => return wire.reset(),
                _ => wire.body_of(&mut request)?,
            }
            match &*path {
                "/ok" => wire.say(ok("ok"))?,
                "/half-a-head" => return wire.say("HTTP/1.1 200 OK\r\nContent-Le"),
                "/after-100" => return wire.say("HTTP/1.1 100 Continue\r\n\r\n"),
                _ => return Ok(()),
            }
        }
        Ok(())
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let post = |path: &str| format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
    for path in ["/at-head", "/reset", "/at-body", "/half-a-head", "/after-100"] {
        // Over a connection that has served, and over a fresh one.
        for warm in [true, false] {
            if warm {
                assert_eq!(client.ask(post("/ok")).unwrap().text(), "ok");
            }
            seen.lock().unwrap().clear();
            let answer = client.ask(post(path)).unwrap();
            let reason = answer.header("weft-reason").unwrap_or_default();
            assert_eq!(answer.status(), 502, "{path}: {}", answer.head);
            assert!(reason.starts_with("inbound;"), "{path}: {}", answer.head);
            assert_eq!(*seen.lock().unwrap(), [path], "once");
        }
    }
    // The client's own connection is as good as before.
    assert_eq!(client.ask(post("/ok")).unwrap().text(), "ok");
}

#[test]
fn a_kept_connection_of_a_caller_without_a_sidecar_is_served_while_its_pod_drains() {
    // The test ends before the drain does.
    let options = Options::with_env(&[("WEFT_LAME_DUCK", "60s"), ("WEFT_DRAIN_TIMEOUT", "90s")]);
    let Some(pair) = pair_with("drain_plain", options, &[]) else { return };
    let legacy = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", pair.server.sidecar.pod.ip);
    let post = "POST /head HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi";
    let mut kept: Vec<_> = (0..8).map(|_| Wire::dial(&legacy, &server).unwrap()).collect();
    for wire in &mut kept {
        let answer = wire.ask(post).unwrap();
        assert_eq!((answer.status(), answer.header("connection")), (200, None), "{}", answer.head);
    }
    let _drain = Process::spawn(&mut pair.server.sidecar.draining()).unwrap();
    wait(PATIENCE, || Ok(pair.server.sidecar.admin("GET", "/ready")?.1.contains("draining"))).unwrap();
    for wire in &mut kept {
        let answer = wire.ask(post).expect("a request on a kept connection is answered");
        assert_eq!((answer.status(), answer.header("connection")), (200, Some("close")), "{}", answer.head);
        assert_eq!(wire.rest().unwrap(), b"", "and ends well");
    }
}
