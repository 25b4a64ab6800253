//! `google.protobuf.Any` with its value as shared bytes.
//!
//! Why our own: `prost_types::Any` holds a `Vec<u8>`, which would be copied once a subscriber. A resource
//! is encoded once and then belongs to every stream that sends it.

use bytes::Bytes;

/// A message of any type, still encoded.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// Which message: `type.googleapis.com/<package>.<Message>`.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}
