//! Pod + values → JSON patch, or why not. Pure.
//!
//! # What is added
//! - `weft-init`: root with NET_ADMIN and NET_RAW and nothing else, and gone when the app starts; where a CNI plugin
//!   captures, `weft-check`, which can do nothing and only looks whether it did;
//! - `weft-proxy`, a native sidecar (an init container that is restarted always): started before everything of the
//!   app, its own init containers included, and stopped after all of it. So the app's first request and its last one
//!   find a mesh, and a Job ends.
//!
//! Both come first: what stands after them has a network, what would stand before them would have none.
//!
//! # What is changed
//! TCP probes. A captured port accepts every connection (the kernel does, before the sidecar hears of it), so a TCP
//! probe would always pass. The sidecar tries the app's port in its place: the probe asks its admin port. Probes by
//! HTTP and gRPC stay as they are; the controller reads their ports and paths from the pod and admits exactly these.
//!
//! When the app's containers hear of their end: an app that exits at once takes with it what a kept connection has just
//! brought, while callers do not know yet that the pod is leaving. A POST that may have been read is nobody's to repeat.
//! So they sleep for a few seconds first (`preStop.sleep`), unless they have a preStop of their own. What ends by itself,
//! a Job, runs no preStop. Kubernetes 1.29 has the field only behind a gate, and drops it where that is shut.
//!
//! # What is refused
//! A pod that would be only half in the mesh: a container that runs as the sidecar's user is not captured, a container
//! that listens on the sidecar's ports is not reached. A pod that shares its node's network is left alone instead, and
//! says so in an annotation: capture would capture the node.
//!
//! Why a pod that has its sidecar is looked at again: other webhooks add containers after this one was asked, and these
//! are held to the same. It is asked again when they have (`reinvocationPolicy`).

use std::{fmt, net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;
use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation, jsonptr::PointerBuf};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde_json::{Value, json};
use weft_core::ports;

use super::{
    Values,
    annotations::{Annotations, NOT_INJECTED, PRESTOP_SLEEP, VERSION, Wrong, show},
};
use crate::{
    index::parse_ports,
    resources::{INJECT, INJECTED, TOKEN_AUDIENCE, TRUST_CONFIG_MAP, TRUST_KEY, probes},
};

/// What becomes of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It gets a sidecar.
    Inject(Patch),
    /// It asked for one and cannot have one: the reason, and the patch that writes it down.
    Skip(&'static str, Patch),
    /// Nothing to do: it does not want one, or has one already.
    Leave(&'static str),
}

/// Why a pod cannot be admitted as it is: everything that is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Refused(pub Vec<String>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl From<Vec<Wrong>> for Refused {
    fn from(wrong: Vec<Wrong>) -> Self {
        Self(wrong.iter().map(ToString::to_string).collect())
    }
}

/// Decides about one pod. `by_default`: whether its namespace asks for sidecars.
///
/// # Errors
/// The pod must not be admitted as it is.
pub fn inject(pod: &Pod, by_default: bool, values: &Values) -> Result<Outcome, Refused> {
    let meta = &pod.metadata;
    let Some(spec) = &pod.spec else { return Ok(Outcome::Leave("it has no spec")) };
    let asks = Annotations::read(meta.labels.as_ref(), meta.annotations.as_ref());
    let asked = match &asks {
        Ok(asks) => asks.inject,
        // Whoever wants no sidecar need not write its annotations well.
        Err(_) => [&meta.labels, &meta.annotations]
            .into_iter()
            .find_map(|map| crate::resources::lookup(map, INJECT))
            .and_then(|text| (text == "disabled").then_some(false)),
    };
    if !asked.unwrap_or(by_default) {
        return Ok(Outcome::Leave("it asks for no sidecar"));
    }
    let init_containers = spec.init_containers.iter().flatten();
    if init_containers.clone().any(|container| container.name == PROXY && is_ours(container, values)) {
        return again(pod, spec, values);
    }
    if let Some(reason) = cannot_be_captured(pod, spec) {
        let mut says = vec![(NOT_INJECTED, reason)];
        // Copied from a pod that has one: callers would wait for a sidecar that never answers.
        if crate::resources::lookup(&meta.annotations, INJECTED).is_some() {
            says.push((INJECTED, "false"));
        }
        return Ok(Outcome::Skip(reason, Patch(annotate(pod, &says))));
    }
    let asks = asks?;
    let wrong = conflicts(spec, None);
    if !wrong.is_empty() {
        return Err(Refused(wrong));
    }
    let rewritten = TcpProbes::of(spec);
    let mut patch = annotate(pod, &[(INJECTED, "true"), (VERSION, env!("CARGO_PKG_VERSION"))]);
    patch.extend(add_all("/spec/volumes", spec.volumes.is_some(), volumes(), false));
    patch.extend(rewritten.patch());
    // Before the containers in front of them are added: positions are those of the pod as it came.
    patch.extend(prestop_sleep(spec, asks.prestop_sleep, values.prestop_sleep_seconds)?);
    let first = if values.cni { check(&asks, values) } else { capture(&asks, values) };
    let mut containers = vec![first];
    containers.push(sidecar(spec, &asks, values, &rewritten.ports())?);
    patch.extend(add_all("/spec/initContainers", spec.init_containers.is_some(), containers, true));
    Ok(Outcome::Inject(Patch(patch)))
}

/// A pod that has a sidecar, and may have more containers than when it got it.
fn again(pod: &Pod, spec: &PodSpec, values: &Values) -> Result<Outcome, Refused> {
    let wrong = conflicts(spec, Some(values));
    if !wrong.is_empty() {
        return Err(Refused(wrong));
    }
    let asks = Annotations::read(pod.metadata.labels.as_ref(), pod.metadata.annotations.as_ref())?;
    let rewritten = TcpProbes::of(spec);
    let mut patch = rewritten.patch();
    patch.extend(prestop_sleep(spec, asks.prestop_sleep, values.prestop_sleep_seconds)?);
    if !rewritten.0.is_empty() {
        patch.push(more_probes(spec, rewritten.ports()));
    }
    if patch.is_empty() {
        return Ok(Outcome::Leave("it has a sidecar already"));
    }
    Ok(Outcome::Inject(Patch(patch)))
}

/// Tells the sidecar that is there of more ports to try.
fn more_probes(spec: &PodSpec, mut ports: Vec<u16>) -> PatchOperation {
    let containers = spec.init_containers.iter().flatten();
    let position = containers.clone().position(|container| container.name == PROXY).unwrap_or_default();
    let settings = containers.skip(position).take(1).filter_map(|sidecar| sidecar.env.as_ref()).flatten();
    let known = settings.enumerate().find(|(_, setting)| setting.name == TCP_PROBES);
    let before = known.and_then(|(_, setting)| setting.value.as_deref()).unwrap_or_default();
    ports.extend(before.split(',').filter_map(|port| port.parse::<u16>().ok()));
    ports.sort_unstable();
    ports.dedup();
    let ports = ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let list = format!("/spec/initContainers/{position}/env");
    match known {
        Some((at, _)) => add(&format!("{list}/{at}/value"), json!(ports)),
        None => add(&format!("{list}/-"), json!({ "name": TCP_PROBES, "value": ports })),
    }
}

/// Pods in which there is nothing to capture, or more than the pod.
fn cannot_be_captured(pod: &Pod, spec: &PodSpec) -> Option<&'static str> {
    if spec.host_network == Some(true) {
        return Some("hostNetwork: the pod shares its node's network, which cannot be captured for one pod");
    }
    let node = crate::resources::lookup(&spec.node_selector, "kubernetes.io/os");
    if spec.os.as_ref().is_some_and(|os| os.name == "windows") || node == Some("windows") {
        return Some("os: a Windows pod cannot be captured");
    }
    if crate::resources::lookup(&pod.metadata.annotations, MIRROR).is_some() {
        return Some("a static pod is its kubelet's, and cannot be changed");
    }
    None
}

/// Whether that is an init container as we write it, and not one that only has the name of ours: under that name it
/// would run as the user whose connections are not captured.
///
/// Why its image is known by its last name alone: what an older Weft wrote into a manifest has another version, and
/// there are webhooks that put a mirror's name before it, or a digest behind it. Whoever can write an image of that name
/// can also write one whose own user is the sidecar's: SECURITY.md says what helps against that.
fn is_ours(container: &Container, values: &Values) -> bool {
    let image = |image: &str| {
        let last = image.rsplit('/').next().unwrap_or_default();
        last.split(['@', ':']).next().unwrap_or_default().to_owned()
    };
    let (user, written, restarts) = match container.name.as_str() {
        PROXY => (ports::PROXY_UID, &values.proxy_image, Some("Always")),
        INIT => (0, &values.init_image, None),
        CHECK => (CHECK_UID, &values.init_image, None),
        _ => return false,
    };
    let runs_as = container.security_context.as_ref().and_then(|context| context.run_as_user);
    runs_as == Some(user.into())
        && container.restart_policy.as_deref() == restarts
        && container.image.as_deref().map(image) == Some(image(written))
}

/// What would leave the pod half in the mesh. `injected`: what is ours is there already, as that says.
fn conflicts(spec: &PodSpec, injected: Option<&Values>) -> Vec<String> {
    let mut wrong = Vec::new();
    let uid = i64::from(ports::PROXY_UID);
    let bypasses = "the sidecar's own user, whose connections are not captured: use another runAsUser";
    if spec.security_context.as_ref().is_some_and(|context| context.run_as_user == Some(uid)) {
        wrong.push(format!("spec.securityContext.runAsUser: {uid} is {bypasses}"));
    }
    let ours = |name: &str| [INIT, CHECK, PROXY].contains(&name);
    let is_there = |path: &str, container: &Container| {
        path.starts_with(INIT_CONTAINERS) && injected.is_some_and(|values| is_ours(container, values))
    };
    for (path, container) in containers(spec).filter(|(path, container)| !is_there(path, container)) {
        if container.security_context.as_ref().is_some_and(|context| context.run_as_user == Some(uid)) {
            wrong.push(format!("{path}.securityContext.runAsUser ({}): {uid} is {bypasses}", container.name));
        }
        if ours(&container.name) {
            wrong.push(format!("{path}.name: {:?} is the name of a container that is added", container.name));
        }
        for (position, port) in container.ports.iter().flatten().enumerate() {
            let own = [ports::OUTBOUND, ports::INBOUND, ports::ADMIN].map(i32::from);
            if own.contains(&port.container_port) {
                wrong.push(format!(
                    "{path}.ports[{position}].containerPort ({}): {} is a port of the sidecar: use another one",
                    container.name, port.container_port
                ));
            }
        }
    }
    for (position, volume) in spec.volumes.iter().flatten().enumerate().filter(|_| injected.is_none()) {
        if [IDENTITY, SOCKET].contains(&volume.name.as_str()) {
            wrong.push(format!(
                "spec.volumes[{position}].name: {:?} is the name of a volume that is added",
                volume.name
            ));
        }
    }
    wrong
}

/// Every container with its field path.
fn containers(spec: &PodSpec) -> impl Iterator<Item = (String, &Container)> {
    let init = spec.init_containers.iter().flatten().enumerate();
    let app = spec.containers.iter().enumerate();
    init.map(|(i, c)| (format!("{INIT_CONTAINERS}[{i}]"), c))
        .chain(app.map(|(i, c)| (format!("spec.containers[{i}]"), c)))
}

/// What the app dials without the sidecar: what the installation says and what the pod says, which may well be the
/// same. `weft-iptables` refuses lists that overlap in themselves.
fn skipped_outbound(asks: &Annotations, values: &Values) -> [(&'static str, String); 2] {
    let both = |of_all: &str, of_pod: &Option<String>| {
        let parts = [of_all, of_pod.as_deref().unwrap_or_default()];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(",")
    };
    [
        (
            "WEFT_EXCLUDE_OUTBOUND_PORTS",
            merged_ports(both(&values.skip_outbound_ports, &asks.skip_outbound_ports)),
        ),
        (
            "WEFT_EXCLUDE_OUTBOUND_CIDRS",
            merged_cidrs(both(&values.skip_outbound_cidrs, &asks.skip_outbound_cidrs)),
        ),
    ]
}

/// A list without overlaps; one that cannot be read as it is, for whoever says what is wrong with it.
fn merged_ports(list: String) -> String {
    let Ok(mut ranges) = parse_ports(&list) else { return list };
    ranges.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
    for range in ranges {
        match merged.last_mut().filter(|last| range.start() <= last.end()) {
            Some(last) => *last = *last.start()..=*last.end().max(range.end()),
            None => merged.push(range),
        }
    }
    merged.iter().map(show).collect::<Vec<_>>().join(",")
}

/// See [`merged_ports`].
fn merged_cidrs(list: String) -> String {
    let parts = list.split(',').map(str::trim).filter(|part| !part.is_empty());
    let parse = |part: &str| part.parse().or_else(|_| part.parse::<IpAddr>().map(IpNet::from));
    let Ok(mut nets) = parts.map(parse).collect::<Result<Vec<IpNet>, _>>() else { return list };
    // The wider one first: what it holds comes after it.
    nets.sort_by_key(|net| (net.prefix_len(), *net));
    let mut merged: Vec<IpNet> = Vec::new();
    for net in nets {
        if !merged.iter().any(|wider| wider.contains(&net)) {
            merged.push(net);
        }
    }
    merged.sort();
    merged.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn env(settings: impl IntoIterator<Item = (&'static str, String)>) -> Vec<Value> {
    let settings = settings.into_iter().filter(|(_, value)| !value.is_empty());
    settings.map(|(name, value)| json!({ "name": name, "value": value })).collect()
}

/// The init container that captures.
fn capture(asks: &Annotations, values: &Values) -> Value {
    let inbound = ("WEFT_EXCLUDE_INBOUND_PORTS", asks.skip_inbound_ports.clone().unwrap_or_default());
    let families = values.env.iter().find(|setting| setting.name == FAMILIES);
    let families = (FAMILIES, families.map(|setting| setting.value.clone()).unwrap_or_default());
    let env = env([inbound, families].into_iter().chain(skipped_outbound(asks, values)));
    let mut container = json!({
        "name": INIT,
        "image": values.init_image,
        "imagePullPolicy": values.image_pull_policy,
        "env": env,
        // A few milliseconds of work: what it asks for must not decide where a pod fits.
        "resources": { "requests": { "cpu": "1m", "memory": "8Mi" }, "limits": { "memory": "64Mi" } },
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        // What it says when it fails is the pod's message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    });
    if env.is_empty()
        && let Some(container) = container.as_object_mut()
    {
        container.remove("env");
    }
    container
}

/// Where a CNI plugin captures: an init container that looks whether it did. A pod that was started while the plugin
/// was not there must not speak plaintext for the rest of its life.
fn check(asks: &Annotations, values: &Values) -> Value {
    let mut container = json!({
        "name": CHECK,
        "image": values.init_image,
        "imagePullPolicy": values.image_pull_policy,
        "args": ["check"],
        "resources": { "requests": { "cpu": "1m", "memory": "8Mi" }, "limits": { "memory": "64Mi" } },
        "securityContext": unprivileged(CHECK_UID),
        // What it says is the pod's message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    });
    // It must not try where nothing is captured.
    let env = env(skipped_outbound(asks, values));
    if !env.is_empty() {
        container["env"] = env.into();
    }
    container
}

/// The sidecar.
fn sidecar(
    spec: &PodSpec,
    asks: &Annotations,
    values: &Values,
    tcp_probes: &[u16],
) -> Result<Value, Refused> {
    let field =
        |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let mut env = vec![
        field("WEFT_POD_NAME", "metadata.name"),
        field("WEFT_POD_UID", "metadata.uid"),
        field("WEFT_POD_IPS", "status.podIPs"),
        field("WEFT_NAMESPACE", "metadata.namespace"),
        field("WEFT_SERVICE_ACCOUNT", "spec.serviceAccountName"),
    ];
    let grace = spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE);
    // A drain that outlives the grace period would be cut off by SIGKILL, and with it what it waits for.
    let drain = grace.saturating_sub(GRACE_LEFT).clamp(1, 86_400);
    let probes: Vec<String> = tcp_probes.iter().map(ToString::to_string).collect();
    let settings = [
        ("WEFT_TRUST_DOMAIN", values.trust_domain.clone()),
        ("WEFT_TRUST_ANCHORS", format!("{IDENTITY_PATH}/{TRUST_KEY}")),
        ("WEFT_TOKEN_FILE", format!("{IDENTITY_PATH}/{TOKEN_FILE}")),
        ("WEFT_CONTROLLER", values.controller.clone()),
        ("WEFT_CONTROLLER_IDENTITY", values.controller_identity.clone()),
        ("WEFT_LOG", asks.log.clone().unwrap_or_else(|| values.log.clone())),
        ("WEFT_LOG_FORMAT", values.log_format.clone()),
        ("WEFT_DRAIN_TIMEOUT", if grace == DEFAULT_GRACE { String::new() } else { format!("{drain}s") }),
        (TCP_PROBES, probes.join(",")),
    ];
    let settings = settings.into_iter().filter(|(_, value)| !value.is_empty());
    env.extend(settings.map(|(name, value)| json!({ "name": name, "value": value })));
    env.extend(values.env.iter().map(|setting| json!({ "name": setting.name, "value": setting.value })));
    let probe = |path: &str| json!({ "path": path, "port": ports::ADMIN });
    Ok(json!({
        "name": PROXY,
        "image": values.proxy_image,
        "imagePullPolicy": values.image_pull_policy,
        "restartPolicy": "Always",
        "env": env,
        "ports": [{ "name": "weft-admin", "containerPort": ports::ADMIN, "protocol": "TCP" }],
        // Captured, certified and configured: what starts after this is in the mesh from its first packet.
        "startupProbe": { "httpGet": probe("/ready"), "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 120 },
        "livenessProbe": { "httpGet": probe("/live"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6 },
        "readinessProbe": { "httpGet": probe("/ready"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3 },
        // Kubernetes runs this at once, while SIGTERM comes only after the app has gone.
        "lifecycle": { "preStop": { "exec": { "command": ["/usr/local/bin/weft-proxy", "drain"] } } },
        "resources": resources(asks, values)?,
        "securityContext": unprivileged(ports::PROXY_UID),
        "volumeMounts": [
            { "name": IDENTITY, "mountPath": IDENTITY_PATH, "readOnly": true },
            { "name": SOCKET, "mountPath": "/var/run/weft" },
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }))
}

/// A user that may nothing: what the Pod Security level "restricted" asks, and a root file system that stays as it is.
fn unprivileged(user: u32) -> Value {
    json!({
        "runAsUser": user,
        "runAsGroup": user,
        "runAsNonRoot": true,
        "privileged": false,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

fn resources(asks: &Annotations, values: &Values) -> Result<Value, Refused> {
    let mut resources = serde_json::to_value(&values.resources)
        .map_err(|error| Refused(vec![format!("the installation's resources: {error}")]))?;
    for ((kind, name), quantity) in &asks.resources {
        resources[*kind][*name] = quantity.as_str().into();
    }
    Ok(resources)
}

fn volumes() -> Vec<Value> {
    vec![
        // One volume for what a sidecar proves itself by and what it believes: half of it is of no use.
        json!({ "name": IDENTITY, "projected": { "sources": [
            { "serviceAccountToken": { "audience": TOKEN_AUDIENCE, "expirationSeconds": 3_600, "path": TOKEN_FILE } },
            { "configMap": { "name": TRUST_CONFIG_MAP, "items": [{ "key": TRUST_KEY, "path": TRUST_KEY }] } },
        ] } }),
        json!({ "name": SOCKET, "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } }),
    ]
}

/// Keeps containers that end at once on SIGTERM from hearing it for a while: what has been sent to them arrives. What
/// the pod asks for it gets; what the installation says takes no more than a quarter of the time that the app has to
/// end in.
fn prestop_sleep(
    spec: &PodSpec,
    asked: Option<u64>,
    by_default: u64,
) -> Result<Vec<PatchOperation>, Refused> {
    let grace = u64::try_from(spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE)).unwrap_or(0);
    let seconds = asked.unwrap_or_else(|| by_default.min(grace / 4));
    if seconds == 0 {
        return Ok(Vec::new());
    }
    if seconds >= grace {
        return Err(Refused(vec![format!(
            "annotation {PRESTOP_SLEEP}: {seconds}s leaves nothing of the {grace}s of \
             spec.terminationGracePeriodSeconds: write less, or raise it"
        )]));
    }
    let mut patch = Vec::new();
    for (position, container) in spec.containers.iter().enumerate() {
        let hook = json!({ "sleep": { "seconds": seconds } });
        match &container.lifecycle {
            // What the pod's owner wrote there is what is meant.
            Some(lifecycle) if lifecycle.pre_stop.is_some() => {}
            Some(_) => patch.push(add(&format!("/spec/containers/{position}/lifecycle/preStop"), hook)),
            None => {
                patch.push(add(&format!("/spec/containers/{position}/lifecycle"), json!({ "preStop": hook })))
            }
        }
    }
    Ok(patch)
}

/// Probes that only connect, with where they stand.
struct TcpProbes(Vec<(String, u16)>);

impl TcpProbes {
    fn of(spec: &PodSpec) -> Self {
        let mut found = Vec::new();
        for (list, containers) in
            [("containers", Some(&spec.containers)), ("initContainers", spec.init_containers.as_ref())]
        {
            for (position, container) in containers.into_iter().flatten().enumerate() {
                for (name, probe) in probes::of(container) {
                    let Some(tcp) = probe.tcp_socket.as_ref() else { continue };
                    // Empty is the pod's own address, too.
                    if tcp.host.as_ref().is_some_and(|host| !host.is_empty()) {
                        continue;
                    };
                    if let Some(port) = probes::port_number(container, &tcp.port) {
                        found.push((format!("/spec/{list}/{position}/{name}"), port));
                    }
                }
            }
        }
        Self(found)
    }

    fn ports(&self) -> Vec<u16> {
        let mut ports: Vec<u16> = self.0.iter().map(|(_, port)| *port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    fn patch(&self) -> Vec<PatchOperation> {
        let rewrite = |(path, port): &(String, u16)| {
            let ask = json!({ "path": format!("/probe/{port}"), "port": ports::ADMIN });
            [
                PatchOperation::Remove(RemoveOperation { path: pointer(&format!("{path}/tcpSocket")) }),
                add(&format!("{path}/httpGet"), ask),
            ]
        };
        self.0.iter().flat_map(rewrite).collect()
    }
}

fn annotate(pod: &Pod, annotations: &[(&str, &str)]) -> Vec<PatchOperation> {
    let mut patch = Vec::new();
    if pod.metadata.annotations.is_none() {
        patch.push(add("/metadata/annotations", json!({})));
    }
    let escaped = |name: &str| name.replace('~', "~0").replace('/', "~1");
    patch.extend(
        annotations
            .iter()
            .map(|(name, value)| add(&format!("/metadata/annotations/{}", escaped(name)), json!(value))),
    );
    patch
}

/// Adds to a list, at its front or its end; makes it if it is not there.
fn add_all(list: &str, exists: bool, items: Vec<Value>, front: bool) -> Vec<PatchOperation> {
    if !exists {
        return vec![add(list, Value::Array(items))];
    }
    let place = |position: usize| if front { position.to_string() } else { "-".to_owned() };
    items
        .into_iter()
        .enumerate()
        .map(|(position, item)| add(&format!("{list}/{}", place(position)), item))
        .collect()
}

fn add(path: &str, value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: pointer(path), value })
}

/// Paths here are written by us, with their names escaped.
fn pointer(path: &str) -> PointerBuf {
    PointerBuf::parse(path).unwrap_or_default()
}

/// Which addresses are captured: said to every sidecar, and asked by what captures for it.
const FAMILIES: &str = "WEFT_FAMILIES";
const INIT_CONTAINERS: &str = "spec.initContainers";
/// The init container that captures.
pub const INIT: &str = "weft-init";
/// The init container that looks whether a CNI plugin did.
pub const CHECK: &str = "weft-check";
/// The user of [`CHECK`]: anybody but the sidecar's, whose connections are not captured.
const CHECK_UID: u32 = 65_532;
/// The sidecar.
pub const PROXY: &str = "weft-proxy";
/// Ports that the sidecar tries in a kubelet's place.
const TCP_PROBES: &str = "WEFT_TCP_PROBES";
const IDENTITY: &str = "weft-identity";
const IDENTITY_PATH: &str = "/var/run/secrets/weft";
const TOKEN_FILE: &str = "token";
const SOCKET: &str = "weft-socket";
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Kubernetes' own.
const DEFAULT_GRACE: i64 = 30;
/// For the app to end in, after its requests have.
const GRACE_LEFT: i64 = 5;
