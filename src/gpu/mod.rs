//! wgpu stops here: devices, buffers, pipelines, and the recording of dispatches.
//!
//! In: WGSL text and plain parameter structs. Out: buffers with bytes in them. Nothing above this module names a wgpu type.
//!
//! Guarantees: an error of the driver (no adapter, out of memory, a lost device, a shader that it refuses) comes back as a
//! [`GpuError`] and never as a panic; memory taken is counted, so a cap can be obeyed.
//!
//! Given up for now: one queue, host copies through wgpu's own staging. Overlap of copies and compute is the business of a
//! transfer queue beside this one.

mod buffer;
mod device;
mod pipeline;

pub use buffer::{Buffer, Slice};
pub use device::{AdapterSummary, DeviceChoice, Gpu, GpuError, list_adapters};
pub(crate) use pipeline::params;
pub use pipeline::{Access, Kernel, ParamField, ParamType, Part, Pipelines, Recorder, ShaderPatch, Variant};
