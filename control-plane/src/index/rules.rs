//! One rule of a route, as the core has it, or why it cannot be.
//!
//! Why rules are compiled one by one: a rule that cannot be enforced must never become a weaker rule. A
//! filter or backend that does not resolve answers 500 for what it would have handled; a match that does
//! not resolve drops its rule, and the route says so in its conditions (Gateway API, `PartiallyInvalid`).
//!
//! What is wrong with a rule by itself is found here, once, when it is read: it takes compiling all its patterns.

use std::{mem::discriminant, sync::Arc};

use http::{HeaderName, HeaderValue, Method, header};
use weft_core::{
    backoff::Backoff,
    policy::{
        BackendRef, Filter, HeaderEdit, HeaderMatch, Match, ObjectRef, PathEdit, PathMatch, Pattern,
        QueryMatch, Redirect, RetryPolicy, Rewrite, Rule, ServiceName, TextMatch, Timeouts,
    },
};

use super::{
    objects::Name,
    traffic::{bound, merge, retry, timeouts},
};
use crate::resources::{
    Kind,
    gateway::{self, GrpcMatch, GrpcRouteSpec, HttpMatch, HttpRouteSpec, HttpRule, NamedMatch},
    policy::TrafficPolicySpec,
    values::GatewayDuration,
};

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
    pub(crate) fn dropped(&self, reason: String) -> Rule {
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

fn http_match(spec: &HttpMatch) -> Result<Match, String> {
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

fn grpc_match(spec: &GrpcMatch) -> Result<Match, String> {
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
    try_filters(specs, prefixes)
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
fn try_filters(specs: &[gateway::Filter], prefixes: bool) -> Result<Vec<Filter>, RuleProblem> {
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

/// What is wrong with each rule of a route, by itself.
pub(super) fn http_problems(name: &Name, route: &HttpRouteSpec) -> Vec<Option<RuleProblem>> {
    let context = probe(name, Kind::HttpRoute);
    let of = |rule: &HttpRule| {
        let prefixes = are_prefixes(&rule.matches);
        problem(context.context().http(rule), &rule.filters, &rule.backend_refs, prefixes)
    };
    route.rules.iter().map(of).collect()
}

/// See [`http_problems`].
pub(super) fn grpc_problems(name: &Name, route: &GrpcRouteSpec) -> Vec<Option<RuleProblem>> {
    let context = probe(name, Kind::GrpcRoute);
    let of = |rule: &gateway::GrpcRule| {
        problem(context.context().grpc(rule), &rule.filters, &rule.backend_refs, false)
    };
    route.rules.iter().map(of).collect()
}

/// Why a rule does not do what it says: it was dropped, or answers 500.
fn problem(
    compiled: Result<Rule, String>,
    filters: &[gateway::Filter],
    backends: &[gateway::BackendRef],
    prefixes: bool,
) -> Option<RuleProblem> {
    if let Err(message) = compiled {
        return Some(RuleProblem { reason: "UnsupportedValue", message });
    }
    let lists = std::iter::once(filters).chain(backends.iter().map(|backend| &backend.filters[..]));
    lists.map(|list| try_filters(list, prefixes)).find_map(Result::err)
}

/// Compiles rules only to hear what is wrong with them.
struct Probe {
    service: ServiceName,
    object: ObjectRef,
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

pub(crate) fn rule_name(name: Option<&str>, position: usize) -> Arc<str> {
    name.filter(|name| !name.is_empty()).map_or_else(|| position.to_string().into(), Into::into)
}

pub(crate) fn object_ref(kind: Kind, name: &Name) -> ObjectRef {
    ObjectRef { kind: kind.as_str().into(), namespace: name.0.clone(), name: name.1.clone() }
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
