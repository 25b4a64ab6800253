//! The control protocol, judged from outside: a controller and a sidecar that each talk to a stranger.
//!
//! `raw` is the stranger: it writes and reads every byte by hand. `server` puts it in front of a real controller,
//! `client` behind a real sidecar's control half; each test is named after the rule that it shows. The rules are in
//! `proto/README.md`. `sim` puts both real sides into a network that fails.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod client;
mod net;
mod raw;
mod server;
mod sim;
mod world;
