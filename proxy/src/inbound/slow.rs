//! A client that sends a request's head slower than it may is not waited for.
//!
//! Why not hyper's own timer: it counts from when a head is wanted, so one deadline would have to serve both for an
//! idle keep-alive connection (minutes) and for a head that has begun (seconds). This one counts from the first
//! byte that comes while no request is in progress.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use crate::body::{Body, BodyError};

/// How many requests have begun and ended on one connection. Atomic only because hyper wants its IO to be `Send`.
#[derive(Clone, Default)]
pub(super) struct Requests(Arc<Counts>);

#[derive(Default)]
struct Counts {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// One request in progress, until its answer is written.
pub(super) struct InProgress(Requests);

impl Requests {
    pub(super) fn begin(&self) -> InProgress {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
        InProgress(self.clone())
    }
}

impl InProgress {
    /// The connection carries no more requests: it was upgraded.
    pub(super) fn for_ever(self) {
        self.0.0.begun.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// An answer's body that holds its request.
pub(super) struct Answer {
    pub(super) body: Body,
    #[expect(dead_code, reason = "in progress until this is dropped")]
    pub(super) in_progress: Option<InProgress>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that ends when a head takes longer than `limit` from its first byte.
pub(super) struct Patience<S> {
    inner: S,
    requests: Requests,
    limit: Duration,
    /// A head has begun: how many requests had begun before it, and when its time is up.
    head: Option<(u64, Instant)>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Patience<S> {
    pub(super) fn new(inner: S, requests: Requests, limit: Duration) -> Self {
        Self { inner, requests, limit, head: None, timer: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patience<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.inner).poll_read(cx, buf);
        let begun = this.requests.0.begun.load(Ordering::Relaxed);
        if begun != this.requests.0.ended.load(Ordering::Relaxed) {
            this.head = None;
            return polled;
        }
        match this.head {
            Some((of, deadline)) if of == begun => {
                let limit = this.limit;
                let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
                if timer.deadline() != deadline {
                    timer.as_mut().reset(deadline);
                }
                // Each byte of a head that never ends would be an event of its own: time is asked every time.
                if timer.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
            // The common case: the first read holds the whole head, and no timer is ever made.
            Some(_) | None => {
                this.head = (buf.filled().len() > before).then(|| (begun, Instant::now() + this.limit));
            }
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patience<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use hyper::{body::Incoming, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A server that takes 30 s for each answer.
    fn served() -> (DuplexStream, tokio::task::JoinHandle<hyper::Result<()>>) {
        let (client, server) = duplex(64 * 1024);
        let requests = Requests::default();
        let io = TokioIo::new(Patience::new(server, requests.clone(), LIMIT));
        let service = service_fn(move |_: Request<Incoming>| {
            let in_progress = Some(requests.begin());
            async move {
                tokio::time::sleep(3 * LIMIT).await;
                Ok::<_, Infallible>(Response::new(Answer { body: Body::full("ok"), in_progress }))
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .header_read_timeout(None)
            .serve_connection(io, service);
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
            let (mut client, serving) = served();
            let started = Instant::now();
            for byte in b"GET / HTTP/1.1\r\nhost: a\r\nx-filler: aaaaaaaaaaaaaaaaaaaaaaaaaaaaa" {
                if client.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            assert!(serving.await.unwrap().is_err());
            assert!(started.elapsed() >= LIMIT);
            assert!(client.read(&mut [0; 1]).await.is_ok_and(|n| n == 0));
        };
        local.run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_an_idle_connection_and_the_next_request_are_waited_for() {
        let local = tokio::task::LocalSet::new();
        let test = async {
            let (mut client, serving) = served();
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
}
