//! What the store holds, for whoever asks `/config` why a request went where it went.

use serde_json::json;

use super::{State, Value};

impl State {
    pub(super) fn dump(&self) -> serde_json::Value {
        let resources: Vec<_> = self
            .held
            .iter()
            .map(|(name, held)| {
                let state = match &held.value {
                    Value::Pending => "pending".to_owned(),
                    Value::Removed => "removed".to_owned(),
                    Value::Endpoints(members) => format!("{} endpoints", members.by_uid.len()),
                    Value::Service(_)
                    | Value::Route(_)
                    | Value::Authorization(_)
                    | Value::Workload(_)
                    | Value::Trust => "held".to_owned(),
                };
                json!({ "name": name.to_string(), "version": held.version, "state": state,
                    "users": held.users.len(), "refused": self.refused.contains(name) })
            })
            .collect();
        let destinations: Vec<_> = self
            .destinations
            .iter()
            .map(|(address, destination)| {
                let policy = destination.watched.as_ref().map(|watched| watched.policy());
                json!({ "address": address.to_string(),
                    "service": policy.as_ref().map(|policy| policy.service.name.to_string()),
                    "rules": policy.as_ref().map(|policy| policy.routes.rules().len()),
                    "backends": policy.as_ref().map(|policy| policy.backends.iter().map(|backend| json!({
                        "service": backend.service.name.to_string(),
                        "endpoints": backend.endpoints.len(),
                        "generation": backend.generation,
                        "resolved": backend.resolved,
                    })).collect::<Vec<_>>()),
                    "warming": destination.warming.is_some(), "in_use": destination.is_held() })
            })
            .collect();
        let inbound = self.inbound.borrow();
        let ports = inbound.as_ref().map(|policy| {
            let port = |number: u16, port: &weft_core::policy::PortPolicy| {
                json!({ "port": number, "protocol": format!("{:?}", port.protocol),
                    "mtls": format!("{:?}", port.mtls), "rules": port.authorization.rules.len(),
                    "default": format!("{:?}", port.authorization.default),
                    "generation": port.authorization.generation })
            };
            let named = policy.ports.iter().map(|(number, policy)| port(*number, policy));
            named.chain([port(0, &policy.default_port)]).collect::<Vec<_>>()
        });
        let ranges = self.egress.borrow();
        json!({
            "connected": self.connected.is_some(),
            "resources": resources,
            "destinations": destinations,
            "inbound": ports,
            "mesh_ranges": ranges.as_ref().map(|ranges| {
                ranges.mesh.iter().take(1_000).map(ToString::to_string).collect::<Vec<_>>()
            }),
            "egress": ranges.as_ref().map(|ranges| format!("{:?}", ranges.egress)),
        })
    }
}
