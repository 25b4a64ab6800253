//! CPU time and memory of a program and everything it started, as the kernel counts them.
//!
//! Why two sources of CPU time: `/proc/<pid>/stat` counts every thread that ever lived, in ticks of
//! 10 ms, which is 5 % of a short measurement at 1,000 requests a second; `schedstat` counts the same
//! time in nanoseconds, for the threads alive. So the fine one is used wherever the two agree, and the
//! complete one where a thread has come or gone in between.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// One reading of a process tree's CPU time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    complete: Duration,
    fine: Duration,
}

impl Cpu {
    pub(crate) fn of(root: u32) -> Result<Cpu> {
        let mut cpu = Cpu::default();
        for pid in tree(root)? {
            let Some(stat) = stat(pid) else { continue };
            cpu.complete += TICK * stat.ticks;
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for task in tasks.flatten() {
                let on_cpu = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
                let nanos = on_cpu.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                cpu.fine += Duration::from_nanos(nanos);
            }
        }
        Ok(cpu)
    }

    /// User and system time since an earlier reading.
    pub(crate) fn since(&self, before: &Cpu) -> Duration {
        let complete = self.complete.saturating_sub(before.complete);
        let fine = self.fine.saturating_sub(before.fine);
        if fine.abs_diff(complete) <= TICK * 4 + complete / 20 { fine } else { complete }
    }
}

/// Resident memory of a process tree in bytes.
pub(crate) fn resident(root: u32) -> Result<u64> {
    let mut bytes = 0;
    for pid in tree(root)? {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        bytes += kib.unwrap_or(0) * 1024;
    }
    Ok(bytes)
}

/// The process and its descendants.
fn tree(root: u32) -> Result<Vec<u32>> {
    let all = fs::read_dir("/proc").context("no /proc")?.flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: Vec<(u32, u32)> = pids.filter_map(|pid| Some((pid, stat(pid)?.parent))).collect();
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(&parent) = tree.get(at) {
        tree.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    Ok(tree)
}

struct Stat {
    parent: u32,
    ticks: u32,
}

fn stat(pid: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&stat)
}

/// The name, field 2, may hold spaces and brackets: the rest is counted from its last bracket.
fn parse_stat(stat: &str) -> Option<Stat> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks = |field: usize| fields.get(field)?.parse::<u32>().ok();
    Some(Stat { parent: fields.get(1)?.parse().ok()?, ticks: ticks(11)? + ticks(12)? })
}

/// `USER_HZ` is 100 wherever Linux runs.
const TICK: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_a_hostile_name() {
        let line = "42 (a) b) S 7 42 42 0 -1 4194304 100 0 0 0 15 27 0 0 20 0 1 0 100 1000 1 1";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.parent, stat.ticks), (7, 42));
    }

    #[test]
    fn the_fine_source_yields_when_a_thread_took_its_time_along() {
        let before = Cpu { complete: Duration::from_millis(100), fine: Duration::from_micros(104_500) };
        let alike = Cpu { complete: Duration::from_millis(400), fine: Duration::from_micros(401_700) };
        assert_eq!(alike.since(&before), Duration::from_micros(297_200));
        let lost = Cpu { complete: Duration::from_millis(400), fine: Duration::from_micros(204_500) };
        assert_eq!(lost.since(&before), Duration::from_millis(300));
    }

    #[test]
    fn our_own_process_has_memory_and_time() {
        let own = std::process::id();
        assert!(resident(own).unwrap() > 0);
        assert!(Cpu::of(own).unwrap().fine > Duration::ZERO);
    }
}
