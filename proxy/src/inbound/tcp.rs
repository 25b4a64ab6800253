//! An opaque connection to the app: authorized when it comes and whenever policy changes, bytes both ways.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use weft_core::{
    authz::{self, Ask, Verdict},
    classify::Class,
    detect::Detected,
    policy::PortPolicy,
};

use super::Caller;
use crate::{
    accepted::Accepted,
    clock::now,
    detect::{self, Begun, First, FirstWord},
    direction::Direction,
    error::Error,
    tcp::{Broken, Moved, Prefixed, Stream, reset, splice_until},
    telemetry::{
        exchange::Exchange,
        metrics::Counter,
        recorder::{EdgeKey, SeriesKey},
    },
    worker::{Spoken, Worker, port_policy},
};

/// Serves a connection of which only the caller and the port are known.
pub(super) async fn serve<S: Stream>(worker: &Worker, client: S, original: SocketAddr, caller: &Caller) {
    if let Some((exchange, edge, app)) = open(worker, client.tcp(), original, caller).await {
        worker.recorder.edge(&edge, false);
        carry(worker, exchange, client, app, original, caller).await;
    }
}

/// The same for a port that is declared to speak HTTP, by a caller's sidecar: TLS of the app's own alone passes as
/// bytes. What the app could read as HTTP and nobody here has read may name any caller in its headers.
pub(super) async fn serve_declared_http<S: Stream>(
    worker: &Worker,
    mut client: S,
    original: SocketAddr,
    caller: &Caller,
) {
    let mut begun = BytesMut::new();
    let reading = async {
        loop {
            match weft_core::detect::detect(&begun) {
                Detected::NeedMore => {}
                Detected::Tls { .. } => return true,
                Detected::Http1 | Detected::Http2 | Detected::Opaque => return false,
            }
            if !matches!(client.read_buf(&mut begun).await, Ok(n) if n > 0) {
                // Nothing can come of what ended before it began.
                return begun.is_empty();
            }
        }
    };
    if tokio::time::timeout(worker.config.times.header, reading).await.unwrap_or(false) {
        return serve(worker, Prefixed::new(begun.freeze(), client), original, caller).await;
    }
    refuse(worker, client.tcp(), original, caller, &Error::NotHttp, None);
}

/// Ends a connection whose caller is known: counted, logged, reset.
fn refuse(
    worker: &Worker,
    client: &TcpStream,
    original: SocketAddr,
    caller: &Caller,
    error: &Error,
    detail: Option<&str>,
) {
    let code = error.answer().code;
    worker.recorder.error(code);
    tracing::warn!(component = "inbound", code, %error, detail = detail.map(tracing::field::display),
        client = %caller.address, caller = caller.identity.as_ref().map(|id| id.as_str()),
        destination = %original, "connection refused");
    reset(client);
}

/// The client of a port that may be server-first is silent: dials the app, and lets whoever speaks first decide.
/// Returns the connection when the client turned out to speak something that is to be understood, a late sidecar's
/// handshake above all.
pub(super) async fn whoever_speaks(worker: &Rc<Worker>, mut accepted: Accepted) -> Option<(Accepted, First)> {
    let caller = Caller::outside(accepted.client.ip());
    let original = accepted.original;
    let (exchange, edge, mut app) = open(worker, &accepted.stream, original, &caller).await?;
    let spoke = tokio::select! {
        biased;
        spoke = detect::whoever_speaks(&mut accepted.stream, &mut app, worker.config.times.header) => Ok(spoke),
        () = must_end(worker, original, &caller) => Err(Class::ClientError),
    };
    let (asked, greeting) = match spoke {
        Ok(FirstWord::Client(Ok(Begun::Spoke(first)))) => match first.detected {
            Detected::Http1 | Detected::Http2 | Detected::Tls { .. } => {
                // The app was sent nothing: what the client says goes its own way.
                exchange.discard();
                return Some((accepted, first));
            }
            Detected::Opaque | Detected::NeedMore => (first.bytes, Bytes::new()),
        },
        Ok(FirstWord::Client(Ok(Begun::Ended | Begun::Silent))) => (Bytes::new(), Bytes::new()),
        Ok(FirstWord::Client(Err(_))) => {
            exchange.finish(Class::ClientError, now());
            return None;
        }
        Ok(FirstWord::Server { greeting, asked }) => (asked, greeting),
        broken @ (Ok(FirstWord::ServerBroke) | Err(_)) => {
            reset(&accepted.stream);
            reset(&app);
            exchange.finish(broken.err().unwrap_or(Class::ServerError), now());
            return None;
        }
    };
    worker.recorder.edge(&edge, false);
    let Accepted { stream, open, .. } = accepted;
    let (client, app) = (Prefixed::new(asked, stream), Prefixed::new(greeting, app));
    carry(worker, exchange, client, app, original, &caller).await;
    drop(open);
    None
}

/// Whether bytes of this caller that nobody reads are admitted.
pub(super) fn permits(port: &PortPolicy, caller: &Caller) -> bool {
    authz::authorize(&port.authorization, &caller.peer(), &Ask::Opaque).is_permit()
}

/// Authorizes and dials the app. `None`: refused, and all is said.
async fn open(
    worker: &Worker,
    client: &TcpStream,
    original: SocketAddr,
    caller: &Caller,
) -> Option<(Exchange, EdgeKey, TcpStream)> {
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
        service: parent,
        method: "".into(),
        mtls: caller.identity.is_some(),
    };
    match dial(worker, original, caller).await {
        Ok(app) => Some((exchange, edge, app)),
        Err((error, detail)) => {
            worker.recorder.edge(&edge, true);
            refuse(worker, client, original, caller, &error, Some(&detail));
            exchange.finish(Class::Proxy, now());
            None
        }
    }
}

async fn dial(
    worker: &Worker,
    original: SocketAddr,
    caller: &Caller,
) -> Result<TcpStream, (Error, Arc<str>)> {
    // Counted before the question whether to refuse, so that a drain waits for the app's answer or this sees it.
    let dialling = worker.drain.request();
    if worker.drain.is_refusing() {
        return Err((Error::Draining, "".into()));
    }
    // The policy of now: a handshake may have taken long.
    let policy = worker.inbound_policy().ok_or((Error::NotReady, "".into()))?;
    let port = port_policy(&policy, original.port());
    if caller.must_not_speak_plaintext(port) {
        worker.recorder.count(Counter::PlaintextRefused);
        return Err((Error::PlaintextRefused, "".into()));
    }
    if let Verdict::Deny { reason, .. } = authz::authorize(&port.authorization, &caller.peer(), &Ask::Opaque)
    {
        worker.recorder.count(Counter::Denied);
        return Err((Error::Denied, reason.name().into()));
    }
    let connected = worker.connector.connect(original, true, worker.config.times.connect).await;
    drop(dialling);
    connected.map_err(|error| (Error::from_failure(error.failure), error.detail))
}

async fn carry<C: Stream, A: Stream>(
    worker: &Worker,
    exchange: Exchange,
    mut client: C,
    mut app: A,
    original: SocketAddr,
    caller: &Caller,
) {
    let moved = Moved::default();
    let stop = must_end(worker, original, caller);
    let spliced = splice_until(&mut client, &mut app, &moved, stop).await;
    worker.recorder.add(Counter::InboundBytesReceived, moved.up.get());
    worker.recorder.add(Counter::InboundBytesSent, moved.down.get());
    exchange.finish(spliced.map_or_else(Broken::class, |()| Class::Ok), now());
}

/// Returns when the caller may be here no longer, or the drain's time is over.
async fn must_end(worker: &Worker, original: SocketAddr, caller: &Caller) {
    tokio::select! {
        biased;
        code = caller.revoked(worker, original.port(), |port| permits(port, caller)) => {
            tracing::warn!(code, client = %caller.address, destination = %original, "connection ended");
        }
        () = worker.drain.cut() => {}
    }
}
