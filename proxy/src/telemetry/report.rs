//! The telemetry stream: what is live, what was refused, and what was counted.
//!
//! Why reports are numbered: a report that was sent and not confirmed is sent again, unchanged, after a
//! reconnect; the controller counts a (session, sequence) once. While nobody listens nothing is lost
//! either: numbers go on being merged where they are (exactly, in bounded space), and only what cannot be
//! merged (decision records) gives way, oldest first, counted.
//!
//! Why `Applied` does not wait for the next report: "applied N/M" is how people learn that a change is
//! live. It leaves at once; after a reconnect the whole state is told again, because the controller that
//! answers may never have heard of it.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::RngCore as _;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tonic::transport::Channel;
use tracing::debug;
use weft_core::backoff::full_jitter;
use weft_proto::pb::v1::{self as pb, telemetry_client::TelemetryClient};

use super::{
    metrics::Gauge,
    process::Process,
    registry::{Registry, ReportDelta},
};
use crate::config::Config;

/// Takes what is live and what was refused; the reporter sends it. Cheap to clone, for any thread.
#[derive(Clone, Default)]
pub struct Reports(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Notify,
    /// How often everything was asked to go out, and up to which of these it has arrived.
    asked: watch::Sender<u64>,
    arrived: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// Live now, by (type, name). Bounded by what is subscribed.
    live: BTreeMap<Key, String>,
    /// Refused now, by (type, name): version and reason.
    refused: BTreeMap<Key, (String, String)>,
    /// What is not in any report yet; the newest word on a name replaces the older one.
    applied: BTreeMap<Key, pb::Applied>,
    nacked: BTreeMap<Key, pb::Nacked>,
}

type Key = (Arc<str>, Arc<str>);

impl Reports {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A version of a resource has gone live.
    pub fn applied(&self, type_url: &str, name: &str, version: &str) {
        let mut state = self.state();
        let key = (type_url.into(), name.into());
        if state.live.get(&key).is_some_and(|live| live == version) {
            return;
        }
        state.live.insert(key.clone(), version.to_owned());
        state.applied.insert(key.clone(), applied(&key, version, false));
        drop(state);
        self.0.changed.notify_one();
    }

    /// A resource is gone and what used it has changed over.
    pub fn removed(&self, type_url: &str, name: &str) {
        let mut state = self.state();
        let key = (type_url.into(), name.into());
        state.live.remove(&key);
        state.refused.remove(&key);
        state.applied.insert(key.clone(), applied(&key, "", true));
        drop(state);
        self.0.changed.notify_one();
    }

    /// A resource is no longer subscribed: the control stream has said so already.
    pub fn forgotten(&self, type_url: &str, name: &str) {
        let mut state = self.state();
        let key: Key = (type_url.into(), name.into());
        state.live.remove(&key);
        state.refused.remove(&key);
        state.applied.remove(&key);
        state.nacked.remove(&key);
    }

    /// A version of a resource was refused.
    pub fn nacked(&self, type_url: &str, name: &str, version: &str, reason: &str) {
        let mut state = self.state();
        let key: Key = (type_url.into(), name.into());
        state.refused.insert(key.clone(), (version.to_owned(), reason.to_owned()));
        state.nacked.insert(key.clone(), nacked(&key, version, reason));
        drop(state);
        self.0.changed.notify_one();
    }

    /// A later version of a refused resource was accepted.
    pub fn accepted(&self, type_url: &str, name: &str) {
        let mut state = self.state();
        let key: Key = (type_url.into(), name.into());
        state.refused.remove(&key);
        state.nacked.remove(&key);
    }

    /// What is live: type, name, version.
    pub fn live(&self) -> Vec<(Arc<str>, Arc<str>, String)> {
        let state = self.state();
        state.live.iter().map(|((ty, name), version)| (ty.clone(), name.clone(), version.clone())).collect()
    }

    /// What is refused: type, name, version, reason.
    pub fn refused(&self) -> Vec<(Arc<str>, Arc<str>, String, String)> {
        let one = |(key, (version, reason)): (&Key, &(String, String))| {
            (key.0.clone(), key.1.clone(), version.clone(), reason.clone())
        };
        self.state().refused.iter().map(one).collect()
    }

    /// Sends everything now, and waits until the controller has confirmed it.
    pub async fn flush(&self) {
        self.0.asked.send_modify(|asked| *asked += 1);
        let mine = *self.0.asked.borrow();
        let mut arrived = self.0.arrived.subscribe();
        // The sender is `self`: it cannot be gone.
        let _ = arrived.wait_for(|arrived| *arrived >= mine).await;
    }

    /// A new stream: whoever listens may know nothing.
    fn tell_all(&self) {
        let state = &mut *self.state();
        for (key, version) in &state.live {
            state.applied.insert(key.clone(), applied(key, version, false));
        }
        for (key, (version, reason)) in &state.refused {
            state.nacked.insert(key.clone(), nacked(key, version, reason));
        }
    }

    fn take(&self) -> (Vec<pb::Applied>, Vec<pb::Nacked>) {
        let mut state = self.state();
        let applied = std::mem::take(&mut state.applied).into_values().collect();
        let nacked = std::mem::take(&mut state.nacked).into_values().collect();
        (applied, nacked)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn applied(key: &Key, version: &str, removed: bool) -> pb::Applied {
    pb::Applied { type_url: key.0.to_string(), name: key.1.to_string(), version: version.to_owned(), removed }
}

fn nacked(key: &Key, version: &str, reason: &str) -> pb::Nacked {
    pb::Nacked {
        type_url: key.0.to_string(),
        name: key.1.to_string(),
        version: version.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Sends reports over whatever connection the control stream has, for ever.
pub(crate) async fn run(
    config: Arc<Config>,
    reports: Reports,
    registry: Registry,
    mut connection: watch::Receiver<Option<Channel>>,
) {
    let mut outbox = Outbox::new(session());
    let mut failures = 0;
    loop {
        if connection.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let Some(channel) = connection.borrow_and_update().clone() else { continue };
        let started = Instant::now();
        let ended = stream(&config, &reports, &registry, channel, &mut connection, &mut outbox).await;
        debug!(reason = ?ended, "telemetry stream ended");
        if started.elapsed() >= config.times.reconnect_healthy {
            failures = 0;
        }
        let (base, cap) = (config.times.reconnect_base, config.times.reconnect_cap);
        let wait = full_jitter(base, cap, failures, &mut rand::rng());
        failures = failures.saturating_add(1);
        tokio::time::sleep(wait).await;
    }
}

async fn stream(
    config: &Config,
    reports: &Reports,
    registry: &Registry,
    channel: Channel,
    connection: &mut watch::Receiver<Option<Channel>>,
    outbox: &mut Outbox,
) -> Result<(), tonic::Status> {
    let (send, receive) = mpsc::channel(1);
    let mut client = TelemetryClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    let requests = tokio_stream::wrappers::ReceiverStream::new(receive);
    let mut tick = tokio::time::interval(config.times.report);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await;

    // The answer's head may come only after the first report, so sending starts before it is here.
    let call = client.report(requests);
    tokio::pin!(call);
    let mut answers = None;
    reports.tell_all();
    outbox.reconnected();
    let (mut due, mut news) = (true, true); // a first report at once
    let mut asked = reports.0.asked.subscribe();
    let mut flushing = None;
    loop {
        if (due || news) && outbox.has_room() {
            if due {
                let wanted = *asked.borrow_and_update();
                flushing = (wanted > *reports.0.arrived.borrow()).then_some((wanted, outbox.sequence + 1));
            }
            outbox.add(report(reports, registry, due).await);
            (due, news) = (false, false);
        }
        // Both branches only: a blocked stream must not keep answers from being read.
        let next = outbox.next().cloned();
        tokio::select! {
            permit = send.reserve(), if next.is_some() => {
                let permit = permit.map_err(|_| tonic::Status::unavailable("stream closed"))?;
                if let Some(next) = next {
                    permit.send(next);
                    outbox.sent();
                }
            }
            response = &mut call, if answers.is_none() => answers = Some(response?.into_inner()),
            answer = next_answer(&mut answers), if answers.is_some() => match answer? {
                Some(answer) => {
                    outbox.confirmed(answer.sequence);
                    if let Some((wanted, sequence)) = flushing && answer.sequence >= sequence {
                        reports.0.arrived.send_replace(wanted);
                        flushing = None;
                    }
                }
                None => return Ok(()),
            },
            // The control stream has left that connection: so do we, or it would live on for us alone.
            _ = connection.changed() => return Ok(()),
            _ = tick.tick() => due = true,
            _ = asked.changed() => due = true,
            () = reports.0.changed.notified() => {
                // Several changes that come together leave together.
                tokio::time::sleep(GATHER).await;
                news = true;
            }
        }
    }
}

async fn next_answer(
    answers: &mut Option<tonic::Streaming<pb::ReportResponse>>,
) -> Result<Option<pb::ReportResponse>, tonic::Status> {
    match answers {
        Some(answers) => answers.message().await,
        None => std::future::pending().await,
    }
}

/// One report; `numbers` says whether the workers are asked, which news alone does not need.
async fn report(reports: &Reports, registry: &Registry, numbers: bool) -> pb::ReportRequest {
    let delta = if numbers { registry.report().await } else { ReportDelta::default() };
    let (applied, nacked) = reports.take();
    let shared = registry.shared();
    let connections =
        registry.level(Gauge::OutboundConnections).await + registry.level(Gauge::InboundConnections).await;
    let positive = |n: i64| u64::try_from(n).unwrap_or(0);
    pb::ReportRequest {
        sequence: 0,
        session: String::new(),
        applied,
        nacked,
        routes: delta.routes,
        edges: delta.edges,
        endpoints: delta.endpoints,
        records: delta.records,
        gauges: Some(pb::Gauges {
            rss_bytes: Process::read().rss.unwrap_or(0),
            connections: positive(connections),
            certificate_not_after: shared.level(Gauge::CertificateNotAfter),
            seconds_since_contact: positive(shared.level(Gauge::LastContact)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }),
        dropped: delta.dropped,
    }
}

/// Reports that are not confirmed yet, in order.
struct Outbox {
    session: String,
    sequence: u64,
    reports: VecDeque<pb::ReportRequest>,
    /// How many of them went out on this stream.
    sent: usize,
}

impl Outbox {
    fn new(session: String) -> Self {
        Self { session, sequence: 0, reports: VecDeque::new(), sent: 0 }
    }

    fn has_room(&self) -> bool {
        self.reports.len() < MAX_UNCONFIRMED
    }

    fn add(&mut self, mut report: pb::ReportRequest) {
        self.sequence += 1;
        report.sequence = self.sequence;
        report.session = self.session.clone();
        self.reports.push_back(report);
    }

    fn next(&self) -> Option<&pb::ReportRequest> {
        self.reports.get(self.sent)
    }

    fn sent(&mut self) {
        self.sent += 1;
    }

    fn confirmed(&mut self, sequence: u64) {
        while self.sent > 0 && self.reports.front().is_some_and(|report| report.sequence <= sequence) {
            self.reports.pop_front();
            self.sent -= 1;
        }
    }

    fn reconnected(&mut self) {
        self.sent = 0;
    }
}

fn session() -> String {
    let mut random = [0; 16];
    rand::rng().fill_bytes(&mut random);
    random.iter().fold(String::with_capacity(32), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reports in flight: a controller that does not confirm gets no more.
const MAX_UNCONFIRMED: usize = 8;
/// Changes closer together than this are one report.
const GATHER: Duration = Duration::from_millis(5);
/// An answer is one number.
const MAX_ANSWER: usize = 4 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(reports: usize) -> Outbox {
        let mut outbox = Outbox::new("s".into());
        for _ in 0..reports {
            outbox.add(pb::ReportRequest::default());
        }
        outbox
    }

    fn drain(outbox: &mut Outbox) -> Vec<u64> {
        let mut sequences = Vec::new();
        while let Some(next) = outbox.next() {
            sequences.push(next.sequence);
            outbox.sent();
        }
        sequences
    }

    #[test]
    fn what_is_not_confirmed_is_sent_again_with_its_number() {
        let mut outbox = outbox(3);
        assert_eq!(drain(&mut outbox), [1, 2, 3]);
        outbox.confirmed(2);
        outbox.reconnected();
        assert_eq!(drain(&mut outbox), [3]);
        outbox.confirmed(3);
        outbox.reconnected();
        assert_eq!(drain(&mut outbox), [0; 0]);
    }

    #[test]
    fn a_confirmation_of_what_was_not_sent_means_nothing() {
        let mut outbox = outbox(2);
        outbox.confirmed(u64::MAX);
        assert_eq!(drain(&mut outbox), [1, 2]);
    }

    #[test]
    fn unconfirmed_reports_are_bounded() {
        assert!(outbox(MAX_UNCONFIRMED - 1).has_room());
        assert!(!outbox(MAX_UNCONFIRMED).has_room());
    }

    #[test]
    fn the_newest_word_on_a_name_is_told_once() {
        let reports = Reports::new();
        reports.applied("t", "a", "1");
        reports.applied("t", "a", "2");
        reports.applied("t", "a", "2");
        reports.nacked("t", "b", "1", "bad");
        reports.accepted("t", "b");
        let (applied, nacked) = reports.take();
        assert_eq!(applied.iter().map(|a| a.version.as_str()).collect::<Vec<_>>(), ["2"]);
        assert!(nacked.is_empty());
        assert!(reports.take().0.is_empty());
    }

    #[test]
    fn a_new_stream_is_told_everything_again() {
        let reports = Reports::new();
        reports.applied("t", "a", "1");
        reports.nacked("t", "b", "2", "bad");
        reports.take();
        reports.tell_all();
        let (applied, nacked) = reports.take();
        assert_eq!((applied.len(), nacked.len()), (1, 1));
        reports.removed("t", "a");
        reports.take();
        reports.tell_all();
        assert!(reports.take().0.is_empty());
    }
}
