//! Pods of every kind that a cluster has, with a sidecar each.

use serde_json::{Value, json};
use weft_harness::cluster::capture::occurrences;
use weft_harness::cluster::workloads::{INJECTED, deployment, namespace, pod, server, service, testapp};
use weft_harness::cluster::{Cluster, builds, images};

use crate::mesh_or_skip;

/// A container that asks once and ends: 0 if there was an answer.
fn asks(name: &str, url: &str) -> Value {
    json!({
        "name": name,
        "image": images::ECHO,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/usr/local/bin/client", url],
    })
}

/// Waits until a pod has completed, and gives its app's log; an error tells what the pod says.
fn completed(cluster: &Cluster, namespace: &str, name: &str, container: &str) -> String {
    let phase = "--for=jsonpath={.status.phase}=Succeeded";
    let done = cluster.kubectl(["-n", namespace, "wait", phase, "--timeout=120s", "pod", name]).run();
    let log = cluster.logs(namespace, name, container).unwrap_or_default();
    done.unwrap_or_else(|error| panic!("{error:#}\n{log}\n{}", cluster.describe(namespace)));
    log
}

/// A namespace of its own with a server in it, all with sidecars.
fn shop(cluster: &Cluster, name: &str, more: &[Value]) {
    cluster.forget(name).unwrap();
    let mut objects = vec![
        namespace(name, &[INJECTED]),
        deployment(name, "web", 1, json!({"containers": [server("web")]})),
        service(name, "web"),
    ];
    objects.extend_from_slice(more);
    cluster.apply_all(&objects).unwrap();
    cluster.rolled_out(name, "web").unwrap();
}

#[test]
fn a_job_completes_and_its_init_container_and_first_request_find_the_mesh() {
    let Some(cluster) = mesh_or_skip("a_job_completes") else { return };
    let name = "pods-job";
    shop(&cluster, name, &[]);
    // The client asks at once and once: what is not ready then fails the Job.
    let job = json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "once", "namespace": name},
        "spec": {
            "backoffLimit": 0,
            "template": {"spec": {
                "restartPolicy": "Never",
                "initContainers": [asks("before", "http://web/from-an-init-container")],
                "containers": [asks("asks", "http://web/from-a-job")],
            }},
        },
    });
    cluster.apply_all(&[job]).unwrap();
    let done = ["-n", name, "wait", "--for=condition=Complete", "--timeout=120s", "job/once"];
    cluster.kubectl(done).run().unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.describe(name)));
    for (container, path) in [("before", "/from-an-init-container"), ("asks", "/from-a-job")] {
        let log = cluster.logs(name, "job/once", container).unwrap();
        assert!(log.contains("[0] StatusCode=200") && log.contains("x-served-by:web"), "{path}: {log}");
    }
    cluster.leave(name).unwrap();
}

#[test]
fn pods_of_a_stateful_set_reach_each_other_by_name() {
    let Some(cluster) = mesh_or_skip("pods_of_a_stateful_set") else { return };
    let name = "pods-set";
    cluster.forget(name).unwrap();
    let mut headless = service(name, "db");
    headless["spec"]["clusterIP"] = json!("None");
    headless["spec"]["publishNotReadyAddresses"] = json!(true);
    headless["spec"]["ports"] = json!([{"name": "http", "port": 8080}]);
    let client = json!({
        "name": "asks", "image": images::ECHO, "imagePullPolicy": "IfNotPresent", "args": ["--port=8080"],
    });
    let set = json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "db", "namespace": name},
        "spec": {
            "serviceName": "db",
            "replicas": 2,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": "db"}},
            "template": {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [client]}},
        },
    });
    cluster.apply_all(&[namespace(name, &[INJECTED]), headless, set]).unwrap();
    cluster.kubectl(["-n", name, "rollout", "status", "statefulset/db", "--timeout=120s"]).run().unwrap();
    for (from, to) in [("db-0", "db-1"), ("db-1", "db-0"), ("db-0", "db-0")] {
        let url = format!("http://{to}.db:8080/as-a-peer");
        let mut text = String::new();
        cluster
            .until(&format!("an answer of {to}"), || {
                let said = cluster.exec(name, from, "asks", &["/usr/local/bin/client", &url])?;
                text = format!("{}{}", said.out, said.err);
                Ok(text.contains("[0] StatusCode=200"))
            })
            .unwrap_or_else(|error| panic!("{error:#}: {text}"));
        assert!(text.contains(&format!("Hostname={to}\n")), "{text}");
    }
    cluster.leave(name).unwrap();
}

#[test]
fn a_pod_speaks_to_the_api_server_through_its_sidecar() {
    let Some(cluster) = mesh_or_skip("a_pod_speaks_to_the_api_server") else { return };
    let name = "pods-api";
    cluster.forget(name).unwrap();
    cluster.load_image(&images::of_kubectl().unwrap()).unwrap();
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "reads", "namespace": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": name}],
    });
    let kubectl = json!({
        "name": "kubectl",
        "image": images::KUBECTL,
        "imagePullPolicy": "IfNotPresent",
        "args": ["get", "pods", "-o", "name", "-v=6"],
        "env": [{"name": "HOME", "value": "/tmp"}],
    });
    let spec = json!({"restartPolicy": "Never", "containers": [kubectl]});
    cluster.apply_all(&[namespace(name, &[INJECTED]), role, pod(name, "operator", spec)]).unwrap();
    let log = completed(&cluster, name, "operator", "kubectl");
    assert!(log.contains("pod/operator"), "{log}");
    cluster.leave(name).unwrap();
}

/// Runs iptables on a node's network, outside every pod.
fn filter(cluster: &Cluster, node: usize, args: &str) -> anyhow::Result<String> {
    let mut command = cluster.nodes()[node].on_network(std::path::Path::new("/usr/sbin/iptables"));
    let said = command.arg("-w").args(args.split(' ')).output()?;
    anyhow::ensure!(said.status.success(), "iptables {args}: {}", String::from_utf8_lossy(&said.stderr));
    Ok(String::from_utf8_lossy(&said.stdout).into_owned())
}

#[test]
fn a_filter_that_admits_only_the_apps_port_lets_meshed_pods_talk() {
    let Some(cluster) = mesh_or_skip("a_filter_that_admits_only_the_apps_port") else { return };
    let name = "pods-filter";
    cluster.forget(name).unwrap();
    let [near, far] = cluster.nodes() else { panic!("two nodes") };
    let also = testapp("also", &["http", "--port", "9090", "--name", "also"]);
    let spec = json!({"nodeName": far.name(), "containers": [server("web"), also]});
    let client = json!({
        "name": "asks", "image": images::ECHO, "imagePullPolicy": "IfNotPresent", "args": ["--port=7000"],
    });
    let mut both = service(name, "web");
    both["spec"]["ports"] =
        json!([{"name": "http", "port": 80, "targetPort": 8080}, {"name": "http-also", "port": 9090}]);
    let objects = [
        namespace(name, &[INJECTED]),
        deployment(name, "web", 1, spec),
        both,
        deployment(name, "client", 1, json!({"nodeName": near.name(), "containers": [client]})),
    ];
    cluster.apply_all(&objects).unwrap();
    cluster.rolled_out(name, "web").unwrap();
    cluster.rolled_out(name, "client").unwrap();
    let server_pod = cluster.get(name, &["pods", "-l", "app=web"]).unwrap();
    let address = server_pod["items"][0]["status"]["podIP"].as_str().unwrap().to_owned();
    let client = cluster.pod(name, "app=client").unwrap();
    let ask = |url: &str| cluster.exec(name, &client, "asks", &["/usr/local/bin/client", url]).unwrap();

    // As a NetworkPolicy is enforced: at the node of the pod, for new connections, whoever they come from.
    let rules = [
        format!("FORWARD 1 -d {address} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"),
        format!("FORWARD 2 -d {address} -p tcp --dport 8080 -j ACCEPT"),
        format!("FORWARD 3 -d {address} -j REJECT"),
    ];
    for rule in &rules {
        filter(&cluster, 1, &format!("-I {rule}")).unwrap();
    }
    let (admitted, refused) = (ask("http://web/admitted"), ask("http://web:9090/not-admitted"));
    let counted = filter(&cluster, 1, "-nvxL FORWARD").unwrap();
    for _ in &rules {
        filter(&cluster, 1, "-D FORWARD 1").unwrap();
    }
    assert!(admitted.out.contains("[0] StatusCode=200"), "{}{}\n{counted}", admitted.out, admitted.err);
    // That it bites.
    assert!(!refused.out.contains("[0] StatusCode=200"), "{}\n{counted}", refused.out);
    cluster.leave(name).unwrap();
}

/// With capture by the CNI plugin, until it is dropped.
struct Plugin<'a>(&'a Cluster);

impl<'a> Plugin<'a> {
    fn install(cluster: &'a Cluster) -> Self {
        cluster.install_weft(builds::HELM4, &["cni.enabled=true"]).unwrap();
        let all = ["-n", "weft", "rollout", "status", "daemonset/weft-cni", "--timeout=120s"];
        cluster.kubectl(all).run().unwrap();
        Self(cluster)
    }
}

impl Drop for Plugin<'_> {
    fn drop(&mut self) {
        self.0.install_weft(builds::HELM4, &["cni.enabled=false"]).unwrap();
    }
}

#[test]
fn a_pod_under_restricted_is_meshed_by_the_cni_plugin() {
    let Some(cluster) = mesh_or_skip("a_pod_under_restricted") else { return };
    let name = "pods-restricted";
    cluster.forget(name).unwrap();
    let plugin = Plugin::install(&cluster);
    let restricted = |mut spec: Value| {
        spec["securityContext"] = json!({
            "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"},
        });
        for container in spec["containers"].as_array_mut().unwrap() {
            container["securityContext"] =
                json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        }
        spec
    };
    let [near, far] = cluster.nodes() else { panic!("two nodes") };
    let web = restricted(json!({"nodeName": far.name(), "containers": [server("web")]}));
    let job = restricted(json!({
        "nodeName": near.name(),
        "restartPolicy": "Never",
        "containers": [asks("asks", "http://web/from-a-restricted-pod")],
    }));
    let labels = [INJECTED, ("pod-security.kubernetes.io/enforce", "restricted")];
    cluster
        .apply_all(&[namespace(name, &labels), deployment(name, "web", 1, web), service(name, "web")])
        .unwrap();
    cluster.rolled_out(name, "web").unwrap();
    let capture = cluster.capture().unwrap();
    cluster.apply_all(&[pod(name, "asks", job)]).unwrap();
    let log = completed(&cluster, name, "asks", "asks");
    let crossed = capture.end().unwrap();
    assert!(log.contains("[0] StatusCode=200"), "{log}");
    assert_eq!(occurrences(&crossed, "from-a-restricted-pod"), 0, "it was not captured");
    let asked = cluster.get(name, &["pod", "asks"]).unwrap();
    let inits = asked["spec"]["initContainers"].as_array().unwrap();
    assert!(inits.iter().any(|one| one["name"] == "weft-proxy"), "{inits:?}");
    let added = |one: &Value| !one["securityContext"]["capabilities"]["add"].is_null();
    assert!(!inits.iter().any(added), "a capability: {inits:?}");
    cluster.forget(name).unwrap();
    drop(plugin);
    // The nodes are as they were: a pod without a mesh starts.
    for node in cluster.nodes() {
        let files = std::fs::read_dir(node.folder().join("cni-conf")).unwrap();
        let texts = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
        assert!(texts.into_iter().all(|text| !text.contains("weft")), "the plugin is still configured");
    }
}
