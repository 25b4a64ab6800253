//! Controllers ask each other: each has only its own sidecars' telemetry, and people want the mesh's.
//!
//! Why over the sidecars' port: it speaks mTLS, and whoever asks shows the controller's own certificate, so that no
//! further port, secret or right is needed. What is asked is the JSON API, read only, and what a replica answers is
//! its own part: nobody asks on.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tonic::{body::Body, server::NamedService};
use weft_core::{
    identity::{SpiffeId, TrustDomain},
    policy::{EndpointHealth, ServiceName},
};

use super::{
    publisher::State,
    tls::{self, Peer},
};
use crate::ca::{self, CaError, SERVER_NAME};

/// Answers replicas, and nobody else.
#[derive(Clone)]
pub struct Answers {
    part: Arc<Part>,
    us: SpiffeId,
}

/// What this controller alone knows of what is asked.
type Part = dyn Fn(&http::request::Parts) -> Response<Full<Bytes>> + Send + Sync;

impl Answers {
    /// By `part`: what is served here knows nothing of who answers.
    ///
    /// # Errors
    /// None for a valid trust domain.
    pub fn new(
        trust_domain: &TrustDomain,
        part: impl Fn(&http::request::Parts) -> Response<Full<Bytes>> + Send + Sync + 'static,
    ) -> Result<Self, CaError> {
        Ok(Self { part: Arc::new(part), us: ca::controller_identity(trust_domain)? })
    }
}

impl NamedService for Answers {
    const NAME: &'static str = "weft.internal.Replica";
}

impl tower::Service<Request<Body>> for Answers {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { part, us } = self.clone();
        Box::pin(async move {
            let (mut head, _) = request.into_parts();
            let is_us = head.extensions.get::<Peer>().is_some_and(|peer| peer.identity == us);
            let path = head.uri.path_and_query().map(http::uri::PathAndQuery::as_str).unwrap_or_default();
            let path = path.strip_prefix(PREFIX).and_then(|path| path.parse().ok());
            let (true, Some(path), Method::GET) = (is_us, path, head.method.clone()) else {
                let mut refused = Response::new(Body::empty());
                *refused.status_mut() = StatusCode::FORBIDDEN;
                return Ok(refused);
            };
            head.uri = path;
            let answered = tokio::task::spawn_blocking(move || part(&head)).await;
            let mut failed = Response::new(Body::empty());
            *failed.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            Ok(answered.map_or(failed, |response| response.map(Body::new)))
        })
    }
}

/// Asks the others.
pub struct Replicas {
    state: Arc<RwLock<State>>,
    tls: Arc<ArcSwap<ClientConfig>>,
    service: ServiceName,
    own: String,
    us: SpiffeId,
}

impl Replicas {
    /// Those behind `service`, but for the pod `own`.
    ///
    /// # Errors
    /// None for a valid trust domain.
    pub fn new(
        state: Arc<RwLock<State>>,
        tls: Arc<ArcSwap<ClientConfig>>,
        service: ServiceName,
        own: String,
        trust_domain: &TrustDomain,
    ) -> Result<Self, CaError> {
        Ok(Self { state, tls, service, own, us: ca::controller_identity(trust_domain)? })
    }

    /// Asks all of them at once; an answer that does not come in time is none.
    pub async fn ask(&self, path: &str) -> Vec<(String, Option<Bytes>)> {
        let asked = self.others().into_iter().map(|(name, address)| async move {
            let answer = timeout(PATIENCE, self.ask_one(address, path)).await;
            let answer = answer.map_err(|_| anyhow::anyhow!("no answer in {PATIENCE:?}")).flatten();
            if let Err(error) = &answer {
                tracing::debug!(%name, %error, "a replica does not answer");
            }
            (name, answer.ok())
        });
        join_all(asked).await
    }

    /// By the very Service that sidecars come by.
    fn others(&self) -> Vec<(String, SocketAddr)> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let endpoints = state.index.endpoints(&self.service).unwrap_or_default();
        let name = |uid| state.index.workload_name(uid).map(|(_, name)| name.to_string());
        endpoints
            .values()
            .filter(|endpoint| endpoint.health != EndpointHealth::Unhealthy)
            .filter_map(|endpoint| Some((name(&endpoint.uid)?, endpoint.address)))
            .filter(|(name, _)| *name != self.own)
            .collect()
    }

    async fn ask_one(&self, address: SocketAddr, path: &str) -> anyhow::Result<Bytes> {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from(SERVER_NAME)?;
        let stream = TlsConnector::from(self.tls.load_full()).connect(name, stream).await?;
        let peer = tls::peer(stream.get_ref().1.peer_certificates().unwrap_or_default())?;
        anyhow::ensure!(peer.identity == self.us, "{address} is {}", peer.identity);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let uri = format!("https://{SERVER_NAME}{PREFIX}{path}");
        let asked = async {
            let response = sender.send_request(Request::get(uri).body(Empty::<Bytes>::new())?).await?;
            anyhow::ensure!(response.status() == StatusCode::OK, "it says {}", response.status());
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            body.map(http_body_util::Collected::to_bytes).map_err(|error| anyhow::anyhow!("{error}"))
        };
        let answer = asked.await;
        connection.abort();
        answer
    }
}

impl std::fmt::Debug for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replicas").field("service", &self.service).finish_non_exhaustive()
    }
}

const PREFIX: &str = "/weft.internal.Replica";
const PATIENCE: Duration = Duration::from_secs(3);
const MAX_ANSWER: usize = 64 * 1024 * 1024;
