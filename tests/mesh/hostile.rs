//! Peers that mean harm, or are broken: what they send is refused in words, on its own connection, and costs the others
//! nothing.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use weft_control_plane::cli::demo::{
    mesh::{Meshed, Workload, wait},
    netns::Pod,
};
use weft_harness::apps::service;

use crate::{Pair, pair};

/// A client connection from inside a pod.
pub(crate) fn dial(pod: &Pod, address: &str) -> Result<TcpStream> {
    let address: SocketAddr = address.parse()?;
    let stream = pod.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends pieces, and reads until the other side ends. Whatever it had said when it reset is returned as well.
pub(crate) fn exchange(pod: &Pod, address: &str, pieces: &[&[u8]]) -> Result<String> {
    let mut stream = dial(pod, address)?;
    for piece in pieces {
        // It may have been refused in the middle.
        if stream.write_all(piece).is_err() {
            break;
        }
    }
    let mut said = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => said.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            // A socket with a time limit is not read on by itself after a signal.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(error).with_context(|| format!("after {:?}", String::from_utf8_lossy(&said)));
            }
        }
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Both ways into the mesh in plaintext: the app's own sidecar, and the one before the server.
pub(crate) struct Ways {
    pub(crate) pair: Pair,
    pub(crate) outsider: Pod,
}

impl Ways {
    pub(crate) fn new(test: &str) -> Option<Self> {
        let pair = pair(test, &[])?;
        // Declared as HTTP, so that nothing passes as bytes.
        service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("http", 80, 8080)]).unwrap();
        let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
        let ways = Self { pair, outsider };
        for (pod, address, _, _) in ways.all() {
            let declared = || Ok(exchange(pod, &address, &[b"\x01\r\n\r\n"])?.contains("not_http"));
            wait(Duration::from_secs(10), declared).expect("the port is declared as HTTP");
        }
        Some(ways)
    }

    pub(crate) fn all(&self) -> [(&Pod, String, &'static str, &Meshed); 2] {
        let server = &self.pair.server.sidecar;
        [
            (&self.pair.client.pod, "10.96.0.1:80".to_owned(), "outbound", &self.pair.client),
            (&self.outsider, format!("{}:8080", server.pod.ip), "inbound", server),
        ]
    }
}

#[test]
fn malformed_requests_are_refused_in_words_however_they_are_cut() {
    let Some(ways) = Ways::new("malformed_requests") else { return };
    let fields = |more: &str| format!("POST /head HTTP/1.1\r\nHost: a\r\n{more}\r\n\r\n");
    let chunk =
        |body: &str| fields("Transfer-Encoding: chunked\r\n").replace("\r\n\r\n\r\n", "\r\n\r\n") + body;
    let bad = [
        fields("Content-Length: 5\r\nTransfer-Encoding: chunked") + "0\r\n\r\n",
        fields("Content-Length: 5\r\nContent-Length: 6") + "hello!",
        fields("Transfer-Encoding: gzip, chunked") + "0\r\n\r\n",
        fields("Transfer-Encoding : chunked") + "0\r\n\r\n",
        fields("x: y\n z: w"),
        fields("x: y\nz: w"),
        fields("x: y\r\n folded"),
        fields("x: y\rz: w"),
        fields("x: \0"),
        fields("Host: b"),
        "GET /head HTTP/1.1\r\n\r\n".to_owned(),
        "GET /head HTTP/1.1\nHost: a\n\n".to_owned(),
        "GET /head HTTP/1.1 \r\nHost: a\r\n\r\n".to_owned(),
        "GET  /head HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        chunk("5 \r\nhello\r\n0\r\n\r\n"),
        chunk("0x5\r\nhello\r\n0\r\n\r\n"),
        chunk("5;\nhello\r\n0\r\n\r\n"),
        chunk("5\r\nhelloX0\r\n\r\n"),
        chunk("0\r\nContent-Length: 4\r\n\r\n"),
    ];
    let good = "GET /head HTTP/1.1\r\nHost: a\r\nx-first: 1\r\n\r\n";
    let after = "GET /status/299 HTTP/1.1\r\nHost: a\r\n\r\n";
    for (pod, address, component, sidecar) in ways.all() {
        let mut want = sidecar.metric("weft_proxy_errors_total", &["malformed_request"]).unwrap();
        for bad in &bad {
            // Alone; behind a good one; byte by byte.
            let alone = exchange(pod, &address, &[format!("{bad}{after}").as_bytes()]).unwrap();
            let behind = exchange(pod, &address, &[format!("{good}{bad}{after}").as_bytes()]).unwrap();
            let bytes: Vec<&[u8]> = bad.as_bytes().chunks(1).collect();
            let cut = exchange(pod, &address, &bytes).unwrap();
            want += 3.0;
            for answer in [&alone, &behind, &cut] {
                let refused = answer.rsplit_once("HTTP/1.1 400 ").map(|(_, rest)| rest);
                let refused = refused.with_context(|| format!("{component} {bad:?}: {answer:?}")).unwrap();
                assert!(refused.contains("connection: close\r\n"), "{bad:?}: {answer}");
                assert!(
                    refused.contains(&format!("weft-reason: {component};malformed_request\r\n")),
                    "{answer}"
                );
                assert!(!answer.contains(" 299 "), "{bad:?}: {answer}");
            }
            assert!(alone.starts_with("HTTP/1.1 400"), "{bad:?}: {alone}");
            assert!(behind.starts_with("HTTP/1.1 200") && behind.contains("x-first: 1"), "{bad:?}: {behind}");
        }
        let counted = || Ok(sidecar.metric("weft_proxy_errors_total", &["malformed_request"])? >= want);
        wait(Duration::from_secs(10), counted).expect("each is counted");
        let log = std::fs::read_to_string(&sidecar.log).unwrap();
        for said in [
            "both Content-Length and Transfer-Encoding",
            "a line does not end with CR LF",
            "folded over lines",
        ] {
            assert!(log.contains(said), "{component}'s log does not say: {said}");
        }
    }
}

#[test]
fn the_answer_to_a_refused_request_is_never_lost_to_what_is_still_being_sent() {
    let Some(ways) = Ways::new("linger") else { return };
    let bad = "POST /head HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n";
    // More than its sidecar reads at once: closed with that unread, the connection would be reset under the answer.
    let all = [bad.as_bytes(), &[b'x'; 100_000]].concat();
    for (pod, address, component, _) in ways.all() {
        for _ in 0..20 {
            let answer = exchange(pod, &address, &[&all]).unwrap();
            assert!(answer.starts_with("HTTP/1.1 400"), "{component}: {answer:?}");
            assert!(answer.ends_with('\n'), "{component}: whole: {answer:?}");
        }
    }
}

#[test]
fn a_head_has_limits_in_size_and_time() {
    let Some(ways) = Ways::new("head_limits") else { return };
    for (pod, address, component, _) in ways.all() {
        let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(70_000));
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(201));
        for head in [long, many] {
            let answer = exchange(pod, &address, &[head.as_bytes()]).unwrap();
            assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
            assert!(answer.contains(&format!("{component};head_too_large")), "{answer}");
        }
        let began = std::time::Instant::now();
        let answer = exchange(pod, &address, &[b"GET / HTTP/1.1\r\nHost"]).unwrap();
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        assert!(answer.contains(&format!("{component};header_timeout")), "{answer}");
        assert!(began.elapsed() >= Duration::from_secs(9), "{:?}", began.elapsed());
    }
}

/// An app that answers each connection's first request with these bytes, and closes or waits.
fn answers(pod: &Pod, port: u16, answer: Vec<u8>, close: bool) {
    let listener = pod.enter(|| std::net::TcpListener::bind(("0.0.0.0", port))).unwrap().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let answer = answer.clone();
            std::thread::spawn(move || {
                let mut request = Vec::new();
                let mut buffer = [0; 4096];
                while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                    match stream.read(&mut buffer) {
                        Ok(n) if n > 0 => request.extend_from_slice(&buffer[..n]),
                        _ => return,
                    }
                }
                let _ = stream.write_all(&answer);
                if !close {
                    // Until the sidecar gives it up.
                    while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
                }
            });
        }
    });
}

#[test]
fn malformed_answers_of_an_app_become_502() {
    let Some(pair) = pair("malformed_answers", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let pod = &pair.server.sidecar.pod;
    let head = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\nhi");
    let bad = [
        head("Content-Length: 2\r\nTransfer-Encoding: chunked"),
        head("Content-Length: 2\r\nContent-Length: 3"),
        head("Content-Length: +2"),
        head("Transfer-Encoding: gzip"),
        head("Content-Length: 2\r\nx: y\r\n folded"),
        head("Content-Length: 2\r\nx: y\nset-cookie: z"),
        head("Content-Length: 2\r\nx: y\rset-cookie: z"),
        head("Content-Length: 2\r\nx : y"),
        "HTTP/1.1 200 OK\nContent-Length: 2\n\nhi".to_owned(),
        "HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nhi".to_owned(),
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n".to_owned(),
        "hello\r\n\r\n".to_owned(),
        "HTTP/1.1 100 Continue\r\n\r\n".repeat(100),
    ];
    let ports: Vec<_> = (0..bad.len()).map(|n| 9_000 + u16::try_from(n).unwrap()).collect();
    let names: Vec<_> = ports.iter().map(|port| format!("http-{port}")).collect();
    let all: Vec<_> = ports.iter().zip(&names).map(|(port, name)| (&**name, *port, *port)).collect();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &all).unwrap();
    for (bad, port) in bad.iter().zip(&ports) {
        answers(pod, *port, bad.clone().into_bytes(), false);
        for (from, address) in
            [(&outsider, format!("{}:{port}", pod.ip)), (&pair.client.pod, format!("10.96.0.1:{port}"))]
        {
            let ask: &[&[u8]] = &[b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"];
            let answer = exchange(from, &address, ask).unwrap();
            assert!(answer.starts_with("HTTP/1.1 502"), "{bad:?}: {answer}");
            assert!(answer.contains("weft-reason: inbound;malformed_answer"), "{bad:?}: {answer}");
            assert!(!answer.contains("set-cookie"), "{answer}");
        }
    }
}

#[test]
fn an_answer_behind_an_answer_reaches_nobody() {
    let Some(pair) = pair("second_answer", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let pod = &pair.server.sidecar.pod;
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("http", 90, 9_000)]).unwrap();
    let one = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
    let split = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
    answers(pod, 9_000, format!("{one}{split}").into_bytes(), false);
    for (from, address) in
        [(&outsider, format!("{}:9000", pod.ip)), (&pair.client.pod, "10.96.0.1:90".to_owned())]
    {
        for _ in 0..50 {
            let ask = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
            let last = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
            let answer = exchange(from, &address, &[format!("{ask}{ask}{last}").as_bytes()]).unwrap();
            assert!(!answer.contains("poison"), "{answer}");
            assert_eq!(answer.matches("\r\n\r\nhi").count(), 3, "{answer}");
        }
    }
}

#[test]
fn a_path_that_another_rule_could_mean_is_refused_and_others_arrive_as_sent() {
    let Some(ways) = Ways::new("paths") else { return };
    let route = serde_json::json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "echo"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "echo"}],
            "rules": [
                {"matches": [{"path": {"type": "PathPrefix", "value": "/admin"}}],
                 "filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 302, "path": {"type": "ReplaceFullPath", "replaceFullPath": "/login"}}}]},
                {"backendRefs": [{"name": "echo", "port": 80}]}
            ]
        }
    });
    ways.pair.mesh.write("route.yaml", &format!("{route:#}\n")).unwrap();
    let pod = &ways.pair.client.pod;
    let ask = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        exchange(pod, "10.96.0.1:80", &[request.as_bytes()])
    };
    wait(Duration::from_secs(10), || Ok(ask("/admin/x")?.starts_with("HTTP/1.1 302"))).unwrap();
    for path in [
        "/shop/../admin",
        "/shop/%2e%2e/admin",
        "/shop/..%2fadmin",
        "/shop/..;/admin",
        "/shop/..%5cadmin",
        "//admin",
        "/%61dmin",
        "/%2561dmin",
        "/admin;x",
        "/admin%00",
    ] {
        let answer = ask(path).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400"), "{path}: {answer}");
        assert!(answer.contains("outbound;path_not_canonical"), "{path}: {answer}");
    }
    for path in ["/head//x", "/head/a%2Fb", "/head;v=1", "/head/../x", "/head?a=/../admin"] {
        let answer = ask(path).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
    // As sent, byte for byte.
    let answer = ask("/head?x=%2e%2e;//y").unwrap();
    assert!(answer.contains("GET /head?x=%2e%2e;//y HTTP/1.1"), "{answer}");
}

#[test]
fn slow_clients_of_every_kind_cost_the_others_nothing() {
    const EACH: usize = 100;
    let Some(ways) = Ways::new("slow_clients") else { return };
    for (pod, address, component, sidecar) in ways.all() {
        let before = weft_harness::apps::rss_kib(sidecar.proxy.id()).unwrap();
        let open = |begin: &[u8]| {
            let mut stream = dial(pod, &address).unwrap();
            stream.write_all(begin).unwrap();
            stream
        };
        let began = std::time::Instant::now();
        let mut heads: Vec<_> = (0..EACH).map(|_| open(b"GET / HTTP/1.1\r\nHost: a\r\nx: ")).collect();
        let mut bodies: Vec<_> = (0..EACH)
            .map(|_| open(b"POST /sink HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nx"))
            .collect();
        let reads: Vec<_> =
            (0..EACH).map(|_| open(b"GET /bytes/100000000 HTTP/1.1\r\nHost: a\r\n\r\n")).collect();
        let slow =
            exchange(pod, &address, &[b"GET /status/200 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"]);
        assert!(slow.unwrap().starts_with("HTTP/1.1 200"), "{component}");
        let grown = weft_harness::apps::rss_kib(sidecar.proxy.id()).unwrap().saturating_sub(before);
        println!(
            "figure: {EACH} slow heads, bodies and readers each at {component}: grown by {grown} KiB (bound {})",
            3 * EACH * 512
        );
        assert!(grown <= 3 * EACH as u64 * 512, "{component}: {grown} KiB");
        // Slow heads are answered and closed, ten seconds after their first byte; a slow body is waited for.
        for head in &mut heads {
            let mut answer = String::new();
            head.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 408"), "{component}: {answer}");
        }
        assert!(began.elapsed() >= Duration::from_secs(9), "{:?}", began.elapsed());
        for body in &mut bodies {
            body.write_all(b"yz").unwrap();
            let mut answer = [0; 12];
            body.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200", "{component}");
        }
        drop(reads);
    }
}
