//! The apps that the tests run behind and in front of sidecars: an HTTP server whose habits can be chosen, and a
//! client in open loop that keeps the id of every request.
//!
//! Why a program and not tasks in the test: an app must be killable, must see SIGTERM, and must live in a pod's
//! own network namespace, like the real thing.

mod hold;
mod load;
mod server;

use anyhow::Result;
use clap::Parser;

use hold::Hold;
use load::Load;
use server::{Http, Tcp};

/// Test app: a server with habits, or a client that counts.
#[derive(Parser)]
enum Cli {
    /// HTTP/1.1 and HTTP/2 (prior knowledge) server.
    Http(Http),
    /// TCP server that sends back what it gets, after an optional greeting.
    Tcp(Tcp),
    /// Client in open loop; prints a JSON summary.
    Load(Load),
    /// TCP client that holds many connections open, as slow as it is told.
    Hold(Hold),
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match Cli::parse() {
            Cli::Http(http) => http.serve().await,
            Cli::Tcp(tcp) => tcp.serve().await,
            Cli::Load(load) => load.run().await,
            Cli::Hold(hold) => hold.run().await,
        }
    })
}
