//! What is unusual in HTTP/2 and allowed: frames cut small, padded, with priorities, in windows of a few bytes.

use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use weft_control_plane::cli::demo::{mesh::Workload, netns::Pod};
use weft_harness::{
    apps::{mesh_or_skip, service},
    streams::{self, PREFACE, Server, answer, fields, frame, head, read, read_frame, send, write},
    wire::Wire,
};

use crate::ECHO_ADDRESS;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const PRIORITY_UPDATE: u8 = 0x10;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;

const HEAD: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/echo")];

/// The bytes of a request on a stream.
type Sent<'a> = Box<dyn Fn(u32) -> Vec<u8> + 'a>;

/// A mesh whose app answers with the body and trailers that it got.
fn echo(test: &str) -> Option<(impl Sized, [(Pod, String); 2])> {
    let mesh = mesh_or_skip(test)?;
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let backend = mesh.workload(Workload::new("shop", "echo-1")).unwrap();
    let server = Server::start(&backend.pod, 8080, 100, |request, mut respond| async move {
        let priority = request.headers().get("priority").cloned();
        let (mut body, trailers) = read(request.into_body()).await?;
        if let Some(trailers) = &trailers {
            for (name, value) in trailers {
                body.extend_from_slice(format!("|{name}: {}", value.to_str()?).as_bytes());
            }
        }
        let mut head = Response::new(());
        if let Some(priority) = priority {
            head.headers_mut().insert("x-priority", priority);
        }
        let mut answer = respond.send_response(head, false)?;
        write(&mut answer, body.into(), false).await?;
        let trailers: HeaderMap = [
            (http::HeaderName::from_static("x-end"), HeaderValue::from_static("1")),
            (http::HeaderName::from_static("weft-reason"), HeaderValue::from_static("inbound;pretended")),
        ]
        .into_iter()
        .collect();
        answer.send_trailers(trailers)?;
        Ok(())
    })
    .unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    let legacy = mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let doors = [(client.pod.clone(), ECHO_ADDRESS.to_owned()), (legacy, format!("{}:8080", backend.pod.ip))];
    Some(((server, client, backend, mesh), doors))
}

/// Reads until a stream has ended: its data, or how it was ended instead.
fn answered(wire: &mut Wire, stream: u32) -> Result<Result<Vec<u8>, String>> {
    let mut data = Vec::new();
    loop {
        let (kind, flags, on, payload) = read_frame(wire)?;
        match kind {
            DATA if on == stream => data.extend_from_slice(&payload),
            RST_STREAM if on == stream => return Ok(Err(format!("RST_STREAM {payload:?}"))),
            GOAWAY => return Ok(Err(format!("GOAWAY {payload:?}"))),
            SETTINGS if flags & ACK == 0 => wire.say(frame(SETTINGS, ACK, 0, b""))?,
            _ => {}
        }
        if on == stream && matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
            return Ok(Ok(data));
        }
    }
}

#[test]
fn frames_may_be_cut_small_padded_and_carry_priorities() {
    let Some((_world, doors)) = echo("odd_frames") else { return };
    let block = fields(&HEAD);
    let trailers = fields(&[("x-sum", "1"), ("weft-client-id", "spiffe://a/b")]);
    let body = |stream: u32| {
        let mut out = frame(DATA, PADDED, stream, &[&[3][..], b"he", &[0; 3]].concat());
        out.extend(frame(DATA, 0, stream, b""));
        out.extend(frame(DATA, 0, stream, b"llo"));
        // Padding alone, and as much as there can be.
        out.extend(frame(DATA, PADDED, stream, &[&[255][..], &[0; 255]].concat()));
        out.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &trailers));
        out
    };
    let whole = |stream: u32| [frame(HEADERS, END_HEADERS, stream, &block), body(stream)].concat();
    let cases: Vec<(&str, Sent<'_>)> = vec![
        ("whole", Box::new(whole)),
        (
            "a head in four frames",
            Box::new(|stream| {
                let mut out = frame(HEADERS, 0, stream, &block[..1]);
                out.extend(frame(CONTINUATION, 0, stream, b""));
                out.extend(frame(CONTINUATION, 0, stream, &block[1..7]));
                out.extend(frame(CONTINUATION, END_HEADERS, stream, &block[7..]));
                [out, body(stream)].concat()
            }),
        ),
        (
            "padded, with a priority",
            Box::new(|stream| {
                let payload = [&[9][..], &[0, 0, 0, 0, 200], &block, &[0; 9]].concat();
                let flags = END_HEADERS | PADDED | WITH_PRIORITY;
                [frame(HEADERS, flags, stream, &payload), body(stream)].concat()
            }),
        ),
        (
            "priorities around it",
            Box::new(|stream| {
                let priority = |on: u32| frame(PRIORITY, 0, on, &[0x80, 0, 0, 0, 15]);
                let update = [&stream.to_be_bytes()[..], b"u=1, i"].concat();
                [
                    priority(stream),
                    priority(stream + 20),
                    frame(PRIORITY_UPDATE, 0, 0, &update),
                    frame(0xee, 0xff, stream, b"what nobody knows"),
                    whole(stream),
                    priority(stream),
                ]
                .concat()
            }),
        ),
        (
            "settings that nobody knows",
            Box::new(|stream| {
                let settings =
                    [&[0, 9][..], &1_u32.to_be_bytes(), &[0xab, 0xcd], &7_u32.to_be_bytes()].concat();
                [frame(SETTINGS, 0, 0, &settings), frame(PING, 0, 0, b"a ping!!"), whole(stream)].concat()
            }),
        ),
    ];
    for (pod, address) in &doors {
        let mut wire = Wire::dial(pod, address).unwrap();
        wire.say(PREFACE).unwrap();
        for (n, (name, sent)) in cases.iter().enumerate() {
            let stream = 2 * n as u32 + 1;
            // At once, and a byte at a time.
            let bytes = sent(stream);
            if n % 2 == 0 {
                wire.say(&bytes).unwrap();
            } else {
                for byte in &bytes {
                    wire.say([*byte]).unwrap();
                }
            }
            let got = answered(&mut wire, stream).unwrap();
            assert_eq!(got.as_deref(), Ok(&b"hello|x-sum: 1"[..]), "{name} at {address}");
        }
    }
}

#[test]
fn a_client_with_tiny_windows_and_frames_gets_everything() {
    const SIZE: usize = 40_000;
    let Some((_world, doors)) = echo("tiny_windows") else { return };
    for (pod, address) in &doors {
        let began = Instant::now();
        streams::run(async {
            let address: std::net::SocketAddr = address.parse()?;
            let stream = pod.enter(|| std::net::TcpStream::connect(address))??;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let mut builder = h2::client::Builder::new();
            builder.initial_window_size(100).max_frame_size(16_384).header_table_size(0);
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let (sender, connection) = builder.handshake::<_, Bytes>(stream).await?;
            tokio::spawn(connection);
            let mut request = head("POST", "/echo");
            request.headers_mut().insert("priority", HeaderValue::from_static("u=0, i"));
            let (answer, mut body) = send(&sender, request, false).await?;
            let sent: Vec<u8> = (0..SIZE).map(|n| n as u8).collect();
            let writing = write(&mut body, Bytes::from(sent.clone()), true);
            let reading = async {
                let (head, body) = answer.await?.into_parts();
                anyhow::Ok((head, read(body).await?))
            };
            let (written, answered) = tokio::join!(writing, reading);
            written?;
            let (head, (got, trailers)) = answered?;
            assert!(got == sent, "{} bytes of {SIZE}", got.len());
            assert_eq!(head.headers.get("x-priority").map(HeaderValue::as_bytes), Some(&b"u=0, i"[..]));
            let trailers = trailers.unwrap_or_default();
            assert_eq!(trailers.get("x-end").map(HeaderValue::as_bytes), Some(&b"1"[..]));
            assert!(trailers.get("weft-reason").is_none(), "{trailers:?}");
            Ok(())
        });
        println!("figure: {SIZE} bytes through windows of 100 bytes in {} ms", began.elapsed().as_millis());
    }
}

#[test]
fn an_answer_of_its_head_alone_and_one_before_the_request_ends() {
    let Some(mesh) = mesh_or_skip("h2_heads") else { return };
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let backend = mesh.workload(Workload::new("shop", "echo-1")).unwrap();
    let _server = Server::start(&backend.pod, 8080, 100, |request, mut respond| async move {
        match request.uri().path() {
            "/head-alone" => {
                let head = Response::builder().header("grpc-status", "5").header("x-a", "1").body(())?;
                respond.send_response(head, true)?;
            }
            "/early" => {
                answer(&mut respond, 401, "no")?;
                // What is still sent is thrown away for a while.
                tokio::time::timeout(Duration::from_secs(2), read(request.into_body())).await.ok();
            }
            _ => answer(&mut respond, 200, "ok")?,
        }
        Ok(())
    })
    .unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    streams::run(async {
        let sender = streams::connect(&client.pod, ECHO_ADDRESS).await?;
        let alone = streams::ask(&sender, head("GET", "/head-alone")).await?;
        assert_eq!((alone.status().as_u16(), alone.body().as_str()), (200, ""));
        assert_eq!(alone.headers()["grpc-status"], "5");
        for _ in 0..20 {
            let (answer, mut body) = send(&sender, head("POST", "/early"), false).await?;
            body.send_data(Bytes::from_static(b"begun"), false)?;
            let (head, answered) = answer.await?.into_parts();
            let (text, _) = read(answered).await?;
            assert_eq!((head.status.as_u16(), text.as_slice()), (401, &b"no"[..]));
        }
        assert_eq!(streams::ask(&sender, head("GET", "/ok")).await?.body(), "ok", "on the same connection");
        Ok(())
    });
}
