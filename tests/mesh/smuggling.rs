//! Smuggling: whatever is sent, an app sees exactly the requests that its sidecar has let through, and their bodies.
//!
//! Why a table that is made and not a list that is kept: the known tricks are a few ways to write a length, a coding, a
//! line's end or a target, each of which can stand in several places. What has two readings must be refused; what has one
//! must arrive as it was meant; a third thing does not exist. A request that an app saw and no sidecar did shows at once:
//! it has no mark of the sidecar's.

mod payloads;

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result};
use weft_control_plane::cli::demo::{
    mesh::{Mesh, Meshed, Workload, wait},
    netns::{Pod, Process},
};
use weft_harness::apps::{mesh_or_skip, python, service, start, testapp};

use payloads::{END_STREAM, Payload, Want, payloads};

/// An app behind a sidecar.
struct Origin {
    name: &'static str,
    port: u16,
    seen: PathBuf,
    _processes: Vec<Process>,
}

/// Servers with apps of their own, then those that hand on to one.
const APPS: [&str; 8] =
    ["hyper", "node", "gunicorn", "waitress", "uvicorn", "hypercorn", "aiohttp", "tornado"];
const GATEWAYS: [&str; 5] = ["nginx", "apache2", "lighttpd", "haproxy", "varnish"];

struct World {
    // Apps end before the pods that they live in.
    origins: Vec<Origin>,
    outsider: Pod,
    client: Meshed,
    server: Meshed,
    _mesh: Mesh,
}

impl World {
    fn new(test: &str, names: &[&'static str]) -> Option<Self> {
        let mesh = mesh_or_skip(test)?;
        let server = mesh.workload(Workload::new("shop", "origin-1")).unwrap();
        let client = mesh.workload(Workload::new("shop", "client")).unwrap();
        let outsider = mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
        let mut origins = Vec::new();
        for (n, name) in names.iter().enumerate() {
            let port = 8100 + u16::try_from(n).unwrap();
            match origin(&mesh, &server.pod, name, port) {
                Ok(Some((seen, processes))) => {
                    origins.push(Origin { name, port, seen, _processes: processes })
                }
                Ok(None) => println!("{test}: without {name}, which is not installed: make deps-test"),
                Err(error) => panic!("{name}: {error:#}"),
            }
        }
        let names: Vec<_> = origins.iter().map(|origin| format!("http-{}", origin.port)).collect();
        let ports: Vec<_> =
            origins.iter().zip(&names).map(|(origin, name)| (&**name, origin.port, origin.port)).collect();
        service(&mesh, "shop", "origin", "10.96.0.1", &ports).unwrap();
        let world = Self { origins, outsider, client, server, _mesh: mesh };
        for origin in &world.origins {
            for (pod, address) in world.ways(origin) {
                let declared = || {
                    Ok(crate::hostile::exchange(pod, &address.to_string(), &[b"\x01\r\n\r\n"])?
                        .contains("not_http"))
                };
                wait(Duration::from_secs(20), declared).expect("the port is declared as HTTP");
            }
        }
        Some(world)
    }

    /// Into the sidecar before the app, and by way of the client's own.
    fn ways(&self, origin: &Origin) -> [(&Pod, SocketAddr); 2] {
        let inbound = SocketAddr::new(self.server.pod.ip.into(), origin.port);
        let outbound = SocketAddr::from(([10, 96, 0, 1], origin.port));
        [(&self.outsider, inbound), (&self.client.pod, outbound)]
    }
}

/// Starts one; `None` if it is not installed.
fn origin(mesh: &Mesh, pod: &Pod, name: &str, port: u16) -> Result<Option<(PathBuf, Vec<Process>)>> {
    let seen = mesh.dir().join(format!("seen-{name}"));
    std::fs::write(&seen, "")?;
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("mesh/origins");
    let port_text = port.to_string();
    let app = |port: &str| {
        let mut command = testapp(mesh, pod, &["http", "--port", port, "--name", name, "--seen"]);
        command.arg(&seen);
        command
    };
    let quiet = |command: &mut std::process::Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    };
    if name == "hyper" {
        return Ok(Some((seen.clone(), vec![start(&mut app(&port_text), pod, port)?])));
    }
    if name == "node" {
        if !installed("node") {
            return Ok(None);
        }
        let mut command = pod.command("node");
        command.arg(here.join("app.js")).arg(&port_text).arg(&seen);
        quiet(&mut command);
        return Ok(Some((seen, vec![start(&mut command, pod, port)?])));
    }
    if APPS.contains(&name) {
        let Some(python) = python() else { return Ok(None) };
        let there = std::process::Command::new(&python)
            .args(["-c", &format!("import {name}")])
            .stderr(Stdio::null())
            .status()?;
        if !there.success() {
            return Ok(None);
        }
        let mut command = pod.command(&python);
        command.arg(here.join("app.py")).args([name, &port_text]).arg(&seen);
        quiet(&mut command);
        return Ok(Some((seen, vec![start(&mut command, pod, port)?])));
    }
    let (program, arguments, config) = gateway(name, port, port + 100);
    if !installed(program) {
        return Ok(None);
    }
    let dir = mesh.dir().join(format!("gateway-{name}"));
    std::fs::create_dir_all(&dir)?;
    let dir_text = dir.to_str().context("a path")?;
    std::fs::write(dir.join("conf"), config.replace("DIR", dir_text))?;
    let behind = start(&mut app(&(port + 100).to_string()), pod, port + 100)?;
    let mut command = pod.command(program);
    command.args(arguments.iter().map(|argument| argument.replace("DIR", dir_text)));
    quiet(&mut command);
    let gateway = start(&mut command, pod, port)?;
    Ok(Some((seen, vec![gateway, behind])))
}

fn installed(program: &str) -> bool {
    let paths = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    paths.split(':').any(|dir| Path::new(dir).join(program).exists())
}

/// Program, arguments and configuration of a server that hands everything on to a port, with keep-alive both ways.
fn gateway(name: &str, port: u16, to: u16) -> (&'static str, Vec<String>, String) {
    let args = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
    match name {
        "nginx" => (
            "nginx",
            args(&["-p", "DIR", "-c", "DIR/conf"]),
            format!(
                "daemon off; master_process off; pid DIR/pid; error_log DIR/error.log; events {{}}\n\
                 http {{ access_log off; client_body_temp_path DIR/b; proxy_temp_path DIR/p; fastcgi_temp_path DIR/f;\n\
                 uwsgi_temp_path DIR/u; scgi_temp_path DIR/s; upstream app {{ server 127.0.0.1:{to}; keepalive 4; }}\n\
                 server {{ listen {port}; location / {{ proxy_pass http://app; proxy_http_version 1.1;\n\
                 proxy_set_header Connection \"\"; }} }} }}"
            ),
        ),
        "apache2" => (
            "apache2",
            args(&["-X", "-d", "DIR", "-f", "DIR/conf"]),
            format!(
                "ServerName a\nListen {port}\nPidFile DIR/pid\nErrorLog DIR/error.log\nDefaultRuntimeDir DIR\n\
                 LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so\n\
                 LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so\n\
                 LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so\n\
                 LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so\n\
                 KeepAlive On\nTraceEnable Off\nProxyPass / http://127.0.0.1:{to}/ keepalive=On\n"
            ),
        ),
        "lighttpd" => (
            "lighttpd",
            args(&["-D", "-f", "DIR/conf"]),
            format!(
                "server.modules = (\"mod_proxy\")\nserver.document-root = \"DIR\"\nserver.port = {port}\n\
                 server.errorlog = \"DIR/error.log\"\nserver.max-keep-alive-requests = 1000\n\
                 proxy.server = (\"\" => ((\"host\" => \"127.0.0.1\", \"port\" => {to})))\n"
            ),
        ),
        "haproxy" => (
            "haproxy",
            args(&["-db", "-f", "DIR/conf"]),
            format!(
                "defaults\n mode http\n timeout client 10s\n timeout server 10s\n timeout connect 2s\n\
                 frontend f\n bind :{port}\n default_backend b\nbackend b\n http-reuse always\n server s 127.0.0.1:{to}\n"
            ),
        ),
        _ => (
            "varnishd",
            args(&["-F", "-n", "DIR/work", "-f", "DIR/conf", "-s", "malloc,16m", "-j", "none", "-a"])
                .into_iter()
                .chain([format!(":{port}")])
                .collect(),
            format!(
                "vcl 4.1;\nbackend default {{ .host = \"127.0.0.1\"; .port = \"{to}\"; }}\n\
                 sub vcl_recv {{ return (pass); }}\n"
            ),
        ),
    }
}

/// Sends a payload and reads the answers to their end.
fn send(address: SocketAddr, payload: &Payload) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // Refused in the middle, the rest is not wanted.
    let _ = stream.write_all(&payload.bytes);
    if payload.h2 {
        return answer_h2(&mut stream);
    }
    let hangs = payload.name == "the rest of a head";
    let mut said = Vec::new();
    let mut buffer = [0; 8 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(said),
            Ok(n) => said.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(said),
            Err(error) => return Err(error).with_context(|| String::from_utf8_lossy(&said).into_owned()),
        }
        if hangs {
            // What was begun will never end.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}

/// Reads until stream 1 is answered or reset, or the connection ends.
fn answer_h2(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut said = Vec::new();
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).is_err() {
            return Ok(said);
        }
        let mut payload =
            vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        if stream.read_exact(&mut payload).is_err() {
            return Ok(said);
        }
        let (kind, flags, id) = (head[3], head[4], head[8]);
        said.extend_from_slice(&head);
        said.extend_from_slice(&payload);
        let over = (kind <= 1 && flags & END_STREAM != 0) || kind == 3;
        if kind == 7 || (id == 1 && over) {
            return Ok(said);
        }
    }
}

/// A request as an app wrote it down: method, path, how often a sidecar has marked it, body.
type Seen = (String, String, u32, Vec<u8>);

/// What an app has written down, by the number of the payload.
fn seen(origin: &Origin) -> Result<BTreeMap<String, Vec<Seen>>> {
    let mut by_number = BTreeMap::<_, Vec<_>>::new();
    for line in std::fs::read_to_string(&origin.seen)?.lines() {
        let parts: Vec<_> = line.split(' ').collect();
        let [method, path, marks, body] = parts[..] else { anyhow::bail!("a line: {line:?}") };
        let body: Vec<u8> = match body {
            "-" => Vec::new(),
            hex => (0..hex.len() / 2)
                .map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16))
                .collect::<Result<_, _>>()?,
        };
        let number = path.trim_start_matches(|c: char| !c.is_ascii_digit()).to_owned();
        let marks = marks.parse()?;
        by_number.entry(number).or_default().push((method.to_owned(), path.to_owned(), marks, body));
    }
    Ok(by_number)
}

/// Sends the whole table to one app, one way; says where app and sidecar disagree.
fn disagreements(world: &World, origin: &Origin, table: &[Payload]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for (way, (pod, address)) in world.ways(origin).into_iter().enumerate() {
        std::fs::OpenOptions::new().write(true).truncate(true).open(&origin.seen)?;
        let sent = pod.enter(|| {
            let one = |payload: &Payload| send(address, payload).with_context(|| payload.name.clone());
            table.iter().map(one).collect::<Vec<_>>()
        })?;
        let seen = seen(origin)?;
        let way = ["inbound", "outbound"][way];
        // A sidecar asks in the version that it was asked in: the preface of HTTP/2, to an app that takes it for a request.
        let preface = |(method, path, ..): &Seen| (&**method, &**path) == ("PRI", "*");
        let known = |number: &String| number.parse::<usize>().is_ok_and(|n| n < table.len());
        for (number, requests) in seen.iter().filter(|(number, _)| !known(number)) {
            if requests.iter().all(preface) {
                continue;
            }
            all.push(format!("{way} {}: {number:?} out of nothing: {requests:?}", origin.name));
        }
        for (n, (payload, answer)) in table.iter().zip(sent).enumerate() {
            let none = Vec::new();
            let got = seen.get(&n.to_string()).unwrap_or(&none);
            let text = match answer {
                Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                Err(error) => format!("no answer: {error:#}"),
            };
            let wrong = judge(origin, payload, got, &text);
            if let Some(wrong) = wrong {
                all.push(format!(
                    "{way} {}: {}: {wrong}\n   sent {:?}\n   seen {got:?}\n   told {text:?}",
                    origin.name,
                    payload.name,
                    String::from_utf8_lossy(&payload.bytes)
                ));
            }
        }
    }
    Ok(all)
}

/// A target without its authority: one in absolute form arrives so, and not every server tells its app.
fn origin_form(target: &str) -> &str {
    let after = target.strip_prefix("http://").and_then(|rest| rest.find('/').map(|at| &rest[at..]));
    after.unwrap_or(target)
}

/// What is wrong, if anything is.
fn judge(origin: &Origin, payload: &Payload, got: &[Seen], told: &str) -> Option<&'static str> {
    if told.starts_with("no answer") {
        return Some("the connection was left open");
    }
    if got.iter().any(|(_, _, marks, _)| *marks != 1) {
        return Some("the app saw a request that its sidecar did not");
    }
    let answers = told.matches("HTTP/1.1 ").count();
    match &payload.want {
        Want::Refused if !got.is_empty() => Some("it reached the app"),
        Want::Refused if payload.h2 => None,
        Want::Refused => {
            let refused = told.starts_with("HTTP/1.1 4") && answers == 1;
            (!refused).then_some("it was not refused")
        }
        Want::Only(want) => {
            // An app may have its own reasons to refuse what it was handed; it may not see anything else.
            let mut left = want.iter();
            let in_order = got.iter().all(|(method, path, _, body)| {
                // Varnish drops the body of a GET.
                let dropped = origin.name == "varnish" && method == "GET" && body.is_empty();
                left.any(|(m, p, b)| m == method && p == origin_form(path) && (b == body || dropped))
            });
            if !in_order {
                return Some("the app saw something else");
            }
            let own = told.contains("HTTP/1.1 4")
                || told.contains("HTTP/1.0 4")
                || told.contains("HTTP/1.1 5")
                || payload.h2;
            (got.len() < want.len() && !own).then_some("a request was lost")
        }
    }
}

#[test]
fn no_payload_makes_an_app_see_another_request_than_its_sidecar() {
    let names = [&APPS[..], &GATEWAYS].concat();
    let Some(world) = World::new("smuggling", &names) else { return };
    let table = payloads();
    assert!(table.len() >= 150, "{} payloads", table.len());
    // Servers side by side: each has a file of its own, and most of the time is theirs.
    let all: Vec<String> = std::thread::scope(|scope| {
        let (world, table) = (&world, &table);
        let one = |origin| scope.spawn(move || disagreements(world, origin, table).unwrap());
        let running: Vec<_> = world.origins.iter().map(one).collect();
        running.into_iter().flat_map(|one| one.join().unwrap()).collect()
    });
    let names: Vec<_> = world.origins.iter().map(|origin| origin.name).collect();
    println!(
        "figure: smuggling: {} disagreements in {} payloads x {} origins ({}) x 2 ways (bound 0)",
        all.len(),
        table.len(),
        names.len(),
        names.join(", ")
    );
    assert!(all.is_empty(), "{}", all.join("\n"));
    if std::env::var_os("CI").is_some() {
        assert!(names.len() >= 8, "only {names:?} are installed");
    }
}
