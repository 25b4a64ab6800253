//! `weft install`: what an installation consists of, as YAML.
//!
//! Why it prints and applies nothing: what is going to stand in a cluster can be read first, and whoever applies it
//! (kubectl, a repository) owns it. Why what helm rendered is kept as it came: a second template would be a second
//! opinion; a test renders the chart anew wherever there is a helm.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::output::{self, Format, Output, json};
use crate::{resources::crd, source::yaml};

/// The chart with its defaults.
const CHART: &str = include_str!("install.yaml");
/// Sidecars know the controller by it.
const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: weft\n";

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft install | kubectl apply --server-side -f -\n  weft install --crds | kubectl apply --server-side -f -\n\nOther values than the defaults are the chart's business:\n  helm install weft charts/weft --namespace weft --create-namespace -f charts/weft/values-ha.yaml"
)]
pub(super) struct InstallArgs {
    /// Only the kinds of Weft (weft.dev): what the chart weft-crds holds
    #[arg(long)]
    crds: bool,
    #[command(flatten)]
    format: Format,
}

pub(super) fn main(args: &InstallArgs) -> Result<ExitCode> {
    let mut text = crd::yaml()?;
    if !args.crds {
        text = format!("{NAMESPACE}---\n{text}{CHART}");
    }
    match args.format.output {
        Output::Json => {
            let items: Result<Vec<Value>, _> =
                yaml::documents(&text).map(|(_, document)| serde_saphyr::from_str(document)).collect();
            json(&serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items? }))?;
        }
        Output::Text => output::write(&text)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        path::{Path, PathBuf},
        process::Command,
    };

    use super::*;

    /// The first helm of the test bed's cache, or of the machine.
    fn helm() -> Option<PathBuf> {
        let home = std::env::var_os("WEFT_CLUSTER_CACHE").map(PathBuf::from);
        let home = home.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cluster"));
        let pieces = std::fs::read_dir(home.join("bin")).ok().into_iter().flatten();
        let cached = pieces.flatten().map(|piece| piece.path().join("helm"));
        let known = cached.chain(["/usr/local/bin/helm", "/usr/bin/helm"].map(PathBuf::from));
        known.into_iter().find(|path| path.is_file())
    }

    #[test]
    fn what_is_printed_is_what_helm_renders() {
        let Some(helm) = helm() else {
            assert!(std::env::var_os("WEFT_HELM").is_none(), "there should be a helm, and there is none");
            // Heard although the test passes.
            let said = b"skipped: no helm to compare `weft install` with; `make test-cluster` compares\n";
            std::io::stderr().write_all(said).unwrap();
            return;
        };
        let chart = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../charts/weft");
        let folder = std::env::temp_dir().join("weft-helm-test");
        let output = Command::new(helm)
            .args(["template", "weft", "--namespace", "weft", "--kube-version", "1.29.0"])
            .arg(chart)
            .envs(["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"].map(|name| (name, &folder)))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let objects = |text: &str| {
            let mut objects: Vec<String> = yaml::documents(text)
                .map(|(_, document)| serde_saphyr::from_str::<Value>(document).unwrap().to_string())
                .collect();
            objects.sort();
            objects
        };
        let rendered = String::from_utf8(output.stdout).unwrap();
        if std::env::var_os("WEFT_BLESS").is_some() {
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/cli/install.yaml");
            std::fs::write(path, &rendered).unwrap();
        } else {
            assert_eq!(objects(CHART), objects(&rendered), "WEFT_BLESS=1 writes it anew");
        }
    }

    #[test]
    fn the_chart_grants_what_the_controller_asks_for_and_no_more() {
        use crate::k8s::{CLUSTER_GRANTS, Grant, OWN_GRANTS};
        let asked = |grants: &[Grant]| {
            let rule = |grant: &Grant| {
                let mut rule = serde_json::json!({
                    "apiGroups": [grant.group], "resources": grant.resources, "verbs": grant.verbs });
                if !grant.names.is_empty() {
                    rule["resourceNames"] = grant.names.into();
                }
                rule.to_string()
            };
            grants.iter().map(rule).collect::<std::collections::BTreeSet<_>>()
        };
        let granted = |kind: &str| {
            let objects =
                yaml::documents(CHART).map(|(_, text)| serde_saphyr::from_str::<Value>(text).unwrap());
            let mut roles = objects.filter(|object| object["kind"] == kind);
            let role = roles.next().unwrap();
            assert!(roles.next().is_none());
            role["rules"].as_array().unwrap().iter().map(Value::to_string).collect()
        };
        assert_eq!(asked(CLUSTER_GRANTS), granted("ClusterRole"));
        assert_eq!(asked(OWN_GRANTS), granted("Role"));
    }
}
