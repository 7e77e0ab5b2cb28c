//! wgpu and ash stop here: devices, buffers, pipelines, and the recording of dispatches.
//!
//! In: WGSL text (SPIR-V for what WGSL has no words for) and plain parameter structs. Out: buffers with bytes in them. Nothing above
//! this module names a wgpu type.
//!
//! Guarantees: an error of the driver (no adapter, out of memory, a lost device, a shader that it refuses) comes back as a
//! [`GpuError`] and never as a panic; memory taken is counted, so a cap can be obeyed.
//!
//! Bytes move beside the kernels: `transfer` has copies on queues of their own, ordered against kernels by [`Ticket`]s.

mod buffer;
mod device;
mod emulated;
mod pipeline;
mod recorder;
mod timing;
mod transfer;
mod uploads;
mod workgroup_matrices;

pub use buffer::{Buffer, CopyRange, HostBuffer, Place, Slice};
pub use device::{AdapterSummary, DeviceChoice, Gpu, GpuError, OpenOptions, TestFaults, list_adapters};
pub(crate) use pipeline::params;
pub use pipeline::{Access, Kernel, ParamField, ParamType, Part, Pipelines, Preparing, ShaderPatch, Variant};
pub use recorder::Recorder;
pub use transfer::{HostMemoryRefused, Line, Ticket, TransferChoice};
