//! Who may ask for what: deny rules, then allow rules, then the default.
//!
//! Everything here fails closed. A deny rule that cannot be decided denies (an opaque connection has no
//! method or path to compare), an allow rule that cannot be decided allows nothing. Paths are compared
//! only in one canonical form, and a request whose path is not canonical is refused as soon as a rule
//! looks at it: matching one form and forwarding another is how path rules are bypassed.
//!
//! Several values of one header: an allow rule needs all of them to match, a deny rule any.
//!
//! Rules are asked one after the other; of many, [`index`](AuthzRules::indexed) names those that may have something to
//! say.

mod index;
pub(crate) mod rule;

use std::{borrow::Cow, net::IpAddr};

use http::{HeaderMap, HeaderName, Method};

pub use self::index::AuthzRules;
use self::rule::{Action, Authorization, AuthzRule, HttpMatch, Probe, SourceMatch, StringMatch};
use crate::{
    identity::SpiffeId,
    path::{NotCanonical, canonical_path, ends_with_ignore_case, percent_decode},
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

/// Whether a request is any of these; read as what restricts is, so that no other spelling of a method evades it.
///
/// # Errors
/// One of them looks at the path, and that is not in canonical form.
pub(crate) fn is_asked(any: &[HttpMatch], ask: &Ask<'_>) -> Result<bool, NotCanonical> {
    asks_any(any, Action::Deny, ask, &mut None)
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
    let mut path = None;
    let found = policy.rules.index().and_then(|index| index.find(peer, ask, &mut path));
    match found {
        Some(found) => decide(policy.default, found.of(&policy.rules), peer, ask, path),
        None => decide(policy.default, policy.rules.iter(), peer, ask, path),
    }
}

fn decide<'a, 'p>(
    default: Action,
    rules: impl Iterator<Item = &'a AuthzRule> + Clone,
    peer: &Peer<'_>,
    ask: &Ask<'p>,
    mut path: Path<'p>,
) -> Verdict<'a> {
    for action in [Action::Deny, Action::Allow] {
        let rules = rules.clone().filter(|rule| rule.action == action);
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
    match default {
        Action::Allow => Verdict::Permit { rule: None },
        Action::Deny => Verdict::Deny { rule: None, reason: DenyReason::NoRuleAllows },
    }
}

/// A request's path, decoded when the first rule asks for it. It borrows where nothing was escaped.
type Path<'a> = Option<Cow<'a, [u8]>>;

fn decoded<'p, 'a>(read: &'p mut Path<'a>, path: &'a str) -> Result<&'p Cow<'a, [u8]>, NotCanonical> {
    if read.is_none() {
        canonical_path(path)?;
    }
    Ok(read.get_or_insert_with(|| percent_decode(path)))
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
        if !self.methods.is_empty() && !self.methods.iter().any(|want| method_is(want, method, action)) {
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
        let decoded = decoded(read, path)?;
        // A policy may be written either way: `/a b` or `/a%20b`.
        let sent = matches!(decoded, Cow::Owned(_)).then_some(path);
        let is =
            |want: &StringMatch| want.is_match_bytes(decoded) || sent.is_some_and(|path| want.is_match(path));
        Ok(self.paths.iter().any(is))
    }
}

/// A name with the dot of the root means the same without.
fn without_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

fn host_is(want: &StringMatch, host: &str) -> bool {
    let host = without_dot(host);
    match want {
        StringMatch::Exact(want) => host.eq_ignore_ascii_case(want),
        StringMatch::Prefix(want) => {
            host.as_bytes().get(..want.len()).is_some_and(|head| head.eq_ignore_ascii_case(want.as_bytes()))
        }
        StringMatch::Suffix(want) => ends_with_ignore_case(host, want),
        StringMatch::Present => !host.is_empty(),
    }
}

/// Methods are case-sensitive (RFC 9110 §9.1), and many apps make `DELETE` of `delete`: what is denied is so however it is
/// spelt, what is allowed is so as it is written.
fn method_is(want: &Method, method: &Method, action: Action) -> bool {
    match action {
        Action::Allow => want == method,
        Action::Deny => want.as_str().eq_ignore_ascii_case(method.as_str()),
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
    use crate::name::ObjectRef;

    fn rule(action: Action, sources: Vec<SourceMatch>, http: Vec<HttpMatch>) -> AuthzRule {
        let object =
            ObjectRef { kind: "AuthorizationPolicy".into(), namespace: "ns".into(), name: "p".into() };
        AuthzRule { object, action, sources, http }
    }

    fn policy(default: Action, rules: Vec<AuthzRule>) -> Authorization {
        Authorization { default, rules: rules.into(), generation: 1 }
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
        // A rule that does not look at HTTP decides about bytes too.
        let p = policy(Action::Deny, vec![rule(Action::Allow, vec![], vec![])]);
        assert!(opaque(&p, Some(&web)).is_permit());
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
        // Some apps make `GET` of it: allow is exact, deny is not.
        call.headers.remove("x-team");
        call.headers.append("x-team", "a".parse().unwrap());
        call.method = Method::from_bytes(b"get").unwrap();
        assert!(!ask(&allow, None, &call).is_permit() && !ask(&deny, None, &call).is_permit());
        call.method = Method::POST;
        assert!(!ask(&allow, None, &call).is_permit() && ask(&deny, None, &call).is_permit());
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

    /// A thousand rules of one kind each, of which only the last is about the call (of the square a row).
    fn a_thousand_rules() -> Vec<(&'static str, Authorization)> {
        let who = |n: usize| format!("spiffe://cluster.local/ns/shop/sa/caller-{n:04}");
        let source = |want| vec![SourceMatch { identity: Some(want), ..Default::default() }];
        let anyone_of_shop = || source(prefix("spiffe://cluster.local/ns/shop/"));
        let api = || vec![paths(&[prefix("/api/")])];
        let resource = |n: usize| format!("/api/v1/resource-{n:04}");
        let suffix = |text: String| StringMatch::Suffix(text.into());
        let all = |of: &dyn Fn(usize) -> AuthzRule| policy(Action::Deny, (0..1_000).map(of).collect());
        let allow = |sources, http| rule(Action::Allow, sources, http);
        let deny = |http| rule(Action::Deny, vec![], http);
        let team = |n: usize| HttpMatch {
            methods: vec![Method::GET, Method::POST],
            paths: vec![prefix("/api/")],
            hosts: vec![exact("web.shop")],
            headers: vec![(HeaderName::from_static("x-team"), exact(&format!("team-{n}")))],
        };
        let own_header = |n: usize| {
            let name = if n == 999 { "x-team".to_owned() } else { format!("x-team-{n}") };
            let headers = vec![(name.parse().unwrap(), exact("team-999"))];
            HttpMatch { headers, ..paths(&[prefix("/api/")]) }
        };
        let ten =
            |n: usize| (0..10).map(|k| prefix(&format!("{}/items/{k}", resource(n)))).collect::<Vec<_>>();
        let the_last = |n: usize, this: &str| if n == 999 { this.to_owned() } else { format!("{n}-{this}") };
        let host = |n: usize| HttpMatch {
            hosts: vec![exact(&the_last(n, "Web.shop"))],
            ..paths(&[prefix("/api/")])
        };
        let range = |n: usize| SourceMatch {
            cidr: Some(format!("10.{}.{}.0/24", (999 - n) / 256, (999 - n) % 256).parse().unwrap()),
            ..Default::default()
        };
        let namespace = |n| SourceMatch {
            namespace: Some(exact(&the_last(n, "shop"))),
            trust_domain: Some(exact("cluster.local")),
            ..Default::default()
        };
        vec![
            ("an identity and a path that all share", all(&|n| allow(source(exact(&who(n))), api()))),
            ("the beginning of an identity", all(&|n| allow(source(prefix(&who(n))), vec![]))),
            ("a path's beginning", all(&|n| allow(vec![], vec![paths(&[prefix(&resource(n))])]))),
            (
                "a path, of callers that all share",
                all(&|n| allow(anyone_of_shop(), vec![paths(&[prefix(&resource(n))])])),
            ),
            (
                "a path that is denied",
                all(&|n| deny(vec![paths(&[exact(&format!("{}/items/7", resource(n)))])])),
            ),
            (
                "a path's end that is denied",
                all(&|n| deny(vec![paths(&[suffix(format!("{n:04}/items/7"))])])),
            ),
            ("a header, and all else alike", all(&|n| allow(vec![], vec![team(n)]))),
            ("a header of a name of its own", all(&|n| allow(vec![], vec![own_header(n)]))),
            ("ten paths each", all(&|n| allow(vec![], vec![paths(&ten(n))]))),
            ("a host", all(&|n| allow(vec![], vec![host(n)]))),
            ("a namespace", all(&|n| allow(vec![namespace(n)], api()))),
            ("an address range", all(&|n| allow(vec![range(n)], api()))),
            (
                "one caller and one path in a square",
                all(&|n| {
                    allow(source(exact(&who(999 - n % 32))), vec![paths(&[prefix(&resource(999 - n / 32))])])
                }),
            ),
        ]
    }

    #[test]
    fn few_rules_and_too_many_have_no_index_and_decide_alike() {
        let (who, other) = (id("shop", "web"), id("shop", "other"));
        for (count, has_index) in [(1, false), (16, false), (17, true), (4_096, true), (4_097, false)] {
            let names =
                |n: usize| id("shop", &if n + 1 == count { "web".to_owned() } else { format!("w{n}") });
            let allow = |n| rule(Action::Allow, vec![of(names(n).as_str())], vec![]);
            let mut policy = policy(Action::Deny, (0..count).map(allow).collect());
            policy.rules = policy.rules.indexed();
            assert_eq!((policy.rules.len(), policy.rules.index().is_some()), (count, has_index));
            let (place, _) = said(&policy, ask(&policy, Some(&who), &get("/")));
            assert_eq!(place, Some(count - 1), "the last of {count}");
            assert!(!ask(&policy, Some(&other), &get("/")).is_permit());
            if has_index {
                assert_eq!(rules_asked(&policy, &who, &get("//x")), 1, "no rule looks at this path");
            }
        }
    }

    fn rules_asked(policy: &Authorization, who: &SpiffeId, call: &Call) -> usize {
        let peer = Peer { identity: Some(who), address: "10.0.0.9".parse().unwrap() };
        let Call { method, host, path, headers } = call;
        let ask = Ask::Http { method, host, path, headers };
        let index = policy.rules.index().expect("a thousand are worth an index");
        index.find(&peer, &ask, &mut None).expect("no rule refuses the path").of(&policy.rules).count()
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "it is time that is measured")]
    fn a_thousand_rules_decide_in_microseconds_whatever_they_ask_for() {
        use std::time::Instant;
        let who = id("shop", "caller-0999");
        let mut calls = ["/api/v1/resource-0999/items/7", "/api/v1/resource-0999/items%207"].map(get);
        for call in &mut calls {
            call.headers.insert("x-team", "team-999".parse().unwrap());
        }
        for (what, mut policy) in a_thousand_rules() {
            policy.rules = policy.rules.indexed();
            let mut worst = 0_f64;
            for call in &calls {
                let asked = rules_asked(&policy, &who, call);
                assert!(asked <= if what.ends_with("square") { 32 } else { 1 }, "{what}: {asked} are asked");
                let time = |_| {
                    let begun = Instant::now();
                    for _ in 0..20 {
                        std::hint::black_box(ask(&policy, Some(&who), call));
                    }
                    (Instant::now() - begun).as_secs_f64() * 1e6 / 20.0
                };
                worst = worst.max((0..20).map(time).fold(f64::MAX, f64::min));
            }
            println!(
                "figure: 1000 authorization rules for {what}: {worst:.1} us (bound 20 in a release build)"
            );
            assert!(worst < if cfg!(debug_assertions) { 500.0 } else { 20.0 }, "{what}: {worst}");
        }
    }

    /// Few words, so that much of what is asked for is there; some in ways that mean the same, or nothing.
    mod few {
        use super::*;

        pub(super) fn text(words: &'static [&'static str]) -> impl Strategy<Value = StringMatch> {
            (prop::sample::select(words), 0..7).prop_map(|(word, kind)| match kind {
                0..3 => exact(word),
                3..5 => prefix(&word[..word.len().div_ceil(2)]),
                5 => StringMatch::Suffix(word[word.len() / 2..].into()),
                _ => StringMatch::Present,
            })
        }

        pub(super) const IDENTITIES: &[&str] = &[
            "spiffe://a.b/ns/x/sa/web",
            "spiffe://a.b/ns/x/sa/we",
            "spiffe://a.b/ns/y/sa/web",
            "spiffe://c/ns/xy/sa/pay",
        ];
        pub(super) const NAMESPACES: &[&str] = &["x", "xy", "y"];
        pub(super) const WANTED_PATHS: &[&str] = &[
            "/",
            "*",
            "/a",
            "/a/",
            "/a/b",
            "/a/b/c",
            "/a b",
            "/a%20b",
            "/café",
            "/caf%C3%A9",
            "/a%b",
            "/b/a",
        ];
        pub(super) const PATHS: &[&str] = &[
            "/",
            "*",
            "/a",
            "/a/b",
            "/a/b/c",
            "/a%20b",
            "/caf%C3%A9",
            "/caf%c3%a9",
            "/a%25b",
            "/b/a",
            "/a/../b",
            "//a",
            "/%61",
            "/a%2fb",
        ];
        pub(super) const HOSTS: &[&str] = &["web.x", "WEB.x", "api.web.x", "Api.Web.X", "y", ""];
        pub(super) const VALUES: &[&str] = &["", "a", "ab", "abc", "b"];

        pub(super) fn source() -> impl Strategy<Value = SourceMatch> {
            let one = |words| prop::option::weighted(0.5, text(words));
            let none = |words| prop::collection::vec(text(words), 0..2);
            let cidr = prop::option::weighted(
                0.2,
                prop::sample::select(&[
                    "10.0.0.0/24",
                    "10.0.0.9/8",
                    "0.0.0.0/0",
                    "::/0",
                    "::ffff:10.0.0.0/104",
                ]),
            );
            (one(IDENTITIES), one(NAMESPACES), one(&["a.b", "c"]), cidr, none(IDENTITIES), none(NAMESPACES))
                .prop_map(|(identity, namespace, trust_domain, cidr, not_identities, not_namespaces)| {
                    SourceMatch {
                        identity,
                        namespace,
                        trust_domain,
                        cidr: cidr.map(|cidr| cidr.parse().unwrap()),
                        not_identities,
                        not_namespaces,
                    }
                })
        }

        pub(super) fn http() -> impl Strategy<Value = HttpMatch> {
            let methods = prop::collection::vec(prop::sample::select(&[Method::GET, Method::POST]), 0..2);
            let any = |words| prop::collection::vec(text(words), 0..3);
            let name = prop::sample::select(&["x-a", "x-b"]).prop_map(HeaderName::from_static);
            let headers = prop::collection::vec((name, text(VALUES)), 0..2);
            (methods, any(WANTED_PATHS), any(HOSTS), headers)
                .prop_map(|(methods, paths, hosts, headers)| HttpMatch { methods, paths, hosts, headers })
        }

        pub(super) fn rules() -> impl Strategy<Value = Vec<AuthzRule>> {
            let action = prop::sample::select(&[Action::Allow, Action::Deny]);
            let sources = prop::collection::vec(source(), 0..3);
            let one = (action, sources, prop::collection::vec(http(), 0..3));
            prop::collection::vec(one.prop_map(|(action, sources, http)| rule(action, sources, http)), 0..80)
        }
    }

    /// Which rule spoke, by its place, and what it said.
    fn said(policy: &Authorization, verdict: Verdict<'_>) -> (Option<usize>, Option<DenyReason>) {
        let (Verdict::Permit { rule } | Verdict::Deny { rule, .. }) = verdict;
        let place = rule.map(|rule| policy.rules.iter().position(|other| std::ptr::eq(other, rule)).unwrap());
        (place, reason(verdict))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// The one decides what the other decides, by the same rule and for the same reason.
        #[test]
        fn an_index_decides_as_going_through_all_rules_does(
            rules in few::rules(),
            allow in any::<bool>(),
            who in prop::option::weighted(0.9, prop::sample::select(few::IDENTITIES)),
            address in prop::sample::select(&["10.0.0.9", "10.1.0.9", "::1", "::ffff:10.0.0.9"]),
            path in prop::sample::select(few::PATHS),
            host in prop::sample::select(few::HOSTS),
            dot in any::<bool>(),
            post in any::<bool>(),
            values in prop::collection::vec((prop::sample::select(&["x-a", "x-b"]), prop::sample::select(few::VALUES)), 0..3),
        ) {
            let walked = policy(if allow { Action::Allow } else { Action::Deny }, rules);
            let mut indexed = walked.clone();
            indexed.rules = indexed.rules.indexed_however_few();
            let who: Option<SpiffeId> = who.map(|who| who.parse().unwrap());
            let peer = Peer { identity: who.as_ref(), address: address.parse().unwrap() };
            let mut headers = HeaderMap::new();
            for (name, value) in values {
                headers.append(HeaderName::from_static(name), value.parse().unwrap());
            }
            let host = format!("{host}{}", if dot { "." } else { "" });
            let method = if post { Method::POST } else { Method::GET };
            for ask in [Ask::Http { method: &method, host: &host, path, headers: &headers }, Ask::Opaque] {
                let want = said(&walked, authorize(&walked, &peer, &ask));
                prop_assert_eq!(said(&indexed, authorize(&indexed, &peer, &ask)), want, "{:?}", ask);
            }
        }
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
