//! What programs do to raw TCP: resets, cuts, urgent bytes, small writes; real servers that speak first or second; and
//! destinations that are not a pod of a Service.

use std::{io::Read as _, path::PathBuf, process::Stdio, time::Duration};

use nix::sys::signal::Signal;
use weft_control_plane::cli::demo::{
    mesh::{Workload, wait},
    netns::{Pod, Process},
};
use weft_harness::apps::{curl, output, python, script, service, skip, start, testapp};

use crate::{Pair, pair};

/// A pair whose server also runs `tcp_habits.py <mode> 9100`; what that writes is in the file.
fn habits(test: &str, mode: &str) -> Option<(Pair, Process, PathBuf)> {
    let pair = pair(test, &[])?;
    let Some(python) = python() else {
        skip(test, "target/venv is missing: make deps-test");
        return None;
    };
    let pod = &pair.server.sidecar.pod;
    let file = pair.mesh.dir().join("habits");
    let mut server = pod.command(python);
    server.arg(script("tcp_habits.py")).args([mode, "9100"]).arg(&file);
    let app = start(&mut server, pod, 9100).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    std::fs::write(&file, "").unwrap();
    Some((pair, app, file))
}

fn client(pair: &Pair, what: &str) -> std::process::Command {
    let mut command = pair.client.app(python().unwrap());
    command.arg(script("tcp_habits.py")).args([what, "10.96.0.1", "91"]);
    command
}

/// A client that has been answered and stays.
fn stays(pair: &Pair) -> Process {
    let mut process = Process::spawn(client(pair, "stay").stdout(Stdio::piped())).unwrap();
    let mut first = [0; 8];
    process.child().stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"talking\n");
    process
}

/// How its connection ended.
fn ended(mut process: Process) -> String {
    wait(Duration::from_secs(20), || Ok(!process.running())).expect("the connection should have ended");
    let mut rest = String::new();
    process.child().stdout.as_mut().unwrap().read_to_string(&mut rest).unwrap();
    rest.trim().to_owned()
}

fn wrote(file: &PathBuf, text: &str) {
    wait(Duration::from_secs(10), || Ok(std::fs::read_to_string(file)?.contains(text))).unwrap_or_else(
        |_| {
            panic!("{text:?} is not in {:?}", std::fs::read_to_string(file).unwrap());
        },
    );
}

#[test]
fn a_reset_stays_a_reset_both_ways() {
    let Some((pair, _app, file)) = habits("reset", "serve") else { return };
    assert_eq!(output(&mut client(&pair, "reset-me")).unwrap(), "reset");
    assert_eq!(output(&mut client(&pair, "reset-it")).unwrap(), "did");
    wrote(&file, "reset\n");
    assert!(!std::fs::read_to_string(&file).unwrap().contains("end"));
}

#[test]
fn a_connection_cut_between_sidecars_is_an_error_and_not_an_end() {
    let Some((mut pair, _app, file)) = habits("cut", "serve") else { return };
    // A killed sidecar's connection ends with a FIN and without close_notify: what was carried may be half of it.
    let first = stays(&pair);
    pair.server.sidecar.proxy.signal(Signal::SIGKILL).unwrap();
    assert_eq!(ended(first), "reset");
    pair.mesh.restart_proxy(&mut pair.server.sidecar).unwrap();
    // The app behind a killed sidecar is told by the kernel, which cannot know better.
    wrote(&file, "end\n");
    let _second = stays(&pair);
    pair.client.proxy.signal(Signal::SIGKILL).unwrap();
    wrote(&file, "reset\n");
}

#[test]
fn an_opaque_connection_ends_with_a_reset_when_its_caller_is_denied() {
    let Some((pair, _app, file)) = habits("opaque_revoked", "serve") else { return };
    let open = stays(&pair);
    let policy = serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "echo"},
        "spec": {"selector": {"matchLabels": {"app": "echo"}}, "action": "Deny",
                 "rules": [{"from": [{"identities": ["spiffe://cluster.local/ns/shop/sa/client"]}]}]},
    });
    pair.mesh.write("authz.yaml", &format!("{policy:#}\n")).unwrap();
    assert_eq!(ended(open), "reset");
    wrote(&file, "reset\n");
    assert!(pair.server.sidecar.metric("weft_denied_total", &[]).unwrap() >= 1.0);
    let log = std::fs::read_to_string(&pair.server.sidecar.log).unwrap();
    assert!(log.lines().any(|line| line.contains("connection ended") && line.contains("denied")), "{log}");
}

#[test]
fn urgent_bytes_stay_in_the_stream() {
    let Some((pair, _app, file)) = habits("urgent", "serve") else { return };
    assert_eq!(output(&mut client(&pair, "urgent")).unwrap(), "12!34");
    wrote(&file, "ab?cd\n");
}

#[test]
fn small_writes_are_not_held_back() {
    let Some((pair, _app, _)) = habits("nodelay", "serve") else { return };
    let median: f64 = output(&mut client(&pair, "pairs")).unwrap().parse().unwrap();
    println!("figure: median of two small writes and an answer: {median} ms (bound 40)");
    // Nagle's algorithm against delayed acknowledgement costs 40 ms each time.
    assert!(median < 40.0, "{median} ms");
}

#[test]
fn keepalive_is_on_at_both_ends_of_both_sidecars() {
    let Some((pair, _app, _)) = habits("keepalive", "serve") else { return };
    let _open = stays(&pair);
    for meshed in [&pair.client, &pair.server.sidecar] {
        let (id, mut seen) = (format!("pid={},", meshed.proxy.id()), String::new());
        let all_kept = wait(Duration::from_secs(10), || {
            seen = output(meshed.app("ss").args(["-Htonp", "state", "established"]))?;
            // The controller is asked for a sign of life by HTTP/2.
            let ours = seen.lines().filter(|line| line.contains(&id) && !line.contains(":14010"));
            let ours: Vec<_> = ours.collect();
            // The app's side and the network's side.
            Ok(ours.len() >= 2 && ours.iter().all(|line| line.contains("timer:(keepalive,")))
        });
        assert!(all_kept.is_ok(), "{seen}");
    }
}

#[test]
fn both_sides_may_speak_at_once() {
    let Some((pair, _app, _)) = habits("at_once", "at-once-server") else { return };
    for _ in 0..3 {
        assert_eq!(output(&mut client(&pair, "at-once")).unwrap(), "both");
    }
}

#[test]
fn smtp_speaks_first_and_mail_arrives() {
    let Some((pair, _app, file)) = habits("smtp", "smtp") else { return };
    for _ in 0..2 {
        assert_eq!(output(&mut client(&pair, "smtp-send")).unwrap(), "sent");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "the last line\nthe last line\n");
}

#[test]
fn redis_speaks_second_pipelines_and_publishes() {
    let Some(pair) = pair("redis", &[]) else { return };
    if !installed("redis", "redis-server") {
        return;
    }
    let pod = &pair.server.sidecar.pod;
    let mut server = pod.command("redis-server");
    server.args(["--port", "6379", "--protected-mode", "no", "--save", "", "--dir"]).arg(pair.mesh.dir());
    let _server = start(&mut server, pod, 6379).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("redis", 6379, 6379)]).unwrap();
    let cli = |args: &[&str]| {
        let mut command = pair.client.app("redis-cli");
        command.args(["-h", "10.96.0.1"]).args(args);
        command
    };
    assert_eq!(output(&mut cli(&["ping"])).unwrap(), "PONG");
    let pipe =
        "for n in $(seq 20000); do printf 'SET key:%s %s\\r\\n' $n $n; done | redis-cli -h 10.96.0.1 --pipe";
    let said = output(pair.client.app("bash").args(["-c", pipe])).unwrap();
    assert!(said.contains("errors: 0, replies: 20000"), "{said}");
    assert_eq!(output(&mut cli(&["get", "key:19999"])).unwrap(), "19999");
    // A subscriber is silent for as long as nothing is published.
    let mut subscriber = Process::spawn(cli(&["subscribe", "news"]).stdout(Stdio::piped())).unwrap();
    wait(Duration::from_secs(10), || Ok(output(&mut cli(&["publish", "news", "hello"]))? == "1")).unwrap();
    let mut heard = String::new();
    let mut lines = std::io::BufReader::new(subscriber.child().stdout.take().unwrap());
    while !heard.contains("hello") {
        assert!(std::io::BufRead::read_line(&mut lines, &mut heard).unwrap() > 0, "{heard}");
    }
}

#[test]
fn ssh_speaks_first_runs_commands_and_carries_bulk() {
    let Some(pair) = pair("ssh", &[]) else { return };
    if !installed("ssh", "sshd") {
        return;
    }
    let pod = &pair.server.sidecar.pod;
    let dir = pair.mesh.dir().join("ssh");
    // What Debian's own unit makes at boot, and sshd will not start without.
    std::fs::create_dir_all("/run/sshd").unwrap();
    std::fs::create_dir_all(&dir).unwrap();
    for key in ["host", "user"] {
        let mut keygen = std::process::Command::new("ssh-keygen");
        output(keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key))).unwrap();
    }
    let sshd =
        output(std::process::Command::new("bash").args(["-c", "PATH=$PATH:/usr/sbin command -v sshd"]));
    let mut server = pod.command(sshd.unwrap());
    server.args(["-D", "-e", "-f", "/dev/null", "-p", "2200", "-o", "UsePAM=no", "-o", "StrictModes=no"]);
    server.arg("-h").arg(dir.join("host")).arg("-o");
    server.arg(format!("AuthorizedKeysFile={}", dir.join("user.pub").display()));
    let _server = start(server.stderr(Stdio::null()), pod, 2200).unwrap();
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("ssh", 22, 2200)]).unwrap();
    let options =
        "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR";
    let ssh = format!("ssh -F /dev/null {options} -i {} root@10.96.0.1", dir.join("user").display());
    for _ in 0..2 {
        let bulk = format!(
            "head -c 20000000 /dev/zero | {ssh} 'wc -c; head -c 20000000 /dev/zero' | {{ read -r n; echo $n; wc -c; }}"
        );
        let said = output(pair.client.app("bash").args(["-c", &bulk])).unwrap();
        assert_eq!(said, "20000000\n20000000");
    }
}

#[test]
fn a_refusal_and_a_timeout_of_connecting_are_told_apart() {
    let Some(pair) = pair("refused_or_lost", &[]) else { return };
    for (n, name) in [(2, "refuses"), (3, "silent")] {
        let pod = pair.mesh.plain(&Workload::new("shop", name)).unwrap();
        if name == "silent" {
            output(pod.command("iptables").args(["-A", "INPUT", "-p", "tcp", "-j", "DROP"])).unwrap();
        }
        service(&pair.mesh, "shop", name, &format!("10.96.0.{n}"), &[("raw", 91, 9100)]).unwrap();
    }
    let metric = |label: &str| pair.client.metric("weft_connects_total", &[label]).unwrap();
    let (ok, refused, timeout) = (metric("ok"), metric("refused"), metric("timeout"));
    for (vip, code) in [("10.96.0.2", "connect_refused"), ("10.96.0.3", "connect_timeout")] {
        let ask = format!("exec 3<>/dev/tcp/{vip}/91; echo hi >&3; timeout 10 cat <&3; echo [$?]");
        let asked = pair.client.app("bash").args(["-c", &ask]).output().unwrap();
        let (said, error) = (String::from_utf8_lossy(&asked.stdout), String::from_utf8_lossy(&asked.stderr));
        assert!(said.contains("[1]") && error.contains("reset"), "{code}: {said} {error}");
        assert!(pair.client.metric("weft_proxy_errors_total", &[code]).unwrap() >= 1.0, "{code}");
    }
    assert!(metric("refused") > refused && metric("timeout") > timeout);
    assert!(metric("ok") - ok < 1.0, "a connection that did not come about was counted as one");
}

#[test]
fn headless_services_are_reached_by_their_pods_addresses() {
    let Some(pair) = pair("headless", &[]) else { return };
    let headless = serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "echo-headless"},
        "spec": {"clusterIP": "None", "selector": {"app": "echo"}, "ports": [{"name": "http", "port": 8080}]},
    });
    pair.mesh.write("service-headless.yaml", &format!("{headless:#}\n")).unwrap();
    wait(Duration::from_secs(10), || {
        let status = pair.mesh.api("/api/v1/status")?;
        let all = status["objects"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().any(|o| o["name"] == "echo-headless"))
    })
    .unwrap();
    // What its name resolves to.
    let address = format!("echo-headless.shop.svc:8080:{}", pair.server.sidecar.pod.ip);
    let args = ["--resolve", &address, "http://echo-headless.shop.svc:8080/head"];
    let head = curl(&pair.client.pod, &args).unwrap();
    assert!(head.contains("weft-client-id: spiffe://cluster.local/ns/shop/sa/client"), "{head}");
    assert!(head.contains("host: echo-headless.shop.svc:8080"), "{head}");
}

#[test]
fn external_names_node_ports_and_the_api_server_are_reached_as_without_a_mesh() {
    let Some(pair) = pair("elsewhere", &[]) else { return };
    let outside = |name: &str, ip: &str, ip6: &str| {
        pair.mesh.world.pod_at(name, ip.parse().unwrap(), ip6.parse().unwrap()).unwrap()
    };
    // An ExternalName resolves to an address outside the mesh; its Host arrives as it was sent.
    let web = outside("web", "192.0.2.10", "2001:db8::10");
    let _web =
        start(&mut testapp(&pair.mesh, &web, &["http", "--port", "80", "--name", "web"]), &web, 80).unwrap();
    let args = ["--resolve", "api.example.com:80:192.0.2.10", "http://api.example.com/head"];
    let head = curl(&pair.client.pod, &args).unwrap();
    assert!(head.contains("host: api.example.com") && !head.contains("weft-client-id"), "{head}");
    // A NodePort is an address of a node, which the node's own rules turn into a pod's.
    let bridge = pair.mesh.world.bridge();
    output(bridge.command("ip").args(["addr", "add", "192.0.2.1/32", "dev", "lo"])).unwrap();
    let to = format!("{}:8080", pair.server.sidecar.pod.ip);
    for (chain, rule) in [
        ("PREROUTING", vec!["-d", "192.0.2.1", "-p", "tcp", "--dport", "30080", "-j", "DNAT", "--to", &to]),
        ("POSTROUTING", vec!["-d", &to[..to.len() - 5], "-p", "tcp", "--dport", "8080", "-j", "MASQUERADE"]),
    ] {
        output(bridge.command("iptables").args(["-t", "nat", "-A", chain]).args(rule)).unwrap();
    }
    assert_eq!(curl(&pair.client.pod, &["http://192.0.2.1:30080/"]).unwrap(), "ok");
    // The API server: a Service without a selector, whose endpoint is outside the pods' network and speaks TLS.
    let node = outside("node", "192.0.2.20", "2001:db8::20");
    let _api = openssl_server(&pair, &node, 6443);
    for (file, object) in [
        (
            "service-kubernetes.yaml",
            serde_json::json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "kubernetes"},
                "spec": {"clusterIP": "10.96.0.100", "clusterIPs": ["10.96.0.100"],
                         "ports": [{"name": "https", "port": 443, "targetPort": 6443}]},
            }),
        ),
        (
            "slice-kubernetes.yaml",
            serde_json::json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"namespace": "default", "name": "kubernetes",
                             "labels": {"kubernetes.io/service-name": "kubernetes"}},
                "endpoints": [{"addresses": ["192.0.2.20"], "conditions": {"ready": true}}],
                "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
            }),
        ),
    ] {
        pair.mesh.write(file, &format!("{object:#}\n")).unwrap();
    }
    wait(Duration::from_secs(10), || {
        Ok(curl(&pair.client.pod, &["-k", "https://10.96.0.100/"])
            .is_ok_and(|page| page.contains("s_server")))
    })
    .unwrap();
}

/// `openssl s_server` with a certificate of its own.
fn openssl_server(pair: &Pair, pod: &Pod, port: u16) -> Process {
    let (key, cert) = (pair.mesh.dir().join("own.key"), pair.mesh.dir().join("own.crt"));
    let made = rcgen::generate_simple_self_signed(vec!["own.example".to_owned()]).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    std::fs::write(&cert, made.cert.pem()).unwrap();
    let mut server = pod.command("openssl");
    server.args(["s_server", "-accept", &port.to_string(), "-www", "-key"]).arg(&key).arg("-cert").arg(&cert);
    start(server.stdin(Stdio::null()), pod, port).unwrap()
}

/// Whether a program is there; says so if not.
fn installed(test: &str, program: &str) -> bool {
    let find = format!("PATH=$PATH:/usr/sbin:/sbin command -v {program}");
    let found = output(std::process::Command::new("bash").args(["-c", &find])).is_ok();
    if !found {
        skip(test, &format!("{program} is missing: make deps-test"));
    }
    found
}
