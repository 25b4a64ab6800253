//! Policy as it comes from the controller, and what it makes of requests as they come from strangers.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, uri::PathAndQuery};
use prost::Message as _;
use weft_core::{
    authz::{self, Ask, Peer, Verdict},
    identity::SpiffeId,
    path::canonical_path,
    policy::{
        Action, Authorization, AuthzRule, Filter, Match, ObjectRef, PathEdit, PathMatch, Rule, Service,
    },
    route::{self, RequestHead, RouteTable},
};
use weft_proto::{
    convert,
    pb::v1::{self, authorization as pa, route as pr},
};

use crate::engine::{Shape, Target, frame, framed, hash};

/// What is taken can be written and read again to the same; what is not taken names its field.
pub(crate) const CONVERT: Target =
    Target { name: "convert", run: converted, seeds: messages, words: WORDS, shape: Shape::Message };

/// The rule that is found holds, none is found only if none holds, however large the table is; what a rewrite or
/// redirect makes can be sent.
pub(crate) const ROUTE: Target =
    Target { name: "route", run: routed, seeds: routes, words: WORDS, shape: Shape::MessageAndText };

/// Nothing is permitted that no rule and no default permits, and no order of rules changes that.
pub(crate) const AUTHZ: Target = Target {
    name: "authz",
    run: authorized,
    seeds: authorizations,
    words: WORDS,
    shape: Shape::MessageAndText,
};

const WORDS: &[&[u8]] = &[
    b"/",
    b"//",
    b"/../",
    b"/./",
    b"%2f",
    b"%2e%2e",
    b"%25",
    b"%00",
    b";",
    b"\\",
    b"?",
    b"#",
    b"*",
    b"*.",
    b".",
    b"GET",
    b"POST",
    b"/a",
    b"/a/b",
    b"a.example",
    b"x-user: admin\n",
    b"spiffe://cluster.local/ns/shop/sa/web",
    b"10.0.0.0/8",
    b"::/0",
    b"route/v1",
    b"authz/v1",
    b"svc/shop/cart:80",
    b"(a+)+$",
    b"\xc3\xa9",
    b"\r\nx: y",
];

// ---- messages

fn converted(input: &[u8]) -> u64 {
    let Some((family, body)) = input.split_first() else { return 0 };
    // What is taken, written again; `None` of the error is what it says.
    let parse = |body: &[u8]| -> Result<Vec<u8>, convert::Invalid> {
        Ok(match family % 6 {
            0 => v1::Service::from(&convert::service::parse(body)?).encode_to_vec(),
            1 => v1::Route::from(&convert::route::parse(body)?).encode_to_vec(),
            2 => convert::endpoint::to_pb(&convert::endpoint::parse(body, "shop")?).encode_to_vec(),
            3 => v1::Authorization::from(&convert::authz::parse(body)?).encode_to_vec(),
            4 => v1::TrustBundle::from(&convert::trust::parse(body)?).encode_to_vec(),
            _ => v1::WorkloadConfig::from(&convert::workload::parse(body)?).encode_to_vec(),
        })
    };
    let kind = u64::from(family % 6);
    match parse(body) {
        Ok(written) => {
            let again = parse(&written);
            assert!(again.is_ok(), "what was taken is not taken again: {again:?}");
            assert_eq!(again, Ok(written.clone()), "another value came back");
            (kind << 32) | ((written.len() as u64) / 16)
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!error.field.is_empty() && text.len() < 4_096, "an error that does not help: {text:?}");
            assert!(!text.contains(['\n', '\r', '\0']), "an error that forges a log line: {text:?}");
            // Field and problem, without positions and what is quoted.
            let place: String = error.field.chars().filter(|c| !c.is_ascii_digit()).collect();
            let problem = format!("{:?}", error.problem);
            let problem = problem.split(['(', '{']).next().unwrap_or_default();
            hash(format!("{place} {problem}").as_bytes()) | 1 << 63
        }
    }
}

fn messages() -> Vec<Vec<u8>> {
    let endpoint = v1::Endpoint {
        address: Bytes::from_static(&[10, 0, 0, 1]),
        port: 8080,
        service_account: "cart".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        tunnel: v1::endpoint::Tunnel::Weft.into(),
        uid: "6f1c".to_owned(),
        ..v1::Endpoint::default()
    };
    let service = v1::Service {
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
        port: 80,
        vips: vec![Bytes::from_static(&[10, 96, 0, 1])],
        route: "route/shop/cart:80".to_owned(),
        timeouts: Some(v1::Timeouts { request_ms: Some(1_000), ..v1::Timeouts::default() }),
        retry: Some(v1::Retry {
            backoff: Some(v1::Backoff { min_ms: 10, max_ms: 100, jitter_ppm: 500_000 }),
            statuses: vec![v1::retry::StatusRange { first: 502, last: 504 }],
            ..v1::Retry::default()
        }),
        health: Some(v1::HealthPolicy { max_ejection_percent: Some(50), ..v1::HealthPolicy::default() }),
        limits: Some(v1::Limits { max_requests: Some(10), ..v1::Limits::default() }),
        pod: Some(endpoint.clone()),
        ..v1::Service::default()
    };
    let port = |port| v1::InboundPort {
        port,
        mtls: v1::inbound_port::MtlsMode::Strict.into(),
        authz: "authz/6f1c/0".to_owned(),
        ..v1::InboundPort::default()
    };
    let workload = v1::WorkloadConfig {
        identity: "spiffe://cluster.local/ns/shop/sa/cart".to_owned(),
        ports: vec![port(80)],
        default_port: Some(port(0)),
        egress: v1::workload_config::Egress::Allow.into(),
        ..v1::WorkloadConfig::default()
    };
    let der = Bytes::from_static(&[0x30, 3, 2, 1, 1]);
    let trust = v1::TrustBundle {
        roots_der: vec![der.clone()],
        sequence: 1,
        refresh_hint_s: 60,
        crls_der: vec![der],
    };
    let route = a_route().encode_to_vec();
    let authorization = an_authorization().encode_to_vec();
    let all = [
        service.encode_to_vec(),
        route,
        endpoint.encode_to_vec(),
        authorization,
        trust.encode_to_vec(),
        workload.encode_to_vec(),
    ];
    (0..).zip(all).map(|(family, body)| [&[family][..], &body].concat()).collect()
}

// ---- requests

/// A request, as text: the caller's identity and address, method host and target, headers.
struct Request {
    identity: Option<SpiffeId>,
    address: IpAddr,
    method: Method,
    host: String,
    target: PathAndQuery,
    headers: HeaderMap,
}

impl Request {
    fn read(text: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(text);
        let mut lines = text.split('\n');
        let (identity, address) = lines.next()?.split_once(' ')?;
        let mut words = lines.next()?.splitn(3, ' ');
        let (method, host, target) = (words.next()?, words.next()?, words.next()?);
        let mut headers = HeaderMap::new();
        for line in lines.take(32) {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value.trim())) {
                headers.append(name, value);
            }
        }
        Some(Self {
            identity: identity.parse().ok(),
            address: address.parse().ok()?,
            method: method.parse().ok()?,
            host: host.parse::<http::uri::Authority>().ok()?.host().to_owned(),
            // As hyper hands it on: what is no target never gets here.
            target: target.parse().ok()?,
            headers,
        })
    }
}

fn texts() -> Vec<&'static [u8]> {
    vec![
        b"spiffe://cluster.local/ns/shop/sa/web 10.0.0.9\nGET a.example /a/b?x=1\nx-user: admin",
        b"- 192.0.2.1\nPOST b.example /a/../b",
        b"- ::ffff:10.0.0.1\nGET a.example /pkg.Service/Method\nx-user: a\nx-user: b",
        b"spiffe://other/ns/shop/sa/web 10.0.0.9\nOPTIONS a.example *",
        b"spiffe://cluster.local/ns/shop/sa/web 10.0.0.9\nGET sub.a.example. /%61/b%20c;x",
    ]
}

// ---- routes

fn routed(input: &[u8]) -> u64 {
    let (message, text) = framed(input);
    let (Ok(resource), Some(request)) = (convert::route::parse(message), Request::read(text)) else {
        return 0;
    };
    let head = RequestHead {
        method: &request.method,
        host: &request.host,
        path: request.target.path(),
        query: request.target.query(),
        headers: &request.headers,
    };
    let table = RouteTable::new(resource.rules.clone());
    let found = route::find(&table, &head);
    let holding: Vec<usize> =
        (0..).zip(&resource.rules).filter(|(_, rule)| holds(rule, &head)).map(|(n, _)| n).collect();
    match &found {
        None => assert!(holding.is_empty(), "rules {holding:?} hold, and none was found"),
        Some(found) => {
            assert!(holding.contains(&found.index), "rule {} does not hold, {holding:?} do", found.index)
        }
    }
    // Larger tables are searched in another way, to the same end.
    let mut many = resource.rules;
    for n in 0..12_u8 {
        let mut rule = never(n);
        rule.created = u64::from(n);
        many.push(rule);
    }
    let many = RouteTable::new(many);
    let again = route::find(&many, &head);
    assert_eq!(again.map(|f| (f.index, f.prefix)), found.map(|f| (f.index, f.prefix)), "in a large table");
    let Some(found) = found else { return 1 };
    for filter in found.rule.filters.iter().chain(found.rule.backends.iter().flat_map(|b| &b.filters)) {
        match filter {
            Filter::Rewrite(rewrite) => {
                if let Some(edit) = &rewrite.path {
                    sendable(edit, found.prefix, head.path);
                }
            }
            Filter::Redirect(redirect) => {
                let (status, location) = route::redirect(redirect, &head, "http", 80, found.prefix);
                assert!(status.is_redirection(), "{status}");
                assert!(!location.bytes().any(|b| b.is_ascii_control()), "{location:?}");
                if let Some(edit) = &redirect.path {
                    sendable(edit, found.prefix, head.path);
                }
            }
            Filter::RequestHeaders(edit) | Filter::ResponseHeaders(edit) => {
                let mut headers = request.headers.clone();
                route::edit_headers(edit, &mut headers);
                assert!(edit.remove.iter().all(|name| !headers.contains_key(name)));
            }
            Filter::Invalid { .. } => {}
        }
    }
    2 + (found.index as u64).min(15) * 64
        + (holding.len() as u64).min(7) * 8
        + (found.rule.filters.len() as u64).min(3) * 2
        + u64::from(found.prefix.is_some())
}

/// A path that was rewritten can be sent as a path.
fn sendable(edit: &PathEdit, prefix: Option<&str>, path: &str) {
    let rewritten = route::rewrite_path(edit, prefix, path);
    let parsed: Result<PathAndQuery, _> = rewritten.parse();
    assert!(parsed.is_ok(), "{path:?} becomes {rewritten:?}");
    assert!(rewritten.starts_with('/') || path == "*", "{path:?} becomes {rewritten:?}");
}

/// By the words of the specification, without any order.
fn holds(rule: &Rule, head: &RequestHead<'_>) -> bool {
    let host =
        rule.hosts.is_empty() || rule.hosts.iter().any(|pattern| route::host_matches(pattern, head.host));
    host && (rule.matches.is_empty() || rule.matches.iter().any(|m| m.holds(head)))
}

fn never(n: u8) -> Rule {
    let service = v1::Service { namespace: "a".into(), name: "b".into(), port: 1, ..v1::Service::default() };
    let service = Service::try_from(&service).unwrap();
    let mut rule = Rule::clone(&RouteTable::to_service(&service).rules()[0]);
    let path = PathMatch::Exact(format!("/never/{n}/\u{e9}").into());
    rule.matches = vec![Match { path: Some(path), method: None, headers: Vec::new(), query: Vec::new() }];
    rule.object = ObjectRef { kind: "HTTPRoute".into(), namespace: "~".into(), name: n.to_string().into() };
    rule
}

fn routes() -> Vec<Vec<u8>> {
    let message = a_route().encode_to_vec();
    texts().into_iter().map(|text| frame(&message, text)).collect()
}

fn object() -> Option<v1::ObjectRef> {
    Some(v1::ObjectRef { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "cart".into() })
}

fn a_route() -> v1::Route {
    use pr::{
        filter::Kind as FilterKind, path_edit::Kind as Edit, path_match::Kind, text_match::Kind as TextKind,
    };
    let text = |kind| Some(pr::TextMatch { kind: Some(kind) });
    let path = |kind| Some(pr::PathMatch { kind: Some(kind) });
    let rule = |matches: Vec<pr::Match>, filters: Vec<FilterKind>, created: u64| pr::Rule {
        matches,
        filters: filters.into_iter().map(|kind| pr::Filter { kind: Some(kind) }).collect(),
        backends: vec![pr::Backend { service: "svc/shop/cart:80".into(), weight: 1, filters: Vec::new() }],
        name: created.to_string(),
        object: object(),
        created,
        ..pr::Rule::default()
    };
    let header = pr::Header { name: "x-set".into(), value: Bytes::from_static(b"1") };
    let edit = pr::HeaderEdit { set: vec![header.clone()], add: vec![header], remove: vec!["x-user".into()] };
    let mut hosted = rule(
        vec![pr::Match { path: path(Kind::Exact("/a/b".into())), ..pr::Match::default() }],
        vec![FilterKind::RequestHeaders(edit)],
        1,
    );
    hosted.hosts = vec!["*.a.example".into(), "a.example".into()];
    let rewrite = pr::Rewrite {
        host: Some("c.example".into()),
        path: Some(pr::PathEdit { kind: Some(Edit::Prefix("/z".into())) }),
    };
    let redirect = pr::Redirect {
        scheme: Some("https".into()),
        host: None,
        path: Some(pr::PathEdit { kind: Some(Edit::Full("/full".into())) }),
        port: Some(8443),
        status: 302,
    };
    let user = pr::HeaderMatch { name: "x-user".into(), value: text(TextKind::Regex("a.*".into())) };
    let query = pr::QueryMatch { name: "x".into(), value: text(TextKind::Exact("1".into())) };
    let grpc = pr::Grpc { service: text(TextKind::Exact("pkg.Service".into())), method: None };
    let matches =
        |path, method: &str, headers, query| pr::Match { path, method: method.into(), headers, query };
    v1::Route {
        rules: vec![
            hosted,
            rule(
                vec![matches(path(Kind::Prefix("/a".into())), "GET", vec![user], vec![query])],
                vec![FilterKind::Rewrite(rewrite)],
                2,
            ),
            rule(
                vec![matches(path(Kind::Regex("/b/[0-9]+".into())), "", Vec::new(), Vec::new())],
                vec![FilterKind::Redirect(redirect)],
                3,
            ),
            rule(vec![matches(path(Kind::Grpc(grpc)), "POST", Vec::new(), Vec::new())], Vec::new(), 4),
            rule(Vec::new(), vec![FilterKind::Invalid("broken".into())], 5),
        ],
        requires: vec!["route/v1".to_owned()],
    }
}

// ---- authorization

fn authorized(input: &[u8]) -> u64 {
    let (message, text) = framed(input);
    let (Ok(policy), Some(request)) = (convert::authz::parse(message), Request::read(text)) else { return 0 };
    let peer = Peer { identity: request.identity.as_ref(), address: request.address };
    let path = request.target.path();
    let http = Ask::Http { method: &request.method, host: &request.host, path, headers: &request.headers };
    let canonical = canonical_path(path).is_ok();
    if canonical {
        assert!(means_one_thing(path), "{path:?} is called canonical");
    }
    let verdict = authz::authorize(&policy, &peer, &http);
    for ask in [&http, &Ask::Opaque] {
        consistent(&policy, &peer, ask, canonical);
    }
    match verdict {
        Verdict::Permit { rule } => 2 + u64::from(rule.is_some()) + 16 * place(&policy, rule),
        Verdict::Deny { rule, reason } => hash(reason.name().as_bytes())
            .wrapping_add(4 + u64::from(rule.is_some()) + 16 * place(&policy, rule)),
    }
}

fn place(policy: &Authorization, rule: Option<&AuthzRule>) -> u64 {
    let found = rule.and_then(|rule| policy.rules.iter().position(|other| std::ptr::eq(other, rule)));
    found.map_or(15, |n| n.min(14) as u64)
}

fn consistent(policy: &Authorization, peer: &Peer<'_>, ask: &Ask<'_>, canonical: bool) {
    let verdict = authz::authorize(policy, peer, ask);
    let opaque = matches!(ask, Ask::Opaque);
    match verdict {
        Verdict::Permit { rule: Some(rule) } => {
            assert_eq!(rule.action, Action::Allow);
            assert!(rule.sources.is_empty() || rule.sources.iter().any(|source| source.holds(peer)));
            assert!(!opaque || rule.http.is_empty(), "an opaque connection has no method");
            let looks = !rule.http.is_empty() && rule.http.iter().all(|http| !http.paths.is_empty());
            assert!(canonical || opaque || !looks, "a path that is not canonical was compared");
            let named = |source: &weft_core::policy::SourceMatch| {
                source.identity.is_some() || source.namespace.is_some() || source.trust_domain.is_some()
            };
            let needs_name = !rule.sources.is_empty() && rule.sources.iter().all(named);
            assert!(peer.identity.is_some() || !needs_name, "plaintext was taken for somebody");
        }
        Verdict::Permit { rule: None } => assert_eq!(policy.default, Action::Allow),
        Verdict::Deny { .. } => {}
    }
    // Nobody is let in by nothing.
    let with = |default, rules: Vec<AuthzRule>| Authorization {
        default,
        rules: rules.into(),
        generation: policy.generation,
    };
    let permits = |policy: &Authorization| authz::authorize(policy, peer, ask).is_permit();
    assert!(!permits(&with(Action::Deny, Vec::new())));
    let denies = policy.rules.iter().filter(|rule| rule.action == Action::Deny).cloned();
    assert!(!permits(&with(Action::Deny, denies.collect())), "deny rules allow");
    // A rule that denies everybody does, whatever else there is.
    let all = AuthzRule {
        object: ObjectRef { kind: Arc::from("A"), namespace: Arc::from("b"), name: Arc::from("c") },
        action: Action::Deny,
        sources: Vec::new(),
        http: Vec::new(),
    };
    let denied = policy.rules.iter().cloned().chain([all]).collect();
    assert!(!permits(&with(policy.default, denied)), "a deny rule was passed by");
    if canonical || opaque {
        let reversed = policy.rules.iter().rev().cloned().collect();
        assert_eq!(
            permits(&with(policy.default, reversed)),
            verdict.is_permit(),
            "the order of rules decides"
        );
    }
}

/// Decoded or not, once or twice, before or after dots are resolved: the same path.
fn means_one_thing(path: &str) -> bool {
    let once = decoded(path.as_bytes());
    let segments: Vec<&[u8]> = once.split(|b| *b == b'/').collect();
    let plain = segments.iter().all(|segment| *segment != b"." && *segment != b"..");
    let inner =
        segments.len() < 3 || segments[1..segments.len() - 1].iter().all(|segment| !segment.is_empty());
    let same_count = once.iter().filter(|b| **b == b'/').count() == path.matches('/').count();
    path == "*"
        || plain
            && inner
            && same_count
            && decoded(&once) == once
            && !once.iter().any(|b| b.is_ascii_control() || b"\\;".contains(b))
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < path.len() {
        let escape = path
            .get(at + 1..at + 3)
            .and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match escape.filter(|_| path[at] == b'%') {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(path[at]);
                at += 1;
            }
        }
    }
    out
}

fn authorizations() -> Vec<Vec<u8>> {
    let message = an_authorization().encode_to_vec();
    texts().into_iter().map(|text| frame(&message, text)).collect()
}

fn an_authorization() -> v1::Authorization {
    use v1::string_match::Kind;
    let is = |kind| v1::StringMatch { kind: Some(kind) };
    let rule = |action: pa::Action, sources, http| pa::Rule {
        object: object(),
        action: action.into(),
        sources,
        http,
    };
    let identity = pa::Source {
        identity: Some(is(Kind::Exact("spiffe://cluster.local/ns/shop/sa/web".into()))),
        not_namespaces: vec![is(Kind::Prefix("kube-".into()))],
        ..pa::Source::default()
    };
    let range = pa::Source { cidr: "10.0.0.0/8".into(), ..pa::Source::default() };
    let domain = pa::Source { trust_domain: Some(is(Kind::Present(true))), ..pa::Source::default() };
    let paths = pa::Http {
        methods: vec!["GET".into()],
        paths: vec![is(Kind::Prefix("/a/".into())), is(Kind::Exact("/b c".into()))],
        hosts: vec![is(Kind::Suffix(".example".into()))],
        headers: Vec::new(),
    };
    let admin = pa::Http {
        headers: vec![pa::HeaderMatch {
            name: "x-user".into(),
            value: Some(is(Kind::Exact("admin".into()))),
        }],
        ..pa::Http::default()
    };
    v1::Authorization {
        default: pa::Action::Deny.into(),
        rules: vec![
            rule(pa::Action::Allow, vec![identity], vec![paths]),
            rule(pa::Action::Allow, vec![range], Vec::new()),
            rule(pa::Action::Deny, vec![domain], vec![admin]),
        ],
        generation: 1,
        requires: vec!["authz/v1".to_owned()],
    }
}
