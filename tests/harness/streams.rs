//! HTTP/2 where a test decides about each stream: when it is read, written, reset.
//!
//! Why `h2` and not an HTTP client above it: stalled readers, resets and held-back bodies are what clients hide.

use std::{
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
    server::SendResponse,
};
use http::{HeaderMap, Request, Response};
use weft_control_plane::cli::demo::netns::Pod;

use crate::wire::Wire;

/// Runs a test's HTTP/2 side.
pub fn run<T>(test: impl Future<Output = Result<T>>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.context("a runtime").and_then(|runtime| runtime.block_on(test));
    done.unwrap_or_else(|error| panic!("{error:?}"))
}

/// Connects from a pod, as its app would.
pub async fn connect(pod: &Pod, address: &str) -> Result<SendRequest<Bytes>> {
    let address: std::net::SocketAddr = address.parse().with_context(|| address.to_owned())?;
    let stream = pod.enter(|| TcpStream::connect(address))??;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (sender, connection) = h2::client::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Sends a request: its answer to come, and its body to be sent unless it is at its end.
pub async fn send(
    sender: &SendRequest<Bytes>,
    request: Request<()>,
    end: bool,
) -> Result<(ResponseFuture, SendStream<Bytes>)> {
    let mut sender = sender.clone().ready().await?;
    Ok(sender.send_request(request, end)?)
}

/// A request without a body, to its whole answer.
pub async fn ask(sender: &SendRequest<Bytes>, request: Request<()>) -> Result<Response<String>> {
    let (answer, _) = send(sender, request, true).await?;
    let (head, body) = answer.await?.into_parts();
    let (text, _) = read(body).await?;
    Ok(Response::from_parts(head, String::from_utf8_lossy(&text).into_owned()))
}

/// A request's head.
pub fn head(method: &str, path: &str) -> Request<()> {
    Request::builder().method(method).uri(format!("http://echo{path}")).body(()).unwrap_or_default()
}

/// A whole body and its trailers.
pub async fn read(mut body: RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>)> {
    let mut whole = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        whole.extend_from_slice(&piece);
    }
    Ok((whole, body.trailers().await?))
}

/// Sends bytes as fast as the other side takes them; an error when it takes no more.
pub async fn write(body: &mut SendStream<Bytes>, mut bytes: Bytes, end: bool) -> Result<()> {
    while !bytes.is_empty() {
        body.reserve_capacity(bytes.len().min(64 * 1024));
        match std::future::poll_fn(|cx| body.poll_capacity(cx)).await {
            Some(capacity) => {
                let piece = bytes.split_to(capacity?.min(bytes.len()));
                body.send_data(piece, end && bytes.is_empty())?;
            }
            None => bail!("the stream takes no more"),
        }
    }
    Ok(())
}

/// A whole answer.
pub fn answer(respond: &mut SendResponse<Bytes>, status: u16, text: impl Into<Bytes>) -> Result<()> {
    let response = Response::builder().status(status).body(())?;
    let mut body = respond.send_response(response, false)?;
    body.send_data(text.into(), true)?;
    Ok(())
}

/// An HTTP/2 server in a pod, prior knowledge, on a thread of its own.
pub struct Server {
    listener: Arc<TcpListener>,
}

impl Server {
    /// Each request is handled in a task of its own, which ends when `handle` does; `streams` is what one connection may
    /// have at a time.
    pub fn start<F, H>(pod: &Pod, port: u16, streams: u32, handle: H) -> Result<Self>
    where
        F: Future<Output = Result<()>> + Send + 'static,
        H: Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + 'static,
    {
        let listener = Arc::new(pod.enter(|| TcpListener::bind(("::", port)))??);
        listener.set_nonblocking(true)?;
        let accepting = listener.try_clone()?;
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            let _ = runtime.block_on(serve(accepting, streams, handle));
        });
        Ok(Self { listener })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread that accepts; a listener that is gone already needs no waking.
        let _ = socket2::SockRef::from(&*self.listener).shutdown(Shutdown::Both);
    }
}

async fn serve<F, H>(listener: TcpListener, streams: u32, handle: H) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
    H: Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + 'static,
{
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let handle = handle.clone();
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            builder.max_concurrent_streams(streams).enable_connect_protocol();
            let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                let handled = handle(request, respond);
                tokio::spawn(async move {
                    if let Err(error) = handled.await {
                        // Shown only if the test fails.
                        println!("backend: {error:#}");
                    }
                });
            }
        });
    }
}

/// One HTTP/2 frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let mut frame = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    frame.extend_from_slice(payload);
    frame
}

/// Fields as HPACK literals that are never remembered.
pub fn fields(all: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    let text = |out: &mut Vec<u8>, text: &str| {
        assert!(text.len() < 127 + 128);
        if text.len() < 127 {
            out.push(text.len() as u8);
        } else {
            out.extend_from_slice(&[127, (text.len() - 127) as u8]);
        }
        out.extend_from_slice(text.as_bytes());
    };
    for (name, value) in all {
        out.push(0);
        text(&mut out, name);
        text(&mut out, value);
    }
    out
}

/// What a client says first, and that it has no settings of its own.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Reads a frame: its kind, flags, stream and payload.
pub fn read_frame(wire: &mut Wire) -> Result<(u8, u8, u32, Vec<u8>)> {
    let head = wire.exactly(9)?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Ok((head[3], head[4], stream, wire.exactly(length)?))
}
