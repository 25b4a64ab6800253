//! Puts the CNI plugin on a node, and keeps it there.
//!
//! Why it stays and looks again: whoever owns the node's network may write its list of plugins anew, and then the
//! next pod would not be captured. Why entries have an owner: while a DaemonSet is rolled out, the old pod leaves
//! after the new one has come, and must not take along what is not its own. Both look again and again meanwhile:
//! whoever has stood there and finds another owner leaves it to that one, or they would write in turns, and the one that
//! wrote last before it goes would take the program with it.
//!
//! A file is replaced, never written in place: a runtime that reads half a list starts no pod at all.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::cni;

/// Where, and what is excluded in every pod.
#[derive(Clone, Debug, clap::Args)]
pub struct InstallOptions {
    /// The node's folder of CNI programs, as mounted here
    #[arg(long, value_name = "FOLDER", default_value = "/host/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// The node's folder of CNI configuration, as mounted here
    #[arg(long, value_name = "FOLDER", default_value = "/host/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// Whose entry it is: the pod's uid
    #[arg(long, value_name = "NAME", env = "WEFT_POD_UID", default_value = "weft")]
    pub owner: String,
    /// Ports that no app dials through its sidecar
    #[arg(long, value_name = "PORTS", value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_PORTS")]
    pub skip_outbound_ports: Vec<String>,
    /// Networks that no app dials through its sidecar
    #[arg(long, value_name = "CIDRS", value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_CIDRS")]
    pub skip_outbound_cidrs: Vec<String>,
}

/// Installs the plugin and keeps it until `stop`, then takes away what is its own.
///
/// # Errors
/// The folders cannot be read or written.
pub fn keep(options: &InstallOptions, stop: &AtomicBool) -> io::Result<()> {
    let mut keeper = Keeper::new(options, Path::new("/proc/self/exe"));
    let mut told = false;
    while !stop.load(Ordering::Relaxed) {
        match keeper.look()? {
            Some(path) if !told => {
                println!("weft-cni: {} and {}", keeper.program.display(), path.display());
                told = true;
            }
            // The node has no network yet: whoever makes it will write a list.
            Some(_) | None => {}
        }
        std::thread::sleep(LOOK_EVERY);
    }
    remove(options)
}

/// Whether the plugin is part of the list that the runtime uses.
///
/// # Errors
/// It is not, or that cannot be read.
pub fn stands(options: &InstallOptions) -> io::Result<()> {
    match in_use(&options.conf_dir)? {
        Some((_, list)) if cni::owner(&list).is_some() => {
            // With an entry and no program the node starts no pod at all.
            let program = options.bin_dir.join(cni::PLUGIN);
            match fs::metadata(&program) {
                Ok(file) if file.is_file() && file.permissions().mode() & 0o111 != 0 => Ok(()),
                Ok(_) => Err(io::Error::other(format!("{}: is no program", program.display()))),
                Err(error) => Err(io::Error::other(format!("{}: {error}", program.display()))),
            }
        }
        Some((path, _)) => Err(io::Error::other(format!("{}: has no {}", path.display(), cni::PLUGIN))),
        None => Err(io::Error::other("the node has no list of CNI plugins yet")),
    }
}

/// What one installer has done so far.
struct Keeper<'a> {
    options: &'a InstallOptions,
    /// What is installed.
    source: &'a Path,
    /// Where.
    program: PathBuf,
    /// What tells the program from another one that was put in its place.
    written: Option<(u64, u64, std::time::SystemTime)>,
    /// Whether its entry was in the list once.
    stood: bool,
}

impl<'a> Keeper<'a> {
    fn new(options: &'a InstallOptions, source: &'a Path) -> Self {
        let program = options.bin_dir.join(cni::PLUGIN);
        Self { options, source, program, written: None, stood: false }
    }

    /// Makes program and entry stand; the list that the runtime uses, if there is one.
    fn look(&mut self) -> io::Result<Option<PathBuf>> {
        let found = in_use(&self.options.conf_dir)?;
        let owner = found.as_ref().and_then(|(_, list)| cni::owner(list));
        if self.stood && owner.is_some_and(|owner| owner != self.options.owner) {
            return Ok(found.map(|(path, _)| path));
        }
        // Before any entry names it.
        if self.written.is_none() || self.written != stamp(&self.program) {
            replace(&self.program, &fs::read(self.source)?, 0o755)?;
            self.written = stamp(&self.program);
        }
        let Some((path, list)) = found else { return Ok(None) };
        let InstallOptions { owner, skip_outbound_ports, skip_outbound_cidrs, .. } = self.options;
        let with = cni::chained(&list, owner, skip_outbound_ports, skip_outbound_cidrs);
        if let Some(with) = with.filter(|with| *with != list) {
            replace(&path, format!("{with:#}\n").as_bytes(), 0o600)?;
        }
        self.stood = true;
        Ok(Some(path))
    }
}

fn stamp(file: &Path) -> Option<(u64, u64, std::time::SystemTime)> {
    let file = fs::metadata(file).ok()?;
    Some((file.ino(), file.len(), file.modified().ok()?))
}

/// Takes the entry and the program away, unless a successor has taken them over.
///
/// # Errors
/// The folders cannot be read or written.
pub fn remove(options: &InstallOptions) -> io::Result<()> {
    let Some((path, list)) = in_use(&options.conf_dir)? else { return Ok(()) };
    if cni::owner(&list) != Some(&options.owner) {
        return Ok(());
    }
    // The list first: a list that names a program that is not there starts no pod.
    if let Some(without) = cni::unchained(&list) {
        replace(&path, format!("{without:#}\n").as_bytes(), 0o600)?;
    }
    fs::remove_file(options.bin_dir.join(cni::PLUGIN))
}

/// The first list by name: the one that runtimes use.
fn in_use(folder: &Path) -> io::Result<Option<(PathBuf, Value)>> {
    let mut lists: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "conflist") {
            lists.push(path);
        }
    }
    lists.sort();
    for path in lists {
        let Ok(list) = serde_json::from_slice::<Value>(&fs::read(&path)?) else { continue };
        if list["plugins"].is_array() {
            return Ok(Some((path, list)));
        }
    }
    Ok(None)
}

fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    // Neither a program nor a list by its name, whoever looks now.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.weft-new"));
    let mut file = fs::File::create(&new)?;
    file.write_all(content)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()?;
    fs::rename(&new, path)
}

const LOOK_EVERY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    struct Node(PathBuf);

    impl Node {
        fn new(name: &str) -> (Self, InstallOptions) {
            let root = std::env::temp_dir().join(format!("weft-cni-{}-{name}", std::process::id()));
            fs::create_dir_all(root.join("bin")).unwrap();
            fs::create_dir_all(root.join("net.d")).unwrap();
            let options = InstallOptions {
                bin_dir: root.join("bin"),
                conf_dir: root.join("net.d"),
                owner: name.to_owned(),
                skip_outbound_ports: vec!["53".to_owned()],
                skip_outbound_cidrs: Vec::new(),
            };
            (Self(root), options)
        }

        fn list(&self) -> Value {
            serde_json::from_slice(&fs::read(self.0.join("net.d/10-net.conflist")).unwrap()).unwrap()
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_plugin_comes_stays_and_goes_without_a_trace() {
        let (node, options) = Node::new("a");
        let list =
            serde_json::json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "ptp" }] });
        let path = node.0.join("net.d/10-net.conflist");
        let source = node.0.join("source");
        fs::write(&source, "program").unwrap();
        let program = options.bin_dir.join(cni::PLUGIN);
        let mut keeper = Keeper::new(&options, &source);
        assert_eq!(keeper.look().unwrap(), None, "a node without a network yet");
        fs::write(&path, list.to_string()).unwrap();
        fs::write(node.0.join("net.d/99-other.conflist"), list.to_string()).unwrap();
        assert_eq!(keeper.look().unwrap(), Some(path.clone()));
        assert_eq!(node.list()["plugins"][1]["excludeOutboundPorts"][0], "53");
        stands(&options).unwrap();
        // Somebody writes the list anew, or fills the folder of programs anew.
        fs::write(&path, list.to_string()).unwrap();
        fs::remove_file(&program).unwrap();
        assert!(stands(&options).is_err());
        keeper.look().unwrap();
        assert_eq!((cni::owner(&node.list()), &*fs::read(&program).unwrap()), (Some("a"), &b"program"[..]));
        fs::remove_file(&program).unwrap();
        assert!(stands(&options).is_err(), "an entry without a program starts no pod");
        keeper.look().unwrap();
        stands(&options).unwrap();
        // The next one has taken over: the one before leaves it alone, however often it looks.
        let next = InstallOptions { owner: "b".to_owned(), ..options.clone() };
        let mut successor = Keeper::new(&next, &source);
        successor.look().unwrap();
        keeper.look().unwrap();
        assert_eq!(cni::owner(&node.list()), Some("b"));
        remove(&options).unwrap();
        assert_eq!(cni::owner(&node.list()), Some("b"));
        stands(&next).unwrap();
        // A successor that goes leaves the node to whoever is still there.
        remove(&next).unwrap();
        keeper.look().unwrap();
        assert_eq!(cni::owner(&node.list()), Some("a"));
        remove(&options).unwrap();
        successor.look().unwrap();
        remove(&next).unwrap();
        assert_eq!(node.list(), list);
        assert_eq!(fs::read_dir(&options.bin_dir).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&options.conf_dir).unwrap().count(), 2);
    }
}
