//! This workload's certificate: a key made here, a request to the controller, renewal long before the end.
//!
//! Why renewal runs on the monotonic clock: the commonest total outage of a mesh is a missed rotation, and
//! the second commonest a clock that jumped and made every sidecar rotate at once. The lifetime is taken
//! from the issuer's own clock when the certificate arrives; from then on only elapsed time counts. A wall
//! clock that says "expired" (a machine that slept) asks for one renewal, at most every ten minutes.
//!
//! Why the anchors and the token are files read at each use: both rotate underneath a running sidecar. Why the roots of
//! the control stream count beside the anchors: they are the newer ones while there is a stream.
//!
//! A certificate is kept until its last second, whatever the controller does meanwhile. Then there is no
//! identity: not ready, no mTLS in or out, never plaintext instead.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rand::Rng as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};
use weft_core::{backoff::full_jitter, identity::Validity};
use weft_proto::pb::v1::{CertifyRequest, CertifyResponse, identity_client::IdentityClient};
use zeroize::Zeroizing;

use crate::{
    clock::Clock,
    config::Config,
    dial::{DialError, dial, one_shot},
    telemetry::metrics::{Counter, Gauge, Shared},
    tls::{Material, TlsError, Trust, WorkloadKey, controller_config},
};

/// What the control stream says about trust.
#[derive(Clone, Debug, Default)]
pub struct Bundles {
    /// Roots by trust domain; the own domain's once its bundle has arrived.
    pub trust: Trust,
    /// The own domain's sequence, once there is one: when it grows, roots have changed and the certificate
    /// is renewed at once.
    pub sequence: Option<u64>,
}

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// The token file cannot be used.
    #[error("token file {0}: {1}")]
    Token(String, String),
    /// No connection to the controller.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The anchors, the key or the issued chain cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate request could not be made.
    #[error("certificate request: {0}")]
    Request(#[from] rcgen::Error),
    /// The controller refused.
    #[error("the controller refused: {0:?}: {1}")]
    Refused(tonic::Code, String),
    /// The controller does not answer.
    #[error("the controller did not answer in {0:?}")]
    Timeout(Duration),
    /// The answer cannot be used.
    #[error("the controller's answer: {0}")]
    Answer(String),
}

/// Keeps this workload's certificate fresh for as long as anyone listens. `None` while there is none.
pub fn spawn(
    config: Arc<Config>,
    bundles: watch::Receiver<Bundles>,
    shared: Arc<Shared>,
) -> watch::Receiver<Option<Arc<Material>>> {
    let (publish, material) = watch::channel(None);
    tokio::spawn(Keeper { config, bundles, shared, publish, generation: 0, issued: None }.run());
    material
}

struct Keeper {
    config: Arc<Config>,
    bundles: watch::Receiver<Bundles>,
    shared: Arc<Shared>,
    publish: watch::Sender<Option<Arc<Material>>>,
    generation: u64,
    issued: Option<Issued>,
}

/// A certificate as it came, and what elapsed time makes of it.
struct Issued {
    material: Material,
    /// Roots that the issuer named; replaced by the own domain's bundle once there is one.
    roots: Trust,
    renew: Instant,
    end: Instant,
}

impl Keeper {
    async fn run(mut self) {
        let mut failures = 0;
        let mut due = Instant::now();
        let mut wall_checked = Instant::now();
        let mut stranger_asked: Option<Instant> = None;
        let check_every = WALL_CHECK.min(self.config.times.reconnect_cap);
        let mut sequence = self.bundles.borrow_and_update().sequence;
        loop {
            let end = self.issued.as_ref().map(|issued| issued.end);
            let bundles = self.bundles.clone();
            tokio::select! {
                () = self.publish.closed() => return,
                () = sleep_until(due) => match self.renew().await {
                    Ok(renew) => {
                        self.shared.count(Counter::Renewals);
                        failures = 0;
                        due = renew;
                    }
                    Err(error) => {
                        self.shared.count(Counter::RenewalFailures);
                        let times = &self.config.times;
                        let wait =
                            full_jitter(times.reconnect_base, times.reconnect_cap, failures, &mut rand::rng());
                        failures = failures.saturating_add(1);
                        let left = self.issued.as_ref().map(|i| i.end.duration_since(Instant::now()));
                        warn!(%error, retry_ms = wait.as_millis() as u64, valid_for_s = left.map(|d| d.as_secs()),
                            "no new certificate");
                        due = Instant::now() + wait;
                    }
                },
                () = at(end) => self.expire(),
                changed = changed(bundles, &mut self.bundles) => {
                    if changed.is_err() {
                        return;
                    }
                    let (now, trust) = {
                        let bundles = self.bundles.borrow();
                        (bundles.sequence, bundles.trust.clone())
                    };
                    self.republish();
                    // The first bundle is no news, unless it does not know who issued our certificate.
                    let grown = sequence.is_some() && now > sequence;
                    let stranger = self.issued.as_ref().is_some_and(|issued| {
                        now.is_some() && !issued.material.is_trusted_by(&trust)
                    });
                    if self.issued.is_some() && (grown || (stranger && now != sequence)) {
                        let spread = self.config.times.renew_spread.mul_f64(rand::rng().random::<f64>());
                        info!(sequence = now, in_ms = spread.as_millis() as u64, "roots changed: renewing");
                        due = due.min(Instant::now() + spread);
                    }
                    sequence = now;
                }
                () = tokio::time::sleep(check_every) => {
                    if self.is_stranger() && stranger_asked.is_none_or(|at| at.elapsed() >= STRANGER_RENEWALS) {
                        let spread = self.config.times.renew_spread.mul_f64(rand::rng().random::<f64>());
                        warn!(in_ms = spread.as_millis() as u64,
                            "the trust anchors no longer know who issued our certificate: renewing");
                        stranger_asked = Some(Instant::now());
                        due = due.min(Instant::now() + spread);
                    }
                    let expired = self.issued.as_ref().is_some_and(|issued| {
                        SystemTime::now() > issued.material.validity.not_after
                    });
                    if expired && wall_checked.elapsed() >= WALL_RENEWALS {
                        wall_checked = Instant::now();
                        due = due.min(Instant::now());
                    }
                }
            }
        }
    }

    /// Asks for a certificate and publishes it; gives the time of the next renewal.
    async fn renew(&mut self) -> Result<Instant, CertifyError> {
        let key = WorkloadKey::generate()?;
        let streamed = self.bundles.borrow().trust.clone();
        let clock = self.issued.as_ref().map(|issued| issued.material.clock());
        let answer = certify(&self.config, &key, &streamed, clock).await?;
        let issued = self.take(&key, answer)?;
        let renew = issued.renew;
        info!(identity = %issued.material.identity, generation = issued.material.generation,
            valid_for_s = issued.end.duration_since(Instant::now()).as_secs(),
            renew_in_s = renew.duration_since(Instant::now()).as_secs(), "certificate issued");
        self.issued = Some(issued);
        self.republish();
        Ok(renew)
    }

    fn take(&mut self, key: &WorkloadKey, answer: CertifyResponse) -> Result<Issued, CertifyError> {
        let chain: Vec<_> = answer.chain_der.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let roots = Trust::default().with(&self.config.trust_domain, &answer.roots_der, &[])?;
        // The stream's bundle may be older or newer than this answer: for the check of our own chain
        // either will do, and what is published for peers stays the bundle.
        let either = roots.merged(&self.bundles.borrow().trust);
        let issuer = u64::try_from(answer.now)
            .map_err(|_| CertifyError::Answer(format!("its clock says {}", answer.now)))?;
        let material = Material::new(
            self.generation,
            key,
            chain,
            either,
            UnixTime::since_unix_epoch(Duration::from_secs(issuer)),
        )?;
        if material.identity != self.config.identity {
            let (asked, given) = (&self.config.identity, &material.identity);
            return Err(CertifyError::Answer(format!("asked for {asked}, got {given}")));
        }
        let (renew, end) =
            schedule(material.validity, issuer, rand::rng().random::<f64>()).ok_or_else(|| {
                CertifyError::Answer("the certificate is not valid by its own issuer's clock".into())
            })?;
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if ours.abs_diff(issuer) > SKEW_WARNING {
            warn!(seconds = ours.abs_diff(issuer), "this node's clock differs from the controller's");
        }
        let now = Instant::now();
        Ok(Issued { material, roots, renew: now + renew, end: now + end })
    }

    /// Publishes the certificate with today's trust.
    fn republish(&mut self) {
        let Some(issued) = &self.issued else { return };
        let trust = issued.roots.overridden_by(&self.bundles.borrow().trust);
        self.generation += 1;
        let roots: usize = trust.domains().map(|domain| trust.roots(domain)).sum();
        self.shared.set(Gauge::TrustRoots, i64::try_from(roots).unwrap_or(i64::MAX));
        let end = issued.material.validity.not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.shared.set(Gauge::CertificateNotAfter, i64::try_from(end.as_secs()).unwrap_or(i64::MAX));
        self.publish.send_replace(Some(Arc::new(issued.material.with_trust(self.generation, trust))));
    }

    /// Whether the anchor file no longer knows who issued our certificate. Roots that were replaced while
    /// this sidecar was cut off are told by no stream: the controller refuses the certificate that a
    /// stream needs, until the next renewal, half a day later.
    fn is_stranger(&self) -> bool {
        let Some(issued) = &self.issued else { return false };
        Trust::from_file(&self.config.trust_domain, &self.config.trust_anchors)
            .is_ok_and(|anchors| !issued.material.is_trusted_by(&anchors))
    }

    fn expire(&mut self) {
        warn!("the certificate has expired: no mTLS until there is a new one");
        self.issued = None;
        self.shared.set(Gauge::CertificateNotAfter, 0);
        self.publish.send_replace(None);
    }
}

/// One exchange with the issuer, over server-authenticated TLS on its own connection. It is believed by what is mounted
/// and by what the stream said: a kubelet renews a file a minute after a new root signs.
async fn certify(
    config: &Config,
    key: &WorkloadKey,
    streamed: &Trust,
    clock: Option<Clock>,
) -> Result<CertifyResponse, CertifyError> {
    let token = read_token(&config.token_file).await?;
    let anchors = match Trust::from_file(&config.trust_domain, &config.trust_anchors) {
        Ok(anchors) => anchors.merged(streamed),
        Err(error) if streamed.roots(config.trust_domain.as_str()) == 0 => return Err(error.into()),
        Err(error) => {
            debug!(%error, "anchor file not used");
            streamed.clone()
        }
    };
    let tls = controller_config(&anchors, &config.controller_identity, None, clock)?;
    // The issuer takes the key and nothing else: the request names nobody.
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let csr = params.serialize_request(key)?;
    let limit = config.times.controller;
    let exchange = async {
        let stream = dial(&config.controller_certify, tls, limit).await?;
        let channel = one_shot(stream, &config.times).await?;
        let mut client = IdentityClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let request = CertifyRequest { csr_der: csr.der().to_vec().into(), token: token.to_string() };
        match client.certify(request).await {
            Ok(answer) => Ok(answer.into_inner()),
            // Never the whole status: it may quote what was sent.
            Err(status) => Err(CertifyError::Refused(status.code(), cut(status.message()))),
        }
    };
    timeout(limit, exchange).await.map_err(|_| CertifyError::Timeout(limit))?
}

async fn read_token(path: &Path) -> Result<Zeroizing<String>, CertifyError> {
    let fail = |e: String| CertifyError::Token(path.display().to_string(), e);
    let size = tokio::fs::metadata(path).await.map_err(|e| fail(e.to_string()))?.len();
    if size > MAX_TOKEN {
        return Err(fail(format!("{size} bytes is above the limit of {MAX_TOKEN}")));
    }
    let text = tokio::fs::read_to_string(path).await.map_err(|e| fail(e.to_string()))?;
    let text = Zeroizing::new(text);
    let token = text.trim();
    if token.is_empty() {
        return Err(fail("is empty".into()));
    }
    Ok(Zeroizing::new(token.to_owned()))
}

/// After how long to renew, and after how long it ends, by the issuer's clock. `None`: not valid at all.
fn schedule(validity: Validity, issuer_now: u64, jitter: f64) -> Option<(Duration, Duration)> {
    let now = UNIX_EPOCH + Duration::from_secs(issuer_now);
    let end = validity.not_after.duration_since(now).ok().filter(|left| !left.is_zero())?;
    // `not_before` lies in the past (skew); the life that counts begins now.
    let renew = Validity { not_before: now, not_after: validity.not_after }.renew_at(jitter);
    Some((renew.duration_since(now).ok()?, end))
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// Waits on a copy and marks the original seen, so that the wait borrows nothing of the keeper.
async fn changed(
    mut copy: watch::Receiver<Bundles>,
    original: &mut watch::Receiver<Bundles>,
) -> Result<(), watch::error::RecvError> {
    copy.changed().await?;
    original.mark_unchanged();
    Ok(())
}

/// A token longer than this is not one.
const MAX_TOKEN: u64 = 64 * 1024;
/// An answer is a chain and some roots.
const MAX_ANSWER: usize = 1024 * 1024;
/// How often the wall clock is compared with the certificate.
const WALL_CHECK: Duration = Duration::from_secs(30);
/// And how often it may ask for a renewal.
const WALL_RENEWALS: Duration = Duration::from_secs(600);
/// How often an anchor file that does not know our issuer may.
const STRANGER_RENEWALS: Duration = Duration::from_secs(60);
/// Beyond this a clock is worth a line.
const SKEW_WARNING: u64 = 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_falls_between_half_and_seven_tenths_of_what_is_left() {
        let start = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let validity = Validity {
            not_before: start - Duration::from_secs(300),
            not_after: start + Duration::from_secs(86_400),
        };
        for (jitter, seconds) in [(0.0, 43_200), (0.5, 51_840), (1.0, 60_480)] {
            let (renew, end) = schedule(validity, 1_000_000, jitter).unwrap();
            assert_eq!((renew.as_secs(), end.as_secs()), (seconds, 86_400));
        }
    }

    #[test]
    fn what_the_issuer_itself_calls_expired_is_refused() {
        let end = UNIX_EPOCH + Duration::from_secs(1_000);
        let validity = Validity { not_before: UNIX_EPOCH, not_after: end };
        assert_eq!(schedule(validity, 1_000, 0.0), None);
        assert_eq!(schedule(validity, 2_000, 0.0), None);
    }

    #[tokio::test]
    async fn tokens_are_bounded_and_trimmed() {
        let dir = std::env::temp_dir().join(format!("weft-token-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("token");
        std::fs::write(&path, " abc.def \n").unwrap();
        assert_eq!(read_token(&path).await.unwrap().as_str(), "abc.def");
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(read_token(&path).await, Err(CertifyError::Token(..))));
        std::fs::write(&path, vec![b'x'; 70_000]).unwrap();
        assert!(matches!(read_token(&path).await, Err(CertifyError::Token(..))));
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(matches!(read_token(&path).await, Err(CertifyError::Token(..))));
    }
}
