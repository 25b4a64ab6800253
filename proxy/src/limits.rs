//! How many connections this pod may hold, by count, by descriptors and by memory.
//!
//! Why before anything runs out: a process without descriptors can neither dial an endpoint for a request that it has
//! accepted nor answer its probes, and one that meets its container's memory limit is killed with all that it carries.
//! So what is new is refused while there is still room for what is there. Why a reset and not a wait: whoever connects
//! is told at once, and can go elsewhere. Connections that are there bring new requests, though: they are refused too when
//! memory is nearly used up.
//!
//! Descriptors are counted by nobody: the kernel gives the lowest free number, so the number of a new one says how many
//! are in use.
//!
//! One count for all workers: the limits are the pod's. Only connections take it; a request reads one flag.

use std::{
    collections::HashMap,
    net::IpAddr,
    os::fd::RawFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{config, direction::Direction, memory::Memory};

/// What is open, and how much may be. Shared by all workers.
pub(crate) struct ConnectionLimits {
    open: [AtomicUsize; 2],
    max: usize,
    /// A descriptor from this number on is refused.
    descriptors: [i32; 2],
    per_peer: Mutex<HashMap<IpAddr, usize>>,
    max_per_peer: usize,
    memory: Option<Watched>,
}

/// One open connection, counted until it is dropped.
pub(crate) struct Slot {
    limits: Arc<ConnectionLimits>,
    side: Direction,
    peer: Option<IpAddr>,
}

/// Memory, asked for every [`WATCH`], and at most every [`SAMPLE_AGE`] or [`SAMPLE_TAKES`] connections.
struct Watched {
    memory: Memory,
    sampled: Mutex<Instant>,
    takes: AtomicUsize,
    /// Too short for connections.
    short: AtomicBool,
    /// Too short for requests.
    nearly_gone: AtomicBool,
}

impl ConnectionLimits {
    /// `descriptors`: how many this process may open.
    pub(crate) fn new(
        limits: &config::GrowthLimits,
        descriptors: Option<u64>,
        memory: Option<Memory>,
        now: Instant,
    ) -> Arc<Self> {
        let descriptors = descriptors.and_then(|n| i32::try_from(n).ok()).unwrap_or(i32::MAX);
        let [outbound, inbound] = [descriptors / 4 * 3, descriptors / 8 * 5];
        let sampled = Mutex::new(now);
        Arc::new(Self {
            open: Default::default(),
            max: limits.max_connections,
            // The last quarter is for what serves those that are there: endpoints, the app, the controller, probes.
            // A flood from outside leaves an eighth to the app's own calls.
            descriptors: [outbound, inbound],
            per_peer: Mutex::default(),
            // However few there are, one address never takes them all.
            max_per_peer: limits
                .max_connections_per_peer
                .min(usize::try_from(inbound / 2).unwrap_or(0).max(1)),
            memory: memory.map(|memory| Watched {
                memory,
                sampled,
                takes: AtomicUsize::new(0),
                short: AtomicBool::new(false),
                nearly_gone: AtomicBool::new(false),
            }),
        })
    }

    /// Asks how much memory is used, for requests of connections that are there. Ends only where it has no limit.
    pub(crate) async fn watch_memory(self: Arc<Self>) {
        let Some(memory) = &self.memory else { return };
        let mut tick = tokio::time::interval(WATCH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            memory.sample();
        }
    }

    /// Whether requests are refused, since memory is nearly used up.
    pub(crate) fn refuses_requests(&self) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.nearly_gone.load(Ordering::Relaxed))
    }

    /// Room for one connection from `peer`, by this descriptor, if there is.
    pub(crate) fn take(
        limits: &Arc<Self>,
        peer: IpAddr,
        descriptor: RawFd,
        side: Direction,
        now: Instant,
    ) -> Option<Slot> {
        let memory_short = limits.memory.as_ref().is_some_and(|memory| memory.is_short(now));
        if memory_short || descriptor >= limits.descriptors[index(side)] {
            return None;
        }
        let before = limits.open[index(side)].fetch_add(1, Ordering::Relaxed);
        // From here on a refusal gives back what it took.
        let mut slot = Slot { limits: limits.clone(), side, peer: None };
        if before >= limits.max {
            return None;
        }
        // Outbound, every client is this pod.
        if side == Direction::Inbound {
            let mut per_peer = limits.per_peer.lock().unwrap_or_else(PoisonError::into_inner);
            let open = per_peer.entry(peer).or_default();
            if *open >= limits.max_per_peer {
                drop(per_peer);
                return None;
            }
            *open += 1;
            slot.peer = Some(peer);
        }
        Some(slot)
    }
}

/// The place of one side.
const fn index(side: Direction) -> usize {
    match side {
        Direction::Outbound => 0,
        Direction::Inbound => 1,
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.limits.open[index(self.side)].fetch_sub(1, Ordering::Relaxed);
        if let Some(peer) = self.peer {
            let mut per_peer = self.limits.per_peer.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = per_peer.get_mut(&peer) {
                *open -= 1;
                if *open == 0 {
                    per_peer.remove(&peer);
                }
            }
        }
    }
}

impl Watched {
    fn is_short(&self, now: Instant) -> bool {
        let takes = self.takes.fetch_add(1, Ordering::Relaxed);
        let due = {
            let mut sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
            let due =
                takes.is_multiple_of(SAMPLE_TAKES) || now.saturating_duration_since(*sampled) >= SAMPLE_AGE;
            if due {
                *sampled = now;
            }
            due
        };
        if due {
            self.sample();
        }
        self.short.load(Ordering::Relaxed)
    }

    fn sample(&self) {
        let Some(used) = self.memory.used() else { return };
        let limit = self.memory.limit();
        let flags = [
            ("connections", &self.short, SHORT_PERCENT),
            ("requests", &self.nearly_gone, NEARLY_GONE_PERCENT),
        ];
        for (what, flag, percent) in flags {
            let short = used >= limit / 100 * percent;
            if short != flag.swap(short, Ordering::Relaxed) {
                if short {
                    tracing::warn!(used, limit, "{what} are refused: memory is short");
                } else {
                    tracing::info!(used, limit, "{what} are accepted again");
                }
            }
        }
    }
}

/// Of the container's limit. The rest is for what connections that are there may still need.
const SHORT_PERCENT: u64 = 80;
/// Of the container's limit. The rest is for the requests that are under way.
const NEARLY_GONE_PERCENT: u64 = 92;
/// Some 20 µs ten times a second.
const WATCH: Duration = Duration::from_millis(100);
/// Asking costs some 20 µs: never for each connection of a flood ...
const SAMPLE_TAKES: usize = 32;
/// ... and never old news for one that comes alone.
const SAMPLE_AGE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::now, config::Config};

    fn limits(settings: &[(&str, &str)], descriptors: u64) -> Arc<ConnectionLimits> {
        ConnectionLimits::new(&Config::for_tests(settings).limits, Some(descriptors), None, now())
    }

    fn peer(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn a_peer_and_a_side_are_bounded_and_what_ends_makes_room() {
        let take = |limits: &Arc<ConnectionLimits>, n, side| {
            ConnectionLimits::take(limits, peer(n), 10, side, now())
        };
        let by_peer = limits(&[("WEFT_MAX_CONNECTIONS_PER_PEER", "2")], 10_000);
        let first = take(&by_peer, 1, Direction::Inbound);
        let _second = take(&by_peer, 1, Direction::Inbound).unwrap();
        assert!(take(&by_peer, 1, Direction::Inbound).is_none());
        assert!(take(&by_peer, 1, Direction::Outbound).is_some());
        assert!(take(&by_peer, 2, Direction::Inbound).is_some());
        drop(first);
        assert!(take(&by_peer, 1, Direction::Inbound).is_some());

        let by_side = limits(&[("WEFT_MAX_CONNECTIONS", "1")], 10_000);
        let _held = take(&by_side, 1, Direction::Inbound).unwrap();
        assert!(take(&by_side, 2, Direction::Inbound).is_none());
        assert!(take(&by_side, 2, Direction::Outbound).is_some());
    }

    #[test]
    fn descriptors_are_kept_for_those_that_are_there_and_for_the_apps_own_calls() {
        let limits = limits(&[], 256);
        let take =
            |descriptor, side| ConnectionLimits::take(&limits, peer(1), descriptor, side, now()).is_some();
        assert!(take(159, Direction::Inbound) && !take(160, Direction::Inbound));
        assert!(take(191, Direction::Outbound) && !take(192, Direction::Outbound));
        let held: Vec<_> = (0..81)
            .map(|_| ConnectionLimits::take(&limits, peer(1), 10, Direction::Inbound, now()))
            .collect();
        assert_eq!(held.iter().flatten().count(), 80, "one address takes half");
    }
}
