//! What bodies of both directions have in common: how they end early, and how crumbs are gathered.
//!
//! Why crumbs are gathered: HTTP/2 libraries end a connection on which too many small frames lie unread, or a hundred
//! empty ones ever came. A connection between sidecars, or to the app, is shared: what one caller sends in crumbs must
//! not end it for the others.

use std::{
    error::Error as StdError,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame};
use hyper::body::Incoming;

/// Pieces in which an upload is handed on, so that no more than a window and one piece is ever taken ahead.
pub(crate) const PIECE: usize = 16 * 1024;
/// What is smaller is joined with what is there already.
const CRUMB: usize = 256;

/// Why a body ended early.
#[derive(Debug)]
pub(crate) enum BodyError {
    /// As hyper saw it.
    Hyper(hyper::Error),
    /// Another attempt has taken over.
    Superseded,
    /// The request is answered, and its body was not asked for.
    Unasked,
    /// The policy of now refuses the request.
    Revoked,
    /// Its stream was reset before its end.
    Cut,
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hyper(e) => e.fmt(f),
            Self::Superseded => f.write_str("another attempt took over"),
            Self::Unasked => f.write_str("the body was not asked for"),
            Self::Revoked => f.write_str("policy refuses the request now"),
            Self::Cut => f.write_str("its stream was reset before its end"),
        }
    }
}

impl StdError for BodyError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Hyper(e) => e.source(),
            Self::Superseded | Self::Unasked | Self::Revoked | Self::Cut => None,
        }
    }
}

/// What came behind crumbs.
pub(crate) enum Behind {
    End,
    Frame(Frame<Bytes>),
    Failed(BodyError),
}

/// What it means that nothing more comes. The library tells a stream that was reset without an error (RFC 9113 §8.1) as if
/// it had come to its end, and half of a body would pass for all of it.
pub(crate) fn end_of(source: &Incoming, h2: bool) -> Behind {
    if h2 && !source.is_end_stream() { Behind::Failed(BodyError::Cut) } else { Behind::End }
}

/// Data, and if it is a crumb whatever of the same body is there already; and what ended the gathering.
pub(crate) fn gather(
    first: Bytes,
    source: &mut Incoming,
    h2: bool,
    cx: &mut Context<'_>,
) -> (Bytes, Option<Behind>) {
    if first.len() >= CRUMB || source.is_end_stream() {
        return (first, None);
    }
    let mut second = BytesMut::new();
    let joined = |second: BytesMut, first: Bytes| if second.is_empty() { first } else { second.freeze() };
    while second.len() < PIECE && !source.is_end_stream() {
        let next = match Pin::new(&mut *source).poll_frame(cx) {
            Poll::Pending => break,
            Poll::Ready(None) => end_of(source, h2),
            Poll::Ready(Some(Err(error))) => Behind::Failed(BodyError::Hyper(error)),
            Poll::Ready(Some(Ok(frame))) => match frame.data_ref() {
                Some(data) if data.len() < PIECE => {
                    if second.is_empty() {
                        second.extend_from_slice(&first);
                    }
                    second.extend_from_slice(data);
                    continue;
                }
                Some(_) | None => Behind::Frame(frame),
            },
        };
        return (joined(second, first), Some(next));
    }
    (joined(second, first), None)
}
