//! What only a real cluster shows: Weft between kubelet, CNI, kube-proxy and the API server.
//!
//! `make test-cluster` brings a cluster of two nodes up, runs these tests one after the other, and takes it down
//! again. They are no part of `make test`: building a cluster's programs takes minutes. One kernel and one clock
//! serve all nodes, and no NetworkPolicy is enforced: what needs either is not shown here.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bed;
mod costs;
mod gateway;
mod images;
mod install;
mod pods;
mod refused;
mod traffic;
mod trust;
mod used;

use weft_harness::apps;
use weft_harness::cluster::{self, Cluster};

/// The cluster that is up, or `None` where none is: said past the runner's capture.
fn cluster_or_skip(test: &str) -> Option<Cluster> {
    let up = cluster::current().unwrap();
    if up.is_none() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{test}: no cluster is up");
        apps::skip(test, "no cluster is up (make cluster-up)");
    }
    up
}

/// The same with Weft on it, installed by helm as it is by default.
fn mesh_or_skip(test: &str) -> Option<Cluster> {
    let cluster = cluster_or_skip(test)?;
    cluster.with_weft().unwrap();
    Some(cluster)
}
