//! Bytes both ways: half-close kept, a reset stays a reset.
//!
//! Why not `copy_bidirectional`: it turns a reset on one side into a clean end on the other, so that an app
//! takes a truncated stream for a whole one; and each stream would keep its buffers while it waits (`lent`).
//!
//! Why a side that cannot be written to is still read: a server that says why and closes while its client goes on sending
//! is a reset to whoever writes to it. What it said lies here by then, and without a mesh its client could read it.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use weft_core::classify::Class;

use crate::lent::{Lent, Size};

/// For the last words of a side that has gone, should the other one be slow to take them.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A byte stream over TCP, plain or TLS.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// The socket underneath.
    fn tcp(&self) -> &TcpStream;
}

impl Stream for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Stream for tokio_rustls::client::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

impl<S: Stream> Stream for tokio_rustls::server::TlsStream<S> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0.tcp()
    }
}

impl<S: Stream> Stream for Box<S> {
    fn tcp(&self) -> &TcpStream {
        (**self).tcp()
    }
}

impl<S: Stream> Stream for Prefixed<S> {
    fn tcp(&self) -> &TcpStream {
        self.inner.tcp()
    }
}

/// A stream of which the first bytes were already read.
pub(crate) struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S> Prefixed<S> {
    pub(crate) fn new(prefix: Bytes, inner: S) -> Self {
        Self { prefix, inner }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
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
}

/// What is written to a wrapper of a stream goes to the stream as it is; the wrapper may be told how many bytes were taken.
macro_rules! write_to_inner {
    ($wrapper:ident $(, told $wrote:ident)?) => {
        impl<S: AsyncWrite + Unpin> AsyncWrite for $wrapper<S> {
            fn poll_write(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &[u8],
            ) -> Poll<io::Result<usize>> {
                let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
                $(if let Poll::Ready(Ok(n)) = polled {
                    self.$wrote(n);
                })?
                polled
            }

            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bufs: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
                $(if let Poll::Ready(Ok(n)) = polled {
                    self.$wrote(n);
                })?
                polled
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
    };
}

pub(crate) use write_to_inner;

write_to_inner!(Prefixed);

/// Which side broke a connection off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    Client,
    Server,
}

impl Broken {
    /// Who is at fault, as telemetry counts it.
    pub(crate) fn class(self) -> Class {
        match self {
            Self::Client => Class::ClientError,
            Self::Server => Class::ServerError,
        }
    }
}

/// Bytes carried so far, to be read also when carrying was cut short.
#[derive(Default)]
pub(crate) struct Moved {
    /// From the client to the server.
    pub(crate) up: Cell<u64>,
    /// From the server to the client.
    pub(crate) down: Cell<u64>,
}

/// Carries bytes both ways until both directions have ended. A side that breaks off makes the other one end
/// with a reset.
pub(crate) async fn splice<A: Stream, B: Stream>(
    client: &mut A,
    server: &mut B,
    moved: &Moved,
) -> Result<(), Broken> {
    let mut up = Way { moved: Some(&moved.up), ..Way::default() };
    let mut down = Way { moved: Some(&moved.down), ..Way::default() };
    let result = both(&mut up, &mut down, client, server).await;
    if result.is_err() {
        reset(client.tcp());
        reset(server.tcp());
    }
    result
}

/// Both directions until they have ended or a side has broken off and said its last words.
async fn both<A, B>(
    up: &mut Way<'_>,
    down: &mut Way<'_>,
    client: &mut A,
    server: &mut B,
) -> Result<(), Broken>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    match poll_fn(|cx| carry(cx, up, down, client, server)).await {
        Err(Cut { side, unread: true }) => {
            (up.last_words, down.last_words) = (true, true);
            let words = poll_fn(|cx| match side {
                Broken::Server => down.poll(cx, server, client),
                Broken::Client => up.poll(cx, client, server),
            });
            // Whether all of them could be said or not, the end is the same.
            let _ = tokio::time::timeout(LAST_WORDS, words).await;
            Err(side)
        }
        Err(Cut { side, unread: false }) => Err(side),
        Ok(()) => Ok(()),
    }
}

/// How carrying was cut short.
struct Cut {
    side: Broken,
    /// It may have said more than was read.
    unread: bool,
}

/// Both directions once.
fn carry<A, B>(
    cx: &mut Context<'_>,
    up: &mut Way<'_>,
    down: &mut Way<'_>,
    client: &mut A,
    server: &mut B,
) -> Poll<Result<(), Cut>>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let up = up.poll(cx, client, server);
    if let Poll::Ready(Err(side)) = up {
        let (side, unread) = match side {
            Side::Reader => (Broken::Client, false),
            Side::Writer => (Broken::Server, true),
        };
        return Poll::Ready(Err(Cut { side, unread }));
    }
    let down = down.poll(cx, server, client);
    if let Poll::Ready(Err(side)) = down {
        let (side, unread) = match side {
            Side::Reader => (Broken::Server, false),
            Side::Writer => (Broken::Client, true),
        };
        return Poll::Ready(Err(Cut { side, unread }));
    }
    if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
}

/// The same until `stop`, after which both sides see a reset. It is asked first, and so before a byte has passed.
pub(crate) async fn splice_until<A: Stream, B: Stream>(
    client: &mut A,
    server: &mut B,
    moved: &Moved,
    stop: impl Future<Output = ()>,
) -> Result<(), Broken> {
    tokio::select! {
        biased;
        () = stop => {}
        spliced = splice(client, server, moved) => return spliced,
    }
    reset(client.tcp());
    reset(server.tcp());
    Err(Broken::Client)
}

/// Makes the socket's end a reset instead of a clean one.
pub(crate) fn reset(stream: &TcpStream) {
    // Fails only where the peer's reset has closed it already.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// The same between streams of which one may be a stream of HTTP/2: whoever calls this lets go of both afterwards, and
/// what that says it does (`upgraded`). A server that has ended its half before it could not be written to has not
/// broken off.
pub(crate) async fn splice_streams<A, B>(client: &mut A, server: &mut B) -> Result<(), Broken>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Way { doubts: true, ..Way::default() };
    let mut down = Way { doubts: true, ..Way::default() };
    match both(&mut up, &mut down, client, server).await {
        Err(Broken::Server) if down.done => Err(Broken::Client),
        ended => ended,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Reader,
    Writer,
}

#[derive(Default)]
struct Way<'a> {
    moved: Option<&'a Cell<u64>>,
    /// What was read and is not written: `from..to` of a buffer. None while there is nothing.
    buffer: Option<Lent>,
    from: usize,
    to: usize,
    size: Size,
    read_ended: bool,
    /// Reading failed: so does this, once what was read before is written.
    broke: bool,
    unflushed: bool,
    /// An end may be none: see `upgraded`.
    doubts: bool,
    asked: bool,
    /// The reader has gone: its end is none, and is not passed on.
    last_words: bool,
    done: bool,
}

impl Way<'_> {
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, reader: &mut R, writer: &mut W) -> Poll<Result<(), Side>>
    where
        R: AsyncRead + AsyncWrite + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            while let Some(chunk) =
                self.buffer.as_ref().map(|b| &b[self.from..self.to]).filter(|b| !b.is_empty())
            {
                match ready!(Pin::new(&mut *writer).poll_write(cx, chunk)) {
                    Ok(0) | Err(_) => return Poll::Ready(Err(Side::Writer)),
                    Ok(n) => {
                        self.from += n;
                        if let Some(moved) = self.moved {
                            moved.set(moved.get() + n as u64);
                        }
                        self.unflushed = true;
                    }
                }
            }
            self.buffer = None;
            if self.read_ended && self.last_words {
                return Pin::new(&mut *writer).poll_flush(cx).map_err(|_| Side::Writer);
            }
            if self.read_ended && self.doubts {
                if !std::mem::replace(&mut self.asked, true) {
                    // What followed the end may be known to others already, and has its turn first.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                if let Poll::Ready(Err(_)) = Pin::new(&mut *reader).poll_flush(cx) {
                    return Poll::Ready(Err(Side::Reader));
                }
                self.doubts = false;
            }
            if self.read_ended {
                return match ready!(Pin::new(&mut *writer).poll_shutdown(cx)) {
                    Ok(()) => {
                        self.done = true;
                        Poll::Ready(Ok(()))
                    }
                    // The other direction's reset is what the apps shall see, if there was one.
                    Err(e) if e.kind() == io::ErrorKind::NotConnected => {
                        self.done = true;
                        Poll::Ready(Ok(()))
                    }
                    Err(_) => Poll::Ready(Err(Side::Writer)),
                };
            }
            if self.broke {
                return Poll::Ready(Err(Side::Reader));
            }
            match self.read(cx, reader) {
                Poll::Ready(()) => {}
                Poll::Pending => {
                    if self.unflushed {
                        match ready!(Pin::new(&mut *writer).poll_flush(cx)) {
                            Ok(()) => self.unflushed = false,
                            Err(_) => return Poll::Ready(Err(Side::Writer)),
                        }
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Reads what is there, as far as it has room: what came in many records leaves in one piece.
    fn read<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, reader: &mut R) -> Poll<()> {
        let mut buffer = Lent::take(self.size);
        let mut filled = ReadBuf::new(&mut buffer);
        while filled.remaining() > 0 {
            let before = filled.filled().len();
            match Pin::new(&mut *reader).poll_read(cx, &mut filled) {
                Poll::Ready(Ok(())) if filled.filled().len() == before => self.read_ended = true,
                Poll::Ready(Ok(())) => continue,
                Poll::Ready(Err(_)) => self.broke = true,
                Poll::Pending if before == 0 => return Poll::Pending,
                Poll::Pending => {}
            }
            break;
        }
        (self.from, self.to) = (0, filled.filled().len());
        self.size = self.size.after(self.to);
        self.buffer = Some(buffer);
        Poll::Ready(())
    }
}

/// Descriptors, memory or local ports have run out here: nothing that the endpoint did.
pub(crate) fn is_our_own_want(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.is_some_and(|errno| {
        [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::EADDRNOTAVAIL, Errno::EADDRINUSE]
            .contains(&errno)
    })
}

/// Keepalive on. No bound on unacknowledged data here: `TCP_USER_TIMEOUT` also ends a connection whose reader
/// pauses, however well it answers probes.
pub(crate) fn keep_alive(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    let params = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(10))
        .with_retries(6);
    // A socket that closed in between refuses it; its next read says so.
    let _ = socket.set_tcp_keepalive(&params);
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connecting = TcpStream::connect(listener.local_addr().unwrap());
        let (a, b) = tokio::join!(connecting, listener.accept());
        (a.unwrap(), b.unwrap().0)
    }

    type Carried = (Result<(), Broken>, u64, u64);

    async fn spliced() -> (TcpStream, TcpStream, tokio::task::JoinHandle<Carried>) {
        let (client, mut near) = pair().await;
        let (mut far, server) = pair().await;
        let task = tokio::task::spawn_blocking(move || {
            // Cells stay on one thread, as they do on a worker.
            let handle = tokio::runtime::Handle::current();
            let moved = Moved::default();
            let result = handle.block_on(splice(&mut near, &mut far, &moved));
            (result, moved.up.get(), moved.down.get())
        });
        (client, server, task)
    }

    #[tokio::test]
    async fn half_close_is_kept_both_ways() {
        let (mut client, mut server, task) = spliced().await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = Vec::new();
        server.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        assert_eq!(task.await.unwrap(), (Ok(()), 8, 6));
    }

    #[tokio::test]
    async fn a_reset_stays_a_reset() {
        let (mut client, server, task) = spliced().await;
        reset(&server);
        drop(server);
        let error = client.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(task.await.unwrap().0, Err(Broken::Server));
    }

    #[tokio::test]
    async fn large_streams_arrive_whole() {
        let (mut client, mut server, _task) = spliced().await;
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
        let expected = sent.clone();
        tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
        });
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
    }

    #[tokio::test]
    async fn a_server_that_says_why_and_goes_is_heard_though_its_client_still_sends() {
        let (mut client, mut near) = pair().await;
        let (mut far, mut server) = pair().await;
        // Closed on what it has not read, its kernel resets: all of that has come when the first byte is carried.
        far.write_all(b"what it has not read").await.unwrap();
        server.readable().await.unwrap();
        server.write_all(b"-ERR max clients").await.unwrap();
        drop(server);
        far.ready(tokio::io::Interest::ERROR).await.unwrap();
        client.write_all(b"more").await.unwrap();
        near.readable().await.unwrap();
        let moved = Moved::default();
        assert_eq!(splice(&mut near, &mut far, &moved).await, Err(Broken::Server));
        drop((near, far));
        let mut words = [0; 16];
        client.read_exact(&mut words).await.unwrap();
        assert_eq!(&words, b"-ERR max clients");
        let error = client.read(&mut words).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "and that it did not end well");
    }
}
