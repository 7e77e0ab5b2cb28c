//! Kernels as data, pipelines made from them once, dispatches recorded in order.
//!
//! A [`Kernel`] is a name, the WGSL parts that are put together, the access of each binding and the values its tunables may
//! take. `tests/host/shaders.rs` holds all of that against naga's reflection, without a GPU. [`Pipelines`] compiles each
//! (kernel, variant) once; a [`Recorder`](super::Recorder) binds and dispatches.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::device::{Gpu, GpuError};
use super::emulated;
use crate::checkpoint::Dtype;

/// How a kernel uses a storage binding. Parameters are immediates and no binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
}

/// A piece of a kernel's source. WGSL takes module-scope names in any order, so pieces are simply put one after the other.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    Text(&'static str),
    /// The functions that read a weight of the variant's dtype: `shaders/shared/weight_*.wgsl`.
    Weight,
    /// Text that a function beside the kernel makes, where WGSL could only repeat itself.
    Made(fn() -> String),
    /// The same where it depends on the variant's dtype: how a kernel reads weights that may come in blocks (MXFP4).
    MadeFor(fn(Dtype) -> String),
    /// Text made of the variant's tunables, which are then no `override` constants: loops unrolled over tiles, accumulators by name.
    /// Such a kernel needs what [`Gpu::cooperative`] tells of.
    Template(fn(&Variant) -> String),
    /// No text but SPIR-V for the variant's dtype, the kernel's only part. It needs what [`Gpu::workgroup_matrices`] tells of.
    Spirv(fn(Dtype) -> &'static [u8]),
}

/// A field of a kernel's `Params`, as the Rust side lays it out; the macro `params!` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamField {
    pub name: &'static str,
    /// Bytes from the start of the struct.
    pub offset: usize,
    /// Its type in WGSL.
    pub wgsl_type: &'static str,
}

/// A type that means the same in a Rust struct and in a WGSL one.
pub trait ParamType: bytemuck::NoUninit {
    const WGSL: &'static str;
}

impl ParamType for u32 {
    const WGSL: &'static str = "u32";
}

impl ParamType for i32 {
    const WGSL: &'static str = "i32";
}

impl ParamType for f32 {
    const WGSL: &'static str = "f32";
}

/// Defines a struct that a kernel reads as immediates (or reads or writes in a buffer), together with the list of its fields
/// (`FIELDS`), which `tests/host/shaders.rs` compares with the WGSL struct.
macro_rules! params {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl $name {
            /// Every field, in order.
            pub const FIELDS: &'static [$crate::gpu::ParamField] = &[$($crate::gpu::ParamField {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field),
                wgsl_type: <$type as $crate::gpu::ParamType>::WGSL,
            },)*];
        }
    };
}
pub(crate) use params;

/// One compute shader: `shaders/<name>.wgsl`, entry point `main`, bindings of group 0 in order.
#[derive(Debug)]
pub struct Kernel {
    pub name: &'static str,
    pub parts: &'static [Part],
    pub bindings: &'static [Access],
    /// Size in bytes of the `Params` struct, which the kernel reads as immediates.
    pub param_bytes: usize,
    /// Its fields.
    pub params: &'static [ParamField],
    /// `override` constants that only change time, with the values that may be chosen; the first is the default. Of a kernel with a
    /// [`Part::Template`]: what its text is made of.
    pub tunables: &'static [(&'static str, &'static [u32])],
}

impl Kernel {
    /// Reads weights of experts, so it exists for MXFP4 as well.
    fn reads_blocks(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::MadeFor(_)))
    }

    /// Its text depends on the dtype of weights, so it exists once per dtype.
    pub fn reads_weights(&self) -> bool {
        self.parts
            .iter()
            .any(|part| matches!(part, Part::Weight | Part::MadeFor(_) | Part::Template(_) | Part::Spirv(_)))
    }

    /// Its text is made of its tunables.
    pub fn is_template(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Template(_)))
    }

    /// The value that `variant` gives a tunable.
    pub fn tunable(&self, variant: &Variant, name: &str) -> u32 {
        let (_, values) =
            self.tunables.iter().find(|(tunable, _)| *tunable == name).expect("the kernel has the tunable");
        variant.tunables.iter().find(|(tunable, _)| *tunable == name).map_or(values[0], |(_, value)| *value)
    }

    /// Every variant there is: each dtype (one where it reads no weights) with each combination of tunable values.
    pub fn variants(&self) -> Vec<Variant> {
        let dtypes = if self.reads_weights() { &Dtype::ALL[..] } else { &[Dtype::F32] };
        let blocks = self.reads_blocks().then_some(Dtype::Mxfp4);
        let mut variants: Vec<Variant> = dtypes.iter().copied().chain(blocks).map(Variant::new).collect();
        for (name, values) in self.tunables {
            variants = variants
                .iter()
                .flat_map(|variant| {
                    let default = variant.clone();
                    let others = values[1..].iter().map(|value| {
                        let mut variant = variant.clone();
                        variant.tunables.push((name, *value));
                        variant
                    });
                    std::iter::once(default).chain(others)
                })
                .collect();
        }
        variants
    }

    /// The SPIR-V of a variant, where the kernel has no text.
    pub fn spirv(&self, weights: Dtype) -> Option<Vec<u32>> {
        let [Part::Spirv(of)] = self.parts else { return None };
        Some(of(weights).chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect())
    }

    /// The WGSL text of a variant.
    pub fn source(&self, variant: &Variant) -> String {
        let weights = variant.weights;
        let weight_part = match weights {
            Dtype::Bf16 => include_str!("../../shaders/shared/weight_bf16.wgsl"),
            Dtype::F16 => include_str!("../../shaders/shared/weight_f16.wgsl"),
            Dtype::F32 => include_str!("../../shaders/shared/weight_f32.wgsl"),
            Dtype::Mxfp4 => include_str!("../../shaders/shared/weight_mxfp4.wgsl"),
        };
        self.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => Cow::Borrowed(*text),
                Part::Weight => Cow::Borrowed(weight_part),
                Part::Made(make) => Cow::Owned(make()),
                Part::MadeFor(make) => Cow::Owned(make(weights)),
                Part::Template(make) => Cow::Owned(make(variant)),
                Part::Spirv(_) => panic!("{} is SPIR-V and has no text", self.name),
            })
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// What is fixed when a kernel is compiled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Dtype of the weights that it reads; any value where it reads none.
    pub weights: Dtype,
    /// Tunables that differ from their default.
    pub tunables: Vec<(&'static str, u32)>,
}

impl Variant {
    /// The default tunables.
    pub fn new(weights: Dtype) -> Self {
        Self { weights, tunables: Vec::new() }
    }

    /// With `value` for a tunable.
    pub fn with(mut self, tunable: &'static str, value: u32) -> Self {
        self.tunables.push((tunable, value));
        self
    }
}

/// A text replacement in one kernel's source: how tests plant a fault and see that it is noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShaderPatch {
    pub kernel: String,
    pub from: String,
    pub to: String,
}

/// Compiled kernels of one device.
pub struct Pipelines {
    gpu: Arc<Gpu>,
    patches: Vec<ShaderPatch>,
    compiled: Mutex<HashMap<(&'static str, Variant), Place>>,
}

/// Of one variant: locked while it is compiled.
type Place = Arc<Mutex<Option<Arc<Pipeline>>>>;

/// Other threads compile, until all is done or this is dropped.
pub struct Preparing {
    left: Arc<Mutex<Vec<(&'static Kernel, Variant)>>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.left.lock().expect("list lock").clear();
        // A driver is not left while it compiles.
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

pub(super) struct Pipeline {
    pub(super) kernel: &'static str,
    pub(super) raw: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) n_bindings: usize,
    pub(super) param_bytes: usize,
}

impl Pipelines {
    pub fn new(gpu: Arc<Gpu>) -> Self {
        Self::with_patches(gpu, Vec::new())
    }

    /// Pipelines whose sources are changed first. A patch that finds nothing to replace is an error at compile time.
    pub fn with_patches(gpu: Arc<Gpu>, patches: Vec<ShaderPatch>) -> Self {
        Self { gpu, patches, compiled: Mutex::default() }
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Begins to compile variants on half of the cores, so that a first dispatch finds it done or waits for it. What fails fails again there.
    pub fn prepare_ahead(self: &Arc<Self>, variants: Vec<(&'static Kernel, Variant)>) -> Preparing {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let n_threads = cores.div_ceil(2).min(variants.len());
        let left = Arc::new(Mutex::new(variants));
        let threads = (0..n_threads).map(|_| {
            let (pipelines, left) = (self.clone(), left.clone());
            std::thread::spawn(move || {
                loop {
                    let Some((kernel, variant)) = left.lock().expect("list lock").pop() else { break };
                    if let Err(error) = pipelines.prepare(kernel, &variant) {
                        tracing::debug!(%error, "not compiled ahead");
                    }
                }
            })
        });
        Preparing { threads: threads.collect(), left }
    }

    /// Compiles a variant now instead of at its first dispatch.
    pub fn prepare(&self, kernel: &'static Kernel, variant: &Variant) -> Result<(), GpuError> {
        self.get(kernel, variant).map(|_| ())
    }

    pub(super) fn get(&self, kernel: &'static Kernel, variant: &Variant) -> Result<Arc<Pipeline>, GpuError> {
        let mut variant = variant.clone();
        if !kernel.reads_weights() {
            variant.weights = Dtype::F32;
        }
        let key = (kernel.name, variant);
        let mut compiled = self.compiled.lock().expect("pipeline cache lock");
        // Every dispatch comes by here, and nearly all find it.
        let place = match compiled.get(&key) {
            Some(place) => place.clone(),
            None => compiled.entry(key.clone()).or_default().clone(),
        };
        drop(compiled);
        // Its own lock alone is held: several threads may compile at a time, each another one.
        let mut pipeline = place.lock().expect("pipeline lock");
        if pipeline.is_none() {
            *pipeline = Some(Arc::new(self.compile(kernel, &key.1)?));
        }
        Ok(pipeline.clone().expect("it is compiled"))
    }

    /// The text that the device gets.
    fn text(&self, kernel: &Kernel, variant: &Variant) -> Result<String, GpuError> {
        let mut source = kernel.source(variant);
        for patch in self.patches.iter().filter(|p| p.kernel == kernel.name) {
            if !source.contains(&patch.from) {
                let cause = format!("patch finds no '{}'", patch.from);
                return Err(GpuError::Shader { kernel: kernel.name.to_owned(), cause });
            }
            source = source.replace(&patch.from, &patch.to);
        }
        if self.gpu.emulates_cooperative && emulated::is_needed(&source) {
            source = emulated::emulate(&source);
        }
        Ok(source)
    }

    fn compile(&self, kernel: &'static Kernel, variant: &Variant) -> Result<Pipeline, GpuError> {
        let fail = |cause: String| GpuError::Shader { kernel: kernel.name.to_owned(), cause };
        let spirv = kernel.spirv(variant.weights);
        let text = if spirv.is_some() { String::new() } else { self.text(kernel, variant)? };
        let device = &self.gpu.device;
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let module = match spirv {
            Some(words) => {
                let main = wgpu::PassthroughShaderEntryPoint { name: "main".into(), workgroup_size: (1, 1, 1) };
                let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
                    label: Some(kernel.name),
                    entry_points: vec![main].into(),
                    spirv: Some(words.into()),
                    ..Default::default()
                };
                // SAFETY: the words are the compiler's, validated when they were made, and held against the kernel's reference.
                unsafe { device.create_shader_module_passthrough(descriptor) }
            }
            None => {
                let source = wgpu::ShaderSource::Wgsl(text.into());
                let descriptor = wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source };
                // SAFETY: the checks that are left out guard against out-of-bounds indices and endless loops. Every kernel is
                // held against its reference at odd sizes, and none loops without a bound taken from its parameters.
                unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
            }
        };
        let entries: Vec<_> = kernel
            .bindings
            .iter()
            .enumerate()
            .map(|(binding, access)| wgpu::BindGroupLayoutEntry {
                binding: binding as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: *access == Access::Read },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(kernel.name), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: kernel.param_bytes as u32,
        });
        let overrides = if kernel.is_template() { &[][..] } else { &variant.tunables };
        let constants: Vec<(&str, f64)> = overrides.iter().map(|(name, value)| (*name, *value as f64)).collect();
        let raw = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        let cause = pollster::block_on(internal.pop()).or(pollster::block_on(validation.pop()));
        match cause {
            Some(cause) => Err(fail(cause.to_string())),
            None => Ok(Pipeline {
                kernel: kernel.name,
                raw,
                layout,
                n_bindings: kernel.bindings.len(),
                param_bytes: kernel.param_bytes,
            }),
        }
    }
}
