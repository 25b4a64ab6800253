//! Instructions per request, which need no quiet machine: what a commit costs, to a fraction of a percent.
//!
//! Why count beside measuring time: rounds of time differ by 15 %, so that a cost of 3 % is found out months later, in a
//! heap of others. The sidecars run under `valgrind --tool=callgrind`, which counts what they execute in user space. What
//! the kernel does for them is not in it: a system call saved or added shows in `weft-bench` alone.
//!
//! Why two lengths: each load runs for a number of requests and then for three times as many, and the difference is
//! divided by the difference. Connections, and the first use of everything, fall out; a warm-up comes before, and a load
//! is a fixed number of requests by `h2load`, not a time.
//!
//! Hardening is off here: valgrind makes system calls of its own. It costs instructions of the kernel only.

use std::{
    collections::HashMap,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use crate::{
    load,
    net::{Group, HTTP1_PORT, HTTP2_PORT, Process, check},
    peers::{Peer, Running, World},
    weft::{self, Sidecars},
};

/// Counts the instructions of both sidecars per request, by valgrind (needs root).
#[derive(clap::Args)]
pub(crate) struct Instructions {
    /// The sidecar to count [default: weft-proxy beside this program].
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// Another sidecar, counted in the same way: more than 1.03 times as many as it needs is an error.
    #[arg(long)]
    against: Option<PathBuf>,
    /// Requests of the shorter run of each load; the longer one has three times as many.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(100..))]
    requests: u64,
    /// Counts again with so many route rules and as many authorization rules, none of which match: `10,100`. More than
    /// 1.05 times as many as without is an error.
    #[arg(long, value_delimiter = ',')]
    rules: Vec<usize>,
    /// Functions to name, by what they execute themselves.
    #[arg(long, default_value_t = 15)]
    functions: usize,
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// A load of a fixed number of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Counted {
    Http1,
    Http2,
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Counted::Http1 => "HTTP/1.1, 8 connections",
            Counted::Http2 => "HTTP/2, 4 connections of 8 streams",
        })
    }
}

impl Counted {
    const ALL: [Self; 2] = [Self::Http1, Self::Http2];

    async fn run(self, world: &World, running: &Running, requests: u64) -> Result<()> {
        let mut h2load = world.network.client.command("h2load", Group::App);
        h2load.args(["-t1", "-n", &requests.to_string()]);
        let port = match self {
            Counted::Http1 => {
                h2load.args(["--h1", "-c8", "-m1"]);
                HTTP1_PORT
            }
            Counted::Http2 => {
                h2load.args(["-c4", "-m8"]);
                HTTP2_PORT
            }
        };
        let printed = load::output(h2load.arg(format!("http://{}:{port}/", running.host))).await?;
        if !printed.contains(&format!(" {requests} succeeded, 0 failed")) {
            bail!("{requests} requests over {self} did not all succeed: {printed}");
        }
        Ok(())
    }
}

/// What was counted of one sidecar binary.
#[derive(Serialize)]
struct Count {
    proxy: PathBuf,
    loads: Vec<OfLoad>,
}

#[derive(Serialize)]
struct OfLoad {
    load: Counted,
    /// Instructions per request.
    client: Side,
    server: Side,
}

impl OfLoad {
    fn pair(&self) -> f64 {
        self.client.instructions + self.server.instructions
    }
}

#[derive(Serialize)]
struct Side {
    instructions: f64,
    /// Of it, by what executes them itself; most first.
    functions: Vec<(String, f64)>,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    now: Count,
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<Count>,
    /// Of the pair, for each load.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ratios: Vec<f64>,
    /// Held against so many route rules and authorization rules that do not match.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    with_rules: Vec<(usize, Count)>,
}

impl Instructions {
    /// Runs it; whether the ratio is within its bound.
    pub(crate) async fn run(&self, out: &Path, programs: PathBuf) -> Result<bool> {
        if Command::new("valgrind").arg("--version").output().is_err() {
            bail!("valgrind is missing (Debian: apt-get install valgrind)");
        }
        let own = self.proxy.clone().unwrap_or_else(|| programs.join("weft-proxy"));
        let world = World::new(&[Peer::Weft], out, programs, None)?;
        let now = self.count(&world, &own, 0).await?;
        let against = match &self.against {
            Some(other) => Some(self.count(&world, other, 0).await?),
            None => None,
        };
        let mut with_rules = Vec::new();
        for &rules in &self.rules {
            with_rules.push((rules, self.count(&world, &own, rules).await?));
        }
        let ratios = against.iter().flat_map(|against| now.loads.iter().zip(&against.loads));
        let ratios = ratios.map(|(now, against)| now.pair() / against.pair()).collect();
        let report = Report { now, against, ratios, with_rules };
        match self.output {
            Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
            Output::Text => print!("{}", report.text(self.functions)),
        }
        let within = |(_, ratio): (String, f64)| ratio <= RULES_BOUND;
        Ok(report.ratios.iter().all(|ratio| *ratio <= BOUND) && report.of_rules().all(within))
    }

    async fn count(&self, world: &World, proxy: &Path, rules: usize) -> Result<Count> {
        let program = proxy.to_owned();
        let sidecars = Sidecars { program, callgrind: true, rules, ..Sidecars::shipped(world) };
        let mut running = weft::start(world, &sidecars).await?;
        world.answers(&mut running, "weft", PATIENCE).await?;
        let mut loads = Vec::new();
        for load in Counted::ALL {
            load.run(world, &running, self.requests / 2).await?;
            read(world, &running)?;
            load.run(world, &running, self.requests).await?;
            let short = read(world, &running)?;
            load.run(world, &running, self.requests * 3).await?;
            let long = read(world, &running)?;
            for process in &mut running.proxies {
                process.check(&world.dir)?;
            }
            let mut sides =
                short.iter().zip(&long).map(|(short, long)| self.side(short, long)).collect::<Vec<_>>();
            let (Some(server), Some(client)) = (sides.pop(), sides.pop()) else {
                bail!("a pair has two sides");
            };
            loads.push(OfLoad { load, client, server });
        }
        Ok(Count { proxy: proxy.to_owned(), loads })
    }

    fn side(&self, short: &HashMap<String, u64>, long: &HashMap<String, u64>) -> Side {
        let per_request = |name: &str, long: u64| {
            let short = short.get(name).copied().unwrap_or(0);
            (long as f64 - short as f64) / (self.requests * 2) as f64
        };
        let mut functions: Vec<_> =
            long.iter().map(|(name, n)| (name.clone(), per_request(name, *n))).collect();
        functions.sort_by(|a, b| b.1.total_cmp(&a.1));
        let instructions = functions.iter().fold(0.0, |sum, (_, n)| sum + n);
        functions.truncate(self.functions);
        Side { instructions, functions }
    }
}

/// More than that times as many as before is a step back.
const BOUND: f64 = 1.03;
/// What a hundred route rules and a hundred authorization rules may cost.
const RULES_BOUND: f64 = 1.05;
/// Programs start fifty times slower under valgrind.
const PATIENCE: Duration = Duration::from_secs(60);

/// What each sidecar has executed since it was asked last, by function: client first.
fn read(world: &World, running: &Running) -> Result<Vec<HashMap<String, u64>>> {
    running.proxies.iter().map(|proxy| read_one(&world.dir, proxy)).collect()
}

fn read_one(dir: &Path, proxy: &Process) -> Result<HashMap<String, u64>> {
    // Blocks until it is written, and begins anew from zero.
    check(Command::new("vgdb").args([&format!("--pid={}", proxy.id()), "--wait=10", "dump"]))?;
    let prefix = format!("{}.", weft::callgrind_file(proxy.name()));
    let newest = fs::read_dir(dir)?.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(&prefix)?.parse::<u32>().ok()
    });
    let newest = newest.max().with_context(|| format!("callgrind wrote nothing of {}", proxy.name()))?;
    let path = dir.join(format!("{prefix}{newest}"));
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let costs = own_costs(&text);
    if costs.values().sum::<u64>() == 0 {
        bail!("no instructions in {}", path.display());
    }
    Ok(costs)
}

/// Of callgrind's file, written without compression: what each function executed itself.
fn own_costs(text: &str) -> HashMap<String, u64> {
    let mut costs: HashMap<String, u64> = HashMap::new();
    let (mut function, mut is_call) = ("", false);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            function = name;
        } else if line.starts_with("calls=") {
            // The next line is what was called.
            is_call = true;
        } else if line.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '*')) {
            let cost = line.split(' ').nth(1).and_then(|cost| cost.parse::<u64>().ok());
            if let (false, Some(cost)) = (std::mem::take(&mut is_call), cost) {
                match costs.get_mut(function) {
                    Some(sum) => *sum += cost,
                    None => drop(costs.insert(function.to_owned(), cost)),
                }
            }
        }
    }
    costs
}

impl Report {
    /// What rules cost: which, and the ratio to none.
    fn of_rules(&self) -> impl Iterator<Item = (String, f64)> {
        self.with_rules.iter().flat_map(|(rules, count)| {
            count.loads.iter().zip(&self.now.loads).map(move |(with, without)| {
                (
                    format!("{}, {rules} route and authorization rules", with.load),
                    with.pair() / without.pair(),
                )
            })
        })
    }

    fn text(&self, functions: usize) -> String {
        let mut text = String::from("Instructions per request\n");
        for (n, now) in self.now.loads.iter().enumerate() {
            text += &format!("\n{}\n", now.load);
            let mut line = |name: &str, of: &OfLoad| {
                let (client, server) = (of.client.instructions, of.server.instructions);
                text += &format!(
                    "  {name:<8} client {client:>8.0}  server {server:>8.0}  pair {:>8.0}\n",
                    of.pair()
                );
            };
            line("now", now);
            if let Some(against) = self.against.as_ref().and_then(|against| against.loads.get(n)) {
                line("against", against);
            }
            for (name, side) in [("client", &now.client), ("server", &now.server)] {
                text += &format!("  {name}'s most, by what they execute themselves:\n");
                for (name, n) in side.functions.iter().take(functions) {
                    let name: String = name.chars().take(100).collect();
                    text += &format!("    {n:>8.0}  {name}\n");
                }
            }
        }
        text.push('\n');
        for (load, ratio) in self.now.loads.iter().zip(&self.ratios) {
            text += &format!(
                "figure: instructions of a pair, {}, against before: {ratio:.3} x (bound <= {BOUND} x)\n",
                load.load
            );
        }
        for (rules, ratio) in self.of_rules() {
            text += &format!(
                "figure: instructions of a pair, {rules}, against none: {ratio:.3} x (bound <= {RULES_BOUND} x)\n"
            );
        }
        for load in &self.now.loads {
            text +=
                &format!("figure: instructions of a pair, {}: {:.0} per request\n", load.load, load.pair());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_of_calls_belong_to_the_called() {
        let text = "version: 1\npositions: line\nevents: Ir\n\nfl=a.rs\nfn=a\n10 5\n12 7\ncfn=b\ncalls=2 40\n13 900\n\
            14 1\n\nfn=b\n40 900\n\nfn=a\n9 2\ntotals: 915\n";
        let costs = own_costs(text);
        assert_eq!((costs["a"], costs["b"], costs.len()), (15, 900, 2));
    }
}
