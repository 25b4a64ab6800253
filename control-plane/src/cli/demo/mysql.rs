//! The least of MariaDB's protocol that a shop needs: log in, ask, read rows.
//!
//! Why by hand: the demo's point is a database whose *server* speaks first, on a connection that a sidecar knows
//! nothing of. A driver crate for two statements would be the largest dependency of the whole command.

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufStream},
    net::{TcpStream, ToSocketAddrs},
};

/// A session. After an error it is of no more use.
pub(super) struct Session {
    stream: BufStream<TcpStream>,
}

/// A row's fields; `None` is NULL.
pub(super) type Row = Vec<Option<String>>;

impl Session {
    /// Connects as a user without password.
    pub(super) async fn open(address: impl ToSocketAddrs, user: &str, database: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let mut session = Self { stream: BufStream::new(stream) };
        // The server speaks first.
        let (_, greeting) = session.receive().await.context("waiting for the server's greeting")?;
        ensure!(greeting.first() == Some(&10), "not a MariaDB greeting: {}", error_text(&greeting));
        let mut login = Vec::new();
        login.extend(CAPABILITIES.to_le_bytes());
        login.extend((16_u32 << 20).to_le_bytes());
        login.push(UTF8MB4);
        login.extend([0; 23]);
        login.extend(user.as_bytes());
        // End of the name, and a password of no bytes.
        login.extend([0, 0]);
        login.extend(database.as_bytes());
        login.push(0);
        login.extend(b"mysql_native_password\0");
        session.send(1, &login).await?;
        let (number, answer) = session.receive().await.context("logging in")?;
        match answer.first() {
            Some(0) => Ok(session),
            // "Use this plugin instead": the answer for no password is the same with all of them.
            Some(0xfe) => {
                session.send(number.wrapping_add(1), &[]).await?;
                let (_, answer) = session.receive().await?;
                ensure!(answer.first() == Some(&0), "login refused: {}", error_text(&answer));
                Ok(session)
            }
            _ => bail!("login refused: {}", error_text(&answer)),
        }
    }

    /// Runs one statement; what returns no rows returns none.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        let mut command = vec![COM_QUERY];
        command.extend(sql.as_bytes());
        self.send(0, &command).await?;
        let (_, answer) = self.receive().await?;
        match answer.first() {
            Some(0) => return Ok(Vec::new()),
            Some(0xff) | None => bail!("{}", error_text(&answer)),
            Some(_) => {}
        }
        let columns = Reader(&answer).length()?.context("no number of columns")?;
        ensure!(columns <= 256, "too many columns");
        for _ in 0..columns {
            self.receive().await?;
        }
        let (_, end) = self.receive().await?;
        ensure!(is_end(&end), "column definitions without an end");
        let mut rows = Vec::new();
        loop {
            let (_, packet) = self.receive().await?;
            if is_end(&packet) {
                return Ok(rows);
            }
            ensure!(packet.first() != Some(&0xff), "{}", error_text(&packet));
            ensure!(rows.len() < 10_000, "too many rows");
            let mut reader = Reader(&packet);
            rows.push((0..columns).map(|_| reader.text()).collect::<Result<Row>>()?);
        }
    }

    async fn send(&mut self, number: u8, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len()).ok().filter(|n| *n < MAX_PACKET).context("too long")?;
        self.stream.write_all(&length.to_le_bytes()[..3]).await?;
        self.stream.write_all(&[number]).await?;
        self.stream.write_all(payload).await?;
        self.stream.flush().await?;
        Ok(())
    }

    async fn receive(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).await?;
        let [a, b, c, number] = head;
        let length = u32::from_le_bytes([a, b, c, 0]);
        ensure!(length < MAX_PACKET, "a packet of {length} bytes");
        let mut payload = vec![0; usize::try_from(length)?];
        self.stream.read_exact(&mut payload).await?;
        Ok((number, payload))
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    /// A length-encoded number; `None` is NULL.
    fn length(&mut self) -> Result<Option<u64>> {
        let (&first, rest) = self.0.split_first().context("a packet ends early")?;
        let bytes = match first {
            0..=250 => {
                self.0 = rest;
                return Ok(Some(first.into()));
            }
            251 => {
                self.0 = rest;
                return Ok(None);
            }
            252 => 2,
            253 => 3,
            254 => 8,
            255 => bail!("not a length"),
        };
        ensure!(rest.len() >= bytes, "a packet ends early");
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(&rest[..bytes]);
        self.0 = &rest[bytes..];
        Ok(Some(u64::from_le_bytes(number)))
    }

    fn text(&mut self) -> Result<Option<String>> {
        let Some(length) = self.length()? else { return Ok(None) };
        let length = usize::try_from(length)?;
        ensure!(self.0.len() >= length, "a packet ends early");
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        Ok(Some(String::from_utf8_lossy(text).into_owned()))
    }
}

fn is_end(packet: &[u8]) -> bool {
    packet.first() == Some(&0xfe) && packet.len() < 9
}

/// `0xff`, a code, `#` and five letters of SQL state, then the text.
fn error_text(packet: &[u8]) -> String {
    if packet.first() != Some(&0xff) {
        return "an answer that makes no sense".to_owned();
    }
    let text = packet.get(3..).unwrap_or_default();
    let text = if text.first() == Some(&b'#') { text.get(6..).unwrap_or_default() } else { text };
    String::from_utf8_lossy(text).into_owned()
}

const COM_QUERY: u8 = 3;
const UTF8MB4: u8 = 45;
const MAX_PACKET: u32 = 0xff_ffff;
/// LONG_PASSWORD, CONNECT_WITH_DB, PROTOCOL_41, TRANSACTIONS, SECURE_CONNECTION, PLUGIN_AUTH.
const CAPABILITIES: u32 = 0x1 | 0x8 | 0x200 | 0x2000 | 0x8000 | 0x8_0000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_by_their_length_and_a_broken_length_is_an_error() {
        let mut reader = Reader(&[3, b'a', b'b', b'c', 251, 252, 2, 0, b'x', b'y', 0]);
        assert_eq!(reader.text().unwrap().as_deref(), Some("abc"));
        assert_eq!(reader.text().unwrap(), None);
        assert_eq!(reader.text().unwrap().as_deref(), Some("xy"));
        assert_eq!(reader.text().unwrap().as_deref(), Some(""));
        assert!(reader.text().is_err());
        for bad in [&[5, b'a'][..], &[252, 1], &[255], &[254, 255, 255, 255, 255, 255, 255, 255, 255]] {
            assert!(Reader(bad).text().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn errors_are_readable() {
        assert_eq!(error_text(b"\xff\x15\x04#28000Access denied"), "Access denied");
        assert_eq!(error_text(b"\xff\x15\x04Host blocked"), "Host blocked");
        assert_eq!(error_text(b""), "an answer that makes no sense");
    }
}
