//! What a connection speaks, from its client's first bytes.
//!
//! Why a pure function of a prefix: the shell may call it after every read, of any size. The answer is
//! *prefix-consistent*: once it is not `NeedMore`, more bytes never change it. Every decision is made at
//! the earliest byte that allows it, and none looks further than [`MAX_BYTES`].
//!
//! HTTP/1 is recognised by its request line. The common methods are believed once the target begins
//! like one; any other word needs `HTTP/1.` at the end of the line, because SMTP (`EHLO x`), NATS
//! (`CONNECT {..}`) and Redis (`GET key`) open with a word and a space, too.

/// What the first bytes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detected {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS of the app's own.
    Tls {
        /// The server name that the client asks for, in lower case.
        sni: Option<String>,
        /// The protocols that the client offers.
        alpn: Vec<Vec<u8>>,
        /// False when the ClientHello is longer than [`MAX_BYTES`]: then nothing of it is known.
        complete: bool,
    },
    /// None of these.
    Opaque,
    /// Undecided yet.
    NeedMore,
}

/// What a TLS client says first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The server name, in lower case.
    pub server_name: Option<String>,
    /// The protocols offered.
    pub alpn: Vec<Vec<u8>>,
}

/// The bytes are not a TLS ClientHello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a TLS ClientHello")]
pub struct NotTls;

/// No decision looks further than this: post-quantum key shares fit, floods do not.
pub const MAX_BYTES: usize = 16 * 1024;

/// Looks at everything that the client has sent so far.
pub fn detect(bytes: &[u8]) -> Detected {
    let Some(&first) = bytes.first() else {
        return Detected::NeedMore;
    };
    if first == HANDSHAKE {
        return match client_hello(bytes) {
            Ok(Some(hello)) => Detected::Tls { sni: hello.server_name, alpn: hello.alpn, complete: true },
            Ok(None) if bytes.len() >= MAX_BYTES => {
                Detected::Tls { sni: None, alpn: Vec::new(), complete: false }
            }
            Ok(None) => Detected::NeedMore,
            Err(NotTls) => Detected::Opaque,
        };
    }
    let preface = bytes.len().min(PREFACE.len());
    if bytes[..preface] == PREFACE[..preface] {
        return if preface == PREFACE.len() { Detected::Http2 } else { Detected::NeedMore };
    }
    http1(bytes)
}

/// Reads a ClientHello that may span several TLS records. `None`: it is not whole yet, or does not
/// fit in [`MAX_BYTES`].
///
/// # Errors
/// The bytes cannot become a ClientHello.
pub fn client_hello(bytes: &[u8]) -> Result<Option<ClientHello>, NotTls> {
    let mut rest = &bytes[..bytes.len().min(MAX_BYTES)];
    let mut message: Vec<u8> = Vec::new();
    loop {
        // The record header is checked byte by byte, so that a wrong first byte decides at once.
        match rest {
            [] => return Ok(None),
            [HANDSHAKE] | [HANDSHAKE, 3] => return Ok(None),
            [HANDSHAKE, 3, minor, ..] if *minor <= 4 => {}
            _ => return Err(NotTls),
        }
        let Some(length) = rest.get(3..5) else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        if length == 0 || length > MAX_RECORD {
            return Err(NotTls);
        }
        let body = &rest[5..rest.len().min(5 + length)];
        message.extend_from_slice(body);
        if message.first().is_some_and(|&kind| kind != CLIENT_HELLO) {
            return Err(NotTls);
        }
        if let Some(size) = message.get(1..4) {
            let size = usize::from(size[0]) << 16 | usize::from(size[1]) << 8 | usize::from(size[2]);
            if let Some(hello) = message.get(4..4 + size) {
                return parse_hello(hello).map(Some).ok_or(NotTls);
            }
        }
        if body.len() < length {
            return Ok(None);
        }
        rest = &rest[5 + length..];
    }
}

/// Whether a server that spoke first speaks HTTP/1: `HTTP/`, or as much of it as has come. A server
/// that answers a silent client with `408` has not turned into an opaque protocol.
pub fn server_bytes_are_http(bytes: &[u8]) -> bool {
    let n = bytes.len().min(HTTP.len());
    n > 0 && bytes[..n] == HTTP[..n]
}

fn http1(bytes: &[u8]) -> Detected {
    let bytes = &bytes[..bytes.len().min(MAX_BYTES)];
    // One empty line before the request line is ignored (RFC 9112 §2.2).
    let line = match bytes {
        [b'\r'] => return Detected::NeedMore,
        [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] => rest,
        _ => bytes,
    };
    let Some(end) = line.iter().position(|&b| !is_token(b)) else {
        return if line.len() > MAX_METHOD { Detected::Opaque } else { more(bytes) };
    };
    if end == 0 || end > MAX_METHOD || line[end] != b' ' {
        return Detected::Opaque;
    }
    let (method, target) = (&line[..end], &line[end + 1..]);
    if METHODS.contains(&method) {
        match target {
            [] => return more(bytes),
            [b'/' | b'*', ..] => return Detected::Http1,
            _ => {}
        }
        for scheme in [&b"http://"[..], b"https://"] {
            let n = target.len().min(scheme.len());
            if target[..n].eq_ignore_ascii_case(&scheme[..n]) {
                return if n == scheme.len() { Detected::Http1 } else { more(bytes) };
            }
        }
    }
    let Some(end) = target.iter().position(|b| b.is_ascii_control()) else {
        return more(bytes);
    };
    let version = match &target[end..] {
        [b'\n', ..] | [b'\r', b'\n', ..] => &target[..end],
        [b'\r'] => return more(bytes),
        _ => return Detected::Opaque,
    };
    let is_version =
        |v: &[u8]| matches!(v, [.., b' ', b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0' | b'1']);
    if is_version(version) && version.len() > 9 { Detected::Http1 } else { Detected::Opaque }
}

/// Undecided, unless the bound is reached.
fn more(bytes: &[u8]) -> Detected {
    if bytes.len() >= MAX_BYTES { Detected::Opaque } else { Detected::NeedMore }
}

fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// A cursor over TLS's length-prefixed vectors.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn u8(&mut self) -> Option<usize> {
        self.take(1).map(|b| usize::from(b[0]))
    }

    fn u16(&mut self) -> Option<usize> {
        self.take(2).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]])))
    }

    fn vec8(&mut self) -> Option<&'a [u8]> {
        let n = self.u8()?;
        self.take(n)
    }

    fn vec16(&mut self) -> Option<&'a [u8]> {
        let n = self.u16()?;
        self.take(n)
    }
}

fn parse_hello(body: &[u8]) -> Option<ClientHello> {
    let mut r = Reader(body);
    r.take(2 + 32)?; // version, random
    r.vec8()?; // session
    r.vec16()?; // cipher suites
    r.vec8()?; // compression
    let mut hello = ClientHello::default();
    if r.0.is_empty() {
        return Some(hello); // TLS 1.0 without extensions
    }
    let mut extensions = Reader(r.vec16()?);
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let mut data = Reader(extensions.vec16()?);
        match kind {
            SERVER_NAME => {
                let mut names = Reader(data.vec16()?);
                while !names.0.is_empty() {
                    let kind = names.u8()?;
                    let name = names.vec16()?;
                    if kind == 0 && hello.server_name.is_none() {
                        hello.server_name = host_name(name);
                    }
                }
            }
            ALPN => {
                let mut protocols = Reader(data.vec16()?);
                while !protocols.0.is_empty() {
                    hello.alpn.push(protocols.vec8()?.to_vec());
                }
            }
            _ => {}
        }
    }
    Some(hello)
}

/// Only what can be a host name is noted: it ends up in logs and metrics.
fn host_name(name: &[u8]) -> Option<String> {
    let ok = |b: &u8| b.is_ascii_alphanumeric() || b"-._".contains(b);
    if name.is_empty() || name.len() > 255 || !name.iter().all(ok) {
        return None;
    }
    std::str::from_utf8(name).ok().map(str::to_ascii_lowercase)
}

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HTTP: &[u8; 5] = b"HTTP/";
const METHODS: [&[u8]; 8] = [b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE"];
/// The longest registered method has 17 letters.
const MAX_METHOD: usize = 24;
/// TLS content type.
const HANDSHAKE: u8 = 22;
/// TLS handshake type.
const CLIENT_HELLO: u8 = 1;
/// Largest plaintext record.
const MAX_RECORD: usize = 1 << 14;
const SERVER_NAME: usize = 0;
const ALPN: usize = 16;
