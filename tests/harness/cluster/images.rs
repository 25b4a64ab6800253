//! Container images without a container engine: a tar of a few files, a configuration, and their hashes.
//!
//! A static program needs nothing beside itself, so an image is that program in one layer, and whatever could
//! be attacked in a distribution is not there. Both forms are written: an OCI layout (for registries: `skopeo
//! copy oci:...`) and a docker-archive (for `ctr images import` and `docker load`). The same files give the same
//! bytes: no time, no owner, sorted names.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use aws_lc_rs::digest;
use serde_json::{Value, json};

use super::builds::{self, COREDNS};
use super::components::PAUSE;
use super::processes::run;

/// What becomes of one file of an image.
#[derive(Clone, Debug)]
enum Entry {
    File { mode: u32, content: Vec<u8> },
    Link(String),
    Folder { mode: u32 },
}

/// An image before it is written.
#[derive(Clone, Debug)]
pub struct Image {
    /// Repository and tag.
    pub name: String,
    files: BTreeMap<String, Entry>,
    config: Value,
}

impl Image {
    /// An empty one that starts a program as a user.
    pub fn new(name: &str, entrypoint: &[&str], user: &str) -> Self {
        let config = json!({
            "Entrypoint": entrypoint,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "User": user,
            "WorkingDir": "/",
        });
        Self { name: name.to_owned(), files: BTreeMap::new(), config }
    }

    /// With arguments, where whoever starts it gives none.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.config["Cmd"] = json!(arguments);
        self
    }

    /// With a program of this machine.
    pub fn program(self, path: &str, source: &Path) -> Result<Self> {
        let content = fs::read(source).with_context(|| source.display().to_string())?;
        Ok(self.entry(path, Entry::File { mode: 0o755, content }))
    }

    /// With a file.
    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(path, Entry::File { mode: 0o644, content: content.to_vec() })
    }

    /// With a symbolic link.
    pub fn link(self, path: &str, to: &str) -> Self {
        self.entry(path, Entry::Link(to.to_owned()))
    }

    /// With an empty folder.
    pub fn folder(self, path: &str, mode: u32) -> Self {
        self.entry(path, Entry::Folder { mode })
    }

    fn entry(mut self, path: &str, entry: Entry) -> Self {
        let path = path.trim_start_matches('/');
        // Folders that lead there; whoever unpacks wants them first, and sorted names put them there.
        for (at, _) in path.match_indices('/') {
            self.files.entry(path[..at].to_owned()).or_insert(Entry::Folder { mode: 0o755 });
        }
        self.files.insert(path.to_owned(), entry);
        self
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = Tar::default();
        for (path, entry) in &self.files {
            match entry {
                Entry::File { mode, content } => tar.file(path, *mode, content)?,
                Entry::Link(to) => tar.special(path, 0o777, b'2', to)?,
                Entry::Folder { mode } => tar.special(&format!("{path}/"), *mode, b'5', "")?,
            }
        }
        Ok(tar.end())
    }

    fn configuration(&self, layer: &[u8]) -> Vec<u8> {
        json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(layer))]},
        })
        .to_string()
        .into_bytes()
    }

    /// What `docker load` and `ctr images import` read.
    pub fn docker_archive(&self) -> Result<Vec<u8>> {
        let layer = self.layer()?;
        let config = self.configuration(&layer);
        let config_name = format!("{}.json", sha256(&config));
        let layer_name = format!("{}.tar", sha256(&layer));
        let manifest = json!([{"Config": config_name, "RepoTags": [self.name], "Layers": [layer_name]}]);
        let mut tar = Tar::default();
        tar.file(&layer_name, 0o644, &layer)?;
        tar.file(&config_name, 0o644, &config)?;
        tar.file("manifest.json", 0o644, manifest.to_string().as_bytes())?;
        Ok(tar.end())
    }

    /// An OCI image layout; returns the manifest's digest, by which a registry will know the image.
    pub fn oci_layout(&self, folder: &Path) -> Result<String> {
        let blobs = folder.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let put = |content: &[u8], kind: &str| -> Result<Value> {
            let sum = sha256(content);
            fs::write(blobs.join(&sum), content)?;
            Ok(json!({"mediaType": kind, "digest": format!("sha256:{sum}"), "size": content.len()}))
        };
        let layer = self.layer()?;
        let config = put(&self.configuration(&layer), "application/vnd.oci.image.config.v1+json")?;
        let layer = put(&layer, "application/vnd.oci.image.layer.v1.tar")?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]});
        let mut listed = put(manifest.to_string().as_bytes(), kind)?;
        listed["annotations"] = json!({"org.opencontainers.image.ref.name": self.name});
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        fs::write(folder.join("index.json"), json!({"schemaVersion": 2, "manifests": [listed]}).to_string())?;
        Ok(listed["digest"].as_str().unwrap_or_default().to_owned())
    }

    /// Both forms, below a folder, under the last word of its name.
    pub fn write(&self, folder: &Path) -> Result<Written> {
        fs::create_dir_all(folder)?;
        let short = self.name.rsplit('/').next().unwrap_or_default().split(':').next().unwrap_or_default();
        let layout = folder.join(format!("{short}.oci"));
        if layout.exists() {
            fs::remove_dir_all(&layout)?;
        }
        let digest = self.oci_layout(&layout)?;
        let archive = folder.join(format!("{short}.tar"));
        let content = self.docker_archive()?;
        // Renamed into place: a reader never sees half of it.
        let scratch = folder.join(format!("{short}.tar.{}", std::process::id()));
        fs::write(&scratch, &content)?;
        fs::rename(&scratch, &archive)?;
        Ok(Written { name: self.name.clone(), archive, digest, bytes: content.len() })
    }
}

/// An image on disk.
#[derive(Clone, Debug)]
pub struct Written {
    /// Repository and tag.
    pub name: String,
    /// The docker-archive.
    pub archive: PathBuf,
    /// Of the OCI manifest.
    pub digest: String,
    /// Of the archive, uncompressed.
    pub bytes: usize,
}

/// The product's images, of static programs that lie in one folder.
pub fn of_weft(programs: &Path, version: &str) -> Result<Vec<Image>> {
    let name = |short: &str| format!("weft.dev/{short}:{version}");
    let uid = weft_core::ports::PROXY_UID.to_string();
    let proxy = Image::new(&name("weft-proxy"), &["/usr/local/bin/weft-proxy"], &format!("{uid}:{uid}"))
        .program("/usr/local/bin/weft-proxy", &programs.join("weft-proxy"))?;
    let controller = Image::new(&name("weft-controller"), &["/usr/local/bin/weft-controller"], "2103:2103")
        .program("/usr/local/bin/weft-controller", &programs.join("weft-controller"))?
        .program("/usr/local/bin/weft", &programs.join("weft"))?;
    let init = iptables(
        Image::new(&name("weft-iptables"), &["/usr/local/bin/weft-iptables"], "0:0")
            .program("/usr/local/bin/weft-iptables", &programs.join("weft-iptables"))?,
    )?;
    Ok(vec![proxy, controller, init])
}

/// With Debian's iptables and what it loads at run time.
fn iptables(mut image: Image) -> Result<Image> {
    let program = Path::new("/usr/sbin/xtables-nft-multi");
    image = image.program("/usr/sbin/xtables-nft-multi", program)?;
    for name in ["iptables", "ip6tables"] {
        for (flavour, suffix) in
            [("", ""), ("-nft", ""), ("", "-restore"), ("", "-save"), ("-nft", "-restore"), ("-nft", "-save")]
        {
            image = image.link(&format!("/usr/sbin/{name}{flavour}{suffix}"), "xtables-nft-multi");
        }
    }
    for library in libraries(program)? {
        image = image.program(&library.display().to_string(), &library)?;
    }
    let extensions = ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/aarch64-linux-gnu/xtables"];
    let folder =
        extensions.iter().map(Path::new).find(|folder| folder.exists()).context("iptables' extensions")?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Bridges and ARP are nobody's business in a pod.
        if name.starts_with("libxt_") || name.starts_with("libipt_") || name.starts_with("libip6t_") {
            image = image.program(&path.display().to_string(), &path)?;
        }
    }
    // iptables locks this file.
    Ok(image.folder("/run", 0o755))
}

/// What a program is linked with, the loader included.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let told = run(Command::new("ldd").arg(program))?;
    let found: Vec<_> = told
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect();
    ensure!(!found.is_empty(), "ldd told no library of {}", program.display());
    Ok(found)
}

/// The name that the official suite's manifests ask for.
pub const ECHO: &str = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1";

/// The tests' own apps.
pub const TESTAPP: &str = "weft.test/testapp:1";

/// The images of the bed itself, of the static `weft-echo`: what holds a pod, and the suite's echo pair; and the tests'
/// apps, of `weft-testapp`.
pub fn of_the_bed(programs: &Path) -> Result<Vec<Image>> {
    let echo = programs.join("weft-echo");
    Ok(vec![
        Image::new(PAUSE, &["/pause"], "65535:65535").program("/pause", &echo)?,
        echo_pair()?.program("/usr/local/bin/server", &echo)?.link("/usr/local/bin/client", "server"),
        Image::new(TESTAPP, &["/testapp"], "1000:1000")
            .program("/testapp", &programs.join("weft-testapp"))?,
    ])
}

/// The suite's echo pair as others wrote it, under the same name.
pub fn of_the_original_echo() -> Result<Image> {
    echo_pair()?
        .program("/usr/local/bin/server", &builds::ECHO.program("server")?)?
        .program("/usr/local/bin/client", &builds::ECHO.program("client")?)
}

/// The image that the suite's manifests ask for, without its programs.
fn echo_pair() -> Result<Image> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(["echo".to_owned()])?.self_signed(&key)?;
    let arguments = [
        "--tcp=9090",
        "--port=8080",
        "--grpc=7070",
        "--port=8443",
        "--tls=8443",
        "--crt=/cert.crt",
        "--key=/cert.key",
    ];
    Ok(Image::new(ECHO, &["/usr/local/bin/server"], "0:0")
        .arguments(&arguments)
        .file("/cert.crt", certificate.pem().as_bytes())
        .file("/cert.key", key.serialize_pem().as_bytes()))
}

/// kubectl in an image: a client of the API server as an operator or a controller is one.
pub fn of_kubectl() -> Result<Image> {
    Image::new(KUBECTL, &["/kubectl"], "1000:1000")
        .program("/kubectl", &builds::KUBERNETES.program("kubectl")?)
}

/// See [`of_kubectl`].
pub const KUBECTL: &str = "weft.test/kubectl:1";

/// CoreDNS under a name of ours.
pub(super) fn coredns_name() -> Result<String> {
    Ok(format!("weft.test/coredns:{}", COREDNS.version()?))
}

/// Where `make images` puts the bed's own.
pub fn bed_folder() -> PathBuf {
    builds::cache().join("images")
}

/// The archives without which no pod starts.
pub(super) fn for_the_cluster() -> Result<Vec<PathBuf>> {
    let folder = bed_folder();
    let coredns = Image::new(&coredns_name()?, &["/coredns"], "0:0")
        .program("/coredns", &COREDNS.program("coredns")?)?;
    coredns.write(&folder)?;
    let archives: Vec<_> = ["pause", "echo-advanced", "testapp", "coredns"]
        .map(|name| folder.join(format!("{name}.tar")))
        .into();
    for archive in &archives {
        ensure!(archive.exists(), "{} is missing (make images)", archive.display());
    }
    Ok(archives)
}

fn sha256(content: &[u8]) -> String {
    digest::digest(&digest::SHA256, content).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The ustar format, as far as images need it.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.header(path, mode, b'0', "", content.len())?;
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        Ok(())
    }

    fn special(&mut self, path: &str, mode: u32, kind: u8, to: &str) -> Result<()> {
        self.header(path, mode, kind, to, 0)
    }

    fn header(&mut self, path: &str, mode: u32, kind: u8, to: &str, size: usize) -> Result<()> {
        ensure!(path.len() < 100 && to.len() < 100, "{path}: too long for a tar header");
        let mut header = [0_u8; 512];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, path);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{size:011o}"));
        put(136, "00000000000");
        put(148, "        ");
        put(156, std::str::from_utf8(&[kind])?);
        put(157, to);
        put(257, "ustar\u{0}00");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        let text = format!("{sum:06o}\0 ");
        header[148..156].copy_from_slice(text.as_bytes());
        self.0.write_all(&header)?;
        Ok(())
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_are_the_same_image() {
        let image = || {
            Image::new("weft.test/a:1", &["/a"], "1:1")
                .file("/etc/b", b"b")
                .link("/bin/c", "a")
                .folder("/run", 0o755)
        };
        let folder = std::env::temp_dir().join(format!("weft-images-{}", std::process::id()));
        let first = image().write(&folder.join("one")).expect("written");
        let second = image().write(&folder.join("two")).expect("written");
        assert_eq!(first.digest, second.digest);
        assert_eq!(fs::read(&first.archive).expect("read"), fs::read(&second.archive).expect("read"));
        let listed = run(Command::new("tar").arg("-tvf").arg(&first.archive)).expect("tar reads it");
        assert_eq!(listed.lines().count(), 3, "{listed}");
        fs::remove_dir_all(folder).expect("removed");
    }
}
