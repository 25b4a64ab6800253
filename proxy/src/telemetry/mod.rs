//! What the sidecar says about its work: numbers, reports to the controller, and log lines.
//!
//! Why telemetry may never hurt traffic: each path out of here is bounded, and what does not fit is
//! dropped and counted. A blocked log pipe or a controller that is gone changes no request.

pub(crate) mod decision;
pub(crate) mod exchange;
pub mod log;
pub mod metrics;
pub(crate) mod process;
pub mod recorder;
pub mod registry;
pub mod report;
