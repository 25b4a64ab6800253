//! How long a peer is believed after its handshake: until its certificate ends, until its root or its own part in
//! it is trusted no more, or until this workload has no identity of its own.
//!
//! Why both sides hold one: either can judge only what the other one showed. Why it remembers the anchors that it
//! was judged by: this workload's own renewals then cost no signature check for each open connection.

use std::{cell::RefCell, sync::Arc, time::Duration, time::SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use weft_core::identity::SpiffeId;

use crate::{
    telemetry::metrics::Counter,
    tls::{self, Anchors, Material, Role, SKEW, TlsError},
};

/// What a peer has shown, and by what it was believed last.
pub(crate) struct Belief {
    chain: Vec<CertificateDer<'static>>,
    identity: SpiffeId,
    role: Role,
    ends: SystemTime,
    anchors: RefCell<Option<Arc<Anchors>>>,
}

/// Why a peer is believed no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Its certificate has ended.
    Expired,
    /// Its root or its trust domain is trusted no more, or a list revokes it.
    Untrusted,
    /// We have no certificate any more.
    Nameless,
}

impl Belief {
    /// Believes what a verifier has just accepted under `own`. `jitter` in `0.0..=1.0`.
    ///
    /// # Errors
    /// The certificate names nobody.
    pub(crate) fn new(
        shown: &[CertificateDer<'_>],
        role: Role,
        own: Option<&Material>,
        jitter: f64,
    ) -> Result<Self, TlsError> {
        let identity = tls::peer_identity(shown)?;
        let validity = tls::peer_validity(shown)?;
        let anchors = own.and_then(|own| own.trust().anchors(identity.trust_domain()));
        Ok(Self {
            chain: shown.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            ends: validity.outlived_at(now(own), SKEW, jitter),
            anchors: RefCell::new(anchors),
            identity,
            role,
        })
    }

    /// Whose belief it is.
    pub(crate) fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Whether the peer would be believed now.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn holds(&self, own: Option<&Material>) -> Result<(), Lost> {
        let own = own.ok_or(Lost::Nameless)?;
        // A clock that jumped ends no sleep, but it renews our own certificate, and then this is asked.
        if own.clock().now() > self.ends {
            return Err(Lost::Expired);
        }
        let anchors = own.trust().anchors(self.identity.trust_domain()).ok_or(Lost::Untrusted)?;
        let mut judged_by = self.anchors.borrow_mut();
        if judged_by.as_ref().is_some_and(|by| Arc::ptr_eq(by, &anchors)) {
            return Ok(());
        }
        if !own.still_accepts(&self.chain, self.role) {
            return Err(Lost::Untrusted);
        }
        *judged_by = Some(anchors);
        Ok(())
    }

    /// Ends when the peer is believed no more; says why.
    pub(crate) async fn lost(&self, mut material: watch::Receiver<Option<Arc<Material>>>) -> Lost {
        let by = material.clone();
        let disbelieved = async {
            loop {
                let own = material.borrow_and_update().clone();
                if let Err(lost) = self.holds(own.as_deref()) {
                    return lost;
                }
                drop(own);
                if material.changed().await.is_err() {
                    // The control half has ended: nothing will change any more.
                    return std::future::pending().await;
                }
            }
        };
        tokio::select! {
            biased;
            lost = disbelieved => lost,
            () = self.ended(&by) => Lost::Expired,
        }
    }

    async fn ended(&self, by: &watch::Receiver<Option<Arc<Material>>>) {
        // A function, so that what it borrows is not held while this sleeps.
        let time = || now(by.borrow().as_deref());
        // The wall clock may jump: it is read again at least every ten minutes.
        while let Ok(left) = self.ends.duration_since(time()) {
            tokio::time::sleep(left.min(Duration::from_secs(600))).await;
        }
    }
}

/// What time it is for a peer's certificate.
fn now(own: Option<&Material>) -> SystemTime {
    own.map_or_else(SystemTime::now, |own| own.clock().now())
}

impl Lost {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "peer_expired",
            Self::Untrusted => "peer_untrusted",
            Self::Nameless => "own_expired",
        }
    }

    pub(crate) fn counter(self) -> Counter {
        match self {
            Self::Expired => Counter::PeerExpired,
            Self::Untrusted => Counter::PeerUntrusted,
            Self::Nameless => Counter::OwnExpired,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::testing::Authority;

    #[tokio::test]
    async fn it_ends_with_the_root_and_with_the_own_identity_and_survives_renewals() {
        let (a, b) = (Authority::new("a.test"), Authority::new("a.test"));
        let api = a.material("shop", "api", "uid-2");
        let web = a.material("shop", "web", "uid-1");
        for role in [Role::Client, Role::Server] {
            let belief = Belief::new(api.chain(), role, Some(&web), 0.0).unwrap();
            assert_eq!(belief.identity(), &api.identity);
            assert_eq!(belief.holds(Some(&web)), Ok(()));
            // A renewal, with the same anchors and with equal ones.
            assert_eq!(belief.holds(Some(&web.with_trust(2, web.trust().clone()))), Ok(()));
            assert_eq!(belief.holds(Some(&web.with_trust(3, a.trust()))), Ok(()));
            // A rotation: both roots, then only the other one.
            assert_eq!(belief.holds(Some(&web.with_trust(4, a.trust().merged(&b.trust())))), Ok(()));
            assert_eq!(belief.holds(Some(&web.with_trust(5, b.trust()))), Err(Lost::Untrusted));
            assert_eq!(
                belief.holds(Some(&web.with_trust(6, a.trust().without(&a.domain)))),
                Err(Lost::Untrusted)
            );
            assert_eq!(belief.holds(None), Err(Lost::Nameless));
            // What was trust once may be again.
            assert_eq!(belief.holds(Some(&web.with_trust(7, a.trust()))), Ok(()));

            let (own, seen) = watch::channel(Some(Arc::new(a.material("shop", "web", "uid-1"))));
            let change = async {
                tokio::task::yield_now().await;
                own.send_replace(Some(Arc::new(web.with_trust(8, b.trust()))));
            };
            assert_eq!(tokio::join!(belief.lost(seen), change).0, Lost::Untrusted);
        }
    }

    #[tokio::test]
    async fn it_ends_with_the_peers_certificate() {
        let a = Authority::new("a.test");
        let web = a.material("shop", "web", "uid-1");
        let short = a.material_until(SystemTime::now() + Duration::from_secs(2));
        let belief = Belief::new(short.chain(), Role::Client, Some(&web), 1.0).unwrap();
        let (_own, seen) = watch::channel(Some(Arc::new(web)));
        assert_eq!(belief.lost(seen).await, Lost::Expired);
        assert!(SystemTime::now() > short.validity.not_after);
    }
}
