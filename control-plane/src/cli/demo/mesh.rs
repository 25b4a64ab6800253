//! A whole mesh on one machine: controller, sidecars and apps in network namespaces, real binaries, real rules.
//!
//! Why it ships: `weft demo` stands on it, and so do the tests and the benchmark, so what a newcomer watches is
//! what the tests prove. A workload here is what it is in Kubernetes: a pod (namespace, uid, service account),
//! capture rules applied by `weft-iptables`, a `weft-proxy` under the proxy's own user, and an app.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use weft_core::ports;

use super::netns::{Pod, Process, World};

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Binaries {
    dir: PathBuf,
    /// A copy, where the proxy's user cannot reach the folder.
    proxy: Option<PathBuf>,
}

/// A running mesh. Everything of it is gone when it is dropped.
pub struct Mesh {
    // Dropped in this order: processes before the namespaces that they run in.
    controller: Option<Process>,
    /// The controller's own pod.
    pub controller_pod: Pod,
    /// The pods' network.
    pub world: World,
    binaries: Binaries,
    dir: PathBuf,
    options: Options,
}

/// What a mesh may be made with; `Default` is what a user gets.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// More arguments of `weft-controller`.
    pub controller_args: Vec<String>,
    /// More environment of every sidecar.
    pub sidecar_env: BTreeMap<String, String>,
    /// What controller and sidecars are started under, as root (`strace -D …`); it must become the program.
    pub under: Vec<String>,
}

impl Options {
    /// The defaults, but for variables of every sidecar.
    pub fn with_env(env: &[(&str, &str)]) -> Self {
        let env = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        Self { sidecar_env: env.collect(), ..Self::default() }
    }

    /// The same with more arguments of the controller.
    #[must_use]
    pub fn controller(mut self, args: &[&str]) -> Self {
        self.controller_args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }
}

/// What a workload is.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The pod's name; also its service account unless that is given.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Address of a pod that is gone, to be used again.
    pub ip: Option<Ipv4Addr>,
    /// More arguments of `weft-iptables`.
    pub capture_args: Vec<String>,
    /// More environment of the sidecar.
    pub env: BTreeMap<String, String>,
    /// What this sidecar is started under, as root, beside what all are: with other limits, in a control group, with
    /// another standard output. It must become the program.
    pub under: Vec<String>,
    /// What the kubelet would ask of its one container: `livenessProbe` and so on.
    pub probes: serde_json::Value,
    /// The node that it is said to be on.
    pub node: Option<String>,
}

/// A pod with a sidecar.
pub struct Meshed {
    /// The sidecar.
    pub proxy: Process,
    /// The namespace.
    pub pod: Pod,
    /// What it is.
    pub workload: Workload,
    /// The pod's uid.
    pub uid: String,
    /// The sidecar's log.
    pub log: PathBuf,
    dir: PathBuf,
    proxy_binary: PathBuf,
}

impl Binaries {
    /// The programs beside this one, as `cargo build` and the image lay them out.
    pub fn beside_this() -> Result<Self> {
        let this = std::env::current_exe().context("where is this program?")?;
        let mut dir = this.parent().context("this program has no folder")?;
        if dir.ends_with("deps") {
            dir = dir.parent().context("this program has no folder")?;
        }
        Self::in_dir(dir)
    }

    /// The programs in a folder.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        for name in ["weft-proxy", "weft-controller", "weft-iptables"] {
            ensure!(
                dir.join(name).exists(),
                "{} is missing: build it with `cargo build --workspace`",
                dir.join(name).display()
            );
        }
        Ok(Self { dir: dir.to_owned(), proxy: None })
    }

    /// One of them.
    pub fn path(&self, name: &str) -> PathBuf {
        match (&self.proxy, name) {
            (Some(proxy), "weft-proxy") => proxy.clone(),
            _ => self.dir.join(name),
        }
    }

    /// Sidecars run as another user, who may not look into the folder (somebody's home) that the programs were
    /// built in: then that user gets a copy.
    fn for_the_proxys_user(mut self, dir: &Path) -> Result<Self> {
        let proxy = self.dir.join("weft-proxy");
        let open = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0);
        let real = fs::canonicalize(&proxy).with_context(|| format!("looking at {}", proxy.display()))?;
        if !real.ancestors().all(open) {
            let copy = dir.join("weft-proxy");
            fs::copy(&real, &copy).with_context(|| format!("copying {}", proxy.display()))?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
            self.proxy = Some(copy);
        }
        Ok(self)
    }
}

impl Workload {
    /// A workload of one name, in one namespace, labelled `app: <name without a trailing -N>`.
    pub fn new(namespace: &str, name: &str) -> Self {
        let app = match name.rsplit_once('-') {
            Some((app, n)) if n.bytes().all(|b| b.is_ascii_digit()) => app,
            _ => name,
        };
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            service_account: app.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
            ip: None,
            capture_args: Vec::new(),
            env: BTreeMap::new(),
            under: Vec::new(),
            probes: serde_json::Value::Null,
            node: None,
        }
    }

    /// With another label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }
}

impl Mesh {
    /// Makes the network and starts the controller on an empty folder.
    pub fn start(tag: &str, binaries: Binaries, options: Options) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("weft-{tag}-{}-{}", std::process::id(), next()));
        let keep = std::env::var_os("WEFT_KEEP").is_some();
        let world = World::with_folder(tag, (!keep).then_some(dir.as_path()))?;
        for sub in ["mesh", "state", "run", "log"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("making {}", dir.display()))?;
        }
        // Sidecars run as another user and must reach their own folders below.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let binaries = binaries.for_the_proxys_user(&dir)?;
        let controller_pod = world.pod("controller")?;
        let mut mesh = Self { controller: None, controller_pod, world, binaries, dir, options };
        mesh.write(
            "mesh-config.yaml",
            "apiVersion: weft.dev/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: mesh\nspec:\n  \
             meshRanges: [10.77.0.0/16, \"fd00:77::/64\", 10.96.0.0/16]\n",
        )?;
        mesh.start_controller()?;
        Ok(mesh)
    }

    /// The folder of YAML that the controller watches.
    pub fn source(&self) -> PathBuf {
        self.dir.join("mesh")
    }

    /// Where everything of this mesh lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The programs.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// Writes one file of the folder, whole or not at all.
    pub fn write(&self, file: &str, yaml: &str) -> Result<()> {
        let path = self.source().join(file);
        let temporary = self.dir.join(format!("{file}.tmp"));
        fs::write(&temporary, yaml)
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Removes one file of the folder.
    pub fn remove_file(&self, file: &str) -> Result<()> {
        let path = self.source().join(file);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// Starts the controller, and waits until it is ready.
    pub fn start_controller(&mut self) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log("controller"))?;
        let binary = self.binaries.path("weft-controller");
        let mut command = self.controller_pod.command_under(&self.options.under, None, binary);
        command
            .args(["--source", "dir"])
            .arg(self.source())
            .arg("--state-dir")
            .arg(self.dir.join("state"))
            .args(["--listen", "0.0.0.0"])
            .args(&self.options.controller_args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut controller = Process::spawn(&mut command)?;
        let api = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::API));
        let ready = wait(Duration::from_secs(20), || {
            controller.running().then_some(()).context("it ended")?;
            Ok(self.controller_pod.enter(|| get(api, "/ready"))?.is_ok_and(|(status, _)| status == 200))
        });
        ready.with_context(|| {
            format!("the controller did not become ready:\n{}", tail(&self.log("controller")))
        })?;
        self.controller = Some(controller);
        Ok(())
    }

    /// Kills the controller as a crash would.
    pub fn kill_controller(&mut self) -> Result<()> {
        if let Some(mut controller) = self.controller.take() {
            controller.signal(Signal::SIGKILL)?;
            controller.wait(Duration::from_secs(5))?;
        }
        Ok(())
    }

    /// The controller's process.
    pub fn controller(&mut self) -> Option<&mut Process> {
        self.controller.as_mut()
    }

    /// Asks the controller's API.
    pub fn api(&self, path: &str) -> Result<serde_json::Value> {
        self.ask("GET", path)
    }

    /// Tells the controller's API to do something.
    pub fn post(&self, path: &str) -> Result<serde_json::Value> {
        self.ask("POST", path)
    }

    fn ask(&self, method: &str, path: &str) -> Result<serde_json::Value> {
        let api = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::API));
        let (status, body) = self.controller_pod.enter(|| request(api, method, path))??;
        ensure!((200..300).contains(&status), "{path}: {status} {body}");
        serde_json::from_str(&body).with_context(|| format!("{path}: {body}"))
    }

    /// Runs `weft` against this mesh's controller.
    pub fn weft(&self, args: &[&str]) -> Command {
        let mut command = self.controller_pod.command(self.binaries.path("weft"));
        command.args(args);
        command
    }

    /// A pod with a sidecar, captured and ready; the app is the caller's to start.
    pub fn workload(&self, workload: Workload) -> Result<Meshed> {
        let mut meshed = self.begin(workload)?;
        meshed.ready(Duration::from_secs(20))?;
        Ok(meshed)
    }

    /// The same, of which the sidecar is started and may not be ready yet, or never. The pod is in the folder, ready
    /// from the beginning.
    pub fn begin(&self, workload: Workload) -> Result<Meshed> {
        let pod = match workload.ip {
            None => self.world.pod(&workload.name)?,
            Some(ip) => self.world.pod_at(&workload.name, ip, v6_of(ip))?,
        };
        let uid = format!("{}-{}-{:x}", workload.name, std::process::id(), next());
        let dir = self.dir.join("run").join(&uid);
        fs::create_dir_all(&dir)?;
        self.write(&pod_file(&workload.name), &pod_yaml(&workload, &uid, &pod, true, self.world.has_ipv6()))?;
        let token = self.token(&workload, &uid)?;
        fs::write(dir.join("token"), token)?;
        for path in [&dir, &dir.join("token")] {
            std::os::unix::fs::chown(path, Some(ports::PROXY_UID), Some(ports::PROXY_UID))?;
        }
        let mut capture = pod.command(self.binaries.path("weft-iptables"));
        capture.args(&workload.capture_args);
        run(&mut capture).context("applying the capture rules")?;
        let log = self.log(&workload.name);
        let proxy_binary = self.binaries.path("weft-proxy");
        let proxy = self.start_proxy(&pod, &workload, &uid, &dir, &log)?;
        Ok(Meshed { proxy, pod, workload, uid, log, dir, proxy_binary })
    }

    /// Starts a sidecar again in its pod, as a restarted container would be.
    pub fn restart_proxy(&self, meshed: &mut Meshed) -> Result<()> {
        meshed.proxy =
            self.start_proxy(&meshed.pod, &meshed.workload, &meshed.uid, &meshed.dir, &meshed.log)?;
        meshed.ready(Duration::from_secs(20))
    }

    /// A pod without a sidecar, known to the mesh.
    pub fn plain(&self, workload: &Workload) -> Result<Pod> {
        let pod = self.world.pod(&workload.name)?;
        let uid = format!("{}-{}-{:x}", workload.name, std::process::id(), next());
        self.write(&pod_file(&workload.name), &pod_yaml(workload, &uid, &pod, false, self.world.has_ipv6()))?;
        Ok(pod)
    }

    /// Takes a pod out of the folder, as when it is deleted: its endpoints go.
    pub fn forget(&self, name: &str) -> Result<()> {
        self.remove_file(&pod_file(name))
    }

    /// Says whether a pod is ready or terminating, as the kubelet would.
    pub fn set_state(&self, meshed: &Meshed, ready: bool, terminating: bool) -> Result<()> {
        let v6 = self.world.has_ipv6();
        let yaml = pod_yaml_in(&meshed.workload, &meshed.uid, &meshed.pod, true, v6, ready, terminating);
        self.write(&pod_file(&meshed.workload.name), &yaml)
    }

    /// The log of the controller or of one sidecar.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    fn token(&self, workload: &Workload, uid: &str) -> Result<String> {
        let mut command = Command::new(self.binaries.path("weft"));
        command
            .arg("token")
            .arg("--state-dir")
            .arg(self.dir.join("state"))
            .args(["--namespace", &workload.namespace, "--service-account", &workload.service_account])
            .args(["--uid", uid, "--pod", &workload.name, "--valid-for", "720h"]);
        run(&mut command).context("making a join token")
    }

    fn start_proxy(
        &self,
        pod: &Pod,
        workload: &Workload,
        uid: &str,
        dir: &Path,
        log: &Path,
    ) -> Result<Process> {
        let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
        let controller = self.controller_pod.ip;
        let mut ips = pod.ip.to_string();
        if self.world.has_ipv6() {
            ips.push_str(&format!(",{}", pod.ip6));
        }
        let user = Some((ports::PROXY_UID, ports::PROXY_UID));
        let under = [&self.options.under[..], &workload.under].concat();
        let mut command = pod.command_under(&under, user, self.binaries.path("weft-proxy"));
        command
            .env_clear()
            .env("WEFT_NAMESPACE", &workload.namespace)
            .env("WEFT_SERVICE_ACCOUNT", &workload.service_account)
            .env("WEFT_POD_NAME", &workload.name)
            .env("WEFT_POD_UID", uid)
            .env("WEFT_POD_IPS", ips)
            .env("WEFT_TRUST_ANCHORS", self.dir.join("state/trust-anchors.pem"))
            .env("WEFT_TOKEN_FILE", dir.join("token"))
            .env("WEFT_CONTROLLER", format!("{controller}:{}", ports::DISCOVERY))
            .env("WEFT_CONTROLLER_IDENTITY", format!("{controller}:{}", ports::IDENTITY))
            .env("WEFT_ADMIN_SOCKET", dir.join("admin.sock"))
            .env("WEFT_REPORT_INTERVAL", "1s")
            .envs(&self.options.sidecar_env)
            .envs(&workload.env)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Process::spawn(&mut command)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.controller = None;
        for pod in self.world.pods() {
            self.world.remove(&pod);
        }
        if std::env::var_os("WEFT_KEEP").is_none() {
            // What cannot be removed lies in the temporary folder, which is what that is for.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

impl Meshed {
    /// Waits until the sidecar has a certificate and its first policy.
    pub fn ready(&mut self, patience: Duration) -> Result<()> {
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::ADMIN));
        let (proxy, pod) = (&mut self.proxy, &self.pod);
        let ready = wait(patience, || {
            proxy.running().then_some(()).context("it ended")?;
            Ok(pod.enter(|| get(admin, "/ready"))?.is_ok_and(|(status, _)| status == 200))
        });
        ready.with_context(|| {
            format!("sidecar {} did not become ready:\n{}", self.workload.name, tail(&self.log))
        })
    }

    /// The sidecar's metrics.
    pub fn metrics(&self) -> Result<String> {
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::ADMIN));
        let (status, body) = self.pod.enter(|| get(admin, "/metrics"))??;
        ensure!(status == 200, "metrics: {status}");
        Ok(body)
    }

    /// The sum of a metric's series whose labels contain all of `having`.
    pub fn metric(&self, name: &str, having: &[&str]) -> Result<f64> {
        let metrics = self.metrics()?;
        let series = metrics.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                && having.iter().all(|label| line.contains(label))
        });
        Ok(series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// A command of the app: as root, captured like any app's connections.
    pub fn app(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.pod.command(program)
    }

    /// What the pod's preStop hook runs. Returns when nothing is in flight any more.
    pub fn drain(&self) -> Result<()> {
        run(&mut self.draining()).map(drop)
    }

    /// The same, to be run beside something else.
    pub fn draining(&self) -> Command {
        let mut command = self.pod.command_as(ports::PROXY_UID, ports::PROXY_UID, &self.proxy_binary);
        command.arg("drain").arg("--socket").arg(self.dir.join("admin.sock"));
        command
    }

    /// Asks the sidecar's admin socket.
    pub fn admin(&self, method: &str, path: &str) -> Result<(u16, String)> {
        let socket = std::os::unix::net::UnixStream::connect(self.dir.join("admin.sock"))?;
        exchange(socket, method, path)
    }
}

/// An HTTP/1.1 GET on a fresh connection.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    request(address, "GET", path)
}

fn request(address: SocketAddr, method: &str, path: &str) -> Result<(u16, String)> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    exchange(stream, method, path)
}

fn exchange(
    mut stream: impl std::io::Read + std::io::Write,
    method: &str,
    path: &str,
) -> Result<(u16, String)> {
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: weft\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("no whole answer")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no status line")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(body) } else { body.to_owned() }))
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else { break };
        let Some(chunk) = rest.get(..size) else { break };
        whole.push_str(chunk);
        body = rest.get(size + 2..).unwrap_or_default();
    }
    whole
}

/// From now on whatever waits gives up: the user wants to leave.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Whether the user wants to leave.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Asks until the answer is yes.
pub fn wait(patience: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !ask()? {
        ensure!(!interrupted(), "interrupted");
        ensure!(Instant::now() < deadline, "not within {patience:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Runs a command to its end and returns what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    if !output.status.success() {
        bail!("{command:?}: {}\n{text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}

/// The last lines of a log.
pub fn tail(path: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = fs::File::open(path) {
        // A log that cannot be read has nothing to show.
        let _ = file.read_to_string(&mut text);
    }
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn pod_file(name: &str) -> String {
    format!("pod-{name}.yaml")
}

fn pod_yaml(workload: &Workload, uid: &str, pod: &Pod, injected: bool, v6: bool) -> String {
    pod_yaml_in(workload, uid, pod, injected, v6, true, false)
}

/// The Pod as the API server would show it.
fn pod_yaml_in(
    workload: &Workload,
    uid: &str,
    pod: &Pod,
    injected: bool,
    v6: bool,
    ready: bool,
    terminating: bool,
) -> String {
    let mut ips = vec![serde_json::json!({ "ip": pod.ip.to_string() })];
    if v6 {
        ips.push(serde_json::json!({ "ip": pod.ip6.to_string() }));
    }
    let mut object = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": workload.namespace,
            "name": workload.name,
            "uid": uid,
            "labels": workload.labels,
            "annotations": { "weft.dev/injected": injected.to_string() },
        },
        "spec": { "serviceAccountName": workload.service_account, "containers": [{ "name": "app" }] },
        "status": {
            "phase": "Running",
            "podIP": pod.ip.to_string(),
            "podIPs": ips,
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
        },
    });
    if let Some(node) = &workload.node {
        object["spec"]["nodeName"] = node.as_str().into();
    }
    if let Some(probes) = workload.probes.as_object() {
        for (name, probe) in probes {
            object["spec"]["containers"][0][name] = probe.clone();
        }
    }
    if terminating {
        object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    format!("{object:#}\n")
}

fn v6_of(ip: Ipv4Addr) -> std::net::Ipv6Addr {
    let [_, _, a, b] = ip.octets();
    std::net::Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, u16::from_be_bytes([a, b]))
}

fn next() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
