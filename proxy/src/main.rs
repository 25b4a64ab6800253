//! The sidecar's program: `weft-proxy` serves, `weft-proxy drain` is what a pod's preStop hook calls.

#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use weft_proxy::{admin, config::Config};

/// Small, and gives memory back: a sidecar's resident size is multiplied by the number of pods.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The sidecar ends the drain by its own timeout; this only ends waiting for a sidecar that hangs.
const DRAIN_PATIENCE: Duration = Duration::from_secs(3_600);

const HELP: &str = "\
Weft's sidecar proxy. Settings come from the environment (WEFT_*); `weft-proxy config` prints them.

Usage: weft-proxy [COMMAND]

Commands:
  (none)               serve
  drain [-o json]      tell peers, finish what is in flight, then return: what preStop calls
  config [-o json]     check the environment and print the effective settings

Options:
  --socket PATH        the running sidecar's admin socket (drain) [default: $WEFT_ADMIN_SOCKET]
  -h, --help           this text
  -V, --version        the version

Example:
  weft-proxy drain --socket /var/run/weft/admin.sock
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    let command = args.next_if(|a| !a.starts_with('-'));
    let (mut json, mut socket) = (false, None::<PathBuf>);
    while let Some(arg) = args.next() {
        match &*arg {
            "-h" | "--help" => return say(HELP),
            "-V" | "--version" => return say(concat!("weft-proxy ", env!("CARGO_PKG_VERSION"), "\n")),
            "-o" if args.next().as_deref() == Some("json") => json = true,
            "--socket" => socket = args.next().map(PathBuf::from),
            other => return fail(&format!("unknown argument {other:?}; see weft-proxy --help")),
        }
    }
    match command.as_deref() {
        None => serve(),
        Some("drain") => drain(socket, json),
        Some("config") => config(json),
        Some(other) => fail(&format!("unknown command {other:?}; see weft-proxy --help")),
    }
}

fn serve() -> ExitCode {
    // The allocator asks for huge pages, and a sidecar that holds 2 MiB would be given 20: refused before it has grown.
    // Where the kernel has none there is nothing to refuse.
    let _ = nix::sys::prctl::set_thp_disable(true);
    match Config::from_env() {
        Ok(config) => match weft_proxy::run(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.to_string()),
        },
        Err(errors) => fail(&errors.to_string()),
    }
}

fn drain(socket: Option<PathBuf>, json: bool) -> ExitCode {
    let socket = socket
        .or_else(|| std::env::var_os("WEFT_ADMIN_SOCKET").map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from(weft_proxy::config::ADMIN_SOCKET));
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start a runtime: {error}")),
    };
    match runtime.block_on(admin::call(&socket, http::Method::POST, "/drain", DRAIN_PATIENCE)) {
        Ok((status, body)) => {
            let drained = status == 200;
            let text = if json { format!("{{\"drained\":{drained}}}\n") } else { body };
            say(&text);
            if drained { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => fail(&format!("{}: {error}; is the sidecar running?", socket.display())),
    }
}

fn config(json: bool) -> ExitCode {
    match Config::from_env() {
        Ok(config) => {
            let settings = config.effective();
            if json {
                let object: serde_json::Map<_, _> =
                    settings.iter().map(|(n, v, _)| ((*n).to_owned(), v.as_str().into())).collect();
                return say(&format!("{}\n", serde_json::Value::Object(object)));
            }
            let lines: String = settings
                .iter()
                .map(|(n, v, set)| format!("{n}={v}{}\n", if *set { "" } else { "  (default)" }))
                .collect();
            say(&lines)
        }
        Err(errors) => fail(&errors.to_string()),
    }
}

fn say(text: &str) -> ExitCode {
    use std::io::Write as _;
    // Nobody reads any more: nothing to tell them.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn fail(text: &str) -> ExitCode {
    eprintln!("weft-proxy: {text}");
    ExitCode::FAILURE
}
