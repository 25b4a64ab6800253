//! Why one request went as it did, gathered by the evaluation that acted, kept when it failed.
//!
//! Nothing here costs a successful request more than two reference counts.

use std::{
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderValue, StatusCode, uri::PathAndQuery};
use weft_core::{balance::Lease, classify::Outcome};
use weft_proto::pb::v1 as pb;

use super::recorder::Recorder;
use crate::{direction::Direction, error::Error, head::X_REQUEST_ID};

/// The record in the making.
#[derive(Default)]
pub(crate) struct Decision {
    request_id: Option<HeaderValue>,
    path: Option<PathAndQuery>,
    rule: Option<Arc<str>>,
    attempts: Vec<pb::Attempt>,
}

impl Decision {
    pub(crate) fn request(&mut self, headers: &HeaderMap, path: &PathAndQuery) {
        self.request_id = headers.get(X_REQUEST_ID).cloned();
        self.path = Some(path.clone());
    }

    pub(crate) fn rule(&mut self, label: &Arc<str>) {
        self.rule = Some(label.clone());
    }

    /// An attempt that did not succeed: with which status it was answered, or why it was not.
    pub(crate) fn attempt(
        &mut self,
        number: u32,
        lease: &Lease,
        outcome: Outcome,
        answered: Result<StatusCode, &str>,
        now: Instant,
    ) {
        let endpoint = lease.endpoint();
        let detail = match answered {
            Ok(status) => format!("{outcome:?} {status}"),
            Err(detail) => format!("{outcome:?} {detail}"),
        };
        self.attempts.push(pb::Attempt {
            number,
            endpoint: format!("{} {}", endpoint.address, endpoint.uid),
            first_byte_us: now.saturating_duration_since(lease.started()).as_micros() as u64,
            outcome: detail,
        });
    }

    pub(crate) fn request_id(&self) -> &str {
        self.request_id.as_ref().and_then(|v| v.to_str().ok()).unwrap_or("")
    }

    pub(crate) fn attempts(&self) -> usize {
        self.attempts.len()
    }

    /// How the last failed attempt ended.
    pub(crate) fn last(&self) -> &str {
        self.attempts.last().map_or("", |attempt| &attempt.outcome)
    }

    /// Keeps the record of a request that a sidecar answered itself.
    pub(crate) fn keep(self, recorder: &Recorder, direction: Direction, service: &str, error: &Error) {
        let answer = error.answer();
        recorder.decision(pb::DecisionRecord {
            request_id: self.request_id().to_owned(),
            at_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            direction: pb::Direction::from(direction).into(),
            service: service.to_owned(),
            method: self.path.as_ref().map_or_else(String::new, |p| p.path().to_owned()),
            route: self.rule.as_deref().unwrap_or_default().to_owned(),
            attempts: self.attempts,
            reason: format!("{};{}", direction.as_str(), answer.code),
            status: u32::from(answer.status.as_u16()),
            ..Default::default()
        });
    }
}
