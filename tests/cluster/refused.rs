//! What is written wrong, and the one clear message that its author gets; everything else goes on.

use serde_json::{Value, json};
use weft_harness::cluster::Cluster;
use weft_harness::cluster::kubectl::Said;
use weft_harness::cluster::workloads::{INJECTED, deployment, namespace, pod, server, service};

use crate::mesh_or_skip;

const NAMESPACE: &str = "refused";

fn tries(cluster: &Cluster, object: &Value) -> Said {
    cluster.kubectl(["apply", "-f", "-"]).input(&object.to_string()).ask().unwrap()
}

#[test]
fn wrong_input_gets_one_clear_message_each_and_touches_nothing_else() {
    let Some(cluster) = mesh_or_skip("wrong_input") else { return };
    cluster.gateway_api().unwrap();
    cluster.forget(NAMESPACE).unwrap();
    let spec = json!({"containers": [server("web")]});
    // The wrong route is this one's.
    let mut routed = service(NAMESPACE, "routed");
    routed["spec"]["selector"] = json!({"app": "web"});
    let objects = [
        namespace(NAMESPACE, &[INJECTED]),
        deployment(NAMESPACE, "web", 1, spec),
        service(NAMESPACE, "web"),
        routed,
    ];
    cluster.apply_all(&objects).unwrap();
    cluster.rolled_out(NAMESPACE, "web").unwrap();
    let load = cluster.load_from(0, NAMESPACE, "http://web/", 50).unwrap();

    // A policy that its kind's own rules refuse.
    let policy = json!({
        "apiVersion": "weft.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "wrong", "namespace": NAMESPACE},
        "spec": {"targetRefs": [{"kind": "Deployment", "name": "web"}]},
    });
    let said = tries(&cluster, &policy);
    println!("{}", said.err.trim());
    assert!(
        !said.success && said.err.contains("an AuthorizationPolicy is about Services, by name"),
        "{}",
        said.err
    );

    // One that only Weft can judge.
    let policy = json!({
        "apiVersion": "weft.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "wrong", "namespace": NAMESPACE},
        "spec": {"action": "Allow", "rules": [{"from": [{"cidrs": ["10.0.0.0/99"]}]}]},
    });
    let said = tries(&cluster, &policy);
    println!("{}", said.err.trim());
    assert!(!said.success && said.err.contains("10.0.0.0/99"), "{}", said.err);

    // A pod that shares its node's network: admitted, with the reason why it has no sidecar.
    let mut shared = pod(NAMESPACE, "shared", json!({"hostNetwork": true, "containers": [server("shared")]}));
    shared["spec"]["containers"][0]["args"][2] = json!("18080");
    shared["spec"]["containers"][0].as_object_mut().unwrap().remove("readinessProbe");
    let said = tries(&cluster, &shared);
    println!("{}", said.err.trim());
    assert!(said.success && said.err.contains("weft: no sidecar: hostNetwork"), "{}", said.err);
    let made = cluster.get(NAMESPACE, &["pod", "shared"]).unwrap();
    assert!(made["spec"]["initContainers"].is_null(), "{made}");
    let why = made["metadata"]["annotations"]["weft.dev/not-injected"].as_str().unwrap();
    assert!(why.starts_with("hostNetwork"), "{why}");

    // An annotation with a value that means nothing: to whoever makes the pod...
    let mut annotated = pod(NAMESPACE, "annotated", json!({"containers": [server("annotated")]}));
    annotated["metadata"]["annotations"] = json!({"weft.dev/skip-outbound-ports": "http"});
    let said = tries(&cluster, &annotated);
    println!("{}", said.err.trim());
    assert!(!said.success && said.err.contains("annotation weft.dev/skip-outbound-ports:"), "{}", said.err);
    // ... and to whoever makes what makes it.
    let mut made = deployment(NAMESPACE, "annotated", 1, json!({"containers": [server("annotated")]}));
    made["spec"]["template"]["metadata"]["annotations"] = json!({"weft.dev/skip-outbound-ports": "http"});
    cluster.apply_all(&[made]).unwrap();
    let mut events = Value::Null;
    cluster
        .until("the event that tells why there is no pod", || {
            events = cluster.get(NAMESPACE, &["events", "--field-selector=reason=FailedCreate"])?;
            let mut messages =
                events["items"].as_array().into_iter().flatten().map(|event| event["message"].to_string());
            Ok(messages.any(|text| text.contains("annotation weft.dev/skip-outbound-ports:")))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {events:#}"));

    // A route with a filter that nobody knows: it says so in its status.
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "filtered", "namespace": NAMESPACE},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "routed"}],
            "rules": [{
                "matches": [{"path": {"type": "PathPrefix", "value": "/filtered"}}],
                "filters": [{
                    "type": "ExtensionRef",
                    "extensionRef": {"group": "example.com", "kind": "Mirror", "name": "unknown"},
                }],
                "backendRefs": [{"name": "web", "port": 80}],
            }],
        },
    });
    cluster.apply_all(&[route]).unwrap();
    let mut status = Value::Null;
    cluster
        .until("the route's status", || {
            let route = cluster.get(NAMESPACE, &["httproute", "filtered"])?;
            status = route["status"].clone();
            let conditions = status["parents"][0]["conditions"].as_array().cloned().unwrap_or_default();
            Ok(conditions.iter().any(|one| {
                let text = one["message"].as_str().unwrap_or_default();
                one["type"] == "Accepted" && one["status"] == "False" && text.contains("filter ExtensionRef")
            }))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {status:#}"));
    println!("{status}");

    load.more(100).unwrap();
    load.none_failed(&cluster, "what is beside wrong input").unwrap();
    cluster.leave(NAMESPACE).unwrap();
}
