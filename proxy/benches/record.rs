//! What it costs to record one request. `cargo bench -p weft-proxy --bench record`.
//!
//! Why beside the sidecar and not beside the core: histograms belong to telemetry, and the core has none.

use std::time::Duration;

use divan::{Bencher, black_box};
use weft_core::classify::Class;
use weft_proxy::{
    direction::Direction,
    telemetry::recorder::{Recorder, SeriesKey},
};

fn main() {
    divan::main();
}

fn key() -> SeriesKey {
    SeriesKey {
        direction: Direction::Outbound,
        parent: "shop/web:80".into(),
        route: "HTTPRoute/shop/web/0".into(),
        backend: "shop/web-v1:80".into(),
        protocol: "http1",
    }
}

/// Two histograms, first byte and whole request, of a series that is held.
#[divan::bench]
fn histograms(bencher: Bencher<'_, '_>) {
    let series = Recorder::new(10).series(&key());
    let mut micros = 0;
    bencher.bench_local(|| {
        // Up to 65 ms: many buckets, as latencies have.
        micros = (micros + 997) & 0xffff;
        let full = Duration::from_micros(micros);
        series.record(black_box(Class::Ok), Some(full / 2), full, 0);
    });
}

/// The series looked up by its key, as the first request of a kind does.
#[divan::bench]
fn series_by_key(bencher: Bencher<'_, '_>) {
    let recorder = Recorder::new(10);
    let key = key();
    bencher.bench_local(|| recorder.series(black_box(&key)));
}
