//! The paper's ablation, simulated: its four schedules with its policy and with FlexGen's, in its setting S1 (padded MTBench, 128
//! generated tokens, Mixtral 8x7B on a T4). Which part of the speed-up is the order of tasks, and which the policy?
//!
//! The schedules are those that fulmen runs ([`schedule::build()`](crate::schedule::build())), one decode pass in the middle of a
//! run. Task times are the roofs of the machine's preset, as everywhere in the paper mode, and nothing is fitted to the measured
//! ablation: experts, projections and GPU attention are the slower of their bytes and their FLOP, K and V and rows cross the link
//! at its rate, contexts are those of the mean step (s + n/2). The one constant beside the preset is [`RELAY_BYTES_PER_S`].

use super::hrm::{Level, Work, layer_expert_elements};
use super::paper::Setting;
use crate::policy::{RowPath, ScheduleKind, SpreadLayers};
use crate::schedule::{self, ChunkShape, Cost, MicroBatchShape, PassShape, Timeline, build, simulate};

/// FlexGen as it was measured copies every weight into freshly pinned memory on the launching thread. Rate at which weights reach
/// a T4 that way, fitted by the paper's authors for FlexGen's own cost model.
pub const RELAY_BYTES_PER_S: f64 = 5.43e9;

/// One line of the ablation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Case {
    pub kind: ScheduleKind,
    pub micro_batch: usize,
    pub micro_batches: usize,
    /// r_w
    pub resident_weights: f64,
    /// Weights are pinned one by one on their way.
    pub relay: bool,
    /// tok/s of the whole run in the paper's table 5 and figure 7.
    pub published: Option<f64>,
}

const fn case(kind: ScheduleKind, policy: (usize, usize, f64), relay: bool, published: Option<f64>) -> Case {
    let (micro_batch, micro_batches, resident_weights) = policy;
    Case { kind, micro_batch, micro_batches, resident_weights, relay, published }
}

/// MoE-Lightning's policy for the setting.
const OURS: (usize, usize, f64) = (36, 14, 0.0004);
/// FlexGen's: 8 % of the weights on the GPU.
const FLEXGENS: (usize, usize, f64) = (8, 139, 0.08);
/// MoE-Lightning's with more sequences.
const LARGER: (usize, usize, f64) = (36, 31, 0.0004);

/// Table 5, and the schedules in between; each of FlexGen's with weights relayed, as measured, and pinned once.
pub const CASES: [Case; 10] = [
    case(ScheduleKind::FlexGen, FLEXGENS, true, Some(9.5)),
    case(ScheduleKind::FlexGen, OURS, true, Some(16.816)),
    case(ScheduleKind::FlexGen, LARGER, true, Some(20.654)),
    case(ScheduleKind::FlexGen, FLEXGENS, false, None),
    case(ScheduleKind::FlexGen, OURS, false, None),
    case(ScheduleKind::FlexGen, LARGER, false, None),
    case(ScheduleKind::FlexGenAsync, OURS, false, None),
    case(ScheduleKind::FlexGenC, OURS, false, None),
    case(ScheduleKind::FastDecode, OURS, false, None),
    case(ScheduleKind::CgoPipe, OURS, false, Some(30.12)),
];

/// The setting of the ablation.
pub fn setting() -> Setting {
    use super::presets::{hardware, shape};
    Setting {
        shape: shape("mixtral-8x7b").expect("a known model"),
        hardware: *hardware("t4").expect("a known machine"),
        prompt_tokens: 418,
        generated_tokens: 128,
    }
}

impl Case {
    pub fn sequences(&self) -> usize {
        self.micro_batch * self.micro_batches
    }

    /// A decode pass: a layer's experts in as many pages as there are micro-batches, two layers of slots, the pages of layer 0
    /// there from the pass before.
    pub fn pass(&self, setting: &Setting) -> PassShape {
        let (n, experts) = (self.micro_batches, setting.shape.experts);
        let gpu_attention = matches!(self.kind, ScheduleKind::FlexGen | ScheduleKind::FlexGenAsync);
        let rows = MicroBatchShape {
            gpu_attention,
            cpu_attention: !gpu_attention,
            kv_to_device: gpu_attention,
            sampled: true,
            workspace: 0,
        };
        let pages = (0..n).map(|page| page * experts / n..((page + 1) * experts).div_ceil(n)).collect();
        PassShape {
            layers: setting.shape.layers,
            micro_batches: (0..n).map(|number| MicroBatchShape { workspace: number % 2, ..rows }).collect(),
            groups: (0..n).map(|micro_batch| micro_batch..micro_batch + 1).collect(),
            chunks: vec![ChunkShape { pages }],
            kept: SpreadLayers::default(),
            kept_pages: 0,
            streamed: experts,
            ring: 2 * experts,
            loaded_pages: n,
            load_ahead: true,
            rows: RowPath::Copies,
            relay: self.relay,
        }
    }

    /// What each task takes. Embedding, LM head and sampling cost nothing, as in the paper's model.
    pub fn cost(&self, setting: &Setting) -> impl Fn(schedule::Work) -> Cost {
        let shape = setting.shape;
        let machine = setting.hardware.hierarchy();
        let (d, q, kv) = (shape.d_model as f64, shape.q_width() as f64, shape.kv_width() as f64);
        let rows = self.micro_batch as f64;
        let context = setting.prompt_tokens as f64 + setting.generated_tokens as f64 / 2.0;
        let page = 2.0 * layer_expert_elements(&shape) * (1.0 - self.resident_weights) / self.micro_batches as f64;
        let experts = Work::experts(&shape, rows, 2.0);
        let attention = Work::decode_attention(&shape, rows, context, 2.0);
        let projection = move |outputs: f64| Work { flops: 2.0 * rows * d * outputs, bytes: 2.0 * d * outputs };
        // (14)
        let on = |level: Level, work: Work| {
            Cost::alone((work.bytes / level.bytes_per_s).max(work.flops / level.flops_per_s))
        };
        let over_link = move |bytes: f64| Cost::moving(bytes, machine.link_bytes_per_s);
        move |work| match work {
            schedule::Work::LoadPage { .. } => over_link(page),
            schedule::Work::PinPage { .. } => Cost::moving(page, RELAY_BYTES_PER_S),
            schedule::Work::KvToDevice { .. } => over_link(attention.bytes),
            schedule::Work::RowsToHost { .. } => over_link(2.0 * rows * (q + 2.0 * kv)),
            schedule::Work::RowsToDevice { .. } => over_link(2.0 * rows * q),
            // Where the GPU attends, the host only stores the new keys and values.
            schedule::Work::CpuAttention { .. } => match self.kind {
                ScheduleKind::FlexGen | ScheduleKind::FlexGenAsync => Cost::default(),
                _ => on(machine.host, attention),
            },
            schedule::Work::GpuAttention { .. } => on(machine.device, attention),
            schedule::Work::PreAttention { .. } => on(machine.device, projection(q + 2.0 * kv)),
            schedule::Work::PostAttention { .. } => on(machine.device, projection(q)),
            schedule::Work::Experts { .. } => on(machine.device, experts),
            schedule::Work::Embed { .. }
            | schedule::Work::Head { .. }
            | schedule::Work::Sample { .. }
            | schedule::Work::Barrier { .. } => Cost::default(),
        }
    }

    /// One decode pass.
    pub fn timeline(&self, setting: &Setting) -> Timeline {
        simulate(&build(self.kind, &self.pass(setting)), self.cost(setting))
    }

    /// Tokens per second of decode.
    pub fn tokens_per_second(&self, setting: &Setting) -> f64 {
        self.sequences() as f64 / self.timeline(setting).duration().as_secs_f64()
    }
}
