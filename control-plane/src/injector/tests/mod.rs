//! What a pod's owner sees: the pod that comes out, or the reason. The pods themselves are golden files, because a
//! reviewer of a change to the sidecar should read the sidecar.
//!
//! `WEFT_BLESS=1 cargo test -p weft-control-plane injector` writes the files anew.

use std::path::Path;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{Outcome, Refused, Values, annotations, inject, values::Setting};

fn pod(value: &Value) -> Pod {
    serde_json::from_value(value.clone()).unwrap()
}

fn injected(value: &Value, values: &Values) -> Value {
    match inject(&pod(value), true, values) {
        Ok(Outcome::Inject(patch)) => {
            let mut value = value.clone();
            json_patch::patch(&mut value, &patch).unwrap();
            value
        }
        other => panic!("{other:?}"),
    }
}

fn refused(value: &Value) -> String {
    match inject(&pod(value), true, &Values::default()) {
        Err(Refused(reasons)) => reasons.join("\n"),
        other => panic!("{other:?}"),
    }
}

fn check(name: &str, pod: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/injector/tests/golden").join(name);
    let text = serde_saphyr::to_string(pod).unwrap();
    if std::env::var_os("WEFT_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(text, golden, "{name} differs; WEFT_BLESS=1 writes it anew");
}

fn plain() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "web" },
        "spec": { "containers": [{ "name": "web", "image": "web:1", "ports": [{ "containerPort": 8080 }] }] },
    })
}

fn everything() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "web", "labels": { "app": "web" }, "annotations": {
            "team": "shop",
            "weft.dev/skip-inbound-ports": "22, 9100-9110",
            "weft.dev/skip-outbound-ports": "25",
            "weft.dev/skip-outbound-cidrs": "10.9.0.0/16,fd00:9::/64",
            "weft.dev/log": "debug",
            "weft.dev/proxy-cpu-request": "50m",
            "weft.dev/proxy-memory-limit": "512Mi",
            "weft.dev/prestop-sleep": "5s",
        } },
        "spec": {
            "terminationGracePeriodSeconds": 90,
            "initContainers": [{ "name": "migrate", "image": "migrate:1" }],
            "containers": [
                { "name": "web", "image": "web:1",
                  "ports": [{ "name": "http", "containerPort": 8080 }, { "name": "db", "containerPort": 5432 }],
                  "startupProbe": { "tcpSocket": { "port": "db" }, "periodSeconds": 1 },
                  "livenessProbe": { "httpGet": { "path": "/live", "port": "http" } },
                  "readinessProbe": { "grpc": { "port": 8080 } },
                  "lifecycle": { "postStart": { "exec": { "command": ["true"] } } } },
                { "name": "logs", "image": "logs:1",
                  "readinessProbe": { "tcpSocket": { "port": 24224 } },
                  "lifecycle": { "preStop": { "exec": { "command": ["flush"] } } } },
            ],
            "volumes": [{ "name": "data", "emptyDir": {} }],
        },
    })
}

#[test]
fn a_pod_gets_capture_and_a_native_sidecar_first() {
    check("plain.yaml", &injected(&plain(), &Values::default()));
}

#[test]
fn a_pod_says_what_its_own_sidecar_is_like() {
    let values = Values {
        skip_outbound_ports: "53".to_owned(),
        env: vec![Setting { name: "WEFT_WORKERS".to_owned(), value: "2".to_owned() }],
        ..Values::default()
    };
    check("everything.yaml", &injected(&everything(), &values));
}

#[test]
fn with_a_cni_plugin_a_pod_needs_no_capability() {
    let values = Values { cni: true, ..Values::default() };
    let pod = injected(&plain(), &values);
    assert!(!pod.to_string().contains("NET_ADMIN"), "{pod}");
    check("cni.yaml", &pod);
}

#[test]
fn what_installation_and_pod_both_skip_is_skipped_once_and_the_check_knows_of_it() {
    let values = Values {
        skip_outbound_ports: "25,80,6000-6010".to_owned(),
        skip_outbound_cidrs: "10.0.0.0/8,192.0.2.0/24".to_owned(),
        ..Values::default()
    };
    let mut asking = plain();
    asking["metadata"]["annotations"] = json!({
        "weft.dev/skip-outbound-ports": "25,6005-6020", "weft.dev/skip-outbound-cidrs": "10.9.0.0/16,172.16.0.1/32" });
    for values in [values.clone(), Values { cni: true, ..values }] {
        let first = injected(&asking, &values)["spec"]["initContainers"][0].clone();
        let said = |name: &str| {
            let env = first["env"].as_array().unwrap().iter().find(|env| env["name"] == name);
            env.unwrap()["value"].as_str().unwrap().to_owned()
        };
        assert_eq!(said("WEFT_EXCLUDE_OUTBOUND_PORTS"), "25,80,6000-6020");
        assert_eq!(said("WEFT_EXCLUDE_OUTBOUND_CIDRS"), "10.0.0.0/8,172.16.0.1/32,192.0.2.0/24");
    }
}

#[test]
fn an_installation_that_lives_without_ipv6_says_so_to_what_captures() {
    let families = Setting { name: "WEFT_FAMILIES".to_owned(), value: "ipv4".to_owned() };
    let pod = injected(&plain(), &Values { env: vec![families], ..Values::default() });
    let capture = &pod["spec"]["initContainers"][0];
    assert_eq!(capture["env"], json!([{ "name": "WEFT_FAMILIES", "value": "ipv4" }]), "{capture}");
}

#[test]
fn what_another_webhook_adds_later_is_held_to_the_same() {
    let mut pod = injected(&plain(), &Values::default());
    let late = |container: Value| {
        let mut pod = injected(&plain(), &Values::default());
        pod["spec"]["containers"].as_array_mut().unwrap().push(container);
        pod
    };
    let probed = |name: &str, port: u16| {
        json!({ "name": name, "image": "x",
            "readinessProbe": { "tcpSocket": { "port": port, "host": "" }, "periodSeconds": 3 } })
    };
    for (name, port, known) in [("db", 5_432, "5432"), ("cache", 6_379, "5432,6379")] {
        pod["spec"]["containers"].as_array_mut().unwrap().push(probed(name, port));
        pod = injected(&pod, &Values::default());
        let container = pod["spec"]["containers"].as_array().unwrap().last().unwrap();
        assert_eq!(container["readinessProbe"]["httpGet"]["path"], format!("/probe/{port}"));
        assert_eq!(container["lifecycle"]["preStop"]["sleep"]["seconds"], 3);
        let sidecar = &pod["spec"]["initContainers"][1];
        let env = sidecar["env"].as_array().unwrap().iter().find(|env| env["name"] == "WEFT_TCP_PROBES");
        assert_eq!(env.unwrap()["value"], known, "{sidecar}");
    }
    let bypasses = json!({ "name": "x", "image": "x", "securityContext": { "runAsUser": 2102 } });
    assert!(refused(&late(bypasses)).contains("sidecar's own user"));
}

#[test]
fn a_pod_that_is_sent_to_windows_nodes_gets_no_linux_sidecar() {
    let mut windows = plain();
    windows["spec"]["nodeSelector"] = json!({ "kubernetes.io/os": "windows" });
    let outcome = inject(&pod(&windows), true, &Values::default());
    assert!(matches!(outcome, Ok(Outcome::Skip(reason, _)) if reason.contains("Windows")), "{outcome:?}");
}

#[test]
fn injecting_twice_changes_nothing() {
    for pod_value in [plain(), everything()] {
        let once = injected(&pod_value, &Values::default());
        let twice = inject(&pod(&once), true, &Values::default()).unwrap();
        assert!(matches!(twice, Outcome::Leave(_)), "{twice:?}");
    }
}

#[test]
fn a_pod_opts_in_and_out_by_label_or_annotation() {
    let decide = |place: &str, text: &str, by_default: bool| {
        let mut value = plain();
        value["metadata"][place] = json!({ "weft.dev/inject": text });
        matches!(inject(&pod(&value), by_default, &Values::default()), Ok(Outcome::Inject(_)))
    };
    for place in ["labels", "annotations"] {
        assert!(decide(place, "enabled", false), "{place}");
        assert!(!decide(place, "disabled", true), "{place}");
    }
    assert!(!matches!(inject(&pod(&plain()), false, &Values::default()), Ok(Outcome::Inject(_))));
    let mut value = plain();
    value["metadata"]["labels"] = json!({ "weft.dev/inject": "yes" });
    assert_eq!(
        refused(&value),
        "annotation weft.dev/inject (label): \"yes\" is neither \"enabled\" nor \"disabled\""
    );
    // Whoever wants no sidecar is not held up by what it says about one.
    value["metadata"]["labels"] = json!({ "weft.dev/inject": "disabled", "weft.dev/log": "%" });
    assert!(matches!(inject(&pod(&value), true, &Values::default()), Ok(Outcome::Leave(_))));
}

#[test]
fn a_pod_on_its_nodes_network_is_left_alone_and_says_so() {
    let mut value = plain();
    value["spec"]["hostNetwork"] = json!(true);
    let Ok(Outcome::Skip(reason, patch)) = inject(&pod(&value), true, &Values::default()) else { panic!() };
    assert!(reason.starts_with("hostNetwork"), "{reason}");
    json_patch::patch(&mut value, &patch).unwrap();
    assert_eq!(value["metadata"]["annotations"]["weft.dev/not-injected"], reason);
    assert!(value["metadata"]["annotations"]["weft.dev/injected"].is_null());
    // A manifest that was taken from a pod with a sidecar.
    value["metadata"]["annotations"] = json!({ "weft.dev/injected": "true" });
    let Ok(Outcome::Skip(_, patch)) = inject(&pod(&value), true, &Values::default()) else { panic!() };
    json_patch::patch(&mut value, &patch).unwrap();
    assert_eq!(value["metadata"]["annotations"]["weft.dev/injected"], "false");
    assert!(value["spec"]["initContainers"].is_null());
}

#[test]
fn a_container_that_runs_as_the_proxys_user_is_refused() {
    let mut value = plain();
    value["spec"]["securityContext"] = json!({ "runAsUser": 2102 });
    assert!(refused(&value).starts_with("spec.securityContext.runAsUser: 2102"), "{}", refused(&value));
    for list in ["containers", "initContainers"] {
        let mut value = plain();
        value["spec"][list] =
            json!([{ "name": "x", "image": "x", "securityContext": { "runAsUser": 2102 } }]);
        let text = refused(&value);
        assert!(text.starts_with(&format!("spec.{list}[0].securityContext.runAsUser (x): 2102")), "{text}");
    }
}

#[test]
fn a_container_that_only_has_the_name_of_ours_is_refused() {
    let bypasses = json!({ "runAsUser": 2102 });
    // No sidecar, but its name: the pod would be taken for one that has it.
    let fake = json!({ "name": "weft-proxy", "image": "anything", "restartPolicy": "Always", "securityContext": bypasses });
    let mut value = plain();
    value["spec"]["initContainers"] = json!([fake]);
    let text = refused(&value);
    assert!(
        text.contains("spec.initContainers[0].name: \"weft-proxy\" is the name of a container"),
        "{text}"
    );
    assert!(text.contains("spec.initContainers[0].securityContext.runAsUser (weft-proxy): 2102"), "{text}");
    // Beside a sidecar that is one, under the name of what captures.
    for (list, position) in [("containers", 1), ("initContainers", 2)] {
        let mut value = injected(&plain(), &Values::default());
        let late = json!({ "name": "weft-check", "image": "weft-iptables", "securityContext": bypasses });
        value["spec"][list].as_array_mut().unwrap().push(late);
        let text = refused(&value);
        assert!(text.contains(&format!("spec.{list}[{position}].name: \"weft-check\"")), "{text}");
        assert!(text.contains("sidecar's own user"), "{text}");
    }
    // Ours, from a mirror, pinned, and of another version.
    for image in
        ["mirror.local/a/weft-proxy:0.0.1", "weft.dev/weft-proxy@sha256:00ff", "host:5000/weft-proxy"]
    {
        let mut value = injected(&plain(), &Values::default());
        value["spec"]["initContainers"][1]["image"] = json!(image);
        let twice = inject(&pod(&value), true, &Values::default());
        assert!(matches!(twice, Ok(Outcome::Leave(_))), "{twice:?}");
    }
}

#[test]
fn everything_that_is_wrong_with_a_pod_is_said_at_once_with_the_fix() {
    let mut value = plain();
    value["metadata"]["annotations"] = json!({
        "weft.dev/skip-inbound-ports": "80,eighty",
        "weft.dev/skip-outbound-ports": "14000-14010",
        "weft.dev/skip-outbound-cidrs": "10.0.0.1/8",
        "weft.dev/log": "weft=loud",
        "weft.dev/opaque-ports": "1-65535",
        "weft.dev/proxy-cpu-limit": "lots",
        "weft.dev/prestop-sleep": "5",
        "weft.dev/skip-ports": "80",
    });
    let text = refused(&value);
    for part in [
        "weft.dev/skip-inbound-ports: \"eighty\" is not a port or a range of ports: write",
        "weft.dev/skip-outbound-ports: 14001 is a port of the sidecar itself",
        "weft.dev/skip-outbound-cidrs: \"10.0.0.1/8\" has host bits set: write 10.0.0.0/8",
        "weft.dev/log: \"weft=loud\" is not a log filter",
        "weft.dev/opaque-ports: 65535 ports, of 128 at most",
        "weft.dev/proxy-cpu-limit: \"lots\" is not a quantity: write 50m",
        "weft.dev/prestop-sleep: \"5\" is not a duration: write 5s",
        "weft.dev/skip-ports: there is no such annotation: known are weft.dev/inject,",
    ] {
        assert!(text.contains(part), "{part}\nis missing in\n{text}");
    }
    assert_eq!(text.lines().count(), 8, "{text}");
    let mut value = plain();
    value["spec"]["containers"][0]["ports"] = json!([{ "containerPort": 14006 }]);
    value["spec"]["volumes"] = json!([{ "name": "weft-socket", "emptyDir": {} }]);
    let text = refused(&value);
    assert!(
        text.contains("spec.containers[0].ports[0].containerPort (web): 14006 is a port of the sidecar"),
        "{text}"
    );
    assert!(text.contains("spec.volumes[0].name: \"weft-socket\""), "{text}");
}

#[test]
fn every_annotation_is_taken_as_its_own_example_shows() {
    for (name, what, example) in annotations::ALL {
        let mut value = plain();
        value["metadata"]["annotations"] = json!({ name: example });
        let taken = inject(&pod(&value), true, &Values::default());
        assert!(taken.is_ok(), "{name} ({what}): {taken:?}");
        assert!(annotations::help().contains(name), "{name}");
    }
}

/// The `preStop` of the pod's first container.
fn prestop(pod: &Value, values: &Values) -> Value {
    injected(pod, values)["spec"]["containers"][0]["lifecycle"]["preStop"].clone()
}

#[test]
fn an_app_hears_of_its_end_when_its_callers_have_and_keeps_its_own_hook() {
    let installed = |seconds| Values { prestop_sleep_seconds: seconds, ..Values::default() };
    let sleep = |seconds: u64| json!({ "sleep": { "seconds": seconds } });
    assert_eq!(prestop(&plain(), &Values::default()), sleep(3));
    assert_eq!(prestop(&plain(), &installed(0)), Value::Null);
    let mut pod = plain();
    pod["spec"]["containers"][0]["lifecycle"] = json!({ "preStop": { "exec": { "command": ["flush"] } } });
    assert_eq!(prestop(&pod, &Values::default()), json!({ "exec": { "command": ["flush"] } }));
    for (asked, got) in [("0s", Value::Null), ("7s", sleep(7))] {
        let mut pod = plain();
        pod["metadata"]["annotations"] = json!({ "weft.dev/prestop-sleep": asked });
        assert_eq!(prestop(&pod, &Values::default()), got, "{asked}");
    }
}

#[test]
fn the_sleep_of_every_pod_takes_no_more_than_a_quarter_of_its_grace() {
    let graces =
        [(0, Value::Null), (3, Value::Null), (4, json!(1)), (11, json!(2)), (12, json!(3)), (600, json!(3))];
    for (grace, seconds) in graces {
        let mut pod = plain();
        pod["spec"]["terminationGracePeriodSeconds"] = json!(grace);
        assert_eq!(prestop(&pod, &Values::default())["sleep"]["seconds"], seconds, "{grace}");
    }
    // An installation that says more than a pod has refuses no pod for it.
    let long = Values { prestop_sleep_seconds: 90, ..Values::default() };
    assert_eq!(prestop(&plain(), &long)["sleep"]["seconds"], 7);
}

#[test]
fn a_sleep_that_outlives_the_pod_is_refused() {
    let mut value = plain();
    value["metadata"]["annotations"] = json!({ "weft.dev/prestop-sleep": "30s" });
    assert!(refused(&value).contains("raise it"), "{}", refused(&value));
}
