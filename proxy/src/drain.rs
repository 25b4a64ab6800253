//! Leaving without losing a request: lame duck, refuse, finish, then cut; the outbound side outlives the app.
//!
//! Why phases: Kubernetes runs `preStop` (`weft-proxy drain`) before the app hears of anything, while other
//! sidecars still hold this pod in their endpoint lists. First they are told in-band (GOAWAY, or `connection:
//! close` with each answer) and still served. Then what arrives is answered "not sent", which callers send elsewhere whatever
//! its method, until nothing is in flight. Only then may the app be stopped. SIGTERM, which a native sidecar
//! gets after the app has gone, ends the outbound side too.
//!
//! Why an idle HTTP/1 connection is left open while peers are told: nothing can be told on it, and a request that its
//! client has just sent would be reset.

use std::{
    cell::Cell,
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use crate::{
    direction::Direction,
    wakers::{Place, Wakers},
};

/// How far the way out has been gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Not draining.
    Serving,
    /// Peers are told; requests are still served.
    LameDuck,
    /// New inbound requests are answered "not sent".
    Refusing,
    /// Outbound connections end too.
    Stopping,
    /// Whatever is still open is cut.
    Cut,
}

/// The process's way out, shared by all workers, the admin socket and the signal handler.
#[derive(Clone)]
pub struct Drain(Arc<Shared>);

struct Shared {
    phase: watch::Sender<Phase>,
    now: AtomicU8,
    inbound_requests: AtomicUsize,
    inbound_connections: AtomicUsize,
    outbound_connections: AtomicUsize,
    idle: Notify,
}

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// Serving.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            phase: watch::Sender::new(Phase::Serving),
            now: AtomicU8::new(0),
            inbound_requests: AtomicUsize::new(0),
            inbound_connections: AtomicUsize::new(0),
            outbound_connections: AtomicUsize::new(0),
            idle: Notify::new(),
        }))
    }

    /// The phase at this moment.
    pub fn phase(&self) -> Phase {
        *self.0.phase.borrow()
    }

    /// Requests that came in and are not answered yet.
    pub fn inbound_requests(&self) -> usize {
        self.0.inbound_requests.load(Ordering::Relaxed)
    }

    /// Open connections, inbound and outbound.
    pub fn connections(&self) -> (usize, usize) {
        let load = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        (load(&self.0.inbound_connections), load(&self.0.outbound_connections))
    }

    /// Drains the inbound side: after this, the app has nothing in flight and gets nothing new.
    /// Returns false if `timeout` passed first. Calling it again waits for the same end.
    pub async fn drain_inbound(&self, lame_duck: Duration, timeout: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + timeout;
        if self.advance(Phase::LameDuck) {
            tracing::info!(lame_duck_ms = lame_duck.as_millis() as u64, "draining: peers are told");
            tokio::time::sleep(lame_duck.min(timeout)).await;
            self.advance(Phase::Refusing);
        } else {
            let mut phase = self.0.phase.subscribe();
            let refusing = phase.wait_for(|p| *p >= Phase::Refusing);
            if tokio::time::timeout_at(deadline, refusing).await.is_err() {
                return false;
            }
        }
        let done = self.idle_when(deadline, |s| s.inbound_requests.load(Ordering::SeqCst) == 0).await;
        tracing::info!(in_flight = self.inbound_requests(), "drained");
        done
    }

    /// Ends everything: what is in flight may finish until `timeout`.
    pub async fn stop(&self, timeout: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + timeout;
        self.advance(Phase::LameDuck);
        self.advance(Phase::Refusing);
        self.advance(Phase::Stopping);
        let idle = |s: &Shared| {
            s.inbound_connections.load(Ordering::Relaxed) == 0
                && s.outbound_connections.load(Ordering::Relaxed) == 0
        };
        let done = self.idle_when(deadline, idle).await;
        if !done {
            self.advance(Phase::Cut);
            let cut = tokio::time::Instant::now() + Duration::from_millis(100);
            self.idle_when(cut, idle).await;
        }
        done
    }

    /// Moves on; false if that point was passed already.
    fn advance(&self, to: Phase) -> bool {
        self.0.now.fetch_max(to as u8, Ordering::SeqCst);
        self.0.phase.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        })
    }

    async fn idle_when(&self, deadline: tokio::time::Instant, idle: impl Fn(&Shared) -> bool) -> bool {
        loop {
            let notified = self.0.idle.notified();
            if idle(&self.0) {
                return true;
            }
            if tokio::time::timeout_at(deadline, notified).await.is_err() {
                return idle(&self.0);
            }
        }
    }
}

/// One worker's view: reading the phase is reading a cell, and connections are woken when it changes.
#[derive(Clone)]
pub(crate) struct LocalDrain(Rc<Local>);

struct Local {
    shared: Drain,
    phase: Cell<Phase>,
    changes: Wakers,
}

impl LocalDrain {
    pub(crate) fn new(shared: Drain) -> Self {
        let phase = Cell::new(shared.phase());
        Self(Rc::new(Local { shared, phase, changes: Wakers::default() }))
    }

    /// Follows the phase; runs as long as the worker.
    pub(crate) async fn follow(self) {
        let mut phase = self.0.shared.0.phase.subscribe();
        loop {
            self.0.phase.set(*phase.borrow_and_update());
            self.0.changes.wake();
            if phase.changed().await.is_err() {
                return;
            }
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.0.phase.get()
    }

    /// Whether new inbound requests are answered "not sent". The shared value counts, not this worker's: a
    /// drain that has returned must already hold on every worker.
    pub(crate) fn is_refusing(&self) -> bool {
        self.0.shared.0.now.load(Ordering::SeqCst) >= Phase::Refusing as u8
    }

    /// Counts an inbound request until the guard goes. Taken before [`Self::is_refusing`] is asked: one order for
    /// all threads, so either the drain sees this request or this request sees the drain.
    pub(crate) fn request(&self) -> RequestGuard {
        self.0.shared.0.inbound_requests.fetch_add(1, Ordering::SeqCst);
        RequestGuard(self.0.shared.0.clone())
    }

    /// Counts a connection until the guard goes.
    pub(crate) fn connection(&self, side: Direction) -> ConnectionGuard {
        let shared = self.0.shared.0.clone();
        counter(&shared, side).fetch_add(1, Ordering::Relaxed);
        ConnectionGuard { shared, side }
    }

    /// Runs an HTTP connection to its end, shutting it down gracefully when the phase asks for it.
    pub(crate) fn serve<C: Graceful>(&self, connection: C, side: Direction) -> Serve<C> {
        // Whoever comes while requests are refused is told so with each; that all ends is told to everybody.
        let told = self.phase().min(Phase::Refusing);
        let place = self.0.changes.place();
        Serve { connection: Box::pin(connection), drain: self.clone(), side, told, place }
    }

    /// Waits until what is still open is cut: the time that [`Drain::stop`] gave has passed.
    pub(crate) async fn cut(&self) {
        let mut phase = self.0.shared.0.phase.subscribe();
        // The sender lives in `self`.
        let _ = phase.wait_for(|p| *p >= Phase::Cut).await;
    }
}

fn counter(shared: &Shared, side: Direction) -> &AtomicUsize {
    match side {
        Direction::Inbound => &shared.inbound_connections,
        Direction::Outbound => &shared.outbound_connections,
    }
}

/// Counts one inbound request.
pub(crate) struct RequestGuard(Arc<Shared>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        if self.0.inbound_requests.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

/// Counts one connection.
pub(crate) struct ConnectionGuard {
    shared: Arc<Shared>,
    side: Direction,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        if counter(&self.shared, self.side).fetch_sub(1, Ordering::Relaxed) == 1 {
            self.shared.idle.notify_waiters();
        }
    }
}

/// A connection that can be asked to finish what it has and take nothing new.
pub(crate) trait Graceful: Future<Output = hyper::Result<()>> {
    /// Whether the peer can be told at any time; otherwise the answers tell it.
    const TELLS: bool;

    fn graceful_shutdown(self: Pin<&mut Self>);
}

impl<I, B, S> Graceful for hyper::server::conn::http1::UpgradeableConnection<I, S>
where
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    const TELLS: bool = false;

    fn graceful_shutdown(self: Pin<&mut Self>) {
        Self::graceful_shutdown(self);
    }
}

impl<I, B, S, E> Graceful for hyper::server::conn::http2::Connection<I, S, E>
where
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    E: hyper::rt::bounds::Http2ServerConnExec<S::Future, B>,
{
    const TELLS: bool = true;

    fn graceful_shutdown(self: Pin<&mut Self>) {
        Self::graceful_shutdown(self);
    }
}

/// See [`LocalDrain::serve`].
pub(crate) struct Serve<C> {
    connection: Pin<Box<C>>,
    drain: LocalDrain,
    side: Direction,
    told: Phase,
    place: Place,
}

impl<C: Graceful> Serve<C> {
    /// Ends it from outside: its certificate has run out, or policy changed.
    pub(crate) fn finish(&mut self) {
        self.connection.as_mut().graceful_shutdown();
    }
}

impl<C: Graceful> Future for Serve<C> {
    type Output = hyper::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let phase = this.drain.phase();
        let from = match this.side {
            Direction::Inbound if C::TELLS => Phase::LameDuck,
            Direction::Inbound => Phase::Refusing,
            Direction::Outbound => Phase::Stopping,
        };
        if phase != this.told && phase >= from {
            // What has arrived is a request: shut down before it was looked at, HTTP/1 would close without having seen
            // it.
            if let Poll::Ready(ended) = this.connection.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            this.connection.as_mut().graceful_shutdown();
        }
        this.told = phase;
        this.place.wait(cx);
        this.connection.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_what_is_in_flight() {
        let drain = Drain::new();
        let local = LocalDrain::new(drain.clone());
        let request = local.request();
        let waiting = tokio::spawn({
            let drain = drain.clone();
            async move { drain.drain_inbound(Duration::from_secs(1), Duration::from_secs(30)).await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!waiting.is_finished());
        assert!(local.is_refusing());
        drop(request);
        assert!(waiting.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn drain_gives_up_at_its_timeout_and_a_second_call_joins_the_first() {
        let drain = Drain::new();
        let local = LocalDrain::new(drain.clone());
        let _request = local.request();
        let two = tokio::join!(
            drain.drain_inbound(Duration::from_secs(1), Duration::from_secs(3)),
            drain.drain_inbound(Duration::from_secs(1), Duration::from_secs(3)),
        );
        assert_eq!(two, (false, false));
    }

    /// A connection that notes what is done to it: `p`olled, told to `s`hut down.
    struct Noted<const TELLS: bool>(Rc<RefCell<String>>);

    impl<const TELLS: bool> Future for Noted<TELLS> {
        type Output = hyper::Result<()>;

        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            self.0.borrow_mut().push('p');
            Poll::Pending
        }
    }

    impl<const TELLS: bool> Graceful for Noted<TELLS> {
        const TELLS: bool = TELLS;

        fn graceful_shutdown(self: Pin<&mut Self>) {
            self.0.borrow_mut().push('s');
        }
    }

    #[tokio::test]
    async fn whoever_comes_while_all_ends_is_read_once_and_then_told() {
        let drain = Drain::new();
        for (to, side, noted) in [
            (Phase::Refusing, Direction::Inbound, "p"),
            (Phase::Stopping, Direction::Inbound, "psp"),
            (Phase::Stopping, Direction::Outbound, "psp"),
        ] {
            drain.advance(to);
            let local = LocalDrain::new(drain.clone());
            let seen = Rc::new(RefCell::new(String::new()));
            let mut serving = local.serve(Noted::<false>(seen.clone()), side);
            let polled = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut serving).poll(cx))).await;
            assert!(polled.is_pending());
            assert_eq!(*seen.borrow(), noted, "{to:?} {side:?}");
        }
    }

    #[tokio::test]
    async fn an_idle_connection_that_cannot_be_told_is_closed_last_and_not_unread() {
        async fn phases<const TELLS: bool>() -> String {
            let drain = Drain::new();
            let local = LocalDrain::new(drain.clone());
            let seen = Rc::new(RefCell::new(String::new()));
            let mut serving = local.serve(Noted::<TELLS>(seen.clone()), Direction::Inbound);
            for phase in [Phase::Serving, Phase::LameDuck, Phase::Refusing] {
                drain.advance(phase);
                local.0.phase.set(phase);
                let polled = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut serving).poll(cx))).await;
                assert!(polled.is_pending());
                seen.borrow_mut().push(' ');
            }
            drop(serving);
            seen.take()
        }
        assert_eq!(phases::<false>().await, "p p psp ");
        assert_eq!(phases::<true>().await, "p psp psp ");
    }
}
