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
    service::RetryPolicy,
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
            Failure::Reset | Failure::Malformed | Failure::Timeout => self.policy.on_reset,
            Failure::ConnectTimeout
            | Failure::Refused
            | Failure::AppRefused
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

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::{backoff::Backoff, budget::BudgetParams};

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    const S503: Outcome = Outcome::Failure(Failure::Status(503));
    const REFUSED: Outcome = Outcome::Failure(Failure::Refused);
    const RESET: Outcome = Outcome::Failure(Failure::Reset);

    struct World {
        policy: RetryPolicy,
        budget: Budget,
        now: Instant,
        rng: SmallRng,
    }

    impl World {
        fn new(policy: RetryPolicy) -> Self {
            let now = origin();
            let budget = Budget::new(policy.budget, now);
            Self { policy, budget, now, rng: SmallRng::seed_from_u64(7) }
        }

        /// One request, every attempt of which ends so; says how many were made and why it stopped.
        fn run(&mut self, outcome: Outcome, idempotent: bool, replayable: bool) -> (u32, Stop) {
            self.budget.deposit(self.now);
            let mut attempts = Attempts::new(&self.policy, idempotent);
            loop {
                match attempts.next(outcome, replayable, &self.budget, self.now, &mut self.rng) {
                    Next::Stop(stop) => return (attempts.number(), stop),
                    Next::RetryAfter(wait) => {
                        assert!(wait <= Backoff::RETRY.max().mul_f64(1.5));
                        assert!(attempts.number() < 20);
                    }
                }
            }
        }
    }

    fn on_503() -> RetryPolicy {
        RetryPolicy { statuses: vec![500..=599], max_retries: 2, ..RetryPolicy::default() }
    }

    #[test]
    fn by_default_only_what_was_not_sent() {
        let mut w = World::new(RetryPolicy::default());
        assert_eq!(w.run(Outcome::Success, true, true), (1, Stop::Done));
        assert_eq!(w.run(Outcome::ClientError, true, true), (1, Stop::Done));
        assert_eq!(w.run(Outcome::Cancelled, true, true), (1, Stop::Done));
        for outcome in [S503, RESET, Outcome::Failure(Failure::Grpc(14)), Outcome::Failure(Failure::Timeout)]
        {
            assert_eq!(w.run(outcome, true, true), (1, Stop::NotRetryable));
        }
        for failure in [
            Failure::Refused,
            Failure::AppRefused,
            Failure::ConnectTimeout,
            Failure::Identity,
            Failure::NotProcessed,
            Failure::Unreachable,
        ] {
            assert_eq!(w.run(Outcome::Failure(failure), false, true), (3, Stop::Exhausted));
            assert_eq!(w.run(Outcome::Failure(failure), false, false), (1, Stop::BodyGone));
        }
    }

    #[test]
    fn the_first_redispatch_does_not_wait() {
        let mut w = World::new(RetryPolicy::default());
        let mut a = Attempts::new(&w.policy, false);
        let first = a.next(REFUSED, true, &w.budget, w.now, &mut w.rng);
        assert_eq!(first, Next::RetryAfter(Duration::ZERO));
        let second = a.next(REFUSED, true, &w.budget, w.now, &mut w.rng);
        assert!(matches!(second, Next::RetryAfter(wait) if wait >= Backoff::RETRY.min()));
        assert_eq!(a.number(), 3);
    }

    #[test]
    fn statuses_codes_and_resets_as_the_policy_says() {
        let mut w = World::new(on_503());
        assert_eq!(w.run(S503, true, true), (3, Stop::Exhausted));
        assert_eq!(w.run(S503, false, true), (1, Stop::NotIdempotent));
        assert_eq!(w.run(S503, true, false), (1, Stop::BodyGone));
        assert_eq!(w.run(RESET, true, true), (1, Stop::NotRetryable));
        w.policy.any_method = true;
        assert_eq!(w.run(S503, false, true), (3, Stop::Exhausted));
        w.policy = RetryPolicy { on_reset: true, grpc_codes: vec![14], ..RetryPolicy::default() };
        assert_eq!(w.run(RESET, true, true), (2, Stop::Exhausted));
        assert_eq!(w.run(RESET, false, true), (1, Stop::NotIdempotent));
        assert_eq!(w.run(Outcome::Failure(Failure::Grpc(14)), true, true), (2, Stop::Exhausted));
        assert_eq!(w.run(Outcome::Failure(Failure::Grpc(13)), true, true), (1, Stop::NotRetryable));
    }

    #[test]
    fn an_outage_is_not_multiplied() {
        let budget = BudgetParams { ratio: 0.2, min_per_second: 0, window: Duration::from_secs(10) };
        let mut w = World::new(RetryPolicy { budget, max_retries: 5, ..on_503() });
        let attempts: u32 = (0..1_000).map(|_| w.run(S503, true, true).0).sum();
        assert!((1_190..=1_200).contains(&attempts), "{attempts}");
        assert_eq!(w.run(REFUSED, true, true), (1, Stop::BudgetExhausted));
    }

    #[test]
    fn mixed_failures_count_apart() {
        let mut w = World::new(on_503());
        let mut a = Attempts::new(&w.policy, true);
        for outcome in [REFUSED, S503, REFUSED, S503] {
            assert!(matches!(a.next(outcome, true, &w.budget, w.now, &mut w.rng), Next::RetryAfter(_)));
        }
        assert_eq!(a.next(REFUSED, true, &w.budget, w.now, &mut w.rng), Next::Stop(Stop::Exhausted));
        assert_eq!(a.number(), 5);
    }

    #[test]
    fn idempotent_methods() {
        let mut headers = HeaderMap::new();
        for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE]
        {
            assert!(is_idempotent(&method, &headers));
        }
        for method in [Method::POST, Method::PATCH, Method::CONNECT, Method::from_bytes(b"get").unwrap()] {
            assert!(!is_idempotent(&method, &headers), "{method}");
        }
        headers.insert("idempotency-key", "1".parse().unwrap());
        assert!(is_idempotent(&Method::POST, &headers));
    }
}
