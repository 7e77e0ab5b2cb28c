//! Memory with a size, on the device ([`Buffer`]) and on the host where the device can reach it ([`HostBuffer`]).

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ash::vk;

/// Whatever must live as long as a buffer: its memory, or the mapping that it is made of.
pub(super) type Keep = Arc<dyn Send + Sync>;

/// A storage buffer on the device. Made by [`Gpu::buffer`](super::Gpu::buffer), or by
/// [`Gpu::shared_buffer`](super::Gpu::shared_buffer) where copies of other queues reach it too.
pub struct Buffer {
    pub(super) raw: wgpu::Buffer,
    /// What the transfer queue names it by; None for a buffer that only wgpu knows.
    pub(super) handle: Option<vk::Buffer>,
    pub(super) keep: Option<Keep>,
    size: u64,
    taken: Arc<AtomicU64>,
}

impl Buffer {
    pub(super) fn new(raw: wgpu::Buffer, size: u64, taken: Arc<AtomicU64>) -> Self {
        Self { raw, handle: None, keep: None, size, taken }
    }

    pub(super) fn shared(raw: wgpu::Buffer, handle: vk::Buffer, keep: Keep, size: u64, taken: Arc<AtomicU64>) -> Self {
        Self { raw, handle: Some(handle), keep: Some(keep), size, taken }
    }

    /// Bytes, a multiple of 4.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn whole(&self) -> Slice<'_> {
        Slice { raw: &self.raw, offset: 0, size: self.size, host: false }
    }

    /// Bytes `range`; the start is a multiple of the adapter's binding alignment where the slice is bound, of 4 where it is copied.
    pub fn slice(&self, range: Range<u64>) -> Slice<'_> {
        assert!(
            range.start <= range.end && range.end <= self.size,
            "slice {range:?} of a buffer of {} bytes",
            self.size
        );
        Slice { raw: &self.raw, offset: range.start, size: range.end - range.start, host: false }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.size, Relaxed);
    }
}

/// A range of a buffer: what a kernel binds or a copy moves.
#[derive(Clone, Copy)]
pub struct Slice<'a> {
    pub(super) raw: &'a wgpu::Buffer,
    pub(super) offset: u64,
    pub(super) size: u64,
    /// It lies in host memory.
    pub(super) host: bool,
}

impl Slice<'_> {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Host memory that copies read and write without a detour, and kernels too where the adapter allows it
/// ([`Gpu::kernels_reach_host`](super::Gpu::kernels_reach_host)).
///
/// The device and several threads see the same bytes. Who may touch which of them when is not this type's to know: the
/// schedule orders it, and [`slice`](Self::slice) and [`slice_mut`](Self::slice_mut) are unsafe for that reason.
pub struct HostBuffer {
    pub(super) memory: HostMemory,
    /// How wgpu names it; None where only copies reach it.
    pub(super) view: Option<wgpu::Buffer>,
}

/// Bytes on the host with their owner.
#[derive(Clone)]
pub(super) struct HostMemory {
    pub pointer: NonNull<u8>,
    pub bytes: u64,
    /// Null where the transfer has no name for it.
    pub handle: vk::Buffer,
    pub keep: Keep,
}

// SAFETY: the pointer is to memory that `keep` owns and that any thread may touch; see `HostBuffer` for who may when.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostBuffer {
    /// Ordinary memory that no copy reaches.
    pub(crate) fn of(mut map: memmap2::MmapMut) -> Self {
        let pointer = NonNull::new(map.as_mut_ptr()).expect("a mapping is nowhere near address 0");
        let bytes = map.len() as u64;
        Self { memory: HostMemory { pointer, bytes, handle: vk::Buffer::null(), keep: Arc::new(map) }, view: None }
    }

    /// A transfer queue has a name for it.
    pub(crate) fn reached_by_copies(&self) -> bool {
        self.memory.handle != vk::Buffer::null()
    }

    pub fn size(&self) -> u64 {
        self.memory.bytes
    }

    fn pointer<T>(&self, range: &Range<u64>) -> NonNull<T> {
        assert!(
            range.start <= range.end && range.end <= self.memory.bytes,
            "bytes {range:?} of a host buffer of {}",
            self.memory.bytes
        );
        assert!((range.start as usize).is_multiple_of(align_of::<T>()), "byte {} is not aligned", range.start);
        // SAFETY: the offset was just found to lie within the allocation.
        unsafe { self.memory.pointer.add(range.start as usize).cast() }
    }

    /// Elements in bytes `range`.
    ///
    /// # Safety
    /// * Nobody, thread or device, writes these bytes while the slice lives.
    /// * What the device wrote there has been waited for.
    pub unsafe fn slice<T: bytemuck::AnyBitPattern>(&self, range: Range<u64>) -> &[T] {
        let n = (range.end - range.start) as usize / size_of::<T>();
        // SAFETY: in bounds and aligned by `pointer`; any bits are a T; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts(self.pointer(&range).as_ptr(), n) }
    }

    /// Elements in bytes `range`, to write.
    ///
    /// # Safety
    /// * Nobody else, thread or device, reads or writes these bytes while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut<T: bytemuck::Pod>(&self, range: Range<u64>) -> &mut [T] {
        let n = (range.end - range.start) as usize / size_of::<T>();
        // SAFETY: in bounds and aligned by `pointer`; any bits are a T; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(&range).as_ptr(), n) }
    }

    /// The whole as a kernel binds it. Only where [`Gpu::kernels_reach_host`](super::Gpu::kernels_reach_host).
    pub fn bound(&self) -> Slice<'_> {
        let raw = self.view.as_ref().expect("kernels_reach_host said so");
        Slice { raw, offset: 0, size: self.memory.bytes, host: true }
    }

    pub fn at(&self, offset: u64) -> Place<'_> {
        Place { handle: self.memory.handle, keep: Some(&self.memory.keep), end: End::Host(&self.memory), offset }
    }
}

impl Buffer {
    /// Where copies of a transfer start or end.
    pub fn at(&self, offset: u64) -> Place<'_> {
        Place { handle: self.handle.unwrap_or_default(), keep: self.keep.as_ref(), end: End::Device(&self.raw), offset }
    }
}

/// One end of a copy.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub(super) handle: vk::Buffer,
    pub(super) keep: Option<&'a Keep>,
    pub(super) end: End<'a>,
    pub(super) offset: u64,
}

impl Place<'_> {
    /// So many bytes further on.
    pub fn plus(self, bytes: u64) -> Self {
        Self { offset: self.offset + bytes, ..self }
    }
}

#[derive(Clone, Copy)]
pub(super) enum End<'a> {
    Host(&'a HostMemory),
    Device(&'a wgpu::Buffer),
}

/// Bytes from one place to another.
#[derive(Clone, Copy)]
pub struct CopyRange<'a> {
    pub from: Place<'a>,
    pub to: Place<'a>,
    pub bytes: u64,
}

impl<'a> CopyRange<'a> {
    pub fn new(from: Place<'a>, to: Place<'a>, bytes: u64) -> Self {
        Self { from, to, bytes }
    }

    /// The same for copies between the same two buffers, where copies of a queue can be joined.
    pub(crate) fn ends(&self) -> impl Ord + use<> {
        (self.from.handle, self.to.handle)
    }
}
