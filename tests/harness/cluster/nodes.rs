//! A node is a network namespace and a mount namespace.
//!
//! The network namespace makes it a machine on a wire: what crosses between two nodes is seen on one veth. The
//! mount namespace gives it the file system that every Kubernetes installer expects (`/var/lib/kubelet`,
//! `/etc/cni/net.d`, `/opt/cni/bin`, `/run/containerd`), each from a folder of the node's own, so that two
//! nodes share nothing and the machine's own folders are never written. Both are private, so what kubelet and
//! containerd mount is gone, with every pod's network, once their last process is.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::processes::{self, run};

/// The folders that a node has for itself, below its own.
const OWN: [(&str, &str); 8] = [
    ("kubelet", "/var/lib/kubelet"),
    ("containerd", "/var/lib/containerd"),
    ("run-containerd", "/run/containerd"),
    ("run-netns", "/run/netns"),
    ("cni-state", "/var/lib/cni"),
    ("cni-conf", "/etc/cni/net.d"),
    ("cni-bin", "/opt/cni/bin"),
    ("log-pods", "/var/log/pods"),
];
const CNI_PLUGINS: [&str; 6] = ["ptp", "host-local", "portmap", "loopback", "bridge", "firewall"];
/// Debian's.
const CNI_BIN: &str = "/usr/lib/cni";
/// A node's namespace and cgroup: this and its number.
pub(super) const PREFIX: &str = "weft-node-";

/// One node; the first one also runs etcd and the control plane.
#[derive(Clone, Debug)]
pub struct Node {
    /// From 1.
    pub number: u8,
    folder: PathBuf,
}

impl Node {
    pub(super) fn new(state: &Path, number: u8) -> Self {
        Self { number, folder: state.join(format!("node-{number}")) }
    }

    /// As Kubernetes calls it.
    pub fn name(&self) -> String {
        format!("node-{}", self.number)
    }

    /// Its network namespace, as `ip netns` calls it.
    pub fn namespace(&self) -> String {
        format!("{PREFIX}{}", self.number)
    }

    /// Each node is in a zone of its own.
    pub fn zone(&self) -> String {
        format!("zone-{}", self.number)
    }

    /// Its address.
    pub fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 250, 0, self.number)
    }

    /// Its other address.
    pub fn ip6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x250, 0, 0, 0, 0, u16::from(self.number))
    }

    /// The interface that leads to the other nodes: where to capture.
    pub fn wire(&self) -> &'static str {
        "wire"
    }

    /// Where its own files lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn addresses(&self, dual: bool) -> Vec<IpAddr> {
        let mut addresses = vec![self.ip().into()];
        if dual {
            addresses.push(self.ip6().into());
        }
        addresses
    }

    fn pods(&self) -> String {
        format!("10.244.{}.0/24", self.number - 1)
    }

    fn pods6(&self) -> String {
        format!("fd00:10:244:{}::/64", self.number - 1)
    }

    /// A program on this node's network, with the machine's files: kubectl, helm, a capture.
    pub fn on_network(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace())).arg("--").arg(program);
        command
    }

    /// A program on this node, with the node's files.
    pub fn inside(&self, program: &Path) -> Result<Command> {
        let holder = processes::pid_of(&self.folder, "holder")
            .with_context(|| format!("{} is not up: nothing holds its mount namespace", self.name()))?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace()))
            .arg(format!("--mount=/proc/{holder}/ns/mnt"))
            .arg("--")
            .arg(program);
        Ok(command)
    }

    /// Makes the namespaces, the addresses and the folders; `peers` are the nodes that were made before.
    pub(super) fn make(&self, dual: bool, peers: &[Self]) -> Result<()> {
        for (folder, _) in OWN {
            fs::create_dir_all(self.folder.join(folder))?;
        }
        let bin = self.folder.join("cni-bin");
        for plugin in CNI_PLUGINS {
            fs::copy(Path::new(CNI_BIN).join(plugin), bin.join(plugin)).with_context(|| {
                format!("{CNI_BIN}/{plugin} (Debian package containernetworking-plugins)")
            })?;
        }
        fs::write(self.folder.join("cni-conf/10-bed.conflist"), self.cni(dual))?;
        // Answered by the cluster's own names only: the machine's resolver is not reachable from here.
        fs::write(self.folder.join("resolv.conf"), "options timeout:1 attempts:1\n")?;
        self.make_network(dual, peers)?;
        self.make_cgroups()?;
        self.hold()
    }

    fn make_network(&self, dual: bool, peers: &[Self]) -> Result<()> {
        let ns = self.namespace();
        run(Command::new("ip").args(["netns", "add", &ns]))?;
        let mut lines = vec!["link set lo up".to_owned()];
        if peers.is_empty() {
            // A bridge, so that the address does not hang on there being a second node.
            lines.push("link add wire type bridge".to_owned());
        } else {
            let first = &peers[0];
            let port = format!("to-{}", self.name());
            run(Command::new("ip")
                .args(["-n", &first.namespace(), "link", "add", &port, "type", "veth"])
                .args(["peer", "name", "wire", "netns", &ns]))?;
            run(Command::new("ip").args([
                "-n",
                &first.namespace(),
                "link",
                "set",
                &port,
                "master",
                "wire",
                "up",
            ]))?;
        }
        lines.push(format!("addr add {}/24 dev wire", self.ip()));
        lines.push("link set wire up".to_owned());
        // Nothing is beyond it; but etcd, kube-proxy and many an app ask for a default route.
        lines.push("route add default via 10.250.0.254 dev wire".to_owned());
        if dual {
            lines.push(format!("addr add {}/64 dev wire nodad", self.ip6()));
            lines.push("route add default via fd00:10:250::fe dev wire".to_owned());
        }
        let mut sysctls = vec!["ipv4/ip_forward=1", "ipv4/conf/all/route_localnet=1"];
        if dual {
            // A pod's address is usable at once: nobody else has it.
            sysctls.extend([
                "ipv6/conf/all/forwarding=1",
                "ipv6/conf/all/accept_dad=0",
                "ipv6/conf/default/accept_dad=0",
            ]);
        }
        let mut script = String::new();
        for sysctl in sysctls {
            let (name, value) = sysctl.split_once('=').unwrap_or_default();
            script.push_str(&format!("echo {value} > /proc/sys/net/{name}\n"));
        }
        for line in lines {
            let family = if line.contains("fd00:") { "-6 " } else { "" };
            script.push_str(&format!("ip {family}{line}\n"));
        }
        run(self.on_network(Path::new("sh")).args(["-e", "-c", &script]))?;
        for peer in peers {
            for (here, there) in [(self, peer), (peer, self)] {
                let route = |family: &str, to: String, via: IpAddr| {
                    run(Command::new("ip")
                        .args([family, "-n", &here.namespace(), "route", "add", &to])
                        .args(["via", &via.to_string()]))
                };
                route("-4", there.pods(), there.ip().into())?;
                if dual {
                    route("-6", there.pods6(), there.ip6().into())?;
                }
            }
        }
        Ok(())
    }

    fn cni(&self, dual: bool) -> String {
        let mut ranges = vec![serde_json::json!([{"subnet": self.pods()}])];
        let mut routes = vec![serde_json::json!({"dst": "0.0.0.0/0"})];
        if dual {
            ranges.push(serde_json::json!([{"subnet": self.pods6()}]));
            routes.push(serde_json::json!({"dst": "::/0"}));
        }
        serde_json::json!({
            "cniVersion": "0.4.0",
            "name": "bed",
            "plugins": [
                {
                    "type": "ptp",
                    "ipMasq": false,
                    "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        })
        .to_string()
    }

    /// A cgroup of the node's own in every hierarchy, below which kubelet keeps its pods.
    fn make_cgroups(&self) -> Result<()> {
        for hierarchy in hierarchies()? {
            let group = hierarchy.join(self.namespace());
            fs::create_dir_all(&group).with_context(|| group.display().to_string())?;
            // A cpuset that nobody filled runs nothing.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read_to_string(hierarchy.join(file)) {
                    fs::write(group.join(file), value)
                        .with_context(|| format!("{file} of {}", group.display()))?;
                }
            }
        }
        Ok(())
    }

    /// A process that does nothing but hold the mount namespace.
    fn hold(&self) -> Result<()> {
        let ready = self.folder.join("mounted");
        let mut script = String::from("mount --make-rprivate /\n");
        for (folder, target) in OWN {
            script.push_str(&format!("mount --bind {} {target}\n", self.folder.join(folder).display()));
        }
        // What one of the node's processes mounts, the others and the containers see; nobody else does.
        script.push_str("mount --make-rshared /\n");
        script.push_str(&format!("touch {}\nexec sleep infinity\n", ready.display()));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-e", "-c", &script]);
        processes::start(&self.folder, "holder", command)?;
        processes::until("the node's mounts", || Ok(ready.exists()))
    }
}

/// The machine's folders that a node's are mounted over, made where there are none: those that were, and are to go.
pub(super) fn mount_points() -> Result<Vec<&'static str>> {
    let mut made = Vec::new();
    for (_, target) in OWN {
        if !Path::new(target).exists() {
            fs::create_dir_all(target).with_context(|| target.to_owned())?;
            made.push(target);
        }
    }
    Ok(made)
}

/// Where the cgroup hierarchies are mounted: several of version 1, or one of version 2.
pub(super) fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let of = |kind: &str| -> Vec<PathBuf> {
        mounts
            .lines()
            .filter_map(|line| {
                let (left, right) = line.split_once(" - ")?;
                (right.split(' ').next() == Some(kind)).then(|| left.split(' ').nth(4).map(PathBuf::from))?
            })
            .collect()
    };
    let (first, second) = (of("cgroup"), of("cgroup2"));
    let found = if first.is_empty() { second } else { first };
    ensure!(!found.is_empty(), "no cgroup hierarchy is mounted");
    Ok(found)
}
