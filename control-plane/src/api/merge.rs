//! One answer from several controllers. Pure: the parts have been fetched.
//!
//! Why parts can be added: a sidecar has its streams at one controller at a time, so what two of them count is not the
//! same thing twice. A sidecar that has just moved is listed by both: the one that has it connected is right.
//!
//! Why counts of another version are not added: a controller that has not heard of a change says that its sidecars are
//! up to date, with what was there before. It is late itself then, and is named among those that are.

use std::collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry};

use super::types::{
    Certs, Endpoints, Laggard, ObjectStatus, ReplicaStatus, SidecarStatus, Status, WorkloadCertificate,
};
use crate::telemetry::view::EdgeRow;

/// A replica's part; `None`: it did not answer.
pub type Part<T> = (String, Option<T>);

/// The status of the whole mesh.
pub fn status(own: Status, others: Vec<Part<Status>>) -> Status {
    let mut whole = own;
    let mut sidecars: BTreeMap<String, SidecarStatus> = BTreeMap::new();
    let mut add = |found: Vec<SidecarStatus>| {
        for sidecar in found {
            match sidecars.entry(sidecar.report.uid.clone()) {
                Entry::Vacant(place) => {
                    place.insert(sidecar);
                }
                Entry::Occupied(mut known) => {
                    // Who has never heard of it cannot say when that was.
                    let heard = |s: &SidecarStatus| !s.report.version.is_empty();
                    let rank =
                        |s: &SidecarStatus| (s.connected, heard(s), std::cmp::Reverse(s.report.last_seen_s));
                    if rank(&sidecar) > rank(known.get()) {
                        known.insert(sidecar);
                    }
                }
            }
        }
    };
    add(std::mem::take(&mut whole.sidecars));
    let key = |object: &ObjectStatus| (object.kind.clone(), object.namespace.clone(), object.name.clone());
    let places: HashMap<_, _> =
        whole.objects.iter().enumerate().map(|(place, object)| (key(object), place)).collect();
    for (name, part) in others {
        whole.replicas.push(ReplicaStatus { name: name.clone(), answered: part.is_some() });
        let Some(part) = part else { continue };
        whole.synced &= part.synced;
        for problem in part.problems {
            if !whole.problems.contains(&problem) {
                whole.problems.push(problem);
            }
        }
        let serves = part.sidecars.iter().any(|sidecar| sidecar.connected);
        add(part.sidecars);
        let mut heard = vec![false; whole.objects.len()];
        for object in part.objects {
            // What only the other has heard of is here in a moment.
            let Some(place) = places.get(&key(&object)) else { continue };
            let known = &mut whole.objects[*place];
            heard[*place] = true;
            if !is_same(&known.version, &object.version) {
                is_late(known, &name, object.of);
                continue;
            }
            known.applied += object.applied;
            known.of += object.of;
            known.applied_after_ms = match (known.of - object.of, object.of) {
                (_, 0) => known.applied_after_ms,
                (0, _) => object.applied_after_ms,
                _ => known.applied_after_ms.zip(object.applied_after_ms).map(|(a, b)| a.max(b)),
            };
            known.laggards.extend(object.laggards);
        }
        let unheard = whole.objects.iter_mut().zip(heard).filter(|(_, heard)| !heard);
        for (object, _) in unheard.filter(|_| serves) {
            is_late(object, &name, 0);
        }
    }
    whole.sidecars = sidecars.into_values().collect();
    whole
}

/// Whether two versions are of one text. Where the API server counts, its count alone says so: controllers of two
/// releases may hash one object in two ways.
fn is_same(one: &str, other: &str) -> bool {
    let counted = |version: &str| version.rsplit_once('.').map(|(counted, _)| counted.to_owned());
    one == other || counted(one).is_some_and(|one| Some(one) == counted(other))
}

/// A controller serves another version of an object to its sidecars, of which it counts `of`.
fn is_late(object: &mut ObjectStatus, controller: &str, of: u32) {
    object.of += of.max(1);
    object.applied_after_ms = None;
    object.laggards.push(Laggard {
        pod: format!("the controller {controller}"),
        reason: "it has not heard of this version yet".to_owned(),
        ..Laggard::default()
    });
}

/// Endpoints as all sidecars see them.
pub fn endpoints(own: Endpoints, others: Vec<Part<Endpoints>>) -> Endpoints {
    let mut whole = own;
    for part in others.into_iter().filter_map(|(_, part)| part) {
        for row in part.rows {
            let same = |known: &crate::telemetry::view::EndpointRow| {
                (&known.seen_by, &known.backend, &known.uid) == (&row.seen_by, &row.backend, &row.uid)
            };
            if !whole.rows.iter().any(same) {
                whole.rows.push(row);
            }
        }
        whole.pods.extend(part.pods);
    }
    whole
        .rows
        .sort_by(|a, b| (&a.backend, &a.address, &a.seen_by).cmp(&(&b.backend, &b.address, &b.seen_by)));
    whole
}

/// Who calls whom, wherever it was told.
pub fn edges(own: Vec<EdgeRow>, others: Vec<Part<Vec<EdgeRow>>>) -> Vec<EdgeRow> {
    let mut whole: BTreeMap<_, EdgeRow> = BTreeMap::new();
    for row in own.into_iter().chain(others.into_iter().filter_map(|(_, part)| part).flatten()) {
        let key = (row.callee.clone(), row.caller.clone(), row.method.clone(), row.service.clone(), row.mtls);
        match whole.entry(key) {
            Entry::Vacant(place) => {
                place.insert(row);
            }
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.count = known.count.saturating_add(row.count);
                known.errors = known.errors.saturating_add(row.errors);
                known.first_seen_ms = known.first_seen_ms.min(row.first_seen_ms);
                known.last_seen_ms = known.last_seen_ms.max(row.last_seen_ms);
            }
        }
    }
    whole.into_values().collect()
}

/// The newest certificate of every workload, whoever signed it.
pub fn certs(own: Certs, others: Vec<Part<Certs>>) -> Certs {
    let others = others.into_iter().filter_map(|(_, part)| part).flat_map(|part| part.workloads);
    let signing: BTreeSet<_> =
        own.anchors.iter().filter(|anchor| anchor.signing).map(|a| &a.serial).collect();
    // A renewal may come within the second of the one before: then the root that signs now is the newer one.
    let age = |of: &WorkloadCertificate| (of.not_before, signing.contains(&of.anchor));
    let mut whole: BTreeMap<String, WorkloadCertificate> = BTreeMap::new();
    for workload in own.workloads.into_iter().chain(others) {
        match whole.entry(workload.uid.clone()) {
            Entry::Vacant(place) => {
                place.insert(workload);
            }
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                let connected = known.connected || workload.connected;
                // For a moment a sidecar may be connected to two: it is as far as either of them knows for sure.
                let bundle = match (known.connected, workload.connected) {
                    (true, true) => known.bundle.min(workload.bundle),
                    (false, true) => workload.bundle,
                    (true | false, false) => known.bundle,
                };
                if age(known) < age(&workload) {
                    *known = workload;
                }
                (known.connected, known.bundle) = (connected, bundle);
            }
        }
    }
    Certs { workloads: whole.into_values().collect(), ..own }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::types::Anchor, telemetry::view::SidecarRow};

    fn object(applied: u32, of: u32, after: Option<u64>) -> ObjectStatus {
        ObjectStatus { name: "r".to_owned(), applied, of, applied_after_ms: after, ..ObjectStatus::default() }
    }

    fn sidecar(uid: &str, connected: bool, last_seen_s: u64) -> SidecarStatus {
        let version = "0.1.0".to_owned();
        let report = SidecarRow { uid: uid.to_owned(), version, last_seen_s, ..SidecarRow::default() };
        SidecarStatus { connected, report, ..SidecarStatus::default() }
    }

    #[test]
    fn what_each_counts_is_added_and_who_is_silent_is_named() {
        let mut unheard = sidecar("d", false, 0);
        unheard.report.version.clear();
        let own = Status {
            synced: true,
            objects: vec![object(2, 2, Some(10))],
            sidecars: vec![sidecar("a", false, 100), sidecar("b", true, 1), unheard],
            ..Status::default()
        };
        let other = Status {
            synced: true,
            objects: vec![object(1, 3, None)],
            sidecars: vec![sidecar("a", true, 0), sidecar("c", true, 0), sidecar("d", false, 70)],
            ..Status::default()
        };
        let whole = status(own, vec![("two".to_owned(), Some(other)), ("three".to_owned(), None)]);
        assert_eq!((whole.objects[0].applied, whole.objects[0].of), (3, 5));
        assert_eq!(whole.objects[0].applied_after_ms, None, "not live everywhere");
        let names: Vec<_> = whole.sidecars.iter().map(|s| (&*s.report.uid, s.connected)).collect();
        assert_eq!(names, [("a", true), ("b", true), ("c", true), ("d", false)], "it moved");
        assert_eq!(whole.sidecars[3].report.last_seen_s, 70, "whoever heard it knows when");
        let answered: Vec<_> = whole.replicas.iter().map(|r| (&*r.name, r.answered)).collect();
        assert_eq!(answered, [("two", true), ("three", false)]);
    }

    #[test]
    fn a_controller_that_has_another_version_is_late_with_all_its_sidecars() {
        let of = |version: &str| Status {
            objects: vec![ObjectStatus { version: version.to_owned(), ..object(2, 2, Some(10)) }],
            sidecars: vec![sidecar(version, true, 0)],
            ..Status::default()
        };
        let merged = |own: &str, other: Status| {
            let object = status(of(own), vec![("two".to_owned(), Some(other))]).objects.remove(0);
            let late: Vec<_> = object.laggards.iter().map(|laggard| laggard.pod.clone()).collect();
            (object.applied, object.of, object.applied_after_ms, late)
        };
        let late = || vec!["the controller two".to_owned()];
        assert_eq!(merged("new", of("old")), (2, 4, None, late()));
        assert_eq!(merged("u.2.aa", of("u.1.aa")), (2, 4, None, late()));
        assert_eq!(merged("u.2.aa", of("u.2.bb")), (4, 4, Some(10), vec![]), "releases may hash differently");
        // It has sidecars and does not know the object; without sidecars it tells nobody anything.
        let unheard = Status { objects: vec![], ..of("x") };
        assert_eq!(merged("new", unheard.clone()), (2, 3, None, late()));
        assert_eq!(merged("new", Status { sidecars: vec![], ..unheard }), (2, 2, Some(10), vec![]));
    }

    #[test]
    fn the_slowest_replica_says_how_long_it_took() {
        let own = |after| Status { objects: vec![object(1, 1, after)], ..Status::default() };
        let both = |a, b| status(own(a), vec![(String::new(), Some(own(b)))]).objects[0].applied_after_ms;
        assert_eq!(both(Some(5), Some(9)), Some(9));
        assert_eq!(both(Some(5), None), None);
        let nobody = Status { objects: vec![object(0, 0, None)], ..Status::default() };
        let whole = status(nobody, vec![(String::new(), Some(own(Some(7))))]);
        assert_eq!(whole.objects[0].applied_after_ms, Some(7));
    }

    #[test]
    fn edges_add_up_and_the_newest_certificate_counts() {
        let edge = |count, at| EdgeRow { count, first_seen_ms: at, last_seen_ms: at, ..EdgeRow::default() };
        let whole = edges(vec![edge(1, 5)], vec![(String::new(), Some(vec![edge(2, 3)]))]);
        assert_eq!((whole[0].count, whole[0].first_seen_ms, whole[0].last_seen_ms), (3, 3, 5));
        let certificate = |not_before| WorkloadCertificate { not_before, ..WorkloadCertificate::default() };
        let of = |not_before| Certs { workloads: vec![certificate(not_before)], ..Certs::default() };
        let whole = certs(of(1), vec![(String::new(), Some(of(2))), (String::new(), None)]);
        assert_eq!(whole.workloads, [certificate(2)]);
    }

    #[test]
    fn of_two_certificates_of_one_second_that_of_the_signing_root_is_the_newer() {
        let of = |anchor: &str, connected| WorkloadCertificate {
            anchor: anchor.to_owned(),
            connected,
            ..WorkloadCertificate::default()
        };
        let anchor =
            |serial: &str, signing| Anchor { serial: serial.to_owned(), signing, ..Anchor::default() };
        let own = |workload| Certs {
            anchors: vec![anchor("a", false), anchor("b", true)],
            workloads: vec![workload],
            ..Certs::default()
        };
        for (first, second) in [("a", "b"), ("b", "a")] {
            let whole = certs(own(of(first, true)), vec![(String::new(), Some(own(of(second, false))))]);
            assert_eq!(whole.workloads, [of("b", true)], "and who is connected anywhere is connected");
        }
    }

    #[test]
    fn a_sidecar_trusts_what_those_say_that_it_is_connected_to() {
        let of = |connected, bundle| Certs {
            workloads: vec![WorkloadCertificate { connected, bundle, ..WorkloadCertificate::default() }],
            ..Certs::default()
        };
        for (one, other, whole) in
            [((true, 3), (false, 0), 3), ((false, 0), (true, 3), 3), ((true, 2), (true, 3), 2)]
        {
            let merged = certs(of(one.0, one.1), vec![(String::new(), Some(of(other.0, other.1)))]);
            assert_eq!(merged.workloads[0].bundle, whole, "{one:?} {other:?}");
        }
    }
}
