//! Messages to `weft-core` values and back, one file per family.
//!
//! Why parse and not validate: a value of a core type can be enforced as it stands, so that nothing behind
//! this module asks again. A message that says more than this build can enforce is refused whole (the last
//! good one stays), because a rule that is understood by half means something else than its author wrote.
//!
//! Each error names one field by its path and says what to write instead.

pub mod authz;
pub mod endpoint;
pub mod route;
pub mod service;
pub mod trust;
pub mod workload;

mod common;

pub use common::MAX_TEXT;

use weft_core::{identity::IdentityError, policy::PatternError};

use crate::names::NameError;

/// One field of one message that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// Its path, such as `Route.rules[2].matches[0].path.regex`.
    pub field: String,
    /// What is wrong with it, and the fix.
    pub problem: Problem,
}

/// The ways in which a field can be wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The bytes are no message of that type.
    #[error("cannot be decoded ({0}); sender and reader disagree about the schema")]
    Encoding(String),
    /// It must be there.
    #[error("is missing; set it")]
    Missing,
    /// An enum whose zero is refused.
    #[error("is unspecified; say {0}")]
    Unspecified(&'static str),
    /// An enum value from the future.
    #[error("{0} is not a value that this build knows; upgrade the reader first")]
    UnknownValue(i32),
    /// A feature from the future.
    #[error("names feature {0:?}, which this build cannot enforce; upgrade the reader first")]
    Feature(String),
    /// Too many bytes.
    #[error("has {len} bytes; at most {max} are taken")]
    TooLong {
        /// How many there are.
        len: usize,
        /// How many there may be.
        max: usize,
    },
    /// Too many items.
    #[error("has {count} items; at most {max} are taken")]
    TooMany {
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A number outside its range.
    #[error("is {value}; it must be {min} to {max}")]
    OutOfRange {
        /// The number.
        value: u64,
        /// The smallest that is taken.
        min: u64,
        /// The largest that is taken.
        max: u64,
    },
    /// An address of an odd length.
    #[error("has {0} bytes; an address has 4 or 16")]
    AddressLength(usize),
    /// An address that nothing can listen on.
    #[error("{0} is not the address of one host")]
    Address(String),
    /// Not an identity, trust domain or uid.
    #[error("{0}")]
    Identity(#[from] IdentityError),
    /// Not the name of a resource.
    #[error("{0}")]
    Name(#[from] NameError),
    /// The name of a resource of another kind.
    #[error("{0:?} names another kind of resource; it must start with {1}")]
    NameKind(String, &'static str),
    /// A pattern that core refuses.
    #[error("{0}")]
    Pattern(#[from] PatternError),
    /// A service name that core refuses.
    #[error("{0}")]
    ServiceName(#[from] weft_core::policy::NameError),
    /// Not a namespace or service name.
    #[error("{0:?} must be lower-case letters, digits, '-' and '.'")]
    Segment(String),
    /// Characters that would forge a log line or a header.
    #[error("{0:?} has characters that may not be there; {1}")]
    Text(String, &'static str),
    /// Not a header name.
    #[error("{0:?} is not a header name")]
    HeaderName(String),
    /// Not a header value.
    #[error("is not a header value; leave control characters out")]
    HeaderValue,
    /// Not a method.
    #[error("{0:?} is not an HTTP method")]
    Method(String),
    /// Not an address range.
    #[error("{0:?} is not an address range such as 10.0.0.0/8")]
    Cidr(String),
    /// Said twice.
    #[error("{0} is there twice; say it once")]
    Duplicate(String),
    /// A rate that core refuses.
    #[error("is not a rate that can be kept: {0}")]
    Rate(#[from] weft_core::policy::RateError),
    /// A schedule that core refuses.
    #[error("is not a usable schedule: {0}")]
    Backoff(String),
    /// A mesh endpoint without an identity.
    #[error("is empty on an endpoint that speaks mTLS; name the workload's")]
    NoIdentity,
    /// A condition that holds always.
    #[error("has no condition; leave the list empty to mean all")]
    NoCondition,
    /// Not a DER sequence.
    #[error("is not DER; send the certificate or CRL as DER, not PEM")]
    Der,
}

/// Decodes a message of `family`.
pub(crate) fn decode<M: prost::Message + Default>(family: &'static str, body: &[u8]) -> Result<M, Invalid> {
    if body.len() > crate::ads::MAX_RESOURCE_LEN {
        let problem = Problem::TooLong { len: body.len(), max: crate::ads::MAX_RESOURCE_LEN };
        return Err(Invalid { field: family.to_owned(), problem });
    }
    M::decode(body)
        .map_err(|e| Invalid { field: family.to_owned(), problem: Problem::Encoding(e.to_string()) })
}
