//! Hostile TLS handshakes at a running sidecar: slow ones, torn ones and ones that never end. Each is bounded in time,
//! counted and told in the log, and others are served meanwhile.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use rcgen::KeyPair;
use rustls_pki_types::CertificateDer;
use weft_control_plane::cli::demo::mesh::{Options, wait};
use weft_harness::apps::start_load;

use crate::{
    ECHO,
    established::status,
    identity::{call, issuer_of},
    inbound::policy,
    pair_with,
};

/// How long a sidecar of these tests waits for a ClientHello, and then for the rest of the handshake.
const LIMIT: Duration = Duration::from_secs(2);
/// What a busy machine may take on top.
const SLACK: Duration = Duration::from_secs(4);
/// Connections of each kind.
const EACH: usize = 10;

/// How a client keeps its ClientHello from being one.
#[derive(Clone, Copy, Debug)]
enum Habit {
    /// Connects and says nothing.
    Silent,
    /// Half of it, then silence.
    Half,
    /// A byte each second.
    Trickle,
    /// All of it, then silence: the server has answered and waits.
    Whole,
    /// All of it, then a byte of the client's next flight each second.
    WholeThenTrickle,
}

/// Behaves so until the server ends the connection; how long that took.
fn hostile(stream: &mut TcpStream, hello: &[u8], habit: Habit) -> io::Result<Duration> {
    let begun = Instant::now();
    stream.set_nodelay(true)?;
    let (at_once, trickled): (&[u8], &[u8]) = match habit {
        Habit::Silent => (&[], &[]),
        Habit::Half => (&hello[..hello.len() / 2], &[]),
        Habit::Trickle => (&[], hello),
        Habit::Whole => (hello, &[]),
        // The head of a record that is never finished.
        Habit::WholeThenTrickle => (hello, &[0x17, 3, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
    };
    stream.write_all(at_once)?;
    let mut trickled = trickled.iter();
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    while begun.elapsed() < LIMIT + LIMIT + SLACK {
        match stream.read(&mut [0; 16 * 1024]) {
            Ok(0) => return Ok(begun.elapsed()),
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Ok(begun.elapsed()),
        }
        if let Some(byte) = trickled.next()
            && stream.write_all(&[*byte]).is_err()
        {
            return Ok(begun.elapsed());
        }
    }
    Err(io::Error::other(format!("{habit:?}: not ended after {:?}", begun.elapsed())))
}

#[test]
fn slow_handshakes_are_bounded_counted_and_hinder_nobody() {
    let limit = format!("{}s", LIMIT.as_secs());
    let options = Options::with_env(&[("WEFT_HEADER_TIMEOUT", &limit), ("WEFT_HANDSHAKE_TIMEOUT", &limit)]);
    let Some(pair) = pair_with("slow_handshakes", options, &[]) else { return };
    let (client, server) = (&pair.client.pod, &pair.server.sidecar);
    policy(&pair, serde_json::json!({"mtls": "Strict", "action": "Allow", "rules": [{}]}));
    let outsider =
        pair.mesh.plain(&weft_control_plane::cli::demo::mesh::Workload::new("shop", "legacy-1")).unwrap();
    let to = SocketAddr::new(server.pod.ip.into(), 8080);
    wait(Duration::from_secs(10), || {
        Ok(status(&outsider, &format!("http://{to}")) == "403 inbound;plaintext_refused")
    })
    .unwrap();
    let ours = issuer_of(&pair.mesh.dir().join("state"));
    let name = format!("{}.weft.internal", server.uid);
    let leaf = || -> Option<(CertificateDer<'static>, KeyPair)> {
        Some(ours.leaf("spiffe://cluster.local/ns/shop/sa/client", |_| {}))
    };

    // The control, and the one slow client that is right: a ClientHello in as many packets as it has bytes.
    let bytes = call(client, to, &name, leaf(), Duration::ZERO, |stream| {
        let mut hello = Vec::new();
        stream.conn.write_tls(&mut hello)?;
        stream.sock.set_nodelay(true)?;
        for byte in &hello {
            stream.sock.write_all(&[*byte])?;
        }
        // Opaque bytes to an HTTP app: it answers 400, so it was reached.
        stream.write_all(b"no request\r\n\r\n")?;
        stream.read_exact(&mut [0])?;
        Ok(hello.len())
    })
    .expect("a ClientHello byte by byte is one");
    println!("figure: ClientHello sent in {bytes} packets of a byte: understood");

    let failed = || server.metric("weft_handshakes_failed_total", &[]).unwrap();
    let refused = || server.metric("weft_plaintext_refused_total", &[]).unwrap();
    let before = (failed(), refused());
    let loading =
        start_load(&pair.mesh, client, &["--url", ECHO, "--rate", "50", "--seconds", "60"]).unwrap();
    let outsider = &outsider;
    let longest = std::thread::scope(|scope| {
        let all: Vec<_> = [Habit::Silent, Habit::Half, Habit::Trickle, Habit::Whole, Habit::WholeThenTrickle]
            .into_iter()
            .flat_map(|habit| std::iter::repeat_n(habit, EACH))
            .map(|habit| {
                let (name, leaf) = (&name, leaf());
                scope.spawn(move || {
                    let ended = call(outsider, to, name, leaf, Duration::ZERO, |stream| {
                        let mut hello = Vec::new();
                        stream.conn.write_tls(&mut hello)?;
                        hostile(stream.sock, &hello, habit)
                    });
                    (habit, ended)
                })
            })
            .collect();
        let ended = all.into_iter().map(|one| one.join().unwrap());
        ended.map(|(habit, ended)| ended.unwrap_or_else(|e| panic!("{habit:?}: {e}"))).max().unwrap()
    });
    let summary = loading.finish().unwrap();
    let bound = LIMIT + SLACK;
    println!(
        "figure: {} hostile handshakes, the longest lasted {:.1} s (bound {} s); {} requests beside them, {} failed (bound 0)",
        5 * EACH,
        longest.as_secs_f64(),
        bound.as_secs(),
        summary.sent,
        summary.failed
    );
    assert!(longest < bound, "{longest:?}");
    assert_eq!(summary.failed, 0, "{summary:?}");
    // What never became a ClientHello is no handshake: it is plaintext, where plaintext is refused.
    assert_eq!((failed() - before.0, refused() - before.1), (2.0 * EACH as f64, 3.0 * EACH as f64));
    let log = std::fs::read_to_string(&server.log).unwrap();
    assert_eq!(
        log.matches("TLS handshake took too long").count() + log.matches("TLS handshake failed").count(),
        2 * EACH,
        "{log}"
    );
    assert!(log.matches("connection refused").count() >= 3 * EACH, "{log}");
    wait(Duration::from_secs(10), || Ok(server.metric("weft_connections", &["inbound"])? <= 4.0)).unwrap();
}
