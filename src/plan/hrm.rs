//! The hierarchical roofline model of MoE-Lightning (Cao et al., "MoE-Lightning: High-Throughput MoE Inference on
//! Memory-constrained GPUs", arXiv 2411.11217, section 3), equations (1) to (11), and what follows from them: which roof binds
//! a computation, where work should move from the host to the device, and the best that any policy can reach.
//!
//! A [`Hierarchy`] has two levels, the device i (GPU and its memory) and the host j (CPU and DRAM), joined by a link. A
//! computation is [`Work`]: FLOP, and the bytes that it has to see. Its intensity I = FLOP / bytes may differ between the
//! levels, because what is read once from the host (all experts, once a layer) is read several times on the device (once per
//! micro-batch).
//!
//! ```text
//! P (FLOP/s)                    ______________ device peak
//!                  device roof /    /
//!                             /    / link roof        below P1: leave the data on the host, compute there
//!        host peak  _________/____/______________     P1 to P2: move it, the link is the limit
//!                  /        /   P1     P2             above P2: move it, the device is the limit
//! host roof       /                                   I (FLOP per byte of the host's data)
//! ```
//!
//! Guarantees: plain functions of plain numbers; rates in FLOP/s and bytes/s, sizes in bytes, so that every figure can be
//! checked by hand. Given up: launch overheads, latencies and contention; nothing here knows a schedule. A bound is a bound.

use std::fmt;

use crate::model::Shape;
use crate::units::human_bytes;

/// One level of the hierarchy: a processor and the memory beside it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Level {
    /// P_peak
    pub flops_per_s: f64,
    /// B_peak, of the memory.
    pub bytes_per_s: f64,
}

/// Two levels and the link between them.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Hierarchy {
    /// Level i.
    pub device: Level,
    /// Level j.
    pub host: Level,
    /// B_peak^{j,i}: host to device.
    pub link_bytes_per_s: f64,
}

/// A computation as the model sees it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Work {
    pub flops: f64,
    /// Bytes that it reads and writes at the level in question.
    pub bytes: f64,
}

impl Work {
    /// I: FLOP per byte.
    pub fn intensity(&self) -> f64 {
        self.flops / self.bytes
    }

    /// The same, `times` over.
    pub fn times(self, times: f64) -> Work {
        Work { flops: self.flops * times, bytes: self.bytes * times }
    }

    /// One layer's decode attention of `sequences` rows over `context` tokens each: Q·Kᵀ and the weighted sum of V, a
    /// multiply and an add each. Reads K and V, `kv_bytes` per element (2 for f16, ½ for 4 bits).
    ///
    /// Its intensity does not depend on the batch: with grouped queries and f16 it is H/G FLOP per byte, 4 for Mixtral.
    pub fn decode_attention(shape: &Shape, sequences: f64, context: f64, kv_bytes: f64) -> Work {
        Work {
            flops: 4.0 * sequences * context * shape.q_width() as f64,
            bytes: 2.0 * sequences * context * shape.kv_width() as f64 * kv_bytes,
        }
    }

    /// One layer's experts over `rows` rows: gate, up and down of A experts per row. Reads all E experts once (with hundreds of
    /// rows each is taken by some), and the rows' f16 inputs and outputs as the paper counts them, D and F wide.
    pub fn experts(shape: &Shape, rows: f64, weight_bytes: f64) -> Work {
        let (d, f) = (shape.d_model as f64, shape.expert_width as f64);
        Work {
            flops: 6.0 * rows * shape.experts_per_token as f64 * d * f,
            bytes: layer_expert_elements(shape) * weight_bytes + 2.0 * rows * (d + f),
        }
    }
}

/// Elements of all experts of one layer, `3 E D F`.
pub fn layer_expert_elements(shape: &Shape) -> f64 {
    3.0 * shape.experts as f64 * shape.expert_matrix_elements() as f64
}

/// (1) `P <= B_peak · I`: the roof that a memory or a link sets.
pub fn memory_roof(bytes_per_s: f64, intensity: f64) -> f64 {
    bytes_per_s * intensity
}

/// (2) with (1): the attainable performance at one level, `min(P_peak, B_peak · I)`. This is also (8), for data that is already
/// at the level.
pub fn attainable(level: &Level, intensity: f64) -> f64 {
    level.flops_per_s.min(memory_roof(level.bytes_per_s, intensity))
}

/// (3) `Ī = P_peak / B_peak`: the intensity from which a level is limited by its arithmetic.
pub fn ridge_intensity(level: &Level) -> f64 {
    level.flops_per_s / level.bytes_per_s
}

/// (4), (5), (6): the three roofs over a computation on the device whose data comes from the host. `at_device` and `at_host` are
/// its intensities at the two levels.
pub fn device_roofs(hierarchy: &Hierarchy, at_device: f64, at_host: f64) -> [(Roof, f64); 3] {
    [
        (Roof::DeviceCompute, hierarchy.device.flops_per_s),
        (Roof::DeviceMemory, memory_roof(hierarchy.device.bytes_per_s, at_device)),
        (Roof::Link, memory_roof(hierarchy.link_bytes_per_s, at_host)),
    ]
}

/// (7) `min(P_peak^i, B_peak^i · I^i, B_peak^{j,i} · I^j)`: attainable on the device with data from the host, and the roof that
/// sets it. The first of equals is named.
pub fn attainable_on_device(hierarchy: &Hierarchy, at_device: f64, at_host: f64) -> (Roof, f64) {
    let roofs = device_roofs(hierarchy, at_device, at_host);
    roofs.into_iter().reduce(|lowest, roof| if roof.1 < lowest.1 { roof } else { lowest }).expect("three roofs")
}

/// (9) P1 = `min(P_peak^j, B_peak^j · I^j) / B_peak^{j,i}`: below this intensity the link is slower than the host's own
/// processor, so the data stays and the host computes.
pub fn turning_point_p1(hierarchy: &Hierarchy, at_host: f64) -> f64 {
    attainable(&hierarchy.host, at_host) / hierarchy.link_bytes_per_s
}

/// (10) P2 = `min(P_peak^i, B_peak^i · I^i) / B_peak^{j,i}`: below this intensity (at the host) the link is the limit, above it
/// the device.
pub fn turning_point_p2(hierarchy: &Hierarchy, at_device: f64) -> f64 {
    attainable(&hierarchy.device, at_device) / hierarchy.link_bytes_per_s
}

/// (11) `B_peak^i · I^i = B_peak^{j,i} · I^j`, solved for the intensity at the host where link and device memory are in balance.
pub fn balance_intensity(hierarchy: &Hierarchy, at_device: f64) -> f64 {
    memory_roof(hierarchy.device.bytes_per_s, at_device) / hierarchy.link_bytes_per_s
}

/// (11) for experts that device memory limits: a layer's streamed share `1 - r_w` crosses the link once while all experts are
/// read once per micro-batch, so the two take the same time at so many micro-batches, whatever their size.
pub fn balanced_micro_batches(hierarchy: &Hierarchy, resident_weights: f64) -> f64 {
    (1.0 - resident_weights) * hierarchy.device.bytes_per_s / hierarchy.link_bytes_per_s
}

/// Rows over which one layer's experts have a given intensity. None above the intensity that they approach with ever more rows,
/// where the rows themselves are the traffic.
pub fn rows_at_intensity(shape: &Shape, intensity: f64, weight_bytes: f64) -> Option<f64> {
    // I (W + r t) = r f, with W the weights' bytes, t a row's bytes, f its FLOP.
    let none = Work::experts(shape, 0.0, weight_bytes);
    let one = Work::experts(shape, 1.0, weight_bytes);
    let denominator = one.flops - intensity * (one.bytes - none.bytes);
    (denominator > 0.0).then(|| intensity * none.bytes / denominator)
}

/// What sets a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Roof {
    Link,
    DeviceMemory,
    DeviceCompute,
    HostMemory,
    HostCompute,
}

impl Roof {
    /// As in "link-bound".
    pub fn name(self) -> &'static str {
        match self {
            Roof::Link => "link",
            Roof::DeviceMemory => "device-memory",
            Roof::DeviceCompute => "device-compute",
            Roof::HostMemory => "host-memory",
            Roof::HostCompute => "host-compute",
        }
    }

    /// Whether the roof counts FLOP; the others count bytes.
    pub fn is_compute(self) -> bool {
        matches!(self, Roof::DeviceCompute | Roof::HostCompute)
    }
}

/// An amount of work under one roof.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Load {
    pub roof: Roof,
    /// Bytes, or FLOP where the roof counts those.
    pub amount: f64,
    /// The same per second.
    pub rate: f64,
}

impl Load {
    pub fn seconds(&self) -> f64 {
        self.amount / self.rate
    }

    /// The load that takes longest; the first of equals.
    pub fn binding(loads: &[Load]) -> Load {
        let longest = |one: Load, other: Load| if other.seconds() > one.seconds() { other } else { one };
        loads.iter().copied().reduce(longest).expect("a bound has loads")
    }
}

/// `link-bound: 84.0 GiB over 16.0 GiB/s take 5.25 s`
impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, seconds) = (self.roof.name(), human_seconds(self.seconds()));
        if self.roof.is_compute() {
            write!(f, "{name}-bound: {} at {}/s take {seconds}", human_flops(self.amount), human_flops(self.rate))
        } else {
            let (amount, rate) = (human_bytes(self.amount as u64), human_bytes(self.rate as u64));
            write!(f, "{name}-bound: {amount} over {rate}/s take {seconds}")
        }
    }
}

/// FLOP with three digits: `12.5 TFLOP`.
pub fn human_flops(flops: f64) -> String {
    const SCALES: [&str; 6] = ["", "k", "M", "G", "T", "P"];
    let mut value = flops;
    let mut scale = 0;
    while value >= 999.5 && scale + 1 < SCALES.len() {
        value /= 1000.0;
        scale += 1;
    }
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {}FLOP", SCALES[scale])
}

/// A time with three digits: `5.25 s`, `164 ms`.
pub fn human_seconds(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 0.9995 => (s, "s"),
        s if s >= 0.000_999_5 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

/// The choices of a policy that its bound depends on. The paper's letters are beside them.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct PolicyPoint {
    /// µ: sequences whose rows one expert computation takes.
    pub micro_batch: usize,
    /// N / µ
    pub micro_batches: usize,
    /// r_w: share of the experts that stays on the device.
    pub resident_weights: f64,
    /// A_g: decode rows attend on the device, so that K and V cross the link.
    pub attention_on_device: bool,
    /// r_c: share of K and V that stays on the device and does not cross.
    pub resident_kv: f64,
    /// Mean tokens that a row attends to.
    pub context: f64,
}

impl PolicyPoint {
    /// N: rows of a decode pass.
    pub fn sequences(&self) -> usize {
        self.micro_batch * self.micro_batches
    }
}

/// The least time of a pass and what sets it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Bound {
    /// What each roof has to carry in a pass.
    pub loads: Vec<Load>,
    pub pass_seconds: f64,
    pub tokens_per_second: f64,
}

impl Bound {
    fn new(loads: Vec<Load>, tokens: f64) -> Bound {
        let pass_seconds = Load::binding(&loads).seconds();
        Bound { loads, pass_seconds, tokens_per_second: tokens / pass_seconds }
    }

    /// The load that no schedule can hide.
    pub fn binding(&self) -> Load {
        Load::binding(&self.loads)
    }
}

/// The least time of one decode pass of a policy, all layers, everything overlapped: each roof carries its whole load, and the
/// slowest sets the pass. Attention and experts only, as in the paper; f16 weights, K and V.
pub fn policy_bound(hierarchy: &Hierarchy, shape: &Shape, policy: &PolicyPoint) -> Bound {
    let layers = shape.layers as f64;
    let rows = policy.sequences() as f64;
    let experts = Work::experts(shape, policy.micro_batch as f64, 2.0).times(policy.micro_batches as f64 * layers);
    let attention = Work::decode_attention(shape, rows, policy.context, 2.0).times(layers);
    let streamed = layers * layer_expert_elements(shape) * 2.0 * (1.0 - policy.resident_weights);
    let nothing = Work { flops: 0.0, bytes: 0.0 };
    let (on_device, on_host) = if policy.attention_on_device { (attention, nothing) } else { (nothing, attention) };
    let Hierarchy { device, host, link_bytes_per_s } = *hierarchy;
    let load = |roof, amount, rate| Load { roof, amount, rate };
    let loads = vec![
        load(Roof::Link, streamed + on_device.bytes * (1.0 - policy.resident_kv), link_bytes_per_s),
        load(Roof::DeviceMemory, experts.bytes + on_device.bytes, device.bytes_per_s),
        load(Roof::DeviceCompute, experts.flops + on_device.flops, device.flops_per_s),
        load(Roof::HostMemory, on_host.bytes, host.bytes_per_s),
        load(Roof::HostCompute, on_host.flops, host.flops_per_s),
    ];
    Bound::new(loads, rows)
}

/// What the best policy of all is bounded by: prefill rides on the weights that decode streams, requests follow each other
/// without a gap, and host memory is full of K and V.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct SteadyState {
    /// W: bytes of experts that every pass brings over the link.
    pub weight_bytes: f64,
    /// κ: bytes of K and V of one token, all layers.
    pub kv_bytes_per_token: f64,
    /// C_KV: host memory for K and V.
    pub kv_memory_bytes: f64,
    /// F_tok: FLOP of one row through the whole model.
    pub flops_per_token: f64,
    /// s
    pub prompt_tokens: f64,
    /// g
    pub generated_tokens: f64,
}

impl SteadyState {
    /// n = `C_KV / ((s + g/2) κ)`: requests that run at a time, half of them half-way through their answers.
    pub fn requests(&self) -> f64 {
        self.kv_memory_bytes / ((self.prompt_tokens + self.generated_tokens / 2.0) * self.kv_bytes_per_token)
    }
}

/// The steady-state bound `T = max(W / B_link, n (1 + s/g) F_tok / P_eff, C_KV / B_attn)`, tokens per second `n / T`.
///
/// Each running request adds one decode row to a pass and `s/g` prompt rows (a new prompt every g passes), and all of K and V is
/// read. (A prompt's pass gives its first token, so g - 1 decode rows would do: for answers of a few tokens this is no bound.)
/// `hierarchy` holds attainable rates here rather than peaks: the link's, the device's FLOP/s on matmuls of many rows,
/// the host's bytes/s in attention.
pub fn steady_state_bound(hierarchy: &Hierarchy, state: &SteadyState) -> Bound {
    let rows = state.requests() * (1.0 + state.prompt_tokens / state.generated_tokens);
    let load = |roof, amount, rate| Load { roof, amount, rate };
    let loads = vec![
        load(Roof::Link, state.weight_bytes, hierarchy.link_bytes_per_s),
        load(Roof::DeviceCompute, rows * state.flops_per_token, hierarchy.device.flops_per_s),
        load(Roof::HostMemory, state.kv_memory_bytes, hierarchy.host.bytes_per_s),
    ];
    Bound::new(loads, state.requests())
}
