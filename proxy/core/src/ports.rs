//! The ports that every part of Weft agrees on. Capture rules, proxy and controller read them here.

/// Outbound listener of the sidecar: captured connections that the app opens.
pub const OUTBOUND: u16 = 14_001;
/// Inbound listener of the sidecar: captured connections that reach the pod.
pub const INBOUND: u16 = 14_006;
/// The sidecar's open admin port: `/live`, `/ready`, `/metrics`.
pub const ADMIN: u16 = 14_021;
/// The controller's discovery port (mTLS): ADS and telemetry.
pub const DISCOVERY: u16 = 14_010;
/// The controller's certificate port (server-authenticated TLS and the workload's token).
pub const IDENTITY: u16 = 14_011;
/// The controller's HTTP port on loopback: the JSON API that `weft` reads.
pub const API: u16 = 14_080;

/// The user that `weft-proxy` runs as; connections of this user are not captured.
pub const PROXY_UID: u32 = 2_102;
