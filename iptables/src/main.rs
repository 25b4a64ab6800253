//! `weft-iptables`: captures the connections of one pod, or shows how, or lets them go again.
//!
//! It runs once, before the app, in the pod's network namespace and with `NET_ADMIN`; then it exits. The
//! sidecar itself needs no privilege because this program had it. Running it twice, or after a crash, or
//! with other options, leads to the same rules as running it once.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use serde_json::json;
use weft_iptables::apply::{self, Backend};
use weft_iptables::config::{Config, Options};
use weft_iptables::rules;

/// Redirects the TCP connections of this network namespace to weft-proxy.
#[derive(Parser)]
#[command(name = "weft-iptables", version, after_help = EXAMPLE)]
struct Cli {
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
    let cli = Cli::parse();
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
