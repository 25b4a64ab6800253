//! What is there, what is wrong with it, and where it is live.
//!
//! Why an object's "applied N of M" counts over *current subscribers* of what was compiled from it: a
//! sidecar that never asked for a route cannot be late with it, and one that asked is counted until its
//! stream ends.
//!
//! Why sidecars are those of the pods that there are: one that is not connected is *away*, and somebody has to look at
//! it. A pod that was deleted or has completed is not away but gone, whatever it said in its last minute; a pod whose
//! sidecar has never been heard is away all the same.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use weft_core::identity::PodUid;
use weft_proto::{
    ads::{ResourceType, Versioned},
    names::Name,
};

use super::types::{ConditionStatus, Laggard, ObjectStatus, ProblemStatus, SidecarStatus, Status};
use crate::{
    index::{Index, Key},
    resources::{Kind, ObjectKey},
    serve::{
        published::Published,
        publisher::{State, now_ms},
        telemetry::Reports,
    },
    source::{Origin, Problem},
    telemetry::{Store, view::SidecarRow},
};

/// Everything that a status is made of.
pub struct Facts<'a> {
    /// Objects and problems.
    pub state: &'a State,
    /// What is published, and who is subscribed.
    pub published: &'a Published,
    /// What sidecars said.
    pub store: &'a Store,
    /// When they said that something is live.
    pub reports: &'a Reports,
}

impl Facts<'_> {
    /// The whole status.
    pub fn status(&self, source: &str) -> Status {
        let refusals = self.refusals();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            synced: *self.published.synced().borrow(),
            source: source.to_owned(),
            objects: self.objects(&refusals),
            problems: self.problems(),
            sidecars: self.sidecars(),
            foreign: u64::try_from(self.state.foreign).unwrap_or(u64::MAX),
            replicas: Vec::new(),
        }
    }

    /// `<ns>/<pod>`, or the uid of a pod that is not known.
    pub fn pod(&self, uid: &PodUid) -> String {
        pod_name(&self.state.index, uid)
    }

    fn objects(&self, refusals: &HashMap<(PodUid, String), String>) -> Vec<ObjectStatus> {
        self.state
            .index
            .objects()
            .map(|(key, origin, version)| self.object(key, origin, version, refusals))
            .collect()
    }

    fn object(
        &self,
        key: &ObjectKey,
        origin: &Origin,
        version: &str,
        refusals: &HashMap<(PodUid, String), String>,
    ) -> ObjectStatus {
        let mut pods: BTreeMap<PodUid, Option<String>> = BTreeMap::new();
        let mut after: Option<u64> = None;
        for name in self.names(key) {
            let Some(ty) = type_of(&name) else { continue };
            let mut told = BTreeMap::new();
            for pod in self.published.subscribers.pods(&name) {
                // Not everybody is told the same of a service: consumer routes.
                let Some(resource) = self.published.resource_for_pod(&name, &pod) else { continue };
                let current = &*resource.versioned.version;
                let live = self.store.live(&pod, ty.type_url(), &name) == Some(current);
                let behind = pods.entry(pod).or_default();
                if !live && behind.is_none() {
                    *behind = Some(name.clone());
                }
                told.insert(resource.versioned.version, resource.since_ms);
            }
            for (version, since_ms) in told {
                if let Some(at) = self.reports.last_applied(&name, &version) {
                    after = after.max(Some(at.saturating_sub(since_ms)));
                }
            }
        }
        let mut laggards: Vec<_> = pods
            .iter()
            .filter_map(|(uid, behind)| {
                let resource = behind.clone()?;
                let reason = refusals.get(&(uid.clone(), resource.clone())).cloned().unwrap_or_default();
                Some(Laggard { pod: self.pod(uid), uid: uid.to_string(), resource, reason })
            })
            .collect();
        // Not even published: whoever waits for the object must not be told that everybody has it.
        let pending = &self.state.pending;
        if !pending.is_empty() && !pending.is_disjoint(&self.state.index.affected_by(key)) {
            laggards = vec![Laggard {
                pod: "the controller".to_owned(),
                reason: "it is about to publish it".to_owned(),
                ..Laggard::default()
            }];
        }
        let of = pods.len().max(laggards.len());
        let conditions = self.state.index.conditions(key).into_iter().map(|condition| ConditionStatus {
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
            version: version.to_owned(),
            conditions: conditions.collect(),
            applied: count(of - laggards.len()),
            of: count(of),
            applied_after_ms: after.filter(|_| laggards.is_empty() && !pods.is_empty()),
            laggards,
        }
    }

    /// Names of what was compiled from an object. Endpoints are left out: they change without their
    /// service's doing, and a collection has no one version.
    fn names(&self, key: &ObjectKey) -> BTreeSet<String> {
        let keys = self.state.index.affected_by(key);
        let wanted = |k: &&Key| match (key.kind, k) {
            (Kind::Service, Key::Service(_)) => true,
            (Kind::Service, _) | (_, Key::Endpoints(_) | Key::Address(_)) => false,
            (_, Key::Service(_) | Key::Route(_) | Key::Workload(_)) => true,
        };
        let names = keys.iter().filter(wanted).filter_map(|k| self.state.names.get(k)).flatten();
        names.map(ToString::to_string).collect()
    }

    fn problems(&self) -> Vec<ProblemStatus> {
        let from_source = self.state.problems.iter().map(|problem: &Problem| ProblemStatus {
            object: problem.object.as_ref().map(ToString::to_string).unwrap_or_default(),
            file: problem.origin.file.to_string(),
            line: problem.origin.line,
            field: problem.path.clone(),
            reason: problem.reason.clone(),
            kept_last_good: problem.kept_last_good,
        });
        let unpublished = self.state.unpublished.iter().map(|(name, reason)| ProblemStatus {
            object: name.to_string(),
            reason: format!("not published: {reason}"),
            kept_last_good: self.published.resource(name).is_some() && !self.state.refusing.contains(name),
            ..ProblemStatus::default()
        });
        from_source.chain(unpublished).collect()
    }

    fn refusals(&self) -> HashMap<(PodUid, String), String> {
        let all = self.store.nacked();
        all.map(|(uid, _, name, _, reason)| ((uid.clone(), name.to_owned()), reason.to_owned())).collect()
    }

    fn sidecars(&self) -> Vec<SidecarStatus> {
        let mut sidecars: BTreeMap<PodUid, SidecarStatus> = BTreeMap::new();
        for report in self.store.sidecars(now_ms()) {
            let Ok(uid) = PodUid::new(&report.uid) else { continue };
            let pod = self.pod(&uid);
            sidecars.insert(uid, SidecarStatus { pod, report, ..SidecarStatus::default() });
        }
        for peer in self.published.subscribers.streams() {
            let sidecar = sidecars.entry(peer.uid.clone()).or_insert_with(|| SidecarStatus {
                pod: self.pod(&peer.uid),
                report: SidecarRow {
                    identity: peer.identity.to_string(),
                    uid: peer.uid.to_string(),
                    ..SidecarRow::default()
                },
                ..SidecarStatus::default()
            });
            sidecar.connected = true;
        }
        let pending = self.state.pending.iter().filter_map(|key| self.state.names.get(key)).flatten();
        let pending: BTreeSet<_> = pending.collect();
        if *self.published.synced().borrow() {
            sidecars
                .retain(|uid, sidecar| sidecar.connected || self.state.index.workload_name(uid).is_some());
            for (uid, identity) in self.state.index.meshed() {
                sidecars.entry(uid.clone()).or_insert_with(|| SidecarStatus {
                    pod: self.pod(uid),
                    report: SidecarRow {
                        identity: identity.to_string(),
                        uid: uid.to_string(),
                        ..SidecarRow::default()
                    },
                    ..SidecarStatus::default()
                });
            }
        }
        for (name, pods) in self.published.subscribers.all() {
            let ty = type_of(&name);
            // A pod's own address is encoded when it is asked for: once for each namespace that has it.
            let mut told: BTreeMap<String, Option<Versioned>> = BTreeMap::new();
            for uid in pods {
                let Some(sidecar) = sidecars.get_mut(&uid) else { continue };
                sidecar.subscribed += 1;
                let identity = self.published.workload(&uid);
                let namespace = identity.as_ref().map_or("", |identity| identity.namespace());
                if !told.contains_key(namespace) {
                    told.insert(namespace.to_owned(), self.published.lookup(&name, namespace));
                }
                let (Some(Some(current)), Some(ty)) = (told.get(namespace), ty) else { continue };
                let live = self.store.live(&uid, ty.type_url(), &name) == Some(&*current.version);
                if !live || pending.contains(&name) {
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

fn type_of(name: &str) -> Option<ResourceType> {
    Some(name.parse::<Name>().ok()?.resource_type())
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
