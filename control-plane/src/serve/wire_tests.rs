//! A whole controller over loopback sockets and real TLS, asked by messages that are built by hand.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use weft_core::identity::PodUid;
use weft_proto::{
    ads::{Change, Client, ResourceType},
    convert,
    pb::{
        ads::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
        v1::{
            Applied, CertifyRequest, CertifyResponse, ReportRequest, identity_client::IdentityClient,
            telemetry_client::TelemetryClient,
        },
    },
};

use crate::{
    Controller,
    api::types::{Certs, Status},
    ca::{Claims, SERVER_NAME},
    config::Config,
    index::tests::SHOP,
};

struct Mesh {
    folder: PathBuf,
    controller: Controller,
}

/// A workload's certificate and what it trusts.
#[derive(Clone)]
struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    roots: RootCertStore,
}

impl Mesh {
    async fn start(name: &str, yaml: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("weft-wire-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(folder.join("mesh")).unwrap();
        let mesh = Self { controller: Self::controller(&folder, yaml).await, folder };
        timeout(LONG, mesh.controller.synced()).await.unwrap();
        mesh
    }

    async fn controller(folder: &std::path::Path, yaml: &str) -> Controller {
        std::fs::write(folder.join("mesh/shop.yaml"), yaml).unwrap();
        let mut config = Config::loopback(folder.join("mesh"), folder.join("state")).unwrap();
        config.certificate_lifetime = Duration::from_secs(3_600);
        Controller::start(config).await.unwrap()
    }

    fn write(&self, yaml: &str) {
        std::fs::write(self.folder.join("new"), yaml).unwrap();
        std::fs::rename(self.folder.join("new"), self.folder.join("mesh/shop.yaml")).unwrap();
    }

    fn roots(&self) -> RootCertStore {
        let text = std::fs::read(self.folder.join("state/trust-anchors.pem")).unwrap();
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(&text) {
            roots.add(root.unwrap()).unwrap();
        }
        roots
    }

    fn token(&self, account: &str, uid: &str) -> String {
        let claims = Claims::new("shop", account, uid, "", SystemTime::now() + LONG);
        self.controller.ca().join_key().unwrap().sign(&claims)
    }

    async fn certify(&self, token: String) -> Result<(CertifyResponse, KeyPair), tonic::Status> {
        let key = KeyPair::generate().unwrap();
        let csr_der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec().into();
        let tls = client_config(&self.roots(), None);
        let channel = channel(self.controller.identity(), tls).await.unwrap();
        let response = IdentityClient::new(channel).certify(CertifyRequest { csr_der, token }).await?;
        Ok((response.into_inner(), key))
    }

    /// Waits until the controller has heard of a pod.
    async fn known(&self, uid: &str) {
        let uid = PodUid::new(uid).unwrap();
        let known = async {
            while self.controller.published.workload(&uid).is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, known).await.unwrap();
    }

    async fn credentials(&self, account: &str, uid: &str) -> Credentials {
        let (response, key) = self.certify(self.token(account, uid)).await.unwrap();
        Credentials {
            chain: response.chain_der.iter().map(|der| der.to_vec().into()).collect(),
            key: Arc::new(PrivatePkcs8KeyDer::from(key.serialize_der()).into()),
            roots: self.roots(),
        }
    }

    async fn discovery(&self, credentials: &Credentials) -> Channel {
        let tls = client_config(&credentials.roots, Some(credentials));
        channel(self.controller.discovery(), tls).await.unwrap()
    }

    async fn http(&self, method: &str, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.controller.api()).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Takes a step of a root's rotation.
    async fn rotate(&self, step: &str) -> (u16, String) {
        self.http("POST", &format!("/api/v1/certs/rotate?root={step}")).await
    }

    async fn certs(&self) -> Certs {
        serde_json::from_str(&self.http("GET", "/api/v1/certs").await.1).unwrap()
    }

    async fn status(&self) -> Status {
        serde_json::from_str(&self.http("GET", "/api/v1/status").await.1).unwrap()
    }

    async fn stop(self) {
        self.controller.stop().await;
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn client_config(roots: &RootCertStore, credentials: Option<&Credentials>) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(super::tls::provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots.clone());
    let mut config = match credentials {
        Some(c) => builder.with_client_auth_cert(c.chain.clone(), c.key.clone_key()).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

async fn channel(address: SocketAddr, tls: ClientConfig) -> Result<Channel, tonic::transport::Error> {
    let connector = TlsConnector::from(Arc::new(tls));
    let dial = tower::service_fn(move |_: http::Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from(SERVER_NAME).unwrap();
            Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    });
    Channel::from_static("http://controller").connect_with_connector(dial).await
}

/// One ADS stream, message by message.
struct Wire {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Wire {
    async fn open(channel: Channel) -> Result<Self, tonic::Status> {
        let (requests, seen) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(seen)).await?.into_inner();
        Ok(Self { requests, responses })
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn subscribe(&self, ty: ResourceType, names: &[&str]) {
        self.send(DeltaDiscoveryRequest {
            type_url: ty.type_url().to_owned(),
            resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
            ..Default::default()
        })
        .await;
    }

    async fn ack(&self, response: &DeltaDiscoveryResponse) {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        })
        .await;
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        timeout(LONG, self.responses.message())
            .await
            .expect("an answer in time")
            .unwrap()
            .expect("the stream is open")
    }

    /// Nothing comes for a while.
    async fn is_quiet(&mut self) -> bool {
        timeout(Duration::from_millis(300), self.responses.message()).await.is_err()
    }
}

/// Sends one report, on a stream of its own; gives the sequence up to which all is taken.
async fn tell(channel: Channel, report: ReportRequest) -> u64 {
    let (reports, seen) = mpsc::channel(1);
    reports.send(report).await.unwrap();
    let answers = TelemetryClient::new(channel).report(ReceiverStream::new(seen)).await.unwrap();
    timeout(LONG, answers.into_inner().message()).await.unwrap().unwrap().unwrap().sequence
}

/// What a response brought is in force.
fn in_force(sequence: u64, response: &DeltaDiscoveryResponse) -> ReportRequest {
    let applied = response.resources.iter().map(|resource| Applied {
        type_url: response.type_url.clone(),
        name: resource.name.clone(),
        version: resource.version.clone(),
        removed: false,
    });
    ReportRequest { sequence, session: "s".to_owned(), applied: applied.collect(), ..Default::default() }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

#[tokio::test]
async fn a_sidecar_follows_its_mesh() {
    let mesh = Mesh::start("follow", SHOP).await;
    let credentials = mesh.credentials("cart", "cart-1-uid").await;
    let channel = mesh.discovery(&credentials).await;
    let mut wire = Wire::open(channel.clone()).await.unwrap();
    let mut client = Client::new(Node { id: "cart-1".to_owned(), ..Default::default() });
    client.connected();
    for (ty, name) in [
        (ResourceType::WorkloadConfig, "self/cart-1-uid"),
        (ResourceType::Authorization, "authz/cart-1-uid/0"),
        (ResourceType::TrustBundle, "trust/cluster.local"),
        (ResourceType::Service, "ip/10.96.0.10:80"),
        (ResourceType::Service, "ip/10.0.0.2:9999"),
        (ResourceType::Service, "host/cart.shop.svc.cluster.local:80"),
        (ResourceType::Endpoint, "ep/shop/cart:80/*"),
        (ResourceType::Route, "route/shop/cart:80"),
    ] {
        client.subscribe(ty, name);
    }
    let mut held: BTreeMap<String, bytes::Bytes> = BTreeMap::new();
    let mut removed = Vec::new();
    let mut complete = false;
    while held.len() < 8 || removed.is_empty() || !complete {
        while let Some(request) = client.next_request() {
            wire.send(request).await;
        }
        let response = wire.next().await;
        client.receive(response, &mut |change: Change<'_>| {
            match change {
                Change::Update { name, body, .. } => {
                    held.insert(name.to_owned(), body.clone());
                }
                Change::Removed { name, .. } => removed.push(name.to_owned()),
                Change::CollectionComplete { .. } => complete = true,
            }
            Ok(())
        });
    }
    while let Some(request) = client.next_request() {
        wire.send(request).await;
    }
    assert_eq!(removed, ["route/shop/cart:80"]);
    let service = convert::service::parse(&held["ip/10.96.0.10:80"]).unwrap();
    assert_eq!(service.name.to_string(), "shop/cart:80");
    assert_eq!(held["ip/10.96.0.10:80"], held["host/cart.shop.svc.cluster.local:80"]);
    let pod = convert::service::parse(&held["ip/10.0.0.2:9999"]).unwrap();
    assert_eq!(pod.pod.unwrap().uid, PodUid::new("cart-2-uid").unwrap());
    let endpoint = convert::endpoint::parse(&held["ep/shop/cart:80/cart-1-uid"], "shop").unwrap();
    assert_eq!(endpoint.identity.unwrap().service_account(), "cart");
    let own = convert::workload::parse(&held["self/cart-1-uid"]).unwrap();
    assert_eq!(own.identity.service_account(), "cart");
    assert_eq!(convert::trust::parse(&held["trust/cluster.local"]).unwrap().roots.len(), 1);

    // A route appears where there was none, and only what it touches is sent.
    let route = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec:\n  parentRefs: [{group: core, kind: Service, name: cart}]\n  rules: [{backendRefs: [{name: cart, port: 80}]}]\n";
    mesh.write(&format!("{SHOP}{route}"));
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    while seen.len() < 3 {
        let response = wire.next().await;
        seen.extend(response.resources.iter().map(|r| (r.name.clone(), r.version.clone())));
        client.receive(response, &mut |_: Change<'_>| Ok(()));
        while let Some(request) = client.next_request() {
            wire.send(request).await;
        }
    }
    let changed: Vec<_> = seen.keys().map(String::as_str).collect();
    assert_eq!(changed, ["host/cart.shop.svc.cluster.local:80", "ip/10.96.0.10:80", "route/shop/cart:80"]);
    assert!(wire.is_quiet().await);

    // "Applied" is what the sidecar says, not what it acknowledged.
    let route_status = |status: Status| status.objects.into_iter().find(|o| o.kind == "HTTPRoute").unwrap();
    let before = route_status(mesh.status().await);
    assert_eq!((before.applied, before.of, before.laggards[0].pod.as_str()), (0, 1, "shop/cart-1"));
    assert_eq!((before.file.as_str(), before.conditions[0].status), ("shop.yaml", true));
    let applied = seen.iter().map(|(name, version)| Applied {
        type_url: name.parse::<weft_proto::names::Name>().unwrap().resource_type().type_url().to_owned(),
        name: name.clone(),
        version: version.clone(),
        removed: false,
    });
    let report = ReportRequest {
        sequence: 1,
        session: "s".to_owned(),
        applied: applied.collect(),
        ..Default::default()
    };
    assert_eq!(tell(channel, report).await, 1);
    let after = route_status(mesh.status().await);
    assert_eq!((after.applied, after.of, after.laggards.len()), (1, 1, 0), "{after:?}");
    assert!(after.applied_after_ms.is_some());
    let status = mesh.status().await;
    assert!(status.synced && status.sidecars[0].connected && status.problems.is_empty());
    assert_eq!(mesh.http("GET", "/ready").await.0, 200);
    assert!(mesh.http("GET", "/metrics").await.1.contains("weft_controller_streams 1"));
    mesh.stop().await;
    assert!(timeout(LONG, wire.responses.message()).await.unwrap().is_err(), "told to come back");
}

#[tokio::test]
async fn a_policy_that_does_not_fit_is_applied_nowhere_and_the_others_are() {
    let policy = |name: &str, action: &str, count: usize| {
        let rules = vec!["{from: [{namespaces: [till]}]}"; count].join(", ");
        format!(
            "---\napiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{action: {action}, rules: [{rules}]}}\n"
        )
    };
    let many: String = ["a", "b", "c", "d"].iter().map(|name| policy(name, "Allow", 1_024)).collect();
    let mesh = Mesh::start("room", &format!("{SHOP}{many}{}", policy("e", "Allow", 1))).await;
    let credentials = mesh.credentials("cart", "cart-1-uid").await;
    let channel = mesh.discovery(&credentials).await;
    let mut wire = Wire::open(channel.clone()).await.unwrap();
    let (ty, name) = (ResourceType::Authorization, "authz/cart-1-uid/0");
    wire.subscribe(ty, &[name]).await;
    let told = wire.next().await;
    wire.ack(&told).await;
    let (reports, reports_seen) = mpsc::channel(2);
    let mut answers =
        TelemetryClient::new(channel).report(ReceiverStream::new(reports_seen)).await.unwrap().into_inner();
    let mut live = async |response: &DeltaDiscoveryResponse, sequence| {
        let applied = Applied {
            type_url: ty.type_url().to_owned(),
            name: name.to_owned(),
            version: response.resources[0].version.clone(),
            removed: false,
        };
        let report =
            ReportRequest { sequence, session: "s".to_owned(), applied: vec![applied], ..Default::default() };
        reports.send(report).await.unwrap();
        timeout(LONG, answers.message()).await.unwrap().unwrap().unwrap();
    };
    live(&told, 1).await;
    let of = |status: &Status, name: &str| {
        let found = status.objects.iter().find(|o| o.kind == "AuthorizationPolicy" && o.name == name);
        let found = found.unwrap();
        let missing: Vec<_> = found.laggards.iter().map(|l| format!("{}: {}", l.pod, l.reason)).collect();
        (found.applied, found.of, missing.join("; "))
    };
    let status = mesh.status().await;
    assert_eq!(of(&status, "a"), (1, 1, String::new()));
    let (applied, all, why) = of(&status, "e");
    assert!((applied, all) == (0, 1) && why.starts_with("the controller: ") && why.contains("4096"), "{why}");
    let problem = status.problems.iter().find(|p| p.object == "AuthorizationPolicy/shop/e").unwrap();
    assert!(problem.reason.contains("it lets nobody in there"), "{problem:?}");
    // What somebody needs to deny now is in force all the same, and takes the place of one that allows.
    mesh.write(&format!("{SHOP}{many}{}", policy("now", "Deny", 1)));
    let told = wire.next().await;
    let rules = convert::authz::parse(&told.resources[0].resource.as_ref().unwrap().value).unwrap().rules;
    assert!(rules.iter().any(|rule| &*rule.object.name == "now"));
    live(&told, 2).await;
    let status = mesh.status().await;
    assert_eq!((of(&status, "now"), of(&status, "a")), ((1, 1, String::new()), (1, 1, String::new())));
    assert_eq!((of(&status, "d").0, of(&status, "d").1), (0, 1));
    mesh.stop().await;
}

#[tokio::test]
async fn the_rules_of_the_wire() {
    let mesh = Mesh::start("rules", SHOP).await;
    let credentials = mesh.credentials("cart", "cart-1-uid").await;
    let mut wire = Wire::open(mesh.discovery(&credentials).await).await.unwrap();
    // An unknown type is no reason to end the stream.
    wire.send(DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/weft.v2.New".to_owned(),
        ..Default::default()
    })
    .await;
    // Another's settings, and a service that is not there, look the same; both are answered at once.
    wire.subscribe(ResourceType::WorkloadConfig, &["self/cart-2-uid"]).await;
    let hidden = wire.next().await;
    assert_eq!(hidden.removed_resources, ["self/cart-2-uid"]);
    wire.ack(&hidden).await;
    wire.subscribe(ResourceType::Authorization, &["authz/cart-2-uid/8081"]).await;
    assert_eq!(wire.next().await.removed_resources, ["authz/cart-2-uid/8081"]);
    wire.subscribe(ResourceType::Service, &["svc/shop/late:80", "svc/shop/cart:80"]).await;
    let first = wire.next().await;
    assert_eq!(
        (names(&first), &*first.removed_resources),
        (vec!["svc/shop/cart:80"], &["svc/shop/late:80".to_owned()][..])
    );

    // One response of a type at a time: a change waits for the ACK, and changes collapse meanwhile.
    let late = |port: u16| {
        format!(
            "{SHOP}---\napiVersion: v1\nkind: Service\nmetadata: {{name: late, namespace: shop}}\nspec: {{clusterIP: 10.96.0.50, ports: [{{port: 80, targetPort: {port}, appProtocol: http}}, {{port: {port}, name: x}}]}}\n"
        )
    };
    mesh.write(&late(81));
    assert!(wire.is_quiet().await);
    // A stale nonce is no ACK.
    wire.ack(&DeltaDiscoveryResponse { nonce: "old".to_owned(), ..first.clone() }).await;
    assert!(wire.is_quiet().await);
    wire.ack(&first).await;
    let second = wire.next().await;
    assert_eq!(names(&second), ["svc/shop/late:80"]);
    // A NACK: the same version is not sent again.
    wire.send(DeltaDiscoveryRequest {
        type_url: second.type_url.clone(),
        response_nonce: second.nonce.clone(),
        error_detail: Some(weft_proto::pb::ads::Status {
            code: 3,
            message: "no".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    })
    .await;
    assert!(wire.is_quiet().await);
    // Asking again is answered although nothing changed.
    wire.subscribe(ResourceType::Service, &["svc/shop/cart:80"]).await;
    let again = wire.next().await;
    assert_eq!(names(&again), ["svc/shop/cart:80"]);
    wire.ack(&again).await;
    mesh.write(SHOP);
    let gone = wire.next().await;
    assert_eq!(gone.removed_resources, ["svc/shop/late:80"]);

    // Resume: what did not change is not sent, what is gone is removed.
    let version = again.resources[0].version.clone();
    let mut wire = Wire::open(mesh.discovery(&credentials).await).await.unwrap();
    wire.send(DeltaDiscoveryRequest {
        type_url: ResourceType::Service.type_url().to_owned(),
        resource_names_subscribe: vec!["svc/shop/cart:80".to_owned(), "svc/shop/late:80".to_owned()],
        initial_resource_versions: [("svc/shop/cart:80", version.as_str()), ("svc/shop/late:80", "x")]
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .into(),
        ..Default::default()
    })
    .await;
    let resumed = wire.next().await;
    assert_eq!(
        (resumed.resources.len(), &*resumed.removed_resources),
        (0, &["svc/shop/late:80".to_owned()][..])
    );
    mesh.stop().await;
}

#[tokio::test]
async fn only_pods_of_the_mesh_get_in_and_a_rotation_reaches_them() {
    let mesh = Mesh::start("who", SHOP).await;
    // No certificate, and one of another authority.
    let nobody = channel(mesh.controller.discovery(), client_config(&mesh.roots(), None)).await;
    let refused = match nobody {
        Ok(channel) => Wire::open(channel).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    let other = Mesh::start("who-other", SHOP).await;
    let mut foreign = other.credentials("cart", "cart-1-uid").await;
    foreign.roots = mesh.roots();
    let foreign = channel(mesh.controller.discovery(), client_config(&foreign.roots, Some(&foreign))).await;
    let refused = match foreign {
        Ok(channel) => Wire::open(channel).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    other.stop().await;

    // Tokens: none, another's, and one that says another account than the pod has.
    assert_eq!(mesh.certify("x.y".to_owned()).await.unwrap_err().code(), tonic::Code::Unauthenticated);
    let lie = mesh.certify(mesh.token("admin", "cart-1-uid")).await.unwrap_err();
    assert_eq!(lie.code(), tonic::Code::PermissionDenied);
    // A pod that nobody has heard of yet asks again.
    let early = mesh.certify(mesh.token("cart", "new-uid")).await.unwrap_err();
    assert_eq!(early.code(), tonic::Code::PermissionDenied);
    mesh.write(&format!("{SHOP}---\napiVersion: v1\nkind: Pod\nmetadata: {{name: new, namespace: shop, uid: new-uid}}\nspec: {{serviceAccountName: cart}}\n"));
    mesh.known("new-uid").await;
    let new = mesh.credentials("cart", "new-uid").await;
    let mut wire = Wire::open(mesh.discovery(&new).await).await.unwrap();
    wire.subscribe(ResourceType::WorkloadConfig, &["self/new-uid"]).await;
    let own = wire.next().await;
    assert_eq!(names(&own), ["self/new-uid"]);
    wire.ack(&own).await;

    // A rotation is seen by everybody at once; a root's takes its steps.
    wire.subscribe(ResourceType::TrustBundle, &["trust/cluster.local"]).await;
    let sequence = |response: &DeltaDiscoveryResponse| {
        let body = response.resources[0].resource.as_ref().unwrap().value.clone();
        let bundle = convert::trust::parse(&body).unwrap();
        (bundle.sequence, bundle.roots.len())
    };
    let bundle = wire.next().await;
    assert_eq!(sequence(&bundle), (1, 1));
    wire.ack(&bundle).await;
    assert_eq!(mesh.http("POST", "/api/v1/certs/rotate").await, (200, r#"{"sequence":2}"#.to_owned()));
    let bundle = wire.next().await;
    assert_eq!(sequence(&bundle), (2, 1));
    wire.ack(&bundle).await;
    assert_eq!((mesh.rotate("retire").await.0, mesh.rotate("activate").await.0), (409, 409));
    for (step, forced, wanted) in
        [("add", "", (3, 2)), ("activate", "&force=true", (4, 2)), ("retire", "&force=true", (5, 1))]
    {
        if !forced.is_empty() {
            // It has neither said that it trusts the new root nor renewed.
            let (status, said) = mesh.rotate(step).await;
            assert!(
                status == 409 && said.contains("shop/new") && said.contains("--force"),
                "{status} {said}"
            );
        }
        let answer = mesh.rotate(&format!("{step}{forced}")).await;
        assert_eq!(answer.0, 200, "{answer:?}");
        let bundle = wire.next().await;
        assert_eq!(sequence(&bundle), wanted);
        wire.ack(&bundle).await;
    }
    // The controller's own certificate has followed: only the new root is trusted now.
    let mut renewed = None;
    for _ in 0..50 {
        match mesh.certify(mesh.token("cart", "cart-1-uid")).await {
            Ok(ok) => {
                renewed = Some(ok);
                break;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    assert_eq!(renewed.unwrap().0.roots_der.len(), 1);
    let certs = mesh.certs().await;
    assert_eq!((certs.sequence, certs.anchors.len()), (5, 1));
    assert!(certs.workloads.iter().any(|w| w.uid == "cart-1-uid" && w.pod == "shop/cart-1"), "{certs:?}");
    assert_eq!(mesh.http("GET", "/api/v1/routes?window=2h").await.0, 400);
    assert_eq!(mesh.http("GET", "/api/v1/routes?window=10s&service=shop/cart").await.0, 200);
    assert_eq!(mesh.http("GET", "/nothing").await.0, 404);
    assert_eq!(mesh.http("GET", "/api/v1/certs/rotate").await.0, 405);
    mesh.stop().await;
}

#[tokio::test]
async fn a_new_root_signs_when_every_connected_sidecar_says_that_it_trusts_it() {
    let mesh = Mesh::start("activate", SHOP).await;
    let credentials = mesh.credentials("cart", "cart-1-uid").await;
    let channel = mesh.discovery(&credentials).await;
    let mut wire = Wire::open(channel.clone()).await.unwrap();
    wire.subscribe(ResourceType::TrustBundle, &["trust/cluster.local"]).await;
    let old = wire.next().await;
    wire.ack(&old).await;
    tell(channel.clone(), in_force(1, &old)).await;
    assert_eq!(mesh.rotate("add").await.0, 200);
    let new = wire.next().await;
    wire.ack(&new).await;
    // It has the new root, and has not said that it trusts it: acknowledged is not in force.
    let (status, said) = mesh.rotate("activate").await;
    assert!(status == 409 && said.contains("shop/cart-1") && said.contains("--force"), "{status} {said}");
    let bundle = async || mesh.certs().await.workloads.iter().find(|w| w.connected).map(|w| w.bundle);
    assert_eq!(bundle().await, Some(1), "and `weft certs` shows who has not");
    tell(channel, in_force(2, &new)).await;
    assert_eq!(bundle().await, Some(2));
    assert_eq!(mesh.rotate("activate").await.0, 200);
    mesh.stop().await;
}

#[tokio::test]
async fn a_root_is_retired_when_no_connected_sidecar_is_known_by_it_also_after_a_restart() {
    let mut mesh = Mesh::start("retire", SHOP).await;
    let mut old = mesh.credentials("cart", "cart-1-uid").await;
    for step in ["add", "activate"] {
        assert_eq!(mesh.rotate(step).await.0, 200, "{step}");
    }
    old.roots = mesh.roots();
    // A controller that has just begun has signed nothing: it knows what sidecars show.
    mesh.controller.stop().await;
    mesh.controller = Mesh::controller(&mesh.folder, SHOP).await;
    timeout(LONG, mesh.controller.synced()).await.unwrap();
    let late = Wire::open(mesh.discovery(&old).await).await.unwrap();
    let (status, said) = mesh.rotate("retire").await;
    assert!(status == 409 && said.contains("shop/cart-1"), "{status} {said}");
    // It renews, and its stream is still the old one.
    mesh.credentials("cart", "cart-1-uid").await;
    let certs = mesh.certs().await;
    let signing = certs.anchors.iter().find(|anchor| anchor.signing).unwrap();
    let own = certs.workloads.iter().find(|workload| workload.uid == "cart-1-uid").unwrap();
    assert!(own.connected && own.anchor == signing.serial, "{certs:?}");
    assert_eq!(mesh.rotate("retire").await.0, 200);
    drop(late);
    mesh.stop().await;
}

#[tokio::test]
async fn a_pod_that_opens_streams_without_end_has_the_newest_two() {
    let mesh = Mesh::start("streams", SHOP).await;
    let credentials = mesh.credentials("cart", "cart-1-uid").await;
    let mut wires = Vec::new();
    for _ in 0..4 {
        wires.push(Wire::open(mesh.discovery(&credentials).await).await.unwrap());
    }
    let newest = wires.split_off(2);
    for mut old in wires {
        let ended = timeout(LONG, old.responses.message()).await.unwrap().unwrap_err();
        assert_eq!(ended.code(), tonic::Code::Unavailable, "{ended}");
    }
    for mut wire in newest {
        wire.subscribe(ResourceType::Service, &["svc/shop/cart:80"]).await;
        assert_eq!(names(&wire.next().await), ["svc/shop/cart:80"]);
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_deleted_pod_is_not_certified_and_its_streams_end() {
    let pods = |named: &[&str]| {
        let pod = |name: &&str| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}-uid}}\n\
                 spec: {{serviceAccountName: cart}}\n"
            )
        };
        SHOP.to_owned() + &named.iter().map(pod).collect::<String>()
    };
    let mesh = Mesh::start("deleted", &pods(&["gone", "stays"])).await;
    let (gone, stays) =
        (mesh.credentials("cart", "gone-uid").await, mesh.credentials("cart", "stays-uid").await);
    let mut ending = Wire::open(mesh.discovery(&gone).await).await.unwrap();
    let mut staying = Wire::open(mesh.discovery(&stays).await).await.unwrap();
    // Subscribed to nothing of its own.
    ending.subscribe(ResourceType::Service, &["svc/shop/cart:80"]).await;
    assert_eq!(names(&ending.next().await), ["svc/shop/cart:80"]);
    // What it has said outlives its streams, and must not outlive the pod.
    tell(
        mesh.discovery(&gone).await,
        ReportRequest { sequence: 1, session: "s".to_owned(), ..Default::default() },
    )
    .await;
    let sidecars = async || -> BTreeMap<String, bool> {
        mesh.status().await.sidecars.into_iter().map(|sidecar| (sidecar.pod, sidecar.connected)).collect()
    };
    let before = sidecars().await;
    assert_eq!(
        (before.get("shop/gone"), before.get("shop/cart-1")),
        (Some(&true), Some(&false)),
        "{before:?}"
    );
    mesh.write(&pods(&["stays"]));
    let ended = timeout(LONG, ending.responses.message()).await.unwrap().unwrap_err();
    assert_eq!((ended.code(), ended.message()), (tonic::Code::PermissionDenied, "there is no such pod"));
    let after = sidecars().await;
    assert!(!after.contains_key("shop/gone") && after["shop/stays"], "{after:?}");
    assert_eq!(after.get("shop/cart-1"), Some(&false), "it is there, and nobody has ever heard its sidecar");
    let certs = mesh.certs().await;
    let certified: Vec<_> = certs.workloads.iter().map(|workload| &*workload.uid).collect();
    assert_eq!(certified, ["stays-uid"]);
    // Its certificate is good for an hour, its token for as long as it says: neither opens anything.
    let again = Wire::open(mesh.discovery(&gone).await).await.map(drop).unwrap_err();
    assert_eq!(again.code(), tonic::Code::PermissionDenied);
    let (_reports, seen) = mpsc::channel(1);
    let mut telemetry = TelemetryClient::new(mesh.discovery(&gone).await);
    let refused = telemetry.report(ReceiverStream::<ReportRequest>::new(seen)).await.map(drop).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    let refused = mesh.certify(mesh.token("cart", "gone-uid")).await.map(drop).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    // Nobody else notices.
    staying.subscribe(ResourceType::Service, &["svc/shop/cart:80"]).await;
    assert_eq!(names(&staying.next().await), ["svc/shop/cart:80"]);
    // A pod of that uid under another service account is somebody else.
    mesh.write(&pods(&["stays"]).replace("serviceAccountName: cart", "serviceAccountName: other"));
    let ended = timeout(LONG, async {
        loop {
            if let Err(ended) = staying.responses.message().await {
                return ended;
            }
        }
    });
    assert_eq!(ended.await.unwrap().code(), tonic::Code::PermissionDenied);
    mesh.stop().await;
}

#[tokio::test]
async fn a_restart_with_an_empty_folder_removes_nothing() {
    let many: String = (0..30)
        .map(|i| format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: shop}}\nspec: {{clusterIP: 10.96.1.{i}, ports: [{{port: 80}}]}}\n"))
        .collect();
    let mut mesh = Mesh::start("restart", &format!("{SHOP}{many}")).await;
    let credentials = mesh.credentials("cart", "cart-1-uid").await;
    mesh.controller.stop().await;
    mesh.controller = Mesh::controller(&mesh.folder, SHOP).await;
    let mut wire = Wire::open(mesh.discovery(&credentials).await).await.unwrap();
    wire.subscribe(ResourceType::Service, &["svc/shop/s1:80"]).await;
    assert!(wire.is_quiet().await, "held: most of the mesh is missing");
    assert_eq!(mesh.http("GET", "/ready").await.0, 503);
    mesh.write(&format!("{SHOP}{many}"));
    assert_eq!(names(&wire.next().await), ["svc/shop/s1:80"]);
    mesh.stop().await;
}

const LONG: Duration = Duration::from_secs(20);
