//! Ten thousand sidecars, as far as a controller can tell: each with its own address, certificate, connection, ADS
//! stream and telemetry stream.
//!
//! Why not ten thousand processes: the controller is what is measured, and the machine is one. What decides about the
//! exchange is the sidecar's own client ([`weft_proto::ads::Client`]), which checks every answer and resumes after a
//! reconnect; around it is as little as there can be: one task a sidecar on one thread, `h2` without a client above it,
//! and nothing that would carry traffic. Backoff and intervals are the sidecar's defaults.
//!
//! What is not simulated: the first connection, which fetches a certificate (they are signed here, by the controller's
//! own root), and traffic. A report is made once and sent again and again: the controller counts it each time.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, SendStream, client::ResponseFuture};
use prost::Message;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use weft_core::backoff::full_jitter;
use weft_proto::{
    ads::{Change, Client, ResourceType},
    pb::{
        ads::{DeltaDiscoveryResponse, Node},
        v1::{self as pb, Applied, ReportRequest, ReportResponse},
    },
};

/// What all sidecars share.
pub(crate) struct Fleet {
    controller: SocketAddr,
    size: usize,
    /// Streams that are up.
    pub(crate) connected: Cell<usize>,
    /// Sidecars that have an answer to everything that they asked.
    pub(crate) whole: Cell<usize>,
    /// Connections that were tried.
    pub(crate) tries: Cell<usize>,
    pub(crate) responses: Cell<usize>,
    pub(crate) reports: Cell<usize>,
    /// Reports that the controller has taken.
    pub(crate) taken: Cell<usize>,
    pub(crate) nacks: Cell<u64>,
    pub(crate) mismatches: Cell<u64>,
    /// Why connections ended or were not made.
    pub(crate) errors: RefCell<BTreeMap<String, usize>>,
    /// What is waited for, by a resource's name.
    watches: RefCell<HashMap<String, Watch>>,
    /// When each sidecar was whole for the first time.
    pub(crate) first_whole: RefCell<Vec<Instant>>,
}

/// One change on its way to everybody.
struct Watch {
    since: Instant,
    seen_by: Vec<bool>,
    after: Vec<Duration>,
}

/// What makes one sidecar.
pub(crate) struct Plan {
    pub(crate) index: usize,
    pub(crate) ip: Ipv4Addr,
    pub(crate) uid: String,
    pub(crate) tls: Arc<ClientConfig>,
    /// Addresses that its app has opened connections to.
    pub(crate) destinations: Vec<SocketAddr>,
    /// What it reports every ten seconds, encoded, but for what changes from report to report.
    pub(crate) report: Bytes,
}

impl Fleet {
    pub(crate) fn new(controller: SocketAddr, size: usize) -> Rc<Fleet> {
        Rc::new(Fleet {
            controller,
            size,
            connected: Cell::default(),
            whole: Cell::default(),
            tries: Cell::default(),
            responses: Cell::default(),
            reports: Cell::default(),
            taken: Cell::default(),
            nacks: Cell::default(),
            mismatches: Cell::default(),
            errors: RefCell::default(),
            watches: RefCell::default(),
            first_whole: RefCell::default(),
        })
    }

    /// Notes who hears of a resource from now on, and when.
    pub(crate) fn watch(&self, name: &str) {
        let watch = Watch { since: Instant::now(), seen_by: vec![false; self.size], after: Vec::new() };
        self.watches.borrow_mut().insert(name.to_owned(), watch);
    }

    /// How many have heard of it.
    pub(crate) fn heard(&self, name: &str) -> usize {
        self.watches.borrow().get(name).map_or(0, |watch| watch.after.len())
    }

    /// After what time each of them has.
    pub(crate) fn unwatch(&self, name: &str) -> Vec<Duration> {
        self.watches.borrow_mut().remove(name).map_or_else(Vec::new, |watch| watch.after)
    }

    fn seen(&self, name: &str, by: usize) {
        let mut watches = self.watches.borrow_mut();
        if let Some(watch) = watches.get_mut(name)
            && let Some(seen) = watch.seen_by.get_mut(by)
            && !std::mem::replace(seen, true)
        {
            watch.after.push(watch.since.elapsed());
        }
    }

    fn failed(&self, reason: String) {
        *self.errors.borrow_mut().entry(reason).or_default() += 1;
    }
}

fn add<T: Copy + std::ops::Add<Output = T>>(cell: &Cell<T>, n: T) {
    cell.set(cell.get() + n);
}

fn less_one(cell: &Cell<usize>) {
    cell.set(cell.get().saturating_sub(1));
}

/// One sidecar.
struct Sidecar {
    fleet: Rc<Fleet>,
    plan: Plan,
    client: Client,
    /// Names without an answer.
    waiting: HashSet<Arc<str>>,
    is_whole: bool,
    was_whole: bool,
    applied: BTreeMap<(ResourceType, String), Applied>,
    /// Everything that is live, told again after a reconnect.
    live: BTreeMap<(ResourceType, String), String>,
    sequence: u64,
}

/// Lives until it is aborted.
pub(crate) async fn sidecar(fleet: Rc<Fleet>, plan: Plan) {
    let mut client = Client::new(Node { id: plan.uid.clone(), ..Node::default() });
    let mut waiting = HashSet::new();
    let mut want = |ty, name: String| {
        client.subscribe(ty, &name);
        waiting.insert(Arc::from(name));
    };
    want(ResourceType::WorkloadConfig, format!("self/{}", plan.uid));
    for destination in &plan.destinations {
        want(ResourceType::Service, format!("ip/{destination}"));
    }
    let mut sidecar = Sidecar {
        fleet,
        plan,
        client,
        waiting,
        is_whole: false,
        was_whole: false,
        applied: BTreeMap::new(),
        live: BTreeMap::new(),
        sequence: 0,
    };
    let mut failures = 0;
    loop {
        add(&sidecar.fleet.tries, 1);
        let began = Instant::now();
        let ended = match timeout(CONTROLLER_TIMEOUT, sidecar.connect()).await {
            Ok(Ok(stream)) => sidecar.stream(stream).await,
            Ok(Err(error)) => format!("connect: {error}"),
            Err(_) => "connect: timed out".to_owned(),
        };
        sidecar.fleet.failed(ended);
        if began.elapsed() >= HEALTHY {
            failures = 0;
        }
        sleep(full_jitter(RECONNECT_BASE, RECONNECT_CAP, failures, &mut rand::rng())).await;
        failures = failures.saturating_add(1);
    }
}

impl Sidecar {
    async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((self.plan.ip, 0).into())?;
        let stream = socket.connect(self.fleet.controller).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(CONTROLLER_NAME).map_err(io::Error::other)?;
        TlsConnector::from(self.plan.tls.clone()).connect(name, stream).await
    }

    /// One connection's life; why it ended.
    async fn stream(&mut self, stream: TlsStream<TcpStream>) -> String {
        let mut up = false;
        let ended = self.exchange(stream, &mut up).await;
        self.client.disconnected();
        if up {
            less_one(&self.fleet.connected);
        }
        match ended {
            Ok(never) => match never {},
            Err(error) => format!("stream: {error:#}"),
        }
    }

    async fn exchange(
        &mut self,
        stream: TlsStream<TcpStream>,
        up: &mut bool,
    ) -> Result<std::convert::Infallible> {
        let (mut requests, mut connection) = h2::client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW * 2)
            .handshake::<_, Bytes>(stream)
            .await?;
        let (mut ads_in, mut ads_out) = open(&mut requests, ADS)?;
        let (mut reports_in, mut reports_out) = open(&mut requests, REPORT)?;
        self.client.connected();
        // Whoever answers now may never have heard of it.
        for ((ty, name), version) in &self.live {
            self.applied.insert((*ty, name.clone()), applied(*ty, name, version));
        }
        // Sidecars started at different times.
        let mut report_at = Instant::now() + REPORT_EVERY.mul_f64(rand::random());
        let mut tell_at: Option<Instant> = None;
        let mut timer: Pin<Box<Sleep>> = Box::pin(sleep_until(report_at));
        loop {
            while let Some(request) = self.client.next_request() {
                ads_out.send_data(frame(&request), false)?;
            }
            if !self.applied.is_empty() && tell_at.is_none() {
                tell_at = Some(Instant::now() + GATHER);
            }
            let next = tell_at.map_or(report_at, |tell| tell.min(report_at));
            if timer.deadline() != next {
                timer.as_mut().reset(next);
            }
            tokio::select! {
                biased;
                ended = &mut connection => {
                    ended?;
                    anyhow::bail!("closed by the controller");
                }
                message = ads_in.next() => {
                    let message = message?;
                    if !std::mem::replace(up, true) {
                        add(&self.fleet.connected, 1);
                    }
                    self.receive(DeltaDiscoveryResponse::decode(message)?);
                }
                message = reports_in.next() => {
                    ReportResponse::decode(message?)?;
                    add(&self.fleet.taken, 1);
                }
                () = &mut timer => {
                    let is_due = report_at <= Instant::now();
                    if is_due {
                        report_at += REPORT_EVERY;
                    }
                    tell_at = None;
                    let report = self.report(is_due);
                    reports_out.send_data(report, false)?;
                    add(&self.fleet.reports, 1);
                }
            }
        }
    }

    fn receive(&mut self, response: DeltaDiscoveryResponse) {
        add(&self.fleet.responses, 1);
        let before = self.client.stats();
        let (fleet, index) = (&self.fleet, self.plan.index);
        let (waiting, applied_now, live) = (&mut self.waiting, &mut self.applied, &mut self.live);
        let mut wanted: Vec<(ResourceType, String)> = Vec::new();
        let mut changed: HashSet<String> = HashSet::new();
        self.client.receive(response, &mut |change| {
            match change {
                Change::Update { ty: ResourceType::Endpoint, name, .. } => {
                    fleet.seen(name, index);
                    if let Some((of, _)) = name.rsplit_once('/') {
                        changed.insert(format!("{of}/*"));
                    }
                }
                Change::Update { ty, name, version, body } => {
                    waiting.remove(name);
                    match ty {
                        ResourceType::Service => {
                            let service = pb::Service::decode(body.clone()).map_err(|e| e.to_string())?;
                            wanted.push((ResourceType::Route, service.route));
                            wanted.push((ResourceType::Endpoint, service.endpoints));
                        }
                        ResourceType::WorkloadConfig => {
                            let config =
                                pb::WorkloadConfig::decode(body.clone()).map_err(|e| e.to_string())?;
                            let ports = config.ports.into_iter().chain(config.default_port);
                            wanted.extend(ports.map(|port| (ResourceType::Authorization, port.authz)));
                            let trust = config.trust_domains.into_iter();
                            wanted.extend(
                                trust.map(|domain| (ResourceType::TrustBundle, format!("trust/{domain}"))),
                            );
                        }
                        ResourceType::Authorization
                        | ResourceType::TrustBundle
                        | ResourceType::Route
                        | ResourceType::Endpoint => {}
                    }
                    applied_now.insert((ty, name.to_owned()), applied(ty, name, version));
                    live.insert((ty, name.to_owned()), version.to_owned());
                }
                Change::Removed { ty, name } => {
                    fleet.seen(name, index);
                    waiting.remove(name);
                    match name.rsplit_once('/') {
                        Some((of, uid)) if ty == ResourceType::Endpoint && uid != "*" => {
                            changed.insert(format!("{of}/*"));
                        }
                        Some(_) | None => {}
                    }
                }
                Change::CollectionComplete { collection } => {
                    waiting.remove(collection);
                    changed.insert(collection.to_owned());
                }
            }
            Ok(())
        });
        for (ty, name) in wanted.into_iter().filter(|(_, name)| !name.is_empty()) {
            if !self.client.is_subscribed(ty, &name) {
                self.client.subscribe(ty, &name);
                self.waiting.insert(name.into());
            }
        }
        for name in changed {
            if let Some(cursor) = self.client.cursor(&name) {
                let key = (ResourceType::Endpoint, name);
                self.applied.insert(key.clone(), applied(key.0, &key.1, &cursor));
                self.live.insert(key, cursor);
            }
        }
        let after = self.client.stats();
        add(&self.fleet.nacks, after.nacks - before.nacks);
        add(&self.fleet.mismatches, after.mismatches - before.mismatches);
        let is_whole = self.waiting.is_empty();
        match (self.is_whole, is_whole) {
            (false, true) => add(&self.fleet.whole, 1),
            (true, false) => less_one(&self.fleet.whole),
            (true, true) | (false, false) => {}
        }
        self.is_whole = is_whole;
        if is_whole && !std::mem::replace(&mut self.was_whole, true) {
            self.fleet.first_whole.borrow_mut().push(Instant::now());
        }
    }

    /// What is live by now, and the numbers if they are due.
    fn report(&mut self, is_due: bool) -> Bytes {
        self.sequence += 1;
        let report = ReportRequest {
            sequence: self.sequence,
            session: self.plan.uid.clone(),
            applied: std::mem::take(&mut self.applied).into_values().collect(),
            gauges: (!is_due).then(gauges),
            ..ReportRequest::default()
        };
        // Two encoded messages in a row are one message with the fields of both.
        let numbers = if is_due { self.plan.report.clone() } else { Bytes::new() };
        let mut framed = BytesMut::with_capacity(5 + report.encoded_len() + numbers.len());
        framed.put_u8(0);
        framed.put_u32(u32::try_from(report.encoded_len() + numbers.len()).unwrap_or(u32::MAX));
        framed.extend_from_slice(&report.encode_to_vec());
        framed.extend_from_slice(&numbers);
        framed.freeze()
    }
}

/// What every report says of the sidecar itself.
pub(crate) fn gauges() -> pb::Gauges {
    pb::Gauges {
        rss_bytes: 9 * 1024 * 1024,
        connections: 25,
        certificate_not_after: 2_000_000_000,
        seconds_since_contact: 0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn applied(ty: ResourceType, name: &str, version: &str) -> Applied {
    Applied {
        type_url: ty.type_url().to_owned(),
        name: name.to_owned(),
        version: version.to_owned(),
        removed: false,
    }
}

fn open(requests: &mut h2::client::SendRequest<Bytes>, path: &str) -> Result<(Incoming, SendStream<Bytes>)> {
    let request = http::Request::post(format!("http://{CONTROLLER_NAME}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (head, out) = requests.send_request(request, false)?;
    Ok((Incoming { head: Some(head), body: None, buffer: BytesMut::new() }, out))
}

fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + len);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    // Room was made: it does not fail.
    let _ = message.encode(&mut framed);
    framed.freeze()
}

/// The answers of one call.
struct Incoming {
    head: Option<ResponseFuture>,
    body: Option<RecvStream>,
    buffer: BytesMut,
}

impl Incoming {
    /// The next message. Nothing is lost if this is dropped in between.
    async fn next(&mut self) -> Result<Bytes> {
        loop {
            if let Some(&[_, a, b, c, d]) = self.buffer.first_chunk::<5>() {
                let len = u32::from_be_bytes([a, b, c, d]) as usize;
                if self.buffer.len() >= 5 + len {
                    let message = self.buffer.split_to(5 + len).freeze().slice(5..);
                    if self.buffer.is_empty() {
                        self.buffer = BytesMut::new();
                    }
                    return Ok(message);
                }
            }
            if let Some(head) = &mut self.head {
                let response = head.await?;
                self.head = None;
                if let Some(status) = response.headers().get("grpc-status") {
                    anyhow::bail!("grpc-status {status:?} {:?}", response.headers().get("grpc-message"));
                }
                self.body = Some(response.into_body());
            }
            let body = self.body.as_mut().context("no answer")?;
            match body.data().await {
                Some(data) => {
                    let data = data?;
                    body.flow_control().release_capacity(data.len())?;
                    self.buffer.extend_from_slice(&data);
                }
                None => {
                    let trailers = body.trailers().await?.unwrap_or_default();
                    anyhow::bail!("ended: {:?}", trailers.get("grpc-message"));
                }
            }
        }
    }
}

const ADS: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const REPORT: &str = "/weft.v1.Telemetry/Report";
/// The controller's DNS name.
const CONTROLLER_NAME: &str = "weft-controller.weft.internal";
/// As the sidecar has them.
const WINDOW: u32 = 1024 * 1024;
const CONTROLLER_TIMEOUT: Duration = Duration::from_secs(10);
const RECONNECT_BASE: Duration = Duration::from_secs(1);
const RECONNECT_CAP: Duration = Duration::from_secs(30);
const HEALTHY: Duration = Duration::from_secs(30);
const GATHER: Duration = Duration::from_millis(5);
pub(crate) const REPORT_EVERY: Duration = Duration::from_secs(10);
