//! Where one HTTP/1 message ends and the next begins, and the first byte at which two readers could differ about it.
//!
//! Why a second reader before the HTTP library's: a library repairs what it reads (a bare line feed, two framings of one
//! body), and what it made of it looks like any other request. An app that repairs differently sees other requests than
//! the ones that were authorized. So everything that has more than one reading ends here, before anybody has read it.
//!
//! It is a follower, not a parser: it keeps nothing but its place. Bodies cost nothing by the byte, heads are looked
//! through a word at a time, and it does not matter how the bytes are cut into pieces.

use std::{fmt, ops::ControlFlow};

/// Follows the messages of one direction of one connection.
#[derive(Clone, Debug)]
pub struct Framing {
    side: Side,
    limits: HeadLimits,
    state: State,
    /// Trailers are read as fields are.
    trailers: bool,
    /// Of the head, or of the chunk's line or trailers: bytes in pieces that are gone.
    before: usize,
    fields: usize,
    head: Head,
    /// What is left of a body, or of a chunk; while a number is read, the number so far.
    number: u64,
    digits: u8,
    /// The beginning of a name that was cut by the end of a piece.
    name: [u8; NAME_MAX],
    name_len: usize,
    heads: u64,
    /// Of responses: whether one is due, and to what; how many that are not the last came before it.
    due: Option<To>,
    informational: u8,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A client.
    Requests,
    /// A server.
    Responses,
}

/// What a head may have.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Bytes, with the start line; also those of a trailer section.
    pub bytes: usize,
    /// Fields.
    pub fields: usize,
}

/// What a response answers, as far as its length depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// `HEAD`: it has no body whatever it says.
    Head,
    /// Any other method.
    Any,
}

/// What may be handed on of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    /// All of it.
    All,
    /// So many bytes. There ends a request to change to another protocol: only its answer tells what the rest is.
    /// [`Framing::go_on`] or [`Framing::leave`] follows.
    Until(usize),
}

/// A message that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Why.
    pub why: Why,
    /// So many bytes of the piece come before the message, and may be handed on.
    pub whole: usize,
    /// Its head was well-formed, and went on with an earlier piece.
    pub begun: bool,
}

/// Why a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// Not `method SP target SP HTTP/1.x`, or not `HTTP/1.x SP status`.
    StartLine,
    /// A line that ends with a bare LF, or a CR without LF.
    LineEnding,
    /// A line that continues the one before it.
    Folding,
    /// A field without a name, or whose name is not a token up to its colon.
    FieldName,
    /// A control character in a field's value.
    FieldValue,
    /// `Content-Length` twice, not a plain number, or spelt in another way.
    ContentLength,
    /// `Transfer-Encoding` that is not exactly `chunked`, in HTTP/1.0, or spelt in another way.
    TransferEncoding,
    /// `Content-Length` and `Transfer-Encoding` in one message.
    TwoLengths,
    /// No `Host`, or more than one.
    Host,
    /// A chunk whose size is not plain hexadecimal, or that does not end where it says.
    Chunk,
    /// A trailer that would change what the message is.
    Trailer,
    /// More bytes than a head may have.
    TooLarge,
    /// More fields than a head may have.
    TooManyFields,
    /// A response that nobody asked for.
    Unasked,
    /// `1xx` without end.
    Informational,
}

impl Why {
    /// Stable, lower-case, for `weft-reason`, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StartLine => "start_line",
            Self::LineEnding => "line_ending",
            Self::Folding => "folded_field",
            Self::FieldName => "field_name",
            Self::FieldValue => "field_value",
            Self::ContentLength => "content_length",
            Self::TransferEncoding => "transfer_encoding",
            Self::TwoLengths => "two_lengths",
            Self::Host => "host",
            Self::Chunk => "chunk",
            Self::Trailer => "trailer",
            Self::TooLarge => "head_too_large",
            Self::TooManyFields => "too_many_fields",
            Self::Unasked => "unasked_answer",
            Self::Informational => "too_many_informational",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StartLine => "the start line is not one of HTTP/1",
            Self::LineEnding => "a line does not end with CR LF",
            Self::Folding => "a field is folded over lines",
            Self::FieldName => "a field's name is not one",
            Self::FieldValue => "a field's value has a control character",
            Self::ContentLength => "the Content-Length is repeated, not a number, or spelt in another way",
            Self::TransferEncoding => "the Transfer-Encoding is not exactly chunked, or spelt in another way",
            Self::TwoLengths => "both Content-Length and Transfer-Encoding",
            Self::Host => "no Host, or more than one",
            Self::Chunk => "a chunk is not framed as it says",
            Self::Trailer => "a trailer would change what the message is",
            Self::TooLarge => "the head is too large",
            Self::TooManyFields => "the head has too many fields",
            Self::Unasked => "an answer that nobody asked for",
            Self::Informational => "interim answers without end",
        })
    }
}

/// What a head has said so far.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    http_10: bool,
    status: u16,
    length: Option<u64>,
    chunked: bool,
    host: bool,
    /// `Upgrade` or `CONNECT`.
    switches: bool,
}

/// Where the next byte belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a message; then after the CR of the one empty line that may stand there, and after that line.
    Start,
    StartLf,
    StartLine,
    Method,
    Target,
    /// So many bytes of `HTTP/1.` and the digit were read.
    Version(u8),
    StatusVersion(u8),
    /// So many of its three digits were read.
    Status(u8),
    Reason,
    /// After the CR that ends a line of the head.
    LineLf,
    FieldStart,
    Name,
    Value,
    Length(Part),
    /// So many letters of `chunked` were read.
    Coding(u8),
    CodingEnd,
    /// After the CR of the empty line.
    EndLf,
    Body,
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Paused,
    /// Not ours to follow.
    Left,
}

/// Where in a value that is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Before,
    Digits,
    After,
}

impl Framing {
    /// Before the first message.
    pub fn new(side: Side, limits: HeadLimits) -> Self {
        Self {
            side,
            limits,
            state: State::Start,
            trailers: false,
            before: 0,
            fields: 0,
            head: Head::default(),
            number: 0,
            digits: 0,
            name: [0; NAME_MAX],
            name_len: 0,
            heads: 0,
            due: None,
            informational: 0,
        }
    }

    /// Follows the next piece.
    ///
    /// # Errors
    /// A message is malformed. What comes after it cannot be followed: the connection is over.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Fed, Malformed> {
        let mut piece = Piece { bytes, at: 0, message: 0, line: 0, body: self.is_in_body(), head: 0 };
        while piece.at < bytes.len() {
            match self.step(&mut piece) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(Fed::Until(piece.at)),
                Err(why) => return Err(self.refuse(&piece, why)),
            }
        }
        if self.is_bounded() {
            self.before += bytes.len() - piece.line;
            if self.before > self.limits.bytes {
                return Err(self.refuse(&piece, Why::TooLarge));
            }
        }
        Ok(Fed::All)
    }

    /// A response is due to what was sent.
    pub fn expect(&mut self, to: To) {
        self.due = Some(to);
    }

    /// Whether the next byte begins a message.
    pub fn is_between(&self) -> bool {
        matches!(self.state, State::Start | State::StartLine)
    }

    /// Whether a message's head has begun and not ended. An empty line before it, which old clients send behind a body,
    /// begins none.
    pub fn is_in_head(&self) -> bool {
        self.is_bounded() && !self.is_in_body() && !matches!(self.state, State::StartLf | State::StartLine)
    }

    /// How many heads have been followed to their end and handed on.
    pub fn heads(&self) -> u64 {
        self.heads
    }

    /// Whether it waits for the answer to a request to change the protocol.
    pub fn is_paused(&self) -> bool {
        self.state == State::Paused
    }

    /// The protocol was not changed: what follows are messages.
    pub fn go_on(&mut self) {
        if self.state == State::Paused {
            self.state = State::Start;
        }
    }

    /// The protocol was changed: what follows is somebody else's.
    pub fn leave(&mut self) {
        self.state = State::Left;
    }

    /// Whether what goes on with the next piece may be only so long.
    fn is_bounded(&self) -> bool {
        match self.state {
            State::Start | State::Body | State::Data | State::DataCr | State::DataLf => false,
            State::Paused | State::Left => false,
            State::StartLf
            | State::StartLine
            | State::Method
            | State::Target
            | State::Version(_)
            | State::StatusVersion(_)
            | State::Status(_)
            | State::Reason
            | State::LineLf
            | State::FieldStart
            | State::Name
            | State::Value
            | State::Length(_)
            | State::Coding(_)
            | State::CodingEnd
            | State::EndLf
            | State::Size
            | State::Extension
            | State::SizeLf => true,
        }
    }

    /// Whether the head of a message is behind us, and its end is not.
    fn is_in_body(&self) -> bool {
        match self.state {
            State::Body
            | State::Size
            | State::Extension
            | State::SizeLf
            | State::Data
            | State::DataCr
            | State::DataLf => true,
            State::Start
            | State::StartLf
            | State::StartLine
            | State::Method
            | State::Target
            | State::Version(_)
            | State::StatusVersion(_)
            | State::Status(_)
            | State::Reason
            | State::LineLf
            | State::FieldStart
            | State::Name
            | State::Value
            | State::Length(_)
            | State::Coding(_)
            | State::CodingEnd
            | State::EndLf => self.trailers,
            State::Paused | State::Left => false,
        }
    }

    fn refuse(&mut self, piece: &Piece<'_>, why: Why) -> Malformed {
        // A head that ended within this piece is not handed on either.
        self.heads -= piece.head;
        self.state = State::Left;
        Malformed { why, whole: piece.message, begun: piece.body }
    }

    /// One stretch of bytes that belong together.
    fn step(&mut self, piece: &mut Piece<'_>) -> Result<ControlFlow<()>, Why> {
        let byte = piece.bytes[piece.at];
        match self.state {
            State::Start => {
                (piece.message, piece.line, piece.body, piece.head) = (piece.at, piece.at, false, 0);
                if self.side == Side::Responses && self.due.is_none() {
                    return Err(Why::Unasked);
                }
                (self.head, self.fields, self.before) = (Head::default(), 0, 0);
                // RFC 9112 §2.2: a client may send one empty line too many.
                if byte == b'\r' && self.side == Side::Requests {
                    self.state = State::StartLf;
                    piece.at += 1;
                } else {
                    self.start_line();
                }
            }
            State::StartLf => {
                expect(byte == b'\n', Why::LineEnding)?;
                piece.at += 1;
                self.state = State::StartLine;
            }
            State::StartLine => self.start_line(),
            State::Method => self.method(piece)?,
            State::Target => {
                let rest = &piece.bytes[piece.at..];
                let n = first_below::<{ b' ' + 1 }>(rest);
                self.name_len += n;
                piece.at += n;
                if let Some(&end) = rest.get(n) {
                    expect(end == b' ' && self.name_len > 0, Why::StartLine)?;
                    piece.at += 1;
                    self.state = State::Version(0);
                }
            }
            // What nearly all say, at once; the states below say the same byte by byte.
            State::Version(0) if piece.bytes[piece.at..].starts_with(b"HTTP/1.1\r\n") => {
                self.head.http_10 = false;
                piece.at += 10;
                self.state = State::FieldStart;
            }
            State::StatusVersion(0) if piece.bytes[piece.at..].starts_with(b"HTTP/1.1 ") => {
                self.head.http_10 = false;
                piece.at += 9;
                self.state = State::Status(0);
            }
            State::Version(n) => {
                piece.at += 1;
                self.state = match n {
                    8 => {
                        expect(byte == b'\r', if byte == b'\n' { Why::LineEnding } else { Why::StartLine })?;
                        State::LineLf
                    }
                    _ => State::Version(self.version(n, byte)?),
                };
            }
            State::StatusVersion(n) => {
                piece.at += 1;
                self.state = match n {
                    8 => {
                        expect(byte == b' ', Why::StartLine)?;
                        State::Status(0)
                    }
                    _ => State::StatusVersion(self.version(n, byte)?),
                };
            }
            State::Status(n) => {
                piece.at += 1;
                self.state = match (n, byte) {
                    (0, b'1'..=b'9') | (1 | 2, b'0'..=b'9') => {
                        self.head.status = self.head.status * 10 + u16::from(byte - b'0');
                        State::Status(n + 1)
                    }
                    (3, b' ') => State::Reason,
                    // Without a reason the space before it is often left out.
                    (3, b'\r') => State::LineLf,
                    (3, b'\n') => return Err(Why::LineEnding),
                    _ => return Err(Why::StartLine),
                };
            }
            State::Reason | State::Value => {
                if piece.text(Why::FieldValue)? {
                    self.state = State::LineLf;
                }
            }
            State::LineLf => {
                expect(byte == b'\n', Why::LineEnding)?;
                piece.at += 1;
                self.state = State::FieldStart;
            }
            State::FieldStart => match byte {
                b'\r' => {
                    piece.at += 1;
                    self.state = State::EndLf;
                }
                b'\n' => return Err(Why::LineEnding),
                b' ' | b'\t' => return Err(Why::Folding),
                _ => {
                    self.fields += 1;
                    expect(self.fields <= self.limits.fields, Why::TooManyFields)?;
                    self.name_len = 0;
                    self.state = State::Name;
                    self.name(piece)?;
                }
            },
            State::Name => self.name(piece)?,
            State::Length(part) => {
                piece.at += 1;
                self.state = self.length(part, byte)?;
            }
            State::Coding(n) => {
                piece.at += 1;
                self.state = match byte {
                    b' ' | b'\t' if n == 0 => State::Coding(0),
                    b'\n' => return Err(Why::LineEnding),
                    _ => {
                        expect(byte.to_ascii_lowercase() == CHUNKED[usize::from(n)], Why::TransferEncoding)?;
                        if usize::from(n) + 1 == CHUNKED.len() {
                            State::CodingEnd
                        } else {
                            State::Coding(n + 1)
                        }
                    }
                };
            }
            State::CodingEnd => {
                piece.at += 1;
                match byte {
                    b' ' | b'\t' => {}
                    b'\r' => self.state = State::LineLf,
                    b'\n' => return Err(Why::LineEnding),
                    _ => return Err(Why::TransferEncoding),
                }
            }
            State::EndLf => {
                expect(byte == b'\n', Why::LineEnding)?;
                piece.at += 1;
                expect(self.before + piece.at - piece.line <= self.limits.bytes, Why::TooLarge)?;
                return if self.trailers { Ok(self.end()) } else { self.head_ends(piece) };
            }
            State::Body | State::Data => {
                let n = self.number.min((piece.bytes.len() - piece.at) as u64);
                self.number -= n;
                piece.at += n as usize;
                if self.number == 0 {
                    if self.state == State::Body {
                        return Ok(self.end());
                    }
                    self.state = State::DataCr;
                }
            }
            State::Size => {
                piece.at += 1;
                self.state = self.size(byte)?;
            }
            State::Extension => {
                if piece.text(Why::Chunk)? {
                    self.state = State::SizeLf;
                }
            }
            State::SizeLf => {
                expect(byte == b'\n', Why::LineEnding)?;
                piece.at += 1;
                expect(self.before + piece.at - piece.line <= CHUNK_LINE_MAX, Why::Chunk)?;
                if self.number == 0 {
                    self.trailers = true;
                    (self.before, self.fields, piece.line) = (0, 0, piece.at);
                    self.state = State::FieldStart;
                } else {
                    self.state = State::Data;
                }
            }
            State::DataCr => {
                expect(byte == b'\r', Why::Chunk)?;
                piece.at += 1;
                self.state = State::DataLf;
            }
            State::DataLf => {
                expect(byte == b'\n', Why::Chunk)?;
                piece.at += 1;
                self.chunk(piece);
            }
            State::Paused => return Ok(ControlFlow::Break(())),
            State::Left => piece.at = piece.bytes.len(),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn start_line(&mut self) {
        self.name_len = 0;
        self.state = match self.side {
            Side::Requests => State::Method,
            Side::Responses => State::StatusVersion(0),
        };
    }

    fn method(&mut self, piece: &mut Piece<'_>) -> Result<(), Why> {
        let Some((end, method)) = self.token(piece) else { return Ok(()) };
        expect(
            end == b' ' && !method.is_empty(),
            if end == b'\n' { Why::LineEnding } else { Why::StartLine },
        )?;
        self.head.switches = method.is(b"connect");
        piece.at += 1;
        self.name_len = 0;
        self.state = State::Target;
        Ok(())
    }

    fn version(&mut self, n: u8, byte: u8) -> Result<u8, Why> {
        if n < 7 {
            expect(byte == VERSION[usize::from(n)], Why::StartLine)?;
        } else {
            expect(byte == b'0' || byte == b'1', Why::StartLine)?;
            self.head.http_10 = byte == b'0';
        }
        Ok(n + 1)
    }

    /// A field's name up to its colon, and what its value is read for.
    fn name(&mut self, piece: &mut Piece<'_>) -> Result<(), Why> {
        let Some((end, name)) = self.token(piece) else { return Ok(()) };
        if end != b':' || name.is_empty() {
            return Err(match end {
                b'\n' => Why::LineEnding,
                _ => Why::FieldName,
            });
        }
        let known = name.known();
        piece.at += 1;
        self.state = match known {
            None => State::Value,
            Some(Known::Respelt(why)) => {
                expect(self.side == Side::Responses, why)?;
                State::Value
            }
            Some(Known::Upgrade) => {
                self.head.switches |= !self.trailers;
                State::Value
            }
            Some(_) if self.trailers => return Err(Why::Trailer),
            Some(Known::Host) => {
                expect(!self.head.host || self.side == Side::Responses, Why::Host)?;
                self.head.host = true;
                State::Value
            }
            Some(Known::Length) => {
                expect(self.head.length.is_none(), Why::ContentLength)?;
                expect(!self.head.chunked, Why::TwoLengths)?;
                (self.number, self.digits) = (0, 0);
                State::Length(Part::Before)
            }
            Some(Known::Coding) => {
                expect(self.head.length.is_none(), Why::TwoLengths)?;
                expect(!self.head.chunked && !self.head.http_10, Why::TransferEncoding)?;
                self.head.chunked = true;
                State::Coding(0)
            }
        };
        Ok(())
    }

    /// Goes on to the first byte that is not a token's; that byte and the whole token, or `None` at the piece's end.
    fn token<'a>(&mut self, piece: &mut Piece<'a>) -> Option<(u8, Token<'a>)> {
        let rest = &piece.bytes[piece.at..];
        let n = rest.iter().position(|&b| !TOKEN[usize::from(b)]);
        let (part, _) = rest.split_at(n.unwrap_or(rest.len()));
        piece.at += part.len();
        if n.is_some() && self.name_len == 0 {
            return n.map(|n| (rest[n], Token::Here(part)));
        }
        // Cut: the beginning is kept, as much of it as a known name has.
        for (slot, byte) in self.name.iter_mut().skip(self.name_len).zip(part) {
            *slot = *byte;
        }
        self.name_len += part.len();
        n.map(|n| (rest[n], Token::Kept(self.name, self.name_len)))
    }

    fn length(&mut self, part: Part, byte: u8) -> Result<State, Why> {
        match (part, byte) {
            (Part::Before | Part::Digits, b'0'..=b'9') => {
                let number = self.number.checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                self.number = number.ok_or(Why::ContentLength)?;
                self.digits = self.digits.saturating_add(1);
                expect(self.digits <= DIGITS_MAX, Why::ContentLength)?;
                Ok(State::Length(Part::Digits))
            }
            (Part::Before, b' ' | b'\t') => Ok(State::Length(Part::Before)),
            (Part::Digits | Part::After, b' ' | b'\t') => Ok(State::Length(Part::After)),
            (Part::Digits | Part::After, b'\r') => {
                self.head.length = Some(self.number);
                Ok(State::LineLf)
            }
            (_, b'\n') => Err(Why::LineEnding),
            _ => Err(Why::ContentLength),
        }
    }

    fn head_ends(&mut self, piece: &mut Piece<'_>) -> Result<ControlFlow<()>, Why> {
        let Head { http_10, status, length, chunked, host, .. } = self.head;
        let bodiless = match self.side {
            Side::Requests => {
                expect(host || http_10, Why::Host)?;
                false
            }
            Side::Responses => match status {
                101 => {
                    self.leave();
                    return Ok(ControlFlow::Continue(()));
                }
                100..=199 => {
                    self.informational += 1;
                    expect(self.informational <= INFORMATIONAL_MAX, Why::Informational)?;
                    self.state = State::Start;
                    return Ok(ControlFlow::Continue(()));
                }
                _ => {
                    self.informational = 0;
                    self.due.take() == Some(To::Head) || matches!(status, 204 | 304)
                }
            },
        };
        self.heads += 1;
        piece.head = u64::from(!piece.body);
        if bodiless {
            return Ok(self.end());
        }
        match (chunked, length) {
            (true, _) => self.chunk(piece),
            (false, Some(0)) => return Ok(self.end()),
            (false, Some(length)) => {
                self.number = length;
                self.state = State::Body;
            }
            (false, None) if self.side == Side::Requests => return Ok(self.end()),
            // Until the connection ends.
            (false, None) => self.leave(),
        }
        Ok(ControlFlow::Continue(()))
    }

    /// A chunk begins.
    fn chunk(&mut self, piece: &mut Piece<'_>) {
        (self.number, self.digits) = (0, 0);
        (self.before, piece.line) = (0, piece.at);
        self.state = State::Size;
    }

    fn size(&mut self, byte: u8) -> Result<State, Why> {
        if let Some(digit) = char::from(byte).to_digit(16) {
            self.digits += 1;
            expect(self.digits <= SIZE_DIGITS_MAX, Why::Chunk)?;
            self.number = self.number << 4 | u64::from(digit);
            return Ok(State::Size);
        }
        expect(self.digits > 0, Why::Chunk)?;
        match byte {
            b'\r' => Ok(State::SizeLf),
            b';' => Ok(State::Extension),
            b'\n' => Err(Why::LineEnding),
            _ => Err(Why::Chunk),
        }
    }

    /// A message is whole.
    fn end(&mut self) -> ControlFlow<()> {
        self.trailers = false;
        if self.head.switches && self.side == Side::Requests {
            self.state = State::Paused;
            return ControlFlow::Break(());
        }
        self.state = State::Start;
        ControlFlow::Continue(())
    }
}

/// Some bytes, and where in them we are.
struct Piece<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where the message begins; 0 if it began in an earlier piece.
    message: usize,
    /// Where what is bounded begins: a head, a chunk's line, the trailers.
    line: usize,
    /// The message's head went on with an earlier piece.
    body: bool,
    /// 1 if the message's head has ended within this piece.
    head: u64,
}

impl Piece<'_> {
    /// Goes on through text to the next control character. True: to a CR, where the line ends.
    #[inline]
    fn text(&mut self, control: Why) -> Result<bool, Why> {
        let rest = &self.bytes[self.at..];
        let n = first_below::<b' '>(rest);
        self.at += n;
        let Some(&end) = rest.get(n) else { return Ok(false) };
        self.at += 1;
        match end {
            b'\r' => Ok(true),
            b'\t' => Ok(false),
            b'\n' => Err(Why::LineEnding),
            _ => Err(control),
        }
    }
}

/// A name: in the piece at hand, or put together from several.
enum Token<'a> {
    Here(&'a [u8]),
    Kept([u8; NAME_MAX], usize),
}

/// Fields that say how long a message is, or whom it is for.
#[derive(Clone, Copy)]
enum Known {
    Host,
    Upgrade,
    Length,
    Coding,
    /// One of the two as [`respelt`] finds it: a request may have two lengths, of which only one can be authorized.
    Respelt(Why),
}

impl Token<'_> {
    fn is_empty(&self) -> bool {
        self.bytes().is_some_and(<[u8]>::is_empty)
    }

    /// `None`: longer than any name that matters.
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Here(name) => Some(name),
            Self::Kept(name, len) => name.get(..*len),
        }
    }

    fn is(&self, name: &[u8]) -> bool {
        self.bytes().is_some_and(|bytes| bytes.eq_ignore_ascii_case(name))
    }

    fn known(&self) -> Option<Known> {
        let bytes = self.bytes()?;
        match bytes.len() {
            4 if bytes.eq_ignore_ascii_case(b"host") => Some(Known::Host),
            7 if bytes.eq_ignore_ascii_case(b"upgrade") => Some(Known::Upgrade),
            14 if bytes.eq_ignore_ascii_case(b"content-length") => Some(Known::Length),
            17 if bytes.eq_ignore_ascii_case(b"transfer-encoding") => Some(Known::Coding),
            14 | 17 => respelt(bytes).map(Known::Respelt),
            _ => None,
        }
    }
}

/// What is wrong with a field of this name: it says how long a message is to gateways to programs (CGI, WSGI), and is none
/// of that to HTTP libraries.
pub fn respelt(name: &[u8]) -> Option<Why> {
    let is = |known: &[u8]| is_read_as(name, known) && !name.eq_ignore_ascii_case(known);
    if is(b"content-length") {
        Some(Why::ContentLength)
    } else {
        is(b"transfer-encoding").then_some(Why::TransferEncoding)
    }
}

/// Whether some app takes the one name for the other, which is in lower case: whatever is no letter or digit may be `-`.
pub fn is_read_as(name: &[u8], known: &[u8]) -> bool {
    let letter = |b: u8| if b.is_ascii_alphanumeric() { b.to_ascii_lowercase() } else { b'-' };
    name.len() == known.len() && name.iter().zip(known).all(|(&a, &b)| letter(a) == b)
}

fn expect(holds: bool, why: Why) -> Result<(), Why> {
    if holds { Ok(()) } else { Err(why) }
}

/// Where the first byte below `BELOW` is, or DEL; the length if there is none. Eight at a time: a byte of `w - n` has its
/// high bit set, and had it not before, exactly where it was less than n; borrows reach only bytes behind the first.
fn first_below<const BELOW: u8>(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    let (words, rest) = bytes.as_chunks::<8>();
    for (n, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let low = word.wrapping_sub(ONES * u64::from(BELOW)) & !word;
        let del = word ^ (ONES * 0x7f);
        let del = del.wrapping_sub(ONES) & !del;
        let found = (low | del) & HIGH;
        if found != 0 {
            return n * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let at = rest.iter().position(|&b| b < BELOW || b == 0x7f);
    words.len() * 8 + at.unwrap_or(rest.len())
}

const VERSION: &[u8; 7] = b"HTTP/1.";
const CHUNKED: &[u8; 7] = b"chunked";
/// The longest known name has 17 letters.
const NAME_MAX: usize = 17;
/// A length of 19 digits fits in 64 bits.
const DIGITS_MAX: u8 = 19;
/// So does a size of 16.
const SIZE_DIGITS_MAX: u8 = 16;
/// A chunk's size with its extensions, which nobody uses and which are not handed on.
const CHUNK_LINE_MAX: usize = 1024;
/// Interim answers before the last one.
const INFORMATIONAL_MAX: u8 = 64;
/// RFC 9110 §5.6.2.
const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0_usize;
    while b < 256 {
        table[b] = matches!(b as u8, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'!' | b'#' | b'$' | b'%' | b'&' | b'\''
            | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~');
        b += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 1_000, fields: 10 };

    fn requests() -> Framing {
        Framing::new(Side::Requests, LIMITS)
    }

    fn responses(to: To) -> Framing {
        let mut framing = Framing::new(Side::Responses, LIMITS);
        framing.expect(to);
        framing
    }

    fn why(mut framing: Framing, bytes: &str) -> Option<Why> {
        framing.feed(bytes.as_bytes()).err().map(|malformed| malformed.why)
    }

    #[test]
    fn what_has_one_reading_passes() {
        for good in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.0\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nhost:\r\n\r\n",
            "M-SEARCH http://a/?q#x HTTP/1.1\r\nHost: \tb\t \r\nx:\u{ff}\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \t 5 \r\n\r\nhelloGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: ChunKed\t\r\n\r\n5\r\nhello\r\n00A;x=\"y\"\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
        ] {
            let mut framing = requests();
            assert_eq!(framing.feed(good.as_bytes()), Ok(Fed::All), "{good}");
            assert!(framing.is_between(), "{good}");
        }
    }

    #[test]
    fn what_has_two_readings_does_not() {
        let head = |fields: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
        for (fields, want) in [
            ("Content-Length: 5\r\nTransfer-Encoding: chunked", Why::TwoLengths),
            ("Transfer-Encoding: chunked\r\nContent-Length: 5", Why::TwoLengths),
            ("Content-Length: 5\r\nContent-Length: 5", Why::ContentLength),
            ("Content-Length: 5, 5", Why::ContentLength),
            ("Content-Length: +5", Why::ContentLength),
            ("Content-Length: 0x5", Why::ContentLength),
            ("Content-Length: 5 5", Why::ContentLength),
            ("Content-Length:", Why::ContentLength),
            ("Content-Length: 99999999999999999999", Why::ContentLength),
            ("Content_Length: 5\r\nContent-Length: 6", Why::ContentLength),
            ("Content_Length: 5", Why::ContentLength),
            ("content.length: 5", Why::ContentLength),
            ("transfer_encoding: chunked", Why::TransferEncoding),
            ("Content-Length : 5", Why::FieldName),
            ("Transfer-Encoding: identity", Why::TransferEncoding),
            ("Transfer-Encoding: gzip, chunked", Why::TransferEncoding),
            ("Transfer-Encoding: chunked, chunked", Why::TransferEncoding),
            ("Transfer-Encoding: chunkedx", Why::TransferEncoding),
            ("Transfer-Encoding: \x0bchunked", Why::TransferEncoding),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", Why::TransferEncoding),
            ("Transfer-Encoding\t: chunked", Why::FieldName),
            ("Transfer-Encoding:\r\n chunked", Why::TransferEncoding),
            ("x: y\r\n z", Why::Folding),
            ("x: y\r\n\tz", Why::Folding),
            ("x: y\nz: w", Why::LineEnding),
            ("x: y\rz: w", Why::LineEnding),
            ("x: y\0", Why::FieldValue),
            ("x: y\x7f", Why::FieldValue),
            (": y", Why::FieldName),
            ("x y: z", Why::FieldName),
            ("x", Why::FieldName),
            ("Host: a", Why::Host),
        ] {
            assert_eq!(why(requests(), &head(fields)), Some(want), "{fields}");
        }
        for (bytes, want) in [
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", Why::LineEnding),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", Why::LineEnding),
            ("\nGET / HTTP/1.1\r\n", Why::LineEnding),
            ("\r\n\r\nGET / HTTP/1.1\r\n", Why::StartLine),
            ("GET /\r\n", Why::StartLine),
            ("GET  / HTTP/1.1\r\n", Why::StartLine),
            ("GET / HTTP/1.1 \r\n", Why::StartLine),
            ("GET / a HTTP/1.1\r\n", Why::StartLine),
            ("GET\t/ HTTP/1.1\r\n", Why::StartLine),
            ("GET /\0 HTTP/1.1\r\n", Why::StartLine),
            ("GET / http/1.1\r\n", Why::StartLine),
            ("GET / HTTP/1.2\r\n", Why::StartLine),
            ("GET / HTTP/2.0\r\n", Why::StartLine),
            ("G(T / HTTP/1.1\r\n", Why::StartLine),
            (" GET / HTTP/1.1\r\n", Why::StartLine),
            ("GET / HTTP/1.1\r\n\r\n", Why::Host),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", Why::Folding),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", Why::TransferEncoding),
        ] {
            assert_eq!(why(requests(), bytes), Some(want), "{bytes}");
        }
        let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        for (body, want) in [
            ("\r\n", Why::Chunk),
            ("5 \r\nhello\r\n", Why::Chunk),
            (" 5\r\nhello\r\n", Why::Chunk),
            ("0x5\r\nhello\r\n", Why::Chunk),
            ("-5\r\n", Why::Chunk),
            ("5_0\r\n", Why::Chunk),
            ("g\r\n", Why::Chunk),
            ("5\nhello", Why::LineEnding),
            ("5\rhello", Why::LineEnding),
            ("5;x\nhello\r\n", Why::LineEnding),
            ("5;x\0\r\nhello\r\n", Why::Chunk),
            ("5\r\nhello0\r\n\r\n", Why::Chunk),
            ("5\r\nhello\n0\r\n\r\n", Why::Chunk),
            ("5\r\nhello\rx", Why::Chunk),
            ("00000000000000000\r\n", Why::Chunk),
            ("0\r\n\n", Why::LineEnding),
            ("0\r\nContent-Length: 5\r\n\r\n", Why::Trailer),
            ("0\r\nHost: b\r\n\r\n", Why::Trailer),
            ("0\r\n x: y\r\n\r\n", Why::Folding),
        ] {
            assert_eq!(why(requests(), &format!("{chunked}{body}")), Some(want), "{body}");
        }
    }

    #[test]
    fn an_empty_line_begins_no_head() {
        let mut framing = requests();
        framing.feed(b"\r").unwrap();
        assert!(!framing.is_in_head());
        framing.feed(b"\n").unwrap();
        assert!(!framing.is_in_head() && framing.is_between());
        framing.feed(b"G").unwrap();
        assert!(framing.is_in_head() && !framing.is_between());
    }

    #[test]
    fn heads_end() {
        let many = "x: y\r\n".repeat(10);
        assert_eq!(
            why(requests(), &format!("GET / HTTP/1.1\r\n{many}Host: a\r\n\r\n")),
            Some(Why::TooManyFields)
        );
        let long = "a".repeat(1_000);
        for end in ["", " HTTP/1.1\r\nHost: a\r\n\r\n"] {
            assert_eq!(why(requests(), &format!("GET /{long}{end}")), Some(Why::TooLarge));
        }
        let mut framing = requests();
        let mut bytes = b"GET /".iter().copied().chain(std::iter::repeat(b'a'));
        let refused = (0..).find(|_| framing.feed(&[bytes.next().unwrap()]).is_err());
        assert_eq!(refused, Some(1_000));
        let chunk = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;";
        assert_eq!(why(requests(), &format!("{chunk}{long}{long}")), Some(Why::TooLarge));
    }

    #[test]
    fn what_comes_before_the_malformed_message_is_handed_on() {
        let good = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi";
        let bad = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nz";
        let mut framing = requests();
        let refused = framing.feed(format!("{good}{bad}").as_bytes()).unwrap_err();
        assert_eq!(refused, Malformed { why: Why::Chunk, whole: good.len(), begun: false });
        assert_eq!(framing.heads(), 1);
        // In its own piece, the chunk belongs to a request that is under way.
        let mut framing = requests();
        framing.feed(bad.trim_end_matches('z').as_bytes()).unwrap();
        let refused = framing.feed(b"z").unwrap_err();
        assert_eq!(refused, Malformed { why: Why::Chunk, whole: 0, begun: true });
        assert_eq!(framing.heads(), 1);
    }

    #[test]
    fn after_a_request_to_switch_nothing_is_read_before_its_answer() {
        let ask = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
        let both = format!("{ask}anything");
        let mut framing = requests();
        assert_eq!(framing.feed(both.as_bytes()), Ok(Fed::Until(ask.len())));
        assert!(framing.is_paused());
        let mut left = framing.clone();
        left.leave();
        assert_eq!(left.feed(b"anything\0\n"), Ok(Fed::All));
        framing.go_on();
        assert_eq!(framing.feed(b"anything\n").unwrap_err().why, Why::LineEnding);
        let connect = "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n";
        assert_eq!(requests().feed(connect.as_bytes()), Ok(Fed::Until(connect.len())));
    }

    #[test]
    fn a_response_is_as_long_as_its_request_and_status_say() {
        let length = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
        let mut head = responses(To::Head);
        assert_eq!(head.feed(length.as_bytes()), Ok(Fed::All));
        assert!(head.is_between());
        let mut any = responses(To::Any);
        assert_eq!(any.feed(length.as_bytes()), Ok(Fed::All));
        assert!(!any.is_between());
        for status in ["204", "304 Not Modified"] {
            let mut framing = responses(To::Any);
            let answer = format!("HTTP/1.0 {status}\r\nContent-Length: 5\r\n\r\n");
            assert_eq!(framing.feed(answer.as_bytes()), Ok(Fed::All));
            assert!(framing.is_between());
        }
        let mut underscored = responses(To::Any);
        let answer = "HTTP/1.1 200 OK\r\ncontent_length: 9\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(underscored.feed(answer.as_bytes()), Ok(Fed::All));
        assert!(underscored.is_between());
        let mut closing = responses(To::Any);
        assert_eq!(closing.feed(b"HTTP/1.1 100\r\n\r\nHTTP/1.0 200 \r\n\r\nuntil\nthe\0end"), Ok(Fed::All));
        let mut switched = responses(To::Any);
        assert_eq!(switched.feed(b"HTTP/1.1 101 Go\r\nUpgrade: x\r\n\r\n\0\n"), Ok(Fed::All));
    }

    #[test]
    fn a_second_answer_is_nobodys() {
        let one = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        let mut framing = responses(To::Any);
        let refused = framing.feed(format!("{one}HTTP/1.1 200 OK\r\n").as_bytes()).unwrap_err();
        assert_eq!((refused.why, refused.whole), (Why::Unasked, one.len()));
        let both = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(why(responses(To::Any), both), Some(Why::TwoLengths));
        assert_eq!(why(responses(To::Any), &"HTTP/1.1 102 x\r\n\r\n".repeat(65)), Some(Why::Informational));
        assert_eq!(why(responses(To::Any), "HTTP/1.1 0200 OK\r\n"), Some(Why::StartLine));
        assert_eq!(why(responses(To::Any), "HTTP/1.1 200 OK\n"), Some(Why::LineEnding));
    }

    #[test]
    fn a_length_in_another_spelling_is_one_too_many() {
        for bad in ["content_length", "content.length", "transfer_encoding"] {
            assert!(respelt(bad.as_bytes()).is_some(), "{bad}");
        }
        for good in ["content-length", "transfer-encoding", "content-type", "content_lengths", "traceparent"]
        {
            assert!(respelt(good.as_bytes()).is_none(), "{good}");
        }
    }

    /// A well-formed request and the length of its body's framing.
    fn request() -> impl Strategy<Value = Vec<u8>> {
        let token = "[a-zA-Z0-9!#$%&'*+.^_`|~-]{1,20}";
        let fields = prop::collection::vec((token, "[\t !-~\u{e9}]{0,40}"), 0..5);
        let body = prop_oneof![
            Just(None),
            (prop::collection::vec(any::<u8>(), 0..80)).prop_map(|body| Some((body, Vec::new()))),
            (Just(Vec::new()), prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 1..4))
                .prop_map(Some),
        ];
        let head = (token, "/[!-~]{0,30}", prop::bool::ANY, fields, body);
        head.prop_map(|(method, target, old, fields, body)| {
            let mut out = format!("{method} {target} HTTP/1.{}\r\nHoSt: a\r\n", u8::from(!old)).into_bytes();
            for (name, value) in fields {
                let known = ["host", "content-length", "transfer-encoding", "upgrade"];
                if !known.contains(&&*name.to_ascii_lowercase().replace('_', "-")) {
                    out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
                }
            }
            match body {
                Some((_, chunks)) if !chunks.is_empty() && !old => {
                    out.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                    for chunk in chunks {
                        out.extend_from_slice(format!("{:X};e\r\n", chunk.len()).as_bytes());
                        out.extend_from_slice(&chunk);
                        out.extend_from_slice(b"\r\n");
                    }
                    out.extend_from_slice(b"0\r\nx-sum: 1\r\n\r\n");
                }
                Some((body, _)) => {
                    out.extend_from_slice(format!("CONTENT-length:{}\r\n\r\n", body.len()).as_bytes());
                    out.extend_from_slice(&body);
                }
                None => out.extend_from_slice(b"\r\n"),
            }
            out
        })
    }

    /// Feeds pieces; how far all was well, and what was wrong then.
    fn fed(bytes: &[u8], cuts: &[usize]) -> (u64, Option<Why>, bool) {
        let mut framing = Framing::new(Side::Requests, HeadLimits { bytes: 10_000, fields: 100 });
        let mut at = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let cut = cut.clamp(at, bytes.len());
            match framing.feed(&bytes[at..cut]) {
                Ok(Fed::All) => at = cut,
                Ok(Fed::Until(_)) => return (framing.heads(), None, false),
                Err(malformed) => return (0, Some(malformed.why), false),
            }
        }
        (framing.heads(), None, framing.is_between())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn well_formed_messages_pass_however_they_are_cut(
            requests in prop::collection::vec(request(), 1..4),
            mut cuts in prop::collection::vec(0..2_000_usize, 0..8),
        ) {
            let bytes = requests.concat();
            cuts.sort_unstable();
            prop_assert_eq!(fed(&bytes, &cuts), (requests.len() as u64, None, true));
            let every: Vec<_> = (0..bytes.len()).collect();
            prop_assert_eq!(fed(&bytes, &every), (requests.len() as u64, None, true));
        }

        #[test]
        fn whatever_passes_is_read_alike_by_the_librarys_parser(
            request in request(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(&b"\r\n\t :;,\0\x0b0aA_/"[..])), 0..3),
            mut cuts in prop::collection::vec(0..500_usize, 0..4),
        ) {
            let mut bytes = request;
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            cuts.sort_unstable();
            let whole = fed(&bytes, &[]);
            // What is wrong does not depend on the cuts.
            prop_assert_eq!(fed(&bytes, &cuts), whole);
            let every: Vec<_> = (0..bytes.len()).collect();
            prop_assert_eq!(fed(&bytes, &every), whole);
            if let (1, None, true) = whole {
                let mut fields = [httparse::EMPTY_HEADER; 100];
                let mut parsed = httparse::Request::new(&mut fields);
                // A target that is no URI is the library's to refuse.
                if let Ok(parsing) = parsed.parse(&bytes) {
                    let end = parsing.unwrap();
                    let value = |name: &str| {
                        let mut of = parsed.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
                        let first = of.next().map(|h| std::str::from_utf8(h.value).unwrap().trim().to_owned());
                        assert!(of.next().is_none());
                        first
                    };
                    match (value("content-length"), value("transfer-encoding")) {
                        (Some(length), None) => prop_assert_eq!(length.parse::<usize>().unwrap(), bytes.len() - end),
                        (None, Some(coding)) => prop_assert!(coding.eq_ignore_ascii_case("chunked")),
                        (None, None) => prop_assert_eq!(end, bytes.len()),
                        (Some(_), Some(_)) => prop_assert!(false, "two framings"),
                    }
                }
            }
        }

        #[test]
        fn bytes_are_found_where_they_are(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let want = bytes.iter().position(|&b| b < b' ' || b == 0x7f).unwrap_or(bytes.len());
            prop_assert_eq!(first_below::<b' '>(&bytes), want);
        }
    }
}
