//! The change log of one collection: the endpoints of one service, served in O(changed).
//!
//! Why a log and not a map per stream: 10,000 streams that each remember 10,000 endpoints would be 10⁸
//! entries. Here a stream remembers how far it has read. Each member stands in the log once, at its last
//! change, tombstones included, so several changes between two sends collapse by themselves and nothing is
//! ever queued.
//!
//! Why two lanes: removals and draining endpoints go before additions, across messages too. A member is in
//! exactly one lane, and a reader has one position in each.
//!
//! A [`Collection`] is a handle: the index writes it, every stream reads it under a lock that is held for
//! one response at most (256 members) and for nothing else.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fmt,
    str::FromStr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use weft_core::identity::PodUid;

use crate::pb::v1::CollectionHead;

/// Whether a member's change may wait behind additions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// It takes new requests.
    #[default]
    Normal,
    /// It takes none (draining, not ready): told first, as removals are.
    Urgent,
}

/// The members of one collection and their changes. Cheap to clone; clones share.
#[derive(Clone)]
pub struct Collection(Arc<Shared>);

struct Shared {
    epoch: Arc<str>,
    log: RwLock<Log>,
}

/// The state of a collection while it is read.
#[derive(Default)]
pub(super) struct Log {
    by_uid: HashMap<PodUid, Entry>,
    /// By seq: tombstones, and members that take no new requests.
    urgent: BTreeMap<u64, PodUid>,
    /// By seq: the other members.
    normal: BTreeMap<u64, PodUid>,
    /// In the order in which they died.
    tombstones: VecDeque<(Instant, u64, PodUid)>,
    /// Of the last change.
    seq: u64,
    /// The latest tombstone that is no longer kept: a reader that stands before it must start anew.
    forgotten: u64,
    set_hash: u64,
    live: u32,
}

#[derive(Clone)]
struct Entry {
    seq: u64,
    /// `None`: gone.
    live: Option<Live>,
}

#[derive(Clone)]
struct Live {
    body: Bytes,
    hash: u64,
    priority: Priority,
}

/// One line of the log.
pub(super) struct Line<'a> {
    pub(super) seq: u64,
    pub(super) uid: &'a PodUid,
    /// The encoded endpoint and its hash; `None`: gone.
    pub(super) live: Option<(&'a Bytes, u64)>,
}

/// Which lane of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Urgent,
    Normal,
}

/// Where a reader starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// It holds exactly this set.
    Nothing,
    /// It knows everything up to there.
    After(u64),
    /// From nothing.
    Full,
}

/// How far a reader has read: `<epoch>/<seq>/<set-hash>`, what it says in `initial_resource_versions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Of which log.
    pub epoch: Arc<str>,
    /// Everything up to there is known.
    pub seq: u64,
    /// Of what the reader holds, whoever told it.
    pub set_hash: u64,
}

/// Not a cursor: its reader starts from nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cursor is <epoch>/<seq>/<set-hash>")]
pub struct InvalidCursor;

impl Collection {
    /// How long a removed member is remembered, so that a reader that was away may resume.
    pub const TOMBSTONE_AGE: Duration = Duration::from_secs(15 * 60);
    /// How many of them at most: a crash loop must not grow the log.
    const MAX_TOMBSTONES: usize = 16_384;
    /// Bytes of an epoch that a cursor may have.
    const MAX_EPOCH: usize = 64;

    /// An empty collection. Its `epoch` says which log a position belongs to: it must differ between
    /// replicas, between two runs of one replica, and between two collections that had one name. A `/`
    /// in it is taken as `-`.
    pub fn new(epoch: &str) -> Self {
        let epoch: String =
            epoch.chars().take(Self::MAX_EPOCH / 4).map(|c| if c == '/' { '-' } else { c }).collect();
        Self(Arc::new(Shared { epoch: epoch.into(), log: RwLock::default() }))
    }

    /// Sets a member to an encoded `Endpoint`. False: that is what it was, and nobody is told.
    pub fn publish(&self, uid: &PodUid, body: Bytes, priority: Priority) -> bool {
        self.write().publish(uid, body, priority)
    }

    /// Removes a member. False: there was none.
    pub fn remove(&self, uid: &PodUid, now: Instant) -> bool {
        self.write().remove(uid, now)
    }

    /// Makes the members exactly these; whoever stays as it was is not told about. Says how many changed.
    pub fn replace(
        &self,
        members: impl IntoIterator<Item = (PodUid, Bytes, Priority)>,
        now: Instant,
    ) -> usize {
        let mut log = self.write();
        let mut keep = BTreeSet::new();
        let mut changed = 0;
        for (uid, body, priority) in members {
            changed += usize::from(log.publish(&uid, body, priority));
            keep.insert(uid);
        }
        let mut gone: Vec<PodUid> = log
            .by_uid
            .iter()
            .filter(|(uid, entry)| entry.live.is_some() && !keep.contains(*uid))
            .map(|(uid, _)| uid.clone())
            .collect();
        gone.sort();
        for uid in &gone {
            changed += usize::from(log.remove(uid, now));
        }
        changed
    }

    /// Forgets tombstones that are old. Writers do so by themselves; a collection that is quiet for long
    /// may be told.
    pub fn prune(&self, now: Instant) {
        self.write().prune(now);
    }

    /// Which log this is.
    pub fn epoch(&self) -> &Arc<str> {
        &self.0.epoch
    }

    /// Grows with every change.
    pub fn seq(&self) -> u64 {
        self.read().seq
    }

    /// The sum of the members' hashes: equal sets have equal sums, on every replica.
    pub fn set_hash(&self) -> u64 {
        self.read().set_hash
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.read().live as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The members as they are, in no order.
    pub fn members(&self) -> Vec<(PodUid, Bytes)> {
        let log = self.read();
        let live = log.by_uid.iter().filter_map(|(uid, entry)| Some((uid, entry.live.as_ref()?)));
        live.map(|(uid, live)| (uid.clone(), live.body.clone())).collect()
    }

    pub(super) fn start(&self, log: &Log, cursor: Option<&str>) -> Start {
        let Some(Ok(cursor)) = cursor.map(Cursor::from_str) else { return Start::Full };
        if cursor.set_hash == log.set_hash {
            return Start::Nothing;
        }
        let ours = cursor.epoch == self.0.epoch && (log.forgotten..=log.seq).contains(&cursor.seq);
        if ours { Start::After(cursor.seq) } else { Start::Full }
    }

    pub(super) fn head(&self, log: &Log) -> CollectionHead {
        CollectionHead {
            epoch: self.0.epoch.to_string(),
            seq: log.seq,
            count: log.live,
            complete: false,
            set_hash: log.set_hash,
            begin: false,
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Log> {
        // A writer that panicked left a log that is at worst one change short.
        self.0.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Log> {
        self.0.log.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Collection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let log = self.read();
        f.debug_struct("Collection")
            .field("epoch", &self.0.epoch)
            .field("seq", &log.seq)
            .field("live", &log.live)
            .finish_non_exhaustive()
    }
}

impl Log {
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// The changes of one lane after `seq`, up to and including `upto`, in order.
    pub(super) fn after(&self, lane: Lane, seq: u64, upto: u64) -> impl Iterator<Item = Line<'_>> {
        let lane = match lane {
            Lane::Urgent => &self.urgent,
            Lane::Normal => &self.normal,
        };
        // An empty range (`seq` at or beyond `upto`) is one that BTreeMap would panic on.
        let range = (seq < upto).then(|| lane.range(seq + 1..=upto));
        range.into_iter().flatten().filter_map(|(seq, uid)| {
            let entry = self.by_uid.get(uid)?;
            let live = entry.live.as_ref().map(|live| (&live.body, live.hash));
            Some(Line { seq: *seq, uid, live })
        })
    }

    fn publish(&mut self, uid: &PodUid, body: Bytes, priority: Priority) -> bool {
        let hash = member_hash(uid.as_str(), &body);
        let old = self.by_uid.get(uid);
        if let Some(Entry { live: Some(live), .. }) = old
            && live.hash == hash
            && live.body == body
            && live.priority == priority
        {
            return false;
        }
        if let Some(entry) = self.by_uid.remove(uid) {
            self.forget(&entry);
        }
        self.seq += 1;
        let lane = match priority {
            Priority::Normal => &mut self.normal,
            Priority::Urgent => &mut self.urgent,
        };
        lane.insert(self.seq, uid.clone());
        self.set_hash = self.set_hash.wrapping_add(hash);
        self.live += 1;
        let live = Some(Live { body, hash, priority });
        self.by_uid.insert(uid.clone(), Entry { seq: self.seq, live });
        true
    }

    fn remove(&mut self, uid: &PodUid, now: Instant) -> bool {
        match self.by_uid.get(uid) {
            Some(Entry { live: Some(_), .. }) => {}
            Some(Entry { live: None, .. }) | None => return false,
        }
        if let Some(entry) = self.by_uid.remove(uid) {
            self.forget(&entry);
        }
        self.seq += 1;
        self.urgent.insert(self.seq, uid.clone());
        self.by_uid.insert(uid.clone(), Entry { seq: self.seq, live: None });
        self.tombstones.push_back((now, self.seq, uid.clone()));
        self.prune(now);
        true
    }

    /// Takes an entry out of its lane and out of the sums.
    fn forget(&mut self, entry: &Entry) {
        self.urgent.remove(&entry.seq);
        self.normal.remove(&entry.seq);
        if let Some(live) = &entry.live {
            self.set_hash = self.set_hash.wrapping_sub(live.hash);
            self.live -= 1;
        }
    }

    fn prune(&mut self, now: Instant) {
        while let Some((died, seq, uid)) = self.tombstones.front() {
            let old = now.saturating_duration_since(*died) > Collection::TOMBSTONE_AGE;
            if !old && self.tombstones.len() <= Collection::MAX_TOMBSTONES {
                return;
            }
            // A member that came back has another entry, and nothing is lost with this one.
            if self.by_uid.get(uid).is_some_and(|entry| entry.seq == *seq) {
                self.by_uid.remove(uid);
                self.urgent.remove(seq);
                self.forgotten = *seq;
            }
            self.tombstones.pop_front();
        }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{:016x}", self.epoch, self.seq, self.set_hash)
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let mut parts = text.split('/');
        let (Some(epoch), Some(seq), Some(hash), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidCursor);
        };
        if epoch.len() > Collection::MAX_EPOCH || hash.len() != 16 {
            return Err(InvalidCursor);
        }
        Ok(Self {
            epoch: epoch.into(),
            seq: seq.parse().map_err(|_| InvalidCursor)?,
            set_hash: u64::from_str_radix(hash, 16).map_err(|_| InvalidCursor)?,
        })
    }
}

/// The hash of one member, the same on every replica and in every version of Weft (`proto/README.md`):
/// FNV-1a over uid, a zero byte and the encoded endpoint, then SplitMix64's finalizer, because FNV alone
/// spreads badly over the high bits, and these hashes are added up.
pub(super) fn member_hash(uid: &str, body: &[u8]) -> u64 {
    let bytes = uid.as_bytes().iter().chain(&[0]).chain(body);
    let mut h =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: u32) -> PodUid {
        PodUid::new(&format!("pod-{n}")).unwrap()
    }

    fn lines(c: &Collection, lane: Lane, seq: u64) -> Vec<(u64, String, bool)> {
        let log = c.read();
        let upto = log.seq();
        log.after(lane, seq, upto).map(|l| (l.seq, l.uid.to_string(), l.live.is_some())).collect()
    }

    #[test]
    fn a_member_stands_in_the_log_once_at_its_last_change() {
        let now = Instant::now();
        let c = Collection::new("e");
        assert!(c.publish(&uid(1), Bytes::from_static(b"a"), Priority::Normal));
        assert!(c.publish(&uid(2), Bytes::from_static(b"b"), Priority::Normal));
        assert!(!c.publish(&uid(1), Bytes::from_static(b"a"), Priority::Normal));
        assert!(c.publish(&uid(1), Bytes::from_static(b"a2"), Priority::Urgent));
        assert_eq!(lines(&c, Lane::Normal, 0), [(2, "pod-2".to_owned(), true)]);
        assert_eq!(lines(&c, Lane::Urgent, 0), [(3, "pod-1".to_owned(), true)]);
        assert!(c.remove(&uid(1), now));
        assert!(!c.remove(&uid(1), now));
        assert_eq!(lines(&c, Lane::Urgent, 0), [(4, "pod-1".to_owned(), false)]);
        assert_eq!(c.len(), 1);
    }

    #[test]
    fn the_set_hash_does_not_depend_on_history_or_order() {
        let now = Instant::now();
        let (a, b) = (Collection::new("a"), Collection::new("b"));
        for n in 0..50 {
            a.publish(&uid(n), Bytes::from(n.to_string()), Priority::Normal);
        }
        for n in (0..60).rev() {
            b.publish(&uid(n), Bytes::from((n + 1).to_string()), Priority::Urgent);
        }
        let members = (0..50).map(|n| (uid(n), Bytes::from(n.to_string()), Priority::Normal));
        assert_ne!(a.set_hash(), b.set_hash());
        assert_eq!(b.replace(members, now), 60);
        assert_eq!(a.set_hash(), b.set_hash());
        assert_eq!(a.len(), b.len());
        a.replace([], now);
        assert_eq!(a.set_hash(), 0);
    }

    #[test]
    fn the_hash_is_the_one_in_the_readme() {
        // What proto/README.md says: another implementation must come to the same numbers.
        assert_eq!(member_hash("pod-1", b"body"), 0x5c94_2b75_6285_35e6);
        assert_ne!(member_hash("a", b"b"), member_hash("ab", b""));
    }

    #[test]
    fn a_cursor_resumes_only_where_nothing_was_forgotten() {
        let start = Instant::now();
        let c = Collection::new("e");
        for n in 0..10 {
            c.publish(&uid(n), Bytes::from_static(b"x"), Priority::Normal);
        }
        let at = |seq: u64, hash: u64| Cursor { epoch: "e".into(), seq, set_hash: hash }.to_string();
        assert_eq!(c.start(&c.read(), Some(&at(10, c.set_hash()))), Start::Nothing);
        assert_eq!(c.start(&c.read(), Some(&at(4, 1))), Start::After(4));
        assert_eq!(c.start(&c.read(), Some(&at(11, 1))), Start::Full);
        assert_eq!(c.start(&c.read(), Some("other/4/0000000000000001")), Start::Full);
        assert_eq!(c.start(&c.read(), Some("nonsense")), Start::Full);
        assert_eq!(c.start(&c.read(), None), Start::Full);

        c.remove(&uid(0), start);
        c.prune(start + Collection::TOMBSTONE_AGE);
        assert_eq!(c.start(&c.read(), Some(&at(10, 1))), Start::After(10));
        c.prune(start + Collection::TOMBSTONE_AGE + Duration::from_secs(1));
        assert_eq!(c.start(&c.read(), Some(&at(10, 1))), Start::Full);
        assert_eq!(c.start(&c.read(), Some(&at(11, 1))), Start::After(11));
    }

    #[test]
    fn churn_does_not_grow_the_log() {
        let now = Instant::now();
        let c = Collection::new("e");
        for n in 0..40_000 {
            c.publish(&uid(n), Bytes::from_static(b"x"), Priority::Normal);
            c.remove(&uid(n), now);
        }
        let log = c.read();
        assert_eq!(log.tombstones.len(), Collection::MAX_TOMBSTONES);
        assert_eq!(log.by_uid.len(), Collection::MAX_TOMBSTONES);
        assert_eq!(log.urgent.len(), Collection::MAX_TOMBSTONES);
        assert!(log.normal.is_empty());
    }
}
