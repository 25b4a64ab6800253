//! What a hardened process can and cannot do, shown by processes that try.
//!
//! Why this program starts itself again: what is given up cannot be taken back, so each attempt needs a process of
//! its own. The child is the test `child`, told by a variable what to try.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    net::ToSocketAddrs as _,
    os::unix::{net::UnixListener, process::ExitStatusExt as _},
    path::PathBuf,
    process::{Command, Output},
};

use weft_proxy::harden::{Harden, apply};

const TRY: &str = "WEFT_TEST_TRY";
/// SIGSYS, on x86-64 and aarch64.
const SIGSYS: i32 = 31;

fn attempt(what: &str, how: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env(TRY, format!("{what} {how}"));
    command.env_remove("RUST_BACKTRACE");
    command.output().unwrap()
}

fn folder(what: &str) -> PathBuf {
    std::env::temp_dir().join(format!("weft-harden-{what}-{}", std::process::id()))
}

/// Does one thing in a hardened process and says how it went; nothing unless it was asked to.
#[test]
fn child() {
    let Ok(asked) = std::env::var(TRY) else { return };
    let (what, how) = asked.split_once(' ').unwrap();
    let folder = folder(what);
    let socket = folder.join("admin.sock");
    let notes = apply(how.parse::<Harden>().unwrap(), &socket).unwrap();
    let said = match what {
        "serve" => {
            // What every sidecar does, beside moving bytes.
            drop(UnixListener::bind(&socket).unwrap());
            fs::remove_file(&socket).unwrap();
            assert!(("localhost", 80).to_socket_addrs().is_ok());
            assert!(fs::read_to_string("/proc/self/statm").is_ok());
            assert!(fs::read_dir("/proc/self/fd").unwrap().count() > 2);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let read = runtime.block_on(async {
                let panicked = tokio::spawn(async { panic!("of one connection") }).await;
                assert!(panicked.is_err());
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = listener.local_addr().unwrap();
                let (accepted, connected) =
                    tokio::join!(listener.accept(), tokio::net::TcpStream::connect(address));
                assert!(accepted.is_ok() && connected.is_ok());
                tokio::fs::read("/proc/self/status").await
            });
            assert!(read.is_ok());
            std::thread::spawn(|| vec![1_u8; 64 << 20].len()).join().unwrap();
            "served".to_owned()
        }
        "write" => format!("{:?}", fs::write(folder.with_extension("txt"), "x").map_err(|e| e.kind())),
        "execute" => format!("{:?}", Command::new("/bin/true").spawn().map(drop).map_err(|e| e.kind())),
        "link" => format!("{:?}", std::os::unix::fs::symlink("a", folder.join("b")).map_err(|e| e.kind())),
        other => panic!("{other}"),
    };
    let _ = fs::remove_dir_all(&folder);
    println!("said {said}; notes {notes:?}");
}

#[test]
fn a_hardened_process_does_all_that_a_sidecar_does() {
    for how in ["on", "eperm"] {
        let output = attempt("serve", how);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("said served"), "{how}: {output:?}");
    }
}

#[test]
fn a_call_that_is_not_on_the_list_ends_the_process_or_fails() {
    let killed = attempt("link", "on");
    assert_eq!(killed.status.signal(), Some(SIGSYS), "{killed:?}");
    assert!(!killed.status.core_dumped());
    let refused = attempt("link", "eperm");
    let text = String::from_utf8_lossy(&refused.stdout);
    assert!(text.contains("said Err(PermissionDenied)"), "{refused:?}");
}

#[test]
fn a_hardened_process_starts_no_program() {
    let output = attempt("execute", "on");
    let text = String::from_utf8_lossy(&output.stdout);
    let ended = output.status.signal() == Some(SIGSYS);
    assert!(ended || text.contains("said Err(PermissionDenied)"), "{output:?}");
}

#[test]
fn a_hardened_process_writes_no_file() {
    let output = attempt("write", "on");
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("no landlock") {
        println!("skipped: this kernel has no landlock");
        return;
    }
    assert!(text.contains("said Err(PermissionDenied)"), "{output:?}");
}

#[test]
fn off_changes_nothing_and_says_so() {
    let output = attempt("link", "off");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("WEFT_HARDEN=off") && !text.contains("PermissionDenied"), "{output:?}");
}
