//! A connection that the app opens: discover where it goes, detect what it speaks, serve it.
//!
//! Why detection comes after discovery: most ports declare their protocol, and a destination outside the mesh
//! is forwarded as bytes without a look. For the rest, a client that stays silent makes the proxy connect to
//! the server, and whoever speaks first decides: a server-first protocol never waits for a timeout twice.

mod http;
mod tcp;

use std::rc::Rc;

use weft_core::{detect::Detected, policy::Protocol};

use crate::{
    accepted::Accepted,
    detect::{self, Begun, First},
    direction::Direction,
    discovery::{DiscoveryError, Target},
    error::Error,
    front,
    telemetry::metrics::Counter,
    worker::{Destination, Worker},
};

/// Serves one captured connection of the app.
///
/// What carries bytes is boxed: a connection of HTTP, of which an app may leave thousands idle, has no room for it.
pub(crate) async fn serve(worker: Rc<Worker>, accepted: Accepted) {
    let original = accepted.original;
    let refuse = |error: &Error| accepted.refuse(&worker.recorder, Direction::Outbound, error);
    let destination = match worker.known_destination(original) {
        Some(known) => known,
        None => match worker.discovery.resolve(original).await {
            Ok(Target::Service(watched)) => worker.destination(original, watched),
            Ok(Target::Outside) => return Box::pin(tcp::outside(&worker, accepted)).await,
            Ok(Target::Denied) => return refuse(&Error::EgressDenied),
            Err(DiscoveryError::NotReady) => return refuse(&Error::NotReady),
            Err(DiscoveryError::Timeout) => return refuse(&Error::DiscoveryTimeout),
            Err(DiscoveryError::Overloaded) => return refuse(&Error::Overloaded),
        },
    };
    destined(worker, accepted, destination).await;
}

async fn destined(worker: Rc<Worker>, mut accepted: Accepted, destination: Rc<Destination>) {
    let service = destination.watched.policy().service.clone();
    let silence = match service.protocol {
        Protocol::Opaque | Protocol::Tls => {
            return Box::pin(tcp::to_service(&worker, accepted, &destination, First::nothing())).await;
        }
        // The client of a declared HTTP port will speak: there is nothing to decide but the version.
        Protocol::Http1 | Protocol::Http2 | Protocol::Grpc => None,
        Protocol::Detect if destination.server_first.get() => Some(std::time::Duration::ZERO),
        Protocol::Detect => Some(service.detect_timeout),
    };
    // A client that has begun and stops (a bare word to a line protocol) waits no longer than a silent one.
    let slow = if silence.is_some() { service.detect_timeout } else { worker.config.times.header };
    match detect::begin(&mut accepted.stream, silence, slow).await {
        Ok(Begun::Spoke(first)) => spoken(worker, accepted, destination, first).await,
        Ok(Begun::Silent) => {
            worker.recorder.count(Counter::DetectTimeouts);
            let heard = Box::pin(tcp::whoever_speaks(&worker, accepted, &destination)).await;
            if let Some((accepted, first)) = heard {
                spoken(worker, accepted, destination, first).await;
            }
        }
        Ok(Begun::Ended) => {
            Box::pin(tcp::to_service(&worker, accepted, &destination, First::nothing())).await;
        }
        Err(_) => {}
    }
}

async fn spoken(worker: Rc<Worker>, accepted: Accepted, destination: Rc<Destination>, first: First) {
    let protocol = destination.watched.policy().service.protocol;
    let declared = protocol.is_http();
    match first.detected {
        Detected::Http1 => http::serve(worker, accepted, destination, first.bytes, false).await,
        Detected::Http2 => http::serve(worker, accepted, destination, first.bytes, true).await,
        // Handed on as bytes, it would be a request that nobody has looked at.
        Detected::Opaque if declared && !first.bytes.is_empty() => {
            front::not_http(&worker.recorder, accepted, Direction::Outbound).await;
        }
        Detected::Tls { .. } | Detected::Opaque | Detected::NeedMore => {
            Box::pin(tcp::to_service(&worker, accepted, &destination, first)).await;
        }
    }
}
