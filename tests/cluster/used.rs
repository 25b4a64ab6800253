//! Permissions: what Weft asked of the API server during all the tests before this one, against what it may.
//!
//! The last module by name, so that there is something to look at: an installation's whole life, routes and their
//! status, a rotation of roots, a controller that died.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use weft_control_plane::k8s::{CLUSTER_GRANTS, Grant, OWN_GRANTS};

use crate::mesh_or_skip;

/// Verb, group, resource with its subresource.
type Right = (String, String, String);

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What each grant allows.
fn granted() -> BTreeMap<Right, Vec<&'static Grant>> {
    let mut rights: BTreeMap<Right, Vec<&Grant>> = BTreeMap::new();
    for grant in CLUSTER_GRANTS.iter().chain(OWN_GRANTS) {
        for resource in grant.resources {
            for verb in grant.verbs {
                let right = ((*verb).to_owned(), grant.group.to_owned(), (*resource).to_owned());
                rights.entry(right).or_default().push(grant);
            }
        }
    }
    rights
}

#[test]
fn what_was_granted_was_used_and_nothing_else_was_asked_for() {
    let Some(cluster) = mesh_or_skip("what_was_granted_was_used") else { return };
    let log = std::fs::read_to_string(cluster.audit_log()).unwrap();
    let granted = granted();
    let (mut used, mut beyond) = (BTreeMap::<Right, u64>::new(), BTreeSet::new());
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let object = &event["objectRef"];
        let user = text(&event["user"]["username"]);
        // What every client of the API may ask: who it is, and what there is.
        if user != "system:serviceaccount:weft:weft-controller" || object["resource"].is_null() {
            continue;
        }
        let mut resource = text(&object["resource"]).to_owned();
        if let Some(sub) = object["subresource"].as_str() {
            resource = format!("{resource}/{sub}");
        }
        let right = (text(&event["verb"]).to_owned(), text(&object["apiGroup"]).to_owned(), resource);
        let name = text(&object["name"]);
        // One that makes an object has no name to be held to.
        let allows =
            |grant: &&&Grant| grant.names.is_empty() || name.is_empty() || grant.names.contains(&name);
        match granted.get(&right).and_then(|grants| grants.iter().find(allows)) {
            Some(_) => *used.entry(right).or_default() += 1,
            None => drop(beyond.insert((right, name.to_owned()))),
        }
    }
    println!("{:<8} {:<30} {:<34} {:>6}", "VERB", "GROUP", "RESOURCE", "USED");
    for (verb, group, resource) in granted.keys() {
        let right = (verb.clone(), group.clone(), resource.clone());
        println!("{verb:<8} {group:<30} {resource:<34} {:>6}", used.get(&right).unwrap_or(&0));
    }
    let unused: Vec<_> = granted.keys().filter(|right| !used.contains_key(*right)).collect();
    println!(
        "figure: rights of the controller: {} granted, {} used, {} asked for beyond them (bound 0)",
        granted.len(),
        used.len(),
        beyond.len()
    );
    println!("granted and not used: {unused:?}");
    assert!(beyond.is_empty(), "{beyond:?}");
    assert!(!used.is_empty());
}
