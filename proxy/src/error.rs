//! Everything that can go wrong with a request, and what its caller is told: one exhaustive table.
//!
//! Why one table: "why 503?" is the most asked question of every mesh. Each variant has one HTTP status,
//! one gRPC code and one stable code that a reader can search for, and every response that a sidecar makes
//! carries it as `weft-reason: <component>;<code>`.

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use weft_core::{
    classify::{Class, Failure},
    framing::Why,
};

use crate::direction::Direction;

/// The header that names the sidecar's reason; applications cannot set it.
pub(crate) const WEFT_REASON: HeaderName = HeaderName::from_static("weft-reason");
/// On a response of an inbound sidecar: the app has not seen the request, so the caller may send it
/// elsewhere whatever its method.
pub(crate) const WEFT_UNSENT: HeaderName = HeaderName::from_static("weft-unsent");
/// What an inbound sidecar says in [`WEFT_REASON`] whose app refuses connections.
pub(crate) const APP_REFUSES: &str = "inbound;connect_refused";
/// What it says there of a caller that asks too often.
pub(crate) const RATE_LIMITED: &str = "inbound;rate_limited";

/// Why a sidecar answered a request itself, or ended a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("routes exist for this destination and none matches the request")]
    NoRoute,
    #[error("the destination has routes, and the control plane sent none that can be enforced")]
    RouteUnusable,
    #[error("the rule has no backend")]
    NoBackend,
    #[error("the rule's backend does not exist")]
    BackendUnresolved,
    #[error("a filter of the rule cannot be applied: {0}")]
    InvalidFilter(std::sync::Arc<str>),
    #[error("the backend has no endpoint that can take a request")]
    NoEndpoint,
    #[error("the endpoint refused the connection")]
    Refused,
    #[error("the endpoint did not accept the connection in time")]
    ConnectTimeout,
    #[error("the endpoint cannot be reached")]
    Unreachable,
    #[error("the endpoint is not the workload that was expected")]
    Identity,
    #[error("the endpoint did not process the request, and no other could take it")]
    NotProcessed,
    #[error("the endpoint closed the connection before its answer was whole")]
    Reset,
    #[error("the endpoint did not answer in time")]
    Timeout,
    #[error("no rule of the authorization policy allows it")]
    Denied,
    #[error("mTLS is required here, and the caller sent plaintext")]
    PlaintextRefused,
    #[error("the path is not in canonical form, and a policy looks at paths")]
    PathNotCanonical,
    #[error("the sidecar has no policy for this workload yet")]
    NotReady,
    #[error("the rate limit {limit} is used up")]
    RateLimited {
        /// Which.
        limit: std::sync::Arc<str>,
        /// Seconds until it would be granted.
        wait: u64,
    },
    #[error("the sidecar has as much in flight as it may")]
    Overloaded,
    #[error("the control plane did not answer in time for a destination inside the mesh")]
    DiscoveryTimeout,
    #[error("the egress policy refuses destinations outside the mesh")]
    EgressDenied,
    #[error("the sidecar is draining")]
    Draining,
    #[error("CONNECT is not allowed here")]
    ConnectNotAllowed,
    #[error("the request has no usable target")]
    BadTarget,
    #[error("the upgrade was refused: {0}")]
    Upgrade(&'static str),
    #[error("the client broke off its own upload")]
    UploadBroken,
    #[error("the request is malformed: {0}")]
    Malformed(Why),
    #[error("HTTP is spoken here, and this is none")]
    NotHttp,
    #[error("the request's head took too long")]
    HeadTimeout,
    #[error("too many frames that bring nothing forward")]
    Flood,
    #[error("the endpoint's answer is malformed")]
    MalformedAnswer,
}

/// What the table says of one error.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// gRPC code (`google.rpc.Code`).
    pub(crate) grpc: u16,
    /// Stable, lower-case, for `weft-reason`, logs and metrics.
    pub(crate) code: &'static str,
    /// The app has not seen the request.
    pub(crate) unsent: bool,
}

impl Error {
    /// The table.
    pub(crate) fn answer(&self) -> Answer {
        const CANCELLED: u16 = 1;
        const INVALID_ARGUMENT: u16 = 3;
        const DEADLINE_EXCEEDED: u16 = 4;
        const PERMISSION_DENIED: u16 = 7;
        const RESOURCE_EXHAUSTED: u16 = 8;
        const UNIMPLEMENTED: u16 = 12;
        const UNAVAILABLE: u16 = 14;
        let (status, grpc, code, unsent) = match self {
            Self::NoRoute => (StatusCode::NOT_FOUND, UNIMPLEMENTED, "no_route", true),
            Self::RouteUnusable => (StatusCode::INTERNAL_SERVER_ERROR, UNAVAILABLE, "route_unusable", true),
            Self::NoBackend => (StatusCode::INTERNAL_SERVER_ERROR, UNAVAILABLE, "no_backend", true),
            Self::BackendUnresolved => {
                (StatusCode::INTERNAL_SERVER_ERROR, UNAVAILABLE, "backend_unresolved", true)
            }
            Self::InvalidFilter(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, UNAVAILABLE, "invalid_filter", true)
            }
            Self::NoEndpoint => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "no_endpoint", true),
            Self::Refused => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "connect_refused", true),
            Self::ConnectTimeout => (StatusCode::GATEWAY_TIMEOUT, UNAVAILABLE, "connect_timeout", true),
            Self::Unreachable => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "unreachable", true),
            Self::Identity => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "identity_mismatch", true),
            Self::NotProcessed => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "not_processed", true),
            Self::Reset => (StatusCode::BAD_GATEWAY, UNAVAILABLE, "reset", false),
            Self::Timeout => (StatusCode::GATEWAY_TIMEOUT, DEADLINE_EXCEEDED, "timeout", false),
            Self::Denied => (StatusCode::FORBIDDEN, PERMISSION_DENIED, "denied", false),
            Self::PlaintextRefused => (StatusCode::FORBIDDEN, PERMISSION_DENIED, "plaintext_refused", false),
            Self::PathNotCanonical => {
                (StatusCode::BAD_REQUEST, INVALID_ARGUMENT, "path_not_canonical", false)
            }
            Self::NotReady => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "not_ready", true),
            Self::RateLimited { .. } => {
                (StatusCode::TOO_MANY_REQUESTS, RESOURCE_EXHAUSTED, "rate_limited", false)
            }
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, RESOURCE_EXHAUSTED, "overloaded", true),
            Self::DiscoveryTimeout => {
                (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "discovery_timeout", true)
            }
            Self::EgressDenied => (StatusCode::FORBIDDEN, PERMISSION_DENIED, "egress_denied", false),
            Self::Draining => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "draining", true),
            Self::ConnectNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, UNIMPLEMENTED, "connect_not_allowed", false)
            }
            Self::BadTarget => (StatusCode::BAD_REQUEST, INVALID_ARGUMENT, "bad_target", false),
            Self::Upgrade(_) => (StatusCode::BAD_GATEWAY, UNAVAILABLE, "upgrade_refused", false),
            Self::UploadBroken => (StatusCode::BAD_REQUEST, CANCELLED, "upload_broken", false),
            Self::Malformed(Why::TooLarge | Why::TooManyFields) => {
                (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, RESOURCE_EXHAUSTED, "head_too_large", false)
            }
            Self::Malformed(_) => (StatusCode::BAD_REQUEST, INVALID_ARGUMENT, "malformed_request", false),
            Self::NotHttp => (StatusCode::BAD_REQUEST, INVALID_ARGUMENT, "not_http", false),
            Self::HeadTimeout => (StatusCode::REQUEST_TIMEOUT, DEADLINE_EXCEEDED, "header_timeout", false),
            Self::Flood => (StatusCode::TOO_MANY_REQUESTS, RESOURCE_EXHAUSTED, "flood", false),
            Self::MalformedAnswer => (StatusCode::BAD_GATEWAY, UNAVAILABLE, "malformed_answer", false),
        };
        Answer { status, grpc, code, unsent }
    }

    /// What a failed attempt becomes when no other attempt follows.
    pub(crate) fn from_failure(failure: Failure) -> Self {
        match failure {
            Failure::Refused | Failure::AppRefused => Self::Refused,
            Failure::ConnectTimeout => Self::ConnectTimeout,
            Failure::Unreachable => Self::Unreachable,
            Failure::Identity => Self::Identity,
            Failure::NotProcessed => Self::NotProcessed,
            Failure::Timeout => Self::Timeout,
            Failure::Malformed => Self::MalformedAnswer,
            Failure::Reset | Failure::Status(_) | Failure::Grpc(_) => Self::Reset,
        }
    }

    /// The class under which the histograms count it.
    pub(crate) fn class(&self) -> Class {
        if self.is_the_clients() { Class::ClientError } else { Class::Proxy }
    }

    /// The client's own doing, of which nobody reads the answer: neither an error of the mesh nor worth a line.
    pub(crate) fn is_the_clients(&self) -> bool {
        *self == Self::UploadBroken
    }

    /// Whether what follows on an HTTP/1 connection may be meant otherwise than we would read it.
    pub(crate) fn ends_connection(&self) -> bool {
        matches!(self, Self::BadTarget | Self::ConnectNotAllowed | Self::Malformed(_))
    }

    /// After how many seconds it may be worth asking again.
    fn retry_after(&self) -> Option<u64> {
        if let Self::RateLimited { wait, .. } = self {
            return Some(*wait);
        }
        (*self == Self::Overloaded).then_some(1)
    }

    /// The response: `grpc-status` in a trailers-only answer without a body for gRPC, else a status with a short text.
    pub(crate) fn response(&self, direction: Direction, grpc: bool) -> Response<String> {
        let answer = self.answer();
        let reason = HeaderValue::from_str(&format!("{};{}", direction.as_str(), answer.code));
        let reason = reason.unwrap_or_else(|_| HeaderValue::from_static("proxy"));
        let mut response = if grpc {
            let mut response = Response::new(String::new());
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(GRPC_STATUS, HeaderValue::from(answer.grpc));
            if let Ok(message) = HeaderValue::from_str(&format!("weft: {self}")) {
                headers.insert(GRPC_MESSAGE, message);
            }
            response
        } else {
            let mut response = Response::new(format!("weft: {self}\n"));
            *response.status_mut() = answer.status;
            let text = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, text);
            response
        };
        response.headers_mut().insert(WEFT_REASON, reason);
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if answer.unsent && direction == Direction::Inbound {
            response.headers_mut().insert(WEFT_UNSENT, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Whether a request is gRPC: its content type is `application/grpc` or begins `application/grpc+` or `;`.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.starts_with(b"application/grpc") && matches!(value.get(16), None | Some(b'+' | b';'))
    })
}

pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_error_has_its_status_reason_and_text() {
        let response = Error::NoEndpoint.response(Direction::Outbound, false);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[WEFT_REASON], "outbound;no_endpoint");
        assert!(response.headers().get(WEFT_UNSENT).is_none());
    }

    #[test]
    fn overload_says_when_to_come_again() {
        let after = |error: Error| {
            let response = error.response(Direction::Outbound, false);
            response
                .headers()
                .get(header::RETRY_AFTER)
                .map(|value| value.to_str().unwrap_or_default().to_owned())
        };
        assert_eq!(after(Error::Overloaded).as_deref(), Some("1"));
        assert_eq!(after(Error::NoEndpoint), None);
    }

    #[test]
    fn who_asks_too_often_is_told_when_to_come_again_and_goes_nowhere_else() {
        let error = Error::RateLimited { limit: "TrafficPolicy/shop/api/0".into(), wait: 7 };
        let response = error.response(Direction::Inbound, false);
        assert_eq!((response.status().as_u16(), &response.headers()[header::RETRY_AFTER]), (429, &7.into()));
        assert_eq!(response.headers()[WEFT_REASON], RATE_LIMITED);
        assert!(response.headers().get(WEFT_UNSENT).is_none());
        assert_eq!(error.response(Direction::Inbound, true).headers()[GRPC_STATUS], "8");
    }

    #[test]
    fn a_grpc_error_is_a_trailers_only_answer() {
        let response = Error::Denied.response(Direction::Inbound, true);
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()[GRPC_STATUS], "7");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/grpc");
    }

    #[test]
    fn only_what_the_app_never_saw_is_called_unsent() {
        for error in [Error::Reset, Error::Timeout, Error::Denied, Error::PathNotCanonical] {
            assert!(error.response(Direction::Inbound, false).headers().get(WEFT_UNSENT).is_none());
        }
        let response = Error::Refused.response(Direction::Inbound, false);
        assert_eq!(response.headers()[WEFT_UNSENT], "1");
        assert_eq!(response.headers()[WEFT_REASON], APP_REFUSES);
    }

    #[test]
    fn grpc_is_told_from_grpc_web() {
        let with = |v: &'static str| {
            is_grpc(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(v))]))
        };
        assert!(with("application/grpc") && with("application/grpc+proto") && with("application/grpc; x"));
        assert!(!with("application/grpc-web") && !with("application/json"));
    }
}
