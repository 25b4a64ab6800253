//! Weft's contract: what goes over the wire, and nothing about how it gets there.
//!
//! Why one crate for both sides: the sidecar and the controller must not disagree about a field, a
//! resource name or a rule of the exchange, so each of these exists once, here.
//!
//! Invariants of this crate:
//! - no runtime, socket, clock or random source: [`ads`] is told what arrived and what time it is, and
//!   says what to send;
//! - everything that arrives is hostile: it is bounded before it is kept, and refused with a reason that
//!   names the field and the fix, never repaired and never a panic;
//! - a message becomes a `weft-core` value only through [`convert`]: nothing else reads a policy message;
//! - `src/gen` is generated (`tests/gen.rs` compares) and is never edited.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod ads;
pub mod any;
pub mod convert;
pub mod names;

/// The generated messages and services.
pub mod pb {
    /// Envoy's Delta ADS: `envoy.service.discovery.v3`.
    #[allow(
        clippy::all,
        rustdoc::all,
        clippy::unwrap_used,
        clippy::wildcard_enum_match_arm,
        missing_docs,
        unreachable_pub,
        unused_qualifications,
        reason = "generated code"
    )]
    pub mod ads {
        include!("gen/envoy.service.discovery.v3.rs");
    }

    /// Weft's own messages: `weft.v1`.
    #[allow(
        clippy::all,
        rustdoc::all,
        clippy::unwrap_used,
        clippy::wildcard_enum_match_arm,
        missing_docs,
        unreachable_pub,
        unused_qualifications,
        reason = "generated code"
    )]
    pub mod v1 {
        include!("gen/weft.v1.rs");
    }
}

pub use any::Any;

/// By hand, because the generated one would print the workload's token.
impl std::fmt::Debug for pb::v1::CertifyRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertifyRequest").field("csr_der", &self.csr_der.len()).finish_non_exhaustive()
    }
}
