//! `Authorization`: who may call one port.
//!
//! Why so many refusals: whatever is missing here would make a rule mean more than it says. An action, a
//! default or a condition that was lost on the way is an error, never "any".

use prost::Message as _;
use weft_core::policy::{Action, Authorization, AuthzRule, HttpMatch, SourceMatch, StringMatch};

use super::{
    Invalid, Problem,
    common::{
        At, MAX_ITEMS, cut, header_name, method, object, requires, string_match, to_object, to_string_match,
    },
    decode,
};
use crate::pb::v1::{self, authorization as pb};

/// Rules of one port: all policies that select the workload together.
pub const MAX_RULES: usize = 4_096;

/// Bytes that rules take in a message. Those of two lists are the sum of theirs.
pub fn size(rules: &[AuthzRule]) -> usize {
    let rules = rules.iter().map(to_rule).collect();
    v1::Authorization { default: 0, rules, generation: 0, requires: Vec::new() }.encoded_len()
}

/// Reads an authorization policy.
///
/// # Errors
/// The first field that cannot be taken.
pub fn parse(body: &[u8]) -> Result<Authorization, Invalid> {
    Authorization::try_from(&decode::<v1::Authorization>("Authorization", body)?)
}

impl TryFrom<&v1::Authorization> for Authorization {
    type Error = Invalid;

    fn try_from(policy: &v1::Authorization) -> Result<Self, Invalid> {
        let at = At::root("Authorization");
        requires(&at, &policy.requires)?;
        Ok(Self {
            default: action(&at.field("default"), policy.default)?,
            rules: at.each("rules", &policy.rules, MAX_RULES, rule)?.into(),
            generation: policy.generation,
        })
    }
}

impl From<&Authorization> for v1::Authorization {
    fn from(policy: &Authorization) -> Self {
        Self {
            default: to_action(policy.default).into(),
            rules: policy.rules.iter().map(to_rule).collect(),
            generation: policy.generation,
            requires: vec!["authz/v1".to_owned()],
        }
    }
}

fn action(at: &At<'_>, value: i32) -> Result<Action, Invalid> {
    match pb::Action::try_from(value) {
        Ok(pb::Action::Allow) => Ok(Action::Allow),
        Ok(pb::Action::Deny) => Ok(Action::Deny),
        Ok(pb::Action::Unspecified) => Err(at.bad(Problem::Unspecified("ACTION_ALLOW or ACTION_DENY"))),
        Err(_) => Err(at.bad(Problem::UnknownValue(value))),
    }
}

fn to_action(action: Action) -> pb::Action {
    match action {
        Action::Allow => pb::Action::Allow,
        Action::Deny => pb::Action::Deny,
    }
}

fn rule(at: &At<'_>, rule: &pb::Rule) -> Result<AuthzRule, Invalid> {
    Ok(AuthzRule {
        object: object(at, rule.object.as_ref())?,
        action: action(&at.field("action"), rule.action)?,
        sources: at.each("sources", &rule.sources, MAX_ITEMS, source)?,
        http: at.each("http", &rule.http, MAX_ITEMS, http)?,
    })
}

fn source(at: &At<'_>, source: &pb::Source) -> Result<SourceMatch, Invalid> {
    let one = |name, value: &Option<v1::StringMatch>| {
        value.as_ref().map(|value| string_match(&at.field(name), value)).transpose()
    };
    let cidr = match source.cidr.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| at.field("cidr").bad(Problem::Cidr(cut(text))))?),
    };
    let source = SourceMatch {
        identity: one("identity", &source.identity)?,
        namespace: one("namespace", &source.namespace)?,
        trust_domain: one("trust_domain", &source.trust_domain)?,
        cidr,
        not_identities: at.each("not_identities", &source.not_identities, MAX_ITEMS, string_match)?,
        not_namespaces: at.each("not_namespaces", &source.not_namespaces, MAX_ITEMS, string_match)?,
    };
    if is_anyone(&source) {
        return Err(at.bad(Problem::NoCondition));
    }
    Ok(source)
}

pub(super) fn http(at: &At<'_>, http: &pb::Http) -> Result<HttpMatch, Invalid> {
    Ok(HttpMatch {
        methods: at.each("methods", &http.methods, MAX_ITEMS, |at, name| method(at, name))?,
        paths: at.each("paths", &http.paths, MAX_ITEMS, string_match)?,
        hosts: at.each("hosts", &http.hosts, MAX_ITEMS, string_match)?,
        headers: at.each("headers", &http.headers, MAX_ITEMS, |at, header| {
            let value = at.field("value");
            let matching = header.value.as_ref().ok_or_else(|| value.bad(Problem::Missing))?;
            Ok((header_name(&at.field("name"), &header.name)?, string_match(&value, matching)?))
        })?,
    })
}

fn is_anyone(source: &SourceMatch) -> bool {
    source.identity.is_none()
        && source.namespace.is_none()
        && source.trust_domain.is_none()
        && source.cidr.is_none()
        && source.not_identities.is_empty()
        && source.not_namespaces.is_empty()
}

fn to_rule(rule: &AuthzRule) -> pb::Rule {
    // Any of the sources is enough, so one without a condition makes the whole list mean "anyone", and
    // the wire has one way to say that.
    let anyone = rule.sources.iter().any(is_anyone);
    let sources = if anyone { Vec::new() } else { rule.sources.iter().map(to_source).collect() };
    pb::Rule {
        object: to_object(&rule.object),
        action: to_action(rule.action).into(),
        sources,
        http: rule.http.iter().map(to_http).collect(),
    }
}

fn to_source(source: &SourceMatch) -> pb::Source {
    let one = |value: &Option<StringMatch>| value.as_ref().map(to_string_match);
    pb::Source {
        identity: one(&source.identity),
        namespace: one(&source.namespace),
        trust_domain: one(&source.trust_domain),
        cidr: source.cidr.map(|net| net.to_string()).unwrap_or_default(),
        not_identities: source.not_identities.iter().map(to_string_match).collect(),
        not_namespaces: source.not_namespaces.iter().map(to_string_match).collect(),
    }
}

pub(super) fn to_http(http: &HttpMatch) -> pb::Http {
    pb::Http {
        methods: http.methods.iter().map(|method| method.as_str().to_owned()).collect(),
        paths: http.paths.iter().map(to_string_match).collect(),
        hosts: http.hosts.iter().map(to_string_match).collect(),
        headers: http
            .headers
            .iter()
            .map(|(name, value)| pb::HeaderMatch {
                name: name.as_str().to_owned(),
                value: Some(to_string_match(value)),
            })
            .collect(),
    }
}
