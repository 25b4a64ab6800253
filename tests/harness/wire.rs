//! Clients and servers that say exactly what a test wants: bytes, not requests.
//!
//! Why not an HTTP library: what a behaviour is about (a pipelined second request, a body that is held back, an answer
//! before its request has ended, a close at the moment of reuse) is what libraries take out of their users' hands.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use weft_control_plane::cli::demo::netns::Pod;

/// How long either side waits for the other before the test has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// One end of a connection.
pub struct Wire {
    stream: TcpStream,
    /// Read and not yet asked for.
    buffer: Vec<u8>,
}

/// A message as it was on the wire.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// Start line and headers, without the empty line.
    pub head: String,
    /// Without its framing.
    pub body: Vec<u8>,
    /// Of a chunked body: what came after the last chunk.
    pub trailers: String,
}

impl Message {
    /// An answer's status.
    pub fn status(&self) -> u16 {
        self.head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// The values of a header, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
    }

    /// The value of a header that stands once.
    pub fn header(&self, name: &str) -> Option<&str> {
        match self.all(name)[..] {
            [one] => Some(one),
            _ => None,
        }
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Wire {
    /// Connects from a pod, as its app would.
    pub fn dial(pod: &Pod, address: &str) -> Result<Self> {
        let address: SocketAddr = address.parse().with_context(|| address.to_owned())?;
        Self::over(pod.enter(|| TcpStream::connect_timeout(&address, PATIENCE))??)
    }

    fn over(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Writes bytes as they are.
    pub fn say(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        self.stream.write_all(bytes.as_ref()).context("writing")
    }

    /// Ends the writing half.
    pub fn finish(&self) -> Result<()> {
        self.stream.shutdown(Shutdown::Write).context("half-closing")
    }

    /// Ends the connection with a reset.
    pub fn reset(self) -> Result<()> {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).context("SO_LINGER")
    }

    /// A head, up to its empty line.
    pub fn head(&mut self) -> Result<String> {
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at;
            }
            if self.fill()? == 0 {
                bail!("ended in a head: {:?}", String::from_utf8_lossy(&self.buffer));
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 4);
        Ok(head)
    }

    /// Exactly so many bytes.
    pub fn exactly(&mut self, n: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < n {
            if self.fill()? == 0 {
                bail!("ended after {} of {n} bytes", self.buffer.len());
            }
        }
        Ok(self.buffer.drain(..n).collect())
    }

    /// Everything up to these words, and they.
    pub fn until(&mut self, words: &str) -> Result<Vec<u8>> {
        loop {
            if let Some(at) = find(&self.buffer, words.as_bytes()) {
                return Ok(self.buffer.drain(..at + words.len()).collect());
            }
            if self.fill()? == 0 {
                bail!("ended before {words:?}: {:?}", String::from_utf8_lossy(&self.buffer));
            }
        }
    }

    /// A request, or an answer to one that was not HEAD, with its body.
    pub fn message(&mut self) -> Result<Message> {
        let mut message = Message { head: self.head()?, ..Message::default() };
        self.body_of(&mut message)?;
        Ok(message)
    }

    /// The body that a head announces.
    pub fn body_of(&mut self, message: &mut Message) -> Result<()> {
        let answer = message.head.starts_with("HTTP/");
        let none = answer && matches!(message.status(), 100..200 | 204 | 304);
        if none {
        } else if message.all("transfer-encoding").iter().any(|coding| coding.ends_with("chunked")) {
            loop {
                let line = self.line()?;
                let size = line.split(';').next().unwrap_or_default().trim();
                let size =
                    usize::from_str_radix(size, 16).with_context(|| format!("a chunk's size: {line:?}"))?;
                if size == 0 {
                    break;
                }
                message.body.extend(self.exactly(size)?);
                self.line()?;
            }
            loop {
                let line = self.line()?;
                if line.is_empty() {
                    break;
                }
                message.trailers.push_str(&line);
                message.trailers.push('\n');
            }
        } else if let Some(length) = message.header("content-length") {
            message.body = self.exactly(length.parse().context("a length")?)?;
        } else if answer {
            message.body = self.rest()?;
        }
        Ok(())
    }

    /// Sends a request and reads its answer.
    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> Result<Message> {
        self.say(request)?;
        self.message()
    }

    fn line(&mut self) -> Result<String> {
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n") {
                break at;
            }
            if self.fill()? == 0 {
                bail!("ended in a line");
            }
        };
        let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 2);
        Ok(line)
    }

    /// Everything until the other side ends its half.
    pub fn rest(&mut self) -> Result<Vec<u8>> {
        while self.fill()? > 0 {}
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Waits until the other side has gone, be it by an end or by a reset; what it said before.
    pub fn gone(&mut self) -> Result<Vec<u8>> {
        loop {
            match self.fill() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if is_timeout(&error) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Whether nothing comes for so long: no byte and no end.
    pub fn is_silent_for(&mut self, time: Duration) -> Result<bool> {
        if !self.buffer.is_empty() {
            return Ok(false);
        }
        self.stream.set_read_timeout(Some(time))?;
        let read = self.fill();
        self.stream.set_read_timeout(Some(PATIENCE))?;
        match read {
            Ok(_) => Ok(false),
            Err(error) if is_timeout(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn fill(&mut self) -> Result<usize> {
        let mut piece = [0; 64 * 1024];
        let n = loop {
            match self.stream.read(&mut piece) {
                // A socket with a time limit is not read on by itself after a signal.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                read => break read.context("reading")?,
            }
        };
        self.buffer.extend_from_slice(&piece[..n]);
        Ok(n)
    }
}

fn is_timeout(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| {
        matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
    })
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// A server in a pod that treats each connection as a script says, on a thread of its own.
pub struct Backend {
    listener: Arc<TcpListener>,
}

impl Backend {
    /// Listens on both families, as most servers do. `script` gets each connection and its number, from 0; an error
    /// that it returns ends the connection.
    pub fn start(
        pod: &Pod,
        port: u16,
        script: impl Fn(Wire, usize) -> Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = Arc::new(pod.enter(|| TcpListener::bind(("::", port)))??);
        let accepting = listener.clone();
        let script = Arc::new(script);
        std::thread::spawn(move || {
            for number in 0.. {
                let Ok((stream, _)) = accepting.accept() else { return };
                let script = script.clone();
                std::thread::spawn(move || {
                    let ended = Wire::over(stream).and_then(|wire| script(wire, number));
                    if let Err(error) = ended {
                        // Shown only if the test fails.
                        println!("backend: connection {number}: {error:#}");
                    }
                });
            }
        });
        Ok(Self { listener })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Wakes the thread that accepts; a listener that is gone already needs no waking.
        let _ = socket2::SockRef::from(&*self.listener).shutdown(Shutdown::Both);
    }
}

/// Answers requests on one connection until it ends, each as `answer` says.
pub fn answer_all(wire: &mut Wire, mut answer: impl FnMut(&Message) -> String) -> Result<()> {
    while let Ok(request) = wire.message() {
        let answer = answer(&request);
        wire.say(answer)?;
    }
    Ok(())
}

/// An answer with a text.
pub fn ok(text: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len())
}

/// Repeats `ask` until it says so, for at most so long.
pub fn within(patience: Duration, mut ask: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if ask() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
