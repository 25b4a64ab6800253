//! `Expect: 100-continue`: a body is sent when whoever will read it asks for it.
//!
//! Why end to end: a client that expects wants to hear 413, 401 or 417 before it sends a gigabyte, and only the app knows.
//! So a body stays behind a [`Gate`] that the next hop opens, and the library asks the client for it (`100 Continue`) when
//! the gate lets it be read for the first time. The hop to an app or a server is HTTP/1.1: its `100` opens the gate. An
//! app that never says it must not wait for ever for a body that nobody sends: after [`PATIENCE`] the gate opens by
//! itself, as clients do (RFC 9110 §10.1.1).
//!
//! Why an answer's head crosses inside of its body between sidecars: the far end must say "now send it" before it has
//! an answer, and the library hides what HTTP/2 has for that. So it begins an answer that says so
//! (`weft-continue`), and the real head follows as the first piece of that answer's body, in the form of [`write_head`].
//! Only requests that expect are answered so, and only if their caller has said that it knows (`weft-expect`).

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::Context,
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Version, header, response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::Notify;

/// On a request between sidecars: its body waits to be asked for.
pub(crate) const WEFT_EXPECT: HeaderName = HeaderName::from_static("weft-expect");
/// On an answer between sidecars: send the body; the real head comes first in this answer's body.
pub(crate) const WEFT_CONTINUE: HeaderName = HeaderName::from_static("weft-continue");

/// How long an app that does not ask for a body is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// A sidecar that is older than this exchange never asks. More than the far end's own patience and the way there.
pub(crate) const PATIENCE_MESH: Duration = Duration::from_secs(3);
/// Nobody's head is larger: heads end at 64 KiB, and what a library adds is little.
const MAX_HEAD: usize = 1 << 20;

/// What a body waits behind. Atomic because the library wants what hears of an informational answer to be `Send`.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: AtomicU8,
    body: AtomicWaker,
    opened: Notify,
}

const OPEN: u8 = 1;
const SHUT: u8 = 2;

/// What a body behind a gate may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    Wait,
    Go,
    /// Nobody will ever ask for it.
    Never,
}

impl Gate {
    fn passage(&self) -> Passage {
        match self.0.state.load(Ordering::Acquire) {
            OPEN => Passage::Go,
            SHUT => Passage::Never,
            _ => Passage::Wait,
        }
    }

    /// Whether the body was asked for.
    pub(crate) fn is_open(&self) -> bool {
        self.passage() == Passage::Go
    }

    /// Asks for the body.
    pub(crate) fn open(&self) {
        self.set(OPEN);
        self.0.opened.notify_one();
    }

    /// The request is answered and its body was never asked for: its connection must not wait for it.
    pub(crate) fn shut(&self) {
        self.set(SHUT);
    }

    /// Undoes [`Self::shut`]: the request goes to another endpoint.
    pub(crate) fn again(&self) {
        let _ = self.0.state.compare_exchange(SHUT, 0, Ordering::AcqRel, Ordering::Acquire);
    }

    fn set(&self, state: u8) {
        // Whichever comes first stays.
        let _ = self.0.state.compare_exchange(0, state, Ordering::AcqRel, Ordering::Acquire);
        self.0.body.wake();
    }

    /// Whether the body may pass; if it is to wait, `cx` is woken.
    pub(crate) fn poll(&self, cx: &Context<'_>) -> Passage {
        match self.passage() {
            Passage::Wait => {
                self.0.body.register(cx.waker());
                self.passage()
            }
            decided @ (Passage::Go | Passage::Never) => decided,
        }
    }

    /// Returns when the body was asked for.
    pub(crate) async fn opened(&self) {
        if !self.is_open() {
            self.0.opened.notified().await;
        }
    }

    /// Makes the `100 Continue` of an HTTP/1.1 server open this gate.
    pub(crate) fn opens_at_100<B>(&self, request: &mut Request<B>) {
        let gate = self.clone();
        hyper::ext::on_informational(request, move |answer| {
            if answer.status() == StatusCode::CONTINUE {
                gate.open();
            }
        });
    }

    /// Waits for an answer, and opens when that takes longer than `patience`.
    pub(crate) async fn patient<T>(
        &self,
        patience: Duration,
        mut answer: Pin<&mut impl Future<Output = T>>,
    ) -> T {
        if let Ok(answered) = tokio::time::timeout(patience, answer.as_mut()).await {
            return answered;
        }
        self.open();
        answer.await
    }
}

/// The gate of a request whose body waits to be asked for: its client's HTTP/1.1 says so, or a sidecar does. HTTP/1.0 does
/// not know it, and over HTTP/2 the library cannot ask.
pub(crate) fn gate<B: http_body::Body>(request: &Request<B>, mesh: bool) -> Option<Gate> {
    let headers = request.headers();
    if headers.is_empty() || request.body().is_end_stream() {
        return None;
    }
    let expects = if mesh {
        headers.contains_key(WEFT_EXPECT)
    } else {
        request.version() == Version::HTTP_11
            && headers.get(header::EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"))
    };
    // An answer to HEAD has no body in which its head could follow, and an upgrade has none before its answer.
    let plain = || *request.method() != Method::HEAD && !headers.contains_key(header::UPGRADE);
    (expects && plain()).then(Gate::default)
}

/// A head for the inside of a body: its length (32 bits), the status (16), and each field as length (16) and name,
/// length (32) and value; all in network order.
pub(crate) fn write_head(head: &response::Parts) -> Bytes {
    let mut out = BytesMut::with_capacity(1_024);
    out.put_u32(0);
    out.put_u16(head.status.as_u16());
    for (name, value) in &head.headers {
        // A name has at most 64 KiB - 1, which the library sees to.
        out.put_u16(name.as_str().len() as u16);
        out.put_slice(name.as_str().as_bytes());
        out.put_u32(value.len() as u32);
        out.put_slice(value.as_bytes());
    }
    let length = out.len() as u32 - 4;
    out[..4].copy_from_slice(&length.to_be_bytes());
    out.freeze()
}

/// Reads what [`write_head`] wrote from the start of a body; nothing if that is not what it starts with.
pub(crate) async fn read_head(body: &mut Incoming) -> Option<(StatusCode, HeaderMap)> {
    let mut bytes = BytesMut::new();
    loop {
        if let Some(prefix) = bytes.first_chunk::<4>() {
            let length = u32::from_be_bytes(*prefix) as usize;
            if length > MAX_HEAD || bytes.len() > length + 4 {
                // What follows it comes in pieces of its own.
                return None;
            }
            if bytes.len() == length + 4 {
                bytes.advance(4);
                return parse_head(bytes.freeze());
            }
        }
        bytes.extend_from_slice(&body.frame().await?.ok()?.into_data().ok()?);
    }
}

fn parse_head(mut bytes: Bytes) -> Option<(StatusCode, HeaderMap)> {
    let status = StatusCode::from_u16(bytes.try_get_u16().ok()?).ok()?;
    let mut headers = HeaderMap::new();
    while !bytes.is_empty() {
        let length = usize::from(bytes.try_get_u16().ok()?);
        let name = HeaderName::from_bytes(&take(&mut bytes, length)?).ok()?;
        let length = usize::try_from(bytes.try_get_u32().ok()?).ok()?;
        headers.append(name, HeaderValue::from_maybe_shared(take(&mut bytes, length)?).ok()?);
    }
    Some((status, headers))
}

fn take(bytes: &mut Bytes, length: usize) -> Option<Bytes> {
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    #[test]
    fn a_head_is_read_as_it_was_written_and_a_torn_one_is_not_read() {
        let head = Response::builder().status(413).header("a", "1").header("b", "").header("a", "2");
        let (head, ()) = head.body(()).unwrap().into_parts();
        let mut written = write_head(&head);
        written.advance(4);
        assert_eq!(parse_head(written.clone()), Some((head.status, head.headers)));
        for torn in 0..written.len() {
            let read = parse_head(written.slice(..torn));
            assert!(read.is_none_or(|(_, headers)| headers.len() < 3), "{torn}");
        }
    }

    #[test]
    fn what_is_decided_first_stays() {
        let gate = Gate::default();
        assert!(!gate.is_open());
        gate.shut();
        gate.open();
        assert!(!gate.is_open());
        let gate = Gate::default();
        gate.open();
        gate.shut();
        assert!(gate.is_open());
    }

    #[test]
    fn only_a_body_of_http_1_1_can_be_asked_for() {
        let asked = |version, method, expect: Option<&str>, body: &'static str, mesh| {
            let mut request = Request::builder().version(version).method(method).header("host", "a");
            if let Some(expect) = expect {
                request = request.header(if mesh { "weft-expect" } else { "expect" }, expect);
            }
            gate(&request.body(http_body_util::Full::new(Bytes::from_static(body.as_bytes()))).unwrap(), mesh)
                .is_some()
        };
        let expect = Some("100-Continue");
        assert!(asked(Version::HTTP_11, "POST", expect, "x", false));
        assert!(asked(Version::HTTP_2, "POST", Some("1"), "x", true));
        assert!(!asked(Version::HTTP_10, "POST", expect, "x", false));
        assert!(!asked(Version::HTTP_2, "POST", expect, "x", false));
        assert!(!asked(Version::HTTP_11, "HEAD", expect, "x", false));
        assert!(!asked(Version::HTTP_11, "POST", expect, "", false));
        assert!(!asked(Version::HTTP_11, "POST", None, "x", false));
    }
}
