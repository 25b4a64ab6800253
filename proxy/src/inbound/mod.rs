//! A connection that reaches the pod: authenticate, detect, serve.
//!
//! Why the ClientHello is read before anything is decided: mesh traffic is marked by its ALPN. TLS without that
//! mark belongs to the app and is passed through (permissive) or refused (strict), and the server name says
//! which pod the caller means: a reused pod IP is never served by the wrong pod.

mod http;
mod permission;
mod tcp;

use std::{net::IpAddr, rc::Rc, sync::Arc};

use tokio_rustls::{TlsAcceptor, server::TlsStream};
use weft_core::{
    detect::Detected,
    identity::SpiffeId,
    policy::{InboundPolicy, MtlsMode, PortPolicy, Protocol},
};

use crate::{
    accepted::Accepted,
    belief::{Belief, Lost},
    detect::{self, Begun, First},
    direction::Direction,
    error::Error,
    front,
    tcp::{Prefixed, Stream, reset},
    telemetry::metrics::Counter,
    tls::{self, Alpn, Material, Role},
    worker::{Worker, port_policy},
};

/// Who calls, on one connection.
pub(crate) struct Caller {
    /// The authenticated identity; `None`: plaintext.
    identity: Option<SpiffeId>,
    address: IpAddr,
    /// For how long.
    belief: Option<Belief>,
}

/// Serves one connection to the pod.
pub(crate) async fn serve(worker: Rc<Worker>, mut accepted: Accepted) {
    let Some(policy) = worker.inbound_policy() else {
        return accepted.refuse(&worker.recorder, Direction::Inbound, &Error::NotReady);
    };
    let port = port_policy(&policy, accepted.original.port());
    let http = port.protocol.is_http();
    // Where the client must speak first (HTTP, and a sidecar or a request where no stranger's bytes are admitted), a slow
    // one is waited for: what it says may admit it.
    let stranger = Caller::outside(accepted.client.ip());
    let must_speak = http || port.mtls == MtlsMode::Strict || !tcp::permits(port, &stranger);
    let silence = if must_speak { worker.config.times.header } else { port.detect_timeout };
    match detect::begin(&mut accepted.stream, Some(silence), worker.config.times.header).await {
        Ok(Begun::Spoke(first)) => spoken(worker, accepted, first).await,
        Ok(Begun::Silent) => {
            worker.recorder.count(Counter::DetectTimeouts);
            if http {
                // Nobody is there to be answered.
            } else if must_speak {
                spoken(worker, accepted, First::nothing()).await;
            } else if let Some((accepted, first)) = Box::pin(tcp::whoever_speaks(&worker, accepted)).await {
                spoken(worker, accepted, first).await;
            }
        }
        Ok(Begun::Ended) => spoken(worker, accepted, First::nothing()).await,
        Err(_) => {}
    }
}

/// Serves a connection of which it is known how it begins, under the policy of now.
async fn spoken(worker: Rc<Worker>, accepted: Accepted, first: First) {
    let Some(policy) = worker.inbound_policy() else {
        return accepted.refuse(&worker.recorder, Direction::Inbound, &Error::NotReady);
    };
    let port = port_policy(&policy, accepted.original.port()).clone();
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
    // Before the configuration is taken: should trust change in between, the caller is looked at again.
    let own = worker.material.borrow().clone();
    let Some(config) = worker.server_config(&policy) else {
        return accepted.refuse(&worker.recorder, Direction::Inbound, &Error::NotReady);
    };
    let Accepted { stream, client, original, open } = accepted;
    let accepting = TlsAcceptor::from(config).accept(Prefixed::new(first.bytes, stream));
    let tls = match tokio::time::timeout(worker.config.times.handshake, accepting).await {
        // Boxed: it is handed on five times, and each that has it in its hands would have room for it.
        Ok(Ok(tls)) => Box::new(tls),
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
    let caller = match authenticated(&worker, &tls, client.ip(), own.as_deref()) {
        Ok(caller) => Rc::new(caller),
        Err(error) => {
            worker.recorder.count(Counter::HandshakesFailed);
            return tracing::warn!(%client, %error, "the caller's certificate names nobody");
        }
    };
    let (policy, material) = (worker.inbound_policy(), worker.material.borrow().clone());
    if !caller.is_trusted(policy.as_deref(), material.as_deref()) {
        // Whom we trust has changed since the handshake began.
        worker.recorder.count(Counter::HandshakesFailed);
        tracing::warn!(%client, "the caller's certificate is not trusted any more");
        return reset(tls.tcp());
    }
    // Both may have been offered: the handshake has agreed on one.
    match tls.get_ref().1.alpn_protocol().and_then(Alpn::from_name).unwrap_or(alpn) {
        Alpn::H2 => Box::pin(http::serve_mesh(worker, tls, client, original, port, caller, open)).await,
        Alpn::Tcp if port.protocol.is_http() => {
            Box::pin(tcp::serve_declared_http(&worker, tls, original, &caller)).await;
            drop(open);
        }
        Alpn::Tcp => {
            Box::pin(tcp::serve(&worker, tls, original, &caller)).await;
            drop(open);
        }
    }
}

fn authenticated<S>(
    worker: &Worker,
    tls: &TlsStream<S>,
    address: IpAddr,
    own: Option<&Material>,
) -> Result<Caller, tls::TlsError> {
    let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default();
    let belief = Belief::new(certificates, Role::Client, own, worker.jitter())?;
    Ok(Caller { identity: Some(belief.identity().clone()), address, belief: Some(belief) })
}

/// A caller outside the mesh.
async fn plaintext(worker: Rc<Worker>, accepted: Accepted, port: Arc<PortPolicy>, first: First) {
    let caller = Rc::new(Caller::outside(accepted.client.ip()));
    let strict = port.mtls == MtlsMode::Strict;
    let http = match first.detected {
        Detected::Http1 => Some(false),
        Detected::Http2 => Some(true),
        Detected::Tls { .. } | Detected::Opaque | Detected::NeedMore => None,
    };
    let declared = port.protocol.is_http();
    match http {
        // An HTTP caller is told why: each of its requests is answered.
        Some(h2) if port.protocol != Protocol::Opaque || strict => {
            Box::pin(http::serve_plain(worker, accepted, port, caller, first.bytes, h2)).await;
        }
        _ if strict => {
            worker.recorder.count(Counter::PlaintextRefused);
            accepted.refuse(&worker.recorder, Direction::Inbound, &Error::PlaintextRefused);
        }
        _ if worker.drain.is_refusing() => reset(&accepted.stream),
        // Handed on as bytes, it would be a request that nobody has looked at.
        _ if declared && first.detected == Detected::Opaque && !first.bytes.is_empty() => {
            front::not_http(&worker.recorder, accepted, Direction::Inbound).await;
        }
        _ => {
            let Accepted { stream, original, open, .. } = accepted;
            let stream = Prefixed::new(first.bytes, stream);
            Box::pin(tcp::serve(&worker, stream, original, &caller)).await;
            drop(open);
        }
    }
}

impl Caller {
    /// Somebody who showed no certificate.
    fn outside(address: IpAddr) -> Self {
        Self { identity: None, address, belief: None }
    }

    /// Whether mTLS is required there and this one shows no identity.
    fn must_not_speak_plaintext(&self, port: &PortPolicy) -> bool {
        self.identity.is_none() && port.mtls == MtlsMode::Strict
    }

    /// As authorization sees it.
    fn peer(&self) -> weft_core::authz::Peer<'_> {
        weft_core::authz::Peer { identity: self.identity.as_ref(), address: self.address }
    }

    /// Whether the caller's certificate would be accepted now; plaintext has none to lose.
    fn is_trusted(&self, policy: Option<&InboundPolicy>, material: Option<&Material>) -> bool {
        let Some(belief) = &self.belief else { return true };
        self.is_welcome(policy) && belief.holds(material).is_ok()
    }

    /// Whether the caller's trust domain is one of those that may call.
    fn is_welcome(&self, policy: Option<&InboundPolicy>) -> bool {
        let Some(identity) = &self.identity else { return true };
        let mut domains = policy.into_iter().flat_map(|policy| &policy.trust_domains);
        domains.any(|domain| domain.as_str() == identity.trust_domain())
    }

    /// Ends when the caller's certificate is believed no more: it has run out or was revoked, or its root or trust
    /// domain has gone, or our own certificate. Never for plaintext.
    async fn distrusted(&self, worker: &Worker) -> Lost {
        let Some(belief) = &self.belief else { return std::future::pending().await };
        let mut policy = worker.discovery.inbound();
        let unwelcome = async {
            loop {
                let known = policy.borrow_and_update().clone();
                if !self.is_welcome(known.as_deref()) {
                    return Lost::Untrusted;
                }
                drop(known);
                if policy.changed().await.is_err() {
                    // The control half has ended: nothing will change any more.
                    return std::future::pending().await;
                }
            }
        };
        let lost = tokio::select! {
            lost = unwelcome => lost,
            lost = belief.lost(worker.material.clone()) => lost,
        };
        worker.recorder.count(lost.counter());
        lost
    }

    /// Ends when the caller may hold no longer what it has open at a port; says why. `permits` is asked now and at
    /// every change of policy.
    async fn revoked(
        &self,
        worker: &Worker,
        number: u16,
        permits: impl Fn(&PortPolicy) -> bool,
    ) -> &'static str {
        let mut policy = worker.discovery.inbound();
        let denied = async {
            loop {
                let known = policy.borrow_and_update().clone();
                let port = known.as_deref().map(|policy| port_policy(policy, number));
                if port.is_some_and(|port| self.must_not_speak_plaintext(port)) {
                    worker.recorder.count(Counter::PlaintextRefused);
                    return "plaintext_refused";
                }
                if !port.is_some_and(|port| permits(port)) {
                    worker.recorder.count(Counter::Denied);
                    return "denied";
                }
                drop(known);
                if policy.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        tokio::select! {
            biased;
            why = denied => why,
            lost = self.distrusted(worker) => lost.as_str(),
        }
    }
}
