//! What the demo performs. Every step says what to look at, does it, measures, and judges its own claim.
//!
//! Why a claim can fail: a demo that only shows what went well is a film. These numbers are measured while you
//! watch, and the exit code says whether they held.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    mesh::{self, Workload, wait},
    netns::Process,
    stage::{FAILING, IN_TURN, IN_TURN_YAML, ROUTES, ROUTES_YAML, SLOW, SLOW_MS, Stage, V1},
    users::Figures,
};
use crate::{
    api::types::{Certs, ObjectStatus},
    cli::output::{Tone, micros, percent},
    telemetry::view::EdgeRow,
};

/// A sidecar that found nobody draws its next try from up to 30 s (full jitter, as the sidecar's `reconnect_cap` has
/// it), so that a thousand of them do not come at once.
const BACK_WITHIN: Duration = Duration::from_secs(35);

/// One step.
pub(super) struct Step {
    /// What is claimed.
    pub(super) title: &'static str,
    /// What to look at meanwhile.
    pub(super) look: &'static str,
    run: fn(&mut Stage, &mut Claims) -> Result<()>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    title: &'static str,
    /// Whether every claim held.
    pub(super) held: bool,
    claims: Vec<Claim>,
    /// What was measured.
    figures: Map<String, Value>,
    seconds: f64,
}

/// What a step says, with the numbers.
#[derive(Debug, Serialize)]
struct Claim {
    claim: String,
    held: bool,
}

/// A step's claims while it runs.
#[derive(Debug, Default)]
struct Claims {
    claims: Vec<Claim>,
    figures: Map<String, Value>,
}

/// All of them, in order.
pub(super) const STEPS: [Step; 6] = [
    Step {
        title: "Nothing travels in plaintext",
        look: "Every request carries a secret word: in a header, in bodies, in gRPC messages and in SQL. A packet \
               capture on the bridge between all pods looks for it.",
        run: encrypted,
    },
    Step {
        title: "Slow and failing endpoints get little",
        look: "One endpoint of api v1 is 300 ms slower than its siblings, another fails 60 of 100 requests. For \
               comparison a TrafficPolicy first makes callers take endpoints in turn; then it is deleted again, and \
               they go by measured latency. Look at the second peak in api-v1's histogram shrink.",
        run: latency_aware,
    },
    Step {
        title: "An endpoint dies, and no user notices",
        look: "App and sidecar of api-v1-2 are killed (SIGKILL) under load; nobody tells the mesh. Look at SUCCESS of \
               the web routes, and at RETRIES.",
        run: endpoint_dies,
    },
    Step {
        title: "A file is edited, and traffic moves",
        look: "In routes.yaml the weights of api v1 and v2 become 90 and 10. Look at the line of api-v2 appear.",
        run: weights,
    },
    Step {
        title: "The controller dies, and traffic does not care",
        look: "The controller is killed (SIGKILL) and stays away for a while. Histograms pause; users must not notice.",
        run: controller_dies,
    },
    Step {
        title: "All certificates are replaced under load",
        look: "Every sidecar makes a new key and gets a new certificate, at once. Look at SUCCESS.",
        run: certificates,
    },
];

impl Step {
    /// Performs it.
    pub(super) fn perform(&self, number: usize, of: usize, stage: &mut Stage) -> Result<Outcome> {
        let start = Instant::now();
        stage.ui.heading(&format!("{number}/{of}  {}", self.title))?;
        stage.ui.say(Tone::Plain, "look: ", self.look)?;
        let mut claims = Claims::default();
        (self.run)(stage, &mut claims)?;
        for Claim { claim, held } in &claims.claims {
            let (tone, mark) = if *held { (Tone::Good, "  ✓ ") } else { (Tone::Bad, "  ✗ ") };
            stage.ui.say(tone, mark, claim)?;
        }
        Ok(Outcome {
            title: self.title,
            held: claims.claims.iter().all(|claim| claim.held),
            claims: claims.claims,
            figures: claims.figures,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

impl Claims {
    fn claim(&mut self, held: bool, claim: impl Into<String>) {
        self.claims.push(Claim { claim: claim.into(), held });
    }

    fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// Users noticed nothing.
    fn nobody_noticed(&mut self, figures: &Figures) {
        let why = figures.worst().map(|worst| format!(" ({worst})")).unwrap_or_default();
        // A load that stands still would not fail either.
        self.claim(figures.failed == 0 && figures.requests >= 50, format!("users: {}{why}", figures.text()));
        self.figure("users", json!(figures));
    }
}

/// (a) mTLS: what is on the wire.
fn encrypted(stage: &mut Stage, claims: &mut Claims) -> Result<()> {
    let start = Instant::now();
    let outsiders = ["outsider-1", "outsider-2"]
        .map(|name| stage.mesh.plain(&Workload::new("outside", name)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut capture = Capture::start(stage)?;
    stage.pass(Duration::from_secs(4))?;
    // The control: the same word between two pods without sidecars, so that a capture which sees nothing is found
    // out.
    let secret = stage.secret.clone();
    let address = SocketAddr::from((outsiders[1].ip, 9_000));
    let listener = outsiders[1].enter(|| TcpListener::bind(address))??;
    outsiders[0].enter(|| -> Result<()> {
        let mut client = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        let (mut server, _) = listener.accept()?;
        client.write_all(secret.as_bytes())?;
        let mut read = vec![0; secret.len()];
        server.read_exact(&mut read)?;
        Ok(())
    })??;
    let edges: Vec<EdgeRow> = stage.api("/api/v1/edges")?;
    // Somebody without a sidecar knocks at the web's own address.
    let web = SocketAddr::from((stage.pod("web-1")?.pod.ip, 8_080));
    let knock = outsiders[0].enter(|| mesh::get(web, "/"))?;
    stage.pass(Duration::from_millis(300))?;
    let figures = stage.users.since(start);
    match &mut capture {
        Some(capture) => {
            let bytes = capture.stop()?;
            let found = occurrences(&bytes, secret.as_bytes());
            claims.claim(
                found <= 1 && bytes.len() > 100_000,
                format!(
                    "{:.1} MB captured between the pods, controller's streams included; the secret word of {} \
                     requests is in it {} times",
                    bytes.len() as f64 / 1e6,
                    figures.requests,
                    found.saturating_sub(1)
                ),
            );
            claims.claim(
                found >= 1,
                format!("control: sent once between two pods without sidecars, the same capture found it {found} times"),
            );
            claims.figure("captured_bytes", bytes.len());
            claims.figure("found", found.saturating_sub(1));
            claims.figure("found_control", found);
        }
        None => stage.ui.say(
            Tone::Dim,
            "  ",
            "(with tcpdump, Debian package tcpdump, the packets would be searched)",
        )?,
    }
    let pairs = |mtls: bool| edges.iter().filter(|edge| edge.mtls == mtls).count();
    let (sealed, open) = (pairs(true), pairs(false));
    claims.claim(
        sealed > 0 && open == 0,
        format!(
            "who calls whom, as the called sidecars report it: {sealed} pairs by mTLS with a known identity, {open} \
             in plaintext"
        ),
    );
    claims.figure("mtls_edges", sealed);
    claims.figure("plaintext_edges", open);
    let refused = match &knock {
        Ok((status, _)) => *status != 200,
        Err(_) => true,
    };
    let how = match &knock {
        Ok((status, _)) => format!("it got {status}"),
        Err(error) => error.root_cause().to_string(),
    };
    claims.claim(refused, format!("a pod without a sidecar that knocks at web-1 is turned away: {how}"));
    claims.nobody_noticed(&figures);
    for outsider in &outsiders {
        stage.mesh.forget(&outsider.name)?;
        stage.mesh.world.remove(outsider);
    }
    Ok(())
}

/// (b) Balancing: in turn first, as many proxies do it, then by latency.
fn latency_aware(stage: &mut Stage, claims: &mut Claims) -> Result<()> {
    let callers = ["web-1", "web-2"];
    let ejected = |stage: &Stage| stage.metric(&callers, "weft_ejections_total");
    let ejections = ejected(stage);
    stage.mesh.write(IN_TURN, IN_TURN_YAML)?;
    live(stage, "TrafficPolicy", "in-turn", None)?.context("the policy in-turn is not live within 10s")?;
    let start = Instant::now();
    stage.pass(Duration::from_secs(6))?;
    let in_turn = stage.users.since(start);
    stage.mesh.remove_file(IN_TURN)?;
    // Estimates that the other way of choosing has left behind fade.
    stage.pass(Duration::from_secs(5))?;
    let again = Instant::now();
    stage.pass(Duration::from_secs(7))?;
    let figures = stage.users.since(again);
    let ejections = ejected(stage) - ejections;
    let fair = 1.0 / V1 as f64;
    let (slow, failing) = (figures.share_of(SLOW), figures.share_of(FAILING));
    claims.claim(
        slow < fair / 2.0 && slow < in_turn.share_of(SLOW) / 2.0,
        format!(
            "the endpoint that takes {SLOW_MS} ms longer answered {} of requests in turn (RoundRobin), and {} by \
             latency (PeakEwma, what one gets unless one asks for something else)",
            percent(in_turn.share_of(SLOW)),
            percent(slow),
        ),
    );
    claims.claim(
        figures.p90_us < in_turn.p90_us * 2 / 3,
        format!(
            "users waited, at p50, p90 and p99: {} {} {} in turn, and {} {} {} by latency",
            micros(in_turn.p50_us),
            micros(in_turn.p90_us),
            micros(in_turn.p99_us),
            micros(figures.p50_us),
            micros(figures.p90_us),
            micros(figures.p99_us),
        ),
    );
    claims.claim(
        ejections > 0.0,
        format!(
            "the endpoint that fails was ejected {ejections:.0} times by its two callers, and answered {}",
            percent(failing)
        ),
    );
    claims.nobody_noticed(&stage.users.since(start));
    claims.figure("slow_share", slow);
    claims.figure("slow_share_in_turn", in_turn.share_of(SLOW));
    claims.figure("in_turn", json!(in_turn));
    claims.figure("failing_share", failing);
    claims.figure("ejections", ejections);
    stage.print_view()
}

/// (c) Ejection.
fn endpoint_dies(stage: &mut Stage, claims: &mut Claims) -> Result<()> {
    const VICTIM: &str = "api-v1-2";
    let callers = ["web-1", "web-2"];
    let again = ["weft_redispatched_total", "weft_retries_total"];
    let count = |stage: &Stage| again.iter().map(|name| stage.metric(&callers, name)).sum::<f64>();
    let victim = stage.pod(VICTIM)?.uid.clone();
    let ejected = |stage: &Stage| -> Result<usize> {
        let rows = stage.endpoints("shop/api-v1")?.rows;
        Ok(rows
            .iter()
            .filter(|row| row.uid == victim && (row.state == "ejected" || row.state == "probing"))
            .count())
    };
    stage.pass(Duration::from_secs(1))?;
    let sent_again = count(stage);
    let start = Instant::now();
    stage.kill(VICTIM)?;
    let seen = stage.until(Duration::from_secs(6), |stage| Ok(ejected(stage)? >= callers.len()))?;
    stage.pass(Duration::from_secs(6).saturating_sub(start.elapsed()))?;
    let figures = stage.users.since(start);
    let sent_again = count(stage) - sent_again;
    claims.nobody_noticed(&figures);
    claims.claim(
        seen.is_some(),
        match seen {
            Some(after) => format!(
                "ejected by both callers, known to the controller {} after the kill",
                micros(u64::try_from(after.as_micros()).unwrap_or(u64::MAX))
            ),
            None => "it was not ejected by both callers within 6s".to_owned(),
        },
    );
    claims.figure("ejected_after_ms", seen.map(|after| after.as_secs_f64() * 1e3));
    // Often none: callers that lose a connection ask at once whether anybody is there.
    claims.figure("sent_again", sent_again);
    stage.revive(VICTIM)?;
    let revived = Instant::now();
    let back = stage
        .until(Duration::from_secs(15), |stage| Ok(stage.users.since(revived).pods.contains_key(VICTIM)))?;
    claims.claim(
        back.is_some(),
        match back {
            Some(after) => format!(
                "started again, it was probed and answers users again after {:.1}s",
                after.as_secs_f64()
            ),
            None => "started again, it got no requests within 15s".to_owned(),
        },
    );
    claims.figure("back_after_ms", back.map(|after| after.as_secs_f64() * 1e3));
    stage.print_view()
}

/// (d) Delivery.
fn weights(stage: &mut Stage, claims: &mut Claims) -> Result<()> {
    const OBJECT: &str = "HTTPRoute/shop/api";
    let before =
        object(stage, "HTTPRoute", "api")?.with_context(|| format!("the controller knows no {OBJECT}"))?;
    let earlier = stage.users.since(Instant::now().checked_sub(Duration::from_secs(3)).context("no clock")?);
    let edited = ROUTES_YAML.replace("weight: 100 }", "weight: 90 }").replace("weight: 0 }", "weight: 10 }");
    ensure!(edited != ROUTES_YAML, "the weights are not where they were");
    let start = Instant::now();
    stage.mesh.write(ROUTES, &edited)?;
    let live = live(stage, "HTTPRoute", "api", Some(&before.version))?;
    let applied = Instant::now();
    let last = object(stage, "HTTPRoute", "api")?.unwrap_or_default();
    stage.pass(Duration::from_secs(6))?;
    let figures = stage.users.since(applied);
    claims.claim(
        live.is_some(),
        match live {
            Some(after) => format!(
                "{} saved: {OBJECT} is live in {}/{} sidecars that use it, {:.0} ms after the file was written \
                 (version {})",
                stage.mesh.source().join(ROUTES).display(),
                last.applied,
                last.of,
                after.as_secs_f64() * 1e3,
                last.version
            ),
            None => format!("{OBJECT} is live in {}/{} sidecars after 10s", last.applied, last.of),
        },
    );
    let (was, is) = (earlier.share_of_version("v2"), figures.share_of_version("v2"));
    // Six standard deviations of what chance does to so many requests.
    let spread = 6.0 * (0.1 * 0.9 / figures.requests.max(1) as f64).sqrt();
    claims.claim(
        was == 0.0 && (is - 0.1).abs() <= spread,
        format!(
            "v2 answered {} of requests before, and {} of {} since",
            percent(was),
            percent(is),
            figures.requests
        ),
    );
    claims.nobody_noticed(&stage.users.since(start));
    claims.figure("applied_ms", live.map(|after| after.as_secs_f64() * 1e3));
    claims.figure("applied", last.applied);
    claims.figure("of", last.of);
    claims.figure("v2_share", is);
    stage.print_view()
}

/// (e) Static stability.
fn controller_dies(stage: &mut Stage, claims: &mut Claims) -> Result<()> {
    let sidecars = stage.pods().count();
    let start = Instant::now();
    stage.mesh.kill_controller()?;
    stage.pass(Duration::from_secs(6))?;
    let away = stage.users.since(start);
    let away_for = start.elapsed();
    let back = Instant::now();
    stage.mesh.start_controller()?;
    let ready = back.elapsed();
    let mut connected = 0;
    let all = stage.until(BACK_WITHIN, |stage| {
        connected = stage.status()?.sidecars.iter().filter(|sidecar| sidecar.connected).count();
        Ok(connected >= sidecars)
    })?;
    stage.pass(Duration::from_secs(3))?;
    let after = stage.users.since(back);
    claims.claim(
        away.failed == 0 && away.requests >= 50,
        format!("{:.1}s without a controller: {}{}", away_for.as_secs_f64(), away.text(), why(&away)),
    );
    claims.claim(
        all.is_some(),
        match all {
            Some(waited) => format!(
                "started again it was ready after {:.1}s; {connected}/{sidecars} sidecars were back after {:.1}s",
                ready.as_secs_f64(),
                (ready + waited).as_secs_f64()
            ),
            None => format!("{connected}/{sidecars} sidecars came back within {}s", BACK_WITHIN.as_secs()),
        },
    );
    claims.claim(
        after.failed == 0 && after.requests >= 50,
        format!("and since: {}{}", after.text(), why(&after)),
    );
    claims.figure("away", json!(away));
    claims.figure("after", json!(after));
    claims.figure("all_back_ms", all.map(|waited| (ready + waited).as_secs_f64() * 1e3));
    Ok(())
}

/// (f) Rotation.
fn certificates(stage: &mut Stage, claims: &mut Claims) -> Result<()> {
    let serials = |certs: &Certs| -> BTreeMap<String, (String, i64)> {
        let of =
            |c: &crate::api::types::WorkloadCertificate| (c.uid.clone(), (c.serial.clone(), c.not_after));
        certs.workloads.iter().map(of).collect()
    };
    let uids: Vec<String> = stage.pods().map(|pod| pod.uid.clone()).collect();
    let before = serials(&stage.api("/api/v1/certs")?);
    let ends = |stage: &Stage| -> BTreeMap<String, f64> {
        let one = |pod: &mesh::Meshed| {
            Some((pod.uid.clone(), pod.metric("weft_certificate_not_after_seconds", &[]).ok()?))
        };
        stage.pods().filter_map(one).collect()
    };
    let ends_before = ends(stage);
    let start = Instant::now();
    stage.mesh.post("/api/v1/certs/rotate")?;
    let mut renewed = 0;
    let all = stage.until(Duration::from_secs(20), |stage| {
        let now = serials(&stage.api("/api/v1/certs")?);
        renewed = uids
            .iter()
            .filter(|uid| {
                now.get(*uid).is_some_and(|(serial, _)| before.get(*uid).is_none_or(|(old, _)| old != serial))
            })
            .count();
        Ok(renewed >= uids.len())
    })?;
    // What was issued must also be in use.
    let in_use = stage.until(Duration::from_secs(5), |stage| {
        let now = ends(stage);
        Ok(uids.iter().all(|uid| now.get(uid) > ends_before.get(uid)))
    })?;
    stage.pass(Duration::from_secs(4))?;
    let figures = stage.users.since(start);
    claims.claim(
        all.is_some(),
        match all {
            Some(after) => format!(
                "{renewed}/{} sidecars have a certificate with a new serial, the last one after {:.1}s",
                uids.len(),
                after.as_secs_f64()
            ),
            None => format!("{renewed}/{} sidecars have a new certificate after 20s", uids.len()),
        },
    );
    claims.claim(in_use.is_some(), "every sidecar uses it: all of them report a later end of validity");
    claims.nobody_noticed(&figures);
    claims.figure("renewed", renewed);
    claims.figure("renewed_ms", all.map(|after| after.as_secs_f64() * 1e3));
    stage.print_view()
}

/// An object of the shop as the controller sees it.
fn object(stage: &Stage, kind: &str, name: &str) -> Result<Option<ObjectStatus>> {
    let objects = stage.status()?.objects;
    Ok(objects.into_iter().find(|o| o.kind == kind && o.namespace == "shop" && o.name == name))
}

/// Waits until an object, in another version than before, is live wherever it matters; says after how long.
fn live(stage: &mut Stage, kind: &str, name: &str, before: Option<&str>) -> Result<Option<Duration>> {
    stage.until(Duration::from_secs(10), |stage| {
        let found = object(stage, kind, name)?;
        Ok(found.is_some_and(|o| before != Some(&*o.version) && o.of > 0 && o.applied >= o.of))
    })
}

fn why(figures: &Figures) -> String {
    figures.worst().map(|worst| format!(" ({worst})")).unwrap_or_default()
}

/// tcpdump on the bridge.
struct Capture {
    process: Process,
    file: std::path::PathBuf,
}

impl Capture {
    /// `None` where there is no tcpdump.
    fn start(stage: &Stage) -> Result<Option<Self>> {
        let there =
            Command::new("tcpdump").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !there.is_ok_and(|status| status.success()) {
            return Ok(None);
        }
        let file = stage.mesh.dir().join("bridge.pcap");
        let log = stage.mesh.log("tcpdump");
        let mut command = stage.mesh.world.bridge().command("tcpdump");
        command
            // As root it would become another user, who cannot write there.
            .args(["-i", "br0", "-n", "-U", "--immediate-mode", "-s", "0", "-B", "16384", "-Z", "root", "-w"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?);
        let mut process = Process::spawn(&mut command)?;
        wait(Duration::from_secs(5), || {
            ensure!(process.running(), "it ended: {}", mesh::tail(&log));
            Ok(fs::read_to_string(&log)?.contains("listening on"))
        })
        .context("tcpdump")?;
        Ok(Some(Self { process, file }))
    }

    /// What was captured.
    fn stop(&mut self) -> Result<Vec<u8>> {
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(Duration::from_secs(5))?;
        fs::read(&self.file).context("reading the capture")
    }
}

fn occurrences(text: &[u8], word: &[u8]) -> usize {
    let (Some(&first), mut found, mut at) = (word.first(), 0, 0) else { return 0 };
    while let Some(next) = text.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == first)) {
        at += next;
        if text[at..].starts_with(word) {
            found += 1;
        }
        at += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted() {
        assert_eq!(occurrences(b"abcabcab", b"abc"), 2);
        assert_eq!(occurrences(b"aaa", b"aa"), 2);
        assert_eq!(occurrences(b"", b"a"), 0);
        assert_eq!(occurrences(b"a", b""), 0);
        assert_eq!(occurrences(b"xab", b"abc"), 0);
    }

    #[test]
    fn an_idle_load_is_not_a_success() {
        let mut claims = Claims::default();
        claims.nobody_noticed(&Figures::default());
        assert!(!claims.claims[0].held);
    }

    #[test]
    fn the_edited_file_differs_by_two_weights() {
        let edited =
            ROUTES_YAML.replace("weight: 100 }", "weight: 90 }").replace("weight: 0 }", "weight: 10 }");
        let changed = ROUTES_YAML.lines().zip(edited.lines()).filter(|(a, b)| a != b).count();
        assert_eq!(changed, 2);
    }
}
