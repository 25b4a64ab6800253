//! The telemetry stream's server: who reports is who the certificate says, and every report is answered
//! with the sequence up to which all is taken.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weft_proto::pb::v1::{ReportRequest, ReportResponse, telemetry_server::Telemetry};

use super::{Closing, closed, now_ms, published::Published, tls::Peer};
use crate::{
    metrics::Metrics,
    telemetry::{Reporter, Store},
};

/// By name: version, and when it was last said to be live in milliseconds since 1970.
type LastApplied = HashMap<Arc<str>, (Arc<str>, u64)>;

/// The service.
#[derive(Clone)]
pub struct Reports {
    store: Arc<Mutex<Store>>,
    published: Arc<Published>,
    metrics: Arc<Metrics>,
    /// When the newest version of each name was last said to be live.
    last_applied: Arc<Mutex<LastApplied>>,
}

impl Reports {
    /// Reports go to `store`.
    pub fn new(store: Arc<Mutex<Store>>, published: Arc<Published>, metrics: Arc<Metrics>) -> Self {
        Self { store, published, metrics, last_applied: Arc::default() }
    }

    /// When a version of a name was last said to be live.
    pub fn last_applied(&self, name: &str, version: &str) -> Option<u64> {
        let last = self.last_applied.lock().unwrap_or_else(PoisonError::into_inner);
        last.get(name).filter(|(applied, _)| **applied == *version).map(|(_, at)| *at)
    }

    /// Forgets sidecars that do not come back, and names that are gone.
    pub fn tidy(&self) {
        self.store().forget_gone(now_ms());
        let mut last = self.last_applied.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|name, (version, _)| {
            self.published.resource(name).is_some_and(|resource| resource.versioned.version == *version)
        });
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, reporter: &Reporter, report: ReportRequest) -> u64 {
        let now = now_ms();
        {
            let mut last = self.last_applied.lock().unwrap_or_else(PoisonError::into_inner);
            for applied in &report.applied {
                // Only what is newest now; the rest is history. This also bounds the map.
                let current = self.published.resource(&applied.name);
                let Some(current) = current.filter(|c| *c.versioned.version == *applied.version) else {
                    continue;
                };
                // Whoever subscribed after the change says nothing about how long the change took.
                let since = self.published.subscribers.since(&applied.name, &reporter.uid);
                if since.is_some_and(|since| since <= current.since_ms) {
                    last.insert(applied.name.as_str().into(), (current.versioned.version, now));
                }
            }
        }
        self.metrics.reports.fetch_add(1, Ordering::Relaxed);
        self.store().report(reporter, report, now)
    }

    async fn run(
        self,
        reporter: Reporter,
        mut requests: Streaming<ReportRequest>,
        out: mpsc::Sender<Result<ReportResponse, Status>>,
        mut closing: watch::Receiver<bool>,
    ) {
        loop {
            let report = tokio::select! {
                () = closed(&mut closing) => {
                    let _ = out.send(Err(Status::unavailable("the connection ends: come back"))).await;
                    return;
                }
                () = out.closed() => return,
                message = requests.message() => match message {
                    Ok(Some(report)) => report,
                    Ok(None) | Err(_) => return,
                },
            };
            let sequence = self.take(&reporter, report);
            // A sidecar that does not read its answers stops being read: no queue here either.
            if out.send(Ok(ReportResponse { sequence })).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl Telemetry for Reports {
    type ReportStream = ReceiverStream<Result<ReportResponse, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        self.published.admit(&peer)?;
        let closing = request.extensions().get::<Closing>().map(|closing| closing.0.clone());
        let closing = closing.ok_or_else(|| Status::internal("the connection has no end"))?;
        let (out, responses) = mpsc::channel(1);
        let reporter = Reporter { identity: peer.identity, uid: peer.uid };
        tokio::spawn(self.clone().run(reporter, request.into_inner(), out, closing));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}
