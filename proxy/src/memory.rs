//! How much memory this container uses of what it may, as the kernel counts it.
//!
//! Why the control group's own count and not the resident size: it is the count that the kernel kills by, and sockets
//! are a third of what a connection costs. What the kernel would give back first (cached files) is not counted.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

/// The memory control group of this process, if that has a limit.
pub(crate) struct Memory {
    usage: File,
    stat: File,
    limit: u64,
    /// What `stat` calls cached files.
    cached: [&'static str; 2],
}

impl Memory {
    /// Finds it. The files stay open: a process that gives up its rights keeps them.
    pub(crate) fn find() -> Option<Self> {
        Self::find_in(Path::new("/sys/fs/cgroup"), &std::fs::read_to_string("/proc/self/cgroup").ok()?)
    }

    fn find_in(root: &Path, groups: &str) -> Option<Self> {
        let path_of = |line: &str| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers) = (parts.next()?, parts.next()?);
            Some((controllers.to_owned(), parts.next()?.trim_start_matches('/').to_owned()))
        };
        let groups: Vec<_> = groups.lines().filter_map(path_of).collect();
        let of = |wanted: &str| {
            groups.iter().find(|(c, _)| c.split(',').any(|c| c == wanted)).map(|(_, path)| path.as_str())
        };
        // Inside a container the group itself is mounted at the root, whatever its path outside.
        let v1 = of("memory").map(|path| [root.join("memory").join(path), root.join("memory")]);
        let v2 = of("").map(|path| [root.join(path), root.to_owned()]);
        let v1 = v1.into_iter().flatten().find_map(|dir| Self::open(&dir, V1).ok());
        v1.or_else(|| v2.into_iter().flatten().find_map(|dir| Self::open(&dir, V2).ok()))
    }

    fn open(dir: &Path, names: Names) -> io::Result<Self> {
        let limit = std::fs::read_to_string(dir.join(names.limit))?;
        // "max", or a number beyond any machine: none.
        let limit = limit.trim().parse().ok().filter(|limit| *limit < 1 << 50);
        Ok(Self {
            limit: limit.ok_or(io::ErrorKind::NotFound)?,
            usage: File::open(dir.join(names.usage))?,
            stat: File::open(dir.join("memory.stat"))?,
            cached: names.cached,
        })
    }

    /// What may be used.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// What is used, without what would be given back.
    pub(crate) fn used(&self) -> Option<u64> {
        let mut buffer = [0; 4_096];
        let usage: u64 = read(&self.usage, &mut buffer)?.trim().parse().ok()?;
        let stat = read(&self.stat, &mut buffer)?;
        let cached = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            self.cached.contains(&name).then(|| bytes.parse::<u64>().ok())?
        });
        Some(usage.saturating_sub(cached.sum()))
    }
}

fn read<'b>(file: &File, buffer: &'b mut [u8]) -> Option<&'b str> {
    let n = file.read_at(buffer, 0).ok()?;
    // A name cut at the buffer's end is none that is looked for.
    std::str::from_utf8(buffer.get(..n)?).ok()
}

/// What the two generations of control groups call things.
struct Names {
    limit: &'static str,
    usage: &'static str,
    cached: [&'static str; 2],
}

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};
const V2: Names =
    Names { limit: "memory.max", usage: "memory.current", cached: ["inactive_file", "active_file"] };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_are_read_and_no_limit_is_none() {
        let root = std::env::temp_dir().join(format!("weft-memory-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("memory/pod/memory.limit_in_bytes", "67108864\n");
        write("memory/pod/memory.usage_in_bytes", "5000\n");
        write("memory/pod/memory.stat", "cache 9\ntotal_inactive_file 1000\ntotal_active_file 500\n");
        let v1 = Memory::find_in(&root, "8:pids:/\n4:memory:/pod\n0::/\n").unwrap();
        assert_eq!((v1.limit(), v1.used()), (67_108_864, Some(3_500)));
        // A container sees its group at the root.
        write("memory.max", "1000000\n");
        write("memory.current", "300\n");
        write("memory.stat", "anon 1\ninactive_file 100\nactive_file 0\n");
        let v2 = Memory::find_in(&root, "0::/kubepods/pod1\n").unwrap();
        assert_eq!((v2.limit(), v2.used()), (1_000_000, Some(200)));
        write("memory.max", "max\n");
        assert!(Memory::find_in(&root, "0::/kubepods/pod1\n").is_none());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
