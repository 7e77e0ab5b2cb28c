//! **fulmen** runs Mixture-of-Experts language models whose weights do not fit on the GPU, for throughput: thousands of
//! prompts in a file, tokens per second as the measure. wgpu and WGSL for the GPU, rayon and SIMD for attention on the CPU.
//!
//! ```text
//! requests ─▶ tokenizer ─▶ batcher ─▶ pass ─▶ schedule ─▶ execute ─▶ sampler ─▶ text
//!                             ▲                                │
//!                             └────────── free KV ◀────────────┘
//! calibrate ─▶ Profile ─▶ plan ─▶ Policy
//! ```
//!
//! A *pass* is one trip of a set of *rows* through all layers; a row is one token of one sequence, a *prompt row* or a *decode
//! row*, and a pass carries any mix. Expert weights come to the GPU in *pages*, into *slots*; everything else stays there.
//! Keys and values live in host memory, in blocks.
//!
//! # Where a decode row goes
//!
//! | step | where | code |
//! |---|---|---|
//! | its sequence is in a micro-batch, whose rows of the next pass are fixed | host | [`request::batcher`] |
//! | the pass becomes a list of tasks | host | [`schedule`] |
//! | each lane (GPU, link both ways, CPU) carries out its tasks in order, beside the others, and times them | both | [`execute`], [`engine`] (`engine/pass.rs`) |
//! | its token becomes a residual row | GPU | `embed` |
//! | per layer: norm, Q K V (biases, their norms), rotary | GPU | `rms_norm` or `layer_norm`, `matmul`, `add_bias`, `qk_norm`, `rotary` |
//! | its query, key and value come to the host; key and value go into the sequence's block | link, host | [`memory::kv_cache`] |
//! | it attends over its blocks | CPU | [`cpu::attention`] (prompt rows: GPU, `prompt_attention`; decode rows too if the policy says so, `decode_attention` and `decode_combine`) |
//! | output projection, norm, router; rows are sorted by expert | GPU | `matmul`, `router_topk`, `expert_sort` |
//! | pages of experts arrive in their slots, on a queue of their own | link | [`memory::pages`], [`memory::page_source`] |
//! | gate, up, down; the weighted sum joins the residual row | GPU | `expert_gate_up`, `expert_down`, `expert_combine` |
//! | after the last layer: LM head, greedy id (whole logits cross only if the request needs them) | GPU | `lm_head_sample` |
//! | the next token is chosen, becomes text, maybe ends the sequence | host | [`request::sampler`], `engine/answers.rs` |
//!
//! # What holds
//!
//! **A policy changes time, never tokens.** A row's result does not depend on which rows share its pass, so schedules, groups, row
//! limits, chunks of prompts, ring and page sizes, preemption, sharding and resuming change no bit (`tests/device/generate.rs`, `pipeline.rs`).
//! Moving decode attention to the GPU and keeping keys and values in 8 bits are the two choices that round differently; all else
//! changes no bit under either.
//!
//! Every kernel has a reference in [`mod@reference`] and a test that compares them; whole models are held against transformers
//! (`tests/goldens`). Nothing that input or machine can cause is a panic.
//!
//! # The library
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use fulmen::engine::{Engine, Event, RunOptions};
//! use fulmen::request::{Request, SamplingParams};
//! use fulmen::request::tokenizer::Tokenizer;
//!
//! let folder = std::path::Path::new("examples/model");
//! let tokenizer = Tokenizer::open(folder)?;
//! let request = Request {
//!     custom_id: "first".into(),
//!     prompt: tokenizer.encode("Rule: X +\nReplace: X by plum\nAnswer:", true)?,
//!     params: SamplingParams { temperature: 0.0, max_tokens: Some(8), ..SamplingParams::default() },
//! };
//! let prepared = Engine::builder(folder).tokenizer(tokenizer).prepare()?;
//! println!("{}", prepared.plan());
//! let mut engine = prepared.load(&mut |_done, _total| {})?;
//! engine.run(&mut [request].into_iter(), RunOptions::default(), &mut |event| {
//!     if let Event::Finished(output) = event {
//!         println!("{}: {:?}", output.custom_id, output.result);
//!     }
//!     ControlFlow::Continue(())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod calibrate;
pub mod checkpoint;
pub mod cli;
pub mod cpu;
pub mod engine;
pub mod execute;
pub mod gpu;
pub mod kernels;
pub mod memory;
pub mod model;
pub mod plan;
pub mod policy;
pub mod profile;
pub mod reference;
pub mod request;
pub mod schedule;
pub mod tune;
pub mod units;
