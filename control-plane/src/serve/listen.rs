//! Ports to listen on.
//!
//! Why "every address" is tried twice: the chart says `[::]`, which takes IPv4 too, because it cannot know what a node
//! has. On a node whose kernel has no IPv6 such a socket does not exist; there it is every IPv4 address that is meant.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Listens on an address; on `[::]` where there is no IPv6, on every IPv4 address.
///
/// # Errors
/// As the system says; the address is in the text.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    listen_by(address, open)
}

fn listen_by<T>(address: SocketAddr, open: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    let named = |address: SocketAddr, error: io::Error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    };
    match open(address) {
        Err(error) if address.ip().is_unspecified() && address.is_ipv6() && is_no_such_family(&error) => {
            let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            tracing::info!(%address, instead = %ipv4, %error, "there is no IPv6 here");
            open(ipv4).map_err(|error| named(ipv4, error))
        }
        opened => opened.map_err(|error| named(address, error)),
    }
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // Whatever the host's default is (net.ipv6.bindv6only).
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// The kernel has no IPv6 (`ipv6.disable=1`), or this namespace has no address of it.
fn is_no_such_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
        || error.kind() == io::ErrorKind::AddrNotAvailable
}

/// A fleet that comes back at once waits here; whoever finds no place asks again after one, three and seven seconds.
/// The kernel makes it `net.core.somaxconn`, 4,096, where that is less.
const BACKLOG: i32 = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_means_ipv4_where_there_is_no_ipv6() {
        let kernel = |address: SocketAddr| match address.is_ipv6() {
            true => Err(io::Error::from_raw_os_error(nix::errno::Errno::EAFNOSUPPORT as i32)),
            false => Ok(address),
        };
        let any = "[::]:14010".parse().unwrap();
        assert_eq!(listen_by(any, kernel).unwrap(), "0.0.0.0:14010".parse().unwrap());
        // Whoever names one address means that one.
        let one = listen_by("[fd00::1]:14010".parse().unwrap(), kernel).unwrap_err();
        assert!(one.to_string().starts_with("cannot listen on [fd00::1]:14010: "), "{one}");
        // A port that somebody has is an error, and not another port's success.
        let taken = |_| Err::<SocketAddr, _>(io::Error::from(io::ErrorKind::AddrInUse));
        assert_eq!(listen_by(any, taken).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn one_socket_takes_both_families() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        assert_eq!(listen(([0, 0, 0, 0], port).into()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
