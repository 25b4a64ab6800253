//! `Route`: the ordered rules of one service.
//!
//! Why backends are listed apart: a rule names services, and the sidecar must subscribe each of them once
//! before the route goes live. [`RouteResource::backends`] is that list, and the index that core's
//! `BackendRef::backend` needs is the position in it.

use std::sync::Arc;

use http::HeaderValue;
use weft_core::policy::{
    BackendRef, Filter, HeaderEdit, HeaderMatch, Match, PathEdit, PathMatch, Pattern, QueryMatch, Redirect,
    Rewrite, Rule, ServiceName, TextMatch,
};

use super::{
    Invalid, Problem,
    common::{
        At, MAX_ITEMS, MAX_LABEL, MAX_TEXT, cut, header_name, in_range, method, object, port, requires,
        retry, some_text, text, timeouts, to_object, to_retry, to_timeouts,
    },
    decode,
};
use crate::{
    names::Name,
    pb::v1::{self, route as pb},
};

/// Rules of one service: all its route objects together.
const MAX_RULES: usize = 4_096;
/// Patterns of one route: each may compile to 64 KiB.
const MAX_PATTERNS: usize = 1_024;
/// Weight of a backend (Gateway API's maximum).
const MAX_WEIGHT: u32 = 1_000_000;

/// A route, and the services that it sends to.
#[derive(Clone, Debug, Default)]
pub struct RouteResource {
    /// In order; the first match wins.
    pub rules: Vec<Rule>,
    /// Each service that a rule names, once, in order of appearance: what `BackendRef::backend` counts.
    pub backends: Vec<ServiceName>,
}

/// Reads a route.
///
/// # Errors
/// The first field that cannot be taken.
pub fn parse(body: &[u8]) -> Result<RouteResource, Invalid> {
    RouteResource::try_from(&decode::<v1::Route>("Route", body)?)
}

/// Writes a route. Timeouts and retries are written as the rules have them: whatever a service's own
/// policy adds to them, the writer has added.
pub fn to_pb<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> v1::Route {
    v1::Route { rules: rules.into_iter().map(to_rule).collect(), requires: vec!["route/v1".to_owned()] }
}

impl TryFrom<&v1::Route> for RouteResource {
    type Error = Invalid;

    fn try_from(route: &v1::Route) -> Result<Self, Invalid> {
        let at = At::root("Route");
        requires(&at, &route.requires)?;
        let mut reader = Reader::default();
        let rules = at.each("rules", &route.rules, MAX_RULES, |at, rule| reader.rule(at, rule))?;
        Ok(Self { rules, backends: reader.backends })
    }
}

impl From<&RouteResource> for v1::Route {
    fn from(route: &RouteResource) -> Self {
        to_pb(&route.rules)
    }
}

/// What is counted over a whole route while it is read.
#[derive(Default)]
struct Reader {
    backends: Vec<ServiceName>,
    patterns: usize,
}

impl Reader {
    fn rule(&mut self, at: &At<'_>, rule: &pb::Rule) -> Result<Rule, Invalid> {
        let object = object(at, rule.object.as_ref())?;
        let name = some_text(&at.field("name"), &rule.name, MAX_LABEL)?;
        Ok(Rule {
            label: format!("{object}/{name}").into(),
            object,
            name,
            hosts: at.each("hosts", &rule.hosts, MAX_ITEMS, |at, host| hostname(at, host))?,
            matches: at.each("matches", &rule.matches, MAX_ITEMS, |at, m| self.matching(at, m))?,
            filters: at.each("filters", &rule.filters, MAX_ITEMS, filter)?,
            backends: at.each("backends", &rule.backends, MAX_ITEMS, |at, b| self.backend(at, b))?,
            timeouts: timeouts(at, rule.timeouts.as_ref())?,
            retry: retry(at, rule.retry.as_ref())?,
            created: rule.created,
        })
    }

    fn matching(&mut self, at: &At<'_>, m: &pb::Match) -> Result<Match, Invalid> {
        let path = m.path.as_ref().map(|path| self.path(&at.field("path"), path)).transpose()?;
        let method = match m.method.as_str() {
            "" => None,
            name => Some(method(&at.field("method"), name)?),
        };
        let headers = at.each("headers", &m.headers, MAX_ITEMS, |at, header| {
            Ok(HeaderMatch {
                name: header_name(&at.field("name"), &header.name)?,
                value: self.text(&at.field("value"), header.value.as_ref())?,
            })
        })?;
        let query = at.each("query", &m.query, MAX_ITEMS, |at, parameter| {
            Ok(QueryMatch {
                name: some_text(&at.field("name"), &parameter.name, MAX_TEXT)?,
                value: self.text(&at.field("value"), parameter.value.as_ref())?,
            })
        })?;
        Ok(Match { path, method, headers, query })
    }

    fn path(&mut self, at: &At<'_>, path: &pb::PathMatch) -> Result<PathMatch, Invalid> {
        use pb::path_match::Kind;
        match &path.kind {
            None => Err(at.bad(Problem::Unspecified("exact, prefix, regex or grpc"))),
            Some(Kind::Exact(path)) => Ok(PathMatch::Exact(absolute(&at.field("exact"), path)?)),
            Some(Kind::Prefix(path)) => {
                let at = at.field("prefix");
                if path.len() > 1 && path.ends_with('/') {
                    return Err(at.bad(Problem::Text(cut(path), "leave the last '/' out")));
                }
                Ok(PathMatch::Prefix(absolute(&at, path)?))
            }
            Some(Kind::Regex(source)) => Ok(PathMatch::Regex(self.pattern(&at.field("regex"), source)?)),
            Some(Kind::Grpc(grpc)) => {
                let mut part = |name, value: &Option<pb::TextMatch>| {
                    value.as_ref().map(|value| self.text(&at.field(name), Some(value))).transpose()
                };
                Ok(PathMatch::Grpc {
                    service: part("service", &grpc.service)?,
                    method: part("method", &grpc.method)?,
                })
            }
        }
    }

    fn text(&mut self, at: &At<'_>, value: Option<&pb::TextMatch>) -> Result<TextMatch, Invalid> {
        use pb::text_match::Kind;
        match value.and_then(|value| value.kind.as_ref()) {
            None => Err(at.bad(Problem::Unspecified("exact or regex"))),
            Some(Kind::Exact(value)) => Ok(TextMatch::Exact(text(&at.field("exact"), value, MAX_TEXT)?)),
            Some(Kind::Regex(source)) => Ok(TextMatch::Regex(self.pattern(&at.field("regex"), source)?)),
        }
    }

    fn pattern(&mut self, at: &At<'_>, source: &str) -> Result<Pattern, Invalid> {
        self.patterns += 1;
        if self.patterns > MAX_PATTERNS {
            return Err(at.bad(Problem::TooMany { count: self.patterns, max: MAX_PATTERNS }));
        }
        if source.len() > MAX_TEXT {
            return Err(at.bad(Problem::TooLong { len: source.len(), max: MAX_TEXT }));
        }
        Pattern::new(source).map_err(|e| at.bad(e))
    }

    fn backend(&mut self, at: &At<'_>, backend: &pb::Backend) -> Result<BackendRef, Invalid> {
        let field = at.field("service");
        let name: Name = backend.service.parse().map_err(|e: crate::names::NameError| field.bad(e))?;
        let Name::Service(service) = name else {
            return Err(field.bad(Problem::NameKind(cut(&backend.service), "svc/")));
        };
        in_range(&at.field("weight"), backend.weight.into(), 0..=MAX_WEIGHT.into())?;
        let filters = at.each("filters", &backend.filters, MAX_ITEMS, filter)?;
        let known = self.backends.iter().position(|known| *known == service);
        let index = match known {
            Some(index) => index,
            None if self.backends.len() == MAX_ITEMS => {
                return Err(field.bad(Problem::TooMany { count: MAX_ITEMS + 1, max: MAX_ITEMS }));
            }
            None => {
                self.backends.push(service.clone());
                self.backends.len() - 1
            }
        };
        Ok(BackendRef { service, backend: index, weight: backend.weight, filters })
    }
}

fn hostname(at: &At<'_>, host: &str) -> Result<Arc<str>, Invalid> {
    let name = host.strip_prefix("*.").unwrap_or(host);
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    if name.is_empty() || host.len() > MAX_LABEL || !name.bytes().all(ok) {
        return Err(at.bad(Problem::Text(cut(host), "a host is lower case, '*' only as its first label")));
    }
    Ok(host.into())
}

fn absolute(at: &At<'_>, path: &str) -> Result<Arc<str>, Invalid> {
    if !path.starts_with('/') {
        return Err(at.bad(Problem::Text(cut(path), "a path starts with '/'")));
    }
    text(at, path, MAX_TEXT)
}

fn filter(at: &At<'_>, filter: &pb::Filter) -> Result<Filter, Invalid> {
    use pb::filter::Kind;
    match &filter.kind {
        None => Err(at.bad(Problem::Unspecified("a filter that this build knows, or invalid"))),
        Some(Kind::RequestHeaders(edit)) => {
            Ok(Filter::RequestHeaders(header_edit(&at.field("request_headers"), edit)?))
        }
        Some(Kind::ResponseHeaders(edit)) => {
            Ok(Filter::ResponseHeaders(header_edit(&at.field("response_headers"), edit)?))
        }
        Some(Kind::Redirect(r)) => {
            let at = at.field("redirect");
            let scheme = match r.scheme.as_deref() {
                None => None,
                Some(scheme @ ("http" | "https")) => Some(scheme.into()),
                Some(other) => {
                    return Err(at.field("scheme").bad(Problem::Text(cut(other), "say http or https")));
                }
            };
            let status = r.status;
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                let problem = Problem::OutOfRange { value: status.into(), min: 301, max: 308 };
                return Err(at.field("status").bad(problem));
            }
            Ok(Filter::Redirect(Redirect {
                scheme,
                host: authority(&at.field("host"), r.host.as_deref())?,
                path: path_edit(&at.field("path"), r.path.as_ref())?,
                port: r.port.map(|p| port(&at.field("port"), p)).transpose()?,
                status: status as u16,
            }))
        }
        Some(Kind::Rewrite(r)) => {
            let at = at.field("rewrite");
            Ok(Filter::Rewrite(Rewrite {
                host: authority(&at.field("host"), r.host.as_deref())?,
                path: path_edit(&at.field("path"), r.path.as_ref())?,
            }))
        }
        Some(Kind::Invalid(reason)) => {
            Ok(Filter::Invalid { reason: text(&at.field("invalid"), reason, MAX_TEXT)? })
        }
    }
}

fn header_edit(at: &At<'_>, edit: &pb::HeaderEdit) -> Result<HeaderEdit, Invalid> {
    let header = |at: &At<'_>, header: &pb::Header| {
        let at_value = at.field("value");
        if header.value.len() > MAX_TEXT {
            return Err(at_value.bad(Problem::TooLong { len: header.value.len(), max: MAX_TEXT }));
        }
        let value = HeaderValue::from_bytes(&header.value);
        Ok((
            header_name(&at.field("name"), &header.name)?,
            value.map_err(|_| at_value.bad(Problem::HeaderValue))?,
        ))
    };
    Ok(HeaderEdit {
        set: at.each("set", &edit.set, MAX_ITEMS, header)?,
        add: at.each("add", &edit.add, MAX_ITEMS, header)?,
        remove: at.each("remove", &edit.remove, MAX_ITEMS, |at, name| header_name(at, name))?,
    })
}

/// A host that goes into a header: nothing that could end it there.
fn authority(at: &At<'_>, host: Option<&str>) -> Result<Option<Arc<str>>, Invalid> {
    let Some(host) = host else { return Ok(None) };
    let ok = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b);
    if host.is_empty() || host.len() > MAX_LABEL || !host.bytes().all(ok) {
        return Err(at.bad(Problem::Text(cut(host), "write a host name, with a port if need be")));
    }
    Ok(Some(host.into()))
}

/// A path that goes into a request line: nothing that could end it there, or begin a query.
fn path_edit(at: &At<'_>, edit: Option<&pb::PathEdit>) -> Result<Option<PathEdit>, Invalid> {
    use pb::path_edit::Kind;
    let path = |at: &At<'_>, path: &str| {
        let ok = |b: u8| b.is_ascii_graphic() && b != b'?' && b != b'#';
        if path.len() > MAX_TEXT {
            return Err(at.bad(Problem::TooLong { len: path.len(), max: MAX_TEXT }));
        }
        if !path.bytes().all(ok) || !(path.is_empty() || path.starts_with('/')) {
            return Err(at.bad(Problem::Text(cut(path), "start with '/' and percent-encode the rest")));
        }
        Ok(Arc::from(path))
    };
    let Some(edit) = edit else { return Ok(None) };
    match &edit.kind {
        None => Err(at.bad(Problem::Unspecified("full or prefix"))),
        Some(Kind::Full(full)) => Ok(Some(PathEdit::Full(path(&at.field("full"), full)?))),
        Some(Kind::Prefix(prefix)) => Ok(Some(PathEdit::Prefix(path(&at.field("prefix"), prefix)?))),
    }
}

fn to_rule(rule: &Rule) -> pb::Rule {
    pb::Rule {
        matches: rule.matches.iter().map(to_match).collect(),
        filters: rule.filters.iter().map(to_filter).collect(),
        backends: rule
            .backends
            .iter()
            .map(|backend| pb::Backend {
                service: Name::Service(backend.service.clone()).to_string(),
                weight: backend.weight.min(MAX_WEIGHT),
                filters: backend.filters.iter().map(to_filter).collect(),
            })
            .collect(),
        timeouts: to_timeouts(&rule.timeouts),
        retry: to_retry(&rule.retry),
        name: rule.name.to_string(),
        object: to_object(&rule.object),
        hosts: rule.hosts.iter().map(ToString::to_string).collect(),
        created: rule.created,
    }
}

fn to_match(m: &Match) -> pb::Match {
    use pb::path_match::Kind;
    let path = m.path.as_ref().map(|path| match path {
        PathMatch::Exact(path) => Kind::Exact(path.to_string()),
        PathMatch::Prefix(path) => Kind::Prefix(path.to_string()),
        PathMatch::Regex(pattern) => Kind::Regex(pattern.source().to_owned()),
        PathMatch::Grpc { service, method } => Kind::Grpc(pb::Grpc {
            service: service.as_ref().map(to_text),
            method: method.as_ref().map(to_text),
        }),
    });
    pb::Match {
        path: path.map(|kind| pb::PathMatch { kind: Some(kind) }),
        method: m.method.as_ref().map(|method| method.as_str().to_owned()).unwrap_or_default(),
        headers: m
            .headers
            .iter()
            .map(|h| pb::HeaderMatch { name: h.name.as_str().to_owned(), value: Some(to_text(&h.value)) })
            .collect(),
        query: m
            .query
            .iter()
            .map(|q| pb::QueryMatch { name: q.name.to_string(), value: Some(to_text(&q.value)) })
            .collect(),
    }
}

fn to_text(value: &TextMatch) -> pb::TextMatch {
    use pb::text_match::Kind;
    let kind = match value {
        TextMatch::Exact(value) => Kind::Exact(value.to_string()),
        TextMatch::Regex(pattern) => Kind::Regex(pattern.source().to_owned()),
    };
    pb::TextMatch { kind: Some(kind) }
}

fn to_filter(filter: &Filter) -> pb::Filter {
    use pb::filter::Kind;
    let kind = match filter {
        Filter::RequestHeaders(edit) => Kind::RequestHeaders(to_header_edit(edit)),
        Filter::ResponseHeaders(edit) => Kind::ResponseHeaders(to_header_edit(edit)),
        Filter::Redirect(r) => Kind::Redirect(pb::Redirect {
            scheme: r.scheme.as_deref().map(ToOwned::to_owned),
            host: r.host.as_deref().map(ToOwned::to_owned),
            path: r.path.as_ref().map(to_path_edit),
            port: r.port.map(Into::into),
            status: r.status.into(),
        }),
        Filter::Rewrite(r) => Kind::Rewrite(pb::Rewrite {
            host: r.host.as_deref().map(ToOwned::to_owned),
            path: r.path.as_ref().map(to_path_edit),
        }),
        Filter::Invalid { reason } => Kind::Invalid(reason.to_string()),
    };
    pb::Filter { kind: Some(kind) }
}

fn to_header_edit(edit: &HeaderEdit) -> pb::HeaderEdit {
    let headers = |headers: &[(http::HeaderName, HeaderValue)]| {
        headers
            .iter()
            .map(|(name, value)| pb::Header {
                name: name.as_str().to_owned(),
                value: bytes::Bytes::copy_from_slice(value.as_bytes()),
            })
            .collect()
    };
    pb::HeaderEdit {
        set: headers(&edit.set),
        add: headers(&edit.add),
        remove: edit.remove.iter().map(|name| name.as_str().to_owned()).collect(),
    }
}

fn to_path_edit(edit: &PathEdit) -> pb::PathEdit {
    use pb::path_edit::Kind;
    let kind = match edit {
        PathEdit::Full(path) => Kind::Full(path.to_string()),
        PathEdit::Prefix(path) => Kind::Prefix(path.to_string()),
    };
    pb::PathEdit { kind: Some(kind) }
}
