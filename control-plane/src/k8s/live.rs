//! Objects as the API server has them: whoever watches writes them down, whoever writes status reads them.
//!
//! Why beside the index: status is written for the version that was read, and next to other controllers' entries. The
//! index knows what an object means, and nothing of versions, uids or what stands in its status.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kube::api::{ApiResource, GroupVersionKind};
use serde_json::Value;

use crate::resources::{Kind, ObjectKey};

/// An object as the API server has it, as far as status needs it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Live {
    /// Which version of it this is.
    pub version: String,
    /// Its uid.
    pub uid: String,
    /// Which version of its spec.
    pub generation: i64,
    /// `spec.parentRefs`
    pub parents: Vec<Value>,
    /// `status`
    pub status: Value,
}

/// Every object that has a status.
#[derive(Clone, Debug, Default)]
pub struct Statuses(Arc<Mutex<BTreeMap<ObjectKey, Live>>>);

impl Statuses {
    /// An object as it is now.
    pub fn set(&self, key: ObjectKey, live: Live) {
        self.lock().insert(key, live);
    }

    /// It is gone.
    pub fn remove(&self, key: &ObjectKey) {
        self.lock().remove(key);
    }

    /// A whole list of one kind has been seen: what is not in it is gone.
    pub fn keep_of(&self, kind: Kind, seen: &BTreeSet<ObjectKey>) {
        self.lock().retain(|key, _| key.kind != kind || seen.contains(key));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// All of them.
    pub(super) fn all(&self) -> BTreeMap<ObjectKey, Live> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The API resource of a kind that comes as a custom one.
pub(crate) fn resource(kind: Kind) -> ApiResource {
    let (group, version, plural) = match kind {
        Kind::Service => ("", "v1", "services"),
        Kind::Pod => ("", "v1", "pods"),
        Kind::EndpointSlice => ("discovery.k8s.io", "v1", "endpointslices"),
        Kind::HttpRoute => ("gateway.networking.k8s.io", "v1", "httproutes"),
        Kind::GrpcRoute => ("gateway.networking.k8s.io", "v1", "grpcroutes"),
        Kind::TrafficPolicy => ("weft.dev", "v1alpha1", "trafficpolicies"),
        Kind::AuthorizationPolicy => ("weft.dev", "v1alpha1", "authorizationpolicies"),
        Kind::MeshConfig => ("weft.dev", "v1alpha1", "meshconfigs"),
    };
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.as_str()), plural)
}
