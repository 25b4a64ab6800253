//! What two ends that speak HTTP/2 themselves ask of a mesh between them: upgrades (RFC 8441), large metadata, and
//! gRPC's own interoperability suite, by the official programs.

use std::path::PathBuf;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use weft_control_plane::cli::demo::mesh::Workload;
use weft_harness::{
    apps::{mesh_or_skip, output, service, skip, start},
    streams::{self, ask, connect, head, read, send, write},
};

use crate::{ECHO_ADDRESS, http2::world, pair};

async fn serve(
    request: Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) -> anyhow::Result<()> {
    let protocol = request.extensions().get::<h2::ext::Protocol>().map(|p| p.as_str().to_owned());
    let path = request.uri().path().to_owned();
    let sized = |of: &str| path.strip_prefix(of).and_then(|size| size.parse::<usize>().ok());
    if let Some(size) = sized("/metadata/") {
        // As a gRPC server answers, with as much in its trailers.
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        trailers.insert("x-large", HeaderValue::from_str(&"v".repeat(size))?);
        let response = Response::builder().header("content-type", "application/grpc").body(())?;
        respond.send_response(response, false)?.send_trailers(trailers)?;
        return Ok(());
    }
    let Some(protocol) = protocol.filter(|_| request.method() == http::Method::CONNECT) else {
        return streams::answer(&mut respond, 400, "no upgrade");
    };
    if path == "/refuse" {
        return streams::answer(&mut respond, 403, "not here");
    }
    let response =
        Response::builder().status(200).header("x-upgraded", format!("{protocol} {path}")).body(())?;
    let mut sending = respond.send_response(response, false)?;
    let mut body = request.into_body();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        write(&mut sending, piece, false).await?;
    }
    sending.send_data(Bytes::from_static(b"bye"), true)?;
    Ok(())
}

fn upgrade(path: &str) -> Request<()> {
    upgrade_to("websocket", path)
}

fn upgrade_to(protocol: &str, path: &str) -> Request<()> {
    let mut request = head("CONNECT", path);
    request.extensions_mut().insert(h2::ext::Protocol::from(protocol));
    request.headers_mut().insert("sec-websocket-version", HeaderValue::from_static("13"));
    request
}

#[test]
fn upgrades_between_two_ends_of_http2_are_extended_connects() {
    let Some(world) = world("extended_connect", 100, serve) else { return };
    streams::run(async {
        let sender = connect(&world.client.pod, ECHO_ADDRESS).await?;
        assert_eq!(ask(&sender, head("GET", "/")).await?.status(), 400);
        assert!(sender.is_extended_connect_protocol_enabled(), "the sidecar offers it");
        // Bytes both ways at once, then each side's end by itself.
        let (answered, mut up) = send(&sender, upgrade("/chat"), false).await?;
        let answered = answered.await?;
        assert_eq!(answered.status(), 200);
        assert_eq!(answered.headers()["x-upgraded"], "websocket /chat");
        let said = Bytes::from(vec![7; 1 << 20]);
        let down = tokio::spawn(read(answered.into_body()));
        write(&mut up, said.clone(), true).await?;
        let (heard, _) = down.await??;
        assert_eq!((heard.len(), &heard[said.len()..]), (said.len() + 3, &b"bye"[..]));
        // A protocol that carries requests would carry them past authorization.
        for carries in ["h2c", "H2C", "TLS/1.3", "HTTP/2.0", "chat, h2c"] {
            let (refused, _up) = send(&sender, upgrade_to(carries, "/chat"), false).await?;
            let refused = refused.await?;
            assert_eq!(refused.status(), 405, "{carries}");
            assert_eq!(refused.headers()["weft-reason"], "outbound;connect_not_allowed", "{carries}");
        }
        // Refused, in the app's own words; the connection goes on.
        let (refused, _up) = send(&sender, upgrade("/refuse"), false).await?;
        let (head_of, body) = refused.await?.into_parts();
        assert_eq!((head_of.status.as_u16(), &*read(body).await?.0), (403, &b"not here"[..]));
        assert_eq!(ask(&sender, head("GET", "/")).await?.status(), 400);
        Ok(())
    });
}

#[test]
fn an_upgrade_over_http2_to_an_app_that_does_not_offer_them_is_a_502_with_a_reason() {
    let Some(pair) = pair("no_extended_connect", &[]) else { return };
    streams::run(async {
        let sender = connect(&pair.client.pod, ECHO_ADDRESS).await?;
        ask(&sender, head("GET", "/")).await?;
        let (refused, _up) = send(&sender, upgrade("/chat"), false).await?;
        let refused = refused.await?;
        assert_eq!(refused.status(), 502);
        assert!(refused.headers()["weft-reason"].to_str()?.starts_with("inbound;"), "{refused:?}");
        assert_eq!(ask(&sender, head("GET", "/")).await?.status(), 200);
        Ok(())
    });
}

#[test]
fn grpc_metadata_up_to_64_kib_passes_both_ways_and_more_is_431() {
    let Some(world) = world("metadata", 100, serve) else { return };
    streams::run(async {
        let sender = connect(&world.client.pod, ECHO_ADDRESS).await?;
        let call = |answer: usize, metadata: usize| {
            let mut request = head("POST", &format!("/metadata/{answer}"));
            let headers = request.headers_mut();
            headers.insert("content-type", HeaderValue::from_static("application/grpc"));
            headers.insert("x-metadata", HeaderValue::from_str(&"m".repeat(metadata)).unwrap());
            request
        };
        for (answer, metadata) in [(10, 60_000), (60_000, 10), (60_000, 60_000)] {
            let (answered, _) = send(&sender, call(answer, metadata), true).await?;
            let answered = answered.await?;
            assert_eq!(answered.status(), 200, "{answer} {metadata}");
            let (_, trailers) = read(answered.into_body()).await?;
            let trailers = trailers.unwrap_or_default();
            assert_eq!(trailers["grpc-status"], "0");
            assert_eq!(trailers["x-large"].len(), answer);
        }
        let (refused, _) = send(&sender, call(10, 70_000), true).await?;
        assert_eq!(refused.await?.status(), 431);
        let (after, _) = send(&sender, call(10, 10), true).await?;
        assert_eq!(after.await?.status(), 200);
        Ok(())
    });
}

/// gRPC's interoperability suite, the cases that need neither TLS of the test's own nor a cloud.
const CASES: [&str; 16] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
    "rpc_soak",
    "channel_soak",
];

#[test]
fn the_official_grpc_interop_suite_passes_through_two_sidecars() {
    let programs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/go/interop");
    if !programs.join("client").exists() || !programs.join("server").exists() {
        return skip(
            "interop",
            "it is not built: make deps-test builds it where Go and its module proxy are",
        );
    }
    let Some(mesh) = mesh_or_skip("interop") else { return };
    service(&mesh, "shop", "interop", "10.96.0.1", &[("grpc", 80, 10_000)]).unwrap();
    let backend = mesh.workload(Workload::new("shop", "interop-1")).unwrap();
    let mut serving = backend.pod.command(programs.join("server"));
    let _server = start(serving.args(["--port", "10000"]), &backend.pod, 10_000).unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    let mut failed = Vec::new();
    for case in CASES {
        let case_is = format!("--test_case={case}");
        let args = ["--server_host=10.96.0.1", "--server_port=80", "--soak_iterations=50", &case_is];
        if let Err(error) = output(client.pod.command(programs.join("client")).args(args)) {
            failed.push(format!("{case}: {error:#}"));
        }
    }
    println!(
        "figure: gRPC's interop suite by grpc-go: {} of {} cases failed (bound 0)",
        failed.len(),
        CASES.len()
    );
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
