//! Opaque TCP: half-close, server-first protocols, refusals, and destinations of every kind.

use std::time::{Duration, Instant};

use weft_control_plane::cli::demo::{
    mesh::{Workload, wait},
    netns::Process,
};
use weft_harness::apps::{curl, output, rss_kib, serve, service, start, testapp};

use crate::{ECHO, Pair, pair};

fn tcp_pair(test: &str, args: &[&str]) -> Option<(Pair, Process)> {
    let pair = pair(test, &[])?;
    let pod = &pair.server.sidecar.pod;
    let mut all = vec!["tcp", "--port", "9100"];
    all.extend_from_slice(args);
    let app = start(&mut testapp(&pair.mesh, pod, &all), pod, 9100).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    Some((pair, app))
}

#[test]
fn half_close_reaches_the_server_and_its_answer_comes_back() {
    let Some((pair, _app)) = tcp_pair("half_close", &[]) else { return };
    let mut nc = pair.client.app("bash");
    let said =
        output(nc.args(["-c", "head -c 300000 /dev/zero | nc -N -w 10 10.96.0.1 91 | wc -c"])).unwrap();
    assert_eq!(said.trim(), "300000");
}

#[test]
fn a_server_that_speaks_first_is_heard_and_learnt() {
    let Some((pair, _app)) = tcp_pair("server_first", &["--greeting", "220 ready\n"]) else { return };
    let greet = "exec 3<>/dev/tcp/10.96.0.1/91; s=$(date +%s%N); head -n 1 <&3; e=$(date +%s%N); echo $(((e-s)/1000000))";
    let mut times = Vec::new();
    for _ in 0..3 {
        let said = output(pair.client.app("bash").args(["-c", greet])).unwrap();
        let (greeting, ms) = said.split_once('\n').unwrap();
        assert_eq!(greeting, "220 ready");
        times.push(ms.parse::<u64>().unwrap());
    }
    println!(
        "figure: greeting after {times:?} ms: the first pays the detection wait twice at most, later ones do not"
    );
    assert!(times[0] < 1_500, "{times:?}");
    assert!(times[2] + 100 < times[0], "{times:?}");
}

#[test]
fn a_refused_connection_is_refused_and_not_left_hanging() {
    let Some((pair, app)) = tcp_pair("refused", &[]) else { return };
    drop(app);
    let ask = "exec 3<>/dev/tcp/10.96.0.1/91; echo hi >&3; timeout 5 cat <&3; echo $?";
    let took = [(); 3].map(|()| {
        let since = Instant::now();
        let said = output(pair.client.app("bash").args(["-c", &format!("{ask} 2>&1 || true")])).unwrap();
        assert!(said.contains("reset") || said.ends_with('1'), "{said}");
        since.elapsed()
    });
    let soonest = took.into_iter().min().unwrap();
    println!("figure: a refusal reaches the client after {} ms (bound 900)", soonest.as_millis());
    assert!(soonest < Duration::from_millis(900), "{took:?}");
    let refused = pair.server.sidecar.metric("weft_proxy_errors_total", &["connect_refused"]).unwrap();
    assert!(refused >= 1.0, "{refused}");
}

#[test]
fn an_endpoint_whose_app_is_down_gets_no_more_connections() {
    let Some((pair, _app)) = tcp_pair("app_down", &[]) else { return };
    // A second endpoint whose sidecar is well; on the port of bytes it has no app.
    let _other = serve(&pair.mesh, Workload::new("shop", "echo-2"), &[]).unwrap();
    let ask = |times: u32| {
        let ask = format!(
            "for i in $(seq {times}); do [ \"$(echo hi | nc -N -w 5 10.96.0.1 91)\" = hi ] || echo failed; done"
        );
        output(pair.client.app("bash").args(["-c", &ask])).unwrap().matches("failed").count()
    };
    wait(Duration::from_secs(20), || Ok(ask(1) == 1)).expect("it is in turn, once");
    let failed = ask(60);
    println!("figure: one of two endpoints has no app: {failed} of 60 connections failed (bound 12)");
    assert!(failed <= 12, "{failed}");
}

#[test]
fn a_pods_own_addresses_behave_as_without_a_mesh() {
    let Some(pair) = pair("own_addresses", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    for host in ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", &format!("{}:8080", pod.ip), "10.96.0.1"] {
        assert_eq!(curl(pod, &[&format!("http://{host}/")]).unwrap(), "ok", "{host}");
    }
}

#[test]
fn a_pod_is_reached_by_its_own_address_with_its_identity() {
    let Some(pair) = pair("pod_ip", &[]) else { return };
    let server = &pair.server.sidecar.pod;
    let head = curl(&pair.client.pod, &[&format!("http://{}:8080/head", server.ip)]).unwrap();
    assert!(head.contains("weft-client-id: spiffe://cluster.local/ns/shop/sa/client"), "{head}");
    if pair.mesh.world.has_ipv6() {
        let head = curl(&pair.client.pod, &[&format!("http://[{}]:8080/head", server.ip6)]).unwrap();
        assert!(head.contains("weft-client-id: spiffe://cluster.local/ns/shop/sa/client"), "{head}");
    }
}

#[test]
fn pods_without_a_sidecar_are_reached_and_may_call_while_permissive() {
    let Some(pair) = pair("plain_pods", &[]) else { return };
    let plain = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let _app = start(
        &mut testapp(&pair.mesh, &plain, &["http", "--port", "8080", "--name", "legacy"]),
        &plain,
        8080,
    )
    .unwrap();
    service(&pair.mesh, "shop", "legacy", "10.96.0.2", &[("web", 80, 8080)]).unwrap();
    assert_eq!(curl(&pair.client.pod, &["http://10.96.0.2/"]).unwrap(), "ok");
    let server = pair.server.sidecar.pod.ip;
    let head = curl(&plain, &[&format!("http://{server}:8080/head")]).unwrap();
    assert!(head.starts_with("GET /head") && !head.contains("weft-client-id"), "{head}");
}

#[test]
fn an_address_outside_the_mesh_needs_no_controller() {
    let Some(mut pair) = pair("outside", &[]) else { return };
    let outside = pair
        .mesh
        .world
        .pod_at("outside", "192.0.2.10".parse().unwrap(), "2001:db8::10".parse().unwrap())
        .unwrap();
    let _app = start(
        &mut testapp(&pair.mesh, &outside, &["http", "--port", "80", "--name", "outside"]),
        &outside,
        80,
    )
    .unwrap();
    pair.mesh.kill_controller().unwrap();
    assert_eq!(curl(&pair.client.pod, &["http://192.0.2.10/"]).unwrap(), "ok");
}

#[test]
fn tls_of_the_apps_own_is_passed_through() {
    let Some(pair) = pair("own_tls", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    let dir = pair.mesh.dir().to_owned();
    let (key, cert) = (dir.join("own.key"), dir.join("own.crt"));
    let made = rcgen::generate_simple_self_signed(vec!["own.example".to_owned()]).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    std::fs::write(&cert, made.cert.pem()).unwrap();
    let mut server = pod.command("openssl");
    server.args(["s_server", "-accept", "8443", "-www", "-key"]).arg(&key).arg("-cert").arg(&cert);
    let _server = start(server.stdin(std::process::Stdio::null()), pod, 8443).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("own", 443, 8443)]).unwrap();
    let resolve = ["--resolve", "own.example:443:10.96.0.1", "--cacert"];
    let args = [&resolve[..], &[cert.to_str().unwrap(), "https://own.example/"]].concat();
    assert!(curl(&pair.client.pod, &args).unwrap().contains("s_server"));
}

#[test]
fn iperf3_runs_up_and_down() {
    let Some(pair) = pair("iperf3", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    let mut server = pod.command("iperf3");
    let _server = start(server.args(["-s", "-p", "5201"]), pod, 5201).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("iperf", 5201, 5201)]).unwrap();
    for more in [&[][..], &["-R"]] {
        let mut command = pair.client.app("iperf3");
        command.args(["-c", "10.96.0.1", "-t", "2", "-J"]).args(more);
        let said: serde_json::Value = serde_json::from_str(&output(&mut command).unwrap()).unwrap();
        let bits = said["end"]["sum_received"]["bits_per_second"].as_f64().unwrap();
        println!("figure: iperf3 {more:?}: {:.0} Mbit/s", bits / 1e6);
        assert!(bits > 1e8, "{bits}");
    }
}

#[test]
fn a_large_transfer_with_a_stalled_reader_costs_no_memory() {
    stalled_download(20);
}

#[test]
fn a_large_upload_to_a_stalled_server_costs_no_memory() {
    stalled_upload(20);
}

#[test]
#[ignore = "soak: takes over a minute; `make soak`"]
fn soak_a_reader_that_stalls_for_a_minute() {
    stalled_download(60);
}

#[test]
#[ignore = "soak: takes over a minute; `make soak`"]
fn soak_a_server_that_stalls_for_a_minute() {
    stalled_upload(60);
}

fn stalled_download(seconds: u32) {
    let Some(pair) = pair("flat_memory", &[]) else { return };
    let script = format!(
        "exec 3<>/dev/tcp/10.96.0.1/80; \
         printf 'GET /bytes/1000000000 HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
         head -c 1000000 <&3 >/dev/null; sleep {seconds}; cat <&3 | wc -c"
    );
    let rest = flat(&pair, &format!("1 GB down with the reader stalled for {seconds} s"), &script);
    assert!(rest.parse::<u64>().unwrap() > 999_000_000 - 1_000_000, "{rest}");
}

fn stalled_upload(seconds: u32) {
    let Some(pair) = pair("flat_memory_up", &[]) else { return };
    let script = format!("head -c 1000000000 /dev/zero | curl -sS -T - '{ECHO}/sink?stall={seconds}'");
    let read = flat(&pair, &format!("1 GB up with the server stalled for {seconds} s"), &script);
    assert_eq!(read, "1000000000");
}

/// Runs the client's script, which stalls longer than any keepalive or user timeout that could end a connection whose
/// reader only waits, and judges how far both sidecars grow meanwhile. Gives what the script said.
fn flat(pair: &Pair, what: &str, script: &str) -> String {
    let (near, far) = (pair.client.proxy.id(), pair.server.sidecar.proxy.id());
    // Warm: pools and buffers of an ordinary transfer exist.
    curl(&pair.client.pod, &["-o", "/dev/null", &format!("{ECHO}/bytes/50000000")]).unwrap();
    let warm = format!("head -c 50000000 /dev/zero | curl -sS -T - {ECHO}/sink");
    output(pair.client.app("bash").args(["-c", &warm])).unwrap();
    let before = (rss_kib(near).unwrap(), rss_kib(far).unwrap());
    let mut command = pair.client.app("bash");
    command.args(["-c", script]).stdout(std::process::Stdio::piped());
    let mut process = Process::spawn(&mut command).unwrap();
    let mut most = (0, 0);
    while process.running() {
        most.0 = most.0.max(rss_kib(near).unwrap().saturating_sub(before.0));
        most.1 = most.1.max(rss_kib(far).unwrap().saturating_sub(before.1));
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut said = String::new();
    std::io::Read::read_to_string(&mut process.child().stdout.take().unwrap(), &mut said).unwrap();
    println!("figure: {what}: +{} KiB at the caller, +{} KiB at the server (bound 4096)", most.0, most.1);
    assert!(most.0 <= 4_096 && most.1 <= 4_096, "{most:?}");
    said.trim().to_owned()
}

#[test]
fn mariadb_speaks_first_and_is_understood() {
    let Some(pair) = pair("mariadb", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    let data = pair.mesh.dir().join("mariadb");
    let data_arg = format!("--datadir={}", data.display());
    let mut install = std::process::Command::new("mariadb-install-db");
    install.args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", &data_arg]);
    if let Err(error) = output(install.arg("--skip-test-db")) {
        return weft_harness::apps::skip("mariadb", &format!("no database: {error}"));
    }
    let mut server = pod.command("mariadbd");
    server.args(["--no-defaults", "--user=root", &data_arg, "--skip-grant-tables", "--bind-address=0.0.0.0"]);
    server.arg("--port=3306").arg(format!("--socket={}", data.join("sock").display()));
    let _server = start(server.stderr(std::process::Stdio::null()), pod, 3306).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("db", 3306, 3306)]).unwrap();
    for _ in 0..2 {
        let mut client = pair.client.app("mariadb");
        client.args([
            "--no-defaults",
            "-h",
            "10.96.0.1",
            "-P",
            "3306",
            "--protocol=TCP",
            "-N",
            "-e",
            "select 6*7",
        ]);
        assert_eq!(output(&mut client).unwrap(), "42");
    }
}
