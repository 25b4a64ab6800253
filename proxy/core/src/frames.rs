//! Which HTTP/2 frames a peer sends that bring nothing forward, and how many of them are too many.
//!
//! Why a count of our own: each of the known floods (rapid reset, CONTINUATION, empty DATA, PING, SETTINGS, and resets that
//! a peer provokes) is made of frames that cost their sender nine bytes and us a reaction. The HTTP library bounds some of
//! them by what they make it keep, none by how often they come. One budget bounds them all: it grows with time and with
//! what we have to say to the peer, so that nobody who is served needs to know of it.
//!
//! Why empty DATA frames are taken out: the library ends a connection at the hundred-and-first that it ever sees, however
//! much time lies between them, and with it whatever others have in flight there. They mean nothing; some apps send one
//! before each answer's trailers.

use std::time::Instant;

/// Follows the frames that one peer sends, by their headers.
#[derive(Clone, Debug)]
pub struct Frames {
    header: [u8; HEADER],
    have: usize,
    /// Of the frame at hand, or of the preface.
    left: u64,
    in_fields: bool,
    /// `HEADERS` without its end.
    open: bool,
    last: u32,
    /// The peer is a server: heads that end nothing may be interim answers (`1xx`), of which there may be any number.
    answers: bool,
}

/// How many idle frames a peer may send.
#[derive(Clone, Debug)]
pub struct Calm {
    tokens: u64,
    said: u64,
    since: Option<Instant>,
}

impl Frames {
    /// Before the client's preface.
    pub fn of_client() -> Self {
        Self {
            header: [0; HEADER],
            have: 0,
            left: PREFACE,
            in_fields: false,
            open: false,
            last: 0,
            answers: false,
        }
    }

    /// Before a server's first frame.
    pub fn of_server() -> Self {
        Self { left: 0, answers: true, ..Self::of_client() }
    }

    /// Follows the next bytes and takes out of them each DATA frame that is empty and ends nothing, where its header is
    /// not cut. How many bytes are left, and how many frames began in all of them that bring nothing forward.
    pub fn sift(&mut self, bytes: &mut [u8]) -> (usize, u64) {
        let (mut idle, mut at, mut kept) = (0, 0, 0);
        // What was looked at lies before `at`; from `unmoved` on it is not yet where it shall be.
        let mut unmoved = 0;
        loop {
            if self.left > 0 {
                let n = self.left.min((bytes.len() - at) as u64);
                self.left -= n;
                at += n as usize;
            }
            if at == bytes.len() {
                if kept < unmoved {
                    bytes.copy_within(unmoved.., kept);
                }
                return (kept + at - unmoved, idle);
            }
            let n = (bytes.len() - at).min(HEADER - self.have);
            self.header[self.have..self.have + n].copy_from_slice(&bytes[at..at + n]);
            self.have += n;
            at += n;
            if self.have == HEADER {
                self.have = 0;
                idle += u64::from(self.frame());
                if n == HEADER && self.is_nothing() {
                    if kept < unmoved {
                        bytes.copy_within(unmoved..at - HEADER, kept);
                    }
                    kept += at - HEADER - unmoved;
                    unmoved = at;
                }
            }
        }
    }

    /// Whether the frame whose header came last is DATA that is empty and ends nothing.
    fn is_nothing(&self) -> bool {
        let [a, b, c, kind, flags, stream @ ..] = self.header;
        // On no stream it would be an error.
        [a, b, c, kind, flags & END_STREAM] == [0, 0, 0, DATA, 0] && stream != [0; 4]
    }

    /// Whether header fields have begun and not ended.
    pub fn is_in_fields(&self) -> bool {
        self.open || (self.in_fields && self.left > 0)
    }

    /// The highest stream that the peer has opened.
    pub fn last_stream(&self) -> u32 {
        self.last
    }

    /// A frame's header is whole; whether the frame is idle.
    fn frame(&mut self) -> bool {
        let [a, b, c, kind, flags, stream @ ..] = self.header;
        let length = u32::from_be_bytes([0, a, b, c]);
        self.left = u64::from(length);
        self.in_fields = matches!(kind, HEADERS | CONTINUATION);
        match kind {
            HEADERS => {
                self.last = self.last.max(u32::from_be_bytes(stream) & u32::MAX >> 1);
                self.open = flags & END_HEADERS == 0;
                // One for each request is paid for by the request: it has more than BYTES_PER_FRAME.
                self.answers && flags & END_STREAM == 0
            }
            CONTINUATION => {
                self.open = flags & END_HEADERS == 0;
                true
            }
            DATA => self.is_nothing(),
            // What we asked for.
            SETTINGS | PING => flags & ACK == 0,
            _ => true,
        }
    }
}

impl Default for Calm {
    fn default() -> Self {
        Self { tokens: BURST, said: 0, since: None }
    }
}

impl Calm {
    /// So many bytes were sent to the peer: window updates and pings measure what it gets.
    pub fn said(&mut self, bytes: usize) {
        self.said += bytes as u64;
    }

    /// So many idle frames came. `now` is asked for only when what was saved up is used up. False: too many.
    pub fn bears(&mut self, idle: u64, now: impl FnOnce() -> Instant) -> bool {
        if self.tokens >= idle {
            self.tokens -= idle;
            return true;
        }
        let now = now();
        // How long what it began with has lasted is not known: it begins anew, once.
        let earned = self.since.map_or(BURST, |since| {
            let time = now.saturating_duration_since(since).as_micros();
            u64::try_from(time).unwrap_or(u64::MAX).saturating_mul(PER_SECOND) / 1_000_000
        });
        self.since = Some(now);
        self.tokens = (self.tokens + earned + self.said / BYTES_PER_FRAME).min(BURST);
        self.said = 0;
        let bears = self.tokens >= idle;
        self.tokens = self.tokens.saturating_sub(idle);
        bears
    }
}

const HEADER: usize = 9;
const PREFACE: u64 = 24;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
/// A hundred streams that are all given up twenty times over.
const BURST: u64 = 2_000;
/// Far above any client's keepalive and any pace of giving up; a flood is a hundred times faster.
const PER_SECOND: u64 = 2_000;
/// The most talkative clients acknowledge each DATA frame with two window updates and a ping. An answer to a ping has 17
/// bytes, so that pings do not pay for themselves.
const BYTES_PER_FRAME: u64 = 32;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: usize) -> Vec<u8> {
        let mut out = (payload as u32).to_be_bytes()[1..].to_vec();
        out.extend_from_slice(&[kind, flags]);
        out.extend_from_slice(&stream.to_be_bytes());
        out.resize(HEADER + payload, 0xff);
        out
    }

    impl Frames {
        /// Only what it counts.
        fn feed(&mut self, bytes: &[u8]) -> u64 {
            self.sift(&mut bytes.to_vec()).1
        }
    }

    fn preface() -> Vec<u8> {
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()
    }

    #[test]
    fn only_what_brings_nothing_forward_is_idle() {
        for (kind, flags, payload, idle) in [
            (DATA, 0, 5, 0),
            (DATA, END_STREAM, 0, 0),
            (DATA, 0, 0, 1),
            (HEADERS, END_HEADERS, 20, 0),
            (2, 0, 5, 1),
            (3, 0, 4, 1),
            (SETTINGS, 0, 6, 1),
            (SETTINGS, ACK, 0, 0),
            (PING, 0, 8, 1),
            (PING, ACK, 8, 0),
            (8, 0, 4, 1),
            (CONTINUATION, END_HEADERS, 20, 1),
            (0xfe, 0, 3, 1),
        ] {
            let mut frames = Frames::of_client();
            frames.feed(&preface());
            assert_eq!(frames.feed(&frame(kind, flags, 1, payload)), idle, "{kind} {flags}");
        }
    }

    #[test]
    fn empty_data_that_ends_nothing_is_taken_out_and_all_else_stays() {
        let said = frame(DATA, 0, 1, 5);
        let last = frame(DATA, END_STREAM, 1, 0);
        let nothing = frame(DATA, 0, 1, 0);
        let nowhere = frame(DATA, 0, 0, 0);
        let (s, e, n, z) = (&said[..], &last[..], &nothing[..], &nowhere[..]);
        for (all, left) in
            [(vec![n], vec![]), (vec![s, n, n, s, n, e], vec![s, s, e]), (vec![n, e, z, n, s], vec![e, z, s])]
        {
            let (mut bytes, left) = (all.concat(), left.concat());
            let mut frames = Frames::of_server();
            let (kept, _) = frames.sift(&mut bytes);
            assert_eq!(bytes[..kept], left, "{all:?}");
            // What is cut is handed on.
            let mut frames = Frames::of_server();
            let mut got = Vec::new();
            for piece in all.concat().chunks_mut(4) {
                let (kept, _) = frames.sift(piece);
                got.extend_from_slice(&piece[..kept]);
            }
            assert_eq!(got, all.concat());
        }
    }

    #[test]
    fn fields_are_open_until_their_end() {
        let mut frames = Frames::of_client();
        frames.feed(&preface());
        assert!(!frames.is_in_fields());
        let head = frame(HEADERS, 0, 7, 20);
        frames.feed(&head[..15]);
        assert!(frames.is_in_fields());
        frames.feed(&head[15..]);
        assert!(frames.is_in_fields());
        let rest = frame(CONTINUATION, END_HEADERS, 7, 4);
        frames.feed(&rest[..10]);
        assert!(frames.is_in_fields());
        frames.feed(&rest[10..]);
        assert!(!frames.is_in_fields());
        assert_eq!(frames.last_stream(), 7);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn a_flood_is_not_borne_and_a_talkative_client_is() {
        let start = Instant::now();
        let mut calm = Calm::default();
        let mut sent = 0;
        // 50,000 pings a second, each answered.
        while calm.bears(1, || start + Duration::from_micros(20 * sent)) {
            calm.said(17);
            sent += 1;
            assert!(sent < 50_000);
        }
        assert!(sent >= BURST);
        // Messages of a hundred bytes, each with two window updates and a ping, as fast as can be.
        let mut calm = Calm::default();
        for _ in 0..100_000 {
            calm.said(109);
            assert!(calm.bears(3, || start));
        }
        // Two thousand a second for ever.
        let mut calm = Calm::default();
        for n in 0..100_000 {
            assert!(calm.bears(1, || start + Duration::from_micros(501 * n)));
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(
            all in prop::collection::vec((0..12_u8, 0..6_u8, 0..30_usize), 0..20),
            cut in 1..40_usize,
        ) {
            let mut bytes = preface();
            for (kind, flags, payload) in all {
                bytes.extend_from_slice(&frame(kind, flags, 1, payload));
            }
            let mut whole = Frames::of_client();
            let want = whole.feed(&bytes);
            let mut cuts = Frames::of_client();
            let got: u64 = bytes.chunks(cut).map(|piece| cuts.feed(piece)).sum();
            prop_assert_eq!(got, want);
            prop_assert_eq!(cuts.is_in_fields(), whole.is_in_fields());
        }
    }
}
