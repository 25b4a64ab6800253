//! What runs on the nodes, and with which settings: each one here for a reason that a real machine gave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::builds::{ETCD, KUBERNETES};
use super::certificates::Authority;
use super::nodes::Node;
use super::processes::{self, run};
use super::{API_SERVER, Cluster, Options};

const SERVICES: &str = "10.96.0.0/16";
const SERVICES6: &str = "fd00:10:96::/112";
/// The cluster's resolver.
pub(super) const DNS: &str = "10.96.0.10";
/// What holds a pod's namespaces; ours, so that nothing is pulled.
pub(super) const PAUSE: &str = "weft.test/pause:1";
/// What the API server writes down.
const AUDIT: &str = "audit-policy.json";
const SOCKET: &str = "/run/containerd/containerd.sock";

/// Every certificate and kubeconfig of a cluster.
pub(super) fn issue(folder: &Path, nodes: &[Node], options: Options) -> Result<()> {
    let authority = Authority::new(folder)?;
    let masters = Some("system:masters");
    let mut addresses = nodes[0].addresses(options.dual);
    addresses.push([127, 0, 0, 1].into());
    addresses.push([10, 96, 0, 1].into());
    if options.dual {
        addresses.push("fd00:10:96::1".parse()?);
    }
    let names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    authority.issue("apiserver", "kube-apiserver", None, &names, &addresses)?;
    authority.issue("apiserver-kubelet", "kube-apiserver-kubelet-client", masters, &[], &[])?;
    authority.issue("front-proxy", "front-proxy-client", None, &[], &[])?;
    authority.kubeconfig("admin", "admin", masters, API_SERVER)?;
    for name in ["kube-controller-manager", "kube-scheduler"] {
        authority.kubeconfig(name, &format!("system:{name}"), None, API_SERVER)?;
    }
    let server = format!("https://{}:6443", nodes[0].ip());
    authority.kubeconfig("kube-proxy", "system:kube-proxy", None, &server)?;
    for node in nodes {
        let name = node.name();
        let user = format!("system:node:{name}");
        authority.kubeconfig(&name, &user, Some("system:nodes"), &server)?;
        authority.issue(
            &format!("{name}-serving"),
            &user,
            Some("system:nodes"),
            &[&name],
            &node.addresses(options.dual),
        )?;
    }
    Ok(())
}

impl Cluster {
    /// etcd, the API server and what acts for it, on the first node.
    pub(super) fn start_control_plane(&self) -> Result<()> {
        let node = &self.nodes[0];
        let mut etcd = node.on_network(&ETCD.program("etcd")?);
        etcd.args(["--name=bed", "--unsafe-no-fsync", "--log-level=warn"])
            .arg(format!("--data-dir={}", self.state.join("etcd").display()))
            .args([
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
            ])
            .args([
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            ])
            .arg("--initial-cluster=bed=http://127.0.0.1:2380");
        processes::start(&self.state, "etcd", etcd)?;

        // Who did what to which kind: what a role is compared with.
        fs::write(
            self.state.join(AUDIT),
            json!({
                "apiVersion": "audit.k8s.io/v1",
                "kind": "Policy",
                "omitStages": ["RequestReceived"],
                "rules": [
                    {"level": "Metadata", "userGroups": ["system:serviceaccounts:weft"]},
                    {"level": "None"},
                ],
            })
            .to_string(),
        )?;
        self.start_api()?;
        self.start_managers()
    }

    /// What acts on what the API server holds.
    fn start_managers(&self) -> Result<()> {
        let node = &self.nodes[0];
        let pki = |name: &str| self.pki().join(name).display().to_string();
        let services = self.services();
        let mut manager = node.on_network(&KUBERNETES.program("kube-controller-manager")?);
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            manager.arg(format!("--{flag}={}", pki("kube-controller-manager.kubeconfig")));
        }
        manager
            .args([
                "--allocate-node-cidrs=false",
                "--leader-elect=false",
                "--use-service-account-credentials=true",
            ])
            .arg(format!("--service-cluster-ip-range={services}"))
            .arg(format!("--service-account-private-key-file={}", pki("sa.key")))
            .arg(format!("--root-ca-file={}", pki("ca.crt")))
            .arg(format!("--cluster-signing-cert-file={}", pki("ca.crt")))
            .arg(format!("--cluster-signing-key-file={}", pki("ca.key")));
        processes::start(&self.state, "kube-controller-manager", manager)?;

        let mut scheduler = node.on_network(&KUBERNETES.program("kube-scheduler")?);
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            scheduler.arg(format!("--{flag}={}", pki("kube-scheduler.kubeconfig")));
        }
        scheduler.arg("--leader-elect=false");
        processes::start(&self.state, "kube-scheduler", scheduler)
    }

    /// The API server, on what etcd holds.
    fn start_api(&self) -> Result<()> {
        let node = &self.nodes[0];
        let pki = |name: &str| self.pki().join(name).display().to_string();
        let services = self.services();
        let mut api = node.on_network(&KUBERNETES.program("kube-apiserver")?);
        api.args(["--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443"])
            .arg(format!("--advertise-address={}", node.ip()))
            .arg(format!("--service-cluster-ip-range={services}"))
            .arg(format!("--tls-cert-file={}", pki("apiserver.crt")))
            .arg(format!("--tls-private-key-file={}", pki("apiserver.key")))
            .arg(format!("--client-ca-file={}", pki("ca.crt")))
            .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
            .arg("--allow-privileged=true")
            .arg("--kubelet-preferred-address-types=InternalIP")
            .arg(format!("--kubelet-certificate-authority={}", pki("ca.crt")))
            .arg(format!("--kubelet-client-certificate={}", pki("apiserver-kubelet.crt")))
            .arg(format!("--kubelet-client-key={}", pki("apiserver-kubelet.key")))
            .arg("--service-account-issuer=https://kubernetes.default.svc.cluster.local")
            .arg(format!("--service-account-key-file={}", pki("sa.pub")))
            .arg(format!("--service-account-signing-key-file={}", pki("sa.key")))
            .arg(format!("--requestheader-client-ca-file={}", pki("ca.crt")))
            .arg("--requestheader-allowed-names=front-proxy-client")
            .arg("--requestheader-extra-headers-prefix=X-Remote-Extra-")
            .arg("--requestheader-group-headers=X-Remote-Group")
            .arg("--requestheader-username-headers=X-Remote-User")
            .arg(format!("--proxy-client-cert-file={}", pki("front-proxy.crt")))
            .arg(format!("--proxy-client-key-file={}", pki("front-proxy.key")))
            // No route leads from here to a ClusterIP before kube-proxy made one: webhooks are dialled at endpoints.
            .arg("--enable-aggregator-routing=true")
            .arg(format!("--audit-policy-file={}", self.state.join(AUDIT).display()))
            .arg(format!("--audit-log-path={}", self.state.join("logs/audit.log").display()));
        processes::start(&self.state, "kube-apiserver", api)?;
        processes::until("the API server's readiness", || {
            // One that has ended never answers; what it said is worth more than three minutes.
            Ok(processes::ended(&self.state, "kube-apiserver")
                || self.kubectl(["get", "--raw", "/readyz"]).run()?.trim() == "ok")
        })?;
        ensure!(
            !processes::ended(&self.state, "kube-apiserver"),
            "the API server ended: {}",
            fs::read_to_string(self.state.join("logs/kube-apiserver.log"))?
                .lines()
                .last()
                .unwrap_or_default()
        );
        Ok(())
    }

    /// Ends the API server as a crash does, and what acts on it: that loses its lease within seconds elsewhere, and ends.
    /// Here there is no lease to lose: it would come back late, and with the nodes' silence in mind.
    pub fn stop_api_server(&self) -> Result<()> {
        for name in ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
            processes::end(&self.state, name)?;
        }
        Ok(())
    }

    /// Starts them again.
    pub fn start_api_server(&self) -> Result<()> {
        self.start_api()?;
        self.start_managers()
    }

    fn services(&self) -> String {
        if self.options.dual { format!("{SERVICES},{SERVICES6}") } else { SERVICES.to_owned() }
    }

    /// containerd of a node.
    pub(super) fn start_runtime(&self, node: &Node) -> Result<()> {
        let config = node.folder().join("containerd.toml");
        fs::write(&config, containerd())?;
        let mut runtime = node.inside(Path::new("/usr/bin/containerd"))?;
        runtime.arg("--config").arg(&config).env("PATH", path());
        processes::start(node.folder(), "containerd", runtime)?;
        processes::until("containerd", || Ok(self.ctr(node, ["version"]).is_ok()))
    }

    /// Imports an image archive into a node's containerd.
    pub(super) fn import(&self, node: &Node, archive: &Path) -> Result<()> {
        self.ctr(
            node,
            [Path::new("-n"), Path::new("k8s.io"), Path::new("images"), Path::new("import"), archive],
        )?;
        Ok(())
    }

    /// `ctr` on a node.
    pub fn ctr<A: AsRef<std::ffi::OsStr>>(
        &self,
        node: &Node,
        args: impl IntoIterator<Item = A>,
    ) -> Result<String> {
        run(node.inside(Path::new("/usr/bin/ctr"))?.arg("-a").arg(SOCKET).args(args))
    }

    /// kubelet and kube-proxy of a node.
    pub(super) fn start_node(&self, node: &Node) -> Result<()> {
        let write = |name: &str, config: Value| -> Result<PathBuf> {
            let path = node.folder().join(name);
            fs::write(&path, serde_json::to_string_pretty(&config)?)
                .with_context(|| path.display().to_string())?;
            Ok(path)
        };
        let addresses: Vec<_> = node.addresses(self.options.dual).iter().map(ToString::to_string).collect();
        let config = write("kubelet.json", self.kubelet(node))?;
        let mut kubelet = node.inside(&KUBERNETES.program("kubelet")?)?;
        kubelet
            .arg(format!("--config={}", config.display()))
            .arg(format!("--kubeconfig={}", self.pki().join(format!("{}.kubeconfig", node.name())).display()))
            .arg(format!("--hostname-override={}", node.name()))
            .arg(format!("--node-ip={}", addresses.join(",")))
            .arg(format!("--node-labels=topology.kubernetes.io/zone={}", node.zone()))
            .env("PATH", path());
        processes::start(node.folder(), "kubelet", kubelet)?;

        let config = write(
            "kube-proxy.json",
            json!({
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "iptables",
                "hostnameOverride": node.name(),
                "clientConnection": {"kubeconfig": self.pki().join("kube-proxy.kubeconfig")},
                // The tables' size belongs to the whole machine and is not ours to set.
                "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
                // Rules are written as soon as endpoints change: tests wait for them.
                "iptables": {"minSyncPeriod": "0s"},
            }),
        )?;
        let mut proxy = node.inside(&KUBERNETES.program("kube-proxy")?)?;
        proxy.arg(format!("--config={}", config.display())).env("PATH", path());
        processes::start(node.folder(), "kube-proxy", proxy)
    }

    fn kubelet(&self, node: &Node) -> Value {
        let pki = |name: String| self.pki().join(name);
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", node.namespace()),
            "cgroupsPerQOS": true,
            "enforceNodeAllocatable": [],
            "failCgroupV1": false,
            "failSwapOn": false,
            // A minute elsewhere: how late a mounted ConfigMap follows. Tests wait for it.
            "syncFrequency": "10s",
            "clusterDomain": "cluster.local",
            "clusterDNS": [DNS],
            "resolvConf": node.folder().join("resolv.conf"),
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": pki("ca.crt".to_owned())},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": pki(format!("{}-serving.crt", node.name())),
            "tlsPrivateKeyFile": pki(format!("{}-serving.key", node.name())),
            "volumePluginDir": node.folder().join("volume-plugins"),
            // An image that it deletes cannot be pulled again, and a full disk is the machine's, not the node's.
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {
                "memory.available": "0%",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
                "imagefs.inodesFree": "0%",
            },
            "imagePullCredentialsVerificationPolicy": "NeverVerifyPreloadedImages",
            "serializeImagePulls": false,
        })
    }
}

/// Debian keeps runc and iptables where a user's PATH does not look.
fn path() -> &'static str {
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

fn containerd() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Without CAP_SYS_RESOURCE no score may be lowered, and no sandbox would start.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#
    )
}

/// Runs `ip`, which has to exist anyway.
pub(super) fn remove_namespace(name: &str) {
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}
