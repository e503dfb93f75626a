//! How much memory a model may take: what the machine has left, and what the control groups of the process leave it.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can still be taken before something has to give: the machine's, or those of the tightest control group.
/// `None` where the system does not say.
pub(super) fn available() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    // A limit may be set at any level above the process.
    let limits = controllers(&groups)
        .into_iter()
        .flat_map(|(files, group)| group.ancestors().filter_map(|level| files.free(level)).collect::<Vec<_>>());
    limits.chain(machine).min()
}

/// `MemAvailable` of `/proc/meminfo`, which counts file caches that can go.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// How a version of control groups calls its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Files {
    root: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`: file caches that have not been used of late, which the kernel takes back first.
    reclaimable: &'static str,
}

const V1: Files = Files {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};

const V2: Files =
    Files { root: "/sys/fs/cgroup", limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file" };

/// The groups that `/proc/self/cgroup` names for memory.
fn controllers(cgroup: &str) -> Vec<(Files, PathBuf)> {
    let group = |line: &str| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let relative = Path::new(path).strip_prefix("/").ok()?.to_owned();
        match controllers {
            "" if number == "0" => Some((V2, relative)),
            names if names.split(',').any(|name| name == "memory") => Some((V1, relative)),
            _ => None,
        }
    };
    cgroup.lines().filter_map(group).collect()
}

impl Files {
    /// What a group leaves, if it has a limit. In a container the group may lie at the root, whatever its path.
    fn free(self, group: &Path) -> Option<u64> {
        let read = |file: &str| fs::read_to_string(Path::new(self.root).join(group).join(file)).ok();
        free(&read(self.limit)?, &read(self.usage)?, &read("memory.stat").unwrap_or_default(), self.reclaimable)
    }
}

/// The limit less what is used and cannot be taken back; `None` without a limit.
fn free(limit: &str, usage: &str, stat: &str, reclaimable: &str) -> Option<u64> {
    // Version 2 writes `max` where there is none; version 1 a number near 2^63, which is as good.
    let (limit, usage): (u64, u64) = (limit.trim().parse().ok()?, usage.trim().parse().ok()?);
    let value = |line: &str| line.strip_prefix(reclaimable)?.strip_prefix(' ')?.trim().parse().ok();
    let cached: u64 = stat.lines().find_map(value).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_what_it_has() {
        let meminfo =
            "MemTotal:       24590000 kB\nMemFree:         1000 kB\nMemAvailable:   22000000 kB\nBuffers: 1 kB\n";
        assert_eq!(mem_available(meminfo), Some(22_000_000 << 10));
        for text in ["", "MemAvailable: x kB", "MemAvailable: 5", "MemFree: 7 kB"] {
            assert_eq!(mem_available(text), None, "{text}");
        }
    }

    #[test]
    fn groups_of_both_versions_are_found() {
        let check = |text: &str, expected: &[(Files, &str)]| {
            let expected: Vec<_> = expected.iter().map(|(files, path)| (*files, PathBuf::from(path))).collect();
            assert_eq!(controllers(text), expected, "{text}");
        };
        check("0::/\n", &[(V2, "")]);
        check("0::/system.slice/plumb.service\n", &[(V2, "system.slice/plumb.service")]);
        check("8:pids:/a\n4:cpu,memory:/a:b\n0::/\n", &[(V1, "a:b"), (V2, "")]);
        check("4:memory:relative\n3:cpuset:/x\nnonsense\n", &[]);
    }

    #[test]
    fn a_group_leaves_what_is_not_used_or_can_be_taken_back() {
        let check = |limit: &str, usage: &str, stat: &str, expected: Option<u64>| {
            assert_eq!(free(limit, usage, stat, "inactive_file"), expected, "{limit} {usage} {stat}");
        };
        check("1000\n", "300\n", "anon 100\ninactive_file 200\nactive_file 50\n", Some(900));
        check("1000", "300", "", Some(700));
        check("1000", "1200", "inactive_file 100\n", Some(0));
        check("1000", "100", "inactive_file 400\n", Some(1000));
        check("max\n", "300\n", "inactive_file 200\n", None);
        check("", "300", "", None);
        // That of all groups below, not that of this one alone, is what version 1 calls total.
        assert_eq!(free("1000", "300", "inactive_file 5\ntotal_inactive_file 7\n", "total_inactive_file"), Some(707));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_memory() {
        assert!(available().unwrap() > 1 << 20);
    }
}
