//! Delta ADS over mTLS: one task a stream, which pulls what its sidecar lacks.
//!
//! Why pull: a publisher only wakes; the task compares what was told with what is, when it may send. A
//! stalled sidecar costs a woken flag, never a queue, and never holds up anybody else.
//!
//! Why a pause between pushes: a rolling restart of a service that everybody uses is hundreds of changes;
//! told at most every 20 ms (a second under load) they collapse into few. The first change after a quiet
//! time, and everything that takes something away, is told at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weft_proto::{
    ads::{
        Stream,
        server::{Received, Reply},
    },
    pb::ads::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_server::AggregatedDiscoveryService,
    },
};

use super::{
    Closing, Wake, closed,
    published::{Published, View},
    subscribers::Subscriber,
    tls::Peer,
};
use crate::metrics::Metrics;

/// The service.
#[derive(Clone, Debug)]
pub struct Discovery {
    published: Arc<Published>,
    metrics: Arc<Metrics>,
    /// First answers that are made at a time.
    building: Arc<Semaphore>,
    pace: Arc<Pace>,
    ids: Arc<AtomicU64>,
}

impl Discovery {
    /// Serves what is published.
    pub fn new(published: Arc<Published>, metrics: Arc<Metrics>) -> Self {
        Self {
            published,
            metrics,
            building: Arc::new(Semaphore::new(INITIAL_BUILDS)),
            pace: Arc::new(Pace::default()),
            // Ids are part of nonces: another run's must not be taken for this one's.
            ids: Arc::new(AtomicU64::new(rand::random())),
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned().map(Arc::new);
        let peer = peer.ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        self.published.admit(&peer)?;
        let closing = request.extensions().get::<Closing>().map(|closing| closing.0.clone());
        let closing = closing.ok_or_else(|| Status::internal("the connection has no end"))?;
        let (out, responses) = mpsc::channel(OUT);
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let subscriber = Subscriber { id, peer, wake: Arc::new(Wake::default()) };
        self.published.subscribers.open(&subscriber);
        let task = Task { discovery: self.clone(), subscriber, stream: Stream::new(id), out, sent_at: None };
        tokio::spawn(task.run(request.into_inner(), closing));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

struct Task {
    discovery: Discovery,
    subscriber: Subscriber,
    stream: Stream,
    out: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    sent_at: Option<Instant>,
}

/// Why a stream ends.
enum End {
    /// The sidecar left.
    Left,
    /// We ask it to come back.
    Come(&'static str),
    /// It broke the rules.
    Broke(Status),
}

impl Task {
    async fn run(mut self, requests: Streaming<DeltaDiscoveryRequest>, closing: watch::Receiver<bool>) {
        let discovery = self.discovery.clone();
        discovery.metrics.streams.fetch_add(1, Ordering::Relaxed);
        let end = self.serve(requests, closing).await;
        let names: Vec<_> = self.stream.subscribed().map(|(_, name)| name.clone()).collect();
        for name in names {
            discovery.published.subscribers.remove(&name, self.subscriber.id);
        }
        discovery.published.subscribers.close(self.subscriber.id);
        discovery.metrics.streams.fetch_sub(1, Ordering::Relaxed);
        let status = match end {
            End::Left => return,
            End::Come(reason) => Status::unavailable(reason),
            End::Broke(status) => {
                tracing::warn!(peer = %self.subscriber.peer.identity, pod = %self.subscriber.peer.uid, %status, "stream closed");
                status
            }
        };
        let _ = self.out.send(Err(status)).await;
    }

    async fn serve(
        &mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        mut closing: watch::Receiver<bool>,
    ) -> End {
        let mut synced = self.discovery.published.synced();
        let mut first = true;
        // When what changed may be told; `None`: nothing did.
        let mut due: Option<Instant> = None;
        let mut rested = Instant::now();
        loop {
            let is_synced = *synced.borrow_and_update();
            // Asked at each turn: the pod may go while its certificate is good for hours.
            if let Err(status) = self.discovery.published.admit(&self.subscriber.peer) {
                return End::Broke(status);
            }
            if self.subscriber.wake.is_replaced() {
                return End::Come("newer streams of this pod have taken its place");
            }
            let at = due.filter(|_| is_synced).map(|due| due.max(rested));
            if at.is_some_and(|at| at <= Instant::now()) {
                due = None;
                let began = Instant::now();
                if std::mem::take(&mut first) {
                    let building = self.discovery.building.clone();
                    // Never closed.
                    let _permit = building.acquire().await;
                    self.send().await;
                } else {
                    self.send().await;
                }
                rested = Instant::now() + rest(began.elapsed());
            }
            let at = due.filter(|_| is_synced).map(|due| due.max(rested));
            let timer = at.or_else(|| self.stream.wake_at().map(Instant::from_std));
            tokio::select! {
                biased;
                () = closed(&mut closing) => return End::Come("the connection ends: come back"),
                () = self.out.closed() => return End::Left,
                message = requests.message() => match message {
                    Ok(Some(request)) => {
                        if let Err(end) = self.receive(request) {
                            return end;
                        }
                        // What somebody waits for is told at once.
                        due = Some(Instant::now());
                    }
                    Ok(None) | Err(_) => return End::Left,
                },
                urgent = self.subscriber.wake.woken() => {
                    let now = Instant::now();
                    let pause = if urgent { Duration::ZERO } else { self.discovery.pace.gap(&self.discovery.metrics, now) };
                    let at = self.sent_at.map_or(now, |sent| (sent + pause).max(now));
                    due = Some(due.map_or(at, |due| due.min(at)));
                }
                _ = synced.changed(), if !is_synced => due = Some(Instant::now()),
                () = sleep_until(timer.unwrap_or_else(Instant::now)), if timer.is_some() => {
                    let now = Instant::now();
                    if self.stream.overdue(now.into_std()) {
                        self.discovery.metrics.ack_timeouts.fetch_add(1, Ordering::Relaxed);
                        return End::Broke(Status::deadline_exceeded("a response was not answered in time"));
                    }
                    // A head is due, or what waited out its pause.
                    due = Some(now);
                }
            }
        }
    }

    /// Sends whatever may be sent. One response of a type is un-ACKed at a time and the channel holds one
    /// of each, so this does not wait for the sidecar.
    async fn send(&mut self) {
        let published = self.discovery.published.clone();
        let view = View::new(&published, &self.subscriber.peer);
        let mut responses = Vec::new();
        while let Some(response) = self.stream.next(&view, Instant::now().into_std()) {
            responses.push(response);
        }
        for response in responses {
            self.sent_at = Some(Instant::now());
            self.discovery.metrics.pushes.fetch_add(1, Ordering::Relaxed);
            self.discovery.pace.count();
            if self.out.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }

    fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<(), End> {
        let Received { reply, subscribed, unsubscribed, .. } =
            self.stream.receive(request).map_err(|error| {
                self.discovery.metrics.protocol_errors.fetch_add(1, Ordering::Relaxed);
                End::Broke(Status::resource_exhausted(error.to_string()))
            })?;
        if let Reply::Nack(nack) = reply {
            self.discovery.metrics.nacks.fetch_add(1, Ordering::Relaxed);
            for rejected in &nack.rejected {
                tracing::warn!(pod = %self.subscriber.peer.uid, name = %rejected.name, version = %rejected.version,
                    reason = %rejected.reason, "refused by a sidecar: its last good version stays");
            }
            if nack.rejected.is_empty() {
                tracing::warn!(pod = %self.subscriber.peer.uid, reason = %nack.message, "response refused by a sidecar");
            }
        }
        let subscribers = &self.discovery.published.subscribers;
        for name in subscribed {
            subscribers.add(&name, &self.subscriber);
        }
        for name in unsubscribed {
            subscribers.remove(&name, self.subscriber.id);
        }
        Ok(())
    }
}

/// How long a stream pauses between pushes: longer the more is pushed to all of them together.
#[derive(Debug, Default)]
struct Pace {
    pushed: AtomicU64,
    state: std::sync::Mutex<Option<(Instant, Duration)>>,
}

impl Pace {
    fn count(&self) {
        self.pushed.fetch_add(1, Ordering::Relaxed);
    }

    fn gap(&self, metrics: &Metrics, now: Instant) -> Duration {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (since, gap) = *state.get_or_insert((now, MIN_GAP));
        let elapsed = now.saturating_duration_since(since);
        if elapsed < MEASURE {
            return gap;
        }
        let pushed = self.pushed.swap(0, Ordering::Relaxed);
        let gap = gap_at(pushed as f64 / elapsed.as_secs_f64());
        metrics.push_gap_ms.store(u64::try_from(gap.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        *state = Some((now, gap));
        gap
    }
}

/// How long one stream rests after the work that it caused: whoever asks without end, for twenty thousand
/// names at a time, gets a fifth of one core at most.
fn rest(worked: Duration) -> Duration {
    (worked * 4).min(MAX_GAP)
}

/// 20 ms up to a tenth of what two cores can push, then in proportion, a second at most.
fn gap_at(pushes_per_second: f64) -> Duration {
    MIN_GAP.mul_f64((pushes_per_second / EASY).max(1.0)).min(MAX_GAP)
}

/// First answers made at a time (istio#35263: five thousand at once took three minutes each).
const INITIAL_BUILDS: usize = 32;
/// One response of each type, and the status at the end.
const OUT: usize = 8;
const MIN_GAP: Duration = Duration::from_millis(20);
const MAX_GAP: Duration = Duration::from_secs(1);
const MEASURE: Duration = Duration::from_millis(250);
/// Two cores push 50,000 a second at 60 % (protocol.md §7).
const EASY: f64 = 5_000.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_with_the_load_and_ends_at_a_second() {
        assert_eq!(gap_at(0.0), MIN_GAP);
        assert_eq!(gap_at(5_000.0), MIN_GAP);
        assert_eq!(gap_at(50_000.0), MIN_GAP * 10);
        assert_eq!(gap_at(1e9), MAX_GAP);
        assert_eq!(rest(Duration::from_millis(5)), Duration::from_millis(20));
        assert_eq!(rest(Duration::from_secs(5)), MAX_GAP);
    }
}
