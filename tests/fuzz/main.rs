//! Hostile bytes at every parser that reads what strangers write; one test a target.
//!
//! In `make test` each runs for moments, always over the same inputs; `make fuzz` gives each a minute and a new seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod engine;
mod framing;
mod policy;
mod wire;

use engine::fuzz;

#[test]
fn client_hello() {
    fuzz(&wire::CLIENT_HELLO);
}

#[test]
fn protocol_detector() {
    fuzz(&wire::DETECT);
}

#[test]
fn spiffe_identity() {
    fuzz(&wire::IDENTITY);
}

#[test]
fn route_match_and_rewrite() {
    fuzz(&policy::ROUTE);
}

#[test]
fn authorization() {
    fuzz(&policy::AUTHZ);
}

#[test]
fn policy_messages() {
    fuzz(&policy::CONVERT);
}

#[test]
fn http1_requests() {
    fuzz(&framing::REQUESTS);
}

#[test]
fn http1_responses() {
    fuzz(&framing::RESPONSES);
}

#[test]
fn http2_frames() {
    fuzz(&framing::FRAMES);
}
