//! Objects → what their authors should know: Gateway API's condition types and reasons, and the same
//! idea for our own kinds.
//!
//! Why computed on demand: a condition is a fact about the index, so there is nothing to keep in step.

use super::{
    Index, Name, ServiceKind, in_namespace,
    outbound::{RuleContext, backend_service, object_ref, rule_name, try_filter},
    parent_service,
};
use crate::resources::{
    Kind, ObjectKey,
    gateway::{self, ParentRef},
    policy::TargetRef,
};
use weft_core::policy::ServiceName;

/// One condition of one object, in regard to one parent if it has several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The parent, as `Service/<ns>/<name>[:port]`; empty if the object has none.
    pub parent: String,
    /// `Accepted`, `ResolvedRefs` or `PartiallyInvalid`.
    pub kind: &'static str,
    /// Whether it holds.
    pub status: bool,
    /// One word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Index {
    /// The conditions of one object; none if there is nothing to say.
    pub fn conditions(&self, key: &ObjectKey) -> Vec<Condition> {
        let name: Name = (key.namespace.clone(), key.name.clone());
        match key.kind {
            Kind::HttpRoute => self.http_routes.get(&name).map_or_else(Vec::new, |route| {
                let context = probe(&name, Kind::HttpRoute);
                let rules = route.spec.rules.iter().enumerate().map(|(i, rule)| RuleFacts {
                    label: rule_name(rule.name.as_deref(), i).to_string(),
                    dropped: context.context().http(rule).err(),
                    filters: &rule.filters,
                    backends: &rule.backend_refs,
                });
                self.route_conditions(
                    &name,
                    Kind::HttpRoute,
                    &route.spec.parent_refs,
                    &rules.collect::<Vec<_>>(),
                )
            }),
            Kind::GrpcRoute => self.grpc_routes.get(&name).map_or_else(Vec::new, |route| {
                let context = probe(&name, Kind::GrpcRoute);
                let rules = route.spec.rules.iter().enumerate().map(|(i, rule)| RuleFacts {
                    label: rule_name(rule.name.as_deref(), i).to_string(),
                    dropped: context.context().grpc(rule).err(),
                    filters: &rule.filters,
                    backends: &rule.backend_refs,
                });
                self.route_conditions(
                    &name,
                    Kind::GrpcRoute,
                    &route.spec.parent_refs,
                    &rules.collect::<Vec<_>>(),
                )
            }),
            Kind::TrafficPolicy => self
                .traffic
                .get(&name)
                .map_or_else(Vec::new, |p| self.target_conditions(&name, &p.spec.target_refs)),
            Kind::AuthorizationPolicy => {
                let Some(policy) = self.authz.get(&name) else { return Vec::new() };
                let mut found = self.target_conditions(&name, &policy.spec.target_refs);
                if found.is_empty() {
                    let selected = in_namespace(&self.pods, &name.0)
                        .filter(|(pod_name, pod)| self.selects(&name, &policy.spec, pod_name, pod).is_some())
                        .count();
                    let (status, reason) =
                        if selected > 0 { (true, "Accepted") } else { (false, "NoWorkload") };
                    found.push(condition(
                        "",
                        "Accepted",
                        status,
                        reason,
                        format!("selects {selected} workloads"),
                    ));
                }
                found
            }
            Kind::MeshConfig => {
                let in_force = self.mesh_config().is_some_and(|(first, _)| *first == name);
                let (reason, message) = if in_force {
                    ("Accepted", String::new())
                } else {
                    ("Conflicted", "an older MeshConfig is in force".to_owned())
                };
                vec![condition("", "Accepted", in_force, reason, message)]
            }
            Kind::Service | Kind::EndpointSlice | Kind::Pod => Vec::new(),
        }
    }

    fn route_conditions(
        &self,
        name: &Name,
        kind: Kind,
        parents: &[ParentRef],
        rules: &[RuleFacts<'_>],
    ) -> Vec<Condition> {
        let mut found = Vec::new();
        for parent in parents {
            let text = parent_text(name, parent);
            let (status, reason, message) = self.accepts(name, kind, parent, rules);
            found.push(condition(&text, "Accepted", status, reason, message));
            if reason == "Gateway" {
                // Somebody else's parent: nothing of ours to say about it.
                found.pop();
                continue;
            }
            found.push(self.resolved_refs(&text, name, rules));
            let dropped: Vec<_> = rules
                .iter()
                .filter_map(|r| Some(format!("{}: {}", r.label, r.dropped.as_deref()?)))
                .collect();
            if !dropped.is_empty() && dropped.len() < rules.len() {
                let message = format!("Dropped Rule {}", dropped.join("; "));
                found.push(condition(&text, "PartiallyInvalid", true, "UnsupportedValue", message));
            }
        }
        found
    }

    fn accepts(
        &self,
        name: &Name,
        kind: Kind,
        parent: &ParentRef,
        rules: &[RuleFacts<'_>],
    ) -> (bool, &'static str, String) {
        let no_parent = |message: String| (false, "NoMatchingParent", message);
        let Some(service_name) = parent_service(name, parent) else {
            return (false, "Gateway", String::new());
        };
        let Some(service) = self.services.get(&service_name) else {
            return no_parent(format!("there is no Service {}/{}", service_name.0, service_name.1));
        };
        match service.kind {
            ServiceKind::Addressed(_) => {}
            ServiceKind::Headless => return no_parent("the Service is headless".to_owned()),
            ServiceKind::External => return no_parent("the Service is an external name".to_owned()),
        }
        if service_name.0 != name.0 {
            let message = "consumer routes (a parent in another namespace) are not supported yet".to_owned();
            return (false, "UnsupportedValue", message);
        }
        let ports: Vec<u16> = service
            .ports
            .iter()
            .map(|p| p.port)
            .filter(|port| parent.port.is_none_or(|only| only == *port))
            .collect();
        if ports.is_empty() {
            return no_parent(format!("the Service has no port {}", parent.port.unwrap_or_default()));
        }
        if !rules.is_empty() && rules.iter().all(|rule| rule.dropped.is_some()) {
            let reason = rules.iter().find_map(|rule| rule.dropped.clone()).unwrap_or_default();
            return (false, "UnsupportedValue", reason);
        }
        let taken = |port: &u16| self.attached_grpc(&service_name, service, *port).next().is_some();
        if kind == Kind::HttpRoute && ports.iter().all(taken) {
            return (false, "Conflicted", "a GRPCRoute is attached to the same port".to_owned());
        }
        (true, "Accepted", String::new())
    }

    fn resolved_refs(&self, parent: &str, name: &Name, rules: &[RuleFacts<'_>]) -> Condition {
        for rule in rules {
            for backend in rule.backends {
                let failed = match backend_service(&name.0, backend) {
                    Err(reason) => Some(("InvalidKind", reason)),
                    Ok(service) => (!self.has_port(&service))
                        .then(|| ("BackendNotFound", format!("there is no Service {service}"))),
                };
                if let Some((reason, message)) = failed {
                    return condition(
                        parent,
                        "ResolvedRefs",
                        false,
                        reason,
                        format!("rule {}: {message}", rule.label),
                    );
                }
            }
            let all = rule.filters.iter().chain(rule.backends.iter().flat_map(|b| &b.filters));
            if let Some(reason) = all.map(try_filter).find_map(Result::err) {
                let message = format!("rule {}: {reason}", rule.label);
                return condition(parent, "ResolvedRefs", false, "UnsupportedValue", message);
            }
        }
        condition(parent, "ResolvedRefs", true, "ResolvedRefs", String::new())
    }

    fn has_port(&self, service: &ServiceName) -> bool {
        let name: Name = (service.namespace.clone(), service.name.clone());
        self.services
            .get(&name)
            .is_some_and(|s| s.kind != ServiceKind::External && s.port(service.port).is_some())
    }

    fn target_conditions(&self, name: &Name, targets: &[TargetRef]) -> Vec<Condition> {
        let one = |target: &TargetRef| {
            let target_name: Name = (name.0.clone(), target.name.as_str().into());
            let section = target.section_name.as_deref();
            let found = match target.kind.as_str() {
                "Service" => self
                    .services
                    .get(&target_name)
                    .map(|service| section.is_none_or(|s| service.ports.iter().any(|port| port.is_named(s)))),
                "HTTPRoute" => self.http_routes.get(&target_name).map(|route| {
                    let names = route.spec.rules.iter().map(|rule| rule.name.as_deref());
                    section.is_none_or(|s| names_rule(names, s))
                }),
                "GRPCRoute" => self.grpc_routes.get(&target_name).map(|route| {
                    let names = route.spec.rules.iter().map(|rule| rule.name.as_deref());
                    section.is_none_or(|s| names_rule(names, s))
                }),
                _ => None,
            };
            let parent = format!("{}/{}/{}", target.kind, name.0, target.name);
            match found {
                Some(true) => condition(&parent, "Accepted", true, "Accepted", String::new()),
                Some(false) => {
                    let message = format!("it has no section {}", section.unwrap_or_default());
                    condition(&parent, "Accepted", false, "TargetNotFound", message)
                }
                None => condition(
                    &parent,
                    "Accepted",
                    false,
                    "TargetNotFound",
                    "there is no such object".to_owned(),
                ),
            }
        };
        targets.iter().map(one).collect()
    }
}

fn names_rule<'a>(names: impl Iterator<Item = Option<&'a str>>, section: &str) -> bool {
    names.enumerate().any(|(i, name)| *rule_name(name, i) == *section || section.parse() == Ok(i))
}

struct RuleFacts<'a> {
    label: String,
    dropped: Option<String>,
    filters: &'a [gateway::Filter],
    backends: &'a [gateway::BackendRef],
}

/// Compiles rules only to hear what is wrong with them.
struct Probe {
    service: ServiceName,
    object: weft_core::policy::ObjectRef,
}

fn probe(name: &Name, kind: Kind) -> Probe {
    let service = ServiceName { namespace: name.0.clone(), name: name.1.clone(), port: 0 };
    Probe { service, object: object_ref(kind, name) }
}

impl Probe {
    fn context(&self) -> RuleContext<'_> {
        RuleContext {
            service: &self.service,
            object: &self.object,
            label: "".into(),
            created: 0,
            levels: Vec::new(),
        }
    }
}

fn parent_text(route: &Name, parent: &ParentRef) -> String {
    let namespace = parent.namespace.as_deref().unwrap_or(&route.0);
    let port = parent.port.map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}/{namespace}/{}{port}", parent.kind.as_deref().unwrap_or("Gateway"), parent.name)
}

fn condition(
    parent: &str,
    kind: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
) -> Condition {
    Condition { parent: parent.to_owned(), kind, status, reason, message }
}
