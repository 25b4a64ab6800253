//! What callers are told: protocols, routes rule by rule, policies on them, and what their authors are told.

use std::collections::BTreeSet;

use weft_core::policy::{Algorithm, Filter, PathMatch, Protocol, Tunnel};

use super::{SHOP, apply, delete, index, service, uid};
use crate::{
    index::{Event, Index, Key, objects::declared_protocol},
    resources::{Kind, ObjectKey},
};

#[test]
fn services_declare_protocols() {
    let index = index(SHOP);
    let (cart, _) = index.service(&service("shop/cart:80")).unwrap();
    assert_eq!(cart.protocol, Protocol::Http1, "from the port's name");
    assert_eq!(cart.vips, ["10.96.0.10".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(cart.endpoints.as_deref(), Some("ep/shop/cart:80/*"));
    assert!(cart.route.is_none());
    for (app, name, protocol) in [
        (Some("kubernetes.io/h2c"), "http", Protocol::Http2),
        (Some("grpc"), "", Protocol::Grpc),
        (Some("mongo"), "tcp", Protocol::Detect),
        (None, "tcp-mysql", Protocol::Opaque),
        (None, "https", Protocol::Tls),
        (None, "web", Protocol::Detect),
    ] {
        assert_eq!(declared_protocol(app, name), protocol, "{app:?} {name}");
    }
    // The pod's own port, by what its services declare.
    let pod = index.pod_address("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(pod.service(8080).protocol, Protocol::Http1);
    assert_eq!(pod.service(1).protocol, Protocol::Detect);
    assert_eq!(pod.service(8080).pod.unwrap().uid, uid("cart-1-uid"));
    assert_eq!(pod.service(9090).pod.unwrap().tunnel, Tunnel::None);
    assert!(index.pod_address("fd00::1".parse().unwrap()).is_some());
    assert!(index.pod_address("10.0.0.9".parse().unwrap()).is_none());
}

const ROUTE: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop, creationTimestamp: "2026-01-01T00:00:00Z"}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, port: 80}]
  hostnames: [ignored.example]
  rules:
    - name: new
      matches:
        - path: {value: /v2/}
          headers: [{name: X-User, value: "1"}, {name: x-user, value: "2"}]
          method: GET
      timeouts: {request: 1m30s, backendRequest: 0s}
      backendRefs:
        - {name: cart, port: 80, weight: 90}
        - {name: cart-v2, port: 80, weight: 10}
        - {name: gone, port: 80, weight: 0}
        - {name: bucket, kind: Bucket, group: cloud.example}
    - matches: [{path: {type: Glob, value: /x}}]
    - filters: [{type: RequestMirror}, {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
"#;

#[test]
fn routes_compile_rule_by_rule() {
    let mut index = index(SHOP);
    let dirty = apply(&mut index, ROUTE);
    let wanted = [Key::Service(service("shop/cart:80")), Key::Route(service("shop/cart:80"))];
    assert_eq!(dirty, BTreeSet::from(wanted));
    let (cart, _) = index.service(&service("shop/cart:80")).unwrap();
    assert_eq!(cart.route.as_deref(), Some("route/shop/cart:80"));
    assert!(index.route(&service("shop/cart:9090")).is_none());

    let (compiled, _) = index.route(&service("shop/cart:80")).unwrap();
    assert_eq!(compiled.rules.len(), 2, "a rule with a match that is not known is dropped");
    let new = &compiled.rules[0];
    assert_eq!(&*new.label, "HTTPRoute/shop/split/new");
    assert!(new.hosts.is_empty());
    assert!(matches!(&new.matches[0].path, Some(PathMatch::Prefix(p)) if &**p == "/v2"));
    assert_eq!(new.matches[0].headers.len(), 1, "of equal names the first counts");
    assert_eq!(new.timeouts.request, Some(std::time::Duration::from_secs(90)));
    assert_eq!(new.timeouts.per_try, None);
    assert_eq!(new.backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [90, 10, 0, 1]);
    assert_eq!(new.backends[2].service, service("shop/gone:80"), "kept: it may appear");
    assert!(matches!(new.backends[3].filters[0], Filter::Invalid { .. }));
    assert!(new.created > 1_700_000_000);
    let last = &compiled.rules[1];
    assert_eq!(&*last.label, "HTTPRoute/shop/split/2");
    assert!(matches!(last.filters[0], Filter::Invalid { .. }), "an unknown filter must not be skipped");

    let conditions = index.conditions(&ObjectKey::new(Kind::HttpRoute, "shop", "split"));
    let find = |kind: &str| conditions.iter().find(|c| c.kind == kind).unwrap();
    assert!(find("Accepted").status);
    assert_eq!(find("Accepted").parent, "Service/shop/cart:80");
    assert_eq!(find("ResolvedRefs").reason, "BackendNotFound");
    assert!(find("PartiallyInvalid").message.starts_with("Dropped Rule 1: "));

    assert_eq!(delete(&mut index, Kind::HttpRoute, "split").len(), 2);
    assert!(index.route(&service("shop/cart:80")).is_none());
}

#[test]
fn a_route_whose_rules_were_all_dropped_lets_nothing_through() {
    let mut index = index(SHOP);
    let route = |rules: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\n\
             spec:\n  parentRefs: [{{group: core, kind: Service, name: cart, port: 80}}]\n  rules: {rules}\n"
        )
    };
    apply(
        &mut index,
        &route("[{matches: [{path: {type: Glob, value: /x}}], backendRefs: [{name: cart, port: 80}]}]"),
    );
    let (compiled, _) = index.route(&service("shop/cart:80")).unwrap();
    let [rule] = &compiled.rules[..] else { panic!("{compiled:?}") };
    assert!(rule.matches.is_empty() && rule.backends.is_empty());
    assert!(matches!(&rule.filters[..], [Filter::Invalid { reason }] if reason.contains("Glob")), "{rule:?}");
    let accepted = index.conditions(&ObjectKey::new(Kind::HttpRoute, "shop", "r"));
    assert!(!accepted[0].status, "{accepted:?}");
    // No rules at all are no rules to keep.
    apply(&mut index, &route("[]"));
    assert!(index.route(&service("shop/cart:80")).unwrap().0.rules.is_empty());
}

#[test]
fn grpc_routes_take_their_port() {
    let mut index = index(SHOP);
    apply(&mut index, ROUTE);
    apply(
        &mut index,
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop}
spec:
  parentRefs: [{group: core, kind: Service, name: cart, port: 80}]
  rules:
    - matches: [{method: {service: shop.Cart, method: Add}}]
      backendRefs: [{name: cart, port: 80}]
"#,
    );
    let (cart, _) = index.service(&service("shop/cart:80")).unwrap();
    assert_eq!(cart.protocol, Protocol::Grpc);
    let (compiled, _) = index.route(&service("shop/cart:80")).unwrap();
    assert_eq!(compiled.rules.len(), 1);
    assert_eq!(&*compiled.rules[0].label, "GRPCRoute/shop/calls/0");
    let http = index.conditions(&ObjectKey::new(Kind::HttpRoute, "shop", "split"));
    assert_eq!(http[0].reason, "Conflicted");
}

#[test]
fn the_most_specific_traffic_policy_wins_field_by_field() {
    let mut index = index(SHOP);
    apply(&mut index, ROUTE);
    let dirty = apply(
        &mut index,
        r#"
apiVersion: weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: a, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  timeouts: {request: 10s, connect: 250ms, perTry: 2s}
  retries: {statuses: [5xx, 429], grpcCodes: [UNAVAILABLE], maxRetries: 2, budget: {percent: 10}, backoff: {min: 1s}}
  loadBalancing: {algorithm: RoundRobin}
  outlierEjection: {consecutiveFailures: 3, successRate: {threshold: 90}, maxEjectionPercent: 30}
  limits: {maxRequests: 7}
  mtlsRequired: true
  acceptedIdentities: [spiffe://other.org/ns/shop/sa/cart]
---
apiVersion: weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: b, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: split, sectionName: "2"}]
  timeouts: {request: 1s}
"#,
    );
    assert!(dirty.contains(&Key::Service(service("shop/cart:9090"))));
    let (cart, _) = index.service(&service("shop/cart:80")).unwrap();
    assert_eq!(cart.load_balancing.algorithm, Algorithm::RoundRobin);
    assert_eq!(cart.health.consecutive_failures, 3);
    assert_eq!(cart.health.success_rate.unwrap().threshold, 0.9);
    assert_eq!(cart.health.max_ejection_percent, 30);
    assert_eq!(cart.limits.max_requests, 7);
    assert!(cart.mtls_required);
    assert_eq!(cart.accepted_identities.len(), 1);
    assert_eq!(cart.retry.statuses, [500..=599, 429..=429]);
    assert_eq!(cart.retry.budget.ratio, 0.1);
    assert_eq!(cart.retry.backoff.min(), std::time::Duration::from_secs(1));
    let (compiled, _) = index.route(&service("shop/cart:80")).unwrap();
    assert_eq!(
        compiled.rules[0].timeouts.request,
        Some(std::time::Duration::from_secs(90)),
        "the rule's own"
    );
    assert_eq!(compiled.rules[0].timeouts.connect, Some(std::time::Duration::from_millis(250)));
    assert_eq!(compiled.rules[0].retry.max_retries, 2);
    assert_eq!(
        compiled.rules[1].timeouts.request,
        Some(std::time::Duration::from_secs(1)),
        "the rule's policy"
    );
    assert_eq!(compiled.rules[1].timeouts.per_try, Some(std::time::Duration::from_secs(2)), "the service's");
}

#[test]
fn a_parent_that_cannot_be_is_not_accepted() {
    let mut index = index(SHOP);
    apply(
        &mut index,
        r#"
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs:
    - {group: core, kind: Service, name: missing}
    - {group: core, kind: Service, name: headless}
    - {group: core, kind: Service, name: cart, port: 1}
    - {group: core, kind: Service, name: cart, namespace: other}
    - {name: gateway}
  rules: []
"#,
    );
    let conditions = index.conditions(&ObjectKey::new(Kind::HttpRoute, "shop", "r"));
    let accepted: Vec<_> =
        conditions.iter().filter(|c| c.kind == "Accepted").map(|c| (c.status, c.reason)).collect();
    assert_eq!(accepted, [(false, "NoMatchingParent"); 4]);
}

#[test]
fn a_grpc_route_says_what_the_pods_speak() {
    let mut index = index(SHOP);
    let route = "
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: g, namespace: shop}
spec: {parentRefs: [{group: \"\", kind: Service, name: cart}], rules: [{}]}
";
    assert!(apply(&mut index, route).contains(&Key::Workload(uid("cart-1-uid"))));
    assert!(delete(&mut index, Kind::GrpcRoute, "g").contains(&Key::Workload(uid("cart-1-uid"))));
}

/// A route of `cart` in a namespace; `of` is what stands in the parentRef beside its name.
fn route_in(kind: &str, namespace: &str, name: &str, of: &str, backend: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\n\
         metadata: {{name: {name}, namespace: {namespace}, generation: 3}}\n\
         spec:\n  parentRefs: [{{group: \"\", kind: Service, name: cart, namespace: shop{of}}}]\n  \
         rules: [{{backendRefs: [{{name: {backend}, namespace: shop, port: 80}}]}}]\n"
    )
}

fn labels(index: &Index, name: &str, from: &str) -> Vec<String> {
    let route = index.route_from(&service(name), &from.into());
    route.map_or_else(Vec::new, |(route, _)| route.rules.iter().map(|r| r.label.to_string()).collect())
}

#[test]
fn consumer_routes_replace_the_producers_for_callers_of_their_namespace() {
    let mut index = index(SHOP);
    let (cart, metrics) = (service("shop/cart:80"), service("shop/cart:9090"));
    apply(&mut index, &route_in("HTTPRoute", "shop", "ours", "", "cart"));
    let dirty = apply(&mut index, &route_in("HTTPRoute", "till", "theirs", ", port: 80", "cart-v2"));
    assert_eq!(dirty, BTreeSet::from([Key::Service(cart.clone()), Key::Route(cart.clone())]));
    // Whoever has no route of its own shares what the producers say.
    assert_eq!(index.consumers(&cart).iter().map(|n| &**n).collect::<Vec<_>>(), ["till"]);
    assert!(index.consumers(&metrics).is_empty(), "the parentRef names a port");
    assert_eq!(labels(&index, "shop/cart:80", "shop"), ["HTTPRoute/shop/ours/0"]);
    assert_eq!(labels(&index, "shop/cart:80", "till"), ["HTTPRoute/till/theirs/0"]);
    let route = |from: &str| index.service_from(&cart, &from.into()).unwrap().0.route.unwrap();
    assert_eq!((&*route("shop"), &*route("till")), ("route/shop/cart:80", "route/shop/cart.from.till:80"));
    let accepted = index.conditions(&ObjectKey::new(Kind::HttpRoute, "till", "theirs"));
    assert!(accepted.iter().all(|c| c.status && c.parent_ref == Some(0)), "{accepted:?}");

    // The two groups never meet: a GRPCRoute of one does not conflict with an HTTPRoute of the other.
    apply(&mut index, &route_in("GRPCRoute", "till", "calls", "", "cart"));
    assert_eq!(labels(&index, "shop/cart:80", "shop"), ["HTTPRoute/shop/ours/0"]);
    assert_eq!(labels(&index, "shop/cart:80", "till"), ["GRPCRoute/till/calls/0"]);
    let conditions = |index: &Index, namespace: &str, name: &str| {
        index.conditions(&ObjectKey::new(Kind::HttpRoute, namespace, name))[0].reason
    };
    assert_eq!(conditions(&index, "shop", "ours"), "Accepted");
    assert_eq!(conditions(&index, "till", "theirs"), "Conflicted");
    let protocol = |index: &Index, from: &str| index.service_from(&cart, &from.into()).unwrap().0.protocol;
    assert_eq!((protocol(&index, "shop"), protocol(&index, "till")), (Protocol::Http1, Protocol::Grpc));

    for (kind, name) in [(Kind::GrpcRoute, "calls"), (Kind::HttpRoute, "theirs")] {
        let dirty = index.apply(Event::Delete(ObjectKey::new(kind, "till", name)));
        assert!(dirty.contains(&Key::Service(cart.clone())));
    }
    assert!(index.consumers(&cart).is_empty() && index.consumer_routes.is_empty());
}

#[test]
fn a_parent_ref_means_all_ports_or_one_by_number_or_by_name() {
    for (of, ports) in [
        ("", [true, true]),
        (", port: 80", [true, false]),
        (", port: 9090", [false, true]),
        (", sectionName: metrics", [false, true]),
        (", sectionName: metrics, port: 9090", [false, true]),
        (", sectionName: metrics, port: 80", [false, false]),
        (", sectionName: other", [false, false]),
    ] {
        let mut index = index(SHOP);
        apply(&mut index, &route_in("HTTPRoute", "shop", "r", of, "cart"));
        let routed = ["shop/cart:80", "shop/cart:9090"].map(|name| !labels(&index, name, "shop").is_empty());
        assert_eq!(routed, ports, "{of}");
        let key = ObjectKey::new(Kind::HttpRoute, "shop", "r");
        let accepted = index.conditions(&key)[0].clone();
        assert_eq!(accepted.status, ports != [false, false], "{accepted:?}");
        assert_eq!(index.route_generation(&key), Some(3));
    }
    // Several parents of one route, one of them wrong.
    let mut index = index(SHOP);
    let parents = "[{group: core, kind: Service, name: cart, port: 80}, {group: \"\", kind: Service, name: cart-v2}, \
                   {group: core, kind: Service, name: cart, port: 1}]";
    apply(
        &mut index,
        &format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\n\
             spec: {{parentRefs: {parents}, rules: [{{backendRefs: [{{name: cart, port: 80}}]}}]}}\n"
        ),
    );
    assert_eq!(labels(&index, "shop/cart:80", "shop").len(), 1);
    assert_eq!(labels(&index, "shop/cart-v2:80", "shop").len(), 1);
    let conditions = index.conditions(&ObjectKey::new(Kind::HttpRoute, "shop", "r"));
    let accepted = conditions.iter().filter(|c| c.kind == "Accepted");
    let accepted: Vec<_> = accepted.map(|c| (c.parent_ref, c.status)).collect();
    assert_eq!(accepted, [(Some(0), true), (Some(1), true), (Some(2), false)]);
}

#[test]
fn what_a_route_says_that_cannot_be_done_is_a_condition_and_answers_500() {
    let redirect = |rest: &str| format!("filters: [{{type: RequestRedirect, requestRedirect: {{{rest}}}}}]");
    let rewrite = |rest: &str| format!("filters: [{{type: URLRewrite, urlRewrite: {{{rest}}}}}]");
    let set = |name: &str| {
        format!(
            "filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: {name}, value: x}}]}}}}]"
        )
    };
    let prefix = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}";
    for (rule, reason) in [
        (redirect("statusCode: 418"), "UnsupportedValue"),
        (redirect("scheme: gopher"), "UnsupportedValue"),
        (redirect("hostname: \"a b\""), "UnsupportedValue"),
        (redirect("path: {type: ReplaceSuffix}"), "UnsupportedValue"),
        (rewrite("path: {type: ReplaceFullPath}"), "UnsupportedValue"),
        (rewrite("path: {type: ReplaceFullPath, replaceFullPath: \"/a?b\"}"), "UnsupportedValue"),
        (rewrite("hostname: \"a.example/\""), "UnsupportedValue"),
        (format!("matches: [{{path: {{type: Exact, value: /a}}}}], {}", rewrite(prefix)), "UnsupportedValue"),
        (set("Content-Length"), "UnsupportedValue"),
        (set("connection"), "UnsupportedValue"),
        (set("Host"), "UnsupportedValue"),
        (set("weft-unsent"), "UnsupportedValue"),
        (set("\"a b\""), "UnsupportedValue"),
        ("filters: [{type: Teleport}]".to_owned(), "UnsupportedValue"),
        ("filters: [{type: RequestHeaderModifier}]".to_owned(), "UnsupportedValue"),
        ("matches: [{headers: [{type: Fuzzy, name: a, value: b}]}]".to_owned(), "UnsupportedValue"),
        ("matches: [{path: {value: no-slash}}]".to_owned(), "UnsupportedValue"),
        (
            "filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]"
                .to_owned(),
            "IncompatibleFilters",
        ),
        (
            "filters: [{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}]".to_owned(),
            "IncompatibleFilters",
        ),
    ] {
        let route = |rules: &str| {
            format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\n\
                 spec:\n  parentRefs: [{{group: \"\", kind: Service, name: cart, port: 80}}]\n  rules: [{rules}]\n"
            )
        };
        let bad = format!("{{backendRefs: [{{name: cart, port: 80}}], {rule}}}");
        let key = ObjectKey::new(Kind::HttpRoute, "shop", "r");
        let mut index = index(SHOP);
        apply(&mut index, &route(&bad));
        let accepted = index.conditions(&key)[0].clone();
        assert_eq!((accepted.kind, accepted.status, accepted.reason), ("Accepted", false, reason), "{rule}");
        let (compiled, _) = index.route(&service("shop/cart:80")).unwrap();
        assert!(
            compiled.rules.iter().any(|rule| matches!(&rule.filters[..], [Filter::Invalid { .. }])),
            "{rule}: {compiled:?}"
        );
        // Beside a good rule it is that rule alone.
        apply(&mut index, &route(&format!("{bad}, {{backendRefs: [{{name: cart, port: 80}}]}}")));
        let conditions = index.conditions(&key);
        assert!(conditions[0].status, "{rule}: {conditions:?}");
        let partly = conditions.iter().find(|c| c.kind == "PartiallyInvalid").unwrap();
        assert!(partly.status && partly.message.starts_with("Dropped Rule 0: "), "{partly:?}");
    }
}

#[test]
fn backends_that_do_not_resolve_say_why() {
    let mut index = index(SHOP);
    apply(
        &mut index,
        "apiVersion: v1\nkind: Service\nmetadata: {name: tls, namespace: shop}\n\
         spec: {clusterIP: 10.96.0.30, ports: [{name: https, port: 443}]}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: shop}\n\
         spec: {type: ExternalName, externalName: a.example, ports: [{port: 80}]}\n",
    );
    for (backend, reason) in [
        ("{name: cart, port: 80}", "ResolvedRefs"),
        ("{name: cart, port: 80, group: core, kind: Service}", "ResolvedRefs"),
        ("{name: cart, port: 81}", "BackendNotFound"),
        ("{name: cart}", "BackendNotFound"),
        ("{name: gone, port: 80, weight: 0}", "BackendNotFound"),
        ("{name: cart, namespace: other, port: 80}", "BackendNotFound"),
        ("{name: alias, port: 80}", "BackendNotFound"),
        ("{name: tls, port: 443}", "UnsupportedProtocol"),
        ("{name: cart, kind: Bucket, group: cloud.example}", "InvalidKind"),
        ("{name: cart, kind: Bucket, port: 80}", "InvalidKind"),
    ] {
        apply(
            &mut index,
            &format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {{name: r, namespace: shop}}\n\
                 spec:\n  parentRefs: [{{group: \"\", kind: Service, name: cart}}]\n  rules: [{{backendRefs: [{backend}]}}]\n"
            ),
        );
        let conditions = index.conditions(&ObjectKey::new(Kind::GrpcRoute, "shop", "r"));
        let [accepted, resolved] = &conditions[..] else { panic!("{conditions:?}") };
        assert!(accepted.status, "{accepted:?}");
        assert_eq!((resolved.status, resolved.reason), (reason == "ResolvedRefs", reason), "{backend}");
    }
}
