//! Servers that people run, and their habits: they close what is idle.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use weft_control_plane::cli::demo::{
    mesh::{Mesh, Meshed, Workload},
    netns::{Pod, Process},
};
use weft_harness::{
    apps::{mesh_or_skip, output, python, service, skip, start},
    wire::Wire,
};

/// A server on a port of the pod; each closes a connection that was idle for a second.
struct Server {
    name: &'static str,
    port: u16,
    /// What it answers.
    ok: u16,
    _process: Process,
}

struct World {
    // Apps and sidecars end before the mesh that they live in.
    servers: Vec<Server>,
    client: Meshed,
    _backend: Meshed,
    dir: PathBuf,
    _mesh: Mesh,
}

/// A file of `tests/mesh/servers`.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mesh/servers").join(name)
}

/// A configuration with its port and folder filled in.
fn configured(dir: &Path, name: &str, port: u16) -> Result<PathBuf> {
    let text = std::fs::read_to_string(file(name))?;
    let text = text.replace("PORT", &port.to_string()).replace("DIR", &dir.display().to_string());
    let path = dir.join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--help").output().is_ok()
}

/// A program in Go; the compiler keeps what it has built.
fn go(dir: &Path, source: &str) -> Result<PathBuf> {
    let (source, program) = (file(source), dir.join(source.replace(['.', '/'], "-")));
    output(Command::new("go").arg("build").arg("-o").arg(&program).arg(source)).context("go build")?;
    Ok(program)
}

fn commands(pod: &Pod, dir: &Path) -> Result<Vec<(&'static str, u16, u16, Command)>> {
    let mut all = Vec::new();
    let mut add = |name, port, ok, program: &Path, args: &[&str]| {
        let mut command = pod.command(program);
        command.args(args).current_dir(dir);
        all.push((name, port, ok, command));
    };
    let text = |path: PathBuf| path.display().to_string();
    let here = text(dir.to_owned());
    if is_there("node") {
        add("node", 9001, 200, Path::new("node"), &[&text(file("server.js")), "9001"]);
    }
    if is_there("nginx") {
        let conf = text(configured(dir, "nginx.conf", 9002)?);
        add("nginx", 9002, 200, Path::new("nginx"), &["-p", &here, "-c", &conf]);
    }
    if is_there("apache2") {
        let conf = text(configured(dir, "apache.conf", 9003)?);
        add("apache", 9003, 302, Path::new("apache2"), &["-f", &conf, "-DFOREGROUND"]);
    }
    if is_there("haproxy") {
        let conf = text(configured(dir, "haproxy.cfg", 9004)?);
        add("haproxy", 9004, 200, Path::new("haproxy"), &["-db", "-f", &conf]);
    }
    if let Some(python) = python() {
        let apps = text(file(""));
        let gunicorn = [
            "-m",
            "gunicorn",
            "-b",
            "0.0.0.0:9005",
            "-k",
            "gthread",
            "--threads",
            "16",
            "--keep-alive",
            "1",
            "--log-level",
            "error",
            "--pythonpath",
            &apps,
            "apps:wsgi",
        ];
        add("gunicorn", 9005, 200, &python, &gunicorn);
        let uvicorn = [
            "-m",
            "uvicorn",
            "--host",
            "0.0.0.0",
            "--port",
            "9006",
            "--timeout-keep-alive",
            "1",
            "--log-level",
            "error",
            "--app-dir",
            &apps,
            "apps:asgi",
        ];
        add("uvicorn", 9006, 200, &python, &uvicorn);
    }
    if is_there("go") {
        add("go", 9007, 200, &go(dir, "main.go")?, &["9007"]);
    }
    Ok(all)
}

fn world(test: &str) -> Option<World> {
    let mesh = mesh_or_skip(test)?;
    let backend = mesh.workload(Workload::new("shop", "servers-1")).unwrap();
    let dir = mesh.dir().join("servers");
    std::fs::create_dir(&dir).unwrap();
    let mut servers = Vec::new();
    for (name, port, ok, mut command) in commands(&backend.pod, &dir).unwrap() {
        let process = start(&mut command, &backend.pod, port).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        servers.push(Server { name, port, ok, _process: process });
    }
    if servers.is_empty() {
        skip(test, "no server of tests/deps.sh is installed");
        return None;
    }
    let ports: Vec<_> = servers.iter().map(|server| (server.name, server.port, server.port)).collect();
    service(&mesh, "shop", "servers", "10.96.0.1", &ports).unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    Some(World { servers, client, _backend: backend, dir, _mesh: mesh })
}

impl World {
    fn dial(&self, server: &Server) -> Wire {
        Wire::dial(&self.client.pod, &format!("10.96.0.1:{}", server.port)).unwrap()
    }

    fn names(&self) -> String {
        self.servers.iter().map(|server| server.name).collect::<Vec<_>>().join(", ")
    }
}

#[test]
fn real_servers_that_close_idle_connections_cost_no_request() {
    let Some(world) = world("real_idle") else { return };
    let (world, rounds, clients) = (&world, 4, 6);
    std::thread::scope(|scope| {
        for server in &world.servers {
            for client in 0..clients {
                scope.spawn(move || {
                    let mut wire = world.dial(server);
                    for round in 0..rounds {
                        let (method, body) =
                            if (round + client) % 3 == 0 { ("GET", "") } else { ("POST", "abc") };
                        let length = body.len();
                        let request = format!(
                            "{method} /ok HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}"
                        );
                        let answer = wire.ask(request).unwrap();
                        assert_eq!(answer.status(), server.ok, "{}: {}", server.name, answer.head);
                        assert_eq!(answer.header("weft-reason"), None, "{}: {}", server.name, answer.head);
                        // Around the moment at which the server closes.
                        std::thread::sleep(Duration::from_millis(980 + (round * 17 + client * 11) % 40));
                    }
                });
            }
        }
    });
    let asked = world.servers.len() as u64 * rounds * clients;
    println!("figure: {} close what is idle: {asked} requests, two thirds POSTs, 0 failed", world.names());
}

/// Those that count what they read, and refuse before they read.
const COUNTING: [&str; 4] = ["node", "gunicorn", "uvicorn", "go"];

#[test]
fn real_servers_have_their_say_before_an_upload_and_real_clients_hear_it() {
    let Some(world) = world("real_uploads") else { return };
    let counting: Vec<_> = world.servers.iter().filter(|server| COUNTING.contains(&server.name)).collect();
    let addresses: Vec<_> = counting.iter().map(|server| format!("10.96.0.1:{}", server.port)).collect();
    std::thread::scope(|scope| {
        for server in &world.servers {
            let pod = &world.client.pod;
            scope.spawn(move || {
                let upload = |path: &str, expect: &str| {
                    let url = format!("http://10.96.0.1:{}{path}", server.port);
                    let curl = format!(
                        "head -c 3000000 /dev/zero | curl -sS -w ' %{{http_code}} %{{size_upload}}' \
                         -X POST -H 'Expect: {expect}' -T - {url}"
                    );
                    output(pod.command("bash").args(["-c", &curl])).unwrap()
                };
                for expect in ["100-continue", ""] {
                    let taken = upload("/ok", expect);
                    let status = server.ok.to_string();
                    assert_eq!(
                        taken.split(' ').rev().nth(1),
                        Some(&*status),
                        "{}: {taken:.200}",
                        server.name
                    );
                    if COUNTING.contains(&server.name) {
                        assert!(taken.starts_with("ok 3000000 200 "), "{}: {taken}", server.name);
                        let refused = upload("/refuse", expect);
                        assert!(refused.starts_with("no"), "{}: {refused}", server.name);
                        assert_eq!(
                            refused.split_whitespace().nth(1),
                            Some("413"),
                            "{}: {refused}",
                            server.name
                        );
                        // gunicorn asks before its app has the request.
                        let unasked = refused.ends_with(" 413 0") || server.name == "gunicorn";
                        assert!(
                            unasked || expect.is_empty(),
                            "{}: it asked for the body: {refused}",
                            server.name
                        );
                    }
                }
            });
        }
        if is_there("go") {
            let (addresses, pod, dir) = (&addresses, &world.client.pod, &world.dir);
            scope.spawn(move || {
                let client = go(dir, "../clients/uploads.go").unwrap();
                let said = output(pod.command(&client).args(addresses));
                assert_eq!(said.unwrap_or_else(|e| panic!("uploads.go: {e:#}")), "all well");
            });
        }
        for (program, name) in [(python(), "uploads.py"), (Some("node".into()), "uploads.mjs")] {
            let Some(program) = program.filter(|program| is_there(&program.display().to_string())) else {
                continue;
            };
            let (addresses, pod) = (&addresses, &world.client.pod);
            scope.spawn(move || {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("mesh/clients").join(name);
                let said = output(pod.command(&program).arg(script).args(addresses));
                assert_eq!(said.unwrap_or_else(|e| panic!("{name}: {e:#}")), "all well", "{name}");
            });
        }
    });
    println!("figure: uploads with and without Expect to {}: 0 surprises", world.names());
}
