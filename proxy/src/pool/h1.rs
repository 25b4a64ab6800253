//! HTTP/1.1 connections to the app, or to a server outside the mesh: one request at a time, then kept for the next.
//!
//! Why they are reused for a short time only: whoever is at the other end may close one at the moment of reuse, and then
//! nobody knows whether the request was seen.

use std::{
    cell::RefCell,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use http::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use weft_core::{classify::Failure, framing::HeadLimits};

use super::{
    Checkout, Pool, SendError, SendOptions, Sent, Use, describe, failure_of, not_processed, nothing_left,
    one_more,
};
use crate::{
    back::{Back, Due},
    clock::now,
    config::HEADERS_ON_STACK,
    connect::ConnectError,
    expect, head,
    peer::Peer,
    pod_wide::Permit,
    telemetry::metrics::Gauge,
    upload::{Replay, Upload},
};

/// An app connection that was idle for longer is not reused for a request that must not be sent twice; for others
/// `WEFT_APP_IDLE_TIMEOUT` counts (Node closes at 5 s, some servers at 2 s).
const IDLE_LIMIT_UNSAFE: Duration = Duration::from_millis(100);
/// Idle connections kept to one app port.
const MAX_IDLE: usize = 128;
/// What is read of an app's answer before the caller takes it.
const READ_BUFFER: usize = 64 * 1024;

/// The connections to one peer.
#[derive(Default)]
pub(super) struct H1Peer {
    idle: RefCell<Vec<H1>>,
    /// Held by each connection, idle or in use.
    open: Rc<()>,
}

/// One connection.
pub(super) struct H1 {
    sender: http1::SendRequest<Upload>,
    due: Due,
    idle_since: Instant,
    /// How long it may be idle: our own limit, or less where the app has said so.
    idle_limit: Duration,
    used: bool,
    _open: Rc<()>,
    /// As of an [`H2`].
    _permit: Option<Permit>,
}

impl Pool {
    pub(super) async fn send_h1(
        &self,
        peer: &Peer,
        request: &mut Option<Request<Upload>>,
        options: &SendOptions<'_>,
    ) -> Result<Sent, SendError> {
        let entry = self.h1_peer(peer);
        let gate = options.upload.and_then(Replay::gate);
        if let (Some(gate), Some(request)) = (&gate, &mut *request) {
            gate.opens_at_100(request);
        }
        loop {
            options.connected.set(false);
            let mut connection = match entry.take_idle(options) {
                Some(idle) => idle,
                None => {
                    let mut permit = one_more(options.cap, Rc::strong_count(&entry.open) == 1);
                    if permit.is_err()
                        && let Some(idle) = entry.idle.borrow_mut().pop()
                    {
                        // Too old for this request, it gives way to it.
                        drop(idle);
                        permit = one_more(options.cap, false);
                    }
                    let permit = permit?;
                    let opened = Box::pin(self.open_h1(peer, options.connect_timeout)).await?;
                    H1 { _permit: permit, _open: entry.open.clone(), ..opened }
                }
            };
            options.connected.set(true);
            let reused = connection.used;
            if connection.sender.ready().await.is_err() {
                if reused {
                    continue;
                }
                return Err(SendError::new(Failure::NotProcessed, "closed at once", reused));
            }
            if let Some(request) = &*request {
                connection.due.to(request.method());
            }
            let answered = {
                let mut sending =
                    pin!(connection.sender.try_send_request(request.take().ok_or_else(nothing_left)?));
                match &gate {
                    None => sending.await,
                    Some(gate) => Box::pin(gate.patient(expect::PATIENCE, sending.as_mut())).await,
                }
            };
            match answered {
                Ok(response) => {
                    if let Some(announced) = head::keep_alive_timeout(response.headers()) {
                        connection.idle_limit = announced.min(self.0.config.times.app_idle);
                    }
                    let upload = options.upload.cloned();
                    let checkout = Checkout(Use::H1 { peer: entry, connection: Some(connection), upload });
                    return Ok(Sent { response, checkout, private: false, upgrades_by_ok: false });
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if reused => *request = Some(unsent),
                    unsent => {
                        let error = error.into_error();
                        let failure =
                            if unsent.is_some() { Failure::NotProcessed } else { failure_of(&error) };
                        return Err(SendError::new(failure, describe(&error), reused));
                    }
                },
            }
        }
    }

    fn h1_peer(&self, peer: &Peer) -> Rc<H1Peer> {
        let mut peers = self.0.h1.borrow_mut();
        match peers.get(peer) {
            Some(entry) => entry.clone(),
            None => peers.entry(peer.clone()).or_default().clone(),
        }
    }

    async fn open_h1(&self, peer: &Peer, timeout: Duration) -> Result<H1, ConnectError> {
        let tcp = self.0.connector.connect(peer.address(), peer.is_app(), timeout).await?;
        let due = Due::default();
        let limits = HeadLimits { bytes: READ_BUFFER, fields: self.0.config.limits.headers };
        let io = TokioIo::new(Back::new(tcp, due.clone(), limits));
        let mut builder = http1::Builder::new();
        builder.max_buf_size(limits.bytes);
        if limits.fields > HEADERS_ON_STACK {
            builder.max_headers(limits.fields);
        }
        let handshake = builder.handshake(io).await;
        let (sender, connection) = handshake.map_err(|e| not_processed(&e))?;
        let open = self.0.recorder.raise(Gauge::PooledConnections);
        tokio::task::spawn_local(async move {
            let _open = open;
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "HTTP/1.1 connection to the app ended");
            }
        });
        Ok(H1 {
            sender,
            due,
            idle_since: now(),
            idle_limit: self.0.config.times.app_idle,
            used: false,
            _open: Rc::default(),
            _permit: None,
        })
    }
}

impl H1Peer {
    /// Keeps a connection for the next request.
    pub(super) fn give_back(&self, mut connection: H1, now: Instant) {
        let mut idle = self.idle.borrow_mut();
        if !connection.sender.is_closed() && idle.len() < MAX_IDLE {
            connection.idle_since = now;
            connection.used = true;
            idle.push(connection);
        }
    }

    /// Lets go of what is idle for too long. Whether anything remains.
    pub(super) fn sweep(&self, now: Instant) -> bool {
        let mut idle = self.idle.borrow_mut();
        idle.retain(|c| !c.sender.is_closed() && now.saturating_duration_since(c.idle_since) < c.idle_limit);
        !idle.is_empty()
    }

    fn take_idle(&self, options: &SendOptions<'_>) -> Option<H1> {
        if options.fresh {
            return None;
        }
        let now = now();
        let mut idle = self.idle.borrow_mut();
        while let Some(connection) = idle.pop() {
            let age = now.saturating_duration_since(connection.idle_since);
            if age >= connection.idle_limit || connection.sender.is_closed() {
                continue;
            }
            if age >= IDLE_LIMIT_UNSAFE && !options.idempotent {
                // What is too old for this request may do for another; those below are older still.
                idle.push(connection);
                return None;
            }
            return Some(connection);
        }
        None
    }
}
