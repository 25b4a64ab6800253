//! Where objects come from: a folder of the YAML that users would give to Kubernetes. `k8s` is the other source, and
//! reports in the same words.
//!
//! Why a source only *reports*: it turns what it sees into [`Batch`]es and knows nothing of policy. What
//! could not be read is part of the batch, so that `weft status` can name file, line, field and reason.

use crate::{
    index::Event,
    resources::{ObjectKey, Origin},
};

pub mod dir;
mod kept;
pub mod yaml;

/// What one look at the source found.
#[derive(Debug, Default)]
pub struct Batch {
    /// Changes since the last batch, in an order that can be applied.
    pub events: Vec<Event>,
    /// Everything that is wrong at this moment, not only what is new.
    pub problems: Vec<Problem>,
    /// Objects that are ignored because their kind is nothing to the mesh.
    pub foreign: usize,
    /// Whether the source could not even be listed: what it has is not known, which is not "nothing".
    pub unlisted: bool,
}

/// One thing that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Which object, if its name could be read.
    pub object: Option<ObjectKey>,
    /// Where.
    pub origin: Origin,
    /// Field path within the object, such as `spec.ports[1].port`; empty if it is about the whole.
    pub path: String,
    /// What is wrong.
    pub reason: String,
    /// Whether an earlier good version of the object stays in force.
    pub kept_last_good: bool,
}
