//! Trust anchors on disk: made, loaded, and replaced in three steps that nobody notices.
//!
//! Why three steps: A → A+B (everybody trusts both, A signs) → A+B with B signing (everybody renews) → B.
//! A missed or rushed rotation is the commonest total outage of meshes; each step here is refused until
//! the one before it was taken, and the caller decides when everybody has followed.
//!
//! Files of the state folder, all 0600 but the anchors: `root-<n>.pem` (certificate and key), `roots.json`
//! (which sign, which are trusted, the sequence), `join.key`, `trust-anchors.pem` (for sidecars).
//!
//! In a cluster the same files are the entries of a Secret: [`Place`] is where they are. Or somebody else keeps the
//! authority (cert-manager, a company's own): then there is an issuer's key and certificate, and roots that may stay
//! offline, and nothing here is ever written.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use weft_core::identity::TrustDomain;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};
use zeroize::Zeroizing;

use super::{
    Bundle, CaError,
    certificate::{hex, is_issued_by, is_self_signed, pem},
    issuer::{self, Issued, Subject},
    place::{Files, Place},
};

/// One step of a root's rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RotateRoot {
    /// Make B; both are trusted, A signs.
    Add,
    /// B signs; everybody renews.
    Activate,
    /// A is no longer trusted.
    Retire,
}

/// The roots of one place.
#[derive(Debug)]
pub struct Roots {
    place: Place,
    register: Register,
    roots: Vec<Root>,
    /// Who signs, where that is no root of ours.
    supplied: Option<Supplied>,
}

/// An issuer that somebody else made.
struct Supplied {
    certificate: CertificateDer<'static>,
    key: KeyPair,
    /// Itself and those above it, where it is no root: whoever verifies has the roots only.
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

/// One root, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootInfo {
    /// Its file's name.
    pub name: String,
    /// Whether it signs.
    pub signs: bool,
    /// End of validity.
    pub not_after: SystemTime,
    /// Start of validity.
    pub not_before: SystemTime,
    /// Serial number, in hexadecimal.
    pub serial: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Register {
    active: String,
    trusted: Vec<String>,
    sequence: u64,
}

struct Root {
    name: String,
    certificate: CertificateDer<'static>,
    /// Only of roots that are kept here.
    key: Option<KeyPair>,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
    /// What certificates that it signed name it by.
    key_id: Vec<u8>,
}

impl std::fmt::Debug for Supplied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supplied").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Roots {
    /// Loads the roots, or makes the first one.
    ///
    /// # Errors
    /// Files that cannot be read, written or used.
    pub fn open(state: &Path, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        Self::open_in(Place::Folder(state.to_owned()), trust_domain)
    }

    /// The same in any place. A Secret in the layout of `kubernetes.io/tls` is a supplied issuer.
    ///
    /// # Errors
    /// Files that cannot be read, written or used.
    pub fn open_in(mut place: Place, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        if matches!(place, Place::Memory(_)) && place.has(SUPPLIED_CERTIFICATE) {
            return Self::supplied(place, SystemTime::now());
        }
        let path = place.path(REGISTER);
        let mut roots = match place.read(REGISTER) {
            Ok(bytes) => {
                let register: Register = serde_json::from_slice(&bytes)
                    .map_err(|e| CaError::Content { path: path.clone(), reason: e.to_string() })?;
                if !register.trusted.contains(&register.active) {
                    return Err(CaError::Content {
                        path,
                        reason: "the active root is not a trusted one".to_owned(),
                    });
                }
                let loaded = register.trusted.iter().map(|name| load(&place, name));
                let mut roots =
                    Self { roots: loaded.collect::<Result<_, _>>()?, place, register, supplied: None };
                roots.forget_expired(SystemTime::now())?;
                roots
            }
            // Somebody put something else there, or put it there wrongly: a root of our own beside it would be one
            // more authority on each replica that reads it.
            Err(_) if matches!(&place, Place::Memory(files) if !files.is_empty()) => {
                let reason = format!(
                    "is missing, and so is {SUPPLIED_CERTIFICATE}: there is no authority in what is there"
                );
                return Err(CaError::Content { path, reason });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let root = create(&mut place, "root-1", trust_domain)?;
                let name = root.name.clone();
                let register = Register { active: name.clone(), trusted: vec![name], sequence: 1 };
                Self { place, register, roots: vec![root], supplied: None }
            }
            Err(error) => return Err(CaError::File { path, error }),
        };
        roots.save(roots.register.clone())?;
        Ok(roots)
    }

    /// `tls.crt` (the issuer, then those above it), `tls.key`, and `ca.crt` (the roots; without it those of `tls.crt`
    /// that signed themselves): the layout of `kubernetes.io/tls` and of cert-manager.
    fn supplied(place: Place, now: SystemTime) -> Result<Self, CaError> {
        let read =
            |name: &str| place.read(name).map_err(|error| CaError::File { path: place.path(name), error });
        let bad = |name: &str, reason: String| CaError::Content { path: place.path(name), reason };
        let certificates = |name: &str| {
            let text = read(name)?;
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
            all.map_err(|e| bad(name, format!("no certificate: {e}")))
        };
        let mut chain = certificates(SUPPLIED_CERTIFICATE)?;
        let key = read(SUPPLIED_KEY)?;
        let issuer = chain
            .first()
            .cloned()
            .ok_or_else(|| bad(SUPPLIED_CERTIFICATE, "holds no certificate".to_owned()))?;
        let signs = root(SUPPLIED_CERTIFICATE, issuer.clone(), Some(&key))
            .map_err(|reason| bad(SUPPLIED_CERTIFICATE, reason))?;
        if signs.not_after <= now {
            return Err(bad(SUPPLIED_CERTIFICATE, "the issuer's certificate has expired".to_owned()));
        }
        let anchors = if place.has(SUPPLIED_ROOTS) {
            certificates(SUPPLIED_ROOTS)?
        } else {
            chain.iter().filter(|certificate| is_self_signed(certificate)).cloned().collect()
        };
        let mut roots = Vec::new();
        for (n, anchor) in anchors.into_iter().enumerate() {
            let anchor = root(&format!("{SUPPLIED_ROOTS} no. {}", n + 1), anchor, None)
                .map_err(|reason| bad(SUPPLIED_ROOTS, reason))?;
            let known = roots.iter().any(|known: &Root| known.certificate == anchor.certificate);
            if anchor.not_after > now && !known {
                roots.push(anchor);
            }
        }
        if roots.is_empty() {
            let reason = "is missing, or all its roots have expired: sidecars need a root to trust";
            return Err(bad(SUPPLIED_ROOTS, reason.to_owned()));
        }
        // Whoever verifies has the roots.
        chain.retain(|certificate| roots.iter().all(|root| root.certificate != *certificate));
        let active = roots
            .iter()
            .find(|root| root.certificate == issuer || is_issued_by(&issuer, &root.certificate))
            .or(roots.last())
            .map(|root| root.name.clone())
            .unwrap_or_default();
        let register = Register {
            active,
            trusted: roots.iter().map(|root| root.name.clone()).collect(),
            // Grows when the issuer is a new one, on every replica alike: then everybody renews.
            sequence: signs.not_before.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
        };
        let Root { certificate, key: Some(key), not_after, .. } = signs else {
            return Err(bad(SUPPLIED_KEY, "is missing".to_owned()));
        };
        Ok(Self { place, register, roots, supplied: Some(Supplied { certificate, key, chain, not_after }) })
    }

    /// Its files, to be kept elsewhere; none of a folder's.
    pub fn files(&self) -> Option<&Files> {
        match &self.place {
            Place::Memory(files) => Some(files),
            Place::Folder(_) => None,
        }
    }

    /// The same, unless somebody else supplies them.
    pub fn made(&self) -> Option<&Files> {
        self.files().filter(|_| self.supplied.is_none())
    }

    /// The trust anchors, as sidecars read them.
    pub fn anchors(&self) -> String {
        self.roots.iter().map(|root| pem("CERTIFICATE", &root.certificate)).collect()
    }

    /// What sidecars should trust.
    pub fn bundle(&self) -> Bundle {
        Bundle {
            roots: self.roots.iter().map(|root| root.certificate.clone()).collect(),
            sequence: self.register.sequence,
        }
    }

    /// Takes one step; without one, everybody renews.
    ///
    /// # Errors
    /// It does not fit the state, or the state folder cannot be written.
    pub fn step(&mut self, step: Option<RotateRoot>, trust_domain: &TrustDomain) -> Result<(), CaError> {
        match step {
            None => self.next_sequence(),
            Some(step) => self.rotate(step, trust_domain),
        }
    }

    fn next_sequence(&mut self) -> Result<(), CaError> {
        self.is_ours()?;
        let mut register = self.register.clone();
        register.sequence += 1;
        self.save(register)
    }

    /// Takes one step.
    ///
    /// # Errors
    /// It does not fit the state, or the state folder cannot be written.
    pub fn rotate(&mut self, step: RotateRoot, trust_domain: &TrustDomain) -> Result<(), CaError> {
        self.is_ours()?;
        let refuse = |reason: &str| Err(CaError::Rotation(reason.to_owned()));
        let mut register = self.register.clone();
        register.sequence += 1;
        match step {
            RotateRoot::Add => {
                if self.roots.len() > 1 {
                    return refuse("a rotation is under way: activate the new root, then retire the old one");
                }
                let name = self.next_name();
                let root = create(&mut self.place, &name, trust_domain)?;
                register.trusted.push(root.name.clone());
                self.roots.push(root);
                if let Err(error) = self.save(register) {
                    self.roots.pop();
                    return Err(error);
                }
                Ok(())
            }
            RotateRoot::Activate => {
                register.active = self.coming()?.to_owned();
                self.save(register)
            }
            RotateRoot::Retire => {
                self.staying()?;
                register.trusted = vec![self.register.active.clone()];
                self.save(register)?;
                let active = self.register.active.clone();
                self.roots.retain(|root| root.name == active);
                Ok(())
            }
        }
    }

    /// The name of the new root, which is trusted and does not sign yet.
    ///
    /// # Errors
    /// There is none to activate.
    pub fn coming(&self) -> Result<&str, CaError> {
        self.is_ours()?;
        let newest =
            self.roots.last().filter(|root| self.roots.len() > 1 && root.name != self.register.active);
        newest
            .map(|root| root.name.as_str())
            .ok_or_else(|| CaError::Rotation("there is no new root to activate: add one first".to_owned()))
    }

    /// The serial number of the root that stays when the old one is retired.
    ///
    /// # Errors
    /// There is none to retire.
    pub fn staying(&self) -> Result<&str, CaError> {
        self.is_ours()?;
        let newest =
            self.roots.last().filter(|root| self.roots.len() > 1 && root.name == self.register.active);
        newest.map(|root| root.serial.as_str()).ok_or_else(|| {
            let reason = "there is no old root to retire: add and activate a new one first";
            CaError::Rotation(reason.to_owned())
        })
    }

    /// The serial number of the root that a key identifier is of.
    pub fn by_key(&self, key: &[u8]) -> Option<&str> {
        let root = self.roots.iter().find(|root| !key.is_empty() && root.key_id == key)?;
        Some(&root.serial)
    }

    /// The serial number of the root that workloads' certificates go back to now.
    pub fn signing(&self) -> &str {
        let active = self.roots.iter().find(|root| root.name == self.register.active);
        active.map_or("", |root| root.serial.as_str())
    }

    /// Signs a workload's key.
    ///
    /// # Errors
    /// Signing.
    pub fn sign(
        &self,
        key: &impl PublicKeyData,
        subject: &Subject,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let none = Vec::new();
        let (certificate, own, chain, not_after) = match &self.supplied {
            Some(issuer) => (&issuer.certificate, &issuer.key, &issuer.chain, issuer.not_after),
            None => {
                let root = self.active()?;
                let key = root.key.as_ref();
                let key =
                    key.ok_or_else(|| CaError::Signing("the active root has no key here".to_owned()))?;
                (&root.certificate, key, &none, root.not_after)
            }
        };
        let issuer =
            Issuer::from_ca_cert_der(certificate, own).map_err(|e| CaError::Signing(e.to_string()))?;
        let mut issued = issuer::sign(key, subject, lifetime, now, &issuer, not_after)?;
        issued.chain.extend(chain.iter().cloned());
        issued.root = self.signing().to_owned();
        Ok(issued)
    }

    /// Makes a key and signs it, for the controller itself.
    ///
    /// # Errors
    /// Signing.
    pub fn sign_own(
        &self,
        subject: &Subject,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<(Issued, PrivateKeyDer<'static>), CaError> {
        let key = KeyPair::generate().map_err(|e| CaError::Signing(e.to_string()))?;
        let issued = self.sign(&key, subject, lifetime, now)?;
        Ok((issued, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    /// For reports.
    pub fn describe(&self) -> Vec<RootInfo> {
        let info = |root: &Root| RootInfo {
            name: root.name.clone(),
            signs: root.name == self.register.active,
            not_after: root.not_after,
            not_before: root.not_before,
            serial: root.serial.clone(),
        };
        self.roots.iter().map(info).collect()
    }

    /// A root that has expired is no anchor any more: those who verify do not look at an anchor's dates. Only
    /// that of the root that signs is an error.
    fn forget_expired(&mut self, now: SystemTime) -> Result<(), CaError> {
        let active = &self.register.active;
        if self.roots.iter().any(|root| root.name == *active && root.not_after <= now) {
            let path = self.place.path(&format!("{active}.pem"));
            let reason = "the certificate has expired, and it is the one that signs: move the state folder \
                          away for a new authority, and restart the sidecars";
            return Err(CaError::Content { path, reason: reason.to_owned() });
        }
        self.roots.retain(|root| {
            let expired = root.not_after <= now;
            if expired {
                tracing::warn!(root = root.name, "has expired: no longer trusted");
            }
            !expired
        });
        self.register.trusted.retain(|name| self.roots.iter().any(|root| root.name == *name));
        Ok(())
    }

    /// What somebody else made, somebody else rotates.
    fn is_ours(&self) -> Result<(), CaError> {
        if self.supplied.is_none() {
            return Ok(());
        }
        let reason =
            "the issuer is supplied: rotate it where it comes from, with both roots in ca.crt meanwhile";
        Err(CaError::Rotation(reason.to_owned()))
    }

    fn active(&self) -> Result<&Root, CaError> {
        let active = self.roots.iter().find(|root| root.name == self.register.active);
        active.ok_or_else(|| CaError::Signing("there is no active root".to_owned()))
    }

    fn next_name(&self) -> String {
        // Names of retired roots are not used again: their files stay, for whoever has to look back.
        let taken = |n: &usize| self.place.has(&format!("root-{n}.pem"));
        format!("root-{}", (1..).find(|n| !taken(n)).unwrap_or(1))
    }

    /// Anchors first: nobody signs with a root that sidecars cannot find.
    fn save(&mut self, register: Register) -> Result<(), CaError> {
        let trusted = self.roots.iter().filter(|root| register.trusted.contains(&root.name));
        let anchors: String = trusted.map(|root| pem("CERTIFICATE", &root.certificate)).collect();
        self.place.write(ANCHORS, anchors.as_bytes(), 0o644)?;
        let text = serde_json::to_vec_pretty(&register).map_err(|e| CaError::Signing(e.to_string()))?;
        self.place.write(REGISTER, &text, 0o600)?;
        self.register = register;
        Ok(())
    }
}

fn create(place: &mut Place, name: &str, trust_domain: &TrustDomain) -> Result<Root, CaError> {
    let failed = |e: rcgen::Error| CaError::Signing(e.to_string());
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("weft {name} {trust_domain}"));
    params.not_before = (now - Duration::from_secs(3_600)).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    params.serial_number = Some(issuer::serial());
    // It signs workloads and no other authority. No name constraints: rustls refuses URI ones outright.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(failed)?;
    let mut text = Zeroizing::new(certificate.pem());
    text.push_str(&Zeroizing::new(key.serialize_pem()));
    place.write(&format!("{name}.pem"), text.as_bytes(), 0o600)?;
    load(place, name)
}

fn load(place: &Place, name: &str) -> Result<Root, CaError> {
    let file = format!("{name}.pem");
    let path = place.path(&file);
    let text = place.read(&file).map_err(|error| CaError::File { path: path.clone(), error })?;
    let bad = |reason: String| CaError::Content { path: path.clone(), reason };
    let certificate =
        CertificateDer::from_pem_slice(&text).map_err(|e| bad(format!("no certificate: {e}")))?;
    root(name, certificate, Some(&text)).map_err(bad)
}

/// An authority's certificate, and its key from a PEM text.
fn root(name: &str, certificate: CertificateDer<'static>, key: Option<&[u8]>) -> Result<Root, String> {
    let key = key
        .map(|text| {
            let key = PrivateKeyDer::from_pem_slice(text).map_err(|e| format!("no private key: {e}"))?;
            KeyPair::try_from(&key).map_err(|e| format!("private key: {e}"))
        })
        .transpose()?;
    let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|e| format!("certificate: {e}"))?;
    if !parsed.is_ca() {
        return Err("the certificate is not that of an authority".to_owned());
    }
    let public = &parsed.public_key().subject_public_key.data;
    if key.as_ref().is_some_and(|key| public.as_ref() != key.public_key_raw()) {
        return Err("key and certificate do not belong together".to_owned());
    }
    let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let not_before = at(parsed.validity().not_before.timestamp());
    let not_after = at(parsed.validity().not_after.timestamp());
    let serial = hex(parsed.raw_serial());
    let key_id = parsed.extensions().iter().find_map(|extension| {
        let ParsedExtension::SubjectKeyIdentifier(id) = extension.parsed_extension() else { return None };
        Some(id.0.to_vec())
    });
    let key_id = key_id.unwrap_or_default();
    Ok(Root { name: name.to_owned(), certificate, key, not_before, not_after, serial, key_id })
}

/// The file that sidecars read.
pub const ANCHORS: &str = "trust-anchors.pem";
/// The layout of `kubernetes.io/tls`, and cert-manager's third entry.
const SUPPLIED_CERTIFICATE: &str = "tls.crt";
const SUPPLIED_KEY: &str = "tls.key";
const SUPPLIED_ROOTS: &str = "ca.crt";
const REGISTER: &str = "roots.json";
/// 10 years: a root is replaced by rotation, not by expiry.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;
    use crate::ca::place::tests::StateDir;

    fn domain() -> TrustDomain {
        TrustDomain::new("cluster.local").unwrap()
    }

    fn anchors(state: &StateDir) -> usize {
        fs::read_to_string(state.0.join(ANCHORS)).unwrap().matches("BEGIN").count()
    }

    #[test]
    fn a_root_is_made_once_and_private() {
        let state = StateDir::new("root");
        let first = Roots::open(&state.0, &domain()).unwrap();
        let again = Roots::open(&state.0, &domain()).unwrap();
        assert_eq!(first.bundle(), again.bundle());
        for private in ["root-1.pem", REGISTER] {
            let mode = fs::metadata(state.0.join(private)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{private}");
        }
        assert_eq!(anchors(&state), 1);
        assert!(first.describe()[0].signs);
    }

    #[test]
    fn a_rotation_takes_its_steps_in_order_and_survives_restarts() {
        let state = StateDir::new("rotate");
        let mut roots = Roots::open(&state.0, &domain()).unwrap();
        let refused = |roots: &mut Roots, step| {
            assert!(matches!(roots.rotate(step, &domain()), Err(CaError::Rotation(_))))
        };
        refused(&mut roots, RotateRoot::Activate);
        refused(&mut roots, RotateRoot::Retire);
        let old = roots.bundle();
        roots.rotate(RotateRoot::Add, &domain()).unwrap();
        refused(&mut roots, RotateRoot::Add);
        refused(&mut roots, RotateRoot::Retire);
        assert_eq!((roots.bundle().roots.len(), anchors(&state)), (2, 2));
        assert!(roots.bundle().sequence > old.sequence);
        assert_eq!(roots.active().unwrap().name, "root-1");

        let mut roots = Roots::open(&state.0, &domain()).unwrap();
        roots.rotate(RotateRoot::Activate, &domain()).unwrap();
        assert_eq!(roots.active().unwrap().name, "root-2");
        let mut roots = Roots::open(&state.0, &domain()).unwrap();
        roots.rotate(RotateRoot::Retire, &domain()).unwrap();
        assert_eq!((roots.bundle().roots.len(), anchors(&state)), (1, 1));
        assert_ne!(roots.bundle().roots, old.roots);
        roots.rotate(RotateRoot::Add, &domain()).unwrap();
        assert_eq!(roots.describe()[1].name, "root-3");
    }

    #[test]
    fn an_expired_root_that_only_was_trusted_keeps_nobody_from_starting() {
        let state = StateDir::new("expired");
        let mut roots = Roots::open(&state.0, &domain()).unwrap();
        roots.rotate(RotateRoot::Add, &domain()).unwrap();
        roots.rotate(RotateRoot::Activate, &domain()).unwrap();
        let new = roots.bundle().roots[1].clone();
        // The old root runs out before anybody retired it.
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        (params.not_before, params.not_after) =
            (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2021, 1, 1));
        let key = KeyPair::generate().unwrap();
        let text = params.self_signed(&key).unwrap().pem() + &key.serialize_pem();
        fs::write(state.0.join("root-1.pem"), &text).unwrap();
        let roots = Roots::open(&state.0, &domain()).unwrap();
        // Verifiers do not look at an anchor's dates: what has expired must not be handed out as one.
        assert_eq!((roots.bundle().roots, anchors(&state)), (vec![new], 1));
        // The one that signs is another matter: nothing could be signed.
        fs::write(state.0.join("root-2.pem"), &text).unwrap();
        let error = Roots::open(&state.0, &domain()).unwrap_err().to_string();
        assert!(error.contains("root-2.pem") && error.contains("expired"), "{error}");
    }

    #[test]
    fn a_damaged_state_is_named() {
        let state = StateDir::new("damaged");
        Roots::open(&state.0, &domain()).unwrap();
        fs::write(state.0.join("root-1.pem"), "nothing").unwrap();
        let error = Roots::open(&state.0, &domain()).unwrap_err().to_string();
        assert!(error.contains("root-1.pem") && error.contains("no certificate"), "{error}");
    }

    fn subject() -> Subject {
        let identity = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        Subject { identity, name: "u.weft.internal".to_owned() }
    }

    #[test]
    fn the_files_of_a_secret_are_those_of_a_folder() {
        let mut first = Roots::open_in(Place::Memory(Files::new()), &domain()).unwrap();
        first.rotate(RotateRoot::Add, &domain()).unwrap();
        let files = first.files().unwrap().clone();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["root-1.pem", "root-2.pem", REGISTER, ANCHORS]);
        let other = Roots::open_in(Place::Memory(files), &domain()).unwrap();
        assert_eq!(other.bundle(), first.bundle());
        assert_eq!(other.anchors().matches("BEGIN").count(), 2);
    }

    #[test]
    fn a_secret_that_holds_something_else_makes_no_authority() {
        let mut files =
            Roots::open_in(Place::Memory(Files::new()), &domain()).unwrap().files().unwrap().clone();
        files.remove(REGISTER);
        for entries in [files, [("cert.pem".to_owned(), Zeroizing::new(b"x".to_vec()))].into()] {
            let error = Roots::open_in(Place::Memory(entries), &domain()).unwrap_err();
            assert!(matches!(&error, CaError::Content { .. }), "{error}");
            assert!(error.to_string().contains(REGISTER), "{error}");
        }
    }

    #[test]
    fn a_supplied_issuer_signs_while_its_root_stays_away() {
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let named = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params
        };
        let root = named("offline root").self_signed(&root_key).unwrap();
        let issuer = named("issuer").signed_by(&key, &Issuer::new(named("offline root"), &root_key)).unwrap();
        let mut files = Files::new();
        let mut put = |name: &str, text: String| {
            files.insert(name.to_owned(), Zeroizing::new(text.into_bytes()));
            Roots::open_in(Place::Memory(files.clone()), &domain())
        };
        assert!(put(SUPPLIED_CERTIFICATE, issuer.pem()).is_err(), "no key");
        let no_root = put(SUPPLIED_KEY, key.serialize_pem()).unwrap_err().to_string();
        assert!(no_root.contains(SUPPLIED_ROOTS), "{no_root}");
        let mut roots = put(SUPPLIED_ROOTS, root.pem()).unwrap();
        assert_eq!(roots.bundle().roots, [root.der().clone()]);
        let (issued, _) = roots.sign_own(&subject(), Duration::from_secs(60), SystemTime::now()).unwrap();
        assert_eq!(issued.chain.len(), 2, "the issuer comes along");
        assert_eq!(issued.chain[1], *issuer.der());
        assert!(matches!(roots.rotate(RotateRoot::Add, &domain()), Err(CaError::Rotation(_))));
        assert!(matches!(roots.next_sequence(), Err(CaError::Rotation(_))));
        let wrong = put(SUPPLIED_KEY, root_key.serialize_pem()).unwrap_err().to_string();
        assert!(wrong.contains("belong together"), "{wrong}");
    }
}
