//! From an original destination to a watched policy: decided locally where that is possible, asked for
//! on first use where it is not.
//!
//! Why the mesh's address ranges matter: an address outside them is forwarded (or refused) by the egress
//! mode alone, so the internet never depends on the control plane. Inside them an answer is needed: the
//! connection is held at most 2 s; an explicit *no* means "not ours" for as long as it stays subscribed;
//! silence is an error, never a pass.
//!
//! Why holding an `Arc<Watched>` is the subscription: whoever uses a destination keeps it fresh simply by
//! keeping it. Ten minutes after the last holder is gone it is unsubscribed, but never while the control
//! plane is away: it could not be had again.
//!
//! This file is the side that the workers see; `store` is what the control stream feeds.

pub(crate) mod store;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};
use weft_core::policy::{Egress, InboundPolicy, OutboundPolicy};

use crate::telemetry::metrics::{Counter, Gauge, Shared};

/// Answers where connections go. Cheap to clone, for any thread.
#[derive(Clone)]
pub struct Discovery(Arc<Inner>);

/// Where a connection goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// A destination that the mesh knows.
    Service(Arc<Watched>),
    /// Not the mesh's: forward as it is.
    Outside,
    /// Not the mesh's, and the egress policy refuses.
    Denied,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoveryError {
    /// This workload's own configuration has not arrived yet.
    #[error("this sidecar has no configuration yet")]
    NotReady,
    /// The control plane did not answer in time about an address inside the mesh.
    #[error("the control plane did not answer in time")]
    Timeout,
    /// Too many connections already wait, or too many destinations are in use.
    #[error("too many destinations wait for discovery")]
    Overloaded,
}

/// One destination's policy, kept fresh while anyone holds this.
pub struct Watched {
    policy: ArcSwap<OutboundPolicy>,
    removed: AtomicBool,
    version: watch::Sender<u64>,
    /// Milliseconds since the store's start at which it was last resolved.
    used: AtomicU64,
}

struct Inner {
    hold: Duration,
    start: Instant,
    waiters: Semaphore,
    egress: watch::Receiver<Option<Arc<Ranges>>>,
    inbound: watch::Receiver<Option<Arc<InboundPolicy>>>,
    known: Known,
    ask: mpsc::UnboundedSender<Ask>, // bounded by the waiters' semaphore
    shared: Arc<Shared>,
}

/// What has been answered. Written by the store alone.
type Known = Arc<RwLock<HashMap<SocketAddr, Answer>>>;

#[derive(Clone)]
enum Answer {
    Service(Arc<Watched>),
    /// The control plane said no; when it was last asked for, as [`Watched::used`].
    Unknown(Arc<AtomicU64>),
}

/// The mesh's own addresses, and what becomes of the others.
#[derive(Debug, PartialEq)]
struct Ranges {
    mesh: Vec<IpNet>,
    egress: Egress,
}

/// What the workers and the admin server ask the store.
pub(crate) enum Ask {
    /// Answer about a destination as soon as possible.
    Resolve(SocketAddr, oneshot::Sender<()>),
    /// Describe all that is held.
    Dump(oneshot::Sender<serde_json::Value>),
}

impl Discovery {
    /// Where a connection to `original` goes. Waits at most the configured hold (2 s).
    ///
    /// # Errors
    /// No configuration yet, silence about an address inside the mesh, or too many that wait.
    pub async fn resolve(&self, original: SocketAddr) -> Result<Target, DiscoveryError> {
        let original = SocketAddr::new(original.ip().to_canonical(), original.port());
        let deadline = Instant::now() + self.0.hold;
        let ranges = self.ranges(deadline).await?;
        if !ranges.contains(original.ip()) {
            return Ok(ranges.outside());
        }
        if let Some(target) = self.known(original, &ranges) {
            return Ok(target);
        }
        let Ok(_permit) = self.0.waiters.try_acquire() else {
            self.0.shared.count(Counter::DiscoveryShed);
            return Err(DiscoveryError::Overloaded);
        };
        let _waiting = Waiting::new(&self.0.shared);
        let (reply, answer) = oneshot::channel();
        self.0.ask.send(Ask::Resolve(original, reply)).map_err(|_| DiscoveryError::NotReady)?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(())) => self.known(original, &ranges).ok_or(DiscoveryError::Timeout),
            // The store refused to take one more destination.
            Ok(Err(_)) => {
                self.0.shared.count(Counter::DiscoveryShed);
                Err(DiscoveryError::Overloaded)
            }
            Err(_) => {
                self.0.shared.count(Counter::DiscoveryTimeouts);
                Err(DiscoveryError::Timeout)
            }
        }
    }

    /// This workload's own policy; `None` until it is whole for the first time.
    pub fn inbound(&self) -> watch::Receiver<Option<Arc<InboundPolicy>>> {
        self.0.inbound.clone()
    }

    /// Describes all that is held, without secrets (there are none in it).
    pub(crate) async fn dump(&self) -> serde_json::Value {
        let (reply, answer) = oneshot::channel();
        if self.0.ask.send(Ask::Dump(reply)).is_err() {
            return serde_json::Value::Null;
        }
        answer.await.unwrap_or_default()
    }

    async fn ranges(&self, deadline: Instant) -> Result<Arc<Ranges>, DiscoveryError> {
        if let Some(ranges) = &*self.0.egress.borrow() {
            return Ok(Arc::clone(ranges));
        }
        let Ok(_permit) = self.0.waiters.try_acquire() else {
            self.0.shared.count(Counter::DiscoveryShed);
            return Err(DiscoveryError::Overloaded);
        };
        let mut egress = self.0.egress.clone();
        let arrived = timeout_at(deadline, egress.wait_for(Option::is_some)).await;
        let ranges = arrived.ok().and_then(Result::ok).and_then(|ranges| ranges.clone());
        ranges.ok_or(DiscoveryError::NotReady)
    }

    fn known(&self, original: SocketAddr, ranges: &Ranges) -> Option<Target> {
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        let now = millis(self.0.start);
        Some(match known.get(&original)? {
            Answer::Service(watched) => {
                watched.used.store(now, Ordering::Relaxed);
                Target::Service(Arc::clone(watched))
            }
            Answer::Unknown(used) => {
                used.store(now, Ordering::Relaxed);
                ranges.outside()
            }
        })
    }
}

impl Watched {
    fn new(policy: Arc<OutboundPolicy>, used: u64) -> Self {
        Self {
            policy: ArcSwap::new(policy),
            removed: AtomicBool::new(false),
            version: watch::Sender::new(0),
            used: AtomicU64::new(used),
        }
    }

    /// The policy at this moment: taken once a request.
    pub fn policy(&self) -> Arc<OutboundPolicy> {
        self.policy.load_full()
    }

    /// Whether the control plane said that this destination is gone. The last policy stays readable.
    pub fn removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// Counts the changes of [`Watched::policy`] and [`Watched::removed`].
    pub fn version(&self) -> u64 {
        *self.version.borrow()
    }

    /// Waits for the next change after this call.
    pub async fn changed(&self) {
        let mut version = self.version.subscribe();
        // The sender is `self`: it cannot be gone.
        let _ = version.changed().await;
    }

    /// Waits until [`Watched::version`] is no longer `seen`: no change between the two calls is missed.
    pub async fn changed_since(&self, seen: u64) {
        let mut version = self.version.subscribe();
        let _ = version.wait_for(|version| *version != seen).await;
    }

    fn publish(&self, policy: Arc<OutboundPolicy>) {
        self.policy.store(policy);
        self.removed.store(false, Ordering::Release);
        self.version.send_modify(|version| *version += 1);
    }

    fn remove(&self) {
        self.removed.store(true, Ordering::Release);
        self.version.send_modify(|version| *version += 1);
    }
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched")
            .field("service", &self.policy.load().service.name)
            .field("removed", &self.removed())
            .finish_non_exhaustive()
    }
}

impl Ranges {
    fn contains(&self, address: IpAddr) -> bool {
        self.mesh.iter().any(|range| range.contains(&address))
    }

    fn outside(&self) -> Target {
        match self.egress {
            Egress::Allow => Target::Outside,
            Egress::Deny => Target::Denied,
        }
    }
}

/// Keeps the gauge of waiting connections right however the wait ends.
struct Waiting<'a>(&'a Shared);

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.gauge(Gauge::DiscoveryWaiters, 1);
        Self(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.gauge(Gauge::DiscoveryWaiters, -1);
    }
}

fn millis(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// A discovery that knows a fixed set of destinations, for the tests of the data path.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    impl Discovery {
        /// Knows `services`; every other address inside the mesh is answered with "no".
        pub(crate) fn fixed(
            inbound: InboundPolicy,
            services: Vec<(SocketAddr, OutboundPolicy)>,
        ) -> (Self, HashMap<SocketAddr, Arc<Watched>>) {
            let ranges = Ranges { mesh: inbound.mesh_ranges.clone(), egress: inbound.egress };
            let watched: HashMap<_, _> = services
                .into_iter()
                .map(|(address, policy)| (address, Arc::new(Watched::new(Arc::new(policy), 0))))
                .collect();
            let answers = watched.iter().map(|(address, one)| (*address, Answer::Service(Arc::clone(one))));
            let known: Known = Arc::new(RwLock::new(answers.collect()));
            let (ask, mut asked) = mpsc::unbounded_channel();
            let answers = Arc::clone(&known);
            tokio::spawn(async move {
                while let Some(ask) = asked.recv().await {
                    if let Ask::Resolve(address, reply) = ask {
                        let mut known = answers.write().unwrap();
                        known.entry(address).or_insert_with(|| Answer::Unknown(Arc::default()));
                        let _ = reply.send(());
                    }
                }
            });
            let discovery = Self(Arc::new(Inner {
                hold: Duration::from_secs(2),
                start: Instant::now(),
                waiters: Semaphore::new(1_000),
                egress: watch::channel(Some(Arc::new(ranges))).1,
                inbound: watch::channel(Some(Arc::new(inbound))).1,
                known,
                ask,
                shared: Arc::default(),
            }));
            (discovery, watched)
        }
    }

    impl Watched {
        /// Swaps the policy as the store would.
        pub(crate) fn set(&self, policy: OutboundPolicy) {
            self.publish(Arc::new(policy));
        }
    }
}

#[cfg(test)]
mod tests {
    use weft_core::policy::{
        Action, Authorization, DETECT_TIMEOUT, MtlsMode, PortPolicy, Protocol, RouteTable, Service,
    };

    use super::*;

    fn inbound(egress: Egress) -> InboundPolicy {
        let authorization =
            Arc::new(Authorization { default: Action::Allow, rules: Vec::new().into(), generation: 1 });
        InboundPolicy {
            identity: "spiffe://a.test/ns/shop/sa/web".parse().unwrap(),
            ports: std::collections::BTreeMap::new(),
            default_port: Arc::new(PortPolicy {
                protocol: Protocol::Detect,
                detect_timeout: DETECT_TIMEOUT,
                mtls: MtlsMode::Strict,
                authorization,
                probes: Vec::new(),
                rate_limits: Vec::new(),
            }),
            mesh_ranges: vec!["10.0.0.0/8".parse().unwrap()],
            egress,
            trust_domains: Vec::new(),
            place: Default::default(),
        }
    }

    fn policy(service: &Arc<Service>) -> OutboundPolicy {
        let routes = RouteTable::to_service(service);
        OutboundPolicy { service: Arc::clone(service), routes, backends: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_wakes_whoever_holds_it() {
        let service = store::testing::service("shop/api:80");
        let address: SocketAddr = ([10, 0, 0, 1], 80).into();
        let (discovery, known) = Discovery::fixed(inbound(Egress::Deny), vec![(address, policy(&service))]);
        let Ok(Target::Service(watched)) = discovery.resolve(address).await else { panic!("not known") };
        let seen = watched.version();
        let waiting = tokio::spawn({
            let watched = Arc::clone(&watched);
            async move { watched.changed().await }
        });
        tokio::task::yield_now().await;
        known[&address].set(policy(&store::testing::service("shop/api:81")));
        waiting.await.unwrap();
        watched.changed_since(seen).await;
        assert_eq!(watched.policy().service.name.port, 81);
        assert!(matches!(discovery.resolve(([10, 0, 0, 2], 80).into()).await, Ok(Target::Denied)));
    }
}
