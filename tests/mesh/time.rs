//! Clocks that are wrong or jump, connections that are idle for a working day, and pods of two address families.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use weft_control_plane::cli::demo::{
    mesh::{Mesh, Meshed, Workload, tail, wait},
    netns::{Pod, Process},
};
use weft_harness::apps::{Served, curl, load, mesh_or_skip, python, serve, service, skip, start, testapp};

use crate::{ECHO, Pair, pair};

/// A pair whose sidecars read a clock that a file moves (`+5m`, `-1h`): wall time alone, or all time.
struct Clocks {
    // Sidecars end before the mesh that they live in.
    client: Meshed,
    server: Served,
    files: [PathBuf; 2],
    mesh: Mesh,
}

fn clocks(test: &str, starts: [&str; 2], wall_only: bool) -> Option<Clocks> {
    let library = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib"]
        .map(|dir| format!("{dir}/faketime/libfaketime.so.1"))
        .into_iter()
        .find(|path| Path::new(path).exists());
    let Some(library) = library else {
        skip(test, "libfaketime is missing: make deps-test");
        return None;
    };
    let mesh = mesh_or_skip(test)?;
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080), ("raw", 91, 9100)]).unwrap();
    let files = ["client", "server"].map(|name| mesh.dir().join(format!("clock-{name}")));
    let workload = |name: &str, file: &PathBuf, start: &str| {
        std::fs::write(file, start).unwrap();
        let mut workload = Workload::new("shop", name);
        let env = [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", if wall_only { "1" } else { "0" }),
        ];
        // The library makes files named by the process, which is root's before it is the sidecar.
        let open = "chmod 666 /dev/shm/*faketime_*_$$; exec \"$@\"";
        workload.under = ["sh", "-c", open, "sh"].map(str::to_owned).to_vec();
        workload.env.extend(env.map(|(name, value)| (name.to_owned(), value.to_owned())));
        workload
    };
    let server = serve(&mesh, workload("echo-1", &files[1], starts[1]), &[]).unwrap();
    let client = mesh.workload(workload("client", &files[0], starts[0])).unwrap();
    for meshed in [&client, &server.sidecar] {
        // Mapped by now; a process that is killed leaves them.
        for file in ["sem.faketime_sem", "faketime_shm"] {
            let _ = std::fs::remove_file(format!("/dev/shm/{file}_{}", meshed.proxy.id()));
        }
    }
    Some(Clocks { client, server, files, mesh })
}

impl Clocks {
    /// Moves both clocks, and waits until both sidecars have seen it: each answers a request itself, and logs it.
    fn set(&self, to: &str, shows: impl Fn(&str) -> bool) {
        for file in &self.files {
            let fresh = file.with_extension("new");
            std::fs::write(&fresh, to).unwrap();
            std::fs::rename(&fresh, file).unwrap();
        }
        for meshed in [&self.client, &self.server.sidecar] {
            wait(Duration::from_secs(10), || {
                // Nobody is at this address: the caller's own sidecar says so.
                curl(&meshed.pod, &["-o", "/dev/null", "http://10.96.0.99/"]).ok();
                let log = std::fs::read_to_string(&meshed.log)?;
                let last =
                    log.lines().rev().find_map(|line| line.split("\"timestamp\":\"").nth(1)?.get(..16));
                Ok(last.is_some_and(&shows))
            })
            .unwrap();
        }
    }

    fn renewals(&self) -> f64 {
        let all = [&self.client, &self.server.sidecar];
        all.map(|meshed| meshed.metric("weft_certificate_renewals_total", &[]).unwrap()).iter().sum()
    }
}

/// The wall clock `hours` from now, to the minute, as logs show it; a minute is the machine's own.
fn shown(hours: i64) -> impl Fn(&str) -> bool {
    move |stamp: &str| {
        let now = output_date(hours);
        now.iter().any(|minute| minute == stamp)
    }
}

fn output_date(hours: i64) -> [String; 3] {
    ["-1 minute", "0 minute", "1 minute"].map(|off| {
        let when = format!("{hours:+} hours {off}");
        let args = ["-u", "-d", &when, "+%Y-%m-%dT%H:%M"];
        weft_harness::apps::output(std::process::Command::new("date").args(args)).unwrap()
    })
}

#[test]
fn clocks_of_two_nodes_may_be_five_minutes_off_each_way() {
    for starts in [["+5m", "-5m"], ["-5m", "+5m"]] {
        let Some(clocks) = clocks("skew", starts, false) else { return };
        let args = ["--url", ECHO, "--rate", "50", "--seconds", "1", "--half-post"];
        let summary = load(&clocks.mesh, &clocks.client.pod, &args).unwrap();
        let logs = [&clocks.client.log, &clocks.server.sidecar.log].map(|log| tail(log));
        assert_eq!(summary.failed, 0, "{starts:?}: {summary:?}\n{}", logs.join("\n"));
    }
}

#[test]
fn a_clock_that_jumps_an_hour_either_way_fails_no_request_and_starts_no_renewal_storm() {
    let Some(clocks) = clocks("jump", ["+0", "+0"], true) else { return };
    assert_eq!(curl(&clocks.client.pod, &[ECHO]).unwrap(), "ok");
    let before = clocks.renewals();
    for (to, hours) in [("+1h", 1), ("+0", 0), ("-1h", -1), ("+1h", 1)] {
        clocks.set(to, shown(hours));
        // New connections too: what was open proves nothing.
        let args = ["--url", ECHO, "--rate", "50", "--seconds", "1", "--half-post"];
        let summary = load(&clocks.mesh, &clocks.client.pod, &args).unwrap();
        assert_eq!(summary.failed, 0, "{to}: {summary:?}");
        let raw = "exec 3<>/dev/tcp/10.96.0.1/91; echo hi >&3; timeout 5 head -n 1 <&3";
        let pod = &clocks.server.sidecar.pod;
        let _app = start(&mut testapp(&clocks.mesh, pod, &["tcp", "--port", "9100"]), pod, 9100).unwrap();
        let said = weft_harness::apps::output(clocks.client.app("bash").args(["-c", raw])).unwrap();
        assert_eq!(said, "hi", "{to}");
    }
    let renewed = clocks.renewals() - before;
    println!(
        "figure: certificates asked for during four jumps of an hour or two, two sidecars: {renewed} (bound 2)"
    );
    assert!(renewed <= 2.0, "{renewed}");
}

/// A connection to an echo server that says a line, is idle until a file exists, and says another.
struct Idle {
    process: Process,
    lines: BufReader<std::process::ChildStdout>,
    go: PathBuf,
}

impl Idle {
    fn open(mesh: &Mesh, pod: &Pod, host: &str, port: u16) -> Self {
        // Its own: another connection of the same pod may have been told to go on.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let go = mesh.dir().join(format!("go-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let script = format!(
            "exec 3<>/dev/tcp/{host}/{port}; echo one >&3; head -n 1 <&3; until [ -e {} ]; do sleep 0.1; done; \
             echo two >&3; timeout 10 head -n 1 <&3",
            go.display()
        );
        let mut command = pod.command("bash");
        let mut process = Process::spawn(command.args(["-c", &script]).stdout(Stdio::piped())).unwrap();
        let mut lines = BufReader::new(process.child().stdout.take().unwrap());
        let mut one = String::new();
        lines.read_line(&mut one).unwrap();
        assert_eq!(one, "one\n");
        Self { process, lines, go }
    }

    /// What it hears after its silence.
    fn again(mut self) -> String {
        std::fs::write(&self.go, "").unwrap();
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).unwrap();
        drop(self.process);
        rest.trim().to_owned()
    }
}

#[test]
fn an_idle_connection_outlives_a_day_and_between_sidecars_its_certificate_counts() {
    let Some(clocks) = clocks("idle", ["+0", "+0"], false) else { return };
    let pod = &clocks.server.sidecar.pod;
    let _app = start(&mut testapp(&clocks.mesh, pod, &["tcp", "--port", "9100"]), pod, 9100).unwrap();
    let outsider = clocks.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let in_mesh = Idle::open(&clocks.mesh, &clocks.client.pod, "10.96.0.1", 91);
    let outside = Idle::open(&clocks.mesh, &outsider, &pod.ip.to_string(), 9100);
    // Less than what is left of any certificate: they are renewed when half has passed.
    clocks.set("+7h", shown(7));
    assert_eq!(in_mesh.again(), "two");
    let late = Idle::open(&clocks.mesh, &clocks.client.pod, "10.96.0.1", 91);
    let before = clocks.renewals();
    clocks.set("+32h", shown(32));
    assert_eq!(outside.again(), "two", "nothing ends a quiet plaintext connection");
    // A sleep does not see a clock that jumps; a sidecar does when it looks whether to renew its own certificate.
    wait(Duration::from_secs(60), || Ok(clocks.renewals() >= before + 2.0)).expect("both have run out");
    // Nobody vouches any more for who opened this one.
    assert_eq!(late.again(), "");
}

#[test]
fn endpoints_are_reached_over_either_family_and_an_app_may_listen_on_one() {
    let Some(pair) = pair("dual_stack", &[]) else { return };
    if !pair.mesh.world.has_ipv6() {
        return skip("dual_stack", "this kernel has no IPv6");
    }
    let Some(python) = python() else { return skip("dual_stack", "target/venv is missing: make deps-test") };
    let Pair { client, server, mesh } = &pair;
    let pod = &server.sidecar.pod;
    let mut apps = Vec::new();
    for (port, host) in [(9104_u16, "0.0.0.0"), (9106, "::")] {
        let serve = format!(
            "import http.server, socket\n\
             class Server(http.server.ThreadingHTTPServer):\n    address_family = socket.{}\n    def server_bind(self):\n        \
             self.address_family == socket.AF_INET6 and self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)\n        \
             super().server_bind()\n\
             class Handler(http.server.BaseHTTPRequestHandler):\n    def do_GET(self):\n        self.send_response(200)\n        \
             self.end_headers()\n        self.wfile.write(b'{port}')\n    def log_message(self, *a): pass\n\
             Server(('{host}', {port}), Handler).serve_forever()",
            if host == "::" { "AF_INET6" } else { "AF_INET" }
        );
        let mut command = pod.command(&python);
        let app = Process::spawn(command.args(["-c", &serve]).stdout(Stdio::null())).unwrap();
        let own =
            if host == "::" { format!("http://[::1]:{port}/") } else { format!("http://127.0.0.1:{port}/") };
        wait(Duration::from_secs(10), || Ok(curl(pod, &[&own]).is_ok())).unwrap();
        apps.push(app);
    }
    let both = serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "both"},
        "spec": {"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00:96::5"],
                 "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack", "selector": {"app": "echo"},
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080},
                           {"name": "http-four", "port": 84, "targetPort": 9104},
                           {"name": "http-six", "port": 86, "targetPort": 9106}]},
    });
    mesh.write("service-both.yaml", &format!("{both:#}\n")).unwrap();
    mesh.write(
        "mesh-config.yaml",
        "apiVersion: weft.dev/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: mesh\nspec:\n  \
         meshRanges: [10.77.0.0/16, \"fd00:77::/64\", 10.96.0.0/16, \"fd00:96::/64\"]\n",
    )
    .unwrap();
    for host in ["10.96.0.5", "[fd00:96::5]"] {
        for (port, says) in [(80, "ok"), (84, "9104"), (86, "9106")] {
            let url = format!("http://{host}:{port}/");
            let mut last = String::new();
            let answered = wait(Duration::from_secs(10), || {
                last = curl(&client.pod, &[&url]).unwrap_or_else(|error| error.to_string());
                Ok(last == says)
            });
            assert!(answered.is_ok(), "{url}: {last}");
        }
    }
}
