//! What every part of a report is held to: it comes from outside.
//!
//! Why texts are cut and lists shortened, and no report is refused for them: what a sidecar says beside its one endless
//! name still counts.

use std::{collections::HashMap, time::Duration};

use weft_core::identity::SpiffeId;

/// A text, no longer than one may be.
pub(super) fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let mut end = MAX_TEXT;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        // The rest must not stay allocated behind what is kept.
        text.shrink_to_fit();
    }
    text
}

/// Takes one from a workload's share.
pub(super) fn less_one(counts: &mut HashMap<SpiffeId, usize>, of: &SpiffeId) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

/// Whether a time is not longer ago than something is kept.
pub(super) fn is_recent(at_ms: u64, now_ms: u64, kept: Duration) -> bool {
    now_ms.saturating_sub(at_ms) < u64::try_from(kept.as_millis()).unwrap_or(u64::MAX)
}

/// One text of a report; longer ones are cut.
pub(super) const MAX_TEXT: usize = 512;
/// Items of one list in one report.
pub(super) const MAX_ITEMS: usize = 20_000;
/// The name under which everything above a cap is counted.
pub const OVERFLOW: &str = "(overflow)";
