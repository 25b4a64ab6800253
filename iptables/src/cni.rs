//! Capture by a CNI plugin: the node's container runtime runs this program in place of a container of the pod, so
//! that the pod needs no capability.
//!
//! Why chained, and why the pod's annotations come with the request: the plugin before it has made the pod's network,
//! and the runtime (containerd, CRI-O) hands over the annotations that the injector wrote. So the plugin asks nobody:
//! no API server, no credentials on the node, nothing that can be away when a pod starts.
//!
//! Why a failure fails the pod: a pod that believes to be in the mesh and is not speaks plaintext. The reason is the
//! runtime's event on the pod. A pod that was started while no plugin was installed does not get far either: its own
//! init container looks whether it is captured (see [`crate::probe`]).
//!
//! Pure but for [`run`]: the request and what is to be done with it are values.

use std::{collections::BTreeMap, fs::File, io::Read as _};

use nix::sched::{CloneFlags, setns};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    apply,
    config::{self, Options},
};

/// What the runtime gives a plugin on standard input.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Request {
    /// Version of the protocol.
    pub cni_version: String,
    /// What the plugins before this one made; it is handed on as it is.
    pub prev_result: Option<Value>,
    /// By capability.
    pub runtime_config: RuntimeConfig,
    /// Excluded in every pod: as `--exclude-outbound-ports` takes them.
    pub exclude_outbound_ports: Vec<String>,
    /// Excluded in every pod: as `--exclude-outbound-cidrs` takes them.
    pub exclude_outbound_cidrs: Vec<String>,
}

/// See [`Request`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// `None`: the runtime does not hand them on.
    #[serde(rename = "io.kubernetes.cri.pod-annotations")]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// What went wrong, as the runtime reports it on the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    code: u32,
    message: String,
}

impl Failure {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// As the protocol has it.
    pub fn to_json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code, "msg": format!("weft: {}", self.message) })
    }
}

/// What to capture in a pod; `None`: it has no sidecar.
///
/// # Errors
/// The pod has one, and cannot be captured as it says.
pub fn options(request: &Request) -> Result<Option<Options>, Failure> {
    // A runtime that does not hand them on must not be kept from starting any pod of the node: those with a sidecar
    // look themselves whether they are captured, and stop.
    let Some(annotations) = &request.runtime_config.annotations else { return Ok(None) };
    if annotations.get(INJECTED).map(String::as_str) != Some("true") {
        return Ok(None);
    }
    let list = |name: &str| {
        let text = annotations.get(name).map(String::as_str).unwrap_or_default();
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(str::to_owned).collect::<Vec<_>>()
    };
    Ok(Some(Options {
        exclude_inbound_ports: list(SKIP_INBOUND_PORTS),
        exclude_outbound_ports: config::merged_ports(
            list(SKIP_OUTBOUND_PORTS),
            &request.exclude_outbound_ports,
        ),
        exclude_outbound_cidrs: config::merged_cidrs(
            list(SKIP_OUTBOUND_CIDRS),
            &request.exclude_outbound_cidrs,
        ),
        ..Options::default()
    }))
}

/// Answers the runtime: what to print, and whether it went well. `get` reads the environment.
pub fn run(get: impl Fn(&str) -> Option<String>, mut input: impl std::io::Read) -> (Value, bool) {
    let mut text = String::new();
    let read = input.by_ref().take(MAX_INPUT).read_to_string(&mut text);
    let request: Request = match read.map(|_| serde_json::from_str(&text)) {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return (Failure::new(DECODE, error.to_string()).to_json(VERSION), false),
        Err(error) => return (Failure::new(DECODE, error.to_string()).to_json(VERSION), false),
    };
    let version = if request.cni_version.is_empty() { VERSION } else { &request.cni_version };
    let done = match get("CNI_COMMAND").as_deref() {
        Some("ADD") => add(&request, get("CNI_NETNS").as_deref())
            .map(|()| request.prev_result.clone().unwrap_or_else(|| json!({ "cniVersion": version }))),
        Some("VERSION") => Ok(json!({ "cniVersion": VERSION, "supportedVersions": SUPPORTED })),
        // The rules go with the pod's network namespace.
        Some("DEL" | "CHECK" | "GC" | "STATUS") => Ok(Value::Null),
        other => Err(Failure::new(ENVIRONMENT, format!("CNI_COMMAND {other:?} is not known"))),
    };
    match done {
        Ok(answer) => (answer, true),
        Err(failure) => (failure.to_json(version), false),
    }
}

fn add(request: &Request, namespace: Option<&str>) -> Result<(), Failure> {
    let Some(options) = options(request)? else { return Ok(()) };
    let config = options.validate().map_err(|invalid| {
        let reasons: Vec<String> = invalid.0.iter().map(ToString::to_string).collect();
        Failure::new(CONFIG, reasons.join("; "))
    })?;
    let namespace = namespace.filter(|path| !path.is_empty());
    let namespace = namespace.ok_or_else(|| Failure::new(ENVIRONMENT, "CNI_NETNS is not set"))?;
    let failed = |error: String| Failure::new(CAPTURE, format!("the pod cannot be captured: {error}"));
    let file = File::open(namespace).map_err(|error| failed(format!("{namespace}: {error}")))?;
    // Of this thread, and of the programs that it runs.
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| failed(format!("{namespace}: {error}")))?;
    apply::install(&config, None).map_err(|error| failed(error.to_string()))?;
    Ok(())
}

/// The plugin's name in a list of plugins, and its file's.
pub const PLUGIN: &str = "weft-cni";
/// A list of plugins with ours at its end, or `None` if it is none. `owner` tells whose entry it is.
pub fn chained(
    list: &Value,
    owner: &str,
    outbound_ports: &[String],
    outbound_cidrs: &[String],
) -> Option<Value> {
    let mut list = unchained(list)?;
    list["plugins"].as_array_mut()?.push(json!({
        "type": PLUGIN,
        "capabilities": { "io.kubernetes.cri.pod-annotations": true },
        "excludeOutboundPorts": outbound_ports,
        "excludeOutboundCidrs": outbound_cidrs,
        "owner": owner,
    }));
    Some(list)
}

/// A list of plugins without ours.
pub fn unchained(list: &Value) -> Option<Value> {
    let mut list = list.clone();
    list["plugins"].as_array_mut()?.retain(|plugin| plugin["type"] != PLUGIN);
    Some(list)
}

/// Whose entry a list has.
pub fn owner(list: &Value) -> Option<&str> {
    list["plugins"].as_array()?.iter().find(|plugin| plugin["type"] == PLUGIN)?["owner"].as_str()
}

// Named by the injector too, which this crate does not know.
const INJECTED: &str = "weft.dev/injected";
const SKIP_INBOUND_PORTS: &str = "weft.dev/skip-inbound-ports";
const SKIP_OUTBOUND_PORTS: &str = "weft.dev/skip-outbound-ports";
const SKIP_OUTBOUND_CIDRS: &str = "weft.dev/skip-outbound-cidrs";
const VERSION: &str = "1.0.0";
const SUPPORTED: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const MAX_INPUT: u64 = 4 * 1024 * 1024;
// 4, 6 and 7 are the protocol's, from 100 on they are the plugin's.
const ENVIRONMENT: u32 = 4;
const DECODE: u32 = 6;
const CONFIG: u32 = 7;
const CAPTURE: u32 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn request(annotations: Value) -> Request {
        serde_json::from_value(json!({
            "cniVersion": "1.0.0", "name": "net", "type": PLUGIN,
            "runtimeConfig": { "io.kubernetes.cri.pod-annotations": annotations },
            "excludeOutboundPorts": ["53"],
            "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": "10.0.0.1/24" }] },
        }))
        .unwrap()
    }

    #[test]
    fn a_pod_says_by_its_annotations_what_is_captured() {
        let options = options(&request(json!({
            "weft.dev/injected": "true", "weft.dev/skip-inbound-ports": "22, 9100-9110",
            "weft.dev/skip-outbound-ports": "25" })))
        .unwrap()
        .unwrap();
        assert_eq!(options.exclude_inbound_ports, ["22", "9100-9110"]);
        assert_eq!(options.exclude_outbound_ports, ["25", "53"]);
        assert!(options.validate().is_ok());
        // The pod and the installation may say the same.
        let options = self::options(&request(json!({
            "weft.dev/injected": "true", "weft.dev/skip-outbound-ports": "50-60" })))
        .unwrap()
        .unwrap();
        assert_eq!(options.exclude_outbound_ports, ["50-60"]);
        assert!(options.validate().is_ok());
    }

    #[test]
    fn a_pod_without_a_sidecar_is_left_alone() {
        let environment = |name: &str| (name == "CNI_COMMAND").then(|| "ADD".to_owned());
        let text = json!({ "cniVersion": "0.4.0", "prevResult": { "ips": [] },
            "runtimeConfig": { "io.kubernetes.cri.pod-annotations": {} } })
        .to_string();
        let (answer, well) = run(environment, text.as_bytes());
        assert!(well);
        assert_eq!(answer, json!({ "ips": [] }), "what came before is handed on");
        let (_, well) = run(environment, json!({ "cniVersion": "1.0.0" }).to_string().as_bytes());
        assert!(well, "a runtime that tells nothing starts its own pods all the same");
    }

    #[test]
    fn a_pod_that_cannot_be_captured_does_not_start_and_says_why() {
        let environment = |name: &str| (name == "CNI_COMMAND").then(|| "ADD".to_owned());
        let said = |text: Value| {
            let (answer, well) = run(environment, text.to_string().as_bytes());
            assert!(!well, "{answer}");
            answer["msg"].as_str().unwrap().to_owned()
        };
        let with = |annotations: Value| json!({ "cniVersion": "1.0.0", "runtimeConfig": { "io.kubernetes.cri.pod-annotations": annotations } });
        let wrong = json!({ "weft.dev/injected": "true", "weft.dev/skip-inbound-ports": "0" });
        assert_eq!(said(with(wrong)), "weft: --exclude-inbound-ports: \"0\" port 0 is not a port");
        assert_eq!(said(with(json!({ "weft.dev/injected": "true" }))), "weft: CNI_NETNS is not set");
    }

    #[test]
    fn the_plugin_is_chained_once_and_taken_out_again() {
        let list = json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "ptp" }, { "type": "portmap" }] });
        let once = chained(&list, "a", &[], &[]).unwrap();
        let twice = chained(&once, "b", &[], &[]).unwrap();
        assert_eq!(twice["plugins"].as_array().unwrap().len(), 3);
        assert_eq!((owner(&once), owner(&twice), owner(&list)), (Some("a"), Some("b"), None));
        assert_eq!(unchained(&twice).unwrap(), list);
        assert!(chained(&json!({ "type": "ptp" }), "a", &[], &[]).is_none(), "one plugin is no list");
    }
}
