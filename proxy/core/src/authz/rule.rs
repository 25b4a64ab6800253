//! What an authorization rule says: who may call, and what may be asked.

use std::sync::Arc;

use http::{HeaderName, Method};
use ipnet::IpNet;

use super::AuthzRules;
use crate::name::ObjectRef;

/// One question of the pod's own spec.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Probe {
    /// GET of this path and query, as sent.
    Get(Arc<str>),
    /// `grpc.health.v1.Health/Check`.
    GrpcHealth,
}

impl Probe {
    /// Whether a text can be a path and query of a request.
    pub fn is_path(text: &str) -> bool {
        text.starts_with('/')
            && text.len() <= 2_048
            && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#')
    }
}

/// Who may call one port. Deny rules come first, then allow rules, then the default.
#[derive(Clone, Debug)]
pub struct Authorization {
    /// What happens when no rule matches.
    pub default: Action,
    /// The rules, in any order.
    pub rules: AuthzRules,
    /// Grows with each change.
    pub generation: u64,
}

/// What a rule or a default says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Let it pass.
    Allow,
    /// Refuse it.
    Deny,
}

/// One authorization rule: all parts must hold; an empty part holds.
#[derive(Clone, Debug)]
pub struct AuthzRule {
    /// The object that it came from.
    pub object: ObjectRef,
    /// Allow or deny.
    pub action: Action,
    /// Any of these; empty: anyone, plaintext included.
    pub sources: Vec<SourceMatch>,
    /// Any of these; empty: any request, opaque connections included. A rule with an `http` part never
    /// allows an opaque connection, and a deny rule with one denies it (fail closed).
    pub http: Vec<HttpMatch>,
}

/// Who calls: all that is set must hold.
#[derive(Clone, Debug, Default)]
pub struct SourceMatch {
    /// The caller's identity, whole text.
    pub identity: Option<StringMatch>,
    /// The caller's namespace.
    pub namespace: Option<StringMatch>,
    /// The caller's trust domain.
    pub trust_domain: Option<StringMatch>,
    /// The caller's address.
    pub cidr: Option<IpNet>,
    /// Not these identities (a caller without identity is not excluded by it).
    pub not_identities: Vec<StringMatch>,
    /// Not these namespaces.
    pub not_namespaces: Vec<StringMatch>,
}

/// What is asked: all that is set must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HttpMatch {
    /// Any of these methods; empty: all.
    pub methods: Vec<Method>,
    /// Any of these paths; empty: all.
    pub paths: Vec<StringMatch>,
    /// Any of these hosts; empty: all.
    pub hosts: Vec<StringMatch>,
    /// All of these headers.
    pub headers: Vec<(HeaderName, StringMatch)>,
}

/// Exact, prefix or suffix; never a regular expression (an unescaped one was Istio's bypass of 2026).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Starts with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Anything but empty.
    Present,
}

impl StringMatch {
    /// Whether `text` is meant.
    pub fn is_match(&self, text: &str) -> bool {
        match self {
            Self::Exact(want) => text == &**want,
            Self::Prefix(want) => text.starts_with(&**want),
            Self::Suffix(want) => text.ends_with(&**want),
            Self::Present => !text.is_empty(),
        }
    }

    /// [`StringMatch::is_match`] of text that need not be UTF-8.
    pub fn is_match_bytes(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(want) => text == want.as_bytes(),
            Self::Prefix(want) => text.starts_with(want.as_bytes()),
            Self::Suffix(want) => text.ends_with(want.as_bytes()),
            Self::Present => !text.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings() {
        let text = |s: &str| Arc::<str>::from(s);
        let cases = [
            (StringMatch::Exact(text("ab")), ["ab"].as_slice(), ["a", "abc", "AB"].as_slice()),
            (StringMatch::Prefix(text("ab")), &["ab", "abc"], &["a", "xab"]),
            (StringMatch::Suffix(text("ab")), &["ab", "xab"], &["abx", "b"]),
            (StringMatch::Present, &["x"], &[""]),
        ];
        for (m, yes, no) in cases {
            assert!(yes.iter().all(|t| m.is_match(t) && m.is_match_bytes(t.as_bytes())), "{m:?}");
            assert!(no.iter().all(|t| !m.is_match(t) && !m.is_match_bytes(t.as_bytes())), "{m:?}");
        }
    }

    #[test]
    fn a_probe_asks_for_a_path_that_a_request_could_have() {
        let longest = format!("/{}", "x".repeat(2_047));
        assert!(["/", "/ready?deep=1", &longest].into_iter().all(Probe::is_path));
        let too_long = format!("{longest}x");
        assert!(!["", "ready", "/a b", "/a#b", "/\n", "/é", &too_long].into_iter().any(Probe::is_path));
    }
}
