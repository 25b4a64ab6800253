//! The programs of the cluster, built from Go modules and kept by version.
//!
//! Why not downloads: a Go module is pinned by its hash in `go.sum`, comes through a module proxy wherever Go
//! itself can be had, and is what the authors released; a release archive is one more thing to trust. Each
//! piece is a module of its own (`tests/cluster/PIECE/go.mod`), so that each keeps the versions that its authors
//! tested. What is built once stays: the folder's name carries the version, and nothing else decides.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};

/// One go.mod folder, and what is built of it.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// The folder below `tests/cluster`.
    pub folder: &'static str,
    /// The module whose version is the piece's.
    module: &'static str,
    /// Program and package.
    mains: &'static [(&'static str, &'static str)],
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Program,
    /// Programs that tell their version by what the linker writes into them; helm asks the API server for it.
    Stamped,
    /// The tests of a package as a program.
    Tests,
}

/// The API server and its helpers, kubelet, kubectl.
pub const KUBERNETES: Piece = Piece {
    folder: "kubernetes",
    module: "k8s.io/kubernetes",
    mains: &[
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
        ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    ],
    kind: Kind::Stamped,
};

/// Where the API server keeps everything.
pub const ETCD: Piece = Piece {
    folder: "etcd",
    module: "go.etcd.io/etcd/server/v3",
    mains: &[("etcd", "go.etcd.io/etcd/server/v3")],
    kind: Kind::Program,
};

/// The cluster's names.
pub const COREDNS: Piece = Piece {
    folder: "coredns",
    module: "github.com/coredns/coredns",
    mains: &[("coredns", "github.com/coredns/coredns")],
    kind: Kind::Program,
};

/// Helm as most have it.
pub const HELM3: Piece = Piece {
    folder: "helm3",
    module: "helm.sh/helm/v3",
    mains: &[("helm", "helm.sh/helm/v3/cmd/helm")],
    kind: Kind::Program,
};

/// Helm that applies on the server.
pub const HELM4: Piece = Piece {
    folder: "helm4",
    module: "helm.sh/helm/v4",
    mains: &[("helm", "helm.sh/helm/v4/cmd/helm")],
    kind: Kind::Program,
};

/// The official suite, as its authors wrote it.
pub const CONFORMANCE: Piece = Piece {
    folder: "conformance",
    module: "sigs.k8s.io/gateway-api/conformance",
    mains: &[("conformance.test", "sigs.k8s.io/gateway-api/conformance")],
    kind: Kind::Tests,
};

/// The echo pair that the suite's image was made of, by those who wrote it. Nobody waits for it who does not ask.
pub const ECHO: Piece = Piece {
    folder: "echo",
    module: "istio.io/istio",
    mains: &[
        ("client", "istio.io/istio/pkg/test/echo/cmd/client"),
        ("server", "istio.io/istio/pkg/test/echo/cmd/server"),
    ],
    kind: Kind::Program,
};

/// Everything that the tests need, in the order in which it is built.
pub const ALL: [Piece; 6] = [ETCD, KUBERNETES, COREDNS, CONFORMANCE, HELM3, HELM4];

/// Where built programs and images stay: `WEFT_CLUSTER_CACHE`, for several checkouts that share them.
pub fn cache() -> PathBuf {
    env::var_os("WEFT_CLUSTER_CACHE")
        .map_or_else(|| super::repository().join("target/cluster"), PathBuf::from)
}

impl Piece {
    /// The version that its go.mod names.
    pub fn version(&self) -> Result<String> {
        let path = self.source().join("go.mod");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.lines()
            .filter_map(|line| line.trim().trim_start_matches("require ").strip_prefix(self.module))
            .find_map(|rest| rest.strip_prefix(" v"))
            .and_then(|version| version.split_whitespace().next())
            .map(|version| format!("v{version}"))
            .with_context(|| format!("{} does not require {}", path.display(), self.module))
    }

    /// One of its programs, built if it is not there yet.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        ensure!(self.mains.iter().any(|main| main.0 == name), "{} has no program {name}", self.folder);
        let folder = self.built()?;
        self.build()?;
        Ok(folder.join(name))
    }

    /// Builds what is missing; cheap when nothing is.
    pub fn build(&self) -> Result<()> {
        let folder = self.built()?;
        let missing: Vec<_> = self.mains.iter().filter(|main| !folder.join(main.0).exists()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        go_or_reason()?;
        eprintln!("building {} {} (once; into {})", self.folder, self.version()?, folder.display());
        // Whole or not at all: an interrupted build leaves nothing that looks finished.
        let scratch = folder.with_extension(format!("building-{}", std::process::id()));
        fs::create_dir_all(&scratch)?;
        fs::create_dir_all(&folder)?;
        let mut ldflags = "-s -w".to_owned();
        if self.kind == Kind::Stamped {
            let version = self.version()?;
            let mut numbers = version.trim_start_matches('v').split('.');
            let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
            let package = "k8s.io/component-base/version";
            ldflags.push_str(&format!(
                " -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
            ));
        }
        let mut command = self.go(if self.kind == Kind::Tests { "test" } else { "build" });
        command.args(["-p=2", "-trimpath", "-ldflags", &ldflags]);
        if self.kind == Kind::Tests {
            command.arg("-c");
        }
        // One package goes into a file: Go would call etcd's "v3".
        let several = format!("{}/", scratch.display());
        command.arg("-o").arg(if self.mains.len() == 1 {
            scratch.join(missing[0].0)
        } else {
            several.into()
        });
        command.args(missing.iter().map(|main| main.1));
        let status = command.status().context("go")?;
        if !status.success() {
            let _ = fs::remove_dir_all(&scratch);
            bail!("go could not build {}: {status}", self.folder);
        }
        for (program, _) in missing {
            fs::rename(scratch.join(program), folder.join(program))?;
        }
        fs::remove_dir_all(&scratch)?;
        Ok(())
    }

    fn built(&self) -> Result<PathBuf> {
        Ok(cache().join("bin").join(format!("{}-{}", self.folder, self.version()?)))
    }

    fn source(&self) -> PathBuf {
        super::repository().join("tests/cluster").join(self.folder)
    }

    fn go(&self, verb: &str) -> Command {
        let mut command = Command::new("go");
        command.arg(verb).current_dir(self.source());
        command
            .env("CGO_ENABLED", "0")
            .env("GOTOOLCHAIN", "local")
            .env("GOWORK", "off")
            .env("PATH", path_with_go());
        command
    }
}

/// The Gateway API's own CRDs of the suite's version: `standard` or `experimental`.
pub fn gateway_api_crds(channel: &str) -> Result<Vec<PathBuf>> {
    let version = CONFORMANCE.version()?;
    let kept = cache().join(format!("gateway-api-{version}-{channel}"));
    if !kept.exists() {
        go_or_reason()?;
        let folder = go_list("sigs.k8s.io/gateway-api")?.join("config/crd").join(channel);
        let scratch = kept.with_extension(format!("copying-{}", std::process::id()));
        fs::create_dir_all(&scratch)?;
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            fs::copy(entry.path(), scratch.join(entry.file_name()))?;
        }
        fs::rename(&scratch, &kept)?;
    }
    let mut files: Vec<_> =
        fs::read_dir(&kept)?.collect::<Result<Vec<_>, _>>()?.iter().map(fs::DirEntry::path).collect();
    files.retain(|file| file.file_name().is_some_and(|name| name != "kustomization.yaml"));
    files.sort();
    ensure!(!files.is_empty(), "no CRDs in {}", kept.display());
    Ok(files)
}

fn go_list(module: &str) -> Result<PathBuf> {
    // Downloads it if it is not there; prints where it lies.
    let output = CONFORMANCE.go("mod").args(["download", "-json", module]).output().context("go")?;
    ensure!(output.status.success(), "go mod download: {}", String::from_utf8_lossy(&output.stdout));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(told["Dir"].as_str().context("go mod download told no folder")?.into())
}

/// Why nothing can be built here.
fn go_or_reason() -> Result<()> {
    let output = Command::new("go").arg("version").env("PATH", path_with_go()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => bail!("go does not work: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(_) => bail!("Go is not installed (the cluster's programs are built from Go modules)"),
    }
}

/// Why the cluster cannot be had here, if so: asked before anything is made.
pub fn usable() -> Result<()> {
    for piece in ALL {
        let folder = piece.built()?;
        if piece.mains.iter().any(|main| !folder.join(main.0).exists()) {
            go_or_reason()?;
            let output = piece.go("mod").args(["download", piece.module]).output().context("go")?;
            ensure!(
                output.status.success(),
                "Go's module proxy does not answer for {}: {}",
                piece.module,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
    }
    Ok(())
}

/// Go's own installer puts it where few have it on their PATH.
fn path_with_go() -> String {
    let path = env::var("PATH").unwrap_or_default();
    if Path::new("/usr/local/go/bin/go").exists() { format!("{path}:/usr/local/go/bin") } else { path }
}
