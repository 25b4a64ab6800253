//! Bodies of answers: what carries the lease back to the app.
//!
//! Why the lease rides in the response: a gRPC status comes in trailers and latency is taken at the first
//! data frame, so neither is known when the head arrives. The response body holds the lease, the telemetry
//! record and the connection, and settles all three exactly once, also when the app goes away.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use weft_core::{
    balance::Lease,
    classify::{self, Class, Failure, Outcome},
};

use crate::{
    body::{Behind, BodyError, end_of, gather},
    clock::now,
    drain::RequestGuard,
    head,
    pod_wide::Permit,
    pool::Checkout,
    telemetry::exchange::Exchange,
};

/// An answer's body on its way to whoever asked.
pub(crate) struct Body(Kind);

enum Kind {
    /// Made here.
    Full(Bytes),
    /// At its end already.
    Incoming(Incoming),
    Watched(Box<Watched>),
}

impl Body {
    pub(crate) fn empty() -> Self {
        Self(Kind::Full(Bytes::new()))
    }

    pub(crate) fn full(data: impl Into<Bytes>) -> Self {
        Self(Kind::Full(data.into()))
    }

    /// An answer's body; `h2`: as it came.
    pub(crate) fn watched(inner: Incoming, h2: bool, tail: Tail) -> Self {
        if inner.is_end_stream() {
            let mut tail = tail;
            tail.first_byte();
            tail.end(None);
            return Self(Kind::Incoming(inner));
        }
        Self(Kind::Watched(Box::new(Watched { inner, h2, next: None, tail: Some(tail) })))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Kind::Full(data) => {
                let data = std::mem::take(data);
                Poll::Ready((!data.is_empty()).then(|| Ok(Frame::data(data))))
            }
            Kind::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::Hyper),
            Kind::Watched(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Full(data) => data.is_empty(),
            Kind::Incoming(body) => body.is_end_stream(),
            Kind::Watched(body) => body.next.is_none() && body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Full(data) => SizeHint::with_exact(data.len() as u64),
            Kind::Incoming(body) => body.size_hint(),
            Kind::Watched(body) => body.inner.size_hint(),
        }
    }
}

/// What counts a request until its response ends.
pub(crate) enum Held {
    Outbound { _permit: Permit },
    Inbound { _guard: RequestGuard },
}

/// What is settled when a response ends.
pub(crate) struct Tail {
    pub(crate) lease: Option<Lease>,
    pub(crate) exchange: Exchange,
    pub(crate) connection: Option<Checkout>,
    #[expect(dead_code, reason = "counted until this is dropped")]
    pub(crate) held: Held,
    /// As far as the head tells.
    pub(crate) outcome: Outcome,
    /// The class to record, where it does not follow from the outcome (an answer that a sidecar made).
    pub(crate) class: Option<Class>,
    /// The status is in the trailers.
    pub(crate) grpc: bool,
    pub(crate) seen_data: bool,
}

struct Watched {
    inner: Incoming,
    /// It comes by HTTP/2.
    h2: bool,
    next: Option<Behind>,
    tail: Option<Tail>,
}

impl Watched {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let next = match self.next.take() {
                Some(next) => next,
                None => match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                    None => end_of(&self.inner, self.h2),
                    Some(Err(error)) => Behind::Failed(BodyError::Hyper(error)),
                    Some(Ok(frame)) => Behind::Frame(frame),
                },
            };
            let frame = match next {
                Behind::End => {
                    self.end(None);
                    return Poll::Ready(None);
                }
                Behind::Failed(error) => {
                    if let Some(tail) = self.tail.take() {
                        tail.settle(Outcome::Failure(Failure::Reset), Class::ServerError, false);
                    }
                    return Poll::Ready(Some(Err(error)));
                }
                Behind::Frame(frame) => frame,
            };
            if let Some(tail) = &mut self.tail
                && !tail.seen_data
            {
                tail.first_byte();
            }
            let mut frame = match frame.into_data() {
                Ok(data) => {
                    let (data, next) = gather(data, &mut self.inner, self.h2, cx);
                    self.next = next;
                    if data.is_empty() && !(self.next.is_none() && self.inner.is_end_stream()) {
                        continue;
                    }
                    Frame::data(data)
                }
                Err(frame) => frame,
            };
            if let Some(trailers) = frame.trailers_mut() {
                head::clean_trailers(trailers);
                self.end(Some(trailers));
            } else if self.next.is_none() && self.inner.is_end_stream() {
                self.end(None);
            }
            return Poll::Ready(Some(Ok(frame)));
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        if let Some(tail) = self.tail.take() {
            tail.end(trailers);
        }
    }
}

impl Tail {
    pub(crate) fn first_byte(&mut self) {
        self.seen_data = true;
        let now = now();
        self.exchange.first_byte(now);
        if let Some(lease) = &mut self.lease {
            lease.first_byte(now);
        }
    }

    pub(crate) fn end(self, trailers: Option<&HeaderMap>) {
        let outcome = match (self.grpc, trailers.and_then(classify::grpc_status)) {
            (true, Some(code)) => classify::grpc(code),
            (true, None) if self.outcome == Outcome::Success => {
                // A gRPC answer without a status is an error to its caller (gRPC over HTTP/2: UNKNOWN).
                classify::grpc(2)
            }
            _ => self.outcome,
        };
        let class = self.class.unwrap_or_else(|| outcome.class());
        self.settle(outcome, class, true);
    }

    fn settle(mut self, outcome: Outcome, class: Class, whole: bool) {
        let now = now();
        if let Some(lease) = self.lease.take() {
            self.exchange.settled(lease.finish(outcome, now));
        }
        if let Some(connection) = self.connection.take()
            && whole
        {
            connection.give_back(now);
        }
        self.exchange.finish(class, now);
    }
}
