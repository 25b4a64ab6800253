//! `--source dir PATH`: a folder of YAML and JSON, watched.
//!
//! Why a look reads everything: a folder is small, and a whole look cannot miss an event. File events only
//! say *when* to look, so a rename, an editor's swap or a replaced symlink needs no code of its own, and
//! where events do not arrive a slow poll does the same a little later.
//!
//! Why the last good version stays: what the mesh does must not depend on whether somebody is halfway
//! through typing. An object whose document became bad keeps its last good version; while a file has a
//! document whose name cannot be read, nothing of that file is removed; and a look that would remove most
//! of the mesh at once waits until it has been so for a while. What was good is also kept on disk (`kept`), so
//! that a controller that starts on a file that broke meanwhile has a last good version, too.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::Watcher;
use tokio::sync::mpsc;

use super::{
    Batch, Origin, Problem,
    kept::{Kept, Remembered},
    yaml::{self, Document, Text},
};
use crate::{
    index::Event,
    resources::{Kind, Object, ObjectKey},
};

/// Watches `folder` and sends a batch for every look that changed anything; the first batch always comes.
/// Ends when the receiver is gone. `kept` is the file that remembers what was good over a restart.
pub async fn watch(folder: PathBuf, kept: Option<PathBuf>, batches: mpsc::Sender<Batch>) {
    let (wake, mut woken) = mpsc::channel::<()>(1);
    let mut watcher = Watching::new(wake);
    let mut look = Look::new(folder.clone());
    let mut kept = kept.map(Kept::new);
    let mut first = true;
    loop {
        watcher.ensure(&folder);
        let looked = tokio::task::spawn_blocking(move || {
            if first && let Some(kept) = &kept {
                look.remembered = kept.load().into_iter().map(|one| (one.object.key(), one.into())).collect();
            }
            let batch = look.look(Instant::now());
            (look, kept, batch)
        });
        let Ok((returned, returned_kept, batch)) = looked.await else { return };
        (look, kept) = (returned, returned_kept);
        if let Some(batch) = batch.or_else(|| first.then(Batch::default)) {
            first = false;
            if batches.send(batch).await.is_err() {
                return;
            }
        }
        // After it is told, and not at each of many changes: the disk is slow. The poll comes back to it.
        if look.unsaved && kept.as_ref().is_some_and(|kept| kept.is_due(Instant::now())) {
            let saved = tokio::task::spawn_blocking(move || {
                if let Some(kept) = &mut kept {
                    kept.save(look.live.values().map(|live| (&live.origin, &live.text)));
                }
                look.unsaved = false;
                (look, kept)
            });
            let Ok(returned) = saved.await else { return };
            (look, kept) = returned;
        }
        tokio::select! {
            _ = woken.recv() => settle(&mut woken).await,
            () = tokio::time::sleep(POLL) => {}
            () = batches.closed() => return,
        }
    }
}

/// Waits until there was no event for [`SETTLE`], but not longer than [`SETTLE_MAX`].
async fn settle(woken: &mut mpsc::Receiver<()>) {
    let deadline = tokio::time::Instant::now() + SETTLE_MAX;
    while tokio::time::Instant::now() < deadline {
        if tokio::time::timeout(SETTLE, woken.recv()).await.is_err() {
            return;
        }
    }
}

/// File events; only a hint, so every failure here is tolerated (the poll finds what is missed).
struct Watching {
    wake: mpsc::Sender<()>,
    watcher: Option<(notify::RecommendedWatcher, u64)>,
}

impl Watching {
    fn new(wake: mpsc::Sender<()>) -> Self {
        Self { wake, watcher: None }
    }

    /// Watches the folder that the path names *now*: a swapped symlink names another one.
    fn ensure(&mut self, folder: &Path) {
        let inode = fs::metadata(folder).map_or(0, |meta| meta.ino());
        if inode == 0 || self.watcher.as_ref().is_some_and(|(_, watched)| *watched == inode) {
            return;
        }
        let wake = self.wake.clone();
        let on_event = move |event: notify::Result<notify::Event>| {
            let looked_only = event.is_ok_and(|e| matches!(e.kind, notify::EventKind::Access(_)));
            if !looked_only {
                // Full means that a look is due anyway.
                let _ = wake.try_send(());
            }
        };
        let started = notify::recommended_watcher(on_event).and_then(|mut watcher| {
            let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
            watcher.watch(&real, notify::RecursiveMode::Recursive)?;
            // The folder's own replacement is seen by its parent only.
            if let Some(parent) = folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                let _ = watcher.watch(parent, notify::RecursiveMode::NonRecursive);
            }
            Ok(watcher)
        });
        match started {
            Ok(watcher) => self.watcher = Some((watcher, inode)),
            Err(error) => {
                tracing::warn!(%error, "file events are not available; the folder is polled every 2 s");
                self.watcher = None;
            }
        }
    }
}

/// The folder as it was at the last look.
#[derive(Debug)]
pub struct Look {
    folder: PathBuf,
    files: BTreeMap<Arc<str>, File>,
    /// What the index has been told, and where it came from.
    live: BTreeMap<ObjectKey, Live>,
    /// What an earlier run knew to be good, until the folder was looked at once.
    remembered: BTreeMap<ObjectKey, Live>,
    /// Whether `live` differs from what is on disk.
    unsaved: bool,
    /// Authorization policies that were never readable.
    closed: BTreeMap<ObjectKey, Closed>,
    problems: Vec<Problem>,
    foreign: usize,
    /// A removal of most objects that waits.
    removal: Option<Removal>,
}

/// One file's content, by what tells that it changed.
#[derive(Debug)]
struct File {
    stamp: Stamp,
    documents: Vec<Document>,
    error: Option<String>,
    empty_since: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

/// What an unreadable authorization policy is about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Closed {
    file: Arc<str>,
    labels: BTreeMap<String, String>,
}

/// Since when most is missing, and of how many.
#[derive(Clone, Copy, Debug)]
struct Removal {
    since: Instant,
    of: usize,
}

#[derive(Clone, Debug)]
struct Live {
    object: Object,
    origin: Origin,
    text: Text,
}

impl From<Remembered> for Live {
    fn from(Remembered { object, origin, text }: Remembered) -> Self {
        Self { object: *object, origin, text }
    }
}

impl Look {
    /// Nothing seen yet.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            files: BTreeMap::new(),
            live: BTreeMap::new(),
            remembered: BTreeMap::new(),
            unsaved: false,
            closed: BTreeMap::new(),
            problems: Vec::new(),
            foreign: 0,
            removal: None,
        }
    }

    /// Looks once; `None` if nothing is different.
    pub fn look(&mut self, now: Instant) -> Option<Batch> {
        let listed = self.read_files(now);
        let mut problems = Vec::new();
        if let Err(error) = listed {
            let origin = Origin { file: self.folder.display().to_string().into(), line: 0 };
            let reason = format!("the folder cannot be read: {error}");
            problems.push(Problem {
                object: None,
                origin,
                path: String::new(),
                reason,
                kept_last_good: true,
            });
            let batch = self.finish(Vec::new(), problems, self.foreign);
            return batch.map(|batch| Batch { unlisted: true, ..batch });
        }
        let mut seen = self.collect(&mut problems);
        self.keep_last_good(&mut seen, &mut problems);
        self.hold_removals(&mut seen.objects, now, &mut problems);
        self.remembered.clear();
        let events = self.difference(seen.objects, seen.closed);
        self.finish(events, problems, seen.foreign)
    }

    fn finish(&mut self, events: Vec<Event>, problems: Vec<Problem>, foreign: usize) -> Option<Batch> {
        let same = events.is_empty() && problems == self.problems && foreign == self.foreign;
        self.problems.clone_from(&problems);
        self.foreign = foreign;
        (!same).then_some(Batch { events, problems, foreign, unlisted: false })
    }

    /// Brings `files` up to date; an unchanged file is not read again.
    fn read_files(&mut self, now: Instant) -> std::io::Result<()> {
        let mut paths = Vec::new();
        list(&self.folder, 0, &mut paths)?;
        let mut present = BTreeSet::new();
        for path in paths {
            let relative = path.strip_prefix(&self.folder).unwrap_or(&path);
            let name: Arc<str> = relative.to_string_lossy().into();
            // A file that vanished between listing and here is simply not there.
            let Ok(meta) = fs::metadata(&path) else { continue };
            let stamp =
                Stamp { inode: meta.ino(), len: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) };
            present.insert(name.clone());
            let old = self.files.get_mut(&name);
            if let Some(file) = old {
                // The same stamp within the clock's granularity of a write proves nothing: read it again.
                let fresh = meta.modified().ok().and_then(|m| m.elapsed().ok()).is_none_or(|age| age < FRESH);
                if file.stamp == stamp && !fresh && file.empty_since.is_none() {
                    continue;
                }
                // An editor that truncates before it writes must not empty the mesh for a moment.
                if stamp.len == 0 && !file.documents.is_empty() {
                    let since = *file.empty_since.get_or_insert(now);
                    if now.duration_since(since) < EMPTY_HOLD {
                        continue;
                    }
                }
            }
            let file = match read_limited(&path, stamp.len) {
                Ok(text) => {
                    File { stamp, documents: yaml::read(&name, &text), error: None, empty_since: None }
                }
                Err(error) => File { stamp, documents: Vec::new(), error: Some(error), empty_since: None },
            };
            self.files.insert(name, file);
        }
        self.files.retain(|name, _| present.contains(name));
        Ok(())
    }

    /// What the files say now.
    fn collect(&self, problems: &mut Vec<Problem>) -> Seen {
        let mut seen = Seen::default();
        for (name, file) in &self.files {
            if let Some(error) = &file.error {
                let origin = Origin { file: name.clone(), line: 0 };
                seen.unnamed.insert(name.clone());
                problems.push(Problem {
                    object: None,
                    origin,
                    path: String::new(),
                    reason: error.clone(),
                    kept_last_good: true,
                });
            }
            for document in &file.documents {
                match document {
                    Document::Foreign => seen.foreign += 1,
                    Document::Object { object, origin, text } => seen.add(object, origin, text, problems),
                    Document::Bad { problem, scope, policy } => {
                        let closed = Closed { file: name.clone(), labels: scope.clone() };
                        match (&problem.object, policy) {
                            (Some(key), _) => seen.bad.push((key.clone(), closed)),
                            (None, policy) => {
                                seen.unnamed.insert(name.clone());
                                let guess = policy.iter().map(|key| (key.clone(), closed.clone()));
                                seen.guessed.extend(guess);
                            }
                        }
                        problems.push(problem.clone());
                    }
                }
            }
        }
        seen
    }

    /// Puts back what must not vanish because something could not be read.
    fn keep_last_good(&self, seen: &mut Seen, problems: &mut [Problem]) {
        for (key, scope) in std::mem::take(&mut seen.bad) {
            if seen.objects.contains_key(&key) {
                continue;
            }
            if let Some(live) = self.live.get(&key).or_else(|| self.remembered.get(&key)) {
                seen.objects.insert(key.clone(), live.clone());
                for problem in problems.iter_mut().filter(|p| p.object.as_ref() == Some(&key)) {
                    problem.kept_last_good = true;
                }
            } else if key.kind == Kind::AuthorizationPolicy {
                seen.closed.insert(key, scope);
            }
        }
        // A policy that hides behind a syntax error closes its namespace, unless its last good version, or
        // what it closed before, stays in force below.
        for (key, scope) in std::mem::take(&mut seen.guessed) {
            let had = |key: &ObjectKey, file: &Arc<str>| {
                key.kind == Kind::AuthorizationPolicy && *file == scope.file
            };
            let known = self.good().any(|(key, live)| had(key, &live.origin.file))
                || self.closed.iter().any(|(key, closed)| had(key, &closed.file));
            if !known && !seen.objects.contains_key(&key) {
                seen.closed.insert(key, scope);
            }
        }
        for (key, closed) in &self.closed {
            let hidden = seen.unnamed.contains(&closed.file);
            if hidden && !seen.objects.contains_key(key) && !seen.closed.contains_key(key) {
                seen.closed.insert(key.clone(), closed.clone());
            }
        }
        for (key, live) in self.good() {
            if seen.unnamed.contains(&live.origin.file) && !seen.objects.contains_key(key) {
                seen.objects.insert(key.clone(), live.clone());
                let unnamed = |p: &&mut Problem| p.object.is_none() && p.origin.file == live.origin.file;
                for problem in problems.iter_mut().filter(unnamed) {
                    problem.kept_last_good = true;
                }
            }
        }
    }

    /// What was good at the last look, or in an earlier run.
    fn good(&self) -> impl Iterator<Item = (&ObjectKey, &Live)> {
        self.live.iter().chain(&self.remembered)
    }

    /// A removal of more than half of more than 20 is waited out: what is gone stays for a while. What was
    /// added or changed at the same time does not wait.
    fn hold_removals(
        &mut self,
        now_there: &mut BTreeMap<ObjectKey, Live>,
        now: Instant,
        problems: &mut Vec<Problem>,
    ) {
        let removed: Vec<ObjectKey> =
            self.live.keys().filter(|key| !now_there.contains_key(key)).cloned().collect();
        let removal = self.removal.unwrap_or(Removal { since: now, of: self.live.len() });
        // What is added meanwhile makes it no smaller.
        if removal.of <= HOLD_ABOVE || removed.len() * 2 <= removal.of {
            self.removal = None;
            return;
        }
        if now.duration_since(removal.since) >= REMOVAL_HOLD {
            self.removal = None;
            return;
        }
        self.removal = Some(removal);
        let origin = Origin { file: self.folder.display().to_string().into(), line: 0 };
        let reason = format!(
            "{} of {} objects are gone at once: held until it has been so for {} s",
            removed.len(),
            removal.of,
            REMOVAL_HOLD.as_secs()
        );
        problems.push(Problem { object: None, origin, path: String::new(), reason, kept_last_good: true });
        for key in removed {
            if let Some(live) = self.live.get(&key) {
                now_there.insert(key, live.clone());
            }
        }
    }

    fn difference(
        &mut self,
        now_there: BTreeMap<ObjectKey, Live>,
        closed: BTreeMap<ObjectKey, Closed>,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        for (key, live) in &now_there {
            let old = self.live.get(key);
            if old.is_none_or(|old| old.object != live.object || old.origin != live.origin) {
                let object = Box::new(live.object.clone());
                events.push(Event::Apply { object, origin: live.origin.clone() });
            }
        }
        for (key, policy) in &closed {
            if self.closed.get(key).is_none_or(|old| old.labels != policy.labels) {
                events.push(Event::Unreadable { key: key.clone(), labels: policy.labels.clone() });
            }
        }
        let gone = |key: &&ObjectKey| !now_there.contains_key(key) && !closed.contains_key(key);
        let removed: BTreeSet<_> = self.live.keys().chain(self.closed.keys()).filter(gone).cloned().collect();
        events.extend(removed.into_iter().map(Event::Delete));
        self.unsaved |= !events.is_empty();
        self.live = now_there;
        self.closed = closed;
        events
    }
}

#[derive(Default)]
struct Seen {
    objects: BTreeMap<ObjectKey, Live>,
    bad: Vec<(ObjectKey, Closed)>,
    /// Authorization policies that documents without a readable name seem to be.
    guessed: Vec<(ObjectKey, Closed)>,
    closed: BTreeMap<ObjectKey, Closed>,
    /// Files with a document whose name cannot be read.
    unnamed: BTreeSet<Arc<str>>,
    foreign: usize,
}

impl Seen {
    fn add(&mut self, object: &Object, origin: &Origin, text: &Text, problems: &mut Vec<Problem>) {
        let key = object.key();
        if let Some(first) = self.objects.get(&key) {
            problems.push(Problem {
                reason: format!("{key} is already in {}; this one is not used", first.origin),
                object: Some(key),
                origin: origin.clone(),
                path: String::new(),
                kept_last_good: false,
            });
            return;
        }
        self.objects.insert(key, Live { object: object.clone(), origin: origin.clone(), text: text.clone() });
    }
}

/// Files of `folder` and below, sorted, without hidden ones (`..data` of mounted volumes, editors' files).
fn list(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let path = entry.path();
        if name.as_encoded_bytes().first() == Some(&b'.') {
            continue;
        }
        // Through symlinks, as mounted volumes need; the depth ends loops.
        let Ok(meta) = fs::metadata(&path) else { continue };
        if meta.is_dir() {
            if depth < MAX_DEPTH {
                list(&path, depth + 1, found)?;
            }
        } else if !meta.is_file() {
            // Reading a pipe or a device might never end.
        } else if matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json")) {
            found.push(path);
        }
    }
    Ok(())
}

fn read_limited(path: &Path, len: u64) -> Result<String, String> {
    if len > MAX_FILE {
        return Err(format!("the file has {len} bytes; the limit is {MAX_FILE}"));
    }
    let bytes = fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    String::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())
}

/// Quiet time after the last file event: editors write, rename and change modes in a burst.
const SETTLE: Duration = Duration::from_millis(50);
/// A folder under constant change is looked at anyway.
const SETTLE_MAX: Duration = Duration::from_millis(500);
/// Where file events do not arrive (some network file systems).
const POLL: Duration = Duration::from_secs(2);
/// File times are only as fine as the kernel's tick.
const FRESH: Duration = Duration::from_secs(3);
/// A file that became empty is believed after this.
const EMPTY_HOLD: Duration = Duration::from_secs(1);
/// A removal of most objects is believed after this (protocol.md §7).
const REMOVAL_HOLD: Duration = Duration::from_secs(60);
/// … and only where there were more objects than this.
const HOLD_ABOVE: usize = 20;
const MAX_FILE: u64 = 16 * 1024 * 1024;
const MAX_DEPTH: usize = 8;

/// Reads a folder once, for commands that need no watch.
pub fn read_once(folder: &Path) -> (Vec<(Object, Origin)>, Vec<Problem>) {
    let mut look = Look::new(folder.to_owned());
    let problems = look.look(Instant::now()).map(|batch| batch.problems).unwrap_or_default();
    (look.live.into_values().map(|live| (live.object, live.origin)).collect(), problems)
}

/// Problems by object, for reports.
pub fn by_object(problems: &[Problem]) -> HashMap<&ObjectKey, Vec<&Problem>> {
    let mut map: HashMap<_, Vec<_>> = HashMap::new();
    for problem in problems {
        if let Some(key) = &problem.object {
            map.entry(key).or_default().push(problem);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("weft-dir-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.join(name), text).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn service(name: &str, port: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"
        )
    }

    fn names(events: &[Event]) -> Vec<String> {
        let name = |event: &Event| match event {
            Event::Apply { object, .. } => format!("+{}", object.key().name),
            Event::Delete(key) => format!("-{}", key.name),
            Event::Unreadable { key, .. } => format!("!{}", key.name),
            Event::Zone { .. } => unreachable!("a folder has no nodes"),
        };
        events.iter().map(name).collect()
    }

    #[test]
    fn a_document_that_becomes_bad_keeps_its_last_good_version() {
        let folder = Folder::new("lastgood");
        folder.write("a.yaml", &format!("{}---\n{}", service("a", "80"), service("b", "81")));
        let mut look = Look::new(folder.0.clone());
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), ["+a", "+b"]);
        assert!(look.look(Instant::now()).is_none());

        folder.write("a.yaml", &format!("{}---\n{}", service("a", "eighty"), service("b", "82")));
        let batch = look.look(Instant::now()).unwrap();
        assert_eq!(names(&batch.events), ["+b"]);
        assert!(batch.problems[0].kept_last_good);
        assert_eq!(batch.problems[0].path, "spec.ports[0].port");

        // A syntax error hides which object it was: nothing of the file goes.
        folder.write("a.yaml", "kind: [\n");
        let batch = look.look(Instant::now()).unwrap();
        assert_eq!(names(&batch.events), [""; 0]);
        assert!(batch.problems[0].kept_last_good);

        folder.write("a.yaml", &service("b", "82"));
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), ["+b", "-a"]);
    }

    #[test]
    fn what_broke_while_nobody_looked_keeps_its_last_good_version() {
        let folder = Folder::new("restart");
        fs::create_dir(folder.0.join("mesh")).unwrap();
        let policy = "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n";
        let good = format!("{policy}spec: {{action: Deny}}\n---\n{}", service("a", "80"));
        folder.write("mesh/a.yaml", &good);
        folder.write("mesh/b.yaml", &format!("{}---\n{}", service("b", "80"), service("c", "80")));
        folder.write("mesh/d.json", "{\"items\": [\n\t{\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"d\"}}], \"apiVersion\": \"v1\", \"kind\": \"List\"}");
        folder.write("mesh/e.yaml", &service("e", "80"));
        let run = || {
            let mut kept = Kept::new(folder.0.join("kept"));
            let mut look = Look::new(folder.0.join("mesh"));
            look.remembered = kept.load().into_iter().map(|one| (one.object.key(), one.into())).collect();
            let batch = look.look(Instant::now()).unwrap();
            kept.save(look.live.values().map(|live| (&live.origin, &live.text)));
            batch
        };
        let all = ["+a", "+b", "+c", "+d", "+e", "+p"];
        assert_eq!(names(&run().events), all);
        // One field, a syntax error that hides which object it was, a file that is no JSON; and one that is gone.
        folder.write(
            "mesh/a.yaml",
            &format!("{policy}spec: {{action: Maybe}}\n---\n{}", service("a", "eighty")),
        );
        folder.write("mesh/b.yaml", &format!("{}---\nkind: [\n", service("b", "81")));
        folder.write("mesh/d.json", "{");
        fs::remove_file(folder.0.join("mesh/e.yaml")).unwrap();
        for _ in 0..2 {
            let batch = run();
            assert_eq!(names(&batch.events), ["+a", "+b", "+c", "+d", "+p"]);
            assert_eq!(batch.problems.len(), 4, "{:?}", batch.problems);
            assert!(batch.problems.iter().all(|problem| problem.kept_last_good), "{:?}", batch.problems);
        }
        // What is kept is no source: mended, the file counts, and nothing is left of what it no longer says.
        folder.write("mesh/b.yaml", &service("b", "82"));
        assert_eq!(names(&run().events), ["+a", "+b", "+d", "+p"]);
        // A file of memories that cannot be read is none.
        folder.write("kept", "{\"file\": 1}\nnonsense\n");
        assert_eq!(
            names(&run().events),
            ["!p", "+b"].map(str::to_owned).into_iter().rev().collect::<Vec<_>>()
        );
    }

    #[test]
    fn an_empty_moment_removes_nothing() {
        let folder = Folder::new("empty");
        folder.write("a.yml", &service("a", "80"));
        let mut look = Look::new(folder.0.clone());
        let start = Instant::now();
        look.look(start);
        folder.write("a.yml", "");
        assert!(look.look(start).is_none());
        let later = look.look(start + EMPTY_HOLD).unwrap();
        assert_eq!(names(&later.events), ["-a"]);
    }

    #[test]
    fn most_of_the_mesh_does_not_vanish_at_once() {
        let folder = Folder::new("mass");
        let all: String = (0..30).map(|i| format!("{}---\n", service(&format!("s{i}"), "80"))).collect();
        folder.write("a.yaml", &all);
        let mut look = Look::new(folder.0.clone());
        let start = Instant::now();
        assert_eq!(look.look(start).unwrap().events.len(), 30);
        folder.write("a.yaml", &service("s0", "80"));
        let held = look.look(start).unwrap();
        assert!(held.events.is_empty());
        assert!(held.problems[0].reason.contains("29 of 30"));
        assert_eq!(look.look(start + REMOVAL_HOLD).unwrap().events.len(), 29);
    }

    #[test]
    fn what_is_added_does_not_wait_for_a_removal_that_is_held() {
        let folder = Folder::new("mass-added");
        let many = |prefix: &str| -> String {
            (0..30).map(|i| format!("{}---\n", service(&format!("{prefix}{i}"), "80"))).collect()
        };
        folder.write("a.yaml", &many("old"));
        let mut look = Look::new(folder.0.clone());
        let start = Instant::now();
        look.look(start);
        // Everything is renamed, and a moment later something else is changed.
        folder.write("a.yaml", &many("new"));
        let batch = look.look(start).unwrap();
        let added: Vec<_> = batch.events.iter().map(|e| matches!(e, Event::Apply { .. })).collect();
        assert_eq!((added.len(), added.iter().all(|added| *added)), (30, true), "{:?}", names(&batch.events));
        assert!(batch.problems[0].reason.contains("30 of 30"), "{:?}", batch.problems);
        folder.write("b.yaml", &service("urgent", "80"));
        assert_eq!(names(&look.look(start + REMOVAL_HOLD / 2).unwrap().events), ["+urgent"]);
        let gone = look.look(start + REMOVAL_HOLD).unwrap().events;
        assert_eq!(gone.len(), 30);
        assert!(gone.iter().all(|event| matches!(event, Event::Delete(_))));
        assert!(look.look(start + REMOVAL_HOLD * 2).is_none());
    }

    #[test]
    fn an_unreadable_policy_closes_and_a_duplicate_is_named() {
        let folder = Folder::new("closed");
        let policy = "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n";
        folder.write("p.yaml", &format!("{policy}spec: {{action: Maybe}}\n"));
        folder.write("a.yaml", &service("a", "80"));
        folder.write("b.yaml", &service("a", "81"));
        let mut look = Look::new(folder.0.clone());
        let batch = look.look(Instant::now()).unwrap();
        assert_eq!(names(&batch.events), ["+a", "!p"]);
        assert!(
            batch.problems.iter().any(|p| p.reason.contains("already in a.yaml:1")),
            "{:?}",
            batch.problems
        );
        folder.write("p.yaml", &format!("{policy}spec: {{action: Deny}}\n"));
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), ["+p"]);
    }

    #[test]
    fn a_policy_behind_a_syntax_error_closes_too_and_stays_closed() {
        let folder = Folder::new("hidden");
        let policy = |name: &str| {
            format!(
                "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
                 metadata: {{name: {name}, namespace: shop}}\n"
            )
        };
        folder.write("p.yaml", &format!("{}spec: [unclosed\n", policy("p")));
        folder.write("q.yaml", &format!("{}spec: {{action: Maybe}}\n", policy("q")));
        let mut look = Look::new(folder.0.clone());
        let batch = look.look(Instant::now()).unwrap();
        assert_eq!(names(&batch.events), ["!p", "!q"]);
        assert!(matches!(&batch.events[0], Event::Unreadable { key, labels }
            if &*key.namespace == "shop" && labels.is_empty()));
        // Made worse, it must not open.
        folder.write("q.yaml", &format!("{}spec: [\n", policy("q")));
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), [""; 0]);
        folder.write("q.yaml", &format!("{}spec: {{action: Deny}}\n", policy("q")));
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), ["+q"]);
        // One that was good once stays as it was.
        folder.write("q.yaml", &format!("{}spec: [\n", policy("q")));
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), [""; 0]);
        fs::remove_file(folder.0.join("q.yaml")).unwrap();
        fs::remove_file(folder.0.join("p.yaml")).unwrap();
        assert_eq!(names(&look.look(Instant::now()).unwrap().events), ["-p", "-q"]);
    }

    #[test]
    fn a_folder_that_cannot_be_listed_is_not_an_empty_one_and_a_pipe_is_not_read() {
        let folder = Folder::new("unlisted");
        let inner = folder.0.join("mesh");
        let mut look = Look::new(inner.clone());
        assert!(look.look(Instant::now()).unwrap().unlisted);
        fs::create_dir(&inner).unwrap();
        let made = std::process::Command::new("mkfifo").arg(inner.join("pipe.yaml")).status();
        assert!(made.unwrap().success());
        folder.write("mesh/a.yaml", &service("a", "80"));
        let batch = look.look(Instant::now()).unwrap();
        assert_eq!((names(&batch.events), batch.unlisted), (vec!["+a".to_owned()], false));
    }

    #[tokio::test]
    async fn events_and_symlink_swaps_are_seen() {
        let folder = Folder::new("watch");
        for version in ["v1", "v2"] {
            fs::create_dir(folder.0.join(version)).unwrap();
        }
        folder.write("v1/a.yaml", &service("a", "80"));
        folder.write("v2/a.yaml", &service("a", "81"));
        let link = folder.0.join("mesh");
        std::os::unix::fs::symlink(folder.0.join("v1"), &link).unwrap();
        let (sender, mut batches) = mpsc::channel(1);
        let task = tokio::spawn(watch(link.clone(), None, sender));
        let mut next =
            async || tokio::time::timeout(Duration::from_secs(10), batches.recv()).await.unwrap().unwrap();
        assert_eq!(names(&next().await.events), ["+a"]);
        // An editor's way: a new file renamed over the old one.
        folder.write("v1/.a.swp", &service("a", "90"));
        fs::rename(folder.0.join("v1/.a.swp"), folder.0.join("v1/a.yaml")).unwrap();
        assert_eq!(names(&next().await.events), ["+a"]);
        // A mounted volume's way: another folder behind the name.
        std::os::unix::fs::symlink(folder.0.join("v2"), folder.0.join("next")).unwrap();
        fs::rename(folder.0.join("next"), &link).unwrap();
        assert_eq!(names(&next().await.events), ["+a"]);
        drop(batches);
        task.await.unwrap();
    }
}
