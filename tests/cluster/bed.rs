//! The bed itself: a mesh is only judged on a cluster that works without it.

use weft_harness::cluster::{Cluster, images};

use crate::cluster_or_skip;

const NAMESPACE: &str = "bed";

/// An echo server on each node, and Services of every shape in front of them.
fn servers(cluster: &Cluster) {
    cluster.forget(NAMESPACE).unwrap();
    let mut yaml = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
    for node in cluster.nodes() {
        let (name, image) = (node.name(), images::ECHO);
        yaml.push_str(&format!(
            "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: on-{name}, namespace: {NAMESPACE}}}
spec:
  selector: {{matchLabels: {{app: on-{name}}}}}
  template:
    metadata: {{labels: {{app: on-{name}, everywhere: \"yes\"}}}}
    spec:
      nodeName: {name}
      terminationGracePeriodSeconds: 1
      containers:
        - name: echo
          image: {image}
          imagePullPolicy: IfNotPresent
          args: [--port=8080, --grpc=7070]
          readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: on-{name}, namespace: {NAMESPACE}}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {{app: on-{name}}}
  ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: grpc, port: 7070}}]
"
        ));
    }
    cluster.apply(&yaml).unwrap();
    for node in cluster.nodes() {
        cluster.rolled_out(NAMESPACE, &format!("on-{}", node.name())).unwrap();
    }
}

/// What a client on a node gets from an address; a Service's rules may be a moment away.
fn asked(cluster: &Cluster, from: &str, url: &str) -> String {
    let pod = cluster.pod(NAMESPACE, &format!("app=on-{from}")).unwrap();
    let mut text = String::new();
    cluster
        .until(&format!("an answer from {url}"), || {
            let said = cluster.exec(NAMESPACE, &pod, "echo", &["client", url])?;
            text = said.out;
            anyhow::ensure!(said.success, "{}", said.err);
            Ok(true)
        })
        .unwrap();
    text
}

#[test]
fn a_service_of_another_node_is_reached_by_name_and_by_every_family() {
    let Some(cluster) = cluster_or_skip("a_service_of_another_node") else { return };
    servers(&cluster);
    let nodes = cluster.nodes();
    let (from, to) = (nodes[0].name(), nodes[nodes.len() - 1].name());
    let text = asked(&cluster, &from, &format!("http://on-{to}/path?q=1"));
    assert!(text.contains("[0] StatusCode=200\n"), "{text}");
    assert!(text.contains("[0 body] URL=/path?q=1\n"), "{text}");
    assert!(text.contains(&format!("[0 body] Hostname=on-{to}-")), "{text}");
    let text = asked(&cluster, &from, &format!("grpc://on-{to}.{NAMESPACE}.svc.cluster.local:7070"));
    assert!(text.contains("[0 body] Proto=GRPC\n") && text.contains("[0 body] StatusCode=200\n"), "{text}");

    let service = cluster.get(NAMESPACE, &["service", &format!("on-{to}")]).unwrap();
    let addresses: Vec<_> =
        service["spec"]["clusterIPs"].as_array().unwrap().iter().map(|ip| ip.as_str().unwrap()).collect();
    assert_eq!(addresses.len(), if cluster.options().dual { 2 } else { 1 }, "{service}");
    for address in addresses {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let text = asked(&cluster, &from, &format!("http://{host}/"));
        assert!(text.contains(&format!("[0 body] Hostname=on-{to}-")), "{text}");
    }
    cluster.forget(NAMESPACE).unwrap();
}

#[test]
fn every_node_is_ready_and_in_a_zone_of_its_own() {
    let Some(cluster) = cluster_or_skip("every_node_is_ready") else { return };
    let nodes = cluster.get("default", &["nodes"]).unwrap();
    let zones: std::collections::BTreeSet<_> = nodes["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["metadata"]["labels"]["topology.kubernetes.io/zone"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(zones.len(), cluster.nodes().len(), "{nodes}");
    for node in nodes["items"].as_array().unwrap() {
        let ready =
            node["status"]["conditions"].as_array().unwrap().iter().find(|one| one["type"] == "Ready");
        assert_eq!(ready.unwrap()["status"], "True", "{node}");
        let internal = node["status"]["addresses"].as_array().unwrap().iter();
        let internal = internal.filter(|address| address["type"] == "InternalIP").count();
        assert_eq!(internal, if cluster.options().dual { 2 } else { 1 }, "{node}");
    }
}
