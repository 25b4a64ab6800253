//! What is read from certificates, and how they are written down.
//!
//! Why by name and key identifier: these say who *claims* to have signed, which is enough to tell roots apart in a
//! report or to find the one that is meant. Whether it is true is the verifier's to find out.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};

/// Which key signed a certificate; empty where it does not say.
pub(crate) fn authority_key(certificate: &X509Certificate<'_>) -> Vec<u8> {
    let said = certificate.extensions().iter().find_map(|extension| {
        let ParsedExtension::AuthorityKeyIdentifier(said) = extension.parsed_extension() else { return None };
        said.key_identifier.as_ref()
    });
    said.map(|id| id.0.to_vec()).unwrap_or_default()
}

pub(super) fn is_self_signed(certificate: &CertificateDer<'_>) -> bool {
    is_issued_by(certificate, certificate)
}

/// By name; whoever verifies looks at the signature.
pub(super) fn is_issued_by(certificate: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    match (X509Certificate::from_der(certificate), X509Certificate::from_der(issuer)) {
        (Ok((_, certificate)), Ok((_, issuer))) => certificate.issuer() == issuer.subject(),
        _ => false,
    }
}

/// RFC 7468.
pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

/// In hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
