//! House rules that a compiler does not check, as tests: a rule that nothing enforces is a wish.
//!
//! Each test lists every violation, not the first, and says what the rule is for. Where a rule has an
//! exception, the exception stands in a list in this file, with its reason.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What may lie at the top: everything else has a place further down.
const TOP: [&str; 17] = [
    ".cargo",
    ".ci",
    ".gitignore",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "charts",
    "control-plane",
    "deny.toml",
    "iptables",
    "proto",
    "proxy",
    "rustfmt.toml",
    "tests",
];

/// Who may use whom (normal and build dependencies within the workspace).
const DIRECTION: [(&str, &[&str]); 6] = [
    ("weft-core", &[]),
    ("weft-proto", &["weft-core"]),
    ("weft-proxy", &["weft-core", "weft-proto"]),
    ("weft-control-plane", &["weft-core", "weft-proto"]),
    ("weft-iptables", &["weft-core"]),
    ("weft-tests", &["weft-core", "weft-proto", "weft-proxy", "weft-control-plane", "weft-iptables"]),
];

/// The core decides; whatever could make a decision depend on more than its arguments is not in it.
const CORE_DEPENDENCIES: [&str; 5] = ["http", "ipnet", "rand_core", "regex", "thiserror"];

/// Crates whose top-level modules import each other in one direction.
const LAYERED: [&str; 3] = ["proxy/core/src/", "proxy/src/", "control-plane/src/"];

/// Versions below which lie known holes: the same as in deny.toml.
const FLOORS: [(&str, [u64; 3]); 6] = [
    ("aws-lc-sys", [0, 39, 0]),
    ("h2", [0, 4, 18]),
    ("hyper", [1, 11, 0]),
    ("rustls", [0, 23, 18]),
    ("rustls-webpki", [0, 103, 13]),
    ("tonic", [0, 12, 3]),
];

/// Never linked, whatever asks for them.
const BANNED: [&str; 5] = ["native-tls", "openssl", "openssl-sys", "serde_yaml", "serde_yml"];

/// Folders and files of pure code: told the time, handed randomness, doing no input or output.
const PURE: [&str; 7] = [
    "proxy/core/src",
    "proto/src/ads",
    "proto/src/convert",
    "control-plane/src/index",
    "control-plane/src/injector/patch.rs",
    "iptables/src/config.rs",
    "iptables/src/rules.rs",
];

/// What pure code does not say, and why.
const IMPURE: [(&str, &str); 12] = [
    ("Instant::now(", "takes the time itself: let the caller pass it"),
    ("SystemTime::now(", "takes the time itself: let the caller pass it"),
    ("rand::rng(", "has its own randomness: let the caller pass it"),
    ("thread_rng(", "has its own randomness: let the caller pass it"),
    ("OsRng", "has its own randomness: let the caller pass it"),
    ("tokio::", "knows the runtime"),
    ("kube::", "knows the API server"),
    ("std::fs::", "reads or writes files"),
    ("TcpStream", "opens connections"),
    ("UdpSocket", "opens connections"),
    ("tracing::", "logs: return the reason as data"),
    ("println!", "prints: return the reason as data"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file of the repository, by its path from the root: what git tracks and what it would.
fn files() -> Vec<String> {
    let git = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    if let Ok(output) = git
        && output.status.success()
    {
        let listed = String::from_utf8(output.stdout).unwrap();
        return listed.lines().filter(|path| root().join(path).exists()).map(str::to_owned).collect();
    }
    // An unpacked archive has no git.
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && relative != "target" && relative != ".git" {
                folders.push(path);
            } else if path.is_file() {
                found.push(relative);
            }
        }
    }
    found.sort_unstable();
    found
}

fn rust_files() -> Vec<String> {
    files().into_iter().filter(|path| path.ends_with(".rs")).collect()
}

/// Lines of code outside of comments and of the test module that ends a file, with their numbers.
fn code(path: &str) -> Vec<(usize, String)> {
    let text = read(path);
    let mut lines = Vec::new();
    let mut after_cfg_test = false;
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let module = trimmed.trim_start_matches("pub(crate) ").starts_with("mod ");
        if after_cfg_test && module && trimmed.ends_with('{') && !line.starts_with(' ') {
            break;
        }
        after_cfg_test = trimmed == "#[cfg(test)]" || (after_cfg_test && trimmed.starts_with("#["));
        if !trimmed.starts_with("//") {
            let code = line.split(" // ").next().unwrap_or(line);
            lines.push((number + 1, code.to_owned()));
        }
    }
    lines
}

fn report(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}:\n  {}\n", violations.join("\n  "));
}

#[test]
fn every_file_opens_with_its_argument() {
    let violations: Vec<String> = rust_files()
        .into_iter()
        .filter(|path| {
            let text = read(path);
            let first = text.lines().next().unwrap_or_default();
            let words = first.strip_prefix("//! ").unwrap_or_default().split_whitespace().count();
            words < 3 && !path.starts_with("proto/src/gen/")
        })
        .collect();
    report("the first line of a file says what it is for (`//! ...`)", &violations);
}

#[test]
fn pure_code_takes_no_time_and_does_no_io() {
    let mut violations = Vec::new();
    for path in rust_files().iter().filter(|path| PURE.iter().any(|pure| path.starts_with(pure))) {
        if path.ends_with("/tests.rs") || path.contains("/tests/") {
            continue;
        }
        for (number, line) in code(path) {
            for (word, why) in IMPURE {
                if line.contains(word) {
                    violations.push(format!("{path}:{number} {why}: {}", line.trim()));
                }
            }
        }
    }
    report("pure code is told everything that it decides upon", &violations);
}

#[test]
fn the_proxy_reads_only_a_clock_that_tests_can_move() {
    let mut violations = Vec::new();
    for path in rust_files().iter().filter(|path| path.starts_with("proxy/src/")) {
        let lines = code(path);
        let std_instant = lines.iter().any(|(_, line)| {
            line.trim_start().starts_with("use std::time::")
                && line.split(|c: char| !c.is_alphanumeric()).any(|word| word == "Instant")
        });
        for (number, line) in &lines {
            let std_clock = line.contains("std::time::Instant::now(")
                || (std_instant && line.contains("Instant::now(") && !line.contains("time::Instant::now("));
            if std_clock {
                violations.push(format!("{path}:{number} {}", line.trim()));
            }
        }
    }
    report(
        "time in the proxy is tokio::time::Instant::now().into_std(): paused clocks then move all of it",
        &violations,
    );
}

#[test]
fn no_test_is_ignored_without_a_reason() {
    let mut violations = Vec::new();
    for path in rust_files() {
        for (number, line) in read(&path).lines().enumerate() {
            if line.trim_start().starts_with("#[ignore]") {
                violations.push(format!("{path}:{}", number + 1));
            }
        }
    }
    report("#[ignore = \"why\"]", &violations);
}

#[test]
fn nothing_is_left_for_later_unnamed() {
    // The lints refuse the macros; words in comments are for whoever reads, and readers cannot file them.
    let marks =
        ["TO", "FIX", "XX"].iter().zip(["DO", "ME", "X"]).map(|(a, b)| format!("{a}{b}")).collect::<Vec<_>>();
    let mut violations = Vec::new();
    for path in rust_files().iter().filter(|path| !path.starts_with("proto/src/gen/")) {
        for (number, line) in read(path).lines().enumerate() {
            let words = line.split(|c: char| !c.is_ascii_alphanumeric());
            if words.into_iter().any(|word| marks.iter().any(|mark| word == mark)) {
                violations.push(format!("{path}:{} {}", number + 1, line.trim()));
            }
        }
    }
    report("what is missing stands in the README, or is an issue", &violations);
}

#[test]
fn inbound_and_outbound_do_not_know_each_other() {
    let mut violations = Vec::new();
    let uses = |path: &str, module: &str| {
        let (crate_path, relative) = (format!("crate::{module}"), format!("super::super::{module}"));
        code(path).into_iter().filter(move |(_, line)| {
            [&crate_path, &relative].iter().any(|name| {
                line.match_indices(name.as_str()).any(|(at, _)| {
                    let next = line[at + name.len()..].chars().next();
                    !next.is_some_and(|c| c.is_alphanumeric() || c == '_')
                })
            })
        })
    };
    for path in rust_files() {
        let Some(inner) = path.strip_prefix("proxy/src/") else { continue };
        let forbidden: &[&str] = if inner.starts_with("inbound/") || inner == "inbound.rs" {
            &["outbound"]
        } else if inner.starts_with("outbound/") || inner == "outbound.rs" {
            &["inbound"]
        } else if ["pool", "tls", "telemetry", "discovery"]
            .iter()
            .any(|module| inner == format!("{module}.rs") || inner.starts_with(&format!("{module}/")))
        {
            &["inbound", "outbound"]
        } else {
            &[]
        };
        for module in forbidden {
            for (number, line) in uses(&path, module) {
                violations.push(format!("{path}:{number} uses {module}: {}", line.trim()));
            }
        }
    }
    report(
        "inbound and outbound meet in pool, tls, telemetry and discovery, which know neither",
        &violations,
    );
}

/// A reader who wants one module then has to know only those below it, and a change above reaches nothing below.
#[test]
fn modules_import_each_other_in_one_direction() {
    let mut violations = Vec::new();
    for source in LAYERED {
        let uses = uses_between_modules(source);
        let below = |from: &str| {
            let (mut reached, mut next) = (BTreeSet::new(), vec![from.to_owned()]);
            while let Some(module) = next.pop() {
                let used = uses.keys().filter(|(user, _)| *user == module).map(|(_, used)| used);
                next.extend(used.filter(|used| reached.insert((*used).clone())).cloned());
            }
            reached
        };
        for ((user, used), place) in &uses {
            if below(used).contains(user) {
                violations.push(format!("{place} {user} uses {used}, which leads back to {user}"));
            }
        }
    }
    report("no circles: what two modules share belongs below both", &violations);
}

/// Which top-level module of a crate uses which other one, and where first; tests may use whatever they like.
fn uses_between_modules(source: &str) -> BTreeMap<(String, String), String> {
    let paths: Vec<String> = rust_files().into_iter().filter(|path| path.starts_with(source)).collect();
    let parts = |path: &str| -> Vec<String> {
        let inner = path.strip_prefix(source).and_then(|inner| inner.strip_suffix(".rs")).unwrap();
        inner.split('/').filter(|part| *part != "mod").map(str::to_owned).collect()
    };
    let is_root = |module: &str| ["lib", "main", "bin"].contains(&module);
    let modules: BTreeSet<String> =
        paths.iter().map(|path| parts(path).swap_remove(0)).filter(|module| !is_root(module)).collect();
    // `#[cfg(test)] mod name;`: a file of its own that is no part of the product.
    let of_tests: BTreeSet<Vec<String>> = paths
        .iter()
        .flat_map(|path| {
            let text = read(path);
            let declared = text.split("#[cfg(test)]\n").skip(1).filter_map(|rest| {
                let line = rest.lines().next()?.trim().trim_start_matches("pub(crate) ");
                line.strip_prefix("mod ")?.strip_suffix(';').map(str::to_owned)
            });
            let parent = parts(path);
            let parent = if is_root(&parent[0]) { Vec::new() } else { parent };
            declared.map(|name| [parent.clone(), vec![name]].concat()).collect::<Vec<_>>()
        })
        .collect();
    let mut uses = BTreeMap::new();
    for path in &paths {
        let parts = parts(path);
        if is_root(&parts[0]) || (1..=parts.len()).any(|n| of_tests.contains(&parts[..n])) {
            continue;
        }
        let lines = code(path);
        let text: String = lines.iter().map(|(_, line)| format!("{line}\n")).collect();
        for root in ["crate::".to_owned(), "super::".repeat(parts.len())] {
            for (at, _) in text.match_indices(&root) {
                if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
                    continue;
                }
                for used in first_names(&text[at + root.len()..]) {
                    if modules.contains(used) && *used != *parts[0] {
                        let number = lines[text[..at].matches('\n').count()].0;
                        uses.entry((parts[0].clone(), used.to_owned()))
                            .or_insert_with(|| format!("{path}:{number}"));
                    }
                }
            }
        }
    }
    uses
}

/// What a path begins with: its first name, or those of a list in braces.
fn first_names(path: &str) -> Vec<&str> {
    let name = |text: &'_ str| text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    let Some(list) = path.strip_prefix('{') else { return vec![&path[..name(path)]] };
    let (mut names, mut depth, mut begins) = (Vec::new(), 0_usize, true);
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' => begins = depth == 0,
            c if begins && depth == 0 && !c.is_whitespace() => {
                names.push(&list[at..at + name(&list[at..])]);
                begins = false;
            }
            _ => {}
        }
    }
    names
}

#[test]
fn crates_depend_in_one_direction() {
    let packages = metadata();
    let mut violations = Vec::new();
    for (name, allowed) in DIRECTION {
        let package = packages.get(name).unwrap_or_else(|| panic!("there is no crate {name}"));
        for dependency in package.normal.iter().filter(|dependency| dependency.starts_with("weft-")) {
            if !allowed.contains(&dependency.as_str()) {
                violations.push(format!("{name} -> {dependency}"));
            }
        }
    }
    for name in packages.keys().filter(|name| DIRECTION.iter().all(|(known, _)| known != name)) {
        violations.push(format!("{name} has no place in the order"));
    }
    report("core <- proto <- { proxy, control-plane } <- tests; iptables -> core", &violations);
}

#[test]
fn the_core_depends_on_types_only() {
    let packages = metadata();
    let extra: Vec<String> = packages["weft-core"]
        .normal
        .iter()
        .filter(|name| !CORE_DEPENDENCIES.contains(&name.as_str()))
        .cloned()
        .collect();
    report("weft-core has no runtime, sockets, clock, random source or logging", &extra);
}

#[test]
fn every_crate_takes_the_workspaces_lints_and_versions() {
    let workspace = read("Cargo.toml");
    for lint in
        ["unsafe_code = \"deny\"", "unwrap_used = ", "wildcard_enum_match_arm = ", "dbg_macro = ", "todo = "]
    {
        assert!(workspace.contains(lint), "[workspace.lints] lacks {lint}");
    }
    let mut violations = Vec::new();
    for path in files().iter().filter(|path| path.ends_with("/Cargo.toml")) {
        let manifest = read(path);
        if !manifest.contains("[lints]\nworkspace = true") {
            violations.push(format!("{path} does not take [workspace.lints]"));
        }
        let mut section = "";
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            } else if section.ends_with("dependencies]")
                && line.contains('=')
                && !line.starts_with('#')
                && !line.contains("workspace = true")
            {
                violations.push(format!("{path} names a version of its own: {line}"));
            }
        }
    }
    report("lints and versions are stated once, in the root's Cargo.toml", &violations);
}

#[test]
fn no_crate_that_ships_has_unsafe_code() {
    let mut violations = Vec::new();
    for path in rust_files() {
        let root_of_crate =
            ["proxy/src/", "proxy/core/src/", "proto/src/", "control-plane/src/", "iptables/src/"]
                .iter()
                .any(|folder| {
                    path.strip_prefix(folder).is_some_and(|rest| {
                        rest == "lib.rs"
                            || rest == "main.rs"
                            || (rest.starts_with("bin/") && rest.ends_with(".rs"))
                    })
                });
        if root_of_crate && !read(&path).contains("#![forbid(unsafe_code)]") {
            violations.push(path);
        }
    }
    report("the root of every crate that ships says #![forbid(unsafe_code)]", &violations);
}

#[test]
fn no_locked_version_has_a_known_hole() {
    let mut violations = Vec::new();
    let locked = locked();
    for (name, floor) in FLOORS {
        let versions: Vec<&String> =
            locked.iter().filter(|(n, _)| n == name).map(|(_, version)| version).collect();
        assert!(!versions.is_empty(), "{name} is not locked: is its floor still of use?");
        for version in versions {
            let numbers: Vec<u64> = version
                .split(['-', '+'])
                .next()
                .unwrap_or_default()
                .split('.')
                .map(|number| number.parse().unwrap())
                .collect();
            if numbers[..] < floor[..] {
                violations.push(format!("{name} {version} is below {floor:?}"));
            }
        }
    }
    for (name, version) in &locked {
        if BANNED.contains(&name.as_str()) {
            violations.push(format!("{name} {version} is banned"));
        }
    }
    report("see deny.toml for the reasons", &violations);
    // Both lists say the same.
    let deny = read("deny.toml");
    for (name, [a, b, c]) in FLOORS {
        assert!(deny.contains(&format!("\"{name}:<{a}.{b}.{c}\"")), "deny.toml has another floor for {name}");
    }
    for name in BANNED {
        assert!(deny.contains(&format!("crate = \"{name}\"")), "deny.toml does not ban {name}");
    }
}

/// It stands in Cargo.lock as an option of rustls and others; what counts is what gets linked.
#[test]
fn ring_is_not_linked() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--workspace", "--offline", "--locked", "--invert", "ring", "--edges", "all"])
        .current_dir(root())
        .output()
        .unwrap();
    let tree = String::from_utf8_lossy(&output.stdout);
    // cargo knows the name and prints nothing, or does not know it at all: either is fine.
    assert!(tree.trim().is_empty(), "ring is linked by:\n{tree}");
    let error = String::from_utf8_lossy(&output.stderr);
    let absent = error.contains("nothing to print") || error.contains("did not match any packages");
    assert!(output.status.success() || absent, "cargo tree: {error}");
}

#[test]
fn the_top_level_stays_small() {
    let top: BTreeSet<String> =
        files().iter().map(|path| path.split('/').next().unwrap().to_owned()).collect();
    let violations: Vec<String> = top.into_iter().filter(|entry| !TOP.contains(&entry.as_str())).collect();
    report("everything has a place in a crate, in charts or in tests", &violations);
}

#[test]
fn the_readmes_commands_exist() {
    let makefile = read("Makefile");
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| line.strip_prefix(".PHONY: "))
        .flat_map(str::split_whitespace)
        .collect();
    let mut violations = Vec::new();
    for path in files().iter().filter(|path| path.ends_with(".md")) {
        let text = read(path);
        // In a code block or between backticks; "make sure" in a sentence is not a command.
        let mut in_block = false;
        for line in text.lines() {
            if line.trim_start().starts_with("```") {
                in_block = !in_block;
                continue;
            }
            let commands: Vec<&str> =
                if in_block { vec![line.trim()] } else { line.split('`').skip(1).step_by(2).collect() };
            for target in
                commands.iter().filter_map(|c| c.strip_prefix("make ")?.split([' ', ')', ';']).next())
            {
                if !targets.contains(target) {
                    violations.push(format!("{path}: make {target}"));
                }
            }
        }
    }
    report("a command in a document is in the Makefile", &violations);
    for target in ["demo", "test", "bench", "soak", "fmt"] {
        assert!(targets.contains(target), "the Makefile lacks {target}");
    }
}

#[test]
fn the_readmes_links_lead_somewhere() {
    let mut violations = Vec::new();
    for path in files().iter().filter(|path| path.ends_with(".md")) {
        let folder = root().join(path).parent().unwrap().to_path_buf();
        for link in read(path).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if !file.is_empty() && !file.contains("://") && !folder.join(file).exists() {
                violations.push(format!("{path}: {link}"));
            }
        }
    }
    report("a link in a document leads to a file", &violations);
}

/// The table is how a reader finds the test of a behaviour: a name in it that no test bears leads nowhere.
#[test]
fn the_tests_that_behaviours_name_exist() {
    let tests: Vec<(String, String)> = rust_files()
        .iter()
        .flat_map(|path| tests_of(path).into_iter().map(|name| (path.clone(), name)))
        .collect();
    let mut violations = Vec::new();
    let documents = ["tests/BEHAVIOURS.md", "SECURITY.md"].map(|path| (path, read(path)));
    let lines = documents
        .iter()
        .flat_map(|(path, text)| text.lines().enumerate().map(move |(number, line)| (path, number, line)));
    for (path, number, line) in lines {
        let heading = |row: &&str| row.starts_with("behaviour |") || row.starts_with("it cannot |");
        let Some(row) = line.strip_prefix("| ").filter(|row| !heading(row)) else { continue };
        let names: Vec<&str> =
            row.rsplit(" | ").next().unwrap_or_default().split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            violations.push(format!("{path}:{} names no test", number + 1));
        }
        for name in names {
            // `module::test`, or the test alone.
            let (module, test) = name.rsplit_once("::").unwrap_or(("", name));
            let is_there = |path: &str| {
                module.is_empty()
                    || path.ends_with(&format!("/{module}.rs"))
                    || path.contains(&format!("/{module}/"))
            };
            if !tests.iter().any(|(path, known)| known == test && is_there(path)) {
                violations.push(format!("{path}:{} {name}", number + 1));
            }
        }
    }
    report("a behaviour names the tests that show it", &violations);
}

/// The names of a file's tests: functions with the attribute, and no others.
fn tests_of(path: &str) -> Vec<String> {
    let (mut names, mut is_test) = (Vec::new(), false);
    for line in read(path).lines().map(str::trim_start) {
        if line.starts_with("#[") {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            continue;
        }
        let name = line.split_once("fn ").and_then(|(_, rest)| rest.split(['(', '<']).next());
        names.extend(name.filter(|_| is_test).map(str::to_owned));
        is_test &= line.starts_with("//");
    }
    names
}

struct Package {
    /// Normal and build dependencies, whatever their target.
    normal: BTreeSet<String>,
}

fn metadata() -> BTreeMap<String, Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .map(|package| {
            let normal = package["dependencies"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|dependency| dependency["kind"] != "dev")
                .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
                .collect();
            (package["name"].as_str().unwrap().to_owned(), Package { normal })
        })
        .collect()
}

/// Names and versions in Cargo.lock.
fn locked() -> Vec<(String, String)> {
    let lock = read("Cargo.lock");
    let value = |line: &str, key: &str| {
        line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"').map(str::to_owned)
    };
    let mut found = Vec::new();
    let mut name = None;
    for line in lock.lines() {
        if let Some(found_name) = value(line, "name") {
            name = Some(found_name);
        } else if let (Some(version), Some(name)) = (value(line, "version"), name.take()) {
            found.push((name, version));
        }
    }
    found
}
