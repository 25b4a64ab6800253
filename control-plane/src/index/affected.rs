//! Object → the keys whose compile reads it.
//!
//! Why it is written down beside the compilers and not found out by them: what a change touches must be known without
//! compiling ten thousand keys to see which differ. A key too many costs a compile; one too few is a sidecar that is
//! never told. So what is in doubt is in, but for what there are thousands of.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Index, Key, Name, in_namespace, name_of,
    objects::{PodEntry, is_subset},
    parent_service, service_name,
};
use crate::resources::{Kind, ObjectKey, gateway::ParentRef, policy::TargetRef};

impl Index {
    /// What "applied N of M" of an object counts over. Endpoints are left out: they change without their service's
    /// doing, and a collection has no one version. And so is, for what there are thousands of, what it does to others.
    pub fn told_by(&self, key: &ObjectKey) -> BTreeSet<Key> {
        let name = name_of(key);
        match key.kind {
            Kind::Service => {
                let ports = self.services.get(&name).into_iter().flat_map(|service| &service.ports);
                ports.map(|port| Key::Service(service_name(&name, port.port))).collect()
            }
            Kind::Pod => self.pods.get(&name).map(|pod| Key::Workload(pod.uid.clone())).into_iter().collect(),
            Kind::EndpointSlice => BTreeSet::new(),
            Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TrafficPolicy
            | Kind::AuthorizationPolicy
            | Kind::MeshConfig => {
                let mut keys = self.affected_by(key);
                keys.retain(|key| match key {
                    Key::Service(_) | Key::Route(_) | Key::Workload(_) => true,
                    Key::Endpoints(_) | Key::Address(_) => false,
                });
                keys
            }
        }
    }

    /// Every key whose compile reads the object.
    pub fn affected_by(&self, key: &ObjectKey) -> BTreeSet<Key> {
        let name = name_of(key);
        let mut keys = BTreeSet::new();
        match key.kind {
            Kind::Service => {
                self.affected_by_service(&name, true, &mut keys);
                // Who may call them is said about the service, be it there or not.
                for (policy, spec) in self.policies_about(&name) {
                    let pods = in_namespace(&self.pods, &name.0)
                        .filter(|(pod_name, pod)| self.selects(policy, spec, pod_name, pod).is_some());
                    keys.extend(pods.map(|(_, pod)| Key::Workload(pod.uid.clone())));
                }
            }
            Kind::EndpointSlice => {
                let service = self.slices.get(&name).map(|slice| &slice.service);
                let service = service.and_then(|name| self.services.get_key_value(name));
                keys.extend(service.into_iter().flat_map(|(name, service)| {
                    service.ports.iter().map(|port| Key::Endpoints(service_name(name, port.port)))
                }));
            }
            Kind::Pod => self.affected_by_pod(&name, &mut keys),
            Kind::HttpRoute => {
                if let Some(route) = self.http_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, &mut keys);
                }
            }
            Kind::GrpcRoute => {
                if let Some(route) = self.grpc_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, &mut keys);
                    // It says what the pods' ports speak.
                    let parents = route.spec.parent_refs.iter().filter_map(|p| parent_service(&name, p));
                    for parent in parents.collect::<BTreeSet<_>>() {
                        self.affected_by_service(&parent, false, &mut keys);
                    }
                }
            }
            Kind::TrafficPolicy => {
                if let Some(policy) = self.traffic.get(&name) {
                    for target in &policy.spec.target_refs {
                        self.affected_by_target(&name.0, target, &mut keys);
                        // What its pods' own sidecars count; of all else they hear nothing.
                        if policy.spec.rate_limits.is_some() && target.kind == "Service" {
                            self.pods_of_target(&name.0, target, &mut keys);
                        }
                    }
                }
            }
            Kind::AuthorizationPolicy => {
                let selected = |pod: &&PodEntry, pod_name: &Name| {
                    let by_policy = self
                        .authz
                        .get(&name)
                        .is_some_and(|p| self.selects(&name, &p.spec, pod_name, pod).is_some());
                    by_policy
                        || self.unreadable.get(&name).is_some_and(|labels| is_subset(labels, &pod.labels))
                };
                let pods =
                    in_namespace(&self.pods, &name.0).filter(|(pod_name, pod)| selected(pod, pod_name));
                keys.extend(pods.map(|(_, pod)| Key::Workload(pod.uid.clone())));
            }
            Kind::MeshConfig => {
                if self.mesh.contains_key(&name) {
                    keys.extend(self.by_uid.keys().cloned().map(Key::Workload));
                }
            }
        }
        keys
    }

    fn affected_by_service(&self, name: &Name, policy_too: bool, keys: &mut BTreeSet<Key>) {
        let Some(service) = self.services.get(name) else { return };
        if policy_too {
            // Who else claims its addresses may lose or get them.
            let rivals: BTreeSet<_> =
                service.vips().iter().filter_map(|ip| self.by_vip.get(ip)).flatten().collect();
            for (rival, service) in rivals.into_iter().filter_map(|rival| self.services.get_key_value(rival))
            {
                keys.extend(service.ports.iter().map(|port| Key::Service(service_name(rival, port.port))));
            }
        }
        for port in &service.ports {
            let port = service_name(name, port.port);
            if policy_too {
                keys.insert(Key::Service(port.clone()));
                keys.insert(Key::Route(port.clone()));
            }
            if self.has_opaque_pods(&name.0) {
                // With its pods changes what it is said to speak.
                keys.insert(Key::Service(port.clone()));
            }
            keys.insert(Key::Endpoints(port));
        }
        // What a port speaks is declared by the services that send to it.
        for (_, pod) in self.pods_of(name, service) {
            keys.insert(Key::Workload(pod.uid.clone()));
            keys.extend(pod.ips.iter().copied().map(Key::Address));
        }
    }

    pub(super) fn affected_by_pod(&self, name: &Name, keys: &mut BTreeSet<Key>) {
        let Some(pod) = self.pods.get(name) else { return };
        keys.insert(Key::Workload(pod.uid.clone()));
        keys.extend(pod.ips.iter().copied().map(Key::Address));
        // A service that claims the pod's address gets it, or loses it.
        for claimant in pod.ips.iter().filter_map(|ip| self.by_vip.get(ip)).flatten() {
            let ports = self.services.get(claimant).into_iter().flat_map(|service| &service.ports);
            keys.extend(ports.map(|port| Key::Service(service_name(claimant, port.port))));
        }
        // A slice that somebody wrote may name pods anywhere.
        let by_hand = self.selectorless.iter().filter(|service| service.0 != name.0);
        let by_hand = by_hand.filter_map(|service| self.services.get_key_value(service));
        for (service_name_, service) in in_namespace(&self.services, &name.0).chain(by_hand) {
            if self.is_pod_of(service_name_, service, name, pod) {
                if !pod.opaque.is_empty() {
                    self.affected_by_service(service_name_, true, keys);
                }
                keys.extend(
                    service.ports.iter().map(|p| Key::Endpoints(service_name(service_name_, p.port))),
                );
            }
        }
    }

    fn affected_by_parents(&self, route: &Name, parents: &[ParentRef], keys: &mut BTreeSet<Key>) {
        for parent in parents {
            let Some(service_key) = parent_service(route, parent) else { continue };
            let Some(service) = self.services.get(&service_key) else { continue };
            for port in service.ports.iter().filter(|p| parent.port.is_none_or(|only| only == p.port)) {
                keys.insert(Key::Service(service_name(&service_key, port.port)));
                keys.insert(Key::Route(service_name(&service_key, port.port)));
            }
        }
    }

    fn pods_of_target(&self, namespace: &Arc<str>, target: &TargetRef, keys: &mut BTreeSet<Key>) {
        let name = (namespace.clone(), target.name.as_str().into());
        let Some(service) = self.services.get(&name) else { return };
        keys.extend(self.pods_of(&name, service).map(|(_, pod)| Key::Workload(pod.uid.clone())));
    }

    fn affected_by_target(&self, namespace: &Arc<str>, target: &TargetRef, keys: &mut BTreeSet<Key>) {
        let name = (namespace.clone(), target.name.as_str().into());
        match target.kind.as_str() {
            "Service" => {
                let Some(service) = self.services.get(&name) else { return };
                for port in &service.ports {
                    keys.insert(Key::Service(service_name(&name, port.port)));
                    keys.insert(Key::Route(service_name(&name, port.port)));
                }
            }
            "HTTPRoute" => {
                if let Some(route) = self.http_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, keys);
                }
            }
            "GRPCRoute" => {
                if let Some(route) = self.grpc_routes.get(&name) {
                    self.affected_by_parents(&name, &route.spec.parent_refs, keys);
                }
            }
            _ => {}
        }
    }

    /// What differs when a service has other slices: its endpoints, and the pods that came or went. The others are
    /// told nothing else than before, and are thousands.
    pub(super) fn affected_by_slices(&self, name: &Name, before: &BTreeSet<Name>, keys: &mut BTreeSet<Key>) {
        let Some(service) = self.services.get(name) else { return };
        keys.extend(service.ports.iter().map(|port| Key::Endpoints(service_name(name, port.port))));
        if self.has_opaque_pods(&name.0) {
            // With its pods changes what it is said to speak.
            keys.extend(service.ports.iter().map(|port| Key::Service(service_name(name, port.port))));
        }
        let now = self.pod_names_of(name);
        for pod in before.symmetric_difference(&now).filter_map(|pod| self.pods.get(pod)) {
            keys.insert(Key::Workload(pod.uid.clone()));
            keys.extend(pod.ips.iter().copied().map(Key::Address));
        }
    }
}
