//! What stands between the HTTP library and an app, or a server outside the mesh: what comes from there is followed before
//! the library sees it, as [`front`](crate::front) follows clients.
//!
//! Why an app is not believed either: an answer that has two readings (`weft_core::framing`) lets whoever can shape it put
//! words into the answer to the next request on that connection. And empty HTTP/2 frames, which mean nothing, make the
//! library end a connection that other requests are on (`weft_core::frames`); those that bring nothing forward cost us and
//! not their sender.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use weft_core::{
    frames::{Calm, Frames},
    framing::{Framing, HeadLimits, Side, To, Why},
};

use crate::{clock::now, tcp::write_to_inner};

/// An HTTP/2 connection to a server, without the frames that mean nothing, and ended when too many bring nothing forward.
pub(crate) struct Sifted<S> {
    inner: S,
    frames: Frames,
    calm: Calm,
}

impl<S> Sifted<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self { inner, frames: Frames::of_server(), calm: Calm::default() }
    }

    fn said(&mut self, bytes: usize) {
        self.calm.said(bytes);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sifted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        loop {
            ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
            if buf.filled().len() == before {
                return Poll::Ready(Ok(()));
            }
            let (kept, idle) = this.frames.sift(&mut buf.filled_mut()[before..]);
            buf.set_filled(before + kept);
            if idle > 0 && !this.calm.bears(idle, now) {
                return Poll::Ready(Err(io::Error::other(
                    "the server sends too many frames that bring nothing",
                )));
            }
            if kept > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

write_to_inner!(Sifted, told said);

/// A connection to an app, or to a server outside the mesh, whose answers are followed.
pub(crate) struct Back<S> {
    inner: S,
    framing: Box<Framing>,
    due: Due,
    bad: Option<BadAnswer>,
    /// The app takes no more.
    deaf: bool,
}

/// To what the next answer on a connection is due.
#[derive(Clone, Default)]
pub(crate) struct Due(Arc<AtomicU8>);

/// An answer that could be read in two ways.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("malformed answer: {0}")]
pub(crate) struct BadAnswer(Why);

impl Due {
    /// Told before the request goes out.
    pub(crate) fn to(&self, method: &http::Method) {
        self.0.store(if *method == http::Method::HEAD { 2 } else { 1 }, Ordering::Relaxed);
    }

    fn take(&self) -> Option<To> {
        match self.0.swap(0, Ordering::Relaxed) {
            1 => Some(To::Any),
            2 => Some(To::Head),
            _ => None,
        }
    }
}

impl<S> Back<S> {
    /// What it stands before.
    pub(crate) fn inner(&self) -> &S {
        &self.inner
    }

    pub(crate) fn new(inner: S, due: Due, limits: HeadLimits) -> Self {
        Self { inner, framing: Box::new(Framing::new(Side::Responses, limits)), due, bad: None, deaf: false }
    }
}

impl BadAnswer {
    /// Whether an IO error is one.
    pub(crate) fn is(error: &(dyn std::error::Error + 'static)) -> bool {
        let io = error.downcast_ref::<io::Error>();
        io.and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<Self>())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Back<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(bad) = this.bad {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, bad)));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        if buf.filled().len() == before {
            return Poll::Ready(Ok(()));
        }
        if this.framing.is_between()
            && let Some(to) = this.due.take()
        {
            this.framing.expect(to);
        }
        if let Err(malformed) = this.framing.feed(&buf.filled()[before..]) {
            let bad = BadAnswer(malformed.why);
            this.bad = Some(bad);
            buf.set_filled(before + malformed.whole);
            if malformed.whole == 0 {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, bad)));
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// An app that answers and closes before it has read everything resets the connection: what it said is there to be read, and
/// must not be lost to a write that fails. What it does not take is thrown away; reading tells how it ended.
impl<S> Back<S> {
    fn wrote(&mut self, all: usize, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match polled {
            Poll::Ready(Err(error)) if is_their_end(&error) => {
                self.deaf = true;
                Poll::Ready(Ok(all))
            }
            polled @ (Poll::Ready(_) | Poll::Pending) => polled,
        }
    }
}

fn is_their_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Back<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Ready(Ok(buf.len()));
        }
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.wrote(buf.len(), polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = bufs.iter().map(|buf| buf.len()).sum();
        if self.deaf {
            return Poll::Ready(Ok(all));
        }
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.wrote(all, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
