//! Bytes between host and device, and their order against what the device computes.
//!
//! In: copies, and the [`Ticket`]s that they have to wait for. Out: a ticket that says when they have run. Computations
//! hand out tickets too ([`Recorder::submit_after`](super::Recorder::submit_after)), so each side can wait for the other
//! without the host in between:
//!
//! ```text
//! to_device queue   copy page 7 ─────┐ ticket C7       copy page 8 (waits for K3: its slot is still read) ─ C8
//! compute queue     kernels K3 ──────┼─ ticket K3      kernels K4 (wait for C7)
//! to_host queue                      └ …               copy rows (waits for K4)
//! ```
//!
//! Two implementations of one trait: [`vulkan`] copies on queues of its own beside wgpu's, with timeline semaphores;
//! [`plain`] uses nothing but wgpu, on any backend, and overlaps what wgpu overlaps, which is nothing across submissions.
//!
//! Guarantees, asserted in debug builds:
//! * a ticket that is waited for was handed out before: what signals is submitted before what waits (wgpu chains its
//!   submissions with binary semaphores, so the other order is an error of the API and a hang on lavapipe);
//! * tickets of a line are reached in the order of their numbers;
//! * memory of a copy in flight stays alive until the copy has run.

pub(super) mod plain;
pub(super) mod vulkan;

use super::GpuError;
use super::buffer::{CopyRange, HostMemory, Keep};

/// Whose work a ticket counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Line {
    /// Kernels, in order of submission.
    Compute,
    /// Copies to the device.
    ToDevice,
    /// Copies to the host.
    ToHost,
}

/// When some work on the device will have run: number `value` of its line, and all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    pub line: Line,
    pub value: u64,
}

/// How to move bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransferChoice {
    /// Queues beside wgpu's where the backend is Vulkan, else wgpu's own means.
    #[default]
    Best,
    /// wgpu's own means, on any backend.
    Plain,
}

/// What the driver or the system said when host memory was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {needed} bytes of host memory were refused ({cause})")]
pub struct HostMemoryRefused {
    pub what: String,
    pub needed: u64,
    pub cause: String,
}

/// Start and end of some work in ticks of the device's clock.
pub(super) type Ticks = (u64, u64);

pub(super) trait Transfer: Send + Sync {
    /// In words: where copies run.
    fn describe(&self) -> String;

    /// Device memory that copies and kernels share.
    fn shared_buffer(&self, what: &str, bytes: u64) -> Result<SharedBuffer, String>;

    /// Host memory that copies read and write without a detour. `view`: kernels bind it as well, where they can.
    fn host_memory(
        &self,
        what: &str,
        bytes: u64,
        view: bool,
    ) -> Result<(HostMemory, Option<wgpu::Buffer>), HostMemoryRefused>;

    /// The same over memory that is there already: `bytes` from `pointer`, both multiples of the page size, alive as long
    /// as `keep`.
    fn import(&self, what: &str, pointer: *mut u8, bytes: u64, keep: Keep) -> Result<HostMemory, HostMemoryRefused>;

    /// Kernels can bind host memory.
    fn kernels_reach_host(&self) -> bool;

    /// Runs commands when `after` is reached.
    fn submit(&self, commands: wgpu::CommandBuffer, after: &[Ticket]) -> Result<Ticket, GpuError>;

    /// Copies when `after` is reached; all copies of one call go to the same side.
    fn copy(&self, line: Line, copies: &[CopyRange<'_>], after: &[Ticket]) -> Result<Ticket, GpuError>;

    /// `from`, a buffer of the device, to host memory, as part of `encoder`.
    fn download(&self, encoder: &mut wgpu::CommandEncoder, from: super::Slice<'_>, to: &super::HostBuffer, at: u64);

    /// Blocks until a ticket is reached. Then the bytes that its work wrote to the host can be read there.
    fn wait(&self, ticket: Ticket) -> Result<(), GpuError>;

    /// When a copy ran, once it has; None where its queue keeps no time.
    fn take_ticks(&self, ticket: Ticket) -> Option<Ticks>;

    /// A reading of the device's clock at (about) a moment of the host's; None where that cannot be had directly.
    fn clock(&self) -> Option<(u64, std::time::Instant)>;

    /// Runs `f` while nothing is submitted by anybody else.
    fn exclusively(&self, f: &mut dyn FnMut());
}

pub(super) struct SharedBuffer {
    pub raw: wgpu::Buffer,
    pub handle: Option<(ash::vk::Buffer, Keep)>,
}
