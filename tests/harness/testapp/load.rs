//! A client in open loop, which keeps the id of every request.
//!
//! Why open: a client that waits for its answers asks less of a server that is slow, and never sees what others would.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::Write as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
#[derive(Parser)]
pub(crate) struct Load {
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

struct Shared {
    summary: Mutex<Summary>,
    latencies: Mutex<hdrhistogram::Histogram<u64>>,
    ids: Option<Mutex<std::io::BufWriter<std::fs::File>>>,
}

impl Load {
    pub(crate) async fn run(self) -> Result<()> {
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
