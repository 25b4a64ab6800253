//! Objects in, compiled policy out: no cluster, no runtime. One file a subject; here is the shop that all of them know.

use std::collections::BTreeSet;

use weft_core::{
    identity::{PodUid, TrustDomain},
    policy::ServiceName,
};

use super::{Event, Index, Key};
use crate::{
    resources::{Kind, Object, ObjectKey, Origin},
    source::yaml::{self, Document},
};

mod affected;
mod endpoints;
mod inbound;
mod routes;

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
