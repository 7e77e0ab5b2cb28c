//! SIMD code for the CPU lane: attention of decode rows over the host KV cache.

pub mod attention;
pub mod isa;
pub mod measure;

/// Keeps the calling thread on core `index` of those that this process may use; does nothing where the system has no such call
/// or there are fewer cores.
pub fn pin_thread(index: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: the set is plain memory, and the calls only read and write it.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut allowed) != 0 {
            return;
        }
        let cores: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|core| libc::CPU_ISSET(*core, &allowed)).collect();
        if let Some(core) = cores.get(index) {
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(*core, &mut one);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &one);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = index;
}
