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
            // Whatever the minor version: it "MUST be ignored for all purposes" (RFC 8446 §5.1), and is by libraries.
            [HANDSHAKE, 3, ..] => {}
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
    // Empty lines before the request line are ignored: RFC 9112 §2.2 has at least one, servers skip them all.
    let mut line = bytes;
    while let [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] = line {
        line = rest;
    }
    if line == b"\r" {
        return more(bytes);
    }
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
            SERVER_NAME if hello.server_name.is_none() => hello.server_name = server_name(data),
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

/// The first host name. What is wrong with the list is for whoever ends the TLS to judge: it stays TLS.
fn server_name(mut data: Reader<'_>) -> Option<String> {
    let mut names = Reader(data.vec16()?);
    loop {
        let kind = names.u8()?;
        let name = names.vec16()?;
        if kind == 0 {
            return host_name(name);
        }
    }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A ClientHello, cut into records of at most `record` bytes.
    fn hello(sni: Option<&[u8]>, alpn: &[&[u8]], padding: usize, record: usize) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut extension = |kind: u16, data: &[u8]| {
            extensions.extend_from_slice(&kind.to_be_bytes());
            extensions.extend_from_slice(&(data.len() as u16).to_be_bytes());
            extensions.extend_from_slice(data);
        };
        extension(21, &vec![0; padding]);
        if let Some(name) = sni {
            let mut data = ((name.len() + 3) as u16).to_be_bytes().to_vec();
            data.push(0);
            data.extend_from_slice(&(name.len() as u16).to_be_bytes());
            data.extend_from_slice(name);
            extension(0, &data);
        }
        if !alpn.is_empty() {
            let list: Vec<u8> =
                alpn.iter().flat_map(|p| std::iter::once(p.len() as u8).chain(p.iter().copied())).collect();
            let mut data = (list.len() as u16).to_be_bytes().to_vec();
            data.extend_from_slice(&list);
            extension(16, &data);
        }
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.push(0);
        body.extend_from_slice(&[0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
        body.extend_from_slice(&extensions);
        let mut message = vec![CLIENT_HELLO];
        message.extend_from_slice(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend_from_slice(&body);
        let records = message.chunks(record).flat_map(|chunk| {
            let mut out = vec![HANDSHAKE, 3, 1];
            out.extend_from_slice(&(chunk.len() as u16).to_be_bytes());
            out.extend_from_slice(chunk);
            out
        });
        records.collect()
    }

    #[test]
    fn http1_by_its_request_line() {
        for yes in [
            &b"GET /"[..],
            b"POST /x HTTP/1.1",
            b"OPTIONS *",
            b"GET http://a/",
            b"HEAD HTTPS://a/",
            b"PROPFIND /x HTTP/1.1\r\n",
            b"CONNECT db:5432 HTTP/1.1\r\nHost: db",
            b"get / HTTP/1.0\n",
            b"\r\nGET /",
            b"\r\n\r\n\nGET /",
        ] {
            assert_eq!(detect(yes), Detected::Http1, "{}", String::from_utf8_lossy(yes));
        }
        for no in [
            &b"EHLO mail.example.com\r\n"[..],
            b"CONNECT {\"verbose\":false}\r\n",
            b"USER anonymous\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"PING\r\n",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"\0\0\0\x08\x04\xd2\x16\x2f",
            b"\x10\x2a\0\x04MQTT",
            b"AMQP\0\0\x09\x01",
            b"set key 0 0 5\r\nhello\r\n",
            b"GET key\r\n",
            b"PRI * HTTP/2.0\r\n\r\nXX",
            b"\xff",
            b" GET / HTTP/1.1\r\n",
            b"X /a HTTP/2.0\r\n",
            b"X HTTP/1.1\r\n",
        ] {
            assert_eq!(detect(no), Detected::Opaque, "{}", String::from_utf8_lossy(no));
        }
        for more in
            [&b""[..], b"G", b"GET", b"GET ", b"GET ht", b"EHLO mail", b"PROPFIND /x HTTP/1.1\r", b"\r"]
        {
            assert_eq!(detect(more), Detected::NeedMore, "{}", String::from_utf8_lossy(more));
        }
    }

    #[test]
    fn http2_by_its_whole_preface() {
        for n in 0..PREFACE.len() {
            assert_eq!(detect(&PREFACE[..n]), Detected::NeedMore);
        }
        assert_eq!(detect(PREFACE), Detected::Http2);
        assert_eq!(detect(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04"), Detected::Http2);
    }

    #[test]
    fn tls_with_name_and_protocols_over_any_records() {
        for record in [1, 3, 50, 10_000] {
            let bytes = hello(Some(b"API.example.com"), &[b"h2", b"http/1.1"], 300, record);
            let want = Detected::Tls {
                sni: Some("api.example.com".into()),
                alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
                complete: true,
            };
            for n in 0..bytes.len() {
                assert_eq!(detect(&bytes[..n]), Detected::NeedMore, "{n} of {}", bytes.len());
            }
            assert_eq!(detect(&bytes), want);
            assert_eq!(detect(&[&bytes[..], b"more"].concat()), want);
        }
    }

    #[test]
    fn tls_without_anything_to_note() {
        let plain = hello(None, &[], 0, 10_000);
        assert_eq!(detect(&plain), Detected::Tls { sni: None, alpn: vec![], complete: true });
        let odd = hello(Some(b"bad name\n"), &[], 0, 10_000);
        assert_eq!(detect(&odd), Detected::Tls { sni: None, alpn: vec![], complete: true });
    }

    #[test]
    fn a_hello_beyond_the_bound_is_still_tls() {
        let bytes = hello(Some(b"a"), &[], 20_000, 10_000);
        assert_eq!(detect(&bytes[..MAX_BYTES - 1]), Detected::NeedMore);
        let want = Detected::Tls { sni: None, alpn: vec![], complete: false };
        assert_eq!(detect(&bytes[..MAX_BYTES]), want);
        assert_eq!(detect(&bytes), want);
    }

    #[test]
    fn what_only_begins_like_tls_is_opaque() {
        assert_eq!(detect(&[22, 9]), Detected::Opaque);
        assert_eq!(detect(&[22, 3, 9]), Detected::NeedMore, "the minor version says nothing");
        assert_eq!(detect(&[22, 3, 1, 0, 0]), Detected::Opaque);
        assert_eq!(detect(&[22, 3, 1, 0, 5, 2]), Detected::Opaque);
        assert_eq!(detect(&[22, 3, 1, 0xff, 0xff]), Detected::Opaque);
        // A whole message that is too short for its fields.
        assert_eq!(detect(&[22, 3, 1, 0, 8, 1, 0, 0, 4, 3, 3, 0, 0]), Detected::Opaque);
    }

    #[test]
    fn servers_that_speak_http_first() {
        assert!(server_bytes_are_http(b"HTTP/1.1 408 Request Timeout\r\n"));
        assert!(server_bytes_are_http(b"HT"));
        assert!(!server_bytes_are_http(b""));
        assert!(!server_bytes_are_http(b"SSH-2.0-x"));
    }

    fn first_bytes() -> impl Strategy<Value = Vec<u8>> {
        let some = prop::collection::vec(any::<u8>(), 0..60);
        let text = prop::collection::vec(prop::sample::select(&b"GETPRI */http:1.0 \r\nSM"[..]), 0..60);
        let tls = (
            prop::option::of(prop::collection::vec(any::<u8>(), 0..40)),
            0usize..300,
            1usize..400,
            prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        );
        let tls = tls.prop_map(|(sni, padding, record, flips)| {
            let mut bytes = hello(sni.as_deref(), &[b"h2"], padding, record);
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes
        });
        let start = prop::sample::select(vec![
            &b""[..],
            b"GET ",
            b"PRI * HTTP/2.0\r\n\r\n",
            b"EHLO ",
            b"\x16\x03\x01",
        ]);
        let started = (start, some.clone()).prop_map(|(start, rest)| [start, &rest[..]].concat());
        prop_oneof![some, text, tls, started]
    }

    proptest! {
        #[test]
        fn never_panics_and_never_changes_its_mind(bytes in first_bytes()) {
            let whole = detect(&bytes);
            let mut decided = None;
            for n in 0..=bytes.len() {
                let now = detect(&bytes[..n]);
                if let Some(before) = &decided {
                    prop_assert_eq!(before, &now, "at {}", n);
                } else if now != Detected::NeedMore {
                    decided = Some(now);
                }
            }
            prop_assert_eq!(decided.unwrap_or(Detected::NeedMore), whole);
        }
    }
}
