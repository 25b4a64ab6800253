//! What the sidecar gives up before it speaks to anybody: it reads hostile bytes all day, in every pod.
//!
//! Why at the very start of [`crate::run`], before there is a second thread: capabilities, `no_new_privs`, seccomp and
//! landlock are properties of a thread that new threads inherit. The pod's `securityContext` says much of this again;
//! the sidecar does not rely on it, since whoever installs it on a VM writes none.
//!
//! Why a list of what is allowed, by number, and a kill for the rest: a system call that this program never makes is
//! made by somebody else. What libraries try and can do without (`clone3`, whose flags no filter can see; executable
//! memory; families of sockets that are not ours) is refused with an error instead, stacked before the list.
//!
//! Why failing is fatal: a hardening that is silently absent is worse than none, because somebody counts on it. Only
//! landlock may be missing, since kernels without it are still in service, and the log says so.

use std::{collections::BTreeMap, path::Path, str::FromStr};

use landlock::{
    ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus,
};
use libc::c_long;
use nix::sys::{
    prctl,
    resource::{Resource, setrlimit},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// `WEFT_HARDEN`: whether, and what happens to a system call that is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harden {
    /// The process is killed (SIGSYS).
    On,
    /// The call fails with EPERM: to find out which one it was without losing the pod.
    Eperm,
    /// Nothing is given up.
    Off,
}

impl FromStr for Harden {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self::On),
            "eperm" => Ok(Self::Eperm),
            "off" => Ok(Self::Off),
            other => Err(format!("{other:?} is none of on, eperm and off")),
        }
    }
}

/// What could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot harden the process: {what}: {why} (WEFT_HARDEN=off runs without)")]
pub struct HardenError {
    what: &'static str,
    why: String,
}

/// Gives up what a sidecar does not need, for this thread and those that it starts. Says what else there is to know,
/// for a log that does not exist yet.
///
/// # Errors
/// Something could not be given up.
pub fn apply(harden: Harden, admin_socket: &Path) -> Result<Vec<String>, HardenError> {
    let mismatch = match harden {
        Harden::Off => {
            return Ok(vec![
                "WEFT_HARDEN=off: capabilities, dumps, files and system calls are as they were \
                            at start"
                    .to_owned(),
            ]);
        }
        Harden::On => SeccompAction::KillProcess,
        Harden::Eperm => SeccompAction::Errno(EPERM),
    };
    let mut notes = Vec::new();
    // Keys live in memory: no dump of it, and no debugger of the same user.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("RLIMIT_CORE"))?;
    prctl::set_dumpable(false).map_err(failed("PR_SET_DUMPABLE"))?;
    prctl::set_no_new_privs().map_err(failed("no_new_privs"))?;
    drop_capabilities()?;
    if let Some(note) = restrict_files(admin_socket)? {
        notes.push(note);
    }
    for program in programs(mismatch)? {
        apply_filter(&program).map_err(failed("seccomp"))?;
    }
    Ok(notes)
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> HardenError {
    move |error| HardenError { what, why: error.to_string() }
}

/// A sidecar needs none: its ports are high, capture is the init container's work.
fn drop_capabilities() -> Result<(), HardenError> {
    use caps::{CapSet, Capability};
    let may =
        caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(failed("capabilities"))?;
    if may {
        caps::clear(None, CapSet::Bounding).map_err(failed("the bounding set"))?;
    }
    // Without CAP_SETPCAP the bounding set stays; `no_new_privs` makes it mean nothing.
    caps::clear(None, CapSet::Ambient).map_err(failed("ambient capabilities"))?;
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(failed("capabilities"))?;
    }
    Ok(())
}

/// Nothing is executed, and nothing is written but the admin socket in its folder. Reading stays: anchors, token and
/// the resolver's files are wherever the pod mounts them.
fn restrict_files(admin_socket: &Path) -> Result<Option<String>, HardenError> {
    let access = AccessFs::from_write(FILES) | AccessFs::Execute;
    let mut rules =
        Ruleset::default().handle_access(access).and_then(Ruleset::create).map_err(failed("landlock"))?;
    if let Some(folder) = admin_socket.parent() {
        // Whatever is wrong with the folder, opening the socket in it says so better.
        let folder = std::fs::create_dir_all(folder).ok().and_then(|()| PathFd::new(folder).ok());
        if let Some(folder) = folder {
            let own = AccessFs::MakeSock | AccessFs::RemoveFile;
            rules = rules.add_rule(PathBeneath::new(folder, own)).map_err(failed("landlock"))?;
        }
    }
    let status = rules.restrict_self().map_err(failed("landlock"))?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => None,
        RulesetStatus::PartiallyEnforced => Some("this kernel's landlock restricts files in part".to_owned()),
        RulesetStatus::NotEnforced => {
            Some("this kernel has no landlock: files are left to their modes".to_owned())
        }
    })
}

/// The filters, in the order to apply them; of their verdicts the strictest counts.
fn programs(mismatch: SeccompAction) -> Result<[BpfProgram; 3], HardenError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed("seccomp"))?;
    let program = |rules: BTreeMap<c_long, Vec<SeccompRule>>, other: SeccompAction, listed: SeccompAction| {
        let filter = SeccompFilter::new(rules, other, listed, arch).map_err(failed("seccomp"))?;
        BpfProgram::try_from(filter).map_err(failed("seccomp"))
    };
    let allowed = ALLOWED.iter().chain(ALLOWED_OF_ARCH).map(|&call| (call, Vec::new())).collect();
    Ok([
        program(refused()?, SeccompAction::Allow, SeccompAction::Errno(EPERM))?,
        // So glibc falls back to `clone`, whose flags can be looked at.
        program(
            BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
            SeccompAction::Allow,
            SeccompAction::Errno(ENOSYS),
        )?,
        program(allowed, mismatch, SeccompAction::Allow)?,
    ])
}

/// Calls of the list with arguments that are not ours.
fn refused() -> Result<BTreeMap<c_long, Vec<SeccompRule>>, HardenError> {
    use SeccompCmpOp::{Eq, MaskedEq, Ne};
    let when = |conditions: &[(u8, SeccompCmpOp, u64)]| {
        let conditions = conditions
            .iter()
            .map(|(argument, operator, value)| {
                SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
            })
            .collect::<Result<Vec<_>, _>>();
        conditions.and_then(SeccompRule::new).map_err(failed("seccomp"))
    };
    let none_of = |argument: u8, values: &[u64]| {
        when(&values.iter().map(|&value| (argument, Ne, value)).collect::<Vec<_>>())
    };
    let exec = when(&[(2, MaskedEq(PROT_EXEC), PROT_EXEC)])?;
    Ok(BTreeMap::from([
        (libc::SYS_mmap, vec![exec.clone()]),
        (libc::SYS_mprotect, vec![exec]),
        (libc::SYS_clone, vec![when(&[(0, MaskedEq(CLONE_THREAD), 0)])?]),
        (libc::SYS_socket, vec![none_of(0, FAMILIES)?]),
        (libc::SYS_prctl, vec![none_of(0, PRCTLS)?]),
        (libc::SYS_ioctl, vec![none_of(1, IOCTLS)?]),
        // Another process' limits are not ours.
        (libc::SYS_prlimit64, vec![when(&[(0, Ne, 0)])?]),
        (libc::SYS_setsockopt, vec![when(&[(1, Eq, SOL_SOCKET), (2, Eq, SO_ATTACH_FILTER)])?]),
    ]))
}

/// Landlock as of Linux 6.10; older kernels enforce what they know.
const FILES: ABI = ABI::V5;

const EPERM: u32 = libc::EPERM.unsigned_abs();
const ENOSYS: u32 = libc::ENOSYS.unsigned_abs();
const PROT_EXEC: u64 = 4;
const CLONE_THREAD: u64 = 0x0001_0000;
const SOL_SOCKET: u64 = 1;
const SO_ATTACH_FILTER: u64 = 26;
/// AF_UNIX (the admin socket, signals), AF_INET, AF_INET6, AF_NETLINK (which addresses the resolver may answer with).
const FAMILIES: &[u64] = &[1, 2, 10, 16];
/// PR_SET_NAME and PR_GET_NAME of threads, PR_SET_VMA (names of allocations), PR_GET_DUMPABLE, PR_GET_THP_DISABLE;
/// PR_SET_NO_NEW_PRIVS, which is asked for again before the next filter.
const PRCTLS: &[u64] = &[15, 16, 0x5356_4d41, 3, 42, 38];
/// FIONBIO, FIONREAD, FIOCLEX; TCGETS, TCGETS2 (is this a terminal?).
const IOCTLS: &[u64] = &[0x5421, 0x541b, 0x5451, 0x5401, 0x802c_542a];

/// What the sidecar, tokio, mimalloc, aws-lc and both C libraries call once it runs: seen under strace in the whole
/// mesh suite, then completed from their sources by what happens rarely (a panic, DNS, memory that runs out).
const ALLOWED: &[c_long] = &[
    // Connections.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg, // glibc's resolver: A and AAAA at once
    libc::SYS_recvmmsg,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    // Readiness.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    // Files: trust anchors, token, the resolver's; /proc for metrics; the admin socket.
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_umask,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_getcpu,
    // Threads; what makes a process instead is refused above.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_prctl,
    // Signals; `tgkill` is how abort() ends its own process, and other users' processes are out of reach.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_tgkill,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // What am I, and how much may I.
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
];

/// The same calls under the names that x86-64 had before they took flags; a C library uses either.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OF_ARCH: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_select,
    libc::SYS_setrlimit,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OF_ARCH: &[c_long] = &[];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_starts_a_program_or_looks_into_another_is_allowed() {
        let all: Vec<c_long> = ALLOWED.iter().chain(ALLOWED_OF_ARCH).copied().collect();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_memfd_create,
            libc::SYS_setuid,
            libc::SYS_capset,
            libc::SYS_kill,
            libc::SYS_init_module,
            libc::SYS_perf_event_open,
        ] {
            assert!(!all.contains(&call), "{call}");
        }
        let mut once = all.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), all.len(), "each once");
    }

    #[test]
    fn filters_compile() {
        for program in programs(SeccompAction::KillProcess).unwrap() {
            assert!((2..4_096).contains(&program.len()), "{}", program.len());
        }
    }

    #[test]
    fn settings_are_words() {
        assert_eq!("on".parse(), Ok(Harden::On));
        assert_eq!("eperm".parse(), Ok(Harden::Eperm));
        assert_eq!("off".parse(), Ok(Harden::Off));
        assert!("no".parse::<Harden>().is_err());
    }
}
