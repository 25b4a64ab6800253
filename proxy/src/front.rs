//! What stands between a connection and the HTTP library: what came too early, what must not come, and how long a head may
//! take.
//!
//! Why one wrapper: each layer of IO is a layer on every read and write. Bytes that were read to find out the protocol are
//! handed on first. Then every piece is followed before the library sees it (`weft_core::framing`, `weft_core::frames`):
//! the library never gets a message that has two readings, and this wrapper says why in its place, after the answers to
//! what came before. A head that takes longer than it may from its first byte ends the connection; the library's own timer
//! also runs on idle connections.
//!
//! Why a client's end is held back: the library takes an end amidst an answer for a client that has gone. One that has only
//! ended its half waits, and `presence` tells them apart where it can be told.

mod requests;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use hyper::server::conn::http1;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{Instant, Sleep},
};
use weft_core::{
    frames::{Calm, Frames},
    framing::{Fed, Framing, HeadLimits, Malformed, Side},
};

use self::requests::Refusal;
pub(crate) use self::requests::{Requests, behind};
use crate::{
    accepted::Accepted,
    clock::now,
    config::{self, Config},
    direction::Direction,
    error::Error,
    presence,
    telemetry::recorder::Recorder,
};

/// How long, and how much, a client that was refused may go on before it reads why. To close on unread bytes is to reset,
/// and a reset may overtake the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;
/// A client that has its answer while it still sends is read for so long, and for so long after its last byte: most look
/// at their answer only when they have sent everything.
const LINGER_UPLOAD: Duration = Duration::from_secs(30);
const LINGER_UPLOAD_IDLE: Duration = Duration::from_secs(5);
/// A client that has ended its half, and is told nothing for so long amidst its answer, is taken to have gone.
const QUIET: Duration = Duration::from_secs(10);
/// GOAWAY for what follows the highest stream: ENHANCE_YOUR_CALM.
const CALM_DOWN: u32 = 0x0b;

/// A client's connection.
pub(crate) struct Front<S> {
    inner: S,
    /// Read and not handed on.
    prefix: Bytes,
    follow: Follow,
    requests: Requests,
    direction: Direction,
    /// How long a head may take.
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    in_head: bool,
    /// The last write was not taken: what the library has said is not all said.
    blocked: bool,
    over: Option<Over>,
    /// What the library has said.
    written: u64,
    /// Answers that it has said to the last byte.
    said: u64,
    /// Both ends of a connection that begins in this pod.
    of_this_pod: Option<(SocketAddr, SocketAddr)>,
    /// The client has ended its half before its answer's end.
    half_closed: Option<HalfClosed>,
}

/// A client that may wait for its answer, or have gone.
struct HalfClosed {
    /// Done when it has gone.
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// What was written when it was last looked at, and when to look again.
    written: u64,
    look: Pin<Box<Sleep>>,
}

enum Follow {
    H1(Box<Framing>),
    H2 { frames: Frames, calm: Calm },
}

/// What a client that is read no more may still send.
struct Lingering {
    bytes: usize,
    /// Until the end of the request under way, which is followed.
    upload: bool,
    until: Instant,
    /// And no longer than this after a byte.
    idle: Duration,
}

/// Nothing more of the client is handed on.
enum Over {
    /// What is to be said when all before it is answered.
    Say(Bytes),
    /// The request under way is told by its body.
    Broken,
    /// Read and thrown away.
    Linger(Lingering),
    Done,
}

impl<S> Front<S> {
    /// A connection that speaks HTTP/1, and what was read of it. The service begins its requests in `requests`.
    pub(crate) fn h1(inner: S, prefix: Bytes, requests: Requests, direction: Direction, head: Head) -> Self {
        let framing = Framing::new(Side::Requests, HeadLimits { bytes: head.bytes, fields: head.fields });
        Self::new(inner, prefix, Follow::H1(Box::new(framing)), requests, direction, head.time)
    }

    /// A connection that speaks HTTP/2, and what was read of it.
    pub(crate) fn h2(inner: S, prefix: Bytes, requests: Requests, direction: Direction, head: Head) -> Self {
        let follow = Follow::H2 { frames: Frames::of_client(), calm: Calm::default() };
        Self::new(inner, prefix, follow, requests, direction, head.time)
    }

    fn new(
        inner: S,
        prefix: Bytes,
        follow: Follow,
        requests: Requests,
        direction: Direction,
        limit: Duration,
    ) -> Self {
        Self {
            inner,
            prefix,
            follow,
            requests,
            direction,
            limit,
            timer: None,
            in_head: false,
            blocked: false,
            over: None,
            written: 0,
            said: 0,
            of_this_pod: None,
            half_closed: None,
        }
    }

    /// What it stands before.
    pub(crate) fn inner(&self) -> &S {
        &self.inner
    }

    /// One that begins in this pod: its client's kernel can be asked.
    pub(crate) fn of_this_pod(self, client: SocketAddr, destination: SocketAddr) -> Self {
        Self { of_this_pod: Some((client, destination)), ..self }
    }
}

/// What a head may have, and how long it may take.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    pub(crate) bytes: usize,
    pub(crate) fields: usize,
    pub(crate) time: Duration,
}

impl Head {
    pub(crate) fn of(config: &Config) -> Self {
        let config::GrowthLimits { headers: fields, header_bytes: bytes, .. } = config.limits;
        Self { bytes, fields, time: config.times.header }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Front<S> {
    /// Reads what was read already, then the connection.
    fn fill(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..n]);
        self.prefix.advance(n);
        if self.prefix.is_empty() {
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }

    /// After a request to change the protocol: only its answer tells what the next byte is. Ready to go on, or ended.
    fn paused(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let Follow::H1(framing) = &mut self.follow else { return Poll::Ready(Ok(true)) };
        if !framing.is_paused() {
            return Poll::Ready(Ok(true));
        }
        if self.requests.switched() {
            framing.leave();
            return Poll::Ready(Ok(true));
        }
        if self.requests.begun() == framing.heads() && !self.requests.in_progress() {
            framing.go_on();
            return Poll::Ready(Ok(true));
        }
        if self.prefix.is_empty() {
            let mut few = [0; 512];
            let mut read = ReadBuf::new(&mut few);
            if let Poll::Ready(polled) = Pin::new(&mut self.inner).poll_read(cx, &mut read) {
                polled?;
                if read.filled().is_empty() {
                    return self.poll_half_closed(cx).map_ok(|()| false);
                }
                self.prefix = Bytes::copy_from_slice(read.filled());
            }
        }
        self.requests.wait(cx)
    }

    /// A head may take only so long from its first byte, while nothing else is under way.
    fn patience(&mut self, cx: &mut Context<'_>) -> bool {
        let in_head = match &self.follow {
            Follow::H1(framing) => framing.is_in_head() && !self.requests.in_progress(),
            Follow::H2 { frames, .. } => frames.is_in_fields(),
        };
        let begins = in_head && !self.in_head;
        self.in_head = in_head;
        if !in_head {
            return true;
        }
        let limit = self.limit;
        // The common case: a read holds whole heads, and no timer is ever made.
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if begins {
            timer.as_mut().reset(Instant::now() + limit);
        }
        timer.as_mut().poll(cx).is_pending()
    }

    /// Whether a client that ends now has asked for something that it did not get yet.
    fn waits_for_an_answer(&self) -> bool {
        matches!(&self.follow, Follow::H1(framing) if framing.is_between() && self.owes_an_answer())
    }

    /// An answer that has ended may still lie with the library, where the client reads slowly.
    fn owes_an_answer(&self) -> bool {
        self.requests.begun() != self.said
    }

    /// Keeps an end of a client to itself until its answer is said.
    fn poll_half_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.owes_an_answer() {
            return Poll::Ready(Ok(()));
        }
        let half = self.half_closed.get_or_insert_with(|| HalfClosed {
            gone: match self.of_this_pod {
                Some((client, destination)) => Box::pin(presence::gone(client, destination)),
                None => Box::pin(std::future::pending()),
            },
            written: self.written,
            look: Box::pin(tokio::time::sleep(QUIET)),
        });
        let mut gone = half.gone.as_mut().poll(cx).is_ready();
        while !gone && half.look.as_mut().poll(cx).is_ready() {
            // Before an answer everything is quiet, and its first bytes find out.
            gone = self.of_this_pod.is_none() && half.written == self.written && self.requests.all_answered();
            half.written = self.written;
            half.look.as_mut().reset(Instant::now() + QUIET);
        }
        if gone {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.requests.wait(cx)
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.requests.refuse(refusal, false);
        self.over = Some(match (&self.follow, Error::from(refusal)) {
            (Follow::H1(_), error) => Over::Say(said(&error, self.direction)),
            (Follow::H2 { frames, .. }, _) => Over::Say(go_away(frames.last_stream())),
        });
    }

    /// Says why, throws away what still comes, ends.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            match &mut self.over {
                None | Some(Over::Broken | Over::Done) => {
                    return Poll::Ready(io::ErrorKind::InvalidData.into());
                }
                Some(Over::Say(_)) if self.blocked => return self.requests.wait(cx),
                Some(Over::Say(bytes)) => {
                    if let Follow::H1(framing) = &self.follow
                        && (self.requests.in_progress() || self.requests.begun() != framing.heads())
                    {
                        return self.requests.wait(cx);
                    }
                    while !bytes.is_empty() {
                        match ready!(Pin::new(&mut self.inner).poll_write(cx, bytes)) {
                            Ok(n) if n > 0 => bytes.advance(n),
                            Ok(_) | Err(_) => break,
                        }
                    }
                    // TLS keeps what it was given until it is told; a client that has gone reads nothing.
                    let _ = ready!(Pin::new(&mut self.inner).poll_flush(cx));
                    self.linger();
                }
                Some(Over::Linger(_)) => {
                    ready!(self.poll_linger(cx));
                    self.over = Some(Over::Done);
                }
            }
        }
    }

    fn linger(&mut self) {
        let until = Instant::now() + LINGER;
        self.over = Some(Over::Linger(Lingering { bytes: LINGER_BYTES, upload: false, until, idle: LINGER }));
        self.timer = Some(Box::pin(tokio::time::sleep_until(until)));
    }

    /// Whether the client has not sent all of a request that was answered.
    fn is_amidst_a_request(&self) -> bool {
        matches!(&self.follow, Follow::H1(framing) if !framing.is_between() && !framing.is_in_head())
            && self.requests.begun() > 0
            && !self.requests.switched()
    }

    fn linger_upload(&mut self) {
        let (now, idle) = (Instant::now(), LINGER_UPLOAD_IDLE);
        let lingering = Lingering { bytes: usize::MAX, upload: true, until: now + LINGER_UPLOAD, idle };
        self.over = Some(Over::Linger(lingering));
        self.timer = Some(Box::pin(tokio::time::sleep_until(now + idle)));
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if ready!(Pin::new(&mut self.inner).poll_shutdown(cx)).is_err() {
            return Poll::Ready(());
        }
        let Some(Over::Linger(lingering)) = &mut self.over else { return Poll::Ready(()) };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(lingering.until)));
        let mut thrown = [0; 16 * 1024];
        while lingering.bytes > 0 {
            if timer.as_mut().poll(cx).is_ready() {
                break;
            }
            let mut buf = ReadBuf::new(&mut thrown);
            let read = Pin::new(&mut self.inner).poll_read(cx, &mut buf);
            let read = ready!(read).is_ok().then_some(buf.filled()).filter(|read| !read.is_empty());
            let Some(read) = read else { break };
            lingering.bytes = lingering.bytes.saturating_sub(read.len());
            if lingering.upload {
                let now = Instant::now();
                let over = match &mut self.follow {
                    Follow::H1(framing) => framing.feed(read).is_err() || framing.is_between(),
                    Follow::H2 { .. } => true,
                };
                if over {
                    // It has sent everything, and is about to look.
                    *lingering = Lingering {
                        bytes: LINGER_BYTES,
                        upload: false,
                        until: lingering.until.min(now + LINGER),
                        idle: LINGER,
                    };
                }
                timer.as_mut().reset(lingering.until.min(now + lingering.idle));
            }
        }
        Poll::Ready(())
    }

    /// Follows what was just read; what must not be handed on is taken out of the buffer again.
    fn follow(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let read = &mut buf.filled_mut()[before..];
        match &mut self.follow {
            Follow::H1(framing) => match framing.feed(read) {
                Ok(Fed::All) => self.requests.arrived(framing.is_between()),
                Ok(Fed::Until(n)) => {
                    self.requests.arrived(framing.is_between());
                    if n < read.len() {
                        let mut kept = BytesMut::from(&read[n..]);
                        kept.extend_from_slice(&self.prefix);
                        self.prefix = kept.freeze();
                    }
                    buf.set_filled(before + n);
                }
                Err(Malformed { why, whole, begun }) => {
                    buf.set_filled(before + whole);
                    if begun {
                        self.requests.refuse(Refusal::Malformed(why), true);
                        self.over = Some(Over::Broken);
                    } else {
                        self.refuse(Refusal::Malformed(why));
                    }
                }
            },
            Follow::H2 { frames, calm } => {
                let (kept, idle) = frames.sift(read);
                buf.set_filled(before + kept);
                if idle > 0 && !calm.bears(idle, now) {
                    buf.set_filled(before);
                    self.refuse(Refusal::Flood);
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Front<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.over.is_some() {
            return this.poll_over(cx).map(Err);
        }
        if this.half_closed.is_some() {
            return this.poll_half_closed(cx);
        }
        if !ready!(this.paused(cx))? {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = loop {
            let polled = this.fill(cx, buf);
            if buf.filled().len() == before {
                if matches!(polled, Poll::Ready(Ok(()))) && buf.remaining() > 0 && this.waits_for_an_answer()
                {
                    return this.poll_half_closed(cx);
                }
                break polled;
            }
            this.follow(buf, before);
            // Nothing is left where nothing was said: to hand that on would mean the end.
            if buf.filled().len() > before || this.over.is_some() || matches!(this.follow, Follow::H1(_)) {
                break polled;
            }
        };
        if this.over.is_none() && !this.patience(cx) {
            buf.set_filled(before);
            this.refuse(Refusal::HeadTimeout);
        }
        if this.over.is_some() && buf.filled().len() == before {
            return this.poll_over(cx).map(Err);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> Front<S> {
    /// Notes whether what the library says is taken.
    fn wrote(&mut self, cx: &Context<'_>, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if polled.is_ready() && self.blocked && self.over.is_some() {
            // Reading waits for this.
            cx.waker().wake_by_ref();
        }
        self.blocked = polled.is_pending();
        if let Poll::Ready(Ok(n)) = &polled {
            self.written += *n as u64;
        }
        if let (Follow::H2 { calm, .. }, Poll::Ready(Ok(n))) = (&mut self.follow, &polled) {
            calm.said(*n);
        }
        polled
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Front<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.wrote(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.wrote(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
        // The library flushes when it has written all that it holds.
        let said = self.requests.ended();
        if self.said != said {
            self.said = said;
            if self.half_closed.is_some() {
                // Reading waits for this.
                cx.waker().wake_by_ref();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if matches!(this.over, Some(Over::Broken)) {
            // Its answer is written; the client may still be sending.
            this.linger();
        } else if this.over.is_none() && this.is_amidst_a_request() {
            this.linger_upload();
        }
        if matches!(this.over, Some(Over::Linger(_))) {
            ready!(this.poll_linger(cx));
            this.over = Some(Over::Done);
        }
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

/// Answers a client whose first bytes are no HTTP where only HTTP is spoken, and ends.
pub(crate) async fn not_http(recorder: &Recorder, accepted: Accepted, direction: Direction) {
    let Accepted { mut stream, client, original: destination, .. } = accepted;
    let error = Error::NotHttp;
    recorder.error(error.answer().code);
    tracing::warn!(component = direction.as_str(), code = error.answer().code, %error, %client, %destination,
        "answered by the proxy: no request came about");
    // Who has gone reads nothing.
    if stream.write_all(&said(&error, direction)).await.is_err() {
        return;
    }
    let head = Head { bytes: 0, fields: 0, time: LINGER };
    let mut front = Front::h1(stream, Bytes::new(), Requests::default(), direction, head);
    front.linger();
    std::future::poll_fn(|cx| front.poll_linger(cx)).await;
}

/// What reads HTTP/1 behind a [`Front`], but for its timer. That a head has no more fields than it may is seen before.
pub(crate) fn http1(limits: &config::GrowthLimits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    // A little more than a head may have, so that the library is never the first to say no.
    let buffer = limits.header_bytes.max(8 * 1024) + 1024;
    builder.auto_date_header(false).max_buf_size(buffer);
    if limits.headers > config::HEADERS_ON_STACK {
        builder.max_headers(limits.headers);
    }
    builder
}

/// An answer as it goes over the wire, when there is no request that the library could answer.
fn said(error: &Error, direction: Direction) -> Bytes {
    let (head, body) = error.response(direction, false).into_parts();
    let status = head.status;
    let mut out =
        format!("HTTP/1.1 {} {}\r\n", status.as_str(), status.canonical_reason().unwrap_or_default());
    for (name, value) in &head.headers {
        out.push_str(&format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes())));
    }
    out.push_str(&format!("connection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    out.into()
}

fn go_away(last: u32) -> Bytes {
    let mut out = BytesMut::from(&[0, 0, 8, 7, 0, 0, 0, 0, 0][..]);
    out.extend_from_slice(&last.to_be_bytes());
    out.extend_from_slice(&CALM_DOWN.to_be_bytes());
    out.freeze()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use hyper::{body::Incoming, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;
    use crate::answer::Body;

    const LIMIT: Duration = Duration::from_secs(10);
    const HEAD: Head = Head { bytes: 1_000, fields: 10, time: LIMIT };

    /// A server that takes so long for each answer, and a way that holds so many bytes.
    fn served(
        way: usize,
        delay: Duration,
        answer: &'static str,
    ) -> (DuplexStream, tokio::task::JoinHandle<hyper::Result<()>>) {
        let (client, server) = duplex(way);
        let requests = Requests::default();
        let io = TokioIo::new(Front::h1(server, Bytes::new(), requests.clone(), Direction::Inbound, HEAD));
        let service = service_fn(move |_: Request<Incoming>| {
            let in_progress = requests.begin();
            async move {
                tokio::time::sleep(delay).await;
                Ok::<_, Infallible>(Requests::answered(in_progress, Response::new(Body::full(answer))))
            }
        });
        let connection = http1::Builder::new().header_read_timeout(None).serve_connection(io, service);
        (client, tokio::task::spawn_local(connection))
    }

    async fn answered(client: &mut DuplexStream) {
        let mut seen = Vec::new();
        while !seen.ends_with(b"ok") {
            let mut buffer = [0; 1024];
            let n = client.read(&mut buffer).await.unwrap();
            assert!(n > 0, "the connection ended");
            seen.extend_from_slice(&buffer[..n]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_trickles_in_ends_the_connection() {
        let local = tokio::task::LocalSet::new();
        let test = async {
            let (mut client, serving) = served(64 * 1024, 3 * LIMIT, "ok");
            let started = Instant::now();
            for byte in b"GET / HTTP/1.1\r\nhost: a\r\nx-filler: aaaaaaaaaaaaaaaaaaaaaaaaaaaaa" {
                if client.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            assert!(serving.await.unwrap().is_err());
            assert!(started.elapsed() >= LIMIT);
            let mut said = String::new();
            client.read_to_string(&mut said).await.unwrap();
            assert!(said.starts_with("HTTP/1.1 408 ") && said.contains("inbound;header_timeout"), "{said}");
        };
        local.run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_an_idle_connection_and_the_next_request_are_waited_for() {
        let local = tokio::task::LocalSet::new();
        let test = async {
            let (mut client, serving) = served(64 * 1024, 3 * LIMIT, "ok");
            for _ in 0..3 {
                client.write_all(b"GET / HTTP/1.1\r\nhost").await.unwrap();
                tokio::time::sleep(LIMIT / 2).await;
                client.write_all(b": a\r\n\r\n").await.unwrap();
                answered(&mut client).await;
                tokio::time::sleep(10 * LIMIT).await;
            }
            // The next head is as bounded as the first.
            client.write_all(b"GET /").await.unwrap();
            assert!(serving.await.unwrap().is_err());
        };
        local.run_until(test).await;
    }

    /// The library takes an end for one amidst its answer until all that it holds is written.
    #[tokio::test(start_paused = true)]
    async fn a_client_that_half_closes_and_reads_slowly_gets_all_of_its_answer() {
        let answer = "x".repeat(4_000).leak();
        let local = tokio::task::LocalSet::new();
        let test = async {
            for ends_late in [false, true] {
                let (mut client, serving) = served(64, Duration::ZERO, answer);
                client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
                if ends_late {
                    tokio::time::sleep(QUIET / 2).await;
                }
                client.shutdown().await.unwrap();
                tokio::time::sleep(QUIET / 2).await;
                let mut said = String::new();
                client.read_to_string(&mut said).await.unwrap();
                assert!(said.ends_with(&*answer), "{} bytes", said.len());
                serving.await.unwrap().unwrap();
            }
        };
        local.run_until(test).await;
    }
}
