//! Machines and models by name, for planning without either: `fulmen plan --shape mixtral-8x7b --hardware t4`.
//!
//! A preset is a data sheet, not a measurement. The paper's machines carry the constants of its published artifact, because
//! with those its policies come out again ([`paper`](super::paper)); every other one says where its numbers are from, and which
//! host was assumed. For the machine at hand there is a measured profile.

use super::fit::MachineLimits;
use super::hrm::{Hierarchy, Level};
use crate::checkpoint::Inventory;
use crate::model::Shape;
use crate::policy::{Precision, SourceKind};
use crate::profile::{
    self, Contention, Curve, Link, MachineKey, Memory, ModelKey, PageCurve, Profile, RowTimes, Surface, ThreadCurve,
};

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
    /// Share of the link's rate that copies of pinned memory reach.
    #[serde(skip)]
    pub link_share: f64,
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

/// Of the "16 GB/s" of the paper's machines pinned copies reach 12.35 GB/s (its figure 9, on the L4's machine).
const PAPER_LINK_SHARE: f64 = 12.35 / 17.18;

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
        link_share: PAPER_LINK_SHARE,
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
        link_share: PAPER_LINK_SHARE,
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
        link_share: 1.0,
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
        link_share: 1.0,
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
        link_share: 1.0,
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
        link_share: 1.0,
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
        link_share: 1.0,
        source: "data sheet (f16 with f32 sums); assumed host: 16 cores at 4.5 GHz with AVX2, two channels of DDR5-5200; link: PCIe 4.0 x16 at 80 %",
    },
];

/// The machine of that name, in any case.
pub fn hardware(name: &str) -> Option<&'static HardwarePreset> {
    HARDWARE.iter().find(|preset| preset.name.eq_ignore_ascii_case(name))
}

/// What fulmen is assumed to attain of a data sheet's figures in its own mode: planning for a machine that nobody has measured.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Assumed {
    /// Of the peak FLOP/s, in matrix products of many rows.
    pub device_flops: f64,
    /// Of the device memory's rate.
    pub device_memory: f64,
    /// Of the host memory's rate, in attention.
    pub host_memory: f64,
    /// Of that, over keys and values of 8 bits.
    pub int8_attention: f64,
    /// Bytes per second from disk, where weights do not fit the host's memory.
    pub disk_bytes_per_s: f64,
    /// Between two submissions; from handing over a task until the host knows that it has run; a small copy; a task of the CPU's threads.
    pub submit_seconds: f64,
    pub wait_seconds: f64,
    pub small_copy_seconds: f64,
    pub cpu_task_seconds: f64,
}

/// Cooperative matrices reach about half of what a vendor's own kernels promise; memories four fifths; the latencies are those of
/// a server card's Vulkan driver.
pub const ASSUMED: Assumed = Assumed {
    device_flops: 0.5,
    device_memory: 0.8,
    host_memory: 0.7,
    int8_attention: 0.75,
    disk_bytes_per_s: 2.0 * GB,
    submit_seconds: 35e-6,
    wait_seconds: 35e-6,
    small_copy_seconds: 40e-6,
    cpu_task_seconds: 20e-6,
};

/// Largest storage binding of the drivers that these cards have.
const BINDING_BYTES: u64 = (1 << 31) - 4;

impl HardwarePreset {
    /// A profile made of the data sheet's figures and what is [`ASSUMED`]; several devices are taken as one.
    pub fn profile(&self, inventory: &Inventory) -> Profile {
        let shape = inventory.config().shape;
        let machine = self.hierarchy();
        let flops_per_s = ASSUMED.device_flops * machine.device.flops_per_s;
        let memory = ASSUMED.device_memory * machine.device.bytes_per_s;
        let link = self.link_share * self.link_bytes_per_s;
        let attend = ASSUMED.host_memory * self.host.bytes_per_s;
        let (d, q, kv) = (shape.d_model as f64, shape.q_width() as f64, shape.kv_width() as f64);
        let weights = 2.0;
        let expert_bytes = inventory.slot_bytes().unwrap_or_default().iter().sum::<u64>() as f64;
        // (14): the slower of bytes and FLOP, and a submission.
        let over_rows = |bytes: f64, row_bytes: f64, row_flops: f64| {
            let rows = (0..=16).map(|power| f64::from(1u32 << power));
            let seconds = rows.map(|n| {
                (n, ASSUMED.submit_seconds + ((bytes + n * row_bytes) / memory).max(n * row_flops / flops_per_s))
            });
            Curve::rising(seconds.collect()).expect("rows ascend")
        };
        let projection = |outputs: f64| over_rows(weights * d * outputs, 4.0 * (d + outputs), 2.0 * d * outputs);
        let (a, f) = (shape.experts_per_token as f64, shape.expert_width as f64);
        let experts = |n: f64| {
            // Few rows take few of the experts.
            let taken = shape.experts as f64 * (1.0 - (1.0 - a / shape.experts as f64).powf(n));
            let bytes = taken * expert_bytes + n * a * 4.0 * (2.0 * d + 2.0 * f);
            ASSUMED.submit_seconds + (bytes / memory).max(6.0 * n * a * d * f / flops_per_s)
        };
        let rows = || (0..=16).map(|power| f64::from(1u32 << power));
        let attention = |length: f64| over_rows(0.0, 4.0 * kv * length, 4.0 * q * length);
        let lengths = [128.0, 512.0, 2048.0, 8192.0];
        let across = |row_bytes: f64| Curve::linear(ASSUMED.submit_seconds, link / row_bytes);
        let row_times = RowTimes { to_host: across(4.0 * (kv + q)), to_device: across(4.0 * q) };
        let shared = ((attend + link) / self.host.bytes_per_s).max(1.0);
        let page = |source, rate| PageCurve { source, seconds: Curve::linear(0.0, rate) };
        Profile {
            version: profile::VERSION,
            machine: MachineKey {
                adapter: self.title.to_owned(),
                driver: "none: a data sheet".to_owned(),
                cpu: "none: a data sheet".to_owned(),
                threads: 1,
                isa: "none".to_owned(),
            },
            model: ModelKey::of(inventory, Precision::F16),
            memory: Memory {
                device_bytes: self.all_device_bytes() as u64,
                device_free_bytes: self.all_device_bytes() as u64,
                host_free_bytes: self.host_bytes as u64,
                binding_bytes: BINDING_BYTES,
                kernels_reach_host: true,
            },
            link: Link {
                to_device: vec![page(SourceKind::Imported, link), page(SourceKind::Pinned, link)],
                to_host: Curve::linear(0.0, link),
                pieces: Curve::linear(1e-6, link),
                small_seconds: ASSUMED.small_copy_seconds,
                to_device_beside_to_host: 1.0,
                to_host_beside_to_device: 1.0,
            },
            disk: Some(profile::Disk {
                what: "none: assumed".to_owned(),
                direct: true,
                page_seconds: Curve::linear(0.0, ASSUMED.disk_bytes_per_s),
            }),
            gpu: profile::Gpu {
                copy_bytes_per_s: memory,
                submit_seconds: ASSUMED.submit_seconds,
                wait_seconds: ASSUMED.wait_seconds,
                embed: over_rows(0.0, 8.0 * d, 0.0),
                pre_attention: projection(q + 2.0 * kv),
                post_attention: projection(q),
                experts: Curve::rising(rows().map(|n| (n, experts(n))).collect()).expect("rows ascend"),
                experts_part: Curve::flat(ASSUMED.submit_seconds),
                head: projection(shape.vocab as f64),
                rows_by_copies: row_times.clone(),
                rows_by_kernels: Some(row_times),
                decode_attention: Surface::try_from(lengths.map(|length| (length, attention(length))).to_vec())
                    .expect("lengths ascend"),
                prompt_attention: Surface::try_from(
                    lengths.map(|length| (length, over_rows(0.0, 8.0 * (q + kv), 2.0 * q * length))).to_vec(),
                )
                .expect("lengths ascend"),
            },
            cpu: profile::Cpu {
                attention: vec![ThreadCurve { threads: 1, bytes_per_s: Curve::flat(attend) }],
                attention_int8: vec![ThreadCurve {
                    threads: 1,
                    bytes_per_s: Curve::flat(ASSUMED.int8_attention * attend),
                }],
                task_seconds: ASSUMED.cpu_task_seconds,
                store: Curve::linear(0.0, attend / (4.0 * kv)),
                dram_read: Curve::flat(self.host.bytes_per_s),
            },
            contention: Contention {
                pages_beside_attention: shared,
                attention_beside_pages: shared,
                ..Contention::NONE
            },
            // A pass of 3,392 tasks takes 12.6 ms on two slow cores.
            host: profile::Host { schedule: Curve::linear(0.0, 3392.0 / 6e-3), task_seconds: 20e-6 },
        }
    }

    /// What may be taken: 90 % of the device's memory and 80 % of the free host memory, as on a machine at hand.
    pub fn limits(&self) -> MachineLimits {
        MachineLimits {
            device_bytes: (0.9 * self.all_device_bytes()) as u64,
            host_bytes: (0.8 * self.host_bytes) as u64,
            binding_bytes: BINDING_BYTES,
            threads: 1,
            kernels_reach_host: true,
            cooperative: true,
        }
    }
}

/// The shape of a published model by name, in any case; [`NAMES`](crate::model::presets::NAMES) lists them.
pub fn shape(name: &str) -> Option<Shape> {
    crate::model::presets::preset(&name.to_ascii_lowercase()).map(|config| config.shape)
}
