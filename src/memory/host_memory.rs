//! How much host memory there is to take: what the system has available, within the control group's limit.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can be taken now without swapping; None where the system does not say (other than Linux).
pub fn available_bytes() -> Option<u64> {
    let system = meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(cgroup_left().map_or(system, |left| system.min(left)))
}

/// All memory that this process may come to have: the system's, or its control group's limit; None where the system does not say.
pub fn total_bytes() -> Option<u64> {
    let system = meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    let limit = cgroup_files().into_iter().flatten().filter_map(|(max, _)| max).min();
    Some(limit.map_or(system, |limit| system.min(limit)))
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the control group (version 2) of this process, or one above it, still allows.
fn cgroup_left() -> Option<u64> {
    cgroup_files()?.into_iter().filter_map(|(max, current)| Some(max?.saturating_sub(current?))).min()
}

/// Limit and use of the control group of this process and of those above it; None where there is no limit.
fn cgroup_files() -> Option<Vec<(Option<u64>, Option<u64>)>> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let root = Path::new("/sys/fs/cgroup");
    let mut folder: PathBuf = root.join(path.trim_start_matches('/'));
    let mut groups = Vec::new();
    loop {
        // "max" does not parse: no limit here.
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        groups.push((read("memory.max"), read("memory.current")));
        if folder == root || !folder.pop() {
            return Some(groups);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kilobytes() {
        let text = "MemTotal:       24576000 kB\nMemFree:         1000 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(meminfo(text, "MemAvailable:"), Some(20_480_000 * 1024));
        assert_eq!(meminfo("MemTotal: 1 kB\n", "MemAvailable:"), None);
        assert_eq!(meminfo("MemAvailable: many kB\n", "MemAvailable:"), None);
    }
}
