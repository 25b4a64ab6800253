//! The loads: what an app's client does to a pair of sidecars.
//!
//! Why so many: a saturated proxy and one that mostly sleeps are different programs. Keep-alive HTTP/1.1 and
//! multiplexed HTTP/2 say what a request costs when work comes in batches; 1,000 requests a second say what it costs in
//! real life, where each request wakes the proxy (4 to 7 times as much). Bodies and streams of bytes say what a byte
//! costs, new connections what a handshake does, idle ones what memory is held for nothing.
//!
//! Where others have a program it is theirs (`wrk`, `h2load`, `iperf3`), so that nobody need trust ours (client.rs).

use std::{fmt, fs, path::Path, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::{
    net::{Group, HTTP1_PORT, HTTP2_PORT, Namespace, OPAQUE_PORT, RESUMED_PORT, STREAM_PORT},
    peers::{GRPC_PATH, LARGE, LARGE_PATH, Peer},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Load {
    Http1,
    Http2,
    Rate1000,
    Rate3000,
    #[value(name = "http1x1")]
    Http1x1,
    #[value(name = "http1x16")]
    Http1x16,
    Grpc,
    Post,
    Large,
    Up,
    Down,
    Connect,
    Handshake,
    Resume,
    Idle1000,
    Idle10000,
    #[value(name = "tls1000")]
    Tls1000,
    Handshakes,
    Rules,
}

/// What its figures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of a request, at whatever rate goes through.
    Saturated,
    /// Of a request at a given rate: here latency means something.
    Paced,
    /// Of a byte.
    Bulk,
    /// Of a connection that is opened, used once and closed.
    Opened,
    /// Of a connection that rests.
    Resting { connections: usize },
}

impl Load {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Load::Http1 | Load::Http1x1 | Load::Http1x16 | Load::Http2 | Load::Grpc | Load::Post => {
                Kind::Saturated
            }
            Load::Rate1000 | Load::Rate3000 | Load::Handshakes | Load::Rules => Kind::Paced,
            Load::Large | Load::Up | Load::Down => Kind::Bulk,
            Load::Connect | Load::Handshake | Load::Resume => Kind::Opened,
            Load::Idle1000 | Load::Tls1000 => Kind::Resting { connections: 1_000 },
            Load::Idle10000 => Kind::Resting { connections: 10_000 },
        }
    }

    /// In how many of a run's rounds: what decides whether a run counts in all, what is dear in one.
    pub(crate) fn rounds(self, all: u32) -> u32 {
        match self {
            Load::Http1 | Load::Http2 | Load::Rate1000 => all,
            Load::Rate3000
            | Load::Http1x1
            | Load::Http1x16
            | Load::Grpc
            | Load::Post
            | Load::Large
            | Load::Up
            | Load::Down => all.div_ceil(2),
            Load::Connect
            | Load::Handshake
            | Load::Resume
            | Load::Idle1000
            | Load::Idle10000
            | Load::Tls1000
            | Load::Handshakes
            | Load::Rules => 1,
        }
    }

    /// Why a pair is not measured under it.
    pub(crate) fn cannot(self, pair: Peer) -> Option<&'static str> {
        match (self, pair) {
            (Load::Idle1000 | Load::Idle10000 | Load::Tls1000, Peer::Direct) => Some("no proxy holds them"),
            (Load::Resume, Peer::Direct) => Some("no TLS"),
            (Load::Resume, Peer::Weft) => {
                Some("sidecars resume no session, as resumption skips verification")
            }
            (Load::Resume, Peer::Relay) => Some("resumes no session"),
            (Load::Http2 | Load::Grpc, Peer::Nginx) => {
                Some("it knows HTTP/2 to servers with one stream a connection")
            }
            (Load::Handshakes, Peer::Direct) => Some("no TLS"),
            (Load::Rules, peer) if peer != Peer::Weft => {
                Some("its configuration does not change while it runs")
            }
            _ => None,
        }
    }

    /// Whether callers' connections are what the proxies know as HTTP, so that only the caller's side has them without TLS.
    pub(crate) fn is_plain(self) -> bool {
        self.port() == HTTP1_PORT
    }

    fn port(self) -> u16 {
        match self {
            Load::Http2 | Load::Grpc => HTTP2_PORT,
            Load::Up | Load::Down => STREAM_PORT,
            Load::Handshake | Load::Tls1000 => OPAQUE_PORT,
            Load::Resume => RESUMED_PORT,
            Load::Http1
            | Load::Rate1000
            | Load::Rate3000
            | Load::Http1x1
            | Load::Http1x16
            | Load::Post
            | Load::Large
            | Load::Connect
            | Load::Idle1000
            | Load::Idle10000
            | Load::Handshakes
            | Load::Rules => HTTP1_PORT,
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Load::Http1 => "HTTP/1.1, wrk -t1 -c64",
            Load::Http2 => "HTTP/2, h2load -c8 -m16",
            Load::Rate1000 => "HTTP/1.1, 1,000 requests/s in open loop",
            Load::Rate3000 => "HTTP/1.1, 3,000 requests/s in open loop",
            Load::Http1x1 => "HTTP/1.1, wrk -t1 -c1",
            Load::Http1x16 => "HTTP/1.1, wrk -t1 -c16",
            Load::Grpc => "gRPC's form, h2load -c8 -m16",
            Load::Post => "POST 10 KB, wrk -t1 -c16",
            Load::Large => "responses of 1 MiB, wrk -t1 -c4",
            Load::Up => "TCP stream up, iperf3",
            Load::Down => "TCP stream down, iperf3 -R",
            Load::Connect => "new connections, HTTP/1.1, 16 at once",
            Load::Handshake => "new connections, opaque: an mTLS handshake each",
            Load::Resume => "new connections, opaque, TLS sessions resumed",
            Load::Idle1000 => "1,000 idle connections, HTTP/1.1",
            Load::Idle10000 => "10,000 idle connections, HTTP/1.1",
            Load::Tls1000 => "1,000 idle connections, opaque: mTLS between",
            Load::Handshakes => "1,000 requests/s during 500 mTLS handshakes/s",
            Load::Rules => "1,000 requests/s, 1,000 new rules each second",
        })
    }
}

/// What a load generator saw.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Answers with a status of 2xx; connections, where each has one.
    pub(crate) requests: u64,
    /// Everything else: other statuses, broken and silent connections, requests never sent in time.
    pub(crate) errors: u64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// Of bodies and streams, where they are what is measured.
    #[serde(default)]
    pub(crate) bytes: f64,
    /// What else went on at the same time.
    #[serde(default)]
    pub(crate) beside_per_second: f64,
}

impl Seen {
    pub(crate) fn new(requests: u64, errors: u64, seconds: f64, latencies: &Histogram<u64>) -> Seen {
        let at = |quantile| latencies.value_at_quantile(quantile) as f64;
        let (p50_us, p99_us, p999_us) = (at(0.50), at(0.99), at(0.999));
        Seen { requests, errors, seconds, p50_us, p99_us, p999_us, ..Seen::default() }
    }
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
        let to = format!("{host}:{}", self.port());
        match self {
            Load::Http1 => wrk(from, 64, &to, "", time, scratch).await,
            Load::Http1x1 => wrk(from, 1, &to, "", time, scratch).await,
            Load::Http1x16 => wrk(from, 16, &to, "", time, scratch).await,
            Load::Post => wrk(from, 16, &to, WRK_POST, time, scratch).await,
            Load::Large => {
                let seen = wrk(from, 4, &(to + LARGE_PATH), "", time, scratch).await?;
                Ok(Seen { bytes: seen.requests as f64 * LARGE as f64, ..seen })
            }
            Load::Http2 => h2load(from, &format!("{to}/"), &[], time, scratch).await,
            Load::Grpc => {
                let body = scratch.join("grpc-request");
                fs::write(&body, [&[0, 0, 0, 0, 20][..], &[b'w'; 20]].concat())?;
                let body = format!("--data={}", body.display());
                let more = ["--header=content-type: application/grpc", "--header=te: trailers", &body];
                h2load(from, &(to + GRPC_PATH), &more, time, scratch).await
            }
            Load::Rate1000 | Load::Rules => own(from, &to, &RATE_1000, time).await,
            Load::Handshakes => {
                let opaque = format!("{host}:{OPAQUE_PORT}");
                let beside = own(from, &opaque, &["--rate=500", "--connections=10", "--fresh"], time);
                let (seen, beside) = tokio::try_join!(own(from, &to, &RATE_1000, time), beside)?;
                let beside_per_second = beside.requests as f64 / beside.seconds;
                let errors = seen.errors + beside.errors;
                Ok(Seen { errors, beside_per_second, ..seen })
            }
            Load::Rate3000 => own(from, &to, &["--rate=3000", "--connections=30"], time).await,
            Load::Connect | Load::Handshake | Load::Resume => {
                own(from, &to, &["--connections=16", "--fresh"], time).await
            }
            Load::Up => iperf3(from, host, &[], time).await,
            Load::Down => iperf3(from, host, &["--reverse"], time).await,
            Load::Idle1000 | Load::Idle10000 | Load::Tls1000 => bail!("{self} is held, not run"),
        }
    }

    /// Opens connections that rest until what is returned is dropped.
    pub(crate) async fn hold(
        self,
        from: &Namespace,
        host: impl fmt::Display,
        connections: usize,
    ) -> Result<tokio::process::Child> {
        let mut idle = from.command(std::env::current_exe()?, Group::App);
        idle.args(["idle", "--to", &format!("{host}:{}", self.port())]);
        idle.args(["--connections", &connections.to_string()]).stdout(Stdio::piped());
        let mut idle = tokio::process::Command::from(idle).kill_on_drop(true).spawn()?;
        let mut lines = BufReader::new(idle.stdout.take().context("no output")?).lines();
        let said = tokio::time::timeout(OPENED_WITHIN, lines.next_line()).await;
        match said.with_context(|| format!("{connections} connections were not open in time"))?? {
            Some(_) => Ok(idle),
            None => bail!("{connections} connections could not be opened"),
        }
    }
}

const RATE_1000: [&str; 2] = ["--rate=1000", "--connections=10"];
const OPENED_WITHIN: Duration = Duration::from_secs(60);

async fn wrk(
    from: &Namespace,
    connections: u32,
    to: &str,
    request: &str,
    time: Duration,
    scratch: &Path,
) -> Result<Seen> {
    let script = scratch.join("report.lua");
    fs::write(&script, request.to_owned() + WRK_REPORT)?;
    let mut wrk = from.command("wrk", Group::App);
    // It takes whole seconds only.
    let seconds = format!("{}s", time.as_secs_f64().ceil());
    wrk.args(["-t1", &format!("-c{connections}"), "-d", &seconds, "-s"]).arg(&script);
    let path = if to.contains('/') { "" } else { "/" };
    parse_wrk(&output(wrk.arg(format!("http://{to}{path}"))).await?)
}

async fn h2load(from: &Namespace, to: &str, more: &[&str], time: Duration, scratch: &Path) -> Result<Seen> {
    let log = scratch.join("h2load.log");
    // Its log is appended to.
    if log.exists() {
        fs::remove_file(&log)?;
    }
    let mut h2load = from.command("h2load", Group::App);
    h2load.args(["-t1", "-c8", "-m16", "-D", &format!("{}ms", time.as_millis())]).args(more);
    h2load.arg(format!("--log-file={}", log.display()));
    let printed = output(h2load.arg(format!("http://{to}"))).await?;
    let seen = parse_h2load(&printed, &fs::read_to_string(&log)?);
    fs::remove_file(&log)?;
    seen
}

async fn own(from: &Namespace, to: &str, more: &[&str], time: Duration) -> Result<Seen> {
    let mut own = from.command(std::env::current_exe()?, Group::App);
    own.args(["open-loop", "--to", to, "--seconds", &time.as_secs_f64().to_string()]).args(more);
    Ok(serde_json::from_str(&output(&mut own).await?)?)
}

async fn iperf3(from: &Namespace, host: impl fmt::Display, more: &[&str], time: Duration) -> Result<Seen> {
    let mut iperf3 = from.command("iperf3", Group::App);
    iperf3.args(["--json", "--client", &host.to_string(), "--port", &STREAM_PORT.to_string()]).args(more);
    // Whole seconds, as with wrk.
    parse_iperf3(&output(iperf3.args(["--time", &time.as_secs_f64().ceil().to_string()])).await?)
}

fn parse_iperf3(text: &str) -> Result<Seen> {
    let printed: serde_json::Value = serde_json::from_str(text)?;
    let sum = &printed["end"]["sum_received"];
    match (sum["bytes"].as_f64(), sum["seconds"].as_f64()) {
        (Some(bytes), Some(seconds)) if bytes > 0.0 => {
            Ok(Seen { requests: 1, seconds, bytes, ..Seen::default() })
        }
        _ => bail!("iperf3 carried nothing: {}", printed["error"]),
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
  io.write(string.format("FIGURES %d %d %d %f %f %f\n", summary.requests,
    e.connect + e.read + e.write + e.status + e.timeout, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"#;

const WRK_POST: &str = r#"
wrk.method = "POST"
wrk.body = string.rep("w", 10 * 1024)
"#;

fn parse_wrk(text: &str) -> Result<Seen> {
    let figures = text.lines().find_map(|line| line.strip_prefix("FIGURES "));
    let figures: Option<Vec<f64>> = figures.and_then(|f| f.split(' ').map(|n| n.parse().ok()).collect());
    let Some(&[requests, errors, duration_us, p50_us, p99_us, p999_us]) = figures.as_deref() else {
        bail!("wrk printed no figures: {text}");
    };
    let (requests, errors) = (requests as u64, errors as u64);
    let (requests, seconds) = (requests.saturating_sub(errors), duration_us / 1e6);
    Ok(Seen { requests, errors, seconds, p50_us, p99_us, p999_us, ..Seen::default() })
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
    Ok(Seen::new(succeeded as u64, failed as u64, seconds, &latencies))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_read() {
        let seen = parse_wrk("Running\nFIGURES 1000 3 2000000 812.5 4100 5000\n").unwrap();
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
    fn iperf3_is_read() {
        let text = r#"{"end": {"sum_sent": {"bytes": 9}, "sum_received": {"bytes": 2e9, "seconds": 2.0}}}"#;
        let seen = parse_iperf3(text).unwrap();
        assert_eq!((seen.bytes, seen.seconds), (2e9, 2.0));
        assert!(parse_iperf3(r#"{"error": "unable to connect"}"#).is_err());
    }
}
