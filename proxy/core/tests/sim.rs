//! A seeded world in virtual time: clients × endpoints × faults, decided by the real core.
//!
//! Why a simulation: balancing, ejection, retries and budgets each pass their own tests and can still
//! make a bad whole (retries that feed the broken endpoint, ejection that empties a service). Here they
//! run together, an hour of traffic takes a second, and a seed replays it to the nanosecond.
//!
//! Endpoints are queues with a few slots and exponential service times. Time is a number; a simulation
//! holds one origin `Instant` because the core's interface speaks in instants. Run with
//! `--nocapture` to see the tables.

#![expect(clippy::unwrap_used, reason = "a broken world ends the test")]

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::BinaryHeap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use weft_core::{
    balance::{Balancer, Lease},
    budget::{Budget, BudgetParams},
    classify::{Failure, Outcome},
    eject::Reason,
    identity::PodUid,
    policy::{Algorithm, BackendPolicy, Endpoint, RetryPolicy, Service, ServiceName},
    retry::{Attempts, Next},
};

/// How one endpoint behaves.
#[derive(Clone, Debug, PartialEq)]
enum Fault {
    /// As it should.
    None,
    /// So many times slower.
    Slow(f64),
    /// Answers 503 after 1 ms.
    FailFast,
    /// Answers 503 after 1 ms to this share of requests.
    FailSome(f64),
    /// Does nothing for 2 s of every 10 s.
    Stalls,
    /// Refuses connections in this interval, and cuts what was in flight when it began (seconds).
    Restart(f64, f64),
}

struct World {
    seed: u64,
    clients: usize,
    algorithm: Algorithm,
    faults: Vec<Fault>,
    /// Requests a second, over all clients.
    rate: f64,
    seconds: f64,
    retry: RetryPolicy,
    ejection: bool,
    /// The control plane notices restarts so much later (seconds).
    notice: Option<f64>,
}

#[derive(Debug, Default)]
struct Report {
    latencies: Vec<f64>,
    errors: usize,
    attempts: usize,
    /// Answers by endpoint, and those of them that failed.
    answered: Vec<usize>,
    failed: Vec<usize>,
    ejections: Vec<(usize, Reason)>,
}

/// One request on its way.
struct Call {
    client: usize,
    arrived: f64,
    tried: Vec<SocketAddr>,
    attempts: Attempts<'static>,
    lease: Option<(Lease, usize)>,
}

enum Event {
    Arrive,
    Send(Box<Call>),
    Answer(Box<Call>, Outcome),
    Notice,
}

/// The time a piece of work ends on an endpoint, known when it begins.
struct Server {
    fault: Fault,
    free: [f64; SLOTS],
}

impl Server {
    /// When and how a request ends that comes at `now`.
    fn serve(&mut self, now: f64, rng: &mut SmallRng) -> (f64, Outcome) {
        let failed = Outcome::Failure(Failure::Status(503));
        match self.fault {
            Fault::FailFast => return (now + 0.001, failed),
            Fault::FailSome(share) if rng.random_bool(share) => return (now + 0.001, failed),
            Fault::Restart(from, to) if (from..to).contains(&now) => {
                self.free = [to; SLOTS];
                return (now + 0.0002, Outcome::Failure(Failure::Refused));
            }
            Fault::None | Fault::Slow(_) | Fault::FailSome(_) | Fault::Stalls | Fault::Restart(..) => {}
        }
        let slower = if let Fault::Slow(times) = self.fault { times } else { 1.0 };
        let work = -rng.random::<f64>().max(1e-12).ln() * MEAN_SERVICE * slower;
        let slot = (0..SLOTS).min_by(|&a, &b| self.free[a].total_cmp(&self.free[b])).unwrap();
        let end = self.work(self.free[slot].max(now), work);
        self.free[slot] = end;
        if let Fault::Restart(from, _) = self.fault
            && (now..=end).contains(&from)
        {
            return (from, Outcome::Failure(Failure::Reset));
        }
        (end, Outcome::Success)
    }

    fn work(&self, start: f64, work: f64) -> f64 {
        if self.fault != Fault::Stalls {
            return start + work;
        }
        // Stalled in the first 2 s of every 10 s.
        let (mut at, mut left) = (start, work);
        loop {
            let phase = at % 10.0;
            if phase < 2.0 {
                at += 2.0 - phase;
                continue;
            }
            let room = 10.0 - phase;
            if left <= room {
                return at + left;
            }
            at += room + 1e-9;
            left -= room;
        }
    }
}

impl World {
    fn new(algorithm: Algorithm, faults: Vec<Fault>) -> Self {
        Self {
            seed: 1,
            clients: 3,
            algorithm,
            faults,
            rate: 600.0,
            seconds: 45.0,
            retry: RetryPolicy::default(),
            ejection: true,
            notice: None,
        }
    }

    fn policy(&self, without: &[usize], generation: u64) -> BackendPolicy {
        let name = ServiceName { namespace: "sim".into(), name: "s".into(), port: 80 };
        let mut service = Service::new(name);
        service.load_balancing.algorithm = self.algorithm;
        if !self.ejection {
            service.health.consecutive_failures = 0;
            service.health.success_rate = None;
        }
        let endpoints = (0..self.faults.len()).filter(|n| !without.contains(n));
        let endpoint = |n: usize| Endpoint::new(PodUid::new(&format!("pod-{n}")).unwrap(), address(n));
        let endpoints = endpoints.map(|n| Arc::new(endpoint(n))).collect();
        BackendPolicy { service: Arc::new(service), endpoints, generation, resolved: true, client: 0 }
    }

    fn run(&self) -> Report {
        let origin = origin();
        let at = |seconds: f64| origin + Duration::from_secs_f64(seconds);
        let rng = RefCell::new(SmallRng::seed_from_u64(self.seed));
        let mut servers: Vec<_> =
            self.faults.iter().map(|fault| Server { fault: fault.clone(), free: [0.0; SLOTS] }).collect();
        // One world, one policy for its whole life: the calls borrow it.
        let retry: &'static RetryPolicy = Box::leak(Box::new(self.retry.clone()));
        let budgets: Vec<_> = (0..self.clients).map(|_| Budget::new(retry.budget, origin)).collect();
        let first = self.policy(&[], 0);
        let mut balancers: Vec<_> = (0..self.clients)
            .map(|_| {
                let mut b = Balancer::new(&first.service.load_balancing, &first.service.health);
                b.update(&first, origin);
                b
            })
            .collect();
        let n = self.faults.len();
        let mut report = Report { answered: vec![0; n], failed: vec![0; n], ..Report::default() };
        let mut queue = Queue::default();
        queue.push(0.0, Event::Arrive);
        if let Some(notice) = self.notice {
            for fault in &self.faults {
                if let Fault::Restart(from, to) = *fault {
                    queue.push(from + notice, Event::Notice);
                    queue.push(to + notice, Event::Notice);
                }
            }
        }
        let mut generation = 0;
        while let Some((now, event)) = queue.pop() {
            let mut rng = rng.borrow_mut();
            match event {
                Event::Arrive => {
                    if now < self.seconds {
                        let gap = -rng.random::<f64>().max(1e-12).ln() / self.rate;
                        queue.push(now + gap, Event::Arrive);
                    }
                    let client = rng.random_range(0..self.clients);
                    budgets[client].deposit(at(now));
                    let attempts = Attempts::new(retry, true);
                    let call = Call { client, arrived: now, tried: Vec::new(), attempts, lease: None };
                    queue.push(now, Event::Send(Box::new(call)));
                }
                Event::Send(mut call) => {
                    report.attempts += 1;
                    let lease = balancers[call.client].pick(&call.tried, at(now), &mut *rng).unwrap();
                    let server = usize::from(lease.endpoint().address.port() - 1);
                    call.tried.push(lease.endpoint().address);
                    call.lease = Some((lease, server));
                    let (end, outcome) = servers[server].serve(now, &mut rng);
                    queue.push(end, Event::Answer(call, outcome));
                }
                Event::Answer(mut call, outcome) => {
                    let (mut lease, server) = call.lease.take().unwrap();
                    report.answered[server] += 1;
                    report.failed[server] += usize::from(outcome.is_failure());
                    if outcome == Outcome::Success {
                        lease.first_byte(at(now));
                    }
                    if let Some(ejection) = lease.finish(outcome, at(now)) {
                        report.ejections.push((server, ejection.reason));
                    }
                    let budget = &budgets[call.client];
                    match call.attempts.next(outcome, true, budget, at(now), &mut *rng) {
                        Next::RetryAfter(wait) => queue.push(now + wait.as_secs_f64(), Event::Send(call)),
                        Next::Stop(_) if outcome == Outcome::Success => {
                            report.latencies.push(now - call.arrived);
                        }
                        Next::Stop(_) => report.errors += 1,
                    }
                }
                Event::Notice => {
                    generation += 1;
                    let notice = self.notice.unwrap_or_default();
                    let is_gone = |&n: &usize| match self.faults[n] {
                        Fault::Restart(from, to) => (from + notice..to + notice).contains(&now),
                        Fault::None
                        | Fault::Slow(_)
                        | Fault::FailFast
                        | Fault::FailSome(_)
                        | Fault::Stalls => false,
                    };
                    let gone: Vec<_> = (0..n).filter(is_gone).collect();
                    let policy = self.policy(&gone, generation);
                    balancers.iter_mut().for_each(|b| b.update(&policy, at(now)));
                }
            }
        }
        report.latencies.sort_by(f64::total_cmp);
        report
    }
}

/// Events by time; those of one instant in the order they were made.
#[derive(Default)]
struct Queue {
    heap: BinaryHeap<Reverse<(u64, usize)>>,
    events: Vec<Option<Event>>,
}

impl Queue {
    fn push(&mut self, at: f64, event: Event) {
        self.heap.push(Reverse(((at * 1e9) as u64, self.events.len())));
        self.events.push(Some(event));
    }

    fn pop(&mut self) -> Option<(f64, Event)> {
        let Reverse((at, index)) = self.heap.pop()?;
        Some((at as f64 / 1e9, self.events[index].take()?))
    }
}

impl Report {
    /// In milliseconds.
    fn quantile(&self, q: f64) -> f64 {
        self.latencies[((self.latencies.len() - 1) as f64 * q) as usize] * 1e3
    }

    fn p99(&self) -> f64 {
        self.quantile(0.99)
    }

    fn error_share(&self) -> f64 {
        self.errors as f64 / (self.errors + self.latencies.len()) as f64
    }

    /// Which share of all answers came from this endpoint.
    fn share(&self, endpoint: usize) -> f64 {
        self.answered[endpoint] as f64 / self.answered.iter().sum::<usize>() as f64
    }

    fn print(&self, title: &str) {
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| self.quantile(q));
        let errors = 100.0 * self.error_share();
        let ejections = self.ejections.len();
        println!(
            "{title:<34} p50 {p50:7.1}  p99 {p99:9.1}  p99.9 {p999:9.1} ms  errors {errors:6.3} %  ejections {ejections}"
        );
    }
}

#[expect(clippy::disallowed_methods, reason = "the origin of virtual time")]
fn origin() -> Instant {
    Instant::now()
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], n as u16 + 1))
}

/// `n` endpoints, the first of which have these faults.
fn with(n: usize, faults: &[Fault]) -> Vec<Fault> {
    faults.iter().cloned().chain(std::iter::repeat(Fault::None)).take(n).collect()
}

fn compare(title: &str, world: impl Fn(Algorithm) -> World) -> [Report; 3] {
    [
        ("peak EWMA", Algorithm::PeakEwma),
        ("round robin", Algorithm::RoundRobin),
        ("least request", Algorithm::LeastRequest),
    ]
    .map(|(name, algorithm)| {
        let report = world(algorithm).run();
        report.print(&format!("{title}: {name}"));
        report
    })
}

fn retry_503() -> RetryPolicy {
    RetryPolicy { statuses: vec![503..=503], max_retries: 2, on_reset: true, ..RetryPolicy::default() }
}

#[test]
fn one_of_five_is_twenty_times_slower() {
    let [ewma, robin, least] =
        compare("1 of 5 slow", |a| World { rate: 400.0, ..World::new(a, with(5, &[Fault::Slow(20.0)])) });
    assert!(ewma.p99() <= 0.5 * robin.p99(), "{} {}", ewma.p99(), robin.p99());
    assert!(ewma.p99() <= 0.5 * least.p99(), "{} {}", ewma.p99(), least.p99());
    assert!(ewma.share(0) < 0.01, "{}", ewma.share(0));
    assert!(ewma.ejections.is_empty() && ewma.errors == 0);
}

#[test]
fn one_of_five_fails_in_a_millisecond() {
    let [ewma, ..] = compare("1 of 5 fails fast", |a| World::new(a, with(5, &[Fault::FailFast])));
    assert!(ewma.error_share() < 0.002, "{}", ewma.error_share());
    let bare = |a| World { ejection: false, ..World::new(a, with(5, &[Fault::FailFast])) };
    let [ewma, robin, least] = compare("the same, no ejection", bare);
    assert!(ewma.error_share() < 0.02, "{}", ewma.error_share());
    assert!(ewma.error_share() < 0.1 * robin.error_share());
    assert!(ewma.error_share() < 0.1 * least.error_share());
}

#[test]
fn one_of_five_stalls() {
    let [ewma, robin, least] = compare("1 of 5 stalls", |a| World::new(a, with(5, &[Fault::Stalls])));
    assert!(ewma.p99() <= 0.5 * robin.p99());
    assert!(ewma.quantile(0.999) <= least.quantile(0.999));
}

/// The balancing row of the performance targets: ten endpoints with all three faults.
#[test]
fn three_faults_of_ten_cost_half_as_much_again() {
    let faults = [Fault::Slow(20.0), Fault::FailFast, Fault::Stalls];
    let world = |a, faults: &[Fault]| World {
        clients: 1,
        retry: retry_503(),
        rate: 1_400.0,
        seconds: 60.0,
        ..World::new(a, with(10, faults))
    };
    let [ewma, robin, least] = compare("3 faults of 10", |a| world(a, &faults));
    let [healthy, ..] = compare("10 healthy", |a| world(a, &[]));
    assert_eq!(ewma.errors, 0);
    assert!(ewma.p99() <= 1.5 * healthy.p99(), "{} {}", ewma.p99(), healthy.p99());
    assert!(ewma.p99() <= 0.5 * least.p99() && ewma.p99() <= 0.5 * robin.p99());
    assert!(ewma.quantile(0.999) <= 0.4 * least.quantile(0.999));
}

#[test]
fn half_of_them_restart() {
    // One after the other, 3 s each; the control plane takes a second to notice.
    let faults: Vec<_> = (0..5).map(|n| Fault::Restart(5.0 + 8.0 * n as f64, 8.0 + 8.0 * n as f64)).collect();
    let [ewma, ..] = compare("half restart, no retries", |a| World {
        notice: Some(1.0),
        ..World::new(a, with(10, &faults))
    });
    // Only what was in flight when its endpoint died is lost.
    assert!(ewma.errors <= 5 * SLOTS * 2, "{}", ewma.errors);
    let [ewma, ..] = compare("half restart, resets retried", |a| World {
        notice: Some(1.0),
        retry: retry_503(),
        ..World::new(a, with(10, &faults))
    });
    assert_eq!(ewma.errors, 0);
    let restarted = ewma.share(0);
    assert!(restarted > 0.06, "it takes its share again: {restarted}");
}

#[test]
fn half_of_them_restart_at_once_and_nobody_tells() {
    let faults: Vec<_> = (0..5).map(|_| Fault::Restart(5.0, 8.0)).collect();
    let world = World { retry: retry_503(), ..World::new(Algorithm::PeakEwma, with(10, &faults)) };
    let report = world.run();
    report.print("half restart at once");
    assert_eq!(report.errors, 0);
    assert!(report.ejections.len() >= 5);
}

#[test]
fn all_are_equally_slow_and_nobody_is_ejected() {
    let [ewma, ..] =
        compare("all slow", |a| World { rate: 20.0, ..World::new(a, vec![Fault::Slow(20.0); 5]) });
    assert!(ewma.ejections.is_empty() && ewma.errors == 0);
    for n in 0..5 {
        assert!((0.1..0.3).contains(&ewma.share(n)), "{n}: {}", ewma.share(n));
    }
}

#[test]
fn one_that_fails_every_third_time_is_ejected_by_its_success_rate() {
    let world = World::new(Algorithm::RoundRobin, with(5, &[Fault::FailSome(0.33)]));
    let report = world.run();
    report.print("1 of 5 fails a third");
    assert!(report.ejections.iter().all(|(n, _)| *n == 0));
    assert!(report.ejections.iter().any(|(_, why)| matches!(why, Reason::SuccessRate { .. })));
    assert!(report.error_share() < 0.02, "{}", report.error_share());
}

#[test]
fn everything_fails_and_retries_stay_within_the_budget() {
    let budget = BudgetParams { ratio: 0.2, min_per_second: 5, window: Duration::from_secs(10) };
    let world = World {
        retry: RetryPolicy { budget, max_retries: 5, ..retry_503() },
        ..World::new(Algorithm::PeakEwma, vec![Fault::FailFast; 5])
    };
    let report = world.run();
    let floor = 5.0 * (world.seconds + 10.0) * world.clients as f64;
    let most = report.errors as f64 * 1.2 + floor;
    println!("outage: {} requests, {} attempts, at most {most:.0}", report.errors, report.attempts);
    assert!(report.latencies.is_empty());
    assert!(report.attempts as f64 <= most);
    // The cap: three of five stay in rotation for each client.
    let most_at_once = report.answered.iter().filter(|&&n| n > report.attempts / 20).count();
    assert!(most_at_once >= 3, "{:?}", report.answered);
}

#[test]
fn nobody_starves() {
    for seed in 1..=5 {
        let report = World { seed, seconds: 10.0, ..World::new(Algorithm::PeakEwma, with(10, &[])) }.run();
        let least = (0..10).map(|n| report.share(n)).fold(1.0, f64::min);
        assert!(least > 0.05, "seed {seed}: {least}");
    }
}

#[test]
fn a_seed_replays_the_same_world() {
    let run = |seed| {
        let faults = with(5, &[Fault::FailFast, Fault::Stalls]);
        World { seed, seconds: 10.0, retry: retry_503(), ..World::new(Algorithm::PeakEwma, faults) }.run()
    };
    assert_eq!(run(7).latencies, run(7).latencies);
    assert_ne!(run(7).latencies, run(8).latencies);
}

/// Requests that an endpoint works on at a time.
const SLOTS: usize = 4;
/// Seconds of work in a request, on average.
const MEAN_SERVICE: f64 = 0.010;
