//! Whole meshes on real traffic: real binaries, real rules, unmodified programs on both sides.
//!
//! One file a subject; a test's name is the behaviour that it proves. Each has a mesh of its own in namespaces of
//! its own, so they run side by side. Root is needed; without it each says that it was skipped.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod conformance;
mod defaults;
mod delivery;
mod established;
mod fail_closed;
mod faults;
mod filters;
mod floods;
mod handshakes;
mod hardening;
mod hostile;
mod http;
mod http1;
mod http1_ends;
mod http1_odd;
mod http2;
mod http2_ends;
mod http2_odd;
mod identity;
mod inbound;
mod nothing_lost;
mod policy;
mod probes;
mod resources;
mod routing;
mod secrecy;
mod servers;
mod smuggling;
mod tcp;
mod tcp_habits;
mod telemetry;
mod time;

use std::time::Duration;

use weft_control_plane::cli::demo::mesh::{Mesh, Meshed, Options, Workload, wait};
use weft_harness::{
    apps::{Served, serve, service},
    wire::{Backend, Wire},
};

/// A client pod and a service `echo` (10.96.0.1:80 → 8080) of one backend.
struct Pair {
    // Apps and sidecars end before the mesh that they live in.
    client: Meshed,
    server: Served,
    mesh: Mesh,
}

const ECHO: &str = "http://10.96.0.1";

fn pair(test: &str, server_args: &[&str]) -> Option<Pair> {
    pair_with(test, Options::default(), server_args)
}

fn pair_with(test: &str, options: Options, server_args: &[&str]) -> Option<Pair> {
    let mesh = weft_harness::apps::mesh_with(test, options)?;
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let server = serve(&mesh, Workload::new("shop", "echo-1"), server_args).unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    Some(Pair { client, server, mesh })
}

/// The same where the backend is a script of the test's own.
struct Scripted {
    _backend: Backend,
    client: Meshed,
    server: Meshed,
    mesh: Mesh,
}

/// `echo`, for a [`Wire`].
const ECHO_ADDRESS: &str = "10.96.0.1:80";

fn scripted(
    test: &str,
    script: impl Fn(Wire, usize) -> anyhow::Result<()> + Send + Sync + 'static,
) -> Option<Scripted> {
    scripted_with(test, Options::default(), script)
}

fn scripted_with(
    test: &str,
    options: Options,
    script: impl Fn(Wire, usize) -> anyhow::Result<()> + Send + Sync + 'static,
) -> Option<Scripted> {
    let mesh = weft_harness::apps::mesh_with(test, options)?;
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let server = mesh.workload(Workload::new("shop", "echo-1")).unwrap();
    let backend = Backend::start(&server.pod, 8080, script).unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    Some(Scripted { _backend: backend, client, server, mesh })
}

/// Sidecars that wait a second at most for anything: what is quiet for longer, and may be, must not end.
fn impatient() -> Options {
    let times = [
        "WEFT_HEADER_TIMEOUT",
        "WEFT_KEEP_ALIVE_TIMEOUT",
        "WEFT_APP_IDLE_TIMEOUT",
        "WEFT_POOL_IDLE_TIMEOUT",
        "WEFT_CONNECT_TIMEOUT",
    ];
    Options::with_env(&times.map(|name| (name, "1s")))
}

/// Takes a step of a root's rotation as soon as it is let: until every sidecar has said that it followed the step
/// before, it is refused.
fn rotate_root(mesh: &Mesh, step: &str) {
    let mut said = String::new();
    wait(Duration::from_secs(30), || {
        let done = mesh.post(&format!("/api/v1/certs/rotate?root={step}"));
        said = done.as_ref().err().map(ToString::to_string).unwrap_or_default();
        Ok(done.is_ok())
    })
    .unwrap_or_else(|error| panic!("{step}: {error}: {said}"));
}

/// What callers of a service keep to.
fn policy(mesh: &Mesh, service: &str, spec: serde_json::Value) {
    let mut spec = spec;
    spec["targetRefs"] = serde_json::json!([{"group": "", "kind": "Service", "name": service}]);
    let object = serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"namespace": "shop", "name": service},
        "spec": spec,
    });
    mesh.write(&format!("policy-{service}.yaml"), &format!("{object:#}\n")).unwrap();
}
