//! What of a port's authorization can be told, where the wire has no room for all of it.
//!
//! Why this is not left to "the last good one stays": a port's rules are those of every policy that selects its pod. One
//! policy more than there is room for would freeze all of them as they were, and a DENY that somebody needs now would
//! never come into force. So each policy is told whole or not at all, and what is told never lets in whom the policies
//! together would refuse:
//!
//! - Those that deny come first. If one of them cannot be told, the port refuses everybody, as it does for a policy that
//!   could never be read: nobody knows whom it would have kept out.
//! - Those that allow follow, the oldest first, so that a new one does not put an old one out of force. Whom one lets in
//!   that cannot be told is refused.
//!
//! Whoever's policy is not told reads so in its status.

use weft_core::policy::{Action, Authorization, AuthzRule, ObjectRef};
use weft_proto::{ads::MAX_RESOURCE_LEN, convert::authz, pb::v1};

use super::Index;

/// A policy that is not in force on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// It.
    pub object: ObjectRef,
    /// Why, and what that means.
    pub reason: String,
}

impl Index {
    /// As much of `whole` as the wire takes, and what it does not take.
    pub fn enforceable(&self, whole: &Authorization) -> (Authorization, Vec<LeftOut>) {
        let with = |rules: Vec<AuthzRule>| Authorization { rules: rules.into(), ..*whole };
        let mut policies: Vec<(&ObjectRef, Vec<AuthzRule>)> = Vec::new();
        for rule in whole.rules.iter() {
            match policies.last_mut() {
                Some((object, rules)) if **object == rule.object => rules.push(rule.clone()),
                Some(_) | None => policies.push((&rule.object, vec![rule.clone()])),
            }
        }
        policies.sort_by_key(|(object, rules)| (!denies(rules), self.created(object), *object));
        let (mut told, mut left_out) = (Vec::new(), Vec::new());
        let mut bytes = OWN_BYTES;
        for (object, rules) in policies {
            let object = object.clone();
            bytes += authz::size(&rules);
            let Some(reason) = unfit(&with(rules.clone()), told.len() + rules.len(), bytes) else {
                told.extend(rules);
                continue;
            };
            if denies(&rules) {
                let reason = format!("{reason}; until that is mended everybody is refused there");
                let all = AuthzRule {
                    object: object.clone(),
                    action: Action::Deny,
                    sources: Vec::new(),
                    http: Vec::new(),
                };
                return (with(vec![all]), vec![LeftOut { object, reason }]);
            }
            bytes -= authz::size(&rules);
            let reason = format!("{reason}; until that is mended it lets nobody in there");
            left_out.push(LeftOut { object, reason });
        }
        (with(told), left_out)
    }

    fn created(&self, object: &ObjectRef) -> u64 {
        let name = (object.namespace.clone(), object.name.clone());
        self.authz.get(&name).map_or(0, |policy| policy.meta.created)
    }
}

fn denies(rules: &[AuthzRule]) -> bool {
    rules.iter().any(|rule| rule.action == Action::Deny)
}

/// Why one policy cannot be told; `rules` and `bytes` are those of all that would be told with it.
fn unfit(policy: &Authorization, rules: usize, bytes: usize) -> Option<String> {
    if let Err(error) = Authorization::try_from(&v1::Authorization::from(policy)) {
        return Some(error.to_string());
    }
    let (count, most, what) = match rules > authz::MAX_RULES {
        true => (rules, authz::MAX_RULES, "rules"),
        false => (bytes, MAX_RESOURCE_LEN, "bytes"),
    };
    (count > most).then(|| {
        format!("with the other policies of this port it makes {count} {what}; at most {most} can be told")
    })
}

/// What a message has beside its rules: less than this.
const OWN_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use weft_core::policy::StringMatch;

    use super::*;
    use crate::index::tests::{SHOP, index};

    /// A policy of the namespace, of an age, with so many rules of its own.
    fn policy(name: &str, action: Action, count: usize) -> (String, Vec<AuthzRule>) {
        let text = format!(
            "---\napiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop, \
             creationTimestamp: \"2026-01-0{}T00:00:00Z\"}}\nspec: {{action: {action:?}, rules: [{{}}]}}\n",
            &name[1..]
        );
        let object =
            ObjectRef { kind: "AuthorizationPolicy".into(), namespace: "shop".into(), name: name.into() };
        let rule = AuthzRule { object, action, sources: Vec::new(), http: Vec::new() };
        (text, vec![rule; count])
    }

    fn told(policies: &[(&str, Action, usize)]) -> (Vec<(String, usize)>, Vec<String>) {
        let made: Vec<_> = policies.iter().map(|(name, action, n)| policy(name, *action, *n)).collect();
        let texts: String = made.iter().map(|(text, _)| text.as_str()).collect();
        let rules: Vec<_> = made.into_iter().flat_map(|(_, rules)| rules).collect();
        let whole = Authorization { default: Action::Deny, rules: rules.into(), generation: 0 };
        let (enforceable, left_out) = index(&format!("{SHOP}{texts}")).enforceable(&whole);
        assert_eq!(enforceable.default, Action::Deny);
        let mut told: Vec<(String, usize)> = Vec::new();
        for rule in enforceable.rules.iter() {
            match told.last_mut() {
                Some((name, count)) if **name == *rule.object.name => *count += 1,
                Some(_) | None => told.push((rule.object.name.to_string(), 1)),
            }
        }
        (told, left_out.iter().map(|left| format!("{}: {}", left.object.name, left.reason)).collect())
    }

    fn named(told: &[(&str, usize)]) -> Vec<(String, usize)> {
        told.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn where_all_fits_all_is_told() {
        let (told, left_out) = told(&[("p1", Action::Allow, 4_000), ("p2", Action::Deny, 96)]);
        assert_eq!((told, left_out), (named(&[("p2", 96), ("p1", 4_000)]), Vec::new()));
    }

    #[test]
    fn denials_come_first_and_a_new_policy_puts_no_older_one_out_of_force() {
        let (told, left_out) = told(&[
            ("p4", Action::Allow, 1),
            ("p3", Action::Allow, 1_000),
            ("p2", Action::Allow, 3_000),
            ("p9", Action::Deny, 1_000),
        ]);
        assert_eq!(told, named(&[("p9", 1_000), ("p2", 3_000), ("p4", 1)]));
        assert_eq!(left_out.len(), 1);
        let said = &left_out[0];
        assert!(said.starts_with("p3: ") && said.contains("5000 rules") && said.contains("4096"), "{said}");
        assert!(said.ends_with("it lets nobody in there"), "{said}");
    }

    #[test]
    fn whom_a_denial_would_refuse_that_cannot_be_told_is_never_let_in() {
        let (told, left_out) =
            told(&[("p1", Action::Deny, 4_000), ("p2", Action::Allow, 5), ("p3", Action::Deny, 97)]);
        assert_eq!(told, named(&[("p3", 1)]), "one rule, which refuses everybody");
        assert!(left_out.len() == 1 && left_out[0].starts_with("p3: "), "{left_out:?}");
        assert!(left_out[0].ends_with("everybody is refused there"), "{left_out:?}");
    }

    #[test]
    fn what_is_wrong_with_one_policy_concerns_it_alone() {
        let (_, mut wrong) = policy("p1", Action::Allow, 2);
        wrong[1].http.push(weft_core::policy::HttpMatch {
            paths: vec![StringMatch::Exact("/a\tb".into())],
            ..Default::default()
        });
        let (_, good) = policy("p2", Action::Allow, 3);
        let rules: Vec<_> = wrong.into_iter().chain(good).collect();
        let whole = Authorization { default: Action::Deny, rules: rules.into(), generation: 0 };
        let (enforceable, left_out) = index(SHOP).enforceable(&whole);
        assert_eq!(enforceable.rules.iter().count(), 3);
        assert!(left_out[0].reason.contains("leave control characters out"), "{left_out:?}");
    }
}
