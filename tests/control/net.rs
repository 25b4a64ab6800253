//! A network that can be cut, slowed and crashed, in virtual time.
//!
//! Why not `turmoil`: it switches on two features of tokio that nothing else of Weft needs, so that every crate
//! above tokio would be built a second time for tests alone; and it walks through quiet minutes millisecond by
//! millisecond. Here the paused clock jumps to whatever happens next, and a thousand worlds of some minutes each
//! take about one.
//!
//! A connection is two pipes. Each chunk is delayed; while its direction is cut it waits, as TCP would send it again
//! and again; when a server has crashed, the other end learns it only if it can be reached.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf},
    sync::{mpsc, watch},
    time::sleep,
};

/// One direction between a client and a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Way {
    pub(crate) client: usize,
    pub(crate) server: usize,
    pub(crate) towards_server: bool,
}

/// The network. Clones share.
#[derive(Clone)]
pub(crate) struct Net(Arc<Mutex<Inner>>);

struct Inner {
    rng: SmallRng,
    /// The longest delay of one chunk.
    delay: Duration,
    ways: HashMap<Way, watch::Sender<bool>>,
    servers: HashMap<usize, Server>,
}

struct Server {
    accept: mpsc::UnboundedSender<(usize, DuplexStream)>,
    /// Gone when it crashes.
    life: watch::Sender<()>,
}

impl Net {
    pub(crate) fn new(seed: u64, delay: Duration) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        Self(Arc::new(Mutex::new(Inner { rng, delay, ways: HashMap::new(), servers: HashMap::new() })))
    }

    /// A server starts, or starts again: what was connected to it before is gone.
    pub(crate) fn listen(&self, server: usize) -> mpsc::UnboundedReceiver<(usize, DuplexStream)> {
        let (accept, accepted) = mpsc::unbounded_channel();
        self.inner().servers.insert(server, Server { accept, life: watch::Sender::new(()) });
        accepted
    }

    pub(crate) fn crash(&self, server: usize) {
        self.inner().servers.remove(&server);
    }

    pub(crate) fn cut(&self, way: Way, cut: bool) {
        self.inner().ways.entry(way).or_insert_with(|| watch::Sender::new(false)).send_replace(cut);
    }

    pub(crate) fn heal(&self) {
        for way in self.inner().ways.values() {
            way.send_replace(false);
        }
    }

    /// What a client's `connect` does: refused by a host without a server, silent where a way is cut.
    pub(crate) async fn connect(&self, client: usize, server: usize) -> io::Result<DuplexStream> {
        let there = Way { client, server, towards_server: true };
        let back = Way { towards_server: false, ..there };
        self.pass(there).await;
        self.pass(back).await;
        let (near, near_end) = tokio::io::duplex(BUFFER);
        let (far, far_end) = tokio::io::duplex(BUFFER);
        let life = {
            let inner = self.inner();
            let server = inner.servers.get(&server).ok_or(io::ErrorKind::ConnectionRefused)?;
            server.accept.send((client, far)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
            server.life.subscribe()
        };
        let (near_read, near_write) = tokio::io::split(near_end);
        let (far_read, far_write) = tokio::io::split(far_end);
        let net = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = async {
                    tokio::join!(
                        net.carry(there, near_read, far_write),
                        net.carry(back, far_read, near_write),
                    );
                } => {}
                () = net.crashed(back, life) => {}
            }
        });
        Ok(near)
    }

    /// Carries the bytes of one direction until it ends.
    async fn carry(&self, way: Way, mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>) {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = from.read(&mut chunk).await.unwrap_or(0);
            self.pass(way).await;
            if read == 0 {
                let _ = to.shutdown().await;
                return;
            }
            if to.write_all(&chunk[..read]).await.is_err() {
                return;
            }
        }
    }

    /// The time that a chunk takes, and the time for which its way is cut.
    async fn pass(&self, way: Way) {
        let (delay, mut cut) = {
            let mut inner = self.inner();
            let longest = inner.delay.as_micros() as u64;
            // Mostly little, sometimes much.
            let share: f64 = inner.rng.random::<f64>().powi(4);
            let cut = inner.ways.entry(way).or_insert_with(|| watch::Sender::new(false)).subscribe();
            (Duration::from_micros((longest as f64 * share) as u64), cut)
        };
        sleep(delay).await;
        // Ends with the world only.
        let _ = cut.wait_for(|cut| !cut).await;
    }

    /// Waits until the server is gone and the client can hear it.
    async fn crashed(&self, back: Way, mut life: watch::Receiver<()>) {
        while life.changed().await.is_ok() {}
        self.pass(back).await;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }
}

const BUFFER: usize = 64 * 1024;
const CHUNK: usize = 16 * 1024;
