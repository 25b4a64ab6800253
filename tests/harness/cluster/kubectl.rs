//! What a test says to a cluster: kubectl's own words, so that a failed step can be tried by hand.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

use super::{Cluster, processes};

/// A command to a cluster, not yet given.
#[must_use]
pub struct Kubectl {
    command: Result<Command>,
    input: Option<String>,
}

/// What a command said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Whether it succeeded.
    pub success: bool,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Kubectl {
    pub(super) fn new(command: Result<Command>) -> Self {
        Self { command, input: None }
    }

    /// What it reads.
    pub fn input(mut self, text: &str) -> Self {
        self.input = Some(text.to_owned());
        self
    }

    /// Its output; an error unless it succeeded.
    pub fn run(self) -> Result<String> {
        let asked = self.command.as_ref().map(|command| format!("{command:?}")).unwrap_or_default();
        let said = self.ask()?;
        ensure!(said.success, "{asked}: {}{}", said.err.trim(), said.out.trim());
        Ok(said.out)
    }

    /// What it said, whether it succeeded or not.
    pub fn ask(self) -> Result<Said> {
        let mut command = self.command?;
        command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let (Some(text), Some(mut stdin)) = (self.input, child.stdin.take()) {
            stdin.write_all(text.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        Ok(Said {
            success: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The command itself, for what has to run beside the test.
    pub fn command(self) -> Result<Command> {
        self.command
    }
}

impl Cluster {
    /// Applies manifests.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.kubectl(["apply", "-f", "-"]).input(yaml).run().map(drop)
    }

    /// One object, or a list.
    pub fn get(&self, namespace: &str, what: &[&str]) -> Result<Value> {
        let text = self.kubectl([&["-n", namespace, "get", "-o", "json"], what].concat()).run()?;
        serde_json::from_str(&text).context("kubectl's JSON")
    }

    /// Waits until a Deployment is rolled out; where it is not, the error tells what its pods say.
    pub fn rolled_out(&self, namespace: &str, deployment: &str) -> Result<()> {
        let target = format!("deployment/{deployment}");
        self.kubectl(["-n", namespace, "rollout", "status", &target, "--timeout=180s"])
            .run()
            .map(drop)
            .map_err(|error| anyhow!("{error:#}\n{}", self.describe(namespace)))
    }

    /// Restarts a Deployment's pods, and waits for the new ones.
    pub fn restart(&self, namespace: &str, deployment: &str) -> Result<()> {
        self.kubectl(["-n", namespace, "rollout", "restart", &format!("deployment/{deployment}")]).run()?;
        self.rolled_out(namespace, deployment)
    }

    /// The first running pod of a label.
    pub fn pod(&self, namespace: &str, label: &str) -> Result<String> {
        let pods = self.get(namespace, &["pods", "-l", label])?;
        pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|pod| {
                pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null()
            })
            .find_map(|pod| pod["metadata"]["name"].as_str())
            .map(str::to_owned)
            .with_context(|| format!("no running pod {label} in {namespace}\n{}", self.describe(namespace)))
    }

    /// Runs a program in a container.
    pub fn exec(&self, namespace: &str, pod: &str, container: &str, args: &[&str]) -> Result<Said> {
        self.kubectl([&["-n", namespace, "exec", pod, "-c", container, "--"], args].concat()).ask()
    }

    /// A container's log.
    pub fn logs(&self, namespace: &str, pod: &str, container: &str) -> Result<String> {
        self.kubectl(["-n", namespace, "logs", pod, "-c", container]).run()
    }

    /// Removes a namespace and all in it, and waits until it is gone.
    pub fn forget(&self, namespace: &str) -> Result<()> {
        self.kubectl(["delete", "namespace", namespace, "--ignore-not-found", "--timeout=180s"])
            .run()
            .map(drop)
    }

    /// The same without waiting: for the end of a test.
    pub fn leave(&self, namespace: &str) -> Result<()> {
        let args = ["delete", "namespace", namespace, "--ignore-not-found", "--wait=false"];
        self.kubectl(args).run().map(drop)
    }

    /// Asks until it holds, for at most three minutes.
    pub fn until(&self, what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
        processes::until(what, holds)
    }

    /// Events and pods of a namespace: what a failure's reader wants to see.
    pub fn describe(&self, namespace: &str) -> String {
        let mut text = String::new();
        for what in [["get", "pods", "-o", "wide"].as_slice(), &["get", "events", "--sort-by=.lastTimestamp"]]
        {
            match self.kubectl([&["-n", namespace], what].concat()).ask() {
                Ok(said) => text.push_str(&format!("{}{}", said.out, said.err)),
                Err(error) => text.push_str(&format!("{error:#}\n")),
            }
        }
        text
    }
}
