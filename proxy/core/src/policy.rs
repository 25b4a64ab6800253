//! The validated snapshot: what the control plane says about one destination, and about this workload.
//!
//! Why a snapshot: a request takes one [`OutboundPolicy`] or [`InboundPolicy`] by `Arc`, once, and
//! nothing in it changes underneath. Route, endpoints and policy of a destination therefore change
//! together or not at all ("config tears" are the commonest cause of errors on change elsewhere).

use std::{collections::BTreeMap, fmt, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, Method};
use ipnet::IpNet;

use crate::identity::{PodUid, SpiffeId, TrustDomain};
pub use crate::{
    authz::AuthzRules,
    backoff::Backoff,
    budget::BudgetParams,
    route::RouteTable,
    topology::{Place, Reach},
};

/// One port of one service: `<namespace>/<name>:<port>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// The service's namespace.
    pub namespace: Arc<str>,
    /// The service's name.
    pub name: Arc<str>,
    /// The service's port (not the pod's).
    pub port: u16,
}

/// The object that a rule came from, for metrics, logs and explanations.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// Kind, such as `HTTPRoute`.
    pub kind: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
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

/// One destination's whole policy, immutable, taken once a request or connection.
#[derive(Clone, Debug)]
pub struct OutboundPolicy {
    /// The destination.
    pub service: Arc<Service>,
    /// Its rules; a service without routes has one rule that sends everything to itself.
    pub routes: RouteTable,
    /// Every backend that a rule names, by [`BackendRef::backend`].
    pub backends: Vec<Arc<BackendPolicy>>,
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
    pub limits: Limits,
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
pub struct Limits {
    /// Requests in flight to one service from this sidecar; beyond it 503.
    pub max_requests: u32,
    /// Connections to one service from this sidecar; beyond it 503, but for an endpoint's only one.
    pub max_connections: u32,
    /// How long a request may wait for an endpoint while all are unreachable.
    pub queue_wait: Duration,
}

/// One rule of a route: what it matches and what it does.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The object that it came from.
    pub object: ObjectRef,
    /// Its name in the object, or its position as text.
    pub name: Arc<str>,
    /// `<kind>/<namespace>/<name>/<rule>`: its label in metrics, logs and `weft routes`.
    pub label: Arc<str>,
    /// Hostnames of the route; empty: all. A leading `*.` matches one or more labels.
    pub hosts: Vec<Arc<str>>,
    /// Any of these; empty: everything.
    pub matches: Vec<Match>,
    /// In order.
    pub filters: Vec<Filter>,
    /// Weighted; empty: answered by a filter, else 500.
    pub backends: Vec<BackendRef>,
    /// Bounds on time.
    pub timeouts: Timeouts,
    /// When to try again.
    pub retry: RetryPolicy,
    /// When the route object was made (seconds since 1970): Gateway API's tie-break.
    pub created: u64,
}

/// A conjunction of conditions.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// The path, or the gRPC method.
    pub path: Option<PathMatch>,
    /// The method.
    pub method: Option<Method>,
    /// All of these.
    pub headers: Vec<HeaderMatch>,
    /// All of these.
    pub query: Vec<QueryMatch>,
}

/// A condition on the path.
#[derive(Clone, Debug)]
pub enum PathMatch {
    /// The whole path.
    Exact(Arc<str>),
    /// A prefix by segments: `/v2` matches `/v2` and `/v2/x`, not `/v2x`. No trailing `/` but in `/`.
    Prefix(Arc<str>),
    /// The whole path by a regular expression.
    Regex(Pattern),
    /// `/<service>/<method>`; `None` matches any.
    Grpc {
        /// The fully qualified service.
        service: Option<TextMatch>,
        /// The method.
        method: Option<TextMatch>,
    },
}

/// A condition on one text value.
#[derive(Clone, Debug)]
pub enum TextMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Matched whole.
    Regex(Pattern),
}

/// A condition on one header.
#[derive(Clone, Debug)]
pub struct HeaderMatch {
    /// Its name.
    pub name: HeaderName,
    /// Its value (several values are joined by `,`).
    pub value: TextMatch,
}

/// A condition on one query parameter.
#[derive(Clone, Debug)]
pub struct QueryMatch {
    /// Its name, case-sensitive.
    pub name: Arc<str>,
    /// The first value of that name, percent-decoded.
    pub value: TextMatch,
}

/// A compiled regular expression of bounded size that matches the whole text in linear time.
#[derive(Clone)]
pub struct Pattern {
    source: Arc<str>,
    regex: regex::bytes::Regex,
}

/// What a rule does to a request or response.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// On the request's headers.
    RequestHeaders(HeaderEdit),
    /// On the response's headers.
    ResponseHeaders(HeaderEdit),
    /// Answer with a redirect.
    Redirect(Redirect),
    /// Change what is forwarded.
    Rewrite(Rewrite),
    /// A filter that does not resolve: answer 500 (Gateway API).
    Invalid {
        /// What is wrong, for the log.
        reason: Arc<str>,
    },
}

/// Header changes: set, then add, then remove.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderEdit {
    /// Replace.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Append.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Delete.
    pub remove: Vec<HeaderName>,
}

/// A redirect's parts; what is `None` stays as the request had it.
#[derive(Clone, Debug, PartialEq)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<Arc<str>>,
    /// Host.
    pub host: Option<Arc<str>>,
    /// Path.
    pub path: Option<PathEdit>,
    /// Port.
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// A rewrite's parts; what is `None` stays.
#[derive(Clone, Debug, PartialEq)]
pub struct Rewrite {
    /// Host.
    pub host: Option<Arc<str>>,
    /// Path.
    pub path: Option<PathEdit>,
}

/// A change of path.
#[derive(Clone, Debug, PartialEq)]
pub enum PathEdit {
    /// The whole path (the query stays).
    Full(Arc<str>),
    /// The prefix that the rule matched.
    Prefix(Arc<str>),
}

/// A weighted backend of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendRef {
    /// Which service.
    pub service: ServiceName,
    /// Position in [`OutboundPolicy::backends`].
    pub backend: usize,
    /// Relative weight.
    pub weight: u32,
    /// Filters of this backend only.
    pub filters: Vec<Filter>,
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

/// This workload's own policy.
#[derive(Clone, Debug)]
pub struct InboundPolicy {
    /// Who this workload is.
    pub identity: SpiffeId,
    /// Ports that are named.
    pub ports: BTreeMap<u16, Arc<PortPolicy>>,
    /// Every other port.
    pub default_port: Arc<PortPolicy>,
    /// The mesh's own address ranges; an address outside is decided by `egress`, without asking.
    pub mesh_ranges: Vec<IpNet>,
    /// What to do with destinations outside the mesh.
    pub egress: Egress,
    /// Trust domains whose identities are accepted.
    pub trust_domains: Vec<TrustDomain>,
    /// Where this workload runs.
    pub place: Place,
}

/// What to do with destinations outside the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Egress {
    /// Forward as they are.
    #[default]
    Allow,
    /// Refuse.
    Deny,
}

/// One port of this workload.
#[derive(Clone, Debug)]
pub struct PortPolicy {
    /// What the app speaks there.
    pub protocol: Protocol,
    /// How long a silent client may keep detection waiting.
    pub detect_timeout: Duration,
    /// Whether plaintext is admitted.
    pub mtls: MtlsMode,
    /// Who may call.
    pub authorization: Arc<Authorization>,
    /// What the pod's kubelet asks there. Exactly this is admitted without identity; that a caller seems to be the
    /// node means nothing, since whatever is routed through a node may come with its address.
    pub probes: Vec<Probe>,
}

/// One question of the pod's own spec.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Probe {
    /// GET of this path and query, as sent.
    Get(Arc<str>),
    /// `grpc.health.v1.Health/Check`.
    GrpcHealth,
}

impl Probe {
    /// Whether a text can be a path and query of a request.
    pub fn is_path(text: &str) -> bool {
        text.starts_with('/')
            && text.len() <= 2_048
            && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#')
    }
}

/// Whether plaintext is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MtlsMode {
    /// mTLS and plaintext.
    Permissive,
    /// mTLS only.
    Strict,
}

/// Who may call one port. Deny rules come first, then allow rules, then the default.
#[derive(Clone, Debug)]
pub struct Authorization {
    /// What happens when no rule matches.
    pub default: Action,
    /// The rules, in any order.
    pub rules: AuthzRules,
    /// Grows with each change.
    pub generation: u64,
}

/// What a rule or a default says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Let it pass.
    Allow,
    /// Refuse it.
    Deny,
}

/// One authorization rule: all parts must hold; an empty part holds.
#[derive(Clone, Debug)]
pub struct AuthzRule {
    /// The object that it came from.
    pub object: ObjectRef,
    /// Allow or deny.
    pub action: Action,
    /// Any of these; empty: anyone, plaintext included.
    pub sources: Vec<SourceMatch>,
    /// Any of these; empty: any request, opaque connections included. A rule with an `http` part never
    /// allows an opaque connection, and a deny rule with one denies it (fail closed).
    pub http: Vec<HttpMatch>,
}

/// Who calls: all that is set must hold.
#[derive(Clone, Debug, Default)]
pub struct SourceMatch {
    /// The caller's identity, whole text.
    pub identity: Option<StringMatch>,
    /// The caller's namespace.
    pub namespace: Option<StringMatch>,
    /// The caller's trust domain.
    pub trust_domain: Option<StringMatch>,
    /// The caller's address.
    pub cidr: Option<IpNet>,
    /// Not these identities (a caller without identity is not excluded by it).
    pub not_identities: Vec<StringMatch>,
    /// Not these namespaces.
    pub not_namespaces: Vec<StringMatch>,
}

/// What is asked: all that is set must hold.
#[derive(Clone, Debug, Default)]
pub struct HttpMatch {
    /// Any of these methods; empty: all.
    pub methods: Vec<Method>,
    /// Any of these paths; empty: all.
    pub paths: Vec<StringMatch>,
    /// Any of these hosts; empty: all.
    pub hosts: Vec<StringMatch>,
    /// All of these headers.
    pub headers: Vec<(HeaderName, StringMatch)>,
}

/// Exact, prefix or suffix; never a regular expression (an unescaped one was Istio's bypass of 2026).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Starts with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Anything but empty.
    Present,
}

/// The names of what this build can enforce: a policy that `requires` any other is refused whole,
/// because proto3 would drop the unknown matcher silently and the rule would match more than it says.
pub const FEATURES: &[&str] = &["route/v1", "authz/v1"];

/// Why a policy cannot be enforced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A pattern that does not compile or is too large.
    #[error("{0:?} is not a usable regular expression: {1}")]
    Pattern(String, String),
    /// A service name that is not `<namespace>/<name>:<port>`.
    #[error("{0:?} is not <namespace>/<name>:<port>")]
    ServiceName(String),
}

impl Pattern {
    /// Largest compiled program, in bytes: a few hundred states, far above real routes.
    const SIZE_LIMIT: usize = 64 * 1024;

    /// Compiles `source`; it must match the whole text (RE2 syntax: no back-references or look-around).
    ///
    /// # Errors
    /// Syntax, or a program above the size limit.
    pub fn new(source: &str) -> Result<Self, PolicyError> {
        // As RE2 has it: `\w`, `\d` and `\s` are ASCII, which also makes them small.
        let compile = |text: &str| {
            regex::bytes::RegexBuilder::new(text)
                .unicode(false)
                .size_limit(Self::SIZE_LIMIT)
                .dfa_size_limit(Self::SIZE_LIMIT)
                .build()
        };
        // Alone first: `a)|(b` is no pattern, and would become one inside the group. The anchors are
        // absolute, whatever `(?m)` in the source says.
        compile(source)
            .and_then(|_| compile(&format!("\\A(?:{source})\\z")))
            .map(|regex| Self { source: source.into(), regex })
            .map_err(|e| {
                // The library draws a picture of several lines, which would be as many in a log; the last says it.
                let picture = e.to_string();
                let said = picture.lines().last().unwrap_or_default();
                PolicyError::Pattern(source.to_owned(), said.trim_start_matches("error: ").to_owned())
            })
    }

    /// What was compiled.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the whole of `text` matches.
    pub fn is_match(&self, text: &str) -> bool {
        self.is_match_bytes(text.as_bytes())
    }

    /// [`Pattern::is_match`] of text that need not be UTF-8.
    pub fn is_match_bytes(&self, text: &[u8]) -> bool {
        self.regex.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.source)
    }
}

impl StringMatch {
    /// Whether `text` is meant.
    pub fn is_match(&self, text: &str) -> bool {
        match self {
            Self::Exact(want) => text == &**want,
            Self::Prefix(want) => text.starts_with(&**want),
            Self::Suffix(want) => text.ends_with(&**want),
            Self::Present => !text.is_empty(),
        }
    }

    /// [`StringMatch::is_match`] of text that need not be UTF-8.
    pub fn is_match_bytes(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(want) => text == want.as_bytes(),
            Self::Prefix(want) => text.starts_with(want.as_bytes()),
            Self::Suffix(want) => text.ends_with(want.as_bytes()),
            Self::Present => !text.is_empty(),
        }
    }
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
            limits: Limits::default(),
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

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.namespace, self.name, self.port)
    }
}

impl FromStr for ServiceName {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let parts = || {
            let (namespace, rest) = text.split_once('/')?;
            let (name, port) = rest.split_once(':')?;
            let port = port.parse().ok()?;
            let ok = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
            ok.then(|| Self { namespace: namespace.into(), name: name.into(), port })
        };
        parts().ok_or_else(|| PolicyError::ServiceName(text.to_owned()))
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
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

impl Default for Limits {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_and_cannot_escape_their_group() {
        let p = Pattern::new("/a|/b").unwrap();
        assert!(p.is_match("/a") && p.is_match("/b"));
        assert!(!p.is_match("/ax") && !p.is_match("x/b") && !p.is_match("/a\n"));
        assert!(!Pattern::new("(?m)^/a$").unwrap().is_match("/a\n/b"));
        for bad in ["a)|(b", "(", "a{100000}", "(?=x)", "(a)\\1", "(?x)a # b"] {
            assert!(Pattern::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(p, Pattern::new("/a|/b").unwrap());
        for real in
            [r"/users/\w+/orders/\d{1,10}", r"/[^/]+/[a-z0-9-]{1,63}(/.*)?", r"(?i)/api/v\d+/.*", r"\S+\s\w+"]
        {
            assert!(Pattern::new(real).is_ok(), "{real}");
        }
        assert!(Pattern::new("/café/.*").unwrap().is_match("/café/crème"));
        assert!(Pattern::new(r"\d").unwrap().is_match("7") && !Pattern::new(r"\d+").unwrap().is_match("٣"));
    }

    #[test]
    fn service_names() {
        let name: ServiceName = "shop/web:80".parse().unwrap();
        assert_eq!(name.to_string(), "shop/web:80");
        for bad in ["", "shop", "shop/web", "shop/web:x", "/web:80", "shop/:80", "a/b/c:80", "a/b:70000"] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn strings() {
        let text = |s: &str| Arc::<str>::from(s);
        let cases = [
            (StringMatch::Exact(text("ab")), ["ab"].as_slice(), ["a", "abc", "AB"].as_slice()),
            (StringMatch::Prefix(text("ab")), &["ab", "abc"], &["a", "xab"]),
            (StringMatch::Suffix(text("ab")), &["ab", "xab"], &["abx", "b"]),
            (StringMatch::Present, &["x"], &[""]),
        ];
        for (m, yes, no) in cases {
            assert!(yes.iter().all(|t| m.is_match(t) && m.is_match_bytes(t.as_bytes())), "{m:?}");
            assert!(no.iter().all(|t| !m.is_match(t) && !m.is_match_bytes(t.as_bytes())), "{m:?}");
        }
    }
}
