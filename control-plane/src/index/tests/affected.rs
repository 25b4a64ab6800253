//! What a change touches: all that must be told, and no more.

use std::collections::BTreeSet;

use super::{SHOP, apply, delete, index, service, uid};
use crate::{
    index::Key,
    resources::{Kind, ObjectKey},
};

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
