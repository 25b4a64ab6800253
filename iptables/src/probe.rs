//! Is this network namespace captured? Asked by an ordinary user, before there is a sidecar.
//!
//! Why by trying and not by reading rules: reading them takes the very capability that the pod does not have. So this
//! listens where the sidecar will, dials an address that exists nowhere (RFC 5737, RFC 3849), and is captured if its
//! own call arrives.

use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

/// Why the namespace is not known to be captured.
#[derive(Debug, thiserror::Error)]
pub enum NotCaptured {
    /// The call went elsewhere.
    #[error(
        "this pod's {0} connections are not captured: the CNI plugin did not run for it (was it installed on this \
         node when the pod was made?). Delete the pod to try again"
    )]
    Elsewhere(&'static str),
    /// It could not be tried.
    #[error("whether this pod is captured cannot be tried: {0}")]
    Untried(#[from] io::Error),
}

/// Tries both families, but for those that the pod does not have.
///
/// # Errors
/// A family that the pod has is not captured, or it could not be tried.
pub fn captured(outbound_port: u16) -> Result<(), NotCaptured> {
    let nowhere_v4 = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 80));
    let nowhere_v6 = SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 80));
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, outbound_port));
    let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, outbound_port));
    let mut tried = false;
    for (family, listen, nowhere) in [("IPv4", any_v4, nowhere_v4), ("IPv6", any_v6, nowhere_v6)] {
        match arrives(listen, nowhere) {
            Ok(true) => tried = true,
            Ok(false) => return Err(NotCaptured::Elsewhere(family)),
            // The pod has no such family, or no way out: nothing to capture.
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if tried {
        return Ok(());
    }
    Err(NotCaptured::Untried(io::Error::other("the pod has no route")))
}

fn arrives(listen: SocketAddr, nowhere: SocketAddr) -> io::Result<bool> {
    let listener = TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    match TcpStream::connect_timeout(&nowhere, PATIENCE) {
        Ok(stream) => {
            let own = stream.local_addr()?;
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline {
                match listener.accept() {
                    Ok((_, peer)) if peer == own => return Ok(true),
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(false)
        }
        Err(error) if is_absent(&error) => Err(error),
        // Whoever answered, or did not, it was not us.
        Err(_) => Ok(false),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable | ErrorKind::Unsupported
    ) || error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT)
}

/// A call that is captured arrives in microseconds.
const PATIENCE: Duration = Duration::from_secs(3);
