//! What is run: rounds of every pair under every load, one pair alive at a time.
//!
//! Why interleaved and restarted: whatever drifts (a neighbour on the host, memory that fills) drifts
//! for all pairs alike, and no pair's idle process wakes up within another's measurement.

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use crate::{
    load::{self, Kind, Load, Seen},
    net::{Group, HTTP1_PORT},
    objects,
    peers::{Peer, Running, World},
    sample::{Cpu, resident},
    weft::{self, Sidecars},
};

/// What to run.
pub(crate) struct Plan {
    pub(crate) pairs: Vec<Peer>,
    pub(crate) loads: Vec<Load>,
    pub(crate) rounds: u32,
    pub(crate) measured: Duration,
    pub(crate) warm_up: Duration,
    /// Services in the clusters in which the memory of Weft's sidecars is looked at.
    pub(crate) clusters: Vec<usize>,
    /// The folder of `relay`, `weft-proxy` and `weft-controller`.
    pub(crate) programs: PathBuf,
    pub(crate) envoy: Option<PathBuf>,
    pub(crate) out: PathBuf,
}

/// Everything a run measured, raw.
#[derive(Default, Serialize)]
pub(crate) struct Results {
    pub(crate) machine: String,
    /// Of the peers, as they say themselves.
    pub(crate) versions: Vec<String>,
    pub(crate) cells: Vec<Cell>,
    pub(crate) memory: Vec<Memory>,
    pub(crate) clusters: Vec<Cluster>,
    /// What could not be measured, and why.
    pub(crate) failed: Vec<String>,
}

/// What Weft's sidecars hold in a cluster of so many services, ten of them in use.
#[derive(Serialize)]
pub(crate) struct Cluster {
    pub(crate) services: usize,
    pub(crate) client: u64,
    pub(crate) server: u64,
}

/// One pair under one load in one round.
#[derive(Serialize)]
pub(crate) struct Cell {
    pub(crate) round: u32,
    pub(crate) pair: Peer,
    pub(crate) load: Load,
    /// CPU µs per request of the client's proxy, then of the server's; empty without proxies.
    pub(crate) cpu_us: Vec<f64>,
    /// Resident bytes per resting connection, in the same order; empty where none rests.
    pub(crate) resting: Vec<f64>,
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
        Results { machine: machine(), versions: world.versions(&plan.pairs), ..Results::default() };
    for round in 1..=plan.rounds {
        for &pair in &plan.pairs {
            one_round(plan, &world, round, pair, &mut results).await?;
        }
    }
    for &services in &plan.clusters {
        match in_cluster(&world, services).await {
            Ok(cluster) => results.clusters.push(cluster),
            // Of everything else there are figures.
            Err(e) => results.failed.push(format!("memory at {services} services: {e:#}")),
        }
    }
    Ok(results)
}

/// One pair under every load that this round has.
async fn one_round(plan: &Plan, world: &World, round: u32, pair: Peer, results: &mut Results) -> Result<()> {
    let due = |load: &Load| round <= load.rounds(plan.rounds) && load.cannot(pair).is_none();
    let mut running = world.start(pair).await?;
    // Memory of one that has answered a single request and rests.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let idle = memory(&running)?;
    for load in plan.loads.iter().copied().filter(due) {
        let cell = match load.kind() {
            Kind::Resting { .. } => continue,
            Kind::Saturated | Kind::Paced | Kind::Bulk | Kind::Opened => {
                measure(plan, world, &mut running, round, pair, load).await
            }
        };
        results.add(plan, cell.with_context(|| format!("{pair} under {load}"))?);
    }
    let after = memory(&running)?;
    if let Some(first) = running.first_answer {
        let first_answer_ms = first.as_secs_f64() * 1e3;
        results.memory.push(Memory { round, pair, idle, after, first_answer_ms });
    }
    drop(running);
    for load in plan.loads.iter().copied().filter(due) {
        if let Kind::Resting { connections } = load.kind() {
            let cell = rest(world, round, pair, load, connections).await;
            results.add(plan, cell.with_context(|| format!("{pair} under {load}"))?);
        }
    }
    Ok(())
}

impl Results {
    fn add(&mut self, plan: &Plan, cell: Cell) {
        let cpu = cell.cpu_us.iter().fold(0.0, |sum, side| sum + side);
        let (round, pair, seen) = (cell.round, cell.pair, &cell.seen);
        let load = cell.load.to_string();
        eprint!("round {round}/{} {pair:<7} {load:<48} ", plan.rounds);
        match cell.load.kind() {
            Kind::Saturated | Kind::Paced | Kind::Opened => eprintln!(
                "{cpu:>7.1} µs {:>8.0}/s p99 {:.2} ms, {} errors",
                seen.requests as f64 / seen.seconds,
                seen.p99_us / 1e3,
                seen.errors
            ),
            Kind::Bulk => eprintln!(
                "{:>7.2} CPU-s/GB {:>6.0} MB/s",
                cpu * seen.requests as f64 / seen.bytes * 1e3,
                seen.bytes / seen.seconds / 1e6
            ),
            Kind::Resting { .. } => {
                let each: Vec<String> =
                    cell.resting.iter().map(|bytes| format!("{:.1}", bytes / 1024.0)).collect();
                eprintln!("{} KiB each", each.join(" and "));
            }
        }
        self.cells.push(cell);
    }
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
    // What is not in every round is not for every second either.
    let measured = if load.rounds(u32::MAX) == u32::MAX { plan.measured } else { plan.measured.div_f64(2.0) };
    load.run(from, running.host, plan.warm_up, dir).await?;
    let before = cpu(running)?;
    let work = load.run(from, running.host, measured, dir);
    let seen = if load == Load::Rules {
        tokio::try_join!(work, change(world, running.host, measured))?.0
    } else {
        work.await?
    };
    let after = cpu(running)?;
    for process in &mut running.proxies {
        process.check(dir)?;
    }
    let per_request =
        |(after, before): (&Cpu, &Cpu)| after.since(before).as_secs_f64() * 1e6 / seen.requests as f64;
    let cpu_us = after.iter().zip(&before).map(per_request).collect();
    Ok(Cell { round, pair, load, cpu_us, resting: vec![], seen })
}

/// Memory of sidecars whose cluster has so many services, once ten of them have been used.
async fn in_cluster(world: &World, services: usize) -> Result<Cluster> {
    let mut running = weft::start(world, &Sidecars { services, ..Sidecars::shipped(world) }).await?;
    for n in 0..objects::USED.min(services) {
        running.host = objects::service_address(n);
        world.answers(&mut running, "weft", Duration::from_secs(30)).await?;
    }
    tokio::time::sleep(TO_REST).await;
    let [client, server] = memory(&running)?[..] else { bail!("a pair has two sides") };
    eprintln!("{services} services: {} and {} KiB", client / 1024, server / 1024);
    Ok(Cluster { services, client, server })
}

/// New rules each second, and proof that the last of them went live.
async fn change(world: &World, host: Ipv4Addr, time: Duration) -> Result<()> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let generations = (time.as_secs() as u32).max(1);
    for generation in 1..=generations {
        ticks.tick().await;
        weft::change_rules(world, generation)?;
    }
    let mut probe = world.network.client.command(std::env::current_exe()?, Group::App);
    probe.args(["probe", "--to", &format!("{host}:{HTTP1_PORT}"), "--status=302"]);
    let live = load::output(probe.args(["--path", &weft::changed_path(generations)])).await;
    live.context("a change of rules did not go live").map(drop)
}

/// What resting connections add to a pair that has just been started: one that has been at work has memory left over
/// that they would hide in.
async fn rest(world: &World, round: u32, pair: Peer, load: Load, connections: usize) -> Result<Cell> {
    let mut running = world.start(pair).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = memory(&running)?;
    let held = load.hold(&world.network.client, running.host, connections).await?;
    tokio::time::sleep(TO_REST).await;
    let after = memory(&running)?;
    for process in &mut running.proxies {
        process.check(&world.dir)?;
    }
    drop(held);
    let each = |(after, before): (&u64, &u64)| after.saturating_sub(*before) as f64 / connections as f64;
    let resting = after.iter().zip(&before).map(each).collect();
    let seen = Seen { requests: connections as u64, ..Seen::default() };
    Ok(Cell { round, pair, load, cpu_us: vec![], resting, seen })
}

/// Until a connection that has had its answer counts as idle, for those that give memory back then.
const TO_REST: Duration = Duration::from_millis(1_500);

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
