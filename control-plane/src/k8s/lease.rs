//! Which replica writes status: one at a time, by a Lease.
//!
//! Why only status: every replica serves, signs and keeps anchors, so a lease that nobody holds for half a minute
//! costs nobody anything but news.

use std::time::Duration;

use kube::Client;
use kube_lease_manager::LeaseManagerBuilder;
use tokio::{sync::watch, time::sleep};

/// Tries to hold the lease, for ever; `leads` says whether it does.
pub async fn hold(client: Client, namespace: String, identity: String, leads: watch::Sender<bool>) {
    loop {
        let built = LeaseManagerBuilder::new(client.clone(), LEASE)
            .with_namespace(namespace.as_str())
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
                    if held.changed().await.is_err() {
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

/// Its name, in the controller's own namespace.
pub const LEASE: &str = "weft-controller";
/// Seconds until another replica may take it.
const DURATION: u64 = 15;
/// Seconds before that when the holder renews it.
const GRACE: u64 = 10;
const RETRY: Duration = Duration::from_secs(5);
