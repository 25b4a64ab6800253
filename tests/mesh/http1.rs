//! HTTP/1.1 and 1.0 across two sidecars, byte by byte where a library would hide what matters.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use anyhow::Result;
use weft_control_plane::cli::demo::mesh::Workload;
use weft_harness::{
    apps::{curl, mesh_or_skip, output, rss_kib, service},
    wire::{Backend, Message, Wire, answer_all, ok},
};

use crate::{ECHO, ECHO_ADDRESS, pair, scripted};

/// A backend that answers with the request as it arrived.
fn mirror(mut wire: Wire, _: usize) -> Result<()> {
    answer_all(&mut wire, |request| ok(&format!("{}\n\n{}", request.head, request.text())))
}

/// The request that a mirror saw.
fn mirrored(answer: &Message) -> Message {
    assert_eq!(answer.status(), 200, "{}", answer.head);
    let text = answer.text();
    let (head, body) = text.split_once("\n\n").unwrap();
    Message { head: head.to_owned(), body: body.into(), trailers: String::new() }
}

#[test]
fn host_absolute_targets_and_options_star_arrive_as_sent() {
    let Some(world) = scripted("targets", mirror) else { return };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    for (target, host, seen_host) in [
        ("GET /a%2fb?c=d&e", "shop.example:81", "shop.example:81"),
        ("GET http://shop.example/x?y=1", "shop.example", "shop.example"),
        ("GET http://shop.example:8000", "shop.example:8000", "shop.example:8000"),
        // RFC 9112 §3.2.2: the target's own authority counts.
        ("GET http://other.example/", "shop.example", "other.example"),
        ("OPTIONS *", "shop.example", "shop.example"),
        ("OPTIONS /x", "shop.example", "shop.example"),
    ] {
        let answer = client.ask(format!("{target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).unwrap();
        let seen = mirrored(&answer);
        let line = seen.head.lines().next().unwrap();
        let expected = if target.ends_with(":8000") { format!("{target}/") } else { target.to_owned() };
        assert_eq!(line, format!("{expected} HTTP/1.1"));
        assert_eq!(seen.header("host"), Some(seen_host), "{target}");
    }
}

#[test]
fn http_1_0_works_without_host_and_with_keep_alive() {
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n";
    let Some(world) = scripted("http10", move |mut wire, _| {
        answer_all(&mut wire, |request| match request.head.contains(" /chunked ") {
            true => chunked.to_owned(),
            false => ok(&format!("{}\n\n", request.head)),
        })
    }) else {
        return;
    };
    let pod = &world.client.pod;
    let mut client = Wire::dial(pod, ECHO_ADDRESS).unwrap();
    let answer = client.ask("GET /one HTTP/1.0\r\n\r\n").unwrap();
    assert!(mirrored(&answer).head.starts_with("GET /one HTTP/1."), "{}", answer.text());
    assert!(answer.head.starts_with("HTTP/1.0 200"), "{}", answer.head);
    assert_eq!(client.rest().unwrap(), b"", "an HTTP/1.0 connection ends with its answer");
    let mut client = Wire::dial(pod, ECHO_ADDRESS).unwrap();
    for path in ["/one", "/two"] {
        let answer = client.ask(format!("GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")).unwrap();
        assert!(mirrored(&answer).head.starts_with(&format!("GET {path} ")), "{}", answer.text());
        assert_eq!(answer.header("connection"), Some("keep-alive"), "{}", answer.head);
    }
    // HTTP/1.0 knows no chunks: the end of the connection is the end of the body.
    let answer = client.ask("GET /chunked HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!(
        (answer.text().as_str(), answer.header("transfer-encoding")),
        ("abcdef", None),
        "{}",
        answer.head
    );
}

#[test]
fn head_204_and_304_have_no_body_whatever_their_length_says() {
    let Some(world) = scripted("no_body", |mut wire, _| {
        answer_all(&mut wire, |request| match request.head.split(' ').nth(1).unwrap_or_default() {
            "/77" => "HTTP/1.1 200 OK\r\nContent-Length: 77\r\n\r\n".to_owned(),
            "/chunked" => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
            "/204" => "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n".to_owned(),
            "/304" => "HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\nETag: \"x\"\r\n\r\n".to_owned(),
            _ => ok("ok"),
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    for (request, status, length) in [
        ("HEAD /77", "200", Some("77")),
        ("HEAD /chunked", "200", None),
        ("GET /204", "204", None),
        ("GET /304", "304", None),
        ("HEAD /304", "304", Some("10")),
    ] {
        client.say(format!("{request} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
        let answer = Message { head: client.head().unwrap(), ..Message::default() };
        assert!(answer.head.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {}", answer.head);
        assert_eq!(answer.header("content-length"), length, "{request}: {}", answer.head);
        // The next answer begins right behind the head, on the same connection.
        assert_eq!(
            client.ask("GET /ok HTTP/1.1\r\nHost: a\r\n\r\n").unwrap().text(),
            "ok",
            "after {request}"
        );
    }
}

#[test]
fn what_belongs_to_one_connection_goes_and_equal_names_keep_their_order() {
    let Some(world) = scripted("hop_by_hop", |mut wire, _| {
        answer_all(&mut wire, |request| {
            let body = format!("{}\n\n", request.head);
            format!(
                "HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\n\
                 Keep-Alive: timeout=5\r\nSet-Cookie: b=2\r\nX-Kept: yes\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let request = "GET / HTTP/1.1\r\nHost: a\r\nX-Many: one\r\nConnection: keep-alive, X-Mine, TE\r\nX-Mine: 1\r\n\
                   Keep-Alive: timeout=9\r\nProxy-Connection: keep-alive\r\nX-Many: two, three\r\n\
                   TE: gzip, trailers\r\nX-Many: four\r\n\r\n";
    let answer = client.ask(request).unwrap();
    let seen = mirrored(&answer);
    for gone in ["x-mine", "keep-alive", "proxy-connection", "connection", "upgrade"] {
        assert!(seen.all(gone).is_empty(), "{gone}: {}", seen.head);
    }
    assert_eq!(seen.all("x-many"), ["one", "two, three", "four"]);
    assert_eq!(seen.header("te"), Some("trailers"));
    assert_eq!(answer.all("set-cookie"), ["a=1", "b=2"]);
    assert_eq!(answer.header("x-kept"), Some("yes"));
    for gone in ["x-secret", "keep-alive"] {
        assert!(answer.all(gone).is_empty(), "{gone}: {}", answer.head);
    }
}

#[test]
fn what_an_app_answers_arrives_as_it_is() {
    const GZIP: &str = "Content-Encoding: gzip\r\nVary: Accept-Encoding\r\nETag: W/\"x\"\r\n";
    let Some(world) = scripted("as_it_is", |mut wire, _| {
        answer_all(&mut wire, |request| {
            match request.head.split(' ').nth(1).unwrap_or_default() {
            "/own" => "HTTP/1.1 200 OK\r\nServer: mine/1\r\nDate: yesterday\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "/packed" => format!("HTTP/1.1 200 OK\r\n{GZIP}Content-Length: 6\r\n\r\n\x1f\x7f\x00\r\nz"),
            "/part" => format!(
                "HTTP/1.1 206 Partial Content\r\nX-Asked: {}\r\nContent-Range: bytes 2-4/9\r\nContent-Length: 3\r\n\r\ncde",
                request.header("range").unwrap_or_default()
            ),
            "/odd" => "HTTP/1.1 299 Odd\r\nX-Empty:\r\nX-Spaces: \t a  b \t\r\nX-Latin: caf\u{e9}\r\nContent-Length: 0\r\n\r\n".to_owned(),
            _ => ok("plain"),
        }
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let mut get = |path: &str, more: &str| {
        client.ask(format!("GET {path} HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n{more}\r\n")).unwrap()
    };
    let own = get("/own", "");
    assert_eq!((own.header("server"), own.header("date")), (Some("mine/1"), Some("yesterday")));
    let packed = get("/packed", "");
    assert_eq!(
        (packed.body.as_slice(), packed.header("content-encoding")),
        (&b"\x1f\x7f\0\r\nz"[..], Some("gzip"))
    );
    assert_eq!((packed.header("vary"), packed.header("etag")), (Some("Accept-Encoding"), Some("W/\"x\"")));
    let part = get("/part", "Range: bytes=2-4\r\n");
    assert_eq!((part.status(), part.text().as_str()), (206, "cde"));
    assert_eq!(
        (part.header("x-asked"), part.header("content-range")),
        (Some("bytes=2-4"), Some("bytes 2-4/9"))
    );
    let odd = get("/odd", "");
    assert_eq!((odd.status(), odd.header("x-empty"), odd.header("x-spaces")), (299, Some(""), Some("a  b")));
    assert_eq!(odd.header("x-latin"), Some("caf\u{e9}"), "bytes above ASCII");
    // And nothing that the app did not say.
    let plain = get("/plain", "");
    let names: Vec<_> = plain.head.lines().skip(1).filter_map(|line| line.split(':').next()).collect();
    assert_eq!(names, ["content-length"], "{}", plain.head);
}

#[test]
fn events_and_chunks_arrive_when_they_are_sent() {
    let (tell, told) = mpsc::channel();
    let told = Mutex::new(told);
    let Some(world) = scripted("events", move |mut wire, _| {
        let request = wire.message()?;
        let chunked = request.head.contains("/chunks");
        let framing = if chunked { "Transfer-Encoding: chunked\r\n" } else { "" };
        wire.say(format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n"))?;
        for n in 0..10 {
            // Not before the client has the one before.
            told.lock().unwrap().recv_timeout(Duration::from_secs(20))?;
            let event = format!("data: {n}\n\n");
            wire.say(if chunked { format!("{:x}\r\n{event}\r\n", event.len()) } else { event })?;
        }
        wire.say(if chunked { "0\r\n\r\n" } else { "" })
    }) else {
        return;
    };
    for path in ["/events", "/chunks"] {
        let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
        client.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
        client.head().unwrap();
        for n in 0..10 {
            tell.send(()).unwrap();
            client.until(&format!("data: {n}\n\n")).unwrap();
        }
    }
}

#[test]
fn pipelined_requests_are_answered_in_order_and_none_after_close_is_read() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let saw = seen.clone();
    let Some(world) = scripted("pipelined", move |mut wire, _| {
        answer_all(&mut wire, |request| {
            let path = request.head.split(' ').nth(1).unwrap_or_default().to_owned();
            saw.lock().unwrap().push(path.clone());
            if path == "/slow" {
                std::thread::sleep(Duration::from_millis(100));
            }
            ok(&path)
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let post = "POST /post HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc";
    client.say([get("/slow"), post.to_owned(), get("/last")].concat()).unwrap();
    let answers: Vec<_> = (0..3).map(|_| client.message().unwrap().text()).collect();
    assert_eq!(answers, ["/slow", "/post", "/last"]);
    seen.lock().unwrap().clear();
    client.say("GET /final HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let answer = client.message().unwrap();
    assert_eq!((answer.text().as_str(), answer.header("connection")), ("/final", Some("close")));
    assert!(client.gone().unwrap().is_empty(), "nothing follows the last answer");
    assert_eq!(*seen.lock().unwrap(), ["/final"]);
}

/// Sends a request's head with `Expect: 100-continue` and reads the first head that comes back.
fn expecting(client: &mut Wire, path: &str, framing: &str) -> Message {
    client
        .say(format!("POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n{framing}\r\n\r\n"))
        .unwrap();
    Message { head: client.head().unwrap(), ..Message::default() }
}

#[test]
fn expect_100_continue_is_not_answered_before_there_is_an_endpoint() {
    let Some(pair) = pair("expect_no_endpoint", &[]) else { return };
    service(&pair.mesh, "shop", "nobody", "10.96.0.9", &[("web", 80, 8080)]).unwrap();
    let mut client = Wire::dial(&pair.client.pod, "10.96.0.9:80").unwrap();
    let answer = expecting(&mut client, "/", "Content-Length: 5");
    assert_eq!(
        (answer.status(), answer.header("weft-reason")),
        (503, Some("outbound;no_endpoint")),
        "{}",
        answer.head
    );
}

#[test]
fn a_body_that_nobody_asked_for_can_be_sent_to_another_endpoint() {
    let Some(mesh) = mesh_or_skip("expect_retry") else { return };
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    crate::policy(
        &mesh,
        "echo",
        serde_json::json!({"retries": {"statuses": ["503"], "maxRetries": 2}, "loadBalancing": {"algorithm": "RoundRobin"}}),
    );
    let mut pods = Vec::new();
    for n in 1..=2 {
        // Without sidecars: the client's own asks them.
        let pod = mesh.plain(&Workload::new("shop", &format!("echo-{n}"))).unwrap();
        let backend = Backend::start(&pod, 8080, move |mut wire, _| {
            loop {
                let mut request = Message { head: wire.head()?, ..Message::default() };
                if n == 1 {
                    wire.say("HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy")?;
                    wire.rest()?;
                    return Ok(());
                }
                wire.say("HTTP/1.1 100 Continue\r\n\r\n")?;
                wire.body_of(&mut request)?;
                wire.say(ok(&request.text()))?;
            }
        });
        pods.push((pod, backend.unwrap()));
    }
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    for _ in 0..4 {
        let mut wire = Wire::dial(&client.pod, ECHO_ADDRESS).unwrap();
        wire.say("PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").unwrap();
        let asked = wire.head().unwrap();
        assert!(asked.starts_with("HTTP/1.1 100 "), "{asked}");
        wire.say("hello").unwrap();
        let answer = wire.message().unwrap();
        assert_eq!((answer.status(), answer.text().as_str()), (200, "hello"), "{}", answer.head);
    }
}

/// A backend that has its say before the body of a request that expects: by path, it refuses, asks, or asks for nothing.
/// What it saw of the body goes to `saw`.
fn with_a_say(saw: mpsc::Sender<String>) -> impl Fn(Wire, usize) -> Result<()> + Send + Sync + 'static {
    let saw = Mutex::new(saw);
    move |mut wire, _| {
        while let Ok(head) = wire.head() {
            let mut request = Message { head, ..Message::default() };
            let path = request.head.split(' ').nth(1).unwrap_or_default().to_owned();
            assert_eq!(request.header("expect"), Some("100-continue"), "{}", request.head);
            if let Ok(status) = path[1..].parse::<u16>() {
                wire.say(format!("HTTP/1.1 {status} No\r\nX-Mine: 1\r\nContent-Length: 2\r\n\r\nno"))?;
                let rest = wire.gone()?;
                saw.lock().unwrap().send(format!("{} bytes of a body", rest.len()))?;
                return Ok(());
            }
            if path != "/silent" {
                let early = !wire.is_silent_for(Duration::from_millis(200))?;
                saw.lock().unwrap().send(format!("early: {early}"))?;
                wire.say("HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")?;
            }
            wire.body_of(&mut request)?;
            let head = "HTTP/1.1 200 OK\r\nX-Mine: 1\r\nX-Mine: 2\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n";
            let text = request.text();
            wire.say(format!("{head}{:x}\r\n{text}\r\n0\r\nX-Sum: 1\r\n\r\n", text.len()))?;
        }
        Ok(())
    }
}

#[test]
fn a_backend_has_its_say_before_the_body_of_a_request_that_expects() {
    let (tell, told) = mpsc::channel();
    let Some(world) = scripted("expect", with_a_say(tell.clone())) else { return };
    // The same through one sidecar alone, either one.
    let legacy = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let _plain = Backend::start(&legacy, 8080, with_a_say(tell)).unwrap();
    let (server, outside) = (format!("{}:8080", world.server.pod.ip), format!("{}:8080", legacy.ip));
    let patience = Duration::from_secs(20);
    let ways = [(&world.client.pod, ECHO_ADDRESS), (&legacy, &*server), (&world.client.pod, &*outside)];
    for (pod, address) in ways {
        for (framing, body) in
            [("Content-Length: 5", "hello"), ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n")]
        {
            let mut client = Wire::dial(pod, address).unwrap();
            // Two on one connection: what is between them stays in step.
            for _ in 0..2 {
                let asked = expecting(&mut client, "/go", &format!("TE: trailers\r\n{framing}"));
                assert_eq!(asked.status(), 100, "{address}: {}", asked.head);
                assert_eq!(told.recv_timeout(patience).unwrap(), "early: false");
                let answer = client.ask(body).unwrap();
                assert_eq!((answer.status(), answer.text().as_str()), (200, "hello"), "{}", answer.head);
                assert_eq!((answer.all("x-mine"), answer.trailers.as_str()), (vec!["1", "2"], "x-sum: 1\n"));
            }
            // One that never asks gets the body none the less, and its client is asked for it.
            let began = Instant::now();
            let asked = expecting(&mut client, "/silent", framing);
            assert_eq!(asked.status(), 100, "{address}: {}", asked.head);
            println!(
                "figure: a backend that never asks: its client is asked after {} ms",
                began.elapsed().as_millis()
            );
            assert_eq!(client.ask(body).unwrap().text(), "hello");
            for status in [413, 401, 417] {
                let mut client = Wire::dial(pod, address).unwrap();
                let mut answer = expecting(&mut client, &format!("/{status}"), framing);
                client.body_of(&mut answer).unwrap();
                assert_eq!((answer.status(), answer.text().as_str()), (status, "no"), "{address}");
                assert_eq!(
                    (answer.header("x-mine"), answer.header("connection")),
                    (Some("1"), Some("close"))
                );
                assert_eq!(told.recv_timeout(patience).unwrap(), "0 bytes of a body");
                // A client that sends it none the less is not misread.
                client.say([body, "GET /after HTTP/1.1\r\nHost: a\r\n\r\n"].concat()).unwrap();
                assert!(client.gone().unwrap().is_empty(), "{address}: nothing follows");
            }
            // A body that was sent unasked, and one that came with its head.
            let mut client = Wire::dial(pod, address).unwrap();
            client
                .say(format!(
                    "POST /go HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n{framing}\r\n\r\n{body}"
                ))
                .unwrap();
            assert_eq!(client.message().unwrap().status(), 100);
            assert_eq!(told.recv_timeout(patience).unwrap(), "early: false");
            assert_eq!(client.message().unwrap().text(), "hello");
        }
    }
    // curl sends not a byte of its file to whom it is refused.
    let refused = output(world.client.pod.command("curl").args([
        "-sS",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %{size_upload}",
        "-H",
        "Expect: 100-continue",
        "-T",
        "/proc/self/exe",
        &format!("{ECHO}/413"),
    ]));
    assert_eq!(refused.unwrap(), "413 0");
}

#[test]
fn informational_answers_but_100_are_dropped() {
    let Some(world) = scripted("informational", |mut wire, _| {
        answer_all(&mut wire, |_| {
            let early = "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
            format!("{early}{}", ok("whole"))
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let answer = client.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!((answer.status(), answer.text().as_str(), answer.header("link")), (200, "whole", None));
}

#[test]
fn a_client_that_has_gone_is_noticed_and_the_backend_told() {
    let (tell, told) = mpsc::channel();
    let tell = Mutex::new(tell);
    let Some(world) = scripted("client_gone", move |mut wire, _| {
        let request = wire.message()?;
        let path = request.head.split(' ').nth(1).unwrap_or_default().to_owned();
        tell.lock().unwrap().send(format!("begun {path}"))?;
        wire.gone()?;
        tell.lock().unwrap().send(format!("ended {path}"))?;
        Ok(())
    }) else {
        return;
    };
    let patience = Duration::from_secs(20);
    for path in ["/reset", "/closed"] {
        let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
        client.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
        assert_eq!(told.recv_timeout(patience).unwrap(), format!("begun {path}"));
        let began = Instant::now();
        match path {
            "/reset" => client.reset().unwrap(),
            _ => drop(client),
        }
        assert_eq!(told.recv_timeout(patience).unwrap(), format!("ended {path}"));
        println!("figure: HTTP/1.1 client {path}: its backend knew after {} ms", began.elapsed().as_millis());
    }
}

/// How a backend ends a connection that it has answered on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// Says so: Apache and gunicorn, by default.
    Announced,
    /// At once and without a word: only what may be repeated can be sent to such a one without risk.
    AtOnce,
    /// After so long without a request: Node (5 s), and everybody else.
    Idle(Duration),
}

#[test]
fn an_app_that_closes_its_connections_costs_no_request_and_repeats_none() {
    for closing in [Closing::Announced, Closing::AtOnce, Closing::Idle(Duration::from_millis(300))] {
        let times = Arc::new(Mutex::new(BTreeMap::<String, u32>::new()));
        let seen = times.clone();
        let Some(world) = scripted("closing", move |mut wire, _| {
            loop {
                if let Closing::Idle(limit) = closing {
                    wire.stream().set_read_timeout(Some(limit))?;
                }
                let Ok(request) = wire.message() else { return Ok(()) };
                let id = request.header("x-id").unwrap_or_default().to_owned();
                *seen.lock().unwrap().entry(id).or_default() += 1;
                let close = if closing == Closing::Announced { "connection: close\r\n" } else { "" };
                wire.say(format!("HTTP/1.1 200 OK\r\n{close}content-length: 2\r\n\r\nok"))?;
                if !matches!(closing, Closing::Idle(_)) {
                    return Ok(());
                }
            }
        }) else {
            return;
        };
        let world = &world;
        // Pauses around the moment at which the backend closes.
        let (clients, rounds) = (10, 10);
        std::thread::scope(|scope| {
            for client in 0..clients {
                scope.spawn(move || {
                    let mut wire = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
                    for round in 0..rounds {
                        let safe = round % 4 == 0 || closing == Closing::AtOnce;
                        let method = if safe { "GET" } else { "POST" };
                        let length = if method == "POST" { "Content-Length: 3\r\n" } else { "" };
                        let body = if method == "POST" { "abc" } else { "" };
                        let id = format!("{method}-{client}-{round}");
                        let request =
                            format!("{method} / HTTP/1.1\r\nHost: a\r\nX-Id: {id}\r\n{length}\r\n{body}");
                        let answer = wire.ask(request).unwrap();
                        assert_eq!(answer.status(), 200, "{closing:?} {id}: {}", answer.head);
                        std::thread::sleep(Duration::from_millis(294 + (round * 7 + client * 3) % 12));
                    }
                });
            }
        });
        let times = times.lock().unwrap();
        let twice = times.iter().filter(|(id, n)| id.starts_with("POST") && **n > 1).count();
        println!(
            "figure: backend closes ({closing:?}): {} requests, 0 failed, {twice} POSTs sent twice",
            times.len()
        );
        assert_eq!((times.len() as u64, twice), (clients * rounds, 0), "{closing:?}");
    }
}

#[test]
fn an_apps_keep_alive_timeout_bounds_the_reuse_of_its_connections() {
    let Some(world) = scripted("keep_alive_hint", |mut wire, number| {
        answer_all(&mut wire, |request| {
            let hint = if request.head.contains("/hint") { "Keep-Alive: timeout=1\r\n" } else { "" };
            let text = number.to_string();
            format!("HTTP/1.1 200 OK\r\n{hint}Content-Length: {}\r\n\r\n{text}", text.len())
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let mut connection_of =
        |path: &str| client.ask(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap().text();
    let pause = Duration::from_millis(1_300);
    // Without a hint an idle connection serves for two seconds; with one, for as long as the app says.
    let first = connection_of("/hint");
    std::thread::sleep(pause);
    let second = connection_of("/plain");
    assert_ne!(first, second, "the app closes it after a second");
    std::thread::sleep(pause);
    assert_eq!(connection_of("/plain"), second);
    std::thread::sleep(Duration::from_millis(2_300));
    assert_ne!(connection_of("/plain"), second, "nothing idle for two seconds is used again");
}

#[test]
fn trailers_pass_through_chunked_encoding_both_ways() {
    let Some(world) = scripted("trailers", |mut wire, _| {
        while let Ok(request) = wire.message() {
            let seen = format!(
                "{}|{}|{}",
                request.text(),
                request.trailers,
                request.header("trailer").unwrap_or("")
            );
            wire.say(format!(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n{:x}\r\n{seen}\r\n0\r\nX-Sum: 42\r\n\r\n",
                seen.len()
            ))?;
        }
        Ok(())
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let request = "POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\nTrailer: X-Check\r\n\r\n\
                   3\r\nabc\r\n0\r\nX-Check: 7\r\n\r\n";
    let answer = client.ask(request).unwrap();
    assert_eq!(answer.text(), "abc|x-check: 7\n|X-Check");
    assert_eq!(answer.trailers, "x-sum: 42\n");
}

#[test]
fn bodies_of_unknown_length_zero_length_and_a_byte_at_a_time() {
    let Some(world) = scripted("body_kinds", |mut wire, _| {
        while let Ok(request) = wire.message() {
            let framing = request.header("content-length").map_or("chunked", |_| "length");
            let text = format!("{framing} {}", request.text());
            wire.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            for byte in text.bytes() {
                wire.say(format!("1\r\n{}\r\n", byte as char))?;
            }
            wire.say("0\r\n\r\n")?;
        }
        Ok(())
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let head = "POST / HTTP/1.1\r\nHost: a\r\n";
    assert_eq!(client.ask(format!("{head}Content-Length: 0\r\n\r\n")).unwrap().text(), "length ");
    assert_eq!(client.ask(format!("{head}Content-Length: 3\r\n\r\nabc")).unwrap().text(), "length abc");
    assert_eq!(
        client.ask(format!("{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")).unwrap().text(),
        "chunked "
    );
    for (framing, pieces) in
        [("Content-Length: 20", ["a"; 20].as_slice()), ("Transfer-Encoding: chunked", &["1\r\na\r\n"; 20])]
    {
        client.say(format!("{head}{framing}\r\n\r\n")).unwrap();
        for piece in pieces {
            for byte in piece.bytes() {
                client.say([byte]).unwrap();
            }
        }
        if framing.ends_with("chunked") {
            client.say("0\r\n\r\n").unwrap();
        }
        let text = client.message().unwrap().text();
        assert!(text.ends_with(&format!(" {}", "a".repeat(20))), "{text}");
    }
    // An answer without any length ends with its connection.
    let pod = &world.server.pod;
    let _until_closed = Backend::start(pod, 8081, |mut wire, _| {
        wire.message()?;
        wire.say("HTTP/1.1 200 OK\r\n\r\nuntil the end")
    })
    .unwrap();
    service(&world.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("closed", 81, 8081)]).unwrap();
    let mut client = Wire::dial(&world.client.pod, "10.96.0.1:81").unwrap();
    assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap().text(), "until the end");
    // One that is cut short is not taken for whole.
    let _cut = Backend::start(pod, 8082, |mut wire, _| {
        wire.message()?;
        wire.say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    })
    .unwrap();
    service(&world.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("cut", 82, 8082)]).unwrap();
    let mut client = Wire::dial(&world.client.pod, "10.96.0.1:82").unwrap();
    assert!(client.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").is_err());
}

#[test]
fn a_gigabyte_each_way_costs_no_more_than_the_windows() {
    gigabytes(100 << 20);
}

#[test]
#[ignore = "soak: a whole gigabyte each way takes half a minute in a debug build; `make soak`"]
fn soak_a_whole_gigabyte_each_way() {
    gigabytes(1 << 30);
}

fn gigabytes(size: u64) {
    let Some(pair) = pair("gigabyte", &[]) else { return };
    let pod = &pair.client.pod;
    curl(pod, &[ECHO]).unwrap();
    let sidecars = [pair.client.proxy.id(), pair.server.sidecar.proxy.id()];
    let before = sidecars.map(|pid| rss_kib(pid).unwrap());
    let peak = std::sync::atomic::AtomicBool::new(false);
    let grown = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut grown = [0; 2];
            while !peak.load(std::sync::atomic::Ordering::Relaxed) {
                for (n, pid) in sidecars.into_iter().enumerate() {
                    grown[n] = grown[n].max(rss_kib(pid).unwrap().saturating_sub(before[n]));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            grown
        });
        let down = format!("{ECHO}/bytes/{size}");
        let read =
            output(pod.command("curl").args(["-sS", "-o", "/dev/null", "-w", "%{size_download}", &down]));
        let up = format!("head -c {size} /dev/zero | curl -sS -T - -X POST {ECHO}/sink");
        let sent = output(pod.command("bash").args(["-c", &up]));
        peak.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!((read.unwrap(), sent.unwrap()), (size.to_string(), size.to_string()));
        watching.join().unwrap()
    });
    println!("figure: {} MiB each way: the sidecars grew by {grown:?} KiB (bound 4096)", size >> 20);
    assert!(grown.iter().all(|kib| *kib <= 4_096), "{grown:?}");
}

#[test]
fn an_answer_before_the_end_of_an_upload_reaches_the_client() {
    // Answers after the first bytes; then it reads no more, or closes with the care that such an answer needs.
    let Some(world) = scripted("early_answer", |mut wire, _| {
        let head = wire.head()?;
        wire.exactly(1_000)?;
        let close = if head.contains("/stay") { "" } else { "Connection: close\r\n" };
        wire.say(format!("HTTP/1.1 413 Too Large\r\n{close}Content-Length: 8\r\n\r\ntoo much"))?;
        if head.contains("/stay") {
            std::thread::sleep(Duration::from_millis(300));
        } else {
            wire.finish()?;
            wire.gone()?;
        }
        Ok(())
    }) else {
        return;
    };
    for path in ["/close", "/stay", "/close", "/stay"] {
        let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
        client.say(format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")).unwrap();
        client.say([b'x'; 2_000]).unwrap();
        let answer = client.message().unwrap();
        assert_eq!((answer.status(), answer.text().as_str()), (413, "too much"), "{path}");
    }
}

#[test]
fn a_quiet_answer_and_a_quiet_upgrade_are_never_timed_out() {
    let quiet = Duration::from_secs(3);
    let Some(world) = crate::scripted_with("quiet", crate::impatient(), move |mut wire, _| {
        let request = wire.message()?;
        if request.head.contains("/events") {
            wire.say("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")?;
            std::thread::sleep(quiet);
            wire.say("data: 2\n\n")
        } else if request.head.contains("/slow") {
            std::thread::sleep(quiet);
            wire.say(ok("slow"))
        } else {
            wire.say("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")?;
            let said = wire.exactly(4)?;
            wire.say(said)
        }
    }) else {
        return;
    };
    let outsider = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", world.server.pod.ip);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for (pod, address) in [(&world.client.pod, ECHO_ADDRESS), (&outsider, &*server)] {
            scope.spawn(move || {
                let mut events = Wire::dial(pod, address).unwrap();
                let answer = events
                    .ask("GET /events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n")
                    .unwrap();
                assert_eq!(answer.text(), "data: 1\n\ndata: 2\n\n");
            });
            scope.spawn(move || {
                let mut slow = Wire::dial(pod, address).unwrap();
                assert_eq!(slow.ask("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").unwrap().text(), "slow");
            });
            scope.spawn(move || {
                let mut upgraded = Wire::dial(pod, address).unwrap();
                upgraded
                    .say("GET /up HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
                    .unwrap();
                assert!(upgraded.head().unwrap().starts_with("HTTP/1.1 101 "));
                assert!(upgraded.is_silent_for(quiet).unwrap());
                upgraded.say("talk").unwrap();
                assert_eq!(upgraded.exactly(4).unwrap(), b"talk");
            });
        }
    });
    println!(
        "figure: quiet streams: 0 of 6 ended in {} ms with every time at 1 s",
        began.elapsed().as_millis()
    );
}

#[test]
fn a_head_up_to_64_kib_passes_and_a_larger_one_is_431() {
    let Some(world) = scripted("large_heads", |mut wire, _| {
        answer_all(&mut wire, |request| {
            let fields: Vec<_> = (0..60).map(|n| format!("x-{n}: {}\r\n", "y".repeat(1_000))).collect();
            let text = request.header("x-big").map_or(0, str::len).to_string();
            format!("HTTP/1.1 200 OK\r\n{}Content-Length: {}\r\n\r\n{text}", fields.concat(), text.len())
        })
    }) else {
        return;
    };
    let outsider = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let server = format!("{}:8080", world.server.pod.ip);
    for (pod, address) in [(&world.client.pod, ECHO_ADDRESS), (&outsider, &*server)] {
        let mut client = Wire::dial(pod, address).unwrap();
        let ask = |size: usize| format!("GET / HTTP/1.1\r\nHost: a\r\nX-Big: {}\r\n\r\n", "z".repeat(size));
        for size in [16_000, 63_000, 65_000] {
            let answer = client.ask(ask(size)).unwrap();
            assert_eq!((answer.status(), answer.text()), (200, size.to_string()));
            assert_eq!(answer.header("x-59").map(str::len), Some(1_000));
        }
        // 90 fields, as many as a browser would never send.
        let fields: String = (0..90).map(|n| format!("X-{n}: {}\r\n", "v".repeat(300))).collect();
        let answer = client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\nX-Big: z\r\n{fields}\r\n")).unwrap();
        assert_eq!((answer.status(), answer.text().as_str()), (200, "1"), "{}", answer.head);
        for large in [ask(70_000), format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(250))] {
            let mut client = Wire::dial(pod, address).unwrap();
            let answer = client.ask(large).unwrap();
            assert_eq!(answer.status(), 431, "{}", answer.head);
        }
    }
}

#[test]
fn connect_is_refused_with_a_reason() {
    let Some(world) = scripted("connect", mirror) else { return };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    client.say("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n").unwrap();
    let answer = Message { head: client.head().unwrap(), ..Message::default() };
    assert_eq!(
        (answer.status(), answer.header("weft-reason")),
        (405, Some("outbound;connect_not_allowed")),
        "{}",
        answer.head
    );
}
