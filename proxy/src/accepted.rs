//! A captured connection, and what counts it for as long as anything of it is there.
//!
//! Why the count is handed on with the connection: an upgraded connection outlives the HTTP connection that it was, and is
//! open none the less.

use std::{net::SocketAddr, rc::Rc};

use tokio::net::TcpStream;

use crate::{
    direction::Direction,
    drain::{ConnectionGuard, LocalDrain},
    error::Error,
    limits::Slot,
    tcp::reset,
    telemetry::{
        metrics::Gauge,
        recorder::{Level, Recorder},
    },
};

/// A captured connection.
pub(crate) struct Accepted {
    pub(crate) stream: TcpStream,
    /// Who connected.
    pub(crate) client: SocketAddr,
    /// Where it wanted to go.
    pub(crate) original: SocketAddr,
    /// Kept by whatever outlives the function that serves it.
    pub(crate) open: Rc<Open>,
}

/// One open connection, as it counts for limits, drain and telemetry.
pub(crate) struct Open {
    _slot: Slot,
    _guard: ConnectionGuard,
    _level: Level,
}

impl Accepted {
    /// Ends a connection that cannot be answered in its own protocol: its client sees a refusal, not a hang and not a
    /// clean end.
    pub(crate) fn refuse(&self, recorder: &Recorder, direction: Direction, error: &Error) {
        let code = error.answer().code;
        recorder.error(code);
        tracing::warn!(component = direction.as_str(), code, %error, client = %self.client,
            destination = %self.original, "connection refused");
        reset(&self.stream);
    }
}

impl Open {
    pub(crate) fn count(slot: Slot, drain: &LocalDrain, recorder: &Recorder, side: Direction) -> Rc<Self> {
        let gauge = match side {
            Direction::Outbound => Gauge::OutboundConnections,
            Direction::Inbound => Gauge::InboundConnections,
        };
        Rc::new(Self { _slot: slot, _guard: drain.connection(side), _level: recorder.raise(gauge) })
    }
}
