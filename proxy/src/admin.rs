//! What operators and probes ask. Four questions are open on the pod's address; everything else is on a
//! Unix socket that only the sidecar's own user opens.
//!
//! Why a socket: the app shares the pod's network. An admin port on loopback is one that every process of
//! the app can reach, and with it shutdown, log level and configuration (the finding that audits of meshes
//! have in common).

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::Semaphore,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{info, warn};
use weft_core::policy::{OutboundPolicy, Tunnel};

use crate::{
    config::Config,
    connect,
    control::Control,
    discovery::Target,
    drain::{Drain, Phase},
    telemetry::{log::LogHandle, metrics::Shared},
};

type Answer = Response<Full<Bytes>>;

struct Admin {
    config: Arc<Config>,
    control: Control,
    drain: Drain,
    log: LogHandle,
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Door {
    /// Anyone who reaches the pod.
    Open,
    /// The sidecar's own user, or root.
    Socket,
}

/// Starts both servers. The listeners of the data path are open by then: what `/ready` still waits for is
/// the certificate and the first configuration.
///
/// # Errors
/// An address or the socket cannot be opened.
pub async fn start(
    config: &Arc<Config>,
    control: &Control,
    drain: &Drain,
    _shared: &Arc<Shared>,
    log: LogHandle,
) -> io::Result<()> {
    let admin =
        Arc::new(Admin { config: Arc::clone(config), control: control.clone(), drain: drain.clone(), log });
    let open = bind(config.admin_addr).await?;
    let socket = bind_socket(&config.admin_socket)?;
    info!(open = %config.admin_addr, socket = %config.admin_socket.display(), "admin");
    tokio::spawn({
        let admin = Arc::clone(&admin);
        async move {
            let mut held = Held::default();
            loop {
                match open.accept().await {
                    Ok((stream, peer)) => {
                        let serving = tokio::spawn(admin.clone().serve(stream, Door::Open));
                        held.add(peer.ip(), serving.abort_handle());
                    }
                    Err(error) => pause(&error).await,
                }
            }
        }
    });
    // Its own slots: whoever holds all open connections does not keep the operator out.
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(async move {
        let us = nix::unistd::geteuid().as_raw();
        loop {
            match socket.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == us || peer.uid() == 0 => {
                        if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
                            let serving = admin.clone().serve(stream, Door::Socket);
                            tokio::spawn(async move {
                                serving.await;
                                drop(slot);
                            });
                        }
                    }
                    Ok(peer) => warn!(uid = peer.uid(), "admin socket refused"),
                    Err(error) => warn!(%error, "admin socket refused"),
                },
                Err(error) => pause(&error).await,
            }
        }
    });
    Ok(())
}

/// Asks a running sidecar over its socket: status and body.
///
/// # Errors
/// There is no sidecar, or it does not answer in `limit`.
pub async fn call(socket: &Path, method: Method, target: &str, limit: Duration) -> io::Result<(u16, String)> {
    let exchange = async {
        let stream = UnixStream::connect(socket).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "weft-proxy")
            .body(Full::<Bytes>::default())
            .map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status().as_u16();
        let body =
            Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(io::Error::other)?;
        connection.abort();
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    timeout(limit, exchange).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

impl Admin {
    async fn serve<S>(self: Arc<Self>, stream: S, door: Door)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(move |request: Request<Incoming>| {
            let admin = Arc::clone(&self);
            async move { Ok::<_, std::convert::Infallible>(admin.answer(request, door).await) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service);
        // How a prober leaves is its own business.
        let _ = served.await;
    }

    /// Boxed once a request: what answers is large, and most connections ask for one line.
    fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        door: Door,
    ) -> impl Future<Output = Answer> + Send {
        Box::pin(async move {
            let method = request.method().clone();
            let path = request.uri().path().to_owned();
            let query = request.uri().query().unwrap_or_default().to_owned();
            let (allowed, answer) = match (path.as_str(), door) {
                ("/live", _) => (Method::GET, None),
                ("/ready", _) => (Method::GET, None),
                ("/metrics", _) => (Method::GET, None),
                (path, _) if path.starts_with(PROBE) => (Method::GET, None),
                ("/config" | "/explain", Door::Socket) => (Method::GET, None),
                ("/loglevel" | "/drain", Door::Socket) => (Method::POST, None),
                _ => (Method::GET, Some(text(StatusCode::NOT_FOUND, "no such page\n"))),
            };
            if let Some(answer) = answer {
                return answer;
            }
            if method != allowed {
                let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}\n"));
                if let Ok(allowed) = allowed.as_str().parse() {
                    answer.headers_mut().insert(header::ALLOW, allowed);
                }
                return answer;
            }
            match path.as_str() {
                "/live" => text(StatusCode::OK, "live\n"),
                "/ready" => self.ready(),
                "/metrics" => self.metrics().await,
                "/config" => self.config().await,
                "/explain" => self.explain(&query).await,
                "/loglevel" => self.log_level(&query),
                path if path.starts_with(PROBE) => self.probe(&path[PROBE.len()..]).await,
                _ => self.drain().await,
            }
        })
    }

    fn ready(&self) -> Answer {
        let mut lacks = self.control.lacks();
        if self.drain.phase() != Phase::Serving {
            lacks.push("draining");
        }
        if lacks.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", lacks.join(", ")))
    }

    /// Whether the app accepts connections at a port that the pod's own spec probes so. Why here: a captured port
    /// accepts every connection, whether there is an app behind it or not.
    async fn probe(&self, port: &str) -> Answer {
        let Some(port) = port.parse().ok().filter(|port| self.config.tcp_probes.contains(port)) else {
            return text(StatusCode::NOT_FOUND, "no such probe\n");
        };
        let pod_ips = self.config.pod_ips.iter().copied();
        let addresses =
            pod_ips.chain([IpAddr::V4(Ipv4Addr::LOCALHOST)]).take(self.config.pod_ips.len().max(1));
        let mut refused = String::new();
        for address in addresses.map(|ip| SocketAddr::new(ip, port)) {
            let connecting = async { connect::socket(address, true)?.connect(address).await };
            match timeout(self.config.times.connect, connecting).await {
                Ok(Ok(_)) => return text(StatusCode::OK, "accepts\n"),
                Ok(Err(error)) => refused = format!("{address}: {error}\n"),
                Err(_) => refused = format!("{address}: does not accept\n"),
            }
        }
        text(StatusCode::SERVICE_UNAVAILABLE, refused)
    }

    async fn metrics(&self) -> Answer {
        let body = self.control.registry.exposition().await;
        let mut answer = text(StatusCode::OK, body);
        let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        answer
    }

    async fn config(&self) -> Answer {
        let settings: serde_json::Map<_, _> = self
            .config
            .effective()
            .iter()
            .map(|(name, value, set)| ((*name).to_owned(), json!({ "value": value, "set": set })))
            .collect();
        let material = self.control.material.borrow().clone();
        let seconds = |at: std::time::SystemTime| {
            at.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
        };
        let certificate = material.map(|material| {
            json!({ "identity": material.identity.as_str(), "generation": material.generation,
                "not_before": seconds(material.validity.not_before),
                "not_after": seconds(material.validity.not_after),
                "roots": material.trust().domains().map(|domain| {
                    (domain.to_owned(), json!(material.trust().roots(domain)))
                }).collect::<serde_json::Map<_, _>>() })
        });
        let refused: Vec<_> = self
            .control
            .reports
            .refused()
            .into_iter()
            .map(|(_, name, version, reason)| json!({ "name": &*name, "version": version, "reason": reason }))
            .collect();
        json_answer(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "settings": settings,
            "certificate": certificate,
            "connected": *self.control.connected.borrow(),
            "refused": refused,
            "discovery": self.control.discovery.dump().await,
        }))
    }

    /// Where a connection to an address would go now.
    async fn explain(&self, query: &str) -> Answer {
        let wanted = parameter(query, "address").and_then(|address| address.parse::<SocketAddr>().ok());
        let Some(address) = wanted else {
            return text(StatusCode::BAD_REQUEST, "say /explain?address=<ip>:<port>\n");
        };
        match self.control.discovery.resolve(address).await {
            Ok(Target::Outside) => json_answer(&json!({ "target": "outside" })),
            Ok(Target::Denied) => json_answer(&json!({ "target": "denied by the egress policy" })),
            Ok(Target::Service(watched)) => json_answer(&describe(&watched.policy())),
            Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
        }
    }

    fn log_level(&self, query: &str) -> Answer {
        let Some(level) = parameter(query, "level") else {
            return text(StatusCode::BAD_REQUEST, "say /loglevel?level=<filter>\n");
        };
        match self.log.set(&level) {
            Ok(()) => {
                info!(level, "log filter changed");
                text(StatusCode::OK, "changed\n")
            }
            Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        }
    }

    async fn drain(&self) -> Answer {
        let (lame_duck, within, drain) =
            (self.config.times.lame_duck, self.config.times.drain, self.drain.clone());
        // In a task of its own: whoever asked may go away, and what has begun must not stop half-way.
        let draining = tokio::spawn(async move { drain.drain_inbound(lame_duck, within).await });
        if draining.await.is_ok_and(|drained| drained) {
            return text(StatusCode::OK, "drained\n");
        }
        let left = self.drain.inbound_requests();
        text(StatusCode::GATEWAY_TIMEOUT, format!("{left} requests still in flight\n"))
    }
}

/// Connections at the open door, the oldest first, and who holds them.
///
/// Why whoever comes is let in and another one goes: who could keep others out would fail the kubelet's probes, and with
/// them the pod. Whoever holds most makes room, so that many connections buy nobody anything.
#[derive(Default)]
struct Held(Vec<(IpAddr, AbortHandle)>);

impl Held {
    fn add(&mut self, peer: IpAddr, serving: AbortHandle) {
        let held = &mut self.0;
        held.retain(|(_, serving)| !serving.is_finished());
        held.push((peer.to_canonical(), serving));
        let mut counts = HashMap::new();
        for (peer, _) in held.iter() {
            *counts.entry(*peer).or_insert(0) += 1;
        }
        let most = counts.values().copied().max().unwrap_or(0);
        if (most > MAX_OF_ONE || held.len() > MAX_CONNECTIONS)
            && let Some(oldest) = held.iter().position(|(peer, _)| counts[peer] == most)
        {
            held.remove(oldest).1.abort();
        }
    }
}

fn describe(policy: &OutboundPolicy) -> serde_json::Value {
    let rules: Vec<_> = policy
        .routes
        .rules()
        .iter()
        .map(|rule| {
            json!({ "label": &*rule.label, "hosts": rule.hosts.iter().map(|host| &**host).collect::<Vec<_>>(),
                "matches": rule.matches.len(), "filters": rule.filters.len(),
                "backends": rule.backends.iter().map(|backend| json!({
                    "service": backend.service.to_string(), "weight": backend.weight,
                })).collect::<Vec<_>>() })
        })
        .collect();
    let backends: Vec<_> = policy
        .backends
        .iter()
        .map(|backend| {
            let endpoints = backend.endpoints.iter().take(MAX_LISTED).map(|endpoint| {
                json!({ "uid": endpoint.uid.as_str(), "address": endpoint.address.to_string(),
                    "weight": endpoint.weight, "health": format!("{:?}", endpoint.health),
                    "mtls": endpoint.tunnel == Tunnel::Weft,
                    "identity": endpoint.identity.as_ref().map(|id| id.as_str()) })
            });
            json!({ "service": backend.service.name.to_string(), "resolved": backend.resolved,
                "endpoints": backend.endpoints.len(), "listed": endpoints.collect::<Vec<_>>() })
        })
        .collect();
    json!({ "target": "service", "service": policy.service.name.to_string(),
        "protocol": format!("{:?}", policy.service.protocol), "rules": rules, "backends": backends })
}

/// A query parameter, percent-decoded.
fn parameter(query: &str, name: &str) -> Option<String> {
    let raw = query.split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))?.1;
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

fn text(status: StatusCode, body: impl Into<String>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.into())));
    *answer.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

fn json_answer(value: &serde_json::Value) -> Answer {
    let mut answer = text(StatusCode::OK, format!("{value:#}\n"));
    let kind = header::HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

/// Where the host has no IPv6, "any address" means any IPv4 address.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let error = match TcpListener::bind(address).await {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    if address.is_ipv6() && address.ip().is_unspecified() && error.kind() != io::ErrorKind::AddrInUse {
        info!(%address, %error, "there is no IPv6 here: listening on IPv4");
        return TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port())).await;
    }
    Err(io::Error::new(error.kind(), format!("{address}: {error}")))
}

/// Opens the socket with mode 0600 from its first moment on; one that a dead sidecar left is replaced.
fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    use nix::sys::stat::{Mode, umask};
    let fail = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        Ok(()) | Err(_) => {}
    }
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    bound.map_err(fail)
}

/// Descriptors have run out: nothing helps but time.
async fn pause(error: &io::Error) {
    warn!(%error, "admin accept");
    sleep(ACCEPT_PAUSE).await;
}

/// What follows is a port of the app.
const PROBE: &str = "/probe/";
/// Probes and scrapes at a time, at each door.
const MAX_CONNECTIONS: usize = 64;
/// … of which one address may have so many at the open one.
const MAX_OF_ONE: usize = 16;
/// Bytes of a request's head (hyper's least is 8 KiB).
const MAX_HEAD: usize = 16 * 1024;
/// For a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Endpoints of a backend that are listed.
const MAX_LISTED: usize = 100;
/// Bytes of an answer that [`call`] takes.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_holds_many_connections_at_the_open_door_keeps_nobody_out() {
        let (_config, _drain, dir, port) = lonely("held").await;
        let mut held = Vec::new();
        for n in 0..MAX_CONNECTIONS * 2 {
            // As many addresses as it takes.
            held.push(connect([127, 0, 1, u8::try_from(n / MAX_OF_ONE).unwrap()], port).await);
        }
        for from in [[127, 0, 0, 9], [127, 0, 1, 0]] {
            assert_eq!(over_tcp(connect(from, port).await, "/live").await, 200, "{from:?}");
        }
        // Nor is one that is there already what goes when others come.
        let asking = connect([127, 0, 0, 9], port).await;
        for n in 0..MAX_CONNECTIONS {
            held.push(connect([127, 0, 1, u8::try_from(n / MAX_OF_ONE).unwrap()], port).await);
        }
        assert_eq!(over_tcp(asking, "/live").await, 200);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn parameters_are_decoded() {
        assert_eq!(
            parameter("level=info%2Cweft_proxy%3Ddebug", "level").as_deref(),
            Some("info,weft_proxy=debug")
        );
        assert_eq!(parameter("a=1&level=x+y", "level").as_deref(), Some("x y"));
        for wrong in ["", "level", "level=%", "level=%zz", "level=%ff"] {
            assert_eq!(parameter(wrong, "level"), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn the_socket_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = std::env::temp_dir().join(format!("weft-admin-{}", std::process::id()));
        let path = dir.join("admin.sock");
        let first = bind_socket(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // One that is left over is replaced.
        drop(first);
        drop(bind_socket(&path).unwrap());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    /// A sidecar whose controller is away, and its two doors.
    async fn lonely(test: &str) -> (Arc<Config>, Drain, std::path::PathBuf, u16) {
        let dir = std::env::temp_dir().join(format!("weft-doors-{test}-{}", std::process::id()));
        let socket = dir.join("admin.sock").display().to_string();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{free}");
        let config = Arc::new(Config::for_tests(&[
            ("WEFT_ADMIN_SOCKET", &socket),
            ("WEFT_ADMIN_ADDR", &address),
            ("WEFT_CONTROLLER", "127.0.0.1:1"),
            ("WEFT_LAME_DUCK", "1ms"),
        ]));
        let shared = Arc::new(Shared::default());
        let control = crate::control::start(&config, &shared, Vec::new());
        let drain = Drain::new();
        start(&config, &control, &drain, &shared, LogHandle::default()).await.unwrap();
        (config, drain, dir, free)
    }

    #[tokio::test]
    async fn what_each_door_answers() {
        let (config, drain, dir, port) = lonely("doors").await;
        let limit = Duration::from_secs(5);
        let ask = async |method: Method, target: &str| {
            call(&config.admin_socket, method, target, limit).await.unwrap()
        };
        assert_eq!(ask(Method::GET, "/live").await, (200, "live\n".into()));
        let (status, body) = ask(Method::GET, "/ready").await;
        assert_eq!((status, body.as_str()), (503, "not ready: certificate, configuration\n"));
        let (status, body) = ask(Method::GET, "/metrics").await;
        assert!(status == 200 && body.contains("\nweft_control_connected 0\n"), "{body}");
        let (status, body) = ask(Method::GET, "/config").await;
        let config_dump: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200);
        assert_eq!(config_dump["settings"]["WEFT_POD_UID"]["value"], "uid-web-1");
        assert_eq!(config_dump["discovery"]["resources"][0]["state"], "pending");
        assert_eq!(ask(Method::GET, "/explain").await.0, 400);
        assert_eq!(ask(Method::POST, "/loglevel?level=loud%3D").await.0, 400);
        assert_eq!(ask(Method::GET, "/drain").await.0, 405);
        assert_eq!(drain.phase(), Phase::Serving);
        assert_eq!(ask(Method::GET, "/nothing").await.0, 404);

        // On the pod's address only three questions are answered.
        for (target, status) in [
            ("/live", 200),
            ("/ready", 503),
            ("/metrics", 200),
            ("/config", 404),
            ("/drain", 404),
            ("/loglevel", 404),
        ] {
            assert_eq!(over_tcp(connect([127, 0, 0, 1], port).await, target).await, status, "{target}");
        }

        assert_eq!(ask(Method::POST, "/drain").await, (200, "drained\n".into()));
        assert!(ask(Method::GET, "/ready").await.1.contains("draining"));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    async fn connect(from: [u8; 4], port: u16) -> tokio::net::TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(([127, 0, 0, 1], port).into()).await.unwrap()
    }

    async fn over_tcp(mut stream: tokio::net::TcpStream, target: &str) -> u16 {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let request = format!("GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split(' ').nth(1).unwrap().parse().unwrap()
    }
}
