//! Is this network namespace captured? Asked by an ordinary user, before there is a sidecar.
//!
//! Why by trying and not by reading rules: reading them takes the very capability that the pod does not have. So this
//! listens where the sidecar will, dials an address that exists nowhere (RFC 5737, RFC 3849), and is captured if its
//! own call arrives. Where that address or port is excluded from capture it takes another one, and where no address of a
//! family is left there is nothing to try.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use ipnet::IpNet;

use crate::config::PortRange;

/// Why the namespace is not known to be captured.
#[derive(Debug, thiserror::Error)]
pub enum NotCaptured {
    /// The call went elsewhere.
    #[error(
        "this pod's {0} connections are not captured: the CNI plugin did not run for it (was it installed on this \
         node when the pod was made? does the container runtime tell plugins a pod's annotations? containerd 1.5 and \
         CRI-O 1.24 do). Delete the pod to try again, or install weft with cni.enabled=false"
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
pub fn captured(outbound_port: u16, excluded: &Excluded) -> Result<(), NotCaptured> {
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, outbound_port));
    let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, outbound_port));
    let mut tried = false;
    for (family, listen, nowhere) in
        [("IPv4", any_v4, excluded.nowhere(&NOWHERE_V4)), ("IPv6", any_v6, excluded.nowhere(&NOWHERE_V6))]
    {
        // All of it goes without the sidecar, as the pod's owner wants it.
        let Some(nowhere) = nowhere else {
            tried = true;
            continue;
        };
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

/// What the app dials without the sidecar.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Excluded {
    /// Ports that the app dials without the proxy
    #[arg(long, value_name = "PORTS", value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_PORTS")]
    pub exclude_outbound_ports: Vec<String>,
    /// Networks that the app dials without the proxy
    #[arg(long, value_name = "CIDRS", value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_CIDRS")]
    pub exclude_outbound_cidrs: Vec<String>,
}

impl Excluded {
    /// The first address that is captured, with a port that is. What cannot be read excludes nothing: whoever
    /// captures says what is wrong with it.
    fn nowhere(&self, addresses: &[IpAddr]) -> Option<SocketAddr> {
        let ports: Vec<PortRange> =
            self.exclude_outbound_ports.iter().filter_map(|text| text.trim().parse().ok()).collect();
        let parse = |text: &str| text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        let nets: Vec<IpNet> =
            self.exclude_outbound_cidrs.iter().filter_map(|text| parse(text.trim()).ok()).collect();
        let port = (80..=u16::MAX).find(|port| !ports.iter().any(|range| range.contains(*port)))?;
        let address = addresses.iter().find(|address| !nets.iter().any(|net| net.contains(*address)))?;
        Some(SocketAddr::new(*address, port))
    }
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

/// One of each of RFC 5737's networks.
const NOWHERE_V4: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
];
/// RFC 3849.
const NOWHERE_V6: [IpAddr; 1] = [IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
/// A call that is captured arrives in microseconds.
const PATIENCE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_captured_is_not_tried() {
        let excluded = |ports: &[&str], cidrs: &[&str]| Excluded {
            exclude_outbound_ports: ports.iter().map(ToString::to_string).collect(),
            exclude_outbound_cidrs: cidrs.iter().map(ToString::to_string).collect(),
        };
        let v4 = |excluded: Excluded| excluded.nowhere(&NOWHERE_V4).map(|nowhere| nowhere.to_string());
        assert_eq!(v4(excluded(&[], &[])).as_deref(), Some("192.0.2.1:80"));
        assert_eq!(v4(excluded(&["25", "80-90"], &["192.0.2.0/24"])).as_deref(), Some("198.51.100.1:91"));
        assert_eq!(v4(excluded(&[], &["0.0.0.0/0"])), None);
        assert_eq!(v4(excluded(&["1-65535"], &[])), None);
    }
}
