//! Log lines: never in the way of a request.
//!
//! Why an own writer: standard output is a pipe that somebody else empties. When nobody does, a write
//! blocks, and with it the worker that wrote. Here a line goes into a bounded queue that one thread
//! empties; when it is full the line is dropped and counted (`weft_log_lines_dropped_total`).
//!
//! Why targets and levels alone choose what is logged: filters on fields bring a compiler of automata along, a
//! megabyte in every pod for what nobody asks of a sidecar.
//!
//! Why untrusted text is logged with `?`: what a caller sent is quoted and escaped, so no caller can forge
//! a line.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
};

use tracing_subscriber::{
    Registry, filter::Targets, fmt::MakeWriter, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

use super::metrics::{Counter, Shared};
use crate::config::LogFormat;

/// Changes the filter while the sidecar runs. The default one belongs to nobody and changes nothing.
#[derive(Clone, Default)]
pub struct LogHandle(Option<reload::Handle<Targets, Registry>>);

/// Sets up logging to standard output, once a process. A second call (tests with several sidecars in one
/// process) leaves the first in place.
pub fn init(filter: &str, format: LogFormat, lines: usize, shared: &Arc<Shared>) -> LogHandle {
    let filter: Targets =
        filter.parse().unwrap_or_else(|_| Targets::new().with_default(tracing::Level::INFO));
    let (filter, handle) = reload::Layer::new(filter);
    let (writer, queue) = Lines::new(lines, Arc::clone(shared));
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    let registry = tracing_subscriber::registry().with(filter);
    let set = match format {
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
        LogFormat::Text => registry.with(layer).try_init(),
    };
    if set.is_err() {
        return LogHandle(None);
    }
    let thread =
        std::thread::Builder::new().name("weft-log".into()).spawn(move || empty(&queue, io::stdout()));
    // Without the thread lines are dropped and counted; the proxy works on.
    drop(thread);
    LogHandle(Some(handle))
}

impl LogHandle {
    /// Replaces the filter.
    ///
    /// # Errors
    /// Not a filter.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let new: Targets = filter.parse().map_err(|e| format!("{filter:?} is not a log filter: {e}"))?;
        let Some(handle) = &self.0 else { return Err("logging is not set up by this sidecar".into()) };
        handle.reload(new).map_err(|e| e.to_string())
    }
}

/// Writes lines into a bounded queue.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Vec<u8>>,
    shared: Arc<Shared>,
}

impl Lines {
    fn new(lines: usize, shared: Arc<Shared>) -> (Self, Receiver<Vec<u8>>) {
        let (queue, receiver) = sync_channel(lines);
        (Self { queue, shared }, receiver)
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let kept = &line[..line.len().min(MAX_LINE)];
        match self.queue.try_send(kept.to_vec()) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.shared.count(Counter::LogLinesDropped);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn empty(queue: &Receiver<Vec<u8>>, mut out: impl Write) {
    while let Ok(line) = queue.recv() {
        // A closed pipe is nobody's fault here, and there is nowhere to say it.
        let _ = out.write_all(&line);
        if !line.ends_with(b"\n") {
            let _ = out.write_all(b"\n");
        }
        let _ = out.flush();
    }
}

/// The longest line: header values end far below it.
const MAX_LINE: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_pipe_drops_and_counts() {
        let shared = Arc::new(Shared::default());
        let (mut lines, queue) = Lines::new(2, Arc::clone(&shared));
        for _ in 0..5 {
            assert_eq!(lines.write(b"line\n").unwrap(), 5);
        }
        assert_eq!(shared.counter(Counter::LogLinesDropped), 3);
        drop(lines);
        let mut out = Vec::new();
        empty(&queue, &mut out);
        assert_eq!(out, b"line\nline\n");
    }

    #[test]
    fn a_long_line_is_cut_and_still_ends() {
        let (mut lines, queue) = Lines::new(2, Arc::default());
        assert_eq!(lines.write(&vec![b'x'; MAX_LINE + 5]).unwrap(), MAX_LINE + 5);
        drop(lines);
        let mut out = Vec::new();
        empty(&queue, &mut out);
        assert_eq!(out.len(), MAX_LINE + 1);
    }

    #[test]
    fn what_a_caller_sent_cannot_forge_a_line() {
        let (lines, queue) = Lines::new(4, Arc::default());
        let layer = tracing_subscriber::fmt::layer().with_writer(lines).with_ansi(false);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            // As the lines of inbound and outbound are: what a caller sent is a field, and never part of the message.
            tracing::warn!(
                code = "no_route",
                request_id = Some("1\n2026 forged"),
                path = "/\r\n",
                "answered by the proxy"
            );
        });
        let line = String::from_utf8(queue.recv().unwrap()).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(line.contains("code=\"no_route\""), "{line}");
    }
}
