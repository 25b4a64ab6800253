//! HAProxy and nginx, as somebody runs them who wants encryption and no mesh: one beside the client, one beside the server.
//!
//! Why: they say what thirty years of work on a proxy come to on this machine. One worker each, mutual TLS 1.3 with
//! certificates checked on both sides, connections between the two kept and shared, logs off. Neither is told the
//! original destination: each port of the service has a listener of its own.
//!
//! Between the two HAProxy speaks HTTP/2; nginx speaks HTTP/1.1, as it knows HTTP/2 to servers only as gRPC with one
//! stream a connection: it is not measured under loads of HTTP/2.

use std::{fs, path::Path};

use anyhow::{Result, bail};

use crate::{
    net::{Capture, Group, HTTP1_PORT, HTTP2_PORT, PORTS, RESUMED_PORT, SERVER, TCP_PORTS},
    peers::{Running, World, temporary_folders},
};

const CAPTURE: Capture = Capture { outbound: 15_101, inbound: 15_201, by_port: true };

pub(crate) fn haproxy(world: &World) -> Result<Running> {
    world.network.capture(Some(CAPTURE))?;
    world.pair(|side, namespace| {
        let path = world.dir.join(format!("haproxy-{side}.cfg"));
        fs::write(&path, haproxy_config(&world.dir, side))?;
        let mut haproxy = namespace.command("haproxy", Group::Proxy);
        haproxy.arg("-db").arg("-f").arg(&path);
        Ok((haproxy, format!("haproxy-{side}")))
    })
}

/// A frontend and a backend for each port.
fn haproxy_config(dir: &Path, side: &str) -> String {
    // Strictly it does not start where it could not open two descriptors for each connection it allows.
    let mut config = String::from(
        "global\n  nbthread 1\n  maxconn 12000\n  no strict-limits\n\
         defaults\n  mode http\n  http-reuse always\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n",
    );
    let certificates =
        format!("crt {dir}/{side}.both.pem ca-file {dir}/ca.pem ssl-min-ver TLSv1.3", dir = dir.display());
    let first = if side == "client" { CAPTURE.outbound } else { CAPTURE.inbound };
    for (port, listen) in PORTS.into_iter().zip(first..) {
        let (is_tcp, resumes) = (TCP_PORTS.contains(&port), port == RESUMED_PORT);
        let alpn = if is_tcp { "" } else { " alpn h2" };
        let (accept, connect) = if side == "client" {
            let reuse = if resumes { "" } else { " no-ssl-reuse" };
            let tls =
                format!(" ssl {certificates} verify required verifyhost relay sni str(relay){alpn}{reuse}");
            (String::new(), tls)
        } else {
            let tickets = if resumes { "" } else { " no-tls-tickets" };
            let protocol = if port == HTTP2_PORT { " proto h2" } else { "" };
            (format!(" ssl {certificates} verify required{alpn}{tickets}"), protocol.to_owned())
        };
        let mode = if is_tcp { "tcp" } else { "http" };
        config += &format!(
            "listen port_{port}\n  mode {mode}\n  bind 0.0.0.0:{listen}{accept}\n  server next {SERVER}:{port}{connect}\n"
        );
    }
    config
}

pub(crate) fn nginx(world: &World) -> Result<Running> {
    if !Path::new(STREAM_MODULE).is_file() {
        bail!("{STREAM_MODULE} is missing (Debian: apt-get install libnginx-mod-stream)");
    }
    world.network.capture(Some(CAPTURE))?;
    world.pair(|side, namespace| {
        let path = world.dir.join(format!("nginx-{side}.conf"));
        fs::write(&path, nginx_config(&world.dir, side))?;
        let mut nginx = namespace.command("nginx", Group::Proxy);
        nginx.args(["-e", "stderr", "-c"]).arg(&path);
        Ok((nginx, format!("nginx-{side}")))
    })
}

/// Debian's nginx has raw TCP as a module.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

fn nginx_config(dir: &Path, side: &str) -> String {
    let dir = dir.display();
    let is_client = side == "client";
    let first = if is_client { CAPTURE.outbound } else { CAPTURE.inbound };
    let toward = format!(
        "proxy_ssl_certificate {dir}/{side}.pem; proxy_ssl_certificate_key {dir}/{side}.key; proxy_ssl_protocols TLSv1.3;\n\
         proxy_ssl_trusted_certificate {dir}/ca.pem; proxy_ssl_verify on; proxy_ssl_name relay; proxy_ssl_server_name on;\n"
    );
    let accepting = format!(
        "ssl_certificate {dir}/{side}.pem; ssl_certificate_key {dir}/{side}.key; ssl_protocols TLSv1.3;\n\
         ssl_client_certificate {dir}/ca.pem; ssl_verify_client on;\n"
    );
    let (mut http, mut stream) = (String::new(), String::new());
    for (port, listen) in PORTS.into_iter().zip(first..) {
        let (listens, tls) = if is_client { ("", "") } else { (" ssl", accepting.as_str()) };
        let next = format!("upstream port_{port} {{ server {SERVER}:{port};");
        let kept = "keepalive 256; keepalive_requests 1000000000; keepalive_timeout 1h;";
        if TCP_PORTS.contains(&port) {
            let connect = if is_client { "proxy_ssl on;" } else { "" };
            let resumes = if port == RESUMED_PORT { "on" } else { "off" };
            let (reuse, tickets) = match is_client {
                true => (format!("proxy_ssl_session_reuse {resumes};"), String::new()),
                false => (String::new(), format!("ssl_session_tickets {resumes};")),
            };
            stream += &format!(
                "{next} }}\nserver {{ listen 0.0.0.0:{listen}{listens}; {tls}{tickets}{connect}{reuse} proxy_pass port_{port}; }}\n"
            );
        } else if port == HTTP1_PORT {
            let scheme = if is_client { "https" } else { "http" };
            http += &format!(
                "{next} {kept} }}\nserver {{ listen 0.0.0.0:{listen}{listens}; {tls}\
                 location / {{ proxy_pass {scheme}://port_{port}; }} }}\n"
            );
        }
    }
    let toward = if is_client { toward.as_str() } else { "" };
    format!(
        "daemon off; master_process off; user root; pid {dir}/nginx-{side}.pid; error_log stderr error;\n\
         load_module {STREAM_MODULE}; worker_rlimit_nofile 65536; events {{ worker_connections 32768; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;\n\
         proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_max_temp_file_size 0;\n\
         {temporary}{toward}{http}}}\n\
         stream {{ {toward}{stream}}}\n",
        temporary = temporary_folders(Path::new(&dir.to_string()), &format!("nginx-{side}")),
    )
}
