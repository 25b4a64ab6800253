//! Objects in, compiled policy out: no cluster, no runtime.

use std::collections::BTreeSet;

use weft_core::{
    identity::{PodUid, TrustDomain},
    policy::{
        Action, Algorithm, EndpointHealth, Filter, MtlsMode, PathMatch, Probe, Protocol, Reach, ServiceName,
        StringMatch, Tunnel,
    },
};

use super::{Event, Index, Key};
use crate::{
    resources::{Kind, Object, ObjectKey, Origin},
    source::yaml::{self, Document},
};

pub(crate) fn objects(text: &str) -> Vec<Object> {
    let read = |document| match document {
        Document::Object { object, .. } => *object,
        Document::Foreign | Document::Bad { .. } => panic!("{document:?}"),
    };
    yaml::read(&"test.yaml".into(), text).into_iter().map(read).collect()
}

pub(crate) fn apply(index: &mut Index, text: &str) -> BTreeSet<Key> {
    let origin = Origin { file: "test.yaml".into(), line: 1 };
    let events = objects(text)
        .into_iter()
        .map(|object| Event::Apply { object: Box::new(object), origin: origin.clone() });
    events.flat_map(|event| index.apply(event)).collect()
}

pub(crate) fn index(text: &str) -> Index {
    let mut index = Index::new(TrustDomain::new("cluster.local").unwrap());
    apply(&mut index, text);
    index
}

fn delete(index: &mut Index, kind: Kind, name: &str) -> BTreeSet<Key> {
    index.apply(Event::Delete(ObjectKey::new(kind, "shop", name)))
}

pub(crate) fn service(text: &str) -> ServiceName {
    text.parse().unwrap()
}

pub(crate) fn uid(text: &str) -> PodUid {
    PodUid::new(text).unwrap()
}

pub(crate) const SHOP: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {app: cart}
  ports:
    - {name: http, port: 80, targetPort: web}
    - {name: metrics, port: 9090, appProtocol: http}
---
apiVersion: v1
kind: Pod
metadata:
  name: cart-1
  namespace: shop
  uid: cart-1-uid
  labels: {app: cart, version: v1, topology.kubernetes.io/zone: a}
  annotations: {weft.dev/injected: "true", weft.dev/skip-inbound-ports: "9090", weft.dev/weight: "3"}
spec:
  serviceAccountName: cart
  containers: [{name: app, ports: [{name: web, containerPort: 8080}]}]
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-2, namespace: shop, uid: cart-2-uid, labels: {app: cart}}
spec:
  containers: [{name: app, ports: [{name: web, containerPort: 8081}]}]
status: {podIP: 10.0.0.2, conditions: [{type: Ready, status: "False"}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart-v2, namespace: shop}
spec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}
"#;

#[test]
fn a_folder_needs_no_slices() {
    let index = index(SHOP);
    let endpoints = index.endpoints(&service("shop/cart:80")).unwrap();
    let meshed = &endpoints[&uid("cart-1-uid")];
    assert_eq!(meshed.address, "10.0.0.1:8080".parse().unwrap());
    assert_eq!(meshed.identity.as_ref().unwrap().as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!((meshed.tunnel, meshed.weight, &*meshed.zone), (Tunnel::Weft, 3, "a"));
    assert_eq!(meshed.health, EndpointHealth::Healthy);
    assert_eq!(&*meshed.labels["version"], "v1");
    let plain = &endpoints[&uid("cart-2-uid")];
    assert_eq!(plain.address, "10.0.0.2:8081".parse().unwrap());
    assert_eq!((plain.identity.as_ref(), plain.tunnel), (None, Tunnel::None));
    assert_eq!(plain.health, EndpointHealth::Unhealthy);
    // A port that capture skips speaks plaintext.
    let metrics = index.endpoints(&service("shop/cart:9090")).unwrap();
    assert_eq!(metrics[&uid("cart-1-uid")].tunnel, Tunnel::None);
    assert!(index.endpoints(&service("shop/cart:81")).is_none());
}

#[test]
fn slices_win_where_there_are_any() {
    let mut index = index(SHOP);
    let dirty = apply(
        &mut index,
        r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-x, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
  - addresses: [10.0.0.1]
    zone: b
    targetRef: {kind: Pod, name: cart-1, namespace: shop, uid: cart-1-uid}
    conditions: {ready: false, terminating: true}
  - addresses: [192.0.2.9]
"#,
    );
    assert!(dirty.contains(&Key::Endpoints(service("shop/cart:80"))));
    assert!(!dirty.contains(&Key::Route(service("shop/cart:80"))));
    let endpoints = index.endpoints(&service("shop/cart:80")).unwrap();
    assert_eq!(endpoints.len(), 2);
    assert_eq!(endpoints[&uid("cart-1-uid")].health, EndpointHealth::Draining);
    assert_eq!(&*endpoints[&uid("cart-1-uid")].zone, "b");
    let foreign = endpoints.values().find(|e| e.identity.is_none()).unwrap();
    assert_eq!(foreign.address, "192.0.2.9:8080".parse().unwrap());
    delete(&mut index, Kind::EndpointSlice, "cart-x");
    assert_eq!(index.endpoints(&service("shop/cart:80")).unwrap().len(), 2, "by selector again");
}

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
        assert_eq!(super::declared_protocol(app, name), protocol, "{app:?} {name}");
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
fn authorization_by_pod_and_port() {
    let mut index = index(SHOP);
    let (open, _) = index.workload(&uid("cart-1-uid")).unwrap();
    assert_eq!(open.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(open.ports.keys().copied().collect::<Vec<_>>(), [8080, 9090]);
    assert_eq!(open.default_port.authorization.default, Action::Allow);
    assert_eq!(open.default_port.mtls, MtlsMode::Permissive);
    assert!(open.mesh_ranges.contains(&"10.0.0.0/8".parse().unwrap()));

    let dirty = apply(
        &mut index,
        r#"
apiVersion: weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  action: Allow
  mtls: Strict
  rules:
    - from: [{identities: ["*/sa/web"], namespaces: [front, back], cidrs: [10.0.0.0/8]}]
      to: [{methods: [GET], paths: [/api/*]}]
---
apiVersion: weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: never, namespace: shop}
spec:
  selector: {matchLabels: {version: v1}}
  action: Deny
  rules: [{from: [{identities: [spiffe://cluster.local/ns/shop/sa/evil]}]}]
---
apiVersion: weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {ports: [7000], action: Allow}
---
apiVersion: weft.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {meshRanges: [10.0.0.0/8], egress: Deny, trustDomains: [other.org]}
"#,
    );
    assert!(dirty.contains(&Key::Workload(uid("cart-1-uid"))));
    let (policy, _) = index.workload(&uid("cart-1-uid")).unwrap();
    assert_eq!(policy.ports.keys().copied().collect::<Vec<_>>(), [7000, 8080, 9090]);
    let web = &policy.ports[&8080];
    assert_eq!((web.mtls, web.authorization.default), (MtlsMode::Strict, Action::Deny));
    assert_eq!(web.authorization.rules.len(), 2);
    let allow = web.authorization.rules.iter().find(|r| r.action == Action::Allow).unwrap();
    assert_eq!(allow.sources.len(), 2, "one for each namespace");
    assert_eq!(allow.sources[0].identity, Some(StringMatch::Suffix("/sa/web".into())));
    assert_eq!(allow.http[0].paths, [StringMatch::Prefix("/api/".into())]);
    let metrics = &policy.ports[&9090];
    assert_eq!((metrics.mtls, metrics.authorization.default), (MtlsMode::Permissive, Action::Allow));
    assert_eq!(metrics.authorization.rules.len(), 1, "the deny rule holds everywhere");
    let closed = &policy.ports[&7000].authorization;
    assert_eq!((closed.default, closed.rules.len()), (Action::Deny, 1), "allow nothing");
    assert_eq!(policy.default_port.authorization.default, Action::Allow);
    assert_eq!(policy.egress, weft_core::policy::Egress::Deny);
    assert_eq!(policy.mesh_ranges, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(policy.trust_domains.len(), 2);
    // Another pod: no version label.
    let (other, _) = index.workload(&uid("cart-2-uid")).unwrap();
    assert_eq!(other.ports[&8081].authorization.rules.len(), 1);
}

#[test]
fn what_a_policys_lists_multiply_to_is_bounded_before_it_is_made() {
    let policy = |rules: &str| {
        let text = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{action: Allow, rules: [{rules}]}}\n"
        );
        yaml::read(&"test.yaml".into(), &text).into_iter().find_map(|document| match document {
            Document::Bad { problem, .. } => Some(format!("{}: {}", problem.path, problem.reason)),
            Document::Object { .. } | Document::Foreign => None,
        })
    };
    let list =
        |of: &str, n: usize| (0..n).map(|i| of.replace('#', &i.to_string())).collect::<Vec<_>>().join(", ");
    let many = |n: usize| {
        format!(
            "{{from: [{{identities: [{}], namespaces: [{}], trustDomains: [{}], cidrs: [{}]}}]}}",
            list("'*/sa/s#'", n),
            list("n#", n),
            list("t#.org", n),
            list("10.0.0.#/32", n.min(250)),
        )
    };
    // 10¹² conditions if they were made.
    let refused = policy(&many(1_024)).expect("refused");
    assert!(refused.starts_with("spec.rules[0].from: "), "{refused}");
    assert_eq!(policy(&many(5)), None, "625 are not many");
    // Each rule for itself is within its bound, all of them are told to every port of every pod.
    let refused = policy(&vec![many(5); 7].join(", ")).expect("refused");
    assert_eq!(refused, "spec.rules[].from: 4375 are more than 4096");
    // What is excepted stands in each of them.
    let excepted = format!(
        "{{from: [{{namespaces: [{}], notIdentities: [{}]}}]}}",
        list("n#", 100),
        list("'*/sa/s#'", 100)
    );
    assert_eq!(policy(&excepted).as_deref(), Some("spec.rules[].from: 10100 are more than 4096"));
}

#[test]
fn an_unreadable_policy_closes_its_workloads() {
    let mut index = index(SHOP);
    let key = ObjectKey::new(Kind::AuthorizationPolicy, "shop", "typo");
    let labels = [("version".to_owned(), "v1".to_owned())].into();
    let dirty = index.apply(Event::Unreadable { key: key.clone(), labels });
    assert_eq!(dirty, BTreeSet::from([Key::Workload(uid("cart-1-uid"))]));
    let (closed, _) = index.workload(&uid("cart-1-uid")).unwrap();
    assert_eq!(closed.default_port.authorization.default, Action::Deny);
    assert_eq!(closed.ports[&8080].authorization.rules[0].action, Action::Deny);
    let dirty = index.apply(Event::Delete(key));
    assert_eq!(dirty.len(), 1);
    assert_eq!(
        index.workload(&uid("cart-1-uid")).unwrap().0.default_port.authorization.default,
        Action::Allow
    );
}

#[test]
fn a_policy_about_a_service_does_not_open_its_pods_when_the_service_is_away() {
    let policy = |target: &str, rest: &str| {
        format!(
            "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: callers, namespace: shop}}\n\
             spec: {{targetRefs: [{{kind: Service, name: {target}}}], mtls: Strict, action: Allow, {rest}\
             rules: [{{from: [{{namespaces: [front]}}]}}]}}\n"
        )
    };
    let at = |index: &Index, pod: &str, port: u16| {
        let (policy, _) = index.workload(&uid(pod)).unwrap();
        let port = policy.ports.get(&port).unwrap_or(&policy.default_port).clone();
        (port.mtls, port.authorization.default, port.authorization.rules.len())
    };
    let (closed, open) = ((MtlsMode::Strict, Action::Deny, 1), (MtlsMode::Permissive, Action::Allow, 0));
    let mut index = index(SHOP);
    apply(&mut index, &policy("cart", ""));
    assert_eq!((at(&index, "cart-1-uid", 8080), at(&index, "cart-1-uid", 7)), (closed, open));
    // Its slices do not name the pod (yet).
    let dirty = apply(
        &mut index,
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {name: cart-x, namespace: shop, labels: {kubernetes.io/service-name: cart}}\n\
         addressType: IPv4\nports: [{name: http, port: 8080}]\nendpoints: []\n",
    );
    assert!(dirty.contains(&Key::Workload(uid("cart-1-uid"))));
    assert_eq!(at(&index, "cart-1-uid", 8080), closed);
    delete(&mut index, Kind::EndpointSlice, "cart-x");
    // The service is deleted, and made again.
    delete(&mut index, Kind::Service, "cart");
    assert_eq!((at(&index, "cart-1-uid", 8080), at(&index, "cart-1-uid", 7)), (closed, open));
    // A pod that comes meanwhile would have been its.
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: cart-9, namespace: shop, uid: cart-9-uid, labels: {app: cart}}\n\
               spec: {containers: [{name: a, ports: [{name: web, containerPort: 8081}]}]}\n";
    apply(&mut index, pod);
    assert_eq!(at(&index, "cart-9-uid", 8081), closed);
    let said = index.conditions(&ObjectKey::new(Kind::AuthorizationPolicy, "shop", "callers"));
    assert_eq!((said[0].reason, said[0].status), ("TargetNotFound", false));
    assert!(said[0].message.ends_with("the pods that the Service had"), "{said:?}");
    apply(&mut index, SHOP);
    assert!(index.former.is_empty());
    assert_eq!((at(&index, "cart-9-uid", 8081), at(&index, "cart-9-uid", 7)), (closed, open));
    // A target that never was: it may be about pods that no Service has. What it would let in gets in nowhere.
    apply(
        &mut index,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: lone, namespace: shop, uid: lone-uid, labels: {app: crat}}\n",
    );
    let dirty = apply(&mut index, &policy("crat", "ports: [7, 8080], "));
    assert!(dirty.contains(&Key::Workload(uid("lone-uid"))));
    let shut = (MtlsMode::Strict, Action::Deny, 0);
    assert_eq!((at(&index, "lone-uid", 8080), at(&index, "lone-uid", 7)), (shut, shut));
    assert_eq!((at(&index, "lone-uid", 9090), at(&index, "cart-1-uid", 8080)), (open, open));
    // It comes, and the pod is its: now it is known where, and whom it lets in.
    let crat = "apiVersion: v1\nkind: Service\nmetadata: {name: crat, namespace: shop}\n\
                spec: {clusterIP: 10.96.0.20, selector: {app: crat}, ports: [{port: 8080}]}\n";
    assert!(apply(&mut index, crat).contains(&Key::Workload(uid("lone-uid"))));
    assert_eq!((at(&index, "lone-uid", 8080), at(&index, "lone-uid", 7)), (closed, open));
    // What was deleted is remembered for as long as a policy names it.
    delete(&mut index, Kind::Service, "crat");
    assert_eq!((index.former.len(), at(&index, "lone-uid", 8080)), (1, closed));
    delete(&mut index, Kind::AuthorizationPolicy, "callers");
    assert!(index.former.is_empty());
}

#[test]
fn a_policy_about_a_port_that_its_service_does_not_have_closes_that_services_pods() {
    let mut index = index(SHOP);
    apply(
        &mut index,
        "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n\
         spec: {targetRefs: [{kind: Service, name: cart, sectionName: htp}], rules: [{from: [{namespaces: [a]}]}]}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: other, namespace: shop, uid: other-uid}\n",
    );
    let default = |pod: &str| index.workload(&uid(pod)).unwrap().0.default_port.authorization.default;
    assert_eq!((default("cart-1-uid"), default("other-uid")), (Action::Deny, Action::Allow));
}

#[test]
fn what_is_told_of_an_object_is_its_own() {
    let index = index(SHOP);
    let told = |kind, name: &str| index.told_by(&ObjectKey::new(kind, "shop", name));
    let ports = [80, 9090].map(|port| Key::Service(service(&format!("shop/cart:{port}"))));
    assert_eq!(told(Kind::Service, "cart"), BTreeSet::from(ports));
    assert_eq!(told(Kind::Pod, "cart-1"), BTreeSet::from([Key::Workload(uid("cart-1-uid"))]));
    assert!(told(Kind::Pod, "gone").is_empty() && told(Kind::EndpointSlice, "x").is_empty());
}

#[test]
fn a_slice_touches_the_pods_that_come_and_go_and_no_others() {
    let mut index = index(SHOP);
    let slice = |name: &str, endpoints: &[(&str, bool)]| {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(pod, ready)| {
                format!(
                    "{{addresses: [10.0.0.9], conditions: {{ready: {ready}}}, \
                     targetRef: {{kind: Pod, name: {pod}, namespace: shop, uid: {pod}-uid}}}}"
                )
            })
            .collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: cart}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n",
            endpoints.join(", ")
        )
    };
    let endpoints = || [80, 9090].map(|port| Key::Endpoints(service(&format!("shop/cart:{port}"))));
    apply(&mut index, &slice("x", &[("cart-1", true), ("cart-2", true)]));
    // One of them is no longer ready: that is nothing to the pods.
    let dirty = apply(&mut index, &slice("x", &[("cart-1", true), ("cart-2", false)]));
    assert_eq!(dirty, BTreeSet::from(endpoints()));
    // It moves to another slice, and stays for as long as one names it.
    let dirty = apply(&mut index, &slice("y", &[("cart-2", true)]));
    assert_eq!(dirty, BTreeSet::from(endpoints()));
    let dirty = apply(&mut index, &slice("x", &[("cart-1", true)]));
    assert_eq!(dirty, BTreeSet::from(endpoints()));
    let dirty = delete(&mut index, Kind::EndpointSlice, "y");
    assert!(dirty.contains(&Key::Workload(uid("cart-2-uid"))), "{dirty:?}");
    assert!(!dirty.contains(&Key::Workload(uid("cart-1-uid"))), "{dirty:?}");
}

#[test]
fn a_slice_may_name_a_pod_of_another_namespace_before_it_is_there() {
    let mut index = index(
        "apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\n\
         spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}\n\
         addressType: IPv4\nports: [{port: 8080}]\n\
         endpoints: [{addresses: [10.0.0.7], targetRef: {kind: Pod, name: db-0, namespace: data}}]\n",
    );
    let db = service("shop/db:80");
    assert!(index.endpoints(&db).unwrap().is_empty());
    for uid in ["one", "two"] {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: db-0, namespace: data, uid: {uid}}}\nstatus: {{podIP: 10.0.0.7}}\n"
        );
        assert!(apply(&mut index, &pod).contains(&Key::Endpoints(db.clone())), "{uid}");
        assert!(index.endpoints(&db).unwrap().contains_key(&self::uid(uid)));
    }
}

#[test]
fn a_pod_touches_its_services_and_nothing_else() {
    let mut index = index(SHOP);
    let dirty = delete(&mut index, Kind::Pod, "cart-2");
    assert_eq!(
        dirty,
        BTreeSet::from([
            Key::Endpoints(service("shop/cart:80")),
            Key::Endpoints(service("shop/cart:9090")),
            Key::Address("10.0.0.2".parse().unwrap()),
            Key::Workload(uid("cart-2-uid")),
        ])
    );
    assert!(index.workload(&uid("cart-2-uid")).is_none());
    // Its address goes to another pod before the old one is gone.
    let moved = "apiVersion: v1\nkind: Pod\nmetadata: {name: n, namespace: shop, uid: n-uid}\nstatus: {podIP: 10.0.0.1}\n";
    apply(&mut index, moved);
    delete(&mut index, Kind::Pod, "cart-1");
    let address = index.pod_address("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(address.service(1).pod.unwrap().uid, uid("n-uid"));
}

#[test]
fn parents_that_cannot_be() {
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
fn an_endpoint_whose_pod_is_gone_is_not_called_in_plaintext() {
    let mut index = index(SHOP);
    let slice = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-x, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
  - addresses: [10.0.0.1]
    targetRef: {kind: Pod, name: cart-1, namespace: shop, uid: cart-1-uid}
  - addresses: [10.0.0.3]
    targetRef: {kind: Pod, name: cart-3, namespace: shop}
";
    // The other pod of its selector is no longer one of the service's: what it is told changes.
    assert!(apply(&mut index, slice).contains(&Key::Workload(uid("cart-2-uid"))));
    let cart = service("shop/cart:80");
    assert_eq!(index.endpoints(&cart).unwrap()[&uid("cart-1-uid")].tunnel, Tunnel::Weft);
    // The slice is late: nobody knows who has that address now.
    delete(&mut index, Kind::Pod, "cart-1");
    assert!(index.endpoints(&cart).unwrap().is_empty());
    assert!(delete(&mut index, Kind::EndpointSlice, "cart-x").contains(&Key::Workload(uid("cart-2-uid"))));
}

#[test]
fn an_address_and_a_uid_belong_to_one_pod_whatever_the_order() {
    let pod = |name: &str, uid: &str, created: &str, end: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {uid}, \
             creationTimestamp: \"2026-01-01T00:00:0{created}Z\"{end}}}\nstatus: {{podIP: 10.0.0.9}}\n"
        )
    };
    let old = pod("a-old", "old-uid", "1", ", deletionTimestamp: \"2026-01-01T00:01:00Z\"");
    let new = pod("new", "new-uid", "2", "");
    let thief = pod("thief", "new-uid", "3", "");
    for order in [[&old, &new, &thief], [&thief, &new, &old], [&new, &thief, &old]] {
        let mut index = index(SHOP);
        for text in order {
            apply(&mut index, text);
        }
        assert_eq!(&*index.workload_name(&uid("new-uid")).unwrap().1, "new");
        delete(&mut index, Kind::Pod, "thief");
        let owner = |index: &Index| index.pod_address("10.0.0.9".parse().unwrap());
        assert_eq!(owner(&index).unwrap().service(1).pod.unwrap().uid, uid("new-uid"));
        // The new one is gone first: the address is the old one's as long as it is listed.
        delete(&mut index, Kind::Pod, "new");
        assert_eq!(owner(&index).unwrap().service(1).pod.unwrap().uid, uid("old-uid"));
        delete(&mut index, Kind::Pod, "a-old");
        assert!(owner(&index).is_none() && index.workload_name(&uid("new-uid")).is_none());
    }
}

#[test]
fn nobody_takes_over_a_service_address_by_claiming_it() {
    let mut index = index(SHOP);
    let ip: std::net::IpAddr = "10.96.0.10".parse().unwrap();
    let thief = "
apiVersion: v1
kind: Service
metadata: {name: a-thief, namespace: aaa}
spec: {clusterIP: 10.96.0.66, externalIPs: [10.96.0.10], ports: [{port: 80}, {port: 81}]}
";
    let dirty = apply(&mut index, thief);
    assert!(dirty.contains(&Key::Service(service("shop/cart:80"))));
    let vips = |index: &Index, name: &str| index.service(&service(name)).unwrap().0.vips;
    assert_eq!(vips(&index, "shop/cart:80"), [ip]);
    assert!(!vips(&index, "aaa/a-thief:80").contains(&ip));
    assert!(vips(&index, "aaa/a-thief:81").contains(&ip), "another port is free");
    // Whoever is left gets it, and is compiled anew.
    let dirty = delete(&mut index, Kind::Service, "cart");
    assert!(dirty.contains(&Key::Service(service("aaa/a-thief:80"))));
    assert!(vips(&index, "aaa/a-thief:80").contains(&ip));
}

#[test]
fn an_external_address_that_is_a_pods_stays_the_pods() {
    let mut index = index(SHOP);
    let ip: std::net::IpAddr = "10.0.0.1".parse().unwrap();
    let thief = "
apiVersion: v1
kind: Service
metadata: {name: thief, namespace: aaa}
spec: {clusterIP: 10.96.0.66, externalIPs: [10.0.0.1], ports: [{port: 80}]}
";
    apply(&mut index, thief);
    let vips = |index: &Index| index.service(&service("aaa/thief:80")).unwrap().0.vips;
    assert!(!vips(&index).contains(&ip), "callers of the pod would be sent to another service");
    // The pod goes, and the address is the service's until a pod has it again.
    let thief = Key::Service(service("aaa/thief:80"));
    assert!(delete(&mut index, Kind::Pod, "cart-1").contains(&thief));
    assert!(vips(&index).contains(&ip));
    assert!(apply(&mut index, SHOP).contains(&thief));
    assert!(!vips(&index).contains(&ip));
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

#[test]
fn a_pods_own_probes_are_part_of_its_policy() {
    let index = index(
        "\
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, uid: uid-1, annotations: {weft.dev/injected: 'true'}}
spec:
  containers:
    - name: web
      ports: [{name: http, containerPort: 8080}]
      livenessProbe: {httpGet: {path: /live, port: http}}
      readinessProbe: {grpc: {port: 9090}}
status: {podIP: 10.0.0.1}
",
    );
    let (policy, _) = index.workload(&PodUid::new("uid-1").unwrap()).unwrap();
    assert_eq!(policy.ports[&8080].probes, [Probe::Get("/live".into())]);
    assert_eq!(policy.ports[&9090].probes, [Probe::GrpcHealth]);
    assert!(policy.default_port.probes.is_empty());
}

#[test]
fn a_node_says_the_zone_of_pods_that_do_not() {
    let mut index = index(SHOP);
    let zone = |index: &mut Index, node: &str, zone: Option<&str>| {
        index.apply(Event::Zone { node: node.into(), zone: zone.map(Into::into) })
    };
    zone(&mut index, "n1", Some("b"));
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: c, namespace: shop, uid: c-uid, labels: {app: cart}}\n\
               spec: {nodeName: n1, containers: [{name: a, ports: [{name: web, containerPort: 1}]}]}\nstatus: {podIP: 10.0.0.3}\n";
    apply(&mut index, pod);
    let of = |index: &Index, name: &str| {
        index.endpoints(&service("shop/cart:80")).unwrap()[&uid(name)].zone.clone()
    };
    assert_eq!(&*of(&index, "c-uid"), "b", "the node was there first");
    assert_eq!(&*of(&index, "cart-1-uid"), "a", "its own label says more");
    let dirty = zone(&mut index, "n1", Some("c"));
    assert!(dirty.contains(&Key::Endpoints(service("shop/cart:80"))), "{dirty:?}");
    assert_eq!(&*of(&index, "c-uid"), "c");
    zone(&mut index, "n1", None);
    assert_eq!(&*of(&index, "c-uid"), "");
    assert!(zone(&mut index, "n2", Some("z")).is_empty());
}

#[test]
fn a_nodes_address_is_no_pods() {
    let mut index = index(SHOP);
    let agent = "apiVersion: v1\nkind: Pod\nmetadata: {name: agent, namespace: shop, uid: agent-uid, labels: {app: cart}}\n\
                 spec: {hostNetwork: true, containers: [{name: a, ports: [{name: web, containerPort: 1}]}]}\nstatus: {podIP: 10.1.0.1}\n";
    apply(&mut index, agent);
    assert!(index.pod_address("10.1.0.1".parse().unwrap()).is_none());
    let endpoints = index.endpoints(&service("shop/cart:80")).unwrap();
    assert_eq!(endpoints[&uid("agent-uid")].tunnel, Tunnel::None, "but a service may send to it");
}

#[test]
fn a_pod_that_is_not_ready_is_reached_at_its_own_address() {
    let index = index(SHOP);
    let pod = index.pod_address("10.0.0.2".parse().unwrap()).unwrap().service(8081).pod.unwrap();
    assert_eq!((pod.health, &pod.uid), (EndpointHealth::Healthy, &uid("cart-2-uid")));
}

#[test]
fn services_as_a_cluster_has_them() {
    let mut index = index(SHOP);
    apply(
        &mut index,
        r#"
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {app: cart}, ports: [{name: sql, port: 3306}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-x, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 3306}]
endpoints:
  - addresses: [10.0.0.2]
    targetRef: {kind: Pod, name: cart-2, namespace: shop, uid: cart-2-uid}
    conditions: {ready: true, serving: false, terminating: false}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: shop}
spec: {type: ExternalName, externalName: example.org, ports: [{port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: legacy, namespace: shop}
spec: {clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20, "fd00:96::20"], ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: by-hand, namespace: shop, labels: {kubernetes.io/service-name: legacy}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [192.0.2.7]}, {addresses: [10.0.0.1]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-v4, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: cart-1, uid: cart-1-uid}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-v6, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints: [{addresses: ["fd00::1"], targetRef: {kind: Pod, name: cart-1, uid: cart-1-uid}}]
"#,
    );
    let of = |name: &str| index.endpoints(&service(name));
    // Headless, and not ready: published because the service says so.
    let db = of("shop/db:3306").unwrap();
    assert_eq!(db[&uid("cart-2-uid")].health, EndpointHealth::Healthy);
    assert!(index.service(&service("shop/db:3306")).unwrap().0.vips.is_empty());
    assert!(of("shop/outside:443").is_none(), "an alias is nothing of the mesh");
    // Without a selector: what stands in the slice, and a pod is known by its address.
    let legacy = of("shop/legacy:80").unwrap();
    assert_eq!(legacy.len(), 2);
    assert_eq!(legacy[&uid("cart-1-uid")].tunnel, Tunnel::Weft);
    assert_eq!(index.service(&service("shop/legacy:80")).unwrap().0.vips.len(), 2, "both families");
    // Two slices, one pod: one endpoint, at the pod's first address.
    let cart = of("shop/cart:80").unwrap();
    assert_eq!(cart.len(), 1);
    assert_eq!(cart[&uid("cart-1-uid")].address, "10.0.0.1:8080".parse().unwrap());
}

#[test]
fn a_service_says_how_far_its_callers_go_and_whether_they_stay() {
    let mut index = index(SHOP);
    index.apply(Event::Zone { node: "n1".into(), zone: Some("z1".into()) });
    let with = |index: &mut Index, more: &str| {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: agent, namespace: shop}}\n\
             spec: {{clusterIP: 10.96.0.50, selector: {{app: agent}}, ports: [{{port: 80}}]{more}}}\n"
        );
        apply(index, &service);
        let compiled = index.service(&self::service("shop/agent:80")).unwrap().0;
        let node = index.endpoints(&self::service("shop/agent:80")).unwrap()[&uid("agent-uid")].node.clone();
        (compiled.reach, compiled.load_balancing.by_client, node.to_string())
    };
    apply(
        &mut index,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: agent, namespace: shop, uid: agent-uid, labels: {app: agent}}\n\
         spec: {nodeName: n1, containers: [{name: a, ports: [{containerPort: 80}]}]}\nstatus: {podIP: 10.0.0.9}\n",
    );
    let is = |reach, by_client, node: &str| (reach, by_client, node.to_owned());
    assert_eq!(with(&mut index, ""), is(Reach::Anywhere, false, ""), "nobody asks for the node");
    let local = ", internalTrafficPolicy: Local, trafficDistribution: PreferClose";
    assert_eq!(with(&mut index, local), is(Reach::Node, false, "n1"));
    let cluster = ", internalTrafficPolicy: Cluster, sessionAffinity: ClientIP";
    assert_eq!(with(&mut index, cluster), is(Reach::Anywhere, true, ""));
    let zone = ", trafficDistribution: PreferSameZone";
    assert_eq!(with(&mut index, zone), is(Reach::PreferZone, false, ""));
    let node = ", trafficDistribution: PreferSameNode";
    assert_eq!(with(&mut index, node), is(Reach::PreferNode, false, "n1"));
    // The other half: where the caller itself is.
    let place = index.workload(&uid("agent-uid")).unwrap().0.place;
    assert_eq!((&*place.node, &*place.zone), ("n1", "z1"));
}

#[test]
fn an_endpoint_that_goes_away_is_asked_only_while_it_still_answers() {
    let mut index = index(SHOP);
    let mut health = |conditions: &str| {
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: cart-x, namespace: shop, labels: {{kubernetes.io/service-name: cart}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: 8080}}]\n\
             endpoints: [{{addresses: [10.0.0.1], targetRef: {{kind: Pod, name: cart-1, uid: cart-1-uid}}, \
             conditions: {{{conditions}}}}}]\n"
        );
        apply(&mut index, &slice);
        index.endpoints(&service("shop/cart:80")).unwrap()[&uid("cart-1-uid")].health
    };
    assert_eq!(health("ready: true, serving: true"), EndpointHealth::Healthy);
    assert_eq!(health("ready: false, serving: true, terminating: true"), EndpointHealth::Draining);
    assert_eq!(health("ready: false, serving: false, terminating: true"), EndpointHealth::Unhealthy);
    assert_eq!(health("ready: false, terminating: true"), EndpointHealth::Draining, "of an older cluster");
}

#[test]
fn a_port_is_opaque_where_its_pod_or_its_service_says_so() {
    let mut index = index(SHOP);
    let http = service("shop/cart:80");
    let protocol = |index: &Index| index.service(&http).unwrap().0.protocol;
    let of_pod = |index: &Index, name: &str| {
        index.workload(&uid(name)).unwrap().0.ports.get(&8080).map(|port| port.protocol)
    };
    assert_eq!((protocol(&index), of_pod(&index, "cart-1-uid")), (Protocol::Http1, Some(Protocol::Http1)));
    // One pod's word is the service's: its callers cannot know which of them they will get.
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: cart-3, namespace: shop, uid: cart-3-uid, labels: {app: cart},\n\
               annotations: {weft.dev/opaque-ports: \"8080,9000-9003\"}}\n\
               spec: {containers: [{name: a, ports: [{name: web, containerPort: 8080}]}]}\nstatus: {podIP: 10.0.0.3}\n";
    let dirty = apply(&mut index, pod);
    for key in
        [Key::Service(http.clone()), Key::Workload(uid("cart-1-uid")), Key::Workload(uid("cart-3-uid"))]
    {
        assert!(dirty.contains(&key), "{key:?} {dirty:?}");
    }
    assert_eq!((protocol(&index), of_pod(&index, "cart-1-uid")), (Protocol::Opaque, Some(Protocol::Opaque)));
    let own = index.workload(&uid("cart-3-uid")).unwrap().0;
    assert!([8080, 9000, 9003].iter().all(|port| own.ports[port].protocol == Protocol::Opaque));
    let address = index.pod_address("10.0.0.3".parse().unwrap()).unwrap();
    assert_eq!(
        (address.service(9001).protocol, address.service(9004).protocol),
        (Protocol::Opaque, Protocol::Detect)
    );
    delete(&mut index, Kind::Pod, "cart-3");
    assert_eq!((protocol(&index), of_pod(&index, "cart-1-uid")), (Protocol::Http1, Some(Protocol::Http1)));
    // The service says it of all its pods.
    let annotated = |ports: &str| {
        SHOP.replacen(
            "namespace: shop}",
            &format!("namespace: shop, annotations: {{weft.dev/opaque-ports: \"{ports}\"}}}}"),
            1,
        )
    };
    apply(&mut index, &annotated("80"));
    assert_eq!((protocol(&index), of_pod(&index, "cart-1-uid")), (Protocol::Opaque, Some(Protocol::Opaque)));
    // A typo takes no service away: it is said, and the rest is as declared.
    apply(&mut index, &annotated("eighty"));
    assert_eq!(protocol(&index), Protocol::Http1);
    let said = index.conditions(&ObjectKey::new(Kind::Service, "shop", "cart"));
    assert!(
        !said[0].status && said[0].message.contains("weft.dev/opaque-ports: \"eighty\" is not a port"),
        "{said:?}"
    );
}
