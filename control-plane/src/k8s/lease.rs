//! Which replica writes status: one at a time, by a Lease.
//!
//! Why only status: every replica serves, signs and keeps anchors, so a lease that nobody holds for half a minute
//! costs nobody anything but news.
//!
//! Why the holder writes the lease's owner: whoever made it may have gone, and so may the installation that it was of.

use std::time::Duration;

use k8s_openapi::{api::coordination::v1::Lease, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use kube_lease_manager::LeaseManagerBuilder;
use serde_json::json;
use tokio::{sync::watch, time::sleep};

use super::owner::Owner;
use crate::resources::CONTROL_NAMESPACE;

/// Tries to hold the lease, for ever; `leads` says whether it does.
pub async fn hold(client: Client, identity: String, owner: Owner, leads: watch::Sender<bool>) {
    // Two that had one name would both lead.
    let identity = match identity.is_empty() {
        true => format!("weft-controller-{:016x}", rand::random::<u64>()),
        false => identity,
    };
    let leases: Api<Lease> = Api::namespaced(client.clone(), CONTROL_NAMESPACE);
    let mut owners = owner.changes();
    loop {
        let built = LeaseManagerBuilder::new(client.clone(), LEASE)
            .with_namespace(CONTROL_NAMESPACE)
            .with_identity(identity.as_str())
            .with_field_manager(format!("weft-{identity}"))
            .with_duration(DURATION)
            .with_grace(GRACE)
            .build()
            .await;
        match built {
            Ok(manager) => {
                let (mut held, _task) = manager.watch().await;
                loop {
                    let now = *held.borrow_and_update();
                    leads.send_if_modified(|leads| std::mem::replace(leads, now) != now);
                    let owner = owners.borrow_and_update().clone();
                    if let Some(owner) = owner.filter(|_| now)
                        && let Err(error) = own(&leases, &owner).await
                    {
                        tracing::warn!(%error, "the lease has no owner: it stays when Weft is uninstalled");
                    }
                    let changed = tokio::select! {
                        changed = held.changed() => changed,
                        changed = owners.changed() => changed,
                    };
                    if changed.is_err() {
                        break;
                    }
                }
                leads.send_replace(false);
            }
            Err(error) => tracing::debug!(%error, "the lease cannot be asked for"),
        }
        sleep(RETRY).await;
    }
}

async fn own(leases: &Api<Lease>, owner: &OwnerReference) -> Result<(), kube::Error> {
    let mut lease = leases.get(LEASE).await?;
    if super::owner::adopt(&mut lease.metadata, Some(owner)) {
        let patch = json!({"metadata": {"ownerReferences": lease.metadata.owner_references}});
        leases.patch(LEASE, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    }
    Ok(())
}

/// Its name, in the controller's own namespace.
pub const LEASE: &str = "weft-controller";
/// Seconds until another replica may take it.
const DURATION: u64 = 15;
/// Seconds before that when the holder renews it.
const GRACE: u64 = 10;
const RETRY: Duration = Duration::from_secs(5);
