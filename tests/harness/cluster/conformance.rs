//! The official Gateway API suite against the mesh: its own tests, its own judgement, our flags.
//!
//! The suite is compiled from its module as it is. A mesh-only run of v1.6 waits for pods of two namespaces that
//! only a gateway run makes, so we make them: with a pod that does nothing, beside the suite and not in it.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, ensure};

use super::Cluster;
use super::builds::{self, CONFORMANCE};
use super::images::ECHO;

/// Namespaces that the suite waits for and, without gateways, does not make.
const AWAITED: [&str; 2] = ["gateway-conformance-app-backend", "gateway-conformance-web-backend"];
/// Those that it makes, and whose pods are the mesh.
pub const MESH_NAMESPACES: [&str; 2] = ["gateway-conformance-mesh", "gateway-conformance-mesh-consumer"];
/// What Weft says it can.
const FEATURES: [&str; 17] = [
    "Mesh",
    "HTTPRoute",
    "GRPCRoute",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteParentRefPort",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
];

impl Cluster {
    /// The Gateway API's standard CRDs of the suite's version.
    pub fn gateway_api(&self) -> Result<()> {
        for file in builds::gateway_api_crds("standard")? {
            // Too large for the annotation of a client-side apply.
            let args = [
                Path::new("apply"),
                Path::new("--server-side"),
                Path::new("--force-conflicts"),
                Path::new("-f"),
                &file,
            ];
            self.kubectl(args).run()?;
        }
        self.kubectl(["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]).run().map(drop)
    }

    /// Runs the suite; what it says goes to a log, or to our own output. `true` if it passed.
    pub fn conformance(&self, report: &Path, log: Option<&Path>, more: &[String]) -> Result<bool> {
        self.gateway_api()?;
        for namespace in MESH_NAMESPACES {
            self.forget(namespace)?;
        }
        for namespace in AWAITED {
            self.apply(&format!(
                "apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: awaited, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: awaited}}}}
  template:
    metadata: {{labels: {{app: awaited}}}}
    spec: {{containers: [{{name: echo, image: \"{ECHO}\", imagePullPolicy: IfNotPresent, args: [--port=8080]}}]}}
"
            ))?;
            self.rolled_out(namespace, "awaited")?;
        }
        let mut flags: Vec<String> = [
            "-test.v",
            "-test.run=^TestConformance$",
            "-test.timeout=90m",
            "--conformance-profiles=MESH-HTTP,MESH-GRPC",
            "--gateway-class=",
            "--namespace-labels=weft.dev/inject=enabled",
            "--organization=weft",
            "--project=weft",
            "--url=https://weft.dev",
            "--contact=https://weft.dev",
        ]
        .map(str::to_owned)
        .to_vec();
        flags.push(format!("--supported-features={}", FEATURES.join(",")));
        flags.push(format!("--version=v{}", env!("CARGO_PKG_VERSION")));
        flags.push(format!("--report-output={}", report.display()));
        flags.extend(more.iter().cloned());
        let mut suite = self.tool(CONFORMANCE, "conformance.test", flags).command()?;
        if let Some(log) = log {
            let log = File::create(log)?;
            suite.stdout(log.try_clone()?).stderr(log);
        }
        let status = suite.status()?;
        for namespace in AWAITED {
            self.leave(namespace)?;
        }
        ensure!(status.code().is_some(), "the suite was killed");
        Ok(status.success())
    }
}
