//! What filters do to requests and answers, as a client and an app see it: the Gateway API's words cell by cell,
//! because its conformance suite looks at no `Location` and at no rewritten path.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use weft_control_plane::cli::demo::{
    mesh::{Mesh, wait},
    netns::Pod,
};
use weft_harness::apps::curl;

use crate::routing::{self, World};

const API: &str = "http://10.96.0.10";

/// Service `api`, which has only routes, and `v1` and `v2` with a pod each.
fn world(test: &str) -> Option<World> {
    routing::world(test, &[("v1-1", &[]), ("v2-1", &[])])
}

/// Writes an object, and returns when every sidecar that asked for what it says has it.
pub(super) fn applied(mesh: &Mesh, object: &serde_json::Value) {
    let [kind, namespace, name] = ["/kind", "/metadata/namespace", "/metadata/name"]
        .map(|at| object.pointer(at).and_then(serde_json::Value::as_str).unwrap().to_owned());
    let known = || {
        let status = mesh.api("/api/v1/status")?;
        let objects = status["objects"].as_array().cloned().unwrap_or_default();
        let is =
            |o: &&serde_json::Value| o["kind"] == kind && o["namespace"] == namespace && o["name"] == name;
        anyhow::Ok(objects.iter().find(is).cloned().unwrap_or_default())
    };
    let before = known().unwrap()["version"].clone();
    mesh.write(&format!("{kind}-{namespace}-{name}.yaml"), &format!("{object:#}\n")).unwrap();
    let live = wait(Duration::from_secs(20), || {
        let now = known()?;
        Ok(now["version"] != before && now["applied"] == now["of"])
    });
    live.unwrap_or_else(|e| panic!("{kind}/{namespace}/{name}: {e}: {:#}", known().unwrap_or_default()));
}

/// A route of one Service.
pub(super) fn http_route(
    namespace: &str,
    name: &str,
    service: &str,
    rules: serde_json::Value,
) -> serde_json::Value {
    serde_json::json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": service}], "rules": rules},
    })
}

/// Status and headers of an answer, and its body: what the app saw, if it was the app.
pub(super) fn answer(pod: &Pod, args: &[&str]) -> (String, String) {
    let text = curl(pod, &[&["-i", "-H", "x-tell: head"], args].concat()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    (head.to_owned(), body.to_owned())
}

/// The lines of one header.
pub(super) fn lines<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(": "));
    fields.filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim_end()).collect()
}

/// Who answered how often, of `n` requests of one client on one connection, and with which status.
pub(super) fn answers(pod: &Pod, url: &str, n: u32, args: &[&str]) -> BTreeMap<String, u32> {
    let url = format!("{url}?n=[1-{n}]");
    let said = ["-o", "/dev/null", "-w", "%header{x-served-by} %{http_code} %header{grpc-status}\n", &url];
    let mut seen = BTreeMap::new();
    for line in curl(pod, &[&said, args].concat()).unwrap().lines() {
        *seen.entry(line.trim().to_owned()).or_default() += 1;
    }
    seen
}

#[test]
fn redirects_say_where_to_in_the_words_of_the_gateway_api() {
    let Some(world) = world("redirects") else { return };
    // (path of the rule, what the filter says, where on port 80, where on port 8080, status)
    let prefix = |to: &str| serde_json::json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": to});
    let full = |to: &str| serde_json::json!({"type": "ReplaceFullPath", "replaceFullPath": to});
    let cells = [
        (
            "/none",
            serde_json::json!({}),
            "http://api.shop/none/x?q=1",
            "http://api.shop:8080/none/x?q=1",
            302,
        ),
        (
            "/host",
            serde_json::json!({"hostname": "example.org"}),
            "http://example.org/host/x?q=1",
            "http://example.org:8080/host/x?q=1",
            302,
        ),
        (
            "/301",
            serde_json::json!({"statusCode": 301}),
            "http://api.shop/301/x?q=1",
            "http://api.shop:8080/301/x?q=1",
            301,
        ),
        (
            "/303",
            serde_json::json!({"statusCode": 303}),
            "http://api.shop/303/x?q=1",
            "http://api.shop:8080/303/x?q=1",
            303,
        ),
        (
            "/307",
            serde_json::json!({"statusCode": 307}),
            "http://api.shop/307/x?q=1",
            "http://api.shop:8080/307/x?q=1",
            307,
        ),
        (
            "/308",
            serde_json::json!({"statusCode": 308}),
            "http://api.shop/308/x?q=1",
            "http://api.shop:8080/308/x?q=1",
            308,
        ),
        // A port that is named counts; one that goes without saying is not said.
        (
            "/port",
            serde_json::json!({"port": 8083}),
            "http://api.shop:8083/port/x?q=1",
            "http://api.shop:8083/port/x?q=1",
            302,
        ),
        (
            "/p80",
            serde_json::json!({"port": 80}),
            "http://api.shop/p80/x?q=1",
            "http://api.shop/p80/x?q=1",
            302,
        ),
        (
            "/p443",
            serde_json::json!({"port": 443}),
            "http://api.shop:443/p443/x?q=1",
            "http://api.shop:443/p443/x?q=1",
            302,
        ),
        // A scheme brings its own port.
        (
            "/https",
            serde_json::json!({"scheme": "https"}),
            "https://api.shop/https/x?q=1",
            "https://api.shop/https/x?q=1",
            302,
        ),
        (
            "/http",
            serde_json::json!({"scheme": "http"}),
            "http://api.shop/http/x?q=1",
            "http://api.shop/http/x?q=1",
            302,
        ),
        (
            "/s443",
            serde_json::json!({"scheme": "https", "port": 443}),
            "https://api.shop/s443/x?q=1",
            "https://api.shop/s443/x?q=1",
            302,
        ),
        (
            "/s80",
            serde_json::json!({"scheme": "https", "port": 80}),
            "https://api.shop:80/s80/x?q=1",
            "https://api.shop:80/s80/x?q=1",
            302,
        ),
        // Paths, each query kept.
        (
            "/prefix",
            serde_json::json!({"path": prefix("/new")}),
            "http://api.shop/new/x?q=1",
            "http://api.shop:8080/new/x?q=1",
            302,
        ),
        (
            "/slash",
            serde_json::json!({"path": prefix("/new/")}),
            "http://api.shop/new/x?q=1",
            "http://api.shop:8080/new/x?q=1",
            302,
        ),
        (
            "/gone",
            serde_json::json!({"path": prefix("/")}),
            "http://api.shop/x?q=1",
            "http://api.shop:8080/x?q=1",
            302,
        ),
        (
            "/empty",
            serde_json::json!({"path": prefix("")}),
            "http://api.shop/x?q=1",
            "http://api.shop:8080/x?q=1",
            302,
        ),
        (
            "/full",
            serde_json::json!({"path": full("/all")}),
            "http://api.shop/all?q=1",
            "http://api.shop:8080/all?q=1",
            302,
        ),
        (
            "/everything",
            serde_json::json!({"scheme": "https", "hostname": "example.org", "port": 8443, "path": prefix("/new"), "statusCode": 308}),
            "https://example.org:8443/new/x?q=1",
            "https://example.org:8443/new/x?q=1",
            308,
        ),
    ];
    // A route has 16 rules at most in Kubernetes; two are merged here.
    for (n, some) in cells.chunks(10).enumerate() {
        let rules = some.iter().map(|(path, redirect, ..)| {
            serde_json::json!({
                "matches": [{"path": {"type": "PathPrefix", "value": path}}],
                "filters": [
                    {"type": "RequestRedirect", "requestRedirect": redirect},
                    {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "X-Moved", "value": "yes"}]}},
                ],
            })
        });
        applied(&world.mesh, &http_route("shop", &format!("moved-{n}"), "api", rules.collect()));
    }
    for (path, _, on_80, on_8080, status) in &cells {
        for (port, want) in [(80, on_80), (8080, on_8080)] {
            let host =
                if port == 80 { "Host: api.shop".to_owned() } else { format!("Host: api.shop:{port}") };
            let (head, _) = answer(&world.client.pod, &[&format!("{API}:{port}{path}/x?q=1"), "-H", &host]);
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {head}");
            assert_eq!(lines(&head, "location"), [*want], "{path} on {port}");
            assert_eq!(lines(&head, "x-moved"), ["yes"], "{path}");
        }
    }
    // Without a Host there is only the address; and HTTP/2 is told the same.
    let (head, _) = answer(&world.client.pod, &[&format!("{API}/none"), "-0", "-H", "Host:"]);
    assert_eq!(lines(&head, "location"), [format!("{API}/none")]);
    let (head, _) = answer(
        &world.client.pod,
        &[&format!("{API}/port"), "--http2-prior-knowledge", "-H", "Host: api.shop"],
    );
    assert_eq!(lines(&head, "location"), ["http://api.shop:8083/port"]);
    println!("figure: redirects, cells of filter and port: {} (bound {})", cells.len() * 2, cells.len() * 2);
}

#[test]
fn rewrites_and_header_filters_reach_the_app_together() {
    let Some(world) = world("rewrites") else { return };
    let rewrite = |prefix: &str, to: serde_json::Value| {
        serde_json::json!({
            "matches": [{"path": {"type": "PathPrefix", "value": prefix}}],
            "filters": [
                {"type": "URLRewrite", "urlRewrite": to},
                {"type": "RequestHeaderModifier", "requestHeaderModifier": {
                    "set": [{"name": "X-Header-Set", "value": "set"}],
                    "add": [{"name": "X-Header-Add", "value": "added,twice"}, {"name": "Cookie", "value": "mesh=1"}],
                    "remove": ["X-Header-Remove"]}},
                {"type": "ResponseHeaderModifier", "responseHeaderModifier": {
                    "set": [{"name": "X-Answer", "value": "set"}],
                    "add": [{"name": "X-Served-By", "value": "mesh"}, {"name": "Set-Cookie", "value": "a=1"}],
                    "remove": ["Content-Type"]}},
            ],
            "backendRefs": [{"name": "v1", "port": 80}],
        })
    };
    let prefix =
        |to: &str| serde_json::json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": to}});
    applied(
        &world.mesh,
        &http_route(
            "shop",
            "rewrite",
            "api",
            serde_json::json!([
                rewrite("/foo", prefix("/xyz")),
                rewrite("/slash/", prefix("/xyz/")),
                rewrite("/strip", prefix("/")),
                rewrite("/none", prefix("")),
                rewrite(
                    "/full",
                    serde_json::json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/one"}})
                ),
                rewrite("/host", serde_json::json!({"hostname": "other.example"})),
                rewrite(
                    "/both",
                    serde_json::json!({"hostname": "other.example", "path": {"type": "ReplaceFullPath", "replaceFullPath": "/b"}})
                ),
            ]),
        ),
    );
    let sent = [
        "-H",
        "Host: api.shop",
        "-H",
        "x-header-set: a",
        "-H",
        "x-header-set: b",
        "-H",
        "x-header-add: first",
        "-H",
        "X-HEADER-REMOVE: gone",
        "-H",
        "x-kept: kept",
        "-H",
        "cookie: own=1",
    ];
    let cells = [
        ("/foo/bar?q=1", "/xyz/bar?q=1", "api.shop"),
        ("/foo", "/xyz", "api.shop"),
        ("/foo/", "/xyz/", "api.shop"),
        ("/slash/a", "/xyz/a", "api.shop"),
        ("/slash", "/xyz", "api.shop"),
        ("/strip", "/", "api.shop"),
        ("/strip/", "/", "api.shop"),
        ("/strip/three", "/three", "api.shop"),
        ("/none", "/", "api.shop"),
        ("/none/three?a=b&c", "/three?a=b&c", "api.shop"),
        ("/full/one/two?q=%20", "/one?q=%20", "api.shop"),
        ("/host/a%2Fb", "/host/a%2Fb", "other.example"),
        ("/both/x", "/b", "other.example"),
    ];
    for http in ["--http1.1", "--http2-prior-knowledge"] {
        for (path, want, host) in cells {
            let (head, seen) =
                answer(&world.client.pod, &[&[&*format!("{API}{path}"), http], &sent[..]].concat());
            let target = seen.split(' ').nth(1).unwrap_or_default();
            let (path_seen, host_seen) =
                match target.strip_prefix("http://").and_then(|rest| rest.split_once('/')) {
                    Some((host, path)) => (format!("/{path}"), vec![host]),
                    None => (target.to_owned(), lines(&seen, "host")),
                };
            assert_eq!((&*path_seen, host_seen), (want, vec![host]), "{http} {path}: {seen}");
            for (name, value) in [
                ("x-header-set", vec!["set"]),
                ("x-header-add", vec!["first,added,twice"]),
                ("x-header-remove", vec![]),
                ("x-kept", vec!["kept"]),
                ("cookie", vec!["own=1; mesh=1"]),
            ] {
                assert_eq!(lines(&seen, name), value, "{http} {path}: {seen}");
            }
            for (name, value) in [
                ("x-answer", vec!["set"]),
                ("x-served-by", vec!["v1-1,mesh"]),
                ("set-cookie", vec!["a=1"]),
                ("content-type", vec![]),
            ] {
                assert_eq!(lines(&head, name), value, "{http} {path}: {head}");
            }
        }
    }
    println!("figure: rewrites, cells of path and version: {} (bound {})", cells.len() * 2, cells.len() * 2);
}

#[test]
fn filters_of_a_backend_are_for_its_share_alone() {
    let Some(world) = world("backend_filters") else { return };
    let named = |name: &str| {
        serde_json::json!([
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-for", "value": name}], "remove": ["x-gone"]}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-from", "value": name}]}},
            {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": format!("/{name}")}}},
        ])
    };
    let away = serde_json::json!([{"type": "RequestRedirect", "requestRedirect": {"hostname": "away.example", "statusCode": 307}}]);
    applied(
        &world.mesh,
        &http_route(
            "shop",
            "share",
            "api",
            serde_json::json!([{
                "matches": [{"path": {"type": "PathPrefix", "value": "/in"}}],
                "filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-rule", "value": "r"}]}}],
                "backendRefs": [
                    {"name": "v1", "port": 80, "filters": named("one")},
                    {"name": "v2", "port": 80, "filters": named("two")},
                    {"name": "v2", "port": 80, "filters": away},
                ],
            }]),
        ),
    );
    let mut seen = BTreeMap::new();
    for _ in 0..60 {
        let (head, body) =
            answer(&world.client.pod, &[&format!("{API}/in/x?q=1"), "-H", "Host: api", "-H", "x-gone: x"]);
        let target = body.split(' ').nth(1).unwrap_or_default().to_owned();
        assert!(lines(&body, "x-gone").is_empty(), "{body}");
        let about = |name| lines(&head, name).join(",");
        let facts = [
            about("x-served-by"),
            about("x-from"),
            lines(&body, "x-for").join(","),
            target,
            about("location"),
        ];
        *seen.entry(facts.join(" ")).or_insert(0) += 1;
    }
    let wanted = ["    http://away.example/in/x?q=1", "v1-1 one one /one/x?q=1 ", "v2-1 two two /two/x?q=1 "];
    assert_eq!(seen.keys().map(String::as_str).collect::<Vec<_>>(), wanted, "{seen:?}");
}

#[test]
fn what_does_not_resolve_answers_500_for_its_share_and_harms_nothing_else() {
    let Some(world) = world("bad_refs") else { return };
    let to = |path: &str, other: serde_json::Value| {
        serde_json::json!({
            "matches": [{"path": {"type": "PathPrefix", "value": path}}],
            "backendRefs": [{"name": "v1", "port": 80}, other],
        })
    };
    applied(
        &world.mesh,
        &http_route(
            "shop",
            "bad",
            "api",
            serde_json::json!([
                to("/missing", serde_json::json!({"name": "missing", "port": 80})),
                to("/port", serde_json::json!({"name": "v2", "port": 81})),
                to("/kind", serde_json::json!({"name": "v2", "kind": "Bucket", "group": "cloud.example", "port": 80})),
                to("/no-port", serde_json::json!({"name": "v2"})),
                to("/filter", serde_json::json!({"name": "v2", "port": 80, "filters": [{"type": "Teleport"}]})),
                to("/idle", serde_json::json!({"name": "missing", "port": 80, "weight": 0})),
                {"matches": [{"path": {"type": "PathPrefix", "value": "/teleport"}}], "backendRefs": [{"name": "v1", "port": 80}],
                 "filters": [{"type": "Teleport"}]},
                {"matches": [{"path": {"type": "PathPrefix", "value": "/nothing"}}]},
            ]),
        ),
    );
    let pod = &world.client.pod;
    for path in ["/missing", "/port", "/kind", "/no-port", "/filter"] {
        let seen = answers(pod, &format!("{API}{path}"), 100, &[]);
        let bad = seen.get("500").copied().unwrap_or_default();
        assert_eq!(
            (bad + seen.get("v1-1 200").copied().unwrap_or_default(), seen.len()),
            (100, 2),
            "{path}: {seen:?}"
        );
        // Five standard deviations.
        assert!((25..=75).contains(&bad), "{path}: {seen:?}");
    }
    let only =
        |seen: BTreeMap<String, u32>, what: &str| assert_eq!(seen, BTreeMap::from([(what.to_owned(), 50)]));
    only(answers(pod, &format!("{API}/idle"), 50, &[]), "v1-1 200");
    only(answers(pod, &format!("{API}/teleport"), 50, &[]), "500");
    only(answers(pod, &format!("{API}/nothing"), 50, &[]), "500");
    only(answers(pod, &format!("{API}/nowhere"), 50, &[]), "404");
    // gRPC callers are told in gRPC: UNAVAILABLE, and UNIMPLEMENTED where nothing matches.
    let call = |path: &str| {
        let grpc = ["--http2-prior-knowledge", "-H", "content-type: application/grpc", "-X", "POST"];
        let seen = answers(pod, &format!("{API}{path}"), 1, &grpc);
        seen.into_keys().next().unwrap()
    };
    assert_eq!((&*call("/teleport"), &*call("/nowhere")), ("200 14", "200 12"));
    let seen: BTreeSet<_> = (0..40).map(|_| call("/missing")).collect();
    assert!(
        seen.len() == 2 && seen.contains("200 14") && seen.iter().any(|said| said.starts_with("v1-1 200")),
        "{seen:?}"
    );
}
