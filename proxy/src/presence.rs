//! Whether a client that has ended its half of a connection is still there.
//!
//! Why it has to be asked: `shutdown` and `close` send the same FIN. Who half-closes (`nc -N`, and scripts) waits for its
//! answer; who closes (a user who gives up, a process that was killed) wants nothing more, and the request of it is to end
//! at the backend too. A client of this pod is on the same kernel, which says what has become of its socket: one that a
//! process still has open has an inode. Nothing else tells before something is written to it.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

/// How soon, and how often at last, a client that has half-closed is looked for.
const FIRST: Duration = Duration::from_millis(2);
const SELDOM: Duration = Duration::from_millis(500);

const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const TCP: u8 = 6;
/// Header of a netlink message and of its answer, and where the inode stands in it (`linux/inet_diag.h`).
const HEADER: usize = 16;
const INODE: usize = HEADER + 4 + 48 + 16;

/// What the kernel knows of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// A process has it open.
    Held,
    /// Its connection is there, and no process has it.
    Orphan,
    /// None such.
    Nothing,
}

/// Returns when no process of this pod has the client's end of a connection open any more; never, if that cannot be known.
pub(crate) async fn gone(client: SocketAddr, destination: SocketAddr) {
    let (mut pause, mut seen) = (FIRST, false);
    loop {
        tokio::time::sleep(pause).await;
        match find(client, destination) {
            Ok(Found::Held) => seen = true,
            Ok(Found::Nothing) if seen => return,
            Ok(Found::Orphan) => return,
            // Not in this network namespace, or nobody to ask.
            Ok(Found::Nothing) | Err(_) => return std::future::pending().await,
        }
        pause = (pause * 2).min(SELDOM);
    }
}

/// Looks for the socket with these ends.
fn find(local: SocketAddr, remote: SocketAddr) -> io::Result<Found> {
    let mut socket = Socket::new(
        Domain::from(AF_NETLINK),
        Type::DGRAM.nonblocking().cloexec(),
        Some(Protocol::from(NETLINK_SOCK_DIAG)),
    )?;
    socket.write_all(&question(local, remote))?;
    // The kernel answers while it is asked.
    let mut answer = [0; 512];
    let n = socket.read(&mut answer)?;
    let answer = &answer[..n];
    let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    if kind != Some(SOCK_DIAG_BY_FAMILY) {
        return Ok(Found::Nothing);
    }
    Ok(match answer.get(INODE..INODE + 4) {
        Some([0, 0, 0, 0]) => Found::Orphan,
        Some(_) => Found::Held,
        None => Found::Nothing,
    })
}

/// `nlmsghdr` and `inet_diag_req_v2`, for one socket.
fn question(local: SocketAddr, remote: SocketAddr) -> [u8; 72] {
    let mut out = [0; 72];
    let v4 = local.ip().to_canonical().is_ipv4();
    out[0..4].copy_from_slice(&72_u32.to_ne_bytes());
    out[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    out[HEADER] = if v4 { 2 } else { 10 };
    out[HEADER + 1] = TCP;
    // Every state, and no particular cookie.
    out[20..24].fill(0xff);
    out[24..26].copy_from_slice(&local.port().to_be_bytes());
    out[26..28].copy_from_slice(&remote.port().to_be_bytes());
    for (at, ip) in [(28, local.ip()), (44, remote.ip())] {
        match ip.to_canonical() {
            IpAddr::V4(ip) => out[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => out[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    out[64..72].fill(0xff);
    out
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_socket_that_was_half_closed_is_told_from_one_that_was_closed() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(any) else { continue };
            let server = listener.local_addr().unwrap();
            let client = TcpStream::connect(server).unwrap();
            let (_accepted, address) = listener.accept().unwrap();
            assert_eq!(find(address, server).unwrap(), Found::Held);
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(find(address, server).unwrap(), Found::Held);
            drop(client);
            assert_ne!(find(address, server).unwrap(), Found::Held);
            // Asked for a port that listens, the kernel names the listener.
            let nobody = SocketAddr::new(server.ip(), 1);
            assert_eq!(find(nobody, nobody).unwrap(), Found::Nothing);
        }
    }
}
