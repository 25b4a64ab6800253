//! Who is at the other end of a connection: a sidecar under an identity, a server outside the mesh, or this pod's own app.
//!
//! Why it is decided once, before a connection is looked for: what may be sent in plaintext is a question of policy, and
//! whoever makes or reuses connections must not have to ask it again.

use std::net::SocketAddr;

use weft_core::{
    identity::{PodUid, SpiffeId},
    policy::{Endpoint, Service, Tunnel},
};

/// Where to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A sidecar, by mTLS.
    Mesh { address: SocketAddr, uid: PodUid, identity: SpiffeId },
    /// An endpoint outside the mesh.
    Plain { address: SocketAddr, h2: bool },
    /// This pod's own app, at its original address.
    App { address: SocketAddr, h2: bool },
}

/// By address alone: uid and identity only decide between equals, and hashing them costs more than the rest.
impl std::hash::Hash for Peer {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.address().hash(state);
    }
}

impl Peer {
    /// How to reach an endpoint; `None` where only mTLS with an accepted identity would do and cannot be had (never
    /// plaintext instead).
    pub(crate) fn of(endpoint: &Endpoint, h2: bool, service: &Service) -> Option<Self> {
        let accepted = &service.accepted_identities;
        match (endpoint.tunnel, &endpoint.identity) {
            (Tunnel::Weft, Some(identity)) if !accepted.is_empty() && !accepted.contains(identity) => None,
            (Tunnel::Weft, Some(identity)) => Some(Self::Mesh {
                address: endpoint.address,
                uid: endpoint.uid.clone(),
                identity: identity.clone(),
            }),
            (Tunnel::Weft, None) => None,
            (Tunnel::None, _) if service.mtls_required || !accepted.is_empty() => None,
            (Tunnel::None, _) => Some(Self::Plain { address: endpoint.address, h2 }),
        }
    }

    /// Whether it is this pod's own app.
    pub(crate) fn is_app(&self) -> bool {
        matches!(self, Self::App { .. })
    }

    pub(crate) fn is_h2(&self) -> bool {
        match self {
            Self::Mesh { .. } => true,
            Self::Plain { h2, .. } | Self::App { h2, .. } => *h2,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        match self {
            Self::Mesh { address, .. } | Self::Plain { address, .. } | Self::App { address, .. } => *address,
        }
    }
}

/// Why [`Peer::of`] knows no way.
pub(crate) const NOT_ACCEPTED: &str =
    "the endpoint has no identity that this service accepts, and plaintext is no way";
