//! Reads a connection's first bytes until `weft_core::detect` knows what they are.
//!
//! Why three endings: most clients speak at once; a client of a server-first protocol stays silent for ever;
//! and a slow one has begun but not finished. Only the silent one is answered by connecting to the server and
//! letting whoever speaks first decide.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, timeout_at},
};
use weft_core::detect::{self, Detected};

/// A first read of this size holds every request head's beginning and most ClientHellos.
const FIRST_READ: usize = 2 * 1024;

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
    if let Some(silence) = silence {
        // Without a buffer while nothing has come: an idle connection costs none.
        match tokio::time::timeout(silence, stream.readable()).await {
            Ok(ready) => ready?,
            Err(_) => return Ok(Begun::Silent),
        }
    } else {
        stream.readable().await?;
    }
    let deadline = Instant::now() + slow;
    let mut bytes = BytesMut::with_capacity(FIRST_READ);
    loop {
        let read = match timeout_at(deadline, stream.read_buf(&mut bytes)).await {
            Ok(read) => read?,
            Err(_) => return Ok(spoke(bytes, Detected::Opaque)),
        };
        if read == 0 {
            return Ok(if bytes.is_empty() { Begun::Ended } else { spoke(bytes, Detected::Opaque) });
        }
        match detect::detect(&bytes) {
            Detected::NeedMore => {}
            detected @ (Detected::Http1 | Detected::Http2 | Detected::Tls { .. } | Detected::Opaque) => {
                return Ok(spoke(bytes, detected));
            }
        }
    }
}

fn spoke(bytes: BytesMut, detected: Detected) -> Begun {
    Begun::Spoke(First { bytes: bytes.freeze(), detected })
}

impl First {
    /// Nothing was read, and nothing needs to be known.
    pub(crate) fn nothing() -> Self {
        Self { bytes: Bytes::new(), detected: Detected::Opaque }
    }
}
