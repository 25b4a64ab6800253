//! A public key and a subject → a certificate that says exactly that.
//!
//! Why fresh parameters: `rcgen`'s own way from a request to a certificate copies the request's names and
//! even its `CA:true`. Here nothing is copied but the key.

use std::time::{Duration, SystemTime};

use rand::RngCore;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use weft_core::identity::{SpiffeId, Validity};

use super::{CaError, certificate::hex};

/// What a workload certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The one URI name.
    pub identity: SpiffeId,
    /// The one DNS name: `<uid>.weft.internal`, by which a caller says which pod it means.
    pub name: String,
}

/// A new certificate.
#[derive(Clone, Debug)]
pub struct Issued {
    /// It, then those between it and a root.
    pub chain: Vec<CertificateDer<'static>>,
    /// From when to when.
    pub validity: Validity,
    /// Serial number, in hexadecimal.
    pub serial: String,
    /// That of the root that it goes back to.
    pub root: String,
}

/// Signs `key` as `subject` for `lifetime`, but never beyond `root_end`.
///
/// # Errors
/// Signing.
pub fn sign(
    key: &impl PublicKeyData,
    subject: &Subject,
    lifetime: Duration,
    now: SystemTime,
    issuer: &Issuer<'_, &KeyPair>,
    root_end: SystemTime,
) -> Result<Issued, CaError> {
    let failed = |e: rcgen::Error| CaError::Signing(e.to_string());
    // Clocks differ; a short-lived certificate must not be half over when it is made, though.
    let backdated = (lifetime / 10).min(MAX_BACKDATE);
    let validity = Validity { not_before: now - backdated, not_after: (now + lifetime).min(root_end) };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = validity.not_before.into();
    params.not_after = validity.not_after.into();
    let serial = serial();
    let serial_text = hex(&serial.to_bytes());
    params.serial_number = Some(serial);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.subject_alt_names = vec![
        SanType::URI(subject.identity.as_str().try_into().map_err(failed)?),
        SanType::DnsName(subject.name.as_str().try_into().map_err(failed)?),
    ];
    let certificate = params.signed_by(key, issuer).map_err(failed)?;
    Ok(Issued { chain: vec![certificate.der().clone()], validity, serial: serial_text, root: String::new() })
}

/// 127 random bits: positive, and never twice.
pub(super) fn serial() -> SerialNumber {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    bytes[0] &= 0x7f;
    bytes[0] |= 0x40;
    SerialNumber::from_slice(&bytes)
}

/// behaviours: clocks five minutes apart work.
const MAX_BACKDATE: Duration = Duration::from_secs(5 * 60);

#[cfg(test)]
mod tests {
    use x509_parser::{extensions::GeneralName, prelude::*};

    use super::*;
    use crate::ca::{Ca, Claims, place::tests::StateDir, workload_subject};
    use weft_core::identity::TrustDomain;

    fn ca(state: &StateDir, lifetime: u64) -> Ca {
        Ca::open(&state.0, TrustDomain::new("cluster.local").unwrap(), Duration::from_secs(lifetime)).unwrap()
    }

    fn subject() -> Subject {
        let claims = Claims::new("shop", "cart", "uid-1", "cart-1", SystemTime::now());
        workload_subject(&TrustDomain::new("cluster.local").unwrap(), &claims).unwrap()
    }

    #[test]
    fn names_come_from_the_token_and_nothing_from_the_request() {
        let state = StateDir::new("issuer");
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
            .subject_alt_names
            .push(SanType::URI("spiffe://cluster.local/ns/kube-system/sa/admin".try_into().unwrap()));
        let csr = params.serialize_request(&key).unwrap();
        let issued = ca(&state, 86_400).issue(csr.der(), &subject()).unwrap();
        let (_, cert) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        assert!(!cert.is_ca());
        let names = cert.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical, "without a subject the names are critical (RFC 5280 §4.1.2.6)");
        assert_eq!(
            names.value.general_names,
            [
                GeneralName::URI("spiffe://cluster.local/ns/shop/sa/cart"),
                GeneralName::DNSName("uid-1.weft.internal"),
            ]
        );
        assert_eq!(cert.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
        let usage = cert.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth && !usage.any);
        let life = issued.validity.not_after.duration_since(issued.validity.not_before).unwrap();
        assert_eq!(life, Duration::from_secs(86_400 + 300));
    }

    #[test]
    fn short_lives_are_not_half_over_at_birth() {
        let state = StateDir::new("short");
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap();
        let now = SystemTime::now();
        let issued = ca(&state, 20).issue(csr.der(), &subject()).unwrap();
        assert!(issued.validity.renew_at(0.0) > now + Duration::from_secs(8));
    }
}
