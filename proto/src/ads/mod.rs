//! The exchange of resources over Delta ADS, both sides, without IO.
//!
//! Why sans-IO: the rules of this exchange (nonces, ACK and NACK, resume, what must be answered and what
//! must not) are where every control plane has had its outages. As values that are told what arrived, they
//! are tested one by one and against a model (`tests/model.rs`), and the shells around them only move bytes.

pub mod client;
pub mod collection;
pub mod server;

pub use client::{Change, Client};
pub use collection::{Collection, Priority};
pub use server::{Source, Stream, Versioned};

/// Bytes of one message on the stream.
pub const MAX_MESSAGE_LEN: usize = 4 * 1024 * 1024;
/// Bytes of one resource.
pub const MAX_RESOURCE_LEN: usize = 1024 * 1024;
/// Resources that one client holds, and that one message may have.
pub const MAX_RESOURCES: usize = 100_000;

/// `Any.type_url` of a [`crate::pb::v1::CollectionHead`], which travels among the endpoints.
pub const COLLECTION_HEAD_TYPE_URL: &str = "type.googleapis.com/weft.v1.CollectionHead";
/// `Any.type_url` of a [`crate::pb::v1::RejectedResource`], which travels in the details of a NACK.
pub const REJECTED_TYPE_URL: &str = "type.googleapis.com/weft.v1.RejectedResource";

/// The types that can be subscribed, in the order in which a server prefers to send them: who may call
/// comes before how to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceType {
    /// Who may call one port of the subscriber.
    Authorization,
    /// The subscriber's own settings.
    WorkloadConfig,
    /// Trust anchors of one trust domain.
    TrustBundle,
    /// One endpoint; subscribed as a collection.
    Endpoint,
    /// One port of a service.
    Service,
    /// The rules of a service.
    Route,
}

impl ResourceType {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Authorization,
        Self::WorkloadConfig,
        Self::TrustBundle,
        Self::Endpoint,
        Self::Service,
        Self::Route,
    ];

    /// As it is written on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => "type.googleapis.com/weft.v1.Authorization",
            Self::WorkloadConfig => "type.googleapis.com/weft.v1.WorkloadConfig",
            Self::TrustBundle => "type.googleapis.com/weft.v1.TrustBundle",
            Self::Endpoint => "type.googleapis.com/weft.v1.Endpoint",
            Self::Service => "type.googleapis.com/weft.v1.Service",
            Self::Route => "type.googleapis.com/weft.v1.Route",
        }
    }

    /// From the wire; `None` for a type of another version of Weft.
    pub fn from_type_url(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.type_url() == type_url)
    }

    /// The message's name, for logs and `Applied N/M`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Authorization => "Authorization",
            Self::WorkloadConfig => "WorkloadConfig",
            Self::TrustBundle => "TrustBundle",
            Self::Endpoint => "Endpoint",
            Self::Service => "Service",
            Self::Route => "Route",
        }
    }

    const fn index(self) -> usize {
        self as usize
    }
}

impl std::fmt::Display for ResourceType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether `name` is subscribed as a collection: many resources, told one by one.
fn is_collection(ty: ResourceType, name: &str) -> bool {
    ty == ResourceType::Endpoint && name.ends_with("/*")
}

/// The last part of a head's name.
const HEAD: &str = "$head";
