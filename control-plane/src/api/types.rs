//! The JSON of the controller's API, as both its ends read it: the controller writes these types, `weft` and
//! the tests read them.
//!
//! Why one file: `-o json` of the command is the API's own answer, so a field here is a promise to scripts.
//! Fields are only ever added; readers take what is absent as empty. Times are seconds since 1970
//! unless a name says otherwise. Telemetry rows are those of [`crate::telemetry::view`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::ca::WorkloadCertificate;
use crate::telemetry::view::{EndpointRow, RouteRow, SidecarRow};

/// `GET /api/v1/routes?service=<ns>/<name>[:<port>]&window=30s`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Routes {
    /// The window that was asked for, in seconds.
    pub window_s: u64,
    /// By workload, direction, parent, route, backend and protocol.
    pub rows: Vec<RouteRow>,
}

/// `GET /api/v1/status`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The controller's version.
    pub version: String,
    /// Whether the source was read once and is served.
    pub synced: bool,
    /// Where objects come from.
    pub source: String,
    /// Every object of the mesh.
    pub objects: Vec<ObjectStatus>,
    /// What could not be used.
    pub problems: Vec<ProblemStatus>,
    /// Sidecars, connected or not long gone.
    pub sidecars: Vec<SidecarStatus>,
    /// Objects in the source that are nothing to the mesh.
    pub foreign: u64,
    /// The other controllers that were asked for their part; none where there is one controller.
    pub replicas: Vec<ReplicaStatus>,
}

/// Another controller.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicaStatus {
    /// Its pod.
    pub name: String,
    /// Whether what it knows is in the answer.
    pub answered: bool,
}

/// One object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ObjectStatus {
    /// `HTTPRoute`, for instance.
    pub kind: String,
    /// Empty if the kind has none.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// File and 1-based line.
    pub file: String,
    /// See `file`; 0 if unknown.
    pub line: u32,
    /// Changes when what it says changes.
    pub version: String,
    /// What its author should know.
    pub conditions: Vec<ConditionStatus>,
    /// Sidecars where everything that this object says is live, of those that it concerns.
    pub applied: u32,
    /// Sidecars that it concerns: those that subscribed to something compiled from it.
    pub of: u32,
    /// The rest of them.
    pub laggards: Vec<Laggard>,
    /// Milliseconds from the change to the last sidecar's word that it is live; absent until then.
    pub applied_after_ms: Option<u64>,
}

impl ObjectStatus {
    /// `<kind>/<namespace>/<name>`, as problems name it.
    pub fn key(&self) -> String {
        match self.namespace.as_str() {
            "" => format!("{}/{}", self.kind, self.name),
            namespace => format!("{}/{namespace}/{}", self.kind, self.name),
        }
    }
}

/// A sidecar where an object is not live yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Laggard {
    /// `<ns>/<pod>`
    pub pod: String,
    /// Pod uid.
    pub uid: String,
    /// Which resource it lacks.
    pub resource: String,
    /// Why, if it said so (it refused the resource), or `disconnected`.
    pub reason: String,
}

/// A fact about an object, in regard to one parent if it has several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConditionStatus {
    /// The parent, `Service/<ns>/<name>[:<port>]`; empty if the object has none.
    pub parent: String,
    /// Its place in `spec.parentRefs`, from 0.
    pub parent_ref: Option<usize>,
    /// `Accepted`, `ResolvedRefs`, `PartiallyInvalid`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it holds.
    pub status: bool,
    /// One word.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Something in the source that could not be used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProblemStatus {
    /// `<kind>/<ns>/<name>`; empty if that could not be read.
    pub object: String,
    /// File.
    pub file: String,
    /// 1-based; 0 if it is about the whole file.
    pub line: u32,
    /// Field path, such as `spec.ports[1].port`; empty if it is about the whole object.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// Whether an earlier good version stays in force.
    pub kept_last_good: bool,
}

/// One sidecar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SidecarStatus {
    /// `<ns>/<pod>`; the uid if the pod is unknown.
    pub pod: String,
    /// Whether its stream is open.
    pub connected: bool,
    /// Resources that it subscribed to.
    pub subscribed: u32,
    /// Resources of these whose newest version is not live in it.
    pub behind: u32,
    /// What it reported.
    pub report: SidecarRow,
}

/// `GET /api/v1/endpoints?service=<ns>/<name>[:<port>]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Endpoints {
    /// By backend, endpoint and the sidecar that sees it.
    pub rows: Vec<EndpointRow>,
    /// `<ns>/<pod>` of the pod uids in the rows.
    pub pods: BTreeMap<String, String>,
}

/// `GET /api/v1/certs`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Certs {
    /// The mesh's own.
    pub trust_domain: String,
    /// Grows with every rotation.
    pub sequence: u64,
    /// Trust anchors.
    pub anchors: Vec<Anchor>,
    /// The last certificate of every workload.
    pub workloads: Vec<WorkloadCertificate>,
}

/// A trust anchor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Anchor {
    /// Hexadecimal.
    pub serial: String,
    /// Start.
    pub not_before: i64,
    /// End.
    pub not_after: i64,
    /// Whether it signs new certificates.
    pub signing: bool,
}

/// `POST /api/v1/certs/rotate`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rotated {
    /// The bundle's new sequence.
    pub sequence: u64,
}

/// The body of every answer that is not 2xx.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusal {
    /// What is wrong, and what to do.
    pub error: String,
}
