//! What callers of a service are told: the service itself and its route.
//!
//! Why a rule that cannot be enforced is still there: it must never become a weaker rule. One that was dropped leaves
//! what it would have handled to the others; where none is left, what stands for the route answers 500 with the reason.
//!
//! Order among rules is not decided here: precedence is one derived `Ord` in `weft_core::route`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use weft_core::policy::{
    DETECT_TIMEOUT, Endpoint, EndpointHealth, ObjectRef, Protocol, Rule, Service, ServiceName,
};

use super::{
    Index, RouteEntry, in_namespace,
    objects::{Meta, Name, PodEntry, ServiceEntry, ServiceKind, ServicePort},
    parent_service,
    rules::{RuleContext, object_ref, rule_name},
    traffic::{accepted, health, limits, load_balancing, merge, retry, timeouts},
};
use crate::resources::{
    Kind,
    gateway::{GrpcRouteSpec, HttpRouteSpec, ParentRef},
    policy::{TargetRef, TrafficPolicySpec},
};

/// The compiled route of one service port.
#[derive(Clone, Debug)]
pub struct CompiledRoute {
    /// In no particular order.
    pub rules: Vec<Rule>,
    /// Objects whose rules these are.
    pub objects: Vec<ObjectRef>,
    /// The first rule that was dropped, without its conditions: what it answers is 500.
    dropped: Option<Rule>,
}

impl CompiledRoute {
    fn take(&mut self, rule: Result<Rule, String>, context: &RuleContext<'_>) {
        match rule {
            Ok(rule) => self.rules.push(rule),
            Err(reason) if self.dropped.is_none() => self.dropped = Some(context.dropped(reason)),
            Err(_) => {}
        }
    }

    /// Leaves of it one rule, which answers everything with the reason.
    pub fn refuse(&mut self, service: &ServiceName, reason: &str) {
        let own = || object_ref(Kind::Service, &(service.namespace.clone(), service.name.clone()));
        self.rules = vec![refusal(service, &self.objects.first().cloned().unwrap_or_else(own), reason)];
    }
}

/// What stands for a service that cannot be told to its callers, and its route: everything is refused with
/// the reason. No service has the route's name: theirs have no dot.
pub fn refusing(service: &Service, reason: &str) -> (Service, ServiceName, Vec<Rule>) {
    let name = &service.name;
    let route = ServiceName { name: format!("{}.refused", name.name).into(), ..name.clone() };
    let object = object_ref(Kind::Service, &(name.namespace.clone(), name.name.clone()));
    let rules = vec![refusal(name, &object, reason)];
    let refusing = Service {
        protocol: service.protocol,
        route: Some(format!("route/{route}").into()),
        mtls_required: true,
        ..Service::new(name.clone())
    };
    (refusing, route, rules)
}

fn refusal(service: &ServiceName, object: &ObjectRef, reason: &str) -> Rule {
    let label = "refused".into();
    RuleContext { service, object, label, created: 0, levels: Vec::new() }.dropped(reason.to_owned())
}

/// A pod as callers of its own address see it. Any port may be dialled, so the port comes last.
#[derive(Clone, Debug, PartialEq)]
pub struct PodAddress {
    ip: IpAddr,
    name: Name,
    pod: PodEntry,
    protocols: BTreeMap<u16, Protocol>,
}

impl PodAddress {
    /// One port, as a service of one endpoint: no route, no balancing. Whoever dials a pod's own address means that
    /// pod, ready or not: members of a StatefulSet find each other so before any of them is ready.
    pub fn service(&self, port: u16) -> Service {
        let (namespace, name) = self.name.clone();
        let endpoint = self.pod.endpoint(SocketAddr::new(self.ip, port));
        Service {
            vips: vec![self.ip],
            protocol: match self.pod.is_opaque(port) {
                true => Protocol::Opaque,
                false => self.protocols.get(&port).copied().unwrap_or_default(),
            },
            pod: Some(Arc::new(Endpoint { health: EndpointHealth::Healthy, node: "".into(), ..endpoint })),
            ..Service::new(ServiceName { namespace, name, port })
        }
    }

    /// What versions of it begin with.
    pub fn meta(&self) -> &Meta {
        &self.pod.meta
    }
}

impl Index {
    /// One service port as callers see it; `None` if there is none. With the metadata for its version.
    pub fn service(&self, name: &ServiceName) -> Option<(Service, Meta)> {
        self.service_from(name, &name.namespace)
    }

    /// The same as callers of one namespace see it: those of [`Index::consumers`] have a route of their own.
    pub fn service_from(&self, name: &ServiceName, from: &Arc<str>) -> Option<(Service, Meta)> {
        let (key, entry, port) = self.service_port(name)?;
        let policy = self.service_policy(&key, port);
        let vips = entry.vips().iter().copied().filter(|ip| self.has_vip(&key, *ip, name.port)).collect();
        let has_route = self.attached_http(&key, entry, port, from).next().is_some()
            || self.attached_grpc(&key, entry, port, from).next().is_some();
        let service = Service {
            vips,
            protocol: self.protocol_from(&key, entry, port, from),
            detect_timeout: policy.detect_timeout.map_or(DETECT_TIMEOUT, |d| d.0),
            route: has_route.then(|| format!("route/{}", route_name(name, from)).into()),
            endpoints: Some(format!("ep/{name}/*").into()),
            reach: entry.reach,
            pod: None,
            load_balancing: load_balancing(policy.load_balancing.as_ref(), entry.by_client),
            health: health(policy.outlier_ejection.as_ref()),
            limits: limits(policy.limits.as_ref()),
            accepted_identities: accepted(&policy),
            mtls_required: policy.mtls_required.unwrap_or(false),
            timeouts: timeouts(&policy.timeouts),
            retry: retry(policy.retries.as_ref()),
            name: name.clone(),
        };
        Some((service, entry.meta.clone()))
    }

    /// Whatever listens at a pod's own address; `None` if no pod has it.
    pub fn pod_address(&self, ip: IpAddr) -> Option<PodAddress> {
        let (name, pod) = self.pod_by_ip(ip)?;
        let mut ports: BTreeSet<u16> = pod.ports.iter().map(|(_, port)| *port).collect();
        ports.extend(self.service_targets(name, pod));
        let protocols = ports.into_iter().map(|port| (port, self.port_protocol(name, pod, port))).collect();
        Some(PodAddress { ip, name: name.clone(), pod: pod.clone(), protocols })
    }

    /// Namespaces with routes of their own to a service port (GEP-1426, consumer routes): for callers there they
    /// stand in place of those of the service's namespace. All other namespaces see one and the same policy.
    pub fn consumers(&self, name: &ServiceName) -> BTreeSet<Arc<str>> {
        let Some((key, entry, port)) = self.service_port(name) else { return BTreeSet::new() };
        let routes = self.consumer_routes.get(&key).into_iter().flatten();
        let mut namespaces: BTreeSet<_> = routes.map(|route| route.namespace.clone()).collect();
        namespaces.retain(|from| {
            self.attached_http(&key, entry, port, from).next().is_some()
                || self.attached_grpc(&key, entry, port, from).next().is_some()
        });
        namespaces
    }

    /// The rules of one service port; `None` without routes: everything goes to the service itself.
    pub fn route(&self, name: &ServiceName) -> Option<(CompiledRoute, Meta)> {
        self.route_from(name, &name.namespace)
    }

    /// The same by the routes of one namespace.
    pub fn route_from(&self, name: &ServiceName, from: &Arc<str>) -> Option<(CompiledRoute, Meta)> {
        let (key, entry, port) = self.service_port(name)?;
        let mut compiled = CompiledRoute { rules: Vec::new(), objects: Vec::new(), dropped: None };
        // GRPCRoute wins over HTTPRoute on one port; the other is told so (`Conflicted`).
        let grpc: Vec<_> = self.attached_grpc(&key, entry, port, from).collect();
        if grpc.is_empty() {
            for (route_name, route) in self.attached_http(&key, entry, port, from) {
                let object = object_ref(Kind::HttpRoute, route_name);
                for (position, rule) in route.spec.rules.iter().enumerate() {
                    let label = rule_name(rule.name.as_deref(), position);
                    let levels = self.rule_levels(&key, port, "HTTPRoute", route_name, &label, position);
                    let context = RuleContext {
                        service: name,
                        object: &object,
                        label,
                        created: route.meta.created,
                        levels,
                    };
                    compiled.take(context.http(rule), &context);
                }
                compiled.objects.push(object);
            }
        }
        for (route_name, route) in &grpc {
            let object = object_ref(Kind::GrpcRoute, route_name);
            for (position, rule) in route.spec.rules.iter().enumerate() {
                let label = rule_name(rule.name.as_deref(), position);
                let levels = self.rule_levels(&key, port, "GRPCRoute", route_name, &label, position);
                let context = RuleContext {
                    service: name,
                    object: &object,
                    label,
                    created: route.meta.created,
                    levels,
                };
                compiled.take(context.grpc(rule), &context);
            }
            compiled.objects.push(object);
        }
        // Rules that were all dropped are not the same as none: the service itself must not get what they kept
        // from it.
        if compiled.rules.is_empty() {
            compiled.rules.extend(compiled.dropped.take());
        }
        (!compiled.objects.is_empty()).then(|| (compiled, entry.meta.clone()))
    }

    /// The same service at the lowest of its ports.
    pub(crate) fn first_port(&self, name: &ServiceName) -> Option<ServiceName> {
        let (_, entry, _) = self.service_port(name)?;
        let port = entry.ports.iter().map(|port| port.port).min()?;
        Some(ServiceName { port, ..name.clone() })
    }

    fn service_port(&self, name: &ServiceName) -> Option<(Name, &ServiceEntry, &ServicePort)> {
        let key = (name.namespace.clone(), name.name.clone());
        let entry = self.services.get(&key).filter(|entry| entry.kind != ServiceKind::External)?;
        Some((key, entry, entry.port(name.port)?))
    }

    /// HTTPRoutes of one namespace that are about a service port: of the service's own, what its callers follow, of
    /// another, what callers there do.
    pub(crate) fn attached_http<'a>(
        &'a self,
        service: &'a Name,
        entry: &'a ServiceEntry,
        port: &'a ServicePort,
        from: &Arc<str>,
    ) -> impl Iterator<Item = (&'a Name, &'a RouteEntry<HttpRouteSpec>)> + use<'a> {
        in_namespace(&self.http_routes, from)
            .filter(move |(name, route)| attaches(name, &route.spec.parent_refs, service, entry, port))
    }

    /// The same of GRPCRoutes.
    pub(crate) fn attached_grpc<'a>(
        &'a self,
        service: &'a Name,
        entry: &'a ServiceEntry,
        port: &'a ServicePort,
        from: &Arc<str>,
    ) -> impl Iterator<Item = (&'a Name, &'a RouteEntry<GrpcRouteSpec>)> + use<'a> {
        in_namespace(&self.grpc_routes, from)
            .filter(move |(name, route)| attaches(name, &route.spec.parent_refs, service, entry, port))
    }

    /// What a port speaks: as declared; a GRPCRoute says gRPC where HTTP is possible.
    pub(crate) fn protocol(&self, service: &Name, entry: &ServiceEntry, port: &ServicePort) -> Protocol {
        self.protocol_from(service, entry, port, &service.0)
    }

    /// What callers of one namespace are told of it: their own GRPCRoutes count, too.
    fn protocol_from(
        &self,
        service: &Name,
        entry: &ServiceEntry,
        port: &ServicePort,
        from: &Arc<str>,
    ) -> Protocol {
        if self.is_opaque_by_a_pod(service, entry, port) {
            return Protocol::Opaque;
        }
        let could_be_grpc = matches!(port.protocol, Protocol::Detect | Protocol::Http2 | Protocol::Http1);
        let says_grpc = |from| self.attached_grpc(service, entry, port, from).next().is_some();
        if could_be_grpc && (says_grpc(&service.0) || (*from != service.0 && says_grpc(from))) {
            return Protocol::Grpc;
        }
        port.protocol
    }

    /// Policies of a service port, the most specific first, oldest first among equals.
    fn service_levels(&self, service: &Name, port: &ServicePort) -> Vec<&TrafficPolicySpec> {
        self.named_service_levels(service, port).into_iter().map(|(_, spec)| spec).collect()
    }

    /// The same with their names.
    pub(crate) fn named_service_levels(
        &self,
        service: &Name,
        port: &ServicePort,
    ) -> Vec<(&Name, &TrafficPolicySpec)> {
        let mut levels =
            self.targeting("Service", service, |section| section.is_some_and(|s| port.is_named(s)));
        levels.extend(self.targeting("Service", service, |section| section.is_none()));
        levels
    }

    fn rule_levels(
        &self,
        service: &Name,
        port: &ServicePort,
        kind: &str,
        route: &Name,
        label: &str,
        position: usize,
    ) -> Vec<&TrafficPolicySpec> {
        let is_rule = |section: &str| section == label || section.parse() == Ok(position);
        let mut levels = self.targeting(kind, route, |section| section.is_some_and(is_rule));
        levels.extend(self.targeting(kind, route, |section| section.is_none()));
        levels.extend(self.named_service_levels(service, port));
        levels.into_iter().map(|(_, spec)| spec).collect()
    }

    fn targeting<'a>(
        &'a self,
        kind: &str,
        name: &Name,
        section: impl Fn(Option<&str>) -> bool,
    ) -> Vec<(&'a Name, &'a TrafficPolicySpec)> {
        let is_target =
            |t: &TargetRef| t.kind == kind && *t.name == *name.1 && section(t.section_name.as_deref());
        let mut found: Vec<_> = in_namespace(&self.traffic, &name.0)
            .filter(|(_, policy)| policy.spec.target_refs.iter().any(&is_target))
            .map(|(policy_name, policy)| (policy.meta.created, policy_name, &policy.spec))
            .collect();
        found.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
        found.into_iter().map(|(_, name, spec)| (name, spec)).collect()
    }

    fn service_policy(&self, service: &Name, port: &ServicePort) -> TrafficPolicySpec {
        merge(&self.service_levels(service, port))
    }
}

/// Whether a route's parents include this service port.
fn attaches(
    route: &Name,
    parents: &[ParentRef],
    service: &Name,
    entry: &ServiceEntry,
    port: &ServicePort,
) -> bool {
    matches!(entry.kind, ServiceKind::Addressed(_))
        && parents.iter().any(|parent| {
            selects_port(parent, port) && parent_service(route, parent).as_ref() == Some(service)
        })
}

/// Whether a parentRef means a port of its service: all of them unless it says a number, or a name, or both.
pub(crate) fn selects_port(parent: &ParentRef, port: &ServicePort) -> bool {
    parent.port.is_none_or(|only| only == port.port)
        && parent.section_name.as_deref().is_none_or(|name| name.is_empty() || name == port.name)
}

/// The name of the route that callers of a namespace follow: the service's own, or one that no service has, because
/// their names have no dot.
pub(crate) fn route_name(service: &ServiceName, from: &Arc<str>) -> ServiceName {
    if *from == service.namespace {
        return service.clone();
    }
    ServiceName { name: format!("{}.from.{from}", service.name).into(), ..service.clone() }
}
