//! The official Gateway API suite, unmodified, with pods that the webhook gave their sidecars.

use std::path::Path;

use weft_harness::cluster::{Cluster, conformance::MESH_NAMESPACES, images};

use crate::mesh_or_skip;

/// Of the mesh profiles: two core tests for gRPC, seven for HTTP, seven of its extended ones, and six that count for
/// nothing and can fail.
const TESTS: usize = 22;

/// `apps` says whose echo pair answers.
fn passes(cluster: &Cluster, apps: &str, successes: u32) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let report = folder.join(format!("conformance-{apps}-{successes}.yaml"));
    let log = folder.join(format!("conformance-{apps}-{successes}.log"));
    let began = std::time::Instant::now();
    let flags = [
        // What it deploys stays a moment, to be looked at.
        "--cleanup-base-resources=false".to_owned(),
        format!("--timeout-config-overrides=RequiredConsecutiveSuccesses:{successes}"),
    ];
    let passed = cluster.conformance(&report, Some(&log), &flags).unwrap();
    let said = std::fs::read_to_string(&log).unwrap();
    let of = |result: &str| said.matches(&format!("\n    --- {result}: TestConformance/Mesh")).count();
    println!(
        "figure: official mesh tests passed with {successes} successes in a row, by sidecars of the webhook in front \
         of the {apps} echo pair: {} of {} (bound {TESTS}), in {} s",
        of("PASS"),
        of("PASS") + of("FAIL"),
        began.elapsed().as_secs(),
    );
    let failures = said.lines().filter(|line| line.contains("--- FAIL")).collect::<Vec<_>>().join("\n");
    assert!(passed && of("PASS") == TESTS, "see {}\n{failures}", log.display());
    for namespace in MESH_NAMESPACES {
        let pods = cluster.get(namespace, &["pods"]).unwrap();
        let pods = pods["items"].as_array().unwrap();
        let injected =
            |pod: &&serde_json::Value| pod["metadata"]["annotations"]["weft.dev/injected"] == "true";
        assert!(!pods.is_empty() && pods.iter().all(|pod| injected(&pod)), "{pods:#?}");
        cluster.leave(namespace).unwrap();
    }
}

#[test]
fn the_official_suite_passes_whole() {
    let Some(cluster) = mesh_or_skip("the_official_suite_passes_whole") else { return };
    passes(&cluster, "own", 3);
}

#[test]
#[ignore = "soak: two minutes more than with 3"]
fn soak_the_official_suite_passes_whole_with_twenty_successes_in_a_row() {
    let Some(cluster) = mesh_or_skip("soak_the_official_suite_passes_whole") else { return };
    passes(&cluster, "own", 20);
}

#[test]
#[ignore = "soak: builds Istio's echo pair, of which the suite's own image is made"]
fn soak_the_official_suite_passes_whole_with_an_echo_pair_that_is_not_ours() {
    let Some(cluster) = mesh_or_skip("soak_the_official_suite_passes_whole_with_an_echo") else { return };
    let folder = std::env::temp_dir().join(format!("weft-echo-{}", std::process::id()));
    let original = images::of_the_original_echo().unwrap().write(&folder).unwrap();
    cluster.load(&[original.archive]).unwrap();
    let passed = std::panic::catch_unwind(|| passes(&cluster, "istio", 3));
    cluster.load(&[images::bed_folder().join("echo-advanced.tar")]).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    if let Err(failed) = passed {
        std::panic::resume_unwind(failed);
    }
}
