//! The CRDs of Weft's own kinds, made of the types that read them.
//!
//! Why generated: a schema that is written a second time is one that differs. What a single field may be is in its
//! type; relations between fields stand here as CEL, so that `kubectl apply` refuses them even while no controller
//! answers.
//!
//! Why AuthorizationPolicy keeps what it does not know: the API server drops unknown fields before anybody else sees
//! the object, and a condition that is dropped makes a rule match more than it says. Kept, it is seen by the
//! validator and by the controller, which refuse it by name.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::policy::{AuthorizationPolicySpec, MeshConfigSpec, TrafficPolicySpec};

/// All of them, in the order of their names.
pub fn all() -> Vec<Value> {
    let target = json!({
        "name": "Target", "type": "string", "jsonPath": ".spec.targetRefs[*].name",
        "description": "What it is about"
    });
    vec![
        crd::<AuthorizationPolicySpec>(&About {
            kind: "AuthorizationPolicy",
            plural: "authorizationpolicies",
            short: "wap",
            namespaced: true,
            keep_unknown: true,
            columns: vec![
                json!({ "name": "Action", "type": "string", "jsonPath": ".spec.action" }),
                json!({ "name": "mTLS", "type": "string", "jsonPath": ".spec.mtls" }),
            ],
            rules: vec![rule(
                "!has(self.targetRefs) || self.targetRefs.all(t, has(t.kind) && t.kind == 'Service' && has(t.name))",
                "targetRefs: an AuthorizationPolicy is about Services, by name (or about workloads, by selector)",
            )],
        }),
        crd::<MeshConfigSpec>(&About {
            kind: "MeshConfig",
            plural: "meshconfigs",
            short: "wmc",
            namespaced: false,
            keep_unknown: false,
            columns: vec![
                json!({ "name": "mTLS", "type": "string", "jsonPath": ".spec.mtls" }),
                json!({ "name": "Egress", "type": "string", "jsonPath": ".spec.egress" }),
            ],
            rules: Vec::new(),
        }),
        crd::<TrafficPolicySpec>(&About {
            kind: "TrafficPolicy",
            plural: "trafficpolicies",
            short: "wtp",
            namespaced: true,
            keep_unknown: false,
            columns: vec![target],
            rules: vec![
                rule(
                    "has(self.targetRefs) && size(self.targetRefs) > 0",
                    "targetRefs: name at least one Service, HTTPRoute or GRPCRoute",
                ),
                rule(
                    "!has(self.targetRefs) || self.targetRefs.all(t, has(t.kind) && \
                     t.kind in ['Service', 'HTTPRoute', 'GRPCRoute'] && has(t.name))",
                    "targetRefs: each has a name, and the kind Service, HTTPRoute or GRPCRoute",
                ),
                rule(
                    "!(has(self.loadBalancing) || has(self.outlierEjection) || has(self.limits) || \
                     has(self.rateLimits) || has(self.mtlsRequired) || has(self.detectTimeout)) || !has(self.targetRefs) || \
                     self.targetRefs.all(t, has(t.kind) && t.kind == 'Service')",
                    "loadBalancing, outlierEjection, limits, rateLimits, mtlsRequired and detectTimeout are about \
                     Services: write a policy of its own for the route",
                ),
            ],
        }),
    ]
}

/// As one file for `kubectl apply` and the chart.
///
/// # Errors
/// The serializer's.
pub fn yaml() -> Result<String, serde_saphyr::ser::Error> {
    let documents: Result<Vec<String>, _> = all().iter().map(serde_saphyr::to_string).collect();
    Ok(documents?.join("---\n"))
}

struct About {
    kind: &'static str,
    plural: &'static str,
    short: &'static str,
    namespaced: bool,
    keep_unknown: bool,
    columns: Vec<Value>,
    rules: Vec<Value>,
}

fn rule(rule: &str, message: &str) -> Value {
    json!({ "rule": rule, "message": message })
}

fn crd<T: JsonSchema>(about: &About) -> Value {
    let mut spec = SchemaSettings::openapi3()
        .with(|settings| {
            settings.inline_subschemas = true;
            settings.meta_schema = None;
        })
        .with_transform(kube::core::schema::StructuralSchemaRewriter)
        .into_generator()
        .into_root_schema_for::<T>()
        .to_value();
    structural(&mut spec, about.keep_unknown);
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("title");
        if !about.rules.is_empty() {
            spec.insert("x-kubernetes-validations".to_owned(), about.rules.clone().into());
        }
    }
    let singular = about.kind.to_lowercase();
    let mut columns = about.columns.clone();
    columns.extend([
        json!({ "name": "Accepted", "type": "string",
            "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].status" }),
        json!({ "name": "Applied", "type": "string", "jsonPath": ".status.applied",
            "description": "In how many sidecars it is live, and which version of it" }),
        json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" }),
    ]);
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.weft.dev", about.plural),
            "labels": { "app.kubernetes.io/name": "weft" },
        },
        "spec": {
            "group": "weft.dev",
            "scope": if about.namespaced { "Namespaced" } else { "Cluster" },
            "names": {
                "kind": about.kind,
                "listKind": format!("{}List", about.kind),
                "plural": about.plural,
                "singular": singular,
                "shortNames": [about.short],
                "categories": ["weft"],
            },
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns,
                "schema": { "openAPIV3Schema": {
                    "type": "object",
                    "description": spec.get("description").cloned().unwrap_or_default(),
                    "required": ["spec"],
                    "properties": { "spec": spec, "status": status() },
                } },
            }],
        },
    })
}

/// What the controller says of an object.
fn status() -> Value {
    let text = json!({ "type": "string" });
    json!({
        "type": "object",
        "description": "What the controller made of it.",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "observedGeneration": { "type": "integer", "format": "int64" },
            "applied": {
                "type": "string",
                "description": "In how many of the sidecars that it concerns it is live, and which version: `118/120 @ 57`.",
            },
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                    "properties": {
                        "type": text, "reason": text, "message": text,
                        "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                        "observedGeneration": { "type": "integer", "format": "int64" },
                        "lastTransitionTime": { "type": "string", "format": "date-time" },
                    },
                },
            },
        },
    })
}

/// What Kubernetes asks of a schema, beyond what schemars and kube know.
fn structural(schema: &mut Value, keep_unknown: bool) {
    let Some(object) = schema.as_object_mut() else { return };
    // Defaults are the controller's: written into objects they would outlive the version that meant them.
    object.remove("default");
    if let Some(Value::String(text)) = object.get_mut("description") {
        // Links of Rust's documentation are nothing to `kubectl explain`.
        let told = text.strip_prefix("See [`").and_then(|rest| rest.split_once("`]. ")).map(|(_, rest)| rest);
        *text = told.unwrap_or(text).replace('\n', " ").replace("[`", "`").replace("`]", "`");
    }
    // "This, or null" is a field that may be left out. Kubernetes drops a null there before anything else looks at the
    // object, so that no rule takes one for a value; were the field `nullable`, it would be kept.
    if let Some(Value::Array(choices)) = object.remove("anyOf") {
        let some = choices.into_iter().find(|choice| choice["enum"] != json!([null]));
        for (name, value) in some.as_ref().and_then(Value::as_object).into_iter().flatten() {
            // What a field is for says more than what its type is for.
            object.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    object.remove("nullable");
    if let Some(Value::Array(values)) = object.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    // Formats of Rust, not of OpenAPI; the bounds stay.
    if object.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
        object.remove("format");
    }
    let fields = object.contains_key("properties");
    if fields && keep_unknown {
        object.remove("additionalProperties");
        object.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
    }
    if object.get("additionalProperties") == Some(&Value::Bool(false)) {
        object.remove("additionalProperties");
    }
    // CEL is admitted only where the API server can bound its cost.
    if object.get("type").and_then(Value::as_str) == Some("array") && !object.contains_key("maxItems") {
        object.insert("maxItems".to_owned(), MAX_ITEMS.into());
    }
    let each = |name: &str, map: &mut Map<String, Value>| {
        if let Some(value) = map.get_mut(name) {
            structural(value, keep_unknown);
        }
    };
    each("items", object);
    each("additionalProperties", object);
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        for (name, property) in properties {
            structural(property, keep_unknown);
            if name == "targetRefs"
                && let Some(property) = property.as_object_mut()
            {
                property.insert("maxItems".to_owned(), MAX_TARGETS.into());
            }
        }
    }
}

/// Of any list: a bound for the API server, above what the validator takes.
const MAX_ITEMS: u64 = 1_024;
/// Gateway API's own bound for policies.
const MAX_TARGETS: u64 = 16;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_chart_holds_the_crds_of_these_types() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/weft-crds/templates/crds.yaml");
        let text = yaml().unwrap();
        if std::env::var_os("WEFT_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let chart = std::fs::read_to_string(&path).unwrap_or_default();
        let parsed = crate::source::yaml::documents(&chart);
        let chart: Vec<Value> = parsed.map(|(_, text)| serde_saphyr::from_str(text).unwrap()).collect();
        assert_eq!(all(), chart, "WEFT_BLESS=1 cargo test -p weft-control-plane crd writes it anew");
    }

    #[test]
    fn schemas_are_structural() {
        fn look(path: &str, schema: &Value) {
            let typed = schema["type"].is_string()
                || schema["x-kubernetes-int-or-string"] == true
                || schema["x-kubernetes-preserve-unknown-fields"] == true;
            assert!(typed, "{path}: {schema}");
            assert!(schema["$ref"].is_null() && schema["default"].is_null(), "{path}: {schema}");
            // A null is dropped, not kept: `has()` of a rule means a value.
            assert!(schema["nullable"].is_null() && schema["anyOf"].is_null(), "{path}: {schema}");
            let choices = schema["enum"].as_array().into_iter().flatten();
            assert!(choices.into_iter().all(Value::is_string), "{path}: {schema}");
            assert!(!schema["description"].to_string().contains("[`"), "{path}: {schema}");
            assert!(
                schema["properties"].is_null() || schema["additionalProperties"].is_null(),
                "{path}: both are forbidden"
            );
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                look(&format!("{path}.{name}"), property);
            }
            for name in ["items", "additionalProperties"] {
                if !schema[name].is_null() {
                    look(&format!("{path}.{name}"), &schema[name]);
                }
            }
        }
        for crd in all() {
            look("", &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]);
        }
    }
}
