//! Weft's control plane: objects in, one compiled policy per subscriber out, and what the sidecars say
//! about it back.
//!
//! Invariants of this crate:
//! - `index` is pure: no runtime, no sockets, no Kubernetes client; state is applied there, compiled
//!   there, and published elsewhere;
//! - a sidecar is whoever its certificate says: `node.id` is for logs;
//! - nothing that a subscriber does can hold up a publisher, and nothing that a publisher does can hold up
//!   another subscriber;
//! - keys never leave `ca`.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod api;
pub mod ca;
pub mod cli;
pub mod config;
pub mod controller;
pub(crate) mod disk;
pub mod index;
pub mod injector;
pub mod k8s;
pub mod metrics;
pub mod resources;
pub mod serve;
pub mod source;
pub mod telemetry;
pub mod webhook;

pub use controller::{Controller, run};
