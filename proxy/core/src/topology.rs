//! Which of a service's endpoints a caller may use, by where it runs.
//!
//! Why the caller decides and not the control plane: one list of endpoints is sent to everybody, and changes with the
//! service's pods alone. Told for each node apart, it would be as many lists as there are nodes.
//!
//! Why a preference ends when nobody near is ready: a service asks for near endpoints to save time or money, not to be
//! down while others could answer. [`Reach::Node`] is no preference: an agent of another node is the wrong one.

use std::sync::Arc;

use crate::service::{Endpoint, EndpointHealth, Place, Reach};

impl Reach {
    /// Those of `endpoints` that a caller at `from` uses; the very same list if it is all of them.
    pub fn of(self, endpoints: &Arc<[Arc<Endpoint>]>, from: &Place) -> Arc<[Arc<Endpoint>]> {
        let on_node = |endpoint: &&Arc<Endpoint>| endpoint.node == from.node;
        let in_zone = |endpoint: &&Arc<Endpoint>| endpoint.zone == from.zone;
        let known = |part: &str| !part.is_empty();
        let near = match self {
            Self::Anywhere => None,
            Self::Node => Some(endpoints.iter().filter(on_node).cloned().collect()),
            Self::PreferNode => ready(endpoints, known(&from.node), on_node)
                .or_else(|| ready(endpoints, known(&from.zone), in_zone)),
            Self::PreferZone => ready(endpoints, known(&from.zone), in_zone),
        };
        near.filter(|near: &Arc<[_]>| near.len() < endpoints.len()).unwrap_or_else(|| Arc::clone(endpoints))
    }
}

/// Those that are near, if one of them takes requests.
fn ready(
    endpoints: &[Arc<Endpoint>],
    known: bool,
    near: impl Fn(&&Arc<Endpoint>) -> bool,
) -> Option<Arc<[Arc<Endpoint>]>> {
    let takes = |endpoint: &&Arc<Endpoint>| endpoint.health == EndpointHealth::Healthy && endpoint.weight > 0;
    (known && endpoints.iter().filter(&near).any(|endpoint| takes(&endpoint)))
        .then(|| endpoints.iter().filter(near).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::PodUid;

    fn endpoint(uid: &str, node: &str, zone: &str, health: EndpointHealth) -> Arc<Endpoint> {
        let new = Endpoint::new(PodUid::new(uid).unwrap(), ([10, 0, 0, 1], 80).into());
        Arc::new(Endpoint { node: node.into(), zone: zone.into(), health, ..new })
    }

    fn uids(reach: Reach, endpoints: &Arc<[Arc<Endpoint>]>, node: &str, zone: &str) -> Vec<String> {
        let place = Place { node: node.into(), zone: zone.into() };
        reach.of(endpoints, &place).iter().map(|endpoint| endpoint.uid.to_string()).collect()
    }

    #[test]
    fn local_is_the_callers_node_and_nothing_else() {
        use EndpointHealth::{Draining, Healthy};
        let all: Arc<[_]> = Arc::new([
            endpoint("a", "n1", "z1", Healthy),
            endpoint("b", "n1", "z1", Draining),
            endpoint("c", "n2", "z1", Healthy),
        ]);
        assert_eq!(uids(Reach::Node, &all, "n1", "z1"), ["a", "b"]);
        assert!(uids(Reach::Node, &all, "n3", "z1").is_empty(), "none there: none at all");
        assert!(uids(Reach::Node, &all, "", "").is_empty(), "nobody knows where the caller is");
        assert_eq!(uids(Reach::Anywhere, &all, "n1", "z1").len(), 3);
    }

    #[test]
    fn a_preference_ends_where_nobody_near_is_ready() {
        use EndpointHealth::{Draining, Healthy, Unhealthy};
        let all: Arc<[_]> = Arc::new([
            endpoint("a", "n1", "z1", Draining),
            endpoint("b", "n2", "z1", Healthy),
            endpoint("c", "n3", "z2", Healthy),
            endpoint("d", "n4", "z3", Unhealthy),
        ]);
        assert_eq!(uids(Reach::PreferNode, &all, "n3", "z2"), ["c"]);
        assert_eq!(uids(Reach::PreferNode, &all, "n1", "z1"), ["a", "b"], "the zone is the next best");
        assert_eq!(uids(Reach::PreferZone, &all, "n9", "z1"), ["a", "b"]);
        assert_eq!(uids(Reach::PreferZone, &all, "n4", "z3").len(), 4);
        assert_eq!(uids(Reach::PreferZone, &all, "", "").len(), 4);
        assert!(Arc::ptr_eq(&Reach::PreferZone.of(&all, &Place::default()), &all), "nothing is made anew");
    }
}
