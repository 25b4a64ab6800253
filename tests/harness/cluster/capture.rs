//! What crosses between the nodes, as somebody on the wire sees it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Cluster, processes};

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Child,
    file: PathBuf,
}

impl Cluster {
    /// Captures whole packets on the link between the nodes, from now on.
    pub fn capture(&self) -> Result<Capture> {
        ensure!(self.nodes.len() == 2, "nothing crosses between fewer than two nodes");
        let file = self.state.join(format!("wire-{}.pcap", std::process::id()));
        let said = self.state.join("logs/tcpdump.log");
        let mut command = self.nodes[0].on_network(Path::new("tcpdump"));
        // Root throughout: the file lies where nobody else may write.
        command.args(["-ni", &format!("to-{}", self.nodes[1].name()), "-s0", "-U", "-Z", "root", "-w"]);
        let tcpdump = command.arg(&file).stderr(fs::File::create(&said)?).stdout(Stdio::null()).spawn()?;
        let capture = Capture { tcpdump, file };
        processes::until("tcpdump", || Ok(fs::read_to_string(&said)?.contains("listening on")))?;
        Ok(capture)
    }
}

impl Capture {
    /// All that has crossed.
    pub fn end(mut self) -> Result<Vec<u8>> {
        // Interrupted it writes what it still holds.
        kill(Pid::from_raw(i32::try_from(self.tcpdump.id())?), Signal::SIGINT)?;
        self.tcpdump.wait()?;
        let bytes = fs::read(&self.file).with_context(|| self.file.display().to_string())?;
        fs::remove_file(&self.file)?;
        Ok(bytes)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}

/// How often a text stands in what was captured. (A text that two packets share is not found: ask for short ones.)
pub fn occurrences(captured: &[u8], text: &str) -> usize {
    captured.windows(text.len()).filter(|window| *window == text.as_bytes()).count()
}
