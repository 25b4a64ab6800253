//! The pairs: what stands between client and backend, each started as its users would run it.
//!
//! Why these: `direct` is what latency is added to; `weft` is the shipped binaries under a real controller, with nothing
//! switched off; `envoy` is what most meshes run (envoy.rs); `relay` is the floor (relay.rs); `haproxy` and `nginx` are
//! what somebody would run who wants no mesh (plain.rs).
//!
//! The configurations of Envoy, of HAProxy and of the relay are frozen, as performance figures taken with them are what
//! decides whether a run counts.
//!
//! linkerd2-proxy and ztunnel are not among them: neither starts without a control plane of its own (for linkerd three
//! gRPC services: identity, destination, policy), and a stand-in that we wrote would be half of what is measured.

use std::{
    fmt, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use nix::unistd::geteuid;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, SanType};
use serde::Serialize;

use crate::{
    envoy, load,
    net::{
        Capture, Group, HTTP1_PORT, HTTP2_PORT, Namespace, Network, OPAQUE_PORT, Process, RESUMED_PORT,
        SERVER, SERVICE, STREAM_PORT, TCP_PORTS,
    },
    plain,
    weft::{self, Sidecars},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Peer {
    Direct,
    Weft,
    Envoy,
    Relay,
    Haproxy,
    Nginx,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Peer::Direct => "direct",
            Peer::Weft => "weft",
            Peer::Envoy => "envoy",
            Peer::Relay => "relay",
            Peer::Haproxy => "haproxy",
            Peer::Nginx => "nginx",
        })
    }
}

/// What every pair shares: the pods, the backend, the binaries, the certificates.
pub(crate) struct World {
    // Before the network: programs end before the namespaces they live in go.
    _backend: [Process; 2],
    pub(crate) network: Network,
    /// Configurations, logs and other scratch of this run.
    pub(crate) dir: PathBuf,
    pub(crate) programs: PathBuf,
    envoy: Option<PathBuf>,
}

/// A pair at work, until dropped.
pub(crate) struct Running {
    /// Client's side first; none for `direct`.
    pub(crate) proxies: Vec<Process>,
    /// What they need, uncounted.
    pub(crate) others: Vec<Process>,
    pub(crate) host: Ipv4Addr,
    /// When the client's proxy was started, as the last of all.
    pub(crate) started: SystemTime,
    /// From there to the first answer through both proxies.
    pub(crate) first_answer: Option<Duration>,
}

impl World {
    pub(crate) fn new(
        pairs: &[Peer],
        out: &Path,
        programs: PathBuf,
        envoy: Option<PathBuf>,
    ) -> Result<World> {
        let dir = out.join("run");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        let used = |(program, _): &&(&str, &str)| {
            let peer = Peer::from_str(program, false).ok();
            peer.is_none_or(|peer| peer == Peer::Nginx || pairs.contains(&peer))
        };
        for (program, package) in PROGRAMS.iter().filter(used) {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
            });
            if !found {
                bail!("{program} is missing (Debian: apt-get install {package})");
            }
        }
        let needed: &[(Peer, &[&str])] =
            &[(Peer::Weft, &["weft-proxy", "weft-controller", "weft"]), (Peer::Relay, &["relay"])];
        for program in needed.iter().filter(|(peer, _)| pairs.contains(peer)).flat_map(|(_, names)| *names) {
            if !programs.join(program).is_file() {
                bail!("{} is missing: cargo build --release --workspace", programs.join(program).display());
            }
        }
        let envoy = match envoy {
            Some(path) => Some(path),
            None if pairs.contains(&Peer::Envoy) => Some(envoy::find(programs.parent().unwrap_or(out))?),
            None => None,
        };
        write_certificates(&dir)?;
        if !geteuid().is_root() {
            bail!("network namespaces and iptables need root");
        }
        let network = Network::new()?;
        let backend = start_backend(&network, &dir)?;
        Ok(World { _backend: backend, network, dir, programs, envoy })
    }

    /// What the peers say their versions are.
    pub(crate) fn versions(&self, pairs: &[Peer]) -> Vec<String> {
        let said = |program: &Path, flag: &str| {
            let output = Command::new(program).arg(flag).output().ok()?;
            let text = [output.stdout, output.stderr].concat();
            String::from_utf8_lossy(&text).lines().find(|line| !line.is_empty()).map(str::to_owned)
        };
        let of = |pair: &Peer| match pair {
            // `<path>  version: <commit>/<version>/Clean/RELEASE/BoringSSL`
            Peer::Envoy => {
                let text = said(self.envoy.as_ref()?, "--version")?;
                Some(format!("Envoy {}, lean", text.rsplit("version: ").next()?.split('/').nth(1)?))
            }
            Peer::Haproxy => said(Path::new("haproxy"), "-v"),
            Peer::Nginx => said(Path::new("nginx"), "-v"),
            Peer::Direct | Peer::Weft | Peer::Relay => None,
        };
        pairs.iter().filter_map(of).collect()
    }

    /// Starts a pair and waits until it answers.
    pub(crate) async fn start(&self, peer: Peer) -> Result<Running> {
        let mut running = match peer {
            Peer::Direct => {
                self.network.capture(None)?;
                return Ok(Running {
                    proxies: vec![],
                    others: vec![],
                    host: SERVER,
                    started: SystemTime::now(),
                    first_answer: None,
                });
            }
            Peer::Weft => weft::start(self, &Sidecars::shipped(self)).await?,
            Peer::Envoy => envoy::start(self, self.envoy.as_ref().context("no Envoy was asked for")?)?,
            Peer::Relay => self.start_relay()?,
            Peer::Haproxy => plain::haproxy(self)?,
            Peer::Nginx => plain::nginx(self)?,
        };
        self.answers(&mut running, peer, PATIENCE).await?;
        Ok(running)
    }

    /// Starts the server's proxy and then the client's.
    pub(crate) fn pair(
        &self,
        proxy: impl Fn(&str, &Namespace) -> Result<(Command, String)>,
    ) -> Result<Running> {
        let start = |side, namespace| -> Result<Process> {
            let (command, name) = proxy(side, namespace)?;
            Process::start(command, &name, &self.dir)
        };
        let server = start("server", &self.network.server)?;
        let started = SystemTime::now();
        let client = start("client", &self.network.client)?;
        Ok(Running {
            proxies: vec![client, server],
            others: vec![],
            host: SERVICE,
            started,
            first_answer: None,
        })
    }

    /// Waits for the first answer through both proxies.
    pub(crate) async fn answers(
        &self,
        running: &mut Running,
        peer: impl fmt::Display,
        patience: Duration,
    ) -> Result<()> {
        let mut probe = self.network.client.command(std::env::current_exe()?, Group::App);
        probe.args(["probe", "--to", &format!("{}:{HTTP1_PORT}", running.host)]);
        probe.args(["--seconds", &patience.as_secs_f64().to_string()]);
        let waited = load::output(&mut probe).await;
        for process in running.proxies.iter_mut().chain(&mut running.others) {
            process.check(&self.dir)?;
        }
        let waited =
            waited.with_context(|| format!("{peer} does not work; logs in {}", self.dir.display()))?;
        let answered = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(waited.trim().parse()?);
        running.first_answer = answered.duration_since(running.started).ok();
        Ok(())
    }

    fn start_relay(&self) -> Result<Running> {
        self.network.capture(Some(PEERS_CAPTURE))?;
        self.pair(|side, namespace| {
            let port = if side == "client" { PEERS_CAPTURE.outbound } else { PEERS_CAPTURE.inbound };
            let mut relay = namespace.command(self.programs.join("relay"), Group::Proxy);
            relay.args([side, "--listen", &format!("0.0.0.0:{port}"), "--certs"]).arg(&self.dir);
            relay.args(["--to", &SERVER.to_string(), "--h2-port", &HTTP2_PORT.to_string()]);
            for port in TCP_PORTS {
                relay.args(["--tcp-port", &port.to_string()]);
            }
            Ok((relay, format!("relay-{side}")))
        })
    }
}

/// How long a pair may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Where Istio's sidecars listen; the relay is told to do likewise.
pub(crate) const PEERS_CAPTURE: Capture = Capture { outbound: 15_001, inbound: 15_006, by_port: false };

/// What must be there, and where Debian has it. Envoy and our own programs are found in other ways.
const PROGRAMS: [(&str, &str); 9] = [
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("ip", "iproute2"),
    ("iptables-restore", "iptables"),
    ("nginx", "nginx-light"),
    ("wrk", "wrk"),
    ("h2load", "nghttp2-client"),
    ("iperf3", "iperf3"),
    ("haproxy", "haproxy"),
];

pub(crate) fn take(command: &mut Command) -> Command {
    std::mem::replace(command, Command::new("true"))
}

/// One nginx worker that answers 101 bytes, or a million, with limits that no run reaches; and iperf3. Without a master
/// process: a worker would outlive a master that is killed.
fn start_backend(network: &Network, dir: &Path) -> Result<[Process; 2]> {
    let body = "w".repeat(101);
    fs::write(dir.join("large"), vec![b'w'; LARGE])?;
    let temporary = temporary_folders(dir, "backend");
    // Its gRPC has everything but a protocol buffer: a content type, a status in trailers, and those 101 bytes.
    let locations = format!(
        "location / {{ return 200 \"{body}\"; }}\n\
         location = {LARGE_PATH} {{ alias {dir}/large; }}\n\
         location = {GRPC_PATH} {{ default_type application/grpc; add_trailer grpc-status 0; return 200 \"{body}\"; }}",
        dir = dir.display(),
    );
    let config = format!(
        "daemon off; master_process off; user root; pid {dir}/nginx.pid; error_log stderr warn;\n\
         worker_rlimit_nofile 65536; events {{ worker_connections 32768; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; sendfile on;\n\
         http2_max_concurrent_streams 1024; {temporary}\n\
         server {{ listen {SERVER}:{HTTP1_PORT}; listen {SERVER}:{OPAQUE_PORT}; listen {SERVER}:{RESUMED_PORT};\n\
         {locations} }}\n\
         server {{ listen {SERVER}:{HTTP2_PORT} http2; {locations} }} }}\n",
        dir = dir.display()
    );
    let path = dir.join("nginx.conf");
    fs::write(&path, config)?;
    let mut nginx = network.server.command("nginx", Group::App);
    nginx.args(["-e", "stderr", "-c"]).arg(&path);
    let mut iperf3 = network.server.command("iperf3", Group::App);
    iperf3.args(["--server", "--port", &STREAM_PORT.to_string()]);
    Ok([Process::start(nginx, "backend", dir)?, Process::start(iperf3, "iperf3-server", dir)?])
}

/// The backend's answer of a megabyte.
pub(crate) const LARGE: usize = 1 << 20;
pub(crate) const LARGE_PATH: &str = "/large";
/// A method of gRPC's form.
pub(crate) const GRPC_PATH: &str = "/bench.Backend/Answer";

/// nginx wants its folders even where it does not use them.
pub(crate) fn temporary_folders(dir: &Path, name: &str) -> String {
    ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {}/{name}-{kind};\n", dir.display()))
        .collect()
}

/// `ca.pem` and, for each side, a P-256 certificate with a SPIFFE identity.
fn write_certificates(dir: &Path) -> Result<()> {
    let ca_key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Names of their own: a certificate that names itself as its issuer counts as self-signed.
    ca.distinguished_name.push(DnType::CommonName, "bench anchor");
    fs::write(dir.join("ca.pem"), ca.self_signed(&ca_key)?.pem())?;
    let issuer = rcgen::Issuer::new(ca, ca_key);
    for side in ["client", "server"] {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name.push(DnType::CommonName, side);
        leaf.subject_alt_names =
            vec![SanType::URI(identity(side).as_str().try_into()?), SanType::DnsName("relay".try_into()?)];
        let (chain, key_pem) = (leaf.signed_by(&key, &issuer)?.pem(), key.serialize_pem());
        // HAProxy wants both in one.
        fs::write(dir.join(format!("{side}.both.pem")), chain.clone() + &key_pem)?;
        fs::write(dir.join(format!("{side}.pem")), chain)?;
        fs::write(dir.join(format!("{side}.key")), key_pem)?;
    }
    Ok(())
}

pub(crate) fn identity(side: &str) -> String {
    format!("spiffe://cluster.local/ns/bench/sa/{side}")
}
