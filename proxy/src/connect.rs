//! Connections to endpoints and to the app: made, and counted as they fail.
//!
//! Why every failure here is "not sent": nothing of a request goes out before a connection is
//! whole, so whoever asked may go elsewhere, whatever the method. What it says of the endpoint is a second question: a
//! workload without a certificate, or without descriptors, holds nothing against anybody.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rand::Rng as _;
use rustls_pki_types::ServerName;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpSocket, TcpStream},
    sync::watch,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use weft_core::{
    classify::Failure,
    identity::{PodUid, SpiffeId},
};

use crate::{
    belief::Belief,
    config::Config,
    tcp::{is_our_own_want, keep_alive},
    telemetry::{metrics::Counter, recorder::Recorder},
    tls::{self, Alpn, Material, Role},
};

/// A handshake gets at least so long.
const TLS_TIMEOUT: Duration = Duration::from_secs(2);
/// An app that listens accepts at once: within the call, unless its queue is full.
const OWN_ANSWERS: Duration = Duration::from_millis(20);
/// The source address by which inbound reaches its app: capture rules let it pass.
const INBOUND_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));

/// Makes one worker's connections.
#[derive(Clone)]
pub(crate) struct Connector(Rc<Inner>);

struct Inner {
    config: Arc<Config>,
    material: watch::Receiver<Option<Arc<Material>>>,
    recorder: Recorder,
    configs: RefCell<HashMap<(SpiffeId, Alpn), Configured>>,
}

/// A TLS configuration and the generation of the certificate in it.
type Configured = (u64, Arc<rustls::ClientConfig>);

/// A connection to exactly one pod.
pub(crate) struct Meshed {
    pub(crate) tls: TlsStream<TcpStream>,
    /// Of our certificate.
    pub(crate) generation: u64,
    /// For how long the pod is believed to be who it is.
    pub(crate) belief: Belief,
}

/// Why a connection could not be made; shared by all who waited for it.
#[derive(Clone, Debug)]
pub(crate) struct ConnectError {
    pub(crate) failure: Failure,
    pub(crate) detail: Arc<str>,
    /// It is this workload's own fault (no certificate): nothing is held against the endpoint.
    pub(crate) local: bool,
    /// The service has as many connections as it may.
    pub(crate) capped: bool,
}

impl ConnectError {
    /// The service has as many connections as it may.
    pub(crate) fn capped() -> Self {
        let detail = "as many connections as there may be".into();
        Self { failure: Failure::NotProcessed, detail, local: true, capped: true }
    }

    /// The endpoint, or the way to it.
    pub(crate) fn remote(failure: Failure, detail: impl Into<Arc<str>>) -> Self {
        Self { failure, detail: detail.into(), local: false, capped: false }
    }

    /// This workload itself.
    pub(crate) fn own(detail: impl Into<Arc<str>>) -> Self {
        Self { failure: Failure::Unreachable, detail: detail.into(), local: true, capped: false }
    }
}

impl Connector {
    pub(crate) fn new(
        config: Arc<Config>,
        material: watch::Receiver<Option<Arc<Material>>>,
        recorder: Recorder,
    ) -> Self {
        Self(Rc::new(Inner { config, material, recorder, configs: RefCell::default() }))
    }

    /// This workload's certificate.
    pub(crate) fn material(&self) -> watch::Receiver<Option<Arc<Material>>> {
        self.0.material.clone()
    }

    /// Of the certificate that a connection made now would show.
    pub(crate) fn generation(&self) -> u64 {
        self.0.material.borrow().as_ref().map_or(0, |material| material.generation)
    }

    /// Opens a TCP connection; `as_inbound` makes it come from the address that capture lets pass. An app that
    /// listens on one family only is reached on that one: which of a pod's addresses its callers use is not its choice.
    pub(crate) async fn connect(
        &self,
        address: SocketAddr,
        as_inbound: bool,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        let stream = match self.dial(address, as_inbound, timeout).await {
            Err(refused) if as_inbound && refused.failure == Failure::Refused => {
                let Some(other) = self.other_family(address) else { return Err(refused) };
                self.dial(other, as_inbound, timeout).await.map_err(|_| refused)?
            }
            dialled => dialled?,
        };
        self.0.recorder.count(Counter::Connects);
        Ok(stream)
    }

    /// This pod's address of the other family, if that is one of this pod's.
    fn other_family(&self, address: SocketAddr) -> Option<SocketAddr> {
        let own = &self.0.config.pod_ips;
        let other = own.iter().find(|ip| own.contains(&address.ip()) && ip.is_ipv4() != address.is_ipv4())?;
        Some(SocketAddr::new(*other, address.port()))
    }

    /// The same, to this address only and not yet counted as a success.
    async fn dial(
        &self,
        address: SocketAddr,
        as_inbound: bool,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        let connecting = async {
            let mut connecting = std::pin::pin!(socket(address, as_inbound)?.connect(address));
            if as_inbound && address.is_ipv6() {
                if let Ok(connected) = tokio::time::timeout(OWN_ANSWERS, &mut connecting).await {
                    return connected;
                }
                // The kernel drops a refusal by one of its own addresses to `::1`; one by `::1` arrives.
                let local = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), address.port());
                let refused = socket(local, as_inbound)?.connect(local).await.map(drop);
                refused.or_else(|e| {
                    if e.kind() == io::ErrorKind::ConnectionRefused { Err(e) } else { Ok(()) }
                })?;
            }
            connecting.await
        };
        let stream = match tokio::time::timeout(timeout, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.connect_failed(address, &error)),
            Err(_) => {
                return Err(self.late(format!("{address} did not accept within {timeout:?}")));
            }
        };
        keep_alive(&stream);
        Ok(stream)
    }

    fn connect_failed(&self, address: SocketAddr, error: &io::Error) -> ConnectError {
        let refused = [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionReset];
        let failure = if refused.contains(&error.kind()) {
            Failure::Refused
        } else if error.kind() == io::ErrorKind::TimedOut {
            Failure::ConnectTimeout
        } else {
            Failure::Unreachable
        };
        self.0.recorder.count(if failure == Failure::Refused {
            Counter::ConnectRefusals
        } else if failure == Failure::ConnectTimeout {
            Counter::ConnectTimeouts
        } else {
            Counter::ConnectErrors
        });
        let local = is_our_own_want(error);
        ConnectError { local, ..ConnectError::remote(failure, format!("{address}: {error}")) }
    }

    /// Opens an mTLS connection to exactly this pod under exactly this identity. Every failure up to here
    /// means that nothing was sent.
    pub(crate) async fn connect_mesh(
        &self,
        address: SocketAddr,
        uid: &PodUid,
        identity: &SpiffeId,
        alpn: Alpn,
        timeout: Duration,
    ) -> Result<Meshed, ConnectError> {
        let material = self.0.material.borrow().clone();
        let material = material.ok_or_else(|| ConnectError::own("this workload has no certificate yet"))?;
        if !material.validity.contains(material.clock().now(), Duration::ZERO) {
            return Err(ConnectError::own("this workload's certificate has expired"));
        }
        let config = self
            .client_config(&material, identity, alpn)
            .map_err(|e| ConnectError::own(format!("TLS configuration: {e}")))?;
        let name = ServerName::try_from(uid.server_name())
            .map_err(|e| ConnectError::remote(Failure::Identity, format!("pod uid {uid}: {e}")))?;
        let tcp = self.dial(address, false, timeout).await?;
        let connecting = TlsConnector::from(config).connect(name, tcp);
        let tls = match tokio::time::timeout(timeout.max(TLS_TIMEOUT), connecting).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return Err(self.tls_failed(address, &error)),
            Err(_) => return Err(self.late(format!("{address} did not finish its TLS handshake"))),
        };
        if tls.get_ref().1.alpn_protocol() != Some(alpn.name()) {
            self.0.recorder.count(Counter::IdentityMismatches);
            return Err(ConnectError::remote(Failure::Identity, format!("{address} does not speak Weft")));
        }
        let shown = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let belief = Belief::new(shown, Role::Server, Some(&material), rand::rng().random())
            .map_err(|e| ConnectError::remote(Failure::Identity, format!("{address}: {e}")))?;
        self.0.recorder.count(Counter::Connects);
        Ok(Meshed { tls, generation: material.generation, belief })
    }

    fn client_config(
        &self,
        material: &Arc<Material>,
        identity: &SpiffeId,
        alpn: Alpn,
    ) -> Result<Arc<rustls::ClientConfig>, tls::TlsError> {
        let mut configs = self.0.configs.borrow_mut();
        if let Some((generation, config)) = configs.get(&(identity.clone(), alpn))
            && *generation == material.generation
        {
            return Ok(config.clone());
        }
        let config = tls::client_config(material, identity, alpn)?;
        configs.retain(|_, (generation, _)| *generation == material.generation);
        configs.insert((identity.clone(), alpn), (material.generation, config.clone()));
        Ok(config)
    }

    /// A TLS 1.3 client has finished before the server has judged its certificate. A server that accepts sends its
    /// SETTINGS unasked; one that refuses sends an alert, and then it is known that nothing was sent.
    pub(crate) async fn first_bytes(
        &self,
        tls: &mut TlsStream<TcpStream>,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<Bytes, ConnectError> {
        let mut first = BytesMut::with_capacity(128);
        match tokio::time::timeout(timeout.max(TLS_TIMEOUT), tls.read_buf(&mut first)).await {
            Ok(Ok(n)) if n > 0 => Ok(first.freeze()),
            Ok(Ok(_)) => {
                Err(ConnectError::remote(Failure::NotProcessed, format!("{address} closed at once")))
            }
            Ok(Err(error)) => Err(self.tls_failed(address, &error)),
            Err(_) => Err(self.late(format!("{address} says nothing"))),
        }
    }

    fn tls_failed(&self, address: SocketAddr, error: &io::Error) -> ConnectError {
        let failure = if tls::is_identity_failure(error) {
            self.0.recorder.count(Counter::IdentityMismatches);
            Failure::Identity
        } else {
            self.0.recorder.count(Counter::ConnectErrors);
            Failure::Unreachable
        };
        ConnectError::remote(failure, format!("{address}: {error}"))
    }

    /// What did not come in time.
    pub(crate) fn late(&self, detail: String) -> ConnectError {
        self.0.recorder.count(Counter::ConnectTimeouts);
        ConnectError::remote(Failure::ConnectTimeout, detail)
    }
}

/// A socket that is about to be connected; `as_inbound`: to this pod's own app, which capture lets pass.
pub(crate) fn socket(address: SocketAddr, as_inbound: bool) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_nodelay(true)?;
    // Otherwise a read skips an urgent byte, and the app gets a stream with a hole.
    socket2::SockRef::from(&socket).set_out_of_band_inline(true)?;
    if as_inbound {
        // Without this a source address has only the 28,000 ephemeral ports for all destinations.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true);
        let source = match address {
            SocketAddr::V4(_) => INBOUND_SOURCE,
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        socket.bind(SocketAddr::new(source, 0))?;
    }
    Ok(socket)
}
