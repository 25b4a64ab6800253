//! HdrHistograms on the wire and at rest: checked before they are decoded.
//!
//! Why the check: the header says how much memory decoding takes, and it comes from outside. One that claims five
//! digits makes the decoder allocate 48 MB.

use hdrhistogram::{
    Histogram,
    serialization::{Deserializer, Serializer as _, V2Serializer},
};

/// Two significant digits: values are right within 1 %.
pub(super) const DIGITS: u32 = 2;
/// Microseconds in an hour: nothing that is measured here is longer.
pub(super) const MAX_HIGH: u64 = 3_600_000_000;
/// An hour in two digits has some 3,600 counters of at most 9 bytes each.
const MAX_LEN: usize = 40 * 1024;
const HEADER: usize = 40;

/// Why a histogram was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("longer than {MAX_LEN} bytes or shorter than its header")]
    Length,
    #[error("claims more than {DIGITS} digits or an hour")]
    Header,
    #[error("does not decode")]
    Content,
}

pub(super) fn empty() -> Histogram<u64> {
    let mut histogram = Histogram::new(2).expect("two digits are valid");
    histogram.auto(true);
    histogram
}

pub(super) fn encode(histogram: &Histogram<u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to memory does not fail; an empty result decodes to nothing.
    if V2Serializer::new().serialize(histogram, &mut bytes).is_err() {
        bytes.clear();
    }
    bytes.shrink_to_fit();
    bytes
}

/// What stands before the counts, as far as it is not the same in each.
pub(super) struct Header {
    pub(super) cookie: u32,
    /// Bytes of the counts.
    pub(super) len: usize,
    pub(super) offset: u32,
    pub(super) low: u64,
}

/// The header, if what it claims is harmless, and what comes after it.
pub(super) fn check(bytes: &[u8]) -> Result<(Header, &[u8]), Refused> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or(Refused::Length)?;
    if bytes.len() > MAX_LEN {
        return Err(Refused::Length);
    }
    let mut words = header.as_chunks::<4>().0.iter().map(|word| u32::from_be_bytes(*word));
    let mut word = || words.next().unwrap_or_default();
    let (cookie, len, offset, digits) = (word(), word(), word(), word());
    let mut long = || u64::from(word()) << 32 | u64::from(word());
    let (low, high) = (long(), long());
    if digits != DIGITS || high > MAX_HIGH {
        return Err(Refused::Header);
    }
    Ok((Header { cookie, len: usize::try_from(len).map_err(|_| Refused::Length)?, offset, low }, rest))
}

/// `None` for no bytes: nothing was recorded.
pub(super) fn decode(bytes: &[u8]) -> Result<Option<Histogram<u64>>, Refused> {
    if bytes.is_empty() {
        return Ok(None);
    }
    check(bytes)?;
    let decoded = Deserializer::new().deserialize::<u64, _>(&mut &bytes[..]);
    decoded.map(Some).map_err(|_| Refused::Content)
}
