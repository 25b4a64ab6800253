//! TLS of the controller's servers, and who a peer is.
//!
//! TLS 1.3 only, by aws-lc-rs, without resumption: with rustls' defaults an expired client certificate and
//! even emptied roots were accepted on resumption.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use weft_core::identity::{PodUid, SpiffeId};
use x509_parser::{extensions::GeneralName, prelude::*};

use crate::ca::{
    Bundle, Ca, CaError, Issued,
    certificate::{authority_key, hex},
};

/// Who is at the other end, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The one URI name.
    pub identity: SpiffeId,
    /// Which pod: the one DNS name, `<uid>.weft.internal`.
    pub uid: PodUid,
    /// The certificate that it came with.
    pub certificate: Presented,
}

/// A certificate, as far as anybody asks about it later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presented {
    /// Hexadecimal.
    pub serial: String,
    /// Start.
    pub not_before: SystemTime,
    /// End.
    pub not_after: SystemTime,
    /// Which key signed it (the authority key identifier); empty where it does not say.
    pub authority: Vec<u8>,
}

/// Why a certificate is no workload's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// There is none, or it is not a certificate.
    #[error("no certificate")]
    None,
    /// Not exactly one URI name of the one accepted shape.
    #[error("the certificate has not exactly one SPIFFE ID")]
    Identity,
    /// Not exactly one DNS name that is a pod's.
    #[error("the certificate does not name one pod")]
    Pod,
}

/// Reads the first certificate of a verified chain. One parser, one type: what is authenticated here is
/// what is authorized later.
///
/// # Errors
/// See [`PeerError`].
pub fn peer(chain: &[CertificateDer<'_>]) -> Result<Peer, PeerError> {
    let leaf = chain.first().ok_or(PeerError::None)?;
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_| PeerError::None)?;
    let names = leaf.subject_alternative_name().ok().flatten().ok_or(PeerError::Identity)?;
    let (mut uris, mut hosts) = (Vec::new(), Vec::new());
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::DNSName(host) => hosts.push(*host),
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_)
            | GeneralName::Invalid(..) => return Err(PeerError::Identity),
        }
    }
    let [uri] = uris[..] else { return Err(PeerError::Identity) };
    let [host] = hosts[..] else { return Err(PeerError::Pod) };
    let uid =
        host.strip_suffix(".weft.internal").and_then(|uid| PodUid::new(uid).ok()).ok_or(PeerError::Pod)?;
    let at = |time: ASN1Time| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
    };
    Ok(Peer {
        identity: uri.parse().map_err(|_| PeerError::Identity)?,
        uid,
        certificate: Presented {
            serial: hex(leaf.raw_serial()),
            not_before: at(leaf.validity().not_before),
            not_after: at(leaf.validity().not_after),
            authority: authority_key(&leaf),
        },
    })
}

/// Both servers' settings, with a fresh certificate of the controller's own.
#[derive(Clone, Debug)]
pub struct Configs {
    /// Clients show a certificate of one of the roots.
    pub discovery: Arc<ServerConfig>,
    /// Clients show none.
    pub identity: Arc<ServerConfig>,
    /// For asking other controllers, as one of them.
    pub client: Arc<ClientConfig>,
    /// When to make the next ones.
    pub renew_at: SystemTime,
}

/// Makes the settings of both servers.
///
/// # Errors
/// Signing, or a root that rustls does not take.
pub fn configs(ca: &Ca, bundle: &Bundle) -> Result<Configs, CaError> {
    let (issued, key) = ca.own_certificate()?;
    let failed = |e: &dyn std::fmt::Display| CaError::Signing(e.to_string());
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        roots.add(root.clone()).map_err(|e| failed(&e))?;
    }
    let provider = provider();
    let roots = Arc::new(roots);
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| failed(&e))?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(issued.chain.clone(), key.clone_key())
        .map_err(|e| failed(&e))?;
    client.alpn_protocols = vec![b"h2".to_vec()];
    client.resumption = Resumption::disabled();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|e| failed(&e))?;
    let builder = || ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]);
    let discovery = builder().map_err(|e| failed(&e))?.with_client_cert_verifier(verifier);
    let identity = builder().map_err(|e| failed(&e))?.with_no_client_auth();
    Ok(Configs {
        discovery: finish(discovery, &issued, &key).map_err(|e| failed(&e))?,
        identity: finish(identity, &issued, &key).map_err(|e| failed(&e))?,
        client: Arc::new(client),
        renew_at: issued.validity.renew_at(rand::random()),
    })
}

fn finish(
    builder: rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>,
    issued: &Issued,
    key: &PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = builder.with_single_cert(issued.chain.clone(), key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// The one provider of the workspace.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
