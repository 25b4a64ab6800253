//! The requests of one connection, as the service that answers them and the IO that brings them both see them.
//!
//! Why both must: IO alone does not know when an answer has ended, and the service does not know why nothing more comes. What
//! one of them finds out about a client decides what the other one says to it.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use http::{Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use weft_core::framing::Why;

use crate::{direction::Direction, error::Error, head, telemetry::recorder::Recorder, upload::Replay};

/// The requests of one HTTP/1 connection, as its service and its IO both see them. Atomic only because the library wants
/// IO to be `Send`.
#[derive(Clone, Default)]
pub(crate) struct Requests(Arc<Shared>);

#[derive(Default)]
struct Shared {
    begun: AtomicU64,
    answered: AtomicU64,
    ended: AtomicU64,
    /// A request was answered with another protocol.
    switched: AtomicBool,
    /// All of the last request has arrived.
    whole: AtomicBool,
    /// The IO waits for an answer's end.
    waits: AtomicBool,
    io: AtomicWaker,
    /// Why no more is read of the client, if so.
    refused: OnceLock<Refusal>,
    /// It was refused amidst a request.
    broken: AtomicBool,
}

/// One request in progress, until its answer is written.
pub(crate) struct InProgress(Requests);

/// Why a connection's client was refused before there was a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Malformed(Why),
    HeadTimeout,
    /// HTTP/2 frames that bring nothing forward, too many.
    Flood,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed(why) => Self::Malformed(why),
            Refusal::HeadTimeout => Self::HeadTimeout,
            Refusal::Flood => Self::Flood,
        }
    }
}

impl Requests {
    pub(crate) fn begin(&self) -> InProgress {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
        InProgress(self.clone())
    }

    /// An answer that holds its request.
    pub(crate) fn answered<B>(in_progress: InProgress, response: Response<B>) -> Response<AnswerBody<B>> {
        in_progress.0.0.answered.fetch_add(1, Ordering::Relaxed);
        let in_progress = if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            in_progress.for_ever();
            None
        } else {
            Some(in_progress)
        };
        response.map(|body| AnswerBody { body, in_progress })
    }

    /// Says in an answer's head that the connection ends with it, if something of its request's body is left in the
    /// connection: the library ends it then, and a client that does not know sends its next request in vain. What has
    /// arrived of a body that nobody wants is no reason: it is read and thrown away.
    pub(crate) async fn ends_after<B>(
        &self,
        upload: Option<&Replay>,
        refused: bool,
        response: &mut Response<B>,
    ) {
        let Some(upload) = upload.filter(|upload| !upload.is_read()) else { return };
        // Of a body that waits to be asked for, only the client knows whether it follows none the less.
        let unwanted = refused || upload.is_abandoned();
        if unwanted && self.0.whole.load(Ordering::Relaxed) && upload.gate().is_none_or(|gate| gate.is_open())
        {
            upload.discard().await;
        }
        if !upload.is_read() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            head::closes(response);
        }
    }

    /// Counts and logs why a connection was refused, when it has ended; what was answered as a request has been.
    pub(crate) fn report(
        &self,
        recorder: &Recorder,
        ended: &hyper::Result<()>,
        direction: Direction,
        client: SocketAddr,
        destination: SocketAddr,
    ) {
        let error = match self.refused() {
            Some(refusal) if !self.0.broken.load(Ordering::Relaxed) => Error::from(refusal),
            // Something that is the library's to refuse, such as a target that is no URI.
            None if ended.as_ref().is_err_and(hyper::Error::is_parse) => Error::Malformed(Why::StartLine),
            Some(_) | None => return,
        };
        let answer = error.answer();
        recorder.error(answer.code);
        tracing::warn!(component = direction.as_str(), code = answer.code, status = answer.status.as_u16(), %error,
            %client, %destination, "answered by the proxy: no request came about");
    }

    /// Why no more is read of the client, if so.
    pub(crate) fn refused(&self) -> Option<Refusal> {
        self.0.refused.get().copied()
    }

    /// Says why no more is read; `amidst`: of a request that has begun.
    pub(super) fn refuse(&self, refusal: Refusal, amidst: bool) {
        self.0.broken.store(amidst, Ordering::Relaxed);
        // The first reason is the one: nothing was read behind it.
        let _ = self.0.refused.set(refusal);
    }

    /// Says whether all of the last request has arrived.
    pub(super) fn arrived(&self, whole: bool) {
        self.0.whole.store(whole, Ordering::Relaxed);
    }

    pub(super) fn begun(&self) -> u64 {
        self.0.begun.load(Ordering::Relaxed)
    }

    pub(super) fn ended(&self) -> u64 {
        self.0.ended.load(Ordering::Relaxed)
    }

    pub(super) fn in_progress(&self) -> bool {
        self.begun() != self.ended()
    }

    /// All that was asked has an answer, at least the beginning of one.
    pub(super) fn all_answered(&self) -> bool {
        self.begun() == self.0.answered.load(Ordering::Relaxed)
    }

    pub(super) fn switched(&self) -> bool {
        self.0.switched.load(Ordering::Relaxed)
    }

    /// Pending until a request ends.
    pub(super) fn wait<T>(&self, cx: &Context<'_>) -> Poll<T> {
        self.0.waits.store(true, Ordering::Relaxed);
        self.0.io.register(cx.waker());
        Poll::Pending
    }

    fn wake(&self) {
        if self.0.waits.swap(false, Ordering::Relaxed) {
            self.0.io.wake();
        }
    }
}

impl InProgress {
    /// The connection carries no more requests: its protocol was changed.
    pub(crate) fn for_ever(self) {
        self.0.0.switched.store(true, Ordering::Relaxed);
        self.0.0.begun.fetch_add(1, Ordering::Relaxed);
        self.0.wake();
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.0.ended.fetch_add(1, Ordering::Relaxed);
        if self.0.0.waits.load(Ordering::Relaxed) {
            self.0.wake();
        }
    }
}

/// An answer's body that holds its request.
pub(crate) struct AnswerBody<B> {
    body: B,
    #[expect(dead_code, reason = "in progress until this is dropped")]
    in_progress: Option<InProgress>,
}

impl<B: HttpBody + Unpin> HttpBody for AnswerBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What made a request fail: an upload breaks off when what follows of it is refused.
pub(crate) fn behind(error: Error, requests: Option<&Requests>) -> Error {
    match (error, requests.and_then(Requests::refused)) {
        (Error::UploadBroken, Some(refusal)) => refusal.into(),
        (error, _) => error,
    }
}
