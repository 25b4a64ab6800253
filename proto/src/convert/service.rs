//! `Service`: one port of a service as its callers see it, or one pod by its own address.

use std::time::Duration;

use weft_core::policy::{
    Algorithm, DETECT_TIMEOUT, HealthPolicy, LoadBalancing, Reach, Service, ServiceLimits, ServiceName,
    SuccessRate,
};

use super::{
    Invalid, Problem,
    common::{
        At, MAX_ITEMS, PPM, address, backoff, cut, identity, in_range, millis, port, protocol, requires,
        retry, segment, timeouts, to_address, to_backoff, to_millis, to_ppm, to_protocol, to_retry,
        to_timeouts,
    },
    decode, endpoint,
};
use crate::{
    names::Name,
    pb::v1::{self, load_balancing::Algorithm as PbAlgorithm, service::Reach as PbReach},
};

/// Reads a service.
///
/// # Errors
/// The first field that cannot be taken.
pub fn parse(body: &[u8]) -> Result<Service, Invalid> {
    Service::try_from(&decode::<v1::Service>("Service", body)?)
}

impl TryFrom<&v1::Service> for Service {
    type Error = Invalid;

    fn try_from(pb: &v1::Service) -> Result<Self, Invalid> {
        let at = At::root("Service");
        requires(&at, &pb.requires)?;
        let name = ServiceName {
            namespace: segment(&at.field("namespace"), &pb.namespace)?,
            name: segment(&at.field("name"), &pb.name)?,
            port: port(&at.field("port"), pb.port)?,
        };
        let pod = pb.pod.as_ref().map(|pod| endpoint::convert(&at.field("pod"), pod, &pb.namespace));
        Ok(Self {
            vips: at.each("vips", &pb.vips, MAX_ITEMS, address)?,
            protocol: protocol(&at.field("protocol"), pb.protocol)?,
            detect_timeout: millis(&at.field("detect_timeout_ms"), pb.detect_timeout_ms)?
                .unwrap_or(DETECT_TIMEOUT),
            route: reference(&at.field("route"), &pb.route, "route/", |name| matches!(name, Name::Route(_)))?,
            endpoints: reference(&at.field("endpoints"), &pb.endpoints, "ep/ and end with /*", |name| {
                matches!(name, Name::Collection(_))
            })?,
            reach: match PbReach::try_from(pb.reach) {
                Ok(PbReach::Unspecified) => Reach::Anywhere,
                Ok(PbReach::Node) => Reach::Node,
                Ok(PbReach::PreferNode) => Reach::PreferNode,
                Ok(PbReach::PreferZone) => Reach::PreferZone,
                Err(_) => return Err(at.field("reach").bad(Problem::UnknownValue(pb.reach))),
            },
            pod: pod.transpose()?.map(Into::into),
            load_balancing: load_balancing(&at, pb.lb.as_ref())?,
            health: health(&at, pb.health.as_ref())?,
            limits: limits(&at, pb.limits.as_ref())?,
            accepted_identities: at.each(
                "accepted_identities",
                &pb.accepted_identities,
                MAX_ITEMS,
                |at, id| identity(at, id),
            )?,
            mtls_required: pb.mtls_required,
            timeouts: timeouts(&at, pb.timeouts.as_ref())?,
            retry: retry(&at, pb.retry.as_ref())?,
            name,
        })
    }
}

impl From<&Service> for v1::Service {
    fn from(service: &Service) -> Self {
        let text = |name: &Option<std::sync::Arc<str>>| name.as_deref().unwrap_or_default().to_owned();
        let algorithm = match service.load_balancing.algorithm {
            Algorithm::PeakEwma => PbAlgorithm::PeakEwma,
            Algorithm::LeastRequest => PbAlgorithm::LeastRequest,
            Algorithm::RoundRobin => PbAlgorithm::RoundRobin,
            Algorithm::Random => PbAlgorithm::Random,
        };
        let reach = match service.reach {
            Reach::Anywhere => PbReach::Unspecified,
            Reach::Node => PbReach::Node,
            Reach::PreferNode => PbReach::PreferNode,
            Reach::PreferZone => PbReach::PreferZone,
        };
        Self {
            namespace: service.name.namespace.to_string(),
            name: service.name.name.to_string(),
            port: service.name.port.into(),
            vips: service.vips.iter().copied().map(to_address).collect(),
            protocol: to_protocol(service.protocol),
            detect_timeout_ms: Some(to_millis(service.detect_timeout)),
            route: text(&service.route),
            endpoints: text(&service.endpoints),
            lb: Some(v1::LoadBalancing {
                algorithm: algorithm.into(),
                ewma_decay_ms: Some(to_millis(service.load_balancing.ewma_decay)),
                ewma_initial_ms: Some(to_millis(service.load_balancing.ewma_initial)),
                by_client: service.load_balancing.by_client,
            }),
            health: Some(v1::HealthPolicy {
                consecutive_failures: Some(service.health.consecutive_failures),
                success_rate: service.health.success_rate.map(|rate| v1::health_policy::SuccessRate {
                    threshold_ppm: to_ppm(rate.threshold),
                    window_ms: to_millis(rate.window),
                    min_requests: rate.min_requests,
                }),
                backoff: to_backoff(&service.health.backoff),
                max_ejection_percent: Some(service.health.max_ejection_percent.into()),
            }),
            limits: Some(v1::Limits {
                max_requests: Some(service.limits.max_requests),
                max_connections: Some(service.limits.max_connections),
                queue_wait_ms: Some(u32::try_from(service.limits.queue_wait.as_millis()).unwrap_or(u32::MAX)),
            }),
            accepted_identities: service.accepted_identities.iter().map(ToString::to_string).collect(),
            mtls_required: service.mtls_required,
            pod: service.pod.as_deref().map(endpoint::to_pb),
            timeouts: to_timeouts(&service.timeouts),
            retry: to_retry(&service.retry),
            requires: Vec::new(),
            reach: reach.into(),
        }
    }
}

/// The name of what to subscribe next.
fn reference(
    at: &At<'_>,
    name: &str,
    starts: &'static str,
    is_kind: fn(&Name) -> bool,
) -> Result<Option<std::sync::Arc<str>>, Invalid> {
    if name.is_empty() {
        return Ok(None);
    }
    let parsed: Name = name.parse().map_err(|e: crate::names::NameError| at.bad(e))?;
    if is_kind(&parsed) { Ok(Some(name.into())) } else { Err(at.bad(Problem::NameKind(cut(name), starts))) }
}

fn load_balancing(at: &At<'_>, lb: Option<&v1::LoadBalancing>) -> Result<LoadBalancing, Invalid> {
    let default = LoadBalancing::default();
    let Some(lb) = lb else { return Ok(default) };
    let at = at.field("lb");
    let algorithm = match PbAlgorithm::try_from(lb.algorithm) {
        Ok(PbAlgorithm::Unspecified | PbAlgorithm::PeakEwma) => Algorithm::PeakEwma,
        Ok(PbAlgorithm::LeastRequest) => Algorithm::LeastRequest,
        Ok(PbAlgorithm::RoundRobin) => Algorithm::RoundRobin,
        Ok(PbAlgorithm::Random) => Algorithm::Random,
        Err(_) => return Err(at.field("algorithm").bad(Problem::UnknownValue(lb.algorithm))),
    };
    Ok(LoadBalancing {
        algorithm,
        ewma_decay: millis(&at.field("ewma_decay_ms"), lb.ewma_decay_ms)?.unwrap_or(default.ewma_decay),
        ewma_initial: millis(&at.field("ewma_initial_ms"), lb.ewma_initial_ms)?
            .unwrap_or(default.ewma_initial),
        by_client: lb.by_client,
    })
}

fn health(at: &At<'_>, health: Option<&v1::HealthPolicy>) -> Result<HealthPolicy, Invalid> {
    let default = HealthPolicy::default();
    let Some(health) = health else { return Ok(default) };
    let at = at.field("health");
    let success_rate = match &health.success_rate {
        None => None,
        Some(rate) => {
            let at = at.field("success_rate");
            in_range(&at.field("threshold_ppm"), rate.threshold_ppm.into(), 0..=1_000_000)?;
            in_range(&at.field("window_ms"), rate.window_ms.into(), 1..=3_600_000)?;
            Some(SuccessRate {
                threshold: f64::from(rate.threshold_ppm) / PPM,
                window: Duration::from_millis(rate.window_ms.into()),
                min_requests: rate.min_requests,
            })
        }
    };
    let percent = health.max_ejection_percent.unwrap_or(default.max_ejection_percent.into());
    in_range(&at.field("max_ejection_percent"), percent.into(), 0..=100)?;
    Ok(HealthPolicy {
        consecutive_failures: health.consecutive_failures.unwrap_or(default.consecutive_failures),
        success_rate,
        backoff: backoff(&at, health.backoff.as_ref(), default.backoff)?,
        max_ejection_percent: percent as u8,
    })
}

fn limits(at: &At<'_>, limits: Option<&v1::Limits>) -> Result<ServiceLimits, Invalid> {
    let default = ServiceLimits::default();
    let Some(limits) = limits else { return Ok(default) };
    let at = at.field("limits");
    let cap = |name, value: Option<u32>, default: u32| {
        let value = value.unwrap_or(default);
        // Zero would refuse every request: an authorization policy says that, a cap does not.
        in_range(&at.field(name), value.into(), 1..=u32::MAX.into())?;
        Ok(value)
    };
    Ok(ServiceLimits {
        max_requests: cap("max_requests", limits.max_requests, default.max_requests)?,
        max_connections: cap("max_connections", limits.max_connections, default.max_connections)?,
        // Here zero means something: do not wait.
        queue_wait: limits.queue_wait_ms.map_or(default.queue_wait, |ms| Duration::from_millis(ms.into())),
    })
}
