//! A service port → its endpoints.
//!
//! Why pods stand in where there are no slices: a user with a folder should write a Service and Pods and
//! be done. In a cluster the slices are always there, and then they alone count.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use weft_core::{
    identity::PodUid,
    policy::{Endpoint, EndpointHealth, Reach, ServiceName, Tunnel},
};

use super::{
    Index,
    objects::{Name, PodEntry, ServiceEntry, ServiceKind, ServicePort, SliceEndpoint, hash},
};

impl Index {
    /// The endpoints of one service port, by pod uid; `None` if there is no such port.
    pub fn endpoints(&self, service: &ServiceName) -> Option<BTreeMap<PodUid, Endpoint>> {
        let name: Name = (service.namespace.clone(), service.name.clone());
        let entry = self.services.get(&name).filter(|entry| entry.kind != ServiceKind::External)?;
        let port = entry.port(service.port)?;
        let mut found: BTreeMap<PodUid, Endpoint> = BTreeMap::new();
        if self.slices_of(&name).next().is_some() {
            self.add_slices(&name, port, &mut found);
        } else {
            self.add_pods(&name, entry, port, &mut found);
        }
        if matches!(entry.reach, Reach::Anywhere | Reach::PreferZone) {
            // A name that nobody asks for is not sent ten thousand times.
            found.values_mut().for_each(|endpoint| endpoint.node = "".into());
        }
        Some(found)
    }

    fn add_slices(&self, service: &Name, port: &ServicePort, found: &mut BTreeMap<PodUid, Endpoint>) {
        for slice in self.slices_of(service) {
            let named = slice.ports.iter().find(|(name, _)| *name == port.name);
            // A service's only port may be unnamed on one side.
            let only = (slice.ports.len() == 1).then(|| &slice.ports[0]);
            let Some((_, target)) = named.or(only) else { continue };
            for endpoint in &slice.endpoints {
                for address in &endpoint.addresses {
                    let Some(endpoint) = self.of_slice(service, endpoint, *address, *target) else {
                        continue;
                    };
                    // One entry a pod: its first address family, as the pod itself lists them.
                    let keep_old =
                        found.get(&endpoint.uid).is_some_and(|old: &Endpoint| self.prefers(old, &endpoint));
                    if !keep_old {
                        found.insert(endpoint.uid.clone(), endpoint);
                    }
                }
            }
        }
    }

    /// `None` for a pod that is not there: its slice is a moment late. Without the pod nobody knows who
    /// answers at that address, and callers would speak plaintext to whoever has it next.
    fn of_slice(
        &self,
        service: &Name,
        from: &SliceEndpoint,
        address: IpAddr,
        target: u16,
    ) -> Option<Endpoint> {
        let by_ref = match (&from.pod_uid, &from.pod_name) {
            (Some(uid), _) => self.pod_by_uid(uid),
            (None, Some(name)) => self.pods.get_key_value(name),
            (None, None) => self.pod_by_ip(address),
        };
        if let Some((_, pod)) = by_ref {
            // Whoever says that a pod is going away is right; whether it still answers the slice says.
            let health = match (from.health, pod.health) {
                (EndpointHealth::Unhealthy, _) => EndpointHealth::Unhealthy,
                (EndpointHealth::Draining, _) | (_, EndpointHealth::Draining) => EndpointHealth::Draining,
                (health, _) => health,
            };
            let zone = from.zone.clone().unwrap_or_else(|| pod.zone.clone());
            return Some(Endpoint { health, zone, ..pod.endpoint(SocketAddr::new(address, target)) });
        }
        if from.pod_uid.is_some() || from.pod_name.is_some() {
            return None;
        }
        Some(Endpoint {
            uid: anonymous(service, address, target),
            address: SocketAddr::new(address, target),
            weight: 1,
            health: from.health,
            identity: None,
            tunnel: Tunnel::None,
            zone: from.zone.clone().unwrap_or_default(),
            node: from.node.clone().unwrap_or_default(),
            labels: BTreeMap::new(),
        })
    }

    fn prefers(&self, old: &Endpoint, new: &Endpoint) -> bool {
        let first = self.pod_by_uid(&old.uid).and_then(|(_, pod)| pod.ips.first().copied());
        match first {
            Some(first) => first != new.address.ip(),
            None => old.address <= new.address,
        }
    }

    fn add_pods(
        &self,
        name: &Name,
        service: &ServiceEntry,
        port: &ServicePort,
        found: &mut BTreeMap<PodUid, Endpoint>,
    ) {
        for (_, pod) in self.pods_of(name, service) {
            let (Some(target), Some(ip)) = (port.target_on(pod), pod.ips.first()) else { continue };
            let mut endpoint = pod.endpoint(SocketAddr::new(*ip, target));
            if service.publish_not_ready && endpoint.health == EndpointHealth::Unhealthy {
                endpoint.health = EndpointHealth::Healthy;
            }
            found.insert(pod.uid.clone(), endpoint);
        }
    }
}

impl PodEntry {
    /// The pod as the endpoint at `address`.
    pub(crate) fn endpoint(&self, address: SocketAddr) -> Endpoint {
        let skipped = self.skipped.iter().any(|range| range.contains(&address.port()));
        let meshed = self.injected && !skipped && self.identity.is_some();
        let labels = TELEMETRY_LABELS.iter().filter_map(|key| {
            let value = self.labels.get(*key)?;
            Some((Arc::from(*key), Arc::from(value.as_str())))
        });
        Endpoint {
            uid: self.uid.clone(),
            address,
            weight: self.weight,
            health: self.health,
            identity: if meshed { self.identity.clone() } else { None },
            tunnel: if meshed { Tunnel::Weft } else { Tunnel::None },
            zone: self.zone.clone(),
            node: self.node.clone().unwrap_or_default(),
            labels: labels.collect(),
        }
    }
}

/// An endpoint that no pod stands behind still needs a stable name.
fn anonymous(service: &Name, address: IpAddr, port: u16) -> PodUid {
    let text = format!("{}/{}/{address}:{port}", service.0, service.1);
    let uid = format!("x-{:016x}", hash(text.as_bytes()));
    // Letters and digits only: it cannot be refused.
    PodUid::new(&uid).unwrap_or_else(|_| unreachable!("a hexadecimal number is a uid"))
}

/// Label keys that endpoints carry into telemetry.
const TELEMETRY_LABELS: [&str; 4] = ["app", "app.kubernetes.io/name", "version", "app.kubernetes.io/version"];
