//! One request or connection as telemetry sees it: recorded exactly once, whatever happens.
//!
//! Why a guard: a request has a dozen exits. `finish` consumes the record; a path that forgets it (the app
//! went away, a task was dropped) is recorded by `Drop` as cancelled, so no exit can go uncounted.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use weft_core::{balance::Ejection, classify::Class};

use super::{
    metrics::Counter,
    recorder::{Edge, Recorder, Series},
};
use crate::clock::now;

/// The record of one exchange.
pub(crate) struct Exchange {
    recorder: Recorder,
    series: Option<Rc<Series>>,
    /// Who calls whom.
    edge: Option<Rc<Edge>>,
    started: Instant,
    first_byte: Option<Duration>,
    retries: u32,
    done: bool,
}

impl Exchange {
    /// Starts the clock.
    pub(crate) fn start(recorder: &Recorder, now: Instant) -> Self {
        Self {
            recorder: recorder.clone(),
            series: None,
            edge: None,
            started: now,
            first_byte: None,
            retries: 0,
            done: false,
        }
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Says where it belongs; the last call counts.
    pub(crate) fn belongs_to(&mut self, series: Rc<Series>) {
        self.series = Some(series);
    }

    pub(crate) fn has_series(&self) -> bool {
        self.series.is_some()
    }

    /// Says whose call it is, and counts it.
    pub(crate) fn is_of(&mut self, edge: Rc<Edge>) {
        edge.request();
        self.edge = Some(edge);
    }

    /// Moves the record on to whoever ends it; what stays behind records nothing.
    pub(crate) fn take(&mut self, now: Instant) -> Self {
        let mut rest = Self::start(&self.recorder, now);
        rest.done = true;
        std::mem::replace(self, rest)
    }

    pub(crate) fn retried(&mut self) {
        self.retries += 1;
    }

    /// The first byte of the answer's body (or its end, if it has none).
    pub(crate) fn first_byte(&mut self, now: Instant) {
        self.first_byte.get_or_insert(now.saturating_duration_since(self.started));
    }

    /// Counts what a lease's end brought about.
    pub(crate) fn settled(&self, ejection: Option<Ejection>) {
        if let Some(ejection) = ejection {
            self.recorder.count(Counter::Ejections);
            tracing::warn!(endpoint = %ejection.endpoint.address, uid = %ejection.endpoint.uid,
                reason = ?ejection.reason, for_ms = ejection.until.saturating_duration_since(now()).as_millis() as u64, "endpoint ejected");
        }
    }

    /// Records it.
    pub(crate) fn finish(mut self, class: Class, now: Instant) {
        self.record(class, now);
    }

    /// Forgets it: what it was started for goes on as another exchange.
    pub(crate) fn discard(mut self) {
        self.done = true;
    }

    fn record(&mut self, class: Class, now: Instant) {
        self.done = true;
        if let Some(series) = self.series.take() {
            let full = now.saturating_duration_since(self.started);
            series.record(class, self.first_byte, full, self.retries);
        }
        let failed = match class {
            Class::Ok | Class::ClientError => false,
            Class::ServerError | Class::Proxy => true,
        };
        if let Some(edge) = self.edge.take().filter(|_| failed) {
            edge.error();
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.done {
            // The caller went away: its own doing, as far as anybody here can tell.
            self.record(Class::ClientError, now());
        }
    }
}
