//! Small host bytes for kernels (ids, positions, tables): written to host memory that the device reads, copied by the
//! submission that needs them. wgpu's `write_buffer` would allocate for each.

use super::buffer::{Buffer, HostBuffer};
use super::device::{Gpu, GpuError};

/// One piece of host memory serves many uploads; a larger one gets a piece of its own.
const PIECE_BYTES: u64 = 1 << 20;

/// Host memory given out piece by piece over one pass, and anew in the next.
#[derive(Default)]
pub(super) struct Uploads {
    pieces: Vec<HostBuffer>,
    /// Piece in use, and what of it is given out.
    at: (usize, u64),
}

impl Uploads {
    /// All uploads so far have run.
    pub fn reset(&mut self) {
        self.at = (0, 0);
    }

    pub fn record(
        &mut self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        buffer: &Buffer,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), GpuError> {
        assert!(offset.is_multiple_of(4) && bytes.len().is_multiple_of(4), "uploads are whole words");
        if !gpu.kernels_reach_host() {
            gpu.queue.write_buffer(&buffer.raw, offset, bytes);
            return Ok(());
        }
        let needed = bytes.len() as u64;
        while self.pieces.get(self.at.0).is_some_and(|piece| piece.size() < self.at.1 + needed) {
            self.at = (self.at.0 + 1, 0);
        }
        if self.at.0 == self.pieces.len() {
            let piece = gpu.host_buffer("upload memory", needed.max(PIECE_BYTES)).map_err(GpuError::HostMemory)?;
            self.pieces.push(piece);
        }
        let (piece, start) = (&self.pieces[self.at.0], self.at.1);
        // SAFETY: bytes from `start` on are given out for the first time since all uploads had run.
        unsafe { piece.slice_mut::<u8>(start..start + needed).copy_from_slice(bytes) };
        let view = piece.view.as_ref().expect("made with a view");
        encoder.copy_buffer_to_buffer(view, start, &buffer.raw, offset, needed);
        self.at.1 = start + needed;
        Ok(())
    }
}
