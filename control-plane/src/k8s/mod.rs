//! The edge to the Kubernetes API: objects in, tokens asked, status and trust anchors out.
//!
//! Why everything that asks the API server is here: no decision of the mesh may depend on whether it answers
//! just now. `view` remembers what was heard, and the rest of the controller reads that.

use std::time::Duration;

use anyhow::Context as _;
use kube::{Client, client::ClientBuilder};
use tower::timeout::TimeoutLayer;

pub mod lease;
pub mod live;
pub mod owner;
pub mod roots;
pub mod status;
pub mod token;
pub mod view;
pub mod watch;

/// A client of the cluster that this process runs in, or that the kubeconfig names.
///
/// # Errors
/// Neither is there, or it cannot be used.
pub async fn client() -> anyhow::Result<Client> {
    let config = kube::Config::infer().await.map_err(|error| {
        // It says twice why there is no kubeconfig, and what this would need to be a pod.
        let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        anyhow::anyhow!("there is no Kubernetes API to speak to: this is no pod, and {why}")
    })?;
    client_of(config)
}

/// The same from settings.
///
/// # Errors
/// They cannot be used.
pub fn client_of(mut config: kube::Config) -> anyhow::Result<Client> {
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Client::try_from(config).context("the Kubernetes API's address or credentials cannot be used")
}

/// What the controller itself asks with: an API server that vanishes without a word must not hold up anything for as
/// long as the kernel sends again. An answer begins within a bound, and goes on within another; the start of a watch,
/// a list and a write are answers like any other.
///
/// # Errors
/// As [`client`].
pub async fn controllers_client(server: Option<&http::Uri>) -> anyhow::Result<Client> {
    let config = match server {
        Some(server) => kube::Config::new(server.clone()),
        None => kube::Config::infer().await.context("there is no Kubernetes API to speak to")?,
    };
    bounded(config, ANSWER_TIMEOUT)
}

fn bounded(mut config: kube::Config, answer: Duration) -> anyhow::Result<Client> {
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE_TIMEOUT);
    config.reset_reader_on_write = true;
    let builder = ClientBuilder::try_from(config)
        .context("the Kubernetes API's address or credentials cannot be used")?;
    Ok(builder.with_layer(&TimeoutLayer::new(answer)).build())
}

/// Asking again would not help.
pub(crate) fn is_refusal(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 400..=428 | 430..=499))
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Until the head of an answer is there; that of a large list takes its time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Within an answer; a watch says nothing for as long as it lasts, which is `WATCH_SECONDS`.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(75);

/// What the controller may do, exactly: a rule of its (Cluster)Role. The chart's roles are compared with these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// API group; empty for the core.
    pub group: &'static str,
    /// Resources, and subresources as `pods/status`.
    pub resources: &'static [&'static str],
    /// Names, if it is about some objects only.
    pub names: &'static [&'static str],
    /// Verbs.
    pub verbs: &'static [&'static str],
}

const fn grant(
    group: &'static str,
    resources: &'static [&'static str],
    verbs: &'static [&'static str],
) -> Grant {
    Grant { group, resources, names: &[], verbs }
}

/// In every namespace (ClusterRole).
pub const CLUSTER_GRANTS: &[Grant] = &[
    // watch.rs
    grant("", &["services", "pods", "namespaces", "nodes"], READ),
    grant("discovery.k8s.io", &["endpointslices"], READ),
    grant("gateway.networking.k8s.io", &["httproutes", "grpcroutes"], READ),
    grant("weft.dev", &["trafficpolicies", "authorizationpolicies", "meshconfigs"], READ),
    // status.rs
    grant("gateway.networking.k8s.io", &["httproutes/status", "grpcroutes/status"], &["patch"]),
    grant(
        "weft.dev",
        &["trafficpolicies/status", "authorizationpolicies/status", "meshconfigs/status"],
        &["patch"],
    ),
    grant("events.k8s.io", &["events"], &["create", "patch"]),
    // token.rs
    grant("authentication.k8s.io", &["tokenreviews"], &["create"]),
    // roots.rs; applied on the server, where making one asks for `create` by its name
    Grant {
        group: "",
        resources: &["configmaps"],
        names: &[crate::resources::TRUST_CONFIG_MAP],
        verbs: &["get", "create", "patch"],
    },
    // roots.rs: what owns these; the name is that of the chart's own cluster role
    Grant {
        group: "rbac.authorization.k8s.io",
        resources: &["clusterroles"],
        names: &["weft-controller"],
        verbs: &["get"],
    },
    // webhook/certificate.rs
    Grant {
        group: "admissionregistration.k8s.io",
        resources: &["mutatingwebhookconfigurations"],
        names: &["weft-injector"],
        verbs: &["get", "patch"],
    },
    Grant {
        group: "admissionregistration.k8s.io",
        resources: &["validatingwebhookconfigurations"],
        names: &["weft-validator"],
        verbs: &["get", "patch"],
    },
];

/// In the controller's own namespace (Role).
pub const OWN_GRANTS: &[Grant] = &[
    // lease.rs
    grant("coordination.k8s.io", &["leases"], &["create"]),
    Grant {
        group: "coordination.k8s.io",
        resources: &["leases"],
        names: &[lease::LEASE],
        verbs: &["get", "patch"],
    },
    // roots.rs; whoever makes an object cannot be held to a name
    Grant { group: "", resources: &["secrets"], names: &[], verbs: &["create"] },
    Grant {
        group: "",
        resources: &["secrets"],
        names: &["weft-issuer"],
        verbs: &["get", "list", "watch", "update"],
    },
    // webhook/certificate.rs
    Grant { group: "", resources: &["secrets"], names: &["weft-webhook"], verbs: &["get", "update"] },
];

/// Nobody asks for one of them by its name.
const READ: &[&str] = &["list", "watch"];

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
