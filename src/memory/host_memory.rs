//! How much host memory there is to take: what the system has available, within the control group's limit.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can be taken now without swapping; None where the system does not say (other than Linux).
pub fn available_bytes() -> Option<u64> {
    let system = meminfo_available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(cgroup_left().map_or(system, |left| system.min(left)))
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn meminfo_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the control group (version 2) of this process, or one above it, still allows.
fn cgroup_left() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let root = Path::new("/sys/fs/cgroup");
    let mut folder: PathBuf = root.join(path.trim_start_matches('/'));
    let mut least: Option<u64> = None;
    loop {
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" does not parse: no limit here.
        if let (Some(max), Some(current)) = (read("memory.max"), read("memory.current")) {
            let left = max.saturating_sub(current);
            least = Some(least.map_or(left, |other| other.min(left)));
        }
        if folder == root || !folder.pop() {
            return least;
        }
    }
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
    fn cache_sizes_are_read_in_kilobytes() {
        assert_eq!(cache_bytes("307200K\n"), Some(307_200 << 10));
        assert_eq!(cache_bytes("huge\n"), None);
    }

    #[test]
    fn meminfo_is_read_in_kilobytes() {
        let text = "MemTotal:       24576000 kB\nMemFree:         1000 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(meminfo_available(text), Some(20_480_000 * 1024));
        assert_eq!(meminfo_available("MemTotal: 1 kB\n"), None);
        assert_eq!(meminfo_available("MemAvailable: many kB\n"), None);
    }
}
