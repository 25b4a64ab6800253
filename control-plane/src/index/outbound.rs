//! What callers of a service are told: the service itself and its route.
//!
//! Why rules are compiled one by one: a rule that cannot be enforced must never become a weaker rule. A
//! filter or backend that does not resolve answers 500 for what it would have handled; a match that does
//! not resolve drops its rule, and the route says so in its conditions (Gateway API, `PartiallyInvalid`).
//!
//! Order among rules is not decided here: precedence is one derived `Ord` in `weft_core::route`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, HeaderValue, Method};
use weft_core::{
    backoff::Backoff,
    budget::BudgetParams,
    identity::SpiffeId,
    policy::{
        Algorithm, BackendRef, DETECT_TIMEOUT, Filter, HeaderEdit, HeaderMatch, HealthPolicy, Limits,
        LoadBalancing, Match, ObjectRef, PathEdit, PathMatch, Pattern, Protocol, QueryMatch, Redirect,
        RetryPolicy, Rewrite, Rule, Service, ServiceName, SuccessRate, TextMatch, Timeouts,
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
#[derive(Clone, Debug)]
pub struct PodAddress {
    ip: IpAddr,
    name: Name,
    pod: PodEntry,
    protocols: BTreeMap<u16, Protocol>,
}

impl PodAddress {
    /// One port, as a service of one endpoint: no route, no balancing.
    pub fn service(&self, port: u16) -> Service {
        let (namespace, name) = self.name.clone();
        Service {
            vips: vec![self.ip],
            protocol: self.protocols.get(&port).copied().unwrap_or_default(),
            pod: Some(Arc::new(self.pod.endpoint(SocketAddr::new(self.ip, port)))),
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
        let (key, entry, port) = self.service_port(name)?;
        let policy = self.service_policy(&key, port);
        let vips = entry.vips().iter().copied().filter(|ip| self.has_vip(&key, *ip, name.port)).collect();
        let has_route = self.attached_http(&key, entry, name.port).next().is_some()
            || self.attached_grpc(&key, entry, name.port).next().is_some();
        let service = Service {
            vips,
            protocol: self.protocol(&key, entry, port),
            detect_timeout: policy.detect_timeout.map_or(DETECT_TIMEOUT, |d| d.0),
            route: has_route.then(|| format!("route/{name}").into()),
            endpoints: Some(format!("ep/{name}/*").into()),
            pod: None,
            load_balancing: load_balancing(policy.load_balancing.as_ref()),
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

    /// The rules of one service port; `None` without routes: everything goes to the service itself.
    pub fn route(&self, name: &ServiceName) -> Option<(CompiledRoute, Meta)> {
        let (key, entry, port) = self.service_port(name)?;
        let mut compiled = CompiledRoute { rules: Vec::new(), objects: Vec::new(), dropped: None };
        // GRPCRoute wins over HTTPRoute on one port; the other is told so (`Conflicted`).
        let grpc: Vec<_> = self.attached_grpc(&key, entry, name.port).collect();
        if grpc.is_empty() {
            for (route_name, route) in self.attached_http(&key, entry, name.port) {
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

    fn service_port(&self, name: &ServiceName) -> Option<(Name, &ServiceEntry, &ServicePort)> {
        let key = (name.namespace.clone(), name.name.clone());
        let entry = self.services.get(&key).filter(|entry| entry.kind != ServiceKind::External)?;
        Some((key, entry, entry.port(name.port)?))
    }

    /// HTTPRoutes that a service port's callers follow, producer routes only: their namespace is the
    /// service's.
    pub(crate) fn attached_http<'a>(
        &'a self,
        service: &'a Name,
        entry: &'a ServiceEntry,
        port: u16,
    ) -> impl Iterator<Item = (&'a Name, &'a RouteEntry<HttpRouteSpec>)> {
        in_namespace(&self.http_routes, &service.0)
            .filter(move |(name, route)| attaches(name, &route.spec.parent_refs, service, entry, port))
    }

    /// The same of GRPCRoutes.
    pub(crate) fn attached_grpc<'a>(
        &'a self,
        service: &'a Name,
        entry: &'a ServiceEntry,
        port: u16,
    ) -> impl Iterator<Item = (&'a Name, &'a RouteEntry<GrpcRouteSpec>)> {
        in_namespace(&self.grpc_routes, &service.0)
            .filter(move |(name, route)| attaches(name, &route.spec.parent_refs, service, entry, port))
    }

    /// What a port speaks: as declared; a GRPCRoute says gRPC where HTTP is possible.
    pub(crate) fn protocol(&self, service: &Name, entry: &ServiceEntry, port: &ServicePort) -> Protocol {
        let could_be_grpc = matches!(port.protocol, Protocol::Detect | Protocol::Http2 | Protocol::Http1);
        if could_be_grpc && self.attached_grpc(service, entry, port.port).next().is_some() {
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

/// Whether a route's parents include this service port. A route in another namespace is a consumer route,
/// which says nothing to the service's own callers.
fn attaches(route: &Name, parents: &[ParentRef], service: &Name, entry: &ServiceEntry, port: u16) -> bool {
    matches!(entry.kind, ServiceKind::Addressed(_))
        && parents.iter().any(|parent| {
            parent.port.is_none_or(|only| only == port)
                && parent_service(route, parent).as_ref() == Some(service)
        })
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
        Ok(self.rule(matches, &rule.filters, &rule.backend_refs, bounds, again))
    }

    /// Compiles one rule of a GRPCRoute.
    ///
    /// # Errors
    /// Why the rule is dropped.
    pub(crate) fn grpc(&self, rule: &gateway::GrpcRule) -> Result<Rule, String> {
        let matches = rule.matches.iter().map(grpc_match).collect::<Result<_, _>>()?;
        let policy = merge(&self.levels);
        let bounds = timeouts(&policy.timeouts);
        Ok(self.rule(matches, &rule.filters, &rule.backend_refs, bounds, retry(policy.retries.as_ref())))
    }

    /// What stands for a rule that cannot be enforced.
    fn dropped(&self, reason: String) -> Rule {
        let mut rule = self.rule(Vec::new(), &[], &[], Timeouts::default(), RetryPolicy::default());
        rule.filters.push(Filter::Invalid { reason: reason.into() });
        rule
    }

    fn rule(
        &self,
        matches: Vec<Match>,
        filters: &[gateway::Filter],
        backends: &[gateway::BackendRef],
        timeouts: Timeouts,
        retry: RetryPolicy,
    ) -> Rule {
        let mut services: Vec<ServiceName> = Vec::new();
        let backends = backends
            .iter()
            .map(|spec| {
                let mut filters: Vec<_> = spec.filters.iter().map(filter).collect();
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
            filters: filters.iter().map(filter).collect(),
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
    let group = spec.group.as_deref().unwrap_or_default();
    let kind = spec.kind.as_deref().unwrap_or("Service");
    if !matches!(group, "" | "core") || kind != "Service" {
        return Err(format!("backendRef of kind {kind} is not supported"));
    }
    let port =
        spec.port.filter(|port| *port > 0).ok_or_else(|| format!("backendRef {} has no port", spec.name))?;
    let namespace = spec.namespace.as_deref().map_or_else(|| namespace.clone(), Into::into);
    Ok(ServiceName { namespace, name: spec.name.as_str().into(), port })
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

/// Compiles a filter; one that cannot be enforced answers 500 instead (Gateway API: it must not be skipped).
pub(crate) fn filter(spec: &gateway::Filter) -> Filter {
    try_filter(spec).unwrap_or_else(|reason| Filter::Invalid { reason: reason.into() })
}

pub(crate) fn try_filter(spec: &gateway::Filter) -> Result<Filter, String> {
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
                host: redirect.hostname.as_deref().map(Into::into),
                path: redirect.path.as_ref().map(path_edit).transpose()?,
                port: redirect.port,
                status,
            }))
        }
        "URLRewrite" => {
            let rewrite = spec.url_rewrite.as_ref().ok_or_else(missing)?;
            Ok(Filter::Rewrite(Rewrite {
                host: rewrite.hostname.as_deref().map(Into::into),
                path: rewrite.path.as_ref().map(path_edit).transpose()?,
            }))
        }
        other => Err(format!("filter {other} is not supported")),
    }
}

fn path_edit(spec: &gateway::PathModifier) -> Result<PathEdit, String> {
    match (spec.kind.as_str(), &spec.replace_full_path, &spec.replace_prefix_match) {
        ("ReplaceFullPath", Some(path), _) => Ok(PathEdit::Full(path.as_str().into())),
        ("ReplacePrefixMatch", _, Some(prefix)) => Ok(PathEdit::Prefix(prefix.as_str().into())),
        (other, ..) => Err(format!("path modifier {other:?} is not complete")),
    }
}

fn header_edit(spec: &gateway::HeaderModifier) -> Result<HeaderEdit, String> {
    let name = |text: &str| text.parse::<HeaderName>().map_err(|_| format!("{text:?} is not a header name"));
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

fn load_balancing(spec: Option<&policy::LoadBalancing>) -> LoadBalancing {
    let default = LoadBalancing::default();
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

fn limits(spec: Option<&policy::Limits>) -> Limits {
    let default = Limits::default();
    let Some(spec) = spec else { return default };
    Limits {
        max_requests: spec.max_requests.unwrap_or(default.max_requests),
        max_connections: spec.max_connections.unwrap_or(default.max_connections),
        queue_wait: spec.queue_wait.map_or(default.queue_wait, |wait| wait.0),
    }
}

fn accepted(spec: &TrafficPolicySpec) -> Vec<SpiffeId> {
    spec.accepted_identities.iter().map(|identity| identity.0.clone()).collect()
}
