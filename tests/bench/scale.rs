//! `weft-bench scale`: one controller and ten thousand sidecars on one machine.
//!
//! The controller is the real program, started as a container runtime would start it. The sidecars are one process
//! beside it (`scale/fleet.rs` says what of them is real), in a network namespace of their own in which each has its
//! own address. What both cost is told apart; they share the machine's cores, so that what is said of times holds for
//! a machine that is twice as busy as a controller's would be.
//!
//! What a change takes is measured from before the source's objects are written to when a sidecar has accepted it, so
//! it contains the source: a folder is looked at 50 ms after the last write to it.

mod api;
mod fleet;
mod mesh;
mod report;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::{
    Histogram,
    serialization::{Serializer as _, V2Serializer},
};
use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};
use prost::Message as _;
use rustls::{
    ClientConfig, RootCertStore,
    client::{Resumption, WebPkiServerVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use tokio::{
    task::{JoinSet, LocalSet},
    time::{Instant, sleep, sleep_until},
};
use weft_control_plane::ca::{Ca, Files, Place, Roots, Subject};
use weft_core::{
    identity::{PodUid, TrustDomain},
    ports,
};
use weft_proto::pb::v1 as pb;

use self::{
    api::Api,
    fleet::{Fleet, Plan, REPORT_EVERY},
    mesh::{Mesh, OF_ALL, PODS, PODS_OF_ALL, PORT},
    report::Report,
};
use crate::{
    net::{Group, Namespace, Process, check},
    sample::Cpu,
};

/// Measures the controller with thousands of simulated sidecars (needs root).
#[derive(clap::Args)]
pub(crate) struct Scale {
    /// Simulated sidecars.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    sidecars: u32,
    /// Services of the mesh, each of ten pods; at least a tenth of the sidecars.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(30..=20_000))]
    services: u32,
    /// Destinations that each sidecar is subscribed to.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=30))]
    destinations: u32,
    /// Destinations that it has traffic to, and reports.
    #[arg(long, default_value_t = 4)]
    active: u32,
    /// Where the controller reads objects: a folder, or a stand-in for the API server (`scale/api.rs`).
    #[arg(long, value_enum, default_value_t = Source::Dir)]
    source: Source,
    /// A thousand sidecars and short scenarios: a look in a minute.
    #[arg(long)]
    quick: bool,
    /// Scenarios to run after the connect storm, in this order.
    #[arg(long, value_delimiter = ',', default_values = ["steady", "change", "changes", "rolling", "resize", "restart"])]
    scenarios: Vec<Scenario>,
    /// The controller to measure [default: weft-controller beside this program].
    #[arg(long)]
    controller: Option<PathBuf>,
    /// Inside the namespace already.
    #[arg(long, hide = true)]
    pub(crate) inside: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Source {
    Dir,
    Kubernetes,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Scenario {
    Steady,
    Change,
    Changes,
    Rolling,
    Resize,
    Restart,
}

impl Scale {
    fn sidecars(&self) -> usize {
        if self.quick { self.sidecars.min(1_000) as usize } else { self.sidecars as usize }
    }

    /// Makes a network namespace and runs this program in it.
    pub(crate) async fn run(&self, out: &Path) -> Result<bool> {
        let namespace = Namespace::new(format!("weft-bench-{}-scale", std::process::id()))?;
        let name = namespace.name();
        let ip = |arguments: &str| check(Command::new("ip").args(arguments.split(' ')));
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {name} route add local {} dev lo", mesh::POD_RANGE))?;
        let mut command = namespace.command(std::env::current_exe()?, Group::App);
        command.arg("--out").arg(out).arg("scale").arg("--inside");
        command.args(std::env::args_os().skip_while(|argument| argument != "scale").skip(1));
        let mut inside = tokio::process::Command::from(command);
        let status = inside.kill_on_drop(true).status().await.context("cannot start inside the namespace")?;
        match status.code() {
            Some(0) => Ok(true),
            Some(3) => Ok(false),
            Some(_) | None => bail!("the run inside the namespace failed ({status})"),
        }
    }

    /// What runs in the namespace. Whether all bounds hold.
    pub(crate) fn inside(&self, out: &Path) -> Result<bool> {
        // Each side has one of each connection.
        let most = self.sidecars() as u64 + 1_024;
        setrlimit(Resource::RLIMIT_NOFILE, most, most).context("RLIMIT_NOFILE")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let report = LocalSet::new().block_on(&runtime, Bench::run(self, out))?;
        let text = report.text();
        let json = out.join("scale.json");
        fs::write(&json, serde_json::to_vec_pretty(&report)?)?;
        fs::write(out.join("scale.txt"), &text)?;
        print!("{text}");
        println!("\n{}", json.display());
        Ok(report.holds())
    }
}

/// A run.
struct Bench<'a> {
    scale: &'a Scale,
    dir: PathBuf,
    mesh: Mesh,
    fleet: Rc<Fleet>,
    controller: Process,
    report: Report,
    /// Who uses a service.
    users: Vec<usize>,
}

/// CPU time of both sides, and when.
struct Began {
    at: Instant,
    controller: Cpu,
    fleet: Duration,
}

impl<'a> Bench<'a> {
    async fn run(scale: &'a Scale, out: &Path) -> Result<Report> {
        let dir = out.join("scale");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(dir.join("state"))?;
        let (size, services) = (scale.sidecars(), scale.services as usize);
        if services * PODS < size {
            bail!("{size} sidecars need {} services", size.div_ceil(PODS));
        }
        if cfg!(debug_assertions) {
            eprintln!("a debug build: its figures mean nothing");
        }
        let mut report = Report {
            sidecars: size,
            services,
            destinations: scale.destinations as usize,
            active: scale.active as usize,
            source: match scale.source {
                Source::Dir => "a folder".to_owned(),
                Source::Kubernetes => "Kubernetes (a stand-in for the API server)".to_owned(),
            },
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            ..Report::default()
        };
        eprintln!("{services} services");
        let domain = TrustDomain::new("cluster.local")?;
        let roots = Roots::open_in(Place::Memory(Files::default()), &domain)?;
        let place = match scale.source {
            Source::Dir => mesh::Place::Folder(dir.join("mesh")),
            Source::Kubernetes => mesh::Place::Kubernetes(kubernetes(&dir, &roots).await?),
        };
        let ca = Ca::with_roots(roots, domain.clone(), LIFETIME);
        let mesh = Mesh::new(place, services)?;
        let began = Instant::now();
        let mut controller = start(scale, &dir, 0)?;
        ready(&mut controller, &dir).await?;
        let name = "controller started";
        report.add(name, "ready after", began.elapsed().as_secs_f64(), " s", None);
        report.add(name, "RSS", mebibytes(controller.id(), "VmRSS:")?, " MiB", None);

        eprintln!("{size} certificates");
        let controller_at = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::DISCOVERY));
        let fleet = Fleet::new(controller_at, size);
        let ca = match scale.source {
            Source::Dir => Ca::open(&dir.join("state"), domain, LIFETIME)?,
            Source::Kubernetes => ca,
        };
        let plans = plans(scale, &ca, &mesh)?;
        let mut users = vec![0; services];
        for plan in &plans {
            for destination in &plan.destinations {
                let service = (0..services).find(|service| destination.ip() == mesh::vip(*service));
                if let Some(users) = service.and_then(|service| users.get_mut(service)) {
                    *users += 1;
                }
            }
        }
        let mut bench = Bench { scale, dir, mesh, fleet, controller, report, users };
        let mut sidecars = JoinSet::new();
        bench.connect(plans, &mut sidecars).await?;
        for scenario in &scale.scenarios {
            match scenario {
                Scenario::Steady => bench.steady().await?,
                Scenario::Change => bench.change().await?,
                Scenario::Changes => bench.changes().await?,
                Scenario::Rolling => bench.rolling().await?,
                Scenario::Resize => bench.resize().await?,
                Scenario::Restart => bench.restart().await?,
            }
            bench.controller.check(&bench.dir)?;
        }
        bench.notes();
        Ok(bench.report)
    }

    /// Everybody at once.
    async fn connect(&mut self, plans: Vec<Plan>, sidecars: &mut JoinSet<()>) -> Result<()> {
        let name = "all connect at once";
        eprintln!("{name}");
        let size = plans.len();
        let began = self.begin()?;
        for plan in plans {
            sidecars.spawn_local(fleet::sidecar(self.fleet.clone(), plan));
        }
        let fleet = self.fleet.clone();
        self.until("have all answers", PATIENCE, || fleet.whole.get(), size).await?;
        let times = self.fleet.first_whole.borrow().iter().map(|at| *at - began.at).collect();
        self.report.times(name, times, None);
        self.cpu_seconds(name, &began)?;
        self.report.add(name, "connections tried", self.fleet.tries.get() as f64, "", None);
        // One report of each sidecar later, everything is in use that will be.
        self.rest(REPORT_EVERY.mul_f64(if self.scale.quick { 0.5 } else { 1.2 })).await;
        self.rss(name)
    }

    /// Nothing but telemetry.
    async fn steady(&mut self) -> Result<()> {
        let name = "nothing changes";
        eprintln!("{name}");
        let began = self.begin()?;
        let reports = self.fleet.taken.get();
        self.rest(Duration::from_secs(if self.scale.quick { 5 } else { 20 })).await;
        let reports = self.fleet.taken.get() - reports;
        self.report.add(name, "reports", reports as f64 / began.at.elapsed().as_secs_f64(), "/s", None);
        self.cpu_share(name, &began, None)?;
        self.rss(name)
    }

    /// One endpoint of the service that everybody uses, several times.
    async fn change(&mut self) -> Result<()> {
        let name = "one endpoint changes, for all";
        eprintln!("{name}");
        let rounds = if self.scale.quick { 3 } else { 6 };
        let began = self.begin()?;
        let mut times = Vec::new();
        for round in 0..rounds {
            // Not in step with anything that has a second for its period.
            self.rest(Duration::from_millis(1_700 + 130 * round)).await;
            times.extend(self.flip(OF_ALL, PODS).await?);
        }
        self.rest(Duration::from_millis(1_000)).await;
        self.report.times(name, times, Some((1.0, 0.5)));
        self.cpu_share(name, &began, None)
    }

    /// One endpoint of one service a second, each time of another one.
    async fn changes(&mut self) -> Result<()> {
        let name = "one change a second";
        eprintln!("{name}");
        let used: Vec<usize> =
            (0..self.mesh.len()).filter(|service| *service != OF_ALL && self.users[*service] > 0).collect();
        if used.is_empty() {
            bail!("nobody uses any service");
        }
        let began = self.begin()?;
        let mut times = Vec::new();
        for round in 0..if self.scale.quick { 5 } else { 30 } {
            let service = used[round * 37 % used.len()];
            times.extend(self.flip(service, 0).await?);
            self.rest_until(began.at + Duration::from_secs(round as u64 + 1)).await;
        }
        self.report.times(name, times, Some((1.0, 0.5)));
        self.cpu_share(name, &began, Some((20.0, 20.0)))
    }

    /// Makes a change and waits until everybody whom it concerns has it; after what time each.
    async fn flip(&mut self, service: usize, pod: usize) -> Result<Vec<Duration>> {
        let name = self.mesh.flipped(service, pod);
        self.fleet.watch(&name);
        self.mesh.flip(service, pod)?;
        let (fleet, users) = (self.fleet.clone(), self.users[service]);
        self.until("have the change", PATIENCE, || fleet.heard(&name), users).await?;
        Ok(self.fleet.unwatch(&name))
    }

    /// A new pod, then an old one less, ten times a second, of the service that everybody uses.
    async fn rolling(&mut self) -> Result<()> {
        let name = "rolling restart, 20 events/s, for all";
        eprintln!("{name}");
        let pods = if self.scale.quick { 20 } else { PODS_OF_ALL - PODS };
        let began = self.begin()?;
        let responses = self.fleet.responses.get();
        let (mut added, mut gone) = (Vec::new(), Vec::new());
        for round in 0..pods {
            let at = began.at + Duration::from_millis(100) * u32::try_from(round)?;
            self.rest_until(at).await;
            for name in self.mesh.add(OF_ALL, 1)? {
                self.fleet.watch(&name);
                added.push(name);
            }
            self.rest_until(at + Duration::from_millis(50)).await;
            // Those after the sidecars' own: the oldest of the others.
            gone.extend(self.mesh.remove(OF_ALL, PODS, 1)?);
        }
        let last = gone.last().context("no pod was restarted")?.clone();
        self.fleet.watch(&last);
        let (fleet, size) = (self.fleet.clone(), self.scale.sidecars());
        self.until(
            "know the last new pod",
            PATIENCE,
            || added.iter().map(|n| fleet.heard(n)).min().unwrap_or(0),
            size,
        )
        .await?;
        self.cpu_share(name, &began, None)?;
        let responses = self.fleet.responses.get() - responses;
        let each = responses as f64 / size as f64;
        self.report.add(name, "responses a sidecar", each, "", None);
        let times = added.iter().flat_map(|name| self.fleet.unwatch(name)).collect();
        self.fleet.unwatch(&last);
        self.report.times(name, times, Some((1.0, 0.5)));
        self.rss(name)
    }

    /// A service of ten endpoints gets a thousand, and ten again.
    async fn resize(&mut self) -> Result<()> {
        let (up, down) = ("10 → 1,000 endpoints", "1,000 → 10 endpoints");
        let service = (1..self.mesh.len()).max_by_key(|service| self.users[*service]).unwrap_or(1);
        let users = self.users[service];
        for (name, grows) in [(up, true), (down, false)] {
            eprintln!("{name}, {users} users");
            let began = self.begin()?;
            let names = match grows {
                true => self.mesh.add(service, 990)?,
                false => self.mesh.pods_from(service, PODS),
            };
            for name in &names {
                self.fleet.watch(name);
            }
            if !grows {
                self.mesh.remove(service, PODS, names.len())?;
            }
            let fleet = self.fleet.clone();
            let least = || names.iter().map(|name| fleet.heard(name)).min().unwrap_or(0);
            self.until("have them all", PATIENCE, least, users).await?;
            self.report.add(name, "users", users as f64, "", None);
            let times = names.iter().flat_map(|name| self.fleet.unwatch(name)).collect();
            self.report.times(name, times, Some((1.0, 0.5)));
            self.cpu_seconds(name, &began)?;
        }
        self.rss(down)
    }

    /// Killed, and started again after something changed that everybody has to hear of.
    async fn restart(&mut self) -> Result<()> {
        let name = "controller killed and started";
        eprintln!("{name}");
        let tries = self.fleet.tries.get();
        self.controller.kill();
        // Whoever has it was told by the new one.
        let added = self.mesh.add(OF_ALL, 1)?;
        for name in &added {
            self.fleet.watch(name);
        }
        let at = Instant::now();
        self.controller = start(self.scale, &self.dir, 1)?;
        let began = self.begin()?;
        let (fleet, size) = (self.fleet.clone(), self.scale.sidecars());
        ready(&mut self.controller, &self.dir).await?;
        self.report.add(name, "ready after", at.elapsed().as_secs_f64(), " s", None);
        self.until("have what changed meanwhile", PATIENCE, || fleet.heard(&added[0]), size).await?;
        let resynced = at.elapsed().as_secs_f64();
        self.report.add(name, "all resynced after", resynced, " s", Some((15.0, 8.0)));
        let times = self.fleet.unwatch(&added[0]);
        self.report.times(name, times, None);
        self.cpu_seconds(name, &began)?;
        self.report.add(name, "connections tried", (self.fleet.tries.get() - tries) as f64, "", None);
        self.rest(REPORT_EVERY.mul_f64(if self.scale.quick { 0.1 } else { 1.2 })).await;
        self.rss(name)
    }

    fn begin(&self) -> Result<Began> {
        Ok(Began { at: Instant::now(), controller: Cpu::of(self.controller.id())?, fleet: own_cpu()? })
    }

    /// CPU time of something that ends.
    fn cpu_seconds(&mut self, name: &'static str, began: &Began) -> Result<()> {
        let now = self.begin()?;
        let controller = now.controller.since(&began.controller).as_secs_f64();
        self.report.add(name, "controller's CPU", controller, " s", None);
        let fleet = now.fleet.saturating_sub(began.fleet).as_secs_f64();
        self.report.add(name, "the sidecars' CPU", fleet, " s", None);
        Ok(())
    }

    /// CPU time of something that goes on, as a share of one core.
    fn cpu_share(&mut self, name: &'static str, began: &Began, bound: report::Bound) -> Result<()> {
        let now = self.begin()?;
        let share = |time: Duration| 100.0 * time.as_secs_f64() / (now.at - began.at).as_secs_f64();
        let controller = share(now.controller.since(&began.controller));
        self.report.add(name, "controller's CPU", controller, " %", bound);
        self.report.add(name, "the sidecars' CPU", share(now.fleet.saturating_sub(began.fleet)), " %", None);
        Ok(())
    }

    fn rss(&mut self, name: &'static str) -> Result<()> {
        let pid = self.controller.id();
        self.report.add(name, "RSS", mebibytes(pid, "VmRSS:")?, " MiB", Some((900.0, 500.0)));
        self.report.add(name, "RSS at most so far", mebibytes(pid, "VmHWM:")?, " MiB", None);
        Ok(())
    }

    async fn rest(&self, time: Duration) {
        sleep(time).await;
    }

    async fn rest_until(&self, at: Instant) {
        sleep_until(at).await;
    }

    /// Waits until so many of something are there.
    async fn until(
        &mut self,
        what: &str,
        patience: Duration,
        so_far: impl Fn() -> usize,
        all: usize,
    ) -> Result<()> {
        let began = Instant::now();
        let mut told = began;
        loop {
            let now = so_far();
            if now >= all {
                return Ok(());
            }
            if told.elapsed() >= Duration::from_secs(2) {
                told = Instant::now();
                eprintln!("  {now} of {all} {what}");
            }
            if began.elapsed() >= patience {
                self.controller.check(&self.dir)?;
                let errors = self.fleet.errors.borrow();
                bail!("only {now} of {all} {what} after {patience:?}: {errors:?}");
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn notes(&mut self) {
        let fleet = &self.fleet;
        let (nacks, mismatches) = (fleet.nacks.get(), fleet.mismatches.get());
        if nacks > 0 || mismatches > 0 {
            self.report
                .notes
                .push(format!("{nacks} answers refused, {mismatches} collections found to differ"));
        }
        for (reason, count) in fleet.errors.borrow().iter() {
            self.report.notes.push(format!("{count} × {reason}"));
        }
    }
}

/// The controller as containerd 2 starts it: 1,024 descriptors unless it asks for more.
fn start(scale: &Scale, dir: &Path, run: u32) -> Result<Process> {
    let program = match &scale.controller {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("weft-controller"),
    };
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "sh", "-c", "ulimit -Sn 1024; exec \"$@\"", "sh"]);
    command.arg(program).args(["--listen", "0.0.0.0"]);
    match scale.source {
        Source::Dir => {
            command.args(["--source", "dir"]).arg(dir.join("mesh"));
            command.arg("--state-dir").arg(dir.join("state"));
        }
        Source::Kubernetes => {
            command.args(["--source", "kubernetes"]).env("KUBECONFIG", dir.join(KUBECONFIG));
        }
    }
    Process::start(command, &format!("weft-controller-{run}"), dir)
}

/// The stand-in, with the authority's Secret; how to reach it is in a file.
async fn kubernetes(dir: &Path, roots: &Roots) -> Result<Api> {
    let (api, address) = Api::start().await?;
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "bench", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "bench", "user": {}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "current-context": "bench",
    });
    fs::write(dir.join(KUBECONFIG), serde_json::to_vec(&config)?)?;
    let files = roots.files().into_iter().flatten();
    let data: serde_json::Map<_, _> =
        files.map(|(name, bytes)| (name.clone(), base64(bytes).into())).collect();
    api.apply(
        "issuer",
        vec![serde_json::json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "weft-issuer", "namespace": "weft"},
            "data": data,
        })],
    );
    Ok(api)
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let three = [0, 1, 2].map(|at| u32::from(chunk.get(at).copied().unwrap_or(0)));
        let bits = three[0] << 16 | three[1] << 8 | three[2];
        for letter in 0..4 {
            let index = (bits >> (18 - 6 * letter)) as usize & 63;
            text.push(if letter <= chunk.len() { char::from(LETTERS[index]) } else { '=' });
        }
    }
    text
}

async fn ready(controller: &mut Process, dir: &Path) -> Result<()> {
    let began = Instant::now();
    let api = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::API));
    loop {
        if is_ready(api).unwrap_or(false) {
            return Ok(());
        }
        controller.check(dir)?;
        if began.elapsed() > PATIENCE {
            bail!("the controller did not become ready");
        }
        sleep(Duration::from_millis(10)).await;
    }
}

fn is_ready(api: SocketAddr) -> std::io::Result<bool> {
    let mut stream = std::net::TcpStream::connect(api)?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.write_all(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(head.ends_with(b" 200"))
}

/// Who they are: certificates by the controller's own root, destinations and reports.
fn plans(scale: &Scale, ca: &Ca, mesh: &Mesh) -> Result<Vec<Plan>> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(ca.anchors().as_bytes()) {
        roots.add(root?)?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build()?;
    // A key costs more to make than a certificate, and nobody looks whether two have the same.
    let mut keys = Vec::new();
    for _ in 0..8 {
        let key = rcgen::KeyPair::generate()?;
        let csr = rcgen::CertificateParams::default().serialize_request(&key)?.der().to_vec();
        let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        keys.push((csr, provider.key_provider.load_private_key(der)?));
    }
    let histograms = histograms()?;
    let reports: Vec<_> =
        (0..mesh.len()).map(|service| report_of(scale, mesh, service, &histograms)).collect();
    let mut plans = Vec::new();
    for index in 0..scale.sidecars() {
        let (service, pod) = (index % mesh.len(), index / mesh.len());
        let pod = &mesh.pods(service)[pod];
        let (csr, key) = &keys[index % keys.len()];
        let identity =
            format!("spiffe://cluster.local/ns/{}/sa/{}", mesh::namespace(service), mesh::name(service));
        let subject =
            Subject { identity: identity.parse()?, name: PodUid::new(&pod.uid)?.server_name().to_string() };
        let chain = ca.issue(csr, &subject)?.chain;
        let certified = CertifiedKey::new(chain, key.clone());
        let mut tls = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_webpki_verifier(verifier.clone())
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        tls.alpn_protocols = vec![b"h2".to_vec()];
        tls.resumption = Resumption::disabled();
        plans.push(Plan {
            index,
            ip: pod.ip,
            uid: pod.uid.clone(),
            tls: Arc::new(tls),
            destinations: destinations(scale, mesh, service)
                .into_iter()
                .map(|service| (mesh::vip(service), PORT).into())
                .collect(),
            report: reports[service].clone(),
        });
    }
    Ok(plans)
}

/// The services that one service uses: that of all, and others by a rule that spreads them evenly.
fn destinations(scale: &Scale, mesh: &Mesh, service: usize) -> Vec<usize> {
    let mut uses = vec![OF_ALL];
    let mut next = service;
    while uses.len() < scale.destinations as usize {
        next = (next * 31 + 17) % mesh.len();
        if uses.contains(&next) {
            // A cycle that is too short is left.
            next += 1;
        } else {
            uses.push(next);
        }
    }
    uses
}

/// What a sidecar of a service reports every ten seconds: the destinations that it has traffic to, with all their
/// endpoints, and what is called in its own pod.
fn report_of(scale: &Scale, mesh: &Mesh, service: usize, histograms: &[Vec<u8>]) -> bytes::Bytes {
    let uses = destinations(scale, mesh, service);
    let active: Vec<usize> = uses.into_iter().take(scale.active as usize).collect();
    let histogram = |n: usize| histograms[(service * 7 + n) % histograms.len()].clone().into();
    let route = |direction: pb::Direction, parent: String, backend: String, n: usize| pb::RouteDelta {
        direction: direction.into(),
        parent,
        route: "default".to_owned(),
        backend,
        outcome: pb::OutcomeClass::Ok.into(),
        count: SAMPLES,
        first_byte: histogram(n),
        duration: histogram(n + 1),
        retries: 0,
        protocol: "http1".to_owned(),
    };
    let outbound = active.iter().map(|to| {
        let name = mesh::backend(*to);
        route(pb::Direction::Outbound, name.clone(), name, *to)
    });
    let inbound = route(pb::Direction::Inbound, PORT.to_string(), mesh::backend(service), service);
    let endpoints = active.iter().flat_map(|to| {
        mesh.pods(*to).iter().map(|pod| pb::EndpointState {
            backend: mesh::backend(*to),
            uid: pod.uid.clone(),
            address: format!("{}:{PORT}", pod.ip),
            cost_us: 3_000,
            weight: 1,
            state: pb::endpoint_state::State::Healthy.into(),
            requests: SAMPLES / mesh.pods(*to).len() as u64,
            ..pb::EndpointState::default()
        })
    });
    let caller = (service + 1) % mesh.len();
    let edge = pb::Edge {
        caller_identity: format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            mesh::namespace(caller),
            mesh::name(caller)
        ),
        service: mesh::backend(service),
        method: "default".to_owned(),
        count: SAMPLES,
        mtls: true,
        ..pb::Edge::default()
    };
    let report = pb::ReportRequest {
        routes: outbound.chain([inbound]).collect(),
        edges: vec![edge],
        endpoints: endpoints.collect(),
        gauges: Some(fleet::gauges()),
        ..pb::ReportRequest::default()
    };
    report.encode_to_vec().into()
}

/// Latencies around 5 ms with a tail, encoded as the sidecar does it.
fn histograms() -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for _ in 0..64 {
        let mut histogram = Histogram::<u32>::new(2)?;
        histogram.auto(true);
        for _ in 0..SAMPLES {
            let tail = 1.0 / (1.0 - rand::random::<f64>()).max(0.001);
            histogram.record((2_000.0 + 2_000.0 * tail.sqrt() + 1_500.0 * rand::random::<f64>()) as u64)?;
        }
        let mut bytes = Vec::new();
        V2Serializer::new().serialize(&histogram, &mut bytes).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        all.push(bytes);
    }
    Ok(all)
}

/// User and system time of this process alone.
fn own_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let time = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(u64::try_from(time.tv_sec()).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec()).unwrap_or(0))
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

fn mebibytes(pid: u32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such process")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes / 1024.0)
}

const LIFETIME: Duration = Duration::from_secs(24 * 3_600);
const KUBECONFIG: &str = "kubeconfig";
/// Requests of a route in ten seconds.
const SAMPLES: u64 = 200;
/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(120);
