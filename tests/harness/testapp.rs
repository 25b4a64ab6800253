//! The apps that the tests run behind and in front of sidecars: an HTTP server whose habits can be chosen, and a
//! client in open loop that keeps the id of every request.
//!
//! Why a program and not tasks in the test: an app must be killable, must see SIGTERM, and must live in a pod's
//! own network namespace, like the real thing.

use std::{
    collections::BTreeMap,
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
    time::{Duration, Instant},
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
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};

/// Test app: a server with habits, or a client that counts.
#[derive(Parser)]
enum Cli {
    /// HTTP/1.1 and HTTP/2 (prior knowledge) server.
    Http(Http),
    /// TCP server that sends back what it gets, after an optional greeting.
    Tcp(Tcp),
    /// Client in open loop; prints a JSON summary.
    Load(Load),
    /// TCP client that holds many connections open, as slow as it is told.
    Hold(Hold),
}

#[derive(Parser, Clone)]
struct Http {
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
struct Tcp {
    #[arg(long)]
    port: u16,
    /// Sent before anything is read, as server-first protocols do.
    #[arg(long)]
    greeting: Option<String>,
}

#[derive(Parser)]
struct Load {
    #[arg(long)]
    url: String,
    /// Requests per second.
    #[arg(long)]
    rate: u64,
    #[arg(long)]
    seconds: u64,
    /// Every second request is a POST with a body.
    #[arg(long)]
    half_post: bool,
    /// Stops early when this file exists.
    #[arg(long)]
    until: Option<PathBuf>,
    /// What has come of it so far, as the summary, several times a second; and the summary at the end.
    #[arg(long)]
    status: Option<PathBuf>,
    /// Ids of what was sent, with their outcome, are appended here.
    #[arg(long)]
    ids: Option<PathBuf>,
    /// Clients; each has a connection of its own for each kind, and one request at a time.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// What is sent, in turn.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "h1")]
    kinds: Vec<Kind>,
    /// gRPC streams beside the requests: so many are open at any time, on one connection.
    #[arg(long, default_value_t = 0)]
    streams: usize,
    /// How long each of them lives.
    #[arg(long, default_value_t = 1)]
    stream_seconds: u64,
}

/// How a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// HTTP/1.1.
    H1,
    /// HTTP/2.
    H2,
    /// A gRPC call of one message each way.
    Grpc,
}

#[derive(Parser, Clone)]
struct Hold {
    #[arg(long)]
    address: SocketAddr,
    #[arg(long)]
    count: usize,
    /// Sent on each connection at once, C escapes understood.
    #[arg(long, default_value = "")]
    send: String,
    /// Then a byte of this, again and again, so often.
    #[arg(long, default_value = "")]
    trickle: String,
    #[arg(long, default_value_t = 1_000)]
    every_ms: u64,
    /// Reads no answer, and has little room for one.
    #[arg(long)]
    deaf: bool,
    /// Where the counts stand, as JSON, several times a second.
    #[arg(long)]
    status: PathBuf,
}

/// Where `hold` stands.
#[derive(Default)]
struct Held {
    opened: AtomicU64,
    failed: AtomicU64,
    ended: AtomicU64,
    answered: AtomicU64,
}

/// What the client saw.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Summary {
    done: bool,
    sent: u64,
    ok: u64,
    failed: u64,
    statuses: BTreeMap<String, u64>,
    served_by: BTreeMap<String, u64>,
    reasons: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    max_ms: f64,
    slow: u64,
    streams: Streams,
}

/// What became of gRPC streams.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Streams {
    ended: u64,
    failed: u64,
    messages: u64,
    longest_s: f64,
    errors: BTreeMap<String, u64>,
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match Cli::parse() {
            Cli::Http(http) => http.serve().await,
            Cli::Tcp(tcp) => tcp.serve().await,
            Cli::Load(load) => load.run().await,
            Cli::Hold(hold) => hold.run().await,
        }
    })
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
    async fn serve(self) -> Result<()> {
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
    async fn serve(self) -> Result<()> {
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

impl Hold {
    async fn run(self) -> Result<()> {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let held = Arc::new(Held::default());
        // As many at a time as a backlog takes without losing a SYN.
        let room = Arc::new(tokio::sync::Semaphore::new(128));
        for _ in 0..self.count {
            let (hold, held, room) = (self.clone(), held.clone(), room.clone());
            tokio::spawn(async move {
                let opened = {
                    let _permit = room.acquire().await;
                    tokio::time::timeout(Duration::from_secs(10), hold.open()).await
                };
                match opened {
                    Ok(Ok(stream)) => {
                        held.opened.fetch_add(1, Ordering::Relaxed);
                        hold.keep(stream, &held).await;
                        held.ended.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(Err(_)) | Err(_) => {
                        held.failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        loop {
            let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let status = serde_json::json!({
                "opened": n(&held.opened), "failed": n(&held.failed), "ended": n(&held.ended),
                "answered": n(&held.answered),
            });
            let written = self.status.with_extension("new");
            std::fs::write(&written, status.to_string())?;
            std::fs::rename(&written, &self.status)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn open(&self) -> Result<TcpStream> {
        let socket = match self.address {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        if self.deaf {
            socket.set_recv_buffer_size(4 * 1024)?;
        }
        let mut stream = socket.connect(self.address).await?;
        stream.set_nodelay(true)?;
        let send = self.send.replace("\\r", "\r").replace("\\n", "\n");
        stream.write_all(send.as_bytes()).await?;
        Ok(stream)
    }

    /// Until the other side ends it.
    async fn keep(&self, stream: TcpStream, held: &Held) {
        let (mut read, mut write) = stream.into_split();
        let reading = async {
            if self.deaf {
                return std::future::pending().await;
            }
            let mut buffer = [0; 1_024];
            let mut first = true;
            while tokio::io::AsyncReadExt::read(&mut read, &mut buffer).await.is_ok_and(|n| n > 0) {
                if std::mem::take(&mut first) {
                    held.answered.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let trickling = async {
            for byte in self.trickle.bytes().cycle() {
                tokio::time::sleep(Duration::from_millis(self.every_ms)).await;
                if write.write_all(&[byte]).await.is_err() {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! { () = reading => {}, () = trickling => {} }
    }
}

struct Shared {
    summary: Mutex<Summary>,
    latencies: Mutex<hdrhistogram::Histogram<u64>>,
    ids: Option<Mutex<std::io::BufWriter<std::fs::File>>>,
}

impl Load {
    async fn run(self) -> Result<()> {
        let uri: http::Uri = self.url.parse()?;
        let authority = uri.authority().context("the URL needs a host")?.to_string();
        let ids = self.ids.as_ref().map(|path| {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            file.map(|file| Mutex::new(std::io::BufWriter::new(file)))
        });
        let shared = Arc::new(Shared {
            summary: Mutex::default(),
            latencies: Mutex::new(hdrhistogram::Histogram::new(3)?),
            ids: ids.transpose()?,
        });
        let (tell, asked) = async_queue(self.connections);
        let target = Arc::new(Target {
            authority,
            path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
            kinds: self.kinds.clone(),
            half_post: self.half_post,
        });
        let mut workers = Vec::new();
        for queue in asked {
            workers.push(tokio::spawn(client(queue, shared.clone(), target.clone())));
        }
        let (stop, stopped) = tokio::sync::watch::channel(());
        let connection = Arc::new(tokio::sync::Mutex::new(None));
        for n in 0..self.streams {
            let stream = LongStream {
                name: format!("{}-s{n}", std::process::id()),
                lives: Duration::from_secs(self.stream_seconds),
                connection: connection.clone(),
                target: target.clone(),
                stopped: stopped.clone(),
            };
            workers.push(tokio::spawn(stream.again_and_again(shared.clone())));
        }
        drop(stopped);
        let started = Instant::now();
        let total = self.rate * self.seconds;
        for n in 0..total {
            // Open loop: latency counts from when a request was due, not from when it could be sent.
            let due = started + Duration::from_nanos(n * 1_000_000_000 / self.rate);
            tokio::time::sleep_until(due.into()).await;
            if n % 32 == 0 {
                self.tell(&shared.summary.lock().unwrap_or_else(PoisonError::into_inner))?;
                if self.until.as_ref().is_some_and(|path| path.exists()) {
                    break;
                }
            }
            tell.send((n, due)).await?;
        }
        drop((tell, stop));
        for worker in workers {
            worker.await?;
        }
        let mut summary = std::mem::take(&mut *shared.summary.lock().unwrap_or_else(PoisonError::into_inner));
        let latencies = shared.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = |q: f64| latencies.value_at_quantile(q) as f64 / 1_000.0;
        (summary.p50_ms, summary.p99_ms, summary.p999_ms) = (ms(0.5), ms(0.99), ms(0.999));
        summary.max_ms = latencies.max() as f64 / 1_000.0;
        summary.slow = latencies.count_between(SLOW_MICROS, u64::MAX);
        if let Some(ids) = &shared.ids {
            ids.lock().unwrap_or_else(PoisonError::into_inner).flush()?;
        }
        summary.done = true;
        self.tell(&summary)?;
        println!("{}", serde_json::to_string(&summary)?);
        Ok(())
    }

    fn tell(&self, summary: &Summary) -> Result<()> {
        let Some(path) = &self.status else { return Ok(()) };
        // Renamed into place: a reader never sees half of it.
        let written = path.with_extension("new");
        std::fs::write(&written, serde_json::to_string(summary)?)?;
        Ok(std::fs::rename(&written, path)?)
    }
}

/// No request of a test takes so long unless it has waited for something to time out.
const SLOW_MICROS: u64 = 900_000;

type Due = (u64, Instant);

/// Receivers that take turns.
type Queue = Arc<tokio::sync::Mutex<tokio::sync::mpsc::Receiver<Due>>>;

/// One sender, many receivers.
fn async_queue(n: usize) -> (tokio::sync::mpsc::Sender<Due>, Vec<Queue>) {
    let (tell, asked) = tokio::sync::mpsc::channel(100_000);
    let asked = Arc::new(tokio::sync::Mutex::new(asked));
    (tell, vec![asked; n])
}

/// What is asked, and how.
struct Target {
    authority: String,
    path: String,
    kinds: Vec<Kind>,
    half_post: bool,
}

async fn client(queue: Queue, shared: Arc<Shared>, target: Arc<Target>) {
    let mut connections = Connections::default();
    loop {
        let due = queue.lock().await.recv().await;
        let Some((n, due)) = due else { return };
        let id = format!("{}-{n}", std::process::id());
        let kinds = target.kinds.len().max(1) as u64;
        let kind = target.kinds.get((n % kinds) as usize).copied().unwrap_or(Kind::H1);
        let post = kind == Kind::Grpc || target.half_post && (n / kinds) % 2 == 1;
        let outcome = exchange(&mut connections, &target, kind, &id, post).await;
        let mut summary = shared.summary.lock().unwrap_or_else(PoisonError::into_inner);
        summary.sent += 1;
        let ok = match &outcome {
            Ok(answer) => {
                *summary.statuses.entry(answer.status.as_str().to_owned()).or_default() += 1;
                *summary.served_by.entry(answer.served_by.clone()).or_default() += 1;
                if !answer.reason.is_empty() {
                    *summary.reasons.entry(answer.reason.clone()).or_default() += 1;
                }
                answer.status.is_success() && answer.whole
            }
            Err(error) => {
                *summary.errors.entry(format!("{error:#}")).or_default() += 1;
                connections = Connections::default();
                false
            }
        };
        if ok {
            summary.ok += 1
        } else {
            summary.failed += 1
        }
        drop(summary);
        let took = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
        let _ = shared.latencies.lock().unwrap_or_else(PoisonError::into_inner).record(took);
        shared.note(&id, post, ok);
    }
}

impl Shared {
    fn note(&self, id: &str, post: bool, ok: bool) {
        if let Some(ids) = &self.ids {
            let kind = if post { "POST" } else { "GET" };
            let mut ids = ids.lock().unwrap_or_else(PoisonError::into_inner);
            // A full disk shows in the comparison of ids.
            let _ = writeln!(ids, "{id} {kind} {}", if ok { "ok" } else { "failed" });
        }
    }
}

struct Seen {
    status: StatusCode,
    served_by: String,
    reason: String,
    /// Nothing of the answer is missing.
    whole: bool,
}

type Sending = BoxBody<Bytes, Infallible>;
type Http1 = hyper::client::conn::http1::SendRequest<Sending>;
type Http2 = hyper::client::conn::http2::SendRequest<Sending>;

/// One client's, to one address.
#[derive(Default)]
struct Connections {
    h1: Option<Http1>,
    h2: Option<Http2>,
}

async fn dial(authority: &str) -> Result<TokioIo<TcpStream>> {
    let address = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
    let stream = TcpStream::connect(&address).await.context("connecting")?;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(stream))
}

async fn http2(connection: &mut Option<Http2>, authority: &str) -> Result<Http2> {
    if connection.as_ref().is_none_or(Http2::is_closed) {
        let io = dial(authority).await?;
        let (sender, driving) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.context("handshake")?;
        tokio::spawn(driving);
        *connection = Some(sender);
    }
    connection.clone().context("a connection")
}

/// The head of a request; gRPC's has the marks of one.
fn asking(target: &Target, kind: Kind, id: &str, post: bool, body: Sending) -> Result<Request<Sending>> {
    let mut request = Request::new(body);
    *request.uri_mut() = match kind {
        Kind::H1 => target.path.parse()?,
        Kind::H2 | Kind::Grpc => format!("http://{}{}", target.authority, target.path).parse()?,
    };
    *request.method_mut() = if post { Method::POST } else { Method::GET };
    let headers = request.headers_mut();
    match kind {
        Kind::H1 => drop(headers.insert("host", HeaderValue::from_str(&target.authority)?)),
        Kind::H2 => {}
        Kind::Grpc => {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
    }
    headers.insert("x-test-id", HeaderValue::from_str(id)?);
    Ok(request)
}

/// A gRPC message of so many bytes.
fn message(bytes: usize) -> Bytes {
    let mut message = vec![0];
    message.extend_from_slice(&(bytes as u32).to_be_bytes());
    message.resize(5 + bytes, b'b');
    message.into()
}

async fn exchange(
    connections: &mut Connections,
    target: &Target,
    kind: Kind,
    id: &str,
    post: bool,
) -> Result<Seen> {
    let sent = match kind {
        Kind::Grpc => message(1_000),
        Kind::H1 | Kind::H2 if post => Bytes::from(vec![b'b'; 1_000]),
        Kind::H1 | Kind::H2 => Bytes::new(),
    };
    let mut request = asking(target, kind, id, post, Full::new(sent.clone()).boxed())?;
    request.headers_mut().insert("x-test-length", sent.len().into());
    let sending = async {
        match kind {
            Kind::H1 => {
                if connections.h1.as_ref().is_none_or(Http1::is_closed) {
                    let io = dial(&target.authority).await?;
                    let (sender, driving) =
                        hyper::client::conn::http1::handshake(io).await.context("handshake")?;
                    tokio::spawn(driving);
                    connections.h1 = Some(sender);
                }
                let sender = connections.h1.as_mut().context("a connection")?;
                sender.ready().await.context("waiting for the connection")?;
                sender.send_request(request).await.context("sending")
            }
            Kind::H2 | Kind::Grpc => {
                let mut sender = http2(&mut connections.h2, &target.authority).await?;
                sender.ready().await.context("waiting for the connection")?;
                sender.send_request(request).await.context("sending")
            }
        }
    };
    let response =
        tokio::time::timeout(Duration::from_secs(30), sending).await.context("no answer in 30 s")??;
    let text = |name: &str| {
        response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
    };
    let (status, served_by, reason) = (response.status(), text("x-served-by"), text("weft-reason"));
    let answer = response.into_body().collect().await.context("reading the answer")?;
    let whole = kind != Kind::Grpc || {
        let ok =
            answer.trailers().and_then(|trailers| trailers.get("grpc-status")).is_some_and(|is| is == "0");
        ok && answer.to_bytes() == sent
    };
    Ok(Seen { status, served_by, reason, whole })
}

/// A gRPC stream that says something ten times a second, and is answered each time.
struct LongStream {
    name: String,
    lives: Duration,
    connection: Arc<tokio::sync::Mutex<Option<Http2>>>,
    target: Arc<Target>,
    /// Closed when the load ends.
    stopped: tokio::sync::watch::Receiver<()>,
}

impl LongStream {
    async fn again_and_again(self, shared: Arc<Shared>) {
        for n in 0.. {
            let (id, begun, mut messages) = (format!("{}-{n}", self.name), Instant::now(), 0);
            let ended = self.once(&id, &mut messages).await;
            shared.note(&id, true, ended.is_ok());
            let mut summary = shared.summary.lock().unwrap_or_else(PoisonError::into_inner);
            let streams = &mut summary.streams;
            streams.messages += messages;
            streams.longest_s = streams.longest_s.max(begun.elapsed().as_secs_f64());
            match ended {
                Ok(()) => streams.ended += 1,
                Err(error) => {
                    streams.failed += 1;
                    *streams.errors.entry(format!("{error:#}")).or_default() += 1;
                }
            }
            if self.stopped.has_changed().is_err() {
                return;
            }
        }
    }

    async fn once(&self, id: &str, messages: &mut u64) -> Result<()> {
        let mut sender = http2(&mut *self.connection.lock().await, &self.target.authority).await?;
        let (say, said) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
        let body = http_body_util::StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(said));
        let request = asking(&self.target, Kind::Grpc, id, true, BodyExt::boxed(body))?;
        let patience = Duration::from_secs(30);
        let response = tokio::time::timeout(patience, sender.send_request(request));
        let response = response.await.context("no head in 30 s")?.context("opening")?;
        if let Some(reason) = response.headers().get("weft-reason") {
            anyhow::bail!("{reason:?}");
        }
        let (mut body, ends) = (response.into_body(), Instant::now() + self.lives);
        let message = message(20);
        let mut heard = 0;
        while Instant::now() < ends && self.stopped.has_changed().is_ok() {
            say.send(Ok(Frame::data(message.clone()))).await.context("saying")?;
            *messages += 1;
            while heard < *messages as usize * message.len() {
                let frame = tokio::time::timeout(patience, body.frame()).await.context("no echo in 30 s")?;
                let frame = frame.context("it ended early")?.context("hearing")?;
                let data = frame.into_data().ok().context("its status came early")?;
                heard += data.len();
            }
            let mut stopped = self.stopped.clone();
            // Either the load ends, or it is time for the next word.
            let _ = tokio::time::timeout(Duration::from_millis(100), stopped.changed()).await;
        }
        drop(say);
        let rest = tokio::time::timeout(patience, body.collect()).await.context("no end in 30 s")?;
        let rest = rest.context("ending")?;
        let status = rest.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
        anyhow::ensure!(status.as_ref().is_some_and(|is| is == "0"), "status {status:?}");
        Ok(())
    }
}
