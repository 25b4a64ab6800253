//! What time it is: on the data path, and where certificates are judged.
//!
//! Why certificates are not judged by the wall clock alone: a node whose clock is set back by an hour finds every fresh certificate "not yet
//! valid", its own included, and is cut off until somebody looks. But the issuer has said what time it was when it
//! issued ours, and since then the machine has counted. Why the later of the two and not the issuer's time alone: a
//! machine that slept has counted too little, and nothing may live longer than its wall clock allows.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustls_pki_types::UnixTime;

/// The clock of the data path: tokio's, so that a paused test clock also moves the core.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What the issuer's clock said, and when it said so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    issuer: UnixTime,
    heard: Instant,
}

impl Clock {
    /// The issuer has just said what time it is.
    pub(crate) fn heard(issuer: UnixTime) -> Self {
        Self { issuer, heard: now() }
    }

    /// Now.
    pub(crate) fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.at_least(UnixTime::now()).as_secs())
    }

    /// Now, if the wall clock says `wall`.
    pub(crate) fn at_least(&self, wall: UnixTime) -> UnixTime {
        let passed = tokio::time::Instant::now().into_std().saturating_duration_since(self.heard);
        let issuer = self.issuer.as_secs().saturating_add(passed.as_secs());
        UnixTime::since_unix_epoch(Duration::from_secs(issuer.max(wall.as_secs())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_clock_set_back_changes_nothing_and_one_set_forward_counts() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let clock = Clock::heard(at(10_000));
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(clock.at_least(at(10_100 - 3_600)).as_secs(), 10_100);
        assert_eq!(clock.at_least(at(10_100 + 3_600)).as_secs(), 13_700);
    }
}
