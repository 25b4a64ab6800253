//! Capture: how a connection that knows nothing of the mesh ends up at the sidecar.
//!
//! Why text applied once, and not one command a rule: `iptables-restore` swaps a whole table in one
//! transaction. There is no moment in which half of the rules stand, a crash leaves either the old
//! rules or the new ones, and the text itself can be compared with a golden file.
//!
//! Invariants:
//! - [`rules`] is pure: a [`config::Config`] in, text out; it runs nothing and reads nothing;
//! - only [`apply`] runs programs, and it writes only through `iptables-restore --noflush`;
//! - everything of ours lives in chains named `WEFT_*` of the `nat` table, plus one jump in each of
//!   `PREROUTING` and `OUTPUT`. What is not named so is never touched;
//! - a [`config::Config`] that exists can be enforced: whatever could not is refused by name.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod apply;
pub mod cni;
pub mod config;
pub mod install;
pub mod probe;
pub mod rules;
