//! What stands before the HTTP libraries: where messages end, and what frames bring.
//!
//! Why pieces: both are followers that keep only their place, and an attacker chooses where the bytes are cut. What is
//! said of them must not depend on it.

use weft_core::{
    frames::Frames,
    framing::{Fed, Framing, HeadLimits, Side, To, Why},
};

use crate::engine::{Shape, Target, hash};

/// One verdict on a client's bytes, however they are cut; none is refused without a name for it.
pub(crate) const REQUESTS: Target =
    Target { name: "requests", run: requests, seeds: messages, words: WORDS, shape: Shape::Bytes };

/// The same of an app's bytes.
pub(crate) const RESPONSES: Target =
    Target { name: "responses", run: responses, seeds: answers, words: WORDS, shape: Shape::Bytes };

/// What frames are counted as does not depend on how they are cut.
pub(crate) const FRAMES: Target =
    Target { name: "frames", run: frames, seeds: framed, words: FRAME_WORDS, shape: Shape::Bytes };

const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r\n\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"transfer-encoding: gzip, chunked\r\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
    b"5;a=b\r\n",
    b"Host: a\r\n",
    b"GET / HTTP/1.1\r\n",
    b"HTTP/1.0",
    b"Connection: upgrade\r\nUpgrade: x\r\n",
    b" \t",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n",
];

const FRAME_WORDS: &[&[u8]] = &[
    b"\0\0\0\x04\0\0\0\0\0",
    b"\0\0\x08\x06\0\0\0\0\0",
    b"\0\0\x04\x03\0\0\0\0\x01",
    b"\0\0\x05\x01\x04\0\0\0\x01",
    b"\0\0\0\x09\x04\0\0\0\x01",
    b"\0\0\0\0\0\0\0\0\x01",
];

/// What was said in the end, with all that can be asked of a follower.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    why: Option<Why>,
    heads: u64,
    between: bool,
    paused: bool,
}

fn follow<'a>(side: Side, pieces: impl Iterator<Item = &'a [u8]>) -> Said {
    // Larger than any input: a bound that counts whole pieces may be met earlier or later.
    let mut framing = Framing::new(side, HeadLimits { bytes: 1 << 20, fields: 64 });
    let mut why = None;
    if side == Side::Responses {
        framing.expect(To::Any);
    }
    for piece in pieces {
        match framing.feed(piece) {
            Ok(Fed::All) => {}
            Ok(Fed::Until(n)) => {
                assert!(n <= piece.len() && framing.is_paused());
                break;
            }
            Err(malformed) => {
                assert!(malformed.whole <= piece.len(), "{malformed:?}");
                assert!(!malformed.why.name().is_empty());
                why = Some(malformed.why);
                break;
            }
        }
    }
    // A refused connection is over, and which heads were handed on before depends on the pieces.
    let ended = why.is_some();
    Said {
        why,
        heads: if ended { 0 } else { framing.heads() },
        between: !ended && framing.is_between(),
        paused: !ended && framing.is_paused(),
    }
}

fn cut(side: Side, bytes: &[u8]) -> u64 {
    let whole = follow(side, std::iter::once(bytes));
    for size in [1, 2, 3, 7, 64] {
        let pieces = follow(side, bytes.chunks(size));
        assert_eq!(pieces, whole, "in pieces of {size}");
    }
    let why = whole.why.map_or(0, |why| hash(why.name().as_bytes()) & 0xffff);
    (why << 8) | (whole.heads.min(15) << 2) | (u64::from(whole.between) << 1) | u64::from(whole.paused)
}

fn requests(bytes: &[u8]) -> u64 {
    cut(Side::Requests, bytes)
}

fn responses(bytes: &[u8]) -> u64 {
    cut(Side::Responses, bytes)
}

fn frames(bytes: &[u8]) -> u64 {
    let count = |size: usize| {
        let mut frames = Frames::of_client();
        let sift = |piece: &[u8]| {
            let mut bytes = piece.to_vec();
            let (kept, idle) = frames.sift(&mut bytes);
            // What cannot hold a whole header is handed on as it is.
            assert!(kept <= piece.len() && (piece.len() >= 9 || bytes == piece));
            idle
        };
        let idle: u64 = bytes.chunks(size).map(sift).sum();
        (idle, frames.is_in_fields(), frames.last_stream())
    };
    let whole = count(bytes.len().max(1));
    for size in [1, 2, 9, 10] {
        assert_eq!(count(size), whole, "in pieces of {size}");
    }
    (whole.0.min(64) << 8) | (u64::from(whole.1) << 7) | u64::from(whole.2.min(100))
}

fn messages() -> Vec<Vec<u8>> {
    let texts: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
        b"GET /x HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nrest",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\nrest",
        b"\r\n\r\nOPTIONS * HTTP/1.1\r\nhost:a\r\nx:\t y \r\n\r\n",
    ];
    texts.iter().map(|text| text.to_vec()).collect()
}

fn answers() -> Vec<Vec<u8>> {
    let texts: [&[u8]; 6] = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nrest",
        b"HTTP/1.1 304 \r\nContent-Length: 9\r\n\r\n",
    ];
    texts.iter().map(|text| text.to_vec()).collect()
}

fn framed() -> Vec<Vec<u8>> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let all = [
        FRAME_WORDS.concat(),
        b"\0\0\x08\x06\0\0\0\0\0abcdefgh\0\0\x05\x01\x04\0\0\0\x01aaaaa\0\0\x03\0\x01\0\0\0\x01xyz".to_vec(),
        b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64\0\0\x04\x08\0\0\0\0\0\0\0\xff\xff".to_vec(),
    ];
    all.iter().map(|frames| [&preface[..], frames].concat()).collect()
}
