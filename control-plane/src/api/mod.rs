//! The controller's HTTP API: JSON for `weft` and scripts, metrics and readiness for machines.

pub mod dashboard;
pub mod merge;
pub mod status;
pub mod types;
