//! Objects → what their authors should know: Gateway API's condition types and reasons, and the same
//! idea for our own kinds.
//!
//! Why computed on demand: a condition is a fact about the index, so there is nothing to keep in step. But for what a
//! route says wrong by itself: `rules` has found that when it was read.

use weft_core::policy::{Protocol, ServiceName};

use super::{
    Index, in_namespace,
    objects::{Name, ServiceKind, ServicePort},
    outbound::selects_port,
    parent_service,
    rules::{RuleProblem, backend_service, is_service, rule_name},
};
use crate::resources::{
    Kind, ObjectKey,
    gateway::{self, ParentRef},
    policy::TargetRef,
};

/// One condition of one object, in regard to one parent if it has several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which of a route's parentRefs it is about.
    pub parent_ref: Option<usize>,
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
    /// The generation of a route that the conditions are about.
    pub fn route_generation(&self, key: &ObjectKey) -> Option<i64> {
        let name: Name = (key.namespace.clone(), key.name.clone());
        match key.kind {
            Kind::HttpRoute => self.http_routes.get(&name)?.meta.generation,
            Kind::GrpcRoute => self.grpc_routes.get(&name)?.meta.generation,
            Kind::Service
            | Kind::EndpointSlice
            | Kind::Pod
            | Kind::TrafficPolicy
            | Kind::AuthorizationPolicy
            | Kind::MeshConfig => None,
        }
    }

    /// The conditions of one object; none if there is nothing to say.
    pub fn conditions(&self, key: &ObjectKey) -> Vec<Condition> {
        let name: Name = (key.namespace.clone(), key.name.clone());
        match key.kind {
            Kind::HttpRoute => self.http_routes.get(&name).map_or_else(Vec::new, |route| {
                let rules = route.spec.rules.iter().zip(&route.problems).enumerate();
                let rules = rules.map(|(i, (rule, problem))| RuleFacts {
                    label: rule_name(rule.name.as_deref(), i).to_string(),
                    problem: problem.as_ref(),
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
                let rules = route.spec.rules.iter().zip(&route.problems).enumerate();
                let rules = rules.map(|(i, (rule, problem))| RuleFacts {
                    label: rule_name(rule.name.as_deref(), i).to_string(),
                    problem: problem.as_ref(),
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
                for (condition, target) in found.iter_mut().zip(&policy.spec.target_refs) {
                    if !condition.status {
                        let kept = self.former.contains_key(&(name.0.clone(), target.name.as_str().into()));
                        condition.message.push_str(if kept { KEPT } else { CLOSED });
                    }
                }
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
            Kind::Service => {
                let wrong = self.services.get(&name).and_then(|service| service.wrong.clone());
                wrong
                    .map(|wrong| condition("", "Accepted", false, "UnsupportedValue", wrong))
                    .into_iter()
                    .collect()
            }
            Kind::EndpointSlice | Kind::Pod => Vec::new(),
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
        for (position, parent) in parents.iter().enumerate() {
            // Somebody else's parent: nothing of ours to say about it.
            let Some(service) = parent_service(name, parent) else { continue };
            let text = parent_text(name, parent);
            let of_parent = |kind, status, reason, message| Condition {
                parent_ref: Some(position),
                ..condition(&text, kind, status, reason, message)
            };
            let (status, reason, message) = self.accepts(name, kind, parent, &service, rules);
            found.push(of_parent("Accepted", status, reason, message));
            let (status, reason, message) = self.resolved_refs(name, rules);
            found.push(of_parent("ResolvedRefs", status, reason, message));
            let bad: Vec<_> =
                rules.iter().filter_map(|r| Some(format!("{}: {}", r.label, r.problem?.message))).collect();
            if !bad.is_empty() && bad.len() < rules.len() {
                let message = format!("Dropped Rule {}", bad.join("; "));
                found.push(of_parent("PartiallyInvalid", true, "UnsupportedValue", message));
            }
        }
        found
    }

    fn accepts(
        &self,
        name: &Name,
        kind: Kind,
        parent: &ParentRef,
        service_name: &Name,
        rules: &[RuleFacts<'_>],
    ) -> (bool, &'static str, String) {
        let no_parent = |message: String| (false, "NoMatchingParent", message);
        let Some(service) = self.services.get(service_name) else {
            return no_parent(format!("there is no Service {}/{}", service_name.0, service_name.1));
        };
        match service.kind {
            ServiceKind::Addressed(_) => {}
            ServiceKind::Headless => return no_parent("the Service is headless".to_owned()),
            ServiceKind::External => return no_parent("the Service is an external name".to_owned()),
        }
        let mut ports = service.ports.iter().filter(|port| selects_port(parent, port)).peekable();
        if ports.peek().is_none() {
            let section = parent.section_name.as_deref().map(|name| format!(" named {name}"));
            let number = parent.port.map(|port| format!(" {port}"));
            return no_parent(format!(
                "the Service has no port{}{}",
                number.unwrap_or_default(),
                section.unwrap_or_default()
            ));
        }
        if let Some(first) = rules.iter().find_map(|rule| rule.problem)
            && rules.iter().all(|rule| rule.problem.is_some())
        {
            return (false, first.reason, first.message.clone());
        }
        // Producer and consumer routes never meet, so neither conflicts with the other.
        let taken =
            |port: &ServicePort| self.attached_grpc(service_name, service, port, &name.0).next().is_some();
        if kind == Kind::HttpRoute && ports.all(taken) {
            return (false, "Conflicted", "a GRPCRoute is attached to the same port".to_owned());
        }
        (true, "Accepted", String::new())
    }

    fn resolved_refs(&self, name: &Name, rules: &[RuleFacts<'_>]) -> (bool, &'static str, String) {
        for rule in rules {
            for backend in rule.backends {
                let failed = match backend_service(&name.0, backend) {
                    Err(reason) if is_service(backend) => Some(("BackendNotFound", reason)),
                    Err(reason) => Some(("InvalidKind", reason)),
                    Ok(service) => match self.declared(&service) {
                        None => Some(("BackendNotFound", format!("there is no Service {service}"))),
                        // Passed through as bytes: nothing of a route can be done there.
                        Some(Protocol::Tls) => {
                            Some(("UnsupportedProtocol", format!("Service {service} speaks TLS of its own")))
                        }
                        Some(_) => None,
                    },
                };
                if let Some((reason, message)) = failed {
                    return (false, reason, format!("rule {}: {message}", rule.label));
                }
            }
        }
        (true, "ResolvedRefs", String::new())
    }

    /// What a service's port declares; `None` if there is none.
    fn declared(&self, service: &ServiceName) -> Option<Protocol> {
        let name: Name = (service.namespace.clone(), service.name.clone());
        let entry = self.services.get(&name).filter(|entry| entry.kind != ServiceKind::External)?;
        Some(entry.port(service.port)?.protocol)
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

/// What an authorization policy does without its target (fail closed).
const KEPT: &str = "; it stays in force for the pods that the Service had";
/// See [`KEPT`].
const CLOSED: &str = "; until it is, pods that no other policy opens are closed to all";

fn names_rule<'a>(names: impl Iterator<Item = Option<&'a str>>, section: &str) -> bool {
    names.enumerate().any(|(i, name)| *rule_name(name, i) == *section || section.parse() == Ok(i))
}

struct RuleFacts<'a> {
    label: String,
    problem: Option<&'a RuleProblem>,
    backends: &'a [gateway::BackendRef],
}

fn parent_text(route: &Name, parent: &ParentRef) -> String {
    let namespace = parent.namespace.as_deref().unwrap_or(&route.0);
    let port = parent.port.map(|port| format!(":{port}")).unwrap_or_default();
    let port = parent.section_name.as_deref().map_or(port.clone(), |name| format!("{port}#{name}"));
    format!("{}/{namespace}/{}{port}", parent.kind.as_deref().unwrap_or("Gateway"), parent.name)
}

fn condition(
    parent: &str,
    kind: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
) -> Condition {
    Condition { parent_ref: None, parent: parent.to_owned(), kind, status, reason, message }
}
