//! The validated snapshot: what the control plane says about one destination, and about this workload.
//!
//! Why a snapshot: a request takes one [`OutboundPolicy`] or [`InboundPolicy`] by `Arc`, once, and
//! nothing in it changes underneath. Route, endpoints and policy of a destination therefore change
//! together or not at all ("config tears" are the commonest cause of errors on change elsewhere).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ipnet::IpNet;

use crate::identity::{SpiffeId, TrustDomain};
pub use crate::{
    authz::{
        AuthzRules,
        rule::{Action, Authorization, AuthzRule, HttpMatch, Probe, SourceMatch, StringMatch},
    },
    backoff::Backoff,
    budget::BudgetParams,
    limit::{By, Rate, RateError, RateLimit},
    name::{NameError, ObjectRef, ServiceName},
    route::{
        RouteTable,
        rule::{
            BackendRef, Filter, HeaderEdit, HeaderMatch, Match, PathEdit, PathMatch, Pattern, PatternError,
            QueryMatch, Redirect, Rewrite, Rule, TextMatch,
        },
    },
    service::{
        Algorithm, BackendKey, BackendPolicy, CONNECT_TIMEOUT, DETECT_TIMEOUT, Endpoint, EndpointHealth,
        HealthPolicy, LoadBalancing, Place, Protocol, Reach, RetryPolicy, Service, ServiceLimits,
        SuccessRate, Timeouts, Tunnel,
    },
};

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
    /// How often it may be asked.
    pub rate_limits: Vec<RateLimit>,
}

/// Whether plaintext is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MtlsMode {
    /// mTLS and plaintext.
    Permissive,
    /// mTLS only.
    Strict,
}

/// The names of what this build can enforce: a policy that `requires` any other is refused whole,
/// because proto3 would drop the unknown matcher silently and the rule would match more than it says.
pub const FEATURES: &[&str] = &["route/v1", "authz/v1"];
