//! The way to a controller in a cluster: what `kubectl port-forward` does, without kubectl.
//!
//! Why a pod and not the Service: the API is on the pod's loopback, where only whoever may forward ports to the
//! controller's pods gets. Which pods these are the Service's own selector says, so no label is known here. Any
//! one will do: a controller asks its replicas.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{
    Client,
    api::{Api, ListParams},
};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::k8s;

/// A cluster with a controller in it.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    namespace: String,
}

impl Cluster {
    /// The kubeconfig's cluster, or the one that this runs in.
    pub(crate) async fn find(namespace: &str) -> Result<Self> {
        Ok(Self { client: k8s::client().await?, namespace: namespace.to_owned() })
    }

    /// Whether there is a kubeconfig, or this is a pod: looking costs nothing.
    pub(crate) fn is_there() -> bool {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let home = std::env::var_os("HOME").map(std::path::PathBuf::from);
        set("KUBECONFIG")
            || set("KUBERNETES_SERVICE_HOST")
            || home.is_some_and(|home| home.join(".kube/config").is_file())
    }

    /// The client.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// A connection to the API of one controller that is ready, and its pod's name.
    pub(crate) async fn connect(
        &self,
    ) -> Result<(String, impl AsyncRead + AsyncWrite + Unpin + Send + use<>)> {
        let pods = self.controllers().await?;
        let mut tried = Vec::new();
        for pod in pods {
            let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
            let port = weft_core::ports::API;
            match api.portforward(&pod, &[port]).await {
                Ok(mut forward) => {
                    if let Some(stream) = forward.take_stream(port) {
                        return Ok((pod, stream));
                    }
                }
                Err(error) => tried.push(format!("{pod}: {error}")),
            }
        }
        bail!(
            "no controller in namespace {0} could be reached: {1}\n  \
             may you forward ports to it?   kubectl auth can-i create pods/portforward -n {0}",
            self.namespace,
            tried.join("; ")
        )
    }

    /// Names of the controller's pods that are ready.
    pub(crate) async fn controllers(&self) -> Result<Vec<String>> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let service = services
            .get_opt(SERVICE)
            .await
            .context("the cluster cannot be asked for its Services: see `weft check`")?;
        let Some(service) = service else {
            bail!(
                "there is no Service {SERVICE} in namespace {0}: Weft is not installed there\n  \
                 install it:              weft install, or helm install weft\n  \
                 or name its namespace:   --mesh-namespace NAME",
                self.namespace
            );
        };
        let selector: BTreeMap<_, _> = service.spec.and_then(|spec| spec.selector).unwrap_or_default();
        let labels: Vec<_> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pods = pods.list(&ListParams::default().labels(&labels.join(","))).await?;
        let ready: Vec<_> =
            pods.items.into_iter().filter(is_ready).filter_map(|pod| pod.metadata.name).collect();
        if ready.is_empty() {
            bail!("no controller is ready in namespace {}: see `weft check`", self.namespace);
        }
        Ok(ready)
    }
}

/// Whether a pod is ready.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
        && pod.metadata.deletion_timestamp.is_none()
}

/// The controller's Service.
pub(crate) const SERVICE: &str = "weft-controller";
