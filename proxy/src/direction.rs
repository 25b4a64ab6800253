//! Outbound or inbound: the two halves of a sidecar, as seen from its app.
//!
//! Why one word for limits, drain, telemetry and what callers are told: they all speak of the same two halves, and whoever
//! compares a log line with a metric must find the same name in both.

use weft_proto::pb::v1 as pb;

/// Which way a connection goes, seen from the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The app calls.
    Outbound,
    /// The app is called.
    Inbound,
}

impl Direction {
    /// As a label, and as what begins `weft-reason`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl From<Direction> for pb::Direction {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Self::Outbound,
            Direction::Inbound => Self::Inbound,
        }
    }
}
