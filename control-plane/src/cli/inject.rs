//! `weft inject`: manifests in, the same manifests with sidecars out.
//!
//! Why offline: what the cluster's injector would do can be read, reviewed and committed before any cluster has seen
//! it. It is the same function, so there is no second opinion.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::output::{self, Format, Output, json};
use crate::{
    injector::{Outcome, Values, annotations, inject},
    source::yaml,
};

#[derive(Debug, Args)]
#[command(
    after_help = format!("Examples:\n  weft inject -f deployment.yaml | kubectl apply -f -\n  kubectl get deploy web -o yaml | weft inject -f -\n\n{}\n\nWhat became of each workload is told on standard error. Exit status: 0, or 1 if one was refused.", annotations::help())
)]
pub(super) struct InjectArgs {
    /// A file or a folder of YAML or JSON; `-` reads standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// The installation's values for sidecars: the ConfigMap weft-injector has them
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

pub(super) fn main(args: &InjectArgs) -> Result<ExitCode> {
    let values = args.values.as_deref().map_or_else(|| Ok(Values::default()), Values::read)?;
    let mut work = Work { values: &values, done: Vec::new(), refused: false };
    for (name, text) in read(&args.file)? {
        for (line, document) in yaml::documents(&text) {
            let value: Value =
                serde_saphyr::from_str(document).with_context(|| format!("{name}:{line}: not readable"))?;
            let value = work.object(value).with_context(|| format!("{name}:{line}"))?;
            work.done.push(value);
        }
    }
    match args.format.output {
        Output::Json => json(&serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": work.done }))?,
        Output::Text => {
            let documents: Result<Vec<String>, _> = work.done.iter().map(serde_saphyr::to_string).collect();
            output::write(&documents?.join("---\n"))?;
        }
    }
    Ok(if work.refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn read(path: &Path) -> Result<Vec<(String, String)>> {
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("standard input")?;
        return Ok(vec![("standard input".to_owned(), text)]);
    }
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        files = fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        let is_manifest = |file: &PathBuf| {
            file.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json")
        };
        files.retain(is_manifest);
        files.sort();
    }
    let read = |file: PathBuf| {
        let name = file.display().to_string();
        let text = fs::read_to_string(&file).with_context(|| name.clone())?;
        Ok((name, text))
    };
    files.into_iter().map(read).collect()
}

struct Work<'a> {
    values: &'a Values,
    done: Vec<Value>,
    refused: bool,
}

impl Work<'_> {
    fn object(&mut self, mut object: Value) -> Result<Value> {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        let template = match kind.as_str() {
            "List" => {
                if let Some(items) = object["items"].as_array_mut() {
                    for item in items {
                        *item = self.object(item.take())?;
                    }
                }
                return Ok(object);
            }
            "Pod" => "",
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" | "Job" => {
                "/spec/template"
            }
            "CronJob" => "/spec/jobTemplate/spec/template",
            _ => return Ok(object),
        };
        let meta = &object["metadata"];
        let parts = [Some(kind.as_str()), meta["namespace"].as_str(), meta["name"].as_str()];
        let name = parts.into_iter().flatten().collect::<Vec<_>>().join("/");
        let Some(pod) = object.pointer_mut(template).filter(|pod| pod.is_object()) else {
            return Err(anyhow!("{name}: {} is missing", template.trim_start_matches('/').replace('/', ".")));
        };
        // A template may leave its metadata out, a pod may not.
        if pod["metadata"].is_null() {
            pod["metadata"] = serde_json::json!({});
        }
        let mut read = serde_path_to_error::Track::new();
        let typed: Pod =
            serde::Deserialize::deserialize(serde_path_to_error::Deserializer::new(&*pod, &mut read))
                .map_err(|error| anyhow!("{name}: {}: {error}", read.path()))?;
        match inject(&typed, true, self.values) {
            Ok(Outcome::Inject(patch)) => {
                json_patch::patch(pod, &patch).with_context(|| name.clone())?;
                eprintln!("{name}: injected");
            }
            Ok(Outcome::Skip(reason, patch)) => {
                json_patch::patch(pod, &patch).with_context(|| name.clone())?;
                eprintln!("{name}: skipped: {reason}");
            }
            Ok(Outcome::Leave(reason)) => eprintln!("{name}: left as it is: {reason}"),
            Err(refused) => {
                self.refused = true;
                eprintln!("{name}: refused: {refused}");
            }
        }
        Ok(object)
    }
}
