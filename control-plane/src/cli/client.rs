//! Asks the controller's JSON API: at an address, or through a cluster.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};

use super::{cluster::Cluster, output::Format};
use crate::api::types::Refusal;

/// Which controller, and how to write.
#[derive(Clone, Debug, Args)]
pub(crate) struct Asking {
    /// The controller's API; without it the one on this machine, else that of the kubeconfig's cluster
    #[arg(long, env = "WEFT_API", value_name = "HOST:PORT", global = true)]
    pub(crate) api: Option<String>,
    /// The cluster's, even if there is one on this machine
    #[arg(long, global = true)]
    pub(crate) kube: bool,
    /// The namespace that Weft is installed in
    #[arg(long, env = "WEFT_MESH_NAMESPACE", default_value = "weft", value_name = "NAME", global = true)]
    pub(crate) mesh_namespace: String,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// A controller's API.
#[derive(Clone)]
pub(crate) struct Api {
    authority: String,
    /// Through it, and not straight there.
    cluster: Option<Cluster>,
}

impl Api {
    /// What was asked for; without it a controller on this machine, then that of the kubeconfig's cluster.
    pub(crate) async fn find(asking: &Asking) -> Result<Self> {
        if let Some(address) = asking.api.as_deref().filter(|_| !asking.kube) {
            return Self::new(address);
        }
        let here = default_api();
        if !asking.kube && (!Cluster::is_there() || TcpStream::connect(&here).await.is_ok()) {
            return Self::new(&here);
        }
        let cluster = Cluster::find(&asking.mesh_namespace).await.map_err(|error| {
            anyhow!(
                "{error:#}\n  \
                 name the cluster:         KUBECONFIG=FILE, or write ~/.kube/config\n  \
                 or point to a controller: --api HOST:PORT, or WEFT_API=HOST:PORT"
            )
        })?;
        Ok(Self { authority: SERVER.to_owned(), cluster: Some(cluster) })
    }

    /// `HOST:PORT`, with or without `http://` before it.
    pub(crate) fn new(address: &str) -> Result<Self> {
        let authority = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
        ensure!(
            !authority.starts_with("https://"),
            "{address}: the API speaks plain HTTP on loopback; use `ssh -L` or `kubectl port-forward` to reach \
             another machine's"
        );
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
        ensure!(has_port, "{address:?} is not an address: write HOST:PORT, for instance {}", default_api());
        Ok(Self { authority: authority.to_owned(), cluster: None })
    }

    /// GET.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::GET, path).await
    }

    /// POST without a body.
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::POST, path).await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T> {
        let (status, body) = timeout(PATIENCE, self.exchange(method, path)).await.map_err(|_| {
            anyhow!(
                "the controller at {} did not answer within {PATIENCE:?}: ask again; its log says what it is doing",
                self.authority
            )
        })??;
        if !status.is_success() {
            let said = serde_json::from_slice::<Refusal>(&body)
                .map_or_else(|_| String::from_utf8_lossy(&body).trim().to_owned(), |refusal| refusal.error);
            bail!("the controller at {} says {status}: {said}", self.authority);
        }
        serde_json::from_slice(&body).with_context(|| {
            format!(
                "{}{path} is not the answer of a controller of this version ({}): use the `weft` of its release",
                self.authority,
                env!("CARGO_PKG_VERSION")
            )
        })
    }

    async fn exchange(&self, method: Method, path: &str) -> Result<(http::StatusCode, Bytes)> {
        if let Some(cluster) = &self.cluster {
            let (pod, stream) = cluster.connect().await?;
            return self.speak(stream, method, path).await.with_context(|| format!("through {pod}"));
        }
        let stream = TcpStream::connect(&self.authority).await.map_err(|error| {
            anyhow!(
                "no controller answers at {} ({error})\n  \
                 point to one:  --api HOST:PORT, or WEFT_API=HOST:PORT\n  \
                 start one:     weft-controller --source dir ./mesh --state-dir ./state\n  \
                 or see it all: weft demo",
                self.authority
            )
        })?;
        self.speak(stream, method, path).await
    }

    async fn speak(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        method: Method,
        path: &str,
    ) -> Result<(http::StatusCode, Bytes)> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await.with_context(|| {
            format!("{} does not speak HTTP like a controller: is it another program's port?", self.authority)
        })?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        connection.abort();
        let body = body.map_err(|error| anyhow!("the controller's answer broke off: {error}"))?;
        Ok((status, body.to_bytes()))
    }
}

fn default_api() -> String {
    format!("127.0.0.1:{}", weft_core::ports::API)
}

/// Text as part of a query.
pub(crate) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// What a controller in a cluster is called.
const SERVER: &str = "weft-controller";
const PATIENCE: Duration = Duration::from_secs(10);
/// A mesh of thousands of routes fits; something else behind that port does not fill our memory.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_with_a_port_over_plain_http() {
        for good in ["127.0.0.1:14080", "http://localhost:1/", "[::1]:14080"] {
            assert!(Api::new(good).is_ok(), "{good}");
        }
        for bad in ["", "localhost", ":80", "localhost:0", "localhost:99999", "https://localhost:1"] {
            assert!(Api::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(encode("shop/web:80"), "shop/web:80");
        assert_eq!(encode("a b&c=d#"), "a%20b%26c%3Dd%23");
    }

    #[tokio::test]
    async fn nobody_there_says_what_to_do() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = Api::new(&address).unwrap().get::<serde_json::Value>("/").await.unwrap_err().to_string();
        assert!(error.contains("weft-controller --source dir") && error.contains("weft demo"), "{error}");
    }
}
