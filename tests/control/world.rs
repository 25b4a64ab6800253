//! A real controller on loopback sockets, and a stranger's credentials for it.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use tokio::time::timeout;
use weft_control_plane::{
    Controller,
    ca::{Claims, SERVER_NAME},
    config::Config,
    serve::tls::provider,
};

use crate::raw::{CERTIFY, Call, Connection, DELTA, LONG, Message, fields, frame};

/// A folder that goes when its test ends.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("weft-control-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One controller and its folder of YAML.
pub(crate) struct World {
    pub(crate) controller: Controller,
    pub(crate) folder: Folder,
}

impl World {
    pub(crate) async fn start(name: &str, yaml: &str) -> Self {
        let folder = Folder::new(name);
        std::fs::create_dir_all(folder.0.join("mesh")).unwrap();
        std::fs::write(folder.0.join("mesh/mesh.yaml"), yaml).unwrap();
        // Who asks must be a pod that there is; in a file of its own, so that no test takes it away.
        std::fs::write(folder.0.join("mesh/callers.yaml"), callers()).unwrap();
        let controller = controller(&folder.0).await;
        Self { controller, folder }
    }

    /// Another run of it, over the same folders.
    pub(crate) async fn restart(&mut self) {
        let new = controller(&self.folder.0).await;
        std::mem::replace(&mut self.controller, new).stop().await;
    }

    /// Killed, and started again on a folder that somebody changed meanwhile.
    pub(crate) async fn crash_and_find(self, yaml: &str) -> Self {
        let Self { controller: killed, folder } = self;
        // Every task of it ends where it stands.
        drop(killed);
        std::fs::write(folder.0.join("mesh/mesh.yaml"), yaml).unwrap();
        let controller = controller(&folder.0).await;
        Self { controller, folder }
    }

    pub(crate) fn write(&self, yaml: &str) {
        std::fs::write(self.folder.0.join("new"), yaml).unwrap();
        std::fs::rename(self.folder.0.join("new"), self.folder.0.join("mesh/mesh.yaml")).unwrap();
    }

    /// A connection as a pod of `shop`.
    pub(crate) async fn connect(&self, account: &str, uid: &str) -> Connection {
        let tls = self.credentials(account, uid).await;
        Connection::open(self.controller.discovery(), SERVER_NAME, tls).await.unwrap()
    }

    /// One stream of a pod of its own.
    pub(crate) async fn stream(&self) -> Call {
        self.connect("web", "web-1-uid").await.call(DELTA)
    }

    async fn credentials(&self, account: &str, uid: &str) -> ClientConfig {
        let claims = Claims::new("shop", account, uid, "", SystemTime::now() + LONG);
        let token = self.controller.ca().join_key().unwrap().sign(&claims);
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap();
        let anchors = std::fs::read(self.folder.0.join("state/trust-anchors.pem")).unwrap();
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(&anchors) {
            roots.add(root.unwrap()).unwrap();
        }
        let config = || {
            ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&TLS13])
                .unwrap()
                .with_root_certificates(roots.clone())
        };
        let mut plain = config().with_no_client_auth();
        plain.alpn_protocols = vec![b"h2".to_vec()];
        let connection = Connection::open(self.controller.identity(), SERVER_NAME, plain).await.unwrap();
        let mut call = connection.call(CERTIFY);
        call.raw(frame(&Message::default().bytes(1, csr.der()).text(2, &token).done())).await;
        call.finish();
        let answer = timeout(LONG, call.message()).await.unwrap().expect("a certificate");
        let chain = fields(&answer).into_iter().filter(|(field, ..)| *field == 1);
        let chain: Vec<CertificateDer<'static>> = chain.map(|(_, _, der)| der.into()).collect();
        let key: PrivateKeyDer<'static> = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let mut mutual = config().with_client_auth_cert(chain, key).unwrap();
        mutual.alpn_protocols = vec![b"h2".to_vec()];
        mutual
    }

    /// One number of `/metrics`.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let (_, body) = self.http("/metrics").await;
        let line = body.lines().find_map(|line| line.strip_prefix(&format!("weft_controller_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {body}")).parse().unwrap()
    }

    /// Waits for a number to be reached.
    pub(crate) async fn until(&self, name: &str, wanted: u64) {
        let reached = async {
            while self.metric(name).await < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, reached).await.unwrap_or_else(|_| panic!("{name} does not come to {wanted}"));
    }

    pub(crate) async fn http(&self, path: &str) -> (u16, String) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.controller.api()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

async fn controller(folder: &Path) -> Controller {
    let mut config = Config::loopback(folder.join("mesh"), folder.join("state")).unwrap();
    config.certificate_lifetime = Duration::from_secs(3_600);
    let controller = Controller::start(config).await.unwrap();
    timeout(LONG, controller.synced()).await.unwrap();
    controller
}

/// The pods that connect.
fn callers() -> String {
    pod("web-1", "web", [10, 0, 200, 1])
}

/// A Service of one port without pods.
pub(crate) fn service(name: &str, target: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{port: 80, targetPort: {target}}}]}}\n"
    )
}

/// A Service whose text differs from version to version: what its callers see.
pub(crate) fn versioned(name: &str, version: u16) -> String {
    let protocol = ["http", "tcp", "grpc", "tls"][usize::from(version % 4)];
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{ports: [{{port: 80, appProtocol: {protocol}}}]}}\n---\napiVersion: weft.dev/v1alpha1\n\
         kind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  targetRefs: [{{kind: Service, \
         name: {name}}}]\n  timeouts: {{request: {}ms}}\n",
        1_000 + version
    )
}

/// A pod of a service.
pub(crate) fn pod(name: &str, app: &str, ip: [u8; 4]) -> String {
    let [a, b, c, d] = ip;
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}-uid, labels: {{app: \
         {app}}}, annotations: {{weft.dev/injected: \"true\"}}}}\nspec: {{serviceAccountName: {app}}}\nstatus: \
         {{podIP: {a}.{b}.{c}.{d}}}\n"
    )
}

/// A route of a service to another.
pub(crate) fn route(service: &str, to: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {service}, namespace: \
         shop}}\nspec:\n  parentRefs: [{{group: \"\", kind: Service, name: {service}}}]\n  rules: [{{backendRefs: \
         [{{name: {to}, port: 80}}]}}]\n"
    )
}
