//! From a request's head to the rule that answers it, and from the rule to a weighted backend.
//!
//! Gateway API's precedence is one derived `Ord` over `Precedence`; a table is sorted once, when it is
//! made, and then the first match that holds is the best match, by construction. Rules must not be
//! consulted in any other order anywhere.
//!
//! Above `WALK` matches a table also knows which of them a path can hold at all (exact paths and
//! path prefixes by hash, the rest in a list). This changes nothing but the time: candidates are still
//! compared by their place in the one order.
//!
//! Precedence: hostname (exact, then the longest wildcard, then none), exact path, gRPC method, regular
//! expression (Gateway API leaves its place to implementations), longest path prefix, method, number
//! of headers, number of query parameters, oldest route, `<namespace>/<name>` of the route, order
//! within the route.

pub(crate) mod rule;

use std::{borrow::Cow, cmp::Reverse, collections::HashMap, fmt, sync::Arc};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{self, Entry as Lines},
};
use rand_core::RngCore;

use self::rule::{
    BackendRef, HeaderEdit, HeaderMatch, Match, PathEdit, PathMatch, QueryMatch, Redirect, Rule, TextMatch,
};
use crate::{
    name::ObjectRef,
    path::{canonical_path, decodes_to, ends_with_ignore_case, percent_decode, readings},
    random,
    service::Service,
};

/// The rules of one destination, sorted for matching. Cheap to clone.
#[derive(Clone)]
pub struct RouteTable(Arc<Table>);

/// What of a request decides its rule.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// Method.
    pub method: &'a Method,
    /// Authority without port.
    pub host: &'a str,
    /// Path without query, as sent.
    pub path: &'a str,
    /// Query without `?`.
    pub query: Option<&'a str>,
    /// Headers.
    pub headers: &'a HeaderMap,
}

/// The rule that answers a request.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The rule.
    pub rule: &'a Arc<Rule>,
    /// Its place in [`RouteTable::rules`].
    pub index: usize,
    /// The path prefix that matched, if the match was by prefix (no path condition is the prefix `/`).
    pub prefix: Option<&'a str>,
}

/// The rule of a request, or `None`: no rule matches (404).
pub fn find<'a>(table: &'a RouteTable, head: &RequestHead<'_>) -> Option<Found<'a>> {
    table.0.find(head)
}

/// Whether an app could read the path in another way than it was matched here, and would then be meant by another rule:
/// `/shop/../admin` begins with `/shop`, and is `/admin`. Such a request is for nobody to guess about.
pub fn is_ambiguous(table: &RouteTable, head: &RequestHead<'_>, found: &Found<'_>) -> bool {
    table.0.looks_at_paths
        && canonical_path(head.path).is_err()
        && readings(head.path).is_none_or(|mut readings| {
            readings.any(|path| {
                let other = table.0.find(&RequestHead { path: &path, ..*head });
                other.map(|other| other.index) != Some(found.index)
            })
        })
}

/// One of the rule's backends by weight, or `None`: there are none, or all have weight 0.
pub fn pick_backend<'a>(rule: &'a Rule, rng: &mut dyn RngCore) -> Option<&'a BackendRef> {
    if let [only] = &rule.backends[..] {
        return (only.weight > 0).then_some(only);
    }
    let total: u64 = rule.backends.iter().map(|b| u64::from(b.weight)).sum();
    if total == 0 {
        return None;
    }
    let mut left = random::below(rng, total);
    rule.backends.iter().find(|b| {
        let weight = u64::from(b.weight);
        let here = left < weight;
        left = left.wrapping_sub(weight);
        here
    })
}

impl RouteTable {
    /// Sorts the rules' matches. The order of `rules` only decides ties within one object.
    pub fn new(rules: Vec<Rule>) -> Self {
        Self(Arc::new(Table::new(rules.into_iter().map(Arc::new).collect())))
    }

    /// The one rule of a service without routes: everything goes to the service itself, which is
    /// backend 0 of the policy.
    pub fn to_service(service: &Service) -> Self {
        let object = ObjectRef {
            kind: "Service".into(),
            namespace: service.name.namespace.clone(),
            name: service.name.name.clone(),
        };
        Self::new(vec![Rule {
            object,
            name: DEFAULT.into(),
            label: DEFAULT.into(),
            hosts: Vec::new(),
            matches: Vec::new(),
            filters: Vec::new(),
            backends: vec![BackendRef {
                service: service.name.clone(),
                backend: 0,
                weight: 1,
                filters: Vec::new(),
            }],
            timeouts: service.timeouts,
            retry: service.retry.clone(),
            created: 0,
        }])
    }

    /// No rules, because those that there are cannot be enforced: every request is refused.
    pub fn unusable() -> Self {
        Self(Arc::new(Table { usable: false, ..Table::new(Vec::new()) }))
    }

    /// Whether the rules are known. If not, no match is an error of the mesh, not an answer about the request.
    pub fn is_usable(&self) -> bool {
        self.0.usable
    }

    /// The rules as they were given.
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.0.rules
    }

    /// Whether nothing can match.
    pub fn is_empty(&self) -> bool {
        self.0.rules.is_empty()
    }
}

impl fmt::Debug for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.rules.iter()).finish()
    }
}

/// Which of two matches that both hold is meant: the lesser. Fields in Gateway API's order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Precedence {
    host: HostRank,
    path: PathRank,
    method: Reverse<bool>,
    headers: Reverse<usize>,
    query: Reverse<usize>,
    created: u64,
    object: (Arc<str>, Arc<str>),
    rule: usize,
    matching: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum HostRank {
    Exact,
    Wildcard(Reverse<usize>),
    Any,
}

/// Lengths in characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PathRank {
    Exact,
    Grpc(TextRank, TextRank),
    Regex(Reverse<usize>),
    Prefix(Reverse<usize>),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TextRank {
    Exact(Reverse<usize>),
    Regex(Reverse<usize>),
    Any,
}

struct Table {
    rules: Vec<Arc<Rule>>,
    usable: bool,
    /// Best first.
    entries: Vec<Entry>,
    index: Option<Index>,
    /// More than `/` is asked of some path.
    looks_at_paths: bool,
}

/// One match of one rule under one hostname.
struct Entry {
    rank: Precedence,
    host: Option<Arc<str>>,
    /// Nothing but the hostname to check.
    any: bool,
}

/// Places of entries, ascending in each list.
#[derive(Default)]
struct Index {
    exact: HashMap<Box<str>, Vec<usize>>,
    prefix: HashMap<Box<str>, Vec<usize>>,
    /// Lengths that keys of `prefix` have, one bit each (the last bit: 63 and above): most ends of
    /// segments need no hash.
    lengths: u64,
    rest: Vec<usize>,
}

impl Table {
    fn new(rules: Vec<Arc<Rule>>) -> Self {
        let mut entries = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            // No match at all is one match without conditions, no hostname is any hostname.
            for matching in 0..rule.matches.len().max(1) {
                for host in 0..rule.hosts.len().max(1) {
                    entries.push(Entry::new(rule, index, matching, rule.hosts.get(host)));
                }
            }
        }
        entries.sort_by(|a, b| a.rank.cmp(&b.rank));
        let index = (entries.len() > WALK).then(|| Index::new(&rules, &entries));
        let mut paths = rules.iter().flat_map(|rule| &rule.matches).filter_map(|m| m.path.as_ref());
        let looks_at_paths = paths.any(|path| !matches!(path, PathMatch::Prefix(p) if trim(p).is_empty()));
        Self { rules, usable: true, entries, index, looks_at_paths }
    }

    fn find<'a>(&'a self, head: &RequestHead<'_>) -> Option<Found<'a>> {
        let place = match &self.index {
            None => self.entries.iter().position(|entry| self.holds(entry, head)),
            Some(index) => self.find_indexed(index, head),
        }?;
        let entry = &self.entries[place];
        let rule = &self.rules[entry.rank.rule];
        let prefix = match rule.matches.get(entry.rank.matching).and_then(|m| m.path.as_ref()) {
            None => Some("/"),
            Some(PathMatch::Prefix(prefix)) => Some(&**prefix),
            Some(PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. }) => None,
        };
        Some(Found { rule, index: entry.rank.rule, prefix })
    }

    fn find_indexed(&self, index: &Index, head: &RequestHead<'_>) -> Option<usize> {
        let mut best = None;
        let mut look = |list: &[usize]| {
            let better = list.iter().take_while(|&&place| best.is_none_or(|best| place < best));
            for &place in better {
                if self.holds(&self.entries[place], head) {
                    best = Some(place);
                    break;
                }
            }
        };
        if !index.exact.is_empty()
            && let Some(list) = index.exact.get(head.path)
        {
            look(list);
        }
        if !index.prefix.is_empty() {
            for end in segment_ends(head.path) {
                if index.lengths & length_bit(end) != 0
                    && let Some(list) = index.prefix.get(&head.path[..end])
                {
                    look(list);
                }
            }
        }
        look(&index.rest);
        best
    }

    fn holds(&self, entry: &Entry, head: &RequestHead<'_>) -> bool {
        if let Some(host) = &entry.host
            && !host_matches(host, head.host)
        {
            return false;
        }
        entry.any
            || self.rules[entry.rank.rule].matches.get(entry.rank.matching).is_none_or(|m| m.holds(head))
    }
}

impl Entry {
    fn new(rule: &Rule, index: usize, matching: usize, host: Option<&Arc<str>>) -> Self {
        let condition = rule.matches.get(matching);
        let rank = Precedence {
            host: host.map_or(HostRank::Any, |host| HostRank::of(host)),
            path: PathRank::of(condition.and_then(|m| m.path.as_ref())),
            method: Reverse(condition.is_some_and(|m| m.method.is_some())),
            headers: Reverse(condition.map_or(0, |m| m.headers.len())),
            query: Reverse(condition.map_or(0, |m| m.query.len())),
            created: rule.created,
            object: (rule.object.namespace.clone(), rule.object.name.clone()),
            rule: index,
            matching,
        };
        Self { rank, host: host.cloned(), any: condition.is_none_or(Match::is_empty) }
    }
}

impl HostRank {
    fn of(host: &str) -> Self {
        match host.strip_prefix("*.") {
            _ if host == "*" => Self::Any,
            Some(suffix) => Self::Wildcard(Reverse(suffix.chars().count())),
            None => Self::Exact,
        }
    }
}

impl PathRank {
    fn of(path: Option<&PathMatch>) -> Self {
        match path {
            None => Self::Prefix(Reverse(1)),
            Some(PathMatch::Exact(_)) => Self::Exact,
            Some(PathMatch::Prefix(prefix)) => Self::Prefix(Reverse(trim(prefix).chars().count().max(1))),
            Some(PathMatch::Regex(pattern)) => Self::Regex(Reverse(pattern.source().chars().count())),
            Some(PathMatch::Grpc { service, method }) => {
                Self::Grpc(TextRank::of(service.as_ref()), TextRank::of(method.as_ref()))
            }
        }
    }
}

impl TextRank {
    fn of(text: Option<&TextMatch>) -> Self {
        match text {
            None => Self::Any,
            Some(TextMatch::Exact(text)) => Self::Exact(Reverse(text.chars().count())),
            Some(TextMatch::Regex(pattern)) => Self::Regex(Reverse(pattern.source().chars().count())),
        }
    }
}

impl Index {
    fn new(rules: &[Arc<Rule>], entries: &[Entry]) -> Self {
        let mut index = Self::default();
        for (place, entry) in entries.iter().enumerate() {
            let rule = &rules[entry.rank.rule];
            match rule.matches.get(entry.rank.matching).and_then(|m| m.path.as_ref()) {
                Some(PathMatch::Exact(path)) => index.exact.entry((**path).into()).or_default().push(place),
                Some(PathMatch::Prefix(prefix)) if !trim(prefix).is_empty() => {
                    index.add_prefix(trim(prefix).into(), place);
                }
                Some(PathMatch::Grpc {
                    service: Some(TextMatch::Exact(service)),
                    method: Some(TextMatch::Exact(method)),
                }) => {
                    let path = format!("/{service}/{method}");
                    index.exact.entry(path.into()).or_default().push(place);
                }
                Some(PathMatch::Grpc { service: Some(TextMatch::Exact(service)), method: _ }) => {
                    index.add_prefix(format!("/{service}").into(), place);
                }
                None | Some(PathMatch::Prefix(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. }) => {
                    index.rest.push(place);
                }
            }
        }
        index
    }

    fn add_prefix(&mut self, prefix: Box<str>, place: usize) {
        self.lengths |= length_bit(prefix.len());
        self.prefix.entry(prefix).or_default().push(place);
    }
}

fn length_bit(length: usize) -> u64 {
    1 << length.min(63)
}

/// Every end of a whole segment: `/a/b/` has `/a`, `/a/b` and `/a/b/`.
fn segment_ends(path: &str) -> impl Iterator<Item = usize> {
    let slashes = path.bytes().enumerate().skip(1).filter(|&(_, b)| b == b'/').map(|(at, _)| at);
    slashes.chain(std::iter::once(path.len()))
}

/// A prefix without its final slashes; `/` becomes empty.
fn trim(prefix: &str) -> &str {
    prefix.trim_end_matches('/')
}

impl Match {
    /// Whether every request matches.
    fn is_empty(&self) -> bool {
        let path = match &self.path {
            None => true,
            Some(PathMatch::Prefix(prefix)) => trim(prefix).is_empty(),
            Some(PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. }) => false,
        };
        path && self.method.is_none() && self.headers.is_empty() && self.query.is_empty()
    }

    /// Whether all conditions hold.
    pub fn holds(&self, head: &RequestHead<'_>) -> bool {
        self.path.as_ref().is_none_or(|path| path.holds(head.path))
            && self.method.as_ref().is_none_or(|method| method == head.method)
            && self.headers.iter().all(|header| header.holds(head.headers))
            && self.query.iter().all(|query| query.holds(head.query))
    }
}

impl PathMatch {
    /// Whether the path is meant.
    pub fn holds(&self, path: &str) -> bool {
        match self {
            Self::Exact(want) => **want == *path,
            Self::Prefix(prefix) => {
                let rest = path.strip_prefix(trim(prefix));
                rest.is_some_and(|rest| trim(prefix).is_empty() || rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(pattern) => pattern.is_match(path),
            Self::Grpc { service, method } => {
                let parts = path.strip_prefix('/').and_then(|path| path.split_once('/'));
                parts.is_some_and(|(s, m)| {
                    !s.is_empty()
                        && !m.is_empty()
                        && !m.contains('/')
                        && service.as_ref().is_none_or(|want| want.is_match(s.as_bytes()))
                        && method.as_ref().is_none_or(|want| want.is_match(m.as_bytes()))
                })
            }
        }
    }
}

impl TextMatch {
    fn is_match(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(want) => want.as_bytes() == value,
            Self::Regex(pattern) => pattern.is_match_bytes(value),
        }
    }
}

impl HeaderMatch {
    /// Whether the header is there and has the value. Several values are one, joined by `,`.
    pub fn holds(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(&self.name).iter();
        let Some(first) = values.next() else {
            return false;
        };
        let mut joined = Cow::Borrowed(first.as_bytes());
        for value in values {
            let all = joined.to_mut();
            all.push(b',');
            all.extend_from_slice(value.as_bytes());
        }
        self.value.is_match(&joined)
    }
}

impl QueryMatch {
    /// Whether the first parameter of that name has the value.
    pub fn holds(&self, query: Option<&str>) -> bool {
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let first = pairs.find(|(name, _)| decodes_to(name, self.name.as_bytes()));
        first.is_some_and(|(_, value)| self.value.is_match(&percent_decode(value)))
    }
}

/// Whether `host` is meant by `pattern`: equal, or below `*.`. Case and a final dot do not count.
pub fn host_matches(pattern: &str, host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    if pattern == "*" {
        return true;
    }
    match pattern.strip_prefix('*') {
        // `*.example.com` keeps its dot: at least one more label.
        Some(suffix) => host.len() > suffix.len() && ends_with_ignore_case(host, suffix),
        None => host.eq_ignore_ascii_case(pattern),
    }
}

/// Header changes: set, then add, then remove.
pub fn edit_headers(edit: &HeaderEdit, headers: &mut HeaderMap) {
    for (name, value) in &edit.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &edit.add {
        add_value(headers, name, value);
    }
    for name in &edit.remove {
        headers.remove(name);
    }
}

/// Adds to the value that is there (Gateway API: `foo` and `bar` are `foo,bar`): apps that read one line of a header
/// see all of it. Cookies have a separator of their own, and lines of `Set-Cookie` cannot be joined (RFC 9110 §5.3).
fn add_value(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    let mut entry = match headers.entry(name) {
        Lines::Vacant(entry) => {
            entry.insert(value.clone());
            return;
        }
        Lines::Occupied(entry) => entry,
    };
    let separator: &[u8] = if *name == header::COOKIE { b"; " } else { b"," };
    if *name != header::SET_COOKIE
        && let Some(last) = entry.iter_mut().last()
        // Two values joined by what may stand in one are a value.
        && let Ok(joined) = HeaderValue::from_bytes(&[last.as_bytes(), separator, value.as_bytes()].concat())
    {
        *last = joined;
    } else {
        entry.append(value.clone());
    }
}

/// The path to forward. `prefix` is [`Found::prefix`]; a prefix edit without one changes nothing.
pub fn rewrite_path(edit: &PathEdit, prefix: Option<&str>, path: &str) -> String {
    match edit {
        PathEdit::Full(path) if path.is_empty() => "/".to_owned(),
        PathEdit::Full(path) => path.to_string(),
        // `OPTIONS *` has no path.
        PathEdit::Prefix(_) if path == "*" => path.to_owned(),
        PathEdit::Prefix(replacement) => {
            let Some(rest) = prefix.and_then(|prefix| path.strip_prefix(trim(prefix))) else {
                return path.to_owned();
            };
            let slash = if rest.is_empty() || rest.starts_with('/') { "" } else { "/" };
            let rewritten = format!("{}{slash}{rest}", trim(replacement));
            if rewritten.is_empty() { "/".to_owned() } else { rewritten }
        }
    }
}

/// The status and `Location` of a redirect. `scheme` and `port` are those of the request; the port is
/// left out where the scheme implies it.
pub fn redirect(
    redirect: &Redirect,
    head: &RequestHead<'_>,
    scheme: &str,
    port: u16,
    prefix: Option<&str>,
) -> (StatusCode, String) {
    let well_known = |scheme: &str| if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 };
    let port = match (redirect.port, &redirect.scheme) {
        (Some(port), _) => port,
        (None, Some(scheme)) => well_known(scheme),
        (None, None) => port,
    };
    let scheme = redirect.scheme.as_deref().unwrap_or(scheme);
    let host = redirect.host.as_deref().unwrap_or(head.host);
    let path = match &redirect.path {
        Some(edit) => Cow::Owned(rewrite_path(edit, prefix, head.path)),
        None => Cow::Borrowed(head.path),
    };
    let mut location = format!("{scheme}://{host}");
    if port != well_known(scheme) {
        location.push_str(&format!(":{port}"));
    }
    location.push_str(&path);
    if let Some(query) = head.query {
        location.push('?');
        location.push_str(query);
    }
    (StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::FOUND), location)
}

/// The label of the rule that a service without routes has.
pub const DEFAULT: &str = "default";
/// Up to so many matches are walked: hashing the path costs as much as that.
const WALK: usize = 8;

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use http::HeaderValue;
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};
    use rand_core::RngCore;

    use super::rule::Pattern;
    use super::*;
    use crate::{
        name::ServiceName,
        service::{RetryPolicy, Timeouts},
    };

    fn text(s: &str) -> Arc<str> {
        s.into()
    }

    fn rule(name: &str, created: u64, matches: Vec<Match>) -> Rule {
        let object = ObjectRef { kind: "HTTPRoute".into(), namespace: "ns".into(), name: name.into() };
        Rule {
            object,
            name: "0".into(),
            label: format!("HTTPRoute/ns/{name}/0").into(),
            hosts: vec![],
            matches,
            filters: vec![],
            backends: vec![],
            timeouts: Timeouts::default(),
            retry: RetryPolicy::default(),
            created,
        }
    }

    fn path(path: PathMatch) -> Match {
        Match { path: Some(path), ..Match::default() }
    }

    fn exact(s: &str) -> PathMatch {
        PathMatch::Exact(text(s))
    }

    fn prefix(s: &str) -> PathMatch {
        PathMatch::Prefix(text(s))
    }

    fn regex(s: &str) -> PathMatch {
        PathMatch::Regex(Pattern::new(s).unwrap())
    }

    fn header(name: &'static str, value: &str) -> HeaderMatch {
        HeaderMatch { name: HeaderName::from_static(name), value: TextMatch::Exact(text(value)) }
    }

    fn query(name: &str, value: &str) -> QueryMatch {
        QueryMatch { name: text(name), value: TextMatch::Exact(text(value)) }
    }

    #[derive(Debug)]
    struct Request {
        method: Method,
        host: String,
        path: String,
        query: Option<String>,
        headers: HeaderMap,
    }

    impl Request {
        fn get(path: &str) -> Self {
            let (path, query) = path.split_once('?').map_or((path, None), |(p, q)| (p, Some(q.to_owned())));
            let headers = HeaderMap::new();
            Self { method: Method::GET, host: "web".into(), path: path.into(), query, headers }
        }

        fn with(mut self, name: &'static str, value: &'static str) -> Self {
            self.headers.append(name, HeaderValue::from_static(value));
            self
        }

        fn head(&self) -> RequestHead<'_> {
            let Self { method, host, path, query, headers } = self;
            RequestHead { method, host, path, query: query.as_deref(), headers }
        }
    }

    fn winner(table: &RouteTable, request: &Request) -> Option<String> {
        find(table, &request.head()).map(|found| found.rule.object.name.to_string())
    }

    /// The first rule should win over the second, in whichever order they are given.
    fn first_wins(first: Rule, second: Rule, request: &Request) {
        let name = first.object.name.clone();
        for rules in [vec![first.clone(), second.clone()], vec![second, first]] {
            assert_eq!(winner(&RouteTable::new(rules), request).as_deref(), Some(&*name));
        }
    }

    #[test]
    fn a_path_that_could_be_meant_by_another_rule_is_ambiguous() {
        let table = RouteTable::new(vec![
            rule("admin", 0, vec![path(prefix("/admin"))]),
            rule("shop", 0, vec![path(prefix("/shop"))]),
            rule("rest", 0, vec![]),
        ]);
        let ambiguous = |path: &str| {
            let request = Request::get(path);
            let found = find(&table, &request.head()).unwrap();
            is_ambiguous(&table, &request.head(), &found)
        };
        for bad in [
            "/shop/../admin",
            "/shop/%2e%2e/admin",
            "/shop/..%2fadmin",
            "/shop%2f..%2fadmin",
            "/shop/..;/admin",
            "/shop/..\\admin",
            "/shop/..%5cadmin",
            "//admin",
            "/./admin",
            "/%61dmin",
            "/%2561dmin",
            "/%252525252561dmin",
            "/admin;x/y",
            "/admin%00",
            "/x/../admin/",
            "/admin/..",
        ] {
            assert!(ambiguous(bad), "{bad}");
        }
        for good in [
            "/",
            "/admin",
            "/shop//a",
            "/shop/a%2Fb",
            "/shop/a;v=1/b",
            "/x/../y",
            "/shop/100%",
            "/a%20b",
            "/shop/.",
        ] {
            assert!(!ambiguous(good), "{good}");
        }
        let all = RouteTable::new(vec![rule("rest", 0, vec![path(prefix("/"))])]);
        let request = Request::get("//a/../b");
        assert!(!is_ambiguous(&all, &request.head(), &find(&all, &request.head()).unwrap()));
    }

    #[test]
    fn prefixes_are_by_segment() {
        let holds = |p: &str, path: &str| prefix(p).holds(path);
        for (p, path) in
            [("/v2", "/v2"), ("/v2", "/v2/"), ("/v2", "/v2/x"), ("/v2/", "/v2"), ("/", "/x"), ("/", "*")]
        {
            assert!(holds(p, path), "{p} {path}");
        }
        for (p, path) in [("/v2", "/v2x"), ("/v2", "/v"), ("/v2", "/V2"), ("/v2/x", "/v2"), ("/v2", "//v2")] {
            assert!(!holds(p, path), "{p} {path}");
        }
    }

    #[test]
    fn gateway_api_precedence_one_by_one() {
        let r = Request::get("/a/b?q=1&p=2").with("x", "1").with("y", "2");
        let m = |p| path(p);
        let a = |m| rule("first", 9, vec![m]);
        let b = |m| rule("second", 1, vec![m]);
        first_wins(a(m(exact("/a/b"))), b(m(regex("/a/b"))), &r);
        first_wins(a(m(regex("/a/.*"))), b(m(prefix("/a/b"))), &r);
        first_wins(a(m(prefix("/a/b"))), b(m(prefix("/a"))), &r);
        first_wins(a(m(prefix("/a"))), b(m(prefix("/"))), &r);
        first_wins(a(m(prefix("/a"))), b(Match { method: Some(Method::GET), ..m(prefix("/")) }), &r);
        first_wins(a(Match { method: Some(Method::GET), ..m(prefix("/a")) }), b(m(prefix("/a"))), &r);
        let headers = |n: usize| [header("x", "1"), header("y", "2")][..n].to_vec();
        first_wins(
            a(Match { method: Some(Method::GET), ..Match::default() }),
            b(Match { headers: headers(2), ..Match::default() }),
            &r,
        );
        first_wins(
            a(Match { headers: headers(2), ..Match::default() }),
            b(Match {
                headers: headers(1),
                query: vec![query("q", "1"), query("p", "2")],
                ..Match::default()
            }),
            &r,
        );
        first_wins(
            a(Match { query: vec![query("q", "1"), query("p", "2")], ..Match::default() }),
            b(Match { query: vec![query("q", "1")], ..Match::default() }),
            &r,
        );
        // Age, then name, then order.
        first_wins(rule("z", 1, vec![]), rule("a", 2, vec![]), &r);
        first_wins(rule("a", 1, vec![]), rule("b", 1, vec![]), &r);
        let twins = vec![rule("same", 1, vec![]), rule("same", 1, vec![])];
        assert_eq!(find(&RouteTable::new(twins), &r.head()).unwrap().index, 0);
        // No path condition is the prefix `/`.
        first_wins(rule("a", 1, vec![m(prefix("/"))]), rule("b", 2, vec![Match::default()]), &r);
        first_wins(rule("a", 1, vec![Match::default()]), rule("b", 2, vec![m(prefix("/"))]), &r);
    }

    #[test]
    fn hostnames() {
        let on = |name: &str, host: &str| Rule { hosts: vec![text(host)], ..rule(name, 1, vec![]) };
        let table = RouteTable::new(vec![
            rule("any", 1, vec![path(exact("/x"))]),
            on("wild", "*.example.com"),
            on("wilder", "*.api.example.com"),
            on("exact", "v1.api.example.com"),
        ]);
        let at = |host: &str| {
            let mut r = Request::get("/x");
            r.host = host.into();
            winner(&table, &r).unwrap()
        };
        assert_eq!(at("v1.api.example.com"), "exact");
        assert_eq!(at("V1.API.example.com."), "exact");
        assert_eq!(at("v2.api.example.com"), "wilder");
        assert_eq!(at("a.b.example.com"), "wild");
        assert_eq!(at("example.com"), "any");
        assert_eq!(at("xexample.com"), "any");
    }

    #[test]
    fn grpc_methods() {
        let grpc = |service: Option<&str>, method: Option<&str>| {
            let exact = |t: &str| TextMatch::Exact(text(t));
            path(PathMatch::Grpc { service: service.map(exact), method: method.map(exact) })
        };
        let r = Request::get("/shop.Cart/Add");
        let a = |m| rule("first", 9, vec![m]);
        let b = |m| rule("second", 1, vec![m]);
        first_wins(a(grpc(Some("shop.Cart"), Some("Add"))), b(grpc(Some("shop.Cart"), None)), &r);
        first_wins(a(grpc(Some("shop.Cart"), None)), b(grpc(None, Some("Add"))), &r);
        first_wins(a(grpc(None, Some("Add"))), b(Match { headers: vec![], ..Match::default() }), &r);
        let table = RouteTable::new(vec![rule("r", 1, vec![grpc(Some("shop.Cart"), None)])]);
        for no in ["/shop.Cart", "/shop.Cart/", "/shop.Cart/Add/x", "/shop.Carts/Add", "shop.Cart/Add"] {
            assert_eq!(winner(&table, &Request::get(no)), None, "{no}");
        }
        let regex = PathMatch::Grpc {
            service: Some(TextMatch::Regex(Pattern::new("shop[.].*").unwrap())),
            method: None,
        };
        assert!(regex.holds("/shop.Cart/Add") && !regex.holds("/xshop.Cart/Add"));
    }

    #[test]
    fn headers_and_queries() {
        let h = |value: &str| header("x", value);
        assert!(h("1").holds(&Request::get("/").with("x", "1").headers));
        assert!(!h("1").holds(&Request::get("/").headers));
        assert!(!h("1").holds(&Request::get("/").with("x", "1").with("x", "2").headers));
        assert!(h("1,2").holds(&Request::get("/").with("x", "1").with("x", "2").headers));
        let q = |name: &str, value: &str, of: &str| query(name, value).holds(Some(of));
        assert!(q("a", "1", "a=1") && q("a", "1", "b=2&a=1") && q("a", "1", "a=1&a=2"));
        assert!(!q("a", "2", "a=1&a=2") && !q("a", "1", "A=1") && !q("a", "", "b=1"));
        assert!(q("a", "", "a") && q("a", "", "a=&b") && q("a", "x=y", "a=x=y"));
        assert!(q("a b", "c/d", "a%20b=c%2Fd") && q("a", "1+1", "a=1+1") && q("a", "%zz%", "a=%zz%"));
        assert!(!query("a", "").holds(None));
    }

    #[test]
    fn the_default_rule_takes_everything() {
        let table = RouteTable::new(vec![rule("only", 0, vec![])]);
        let r = Request::get("*");
        let found = find(&table, &r.head()).unwrap();
        assert_eq!((found.index, found.prefix), (0, Some("/")));
        assert!(find(&RouteTable::new(vec![]), &r.head()).is_none());
    }

    fn backends(weights: &[u32]) -> Rule {
        let backend = |(i, &weight): (usize, &u32)| {
            let service = ServiceName { namespace: text("ns"), name: text("s"), port: 80 };
            BackendRef { service, backend: i, weight, filters: vec![] }
        };
        Rule { backends: weights.iter().enumerate().map(backend).collect(), ..rule("r", 0, vec![]) }
    }

    #[test]
    fn weights_are_exact() {
        let mut rng = SmallRng::seed_from_u64(3);
        for none in [&[][..], &[0], &[0, 0]] {
            assert!(pick_backend(&backends(none), &mut rng).is_none());
        }
        let rule = backends(&[1, 0, 90, 9]);
        let mut seen = [0u32; 4];
        for _ in 0..100_000 {
            seen[pick_backend(&rule, &mut rng).unwrap().backend] += 1;
        }
        assert_eq!(seen[1], 0);
        for (seen, want) in seen.iter().zip([1_000.0f64, 0.0, 90_000.0, 9_000.0]) {
            // Five standard deviations.
            assert!((f64::from(*seen) - want).abs() <= 5.0 * want.sqrt(), "{seen} {want}");
        }
        let huge = backends(&[u32::MAX; 5]);
        assert!(pick_backend(&huge, &mut rng).is_some());
    }

    /// The source replays given numbers, so the exact share of each backend can be counted.
    struct Fixed(u64);

    impl RngCore for Fixed {
        fn next_u32(&mut self) -> u32 {
            self.0 as u32
        }
        fn next_u64(&mut self) -> u64 {
            self.0
        }
        fn fill_bytes(&mut self, bytes: &mut [u8]) {
            bytes.fill(0);
        }
    }

    #[test]
    fn rewrites_as_gateway_api_tabulates_them() {
        for (path, prefix, replacement, want) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/bar", "/", "/xyz", "/xyz/bar"),
            ("/", "/", "/xyz", "/xyz/"),
        ] {
            let edit = PathEdit::Prefix(text(replacement));
            assert_eq!(rewrite_path(&edit, Some(prefix), path), want, "{path} {prefix} {replacement}");
        }
        assert_eq!(rewrite_path(&PathEdit::Full(text("/x")), None, "/a"), "/x");
        assert_eq!(rewrite_path(&PathEdit::Prefix(text("/x")), None, "/a"), "/a");
        assert_eq!(rewrite_path(&PathEdit::Prefix(text("/x")), Some("/"), "*"), "*");
    }

    #[test]
    fn redirects() {
        let r = Request::get("/foo/bar?q=1");
        let none = Redirect { scheme: None, host: None, path: None, port: None, status: 302 };
        // The port of the service stands for the listener's. Rules of the port: Gateway API, HTTPRequestRedirectFilter.
        for (scheme, host, path, port, service, want) in [
            (None, None, None, None, 80, "http://web/foo/bar?q=1"),
            (None, None, None, None, 8080, "http://web:8080/foo/bar?q=1"),
            (None, None, None, None, 443, "http://web:443/foo/bar?q=1"),
            (None, Some("x.com"), None, None, 80, "http://x.com/foo/bar?q=1"),
            (None, Some("x.com"), None, None, 8080, "http://x.com:8080/foo/bar?q=1"),
            (None, None, None, Some(80), 8080, "http://web/foo/bar?q=1"),
            (None, None, None, Some(443), 80, "http://web:443/foo/bar?q=1"),
            (None, None, None, Some(8083), 80, "http://web:8083/foo/bar?q=1"),
            (Some("http"), None, None, None, 8080, "http://web/foo/bar?q=1"),
            (Some("https"), None, None, None, 80, "https://web/foo/bar?q=1"),
            (Some("https"), None, None, None, 8080, "https://web/foo/bar?q=1"),
            (Some("https"), None, None, Some(443), 80, "https://web/foo/bar?q=1"),
            (Some("https"), None, None, Some(80), 80, "https://web:80/foo/bar?q=1"),
            (
                Some("https"),
                Some("x.com"),
                Some(PathEdit::Prefix(text("/new"))),
                Some(8443),
                80,
                "https://x.com:8443/new/bar?q=1",
            ),
            (None, None, Some(PathEdit::Prefix(text("/"))), None, 80, "http://web/bar?q=1"),
            (None, None, Some(PathEdit::Full(text("/all"))), None, 80, "http://web/all?q=1"),
        ] {
            let how = Redirect { scheme: scheme.map(text), host: host.map(text), path, port, ..none.clone() };
            assert_eq!(redirect(&how, &r.head(), "http", service, Some("/foo")).1, want, "{how:?} {service}");
        }
        for status in [301, 302, 303, 307, 308] {
            let how = Redirect { status, ..none.clone() };
            assert_eq!(redirect(&how, &r.head(), "http", 80, None).0.as_u16(), status);
        }
    }

    #[test]
    fn header_edits() {
        let name = HeaderName::from_static;
        let value = HeaderValue::from_static;
        let edit = HeaderEdit {
            set: vec![(name("a"), value("1"))],
            add: vec![(name("a"), value("2")), (name("b"), value("3"))],
            remove: vec![name("c")],
        };
        let mut headers = Request::get("/").with("a", "0").with("a", "00").with("c", "x").headers;
        edit_headers(&edit, &mut headers);
        let all = |headers: &HeaderMap, name: &str| -> Vec<String> {
            headers.get_all(name).iter().map(|v| v.to_str().unwrap().to_owned()).collect()
        };
        assert_eq!((all(&headers, "a"), all(&headers, "b")), (vec!["1,2".to_owned()], vec!["3".to_owned()]));
        assert!(!headers.contains_key("c"));
        // Lines that are there stay lines; what is added joins the last of them.
        let add = |pairs: &[(&'static str, &'static str)]| HeaderEdit {
            add: pairs.iter().map(|(n, v)| (name(n), value(v))).collect(),
            ..HeaderEdit::default()
        };
        let mut headers = Request::get("/").with("a", "0").with("a", "00").headers;
        edit_headers(&add(&[("a", "bar,baz"), ("a", "")]), &mut headers);
        assert_eq!(all(&headers, "a"), ["0", "00,bar,baz,"]);
        let mut headers = Request::get("/").with("cookie", "a=1").with("set-cookie", "a=1").headers;
        edit_headers(&add(&[("cookie", "b=2"), ("set-cookie", "b=2")]), &mut headers);
        assert_eq!(all(&headers, "cookie"), ["a=1; b=2"]);
        assert_eq!(all(&headers, "set-cookie"), ["a=1", "b=2"]);
    }

    /// Gateway API's words, compared pair by pair and written without the derived order.
    fn beats(a: (&Rule, usize, usize), b: (&Rule, usize, usize)) -> bool {
        let matching = |x: (&Rule, usize, usize)| x.0.matches.get(x.2).cloned().unwrap_or_default();
        let (ma, mb) = (matching(a), matching(b));
        let class = |m: &Match| match &m.path {
            Some(PathMatch::Exact(_)) => 4,
            Some(PathMatch::Grpc { .. }) => 3,
            Some(PathMatch::Regex(_)) => 2,
            Some(PathMatch::Prefix(_)) | None => 1,
        };
        let length = |m: &Match| match &m.path {
            Some(PathMatch::Prefix(p)) => p.trim_end_matches('/').chars().count().max(1),
            Some(PathMatch::Regex(p)) => p.source().chars().count(),
            None => 1,
            Some(PathMatch::Exact(_) | PathMatch::Grpc { .. }) => 0,
        };
        let wins = class(&ma)
            .cmp(&class(&mb))
            .then(length(&ma).cmp(&length(&mb)))
            .then(ma.method.is_some().cmp(&mb.method.is_some()))
            .then(ma.headers.len().cmp(&mb.headers.len()))
            .then(ma.query.len().cmp(&mb.query.len()))
            .then(b.0.created.cmp(&a.0.created))
            .then(b.0.object.name.cmp(&a.0.object.name))
            .then(b.1.cmp(&a.1))
            .then(b.2.cmp(&a.2));
        wins == Ordering::Greater
    }

    fn some_match() -> impl Strategy<Value = Match> {
        let segment = || prop::sample::select(vec!["/", "/a", "/a/b", "/a/b/c", "/ab", "/b", "/b/c"]);
        let path = prop_oneof![
            Just(None),
            segment().prop_map(|s| Some(exact(s))),
            segment().prop_map(|s| Some(prefix(s))),
            prop::sample::select(vec!["/a.*", "/b/.*", ".*"]).prop_map(|s| Some(regex(s))),
        ];
        let method = prop::option::of(prop::sample::select(vec![Method::GET, Method::POST]));
        let headers = prop::sample::subsequence(vec![header("x", "1"), header("y", "1")], 0..=2);
        let queries = prop::sample::subsequence(vec![query("q", "1"), query("p", "1")], 0..=2);
        (path, method, headers, queries).prop_map(|(path, method, headers, query)| Match {
            path,
            method,
            headers,
            query,
        })
    }

    fn some_rule() -> impl Strategy<Value = Rule> {
        (prop::sample::select(vec!["a", "b", "c"]), 0u64..3, prop::collection::vec(some_match(), 0..3))
            .prop_map(|(name, created, matches)| rule(name, created, matches))
    }

    fn some_request() -> impl Strategy<Value = Request> {
        let paths = vec![
            "/",
            "/a",
            "/a/",
            "/a/b",
            "/a/b/c",
            "/a/b/c/d",
            "/ab",
            "/b",
            "/b/c?q=1",
            "/a/b?q=1&p=1",
            "*",
        ];
        (prop::sample::select(paths), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(path, x, y, post)| {
                let mut r = Request::get(path);
                for (on, name) in [(x, "x"), (y, "y")] {
                    if on {
                        r = r.with(name, "1");
                    }
                }
                if post {
                    r.method = Method::POST;
                }
                r
            },
        )
    }

    proptest! {
        /// The table finds what comparing all matches pair by pair finds, walked or indexed.
        #[test]
        fn agrees_with_a_brute_force_reference(
            rules in prop::collection::vec(some_rule(), 0..14), request in some_request()
        ) {
            let holding = rules.iter().enumerate().flat_map(|(r, rule)| {
                let hits = (0..rule.matches.len().max(1))
                    .filter(|&m| rule.matches.get(m).is_none_or(|m| m.holds(&request.head())));
                hits.map(move |m| (rule, r, m)).collect::<Vec<_>>()
            });
            let want = holding.reduce(|best, next| if beats(next, best) { next } else { best });
            let table = RouteTable::new(rules.clone());
            let got = find(&table, &request.head());
            prop_assert_eq!(got.map(|found| found.index), want.map(|(_, r, _)| r));
        }

        /// A total order: any two matches differ, and sorting does not depend on where they started.
        #[test]
        fn precedence_is_a_total_order(rules in prop::collection::vec(some_rule(), 2..8)) {
            let table = RouteTable::new(rules);
            let ranks: Vec<_> = table.0.entries.iter().map(|entry| &entry.rank).collect();
            for (i, a) in ranks.iter().enumerate() {
                for (j, b) in ranks.iter().enumerate() {
                    prop_assert_eq!(i.cmp(&j), a.cmp(b));
                }
            }
        }

        /// With a source that covers the range evenly, each backend gets its weight and no more.
        #[test]
        fn weights_partition_the_range(weights in prop::collection::vec(0u32..20, 1..6)) {
            let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
            prop_assume!(total > 0);
            let rule = backends(&weights);
            let mut seen = vec![0u32; weights.len()];
            for point in 0..total {
                // The middle of the point's share of the 64-bit range.
                let draw = ((u128::from(point) << 64) / u128::from(total)) as u64 + u64::MAX / total / 2;
                seen[pick_backend(&rule, &mut Fixed(draw)).unwrap().backend] += 1;
            }
            prop_assert_eq!(seen, weights);
        }

        #[test]
        fn any_request_is_handled(path in any::<String>(), query in prop::option::of(any::<String>()), host in any::<String>()) {
            let rules = ["/a", "/é", "/a/b", "/c", "/d", "/e", "/f", "/g", "/h", "/i"];
            let rules = rules.map(|p| Rule { hosts: vec![text("*.é")], ..rule("a", 0, vec![path_and_query(p)]) });
            let table = RouteTable::new(rules.to_vec());
            let mut r = Request::get("/");
            (r.path, r.query, r.host) = (path, query, host);
            let _ = find(&table, &r.head());
            let _ = rewrite_path(&PathEdit::Prefix(text("/é")), Some("/a"), &r.path);
        }
    }

    fn path_and_query(p: &str) -> Match {
        Match { query: vec![query("é", "1")], ..path(prefix(p)) }
    }
}
