//! Who is subscribed to what: the way from a changed name to the streams that must look.
//!
//! Sharded, so that a mass of subscriptions and a publish hardly ever meet; each lock is held for one map
//! operation.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use weft_core::identity::PodUid;

use super::{Wake, now_ms, tls::Peer};
use crate::index::hash;

/// One open stream.
#[derive(Clone, Debug)]
pub struct Subscriber {
    /// Of the stream.
    pub id: u64,
    /// Who is at its other end. Shared: each subscription has it.
    pub peer: Arc<Peer>,
    /// Its task.
    pub wake: Arc<Wake>,
}

/// All subscriptions of all streams.
#[derive(Debug)]
pub struct Subscribers {
    shards: Vec<Mutex<Shard>>,
    streams: Mutex<Streams>,
}

/// By name, then by stream.
type Shard = HashMap<Arc<str>, HashMap<u64, Subscription>>;

#[derive(Debug)]
struct Subscription {
    subscriber: Subscriber,
    since_ms: u64,
}

#[derive(Debug, Default)]
struct Streams {
    by_id: HashMap<u64, Subscriber>,
    /// A pod's streams, the newest last.
    by_pod: HashMap<PodUid, Vec<u64>>,
}

impl Default for Subscribers {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), streams: Mutex::default() }
    }
}

impl Subscribers {
    /// A stream is open. A sidecar has one, and for a moment a second one; each may hold as many names as a stream may
    /// have, so there are no more: whoever comes back wins over what it has left behind, dead or not.
    pub fn open(&self, subscriber: &Subscriber) {
        let mut streams = lock(&self.streams);
        let own = streams.by_pod.entry(subscriber.peer.uid.clone()).or_default();
        own.push(subscriber.id);
        let replaced = own[..own.len().saturating_sub(MAX_STREAMS_OF_POD)].to_vec();
        streams.by_id.insert(subscriber.id, subscriber.clone());
        for id in replaced {
            if let Some(old) = streams.by_id.get(&id) {
                old.wake.replace();
            }
        }
    }

    /// A stream has ended; its subscriptions were removed one by one.
    pub fn close(&self, id: u64) {
        let mut streams = lock(&self.streams);
        if let Some(Subscriber { peer, .. }) = streams.by_id.remove(&id)
            && let Some(own) = streams.by_pod.get_mut(&peer.uid)
        {
            own.retain(|stream| *stream != id);
            if own.is_empty() {
                streams.by_pod.remove(&peer.uid);
            }
        }
    }

    /// Wakes a pod's streams, whatever they are subscribed to: the pod is gone, or somebody else's.
    pub fn wake_pod(&self, pod: &PodUid) {
        let streams = lock(&self.streams);
        let own = streams.by_pod.get(pod).into_iter().flatten();
        let wakes: Vec<_> = own.filter_map(|id| Some(streams.by_id.get(id)?.wake.clone())).collect();
        drop(streams);
        for wake in wakes {
            wake.wake(true);
        }
    }

    /// Adds one subscription.
    pub fn add(&self, name: &str, subscriber: &Subscriber) {
        let since_ms = now_ms();
        for name in watched(name) {
            let subscription = Subscription { subscriber: subscriber.clone(), since_ms };
            lock(self.shard(name)).entry(name.into()).or_default().insert(subscriber.id, subscription);
        }
    }

    /// Removes it.
    pub fn remove(&self, name: &str, id: u64) {
        for name in watched(name) {
            let mut shard = lock(self.shard(name));
            if let Some(subscribers) = shard.get_mut(name) {
                subscribers.remove(&id);
                if subscribers.is_empty() {
                    shard.remove(name);
                }
            }
        }
    }

    /// Wakes the streams that are subscribed to a name. A bare `ip/<address>` means any port of it.
    pub fn wake(&self, name: &str, urgent: bool) {
        let wakes: Vec<_> = match lock(self.shard(name)).get(name) {
            Some(subscribers) => subscribers.values().map(|s| s.subscriber.wake.clone()).collect(),
            None => return,
        };
        for wake in wakes {
            wake.wake(urgent);
        }
    }

    /// Pods that are subscribed to a name, each once.
    pub fn pods(&self, name: &str) -> Vec<PodUid> {
        let shard = lock(self.shard(name));
        let mut pods: Vec<_> =
            shard.get(name).into_iter().flatten().map(|(_, s)| s.subscriber.peer.uid.clone()).collect();
        pods.sort();
        pods.dedup();
        pods
    }

    /// Since when a pod is subscribed to a name, in milliseconds since 1970.
    pub fn since(&self, name: &str, pod: &PodUid) -> Option<u64> {
        let id = *lock(&self.streams).by_pod.get(pod)?.last()?;
        Some(lock(self.shard(name)).get(name)?.get(&id)?.since_ms)
    }

    /// Every name with the pods that are subscribed to it.
    pub fn all(&self) -> Vec<(Arc<str>, Vec<PodUid>)> {
        let mut all = Vec::new();
        for shard in &self.shards {
            for (name, subscribers) in &*lock(shard) {
                let is_alias = watched(name).len() == 1 && is_bare_address(name);
                if !is_alias {
                    all.push((
                        name.clone(),
                        subscribers.values().map(|s| s.subscriber.peer.uid.clone()).collect(),
                    ));
                }
            }
        }
        all
    }

    /// Every open stream's other end.
    pub fn streams(&self) -> Vec<Arc<Peer>> {
        lock(&self.streams).by_id.values().map(|subscriber| subscriber.peer.clone()).collect()
    }

    fn shard(&self, name: &str) -> &Mutex<Shard> {
        // Cannot overflow: the remainder is below the number of shards.
        &self.shards[usize::try_from(hash(name.as_bytes()) % SHARDS).unwrap_or(0)]
    }
}

/// The names whose changes concern a subscription: `ip/10.0.0.1:80` may be a service's address or a pod's.
fn watched(name: &str) -> Vec<&str> {
    match name.strip_prefix("ip/").and_then(|rest| rest.rsplit_once(':')) {
        Some((address, port)) if !port.ends_with(']') => vec![name, &name[.."ip/".len() + address.len()]],
        _ => vec![name],
    }
}

fn is_bare_address(name: &str) -> bool {
    name.strip_prefix("ip/").is_some_and(|rest| rest.ends_with(']') || !rest.contains(':'))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const SHARDS: u64 = 64;
const MAX_STREAMS_OF_POD: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::tls::Presented;

    #[test]
    fn a_pod_has_few_streams_and_the_newest_counts() {
        let subscribers = Subscribers::default();
        let now = std::time::SystemTime::now();
        let peer = Arc::new(Peer {
            identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
            uid: PodUid::new("web-1").unwrap(),
            certificate: Presented {
                serial: String::new(),
                not_before: now,
                not_after: now,
                authority: Vec::new(),
            },
        });
        let stream = |id| Subscriber { id, peer: peer.clone(), wake: Arc::default() };
        let all: Vec<_> = (0..4).map(stream).collect();
        all.iter().for_each(|stream| subscribers.open(stream));
        let replaced: Vec<_> = all.iter().map(|stream| stream.wake.is_replaced()).collect();
        assert_eq!(replaced, [true, true, false, false], "two are left");
        subscribers.add("svc/a/b:80", &all[2]);
        assert!(subscribers.since("svc/a/b:80", &peer.uid).is_none(), "not on the newest");
        subscribers.close(3);
        assert!(subscribers.since("svc/a/b:80", &peer.uid).is_some(), "the next newest");
        (0..4).for_each(|id| subscribers.close(id));
        assert!(subscribers.streams().is_empty());
        assert!(lock(&subscribers.streams).by_pod.is_empty());
    }

    #[test]
    fn addresses_are_watched_with_and_without_port() {
        assert_eq!(watched("ip/10.0.0.1:80"), ["ip/10.0.0.1:80", "ip/10.0.0.1"]);
        assert_eq!(watched("ip/[fd00::1]:80"), ["ip/[fd00::1]:80", "ip/[fd00::1]"]);
        assert_eq!(watched("svc/a/b:80"), ["svc/a/b:80"]);
        assert!(is_bare_address("ip/[fd00::1]") && is_bare_address("ip/10.0.0.1"));
        assert!(!is_bare_address("ip/[fd00::1]:80") && !is_bare_address("svc/a/b:80"));
    }
}
