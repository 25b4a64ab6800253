//! `weft-echo`: the two programs that the official conformance suite runs in its pods, and a pause.
//!
//! Why our own: the suite's manifests name an image whose source is not a module that can be had, and a test
//! bed that pulls nothing has to make it. It keeps to what the suite reads (`conformance/utils/echo`) and adds
//! nothing that a mesh under test could lean on: it forwards no header, knows no mesh, follows no redirect.
//!
//! One static program under three names: `server`, `client` and `pause` (which only waits, and is what holds a
//! pod's namespaces).

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::{env, fs};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_harness::tls::TrustsAnyone;

const ECHO: &str = "/proto.EchoTestService/Echo";
const USAGE: &str = "Usage:
  server [--port=N]... [--grpc=N]... [--tcp=N]... [--tls=PORT]... [--crt=FILE --key=FILE]
  client URL [--method=METHOD] [-H NAME:VALUE]... [--count=N] [-k]
  pause
Example:
  server --port=8080 --grpc=7070 --tcp=9090
  client http://echo.default:8080/path -H 'X-Who: me' --count=3";

fn main() -> Result<()> {
    let mut args = env::args();
    let called = args.next().unwrap_or_default();
    let mut name = Path::new(&called).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut args: Vec<String> = args.collect();
    if name == "weft-echo" && !args.is_empty() {
        name = args.remove(0);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match name.as_str() {
            "server" => tokio::select! {
                result = serve(args) => result,
                () = told_to_stop() => Ok(()),
            },
            "client" => client(args).await,
            "pause" => {
                told_to_stop().await;
                Ok(())
            }
            "--help" | "-h" => {
                println!("{USAGE}");
                Ok(())
            }
            other => bail!("not called server, client or pause but {other:?}\n{USAGE}"),
        }
    })
}

/// The first program of a pod has no default handlers: a signal that nobody waits for is nothing to it.
async fn told_to_stop() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Http,
    Https,
    Grpc,
    Tcp,
}

async fn serve(args: Vec<String>) -> Result<()> {
    let (mut ports, mut tls, mut crt, mut key) = (Vec::new(), Vec::new(), None, None);
    let mut words = args.into_iter();
    while let Some(word) = words.next() {
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), value.to_owned()),
            None => (word.clone(), words.next().with_context(|| format!("{word} needs a value\n{USAGE}"))?),
        };
        let port = || value.parse::<u16>().with_context(|| format!("{flag}={value}"));
        match flag.as_str() {
            "--port" => ports.push((port()?, Kind::Http)),
            "--grpc" => ports.push((port()?, Kind::Grpc)),
            "--tcp" => ports.push((port()?, Kind::Tcp)),
            "--tls" => tls.push(port()?),
            "--crt" => crt = Some(value),
            "--key" => key = Some(value),
            other => bail!("unknown flag {other}\n{USAGE}"),
        }
    }
    // The manifests name a TLS port twice: as a port, and as one with TLS.
    ports.retain(|(port, _)| !tls.contains(port));
    ports.extend(tls.iter().map(|&port| (port, Kind::Https)));
    let acceptor = match (crt, key) {
        (Some(crt), Some(key)) if !tls.is_empty() => Some(acceptor(&crt, &key)?),
        _ => None,
    };
    let mut listeners = Vec::new();
    for (port, kind) in ports {
        // Both families; a kernel without IPv6 has only the other.
        let listener = match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind(("0.0.0.0", port)).await.with_context(|| format!("port {port}"))?,
        };
        println!("listening on port {port}: {kind:?}");
        listeners.push(tokio::spawn(accept(listener, port, kind, acceptor.clone())));
    }
    ensure!(!listeners.is_empty(), "no port to listen on\n{USAGE}");
    for listener in listeners {
        listener.await??;
    }
    Ok(())
}

fn acceptor(crt: &str, key: &str) -> Result<TlsAcceptor> {
    let chain =
        CertificateDer::pem_file_iter(crt).with_context(|| crt.to_owned())?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key).with_context(|| key.to_owned())?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

async fn accept(listener: TcpListener, port: u16, kind: Kind, tls: Option<TlsAcceptor>) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().await?;
        let tls = tls.clone();
        // A connection that ends badly is its client's affair.
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            match (kind, tls) {
                (Kind::Tcp, _) => echo(stream).await,
                (Kind::Https, Some(tls)) => {
                    let stream = tls.accept(stream).await?;
                    answer(stream, port, peer, kind).await
                }
                (Kind::Https, None) => bail!("no certificate"),
                (Kind::Http | Kind::Grpc, _) => answer(stream, port, peer, kind).await,
            }
        });
    }
}

/// What comes in goes out.
async fn echo(mut stream: TcpStream) -> Result<()> {
    let (mut from, mut to) = stream.split();
    tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await?;
    Ok(())
}

async fn answer<S>(stream: S, port: u16, peer: SocketAddr, kind: Kind) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| async move {
        let answered = match kind {
            Kind::Grpc => grpc(request, port, peer).await,
            Kind::Http | Kind::Https | Kind::Tcp => http(request, port, peer),
        };
        Ok::<_, Infallible>(answered)
    });
    hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(|error| anyhow!(error))
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn http(request: Request<Incoming>, port: u16, peer: SocketAddr) -> Response<Body> {
    let (head, _) = request.into_parts();
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok()).map(str::to_owned);
    let host = host.or_else(|| head.uri.authority().map(ToString::to_string)).unwrap_or_default();
    let url = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let text = lines(port, &host, Some((url, &head.method)), version(head.version), peer, &head.headers);
    let mut response = Response::new(Full::new(Bytes::from(text)).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

async fn grpc(request: Request<Incoming>, port: u16, peer: SocketAddr) -> Response<Body> {
    let (head, body) = request.into_parts();
    let answered = async {
        ensure!(head.uri.path() == ECHO, "unknown method {}", head.uri.path());
        let message = message(&body.collect().await?.to_bytes())?;
        let host = head.uri.authority().map(ToString::to_string).unwrap_or_default();
        let mut text = lines(port, &host, None, "GRPC", peer, &head.headers);
        let _ = writeln!(text, "StatusCode=200\nEcho={message}");
        Ok(framed(&text))
    };
    // 12 is UNIMPLEMENTED.
    let (data, status) = match answered.await {
        Ok(data) => (Some(Frame::data(data)), "0"),
        Err(_) => (None, "12"),
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let frames = data.into_iter().chain([Frame::trailers(trailers)]).map(Ok::<_, Infallible>);
    let mut response = Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The lines that the suite reads; no space around `=` and `:`.
fn lines(
    port: u16,
    host: &str,
    asked: Option<(&str, &Method)>,
    proto: &str,
    peer: SocketAddr,
    headers: &HeaderMap,
) -> String {
    let mut text = format!("ServiceVersion=\nServicePort={port}\nHost={host}\n");
    if let Some((url, method)) = asked {
        let _ = writeln!(text, "URL={url}\nMethod={method}");
    }
    let _ = writeln!(text, "Proto={proto}\nIP={}", peer.ip().to_canonical());
    for (name, value) in headers {
        let _ = writeln!(text, "RequestHeader={name}:{}", String::from_utf8_lossy(value.as_bytes()));
    }
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let _ = writeln!(text, "Hostname={}", hostname.trim());
    text
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}

/// A gRPC frame with a message of one string.
fn framed(text: &str) -> Bytes {
    let mut message = BytesMut::new();
    message.put_u8(0x0a);
    let mut length = text.len();
    while length >= 0x80 {
        message.put_u8((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    message.put_u8(length as u8);
    message.put_slice(text.as_bytes());
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.len() as u32);
    frame.put_slice(&message);
    frame.freeze()
}

/// The string of such a frame.
fn message(frame: &[u8]) -> Result<String> {
    let message = frame.get(5..).context("no gRPC frame")?;
    let Some((0x0a, mut rest)) = message.split_first().map(|(tag, rest)| (*tag, rest)) else {
        return Ok(String::new());
    };
    let (mut length, mut shift) = (0_usize, 0);
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 || shift > 28 {
            break;
        }
    }
    Ok(String::from_utf8_lossy(rest.get(..length).context("a short message")?).into_owned())
}

struct Asked {
    url: Uri,
    method: Method,
    headers: Vec<(String, String)>,
    count: usize,
    insecure: bool,
}

fn asked(args: Vec<String>) -> Result<Asked> {
    let (mut url, mut headers, mut method, mut count, mut insecure) =
        (None, Vec::new(), Method::GET, 1, false);
    let mut words = args.into_iter();
    while let Some(word) = words.next() {
        let mut value = |flag: &str| match word.strip_prefix(&format!("{flag}=")) {
            Some(value) => Ok(value.to_owned()),
            None => words.next().with_context(|| format!("{flag} needs a value")),
        };
        match word.split('=').next().unwrap_or_default() {
            "--method" => method = value("--method")?.parse()?,
            "--count" => count = value("--count")?.parse()?,
            "-H" | "--header" => {
                let header = value("-H")?;
                let (name, value) =
                    header.split_once(':').with_context(|| format!("no colon in {header:?}"))?;
                headers.push((name.trim().to_owned(), value.trim().to_owned()));
            }
            "-k" => insecure = true,
            _ if word.starts_with('-') => bail!("unknown flag {word}\n{USAGE}"),
            _ => url = Some(word.parse::<Uri>().with_context(|| word.clone())?),
        }
    }
    Ok(Asked { url: url.with_context(|| format!("no URL\n{USAGE}"))?, method, headers, count, insecure })
}

async fn client(args: Vec<String>) -> Result<()> {
    let asked = asked(args)?;
    let scheme = asked.url.scheme_str().unwrap_or("http").to_owned();
    let host = asked.url.host().context("no host in the URL")?.trim_matches(['[', ']']).to_owned();
    let standard = if scheme == "https" { 443 } else { 80 };
    let port = asked.url.port_u16().unwrap_or(standard);
    let mut connection = None;
    for number in 0..asked.count {
        // As any client: a connection serves until its server has enough of it.
        let mut sender = match connection.take() {
            Some(sender) => sender,
            None => connect(&scheme, &host, port, asked.insecure).await?,
        };
        let text = one(&asked, &scheme, &mut sender, number).await?;
        println!("{text}");
        if sender.ready().await {
            connection = Some(sender);
        }
    }
    Ok(())
}

enum Sender {
    First(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Second(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn ready(&mut self) -> bool {
        match self {
            Self::First(sender) => sender.ready().await.is_ok(),
            Self::Second(sender) => sender.ready().await.is_ok(),
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        Ok(match self {
            Self::First(sender) => sender.send_request(request).await?,
            Self::Second(sender) => sender.send_request(request).await?,
        })
    }
}

async fn connect(scheme: &str, host: &str, port: u16, insecure: bool) -> Result<Sender> {
    let stream =
        TcpStream::connect((host, port)).await.with_context(|| format!("connecting to {host}:{port}"))?;
    stream.set_nodelay(true)?;
    match scheme {
        "grpc" => {
            let (sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            Ok(Sender::Second(sender))
        }
        "https" => {
            let builder =
                ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
            let config = if insecure {
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(TrustsAnyone))
                    .with_no_client_auth()
            } else {
                builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
            };
            let name = ServerName::try_from(host.to_owned())?;
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            first(stream).await
        }
        "http" => first(stream).await,
        other => bail!("unknown scheme {other}"),
    }
}

async fn first<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) -> Result<Sender> {
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(Sender::First(sender))
}

async fn one(asked: &Asked, scheme: &str, sender: &mut Sender, number: usize) -> Result<String> {
    let grpc = scheme == "grpc";
    let authority = asked.url.authority().context("no host in the URL")?.as_str();
    let mut host = authority.to_owned();
    let mut request = Request::new(Full::new(Bytes::new()));
    for (name, value) in &asked.headers {
        if name.eq_ignore_ascii_case("host") {
            host.clone_from(value);
        } else {
            request.headers_mut().append(name.parse::<HeaderName>()?, value.parse::<HeaderValue>()?);
        }
    }
    if grpc {
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = format!("http://{host}{ECHO}").parse()?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
        *request.body_mut() = Full::new(framed("request"));
    } else {
        *request.method_mut() = asked.method.clone();
        *request.uri_mut() = asked.url.path_and_query().map_or("/", |path| path.as_str()).parse()?;
        request.headers_mut().insert(HOST, host.parse()?);
    }
    let (head, body) = sender.send(request).await?.into_parts();
    let body = body.collect().await?;
    let status = |headers: &HeaderMap| {
        headers.get("grpc-status").and_then(|code| code.to_str().ok()?.parse::<u16>().ok())
    };
    if grpc {
        let code = status(&head.headers).or_else(|| body.trailers().and_then(status));
        if head.status != StatusCode::OK || code != Some(0) {
            let told = head.headers.get("grpc-message").or_else(|| body.trailers()?.get("grpc-message"));
            bail!("grpc-status {code:?}, HTTP status {}, {told:?}", head.status);
        }
    }
    let mut text = format!("[{number}] Url={}\n[{number}] StatusCode={}\n", asked.url, head.status.as_u16());
    for (name, value) in &head.headers {
        let _ =
            writeln!(text, "[{number}] ResponseHeader={name}:{}", String::from_utf8_lossy(value.as_bytes()));
    }
    let body = body.to_bytes();
    let body = if grpc { message(&body)? } else { String::from_utf8_lossy(&body).into_owned() };
    for line in body.lines() {
        let _ = writeln!(text, "[{number} body] {line}");
    }
    Ok(text)
}
