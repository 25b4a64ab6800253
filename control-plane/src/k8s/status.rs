//! What the mesh makes of an object, written where its author looks: `status`, and an event for what is refused.
//!
//! Why the whole list of parents is written, with the version that it was read at: `status.parents` is one list that
//! several controllers share. Other controllers' entries are put back as they were found, and a write that is based
//! on an old version is refused by the API server and made again from the new one.
//!
//! Why it is compared first: a status that says the same is not written, so a mesh at rest writes nothing.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{api::core::v1::ObjectReference, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};

use super::watch::resource;
use crate::{
    api::types::{ConditionStatus, ObjectStatus, ProblemStatus, Status},
    resources::{Kind, ObjectKey, gateway::ParentRef},
};

/// An object as the API server has it, as far as status needs it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Live {
    /// Which version of it this is.
    pub version: String,
    /// Its uid.
    pub uid: String,
    /// Which version of its spec.
    pub generation: i64,
    /// `spec.parentRefs`
    pub parents: Vec<Value>,
    /// `status`
    pub status: Value,
}

/// Every object that has a status.
#[derive(Clone, Debug, Default)]
pub struct Statuses(Arc<Mutex<BTreeMap<ObjectKey, Live>>>);

impl Statuses {
    /// An object as it is now.
    pub fn set(&self, key: ObjectKey, live: Live) {
        self.lock().insert(key, live);
    }

    /// It is gone.
    pub fn remove(&self, key: &ObjectKey) {
        self.lock().remove(key);
    }

    fn all(&self) -> Vec<(ObjectKey, Live)> {
        self.lock().iter().map(|(key, live)| (key.clone(), live.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes, for as long as this replica leads. `ask` is the status of the whole mesh.
pub async fn write<F: Future<Output = Option<Status>>>(
    client: Client,
    pod: String,
    statuses: Statuses,
    mut leads: watch::Receiver<bool>,
    ask: impl Fn() -> F,
) {
    let instance = (!pod.is_empty()).then_some(pod);
    let recorder = Recorder::new(client.clone(), Reporter { controller: CONTROLLER.to_owned(), instance });
    let mut writer = Writer { client, recorder, written: HashMap::new(), told: HashMap::new() };
    loop {
        if leads.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        if let Some(status) = ask().await {
            writer.look(&statuses, &status).await;
        }
        sleep(EVERY).await;
    }
}

struct Writer {
    client: Client,
    recorder: Recorder,
    /// Versions that were written over: what was heard is older than what was said.
    written: HashMap<ObjectKey, String>,
    /// What authors were told by an event.
    told: HashMap<ObjectKey, String>,
}

impl Writer {
    async fn look(&mut self, statuses: &Statuses, status: &Status) {
        let objects: HashMap<_, _> = status.objects.iter().map(|object| (name(object), object)).collect();
        let problems: HashMap<_, _> =
            status.problems.iter().map(|problem| (&*problem.object, problem)).collect();
        let now = Timestamp::now().to_string();
        let live = statuses.all();
        self.told.retain(|key, _| live.iter().any(|(known, _)| known == key));
        for (key, live) in live {
            let text = key.to_string();
            let (object, problem) = (objects.get(&text).copied(), problems.get(&*text).copied());
            self.tell(&key, &live, problem).await;
            if self.written.get(&key) == Some(&live.version) {
                continue;
            }
            let wanted = match key.kind {
                Kind::HttpRoute | Kind::GrpcRoute => {
                    let conditions = object.map(|object| &*object.conditions).unwrap_or_default();
                    route(&key, &live, conditions, problem, &now).map(|parents| json!({ "parents": parents }))
                }
                Kind::TrafficPolicy | Kind::AuthorizationPolicy | Kind::MeshConfig => {
                    policy(&live, object, problem, &now)
                }
                Kind::Service | Kind::EndpointSlice | Kind::Pod => None,
            };
            let Some(wanted) = wanted else { continue };
            let api: Api<DynamicObject> = match key.kind.is_namespaced() {
                true => Api::namespaced_with(self.client.clone(), &key.namespace, &resource(key.kind)),
                false => Api::all_with(self.client.clone(), &resource(key.kind)),
            };
            let patch = json!({"metadata": {"resourceVersion": live.version}, "status": wanted});
            match api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => {
                    self.written.insert(key, live.version);
                }
                // Changed meanwhile: the next look has heard of it.
                Err(kube::Error::Api(answer)) if answer.code == 409 => {}
                Err(kube::Error::Api(answer)) if answer.code == 404 => statuses.remove(&key),
                Err(error) => {
                    tracing::debug!(%error, object = %key, "status cannot be written");
                    return;
                }
            }
        }
    }

    /// An event says once what is wrong with an object.
    async fn tell(&mut self, key: &ObjectKey, live: &Live, problem: Option<&ProblemStatus>) {
        let Some(problem) = problem else {
            self.told.remove(key);
            return;
        };
        let note = rejected(problem);
        if self.told.get(key) == Some(&note) {
            return;
        }
        let resource = resource(key.kind);
        let about = ObjectReference {
            api_version: Some(resource.api_version),
            kind: Some(resource.kind),
            namespace: (!key.namespace.is_empty()).then(|| key.namespace.to_string()),
            name: Some(key.name.to_string()),
            uid: Some(live.uid.clone()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: "Rejected".to_owned(),
            note: Some(note.chars().take(MAX_NOTE).collect()),
            action: "Read".to_owned(),
            secondary: None,
        };
        match self.recorder.publish(&event, &about).await {
            Ok(()) => {
                self.told.insert(key.clone(), note);
            }
            Err(error) => tracing::debug!(%error, object = %key, "an event cannot be written"),
        }
    }
}

fn name(object: &ObjectStatus) -> String {
    if object.namespace.is_empty() {
        return format!("{}/{}", object.kind, object.name);
    }
    format!("{}/{}/{}", object.kind, object.namespace, object.name)
}

fn rejected(problem: &ProblemStatus) -> String {
    let kept = if problem.kept_last_good { "; the last good version stays in force" } else { "" };
    let at = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
    format!("{at}{}{kept}", problem.reason)
}

/// All parents of a route as they should stand there; `None` if they do.
fn route(
    key: &ObjectKey,
    live: &Live,
    conditions: &[ConditionStatus],
    problem: Option<&ProblemStatus>,
    now: &str,
) -> Option<Vec<Value>> {
    let there = live.status["parents"].as_array().cloned().unwrap_or_default();
    let is_ours = |entry: &&Value| entry["controllerName"] == CONTROLLER_NAME;
    let mut wanted: Vec<Value> = there.iter().filter(|entry| !is_ours(entry)).cloned().collect();
    let route_name = (key.namespace.clone(), key.name.clone());
    for (position, raw) in live.parents.iter().enumerate() {
        let Ok(parent) = serde_json::from_value::<ParentRef>(raw.clone()) else { continue };
        if crate::index::parent_service(&route_name, &parent).is_none() || wanted.len() >= MAX_PARENTS {
            continue;
        }
        let mut said: Vec<ConditionStatus> =
            conditions.iter().filter(|c| c.parent_ref == Some(position)).cloned().collect();
        if let Some(problem) = problem {
            said.retain(|condition| condition.kind != "Accepted");
            said.push(ConditionStatus {
                kind: "Accepted".to_owned(),
                status: false,
                reason: "UnsupportedValue".to_owned(),
                message: rejected(problem),
                ..ConditionStatus::default()
            });
        }
        let old = there.iter().filter(is_ours).find(|entry| entry["parentRef"] == *raw);
        let known = old.map(|entry| &entry["conditions"]).unwrap_or(&Value::Null);
        let conditions = list(&said, known, live.generation, now);
        if !said.is_empty() {
            wanted
                .push(json!({"parentRef": raw, "controllerName": CONTROLLER_NAME, "conditions": conditions}));
        }
    }
    (wanted != there).then_some(wanted)
}

/// The status of one of our own kinds; `None` if it stands there.
fn policy(
    live: &Live,
    object: Option<&ObjectStatus>,
    problem: Option<&ProblemStatus>,
    now: &str,
) -> Option<Value> {
    let mut accepted = ConditionStatus { kind: "Accepted".to_owned(), ..ConditionStatus::default() };
    match (problem, object) {
        (Some(problem), _) => {
            accepted.reason = "Invalid".to_owned();
            accepted.message = rejected(problem);
        }
        (None, Some(object)) => {
            let bad: Vec<_> =
                object.conditions.iter().filter(|c| c.kind == "Accepted" && !c.status).collect();
            accepted.status = bad.is_empty();
            accepted.reason = bad.first().map_or_else(|| "Accepted".to_owned(), |c| c.reason.clone());
            let text = |c: &&ConditionStatus| match c.parent.is_empty() {
                true => c.message.clone(),
                false => format!("{}: {}", c.parent, c.message),
            };
            accepted.message = bad.iter().map(text).collect::<Vec<_>>().join("; ");
        }
        // Not read yet.
        (None, None) => return None,
    }
    let conditions = list(&[accepted], &live.status["conditions"], live.generation, now);
    let mut wanted = json!({"observedGeneration": live.generation, "conditions": conditions});
    if let Some(object) = object {
        wanted["applied"] = json!(format!("{}/{} @ {}", object.applied, object.of, object.version));
    }
    let same = ["observedGeneration", "conditions", "applied"]
        .iter()
        .all(|field| wanted[*field].is_null() || wanted[*field] == live.status[*field]);
    (!same).then_some(wanted)
}

/// Conditions as they are written; the time of one changes with its status only.
fn list(said: &[ConditionStatus], known: &Value, generation: i64, now: &str) -> Vec<Value> {
    let word = |holds: bool| if holds { "True" } else { "False" };
    let one = |condition: &ConditionStatus| {
        let known = known.as_array().into_iter().flatten();
        let old = known
            .filter(|old| old["type"] == *condition.kind && old["status"] == word(condition.status))
            .find_map(|old| old["lastTransitionTime"].as_str());
        json!({
            "type": condition.kind,
            "status": word(condition.status),
            "reason": condition.reason,
            "message": condition.message.chars().take(MAX_MESSAGE).collect::<String>(),
            "observedGeneration": generation,
            "lastTransitionTime": old.unwrap_or(now),
        })
    };
    said.iter().map(one).collect()
}

/// What route statuses name as theirs.
pub const CONTROLLER_NAME: &str = "weft.dev/mesh-controller";
const CONTROLLER: &str = "weft-controller";
/// Gateway API's own bound.
const MAX_PARENTS: usize = 32;
/// Of a condition; Gateway API's own bound.
const MAX_MESSAGE: usize = 32_768;
/// Of an event; the API server's own bound.
const MAX_NOTE: usize = 1_024;
/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
