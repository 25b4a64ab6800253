//! Servers with habits: HTTP whose delays, failures and end can be chosen, and TCP that echoes.
//!
//! Why a habit is asked for by the request's path where it can be: one server serves a whole test.

use std::{
    convert::Infallible,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{io::AsyncWriteExt as _, net::TcpListener};
#[derive(Parser, Clone)]
pub(crate) struct Http {
    #[arg(long)]
    port: u16,
    /// Sent back as `x-served-by`.
    #[arg(long)]
    name: String,
    /// Waits so long before each answer.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Answers 503 to this share of requests, at once.
    #[arg(long, default_value_t = 0)]
    fail_percent: u64,
    /// What SIGTERM does.
    #[arg(long, value_enum, default_value_t = OnTerm::Drain)]
    on_term: OnTerm,
    /// The id (`x-test-id`) of each request that was read whole is appended here.
    #[arg(long)]
    ids: Option<PathBuf>,
    /// Each request is written down here: method, target, how often a sidecar has marked it, body in hexadecimal.
    #[arg(long)]
    seen: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnTerm {
    /// Ends at once, whatever is in flight.
    Exit,
    /// Stops accepting, finishes what is in flight, then ends.
    Drain,
}

#[derive(Parser)]
pub(crate) struct Tcp {
    #[arg(long)]
    port: u16,
    /// Sent before anything is read, as server-first protocols do.
    #[arg(long)]
    greeting: Option<String>,
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

struct App {
    settings: Http,
    ids: Option<Mutex<std::fs::File>>,
    seen: Option<Mutex<std::fs::File>>,
    served: AtomicU64,
    in_flight: AtomicU64,
    /// Uploads that nobody reads now.
    stalled: AtomicU64,
}

impl Http {
    pub(crate) async fn serve(self) -> Result<()> {
        let listener = listen(self.port)?;
        let file = |path: &Option<PathBuf>| {
            let open =
                |path| std::fs::OpenOptions::new().create(true).append(true).open(path).map(Mutex::new);
            path.as_ref().map(open).transpose()
        };
        let app = Arc::new(App {
            ids: file(&self.ids)?,
            seen: file(&self.seen)?,
            settings: self.clone(),
            served: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            stalled: AtomicU64::new(0),
        });
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        loop {
            tokio::select! {
                _ = term.recv() => break,
                accepted = listener.accept() => {
                    let (stream, _) = accepted?;
                    stream.set_nodelay(true)?;
                    let app = app.clone();
                    tokio::spawn(async move {
                        let service = service_fn(move |request| app.clone().answer(request));
                        let builder = auto::Builder::new(TokioExecutor::new());
                        let serving = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
                        // How a client leaves is its own business.
                        let _ = serving.await;
                    });
                }
            }
        }
        if self.on_term == OnTerm::Drain {
            drop(listener);
            while app.in_flight.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(())
    }
}

impl App {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Answer, Infallible> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let head = request.method() == Method::HEAD;
        let answer = self.answered(request).await;
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let mut answer = answer.unwrap_or_else(|error| text(StatusCode::BAD_REQUEST, error.to_string()));
        if head {
            // Over HTTP/2 the library would send the body.
            if let Some(length) = answer.body().size_hint().exact() {
                answer.headers_mut().insert(header::CONTENT_LENGTH, length.into());
            }
            *answer.body_mut() = Full::new(Bytes::new()).boxed();
        }
        Ok(answer)
    }

    async fn answered(&self, request: Request<Incoming>) -> Result<Answer> {
        let n = self.served.fetch_add(1, Ordering::Relaxed);
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        if path == "/switch"
            && let Some(upgrade) = parts.extensions.remove::<hyper::upgrade::OnUpgrade>()
        {
            return Ok(self.named(switch(upgrade)));
        }
        if let Some(size) = path.strip_prefix("/bytes/") {
            let body = Repeat { left: size.parse()? };
            return Ok(self.named(Response::new(body.boxed())));
        }
        if path == "/forever" {
            // Its head only with its first bytes, if asked so: a stream that is waited for.
            let late = parts.headers.contains_key("x-late");
            if late {
                std::future::pending::<()>().await;
            }
            return Ok(self.named(Response::new(forever().boxed())));
        }
        if parts.headers.get(header::CONTENT_TYPE).is_some_and(|is| is == "application/grpc") {
            return Ok(self.named(self.grpc(&parts, body)?));
        }
        if path == "/sink" {
            let mut body = body;
            let mut read = 0_u64;
            let mut stall = parts
                .uri
                .query()
                .and_then(|query| query.strip_prefix("stall="))
                .map(str::parse)
                .transpose()?;
            while let Some(frame) = body.frame().await {
                read += frame?.data_ref().map_or(0, |data| data.len() as u64);
                if let Some(seconds) = stall.take_if(|_| read > 1_000_000) {
                    self.stalled.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                    self.stalled.fetch_sub(1, Ordering::Relaxed);
                }
            }
            return Ok(self.named(text(StatusCode::OK, read.to_string())));
        }
        if path.starts_with("/ignore") {
            self.note(&parts, &[])?;
            return Ok(self.named(text(StatusCode::OK, "ok")));
        }
        let collected = body.collect().await.context("reading the request's body")?;
        let trailers = collected.trailers().cloned();
        let body = collected.to_bytes();
        self.note(&parts, &body)?;
        if let Some(length) = parts.headers.get("x-test-length")
            && length.to_str()?.parse::<usize>()? != body.len()
        {
            return Ok(
                self.named(text(StatusCode::BAD_REQUEST, format!("{} of {length:?} bytes", body.len())))
            );
        }
        self.identified(&parts)?;
        if n % 100 < self.settings.fail_percent {
            return Ok(self.named(text(StatusCode::SERVICE_UNAVAILABLE, "as told")));
        }
        if self.settings.delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(self.settings.delay_ms)).await;
        }
        let answer = match path.as_str() {
            "/echo" => Response::new(Full::new(body).boxed()),
            "/head" => text(StatusCode::OK, describe(&parts)),
            "/stalled" => text(StatusCode::OK, self.stalled.load(Ordering::Relaxed).to_string()),
            "/trailers" => {
                let sent = trailers.map(|t| format!("{t:?}")).unwrap_or_default();
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", HeaderValue::from_static("42"));
                // Frames without a length known before: chunked on HTTP/1.1, as trailers need.
                let frames =
                    [Ok(Frame::data(Bytes::from(format!("sent {sent}")))), Ok(Frame::trailers(trailers))];
                let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
                let mut answer = Response::new(BodyExt::boxed(body));
                answer.headers_mut().insert("trailer", HeaderValue::from_static("x-sum"));
                answer
            }
            _ if parts.headers.contains_key("x-tell") => text(StatusCode::OK, describe(&parts)),
            _ => match path.strip_prefix("/status/") {
                Some(status) => text(status.parse()?, "as asked"),
                None => text(StatusCode::OK, "ok"),
            },
        };
        Ok(self.named(answer))
    }

    /// Writes down the id of a request that was read, or of a stream that has begun.
    fn identified(&self, parts: &http::request::Parts) -> Result<()> {
        if let (Some(ids), Some(id)) = (&self.ids, parts.headers.get("x-test-id")) {
            let mut file = ids.lock().unwrap_or_else(PoisonError::into_inner);
            writeln!(file, "{}", id.to_str()?)?;
        }
        Ok(())
    }

    /// Any gRPC method: sends back each message as it comes, and a status when there are no more.
    fn grpc(&self, parts: &http::request::Parts, body: Incoming) -> Result<Answer> {
        use futures_util::StreamExt as _;
        self.identified(parts)?;
        let mut ok = HeaderMap::new();
        ok.insert("grpc-status", HeaderValue::from_static("0"));
        let end = futures_util::stream::iter([Ok(Frame::trailers(ok))]);
        // A client that breaks off has no status to read.
        let echoed = http_body_util::BodyDataStream::new(body);
        let echoed = echoed.take_while(|data| std::future::ready(data.is_ok()));
        let echoed =
            echoed.filter_map(|data| std::future::ready(data.ok().map(|data| Ok(Frame::data(data)))));
        let mut answer = Response::new(BodyExt::boxed(http_body_util::StreamBody::new(echoed.chain(end))));
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Ok(answer)
    }

    fn note(&self, parts: &http::request::Parts, body: &[u8]) -> Result<()> {
        let Some(seen) = &self.seen else { return Ok(()) };
        let marks = parts.headers.get_all("traceparent").iter().count();
        let hex: String = body.iter().map(|byte| format!("{byte:02x}")).collect();
        let body = if hex.is_empty() { "-" } else { &hex };
        let mut file = seen.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(file, "{} {} {marks} {body}", parts.method, parts.uri.path())?;
        Ok(())
    }

    fn named(&self, mut answer: Answer) -> Answer {
        if let Ok(name) = HeaderValue::from_str(&self.settings.name) {
            answer.headers_mut().insert("x-served-by", name);
        }
        answer
    }
}

/// The request's head as the app saw it, a line each.
fn describe(parts: &http::request::Parts) -> String {
    let mut lines = format!("{} {} {:?}\n", parts.method, parts.uri, parts.version);
    for (name, value) in &parts.headers {
        lines.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    }
    lines
}

/// Switches to a protocol that sends back what it gets.
fn switch(upgrade: hyper::upgrade::OnUpgrade) -> Answer {
    tokio::spawn(async move {
        // How a client leaves is its own business.
        if let Ok(upgraded) = upgrade.await {
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        }
    });
    let mut answer = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = answer.headers_mut();
    headers.insert("connection", HeaderValue::from_static("upgrade"));
    headers.insert("upgrade", HeaderValue::from_static("echo"));
    answer
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()).boxed());
    *answer.status_mut() = status;
    answer
}

/// A line, and then nothing, without an end.
fn forever() -> impl http_body::Body<Data = Bytes, Error = Infallible> + Send + Sync {
    use futures_util::StreamExt as _;
    let line = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"begun\n")))]);
    http_body_util::StreamBody::new(line.chain(futures_util::stream::pending()))
}

/// So many bytes, in pieces of 64 KiB.
struct Repeat {
    left: u64,
}

impl http_body::Body for Repeat {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        static PIECE: [u8; 64 * 1024] = [b'x'; 64 * 1024];
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let n = self.left.min(PIECE.len() as u64);
        self.left -= n;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&PIECE[..n as usize])))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

impl Tcp {
    pub(crate) async fn serve(self) -> Result<()> {
        let listener = listen(self.port)?;
        loop {
            let (mut stream, _) = listener.accept().await?;
            let greeting = self.greeting.clone();
            tokio::spawn(async move {
                if let Some(greeting) = greeting {
                    stream.write_all(greeting.as_bytes()).await?;
                }
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await?;
                write.shutdown().await
            });
        }
    }
}

/// On both families, as most servers do.
fn listen(port: u16) -> Result<TcpListener> {
    use socket2::{Domain, Socket, Type};
    let v6 = Socket::new(Domain::IPV6, Type::STREAM, None).and_then(|socket| {
        socket.set_only_v6(false)?;
        Ok(socket)
    });
    let (socket, address) = match v6 {
        Ok(socket) => (socket, SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port))),
        Err(_) => (
            Socket::new(Domain::IPV4, Type::STREAM, None)?,
            SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, port)),
        ),
    };
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1_024)?;
    Ok(TcpListener::from_std(socket.into())?)
}
