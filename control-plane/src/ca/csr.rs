//! A signing request → the public key in it, and nothing else.
//!
//! Why only P-256, by algorithm *and* by length: the parser of the certificate library takes whatever the
//! algorithm identifier says. Names, key usages and every other extension of the request are not even
//! looked at.

use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm};
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer,
};

/// A P-256 public key that somebody proved to own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct P256Key(Vec<u8>);

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Larger than any with one key needs to be.
    #[error("it has {0} bytes, more than {MAX_LEN}")]
    TooLarge(usize),
    /// Not one DER-encoded request.
    #[error("it is not a PKCS #10 request in DER")]
    Syntax,
    /// Another algorithm.
    #[error("its key is not on curve P-256")]
    Key,
    /// Not signed by that key.
    #[error("it is not signed by its own key")]
    Signature,
}

/// Takes the public key out of a request.
///
/// # Errors
/// See [`CsrError`].
pub fn public_key(der: &[u8]) -> Result<P256Key, CsrError> {
    if der.len() > MAX_LEN {
        return Err(CsrError::TooLarge(der.len()));
    }
    let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| CsrError::Syntax)?;
    if !rest.is_empty() {
        return Err(CsrError::Syntax);
    }
    let key = &csr.certification_request_info.subject_pki;
    let curve = key.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
        return Err(CsrError::Key);
    }
    let raw = key.subject_public_key.data.as_ref();
    // Uncompressed point: 4, then two coordinates.
    if raw.len() != 65 || raw.first() != Some(&4) || key.subject_public_key.unused_bits != 0 {
        return Err(CsrError::Key);
    }
    csr.verify_signature().map_err(|_| CsrError::Signature)?;
    Ok(P256Key(raw.to_vec()))
}

impl PublicKeyData for P256Key {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

const MAX_LEN: usize = 8 * 1024;

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn csr(key: &KeyPair) -> Vec<u8> {
        CertificateParams::new(vec!["a.example".to_owned()])
            .unwrap()
            .serialize_request(key)
            .unwrap()
            .der()
            .to_vec()
    }

    #[test]
    fn a_p256_key_is_taken() {
        let key = KeyPair::generate().unwrap();
        assert_eq!(public_key(&csr(&key)).unwrap().der_bytes(), key.public_key_raw());
    }

    #[test]
    fn every_other_key_is_refused() {
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            assert_eq!(public_key(&csr(&key)), Err(CsrError::Key));
        }
        let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        assert_eq!(public_key(&csr(&rsa)), Err(CsrError::Key));
    }

    #[test]
    fn broken_requests_are_refused() {
        let good = csr(&KeyPair::generate().unwrap());
        assert_eq!(public_key(&[]), Err(CsrError::Syntax));
        assert_eq!(public_key(&good[..good.len() - 1]), Err(CsrError::Syntax));
        let mut trailing = good.clone();
        trailing.push(0);
        assert_eq!(public_key(&trailing), Err(CsrError::Syntax));
        let mut forged = good;
        if let Some(last) = forged.last_mut() {
            *last ^= 1;
        }
        assert!(matches!(public_key(&forged), Err(CsrError::Signature | CsrError::Syntax)));
        assert_eq!(public_key(&vec![0x30; MAX_LEN + 1]), Err(CsrError::TooLarge(MAX_LEN + 1)));
    }
}
