//! The controller's own metrics, all on one screen.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
};

/// Counters and gauges.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Open connections of sidecars.
    pub connections: AtomicU64,
    /// Handshakes that failed or took too long.
    pub handshakes_failed: AtomicU64,
    /// Open discovery streams.
    pub streams: AtomicU64,
    /// Discovery responses sent.
    pub pushes: AtomicU64,
    /// Discovery responses refused by a sidecar.
    pub nacks: AtomicU64,
    /// Streams closed because a response was not answered in time.
    pub ack_timeouts: AtomicU64,
    /// Streams closed because of what they sent.
    pub protocol_errors: AtomicU64,
    /// Certificates issued.
    pub certificates_issued: AtomicU64,
    /// Certificate requests refused.
    pub certificates_refused: AtomicU64,
    /// Telemetry reports taken.
    pub reports: AtomicU64,
    /// Looks at the source that changed something.
    pub batches: AtomicU64,
    /// Milliseconds that a stream waits between two pushes.
    pub push_gap_ms: AtomicU64,
}

/// A value that is read when it is asked for.
#[derive(Debug)]
pub struct Sample {
    /// Name without `weft_controller_`.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// Value.
    pub value: u64,
}

impl Metrics {
    /// In the Prometheus text format.
    pub fn render(&self, more: &[Sample]) -> String {
        let mut text = String::new();
        let counters = [
            ("handshakes_failed_total", "TLS handshakes that failed", &self.handshakes_failed),
            ("pushes_total", "Discovery responses sent", &self.pushes),
            ("nacks_total", "Discovery responses refused", &self.nacks),
            ("ack_timeouts_total", "Streams closed for want of an answer", &self.ack_timeouts),
            ("protocol_errors_total", "Streams closed for what they sent", &self.protocol_errors),
            ("certificates_issued_total", "Certificates issued", &self.certificates_issued),
            ("certificates_refused_total", "Certificate requests refused", &self.certificates_refused),
            ("reports_total", "Telemetry reports taken", &self.reports),
            ("source_batches_total", "Looks at the source that changed something", &self.batches),
        ];
        for (name, help, value) in counters {
            write_one(&mut text, name, help, "counter", value.load(Ordering::Relaxed));
        }
        let gauges = [
            ("connections", "Open connections of sidecars", &self.connections),
            ("streams", "Open discovery streams", &self.streams),
            ("push_gap_milliseconds", "Pause between two pushes to a stream", &self.push_gap_ms),
        ];
        for (name, help, value) in gauges {
            write_one(&mut text, name, help, "gauge", value.load(Ordering::Relaxed));
        }
        for sample in more {
            let kind = if sample.name.ends_with("_total") { "counter" } else { "gauge" };
            write_one(&mut text, sample.name, sample.help, kind, sample.value);
        }
        text
    }
}

fn write_one(text: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "# HELP weft_controller_{name} {help}.\n# TYPE weft_controller_{name} {kind}\nweft_controller_{name} {value}"
    );
}
