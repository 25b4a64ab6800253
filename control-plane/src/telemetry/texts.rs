//! What many sidecars say alike, kept once.
//!
//! Why: ten thousand sidecars name the same few thousand resources, versions and endpoints. Each with texts of its own
//! these were half of all memory.

use std::{collections::HashSet, sync::Arc};

use weft_proto::pb::v1 as pb;

use super::bounds::cut;

/// Kept as long as anybody says it, and until the next [`Texts::tidy`].
#[derive(Default)]
pub(super) struct Texts {
    texts: HashSet<Arc<str>>,
    endpoints: HashSet<Arc<EndpointName>>,
}

/// Which endpoint.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct EndpointName {
    pub(super) backend: String,
    pub(super) uid: String,
    pub(super) address: String,
}

impl EndpointName {
    /// Bytes of it.
    pub(super) fn len(&self) -> usize {
        self.backend.len() + self.uid.len() + self.address.len()
    }
}

impl Texts {
    /// A text as it is kept.
    pub(super) fn keep(&mut self, text: String) -> Arc<str> {
        let text = cut(text);
        if let Some(kept) = self.texts.get(&*text) {
            return kept.clone();
        }
        let kept: Arc<str> = text.into();
        self.texts.insert(kept.clone());
        kept
    }

    /// An endpoint's name as it is kept.
    pub(super) fn keep_endpoint(&mut self, endpoint: &mut pb::EndpointState) -> Arc<EndpointName> {
        let take = |text: &mut String| cut(std::mem::take(text));
        let name = EndpointName {
            backend: take(&mut endpoint.backend),
            uid: take(&mut endpoint.uid),
            address: take(&mut endpoint.address),
        };
        if let Some(kept) = self.endpoints.get(&name) {
            return kept.clone();
        }
        let kept = Arc::new(name);
        self.endpoints.insert(kept.clone());
        kept
    }

    /// A text that somebody has said; `None`: nobody.
    pub(super) fn known(&self, text: &str) -> Option<Arc<str>> {
        self.texts.get(text).cloned()
    }

    /// Forgets what nobody says any more.
    pub(super) fn tidy(&mut self) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.endpoints.retain(|name| Arc::strong_count(name) > 1);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.texts.len() + self.endpoints.len()
    }
}
