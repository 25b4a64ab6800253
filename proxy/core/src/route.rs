//! From a request's head to the rule that answers it, and from the rule to a weighted backend.
//!
//! Gateway API's precedence is one derived `Ord` over [`Precedence`]; a table is sorted once, when it is
//! made, and then the first match that holds is the best match, by construction. Rules must not be
//! consulted in any other order anywhere.
//!
//! Above [`WALK`] matches a table also knows which of them a path can hold at all (exact paths and
//! path prefixes by hash, the rest in a list). This changes nothing but the time: candidates are still
//! compared by their place in the one order.
//!
//! Precedence: hostname (exact, then the longest wildcard, then none), exact path, gRPC method, regular
//! expression (Gateway API leaves its place to implementations), longest path prefix, method, number
//! of headers, number of query parameters, oldest route, `<namespace>/<name>` of the route, order
//! within the route.

use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use http::{HeaderMap, HeaderName, Method, StatusCode};
use rand_core::RngCore;

use crate::{
    policy::{
        BackendRef, HeaderEdit, HeaderMatch, Match, ObjectRef, PathEdit, PathMatch, QueryMatch, Redirect,
        Rule, Service, TextMatch,
    },
    random,
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
    /// Best first.
    entries: Vec<Entry>,
    index: Option<Index>,
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
        Self { rules, entries, index }
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
                if let Some(list) = index.prefix.get(&head.path[..end]) {
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
                    index.prefix.entry(trim(prefix).into()).or_default().push(place);
                }
                Some(PathMatch::Grpc {
                    service: Some(TextMatch::Exact(service)),
                    method: Some(TextMatch::Exact(method)),
                }) => {
                    let path = format!("/{service}/{method}");
                    index.exact.entry(path.into()).or_default().push(place);
                }
                Some(PathMatch::Grpc { service: Some(TextMatch::Exact(service)), method: _ }) => {
                    index.prefix.entry(format!("/{service}").into()).or_default().push(place);
                }
                None | Some(PathMatch::Prefix(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. }) => {
                    index.rest.push(place);
                }
            }
        }
        index
    }
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
            Self::Regex(pattern) => std::str::from_utf8(value).is_ok_and(|text| pattern.is_match(text)),
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
        let first = pairs.find(|(name, _)| *percent_decode(name) == *self.name.as_bytes());
        first.is_some_and(|(_, value)| self.value.is_match(&percent_decode(value)))
    }
}

/// Decodes `%XX`; what is not an escape stays as it is. `+` stays `+`.
pub(crate) fn percent_decode(text: &str) -> Cow<'_, [u8]> {
    let bytes = text.as_bytes();
    if !bytes.contains(&b'%') {
        return Cow::Borrowed(bytes);
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [b, after @ ..] = rest {
        let escape = match (b, after) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match escape {
            Some((high, low)) => {
                out.push(high << 4 | low);
                rest = &after[2..];
            }
            None => {
                out.push(*b);
                rest = after;
            }
        }
    }
    Cow::Owned(out)
}

fn hex(b: u8) -> Option<u8> {
    char::from(b).to_digit(16).map(|d| d as u8)
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

pub(crate) fn ends_with_ignore_case(text: &str, suffix: &str) -> bool {
    let (text, suffix) = (text.as_bytes(), suffix.as_bytes());
    text.len() >= suffix.len() && text[text.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

/// Header changes: set, then add, then remove.
pub fn edit_headers(edit: &HeaderEdit, headers: &mut HeaderMap) {
    for (name, value) in &edit.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &edit.add {
        headers.append(name, value.clone());
    }
    for name in &edit.remove {
        headers.remove(name);
    }
}

/// The path to forward. `prefix` is [`Found::prefix`]; a prefix edit without one changes nothing.
pub fn rewrite_path(edit: &PathEdit, prefix: Option<&str>, path: &str) -> String {
    match edit {
        PathEdit::Full(path) if path.is_empty() => "/".to_owned(),
        PathEdit::Full(path) => path.to_string(),
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

/// Names of the headers that any rule of the table looks at: what a sampled decision must record.
pub fn headers_looked_at(table: &RouteTable) -> Vec<HeaderName> {
    let matches = table.rules().iter().flat_map(|rule| &rule.matches);
    let mut seen = HashSet::new();
    matches.flat_map(|m| &m.headers).filter(|h| seen.insert(&h.name)).map(|h| h.name.clone()).collect()
}

/// The label of the rule that a service without routes has.
pub const DEFAULT: &str = "default";
/// Up to so many matches are walked: hashing the path costs as much as that.
const WALK: usize = 8;
