//! What an answer, or the lack of one, says: about the endpoint, for a retry, and in histograms.
//!
//! Why one table: ejection, retries and telemetry must never disagree about what a failure is.

use http::{HeaderMap, StatusCode};

use crate::service::RetryPolicy;

/// How one attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint did its work.
    Success,
    /// 4xx but 429: the caller's fault, the endpoint is healthy.
    ClientError,
    /// The endpoint, or the way to it, failed.
    Failure(Failure),
    /// The caller went away: says nothing about the endpoint.
    Cancelled,
}

/// How an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// 5xx or 429.
    Status(u16),
    /// A gRPC code that blames the server.
    Grpc(u16),
    /// Cut after it was sent.
    Reset,
    /// Answered by something that is no answer.
    Malformed,
    /// No answer in time, after it was sent.
    Timeout,
    /// No connection in time.
    ConnectTimeout,
    /// Connection refused.
    Refused,
    /// Its sidecar is there, and says that the app behind it refuses connections.
    AppRefused,
    /// The peer is not who was expected.
    Identity,
    /// The peer said that it did not process it (GOAWAY below it, REFUSED_STREAM, "not sent").
    NotProcessed,
    /// No route to the endpoint.
    Unreachable,
}

/// The classes of histograms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Success.
    Ok,
    /// The caller's fault, or the caller left.
    ClientError,
    /// The server said that it failed.
    ServerError,
    /// The mesh or the network failed; the server said nothing.
    Proxy,
}

impl Failure {
    /// Whether the app may have seen the request. If not, it is safe to send elsewhere, whatever the method.
    pub fn was_sent(&self) -> bool {
        match self {
            Self::Status(_) | Self::Grpc(_) | Self::Reset | Self::Malformed | Self::Timeout => true,
            Self::ConnectTimeout
            | Self::Refused
            | Self::AppRefused
            | Self::Identity
            | Self::NotProcessed
            | Self::Unreachable => false,
        }
    }

    /// A short name, for labels and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::Grpc(_) => "grpc",
            Self::Reset => "reset",
            Self::Malformed => "malformed",
            Self::Timeout => "timeout",
            Self::ConnectTimeout => "connect-timeout",
            Self::Refused => "refused",
            Self::AppRefused => "app-refused",
            Self::Identity => "identity",
            Self::NotProcessed => "not-processed",
            Self::Unreachable => "unreachable",
        }
    }
}

impl Outcome {
    /// Its histogram.
    pub fn class(&self) -> Class {
        match self {
            Self::Success => Class::Ok,
            Self::ClientError | Self::Cancelled => Class::ClientError,
            Self::Failure(Failure::Status(_) | Failure::Grpc(_)) => Class::ServerError,
            Self::Failure(
                Failure::Reset
                | Failure::Malformed
                | Failure::Timeout
                | Failure::ConnectTimeout
                | Failure::Refused
                | Failure::AppRefused
                | Failure::Identity
                | Failure::NotProcessed
                | Failure::Unreachable,
            ) => Class::Proxy,
        }
    }

    /// Whether the endpoint, or the way to it, failed.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failure(_))
    }
}

impl Class {
    /// Every class, in order.
    pub const ALL: [Self; 4] = [Self::Ok, Self::ClientError, Self::ServerError, Self::Proxy];

    /// Its label.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client-error",
            Self::ServerError => "server-error",
            Self::Proxy => "proxy",
        }
    }
}

/// What an HTTP status says.
pub fn status(status: StatusCode) -> Outcome {
    match status.as_u16() {
        code @ (429 | 500..) => Outcome::Failure(Failure::Status(code)),
        400..=499 => Outcome::ClientError,
        _ => Outcome::Success,
    }
}

/// [`status`], where a status that the policy tries again is a failure, whichever its class.
pub fn status_under(code: StatusCode, policy: &RetryPolicy) -> Outcome {
    if policy.statuses.iter().any(|range| range.contains(&code.as_u16())) {
        return Outcome::Failure(Failure::Status(code.as_u16()));
    }
    status(code)
}

/// What a gRPC code says. Blame the server for UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED,
/// INTERNAL, UNAVAILABLE and DATA_LOSS (and for a code that gRPC does not know).
pub fn grpc(code: u16) -> Outcome {
    match code {
        0 => Outcome::Success,
        1 | 3 | 5 | 6 | 7 | 9..=12 | 16 => Outcome::ClientError,
        _ => Outcome::Failure(Failure::Grpc(code)),
    }
}

/// [`grpc`], where a code that the policy tries again is a failure.
pub fn grpc_under(code: u16, policy: &RetryPolicy) -> Outcome {
    if policy.grpc_codes.contains(&code) {
        return Outcome::Failure(Failure::Grpc(code));
    }
    grpc(code)
}

/// The gRPC status in trailers, or in the head of a trailers-only answer. An unreadable one is 2, UNKNOWN.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    let value = headers.get("grpc-status")?;
    Some(value.to_str().ok().and_then(|text| text.trim().parse().ok()).unwrap_or(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let of = |code: u16| status(StatusCode::from_u16(code).unwrap());
        for code in [100, 101, 200, 204, 304] {
            assert_eq!(of(code), Outcome::Success, "{code}");
        }
        for code in [400, 404, 408, 413, 417, 431, 499] {
            assert_eq!(of(code), Outcome::ClientError, "{code}");
        }
        for code in [429, 500, 503, 504, 599] {
            assert_eq!(of(code), Outcome::Failure(Failure::Status(code)), "{code}");
        }
    }

    #[test]
    fn policy_makes_a_status_a_failure() {
        let policy = RetryPolicy { statuses: vec![404..=404], grpc_codes: vec![10], ..Default::default() };
        let not_found = status_under(StatusCode::NOT_FOUND, &policy);
        assert_eq!(not_found, Outcome::Failure(Failure::Status(404)));
        assert_eq!(status_under(StatusCode::OK, &policy), Outcome::Success);
        assert_eq!(grpc_under(10, &policy), Outcome::Failure(Failure::Grpc(10)));
        assert_eq!(grpc_under(5, &policy), Outcome::ClientError);
    }

    #[test]
    fn grpc_codes() {
        let failures: Vec<u16> = (0..=17).filter(|&c| grpc(c).is_failure()).collect();
        assert_eq!(failures, [2, 4, 8, 13, 14, 15, 17]);
        assert_eq!(grpc(0), Outcome::Success);
    }

    #[test]
    fn grpc_status_of_trailers() {
        let mut h = HeaderMap::new();
        assert_eq!(grpc_status(&h), None);
        h.insert("grpc-status", "14".parse().unwrap());
        assert_eq!(grpc_status(&h), Some(14));
        h.insert("grpc-status", "soon".parse().unwrap());
        assert_eq!(grpc_status(&h), Some(2));
    }

    #[test]
    fn classes() {
        assert_eq!(Outcome::Failure(Failure::Status(503)).class(), Class::ServerError);
        assert_eq!(Outcome::Failure(Failure::Refused).class(), Class::Proxy);
        assert_eq!(Outcome::Cancelled.class(), Class::ClientError);
        assert!(
            !Failure::NotProcessed.was_sent() && Failure::Reset.was_sent() && !Failure::Identity.was_sent()
        );
    }
}
