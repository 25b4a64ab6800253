//! Weft on the cluster: installed as its users install it, by helm, from the charts and the images of this tree.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::builds::{self, Piece};
use super::kubectl::{Kubectl, Said};
use super::{Cluster, repository};

/// Where the controller runs.
pub const NAMESPACE: &str = "weft";
const IMAGES: [&str; 3] = ["weft-proxy", "weft-controller", "weft-iptables"];

impl Cluster {
    /// Imports what `make images` wrote, once for each time that it was written. `true` if something was new.
    pub fn load_weft(&self) -> Result<bool> {
        let folder = repository().join("target/images");
        let archives: Vec<_> = IMAGES.iter().map(|name| folder.join(format!("{name}.tar"))).collect();
        let mut made = String::new();
        for archive in &archives {
            let found = fs::metadata(archive)
                .with_context(|| format!("{} is missing (make images)", archive.display()))?;
            made.push_str(&format!("{} {:?}\n", archive.display(), found.modified()?));
        }
        let loaded = self.state.join("weft-images");
        if fs::read_to_string(&loaded).is_ok_and(|before| before == made) {
            return Ok(false);
        }
        self.load(&archives)?;
        fs::write(loaded, made)?;
        Ok(true)
    }

    /// helm, of either version.
    pub fn helm(&self, helm: Piece, args: &[&str]) -> Kubectl {
        self.tool(helm, "helm", args)
    }

    /// Installs the charts as they are, with values (`name=value`); upgrades what is there.
    pub fn install_weft(&self, helm: Piece, values: &[&str]) -> Result<()> {
        self.load_weft()?;
        for chart in ["weft-crds", "weft"] {
            let path = chart_path(chart).display().to_string();
            let mut args = vec!["upgrade", "--install", chart, &path, "-n", NAMESPACE, "--create-namespace"];
            args.extend(["--wait", "--timeout", "180s"]);
            if chart == "weft" {
                args.extend(values.iter().flat_map(|value| ["--set", value]));
            }
            self.helm(helm, &args)
                .run()
                .map_err(|error| error.context(self.describe(NAMESPACE)))
                .with_context(|| format!("helm could not install {chart}"))?;
        }
        // One that ends still answers the API server on its old connection, and injects what was right before.
        self.until("an end of the controllers before", || {
            let pods = self.get(NAMESPACE, &["pods"])?;
            let pods = pods["items"].as_array().context("no list of pods")?;
            Ok(pods.iter().all(|pod| pod["metadata"]["deletionTimestamp"].is_null()))
        })
    }

    /// Removes both charts.
    pub fn helm_uninstall(&self, helm: Piece) -> Result<()> {
        for chart in ["weft", "weft-crds"] {
            self.helm(helm, &["uninstall", chart, "-n", NAMESPACE, "--ignore-not-found", "--wait"]).run()?;
        }
        Ok(())
    }

    /// The same, and what helm leaves to its user: the namespace.
    pub fn uninstall_weft(&self, helm: Piece) -> Result<()> {
        self.helm_uninstall(helm)?;
        self.forget(NAMESPACE)
    }

    /// Weft as it is by default, installed by helm 4 if it is not, and made of the images of now.
    pub fn with_weft(&self) -> Result<()> {
        let there = self.kubectl(["-n", NAMESPACE, "get", "deployment", "weft-controller"]).ask()?.success;
        if !there {
            return self.install_weft(builds::HELM4, &[]);
        }
        if self.load_weft()? {
            self.restart(NAMESPACE, "weft-controller")?;
        }
        Ok(())
    }

    /// The command `weft`, through the API server.
    pub fn weft(&self, args: &[&str]) -> Kubectl {
        self.program(Ok(repository().join("target/images/programs/weft")), args)
    }

    /// What `weft` says as JSON, whatever its exit code.
    pub fn weft_json(&self, args: &[&str]) -> Result<Value> {
        let Said { out, err, .. } = self.weft(&[args, &["-o", "json"]].concat()).ask()?;
        serde_json::from_str(&out).with_context(|| format!("weft {args:?}: {err}{out}"))
    }

    /// The controller's pods that run.
    pub fn controllers(&self) -> Result<Vec<String>> {
        let pods = self.get(NAMESPACE, &["pods", "-l", "app.kubernetes.io/component=controller"])?;
        let names = pods["items"].as_array().into_iter().flatten();
        let names: Vec<_> = names
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .filter_map(|pod| pod["metadata"]["name"].as_str())
            .map(str::to_owned)
            .collect();
        ensure!(!names.is_empty(), "no controller runs\n{}", self.describe(NAMESPACE));
        Ok(names)
    }
}

/// A chart of this tree.
pub fn chart_path(chart: &str) -> PathBuf {
    repository().join("charts").join(chart)
}
