//! What every family needs: where we are in a message, bounds, and the small messages that several share.
//!
//! Why bounds on everything: the sum of a message is bounded by its bytes, but what a reader builds from it
//! (a compiled pattern, a map entry) is larger than its encoding.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, Method};
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{Backoff, BudgetParams, FEATURES, ObjectRef, Protocol, RetryPolicy, StringMatch, Timeouts},
};

use super::{Invalid, Problem};
use crate::{names::is_segment, pb::v1};

/// Items of an ordinary list.
pub(super) const MAX_ITEMS: usize = 1_024;
/// Bytes of an ordinary text.
pub const MAX_TEXT: usize = 4_096;
/// Bytes of something that becomes a label of a metric.
pub(super) const MAX_LABEL: usize = 253;
/// A part of one, in millionths.
pub(super) const PPM: f64 = 1e6;

/// A position in a message. It lives on the stack and becomes text only when something is wrong.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    parent: Option<&'a At<'a>>,
    name: &'static str,
    index: Option<usize>,
}

impl<'a> At<'a> {
    pub(super) fn root(name: &'static str) -> Self {
        At { parent: None, name, index: None }
    }

    pub(super) fn field(&'a self, name: &'static str) -> At<'a> {
        At { parent: Some(self), name, index: None }
    }

    pub(super) fn item(&'a self, name: &'static str, index: usize) -> At<'a> {
        At { parent: Some(self), name, index: Some(index) }
    }

    pub(super) fn bad(&self, problem: impl Into<Problem>) -> Invalid {
        Invalid { field: self.to_string(), problem: problem.into() }
    }

    /// Converts each item of a list of at most `max`.
    pub(super) fn each<T, U>(
        &'a self,
        name: &'static str,
        items: &[T],
        max: usize,
        mut convert: impl FnMut(&At<'_>, &T) -> Result<U, Invalid>,
    ) -> Result<Vec<U>, Invalid> {
        if items.len() > max {
            return Err(self.field(name).bad(Problem::TooMany { count: items.len(), max }));
        }
        items.iter().enumerate().map(|(i, item)| convert(&self.item(name, i), item)).collect()
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}.")?;
        }
        f.write_str(self.name)?;
        match self.index {
            Some(index) => write!(f, "[{index}]"),
            None => Ok(()),
        }
    }
}

/// Whether this build can enforce all that a message requires.
pub(super) fn requires(at: &At<'_>, features: &[String]) -> Result<(), Invalid> {
    at.each("requires", features, MAX_ITEMS, |at, feature| {
        if FEATURES.contains(&feature.as_str()) {
            Ok(())
        } else {
            Err(at.bad(Problem::Feature(cut(feature))))
        }
    })
    .map(drop)
}

/// The start of a text, for an error.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

pub(super) fn in_range(at: &At<'_>, value: u64, range: RangeInclusive<u64>) -> Result<(), Invalid> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(at.bad(Problem::OutOfRange { value, min: *range.start(), max: *range.end() }))
}

pub(super) fn port(at: &At<'_>, port: u32) -> Result<u16, Invalid> {
    in_range(at, port.into(), 1..=u16::MAX.into())?;
    Ok(port as u16)
}

/// A bound on time: nothing is no bound, and zero would be a bound that always holds.
pub(super) fn millis(at: &At<'_>, ms: Option<u32>) -> Result<Option<Duration>, Invalid> {
    if let Some(ms) = ms {
        in_range(at, ms.into(), 1..=u32::MAX.into())?;
    }
    Ok(ms.map(|ms| Duration::from_millis(ms.into())))
}

/// In milliseconds, rounded up: a bound must not become zero.
pub(super) fn to_millis(duration: Duration) -> u32 {
    let ms = duration.as_micros().div_ceil(1_000);
    u32::try_from(ms).unwrap_or(u32::MAX)
}

pub(super) fn to_ppm(share: f64) -> u32 {
    // A cast from float saturates, and NaN becomes 0.
    (share * PPM).round() as u32
}

pub(super) fn text(at: &At<'_>, text: &str, max: usize) -> Result<Arc<str>, Invalid> {
    if text.len() > max {
        return Err(at.bad(Problem::TooLong { len: text.len(), max }));
    }
    if text.chars().any(char::is_control) {
        return Err(at.bad(Problem::Text(cut(text), "leave control characters out")));
    }
    Ok(text.into())
}

pub(super) fn some_text(at: &At<'_>, value: &str, max: usize) -> Result<Arc<str>, Invalid> {
    if value.is_empty() {
        return Err(at.bad(Problem::Missing));
    }
    text(at, value, max)
}

pub(super) fn segment(at: &At<'_>, name: &str) -> Result<Arc<str>, Invalid> {
    if is_segment(name) { Ok(name.into()) } else { Err(at.bad(Problem::Segment(cut(name)))) }
}

pub(super) fn address(at: &At<'_>, bytes: &Bytes) -> Result<IpAddr, Invalid> {
    let ip = if let Ok(v4) = <[u8; 4]>::try_from(&bytes[..]) {
        IpAddr::V4(Ipv4Addr::from(v4))
    } else if let Ok(v6) = <[u8; 16]>::try_from(&bytes[..]) {
        IpAddr::V6(Ipv6Addr::from(v6)).to_canonical()
    } else {
        return Err(at.bad(Problem::AddressLength(bytes.len())));
    };
    if ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(at.bad(Problem::Address(ip.to_string())));
    }
    Ok(ip)
}

pub(super) fn to_address(ip: IpAddr) -> Bytes {
    match ip.to_canonical() {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

pub(super) fn identity(at: &At<'_>, text: &str) -> Result<SpiffeId, Invalid> {
    text.parse().map_err(|e: weft_core::identity::IdentityError| at.bad(e))
}

pub(super) fn trust_domain(at: &At<'_>, text: &str) -> Result<TrustDomain, Invalid> {
    TrustDomain::new(text).map_err(|e| at.bad(e))
}

pub(super) fn uid(at: &At<'_>, text: &str) -> Result<PodUid, Invalid> {
    PodUid::new(text).map_err(|e| at.bad(e))
}

pub(super) fn header_name(at: &At<'_>, name: &str) -> Result<HeaderName, Invalid> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| at.bad(Problem::HeaderName(cut(name))))
}

pub(super) fn method(at: &At<'_>, name: &str) -> Result<Method, Invalid> {
    if name.len() > MAX_LABEL {
        return Err(at.bad(Problem::TooLong { len: name.len(), max: MAX_LABEL }));
    }
    Method::from_bytes(name.as_bytes()).map_err(|_| at.bad(Problem::Method(cut(name))))
}

pub(super) fn protocol(at: &At<'_>, value: i32) -> Result<Protocol, Invalid> {
    match v1::Protocol::try_from(value) {
        Ok(v1::Protocol::Unspecified) => Ok(Protocol::Detect),
        Ok(v1::Protocol::Opaque) => Ok(Protocol::Opaque),
        Ok(v1::Protocol::Http1) => Ok(Protocol::Http1),
        Ok(v1::Protocol::Http2) => Ok(Protocol::Http2),
        Ok(v1::Protocol::Grpc) => Ok(Protocol::Grpc),
        Ok(v1::Protocol::Tls) => Ok(Protocol::Tls),
        Err(_) => Err(at.bad(Problem::UnknownValue(value))),
    }
}

pub(super) fn to_protocol(protocol: Protocol) -> i32 {
    let value = match protocol {
        Protocol::Detect => v1::Protocol::Unspecified,
        Protocol::Opaque => v1::Protocol::Opaque,
        Protocol::Http1 => v1::Protocol::Http1,
        Protocol::Http2 => v1::Protocol::Http2,
        Protocol::Grpc => v1::Protocol::Grpc,
        Protocol::Tls => v1::Protocol::Tls,
    };
    value.into()
}

pub(super) fn object(at: &At<'_>, object: Option<&v1::ObjectRef>) -> Result<ObjectRef, Invalid> {
    let at = at.field("object");
    let object = object.ok_or_else(|| at.bad(Problem::Missing))?;
    Ok(ObjectRef {
        kind: some_text(&at.field("kind"), &object.kind, MAX_LABEL)?,
        namespace: text(&at.field("namespace"), &object.namespace, MAX_LABEL)?,
        name: some_text(&at.field("name"), &object.name, MAX_LABEL)?,
    })
}

pub(super) fn to_object(object: &ObjectRef) -> Option<v1::ObjectRef> {
    Some(v1::ObjectRef {
        kind: object.kind.to_string(),
        namespace: object.namespace.to_string(),
        name: object.name.to_string(),
    })
}

pub(super) fn string_match(at: &At<'_>, value: &v1::StringMatch) -> Result<StringMatch, Invalid> {
    use v1::string_match::Kind;
    // An empty prefix or suffix would match everything, whatever its author meant.
    match &value.kind {
        None => Err(at.bad(Problem::Unspecified("exact, prefix, suffix or present"))),
        Some(Kind::Exact(s)) => Ok(StringMatch::Exact(text(&at.field("exact"), s, MAX_TEXT)?)),
        Some(Kind::Prefix(s)) => Ok(StringMatch::Prefix(some_text(&at.field("prefix"), s, MAX_TEXT)?)),
        Some(Kind::Suffix(s)) => Ok(StringMatch::Suffix(some_text(&at.field("suffix"), s, MAX_TEXT)?)),
        Some(Kind::Present(true)) => Ok(StringMatch::Present),
        Some(Kind::Present(false)) => Err(at.field("present").bad(Problem::Unspecified("true"))),
    }
}

pub(super) fn to_string_match(value: &StringMatch) -> v1::StringMatch {
    use v1::string_match::Kind;
    let kind = match value {
        StringMatch::Exact(s) => Kind::Exact(s.to_string()),
        StringMatch::Prefix(s) => Kind::Prefix(s.to_string()),
        StringMatch::Suffix(s) => Kind::Suffix(s.to_string()),
        StringMatch::Present => Kind::Present(true),
    };
    v1::StringMatch { kind: Some(kind) }
}

pub(super) fn backoff(
    at: &At<'_>,
    backoff: Option<&v1::Backoff>,
    default: Backoff,
) -> Result<Backoff, Invalid> {
    let Some(backoff) = backoff else { return Ok(default) };
    let at = at.field("backoff");
    let ms = |ms: u32| Duration::from_millis(ms.into());
    Backoff::try_new(ms(backoff.min_ms), ms(backoff.max_ms), f64::from(backoff.jitter_ppm) / PPM)
        .map_err(|e| at.bad(Problem::Backoff(e.to_string())))
}

pub(super) fn to_backoff(backoff: &Backoff) -> Option<v1::Backoff> {
    Some(v1::Backoff {
        min_ms: to_millis(backoff.min()),
        max_ms: to_millis(backoff.max()),
        jitter_ppm: to_ppm(backoff.jitter()),
    })
}

pub(super) fn timeouts(at: &At<'_>, timeouts: Option<&v1::Timeouts>) -> Result<Timeouts, Invalid> {
    let Some(timeouts) = timeouts else { return Ok(Timeouts::default()) };
    let at = at.field("timeouts");
    Ok(Timeouts {
        request: millis(&at.field("request_ms"), timeouts.request_ms)?,
        per_try: millis(&at.field("per_try_ms"), timeouts.per_try_ms)?,
        connect: millis(&at.field("connect_ms"), timeouts.connect_ms)?,
    })
}

pub(super) fn to_timeouts(timeouts: &Timeouts) -> Option<v1::Timeouts> {
    Some(v1::Timeouts {
        request_ms: timeouts.request.map(to_millis),
        per_try_ms: timeouts.per_try.map(to_millis),
        connect_ms: timeouts.connect.map(to_millis),
    })
}

/// Largest body that a policy may ask a sidecar to keep for a replay: 16 MiB.
const MAX_REPLAY: u32 = 16 * 1024 * 1024;
/// Attempts beyond the first that a policy may ask for.
const MAX_RETRIES: u32 = 100;

pub(super) fn retry(at: &At<'_>, retry: Option<&v1::Retry>) -> Result<RetryPolicy, Invalid> {
    let default = RetryPolicy::default();
    let Some(retry) = retry else { return Ok(default) };
    let at = at.field("retry");
    let statuses = at.each("statuses", &retry.statuses, MAX_ITEMS, |at, range| {
        in_range(&at.field("first"), range.first.into(), 100..=599)?;
        in_range(&at.field("last"), range.last.into(), range.first.into()..=599)?;
        Ok(range.first as u16..=range.last as u16)
    })?;
    let grpc_codes = at.each("grpc_codes", &retry.grpc_codes, MAX_ITEMS, |at, code| {
        in_range(at, (*code).into(), 1..=16)?;
        Ok(*code as u16)
    })?;
    let max_retries = retry.max_retries.unwrap_or(default.max_retries);
    in_range(&at.field("max_retries"), max_retries.into(), 0..=MAX_RETRIES.into())?;
    let max_body = match retry.max_body_bytes {
        None => default.max_body,
        Some(bytes) => {
            in_range(&at.field("max_body_bytes"), bytes.into(), 0..=MAX_REPLAY.into())?;
            bytes as usize
        }
    };
    Ok(RetryPolicy {
        statuses,
        grpc_codes,
        on_reset: retry.on_reset,
        max_retries,
        any_method: retry.any_method,
        max_body,
        backoff: backoff(&at, retry.backoff.as_ref(), default.backoff)?,
        budget: budget(&at, retry.budget.as_ref())?,
    })
}

pub(super) fn to_retry(retry: &RetryPolicy) -> Option<v1::Retry> {
    Some(v1::Retry {
        statuses: retry
            .statuses
            .iter()
            .map(|range| v1::retry::StatusRange {
                first: (*range.start()).into(),
                last: (*range.end()).into(),
            })
            .collect(),
        grpc_codes: retry.grpc_codes.iter().map(|code| (*code).into()).collect(),
        on_reset: retry.on_reset,
        max_retries: Some(retry.max_retries.min(MAX_RETRIES)),
        any_method: retry.any_method,
        max_body_bytes: Some(u32::try_from(retry.max_body).unwrap_or(MAX_REPLAY).min(MAX_REPLAY)),
        backoff: to_backoff(&retry.backoff),
        budget: Some(v1::retry::Budget {
            ratio_ppm: to_ppm(retry.budget.ratio),
            min_per_second: retry.budget.min_per_second,
            window_ms: to_millis(retry.budget.window),
        }),
    })
}

fn budget(at: &At<'_>, budget: Option<&v1::retry::Budget>) -> Result<BudgetParams, Invalid> {
    let Some(budget) = budget else { return Ok(BudgetParams::default()) };
    let at = at.field("budget");
    // Ten retries a request is already no budget; ten minutes remember an outage that is long over.
    in_range(&at.field("ratio_ppm"), budget.ratio_ppm.into(), 0..=10_000_000)?;
    in_range(&at.field("min_per_second"), budget.min_per_second.into(), 0..=1_000_000)?;
    in_range(&at.field("window_ms"), budget.window_ms.into(), 1..=600_000)?;
    Ok(BudgetParams {
        ratio: f64::from(budget.ratio_ppm) / PPM,
        min_per_second: budget.min_per_second,
        window: Duration::from_millis(budget.window_ms.into()),
    })
}
