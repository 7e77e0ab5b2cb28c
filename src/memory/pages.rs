//! Paged expert weights: which bytes travel together, and where on the GPU they land.
//!
//! In: the bytes of an expert's slots, how many experts a layer has, how many stay resident, how many the ring holds, and the
//! size of a page. Out: a [`PagePlan`] – chunks of experts that compute together, the pages that bring them, and the slot of
//! every expert – and a [`PageTable`] that knows which expert each slot holds now, and the ticket of the copies that
//! brought it.
//!
//! Eight experts, two resident, a ring of four (so chunks of two), pages of at most three matrices:
//!
//! ```text
//! slots      0 1 | 2 3 4 5           chunk 0: experts 0 1, resident, no page
//!            0 1 | 2 3 4 5  layer 0  chunk 1: experts 2 3   pages 1.0 [g2 u2 d2]  1.1 [g3 u3 d3]
//!            0 1 | 6 7 …             chunk 2: experts 4 5   …
//! ```
//!
//! Streamed experts take the ring's slots in the order in which they are used, layer after layer and pass after pass, so a slot
//! is rewritten only after the whole ring has gone by. A pass that begins at slot `ring_start` of the ring ends where the next
//! one begins ([`PagePlan::next_ring_start`]); what is loaded ahead for the next pass is layer L, L + 1, … of this one.
//!
//! Where slots are left but not enough for one more resident of every layer, some layers, spread evenly, keep their first streamed
//! expert as well: it has a slot of its own, its pages are never loaded there, and its place in the ring stays empty.
//!
//! Guarantees: pages of a chunk cover each byte of its slots exactly once; two experts of one chunk never share a slot. Given
//! up: experts stream in their order in the layer, not by popularity.

use std::ops::Range;

use crate::gpu::Ticket;
use crate::model::ExpertMatrix;
use crate::policy::SpreadLayers;

/// Which experts stay, which stream, and in what portions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageShape {
    /// E
    pub experts: usize,
    /// The first so many experts of each layer never leave their slots.
    pub resident: usize,
    /// In so many layers, spread evenly, the next one stays too.
    pub extra: usize,
    /// Slots for streamed experts. Not used where all are resident.
    pub ring: usize,
    /// Bytes of an expert's slots by [`ExpertMatrix::ALL`]; 0 where it has none of that kind.
    pub matrix_bytes: [u64; 3],
    /// No page is larger; a matrix that is gets cut.
    pub page_bytes: u64,
    pub layers: usize,
}

impl PageShape {
    /// Layers of which one more expert stays.
    pub fn extra_layers(&self) -> SpreadLayers {
        SpreadLayers { n: self.extra, of: self.layers }
    }

    /// Bytes between two slots of a slab: a matrix, rounded up so that every slot starts aligned for wide loads.
    pub fn slot_bytes(matrix_bytes: u64) -> u64 {
        matrix_bytes.next_multiple_of(256)
    }
}

/// A range of one slot of an expert. Which bytes of which tensors belong there, a checkpoint's
/// [`Inventory::slot_sources`](crate::checkpoint::Inventory::slot_sources) says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub expert: usize,
    pub matrix: ExpertMatrix,
    /// Bytes of the slot; the start is a multiple of 4.
    pub bytes: Range<u64>,
}

/// What travels in one transfer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    pub pieces: Vec<Piece>,
}

impl Page {
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes.end - piece.bytes.start).sum()
    }
}

/// Experts that compute together, and the pages that bring them. No pages: they are resident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub experts: Range<usize>,
    pub pages: Vec<Page>,
}

/// The same for every layer, but for pages that a layer with an extra resident never loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagePlan {
    shape: PageShape,
    chunks: Vec<Chunk>,
}

impl PagePlan {
    /// Panics where `resident > experts`, or nothing is left to hold the streamed ones: the policy was resolved before.
    pub fn new(shape: PageShape) -> Self {
        let PageShape { experts, resident, ring, .. } = shape;
        let streamed = experts.checked_sub(resident).expect("resident experts are experts");
        assert!(streamed == 0 || ring > 0, "{streamed} streamed experts need a ring");
        assert!(shape.extra == 0 || streamed > 0 && shape.extra <= shape.layers, "extra residents stream elsewhere");
        let mut chunks = Vec::new();
        if resident > 0 {
            chunks.push(Chunk { experts: 0..resident, pages: Vec::new() });
        }
        // Half the ring computes while the other half loads. A layer is cut into chunks of about the same size: a last one of few
        // experts would leave the link less time than it takes to attend.
        let most = (ring / 2).max(1);
        let chunk_size = streamed.div_ceil(streamed.div_ceil(most).max(1)).max(1);
        let mut first = resident;
        while first < experts {
            let end = (first + chunk_size).min(experts);
            let mut pages = Vec::new();
            if shape.extra > 0 && first == resident {
                // Pages of its own: some layers do without them.
                pages = cut(first..first + 1, shape.matrix_bytes, shape.page_bytes);
            }
            let rest = if pages.is_empty() { first..end } else { first + 1..end };
            if !rest.is_empty() {
                pages.extend(cut(rest, shape.matrix_bytes, shape.page_bytes));
            }
            chunks.push(Chunk { experts: first..end, pages });
            first = end;
        }
        Self { shape, chunks }
    }

    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Slots in all: residents of every layer, then the ring.
    pub fn n_slots(&self) -> usize {
        let ring = if self.shape.resident == self.shape.experts { 0 } else { self.shape.ring };
        self.shape.layers * self.shape.resident + self.shape.extra + ring
    }

    /// An expert never leaves its slot.
    pub fn stays(&self, layer: usize, expert: usize) -> bool {
        expert < self.shape.resident || expert == self.shape.resident && self.shape.extra_layers().contains(layer)
    }

    /// Pages at the start of a layer's that those layers never load.
    pub fn extra_pages(&self) -> usize {
        let extra = self.shape.resident;
        let pages = self.chunks.iter().flat_map(|chunk| &chunk.pages);
        let only_extra = |page: &&Page| page.pieces.iter().all(|piece| piece.expert == extra);
        if self.shape.extra == 0 { 0 } else { pages.take_while(only_extra).count() }
    }

    /// A layer loads its page of that number, over all its chunks.
    pub fn loads(&self, layer: usize, number: usize) -> bool {
        number >= self.extra_pages() || !self.shape.extra_layers().contains(layer)
    }

    pub fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// Where an expert is, or will be, in a pass that begins at slot `ring_start` of the ring. Layers from L on are the next
    /// pass's.
    pub fn slot(&self, ring_start: usize, layer: usize, expert: usize) -> usize {
        let PageShape { experts, resident, ring, layers, extra, .. } = self.shape;
        if expert < resident {
            layer % layers * resident + expert
        } else if self.stays(layer, expert) {
            layers * resident + self.shape.extra_layers().below(layer % layers)
        } else {
            layers * resident + extra + (ring_start + layer * (experts - resident) + expert - resident) % ring
        }
    }

    /// Where in the ring the pass after one that began at `ring_start` begins.
    pub fn next_ring_start(&self, ring_start: usize) -> usize {
        let PageShape { experts, resident, ring, layers, .. } = self.shape;
        if ring == 0 { 0 } else { (ring_start + layers * (experts - resident)) % ring }
    }

    /// Slots of the ring; 0 where nothing streams.
    pub fn ring(&self) -> usize {
        if self.shape.resident == self.shape.experts { 0 } else { self.shape.ring }
    }

    /// Experts of a layer that stream.
    pub fn streamed(&self) -> usize {
        self.shape.experts - self.shape.resident
    }

    /// Pages of a layer, over all its chunks.
    pub fn pages_per_layer(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.pages.len()).sum()
    }

    /// Bytes of pages that one pass streams.
    pub fn bytes_per_pass(&self) -> u64 {
        let layer: u64 = self.chunks.iter().flat_map(|chunk| &chunk.pages).map(Page::bytes).sum();
        layer * self.shape.layers as u64 - self.shape.extra as u64 * self.shape.matrix_bytes.iter().sum::<u64>()
    }
}

/// Pages of at most `page_bytes` that cover every matrix of `experts`, in order of use: gate and up before down.
fn cut(experts: Range<usize>, matrix_bytes: [u64; 3], page_bytes: u64) -> Vec<Page> {
    let page_bytes = (page_bytes / 4 * 4).max(4);
    let mut pages = vec![Page::default()];
    let mut room = page_bytes;
    for expert in experts {
        for (matrix, matrix_bytes) in ExpertMatrix::ALL.into_iter().zip(matrix_bytes) {
            let mut start = 0;
            while start < matrix_bytes {
                if room == 0 {
                    pages.push(Page::default());
                    room = page_bytes;
                }
                // A piece ends at a whole word, so that the next one starts at one; the last may end anywhere.
                let end = (start + room).min(matrix_bytes);
                pages.last_mut().expect("never empty").pieces.push(Piece { expert, matrix, bytes: start..end });
                room = room.saturating_sub((end - start).next_multiple_of(4));
                start = end;
            }
        }
    }
    pages
}

/// Which expert each slot holds, and how much of it is on its way or there.
#[derive(Debug)]
pub struct PageTable {
    slots: Vec<Option<Holding>>,
    /// Bytes of one expert, all its slots.
    expert_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holding {
    layer: usize,
    expert: usize,
    arrived: u64,
    /// When the last of its pieces will be there. None: it was there before anything ran.
    ticket: Option<Ticket>,
}

impl PageTable {
    pub fn new(plan: &PagePlan) -> Self {
        Self { slots: vec![None; plan.n_slots()], expert_bytes: plan.shape.matrix_bytes.iter().sum() }
    }

    /// A piece of an expert goes to its slot, and will be there when `ticket` is reached; what the slot held before is gone.
    /// Pieces of an expert come in order: the first one begins anew, also where a pass that was broken off left a part of the
    /// same expert.
    pub fn arrive(&mut self, slot: usize, layer: usize, piece: &Piece, ticket: Option<Ticket>) {
        let bytes = piece.bytes.end - piece.bytes.start;
        let first = piece.matrix == ExpertMatrix::Gate && piece.bytes.start == 0;
        match &mut self.slots[slot] {
            Some(held) if (held.layer, held.expert) == (layer, piece.expert) && !first => {
                held.arrived += bytes;
                held.ticket = held.ticket.max(ticket);
            }
            other => *other = Some(Holding { layer, expert: piece.expert, arrived: bytes, ticket }),
        }
    }

    /// The slot holds all of that expert, or will when the ticket is reached. None: it does not, or not all of it.
    pub fn holds(&self, slot: usize, layer: usize, expert: usize) -> Option<Option<Ticket>> {
        self.slots[slot]
            .filter(|held| (held.layer, held.expert, held.arrived) == (layer, expert, self.expert_bytes))
            .map(|held| held.ticket)
    }
}
