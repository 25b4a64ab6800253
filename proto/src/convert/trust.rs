//! `TrustBundle`: the trust anchors of one trust domain.
//!
//! Why no parsing of certificates here: whether a root is usable is decided by the TLS stack that will use
//! it. Here it is only made sure that there is something to decide on: an empty bundle would mean "trust
//! nobody", and cut the mesh in two on a mistake of the writer.

use std::time::Duration;

use bytes::Bytes;

use super::{
    Invalid, Problem,
    common::{At, in_range, to_millis},
    decode,
};
use crate::pb::v1;

/// Roots of one trust domain: a rotation has two, a merger a handful.
const MAX_ROOTS: usize = 64;
/// Revocation lists of one trust domain.
const MAX_CRLS: usize = 64;
/// Bytes of one certificate or revocation list.
const MAX_DER: usize = 256 * 1024;

/// The trust anchors of one trust domain (its name is the resource's).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustResource {
    /// Root certificates, DER; never empty.
    pub roots: Vec<Bytes>,
    /// Revocation lists, DER.
    pub crls: Vec<Bytes>,
    /// Grows with each change.
    pub sequence: u64,
    /// How soon to ask again where there is no stream; zero: no hint.
    pub refresh_hint: Duration,
}

/// Reads a trust bundle.
///
/// # Errors
/// The first field that cannot be taken.
pub fn parse(body: &[u8]) -> Result<TrustResource, Invalid> {
    TrustResource::try_from(&decode::<v1::TrustBundle>("TrustBundle", body)?)
}

impl TryFrom<&v1::TrustBundle> for TrustResource {
    type Error = Invalid;

    fn try_from(pb: &v1::TrustBundle) -> Result<Self, Invalid> {
        let at = At::root("TrustBundle");
        if pb.roots_der.is_empty() {
            return Err(at.field("roots_der").bad(Problem::Missing));
        }
        in_range(&at.field("refresh_hint_s"), pb.refresh_hint_s.into(), 0..=4_000_000)?;
        Ok(Self {
            roots: at.each("roots_der", &pb.roots_der, MAX_ROOTS, der)?,
            crls: at.each("crls_der", &pb.crls_der, MAX_CRLS, der)?,
            sequence: pb.sequence,
            refresh_hint: Duration::from_secs(pb.refresh_hint_s.into()),
        })
    }
}

impl From<&TrustResource> for v1::TrustBundle {
    fn from(bundle: &TrustResource) -> Self {
        Self {
            roots_der: bundle.roots.clone(),
            sequence: bundle.sequence,
            refresh_hint_s: to_millis(bundle.refresh_hint) / 1_000,
            crls_der: bundle.crls.clone(),
        }
    }
}

/// A DER sequence by its first byte: enough to tell it from PEM, and from nothing.
fn der(at: &At<'_>, bytes: &Bytes) -> Result<Bytes, Invalid> {
    if bytes.len() > MAX_DER {
        return Err(at.bad(Problem::TooLong { len: bytes.len(), max: MAX_DER }));
    }
    if bytes.first() == Some(&0x30) { Ok(bytes.clone()) } else { Err(at.bad(Problem::Der)) }
}
