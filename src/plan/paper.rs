//! The paper mode: the policy optimizer of MoE-Lightning (arXiv 2411.11217, section 4.2, equations (12) to (14)) as its
//! published artifact solves it, so that its policies come out again and can be judged. fulmen's own planning does not use it.
//!
//! In: a model's shape, a machine, prompt and answer lengths ([`Setting`]). Out: the policy `(N, µ, A_g, F_g, r_w, r_c)` with
//! the highest predicted decode throughput ([`PaperPlan`]), or what does not fit, in numbers.
//!
//! # The model
//!
//! Per layer, with s prompt tokens and n generated ones, N sequences in n_ub micro-batches of µ, f16 everywhere
//! (`W = 2 · 3 E D F` bytes of a layer's experts):
//!
//! ```text
//! (12) T     = max(T_link, T_host, T_device)                       minimised over T/N
//! (13) T_device = T_attn^g + T_ffn^g        T_host = T_attn^c      (experts on the device: F_g = 1)
//! (14) T_x^d = max(bytes_x / b_d, flops_x / p_d)
//!
//! T_link  = (W (1 - r_w) + A_g · 4 (s + n/2) G K N (1 - r_c)) / b_cg
//! T_ffn^g = n_ub · max(6 µ A D F / p_g, (2 µ D + 2 µ F + W) / b_g)     every micro-batch reads all experts
//! T_attn  = n_ub · max(2 µ (s+n) H (K + 1) / p, (4 µ H K + 4 µ (s+n) G K) / b)
//! ```
//!
//! Device memory, whose larger bracket counts (decode, prefill; t devices hold rows t times):
//!
//! ```text
//! 4 (D H K + D G K) L + W L r_w + 2 W (1 - r_w) + 2.4 µ s A (t D + 3 F)
//!   + max(4 D N t,  t (4 D µ s + 2 D N s) + 8 s G K µ)                         <= 0.86 m_g
//! ```
//!
//! and host memory:
//!
//! ```text
//! W L (1 - r_w) + 2 W (1 - r_w) + 4 (s+n) G K N L + 2 D N s t                  <= 0.8 m_c
//! ```
//!
//! With A_g = 1 the share r_c of K and V stays on the device (in both brackets), and two micro-batches of one layer's other
//! K and V are on their way. The artifact fixes A_g = 0; the two-sided search here finds that too in every setting of the paper
//! (a test).
//!
//! Which parts of the real machine this leaves out is known, and kept, because the aim is the paper's own answer: the
//! projections, router and LM head cost nothing, attention counts Q·Kᵀ and not the sum of V, all K and V are of full length
//! `s + n`, and µ is limited by the scratch memory of *prefill*.
//!
//! # The search
//!
//! µ over 1, 2, 3, 4, 36, 68, 100, … until one micro-batch does not fit; for each, n_ub from 1 until it does not fit or predicted
//! throughput drops (found by doubling and bisection); inside, a linear program over (r_w, r_c)
//! ([`linear`](super::linear)). Predicted throughput is `N n / (T (n - 1) L)`.
//!
//! Where device or host bind, throughput does not depend on n_ub: a **plateau** of policies that are exactly equal. The
//! artifact's pick there is an accident of its solver's last digits (HELM reasoning on a T4: 26 of 19 to 41). Here the fewest
//! sequences win – same speed, least memory and latency – and the plateau is part of the answer.
//!
//! # Constants
//!
//! They are in [`presets`](super::presets), worked out once for all settings: the artifact's rates are **GiB/s** (bytes over
//! "16 GB/s" with a GB of 2^30); free host memory is 184.2 to 184.5 GiB on the 192 GB machines and 408 GiB on the 416 GB ones;
//! host memory rate 100 on the T4 machines and 76 on the L4 machine; with t devices m_g, b_g and p_g are t-fold while b_cg, b_c
//! and m_c are not.

use std::cmp::Ordering;

use super::hrm::{Load, PolicyPoint, Roof, SteadyState, Work, layer_expert_elements};
use super::linear::{HalfPlane, minimise};
use super::presets::HardwarePreset;
use crate::model::Shape;
use crate::policy::AttentionPlace;
use crate::units::human_bytes;

/// The shares of device and host memory that the artifact's optimizer fills.
pub const DEVICE_SHARE: f64 = 0.86;
pub const HOST_SHARE: f64 = 0.8;

/// Two throughputs are the same within rounding.
const SAME: f64 = 1e-9;

/// What is planned for.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Setting {
    pub shape: Shape,
    pub hardware: HardwarePreset,
    /// s: mean (padded: longest) prompt, tokens.
    pub prompt_tokens: usize,
    /// n: tokens generated for each prompt.
    pub generated_tokens: usize,
}

/// Device memory by purpose, bytes.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct DeviceBytes {
    /// Attention projections, all layers.
    pub projections: f64,
    /// Experts that stay.
    pub resident_experts: f64,
    /// Two layers' worth of the experts that stream.
    pub expert_buffers: f64,
    /// K and V that stay.
    pub resident_kv: f64,
    /// Rows of decode or buffers of prefill, whichever is more.
    pub rows: f64,
    /// Scratch of the experts' kernel in prefill.
    pub expert_scratch: f64,
    pub allowed: f64,
}

impl DeviceBytes {
    pub fn total(&self) -> f64 {
        self.projections
            + self.resident_experts
            + self.expert_buffers
            + self.resident_kv
            + self.rows
            + self.expert_scratch
    }
}

/// Host memory by purpose, bytes.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct HostBytes {
    pub experts: f64,
    /// Two layers' worth of pinned memory.
    pub staging: f64,
    pub kv: f64,
    /// Hidden states of prefill.
    pub rows: f64,
    pub allowed: f64,
}

impl HostBytes {
    pub fn total(&self) -> f64 {
        self.experts + self.staging + self.kv + self.rows
    }
}

/// (12): a layer's times on the three resources, seconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct LayerSeconds {
    pub link: f64,
    pub device: f64,
    pub host: f64,
}

/// A policy and what the model says of it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct PaperPlan {
    /// µ
    pub micro_batch: usize,
    /// n_ub
    pub micro_batches: usize,
    /// N = µ n_ub
    pub sequences: usize,
    /// A_g: where decode rows attend.
    pub attention: AttentionPlace,
    /// r_w: share of the experts that stays on the device.
    pub resident_weights: f64,
    /// r_c: share of K and V that stays there.
    pub resident_kv: f64,
    /// First and last n_ub with this µ and exactly this throughput, among those that fit.
    pub plateau: (usize, usize),
    pub layer_seconds: LayerSeconds,
    /// One decode step, all layers.
    pub step_seconds: f64,
    /// Generated tokens per second of decode: N n / (T (n - 1) L). The artifact's objective; prefill is not in it.
    pub tokens_per_second: f64,
    /// Prefill of all N prompts, by the same roofs.
    pub prefill_seconds: f64,
    /// N n tokens over prefill and n - 1 steps.
    pub run_tokens_per_second: f64,
    /// What each roof carries in a decode step.
    pub loads: Vec<Load>,
    pub device_memory: DeviceBytes,
    pub host_memory: HostBytes,
}

impl PaperPlan {
    /// What sets the step, in words with numbers when printed: the resource that takes longest, by its largest load.
    pub fn binding(&self) -> Load {
        let LayerSeconds { link, device, host } = self.layer_seconds;
        let on: &[Roof] = if link >= device.max(host) {
            &[Roof::Link]
        } else if device >= host {
            &[Roof::DeviceMemory, Roof::DeviceCompute]
        } else {
            &[Roof::HostMemory, Roof::HostCompute]
        };
        let loads: Vec<Load> = self.loads.iter().copied().filter(|load| on.contains(&load.roof)).collect();
        Load::binding(&loads)
    }

    /// The same policy for the roofline's bound; the paper counts all contexts at full length.
    pub fn point(&self, setting: &Setting) -> PolicyPoint {
        PolicyPoint {
            micro_batch: self.micro_batch,
            micro_batches: self.micro_batches,
            resident_weights: self.resident_weights,
            attention_on_device: self.attention == AttentionPlace::Gpu,
            resident_kv: self.resident_kv,
            context: (setting.prompt_tokens + setting.generated_tokens) as f64,
        }
    }
}

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PaperError {
    #[error("{option} is {value}; it must be {allowed}")]
    Option { option: &'static str, value: usize, allowed: String },
    #[error(
        "no policy fits {hardware}: one sequence of {tokens} tokens needs {} of {side} memory ({what}); \
         {} are allowed, {percent} % of {}",
        human_bytes(*.needed as u64), human_bytes(*.allowed as u64), human_bytes(*.memory as u64)
    )]
    Memory {
        hardware: &'static str,
        tokens: usize,
        side: &'static str,
        what: String,
        needed: f64,
        allowed: f64,
        memory: f64,
        percent: u32,
    },
}

/// What depends on (µ, n_ub, A_g) alone: constants of the linear program.
struct Sizes {
    /// W: experts of one layer.
    layer_experts: f64,
    projections: f64,
    /// All K and V at full length.
    kv: f64,
    /// All K and V of the prompts.
    prompt_kv: f64,
    /// One layer's K and V of two micro-batches: of the prompts in prefill, of everything in decode.
    moving_prompt_kv: f64,
    moving_kv: f64,
    decode_rows: f64,
    prefill_rows: f64,
    scratch: f64,
    host_rows: f64,
}

impl Setting {
    /// Refuses lengths that the model cannot speak of.
    pub fn check(&self) -> Result<(), PaperError> {
        const MOST: usize = 1 << 24;
        let allowed = |least: usize| format!("{least} to {MOST}");
        let (prompt, generated) = (self.prompt_tokens, self.generated_tokens);
        if !(1..=MOST).contains(&prompt) {
            return Err(PaperError::Option { option: "--prompt-len", value: prompt, allowed: allowed(1) });
        }
        if !(2..=MOST).contains(&generated) {
            // The first token is prefill's, so decode has n - 1 steps.
            return Err(PaperError::Option { option: "--gen-len", value: generated, allowed: allowed(2) });
        }
        Ok(())
    }

    fn sizes(&self, micro_batch: usize, micro_batches: usize) -> Sizes {
        let shape = &self.shape;
        let (layers, d, f) = (shape.layers as f64, shape.d_model as f64, shape.expert_width as f64);
        let (heads, kv_width) = (shape.q_width() as f64, shape.kv_width() as f64);
        let experts_per_token = shape.experts_per_token as f64;
        let (s, n) = (self.prompt_tokens as f64, self.generated_tokens as f64);
        let t = self.hardware.devices as f64;
        let micro = micro_batch as f64;
        let rows = micro * micro_batches as f64;
        Sizes {
            layer_experts: 2.0 * layer_expert_elements(shape),
            projections: 4.0 * d * (heads + kv_width) * layers,
            kv: 4.0 * (s + n) * kv_width * rows * layers,
            prompt_kv: 4.0 * s * kv_width * rows * layers,
            moving_prompt_kv: 8.0 * s * kv_width * micro,
            moving_kv: 8.0 * (s + n) * kv_width * micro,
            decode_rows: 4.0 * d * rows * t,
            prefill_rows: t * (4.0 * d * micro * s + 2.0 * d * rows * s),
            scratch: 2.4 * micro * s * experts_per_token * (t * d + 3.0 * f),
            host_rows: 2.0 * d * rows * s * t,
        }
    }

    /// The best r_w and r_c for a micro-batch size, a number of micro-batches and a place of attention, and what the model says
    /// of them. None where nothing fits.
    pub fn evaluate(&self, micro_batch: usize, micro_batches: usize, attention: AttentionPlace) -> Option<PaperPlan> {
        let size = self.sizes(micro_batch, micro_batches);
        let (s, n) = (self.prompt_tokens as f64, self.generated_tokens as f64);
        let (layers, rows) = (self.shape.layers as f64, (micro_batch * micro_batches) as f64);
        let on_device = f64::from(u8::from(attention == AttentionPlace::Gpu));
        let w = size.layer_experts;
        let device_allowed = DEVICE_SHARE * self.hardware.all_device_bytes();
        let host_allowed = HOST_SHARE * self.hardware.host_bytes;

        // Each bracket of device memory is a half-plane in (r_w, r_c); so is host memory; the box closes them in.
        let per_r_w = w * layers - 2.0 * w;
        let fixed = size.projections + 2.0 * w + size.scratch;
        let decode_moving = on_device * size.moving_kv;
        let [x, y] = minimise(
            // The link's bytes, but for a constant.
            [-w, -on_device * 4.0 * (s + n / 2.0) * self.shape.kv_width() as f64 * rows],
            &[
                HalfPlane::at_most([1.0, 0.0], 1.0),
                HalfPlane::at_most([-1.0, 0.0], 0.0),
                HalfPlane::at_most([0.0, 1.0], on_device),
                HalfPlane::at_most([0.0, -1.0], 0.0),
                HalfPlane::at_most(
                    [per_r_w, size.kv - decode_moving],
                    device_allowed - fixed - size.decode_rows - decode_moving,
                ),
                HalfPlane::at_most(
                    [per_r_w, size.prompt_kv - size.moving_prompt_kv],
                    device_allowed - fixed - size.prefill_rows - size.moving_prompt_kv,
                ),
                HalfPlane::at_most(
                    [-w * (layers + 2.0), -size.kv],
                    host_allowed - w * (layers + 2.0) - size.kv - size.host_rows,
                ),
            ],
        )?;
        // A corner on the box's edge may be off by the last bits, or be -0.
        let [resident_weights, resident_kv] = [x, y].map(|share| share.clamp(0.0, 1.0) + 0.0);
        let streamed = 1.0 - resident_weights;

        let decode_rows = size.decode_rows + decode_moving * (1.0 - resident_kv);
        let prefill_rows = size.prefill_rows + size.moving_prompt_kv * (1.0 - resident_kv);
        let (decode_kv, prefill_kv) = (size.kv * resident_kv, size.prompt_kv * resident_kv);
        let decode_is_more = decode_rows + decode_kv >= prefill_rows + prefill_kv;
        let device_memory = DeviceBytes {
            projections: size.projections,
            resident_experts: w * layers * resident_weights,
            expert_buffers: 2.0 * w * streamed,
            resident_kv: if decode_is_more { decode_kv } else { prefill_kv },
            rows: if decode_is_more { decode_rows } else { prefill_rows },
            expert_scratch: size.scratch,
            allowed: device_allowed,
        };
        let host_memory = HostBytes {
            experts: w * layers * streamed,
            staging: 2.0 * w * streamed,
            kv: size.kv * (1.0 - resident_kv),
            rows: size.host_rows,
            allowed: host_allowed,
        };

        let (loads, layer_seconds) = self.decode(micro_batch, micro_batches, attention, resident_weights, resident_kv);
        let layer = layer_seconds.link.max(layer_seconds.device).max(layer_seconds.host);
        let prefill_seconds = layers * self.prefill_layer_seconds(micro_batch, micro_batches, resident_weights);
        Some(PaperPlan {
            micro_batch,
            micro_batches,
            sequences: micro_batch * micro_batches,
            attention,
            resident_weights,
            resident_kv,
            plateau: (micro_batches, micro_batches),
            layer_seconds,
            step_seconds: layer * layers,
            tokens_per_second: rows * n / (layer * (n - 1.0) * layers),
            prefill_seconds,
            run_tokens_per_second: rows * n / (prefill_seconds + layer * (n - 1.0) * layers),
            loads,
            device_memory,
            host_memory,
        })
    }

    /// (12) to (14) for one decode step: loads of all layers, times of one.
    fn decode(
        &self,
        micro_batch: usize,
        micro_batches: usize,
        attention: AttentionPlace,
        resident_weights: f64,
        resident_kv: f64,
    ) -> (Vec<Load>, LayerSeconds) {
        let hierarchy = self.hardware.hierarchy();
        let (s, n) = (self.prompt_tokens as f64, self.generated_tokens as f64);
        let (micro, times) = (micro_batch as f64, micro_batches as f64);
        let kv_width = self.shape.kv_width() as f64;
        let experts = Work::experts(&self.shape, micro, 2.0).times(times);
        let attention_work = attention_work(&self.shape, micro, 1.0, s + n).times(times);
        let kv_over_link = match attention {
            AttentionPlace::Cpu => 0.0,
            AttentionPlace::Gpu => 4.0 * (s + n / 2.0) * kv_width * micro * times * (1.0 - resident_kv),
        };
        let on_link = 2.0 * layer_expert_elements(&self.shape) * (1.0 - resident_weights) + kv_over_link;
        let load = |roof, amount, rate| Load { roof, amount, rate };
        // (14): a task is as slow as the slower of its two roofs.
        let slower = |work: Work, memory: Roof, compute: Roof| {
            let level = if memory == Roof::DeviceMemory { hierarchy.device } else { hierarchy.host };
            Load::binding(&[load(memory, work.bytes, level.bytes_per_s), load(compute, work.flops, level.flops_per_s)])
        };
        let ffn = slower(experts, Roof::DeviceMemory, Roof::DeviceCompute);
        let attend = match attention {
            AttentionPlace::Cpu => slower(attention_work, Roof::HostMemory, Roof::HostCompute),
            AttentionPlace::Gpu => slower(attention_work, Roof::DeviceMemory, Roof::DeviceCompute),
        };
        let link = load(Roof::Link, on_link, hierarchy.link_bytes_per_s);
        let seconds = match attention {
            AttentionPlace::Cpu => LayerSeconds { link: link.seconds(), device: ffn.seconds(), host: attend.seconds() },
            // (13): tasks of one resource follow each other.
            AttentionPlace::Gpu => {
                LayerSeconds { link: link.seconds(), device: ffn.seconds() + attend.seconds(), host: 0.0 }
            }
        };
        let mut loads = vec![link, ffn];
        match loads.iter_mut().find(|one| one.roof == attend.roof) {
            Some(same) => same.amount += attend.amount,
            None => loads.push(attend),
        }
        for one in &mut loads {
            one.amount *= self.shape.layers as f64;
        }
        (loads, seconds)
    }

    /// The artifact's own prefill model: everything on the device, weights and hidden states over the link.
    fn prefill_layer_seconds(&self, micro_batch: usize, micro_batches: usize, resident_weights: f64) -> f64 {
        let hierarchy = self.hardware.hierarchy();
        let (s, micro, times) = (self.prompt_tokens as f64, micro_batch as f64, micro_batches as f64);
        let rows_bytes = 2.0 * micro * times * s * self.shape.d_model as f64;
        let weights = 2.0 * layer_expert_elements(&self.shape) * (1.0 - resident_weights);
        let seconds = |work: Work| {
            times * (work.flops / hierarchy.device.flops_per_s).max(work.bytes / hierarchy.device.bytes_per_s)
        };
        let device =
            seconds(Work::experts(&self.shape, micro * s, 2.0)) + seconds(attention_work(&self.shape, micro, s, s));
        ((weights + rows_bytes) / hierarchy.link_bytes_per_s).max(device)
    }

    /// The policy with the highest predicted decode throughput. Among equals: the fewest sequences, then the larger micro-batch.
    pub fn search(&self) -> Result<PaperPlan, PaperError> {
        self.check()?;
        let mut best: Option<PaperPlan> = None;
        for attention in [AttentionPlace::Cpu, AttentionPlace::Gpu] {
            let sizes = (1..=4).chain((36..).step_by(32));
            for found in sizes.map_while(|micro_batch| self.best_micro_batches(micro_batch, attention)) {
                let better = best.as_ref().is_none_or(|best| match compare(&found, best) {
                    Ordering::Greater => true,
                    Ordering::Less => false,
                    // A tie between places goes to the host, where the artifact has it.
                    Ordering::Equal => found.attention == best.attention && found.sequences <= best.sequences,
                });
                if better {
                    best = Some(found);
                }
            }
        }
        best.ok_or_else(|| self.what_does_not_fit())
    }

    /// The fewest micro-batches of this size with the highest throughput, and the plateau they are on. None where one micro-batch
    /// does not fit.
    fn best_micro_batches(&self, micro_batch: usize, attention: AttentionPlace) -> Option<PaperPlan> {
        let at = |micro_batches| self.evaluate(micro_batch, micro_batches, attention);
        at(1)?;
        // Throughput over n_ub rises, is level, falls, and ends where memory does (a test scans for exceptions), so both ends of
        // the level part are found by doubling and bisection.
        let rises =
            |n: usize| at(n).zip(at(n + 1)).is_some_and(|(this, next)| compare(&next, &this) == Ordering::Greater);
        let first = first_without(1, rises);
        let mut best = at(first)?;
        let level = |n: usize| at(n).is_some_and(|plan| compare(&plan, &best) == Ordering::Equal);
        best.plateau.1 = first_without(first, level) - 1;
        Some(best)
    }

    /// Why not even one sequence has a policy.
    fn what_does_not_fit(&self) -> PaperError {
        let size = self.sizes(1, 1);
        let (layers, w) = (self.shape.layers as f64, size.layer_experts);
        let tokens = self.prompt_tokens + self.generated_tokens;
        let hardware = self.hardware.name;
        let words = |bytes: f64| human_bytes(bytes as u64);
        // Two layers' buffers, or everything resident: whichever is less.
        let experts = (2.0 * w).min(w * layers);
        let rows = size.decode_rows.max(size.prefill_rows + size.moving_prompt_kv);
        let needed = size.projections + experts + size.scratch + rows;
        let memory = self.hardware.all_device_bytes();
        let allowed = DEVICE_SHARE * memory;
        if needed > allowed {
            let what = format!(
                "projections {}, two layers of experts {}, rows and scratch {}",
                words(size.projections),
                words(experts),
                words(rows + size.scratch)
            );
            let percent = (100.0 * DEVICE_SHARE).round() as u32;
            return PaperError::Memory { hardware, tokens, side: "device", what, needed, allowed, memory, percent };
        }
        // As many experts as the device takes are off the host.
        let per_r_w = w * (layers - 2.0);
        let resident = if per_r_w <= 0.0 { 1.0 } else { ((allowed - needed) / per_r_w).min(1.0) };
        let streamed = 1.0 - resident;
        let (experts, staging) = (w * layers * streamed, 2.0 * w * streamed);
        let needed = experts + staging + size.kv + size.host_rows;
        let memory = self.hardware.host_bytes;
        let what = format!(
            "experts {}, staging {}, K and V {}, rows {}",
            words(experts),
            words(staging),
            words(size.kv),
            words(size.host_rows)
        );
        let (allowed, percent) = (HOST_SHARE * memory, (100.0 * HOST_SHARE).round() as u32);
        PaperError::Memory { hardware, tokens, side: "host", what, needed, allowed, memory, percent }
    }

    /// What bounds every policy with decode attention on the host, whatever its schedule: all of device memory that the projections
    /// leave holds experts, all of host memory that the other experts leave holds K and V, and prefill rides on decode's weights.
    /// As everywhere in this model only the experts' FLOP are counted. For
    /// [`steady_state_bound`](super::hrm::steady_state_bound). None where the experts alone do not fit.
    pub fn steady_state(&self) -> Option<SteadyState> {
        let layers = self.shape.layers as f64;
        let size = self.sizes(1, 1);
        let on_device = DEVICE_SHARE * self.hardware.all_device_bytes() - size.projections;
        let streamed = (size.layer_experts * layers - on_device.max(0.0)).max(0.0);
        let kv_memory_bytes = HOST_SHARE * self.hardware.host_bytes - streamed;
        (on_device > 0.0 && kv_memory_bytes > 0.0).then(|| SteadyState {
            weight_bytes: streamed,
            kv_bytes_per_token: 2.0 * self.shape.kv_elements_per_token() as f64,
            kv_memory_bytes,
            flops_per_token: layers * Work::experts(&self.shape, 1.0, 2.0).flops,
            prompt_tokens: self.prompt_tokens as f64,
            generated_tokens: self.generated_tokens as f64,
        })
    }

    /// What a little more of each resource would buy: the best plan with it. Steps of µ and whole micro-batches make the gain
    /// jump, and it may be nothing.
    pub fn with_more(&self) -> [(&'static str, Setting); 4] {
        const GIB: f64 = (1u64 << 30) as f64;
        let more = |change: &dyn Fn(&mut HardwarePreset)| {
            let mut setting = *self;
            change(&mut setting.hardware);
            setting
        };
        [
            ("1 GiB more device memory", more(&|hardware| hardware.device_bytes += GIB / hardware.devices as f64)),
            ("10 GiB more host memory", more(&|hardware| hardware.host_bytes += 10.0 * GIB)),
            ("1 GiB/s more over the link", more(&|hardware| hardware.link_bytes_per_s += GIB)),
            (
                "10 GiB/s more device memory rate",
                more(&|hardware| {
                    hardware.device.bytes_per_s += 10.0 * GIB / hardware.devices as f64;
                }),
            ),
        ]
    }
}

/// The first number from `start` on that does not have a property which all before it have.
fn first_without(start: usize, has: impl Fn(usize) -> bool) -> usize {
    if !has(start) {
        return start;
    }
    let (mut with, mut step) = (start, 1);
    while has(with + step) {
        with += step;
        step *= 2;
    }
    let mut without = with + step;
    while without - with > 1 {
        let middle = with + (without - with) / 2;
        if has(middle) { with = middle } else { without = middle }
    }
    without
}

/// Higher throughput is greater; equal within rounding.
fn compare(one: &PaperPlan, other: &PaperPlan) -> Ordering {
    let (one, other) = (one.tokens_per_second, other.tokens_per_second);
    if (one - other).abs() <= SAME * other { Ordering::Equal } else { one.total_cmp(&other) }
}

/// The artifact's attention over `queries` rows of each of `sequences`: scores and softmax, not the sum over V; queries, K, V and
/// output in f16.
fn attention_work(shape: &Shape, sequences: f64, queries: f64, context: f64) -> Work {
    let (heads, width) = (shape.q_heads as f64, shape.head_width as f64);
    let kv_width = shape.kv_width() as f64;
    Work {
        flops: 2.0 * sequences * queries * context * heads * (width + 1.0),
        bytes: 4.0 * sequences * (queries * heads * width + context * kv_width),
    }
}
