//! The controller's HTTP API: JSON for `weft` and scripts, metrics and readiness for machines.

pub mod merge;
pub mod server;
pub mod status;
pub mod types;
