//! Gateway API v1 routes, as far as a mesh reads them.
//!
//! Enumerations are plain text here: a value that this build does not know must decode, so that the rest
//! of the object keeps working (Gateway API: "unsupported value" is a condition, not a parse error).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::nullable;

/// `gateway.networking.k8s.io/v1` HTTPRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HttpRoute {
    /// Name, namespace and so on.
    pub metadata: ObjectMeta,
    /// What it does.
    #[serde(deserialize_with = "nullable")]
    pub spec: HttpRouteSpec,
}

/// See [`HttpRoute`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct HttpRouteSpec {
    /// The services whose callers follow this route.
    #[serde(deserialize_with = "nullable")]
    pub parent_refs: Vec<ParentRef>,
    /// Ignored in a mesh: the destination is known by its address.
    #[serde(deserialize_with = "nullable")]
    pub hostnames: Vec<String>,
    /// In order.
    #[serde(deserialize_with = "nullable")]
    pub rules: Vec<HttpRule>,
}

/// `gateway.networking.k8s.io/v1` GRPCRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GrpcRoute {
    /// Name, namespace and so on.
    pub metadata: ObjectMeta,
    /// What it does.
    #[serde(deserialize_with = "nullable")]
    pub spec: GrpcRouteSpec,
}

/// See [`GrpcRoute`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct GrpcRouteSpec {
    /// The services whose callers follow this route.
    #[serde(deserialize_with = "nullable")]
    pub parent_refs: Vec<ParentRef>,
    /// Ignored in a mesh.
    #[serde(deserialize_with = "nullable")]
    pub hostnames: Vec<String>,
    /// In order.
    #[serde(deserialize_with = "nullable")]
    pub rules: Vec<GrpcRule>,
}

/// What a route attaches to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ParentRef {
    /// Empty or `core` for a Service.
    pub group: Option<String>,
    /// `Service` in a mesh; a Gateway unless given.
    pub kind: Option<String>,
    /// The route's namespace unless given.
    pub namespace: Option<String>,
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// The name of one port of a Service.
    pub section_name: Option<String>,
    /// One port; all of them unless given.
    pub port: Option<u16>,
}

/// One rule of an HTTPRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct HttpRule {
    /// Name within the route.
    pub name: Option<String>,
    /// Any of these.
    #[serde(deserialize_with = "nullable")]
    pub matches: Vec<HttpMatch>,
    /// In order.
    #[serde(deserialize_with = "nullable")]
    pub filters: Vec<Filter>,
    /// Weighted.
    #[serde(deserialize_with = "nullable")]
    pub backend_refs: Vec<BackendRef>,
    /// Bounds on time.
    #[serde(deserialize_with = "nullable")]
    pub timeouts: Timeouts,
    /// When to try again.
    pub retry: Option<Retry>,
}

/// One rule of a GRPCRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct GrpcRule {
    /// Name within the route.
    pub name: Option<String>,
    /// Any of these.
    #[serde(deserialize_with = "nullable")]
    pub matches: Vec<GrpcMatch>,
    /// In order.
    #[serde(deserialize_with = "nullable")]
    pub filters: Vec<Filter>,
    /// Weighted.
    #[serde(deserialize_with = "nullable")]
    pub backend_refs: Vec<BackendRef>,
}

/// All parts hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct HttpMatch {
    /// The path; `PathPrefix /` unless given.
    pub path: Option<PathMatch>,
    /// All of these.
    #[serde(deserialize_with = "nullable")]
    pub headers: Vec<NamedMatch>,
    /// All of these.
    #[serde(deserialize_with = "nullable")]
    pub query_params: Vec<NamedMatch>,
    /// The method.
    pub method: Option<String>,
}

/// All parts hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct GrpcMatch {
    /// Service and method.
    pub method: Option<GrpcMethodMatch>,
    /// All of these.
    #[serde(deserialize_with = "nullable")]
    pub headers: Vec<NamedMatch>,
}

/// A condition on the path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathMatch {
    /// `Exact`, `PathPrefix` (unless given) or `RegularExpression`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// `/` unless given.
    pub value: Option<String>,
}

/// A condition on a gRPC method.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GrpcMethodMatch {
    /// `Exact` (unless given) or `RegularExpression`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Fully qualified service.
    pub service: Option<String>,
    /// Method.
    pub method: Option<String>,
}

/// A condition on a header or query parameter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NamedMatch {
    /// `Exact` (unless given) or `RegularExpression`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Value.
    #[serde(deserialize_with = "nullable")]
    pub value: String,
}

/// A filter, of a route or of one backend.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Filter {
    /// Which of the parts below.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// On requests.
    pub request_header_modifier: Option<HeaderModifier>,
    /// On responses.
    pub response_header_modifier: Option<HeaderModifier>,
    /// Answer with a redirect.
    pub request_redirect: Option<Redirect>,
    /// Change host or path.
    pub url_rewrite: Option<Rewrite>,
}

/// Header changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeaderModifier {
    /// Replace.
    #[serde(deserialize_with = "nullable")]
    pub set: Vec<HeaderValue>,
    /// Append.
    #[serde(deserialize_with = "nullable")]
    pub add: Vec<HeaderValue>,
    /// Delete.
    #[serde(deserialize_with = "nullable")]
    pub remove: Vec<String>,
}

/// A header with its value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeaderValue {
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Value.
    #[serde(deserialize_with = "nullable")]
    pub value: String,
}

/// A redirect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// Host.
    pub hostname: Option<String>,
    /// Path.
    pub path: Option<PathModifier>,
    /// Port.
    pub port: Option<u16>,
    /// 302 unless given.
    pub status_code: Option<u16>,
}

/// A rewrite.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Rewrite {
    /// Host.
    pub hostname: Option<String>,
    /// Path.
    pub path: Option<PathModifier>,
}

/// A change of path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PathModifier {
    /// `ReplaceFullPath` or `ReplacePrefixMatch`.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// The whole path.
    pub replace_full_path: Option<String>,
    /// In place of the matched prefix.
    pub replace_prefix_match: Option<String>,
}

/// A weighted backend.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct BackendRef {
    /// Empty or `core` for a Service.
    pub group: Option<String>,
    /// `Service` unless given.
    pub kind: Option<String>,
    /// The route's namespace unless given.
    pub namespace: Option<String>,
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// The service's port; required.
    pub port: Option<u16>,
    /// 1 unless given.
    pub weight: Option<u32>,
    /// On what this backend gets.
    #[serde(deserialize_with = "nullable")]
    pub filters: Vec<Filter>,
}

/// Bounds on time, as Gateway API durations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Timeouts {
    /// Whole request.
    pub request: Option<String>,
    /// One attempt.
    pub backend_request: Option<String>,
}

/// GEP-1731 (experimental).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Retry {
    /// Statuses that are tried again.
    #[serde(deserialize_with = "nullable")]
    pub codes: Vec<u16>,
    /// Attempts beyond the first.
    pub attempts: Option<u32>,
    /// Least wait between attempts.
    pub backoff: Option<String>,
}
