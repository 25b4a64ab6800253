//! What a run means: medians, ratios within it, and whether it counts at all.
//!
//! Why ratios are taken round by round and then their median: two figures of one round stood seconds
//! apart on the same machine in the same mood; medians of the two columns did not.
//!
//! Why a run may count although Envoy stands elsewhere: on some processors (small caches, dear page walks) its
//! hundred megabytes of code cost twice what they cost where the targets were set, and a ratio to it would flatter
//! us. Then `× envoy` is not what was measured but the stricter figure: `× relay`, times what the relay was to Envoy
//! there. A run in which Envoy is *cheaper* than it was does not count: something is wrong with the relay. That goes
//! for HAProxy, too, though no target hangs on it: it says whether the machine is like the one of then.

use std::time::SystemTime;

use serde::Serialize;

use crate::{
    load::{Kind, Load},
    peers::Peer,
    scenarios::{Cell, Memory, Plan, Results},
    targets::{Target, targets},
};

/// When the targets were set: the pair CPU of the relay over that of Envoy, and that of HAProxy over that of the relay.
const REFERENCE: [(Load, Peer, Peer, f64); 8] = [
    (Load::Http1, Peer::Relay, Peer::Envoy, 0.43),
    (Load::Http2, Peer::Relay, Peer::Envoy, 0.43),
    (Load::Rate1000, Peer::Relay, Peer::Envoy, 0.35),
    (Load::Rate3000, Peer::Relay, Peer::Envoy, 0.37),
    (Load::Http1, Peer::Relay, Peer::Haproxy, 0.43 / 0.42),
    (Load::Http2, Peer::Relay, Peer::Haproxy, 0.43 / 0.45),
    (Load::Rate1000, Peer::Relay, Peer::Haproxy, 0.35 / 0.47),
    (Load::Rate3000, Peer::Relay, Peer::Haproxy, 0.37 / 0.55),
];
/// How far off a run may be.
pub(crate) const TOLERANCE: f64 = 0.20;

#[derive(Serialize)]
pub(crate) struct Report {
    unix_time: u64,
    pub(crate) rounds: u32,
    pub(crate) measured_seconds: f64,
    /// Why the run does not count; empty when it does.
    pub(crate) does_not_count: Vec<String>,
    pub(crate) checks: Vec<Check>,
    pub(crate) rows: Vec<Row>,
    pub(crate) memory: Vec<MemoryRow>,
    /// What was asked for and could not be measured, and why.
    pub(crate) left_out: Vec<String>,
    pub(crate) targets: Vec<Target>,
    pub(crate) raw: Results,
}

/// The relay against another that does not change either, under one load.
#[derive(Serialize)]
pub(crate) struct Check {
    pub(crate) load: Load,
    pub(crate) to: Peer,
    pub(crate) measured: Option<f64>,
    pub(crate) expected: f64,
    pub(crate) verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Verdict {
    Within,
    /// The other costs more than it did, or the relay less: a ratio to the other would flatter.
    Dearer,
    Cheaper,
    NotMeasured,
}

/// One pair under one load: medians over its rounds.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) load: Load,
    pub(crate) pair: Peer,
    pub(crate) rounds: usize,
    pub(crate) cpu_us: Option<f64>,
    pub(crate) cpu_us_client: Option<f64>,
    pub(crate) cpu_us_server: Option<f64>,
    pub(crate) to_envoy: Option<f64>,
    pub(crate) to_relay: Option<f64>,
    pub(crate) requests_per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    /// Over `direct`.
    pub(crate) added_p50_ms: Option<f64>,
    pub(crate) added_p99_ms: Option<f64>,
    pub(crate) added_p999_ms: Option<f64>,
    /// CPU of both proxies for a billion bytes, and how many millions went through in a second.
    pub(crate) cpu_s_per_gb: Option<f64>,
    pub(crate) mb_per_second: f64,
    /// Handshakes that went on beside.
    pub(crate) beside_per_second: f64,
    /// Memory of a resting connection.
    pub(crate) resting_kib_client: Option<f64>,
    pub(crate) resting_kib_server: Option<f64>,
    pub(crate) errors: u64,
}

#[derive(Serialize)]
pub(crate) struct MemoryRow {
    pub(crate) pair: Peer,
    pub(crate) idle_mib: f64,
    pub(crate) after_mib: f64,
    pub(crate) first_answer_ms: f64,
}

impl Report {
    pub(crate) fn new(plan: &Plan, raw: Results) -> Report {
        let mut rows: Vec<Row> = Vec::new();
        for &load in &plan.loads {
            let pairs = plan.pairs.iter().filter(|&&pair| cells(&raw, pair, load).next().is_some());
            rows.extend(pairs.map(|&pair| Row::new(&raw, load, pair)));
        }
        let checks: Vec<Check> = REFERENCE
            .into_iter()
            .filter(|(load, ..)| plan.loads.contains(load))
            .map(|(load, relay, to, expected)| Check::new(load, to, ratio(&raw, load, relay, to), expected))
            .collect();
        let mut does_not_count: Vec<String> = checks.iter().filter_map(Check::complaint).collect();
        does_not_count.extend(raw.failed.iter().cloned());
        let failed = rows.iter().filter(|row| row.errors > 0);
        does_not_count
            .extend(failed.map(|row| format!("{}: {} errors under {}", row.pair, row.errors, row.load)));
        let memory = plan.pairs.iter().filter_map(|&pair| MemoryRow::new(&raw.memory, pair)).collect();
        let unix_time =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut report = Report {
            unix_time,
            rounds: plan.rounds,
            measured_seconds: plan.measured.as_secs_f64(),
            does_not_count,
            checks,
            rows,
            memory,
            left_out: left_out(plan),
            targets: vec![],
            raw,
        };
        report.targets = targets(&report);
        report
    }

    pub(crate) fn counts(&self) -> bool {
        self.does_not_count.is_empty()
    }

    pub(crate) fn row(&self, load: Load, pair: Peer) -> Option<&Row> {
        self.rows.iter().find(|row| row.load == load && row.pair == pair)
    }

    /// What the relay was to Envoy under this load, where Envoy is dearer than it was then.
    pub(crate) fn judged_by_the_relay(&self, load: Load) -> Option<f64> {
        let dearer = |check: &&Check| {
            check.load == load && check.to == Peer::Envoy && check.verdict == Verdict::Dearer
        };
        self.checks.iter().find(dearer).map(|check| check.expected)
    }
}

impl Row {
    fn new(raw: &Results, load: Load, pair: Peer) -> Row {
        let median_of =
            |pair, figure: &dyn Fn(&Cell) -> Option<f64>| median(cells(raw, pair, load).filter_map(figure));
        let of =
            |figure: &dyn Fn(&Cell) -> f64| median_of(pair, &|cell| Some(figure(cell))).unwrap_or(f64::NAN);
        let added = |figure: &dyn Fn(&Cell) -> f64| {
            let of = |pair| median_of(pair, &|cell| Some(figure(cell)));
            Some(
                of(pair)?
                    - of(Peer::Direct).filter(|_| pair != Peer::Direct && load.kind() == Kind::Paced)?,
            )
        };
        let side = |n: usize| median_of(pair, &|cell| cell.cpu_us.get(n).copied());
        let resting = |n: usize| median_of(pair, &|cell| Some(cell.resting.get(n)? / 1024.0));
        let per_gb = |cell: &Cell| {
            let gigabytes = Some(cell.seen.bytes / 1e9).filter(|bytes| *bytes > 0.0)?;
            Some(total_cpu(cell)? * cell.seen.requests as f64 / 1e6 / gigabytes)
        };
        Row {
            load,
            pair,
            rounds: cells(raw, pair, load).count(),
            cpu_us: median_of(pair, &total_cpu),
            cpu_us_client: side(0),
            cpu_us_server: side(1),
            to_envoy: ratio(raw, load, pair, Peer::Envoy),
            to_relay: ratio(raw, load, pair, Peer::Relay),
            requests_per_second: of(&|cell| cell.seen.requests as f64 / cell.seen.seconds),
            p50_ms: of(&|cell| cell.seen.p50_us / 1e3),
            p99_ms: of(&|cell| cell.seen.p99_us / 1e3),
            p999_ms: of(&|cell| cell.seen.p999_us / 1e3),
            added_p50_ms: added(&|cell| cell.seen.p50_us / 1e3),
            added_p99_ms: added(&|cell| cell.seen.p99_us / 1e3),
            added_p999_ms: added(&|cell| cell.seen.p999_us / 1e3),
            cpu_s_per_gb: median_of(pair, &per_gb),
            mb_per_second: of(&|cell| cell.seen.bytes / cell.seen.seconds / 1e6),
            beside_per_second: of(&|cell| cell.seen.beside_per_second),
            resting_kib_client: resting(0),
            resting_kib_server: resting(1),
            errors: cells(raw, pair, load).map(|cell| cell.seen.errors).sum(),
        }
    }
}

impl Check {
    fn new(load: Load, to: Peer, measured: Option<f64>, expected: f64) -> Check {
        let verdict = match measured.map(|measured| measured / expected - 1.0) {
            None => Verdict::NotMeasured,
            Some(off) if off < -TOLERANCE => Verdict::Dearer,
            Some(off) if off > TOLERANCE => Verdict::Cheaper,
            Some(_) => Verdict::Within,
        };
        Check { load, to, measured, expected, verdict }
    }

    fn complaint(&self) -> Option<String> {
        let (load, to) = (self.load, self.to);
        match (self.verdict, self.measured) {
            (Verdict::Within | Verdict::Dearer, _) => None,
            (Verdict::NotMeasured, _) | (_, None) => {
                Some(format!("{load}: relay and {to} were not both measured"))
            }
            (Verdict::Cheaper, Some(measured)) => Some(format!(
                "{load}: relay ÷ {to} is {measured:.2}, {:.2} is expected: a peer or the machine is not what it was",
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

fn left_out(plan: &Plan) -> Vec<String> {
    let why = |load: Load| {
        let lacking = plan.pairs.iter().filter_map(move |&pair| Some((pair, load.cannot(pair)?)));
        lacking.map(move |(pair, why)| format!("{load}: {pair}: {why}"))
    };
    let named = ["LINKERD_PROXY", "ZTUNNEL"].into_iter().filter(|name| std::env::var_os(name).is_some());
    let named = named.map(|name| {
        format!("{name} is not run: it starts only with a control plane of its own, which is not part of this program")
    });
    plan.loads.iter().copied().flat_map(why).chain(named).collect()
}

fn cells(raw: &Results, pair: Peer, load: Load) -> impl Iterator<Item = &Cell> {
    raw.cells.iter().filter(move |cell| cell.pair == pair && cell.load == load)
}

/// Per request; per byte where those are what differs.
fn total_cpu(cell: &Cell) -> Option<f64> {
    (!cell.cpu_us.is_empty()).then(|| cell.cpu_us.iter().sum())
}

/// The median over the rounds of one pair's CPU over another's, for the same work.
fn ratio(raw: &Results, load: Load, pair: Peer, to: Peer) -> Option<f64> {
    // A stream counts as one request, however much went through.
    let cost = |cell: &Cell| {
        let work = if load.kind() == Kind::Bulk { cell.seen.bytes / cell.seen.requests as f64 } else { 1.0 };
        Some(total_cpu(cell)? / work)
    };
    median(cells(raw, pair, load).filter_map(|cell| {
        let other = cells(raw, to, load).find(|other| other.round == cell.round)?;
        Some(cost(cell)? / cost(other)?)
    }))
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    Some(if values.len() % 2 == 1 { upper } else { (values[values.len() / 2 - 1] + upper) / 2.0 })
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use super::*;
    use crate::load::Seen;

    fn plan(loads: Vec<Load>) -> Plan {
        Plan {
            pairs: vec![Peer::Direct, Peer::Envoy, Peer::Relay, Peer::Haproxy],
            loads,
            rounds: 3,
            measured: Duration::from_secs(1),
            warm_up: Duration::from_secs(1),
            clusters: vec![],
            programs: PathBuf::new(),
            envoy: None,
            out: PathBuf::new(),
        }
    }

    fn cell(round: u32, pair: Peer, cpu_us: &[f64], errors: u64) -> Cell {
        let (p50_us, p99_us, p999_us) = (500.0, 900.0, 950.0);
        let seen = Seen { requests: 100, errors, seconds: 1.0, p50_us, p99_us, p999_us, ..Seen::default() };
        Cell { round, pair, load: Load::Http1, cpu_us: cpu_us.to_vec(), resting: vec![], seen }
    }

    /// The machine is twice as slow in round 2 and four times in round 3: ratios do not notice.
    fn drifting(relay: f64, errors: u64) -> Results {
        let mut raw = Results::default();
        for (round, slow) in [(1, 1.0), (2, 2.0), (3, 4.0)] {
            raw.cells.push(cell(round, Peer::Direct, &[], 0));
            raw.cells.push(cell(round, Peer::Envoy, &[25.0 * slow, 25.0 * slow], 0));
            raw.cells.push(cell(round, Peer::Haproxy, &[relay / 2.0 * slow, relay / 2.0 * slow], 0));
            raw.cells.push(cell(round, Peer::Relay, &[relay / 2.0 * slow, relay / 2.0 * slow], errors));
        }
        raw
    }

    #[test]
    fn a_run_counts_while_relay_stands_to_envoy_as_it_did() {
        let report = Report::new(&plan(vec![Load::Http1]), drifting(21.5, 0));
        assert!(report.counts(), "{}", report.text());
        assert_eq!(report.checks[0].measured, Some(0.43));
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
        assert!(judged.contains("0.516"), "{text}");
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
