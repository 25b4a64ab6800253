//! Everything that can be sent, as immutable maps that readers never wait for.
//!
//! Why shards behind `ArcSwap`: a publish replaces the few shards that it touches and a lookup takes no
//! lock, so subscribing and publishing cannot hold each other up (the death spirals of other meshes).

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::sync::watch;
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::{Service, ServiceName},
};
use weft_proto::{
    ads::{Collection, ResourceType, Source, Versioned},
    names::Name,
    pb::v1,
};

use super::{subscribers::Subscribers, tls::Peer};
use crate::index::{hash, outbound::PodAddress};

/// One published resource.
#[derive(Clone, Debug)]
pub struct Resource {
    /// What is sent.
    pub versioned: Versioned,
    /// When this version was published, in milliseconds since 1970.
    pub since_ms: u64,
}

/// Everything that is published.
#[derive(Debug)]
pub struct Published {
    /// By full name.
    pub(super) resources: Sharded<Arc<str>, Resource>,
    /// By `ep/…/*`.
    pub(super) collections: Sharded<Arc<str>, Collection>,
    /// Pods by their own address.
    pub(super) addresses: Sharded<IpAddr, Arc<PodAddress>>,
    /// What callers of one namespace are told instead, by namespace and then by full name.
    pub(super) consumers: Sharded<Arc<str>, Arc<HashMap<Arc<str>, Resource>>>,
    /// Workloads' identities: a certificate for a pod uid alone does not open that pod's settings.
    pub(super) workloads: Sharded<PodUid, SpiffeId>,
    /// Who is subscribed.
    pub subscribers: Subscribers,
    trust_domain: TrustDomain,
    synced: watch::Sender<bool>,
}

impl Published {
    /// Nothing yet.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            resources: Sharded::new(),
            collections: Sharded::new(),
            addresses: Sharded::new(),
            consumers: Sharded::new(),
            workloads: Sharded::new(),
            subscribers: Subscribers::default(),
            trust_domain,
            synced: watch::Sender::new(false),
        }
    }

    /// Whether the source has listed once. Before, no stream is answered: an empty answer is an outage.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// The source has listed.
    pub fn set_synced(&self) {
        self.synced.send_replace(true);
    }

    /// How many resources there are, collections included.
    pub fn len(&self) -> usize {
        let consumers: usize = self.consumers.values().iter().map(|own| own.len()).sum();
        self.resources.len() + self.collections.len() + consumers
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The current version of a name.
    pub fn resource(&self, name: &str) -> Option<Resource> {
        self.resources.get(name)
    }

    /// Whether a peer is a pod that there is, under the service account that it has. Nobody is refused before
    /// everything is known.
    ///
    /// # Errors
    /// The pod is gone, or somebody else's.
    pub fn admit(&self, peer: &Peer) -> Result<(), tonic::Status> {
        if !*self.synced.borrow() {
            return Ok(());
        }
        match self.workload(&peer.uid) {
            Some(identity) if identity == peer.identity => Ok(()),
            Some(_) => Err(tonic::Status::permission_denied("the pod has another service account")),
            None => Err(tonic::Status::permission_denied(NO_POD)),
        }
    }

    /// A workload's identity.
    pub fn workload(&self, uid: &PodUid) -> Option<SpiffeId> {
        self.workloads.get(uid)
    }

    /// The current version of a name as a namespace is told it: its consumer routes have made another of it.
    pub fn resource_for(&self, name: &str, namespace: &str) -> Option<Resource> {
        let own = self.consumers.get(namespace);
        own.and_then(|own| own.get(name).cloned()).or_else(|| self.resource(name))
    }

    /// The current version of a name as a pod is told it.
    pub fn resource_for_pod(&self, name: &str, pod: &PodUid) -> Option<Resource> {
        match self.workload(pod) {
            Some(identity) => self.resource_for(name, identity.namespace()),
            None => self.resource(name),
        }
    }

    /// A name as a namespace is told it, however it is spelt.
    pub fn lookup(&self, name: &str, namespace: &str) -> Option<Versioned> {
        if let Some(resource) = self.resource_for(name, namespace) {
            return Some(resource.versioned);
        }
        match name.parse().ok()? {
            Name::Address(address) => self.pod(address),
            Name::Host(authority) => {
                let service = Name::Service(self.host(&authority)?).to_string();
                Some(self.resource_for(&service, namespace)?.versioned)
            }
            Name::Service(_)
            | Name::Route(_)
            | Name::Collection(_)
            | Name::Endpoint(..)
            | Name::Head(_)
            | Name::Authorization(..)
            | Name::TrustBundle(_)
            | Name::Workload(_) => None,
        }
    }

    /// The service that a host means: `<name>.<namespace>[.svc[.<trust domain>]][:<port>]`.
    pub fn host(&self, authority: &str) -> Option<ServiceName> {
        let (host, port) = authority.split_once(':').unwrap_or((authority, "80"));
        let domain = format!(".svc.{}", self.trust_domain);
        let host = host.strip_suffix(&domain).or_else(|| host.strip_suffix(".svc")).unwrap_or(host);
        let (name, namespace) = host.split_once('.').filter(|(_, namespace)| !namespace.contains('.'))?;
        Some(ServiceName { namespace: namespace.into(), name: name.into(), port: port.parse().ok()? })
    }

    /// A pod's port is made when it is asked for: there are 65,535 of them.
    fn pod(&self, address: SocketAddr) -> Option<Versioned> {
        let pod = self.addresses.get(&address.ip())?;
        let (body, hash) = encode_service(&pod.service(address.port()));
        Some(Versioned { version: pod.meta().version(hash).into(), body })
    }
}

/// What one subscriber may see. "Not allowed" looks exactly like "not there".
#[derive(Debug)]
pub struct View<'a> {
    published: &'a Published,
    peer: &'a Peer,
}

impl<'a> View<'a> {
    /// As `peer` sees it.
    pub fn new(published: &'a Published, peer: &'a Peer) -> Self {
        Self { published, peer }
    }

    fn is_own(&self, uid: &PodUid) -> bool {
        *uid == self.peer.uid && self.published.workload(uid).as_ref() == Some(&self.peer.identity)
    }
}

impl Source for View<'_> {
    fn lookup(&self, ty: ResourceType, name: &str) -> Option<Versioned> {
        let allowed = match ty {
            ResourceType::Authorization | ResourceType::WorkloadConfig => match name.parse() {
                Ok(Name::Authorization(uid, _) | Name::Workload(uid)) => self.is_own(&uid),
                Ok(_) | Err(_) => false,
            },
            ResourceType::Service => {
                name.starts_with("svc/") || name.starts_with("ip/") || name.starts_with("host/")
            }
            ResourceType::Route => name.starts_with("route/"),
            ResourceType::TrustBundle => name.starts_with("trust/"),
            ResourceType::Endpoint => false,
        };
        if allowed { self.published.lookup(name, self.peer.identity.namespace()) } else { None }
    }

    fn collection(&self, name: &str) -> Option<Collection> {
        self.published.collections.get(name)
    }
}

/// A map that is read without locks and changed shard by shard.
#[derive(Debug)]
pub(super) struct Sharded<K, V>(Vec<ArcSwap<HashMap<K, V>>>);

impl<K: Eq + Hash + Clone + AsKey, V: Clone> Sharded<K, V> {
    fn new() -> Self {
        Self((0..SHARDS).map(|_| ArcSwap::default()).collect())
    }

    pub(super) fn get<Q>(&self, key: &Q) -> Option<V>
    where
        K: std::borrow::Borrow<Q>,
        Q: Eq + Hash + AsKey + ?Sized,
    {
        self.0[shard(key)].load().get(key).cloned()
    }

    /// Sets and removes. One writer at a time: the publisher.
    pub(super) fn update(&self, changes: impl IntoIterator<Item = (K, Option<V>)>) {
        let mut touched: HashMap<usize, HashMap<K, V>> = HashMap::new();
        for (key, value) in changes {
            let index = shard(&key);
            let map = touched.entry(index).or_insert_with(|| HashMap::clone(&self.0[index].load()));
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        for (index, map) in touched {
            self.0[index].store(Arc::new(map));
        }
    }

    pub(super) fn values(&self) -> Vec<V> {
        self.0.iter().flat_map(|shard| shard.load().values().cloned().collect::<Vec<_>>()).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.0.iter().map(|shard| shard.load().len()).sum()
    }
}

/// What a key's shard is taken from.
pub(super) trait AsKey {
    fn key_hash(&self) -> u64;
}

impl AsKey for str {
    fn key_hash(&self) -> u64 {
        hash(self.as_bytes())
    }
}

impl AsKey for Arc<str> {
    fn key_hash(&self) -> u64 {
        hash(self.as_bytes())
    }
}

impl AsKey for PodUid {
    fn key_hash(&self) -> u64 {
        hash(self.as_str().as_bytes())
    }
}

impl AsKey for IpAddr {
    fn key_hash(&self) -> u64 {
        match self {
            Self::V4(v4) => hash(&v4.octets()),
            Self::V6(v6) => hash(&v6.octets()),
        }
    }
}

fn shard<Q: AsKey + ?Sized>(key: &Q) -> usize {
    // Cannot overflow: the remainder is below the number of shards.
    usize::try_from(key.key_hash() % SHARDS).unwrap_or(0)
}

/// A service's encoding and what its version is made of.
pub(super) fn encode_service(service: &Service) -> (Bytes, u64) {
    let body = encode(&v1::Service::from(service));
    let hash = hash(&body);
    (body, hash)
}

pub(super) fn encode(message: &impl prost::Message) -> Bytes {
    message.encode_to_vec().into()
}

/// What somebody hears whose pod is gone, or not there yet.
pub(super) const NO_POD: &str = "there is no such pod";
/// A change clones a shard: with half a million names 1,024 of them keep that at some hundred, and a cold start that
/// publishes one by one at seconds.
const SHARDS: u64 = 1_024;
