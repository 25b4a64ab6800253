//! A service as its callers know it: its endpoints, and what is to be done about them.
//!
//! Why the defaults stand here: what nobody has said must be the same in the controller that compiles a policy, in the
//! sidecar that acts on it and in whatever explains it.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use crate::{
    backoff::Backoff,
    budget::BudgetParams,
    identity::{PodUid, SpiffeId},
    name::ServiceName,
};

/// One port of a service, as its callers see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Name and port.
    pub name: ServiceName,
    /// Addresses that mean this service (ClusterIPs).
    pub vips: Vec<std::net::IpAddr>,
    /// What its endpoints speak.
    pub protocol: Protocol,
    /// How long a silent client may keep detection waiting.
    pub detect_timeout: Duration,
    /// Resource name of its route; `None`: everything goes to the service itself.
    pub route: Option<Arc<str>>,
    /// Collection name of its endpoints; `None`: no endpoints.
    pub endpoints: Option<Arc<str>>,
    /// How far its callers go for one of them.
    pub reach: Reach,
    /// Set when the destination is one pod by its own address: no balancing, no routes.
    pub pod: Option<Arc<Endpoint>>,
    /// How to choose among endpoints.
    pub load_balancing: LoadBalancing,
    /// When to eject an endpoint.
    pub health: HealthPolicy,
    /// Caps.
    pub limits: ServiceLimits,
    /// The only identities that an endpoint may have; empty: whichever each one has.
    pub accepted_identities: Vec<SpiffeId>,
    /// Never fall back to plaintext.
    pub mtls_required: bool,
    /// Rules' default timeouts and retries (from a `TrafficPolicy` on the service).
    pub timeouts: Timeouts,
    /// See [`Service::timeouts`].
    pub retry: RetryPolicy,
}

/// One pod's port.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// The pod.
    pub uid: PodUid,
    /// The pod's IP and target port.
    pub address: SocketAddr,
    /// Relative weight; 0 takes no new requests.
    pub weight: u32,
    /// As the control plane knows it.
    pub health: EndpointHealth,
    /// Who must answer; `None`: the pod is not in the mesh.
    pub identity: Option<SpiffeId>,
    /// What that port really speaks.
    pub tunnel: Tunnel,
    /// Topology zone; empty if unknown.
    pub zone: Arc<str>,
    /// Its node; empty if unknown, or if nobody asks ([`Service::reach`]).
    pub node: Arc<str>,
    /// For telemetry only, at most 8.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
}

/// Whether the control plane would send new requests to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EndpointHealth {
    /// Ready.
    #[default]
    Healthy,
    /// Keeps its open streams, takes new ones only while nobody else does (KEP-1669).
    Draining,
    /// Not ready.
    Unhealthy,
}

/// What a sidecar finds behind an endpoint's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Tunnel {
    /// The app itself, in plaintext.
    #[default]
    None,
    /// A Weft sidecar: mTLS.
    Weft,
}

/// How to choose an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadBalancing {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Time constant of the latency average.
    pub ewma_decay: Duration,
    /// Latency assumed of an endpoint that has not answered yet.
    pub ewma_initial: Duration,
    /// One calling pod stays with one endpoint (`sessionAffinity: ClientIP`), whatever the algorithm.
    pub by_client: bool,
}

/// The balancing algorithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// P2C on peak-EWMA latency × in-flight × error penalty.
    #[default]
    PeakEwma,
    /// P2C on in-flight requests.
    LeastRequest,
    /// Smooth weighted round robin.
    RoundRobin,
    /// Weighted random.
    Random,
}

/// When to stop sending to an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthPolicy {
    /// Eject after so many failures in a row; 0: never.
    pub consecutive_failures: u32,
    /// Eject below this success rate.
    pub success_rate: Option<SuccessRate>,
    /// How long: first, longest, jitter.
    pub backoff: Backoff,
    /// At most this share of the endpoints is ejected at a time, and never the last one.
    pub max_ejection_percent: u8,
}

/// Success-rate ejection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuccessRate {
    /// Eject below this share of successes, in `0.0..=1.0`.
    pub threshold: f64,
    /// Over this window.
    pub window: Duration,
    /// With at least so many requests in it.
    pub min_requests: u32,
}

/// Caps that protect the proxy and the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceLimits {
    /// Requests in flight to one service from this sidecar; beyond it 503.
    pub max_requests: u32,
    /// Connections to one service from this sidecar; beyond it 503, but for an endpoint's only one.
    pub max_connections: u32,
    /// How long a request may wait for an endpoint while all are unreachable.
    pub queue_wait: Duration,
}

/// Bounds on time; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From the request's head to the end of its response's head; streams are not cut.
    pub request: Option<Duration>,
    /// The same of one attempt.
    pub per_try: Option<Duration>,
    /// To open a connection; default 1 s.
    pub connect: Option<Duration>,
}

/// When to try again. What was *not sent* or *not processed* is always sent elsewhere, within the budget.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// HTTP statuses that are tried again; empty by default.
    pub statuses: Vec<std::ops::RangeInclusive<u16>>,
    /// gRPC codes that are tried again; empty by default.
    pub grpc_codes: Vec<u16>,
    /// Whether a reset or a per-try timeout is tried again (idempotent requests only).
    pub on_reset: bool,
    /// Attempts beyond the first, for statuses, codes and resets.
    pub max_retries: u32,
    /// Whether requests with a method that is not idempotent are tried again after they were sent.
    pub any_method: bool,
    /// Largest request body that is kept for a replay, in bytes.
    pub max_body: usize,
    /// Waits between attempts.
    pub backoff: Backoff,
    /// Share of requests that may be tried again.
    pub budget: BudgetParams,
}

/// What a port speaks, as declared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Not declared: look at the first bytes.
    #[default]
    Detect,
    /// Bytes.
    Opaque,
    /// HTTP/1.1 (and 1.0).
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/2 that carries gRPC.
    Grpc,
    /// TLS of the app's own: passed through.
    Tls,
}

impl Protocol {
    /// Whether the port was declared to speak HTTP of any version.
    #[must_use]
    pub const fn is_http(self) -> bool {
        match self {
            Self::Http1 | Self::Http2 | Self::Grpc => true,
            Self::Detect | Self::Opaque | Self::Tls => false,
        }
    }
}

/// A service that a rule sends to, with its endpoints at this version.
#[derive(Clone, Debug)]
pub struct BackendPolicy {
    /// The service.
    pub service: Arc<Service>,
    /// Its endpoints; may be empty.
    pub endpoints: Arc<[Arc<Endpoint>]>,
    /// Grows with every change of service or endpoints, so that a balancer updates only then.
    pub generation: u64,
    /// False while the control plane says that there is no such service: its share of requests
    /// is answered with 500 (Gateway API: a backendRef that does not resolve).
    pub resolved: bool,
    /// Tells this calling pod from others ([`LoadBalancing::by_client`]).
    pub client: u64,
}

/// What tells one backend from another, and so what is learned of the one from what is learned of the other:
/// a pod that is dialled by its own address may be named as a service is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    service: ServiceName,
    pod: Option<SocketAddr>,
}

/// Where a workload runs; empty: unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its node.
    pub node: Arc<str>,
    /// Its node's zone.
    pub zone: Arc<str>,
}

/// How far a service's callers go for an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Anywhere.
    #[default]
    Anywhere,
    /// Never off their own node (`internalTrafficPolicy: Local`).
    Node,
    /// Off their own node, and then off their zone, only while nobody there is ready.
    PreferNode,
    /// Off their own zone only while nobody there is ready.
    PreferZone,
}

impl Service {
    /// What tells it from other backends.
    pub fn key(&self) -> BackendKey {
        BackendKey { service: self.name.clone(), pod: self.pod.as_ref().map(|pod| pod.address) }
    }

    /// A service with every setting at its default, no route and no endpoints.
    pub fn new(name: ServiceName) -> Self {
        Self {
            name,
            vips: Vec::new(),
            protocol: Protocol::default(),
            detect_timeout: DETECT_TIMEOUT,
            route: None,
            endpoints: None,
            reach: Reach::default(),
            pod: None,
            load_balancing: LoadBalancing::default(),
            health: HealthPolicy::default(),
            limits: ServiceLimits::default(),
            accepted_identities: Vec::new(),
            mtls_required: false,
            timeouts: Timeouts::default(),
            retry: RetryPolicy::default(),
        }
    }
}

impl Endpoint {
    /// A healthy endpoint of weight 1 outside the mesh.
    pub fn new(uid: PodUid, address: SocketAddr) -> Self {
        Self {
            uid,
            address,
            weight: 1,
            health: EndpointHealth::Healthy,
            identity: None,
            tunnel: Tunnel::None,
            zone: "".into(),
            node: "".into(),
            labels: BTreeMap::new(),
        }
    }
}

impl Default for LoadBalancing {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            // linkerd's: 10 s decay, 30 ms first guess; long enough to smooth, short enough to follow.
            ewma_decay: Duration::from_secs(10),
            ewma_initial: Duration::from_millis(30),
            by_client: false,
        }
    }
}

impl Default for HealthPolicy {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            success_rate: Some(SuccessRate {
                threshold: 0.8,
                window: Duration::from_secs(10),
                min_requests: 10,
            }),
            backoff: Backoff::EJECTION,
            max_ejection_percent: 50,
        }
    }
}

impl Default for ServiceLimits {
    fn default() -> Self {
        Self { max_requests: 100_000, max_connections: 10_000, queue_wait: Duration::from_secs(3) }
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            statuses: Vec::new(),
            grpc_codes: Vec::new(),
            on_reset: false,
            max_retries: 1,
            any_method: false,
            max_body: 64 * 1024,
            backoff: Backoff::RETRY,
            budget: BudgetParams::default(),
        }
    }
}

/// How long a silent client keeps detection waiting unless told otherwise.
pub const DETECT_TIMEOUT: Duration = Duration::from_millis(250);
/// How long one connection attempt may take unless told otherwise.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
