//! The control protocol by hand: protobuf bytes, gRPC frames, HTTP/2. Nothing here knows Weft's generated types
//! or its ADS code, so a mistake that both of our sides make is still a mistake here.
//!
//! Field numbers are Envoy's `envoy/service/discovery/v3/discovery.proto` and those of `proto/weft/v1`, copied out
//! as a stranger who writes a client would do it.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, sync::mpsc, time::timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;

/// Far more than anything takes; a test that waits so long has failed.
pub(crate) const LONG: Duration = Duration::from_secs(30);
/// How long to look at a stream on which nothing should come. A test is never wrong because it was too short,
/// it only sees less.
const QUIET: Duration = Duration::from_millis(250);

pub(crate) const DELTA: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
pub(crate) const STATE_OF_THE_WORLD: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
pub(crate) const CERTIFY: &str = "/weft.v1.Identity/Certify";

/// `type.googleapis.com/weft.v1.` and a name.
pub(crate) fn url(name: &str) -> String {
    format!("type.googleapis.com/weft.v1.{name}")
}

/// A protobuf message in the making.
#[derive(Clone, Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    pub(crate) fn uint(mut self, field: u64, value: u64) -> Self {
        varint(&mut self.0, field << 3);
        varint(&mut self.0, value);
        self
    }

    pub(crate) fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        varint(&mut self.0, field << 3 | 2);
        varint(&mut self.0, value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    pub(crate) fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    pub(crate) fn message(self, field: u64, value: Self) -> Self {
        self.bytes(field, &value.0)
    }

    pub(crate) fn each<T>(self, items: &[T], add: impl Fn(Self, &T) -> Self) -> Self {
        items.iter().fold(self, add)
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The fields of a message: number, and the bytes or the number in it.
pub(crate) fn fields(mut from: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    fn number(from: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = from.get_u8();
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }
    let mut found = Vec::new();
    while from.has_remaining() {
        let tag = number(&mut from);
        let (value, bytes) = match tag & 7 {
            0 => (number(&mut from), Vec::new()),
            1 => (from.get_u64_le(), Vec::new()),
            2 => {
                let len = usize::try_from(number(&mut from)).unwrap();
                (0, from.copy_to_bytes(len).to_vec())
            }
            5 => (u64::from(from.get_u32_le()), Vec::new()),
            other => panic!("wire type {other}"),
        };
        found.push((tag >> 3, value, bytes));
    }
    found
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// `DeltaDiscoveryRequest`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Request {
    pub(crate) node: Option<String>,
    pub(crate) ty: String,
    pub(crate) subscribe: Vec<String>,
    pub(crate) unsubscribe: Vec<String>,
    pub(crate) versions: Vec<(String, String)>,
    pub(crate) nonce: String,
    /// The message of `error_detail`.
    pub(crate) error: Option<String>,
    /// What `error_detail` names: resource and version.
    pub(crate) rejected: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn of(ty: &str) -> Self {
        Self { ty: url(ty), ..Self::default() }
    }

    pub(crate) fn subscribe(ty: &str, names: &[&str]) -> Self {
        Self { subscribe: names.iter().map(ToString::to_string).collect(), ..Self::of(ty) }
    }

    pub(crate) fn unsubscribe(ty: &str, names: &[&str]) -> Self {
        Self { unsubscribe: names.iter().map(ToString::to_string).collect(), ..Self::of(ty) }
    }

    pub(crate) fn holding(mut self, held: &[(&str, &str)]) -> Self {
        self.versions = held.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect();
        self
    }

    pub(crate) fn ack(of: &Response) -> Self {
        Self { ty: of.ty.clone(), nonce: of.nonce.clone(), ..Self::default() }
    }

    pub(crate) fn nack(of: &Response) -> Self {
        Self { error: Some("refused".to_owned()), ..Self::ack(of) }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Message::default();
        if let Some(node) = &self.node {
            out = out.message(1, Message::default().text(1, node));
        }
        out = out.text(2, &self.ty);
        out = out.each(&self.subscribe, |out, name| out.text(3, name));
        out = out.each(&self.unsubscribe, |out, name| out.text(4, name));
        out = out.each(&self.versions, |out, (name, version)| {
            out.message(5, Message::default().text(1, name).text(2, version))
        });
        if !self.nonce.is_empty() {
            out = out.text(6, &self.nonce);
        }
        if let Some(error) = &self.error {
            let status = Message::default().uint(1, 3).text(2, error);
            let status = status.each(&self.rejected, |status, (name, version)| {
                let rejected = Message::default().text(1, name).text(2, version).text(3, "by hand").done();
                status.message(3, Message::default().text(1, &url("RejectedResource")).bytes(2, &rejected))
            });
            out = out.message(7, status);
        }
        out.done()
    }

    pub(crate) fn decode(from: &[u8]) -> Self {
        let mut out = Self::default();
        for (field, _, bytes) in fields(from) {
            match field {
                1 => {
                    let id = fields(&bytes).into_iter().find(|(field, ..)| *field == 1);
                    out.node = Some(id.map(|(_, _, id)| text(&id)).unwrap_or_default());
                }
                2 => out.ty = text(&bytes),
                3 => out.subscribe.push(text(&bytes)),
                4 => out.unsubscribe.push(text(&bytes)),
                5 => {
                    let pair = fields(&bytes);
                    let part = |n| pair.iter().find(|(field, ..)| *field == n).map(|(.., b)| text(b));
                    out.versions.push((part(1).unwrap_or_default(), part(2).unwrap_or_default()));
                }
                6 => out.nonce = text(&bytes),
                7 => {
                    let mut message = String::new();
                    for (field, _, bytes) in fields(&bytes) {
                        match field {
                            2 => message = text(&bytes),
                            3 => {
                                let any = fields(&bytes);
                                let value = any.iter().find(|(field, ..)| *field == 2).unwrap();
                                let rejected = fields(&value.2);
                                let part = |n| {
                                    rejected.iter().find(|(field, ..)| *field == n).map(|(.., b)| text(b))
                                };
                                out.rejected.push((part(1).unwrap_or_default(), part(2).unwrap_or_default()));
                            }
                            _ => {}
                        }
                    }
                    out.error = Some(message);
                }
                other => panic!("field {other} of a request"),
            }
        }
        out
    }
}

/// One resource of a response.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Resource {
    pub(crate) name: String,
    pub(crate) version: String,
    /// Type URL and bytes; `None`: no body at all.
    pub(crate) body: Option<(String, Vec<u8>)>,
}

/// `DeltaDiscoveryResponse`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Response {
    pub(crate) ty: String,
    pub(crate) nonce: String,
    pub(crate) resources: Vec<Resource>,
    pub(crate) removed: Vec<String>,
}

impl Response {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Message::default();
        out = out.each(&self.resources, |out, resource| {
            let mut one = Message::default().text(1, &resource.version).text(3, &resource.name);
            if let Some((url, body)) = &resource.body {
                one = one.message(2, Message::default().text(1, url).bytes(2, body));
            }
            out.message(2, one)
        });
        out = out.text(4, &self.ty).text(5, &self.nonce);
        out.each(&self.removed, |out, name| out.text(6, name)).done()
    }

    pub(crate) fn decode(from: &[u8]) -> Self {
        let mut out = Self::default();
        for (field, _, bytes) in fields(from) {
            match field {
                2 => {
                    let mut one = Resource::default();
                    for (field, _, bytes) in fields(&bytes) {
                        match field {
                            1 => one.version = text(&bytes),
                            2 => {
                                let any = fields(&bytes);
                                let part =
                                    |n| any.iter().find(|(field, ..)| *field == n).map(|(.., b)| b.clone());
                                let url = text(&part(1).unwrap_or_default());
                                one.body = Some((url, part(2).unwrap_or_default()));
                            }
                            3 => one.name = text(&bytes),
                            _ => {}
                        }
                    }
                    out.resources.push(one);
                }
                4 => out.ty = text(&bytes),
                5 => out.nonce = text(&bytes),
                6 => out.removed.push(text(&bytes)),
                _ => {}
            }
        }
        out
    }

    /// `name`, `-name` for a removal, in the order of the message.
    pub(crate) fn says(&self) -> Vec<String> {
        let there = self.resources.iter().map(|resource| resource.name.clone());
        there.chain(self.removed.iter().map(|name| format!("-{name}"))).collect()
    }

    pub(crate) fn version(&self, name: &str) -> &str {
        &self.resources.iter().find(|resource| resource.name == name).unwrap().version
    }
}

/// One gRPC message: a flag, its length, its bytes.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let len = u32::try_from(message.len()).unwrap();
    [&[0][..], &len.to_be_bytes(), message].concat().into()
}

/// The messages that arrive on one side of a call.
pub(crate) struct Messages {
    body: Incoming,
    buffer: BytesMut,
    /// `grpc-status` of the trailers.
    pub(crate) status: Option<u32>,
}

impl Messages {
    pub(crate) fn new(body: Incoming) -> Self {
        Self { body, buffer: BytesMut::new(), status: None }
    }

    /// `None`: the stream has ended, well or badly.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let [flag, a, b, c, d, ..] = *self.buffer {
                assert_eq!(flag, 0, "nobody asked for compression");
                let len = u32::from_be_bytes([a, b, c, d]) as usize;
                if self.buffer.len() >= 5 + len {
                    self.buffer.advance(5);
                    return Some(self.buffer.split_to(len).freeze());
                }
            }
            let frame = self.body.frame().await?.ok()?;
            if let Some(status) = frame.trailers_ref().and_then(|trailers| trailers.get("grpc-status")) {
                self.status = status.to_str().ok().and_then(|status| status.parse().ok());
            }
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

/// What one side of a call sends.
pub(crate) type Outgoing = mpsc::Sender<Result<Frame<Bytes>, Infallible>>;
pub(crate) type Body = StreamBody<ReceiverStream<Result<Frame<Bytes>, Infallible>>>;

pub(crate) fn outgoing() -> (Outgoing, Body) {
    let (send, receive) = mpsc::channel(64);
    (send, StreamBody::new(ReceiverStream::new(receive)))
}

/// An HTTP/2 connection.
#[derive(Clone)]
pub(crate) struct Connection(hyper::client::conn::http2::SendRequest<Body>);

impl Connection {
    /// `None`: refused before HTTP/2.
    pub(crate) async fn open(
        to: std::net::SocketAddr,
        name: &'static str,
        tls: rustls::ClientConfig,
    ) -> Option<Self> {
        let stream = TcpStream::connect(to).await.ok()?;
        stream.set_nodelay(true).ok()?;
        let name = rustls_pki_types::ServerName::try_from(name).unwrap();
        let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await.ok()?;
        let handshake =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (send, connection) = handshake.ok()?;
        tokio::spawn(connection);
        Some(Self(send))
    }

    /// Begins a call. The answer's head may take until the first message, so it is not waited for.
    pub(crate) fn call(&self, path: &str) -> Call {
        let (send, body) = outgoing();
        let request = http::Request::post(format!("http://controller{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body)
            .unwrap();
        let mut connection = self.0.clone();
        let answer = tokio::spawn(async move {
            connection.ready().await.ok()?;
            connection.send_request(request).await.ok()
        });
        Call { send: Some(send), answer: Some(answer), messages: None, status: None }
    }
}

/// One call, message by message.
pub(crate) struct Call {
    send: Option<Outgoing>,
    answer: Option<tokio::task::JoinHandle<Option<http::Response<Incoming>>>>,
    messages: Option<Messages>,
    status: Option<u32>,
}

impl Call {
    /// Sends bytes as one DATA frame, whatever they are.
    pub(crate) async fn raw(&self, bytes: Bytes) {
        let _ = self.send.as_ref().unwrap().send(Ok(Frame::data(bytes))).await;
    }

    pub(crate) async fn send(&self, request: &Request) {
        self.raw(frame(&request.encode())).await;
    }

    /// No more will be sent.
    pub(crate) fn finish(&mut self) {
        self.send = None;
    }

    pub(crate) async fn message(&mut self) -> Option<Bytes> {
        if let Some(answer) = &mut self.answer {
            // Kept until it is there: whoever waits may give up and wait again.
            let answer = answer.await.unwrap();
            self.answer = None;
            let answer = answer?;
            let status = answer.headers().get("grpc-status");
            self.status = status.and_then(|status| status.to_str().ok()?.parse().ok());
            self.messages = Some(Messages::new(answer.into_body()));
        }
        self.messages.as_mut()?.next().await
    }

    /// The status after the last message.
    pub(crate) fn status(&self) -> Option<u32> {
        self.messages.as_ref().and_then(|messages| messages.status).or(self.status)
    }

    pub(crate) async fn next(&mut self) -> Response {
        let message = timeout(LONG, self.message()).await.expect("an answer in time");
        Response::decode(&message.expect("the stream is open"))
    }

    /// The next response, acknowledged.
    pub(crate) async fn take(&mut self) -> Response {
        let response = self.next().await;
        self.send(&Request::ack(&response)).await;
        response
    }

    /// Whether nothing comes for a moment.
    pub(crate) async fn is_quiet(&mut self) -> bool {
        timeout(QUIET, self.message()).await.is_err()
    }

    /// Waits for the end of the stream.
    pub(crate) async fn ended(&mut self) -> Option<u32> {
        timeout(LONG, async { while self.message().await.is_some() {} }).await.expect("the stream ends");
        self.status()
    }
}
