//! Who may ask for what: deny rules, then allow rules, then the default.
//!
//! Everything here fails closed. A deny rule that cannot be decided denies (an opaque connection has no
//! method or path to compare), an allow rule that cannot be decided allows nothing. Paths are compared
//! only in one canonical form, and a request whose path is not canonical is refused as soon as a rule
//! looks at it: matching one form and forwarding another is how path rules are bypassed.
//!
//! Several values of one header: an allow rule needs all of them to match, a deny rule any.

use std::{borrow::Cow, net::IpAddr};

use http::{HeaderMap, HeaderName, Method};

use crate::{
    identity::SpiffeId,
    path::{NotCanonical, canonical_path, ends_with_ignore_case, percent_decode},
    policy::{Action, Authorization, AuthzRule, HttpMatch, Probe, SourceMatch, StringMatch},
};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// The authenticated identity; `None`: plaintext.
    pub identity: Option<&'a SpiffeId>,
    /// The peer's address.
    pub address: IpAddr,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub enum Ask<'a> {
    /// One request.
    Http {
        /// Method.
        method: &'a Method,
        /// Authority without port.
        host: &'a str,
        /// Path without query, as it will be forwarded.
        path: &'a str,
        /// Headers.
        headers: &'a HeaderMap,
    },
    /// A connection whose content is not understood.
    Opaque,
}

/// Whether a request is one that the pod's own spec asks of its app. It must be no upgrade: what follows one is not
/// looked at.
pub fn is_probe(probes: &[Probe], method: &Method, path_and_query: &str) -> bool {
    probes.iter().any(|probe| match probe {
        Probe::Get(path) => method == Method::GET && **path == *path_and_query,
        Probe::GrpcHealth => method == Method::POST && path_and_query == GRPC_HEALTH,
    })
}

/// The decision.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// Let it pass.
    Permit {
        /// The rule that allowed it; `None`: the default.
        rule: Option<&'a AuthzRule>,
    },
    /// Refuse it.
    Deny {
        /// The rule that denied it, if one did.
        rule: Option<&'a AuthzRule>,
        /// Why.
        reason: DenyReason,
    },
}

/// Why a request or connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// A deny rule matches.
    DenyRule,
    /// A deny rule would have to look at HTTP, and this is an opaque connection.
    DenyRuleNeedsHttp,
    /// No rule allows it, and the default is to deny.
    NoRuleAllows,
    /// A rule looks at the path, and the path is not in canonical form.
    Path(NotCanonical),
}

/// Decides.
pub fn authorize<'a>(policy: &'a Authorization, peer: &Peer<'_>, ask: &Ask<'_>) -> Verdict<'a> {
    let mut path = Path::Unread;
    for action in [Action::Deny, Action::Allow] {
        let rules = policy.rules.iter().filter(|rule| rule.action == action);
        for rule in rules.filter(|rule| from(rule, peer)) {
            let held = match (ask, rule.http.is_empty()) {
                (_, true) => true,
                (Ask::Opaque, false) if action == Action::Deny => {
                    return Verdict::Deny { rule: Some(rule), reason: DenyReason::DenyRuleNeedsHttp };
                }
                (Ask::Opaque, false) => false,
                (Ask::Http { .. }, false) => match asks_any(&rule.http, action, ask, &mut path) {
                    Ok(held) => held,
                    Err(bad) => return Verdict::Deny { rule: Some(rule), reason: DenyReason::Path(bad) },
                },
            };
            if held {
                return match action {
                    Action::Allow => Verdict::Permit { rule: Some(rule) },
                    Action::Deny => Verdict::Deny { rule: Some(rule), reason: DenyReason::DenyRule },
                };
            }
        }
    }
    match policy.default {
        Action::Allow => Verdict::Permit { rule: None },
        Action::Deny => Verdict::Deny { rule: None, reason: DenyReason::NoRuleAllows },
    }
}

/// A request's path, read when the first rule asks for it.
enum Path<'a> {
    Unread,
    Read(Cow<'a, [u8]>),
}

fn from(rule: &AuthzRule, peer: &Peer<'_>) -> bool {
    rule.sources.is_empty() || rule.sources.iter().any(|source| source.holds(peer))
}

fn asks_any<'p>(
    any: &[HttpMatch],
    action: Action,
    ask: &Ask<'p>,
    path: &mut Path<'p>,
) -> Result<bool, NotCanonical> {
    for http in any {
        if http.holds(action, ask, path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Authorization {
    /// Whether any rule looks at paths: then a path that is not canonical may be refused.
    pub fn looks_at_paths(&self) -> bool {
        self.rules.iter().flat_map(|rule| &rule.http).any(|http| !http.paths.is_empty())
    }

    /// Whether any rule looks at HTTP: then an opaque connection is decided without what it says.
    pub fn needs_http(&self) -> bool {
        self.rules.iter().any(|rule| !rule.http.is_empty())
    }
}

impl Verdict<'_> {
    /// Whether it may pass.
    pub fn is_permit(&self) -> bool {
        matches!(self, Self::Permit { .. })
    }
}

impl DenyReason {
    /// A short name, for labels and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::DenyRule => "deny-rule",
            Self::DenyRuleNeedsHttp => "deny-rule-needs-http",
            Self::NoRuleAllows => "no-rule-allows",
            Self::Path(_) => "path-not-canonical",
        }
    }
}

impl SourceMatch {
    /// Whether the peer is meant: all that is set must hold.
    pub fn holds(&self, peer: &Peer<'_>) -> bool {
        let is = |want: &Option<StringMatch>, of: fn(&SpiffeId) -> &str| {
            want.as_ref().is_none_or(|want| peer.identity.is_some_and(|id| want.is_match(of(id))))
        };
        let none_of = |unwanted: &[StringMatch], of: fn(&SpiffeId) -> &str| {
            peer.identity.is_none_or(|id| !unwanted.iter().any(|un| un.is_match(of(id))))
        };
        is(&self.identity, SpiffeId::as_str)
            && is(&self.namespace, SpiffeId::namespace)
            && is(&self.trust_domain, SpiffeId::trust_domain)
            && self.cidr.is_none_or(|cidr| cidr.contains(&peer.address.to_canonical()))
            && none_of(&self.not_identities, SpiffeId::as_str)
            && none_of(&self.not_namespaces, SpiffeId::namespace)
    }
}

impl HttpMatch {
    fn holds<'p>(&self, action: Action, ask: &Ask<'p>, read: &mut Path<'p>) -> Result<bool, NotCanonical> {
        let Ask::Http { method, host, path, headers } = *ask else {
            return Ok(false);
        };
        if !self.methods.is_empty() && !self.methods.contains(method) {
            return Ok(false);
        }
        if !self.hosts.is_empty() && !self.hosts.iter().any(|want| host_is(want, host)) {
            return Ok(false);
        }
        if !self.headers.iter().all(|(name, want)| header_is(name, want, headers, action)) {
            return Ok(false);
        }
        if self.paths.is_empty() {
            return Ok(true);
        }
        if matches!(read, Path::Unread) {
            canonical_path(path)?;
            *read = Path::Read(percent_decode(path));
        }
        let Path::Read(decoded) = read else {
            return Ok(false);
        };
        // A policy may be written either way: `/a b` or `/a%20b`.
        Ok(self.paths.iter().any(|want| want.is_match_bytes(decoded) || want.is_match(path)))
    }
}

fn host_is(want: &StringMatch, host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    match want {
        StringMatch::Exact(want) => host.eq_ignore_ascii_case(want),
        StringMatch::Prefix(want) => {
            host.as_bytes().get(..want.len()).is_some_and(|head| head.eq_ignore_ascii_case(want.as_bytes()))
        }
        StringMatch::Suffix(want) => ends_with_ignore_case(host, want),
        StringMatch::Present => !host.is_empty(),
    }
}

fn header_is(name: &HeaderName, want: &StringMatch, headers: &HeaderMap, action: Action) -> bool {
    let mut values = headers.get_all(name).iter().map(|value| value.as_bytes()).peekable();
    if values.peek().is_none() {
        return false;
    }
    match action {
        Action::Allow => values.all(|value| want.is_match_bytes(value)),
        Action::Deny => values.any(|value| want.is_match_bytes(value)),
    }
}

/// Of the gRPC health checking protocol.
const GRPC_HEALTH: &str = "/grpc.health.v1.Health/Check";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::ObjectRef;

    fn rule(action: Action, sources: Vec<SourceMatch>, http: Vec<HttpMatch>) -> AuthzRule {
        let object =
            ObjectRef { kind: "AuthorizationPolicy".into(), namespace: "ns".into(), name: "p".into() };
        AuthzRule { object, action, sources, http }
    }

    fn policy(default: Action, rules: Vec<AuthzRule>) -> Authorization {
        Authorization { default, rules, generation: 1 }
    }

    fn exact(text: &str) -> StringMatch {
        StringMatch::Exact(text.into())
    }

    fn prefix(text: &str) -> StringMatch {
        StringMatch::Prefix(text.into())
    }

    fn id(namespace: &str, account: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap()
    }

    fn of(identity: &str) -> SourceMatch {
        SourceMatch { identity: Some(exact(identity)), ..Default::default() }
    }

    fn paths(paths: &[StringMatch]) -> HttpMatch {
        HttpMatch { paths: paths.to_vec(), ..Default::default() }
    }

    struct Call {
        method: Method,
        host: &'static str,
        path: String,
        headers: HeaderMap,
    }

    fn get(path: &str) -> Call {
        Call { method: Method::GET, host: "web.shop", path: path.to_owned(), headers: HeaderMap::new() }
    }

    fn ask<'a>(policy: &'a Authorization, who: Option<&SpiffeId>, call: &Call) -> Verdict<'a> {
        let peer = Peer { identity: who, address: "10.0.0.9".parse().unwrap() };
        let Call { method, host, path, headers } = call;
        authorize(policy, &peer, &Ask::Http { method, host, path, headers })
    }

    fn opaque<'a>(policy: &'a Authorization, who: Option<&SpiffeId>) -> Verdict<'a> {
        authorize(policy, &Peer { identity: who, address: "10.0.0.9".parse().unwrap() }, &Ask::Opaque)
    }

    fn reason(verdict: Verdict<'_>) -> Option<DenyReason> {
        match verdict {
            Verdict::Permit { .. } => None,
            Verdict::Deny { reason, .. } => Some(reason),
        }
    }

    #[test]
    fn the_default_decides_when_no_rule_does() {
        let web = id("shop", "web");
        assert!(ask(&policy(Action::Allow, vec![]), None, &get("/")).is_permit());
        assert_eq!(
            reason(ask(&policy(Action::Deny, vec![]), Some(&web), &get("/"))),
            Some(DenyReason::NoRuleAllows)
        );
        assert!(!opaque(&policy(Action::Deny, vec![]), Some(&web)).is_permit());
    }

    #[test]
    fn identities_are_compared_whole() {
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![of(id("shop", "pay").as_str())], vec![])]);
        assert!(ask(&p, Some(&id("shop", "pay")), &get("/")).is_permit());
        assert!(!ask(&p, Some(&id("shop", "payments")), &get("/")).is_permit());
        assert!(!ask(&p, Some(&id("shop2", "pay")), &get("/")).is_permit());
        assert!(!ask(&p, None, &get("/")).is_permit());
        assert!(opaque(&p, Some(&id("shop", "pay"))).is_permit());
    }

    #[test]
    fn deny_comes_before_allow_whatever_the_order() {
        let allow = rule(Action::Allow, vec![], vec![]);
        let deny = rule(Action::Deny, vec![of(id("a", "b").as_str())], vec![]);
        for rules in [vec![allow.clone(), deny.clone()], vec![deny, allow]] {
            let p = policy(Action::Allow, rules);
            assert_eq!(reason(ask(&p, Some(&id("a", "b")), &get("/"))), Some(DenyReason::DenyRule));
            assert!(ask(&p, Some(&id("a", "c")), &get("/")).is_permit());
        }
    }

    #[test]
    fn all_parts_of_a_source_must_hold() {
        let source = SourceMatch {
            namespace: Some(exact("shop")),
            trust_domain: Some(exact("cluster.local")),
            cidr: Some("10.0.0.0/24".parse().unwrap()),
            not_identities: vec![exact(id("shop", "bad").as_str())],
            ..Default::default()
        };
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![source], vec![])]);
        assert!(ask(&p, Some(&id("shop", "web")), &get("/")).is_permit());
        assert!(!ask(&p, Some(&id("shop", "bad")), &get("/")).is_permit());
        assert!(!ask(&p, Some(&id("other", "web")), &get("/")).is_permit());
        assert!(!ask(&p, None, &get("/")).is_permit());
        let mapped = Peer { identity: Some(&id("shop", "web")), address: "::ffff:10.0.0.9".parse().unwrap() };
        assert!(authorize(&p, &mapped, &Ask::Opaque).is_permit());
        let elsewhere = Peer { identity: Some(&id("shop", "web")), address: "10.0.1.9".parse().unwrap() };
        assert!(!authorize(&p, &elsewhere, &Ask::Opaque).is_permit());
        let foreign: SpiffeId = "spiffe://other.local/ns/shop/sa/web".parse().unwrap();
        assert!(!ask(&p, Some(&foreign), &get("/")).is_permit());
        // A caller without identity is not excluded by "not these".
        let not = SourceMatch { not_namespaces: vec![exact("shop")], ..Default::default() };
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![not], vec![])]);
        assert!(ask(&p, None, &get("/")).is_permit());
        assert!(!ask(&p, Some(&id("shop", "web")), &get("/")).is_permit());
    }

    #[test]
    fn opaque_connections_fail_closed() {
        let web = id("shop", "web");
        let http = || vec![paths(&[prefix("/api/")])];
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![], http())]);
        assert_eq!(reason(opaque(&p, Some(&web))), Some(DenyReason::NoRuleAllows));
        let p = policy(Action::Allow, vec![rule(Action::Deny, vec![], http())]);
        assert_eq!(reason(opaque(&p, Some(&web))), Some(DenyReason::DenyRuleNeedsHttp));
        // The deny rule is about somebody else.
        let p = policy(Action::Allow, vec![rule(Action::Deny, vec![of(id("x", "y").as_str())], http())]);
        assert!(opaque(&p, Some(&web)).is_permit());
        assert!(p.needs_http() && p.looks_at_paths());
        // A rule that does not look at HTTP decides about bytes too.
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![], vec![])]);
        assert!(opaque(&p, Some(&web)).is_permit() && !p.needs_http() && !p.looks_at_paths());
    }

    #[test]
    fn a_rule_may_ask_that_there_is_a_host() {
        let http = HttpMatch { hosts: vec![StringMatch::Present], ..Default::default() };
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![], vec![http])]);
        let nameless = Call { host: "", ..get("/") };
        assert!(ask(&p, None, &get("/")).is_permit() && !ask(&p, None, &nameless).is_permit());
    }

    #[test]
    fn reasons_have_short_names() {
        let names = [
            DenyReason::DenyRule,
            DenyReason::DenyRuleNeedsHttp,
            DenyReason::NoRuleAllows,
            DenyReason::Path(NotCanonical::DotSegment),
        ]
        .map(|reason| reason.name());
        assert_eq!(names, ["deny-rule", "deny-rule-needs-http", "no-rule-allows", "path-not-canonical"]);
    }

    #[test]
    fn methods_hosts_and_headers() {
        let http = HttpMatch {
            methods: vec![Method::GET],
            hosts: vec![exact("WEB.shop"), StringMatch::Suffix(".example.com".into())],
            headers: vec![(HeaderName::from_static("x-team"), exact("a"))],
            ..Default::default()
        };
        let allow = policy(Action::Deny, vec![rule(Action::Allow, vec![], vec![http.clone()])]);
        let deny = policy(Action::Allow, vec![rule(Action::Deny, vec![], vec![http])]);
        let mut call = get("/");
        assert!(!ask(&allow, None, &call).is_permit() && ask(&deny, None, &call).is_permit());
        call.headers.append("x-team", "a".parse().unwrap());
        assert!(ask(&allow, None, &call).is_permit() && !ask(&deny, None, &call).is_permit());
        call.host = "Api.Example.com.";
        assert!(ask(&allow, None, &call).is_permit() && !ask(&deny, None, &call).is_permit());
        // A second value: allow needs all, deny needs one.
        call.headers.append("x-team", "b".parse().unwrap());
        assert!(!ask(&allow, None, &call).is_permit() && !ask(&deny, None, &call).is_permit());
        call.method = Method::POST;
        assert!(!ask(&allow, None, &call).is_permit() && ask(&deny, None, &call).is_permit());
        assert!(!allow.looks_at_paths());
    }

    #[test]
    fn paths_in_one_form_only() {
        let p = policy(Action::Allow, vec![rule(Action::Deny, vec![], vec![paths(&[prefix("/admin")])])]);
        assert!(ask(&p, None, &get("/public")).is_permit());
        assert_eq!(reason(ask(&p, None, &get("/admin/x"))), Some(DenyReason::DenyRule));
        for bad in [
            "//admin",
            "/public/../admin",
            "/./admin",
            "/%61dmin",
            "/%2561dmin",
            "/public/%2e%2e/admin",
            "/public%2f..%2fadmin",
            "/public%2F",
            "/public\\..\\admin",
            "/public%5cadmin",
            "/public;x=1/admin",
            "/public%3b",
            "/public%00",
            "/public/..",
            "/public/.",
            "/public%",
            "/public%2",
            "/public%zz",
            "public",
            "",
            "/a b",
            "/ä",
            "/a#b",
            "/a\u{1}",
        ] {
            let verdict = ask(&p, None, &get(bad));
            assert!(matches!(reason(verdict), Some(DenyReason::Path(_))), "{bad:?}: {verdict:?}");
        }
    }

    #[test]
    fn odd_paths_pass_where_no_rule_looks_at_them() {
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![], vec![])]);
        assert!(ask(&p, None, &get("//x/../y")).is_permit());
        // Only rules about this caller look.
        let http = vec![paths(&[prefix("/admin")])];
        let p = policy(Action::Allow, vec![rule(Action::Deny, vec![of(id("a", "b").as_str())], http)]);
        assert!(ask(&p, None, &get("//x")).is_permit());
        assert!(!ask(&p, Some(&id("a", "b")), &get("//x")).is_permit());
    }

    #[test]
    fn escapes_are_compared_decoded() {
        let p = policy(
            Action::Allow,
            vec![rule(Action::Deny, vec![], vec![paths(&[exact("/a@b"), exact("/x%20y")])])],
        );
        for denied in ["/a@b", "/a%40b", "/x%20y"] {
            assert!(!ask(&p, None, &get(denied)).is_permit(), "{denied}");
        }
        let p = policy(Action::Allow, vec![rule(Action::Deny, vec![], vec![paths(&[prefix("/café")])])]);
        assert!(
            !ask(&p, None, &get("/caf%C3%A9")).is_permit() && !ask(&p, None, &get("/caf%c3%a9")).is_permit()
        );
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "it is time that is measured")]
    fn a_thousand_rules_are_gone_through_in_microseconds() {
        use std::time::Instant;
        let rules = |n: usize| {
            let (who, path) = (format!("spiffe://cluster.local/ns/shop/sa/caller-{n}"), format!("/api/{n}/"));
            rule(Action::Allow, vec![of(&who)], vec![paths(&[prefix(&path)])])
        };
        let policy = policy(Action::Deny, (0..1_000).map(rules).collect());
        // The last one alone allows it.
        let (who, call) = (id("shop", "caller-999"), get("/api/999/x"));
        let mut best = f64::MAX;
        for _ in 0..20 {
            let begun = Instant::now();
            for _ in 0..50 {
                assert!(std::hint::black_box(ask(&policy, Some(&who), &call)).is_permit());
            }
            best = best.min((Instant::now() - begun).as_secs_f64() * 1e6 / 50.0);
        }
        println!(
            "figure: the last of 1000 authorization rules decides after {best:.1} us (bound 20 in a release build)"
        );
        assert!(best < if cfg!(debug_assertions) { 2_000.0 } else { 20.0 }, "{best}");
    }

    proptest! {
        /// Whatever decodes to a denied path is denied.
        #[test]
        fn no_spelling_escapes_a_deny_rule(upper in any::<bool>(), escape in prop::collection::vec(any::<bool>(), 6), tail in "[ -~]{0,12}") {
            let p = policy(Action::Allow, vec![rule(Action::Deny, vec![], vec![paths(&[prefix("/admin")])])]);
            let spelled: String = "/admin".chars().zip(&escape).map(|(c, &escape)| match (escape, upper) {
                (false, _) => c.to_string(),
                (true, false) => format!("%{:02x}", c as u32),
                (true, true) => format!("%{:02X}", c as u32),
            }).collect();
            let call = get(&(spelled + &tail));
            prop_assert!(!ask(&p, None, &call).is_permit());
        }
    }

    #[test]
    fn a_probe_is_exactly_what_the_pods_spec_asks() {
        let probes = [Probe::Get("/healthz?full=1".into()), Probe::GrpcHealth];
        assert!(is_probe(&probes, &Method::GET, "/healthz?full=1"));
        assert!(is_probe(&probes, &Method::POST, "/grpc.health.v1.Health/Check"));
        for (method, path) in [
            (Method::GET, "/healthz"),
            (Method::GET, "/healthz?full=1&x"),
            (Method::GET, "/healthz?full=1/.."),
            (Method::GET, "//healthz?full=1"),
            (Method::GET, "/%68ealthz?full=1"),
            (Method::GET, "/Healthz?full=1"),
            (Method::POST, "/healthz?full=1"),
            (Method::HEAD, "/healthz?full=1"),
            (Method::GET, "/grpc.health.v1.Health/Check"),
            (Method::POST, "/grpc.health.v1.Health/Watch"),
            (Method::POST, "/grpc.health.v1.Health/Check?"),
        ] {
            assert!(!is_probe(&probes, &method, path), "{method} {path}");
        }
        assert!(!is_probe(&[], &Method::GET, "/"));
    }
}
