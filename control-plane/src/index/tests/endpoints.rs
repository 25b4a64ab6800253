//! Who is there, at which address and in which state; and who has an address that several claim.

use weft_core::policy::{EndpointHealth, Protocol, Reach, Tunnel};

use super::{SHOP, apply, delete, index, service, uid};
use crate::{
    index::{Event, Index, Key},
    resources::{Kind, ObjectKey},
};

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
fn headless_aliased_selectorless_and_dual_stack_services_are_as_the_cluster_says() {
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
