//! Who may call what, as the called pod is told it.

use std::collections::BTreeSet;

use weft_core::policy::{Action, MtlsMode, Probe, StringMatch};

use super::{SHOP, apply, delete, index, uid};
use crate::{
    index::{Event, Index, Key},
    resources::{Kind, ObjectKey},
    source::yaml::{self, Document},
};

#[test]
fn who_may_call_is_decided_by_pod_and_by_port() {
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
    let (policy, _) = index.workload(&uid("uid-1")).unwrap();
    assert_eq!(policy.ports[&8080].probes, [Probe::Get("/live".into())]);
    assert_eq!(policy.ports[&9090].probes, [Probe::GrpcHealth]);
    assert!(policy.default_port.probes.is_empty());
}

#[test]
fn how_often_a_pod_may_be_asked_is_what_is_said_of_the_services_that_send_to_it() {
    let mut index = index(SHOP);
    let policy = |name: &str, section: &str, limits: &str| {
        format!(
            "apiVersion: weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{targetRefs: [{{kind: Service, name: cart{section}}}], {limits}}}\n"
        )
    };
    let limits = |index: &Index, pod: &str, port: u16| -> Vec<(String, u32)> {
        let (policy, _) = index.workload(&uid(pod)).unwrap();
        let limits = &policy.ports[&port].rate_limits;
        limits.iter().map(|l| (format!("{}/{}", l.object, l.name), l.rate.requests())).collect()
    };
    let told = |name: &str, requests| (format!("TrafficPolicy/shop/{name}"), requests);
    // Of everything else the pods' own sidecars hear nothing.
    let dirty = apply(&mut index, &policy("all", "", "timeouts: {request: 1s}"));
    assert!(!dirty.contains(&Key::Workload(uid("cart-1-uid"))), "{dirty:?}");
    let dirty = apply(&mut index, &policy("all", "", "rateLimits: [{requests: 5}, {requests: 9, per: 1m}]"));
    for pod in ["cart-1-uid", "cart-2-uid"] {
        assert!(dirty.contains(&Key::Workload(uid(pod))), "{dirty:?}");
    }
    assert_eq!(limits(&index, "cart-1-uid", 8080), [told("all/0", 5), told("all/1", 9)]);
    assert_eq!(limits(&index, "cart-1-uid", 9090), [told("all/0", 5), told("all/1", 9)]);
    // What is said of one port stands in place of what is said of all, and none is something said, too.
    apply(&mut index, &policy("web", ", sectionName: http", "rateLimits: [{requests: 7}]"));
    apply(&mut index, &policy("metrics", ", sectionName: metrics", "rateLimits: []"));
    assert_eq!(limits(&index, "cart-1-uid", 8080), [told("web/0", 7)]);
    assert_eq!(limits(&index, "cart-1-uid", 9090), []);
    let (other, _) = index.workload(&uid("cart-1-uid")).unwrap();
    assert!(other.default_port.rate_limits.is_empty(), "no service sends there");
    // With the policy goes the limit.
    let dirty = delete(&mut index, Kind::TrafficPolicy, "web");
    assert!(dirty.contains(&Key::Workload(uid("cart-1-uid"))), "{dirty:?}");
    assert_eq!(limits(&index, "cart-1-uid", 8080), [told("all/0", 5), told("all/1", 9)]);
}
