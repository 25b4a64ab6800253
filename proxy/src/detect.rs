//! Reads a connection's first bytes until `weft_core::detect` knows what they are.
//!
//! Why three endings: most clients speak at once; a client of a server-first protocol stays silent for ever;
//! and a slow one has begun but not finished. Only the silent one is answered by connecting to the server and
//! letting whoever speaks first decide.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use weft_core::detect::{self, Detected};

/// A first read of this size holds every request head's beginning and most ClientHellos.
const FIRST_READ: usize = 2 * 1024;

/// Holds the greeting of any server-first protocol.
const GREETING: usize = 2 * 1024;

/// What the client began with.
pub(crate) struct First {
    /// Read, and to be handed on.
    pub(crate) bytes: Bytes,
    pub(crate) detected: Detected,
}

/// How reading ended.
pub(crate) enum Begun {
    /// The client spoke, and it is known what.
    Spoke(First),
    /// The client said nothing in time.
    Silent,
    /// The client ended its side without a byte.
    Ended,
}

/// Reads until the protocol is known. `silence` bounds the wait for the first byte, `slow` the rest: bytes that
/// stay undecided for so long are opaque.
pub(crate) async fn begin(
    stream: &mut TcpStream,
    silence: Option<Duration>,
    slow: Duration,
) -> io::Result<Begun> {
    begin_into(stream, &mut BytesMut::new(), silence, slow).await
}

/// The same into the caller's buffer: dropped half-way, what was read stays there.
async fn begin_into(
    stream: &mut TcpStream,
    bytes: &mut BytesMut,
    silence: Option<Duration>,
    slow: Duration,
) -> io::Result<Begun> {
    let read = match silence {
        Some(silence) => match timeout(silence, first_read(stream, bytes)).await {
            Ok(read) => read?,
            Err(_) => return Ok(Begun::Silent),
        },
        None => first_read(stream, bytes).await?,
    };
    if read == 0 {
        return Ok(Begun::Ended);
    }
    let deadline = Instant::now() + slow;
    loop {
        match detect::detect(bytes) {
            Detected::NeedMore => {}
            detected @ (Detected::Http1 | Detected::Http2 | Detected::Tls { .. } | Detected::Opaque) => {
                return Ok(spoke(bytes, detected));
            }
        }
        match timeout_at(deadline, stream.read_buf(bytes)).await {
            Ok(Ok(0)) | Err(_) => return Ok(spoke(bytes, Detected::Opaque)),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
        }
    }
}

/// Who spoke first on a connection whose client may be waiting for its server.
pub(crate) enum FirstWord {
    /// The client.
    Client(io::Result<Begun>),
    /// The server (without a byte: it ended), while the client had asked this much.
    Server { greeting: Bytes, asked: Bytes },
    /// The server broke off. Told apart from its end here, for a reset shows once only: the next read would say that
    /// all ended well.
    ServerBroke,
}

/// Waits for either side. `slow` bounds what follows the client's first byte.
pub(crate) async fn whoever_speaks(
    client: &mut TcpStream,
    server: &mut (impl AsyncRead + Unpin),
    slow: Duration,
) -> FirstWord {
    let (mut asked, mut greeting) = (BytesMut::new(), BytesMut::with_capacity(GREETING));
    tokio::select! {
        biased;
        begun = begin_into(client, &mut asked, None, slow) => return FirstWord::Client(begun),
        // Bytes, not readiness: what is readable below TLS need not be something that the server says.
        said = server.read_buf(&mut greeting) => if said.is_err() {
            return FirstWord::ServerBroke;
        }
    }
    FirstWord::Server { greeting: greeting.freeze(), asked: asked.freeze() }
}

/// The first bytes, or 0 at the end. Without a buffer while nothing has come: an idle connection costs none. A
/// socket may be called readable when it is not, so only bytes count.
async fn first_read(stream: &TcpStream, bytes: &mut BytesMut) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        bytes.reserve(FIRST_READ);
        match stream.try_read_buf(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if bytes.is_empty() {
                    *bytes = BytesMut::new();
                }
            }
            read => return read,
        }
    }
}

fn spoke(bytes: &mut BytesMut, detected: Detected) -> Begun {
    Begun::Spoke(First { bytes: bytes.split().freeze(), detected })
}

impl First {
    /// Nothing was read, and nothing needs to be known.
    pub(crate) fn nothing() -> Self {
        Self { bytes: Bytes::new(), detected: Detected::Opaque }
    }
}
