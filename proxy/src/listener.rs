//! Accepts captured connections: original destination, connection limit, one task per connection.
//!
//! Why a destination that is one of our own listeners is refused: a probe that connects straight to the capture
//! port has that very port as its "original" destination, and a proxy that dials it dials itself until it runs
//! out of descriptors.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    rc::Rc,
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    accepted::{Accepted, Open},
    clock::now,
    direction::Direction,
    inbound,
    limits::ConnectionLimits,
    outbound,
    tcp::{self, reset},
    telemetry::metrics::Counter,
    worker::Worker,
};

/// Connections that wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4_096;
/// Accepting pauses for so long when descriptors run out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Opens the listeners of one side. Outbound connections come from this pod alone, so that side listens on
/// loopback only (where `REDIRECT` in `OUTPUT` sends them); inbound listens on every address.
///
/// # Errors
/// No address family could be bound.
pub(crate) fn bind(side: Direction, port: u16, shared: bool) -> io::Result<Vec<TcpListener>> {
    let addresses = match side {
        Direction::Outbound => [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)],
        Direction::Inbound => [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
    };
    let mut bound = Vec::new();
    for ip in addresses {
        match listen(SocketAddr::new(ip, port), shared) {
            Ok(listener) => bound.push(listener),
            // A pod without IPv6 is common; one without IPv4 exists.
            Err(error) if matches!(ip, IpAddr::V6(_)) && !bound.is_empty() => {
                tracing::info!(%ip, port, %error, "not listening on IPv6");
            }
            Err(error) if matches!(ip, IpAddr::V4(_)) && error.kind() == io::ErrorKind::AddrNotAvailable => {
                tracing::info!(%ip, port, %error, "not listening on IPv4");
            }
            Err(error) => {
                let text = format!("cannot listen on {ip} port {port}: {error}");
                return Err(io::Error::new(error.kind(), text));
            }
        }
    }
    Ok(bound)
}

fn listen(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts until the process ends.
pub(crate) async fn run(worker: Rc<Worker>, listener: TcpListener, side: Direction) {
    let (accepted, shed) = match side {
        Direction::Outbound => (Counter::OutboundAccepted, Counter::OutboundShed),
        Direction::Inbound => (Counter::InboundAccepted, Counter::InboundShed),
    };
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                worker.recorder.count(Counter::AcceptErrors);
                if is_exhausted(&error) {
                    tracing::warn!(%error, "accepting pauses: descriptors have run out; raise the limit");
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
                continue;
            }
        };
        worker.recorder.count(accepted);
        let Some(slot) = ConnectionLimits::take(&worker.limits, client.ip(), stream.as_raw_fd(), side, now())
        else {
            worker.recorder.count(shed);
            reset(&stream);
            continue;
        };
        let worker = worker.clone();
        tokio::task::spawn_local(async move {
            let open = Open::count(slot, &worker.drain, &worker.recorder, side);
            connection(&worker, stream, client, side, open.clone()).await;
            drop(open);
        });
    }
}

async fn connection(
    worker: &Rc<Worker>,
    stream: TcpStream,
    client: SocketAddr,
    side: Direction,
    open: Rc<Open>,
) {
    // Urgent bytes stay in the stream: otherwise a read skips them, and the app gets a stream with a hole.
    let inline = SockRef::from(&stream).set_out_of_band_inline(true);
    if stream.set_nodelay(true).and(inline).is_err() {
        return;
    }
    tcp::keep_alive(&stream);
    let Some(original) = original_destination(&stream) else {
        reset(&stream);
        return;
    };
    let local = stream.local_addr().ok().map(|address| address.ip().to_canonical());
    if is_own_listener(worker, original, local) {
        worker.recorder.count(Counter::LoopsRefused);
        tracing::warn!(%client, %original, "refused: the destination is this proxy's own listener");
        reset(&stream);
        return;
    }
    let accepted = Accepted { stream, client, original, open };
    match side {
        Direction::Outbound => outbound::serve(worker.clone(), accepted).await,
        // Boxed: thrice as large, and connections of apps, of which there are more, would all have room for it.
        Direction::Inbound => Box::pin(inbound::serve(worker.clone(), accepted)).await,
    }
}

/// Where the client wanted to go; a connection that was not redirected answers with our own address.
fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    let local = stream.local_addr().ok()?;
    let socket = SockRef::from(stream);
    let original = match local.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    let original = original.ok().and_then(|address| address.as_socket()).unwrap_or(local);
    Some(SocketAddr::new(original.ip().to_canonical(), original.port()))
}

fn is_own_listener(worker: &Worker, original: SocketAddr, local: Option<IpAddr>) -> bool {
    let own = [worker.config.outbound_port, worker.config.inbound_port];
    own.contains(&original.port())
        && (original.ip().is_loopback()
            || original.ip().is_unspecified()
            || local == Some(original.ip())
            || worker.config.pod_ips.contains(&original.ip()))
}

fn is_exhausted(error: &io::Error) -> bool {
    // Nothing that another accept at once could change.
    tcp::is_our_own_want(error)
}
