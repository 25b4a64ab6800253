//! The mesh that Weft's pair is in: what a user would have written, as YAML in a folder.
//!
//! Why generated: how many rules a request is held against, and how many services there are that nobody calls, is what
//! some of the figures are about.

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::Result;

use crate::{
    net::{CLIENT, HTTP1_PORT, HTTP2_PORT, OPAQUE_PORT, SERVER, SERVICE, STREAM_PORT},
    weft::uid,
};

/// The backend's service, both pods, routes and an authorization; and rules that match nothing.
pub(crate) fn mesh(rules: usize) -> String {
    let mut text = format!(
        r#"apiVersion: weft.dev/v1alpha1
kind: MeshConfig
metadata: {{name: mesh}}
spec: {{meshRanges: [10.77.0.0/24, 10.96.0.0/16]}}
---
apiVersion: v1
kind: Service
metadata: {{name: backend, namespace: bench}}
spec:
  clusterIP: {SERVICE}
  selector: {{app: server}}
  ports:
  - {{name: http, port: {HTTP1_PORT}, targetPort: {HTTP1_PORT}, appProtocol: http}}
  - {{name: http2, port: {HTTP2_PORT}, targetPort: {HTTP2_PORT}, appProtocol: kubernetes.io/h2c}}
  - {{name: stream, port: {STREAM_PORT}, targetPort: {STREAM_PORT}, appProtocol: tcp}}
  - {{name: opaque, port: {OPAQUE_PORT}, targetPort: {OPAQUE_PORT}, appProtocol: tcp}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: backend-1, namespace: bench, labels: {{kubernetes.io/service-name: backend}}}}
addressType: IPv4
ports:
- {{name: http, port: {HTTP1_PORT}}}
- {{name: http2, port: {HTTP2_PORT}}}
- {{name: stream, port: {STREAM_PORT}}}
- {{name: opaque, port: {OPAQUE_PORT}}}
endpoints:
- addresses: [{SERVER}]
  conditions: {{ready: true}}
  targetRef: {{kind: Pod, name: server, namespace: bench, uid: {server}}}
---
apiVersion: weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: server, namespace: bench}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  mtls: Strict
  action: Allow
  rules:
{vain}  - from: [{{identities: ["spiffe://cluster.local/ns/bench/sa/client"]}}]
"#,
        server = uid("server"),
        vain = authorization_rules(rules),
    );
    for (name, ip) in [("client", CLIENT), ("server", SERVER)] {
        text += &format!(
            r#"---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: bench
  uid: {uid}
  labels: {{app: {name}}}
  annotations: {{weft.dev/injected: "true"}}
spec: {{serviceAccountName: {name}, containers: [{{name: app}}]}}
status:
  phase: Running
  podIP: {ip}
  podIPs: [{{ip: {ip}}}]
  conditions: [{{type: Ready, status: "True"}}]
"#,
            uid = uid(name),
        );
    }
    for (name, port) in [("http", HTTP1_PORT), ("http2", HTTP2_PORT)] {
        text += &format!(
            r#"---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: bench}}
spec:
  parentRefs: [{{group: "", kind: Service, name: backend, port: {port}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /}}}}]
    backendRefs: [{{name: backend, port: {port}}}]
"#
        );
    }
    for (name, port) in [("http", HTTP1_PORT), ("http2", HTTP2_PORT)] {
        text += &route_rules_of(&format!("vain-{name}"), port, "/vain", rules);
    }
    text
}

/// Half are about others, half about other paths of the one who calls.
fn authorization_rules(count: usize) -> String {
    let rule = |i: usize| {
        let who = if i.is_multiple_of(2) { format!("other-{i}") } else { "client".to_owned() };
        format!(
            "  - from: [{{identities: [\"spiffe://cluster.local/ns/bench/sa/{who}\"]}}]\n    \
             to: [{{methods: [GET, POST], paths: [\"/vain/rule-{i:04}/*\"]}}]\n"
        )
    };
    (0..count).map(rule).collect()
}

/// As many rules as asked for below a path of the HTTP/1.1 port, and one that redirects.
pub(crate) fn route_rules(name: &str, below: &str, count: usize) -> String {
    let moved = format!(
        r#"---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}-moved, namespace: bench}}
spec:
  parentRefs: [{{group: "", kind: Service, name: backend, port: {HTTP1_PORT}}}]
  rules:
  - matches: [{{path: {{type: Exact, value: {below}/moved}}}}]
    filters: [{{type: RequestRedirect, requestRedirect: {{statusCode: 302, path: {{type: ReplaceFullPath, replaceFullPath: /}}}}}}]
"#
    );
    moved + &route_rules_of(name, HTTP1_PORT, below, count)
}

fn route_rules_of(name: &str, port: u16, below: &str, count: usize) -> String {
    let rules: Vec<usize> = (0..count).collect();
    let object = |(n, rules): (usize, &[usize])| {
        let rule = |i: &usize| {
            format!(
                "  - matches: [{{path: {{type: PathPrefix, value: {below}/rule-{i:04}}}}}]\n    \
                 backendRefs: [{{name: backend, port: {port}}}]\n"
            )
        };
        let rules: String = rules.iter().map(rule).collect();
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
             metadata: {{name: {name}-{n}, namespace: bench}}\nspec:\n  \
             parentRefs: [{{group: \"\", kind: Service, name: backend, port: {port}}}]\n  rules:\n{rules}"
        )
    };
    rules.chunks(RULES_OF_A_ROUTE).enumerate().map(object).collect()
}

/// The Gateway API allows no more.
const RULES_OF_A_ROUTE: usize = 16;

/// The address of the n-th service beside the backend's.
pub(crate) fn service_address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + n as u32)
}

/// Services beside the backend's. The first ten are its pod's, too; the others' pods are somewhere else.
pub(crate) fn write_services(folder: &Path, count: usize) -> Result<()> {
    let all: Vec<usize> = (0..count).collect();
    for (file, some) in all.chunks(1_000).enumerate() {
        let text: String = some.iter().map(|&n| service(n)).collect();
        fs::write(folder.join(format!("services-{file}.yaml")), text)?;
    }
    Ok(())
}

/// Services that the client uses, in a cluster of however many.
pub(crate) const USED: usize = 10;

fn service(n: usize) -> String {
    let address = service_address(n);
    let endpoint = if n < USED {
        format!(
            "{{addresses: [{SERVER}], conditions: {{ready: true}}, \
             targetRef: {{kind: Pod, name: server, namespace: bench, uid: {}}}}}",
            uid("server")
        )
    } else {
        let elsewhere = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 78, 0, 0)) + n as u32);
        format!("{{addresses: [{elsewhere}], conditions: {{ready: true}}}}")
    };
    format!(
        r#"---
apiVersion: v1
kind: Service
metadata: {{name: service-{n}, namespace: bench}}
spec:
  clusterIP: {address}
  ports: [{{name: http, port: {HTTP1_PORT}, targetPort: {HTTP1_PORT}, appProtocol: http}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: service-{n}-1, namespace: bench, labels: {{kubernetes.io/service-name: service-{n}}}}}
addressType: IPv4
ports: [{{name: http, port: {HTTP1_PORT}}}]
endpoints: [{endpoint}]
"#
    )
}
