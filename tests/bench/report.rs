//! What a run means: medians, ratios within it, and whether it counts at all.
//!
//! Why ratios are taken round by round and then their median: two figures of one round stood seconds
//! apart on the same machine in the same mood; medians of the two columns did not.
//!
//! Why a run may count although Envoy stands elsewhere: on some processors (small caches, dear page walks) its
//! hundred megabytes of code cost twice what they cost where the targets were set, and a ratio to it would flatter
//! us. Then `× envoy` is not what was measured but the stricter figure: `× relay`, times what the relay was to Envoy
//! there. A run in which Envoy is *cheaper* than it was does not count: something is wrong with the relay.

use std::{fmt::Write as _, time::SystemTime};

use serde::Serialize;

use crate::{
    load::Load,
    peers::Peer,
    scenarios::{Cell, Memory, Plan, Results},
};

/// The pair CPU of `relay` over that of `envoy` when the targets were set, and how far off a run may be.
const REFERENCE: [(Load, f64); 3] = [(Load::Http1, 0.43), (Load::Http2, 0.43), (Load::Rate1000, 0.35)];
const TOLERANCE: f64 = 0.20;

/// What `weft` must reach under every load: CPU against Envoy, CPU against the relay; and its goal.
const MUST_ENVOY: f64 = 0.55;
const MUST_RELAY: f64 = 1.25;
const GOAL_RELAY: f64 = 1.0;
/// At 1,000 requests a second: added p99 against Envoy's.
const MUST_ADDED_P99: f64 = 0.7;
/// Resident memory of an idle sidecar, MiB.
const MUST_IDLE: f64 = 12.0;

#[derive(Serialize)]
pub(crate) struct Report {
    unix_time: u64,
    rounds: u32,
    measured_seconds: f64,
    /// Why the run does not count; empty when it does.
    does_not_count: Vec<String>,
    /// Loads under which Envoy was dearer than where the targets were set: judged by the relay.
    by_the_relay: Vec<Load>,
    checks: Vec<Check>,
    rows: Vec<Row>,
    memory: Vec<MemoryRow>,
    raw: Results,
}

/// `relay` against `envoy` under one load.
#[derive(Serialize)]
struct Check {
    load: Load,
    relay_to_envoy: Option<f64>,
    expected: f64,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Verdict {
    Within,
    /// Envoy costs more than it did, or the relay less: a ratio to Envoy would flatter.
    EnvoyDearer,
    EnvoyCheaper,
    NotMeasured,
}

/// One pair under one load: medians over the rounds.
#[derive(Serialize)]
struct Row {
    load: Load,
    pair: Peer,
    cpu_us: Option<f64>,
    cpu_us_client: Option<f64>,
    cpu_us_server: Option<f64>,
    to_envoy: Option<f64>,
    to_relay: Option<f64>,
    requests_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Over `direct`.
    added_p50_ms: Option<f64>,
    added_p99_ms: Option<f64>,
    errors: u64,
}

#[derive(Serialize)]
struct MemoryRow {
    pair: Peer,
    idle_mib: f64,
    after_mib: f64,
    first_answer_ms: f64,
}

impl Report {
    pub(crate) fn new(plan: &Plan, raw: Results) -> Report {
        let mut rows: Vec<Row> = Vec::new();
        for &load in &plan.loads {
            let added = |pair, figure: fn(&Cell) -> f64| {
                let of = |pair| median(cells(&raw, pair, load).map(figure));
                Some(of(pair)? - of(Peer::Direct).filter(|_| pair != Peer::Direct)?)
            };
            for &pair in &plan.pairs {
                let of = |figure: fn(&Cell) -> f64| {
                    median(cells(&raw, pair, load).map(figure)).unwrap_or(f64::NAN)
                };
                let side =
                    |n: usize| median(cells(&raw, pair, load).filter_map(|cell| cell.cpu_us.get(n).copied()));
                rows.push(Row {
                    load,
                    pair,
                    cpu_us: median(cells(&raw, pair, load).filter_map(total_cpu)),
                    cpu_us_client: side(0),
                    cpu_us_server: side(1),
                    to_envoy: ratio(&raw, load, pair, Peer::Envoy),
                    to_relay: ratio(&raw, load, pair, Peer::Relay),
                    requests_per_second: of(|cell| cell.seen.requests as f64 / cell.seen.seconds),
                    p50_ms: of(|cell| cell.seen.p50_us / 1e3),
                    p99_ms: of(|cell| cell.seen.p99_us / 1e3),
                    added_p50_ms: added(pair, |cell| cell.seen.p50_us / 1e3),
                    added_p99_ms: added(pair, |cell| cell.seen.p99_us / 1e3),
                    errors: cells(&raw, pair, load).map(|cell| cell.seen.errors).sum(),
                });
            }
        }
        let checks: Vec<Check> = REFERENCE
            .into_iter()
            .filter(|(load, _)| plan.loads.contains(load))
            .map(|(load, expected)| {
                let measured = ratio(&raw, load, Peer::Relay, Peer::Envoy);
                let verdict = match measured.map(|measured| measured / expected - 1.0) {
                    None => Verdict::NotMeasured,
                    Some(off) if off < -TOLERANCE => Verdict::EnvoyDearer,
                    Some(off) if off > TOLERANCE => Verdict::EnvoyCheaper,
                    Some(_) => Verdict::Within,
                };
                Check { load, relay_to_envoy: measured, expected, verdict }
            })
            .collect();
        let mut does_not_count: Vec<String> = checks.iter().filter_map(Check::complaint).collect();
        let failed = rows.iter().filter(|row| row.errors > 0);
        does_not_count
            .extend(failed.map(|row| format!("{}: {} errors under {}", row.pair, row.errors, row.load)));
        let by_the_relay: Vec<Load> = checks
            .iter()
            .filter(|check| check.verdict == Verdict::EnvoyDearer)
            .map(|check| check.load)
            .collect();
        let memory = plan.pairs.iter().filter_map(|&pair| MemoryRow::new(&raw.memory, pair)).collect();
        let unix_time =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Report {
            unix_time,
            rounds: plan.rounds,
            measured_seconds: plan.measured.as_secs_f64(),
            does_not_count,
            by_the_relay,
            checks,
            rows,
            memory,
            raw,
        }
    }

    pub(crate) fn counts(&self) -> bool {
        self.does_not_count.is_empty()
    }

    /// The table for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "Medians of {} interleaved rounds, {} s each; CPU is user + system of both proxies.",
            self.rounds, self.measured_seconds
        )?;
        let envoy = self.raw.envoy_version.as_ref().map(|version| format!(". Envoy {version}, lean"));
        writeln!(out, "{}{}.", self.raw.machine, envoy.unwrap_or_default())?;
        let mut current = None;
        for row in &self.rows {
            if current.replace(row.load) != Some(row.load) {
                writeln!(out, "\n{}", row.load)?;
                writeln!(
                    out,
                    "  {:<7}{:>8}{:>9}{:>9}{:>9}{:>9}{:>10}{:>8}{:>8}{:>10}{:>10}{:>8}",
                    "pair",
                    "CPU µs",
                    "client",
                    "server",
                    "× envoy",
                    "× relay",
                    "req/s",
                    "p50 ms",
                    "p99 ms",
                    "+p50 ms",
                    "+p99 ms",
                    "errors"
                )?;
            }
            // Latency under saturation says how long the queue was, not what a proxy adds.
            let added = |value: Option<f64>| number(value.filter(|_| row.load == Load::Rate1000), 2);
            writeln!(
                out,
                "  {:<7}{:>8}{:>9}{:>9}{:>9}{:>9}{:>10.0}{:>8.2}{:>8.2}{:>10}{:>10}{:>8}",
                row.pair,
                number(row.cpu_us, 1),
                number(row.cpu_us_client, 1),
                number(row.cpu_us_server, 1),
                number(row.to_envoy, 2),
                number(row.to_relay, 2),
                row.requests_per_second,
                row.p50_ms,
                row.p99_ms,
                added(row.added_p50_ms),
                added(row.added_p99_ms),
                row.errors
            )?;
        }
        writeln!(out, "\nMemory of one proxy (mean of the two), MiB; start to first answer, ms")?;
        writeln!(out, "  {:<7}{:>8}{:>12}{:>14}", "pair", "idle", "after load", "first answer")?;
        for row in &self.memory {
            writeln!(
                out,
                "  {:<7}{:>8.1}{:>12.1}{:>14.0}",
                row.pair, row.idle_mib, row.after_mib, row.first_answer_ms
            )?;
        }
        self.write_targets(out)?;
        writeln!(out, "\nDoes this run count? relay ÷ envoy, within {:.0} %:", TOLERANCE * 100.0)?;
        for check in &self.checks {
            let verdict = match check.verdict {
                Verdict::Within => "yes",
                Verdict::EnvoyDearer => {
                    "yes, by the relay: Envoy is dearer here, and a ratio to it would flatter"
                }
                Verdict::EnvoyCheaper | Verdict::NotMeasured => "NO",
            };
            let measured = number(check.relay_to_envoy, 2);
            writeln!(
                out,
                "  {:<42}{measured:>6}, expected {:.2}: {verdict}",
                check.load.to_string(),
                check.expected
            )?;
        }
        match self.does_not_count.as_slice() {
            [] => writeln!(out, "This run counts."),
            reasons => {
                writeln!(out, "THIS RUN DOES NOT COUNT:")?;
                reasons.iter().try_for_each(|reason| writeln!(out, "  {reason}"))
            }
        }
    }

    fn write_targets(&self, out: &mut String) -> std::fmt::Result {
        let find = |load, pair| self.rows.iter().find(|row| row.load == load && row.pair == pair);
        if !self.rows.iter().any(|row| row.pair == Peer::Weft) {
            return Ok(());
        }
        writeln!(out, "\nWeft against its targets")?;
        let mut line = |what: String, value: Option<f64>, must: f64| {
            let Some(value) = value else { return Ok(()) };
            let verdict = if value <= must { "reached" } else { "MISSED" };
            writeln!(out, "  {what:<60}{value:>6.2}, must ≤ {must}: {verdict}")
        };
        for row in self.rows.iter().filter(|row| row.pair == Peer::Weft) {
            if self.by_the_relay.contains(&row.load) {
                let expected =
                    self.checks.iter().find(|check| check.load == row.load).map(|check| check.expected);
                let stricter = row.to_relay.zip(expected).map(|(to_relay, expected)| to_relay * expected);
                line(format!("{}: CPU × envoy, by the relay", row.load), stricter, MUST_ENVOY)?;
            } else {
                line(format!("{}: CPU × envoy", row.load), row.to_envoy, MUST_ENVOY)?;
            }
            line(format!("{}: CPU × relay (goal {GOAL_RELAY})", row.load), row.to_relay, MUST_RELAY)?;
        }
        let added = |pair| find(Load::Rate1000, pair).and_then(|row| row.added_p99_ms);
        if let (Some(weft), Some(envoy)) = (added(Peer::Weft), added(Peer::Envoy)) {
            line("added p99 at 1,000/s × envoy".to_owned(), Some(weft / envoy), MUST_ADDED_P99)?;
        }
        let idle = self.memory.iter().find(|row| row.pair == Peer::Weft).map(|row| row.idle_mib);
        line("idle memory of a sidecar, MiB".to_owned(), idle, MUST_IDLE)
    }
}

impl Check {
    fn complaint(&self) -> Option<String> {
        match self.verdict {
            Verdict::Within | Verdict::EnvoyDearer => None,
            Verdict::NotMeasured => Some(format!("{}: no relay or no envoy in this run", self.load)),
            Verdict::EnvoyCheaper => Some(format!(
                "{}: relay ÷ envoy is {}, {:.2} is expected: a peer or the machine is not what it was",
                self.load,
                number(self.relay_to_envoy, 2),
                self.expected
            )),
        }
    }
}

impl MemoryRow {
    fn new(all: &[Memory], pair: Peer) -> Option<MemoryRow> {
        let mean = |bytes: &[u64]| bytes.iter().sum::<u64>() as f64 / bytes.len() as f64 / f64::from(1 << 20);
        let of =
            |figure: &dyn Fn(&Memory) -> f64| median(all.iter().filter(|row| row.pair == pair).map(figure));
        Some(MemoryRow {
            pair,
            idle_mib: of(&|row| mean(&row.idle))?,
            after_mib: of(&|row| mean(&row.after))?,
            first_answer_ms: of(&|row| row.first_answer_ms)?,
        })
    }
}

fn cells(raw: &Results, pair: Peer, load: Load) -> impl Iterator<Item = &Cell> {
    raw.cells.iter().filter(move |cell| cell.pair == pair && cell.load == load)
}

fn total_cpu(cell: &Cell) -> Option<f64> {
    (!cell.cpu_us.is_empty()).then(|| cell.cpu_us.iter().sum())
}

/// The median over the rounds of one pair's CPU over another's.
fn ratio(raw: &Results, load: Load, pair: Peer, to: Peer) -> Option<f64> {
    median(cells(raw, pair, load).filter_map(|cell| {
        let other = cells(raw, to, load).find(|other| other.round == cell.round)?;
        Some(total_cpu(cell)? / total_cpu(other)?)
    }))
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    Some(if values.len() % 2 == 1 { upper } else { (values[values.len() / 2 - 1] + upper) / 2.0 })
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use super::*;
    use crate::load::Seen;

    fn plan(loads: Vec<Load>) -> Plan {
        Plan {
            pairs: vec![Peer::Direct, Peer::Envoy, Peer::Relay],
            loads,
            rounds: 3,
            measured: Duration::from_secs(1),
            warm_up: Duration::from_secs(1),
            programs: PathBuf::new(),
            envoy: None,
            out: PathBuf::new(),
        }
    }

    fn cell(round: u32, pair: Peer, cpu_us: &[f64], errors: u64) -> Cell {
        let seen = Seen { requests: 100, errors, seconds: 1.0, p50_us: 500.0, p99_us: 900.0 };
        Cell { round, pair, load: Load::Http1, cpu_us: cpu_us.to_vec(), seen }
    }

    /// The machine is twice as slow in round 2 and four times in round 3: ratios do not notice.
    fn drifting(relay: f64, errors: u64) -> Results {
        let mut raw = Results::default();
        for (round, slow) in [(1, 1.0), (2, 2.0), (3, 4.0)] {
            raw.cells.push(cell(round, Peer::Direct, &[], 0));
            raw.cells.push(cell(round, Peer::Envoy, &[25.0 * slow, 25.0 * slow], 0));
            raw.cells.push(cell(round, Peer::Relay, &[relay / 2.0 * slow, relay / 2.0 * slow], errors));
        }
        raw
    }

    #[test]
    fn a_run_counts_while_relay_stands_to_envoy_as_it_did() {
        let report = Report::new(&plan(vec![Load::Http1]), drifting(21.5, 0));
        assert!(report.counts(), "{}", report.text());
        assert_eq!(report.checks[0].relay_to_envoy, Some(0.43));
        assert!(report.text().contains("This run counts."));
        assert!(!Report::new(&plan(vec![Load::Http1]), drifting(35.0, 0)).counts());
    }

    #[test]
    fn where_envoy_is_dearer_the_relay_judges_and_flatters_nobody() {
        let mut raw = drifting(12.5, 0);
        for round in 1..=3 {
            let slow = f64::from(1 << (round - 1));
            raw.cells.push(cell(round, Peer::Weft, &[10.0 * slow, 5.0 * slow], 0));
        }
        let mut plan = plan(vec![Load::Http1]);
        plan.pairs.push(Peer::Weft);
        let report = Report::new(&plan, raw);
        assert!(report.counts(), "{}", report.text());
        // Measured: 15 of 50. Judged: 15 of 12.5, times 0.43.
        let text = report.text();
        let judged = text.lines().find(|line| line.contains("× envoy, by the relay")).unwrap();
        assert!(judged.contains(" 0.52,"), "{text}");
    }

    #[test]
    fn errors_and_missing_peers_make_a_run_not_count() {
        assert!(!Report::new(&plan(vec![Load::Http1]), drifting(21.5, 1)).counts());
        assert!(!Report::new(&plan(vec![Load::Http1]), Results::default()).counts());
    }

    #[test]
    fn the_median_of_an_even_count_lies_between_two() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
