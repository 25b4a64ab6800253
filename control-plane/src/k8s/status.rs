//! What the mesh makes of an object, written where its author looks: `status`, and an event for what is refused.
//!
//! Why the whole list of parents is written, with the version that it was read at: `status.parents` is one list that
//! several controllers share. Other controllers' entries are put back as they were found, and a write that is based
//! on an old version is refused by the API server and made again from the new one. Everybody's entries keep their
//! places: two controllers that each put their own last would write in turns for ever.
//!
//! Why it is compared first: a status that says the same is not written, so a mesh at rest writes nothing.
//!
//! Why counts wait: while a thousand sidecars take a change, "applied 118/1000" is another number each second, of each
//! object, and every write of it wakes whoever watches. What an author must act on is written at once; a count that
//! alone is new is written when the last one has stood for a moment, so that the first and the last always are.

use std::{collections::HashMap, time::Duration};

use k8s_openapi::{api::core::v1::ObjectReference, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::live::{Live, Statuses, resource};
use crate::{
    api::types::{ConditionStatus, ObjectStatus, ProblemStatus, Status},
    resources::{Kind, ObjectKey, gateway::ParentRef},
};

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
    let mut writer = Writer::new(client, recorder);
    loop {
        if leads.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        if let Some(status) = ask().await {
            writer.look(&statuses, &status, Instant::now()).await;
        }
        sleep(EVERY).await;
    }
}

struct Writer {
    client: Client,
    recorder: Recorder,
    /// Versions that were written over (what was heard is older than what was said), what was said, and when.
    written: HashMap<ObjectKey, (String, Value, Instant)>,
    /// Versions whose status the API server refused to take, why, and when.
    refused: HashMap<ObjectKey, (String, String, Instant)>,
    /// What authors were told by an event.
    told: HashMap<ObjectKey, String>,
}

impl Writer {
    fn new(client: Client, recorder: Recorder) -> Self {
        let (written, refused, told) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { client, recorder, written, refused, told }
    }

    async fn look(&mut self, statuses: &Statuses, status: &Status, at: Instant) {
        let objects: HashMap<_, _> = status.objects.iter().map(|object| (object.key(), object)).collect();
        let problems: HashMap<_, _> =
            status.problems.iter().map(|problem| (&*problem.object, problem)).collect();
        let silent: Vec<_> = status
            .replicas
            .iter()
            .filter(|replica| !replica.answered)
            .map(|replica| &*replica.name)
            .collect();
        let now = Timestamp::now().to_string();
        let live = statuses.all();
        self.told.retain(|key, _| live.contains_key(key));
        self.written.retain(|key, _| live.contains_key(key));
        self.refused.retain(|key, _| live.contains_key(key));
        for (key, live) in live {
            let text = key.to_string();
            let (object, problem) = (objects.get(&text).copied(), problems.get(&*text).copied());
            self.tell(&key, &live, problem).await;
            let last = self.written.get(&key);
            if last.is_some_and(|(version, ..)| *version == live.version) {
                continue;
            }
            let refused = self.refused.get(&key);
            if refused.is_some_and(|(version, _, then)| {
                *version == live.version && at.duration_since(*then) < AGAIN
            }) {
                continue;
            }
            // Not read yet, or gone already: nothing is known of it that could be said.
            if object.is_none() && problem.is_none() {
                continue;
            }
            let wanted = match key.kind {
                Kind::HttpRoute | Kind::GrpcRoute => {
                    let conditions = object.map(|object| &*object.conditions).unwrap_or_default();
                    route(&key, &live, conditions, problem, &now).map(|parents| json!({ "parents": parents }))
                }
                Kind::TrafficPolicy | Kind::AuthorizationPolicy | Kind::MeshConfig => {
                    policy(&live, object, problem, &silent, &now)
                }
                Kind::Service | Kind::EndpointSlice | Kind::Pod => None,
            };
            let Some(wanted) = wanted else { continue };
            // A CRD older than this controller drops what it does not know: saying it again at once would never end.
            let age = last.map(|(_, _, then)| at.duration_since(*then));
            let same = last.is_some_and(|(_, said, _)| timeless(said) == timeless(&wanted));
            if same && age.is_some_and(|age| age < AGAIN) {
                continue;
            }
            if only_counts(&wanted, &live.status) && age.is_some_and(|age| age < COUNTS) {
                continue;
            }
            let api: Api<DynamicObject> = match key.kind.is_namespaced() {
                true => Api::namespaced_with(self.client.clone(), &key.namespace, &resource(key.kind)),
                false => Api::all_with(self.client.clone(), &resource(key.kind)),
            };
            let patch = json!({"metadata": {"resourceVersion": live.version}, "status": wanted});
            match api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => {
                    self.refused.remove(&key);
                    self.written.insert(key, (live.version, wanted, at));
                }
                // Changed meanwhile: the next look has heard of it.
                Err(kube::Error::Api(answer)) if answer.code == 409 => {}
                Err(kube::Error::Api(answer)) if answer.code == 404 => statuses.remove(&key),
                // About this object alone: a schema that is newer than it, somebody's webhook, a right that lacks.
                // The others do not wait for it.
                Err(kube::Error::Api(answer)) if !matches!(answer.code, 429 | 503 | 504) => {
                    let reason = answer.message.clone();
                    if self.refused.get(&key).is_none_or(|(_, known, _)| *known != reason) {
                        tracing::warn!(object = %key, %reason, "the API server does not take its status");
                    }
                    self.refused.insert(key, (live.version, reason, at));
                }
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
    let is_ours = |entry: &Value| entry["controllerName"] == CONTROLLER_NAME;
    let route_name = (key.namespace.clone(), key.name.clone());
    let mut own = Vec::new();
    for (position, raw) in live.parents.iter().enumerate() {
        let Ok(parent) = serde_json::from_value::<ParentRef>(raw.clone()) else { continue };
        if crate::index::parent_service(&route_name, &parent).is_none() {
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
        let old = there.iter().find(|entry| is_ours(entry) && entry["parentRef"] == *raw);
        let known = old.map(|entry| &entry["conditions"]).unwrap_or(&Value::Null);
        let conditions = list(&said, known, live.generation, now);
        if !said.is_empty() {
            own.push(json!({"parentRef": raw, "controllerName": CONTROLLER_NAME, "conditions": conditions}));
        }
    }
    let mut wanted = Vec::new();
    for entry in &there {
        if !is_ours(entry) {
            wanted.push(entry.clone());
        } else if let Some(at) = own.iter().position(|new| new["parentRef"] == entry["parentRef"]) {
            wanted.push(own.remove(at));
        }
    }
    let room = MAX_PARENTS.saturating_sub(wanted.len());
    wanted.extend(own.into_iter().take(room));
    (wanted != there).then_some(wanted)
}

/// The status of one of our own kinds; `None` if it stands there.
fn policy(
    live: &Live,
    object: Option<&ObjectStatus>,
    problem: Option<&ProblemStatus>,
    silent: &[&str],
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
        (None, None) => return None,
    }
    let conditions = list(&[accepted], &live.status["conditions"], live.generation, now);
    let mut wanted = json!({"observedGeneration": live.generation, "conditions": conditions});
    if let Some(object) = object {
        let unknown = match silent {
            [] => String::new(),
            silent => format!(", no answer from {}", silent.join(", ")),
        };
        wanted["applied"] = json!(format!("{}/{} @ {}{unknown}", object.applied, object.of, object.version));
    }
    let same = ["observedGeneration", "conditions", "applied"]
        .iter()
        .all(|field| wanted[*field].is_null() || wanted[*field] == live.status[*field]);
    (!same).then_some(wanted)
}

/// A status without its times: what does not stand there yet turned "now", each time anew.
fn timeless(status: &Value) -> Value {
    let mut status = status.clone();
    let forget = |holder: &mut Value| {
        for condition in holder["conditions"].as_array_mut().into_iter().flatten() {
            condition["lastTransitionTime"] = Value::Null;
        }
    };
    match status.get_mut("parents").and_then(Value::as_array_mut) {
        Some(parents) => parents.iter_mut().for_each(forget),
        None => forget(&mut status),
    }
    status
}

/// Whether what is to be written differs from what stands there by how many sidecars have it, and by nothing else.
fn only_counts(wanted: &Value, there: &Value) -> bool {
    let counts = |status: &Value| status["applied"].is_string();
    counts(wanted)
        && counts(there)
        && ["observedGeneration", "conditions"].iter().all(|field| wanted[*field] == there[*field])
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
/// How long a count stands at least.
const COUNTS: Duration = Duration::from_secs(5);
/// Until the same is said again of the same object.
const AGAIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ObjectKey {
        ObjectKey::new(Kind::HttpRoute, "shop", "r")
    }

    fn accepted(parent_ref: usize, status: bool) -> ConditionStatus {
        ConditionStatus {
            parent: "Service/shop/cart".to_owned(),
            parent_ref: Some(parent_ref),
            kind: "Accepted".to_owned(),
            status,
            reason: if status { "Accepted" } else { "NoMatchingParent" }.to_owned(),
            message: String::new(),
        }
    }

    #[test]
    fn other_controllers_entries_stay_and_what_is_said_already_is_not_said_again() {
        let foreign = json!({"parentRef": {"name": "gw"}, "controllerName": "x/y", "conditions": []});
        let ours = json!({"group": "", "kind": "Service", "name": "cart", "port": 80});
        let core = json!({"group": "core", "kind": "Service", "name": "cart"});
        let mut live = Live {
            generation: 3,
            parents: vec![json!({"name": "gw"}), ours.clone(), core.clone()],
            status: json!({"parents": [foreign]}),
            ..Live::default()
        };
        let said = [accepted(1, true), accepted(2, false)];
        let wanted = route(&key(), &live, &said, None, "T1").unwrap();
        assert_eq!(wanted.len(), 3);
        assert_eq!(wanted[0], foreign);
        assert_eq!((&wanted[1]["parentRef"], &wanted[2]["parentRef"]), (&ours, &core));
        assert_eq!(wanted[1]["controllerName"], CONTROLLER_NAME);
        assert_eq!(wanted[1]["conditions"][0]["observedGeneration"], 3);
        assert_eq!(wanted[2]["conditions"][0]["status"], "False");
        live.status = json!({ "parents": wanted });
        assert_eq!(route(&key(), &live, &said, None, "T2"), None, "it stands there");
        // Another controller puts its own last: that is no reason to write.
        live.status["parents"].as_array_mut().unwrap().rotate_left(1);
        assert_eq!(route(&key(), &live, &said, None, "T2"), None, "in another order");
        live.status["parents"].as_array_mut().unwrap().rotate_right(1);
        // The generation moves on: what did not turn keeps its time, what turned gets a new one.
        live.generation = 4;
        let said = [accepted(1, true), accepted(2, true)];
        let wanted = route(&key(), &live, &said, None, "T2").unwrap();
        let time = |at: usize| wanted[at]["conditions"][0]["lastTransitionTime"].clone();
        assert_eq!((time(1), time(2)), (json!("T1"), json!("T2")));
        // Parents that are gone are gone there, too.
        live.parents.clear();
        assert_eq!(route(&key(), &live, &[], None, "T3").unwrap(), [foreign]);
    }

    /// A roll-out as the writer sees it: what is written when, of one policy that more and more sidecars have.
    #[tokio::test]
    async fn a_roll_out_is_counted_every_few_seconds_and_its_end_always() {
        use super::super::fake::{Fake, POLICIES};
        let fake = Fake::start().await;
        fake.install(&POLICIES);
        let at_api = "/apis/weft.dev/v1alpha1/trafficpolicies";
        let apply = |generation: i64| {
            let there = fake.get(at_api, "shop", "p").map_or(Value::Null, |there| there["status"].clone());
            let meta = json!({"name": "p", "namespace": "shop", "generation": generation});
            fake.apply(at_api, json!({"metadata": meta, "status": there}));
        };
        apply(1);
        let client = super::super::client_of(kube::Config::new(fake.uri())).unwrap();
        let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: None };
        let recorder = Recorder::new(client.clone(), reporter);
        let mut writer = Writer::new(client, recorder);
        let (statuses, key) = (Statuses::default(), ObjectKey::new(Kind::TrafficPolicy, "shop", "p"));
        let start = Instant::now();
        let mut written: Vec<(u64, String)> = Vec::new();
        let mut look = async |second: u64, applied: u32| {
            let found = fake.get(at_api, "shop", "p").unwrap();
            let meta = &found["metadata"];
            statuses.set(
                key.clone(),
                Live {
                    version: meta["resourceVersion"].as_str().unwrap().to_owned(),
                    generation: meta["generation"].as_i64().unwrap(),
                    status: found["status"].clone(),
                    ..Live::default()
                },
            );
            let object = ObjectStatus {
                kind: "TrafficPolicy".to_owned(),
                namespace: "shop".to_owned(),
                name: "p".to_owned(),
                applied,
                of: 100,
                version: "v".to_owned(),
                ..ObjectStatus::default()
            };
            let status = Status { objects: vec![object], ..Status::default() };
            writer.look(&statuses, &status, start + Duration::from_secs(second)).await;
            let now = fake.get(at_api, "shop", "p").unwrap()["status"]["applied"].clone();
            if written.last().map(|(_, text)| text.as_str()) != now.as_str() {
                written.push((second, now.as_str().unwrap().to_owned()));
            }
        };
        // Twenty sidecars a second for four seconds, then the last ones, then quiet; long after it a change.
        for (second, applied) in [(0, 0), (1, 20), (2, 40), (3, 60), (4, 80), (5, 99), (6, 100)] {
            look(second, applied).await;
        }
        for second in 7..30 {
            look(second, 100).await;
        }
        look(30, 99).await;
        look(31, 98).await;
        apply(2);
        look(32, 98).await;
        look(33, 100).await;
        for second in 34..40 {
            look(second, 100).await;
        }
        let text = |n: u32| format!("{n}/100 @ v");
        let wanted = [(0, 0), (5, 99), (10, 100), (30, 99), (32, 98), (37, 100)];
        assert_eq!(written, wanted.map(|(second, n)| (second, text(n))));
        assert_eq!(fake.writes().len(), wanted.len(), "nothing else is written: {:?}", fake.writes());
    }

    #[test]
    fn a_policy_says_whether_it_holds_and_where_it_is_live() {
        let mut live = Live { generation: 1, status: Value::Null, ..Live::default() };
        let object = ObjectStatus {
            conditions: vec![accepted(0, true)],
            applied: 2,
            of: 3,
            version: "v".to_owned(),
            ..ObjectStatus::default()
        };
        let wanted = policy(&live, Some(&object), None, &[], "T").unwrap();
        assert_eq!(wanted["applied"], "2/3 @ v");
        assert_eq!(wanted["conditions"][0]["status"], "True");
        live.status = wanted;
        assert_eq!(policy(&live, Some(&object), None, &[], "T2"), None);
        let unknown = policy(&live, Some(&object), None, &["two"], "T2").unwrap();
        assert_eq!(unknown["applied"], "2/3 @ v, no answer from two");
        let problem = ProblemStatus {
            field: "spec.rules[0]".to_owned(),
            reason: "unknown field `identitys`".to_owned(),
            kept_last_good: true,
            ..ProblemStatus::default()
        };
        let wanted = policy(&live, Some(&object), Some(&problem), &[], "T2").unwrap();
        let message = wanted["conditions"][0]["message"].as_str().unwrap();
        assert!(
            message.contains("spec.rules[0]: unknown field") && message.contains("last good"),
            "{message}"
        );
        assert_eq!(policy(&live, None, None, &[], "T3"), None, "nobody has read it yet");
    }
}
