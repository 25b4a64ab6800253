//! Every metric family of the sidecar, on one screen.
//!
//! Why one screen: names, labels and help are a contract with dashboards and alerts, and who reviews it must see all of
//! it. What workers record stands in [`recorder`](super::recorder), how it is put together in
//! [`registry`](super::registry).

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// The plain counters: family, fixed labels, help. Variants that share a family stand together.
#[rustfmt::skip]
pub(super) const COUNTERS: [(Counter, &str, &str, &str); Counter::COUNT] = {
    use Counter as C;
    const IN: &str = r#"direction="inbound""#;
    const OUT: &str = r#"direction="outbound""#;
    [
        (C::OutboundAccepted, "weft_connections_total", OUT, "Connections accepted"),
        (C::InboundAccepted, "weft_connections_total", IN, ""),
        (C::OutboundShed, "weft_connections_shed_total", OUT, "Connections closed at once: a limit was reached"),
        (C::InboundShed, "weft_connections_shed_total", IN, ""),
        (C::OutboundBytesSent, "weft_tcp_bytes_total", r#"direction="outbound",way="sent""#, "Opaque bytes"),
        (C::OutboundBytesReceived, "weft_tcp_bytes_total", r#"direction="outbound",way="received""#, ""),
        (C::InboundBytesSent, "weft_tcp_bytes_total", r#"direction="inbound",way="sent""#, ""),
        (C::InboundBytesReceived, "weft_tcp_bytes_total", r#"direction="inbound",way="received""#, ""),
        (C::AcceptErrors, "weft_accept_errors_total", "", "accept() failed (descriptors used up)"),
        (C::LoopsRefused, "weft_loops_refused_total", "", "Connections whose destination was one of our listeners"),
        (C::DetectTimeouts, "weft_detect_timeouts_total", "", "Connections whose client stayed silent"),
        (C::Connects, "weft_connects_total", r#"result="ok""#, "Connections opened to endpoints and apps"),
        (C::ConnectRefusals, "weft_connects_total", r#"result="refused""#, ""),
        (C::ConnectTimeouts, "weft_connects_total", r#"result="timeout""#, ""),
        (C::ConnectErrors, "weft_connects_total", r#"result="failed""#, ""),
        (C::IdentityMismatches, "weft_identity_mismatch_total", "", "Handshakes whose peer was not who it must be"),
        (C::WrongPod, "weft_wrong_pod_total", "", "Inbound connections that meant another pod"),
        (C::HandshakesFailed, "weft_handshakes_failed_total", "", "Inbound TLS handshakes that failed"),
        (C::PlaintextRefused, "weft_plaintext_refused_total", "", "Plaintext connections refused in strict mode"),
        (C::Denied, "weft_denied_total", "", "Requests and connections denied by authorization"),
        (C::PeerExpired, "weft_connections_ended_total", r#"reason="peer_expired""#, "Open connections that were made to end, by what their peer or we have lost: a certificate's time, trust, our own certificate"),
        (C::PeerUntrusted, "weft_connections_ended_total", r#"reason="peer_untrusted""#, ""),
        (C::OwnExpired, "weft_connections_ended_total", r#"reason="own_expired""#, ""),
        (C::Redispatched, "weft_redispatched_total", "", "Requests sent elsewhere because they were not sent or not processed"),
        (C::Retries, "weft_retries_total", "", "Attempts beyond the first, by policy"),
        (C::BudgetExhausted, "weft_retry_budget_exhausted_total", "", "Retries that the budget refused"),
        (C::ReplayOverflow, "weft_replay_overflow_total", "", "Request bodies too large to be sent again"),
        (C::Ejections, "weft_ejections_total", "", "Endpoints ejected"),
        (C::RequestsShed, "weft_requests_shed_total", "", "Requests refused because too many were in flight, or memory was short"),
        (C::RateLimited, "weft_rate_limited_total", "", "Requests refused because a rate limit was used up"),
        (C::Panics, "weft_panics_total", "", "Connections that ended in a panic"),
        (C::DiscoveryTimeouts, "weft_discovery_timeouts_total", "", "Destinations that the control plane did not answer in time"),
        (C::DiscoveryShed, "weft_discovery_shed_total", "", "Connections refused because too many waited for discovery"),
        (C::Reconnects, "weft_control_reconnects_total", "", "Times the control stream was opened"),
        (C::Nacks, "weft_control_nacks_total", "", "Resources refused"),
        (C::Renewals, "weft_certificate_renewals_total", r#"result="ok""#, "Certificates asked for"),
        (C::RenewalFailures, "weft_certificate_renewals_total", r#"result="failed""#, ""),
        (C::TelemetryDropped, "weft_telemetry_dropped_total", "", "Telemetry items dropped because a buffer was full"),
        (C::LogLinesDropped, "weft_log_lines_dropped_total", "", "Log lines dropped because the pipe was blocked"),
    ]
};

/// The gauges: family, fixed labels, help.
#[rustfmt::skip]
pub(super) const GAUGES: [(Gauge, &str, &str, &str); Gauge::COUNT] = {
    use Gauge as G;
    const IN: &str = r#"direction="inbound""#;
    const OUT: &str = r#"direction="outbound""#;
    [
        (G::OutboundConnections, "weft_connections", OUT, "Connections open"),
        (G::InboundConnections, "weft_connections", IN, ""),
        (G::PooledConnections, "weft_pooled_connections", "", "Connections kept for reuse or in use"),
        (G::Connected, "weft_control_connected", "", "1 while the control stream is up"),
        (G::LastContact, "weft_control_last_contact_seconds", "", "Seconds since the control plane was last heard"),
        (G::NackedResources, "weft_control_nacked_resources", "", "Resources whose newest version was refused"),
        (G::Destinations, "weft_discovery_destinations", "", "Destinations subscribed"),
        (G::DiscoveryWaiters, "weft_discovery_waiters", "", "Connections that wait for discovery"),
        (G::CertificateNotAfter, "weft_certificate_not_after_seconds", "", "End of the workload certificate, Unix time; 0: none"),
        (G::TrustRoots, "weft_trust_roots", "", "Roots trusted, over all trust domains"),
    ]
};

pub(super) const REQUESTS: (&str, &str) =
    ("weft_requests_total", "Requests, by class: ok, client_error, server_error, proxy");
pub(super) const REQUEST_RETRIES: (&str, &str) =
    ("weft_request_retries_total", "Retries, by the class that the request ended in");
pub(super) const FIRST_BYTE: (&str, &str) = (
    "weft_first_byte_seconds",
    "From the request's head to the first byte of the response's body, or its end",
);
pub(super) const DURATION: (&str, &str) =
    ("weft_request_duration_seconds", "From the request's head to the end of the response");
pub(super) const ERRORS: (&str, &str) =
    ("weft_proxy_errors_total", "Answers made by this sidecar, by the code of weft-reason");
pub(super) const PROCESS_RSS: (&str, &str) = ("process_resident_memory_bytes", "Resident memory");
pub(super) const PROCESS_FDS: (&str, &str) = ("process_open_fds", "Open descriptors");
pub(super) const CONNTRACK: (&str, &str) =
    ("weft_conntrack_entries", "Connections that the kernel tracks in this network namespace");
pub(super) const CONNTRACK_MAX: (&str, &str) = ("weft_conntrack_entries_max", "And how many it can");
pub(super) const LOCAL_PORTS: (&str, &str) =
    ("weft_local_ports_used", "Local ports in use towards the address that takes most of them");
pub(super) const LOCAL_PORTS_MAX: (&str, &str) =
    ("weft_local_ports_max", "Local ports that there are for one address");

macro_rules! closed_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)* }
        impl $name {
            pub(super) const COUNT: usize = [$($name::$variant,)*].len();
        }
    };
}

closed_enum! {
    /// A plain counter; what each means stands in the table above.
    Counter {
        /// See the table.
        OutboundAccepted,
        /// See the table.
        InboundAccepted,
        /// See the table.
        OutboundShed,
        /// See the table.
        InboundShed,
        /// See the table.
        OutboundBytesSent,
        /// See the table.
        OutboundBytesReceived,
        /// See the table.
        InboundBytesSent,
        /// See the table.
        InboundBytesReceived,
        /// See the table.
        AcceptErrors,
        /// See the table.
        LoopsRefused,
        /// See the table.
        DetectTimeouts,
        /// See the table.
        Connects,
        /// See the table.
        ConnectRefusals,
        /// See the table.
        ConnectTimeouts,
        /// See the table.
        ConnectErrors,
        /// See the table.
        IdentityMismatches,
        /// See the table.
        WrongPod,
        /// See the table.
        HandshakesFailed,
        /// See the table.
        PlaintextRefused,
        /// See the table.
        Denied,
        /// See the table.
        PeerExpired,
        PeerUntrusted,
        OwnExpired,
        /// See the table.
        Redispatched,
        /// See the table.
        Retries,
        /// See the table.
        BudgetExhausted,
        /// See the table.
        ReplayOverflow,
        /// See the table.
        Ejections,
        /// See the table.
        RequestsShed,
        /// See the table.
        RateLimited,
        /// See the table.
        Panics,
        /// See the table.
        DiscoveryTimeouts,
        /// See the table.
        DiscoveryShed,
        /// See the table.
        Reconnects,
        /// See the table.
        Nacks,
        /// See the table.
        Renewals,
        /// See the table.
        RenewalFailures,
        /// See the table.
        TelemetryDropped,
        /// See the table.
        LogLinesDropped,
    }
}

closed_enum! {
    /// A level; what each means stands in the table above.
    Gauge {
        /// See the table.
        OutboundConnections,
        /// See the table.
        InboundConnections,
        /// See the table.
        PooledConnections,
        /// See the table.
        Connected,
        /// See the table.
        LastContact,
        /// See the table.
        NackedResources,
        /// See the table.
        Destinations,
        /// See the table.
        DiscoveryWaiters,
        /// See the table.
        CertificateNotAfter,
        /// See the table.
        TrustRoots,
    }
}

/// What is counted outside the workers: the control half's and the process' own numbers.
#[derive(Debug)]
pub struct Shared {
    counters: [AtomicU64; Counter::COUNT],
    gauges: [AtomicI64; Gauge::COUNT],
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            counters: std::array::from_fn(|_| AtomicU64::new(0)),
            gauges: std::array::from_fn(|_| AtomicI64::new(0)),
        }
    }
}

impl Shared {
    /// Adds one to a counter.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Adds to a counter.
    pub fn add(&self, counter: Counter, n: u64) {
        if let Some(cell) = self.counters.get(counter as usize) {
            cell.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// Moves a gauge up or down.
    pub fn gauge(&self, gauge: Gauge, by: i64) {
        if let Some(cell) = self.gauges.get(gauge as usize) {
            cell.fetch_add(by, Ordering::Relaxed);
        }
    }

    /// Sets a gauge.
    pub fn set(&self, gauge: Gauge, to: i64) {
        if let Some(cell) = self.gauges.get(gauge as usize) {
            cell.store(to, Ordering::Relaxed);
        }
    }

    /// A counter's value.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(counter as usize).map_or(0, |cell| cell.load(Ordering::Relaxed))
    }

    /// A gauge's value.
    pub fn level(&self, gauge: Gauge) -> i64 {
        self.gauges.get(gauge as usize).map_or(0, |cell| cell.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_and_gauge_stands_at_its_place() {
        for (i, (counter, ..)) in COUNTERS.iter().enumerate() {
            assert_eq!(*counter as usize, i, "{counter:?}");
        }
        for (i, (gauge, ..)) in GAUGES.iter().enumerate() {
            assert_eq!(*gauge as usize, i, "{gauge:?}");
        }
    }
}
