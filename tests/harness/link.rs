//! A stretch of network that is slow or narrow, for whatever goes over it.
//!
//! Why a relay and not the kernel's own shaping: `netem` is missing from many kernels, and a schedule that follows from a
//! seed is the same in each run. It keeps bytes in order, as TCP does, and knows nothing of what they mean.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use anyhow::Result;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use weft_control_plane::cli::demo::netns::Pod;

/// How a link treats what it carries, each way by itself.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// On the way at least so long.
    pub delay: Duration,
    /// And up to so much longer, as the seed says.
    pub jitter: Duration,
    /// No more bytes a second than this.
    pub bytes_per_second: Option<u32>,
    pub seed: u64,
}

/// A port of a pod from which everything goes on, later, to another address.
pub struct Link {
    listener: Arc<TcpListener>,
    port: u16,
}

impl Link {
    /// Begins to carry.
    ///
    /// # Errors
    /// The port is taken.
    pub fn start(pod: &Pod, port: u16, to: SocketAddr, weather: Weather) -> Result<Self> {
        let listener = Arc::new(pod.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))??);
        let (accepting, pod) = (listener.clone(), pod.clone());
        // All connections share the link.
        let ways = [0, 1].map(|way| {
            let rng = SmallRng::seed_from_u64(weather.seed + way);
            Arc::new(Mutex::new(Way { weather, rng, free: Instant::now() }))
        });
        std::thread::spawn(move || {
            while let Ok((near, _)) = accepting.accept() {
                let Ok(Ok(far)) = pod.enter(|| TcpStream::connect(to)) else { continue };
                let [there, back] = &ways;
                // A connection that ends early ends for both sides.
                let _ = carry(&near, &far, there).and_then(|()| carry(&far, &near, back));
            }
        });
        Ok(Self { listener, port })
    }

    /// Where it begins.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Wakes the thread that accepts; a listener that is gone already needs no waking.
        let _ = socket2::SockRef::from(&*self.listener).shutdown(Shutdown::Both);
    }
}

/// One direction of a link.
struct Way {
    weather: Weather,
    rng: SmallRng,
    /// When what was sent before has left.
    free: Instant,
}

impl Way {
    /// When so many bytes that are sent now will have arrived.
    fn arrival(&mut self, bytes: usize) -> Instant {
        let takes = self
            .weather
            .bytes_per_second
            .map_or(Duration::ZERO, |rate| Duration::from_secs_f64(bytes as f64 / f64::from(rate)));
        self.free = self.free.max(Instant::now()) + takes;
        self.free + self.weather.delay + self.weather.jitter.mul_f64(self.rng.random())
    }
}

/// Two threads: one reads and says when each piece is due, the other one waits and writes.
fn carry(from: &TcpStream, to: &TcpStream, way: &Arc<Mutex<Way>>) -> std::io::Result<()> {
    let (mut from, mut to, way) = (from.try_clone()?, to.try_clone()?, way.clone());
    to.set_nodelay(true)?;
    let (pass, due) = mpsc::sync_channel::<(Instant, Vec<u8>)>(64);
    std::thread::spawn(move || {
        let mut piece = [0; 1_460];
        loop {
            // An error ends the stream, like its end.
            let n = from.read(&mut piece).unwrap_or(0);
            let at = way.lock().unwrap_or_else(PoisonError::into_inner).arrival(n);
            if pass.send((at, piece[..n].to_vec())).is_err() || n == 0 {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        for (at, piece) in due {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if piece.is_empty() || to.write_all(&piece).is_err() {
                break;
            }
        }
        // The other direction goes on.
        let _ = to.shutdown(Shutdown::Write);
    });
    Ok(())
}
