//! `weft-cluster`: a real Kubernetes cluster on this machine, brought up and taken down by hand.
//!
//! The tests use the same launcher (`weft_harness::cluster`); this is its other door, for whoever wants to look
//! inside with kubectl.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use weft_harness::cluster::{self, Options, builds, images};

/// A real Kubernetes cluster on this machine: kubelet, API server and containerd in namespaces of their own.
#[derive(Parser)]
#[command(name = "weft-cluster", version, after_help = EXAMPLE)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a cluster up and say how to use it; nothing is done if it is up
    Up {
        /// One node or two, each in a zone of its own
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
        nodes: u8,
        /// IPv6 beside IPv4
        #[arg(long)]
        dual: bool,
    },
    /// End it and remove all of it, also after a crash; nothing is done if there is none
    Down,
    /// Say whether it is up, and how to use it
    Status,
    /// Build the cluster's programs, which `up` would do otherwise
    Build,
    /// Write images of static programs: OCI layouts and docker-archives
    Images {
        /// Where the static programs lie
        #[arg(long, value_name = "FOLDER")]
        programs: PathBuf,
        /// Where the images go
        #[arg(long, value_name = "FOLDER", default_value = "target/images")]
        out: PathBuf,
        /// The tag of Weft's images
        #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
        tag: String,
        /// Only the bed's own (the suite's echo pair, pause), or only Weft's
        #[arg(long, value_enum, default_value = "weft")]
        of: Of,
    },
    /// Run the official Gateway API suite on the cluster that is up
    Conformance {
        /// Where its report goes
        #[arg(long, value_name = "FILE", default_value = "target/conformance.yaml")]
        report: PathBuf,
        /// Flags of the suite, as --run-test=MeshBasic
        #[arg(last = true)]
        flags: Vec<String>,
    },
    /// Import image archives into every node
    Load {
        /// docker-archives
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Of {
    Weft,
    Bed,
}

const EXAMPLE: &str = "Example:
  weft-cluster up --nodes 2 --dual
  weft-cluster load target/images/*.tar
  weft-cluster down

WEFT_CLUSTER_CACHE names the folder that keeps built programs (default: target/cluster).
Exit status: 0 done, 1 failed, 3 there can be no cluster on this machine (the reason is printed).";

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("weft-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { nodes, dual } => {
            if let Err(reason) = cluster::usable() {
                eprintln!("weft-cluster: SKIPPED: {reason:#}");
                return Ok(ExitCode::from(3));
            }
            println!("{}", cluster::up(Options { nodes, dual })?.usage()?);
        }
        Command::Down => {
            cluster::down()?;
            let left = cluster::leftovers()?;
            ensure!(left.is_empty(), "left behind: {}", left.join(", "));
        }
        Command::Status => match cluster::current()? {
            Some(cluster) => println!("{}", cluster.usage()?),
            None => println!("No cluster is up (make cluster-up)."),
        },
        Command::Build => {
            if let Err(reason) = cluster::usable() {
                eprintln!("weft-cluster: SKIPPED: {reason:#}");
                return Ok(ExitCode::from(3));
            }
            for piece in builds::ALL {
                piece.build()?;
            }
        }
        Command::Images { programs, out, tag, of } => {
            let (made, out) = match of {
                Of::Weft => (images::of_weft(&programs, &tag)?, out),
                Of::Bed => (images::of_the_bed(&programs)?, images::bed_folder()),
            };
            for image in made {
                let written = image.write(&out)?;
                println!(
                    "figure: MB of image {}: {:.1}\n  {} ({})",
                    written.name,
                    written.bytes as f64 / 1e6,
                    written.archive.display(),
                    written.digest
                );
            }
        }
        Command::Load { archives } => {
            let cluster = cluster::current()?.context("no cluster is up (make cluster-up)")?;
            let archives: Result<Vec<_>, _> = archives.iter().map(std::path::absolute).collect();
            cluster.load(&archives?)?;
        }
        Command::Conformance { report, flags } => {
            let cluster = cluster::current()?.context("no cluster is up (make cluster-up)")?;
            ensure!(
                cluster.conformance(&std::path::absolute(report)?, None, &flags)?,
                "the suite found something"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
