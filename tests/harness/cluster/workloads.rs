//! Workloads for tests: objects as JSON, a load that outlives the API server, and a pod's processes from outside.
//!
//! Why the load tells what it saw through a folder of its node and not through `kubectl logs`: it must be heard while
//! the API server is away, and while its own pod is on its way out.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use weft_core::ports::ADMIN;

use super::images::TESTAPP;
use super::{Cluster, processes};
use crate::apps::Summary;

/// What asks the injector for sidecars in a whole namespace.
pub const INJECTED: (&str, &str) = ("weft.dev/inject", "enabled");

/// A namespace.
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let labels: serde_json::Map<_, _> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A container of the tests' app.
pub fn testapp(name: &str, args: &[&str]) -> Value {
    json!({
        "name": name,
        "image": TESTAPP,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
    })
}

/// An HTTP server on port 8080 that answers as `name`, and finishes what it has begun when it is told to end.
pub fn server(name: &str) -> Value {
    let mut container = testapp("app", &["http", "--port", "8080", "--name", name]);
    container["readinessProbe"] = json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1});
    container
}

/// A Deployment of pods of one label, `app: NAME`.
pub fn deployment(namespace: &str, name: &str, replicas: u32, spec: Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
        },
    })
}

/// Its Service: port 80 for HTTP.
pub fn service(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    })
}

/// A pod.
pub fn pod(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": spec,
    })
}

/// Requests in open loop from a pod of the cluster.
#[derive(Debug)]
pub struct Load {
    folder: PathBuf,
    pod: String,
    namespace: String,
}

impl Cluster {
    /// Applies objects.
    pub fn apply_all(&self, objects: &[Value]) -> Result<()> {
        self.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string())
    }

    /// Starts requests to a URL from a pod of a node: so many a second until it is ended. Returns once some have been
    /// answered.
    pub fn load_from(&self, node: usize, namespace: &str, url: &str, rate: u32) -> Result<Load> {
        let name = format!("load-{}", uid());
        let folder = self.state.join(&name);
        fs::create_dir_all(&folder)?;
        // The app is nobody in particular.
        std::os::unix::fs::chown(&folder, Some(1000), Some(1000))?;
        let rate = rate.to_string();
        let mut container = testapp("load", &["load", "--url", url, "--rate", &rate, "--seconds", "36000"]);
        for arg in ["--half-post", "--until", "/told/end", "--status", "/told/status"] {
            container["args"].as_array_mut().context("arguments")?.push(arg.into());
        }
        container["volumeMounts"] = json!([{"name": "told", "mountPath": "/told"}]);
        let spec = json!({
            "nodeName": self.nodes[node].name(),
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [{"name": "told", "hostPath": {"path": folder, "type": "Directory"}}],
        });
        self.apply_all(&[pod(namespace, &name, spec)])?;
        let load = Load { folder, pod: name, namespace: namespace.to_owned() };
        load.more(100).map_err(|error| error.context(self.describe(namespace)))?;
        Ok(load)
    }

    /// The processes of a pod's containers, by their command line: containers are this machine's processes.
    pub fn processes(&self, namespace: &str, pod: &str) -> Result<Vec<(u32, String)>> {
        let found = self.get(namespace, &["pod", pod])?;
        let uid = found["metadata"]["uid"].as_str().context("a uid")?;
        Ok(processes::of_group(&format!("pod{uid}")))
    }

    /// The process of a pod whose command line begins so.
    pub fn process(&self, namespace: &str, pod: &str, program: &str) -> Result<u32> {
        let all = self.processes(namespace, pod)?;
        let found = all.iter().find(|(_, command)| command.starts_with(program));
        found.map(|(pid, _)| *pid).with_context(|| format!("{pod} runs no {program}: {all:?}"))
    }

    /// The sum of a sidecar's metric of a name and a label's value (empty: any), asked through the API server.
    pub fn metric(&self, namespace: &str, pod: &str, name: &str, label: &str) -> Result<f64> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{ADMIN}/proxy/metrics");
        let text = self.kubectl(["get", "--raw", &path]).run()?;
        let of = |line: &&str| {
            let rest = line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '{']));
            rest.is_some_and(|rest| label.is_empty() || rest.contains(&format!("\"{label}\"")))
        };
        let values = text.lines().filter(of).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }

    /// How often the containers of a label's pods were started again, with the pods' uids.
    pub fn restarts(&self, namespace: &str, label: &str) -> Result<Vec<(String, u64)>> {
        let pods = self.get(namespace, &["pods", "-l", label])?;
        let mut found: Vec<_> = pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|pod| {
                let count = ["initContainerStatuses", "containerStatuses"]
                    .iter()
                    .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
                    .map(|status| status["restartCount"].as_u64().unwrap_or(0))
                    .sum();
                (pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned(), count)
            })
            .collect();
        found.sort();
        Ok(found)
    }
}

impl Load {
    /// What has come of it so far.
    pub fn so_far(&self) -> Result<Summary> {
        let path = self.folder.join("status");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Waits until so many more have been sent.
    pub fn more(&self, count: u64) -> Result<()> {
        let sent = || self.so_far().map_or(0, |summary| summary.sent);
        let before = sent();
        processes::until("more requests", || Ok(sent() >= before + count))
            .with_context(|| format!("{:?}", self.so_far()))
    }

    /// Ends it, and waits until its pod has completed, sidecar and all.
    pub fn end(self, cluster: &Cluster) -> Result<Summary> {
        fs::write(self.folder.join("end"), "")?;
        processes::until("the load's end", || Ok(self.so_far()?.done))?;
        let summary = self.so_far()?;
        let done =
            ["-n", &self.namespace, "wait", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"];
        cluster.kubectl([&done[..], &["pod", &self.pod]].concat()).run()?;
        cluster.kubectl(["-n", &self.namespace, "delete", "pod", &self.pod]).run()?;
        fs::remove_dir_all(&self.folder)?;
        Ok(summary)
    }

    /// Ends it, says what came of it, and holds that none failed.
    pub fn none_failed(self, cluster: &Cluster, what: &str) -> Result<()> {
        let seen = self.end(cluster)?;
        println!("figure: {what}: {} of {} requests failed (bound 0)", seen.failed, seen.sent);
        ensure!(seen.failed == 0, "{what}: {seen:?}");
        Ok(())
    }
}

fn uid() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    format!("{:x}", now.as_millis())
}
