//! Weft's controller: flags → configuration → controller, until it is told to stop.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _};
use weft_control_plane::config::{Cli, Config, LogFormat, ServeArgs};

fn main() -> ExitCode {
    match serve(&Cli::parse().serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    harden()?;
    let config = Config::new(args)?;
    log(args)?;
    raise_descriptor_limit();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
        let stop = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        weft_control_plane::run(config, stop).await
    })
}

/// The issuer's key lives in this process: no dump of its memory, no debugger of the same user, and no program that it
/// could start would gain anything.
fn harden() -> anyhow::Result<()> {
    use nix::sys::{
        prctl::{set_dumpable, set_no_new_privs},
        resource::{Resource, setrlimit},
    };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("RLIMIT_CORE")?;
    set_dumpable(false).context("PR_SET_DUMPABLE")?;
    set_no_new_privs().context("no_new_privs")
}

/// As many descriptors as the hard limit allows: each sidecar needs one, and a container is often given 1,024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the descriptor limit stays as it is");
    }
}

fn log(args: &ServeArgs) -> anyhow::Result<()> {
    let filter: Targets = args.log.parse().with_context(|| format!("--log {}", args.log))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let logs = tracing_subscriber::registry().with(filter);
    let set = match args.log_format {
        LogFormat::Text => logs.with(lines).try_init(),
        LogFormat::Json => logs.with(lines.json()).try_init(),
    };
    set.map_err(|error| anyhow::anyhow!("logging: {error}"))
}
