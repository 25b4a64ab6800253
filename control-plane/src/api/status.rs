//! What is there, what is wrong with it, and where it is live.
//!
//! Why an object's "applied N of M" counts over *current subscribers* of what was compiled from it: a
//! sidecar that never asked for a route cannot be late with it, and one that asked is counted until its
//! stream ends.
//!
//! Why one object at a time: the publisher and the sidecars' reports need the same state, and there may be thousands of
//! objects. What an answer needs is copied out under a lock that is held for one object; counting happens outside.
//!
//! Why sidecars are those of the pods that there are: one that is not connected is *away*, and somebody has to look at
//! it. A pod that was deleted or has completed is not away but gone, whatever it said in its last minute; a pod whose
//! sidecar has never been heard is away all the same.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
};

use weft_core::{identity::PodUid, policy::ObjectRef};
use weft_proto::{
    ads::{ResourceType, Versioned},
    names::Name,
};

use super::types::{ConditionStatus, Laggard, ObjectStatus, ProblemStatus, SidecarStatus, Status};
use crate::{
    index::{Index, conditions::Condition},
    resources::{ObjectKey, Origin},
    serve::{now_ms, published::Published, publisher::State, telemetry::Reports},
    source::Problem,
    telemetry::{Store, view::SidecarRow},
};

/// Everything that a status is made of.
pub struct Facts<'a> {
    /// Objects and problems.
    pub state: &'a RwLock<State>,
    /// What is published, and who is subscribed.
    pub published: &'a Published,
    /// What sidecars said.
    pub store: &'a Mutex<Store>,
    /// When they said that something is live.
    pub reports: &'a Reports,
}

/// One object, as the index has it.
struct Known {
    origin: Origin,
    version: String,
    /// Of what was compiled from it.
    names: BTreeSet<Arc<str>>,
    /// Those of them under which it cannot be published, and why.
    refused: BTreeMap<Arc<str>, String>,
    /// Whether some of that is not even published.
    pending: bool,
    conditions: Vec<Condition>,
}

impl Facts<'_> {
    /// The whole status.
    pub fn status(&self, source: &str) -> Status {
        let refusals = self.refusals();
        let objects = self.objects(&refusals);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            synced: *self.published.synced().borrow(),
            source: source.to_owned(),
            problems: self.problems(&objects),
            objects,
            sidecars: self.sidecars(),
            foreign: u64::try_from(self.state().foreign).unwrap_or(u64::MAX),
            replicas: Vec::new(),
        }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn objects(&self, refusals: &HashMap<(PodUid, String), String>) -> Vec<ObjectStatus> {
        let keys: Vec<ObjectKey> = self.state().index.objects().map(|(key, ..)| key.clone()).collect();
        keys.iter().filter_map(|key| Some(self.object(key, self.known(key)?, refusals))).collect()
    }

    /// `None`: it has gone meanwhile.
    fn known(&self, key: &ObjectKey) -> Option<Known> {
        let state = self.state();
        let (origin, version) = state.index.object(key)?;
        let keys = state.index.told_by(key);
        let names: BTreeSet<_> =
            keys.iter().filter_map(|key| state.names.get(key)).flatten().cloned().collect();
        let refused = names.iter().filter_map(|name| Some((name.clone(), refused(&state, key, name)?)));
        Some(Known {
            origin: origin.clone(),
            version: version.to_owned(),
            refused: refused.collect(),
            names,
            pending: keys.iter().any(|key| state.pending.contains(key)),
            conditions: state.index.conditions(key),
        })
    }

    fn object(
        &self,
        key: &ObjectKey,
        known: Known,
        refusals: &HashMap<(PodUid, String), String>,
    ) -> ObjectStatus {
        let Known { origin, version, names, refused, pending, conditions } = known;
        let mut pods: BTreeMap<PodUid, Option<String>> = BTreeMap::new();
        // Pods that have what is published there, which is not what the object says.
        let mut without: BTreeSet<PodUid> = BTreeSet::new();
        let mut after: Option<u64> = None;
        for name in names {
            let Some(ty) = type_of(&name) else { continue };
            // Not everybody is told the same of a service: consumer routes.
            let subscribed = self.published.subscribers.pods(&name).into_iter();
            let subscribed: Vec<_> = subscribed
                .filter_map(|pod| Some((self.published.resource_for_pod(&name, &pod)?, pod)))
                .collect();
            let mut told = BTreeMap::new();
            let store = self.store();
            for (resource, pod) in subscribed {
                if refused.contains_key(&name) {
                    pods.entry(pod.clone()).or_default();
                    without.insert(pod);
                    continue;
                }
                let current = &*resource.versioned.version;
                let live = store.live(&pod, ty.type_url(), &name) == Some(current);
                let behind = pods.entry(pod).or_default();
                if !live && behind.is_none() {
                    *behind = Some(name.to_string());
                }
                told.insert(resource.versioned.version, resource.since_ms);
            }
            drop(store);
            for (version, since_ms) in told {
                if let Some(at) = self.reports.last_applied(&name, &version) {
                    after = after.max(Some(at.saturating_sub(since_ms)));
                }
            }
        }
        let behind: Vec<_> = pods.iter().filter_map(|(uid, behind)| Some((uid, behind.clone()?))).collect();
        without.extend(behind.iter().map(|(uid, _)| (*uid).clone()));
        let mut laggards = Vec::new();
        if !behind.is_empty() {
            let state = self.state();
            laggards.extend(behind.into_iter().map(|(uid, resource)| {
                let reason = refusals.get(&(uid.clone(), resource.clone())).cloned().unwrap_or_default();
                Laggard { pod: pod_name(&state.index, uid), uid: uid.to_string(), resource, reason }
            }));
        }
        // Not even published: whoever waits for the object must not be told that everybody has it.
        if let Some((resource, reason)) = refused.into_iter().next() {
            let resource = resource.to_string();
            laggards
                .insert(0, Laggard { pod: CONTROLLER.to_owned(), resource, reason, ..Laggard::default() });
        }
        if pending {
            laggards = vec![Laggard {
                pod: CONTROLLER.to_owned(),
                reason: "it is about to publish it".to_owned(),
                ..Laggard::default()
            }];
        }
        let of = pods.len().max(laggards.len());
        let conditions = conditions.into_iter().map(|condition| ConditionStatus {
            parent: condition.parent,
            parent_ref: condition.parent_ref,
            kind: condition.kind.to_owned(),
            status: condition.status,
            reason: condition.reason.to_owned(),
            message: condition.message,
        });
        ObjectStatus {
            kind: key.kind.to_string(),
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            file: origin.file.to_string(),
            line: origin.line,
            version,
            conditions: conditions.collect(),
            applied: count(of - without.len().max(laggards.len())),
            of: count(of),
            applied_after_ms: after.filter(|_| laggards.is_empty() && !pods.is_empty()),
            laggards,
        }
    }

    fn problems(&self, objects: &[ObjectStatus]) -> Vec<ProblemStatus> {
        let state = self.state();
        let from_source = state.problems.iter().map(|problem: &Problem| ProblemStatus {
            object: problem.object.as_ref().map(ToString::to_string).unwrap_or_default(),
            file: problem.origin.file.to_string(),
            line: problem.origin.line,
            field: problem.path.clone(),
            reason: problem.reason.clone(),
            kept_last_good: problem.kept_last_good,
        });
        let kept_last_good = |name: &str| {
            state.unpublished.contains_key(name)
                && self.published.resource(name).is_some()
                && !state.refusing.contains(name)
        };
        let unpublished = state.unpublished.iter().map(|(name, reason)| ProblemStatus {
            object: name.to_string(),
            reason: format!("not published: {reason}"),
            kept_last_good: kept_last_good(name),
            ..ProblemStatus::default()
        });
        // Whoever wrote the object looks for it under its name.
        let not_in_force = objects.iter().filter_map(|object| {
            let written = !matches!(&*object.kind, "Pod" | "Service" | "EndpointSlice");
            let laggard = object.laggards.first().filter(|laggard| written && is_refused(laggard))?;
            let problem = ProblemStatus {
                object: object.key(),
                file: object.file.clone(),
                line: object.line,
                reason: format!("not in force at {}: {}", laggard.resource, laggard.reason),
                kept_last_good: kept_last_good(&laggard.resource),
                ..ProblemStatus::default()
            };
            Some(problem)
        });
        from_source.chain(unpublished).chain(not_in_force).collect()
    }

    fn refusals(&self) -> HashMap<(PodUid, String), String> {
        let store = self.store();
        let all = store.nacked();
        all.map(|(uid, _, name, _, reason)| ((uid.clone(), name.to_owned()), reason.to_owned())).collect()
    }

    fn sidecars(&self) -> Vec<SidecarStatus> {
        let mut sidecars: BTreeMap<PodUid, SidecarStatus> = BTreeMap::new();
        let reported = self.store().sidecars(now_ms());
        let state = self.state();
        for report in reported {
            let Ok(uid) = PodUid::new(&report.uid) else { continue };
            let pod = pod_name(&state.index, &uid);
            sidecars.insert(uid, SidecarStatus { pod, report, ..SidecarStatus::default() });
        }
        for peer in self.published.subscribers.streams() {
            let sidecar = sidecars.entry(peer.uid.clone()).or_insert_with(|| SidecarStatus {
                pod: pod_name(&state.index, &peer.uid),
                report: SidecarRow {
                    identity: peer.identity.to_string(),
                    uid: peer.uid.to_string(),
                    ..SidecarRow::default()
                },
                ..SidecarStatus::default()
            });
            sidecar.connected = true;
        }
        let pending = state.pending.iter().filter_map(|key| state.names.get(key)).flatten();
        let pending: BTreeSet<_> = pending.cloned().collect();
        if *self.published.synced().borrow() {
            sidecars.retain(|uid, sidecar| sidecar.connected || state.index.workload_name(uid).is_some());
            for (uid, identity) in state.index.meshed() {
                sidecars.entry(uid.clone()).or_insert_with(|| SidecarStatus {
                    pod: pod_name(&state.index, uid),
                    report: SidecarRow {
                        identity: identity.to_string(),
                        uid: uid.to_string(),
                        ..SidecarRow::default()
                    },
                    ..SidecarStatus::default()
                });
            }
        }
        drop(state);
        for (name, pods) in self.published.subscribers.all() {
            let ty = type_of(&name);
            // A pod's own address is encoded when it is asked for: once for each namespace that has it.
            let mut told: BTreeMap<String, Option<Versioned>> = BTreeMap::new();
            let mut asked = Vec::new();
            for uid in pods {
                let Some(sidecar) = sidecars.get_mut(&uid) else { continue };
                sidecar.subscribed += 1;
                let identity = self.published.workload(&uid);
                let namespace = identity.as_ref().map_or("", |identity| identity.namespace());
                if !told.contains_key(namespace) {
                    told.insert(namespace.to_owned(), self.published.lookup(&name, namespace));
                }
                if let Some(Some(current)) = told.get(namespace) {
                    asked.push((uid, current.version.clone()));
                }
            }
            let Some(ty) = ty else { continue };
            let late = pending.contains(&name);
            let store = self.store();
            asked.retain(|(uid, current)| late || store.live(uid, ty.type_url(), &name) != Some(&**current));
            drop(store);
            for (uid, _) in asked {
                if let Some(sidecar) = sidecars.get_mut(&uid) {
                    sidecar.behind += 1;
                }
            }
        }
        sidecars.into_values().collect()
    }
}

/// `<ns>/<pod>`, or the uid of a pod that is not known.
pub fn pod_name(index: &Index, uid: &PodUid) -> String {
    index
        .workload_name(uid)
        .map_or_else(|| uid.to_string(), |(namespace, name)| format!("{namespace}/{name}"))
}

/// Why an object cannot be published under a name.
fn refused(state: &State, key: &ObjectKey, name: &Arc<str>) -> Option<String> {
    if let Some(reason) = state.unpublished.get(name) {
        return Some(format!("nothing new is published there: {reason}"));
    }
    let same = |object: &ObjectRef| {
        (&*object.namespace, &*object.name) == (&*key.namespace, &*key.name)
            && *object.kind == *key.kind.to_string()
    };
    state.left_out.get(name)?.iter().find(|left| same(&left.object)).map(|left| left.reason.clone())
}

/// Whether that is the controller, which cannot publish it.
fn is_refused(laggard: &Laggard) -> bool {
    laggard.pod == CONTROLLER && !laggard.resource.is_empty()
}

fn type_of(name: &str) -> Option<ResourceType> {
    Some(name.parse::<Name>().ok()?.resource_type())
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Who stands in the way where nothing is published.
const CONTROLLER: &str = "the controller";

#[cfg(test)]
mod tests {
    use weft_core::identity::TrustDomain;

    use super::*;
    use crate::{
        index::{Event, tests::objects},
        metrics::Metrics,
        serve::publisher::Publisher,
        source::Batch,
    };

    #[test]
    fn what_cannot_be_published_is_live_nowhere_and_says_so_under_the_name_of_who_wrote_it() {
        let domain = TrustDomain::new("cluster.local").unwrap();
        let published = Arc::new(Published::new(domain.clone()));
        let mut publisher = Publisher::new(published.clone(), Index::new(domain));
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n\
                    spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n---\n\
                    apiVersion: weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p, namespace: shop}\n\
                    spec: {targetRefs: [{kind: Service, name: a}], limits: {maxRequests: 5}}\n";
        let origin = Origin { file: "a.yaml".into(), line: 1 };
        let apply = |object| Event::Apply { object: Box::new(object), origin: origin.clone() };
        publisher.apply(Batch { events: objects(text).into_iter().map(apply).collect(), ..Batch::default() });
        let (state, store) = (publisher.state(), Arc::default());
        let reports = Reports::new(Arc::clone(&store), published.clone(), Arc::new(Metrics::default()));
        let facts = Facts { state: &state, published: &published, store: &store, reports: &reports };
        let policy = |status: &Status| status.objects.iter().find(|o| o.name == "p").unwrap().clone();
        let good = facts.status("here");
        assert_eq!((policy(&good).applied, policy(&good).of, good.problems), (0, 0, Vec::new()));
        let reason = "Service.limits: as it should never be";
        state.write().unwrap().unpublished.insert("svc/shop/a:80".into(), reason.to_owned());
        let frozen = facts.status("here");
        let object = policy(&frozen);
        assert_eq!((object.applied, object.of, &*object.laggards[0].pod), (0, 1, "the controller"));
        assert!(object.laggards[0].reason.contains(reason), "{object:?}");
        let named: Vec<_> = frozen.problems.iter().map(|problem| &*problem.object).collect();
        assert_eq!(named, ["svc/shop/a:80", "TrafficPolicy/shop/p"]);
        assert!(frozen.problems.iter().all(|p| p.kept_last_good && p.reason.contains(reason)), "{frozen:?}");
    }
}
