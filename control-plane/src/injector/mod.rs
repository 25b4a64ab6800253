//! The injector: a pod comes in, a pod with a sidecar goes out, or a reason why not.
//!
//! Why pure: admission and `weft inject` must never differ, so both are this one function of the pod and the
//! installation's values. Nothing here knows who asked.

pub mod annotations;
pub mod patch;
pub mod values;

#[cfg(test)]
mod tests;

pub use patch::{Outcome, Refused, inject};
pub use values::Values;
