//! How often a workload may be asked: a rate, in all or for each caller or header value by itself.
//!
//! Why GCRA: one number for each count, the time at which it would be empty again, is exact at any moment; windows that
//! are reset let twice the rate pass around their edges, and a bucket that is filled by a timer needs the timer.
//!
//! Why a bounded number of counts loses nothing: a count whose time has come says no more than one that was never made,
//! so the memory of it may be dropped. Where more are in use at once than are kept ([`KEYS`]), those that come last share
//! one. A caller that invents header values therefore makes strangers share, and never gets more than the rate itself.
//!
//! Why a lock where counts are told apart, and none where there is one for all: two workers must not both grant the last.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::HeaderName;

use crate::{
    authz::{self, Ask, Peer, rule::HttpMatch},
    name::ObjectRef,
    path::NotCanonical,
};

/// How often something may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// So many.
    requests: u32,
    /// In this time.
    per: Duration,
    /// So many at once.
    burst: u32,
}

/// A rate that cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// No request at all, or more than can be told apart.
    #[error("a rate is 1 to {MOST} requests")]
    Requests,
    /// Too short or too long a time.
    #[error("a rate is measured over 100ms to 1h")]
    Per,
    /// No request at once, or more than can be counted.
    #[error("a burst is 1 to {MOST} requests")]
    Burst,
}

impl Rate {
    /// A rate. Without a burst all requests of it may come at once.
    ///
    /// # Errors
    /// What is out of bounds.
    pub fn try_new(requests: u32, per: Duration, burst: Option<u32>) -> Result<Self, RateError> {
        let burst = burst.unwrap_or(requests);
        if !(1..=MOST).contains(&requests) {
            return Err(RateError::Requests);
        }
        if !(SHORTEST..=LONGEST).contains(&per) {
            return Err(RateError::Per);
        }
        if !(1..=MOST).contains(&burst) {
            return Err(RateError::Burst);
        }
        Ok(Self { requests, per, burst })
    }

    /// So many.
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// In this time.
    pub fn per(&self) -> Duration {
        self.per
    }

    /// So many at once.
    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// Between two requests at the full rate; rounded up, so that it is never exceeded.
    fn interval(&self) -> u64 {
        (self.per.as_nanos() as u64).div_ceil(self.requests.into())
    }
}

/// What is counted, and how often it may be.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimit {
    /// The object that it came from.
    pub object: ObjectRef,
    /// Its position there, as text.
    pub name: Arc<str>,
    /// How often.
    pub rate: Rate,
    /// Requests that are counted: any of these; empty: all.
    pub http: Vec<HttpMatch>,
    /// What has a count of its own.
    pub by: By,
}

/// What has a count of its own; nothing: there is one for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct By {
    /// Each identity. Callers without one share one.
    pub identity: bool,
    /// Each combination of these headers' values. Requests without them share one.
    pub headers: Vec<HeaderName>,
}

impl By {
    fn is_all(&self) -> bool {
        !self.identity && self.headers.is_empty()
    }

    /// What tells one count from another. It is no secret's business that two of 2⁶⁴ might meet: they would share one.
    fn key(&self, seed: u64, peer: &Peer<'_>, ask: &Ask<'_>) -> u64 {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        if self.identity {
            peer.identity.hash(&mut hasher);
        }
        if let Ask::Http { headers, .. } = ask {
            for name in &self.headers {
                let mut values = 0_usize;
                for value in headers.get_all(name) {
                    value.as_bytes().hash(&mut hasher);
                    values += 1;
                }
                values.hash(&mut hasher);
            }
        }
        hasher.finish()
    }
}

/// A limit and its counts, one for all workers.
#[derive(Debug)]
pub struct Limiter {
    limit: RateLimit,
    start: Instant,
    seed: u64,
    counts: Counts,
}

#[derive(Debug)]
enum Counts {
    One(AtomicU64),
    Each(Mutex<Keys>),
}

/// When each count is empty again, in nanoseconds.
#[derive(Debug, Default)]
struct Keys {
    known: BTreeMap<u64, u64>,
    /// Whoever found no room.
    others: u64,
    /// When those that say nothing any more are dropped: at so many, and not before this time.
    sweep_at: usize,
    swept: u64,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug)]
pub enum Refused<'a> {
    /// This limit is used up.
    Limit {
        /// Which.
        limit: &'a RateLimit,
        /// When it would be granted.
        wait: Duration,
    },
    /// A limit looks at the path, and the path is not in canonical form.
    Path(NotCanonical),
}

/// Takes a request out of every limit that counts it, or out of none.
///
/// # Errors
/// The first that is used up.
pub fn take<'a>(
    limiters: &'a [Arc<Limiter>],
    peer: &Peer<'_>,
    ask: &Ask<'_>,
    now: Instant,
) -> Result<(), Refused<'a>> {
    for (position, limiter) in limiters.iter().enumerate() {
        let refused = match limiter.counts(ask) {
            Ok(false) => continue,
            Ok(true) => match limiter.take(peer, ask, now) {
                Ok(()) => continue,
                Err(wait) => Refused::Limit { limit: &limiter.limit, wait },
            },
            Err(bad) => Refused::Path(bad),
        };
        for taken in limiters.iter().take(position) {
            // Who is refused by one limit uses up no other: else one caller alone could exhaust what all share.
            if taken.counts(ask) == Ok(true) {
                taken.give_back(peer, ask);
            }
        }
        return Err(refused);
    }
    Ok(())
}

impl Limiter {
    /// Nothing counted yet. `seed`: so that nobody outside can know which values meet in one count.
    pub fn new(limit: RateLimit, seed: u64, now: Instant) -> Self {
        let counts = match limit.by.is_all() {
            true => Counts::One(AtomicU64::new(0)),
            false => Counts::Each(Mutex::new(Keys { sweep_at: FIRST_SWEEP, ..Keys::default() })),
        };
        Self { limit, start: now, seed, counts }
    }

    /// What is limited.
    pub fn limit(&self) -> &RateLimit {
        &self.limit
    }

    /// Whether it counts a request.
    fn counts(&self, ask: &Ask<'_>) -> Result<bool, NotCanonical> {
        if self.limit.http.is_empty() { Ok(true) } else { authz::is_asked(&self.limit.http, ask) }
    }

    fn take(&self, peer: &Peer<'_>, ask: &Ask<'_>, now: Instant) -> Result<(), Duration> {
        let now = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        let rate = &self.limit.rate;
        match &self.counts {
            Counts::One(count) => {
                let mut wait = 0;
                let step = |empty| match granted(rate, empty, now) {
                    Ok(next) => Some(next),
                    Err(after) => {
                        wait = after;
                        None
                    }
                };
                let taken = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, step);
                taken.map(drop).map_err(|_| Duration::from_nanos(wait))
            }
            Counts::Each(keys) => {
                let key = self.limit.by.key(self.seed, peer, ask);
                let mut keys = keys.lock().unwrap_or_else(PoisonError::into_inner);
                let count = keys.of(key, now);
                *count = granted(rate, *count, now).map_err(Duration::from_nanos)?;
                Ok(())
            }
        }
    }

    /// Undoes one [`Self::take`].
    fn give_back(&self, peer: &Peer<'_>, ask: &Ask<'_>) {
        let interval = self.limit.rate.interval();
        match &self.counts {
            Counts::One(count) => {
                let less = |empty: u64| Some(empty.saturating_sub(interval));
                // It always has a value.
                let _ = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
            }
            Counts::Each(keys) => {
                let key = self.limit.by.key(self.seed, peer, ask);
                let mut keys = keys.lock().unwrap_or_else(PoisonError::into_inner);
                let count = match keys.known.contains_key(&key) {
                    true => keys.known.entry(key).or_default(),
                    false => &mut keys.others,
                };
                *count = count.saturating_sub(interval);
            }
        }
    }
}

/// When a count is empty again that one request more is taken out of, or how long until that can be.
fn granted(rate: &Rate, empty: u64, now: u64) -> Result<u64, u64> {
    let interval = rate.interval();
    let room = interval.saturating_mul(u64::from(rate.burst) - 1);
    let ahead = empty.saturating_sub(now);
    if ahead > room {
        return Err(ahead - room);
    }
    Ok(empty.max(now).saturating_add(interval))
}

impl Keys {
    fn of(&mut self, key: u64, now: u64) -> &mut u64 {
        if !self.known.contains_key(&key) {
            let due = self.known.len() < KEYS || now.saturating_sub(self.swept) >= SWEEP_EVERY;
            if self.known.len() >= self.sweep_at && due {
                self.known.retain(|_, empty| *empty > now);
                self.swept = now;
                // So many more may come before it is worth looking again.
                self.sweep_at = (self.known.len() * 2).clamp(FIRST_SWEEP, KEYS);
            }
            if self.known.len() >= KEYS {
                return &mut self.others;
            }
        }
        self.known.entry(key).or_default()
    }
}

/// Counts that are kept: half a megabyte of them.
pub const KEYS: usize = 10_000;
const FIRST_SWEEP: usize = 64;
/// All are looked at then, so a flood of new keys makes it happen ten times a second at most.
const SWEEP_EVERY: u64 = 100_000_000;
/// A million a second is one in a microsecond, and 10⁶ × an hour are still counted in nanoseconds.
const MOST: u32 = 1_000_000;
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, Method};
    use proptest::prelude::*;

    use super::*;
    use crate::{authz::rule::StringMatch, identity::SpiffeId};

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin of virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn rate(requests: u32, per_ms: u64, burst: Option<u32>) -> Rate {
        Rate::try_new(requests, Duration::from_millis(per_ms), burst).unwrap()
    }

    fn limit(rate: Rate, by: By) -> RateLimit {
        let object = ObjectRef { kind: "TrafficPolicy".into(), namespace: "ns".into(), name: "p".into() };
        RateLimit { object, name: "0".into(), rate, http: Vec::new(), by }
    }

    fn limiter(limit: RateLimit, t: Instant) -> Arc<Limiter> {
        Arc::new(Limiter::new(limit, 7, t))
    }

    fn by(identity: bool, headers: &[&'static str]) -> By {
        By { identity, headers: headers.iter().map(|name| HeaderName::from_static(name)).collect() }
    }

    struct Call {
        who: Option<SpiffeId>,
        path: &'static str,
        headers: HeaderMap,
    }

    fn call(who: &str, path: &'static str, user: Option<String>) -> Call {
        let who = (!who.is_empty()).then(|| format!("spiffe://a.test/ns/shop/sa/{who}").parse().unwrap());
        let header =
            |user: String| (HeaderName::from_static("x-user"), HeaderValue::from_str(&user).unwrap());
        Call { who, path, headers: user.into_iter().map(header).collect() }
    }

    fn asked(limiters: &[Arc<Limiter>], call: &Call, now: Instant) -> Result<(), Option<Duration>> {
        let peer = Peer { identity: call.who.as_ref(), address: "10.0.0.9".parse().unwrap() };
        let ask = Ask::Http { method: &Method::GET, host: "a", path: call.path, headers: &call.headers };
        take(limiters, &peer, &ask, now).map_err(|refused| match refused {
            Refused::Limit { wait, .. } => Some(wait),
            Refused::Path(_) => None,
        })
    }

    #[test]
    fn a_burst_then_the_rate_and_the_wait_is_told() {
        let t = origin();
        let all = [limiter(limit(rate(10, 1_000, Some(3)), By::default()), t)];
        let one = call("", "/", None);
        assert_eq!((0..5).filter(|_| asked(&all, &one, t).is_ok()).count(), 3);
        assert_eq!(asked(&all, &one, t), Err(Some(Duration::from_millis(100))));
        assert_eq!(asked(&all, &one, t + Duration::from_millis(99)), Err(Some(Duration::from_millis(1))));
        assert!(asked(&all, &one, t + Duration::from_millis(100)).is_ok());
        // Quiet for long enough, a whole burst is there again.
        let later = t + Duration::from_secs(9);
        assert_eq!((0..5).filter(|_| asked(&all, &one, later).is_ok()).count(), 3);
    }

    #[test]
    fn without_a_burst_the_whole_rate_may_come_at_once() {
        assert_eq!(rate(60, 60_000, None).burst(), 60);
    }

    #[test]
    fn a_rate_that_cannot_be_kept_is_no_rate() {
        let second = Duration::from_secs(1);
        assert_eq!(Rate::try_new(0, second, None), Err(RateError::Requests));
        assert_eq!(Rate::try_new(MOST + 1, second, None), Err(RateError::Requests));
        assert_eq!(Rate::try_new(1, Duration::from_millis(99), None), Err(RateError::Per));
        assert_eq!(Rate::try_new(1, Duration::from_secs(3_601), None), Err(RateError::Per));
        assert_eq!(Rate::try_new(1, second, Some(0)), Err(RateError::Burst));
        assert_eq!(Rate::try_new(1, second, Some(MOST + 1)), Err(RateError::Burst));
        // The largest of all is counted without an overflow.
        let t = origin();
        let all = [limiter(limit(Rate::try_new(1, LONGEST, Some(MOST)).unwrap(), By::default()), t)];
        let one = call("", "/", None);
        assert_eq!((0..MOST).filter(|_| asked(&all, &one, t).is_ok()).count(), MOST as usize);
        assert!(asked(&all, &one, t).is_err());
    }

    #[test]
    fn each_caller_and_each_header_value_has_a_count_of_its_own() {
        let t = origin();
        let one = rate(1, 1_000, None);
        let who = [limiter(limit(one, by(true, &[])), t)];
        assert!(asked(&who, &call("a", "/", None), t).is_ok());
        assert!(asked(&who, &call("b", "/", None), t).is_ok());
        assert!(asked(&who, &call("a", "/", Some("x".into())), t).is_err());
        // Nobody knows them apart.
        assert!(asked(&who, &call("", "/", None), t).is_ok());
        assert!(asked(&who, &call("", "/", None), t).is_err());

        let user = [limiter(limit(one, by(false, &["x-user"])), t)];
        assert!(asked(&user, &call("a", "/", Some("x".into())), t).is_ok());
        assert!(asked(&user, &call("b", "/", Some("x".into())), t).is_err());
        assert!(asked(&user, &call("b", "/", Some("y".into())), t).is_ok());
        assert!(asked(&user, &call("b", "/", None), t).is_ok());
        assert!(asked(&user, &call("a", "/", None), t).is_err());

        let both = [limiter(limit(one, by(true, &["x-user"])), t)];
        for (who, user) in [("a", "x"), ("a", "y"), ("b", "x")] {
            assert!(asked(&both, &call(who, "/", Some(user.into())), t).is_ok());
            assert!(asked(&both, &call(who, "/", Some(user.into())), t).is_err());
        }
    }

    #[test]
    fn only_what_a_limit_is_about_is_counted_and_a_doubtful_path_is_refused() {
        let t = origin();
        let api = HttpMatch { paths: vec![StringMatch::Prefix("/api/".into())], ..HttpMatch::default() };
        let all = [limiter(RateLimit { http: vec![api], ..limit(rate(1, 1_000, None), By::default()) }, t)];
        assert!(asked(&all, &call("", "/api/a", None), t).is_ok());
        assert!(asked(&all, &call("", "/api/b", None), t).is_err());
        assert!(asked(&all, &call("", "/other", None), t).is_ok());
        assert_eq!(asked(&all, &call("", "/x/../api/b", None), t), Err(None));
    }

    #[test]
    fn who_is_refused_by_one_limit_uses_up_no_other() {
        let t = origin();
        let all = [
            limiter(limit(rate(10, 1_000, None), By::default()), t),
            limiter(limit(rate(2, 1_000, None), by(true, &[])), t),
        ];
        let granted = |who: &str| (0..100).filter(|_| asked(&all, &call(who, "/", None), t).is_ok()).count();
        assert_eq!([granted("greedy"), granted("b"), granted("c"), granted("d")], [2, 2, 2, 2]);
        // Ten of all, and no more.
        assert_eq!([granted("e"), granted("f")], [2, 0]);
    }

    #[test]
    fn more_values_than_are_kept_share_a_count_and_those_known_keep_theirs() {
        let t = origin();
        let all = [limiter(limit(rate(1, 3_600_000, Some(2)), by(false, &["x-user"])), t)];
        let user = |n: usize| call("", "/", Some(format!("user-{n}")));
        assert!((0..KEYS).all(|n| asked(&all, &user(n), t).is_ok()));
        let beyond = (KEYS..KEYS + 1_000).filter(|n| asked(&all, &user(*n), t).is_ok()).count();
        assert_eq!(beyond, 2, "they have one count together");
        assert!((0..KEYS).all(|n| asked(&all, &user(n), t).is_ok()), "those that are known have theirs");
        let Counts::Each(keys) = &all[0].counts else { panic!("one count") };
        assert_eq!(keys.lock().unwrap().known.len(), KEYS);
        // When their time has come, nothing needs to be known of them, and others get a count of their own.
        let later = t + Duration::from_secs(3 * 3_600);
        assert!((KEYS..KEYS + 100).all(|n| asked(&all, &user(n), later).is_ok()));
        assert_eq!(keys.lock().unwrap().known.len(), 100);
    }

    #[test]
    fn workers_that_race_never_get_more_than_the_burst() {
        let t = origin();
        for by in [By::default(), by(true, &[])] {
            let all = [limiter(limit(rate(1_000, 3_600_000, None), by), t)];
            let granted: usize = std::thread::scope(|scope| {
                let worker = || (0..1_000).filter(|_| asked(&all, &call("a", "/", None), t).is_ok()).count();
                let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
                workers.into_iter().map(|worker| worker.join().unwrap()).sum()
            });
            assert_eq!(granted, 1_000);
        }
    }

    proptest! {
        /// In every window that ends with a grant: the burst, and what the rate gives in its time.
        #[test]
        fn never_exceeded_and_never_stingy(
            steps in prop::collection::vec((0u64..300, 0u32..8), 1..150),
            requests in 1u32..50, per_ms in 100u64..3_000, burst in 1u32..20, by_caller: bool,
        ) {
            let t = origin();
            let rate = rate(requests, per_ms, Some(burst));
            let all = [limiter(limit(rate, by(by_caller, &[])), t)];
            let one = call("a", "/", None);
            let (mut now, mut log): (_, Vec<Instant>) = (t, Vec::new());
            for (wait, tries) in steps {
                now += Duration::from_millis(wait);
                for _ in 0..tries {
                    match asked(&all, &one, now) {
                        Ok(()) => log.push(now),
                        Err(wait) => {
                            let wait = wait.unwrap();
                            prop_assert!(!wait.is_zero());
                            // It is told when it would be granted, exactly: nobody comes in vain.
                            let copy = Limiter::new(limit(rate, By::default()), 0, t);
                            for at in &log {
                                let ask = Ask::Opaque;
                                let peer = Peer { identity: None, address: "10.0.0.9".parse().unwrap() };
                                prop_assert!(copy.take(&peer, &ask, *at).is_ok());
                            }
                            let peer = Peer { identity: None, address: "10.0.0.9".parse().unwrap() };
                            prop_assert!(copy.take(&peer, &Ask::Opaque, now + wait).is_ok());
                        }
                    }
                }
                for (first, since) in log.iter().enumerate() {
                    let window = now - *since;
                    let most = f64::from(burst)
                        + f64::from(requests) * window.as_secs_f64() / rate.per().as_secs_f64();
                    prop_assert!((log.len() - first) as f64 <= most + 1e-6);
                }
            }
        }
    }
}
