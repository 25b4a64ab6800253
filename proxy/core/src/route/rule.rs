//! What a rule of a route says: what it matches, what it does, and where it sends.

use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue, Method};

use crate::{
    name::{ObjectRef, ServiceName},
    service::{RetryPolicy, Timeouts},
};

/// One rule of a route: what it matches and what it does.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The object that it came from.
    pub object: ObjectRef,
    /// Its name in the object, or its position as text.
    pub name: Arc<str>,
    /// `<kind>/<namespace>/<name>/<rule>`: its label in metrics, logs and `weft routes`.
    pub label: Arc<str>,
    /// Hostnames of the route; empty: all. A leading `*.` matches one or more labels.
    pub hosts: Vec<Arc<str>>,
    /// Any of these; empty: everything.
    pub matches: Vec<Match>,
    /// In order.
    pub filters: Vec<Filter>,
    /// Weighted; empty: answered by a filter, else 500.
    pub backends: Vec<BackendRef>,
    /// Bounds on time.
    pub timeouts: Timeouts,
    /// When to try again.
    pub retry: RetryPolicy,
    /// When the route object was made (seconds since 1970): Gateway API's tie-break.
    pub created: u64,
}

/// A conjunction of conditions.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// The path, or the gRPC method.
    pub path: Option<PathMatch>,
    /// The method.
    pub method: Option<Method>,
    /// All of these.
    pub headers: Vec<HeaderMatch>,
    /// All of these.
    pub query: Vec<QueryMatch>,
}

/// A condition on the path.
#[derive(Clone, Debug)]
pub enum PathMatch {
    /// The whole path.
    Exact(Arc<str>),
    /// A prefix by segments: `/v2` matches `/v2` and `/v2/x`, not `/v2x`. No trailing `/` but in `/`.
    Prefix(Arc<str>),
    /// The whole path by a regular expression.
    Regex(Pattern),
    /// `/<service>/<method>`; `None` matches any.
    Grpc {
        /// The fully qualified service.
        service: Option<TextMatch>,
        /// The method.
        method: Option<TextMatch>,
    },
}

/// A condition on one text value.
#[derive(Clone, Debug)]
pub enum TextMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Matched whole.
    Regex(Pattern),
}

/// A condition on one header.
#[derive(Clone, Debug)]
pub struct HeaderMatch {
    /// Its name.
    pub name: HeaderName,
    /// Its value (several values are joined by `,`).
    pub value: TextMatch,
}

/// A condition on one query parameter.
#[derive(Clone, Debug)]
pub struct QueryMatch {
    /// Its name, case-sensitive.
    pub name: Arc<str>,
    /// The first value of that name, percent-decoded.
    pub value: TextMatch,
}

/// A compiled regular expression of bounded size that matches the whole text in linear time.
#[derive(Clone)]
pub struct Pattern {
    source: Arc<str>,
    regex: regex::bytes::Regex,
}

/// What a rule does to a request or response.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// On the request's headers.
    RequestHeaders(HeaderEdit),
    /// On the response's headers.
    ResponseHeaders(HeaderEdit),
    /// Answer with a redirect.
    Redirect(Redirect),
    /// Change what is forwarded.
    Rewrite(Rewrite),
    /// A filter that does not resolve: answer 500 (Gateway API).
    Invalid {
        /// What is wrong, for the log.
        reason: Arc<str>,
    },
}

/// Header changes: set, then add, then remove.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderEdit {
    /// Replace.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Append.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Delete.
    pub remove: Vec<HeaderName>,
}

/// A redirect's parts; what is `None` stays as the request had it.
#[derive(Clone, Debug, PartialEq)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<Arc<str>>,
    /// Host.
    pub host: Option<Arc<str>>,
    /// Path.
    pub path: Option<PathEdit>,
    /// Port.
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// A rewrite's parts; what is `None` stays.
#[derive(Clone, Debug, PartialEq)]
pub struct Rewrite {
    /// Host.
    pub host: Option<Arc<str>>,
    /// Path.
    pub path: Option<PathEdit>,
}

/// A change of path.
#[derive(Clone, Debug, PartialEq)]
pub enum PathEdit {
    /// The whole path (the query stays).
    Full(Arc<str>),
    /// The prefix that the rule matched.
    Prefix(Arc<str>),
}

/// A weighted backend of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendRef {
    /// Which service.
    pub service: ServiceName,
    /// Position in [`OutboundPolicy::backends`](crate::policy::OutboundPolicy::backends).
    pub backend: usize,
    /// Relative weight.
    pub weight: u32,
    /// Filters of this backend only.
    pub filters: Vec<Filter>,
}

/// A pattern that does not compile or is too large.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a usable regular expression: {1}")]
pub struct PatternError(String, String);

impl Pattern {
    /// Largest compiled program, in bytes: a few hundred states, far above real routes.
    const SIZE_LIMIT: usize = 64 * 1024;

    /// Compiles `source`; it must match the whole text (RE2 syntax: no back-references or look-around).
    ///
    /// # Errors
    /// Syntax, or a program above the size limit.
    pub fn new(source: &str) -> Result<Self, PatternError> {
        // As RE2 has it: `\w`, `\d` and `\s` are ASCII, which also makes them small.
        let compile = |text: &str| {
            regex::bytes::RegexBuilder::new(text)
                .unicode(false)
                .size_limit(Self::SIZE_LIMIT)
                .dfa_size_limit(Self::SIZE_LIMIT)
                .build()
        };
        // Alone first: `a)|(b` is no pattern, and would become one inside the group. The anchors are
        // absolute, whatever `(?m)` in the source says.
        compile(source)
            .and_then(|_| compile(&format!("\\A(?:{source})\\z")))
            .map(|regex| Self { source: source.into(), regex })
            .map_err(|e| {
                // The library draws a picture of several lines, which would be as many in a log; the last says it.
                let picture = e.to_string();
                let said = picture.lines().last().unwrap_or_default();
                PatternError(source.to_owned(), said.trim_start_matches("error: ").to_owned())
            })
    }

    /// What was compiled.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the whole of `text` matches.
    pub fn is_match(&self, text: &str) -> bool {
        self.is_match_bytes(text.as_bytes())
    }

    /// [`Pattern::is_match`] of text that need not be UTF-8.
    pub fn is_match_bytes(&self, text: &[u8]) -> bool {
        self.regex.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_and_cannot_escape_their_group() {
        let p = Pattern::new("/a|/b").unwrap();
        assert!(p.is_match("/a") && p.is_match("/b"));
        assert!(!p.is_match("/ax") && !p.is_match("x/b") && !p.is_match("/a\n"));
        assert!(!Pattern::new("(?m)^/a$").unwrap().is_match("/a\n/b"));
        for bad in ["a)|(b", "(", "a{100000}", "(?=x)", "(a)\\1", "(?x)a # b"] {
            assert!(Pattern::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(p, Pattern::new("/a|/b").unwrap());
        for real in
            [r"/users/\w+/orders/\d{1,10}", r"/[^/]+/[a-z0-9-]{1,63}(/.*)?", r"(?i)/api/v\d+/.*", r"\S+\s\w+"]
        {
            assert!(Pattern::new(real).is_ok(), "{real}");
        }
        assert!(Pattern::new("/café/.*").unwrap().is_match("/café/crème"));
        assert!(Pattern::new(r"\d").unwrap().is_match("7") && !Pattern::new(r"\d+").unwrap().is_match("٣"));
    }
}
