//! Upgraded connections: bytes both ways, over a connection of their own or as one stream of a shared one.
//!
//! Why a broken end is asked for: to let go of a stream is to end it (END_STREAM), whatever the reason, so that a stream
//! that was cut off would look as if it had ended well. What tells them apart is that the other direction was still open:
//! the library then resets the stream behind its end, and who reads that end finds that it can write no more.

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::{
    back::Back,
    front::Front,
    tcp::{self, Broken},
};

/// How an upgraded connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// By both sides, or by the client.
    Well,
    /// The server broke it off.
    ByServer,
    /// It was stopped.
    Stopped,
    /// It did not come about.
    Never,
}

/// Carries bytes until both directions have ended, a side breaks off, or `stop`: what does not end well is reset.
pub(crate) async fn carry(client: OnUpgrade, server: OnUpgrade, stop: impl Future<Output = ()>) -> Ended {
    let mut stop = std::pin::pin!(stop);
    let both = async { tokio::try_join!(client, server) };
    let both = tokio::select! {
        biased;
        () = &mut stop => return Ended::Stopped,
        both = both => both,
    };
    let (client, server) = match both {
        Ok(both) => both,
        Err(error) => {
            tracing::debug!(%error, "an upgrade did not come about");
            return Ended::Never;
        }
    };
    let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
    let ended = tokio::select! {
        biased;
        () = stop => Ended::Stopped,
        spliced = tcp::splice_streams(&mut client, &mut server) => match spliced {
            Ok(()) => return Ended::Well,
            Err(Broken::Client) => Ended::Well,
            Err(Broken::Server) => Ended::ByServer,
        },
    };
    reset(client.into_inner());
    reset(server.into_inner());
    ended
}

/// Lets go of one end, so that its peer sees no clean end where it has a connection of its own.
fn reset(upgraded: Upgraded) {
    let upgraded = match upgraded.downcast::<TokioIo<Front<TcpStream>>>() {
        Ok(parts) => return tcp::reset(parts.io.inner().inner()),
        Err(upgraded) => upgraded,
    };
    if let Ok(parts) = upgraded.downcast::<TokioIo<Back<TcpStream>>>() {
        tcp::reset(parts.io.inner().inner());
    }
}
