//! What the kernel says about this process, for a scrape.

use std::collections::HashMap;

/// What the kernel says about this process.
pub(crate) struct Process {
    pub(crate) rss: Option<u64>,
    pub(crate) fds: Option<u64>,
    pub(crate) conntrack: Option<u64>,
    pub(crate) conntrack_max: Option<u64>,
}

impl Process {
    pub(crate) fn read() -> Self {
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
        let rss = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| {
            let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
            let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
            pages.checked_mul(u64::try_from(page).ok()?)
        });
        let fds = std::fs::read_dir("/proc/self/fd").ok().and_then(|dir| u64::try_from(dir.count()).ok());
        Self {
            rss,
            fds,
            conntrack: number("/proc/sys/net/netfilter/nf_conntrack_count"),
            conntrack_max: number("/proc/sys/net/netfilter/nf_conntrack_max"),
        }
    }
}

pub(crate) fn local_port_range() -> Option<std::ops::RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

/// Every destination has all local ports to itself, so the one that uses most of them is the first that cannot be
/// dialled any more. Some milliseconds with ten thousand connections: for a scrape, not for each report.
pub(crate) fn local_ports_used(range: &std::ops::RangeInclusive<u16>) -> u64 {
    let mut by_remote: HashMap<(String, String), u64> = HashMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Ok(text) = std::fs::read_to_string(table) else { continue };
        for line in text.lines().skip(1) {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let (Some(local), Some(remote)) = (fields.next(), fields.next()) else { continue };
            let Some((address, port)) = local.rsplit_once(':') else { continue };
            let ephemeral = u16::from_str_radix(port, 16).is_ok_and(|port| range.contains(&port));
            if ephemeral && !remote.ends_with(":0000") {
                *by_remote.entry((address.to_owned(), remote.to_owned())).or_default() += 1;
            }
        }
    }
    by_remote.into_values().max().unwrap_or(0)
}
