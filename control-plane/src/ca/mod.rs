//! The certificate authority: who is who in the mesh.
//!
//! Why the controller writes every name: a workload sends only a public key. What the certificate says
//! comes from the authenticated token, so nothing that a workload puts into its request can become a name.
//!
//! Why one type in front of the files: keys never leave this folder of modules; others get certificates.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use weft_core::identity::{PodUid, SpiffeId, TrustDomain};

use crate::resources::CONTROL_NAMESPACE;

pub mod certificate;
pub mod csr;
pub mod issuer;
pub mod place;
pub mod root;
pub mod token;

pub use issuer::{Issued, Subject};
pub use place::{Files, Place};
pub use root::{Roots, RotateRoot};
pub use token::{Claims, JoinKey, TokenCheck, TokenError};

/// Why the authority cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file of the state folder.
    #[error("{}: {error}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What happened.
        error: std::io::Error,
    },
    /// A file says something that it must not.
    #[error("{}: {reason}", .path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A signing request that is refused.
    #[error("the signing request is refused: {0}")]
    Csr(#[from] csr::CsrError),
    /// Making a key or certificate failed.
    #[error("signing failed: {0}")]
    Signing(String),
    /// A rotation step that does not fit the state.
    #[error("{0}")]
    Rotation(String),
}

/// The newest certificate of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkloadCertificate {
    /// `<ns>/<pod>`; the uid if the pod is unknown.
    pub pod: String,
    /// Pod uid.
    pub uid: String,
    /// SPIFFE ID.
    pub identity: String,
    /// Hexadecimal.
    pub serial: String,
    /// Start.
    pub not_before: i64,
    /// End.
    pub not_after: i64,
    /// The serial number of the trust anchor that it goes back to; empty: of none that is trusted now.
    pub anchor: String,
    /// Whether its sidecar is connected to a controller.
    pub connected: bool,
    /// The sequence of the trust bundle that its connected sidecar has in force; 0: it has not said.
    pub bundle: u64,
}

/// What every sidecar should trust now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// Trust anchors, oldest first.
    pub roots: Vec<CertificateDer<'static>>,
    /// Grows with every rotation: a sidecar that sees it grow renews its certificate at once.
    pub sequence: u64,
}

/// Who keeps the roots, where that is not a folder: steps are taken there, and this process follows.
#[tonic::async_trait]
pub trait RootKeeper: Send + Sync {
    /// Takes one step of a rotation, and has `ca` follow it; without one, everybody renews.
    ///
    /// # Errors
    /// The step does not fit, or what is kept cannot be written.
    async fn rotate(&self, ca: &Ca, step: Option<RotateRoot>) -> Result<Bundle, CaError>;
}

/// The authority.
#[derive(Debug)]
pub struct Ca {
    trust_domain: TrustDomain,
    lifetime: Duration,
    /// Where there is no cluster to ask.
    join_key: Option<JoinKey>,
    roots: Mutex<Roots>,
    bundle: watch::Sender<Bundle>,
}

impl Ca {
    /// Loads the authority of a state folder, or makes one.
    ///
    /// # Errors
    /// Files that cannot be read, written or used.
    pub fn open(state: &Path, trust_domain: TrustDomain, lifetime: Duration) -> Result<Self, CaError> {
        place::make_folder(state)?;
        let join_key = JoinKey::open(state)?;
        let roots = Roots::open(state, &trust_domain)?;
        let (bundle, _) = watch::channel(roots.bundle());
        Ok(Self { trust_domain, lifetime, join_key: Some(join_key), roots: Mutex::new(roots), bundle })
    }

    /// An authority whose roots somebody else keeps, and who asks somebody else about tokens.
    pub fn with_roots(roots: Roots, trust_domain: TrustDomain, lifetime: Duration) -> Self {
        let (bundle, _) = watch::channel(roots.bundle());
        Self { trust_domain, lifetime, join_key: None, roots: Mutex::new(roots), bundle }
    }

    /// Takes other roots: those that are kept elsewhere have changed.
    pub fn replace(&self, roots: Roots) {
        let bundle = roots.bundle();
        *self.roots() = roots;
        self.bundle.send_if_modified(|known| {
            let differs = *known != bundle;
            *known = bundle;
            differs
        });
    }

    /// The trust anchors, as sidecars read them.
    pub fn anchors(&self) -> String {
        self.roots().anchors()
    }

    /// Signs a workload's key under the names that its token says.
    ///
    /// # Errors
    /// A refused request.
    pub fn issue(&self, csr_der: &[u8], subject: &Subject) -> Result<Issued, CaError> {
        let key = csr::public_key(csr_der)?;
        self.roots().sign(&key, subject, self.lifetime, SystemTime::now())
    }

    /// A key and certificate for the controller's own servers.
    ///
    /// # Errors
    /// Signing.
    pub fn own_certificate(&self) -> Result<(Issued, PrivateKeyDer<'static>), CaError> {
        let subject =
            Subject { identity: controller_identity(&self.trust_domain)?, name: SERVER_NAME.to_owned() };
        self.roots().sign_own(&subject, self.lifetime, SystemTime::now())
    }

    /// Checks a join token.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn check_token(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        self.join_key.as_ref().ok_or(TokenError::Signature)?.check(token, now)
    }

    /// The key of join tokens; none in a cluster.
    pub fn join_key(&self) -> Option<&JoinKey> {
        self.join_key.as_ref()
    }

    /// What sidecars should trust; changes are seen on the channel.
    pub fn bundle(&self) -> watch::Receiver<Bundle> {
        self.bundle.subscribe()
    }

    /// The mesh's trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// How long workload certificates live.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// The roots, for reports: name, whether it signs, subject key id, end of validity.
    pub fn describe(&self) -> Vec<root::RootInfo> {
        self.roots().describe()
    }

    /// The files of roots that are kept elsewhere, unless somebody supplies them.
    pub fn made(&self) -> Option<Files> {
        self.roots().made().cloned()
    }

    /// Whether there is a new root that could begin to sign.
    ///
    /// # Errors
    /// There is none.
    pub fn has_coming_root(&self) -> Result<(), CaError> {
        self.roots().coming().map(drop)
    }

    /// The serial number of the root that stays when the old one is retired.
    ///
    /// # Errors
    /// There is none to retire.
    pub fn staying_root(&self) -> Result<String, CaError> {
        self.roots().staying().map(str::to_owned)
    }

    /// The serial number of the root that a key identifier is of; empty: of none that is trusted.
    pub fn root_by_key(&self, key: &[u8]) -> String {
        self.roots().by_key(key).unwrap_or_default().to_owned()
    }

    /// Takes one step of a root's rotation: A → A+B → B. Without one, every sidecar renews its certificate now.
    ///
    /// # Errors
    /// The step does not fit the state, or the state folder cannot be written.
    pub fn rotate(&self, step: Option<RotateRoot>) -> Result<Bundle, CaError> {
        let mut roots = self.roots();
        roots.step(step, &self.trust_domain)?;
        let bundle = roots.bundle();
        self.bundle.send_replace(bundle.clone());
        Ok(bundle)
    }

    fn roots(&self) -> MutexGuard<'_, Roots> {
        // Every change is written to disk before it is taken, so a panic leaves a state that is whole.
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who the controller is to its sidecars.
///
/// # Errors
/// None for a valid trust domain.
pub fn controller_identity(trust_domain: &TrustDomain) -> Result<SpiffeId, CaError> {
    SpiffeId::new(trust_domain, CONTROL_NAMESPACE, "weft-controller")
        .map_err(|e| CaError::Signing(e.to_string()))
}

/// The subject of a workload's certificate.
///
/// # Errors
/// A namespace or service account that is none.
pub fn workload_subject(trust_domain: &TrustDomain, claims: &Claims) -> Result<Subject, TokenError> {
    let identity = SpiffeId::new(trust_domain, &claims.ns, &claims.sa).map_err(|_| TokenError::Claims)?;
    let uid = PodUid::new(&claims.uid).map_err(|_| TokenError::Claims)?;
    Ok(Subject { identity, name: uid.server_name() })
}

/// The name that sidecars ask the controller for.
pub const SERVER_NAME: &str = "weft-controller.weft.internal";

/// Shared by all who serve.
pub type SharedCa = Arc<Ca>;
