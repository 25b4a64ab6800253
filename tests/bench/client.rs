//! Our own clients, each started inside a namespace: a fixed rate, connections that come and go, connections that idle.
//!
//! Why our own: `wrk` has no rates, `h2load` sends a second's requests of a client in bursts, and neither holds ten
//! thousand idle connections or opens five hundred a second, no more and no less.
//!
//! Coordinated omission: an answer that is late delays the next request of its connection. Its wait
//! from the moment it *should* have left is therefore part of its latency; waking up late with an idle
//! connection is the generator's own fault and is not.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail};
use hdrhistogram::Histogram;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::load::Seen;

/// A fixed rate over some connections, each a thread that sends at its own evenly spaced moments.
#[derive(clap::Args)]
pub(crate) struct OpenLoop {
    #[arg(long)]
    to: SocketAddr,
    /// Requests a second over all connections; without it each sends as soon as it has its answer.
    #[arg(long)]
    rate: Option<u32>,
    #[arg(long)]
    connections: u32,
    #[arg(long)]
    seconds: f64,
    /// A connection for each request.
    #[arg(long)]
    fresh: bool,
}

impl OpenLoop {
    pub(crate) fn run(&self) -> Result<()> {
        let started = Instant::now();
        // Every connection stands before the first request leaves.
        let start = started + Duration::from_millis(50);
        let threads: Vec<_> = (0..self.connections)
            .map(|k| {
                let apart = self.rate.map(|rate| Duration::from_secs_f64(1.0 / f64::from(rate)));
                let schedule = Schedule {
                    first: start + apart.unwrap_or_default() * k,
                    interval: apart.map(|apart| apart * self.connections),
                    until: start + Duration::from_secs_f64(self.seconds),
                    fresh: self.fresh,
                };
                let to = self.to;
                thread::spawn(move || schedule.run(to))
            })
            .collect();
        let mut latencies = Histogram::<u64>::new(3)?;
        let (mut requests, mut errors) = (0, 0);
        for thread in threads {
            let (of_thread, failed) = thread.join().map_err(|_| anyhow!("a connection's thread died"))??;
            requests += of_thread.len();
            errors += failed;
            latencies.add(of_thread)?;
        }
        let seen = Seen::new(requests, errors, start.elapsed().as_secs_f64(), &latencies);
        println!("{}", serde_json::to_string(&seen)?);
        Ok(())
    }
}

/// When one connection sends.
struct Schedule {
    first: Instant,
    /// From one request to the next; none: at once.
    interval: Option<Duration>,
    until: Instant,
    fresh: bool,
}

impl Schedule {
    /// Sends it all; latencies in microseconds, and how many requests failed.
    fn run(&self, to: SocketAddr) -> Result<(Histogram<u64>, u64)> {
        let mut connection = if self.fresh { None } else { Some(Connection::open(to)?) };
        let mut latencies = Histogram::new(3)?;
        let mut errors = 0;
        let mut free = Instant::now();
        for n in 0.. {
            let due = self.interval.map_or(free.max(self.first), |interval| self.first + interval * n);
            if due >= self.until {
                break;
            }
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let from = if free > due { due } else { Instant::now() };
            let answer = match &mut connection {
                Some(open) => open.get("/"),
                None => Connection::open(to).and_then(|new| connection.insert(new).get("/")),
            };
            free = Instant::now();
            let failed = match answer {
                Ok(200) => {
                    latencies.record(u64::try_from(free.duration_since(from).as_micros())?)?;
                    false
                }
                Ok(_) => {
                    errors += 1;
                    false
                }
                Err(_) => {
                    errors += 1;
                    true
                }
            };
            if failed || self.fresh {
                connection = None;
            }
        }
        Ok((latencies, errors))
    }
}

/// Connections that have each had one answer and then rest, until this is killed.
#[derive(clap::Args)]
pub(crate) struct Idle {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    connections: usize,
}

impl Idle {
    /// Says so on standard output once they all rest.
    pub(crate) fn run(&self) -> Result<()> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let (to, each) = (self.to, self.connections.div_ceil(OPENING_AT_ONCE));
        let open = move || -> Result<Vec<Connection>> {
            let one = |_| {
                let mut connection = Connection::open(to)?;
                match connection.get("/")? {
                    200 => Ok(connection),
                    status => bail!("status {status}"),
                }
            };
            (0..each).map(one).collect()
        };
        let threads: Vec<_> = (0..OPENING_AT_ONCE).map(|_| thread::spawn(open)).collect();
        let mut held = Vec::new();
        for thread in threads {
            held.extend(thread.join().map_err(|_| anyhow!("a thread died"))??);
        }
        println!("{}", held.len());
        loop {
            thread::park();
        }
    }
}

const OPENING_AT_ONCE: usize = 20;

/// Asks until somebody answers: how a pair is known to be up from end to end.
#[derive(clap::Args)]
pub(crate) struct Probe {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value = "/")]
    path: String,
    #[arg(long, default_value_t = 15.0)]
    seconds: f64,
    #[arg(long, default_value_t = 200)]
    status: u16,
}

impl Probe {
    pub(crate) fn run(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = Connection::open(self.to).and_then(|mut connection| connection.get(&self.path));
            match answer {
                Ok(status) if status == self.status => break,
                answer if started.elapsed().as_secs_f64() > self.seconds => {
                    bail!("no answer from {} in {} s; the last try: {answer:?}", self.to, self.seconds);
                }
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
        // What o'clock: who started the pair did so in another process.
        println!("{:.6}", SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64());
        Ok(())
    }
}

/// A keep-alive connection that knows just enough HTTP/1.1 for our own backend.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    fn open(to: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Connection { stream, buffer: vec![0; 16 << 10] })
    }

    /// One request; the status of the answer, once it is here whole.
    fn get(&mut self, path: &str) -> Result<u16> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: backend\r\n\r\n");
        self.stream.write_all(request.as_bytes())?;
        let mut filled = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[filled..])?;
            if read == 0 {
                bail!("closed within an answer");
            }
            filled += read;
            if let Some((status, length)) = parse_answer(&self.buffer[..filled])? {
                if filled == length {
                    return Ok(status);
                }
                if filled > length || filled == self.buffer.len() {
                    bail!("more bytes than the answer has");
                }
            }
        }
    }
}

/// Status and length of an answer whose head is complete.
fn parse_answer(bytes: &[u8]) -> Result<Option<(u16, usize)>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status")?.parse()?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Ok(0), |(_, value)| value.trim().parse::<usize>())?;
    Ok(Some((status, end + 4 + length)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_late_answer_is_charged_to_those_that_had_to_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1024];
            for n in 0..20 {
                assert!(stream.read(&mut buffer).unwrap() > 0);
                if n == 0 {
                    thread::sleep(Duration::from_millis(100));
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").unwrap();
            }
        });
        let (first, interval) = (Instant::now(), Duration::from_millis(10));
        let until = first + interval * 20;
        let schedule = Schedule { first, interval: Some(interval), until, fresh: false };
        let (latencies, errors) = schedule.run(to).unwrap();
        server.join().unwrap();
        assert_eq!((latencies.len(), errors), (20, 0));
        // Requests 0 to 4 were due in the first half of the stall: each waited at least 50 ms.
        assert!(latencies.value_at_quantile(0.80) >= 50_000, "{}", latencies.value_at_quantile(0.80));
    }
}
