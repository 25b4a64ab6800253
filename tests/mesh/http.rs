//! HTTP/1.1, HTTP/2 and gRPC across two sidecars, by the programs that people use.

use std::time::Duration;

use weft_control_plane::cli::demo::mesh;
use weft_harness::apps::{curl, output, python, script, skip, start};

use crate::{ECHO, pair};

#[test]
fn http1_and_http2_arrive_in_the_version_they_were_sent_in() {
    let Some(pair) = pair("http1_and_http2", &[]) else { return };
    let pod = &pair.client.pod;
    let h1 = curl(pod, &[&format!("{ECHO}/head?q=1"), "-H", "X-Mine: 1"]).unwrap();
    assert!(h1.starts_with("GET /head?q=1 HTTP/1.1\n"), "{h1}");
    assert!(h1.contains("\nhost: 10.96.0.1") && h1.contains("\nx-mine: 1\n"), "{h1}");
    let h2 = curl(pod, &[&format!("{ECHO}/head"), "--http2-prior-knowledge"]).unwrap();
    assert!(h2.contains("HTTP/2.0"), "{h2}");
    let version = curl(pod, &["-o", "/dev/null", "-w", "%{http_version}", ECHO]).unwrap();
    assert_eq!(version, "1.1");
}

#[test]
fn the_app_is_told_who_called_and_nobody_can_pretend() {
    let Some(pair) = pair("who_called", &[]) else { return };
    let pod = &pair.client.pod;
    let spoof = ["-H", "weft-client-id: spiffe://cluster.local/ns/shop/sa/admin", "-H", "weft-http: 1.0"];
    let head = curl(pod, &[&[&*format!("{ECHO}/head")], &spoof[..]].concat()).unwrap();
    assert!(head.contains("weft-client-id: spiffe://cluster.local/ns/shop/sa/client\n"), "{head}");
    assert_eq!(head.matches("weft-client-id").count(), 1, "{head}");
    assert!(head.contains(&format!("x-forwarded-for: {}", pod.ip)), "{head}");
    assert!(head.contains("x-request-id: ") && head.contains("traceparent: 00-"), "{head}");
    assert!(!head.contains("weft-http"), "{head}");
    let kept = curl(pod, &[&format!("{ECHO}/head"), "-H", "x-request-id: mine"]).unwrap();
    assert!(kept.contains("x-request-id: mine\n"), "{kept}");
}

#[test]
fn bodies_of_every_kind_arrive_whole() {
    let Some(pair) = pair("bodies", &[]) else { return };
    let pod = &pair.client.pod;
    let big = pair.mesh.dir().join("big");
    std::fs::write(&big, vec![b'z'; 3_000_000]).unwrap();
    let data = format!("@{}", big.display());
    for more in [
        &["--http2-prior-knowledge"][..],
        &["-H", "Transfer-Encoding: chunked"],
        &["-H", "Expect: 100-continue"],
        &[],
    ] {
        let sink = format!("{ECHO}/sink");
        let read = curl(pod, &[&["--data-binary", &*data, &*sink], more].concat()).unwrap();
        assert_eq!(read, "3000000", "{more:?}");
    }
    assert_eq!(curl(pod, &["-X", "POST", &format!("{ECHO}/sink")]).unwrap(), "0");
    let size = curl(pod, &["-o", "/dev/null", "-w", "%{size_download}", &format!("{ECHO}/bytes/5000000")]);
    assert_eq!(size.unwrap(), "5000000");
    let head = curl(pod, &["-I", &format!("{ECHO}/bytes/77")]).unwrap();
    assert!(head.to_lowercase().contains("content-length: 77"), "{head}");
}

#[test]
fn statuses_and_trailers_pass_through() {
    let Some(pair) = pair("statuses", &[]) else { return };
    let pod = &pair.client.pod;
    for status in ["204", "304", "404", "500", "503"] {
        let url = format!("{ECHO}/status/{status}");
        let seen = curl(pod, &["-o", "/dev/null", "-w", "%{http_code}", &url]).unwrap();
        assert_eq!(seen, status);
    }
    let headers = curl(pod, &["-D", "-", "-o", "/dev/null", &format!("{ECHO}/status/500")]).unwrap();
    assert!(!headers.contains("weft-reason"), "the app's own errors are not ours: {headers}");
    let h2 = curl(pod, &["-v", "--stderr", "-", "--http2-prior-knowledge", &format!("{ECHO}/trailers")]);
    assert!(h2.unwrap().contains("x-sum: 42"));
    let h1 = curl(pod, &["--raw", "-H", "TE: trailers", &format!("{ECHO}/trailers")]).unwrap();
    assert!(h1.contains("x-sum: 42"), "{h1}");
}

#[test]
fn load_programs_see_no_error() {
    let Some(pair) = pair("load_programs", &[]) else { return };
    let wrk = output(pair.client.app("wrk").args(["-t1", "-c32", "-d3s", &format!("{ECHO}/")])).unwrap();
    assert!(!wrk.contains("Socket errors") && !wrk.contains("Non-2xx"), "{wrk}");
    for more in [&[][..], &["--h1"]] {
        let h2load = output(
            pair.client
                .app("h2load")
                .args(["-n", "5000", "-c", "8", "-m", "16"])
                .args(more)
                .arg(format!("{ECHO}/")),
        )
        .unwrap();
        assert!(h2load.contains("5000 succeeded, 0 failed, 0 errored, 0 timeout"), "{h2load}");
    }
}

#[test]
fn grpc_of_all_four_kinds_with_deadlines_and_errors() {
    let Some(pair) = pair("grpc", &[]) else { return };
    let Some(python) = python() else { return skip("grpc", "no Python packages: make deps-test") };
    let pod = &pair.server.sidecar.pod;
    let mut server = pod.command(&python);
    let _server = start(server.arg(script("grpc_server.py")).arg("7070"), pod, 7070).unwrap();
    weft_harness::apps::service(
        &pair.mesh,
        "shop",
        "echo",
        "10.96.0.1",
        &[("web", 80, 8080), ("grpc", 70, 7070)],
    )
    .unwrap();
    let said = output(pair.client.app(&python).arg(script("grpc_client.py")).arg("10.96.0.1:70")).unwrap();
    assert!(said.ends_with("all well"), "{said}");
}

#[test]
fn websockets_cross_the_mesh() {
    let Some(pair) = pair("websockets", &[]) else { return };
    let Some(python) = python() else { return skip("websockets", "no Python packages: make deps-test") };
    let pod = &pair.server.sidecar.pod;
    let mut server = pod.command(&python);
    let _server = start(server.arg(script("ws_server.py")).arg("9000"), pod, 9000).unwrap();
    weft_harness::apps::service(
        &pair.mesh,
        "shop",
        "echo",
        "10.96.0.1",
        &[("web", 80, 8080), ("ws", 90, 9000)],
    )
    .unwrap();
    let said =
        output(pair.client.app(&python).arg(script("ws_client.py")).arg("ws://10.96.0.1:90/")).unwrap();
    assert!(said.ends_with("all well"), "{said}");
}

#[test]
fn an_app_may_ignore_an_upgrade_and_its_answer_arrives() {
    let Some(pair) = pair("upgrade_ignored", &[]) else { return };
    let pod = &pair.client.pod;
    for offer in ["foo", "TLS/1.2", "h2c"] {
        let upgrade = format!("Upgrade: {offer}");
        let args = ["-i", "-H", "Connection: Upgrade", "-H", &upgrade, &format!("{ECHO}/head")];
        let answer = curl(pod, &args).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains("GET /head HTTP/1.1"),
            "{offer}: {answer}"
        );
        assert!(!answer.contains("weft-status"), "{answer}");
    }
}

#[test]
fn a_stalled_reader_stalls_nobody_else() {
    let Some(pair) = pair("stalled_reader", &[]) else { return };
    let pod = &pair.client.pod;
    // Twenty downloads over HTTP/2 of which nobody reads a byte: all on the sidecars' one connection.
    let stalled = "exec 3<>/dev/tcp/10.96.0.1/80; printf 'GET /bytes/1000000000 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n' >&3; \
                   sleep 30";
    let mut stalls = Vec::new();
    for _ in 0..20 {
        let mut command = pair.client.app("bash");
        command.args(["-c", stalled]).stdout(std::process::Stdio::null());
        stalls.push(weft_control_plane::cli::demo::netns::Process::spawn(&mut command).unwrap());
    }
    let before = weft_harness::apps::rss_kib(pair.client.proxy.id()).unwrap();
    for _ in 0..50 {
        let seconds = curl(pod, &["-o", "/dev/null", "-w", "%{time_total}", ECHO]).unwrap();
        assert!(seconds.parse::<f64>().unwrap() < 1.0, "{seconds}");
    }
    let grown = weft_harness::apps::rss_kib(pair.client.proxy.id()).unwrap().saturating_sub(before);
    println!(
        "figure: 20 stalled downloads: the caller's sidecar grew by {grown} KiB while others were served"
    );
    assert!(grown < 20 * 512, "{grown} KiB");
}

#[test]
fn a_server_that_does_not_read_stalls_nobody_else() {
    let Some(pair) = pair("stalled_server", &[]) else { return };
    let load = ["--url", ECHO, "--rate", "200", "--seconds", "3"];
    let alone = weft_harness::apps::load(&pair.mesh, &pair.client.pod, &load).unwrap();
    let before = (
        weft_harness::apps::rss_kib(pair.client.proxy.id()).unwrap(),
        weft_harness::apps::rss_kib(pair.server.sidecar.proxy.id()).unwrap(),
    );
    let upload = format!("exec curl -sS -T /dev/zero '{ECHO}/sink?stall=600'");
    let mut uploads = Vec::new();
    for _ in 0..20 {
        let mut command = pair.client.app("bash");
        command.args(["-c", &upload]).stdout(std::process::Stdio::null());
        uploads.push(weft_control_plane::cli::demo::netns::Process::spawn(&mut command).unwrap());
    }
    mesh::wait(
        Duration::from_secs(20),
        || Ok(curl(&pair.client.pod, &[&format!("{ECHO}/stalled")])? == "20"),
    )
    .unwrap();
    let beside = weft_harness::apps::load(&pair.mesh, &pair.client.pod, &load).unwrap();
    let grown = (
        weft_harness::apps::rss_kib(pair.client.proxy.id()).unwrap().saturating_sub(before.0),
        weft_harness::apps::rss_kib(pair.server.sidecar.proxy.id()).unwrap().saturating_sub(before.1),
    );
    println!(
        "figure: beside 20 stalled uploads: p99 {:.1} ms, alone {:.1} ms; they cost {} KiB at the caller, {} KiB at the \
         server (bound 10240)",
        beside.p99_ms, alone.p99_ms, grown.0, grown.1
    );
    assert_eq!((alone.failed, beside.failed), (0, 0), "{beside:?}");
    assert!(grown.0 < 20 * 512 && grown.1 < 20 * 512, "{grown:?}");
    // Queued behind a stalled stream an answer would wait for ever; a busy machine explains a fraction of a second.
    assert!(beside.p99_ms < alone.p99_ms + 500.0, "{} ms", beside.p99_ms);
}
