//! What is run: rounds of every pair under every load, one pair alive at a time.
//!
//! Why interleaved and restarted: whatever drifts (a neighbour on the host, memory that fills) drifts
//! for all pairs alike, and no pair's idle process wakes up within another's measurement.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{
    load::{Load, Seen},
    peers::{Peer, Running, World},
    sample::{Cpu, resident},
};

/// What to run.
pub(crate) struct Plan {
    pub(crate) pairs: Vec<Peer>,
    pub(crate) loads: Vec<Load>,
    pub(crate) rounds: u32,
    pub(crate) measured: Duration,
    pub(crate) warm_up: Duration,
    /// The folder of `relay`, `weft-proxy` and `weft-controller`.
    pub(crate) programs: PathBuf,
    pub(crate) envoy: Option<PathBuf>,
    pub(crate) out: PathBuf,
}

/// Everything a run measured, raw.
#[derive(Default, Serialize)]
pub(crate) struct Results {
    pub(crate) machine: String,
    pub(crate) envoy_version: Option<String>,
    pub(crate) cells: Vec<Cell>,
    pub(crate) memory: Vec<Memory>,
}

/// One pair under one load in one round.
#[derive(Serialize)]
pub(crate) struct Cell {
    pub(crate) round: u32,
    pub(crate) pair: Peer,
    pub(crate) load: Load,
    /// CPU µs per request of the client's proxy, then of the server's; empty without proxies.
    pub(crate) cpu_us: Vec<f64>,
    #[serde(flatten)]
    pub(crate) seen: Seen,
}

/// One pair's memory in one round, bytes: the client's proxy, then the server's.
#[derive(Serialize)]
pub(crate) struct Memory {
    pub(crate) round: u32,
    pub(crate) pair: Peer,
    pub(crate) idle: Vec<u64>,
    pub(crate) after: Vec<u64>,
    pub(crate) first_answer_ms: f64,
}

/// Runs it all. Dropping the future ends every program and deletes the namespaces.
pub(crate) async fn run(plan: &Plan) -> Result<Results> {
    let world = World::new(&plan.pairs, &plan.out, plan.programs.clone(), plan.envoy.clone())?;
    let mut results =
        Results { machine: machine(), envoy_version: world.envoy_version(), ..Results::default() };
    for round in 1..=plan.rounds {
        for &pair in &plan.pairs {
            let mut running = world.start(pair).await?;
            // Memory of one that has answered a single request and rests.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let idle = memory(&running)?;
            for &load in &plan.loads {
                let cell = measure(plan, &world, &mut running, round, pair, load).await;
                let cell = cell.with_context(|| format!("{pair} under {load}"))?;
                let cpu = cell.cpu_us.iter().fold(0.0, |sum, side| sum + side);
                let rate = cell.seen.requests as f64 / cell.seen.seconds;
                eprintln!(
                    "round {round}/{} {pair:<6} {load:<40} {cpu:>6.1} µs/request {rate:>9.0}/s p99 {:.2} ms, {} errors",
                    plan.rounds,
                    cell.seen.p99_us / 1e3,
                    cell.seen.errors,
                    load = load.to_string(),
                );
                results.cells.push(cell);
            }
            let after = memory(&running)?;
            if let Some(first) = running.first_answer {
                results.memory.push(Memory {
                    round,
                    pair,
                    idle,
                    after,
                    first_answer_ms: first.as_secs_f64() * 1e3,
                });
            }
        }
    }
    Ok(results)
}

async fn measure(
    plan: &Plan,
    world: &World,
    running: &mut Running,
    round: u32,
    pair: Peer,
    load: Load,
) -> Result<Cell> {
    let (from, dir) = (&world.network.client, &world.dir);
    load.run(from, running.host, plan.warm_up, dir).await?;
    let before = cpu(running)?;
    let seen = load.run(from, running.host, plan.measured, dir).await?;
    let after = cpu(running)?;
    for process in &mut running.proxies {
        process.check(dir)?;
    }
    let per_request =
        |(after, before): (&Cpu, &Cpu)| after.since(before).as_secs_f64() * 1e6 / seen.requests as f64;
    let cpu_us = after.iter().zip(&before).map(per_request).collect();
    Ok(Cell { round, pair, load, cpu_us, seen })
}

/// The processor's name, how many, and the kernel: what absolute figures depend on.
fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let models: Vec<&str> = info.lines().filter_map(|line| line.strip_prefix("model name\t: ")).collect();
    let model = models.first().copied().unwrap_or("unknown processor");
    format!("{} × {model}, Linux {}", models.len().max(1), read("/proc/sys/kernel/osrelease").trim())
}

fn cpu(running: &Running) -> Result<Vec<Cpu>> {
    running.proxies.iter().map(|process| Cpu::of(process.id())).collect()
}

fn memory(running: &Running) -> Result<Vec<u64>> {
    running.proxies.iter().map(|process| resident(process.id())).collect()
}
