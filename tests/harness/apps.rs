//! Apps in pods: the test server and client (`weft-testapp`), and the real programs that tests run.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use weft_control_plane::cli::demo::{
    mesh::{self, Binaries, Mesh, Meshed, Options, Workload},
    netns::{self, Pod, Process},
};

/// What `weft-testapp load` saw.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Summary {
    #[serde(default)]
    pub done: bool,
    pub sent: u64,
    pub ok: u64,
    pub failed: u64,
    pub statuses: BTreeMap<String, u64>,
    pub served_by: BTreeMap<String, u64>,
    pub reasons: BTreeMap<String, u64>,
    pub errors: BTreeMap<String, u64>,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
    /// Took 900 ms or more.
    pub slow: u64,
    pub streams: Streams,
}

/// What became of the gRPC streams of `weft-testapp load`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Streams {
    /// Whole, with their status.
    pub ended: u64,
    pub failed: u64,
    pub messages: u64,
    pub longest_s: f64,
    pub errors: BTreeMap<String, u64>,
}

/// A meshed pod with its app.
pub struct Served {
    // The app goes before the pod.
    pub app: Process,
    pub sidecar: Meshed,
}

impl Served {
    /// Kills the app and keeps the pod. Returns when its sidecar has let go of all connections to it: before that a
    /// request may go into one of them that looks alive, and nobody can tell whether it arrived.
    pub fn kill_app(self) -> Result<Meshed> {
        drop(self.app);
        let connected = || -> Result<bool> {
            let tables = self.sidecar.pod.enter(|| {
                ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")))
            })?;
            // Fields: number, local address, remote address, state; 06 is TIME_WAIT, which belongs to nobody.
            Ok(tables.into_iter().collect::<Result<Vec<_>, _>>()?.iter().flat_map(|table| table.lines()).any(
                |line| {
                    let mut fields = line.split_whitespace().skip(2);
                    fields.next().is_some_and(|remote| remote.ends_with(":1F90"))
                        && fields.next() != Some("06")
                },
            ))
        };
        mesh::wait(Duration::from_secs(10), || connected().map(|connected| !connected))
            .context("the sidecar keeps connections to an app that has ended")?;
        Ok(self.sidecar)
    }
}

/// A mesh for a test, or `None` where there can be none: the reason is printed past the runner's capture.
pub fn mesh_or_skip(test: &str) -> Option<Mesh> {
    mesh_with(test, Options::default())
}

/// The same with options. `WEFT_PROGRAMS` names the folder of other programs than those that were built with the tests.
pub fn mesh_with(test: &str, options: Options) -> Option<Mesh> {
    if let Err(reason) = netns::usable() {
        skip(test, &reason.to_string());
        return None;
    }
    let binaries = match std::env::var_os("WEFT_PROGRAMS") {
        Some(folder) => Binaries::in_dir(folder.as_ref()),
        None => Binaries::beside_this(),
    };
    let binaries = binaries.expect("the binaries are built before the tests");
    Some(Mesh::start("test", binaries, options).expect("a mesh"))
}

/// Says that a test was skipped, and why, past the runner's capture.
pub fn skip(test: &str, reason: &str) {
    use std::io::Write as _;
    // A closed stderr has no reader to miss it.
    let _ = writeln!(std::io::stderr(), "{test}: SKIPPED: {reason}");
}

/// The Python of `tests/requirements.txt`, if it was installed.
pub fn python() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let python = root.join("target/venv/bin/python");
    python.exists().then_some(python)
}

/// A script of `tests/mesh/py`.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mesh/py").join(name)
}

/// `weft-testapp` with arguments, in a pod.
pub fn testapp(mesh: &Mesh, pod: &Pod, args: &[&str]) -> Command {
    let mut command = pod.command(mesh.binaries().path("weft-testapp"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Starts an app in a pod and waits until its port answers.
pub fn start(command: &mut Command, pod: &Pod, port: u16) -> Result<Process> {
    let mut app = Process::spawn(command.stdout(Stdio::null()))?;
    let up = mesh::wait(Duration::from_secs(20), || {
        app.running().then_some(()).context("it ended")?;
        // From the app's own pod: no rule captures it there.
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        pod.enter(|| std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
    });
    up.with_context(|| format!("the app on port {port} of {} did not start", pod.name))?;
    Ok(app)
}

/// A pod with a sidecar and the test server on port 8080.
pub fn serve(mesh: &Mesh, workload: Workload, args: &[&str]) -> Result<Served> {
    serve_in(mesh, mesh.workload(workload)?, args)
}

/// The test server on port 8080 of a pod that has its sidecar.
pub fn serve_in(mesh: &Mesh, sidecar: Meshed, args: &[&str]) -> Result<Served> {
    let name = sidecar.workload.name.clone();
    let mut all = vec!["http", "--port", "8080", "--name", &name];
    all.extend_from_slice(args);
    let app = start(&mut testapp(mesh, &sidecar.pod, &all), &sidecar.pod, 8080)?;
    Ok(Served { app, sidecar })
}

/// A Service whose pods are labelled `app: <name>`; ports are (name, port, target port).
pub fn service(
    mesh: &Mesh,
    namespace: &str,
    name: &str,
    vip: &str,
    ports: &[(&str, u16, u16)],
) -> Result<()> {
    let ports: Vec<_> = ports
        .iter()
        .map(|(name, port, target)| serde_json::json!({"name": name, "port": port, "targetPort": target}))
        .collect();
    let object = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"clusterIP": vip, "clusterIPs": [vip], "selector": {"app": name}, "ports": ports},
    });
    let version = || -> Result<Option<String>> {
        let status = mesh.api("/api/v1/status")?;
        let objects = status["objects"].as_array().cloned().unwrap_or_default();
        let this = |o: &&serde_json::Value| {
            o["kind"] == "Service" && o["namespace"] == namespace && o["name"] == name
        };
        Ok(objects.iter().find(this).map(|o| o["version"].to_string()))
    };
    let before = version()?;
    mesh.write(&format!("service-{name}.yaml"), &format!("{object:#}\n"))?;
    // A client that connects before the controller has read it is told that there is no such address.
    mesh::wait(Duration::from_secs(10), || Ok(version()? != before)).context("the service was not taken")
}

/// Runs a command to its end; its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    mesh::run(command)
}

/// `curl` in a pod: body on success. `-sS` and a bound on time are given.
pub fn curl(pod: &Pod, args: &[&str]) -> Result<String> {
    let mut command = pod.command("curl");
    command.args(["-sS", "--max-time", "20"]).args(args);
    output(&mut command)
}

/// `weft-testapp load`, to its end.
pub fn load(mesh: &Mesh, pod: &Pod, args: &[&str]) -> Result<Summary> {
    let mut all = vec!["load"];
    all.extend_from_slice(args);
    let text = output(&mut testapp(mesh, pod, &all))?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

/// A load that runs beside the test.
pub struct Loading {
    process: Process,
    stop: PathBuf,
}

/// Starts `weft-testapp load`; it ends by itself or by [`Loading::finish`].
pub fn start_load(mesh: &Mesh, pod: &Pod, args: &[&str]) -> Result<Loading> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let stop = mesh.dir().join(format!("stop-{n}"));
    let mut all = vec!["load", "--until", stop.to_str().context("a path")?];
    all.extend_from_slice(args);
    let mut command = testapp(mesh, pod, &all);
    command.stdout(Stdio::piped());
    Ok(Loading { process: Process::spawn(&mut command)?, stop })
}

impl Loading {
    /// Ends it and says what it saw.
    pub fn finish(mut self) -> Result<Summary> {
        std::fs::write(&self.stop, "")?;
        self.collect()
    }

    /// Waits for its own end.
    pub fn collect(&mut self) -> Result<Summary> {
        use std::io::Read as _;
        let mut text = String::new();
        self.process.child().stdout.take().context("its output")?.read_to_string(&mut text)?;
        ensure!(
            self.process.wait(Duration::from_secs(60))?.is_some_and(|status| status.success()),
            "load failed"
        );
        serde_json::from_str(&text).with_context(|| text.clone())
    }
}

/// Many connections that `weft-testapp hold` keeps; they end with this.
pub struct Holding {
    process: Process,
    status: PathBuf,
}

/// Where they stand.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Held {
    /// Were accepted (by the kernel, which is before a sidecar looks at them).
    pub opened: u64,
    /// Were refused, or not accepted in 10 s.
    pub failed: u64,
    /// Of those opened, so many were ended by the other side.
    pub ended: u64,
    /// So many were answered something.
    pub answered: u64,
}

/// Starts `weft-testapp hold`.
pub fn hold(mesh: &Mesh, pod: &Pod, address: &str, count: u64, args: &[&str]) -> Result<Holding> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let status = mesh.dir().join(format!("hold-{n}"));
    let (count, path) = (count.to_string(), status.to_str().context("a path")?.to_owned());
    let mut all = vec!["hold", "--address", address, "--count", &count, "--status", &path];
    all.extend_from_slice(args);
    Ok(Holding { process: Process::spawn(&mut testapp(mesh, pod, &all))?, status })
}

impl Holding {
    /// Where they stand now.
    pub fn now(&mut self) -> Result<Held> {
        ensure!(self.process.running(), "weft-testapp hold has ended");
        match std::fs::read_to_string(&self.status) {
            Ok(text) => Ok(serde_json::from_str(&text)?),
            Err(_) => Ok(Held::default()),
        }
    }

    /// Waits until each of `count` was accepted or refused.
    pub fn tried(&mut self, count: u64, patience: Duration) -> Result<Held> {
        mesh::wait(patience, || self.now().map(|held| held.opened + held.failed >= count))?;
        self.now()
    }
}

/// Resident memory of a process in KiB.
pub fn rss_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    line.split_whitespace().nth(1).context("a number")?.parse().context("a number")
}
