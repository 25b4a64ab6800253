//! A real Kubernetes cluster of one or two nodes on this machine, with no container engine and no download.
//!
//! Why not a mock, nor kind: what breaks in a mesh breaks between kubelet, CNI, kube-proxy and the API server,
//! so all of them are real; and a test that needs docker, a registry and a hypervisor is a test that few people
//! run. Programs come from Go modules ([`builds`]), nodes are namespaces ([`nodes`]), images are written by
//! ourselves ([`images`]).
//!
//! What holds:
//! - **One cluster a machine**, under fixed names: whoever comes later uses it, or takes it down.
//! - **Nothing touches the machine** but `/var/lib/weft-cluster`, the namespaces `weft-node-*` and the cgroups
//!   of the same names. (Raised and not lowered again: `fs.inotify.max_user_instances`.)
//! - **[`down`] needs no memory**: it finds the cluster's processes by where they run, so that it works after a
//!   crash, and twice.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub mod builds;
pub mod capture;
pub mod certificates;
pub mod components;
pub mod conformance;
pub mod images;
pub mod kubectl;
pub mod nodes;
mod processes;
pub mod weft;
pub mod workloads;

use kubectl::Kubectl;
use nodes::Node;

/// Where kubectl, helm and the suite find the API server, on the first node's network.
pub const API_SERVER: &str = "https://127.0.0.1:6443";
/// Everything that a running cluster writes.
const STATE: &str = "/var/lib/weft-cluster";
/// Its list of the machine's folders that there were none of before.
const MADE: &str = "made-folders";
const PROGRAMS: [(&str, &str); 7] = [
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("iptables", "iptables"),
    ("mount", "mount"),
];

/// What kind of cluster.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Options {
    /// One or two, each in a zone of its own.
    pub nodes: u8,
    /// IPv6 beside IPv4, for nodes, pods and Services.
    pub dual: bool,
}

/// The cluster of this machine.
#[derive(Clone, Debug)]
pub struct Cluster {
    state: PathBuf,
    options: Options,
    nodes: Vec<Node>,
}

/// Why there can be no cluster here, in words for the user; `Ok` where there can.
pub fn usable() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "a cluster needs root: its nodes are namespaces");
    for (program, package) in PROGRAMS {
        let found = env::split_paths(&env::var_os("PATH").unwrap_or_default())
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(program).exists());
        ensure!(found, "the program {program} is missing (Debian package {package})");
    }
    ensure!(
        Path::new("/usr/lib/cni/ptp").exists(),
        "CNI plugins are missing (Debian package containernetworking-plugins)"
    );
    builds::usable()
}

/// Brings a cluster up, or takes the one that is up if it is of that kind.
pub fn up(options: Options) -> Result<Cluster> {
    ensure!((1..=2).contains(&options.nodes), "one node or two, not {}", options.nodes);
    if let Some(cluster) = current()? {
        ensure!(
            cluster.options == options,
            "another cluster is up ({:?}); end it first: weft-cluster down",
            cluster.options
        );
        return Ok(cluster);
    }
    usable()?;
    for piece in [builds::ETCD, builds::KUBERNETES, builds::COREDNS] {
        piece.build()?;
    }
    let archives = images::for_the_cluster()?;
    // What an earlier one left.
    down()?;
    let began = Instant::now();
    let cluster = Cluster::described(options);
    let made = cluster.make(&archives);
    if let Err(error) = made {
        return Err(error.context(format!(
            "the cluster did not come up; its logs are in {STATE}, until: weft-cluster down"
        )));
    }
    println!(
        "figure: seconds from nothing to Ready, {} nodes: {:.1}",
        options.nodes,
        began.elapsed().as_secs_f64()
    );
    fs::write(cluster.state.join("up.json"), serde_json::to_string(&options)?)?;
    Ok(cluster)
}

/// The cluster that is up, if one is.
pub fn current() -> Result<Option<Cluster>> {
    let Ok(text) = fs::read_to_string(Path::new(STATE).join("up.json")) else { return Ok(None) };
    let cluster = Cluster::described(serde_json::from_str(&text)?);
    let alive = processes::pid_of(&cluster.state, "kube-apiserver").is_some();
    Ok(alive.then_some(cluster))
}

/// Ends the cluster and removes all of it, whatever state it is in; nothing is done where there is none.
pub fn down() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "only root can end a cluster");
    let nodes: Vec<_> = (1..=2).map(|number| Node::new(Path::new(STATE), number)).collect();
    let holders: Vec<_> =
        nodes.iter().filter_map(|node| processes::pid_of(node.folder(), "holder")).collect();
    processes::end_all(&holders)?;
    for node in &nodes {
        if Path::new("/run/netns").join(node.namespace()).exists() {
            components::remove_namespace(&node.namespace());
        }
        for hierarchy in nodes::hierarchies()? {
            let group = hierarchy.join(node.namespace());
            processes::until(&format!("the removal of {}", group.display()), || {
                remove_groups(&group);
                Ok(!group.exists())
            })?;
        }
    }
    for folder in fs::read_to_string(Path::new(STATE).join(MADE)).unwrap_or_default().lines() {
        // Whatever somebody put there meanwhile is not ours.
        let _ = fs::remove_dir(folder);
    }
    if Path::new(STATE).exists() {
        fs::remove_dir_all(STATE).with_context(|| format!("removing {STATE}"))?;
    }
    Ok(())
}

/// What [`down`] would still find: nothing, after it.
pub fn leftovers() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for name in fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.file_name()) {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with(nodes::PREFIX) || name.starts_with("cni-") {
            found.push(format!("namespace {name}"));
        }
    }
    for hierarchy in nodes::hierarchies()? {
        for number in 1..=2 {
            let group = hierarchy.join(format!("{}{number}", nodes::PREFIX));
            if group.exists() {
                found.push(format!("cgroup {}", group.display()));
            }
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    found.extend(mounts.lines().filter(|line| line.contains(STATE)).map(|line| format!("mount {line}")));
    match processes::count() {
        0 => {}
        count => found.push(format!("{count} processes")),
    }
    if Path::new(STATE).exists() {
        found.push(STATE.to_owned());
    }
    Ok(found)
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

impl Cluster {
    fn described(options: Options) -> Self {
        let state = PathBuf::from(STATE);
        let nodes = (1..=options.nodes).map(|number| Node::new(&state, number)).collect();
        Self { state, options, nodes }
    }

    fn make(&self, archives: &[PathBuf]) -> Result<()> {
        fs::create_dir_all(&self.state)?;
        raise("/proc/sys/fs/inotify/max_user_instances", 1024)?;
        fs::write(self.state.join(MADE), nodes::mount_points()?.join("\n"))?;
        components::issue(&self.pki(), &self.nodes, self.options)?;
        for (index, node) in self.nodes.iter().enumerate() {
            node.make(self.options.dual, &self.nodes[..index])?;
        }
        self.start_control_plane()?;
        for node in &self.nodes {
            self.start_runtime(node)?;
            for archive in archives {
                self.import(node, archive)?;
            }
            self.start_node(node)?;
        }
        let manifest = include_str!("../cluster/manifests/coredns.yaml")
            .replace("IMAGE", &images::coredns_name()?)
            .replace("CLUSTER_IP", components::DNS);
        self.kubectl(["apply", "-f", "-"]).input(&manifest).run()?;
        processes::until("the nodes' readiness", || {
            let ready = self
                .kubectl([
                    "get",
                    "nodes",
                    "-o",
                    r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#,
                ])
                .run()?;
            Ok(ready.split_whitespace().filter(|status| *status == "True").count() == self.nodes.len())
        })?;
        self.kubectl(["-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=180s"])
            .run()?;
        Ok(())
    }

    /// What kind it is.
    pub fn options(&self) -> Options {
        self.options
    }

    /// The control plane's node first.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The administrator's kubeconfig; good on the first node's network.
    pub fn kubeconfig(&self) -> PathBuf {
        self.pki().join("admin.kubeconfig")
    }

    /// Where the API server writes what Weft's service accounts asked of it.
    pub fn audit_log(&self) -> PathBuf {
        self.state.join("logs/audit.log")
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.state.join("pki")
    }

    /// `kubectl` with arguments.
    pub fn kubectl<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Kubectl {
        self.tool(builds::KUBERNETES, "kubectl", args)
    }

    /// A program that speaks to the API server, on the first node's network.
    pub fn tool<A: AsRef<OsStr>>(
        &self,
        piece: builds::Piece,
        program: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Kubectl {
        let program = piece.program(program);
        self.program(program, args)
    }

    /// Any program, on the first node's network, with `KUBECONFIG` set.
    pub fn program<A: AsRef<OsStr>>(
        &self,
        path: Result<PathBuf>,
        args: impl IntoIterator<Item = A>,
    ) -> Kubectl {
        let command = path.map(|path| {
            let mut command = self.nodes[0].on_network(&path);
            command.args(args.into_iter().map(|arg| arg.as_ref().to_owned()).collect::<Vec<OsString>>());
            command.env("KUBECONFIG", self.kubeconfig());
            command
        });
        Kubectl::new(command)
    }

    /// Imports archives into every node.
    pub fn load(&self, archives: &[PathBuf]) -> Result<()> {
        for node in &self.nodes {
            for archive in archives {
                self.import(node, archive)?;
            }
        }
        Ok(())
    }

    /// Writes an image and imports it into every node, where it is not there yet.
    pub fn load_image(&self, image: &images::Image) -> Result<()> {
        let there = self.ctr(&self.nodes[0], ["-n", "k8s.io", "images", "ls", "-q"])?;
        if there.lines().any(|name| name == image.name) {
            return Ok(());
        }
        let written = image.write(&images::bed_folder())?;
        self.load(&[written.archive])
    }

    /// How to use it from a shell.
    pub fn usage(&self) -> Result<String> {
        let kubectl = builds::KUBERNETES.program("kubectl")?;
        let helm = builds::HELM4.program("helm").unwrap_or_else(|_| "helm".into());
        let mut text = format!(
            "A cluster of {} is up. Its API server listens on the network of {}:

  sudo nsenter --net=/run/netns/{} bash
  export KUBECONFIG={}
  alias kubectl={} helm={}
  kubectl get pods -A -o wide

Images of this tree: make images; weft-cluster load target/images/*.tar
What crosses between the nodes: sudo nsenter --net=/run/netns/{} tcpdump -ni {}
Logs: {STATE}/logs and {STATE}/node-*/logs
End: make cluster-down",
            if self.nodes.len() == 1 { "one node" } else { "two nodes" },
            self.nodes[0].name(),
            self.nodes[0].namespace(),
            self.kubeconfig().display(),
            kubectl.display(),
            helm.display(),
            self.nodes[0].namespace(),
            self.nodes[0].wire(),
        );
        if !self.options.dual {
            text.push_str("\n(IPv4 only; --dual gives every pod and node an IPv6 address too.)");
        }
        Ok(text)
    }
}

/// The checkout that this was built from.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

fn raise(path: &str, least: u32) -> Result<()> {
    let now: u32 = fs::read_to_string(path)?.trim().parse()?;
    if now < least && fs::write(path, least.to_string()).is_err() {
        bail!("{path} is {now}: two kubelets need {least}");
    }
    Ok(())
}
