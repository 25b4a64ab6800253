//! What the scale bench found, beside what was promised.

use std::{fmt::Write as _, time::Duration};

use serde::Serialize;

/// Everything that a run found.
#[derive(Default, Serialize)]
pub(crate) struct Report {
    pub(crate) sidecars: usize,
    pub(crate) services: usize,
    pub(crate) destinations: usize,
    pub(crate) active: usize,
    pub(crate) source: String,
    pub(crate) cores: usize,
    pub(crate) rows: Vec<Row>,
    /// What is odd: connections that failed, answers that were refused.
    pub(crate) notes: Vec<String>,
}

/// One figure.
#[derive(Serialize)]
pub(crate) struct Row {
    scenario: &'static str,
    figure: &'static str,
    value: f64,
    unit: &'static str,
    must: Option<f64>,
    goal: Option<f64>,
}

/// What a figure may be at most: what it must not exceed, and what it should not.
pub(crate) type Bound = Option<(f64, f64)>;

impl Report {
    pub(crate) fn add(
        &mut self,
        scenario: &'static str,
        figure: &'static str,
        value: f64,
        unit: &'static str,
        bound: Bound,
    ) {
        let (must, goal) = (bound.map(|(must, _)| must), bound.map(|(_, goal)| goal));
        eprintln!("  {figure}: {}{unit}", short(value));
        self.rows.push(Row { scenario, figure, value, unit, must, goal });
    }

    /// Median, 99th percentile and maximum of times.
    pub(crate) fn times(&mut self, scenario: &'static str, mut times: Vec<Duration>, p99: Bound) {
        times.sort_unstable();
        let at = |share: f64| {
            let position = (times.len() as f64 * share).ceil() as usize;
            times.get(position.max(1) - 1).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
        };
        let p99 = p99.map(|(must, goal)| (must * 1e3, goal * 1e3));
        self.add(scenario, "p50", at(0.5), " ms", None);
        self.add(scenario, "p99", at(0.99), " ms", p99);
        self.add(scenario, "max", at(1.0), " ms", None);
    }

    /// Whether every figure is within what it must be.
    pub(crate) fn holds(&self) -> bool {
        self.rows.iter().all(|row| row.must.is_none_or(|must| row.value <= must))
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} sidecars of {} services, {} destinations each, {} of them in use; source {}; {} cores\n\n",
            self.sidecars, self.services, self.destinations, self.active, self.source, self.cores
        );
        let _ = writeln!(text, "{:<44} {:<26} {:>12} {:>9} {:>9}", "", "", "", "must", "goal");
        let mut last = "";
        for row in &self.rows {
            let scenario = if row.scenario == last { "" } else { row.scenario };
            last = row.scenario;
            let bound =
                |bound: Option<f64>| bound.map_or_else(String::new, |bound| format!("≤ {}", short(bound)));
            let verdict = match (row.must, row.goal) {
                (Some(must), _) if row.value > must => "  MISSED",
                (_, Some(goal)) if row.value > goal => "  within must, not goal",
                (Some(_), Some(_)) => "  goal",
                (None | Some(_), None) | (None, Some(_)) => "",
            };
            let value = format!("{}{}", short(row.value), row.unit);
            let _ = writeln!(
                text,
                "{scenario:<44} {:<26} {value:>12} {:>9} {:>9}{verdict}",
                row.figure,
                bound(row.must),
                bound(row.goal)
            );
        }
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        text
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        big if big >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_bound_is_said_and_fails_the_run() {
        let mut report = Report::default();
        report.times("a", (1..=100).map(Duration::from_millis).collect(), Some((0.2, 0.05)));
        assert!(report.holds());
        let text = report.text();
        assert!(text.contains("50.0 ms") && text.contains("99.0 ms"), "{text}");
        assert!(text.contains("within must, not goal"), "{text}");
        report.add("b", "RSS", 1_000.0, " MiB", Some((900.0, 500.0)));
        assert!(!report.holds());
        assert!(report.text().contains("MISSED"));
    }
}
