//! A connection that reaches the pod: authenticate, detect, serve.
//!
//! Why the ClientHello is read before anything is decided: mesh traffic is marked by its ALPN. TLS without that
//! mark belongs to the app and is passed through (permissive) or refused (strict), and the server name says
//! which pod the caller means: a reused pod IP is never served by the wrong pod.

mod http;
mod tcp;

use std::{net::IpAddr, rc::Rc, sync::Arc, time::SystemTime};

use tokio_rustls::{TlsAcceptor, server::TlsStream};
use weft_core::{
    detect::Detected,
    identity::{SpiffeId, Validity},
    policy::{InboundPolicy, MtlsMode, PortPolicy, Protocol},
};

use crate::{
    detect::{self, Begun, First},
    error::{Component, Error},
    listener::Accepted,
    tcp::{Prefixed, reset},
    telemetry::metrics::Counter,
    tls::{self, Alpn},
    worker::{Worker, port_policy},
};

/// Who calls, on one connection.
pub(crate) struct Caller {
    /// The authenticated identity; `None`: plaintext.
    identity: Option<SpiffeId>,
    address: IpAddr,
    /// How long the caller's certificate is good.
    validity: Option<Validity>,
}

/// Serves one connection to the pod.
pub(crate) async fn serve(worker: Rc<Worker>, mut accepted: Accepted) {
    let Some(policy) = worker.inbound_policy() else {
        return refuse(&worker, &accepted, &Error::NotReady);
    };
    let port = port_policy(&policy, accepted.original.port()).clone();
    let silence = match port.protocol {
        // Only mesh traffic and the app's own plaintext come here: a silent client may be of a server-first app.
        Protocol::Detect | Protocol::Opaque | Protocol::Tls => Some(port.detect_timeout),
        Protocol::Http1 | Protocol::Http2 | Protocol::Grpc => Some(worker.config.times.header),
    };
    let begun = detect::begin(&mut accepted.stream, silence, worker.config.times.header).await;
    let first = match begun {
        Ok(Begun::Spoke(first)) => first,
        Ok(Begun::Silent) => {
            worker.recorder.count(Counter::DetectTimeouts);
            if matches!(port.protocol, Protocol::Http1 | Protocol::Http2 | Protocol::Grpc) {
                return;
            }
            First::nothing()
        }
        Ok(Begun::Ended) => First::nothing(),
        Err(_) => return,
    };
    if let Detected::Tls { sni, alpn, .. } = &first.detected {
        let offered = alpn.iter().find_map(|name| Alpn::from_name(name));
        if let Some(alpn) = offered {
            let named = sni.as_deref().is_some_and(|sni| worker.config.pod_uid.is_named_by(sni));
            return mesh(worker, accepted, policy, port, first, alpn, named).await;
        }
    }
    plaintext(worker, accepted, port, first).await;
}

/// A caller's sidecar: mTLS, for exactly this pod.
async fn mesh(
    worker: Rc<Worker>,
    accepted: Accepted,
    policy: Arc<InboundPolicy>,
    port: Arc<PortPolicy>,
    first: First,
    alpn: Alpn,
    named: bool,
) {
    if !named {
        // Before the handshake ends: the caller knows that nothing was sent, and takes another endpoint.
        worker.recorder.count(Counter::WrongPod);
        tracing::warn!(client = %accepted.client, "refused: the caller means another pod than this one");
        return reset(&accepted.stream);
    }
    if alpn == Alpn::Tcp && worker.drain.is_refusing() {
        return reset(&accepted.stream);
    }
    let Some(config) = worker.server_config(&policy) else {
        return refuse(&worker, &accepted, &Error::NotReady);
    };
    let Accepted { stream, client, original } = accepted;
    let accepting = TlsAcceptor::from(config).accept(Prefixed::new(first.bytes, stream));
    let tls = match tokio::time::timeout(worker.config.times.handshake, accepting).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            worker.recorder.count(Counter::HandshakesFailed);
            tracing::warn!(%client, %error, "TLS handshake failed");
            return;
        }
        Err(_) => {
            worker.recorder.count(Counter::HandshakesFailed);
            return tracing::warn!(%client, "TLS handshake took too long");
        }
    };
    let caller = match authenticated(&tls, client.ip()) {
        Ok(caller) => Rc::new(caller),
        Err(error) => {
            worker.recorder.count(Counter::HandshakesFailed);
            return tracing::warn!(%client, %error, "the caller's certificate names nobody");
        }
    };
    match alpn {
        Alpn::H2 => http::serve_mesh(worker, tls, client, original, port, caller).await,
        Alpn::Tcp => tcp::serve(worker, tls, original, port, caller).await,
    }
}

fn authenticated<S>(tls: &TlsStream<S>, address: IpAddr) -> Result<Caller, tls::TlsError> {
    let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default();
    Ok(Caller {
        identity: Some(tls::peer_identity(certificates)?),
        address,
        validity: Some(tls::peer_validity(certificates)?),
    })
}

/// A caller outside the mesh.
async fn plaintext(worker: Rc<Worker>, accepted: Accepted, port: Arc<PortPolicy>, first: First) {
    let caller = Rc::new(Caller { identity: None, address: accepted.client.ip(), validity: None });
    let strict = port.mtls == MtlsMode::Strict;
    let http = match first.detected {
        Detected::Http1 => Some(false),
        Detected::Http2 => Some(true),
        Detected::Tls { .. } | Detected::Opaque | Detected::NeedMore => None,
    };
    match http {
        // An HTTP caller is told why: each of its requests is answered.
        Some(h2) if port.protocol != Protocol::Opaque || strict => {
            http::serve_plain(worker, accepted, port, caller, first.bytes, h2).await;
        }
        _ if strict => {
            worker.recorder.count(Counter::PlaintextRefused);
            refuse(&worker, &accepted, &Error::PlaintextRefused);
        }
        _ if worker.drain.is_refusing() => reset(&accepted.stream),
        _ => {
            let original = accepted.original;
            let stream = Prefixed::new(first.bytes, accepted.stream);
            tcp::serve(worker, stream, original, port, caller).await;
        }
    }
}

/// Ends a connection that cannot be answered in its own protocol.
fn refuse(worker: &Worker, accepted: &Accepted, error: &Error) {
    let answer = error.answer();
    worker.recorder.error(answer.code);
    tracing::warn!(component = Component::Inbound.as_str(), code = answer.code, %error,
        client = %accepted.client, destination = %accepted.original, "connection refused");
    reset(&accepted.stream);
}

impl Caller {
    /// As authorization sees it.
    fn peer(&self) -> weft_core::authz::Peer<'_> {
        weft_core::authz::Peer { identity: self.identity.as_ref(), address: self.address }
    }

    /// Ends when the caller's certificate does; never for plaintext.
    async fn expired(&self) {
        let Some(validity) = self.validity else { return std::future::pending().await };
        // The wall clock may jump: it is read again at least every ten minutes.
        while let Ok(left) = validity.not_after.duration_since(SystemTime::now()) {
            tokio::time::sleep(left.min(std::time::Duration::from_secs(600))).await;
        }
    }
}
