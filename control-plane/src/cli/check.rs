//! `weft check`: is the cluster fit for Weft, and is what is installed whole? Each line with its fix.
//!
//! Why one command for before and after: what is missing before the installation is what is broken after it. What
//! can only be asked of an installation is asked when there is one.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use k8s_openapi::{
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        apps::v1::Deployment,
        core::v1::{ConfigMap, Namespace, Pod, Service},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Client,
    api::{Api, ListParams},
};
use serde::Serialize;

use super::{
    client::{Api as Controller, Asking},
    cluster::{Cluster, SERVICE},
    output::{Output, Screen, Tone, json, text},
};
use crate::{
    api::types::{Certs, Status},
    k8s::roots::INSTALLATION,
    resources::{INJECT, INJECTED, TRUST_CONFIG_MAP, lookup},
};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft check                before an installation, and after it\n  weft check -o json | jq '.[] | select(.state == \"bad\")'\n\nExit code: 1 if a line is bad."
)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    asking: Asking,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    state: State,
    /// What was looked at, and how it is.
    what: String,
    /// What to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    fix: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Good,
    Warn,
    Bad,
}

fn good(what: impl Into<String>) -> Line {
    Line { state: State::Good, what: what.into(), fix: String::new() }
}

fn warn(what: impl Into<String>, fix: impl Into<String>) -> Line {
    Line { state: State::Warn, what: what.into(), fix: fix.into() }
}

fn bad(what: impl Into<String>, fix: impl Into<String>) -> Line {
    Line { state: State::Bad, what: what.into(), fix: fix.into() }
}

pub(super) async fn main(args: &CheckArgs) -> Result<ExitCode> {
    let found = look(args).await;
    match args.asking.format.output {
        Output::Json => json(&found)?,
        Output::Text => text(&lines(&found, &Screen::stdout()))?,
    }
    let failed = found.iter().any(|line| line.state == State::Bad);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn lines(found: &[Line], screen: &Screen) -> Vec<String> {
    let mut all = Vec::new();
    for line in found {
        let (mark, tone) = match line.state {
            State::Good => ("ok  ", Tone::Good),
            State::Warn => ("warn", Tone::Warn),
            State::Bad => ("BAD ", Tone::Bad),
        };
        all.push(format!("{}  {}", screen.paint(tone, mark), line.what));
        if !line.fix.is_empty() {
            all.push(format!("      fix: {}", line.fix));
        }
    }
    all
}

async fn look(args: &CheckArgs) -> Vec<Line> {
    let namespace = &args.asking.mesh_namespace;
    let cluster = match Cluster::find(namespace).await {
        Ok(cluster) => cluster,
        Err(error) => {
            return vec![bad(
                format!("no cluster: {error:#}"),
                "set KUBECONFIG, or write ~/.kube/config; without Kubernetes there is `weft demo`",
            )];
        }
    };
    let client = cluster.client();
    let mut found = Vec::new();
    match client.apiserver_version().await {
        Ok(version) => found.push(version_line(&version.major, &version.minor)),
        Err(error) => {
            let fix = "check the address and credentials of the kubeconfig: `kubectl get --raw /version`";
            found.push(bad(format!("the API server does not answer: {error}"), fix));
            return found;
        }
    }
    found.extend(crds(client).await);
    found.extend(cilium(client).await);
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    match services.get_opt(SERVICE).await {
        Ok(Some(_)) => found.extend(installed(args, client).await),
        Ok(None) => found.push(warn(
            format!("Weft is not installed in namespace {namespace}"),
            "install it: `helm install weft charts/weft -n weft --create-namespace`",
        )),
        Err(error) => found.push(bad(
            format!("namespace {namespace} cannot be looked at: {error}"),
            "ask for the right to get services there",
        )),
    }
    found
}

/// Native sidecars are there from 1.29 on.
fn version_line(major: &str, minor: &str) -> Line {
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0_u32)
    };
    let (major, minor) = (number(major), number(minor));
    if (major, minor) >= (1, 29) {
        return good(format!("Kubernetes {major}.{minor}"));
    }
    bad(
        format!("Kubernetes {major}.{minor} has no native sidecars"),
        "upgrade the cluster to 1.29 or later: an older one ends the sidecar before the app, and Jobs never complete",
    )
}

async fn crds(client: &Client) -> Vec<Line> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let ours = ["trafficpolicies.weft.dev", "authorizationpolicies.weft.dev", "meshconfigs.weft.dev"];
    let gateway = ["httproutes.gateway.networking.k8s.io", "grpcroutes.gateway.networking.k8s.io"];
    let mut lines = Vec::new();
    let mut missing = Vec::new();
    for name in ours {
        match api.get_opt(name).await {
            Ok(Some(_)) => {}
            Ok(None) => missing.push(name),
            Err(error) => {
                lines.push(warn(
                    format!("{name} cannot be looked at: {error}"),
                    "ask for the right to get customresourcedefinitions",
                ));
                return lines;
            }
        }
    }
    lines.push(match missing.as_slice() {
        [] => good("Weft's own kinds are there"),
        missing => warn(
            format!("kinds are missing: {}", missing.join(", ")),
            "install them: `helm install weft-crds charts/weft-crds`; the controller picks them up",
        ),
    });
    let mut missing = Vec::new();
    let mut version = String::new();
    for name in gateway {
        match api.get_opt(name).await {
            Ok(Some(crd)) => {
                let bundle = lookup(&crd.metadata.annotations, "gateway.networking.k8s.io/bundle-version");
                version = bundle.unwrap_or("of an unknown version").to_owned();
            }
            Ok(None) | Err(_) => missing.push(name),
        }
    }
    lines.push(match missing.as_slice() {
        [] => good(format!("Gateway API {version}")),
        missing => warn(
            format!("no routes: {} is missing", missing.join(", ")),
            "install Gateway API's standard kinds (kubernetes-sigs/gateway-api, v1.6.3, standard-install.yaml); \
             plain Services work without",
        ),
    });
    lines
}

/// A CNI that translates ClusterIPs in the socket hides from the sidecar what the app dialled.
async fn cilium(client: &Client) -> Option<Line> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let data = maps.get_opt("cilium-config").await.ok().flatten()?.data.unwrap_or_default();
    let on = |key: &str| data.get(key).is_some_and(|value| matches!(value.as_str(), "true" | "strict"));
    Some(cilium_line(on("kube-proxy-replacement") || on("bpf-lb-sock"), on("bpf-lb-sock-hostns-only")))
}

fn cilium_line(in_socket: bool, host_only: bool) -> Line {
    if in_socket && !host_only {
        return bad(
            "Cilium translates ClusterIPs in the pod's socket: sidecars see pods and no Services, so no route applies",
            "set `socketLB.hostNamespaceOnly=true` in Cilium's Helm values, and restart its agents",
        );
    }
    good("Cilium leaves ClusterIPs to the sidecar")
}

async fn installed(args: &CheckArgs, client: &Client) -> Vec<Line> {
    let namespace = &args.asking.mesh_namespace;
    let mut found = Vec::new();
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    match deployments.get_opt(SERVICE).await {
        Ok(Some(deployment)) => {
            let wanted = deployment.spec.and_then(|spec| spec.replicas).unwrap_or(1);
            let ready = deployment.status.and_then(|status| status.ready_replicas).unwrap_or(0);
            found.push(match ready {
                ready if ready >= wanted => good(format!("{ready} of {wanted} controllers are ready")),
                ready => bad(
                    format!("{ready} of {wanted} controllers are ready"),
                    format!("see why: `kubectl -n {namespace} describe pods` and `kubectl -n {namespace} logs deploy/{SERVICE}`"),
                ),
            });
        }
        Ok(None) | Err(_) => found.push(bad(
            format!("there is no Deployment {SERVICE}, but its Service"),
            "install again: `helm upgrade --install weft charts/weft`",
        )),
    }
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    match webhooks.list(&ListParams::default()).await {
        Err(error) => found.push(warn(
            format!("the injection webhook cannot be looked at: {error}"),
            "ask for the right to list mutatingwebhookconfigurations",
        )),
        Ok(all) => {
            let hooks: Vec<_> =
                all.items.iter().flat_map(|config| config.webhooks.iter().flatten()).collect();
            let ours: Vec<_> = hooks.iter().filter(|hook| hook.name.ends_with("weft.dev")).collect();
            let certified = ours.iter().all(|hook| hook.client_config.ca_bundle.is_some());
            found.push(match (ours.is_empty(), certified) {
                (true, _) => bad(
                    "nothing injects sidecars: the webhook is missing",
                    "install again with the injector on",
                ),
                (false, false) => bad(
                    "the injection webhook has no certificate yet",
                    format!("the controller writes it: see `kubectl -n {namespace} logs deploy/{SERVICE}`"),
                ),
                (false, true) => good("the injection webhook is there"),
            });
        }
    }
    found.extend(injection(client, namespace).await);
    match Controller::find(&args.asking).await {
        Ok(controller) => {
            match controller.get::<Status>("/api/v1/status").await {
                Ok(status) => found.extend(status_lines(&status)),
                Err(error) => {
                    found.push(bad(format!("the controller cannot be asked: {error:#}"), logs(namespace)))
                }
            }
            if let Ok(certs) = controller.get::<Certs>("/api/v1/certs").await {
                found.extend(anchor_line(&certs, k8s_openapi::jiff::Timestamp::now().as_second()));
            }
        }
        Err(error) => found.push(bad(
            format!("the controller cannot be reached: {error:#}"),
            format!("ask for the right to create pods/portforward in {namespace}, or {}", logs(namespace)),
        )),
    }
    found
}

/// A namespace that another installation's sidecars live in.
fn foreign_line(namespace: &str, of: &str) -> Line {
    bad(
        format!("namespace {namespace} is of the Weft in namespace {of}"),
        format!(
            "a namespace belongs to one mesh: take the label {INJECT} away here, or uninstall that Weft and run \
             `kubectl -n {namespace} delete configmap {TRUST_CONFIG_MAP}`"
        ),
    )
}

/// A pod of `<ns>/<pod>`, or of the name alone, as kubectl takes it.
fn in_namespace(pod: &str) -> String {
    match pod.split_once('/') {
        Some((namespace, name)) => format!("-n {namespace} {name}"),
        None => format!("-n {} {pod}", crate::resources::CONTROL_NAMESPACE),
    }
}

fn logs(namespace: &str) -> String {
    format!("see why: `kubectl -n {namespace} logs deploy/{SERVICE}`")
}

async fn injection(client: &Client, mesh: &str) -> Vec<Line> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let labelled = ListParams::default().labels(&format!("{INJECT}=enabled"));
    let injected = match namespaces.list(&labelled).await {
        Ok(injected) => injected,
        Err(error) => {
            return vec![warn(
                format!("namespaces cannot be looked at: {error}"),
                "ask for the right to list namespaces, and pods and configmaps in them",
            )];
        }
    };
    if injected.items.is_empty() {
        return vec![warn(
            "no namespace asks for sidecars",
            format!("label one: `kubectl label namespace NAME {INJECT}=enabled`, and restart its pods"),
        )];
    }
    let mut found = Vec::new();
    for namespace in injected.items.into_iter().filter_map(|namespace| namespace.metadata.name) {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
        match maps.get_opt(TRUST_CONFIG_MAP).await {
            Ok(None) => found.push(bad(
                format!(
                    "namespace {namespace} has no ConfigMap {TRUST_CONFIG_MAP}: its sidecars cannot start"
                ),
                "the controller makes it: see its logs, and that its ClusterRole lets it write configmaps",
            )),
            Ok(Some(map)) => {
                let of = lookup(&map.metadata.annotations, INSTALLATION);
                found.extend(of.filter(|of| *of != mesh).map(|of| foreign_line(&namespace, of)));
            }
            Err(_) => {}
        }
        let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let Ok(pods) = pods.list(&ListParams::default()).await else { continue };
        let (with, without): (Vec<_>, Vec<_>) = pods
            .items
            .iter()
            .filter(|pod| {
                let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
                !matches!(phase, Some("Succeeded" | "Failed"))
            })
            .partition(|pod| lookup(&pod.metadata.annotations, INJECTED) == Some("true"));
        let names: Vec<_> = without.iter().filter_map(|pod| pod.metadata.name.as_deref()).take(5).collect();
        found.push(match without.len() {
            0 => good(format!("namespace {namespace}: {} pods have a sidecar", with.len())),
            n => warn(
                format!("namespace {namespace}: {n} pods have no sidecar: {}", names.join(", ")),
                format!("restart what is older than the label: `kubectl -n {namespace} rollout restart deployment`"),
            ),
        });
    }
    found
}

fn status_lines(status: &Status) -> Vec<Line> {
    let mut found = Vec::new();
    found.push(match status.synced {
        true => good(format!("the controller has read {} objects", status.objects.len())),
        false => bad(
            "the controller has not read the cluster yet",
            "see what it lacks in `weft status`: often a right of its ClusterRole",
        ),
    });
    for problem in status.problems.iter().take(10) {
        let object = if problem.object.is_empty() { "the source" } else { &problem.object };
        let field = if problem.field.is_empty() { String::new() } else { format!(" {}", problem.field) };
        found.push(bad(
            format!("{object}:{field} {}", problem.reason),
            "change it there; `weft status` shows all",
        ));
    }
    let (connected, all) = (status.sidecars.iter().filter(|s| s.connected).count(), status.sidecars.len());
    found.push(match all - connected {
        0 => good(format!("{all} sidecars are connected")),
        n => warn(
            format!("{n} of {all} sidecars are not connected"),
            "they serve with what they know; `weft status` names them",
        ),
    });
    for lost in status.replicas.iter().filter(|replica| !replica.answered) {
        found.push(warn(
            format!("replica {} does not answer the others", lost.name),
            format!(
                "what its sidecars say is missing in this answer; see why: `kubectl logs {}`",
                in_namespace(&lost.name)
            ),
        ));
    }
    found
}

fn anchor_line(certs: &Certs, now: i64) -> Option<Line> {
    let end = certs.anchors.iter().filter(|anchor| anchor.signing).map(|anchor| anchor.not_after).min()?;
    let days = (end - now) / 86_400;
    Some(match days {
        ..30 => bad(
            format!("the root that signs ends in {days} days"),
            "rotate it: `weft certs --rotate add`, then `activate`, then `retire`, each when the one before is live",
        ),
        30.. => good(format!("the root that signs is good for {days} days")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{Anchor, ProblemStatus, SidecarStatus};

    #[test]
    fn every_bad_line_says_what_to_do() {
        assert_eq!(version_line("1", "36").state, State::Good);
        assert_eq!(version_line("1", "28+").state, State::Bad);
        assert_eq!(cilium_line(true, false).state, State::Bad);
        assert_eq!(cilium_line(true, true).state, State::Good);
        let status = Status {
            problems: vec![ProblemStatus {
                object: "HTTPRoute/shop/r".to_owned(),
                ..ProblemStatus::default()
            }],
            sidecars: vec![SidecarStatus::default()],
            ..Status::default()
        };
        let mut found = status_lines(&status);
        assert_eq!(found.iter().filter(|line| line.state != State::Good).count(), 3, "{found:?}");
        let ends = |not_after| Certs {
            anchors: vec![Anchor { signing: true, not_after, ..Anchor::default() }],
            ..Certs::default()
        };
        assert_eq!(anchor_line(&ends(100 * 86_400), 0).unwrap().state, State::Good);
        found.extend(anchor_line(&ends(86_400), 0));
        found.extend([version_line("1", "20"), cilium_line(true, false), foreign_line("shop", "other")]);
        assert!(found.iter().all(|line| line.state == State::Good || !line.fix.is_empty()), "{found:?}");
        let text = lines(&found, &Screen::plain(80)).join("\n");
        assert!(text.contains("BAD   Kubernetes 1.20") && text.contains("fix: upgrade"), "{text}");
    }
}
