//! What the shop's users saw: every request, as the load generator outside reports it.
//!
//! Why every request and not a summary: each step of the demo claims something about *its* stretch of time, and
//! only single requests can be cut at any moment.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{app::Seen, netns::Process};
use crate::cli::output::micros;

/// The running load.
pub(super) struct Users {
    // Killed before the thread that reads from it is forgotten.
    _process: Process,
    seen: Arc<Mutex<Vec<(Instant, Seen)>>>,
}

/// A stretch of time in figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Figures {
    /// Requests that ended in it.
    pub(super) requests: usize,
    /// Those that did not end in 200.
    pub(super) failed: usize,
    /// What was wrong, and how often.
    pub(super) errors: BTreeMap<String, usize>,
    /// Microseconds.
    pub(super) p50_us: u64,
    /// Microseconds.
    pub(super) p90_us: u64,
    /// Microseconds.
    pub(super) p99_us: u64,
    /// Answers by the api's pod.
    pub(super) pods: BTreeMap<String, usize>,
    /// Answers by the api's version.
    pub(super) versions: BTreeMap<String, usize>,
}

impl Users {
    /// Starts the generator.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let mut process = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let output = process.child().stdout.take().context("the load has no output")?;
        let seen: Arc<Mutex<Vec<(Instant, Seen)>>> = Arc::default();
        let into = seen.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { return };
                if let Ok(one) = serde_json::from_str(&line) {
                    into.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), one));
                }
            }
        });
        Ok(Self { _process: process, seen })
    }

    /// What was seen from a moment to another.
    pub(super) fn between(&self, from: Instant, to: Instant) -> Figures {
        let seen = self.seen();
        Figures::of(seen.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, one)| one))
    }

    /// What was seen since a moment.
    pub(super) fn since(&self, from: Instant) -> Figures {
        self.between(from, Instant::now())
    }

    fn seen(&self) -> MutexGuard<'_, Vec<(Instant, Seen)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Figures {
    fn of<'a>(seen: impl Iterator<Item = &'a Seen>) -> Self {
        let mut figures = Self::default();
        let mut latencies = Vec::new();
        for one in seen {
            figures.requests += 1;
            latencies.push(one.us);
            if one.error.is_empty() && one.status == 200 {
                *figures.pods.entry(one.pod.clone()).or_default() += 1;
                *figures.versions.entry(one.version.clone()).or_default() += 1;
            } else {
                figures.failed += 1;
                *figures.errors.entry(one.error.clone()).or_default() += 1;
            }
        }
        latencies.sort_unstable();
        let at = |percent: usize| {
            let rank = (latencies.len() * percent).div_ceil(100).max(1);
            latencies.get(rank - 1).copied().unwrap_or_default()
        };
        Self { p50_us: at(50), p90_us: at(90), p99_us: at(99), ..figures }
    }

    /// Of the answers, the share of one pod.
    pub(super) fn share_of(&self, pod: &str) -> f64 {
        self.pods.get(pod).copied().unwrap_or_default() as f64 / (self.requests - self.failed).max(1) as f64
    }

    /// Of the answers, the share of one version.
    pub(super) fn share_of_version(&self, version: &str) -> f64 {
        self.versions.get(version).copied().unwrap_or_default() as f64
            / (self.requests - self.failed).max(1) as f64
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        format!(
            "{} of {} requests failed; p50 {}, p90 {}, p99 {}",
            self.failed,
            self.requests,
            micros(self.p50_us),
            micros(self.p90_us),
            micros(self.p99_us)
        )
    }

    /// The commonest error, if there was one.
    pub(super) fn worst(&self) -> Option<String> {
        let (error, times) = self.errors.iter().max_by_key(|(_, times)| **times)?;
        Some(format!("{times} × {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_tell_how_many_failed_and_how_long_it_took() {
        let one = |us, status, pod: &str| Seen {
            us,
            status,
            pod: pod.into(),
            version: "v1".into(),
            error: if status == 200 { String::new() } else { "503 x".into() },
        };
        let seen: Vec<_> = (1..=98)
            .map(|us| one(us, 200, if us <= 49 { "a" } else { "b" }))
            .chain([one(5_000, 503, ""), one(99, 503, "")])
            .collect();
        let figures = Figures::of(seen.iter());
        assert_eq!((figures.requests, figures.failed), (100, 2));
        assert_eq!((figures.p50_us, figures.p99_us), (50, 99));
        assert!((figures.share_of("a") - 0.5).abs() < 1e-9);
        assert_eq!(figures.worst().as_deref(), Some("2 × 503 x"));
        assert_eq!(Figures::of([].iter()).p99_us, 0);
    }
}
