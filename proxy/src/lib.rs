//! Weft's sidecar proxy, as a library so that tests can run it in process.
//!
//! Two halves, each on its own thread: the *control half* (certificate, discovery, telemetry, admin) and the
//! *data half* (one current-thread runtime a worker, owning its pools and balancers). They meet in watch
//! channels and immutable snapshots, so a slow control task never delays a request.
//!
//! A request's path, in reading order: `listener` → `outbound/mod` → `outbound/http` → `weft_core::route` →
//! `weft_core::balance` → `pool` → `weft_core::retry` → `telemetry/exchange`; and on the other side `listener` →
//! `inbound/mod` → `tls` → `inbound/http` → `weft_core::authz` → `pool` → `telemetry/exchange`.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

// From start to end: settings, what is given up, what may be used, the way out.
pub mod config;
pub mod drain;
pub mod harden;
mod limits;
mod memory;

// The control half: who this workload is, and where its requests may go.
pub mod admin;
mod clock;
pub mod control;
mod dial;
pub mod discovery;
pub mod identity;
pub mod tls;

// What is said about the work.
pub mod direction;
mod error;
pub mod telemetry;

// The data half: a captured connection, and what it speaks.
mod accepted;
mod belief;
mod detect;
mod front;
mod inbound;
mod lent;
mod listener;
mod outbound;
mod presence;
mod tcp;
mod wakers;
mod worker;

// And its requests, on their way to an endpoint and back.
mod answer;
mod back;
mod body;
mod connect;
mod expect;
mod head;
mod peer;
mod pod_wide;
mod pool;
mod upgraded;
mod upload;

use std::{
    io,
    sync::{Arc, mpsc as std_mpsc},
    time::Duration,
};

use tokio::{runtime, sync::broadcast, task::LocalSet};

use crate::{
    config::Config,
    direction::Direction,
    drain::Drain,
    limits::ConnectionLimits,
    memory::Memory,
    pod_wide::{Budgets, Caps, Limiters},
    telemetry::{
        metrics::{self, Shared},
        recorder::{self, Recorder},
    },
    worker::{Parts, Worker},
};

/// Lost connections that a worker may be behind with; of more it learns by its requests.
const LOST: usize = 64;

/// Why the sidecar could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A runtime could not be made.
    #[error("cannot start a runtime: {0}")]
    Runtime(io::Error),
    /// A listener could not be opened.
    #[error("{0}")]
    Listen(io::Error),
    /// A worker's thread ended before it said how it went.
    #[error("a worker ended at its start")]
    Worker,
    /// What a sidecar does not need could not be given up.
    #[error(transparent)]
    Harden(#[from] harden::HardenError),
    /// The admin server could not be started.
    #[error("admin: {0}")]
    Admin(io::Error),
}

/// A running sidecar.
pub struct Proxy {
    /// The way out.
    pub drain: Drain,
    /// The control half.
    pub control: control::Control,
}

/// Starts the sidecar: the control half on the current runtime, each worker on its own thread.
///
/// # Errors
/// A listener cannot be opened.
pub async fn start(
    config: Arc<Config>,
    shared: Arc<Shared>,
    log: telemetry::log::LogHandle,
) -> Result<Proxy, StartError> {
    let descriptors = raise_descriptor_limit();
    let memory = Memory::find();
    tracing::info!(descriptors, memory = memory.as_ref().map(Memory::limit), "limits of this process");
    let limits = ConnectionLimits::new(&config.limits, descriptors, memory, clock::now());
    tokio::spawn(limits.clone().watch_memory());
    count_panics(&shared);
    let drain = Drain::new();
    let (asks, answers): (Vec<_>, Vec<_>) = (0..config.workers).map(|_| recorder::channel()).unzip();
    let control = control::start(&config, &shared, asks);
    let parts = Parts {
        config: config.clone(),
        discovery: control.discovery.clone(),
        material: control.material.clone(),
        drain: drain.clone(),
        limits,
        budgets: Budgets::default(),
        caps: Caps::default(),
        limiters: Limiters::default(),
        lost: broadcast::Sender::new(LOST),
    };
    let (started, bound) = std_mpsc::channel();
    for (n, asked) in answers.into_iter().enumerate() {
        let (parts, started) = (parts.clone(), started.clone());
        let thread = std::thread::Builder::new().name(format!("weft-data-{n}"));
        thread.spawn(move || data(parts, asked, &started)).map_err(StartError::Runtime)?;
    }
    drop(started);
    for _ in 0..config.workers {
        bound.recv().map_err(|_| StartError::Worker)?.map_err(StartError::Listen)?;
    }
    admin::start(&config, &control, &drain, &shared, log).await.map_err(StartError::Admin)?;
    Ok(Proxy { drain, control })
}

/// One worker's thread.
fn data(
    parts: Parts,
    asked: tokio::sync::mpsc::Receiver<recorder::Take>,
    started: &std_mpsc::Sender<io::Result<()>>,
) {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let local = LocalSet::new();
    local.block_on(&runtime, async move {
        let recorder = Recorder::new(parts.config.limits.series);
        tokio::task::spawn_local(recorder.clone().serve(asked));
        let shared = parts.config.workers > 1;
        let sides = [
            (Direction::Outbound, parts.config.outbound_port),
            (Direction::Inbound, parts.config.inbound_port),
        ];
        let worker = Worker::new(parts, recorder);
        for (side, port) in sides {
            match listener::bind(side, port, shared) {
                Ok(listeners) => {
                    for listener in listeners {
                        tokio::task::spawn_local(listener::run(worker.clone(), listener, side));
                    }
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            }
        }
        let _ = started.send(Ok(()));
        worker.run().await;
    });
}

/// A panic ends one connection's task; it is counted and logged, and the process goes on. Not by the standard hook:
/// that writes to standard error, and waits where nobody reads it.
fn count_panics(shared: &Arc<Shared>) {
    let shared = shared.clone();
    std::panic::set_hook(Box::new(move |panic| {
        shared.count(metrics::Counter::Panics);
        tracing::error!(%panic, "a connection's task panicked: please report this");
    }));
}

/// As many descriptors as the hard limit allows: each connection needs two. Says how many.
fn raise_descriptor_limit() -> Option<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    if let Err(error) = &raised {
        tracing::warn!(%error, "the descriptor limit stays as it is");
    }
    raised.ok().or_else(|| getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft))
}

/// The whole life of a sidecar: start, serve until SIGTERM or SIGINT, drain, end. Hardens the process: call it before
/// there is a second thread.
///
/// # Errors
/// It could not start.
pub fn run(config: Config) -> Result<(), StartError> {
    let notes = harden::apply(config.harden, &config.admin_socket)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(StartError::Runtime)?;
    runtime.block_on(async {
        let config = Arc::new(config);
        let shared = Arc::new(Shared::default());
        let limits = &config.limits;
        let log = telemetry::log::init(&config.log, config.log_format, limits.log_lines, &shared);
        for (variable, value, set) in config.effective() {
            tracing::info!(variable, value, set, "config");
        }
        for warning in config.warnings() {
            tracing::warn!(warning, "config");
        }
        for note in notes {
            tracing::warn!(note, "hardening");
        }
        let mut signals = Signals::new().map_err(StartError::Runtime)?;
        let proxy = start(config.clone(), shared, log).await?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), identity = %config.identity,
            pod_uid = %config.pod_uid, "started");
        let signal = signals.next().await;
        tracing::info!(signal, "stopping: what is in flight may finish");
        let stopping = proxy.drain.stop(config.times.drain);
        tokio::select! {
            done = stopping => if !done {
                let (inbound, outbound) = proxy.drain.connections();
                tracing::warn!(inbound, outbound, "connections were cut: the drain timeout has passed");
            },
            signal = signals.next() => tracing::warn!(signal, "stopped at once by a second signal"),
        }
        // The last report goes out before the process does, if the controller takes it at once.
        let _ = tokio::time::timeout(Duration::from_millis(500), proxy.control.flush()).await;
        Ok(())
    })
}

/// The signals that end a sidecar.
struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}
