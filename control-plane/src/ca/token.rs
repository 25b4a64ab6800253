//! Join tokens: how a workload outside Kubernetes says who it is, before it has a certificate.
//!
//! `base64url(claims) "." base64url(HMAC-SHA256 of the first part)`, by the state folder's join key. In
//! Kubernetes a service account's token takes this place: [`TokenCheck`] is the seam, and the answer to either is
//! the same claims.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use rand::RngCore;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{CaError, place::make_folder};
use crate::disk;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Namespace.
    pub ns: String,
    /// Service account.
    pub sa: String,
    /// Pod uid.
    pub uid: String,
    /// Pod name.
    #[serde(default)]
    pub pod: String,
    /// End of validity, in seconds since 1970.
    pub exp: u64,
}

/// Why a token is refused. The workload hears no more than that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not two parts of base64url, or too long.
    #[error("it is not a join token")]
    Syntax,
    /// Made by somebody else.
    #[error("it was not made with this controller's join key")]
    Signature,
    /// Too late.
    #[error("it has expired")]
    Expired,
    /// Names that cannot be an identity.
    #[error("its claims are not a workload")]
    Claims,
    /// The API server says no.
    #[error("the Kubernetes API does not know it")]
    Unknown,
    /// Whoever knows cannot be asked: not the workload's fault.
    #[error("the Kubernetes API cannot be asked")]
    Unavailable,
}

/// Whoever knows whether a token is good, and whose it is.
#[tonic::async_trait]
pub trait TokenCheck: Send + Sync + std::fmt::Debug {
    /// What one says of itself, unproven: who could not be right need not be asked about.
    ///
    /// # Errors
    /// It says nothing, or that it is for somebody else, or over.
    fn claimed(&self, token: &str) -> Result<Claims, TokenError>;

    /// Checks one.
    async fn check(&self, token: &str) -> Result<Claims, TokenError>;
}

/// The key of the tokens.
pub struct JoinKey(hmac::Key);

impl Claims {
    /// Claims until `until`.
    pub fn new(ns: &str, sa: &str, uid: &str, pod: &str, until: SystemTime) -> Self {
        let exp = until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        Self { ns: ns.to_owned(), sa: sa.to_owned(), uid: uid.to_owned(), pod: pod.to_owned(), exp }
    }
}

impl JoinKey {
    /// Loads the key of a state folder, or makes one.
    ///
    /// # Errors
    /// The file cannot be read, written or used.
    pub fn open(state: &Path) -> Result<Self, CaError> {
        make_folder(state)?;
        let path = state.join(JOIN_KEY);
        match fs::read(&path).map(Zeroizing::new) {
            Ok(text) => {
                let key = BASE64.decode(text.trim_ascii()).map(Zeroizing::new);
                match key {
                    Ok(key) if key.len() == KEY_LEN => Ok(Self::new(&key)),
                    Ok(_) | Err(_) => {
                        Err(CaError::Content { path, reason: format!("is not {KEY_LEN} bytes in base64url") })
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let mut key = Zeroizing::new([0; KEY_LEN]);
                rand::rng().fill_bytes(&mut *key);
                // `weft token` may do the same at this moment: whoever is first is right.
                let text = Zeroizing::new(BASE64.encode(*key));
                match disk::write_first(&path, text.as_bytes()) {
                    Ok(true) => Ok(Self::new(&*key)),
                    Ok(false) => Self::open(state),
                    Err(error) => Err(CaError::File { path, error }),
                }
            }
            Err(error) => Err(CaError::File { path, error }),
        }
    }

    fn new(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// Makes a token.
    pub fn sign(&self, claims: &Claims) -> String {
        let body = BASE64.encode(serde_json::json!(claims).to_string());
        let tag = hmac::sign(&self.0, body.as_bytes());
        format!("{body}.{}", BASE64.encode(tag))
    }

    /// Checks a token; the comparison takes the same time whatever it holds.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn check(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        if token.len() > MAX_LEN {
            return Err(TokenError::Syntax);
        }
        let (body, tag) = token.trim().split_once('.').ok_or(TokenError::Syntax)?;
        let tag = BASE64.decode(tag).map_err(|_| TokenError::Syntax)?;
        hmac::verify(&self.0, body.as_bytes(), &tag).map_err(|_| TokenError::Signature)?;
        let body = BASE64.decode(body).map_err(|_| TokenError::Syntax)?;
        let claims: Claims = serde_json::from_slice(&body).map_err(|_| TokenError::Syntax)?;
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        if now >= claims.exp {
            return Err(TokenError::Expired);
        }
        Ok(claims)
    }
}

impl std::fmt::Debug for JoinKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinKey")
    }
}

const JOIN_KEY: &str = "join.key";
const KEY_LEN: usize = 32;
const MAX_LEN: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::place::tests::StateDir;

    #[test]
    fn tokens_hold_until_they_end_and_nobody_else_makes_them() {
        let (mine, other) = (StateDir::new("token-a"), StateDir::new("token-b"));
        let key = JoinKey::open(&mine.0).unwrap();
        let now = SystemTime::now();
        let claims = Claims::new("shop", "cart", "uid-1", "cart-1", now + Duration::from_secs(60));
        let token = key.sign(&claims);
        assert_eq!(JoinKey::open(&mine.0).unwrap().check(&format!("{token}\n"), now), Ok(claims.clone()));
        assert_eq!(key.check(&token, now + Duration::from_secs(61)), Err(TokenError::Expired));
        assert_eq!(JoinKey::open(&other.0).unwrap().check(&token, now), Err(TokenError::Signature));
        let forged = Claims { sa: "admin".to_owned(), ..claims };
        let body = BASE64.encode(serde_json::to_vec(&forged).unwrap());
        let tag = token.split_once('.').unwrap().1;
        assert_eq!(key.check(&format!("{body}.{tag}"), now), Err(TokenError::Signature));
        for bad in ["", ".", "a.b.c", "no dot", &"a".repeat(5_000)] {
            assert!(key.check(bad, now).is_err());
        }
    }
}
