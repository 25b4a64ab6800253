//! One connection to the controller: resolve, connect, TLS, and a gRPC channel over exactly that.
//!
//! Why one connection a channel: the control stream and each request for a certificate dial for themselves, so that every
//! connection shows the newest certificate and knows the newest roots. A channel that reconnects by itself would go on
//! with those that it was made with.

use std::{io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rand::seq::SliceRandom as _;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

use crate::{
    config::{HostPort, Times},
    tls::TlsError,
};

/// Why there is no connection to the controller.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No address.
    #[error("{0} does not resolve: {1}")]
    Resolve(HostPort, io::Error),
    /// No address answered; the last error.
    #[error("{0}: {1}")]
    Connect(HostPort, io::Error),
    /// It took too long.
    #[error("{0} did not answer in {1:?}")]
    Timeout(HostPort, Duration),
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// HTTP/2 could not be started.
    #[error("HTTP/2: {0}")]
    Http2(String),
}

/// Connects to one of a name's addresses, taken at random so that replicas share the load.
pub(crate) async fn dial(
    to: &HostPort,
    tls: Arc<rustls::ClientConfig>,
    limit: Duration,
) -> Result<TlsStream<TcpStream>, DialError> {
    let deadline = Instant::now() + limit;
    let late = || DialError::Timeout(to.clone(), limit);
    let resolve = tokio::net::lookup_host((to.host.as_str(), to.port));
    let found = timeout_at(deadline, resolve).await.map_err(|_| late())?;
    let mut addresses: Vec<_> =
        found.map_err(|e| DialError::Resolve(to.clone(), e))?.take(MAX_ADDRESSES).collect();
    addresses.shuffle(&mut rand::rng());
    let mut last = DialError::Resolve(to.clone(), io::Error::from(io::ErrorKind::NotFound));
    let share = limit / u32::try_from(addresses.len().clamp(1, MAX_TRIES)).unwrap_or(1);
    for address in addresses.into_iter().take(MAX_TRIES) {
        let attempt = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROLLER_NAME).map_err(io::Error::other)?;
            TlsConnector::from(Arc::clone(&tls)).connect(name, stream).await
        };
        match timeout_at(deadline.min(Instant::now() + share), attempt).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = DialError::Connect(to.clone(), error),
            Err(_) => last = late(),
        }
    }
    Err(last)
}

/// A gRPC channel over exactly this connection: when it ends, so does the channel, and whoever dials next
/// shows the newest certificate.
pub(crate) async fn one_shot(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    times: &Times,
) -> Result<Channel, DialError> {
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        std::future::ready(stream)
    });
    // Plain `http`: to tonic this is a connection like any other; TLS is ours.
    Endpoint::from_static("http://weft-controller.weft.internal")
        .http2_keep_alive_interval(times.ping)
        .keep_alive_timeout(times.ping_timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW * 2)
        .connect_with_connector(connector)
        .await
        .map_err(|e| DialError::Http2(e.to_string()))
}

/// The controller's DNS name: what its certificate says beside its identity.
const CONTROLLER_NAME: &str = "weft-controller.weft.internal";
/// Addresses of a name that are looked at.
const MAX_ADDRESSES: usize = 64;
/// And tried at one go.
const MAX_TRIES: usize = 3;
/// Flow-control window of one stream: the largest message must not need many round trips.
const WINDOW: u32 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Config,
        tls::{Trust, controller_config},
    };

    #[tokio::test]
    async fn a_name_that_does_not_resolve_and_a_port_that_is_closed_are_told_apart() {
        let trust = Trust::default();
        let config = Config::for_tests(&[]);
        let tls = controller_config(&trust, &config.controller_identity, None, None).unwrap();
        let limit = Duration::from_secs(5);
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let closed = HostPort { host: closed.ip().to_string(), port: closed.port() };
        assert!(matches!(dial(&closed, Arc::clone(&tls), limit).await, Err(DialError::Connect(..))));
        let nowhere = HostPort { host: "does-not-exist.invalid".into(), port: 1 };
        assert!(matches!(
            dial(&nowhere, tls, limit).await,
            Err(DialError::Resolve(..) | DialError::Timeout(..))
        ));
    }
}
