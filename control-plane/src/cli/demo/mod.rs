//! `weft demo`: a whole mesh on one machine, explained and measured while it runs.
//!
//! Why it is no film: services, capture, sidecars, controller and database are the real programs, in network
//! namespaces that differ from pods in nothing that the kernel knows. Each step measures its claim, and the exit
//! code says whether all of them held, so that continuous integration runs the same demo that people watch.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use nix::{
    mount::{MsFlags, mount},
    unistd::{Uid, User},
};
use serde::Serialize;

mod app;
mod database;
pub mod mesh;
mod mysql;
pub mod netns;
mod stage;
mod steps;
mod ui;
mod users;

use super::output::{Format, Output, Tone, json};
use stage::Stage;
use steps::{Outcome, STEPS};
use ui::Ui;

pub(super) use app::AppArgs;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft demo\n  weft demo --hold               stay up at the end, to try things\n  weft demo --no-tty --steps 3   for scripts\n  weft demo -o json | jq '.steps[] | {title, held, figures}'\n\nExit code: 0 when everything claimed was measured to be so, 1 when not, 130 after Ctrl-C."
)]
pub(super) struct DemoArgs {
    /// Perform only so many of the steps, from the first on
    #[arg(long, default_value_t = STEPS.len(), value_name = "N")]
    steps: usize,
    /// Plain text only, no live view
    #[arg(long)]
    no_tty: bool,
    /// Stay up when the steps are done, until Ctrl-C
    #[arg(long)]
    hold: bool,
    /// Requests a second by the shop's users
    #[arg(long, default_value_t = 120.0, value_parser = rate)]
    rate: f64,
    #[command(flatten)]
    format: Format,
}

/// What `-o json` prints.
#[derive(Debug, Serialize)]
struct Report {
    held: bool,
    seconds: f64,
    steps: Vec<Outcome>,
}

pub(super) fn main(args: &DemoArgs) -> Result<ExitCode> {
    find_programs()?;
    if !Uid::effective().is_root() {
        become_root_of_our_own()?;
    }
    if std::env::var_os(OWN_ROOT).is_some() {
        own_run_folder()?;
    }
    netns::usable()?;
    listen_for_ctrl_c()?;
    let result = perform(args);
    if mesh::interrupted() {
        eprintln!("\nweft: interrupted; everything that was started is gone");
        return Ok(ExitCode::from(130));
    }
    result
}

pub(super) fn app(args: &AppArgs) -> Result<ExitCode> {
    app::main(args)?;
    Ok(ExitCode::SUCCESS)
}

fn perform(args: &DemoArgs) -> Result<ExitCode> {
    let start = std::time::Instant::now();
    let ui = Ui::new(!args.no_tty, args.format.output == Output::Json);
    let mut stage = Stage::build(ui, args.rate)?;
    // Nobody outside reaches a network of our own.
    let reached = if std::env::var_os(OWN_ROOT).is_none() { stage.open_api() } else { None };
    if let Some(address) = reached {
        let elsewhere = format!("WEFT_API={address} ");
        let prefix = if address.port() == weft_core::ports::API { "" } else { &elsewhere };
        stage.ui.say(
            Tone::Dim,
            "",
            &format!(
                "In another terminal: `{prefix}weft routes --watch`, `weft status`, `weft endpoints shop/api-v1`, or \
                 edit the files in {}",
                stage.mesh.source().display()
            ),
        )?;
    }
    stage.pass(WARM_UP)?;
    let count = args.steps.min(STEPS.len());
    let mut steps = Vec::new();
    for (number, step) in STEPS.iter().take(count).enumerate() {
        steps.push(step.perform(number + 1, count, &mut stage)?);
        if stage.ui.is_live() {
            stage.pass(TO_READ)?;
        }
    }
    let held = steps.iter().all(|step| step.held);
    let failed = steps.iter().filter(|step| !step.held).count();
    stage.ui.heading(&format!("{:.0}s", start.elapsed().as_secs_f64()))?;
    match failed {
        0 => stage.ui.say(Tone::Good, "✓ ", &format!("{count} of {count} steps: everything held."))?,
        n => stage.ui.say(Tone::Bad, "✗ ", &format!("{n} of {count} steps did not hold what they claim."))?,
    }
    if args.hold {
        stage.ui.say(Tone::Bold, "", "Holding: Ctrl-C ends it.")?;
        stage.pass(Duration::from_secs(u64::MAX / 4))?;
    }
    stage.ui.clear()?;
    drop(stage);
    if args.format.output == Output::Json {
        json(&Report { held, seconds: start.elapsed().as_secs_f64(), steps })?;
    }
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Ctrl-C and its kin only ask to leave: what was made is removed by whoever made it. A second one does not wait,
/// and the reaper cleans up.
fn listen_for_ctrl_c() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
            let Ok(mut signals) = kinds.into_iter().map(signal).collect::<Result<Vec<_>, _>>() else {
                return;
            };
            let [interrupt, terminate, hangup] = signals.as_mut_slice() else { return };
            let mut asked = false;
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                if asked {
                    std::process::exit(130);
                }
                asked = true;
                mesh::interrupt();
            }
        });
    });
    Ok(())
}

/// Names every program that is missing, at once, with its package. Debian keeps some where a user's PATH does not
/// look; then the demo starts itself again with a longer one.
fn find_programs() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let there =
        |folders: &[PathBuf], program: &str| folders.iter().any(|folder| is_program(&folder.join(program)));
    let missing: Vec<_> = PROGRAMS.iter().filter(|(program, _)| !there(&folders, program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    let missing: Vec<_> = missing.into_iter().filter(|(program, _)| !there(&folders, program)).collect();
    if missing.is_empty() {
        let error = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env("PATH", std::env::join_paths(&folders)?)
            .exec();
        return Err(error).context("starting again with a longer PATH");
    }
    let named: Vec<_> =
        missing.iter().map(|(program, package)| format!("{program} (package {package})")).collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    bail!("the demo needs {}\n  apt-get install {}", named.join(", "), packages.join(" "));
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Starts the demo again as root of a user namespace, where the kernel and /etc/subuid allow it.
fn become_root_of_our_own() -> Result<()> {
    const HOW: &str = "run it as root (sudo weft demo)";
    let program = |name: &str| {
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|f| is_program(&f.join(name)))
    };
    ensure!(
        program("newuidmap") && program("newgidmap"),
        "without root the demo needs newuidmap (Debian package uidmap) and a range in /etc/subuid; or {HOW}"
    );
    let uid = Uid::current();
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name).unwrap_or_default();
    for file in ["/etc/subuid", "/etc/subgid"] {
        let ranges = std::fs::read_to_string(file).unwrap_or_default();
        ensure!(
            has_range(&ranges, &name, uid.as_raw()),
            "without root the demo needs 65536 ids for {name} in {file} (sudo usermod --add-subuids 100000-165535 \
             --add-subgids 100000-165535 {name}); or {HOW}"
        );
    }
    let unshare = |command: &[&std::ffi::OsStr]| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-auto", "--map-root-user", "--mount", "--net", "--"]).args(command);
        unshare
    };
    let tried =
        unshare(&["true".as_ref()]).stdin(Stdio::null()).output().context("unshare (package util-linux)")?;
    ensure!(
        tried.status.success(),
        "this kernel refuses unprivileged namespaces ({}); on Debian and Ubuntu look at the sysctls \
         kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns; or {HOW}",
        String::from_utf8_lossy(&tried.stderr).trim()
    );
    let this = std::env::current_exe()?;
    let error = unshare(&[this.as_os_str()]).args(std::env::args_os().skip(1)).env(OWN_ROOT, "1").exec();
    Err(error).context("starting in a user namespace")
}

/// Whether a line `name:first:count` gives this user enough ids.
fn has_range(ranges: &str, name: &str, uid: u32) -> bool {
    ranges.lines().any(|line| {
        let mut parts = line.trim().split(':');
        let (Some(who), Some(_), Some(count)) = (parts.next(), parts.next(), parts.next()) else {
            return false;
        };
        (who == name || who.parse() == Ok(uid)) && count.parse::<u32>().is_ok_and(|count| count >= 65_536)
    })
}

/// Names of namespaces and iptables' lock lie in /run, which is not ours: have one.
fn own_run_folder() -> Result<()> {
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .context("making a /run of our own")
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (20.0..=2_000.0).contains(&rate) => Ok(rate),
        Ok(_) | Err(_) => Err("write a number from 20 to 2000".to_owned()),
    }
}

/// Set in the process that is root of a user namespace of its own.
const OWN_ROOT: &str = "WEFT_DEMO_OWN_ROOT";
/// What runs, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("iptables-restore", "iptables"),
    ("mariadb-install-db", "mariadb-server"),
    ("mariadbd", "mariadb-server"),
];
const WARM_UP: Duration = Duration::from_secs(3);
/// Between steps, for those who watch.
const TO_READ: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_a_range_of_ids_by_name_or_number_if_it_is_large_enough() {
        let file = "alice:100000:65536\n1001:200000:65536\nbob:300000:1000\n# note\n";
        assert!(has_range(file, "alice", 1));
        assert!(has_range(file, "carol", 1_001));
        assert!(!has_range(file, "bob", 1_002));
        assert!(!has_range(file, "dave", 1_003));
    }
}
