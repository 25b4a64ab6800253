//! What the controller makes belongs to the installation, and goes with it.
//!
//! Why an owner: the chart does not know these objects (the issuer, the webhooks' authority, the lease, trust anchors in
//! every namespace), so no uninstall would name them. They are owned by the chart's own ClusterRole, which may own
//! things in every namespace; when it is gone, the cluster removes them. None is meant to survive: whoever wants to keep
//! an authority beyond an installation supplies the issuer's Secret, and what was supplied is never owned.
//!
//! Why an owner is also mended: an installation that follows another one at once finds what that one has left, about to
//! be removed under its hands. What we made is ours to take over; an issuer that vanished would be two authorities.
//!
//! Why the owner is looked at again: the role may be made anew under a mesh that runs (`kubectl replace --force`, a tool
//! that renames and prunes). The cluster then removes what names the old one, and what we write must name the new one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    api::rbac::v1::ClusterRole,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{Api, Client};
use tokio::{sync::watch, time::sleep};

use crate::resources::lookup;

/// The owner of all that this installation makes, as it is now.
#[derive(Clone)]
pub struct Owner {
    client: Client,
    role: Option<String>,
    now: Arc<watch::Sender<Option<OwnerReference>>>,
}

impl Owner {
    /// The cluster role of that name. Waits for an API server that does not answer.
    pub async fn find(client: &Client, cluster_role: Option<&str>) -> Self {
        let role = cluster_role.map(str::to_owned);
        let own = Self { client: client.clone(), role, now: Arc::new(watch::Sender::new(None)) };
        while let Err(error) = own.look().await {
            if super::is_refusal(&error) {
                tracing::warn!(%error, role = own.role, "the cluster role cannot be read: what is made here has no owner");
                break;
            }
            tracing::warn!(%error, role = own.role, "the cluster role cannot be read yet");
            sleep(RETRY).await;
        }
        own
    }

    /// Who it is now.
    pub fn now(&self) -> Option<OwnerReference> {
        self.now.borrow().clone()
    }

    /// Hears when it is another one.
    pub fn changes(&self) -> watch::Receiver<Option<OwnerReference>> {
        self.now.subscribe()
    }

    /// Looks again.
    ///
    /// # Errors
    /// It cannot be read: what was known stays.
    pub async fn look(&self) -> Result<(), kube::Error> {
        let Some(name) = &self.role else { return Ok(()) };
        let role = Api::<ClusterRole>::all(self.client.clone()).get(name).await?;
        let owner = role.metadata.uid.map(|uid| OwnerReference {
            api_version: "rbac.authorization.k8s.io/v1".to_owned(),
            kind: "ClusterRole".to_owned(),
            name: name.clone(),
            uid,
            ..OwnerReference::default()
        });
        self.now.send_if_modified(|now| {
            let differs = *now != owner;
            *now = owner;
            differs
        });
        Ok(())
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("role", &self.role).finish_non_exhaustive()
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
