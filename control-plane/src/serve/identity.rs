//! `Certify`: a token and a public key in, a certificate out. The only way to the authority.
//!
//! Why the pod must exist: a token is good until its own end, whatever became of its pod. What a deleted pod leaves
//! behind (a volume, a log, a backup) must not be a way into the mesh.
//!
//! Why rate limits here: a certificate costs a signature and this port needs no certificate to reach. One
//! workload that asks in a loop must not keep the others from renewing: each pod has its bound, all pods of one
//! identity together have half of everything.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;
use tonic::{Request, Response, Status};
use weft_core::identity::{PodUid, SpiffeId};
use weft_proto::pb::v1::{CertifyRequest, CertifyResponse, identity_server::Identity};

use super::{
    Bucket,
    published::{NO_POD, Published},
};
use crate::{
    api::types::WorkloadCertificate,
    ca::{Ca, TokenCheck, TokenError, workload_subject},
    metrics::Metrics,
};

/// The service.
#[derive(Clone, Debug)]
pub struct Certify {
    ca: Arc<Ca>,
    /// Who is asked about tokens; without it the authority's own join key says.
    tokens: Option<Arc<dyn TokenCheck>>,
    published: Arc<Published>,
    metrics: Arc<Metrics>,
    limits: Arc<Mutex<Limits>>,
    issued: Arc<Mutex<HashMap<PodUid, WorkloadCertificate>>>,
}

#[derive(Debug)]
struct Limits {
    all: Bucket,
    by_identity: HashMap<SpiffeId, Bucket>,
    by_pod: HashMap<PodUid, Bucket>,
}

impl Limits {
    fn new() -> Self {
        Self { all: Bucket::new(RATE, RATE), by_identity: HashMap::new(), by_pod: HashMap::new() }
    }

    /// `Some`: not before so long. Whoever is refused by a narrower bound takes nothing from a wider one.
    fn take(&mut self, identity: &SpiffeId, uid: &PodUid, now: Instant) -> Option<Duration> {
        if self.by_pod.len() >= MAX_PODS {
            self.by_pod.retain(|_, bucket| !bucket.is_full(now));
        }
        if self.by_identity.len() >= MAX_PODS {
            self.by_identity.retain(|_, bucket| !bucket.is_full(now));
        }
        let pod = || Bucket::new(POD_RATE, POD_BURST);
        let identity_bucket = || Bucket::new(IDENTITY_RATE, IDENTITY_RATE);
        self.by_pod
            .entry(uid.clone())
            .or_insert_with(pod)
            .take(now)
            .or_else(|| self.by_identity.entry(identity.clone()).or_insert_with(identity_bucket).take(now))
            .or_else(|| self.all.take(now))
    }
}

impl Certify {
    /// Signs by `ca`.
    pub fn new(ca: Arc<Ca>, published: Arc<Published>, metrics: Arc<Metrics>) -> Self {
        let limits = Arc::new(Mutex::new(Limits::new()));
        Self { ca, tokens: None, published, metrics, limits, issued: Arc::default() }
    }

    /// The same, but tokens are somebody else's to judge.
    #[must_use]
    pub fn with_tokens(self, tokens: Arc<dyn TokenCheck>) -> Self {
        Self { tokens: Some(tokens), ..self }
    }

    /// The newest certificate of every workload.
    pub fn issued(&self) -> Vec<WorkloadCertificate> {
        let issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = issued.values().cloned().collect();
        all.sort_by(|a, b| a.uid.cmp(&b.uid));
        all
    }

    async fn certify_now(&self, request: &CertifyRequest) -> Result<CertifyResponse, Status> {
        let now = SystemTime::now();
        // Whoever has no good token hears no more than that.
        let refused = || Status::unauthenticated("the token is refused");
        let checked = match &self.tokens {
            Some(tokens) => tokens.check(&request.token).await,
            None => self.ca.check_token(&request.token, now),
        };
        let claims = checked.map_err(|error| {
            tracing::warn!(%error, "token refused");
            match error {
                TokenError::Unavailable => Status::unavailable("tokens cannot be checked now: ask again"),
                TokenError::Syntax
                | TokenError::Signature
                | TokenError::Expired
                | TokenError::Claims
                | TokenError::Unknown => refused(),
            }
        })?;
        let subject = workload_subject(self.ca.trust_domain(), &claims).map_err(|_| refused())?;
        let uid = PodUid::new(&claims.uid).map_err(|_| refused())?;
        // A token says who, and outlives its pod: the pod must be there, and both must agree. A sidecar that starts
        // before its pod was seen, or while nothing has been seen yet, asks again.
        if !*self.published.synced().borrow() {
            return Err(Status::unavailable("not synced yet: ask again"));
        }
        match self.published.workload(&uid) {
            Some(known) if known == subject.identity => {}
            Some(known) => {
                tracing::warn!(%uid, token = %subject.identity, pod = %known, "token and pod disagree");
                return Err(Status::permission_denied(
                    "the token is for another service account than the pod's",
                ));
            }
            None => {
                tracing::warn!(%uid, token = %subject.identity, "a token for a pod that is not there");
                return Err(Status::permission_denied(NO_POD));
            }
        }
        self.admit(&subject.identity, &uid)?;
        let issued = self.ca.issue(&request.csr_der, &subject).map_err(|error| {
            tracing::warn!(%uid, %error, "not certified");
            Status::invalid_argument(error.to_string())
        })?;
        let certificate = WorkloadCertificate {
            pod: format!("{}/{}", claims.ns, if claims.pod.is_empty() { &claims.uid } else { &claims.pod }),
            uid: claims.uid,
            identity: subject.identity.to_string(),
            serial: issued.serial.clone(),
            not_before: seconds(issued.validity.not_before),
            not_after: seconds(issued.validity.not_after),
        };
        tracing::info!(pod = %certificate.pod, %uid, identity = %certificate.identity, "certified");
        let response = CertifyResponse {
            chain_der: issued.chain.iter().map(|c| c.to_vec().into()).collect(),
            roots_der: self.ca.bundle().borrow().roots.iter().map(|r| r.to_vec().into()).collect(),
            not_after: certificate.not_after,
            now: seconds(now),
        };
        self.remember(uid, certificate, now);
        Ok(response)
    }

    fn admit(&self, identity: &SpiffeId, uid: &PodUid) -> Result<(), Status> {
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        match limits.take(identity, uid, Instant::now()) {
            None => Ok(()),
            Some(wait) => {
                Err(Status::resource_exhausted(format!("too many requests: try again in {wait:?}")))
            }
        }
    }

    fn remember(&self, uid: PodUid, certificate: WorkloadCertificate, now: SystemTime) {
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        if issued.len() >= MAX_PODS {
            let now = seconds(now);
            issued.retain(|_, certificate| certificate.not_after > now);
        }
        if issued.len() < MAX_PODS {
            issued.insert(uid, certificate);
        }
    }
}

#[tonic::async_trait]
impl Identity for Certify {
    async fn certify(&self, request: Request<CertifyRequest>) -> Result<Response<CertifyResponse>, Status> {
        let result = self.certify_now(&request.into_inner()).await;
        let counter = match result {
            Ok(_) => &self.metrics.certificates_issued,
            Err(_) => &self.metrics.certificates_refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        result.map(Response::new)
    }
}

fn seconds(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Certificates a second, all together: ten thousand sidecars come back within 20 s.
const RATE: f64 = 500.0;
/// Certificates a second for one identity: half of all, so that whoever can make tokens of one service account
/// leaves the others their renewals.
const IDENTITY_RATE: f64 = 250.0;
/// Certificates a second for one pod, and at once: restarts, rotations, not a loop.
const POD_RATE: f64 = 0.5;
const POD_BURST: f64 = 20.0;
/// Pods that are remembered.
const MAX_PODS: usize = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_pod_nor_an_identity_takes_the_others_certificates() {
        let mut limits = Limits::new();
        let now = Instant::now();
        let identity = |account: &str| -> SpiffeId {
            format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap()
        };
        let pod = |n: u32| PodUid::new(&format!("pod-{n}")).unwrap();
        let (greedy, other) = (identity("greedy"), identity("other"));
        let mut granted = |identity: &SpiffeId, pods: std::ops::Range<u32>, each: u32| {
            let asked = pods.flat_map(|n| (0..each).map(move |_| pod(n)));
            asked.filter(|uid| limits.take(identity, uid, now).is_none()).count()
        };
        assert_eq!(granted(&greedy, 0..1, 100), POD_BURST as usize, "one pod in a loop");
        let burst = IDENTITY_RATE as usize - POD_BURST as usize;
        assert_eq!(granted(&greedy, 1..1_000, 1), burst, "many pods of one identity");
        assert_eq!(granted(&other, 1_000..2_000, 1), IDENTITY_RATE as usize, "the other half is there");
    }
}
