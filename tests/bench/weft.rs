//! The pair that this is all about: shipped binaries, a real controller, policy of every kind.
//!
//! Nothing is switched off and nothing tuned: settings are the defaults, telemetry flows to the
//! controller, requests are routed by an HTTPRoute, balanced, retried under a budget, recorded in
//! histograms and authorized by identity, as in the smallest mesh that somebody would really run. The
//! controller runs in the client's pod, uncaptured; its CPU time is not a sidecar's and is not counted.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use weft_core::ports;

use crate::{
    load,
    net::{CLIENT, Capture, Group, HTTP1_PORT, HTTP2_PORT, Namespace, Process, SERVER, SERVICE},
    peers::{Running, World},
};

/// Where sidecars listen.
const CAPTURE: Capture = Capture { outbound: ports::OUTBOUND, inbound: ports::INBOUND };

/// Which sidecars, and how.
pub(crate) struct Sidecars {
    pub(crate) program: PathBuf,
    /// Under valgrind, which counts what they execute; then not hardened.
    pub(crate) callgrind: bool,
}

/// What callgrind writes to, in the run's folder; a number follows.
pub(crate) fn callgrind_file(process: &str) -> String {
    format!("callgrind.{process}")
}

/// Starts controller and both sidecars; the caller waits for the first answer.
pub(crate) async fn start(world: &World, sidecars: &Sidecars) -> Result<Running> {
    world.network.capture(Some(CAPTURE))?;
    let dir = world.dir.join("weft");
    if dir.exists() {
        // Of the round before: a new root, new tokens.
        fs::remove_dir_all(&dir)?;
    }
    let (source, state) = (dir.join("source"), dir.join("state"));
    for old in fs::read_dir(&world.dir)?.flatten() {
        if old.file_name().to_string_lossy().starts_with(&callgrind_file("")) {
            fs::remove_file(old.path())?;
        }
    }
    fs::create_dir_all(&source)?;
    fs::create_dir_all(&state)?;
    fs::write(source.join("bench.yaml"), objects())?;

    let (client, server) = (&world.network.client, &world.network.server);
    let mut command = client.command(world.programs.join("weft-controller"), Group::Proxy);
    command
        .args(["--source", "dir"])
        .arg(&source)
        .arg("--state-dir")
        .arg(&state)
        .args(["--listen", "0.0.0.0"]);
    let mut controller = Process::start(command, "weft-controller", &world.dir)?;
    let mut probe = client.command(std::env::current_exe()?, Group::Proxy);
    probe.args(["probe", "--to", &format!("127.0.0.1:{}", ports::API), "--path", "/ready"]);
    let ready = load::output(&mut probe).await;
    controller.check(&world.dir)?;
    ready.context("the controller did not become ready")?;

    let server = sidecar(world, sidecars, server, "server", &SERVER.to_string())?;
    let client = sidecar(world, sidecars, client, "client", &CLIENT.to_string())?;
    Ok(Running { proxies: vec![client, server], others: vec![controller], host: SERVICE, first_answer: None })
}

fn sidecar(
    world: &World,
    sidecars: &Sidecars,
    namespace: &Namespace,
    name: &str,
    ip: &str,
) -> Result<Process> {
    let (uid, dir) = (uid(name), world.dir.join("weft"));
    let process = format!("weft-{name}");
    let mut command = Command::new(world.programs.join("weft"));
    command.arg("token").arg("--state-dir").arg(dir.join("state"));
    command.args(["--namespace", "bench", "--service-account", name, "--uid", &uid, "--pod", name]);
    let made = command.output().context("cannot run weft")?;
    if !made.status.success() {
        bail!("no join token: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    let token = dir.join(format!("{name}.token"));
    fs::write(&token, String::from_utf8_lossy(&made.stdout).trim())?;
    let mut command = if sidecars.callgrind {
        let mut valgrind = namespace.command("valgrind", Group::Proxy);
        let file = world.dir.join(callgrind_file(&process));
        valgrind.args(["--tool=callgrind", "--compress-strings=no", "--compress-pos=no"]);
        valgrind.arg(format!("--callgrind-out-file={}", file.display())).arg(&sidecars.program);
        valgrind.env("WEFT_HARDEN", "off");
        valgrind
    } else {
        namespace.command(&sidecars.program, Group::Proxy)
    };
    command
        .env("WEFT_NAMESPACE", "bench")
        .env("WEFT_SERVICE_ACCOUNT", name)
        .env("WEFT_POD_NAME", name)
        .env("WEFT_POD_UID", uid)
        .env("WEFT_POD_IPS", ip)
        .env("WEFT_TRUST_ANCHORS", dir.join("state/trust-anchors.pem"))
        .env("WEFT_TOKEN_FILE", token)
        .env("WEFT_CONTROLLER", format!("{CLIENT}:{}", ports::DISCOVERY))
        .env("WEFT_CONTROLLER_IDENTITY", format!("{CLIENT}:{}", ports::IDENTITY))
        .env("WEFT_ADMIN_SOCKET", dir.join(format!("{name}.sock")));
    Process::start(command, &process, &world.dir)
}

fn uid(name: &str) -> String {
    format!("bench-{name}-uid")
}

/// What a user would have written.
fn objects() -> String {
    let mut text = format!(
        r#"apiVersion: weft.dev/v1alpha1
kind: MeshConfig
metadata: {{name: mesh}}
spec: {{meshRanges: [10.77.0.0/24, 10.96.0.0/16]}}
---
apiVersion: v1
kind: Service
metadata: {{name: backend, namespace: bench}}
spec:
  clusterIP: {SERVICE}
  selector: {{app: server}}
  ports:
  - {{name: http, port: {HTTP1_PORT}, targetPort: {HTTP1_PORT}, appProtocol: http}}
  - {{name: http2, port: {HTTP2_PORT}, targetPort: {HTTP2_PORT}, appProtocol: kubernetes.io/h2c}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: backend-1, namespace: bench, labels: {{kubernetes.io/service-name: backend}}}}
addressType: IPv4
ports:
- {{name: http, port: {HTTP1_PORT}}}
- {{name: http2, port: {HTTP2_PORT}}}
endpoints:
- addresses: [{SERVER}]
  conditions: {{ready: true}}
  targetRef: {{kind: Pod, name: server, namespace: bench, uid: {server}}}
---
apiVersion: weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: server, namespace: bench}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  mtls: Strict
  action: Allow
  rules:
  - from: [{{identities: ["spiffe://cluster.local/ns/bench/sa/client"]}}]
"#,
        server = uid("server"),
    );
    for (name, ip) in [("client", CLIENT), ("server", SERVER)] {
        text += &format!(
            r#"---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: bench
  uid: {uid}
  labels: {{app: {name}}}
  annotations: {{weft.dev/injected: "true"}}
spec: {{serviceAccountName: {name}, containers: [{{name: app}}]}}
status:
  phase: Running
  podIP: {ip}
  podIPs: [{{ip: {ip}}}]
  conditions: [{{type: Ready, status: "True"}}]
"#,
            uid = uid(name),
        );
    }
    for (name, port) in [("http", HTTP1_PORT), ("http2", HTTP2_PORT)] {
        text += &format!(
            r#"---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: bench}}
spec:
  parentRefs: [{{group: "", kind: Service, name: backend, port: {port}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /}}}}]
    backendRefs: [{{name: backend, port: {port}}}]
"#
        );
    }
    text
}
