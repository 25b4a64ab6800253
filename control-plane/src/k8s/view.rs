//! What the API server was last known to say. Pure: `watch` tells it what it hears, and when.
//!
//! Why it stands between watch and index: an API server that goes away, restarts or answers half a list must
//! neither open nor stop anything. An object is gone when its deletion was seen, or when a *whole* new list does
//! not have it; and where such a list lacks most of what was there, it is believed after a minute only. A kind
//! that the API server suddenly does not know (its CRD is served a moment later than the rest) is such a list; and one of
//! ours that it does not know at the start is waited for as long: no policies are not the same as no answer.
//!
//! Why hashes and not objects: what the mesh needs of an object is in the index; here it is enough to know
//! whether it differs from what the index was told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    index::{Event, Name},
    resources::{Kind, Object, ObjectKey, Origin},
    source::Problem,
};

/// One list of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Watched {
    /// Objects of the mesh.
    Objects(Kind),
    /// Where pods run: zones.
    Nodes,
    /// Whose pods need trust anchors.
    Namespaces,
}

/// One thing as it was seen.
#[derive(Clone, Debug)]
pub enum Seen {
    /// An object of the mesh.
    Object {
        /// Its key.
        key: ObjectKey,
        /// It, or why it cannot be used.
        read: Result<Box<Object>, Bad>,
        /// Of all that it says.
        hash: u64,
    },
    /// A node.
    Node {
        /// Its name.
        name: Arc<str>,
        /// Its zone.
        zone: Option<Arc<str>>,
    },
    /// A namespace.
    Namespace {
        /// Its name.
        name: Arc<str>,
        /// Whether its pods get a sidecar.
        injected: bool,
    },
}

/// An object that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// Field.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
    /// For an authorization policy: labels of the workloads that it is about.
    pub scope: BTreeMap<String, String>,
}

/// All lists.
#[derive(Debug)]
pub struct View {
    lists: BTreeMap<Watched, List>,
    events: Vec<Event>,
    bad: BTreeMap<ObjectKey, Problem>,
    injected: BTreeSet<Arc<str>>,
}

#[derive(Debug, Default)]
struct List {
    /// Whether there was a whole list once.
    listed: bool,
    /// Since when a kind of ours is not known, that never was.
    absent: Option<Instant>,
    known: BTreeMap<Name, Known>,
    /// What the list under way has had so far.
    relist: Option<BTreeSet<Name>>,
    /// What a list did not have any more, and since when; still in force.
    held: BTreeMap<Name, Instant>,
    failed: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    hash: u64,
    /// Whether the index has a version of it.
    good: bool,
}

impl View {
    /// Nothing seen yet of `lists`.
    pub fn new(lists: impl IntoIterator<Item = Watched>) -> Self {
        let lists = lists.into_iter().map(|watched| (watched, List::default())).collect();
        Self { lists, events: Vec::new(), bad: BTreeMap::new(), injected: BTreeSet::new() }
    }

    /// A new list begins; what an earlier one had so far counts for nothing.
    pub fn restart(&mut self, of: Watched) {
        self.list(of).relist = Some(BTreeSet::new());
    }

    /// Something is there.
    pub fn apply(&mut self, of: Watched, seen: Seen) {
        let list = self.lists.entry(of).or_default();
        let (name, hash) = seen.name_and_hash();
        if let Some(relist) = &mut list.relist {
            relist.insert(name.clone());
        }
        list.held.remove(&name);
        list.failed = None;
        let old = list.known.get(&name).copied();
        let had_good = old.is_some_and(|old| old.good);
        let good = !matches!(seen, Seen::Object { read: Err(_), .. });
        list.known.insert(name, Known { hash, good: good || had_good });
        let again = old.is_some_and(|old| old.hash == hash);
        match seen {
            Seen::Object { key, read: Ok(object), .. } => {
                let was_bad = self.bad.remove(&key).is_some();
                if !again || was_bad {
                    self.events.push(Event::Apply { object, origin: origin() });
                }
            }
            Seen::Object { key, read: Err(Bad { path, reason, scope }), .. } => {
                // Fail closed: nobody knows whom the policy would have let in.
                if !had_good && !again && key.kind == Kind::AuthorizationPolicy {
                    self.events.push(Event::Unreadable { key: key.clone(), labels: scope });
                }
                let problem = Problem {
                    object: Some(key.clone()),
                    origin: origin(),
                    path,
                    reason,
                    kept_last_good: had_good,
                };
                self.bad.insert(key, problem);
            }
            Seen::Node { name, zone } => {
                if !again {
                    self.events.push(Event::Zone { node: name, zone });
                }
            }
            Seen::Namespace { name, injected: true } => {
                self.injected.insert(name);
            }
            Seen::Namespace { name, injected: false } => {
                self.injected.remove(&name);
            }
        }
    }

    /// Something was seen to go.
    pub fn delete(&mut self, of: Watched, name: &Name) {
        let list = self.list(of);
        list.held.remove(name);
        list.failed = None;
        if list.known.remove(name).is_some() {
            self.gone(of, name);
        }
    }

    /// The list that began is whole.
    pub fn done(&mut self, of: Watched, now: Instant) {
        let list = self.list(of);
        list.listed = true;
        list.absent = None;
        list.failed = None;
        let Some(seen) = list.relist.take() else { return };
        let missing: Vec<Name> = list.known.keys().filter(|name| !seen.contains(*name)).cloned().collect();
        let most = list.known.len() > HOLD_ABOVE && missing.len() * 2 > list.known.len();
        if most {
            for name in missing {
                list.held.entry(name).or_insert(now);
            }
            return;
        }
        for name in missing {
            self.delete(of, &name);
        }
    }

    /// The API server does not know the kind.
    pub fn absent(&mut self, of: Watched, now: Instant) {
        let list = self.list(of);
        list.relist = None;
        list.failed = None;
        if is_ours(of) && !list.listed {
            list.absent.get_or_insert(now);
            return;
        }
        list.listed = true;
        for name in list.known.keys() {
            list.held.entry(name.clone()).or_insert(now);
        }
    }

    /// It could not be asked.
    pub fn failed(&mut self, of: Watched, reason: String) {
        self.list(of).failed = Some(reason);
    }

    /// Time passes: what was missing for a minute is gone.
    pub fn tick(&mut self, now: Instant) {
        for list in self.lists.values_mut() {
            if list.absent.is_some_and(|since| now.duration_since(since) >= HOLD) {
                list.absent = None;
                list.listed = true;
            }
        }
        let due: Vec<(Watched, Name)> = self
            .lists
            .iter()
            .flat_map(|(of, list)| list.held.iter().map(move |(name, since)| (*of, name, *since)))
            .filter(|(_, _, since)| now.duration_since(*since) >= HOLD)
            .map(|(of, name, _)| (of, name.clone()))
            .collect();
        for (of, name) in due {
            self.delete(of, &name);
        }
    }

    /// When to look at the time again.
    pub fn next_tick(&self) -> Option<Instant> {
        let since = self.lists.values().flat_map(|list| list.held.values().chain(&list.absent)).min()?;
        Some(*since + HOLD)
    }

    /// Whether every list was whole once.
    pub fn is_synced(&self) -> bool {
        self.lists.values().all(|list| list.listed)
    }

    /// What the index has not been told yet.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Namespaces whose pods get a sidecar.
    pub fn injected(&self) -> &BTreeSet<Arc<str>> {
        &self.injected
    }

    /// All that is wrong now.
    pub fn problems(&self) -> Vec<Problem> {
        let whole = |reason| Problem {
            object: None,
            origin: origin(),
            path: String::new(),
            reason,
            kept_last_good: true,
        };
        let lists = self.lists.iter().flat_map(|(of, list)| {
            let absent = list.absent.map(|_| {
                format!(
                    "{of} are not known to the API server: install weft-crds (waited for, for {} s)",
                    HOLD.as_secs()
                )
            });
            let failed = list.failed.as_ref().map(|reason| format!("{of} cannot be watched: {reason}"));
            let held = (!list.held.is_empty()).then(|| {
                let (missing, all) = (list.held.len(), list.known.len());
                format!(
                    "{missing} of {all} {of} are gone at once: held until it has been so for {} s",
                    HOLD.as_secs()
                )
            });
            failed.into_iter().chain(held).chain(absent)
        });
        self.bad.values().cloned().chain(lists.map(whole)).collect()
    }

    fn gone(&mut self, of: Watched, (namespace, name): &Name) {
        match of {
            Watched::Objects(kind) => {
                let key = ObjectKey { kind, namespace: namespace.clone(), name: name.clone() };
                self.bad.remove(&key);
                self.events.push(Event::Delete(key));
            }
            Watched::Nodes => self.events.push(Event::Zone { node: name.clone(), zone: None }),
            Watched::Namespaces => {
                self.injected.remove(name);
            }
        }
    }

    fn list(&mut self, of: Watched) -> &mut List {
        self.lists.entry(of).or_default()
    }
}

impl Seen {
    /// Under which name it is known in its list, and what tells one version from another.
    fn name_and_hash(&self) -> (Name, u64) {
        match self {
            Self::Object { key, hash, .. } => ((key.namespace.clone(), key.name.clone()), *hash),
            Self::Node { name, zone } => {
                let hash = zone.as_ref().map_or(0, |zone| crate::index::hash(zone.as_bytes()));
                (("".into(), name.clone()), hash)
            }
            Self::Namespace { name, injected } => (("".into(), name.clone()), u64::from(*injected)),
        }
    }
}

impl Watched {
    /// Whether there are clusters without it: a kind that somebody installs.
    pub fn may_be_absent(self) -> bool {
        match self {
            Self::Objects(kind) => match kind {
                Kind::HttpRoute
                | Kind::GrpcRoute
                | Kind::TrafficPolicy
                | Kind::AuthorizationPolicy
                | Kind::MeshConfig => true,
                Kind::Service | Kind::EndpointSlice | Kind::Pod => false,
            },
            Self::Nodes | Self::Namespaces => false,
        }
    }
}

impl std::fmt::Display for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Objects(kind) => write!(f, "{kind} objects"),
            Self::Nodes => f.write_str("nodes"),
            Self::Namespaces => f.write_str("namespaces"),
        }
    }
}

/// Whether a list is of a kind that is installed with Weft.
fn is_ours(of: Watched) -> bool {
    match of {
        Watched::Objects(Kind::TrafficPolicy | Kind::AuthorizationPolicy | Kind::MeshConfig) => true,
        Watched::Objects(
            Kind::Service | Kind::EndpointSlice | Kind::Pod | Kind::HttpRoute | Kind::GrpcRoute,
        )
        | Watched::Nodes
        | Watched::Namespaces => false,
    }
}

/// Objects of the API server have no file.
fn origin() -> Origin {
    Origin { file: "kubernetes".into(), line: 0 }
}

/// A list that lacks most of what was there is believed after this (protocol.md §7).
const HOLD: Duration = Duration::from_secs(60);
/// … and only where there was more than this.
const HOLD_ABOVE: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICES: Watched = Watched::Objects(Kind::Service);
    const POLICIES: Watched = Watched::Objects(Kind::AuthorizationPolicy);

    fn service(name: &str, ip: &str) -> Seen {
        let mut service = k8s_openapi::api::core::v1::Service::default();
        service.metadata.namespace = Some("shop".to_owned());
        service.metadata.name = Some(name.to_owned());
        service.spec.get_or_insert_default().cluster_ip = Some(ip.to_owned());
        let object = Object::Service(Box::new(service));
        let hash = crate::index::hash(ip.as_bytes());
        Seen::Object { key: object.key(), hash, read: Ok(Box::new(object)) }
    }

    fn policy(hash: u64) -> Seen {
        let bad = Bad { path: "spec.rules[0]".to_owned(), reason: "no".to_owned(), scope: BTreeMap::new() };
        Seen::Object { key: ObjectKey::new(Kind::AuthorizationPolicy, "shop", "p"), hash, read: Err(bad) }
    }

    fn told(view: &mut View) -> Vec<String> {
        let text = |event| match event {
            Event::Apply { object, .. } => format!("+{}", object.key().name),
            Event::Delete(key) => format!("-{}", key.name),
            Event::Unreadable { key, .. } => format!("!{}", key.name),
            Event::Zone { node, zone } => format!("{node}={}", zone.as_deref().unwrap_or("")),
        };
        view.take_events().into_iter().map(text).collect()
    }

    fn listed(view: &mut View, names: impl Iterator<Item = u32>, now: Instant) {
        view.restart(SERVICES);
        for name in names {
            view.apply(SERVICES, service(&format!("s{name}"), "10.0.0.1"));
        }
        view.done(SERVICES, now);
    }

    #[test]
    fn a_list_that_fails_half_way_removes_nothing() {
        let (mut view, now) = (View::new([SERVICES, Watched::Nodes]), Instant::now());
        listed(&mut view, 0..3, now);
        assert!(!view.is_synced(), "nodes were not listed");
        assert_eq!(told(&mut view), ["+s0", "+s1", "+s2"]);
        view.restart(SERVICES);
        view.apply(SERVICES, service("s0", "10.0.0.1"));
        view.failed(SERVICES, "connection refused".to_owned());
        assert_eq!(view.problems().len(), 1);
        listed(&mut view, 0..2, now);
        assert_eq!(told(&mut view), ["-s2"], "only the whole list counts, and only what differs is told");
        assert!(view.problems().is_empty());
    }

    #[test]
    fn a_list_without_most_of_what_was_there_is_believed_after_a_minute() {
        let (mut view, now) = (View::new([SERVICES]), Instant::now());
        listed(&mut view, 0..30, now);
        told(&mut view);
        listed(&mut view, 0..3, now);
        assert!(told(&mut view).is_empty());
        assert!(view.problems()[0].reason.contains("27 of 30"), "{:?}", view.problems());
        // What comes back is not gone, what is seen to be deleted is.
        view.apply(SERVICES, service("s7", "10.0.0.1"));
        view.delete(SERVICES, &("shop".into(), "s8".into()));
        assert_eq!(told(&mut view), ["-s8"]);
        assert_eq!(view.next_tick(), Some(now + HOLD));
        view.tick(now + HOLD - Duration::from_millis(1));
        assert!(told(&mut view).is_empty());
        view.tick(now + HOLD);
        assert_eq!(told(&mut view).len(), 25);
        assert!(view.problems().is_empty() && view.next_tick().is_none());
    }

    #[test]
    fn a_kind_that_is_not_served_is_an_empty_list_and_may_come_and_go() {
        let (mut view, now) = (View::new([SERVICES]), Instant::now());
        view.absent(SERVICES, now);
        assert!(view.is_synced());
        listed(&mut view, 0..1, now);
        assert_eq!(told(&mut view), ["+s0"]);
        view.absent(SERVICES, now);
        assert!(told(&mut view).is_empty(), "an API server that starts serves it a moment later");
        view.tick(now + HOLD);
        assert_eq!(told(&mut view), ["-s0"]);
    }

    #[test]
    fn policies_that_are_not_served_at_the_start_are_waited_for() {
        let (mut view, now) = (View::new([POLICIES]), Instant::now());
        view.absent(POLICIES, now);
        view.absent(POLICIES, now + HOLD / 2);
        assert!(!view.is_synced(), "an API server that starts serves them a moment later");
        assert!(view.problems()[0].reason.contains("weft-crds"), "{:?}", view.problems());
        let mut late = View::new([POLICIES]);
        late.absent(POLICIES, now);
        late.restart(POLICIES);
        late.apply(POLICIES, policy(1));
        late.done(POLICIES, now);
        assert!(late.is_synced() && late.next_tick().is_none());
        assert_eq!(view.next_tick(), Some(now + HOLD));
        view.tick(now + HOLD);
        assert!(view.is_synced() && view.problems().is_empty());
    }

    #[test]
    fn a_bad_version_keeps_the_good_one_and_a_policy_that_never_was_good_closes() {
        let mut view = View::new([POLICIES]);
        view.apply(POLICIES, policy(1));
        view.apply(POLICIES, policy(1));
        assert_eq!(told(&mut view), ["!p"]);
        assert!(!view.problems()[0].kept_last_good);
        let mut good = crate::resources::AuthorizationPolicy::default();
        good.metadata.namespace = Some("shop".to_owned());
        good.metadata.name = Some("p".to_owned());
        let good = Object::AuthorizationPolicy(Box::new(good));
        let good = || Seen::Object { key: good.key(), hash: 2, read: Ok(Box::new(good.clone())) };
        view.apply(POLICIES, good());
        assert_eq!(told(&mut view), ["+p"]);
        view.apply(POLICIES, policy(3));
        assert!(told(&mut view).is_empty());
        assert!(view.problems()[0].kept_last_good);
        view.apply(POLICIES, good());
        assert_eq!(told(&mut view), ["+p"]);
        view.delete(POLICIES, &("shop".into(), "p".into()));
        assert_eq!(told(&mut view), ["-p"]);
        assert!(view.problems().is_empty());
    }

    #[test]
    fn nodes_tell_zones_and_namespaces_who_is_injected() {
        let mut view = View::new([Watched::Nodes, Watched::Namespaces]);
        let node = |zone: Option<&str>| Seen::Node { name: "n1".into(), zone: zone.map(Into::into) };
        view.apply(Watched::Nodes, node(Some("a")));
        view.apply(Watched::Nodes, node(Some("a")));
        view.apply(Watched::Nodes, node(Some("b")));
        view.delete(Watched::Nodes, &("".into(), "n1".into()));
        assert_eq!(told(&mut view), ["n1=a", "n1=b", "n1="]);
        view.apply(Watched::Namespaces, Seen::Namespace { name: "shop".into(), injected: true });
        assert_eq!(view.injected().len(), 1);
        view.apply(Watched::Namespaces, Seen::Namespace { name: "shop".into(), injected: false });
        assert!(view.injected().is_empty());
    }
}
