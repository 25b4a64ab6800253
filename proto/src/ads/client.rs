//! The client's side: what is subscribed, what is held, and what to say to the server.
//!
//! Why the client checks so much: the last good state keeps serving, so anything may be refused, and
//! refusing costs nothing but freshness. A message that is too large, or that names a resource twice, is
//! refused whole; a resource that cannot be enforced is refused alone, is *not* recorded as held, and the
//! server hears its name and the reason.
//!
//! A client outlives its streams. [`Client::connected`] begins a stream with everything that is subscribed
//! and the versions that are held, so that a reconnect to the same or to another replica costs only what
//! changed.
//!
//! Collections: the members' hashes are summed here as they are at the server, so that a reader that
//! missed something finds out within a minute and asks again ([`Stats::mismatches`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use prost::Message as _;

use super::{
    COLLECTION_HEAD_TYPE_URL, HEAD, MAX_MESSAGE_LEN, MAX_RESOURCE_LEN, MAX_RESOURCES, REJECTED_TYPE_URL,
    ResourceType,
    collection::{Cursor, member_hash},
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

/// Bytes of names in one request: a quarter of what the server takes.
const MAX_REQUEST_LEN: usize = MAX_MESSAGE_LEN / 4;
/// Bytes of a version that is kept.
const MAX_VERSION_LEN: usize = 512;
/// Rejected resources that a NACK names; the message says how many there were.
const MAX_REJECTED: usize = 128;
/// Bytes of one reason.
const MAX_REASON_LEN: usize = 1_024;
/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// One thing that a response changes. Removals come first, then updates, then completed collections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// A resource is new or different. Refusing it keeps what was there.
    Update {
        /// Its type.
        ty: ResourceType,
        /// Its name.
        name: &'a str,
        /// Its version.
        version: &'a str,
        /// The encoded message.
        body: &'a Bytes,
    },
    /// There is no such resource: it is gone, or never was. Under the name of a collection: all of it.
    Removed {
        /// Its type.
        ty: ResourceType,
        /// Its name.
        name: &'a str,
    },
    /// Every member of the collection was told: from now on it is whole.
    CollectionComplete {
        /// Its name.
        collection: &'a str,
    },
}

/// What became of one response.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Receipt {
    /// Its type, if this build knows it.
    pub ty: Option<ResourceType>,
    /// Why it was refused as a whole; nothing of it was taken.
    pub refused: Option<String>,
    /// Resources that were refused, each with its reason.
    pub rejected: Vec<RejectedResource>,
}

/// What happened since the client was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Responses accepted.
    pub acks: u64,
    /// Responses refused, whole or in part.
    pub nacks: u64,
    /// Resources refused.
    pub rejected: u64,
    /// Resources that nobody is subscribed to (any more).
    pub unwanted: u64,
    /// Collections found to differ from what the server says.
    pub mismatches: u64,
}

/// The client of one control plane.
#[derive(Debug)]
pub struct Client {
    node: Node,
    connected: bool,
    node_sent: bool,
    types: [Type; ResourceType::ALL.len()],
    replies: VecDeque<DeltaDiscoveryRequest>,
    /// Resources that are known by name, in all: what is bounded.
    kept: usize,
    stats: Stats,
}

#[derive(Debug, Default)]
struct Type {
    /// Whether a request of this type was sent on this stream.
    started: bool,
    subs: BTreeMap<Arc<str>, Sub>,
    /// Names that the server was told on this stream.
    announced: BTreeSet<Arc<str>>,
    /// Names to tell or take back; true: to tell again although they are announced.
    dirty: BTreeMap<Arc<str>, bool>,
}

#[derive(Debug)]
enum Sub {
    /// The version that is held.
    One(Option<Arc<str>>),
    Many(Members),
}

/// What is known of one collection.
#[derive(Debug, Default)]
struct Members {
    /// By uid.
    told: BTreeMap<Arc<str>, Member>,
    /// Sum of what was told, accepted or not: what the server's sum is compared with.
    sum: u64,
    /// How many members are refused in their latest version.
    refused: usize,
    /// Where the last head stood.
    cursor: Option<(Arc<str>, u64)>,
    /// Grows with each full send: who was told in it has its number.
    round: u64,
    phase: Phase,
    /// Whether all members were told once.
    whole: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// The server has not begun to tell.
    #[default]
    Waiting,
    /// A full send is under way.
    Filling,
    /// Every change is told as it happens.
    Following,
}

#[derive(Debug)]
struct Member {
    hash: u64,
    round: u64,
    /// The version that was accepted last.
    held: Option<Arc<str>>,
    /// Whether a later one was refused.
    refused: bool,
}

/// The callback's type: an `Err` refuses an [`Change::Update`], with the reason.
pub type Accept<'a> = dyn FnMut(Change<'_>) -> Result<(), String> + 'a;

impl Client {
    /// A client that is subscribed to nothing. The node is for the server's logs.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            connected: false,
            node_sent: false,
            types: Default::default(),
            replies: VecDeque::new(),
            kept: 0,
            stats: Stats::default(),
        }
    }

    /// Wants a resource, or a collection (`ep/…/*`). Nothing happens if it is wanted already.
    pub fn subscribe(&mut self, ty: ResourceType, name: &str) {
        let state = &mut self.types[ty.index()];
        if state.subs.contains_key(name) {
            return;
        }
        let name: Arc<str> = name.into();
        let sub = if is_collection(ty, &name) { Sub::Many(Members::default()) } else { Sub::One(None) };
        state.subs.insert(Arc::clone(&name), sub);
        // The server may still believe that we hold it.
        let again = state.announced.contains(&name);
        state.dirty.insert(name, again);
    }

    /// Asks again for what is wanted already, as if nothing were held; what is held stays until then.
    pub fn refresh(&mut self, ty: ResourceType, name: &str) {
        self.types[ty.index()].refresh(name);
    }

    /// Wants it no longer, and forgets it.
    pub fn unsubscribe(&mut self, ty: ResourceType, name: &str) {
        let state = &mut self.types[ty.index()];
        let Some((name, sub)) = state.subs.remove_entry(name) else { return };
        self.kept -= sub.kept();
        state.dirty.insert(name, false);
    }

    /// Whether it is wanted.
    pub fn is_subscribed(&self, ty: ResourceType, name: &str) -> bool {
        self.types[ty.index()].subs.contains_key(name)
    }

    /// Everything that is wanted.
    pub fn subscribed(&self) -> impl Iterator<Item = (ResourceType, &Arc<str>)> {
        ResourceType::ALL
            .into_iter()
            .flat_map(|ty| self.types[ty.index()].subs.keys().map(move |name| (ty, name)))
    }

    /// The version of a resource or member that is held: accepted, and not removed since.
    pub fn version(&self, ty: ResourceType, name: &str) -> Option<&Arc<str>> {
        let subs = &self.types[ty.index()].subs;
        if let Some(Sub::One(version)) = subs.get(name) {
            return version.as_ref();
        }
        let (of, uid) = name.rsplit_once('/')?;
        match subs.get(&*format!("{of}/*"))? {
            Sub::Many(members) => members.told.get(uid)?.held.as_ref(),
            Sub::One(_) => None,
        }
    }

    /// Every resource of a type that is held, with its version; of collections, their members.
    pub fn held(&self, ty: ResourceType) -> impl Iterator<Item = (String, &Arc<str>)> {
        self.types[ty.index()].subs.iter().flat_map(|(name, sub)| {
            let (one, many) = match sub {
                Sub::One(version) => (version.as_ref().map(|version| (name.to_string(), version)), None),
                Sub::Many(members) => (None, Some(members)),
            };
            let of = name.strip_suffix('*').unwrap_or(name);
            let members = many.into_iter().flat_map(|members| &members.told);
            one.into_iter()
                .chain(members.filter_map(move |(uid, m)| Some((format!("{of}{uid}"), m.held.as_ref()?))))
        })
    }

    /// Whether every member of a collection was told since it was subscribed.
    pub fn is_complete(&self, collection: &str) -> bool {
        match self.types[ResourceType::Endpoint.index()].subs.get(collection) {
            Some(Sub::Many(members)) => members.whole,
            Some(Sub::One(_)) | None => false,
        }
    }

    /// What a collection would be resumed with: `<epoch>/<seq>/<set-hash>`.
    pub fn cursor(&self, collection: &str) -> Option<String> {
        match self.types[ResourceType::Endpoint.index()].subs.get(collection)? {
            Sub::Many(members) => members.cursor(),
            Sub::One(_) => None,
        }
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Whether there is a stream.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// There is a new stream: everything is subscribed again, with the versions that are held.
    pub fn connected(&mut self) {
        self.connected = true;
        self.node_sent = false;
        self.replies.clear();
        for state in &mut self.types {
            state.started = false;
            state.announced.clear();
            state.dirty = state.subs.keys().map(|name| (Arc::clone(name), false)).collect();
            for sub in state.subs.values_mut() {
                if let Sub::Many(members) = sub {
                    let resumes = members.cursor().is_some();
                    members.phase = if resumes { Phase::Following } else { Phase::Waiting };
                }
            }
        }
    }

    /// The stream is gone. Everything that is held stays.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.replies.clear();
    }

    /// The next request to send; to be called until `None` after every other call.
    pub fn next_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        if !self.connected {
            return None;
        }
        let mut request = match self.replies.pop_front() {
            Some(reply) => reply,
            None => ResourceType::ALL.into_iter().find_map(|ty| self.types[ty.index()].changes(ty))?,
        };
        if !std::mem::replace(&mut self.node_sent, true) {
            request.node = Some(self.node.clone());
        }
        Some(request)
    }

    /// Takes a response and queues exactly one ACK or NACK. `accept` is told each change, and refuses an
    /// update by an `Err` (of other changes, an `Err` is ignored: what is gone cannot be kept).
    pub fn receive(&mut self, response: DeltaDiscoveryResponse, accept: &mut Accept<'_>) -> Receipt {
        let Some(ty) = ResourceType::from_type_url(&response.type_url) else {
            // We never asked. A reply would be a first request of that type: it would subscribe to all.
            self.stats.unwanted += 1;
            return Receipt::default();
        };
        if !self.types[ty.index()].started {
            self.stats.unwanted += 1;
            return Receipt { ty: Some(ty), ..Receipt::default() };
        }
        let mut receipt = Receipt { ty: Some(ty), refused: refuse(&response), rejected: Vec::new() };
        if receipt.refused.is_none() {
            for name in &response.removed_resources {
                self.removed(ty, name, accept);
            }
            let heads = self.begin(ty, &response.resources, &mut receipt);
            for resource in &response.resources {
                if let Err(reason) = self.update(ty, resource, accept) {
                    receipt.rejected.push(rejected(resource, &reason));
                }
            }
            for (collection, head) in heads {
                self.head(&collection, &head, accept);
            }
        }
        self.stats.rejected += receipt.rejected.len() as u64;
        let error_detail = error(&receipt);
        let count = if error_detail.is_some() { &mut self.stats.nacks } else { &mut self.stats.acks };
        *count += 1;
        self.replies.push_back(DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        });
        receipt
    }

    fn removed(&mut self, ty: ResourceType, name: &str, accept: &mut Accept<'_>) {
        let subs = &mut self.types[ty.index()].subs;
        if let Some(sub) = subs.get_mut(name) {
            self.kept -= sub.kept();
            *sub = match sub {
                Sub::One(_) => Sub::One(None),
                Sub::Many(_) => Sub::Many(Members::default()),
            };
            let _ = accept(Change::Removed { ty, name });
            return;
        }
        let Some((members, uid)) = member_of(subs, ty, name) else {
            self.stats.unwanted += 1;
            return;
        };
        if let Some(held) = members.forget(uid) {
            self.kept -= 1;
            if held {
                let _ = accept(Change::Removed { ty, name });
            }
        }
    }

    /// Reads the heads of a response; where one begins a full send, everything told from here on counts.
    fn begin(
        &mut self,
        ty: ResourceType,
        resources: &[Resource],
        receipt: &mut Receipt,
    ) -> Vec<(Arc<str>, CollectionHead)> {
        let mut heads = Vec::new();
        if ty != ResourceType::Endpoint {
            return heads;
        }
        for resource in resources.iter().filter(|resource| is_head(&resource.name)) {
            let subs = &mut self.types[ty.index()].subs;
            let of = resource.name.strip_suffix(HEAD).unwrap_or_default();
            let name: Arc<str> = format!("{of}*").into();
            let Some(Sub::Many(members)) = subs.get_mut(&name) else {
                self.stats.unwanted += 1;
                continue;
            };
            let body = match body(resource, COLLECTION_HEAD_TYPE_URL) {
                Ok(body) => CollectionHead::decode(body.clone()).map_err(|e| e.to_string()),
                Err(reason) => Err(reason),
            };
            let head = body.and_then(|head| {
                if head.epoch.len() > MAX_VERSION_LEN || head.epoch.contains('/') {
                    return Err("an epoch has at most 512 bytes and no '/'".to_owned());
                }
                Ok(head)
            });
            match head {
                Ok(head) => {
                    if head.begin {
                        members.round += 1;
                        members.phase = Phase::Filling;
                        members.cursor = None;
                    }
                    heads.push((name, head));
                }
                Err(reason) => receipt.rejected.push(rejected(resource, &reason)),
            }
        }
        heads
    }

    fn update(
        &mut self,
        ty: ResourceType,
        resource: &Resource,
        accept: &mut Accept<'_>,
    ) -> Result<(), String> {
        let name = &*resource.name;
        if ty == ResourceType::Endpoint && is_head(name) {
            return Ok(());
        }
        let full = self.kept >= MAX_RESOURCES;
        let subs = &mut self.types[ty.index()].subs;
        let body = body(resource, ty.type_url());
        let mut take = |known: bool| {
            let body = body.as_ref().map_err(Clone::clone)?;
            if full && !known {
                return Err(format!("{MAX_RESOURCES} resources are held already"));
            }
            accept(Change::Update { ty, name, version: &resource.version, body })
        };
        if let Some(Sub::One(held)) = subs.get_mut(name) {
            take(held.is_some())?;
            self.kept += usize::from(held.is_none());
            *held = Some(resource.version.as_str().into());
            return Ok(());
        }
        let Some((members, uid)) = member_of(subs, ty, name) else {
            // Unsubscribed while it was under way.
            self.stats.unwanted += 1;
            return Ok(());
        };
        let bytes = resource.resource.as_ref().map(|any| &any.value[..]).unwrap_or_default();
        let hash = member_hash(uid, bytes);
        let old = members.told.get(uid);
        if old.is_some_and(|member| member.hash == hash && !member.refused) {
            // A full send tells again what we hold.
            members.see(uid);
            return Ok(());
        }
        let known = old.is_some();
        let result = take(known);
        // What is refused is kept too, by its hash, unless there is no room for even that.
        if known || !full {
            self.kept += usize::from(!known);
            let version = result.is_ok().then(|| Arc::from(resource.version.as_str()));
            members.tell(uid, hash, version);
        }
        result
    }

    fn head(&mut self, collection: &str, head: &CollectionHead, accept: &mut Accept<'_>) {
        let ty = ResourceType::Endpoint;
        let state = &mut self.types[ty.index()];
        let Some(Sub::Many(members)) = state.subs.get_mut(collection) else { return };
        if head.complete && members.phase == Phase::Filling {
            let of = collection.strip_suffix('*').unwrap_or(collection);
            let untold = members.told.iter().filter(|(_, member)| member.round != members.round);
            for uid in untold.map(|(uid, _)| Arc::clone(uid)).collect::<Vec<_>>() {
                if let Some(held) = members.forget(&uid) {
                    self.kept -= 1;
                    if held {
                        let _ = accept(Change::Removed { ty, name: &format!("{of}{uid}") });
                    }
                }
            }
            members.phase = Phase::Following;
            members.whole = true;
            members.cursor = Some((head.epoch.as_str().into(), head.seq));
            // Asking again at once could go on for ever; the next periodic head finds the same.
            self.stats.mismatches += u64::from(!members.equals(head));
            let _ = accept(Change::CollectionComplete { collection });
        } else if !head.begin && !head.complete && members.phase == Phase::Following {
            if members.equals(head) {
                members.cursor = Some((head.epoch.as_str().into(), head.seq));
            } else {
                self.stats.mismatches += 1;
                state.refresh(collection);
            }
        }
    }
}

impl Type {
    /// The next request that (un)subscribes; as many names as fit.
    fn changes(&mut self, ty: ResourceType) -> Option<DeltaDiscoveryRequest> {
        let mut request =
            DeltaDiscoveryRequest { type_url: ty.type_url().to_owned(), ..DeltaDiscoveryRequest::default() };
        let mut len = 0;
        while len < MAX_REQUEST_LEN {
            let Some((name, again)) = self.dirty.pop_first() else { break };
            match self.subs.get(&name) {
                Some(sub) => {
                    if self.announced.contains(&name) && !again {
                        continue;
                    }
                    // Versions may only stand in the first request of a type; later names come in full.
                    if !self.started
                        && let Some(version) = sub.resume()
                    {
                        len += name.len() + version.len() + 16;
                        request.initial_resource_versions.insert(name.to_string(), version);
                    }
                    len += name.len() + 4;
                    request.resource_names_subscribe.push(name.to_string());
                    self.announced.insert(name);
                }
                None => {
                    if self.announced.remove(&name) {
                        len += name.len() + 4;
                        request.resource_names_unsubscribe.push(name.to_string());
                    }
                }
            }
        }
        if request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty() {
            return None;
        }
        self.started = true;
        Some(request)
    }

    fn refresh(&mut self, name: &str) {
        let Some((name, sub)) = self.subs.get_key_value(name) else { return };
        let name = Arc::clone(name);
        if let Sub::Many(_) = sub
            && let Some(Sub::Many(members)) = self.subs.get_mut(&name)
        {
            members.phase = Phase::Waiting;
            members.cursor = None;
        }
        self.dirty.insert(name, true);
    }
}

impl Sub {
    /// How many resources are kept for it.
    fn kept(&self) -> usize {
        match self {
            Self::One(version) => usize::from(version.is_some()),
            Self::Many(members) => members.told.len(),
        }
    }

    /// What to say that we hold.
    fn resume(&self) -> Option<String> {
        match self {
            Self::One(version) => version.as_ref().map(ToString::to_string),
            Self::Many(members) => members.cursor(),
        }
    }
}

impl Members {
    /// A refused member is one that the server must tell again: then there is nothing to resume from.
    fn cursor(&self) -> Option<String> {
        let (epoch, seq) = self.cursor.as_ref()?;
        let cursor = Cursor { epoch: Arc::clone(epoch), seq: *seq, set_hash: self.sum };
        (self.refused == 0).then(|| cursor.to_string())
    }

    fn equals(&self, head: &CollectionHead) -> bool {
        self.sum == head.set_hash && self.told.len() == head.count as usize
    }

    /// A member was told as it was.
    fn see(&mut self, uid: &str) {
        if let Some(member) = self.told.get_mut(uid) {
            member.round = self.round;
        }
    }

    /// A member was told; `None`: and refused.
    fn tell(&mut self, uid: &str, hash: u64, version: Option<Arc<str>>) {
        let old = self.told.remove(uid);
        let (old_hash, old_refused, old_held) =
            old.map_or((0, false, None), |member| (member.hash, member.refused, member.held));
        let refused = version.is_none();
        self.sum = self.sum.wrapping_sub(old_hash).wrapping_add(hash);
        self.refused = self.refused + usize::from(refused) - usize::from(old_refused);
        let member = Member { hash, round: self.round, held: version.or(old_held), refused };
        self.told.insert(uid.into(), member);
    }

    /// A member is gone. Says whether it was held; `None`: it was never told.
    fn forget(&mut self, uid: &str) -> Option<bool> {
        let member = self.told.remove(uid)?;
        self.sum = self.sum.wrapping_sub(member.hash);
        self.refused -= usize::from(member.refused);
        Some(member.held.is_some())
    }
}

/// The collection that a member's name belongs to, and its uid.
fn member_of<'a, 'n>(
    subs: &'a mut BTreeMap<Arc<str>, Sub>,
    ty: ResourceType,
    name: &'n str,
) -> Option<(&'a mut Members, &'n str)> {
    if ty != ResourceType::Endpoint {
        return None;
    }
    let (of, uid) = name.rsplit_once('/')?;
    match subs.get_mut(&*format!("{of}/*"))? {
        Sub::Many(members) if !uid.is_empty() && uid != "*" => Some((members, uid)),
        Sub::Many(_) | Sub::One(_) => None,
    }
}

fn is_head(name: &str) -> bool {
    name.rsplit_once('/').is_some_and(|(_, member)| member == HEAD)
}

/// Why a response cannot be taken at all.
fn refuse(response: &DeltaDiscoveryResponse) -> Option<String> {
    let len = response.encoded_len();
    if len > MAX_MESSAGE_LEN {
        return Some(format!("the message has {len} bytes; at most {MAX_MESSAGE_LEN} are taken"));
    }
    let count = response.resources.len() + response.removed_resources.len();
    if count > MAX_RESOURCES {
        return Some(format!("the message has {count} resources; at most {MAX_RESOURCES} are taken"));
    }
    let mut seen = HashSet::with_capacity(count);
    let updated = response.resources.iter().map(|resource| &resource.name);
    for name in updated.chain(&response.removed_resources) {
        if name.is_empty() || name.len() > MAX_NAME_LEN {
            return Some(format!(
                "a resource's name has {} bytes; 1 to {MAX_NAME_LEN} are taken",
                name.len()
            ));
        }
        if !seen.insert(name.as_str()) {
            return Some(format!("{name:?} is there twice; a message names a resource once"));
        }
    }
    None
}

/// The bytes of a resource, if they are of that type and not too many.
fn body<'a>(resource: &'a Resource, type_url: &str) -> Result<&'a Bytes, String> {
    let Some(any) = &resource.resource else { return Err("the resource has no body".to_owned()) };
    if any.type_url != type_url {
        let got: String = any.type_url.chars().take(100).collect();
        return Err(format!("the resource is a {got:?}, not a {type_url:?}"));
    }
    if any.value.len() > MAX_RESOURCE_LEN {
        return Err(format!(
            "the resource has {} bytes; at most {MAX_RESOURCE_LEN} are taken",
            any.value.len()
        ));
    }
    if resource.version.len() > MAX_VERSION_LEN {
        let len = resource.version.len();
        return Err(format!("the version has {len} bytes; at most {MAX_VERSION_LEN} are taken"));
    }
    Ok(&any.value)
}

fn rejected(resource: &Resource, reason: &str) -> RejectedResource {
    RejectedResource {
        name: resource.name.clone(),
        version: resource.version.chars().take(MAX_VERSION_LEN).collect(),
        reason: reason.chars().take(MAX_REASON_LEN).collect(),
    }
}

/// The NACK of a response; `None`: it is an ACK.
fn error(receipt: &Receipt) -> Option<Status> {
    let message = match (&receipt.refused, receipt.rejected.first()) {
        (Some(refused), _) => refused.clone(),
        (None, Some(first)) => {
            format!("{} resources rejected; first {}: {}", receipt.rejected.len(), first.name, first.reason)
        }
        (None, None) => return None,
    };
    let details = receipt.rejected.iter().take(MAX_REJECTED);
    Some(Status {
        code: INVALID_ARGUMENT,
        message: message.chars().take(2 * MAX_REASON_LEN).collect(),
        details: details
            .map(|rejected| Any {
                type_url: REJECTED_TYPE_URL.to_owned(),
                value: rejected.encode_to_vec().into(),
            })
            .collect(),
    })
}
