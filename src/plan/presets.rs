//! Machines and models by name, for planning without either: `fulmen plan --shape mixtral-8x7b --hardware t4`.
//!
//! A preset is a data sheet, not a measurement. The paper's machines carry the constants of its published artifact, because
//! with those its policies come out again ([`paper`](super::paper)); every other one says where its numbers are from, and which
//! host was assumed. For the machine at hand there is a measured profile.

use super::hrm::{Hierarchy, Level};
use crate::model::Shape;

/// Bytes of a GiB. The artifact divides bytes by GiB/s: 84.0 GiB of experts over its "16 GB/s" take 5.25 s.
const GIB: f64 = (1u64 << 30) as f64;
/// Bytes of the GB in which data sheets give rates.
const GB: f64 = 1e9;
const TERA: f64 = 1e12;

/// A machine: one host, and `devices` equal GPUs that work on every layer together (tensor parallel).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct HardwarePreset {
    /// What `--hardware` takes.
    pub name: &'static str,
    pub title: &'static str,
    pub devices: usize,
    /// Memory of one device.
    pub device_bytes: f64,
    /// Rates of one device.
    pub device: Level,
    /// Host memory that is free when a run starts.
    pub host_bytes: f64,
    pub host: Level,
    /// Host to device, all devices together: they share the host's memory and, in the paper's machines, its root complex.
    pub link_bytes_per_s: f64,
    /// Where the numbers come from.
    pub source: &'static str,
}

impl HardwarePreset {
    /// The two levels, all devices taken as one: their memory rates and FLOP/s add up, host and link stay.
    pub fn hierarchy(&self) -> Hierarchy {
        let devices = self.devices as f64;
        Hierarchy {
            device: Level {
                flops_per_s: devices * self.device.flops_per_s,
                bytes_per_s: devices * self.device.bytes_per_s,
            },
            host: self.host,
            link_bytes_per_s: self.link_bytes_per_s,
        }
    }

    /// Memory of all devices.
    pub fn all_device_bytes(&self) -> f64 {
        self.devices as f64 * self.device_bytes
    }
}

/// Free host memory of the paper's 192 GB machines. Any value from 184.2 to 184.5 GiB gives the same policies.
const PAPER_192: f64 = 184.3 * GIB;
/// Free host memory of the paper's 416 GB machines.
const PAPER_416: f64 = 408.0 * GIB;

const fn paper_t4(name: &'static str, title: &'static str, devices: usize, host_bytes: f64) -> HardwarePreset {
    HardwarePreset {
        name,
        title,
        devices,
        device_bytes: 15.0 * GIB,
        device: Level { flops_per_s: 65.0 * TERA, bytes_per_s: 300.0 * GIB },
        host_bytes,
        host: Level { flops_per_s: 0.8 * TERA, bytes_per_s: 100.0 * GIB },
        link_bytes_per_s: 16.0 * GIB,
        source: "constants of the MoE-Lightning artifact, its rates in GiB/s; host memory rate as its launch script sets it",
    }
}

/// Free memory of a host of so many GB: what the paper's 192 GB machines leave free, 96 %.
const fn free_of(installed_gb: f64) -> f64 {
    installed_gb * 0.96 * GIB
}

/// Every machine known by name.
pub const HARDWARE: [HardwarePreset; 9] = [
    paper_t4("t4", "1x T4 16 GB, 24-core Xeon, 192 GB (paper settings S1)", 1, PAPER_192),
    HardwarePreset {
        name: "l4",
        title: "1x L4 24 GB, 24-core Xeon, 192 GB (paper settings S2)",
        devices: 1,
        device_bytes: 24.0 * GIB,
        device: Level { flops_per_s: 104.0 * TERA, bytes_per_s: 285.0 * GIB },
        host_bytes: PAPER_192,
        host: Level { flops_per_s: 1.6 * TERA, bytes_per_s: 76.0 * GIB },
        link_bytes_per_s: 16.0 * GIB,
        source: "constants of the MoE-Lightning artifact, its rates in GiB/s; host memory rate as its notes give it for this machine",
    },
    paper_t4("2xt4", "2x T4 16 GB, 32-core Xeon, 416 GB (paper settings S6, S8)", 2, PAPER_416),
    paper_t4("4xt4", "4x T4 16 GB, 32-core Xeon, 416 GB (paper settings S7, S9)", 4, PAPER_416),
    HardwarePreset {
        name: "a5000",
        title: "1x RTX A5000 24 GB, EPYC 7453, 512 GB (the machine of MoE-Gen)",
        devices: 1,
        device_bytes: 24.0 * GIB,
        device: Level { flops_per_s: 111.1 * TERA, bytes_per_s: 768.0 * GB },
        host_bytes: free_of(512.0),
        // 28 cores at 2.75 GHz, two 8-wide multiply-adds a cycle; eight channels of DDR4-3200.
        host: Level { flops_per_s: 2.46 * TERA, bytes_per_s: 204.8 * GB },
        link_bytes_per_s: 25.0 * GB,
        source: "data sheets (dense f16 tensor rate, memory rate, CPU base clock and channels); link: PCIe 4.0 x16 at 80 % of 31.5 GB/s",
    },
    HardwarePreset {
        name: "a40",
        title: "1x A40 48 GB, Xeon 8380, 256 GB (the machine of MoE-Lens)",
        devices: 1,
        device_bytes: 48.0 * GIB,
        device: Level { flops_per_s: 149.7 * TERA, bytes_per_s: 696.0 * GB },
        host_bytes: free_of(256.0),
        // 40 cores at 2.3 GHz, two 16-wide multiply-adds a cycle.
        host: Level { flops_per_s: 5.89 * TERA, bytes_per_s: 150.0 * GB },
        link_bytes_per_s: 19.5 * GB,
        source: "data sheets; link and host memory rate as MoE-Lens measured them; 256 GB of host memory are assumed",
    },
    HardwarePreset {
        name: "rtx3060",
        title: "1x GeForce RTX 3060 12 GB, 8-core desktop, 128 GB DDR4",
        devices: 1,
        device_bytes: 12.0 * GIB,
        // 112 tensor cores at 1.777 GHz, 64 f16 multiply-adds a cycle with f32 sums (half the rate with f16 sums).
        device: Level { flops_per_s: 25.5 * TERA, bytes_per_s: 360.0 * GB },
        host_bytes: free_of(128.0),
        host: Level { flops_per_s: 0.92 * TERA, bytes_per_s: 51.2 * GB },
        link_bytes_per_s: 25.0 * GB,
        source: "data sheet; assumed host: 8 cores at 3.6 GHz with AVX2, two channels of DDR4-3200; link: PCIe 4.0 x16 at 80 %",
    },
    HardwarePreset {
        name: "rtx3090",
        title: "1x GeForce RTX 3090 24 GB, 16-core desktop, 128 GB DDR4",
        devices: 1,
        device_bytes: 24.0 * GIB,
        device: Level { flops_per_s: 71.0 * TERA, bytes_per_s: 936.0 * GB },
        host_bytes: free_of(128.0),
        host: Level { flops_per_s: 1.84 * TERA, bytes_per_s: 51.2 * GB },
        link_bytes_per_s: 25.0 * GB,
        source: "data sheet (f16 with f32 sums); assumed host: 16 cores at 3.6 GHz with AVX2, two channels of DDR4-3200; link: PCIe 4.0 x16 at 80 %",
    },
    HardwarePreset {
        name: "rtx4090",
        title: "1x GeForce RTX 4090 24 GB, 16-core desktop, 192 GB DDR5",
        devices: 1,
        device_bytes: 24.0 * GIB,
        device: Level { flops_per_s: 165.2 * TERA, bytes_per_s: 1008.0 * GB },
        host_bytes: free_of(192.0),
        host: Level { flops_per_s: 2.3 * TERA, bytes_per_s: 83.2 * GB },
        link_bytes_per_s: 25.0 * GB,
        source: "data sheet (f16 with f32 sums); assumed host: 16 cores at 4.5 GHz with AVX2, two channels of DDR5-5200; link: PCIe 4.0 x16 at 80 %",
    },
];

/// The machine of that name, in any case.
pub fn hardware(name: &str) -> Option<&'static HardwarePreset> {
    HARDWARE.iter().find(|preset| preset.name.eq_ignore_ascii_case(name))
}

/// The shape of a published model by name, in any case; [`NAMES`](crate::model::presets::NAMES) lists them.
pub fn shape(name: &str) -> Option<Shape> {
    crate::model::presets::preset(&name.to_ascii_lowercase()).map(|config| config.shape)
}
