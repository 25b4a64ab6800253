//! The generated code is checked in, so that nobody needs `protoc` and a change of the wire shows in a
//! diff. This test regenerates it and compares; `WEFT_UPDATE_GEN=1 cargo test -p weft-proto --test gen`
//! writes it.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

const FILES: &[&str] =
    &["weft/v1/discovery.proto", "weft/v1/policy.proto", "weft/v1/identity.proto", "weft/v1/telemetry.proto"];

#[test]
fn generated_code_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let checked_in = root.join("src/gen");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("weft-gen");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out).unwrap();

    let descriptors = protox::compile(FILES, [root]).unwrap();
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .build_transport(false)
        .out_dir(&out)
        // A map is encoded in the order of its keys: two replicas must make the same bytes of one object.
        .btree_map(".")
        .bytes(".")
        // It carries a token: lib.rs has the one that leaves it out.
        .skip_debug(["weft.v1.CertifyRequest"])
        .extern_path(".google.protobuf.Any", "crate::any::Any")
        .compile_fds_with_config(descriptors, tonic_prost_build::Config::new())
        .unwrap();

    let update = std::env::var_os("WEFT_UPDATE_GEN").is_some();
    let mut made = Vec::new();
    for entry in fs::read_dir(&out).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let fresh = fs::read_to_string(entry.path()).unwrap();
        if update {
            fs::write(checked_in.join(&name), &fresh).unwrap();
        }
        let have = fs::read_to_string(checked_in.join(&name)).unwrap_or_default();
        assert!(
            have == fresh,
            "src/gen/{name} is stale: run WEFT_UPDATE_GEN=1 cargo test -p weft-proto --test gen"
        );
        made.push(name);
    }
    made.sort();
    assert_eq!(made, ["envoy.service.discovery.v3.rs", "weft.v1.rs"]);
}
