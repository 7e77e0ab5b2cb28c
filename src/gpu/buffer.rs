//! Device memory with a size, counted while it lives.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A storage buffer on the device. Made by [`Gpu::buffer`](super::Gpu::buffer).
pub struct Buffer {
    pub(super) raw: wgpu::Buffer,
    size: u64,
    taken: Arc<AtomicU64>,
}

impl Buffer {
    pub(super) fn new(raw: wgpu::Buffer, size: u64, taken: Arc<AtomicU64>) -> Self {
        Self { raw, size, taken }
    }

    /// Bytes, a multiple of 4.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn whole(&self) -> Slice<'_> {
        Slice { buffer: self, offset: 0, size: self.size }
    }

    /// Bytes `range`; the start is a multiple of the adapter's binding alignment where the slice is bound, of 4 where it is copied.
    pub fn slice(&self, range: Range<u64>) -> Slice<'_> {
        assert!(
            range.start <= range.end && range.end <= self.size,
            "slice {range:?} of a buffer of {} bytes",
            self.size
        );
        Slice { buffer: self, offset: range.start, size: range.end - range.start }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.size, Relaxed);
    }
}

/// A range of a [`Buffer`]: what a kernel binds or a copy moves.
#[derive(Clone, Copy)]
pub struct Slice<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) offset: u64,
    pub(super) size: u64,
}
