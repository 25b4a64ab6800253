//! The loads: what an app's client does to a pair of sidecars.
//!
//! Why three: saturated keep-alive HTTP/1.1 and multiplexed HTTP/2 say what a request costs when work
//! comes in batches; 1,000 requests a second says what it costs in real life, where a proxy mostly sleeps
//! and each request wakes it (4 to 7 times as much). The first two are other people's programs (`wrk`,
//! `h2load`), so that nobody need trust ours. The third is ours, because `wrk` has no rates and `h2load`
//! sends a second's requests of a client in bursts.
//!
//! Coordinated omission: an answer that is late delays the next request of its connection. Its wait
//! from the moment it *should* have left is therefore part of its latency; waking up late with an idle
//! connection is the generator's own fault and is not.

use std::{
    fmt, fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::net::{Group, HTTP1_PORT, HTTP2_PORT, Namespace};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Load {
    Http1,
    Http2,
    Rate1000,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Load::Http1 => "HTTP/1.1, wrk -t1 -c64",
            Load::Http2 => "HTTP/2, h2load -c8 -m16",
            Load::Rate1000 => "HTTP/1.1, 1,000 requests/s in open loop",
        })
    }
}

/// What a load generator saw.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Answers with a status of 2xx.
    pub(crate) requests: u64,
    /// Everything else: other statuses, broken and silent connections, requests never sent in time.
    pub(crate) errors: u64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

impl Load {
    /// Runs it from a namespace against `host` for so long.
    pub(crate) async fn run(
        self,
        from: &Namespace,
        host: impl fmt::Display,
        time: Duration,
        scratch: &Path,
    ) -> Result<Seen> {
        let seconds = time.as_secs_f64();
        match self {
            Load::Http1 => {
                let script = scratch.join("report.lua");
                fs::write(&script, WRK_REPORT)?;
                // wrk takes whole seconds only.
                let mut wrk = from.command("wrk", Group::App);
                wrk.args(["-t1", "-c64", "-d", &format!("{}s", seconds.ceil()), "-s"]).arg(&script);
                parse_wrk(&output(wrk.arg(format!("http://{host}:{HTTP1_PORT}/"))).await?)
            }
            Load::Http2 => {
                let log = scratch.join("h2load.log");
                // Its log is appended to.
                if log.exists() {
                    fs::remove_file(&log)?;
                }
                let mut h2load = from.command("h2load", Group::App);
                h2load.args(["-t1", "-c8", "-m16", "-D", &format!("{}ms", time.as_millis())]);
                h2load.arg(format!("--log-file={}", log.display()));
                let printed = output(h2load.arg(format!("http://{host}:{HTTP2_PORT}/"))).await?;
                let seen = parse_h2load(&printed, &fs::read_to_string(&log)?);
                fs::remove_file(&log)?;
                seen
            }
            Load::Rate1000 => {
                let mut own = from.command(std::env::current_exe()?, Group::App);
                own.args(["open-loop", "--rate", "1000", "--connections", "10", "--to"]);
                own.args([format!("{host}:{HTTP1_PORT}"), "--seconds".to_owned(), seconds.to_string()]);
                Ok(serde_json::from_str(&output(&mut own).await?)?)
            }
        }
    }
}

/// A namespaced command's output; the command dies with the future.
pub(crate) async fn output(command: &mut std::process::Command) -> Result<String> {
    let program = command.get_args().nth(9).map_or_else(String::new, |a| a.to_string_lossy().into_owned());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command =
        tokio::process::Command::from(std::mem::replace(command, std::process::Command::new("true")));
    let done = command.kill_on_drop(true).output().await.with_context(|| format!("cannot run {program}"))?;
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    if !done.status.success() {
        bail!("{program} ({}): {}{}", done.status, out.trim(), err.trim());
    }
    Ok(out.into_owned())
}

/// wrk rounds what it prints; its script interface does not.
const WRK_REPORT: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("FIGURES %d %d %d %f %f\n", summary.requests,
    e.connect + e.read + e.write + e.status + e.timeout, summary.duration,
    latency:percentile(50), latency:percentile(99)))
end
"#;

fn parse_wrk(text: &str) -> Result<Seen> {
    let figures = text.lines().find_map(|line| line.strip_prefix("FIGURES "));
    let figures: Option<Vec<f64>> = figures.and_then(|f| f.split(' ').map(|n| n.parse().ok()).collect());
    let Some(&[requests, errors, duration_us, p50_us, p99_us]) = figures.as_deref() else {
        bail!("wrk printed no figures: {text}");
    };
    let (requests, errors) = (requests as u64, errors as u64);
    Ok(Seen { requests: requests.saturating_sub(errors), errors, seconds: duration_us / 1e6, p50_us, p99_us })
}

/// h2load's own summary has no percentiles; its log has every request: start, status, microseconds.
fn parse_h2load(text: &str, log: &str) -> Result<Seen> {
    let number_before = |word: &str| -> Option<f64> {
        let line = text.lines().find(|line| line.starts_with("requests:"))?;
        let part = line.trim_start_matches("requests:").split(',').find(|part| part.ends_with(word))?;
        part.split_whitespace().next()?.parse().ok()
    };
    let finished = text.lines().find_map(|line| line.strip_prefix("finished in "));
    let seconds = finished.and_then(|line| duration(line.split(',').next()?));
    let (Some(succeeded), Some(failed), Some(seconds)) =
        (number_before("succeeded"), number_before("failed"), seconds)
    else {
        bail!("h2load printed no summary: {text}");
    };
    let mut latencies = Histogram::<u64>::new(3)?;
    for line in log.lines() {
        let mut columns = line.split('\t').skip(1);
        if let (Some("200"), Some(Ok(micros))) = (columns.next(), columns.next().map(str::parse)) {
            latencies.record(micros)?;
        }
    }
    let (requests, errors) = (succeeded as u64, failed as u64);
    let (p50_us, p99_us) = quantiles(&latencies);
    Ok(Seen { requests, errors, seconds, p50_us, p99_us })
}

/// `1.50s`, `400.12ms`, `12us`.
fn duration(text: &str) -> Option<f64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let factor = match &text[unit..] {
        "s" => 1.0,
        "ms" => 1e-3,
        "us" => 1e-6,
        _ => return None,
    };
    Some(text[..unit].parse::<f64>().ok()? * factor)
}

fn quantiles(latencies: &Histogram<u64>) -> (f64, f64) {
    (latencies.value_at_quantile(0.50) as f64, latencies.value_at_quantile(0.99) as f64)
}

/// A fixed rate over some connections, each a thread that sends at its own evenly spaced moments.
#[derive(clap::Args)]
pub(crate) struct OpenLoop {
    #[arg(long)]
    to: SocketAddr,
    /// Requests a second over all connections.
    #[arg(long)]
    rate: u32,
    #[arg(long)]
    connections: u32,
    #[arg(long)]
    seconds: f64,
}

impl OpenLoop {
    pub(crate) fn run(&self) -> Result<()> {
        let started = Instant::now();
        // Every connection stands before the first request leaves.
        let start = started + Duration::from_millis(50);
        let threads: Vec<_> = (0..self.connections)
            .map(|k| {
                let schedule = Schedule {
                    first: start + Duration::from_secs_f64(f64::from(k) / f64::from(self.rate)),
                    interval: Duration::from_secs_f64(f64::from(self.connections) / f64::from(self.rate)),
                    count: (self.seconds * f64::from(self.rate) / f64::from(self.connections)) as u32,
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
        let (p50_us, p99_us) = quantiles(&latencies);
        let seen = Seen { requests, errors, seconds: start.elapsed().as_secs_f64(), p50_us, p99_us };
        println!("{}", serde_json::to_string(&seen)?);
        Ok(())
    }
}

/// When one connection sends.
struct Schedule {
    first: Instant,
    interval: Duration,
    count: u32,
}

impl Schedule {
    /// Sends it all; latencies in microseconds, and how many requests failed.
    fn run(&self, to: SocketAddr) -> Result<(Histogram<u64>, u64)> {
        let mut connection = Some(Connection::open(to)?);
        let mut latencies = Histogram::new(3)?;
        let mut errors = 0;
        let mut free = Instant::now();
        for n in 0..self.count {
            let due = self.first + self.interval * n;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let from = if free > due { due } else { Instant::now() };
            let answer = match &mut connection {
                Some(open) => open.get("/"),
                None => Connection::open(to).and_then(|new| connection.insert(new).get("/")),
            };
            free = Instant::now();
            match answer {
                Ok(200) => latencies.record(u64::try_from(free.duration_since(from).as_micros())?)?,
                Ok(_) => errors += 1,
                Err(_) => {
                    errors += 1;
                    connection = None;
                }
            }
        }
        Ok((latencies, errors))
    }
}

/// Asks until somebody answers: how a pair is known to be up from end to end.
#[derive(clap::Args)]
pub(crate) struct Probe {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value = "/")]
    path: String,
    #[arg(long, default_value_t = 15.0)]
    seconds: f64,
}

impl Probe {
    pub(crate) fn run(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = Connection::open(self.to).and_then(|mut connection| connection.get(&self.path));
            match answer {
                Ok(200) => break,
                answer if started.elapsed().as_secs_f64() > self.seconds => {
                    bail!("no answer from {} in {} s; the last try: {answer:?}", self.to, self.seconds);
                }
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
        println!("{:.1}", started.elapsed().as_secs_f64() * 1e3);
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
    fn wrk_is_read() {
        let seen = parse_wrk("Running\nFIGURES 1000 3 2000000 812.5 4100\n").unwrap();
        assert_eq!((seen.requests, seen.errors, seen.seconds), (997, 3, 2.0));
        assert!(parse_wrk("unable to connect").is_err());
    }

    #[test]
    fn h2load_is_read() {
        let text = "finished in 1.50s, 2.00 req/s, 1.0KB/s\n\
            requests: 5 total, 5 started, 3 done, 3 succeeded, 2 failed, 1 errored, 1 timeout\n";
        let seen = parse_h2load(text, "1\t200\t100\n2\t200\t300\n3\t-1\t9000\n").unwrap();
        assert_eq!((seen.requests, seen.errors, seen.seconds, seen.p50_us), (3, 2, 1.5, 100.0));
    }

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
        let schedule = Schedule { first: Instant::now(), interval: Duration::from_millis(10), count: 20 };
        let (latencies, errors) = schedule.run(to).unwrap();
        server.join().unwrap();
        assert_eq!((latencies.len(), errors), (20, 0));
        // Requests 0 to 4 were due in the first half of the stall: each waited at least 50 ms.
        assert!(latencies.value_at_quantile(0.80) >= 50_000, "{}", latencies.value_at_quantile(0.80));
    }
}
