//! What was good, on disk: the memory that a restart must not lose.
//!
//! Why the objects' own text and not the folder's files: a file that is half good is kept half, each object
//! with the place that it came from. Why one file that is written anew: it is whole or it is the one before,
//! and nothing in it outlives its object. It is a memory and no source: what it says counts only for an
//! object that the folder still has and that cannot be read there.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::yaml::{self, Text};
use crate::resources::{Object, Origin};

/// The file, and when it may be written next.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    due: Option<Instant>,
    /// Whether it was said that not all is kept.
    full: bool,
}

/// One object of an earlier run.
#[derive(Debug)]
pub(super) struct Remembered {
    pub(super) object: Box<Object>,
    pub(super) origin: Origin,
    pub(super) text: Text,
}

/// One line.
#[derive(Debug, Serialize, Deserialize)]
struct Line<'a> {
    file: std::borrow::Cow<'a, str>,
    line: u32,
    json: bool,
    text: std::borrow::Cow<'a, str>,
}

impl Kept {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, due: None, full: false }
    }

    /// What the last run left. What cannot be read is not remembered, and nothing fails for it.
    pub(super) fn load(&self) -> Vec<Remembered> {
        let file = match fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!(%error, path = %self.path.display(), "last good objects cannot be read");
                }
                return Vec::new();
            }
        };
        let lines = BufReader::new(file.take(MAX_LEN as u64)).lines().map_while(Result::ok);
        let read = |line: String| {
            let Line { file, line, json, text } = serde_json::from_str(&line).ok()?;
            let origin = Origin { file: file.as_ref().into(), line };
            let text = Text { json, text: text.as_ref().into() };
            Some(Remembered { object: yaml::read_again(&origin, &text)?, origin, text })
        };
        lines.filter_map(read).collect()
    }

    /// Whether it may be written again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| now >= due)
    }

    /// Remembers exactly these.
    pub(super) fn save<'a>(&mut self, objects: impl Iterator<Item = (&'a Origin, &'a Text)>) {
        let begun = Instant::now();
        let (mut out, mut left) = (Vec::new(), 0_usize);
        for (origin, text) in objects {
            let line = Line {
                file: (&*origin.file).into(),
                line: origin.line,
                json: text.json,
                text: (&*text.text).into(),
            };
            let Ok(line) = serde_json::to_vec(&line) else { continue };
            if out.len() + line.len() < MAX_LEN {
                out.extend_from_slice(&line);
                out.push(b'\n');
            } else {
                left += 1;
            }
        }
        if left > 0 && !std::mem::replace(&mut self.full, true) {
            tracing::warn!(left, bytes = MAX_LEN, "not every last good object fits on disk");
        }
        if let Err(error) = crate::disk::write(&self.path, &out, 0o600) {
            tracing::warn!(%error, path = %self.path.display(), "last good objects are not on disk: a restart forgets them");
        }
        // A disk that is slow is written to the less often.
        let now = Instant::now();
        self.due = Some(now + (now.duration_since(begun) * 20).max(PAUSE));
    }
}

/// Between two writes.
const PAUSE: Duration = Duration::from_secs(1);
/// Of the file: four of the largest files that a source may have.
const MAX_LEN: usize = 64 * 1024 * 1024;
