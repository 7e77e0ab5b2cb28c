//! Transfers with nothing but wgpu, on any backend: everything goes through its one queue, in order of submission.
//!
//! Host memory is ordinary memory; bytes go to the device through `write_buffer`, and come back through a mapped buffer that
//! [`wait`](Transfer::wait) empties. Correct everywhere; copies and kernels take turns.

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{HostMemoryRefused, Line, SharedBuffer, Ticket, Ticks, Transfer};
use crate::gpu::buffer::{CopyRange, End, HostBuffer, HostMemory, Keep, Slice};
use crate::gpu::device::{Faults, poll};
use crate::gpu::{GpuError, TestFaults};

pub(in crate::gpu) struct PlainTransfer {
    device: wgpu::Device,
    queue: wgpu::Queue,
    faults: Arc<Faults>,
    test_faults: TestFaults,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Submissions so far. One count for all lines, as there is one queue.
    submitted: u64,
    /// Downloads recorded since the last submission, then those under way.
    recorded: Vec<Download>,
    under_way: VecDeque<(u64, Download)>,
}

/// Bytes on their way to the host.
struct Download {
    staging: wgpu::Buffer,
    bytes: u64,
    to: HostMemory,
    at: u64,
}

impl PlainTransfer {
    pub fn new(device: wgpu::Device, queue: wgpu::Queue, faults: Arc<Faults>, test_faults: TestFaults) -> Self {
        Self { device, queue, faults, test_faults, state: Mutex::default() }
    }

    fn stage(&self, encoder: &mut wgpu::CommandEncoder, from: Slice<'_>, to: &HostMemory, at: u64) -> Download {
        let size = from.size.next_multiple_of(4);
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("rows on their way to the host"),
            size,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        encoder.copy_buffer_to_buffer(from.raw, from.offset, &staging, 0, size);
        Download { staging, bytes: from.size, to: to.clone(), at }
    }
}

impl Transfer for PlainTransfer {
    fn describe(&self) -> String {
        "wgpu's own queue, one submission after the other: copies and kernels take turns".to_owned()
    }

    fn shared_buffer(&self, what: &str, bytes: u64) -> Result<SharedBuffer, String> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let descriptor = wgpu::BufferDescriptor { label: Some(what), size: bytes, usage, mapped_at_creation: false };
        let raw = self.device.create_buffer(&descriptor);
        match pollster::block_on(scope.pop()) {
            Some(error) => Err(error.to_string()),
            None => Ok(SharedBuffer { raw, handle: None }),
        }
    }

    fn host_memory(
        &self,
        what: &str,
        bytes: u64,
        _view: bool,
    ) -> Result<(HostMemory, Option<wgpu::Buffer>), HostMemoryRefused> {
        let refused = |cause: String| HostMemoryRefused { what: what.to_owned(), needed: bytes, cause };
        if self.test_faults.pinned_refused {
            return Err(refused("refused".into()));
        }
        let map = memmap2::MmapMut::map_anon(bytes.max(1) as usize).map_err(|error| refused(error.to_string()))?;
        let pointer = NonNull::new(map.as_ptr().cast_mut()).expect("a mapping is nowhere near address 0");
        Ok((HostMemory { pointer, bytes, handle: Default::default(), keep: Arc::new(map) }, None))
    }

    fn import(&self, _what: &str, pointer: *mut u8, bytes: u64, keep: Keep) -> Result<HostMemory, HostMemoryRefused> {
        // Any memory will do: write_buffer copies it.
        let pointer = NonNull::new(pointer).expect("a mapping is nowhere near address 0");
        Ok(HostMemory { pointer, bytes, handle: Default::default(), keep })
    }

    fn kernels_reach_host(&self) -> bool {
        false
    }

    fn submit(&self, commands: wgpu::CommandBuffer, _after: &[Ticket]) -> Result<Ticket, GpuError> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.queue.submit([commands]);
        state.submitted += 1;
        let value = state.submitted;
        for download in std::mem::take(&mut state.recorded) {
            state.under_way.push_back((value, download));
        }
        self.faults.check()?;
        self.faults.count_submission(&self.test_faults)?;
        Ok(Ticket { line: Line::Compute, value })
    }

    fn copy(&self, line: Line, copies: &[CopyRange<'_>], _after: &[Ticket]) -> Result<Ticket, GpuError> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut downloads = Vec::new();
        for copy in copies.iter().filter(|copy| copy.bytes > 0) {
            match (copy.from.end, copy.to.end) {
                (End::Host(memory), End::Device(buffer)) => {
                    // SAFETY: the range lies in the memory; the schedule keeps others from writing it until the copy ran.
                    let bytes = unsafe {
                        let start = memory.pointer.as_ptr().add(copy.from.offset as usize);
                        std::slice::from_raw_parts(start, copy.bytes as usize)
                    };
                    let whole = bytes.len() / 4 * 4;
                    self.queue.write_buffer(buffer, copy.to.offset, &bytes[..whole]);
                    if whole < bytes.len() {
                        let mut last = [0u8; 4];
                        last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                        self.queue.write_buffer(buffer, copy.to.offset + whole as u64, &last);
                    }
                }
                (End::Device(buffer), End::Host(memory)) => {
                    let from = Slice { raw: buffer, offset: copy.from.offset, size: copy.bytes, host: false };
                    downloads.push(self.stage(&mut encoder, from, memory, copy.to.offset));
                }
                (End::Device(from), End::Device(to)) => {
                    let bytes = copy.bytes.next_multiple_of(4);
                    encoder.copy_buffer_to_buffer(from, copy.from.offset, to, copy.to.offset, bytes);
                }
                (End::Host(_), End::Host(_)) => unreachable!("the host copies its own memory"),
            }
        }
        self.queue.submit([encoder.finish()]);
        state.submitted += 1;
        let value = state.submitted;
        state.under_way.extend(downloads.into_iter().map(|download| (value, download)));
        self.faults.check()?;
        Ok(Ticket { line, value })
    }

    fn download(&self, encoder: &mut wgpu::CommandEncoder, from: Slice<'_>, to: &HostBuffer, at: u64) {
        let download = self.stage(encoder, from, &to.memory, at);
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).recorded.push(download);
    }

    fn wait(&self, ticket: Ticket) -> Result<(), GpuError> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        debug_assert!(ticket.value <= state.submitted, "{ticket:?} is waited for before it was submitted");
        while state.under_way.front().is_some_and(|(value, _)| *value <= ticket.value) {
            let (_, download) = state.under_way.pop_front().expect("just seen");
            download.staging.slice(..).map_async(wgpu::MapMode::Read, |_| {});
            poll(&self.device, wgpu::PollType::wait_indefinitely(), &self.faults)?;
            let view =
                download.staging.slice(..).get_mapped_range().map_err(|error| GpuError::Lost(error.to_string()))?;
            // SAFETY: the range lies in the memory; nobody reads it before this wait has returned.
            unsafe {
                let to = download.to.pointer.as_ptr().add(download.at as usize);
                std::ptr::copy_nonoverlapping(view.as_ptr(), to, download.bytes as usize);
            }
        }
        // Held while polling: with one queue there is nothing that others could usefully do meanwhile.
        poll(&self.device, wgpu::PollType::wait_indefinitely(), &self.faults)
    }

    fn take_ticks(&self, _ticket: Ticket) -> Option<Ticks> {
        None
    }

    fn clock(&self) -> Option<(u64, Instant)> {
        None
    }

    fn exclusively(&self, f: &mut dyn FnMut()) {
        let _state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        f();
    }
}
