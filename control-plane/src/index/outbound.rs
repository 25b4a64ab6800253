//! What callers of a service are told: the service itself and its route.
//!
//! Why rules are compiled one by one: a rule that cannot be enforced must never become a weaker rule. A
//! filter or backend that does not resolve answers 500 for what it would have handled; a match that does
//! not resolve drops its rule, and the route says so in its conditions (Gateway API, `PartiallyInvalid`).
//!
//! Order among rules is not decided here: precedence is one derived `Ord` in `weft_core::route`.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::discriminant,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, HeaderValue, Method, header};
use weft_core::{
    backoff::Backoff,
    budget::BudgetParams,
    identity::SpiffeId,
    policy::{
        Algorithm, BackendRef, DETECT_TIMEOUT, Endpoint, EndpointHealth, Filter, HeaderEdit, HeaderMatch,
        HealthPolicy, LoadBalancing, Match, ObjectRef, PathEdit, PathMatch, Pattern, Protocol, QueryMatch,
        Redirect, RetryPolicy, Rewrite, Rule, Service, ServiceLimits, ServiceName, SuccessRate, TextMatch,
        Timeouts,
    },
};

use super::{
    Index, Meta, Name, PodEntry, RouteEntry, ServiceEntry, ServiceKind, ServicePort, in_namespace,
    parent_service,
};
use crate::resources::{
    Kind,
    gateway::{self, GrpcMatch, GrpcRouteSpec, HttpMatch, HttpRouteSpec, HttpRule, NamedMatch, ParentRef},
    policy::{self, BackoffSpec, TargetRef, TrafficPolicySpec},
    values::GatewayDuration,
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
        levels.extend(self.service_levels(service, port));
        levels
    }

    fn targeting<'a>(
        &'a self,
        kind: &str,
        name: &Name,
        section: impl Fn(Option<&str>) -> bool,
    ) -> Vec<&'a TrafficPolicySpec> {
        let is_target =
            |t: &TargetRef| t.kind == kind && *t.name == *name.1 && section(t.section_name.as_deref());
        let mut found: Vec<_> = in_namespace(&self.traffic, &name.0)
            .filter(|(_, policy)| policy.spec.target_refs.iter().any(&is_target))
            .map(|(policy_name, policy)| (policy.meta.created, policy_name, &policy.spec))
            .collect();
        found.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
        found.into_iter().map(|(_, _, spec)| spec).collect()
    }

    fn service_policy(&self, service: &Name, port: &ServicePort) -> TrafficPolicySpec {
        merge(&self.service_levels(service, port))
    }
}

/// The first level that sets a field decides it.
fn merge(levels: &[&TrafficPolicySpec]) -> TrafficPolicySpec {
    let mut merged = TrafficPolicySpec::default();
    for level in levels {
        let timeouts = &level.timeouts;
        merged.timeouts.request = merged.timeouts.request.or(timeouts.request);
        merged.timeouts.per_try = merged.timeouts.per_try.or(timeouts.per_try);
        merged.timeouts.connect = merged.timeouts.connect.or(timeouts.connect);
        merged.retries = merged.retries.or_else(|| level.retries.clone());
        merged.load_balancing = merged.load_balancing.or_else(|| level.load_balancing.clone());
        merged.outlier_ejection = merged.outlier_ejection.or_else(|| level.outlier_ejection.clone());
        merged.limits = merged.limits.or_else(|| level.limits.clone());
        merged.mtls_required = merged.mtls_required.or(level.mtls_required);
        merged.detect_timeout = merged.detect_timeout.or(level.detect_timeout);
        if merged.accepted_identities.is_empty() {
            merged.accepted_identities.clone_from(&level.accepted_identities);
        }
    }
    merged
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

pub(crate) fn rule_name(name: Option<&str>, position: usize) -> Arc<str> {
    name.filter(|name| !name.is_empty()).map_or_else(|| position.to_string().into(), Into::into)
}

pub(crate) fn object_ref(kind: Kind, name: &Name) -> ObjectRef {
    ObjectRef { kind: kind.as_str().into(), namespace: name.0.clone(), name: name.1.clone() }
}

/// What a rule's parts are compiled with.
pub(crate) struct RuleContext<'a> {
    pub(crate) service: &'a ServiceName,
    pub(crate) object: &'a ObjectRef,
    pub(crate) label: Arc<str>,
    pub(crate) created: u64,
    pub(crate) levels: Vec<&'a TrafficPolicySpec>,
}

impl RuleContext<'_> {
    /// Compiles one rule of an HTTPRoute.
    ///
    /// # Errors
    /// Why the rule is dropped.
    pub(crate) fn http(&self, rule: &HttpRule) -> Result<Rule, String> {
        let matches = rule.matches.iter().map(http_match).collect::<Result<_, _>>()?;
        let policy = merge(&self.levels);
        let mut bounds = timeouts(&policy.timeouts);
        // What stands in the rule says more than any policy about it.
        if let Some(text) = &rule.timeouts.request {
            bounds.request = bound(text)?;
        }
        if let Some(text) = &rule.timeouts.backend_request {
            bounds.per_try = bound(text)?;
        }
        let mut again = retry(policy.retries.as_ref());
        if let Some(spec) = &rule.retry {
            again.statuses = spec.codes.iter().map(|code| *code..=*code).collect();
            again.max_retries = spec.attempts.unwrap_or(1);
            again.on_reset = true;
            if let Some(text) = &spec.backoff {
                let min = text.parse::<GatewayDuration>()?.0;
                let max = min.saturating_mul(10).max(again.backoff.max());
                again.backoff = Backoff::try_new(min, max, 0.5).map_err(|e| e.to_string())?;
            }
        }
        let prefixes = are_prefixes(&rule.matches);
        Ok(self.rule(matches, &rule.filters, &rule.backend_refs, prefixes, bounds, again))
    }

    /// Compiles one rule of a GRPCRoute.
    ///
    /// # Errors
    /// Why the rule is dropped.
    pub(crate) fn grpc(&self, rule: &gateway::GrpcRule) -> Result<Rule, String> {
        let matches = rule.matches.iter().map(grpc_match).collect::<Result<_, _>>()?;
        let policy = merge(&self.levels);
        let bounds = timeouts(&policy.timeouts);
        let again = retry(policy.retries.as_ref());
        Ok(self.rule(matches, &rule.filters, &rule.backend_refs, false, bounds, again))
    }

    /// What stands for a rule that cannot be enforced.
    fn dropped(&self, reason: String) -> Rule {
        let mut rule = self.rule(Vec::new(), &[], &[], true, Timeouts::default(), RetryPolicy::default());
        rule.filters.push(Filter::Invalid { reason: reason.into() });
        rule
    }

    fn rule(
        &self,
        matches: Vec<Match>,
        filters: &[gateway::Filter],
        backends: &[gateway::BackendRef],
        prefixes: bool,
        timeouts: Timeouts,
        retry: RetryPolicy,
    ) -> Rule {
        let mut services: Vec<ServiceName> = Vec::new();
        let backends = backends
            .iter()
            .map(|spec| {
                let mut filters = enforced(&spec.filters, prefixes);
                let service = backend_service(&self.object.namespace, spec).unwrap_or_else(|reason| {
                    // Kept with its weight: its share of the requests is answered with 500.
                    filters.insert(0, Filter::Invalid { reason: reason.into() });
                    self.service.clone()
                });
                let backend = services.iter().position(|known| *known == service).unwrap_or_else(|| {
                    services.push(service.clone());
                    services.len() - 1
                });
                BackendRef { service, backend, weight: spec.weight.unwrap_or(1), filters }
            })
            .collect();
        Rule {
            object: self.object.clone(),
            label: format!("{}/{}", self.object, self.label).into(),
            name: self.label.clone(),
            hosts: Vec::new(),
            matches,
            filters: enforced(filters, prefixes),
            backends,
            timeouts,
            retry,
            created: self.created,
        }
    }
}

/// The service port that a backendRef names, in any namespace (a mesh needs no ReferenceGrant: GEP-1294).
pub(crate) fn backend_service(
    namespace: &Arc<str>,
    spec: &gateway::BackendRef,
) -> Result<ServiceName, String> {
    if !is_service(spec) {
        let kind = spec.kind.as_deref().unwrap_or("Service");
        return Err(format!("backendRef of kind {kind} is not supported"));
    }
    let port =
        spec.port.filter(|port| *port > 0).ok_or_else(|| format!("backendRef {} has no port", spec.name))?;
    let namespace = spec.namespace.as_deref().map_or_else(|| namespace.clone(), Into::into);
    Ok(ServiceName { namespace, name: spec.name.as_str().into(), port })
}

/// Whether a backendRef names a Service.
pub(crate) fn is_service(spec: &gateway::BackendRef) -> bool {
    matches!(spec.group.as_deref().unwrap_or_default(), "" | "core")
        && spec.kind.as_deref().unwrap_or("Service") == "Service"
}

pub(crate) fn http_match(spec: &HttpMatch) -> Result<Match, String> {
    let path = match &spec.path {
        None => None,
        Some(path) => {
            let value = path.value.as_deref().unwrap_or("/");
            if !value.starts_with('/') && path.kind.as_deref() != Some("RegularExpression") {
                return Err(format!("path {value:?} does not start with /"));
            }
            match path.kind.as_deref().unwrap_or("PathPrefix") {
                "Exact" => Some(PathMatch::Exact(value.into())),
                "PathPrefix" => {
                    let trimmed = value.trim_end_matches('/');
                    // `/` holds for every path.
                    (!trimmed.is_empty()).then(|| PathMatch::Prefix(trimmed.into()))
                }
                "RegularExpression" => {
                    Some(PathMatch::Regex(Pattern::new(value).map_err(|e| e.to_string())?))
                }
                other => return Err(format!("path match of type {other:?} is not supported")),
            }
        }
    };
    let method =
        spec.method.as_deref().map(|m| m.parse::<Method>().map_err(|_| format!("{m:?} is not a method")));
    Ok(Match {
        path,
        method: method.transpose()?,
        headers: header_matches(&spec.headers)?,
        query: spec
            .query_params
            .iter()
            .map(|query| Ok(QueryMatch { name: query.name.as_str().into(), value: text_match(query)? }))
            .collect::<Result<_, String>>()?,
    })
}

pub(crate) fn grpc_match(spec: &GrpcMatch) -> Result<Match, String> {
    let path = match &spec.method {
        None => None,
        Some(method) => {
            let text = |value: &Option<String>| -> Result<Option<TextMatch>, String> {
                let Some(value) = value.as_deref().filter(|value| !value.is_empty()) else { return Ok(None) };
                match method.kind.as_deref().unwrap_or("Exact") {
                    "Exact" => Ok(Some(TextMatch::Exact(value.into()))),
                    "RegularExpression" => {
                        Ok(Some(TextMatch::Regex(Pattern::new(value).map_err(|e| e.to_string())?)))
                    }
                    other => Err(format!("method match of type {other:?} is not supported")),
                }
            };
            Some(PathMatch::Grpc { service: text(&method.service)?, method: text(&method.method)? })
        }
    };
    Ok(Match { path, method: None, headers: header_matches(&spec.headers)?, query: Vec::new() })
}

fn header_matches(specs: &[NamedMatch]) -> Result<Vec<HeaderMatch>, String> {
    let one = |spec: &NamedMatch| -> Result<HeaderMatch, String> {
        let name =
            spec.name.parse::<HeaderName>().map_err(|_| format!("{:?} is not a header name", spec.name))?;
        Ok(HeaderMatch { name, value: text_match(spec)? })
    };
    let mut found: Vec<HeaderMatch> = Vec::new();
    for spec in specs {
        let header = one(spec)?;
        // Gateway API: of equal names the first counts.
        if !found.iter().any(|known| known.name == header.name) {
            found.push(header);
        }
    }
    Ok(found)
}

fn text_match(spec: &NamedMatch) -> Result<TextMatch, String> {
    match spec.kind.as_deref().unwrap_or("Exact") {
        "Exact" => Ok(TextMatch::Exact(spec.value.as_str().into())),
        "RegularExpression" => Pattern::new(&spec.value).map(TextMatch::Regex).map_err(|e| e.to_string()),
        other => Err(format!("match of type {other:?} is not supported")),
    }
}

/// Filters that can be enforced, all of them together; else 500 is answered (Gateway API: none may be skipped).
fn enforced(specs: &[gateway::Filter], prefixes: bool) -> Vec<Filter> {
    filters(specs, prefixes)
        .unwrap_or_else(|problem| vec![Filter::Invalid { reason: problem.message.into() }])
}

/// Why a rule does not do what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleProblem {
    /// `UnsupportedValue` or `IncompatibleFilters`.
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// Compiles the filters of a rule or backend. `prefixes`: all of the rule's matches are by path prefix.
///
/// # Errors
/// The first that cannot be enforced, or cannot beside another.
pub(crate) fn filters(specs: &[gateway::Filter], prefixes: bool) -> Result<Vec<Filter>, RuleProblem> {
    let unsupported = |message| RuleProblem { reason: "UnsupportedValue", message };
    let incompatible = |message| RuleProblem { reason: "IncompatibleFilters", message };
    let mut compiled: Vec<Filter> = Vec::new();
    for spec in specs {
        let filter = try_filter(spec).map_err(unsupported)?;
        if compiled.iter().any(|other| discriminant(other) == discriminant(&filter)) {
            return Err(incompatible(format!("filter {} is there twice", spec.kind)));
        }
        let path = match &filter {
            Filter::Redirect(redirect) => redirect.path.as_ref(),
            Filter::Rewrite(rewrite) => rewrite.path.as_ref(),
            Filter::RequestHeaders(_) | Filter::ResponseHeaders(_) | Filter::Invalid { .. } => None,
        };
        if matches!(path, Some(PathEdit::Prefix(_))) && !prefixes {
            return Err(unsupported(
                "ReplacePrefixMatch needs matches by PathPrefix, and no others".to_owned(),
            ));
        }
        compiled.push(filter);
    }
    let has = |kind: fn(&Filter) -> bool| compiled.iter().any(kind);
    if has(|filter| matches!(filter, Filter::Redirect(_)))
        && has(|filter| matches!(filter, Filter::Rewrite(_)))
    {
        return Err(incompatible("RequestRedirect and URLRewrite in one rule".to_owned()));
    }
    Ok(compiled)
}

/// Whether all matches are by path prefix, as one without a path is.
pub(crate) fn are_prefixes(matches: &[HttpMatch]) -> bool {
    let kinds = matches.iter().filter_map(|m| m.path.as_ref()?.kind.as_deref());
    kinds.into_iter().all(|kind| kind == "PathPrefix")
}

fn try_filter(spec: &gateway::Filter) -> Result<Filter, String> {
    let missing = || format!("filter {} has no settings", spec.kind);
    match spec.kind.as_str() {
        "RequestHeaderModifier" => header_edit(spec.request_header_modifier.as_ref().ok_or_else(missing)?)
            .map(Filter::RequestHeaders),
        "ResponseHeaderModifier" => header_edit(spec.response_header_modifier.as_ref().ok_or_else(missing)?)
            .map(Filter::ResponseHeaders),
        "RequestRedirect" => {
            let redirect = spec.request_redirect.as_ref().ok_or_else(missing)?;
            let status = redirect.status_code.unwrap_or(302);
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                return Err(format!("redirect with status {status}"));
            }
            if let Some(scheme) = redirect.scheme.as_deref().filter(|s| !matches!(*s, "http" | "https")) {
                return Err(format!("redirect to scheme {scheme:?}"));
            }
            Ok(Filter::Redirect(Redirect {
                scheme: redirect.scheme.as_deref().map(Into::into),
                host: redirect.hostname.as_deref().map(hostname).transpose()?,
                path: redirect.path.as_ref().map(path_edit).transpose()?,
                port: redirect.port.filter(|port| *port > 0),
                status,
            }))
        }
        "URLRewrite" => {
            let rewrite = spec.url_rewrite.as_ref().ok_or_else(missing)?;
            Ok(Filter::Rewrite(Rewrite {
                host: rewrite.hostname.as_deref().map(hostname).transpose()?,
                path: rewrite.path.as_ref().map(path_edit).transpose()?,
            }))
        }
        other => Err(format!("filter {other} is not supported")),
    }
}

fn path_edit(spec: &gateway::PathModifier) -> Result<PathEdit, String> {
    // It goes into a request line: nothing that could end it there, or begin a query.
    let path = |text: &str| -> Result<Arc<str>, String> {
        let ok = |b: u8| b.is_ascii_graphic() && b != b'?' && b != b'#';
        let begins = text.is_empty() || text.starts_with('/');
        if begins && text.bytes().all(ok) && text.len() <= MAX_TEXT {
            return Ok(text.into());
        }
        Err(format!("{text:?} is not a path: start with / and percent-encode the rest, without a query"))
    };
    match (spec.kind.as_str(), &spec.replace_full_path, &spec.replace_prefix_match) {
        ("ReplaceFullPath", Some(full), _) => Ok(PathEdit::Full(path(full)?)),
        ("ReplacePrefixMatch", _, Some(prefix)) => Ok(PathEdit::Prefix(path(prefix)?)),
        ("ReplaceFullPath" | "ReplacePrefixMatch", ..) => {
            Err(format!("path modifier {} has no value", spec.kind))
        }
        (other, ..) => Err(format!("path modifier of type {other:?} is not supported")),
    }
}

/// A host without port, as `PreciseHostname` is.
fn hostname(text: &str) -> Result<Arc<str>, String> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    if text.is_empty() || text.len() > 253 || !text.bytes().all(ok) {
        return Err(format!("{text:?} is not a host name"));
    }
    Ok(text.into())
}

fn header_edit(spec: &gateway::HeaderModifier) -> Result<HeaderEdit, String> {
    let name = |text: &str| {
        let name = text.parse::<HeaderName>().map_err(|_| format!("{text:?} is not a header name"))?;
        if name == header::HOST {
            return Err("the Host header is changed by URLRewrite".to_owned());
        }
        // What frames a message or belongs to one connection is the proxy's, and so is what it tells its peer.
        if NOT_FOR_FILTERS.contains(&name) || name.as_str().starts_with("weft-") {
            return Err(format!("header {name} cannot be changed by a filter"));
        }
        Ok(name)
    };
    let pair = |header: &gateway::HeaderValue| {
        let value = HeaderValue::from_str(&header.value)
            .map_err(|_| format!("{:?} is not a header value", header.value))?;
        Ok::<_, String>((name(&header.name)?, value))
    };
    Ok(HeaderEdit {
        set: spec.set.iter().map(pair).collect::<Result<_, _>>()?,
        add: spec.add.iter().map(pair).collect::<Result<_, _>>()?,
        remove: spec.remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?,
    })
}

/// `0s` is no bound (Gateway API).
fn bound(text: &str) -> Result<Option<Duration>, String> {
    Ok(some_bound(text.parse()?))
}

fn some_bound(duration: GatewayDuration) -> Option<Duration> {
    (!duration.0.is_zero()).then_some(duration.0)
}

fn timeouts(spec: &policy::Timeouts) -> Timeouts {
    Timeouts {
        request: spec.request.and_then(some_bound),
        per_try: spec.per_try.and_then(some_bound),
        connect: spec.connect.and_then(some_bound),
    }
}

fn retry(spec: Option<&policy::Retries>) -> RetryPolicy {
    let mut retry = RetryPolicy::default();
    let Some(spec) = spec else { return retry };
    retry.statuses = spec.statuses.iter().map(|s| s.0.clone()).collect();
    retry.grpc_codes = spec.grpc_codes.iter().map(|c| c.0).collect();
    retry.on_reset = spec.on_reset.unwrap_or(retry.on_reset);
    retry.max_retries = spec.max_retries.unwrap_or(retry.max_retries);
    retry.any_method = spec.any_method.unwrap_or(retry.any_method);
    retry.max_body = spec.max_body_bytes.and_then(|n| usize::try_from(n).ok()).unwrap_or(retry.max_body);
    retry.backoff = backoff(spec.backoff.as_ref(), retry.backoff);
    if let Some(budget) = &spec.budget {
        let default = BudgetParams::default();
        retry.budget = BudgetParams {
            ratio: budget.percent.map_or(default.ratio, |percent| f64::from(percent) / 100.0),
            min_per_second: budget.min_per_second.unwrap_or(default.min_per_second),
            window: budget.window.map_or(default.window, |window| window.0),
        };
    }
    retry
}

/// Parts that are not given are the default's, stretched where the given one would not fit.
pub(crate) fn try_backoff(spec: &BackoffSpec, default: Backoff) -> Result<Backoff, String> {
    let min =
        spec.min.map_or_else(|| spec.max.map_or(default.min(), |max| default.min().min(max.0)), |d| d.0);
    let max = spec.max.map_or_else(|| default.max().max(min), |d| d.0);
    let jitter = spec.jitter.map_or(default.jitter(), |share| share.0);
    Backoff::try_new(min, max, jitter).map_err(|e| e.to_string())
}

fn backoff(spec: Option<&BackoffSpec>, default: Backoff) -> Backoff {
    // What does not fit was refused when it was read.
    spec.and_then(|spec| try_backoff(spec, default).ok()).unwrap_or(default)
}

fn load_balancing(spec: Option<&policy::LoadBalancing>, by_client: bool) -> LoadBalancing {
    let default = LoadBalancing { by_client, ..LoadBalancing::default() };
    let Some(spec) = spec else { return default };
    LoadBalancing {
        algorithm: match spec.algorithm {
            policy::Algorithm::PeakEwma => Algorithm::PeakEwma,
            policy::Algorithm::LeastRequest => Algorithm::LeastRequest,
            policy::Algorithm::RoundRobin => Algorithm::RoundRobin,
            policy::Algorithm::Random => Algorithm::Random,
        },
        ewma_decay: spec.ewma.decay.map_or(default.ewma_decay, |d| d.0),
        ewma_initial: spec.ewma.initial.map_or(default.ewma_initial, |d| d.0),
        by_client,
    }
}

fn health(spec: Option<&policy::OutlierEjection>) -> HealthPolicy {
    let default = HealthPolicy::default();
    let Some(spec) = spec else { return default };
    let success_rate = match &spec.success_rate {
        None => default.success_rate,
        Some(rate) => {
            let base = default.success_rate.unwrap_or(SuccessRate {
                threshold: 0.8,
                window: Duration::from_secs(10),
                min_requests: 10,
            });
            let threshold = rate.threshold.map_or(base.threshold, |share| share.0);
            (threshold > 0.0).then(|| SuccessRate {
                threshold,
                window: rate.window.map_or(base.window, |window| window.0),
                min_requests: rate.min_requests.unwrap_or(base.min_requests),
            })
        }
    };
    HealthPolicy {
        consecutive_failures: spec.consecutive_failures.unwrap_or(default.consecutive_failures),
        success_rate,
        backoff: backoff(spec.backoff.as_ref(), default.backoff),
        max_ejection_percent: spec.max_ejection_percent.unwrap_or(default.max_ejection_percent),
    }
}

fn limits(spec: Option<&policy::Limits>) -> ServiceLimits {
    let default = ServiceLimits::default();
    let Some(spec) = spec else { return default };
    ServiceLimits {
        max_requests: spec.max_requests.unwrap_or(default.max_requests),
        max_connections: spec.max_connections.unwrap_or(default.max_connections),
        queue_wait: spec.queue_wait.map_or(default.queue_wait, |wait| wait.0),
    }
}

fn accepted(spec: &TrafficPolicySpec) -> Vec<SpiffeId> {
    spec.accepted_identities.iter().map(|identity| identity.0.clone()).collect()
}

/// As long a text as a sidecar takes.
const MAX_TEXT: usize = 1_024;
const NOT_FOR_FILTERS: [HeaderName; 8] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];
