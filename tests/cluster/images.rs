//! The images: what is in them has to be enough. (That names resolve in one, `bed` shows: its client is such a program.)

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use weft_harness::apps;

/// The static programs that `make images` put there.
fn program(test: &str, name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/images/programs").join(name);
    if !path.exists() {
        apps::skip(test, "no static programs (make images)");
        return None;
    }
    Some(path)
}

/// Runs a program with nothing around it but what kubelet would put there.
fn alone(root: &Path, program: &Path, args: &[&str]) -> Output {
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::copy(program, root.join("program")).unwrap();
    Command::new("/usr/sbin/chroot").arg(root).arg("/program").args(args).env_clear().output().unwrap()
}

#[test]
fn a_program_needs_nothing_beside_itself_to_start() {
    for name in ["weft-proxy", "weft-controller", "weft", "weft-iptables"] {
        let Some(program) = program("a_program_needs_nothing", name) else { return };
        let root = std::env::temp_dir().join(format!("weft-root-{}-{name}", std::process::id()));
        let said = alone(&root, &program, &["--version"]);
        std::fs::remove_dir_all(&root).unwrap();
        assert!(said.status.success(), "{name}: {}", String::from_utf8_lossy(&said.stderr));
    }
}
