//! Processes that outlive whoever started them, and how to find all of them again.
//!
//! A list of pids is not enough to end a cluster: after a crash the list is short, and nobody wrote down the
//! pods' own processes. So the end does not ask a list: whatever runs in a node's network namespace or below a
//! node's cgroup is the cluster's.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::nodes::PREFIX;

/// Runs to its end; an error holds what it said.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let said = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(
        said.status.success(),
        "{command:?}: {}: {}{}",
        said.status,
        String::from_utf8_lossy(&said.stderr).trim(),
        String::from_utf8_lossy(&said.stdout).trim()
    );
    Ok(String::from_utf8_lossy(&said.stdout).into_owned())
}

/// Starts a process that stays; it writes to `FOLDER/logs/NAME.log`.
pub(super) fn start(folder: &Path, name: &str, command: Command) -> Result<()> {
    fs::create_dir_all(folder.join("logs"))?;
    fs::create_dir_all(folder.join("pids"))?;
    let log = fs::File::options().create(true).append(true).open(folder.join(format!("logs/{name}.log")))?;
    // In a session of its own: a Ctrl-C that ends the launcher does not reach it.
    let mut detached = Command::new("setsid");
    detached.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => detached.env(key, value),
            None => detached.env_remove(key),
        };
    }
    let child = detached
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    fs::write(folder.join(format!("pids/{name}")), child.id().to_string())?;
    Ok(())
}

/// The process that was started under that name, if it still runs.
pub(super) fn pid_of(folder: &Path, name: &str) -> Option<u32> {
    let pid: u32 = fs::read_to_string(folder.join(format!("pids/{name}"))).ok()?.trim().parse().ok()?;
    ours().contains(&pid).then_some(pid).or_else(|| {
        // The holder is in no network namespace of ours.
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        (name == "holder" && command.starts_with("sleep\0infinity")).then_some(pid)
    })
}

/// Whether a process that was started under that name has ended; one that its parent did not wait for has too.
pub(super) fn ended(folder: &Path, name: &str) -> bool {
    let stat = fs::read_to_string(folder.join(format!("pids/{name}")))
        .and_then(|pid| fs::read_to_string(format!("/proc/{}/stat", pid.trim())));
    stat.map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

/// Kills a process that was started under that name, and waits until it is gone.
pub(super) fn end(folder: &Path, name: &str) -> Result<()> {
    let pid = pid_of(folder, name).with_context(|| format!("{name} does not run"))?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    until(&format!("the end of {name}"), || Ok(ended(folder, name)))
}

/// Asks again and again, for at most three minutes: on a busy machine even a local answer takes its time.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let last = holds();
        match last {
            Ok(true) => return Ok(()),
            Ok(false) | Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
            Ok(false) => bail!("{what}: not within three minutes"),
            Err(error) => return Err(error.context(format!("{what}: not within three minutes"))),
        }
    }
}

/// Every process of the cluster.
fn ours() -> BTreeSet<u32> {
    let namespaces: BTreeSet<u64> = fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .filter_map(|entry| Some(fs::metadata(entry.path()).ok()?.ino()))
        .collect();
    let below = format!("/{PREFIX}");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let network = fs::metadata(entry.path().join("ns/net")).map(|namespace| namespace.ino());
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if network.is_ok_and(|inode| namespaces.contains(&inode))
            || cgroups
                .lines()
                .any(|line| line.splitn(3, ':').nth(2).is_some_and(|path| path.starts_with(&below)))
        {
            found.insert(pid);
        }
    }
    found
}

/// The processes below a cgroup of a name, with their command lines; those that only hold a pod are left out.
pub(super) fn of_group(name: &str) -> Vec<(u32, String)> {
    let below = format!("/{name}/");
    let mut found = Vec::new();
    for pid in ours() {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let command = read("cmdline").trim_end_matches('\0').replace('\0', " ");
        if read("cgroup").lines().any(|line| line.contains(&below)) && command != "/pause" {
            found.push((pid, command));
        }
    }
    found
}

/// Ends every process of the cluster, and those that hold a node's mount namespace.
pub(super) fn end_all(holders: &[u32]) -> Result<()> {
    let mut first = true;
    until("the end of the cluster's processes", || {
        let mut left: BTreeSet<u32> = ours();
        left.extend(
            holders.iter().filter(|pid| Path::new(&format!("/proc/{pid}/ns/net")).metadata().is_ok()),
        );
        left.remove(&std::process::id());
        for &pid in &left {
            // Nothing of it is kept, so nothing has to be written down first.
            let _ = kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL);
        }
        let done = left.is_empty() && !first;
        first = false;
        Ok(done)
    })
}

/// How many processes the cluster has.
pub(super) fn count() -> usize {
    ours().len()
}
