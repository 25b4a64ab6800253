//! Who a workload is: SPIFFE IDs of one shape, trust domains, pod uids, and when to renew.
//!
//! Why one strict shape: the authenticated identity is the one that authorization sees, so there is
//! one parser and one type. Everything that is not exactly
//! `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>` is refused, never repaired.

use std::{
    fmt,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// The longest SPIFFE ID that is accepted, in bytes (SPIFFE ID specification §2.3).
pub const MAX_SPIFFE_ID_LEN: usize = 2_048;
/// The longest trust domain name, in bytes (SPIFFE ID specification §2.1).
pub const MAX_TRUST_DOMAIN_LEN: usize = 255;
/// Kubernetes names (DNS labels and subdomains) end here.
const MAX_SEGMENT_LEN: usize = 253;
/// What follows the pod uid in the server name that a caller sends.
const SERVER_NAME_SUFFIX: &str = ".weft.internal";

/// A SPIFFE trust domain such as `cluster.local`: lower-case letters, digits, `.`, `-` and `_`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`: a workload's identity.
///
/// Cheap to clone; equality is equality of the text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain_end: u16,
    namespace_end: u16,
}

/// The uid of one pod (or, outside Kubernetes, of one workload instance): lower-case letters,
/// digits and `-`, at most 63 bytes, so that it fits one DNS label.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Arc<str>);

/// Why a name is not an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text is longer than the specification allows.
    #[error("identity has {0} bytes; the limit is {1}")]
    TooLong(usize, usize),
    /// The scheme is not exactly `spiffe://`.
    #[error("identity must start with spiffe:// in lower case")]
    Scheme,
    /// The trust domain is empty or has a character outside `a-z 0-9 . - _`.
    #[error("trust domain {0:?} must be lower-case letters, digits, '.', '-' or '_', and not empty")]
    TrustDomain(String),
    /// The path is not `/ns/<namespace>/sa/<service-account>`.
    #[error("identity path must be /ns/<namespace>/sa/<service-account>")]
    Path,
    /// A namespace or service account is not a DNS name in lower case.
    #[error("{0:?} is not a namespace or service account name: lower-case letters, digits, '-' and '.'")]
    Segment(String),
    /// A pod uid is not usable as a DNS label.
    #[error("{0:?} is not a pod uid: 1 to 63 lower-case letters, digits and '-'")]
    PodUid(String),
}

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First instant at which it is valid.
    pub not_before: SystemTime,
    /// Last instant at which it is valid.
    pub not_after: SystemTime,
}

impl TrustDomain {
    /// Checks and takes a trust domain name.
    ///
    /// # Errors
    /// Empty, longer than 255 bytes, or a character outside `a-z 0-9 . - _`.
    pub fn new(name: &str) -> Result<Self, IdentityError> {
        if name.len() > MAX_TRUST_DOMAIN_LEN {
            return Err(IdentityError::TooLong(name.len(), MAX_TRUST_DOMAIN_LEN));
        }
        let ok = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if name.is_empty() || !name.bytes().all(ok) {
            return Err(IdentityError::TrustDomain(name.to_owned()));
        }
        Ok(Self(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    /// Builds the identity of a service account.
    ///
    /// # Errors
    /// A namespace or service account that is not a lower-case DNS name.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole identity as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.text[usize::from(self.trust_domain_end) + NS.len()..usize::from(self.namespace_end)]
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        &self.text[usize::from(self.namespace_end) + SA.len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.len() > MAX_SPIFFE_ID_LEN {
            return Err(IdentityError::TooLong(text.len(), MAX_SPIFFE_ID_LEN));
        }
        let rest = text.strip_prefix(SCHEME).ok_or(IdentityError::Scheme)?;
        let slash = rest.find('/').ok_or(IdentityError::Path)?;
        TrustDomain::new(&rest[..slash])?;
        let path = rest[slash..].strip_prefix(NS).ok_or(IdentityError::Path)?;
        let (namespace, rest) = path.split_once('/').ok_or(IdentityError::Path)?;
        let service_account = rest.strip_prefix("sa/").ok_or(IdentityError::Path)?;
        if service_account.contains('/') {
            return Err(IdentityError::Path);
        }
        check_segment(namespace)?;
        check_segment(service_account)?;
        let trust_domain_end = SCHEME.len() + slash;
        let namespace_end = trust_domain_end + NS.len() + namespace.len();
        let end =
            |n: usize| u16::try_from(n).map_err(|_| IdentityError::TooLong(text.len(), MAX_SPIFFE_ID_LEN));
        Ok(Self {
            text: text.into(),
            trust_domain_end: end(trust_domain_end)?,
            namespace_end: end(namespace_end)?,
        })
    }
}

impl PodUid {
    /// Checks and takes a uid.
    ///
    /// # Errors
    /// Not 1 to 63 lower-case letters, digits and `-`.
    pub fn new(uid: &str) -> Result<Self, IdentityError> {
        let ok = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if uid.is_empty() || uid.len() > 63 || !uid.bytes().all(ok) {
            return Err(IdentityError::PodUid(uid.to_owned()));
        }
        Ok(Self(uid.into()))
    }

    /// The uid.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The TLS server name by which a caller says which pod it means: `<uid>.weft.internal`.
    pub fn server_name(&self) -> String {
        format!("{}{SERVER_NAME_SUFFIX}", self.0)
    }

    /// Whether `server_name` names this pod. Server names compare without regard to case (RFC 6066).
    pub fn is_named_by(&self, server_name: &str) -> bool {
        let uid = self.0.len();
        server_name.len() == uid + SERVER_NAME_SUFFIX.len()
            && server_name.is_char_boundary(uid)
            && server_name[..uid].eq_ignore_ascii_case(&self.0)
            && server_name[uid..].eq_ignore_ascii_case(SERVER_NAME_SUFFIX)
    }
}

impl Validity {
    /// When to ask for the next certificate: between 50 % and 70 % of the lifetime, by `jitter`
    /// in `0.0..=1.0`, so that a fleet that started together does not renew together.
    pub fn renew_at(&self, jitter: f64) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        self.not_before + life.mul_f64(0.5 + 0.2 * jitter.clamp(0.0, 1.0))
    }

    /// When a connection that this certificate opened at `now` ends: with the certificate and a little later, by
    /// `jitter` in `0.0..=1.0`, so that what one certificate opened does not all end in one moment. Whoever was
    /// let in after the end, because clocks may differ by `skew`, has until `skew` is over.
    pub fn outlived_at(&self, now: SystemTime, skew: Duration, jitter: f64) -> SystemTime {
        if now > self.not_after {
            return self.not_after + skew;
        }
        let life = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        self.not_after + (life / 20).min(Duration::from_secs(60)).mul_f64(jitter.clamp(0.0, 1.0))
    }

    /// Whether `now` is inside, with `skew` allowed at both ends.
    pub fn contains(&self, now: SystemTime, skew: Duration) -> bool {
        now + skew >= self.not_before && now <= self.not_after + skew
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_segment(segment: &str) -> Result<(), IdentityError> {
    let ok = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if segment.len() <= MAX_SEGMENT_LEN
        && segment.bytes().all(ok)
        && edge(segment.bytes().next())
        && edge(segment.bytes().last())
    {
        return Ok(());
    }
    Err(IdentityError::Segment(segment.to_owned()))
}

const SCHEME: &str = "spiffe://";
const NS: &str = "/ns/";
const SA: &str = "/sa/";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "spiffe://cluster.local/ns/shop/sa/web";

    #[test]
    fn parts_of_an_identity() {
        let id: SpiffeId = GOOD.parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "shop", "web")
        );
        let built = SpiffeId::new(&TrustDomain::new("cluster.local").unwrap(), "shop", "web").unwrap();
        assert_eq!(built, id);
        assert_eq!(built.as_str(), GOOD);
    }

    #[test]
    fn everything_else_is_refused() {
        let long = format!("spiffe://a/ns/b/sa/{}", "c".repeat(2_100));
        let segment = format!("spiffe://a/ns/{}/sa/c", "b".repeat(254));
        let domain = format!("spiffe://{}/ns/b/sa/c", "a".repeat(256));
        for bad in [
            "",
            "spiffe://",
            "spiffe://cluster.local",
            "spiffe://cluster.local/",
            "SPIFFE://cluster.local/ns/shop/sa/web",
            "Spiffe://cluster.local/ns/shop/sa/web",
            "spiffe:/cluster.local/ns/shop/sa/web",
            "http://cluster.local/ns/shop/sa/web",
            " spiffe://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web ",
            "spiffe://cluster.local/ns/shop/sa/web\n",
            "spiffe://Cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local:443/ns/shop/sa/web",
            "spiffe://user@cluster.local/ns/shop/sa/web",
            "spiffe://clüster.local/ns/shop/sa/web",
            "spiffe://cluster%2elocal/ns/shop/sa/web",
            "spiffe:///ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local//ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/extra",
            "spiffe://cluster.local/ns/shop/web",
            "spiffe://cluster.local/NS/shop/sa/web",
            "spiffe://cluster.local/ns/shop/SA/web",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://cluster.local/ns/./sa/web",
            "spiffe://cluster.local/ns/../sa/web",
            "spiffe://cluster.local/ns/shop/sa/..",
            "spiffe://cluster.local/ns/shop/sa/.",
            "spiffe://cluster.local/ns/shop/sa/w%65b",
            "spiffe://cluster.local/ns/shop/sa/web?x=1",
            "spiffe://cluster.local/ns/shop/sa/web#x",
            "spiffe://cluster.local/ns/shop/sa/web;x",
            "spiffe://cluster.local/ns/shop/sa/Web",
            "spiffe://cluster.local/ns/shop/sa/-web",
            "spiffe://cluster.local/ns/shop/sa/web-",
            "spiffe://cluster.local/ns/shop/sa/we_b",
            "spiffe://cluster.local/ns/shop/sa/wéb",
            "spiffe://cluster.local/ns/shop/sa/web\0",
            "spiffe://cluster.local/ns/shop\0/sa/web",
            "spiffe://cluster.local\0/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web\\",
            "spiffe://cluster.local/ns/shop/sa\\web",
            &long,
            &segment,
            &domain,
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_limits_of_length_are_where_the_specification_has_them() {
        let of =
            |bytes: usize| format!("{:c<bytes$}", "spiffe://a/ns/b/sa/").parse::<SpiffeId>().unwrap_err();
        assert_eq!(
            of(MAX_SPIFFE_ID_LEN + 1),
            IdentityError::TooLong(MAX_SPIFFE_ID_LEN + 1, MAX_SPIFFE_ID_LEN)
        );
        assert!(matches!(of(MAX_SPIFFE_ID_LEN), IdentityError::Segment(_)));
        let domain = |bytes: usize| TrustDomain::new(&"a".repeat(bytes));
        assert_eq!(domain(MAX_TRUST_DOMAIN_LEN).unwrap().as_str().len(), MAX_TRUST_DOMAIN_LEN);
        assert!(domain(MAX_TRUST_DOMAIN_LEN + 1).is_err() && domain(0).is_err());
        let segment = |bytes: usize| format!("spiffe://a/ns/{}/sa/c", "b".repeat(bytes)).parse::<SpiffeId>();
        assert!(segment(MAX_SEGMENT_LEN).is_ok() && segment(MAX_SEGMENT_LEN + 1).is_err());
        assert_eq!(PodUid::new(&"a".repeat(63)).unwrap().as_str(), "a".repeat(63));
    }

    #[test]
    fn names_print_as_they_are() {
        let (id, uid): (SpiffeId, _) = (GOOD.parse().unwrap(), PodUid::new("6f1e").unwrap());
        let domain = TrustDomain::new("cluster.local").unwrap();
        assert_eq!(format!("{id} {id:?}"), format!("{GOOD} {GOOD}"));
        assert_eq!(format!("{domain} {domain:?} {uid} {uid:?}"), "cluster.local cluster.local 6f1e 6f1e");
    }

    #[test]
    fn prefix_twins_differ() {
        let pay: SpiffeId = "spiffe://a/ns/b/sa/pay".parse().unwrap();
        let payments: SpiffeId = "spiffe://a/ns/b/sa/payments".parse().unwrap();
        assert_ne!(pay, payments);
        assert_ne!(pay.service_account(), payments.service_account());
    }

    #[test]
    fn pods_by_server_name() {
        let uid = PodUid::new("6f1e-aa").unwrap();
        assert_eq!(uid.server_name(), "6f1e-aa.weft.internal");
        assert!(uid.is_named_by("6f1e-aa.weft.internal") && uid.is_named_by("6F1E-AA.Weft.Internal"));
        for other in [
            "6f1e-ab.weft.internal",
            "6f1e-aa",
            "6f1e-aa.weft.internal.",
            "x6f1e-aa.weft.internal",
            "",
            "6f1e-aa.weft.external",
            "6f1e-a\u{e4}weft.internal",
        ] {
            assert!(!uid.is_named_by(other), "{other}");
        }
        for bad in ["", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert!(PodUid::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn renewal_is_spread_over_the_middle() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let hour = Duration::from_secs(3_600);
        let life = Validity { not_before: start, not_after: start + 10 * hour };
        assert_eq!(life.renew_at(0.0), start + 5 * hour);
        assert_eq!(life.renew_at(1.0), start + 7 * hour);
        assert!(life.contains(start - hour, hour) && life.contains(start + 11 * hour, hour));
        assert!(!life.contains(start - hour, Duration::ZERO));
        // A certificate that ends before it begins is renewed at once.
        let odd = Validity { not_before: start, not_after: start - hour };
        assert_eq!(odd.renew_at(1.0), start);
    }

    #[test]
    fn what_a_certificate_opened_ends_a_little_after_it() {
        let (start, second) = (SystemTime::UNIX_EPOCH + Duration::from_secs(1_000), Duration::from_secs(1));
        let skew = 300 * second;
        let short = Validity { not_before: start, not_after: start + 40 * second };
        assert_eq!(short.outlived_at(start, skew, 0.0), short.not_after);
        assert_eq!(short.outlived_at(short.not_after, skew, 0.5), short.not_after + second);
        assert_eq!(short.outlived_at(start, skew, 7.0), short.not_after + 2 * second);
        let day = Validity { not_before: start, not_after: start + 86_400 * second };
        assert_eq!(day.outlived_at(start, skew, 1.0), day.not_after + 60 * second);
        // Let in late, by the skew of clocks.
        assert_eq!(day.outlived_at(day.not_after + second, skew, 1.0), day.not_after + skew);
    }

    proptest! {
        #[test]
        fn what_parses_prints_the_same_and_has_three_clean_parts(text in "(spiffe://)?[a-zA-Z./%:@0-9]{0,12}(/ns/)?[a-z./%-]{0,6}(/sa/)?[a-z./-]{0,6}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), &text[..]);
                let rebuilt = format!("spiffe://{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account());
                prop_assert_eq!(rebuilt, &text[..]);
                prop_assert!(!id.namespace().contains('/') && !id.service_account().contains('/'));
            }
        }

        #[test]
        fn any_text_is_handled(text in any::<String>()) {
            let _ = text.parse::<SpiffeId>();
            let _ = PodUid::new(&text);
            if let Ok(uid) = PodUid::new("abc") {
                let _ = uid.is_named_by(&text);
            }
        }
    }
}
