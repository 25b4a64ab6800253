//! Whether a request is tried again, and after how long.
//!
//! Two different things are called retry. *Re-dispatch* sends what no app has seen (refused, no
//! connection in time, `GOAWAY`) to another endpoint: safe for every method, on by default, at most
//! [`MAX_ENDPOINTS`] endpoints. A *retry* repeats what an app may have acted on: off by default, only
//! for idempotent requests unless the policy says otherwise. Both take from one budget, so neither
//! can multiply an outage. Why a value and not a loop: the shell owns sockets and timers, the count
//! and the reasons are tested here without either.

use std::time::{Duration, Instant};

use http::{HeaderMap, Method};
use rand_core::RngCore;

use crate::{
    budget::Budget,
    classify::{Failure, Outcome},
    policy::RetryPolicy,
};

/// The attempts of one request.
#[derive(Debug)]
pub struct Attempts<'p> {
    policy: &'p RetryPolicy,
    idempotent: bool,
    retries: u32,
    redispatches: u32,
}

/// What to do after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Answer with what there is.
    Stop(Stop),
    /// Try again after so long.
    RetryAfter(Duration),
}

/// Why no further attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// There is nothing to repair.
    Done,
    /// The policy does not try this again.
    NotRetryable,
    /// All attempts that the policy allows were made.
    Exhausted,
    /// The budget has nothing left.
    BudgetExhausted,
    /// The request's body can no longer be sent from its start.
    BodyGone,
    /// The app may have acted on it, and twice may not be the same as once.
    NotIdempotent,
}

/// How many endpoints a request that was not sent is offered to.
pub const MAX_ENDPOINTS: u32 = 3;

impl<'p> Attempts<'p> {
    /// Before the first attempt. `idempotent` as [`is_idempotent`] says.
    pub fn new(policy: &'p RetryPolicy, idempotent: bool) -> Self {
        Self { policy, idempotent, retries: 0, redispatches: 0 }
    }

    /// The number of the attempt that is under way, from 1.
    pub fn number(&self) -> u32 {
        1 + self.retries + self.redispatches
    }

    /// After an attempt: what now? `replayable` says whether the body can still be sent from its start.
    pub fn next(
        &mut self,
        outcome: Outcome,
        replayable: bool,
        budget: &Budget,
        now: Instant,
        rng: &mut dyn RngCore,
    ) -> Next {
        let failure = match outcome {
            Outcome::Failure(failure) => failure,
            Outcome::Success | Outcome::ClientError | Outcome::Cancelled => return Next::Stop(Stop::Done),
        };
        let sent = failure.was_sent();
        let refuse = if sent { self.refuse_retry(failure) } else { self.refuse_redispatch() };
        let stop = match refuse {
            Some(stop) => stop,
            None if !replayable => Stop::BodyGone,
            None if !budget.try_withdraw(now) => Stop::BudgetExhausted,
            None if sent => {
                self.retries += 1;
                return Next::RetryAfter(self.policy.backoff.delay(self.retries - 1, rng));
            }
            None => {
                self.redispatches += 1;
                // The first goes elsewhere at once; after that a wait lets an endpoint list catch up.
                let wait = match self.redispatches {
                    1 => Duration::ZERO,
                    n => self.policy.backoff.delay(n - 2, rng),
                };
                return Next::RetryAfter(wait);
            }
        };
        Next::Stop(stop)
    }

    fn refuse_redispatch(&self) -> Option<Stop> {
        (self.redispatches + 1 >= MAX_ENDPOINTS).then_some(Stop::Exhausted)
    }

    fn refuse_retry(&self, failure: Failure) -> Option<Stop> {
        let listed = match failure {
            Failure::Status(code) => self.policy.statuses.iter().any(|range| range.contains(&code)),
            Failure::Grpc(code) => self.policy.grpc_codes.contains(&code),
            Failure::Reset | Failure::Timeout => self.policy.on_reset,
            Failure::ConnectTimeout
            | Failure::Refused
            | Failure::Identity
            | Failure::NotProcessed
            | Failure::Unreachable => true,
        };
        if !listed {
            return Some(Stop::NotRetryable);
        }
        if !self.idempotent && !self.policy.any_method {
            return Some(Stop::NotIdempotent);
        }
        (self.retries >= self.policy.max_retries).then_some(Stop::Exhausted)
    }
}

impl Stop {
    /// A short name, for labels and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::NotRetryable => "not-retryable",
            Self::Exhausted => "exhausted",
            Self::BudgetExhausted => "budget-exhausted",
            Self::BodyGone => "body-gone",
            Self::NotIdempotent => "not-idempotent",
        }
    }
}

/// Whether sending the request twice is the same as once (RFC 9110 §9.2.2), or the caller says that
/// the server takes care of it (`Idempotency-Key`).
pub fn is_idempotent(method: &Method, headers: &HeaderMap) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    ) || headers.contains_key("idempotency-key")
}
