//! What users write: ordinary Kubernetes and Gateway API objects, and Weft's own four kinds.
//!
//! Why own types for routes: a controller must never lose a whole route because of one field that is
//! newer than the controller. Unknown fields are ignored and unknown enum values decode; what they mean
//! for a rule is decided when it is compiled, and reported as a condition. Weft's own kinds are parsed
//! strictly instead: a wrong value is an error with a field path, never a weaker policy.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Deserialize, Deserializer, Serialize};

pub mod crd;
pub mod gateway;
pub mod policy;
pub mod probes;
pub mod values;

pub use gateway::{GrpcRoute, HttpRoute};
pub use policy::{AuthorizationPolicy, MeshConfig, TrafficPolicy};

/// The kinds that the index knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Pod.
    Pod,
    /// `gateway.networking.k8s.io/v1` HTTPRoute.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// `gateway.networking.k8s.io/v1` GRPCRoute.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
    /// `weft.dev/v1alpha1` TrafficPolicy.
    TrafficPolicy,
    /// `weft.dev/v1alpha1` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `weft.dev/v1alpha1` MeshConfig, which has no namespace.
    MeshConfig,
}

/// One object's name in the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for kinds without one.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A decoded object.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// A Pod.
    Pod(Box<Pod>),
    /// An HTTPRoute.
    HttpRoute(Box<HttpRoute>),
    /// A GRPCRoute.
    GrpcRoute(Box<GrpcRoute>),
    /// A TrafficPolicy.
    TrafficPolicy(Box<TrafficPolicy>),
    /// An AuthorizationPolicy.
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    /// The MeshConfig.
    MeshConfig(Box<MeshConfig>),
}

/// The part of every object that says what the rest is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Header {
    /// Group and version.
    #[serde(deserialize_with = "nullable")]
    pub api_version: String,
    /// Kind.
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    /// Name and namespace.
    #[serde(deserialize_with = "nullable")]
    pub metadata: HeaderMeta,
}

/// See [`Header`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderMeta {
    /// Namespace.
    #[serde(deserialize_with = "nullable")]
    pub namespace: String,
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
}

/// What a header means to this controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// One of ours.
    Known(Kind),
    /// A `v1` List of others.
    List,
    /// Somebody else's kind: nothing to do with the mesh.
    Foreign,
    /// Nobody's: the reason.
    Bad(String),
}

impl Kind {
    /// The kind as users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::MeshConfig => "MeshConfig",
        }
    }

    /// Whether objects of this kind live in a namespace.
    pub fn is_namespaced(self) -> bool {
        self != Self::MeshConfig
    }
}

impl Header {
    /// Which kind this is.
    pub fn meaning(&self) -> Meaning {
        let kind = match (self.api_version.as_str(), self.kind.as_str()) {
            ("", _) => return Meaning::Bad("apiVersion is missing".to_owned()),
            (_, "") => return Meaning::Bad("kind is missing".to_owned()),
            ("v1", "List") => return Meaning::List,
            ("v1", "Service") => Kind::Service,
            ("v1", "Pod") => Kind::Pod,
            ("discovery.k8s.io/v1", "EndpointSlice") => Kind::EndpointSlice,
            ("gateway.networking.k8s.io/v1" | "gateway.networking.k8s.io/v1beta1", "HTTPRoute") => {
                Kind::HttpRoute
            }
            ("gateway.networking.k8s.io/v1", "GRPCRoute") => Kind::GrpcRoute,
            (policy::API_VERSION, "TrafficPolicy") => Kind::TrafficPolicy,
            (policy::API_VERSION, "AuthorizationPolicy") => Kind::AuthorizationPolicy,
            (policy::API_VERSION, "MeshConfig") => Kind::MeshConfig,
            (version, kind) if version.starts_with("weft.dev/") => {
                return Meaning::Bad(format!("{version} {kind} is not a kind of {}", policy::API_VERSION));
            }
            _ => return Meaning::Foreign,
        };
        Meaning::Known(kind)
    }

    /// The object's key; `None` without a name.
    pub fn key(&self, kind: Kind) -> Option<ObjectKey> {
        (!self.metadata.name.is_empty())
            .then(|| ObjectKey::new(kind, &self.metadata.namespace, &self.metadata.name))
    }
}

impl ObjectKey {
    /// A key; an empty namespace is `default`, but for kinds that have none.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        let namespace = match (kind.is_namespaced(), namespace) {
            (false, _) => "",
            (true, "") => "default",
            (true, namespace) => namespace,
        };
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl Object {
    /// Decodes an object of `kind`.
    ///
    /// # Errors
    /// The deserializer's.
    pub fn decode<'de, D: Deserializer<'de>>(kind: Kind, from: D) -> Result<Self, D::Error> {
        Ok(match kind {
            Kind::Service => Self::Service(Deserialize::deserialize(from)?),
            Kind::EndpointSlice => Self::EndpointSlice(Deserialize::deserialize(from)?),
            Kind::Pod => Self::Pod(Deserialize::deserialize(from)?),
            Kind::HttpRoute => Self::HttpRoute(Deserialize::deserialize(from)?),
            Kind::GrpcRoute => Self::GrpcRoute(Deserialize::deserialize(from)?),
            Kind::TrafficPolicy => Self::TrafficPolicy(Deserialize::deserialize(from)?),
            Kind::AuthorizationPolicy => Self::AuthorizationPolicy(Deserialize::deserialize(from)?),
            Kind::MeshConfig => Self::MeshConfig(Deserialize::deserialize(from)?),
        })
    }

    /// Its metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Service(o) => &o.metadata,
            Self::EndpointSlice(o) => &o.metadata,
            Self::Pod(o) => &o.metadata,
            Self::HttpRoute(o) => &o.metadata,
            Self::GrpcRoute(o) => &o.metadata,
            Self::TrafficPolicy(o) => &o.metadata,
            Self::AuthorizationPolicy(o) => &o.metadata,
            Self::MeshConfig(o) => &o.metadata,
        }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Pod(_) => Kind::Pod,
            Self::HttpRoute(_) => Kind::HttpRoute,
            Self::GrpcRoute(_) => Kind::GrpcRoute,
            Self::TrafficPolicy(_) => Kind::TrafficPolicy,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::MeshConfig(_) => Kind::MeshConfig,
        }
    }

    /// Its key.
    pub fn key(&self) -> ObjectKey {
        let meta = self.metadata();
        ObjectKey::new(
            self.kind(),
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        )
    }
}

/// When an object was made, in seconds since 1970; 0 if it does not say.
pub fn created(meta: &ObjectMeta) -> u64 {
    meta.creation_timestamp.as_ref().map_or(0, |t| u64::try_from(t.0.as_second()).unwrap_or(0))
}

/// One label or annotation.
pub fn lookup<'a>(map: &'a Option<BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    map.as_ref()?.get(key).map(String::as_str)
}

/// `null` is the same as absent, as it is for the Kubernetes API server.
pub(crate) fn nullable<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return write!(f, "{}/{}", self.kind, self.name);
        }
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

/// Where an object stands: a place in a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// The file, relative to the source's folder.
    pub file: Arc<str>,
    /// 1-based line; 0 if it is about the whole file.
    pub line: u32,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.file),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}

/// Marks a pod whose traffic is captured by a sidecar: `weft.dev/injected: "true"`.
pub const INJECTED: &str = "weft.dev/injected";
/// Ports of a pod that capture skips, so that callers speak plaintext to them: `"3306,9000-9010"`.
pub const SKIP_INBOUND_PORTS: &str = "weft.dev/skip-inbound-ports";
/// Ports of a pod, or of a Service, that carry bytes and no requests, whatever they look like: `"3306,9000-9010"`.
pub const OPAQUE_PORTS: &str = "weft.dev/opaque-ports";
/// A pod's relative weight among the endpoints of its services; 1 unless given.
pub const WEIGHT: &str = "weft.dev/weight";

/// Label of a namespace (`enabled`), or of a pod (`enabled`, `disabled`): who gets a sidecar.
pub const INJECT: &str = "weft.dev/inject";
/// The ConfigMap that the controller keeps in each namespace with sidecars: what they trust the controller by.
pub const TRUST_CONFIG_MAP: &str = "weft-trust";
/// Its one key: PEM.
pub const TRUST_KEY: &str = "roots.pem";
/// Audience of the service account token that a sidecar shows for its certificate.
pub const TOKEN_AUDIENCE: &str = "weft";
/// Where the control plane lives. Sidecars take nobody else for it.
pub const CONTROL_NAMESPACE: &str = "weft";
