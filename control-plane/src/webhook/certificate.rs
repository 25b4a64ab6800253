//! The certificate that the API server knows the webhooks by: made here, shared by replicas, renewed in time.
//!
//! Why the controller makes it: a certificate that an installer makes is one that somebody forgets to renew, and every
//! upgrade of the chart would make another. Why an authority in a Secret and not a certificate: each replica signs its
//! own, short-lived ones in memory, and what the API server is told changes once in half a year.
//!
//! Order is what makes a renewal harmless: the new authority is first *believed* (written into the webhooks'
//! `caBundle`, beside the old one), and only then signs: a moment later, because every API server of the cluster has to
//! hear of it first. An authority whose Secret is removed or spoilt is written again, from the memory of whoever finds
//! out: a new one would be believed at once by nobody's API server and signed for by every replica but one.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
        core::v1::Secret,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{ServerConfig, server::NoServerSessionStorage, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use weft_core::identity::Validity;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use crate::{
    k8s::owner::{self, Owner},
    resources::CONTROL_NAMESPACE,
    serve::tls::provider,
};

/// Keeps the certificate of both webhooks, for ever. The first one is there when `first` is told.
pub(super) async fn keep(
    client: Client,
    owner: Option<Owner>,
    first: tokio::sync::oneshot::Sender<Arc<ArcSwap<ServerConfig>>>,
) {
    let mut first = Some(first);
    let mut serving: Option<(Arc<ArcSwap<ServerConfig>>, Leaf)> = None;
    let mut known = Known::default();
    loop {
        let leaf = serving.as_ref().map(|(_, leaf)| leaf);
        let now = owner.as_ref().and_then(Owner::now);
        let wait = match refresh(&client, now.as_ref(), leaf, &mut known).await {
            Ok(None) => LOOK_EVERY,
            Ok(Some(leaf)) => {
                if let Some((config, kept)) = &mut serving {
                    config.store(leaf.config.clone());
                    *kept = leaf;
                } else {
                    let config = Arc::new(ArcSwap::new(leaf.config.clone()));
                    // Nobody waits any more: the controller is about to end.
                    let _ = first.take().map(|first| first.send(config.clone()));
                    serving = Some((config, leaf));
                }
                LOOK_EVERY
            }
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the webhooks' certificate could not be looked after"
                );
                RETRY
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// What the API server believes; a new certificate if the one that is served should be replaced.
async fn refresh(
    client: &Client,
    owner: Option<&OwnerReference>,
    leaf: Option<&Leaf>,
    known: &mut Known,
) -> anyhow::Result<Option<Leaf>> {
    let authority = authority(client, owner, known.authority.as_ref()).await?;
    known.authority = Some(authority.clone());
    let bundle = authority.bundle();
    believe::<MutatingWebhookConfiguration>(client, MUTATING, &bundle).await?;
    believe::<ValidatingWebhookConfiguration>(client, VALIDATING, &bundle).await?;
    let now = SystemTime::now();
    if known.keeps(leaf, &authority.certificates[0], now) { Ok(None) } else { authority.sign(now).map(Some) }
}

/// What was found the last time.
#[derive(Default)]
struct Known {
    authority: Option<Signer>,
    /// Who signs, and since when that is believed.
    believed: Option<(Vec<u8>, SystemTime)>,
}

impl Known {
    /// Whether what is served stays for now. `signer` has just been made to be believed.
    fn keeps(&mut self, leaf: Option<&Leaf>, signer: &[u8], now: SystemTime) -> bool {
        let since = match &self.believed {
            Some((believed, since)) if believed == signer => *since,
            Some(_) | None => {
                self.believed = Some((signer.to_vec(), now));
                now
            }
        };
        let Some(leaf) = leaf else { return false };
        let settled = now.duration_since(since).unwrap_or_default() >= SETTLE;
        match leaf.signed_by == signer {
            true => now < leaf.renew_at,
            // The one before is believed beside it, until its end.
            false => !settled && now < leaf.renew_at,
        }
    }
}

/// The authority of all replicas, made or replaced if it must be. Whoever writes second reads what the first wrote.
async fn authority(
    client: &Client,
    owner: Option<&OwnerReference>,
    known: Option<&Signer>,
) -> anyhow::Result<Signer> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), CONTROL_NAMESPACE);
    let now = SystemTime::now();
    let mut found = secrets.get_opt(SECRET).await.with_context(|| format!("Secret {SECRET}"))?;
    let adopted = found.as_mut().is_some_and(|secret| owner::adopt(&mut secret.metadata, owner));
    let stored = found.as_ref().and_then(|secret| Signer::read(secret.data.as_ref()?));
    let is_stored = stored.is_some();
    let old = stored.or_else(|| known.cloned());
    let fresh = old.as_ref().filter(|old| old.is_fresh(now)).cloned();
    if !adopted
        && is_stored
        && let Some(fresh) = fresh
    {
        return Ok(fresh);
    }
    let made = fresh.is_none();
    let new = fresh.map_or_else(|| Signer::make(now, old.as_ref()), Ok)?;
    let mut secret = found.clone().unwrap_or_else(|| Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.to_owned()),
            labels: Some(owner::labels()),
            owner_references: owner.map(|owner| vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    });
    secret.data = Some(new.data());
    let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    let written = match found {
        Some(_) => secrets.replace(SECRET, &parameters, &secret).await,
        None => secrets.create(&parameters, &secret).await,
    };
    written.with_context(|| format!("Secret {SECRET}"))?;
    if made {
        tracing::info!(secret = SECRET, "made an authority for the webhooks");
    }
    Ok(new)
}

/// Writes `caBundle` where it is not what it should be.
async fn believe<K>(client: &Client, name: &str, bundle: &str) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope>
        + Clone
        + DeserializeOwned
        + Serialize
        + std::fmt::Debug,
{
    let api: Api<K> = Api::all(client.clone());
    let Some(configuration) = api.get_opt(name).await.with_context(|| name.to_owned())? else {
        // The chart leaves it out, or is not there yet.
        return Ok(());
    };
    let configuration = serde_json::to_value(&configuration)?;
    let expected = serde_json::to_value(ByteString(bundle.as_bytes().to_vec()))?;
    let webhooks = configuration["webhooks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let stale: Vec<_> = webhooks
        .iter()
        .filter(|webhook| webhook["clientConfig"]["caBundle"] != expected)
        .map(|webhook| json!({ "name": webhook["name"], "clientConfig": { "caBundle": expected } }))
        .collect();
    if stale.is_empty() {
        return Ok(());
    }
    let patch = Patch::Strategic(json!({ "webhooks": stale }));
    let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    api.patch(name, &parameters, &patch).await.with_context(|| name.to_owned())?;
    tracing::info!(name, "the API server knows the webhooks' authority");
    Ok(())
}

/// Who signs the webhooks' certificates, and who did before.
#[derive(Clone)]
struct Signer {
    /// DER; the first one signs.
    certificates: Vec<Vec<u8>>,
    key: Zeroizing<String>,
}

/// A certificate of one replica.
struct Leaf {
    config: Arc<ServerConfig>,
    renew_at: SystemTime,
    signed_by: Vec<u8>,
}

impl Signer {
    fn make(now: SystemTime, old: Option<&Self>) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "weft webhooks");
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + AUTHORITY_LIFE).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key)?;
        let mut certificates = vec![certificate.der().to_vec()];
        // Whoever still serves by an old one is still believed.
        certificates.extend(
            old.into_iter()
                .flat_map(|old| &old.certificates)
                .filter(|der| end_of(der).is_some_and(|end| now < end))
                .take(MAX_OLD)
                .cloned(),
        );
        Ok(Self { certificates, key: Zeroizing::new(key.serialize_pem()) })
    }

    /// `None`: it is none of ours, or cannot be used.
    fn read(data: &BTreeMap<String, ByteString>) -> Option<Self> {
        let certificates: Vec<Vec<u8>> = CertificateDer::pem_slice_iter(&data.get(CERTIFICATES)?.0)
            .map(|certificate| certificate.map(|der| der.to_vec()))
            .collect::<Result<_, _>>()
            .ok()?;
        let key = Zeroizing::new(String::from_utf8(data.get(KEY)?.0.clone()).ok()?);
        let pair = KeyPair::from_pem(&key).ok()?;
        let (_, first) = X509Certificate::from_der(certificates.first()?).ok()?;
        let ours = first.public_key().subject_public_key.data.as_ref() == pair.public_key_raw();
        ours.then_some(Self { certificates, key })
    }

    fn data(&self) -> BTreeMap<String, ByteString> {
        BTreeMap::from([
            (CERTIFICATES.to_owned(), ByteString(self.bundle().into_bytes())),
            (KEY.to_owned(), ByteString(self.key.as_bytes().to_vec())),
        ])
    }

    /// PEM.
    fn bundle(&self) -> String {
        let pem = |der: &Vec<u8>| crate::ca::certificate::pem("CERTIFICATE", der);
        self.certificates.iter().map(pem).collect()
    }

    /// Not yet in the second half of its life.
    fn is_fresh(&self, now: SystemTime) -> bool {
        let end = self.certificates.first().and_then(|der| end_of(der));
        end.is_some_and(|end| now + AUTHORITY_LIFE / 2 < end)
    }

    fn sign(&self, now: SystemTime) -> anyhow::Result<Leaf> {
        let signed_by = self.certificates.first().context("no authority")?.clone();
        let issuer_key = KeyPair::from_pem(&self.key)?;
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(signed_by.clone()), &issuer_key)?;
        let key = KeyPair::generate()?;
        let end = end_of(&signed_by).context("the authority has no end")?;
        let validity = Validity { not_before: now - BACKDATE, not_after: (now + LEAF_LIFE).min(end) };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = validity.not_before.into();
        params.not_after = validity.not_after.into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = vec![SanType::DnsName(SERVICE.try_into()?)];
        let certificate = params.signed_by(&key, &issuer)?;
        let secret = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow!(error))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], secret)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Leaf { config: Arc::new(config), renew_at: validity.renew_at(rand::random()), signed_by })
    }
}

fn end_of(der: &[u8]) -> Option<SystemTime> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let end = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(end))
}

/// The name by which the API server calls; the webhook configurations name the same Service.
const SERVICE: &str = "weft-controller.weft.svc";
const MUTATING: &str = "weft-injector";
const VALIDATING: &str = "weft-validator";
const SECRET: &str = "weft-webhook";
const CERTIFICATES: &str = "ca.crt";
const KEY: &str = "ca.key";
const MANAGER: &str = "weft";
const AUTHORITY_LIFE: Duration = Duration::from_secs(365 * 86_400);
const LEAF_LIFE: Duration = Duration::from_secs(7 * 86_400);
/// Clocks differ.
const BACKDATE: Duration = Duration::from_secs(300);
const MAX_OLD: usize = 3;
/// An upgrade that empties `caBundle` is healed after this.
const LOOK_EVERY: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_secs(2);
/// Until every API server has heard whom to believe.
const SETTLE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_read_back_as_it_was_written() {
        let now = SystemTime::now();
        let made = Signer::make(now, None).unwrap();
        let read = Signer::read(&made.data()).unwrap();
        assert_eq!((&read.certificates, &*read.key), (&made.certificates, &*made.key));
        assert!(read.is_fresh(now) && !read.is_fresh(now + AUTHORITY_LIFE / 2));
        let mut torn = made.data();
        torn.insert(KEY.to_owned(), ByteString(Signer::make(now, None).unwrap().key.as_bytes().to_vec()));
        assert!(Signer::read(&torn).is_none(), "the key of another authority");
    }

    #[test]
    fn a_new_authority_leaves_the_old_one_believed_until_its_end() {
        let now = SystemTime::now();
        let old = Signer::make(now - AUTHORITY_LIFE / 2, None).unwrap();
        let new = Signer::make(now, Some(&old)).unwrap();
        assert_eq!(new.certificates[1..], old.certificates);
        assert_eq!(new.bundle().matches("BEGIN CERTIFICATE").count(), 2);
        let later = Signer::make(now + AUTHORITY_LIFE * 3 / 4, Some(&new)).unwrap();
        assert_eq!(later.certificates[1..], new.certificates[..1], "one that is over is dropped");
    }

    #[test]
    fn what_a_new_authority_signs_is_served_when_every_api_server_has_heard_of_it() {
        let (now, mut known) = (SystemTime::now(), Known::default());
        let old = Signer::make(now, None).unwrap();
        let leaf = old.sign(now).unwrap();
        let keeps = |known: &mut Known, of: &Signer, at| known.keeps(Some(&leaf), &of.certificates[0], at);
        assert!(!known.keeps(None, &old.certificates[0], now), "the first one is served at once");
        assert!(keeps(&mut known, &old, now) && keeps(&mut known, &old, now + SETTLE * 2));
        let new = Signer::make(now, Some(&old)).unwrap();
        let at = now + SETTLE * 3;
        assert!(
            keeps(&mut known, &new, at) && keeps(&mut known, &new, at + SETTLE / 2),
            "it is believed still"
        );
        assert!(!keeps(&mut known, &new, at + SETTLE));
        assert!(!keeps(&mut known, &old, leaf.renew_at), "nothing is served beyond its time");
    }

    #[tokio::test]
    async fn an_authority_whose_secret_is_lost_or_spoilt_is_the_same_afterwards() {
        use crate::k8s::fake::Fake;
        const SECRETS: &str = "/api/v1/secrets";
        let fake = Fake::start().await;
        let client = crate::k8s::client_of(kube::Config::new(fake.uri())).unwrap();
        let first = authority(&client, None, None).await.unwrap();
        fake.delete(SECRETS, CONTROL_NAMESPACE, SECRET);
        let again = authority(&client, None, Some(&first)).await.unwrap();
        assert_eq!(again.certificates, first.certificates);
        let mut spoilt = fake.get(SECRETS, CONTROL_NAMESPACE, SECRET).unwrap();
        spoilt["data"][KEY] = json!("bm8ga2V5");
        fake.apply(SECRETS, spoilt);
        let again = authority(&client, None, Some(&first)).await.unwrap();
        assert_eq!(again.certificates, first.certificates);
        // Who knows of none reads what stands there now.
        assert_eq!(authority(&client, None, None).await.unwrap().certificates, first.certificates);
    }

    #[test]
    fn a_certificate_is_for_the_service_and_never_outlives_its_authority() {
        let now = SystemTime::now();
        let authority = Signer::make(now, None).unwrap();
        let leaf = authority.sign(now).unwrap();
        assert!(leaf.renew_at > now + LEAF_LIFE / 4 && leaf.renew_at < now + LEAF_LIFE);
        let last = authority.sign(now + AUTHORITY_LIFE - Duration::from_secs(60)).unwrap();
        assert!(last.renew_at < now + AUTHORITY_LIFE);
    }
}
