//! The demo's world: a shop of five services in a dozen pods, its users, and somebody who looks at it.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use weft_core::ports;

use super::{
    database,
    mesh::{Binaries, Mesh, Meshed, Options, Workload, interrupted, wait},
    netns::{Pod, Process},
    ui::Ui,
    users::Users,
};
use crate::{
    api::types::{Endpoints, Routes, Status},
    cli::{
        output::Tone,
        routes::{self, Until},
    },
};

/// Everything that runs.
pub(super) struct Stage {
    // Dropped in this order: whoever calls goes before whoever is called, and the mesh goes last.
    pub(super) users: Users,
    apps: BTreeMap<String, Process>,
    _database: Process,
    pods: BTreeMap<String, Meshed>,
    pub(super) mesh: Mesh,
    pub(super) ui: Ui,
    /// What every request carries in a header, in bodies and in SQL, and no packet may show.
    pub(super) secret: String,
    started: Instant,
}

impl Stage {
    /// Builds it all.
    pub(super) fn build(mut ui: Ui, rate: f64) -> Result<Self> {
        let started = Instant::now();
        ui.say(Tone::Plain, "", "Weft demo: a whole mesh on this machine.")?;
        ui.say(
            Tone::Dim,
            "",
            "Every \"pod\" is a network namespace with real capture rules and a real sidecar; the apps are ordinary \
             programs that know nothing of it. Ctrl-C ends it and leaves nothing behind.",
        )?;
        let mesh = Mesh::start("demo", Binaries::beside_this()?, Options::default())?;
        ui.say(
            Tone::Plain,
            "• ",
            &format!("controller: {} in {}", mesh.controller_pod.ip, mesh.dir().display()),
        )?;
        let database = database::Preparing::start(mesh.dir())?;
        for (file, yaml) in FILES {
            mesh.write(file, yaml)?;
        }
        let secret = format!("weft-secret-{:016x}", rand::random::<u64>());
        let mut pods = BTreeMap::new();
        for workload in workloads() {
            ensure!(!interrupted(), "interrupted");
            let name = workload.name.clone();
            let meshed = mesh.workload(workload).with_context(|| format!("pod {name}"))?;
            pods.insert(name, meshed);
        }
        let pod = |name: &str| pods.get(name).context("a pod that was never made");
        let db = pod("db-1")?;
        let server = database.serve(&db.pod, &mesh.log("db-app"))?;
        let mut apps = BTreeMap::new();
        for (name, meshed) in pods.iter().filter(|(name, _)| *name != "db-1" && *name != "load-1") {
            apps.insert(name.clone(), start_app(&mesh, meshed)?);
        }
        for (name, meshed) in &pods {
            let port = match name.split('-').next() {
                Some("web" | "api") => HTTP,
                Some("prices") => GRPC,
                _ => continue,
            };
            // By loopback, which is not captured: the app itself, not its sidecar.
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            wait(Duration::from_secs(10), || {
                Ok(meshed.pod.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)))?.is_ok())
            })
            .with_context(|| format!("the app of {name} does not listen"))?;
        }
        let load = pod("load-1")?;
        let log = fs::File::create(mesh.log("load-app"))?;
        let mut command = load.app(mesh.binaries().path("weft"));
        command
            .args([
                "demo-app",
                "load",
                "--web",
                &format!("{WEB}"),
                "--rate",
                &rate.to_string(),
                "--secret",
                &secret,
            ])
            .stderr(log);
        let users = Users::start(&mut command)?;
        ui.say(
            Tone::Plain,
            "• ",
            &format!(
                "{} pods with sidecars, {} captured services and {rate}/s of load, in {:.1}s",
                pods.len(),
                6,
                started.elapsed().as_secs_f64()
            ),
        )?;
        ui.lines(
            &[
                "",
                "    load ──► web ×2 ──► api v1 ×5 (one slow, one failing) ──► prices ×2  (gRPC)",
                "             HTTP/1.1   api v2 ×2    HTTP/1.1            └──► MariaDB    (server speaks first)",
                "",
            ]
            .map(str::to_owned),
        )?;
        Ok(Self { users, apps, _database: server, pods, mesh, ui, secret, started })
    }

    /// A pod of the shop.
    pub(super) fn pod(&self, name: &str) -> Result<&Meshed> {
        self.pods.get(name).with_context(|| format!("there is no pod {name}"))
    }

    /// All of them.
    pub(super) fn pods(&self) -> impl Iterator<Item = &Meshed> {
        self.pods.values()
    }

    /// Kills app and sidecar of a pod, as when its node loses power. The mesh is not told.
    pub(super) fn kill(&mut self, name: &str) -> Result<()> {
        self.apps.remove(name).with_context(|| format!("no app runs in {name}"))?;
        let meshed = self.pods.get_mut(name).with_context(|| format!("there is no pod {name}"))?;
        meshed.proxy.signal(Signal::SIGKILL)?;
        meshed.proxy.wait(Duration::from_secs(5))?;
        Ok(())
    }

    /// Starts both again.
    pub(super) fn revive(&mut self, name: &str) -> Result<()> {
        let meshed = self.pods.get_mut(name).with_context(|| format!("there is no pod {name}"))?;
        self.mesh.restart_proxy(meshed)?;
        self.apps.insert(name.to_owned(), start_app(&self.mesh, meshed)?);
        Ok(())
    }

    /// Asks the controller's API.
    pub(super) fn api<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        serde_json::from_value(self.mesh.api(path)?)
            .with_context(|| format!("the controller's answer to {path}"))
    }

    /// Endpoints of a service as their callers see them.
    pub(super) fn endpoints(&self, service: &str) -> Result<Endpoints> {
        self.api(&format!("/api/v1/endpoints?service={service}"))
    }

    /// The state of everything.
    pub(super) fn status(&self) -> Result<Status> {
        self.api("/api/v1/status")
    }

    /// The sum of a metric over some sidecars; one that cannot be asked counts nothing.
    pub(super) fn metric(&self, pods: &[&str], name: &str) -> f64 {
        let one = |pod: &&str| self.pods.get(*pod).and_then(|meshed| meshed.metric(name, &[]).ok());
        pods.iter().filter_map(one).sum()
    }

    /// Lets time pass while people look.
    pub(super) fn pass(&mut self, time: Duration) -> Result<()> {
        self.until(time, |_| Ok(false)).map(drop)
    }

    /// The same, until something has happened; says whether it has, and after how long.
    pub(super) fn until(
        &mut self,
        patience: Duration,
        mut happened: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<Option<Duration>> {
        let start = Instant::now();
        let mut drawn = None::<Instant>;
        loop {
            ensure!(!interrupted(), "interrupted");
            if happened(self)? {
                return Ok(Some(start.elapsed()));
            }
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            if self.ui.is_live() && drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW) {
                drawn = Some(Instant::now());
                let lines = self.view();
                self.ui.view(&lines)?;
            }
            std::thread::sleep(TICK.min(left));
        }
    }

    /// The routes, and what users see.
    pub(super) fn view(&mut self) -> Vec<String> {
        let screen = self.ui.screen();
        let mut lines = vec![String::new()];
        match self.api::<Routes>("/api/v1/routes?window=10s&direction=outbound") {
            Ok(routes) => {
                let outbound: Vec<_> =
                    routes.rows.into_iter().filter(|row| row.direction == "outbound").collect();
                lines.extend(routes::lines(&outbound, Until::Full, &screen));
            }
            Err(_) => {
                lines.push(screen.paint(Tone::Warn, "(the controller is away: no histograms for the moment)"))
            }
        }
        let now = Instant::now();
        let lately = now.checked_sub(Duration::from_secs(5)).unwrap_or(now);
        let figures = self.users.since(lately.max(self.started));
        let tone = if figures.failed == 0 { Tone::Good } else { Tone::Bad };
        lines.push(String::new());
        lines.push(screen.paint(tone, &format!("users, last 5s: {}", figures.text())));
        lines
    }

    /// The view once, for those without a terminal.
    pub(super) fn print_view(&mut self) -> Result<()> {
        if !self.ui.is_live() {
            let lines = self.view();
            self.ui.lines(&lines)?;
        }
        Ok(())
    }

    /// Makes the controller's API reachable from outside, so that `weft` works in another terminal.
    pub(super) fn open_api(&self) -> Option<SocketAddr> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::API));
        // Another mesh may run here already.
        let listener =
            TcpListener::bind(address).or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).ok()?;
        let reached = listener.local_addr().ok()?;
        let controller = self.mesh.controller_pod.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let controller = controller.clone();
                std::thread::spawn(move || forward(client, &controller, address));
            }
        });
        Some(reached)
    }
}

/// Copies both ways until both ends are done. Errors end it: there is nobody to tell.
fn forward(client: TcpStream, pod: &Pod, address: SocketAddr) {
    let Ok(Ok(server)) = pod.enter(|| TcpStream::connect(address)) else { return };
    let (Ok(mut from_client), Ok(mut from_server)) = (client.try_clone(), server.try_clone()) else { return };
    let (mut to_client, mut to_server) = (client, server);
    let back = std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(std::net::Shutdown::Write);
    });
    let _ = std::io::copy(&mut from_client, &mut to_server);
    let _ = to_server.shutdown(std::net::Shutdown::Write);
    let _ = back.join();
}

fn workloads() -> Vec<Workload> {
    let of = |app: &str, n: u32| Workload::new("shop", &format!("{app}-{n}"));
    let mut all: Vec<_> = (1..=2).flat_map(|n| [of("web", n), of("prices", n)]).collect();
    all.push(of("db", 1));
    for (version, count) in [("v1", 5), ("v2", 2)] {
        for n in 1..=count {
            let mut workload = of(&format!("api-{version}"), n).label("app", "api").label("version", version);
            workload.service_account = "api".to_owned();
            all.push(workload);
        }
    }
    all.push(Workload::new("users", "load-1"));
    all
}

fn start_app(mesh: &Mesh, meshed: &Meshed) -> Result<Process> {
    let name = &meshed.workload.name;
    let log = fs::OpenOptions::new().create(true).append(true).open(mesh.log(&format!("{name}-app")))?;
    let mut command = meshed.app(mesh.binaries().path("weft"));
    command.arg("demo-app");
    let listen = |port: u16| format!("0.0.0.0:{port}");
    match name.split('-').next().unwrap_or_default() {
        "web" => {
            command.args(["web", "--listen", &listen(HTTP), "--api", &API.to_string()]);
        }
        "prices" => {
            command.args(["prices", "--listen", &listen(GRPC)]);
        }
        _ => {
            let version = meshed.workload.labels.get("version").map(String::as_str).unwrap_or_default();
            command.args(["api", "--listen", &listen(HTTP), "--version", version]);
            command.args(["--prices", &PRICES.to_string(), "--db", &DB.to_string()]);
            match name.as_str() {
                SLOW => command.args(["--slow-ms", SLOW_MS]),
                FAILING => command.args(["--fail-percent", FAIL_PERCENT]),
                _ => &mut command,
            };
        }
    }
    command.args(["--name", name]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Process::spawn(&mut command).with_context(|| format!("the app of {name}"))
}

/// The endpoint of api v1 that is slower than its siblings.
pub(super) const SLOW: &str = "api-v1-4";
pub(super) const SLOW_MS: &str = "300";
/// The one that fails.
pub(super) const FAILING: &str = "api-v1-5";
pub(super) const FAIL_PERCENT: &str = "60";
/// Endpoints of api v1.
pub(super) const V1: usize = 5;
/// The file that a step edits.
pub(super) const ROUTES: &str = "routes.yaml";
pub(super) const ROUTES_YAML: &str = include_str!("yaml/routes.yaml");
/// The file that a step adds and removes.
pub(super) const IN_TURN: &str = "in-turn.yaml";
pub(super) const IN_TURN_YAML: &str = include_str!("yaml/in-turn.yaml");
const FILES: [(&str, &str); 4] = [
    ("services.yaml", include_str!("yaml/services.yaml")),
    (ROUTES, ROUTES_YAML),
    ("traffic.yaml", include_str!("yaml/traffic.yaml")),
    ("access.yaml", include_str!("yaml/access.yaml")),
];
const HTTP: u16 = 8_080;
const GRPC: u16 = 50_051;
/// The addresses of services.yaml.
const WEB: SocketAddr = service(10, 80);
const API: SocketAddr = service(20, 80);
const PRICES: SocketAddr = service(30, GRPC);
const DB: SocketAddr = service(40, 3_306);
const REDRAW: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(50);

const fn service(host: u8, port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, host)), port)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use weft_core::identity::TrustDomain;

    use super::*;
    use crate::{
        index::{Event, Index},
        resources::ObjectKey,
        source::yaml::{self, Document},
    };

    #[test]
    fn the_addresses_are_those_of_the_files() {
        let services = FILES[0].1;
        for address in [WEB, API, PRICES, DB] {
            assert!(services.contains(&format!("clusterIP: {}\n", address.ip())), "{address}");
        }
    }

    #[test]
    fn the_files_are_good_examples() {
        let mut index = Index::new(TrustDomain::new("cluster.local").unwrap());
        let mut keys: Vec<ObjectKey> = Vec::new();
        for (file, text) in FILES.into_iter().chain([(IN_TURN, IN_TURN_YAML)]) {
            for document in yaml::read(&Arc::from(file), text) {
                match document {
                    Document::Object { object, origin, .. } => {
                        keys.push(object.key());
                        index.apply(Event::Apply { object, origin });
                    }
                    Document::Foreign => panic!("{file}: something foreign"),
                    Document::Bad { problem, .. } => panic!("{file}: {problem:?}"),
                }
            }
        }
        assert_eq!(keys.len(), 6 + 3 + 4 + 4 + 1);
        for key in keys {
            for condition in index.conditions(&key) {
                // There are no pods here, so nothing is selected.
                assert!(condition.status || condition.reason == "NoWorkload", "{key}: {condition:?}");
            }
        }
    }

    #[test]
    fn every_pod_has_its_place() {
        let names: Vec<_> = workloads().into_iter().map(|w| w.name).collect();
        assert!(names.contains(&SLOW.to_owned()) && names.contains(&FAILING.to_owned()));
        assert_eq!(names.iter().filter(|name| name.starts_with("api-v1-")).count(), V1);
    }
}
