//! Whole meshes on real traffic: real binaries, real rules, unmodified programs on both sides.
//!
//! One file a subject; a test's name is the behaviour that it proves. Each has a mesh of its own in namespaces of
//! its own, so they run side by side. Root is needed; without it each says that it was skipped.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod delivery;
mod faults;
mod floods;
mod hardening;
mod hostile;
mod http;
mod identity;
mod inbound;
mod nothing_lost;
mod resources;
mod routing;
mod secrecy;
mod smuggling;
mod tcp;
mod tcp_habits;
mod telemetry;
mod time;

use weft_control_plane::cli::demo::mesh::{Mesh, Meshed, Workload};
use weft_harness::apps::{Served, serve, service};

/// A client pod and a service `echo` (10.96.0.1:80 → 8080) of one backend.
struct Pair {
    // Apps and sidecars end before the mesh that they live in.
    client: Meshed,
    server: Served,
    mesh: Mesh,
}

const ECHO: &str = "http://10.96.0.1";

fn pair(test: &str, server_args: &[&str]) -> Option<Pair> {
    let mesh = weft_harness::apps::mesh_or_skip(test)?;
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let server = serve(&mesh, Workload::new("shop", "echo-1"), server_args).unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    Some(Pair { client, server, mesh })
}
