//! Every data-plane decision of Weft, as synchronous values that are told the time.
//!
//! Invariants of this crate:
//! - no runtime, socket, clock, random source or logging: callers pass `now: Instant` and a
//!   `&mut dyn` random source, and reasons come back as data for the shell to log;
//! - the same code decides in the proxy, in the controller (`weft explain`, `weft authz test`) and
//!   in the simulation of `tests/sim.rs`;
//! - a policy that exists is valid: constructors refuse what could not be enforced.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod identity;
pub mod policy;
pub mod ports;

pub mod detect;
pub mod frames;
pub mod framing;
pub mod path;
pub mod route;

pub mod authz;
pub mod limit;

pub mod topology;

pub mod balance;
pub mod eject;
pub mod ewma;

pub mod classify;
pub mod retry;

pub mod backoff;
pub mod budget;

mod name;
mod random;
mod service;
