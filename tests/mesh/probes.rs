//! The kubelet's questions, where nobody else gets in without an identity.

use std::{cell::Cell, time::Duration};

use serde_json::json;
use weft_control_plane::cli::demo::mesh::{Workload, get, wait};
use weft_harness::apps::{mesh_with, service};
use weft_harness::wire::Wire;

use weft_control_plane::cli::demo::mesh::Options;

const STRICT: &str = "\
apiVersion: weft.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {mtls: Strict, authorization: Deny, meshRanges: [10.77.0.0/16, 10.96.0.0/16]}
";

#[test]
fn probes_pass_under_strict_mtls_and_nothing_else_does() {
    let Some(mesh) = mesh_with("probes", Options::default()) else { return };
    mesh.write("mesh-config.yaml", STRICT).unwrap();
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let mut workload = Workload::new("shop", "echo-1");
    workload.probes = json!({
        "livenessProbe": { "httpGet": { "path": "/head?live=1", "port": 8080 } },
        "readinessProbe": { "tcpSocket": { "port": 8080 } },
        "startupProbe": { "grpc": { "port": 8080 } },
    });
    // As the injector writes it.
    workload.env.insert("WEFT_TCP_PROBES".to_owned(), "8080".to_owned());
    let sidecar = mesh.workload(workload).unwrap();
    let node = mesh.plain(&Workload::new("shop", "node")).unwrap();
    let pod = sidecar.pod.ip;
    let refused = Cell::new(0);
    let asked = |method: &str, path: &str, more: &str| {
        let mut wire = Wire::dial(&node, &format!("{pod}:8080")).unwrap();
        let status =
            wire.ask(format!("{method} {path} HTTP/1.1\r\nHost: {pod}\r\n{more}\r\n")).unwrap().status();
        refused.set(refused.get() + u64::from(status != 200));
        status
    };
    let tcp =
        |port: u16| node.enter(|| get((pod, 14_021).into(), &format!("/probe/{port}"))).unwrap().unwrap().0;

    // The policy may still be on its way.
    wait(Duration::from_secs(10), || Ok(asked("GET", "/else", "") == 403)).unwrap();
    assert_eq!(tcp(8080), 503, "nobody listens there yet");
    let server = weft_harness::apps::serve_in(&mesh, sidecar, &[]).unwrap();
    assert_eq!(tcp(8080), 200);
    assert_eq!(tcp(22), 404, "not a port of the pod's spec");

    assert_eq!(asked("GET", "/head?live=1", ""), 200);
    for (method, path, more) in [
        ("GET", "/head", ""),
        ("GET", "/head?live=1&x", ""),
        ("GET", "/head/../head?live=1", ""),
        ("POST", "/head?live=1", "Content-Length: 0\r\n"),
        ("GET", "/head?live=1", "Connection: Upgrade\r\nUpgrade: echo\r\n"),
    ] {
        assert_eq!(asked(method, path, more), 403, "{method} {path} {more}");
    }
    // One that is admitted opens nothing for what follows on its connection.
    let mut wire = Wire::dial(&node, &format!("{pod}:8080")).unwrap();
    let mut ask = |path: &str| wire.ask(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap().status();
    assert_eq!((ask("/head?live=1"), ask("/head")), (200, 403));

    // What stands in the way of strict is whoever was refused, and never the kubelet.
    let plaintext = || {
        let edges = mesh.api("/api/v1/edges")?;
        let edges = edges.as_array().into_iter().flatten().filter(|edge| edge["mtls"] == false);
        Ok::<u64, anyhow::Error>(edges.filter_map(|edge| edge["count"].as_u64()).sum())
    };
    wait(Duration::from_secs(15), || Ok(plaintext()? == refused.get() + 1))
        .unwrap_or_else(|error| panic!("{error}: {:?}, {} refused", plaintext(), refused.get()));
    drop(server);
}
