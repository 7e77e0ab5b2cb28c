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

/// Spreads memory that nobody has touched yet over all memory nodes, page by page: threads on any of them then read at the speed of
/// all. Does nothing where there is one node. Advice only: a system that refuses places pages near who writes them first.
/// Unverified: no machine with two nodes has run it yet.
#[cfg(target_os = "linux")]
pub fn spread_over_nodes(memory: &mut [u8]) {
    let nodes = fs::read_to_string("/sys/devices/system/node/online").ok().and_then(|list| node_mask(&list));
    let Some(mask) = nodes.filter(|mask| mask.count_ones() > 1) else { return };
    // SAFETY: the kernel reads one word, 64 nodes, and changes where pages of a mapping of ours will lie.
    let refused = unsafe {
        libc::syscall(libc::SYS_mbind, memory.as_mut_ptr(), memory.len(), libc::MPOL_INTERLEAVE, &mask, 65, 0) != 0
    };
    if refused {
        tracing::info!(error = %std::io::Error::last_os_error(), "the KV pool is not spread over memory nodes");
    }
}

/// Nodes 0 to 63 of a list such as `0-1,4`; None where it is none.
#[cfg(target_os = "linux")]
fn node_mask(list: &str) -> Option<u64> {
    let mut mask = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        for node in first..=last {
            mask |= 1u64.checked_shl(node)?;
        }
    }
    Some(mask)
}

/// Bytes of the last-level cache of a core; None where the system does not say.
pub fn last_level_cache_bytes() -> Option<u64> {
    let sizes = (0..8).filter_map(|index| {
        let folder = PathBuf::from(format!("/sys/devices/system/cpu/cpu0/cache/index{index}"));
        cache_bytes(&fs::read_to_string(folder.join("size")).ok()?)
    });
    sizes.max()
}

/// A size as sysfs gives it.
fn cache_bytes(size: &str) -> Option<u64> {
    size.trim().strip_suffix('K')?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_nodes_are_read_as_a_list_of_ranges() {
        assert_eq!(node_mask("0\n"), Some(0b1));
        assert_eq!(node_mask("0-1,4\n"), Some(0b10011));
        assert_eq!(node_mask("0-64"), None);
        assert_eq!(node_mask(""), None);
    }

    #[test]
    fn cache_sizes_are_read_in_kilobytes() {
        assert_eq!(cache_bytes("307200K\n"), Some(307_200 << 10));
        assert_eq!(cache_bytes("huge\n"), None);
    }

    #[test]
    fn meminfo_is_read_in_kilobytes() {
        let text = "MemTotal:       24576000 kB\nMemFree:         1000 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(meminfo(text, "MemAvailable:"), Some(20_480_000 * 1024));
        assert_eq!(meminfo("MemTotal: 1 kB\n", "MemAvailable:"), None);
        assert_eq!(meminfo("MemAvailable: many kB\n", "MemAvailable:"), None);
    }
}
