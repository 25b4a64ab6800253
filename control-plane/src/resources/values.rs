//! Values that are checked where they are read, so that a typo names its line: durations, patterns,
//! identities, address ranges, statuses.
//!
//! Why types and not a later pass: serde knows the path of what it is reading. A value that decodes is
//! valid, and nothing downstream has to ask again.

use std::{borrow::Cow, fmt, net::IpAddr, ops::RangeInclusive, str::FromStr, time::Duration};

use http::{HeaderName, Method};
use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use weft_core::{
    identity::{SpiffeId, TrustDomain},
    policy::StringMatch,
};
use weft_proto::convert::MAX_TEXT;

/// A Gateway API duration (GEP-2257): `500ms`, `1m30s`, at most four parts of at most five digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GatewayDuration(pub Duration);

/// `value`, `value*`, `*value`, or `*` for anything; never a regular expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextPattern(pub StringMatch);

/// A SPIFFE ID of the one accepted shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(pub SpiffeId);

/// A trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain(pub TrustDomain);

/// An address range, or one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cidr(pub IpNet);

/// An HTTP method, in upper case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodName(pub Method);

/// An HTTP header's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderText(pub HeaderName);

/// HTTP statuses: `503`, `"5xx"` or `"500-504"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(pub RangeInclusive<u16>);

/// A gRPC status: its number or its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcCode(pub u16);

/// A share: `0.8` or `80` (per cent). 1 and below are shares, above are per cent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(pub f64);

impl FromStr for GatewayDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a duration: write 500ms, 10s, 1m30s or 2h");
        let mut rest = text;
        let mut total = Duration::ZERO;
        for part in 0.. {
            if rest.is_empty() && part > 0 {
                return Ok(Self(total));
            }
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if part == 4 || digits == 0 || digits > 5 {
                break;
            }
            let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
            // `ms` before `m`: the longer unit wins.
            let units = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
            let (unit, millis) =
                units.into_iter().find(|(unit, _)| rest.starts_with(unit)).ok_or_else(bad)?;
            rest = &rest[unit.len()..];
            total += Duration::from_millis(number * millis);
        }
        Err(bad())
    }
}

impl fmt::Display for GatewayDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.as_millis();
        if left == 0 {
            return f.write_str("0s");
        }
        for (unit, millis) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
            if left / millis > 0 {
                write!(f, "{}{unit}", left / millis)?;
            }
            left %= millis;
        }
        Ok(())
    }
}

impl FromStr for TextPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // What sidecars would refuse, with the policies of everybody else on the same port.
        if text.len() > MAX_TEXT {
            return Err(format!("a pattern has at most {MAX_TEXT} bytes, and this one {}", text.len()));
        }
        if let Some(found) = text.chars().find(|c| c.is_control()) {
            return Err(format!("{text:?} has the control character {found:?}: leave it out"));
        }
        let stars = text.matches('*').count();
        let matched = match (stars, text.strip_prefix('*'), text.strip_suffix('*')) {
            (0, ..) if text.is_empty() => return Err("an empty pattern matches nothing".to_owned()),
            (0, ..) => StringMatch::Exact(text.into()),
            (1, Some(""), _) => StringMatch::Present,
            (1, Some(suffix), _) => StringMatch::Suffix(suffix.into()),
            (1, _, Some(prefix)) => StringMatch::Prefix(prefix.into()),
            _ => return Err(format!("{text:?}: `*` stands alone, first or last")),
        };
        Ok(Self(matched))
    }
}

impl fmt::Display for TextPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            StringMatch::Exact(text) => f.write_str(text),
            StringMatch::Prefix(text) => write!(f, "{text}*"),
            StringMatch::Suffix(text) => write!(f, "*{text}"),
            StringMatch::Present => f.write_str("*"),
        }
    }
}

impl FromStr for Identity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|e: weft_core::identity::IdentityError| e.to_string())
    }
}

impl FromStr for Domain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        TrustDomain::new(text).map(Self).map_err(|e| e.to_string())
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self(address.into()));
        }
        let net: IpNet =
            text.parse().map_err(|_| format!("{text:?} is not an address range such as 10.0.0.0/8"))?;
        if net.trunc() != net {
            return Err(format!("{text:?} has host bits set; did you mean {}?", net.trunc()));
        }
        Ok(Self(net))
    }
}

impl FromStr for MethodName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.bytes().any(|b| b.is_ascii_lowercase()) {
            return Err(format!("{text:?}: methods are written in upper case"));
        }
        text.parse().map(Self).map_err(|_| format!("{text:?} is not an HTTP method"))
    }
}

impl FromStr for HeaderText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| format!("{text:?} is not a header name"))
    }
}

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a status: write 503, 5xx or 500-504");
        let status = |text: &str| text.parse().ok().filter(|s| (400..=599).contains(s));
        if let Some(class) = text.strip_suffix("xx") {
            return match class {
                "4" => Ok(Self(400..=499)),
                "5" => Ok(Self(500..=599)),
                _ => Err(bad()),
            };
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (status(first), status(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self(first..=last)),
            _ => Err(bad()),
        }
    }
}

impl FromStr for GrpcCode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.to_ascii_uppercase().replace('-', "_");
        let by_name = GRPC_CODES.iter().position(|name| *name == upper);
        let code = by_name.or_else(|| text.parse().ok()).filter(|code| (1..GRPC_CODES.len()).contains(code));
        code.and_then(|code| u16::try_from(code).ok())
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a gRPC status that can fail: write UNAVAILABLE or 14"))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for HeaderText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.start() == self.0.end() {
            return self.0.start().fmt(f);
        }
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(GRPC_CODES.get(usize::from(self.0)).copied().unwrap_or("UNKNOWN"))
    }
}

/// Text on the wire, `$name` in memory; `$also_number` takes `503` as well as `"503"`.
macro_rules! as_text {
    ($($name:ident: $schema:tt),* $(,)?) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Reader;
                impl de::Visitor<'_> for Reader {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(stringify!($name))
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                as_text!(@read $schema, from, Reader)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                as_text!(@schema $schema)
            }
        }
    )*};
    (@read text, $from:ident, $reader:ident) => { $from.deserialize_str($reader) };
    (@read pattern, $from:ident, $reader:ident) => { $from.deserialize_str($reader) };
    (@read duration, $from:ident, $reader:ident) => { $from.deserialize_str($reader) };
    (@read int_or_text, $from:ident, $reader:ident) => { $from.deserialize_any($reader) };
    (@schema text) => { json_schema!({ "type": "string" }) };
    // In characters, where what is read counts bytes: a first bound, for whoever has no webhook.
    (@schema pattern) => { json_schema!({ "type": "string", "maxLength": MAX_TEXT }) };
    (@schema duration) => { json_schema!({ "type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$" }) };
    (@schema int_or_text) => { json_schema!({ "x-kubernetes-int-or-string": true }) };
}

as_text! {
    GatewayDuration: duration,
    TextPattern: pattern,
    Identity: text,
    Domain: text,
    Cidr: text,
    MethodName: text,
    HeaderText: text,
    Statuses: int_or_text,
    GrpcCode: int_or_text,
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(from)?;
        let share = if number > 1.0 { number / 100.0 } else { number };
        if !(0.0..=1.0).contains(&share) {
            return Err(de::Error::custom(format!("{number} is not a share: write 0.8 or 80")));
        }
        Ok(Self(share))
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(self.0)
    }
}

impl JsonSchema for Share {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Share".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0, "maximum": 100 })
    }
}

const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_the_gateway_api_does() {
        let ok = |text: &str, millis| {
            let parsed: GatewayDuration = text.parse().unwrap();
            assert_eq!(parsed.0, Duration::from_millis(millis), "{text}");
            assert_eq!(parsed.to_string().parse::<GatewayDuration>().unwrap(), parsed);
        };
        ok("500ms", 500);
        ok("1m30s", 90_000);
        ok("0s", 0);
        ok("2h1m3s4ms", 7_263_004);
        for bad in ["", "1", "1.5s", "s", "123456s", "1s1s1s1s1s", "-1s", "1 s", "10d"] {
            assert!(bad.parse::<GatewayDuration>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pattern_has_one_star_at_its_start_or_its_end() {
        let parse = |text: &str| text.parse::<TextPattern>().map(|p| p.0);
        assert_eq!(parse("/a"), Ok(StringMatch::Exact("/a".into())));
        assert_eq!(parse("/a*"), Ok(StringMatch::Prefix("/a".into())));
        assert_eq!(parse("*.png"), Ok(StringMatch::Suffix(".png".into())));
        assert_eq!(parse("*"), Ok(StringMatch::Present));
        for bad in ["", "a*b", "*a*", "**"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        // What no sidecar takes is refused where it is written.
        let (most, more) = ("a".repeat(MAX_TEXT), "a".repeat(MAX_TEXT + 1));
        assert_eq!(parse(&most), Ok(StringMatch::Exact(most.as_str().into())));
        for (bad, why) in
            [("/a\tb*", "control character"), ("/a\u{85}", "control character"), (&more, "4096")]
        {
            assert!(parse(bad).unwrap_err().contains(why), "{bad}");
        }
    }

    #[test]
    fn statuses_are_a_class_a_number_or_a_range_and_codes_have_names() {
        let statuses: Vec<Statuses> = serde_json::from_str(r#"["5xx", 503, "429", "500-504"]"#).unwrap();
        assert_eq!(
            statuses.iter().map(|s| s.0.clone()).collect::<Vec<_>>(),
            [500..=599, 503..=503, 429..=429, 500..=504]
        );
        for bad in ["200", "2xx", "504-500", "600", "x"] {
            assert!(bad.parse::<Statuses>().is_err(), "{bad}");
        }
        let codes: Vec<GrpcCode> =
            serde_json::from_str(r#"["UNAVAILABLE", 4, "resource-exhausted"]"#).unwrap();
        assert_eq!(codes.iter().map(|c| c.0).collect::<Vec<_>>(), [14, 4, 8]);
        assert!("OK".parse::<GrpcCode>().is_err());
    }

    #[test]
    fn ranges_keep_no_host_bits() {
        assert!("10.0.0.0/8".parse::<Cidr>().is_ok());
        assert_eq!("10.1.2.3".parse::<Cidr>().unwrap().to_string(), "10.1.2.3/32");
        assert!("10.1.2.3/8".parse::<Cidr>().unwrap_err().contains("10.0.0.0/8"));
    }
}
