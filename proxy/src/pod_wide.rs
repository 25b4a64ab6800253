//! What holds for the pod as a whole, whichever worker a request is on: retry budgets, how much of a service is in use,
//! and how often the app may be asked.
//!
//! Why atomics behind a map that is asked seldom: a cap that each worker kept for itself would be as many times as large
//! as there are workers. A service's numbers are found once, when its policy arrives; a request then counts itself in one
//! of them.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use weft_core::{
    budget::Budget,
    limit::Limiter,
    policy::{BackendKey, ObjectRef},
};

/// What holds for the pod as a whole, by service or port: all workers have the same one of each, as long as anybody has it.
pub(crate) struct PodWide<K, T>(Arc<Mutex<HashMap<K, Weak<T>>>>);

/// Retry budgets: all workers draw from the same ones.
pub(crate) type Budgets = PodWide<BackendKey, Budget>;

/// What is in use of each service, by whichever worker.
pub(crate) type Caps = PodWide<BackendKey, InUse>;

/// Rate limits, by the app's port and where each was said.
pub(crate) type Limiters = PodWide<(u16, ObjectRef, Arc<str>), Limiter>;

/// What is in use of one service.
#[derive(Default)]
pub(crate) struct InUse {
    requests: AtomicU32,
    connections: AtomicU32,
}

impl<K: Eq + Hash, T> PodWide<K, T> {
    /// The one of a service or port; a new one if there is none, or if it is not `right` any more.
    pub(crate) fn of(&self, what: K, right: impl FnOnce(&T) -> bool, new: impl FnOnce() -> T) -> Arc<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get(&what).and_then(Weak::upgrade)
            && right(&known)
        {
            return known;
        }
        all.retain(|_, known| known.strong_count() > 0);
        let made = Arc::new(new());
        all.insert(what, Arc::downgrade(&made));
        made
    }
}

impl<K, T> Default for PodWide<K, T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K, T> Clone for PodWide<K, T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// Counts one request or connection to a service until it goes.
pub(crate) struct Permit {
    of: Arc<InUse>,
    what: Capped,
}

#[derive(Clone, Copy)]
enum Capped {
    Requests,
    Connections,
}

impl Permit {
    /// `None` when the pod has as many requests to the service in flight as it may.
    pub(crate) fn request(of: &Arc<InUse>, limit: u32) -> Option<Self> {
        Self::take(of, Capped::Requests, limit)
    }

    /// `None` when the pod has as many connections to the service as it may.
    pub(crate) fn connection(of: &Arc<InUse>, limit: u32) -> Option<Self> {
        Self::take(of, Capped::Connections, limit)
    }

    /// The same where another one is never refused.
    pub(crate) fn first_connection(of: &Arc<InUse>) -> Option<Self> {
        Self::take(of, Capped::Connections, u32::MAX)
    }

    fn take(of: &Arc<InUse>, what: Capped, limit: u32) -> Option<Self> {
        let counted = of.counter(what);
        counted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limit).then_some(n + 1)).ok()?;
        Some(Self { of: of.clone(), what })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.of.counter(self.what).fetch_sub(1, Ordering::Relaxed);
    }
}

impl InUse {
    fn counter(&self, what: Capped) -> &AtomicU32 {
        match what {
            Capped::Requests => &self.requests,
            Capped::Connections => &self.connections,
        }
    }
}
