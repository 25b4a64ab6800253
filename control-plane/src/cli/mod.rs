//! The `weft` command: what people type, and what they read.
//!
//! Why it asks the controller and nothing else: every answer here is one request to one JSON API, so whatever a
//! person sees a script can have too (`-o json` is the API's own answer). A command that fails says what to do
//! next, because an error message is the documentation that is read.
//!
//! One file a command; `output` draws and writes, `client` asks. No command knows of another but for what both show.

use std::{io, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod certs;
mod check;
mod client;
mod cluster;
pub mod demo;
mod endpoints;
mod inject;
mod install;
mod output;
mod routes;
mod status;
mod token;
mod trust;
mod wait;

/// Weft, a service mesh.
#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    about = "Weft, a service mesh: see it run, see what it does, know when a change is live",
    after_help = "Start here:\n  weft demo                 a whole mesh on this machine, explained as it runs\n  weft routes --watch       latency of every route, live\n  weft status               every object: is it right, and is it live everywhere?"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole mesh on this machine and watch what it does
    Demo(demo::DemoArgs),
    /// Success rate, rate and latency histogram of every route
    Routes(routes::RoutesArgs),
    /// Objects: are they right, and in how many sidecars are they live?
    Status(status::StatusArgs),
    /// Wait until an object is live in every sidecar that it concerns
    Wait(wait::WaitArgs),
    /// Endpoints as their callers see them: health, cost, requests
    Endpoints(endpoints::EndpointsArgs),
    /// Trust anchors and workload certificates
    Certs(certs::CertsArgs),
    /// What is missing or wrong in the cluster, before and after the installation, each with its fix
    Check(check::CheckArgs),
    /// Who still speaks plaintext to whom: what stands in the way of strict mTLS
    Trust(trust::TrustArgs),
    /// Make a join token for a workload outside Kubernetes
    Token(token::TokenArgs),
    /// Add sidecars to manifests, as the cluster's injector would
    Inject(inject::InjectArgs),
    /// What an installation consists of, as YAML
    Install(install::InstallArgs),
    /// The demo's app servers
    #[command(hide = true)]
    DemoApp(demo::AppArgs),
}

/// Runs the command that was typed. Exit codes: 0 as hoped, 1 not, 2 wrong usage.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::main(&args),
        Command::DemoApp(args) => demo::app(&args),
        Command::Token(args) => token::main(&args),
        Command::Inject(args) => inject::main(&args),
        Command::Install(args) => install::main(&args),
        Command::Routes(args) => asking(routes::main(&args)),
        Command::Status(args) => asking(status::main(&args)),
        Command::Wait(args) => asking(wait::main(&args)),
        Command::Endpoints(args) => asking(endpoints::main(&args)),
        Command::Certs(args) => asking(certs::main(&args)),
        Command::Trust(args) => asking(trust::main(&args)),
        Command::Check(args) => asking(check::main(&args)),
    };
    match result {
        Ok(code) => code,
        // Whoever read us (`| head`) has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn asking(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        tokio::select! {
            done = command => done,
            // The usual code of what Ctrl-C ended.
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
        }
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                help.contains(&format!("weft {}", command.get_name())),
                "{}: {help:?}",
                command.get_name()
            );
            assert!(
                command.get_arguments().any(|arg| arg.get_long() == Some("output")),
                "{} has no -o json",
                command.get_name()
            );
        }
    }
}
