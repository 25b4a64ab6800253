//! Putting the rules in place: read what stands, write one transaction, look whether it took.
//!
//! **Which iptables?** Two kernels' worth of tables exist side by side, nf_tables and the older
//! ip_tables, and a rule in one does not show in the other. Whoever set up the pod's network (a CNI
//! plugin, an older Weft) chose one; two NAT tables that both answer are a riddle for whoever debugs them.
//! So: the one that already holds rules, else nf_tables where it works, else ip_tables. Rules of ours in
//! the one not chosen are removed, after the new ones stand.
//!
//! **Why read first?** A jump can neither be declared (chains can) nor deleted unless it is there, so the
//! text depends on what stands. Between reading and writing somebody else may write: the transaction then
//! fails or the check afterwards does, and it all starts over, a few times.
//!
//! **IPv6.** A pod without IPv6 needs no IPv6 rules, and is told so. A pod that *has* a global IPv6 address
//! but cannot be given rules is an error: half a capture is a way around the mesh. One that has link-local addresses
//! only, as every pod has where the kernel knows IPv6 at all, loses them: a neighbour on the same bridge would reach an
//! app that listens on `[::]` by them, past the sidecar. Where they cannot be taken away either, that is an error, too;
//! whoever lives with it says so by `--families ipv4`.

use std::fmt;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use serde::Serialize;

use crate::config::{Config, Families, Family};
use crate::rules::{Present, Ruleset};

/// One of the two implementations of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// nf_tables, as `iptables-nft` writes them.
    Nft,
    /// ip_tables, as `iptables-legacy` writes them.
    Legacy,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        })
    }
}

/// What became of one family.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which family.
    pub family: Family,
    /// The tables used, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// What was done.
    pub action: Action,
    /// Why, where that is not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What was done to the tables of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The rules stand now.
    Installed,
    /// The rules stood already.
    Unchanged,
    /// Our rules were removed.
    Removed,
    /// There was nothing of ours.
    NothingToRemove,
    /// The family is not there, so nothing needs capturing.
    Unavailable,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = match self.action {
            Action::Installed => "rules installed",
            Action::Unchanged => "rules already installed",
            Action::Removed => "rules removed",
            Action::NothingToRemove => "nothing to remove",
            Action::Unavailable => "not available, nothing to capture",
        };
        write!(f, "{}: {done}", self.family)?;
        if let Some(backend) = self.backend {
            write!(f, " ({backend})")?;
        }
        match &self.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

/// Why rules could not be applied or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No iptables of this family (or of the backend asked for) is installed.
    #[error("{family}: no {wanted} found: install the Debian package iptables, or its like")]
    NotInstalled {
        /// The family.
        family: Family,
        /// The programs looked for.
        wanted: String,
    },
    /// A program could not be run.
    #[error("{program}: {error}")]
    Run {
        /// The program.
        program: String,
        /// What the system said.
        error: io::Error,
    },
    /// A program refused.
    #[error("{program} {status}: {message}")]
    Refused {
        /// The program.
        program: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it printed.
        message: String,
    },
    /// IPv6 can neither be captured nor switched off.
    #[error(
        "ipv6: it cannot be captured ({uncaptured}), nor switched off ({reason}): neighbours would reach an app past its \
         sidecar by a link-local address. Load ip6table_nat or nft_chain_nat on the node, switch IPv6 off there \
         (net.ipv6.conf.default.disable_ipv6=1), or say --families ipv4 (WEFT_FAMILIES) to live with it"
    )]
    SideDoor {
        /// Why there are no rules.
        uncaptured: String,
        /// Why the addresses are still there.
        reason: String,
    },
    /// Somebody else kept writing the same table.
    #[error("{family}: the rules did not stay in place: another program writes the nat table ({backend})")]
    Unstable {
        /// The family.
        family: Family,
        /// The backend.
        backend: Backend,
    },
}

/// Makes the rules of `config` stand, whatever stood before; `only` names the backend to use.
pub fn install(config: &Config, only: Option<Backend>) -> Result<Vec<Report>, Error> {
    each(config.families(), |family| {
        if let Some(reason) = absent(family) {
            return Ok(unavailable(family, reason));
        }
        match install_family(&Ruleset::new(config, family), family, only) {
            Err(error) if family == Family::Ipv6 && !has_global_ipv6() => without_ipv6(&error),
            result => result,
        }
    })
}

/// Leaves a pod that nobody calls by IPv6 without it, since it cannot be captured: only loopback keeps it.
fn without_ipv6(uncaptured: &Error) -> Result<Report, Error> {
    let uncaptured = one_line(&uncaptured.to_string());
    let open = |reason: String| Error::SideDoor { uncaptured: uncaptured.clone(), reason };
    let interfaces = std::fs::read_dir(IPV6_CONF).map_err(|error| open(format!("{IPV6_CONF}: {error}")))?;
    for interface in interfaces.flatten() {
        // `default` is for interfaces that come later; `all` would take loopback's, too.
        if ["all", "lo"].iter().any(|name| interface.file_name() == *name) {
            continue;
        }
        let off = interface.path().join("disable_ipv6");
        if std::fs::read_to_string(&off).is_ok_and(|said| said.trim() == "1") {
            continue;
        }
        std::fs::write(&off, "1").map_err(|error| open(format!("{}: {error}", off.display())))?;
    }
    // address, index, prefix length, scope, flags, name
    let left = std::fs::read_to_string(IF_INET6).unwrap_or_default();
    if let Some(left) = left.lines().find(|line| !line.ends_with(" lo")) {
        return Err(open(format!("{} is still there", one_line(left))));
    }
    let reason = format!("the pod has no global IPv6 address, {uncaptured}: switched off but for loopback");
    Ok(unavailable(Family::Ipv6, reason))
}

/// Removes what is ours and nothing else, from every backend (or the one named).
pub fn cleanup(families: Families, only: Option<Backend>) -> Result<Vec<Report>, Error> {
    each(families, |family| {
        if let Some(reason) = absent(family) {
            return Ok(unavailable(family, reason));
        }
        let mut report = Report { family, backend: None, action: Action::NothingToRemove, reason: None };
        for tool in Tool::find(family, only) {
            if tool.remove()? {
                report.action = Action::Removed;
                report.backend = Some(tool.backend);
            }
        }
        Ok(report)
    })
}

/// What [`cleanup`] would give to `iptables-restore`, without doing so.
pub fn planned_cleanup(
    families: Families,
    only: Option<Backend>,
) -> Result<Vec<(Family, Backend, String)>, Error> {
    let mut plans = Vec::new();
    for &family in families.list() {
        if absent(family).is_some() {
            continue;
        }
        for tool in Tool::find(family, only) {
            if let Some(text) = tool.read()?.removal() {
                plans.push((family, tool.backend, text));
            }
        }
    }
    Ok(plans)
}

fn each(families: Families, f: impl Fn(Family) -> Result<Report, Error>) -> Result<Vec<Report>, Error> {
    families.list().iter().map(|&family| f(family)).collect()
}

fn install_family(rules: &Ruleset, family: Family, only: Option<Backend>) -> Result<Report, Error> {
    let tools = Tool::find(family, None);
    let mut failed = None;
    for tool in in_order(&tools).into_iter().filter(|tool| only.is_none_or(|only| only == tool.backend)) {
        match tool.install(rules) {
            Ok(action) => {
                for other in tools.iter().filter(|other| other.backend != tool.backend) {
                    // What cannot be read holds nothing that could have been written from here.
                    if other.read().is_ok_and(|present| present.has_ours()) {
                        other.remove()?;
                    }
                }
                return Ok(Report { family, backend: Some(tool.backend), action, reason: None });
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    Err(failed.unwrap_or_else(|| Error::NotInstalled { family, wanted: Tool::name(family, only, "restore") }))
}

/// The backend that holds rules comes first, else nf_tables.
fn in_order(tools: &[Tool]) -> Vec<&Tool> {
    let mut order: Vec<&Tool> = tools.iter().collect();
    order.sort_by_key(|tool| match tool.read() {
        Ok(present) if present.has_rules() => 0,
        Ok(_) => 1,
        Err(_) => 2,
    });
    order
}

/// The programs of one family and backend.
struct Tool {
    family: Family,
    backend: Backend,
    restore: String,
    save: String,
}

impl Tool {
    /// What is installed, nf_tables first.
    fn find(family: Family, only: Option<Backend>) -> Vec<Self> {
        let wanted = |backend| only.is_none_or(|only| only == backend);
        let mut tools: Vec<Self> = [Backend::Nft, Backend::Legacy]
            .into_iter()
            .filter(|&backend| wanted(backend))
            .filter_map(|backend| {
                let restore = Self::name(family, Some(backend), "restore");
                version(&restore)?;
                Some(Self { family, backend, restore, save: Self::name(family, Some(backend), "save") })
            })
            .collect();
        if tools.is_empty() {
            // A system with one iptables only may not call it by its full name.
            let restore = Self::name(family, None, "restore");
            let named = version(&restore)
                .map(|version| if version.contains("nf_tables") { Backend::Nft } else { Backend::Legacy });
            if let Some(backend) = named.filter(|&backend| wanted(backend)) {
                tools.push(Self { family, backend, restore, save: Self::name(family, None, "save") });
            }
        }
        tools
    }

    fn name(family: Family, backend: Option<Backend>, verb: &str) -> String {
        let base = match family {
            Family::Ipv4 => "iptables",
            Family::Ipv6 => "ip6tables",
        };
        match backend {
            Some(backend) => format!("{base}-{backend}-{verb}"),
            None => format!("{base}-{verb}"),
        }
    }

    fn read(&self) -> Result<Present, Error> {
        if self.backend == Backend::Legacy && !self.legacy_nat_exists() {
            return Ok(Present::default());
        }
        let output = run(&self.save, &["-t", "nat"], None)?;
        Ok(Present::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Reading a legacy table creates it, in every later reader's way: look first whether it is there.
    fn legacy_nat_exists(&self) -> bool {
        let names = match self.family {
            Family::Ipv4 => "/proc/thread-self/net/ip_tables_names",
            Family::Ipv6 => "/proc/thread-self/net/ip6_tables_names",
        };
        match std::fs::read_to_string(names) {
            Ok(names) => names.lines().any(|name| name == "nat"),
            // Not there: the module is not loaded. Not readable: let the program itself say why.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    fn write(&self, text: &str) -> Result<(), Error> {
        // Without --noflush every rule of everybody else would go. The wait is for ip_tables' lock.
        run(&self.restore, &["--noflush", "--wait=10"], Some(text)).map(drop)
    }

    fn install(&self, rules: &Ruleset) -> Result<Action, Error> {
        let mut action = Action::Unchanged;
        for _ in 0..ATTEMPTS {
            let present = self.read()?;
            let written = action == Action::Installed;
            if rules.is_installed(&present) || (written && rules.looks_installed(&present)) {
                return Ok(action);
            }
            match self.write(&rules.install(&present)) {
                Ok(()) => action = Action::Installed,
                // Refused because the table changed under us: once more. Refused as it is: say so.
                Err(error) if self.read()? == present => return Err(error),
                Err(_) => {}
            }
        }
        Err(Error::Unstable { family: self.family, backend: self.backend })
    }

    fn remove(&self) -> Result<bool, Error> {
        let mut removed = false;
        for _ in 0..ATTEMPTS {
            let present = self.read()?;
            let Some(text) = present.removal() else { return Ok(removed) };
            match self.write(&text) {
                Ok(()) => removed = true,
                Err(error) if self.read()? == present => return Err(error),
                Err(_) => {}
            }
        }
        Err(Error::Unstable { family: self.family, backend: self.backend })
    }
}

/// What `--version` prints; `None` where there is no such program.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn run(program: &str, args: &[&str], input: Option<&str>) -> Result<Output, Error> {
    let failed = |error| Error::Run { program: program.to_owned(), error };
    let mut child = Command::new(program)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        match stdin.write_all(text.as_bytes()) {
            // It exited before it read everything; its own words, below, say why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => {}
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(output);
    }
    Err(Error::Refused {
        program: program.to_owned(),
        status: output.status,
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Why a family cannot carry a connection in this namespace, where that is so.
fn absent(family: Family) -> Option<String> {
    if family == Family::Ipv4 {
        return None;
    }
    let Ok(addresses) = std::fs::read_to_string(IF_INET6) else {
        return Some("the kernel has no IPv6".to_owned());
    };
    addresses.trim().is_empty().then(|| "IPv6 is disabled in this network namespace".to_owned())
}

fn has_global_ipv6() -> bool {
    // address, index, prefix length, scope (00: global), flags, name
    std::fs::read_to_string(IF_INET6)
        .is_ok_and(|addresses| addresses.lines().any(|line| line.split_whitespace().nth(3) == Some("00")))
}

fn unavailable(family: Family, reason: String) -> Report {
    Report { family, backend: None, action: Action::Unavailable, reason: Some(reason) }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `self` would be the process's first thread, which may be in another network namespace.
const IF_INET6: &str = "/proc/thread-self/net/if_inet6";

/// Settings by interface, of whoever looks.
const IPV6_CONF: &str = "/proc/sys/net/ipv6/conf";

/// Somebody else writing the same table at the same time is rare; doing so five times in a row is a fault.
const ATTEMPTS: u32 = 5;
