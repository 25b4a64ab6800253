//! The floor: what a pair of sidecars costs when it does nothing but relay HTTP over mutual TLS.
//!
//! Why: a ratio to Envoy says whether Weft is cheaper than the usual choice; only a ratio to a program
//! on the same libraries *without one feature* says what our features cost. So there is no routing, no
//! balancing, no retry, no metric, no timeout and no header but those the protocols need. Frozen: a
//! faster relay would move the yardstick, so change it only when a library's interface forces it.
//!
//! `client`: app's HTTP/1.1 or HTTP/2 → one HTTP/2 connection over TLS 1.3. `server`: the other way round.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow};
use clap::{Parser, ValueEnum};
use http::{HeaderValue, Request, Response, Uri, Version, header};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    rt::Executor,
    service::service_fn,
};
use hyper_util::{rt::TokioIo, server::conn::auto};
use rustls::{ClientConfig, RootCertStore, ServerConfig, server::WebPkiClientVerifier, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[derive(Parser)]
struct Args {
    side: Side,
    #[arg(long)]
    listen: SocketAddr,
    /// Folder with `ca.pem`, `client.pem`, `client.key`, `server.pem`, `server.key`.
    #[arg(long)]
    certs: PathBuf,
    /// Dial this address instead of the original destination's; the port stays.
    #[arg(long)]
    to: Option<IpAddr>,
    /// The app's port that speaks HTTP/2; every other port speaks HTTP/1.1.
    #[arg(long)]
    h2_port: Option<u16>,
    /// A port that carries bytes only.
    #[arg(long)]
    tcp_port: Vec<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Side {
    Client,
    Server,
}

/// Everything of the one thread: the pools need no lock but the one that makes one connection, not two.
struct Relay {
    args: Args,
    connect: TlsConnector,
    accept: TlsAcceptor,
    h2: tokio::sync::Mutex<HashMap<SocketAddr, http2::SendRequest<Incoming>>>,
    h1: RefCell<HashMap<SocketAddr, Vec<http1::SendRequest<Incoming>>>>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (connect, accept) = tls(&args.certs)?;
    let relay = Rc::new(Relay { args, connect, accept, h2: Default::default(), h1: Default::default() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async move {
        let listener = TcpListener::bind(relay.args.listen).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            let relay = relay.clone();
            tokio::task::spawn_local(async move {
                if let Err(e) = relay.serve(stream).await {
                    eprintln!("relay: {e:#}");
                }
            });
        }
    })
}

impl Relay {
    /// One connection, until it ends.
    async fn serve(self: Rc<Self>, stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let original = socket2::SockRef::from(&stream).original_dst_v4()?;
        let mut to = original.as_socket().context("the original destination is no IP address")?;
        to.set_ip(self.args.to.unwrap_or(to.ip()));
        if self.args.tcp_port.contains(&to.port()) {
            return self.carry(to, stream).await;
        }
        let (side, relay) = (self.args.side, self.clone());
        let service = service_fn(move |request| relay.clone().forward(to, request));
        let ended = match side {
            Side::Client => auto::Builder::new(Local).serve_connection(TokioIo::new(stream), service).await,
            Side::Server => {
                let stream = self.accept.accept(stream).await?;
                let server = auto::Builder::new(Local).http2_only();
                server.serve_connection(TokioIo::new(stream), service).await
            }
        };
        ended.map_err(|e| anyhow!(e))
    }

    /// Bytes both ways, until both ends have ended.
    async fn carry(&self, to: SocketAddr, mut stream: TcpStream) -> Result<()> {
        let mut onward = TcpStream::connect(to).await?;
        onward.set_nodelay(true)?;
        match self.args.side {
            Side::Client => {
                let mut onward = self.connect.connect(ServerName::try_from("relay")?, onward).await?;
                copy_bidirectional_with_sizes(&mut stream, &mut onward, BUFFER, BUFFER).await?;
            }
            Side::Server => {
                let mut stream = self.accept.accept(stream).await?;
                copy_bidirectional_with_sizes(&mut stream, &mut onward, BUFFER, BUFFER).await?;
            }
        }
        Ok(())
    }

    /// One request. A failure ends the caller's stream: there is no error response on the floor.
    async fn forward(
        self: Rc<Self>,
        to: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>> {
        let between = matches!(self.args.side, Side::Client);
        if between || self.args.h2_port == Some(to.port()) {
            let request = to_http2(request)?;
            return Ok(self.http2(to, between).await?.send_request(request).await?);
        }
        let request = to_http1(request)?;
        let mut sender = self.http1(to).await?;
        let response = sender.send_request(request).await?;
        self.h1.borrow_mut().entry(to).or_default().push(sender);
        Ok(response)
    }

    /// The one HTTP/2 connection to this address, over TLS when it goes to the other relay.
    async fn http2(&self, to: SocketAddr, over_tls: bool) -> Result<http2::SendRequest<Incoming>> {
        let mut pool = self.h2.lock().await;
        if let Some(sender) = pool.get(&to).filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let sender = if over_tls {
            let stream = self.connect.connect(ServerName::try_from("relay")?, stream).await?;
            let (sender, connection) = http2::handshake(Local, TokioIo::new(stream)).await?;
            tokio::task::spawn_local(connection);
            sender
        } else {
            let (sender, connection) = http2::handshake(Local, TokioIo::new(stream)).await?;
            tokio::task::spawn_local(connection);
            sender
        };
        pool.insert(to, sender.clone());
        Ok(sender)
    }

    /// An HTTP/1.1 connection to the app that is free, or a new one.
    async fn http1(&self, to: SocketAddr) -> Result<http1::SendRequest<Incoming>> {
        if let Some(free) = self.h1.borrow_mut().get_mut(&to) {
            if let Some(at) = free.iter().rposition(http1::SendRequest::is_ready) {
                return Ok(free.swap_remove(at));
            }
            free.retain(|sender| !sender.is_closed());
        }
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(connection);
        sender.ready().await?;
        Ok(sender)
    }
}

/// Four TLS records.
const BUFFER: usize = 64 << 10;

fn to_http2(mut request: Request<Incoming>) -> Result<Request<Incoming>> {
    if request.version() != Version::HTTP_2 {
        let host = request.headers_mut().remove(header::HOST).context("no host")?;
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let uri = Uri::builder().scheme("http").authority(host.as_bytes()).path_and_query(path);
        *request.uri_mut() = uri.build()?;
        request.headers_mut().remove(header::CONNECTION);
    }
    *request.version_mut() = Version::HTTP_2;
    Ok(request)
}

fn to_http1(mut request: Request<Incoming>) -> Result<Request<Incoming>> {
    let host = HeaderValue::from_str(request.uri().authority().context("no authority")?.as_str())?;
    request.headers_mut().insert(header::HOST, host);
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = Uri::builder().path_and_query(path).build()?;
    *request.version_mut() = Version::HTTP_11;
    Ok(request)
}

/// TLS 1.3 with certificates asked for on both sides, no resumption.
fn tls(certs: &Path) -> Result<(TlsConnector, TlsAcceptor)> {
    let chain = |name: &str| -> Result<Vec<CertificateDer<'static>>> {
        Ok(CertificateDer::pem_file_iter(certs.join(name))?.collect::<Result<_, _>>()?)
    };
    let key = |name: &str| PrivateKeyDer::from_pem_file(certs.join(name));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(chain("ca.pem")?);
    let roots = Arc::new(roots);
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain("client.pem")?, key("client.key")?)?;
    client.resumption = rustls::client::Resumption::disabled();
    client.alpn_protocols = vec![b"h2".to_vec()];
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain("server.pem")?, key("server.key")?)?;
    server.send_tls13_tickets = 0;
    server.alpn_protocols = vec![b"h2".to_vec()];
    Ok((Arc::new(client).into(), Arc::new(server).into()))
}

/// hyper's tasks on this thread.
#[derive(Clone, Copy)]
struct Local;

impl<F: Future + 'static> Executor<F> for Local {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move {
            future.await;
        });
    }
}
