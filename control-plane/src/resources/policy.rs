//! Weft's own kinds, `weft.dev/v1alpha1`: how callers behave (TrafficPolicy), who may call
//! (AuthorizationPolicy), and what holds for the whole mesh (MeshConfig).
//!
//! Why authorization rules refuse unknown fields: a condition that is not understood must not be dropped,
//! or the rule would match more than it says. Everywhere else an unknown field is ignored.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    nullable,
    values::{
        Cidr, Domain, GatewayDuration, GrpcCode, HeaderText, Identity, MethodName, Share, Statuses,
        TextPattern,
    },
};

/// Group and version of all kinds here.
pub const API_VERSION: &str = "weft.dev/v1alpha1";

/// How callers of a service, or of one route, behave.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrafficPolicy {
    /// Name, namespace and so on.
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(deserialize_with = "nullable")]
    pub spec: TrafficPolicySpec,
}

/// Who may call a set of workloads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AuthorizationPolicy {
    /// Name, namespace and so on.
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(deserialize_with = "nullable")]
    pub spec: AuthorizationPolicySpec,
}

/// What holds for the whole mesh. One object; the oldest, then the first by name, wins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MeshConfig {
    /// Name and so on; there is no namespace.
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(deserialize_with = "nullable")]
    pub spec: MeshConfigSpec,
}

/// What a policy is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct TargetRef {
    /// Empty or `core` for a Service, `gateway.networking.k8s.io` for a route.
    #[serde(deserialize_with = "nullable")]
    pub group: String,
    /// `Service`, `HTTPRoute` or `GRPCRoute`.
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    /// Its name, in the policy's own namespace.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// One port of the service by name or number, or one rule of the route by name or position.
    pub section_name: Option<String>,
}

/// See [`TrafficPolicy`]. A policy on a rule says more than one on its route, and that more than one on
/// the service; field by field, the most specific that sets a field wins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct TrafficPolicySpec {
    /// What it is about, in its own namespace.
    #[serde(deserialize_with = "nullable")]
    pub target_refs: Vec<TargetRef>,
    /// Bounds on time.
    #[serde(deserialize_with = "nullable")]
    pub timeouts: Timeouts,
    /// When to try again. Without it nothing that was processed is tried again.
    pub retries: Option<Retries>,
    /// How an endpoint is chosen. Services only.
    pub load_balancing: Option<LoadBalancing>,
    /// When an endpoint is left out for a while. Services only.
    pub outlier_ejection: Option<OutlierEjection>,
    /// Caps per calling sidecar. Services only.
    pub limits: Option<Limits>,
    /// How often each of its pods may be asked. Every limit counts for itself; a request that one of them
    /// refuses is answered 429 with `Retry-After` (gRPC: RESOURCE_EXHAUSTED). Services only.
    pub rate_limits: Option<Vec<RateLimit>>,
    /// Never fall back to plaintext, even to pods outside the mesh. Services only.
    pub mtls_required: Option<bool>,
    /// The only identities that its endpoints may have; whoever else is among them gets no requests. Services only.
    #[serde(deserialize_with = "nullable")]
    pub accepted_identities: Vec<Identity>,
    /// How long a silent client may keep protocol detection waiting; 250 ms unless given. Services only.
    pub detect_timeout: Option<GatewayDuration>,
}

/// Bounds on time; absent or `0s` is no bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Timeouts {
    /// From the request's head to the response's head, all attempts together.
    pub request: Option<GatewayDuration>,
    /// The same of one attempt.
    pub per_try: Option<GatewayDuration>,
    /// To open a connection; 1 s unless given.
    pub connect: Option<GatewayDuration>,
}

/// When to try again what was sent. What was never sent is always sent elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Retries {
    /// HTTP statuses: `503`, `"5xx"`, `"500-504"`.
    #[serde(deserialize_with = "nullable")]
    pub statuses: Vec<Statuses>,
    /// gRPC statuses: `UNAVAILABLE` or `14`.
    #[serde(deserialize_with = "nullable")]
    pub grpc_codes: Vec<GrpcCode>,
    /// Also after a reset or a per-try timeout.
    pub on_reset: Option<bool>,
    /// Attempts beyond the first; 1 unless given.
    pub max_retries: Option<u32>,
    /// Also requests whose method is not idempotent, such as POST.
    pub any_method: Option<bool>,
    /// Largest body that is kept for another attempt; 64 KiB unless given, 1 MiB at most.
    pub max_body_bytes: Option<u32>,
    /// Share of requests that may be tried again.
    pub budget: Option<Budget>,
    /// Waits between attempts; 25 ms to 250 ms unless given.
    pub backoff: Option<BackoffSpec>,
}

/// A retry budget.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Budget {
    /// Retries per hundred requests; 20 unless given.
    pub percent: Option<u32>,
    /// Retries a second that are always allowed; 10 unless given.
    pub min_per_second: Option<u32>,
    /// Measured over this; 10 s unless given.
    pub window: Option<GatewayDuration>,
}

/// An exponential schedule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct BackoffSpec {
    /// First wait.
    pub min: Option<GatewayDuration>,
    /// Longest wait.
    pub max: Option<GatewayDuration>,
    /// Random share added: `0.5` unless given.
    pub jitter: Option<Share>,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct LoadBalancing {
    /// PeakEwma unless given.
    pub algorithm: Algorithm,
    /// Of PeakEwma.
    #[serde(deserialize_with = "nullable")]
    pub ewma: Ewma,
}

/// The algorithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Algorithm {
    /// The cheaper of two by latency × requests in flight × error penalty.
    #[default]
    PeakEwma,
    /// The less busy of two.
    LeastRequest,
    /// In turn, by weight.
    RoundRobin,
    /// At random, by weight.
    Random,
}

/// The latency average.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Ewma {
    /// Time constant; 10 s unless given.
    pub decay: Option<GatewayDuration>,
    /// Assumed of an endpoint that has not answered yet; 30 ms unless given.
    pub initial: Option<GatewayDuration>,
}

/// When an endpoint is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct OutlierEjection {
    /// After so many failures in a row; 5 unless given, 0 never.
    pub consecutive_failures: Option<u32>,
    /// Below this success rate; 80 % over 10 s with at least 10 requests unless given.
    pub success_rate: Option<SuccessRate>,
    /// For how long; 1 s to 60 s unless given.
    pub backoff: Option<BackoffSpec>,
    /// At most this share of endpoints at a time, and never the last one; 50 unless given.
    pub max_ejection_percent: Option<u8>,
}

/// Success-rate ejection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct SuccessRate {
    /// `0.8` or `80`; 0 turns it off.
    pub threshold: Option<Share>,
    /// Over this window.
    pub window: Option<GatewayDuration>,
    /// With at least so many requests in it.
    pub min_requests: Option<u32>,
}

/// Caps per calling sidecar.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Limits {
    /// Requests in flight; 100,000 unless given.
    pub max_requests: Option<u32>,
    /// Connections; 10,000 unless given.
    pub max_connections: Option<u32>,
    /// How long a request waits while no endpoint can be reached; 3 s unless given.
    pub queue_wait: Option<GatewayDuration>,
}

/// How often a pod may be asked, as its own sidecar counts it: whoever calls, and whatever the caller says of its
/// route. A request that several limits count needs room in all of them, and takes from none if it is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    /// So many requests, 1 to 1,000,000.
    pub requests: u32,
    /// In this time, 100ms to 1h; 1 s unless given.
    #[serde(default)]
    pub per: Option<GatewayDuration>,
    /// So many at once after a quiet time; as many as `requests` unless given.
    #[serde(default)]
    pub burst: Option<u32>,
    /// What has a count of its own; all requests share one unless given.
    #[serde(default, deserialize_with = "nullable")]
    pub by: RateLimitBy,
    /// Requests that are counted: any of these; all unless given.
    #[serde(default, deserialize_with = "nullable")]
    pub to: Vec<Operation>,
}

/// What has a count of its own. 10,000 are kept; where more are in use at once, those that come last share one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimitBy {
    /// Each caller, by its identity. Callers outside the mesh share one.
    pub identity: Option<bool>,
    /// Each combination of these headers' values; requests without them share one. Whoever chooses a header's value
    /// chooses the count: with `identity` each caller can do so for itself only.
    #[serde(deserialize_with = "nullable")]
    pub headers: Vec<HeaderText>,
}

/// See [`AuthorizationPolicy`]. Without `targetRefs` and `selector` it holds for every workload of its
/// namespace. Deny rules come before allow rules; as soon as one allow policy selects a port, what no
/// rule allows there is denied.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicySpec {
    /// Services of its namespace: their pods, at the ports that they send to.
    #[serde(deserialize_with = "nullable")]
    pub target_refs: Vec<TargetRef>,
    /// Workloads of its namespace by label.
    pub selector: Option<Selector>,
    /// Ports of the workload (not of its services); all unless given.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<u16>,
    /// Whether plaintext is admitted; as the mesh says unless given.
    pub mtls: Option<Mtls>,
    /// What the rules do. With `Allow` and no rules nothing is allowed. Without both, the policy is only
    /// about `mtls`.
    pub action: Option<Action>,
    /// Any of these.
    #[serde(deserialize_with = "nullable")]
    pub rules: Vec<AuthzRule>,
}

/// Workloads by label: all of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Label and value.
    #[serde(deserialize_with = "nullable")]
    pub match_labels: BTreeMap<String, String>,
}

/// Whether plaintext is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mtls {
    /// mTLS and plaintext.
    Permissive,
    /// mTLS only.
    Strict,
}

/// What rules or a default do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Action {
    /// Let pass.
    Allow,
    /// Refuse.
    Deny,
}

/// One rule: `from` and `to` both hold; an empty part holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthzRule {
    /// Any of these callers.
    #[serde(deserialize_with = "nullable")]
    pub from: Vec<Source>,
    /// Any of these requests. With it the rule is about HTTP only.
    #[serde(deserialize_with = "nullable")]
    pub to: Vec<Operation>,
}

/// Callers: every field that is given holds, by any of its values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// SPIFFE IDs, or patterns with a star at one end, such as `*/sa/web`.
    #[serde(deserialize_with = "nullable")]
    pub identities: Vec<TextPattern>,
    /// Namespaces of the caller's identity.
    #[serde(deserialize_with = "nullable")]
    pub namespaces: Vec<TextPattern>,
    /// Trust domains of the caller's identity.
    #[serde(deserialize_with = "nullable")]
    pub trust_domains: Vec<TextPattern>,
    /// The caller's address.
    #[serde(deserialize_with = "nullable")]
    pub cidrs: Vec<Cidr>,
    /// Not these.
    #[serde(deserialize_with = "nullable")]
    pub not_identities: Vec<TextPattern>,
    /// Not these.
    #[serde(deserialize_with = "nullable")]
    pub not_namespaces: Vec<TextPattern>,
}

/// Requests: every field that is given holds, by any of its values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Operation {
    /// Methods.
    #[serde(deserialize_with = "nullable")]
    pub methods: Vec<MethodName>,
    /// Paths, or patterns with a star at one end, such as `/api/*`. For gRPC `/<service>/<method>`.
    #[serde(deserialize_with = "nullable")]
    pub paths: Vec<TextPattern>,
    /// Hosts, or patterns with a star at one end, such as `*.example.org`.
    #[serde(deserialize_with = "nullable")]
    pub hosts: Vec<TextPattern>,
    /// All of these headers.
    #[serde(deserialize_with = "nullable")]
    pub headers: Vec<HeaderCondition>,
}

/// A header and its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeaderCondition {
    /// Its name.
    pub name: HeaderText,
    /// Its value, or a pattern of it; `*` for any.
    pub value: TextPattern,
}

/// The settings of the whole mesh. One object is enough; of several the oldest holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct MeshConfigSpec {
    /// Address ranges of pods and services: only for addresses in them a sidecar asks the controller.
    /// All private ranges unless given.
    #[serde(deserialize_with = "nullable")]
    pub mesh_ranges: Vec<Cidr>,
    /// Whether destinations outside the mesh may be reached; Allow unless given.
    pub egress: Option<Action>,
    /// Whether plaintext is admitted where no policy says so; Permissive unless given.
    pub mtls: Option<Mtls>,
    /// What happens where no policy says so; Allow unless given.
    pub authorization: Option<Action>,
    /// Trust domains whose identities are accepted, beside the mesh's own.
    #[serde(deserialize_with = "nullable")]
    pub trust_domains: Vec<Domain>,
}
