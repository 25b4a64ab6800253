//! Every field of a TrafficPolicy, and what it does to real requests through two real sidecars.
//!
//! Why a table against the schema: a field that nobody tried is one that may do nothing. Whoever adds one adds its case,
//! or `every_field_of_a_traffic_policy_has_a_case` fails; what is still owed from before there was a table is
//! listed, and may only become less.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use serde_json::{Value, json};
use weft_control_plane::{
    cli::demo::mesh::{Mesh, Workload, wait},
    resources::crd,
};
use weft_harness::apps::{curl, output};

use crate::{ECHO, Pair, pair};

/// A field, and the test that shows what it does: `<module of tests/mesh>::<name>`.
const CASES: [(&str, &str); 19] = [
    (
        "acceptedIdentities[]",
        "identity::who_is_not_among_the_identities_that_a_service_accepts_gets_no_request",
    ),
    (
        "limits.maxConnections",
        "fail_closed::http_opens_no_more_connections_to_a_service_than_its_policy_allows",
    ),
    ("limits.maxRequests", "fail_closed::caps_hold_for_the_whole_sidecar_however_many_workers_it_has"),
    ("loadBalancing.algorithm", "routing::a_slow_endpoint_gets_little_and_the_tail_is_half_of_round_robins"),
    ("rateLimits[].burst", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("rateLimits[].by.headers[]", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("rateLimits[].by.identity", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    (
        "rateLimits[].per",
        "policy::who_asks_too_often_is_told_when_to_come_again_and_the_app_sees_nothing_of_it",
    ),
    (
        "rateLimits[].requests",
        "policy::who_asks_too_often_is_told_when_to_come_again_and_the_app_sees_nothing_of_it",
    ),
    ("rateLimits[].to[].headers[].name", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("rateLimits[].to[].headers[].value", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("rateLimits[].to[].hosts[]", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("rateLimits[].to[].methods[]", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("rateLimits[].to[].paths[]", "policy::a_limit_is_about_what_it_names_and_counts_each_by_itself"),
    ("retries.maxRetries", "defaults::an_attempt_counter_travels_with_each_attempt"),
    ("retries.onReset", "faults::a_half_open_partition_is_noticed_within_fifteen_seconds"),
    ("retries.statuses[]", "routing::retries_by_status_are_opt_in_and_bounded"),
    ("timeouts.connect", "faults::a_third_of_all_packets_may_be_lost_and_no_request_is_stuck"),
    ("timeouts.request", "routing::a_request_timeout_answers_504_with_a_reason"),
];

/// Fields from before there was a table whose own effect no test of a mesh asserts yet.
const OWED: [&str; 23] = [
    "detectTimeout",
    "limits.queueWait",
    "loadBalancing.ewma.decay",
    "loadBalancing.ewma.initial",
    "mtlsRequired",
    "outlierEjection.backoff.jitter",
    "outlierEjection.backoff.max",
    "outlierEjection.backoff.min",
    "outlierEjection.consecutiveFailures",
    "outlierEjection.maxEjectionPercent",
    "outlierEjection.successRate.minRequests",
    "outlierEjection.successRate.threshold",
    "outlierEjection.successRate.window",
    "retries.anyMethod",
    "retries.backoff.jitter",
    "retries.backoff.max",
    "retries.backoff.min",
    "retries.budget.minPerSecond",
    "retries.budget.percent",
    "retries.budget.window",
    "retries.grpcCodes[]",
    "retries.maxBodyBytes",
    "timeouts.perTry",
];

/// The paths of all fields that hold a value. `targetRefs` says where a policy holds, which every case uses.
fn leaves(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    if let Some(fields) = schema["properties"].as_object() {
        for (name, field) in fields.iter().filter(|(name, _)| !(path.is_empty() && *name == "targetRefs")) {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            leaves(field, &path, found);
        }
    } else if schema["items"].is_object() {
        leaves(&schema["items"], &format!("{path}[]"), found);
    } else {
        found.insert(path.to_owned());
    }
}

#[test]
fn every_field_of_a_traffic_policy_has_a_case() {
    let crds = crd::all();
    let this = crds.iter().find(|crd| crd["spec"]["names"]["kind"] == "TrafficPolicy").unwrap();
    let schema = &this["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut fields = BTreeSet::new();
    leaves(schema, "", &mut fields);
    let listed: Vec<_> = CASES.iter().map(|(field, _)| *field).chain(OWED).collect();
    let unique: BTreeSet<_> = listed.iter().map(|field| (*field).to_owned()).collect();
    assert_eq!(unique.len(), listed.len(), "a field is listed twice");
    assert_eq!(unique, fields, "on the left what is listed, on the right what there is");
    for (field, test) in CASES {
        let (module, name) = test.split_once("::").unwrap();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("mesh/{module}.rs"));
        let text = fs::read_to_string(&file).unwrap_or_default();
        assert!(text.contains(&format!("#[test]\nfn {name}()")), "{field}: there is no test {test}");
    }
    println!("figure: fields of TrafficPolicy without a case: {} of {} (bound 23)", OWED.len(), fields.len());
}

/// Writes the policy of `echo` and waits until it is live: this text of it, not the one before.
fn says(mesh: &Mesh, spec: Value) {
    let version = || {
        let status = mesh.api("/api/v1/status")?;
        let objects = status["objects"].as_array().cloned().unwrap_or_default();
        let this =
            objects.iter().find(|object| object["kind"] == "TrafficPolicy" && object["name"] == "echo");
        anyhow::Ok(this.map(|object| object["version"].to_string()))
    };
    let before = version().unwrap();
    crate::policy(mesh, "echo", spec);
    wait(Duration::from_secs(10), || Ok(version()? != before)).expect("the policy is read");
    output(&mut mesh.weft(&["wait", "TrafficPolicy/shop/echo", "--applied"])).unwrap();
}

/// Status, reason and `Retry-After` of one request.
fn asks(pod: &weft_control_plane::cli::demo::netns::Pod, args: &[&str]) -> String {
    let what = ["-o", "/dev/null", "-w", "%{http_code} %header{weft-reason} %header{retry-after}"];
    curl(pod, &[&what[..], args].concat()).unwrap().trim().to_owned()
}

#[test]
fn who_asks_too_often_is_told_when_to_come_again_and_the_app_sees_nothing_of_it() {
    let seen = std::env::temp_dir().join(format!("weft-rate-{}", std::process::id()));
    let Some(pair) = pair("rate_limit", &["--seen", seen.to_str().unwrap()]) else { return };
    let three = json!([{"requests": 3, "per": "1h", "to": [{"paths": ["/three"]}]}]);
    says(&pair.mesh, json!({"rateLimits": three}));
    let url = format!("{ECHO}/three");
    let asked = |pair: &Pair| asks(&pair.client.pod, &[&url]);
    let answers: Vec<_> = (0..5).map(|_| asked(&pair)).collect();
    assert_eq!(answers[..3], ["200", "200", "200"]);
    for refused in &answers[3..] {
        let (said, after) = refused.rsplit_once(' ').unwrap();
        assert_eq!(said, "429 inbound;rate_limited");
        // An hour's third, less what has passed.
        assert!((1_100..=1_200).contains(&after.parse::<u64>().unwrap()), "{refused}");
    }
    let grpc = [
        "-H",
        "content-type: application/grpc",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %header{grpc-status}",
    ];
    assert_eq!(curl(&pair.client.pod, &[&grpc[..], &[&*url]].concat()).unwrap(), "200 8");
    // Another change of the policy gives nobody as many again, and a change of the limit begins anew.
    says(&pair.mesh, json!({"rateLimits": three, "timeouts": {"request": "10s"}}));
    assert!(asked(&pair).starts_with("429 "));
    says(&pair.mesh, json!({"rateLimits": [{"requests": 1, "per": "1h", "to": [{"paths": ["/three"]}]}]}));
    assert_eq!(asked(&pair), "200");
    assert!(asked(&pair).starts_with("429 "));
    // Without it nothing is limited.
    says(&pair.mesh, json!({"timeouts": {"request": "10s"}}));
    assert!((0..5).all(|_| asked(&pair) == "200"));
    // Who was refused was neither sent elsewhere nor held against the endpoint, and the app never saw it.
    let metric = |name: &str| pair.client.metric(name, &[]).unwrap();
    assert_eq!(
        [metric("weft_ejections_total"), metric("weft_retries_total"), metric("weft_redispatched_total")],
        [0.0; 3]
    );
    assert_eq!(pair.server.sidecar.metric("weft_rate_limited_total", &[]).unwrap(), 5.0);
    let arrived = fs::read_to_string(&seen).unwrap();
    assert_eq!(arrived.lines().filter(|line| line.contains("/three")).count(), 3 + 1 + 5, "{arrived}");
    fs::remove_file(&seen).unwrap();
}

#[test]
fn a_limit_is_about_what_it_names_and_counts_each_by_itself() {
    let Some(pair) = pair("rate_limits", &[]) else { return };
    let other = pair.mesh.workload(Workload::new("shop", "other")).unwrap();
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let two = |by: Value, to: Value| json!({"requests": 2, "per": "1h", "by": by, "to": [to]});
    says(
        &pair.mesh,
        json!({"rateLimits": [
            two(json!({}), json!({"paths": ["/all/*"]})),
            two(json!({"identity": true}), json!({"paths": ["/caller"]})),
            two(json!({"headers": ["x-user"]}), json!({"paths": ["/user"]})),
            two(json!({}), json!({"methods": ["DELETE"]})),
            two(json!({}), json!({"hosts": ["limited.example"]})),
            two(json!({}), json!({"headers": [{"name": "x-limited", "value": "yes"}]})),
            {"requests": 3600, "per": "1h", "burst": 1, "to": [{"paths": ["/burst"]}]},
        ]}),
    );
    let direct = format!("http://{}:8080", pair.server.sidecar.pod.ip);
    // So many of four requests are answered by the app.
    let of_four = |pod, base: &str, args: &[&str]| {
        let url = format!("{base}{}", args[0]);
        let args = [&[&*url], &args[1..]].concat();
        let answers: Vec<_> = (0..4).map(|_| asks(pod, &args)).collect();
        let refused = |answer: &&String| answer.starts_with("429 inbound;rate_limited");
        assert!(answers.iter().all(|answer| answer == "200" || refused(&answer)), "{answers:?}");
        answers.iter().filter(|answer| *answer == "200").count()
    };
    let client = &pair.client.pod;
    for (who, base, args, granted) in [
        (client, ECHO, &["/all/a"][..], 2),
        (&other.pod, ECHO, &["/all/b"], 0),
        (client, ECHO, &["/caller"], 2),
        (&other.pod, ECHO, &["/caller"], 2),
        (&outsider, &direct, &["/caller"], 2),
        (client, ECHO, &["/user", "-H", "x-user: ann"], 2),
        (&other.pod, ECHO, &["/user", "-H", "x-user: ann"], 0),
        (&other.pod, ECHO, &["/user", "-H", "x-user: bob"], 2),
        (&other.pod, ECHO, &["/user"], 2),
        (client, ECHO, &["/m", "-X", "DELETE"], 2),
        (client, ECHO, &["/m", "-X", "delete"], 0),
        (client, ECHO, &["/m"], 4),
        (client, ECHO, &["/h", "-H", "host: limited.example"], 2),
        (client, ECHO, &["/h"], 4),
        (client, ECHO, &["/x", "-H", "x-limited: yes"], 2),
        (client, ECHO, &["/x", "-H", "x-limited: no"], 4),
    ] {
        assert_eq!(of_four(who, base, args), granted, "{} {args:?}", who.name);
    }
    // One at once, and one a second.
    let url = format!("{ECHO}/burst");
    let at_once = curl(
        client,
        &[
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %header{retry-after}\n",
            &url,
            "--next",
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %header{retry-after}\n",
            &url,
        ],
    )
    .unwrap();
    assert_eq!(at_once, "200 \n429 1");
}
