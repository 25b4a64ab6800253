//! The pair that this is all about: shipped binaries, a real controller, policy of every kind.
//!
//! Nothing is switched off and nothing tuned: settings are the defaults, telemetry flows to the
//! controller, requests are routed by an HTTPRoute, balanced, retried under a budget, recorded in
//! histograms and authorized by identity, as in the smallest mesh that somebody would really run. The
//! controller runs in the client's pod, uncaptured; its CPU time is not a sidecar's and is not counted.

use std::{cell::RefCell, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use weft_core::ports;

use crate::{
    load,
    net::{CLIENT, Capture, Group, Namespace, Process, SERVER},
    objects,
    peers::{Running, World},
};

/// Where sidecars listen.
const CAPTURE: Capture = Capture { outbound: ports::OUTBOUND, inbound: ports::INBOUND, by_port: false };

/// Which sidecars, how, and in what mesh.
#[derive(Clone)]
pub(crate) struct Sidecars {
    pub(crate) program: PathBuf,
    /// Under valgrind, which counts what they execute; then not hardened.
    pub(crate) callgrind: bool,
    /// Route rules and authorization rules that each request is held against in vain.
    pub(crate) rules: usize,
    /// Services in the cluster beside the backend's.
    pub(crate) services: usize,
}

impl Sidecars {
    /// As a user would have them.
    pub(crate) fn shipped(world: &World) -> Sidecars {
        Sidecars { program: world.programs.join("weft-proxy"), callgrind: false, rules: 0, services: 0 }
    }
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
    fs::write(source.join("bench.yaml"), objects::mesh(sidecars.rules))?;
    objects::write_services(&source, sidecars.services)?;

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
    probe.args([
        "probe",
        "--to",
        &format!("127.0.0.1:{}", ports::API),
        "--path",
        "/ready",
        "--seconds",
        "60",
    ]);
    let ready = load::output(&mut probe).await;
    controller.check(&world.dir)?;
    ready.context("the controller did not become ready")?;

    // Tokens are made before anything starts: a start is timed from the client's.
    let server = RefCell::new(Some(sidecar(world, sidecars, server, "server", &SERVER.to_string())?));
    let client = RefCell::new(Some(sidecar(world, sidecars, client, "client", &CLIENT.to_string())?));
    let mut running = world.pair(|side, _| {
        let command = if side == "client" { &client } else { &server };
        Ok((command.take().context("one sidecar a side")?, format!("weft-{side}")))
    })?;
    running.others.push(controller);
    Ok(running)
}

/// Gives everybody a thousand route rules, none of which was there before, while the pair is at work. What has the path
/// `changed_path` is redirected from then on.
pub(crate) fn change_rules(world: &World, generation: u32) -> Result<()> {
    let source = world.dir.join("weft/source");
    // Whole or not at all: the controller reads a folder that is being written to.
    let new = world.dir.join("changing.yaml");
    fs::write(&new, objects::route_rules("changing", &format!("/changed-{generation}"), CHANGED))?;
    Ok(fs::rename(new, source.join("changing.yaml"))?)
}

const CHANGED: usize = 1_000;

/// What tells that a change is live.
pub(crate) fn changed_path(generation: u32) -> String {
    format!("/changed-{generation}/moved")
}

fn sidecar(
    world: &World,
    sidecars: &Sidecars,
    namespace: &Namespace,
    name: &str,
    ip: &str,
) -> Result<Command> {
    let (uid, dir) = (uid(name), world.dir.join("weft"));
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
        let file = world.dir.join(callgrind_file(&format!("weft-{name}")));
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
    Ok(command)
}

/// Of the pod of this name.
pub(crate) fn uid(name: &str) -> String {
    format!("bench-{name}-uid")
}
