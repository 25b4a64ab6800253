//! Two "pods": network namespaces joined by a veth pair, with the capture rules that a mesh puts there.
//!
//! Why the same few rules for every pair and not each mesh's own: the rules are walked once a
//! connection, and what is compared is proxies. They keep the shape all meshes share: REDIRECT of what
//! the app opens on one side and of what reaches the pod on the other, the proxy's own connections
//! exempt. By its group and not its user: the proxies here read keys and binaries from a folder that
//! may belong to root alone.
//!
//! `reno`, because a machine's default of bbr halves bulk TCP and no Kubernetes node has it.

use std::{
    fs::{self, File},
    io::Write as _,
    net::Ipv4Addr,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The pod of the load generator.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The pod of the backend.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The service's virtual address, which only a client-side proxy can make sense of.
pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Where the backend speaks HTTP/1.1 and where HTTP/2.
pub(crate) const HTTP1_PORT: u16 = 8080;
pub(crate) const HTTP2_PORT: u16 = 8082;
/// Where iperf3 listens, and where the backend speaks HTTP/1.1 that no proxy may look at: bytes to them.
pub(crate) const STREAM_PORT: u16 = 5201;
pub(crate) const OPAQUE_PORT: u16 = 8084;
/// The same, with TLS sessions resumed by pairs that do that.
pub(crate) const RESUMED_PORT: u16 = 8086;
/// What carries bytes only.
pub(crate) const TCP_PORTS: [u16; 3] = [STREAM_PORT, OPAQUE_PORT, RESUMED_PORT];
/// Every port of the service.
pub(crate) const PORTS: [u16; 5] = [HTTP1_PORT, HTTP2_PORT, STREAM_PORT, OPAQUE_PORT, RESUMED_PORT];

/// Where every service's virtual address is.
const SERVICES: &str = "10.96.0.0/16";
/// Of both pods. The last three, because thousands of connections a second use up what a machine remembers of closed
/// ones: whoever ran last would be measured with fewer ports than whoever ran first.
const SETTINGS: [(&str, &str); 4] = [
    ("ipv4/tcp_congestion_control", "reno"),
    ("ipv4/ip_local_port_range", "20000 65535"),
    ("ipv4/tcp_tw_reuse", "1"),
    ("netfilter/nf_conntrack_tcp_timeout_time_wait", "1"),
];
/// Connections of this group are not captured.
const PROXY_GID: u32 = weft_core::ports::PROXY_UID;
const PREFIX: &str = "weft-bench-";

/// Where the capture rules send connections to.
#[derive(Clone, Copy)]
pub(crate) struct Capture {
    pub(crate) outbound: u16,
    pub(crate) inbound: u16,
    /// For proxies that do not ask for the original destination: the n-th of `PORTS` goes to the n-th from there.
    pub(crate) by_port: bool,
}

impl Capture {
    fn redirects(&self, chain: &str, to: u16) -> String {
        if !self.by_port {
            return format!("-A {chain} -p tcp -j REDIRECT --to-ports {to}\n");
        }
        let one = |(port, to): (u16, u16)| {
            format!("-A {chain} -p tcp --dport {port} -j REDIRECT --to-ports {to}\n")
        };
        PORTS.into_iter().zip(to..).map(one).collect()
    }
}

/// The two namespaces; gone when dropped, with everything that lives in them.
pub(crate) struct Network {
    pub(crate) client: Namespace,
    pub(crate) server: Namespace,
}

impl Network {
    pub(crate) fn new() -> Result<Network> {
        remove_leftovers();
        let id = std::process::id();
        let client = Namespace::new(format!("{PREFIX}{id}-client"))?;
        let server = Namespace::new(format!("{PREFIX}{id}-server"))?;
        let network = Network { client, server };
        let (c, s) = (&network.client, &network.server);
        ip(&format!("link add eth0 netns {} type veth peer name eth0 netns {}", c.name, s.name))?;
        for (namespace, address) in [(c, CLIENT), (s, SERVER)] {
            let name = &namespace.name;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set eth0 up"))?;
            ip(&format!("-n {name} address add {address}/24 dev eth0"))?;
            for (setting, value) in SETTINGS {
                let set = format!("echo {value} > /proc/sys/net/{setting}");
                check(namespace.command("sh", Group::App).args(["-c", &set]))?;
            }
        }
        ip(&format!("-n {} route add {SERVICES} via {SERVER}", c.name))?;
        Ok(network)
    }

    /// Puts the rules of a pair into both namespaces, in place of those before; none for `direct`.
    pub(crate) fn capture(&self, capture: Option<Capture>) -> Result<()> {
        let (mut outbound, mut inbound) = (String::from("*nat\n"), String::from("*nat\n"));
        if let Some(to) = capture {
            outbound += &format!(
                "-A OUTPUT -m owner --gid-owner {PROXY_GID} -j RETURN\n\
                 -A OUTPUT -o lo -j RETURN\n{}",
                to.redirects("OUTPUT", to.outbound)
            );
            inbound += &to.redirects("PREROUTING", to.inbound);
        }
        self.client.restore(&(outbound + "COMMIT\n"))?;
        self.server.restore(&(inbound + "COMMIT\n"))
    }
}

/// Who a program is to the capture rules.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    App,
    Proxy,
}

/// One network namespace, deleted when dropped.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    pub(crate) fn new(name: String) -> Result<Namespace> {
        ip(&format!("netns add {name}"))?;
        Ok(Namespace { name })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A program inside: no terminal, in a process group of its own so that Ctrl-C reaches us alone,
    /// and killed by the kernel should we die without a chance to do it. Same process id throughout.
    pub(crate) fn command(&self, program: impl AsRef<Path>, group: Group) -> Command {
        let gid = if group == Group::Proxy { PROXY_GID } else { 0 };
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .args([
                "--",
                "setpriv",
                "--pdeathsig",
                "KILL",
                "--clear-groups",
                "--regid",
                &gid.to_string(),
                "--",
            ])
            .arg(program.as_ref())
            .stdin(Stdio::null())
            .process_group(0);
        command
    }

    fn restore(&self, rules: &str) -> Result<()> {
        let mut command = self.command("iptables-restore", Group::App);
        let mut child = command.arg("--wait").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("iptables-restore has no input")?.write_all(rules.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("iptables-restore: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(e) = ip(&format!("netns delete {}", self.name)) {
            eprintln!("weft-bench: {e:#}");
        }
    }
}

/// A program that runs until this is dropped.
pub(crate) struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it with its output in `<logs>/<name>.log`.
    pub(crate) fn start(mut command: Command, name: &str, logs: &Path) -> Result<Process> {
        let log = File::create(logs.join(format!("{name}.log")))?;
        let child = command
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Process { child, name: name.to_owned() })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Ends it without a word; it is gone when this returns.
    pub(crate) fn kill(&mut self) {
        // An error means that it has gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// An error if it has ended by itself.
    pub(crate) fn check(&mut self, logs: &Path) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                let log = fs::read_to_string(logs.join(format!("{}.log", self.name))).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(10)..].join("\n");
                bail!("{} ended ({status}):\n{tail}", self.name)
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Deletes the namespaces of runs that were killed outright.
fn remove_leftovers() {
    let Ok(names) = fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            drop(Namespace { name });
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    check(Command::new("ip").args(arguments.split(' ')).stdin(Stdio::null()).process_group(0))
}

/// Runs a short command to its end; its error output is the error.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
