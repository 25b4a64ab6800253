//! The issuer in a Secret, and the trust anchors in a ConfigMap of every namespace that has sidecars.
//!
//! Why whoever comes first makes the Secret: replicas start together, and the API server lets one of them create
//! it; the others read what that one made. A Secret that is there is used as it is, be it ours or in the layout of
//! `kubernetes.io/tls`. Every replica follows it and signs; a step of a rotation is a write that names the version
//! it is based on, so that two at once are one after the other.
//!
//! Why trust anchors are written when a pod is admitted, too: a kubelet that does not find what it should mount tries
//! again later and later. The webhook is asked before the pod is stored, so whoever starts first in a namespace finds
//! them. Who else watches (labels, pods) comes a moment after that, and mends what was removed.
//!
//! Why a namespace belongs to one mesh: pods mount one ConfigMap of that name. Two installations would replace each
//! other's anchors for ever, and each time cut off the other's sidecars; whoever was there first stays.
//!
//! Why the last good roots stay: a Secret that is deleted or spoilt must not end a mesh that runs. It is said, loudly.
//! What was spoilt is left to whoever did it. What is gone is put back: the cluster removes it with the ClusterRole that
//! owns it, which may have been made anew under a mesh that runs, and a controller that starts then would make another
//! authority. An installation that is removed has no right to put anything back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, ObjectReference, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::{
        events::{Event, EventType, Recorder, Reporter},
        watcher,
    },
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use weft_core::identity::TrustDomain;
use zeroize::Zeroizing;

use super::{
    owner::{self, Owner},
    watch::is_expired,
};
use crate::{
    ca::{Bundle, Ca, CaError, Files, Place, RootKeeper, Roots, RotateRoot},
    resources::{CONTROL_NAMESPACE, INJECT, TRUST_CONFIG_MAP, TRUST_KEY, lookup},
};

/// The roots of a cluster, where they are kept.
#[derive(Clone)]
pub struct ClusterRoots {
    secrets: Api<Secret>,
    client: Client,
    name: String,
    trust_domain: TrustDomain,
    owner: Owner,
    /// Where the anchors stand, which, and since when that is known.
    published: Arc<Mutex<BTreeMap<Arc<str>, Stands>>>,
    /// Namespaces of other installations, which were told so.
    told: Arc<Mutex<BTreeSet<Arc<str>>>>,
}

/// A hash of what stands somewhere, and since when that is known.
type Stands = (u64, Instant);

impl ClusterRoots {
    /// Loads the authority of a Secret, or makes one. Waits for an API server that does not answer.
    ///
    /// # Errors
    /// A Secret that is there and cannot be used, or that may not be read or made.
    pub async fn open(
        client: Client,
        name: &str,
        owner: Owner,
        trust_domain: TrustDomain,
        lifetime: Duration,
    ) -> anyhow::Result<(Arc<Self>, Ca)> {
        let secrets = Api::namespaced(client.clone(), CONTROL_NAMESPACE);
        let own = Self {
            secrets,
            client,
            name: name.to_owned(),
            trust_domain: trust_domain.clone(),
            owner,
            published: Arc::default(),
            told: Arc::default(),
        };
        let roots = loop {
            match own.change(|_| Ok(())).await {
                Ok(roots) => break roots,
                Err(Failed::Api(error)) if !super::is_refusal(&error) => {
                    tracing::warn!(%error, "the issuer's Secret cannot be read yet");
                    sleep(RETRY).await;
                }
                Err(failed) => {
                    return Err(failed).with_context(|| format!("Secret {CONTROL_NAMESPACE}/{name}"));
                }
            }
        };
        Ok((Arc::new(own), Ca::with_roots(roots, trust_domain, lifetime)))
    }

    /// Reads, changes and writes; begins again if somebody else wrote meanwhile.
    async fn change(&self, change: impl Fn(&mut Roots) -> Result<(), CaError>) -> Result<Roots, Failed> {
        let mut again = 0;
        loop {
            let mut found = self.secrets.get_opt(&self.name).await?;
            let adopted = found.as_mut().is_some_and(|secret| {
                owner::is_ours(&secret.metadata)
                    && owner::adopt(&mut secret.metadata, self.owner.now().as_ref())
            });
            let before = found.as_ref().map(files).unwrap_or_default();
            let mut roots = Roots::open_in(Place::Memory(before.clone()), &self.trust_domain)?;
            change(&mut roots)?;
            let after = roots.files().cloned().unwrap_or_default();
            if after == before && !adopted {
                return Ok(roots);
            }
            let data = after.iter().map(|(name, bytes)| (name.clone(), ByteString(bytes.to_vec()))).collect();
            let written = match found {
                Some(secret) => {
                    let secret = Secret { data: Some(data), ..secret };
                    self.secrets.replace(&self.name, &PostParams::default(), &secret).await
                }
                None => self.secrets.create(&PostParams::default(), &self.secret(data)).await,
            };
            match written {
                Ok(_) => return Ok(roots),
                // Somebody else was first: what they wrote counts.
                Err(kube::Error::Api(status)) if status.code == 409 && again < CONFLICTS => again += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn secret(&self, data: BTreeMap<String, ByteString>) -> Secret {
        Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                namespace: Some(CONTROL_NAMESPACE.to_owned()),
                labels: Some(owner::labels()),
                owner_references: self.owner.now().map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            data: Some(data),
            type_: Some("Opaque".to_owned()),
            ..Secret::default()
        }
    }

    /// Makes the Secret again from what is in force here.
    async fn put_back(&self, ca: &Ca) {
        let Some(files) = ca.made() else {
            tracing::error!(secret = self.name, "the supplied issuer is gone: it stays in force here");
            return;
        };
        let data: BTreeMap<_, _> =
            files.iter().map(|(name, bytes)| (name.clone(), ByteString(bytes.to_vec()))).collect();
        for _ in 0..PUT_BACK {
            if let Err(error) = self.owner.look().await {
                tracing::debug!(%error, "the cluster role cannot be read");
            }
            match self.secrets.create(&PostParams::default(), &self.secret(data.clone())).await {
                Ok(_) => {
                    tracing::error!(secret = self.name, "the issuer's Secret was gone, and is put back");
                    return;
                }
                // Somebody else did.
                Err(kube::Error::Api(status)) if status.code == 409 => return,
                Err(error) => {
                    tracing::error!(%error, secret = self.name, "the issuer's Secret is gone and cannot be put back: what it held stays in force here, but a controller that starts makes a new authority");
                    if super::is_refusal(&error) {
                        return;
                    }
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// Follows the Secret, for ever.
    pub async fn follow(self: Arc<Self>, ca: Arc<Ca>) {
        let config =
            watcher::Config::default().fields(&format!("metadata.name={}", self.name)).timeout(WATCH_SECONDS);
        let mut events = std::pin::pin!(watcher(self.secrets.clone(), config.clone()));
        let (mut known, mut listed) = (None, false);
        while let Some(event) = events.next().await {
            listed |= matches!(&event, Ok(watcher::Event::InitApply(_)));
            let secret = match event {
                Ok(watcher::Event::Apply(secret) | watcher::Event::InitApply(secret)) => secret,
                Ok(watcher::Event::Delete(_)) => {
                    self.put_back(&ca).await;
                    continue;
                }
                Ok(watcher::Event::Init) => {
                    listed = false;
                    continue;
                }
                Ok(watcher::Event::InitDone) => {
                    if !listed {
                        self.put_back(&ca).await;
                    }
                    continue;
                }
                Err(error) => {
                    tracing::debug!(%error, "the issuer's Secret cannot be watched");
                    sleep(RETRY).await;
                    if is_expired(&error) {
                        events.set(watcher(self.secrets.clone(), config.clone()));
                    }
                    continue;
                }
            };
            let files = files(&secret);
            if known.as_ref() == Some(&files) || files.is_empty() {
                continue;
            }
            match Roots::open_in(Place::Memory(files.clone()), &self.trust_domain) {
                Ok(roots) => ca.replace(roots),
                Err(error) => {
                    tracing::error!(%error, "the issuer's Secret cannot be used: what it held before stays in force");
                }
            }
            known = Some(files);
        }
    }

    /// Keeps the trust anchors in every namespace of `injected`, for ever.
    pub async fn publish(self: Arc<Self>, ca: Arc<Ca>, mut injected: watch::Receiver<BTreeSet<Arc<str>>>) {
        let (mut bundle, mut owners) = (ca.bundle(), self.owner.changes());
        let mut look = tokio::time::interval(REPAIR);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = bundle.changed() => if changed.is_err() { return },
                changed = injected.changed() => if changed.is_err() { return },
                // What names the owner that is gone is about to be removed.
                changed = owners.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    lock(&self.published).clear();
                }
                // Somebody may have changed or removed it, or it could not be written.
                _ = look.tick() => {
                    lock(&self.published).clear();
                    if let Err(error) = self.owner.look().await {
                        tracing::debug!(%error, "the cluster role cannot be read");
                    }
                }
            }
            owners.mark_unchanged();
            bundle.borrow_and_update();
            let namespaces = injected.borrow_and_update().clone();
            lock(&self.published).retain(|namespace, _| namespaces.contains(namespace));
            lock(&self.told).retain(|namespace| namespaces.contains(namespace));
            for namespace in namespaces {
                self.ensure(&ca, &namespace, None).await;
            }
        }
    }

    /// Sees to it that the trust anchors stand in a namespace, unless it was so `lately`.
    pub async fn ensure(&self, ca: &Ca, namespace: &str, lately: Option<Duration>) {
        let (sequence, anchors) = (ca.bundle().borrow().sequence, ca.anchors());
        let hash = crate::index::hash(anchors.as_bytes());
        let known = lock(&self.published).get(namespace).copied();
        let is_good = |since: Instant| lately.is_none_or(|lately| since.elapsed() < lately);
        if known.is_some_and(|(there, since)| there == hash && is_good(since)) {
            return;
        }
        match self.publish_in(namespace, sequence, &anchors).await {
            Ok(()) => {
                lock(&self.published).insert(namespace.into(), (hash, Instant::now()));
                lock(&self.told).remove(namespace);
            }
            Err(error) => {
                tracing::warn!(%error, %namespace, "the trust anchors cannot be published");
                let is_new = matches!(error, NotPublished::Foreign(_)) && {
                    let mut told = lock(&self.told);
                    told.len() < MAX_TOLD && told.insert(namespace.into())
                };
                if is_new {
                    self.tell(namespace, &error).await;
                }
            }
        }
    }

    async fn publish_in(&self, namespace: &str, sequence: u64, anchors: &str) -> Result<(), NotPublished> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        if let Some(mut there) = maps.get_opt(TRUST_CONFIG_MAP).await? {
            let installation = lookup(&there.metadata.annotations, INSTALLATION);
            if let Some(other) = installation.filter(|other| *other != CONTROL_NAMESPACE) {
                return Err(NotPublished::Foreign(other.chars().take(MAX_NAMESPACE).collect()));
            }
            let claimed = installation.is_some();
            let adopted = owner::adopt(&mut there.metadata, self.owner.now().as_ref());
            let said = lookup(&there.metadata.annotations, SEQUENCE);
            let newer = said.and_then(|text| text.parse().ok()).is_some_and(|there: u64| there > sequence);
            let text = there.data.as_ref().and_then(|data| data.get(TRUST_KEY)).map_or("", String::as_str);
            // A replica that has not heard of a rotation yet must not take it back. Anchors of which none is ours are
            // those of another authority, one that is gone: they must not keep ours away.
            let akin = anchors.split_inclusive(END).any(|anchor| text.contains(anchor));
            if (newer && akin) || (text == anchors && claimed && !adopted) {
                return Ok(());
            }
        }
        let annotations = [
            (SEQUENCE.to_owned(), sequence.to_string()),
            (INSTALLATION.to_owned(), CONTROL_NAMESPACE.to_owned()),
        ];
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(TRUST_CONFIG_MAP.to_owned()),
                namespace: Some(namespace.to_owned()),
                labels: Some(owner::labels()),
                annotations: Some(annotations.into()),
                owner_references: self.owner.now().map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            data: Some([(TRUST_KEY.to_owned(), anchors.to_owned())].into()),
            ..ConfigMap::default()
        };
        maps.patch(TRUST_CONFIG_MAP, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map)).await?;
        Ok(())
    }

    /// An event where the namespace's owner looks.
    async fn tell(&self, namespace: &str, error: &NotPublished) {
        let reporter = Reporter { controller: "weft-controller".to_owned(), instance: None };
        let event = Event {
            type_: EventType::Warning,
            reason: "OtherInstallation".to_owned(),
            note: Some(error.to_string()),
            action: "Publish".to_owned(),
            secondary: None,
        };
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("ConfigMap".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(TRUST_CONFIG_MAP.to_owned()),
            ..ObjectReference::default()
        };
        if let Err(error) = Recorder::new(self.client.clone(), reporter).publish(&event, &about).await {
            tracing::debug!(%error, "an event cannot be written");
        }
    }
}

#[tonic::async_trait]
impl RootKeeper for ClusterRoots {
    async fn rotate(&self, ca: &Ca, step: Option<RotateRoot>) -> Result<Bundle, CaError> {
        let change = |roots: &mut Roots| roots.step(step, &self.trust_domain);
        let roots = self.change(change).await.map_err(|failed| match failed {
            Failed::Ca(error) => error,
            Failed::Api(error) => {
                CaError::Rotation(format!("the issuer's Secret cannot be written: {error}"))
            }
        })?;
        let bundle = roots.bundle();
        ca.replace(roots);
        Ok(bundle)
    }
}

impl std::fmt::Debug for ClusterRoots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterRoots").field("secret", &self.name).finish_non_exhaustive()
    }
}

/// Why the anchors do not stand in a namespace.
#[derive(Debug, thiserror::Error)]
enum NotPublished {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(
        "ConfigMap {TRUST_CONFIG_MAP} here is of the Weft in namespace {0}: a namespace belongs to one mesh. Take the label \
         {INJECT} and Weft's pods away from this namespace, or uninstall that Weft and delete the ConfigMap"
    )]
    Foreign(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why the Secret could not be read or changed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Ca(#[from] CaError),
}

fn files(secret: &Secret) -> Files {
    let data = secret.data.iter().flatten();
    data.map(|(name, bytes)| (name.clone(), Zeroizing::new(bytes.0.clone()))).collect()
}

/// What ends each of them.
const END: &str = "-----END CERTIFICATE-----\n";
const SEQUENCE: &str = "weft.dev/trust-sequence";
/// The namespace of the controller that wrote it.
pub const INSTALLATION: &str = "weft.dev/controller-namespace";
/// Of a name; what is longer is none.
const MAX_NAMESPACE: usize = 63;
/// Namespaces that are remembered as told.
const MAX_TOLD: usize = 10_000;
/// Of server-side apply.
pub(crate) const MANAGER: &str = "weft";
const CONFLICTS: u32 = 20;
/// Tries.
const PUT_BACK: u32 = 60;
const RETRY: Duration = Duration::from_secs(1);
const REPAIR: Duration = Duration::from_secs(60);
const WATCH_SECONDS: u32 = 60;
