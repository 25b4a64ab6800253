//! What a sidecar has given up, and what cannot be found: the process as an intruder would meet it.
//!
//! Every other test here runs under the same profile, which is on by default: that the mesh works under it is shown
//! by all of them together.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use weft_control_plane::cli::demo::mesh::{Options, Workload};
use weft_harness::apps::{curl, mesh_with, output, serve, service, skip};

use crate::{ECHO, pair};

/// `/proc/<pid>/task/*/status`, each as a table.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let table = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("status")).unwrap();
        let pairs = text.lines().filter_map(|line| line.split_once(":\t"));
        pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    tasks.map(|task| table(task.unwrap())).collect()
}

fn core_limit(pid: u32) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    line.split_whitespace().skip(4).take(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_sidecar_has_no_capability_no_dump_and_a_list_of_system_calls() {
    let Some(mut pair) = pair("hardened", &[]) else { return };
    assert_eq!(curl(&pair.client.pod, &[ECHO]).unwrap(), "ok");
    for sidecar in [&pair.client, &pair.server.sidecar] {
        let pid = sidecar.proxy.id();
        let threads = threads(pid);
        assert!(threads.len() >= 2, "control and data: {}", threads.len());
        for thread in &threads {
            let name = &thread["Name"];
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(thread[set], "0000000000000000", "{set} of thread {name}");
            }
            assert_eq!(thread["NoNewPrivs"], "1", "thread {name}");
            assert_eq!(thread["Seccomp"], "2", "thread {name}");
            assert_eq!(thread["Uid"].split_whitespace().next(), Some("2102"), "thread {name}");
        }
        assert_eq!(core_limit(pid), "0 0");
        // The kernel gives the files of a process that must not be dumped to root.
        let owner = fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid();
        assert_eq!(owner, 0, "the sidecar's memory is open to its user");
        println!(
            "figure: {}: {} threads without capability, under seccomp",
            sidecar.workload.name,
            threads.len()
        );
    }
    let controller = pair.mesh.controller().unwrap().id();
    assert!(threads(controller).iter().all(|thread| thread["NoNewPrivs"] == "1"));
    assert_eq!(core_limit(controller), "0 0");
}

#[test]
fn hardening_that_is_off_says_so() {
    let Some(mesh) = mesh_with("hardening_off", Options::with_env(&[("WEFT_HARDEN", "off")])) else { return };
    let sidecar = mesh.workload(Workload::new("shop", "web-1")).unwrap();
    assert!(threads(sidecar.proxy.id()).iter().all(|thread| thread["Seccomp"] == "0"));
    let log = fs::read_to_string(&sidecar.log).unwrap();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("WEFT_HARDEN=off")), "{log}");
}

#[test]
fn nothing_is_written_to_disk_and_no_secret_is_told() {
    const TEST: &str = "secrets";
    const TOKEN: &str = "planted-9c27-bearer";
    if output(std::process::Command::new("strace").arg("-V")).is_err() {
        return skip(TEST, "strace is not installed");
    }
    let traces = std::env::temp_dir().join(format!("weft-traces-{}", std::process::id()));
    let _remove = Folder::make(&traces);
    // Asked for by whoever owns the pod's environment: the keys of every connection in a file.
    let keys = traces.join("keys");
    // A sidecar's environment is its own; strace searches its programs by PATH.
    let under = [
        "env",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "strace",
        "-D",
        "-ff",
        "-qq",
        "-e",
        "trace=%file",
        "-o",
    ]
    .map(str::to_owned);
    let env = [("WEFT_LOG", "trace"), ("SSLKEYLOGFILE", &keys.display().to_string())];
    let options = Options {
        under: under.into_iter().chain([traces.join("trace").display().to_string()]).collect(),
        ..Options::with_env(&env).controller(&["--log", "trace"])
    };
    let Some(mesh) = mesh_with(TEST, options) else { return };
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let server = serve(&mesh, Workload::new("shop", "echo-1"), &[]).unwrap();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    let authorization = format!("authorization: Bearer {TOKEN}");
    let url = format!("{ECHO}/echo");
    for more in [&[][..], &["--http2-prior-knowledge"]] {
        let args = [&["-H", &authorization, "-d", TOKEN, &url][..], more].concat();
        assert_eq!(curl(&client.pod, &args).unwrap(), TOKEN);
    }

    // What everybody says about themselves.
    let mut told = BTreeMap::new();
    for sidecar in [&client, &server.sidecar] {
        let name = &sidecar.workload.name;
        told.insert(format!("log of {name}"), fs::read_to_string(&sidecar.log).unwrap());
        told.insert(format!("metrics of {name}"), sidecar.metrics().unwrap());
        for path in ["/config", "/metrics", "/explain"] {
            told.insert(format!("{path} of {name}"), sidecar.admin("GET", path).unwrap().1);
        }
    }
    told.insert("log of the controller".to_owned(), fs::read_to_string(mesh.log("controller")).unwrap());
    let log = &told["log of client"];
    assert!(log.contains("TRACE"), "everything is logged: {log}");
    // Join tokens, the key that signs them, and the issuer's; a key of any workload would be in one of its forms.
    let state = mesh.dir().join("state");
    let mut secrets = vec![TOKEN.to_owned(), "PRIVATE KEY".to_owned()];
    secrets.extend(
        ["MIGHAgEAMBMGByqGSM49", "30770201010420", "308187020100301306072a8648ce3d"].map(str::to_owned),
    );
    for file in files(&mesh.dir().join("run")).into_iter().chain(files(&state)) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if name == "token" || name.starts_with("join") {
            secrets.push(fs::read_to_string(&file).unwrap().trim().to_owned());
        } else if name.starts_with("root-") {
            let text = fs::read_to_string(&file).unwrap();
            let key = text.split("PRIVATE KEY-----").nth(1).unwrap();
            secrets.extend(key.lines().filter(|line| line.len() > 20).map(str::to_owned));
        }
    }
    assert!(secrets.len() >= 5 + 4, "two join tokens, the join key and the issuer's: {}", secrets.len());
    for secret in &secrets {
        for (what, text) in &told {
            assert!(!text.contains(secret), "a secret ({} bytes) is in {what}", secret.len());
        }
    }

    // What was opened for writing, made or removed, by whom and where.
    let (mut writes, mut calls) = (Vec::new(), 0);
    for file in files(&traces) {
        for line in fs::read_to_string(&file).unwrap().lines() {
            calls += 1;
            if changes_files(line) && !line.contains(" = -1 ") {
                writes.push(line.to_owned());
            }
        }
    }
    let allowed = [mesh.dir().join("run"), state].map(|path| format!("\"{}", path.display()));
    let strange: Vec<_> = writes
        .iter()
        .filter(|line| !allowed.iter().any(|path| line.contains(path)) && !line.contains("\"/dev/null\""))
        .collect();
    println!(
        "figure: secrets told: 0 of {} in {} texts; {calls} calls that name a file, {} that change one, {} of them \
         outside of socket and state (bound 0)",
        secrets.len(),
        told.len(),
        writes.len(),
        strange.len()
    );
    assert!(calls > 100, "the sidecars were traced: {calls}");
    assert!(strange.is_empty(), "{strange:#?}");
    assert!(!keys.exists(), "SSLKEYLOGFILE was honoured");
    drop(server);
}

/// Whether a traced call makes, changes or removes a file.
fn changes_files(line: &str) -> bool {
    let Some((call, rest)) = line.split_once('(') else { return false };
    match call {
        "open" | "openat" | "openat2" => {
            ["O_WRONLY", "O_RDWR", "O_CREAT"].iter().any(|flag| rest.contains(flag))
        }
        "access" | "faccessat" | "faccessat2" | "stat" | "lstat" | "newfstatat" | "statx" | "statfs"
        | "readlink" | "readlinkat" | "execve" | "chdir" | "getcwd" | "inotify_add_watch" => false,
        // A call that this list does not know is looked at.
        _ => true,
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.is_file() {
            found.push(path);
        }
    }
    found
}

/// A folder that goes when the test does.
struct Folder(PathBuf);

impl Folder {
    fn make(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // It lies in the temporary folder, which is what that is for.
        let _ = fs::remove_dir_all(&self.0);
    }
}
