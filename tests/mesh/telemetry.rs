//! Histograms per route: what `weft routes` says is what the clients did.

use std::time::Duration;

use weft_control_plane::cli::demo::mesh::wait;
use weft_harness::apps::{curl, load, output, rss_kib};

use crate::{ECHO, pair};

#[test]
fn weft_routes_counts_what_was_sent_and_measures_what_was_seen() {
    let Some(pair) = pair("weft_routes", &["--delay-ms", "20"]) else { return };
    let args = ["--url", ECHO, "--rate", "100", "--seconds", "3"];
    let summary = load(&pair.mesh, &pair.client.pod, &args).unwrap();
    assert_eq!(summary.failed, 0);
    let rows = || {
        let mut command = pair.mesh.weft(&["routes", "shop/echo", "--window", "10m", "-o", "json"]);
        let text = output(&mut command)?;
        Ok::<serde_json::Value, anyhow::Error>(serde_json::from_str(&text)?)
    };
    let outbound = |said: &serde_json::Value| {
        let rows = said["rows"].as_array().unwrap().clone();
        rows.into_iter().find(|row| row["direction"] == "outbound")
    };
    wait(Duration::from_secs(15), || Ok(outbound(&rows()?).is_some_and(|row| row["count"] == summary.sent)))
        .unwrap();
    let row = outbound(&rows().unwrap()).unwrap();
    let p50 = row["duration"]["p50_ms"].as_f64().unwrap();
    println!("figure: p50: {p50} ms by the sidecar, {} ms by the client", summary.p50_ms);
    assert!((18.0..40.0).contains(&p50), "{row}");
    assert_eq!(row["success_rate"], 1.0);
    let text = output(&mut pair.mesh.weft(&["routes", "shop/echo"])).unwrap();
    assert!(text.contains("shop/echo"), "{text}");
}

#[test]
fn who_calls_is_told_and_how_many_of_its_calls_failed() {
    let Some(pair) = pair("edges", &[]) else { return };
    for path in ["", "/status/404", "/status/500", "/status/503"] {
        let url = format!("{ECHO}{path}");
        curl(&pair.client.pod, &["-o", "/dev/null", &url]).unwrap();
    }
    let told = || {
        let edges = pair.mesh.api("/api/v1/edges")?;
        let of = |name: &str, what: &str| -> u64 {
            let edges = edges.as_array().into_iter().flatten();
            let own = edges.filter(|edge| edge["caller"].as_str().is_some_and(|who| who.ends_with(name)));
            own.filter_map(|edge| edge[what].as_u64()).sum()
        };
        Ok::<_, anyhow::Error>((of("/sa/client", "count"), of("/sa/client", "errors")))
    };
    let counted = wait(Duration::from_secs(15), || Ok(told()? == (4, 2)));
    counted.unwrap_or_else(|error| panic!("{error}: {:?}", told()));
}

#[test]
fn each_sidecar_has_prometheus_metrics_and_is_small() {
    let Some(pair) = pair("metrics", &[]) else { return };
    let idle = rss_kib(pair.client.proxy.id()).unwrap();
    let args = ["--url", ECHO, "--rate", "100", "--seconds", "1"];
    load(&pair.mesh, &pair.client.pod, &args).unwrap();
    let requests = pair.client.metric("weft_requests_total", &["direction=\"outbound\""]).unwrap();
    assert_eq!(requests, 100.0);
    let buckets = pair.client.metric("weft_request_duration_seconds_bucket", &["le=\"+Inf\""]).unwrap();
    assert_eq!(buckets, 100.0);
    println!("figure: idle sidecar: {idle} KiB resident");
    // A debug build is larger; `make soak` names the programs of a release build.
    if !cfg!(debug_assertions) || std::env::var_os("WEFT_PROGRAMS").is_some() {
        assert!(idle <= 12 * 1024, "{idle} KiB");
    }
}
