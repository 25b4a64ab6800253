//! A run's report for people: a table for each load, the targets, and whether the run counts.
//!
//! Why a shape of table for each kind of load: latency under saturation says how long the queue was, and a stream has
//! no requests. A column that means nothing is not printed.

use std::fmt::{Result, Write as _};

use crate::{
    load::{Kind, Load},
    peers::Peer,
    report::{Report, Row, TOLERANCE, Verdict},
};

impl Report {
    /// The table.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> Result {
        writeln!(
            out,
            "Medians of up to {} interleaved rounds, {} s each, {} s where there are fewer; CPU is user + system of both proxies.",
            self.rounds,
            self.measured_seconds,
            self.measured_seconds / 2.0
        )?;
        writeln!(out, "{}.", self.raw.machine)?;
        self.raw.versions.iter().try_for_each(|version| writeln!(out, "{version}."))?;
        let mut current = None;
        for row in &self.rows {
            if current.replace(row.load) != Some(row.load) {
                let rounds =
                    if row.rounds == 1 { "1 round".to_owned() } else { format!("{} rounds", row.rounds) };
                writeln!(out, "\n{} ({rounds})", row.load)?;
                write_line(out, "pair", columns(row).map(|(name, _)| name.to_owned()))?;
            }
            write_line(out, &row.pair.to_string(), columns(row).map(|(_, value)| value))?;
        }
        writeln!(out, "\nMemory of one proxy (mean of the two), MiB; start to first answer, ms")?;
        writeln!(out, "  {:<8}{:>8}{:>12}{:>14}", "pair", "idle", "after load", "first answer")?;
        for row in &self.memory {
            writeln!(
                out,
                "  {:<8}{:>8.1}{:>12.1}{:>14.0}",
                row.pair, row.idle_mib, row.after_mib, row.first_answer_ms
            )?;
        }
        if !self.raw.clusters.is_empty() {
            writeln!(
                out,
                "\nMemory of Weft's sidecars by the size of the cluster, ten services in use, MiB"
            )?;
            writeln!(out, "  {:>8}{:>9}{:>9}", "services", "client", "server")?;
        }
        for cluster in &self.raw.clusters {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let (client, server) = (mib(cluster.client), mib(cluster.server));
            writeln!(out, "  {:>8}{client:>9.2}{server:>9.2}", cluster.services)?;
        }
        self.write_left_out(out)?;
        self.write_targets(out)?;
        self.write_checks(out)
    }

    fn write_left_out(&self, out: &mut String) -> Result {
        if self.left_out.is_empty() {
            return Ok(());
        }
        writeln!(out, "\nNot measured")?;
        self.left_out.iter().try_for_each(|why| writeln!(out, "  {why}"))
    }

    fn write_targets(&self, out: &mut String) -> Result {
        if self.targets.is_empty() {
            return Ok(());
        }
        writeln!(out, "\n{:<72}{:>8}{:>8}{:>8}", "Weft against its targets", "is", "must ≤", "goal ≤")?;
        for target in &self.targets {
            let bound = |bound: Option<f64>| bound.map_or_else(String::new, |bound| bound.to_string());
            writeln!(
                out,
                "  {:<70}{:>8.3}{:>8}{:>8}  {}",
                target.what,
                target.value,
                bound(target.must),
                bound(target.goal),
                target.verdict()
            )?;
        }
        Ok(())
    }

    fn write_checks(&self, out: &mut String) -> Result {
        writeln!(
            out,
            "\nDoes this run count? CPU of the relay over that of another, within {:.0} %:",
            TOLERANCE * 100.0
        )?;
        for check in &self.checks {
            let verdict = match (check.verdict, check.to) {
                (Verdict::Within, _) => "yes",
                (Verdict::Dearer, Peer::Envoy) => {
                    "yes, by the relay: Envoy is dearer here, and a ratio to it would flatter"
                }
                (Verdict::Dearer, _) => "yes: it is dearer here, and no target hangs on it",
                (Verdict::Cheaper | Verdict::NotMeasured, _) => "NO",
            };
            let (load, to, measured) = (check.load, check.to, number(check.measured, 2));
            writeln!(out, "  {load:<42}{to:<8}{measured:>6}, expected {:.2}: {verdict}", check.expected)?;
        }
        match self.does_not_count.as_slice() {
            [] => writeln!(out, "This run counts."),
            reasons => {
                writeln!(out, "THIS RUN DOES NOT COUNT:")?;
                reasons.iter().try_for_each(|reason| writeln!(out, "  {reason}"))
            }
        }
    }
}

/// What is said of a pair under a load of this kind.
fn columns(row: &Row) -> impl Iterator<Item = (&'static str, String)> + use<> {
    let fixed = |value: f64, digits: usize| format!("{value:.digits$}");
    let ratios = [("× envoy", number(row.to_envoy, 2)), ("× relay", number(row.to_relay, 2))];
    let cpu = [
        ("CPU µs", number(row.cpu_us, 1)),
        ("client", number(row.cpu_us_client, 1)),
        ("server", number(row.cpu_us_server, 1)),
    ];
    let latencies = [
        ("p50 ms", fixed(row.p50_ms, 2)),
        ("p99 ms", fixed(row.p99_ms, 2)),
        ("p99.9", fixed(row.p999_ms, 2)),
    ];
    let rate = |name| (name, fixed(row.requests_per_second, 0));
    let errors = ("errors", row.errors.to_string());
    let mut columns = Vec::new();
    match row.load.kind() {
        Kind::Saturated => {
            columns.extend(cpu);
            columns.extend(ratios);
            columns.push(rate("req/s"));
            columns.extend(latencies);
            columns.push(errors);
        }
        Kind::Paced => {
            columns.extend(cpu);
            columns.extend(ratios);
            columns.extend(latencies);
            columns.push(("+p50 ms", number(row.added_p50_ms, 2)));
            columns.push(("+p99 ms", number(row.added_p99_ms, 2)));
            columns.push(("+p99.9", number(row.added_p999_ms, 2)));
            if row.load == Load::Handshakes {
                columns.push(("shakes/s", fixed(row.beside_per_second, 0)));
            }
            columns.push(errors);
        }
        Kind::Bulk => {
            columns.push(("CPU-s/GB", number(row.cpu_s_per_gb, 2)));
            columns.extend(ratios);
            columns.push(("MB/s", fixed(row.mb_per_second, 0)));
            columns.push(errors);
        }
        Kind::Opened => {
            columns.extend(cpu);
            columns.extend(ratios);
            columns.push(rate("conn/s"));
            columns.extend(latencies);
            columns.push(errors);
        }
        Kind::Resting { .. } => {
            columns.push(("KiB each", String::new()));
            columns.push(("client", number(row.resting_kib_client, 1)));
            columns.push(("server", number(row.resting_kib_server, 1)));
        }
    }
    columns.into_iter()
}

fn write_line(out: &mut String, pair: &str, cells: impl Iterator<Item = String>) -> Result {
    write!(out, "  {pair:<8}")?;
    for cell in cells {
        write!(out, "{cell:>9}")?;
    }
    writeln!(out)
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}
