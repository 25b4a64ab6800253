//! Who is who in the cluster: one test authority, and a certificate for each of its members.
//!
//! Real certificates and real RBAC, because half of what breaks an installation is a permission. They live for
//! the cluster's life and are made anew with it.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The authority, and the folder that it writes to.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one: `ca.crt` and `ca.key`, and the key pair that signs service-account tokens (`sa.key`, `sa.pub`).
    pub fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "weft test cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?;
        fs::write(folder.join("ca.crt"), certificate.pem())?;
        write_key(&folder.join("ca.key"), &key)?;
        let tokens = KeyPair::generate()?;
        write_key(&folder.join("sa.key"), &tokens)?;
        fs::write(folder.join("sa.pub"), tokens.public_key_pem())?;
        Ok(Self { folder: folder.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// `NAME.crt` and `NAME.key`, for a client and, where there are names or addresses, a server.
    pub fn issue(
        &self,
        name: &str,
        user: &str,
        group: Option<&str>,
        names: &[&str],
        addresses: &[IpAddr],
    ) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        for name in names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        params.subject_alt_names.extend(addresses.iter().map(|&address| SanType::IpAddress(address)));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(self.folder.join(format!("{name}.crt")), certificate.pem())?;
        write_key(&self.folder.join(format!("{name}.key")), &key)
    }

    /// `NAME.kubeconfig` for a user with a certificate of this authority.
    pub fn kubeconfig(&self, name: &str, user: &str, group: Option<&str>, server: &str) -> Result<PathBuf> {
        self.issue(name, user, group, &[], &[])?;
        let path = self.folder.join(format!("{name}.kubeconfig"));
        // JSON is YAML.
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "weft-test",
                "cluster": {"server": server, "certificate-authority": self.folder.join("ca.crt")},
            }],
            "users": [{
                "name": user,
                "user": {
                    "client-certificate": self.folder.join(format!("{name}.crt")),
                    "client-key": self.folder.join(format!("{name}.key")),
                },
            }],
            "contexts": [{"name": "weft-test", "context": {"cluster": "weft-test", "user": user}}],
            "current-context": "weft-test",
        });
        fs::write(&path, serde_json::to_string_pretty(&config)?)
            .with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

fn write_key(path: &Path, key: &KeyPair) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    std::io::Write::write_all(&mut file, key.serialize_pem().as_bytes())?;
    Ok(())
}
