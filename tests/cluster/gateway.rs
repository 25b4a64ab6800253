//! The official Gateway API suite, unmodified, with pods that the webhook gave their sidecars.

use std::path::Path;

use weft_harness::cluster::conformance::MESH_NAMESPACES;

use crate::mesh_or_skip;

/// Of the mesh profiles: two core tests for gRPC, seven for HTTP, seven of its extended ones, and six that count for
/// nothing and can fail.
const TESTS: usize = 22;

fn passes(test: &str, successes: u32) {
    let Some(cluster) = mesh_or_skip(test) else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let report = folder.join(format!("conformance-{successes}.yaml"));
    let log = folder.join(format!("conformance-{successes}.log"));
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
        "figure: official mesh tests passed with {successes} successes in a row, by sidecars of the webhook: {} of {} \
         (bound {TESTS}), in {} s",
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
    passes("the_official_suite_passes_whole", 3);
}

#[test]
#[ignore = "soak: two minutes more than with 3"]
fn soak_the_official_suite_passes_whole_with_twenty_successes_in_a_row() {
    passes("soak_the_official_suite_passes_whole", 20);
}
