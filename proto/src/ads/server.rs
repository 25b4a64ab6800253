//! The server's side of one stream: what is subscribed, what was told, and what to send next.
//!
//! Why pull: nothing is queued for a stream. [`Stream::next`] compares what was told with what is, when
//! something may be sent; whatever changed in between collapses, a slow reader costs no memory, and a
//! publisher never waits for one. One response of a type may be un-ACKed.
//!
//! The rules, each a test below: a nonce belongs to one stream; a stale one is no ACK but its
//! (un)subscriptions hold; `error_detail` alone makes a NACK, after which that version is not sent again
//! and the next one is; an ACK triggers nothing; a re-subscription is answered although nothing changed; a
//! missing name is answered at once, remembered, and sent when it appears; names that a reconnecting client
//! holds and that are gone are removed; an unknown type is ignored and does not end the stream.
//!
//! What takes something's place is told before what it replaces is taken away, across types: a new backend
//! comes before the route that names it, and the removal of the old one after both, even if the route has to
//! wait for an ACK. Endpoints that go are apart from this: nobody may wait for that.
//!
//! Who may ask for what is not decided here: a [`Source`] that does not show a resource to this subscriber
//! has none, and "not allowed" looks exactly like "not there".

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;

use super::{
    COLLECTION_HEAD_TYPE_URL, HEAD, REJECTED_TYPE_URL, ResourceType,
    collection::{Collection, Lane, Line, Log, Start},
    is_collection,
};
use crate::{
    Any,
    names::MAX_NAME_LEN,
    pb::{
        ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status},
        v1::{CollectionHead, RejectedResource},
    },
};

/// How long a response may stay without ACK or NACK before the stream should be closed.
pub const ACK_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a reader is told what it should hold of a collection.
pub const HEAD_INTERVAL: Duration = Duration::from_secs(60);
/// Resources and removals of one response.
pub const MAX_BATCH: usize = 256;
/// Bytes of one response, but for a resource that is larger by itself.
pub const MAX_BATCH_LEN: usize = 64 * 1024;
/// Names that one stream may subscribe.
pub const MAX_NAMES: usize = 20_000;
/// Bytes of them, and of the versions that a client says to hold.
pub const MAX_NAMES_LEN: usize = 4 * 1024 * 1024;

/// Bytes of a node: it is for logs.
const MAX_NODE_LEN: usize = 4_096;
/// Rejected resources of a NACK that are read.
const MAX_REJECTED: usize = 1_024;
/// Bytes of a text that a client sends for the log.
const MAX_REASON_LEN: usize = 1_024;

/// What a stream may send, as its subscriber may see it.
pub trait Source {
    /// The resource of that name; `None`: there is none, or none for this subscriber.
    fn lookup(&self, ty: ResourceType, name: &str) -> Option<Versioned>;

    /// The collection of that name (`ep/…/*`); `None`: there is none, or none for this subscriber.
    fn collection(&self, name: &str) -> Option<Collection>;
}

/// One resource as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// Replicas that see the same object say the same version.
    pub version: Arc<str>,
    /// The encoded message, shared by all who send it.
    pub body: Bytes,
}

/// The state of one stream.
#[derive(Debug)]
pub struct Stream {
    id: u64,
    sent: u64,
    node: Option<Node>,
    names: usize,
    names_len: usize,
    types: [Type; ResourceType::ALL.len()],
}

/// What a request said.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// About which type; `None`: one that this build does not know, and nothing else was read.
    pub ty: Option<ResourceType>,
    /// About the last response.
    pub reply: Reply,
    /// Names that are new to this stream.
    pub subscribed: Vec<Arc<str>>,
    /// Names that this stream no longer has.
    pub unsubscribed: Vec<Arc<str>>,
}

/// What a request said about a response.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Nothing: it only changes subscriptions.
    None,
    /// Accepted (which is not yet live: that comes as `Applied`).
    Ack,
    /// Refused, at least in part.
    Nack(Nack),
    /// It is about a response that is no longer awaited.
    Stale,
}

/// Why a response was refused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nack {
    /// In words.
    pub message: String,
    /// Which resources; the others were accepted. Empty: the response as a whole was refused.
    pub rejected: Vec<RejectedResource>,
}

/// A request after which the stream must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// More names than one stream may have, or longer ones.
    #[error(
        "more than {MAX_NAMES} names or {MAX_NAMES_LEN} bytes of them are subscribed; unsubscribe what is not used"
    )]
    TooManyNames,
    /// A name that cannot be one.
    #[error("a name has {0} bytes; at most {MAX_NAME_LEN} are taken")]
    NameTooLong(usize),
    /// A node that is not for logs.
    #[error("the node has {0} bytes; at most {MAX_NODE_LEN} are taken")]
    NodeTooLong(usize),
}

#[derive(Debug, Default)]
struct Type {
    /// Whether a request of this type was seen on this stream.
    started: bool,
    plain: BTreeMap<Arc<str>, Plain>,
    collections: BTreeMap<Arc<str>, Following>,
    in_flight: Option<InFlight>,
    /// The name after which the next response starts, so that one that always changes starves none.
    after: Option<Arc<str>>,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    since: Instant,
}

/// One subscribed resource.
#[derive(Debug)]
struct Plain {
    told: Told,
    /// Whether the client wants an answer although nothing changed.
    answer: bool,
}

#[derive(Debug, PartialEq)]
enum Told {
    Nothing,
    Version(Arc<str>),
    Gone,
}

/// One subscribed collection.
#[derive(Debug, Default)]
struct Following {
    /// What the client says to hold, until the first answer.
    cursor: Option<String>,
    /// Its absence was told.
    gone: bool,
    /// Where in its log we are; `None` before the first answer, and while it is gone.
    position: Option<Position>,
}

#[derive(Debug)]
struct Position {
    epoch: Arc<str>,
    urgent: u64,
    normal: u64,
    /// A full send is under way.
    full: Option<Full>,
    /// When the reader is next told what it should hold.
    head_at: Instant,
}

#[derive(Debug)]
struct Full {
    /// The log's seq when it began: who was gone by then was never told.
    since: u64,
    begun: bool,
}

impl Stream {
    /// A stream that has said nothing. `id` is part of its nonces: a random number, so that a nonce of
    /// another stream, or of another replica, is never taken for one of this.
    pub fn new(id: u64) -> Self {
        Self { id, sent: 0, node: None, names: 0, names_len: 0, types: Default::default() }
    }

    /// Takes a request.
    ///
    /// # Errors
    /// What no client of ours sends; the stream must be closed.
    pub fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<Received, ProtocolError> {
        if self.node.is_none()
            && let Some(node) = request.node
        {
            let len = node.encoded_len();
            if len > MAX_NODE_LEN {
                return Err(ProtocolError::NodeTooLong(len));
            }
            self.node = Some(node);
        }
        let Some(ty) = ResourceType::from_type_url(&request.type_url) else {
            let (subscribed, unsubscribed) = (Vec::new(), Vec::new());
            return Ok(Received { ty: None, reply: Reply::None, subscribed, unsubscribed });
        };
        let reply = self.types[ty.index()].reply(&request.response_nonce, request.error_detail);

        let state = &mut self.types[ty.index()];
        let first = !std::mem::replace(&mut state.started, true);
        let mut versions = if first { request.initial_resource_versions } else { BTreeMap::new() };
        let mut names = request.resource_names_subscribe;
        if first && names.is_empty() {
            // A first request without names asks for everything. No type of Weft has an everything: the
            // name is remembered and answered as missing, so that whoever asked does not wait.
            names.push("*".to_owned());
        }
        let mut subscribed = Vec::new();
        for name in names {
            if name.len() > MAX_NAME_LEN {
                return Err(ProtocolError::NameTooLong(name.len()));
            }
            let version = versions.remove(&name);
            // Not given back: they come once.
            self.names_len += version.as_ref().map_or(0, String::len);
            let state = &mut self.types[ty.index()];
            let name: Arc<str> = name.into();
            let new = if is_collection(ty, &name) {
                let new = Following { cursor: version, ..Following::default() };
                state.collections.insert(Arc::clone(&name), new).is_none()
            } else if ty == ResourceType::Endpoint && &*name != "*" {
                // A member by itself would also come with its collection, twice in one response.
                continue;
            } else {
                match state.plain.get_mut(&name) {
                    Some(plain) => {
                        plain.answer = true;
                        false
                    }
                    None => {
                        let told = version.map_or(Told::Nothing, |version| Told::Version(version.into()));
                        state.plain.insert(Arc::clone(&name), Plain { told, answer: false });
                        true
                    }
                }
            };
            if new {
                self.names += 1;
                self.names_len += name.len();
                subscribed.push(name);
            }
            if self.names > MAX_NAMES || self.names_len > MAX_NAMES_LEN {
                return Err(ProtocolError::TooManyNames);
            }
        }
        let mut unsubscribed = Vec::new();
        for name in request.resource_names_unsubscribe {
            let state = &mut self.types[ty.index()];
            let name: Arc<str> = name.into();
            if state.plain.remove(&name).is_some() || state.collections.remove(&name).is_some() {
                self.names -= 1;
                self.names_len -= name.len();
                unsubscribed.push(name);
            }
        }
        Ok(Received { ty: Some(ty), reply, subscribed, unsubscribed })
    }

    /// The next response of any type, if there is something to tell and it may be told now. To be called
    /// again until `None`, whenever the source changed, a request was taken, or [`Stream::wake_at`] came.
    pub fn next(&mut self, source: &dyn Source, now: Instant) -> Option<DeltaDiscoveryResponse> {
        let mut waits = false;
        for ty in ResourceType::ALL {
            let mut pass = Pass::Make { left: false };
            let response = self.next_of(ty, source, now, &mut pass);
            if response.is_some() {
                return response;
            }
            waits |= matches!(pass, Pass::Make { left: true });
        }
        // An answer is awaited for so long at most; then the stream ends.
        if !waits || ResourceType::ALL.into_iter().any(|ty| self.types[ty.index()].is_behind(ty, source)) {
            return None;
        }
        ResourceType::ALL.into_iter().find_map(|ty| self.next_of(ty, source, now, &mut Pass::Break))
    }

    fn next_of(
        &mut self,
        ty: ResourceType,
        source: &dyn Source,
        now: Instant,
        pass: &mut Pass,
    ) -> Option<DeltaDiscoveryResponse> {
        let state = &mut self.types[ty.index()];
        if state.in_flight.is_some() {
            return None;
        }
        let mut batch = Batch::default();
        state.tell_plain(ty, source, &mut batch, pass);
        // Streams that connected together need not all hear their heads together.
        let spread = Duration::from_millis(self.id % (HEAD_INTERVAL.as_millis() as u64 / 2));
        state.tell_collections(source, &mut batch, now, now + HEAD_INTERVAL - spread, pass);
        if batch.resources.is_empty() && batch.removed.is_empty() {
            return None;
        }
        self.sent += 1;
        let nonce = format!("{:016x}-{}", self.id, self.sent);
        state.in_flight = Some(InFlight { nonce: nonce.clone(), since: now });
        Some(DeltaDiscoveryResponse {
            system_version_info: String::new(),
            resources: batch.resources,
            type_url: ty.type_url().to_owned(),
            nonce,
            removed_resources: batch.removed,
            control_plane: None,
        })
    }

    /// Whether a response waits for its ACK for too long: the stream must be closed.
    pub fn overdue(&self, now: Instant) -> bool {
        let mut waiting = self.types.iter().filter_map(|state| state.in_flight.as_ref());
        waiting.any(|in_flight| now.saturating_duration_since(in_flight.since) >= ACK_TIMEOUT)
    }

    /// When to call [`Stream::next`] and [`Stream::overdue`] although nothing happened.
    pub fn wake_at(&self) -> Option<Instant> {
        let wakes = self.types.iter().flat_map(|state| {
            let deadline = state.in_flight.as_ref().map(|in_flight| in_flight.since + ACK_TIMEOUT);
            let heads = state
                .collections
                .values()
                .filter_map(|following| following.position.as_ref().map(|position| position.head_at));
            // While a response is awaited, no head can be sent.
            let head = if deadline.is_some() { None } else { heads.min() };
            deadline.into_iter().chain(head)
        });
        wakes.min()
    }

    /// Who says to be at the other end: for logs, never for a decision.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// Every name that is subscribed, with its type.
    pub fn subscribed(&self) -> impl Iterator<Item = (ResourceType, &Arc<str>)> {
        ResourceType::ALL.into_iter().flat_map(|ty| {
            let state = &self.types[ty.index()];
            state.plain.keys().chain(state.collections.keys()).map(move |name| (ty, name))
        })
    }

    /// Whether that name is subscribed.
    pub fn is_subscribed(&self, ty: ResourceType, name: &str) -> bool {
        let state = &self.types[ty.index()];
        state.plain.contains_key(name) || state.collections.contains_key(name)
    }

    /// The version of a resource that was last sent (or that the client came with).
    pub fn told(&self, ty: ResourceType, name: &str) -> Option<&str> {
        match &self.types[ty.index()].plain.get(name)?.told {
            Told::Version(version) => Some(version),
            Told::Nothing | Told::Gone => None,
        }
    }

    /// Whether a response of that type is un-ACKed.
    pub fn is_waiting(&self, ty: ResourceType) -> bool {
        self.types[ty.index()].in_flight.is_some()
    }
}

/// Which half of what there is to tell.
#[derive(Debug)]
enum Pass {
    /// What is new, and answers to whoever waits for one; whether anything was left for the other half.
    Make { left: bool },
    /// All, removals of what the client holds among it.
    Break,
}

impl Pass {
    /// Whether a removal is left for later, which is noted.
    fn leaves(&mut self) -> bool {
        match self {
            Self::Make { left } => {
                *left = true;
                true
            }
            Self::Break => false,
        }
    }
}

impl Type {
    fn reply(&mut self, nonce: &str, error: Option<Status>) -> Reply {
        if nonce.is_empty() {
            return Reply::None;
        }
        if self.in_flight.as_ref().is_none_or(|in_flight| in_flight.nonce != nonce) {
            return Reply::Stale;
        }
        self.in_flight = None;
        match error {
            None => Reply::Ack,
            Some(error) => Reply::Nack(Nack::read(error)),
        }
    }

    /// Whether something new has to wait for an ACK.
    fn is_behind(&self, ty: ResourceType, source: &dyn Source) -> bool {
        let plain = |(name, plain): (&Arc<str>, &Plain)| {
            let told = match &plain.told {
                Told::Version(version) => Some(version),
                Told::Nothing | Told::Gone => None,
            };
            source.lookup(ty, name).is_some_and(|now| told.is_none_or(|told| *told != now.version))
        };
        let collection = |(name, following): (&Arc<str>, &Following)| {
            source.collection(name).is_some_and(|collection| {
                let position = following.position.as_ref();
                position.is_none_or(|position| {
                    position.epoch != *collection.epoch()
                        || position.full.is_some()
                        || position.normal < collection.read().seq()
                })
            })
        };
        self.in_flight.is_some() && (self.plain.iter().any(plain) || self.collections.iter().any(collection))
    }

    /// What changed, starting where the last response stopped.
    fn tell_plain(&mut self, ty: ResourceType, source: &dyn Source, batch: &mut Batch, pass: &mut Pass) {
        let mut changed: Vec<(Arc<str>, Versioned)> = Vec::new();
        for name in order(&self.plain, self.after.as_ref()) {
            let Some(plain) = self.plain.get_mut(&name) else { continue };
            match source.lookup(ty, &name) {
                None => {
                    let is_held = matches!(plain.told, Told::Version(_)) && !plain.answer;
                    if is_held && pass.leaves() {
                        continue;
                    }
                    if (plain.answer || plain.told != Told::Gone) && !batch.is_full() {
                        batch.remove(name.to_string());
                        *plain = Plain { told: Told::Gone, answer: false };
                    }
                }
                Some(now) => {
                    let known = matches!(&plain.told, Told::Version(version) if *version == now.version);
                    if (plain.answer || !known) && changed.len() < MAX_BATCH {
                        changed.push((name, now));
                    }
                }
            }
        }
        for (name, now) in changed {
            if batch.is_full() {
                break;
            }
            batch.add(name.to_string(), now.version.to_string(), ty.type_url(), now.body);
            if let Some(plain) = self.plain.get_mut(&name) {
                *plain = Plain { told: Told::Version(now.version), answer: false };
            }
            self.after = Some(name);
        }
    }

    /// Of every collection first what is urgent, then the rest; a head where one is due.
    fn tell_collections(
        &mut self,
        source: &dyn Source,
        batch: &mut Batch,
        now: Instant,
        first_head: Instant,
        pass: &mut Pass,
    ) {
        let mut visits = Vec::new();
        for name in order(&self.collections, self.after.as_ref()) {
            let Some(following) = self.collections.get_mut(&name) else { continue };
            let Some(collection) = source.collection(&name) else {
                let is_held = following.position.is_some() || following.cursor.is_some();
                if is_held && pass.leaves() {
                    continue;
                }
                if !following.gone && !batch.is_full() {
                    batch.remove(name.to_string());
                    *following = Following { gone: true, ..Following::default() };
                }
                continue;
            };
            if batch.is_full() {
                continue;
            }
            let log = collection.read();
            let position = following.position(&collection, &log, first_head);
            let begins = position.full.as_mut().is_some_and(|full| !std::mem::replace(&mut full.begun, true));
            // What changes after this moment waits for the next response, in which it cannot stand beside
            // what this one says about the same member.
            let upto = log.seq();
            let since = position.full.as_ref().map_or(0, |full| full.since);
            for line in log.after(Lane::Urgent, position.urgent, upto) {
                if line.live.is_some() || line.seq > since {
                    if batch.is_full() {
                        break;
                    }
                    batch.member(&name, &line);
                    self.after = Some(Arc::clone(&name));
                }
                position.urgent = line.seq;
            }
            drop(log);
            visits.push((name, collection, begins, upto));
        }
        for (name, collection, begins, upto) in visits {
            let following = self.collections.get_mut(&name);
            let Some(position) = following.and_then(|f| f.position.as_mut()) else { continue };
            let log = collection.read();
            for line in log.after(Lane::Normal, position.normal, upto) {
                if batch.is_full() {
                    break;
                }
                batch.member(&name, &line);
                position.normal = line.seq;
                self.after = Some(Arc::clone(&name));
            }
            let drained = log.seq() == upto
                && log.after(Lane::Urgent, position.urgent, upto).next().is_none()
                && log.after(Lane::Normal, position.normal, upto).next().is_none();
            let completes = drained && position.full.take_if(|_| drained).is_some();
            if drained {
                (position.urgent, position.normal) = (upto, upto);
            }
            if begins || completes || (drained && now >= position.head_at) {
                let head = CollectionHead { begin: begins, complete: completes, ..collection.head(&log) };
                batch.head(&name, &head);
                if drained {
                    position.head_at = now + HEAD_INTERVAL;
                }
            }
        }
    }
}

impl Following {
    /// The position in this log, after whatever has to be begun anew.
    fn position(&mut self, collection: &Collection, log: &Log, head_at: Instant) -> &mut Position {
        let anew = match &self.position {
            None if self.gone => Some(Start::Full),
            None => Some(collection.start(log, self.cursor.as_deref())),
            Some(position) => {
                // Who was gone when a full send began is no loss to it.
                let read = position.urgent.max(position.full.as_ref().map_or(0, |full| full.since));
                let lost = position.epoch != *collection.epoch() || read < log.forgotten();
                lost.then_some(Start::Full)
            }
        };
        if let Some(start) = anew {
            *self =
                Self { position: Some(Position::new(start, collection, log, head_at)), ..Self::default() };
        }
        self.position.get_or_insert_with(|| Position::new(Start::Full, collection, log, head_at))
    }
}

impl Position {
    fn new(start: Start, collection: &Collection, log: &Log, head_at: Instant) -> Self {
        let (read, full) = match start {
            Start::Nothing => (log.seq(), None),
            Start::After(seq) => (seq, None),
            Start::Full => (0, Some(Full { since: log.seq(), begun: false })),
        };
        Self { epoch: Arc::clone(collection.epoch()), urgent: read, normal: read, full, head_at }
    }
}

impl Nack {
    fn read(error: Status) -> Self {
        let rejected = error
            .details
            .into_iter()
            .take(MAX_REJECTED)
            .filter(|detail| detail.type_url == REJECTED_TYPE_URL && detail.value.len() <= 8 * MAX_REASON_LEN)
            .filter_map(|detail| RejectedResource::decode(detail.value).ok())
            .collect();
        Self { message: error.message.chars().take(MAX_REASON_LEN).collect(), rejected }
    }
}

/// One response in the making.
#[derive(Default)]
struct Batch {
    resources: Vec<Resource>,
    removed: Vec<String>,
    len: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.resources.len() + self.removed.len() >= MAX_BATCH || self.len >= MAX_BATCH_LEN
    }

    fn remove(&mut self, name: String) {
        self.len += name.len() + 4;
        self.removed.push(name);
    }

    fn add(&mut self, name: String, version: String, type_url: &str, body: Bytes) {
        self.len += name.len() + version.len() + type_url.len() + body.len() + 24;
        let resource = Some(Any { type_url: type_url.to_owned(), value: body });
        self.resources.push(Resource { version, resource, name, aliases: Vec::new() });
    }

    fn member(&mut self, collection: &str, line: &Line<'_>) {
        let name = format!("{}{}", prefix(collection), line.uid);
        match line.live {
            None => self.remove(name),
            Some((body, hash)) => {
                self.add(name, format!("{hash:016x}"), ResourceType::Endpoint.type_url(), body.clone());
            }
        }
    }

    fn head(&mut self, collection: &str, head: &CollectionHead) {
        let name = format!("{}{HEAD}", prefix(collection));
        self.add(name, head.seq.to_string(), COLLECTION_HEAD_TYPE_URL, head.encode_to_vec().into());
    }
}

/// `ep/<ns>/<name>:<port>/` of `ep/<ns>/<name>:<port>/*`.
fn prefix(collection: &str) -> &str {
    collection.strip_suffix('*').unwrap_or(collection)
}

/// The names of a map, beginning after `after`.
fn order<T>(names: &BTreeMap<Arc<str>, T>, after: Option<&Arc<str>>) -> Vec<Arc<str>> {
    let Some(after) = after else { return names.keys().cloned().collect() };
    let later = names.range::<str, _>((Bound::Excluded(&**after), Bound::Unbounded));
    let earlier = names.range::<str, _>((Bound::Unbounded, Bound::Included(&**after)));
    later.chain(earlier).map(|(name, _)| Arc::clone(name)).collect()
}
