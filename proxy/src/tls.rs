//! TLS between sidecars and to the controller: TLS 1.3 only, and the peer must be exactly who was expected.
//!
//! Why own verifiers: rustls' stock ones verify a *name*, and a mesh verifies an *identity*. Ours take
//! exactly one URI SAN, parsed strictly by the one parser that authorization also uses, choose the trust
//! roots by the peer's trust domain in code (URI name constraints were ignored by webpki for years, so
//! nothing relies on them), and leave signatures, chains, usages and revocation to webpki.
//!
//! Why resumption is off at both ends: a resumed session skips verification, so an expired certificate,
//! emptied roots or a swapped key would all pass. A verifier sees the server name only, so there is one
//! `ClientConfig` for each expected identity.
//!
//! The private key is made here by aws-lc and never leaves it: no bytes of it exist in this process'
//! own memory, and aws-lc wipes its memory when the key is dropped.

use std::{collections::BTreeMap, fmt, io, path::Path, sync::Arc, sync::OnceLock, time::Duration};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureAlgorithm, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs as provider, verify_tls13_signature},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, Signer, SigningKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime, pem::PemObject as _};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};
use weft_core::identity::{IdentityError, SpiffeId, TrustDomain, Validity};
use x509_parser::{
    extensions::{GeneralName, KeyUsage as KeyUses},
    prelude::{FromDer as _, X509Certificate},
    public_key::PublicKey,
};

use crate::clock::Clock;

/// ALPN of HTTP between sidecars.
pub const ALPN_H2: &[u8] = b"weft-h2/1";
/// ALPN of opaque TCP between sidecars.
pub const ALPN_TCP: &[u8] = b"weft-tcp/1";
/// ALPN of gRPC to the controller.
const ALPN_GRPC: &[u8] = b"h2";

/// What a connection between sidecars carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Alpn {
    /// HTTP, over HTTP/2.
    H2,
    /// Bytes: one connection of the app.
    Tcp,
}

/// This workload's certificate and key, and whom it trusts. Published by `identity.rs`; each change of
/// any part is a new one with a higher generation.
pub struct Material {
    /// Who this workload is.
    pub identity: SpiffeId,
    /// From when to when the certificate is valid.
    pub validity: Validity,
    /// Grows with each publication, so that cached TLS configurations can be told apart.
    pub generation: u64,
    certified: Arc<CertifiedKey>,
    trust: Trust,
    clock: Clock,
}

/// Trust anchors and revocation lists by trust domain. Cheap to clone.
#[derive(Clone, Default)]
pub struct Trust(Arc<BTreeMap<Arc<str>, Arc<Anchors>>>);

/// Of one trust domain. The same one for as long as its bundle is not replaced.
pub(crate) struct Anchors {
    roots: Vec<TrustAnchor<'static>>,
    crls: Vec<Arc<CertRevocationList<'static>>>,
}

/// A P-256 key that lives inside aws-lc. Cheap to clone; never printed or exported.
#[derive(Clone)]
pub struct WorkloadKey(Arc<EcdsaKeyPair>);

/// Why TLS could not be set up, or why a peer was refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate is not DER, or an extension in it is not.
    #[error("certificate does not parse: {0}")]
    Parse(&'static str),
    /// The peer sent no certificate.
    #[error("no certificate")]
    NoCertificate,
    /// Not exactly one URI SAN.
    #[error("certificate has {0} URI names; an identity is exactly one")]
    UriNames(usize),
    /// The URI SAN is not an identity of the accepted shape.
    #[error("certificate's URI name is not an identity: {0}")]
    Identity(#[from] IdentityError),
    /// The peer is somebody else.
    #[error("peer is {actual}, expected {expected}")]
    Mismatch {
        /// Who was expected.
        expected: SpiffeId,
        /// Who answered.
        actual: SpiffeId,
    },
    /// The peer's trust domain is not accepted, or nothing is trusted for it.
    #[error("trust domain of {0} is not accepted")]
    TrustDomain(SpiffeId),
    /// The key in the certificate must not make signatures, or may make other certificates.
    #[error("certificate's key usage is not that of a workload: digitalSignature, no keyCertSign or cRLSign")]
    KeyUsage,
    /// The key in the certificate could be broken.
    #[error("certificate's key is an RSA key of fewer than {MIN_RSA_BITS} bits")]
    WeakKey,
    /// The chain is longer than any real one.
    #[error("certificate chain of {certificates} certificates and {bytes} bytes is above the limit")]
    ChainTooLong {
        /// How many certificates.
        certificates: usize,
        /// How many bytes in all.
        bytes: usize,
    },
    /// The chain does not lead to a root, is expired, revoked, or has the wrong usage.
    #[error("certificate chain is not valid: {0}")]
    Chain(webpki::Error),
    /// A bundle without roots would trust nobody; an earlier bundle, if any, stays.
    #[error("trust bundle has {0} roots; between 1 and {MAX_ROOTS} are usable")]
    Bundle(usize),
    /// A root or revocation list that does not parse.
    #[error("trust bundle: {0}")]
    Anchor(webpki::Error),
    /// The issued certificate is for another key than the one that was sent.
    #[error("issued certificate is for another key")]
    OtherKey,
    /// A file of trust anchors could not be read.
    #[error("trust anchors {0}: {1}")]
    File(String, String),
    /// rustls refused the parameters.
    #[error("TLS setup: {0}")]
    Setup(#[from] rustls::Error),
    /// The key could not be made or used.
    #[error("key: {0}")]
    Key(&'static str),
}

/// A client's configuration: the peer must be exactly `expected`. The caller caches it by
/// (generation, identity, ALPN) and sends the endpoint's `PodUid::server_name()` as server name.
///
/// # Errors
/// The provider refuses the parameters.
pub fn client_config(
    material: &Material,
    expected: &SpiffeId,
    alpn: Alpn,
) -> Result<Arc<ClientConfig>, TlsError> {
    client(&material.trust, expected, Some(&material.certified), Some(material.clock), alpn.name())
}

/// A server's configuration: a client must show a certificate of one of `trust_domains`.
///
/// # Errors
/// The provider refuses the parameters.
pub fn server_config(
    material: &Material,
    trust_domains: &[TrustDomain],
) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = ClientVerifier {
        trust: material.trust.clone(),
        accepted: trust_domains.iter().map(|td| td.as_str().into()).collect(),
        clock: material.clock,
    };
    let mut config = ServerConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&material.certified))));
    config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_TCP.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// A client's configuration for gRPC to the controller, with the workload's certificate (discovery,
/// telemetry) or without (certify: there may be none yet).
///
/// # Errors
/// The provider refuses the parameters.
pub(crate) fn controller_config(
    trust: &Trust,
    controller: &SpiffeId,
    material: Option<&Material>,
    clock: Option<Clock>,
) -> Result<Arc<ClientConfig>, TlsError> {
    client(trust, controller, material.map(|m| &m.certified), clock, ALPN_GRPC)
}

fn client(
    trust: &Trust,
    expected: &SpiffeId,
    certified: Option<&Arc<CertifiedKey>>,
    clock: Option<Clock>,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = ServerVerifier { trust: trust.clone(), expected: expected.clone(), clock };
    let builder = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&TLS13])?
        .dangerous() // not weaker: a stricter verifier than the stock one
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match certified {
        Some(key) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key)))),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// The identity in a peer's certificate: exactly one URI SAN, parsed strictly. Other kinds of names
/// beside it are ignored. Only meaningful for a chain that a verifier of this module accepted.
///
/// # Errors
/// No certificate, not exactly one URI SAN, or not an identity.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Result<SpiffeId, TlsError> {
    let leaf = certs.first().ok_or(TlsError::NoCertificate)?;
    identity_of(&parse(leaf)?)
}

/// From when to when a peer's certificate is valid, so that an established connection can end with it.
///
/// # Errors
/// No certificate, or one that does not parse.
pub fn peer_validity(certs: &[CertificateDer<'_>]) -> Result<Validity, TlsError> {
    let leaf = certs.first().ok_or(TlsError::NoCertificate)?;
    validity_of(&parse(leaf)?)
}

/// Whether a failed handshake says that the peer is not who it must be (or that it says so of us):
/// nothing was sent, the endpoint failed, and another one may be tried whatever the method.
#[expect(clippy::wildcard_enum_match_arm, reason = "non-exhaustive; only these are about identity")]
pub fn is_identity_failure(error: &io::Error) -> bool {
    use rustls::AlertDescription as Alert;
    let Some(error) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) else { return false };
    match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => true,
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::UnrecognisedName
                | Alert::CertificateRequired
        ),
        _ => false,
    }
}

impl Alpn {
    /// Its name on the wire.
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::H2 => ALPN_H2,
            Self::Tcp => ALPN_TCP,
        }
    }

    /// The kind that a handshake agreed on.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        match name {
            ALPN_H2 => Some(Self::H2),
            ALPN_TCP => Some(Self::Tcp),
            _ => None,
        }
    }
}

impl Material {
    /// Joins an issued chain with its key and with whom to trust. The chain must be for this key, must
    /// hold exactly one identity, and must lead to a root of its own trust domain: what we would not
    /// accept from a peer is not shown to one. `now` is the issuer's clock: our own may be wrong.
    ///
    /// # Errors
    /// Any of these.
    pub fn new(
        generation: u64,
        key: &WorkloadKey,
        chain: Vec<CertificateDer<'static>>,
        trust: Trust,
        now: UnixTime,
    ) -> Result<Self, TlsError> {
        let leaf = chain.first().ok_or(TlsError::NoCertificate)?;
        let parsed = parse(leaf)?;
        if &*parsed.public_key().subject_public_key.data != key.public() {
            return Err(TlsError::OtherKey);
        }
        let validity = validity_of(&parsed)?;
        let identity = verify(&trust, leaf, chain.get(1..).unwrap_or_default(), now, Role::Client)?;
        let certified = CertifiedKey::new(chain, Arc::new(key.clone()));
        let clock = Clock::heard(now);
        Ok(Self { identity, validity, generation, certified: Arc::new(certified), trust, clock })
    }

    /// The same certificate with other trust.
    #[must_use]
    pub fn with_trust(&self, generation: u64, trust: Trust) -> Self {
        Self {
            identity: self.identity.clone(),
            validity: self.validity,
            generation,
            certified: Arc::clone(&self.certified),
            trust,
            clock: self.clock,
        }
    }

    /// Whether whoever trusts `trust` would believe this certificate.
    pub(crate) fn is_trusted_by(&self, trust: &Trust) -> bool {
        let Some((leaf, rest)) = self.certified.cert.split_first() else { return false };
        // By its own clock: whether it has expired is another question.
        let since = self.validity.not_before.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        verify(trust, leaf, rest, UnixTime::since_unix_epoch(since), Role::Client).is_ok()
    }

    /// Whether a chain that a peer showed before would be accepted from it now.
    pub(crate) fn still_accepts(&self, chain: &[CertificateDer<'_>], role: Role) -> bool {
        let Some((leaf, rest)) = chain.split_first() else { return false };
        verify(&self.trust, leaf, rest, self.clock.at_least(UnixTime::now()), role).is_ok()
    }

    /// What time it is, as far as certificates go.
    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    /// Whom this workload trusts.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }
}

impl Trust {
    /// The same trust with `domain`'s roots and revocation lists replaced.
    ///
    /// # Errors
    /// No root at all, too many, or one that does not parse: the caller keeps what it had.
    pub fn with<B: AsRef<[u8]>>(
        &self,
        domain: &TrustDomain,
        roots_der: &[B],
        crls_der: &[B],
    ) -> Result<Self, TlsError> {
        if roots_der.is_empty() || roots_der.len() > MAX_ROOTS || crls_der.len() > MAX_ROOTS {
            return Err(TlsError::Bundle(roots_der.len()));
        }
        let root = |der: &B| {
            let der = CertificateDer::from(der.as_ref());
            webpki::anchor_from_trusted_cert(&der).map(|anchor| anchor.to_owned()).map_err(TlsError::Anchor)
        };
        let crl = |der: &B| {
            OwnedCertRevocationList::from_der(der.as_ref())
                .map(|crl| Arc::new(CertRevocationList::Owned(crl)))
                .map_err(TlsError::Anchor)
        };
        let anchors = Anchors {
            roots: roots_der.iter().map(root).collect::<Result<_, _>>()?,
            crls: crls_der.iter().map(crl).collect::<Result<_, _>>()?,
        };
        let mut domains = BTreeMap::clone(&self.0);
        domains.insert(domain.as_str().into(), Arc::new(anchors));
        Ok(Self(Arc::new(domains)))
    }

    /// The same trust without `domain`.
    #[must_use]
    pub fn without(&self, domain: &TrustDomain) -> Self {
        let mut domains = BTreeMap::clone(&self.0);
        domains.remove(domain.as_str());
        Self(Arc::new(domains))
    }

    /// What either trusts: while one of them may be older than a rotation.
    #[must_use]
    pub fn merged(&self, other: &Self) -> Self {
        let mut domains = BTreeMap::clone(&self.0);
        for (domain, theirs) in &*other.0 {
            let both = match domains.get(domain) {
                None => Arc::clone(theirs),
                Some(ours) => Arc::new(Anchors {
                    roots: ours.roots.iter().chain(&theirs.roots).cloned().collect(),
                    crls: ours.crls.iter().chain(&theirs.crls).cloned().collect(),
                }),
            };
            domains.insert(Arc::clone(domain), both);
        }
        Self(Arc::new(domains))
    }

    /// `other`'s domains in place of these, and the rest of these.
    #[must_use]
    pub fn overridden_by(&self, other: &Self) -> Self {
        let mut domains = BTreeMap::clone(&self.0);
        domains.extend(other.0.iter().map(|(domain, anchors)| (Arc::clone(domain), Arc::clone(anchors))));
        Self(Arc::new(domains))
    }

    /// Trust for one domain from a PEM file, read now: a root may rotate while a container restarts.
    ///
    /// # Errors
    /// The file cannot be read, or holds no usable certificate.
    pub fn from_file(domain: &TrustDomain, path: &Path) -> Result<Self, TlsError> {
        let fail = |e: &dyn fmt::Display| TlsError::File(path.display().to_string(), e.to_string());
        let size = std::fs::metadata(path).map_err(|e| fail(&e))?.len();
        if size > MAX_ANCHOR_FILE {
            return Err(fail(&format_args!("{size} bytes is above the limit of {MAX_ANCHOR_FILE}")));
        }
        let pem = std::fs::read(path).map_err(|e| fail(&e))?;
        let roots =
            CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().map_err(|e| fail(&e))?;
        Self::default().with(domain, &roots, &[])
    }

    /// What a domain's members are judged by.
    pub(crate) fn anchors(&self, domain: &str) -> Option<Arc<Anchors>> {
        self.0.get(domain).map(Arc::clone)
    }

    /// How many roots are trusted for a domain.
    pub fn roots(&self, domain: &str) -> usize {
        self.0.get(domain).map_or(0, |anchors| anchors.roots.len())
    }

    /// The domains that anything is trusted for.
    pub fn domains(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(|domain| &**domain)
    }
}

impl WorkloadKey {
    /// Makes a key.
    ///
    /// # Errors
    /// The system's random source failed.
    pub fn generate() -> Result<Self, TlsError> {
        EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)
            .map(|key| Self(Arc::new(key)))
            .map_err(|_| TlsError::Key("cannot be generated"))
    }

    fn public(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }
}

impl rcgen::PublicKeyData for WorkloadKey {
    fn der_bytes(&self) -> &[u8] {
        self.public()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for WorkloadKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature =
            self.0.sign(&SystemRandom::new(), message).map_err(|_| rcgen::Error::RingUnspecified)?;
        Ok(signature.as_ref().to_vec())
    }
}

impl SigningKey for WorkloadKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let ours = SignatureScheme::ECDSA_NISTP256_SHA256;
        offered.contains(&ours).then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for WorkloadKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let signature = self
            .0
            .sign(&SystemRandom::new(), message)
            .map_err(|_| rustls::Error::General("signing failed".into()))?;
        Ok(signature.as_ref().to_vec())
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}

/// On the server's side: whoever comes from an accepted trust domain, proven by that domain's roots.
#[derive(Debug)]
struct ClientVerifier {
    trust: Trust,
    accepted: Vec<Arc<str>>,
    clock: Clock,
}

/// On the client's side: exactly one identity.
#[derive(Debug)]
struct ServerVerifier {
    trust: Trust,
    expected: SpiffeId,
    /// `None`: nobody has said yet what time it is.
    clock: Option<Clock>,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // callers need no hint, and strangers get none
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let now = self.clock.at_least(now);
        let identity = verify(&self.trust, end_entity, intermediates, now, Role::Client).map_err(refuse)?;
        if !self.accepted.iter().any(|domain| **domain == *identity.trust_domain()) {
            return Err(refuse(TlsError::TrustDomain(identity)));
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &crypto().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        crypto().signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>, // names the pod, which inbound checks; who it is, is checked here
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let now = self.clock.map_or(now, |clock| clock.at_least(now));
        let identity = verify(&self.trust, end_entity, intermediates, now, Role::Server).map_err(refuse)?;
        if identity != self.expected {
            let mismatch = TlsError::Mismatch { expected: self.expected.clone(), actual: identity };
            return Err(refuse(mismatch));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &crypto().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        crypto().signature_verification_algorithms.supported_schemes()
    }
}

/// As what a peer was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It called.
    Client,
    /// It was called.
    Server,
}

/// The whole of what makes a peer believable: bounded chain, one strict identity, roots of *its* trust
/// domain, usage, validity with skew, revocation.
fn verify(
    trust: &Trust,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    role: Role,
) -> Result<SpiffeId, TlsError> {
    let certificates = 1 + intermediates.len();
    let bytes = end_entity.len() + intermediates.iter().map(|cert| cert.len()).sum::<usize>();
    if certificates > MAX_CHAIN || bytes > MAX_CHAIN_BYTES {
        return Err(TlsError::ChainTooLong { certificates, bytes });
    }
    let parsed = parse(end_entity)?;
    // RFC 5280 §4.1.2.2; webpki takes any.
    if !matches!(parsed.raw_serial(), [first, rest @ ..] if *first < 0x80 && rest.len() < 20) {
        return Err(TlsError::Parse("serial number"));
    }
    let identity = identity_of(&parsed)?;
    let usage = parsed.key_usage().map_err(|_| TlsError::Parse("key usage"))?;
    // SPIFFE X.509-SVID §4.3, §5.2: a workload signs handshakes, never certificates or lists.
    let fits = |usage: &KeyUses| usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign();
    if usage.is_some_and(|usage| !fits(usage.value)) {
        return Err(TlsError::KeyUsage);
    }
    if let Ok(PublicKey::RSA(rsa)) = parsed.public_key().parsed()
        && rsa.key_size() < MIN_RSA_BITS
    {
        return Err(TlsError::WeakKey);
    }
    let domain = trust.0.get(identity.trust_domain());
    let anchors = domain.ok_or_else(|| TlsError::TrustDomain(identity.clone()))?;

    let cert = EndEntityCert::try_from(end_entity).map_err(TlsError::Chain)?;
    let at = |time: UnixTime| {
        let usage = match role {
            Role::Client => KeyUsage::client_auth(),
            Role::Server => KeyUsage::server_auth(),
        };
        let crls: Vec<_> = anchors.crls.iter().map(|crl| &**crl).collect();
        // A list that covers the certificate decides, fresh or stale; without one nothing is revoked.
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|options| {
            options
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Ignore)
                .build()
        });
        let algorithms = crypto().signature_verification_algorithms.all;
        cert.verify_for_usage(algorithms, &anchors.roots, intermediates, time, usage, revocation, None)
            .map(|_| ())
    };
    let shifted = |seconds: u64| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let result = match at(now) {
        Err(webpki::Error::CertExpired { .. }) => at(shifted(now.as_secs().saturating_sub(SKEW.as_secs()))),
        Err(webpki::Error::CertNotValidYet { .. }) => at(shifted(now.as_secs() + SKEW.as_secs())),
        decided => decided,
    };
    result.map_err(TlsError::Chain)?;
    Ok(identity)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, TlsError> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|_| TlsError::Parse("not DER"))?;
    if !rest.is_empty() {
        return Err(TlsError::Parse("bytes after the certificate"));
    }
    Ok(cert)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "every other kind of name is not an identity")]
fn identity_of(cert: &X509Certificate<'_>) -> Result<SpiffeId, TlsError> {
    let names = cert.subject_alternative_name().map_err(|_| TlsError::Parse("alternative names"))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    if names.iter().any(|name| matches!(name, GeneralName::Invalid(..))) {
        return Err(TlsError::Parse("alternative names"));
    }
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        let count = names.iter().filter(|name| matches!(name, GeneralName::URI(_))).count();
        return Err(TlsError::UriNames(count));
    };
    Ok(uri.parse()?)
}

fn validity_of(cert: &X509Certificate<'_>) -> Result<Validity, TlsError> {
    let time = |at: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(at.timestamp()).map_err(|_| TlsError::Parse("validity"))?;
        std::time::UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .filter(|_| seconds < MAX_SECONDS)
            .ok_or(TlsError::Parse("validity"))
    };
    let validity = cert.validity();
    Ok(Validity { not_before: time(validity.not_before)?, not_after: time(validity.not_after)? })
}

fn refuse(error: TlsError) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// One provider for everything: aws-lc, the hybrid key exchange first.
fn crypto() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let mut crypto = provider::default_provider();
        crypto.kx_groups = vec![
            provider::kx_group::X25519MLKEM768,
            provider::kx_group::X25519,
            provider::kx_group::SECP256R1,
        ];
        Arc::new(crypto)
    };
    Arc::clone(PROVIDER.get_or_init(make))
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Material")
            .field("identity", &self.identity)
            .field("validity", &self.validity)
            .field("generation", &self.generation)
            .field("trust", &self.trust)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.iter().map(|(domain, anchors)| (domain, anchors.roots.len()))).finish()
    }
}

impl fmt::Debug for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkloadKey")
    }
}

/// Clocks of two nodes may differ by so much (behaviours: certificates still work).
pub(crate) const SKEW: Duration = Duration::from_secs(300);
/// Longest chain: a workload certificate, its issuers, and room for cross-signing.
const MAX_CHAIN: usize = 10;
/// And in bytes; a real chain has 2 KiB.
const MAX_CHAIN_BYTES: usize = 64 * 1024;
/// Shorter RSA keys were broken, or could be.
const MIN_RSA_BITS: usize = 2_048;
/// Roots of one trust domain: several while one rotates, not thousands to search through.
const MAX_ROOTS: usize = 100;
/// A file of anchors larger than this is not one.
const MAX_ANCHOR_FILE: u64 = 4 * 1024 * 1024;
/// The year 9999, where X.509's time ends: keeps arithmetic on it from overflowing.
const MAX_SECONDS: u64 = 253_402_300_800;

/// Certificates for tests: what the controller would issue, and what it never would.
#[cfg(test)]
pub(crate) mod testing {
    use std::time::SystemTime;

    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
        KeyUsagePurpose, SanType,
    };
    use weft_core::identity::PodUid;

    use super::*;

    /// One trust domain's root.
    pub(crate) struct Authority {
        pub(crate) domain: TrustDomain,
        pub(crate) issuer: Arc<Issuer<'static, KeyPair>>,
        pub(crate) root: CertificateDer<'static>,
        pub(crate) pem: String,
    }

    impl Authority {
        pub(crate) fn new(domain: &str) -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, format!("root of {domain}"));
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let root = params.self_signed(&key).unwrap();
            Self {
                domain: TrustDomain::new(domain).unwrap(),
                issuer: Arc::new(Issuer::new(params, key)),
                root: root.der().clone(),
                pem: root.pem(),
            }
        }

        pub(crate) fn trust(&self) -> Trust {
            Trust::default().with(&self.domain, &[&self.root], &[]).unwrap()
        }

        pub(crate) fn id(&self, namespace: &str, account: &str) -> SpiffeId {
            SpiffeId::new(&self.domain, namespace, account).unwrap()
        }

        pub(crate) fn issue(&self, key: &WorkloadKey, params: &CertificateParams) -> CertificateDer<'static> {
            params.signed_by(key, &self.issuer).unwrap().der().clone()
        }

        /// A workload's certificate and key, as the controller would issue them.
        pub(crate) fn material(&self, namespace: &str, account: &str, uid: &str) -> Material {
            let key = WorkloadKey::generate().unwrap();
            let mut params = leaf(self.id(namespace, account).as_str());
            let name = PodUid::new(uid).unwrap().server_name();
            params.subject_alt_names.push(SanType::DnsName(name.try_into().unwrap()));
            self.material_from(&key, &params)
        }

        /// A certificate without a pod.
        pub(crate) fn material_of(&self, id: &SpiffeId) -> Material {
            self.material_from(&WorkloadKey::generate().unwrap(), &leaf(id.as_str()))
        }

        /// One that ends soon.
        pub(crate) fn material_until(&self, end: SystemTime) -> Material {
            let mut params = leaf(self.id("shop", "short").as_str());
            params.not_after = end.into();
            self.material_from(&WorkloadKey::generate().unwrap(), &params)
        }

        fn material_from(&self, key: &WorkloadKey, params: &CertificateParams) -> Material {
            let chain = vec![self.issue(key, params)];
            Material::new(1, key, chain, self.trust(), UnixTime::now()).unwrap()
        }
    }

    impl Material {
        /// What it shows to peers.
        pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
            &self.certified.cert
        }
    }

    /// A server that asks no client who it is.
    pub(crate) fn server_without_clients(material: &Material) -> ServerConfig {
        ServerConfig::builder_with_provider(crypto())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&material.certified))))
    }

    /// What a workload certificate says, for any URI.
    pub(crate) fn leaf(uri: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        params.not_after = (SystemTime::now() + Duration::from_secs(3_600)).into();
        params
    }
}

#[cfg(test)]
mod matrix;

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::{testing::*, *};

    const WEB: &str = "spiffe://a.test/ns/shop/sa/web";

    fn in_seconds(seconds: i64) -> SystemTime {
        let by = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
    }

    #[test]
    fn a_caller_that_was_let_in_is_judged_again_when_a_list_comes() {
        let a = Authority::new("a.test");
        let key = WorkloadKey::generate().unwrap();
        let with_serial = |serial: u64| {
            let mut params = leaf(WEB);
            params.serial_number = Some(serial.into());
            a.issue(&key, &params)
        };
        let list = rcgen::CertificateRevocationListParams {
            this_update: in_seconds(-7_200).into(),
            next_update: in_seconds(-3_600).into(),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![rcgen::RevokedCertParams {
                serial_number: 7.into(),
                revocation_time: in_seconds(-7_200).into(),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&a.issuer).unwrap().der().to_vec();
        let roots = [a.root.to_vec()];
        let lists = |count| Trust::default().with(&a.domain, &roots, &vec![list.clone(); count]);
        assert!(lists(MAX_ROOTS).is_ok(), "as many lists as roots");
        assert!(matches!(lists(MAX_ROOTS + 1), Err(TlsError::Bundle(_))));
        let trust = lists(1).unwrap();
        let own = Material::new(1, &key, vec![with_serial(8)], a.trust(), UnixTime::now()).unwrap();
        assert!(own.still_accepts(&[with_serial(7)], Role::Client));
        let own = own.with_trust(2, trust);
        for role in [Role::Client, Role::Server] {
            assert!(
                !own.still_accepts(&[with_serial(7)], role) && own.still_accepts(&[with_serial(8)], role)
            );
        }
        assert!(Trust::default().with(&a.domain, &roots, &[b"0nonsense".to_vec()]).is_err());
    }

    #[test]
    fn an_empty_or_broken_bundle_is_not_taken() {
        let a = Authority::new("a.test");
        let none: [&[u8]; 0] = [];
        assert!(matches!(Trust::default().with(&a.domain, &none, &none), Err(TlsError::Bundle(0))));
        assert!(Trust::default().with(&a.domain, &[b"nonsense"], &[]).is_err());
        let many = vec![&a.root[..]; MAX_ROOTS + 1];
        assert!(matches!(Trust::default().with(&a.domain, &many, &none), Err(TlsError::Bundle(_))));
    }

    #[test]
    fn a_chain_has_64_kib_and_not_a_byte_more() {
        let a = Authority::new("a.test");
        let leaf = a.issue(&WorkloadKey::generate().unwrap(), &leaf(WEB));
        let of = |bytes: usize| {
            let rest = [CertificateDer::from(vec![0; bytes - leaf.len()])];
            verify(&a.trust(), &leaf, &rest, UnixTime::now(), Role::Client)
        };
        assert!(!matches!(of(64 * 1024), Err(TlsError::ChainTooLong { .. })));
        assert!(matches!(of(64 * 1024 + 1), Err(TlsError::ChainTooLong { certificates: 2, bytes: 65_537 })));
    }

    #[test]
    fn own_material_must_fit() {
        let (a, b) = (Authority::new("a.test"), Authority::new("b.test"));
        let (key, other) = (WorkloadKey::generate().unwrap(), WorkloadKey::generate().unwrap());
        let chain = vec![a.issue(&key, &leaf(WEB))];
        let make = |key: &WorkloadKey, chain: &[CertificateDer<'static>], trust: Trust| {
            Material::new(1, key, chain.to_vec(), trust, UnixTime::now())
        };
        assert!(matches!(make(&other, &chain, a.trust()), Err(TlsError::OtherKey)));
        assert!(matches!(make(&key, &chain, b.trust()), Err(TlsError::TrustDomain(_))));
        assert!(matches!(make(&key, &[], a.trust()), Err(TlsError::NoCertificate)));
        let material = make(&key, &chain, a.trust()).unwrap();
        assert_eq!(material.identity.as_str(), WEB);
        assert_eq!(peer_validity(&chain).unwrap(), material.validity);
        let text = format!("{material:?} {key:?}");
        assert!(!text.contains("EcdsaKeyPair") && text.contains("a.test"), "{text}");
    }

    /// Both ends of a handshake, and a byte each way so that a client hears of a refusal.
    async fn handshake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> (
        io::Result<tokio_rustls::client::TlsStream<DuplexStream>>,
        io::Result<tokio_rustls::server::TlsStream<DuplexStream>>,
    ) {
        let (near, far) = duplex(64 * 1024);
        let name = ServerName::try_from("uid-1.weft.internal").unwrap();
        let connect = async {
            let mut stream = TlsConnector::from(client).connect(name, near).await?;
            stream.read_u8().await?;
            Ok(stream)
        };
        let accept = async {
            let mut stream = TlsAcceptor::from(server).accept(far).await?;
            stream.write_u8(1).await?;
            stream.flush().await?;
            Ok(stream)
        };
        tokio::join!(connect, accept)
    }

    #[tokio::test]
    async fn both_ends_agree_with_the_hybrid_exchange_and_without_tickets() {
        let a = Authority::new("a.test");
        let (web, api) = (a.material("shop", "web", "uid-1"), a.material("shop", "api", "uid-2"));
        let client = client_config(&api, &web.identity, Alpn::H2).unwrap();
        let server = server_config(&web, std::slice::from_ref(&a.domain)).unwrap();
        for _ in 0..2 {
            let (client, server) = handshake(Arc::clone(&client), Arc::clone(&server)).await;
            let (client, server) = (client.unwrap(), server.unwrap());
            let (_, seen) = server.get_ref();
            assert_eq!(peer_identity(seen.peer_certificates().unwrap()).unwrap(), api.identity);
            assert_eq!(seen.server_name(), Some("uid-1.weft.internal"));
            assert_eq!(seen.alpn_protocol().and_then(Alpn::from_name), Some(Alpn::H2));
            assert_eq!(seen.handshake_kind(), Some(rustls::HandshakeKind::Full));
            let (_, ours) = client.get_ref();
            assert_eq!(peer_identity(ours.peer_certificates().unwrap()).unwrap(), web.identity);
            let group = ours.negotiated_key_exchange_group().unwrap().name();
            assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
            assert_eq!(ours.tls13_tickets_received(), 0);
        }
    }

    #[tokio::test]
    async fn a_client_leaves_whoever_is_not_exactly_expected() {
        let a = Authority::new("a.test");
        let (web, api) = (a.material("shop", "web", "uid-1"), a.material("shop", "api", "uid-2"));
        let client = client_config(&api, &a.id("shop", "we"), Alpn::H2).unwrap();
        let server = server_config(&web, std::slice::from_ref(&a.domain)).unwrap();
        let (client, server) = handshake(client, server).await;
        let error = client.unwrap_err();
        assert!(is_identity_failure(&error), "{error}");
        assert!(error.to_string().contains("expected"), "{error}");
        assert!(server.is_err());
    }

    #[tokio::test]
    async fn a_server_refuses_strangers_and_the_nameless() {
        let (a, b) = (Authority::new("a.test"), Authority::new("b.test"));
        let web = a.material("shop", "web", "uid-1");
        let server = server_config(&web, std::slice::from_ref(&a.domain)).unwrap();
        // A stranger whose client believes anything that a says.
        let stranger = b.material("shop", "api", "uid-2").with_trust(2, a.trust());
        let client = client_config(&stranger, &web.identity, Alpn::H2).unwrap();
        let (client, refused) = handshake(client, Arc::clone(&server)).await;
        assert!(refused.is_err());
        assert!(is_identity_failure(&client.unwrap_err()));
        // No certificate at all.
        let mut client =
            ClientConfig::clone(&controller_config(&a.trust(), &web.identity, None, None).unwrap());
        client.alpn_protocols = vec![ALPN_H2.to_vec()];
        let (client, refused) = handshake(Arc::new(client), server).await;
        assert!(refused.is_err());
        assert!(is_identity_failure(&client.unwrap_err()));
    }

    #[tokio::test]
    async fn roots_are_chosen_by_the_peers_trust_domain() {
        let (a, b) = (Authority::new("a.test"), Authority::new("b.test"));
        let web = a.material("shop", "web", "uid-1").with_trust(2, a.trust().merged(&b.trust()));
        let theirs = b.material("shop", "api", "uid-2").with_trust(2, a.trust().merged(&b.trust()));
        let client = client_config(&theirs, &web.identity, Alpn::Tcp).unwrap();
        let both = [a.domain.clone(), b.domain.clone()];
        let (client, server) = handshake(client, server_config(&web, &both).unwrap()).await;
        assert!(client.is_ok() && server.is_ok());
    }

    #[tokio::test]
    async fn another_application_protocol_is_refused() {
        let a = Authority::new("a.test");
        let (web, api) = (a.material("shop", "web", "uid-1"), a.material("shop", "api", "uid-2"));
        let mut client = ClientConfig::clone(&client_config(&api, &web.identity, Alpn::H2).unwrap());
        client.alpn_protocols = vec![b"h2".to_vec()];
        let server = server_config(&web, std::slice::from_ref(&a.domain)).unwrap();
        let (client, server) = handshake(Arc::new(client), server).await;
        assert!(client.is_err() && server.is_err());
    }

    #[test]
    fn anchors_are_read_from_their_file_as_it_stands() {
        let (a, b) = (Authority::new("a.test"), Authority::new("a.test"));
        let path = std::env::temp_dir().join(format!("weft-anchors-{}.pem", std::process::id()));
        std::fs::write(&path, &a.pem).unwrap();
        assert_eq!(Trust::from_file(&a.domain, &path).unwrap().roots("a.test"), 1);
        std::fs::write(&path, a.pem.clone() + &b.pem).unwrap();
        assert_eq!(Trust::from_file(&a.domain, &path).unwrap().roots("a.test"), 2);
        std::fs::write(&path, "").unwrap();
        assert!(Trust::from_file(&a.domain, &path).is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Trust::from_file(&a.domain, &path), Err(TlsError::File(..))));
    }
}
