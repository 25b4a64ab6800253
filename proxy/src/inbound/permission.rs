//! A request that was permitted is held to the policy of now, for as long as it or its answer lasts.
//!
//! Why: a stream may stay open for days, and "denied" must reach it as it reaches the next request. What the policy
//! refuses gets the time of a drain to come to its end, then it is broken off; nothing else on its connection is
//! touched. While policy does not change, this costs a comparison and, if something is waited for, one place among
//! the worker's wakers.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use http::{HeaderValue, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Sleep;

use super::http::Inner;
use crate::{
    answer::Body,
    body::BodyError,
    error::Error,
    expect::{self, WEFT_CONTINUE},
    head::Outgoing,
    telemetry::metrics::Counter,
    wakers::Place,
};

/// One request's permission.
pub(super) struct Permission {
    server: Rc<Inner>,
    /// Under which policy it was given last.
    seen: u64,
    place: Place,
    /// Policy refuses the request now, and this is how long it may last.
    ending: Option<Pin<Box<Sleep>>>,
}

impl Permission {
    /// Given just now.
    pub(super) fn new(server: &Rc<Inner>) -> Self {
        let worker = &server.worker;
        let (seen, place) = (worker.policy_generation(), worker.policy_changes.place());
        Self { server: server.clone(), seen, place, ending: None }
    }

    /// Runs `work` for as long as the request is permitted.
    pub(super) async fn hold<T>(
        &mut self,
        outgoing: &Outgoing,
        mut work: Pin<&mut impl Future<Output = Result<T, Error>>>,
    ) -> Result<T, Error> {
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(done),
            Poll::Pending => self.poll_revoked(cx, outgoing).map(|()| Err(Error::Denied)),
        })
        .await
    }

    /// Whether there is anything to ask.
    fn is_stale(&self) -> bool {
        self.ending.is_some() || self.seen != self.server.worker.policy_generation()
    }

    /// Ready when the time of a request that is permitted no more is over.
    fn poll_revoked(&mut self, cx: &mut Context<'_>, outgoing: &Outgoing) -> Poll<()> {
        let worker = &self.server.worker;
        if self.seen != worker.policy_generation() {
            self.seen = worker.policy_generation();
            if self.server.permits(outgoing) {
                self.ending = None;
            } else if self.ending.is_none() {
                self.ending = Some(Box::pin(tokio::time::sleep(worker.config.times.drain)));
            }
        }
        if let Some(ending) = &mut self.ending
            && ending.as_mut().poll(cx).is_ready()
        {
            worker.recorder.count(Counter::Denied);
            self.server.revoked(outgoing);
            return Poll::Ready(());
        }
        self.place.wait(cx);
        Poll::Pending
    }
}

/// An answer, and the permission of its request.
pub(super) struct Permitted {
    body: Body,
    /// Of an answer that did not end with its head: its request must stay permitted.
    held: Option<Box<(Permission, Outgoing)>>,
    /// The app has asked for the request's body, and this is its answer.
    coming: Option<LocalBoxFuture<'static, Response<Self>>>,
}

impl Permitted {
    /// One that is whole, or that the sidecar made.
    pub(super) fn of(response: Response<Body>) -> Response<Self> {
        response.map(|body| Self { body, held: None, coming: None })
    }

    /// One that may last.
    pub(super) fn held(
        response: Response<Body>,
        permission: Permission,
        outgoing: Outgoing,
    ) -> Response<Self> {
        let lasts = !response.body().is_end_stream();
        response.map(|body| Self {
            body,
            held: lasts.then(|| Box::new((permission, outgoing))),
            coming: None,
        })
    }

    /// Asks a caller's sidecar for the request's body; the answer follows, its head first.
    pub(super) fn coming(answer: LocalBoxFuture<'static, Response<Self>>) -> Response<Self> {
        let mut response = Response::new(Self { body: Body::empty(), held: None, coming: Some(answer) });
        response.headers_mut().insert(WEFT_CONTINUE, HeaderValue::from_static("1"));
        response
    }

    fn break_off(&mut self) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.held = None;
        self.body = Body::empty();
        Poll::Ready(Some(Err(BodyError::Revoked)))
    }
}

impl HttpBody for Permitted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(coming) = &mut this.coming {
            let (head, body) = ready!(coming.as_mut().poll(cx)).into_parts();
            *this = body;
            return Poll::Ready(Some(Ok(Frame::data(expect::write_head(&head)))));
        }
        // Before the body: one that always has more would never be asked.
        if let Some((permission, outgoing)) = this.held.as_deref_mut()
            && permission.is_stale()
            && permission.poll_revoked(cx, outgoing).is_ready()
        {
            return this.break_off();
        }
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match this.held.as_deref_mut() {
            Some((permission, outgoing)) if polled.is_pending() => {
                if permission.poll_revoked(cx, outgoing).is_ready() { this.break_off() } else { polled }
            }
            _ => polled,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.coming.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.coming.is_some() { SizeHint::default() } else { self.body.size_hint() }
    }
}
