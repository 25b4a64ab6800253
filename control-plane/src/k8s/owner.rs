//! What the controller makes belongs to the installation, and goes with it.
//!
//! Why an owner: the chart does not know these objects (the issuer, the webhooks' authority, the lease, trust anchors in
//! every namespace), so no uninstall would name them. They are owned by the chart's own ClusterRole, which may own
//! things in every namespace; when it is gone, the cluster removes them. None is meant to survive: whoever wants to keep
//! an authority beyond an installation supplies the issuer's Secret, and what was supplied is never owned.
//!
//! Why an owner is also mended: an installation that follows another one at once finds what that one has left, about to
//! be removed under its hands. What we made is ours to take over; an issuer that vanished would be two authorities.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    api::rbac::v1::ClusterRole,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{Api, Client};
use tokio::time::sleep;

use crate::resources::lookup;

/// The owner of all that this installation makes. Waits for an API server that does not answer.
pub async fn owner(client: &Client, cluster_role: Option<&str>) -> Option<OwnerReference> {
    let name = cluster_role?;
    loop {
        match Api::<ClusterRole>::all(client.clone()).get(name).await {
            Ok(role) => {
                return Some(OwnerReference {
                    api_version: "rbac.authorization.k8s.io/v1".to_owned(),
                    kind: "ClusterRole".to_owned(),
                    name: name.to_owned(),
                    uid: role.metadata.uid?,
                    ..OwnerReference::default()
                });
            }
            Err(error) if super::is_refusal(&error) => {
                tracing::warn!(%error, name, "the cluster role cannot be read: what is made here has no owner");
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, name, "the cluster role cannot be read yet");
                sleep(RETRY).await;
            }
        }
    }
}

/// Of everything that is made here.
pub(crate) fn labels() -> BTreeMap<String, String> {
    [(PART_OF.to_owned(), "weft".to_owned())].into()
}

/// Whether it was made here, and not supplied.
pub(crate) fn is_ours(meta: &ObjectMeta) -> bool {
    lookup(&meta.labels, PART_OF) == Some("weft")
}

/// Makes `owner` the owner; whether that changed anything. One of the same name is an installation that is gone.
pub(crate) fn adopt(meta: &mut ObjectMeta, owner: Option<&OwnerReference>) -> bool {
    let Some(owner) = owner else { return false };
    let owners = meta.owner_references.get_or_insert_default();
    if owners.iter().any(|known| known.uid == owner.uid) {
        return false;
    }
    owners.retain(|known| (&known.kind, &known.name) != (&owner.kind, &owner.name));
    owners.push(owner.clone());
    true
}

const PART_OF: &str = "app.kubernetes.io/part-of";
const RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_that_is_gone_is_replaced_and_others_stay() {
        let reference = |kind: &str, uid: &str| OwnerReference {
            kind: kind.to_owned(),
            name: "weft-controller".to_owned(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        };
        let mut meta = ObjectMeta::default();
        assert!(!adopt(&mut meta, None) && meta.owner_references.is_none());
        meta.owner_references = Some(vec![reference("ClusterRole", "old"), reference("Team", "t")]);
        let now = reference("ClusterRole", "new");
        assert!(adopt(&mut meta, Some(&now)));
        assert_eq!(meta.owner_references, Some(vec![reference("Team", "t"), now.clone()]));
        assert!(!adopt(&mut meta, Some(&now)), "it stands there");
    }
}
