//! Bodies of requests: sent to an endpoint, and kept so that they can be sent again.
//!
//! Why the replay buffer suffices: the stream window between sidecars is no larger than the buffer
//! (`pool::UPLOAD_WINDOW`) and a peer opens it only after its app took the request. Whatever was sent of a
//! request that the app never saw is therefore still here, however long the upload is.
//!
//! Why crumbs are kept as copies: a byte that was read keeps the whole buffer alive into which it was read, and HTTP/1
//! reads each into a new one (8 KiB) while the old one is held. A body that trickles would cost thousands of times its
//! size.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::{
    body::{Behind, BodyError, PIECE, end_of, gather},
    expect::{Gate, Passage},
    head,
};

/// What is smaller is kept as a copy, but for what comes first: most bodies are one piece.
const COPIED: usize = 4 * 1024;

/// A request's body as one attempt sends it.
pub(crate) struct Upload(Option<Attempt>);

impl Upload {
    /// Of a request without one.
    pub(crate) fn none() -> Self {
        Self(None)
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            None => Poll::Ready(None),
            Some(attempt) => attempt.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Attempt::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), Attempt::size_hint)
    }
}

/// A request body of which the first bytes are kept, so that another endpoint can be given the whole.
#[derive(Clone)]
pub(crate) struct Replay(Rc<RefCell<Kept>>);

struct Kept {
    source: Incoming,
    /// It comes by HTTP/2.
    h2: bool,
    /// What was read and is kept, in pieces.
    pieces: Vec<Bytes>,
    /// And behind them, copies of small ones: passed by the running attempt as they came.
    crumbs: BytesMut,
    len: usize,
    limit: usize,
    trailers: Option<HeaderMap>,
    /// False once the limit was passed or the answer came: nothing can be replayed any more.
    keeping: bool,
    ended: bool,
    failed: bool,
    /// Pieces that the running attempt has passed.
    passed: usize,
    /// Read from the source but not yet handed on.
    rest: Bytes,
    /// And what came behind it.
    next: Option<Behind>,
    /// The attempt that may read; older ones have lost.
    attempt: u32,
    /// It is there still.
    reading: bool,
    waker: Option<Waker>,
    /// Of a request that expects: nothing is read before it is open.
    gate: Option<Gate>,
}

/// One attempt's view of a [`Replay`].
struct Attempt {
    kept: Rc<RefCell<Kept>>,
    attempt: u32,
    next: usize,
    trailers_sent: bool,
}

impl Replay {
    /// Keeps up to `limit` bytes (and one piece more). `h2`: as it comes.
    pub(crate) fn new(source: Incoming, h2: bool, limit: usize) -> Self {
        Self(Rc::new(RefCell::new(Kept {
            ended: source.is_end_stream(),
            source,
            h2,
            pieces: Vec::new(),
            crumbs: BytesMut::new(),
            len: 0,
            limit: limit + PIECE,
            trailers: None,
            keeping: true,
            failed: false,
            passed: 0,
            rest: Bytes::new(),
            next: None,
            attempt: 0,
            reading: false,
            waker: None,
            gate: None,
        })))
    }

    /// Keeps up to `limit` bytes where that is more; nothing was read yet.
    pub(crate) fn keeps(&self, limit: usize) {
        let mut kept = self.0.borrow_mut();
        kept.limit = kept.limit.max(limit + PIECE);
    }

    /// Holds the body back until it is asked for.
    pub(crate) fn behind(self, gate: Option<Gate>) -> Self {
        self.0.borrow_mut().gate = gate;
        self
    }

    /// What it is held back by, if it is.
    pub(crate) fn gate(&self) -> Option<Gate> {
        self.0.borrow().gate.clone()
    }

    /// A body for the next attempt; the one before stops.
    pub(crate) fn attempt(&self) -> Upload {
        let mut kept = self.0.borrow_mut();
        kept.attempt += 1;
        if let Some(gate) = &kept.gate {
            // Shut behind an attempt that was given up; this one is asked for itself.
            gate.again();
        }
        kept.reading = true;
        kept.passed = 0;
        kept.close();
        if let Some(waker) = kept.waker.take() {
            waker.wake();
        }
        let attempt = Attempt { kept: self.0.clone(), attempt: kept.attempt, next: 0, trailers_sent: false };
        Upload(Some(attempt))
    }

    /// Whether another attempt could send the whole body.
    pub(crate) fn is_replayable(&self) -> bool {
        let kept = self.0.borrow();
        kept.keeping && !kept.failed
    }

    /// Whether the app has sent its whole body and an endpoint was given it.
    pub(crate) fn is_ended(&self) -> bool {
        let kept = self.0.borrow();
        kept.ended && kept.rest.is_empty()
    }

    /// Whether nothing of it is left in its connection.
    pub(crate) fn is_read(&self) -> bool {
        let kept = self.0.borrow();
        !kept.failed && (kept.ended || matches!(kept.next, Some(Behind::End)))
    }

    /// Whether nobody reads it.
    pub(crate) fn is_abandoned(&self) -> bool {
        !self.0.borrow().reading
    }

    /// Reads a body to its end that nobody wants any more.
    pub(crate) async fn discard(&self) {
        {
            let mut kept = self.0.borrow_mut();
            // Whichever attempt still has it reads no more.
            kept.attempt += 1;
            kept.keeping = false;
            kept.clear();
            kept.next = None;
        }
        std::future::poll_fn(|cx| {
            let mut kept = self.0.borrow_mut();
            while !kept.ended {
                match ready!(Pin::new(&mut kept.source).poll_frame(cx)) {
                    None => kept.ended = true,
                    Some(Err(_)) => (kept.failed, kept.ended) = (true, true),
                    Some(Ok(_)) => kept.ended = kept.source.is_end_stream(),
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    /// Whether the app itself broke off its upload.
    pub(crate) fn source_failed(&self) -> bool {
        self.0.borrow().failed
    }

    /// Frees the buffer: the answer is on its way to the app.
    pub(crate) fn forget(&self) {
        let mut kept = self.0.borrow_mut();
        kept.keeping = false;
        // A running attempt that has pieces before it clears them when it has passed them.
        if kept.passed >= kept.pieces.len() {
            kept.clear();
        }
    }
}

impl Kept {
    /// Keeps a piece that the running attempt is given, behind all others.
    fn keep(&mut self, piece: &Bytes) {
        let first = self.pieces.is_empty() && self.crumbs.is_empty();
        if first || piece.len() >= COPIED {
            self.close();
            self.pieces.push(piece.clone());
        } else {
            self.crumbs.extend_from_slice(piece);
            if self.crumbs.len() >= PIECE {
                self.close();
            }
        }
    }

    /// Makes a piece of what lies behind the pieces.
    fn close(&mut self) {
        if !self.crumbs.is_empty() {
            self.pieces.push(std::mem::take(&mut self.crumbs).freeze());
        }
    }

    /// Frees what is kept.
    fn clear(&mut self) {
        (self.pieces, self.crumbs) = (Vec::new(), BytesMut::new());
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut kept = self.kept.borrow_mut();
        if kept.attempt == self.attempt {
            kept.reading = false;
        }
    }
}

impl Attempt {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut kept = self.kept.borrow_mut();
        let kept = &mut *kept;
        if kept.attempt != self.attempt {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(gate) = &kept.gate {
            match gate.poll(cx) {
                Passage::Go => {}
                Passage::Wait => return Poll::Pending,
                Passage::Never => return Poll::Ready(Some(Err(BodyError::Unasked))),
            }
        }
        loop {
            if !kept.keeping && self.next >= kept.pieces.len() {
                kept.clear();
                self.next = 0;
            }
            if let Some(piece) = kept.pieces.get(self.next) {
                self.next += 1;
                kept.passed = self.next;
                let piece = piece.clone();
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if !kept.rest.is_empty() {
                let piece = kept.rest.split_to(kept.rest.len().min(PIECE));
                kept.len += piece.len();
                if kept.keeping && kept.len > kept.limit {
                    kept.keeping = false;
                    kept.clear();
                    self.next = 0;
                }
                if kept.keeping {
                    kept.keep(&piece);
                    self.next = kept.pieces.len();
                    kept.passed = self.next;
                }
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if kept.ended {
                if self.trailers_sent {
                    return Poll::Ready(None);
                }
                self.trailers_sent = true;
                return Poll::Ready(kept.trailers.clone().map(|t| Ok(Frame::trailers(t))));
            }
            let next = match kept.next.take() {
                Some(next) => next,
                None => match Pin::new(&mut kept.source).poll_frame(cx) {
                    Poll::Pending => {
                        kept.waker = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                    Poll::Ready(None) => end_of(&kept.source, kept.h2),
                    Poll::Ready(Some(Err(error))) => Behind::Failed(BodyError::Hyper(error)),
                    Poll::Ready(Some(Ok(frame))) => Behind::Frame(frame),
                },
            };
            match next {
                Behind::End => kept.ended = true,
                Behind::Failed(error) => {
                    kept.failed = true;
                    kept.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                Behind::Frame(frame) => match frame.into_data() {
                    Ok(data) => {
                        (kept.rest, kept.next) = gather(data, &mut kept.source, kept.h2, cx);
                        kept.ended = kept.next.is_none() && kept.source.is_end_stream();
                    }
                    Err(frame) => {
                        kept.trailers = frame.into_trailers().ok();
                        if let Some(trailers) = &mut kept.trailers {
                            head::clean_trailers(trailers);
                        }
                        kept.ended = true;
                    }
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let kept = self.kept.borrow();
        kept.ended
            && self.next >= kept.pieces.len()
            && kept.rest.is_empty()
            && (kept.trailers.is_none() || self.trailers_sent)
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.kept.borrow();
        let next = match &kept.next {
            Some(Behind::Frame(frame)) => frame.data_ref().map_or(0, Bytes::len),
            Some(Behind::End | Behind::Failed(_)) | None => 0,
        };
        let ahead: usize =
            kept.pieces.get(self.next..).unwrap_or_default().iter().map(Bytes::len).sum::<usize>()
                + kept.rest.len()
                + next;
        let ahead = ahead as u64;
        let rest = kept.source.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + ahead);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + ahead);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// The body of a request that came over HTTP/1 in these pieces, each of them in a read of its own.
    async fn came(pieces: impl Iterator<Item = Vec<u8>> + Clone + 'static) -> Incoming {
        let length: usize = pieces.clone().map(|piece| piece.len()).sum();
        let (mut client, server) = tokio::io::duplex(16 * 1024);
        let (give, take) = tokio::sync::oneshot::channel();
        let give = RefCell::new(Some(give));
        tokio::task::spawn_local(async move {
            let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
                give.borrow_mut().take().unwrap().send(request.into_body()).unwrap();
                std::future::pending::<Result<http::Response<Upload>, std::convert::Infallible>>()
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(server), service)
                .await;
        });
        tokio::task::spawn_local(async move {
            let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
            client.write_all(head.as_bytes()).await.unwrap();
            for piece in pieces {
                client.write_all(&piece).await.unwrap();
                // One thread: the server reads it before more is written.
                for _ in 0..4 {
                    tokio::task::yield_now().await;
                }
            }
            std::future::pending::<()>().await;
        });
        take.await.unwrap()
    }

    #[tokio::test]
    async fn a_body_that_trickles_is_kept_whole_in_a_few_pieces() {
        const LENGTH: usize = 50_000;
        let trickle = (0..LENGTH).map(|n| vec![n as u8]);
        let expected: Vec<u8> = trickle.clone().flatten().collect();
        let test = async {
            let replay = Replay::new(came(trickle).await, false, 64 * 1024);
            let mut first = replay.attempt();
            let mut frames = 0;
            let mut passed = Vec::new();
            while let Some(frame) = first.frame().await {
                frames += 1;
                passed.extend_from_slice(frame.unwrap().data_ref().unwrap());
                // Cut short: this attempt has failed, and its successor gets what was kept.
                if passed.len() == LENGTH - 10 {
                    break;
                }
            }
            assert!(passed == expected[..LENGTH - 10]);
            assert!(frames > LENGTH / 2, "read one by one: {frames}");
            let pieces = replay.0.borrow().pieces.len();
            assert!(pieces < 10, "each holds a buffer: {pieces}");
            assert!(replay.is_replayable());
            let again = replay.attempt();
            drop(first);
            assert_eq!(again.size_hint().exact(), Some(LENGTH as u64));
            let whole = again.collect().await.unwrap().to_bytes();
            assert!(whole == expected);
            assert!(replay.is_ended());
        };
        tokio::task::LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn whatever_the_sizes_each_attempt_sends_the_same() {
        let sizes = [1_usize, 5_000, 3, 3, 4_095, 4_096, 17_000, 1, 9_000, 100, 2];
        let pieces = sizes.into_iter().enumerate().map(|(n, size)| vec![n as u8; size]);
        let expected: Vec<u8> = pieces.clone().flatten().collect();
        let test = async {
            for cut in [0, 1, 4_000, 9_000, 30_000, expected.len() - 1] {
                let replay = Replay::new(came(pieces.clone()).await, false, 64 * 1024);
                let mut first = replay.attempt();
                let mut passed = 0;
                while passed < cut {
                    passed += first.frame().await.unwrap().unwrap().data_ref().unwrap().len();
                }
                for _ in 0..2 {
                    let again = replay.attempt();
                    assert!(again.collect().await.unwrap().to_bytes() == expected, "after {cut}");
                }
            }
        };
        tokio::task::LocalSet::new().run_until(test).await;
    }
}
