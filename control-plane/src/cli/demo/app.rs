//! The shop that the demo runs: what is behind the sidecars, and who calls.
//!
//! Why own servers: the demo must know which pod answered and make one of them slow and another fail. They are
//! ordinary programs that know nothing of a mesh: plain HTTP, gRPC and SQL to fixed addresses.
//!
//! `load → web (HTTP/1.1) → api (HTTP/1.1) → prices (gRPC), db (MariaDB)`

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, uri::PathAndQuery};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::Incoming,
    client::conn::http1::{SendRequest, handshake},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic_prost::ProstCodec;

use super::mysql::Session;

#[derive(Debug, Args)]
pub(crate) struct AppArgs {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// What users see
    Web {
        #[arg(long)]
        name: String,
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        api: SocketAddr,
    },
    /// What the web asks
    Api(ApiArgs),
    /// The gRPC service
    Prices {
        #[arg(long)]
        name: String,
        #[arg(long)]
        listen: SocketAddr,
    },
    /// The users: an open loop, one line of JSON a request
    Load {
        #[arg(long)]
        web: SocketAddr,
        /// Requests a second
        #[arg(long)]
        rate: f64,
        /// What every request carries, and no packet may show
        #[arg(long)]
        secret: String,
    },
}

#[derive(Clone, Debug, Args)]
struct ApiArgs {
    #[arg(long)]
    name: String,
    #[arg(long)]
    version: String,
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    prices: SocketAddr,
    #[arg(long)]
    db: SocketAddr,
    /// Milliseconds that it takes longer than its siblings
    #[arg(long, default_value_t = 0)]
    slow_ms: u64,
    /// Of a hundred requests it fails so many
    #[arg(long, default_value_t = 0)]
    fail_percent: u32,
}

/// One request of a user, as the user saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Seen {
    /// Microseconds.
    pub(super) us: u64,
    /// 0: no answer.
    pub(super) status: u16,
    /// The api's pod that answered.
    pub(super) pod: String,
    /// Its version.
    pub(super) version: String,
    /// What was wrong; empty: nothing.
    pub(super) error: String,
}

pub(crate) fn main(args: &AppArgs) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        match &args.role {
            Role::Web { name, listen, api } => {
                let web = Arc::new(Web { name: name.clone(), api: Http::new(*api) });
                serve(*listen, move |request| {
                    let web = web.clone();
                    async move { web.answer(request).await }
                })
                .await
            }
            Role::Api(args) => {
                let api = Arc::new(Api::new(args.clone())?);
                serve(args.listen, move |request| {
                    let api = api.clone();
                    async move { api.answer(request).await }
                })
                .await
            }
            Role::Prices { name, listen } => {
                let prices = Prices { pod: name.as_str().into() };
                Ok(Server::builder().add_service(prices).serve(*listen).await?)
            }
            Role::Load { web, rate, secret } => load(*web, *rate, secret).await,
        }
    })
}

/// A plain HTTP/1.1 server. A handler's error is a 502 that says why.
async fn serve<F>(
    listen: SocketAddr,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) -> Result<()>
where
    F: Future<Output = Result<Response<Full<Bytes>>>> + Send,
{
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await.unwrap_or_else(|error| failure(&error))) }
            });
            // A caller that goes away is its own business.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn failure(error: &anyhow::Error) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{error:#}\n")));
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    response
}

/// The front: hands what the api says to the user.
struct Web {
    name: String,
    api: Http,
}

impl Web {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let (head, body) = request.into_parts();
        let body =
            Limited::new(body, MAX_BODY).collect().await.map_err(|e| anyhow!("reading: {e}"))?.to_bytes();
        let path = match (&head.method, head.uri.path()) {
            (&Method::GET, "/") => "/items".to_owned(),
            (&Method::GET, path) if path.starts_with("/product/") => path.replacen("/product/", "/items/", 1),
            (&Method::POST, "/checkout") => "/orders".to_owned(),
            _ => return Ok(status(StatusCode::NOT_FOUND)),
        };
        let (mut answer, text) = self
            .api
            .call(head.method, &path, "api.shop", &passed_on(&head.headers), body)
            .await
            .context("api")?;
        answer.headers.insert(POD_WEB, HeaderValue::from_str(&self.name)?);
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = answer.status;
        for name in [POD, VERSION, POD_WEB, WEFT_REASON] {
            if let Some(value) = answer.headers.remove(name) {
                response.headers_mut().insert(name, value);
            }
        }
        Ok(response)
    }
}

/// The shop's logic.
struct Api {
    args: ApiArgs,
    prices: Channel,
    sessions: Mutex<Vec<(Session, u32)>>,
}

impl Api {
    fn new(args: ApiArgs) -> Result<Self> {
        let prices = Endpoint::from_shared(format!("http://{}", args.prices))?.connect_lazy();
        Ok(Self { args, prices, sessions: Mutex::default() })
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let (head, body) = request.into_parts();
        let body =
            Limited::new(body, MAX_BODY).collect().await.map_err(|e| anyhow!("reading: {e}"))?.to_bytes();
        let jitter = rand::rng().random_range(0..3_000);
        tokio::time::sleep(Duration::from_micros(1_000 + jitter) + Duration::from_millis(self.args.slow_ms))
            .await;
        if rand::rng().random_range(0..100) < self.args.fail_percent {
            return Ok(self.signed(status(StatusCode::SERVICE_UNAVAILABLE)));
        }
        let secret = head.headers.get(SECRET).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let path = head.uri.path();
        let item = path.rsplit('/').next().and_then(|id| id.parse::<u32>().ok()).unwrap_or(0) % ITEMS + 1;
        let text = match (&head.method, path) {
            (&Method::GET, "/items") => format!("{}\n", self.quote(item, secret).await?),
            (&Method::GET, path) if path.starts_with("/items/") => {
                let prices = self.watch(item, secret).await?;
                format!("{} {prices:?}\n", self.name_of(item, secret).await?)
            }
            (&Method::POST, "/orders") => {
                let cents = self.quote(item, secret).await?;
                self.order(item, cents, secret, body.len()).await?;
                "ordered\n".to_owned()
            }
            _ => return Ok(self.signed(status(StatusCode::NOT_FOUND))),
        };
        Ok(self.signed(Response::new(Full::from(text))))
    }

    fn signed(&self, mut response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
        for (name, value) in [(POD, &self.args.name), (VERSION, &self.args.version)] {
            if let Ok(value) = HeaderValue::from_str(value) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }

    async fn quote(&self, item: u32, note: &str) -> Result<u64> {
        let mut grpc = tonic::client::Grpc::new(self.prices.clone());
        grpc.ready().await.context("prices")?;
        let asked = tonic::Request::new(QuoteRequest { item, note: note.to_owned() });
        let path = PathAndQuery::from_static(QUOTE);
        let codec = ProstCodec::<QuoteRequest, QuoteReply>::default();
        Ok(grpc.unary(asked, path, codec).await.context("prices")?.into_inner().cents)
    }

    async fn watch(&self, item: u32, note: &str) -> Result<Vec<u64>> {
        let mut grpc = tonic::client::Grpc::new(self.prices.clone());
        grpc.ready().await.context("prices")?;
        let asked = tonic::Request::new(QuoteRequest { item, note: note.to_owned() });
        let path = PathAndQuery::from_static(WATCH);
        let codec = ProstCodec::<QuoteRequest, QuoteReply>::default();
        let mut stream = grpc.server_streaming(asked, path, codec).await.context("prices")?.into_inner();
        let mut prices = Vec::new();
        while let Some(reply) = stream.message().await.context("prices")? {
            prices.push(reply.cents);
        }
        ensure!(prices.len() == STREAMED, "prices: {} of {STREAMED} messages arrived", prices.len());
        Ok(prices)
    }

    async fn name_of(&self, item: u32, secret: &str) -> Result<String> {
        let rows =
            self.sql(&format!("SELECT name FROM items WHERE id = {item} /* {} */", quoted(secret))).await?;
        rows.into_iter().flatten().flatten().next().with_context(|| format!("there is no item {item}"))
    }

    async fn order(&self, item: u32, cents: u64, secret: &str, size: usize) -> Result<()> {
        let note = quoted(secret);
        let sql = format!(
            "INSERT INTO orders (item, cents, note, size) VALUES ({item}, {cents}, '{note}', {size})"
        );
        self.sql(&sql).await.map(drop)
    }

    /// On a session that is open already, if there is one; a session serves a while and is then closed, as by
    /// any pool.
    async fn sql(&self, sql: &str) -> Result<Vec<super::mysql::Row>> {
        let idle = self.sessions().pop();
        let (mut session, used) = match idle {
            Some(idle) => idle,
            None => (Session::open(self.args.db, "app", "shop").await.context("db")?, 0),
        };
        let rows = session.query(sql).await.context("db")?;
        if used < SESSION_USES {
            self.sessions().push((session, used + 1));
        }
        Ok(rows)
    }

    fn sessions(&self) -> std::sync::MutexGuard<'_, Vec<(Session, u32)>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls one address over HTTP/1.1 connections that are kept.
struct Http {
    address: SocketAddr,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Http {
    fn new(address: SocketAddr) -> Self {
        Self { address, idle: Mutex::default() }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        host: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<(http::response::Parts, Bytes)> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, host);
        if let Some(to) = request.headers_mut() {
            to.extend(headers.clone());
        }
        let request = request.body(Full::new(body))?;
        let mut sender = self.sender().await?;
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body =
            Limited::new(body, MAX_BODY).collect().await.map_err(|e| anyhow!("reading: {e}"))?.to_bytes();
        // Usable again once the connection has noticed that the body is through.
        if sender.ready().await.is_ok() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        }
        Ok((head, body))
    }

    async fn sender(&self) -> Result<SendRequest<Full<Bytes>>> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(sender) = idle else { break };
            if sender.is_ready() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.address).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct QuoteRequest {
    #[prost(uint32, tag = "1")]
    item: u32,
    #[prost(string, tag = "2")]
    note: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct QuoteReply {
    #[prost(uint64, tag = "1")]
    cents: u64,
    #[prost(string, tag = "2")]
    pod: String,
}

/// `shop.Prices`: one unary method and one that streams.
#[derive(Clone)]
struct Prices {
    pod: Arc<str>,
}

impl Prices {
    fn reply(&self, item: u32, change: u64) -> QuoteReply {
        QuoteReply { cents: u64::from(item) * 100 + 99 + change, pod: self.pod.to_string() }
    }
}

impl tonic::server::NamedService for Prices {
    const NAME: &'static str = "shop.Prices";
}

impl tower::Service<Request<tonic::body::Body>> for Prices {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let prices = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<QuoteReply, QuoteRequest>::default());
            Ok(match request.uri().path() {
                QUOTE => {
                    let quote = tower::service_fn(move |asked: tonic::Request<QuoteRequest>| {
                        let reply = prices.reply(asked.into_inner().item, 0);
                        async move {
                            tokio::time::sleep(thinking()).await;
                            Ok::<_, tonic::Status>(tonic::Response::new(reply))
                        }
                    });
                    grpc.unary(quote, request).await
                }
                WATCH => {
                    let watch = tower::service_fn(move |asked: tonic::Request<QuoteRequest>| {
                        let item = asked.into_inner().item;
                        let prices = prices.clone();
                        let replies = (0..STREAMED as u64).map(move |change| Ok(prices.reply(item, change)));
                        let stream = tokio_stream::iter(replies.collect::<Vec<_>>());
                        async move { Ok::<_, tonic::Status>(tonic::Response::new(stream)) }
                    });
                    grpc.server_streaming(watch, request).await
                }
                _ => tonic::Status::unimplemented("shop.Prices has Quote and Watch").into_http(),
            })
        })
    }
}

/// How long a price takes.
fn thinking() -> Duration {
    Duration::from_micros(rand::rng().random_range(300..900))
}

/// Users arrive at their own pace, however long answers take.
async fn load(web: SocketAddr, rate: f64, secret: &str) -> Result<()> {
    ensure!(rate > 0.0 && rate <= 10_000.0, "a rate of {rate}/s");
    let http = Arc::new(Http::new(web));
    let mut headers = HeaderMap::new();
    headers.insert(SECRET, HeaderValue::from_str(secret)?);
    let headers = Arc::new(headers);
    let body = Bytes::from(format!("{{\"card\": \"{secret}\"}}"));
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
    for number in 0_u64.. {
        ticks.tick().await;
        let (http, headers, body) = (http.clone(), headers.clone(), body.clone());
        tokio::spawn(async move {
            let start = Instant::now();
            let mut seen = match tokio::time::timeout(USER_PATIENCE, visit(&http, number, &headers, body))
                .await
            {
                Ok(Ok(seen)) => seen,
                Ok(Err(error)) => Seen { error: format!("{error:#}"), ..Seen::default() },
                Err(_) => Seen { error: format!("no answer within {USER_PATIENCE:?}"), ..Seen::default() },
            };
            seen.us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
            if let Ok(line) = serde_json::to_string(&seen) {
                println!("{line}");
            }
        });
    }
    Ok(())
}

/// Seven of ten look around, two look at a product, one buys.
async fn visit(http: &Http, number: u64, headers: &HeaderMap, body: Bytes) -> Result<Seen> {
    let (head, text) = match number % 10 {
        3 | 7 => {
            http.call(Method::GET, &format!("/product/{}", number % 40), "web.shop", headers, Bytes::new())
                .await?
        }
        9 => {
            // With a key a purchase can be tried again without buying twice.
            let mut headers = headers.clone();
            let key = format!("\"{:016x}\"", rand::rng().random::<u64>());
            headers.insert("idempotency-key", HeaderValue::from_str(&key)?);
            http.call(Method::POST, "/checkout", "web.shop", &headers, body).await?
        }
        _ => http.call(Method::GET, "/", "web.shop", headers, Bytes::new()).await?,
    };
    let text_of =
        |name| head.headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok()).unwrap_or_default();
    let error = if head.status == StatusCode::OK {
        String::new()
    } else {
        let said = String::from_utf8_lossy(&text);
        format!("{} {} {}", head.status.as_u16(), text_of(WEFT_REASON), said.trim())
    };
    Ok(Seen {
        us: 0,
        status: head.status.as_u16(),
        pod: text_of(POD).to_owned(),
        version: text_of(VERSION).to_owned(),
        error,
    })
}

fn status(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{status}\n")));
    *response.status_mut() = status;
    response
}

fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let names = [SECRET, "idempotency-key"];
    names.into_iter().filter_map(|name| Some((name.parse().ok()?, headers.get(name)?.clone()))).collect()
}

/// The secret is letters and digits; whatever else comes does not become SQL.
fn quoted(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect()
}

const SECRET: &str = "x-secret";
const POD: &str = "x-pod";
const POD_WEB: &str = "x-web-pod";
const VERSION: &str = "x-version";
const WEFT_REASON: &str = "weft-reason";
const QUOTE: &str = "/shop.Prices/Quote";
const WATCH: &str = "/shop.Prices/Watch";
const STREAMED: usize = 3;
pub(super) const ITEMS: u32 = 20;
const SESSION_USES: u32 = 20;
const USER_PATIENCE: Duration = Duration::from_secs(5);
const MAX_BODY: usize = 1 << 20;
