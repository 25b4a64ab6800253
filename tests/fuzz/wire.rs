//! First bytes and names: the ClientHello, the protocol detector, identities.

use rustls::server::Acceptor;
use weft_core::{
    detect::{self, ClientHello, Detected, MAX_BYTES},
    identity::{PodUid, SpiffeId, TrustDomain},
};

use crate::engine::{Shape, Target, hash};

/// The sniffer knows what rustls knows, whatever the pieces that the bytes arrive in.
pub(crate) const CLIENT_HELLO: Target = Target {
    name: "client_hello",
    run: client_hello,
    seeds: hellos,
    words: &[
        b"\x16\x03\x01",
        b"\x01\x00",
        b"\x00\x00\x00\x0a\x00\x08\x00\x00\x05",
        b"weft-h2/1",
        b"\x00\x10",
        b"\x03\x04",
    ],
    shape: Shape::Bytes,
};

/// What is decided stays decided, and something is decided before too much has been read.
pub(crate) const DETECT: Target = Target {
    name: "detect",
    run: detector,
    seeds: first_bytes,
    words: &[
        b"GET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00",
        b"HTTP/1.",
        b" ",
        b"\r\n",
        b"CONNECT",
    ],
    shape: Shape::Bytes,
};

/// Whoever is named is named in exactly one way.
pub(crate) const IDENTITY: Target = Target {
    name: "identity",
    run: identity,
    seeds: identities,
    words: &[
        b"spiffe://",
        b"/ns/",
        b"/sa/",
        b"%2f",
        b"..",
        b"//",
        b"A",
        b"\xc3\xa9",
        b"@",
        b":443",
        b"?a",
        b"#a",
        b".weft.internal",
    ],
    shape: Shape::Bytes,
};

fn client_hello(bytes: &[u8]) -> u64 {
    let whole = detect::client_hello(bytes);
    // Wherever the bytes were cut, nothing else was said before.
    let step = (bytes.len() / 24).max(1);
    for cut in (0..bytes.len()).step_by(step) {
        match (detect::client_hello(&bytes[..cut]), &whole) {
            (Ok(None), _) => {}
            (early, whole) => assert_eq!(&early, whole, "cut at {cut} of {}", bytes.len()),
        }
    }
    if let Some(theirs) = as_rustls_reads(bytes) {
        let Ok(Some(ours)) = &whole else { panic!("rustls reads {theirs:?}, the sniffer {whole:?}") };
        // rustls keeps no name that is not a DNS name.
        if theirs.server_name.is_some() {
            assert_eq!(ours.server_name, theirs.server_name);
        }
        assert_eq!(ours.alpn, theirs.alpn);
    }
    match whole {
        Err(_) => 0,
        Ok(None) => 1,
        Ok(Some(hello)) => {
            let name = hello.server_name.as_deref().unwrap_or("-");
            assert_eq!(name, name.to_ascii_lowercase(), "names are in lower case");
            4 + (hello.alpn.len().min(7) as u64) * 8 + u64::from(hello.server_name.is_some())
        }
    }
}

fn as_rustls_reads(bytes: &[u8]) -> Option<ClientHello> {
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    loop {
        if rest.is_empty() || acceptor.read_tls(&mut rest).ok()? == 0 {
            return None;
        }
        if let Some(accepted) = acceptor.accept().ok()? {
            let hello = accepted.client_hello();
            let alpn = hello.alpn().map(|names| names.map(<[u8]>::to_vec).collect()).unwrap_or_default();
            return Some(ClientHello { server_name: hello.server_name().map(str::to_ascii_lowercase), alpn });
        }
    }
}

fn detector(bytes: &[u8]) -> u64 {
    let whole = detect::detect(bytes);
    let step = (bytes.len() / 48).max(1);
    for cut in (0..bytes.len()).step_by(step) {
        match detect::detect(&bytes[..cut]) {
            Detected::NeedMore => {}
            early @ (Detected::Http1 | Detected::Http2 | Detected::Tls { .. } | Detected::Opaque) => {
                assert_eq!(early, whole, "cut at {cut} of {}", bytes.len());
            }
        }
    }
    if whole != Detected::NeedMore {
        let longer = [bytes, b"\r\n GET\0\xff"].concat();
        assert_eq!(detect::detect(&longer), whole, "more bytes change what was decided");
    }
    assert!(bytes.len() < MAX_BYTES || whole != Detected::NeedMore, "never decided");
    let answer = u64::from(detect::server_bytes_are_http(bytes));
    answer
        + 2 * match whole {
            Detected::NeedMore => bytes.len().min(32) as u64,
            Detected::Opaque => 40 + bytes.first().map_or(0, |first| u64::from(*first)),
            Detected::Http1 => 300 + u64::from(bytes[0]),
            Detected::Http2 => 600,
            Detected::Tls { sni, alpn, complete } => {
                601 + 2 * (alpn.len().min(9) as u64) + u64::from(sni.is_some()) + 40 * u64::from(complete)
            }
        }
}

fn identity(bytes: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(uid) = PodUid::new(&text) {
        assert!(uid.is_named_by(&uid.server_name()));
        assert!(!uid.is_named_by(&format!("x{}", uid.server_name())));
        assert_eq!(PodUid::new(uid.as_str()).as_ref(), Ok(&uid));
    }
    if let Ok(domain) = TrustDomain::new(&text) {
        assert_eq!(domain.as_str(), text);
        assert!(SpiffeId::new(&domain, "a", "b").is_ok_and(|id| id.trust_domain() == domain.as_str()));
    }
    match text.parse::<SpiffeId>() {
        Ok(id) => {
            assert_eq!(id.as_str(), text, "an identity is written in one way");
            assert_eq!(id.to_string().parse().as_ref(), Ok(&id));
            let domain = TrustDomain::new(id.trust_domain()).unwrap();
            let again = SpiffeId::new(&domain, id.namespace(), id.service_account());
            assert_eq!(again.as_ref(), Ok(&id), "its parts make it");
            let strange = |c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || "-._/:".contains(c));
            assert!(!text.contains(strange), "{text:?}");
            assert_eq!(text.split('/').count(), 7);
            1_000 + (text.len() as u64) / 64
        }
        // The kind of error without what it quotes.
        Err(error) => hash(format!("{error:?}").split(['(', '{']).next().unwrap_or_default().as_bytes()),
    }
}

fn identities() -> Vec<Vec<u8>> {
    let texts = [
        "spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://a/ns/b/sa/c",
        "spiffe://a_b.c-d/ns/x.y/sa/z-1",
        "spiffe://cluster.local/ns/shop/sa/pay/ments",
        "SPIFFE://Cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local:443/ns/shop/sa/web",
        "7d1f3c1e-aaaa-bbbb-cccc-0123456789ab",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn first_bytes() -> Vec<Vec<u8>> {
    let mut all = hellos();
    let texts: [&[u8]; 10] = [
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"CONNECT a:443 HTTP/1.1\r\n",
        b"FOO http://a/b HTTP/1.0\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        b"EHLO mail.example\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"CONNECT {\"verbose\":false}\r\n",
        b"\x4a\0\0\0\x0a8.0.36\0",
        b"HTTP/1.1 408 Request Timeout\r\n",
    ];
    all.extend(texts.iter().map(|text| text.to_vec()));
    all
}

/// Client hellos, built by hand so that they are the same in every run.
fn hellos() -> Vec<Vec<u8>> {
    let mut all = vec![
        hello(Some("uid-1.weft.internal"), &["weft-h2/1"], 0),
        hello(Some("Example.COM"), &["h2", "http/1.1"], 0),
        hello(None, &[], 0),
        hello(Some("a.b"), &["x"], 1_300),
    ];
    // The second as two records.
    let whole = all[1].clone();
    let (first, second) = whole[5..].split_at(40);
    let record = |part: &[u8]| [&[0x16, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
    all.push([record(first), record(second)].concat());
    all
}

fn hello(name: Option<&str>, alpn: &[&str], padding: usize) -> Vec<u8> {
    let long = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let short = |bytes: &[u8]| [&[bytes.len() as u8][..], bytes].concat();
    let extension = |number: u16, bytes: &[u8]| [&number.to_be_bytes()[..], &long(bytes)].concat();
    let mut extensions = Vec::new();
    if let Some(name) = name {
        let entry = [&[0][..], &long(name.as_bytes())].concat();
        extensions.extend(extension(0, &long(&entry)));
    }
    extensions.extend(extension(10, &long(&[0, 0x17, 0, 0x1d])));
    extensions.extend(extension(13, &long(&[4, 3, 8, 4])));
    if !alpn.is_empty() {
        let names: Vec<u8> = alpn.iter().flat_map(|name| short(name.as_bytes())).collect();
        extensions.extend(extension(16, &long(&names)));
    }
    extensions.extend(extension(43, &short(&[3, 4])));
    extensions.extend(extension(51, &long(&[&[0, 0x1d][..], &long(&[7; 32])].concat())));
    if padding > 0 {
        extensions.extend(extension(21, &vec![0; padding]));
    }
    let body =
        [&[3, 3][..], &[5; 32], &short(&[9; 32]), &long(&[0x13, 1, 0x13, 2]), &[1, 0], &long(&extensions)]
            .concat();
    let handshake = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
    [&[0x16, 3, 1][..], &long(&handshake)].concat()
}
