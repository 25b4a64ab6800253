//! The identity matrix: everything that a peer could show, shown to both of our sides in real handshakes.
//!
//! Why the peer is of our own making: it believes anybody and shows whatever it is given, as an attacker would, so
//! that only our judgement decides. Why the reason is part of a case: a certificate that is refused for another
//! reason than its fault is let in by whoever repairs that other reason.

use std::{net::Ipv4Addr, time::Instant, time::SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, OtherNameValue, PublicKeyData, SanType, SigningKey as _,
};
use rustls_pki_types::PrivateKeyDer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{testing::*, *};

const WEB: &str = "spiffe://a.test/ns/shop/sa/web";
const API: &str = "spiffe://a.test/ns/shop/sa/api";

/// What a peer shows, and what becomes of it.
struct Case {
    name: String,
    shown: Shown,
    /// As a client to our server, as a server to our client.
    accepted: (bool, bool),
    /// Part of the reason, for a case that is refused.
    why: &'static str,
}

struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
    trust: Trust,
}

/// Whom our side trusts, and who else there is.
struct World {
    /// Our trust domain.
    a: Authority,
    /// Another one; its roots are known to our side, too.
    b: Authority,
    key: WorkloadKey,
}

impl World {
    fn new() -> Self {
        Self {
            a: Authority::new("a.test"),
            b: Authority::new("b.test"),
            key: WorkloadKey::generate().unwrap(),
        }
    }

    fn trust(&self) -> Trust {
        self.a.trust().merged(&self.b.trust())
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = leaf(WEB);
        change(&mut params);
        self.a.issue(&self.key, &params)
    }

    fn shown(&self, chain: Vec<CertificateDer<'static>>) -> Shown {
        Shown { chain, key: Arc::new(self.key.clone()), trust: self.trust() }
    }

    /// An issuer below another one.
    fn issuer(
        &self,
        by: &Issuer<'_, KeyPair>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, Issuer<'static, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("issuer {:?}", key.public_key_raw()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        change(&mut params);
        let der = params.signed_by(&key, by).unwrap().der().clone();
        (der, Issuer::new(params, key))
    }

    fn issued_by(&self, issuer: &Issuer<'_, KeyPair>) -> CertificateDer<'static> {
        leaf(WEB).signed_by(&self.key, issuer).unwrap().der().clone()
    }

    /// What the authority would sign if it could be made to sign anything: a good certificate whose signed part
    /// was changed first.
    fn malformed(&self, change: impl FnOnce(&mut Vec<Vec<u8>>)) -> CertificateDer<'static> {
        self.malformed_from(&self.leaf(|_| {}), change)
    }

    fn malformed_from(
        &self,
        good: &CertificateDer<'_>,
        change: impl FnOnce(&mut Vec<Vec<u8>>),
    ) -> CertificateDer<'static> {
        let certificate = der::children(der::content(good));
        let mut fields = der::children(der::content(&certificate[0]));
        change(&mut fields);
        let signed = der::sequence(&fields);
        // The algorithm stands inside and outside.
        let algorithm = fields.iter().find(|field| der::is_algorithm(field)).unwrap().clone();
        let signature = der::bits(&self.a.issuer.key().sign(&signed).unwrap());
        der::sequence(&[signed, algorithm, signature]).into()
    }

    /// A list of the certificates that an authority has revoked.
    fn revoked(&self, by: &Authority, serial: u64, age: i64) -> Vec<u8> {
        let list = rcgen::CertificateRevocationListParams {
            this_update: in_seconds(-age - 60).into(),
            next_update: in_seconds(-age + 3_600).into(),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![rcgen::RevokedCertParams {
                serial_number: serial.into(),
                revocation_time: in_seconds(-age - 60).into(),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&by.issuer).unwrap().der().to_vec()
    }
}

#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    fn both(&mut self, name: &str, shown: Shown) {
        self.0.push(Case { name: name.into(), shown, accepted: (true, true), why: "" });
    }

    fn client_only(&mut self, name: &str, why: &'static str, shown: Shown) {
        self.0.push(Case { name: name.into(), shown, accepted: (true, false), why });
    }

    fn server_only(&mut self, name: &str, why: &'static str, shown: Shown) {
        self.0.push(Case { name: name.into(), shown, accepted: (false, true), why });
    }

    fn none(&mut self, name: &str, why: &'static str, shown: Shown) {
        self.0.push(Case { name: name.into(), shown, accepted: (false, false), why });
    }
}

fn in_seconds(seconds: i64) -> SystemTime {
    let by = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

fn extension(oid: &[u64], content: Vec<u8>, critical: bool) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(oid, content);
    extension.set_criticality(critical);
    extension
}

const ALTERNATIVE_NAMES: &[u64] = &[2, 5, 29, 17];
const NAME_CONSTRAINTS: &[u64] = &[2, 5, 29, 30];

/// Who signed it, for how long, for what.
fn validity_and_usage(w: &World, t: &mut Table) {
    let leaf = |change: &dyn Fn(&mut CertificateParams)| w.shown(vec![w.leaf(change)]);
    let valid = |from: i64, to: i64| {
        leaf(&move |p| (p.not_before, p.not_after) = (in_seconds(from).into(), in_seconds(to).into()))
    };
    use ExtendedKeyUsagePurpose as Extended;
    use KeyUsagePurpose as Usage;
    t.both("what the controller issues", leaf(&|_| {}));
    t.both("expired, within the skew of clocks", valid(-9_000, -200));
    t.none("expired", "CertExpired", valid(-9_000, -400));
    t.none("expired years ago", "CertExpired", valid(-90_000_000, -80_000_000));
    t.both("not yet valid, within the skew of clocks", valid(200, 9_000));
    t.none("not yet valid", "CertNotValidYet", valid(400, 9_000));
    t.none("ends before it begins", "InvalidCertValidity", valid(100, -100));
    t.none("key agreement only", "KeyUsage", leaf(&|p| p.key_usages = vec![Usage::KeyAgreement]));
    t.none(
        "may sign certificates, too",
        "KeyUsage",
        leaf(&|p| p.key_usages = vec![Usage::DigitalSignature, Usage::KeyCertSign]),
    );
    t.none(
        "may sign revocation lists, too",
        "KeyUsage",
        leaf(&|p| p.key_usages = vec![Usage::DigitalSignature, Usage::CrlSign]),
    );
    t.both("no key usage: none is excluded", leaf(&|p| p.key_usages.clear()));
    t.none(
        "for code signing",
        "RequiredEkuNotFound",
        leaf(&|p| p.extended_key_usages = vec![Extended::CodeSigning]),
    );
    t.server_only(
        "for servers",
        "RequiredEkuNotFound",
        leaf(&|p| p.extended_key_usages = vec![Extended::ServerAuth]),
    );
    t.client_only(
        "for clients",
        "RequiredEkuNotFound",
        leaf(&|p| p.extended_key_usages = vec![Extended::ClientAuth]),
    );
    t.both("no extended usage: none is excluded", leaf(&|p| p.extended_key_usages.clear()));
    t.none(
        "an authority's own certificate",
        "CaUsedAsEndEntity",
        leaf(&|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
    );
    t.both("says that it is no authority", leaf(&|p| p.is_ca = IsCa::ExplicitNoCa));
    t.none(
        "an unknown critical extension",
        "UnsupportedCriticalExtension",
        leaf(&|p| p.custom_extensions.push(extension(&[1, 2, 3, 4, 5], vec![5, 0], true))),
    );
    t.both(
        "an unknown extension",
        leaf(&|p| p.custom_extensions.push(extension(&[1, 2, 3, 4, 5], vec![5, 0], false))),
    );
}

/// What it calls its owner.
fn names(w: &World, t: &mut Table) {
    let leaf = |change: &dyn Fn(&mut CertificateParams)| w.shown(vec![w.leaf(change)]);
    let also = |name: SanType| leaf(&move |p| p.subject_alt_names.push(name.clone()));
    t.both("a DNS name beside the URI", also(dns("x.weft.internal")));
    t.both("a DNS name before the URI", leaf(&|p| p.subject_alt_names.insert(0, dns("x.weft.internal"))));
    t.both("an address beside the URI", also(SanType::IpAddress(Ipv4Addr::LOCALHOST.into())));
    t.both("a mail address beside the URI", also(SanType::Rfc822Name("a@a.test".try_into().unwrap())));
    t.none("two identities", "UriNames(2)", also(uri(API)));
    t.none(
        "two identities, the other first",
        "UriNames(2)",
        leaf(&|p| p.subject_alt_names.insert(0, uri(API))),
    );
    t.none("the same identity twice", "UriNames(2)", also(uri(WEB)));
    t.none("a URI of another kind beside it", "UriNames(2)", also(uri("https://a.test/")));
    t.none("no names", "UriNames(0)", leaf(&|p| p.subject_alt_names.clear()));
    t.none(
        "the identity as common name",
        "UriNames(0)",
        leaf(&|p| {
            p.subject_alt_names.clear();
            p.distinguished_name.push(DnType::CommonName, WEB);
        }),
    );
    t.none("a DNS name only", "UriNames(0)", leaf(&|p| p.subject_alt_names = vec![dns("web.shop")]));
    t.none(
        "the identity as DNS name",
        "UriNames(0)",
        leaf(&|p| p.subject_alt_names = vec![SanType::DnsName(WEB.try_into().unwrap())]),
    );
    t.none(
        "the identity as a name of another kind",
        "UriNames(0)",
        leaf(&|p| {
            let value = OtherNameValue::Utf8String(WEB.to_owned());
            p.subject_alt_names = vec![SanType::OtherName((vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3], value))];
        }),
    );
    t.client_only("somebody else", "Mismatch", leaf(&|p| p.subject_alt_names = vec![uri(API)]));
    for twin in [format!("{WEB}2"), WEB[..WEB.len() - 1].to_owned(), format!("{WEB}.x")] {
        let shown = leaf(&|p| p.subject_alt_names = vec![uri(&twin)]);
        t.client_only(&format!("the twin {twin}"), "Mismatch", shown);
    }
    let long = format!("spiffe://a.test/ns/shop/sa/{}", "w".repeat(2_048));
    let segment = format!("spiffe://a.test/ns/shop/sa/{}", "w".repeat(254));
    for name in [
        "SPIFFE://a.test/ns/shop/sa/web",
        "spiffe://A.test/ns/shop/sa/web",
        "spiffe://a.test./ns/shop/sa/web",
        "spiffe:///ns/shop/sa/web",
        "spiffe://a.test/ns/shop/sa/web/",
        "spiffe://a.test/ns/shop/sa/",
        "spiffe://a.test/ns//sa/web",
        "spiffe://a.test//ns/shop/sa/web",
        "spiffe://a.test/ns/./sa/web",
        "spiffe://a.test/ns/shop/../shop/sa/web",
        "spiffe://a.test/ns/shop/sa/..",
        "spiffe://a.test/ns/shop/sa/%77eb",
        "spiffe://a.test/ns/shop%2fsa%2fweb",
        "spiffe://a.test/ns/shop/sa/web?x",
        "spiffe://a.test/ns/shop/sa/web#x",
        "spiffe://user@a.test/ns/shop/sa/web",
        "spiffe://a.test:443/ns/shop/sa/web",
        "spiffe://a.test/ns/shop/sa/web\0",
        "spiffe://a.test/ns/shop/sa/web\0.b.test",
        "spiffe://a.test/ns/shop/sa/web ",
        " spiffe://a.test/ns/shop/sa/web",
        "spiffe://a.test/ns/shop/sa/Web",
        "spiffe://a.test/ns/shop/sa/web/extra",
        "spiffe://a.test/sa/web/ns/shop",
        "spiffe://a.test/web",
        "spiffe://a.test",
        "https://a.test/ns/shop/sa/web",
        "",
        &segment,
        &long,
    ] {
        let shown = leaf(&|p| p.subject_alt_names = vec![uri(name)]);
        let short: String = name.chars().take(60).collect();
        // A trailing dot is a trust domain of its own.
        let why = if name.contains("a.test./") { "TrustDomain" } else { "Identity" };
        t.none(&format!("the name {short:?}"), why, shown);
    }
    let names = |content: Vec<u8>, critical: bool| {
        w.shown(vec![w.leaf(|p| {
            p.subject_alt_names.clear();
            p.custom_extensions.push(extension(ALTERNATIVE_NAMES, content, critical));
        })])
    };
    let one = der::tlv(0x86, WEB.as_bytes());
    t.both("alternative names that are critical", names(der::sequence(std::slice::from_ref(&one)), true));
    t.none("an empty list of names", "UriNames(0)", names(der::sequence(&[]), false));
    t.none(
        "a name that is not ASCII",
        "",
        names(der::sequence(&[der::tlv(0x86, b"spiffe://a.test/\xff")]), false),
    );
    t.none("a name in a constructed form", "", names(der::sequence(&[der::tlv(0xa6, &one)]), false));
    t.none("names that are no list", "", names(one.clone(), false));
    t.none(
        "bytes after the list of names",
        "",
        names([der::sequence(std::slice::from_ref(&one)), vec![5, 0]].concat(), false),
    );
    t.none(
        "alternative names twice",
        "",
        w.shown(vec![w.leaf(|p| {
            let content = der::sequence(&[der::tlv(0x86, API.as_bytes())]);
            p.custom_extensions.push(extension(ALTERNATIVE_NAMES, content, false));
        })]),
    );
}

/// Who vouches for it.
fn issuers(w: &World, t: &mut Table) {
    let own = leaf(WEB).self_signed(&w.key).unwrap().der().clone();
    t.none("self-signed", "UnknownIssuer", w.shown(vec![own]));
    let twin = Authority::new("a.test");
    t.none(
        "an authority of the same name",
        "InvalidSignatureForPublicKey",
        w.shown(vec![w.issued_by(&twin.issuer)]),
    );
    t.none(
        "and its root in the chain",
        "InvalidSignatureForPublicKey",
        w.shown(vec![w.issued_by(&twin.issuer), twin.root.clone()]),
    );
    // The same subject *and* key id.
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "root of a.test");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_identifier_method =
        KeyIdMethod::PreSpecified(CertificateParams::default().key_identifier(w.a.issuer.key()));
    let key = KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap().der().clone();
    let mut certificate = leaf(WEB);
    certificate.use_authority_key_identifier_extension = true;
    let by_it = certificate.signed_by(&w.key, &Issuer::new(params, key)).unwrap().der().clone();
    t.none(
        "an authority of the same name and key id",
        "InvalidSignatureForPublicKey",
        w.shown(vec![by_it.clone()]),
    );
    t.none("and its root in the chain too", "InvalidSignatureForPublicKey", w.shown(vec![by_it, root]));
    t.none("b's authority, a's name", "UnknownIssuer", w.shown(vec![w.issued_by(&w.b.issuer)]));
    let theirs = w.b.issue(&w.key, &leaf("spiffe://b.test/ns/shop/sa/web"));
    t.none("of another trust domain", "", w.shown(vec![theirs.clone()]));
    t.none(
        "of a trust domain that nobody knows",
        "TrustDomain",
        Shown { trust: w.a.trust(), ..w.shown(vec![theirs]) },
    );
    let good = || w.shown(vec![w.leaf(|_| {})]);
    t.none("nothing is trusted for its domain", "TrustDomain", Shown { trust: w.b.trust(), ..good() });
    t.none("nothing is trusted at all", "TrustDomain", Shown { trust: Trust::default(), ..good() });
    let rotating = Trust::default().with(&w.a.domain, &[&twin.root, &w.a.root], &[]).unwrap();
    t.both("the older of two roots", Shown { trust: rotating.clone(), ..good() });
    t.both("the newer of two roots", Shown { trust: rotating, ..w.shown(vec![w.issued_by(&twin.issuer)]) });
    let after = Trust::default().with(&w.a.domain, &[&twin.root], &[]).unwrap();
    t.none("its root was removed", "InvalidSignatureForPublicKey", Shown { trust: after, ..good() });

    let with_lists = |lists: &[Vec<u8>], serial: u64| {
        let trust = Trust::default().with(&w.a.domain, &[w.a.root.to_vec()], lists).unwrap();
        Shown { trust, ..w.shown(vec![w.leaf(|p| p.serial_number = Some(serial.into()))]) }
    };
    t.none("revoked by a list", "CertRevoked", with_lists(&[w.revoked(&w.a, 7, 0)], 7));
    t.both("a list that names another one", with_lists(&[w.revoked(&w.a, 7, 0)], 8));
    t.none("revoked by a stale list", "CertRevoked", with_lists(&[w.revoked(&w.a, 7, 7_200)], 7));
    t.both("a stale list that names another one", with_lists(&[w.revoked(&w.a, 7, 7_200)], 8));
    t.none(
        "revoked by the second list",
        "CertRevoked",
        with_lists(&[w.revoked(&w.b, 7, 0), w.revoked(&w.a, 7, 0)], 7),
    );
    t.none(
        "a list of the same name by somebody else: nobody passes",
        "InvalidCrlSignatureForPublicKey",
        with_lists(&[w.revoked(&twin, 9, 0)], 8),
    );
}

/// What stands between it and its root.
fn chains(w: &World, t: &mut Table) {
    let (one, by_one) = w.issuer(&w.a.issuer, |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let issued = w.issued_by(&by_one);
    t.both("an issuer between", w.shown(vec![issued.clone(), one.clone()]));
    t.both("and the root, which is not needed", w.shown(vec![issued.clone(), one.clone(), w.a.root.clone()]));
    t.none("the issuer is missing", "UnknownIssuer", w.shown(vec![issued.clone()]));
    t.both("out of order", w.shown(vec![issued.clone(), w.a.root.clone(), one.clone()]));
    t.none("the issuer first", "UriNames(0)", w.shown(vec![one.clone(), issued.clone()]));
    let (two, by_two) = w.issuer(&by_one, |_| {});
    t.none(
        "deeper than its issuer may go",
        "PathLenConstraintViolated",
        w.shown(vec![w.issued_by(&by_two), two, one.clone()]),
    );
    let mut parent = leaf(API);
    parent.key_usages.push(KeyUsagePurpose::KeyCertSign);
    let key = KeyPair::generate().unwrap();
    let der = parent.signed_by(&key, &w.a.issuer).unwrap().der().clone();
    t.none(
        "issued by a workload",
        "EndEntityUsedAsCa",
        w.shown(vec![w.issued_by(&Issuer::new(parent, key)), der]),
    );
    let (gone, by_gone) = w.issuer(&w.a.issuer, |p| {
        (p.not_before, p.not_after) = (in_seconds(-9_000).into(), in_seconds(-4_000).into());
    });
    t.none("an issuer that has expired", "Chain(Cert", w.shown(vec![w.issued_by(&by_gone), gone]));
    let (server, by_server) =
        w.issuer(&w.a.issuer, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    t.server_only(
        "an issuer for servers",
        "RequiredEkuNotFound",
        w.shown(vec![w.issued_by(&by_server), server]),
    );
    let constrained = |kind: u8, name: &[u8]| {
        let subtree = der::sequence(&[der::tlv(kind, name)]);
        let content = der::sequence(&[der::tlv(0xa0, &subtree)]);
        let (der, by) =
            w.issuer(&w.a.issuer, |p| p.custom_extensions.push(extension(NAME_CONSTRAINTS, content, true)));
        w.shown(vec![w.issued_by(&by), der])
    };
    // webpki knows no URI constraints: such an issuer is refused, never taken for an unconstrained one.
    t.none("an issuer constrained to URIs of its domain", "", constrained(0x86, b"a.test"));
    t.none("an issuer constrained to URIs of another domain", "", constrained(0x86, b"b.test"));
    t.both("an issuer constrained to some DNS names", constrained(0x82, b"weft.internal"));

    let mut deep = vec![];
    let mut by = w.issuer(&w.a.issuer, |_| {});
    deep.push(by.0.clone());
    while deep.len() < MAX_CHAIN {
        by = w.issuer(&by.1, |_| {});
        deep.push(by.0.clone());
        if deep.len() == 5 {
            let chain = [w.issued_by(&by.1)].into_iter().chain(deep.iter().rev().cloned());
            t.both("five issuers between", w.shown(chain.collect()));
        }
    }
    let chain = |issuers: &[CertificateDer<'static>]| {
        [w.issued_by(&by.1)].into_iter().chain(issuers.iter().rev().cloned()).collect()
    };
    t.none("a chain of eleven", "ChainTooLong", w.shown(chain(&deep)));
    t.none("a chain of ten that ends below its root", "", w.shown(chain(&deep[1..])));
    let longest: Vec<_> = [issued.clone()].into_iter().chain(vec![one.clone(); MAX_CHAIN - 1]).collect();
    t.both("a chain of ten, nine of them the same", w.shown(longest));
    let unrelated: Vec<_> = (0..MAX_CHAIN - 1).map(|_| w.issuer(&w.b.issuer, |_| {}).0).collect();
    let chain = [issued.clone()].into_iter().chain(unrelated).collect();
    t.none("a chain of ten strangers", "UnknownIssuer", w.shown(chain));
    let candidates = vec![one.clone(); 1_000];
    let chain = [issued.clone()].into_iter().chain(candidates).collect();
    t.none("a thousand candidate issuers", "", w.shown(chain));
    let megabyte = CertificateDer::from(der::tlv(0x30, &vec![0; 1 << 20]));
    t.none("a chain of a megabyte", "", w.shown(vec![issued.clone(), megabyte]));
    let large = CertificateDer::from(der::tlv(0x30, &vec![0; MAX_CHAIN_BYTES]));
    t.none("a chain of more bytes than any real one", "", w.shown(vec![issued.clone(), large]));
    t.none("nonsense between", "", w.shown(vec![issued, CertificateDer::from(vec![0x30, 3, 1, 2, 3])]));

    // As many roots as a bundle may have, all of one name: each must be tried.
    let namesakes: Vec<_> = (1..MAX_ROOTS).map(|_| Authority::new("a.test").root).collect();
    let roots: Vec<_> = namesakes.iter().chain([&w.a.root]).collect();
    let trust = Trust::default().with(&w.a.domain, &roots, &[]).unwrap();
    t.both("a hundred roots of one name", Shown { trust, ..w.shown(vec![w.leaf(|_| {})]) });
}

/// With what it is signed, and how it is written.
fn keys_and_bytes(w: &World, t: &mut Table) {
    for (name, algorithm) in
        [("an Ed25519 key", &rcgen::PKCS_ED25519), ("a P-384 key", &rcgen::PKCS_ECDSA_P384_SHA384)]
    {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let chain = vec![leaf(WEB).signed_by(&key, &w.a.issuer).unwrap().der().clone()];
        let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let key = provider::sign::any_supported_type(&private).unwrap();
        t.both(name, Shown { chain, key, trust: w.trust() });
    }
    let rsa = |bytes: usize| {
        let key = Rsa(der::sequence(&[
            der::tlv(2, &[vec![0], vec![0xc5; bytes]].concat()),
            der::tlv(2, &[1, 0, 1]),
        ]));
        w.shown(vec![leaf(WEB).signed_by(&key, &w.a.issuer).unwrap().der().clone()])
    };
    t.none("an RSA key of 1024 bits", "WeakKey", rsa(128));
    t.none("an RSA key of 512 bits", "WeakKey", rsa(64));
    // The certificate is taken, and then nobody has its key.
    t.none("an RSA key of 2048 bits", "UnsupportedSignatureAlgorithmForPublicKey", rsa(256));
    let other = WorkloadKey::generate().unwrap();
    t.none(
        "somebody else's certificate",
        "BadSignature",
        Shown { key: Arc::new(other), ..w.shown(vec![w.leaf(|_| {})]) },
    );

    let sha1 = der::sequence(&[der::tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1])]);
    let md5 = der::sequence(&[der::tlv(6, &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4]), vec![5, 0]]);
    let unsupported = "UnsupportedSignatureAlgorithm";
    t.none("signed with SHA-1", unsupported, w.shown(vec![w.malformed(|f| f[2] = sha1)]));
    t.none("signed with MD5", unsupported, w.shown(vec![w.malformed(|f| f[2] = md5)]));
    let good = w.leaf(|_| {});
    let parts = der::children(der::content(&good));
    let sha384 = der::sequence(&[der::tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3])]);
    let outer = der::sequence(&[parts[0].clone(), sha384, parts[2].clone()]);
    t.none("two signature algorithms", "SignatureAlgorithmMismatch", w.shown(vec![outer.into()]));
    let mut flipped = good.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    t.none("a signature with one bit flipped", "InvalidSignatureForPublicKey", w.shown(vec![flipped.into()]));
    let mut altered = good.to_vec();
    let at = altered.windows(WEB.len()).position(|text| text == WEB.as_bytes()).unwrap();
    altered[at + WEB.len() - 1] = b'a';
    t.none("a name changed after signing", "", w.shown(vec![altered.into()]));
    let empty = der::sequence(&[parts[0].clone(), parts[1].clone(), der::bits(&[])]);
    t.none("an empty signature", "", w.shown(vec![empty.into()]));

    let raw = |name: &str, bytes: Vec<u8>, t: &mut Table| t.none(name, "", w.shown(vec![bytes.into()]));
    raw("not a certificate", vec![0x30, 3, 1, 2, 3], t);
    raw("no bytes", vec![], t);
    raw("text", b"-----BEGIN CERTIFICATE-----".to_vec(), t);
    raw("a byte after the certificate", [&good[..], &[0]].concat(), t);
    raw("a byte too few", good[..good.len() - 1].to_vec(), t);
    let inside = [der::content(&good), &[5, 0]].concat();
    raw("more than its three parts", der::tlv(0x30, &inside), t);
    let mut padded = vec![0x30, 0x83, 0];
    padded.extend_from_slice(&good[2..]);
    raw("a length with a leading zero", padded, t);
    raw("an indefinite length", [&[0x30, 0x80], der::content(&good), &[0, 0]].concat(), t);
    raw("a set instead of a sequence", der::tlv(0x31, der::content(&good)), t);
    let huge = [&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff][..], &good[..]].concat();
    raw("a length of four gigabytes", huge, t);

    let made = |name: &str, change: &dyn Fn(&mut Vec<Vec<u8>>), t: &mut Table| {
        t.none(name, "", w.shown(vec![w.malformed(|fields| change(fields))]));
    };
    made("version 1 with extensions", &|f| drop(f.remove(0)), t);
    made("version 2 with extensions", &|f| f[0] = der::tlv(0xa0, &[2, 1, 1]), t);
    made("version 4", &|f| f[0] = der::tlv(0xa0, &[2, 1, 3]), t);
    made("an empty serial number", &|f| f[1] = der::tlv(2, &[]), t);
    made("a negative serial number", &|f| f[1] = der::tlv(2, &[0x80, 1]), t);
    made("a serial number of 21 bytes", &|f| f[1] = der::tlv(2, &[1; 21]), t);
    made("a validity without an end", &|f| f[4] = der::sequence(&der::children(der::content(&f[4]))[..1]), t);
    made("a time without seconds", &|f| f[4] = der::times(0x17, b"2601010000Z", b"3601010000Z"), t);
    made("a time with a zone", &|f| f[4] = der::times(0x17, b"260101000000+0100", b"360101000000+0100"), t);
    made("the 30th of February", &|f| f[4] = der::times(0x17, b"260230000000Z", b"360230000000Z"), t);
    made("extensions twice", &|f| f.push(f[f.len() - 1].clone()), t);
    made("no extensions", &|f| drop(f.pop()), t);
    made(
        "extensions in a list of none",
        &|f| *f.last_mut().unwrap() = der::tlv(0xa3, &der::sequence(&[])),
        t,
    );
    made(
        "a key of no bits",
        &|f| {
            let algorithm = der::children(der::content(&f[6]))[0].clone();
            f[6] = der::sequence(&[algorithm, der::bits(&[])]);
        },
        t,
    );
    made(
        "a key that is no point of the curve",
        &|f| {
            let algorithm = der::children(der::content(&f[6]))[0].clone();
            f[6] = der::sequence(&[algorithm, der::bits(&[&[4][..], &[1; 64]].concat())]);
        },
        t,
    );
    t.both("what is signed anew as it was", w.shown(vec![w.malformed(|_| {})]));
    t.both(
        "a certificate that ends with X.509's time",
        w.shown(vec![w.malformed(|f| {
            let begin = der::children(der::content(&f[4]))[0].clone();
            f[4] = der::sequence(&[begin, der::tlv(0x18, b"99991231235959Z")]);
        })]),
    );
}

/// A public key of which nobody has the private one.
struct Rsa(Vec<u8>);

impl PublicKeyData for Rsa {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_RSA_SHA256
    }
}

/// As much DER as it takes to write what no library would.
mod der {
    pub(super) fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = content.len().to_be_bytes();
        let length = &length[length.iter().take_while(|byte| **byte == 0).count()..];
        let mut der = vec![tag];
        match content.len() {
            short @ 0..=127 => der.push(short as u8),
            _ => {
                der.push(0x80 | length.len() as u8);
                der.extend_from_slice(length);
            }
        }
        der.extend_from_slice(content);
        der
    }

    pub(super) fn sequence(children: &[Vec<u8>]) -> Vec<u8> {
        tlv(0x30, &children.concat())
    }

    pub(super) fn bits(bytes: &[u8]) -> Vec<u8> {
        tlv(3, &[&[0], bytes].concat())
    }

    pub(super) fn times(tag: u8, begin: &[u8], end: &[u8]) -> Vec<u8> {
        sequence(&[tlv(tag, begin), tlv(tag, end)])
    }

    fn header(der: &[u8]) -> (usize, usize) {
        match der[1] {
            short @ 0..=127 => (2, short.into()),
            long => {
                let bytes = usize::from(long & 0x7f);
                let length =
                    der[2..2 + bytes].iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
                (2 + bytes, length)
            }
        }
    }

    pub(super) fn content(der: &[u8]) -> &[u8] {
        let (header, length) = header(der);
        &der[header..header + length]
    }

    pub(super) fn children(mut content: &[u8]) -> Vec<Vec<u8>> {
        let mut children = Vec::new();
        while !content.is_empty() {
            let (header, length) = header(content);
            let (child, rest) = content.split_at(header + length);
            children.push(child.to_vec());
            content = rest;
        }
        children
    }

    /// A sequence that begins with an object identifier.
    pub(super) fn is_algorithm(field: &[u8]) -> bool {
        field[0] == 0x30 && content(field).first() == Some(&6)
    }
}

/// A client that believes anybody and shows what it is given.
fn hostile_client(shown: &Shown) -> ClientConfig {
    let certified = CertifiedKey::new(shown.chain.clone(), Arc::clone(&shown.key));
    let mut config = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(BelievesAnybody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config
}

/// A server that lets anybody in and shows what it is given.
fn hostile_server(shown: &Shown) -> ServerConfig {
    let certified = CertifiedKey::new(shown.chain.clone(), Arc::clone(&shown.key));
    let mut config = ServerConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config
}

#[derive(Debug)]
struct BelievesAnybody;

impl ServerCertVerifier for BelievesAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        crypto().signature_verification_algorithms.supported_schemes()
    }
}

type Ends = (
    io::Result<tokio_rustls::client::TlsStream<TcpStream>>,
    io::Result<tokio_rustls::server::TlsStream<TcpStream>>,
);

/// Both ends of a handshake over a socket, and a byte from the server, so that a client hears of a refusal.
async fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let name = ServerName::try_from("uid-1.weft.internal").unwrap();
    let connect = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let mut stream = TlsConnector::from(client).connect(name, tcp).await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let accept = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(server).accept(tcp).await?;
        stream.write_u8(1).await?;
        stream.flush().await?;
        Ok(stream)
    };
    tokio::join!(connect, accept)
}

/// What one verdict took, apart from the handshake around it.
fn judged(shown: &Shown) -> Duration {
    let Some((leaf, rest)) = shown.chain.split_first() else { return Duration::ZERO };
    let once = || {
        let began = Instant::now();
        let _ = verify(&shown.trust, leaf, rest, UnixTime::now(), Role::Client);
        began.elapsed()
    };
    // The machine may be busy with something else: the shortest of some.
    (0..5).map(|_| once()).min().unwrap_or_default()
}

#[tokio::test]
async fn every_certificate_is_judged_alike_by_both_sides() {
    let w = World::new();
    let mut table = Table::default();
    validity_and_usage(&w, &mut table);
    names(&w, &mut table);
    issuers(&w, &mut table);
    chains(&w, &mut table);
    keys_and_bytes(&w, &mut table);
    let api = w.a.material("shop", "api", "uid-2");
    let mut surprises = Vec::new();
    let mut slowest = (Duration::ZERO, "");
    for case in &table.0 {
        let own = api.with_trust(2, case.shown.trust.clone());
        let server = server_config(&own, std::slice::from_ref(&w.a.domain)).unwrap();
        let (_, as_client) = handshake(Arc::new(hostile_client(&case.shown)), server).await;
        let client = client_config(&own, &WEB.parse().unwrap(), Alpn::H2).unwrap();
        let (as_server, _) = handshake(client, Arc::new(hostile_server(&case.shown))).await;
        let sides = [
            ("client", case.accepted.0, as_client.map(drop)),
            ("server", case.accepted.1, as_server.map(drop)),
        ];
        for (side, accepted, result) in sides {
            match result {
                Ok(()) if accepted => {}
                Ok(()) => surprises.push(format!("{} as a {side} was let in", case.name)),
                Err(error) if accepted => surprises.push(format!("{} as a {side}: {error:?}", case.name)),
                Err(error) if format!("{error:?}").contains(case.why) => {}
                Err(error) => {
                    surprises.push(format!("{} as a {side}, not {}: {error:?}", case.name, case.why))
                }
            }
        }
        let took = judged(&case.shown);
        if took > slowest.0 {
            slowest = (took, &case.name);
        }
    }
    println!("figure: identity matrix, certificates shown to both sides: {} (bound >= 45)", table.0.len());
    println!("figure: identity matrix, surprises: {} (bound 0)", surprises.len());
    println!(
        "figure: identity matrix, slowest verdict: {:.2} ms, {} (bound 10 ms in a release build)",
        slowest.0.as_secs_f64() * 1e3,
        slowest.1
    );
    assert!(surprises.is_empty(), "{surprises:#?}");
    assert!(table.0.len() >= 45);
    let bound = if cfg!(debug_assertions) { 100 } else { 10 };
    assert!(slowest.0 < Duration::from_millis(bound), "{slowest:?}");
}

#[tokio::test]
async fn no_session_is_resumed_and_no_early_data_is_taken() {
    let w = World::new();
    let good = w.shown(vec![w.leaf(|_| {})]);
    let own = w.a.material("shop", "api", "uid-2").with_trust(2, w.trust());
    let full = Some(rustls::HandshakeKind::Full);
    // A client that keeps every ticket and would send before it is let in.
    let mut eager = hostile_client(&good);
    eager.resumption = Resumption::in_memory_sessions(8);
    eager.enable_early_data = true;
    let (eager, server) = (Arc::new(eager), server_config(&own, std::slice::from_ref(&w.a.domain)).unwrap());
    for _ in 0..2 {
        let (client, server) = handshake(Arc::clone(&eager), Arc::clone(&server)).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(server.get_ref().1.handshake_kind(), full);
        assert_eq!(client.get_ref().1.tls13_tickets_received(), 0);
        assert!(!client.get_ref().1.is_early_data_accepted());
    }
    // A server that gives tickets and takes early data.
    let mut generous = hostile_server(&good);
    generous.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    generous.send_tls13_tickets = 4;
    generous.max_early_data_size = 1_024;
    let (client, generous) =
        (client_config(&own, &WEB.parse().unwrap(), Alpn::H2).unwrap(), Arc::new(generous));
    for _ in 0..2 {
        let (client, server) = handshake(Arc::clone(&client), Arc::clone(&generous)).await;
        assert_eq!(server.unwrap().get_ref().1.handshake_kind(), full);
        let client = client.unwrap();
        assert!(client.get_ref().1.tls13_tickets_received() > 0);
        assert!(!client.get_ref().1.is_early_data_accepted());
    }
}

#[tokio::test]
async fn without_a_certificate_or_with_the_servers_own_nobody_is_let_in() {
    let w = World::new();
    let web = w.a.material("shop", "web", "uid-1");
    let server = server_config(&web, std::slice::from_ref(&w.a.domain)).unwrap();
    let mut nameless =
        ClientConfig::clone(&controller_config(&w.a.trust(), &web.identity, None, None).unwrap());
    nameless.alpn_protocols = vec![ALPN_H2.to_vec()];
    let (client, refused) = handshake(Arc::new(nameless), Arc::clone(&server)).await;
    assert!(refused.is_err() && is_identity_failure(&client.unwrap_err()));
    // Whoever has called the server has its certificate, but not its key.
    let borrowed = w.shown(web.certified.cert.clone());
    let (_, refused) = handshake(Arc::new(hostile_client(&borrowed)), server).await;
    assert!(format!("{:?}", refused.unwrap_err()).contains("BadSignature"));
}

#[tokio::test]
async fn no_older_tls_and_no_other_protocol() {
    let w = World::new();
    let own = w.a.material("shop", "web", "uid-1");
    let server = server_config(&own, std::slice::from_ref(&w.a.domain)).unwrap();
    for names in [&[&b"h2"[..]][..], &[b"http/1.1"], &[b"weft-h2/2", b"weft-h2"]] {
        let mut client = hostile_client(&w.shown(vec![w.leaf(|_| {})]));
        client.alpn_protocols = names.iter().map(|name| name.to_vec()).collect();
        let (client, refused) = handshake(Arc::new(client), Arc::clone(&server)).await;
        assert!(client.is_err() && refused.is_err(), "{names:?}");
    }
    // What a client of TLS 1.2 says, and its server.
    let random = [7; 32];
    let names = wire::extension(0x10, &[&[0, 10, 9][..], ALPN_H2].concat());
    let groups = wire::extension(0x0a, &[0, 2, 0, 0x1d]);
    let schemes = wire::extension(0x0d, &[0, 2, 4, 3]);
    let extensions = [names, groups, schemes].concat();
    let hello = wire::hello(1, &[&[3, 3][..], &random, &[0, 0, 2, 0xc0, 0x2b, 1, 0]].concat(), &extensions);
    let (mut near, far) = pair().await;
    let accepting = TlsAcceptor::from(server).accept(far);
    near.write_all(&hello).await.unwrap();
    let refused = accepting.await.map(drop).unwrap_err();
    assert!(format!("{refused:?}").contains("PeerIncompatible"), "{refused:?}");
    let mut alert = [0; 7];
    near.read_exact(&mut alert).await.unwrap();
    assert_eq!((alert[0], alert[6]), (21, 70), "an alert: protocol_version");

    let client = client_config(&own, &WEB.parse().unwrap(), Alpn::H2).unwrap();
    let hello = wire::hello(2, &[&[3, 3][..], &random, &[0, 0xc0, 0x2b, 0]].concat(), &[]);
    let (near, mut far) = pair().await;
    let name = ServerName::try_from("uid-1.weft.internal").unwrap();
    let answering = async {
        far.write_all(&hello).await.unwrap();
        far
    };
    let (refused, _far) = tokio::join!(TlsConnector::from(client).connect(name, near), answering);
    assert!(format!("{:?}", refused.map(drop).unwrap_err()).contains("PeerIncompatible"));
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connecting = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(connecting, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// As much TLS as it takes to say what no library would.
mod wire {
    pub(super) fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(content.len() as u16).to_be_bytes(), content].concat()
    }

    /// A record that holds one message of a handshake.
    pub(super) fn hello(kind: u8, fixed: &[u8], extensions: &[u8]) -> Vec<u8> {
        let extensions = [&(extensions.len() as u16).to_be_bytes()[..], extensions].concat();
        let body = [fixed, &extensions].concat();
        let length = (body.len() as u32).to_be_bytes();
        let message = [&[kind][..], &length[1..], &body].concat();
        [&[22, 3, 1][..], &(message.len() as u16).to_be_bytes(), &message].concat()
    }
}
