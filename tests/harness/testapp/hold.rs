//! A client that holds many connections open, and is as slow or as deaf as it is told.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use clap::Parser;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
#[derive(Parser, Clone)]
pub(crate) struct Hold {
    #[arg(long)]
    address: SocketAddr,
    #[arg(long)]
    count: usize,
    /// Sent on each connection at once, C escapes understood.
    #[arg(long, default_value = "")]
    send: String,
    /// Then a byte of this, again and again, so often.
    #[arg(long, default_value = "")]
    trickle: String,
    #[arg(long, default_value_t = 1_000)]
    every_ms: u64,
    /// Reads no answer, and has little room for one.
    #[arg(long)]
    deaf: bool,
    /// Where the counts stand, as JSON, several times a second.
    #[arg(long)]
    status: PathBuf,
}

/// Where `hold` stands.
#[derive(Default)]
struct Held {
    opened: AtomicU64,
    failed: AtomicU64,
    ended: AtomicU64,
    answered: AtomicU64,
}

impl Hold {
    pub(crate) async fn run(self) -> Result<()> {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let held = Arc::new(Held::default());
        // As many at a time as a backlog takes without losing a SYN.
        let room = Arc::new(tokio::sync::Semaphore::new(128));
        for _ in 0..self.count {
            let (hold, held, room) = (self.clone(), held.clone(), room.clone());
            tokio::spawn(async move {
                let opened = {
                    let _permit = room.acquire().await;
                    tokio::time::timeout(Duration::from_secs(10), hold.open()).await
                };
                match opened {
                    Ok(Ok(stream)) => {
                        held.opened.fetch_add(1, Ordering::Relaxed);
                        hold.keep(stream, &held).await;
                        held.ended.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(Err(_)) | Err(_) => {
                        held.failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        loop {
            let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let status = serde_json::json!({
                "opened": n(&held.opened), "failed": n(&held.failed), "ended": n(&held.ended),
                "answered": n(&held.answered),
            });
            let written = self.status.with_extension("new");
            std::fs::write(&written, status.to_string())?;
            std::fs::rename(&written, &self.status)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn open(&self) -> Result<TcpStream> {
        let socket = match self.address {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        if self.deaf {
            socket.set_recv_buffer_size(4 * 1024)?;
        }
        let mut stream = socket.connect(self.address).await?;
        stream.set_nodelay(true)?;
        let send = self.send.replace("\\r", "\r").replace("\\n", "\n");
        stream.write_all(send.as_bytes()).await?;
        Ok(stream)
    }

    /// Until the other side ends it.
    async fn keep(&self, stream: TcpStream, held: &Held) {
        let (mut read, mut write) = stream.into_split();
        let reading = async {
            if self.deaf {
                return std::future::pending().await;
            }
            let mut buffer = [0; 1_024];
            let mut first = true;
            while tokio::io::AsyncReadExt::read(&mut read, &mut buffer).await.is_ok_and(|n| n > 0) {
                if std::mem::take(&mut first) {
                    held.answered.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let trickling = async {
            for byte in self.trickle.bytes().cycle() {
                tokio::time::sleep(Duration::from_millis(self.every_ms)).await;
                if write.write_all(&[byte]).await.is_err() {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! { () = reading => {}, () = trickling => {} }
    }
}
