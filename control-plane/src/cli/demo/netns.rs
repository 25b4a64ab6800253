//! Pods without a cluster: network namespaces on a bridge of their own.
//!
//! To the kernel a pod *is* a network namespace with a veth, so capture, original destinations, loopback
//! and source addresses behave here exactly as on a node. `weft demo`, the tests and the benchmark all
//! stand on this file.
//!
//! What holds:
//! - **Nothing touches the host's namespace.** The bridge lives in a namespace too, and veth pairs are made
//!   between namespaces directly: no interface, address, route or rule of the host changes, and several
//!   worlds use the same addresses side by side.
//! - **Nothing is left behind.** Dropping a [`World`] kills what runs in its namespaces and deletes them. If
//!   the process dies without dropping (Ctrl-C, SIGKILL), a small shell that waits on a pipe from it does
//!   the same. Should that be killed too, the names carry their maker's pid and start time, and
//!   [`World::sweep`] removes those whose maker is gone.
//! - **A process in a pod dies with whoever started it**: `PR_SET_PDEATHSIG` (by `setpriv`) and a process
//!   group of its own that [`Process`] kills as a whole.
//!
//! Namespaces are entered by `nsenter --net`, not `ip netns exec`: the latter also remounts `/sys` and hides
//! what is below it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Gid, Pid, Uid, setfsgid, setfsuid};

/// A set of pods on one bridge. Removed as a whole when dropped.
#[derive(Debug)]
pub struct World {
    prefix: String,
    bridge: Pod,
    ipv6: bool,
    state: Mutex<State>,
    /// Holds the pipe whose end tells the reaper that we are gone.
    reaper: Option<Child>,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, Pod>,
    /// The bridge's port of each pod.
    ports: BTreeMap<String, String>,
    /// How many ports were ever made: a number is a name.
    links: u32,
    /// The host part of the next address.
    next: u16,
}

/// One network namespace with an interface `eth0` and addresses of both families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// What it was called by whoever made it.
    pub name: String,
    /// The namespace's name, as `ip netns` knows it.
    pub ns: String,
    /// Its IPv4 address.
    pub ip: Ipv4Addr,
    /// Its IPv6 address (not assigned where the kernel has no IPv6: [`World::has_ipv6`]).
    pub ip6: Ipv6Addr,
}

/// Why worlds cannot be made here, in words for the user; `Ok` where they can.
pub fn usable() -> Result<()> {
    for (program, package) in [("ip", "iproute2"), ("nsenter", "util-linux"), ("setpriv", "util-linux")] {
        let found = Command::new(program)
            .arg(if program == "ip" { "-V" } else { "--version" })
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        ensure!(found, "the program {program} is missing (Debian package {package})");
    }
    // On a thread of its own: the namespace goes away with the thread.
    let tried = std::thread::scope(|scope| scope.spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join());
    match tried {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => bail!("network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN): {error}"),
        Err(_) => bail!("could not try to make a network namespace"),
    }
}

impl World {
    /// An empty world. `tag` names its kind ("demo", "test"); leftovers of the same kind whose maker is
    /// gone are removed first.
    pub fn new(tag: &str) -> Result<Self> {
        Self::with_folder(tag, None)
    }

    /// The same; should this process die without dropping the world, a folder goes with it.
    pub fn with_folder(tag: &str, folder: Option<&Path>) -> Result<Self> {
        usable()?;
        ensure!(
            !tag.is_empty() && tag.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
            "a world's tag is made of lower-case letters and digits, not {tag:?}"
        );
        Self::sweep(tag)?;
        let pid = std::process::id();
        let started = start_time(pid).context("reading our own start time")?;
        let prefix =
            format!("{}{pid}.{started}.{}-", tag_prefix(tag), WORLDS.fetch_add(1, Ordering::Relaxed));
        let ipv6 = Path::new("/proc/net/if_inet6").exists();
        let bridge = Pod {
            name: "bridge".to_owned(),
            ns: format!("{prefix}bridge"),
            ip: address(GATEWAY),
            ip6: address6(GATEWAY),
        };
        // From here on dropping `world` cleans up, whatever fails below.
        let world = Self {
            reaper: Some(reaper(&prefix, folder)?),
            prefix,
            bridge,
            ipv6,
            state: Mutex::new(State { next: GATEWAY + 1, ..State::default() }),
        };
        world.make_bridge()?;
        Ok(world)
    }

    /// A new pod with the next free address.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let host = {
            let mut state = self.state();
            let host = state.next;
            state.next = host.checked_add(1).filter(|next| *next < 0xff00).context("out of addresses")?;
            host
        };
        self.pod_at(name, address(host), address6(host))
    }

    /// A new pod with addresses of the caller's choice: those of a removed pod, or from outside of the pods'
    /// ranges (10.77.0.0/16, fd00:77::/64) to stand for a host outside of the mesh.
    pub fn pod_at(&self, name: &str, ip: Ipv4Addr, ip6: Ipv6Addr) -> Result<Pod> {
        let pod = Pod { name: name.to_owned(), ns: format!("{}{name}", self.prefix), ip, ip6 };
        let valid =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        ensure!(valid && pod.ns.len() < 200, "{name:?} cannot name a namespace");
        let port = {
            let mut state = self.state();
            ensure!(!state.pods.contains_key(name) && name != "bridge", "there is a pod {name} already");
            if let Some(other) = state.pods.values().find(|other| other.ip == ip || other.ip6 == ip6) {
                bail!("pod {} has the address of {name} already", other.name);
            }
            state.links += 1;
            let port = format!("v{}", state.links);
            state.pods.insert(name.to_owned(), pod.clone());
            state.ports.insert(name.to_owned(), port.clone());
            port
        };
        self.make_pod(&pod, &port)
            .with_context(|| format!("making pod {name}"))
            .inspect_err(|_| self.remove(&pod))?;
        Ok(pod)
    }

    /// Kills what runs in the pod and removes it; its addresses are free again.
    pub fn remove(&self, pod: &Pod) {
        let port = {
            let mut state = self.state();
            state.pods.remove(&pod.name);
            state.ports.remove(&pod.name)
        };
        kill_all(&pod.ns);
        // The kernel takes a namespace down when it finds time; until then the bridge would go on sending to
        // the old cable what is meant for the address's next owner. Cables can be removed at once.
        if let Some(port) = port {
            let _ = ip(&["-n", &self.bridge.ns, "link", "del", &port]);
        }
        remove_namespace(&pod.ns);
    }

    /// The pods that exist.
    pub fn pods(&self) -> Vec<Pod> {
        self.state().pods.values().cloned().collect()
    }

    /// The namespace that every packet between pods crosses: its interface `br0` is the place to capture.
    pub fn bridge(&self) -> &Pod {
        &self.bridge
    }

    /// Whether pods have IPv6 addresses.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    /// Cuts the pod's cable, or mends it. The pod's own interface stays up: packets vanish, as when a node dies.
    pub fn connect(&self, pod: &Pod, connected: bool) -> Result<()> {
        let port = self.state().ports.get(&pod.name).cloned();
        let port = port.ok_or_else(|| anyhow!("there is no pod {}", pod.name))?;
        ip(&["-n", &self.bridge.ns, "link", "set", &port, if connected { "up" } else { "down" }]).map(drop)
    }

    /// Removes worlds of this kind whose maker is gone; says which namespaces went.
    pub fn sweep(tag: &str) -> Result<Vec<String>> {
        let mut swept = Vec::new();
        for ns in namespaces(&tag_prefix(tag))? {
            let maker = ns[tag_prefix(tag).len()..].split('.').take(2).collect::<Vec<_>>();
            let alive = match maker.as_slice() {
                [pid, started] => match (pid.parse::<u32>(), started.parse::<u64>()) {
                    (Ok(pid), Ok(started)) => start_time(pid).is_ok_and(|now| now == started),
                    _ => true, // not a name that we gave
                },
                _ => true,
            };
            if !alive {
                remove_namespace(&ns);
                swept.push(ns);
            }
        }
        Ok(swept)
    }

    fn make_bridge(&self) -> Result<()> {
        let ns = &self.bridge.ns;
        ip(&["netns", "add", ns])?;
        self.bridge.settle(true)?;
        let mut commands = vec![
            "link set lo up".to_owned(),
            // Without snooping, neighbour discovery works from the first packet on.
            "link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0".to_owned(),
            format!("link set br0 address {} up", mac(self.bridge.ip)),
            format!("addr add {}/{PREFIX_V4} dev br0", self.bridge.ip),
        ];
        if self.ipv6 {
            commands.push(format!("addr add {}/{PREFIX_V6} dev br0 nodad", self.bridge.ip6));
        }
        batch(Some(ns), &commands)
    }

    fn make_pod(&self, pod: &Pod, port: &str) -> Result<()> {
        let (bridge, mac) = (&self.bridge, mac(pod.ip));
        ip(&["netns", "add", &pod.ns])?;
        pod.settle(false)?;
        batch(
            None,
            &[format!(
                "link add eth0 address {mac} netns {} type veth peer name {port} netns {}",
                pod.ns, bridge.ns
            )],
        )?;
        let (inside, inside6) = (in_range(pod.ip), in_range6(pod.ip6));
        let mut outer = vec![format!("link set {port} master br0 up")];
        let mut inner = vec!["link set lo up".to_owned(), "link set eth0 up".to_owned()];
        if inside {
            inner.push(format!("addr add {}/{PREFIX_V4} dev eth0", pod.ip));
            inner.push(format!("route add default via {}", bridge.ip));
        } else {
            inner.push(format!("addr add {}/32 dev eth0", pod.ip));
            inner.push(format!("route add default via {} dev eth0 onlink", bridge.ip));
            outer.push(format!("route replace {}/32 dev br0", pod.ip));
        }
        if self.ipv6 {
            if inside6 {
                inner.push(format!("addr add {}/{PREFIX_V6} dev eth0 nodad", pod.ip6));
                inner.push(format!("route add default via {}", bridge.ip6));
            } else {
                inner.push(format!("addr add {}/128 dev eth0 nodad", pod.ip6));
                inner.push(format!("route add {}/128 dev eth0", bridge.ip6));
                inner.push(format!("route add default via {} dev eth0", bridge.ip6));
                outer.push(format!("route replace {}/128 dev br0", pod.ip6));
            }
        }
        batch(Some(&bridge.ns), &outer)?;
        batch(Some(&pod.ns), &inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for ns in namespaces(&self.prefix).unwrap_or_default() {
            remove_namespace(&ns);
        }
        if let Some(mut reaper) = self.reaper.take() {
            // Closing the pipe ends it; it finds nothing left to do.
            drop(reaper.stdin.take());
            let _ = reaper.wait();
        }
    }
}

impl Pod {
    /// A command that will run in the pod, as the user who asks.
    ///
    /// The process is killed when the *thread* that spawned it ends (that is what `PR_SET_PDEATHSIG` means):
    /// spawn from a thread that lives as long as the process should, never from a pool's.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.command_under(&[], None, program)
    }

    /// The same as another user and group, without supplementary groups or capabilities.
    pub fn command_as(&self, uid: u32, gid: u32, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.command_under(&[], Some((uid, gid)), program)
    }

    /// The same under another program, which keeps our user: a tracer.
    pub fn command_under(
        &self,
        under: &[String],
        user: Option<(u32, u32)>,
        program: impl AsRef<std::ffi::OsStr>,
    ) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", path(&self.ns).display())).arg("--").args(under);
        command.args(["setpriv", "--pdeathsig=KILL"]);
        if let Some((uid, gid)) = user {
            command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}"));
            command.args(["--clear-groups", "--inh-caps=-all"]);
        }
        command.arg("--").arg(program);
        command
    }

    /// Runs `f` on a thread of its own inside the pod. Sockets that it makes stay in the pod wherever they go.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.enter_with(None, f)
    }

    /// The same, and sockets belong to this user and group, which is what capture rules look at.
    pub fn enter_as<T: Send>(&self, uid: u32, gid: u32, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.enter_with(Some((uid, gid)), f)
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.ip.into(), self.ip6.into()]
    }

    /// The processes in the pod, this one excepted.
    pub fn processes(&self) -> Vec<Pid> {
        processes(&self.ns)
    }

    fn enter_with<T: Send>(&self, owner: Option<(u32, u32)>, f: impl FnOnce() -> T + Send) -> Result<T> {
        let ns =
            File::open(path(&self.ns)).with_context(|| format!("opening the namespace of {}", self.name))?;
        let done = std::thread::scope(|scope| {
            scope
                .spawn(|| -> Result<T> {
                    setns(&ns, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
                    if let Some((uid, gid)) = owner {
                        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                        // These calls answer with what was before and never with an error: ask twice.
                        setfsgid(gid);
                        ensure!(setfsgid(gid) == gid, "group {gid} is not ours to take");
                        setfsuid(uid);
                        ensure!(setfsuid(uid) == uid, "user {uid} is not ours to take");
                    }
                    Ok(f())
                })
                .join()
        });
        match done {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Kernel settings of a fresh namespace. Those that a kernel or container does not let us set are left:
    /// they change figures, not behaviour.
    fn settle(&self, forwards: bool) -> Result<()> {
        self.enter(|| {
            let set = |name: &str, value: &str| {
                let _ = fs::write(format!("/proc/sys/net/{name}"), value);
            };
            // A VM's default of bbr halves bulk TCP over a veth, and no Kubernetes node has it.
            set("ipv4/tcp_congestion_control", "reno");
            set("ipv6/conf/all/disable_ipv6", "0");
            set("ipv6/conf/default/disable_ipv6", "0");
            // No second of waiting for duplicate address detection: addresses are unique by construction.
            set("ipv6/conf/all/accept_dad", "0");
            set("ipv6/conf/default/accept_dad", "0");
            if forwards {
                set("ipv4/ip_forward", "1");
                set("ipv6/conf/all/forwarding", "1");
                // Pods inside and outside share a bridge on purpose; they need not be told of a shortcut.
                set("ipv4/conf/all/send_redirects", "0");
                set("ipv4/conf/default/send_redirects", "0");
            }
        })
    }
}

/// A process with a group of its own; the whole group is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts it. See [`Pod::command`] on the thread to do so from.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let shown = format!("{command:?}");
        let child = command.process_group(0).spawn().with_context(|| format!("starting {shown}"))?;
        Ok(Self { child })
    }

    /// Its process id, which is that of the program itself: what wraps it replaces itself.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to the process alone; a process that has ended is not an error.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.running() {
            kill(self.pid(), signal).with_context(|| format!("sending {signal} to {}", self.pid()))?;
        }
        Ok(())
    }

    /// Asks it to end, waits, and kills the group if that took too long. `None`: it had to be killed.
    pub fn terminate(mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        self.signal(Signal::SIGTERM)?;
        self.wait(patience)
    }

    /// Waits for its end, so long and no longer.
    pub fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn pid(&self) -> Pid {
        pid(self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Until it is waited for, its id (and so its group's) cannot name anything else.
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Waits on a pipe from us; when we are gone, however we went, it removes what we made.
fn reaper(prefix: &str, folder: Option<&Path>) -> Result<Child> {
    Command::new("sh")
        .args(["-c", REAPER, "weft-reaper", prefix])
        .args(folder)
        // Not our group: Ctrl-C on the terminal must not take it with us.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting the shell that cleans up after us")
}

fn kill_all(ns: &str) {
    // Twice, should something be forking while we look.
    for _ in 0..2 {
        for process in processes(ns) {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
}

fn remove_namespace(ns: &str) {
    kill_all(ns);
    let _ = ip(&["netns", "del", ns]);
}

fn processes(ns: &str) -> Vec<Pid> {
    let Ok(wanted) = fs::metadata(path(ns)) else { return Vec::new() };
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&process| process != own)
        .filter(|process| {
            fs::metadata(format!("/proc/{process}/ns/net"))
                .is_ok_and(|ns| ns.ino() == wanted.ino() && ns.dev() == wanted.dev())
        })
        .map(pid)
        .collect()
}

fn namespaces(prefix: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir(NETNS) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("listing network namespaces"),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// When a process started, in clock ticks since boot: with its id, a name that is never used twice.
fn start_time(process: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The second field, the program's name, is in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')').context("reading a process's status")?;
    let started = rest.split_whitespace().nth(19).context("reading a process's start time")?;
    Ok(started.parse()?)
}

fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(args).stdin(Stdio::null()).output().context("running ip")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Several commands of `ip` in one go, inside a namespace if one is named.
fn batch(ns: Option<&str>, commands: &[String]) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(ns) = ns {
        command.args(["-n", ns]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running ip")?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it stops early, its own words below say why.
        let _ = stdin.write_all((commands.join("\n") + "\n").as_bytes());
    }
    let output = child.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip: {}; of:\n{}", error.trim(), commands.join("\n"));
    Ok(())
}

fn tag_prefix(tag: &str) -> String {
    format!("weft-{tag}-")
}

fn path(ns: &str) -> PathBuf {
    Path::new(NETNS).join(ns)
}

fn pid(raw: u32) -> Pid {
    // The kernel's ids fit: its limit is 2²².
    Pid::from_raw(i32::try_from(raw).unwrap_or(i32::MAX))
}

fn address(host: u16) -> Ipv4Addr {
    let [high, low] = host.to_be_bytes();
    Ipv4Addr::new(10, 77, high, low)
}

fn address6(host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, host)
}

fn in_range(ip: Ipv4Addr) -> bool {
    ip.octets()[..2] == [10, 77]
}

fn in_range6(ip: Ipv6Addr) -> bool {
    ip.segments()[..4] == [0xfd00, 0x77, 0, 0]
}

/// One address, one hardware address: a pod that takes over an address is reached at once, whatever its
/// neighbours remember.
fn mac(ip: Ipv4Addr) -> String {
    let [a, b, c, d] = ip.octets();
    format!("02:57:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Tells apart the worlds of one process.
static WORLDS: AtomicU32 = AtomicU32::new(0);

const NETNS: &str = "/run/netns";
const PREFIX_V4: u8 = 16;
const PREFIX_V6: u8 = 64;
/// The host part of the bridge's own address.
const GATEWAY: u16 = 1;

/// `read` returns when the other end of the pipe is closed. Whoever ends well has removed everything before.
const REAPER: &str = r#"trap '' INT TERM HUP
read -r _
for path in /run/netns/"$1"*; do
  [ -e "$path" ] || continue
  ns=${path#/run/netns/}
  for pid in $(ip netns pids "$ns"); do kill -9 "$pid"; done
  ip netns del "$ns"
done
[ -z "$2" ] || rm -rf "$2""#;
