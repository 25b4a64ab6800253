//! What is unusual in HTTP/1.1 and allowed: it arrives as it was meant, through two sidecars and through one.

use weft_control_plane::cli::demo::{mesh::Workload, netns::Pod};
use weft_harness::wire::{Message, Wire, answer_all, ok};

use crate::{ECHO_ADDRESS, Scripted, scripted};

/// Answers with the request as it arrived.
fn mirror(mut wire: Wire, _: usize) -> anyhow::Result<()> {
    answer_all(&mut wire, |request| {
        ok(&format!("{}\n\n{}|{}", request.head, request.text(), request.trailers))
    })
}

/// Through the mesh, and in plaintext to the server's sidecar.
fn doors(world: &Scripted) -> [(Pod, String); 2] {
    let legacy = world.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    [(world.client.pod.clone(), ECHO_ADDRESS.to_owned()), (legacy, format!("{}:8080", world.server.pod.ip))]
}

#[test]
fn odd_but_allowed_requests_arrive_as_they_were_meant() {
    let Some(world) = scripted("odd_requests", mirror) else { return };
    let long = format!("/{}", "p".repeat(60_000));
    let extension = format!("5;name={}\r\nhello\r\n0\r\n\r\n", "v".repeat(200));
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n";
    // What is sent, and of the request that arrives: its start, and its body with trailers.
    let cases: Vec<(String, String, &str)> = vec![
        // RFC 9112 §2.2: an empty line before a request line.
        ("\r\nGET /a HTTP/1.1\r\nHost: a\r\n\r\n".into(), "GET /a ".into(), "|"),
        (format!("GET {long} HTTP/1.1\r\nHost: a\r\n\r\n"), format!("GET {long} "), "|"),
        ("PURGE /x HTTP/1.1\r\nHost: a\r\n\r\n".into(), "PURGE /x ".into(), "|"),
        ("M-SEARCH * HTTP/1.1\r\nHost: a\r\n\r\n".into(), String::new(), ""),
        ("get /lower HTTP/1.1\r\nHost: a\r\n\r\n".into(), "get /lower ".into(), "|"),
        ("GET /?a=[b]|{c}^~ HTTP/1.1\r\nHost: a\r\n\r\n".into(), "GET /?a=[b]|{c}^~ ".into(), "|"),
        ("GET /caf\u{e9}?\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n".into(), "GET /caf\u{e9}?\u{e9} ".into(), "|"),
        ("GET / HTTP/1.1\r\nhOsT:a\r\nX-Empty:\r\nX-Tab:\t b \t\r\n\r\n".into(), "GET / ".into(), "|"),
        ("DELETE /d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".into(), "DELETE /d ".into(), "abc|"),
        ("GET /body HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".into(), "GET /body ".into(), "abc|"),
        (format!("{chunked}\r\n5;a=b;c=\"d e\"\r\nhello\r\n0;last\r\n\r\n"), "POST / ".into(), "hello|"),
        (format!("{chunked}\r\n{extension}"), "POST / ".into(), "hello|"),
        (
            format!("{chunked}\r\n00000005\r\nhello\r\nB\r\n big worlds\r\n000\r\n\r\n"),
            "POST / ".into(),
            "hello big worlds|",
        ),
        (
            format!(
                "{chunked}TE: trailers\r\nTrailer: X-Sum, Weft-Client-Id\r\n\r\n1\r\nx\r\n0\r\nX-Sum: 1\r\nWeft-Client-Id: spiffe://a/b\r\n\r\n"
            ),
            "POST / ".into(),
            "x|x-sum: 1\n",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\n\r\n1\r\nx\r\n0\r\n\r\n".into(),
            "POST / ".into(),
            "x|",
        ),
    ];
    for (pod, address) in doors(&world) {
        // Each on a fresh connection, and all behind each other.
        let mut kept = Wire::dial(&pod, &address).unwrap();
        for (sent, line, body) in &cases {
            for fresh in [true, false] {
                if line.is_empty() && !fresh {
                    continue;
                }
                let mut once = Wire::dial(&pod, &address).unwrap();
                let client = if fresh { &mut once } else { &mut kept };
                let answer = client.ask(sent).unwrap_or_else(|e| panic!("{sent:.80}: {e:#}"));
                if line.is_empty() {
                    // `*` is for OPTIONS alone.
                    assert_eq!((answer.status(), answer.header("connection")), (400, Some("close")));
                    continue;
                }
                assert_eq!(answer.status(), 200, "{sent:.80}: {} {}", answer.head, answer.text());
                let text = answer.text();
                let (head, seen) = text.split_once("\n\n").unwrap();
                assert!(head.starts_with(&**line), "{sent:.80}: {head:.80}");
                assert_eq!(seen, *body, "{sent:.80}");
            }
        }
        // An empty line behind a body, as old browsers send.
        let posts = "POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx";
        kept.say(posts).unwrap();
        for expected in ["abc|", "x|"] {
            assert!(kept.message().unwrap().text().ends_with(expected));
        }
    }
}

#[test]
fn odd_but_allowed_answers_arrive_as_they_were_meant() {
    const ANSWERS: [(&str, &str, u16, &str); 15] = [
        ("/no-reason", "HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\nx", 200, "x"),
        ("/no-space", "HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", 200, "x"),
        ("/reason", "HTTP/1.1 200 Quite All Right\r\nContent-Length: 1\r\n\r\nx", 200, "x"),
        ("/old", "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold", 200, "old"),
        (
            "/old-kept",
            "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nold",
            200,
            "old",
        ),
        (
            "/extension",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=\"b c\"\r\nabc\r\n0;z\r\n\r\n",
            200,
            "abc",
        ),
        (
            "/trailers",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Unasked: 1\r\n\r\n",
            200,
            "a",
        ),
        ("/205", "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", 205, ""),
        ("/204", "HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
        ("/204-length", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204, ""),
        ("/599", "HTTP/1.1 599 Odd\r\nContent-Length: 1\r\n\r\nx", 599, "x"),
        ("/899", "HTTP/1.1 899 Odder\r\nContent-Length: 1\r\n\r\nx", 899, "x"),
        (
            "/many",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 P\r\n\r\nHTTP/1.1 103 E\r\nLink: <x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
            200,
            "x",
        ),
        ("/same-length", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: y\r\n\r\nx", 200, "x"),
        ("/empty", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, ""),
    ];
    let Some(world) = scripted("odd_answers", |mut wire, _| {
        while let Ok(request) = wire.message() {
            let path = request.head.split(' ').nth(1).unwrap_or_default();
            match ANSWERS.iter().find(|(known, ..)| *known == path) {
                Some((_, answer, ..)) => wire.say(answer)?,
                None if path == "/204-body" => {
                    wire.say("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello")?
                }
                None => wire.say(ok("ok"))?,
            }
        }
        Ok(())
    }) else {
        return;
    };
    for (pod, address) in doors(&world) {
        let mut client = Wire::dial(&pod, &address).unwrap();
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        for (path, _, status, body) in ANSWERS {
            let answer = client.ask(get(path)).unwrap_or_else(|e| panic!("{path}: {e:#}"));
            assert_eq!((answer.status(), answer.text().as_str()), (status, body), "{path}: {}", answer.head);
            assert_eq!(client.ask(get("/ok")).unwrap().text(), "ok", "after {path}");
        }
        // What no answer has a place for reaches nobody, and no request after it.
        for _ in 0..3 {
            let answer = client.ask(get("/204-body")).unwrap();
            assert_eq!(answer.status(), 204);
            assert_eq!(client.ask(get("/ok")).unwrap().text(), "ok");
        }
    }
}

#[test]
fn a_hundred_fields_pass_and_one_more_is_431() {
    let Some(world) = scripted("fields", |mut wire, _| {
        answer_all(&mut wire, |request| {
            let sent = request.head.lines().filter(|line| line.starts_with("x-n")).count();
            let fields: String = (0..99).map(|n| format!("X-A{n}: 1\r\n")).collect();
            format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 3\r\n\r\n{sent:03}")
        })
    }) else {
        return;
    };
    for (pod, address) in doors(&world) {
        let head = |n: usize| {
            let fields: String = (1..n).map(|n| format!("X-N{n}: 1\r\n")).collect();
            format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")
        };
        let answer = Wire::dial(&pod, &address).unwrap().ask(head(100)).unwrap();
        assert_eq!(
            (answer.status(), answer.text().as_str()),
            (200, "099"),
            "{address}: {:.200}",
            answer.head
        );
        assert_eq!(answer.head.lines().filter(|line| line.starts_with("x-a")).count(), 99);
        let mut client = Wire::dial(&pod, &address).unwrap();
        let answer: Message = client.ask(head(101)).unwrap();
        assert_eq!(answer.status(), 431, "{address}: {:.200}", answer.head);
        assert!(client.gone().unwrap().is_empty());
    }
}
