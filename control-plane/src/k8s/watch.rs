//! `--source kubernetes`: what the API server has, as the same events that a folder gives.
//!
//! Why one task a list: a kind whose CRD is absent, or that the controller may not read, must not keep the others
//! from being followed. A list is asked for again after a pause that grows with failures (never more than five
//! seconds, with jitter): a mesh should not be blind for half a minute after the API server is back.
//!
//! Why objects are cut down before they are handed on: of a pod's 10 KiB the mesh reads 500 bytes, and a
//! change of the rest (a heartbeat, managed fields) is no change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use k8s_openapi::{
    api::{
        core::v1::{Container, Namespace, Node, Pod, PodCondition, PodSpec, PodStatus, Service},
        discovery::v1::{Endpoint, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    api::{DynamicObject, PartialObjectMeta},
    runtime::watcher,
};
use rand::Rng as _;
use serde::de::DeserializeOwned;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    live::{Live, Statuses, resource},
    view::{Bad, Seen, View, Watched},
};
use crate::{
    index::{Event, Name, SERVICE_NAME, ZONE, hash, validate},
    injector::patch::PROXY,
    resources::{INJECT, INJECTED, Kind, Object, ObjectKey, lookup},
    source::{Batch, Problem},
};

/// Watches everything and sends a batch for all that changed. Ends when the receiver is gone. Names of the
/// namespaces that have sidecars, or will, go to `injected`.
pub async fn watch(
    client: Client,
    statuses: Statuses,
    injected: watch::Sender<BTreeSet<Arc<str>>>,
    batches: mpsc::Sender<Batch>,
) {
    let (tell, mut told) = mpsc::channel(HEARD);
    let mut lists = JoinSet::new();
    for watched in ALL {
        lists.spawn(follow(client.clone(), watched, statuses.clone(), tell.clone()));
    }
    drop(tell);
    let mut view = View::new(ALL);
    let mut problems: Vec<Problem> = Vec::new();
    // A pod may ask for a sidecar by itself.
    let mut with_pods = WithPods::default();
    let mut synced = false;
    loop {
        let tick = view.next_tick().map(tokio::time::Instant::from_std);
        tokio::select! {
            heard = told.recv() => {
                let Some(heard) = heard else { return };
                hear(&mut view, heard);
                // What came meanwhile goes along: a publisher that is busy gets one batch and not a thousand.
                for _ in 0..MOST {
                    let Ok(heard) = told.try_recv() else { break };
                    hear(&mut view, heard);
                }
            }
            () = tokio::time::sleep_until(tick.unwrap_or_else(tokio::time::Instant::now)), if tick.is_some() => {
                view.tick(now());
            }
            () = batches.closed() => return,
        }
        let (events, found) = (view.take_events(), view.problems());
        events.iter().for_each(|event| with_pods.hear(event));
        injected.send_if_modified(|known| {
            let now: BTreeSet<_> = view.injected().iter().chain(with_pods.namespaces()).cloned().collect();
            let differs = *known != now;
            *known = now;
            differs
        });
        if events.is_empty() && found == problems && synced == view.is_synced() {
            continue;
        }
        problems.clone_from(&found);
        synced = view.is_synced();
        let batch = Batch { events, problems: found, foreign: 0, unlisted: !synced };
        if batches.send(batch).await.is_err() {
            return;
        }
    }
}

/// Pods that have a sidecar, by namespace.
#[derive(Debug, Default)]
struct WithPods(BTreeMap<Arc<str>, BTreeSet<Arc<str>>>);

impl WithPods {
    fn hear(&mut self, event: &Event) {
        let (key, has_sidecar) = match event {
            Event::Apply { object, .. } => {
                (object.key(), lookup(&object.metadata().annotations, INJECTED) == Some("true"))
            }
            Event::Delete(key) => (key.clone(), false),
            Event::Unreadable { .. } | Event::Zone { .. } => return,
        };
        if key.kind != Kind::Pod {
            return;
        }
        if has_sidecar {
            self.0.entry(key.namespace).or_default().insert(key.name);
        } else if let Some(pods) = self.0.get_mut(&key.namespace) {
            pods.remove(&key.name);
            if pods.is_empty() {
                self.0.remove(&key.namespace);
            }
        }
    }

    fn namespaces(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.keys()
    }
}

/// What one list's task says.
#[derive(Debug)]
struct Heard(Watched, News);

#[derive(Debug)]
enum News {
    Restart,
    Apply(Seen),
    Delete(Name),
    Done,
    Absent,
    Failed(String),
}

fn hear(view: &mut View, Heard(of, news): Heard) {
    match news {
        News::Restart => view.restart(of),
        News::Apply(seen) => view.apply(of, seen),
        News::Delete(name) => view.delete(of, &name),
        News::Done => view.done(of, now()),
        News::Absent => view.absent(of, now()),
        News::Failed(reason) => view.failed(of, reason),
    }
}

async fn follow(client: Client, of: Watched, statuses: Statuses, tell: mpsc::Sender<Heard>) {
    match of {
        Watched::Objects(Kind::Service) => run(Api::<Service>::all(client), of, service, tell).await,
        Watched::Objects(Kind::EndpointSlice) => {
            run(Api::<EndpointSlice>::all(client), of, slice, tell).await
        }
        Watched::Objects(Kind::Pod) => run(Api::<Pod>::all(client), of, pod, tell).await,
        Watched::Objects(
            kind @ (Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TrafficPolicy
            | Kind::AuthorizationPolicy
            | Kind::MeshConfig),
        ) => {
            let mut listed = None;
            let note = move |event: &watcher::Event<DynamicObject>| note(&statuses, kind, &mut listed, event);
            let read = move |object: DynamicObject| dynamic(kind, object);
            run_noted(Api::all_with(client, &resource(kind)), of, note, read, tell).await;
        }
        Watched::Nodes => run(Api::<PartialObjectMeta<Node>>::all(client), of, node, tell).await,
        Watched::Namespaces => {
            run(Api::<PartialObjectMeta<Namespace>>::all(client), of, namespace, tell).await
        }
    }
}

/// Keeps what status needs in step with what there is.
fn note(
    statuses: &Statuses,
    kind: Kind,
    listed: &mut Option<BTreeSet<ObjectKey>>,
    event: &watcher::Event<DynamicObject>,
) {
    match event {
        watcher::Event::Init => *listed = Some(BTreeSet::new()),
        watcher::Event::Apply(object) => statuses.set(key_of(kind, &object.metadata), live(object)),
        watcher::Event::InitApply(object) => {
            let key = key_of(kind, &object.metadata);
            if let Some(listed) = listed {
                listed.insert(key.clone());
            }
            statuses.set(key, live(object));
        }
        watcher::Event::Delete(object) => statuses.remove(&key_of(kind, &object.metadata)),
        watcher::Event::InitDone => {
            if let Some(listed) = listed.take() {
                statuses.keep_of(kind, &listed);
            }
        }
    }
}

fn key_of(kind: Kind, meta: &ObjectMeta) -> ObjectKey {
    let (namespace, name) = name_of(meta);
    ObjectKey { kind, namespace, name }
}

/// What status needs of an object.
fn live(object: &DynamicObject) -> Live {
    let meta = &object.metadata;
    let parents = object.data.pointer("/spec/parentRefs").and_then(|refs| refs.as_array().cloned());
    Live {
        version: meta.resource_version.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        generation: meta.generation.unwrap_or_default(),
        parents: parents.unwrap_or_default(),
        status: object.data.get("status").cloned().unwrap_or_default(),
    }
}

/// One list, for ever.
async fn run<K>(api: Api<K>, of: Watched, read: impl Fn(K) -> Option<Seen>, tell: mpsc::Sender<Heard>)
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    run_noted(api, of, |_| {}, read, tell).await;
}

/// The same; `note` sees each event first.
async fn run_noted<K>(
    api: Api<K>,
    of: Watched,
    mut note: impl FnMut(&watcher::Event<K>),
    read: impl Fn(K) -> Option<Seen>,
    tell: mpsc::Sender<Heard>,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut events = std::pin::pin!(watcher(api.clone(), config.clone()));
    let mut failures = 0;
    while let Some(event) = events.next().await {
        if let Ok(event) = &event {
            note(event);
        }
        let news = match event {
            Ok(watcher::Event::Init) => News::Restart,
            Ok(watcher::Event::InitDone) => {
                failures = 0;
                News::Done
            }
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                failures = 0;
                let name = name_of(object.meta());
                // What the mesh does not care for (any more) is as good as gone.
                read(object).map_or(News::Delete(name), News::Apply)
            }
            Ok(watcher::Event::Delete(object)) => News::Delete(name_of(object.meta())),
            Err(error) => {
                let news = failure(of, &error);
                if tell.send(Heard(of, news)).await.is_err() {
                    return;
                }
                let pause = pause(failures, rand::rng().random());
                tokio::time::sleep(pause).await;
                failures += 1;
                if is_expired(&error) {
                    // Asking from there again would be refused for ever.
                    events.set(watcher(api.clone(), config.clone()));
                }
                continue;
            }
        };
        if tell.send(Heard(of, news)).await.is_err() {
            return;
        }
    }
}

/// The version that a watch should go on from is too old: a new list is needed.
pub(crate) fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

fn failure(of: Watched, error: &watcher::Error) -> News {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => status,
        watcher::Error::WatchError(status) => status,
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => return News::Failed(format!("{error:#}")),
        watcher::Error::NoResourceVersion => return News::Failed(error.to_string()),
    };
    match status.code {
        // The CRD is not there (yet). What no cluster is without is not absent: whoever says so is not the API server.
        404 if of.may_be_absent() => News::Absent,
        403 => News::Failed(format!("{}: its role in the chart lacks something", status.message)),
        _ => News::Failed(format!("{} ({})", status.message, status.code)),
    }
}

/// How long to wait before the list is asked for again.
fn pause(failures: u32, jitter: f64) -> Duration {
    let most = RETRY_LEAST.saturating_mul(2_u32.saturating_pow(failures)).min(RETRY_MOST);
    most.mul_f64(0.5 + jitter / 2.0)
}

fn name_of(meta: &ObjectMeta) -> Name {
    (meta.namespace.as_deref().unwrap_or_default().into(), meta.name.as_deref().unwrap_or_default().into())
}

/// What the mesh reads of an object's metadata.
fn metadata(meta: ObjectMeta) -> ObjectMeta {
    let ours = |(key, _): &(String, String)| key.starts_with("weft.dev/");
    ObjectMeta {
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        generation: meta.generation,
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        labels: meta.labels,
        annotations: meta.annotations.map(|all| all.into_iter().filter(ours).collect()),
        ..ObjectMeta::default()
    }
}

fn seen(object: Object) -> Seen {
    let hash = hash(format!("{object:?}").as_bytes());
    let read = match validate::object(&object) {
        Ok(()) => Ok(Box::new(object.clone())),
        Err(invalid) => Err(Bad { path: invalid.path, reason: invalid.reason, scope: scope(&object) }),
    };
    Seen::Object { key: object.key(), read, hash }
}

/// Labels of the workloads that a policy is about.
fn scope(object: &Object) -> BTreeMap<String, String> {
    match object {
        Object::AuthorizationPolicy(policy) => {
            policy.spec.selector.as_ref().map(|s| s.match_labels.clone()).unwrap_or_default()
        }
        Object::Service(_)
        | Object::EndpointSlice(_)
        | Object::Pod(_)
        | Object::HttpRoute(_)
        | Object::GrpcRoute(_)
        | Object::TrafficPolicy(_)
        | Object::MeshConfig(_) => BTreeMap::new(),
    }
}

fn service(service: Service) -> Option<Seen> {
    let service = Service { metadata: metadata(service.metadata), spec: service.spec, status: None };
    Some(seen(Object::Service(Box::new(service))))
}

fn slice(slice: EndpointSlice) -> Option<Seen> {
    // A slice without a service is somebody else's, and addresses that are names are no endpoints.
    lookup(&slice.metadata.labels, SERVICE_NAME)?;
    let ours = |key: &String| key == SERVICE_NAME;
    let mut meta = metadata(slice.metadata);
    meta.labels = meta.labels.map(|all| all.into_iter().filter(|(key, _)| ours(key)).collect());
    let endpoints = slice.endpoints.map(|all| {
        let cut = |endpoint: Endpoint| Endpoint {
            addresses: endpoint.addresses,
            conditions: endpoint.conditions,
            target_ref: endpoint.target_ref.map(|mut target| {
                target.resource_version = None;
                target
            }),
            zone: endpoint.zone,
            node_name: endpoint.node_name,
            ..Endpoint::default()
        };
        all.into_iter().map(cut).collect()
    });
    let slice = EndpointSlice { metadata: meta, endpoints, ..slice };
    Some(seen(Object::EndpointSlice(Box::new(slice))))
}

fn pod(pod: Pod) -> Option<Seen> {
    // Ports and probes are all that is asked of a container.
    let cut = |container: Container| Container {
        name: container.name,
        ports: container.ports,
        liveness_probe: container.liveness_probe,
        readiness_probe: container.readiness_probe,
        startup_probe: container.startup_probe,
        lifecycle: container.lifecycle,
        restart_policy: container.restart_policy,
        ..Container::default()
    };
    let spec = pod.spec.map(|spec| PodSpec {
        node_name: spec.node_name,
        host_network: spec.host_network,
        service_account_name: spec.service_account_name,
        containers: spec.containers.into_iter().map(cut).collect(),
        init_containers: spec.init_containers.map(|all| all.into_iter().map(cut).collect()),
        ..PodSpec::default()
    });
    let ready = |condition: &PodCondition| condition.type_ == "Ready";
    let cut = |condition: PodCondition| PodCondition {
        type_: condition.type_,
        status: condition.status,
        ..PodCondition::default()
    };
    let status = pod.status.map(|status| PodStatus {
        phase: status.phase,
        pod_ip: status.pod_ip,
        pod_ips: status.pod_ips,
        conditions: status.conditions.map(|all| all.into_iter().filter(ready).map(cut).collect()),
        ..PodStatus::default()
    });
    let mut metadata = metadata(pod.metadata);
    let containers =
        spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let has_sidecar = containers.into_iter().any(|container| container.name == PROXY);
    // An annotation is copied easily, and callers of such a pod would wait for a sidecar that never answers.
    if !has_sidecar && let Some(annotations) = &mut metadata.annotations {
        annotations.remove(INJECTED);
    }
    Some(seen(Object::Pod(Box::new(Pod { metadata, spec, status }))))
}

fn dynamic(kind: Kind, object: DynamicObject) -> Option<Seen> {
    let DynamicObject { metadata: meta, mut data, .. } = object;
    let name = name_of(&meta);
    let key = ObjectKey::new(kind, &name.0, &name.1);
    let meta = serde_json::to_value(metadata(meta)).ok()?;
    if let Some(fields) = data.as_object_mut() {
        fields.remove("status");
        fields.insert("metadata".to_owned(), meta);
    }
    let text_hash = hash(data.to_string().as_bytes());
    let labels = data.pointer("/spec/selector/matchLabels").cloned();
    let mut track = serde_path_to_error::Track::new();
    let decoded = Object::decode(kind, serde_path_to_error::Deserializer::new(data, &mut track));
    Some(match decoded {
        Ok(object) => seen(object),
        Err(error) => {
            let path = track.path().to_string();
            let bad = Bad {
                path: if path == "." { String::new() } else { path },
                reason: error.to_string(),
                scope: labels.and_then(|labels| serde_json::from_value(labels).ok()).unwrap_or_default(),
            };
            Seen::Object { key, read: Err(bad), hash: text_hash }
        }
    })
}

fn node(node: PartialObjectMeta<Node>) -> Option<Seen> {
    let zone = lookup(&node.metadata.labels, ZONE).map(Into::into);
    Some(Seen::Node { name: node.metadata.name?.into(), zone })
}

fn namespace(namespace: PartialObjectMeta<Namespace>) -> Option<Seen> {
    let injected = lookup(&namespace.metadata.labels, INJECT) == Some("enabled");
    Some(Seen::Namespace { name: namespace.metadata.name?.into(), injected })
}

/// The view's clock, which a paused runtime moves too.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

const ALL: [Watched; 10] = [
    Watched::Nodes,
    Watched::Namespaces,
    Watched::Objects(Kind::Pod),
    Watched::Objects(Kind::Service),
    Watched::Objects(Kind::EndpointSlice),
    Watched::Objects(Kind::HttpRoute),
    Watched::Objects(Kind::GrpcRoute),
    Watched::Objects(Kind::TrafficPolicy),
    Watched::Objects(Kind::AuthorizationPolicy),
    Watched::Objects(Kind::MeshConfig),
];
/// News that may wait; a list's task waits with the rest.
const HEARD: usize = 1_024;
/// News of one batch.
const MOST: usize = 1_024;
/// How long one watch lasts. A connection that is dead is noticed a little later (`SILENCE_TIMEOUT`).
const WATCH_SECONDS: u32 = 60;
const RETRY_LEAST: Duration = Duration::from_millis(200);
const RETRY_MOST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::Origin;

    #[test]
    fn what_is_gone_has_no_status_to_be_written() {
        let route = |name: &str| {
            let mut object = DynamicObject::new(name, &resource(Kind::HttpRoute));
            object.metadata.namespace = Some("shop".to_owned());
            object
        };
        let statuses = Statuses::default();
        let mut listed = None;
        let mut hear = |event| note(&statuses, Kind::HttpRoute, &mut listed, &event);
        hear(watcher::Event::Init);
        hear(watcher::Event::InitApply(route("a")));
        hear(watcher::Event::InitDone);
        hear(watcher::Event::Apply(route("b")));
        assert_eq!(statuses.len(), 2);
        hear(watcher::Event::Delete(route("a")));
        assert_eq!(statuses.len(), 1);
        // It went while nobody watched; other kinds are none of this list's.
        statuses.set(ObjectKey::new(Kind::GrpcRoute, "shop", "b"), Live::default());
        hear(watcher::Event::Init);
        assert_eq!(statuses.len(), 2);
        hear(watcher::Event::InitDone);
        assert_eq!(statuses.len(), 1);
    }

    #[test]
    fn a_namespace_is_published_to_for_as_long_as_it_has_sidecars() {
        let pod = |name: &str, injected: bool| {
            let mut pod = Pod::default();
            (pod.metadata.namespace, pod.metadata.name) = (Some("shop".to_owned()), Some(name.to_owned()));
            pod.metadata.annotations = Some([(INJECTED.to_owned(), injected.to_string())].into());
            Event::Apply {
                object: Box::new(Object::Pod(Box::new(pod))),
                origin: Origin { file: "".into(), line: 0 },
            }
        };
        let mut with_pods = WithPods::default();
        with_pods.hear(&pod("a", true));
        with_pods.hear(&pod("b", true));
        with_pods.hear(&pod("c", false));
        with_pods.hear(&Event::Delete(ObjectKey::new(Kind::Pod, "shop", "a")));
        assert_eq!(with_pods.namespaces().count(), 1);
        with_pods.hear(&pod("b", false));
        assert_eq!(with_pods.namespaces().count(), 0);
    }
}
