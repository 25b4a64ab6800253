//! Who a service account's token belongs to: the API server says, at each certificate.
//!
//! Why nothing is remembered: a token dies with its pod, and only the API server knows. Certificates are asked for
//! once in half a day by each pod; that is what a review costs.
//!
//! Why what is asked is looked at first: whoever reaches the port can send anything, and must not make the API
//! server work for it. What says itself that it is for somebody else, or over, is not asked about, nor what names a pod
//! that is not there; how often one address may ask is bounded where the question comes in.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use serde::Deserialize;
use tokio::sync::Semaphore;

use crate::{
    ca::{Claims, TokenCheck, TokenError},
    resources::TOKEN_AUDIENCE,
};

/// Asks the API server.
pub struct Reviewer {
    api: Api<TokenReview>,
    asking: Semaphore,
}

impl Reviewer {
    /// Takes tokens that are for the mesh.
    pub fn new(client: Client) -> Arc<Self> {
        Arc::new(Self { api: Api::all(client), asking: Semaphore::new(AT_A_TIME) })
    }

    /// What is for us, and not over.
    fn said(&self, token: &str) -> Result<Said, TokenError> {
        let said = said(token)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        if said.exp <= now {
            return Err(TokenError::Expired);
        }
        if !said.aud.has(TOKEN_AUDIENCE) {
            return Err(TokenError::Unknown);
        }
        Ok(said)
    }
}

#[tonic::async_trait]
impl TokenCheck for Reviewer {
    fn claimed(&self, token: &str) -> Result<Claims, TokenError> {
        let said = self.said(token.trim())?;
        let about = said.about.ok_or(TokenError::Claims)?;
        let pod = about.pod.ok_or(TokenError::Claims)?;
        Ok(Claims {
            ns: about.namespace,
            sa: about.serviceaccount.name,
            uid: pod.uid,
            pod: pod.name,
            exp: said.exp,
        })
    }

    async fn check(&self, token: &str) -> Result<Claims, TokenError> {
        let token = token.trim();
        let said = self.said(token)?;
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(vec![TOKEN_AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        // Who waits for others waits no shorter for the answer.
        let Ok(_one) = tokio::time::timeout(PATIENCE, self.asking.acquire()).await else {
            return Err(TokenError::Unavailable);
        };
        let answer =
            match tokio::time::timeout(PATIENCE, self.api.create(&PostParams::default(), &review)).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "a token could not be reviewed");
                    return Err(TokenError::Unavailable);
                }
                Err(_) => return Err(TokenError::Unavailable),
            };
        claims(answer.status.as_ref(), said.exp)
    }
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").finish_non_exhaustive()
    }
}

/// What the token says of itself, unproven.
#[derive(Deserialize)]
struct Said {
    aud: Audience,
    exp: u64,
    #[serde(rename = "kubernetes.io")]
    about: Option<About>,
}

#[derive(Deserialize)]
struct About {
    namespace: String,
    serviceaccount: Named,
    pod: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    uid: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Some(Vec<String>),
}

impl Audience {
    fn has(&self, wanted: &str) -> bool {
        match self {
            Self::One(one) => one == wanted,
            Self::Some(some) => some.iter().any(|one| one == wanted),
        }
    }
}

fn said(token: &str) -> Result<Said, TokenError> {
    if token.len() > MAX_LEN {
        return Err(TokenError::Syntax);
    }
    let mut parts = token.split('.');
    let (Some(_), Some(body), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(TokenError::Syntax);
    };
    let body = BASE64.decode(body).map_err(|_| TokenError::Syntax)?;
    serde_json::from_slice(&body).map_err(|_| TokenError::Syntax)
}

/// The API server's answer as claims. An API server that does not know audiences names none: its yes is none.
fn claims(status: Option<&TokenReviewStatus>, exp: u64) -> Result<Claims, TokenError> {
    let status = status.ok_or(TokenError::Unavailable)?;
    let for_us = status.audiences.iter().flatten().any(|one| one == TOKEN_AUDIENCE);
    if status.authenticated != Some(true) || !for_us {
        return Err(TokenError::Unknown);
    }
    let user = status.user.as_ref().ok_or(TokenError::Unknown)?;
    let account = user.username.as_deref().and_then(|name| name.strip_prefix("system:serviceaccount:"));
    let (ns, sa) = account.and_then(|account| account.split_once(':')).ok_or(TokenError::Claims)?;
    let extra = |key: &str| {
        let values = user.extra.as_ref()?.get(&format!("authentication.kubernetes.io/{key}"))?;
        // More than one is nobody's.
        if let [one] = values.as_slice() { Some(one.clone()) } else { None }
    };
    // A token that is not bound to a pod says nothing about who brings it.
    let uid = extra("pod-uid").ok_or(TokenError::Claims)?;
    let pod = extra("pod-name").unwrap_or_default();
    Ok(Claims { ns: ns.to_owned(), sa: sa.to_owned(), uid, pod, exp })
}

/// A projected token has about a kilobyte.
const MAX_LEN: usize = 16 * 1024;
/// Reviews under way: the API server's own limits are for others, too.
const AT_A_TIME: usize = 32;
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn status(edit: impl FnOnce(&mut TokenReviewStatus)) -> TokenReviewStatus {
        let mut status: TokenReviewStatus = serde_json::from_value(serde_json::json!({
            "authenticated": true,
            "audiences": ["weft"],
            "user": {
                "username": "system:serviceaccount:shop:cart",
                "extra": {
                    "authentication.kubernetes.io/pod-name": ["cart-1"],
                    "authentication.kubernetes.io/pod-uid": ["u-1"],
                },
            },
        }))
        .unwrap();
        edit(&mut status);
        status
    }

    #[test]
    fn only_a_pods_own_token_for_the_mesh_is_somebody() {
        let good = claims(Some(&status(|_| {})), 7).unwrap();
        let wanted = Claims {
            ns: "shop".to_owned(),
            sa: "cart".to_owned(),
            uid: "u-1".to_owned(),
            pod: "cart-1".to_owned(),
            exp: 7,
        };
        assert_eq!(good, wanted);
        let refused = |edit: fn(&mut TokenReviewStatus)| claims(Some(&status(edit)), 7).unwrap_err();
        assert_eq!(refused(|s| s.authenticated = Some(false)), TokenError::Unknown);
        assert_eq!(refused(|s| s.audiences = None), TokenError::Unknown);
        assert_eq!(refused(|s| s.audiences = Some(vec!["api".to_owned()])), TokenError::Unknown);
        assert_eq!(refused(|s| s.user = None), TokenError::Unknown);
        let user = |name: &str| {
            claims(Some(&status(|s| s.user.as_mut().unwrap().username = Some(name.to_owned()))), 7)
        };
        assert_eq!(user("system:node:n1"), Err(TokenError::Claims));
        assert_eq!(user("system:serviceaccount:shop"), Err(TokenError::Claims));
        assert_eq!(
            refused(|s| s.user.as_mut().unwrap().extra = None),
            TokenError::Claims,
            "not bound to a pod"
        );
        assert_eq!(claims(None, 7), Err(TokenError::Unavailable));
    }

    #[test]
    fn what_says_itself_that_it_is_not_for_us_is_not_asked_about() {
        let token = |body: &str| format!("e30.{}.c2ln", BASE64.encode(body));
        let ours = said(&token(r#"{"aud":["weft"],"exp":9}"#)).unwrap();
        assert!(ours.aud.has("weft") && ours.exp == 9);
        assert!(!said(&token(r#"{"aud":"api","exp":9}"#)).unwrap().aud.has("weft"));
        for bad in ["", "a.b", "a.b.c.d", "a.!.c", &token("{}"), &"a".repeat(20_000)] {
            assert!(said(bad).is_err(), "{bad}");
        }
    }
}
