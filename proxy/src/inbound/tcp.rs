//! An opaque connection to the app: authorized when it comes and whenever policy changes, bytes both ways.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use weft_core::{
    authz::{self, Ask, Verdict},
    classify::Class,
    policy::{CONNECT_TIMEOUT, PortPolicy},
};

use super::Caller;
use crate::{
    error::Error,
    tcp::{Broken, Stream, reset, splice},
    telemetry::{
        exchange::{Exchange, now},
        metrics::{Counter, Direction, EdgeKey, SeriesKey},
    },
    worker::{Spoken, Worker, port_policy},
};

/// Serves a connection of which only the caller and the port are known.
pub(super) async fn serve<S: Stream>(
    worker: Rc<Worker>,
    mut client: S,
    original: SocketAddr,
    port: Arc<PortPolicy>,
    caller: Rc<Caller>,
) {
    let mut exchange = Exchange::start(&worker.recorder, now());
    let parent: Arc<str> = original.port().to_string().into();
    exchange.belongs_to(worker.recorder.series(&SeriesKey {
        direction: Direction::Inbound,
        parent: parent.clone(),
        route: "default".into(),
        backend: "".into(),
        protocol: Spoken::Tcp.as_str(),
    }));
    let edge = EdgeKey {
        caller: caller.identity.as_ref().map_or_else(|| "".into(), |id| id.as_str().into()),
        caller_version: "".into(),
        service: parent,
        method: "".into(),
        mtls: caller.identity.is_some(),
    };
    if let Verdict::Deny { reason, .. } = authz::authorize(&port.authorization, &caller.peer(), &Ask::Opaque)
    {
        worker.recorder.count(Counter::Denied);
        worker.recorder.edge(&edge, true);
        return refuse(&worker, &client, original, &caller, exchange, Error::Denied, reason.name());
    }
    let connecting = worker.pool.connect(original, true, CONNECT_TIMEOUT);
    let mut app = match connecting.await {
        Ok(app) => app,
        Err(error) => {
            worker.recorder.edge(&edge, true);
            let detail = error.detail.to_string();
            return refuse(&worker, &client, original, &caller, exchange, error.into(), &detail);
        }
    };
    worker.recorder.edge(&edge, false);
    let broken = tokio::select! {
        spliced = splice(&mut client, &mut app) => spliced.err(),
        code = revoked(&worker, original.port(), &caller) => {
            tracing::warn!(code, client = %caller.address, destination = %original, "connection ended");
            reset(client.tcp());
            reset(&app);
            Some(Broken::Client)
        }
        () = worker.drain.cut() => {
            reset(client.tcp());
            reset(&app);
            Some(Broken::Client)
        }
    };
    let class = match broken {
        None => Class::Ok,
        Some(Broken::Client) => Class::ClientError,
        Some(Broken::Server) => Class::ServerError,
    };
    exchange.finish(class, now());
}

/// Ends when the caller may no longer hold the connection; says why.
async fn revoked(worker: &Worker, port: u16, caller: &Caller) -> &'static str {
    let mut policy = worker.discovery.inbound();
    policy.mark_changed();
    let denied = async {
        while policy.changed().await.is_ok() {
            let permitted = policy.borrow_and_update().as_ref().is_some_and(|policy| {
                let authorization = &port_policy(policy, port).authorization;
                authz::authorize(authorization, &caller.peer(), &Ask::Opaque).is_permit()
            });
            if !permitted {
                worker.recorder.count(Counter::Denied);
                return;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = denied => "denied",
        () = caller.expired() => {
            worker.recorder.count(Counter::PeerExpired);
            "certificate_expired"
        }
    }
}

fn refuse(
    worker: &Worker,
    client: &impl Stream,
    original: SocketAddr,
    caller: &Caller,
    exchange: Exchange,
    error: Error,
    detail: &str,
) {
    let answer = error.answer();
    worker.recorder.error(answer.code);
    tracing::warn!(component = "inbound", code = answer.code, %error, detail, client = %caller.address,
        caller = caller.identity.as_ref().map(|id| id.as_str()), destination = %original, "connection refused");
    reset(client.tcp());
    exchange.finish(Class::Proxy, now());
}
