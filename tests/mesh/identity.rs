//! Who is who: wrong pods, wrong identities and foreign certificates are refused, and another endpoint is tried.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use weft_control_plane::cli::demo::{
    mesh::{Workload, wait},
    netns::Pod,
};
use weft_core::ports;
use weft_harness::{
    apps::{curl, load, output, serve, service, start, testapp},
    tls::TrustsAnyone,
};

use crate::{ECHO, pair};

#[test]
fn a_reused_address_is_never_taken_for_the_pod_that_had_it() {
    let Some(mut pair) = pair("reused_address", &[]) else { return };
    let second = serve(&pair.mesh, Workload::new("shop", "echo-2"), &[]).unwrap();
    let by = |pod: &Pod| curl(pod, &["-o", "/dev/null", "-w", "%header{x-served-by}", ECHO]).unwrap();
    wait(Duration::from_secs(10), || Ok(by(&pair.client.pod) == "echo-2")).unwrap();
    // echo-1 goes without a word to the controller; a pod of another service gets its address.
    let ip = pair.server.sidecar.pod.ip;
    pair.server.app.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    pair.server.sidecar.proxy.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    // Its connections end before its cable is cut: what is sent into one that nobody ended may have arrived.
    let address = ip.to_string();
    wait(Duration::from_secs(10), || {
        let mut connections = pair.client.pod.command("ss");
        Ok(output(connections.args(["-Htn", "state", "established", "dst", &address]))?.is_empty())
    })
    .unwrap();
    pair.mesh.world.remove(&pair.server.sidecar.pod);
    let mut other = Workload::new("shop", "other-1");
    other.ip = Some(ip);
    let _other = serve(&pair.mesh, other, &[]).unwrap();
    let args = ["--url", ECHO, "--rate", "100", "--seconds", "3", "--half-post"];
    let summary = load(&pair.mesh, &pair.client.pod, &args).unwrap();
    println!(
        "figure: {} requests while the endpoint list named a reused address: {:?}",
        summary.sent, summary.served_by
    );
    assert_eq!(summary.failed, 0, "{summary:?}");
    assert_eq!(summary.served_by.get("other-1"), None, "a request reached the wrong pod");
    drop(second);
}

#[test]
fn an_endpoint_under_another_identity_than_the_list_says_is_not_spoken_to() {
    let Some(pair) = pair("other_identity", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    // The list is changed behind the sidecar's back: the pod shall be another service account.
    let mut claimed = pair.server.sidecar.workload.clone();
    claimed.service_account = "somebody-else".to_owned();
    let file = pair.mesh.source().join("pod-echo-1.yaml");
    let yaml = std::fs::read_to_string(&file).unwrap();
    std::fs::write(
        &file,
        yaml.replace("\"serviceAccountName\": \"echo\"", "\"serviceAccountName\": \"somebody-else\""),
    )
    .unwrap();
    wait(Duration::from_secs(10), || {
        let answer =
            curl(&pair.client.pod, &["-o", "/dev/null", "-w", "%{http_code} %header{weft-reason}", ECHO])?;
        Ok(answer == "503 outbound;identity_mismatch")
    })
    .unwrap();
    let mismatches = pair.client.metric("weft_identity_mismatch_total", &[]).unwrap();
    assert!(mismatches >= 1.0, "{mismatches}");
}

#[test]
fn who_is_not_among_the_identities_that_a_service_accepts_gets_no_request() {
    let Some(pair) = pair("accepted", &[]) else { return };
    let accepts = |account: &str| {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        crate::policy(&pair.mesh, "echo", serde_json::json!({"acceptedIdentities": [identity]}));
    };
    let says = |wanted: &str| {
        let asked = ["-o", "/dev/null", "-w", "%{http_code} %header{weft-reason}", ECHO];
        wait(Duration::from_secs(10), || Ok(curl(&pair.client.pod, &asked)? == wanted))
            .unwrap_or_else(|e| panic!("{wanted}: {e}"));
    };
    accepts("somebody-else");
    says("503 outbound;identity_mismatch");
    accepts("echo");
    says("200");
    // Whoever has no identity has no accepted one.
    let plain = pair.mesh.plain(&Workload::new("shop", "plain-1")).unwrap();
    let _app = weft_harness::wire::Backend::start(&plain, 8080, |mut wire, _| {
        weft_harness::wire::answer_all(&mut wire, |_| weft_harness::wire::ok("plain"))
    })
    .unwrap();
    service(&pair.mesh, "shop", "plain", "10.96.0.7", &[("web", 80, 8080)]).unwrap();
    let address = ["-o", "/dev/null", "-w", "%{http_code} %header{weft-reason}", "http://10.96.0.7"];
    wait(Duration::from_secs(10), || Ok(curl(&pair.client.pod, &address)? == "200")).unwrap();
    crate::policy(
        &pair.mesh,
        "plain",
        serde_json::json!({"acceptedIdentities": ["spiffe://cluster.local/ns/shop/sa/plain"]}),
    );
    wait(Duration::from_secs(10), || {
        Ok(curl(&pair.client.pod, &address)? == "503 outbound;identity_mismatch")
    })
    .unwrap();
}

#[test]
fn strict_mode_refuses_plaintext_and_authorization_is_by_identity() {
    let Some(pair) = pair("strict", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let other = pair.mesh.workload(Workload::new("shop", "other-1")).unwrap();
    let server = format!("http://{}:8080", pair.server.sidecar.pod.ip);
    assert_eq!(curl(&outsider, &[&server]).unwrap(), "ok");
    let policy = serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "echo"},
        "spec": {
            "selector": {"matchLabels": {"app": "echo"}}, "mtls": "Strict", "action": "Allow",
            "rules": [{"from": [{"identities": ["spiffe://cluster.local/ns/shop/sa/client"]}],
                       "to": [{"methods": ["GET"], "paths": ["/", "/public/*"]}]}]
        }
    });
    pair.mesh.write("authz.yaml", &format!("{policy:#}\n")).unwrap();
    let code = |pod: &Pod, url: &str, more: &[&str]| {
        let args = ["-o", "/dev/null", "-w", "%{http_code} %header{weft-reason}", "--path-as-is", url];
        curl(pod, &[&args[..], more].concat()).unwrap_or_else(|e| e.to_string())
    };
    wait(Duration::from_secs(10), || Ok(code(&outsider, &server, &[]) == "403 inbound;plaintext_refused"))
        .unwrap();
    assert_eq!(code(&pair.client.pod, ECHO, &[]), "200");
    assert_eq!(code(&pair.client.pod, &format!("{ECHO}/public/x"), &[]), "200");
    assert_eq!(code(&pair.client.pod, &format!("{ECHO}/private"), &[]), "403 inbound;denied");
    assert_eq!(code(&pair.client.pod, ECHO, &["-X", "POST"]), "403 inbound;denied");
    // An upgrade is authorized as the GET that the app will see.
    let upgrade = ["-H", "Connection: Upgrade", "-H", "Upgrade: foo"];
    assert_eq!(code(&pair.client.pod, &format!("{ECHO}/private"), &upgrade), "403 inbound;denied");
    assert_eq!(code(&pair.client.pod, ECHO, &upgrade), "200");
    assert_eq!(code(&other.pod, ECHO, &[]), "403 inbound;denied");
    // One form is matched and forwarded; the others are refused.
    for path in ["/public/../private", "/public/%2e%2e/private", "//public/x", "/public/x%2f..%2fprivate"] {
        assert_eq!(
            code(&pair.client.pod, &format!("{ECHO}{path}"), &[]),
            "400 inbound;path_not_canonical",
            "{path}"
        );
    }
}

/// A certificate authority of a test.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(common_name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, common_name);
        Self { issuer: Issuer::new(params, key) }
    }

    pub(crate) fn leaf(
        &self,
        uri: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.der().clone(), key)
    }
}

/// Shakes hands as a caller, after some silence, and asks for a byte: `Ok` if the server let it in.
pub(crate) fn knock(
    pod: &Pod,
    to: SocketAddr,
    server_name: &str,
    identity: Option<(CertificateDer<'static>, KeyPair)>,
    silent: Duration,
) -> io::Result<()> {
    say(pod, to, server_name, identity, silent, b"hello")
}

/// The same with other bytes than a greeting.
fn say(
    pod: &Pod,
    to: SocketAddr,
    server_name: &str,
    identity: Option<(CertificateDer<'static>, KeyPair)>,
    silent: Duration,
    bytes: &[u8],
) -> io::Result<()> {
    call(pod, to, server_name, identity, silent, |stream| {
        stream.write_all(bytes)?;
        stream.read_exact(&mut [0])
    })
}

/// A caller's side of TLS, for one purpose.
pub(crate) fn config_of(identity: Option<(CertificateDer<'static>, KeyPair)>, alpn: &[u8]) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustsAnyone));
    let mut config = match identity {
        Some((cert, key)) => {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config
}

/// Connects as a caller, is silent for some time, and uses the connection; the handshake is made with its first use.
pub(crate) fn call<T: Send>(
    pod: &Pod,
    to: SocketAddr,
    server_name: &str,
    identity: Option<(CertificateDer<'static>, KeyPair)>,
    silent: Duration,
    then: impl FnOnce(&mut rustls::Stream<'_, rustls::ClientConnection, std::net::TcpStream>) -> io::Result<T>
    + Send,
) -> io::Result<T> {
    let config = config_of(identity, b"weft-tcp/1");
    let name = ServerName::try_from(server_name.to_owned()).unwrap();
    // As the proxy's user: not captured, as a sidecar's own connections are not.
    pod.enter_as(ports::PROXY_UID, ports::PROXY_UID, || {
        let mut tcp = std::net::TcpStream::connect(to)?;
        tcp.set_read_timeout(Some(Duration::from_secs(5)))?;
        std::thread::sleep(silent);
        let mut tls = rustls::ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        then(&mut rustls::Stream::new(&mut tls, &mut tcp))
    })
    .unwrap()
}

#[test]
fn certificates_of_strangers_are_refused_by_the_called_side() {
    let Some(pair) = pair("strangers", &[]) else { return };
    let pod = &pair.server.sidecar.pod;
    let _app = start(&mut testapp(&pair.mesh, pod, &["tcp", "--port", "9100"]), pod, 9100).unwrap();
    let to = SocketAddr::new(pod.ip.into(), 9100);
    let name = format!("{}.weft.internal", pair.server.sidecar.uid);
    let client = &pair.client.pod;
    let state = pair.mesh.dir().join("state");
    let ours = issuer_of(&state);
    let good = "spiffe://cluster.local/ns/shop/sa/client";
    let now = std::time::SystemTime::now();
    let day = Duration::from_secs(86_400);
    let at_once = Duration::ZERO;
    knock(client, to, &name, Some(ours.leaf(good, |_| {})), at_once)
        .expect("the control: our own issuer is let in");
    // Later than detection waits: a handshake still, and nothing for the app.
    knock(client, to, &name, Some(ours.leaf(good, |_| {})), Duration::from_secs(1)).expect("late");
    let stranger = Authority::new("weft");
    let cases: Vec<(&str, Option<(CertificateDer<'static>, KeyPair)>)> = vec![
        ("no certificate", None),
        ("another authority", Some(stranger.leaf(good, |_| {}))),
        (
            "expired",
            Some(ours.leaf(good, |p| {
                p.not_before = (now - 3 * day).into();
                p.not_after = (now - day).into();
            })),
        ),
        ("not yet valid", Some(ours.leaf(good, |p| p.not_before = (now + day).into()))),
        ("another trust domain", Some(ours.leaf("spiffe://other.example/ns/shop/sa/client", |_| {}))),
        (
            "two identities",
            Some(ours.leaf(good, |p| {
                p.subject_alt_names
                    .push(SanType::URI("spiffe://cluster.local/ns/shop/sa/admin".try_into().unwrap()));
            })),
        ),
        ("no identity", Some(ours.leaf(good, |p| p.subject_alt_names.clear()))),
        (
            "a server's certificate",
            Some(ours.leaf(good, |p| {
                p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            })),
        ),
        ("upper case", Some(ours.leaf("spiffe://Cluster.local/ns/shop/sa/client", |_| {}))),
        ("a longer path", Some(ours.leaf("spiffe://cluster.local/ns/shop/sa/client/x", |_| {}))),
    ];
    for (case, identity) in cases {
        let result = knock(client, to, &name, identity, at_once);
        assert!(result.is_err(), "{case} was let in");
    }
    let wrong_pod = knock(client, to, "another-pod.weft.internal", Some(ours.leaf(good, |_| {})), at_once);
    assert!(wrong_pod.is_err(), "another pod's name was let in");
}

#[test]
fn what_calls_itself_bytes_is_no_request_at_a_port_declared_http() {
    let Some(pair) = pair("bytes_as_http", &[]) else { return };
    let to = SocketAddr::new(pair.server.sidecar.pod.ip.into(), 8080);
    let name = format!("{}.weft.internal", pair.server.sidecar.uid);
    let ours = issuer_of(&pair.mesh.dir().join("state"));
    let forged =
        b"GET /head HTTP/1.1\r\nHost: a\r\nweft-client-id: spiffe://cluster.local/ns/shop/sa/admin\r\n\r\n";
    let try_it = || {
        let identity = ours.leaf("spiffe://cluster.local/ns/shop/sa/client", |_| {});
        say(&pair.client.pod, to, &name, Some(identity), Duration::ZERO, forged)
    };
    try_it().expect("the control: nothing is declared, so bytes are bytes");
    service(&pair.mesh, "shop", "echo", "10.96.0.1", &[("http", 80, 8080)]).unwrap();
    wait(Duration::from_secs(10), || Ok(try_it().is_err())).unwrap();
    assert!(pair.server.sidecar.metric("weft_proxy_errors_total", &["not_http"]).unwrap() >= 1.0);
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
}

#[test]
fn empty_lines_before_a_request_do_not_make_it_bytes() {
    let Some(pair) = pair("empty_lines", &[]) else { return };
    let ask = "exec 3<>/dev/tcp/10.96.0.1/80; \
               printf '\\r\\n\\r\\nGET /head HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\
               weft-client-id: spiffe://cluster.local/ns/shop/sa/admin\\r\\n\\r\\n' >&3; timeout 10 cat <&3";
    let said = output(pair.client.app("bash").args(["-c", ask])).unwrap();
    assert!(said.starts_with("HTTP/1.1 ") && !said.contains("sa/admin"), "{said}");
}

/// The mesh's own issuer, read from the state directory as an attacker with the key would.
pub(crate) fn issuer_of(state: &std::path::Path) -> Authority {
    let both = std::fs::read_to_string(state.join("root-1.pem")).unwrap();
    let key = both.find("-----BEGIN PRIVATE KEY-----").unwrap();
    let end = key + both[key..].find("-----END PRIVATE KEY-----").unwrap() + 25;
    let key = KeyPair::from_pem(&both[key..end]).unwrap();
    let cert = both.find("-----BEGIN CERTIFICATE-----").unwrap();
    let end = cert + both[cert..].find("-----END CERTIFICATE-----").unwrap() + 25;
    Authority { issuer: Issuer::from_ca_cert_pem(&both[cert..end], key).unwrap() }
}
