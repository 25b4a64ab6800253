//! What a pod's kubelet will ask of its containers, read from the spec and from nothing else.
//!
//! Why from the spec: probes come from the node, and so does whatever else is routed through it. Only what the pod's
//! owner wrote down is admitted without identity: this port, this path.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction, PodSpec, Probe as ProbeSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};
use weft_core::{policy::Probe, ports};

/// What each port of a pod is asked without identity.
pub fn admitted(spec: &PodSpec) -> BTreeMap<u16, Vec<Probe>> {
    let mut found: BTreeMap<u16, Vec<Probe>> = BTreeMap::new();
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let hooks = container.lifecycle.iter().flat_map(|hooks| [&hooks.post_start, &hooks.pre_stop]);
        let gets = of(container)
            .filter_map(|(_, probe)| probe.http_get.as_ref())
            .chain(hooks.flatten().filter_map(|hook| hook.http_get.as_ref()));
        let gets = gets.filter_map(|get| Some((port_number(container, &get.port)?, Probe::Get(path(get)?))));
        let grpc = of(container).filter_map(|(_, probe)| {
            Some((u16::try_from(probe.grpc.as_ref()?.port).ok()?, Probe::GrpcHealth))
        });
        // The sidecar's own port is not captured, and nothing is admitted there.
        for (port, probe) in gets.chain(grpc).filter(|(port, _)| ![0, ports::ADMIN].contains(port)) {
            let of_port = found.entry(port).or_default();
            if of_port.len() < MAX_PROBES && !of_port.contains(&probe) {
                of_port.push(probe);
            }
        }
    }
    found
}

/// A container's probes by field name.
pub fn of(container: &Container) -> impl Iterator<Item = (&'static str, &ProbeSpec)> {
    let all = [
        ("startupProbe", &container.startup_probe),
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
    ];
    all.into_iter().filter_map(|(name, probe)| Some((name, probe.as_ref()?)))
}

/// A port by number, or by a name that the same container gives it.
pub fn port_number(container: &Container, port: &IntOrString) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
            named.map(|port| port.container_port).or_else(|| name.parse().ok())?
        }
    };
    u16::try_from(number).ok().filter(|number| *number > 0)
}

/// As the kubelet writes it into the request; `None`: it is not asked of this pod, or not in the clear.
fn path(get: &HTTPGetAction) -> Option<Arc<str>> {
    if get.host.as_deref().is_some_and(|host| !host.is_empty())
        || get.scheme.as_deref().is_some_and(|scheme| !scheme.eq_ignore_ascii_case("http"))
    {
        return None;
    }
    let path = get.path.as_deref().unwrap_or_default();
    let path = path.split('#').next().unwrap_or_default();
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Probe::is_path(&path).then(|| path.into())
}

/// What one port may have; the wire takes no more.
const MAX_PROBES: usize = 64;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_kind_of_probe_by_port_and_path() {
        let spec = serde_json::from_value(json!({
            "initContainers": [{ "name": "s", "restartPolicy": "Always",
                "startupProbe": { "httpGet": { "path": "/own", "port": 14021 } } }],
            "containers": [
                { "name": "a", "ports": [{ "name": "http", "containerPort": 8080 }],
                  "startupProbe": { "httpGet": { "port": "http" } },
                  "livenessProbe": { "httpGet": { "path": "live?full=1#x", "port": 8080 } },
                  "readinessProbe": { "grpc": { "port": 9090 } },
                  "lifecycle": { "preStop": { "httpGet": { "path": "/stop", "port": "http" } } } },
                { "name": "b",
                  "startupProbe": { "exec": { "command": ["true"] } },
                  "livenessProbe": { "httpGet": { "path": "/tls", "port": 8443, "scheme": "HTTPS" } },
                  "readinessProbe": { "httpGet": { "path": "/else", "port": 80, "host": "10.0.0.1" } } },
            ],
        }))
        .unwrap();
        let get = |path: &str| Probe::Get(path.into());
        assert_eq!(
            admitted(&spec),
            BTreeMap::from([
                (8080, vec![get("/"), get("/live?full=1"), get("/stop")]),
                (9090, vec![Probe::GrpcHealth]),
            ])
        );
    }
}
