//! `Certify`: a token and a public key in, a certificate out. The only way to the authority.
//!
//! Why the pod must exist: a token is good until its own end, whatever became of its pod. What a deleted pod leaves
//! behind (a volume, a log, a backup) must not be a way into the mesh.
//!
//! Why rate limits here: a certificate costs a signature and this port needs no certificate to reach. One
//! workload that asks in a loop must not keep the others from renewing: each pod has its bound, all pods of one
//! identity together have half of everything.
//!
//! Why most tokens are never judged: the API server's work is for whoever could be right. A token that names no pod that
//! is there, or another account than the pod's, is refused for what it says itself, and one address has few tries.
//!
//! Why refusals are not all told: whoever reaches this port can ask in a loop, with tokens that it makes up. Of one
//! address some are told, and all are counted: the log is for those who look for one sidecar's trouble.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;
use tonic::{Request, Response, Status};
use weft_core::identity::{PodUid, SpiffeId};
use weft_proto::pb::v1::{CertifyRequest, CertifyResponse, identity_server::Identity};

use super::{
    Bucket, CameFrom,
    published::{NO_POD, Published},
};
use crate::{
    ca::{Ca, Claims, Subject, TokenCheck, TokenError, WorkloadCertificate, workload_subject},
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
    by_identity: Buckets<SpiffeId>,
    by_pod: Buckets<PodUid>,
    /// Questions about tokens.
    by_address: Buckets<IpAddr>,
    /// Lines about refusals.
    lines: Buckets<IpAddr>,
}

/// A bucket each, made when it is first taken from. When there are many, those that are full again are forgotten.
#[derive(Debug)]
struct Buckets<K> {
    rate: f64,
    burst: f64,
    by: HashMap<K, Bucket>,
}

impl<K: Eq + Hash> Buckets<K> {
    fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, by: HashMap::new() }
    }

    /// As [`Bucket::take`].
    fn take(&mut self, of: K, now: Instant) -> Option<Duration> {
        if self.by.len() >= MAX_PODS {
            self.by.retain(|_, bucket| !bucket.is_full(now));
        }
        self.by.entry(of).or_insert_with(|| Bucket::new(self.rate, self.burst)).take(now)
    }
}

impl Limits {
    fn new() -> Self {
        Self {
            all: Bucket::new(RATE, RATE),
            by_identity: Buckets::new(IDENTITY_RATE, IDENTITY_RATE),
            by_pod: Buckets::new(POD_RATE, POD_BURST),
            by_address: Buckets::new(ADDRESS_RATE, ADDRESS_BURST),
            lines: Buckets::new(LINES_RATE, LINES_BURST),
        }
    }

    /// Whether one more refusal of that address is told.
    fn tells(&mut self, from: Option<IpAddr>, now: Instant) -> bool {
        from.is_none_or(|from| self.lines.take(from.to_canonical(), now).is_none())
    }

    /// `Some`: no token of that address is judged before so long.
    fn ask(&mut self, from: IpAddr, now: Instant) -> Option<Duration> {
        self.by_address.take(from.to_canonical(), now)
    }

    /// `Some`: not before so long. Whoever is refused by a narrower bound takes nothing from a wider one.
    fn take(&mut self, identity: &SpiffeId, uid: &PodUid, now: Instant) -> Option<Duration> {
        self.by_pod
            .take(uid.clone(), now)
            .or_else(|| self.by_identity.take(identity.clone(), now))
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

    async fn certify_now(
        &self,
        request: &CertifyRequest,
        from: Option<IpAddr>,
    ) -> Result<CertifyResponse, Status> {
        let now = SystemTime::now();
        let checked = match &self.tokens {
            Some(tokens) => {
                let claims = tokens.claimed(&request.token).map_err(|error| self.judged(from, error))?;
                self.subject(from, &claims)?;
                if let Some(wait) = from.and_then(|from| self.limits().ask(from, Instant::now())) {
                    return Err(too_often(wait));
                }
                tokens.check(&request.token).await
            }
            None => self.ca.check_token(&request.token, now),
        };
        let claims = checked.map_err(|error| self.judged(from, error))?;
        let (subject, uid) = self.subject(from, &claims)?;
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
            anchor: issued.root.clone(),
            connected: false,
            bundle: 0,
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

    /// Whom claims are about, if that pod is there.
    fn subject(&self, from: Option<IpAddr>, claims: &Claims) -> Result<(Subject, PodUid), Status> {
        let subject = workload_subject(self.ca.trust_domain(), claims).map_err(|_| refused())?;
        let uid = PodUid::new(&claims.uid).map_err(|_| refused())?;
        // A token says who, and outlives its pod: the pod must be there, and both must agree. A sidecar that starts
        // before its pod was seen, or while nothing has been seen yet, asks again.
        if !*self.published.synced().borrow() {
            return Err(Status::unavailable("not synced yet: ask again"));
        }
        match self.published.workload(&uid) {
            Some(known) if known == subject.identity => {}
            Some(known) => {
                if self.tells(from) {
                    tracing::warn!(%uid, token = %subject.identity, pod = %known, "token and pod disagree");
                }
                return Err(Status::permission_denied(
                    "the token is for another service account than the pod's",
                ));
            }
            None => {
                if self.tells(from) {
                    tracing::warn!(%uid, token = %subject.identity, "a token for a pod that is not there");
                }
                return Err(Status::permission_denied(NO_POD));
            }
        }
        Ok((subject, uid))
    }

    fn admit(&self, identity: &SpiffeId, uid: &PodUid) -> Result<(), Status> {
        self.limits().take(identity, uid, Instant::now()).map_or(Ok(()), |wait| Err(too_often(wait)))
    }

    fn judged(&self, from: Option<IpAddr>, error: TokenError) -> Status {
        if self.tells(from) {
            tracing::warn!(%error, "token refused");
        }
        match error {
            TokenError::Unavailable => Status::unavailable("tokens cannot be checked now: ask again"),
            TokenError::Syntax
            | TokenError::Signature
            | TokenError::Expired
            | TokenError::Claims
            | TokenError::Unknown => refused(),
        }
    }

    fn tells(&self, from: Option<IpAddr>) -> bool {
        self.limits().tells(from, Instant::now())
    }

    fn limits(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
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
        let from = request.extensions().get::<CameFrom>().map(|CameFrom(address)| *address);
        let result = self.certify_now(&request.into_inner(), from).await;
        let counter = match result {
            Ok(_) => &self.metrics.certificates_issued,
            Err(_) => &self.metrics.certificates_refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        result.map(Response::new)
    }
}

/// Whoever has no good token hears no more than that.
fn refused() -> Status {
    Status::unauthenticated("the token is refused")
}

fn too_often(wait: Duration) -> Status {
    Status::resource_exhausted(format!("too many requests: try again in {wait:?}"))
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
/// Tokens a second of one address that are judged, and at once: a node's pods may share one.
const ADDRESS_RATE: f64 = 10.0;
const ADDRESS_BURST: f64 = 128.0;
/// Lines a second about refusals of one address, and at once.
const LINES_RATE: f64 = 0.1;
const LINES_BURST: f64 = 10.0;
/// Pods that are remembered.
const MAX_PODS: usize = 100_000;

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

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

    /// Believes everything, and counts how often it was asked.
    #[derive(Debug, Default)]
    struct Judge(AtomicUsize);

    #[tonic::async_trait]
    impl TokenCheck for Judge {
        fn claimed(&self, token: &str) -> Result<Claims, TokenError> {
            let (sa, uid) = token.split_once('/').ok_or(TokenError::Syntax)?;
            let (ns, pod) = ("shop".to_owned(), String::new());
            Ok(Claims { ns, sa: sa.to_owned(), uid: uid.to_owned(), pod, exp: u64::MAX })
        }

        async fn check(&self, token: &str) -> Result<Claims, TokenError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            self.claimed(token)
        }
    }

    #[tokio::test]
    async fn nobody_is_asked_about_a_token_that_cannot_be_right_nor_endlessly_by_one_address() {
        let domain = weft_core::identity::TrustDomain::new("cluster.local").unwrap();
        let roots = crate::ca::Roots::open_in(crate::ca::Place::Memory(Default::default()), &domain).unwrap();
        let ca = Arc::new(Ca::with_roots(roots, domain.clone(), Duration::from_secs(3_600)));
        let published = Arc::new(Published::new(domain));
        let uid = PodUid::new("pod-1").unwrap();
        let cart: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        published.workloads.update([(uid, Some(cart))]);
        let judge = Arc::new(Judge::default());
        let certify = Certify::new(ca, published.clone(), Arc::default()).with_tokens(judge.clone());
        let ask = async |token: &str, from: [u8; 4]| {
            let request = CertifyRequest { token: token.to_owned(), ..CertifyRequest::default() };
            let code = certify.certify_now(&request, Some(from.into())).await.unwrap_err().code();
            (code, judge.0.load(Ordering::Relaxed))
        };
        let (one, two) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        assert_eq!(ask("cart/pod-1", one).await, (tonic::Code::Unavailable, 0), "nothing is known yet");
        published.set_synced();
        assert_eq!(ask("cart/pod-2", one).await, (tonic::Code::PermissionDenied, 0), "no such pod");
        assert_eq!(ask("other/pod-1", one).await, (tonic::Code::PermissionDenied, 0), "not its account");
        assert_eq!(ask("cart", one).await, (tonic::Code::Unauthenticated, 0));
        assert_eq!(ask("cart/pod-1", one).await, (tonic::Code::InvalidArgument, 1), "no key is in it");
        for _ in 0..1_000 {
            ask("cart/pod-1", one).await;
        }
        let (code, asked) = ask("cart/pod-1", one).await;
        assert_eq!(code, tonic::Code::ResourceExhausted);
        assert!(asked < 900, "{asked}");
        assert_eq!(ask("cart/pod-1", two).await.1, asked + 1, "others are heard");
    }

    #[test]
    fn refusals_of_a_stranger_who_asks_in_a_loop_do_not_fill_the_log() {
        let mut limits = Limits::new();
        let now = Instant::now();
        let mut told = |from: [u8; 4], tries: u32, now: Instant| {
            (0..tries).filter(|_| limits.tells(Some(from.into()), now)).count()
        };
        let (stranger, other) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        assert_eq!(told(stranger, 10_000, now), LINES_BURST as usize);
        assert_eq!(told(other, 3, now), 3, "somebody else's trouble is told");
        assert_eq!(
            told(stranger, 10_000, now + Duration::from_secs(60)),
            6,
            "and the stranger's again, later"
        );
    }
}
