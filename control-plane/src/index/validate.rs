//! What a single object must not say, beyond what its types already refuse: relations between fields.
//!
//! Why here and not at compile time: an object that is refused when it is read keeps its last good
//! version, and its author learns the field at once.

use std::time::Duration;

use k8s_openapi::api::{
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
};
use weft_core::{
    backoff::Backoff,
    identity::PodUid,
    policy::{Action, Authorization, RateError},
};
use weft_proto::{
    ads::MAX_RESOURCE_LEN,
    convert::{authz, workload},
    pb::v1,
};

use super::{
    inbound::{combinations, exceptions, rules_of},
    objects::{SERVICE_NAME, parse_opaque_ports, parse_ports},
    rules::object_ref,
    traffic::{try_backoff, try_rate_limit},
};
use crate::resources::{
    AuthorizationPolicy, INJECTED, Kind, OPAQUE_PORTS, Object, SKIP_INBOUND_PORTS, TrafficPolicy, WEIGHT,
    lookup,
    policy::{AuthorizationPolicySpec, BackoffSpec, Operation, TargetRef, TrafficPolicySpec},
    values::GatewayDuration,
};

/// What is wrong, and where in the object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Invalid {
    /// Field path.
    pub path: String,
    /// Reason.
    pub reason: String,
}

/// Checks an object.
///
/// # Errors
/// The first thing that is wrong.
pub fn object(object: &Object) -> Result<(), Invalid> {
    match object {
        Object::Service(service) => self::service(service),
        Object::EndpointSlice(slice) => self::slice(slice),
        Object::Pod(pod) => self::pod(pod),
        Object::TrafficPolicy(policy) => traffic(policy),
        Object::AuthorizationPolicy(policy) => authorization(policy),
        // What a route says that cannot be enforced is a condition of the route, rule by rule.
        Object::HttpRoute(route) => count("spec.rules", route.spec.rules.len(), MAX_RULES),
        Object::GrpcRoute(route) => count("spec.rules", route.spec.rules.len(), MAX_RULES),
        Object::MeshConfig(_) => Ok(()),
    }
}

fn service(service: &Service) -> Result<(), Invalid> {
    let Some(spec) = &service.spec else { return Ok(()) };
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        if !(1..=65_535).contains(&port.port) {
            return invalid(format!("spec.ports[{i}].port"), format!("{} is not a port", port.port));
        }
    }
    for (i, ip) in spec.cluster_ips.iter().flatten().enumerate() {
        if ip != "None" && ip.parse::<std::net::IpAddr>().is_err() {
            return invalid(format!("spec.clusterIPs[{i}]"), format!("{ip:?} is not an address"));
        }
    }
    match spec.cluster_ip.as_deref() {
        None | Some("" | "None") => Ok(()),
        Some(ip) if ip.parse::<std::net::IpAddr>().is_ok() => Ok(()),
        Some(ip) => invalid("spec.clusterIP", format!("{ip:?} is not an address")),
    }
}

fn slice(slice: &EndpointSlice) -> Result<(), Invalid> {
    if lookup(&slice.metadata.labels, SERVICE_NAME).is_none() {
        return invalid(
            "metadata.labels",
            format!("{} is missing: whose endpoints are these?", SERVICE_NAME),
        );
    }
    for (i, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        for (j, address) in endpoint.addresses.iter().enumerate() {
            if slice.address_type != "FQDN" && address.parse::<std::net::IpAddr>().is_err() {
                return invalid(
                    format!("endpoints[{i}].addresses[{j}]"),
                    format!("{address:?} is not an address"),
                );
            }
        }
    }
    Ok(())
}

fn pod(pod: &Pod) -> Result<(), Invalid> {
    let injected = lookup(&pod.metadata.annotations, INJECTED) == Some("true");
    match pod.metadata.uid.as_deref().map(PodUid::new) {
        Some(Err(error)) => return invalid("metadata.uid", error.to_string()),
        None if injected => {
            return invalid("metadata.uid", "is missing: a pod in the mesh is known by its uid");
        }
        Some(Ok(_)) | None => {}
    }
    if let Some(text) = lookup(&pod.metadata.annotations, SKIP_INBOUND_PORTS)
        && let Err(reason) = parse_ports(text)
    {
        return invalid(format!("metadata.annotations[{SKIP_INBOUND_PORTS}]"), reason);
    }
    if let Some(text) = lookup(&pod.metadata.annotations, OPAQUE_PORTS)
        && let Err(reason) = parse_opaque_ports(text)
    {
        return invalid(format!("metadata.annotations[{OPAQUE_PORTS}]"), reason);
    }
    if let Some(text) = lookup(&pod.metadata.annotations, WEIGHT)
        && text.parse::<u32>().is_err()
    {
        return invalid(format!("metadata.annotations[{WEIGHT}]"), format!("{text:?} is not a weight"));
    }
    let status = pod.status.as_ref();
    if let Some(ip) = status.and_then(|s| s.pod_ip.as_deref())
        && ip.parse::<std::net::IpAddr>().is_err()
    {
        return invalid("status.podIP", format!("{ip:?} is not an address"));
    }
    for (i, ip) in status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().enumerate() {
        if ip.ip.parse::<std::net::IpAddr>().is_err() {
            return invalid(format!("status.podIPs[{i}].ip"), format!("{:?} is not an address", ip.ip));
        }
    }
    Ok(())
}

fn traffic(policy: &TrafficPolicy) -> Result<(), Invalid> {
    let spec = &policy.spec;
    targets(&spec.target_refs, &["Service", "HTTPRoute", "GRPCRoute"], true)?;
    for (i, target) in spec.target_refs.iter().enumerate().filter(|(_, target)| target.kind != "Service") {
        if let Some(field) = service_only(spec) {
            let reason =
                format!("is about services, but targetRefs[{i}] is the {} {}", target.kind, target.name);
            return invalid(format!("spec.{field}"), reason);
        }
    }
    // What the wire refuses would keep everything that is said of the service from its callers.
    at_least("spec.detectTimeout", spec.detect_timeout, Duration::from_millis(1))?;
    count("spec.acceptedIdentities", spec.accepted_identities.len(), MAX_ITEMS)?;
    if let Some(limits) = &spec.limits {
        for (field, limit) in
            [("maxRequests", limits.max_requests), ("maxConnections", limits.max_connections)]
        {
            if limit == Some(0) {
                let reason = "0 would refuse everybody; an AuthorizationPolicy says who may not call";
                return invalid(format!("spec.limits.{field}"), reason);
            }
        }
    }
    rate_limits(policy)?;
    if let Some(retries) = &spec.retries {
        count("spec.retries.statuses", retries.statuses.len(), MAX_ITEMS)?;
        count("spec.retries.grpcCodes", retries.grpc_codes.len(), MAX_ITEMS)?;
        if let Some(spec) = &retries.backoff {
            backoff("spec.retries.backoff", spec, Backoff::RETRY)?;
        }
        if let Some(budget) = &retries.budget {
            at_most("spec.retries.budget.percent", budget.percent, 1_000)?;
            at_least("spec.retries.budget.window", budget.window, Duration::from_millis(100))?;
            no_longer("spec.retries.budget.window", budget.window, Duration::from_secs(600))?;
            at_most("spec.retries.budget.minPerSecond", budget.min_per_second, 1_000_000)?;
        }
        at_most("spec.retries.maxRetries", retries.max_retries, 10)?;
        at_most("spec.retries.maxBodyBytes", retries.max_body_bytes, 1024 * 1024)?;
    }
    if let Some(lb) = &spec.load_balancing {
        at_least("spec.loadBalancing.ewma.decay", lb.ewma.decay, Duration::from_millis(1))?;
        at_least("spec.loadBalancing.ewma.initial", lb.ewma.initial, Duration::from_millis(1))?;
    }
    if let Some(ejection) = &spec.outlier_ejection {
        if let Some(spec) = &ejection.backoff {
            backoff("spec.outlierEjection.backoff", spec, Backoff::EJECTION)?;
        }
        at_most(
            "spec.outlierEjection.maxEjectionPercent",
            ejection.max_ejection_percent.map(u32::from),
            100,
        )?;
        let window = ejection.success_rate.as_ref().and_then(|rate| rate.window);
        at_least("spec.outlierEjection.successRate.window", window, Duration::from_millis(100))?;
        no_longer("spec.outlierEjection.successRate.window", window, Duration::from_secs(3_600))?;
    }
    Ok(())
}

fn rate_limits(policy: &TrafficPolicy) -> Result<(), Invalid> {
    let limits = policy.spec.rate_limits.as_deref().unwrap_or_default();
    count("spec.rateLimits", limits.len(), MAX_RATE_LIMITS)?;
    let object = object_ref(Kind::TrafficPolicy, &("namespace".into(), "name".into()));
    let mut compiled = Vec::with_capacity(limits.len());
    for (i, limit) in limits.iter().enumerate() {
        let path = format!("spec.rateLimits[{i}]");
        count(&format!("{path}.by.headers"), limit.by.headers.len(), MAX_KEY_HEADERS)?;
        for (j, to) in limit.to.iter().enumerate() {
            if *to == Operation::default() {
                return invalid(
                    format!("{path}.to[{j}]"),
                    "says nothing; leave `to` out to mean all requests",
                );
            }
            let lists = [to.methods.len(), to.paths.len(), to.hosts.len(), to.headers.len()];
            count(&format!("{path}.to[{j}]"), lists.into_iter().sum(), MAX_ITEMS)?;
        }
        match try_rate_limit(limit, &object, i) {
            Ok(limit) => compiled.push(limit),
            Err(error) => {
                let field = match error {
                    RateError::Requests => "requests",
                    RateError::Per => "per",
                    RateError::Burst => "burst",
                };
                return invalid(format!("{path}.{field}"), error.to_string());
            }
        }
    }
    // Told with all else that each of its pods needs to know.
    let bytes = workload::size(&compiled);
    if bytes > MAX_RATE_LIMIT_BYTES {
        let reason = format!("they take {bytes} bytes in all; at most {MAX_RATE_LIMIT_BYTES} can be told");
        return invalid("spec.rateLimits", reason);
    }
    Ok(())
}

/// The first field that only services have.
fn service_only(spec: &TrafficPolicySpec) -> Option<&'static str> {
    [
        ("loadBalancing", spec.load_balancing.is_some()),
        ("outlierEjection", spec.outlier_ejection.is_some()),
        ("limits", spec.limits.is_some()),
        ("rateLimits", spec.rate_limits.is_some()),
        ("mtlsRequired", spec.mtls_required.is_some()),
        ("acceptedIdentities", !spec.accepted_identities.is_empty()),
        ("detectTimeout", spec.detect_timeout.is_some()),
    ]
    .into_iter()
    .find_map(|(field, set)| set.then_some(field))
}

fn authorization(policy: &AuthorizationPolicy) -> Result<(), Invalid> {
    let AuthorizationPolicySpec { target_refs, ports, rules, .. } = &policy.spec;
    targets(target_refs, &["Service"], false)?;
    if let Some(i) = ports.iter().position(|port| *port == 0) {
        return invalid(format!("spec.ports[{i}]"), "0 is not a port");
    }
    count("spec.rules", rules.len(), MAX_RULES)?;
    let mut all = 0_usize;
    for (i, rule) in rules.iter().enumerate() {
        let sizes = rule.from.iter().map(|from| (combinations(from), exceptions(from)));
        let (sources, values) = sizes.fold((0_usize, 0_usize), |(sources, values), (each, exceptions)| {
            let told = each.saturating_mul(exceptions.saturating_add(1));
            (sources.saturating_add(each), values.saturating_add(told))
        });
        count(&format!("spec.rules[{i}].from"), sources, MAX_SOURCES)?;
        all = all.saturating_add(values);
    }
    // They are told to each workload for each of its ports.
    count("spec.rules[].from", all, MAX_SOURCES_IN_ALL)?;
    told(&policy.spec)
}

/// Whether sidecars would take what a policy says. They read a port's policies as one, and refuse them as one: what is
/// wrong in one of them would keep the others' changes from them.
fn told(spec: &AuthorizationPolicySpec) -> Result<(), Invalid> {
    let name = ("namespace".into(), "name".into());
    let object = object_ref(Kind::AuthorizationPolicy, &name);
    let rules: Vec<_> = rules_of(spec, Action::Deny, &object).collect();
    let bytes = authz::size(&rules);
    if bytes > MAX_RESOURCE_LEN {
        return invalid(
            "spec.rules",
            format!("they take {bytes} bytes in all; at most {MAX_RESOURCE_LEN} can be told"),
        );
    }
    let policy = Authorization { default: Action::Deny, rules: rules.into(), generation: 0 };
    match Authorization::try_from(&v1::Authorization::from(&policy)) {
        Ok(_) => Ok(()),
        Err(error) => invalid(field(&error.field), error.problem.to_string()),
    }
}

/// The field of a policy that became one of the message.
fn field(told: &str) -> String {
    let path = told.replacen("Authorization.", "spec.", 1).replacen(".http", ".to", 1);
    // One for each combination of what is listed: their numbers say nothing to an author.
    match path.split_once(".sources") {
        Some((rule, _)) => format!("{rule}.from"),
        None => path,
    }
}

fn targets(targets: &[TargetRef], kinds: &[&str], required: bool) -> Result<(), Invalid> {
    if required && targets.is_empty() {
        return invalid("spec.targetRefs", "is empty: what is the policy about?");
    }
    for (i, target) in targets.iter().enumerate() {
        let path = format!("spec.targetRefs[{i}]");
        if !kinds.contains(&target.kind.as_str()) {
            return invalid(
                format!("{path}.kind"),
                format!("{:?} is not one of {}", target.kind, kinds.join(", ")),
            );
        }
        let group_ok = match target.kind.as_str() {
            "Service" => matches!(target.group.as_str(), "" | "core"),
            _ => matches!(target.group.as_str(), "" | "gateway.networking.k8s.io"),
        };
        if !group_ok {
            return invalid(format!("{path}.group"), format!("{:?} has no {}", target.group, target.kind));
        }
        if target.name.is_empty() {
            return invalid(format!("{path}.name"), "is missing");
        }
    }
    Ok(())
}

fn backoff(path: &str, spec: &BackoffSpec, default: Backoff) -> Result<(), Invalid> {
    match try_backoff(spec, default) {
        Ok(_) => Ok(()),
        Err(reason) => invalid(path, reason),
    }
}

fn at_most(path: &str, value: Option<u32>, limit: u32) -> Result<(), Invalid> {
    match value {
        Some(value) if value > limit => invalid(path, format!("{value} is above {limit}")),
        _ => Ok(()),
    }
}

fn at_least(path: &str, value: Option<GatewayDuration>, limit: Duration) -> Result<(), Invalid> {
    match value {
        Some(value) if value.0 < limit => {
            invalid(path, format!("{value} is below {}", GatewayDuration(limit)))
        }
        _ => Ok(()),
    }
}

fn no_longer(path: &str, value: Option<GatewayDuration>, limit: Duration) -> Result<(), Invalid> {
    match value {
        Some(value) if value.0 > limit => {
            invalid(path, format!("{value} is above {}", GatewayDuration(limit)))
        }
        _ => Ok(()),
    }
}

fn count(path: &str, len: usize, limit: usize) -> Result<(), Invalid> {
    if len > limit {
        return invalid(path, format!("{len} are more than {limit}"));
    }
    Ok(())
}

fn invalid(path: impl Into<String>, reason: impl Into<String>) -> Result<(), Invalid> {
    Err(Invalid { path: path.into(), reason: reason.into() })
}

/// Gateway API's own bound is 16 rules; this leaves room and still bounds what sidecars get.
const MAX_RULES: usize = 1_024;
/// Of one policy: each is asked for each request.
const MAX_RATE_LIMITS: usize = 32;
const MAX_KEY_HEADERS: usize = 16;
/// Of one policy: a pod may be behind several services.
const MAX_RATE_LIMIT_BYTES: usize = 64 * 1024;
/// Of an ordinary list.
const MAX_ITEMS: usize = 1_024;
/// Combinations of one rule's sources.
const MAX_SOURCES: usize = 1_024;
/// Those of all rules of a policy, each with what it excepts.
const MAX_SOURCES_IN_ALL: usize = 4_096;

#[cfg(test)]
mod tests {
    use crate::source::yaml::{self, Document};

    #[track_caller]
    fn refused(kind: &str, spec: &str, field: &str, why: &str) {
        let object = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: a, namespace: shop}}\nspec: {spec}\n"
        );
        let read = yaml::read(&"test.yaml".into(), &object).remove(0);
        let Document::Bad { problem, .. } = read else { panic!("{read:?}") };
        assert!(problem.path == field && problem.reason.contains(why), "{problem:?}");
    }

    #[test]
    fn what_sidecars_would_refuse_is_refused_where_it_is_written() {
        let policy = |rule: String, field, why| {
            refused("AuthorizationPolicy", &format!("{{action: Deny, rules: [{{}}, {rule}]}}"), field, why);
        };
        let many = |what: &str| vec![what; 1_025].join(", ");
        policy(format!("{{to: [{{}}, {{paths: [{}]}}]}}", many("/a")), "spec.rules[1].to[1].paths", "1024");
        policy(
            format!("{{to: [{{methods: [{}]}}]}}", "A".repeat(254)),
            "spec.rules[1].to[0].methods[0]",
            "253",
        );
        policy(format!("{{from: [{{notIdentities: [{}]}}]}}", many("a*")), "spec.rules[1].from", "1024");
        let long = vec![format!("/{}", "a".repeat(4_000)); 300].join(", ");
        policy(format!("{{to: [{{paths: [{long}]}}]}}"), "spec.rules", "1048576");
        let traffic = |rest: &str, field, why| {
            let spec = format!("{{targetRefs: [{{kind: Service, name: a}}], {rest}}}");
            refused("TrafficPolicy", &spec, field, why);
        };
        traffic("limits: {maxRequests: 0}", "spec.limits.maxRequests", "AuthorizationPolicy");
        traffic("limits: {maxConnections: 0}", "spec.limits.maxConnections", "AuthorizationPolicy");
        traffic("detectTimeout: 0s", "spec.detectTimeout", "below 1ms");
        traffic("retries: {budget: {window: 11m}}", "spec.retries.budget.window", "above 10m");
        traffic("retries: {budget: {minPerSecond: 1000001}}", "spec.retries.budget.minPerSecond", "above");
        let rate = "outlierEjection: {successRate: {window: 61m}}";
        traffic(rate, "spec.outlierEjection.successRate.window", "above 1h");
        let rate = |limit: &str, field: &str, why| {
            let spec = format!(
                "{{targetRefs: [{{kind: Service, name: a}}], rateLimits: [{{requests: 1}}, {limit}]}}"
            );
            refused("TrafficPolicy", &spec, &format!("spec.rateLimits[1].{field}"), why);
        };
        rate("{requests: 0}", "requests", "1 to 1000000");
        rate("{requests: 1, per: 0s}", "per", "100ms to 1h");
        rate("{requests: 1, burst: 0}", "burst", "1 to 1000000");
        rate("{requests: 1, to: [{}]}", "to[0]", "leave `to` out");
        traffic("rateLimits: [{per: 1s}]", "spec.rateLimits[0]", "requests");
        let many = vec!["{requests: 1}"; 33].join(", ");
        traffic(&format!("rateLimits: [{many}]"), "spec.rateLimits", "33 are more than 32");
        let long = format!("/{}", "x".repeat(4_000));
        let many = vec![format!("{{requests: 1, to: [{{paths: [{long}]}}]}}"); 20].join(", ");
        traffic(&format!("rateLimits: [{many}]"), "spec.rateLimits", "can be told");
    }
}
