//! The settings of a TrafficPolicy, as the core has them.
//!
//! Why field by field over several levels: whoever runs a platform says something about every Service, an author
//! something about one rule, and neither repeats the other. What nobody says is the core's default.

use std::time::Duration;

use weft_core::{
    backoff::Backoff,
    budget::BudgetParams,
    identity::SpiffeId,
    policy::{
        Algorithm, By, HealthPolicy, HttpMatch, LoadBalancing, ObjectRef, Rate, RateError, RateLimit,
        RetryPolicy, ServiceLimits, SuccessRate, Timeouts,
    },
};

use crate::resources::{
    policy::{self, BackoffSpec, Operation, TrafficPolicySpec},
    values::GatewayDuration,
};

/// The first level that sets a field decides it.
pub(super) fn merge(levels: &[&TrafficPolicySpec]) -> TrafficPolicySpec {
    let mut merged = TrafficPolicySpec::default();
    for level in levels {
        let timeouts = &level.timeouts;
        merged.timeouts.request = merged.timeouts.request.or(timeouts.request);
        merged.timeouts.per_try = merged.timeouts.per_try.or(timeouts.per_try);
        merged.timeouts.connect = merged.timeouts.connect.or(timeouts.connect);
        merged.retries = merged.retries.or_else(|| level.retries.clone());
        merged.load_balancing = merged.load_balancing.or_else(|| level.load_balancing.clone());
        merged.outlier_ejection = merged.outlier_ejection.or_else(|| level.outlier_ejection.clone());
        merged.limits = merged.limits.or_else(|| level.limits.clone());
        merged.mtls_required = merged.mtls_required.or(level.mtls_required);
        merged.detect_timeout = merged.detect_timeout.or(level.detect_timeout);
        if merged.accepted_identities.is_empty() {
            merged.accepted_identities.clone_from(&level.accepted_identities);
        }
    }
    merged
}

/// `0s` is no bound (Gateway API).
pub(super) fn bound(text: &str) -> Result<Option<Duration>, String> {
    Ok(some_bound(text.parse()?))
}

fn some_bound(duration: GatewayDuration) -> Option<Duration> {
    (!duration.0.is_zero()).then_some(duration.0)
}

pub(super) fn timeouts(spec: &policy::Timeouts) -> Timeouts {
    Timeouts {
        request: spec.request.and_then(some_bound),
        per_try: spec.per_try.and_then(some_bound),
        connect: spec.connect.and_then(some_bound),
    }
}

pub(super) fn retry(spec: Option<&policy::Retries>) -> RetryPolicy {
    let mut retry = RetryPolicy::default();
    let Some(spec) = spec else { return retry };
    retry.statuses = spec.statuses.iter().map(|s| s.0.clone()).collect();
    retry.grpc_codes = spec.grpc_codes.iter().map(|c| c.0).collect();
    retry.on_reset = spec.on_reset.unwrap_or(retry.on_reset);
    retry.max_retries = spec.max_retries.unwrap_or(retry.max_retries);
    retry.any_method = spec.any_method.unwrap_or(retry.any_method);
    retry.max_body = spec.max_body_bytes.and_then(|n| usize::try_from(n).ok()).unwrap_or(retry.max_body);
    retry.backoff = backoff(spec.backoff.as_ref(), retry.backoff);
    if let Some(budget) = &spec.budget {
        let default = BudgetParams::default();
        retry.budget = BudgetParams {
            ratio: budget.percent.map_or(default.ratio, |percent| f64::from(percent) / 100.0),
            min_per_second: budget.min_per_second.unwrap_or(default.min_per_second),
            window: budget.window.map_or(default.window, |window| window.0),
        };
    }
    retry
}

/// Parts that are not given are the default's, stretched where the given one would not fit.
pub(crate) fn try_backoff(spec: &BackoffSpec, default: Backoff) -> Result<Backoff, String> {
    let min =
        spec.min.map_or_else(|| spec.max.map_or(default.min(), |max| default.min().min(max.0)), |d| d.0);
    let max = spec.max.map_or_else(|| default.max().max(min), |d| d.0);
    let jitter = spec.jitter.map_or(default.jitter(), |share| share.0);
    Backoff::try_new(min, max, jitter).map_err(|e| e.to_string())
}

fn backoff(spec: Option<&BackoffSpec>, default: Backoff) -> Backoff {
    // What does not fit was refused when it was read.
    spec.and_then(|spec| try_backoff(spec, default).ok()).unwrap_or(default)
}

pub(super) fn load_balancing(spec: Option<&policy::LoadBalancing>, by_client: bool) -> LoadBalancing {
    let default = LoadBalancing { by_client, ..LoadBalancing::default() };
    let Some(spec) = spec else { return default };
    LoadBalancing {
        algorithm: match spec.algorithm {
            policy::Algorithm::PeakEwma => Algorithm::PeakEwma,
            policy::Algorithm::LeastRequest => Algorithm::LeastRequest,
            policy::Algorithm::RoundRobin => Algorithm::RoundRobin,
            policy::Algorithm::Random => Algorithm::Random,
        },
        ewma_decay: spec.ewma.decay.map_or(default.ewma_decay, |d| d.0),
        ewma_initial: spec.ewma.initial.map_or(default.ewma_initial, |d| d.0),
        by_client,
    }
}

pub(super) fn health(spec: Option<&policy::OutlierEjection>) -> HealthPolicy {
    let default = HealthPolicy::default();
    let Some(spec) = spec else { return default };
    let success_rate = match &spec.success_rate {
        None => default.success_rate,
        Some(rate) => {
            let base = default.success_rate.unwrap_or(SuccessRate {
                threshold: 0.8,
                window: Duration::from_secs(10),
                min_requests: 10,
            });
            let threshold = rate.threshold.map_or(base.threshold, |share| share.0);
            (threshold > 0.0).then(|| SuccessRate {
                threshold,
                window: rate.window.map_or(base.window, |window| window.0),
                min_requests: rate.min_requests.unwrap_or(base.min_requests),
            })
        }
    };
    HealthPolicy {
        consecutive_failures: spec.consecutive_failures.unwrap_or(default.consecutive_failures),
        success_rate,
        backoff: backoff(spec.backoff.as_ref(), default.backoff),
        max_ejection_percent: spec.max_ejection_percent.unwrap_or(default.max_ejection_percent),
    }
}

pub(super) fn limits(spec: Option<&policy::Limits>) -> ServiceLimits {
    let default = ServiceLimits::default();
    let Some(spec) = spec else { return default };
    ServiceLimits {
        max_requests: spec.max_requests.unwrap_or(default.max_requests),
        max_connections: spec.max_connections.unwrap_or(default.max_connections),
        queue_wait: spec.queue_wait.map_or(default.queue_wait, |wait| wait.0),
    }
}

/// One limit of a policy.
///
/// # Errors
/// What is out of bounds.
pub(super) fn try_rate_limit(
    spec: &policy::RateLimit,
    object: &ObjectRef,
    position: usize,
) -> Result<RateLimit, RateError> {
    let per = spec.per.map_or(Duration::from_secs(1), |per| per.0);
    Ok(RateLimit {
        object: object.clone(),
        name: position.to_string().into(),
        rate: Rate::try_new(spec.requests, per, spec.burst)?,
        http: spec.to.iter().map(http).collect(),
        by: By {
            identity: spec.by.identity.unwrap_or(false),
            headers: spec.by.headers.iter().map(|name| name.0.clone()).collect(),
        },
    })
}

/// Which requests are meant.
pub(super) fn http(operation: &Operation) -> HttpMatch {
    HttpMatch {
        methods: operation.methods.iter().map(|m| m.0.clone()).collect(),
        paths: operation.paths.iter().map(|p| p.0.clone()).collect(),
        hosts: operation.hosts.iter().map(|h| h.0.clone()).collect(),
        headers: operation.headers.iter().map(|h| (h.name.0.clone(), h.value.0.clone())).collect(),
    }
}

pub(super) fn accepted(spec: &TrafficPolicySpec) -> Vec<SpiffeId> {
    spec.accepted_identities.iter().map(|identity| identity.0.clone()).collect()
}
