//! `weft-iptables`: captures the connections of one pod, or shows how, or lets them go again. Called by a container
//! runtime it is a CNI plugin (see [`weft_iptables::cni`]).
//!
//! It runs once, before the app, in the pod's network namespace and with `NET_ADMIN`; then it exits. The
//! sidecar itself needs no privilege because this program had it. Running it twice, or after a crash, or
//! with other options, leads to the same rules as running it once.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use weft_iptables::apply::{self, Backend};
use weft_iptables::config::{Config, Options};
use weft_iptables::install::{self, InstallOptions};
use weft_iptables::{cni, probe, rules};

/// Redirects the TCP connections of this network namespace to weft-proxy.
#[derive(Parser)]
#[command(name = "weft-iptables", version, after_help = EXAMPLE)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
    /// Which iptables to write; else the one that holds rules already, or works
    #[arg(long, value_enum, value_name = "BACKEND")]
    backend: Option<Backend>,
    /// Print what would be given to iptables-restore, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Remove Weft's rules and nothing else
    #[arg(long)]
    cleanup: bool,
    /// How to print the result
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t = Format::Text)]
    output: Format,
}

#[derive(Subcommand)]
enum Command {
    /// Look whether this pod is captured, before there is a sidecar; needs no capability
    #[command(after_help = "Example, as the init container weft-check runs it:\n  weft-iptables check")]
    Check {
        /// The proxy's listener for connections that the app opens
        #[arg(long, value_name = "PORT", default_value_t = weft_core::ports::OUTBOUND)]
        outbound_port: u16,
        #[command(flatten)]
        excluded: probe::Excluded,
    },
    /// Put the CNI plugin on this node, keep it there, and take it away at the end
    #[command(
        after_help = "Example, as the chart's DaemonSet runs it:\n  weft-iptables cni-install --bin-dir /host/opt/cni/bin --conf-dir /host/etc/cni/net.d"
    )]
    CniInstall(InstallOptions),
    /// Look whether the CNI plugin stands on this node
    #[command(
        after_help = "Example, as the DaemonSet's readiness probe runs it:\n  weft-iptables cni-ready --bin-dir /host/opt/cni/bin --conf-dir /host/etc/cni/net.d"
    )]
    CniReady(InstallOptions),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

const EXAMPLE: &str =
    "Example: capture everything but SSH towards the pod and the app's SMTP, and look at the rules first:
  weft-iptables --exclude-inbound-ports 22 --exclude-outbound-ports 25,465 --dry-run
  weft-iptables --exclude-inbound-ports 22 --exclude-outbound-ports 25,465
Undo:
  weft-iptables --cleanup

Exit status: 0 done (or nothing to do), 1 the rules could not be applied, 2 the options cannot be enforced.";

fn main() -> ExitCode {
    if std::env::var_os("CNI_COMMAND").is_some() {
        let (answer, well) = cni::run(|name| std::env::var(name).ok(), std::io::stdin());
        if !answer.is_null() {
            println!("{answer}");
        }
        return if well { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let cli = Cli::parse();
    match &cli.command {
        Some(Command::Check { outbound_port, excluded }) => {
            return ended(probe::captured(*outbound_port, excluded));
        }
        Some(Command::CniInstall(options)) => return ended(keep_installed(options)),
        Some(Command::CniReady(options)) => return ended(install::stands(options)),
        None => {}
    }
    let config = match cli.options.validate() {
        Ok(config) => config,
        Err(invalid) => {
            let messages: Vec<String> = invalid.0.iter().map(ToString::to_string).collect();
            fail(cli.output, &messages);
            return ExitCode::from(2);
        }
    };
    match run(&cli, &config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            fail(cli.output, &[error.to_string()]);
            ExitCode::FAILURE
        }
    }
}

fn ended<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-iptables: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Until SIGTERM or SIGINT.
fn keep_installed(options: &InstallOptions) -> std::io::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    // Blocked here and in what is started from here: they wait for whoever asks, also where this is process 1.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    let told = stop.clone();
    std::thread::spawn(move || {
        // It fails for a set that holds no signal.
        let _ = signals.wait();
        told.store(true, Ordering::Relaxed);
    });
    install::keep(options, &stop)
}

fn run(cli: &Cli, config: &Config) -> Result<(), apply::Error> {
    if cli.dry_run {
        let plans = if cli.cleanup {
            apply::planned_cleanup(config.families(), cli.backend)?
                .into_iter()
                .map(|(family, backend, rules)| (family, Some(backend), rules))
                .collect()
        } else {
            let families = config.families().list().iter();
            families.map(|&family| (family, cli.backend, rules::render(config, family))).collect::<Vec<_>>()
        };
        match cli.output {
            Format::Text if plans.is_empty() => println!("# nothing to remove"),
            Format::Text => {
                for (family, backend, rules) in plans {
                    let backend = backend.map(|b| format!(" ({b})")).unwrap_or_default();
                    print!("# {family}{backend}\n{rules}");
                }
            }
            Format::Json => {
                let plans: Vec<_> = plans
                    .into_iter()
                    .map(|(family, backend, rules)| json!({"family": family, "backend": backend, "rules": rules}))
                    .collect();
                println!("{}", json!({"dryRun": true, "families": plans}));
            }
        }
        return Ok(());
    }
    let reports = if cli.cleanup {
        apply::cleanup(config.families(), cli.backend)?
    } else {
        apply::install(config, cli.backend)?
    };
    match cli.output {
        Format::Text => reports.iter().for_each(|report| println!("{report}")),
        Format::Json => println!("{}", json!({"dryRun": false, "families": reports})),
    }
    Ok(())
}

fn fail(output: Format, messages: &[String]) {
    match output {
        Format::Text => messages.iter().for_each(|message| eprintln!("weft-iptables: {message}")),
        Format::Json => eprintln!("{}", json!({"errors": messages})),
    }
}
