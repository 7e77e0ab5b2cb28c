//! What a pass consists of, and what each of its tasks needs: the ground that builders and [`check`](super::check()) share.

use std::ops::Range;

use super::task::{Lane, Work};
use crate::policy::{RowPath, SpreadLayers};

/// What one micro-batch brings to a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MicroBatchShape {
    /// Some rows attend on the GPU.
    pub gpu_attention: bool,
    /// Some rows attend on the CPU.
    pub cpu_attention: bool,
    /// Some context that the GPU attends to lies in the host cache.
    pub kv_to_device: bool,
    /// Some rows are sampled.
    pub sampled: bool,
    /// The KV workspace on the GPU that its rows attend over; micro-batches may share one.
    pub workspace: usize,
}

/// Experts that compute together, counted among those that stream, and the experts of each page that brings them. A chunk
/// without pages is the residents.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChunkShape {
    pub pages: Vec<Range<usize>>,
}

/// Everything that a builder has to know about a pass.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PassShape {
    pub layers: usize,
    /// Those that have rows in this pass.
    pub micro_batches: Vec<MicroBatchShape>,
    /// Expert groups: consecutive micro-batches, each in one.
    pub groups: Vec<Range<usize>>,
    /// Every layer is cut alike.
    pub chunks: Vec<ChunkShape>,
    /// Layers that never load the first `kept_pages` of these pages: what those would bring stays on the device.
    pub kept: SpreadLayers,
    pub kept_pages: usize,
    /// Experts of a layer that stream.
    pub streamed: usize,
    /// Slots of the ring; 0 where nothing streams.
    pub ring: usize,
    /// Pages, from layer 0 on, that the pass before has loaded.
    pub loaded_pages: usize,
    /// Load what fits of the next pass.
    pub load_ahead: bool,
    pub rows: RowPath,
    /// Pages are pinned one by one before they are loaded.
    pub relay: bool,
}

/// A page by its layer, chunk and number in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageId {
    pub layer: usize,
    pub chunk: usize,
    pub page: usize,
}

impl PageId {
    pub fn load(self) -> Work {
        let PageId { layer, chunk, page } = self;
        Work::LoadPage { layer, chunk, page }
    }

    pub fn pin(self) -> Work {
        let PageId { layer, chunk, page } = self;
        Work::PinPage { layer, chunk, page }
    }
}

/// Why one task must come before another: what would go wrong otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// It reads the other's result.
    Result,
    /// It overwrites rows on the device that the other still reads.
    DeviceRows,
    /// It overwrites rows on the host that the other still reads.
    HostRows,
    /// It rewrites a slot that the other still reads.
    Slot,
    /// It computes with a page that the other brings.
    Page,
    /// It overwrites the KV workspace that the other still reads.
    Workspace,
    /// Chunks add up in one order, or the order of a row's sum would depend on the ring.
    ChunkOrder,
    /// The pieces of an expert arrive in order.
    PageOrder,
    /// The sequences of a micro-batch may end, move or grow when its ids are known: all it stored is stored by then.
    Stored,
}

impl PassShape {
    /// The expert group of a micro-batch.
    pub fn group_of(&self, micro_batch: usize) -> usize {
        self.groups.iter().position(|group| group.contains(&micro_batch)).expect("groups cover all micro-batches")
    }

    /// No other micro-batch attends over its workspace, so the next layer's context can come as soon as it has attended.
    pub fn has_own_workspace(&self, micro_batch: usize) -> bool {
        let workspace = self.micro_batches[micro_batch].workspace;
        self.micro_batches.iter().filter(|rows| rows.gpu_attention && rows.workspace == workspace).count() == 1
    }

    pub fn pages_per_layer(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.pages.len()).sum()
    }

    /// Page number `n` of a pass, counted from layer 0 on.
    pub fn page(&self, n: usize) -> PageId {
        let per_layer = self.pages_per_layer();
        let (layer, mut page) = (n / per_layer, n % per_layer);
        for (chunk, shape) in self.chunks.iter().enumerate() {
            if page < shape.pages.len() {
                return PageId { layer, chunk, page };
            }
            page -= shape.pages.len();
        }
        unreachable!("the remainder is below the number of pages of a layer")
    }

    /// Page number `n` is loaded, by this pass or by the one before.
    pub fn loads(&self, n: usize) -> bool {
        let per_layer = self.pages_per_layer();
        n % per_layer >= self.kept_pages || !self.kept.contains(n / per_layer)
    }

    /// Numbers of pages that this pass sends: those that it needs and that are not there, then those ahead for the next one.
    pub fn page_numbers(&self) -> Range<usize> {
        self.loaded_pages..self.layers * self.pages_per_layer() + self.pages_ahead()
    }

    /// Pages that this pass loads for the next one: those whose slots all lie within one turn of the ring.
    pub fn pages_ahead(&self) -> usize {
        if !self.load_ahead || self.pages_per_layer() == 0 {
            return 0;
        }
        let most = self.layers * self.pages_per_layer();
        (0..most)
            .take_while(|n| {
                let PageId { layer, chunk, page } = self.page(*n);
                layer * self.streamed + self.chunks[chunk].pages[page].end <= self.ring
            })
            .count()
    }

    /// The experts tasks that read, in this pass, the slots which a page rewrites.
    fn readers_before(&self, page: PageId) -> Vec<Work> {
        let experts = self.chunks[page.chunk].pages[page.page].clone();
        let mut readers = Vec::new();
        for expert in experts {
            // Slots are taken in turn, so the one that is rewritten held the expert `ring` places earlier.
            let Some(before) = (page.layer * self.streamed + expert).checked_sub(self.ring) else { continue };
            let (layer, expert) = (before / self.streamed, before % self.streamed);
            let chunk = self.chunks.iter().position(|chunk| chunk.pages.iter().any(|page| page.contains(&expert)));
            let chunk = chunk.expect("a streamed expert is in a chunk");
            if layer >= self.layers {
                continue; // of the next pass: nothing of it is computed here (a ring of more than a pass)
            }
            for group in 0..self.groups.len() {
                let reader = Work::Experts { layer, group, chunk };
                if !readers.contains(&reader) {
                    readers.push(reader);
                }
            }
        }
        readers
    }

    /// Where a task runs.
    pub fn lane(&self, work: Work) -> Lane {
        match work {
            Work::RowsToHost { .. } if self.rows == RowPath::Copies => Lane::DeviceToHost,
            Work::RowsToDevice { .. } if self.rows == RowPath::Copies => Lane::HostToDevice,
            Work::Embed { .. }
            | Work::PreAttention { .. }
            | Work::GpuAttention { .. }
            | Work::RowsToHost { .. }
            | Work::RowsToDevice { .. }
            | Work::PostAttention { .. }
            | Work::Experts { .. }
            | Work::Head { .. } => Lane::Gpu,
            Work::KvToDevice { .. } | Work::LoadPage { .. } => Lane::HostToDevice,
            Work::CpuAttention { .. } | Work::Sample { .. } | Work::PinPage { .. } | Work::Barrier { .. } => Lane::Cpu,
        }
    }

    /// What must have ended before `work` may start, and why. Workspaces and barriers, which depend on the order that a
    /// builder chose, are not here: see [`check`](super::check()).
    pub fn needs(&self, work: Work) -> Vec<(Work, Why)> {
        use Why::*;
        let mut needs = Vec::new();
        let last_chunk = self.chunks.len().saturating_sub(1);
        match work {
            Work::Embed { .. } | Work::KvToDevice { .. } | Work::PinPage { .. } | Work::Barrier { .. } => {}
            Work::PreAttention { layer, micro_batch } => {
                match layer.checked_sub(1) {
                    None => needs.push((Work::Embed { micro_batch }, Result)),
                    Some(layer) => {
                        let group = self.group_of(micro_batch);
                        needs.push((Work::Experts { layer, group, chunk: last_chunk }, Result));
                        needs.push((Work::RowsToHost { layer, micro_batch }, DeviceRows));
                    }
                }
                if self.micro_batches[micro_batch].kv_to_device {
                    // The new rows' keys are written over the places that the upload brought.
                    needs.push((Work::KvToDevice { layer, micro_batch }, Result));
                }
            }
            Work::RowsToHost { layer, micro_batch } => {
                needs.push((Work::PreAttention { layer, micro_batch }, Result));
                if layer > 0 {
                    needs.push((Work::CpuAttention { layer: layer - 1, micro_batch }, HostRows));
                }
            }
            Work::CpuAttention { layer, micro_batch } => {
                needs.push((Work::RowsToHost { layer, micro_batch }, Result));
                if layer > 0 && self.micro_batches[micro_batch].cpu_attention {
                    needs.push((Work::RowsToDevice { layer: layer - 1, micro_batch }, HostRows));
                }
            }
            Work::GpuAttention { layer, micro_batch } => {
                needs.push((Work::PreAttention { layer, micro_batch }, Result));
            }
            Work::RowsToDevice { layer, micro_batch } => {
                needs.push((Work::CpuAttention { layer, micro_batch }, Result));
                if layer > 0 {
                    needs.push((Work::PostAttention { layer: layer - 1, micro_batch }, DeviceRows));
                }
            }
            Work::PostAttention { layer, micro_batch } => {
                needs.push((Work::PreAttention { layer, micro_batch }, Result));
                if self.micro_batches[micro_batch].cpu_attention {
                    needs.push((Work::RowsToDevice { layer, micro_batch }, Result));
                }
                if self.micro_batches[micro_batch].gpu_attention {
                    needs.push((Work::GpuAttention { layer, micro_batch }, Result));
                }
            }
            Work::LoadPage { layer, chunk, page } => {
                let id = PageId { layer, chunk, page };
                needs.extend(self.readers_before(id).into_iter().map(|reader| (reader, Slot)));
                let number = layer * self.pages_per_layer()
                    + self.chunks[..chunk].iter().map(|chunk| chunk.pages.len()).sum::<usize>()
                    + page;
                if let Some(before) = (self.loaded_pages..number).rev().find(|before| self.loads(*before)) {
                    needs.push((self.page(before).load(), PageOrder));
                }
                if self.relay {
                    needs.push((id.pin(), Result));
                }
            }
            Work::Experts { layer, group, chunk } => {
                for micro_batch in self.groups[group].clone() {
                    needs.push((Work::PostAttention { layer, micro_batch }, Result));
                }
                let before = self.chunks[..chunk].iter().map(|chunk| chunk.pages.len()).sum::<usize>();
                for page in 0..self.chunks[chunk].pages.len() {
                    let number = layer * self.pages_per_layer() + before + page;
                    if number >= self.loaded_pages && self.loads(number) {
                        needs.push((Work::LoadPage { layer, chunk, page }, Page));
                    }
                }
                if chunk > 0 {
                    needs.push((Work::Experts { layer, group, chunk: chunk - 1 }, ChunkOrder));
                }
            }
            Work::Head { micro_batch } => {
                let group = self.group_of(micro_batch);
                needs.push((Work::Experts { layer: self.layers - 1, group, chunk: last_chunk }, Result));
            }
            Work::Sample { micro_batch } => {
                let group = self.group_of(micro_batch);
                needs.push((Work::Experts { layer: self.layers - 1, group, chunk: last_chunk }, Result));
                if self.micro_batches[micro_batch].sampled {
                    needs.push((Work::Head { micro_batch }, Result));
                }
                needs.push((Work::CpuAttention { layer: self.layers - 1, micro_batch }, Stored));
            }
        }
        needs
    }

    /// Every task that the pass must have, but for barriers.
    pub fn works(&self) -> Vec<Work> {
        let mut works = Vec::new();
        for (micro_batch, rows) in self.micro_batches.iter().enumerate() {
            works.push(Work::Embed { micro_batch });
            for layer in 0..self.layers {
                if rows.kv_to_device {
                    works.push(Work::KvToDevice { layer, micro_batch });
                }
                works.push(Work::PreAttention { layer, micro_batch });
                works.push(Work::RowsToHost { layer, micro_batch });
                works.push(Work::CpuAttention { layer, micro_batch });
                if rows.gpu_attention {
                    works.push(Work::GpuAttention { layer, micro_batch });
                }
                if rows.cpu_attention {
                    works.push(Work::RowsToDevice { layer, micro_batch });
                }
                works.push(Work::PostAttention { layer, micro_batch });
            }
            if rows.sampled {
                works.push(Work::Head { micro_batch });
            }
            works.push(Work::Sample { micro_batch });
        }
        for number in self.page_numbers().filter(|number| self.loads(*number)) {
            let page = self.page(number);
            works.push(page.load());
            if self.relay {
                works.push(page.pin());
            }
        }
        for layer in 0..self.layers {
            for group in 0..self.groups.len() {
                works.extend((0..self.chunks.len()).map(|chunk| Work::Experts { layer, group, chunk }));
            }
        }
        works
    }
}
