//! The paged host KV cache: who owns which blocks, and what their bytes mean.
//!
//! In: rows of K and V as the projection makes them, one per token and layer. Out: contiguous blocks that SIMD code reads
//! in place and that go to the GPU as plain bytes.
//!
//! A *block* holds [`BLOCK_TOKENS`] tokens of one sequence in every layer. All blocks lie in one pool,
//! `[L][blocks][G][2][BLOCK_TOKENS][K]`, so one layer of a block is contiguous, and in it all that one query head reads:
//!
//! ```text
//! layer 0: | block 0                                           | block 1 ...        layer 1: | block 0 ...
//!          | head 0: 32 K rows, 32 V rows | head 1: 32 K rows..|
//!
//! table of a sequence of 70 tokens:  blocks [5, 2, 9]    token 40 = block 2, slot 8
//! ```
//!
//! Elements are f16, or 8-bit integers with a scale (f16) for each row of each head ([`KvDtype`]): then a block ends with its scales,
//! `[G][2][BLOCK_TOKENS]`, where they are in no stream's way, and the integers lie in the *fours* in which `cpu::attention` multiplies them, of
//! columns in K, of tokens in V, so that a line of 64 bytes has a four for each of 16 tokens, or columns:
//!
//! ```text
//! block: | head 0: 32 K rows, 32 V rows | head 1 ... | head 0: 32 scales of K, 32 of V | head 1 ...
//!
//! K [2][K / 4][16][4]   | columns 0..4 of token 0, of token 1 .. of token 15 | columns 4..8 of token 0 ...      bytes, 128 more than the integer
//! V [8][K][4]           | tokens 0..4 of column 0, of column 1 ..  of column K - 1 | tokens 4..8 of column 0 ...     signed bytes
//! ```
//!
//! K is rounded up to whole fours here. Instructions that multiply bytes take one side with a sign and one without, and queries have one, weights
//! none. How a row gets its scale and integers is [`mod@crate::reference::kv_quantise`]; what the cache holds are numbers
//! that f16 holds exactly, so attention here, attention on the GPU (whose blocks are f16) and a copy between them read the same.
//!
//! Guarantees:
//! * Blocks are taken as tokens arrive; nothing is reserved for tokens that may never come.
//! * [`KvCache::reserve`], [`fork`](KvCache::fork) and [`restore`](KvCache::restore) take all that they need or nothing.
//! * A block with several owners is never written ([`fork`](KvCache::fork) copies the one block that both sides would
//!   write); a debug build checks each write.
//! * What was spilled comes back bit for bit.
//! * The pool is an anonymous mapping: blocks that no sequence ever used cost address space only
//!   (up to the 2 MiB of a huge page beside used ones).
//!
//! Given up: a reused block is not cleared, it still holds its last owner's rows. Attention reads only the slots of its
//! context, all of which the new owner has written. Spilling a forked table ends its sharing: it comes back with blocks of
//! its own. A table belongs to the cache that filled it; handing it to another is not detected.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::model::Shape;
use crate::policy::KvDtype;
use crate::reference::kv_quantise::quantise;

/// Tokens of a block. Also the step of attention's online softmax, hence part of a row's reduction order.
pub const BLOCK_TOKENS: usize = 32;

/// Tokens whose 8-bit keys lie together, four of columns by four: as many as the widest register of fours takes, which is a line.
pub const KEY_GROUP: usize = 16;

/// What an 8-bit key is more than its integer, and thereby without a sign.
pub const KEY_EXCESS: u8 = 128;

/// What one token's K and V look like, in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// L
    pub layers: usize,
    /// G
    pub kv_heads: usize,
    /// K
    pub head_width: usize,
    /// How an element is kept.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// The cache of a model.
    pub fn new(shape: &Shape, dtype: KvDtype) -> Self {
        Self { layers: shape.layers, kv_heads: shape.kv_heads, head_width: shape.head_width, dtype }
    }

    /// Elements that one token adds to one layer: K and V of every head.
    pub fn row_elements(&self) -> usize {
        self.kv_heads * 2 * self.head_width
    }

    /// K, rounded up to whole fours of 8-bit elements.
    pub fn width_in_fours(&self) -> usize {
        self.head_width.next_multiple_of(4)
    }

    /// Bytes of one head's K, or V, in one layer of a block, without scales.
    pub fn half_bytes(&self) -> usize {
        let row_bytes = match self.dtype {
            KvDtype::F16 => self.head_width * size_of::<f16>(),
            KvDtype::Int8 => self.width_in_fours(),
        };
        BLOCK_TOKENS * row_bytes
    }

    /// Bytes of their scales.
    fn half_scales_bytes(&self) -> usize {
        match self.dtype {
            KvDtype::F16 => 0,
            KvDtype::Int8 => BLOCK_TOKENS * size_of::<f16>(),
        }
    }

    /// Bytes of one block in one layer: `G * 2` halves, then their scales.
    pub fn block_bytes(&self) -> usize {
        self.elements_bytes() + 2 * self.kv_heads * self.half_scales_bytes()
    }

    /// Bytes of all halves of a block in one layer, in front of the scales.
    fn elements_bytes(&self) -> usize {
        2 * self.kv_heads * self.half_bytes()
    }

    /// Bytes of one block over all layers: what taking a block takes.
    pub fn bytes_per_block(&self) -> usize {
        self.layers * self.block_bytes()
    }

    /// Bytes of one token over all layers.
    pub fn bytes_per_token(&self) -> usize {
        self.bytes_per_block() / BLOCK_TOKENS
    }

    /// Blocks that `tokens` tokens fill, the last one perhaps in part.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS)
    }

    /// One head's K inside a layer of a block, in bytes. Its V follows directly.
    pub fn keys(&self, kv_head: usize) -> Range<usize> {
        let half = self.half_bytes();
        2 * kv_head * half..(2 * kv_head + 1) * half
    }

    /// The scales of one head's K inside a layer of a block, `[BLOCK_TOKENS]` in f16, in bytes; nothing where there are none. Those of its V
    /// follow directly.
    pub fn key_scales(&self, kv_head: usize) -> Range<usize> {
        let scales = self.half_scales_bytes();
        let start = self.elements_bytes() + 2 * kv_head * scales;
        start..start + scales
    }

    /// Bytes of one token's K, or V, of one head as the device hands it over: f16 `[K]`, or 8-bit `[K]`, padded to a word, and a
    /// word whose low half is the scale.
    fn new_half_row_bytes(&self) -> usize {
        match self.dtype {
            KvDtype::F16 => self.head_width * size_of::<f16>(),
            KvDtype::Int8 => self.width_in_fours() + 4,
        }
    }

    /// Bytes of a *new row*, one token's K and V of one layer as the device hands it over: `[G, 2]` of what is described above.
    pub fn new_row_bytes(&self) -> usize {
        2 * self.kv_heads * self.new_half_row_bytes()
    }

    /// A new row as the device makes it of `row`, `[G, 2, K]`.
    pub fn new_row(&self, row: &[f16]) -> Vec<u8> {
        assert_eq!(row.len(), self.row_elements(), "elements of a row");
        match self.dtype {
            KvDtype::F16 => bytemuck::cast_slice(row).to_vec(),
            KvDtype::Int8 => {
                let mut bytes = Vec::with_capacity(self.new_row_bytes());
                for half in row.chunks_exact(self.head_width) {
                    let (integers, scale) = quantise(half);
                    bytes.extend_from_slice(bytemuck::cast_slice(&integers));
                    bytes.resize(bytes.len().next_multiple_of(4), 0);
                    bytes.extend_from_slice(&u32::from(scale.to_bits()).to_le_bytes());
                }
                bytes
            }
        }
    }

    /// The first `tokens` rows of a half of a layer of a block, `[tokens, K]`, exactly.
    pub fn read_half(&self, kv_head: usize, half: Half, block: &[u8], tokens: usize, into: &mut [f16]) {
        assert_eq!(block.len(), self.block_bytes(), "bytes of a block");
        // SAFETY: a block is there as a whole.
        unsafe { self.read_half_at(kv_head, half, block.as_ptr(), tokens, into) }
    }

    /// As [`read_half`](Self::read_half), of a block that somebody else may be writing rows to beyond the first `tokens`.
    ///
    /// # Safety
    /// * A layer of a block starts at `block`, and nobody writes its first `tokens` rows.
    pub unsafe fn read_half_at(&self, kv_head: usize, half: Half, block: *const u8, tokens: usize, into: &mut [f16]) {
        assert!(kv_head < self.kv_heads, "KV head {kv_head} of {}", self.kv_heads);
        assert_eq!(into.len(), tokens * self.head_width, "elements of {tokens} rows");
        let (keys, key_scales) = (self.keys(kv_head), self.key_scales(kv_head));
        let (from, scales) = match half {
            Half::Keys => (keys.start, key_scales.start),
            Half::Values => (keys.end, key_scales.end),
        };
        let from = block.wrapping_add(from);
        match self.dtype {
            KvDtype::F16 => {
                // SAFETY: these bytes are those of the first rows.
                let rows = unsafe { std::slice::from_raw_parts(from, tokens * self.head_width * size_of::<f16>()) };
                bytemuck::cast_slice_mut(into).copy_from_slice(rows);
            }
            KvDtype::Int8 => {
                let scales = block.wrapping_add(scales).cast::<f16>();
                let mut row = vec![0.0; self.head_width];
                for (slot, into) in into.chunks_exact_mut(self.head_width).enumerate() {
                    // Element by element: between those of a row lie others', which may be being written.
                    // SAFETY: scales and elements of the first rows, inside a block.
                    unsafe {
                        let scale = scales.add(slot).read_unaligned().to_f32();
                        for (column, value) in row.iter_mut().enumerate() {
                            let byte = from.add(self.integer_at(half, slot, column)).read();
                            let integer = match half {
                                Half::Keys => byte.wrapping_sub(KEY_EXCESS) as i8,
                                Half::Values => byte as i8,
                            };
                            *value = f32::from(integer) * scale;
                        }
                    }
                    into.convert_from_f32_slice(&row);
                }
            }
        }
    }

    /// Where a half has an 8-bit element.
    #[inline]
    fn integer_at(&self, half: Half, slot: usize, column: usize) -> usize {
        match half {
            Half::Keys => {
                let line = slot / KEY_GROUP * (self.width_in_fours() / 4) + column / 4;
                (line * KEY_GROUP + slot % KEY_GROUP) * 4 + column % 4
            }
            Half::Values => (slot / 4 * self.width_in_fours() + column) * 4 + slot % 4,
        }
    }
}

/// Which of the two a half of a head's part of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    Keys,
    Values,
}

impl Half {
    /// In the order in which they follow each other.
    pub const BOTH: [Half; 2] = [Half::Keys, Half::Values];
}

/// Index of a block in its pool, the same in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(u32);

impl BlockId {
    /// Place in the pool, counted in blocks: what a shader's block table holds.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Which blocks hold a sequence's tokens, in order. Owned by the sequence.
///
/// Not `Clone`: each table is one owner of its blocks. It must go back through [`KvCache::release`] (or `spill`);
/// a table that is dropped keeps its blocks until the cache goes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// A table that holds no blocks yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The blocks in token order: token `t` lies in block `t / BLOCK_TOKENS`, slot `t % BLOCK_TOKENS`.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens that fit without another `reserve`.
    pub fn capacity_tokens(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }
}

/// Where one row of K and V belongs: a token position of a sequence.
#[derive(Debug, Clone, Copy)]
pub struct RowPlace<'a> {
    pub table: &'a BlockTable,
    /// Tokens in front of this one.
    pub position: usize,
}

/// Too few blocks are free. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the KV cache is out of blocks: {needed} more are needed, {free} are free")]
pub struct OutOfBlocks {
    pub needed: usize,
    pub free: usize,
}

/// What the machine refused.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    #[error("a KV cache of {n_blocks} blocks of {bytes_per_block} bytes is more than can be addressed")]
    TooLarge { n_blocks: usize, bytes_per_block: usize },
    #[error(
        "the KV cache needs {:.2} GiB of host memory ({n_blocks} blocks of {bytes_per_block} bytes), the system refused",
        *needed_bytes as f64 / (1u64 << 30) as f64
    )]
    Refused { needed_bytes: usize, n_blocks: usize, bytes_per_block: usize, source: io::Error },
    #[error("the warm sequences do not fit: {0}")]
    Warm(#[source] OutOfBlocks),
    /// `directory` because the file itself has no name.
    #[error("the KV spill file in {}: {action}", directory.display())]
    Spill { directory: PathBuf, action: String, source: io::Error },
}

/// Spilling failed. The table is as it was, its blocks still hold their rows.
#[derive(Debug, thiserror::Error)]
#[error("cannot spill a sequence of {} blocks", table.blocks.len())]
pub struct SpillError {
    #[source]
    pub cause: KvError,
    pub table: BlockTable,
}

/// Restoring failed. The spilled table can be restored later, nothing was taken from the cache.
#[derive(Debug, thiserror::Error)]
#[error("cannot restore a spilled sequence of {} blocks", spilled.n_blocks())]
pub struct RestoreError {
    #[source]
    pub cause: RestoreCause,
    pub spilled: SpilledTable,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreCause {
    #[error(transparent)]
    OutOfBlocks(#[from] OutOfBlocks),
    #[error(transparent)]
    Io(#[from] KvError),
}

/// The memory of all blocks. Shared with whoever lends it to a driver; this cache alone reads and writes it through Rust.
struct Pool {
    start: std::ptr::NonNull<u8>,
    bytes: usize,
    map: std::sync::Arc<memmap2::MmapMut>,
}

// SAFETY: the pointer is to memory that `map` owns, and access to it follows access to the `KvCache`.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes)
    }
}

/// The pool of blocks and who owns them.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    pool: Pool,
    /// Owners of each block: how many tables list it.
    owners: Vec<u32>,
    /// Blocks without an owner. The last one freed is taken first: its pages are already there.
    free: Vec<BlockId>,
}

impl KvCache {
    /// Maps room for `n_blocks` blocks. Pages that are never written take no memory.
    pub fn new(layout: KvLayout, n_blocks: usize) -> Result<Self, KvError> {
        let KvLayout { layers, kv_heads, head_width, .. } = layout;
        assert!(layers > 0 && kv_heads > 0 && head_width > 0, "a model has no axis of extent 0: {layout:?}");
        let bytes_per_block = layout.bytes_per_block();
        let too_large = || KvError::TooLarge { n_blocks, bytes_per_block };
        let block_ids = 0..u32::try_from(n_blocks).map_err(|_| too_large())?;
        let needed_bytes =
            n_blocks.checked_mul(bytes_per_block).filter(|&n| n <= isize::MAX as usize).ok_or_else(too_large)?;
        // Whole pages, so that it can be lent to a driver.
        let mapped_bytes = needed_bytes.checked_next_multiple_of(4096).ok_or_else(too_large)?.max(4096);
        let mut pool = memmap2::MmapMut::map_anon(mapped_bytes).map_err(|source| KvError::Refused {
            needed_bytes,
            n_blocks,
            bytes_per_block,
            source,
        })?;
        // One head's rows of a block are 16 KiB, then attention jumps: fewer page walks with huge pages. A doubt: 4 KiB
        // pages measured 8 % slower on 1 thread of a shared 2-core EPYC, whose noise is no smaller. Advice only.
        #[cfg(target_os = "linux")]
        {
            let _ = pool.advise(memmap2::Advice::HugePage);
            crate::memory::host_memory::spread_over_nodes(&mut pool);
        }
        let start = std::ptr::NonNull::new(pool.as_mut_ptr()).expect("a mapping is nowhere near address 0");
        let pool = Pool { start, bytes: needed_bytes, map: std::sync::Arc::new(pool) };
        Ok(Self { layout, pool, owners: vec![0; n_blocks], free: block_ids.rev().map(BlockId).collect() })
    }

    /// The pool's memory, for a driver and for uploads: its start, its length without padding, its owner. Blocks of a layer
    /// follow each other in order of their index, layers too.
    pub(crate) fn memory(&self) -> (*const u8, u64, std::sync::Arc<memmap2::MmapMut>) {
        (self.pool.start.as_ptr(), self.pool.bytes as u64, self.pool.map.clone())
    }

    /// The whole pool as it is.
    pub(crate) fn all_bytes(&self) -> &[u8] {
        self.bytes()
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    pub fn total_blocks(&self) -> usize {
        self.owners.len()
    }

    /// Blocks of a table that others hold too.
    pub fn shared_blocks(&self, table: &BlockTable) -> usize {
        table.blocks.iter().filter(|block| self.owners[block.index()] > 1).count()
    }

    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Makes room in `table` for `tokens` tokens in all. Takes nothing when it fails.
    pub fn reserve(&mut self, table: &mut BlockTable, tokens: usize) -> Result<(), OutOfBlocks> {
        let needed = KvLayout::blocks_for(tokens).saturating_sub(table.blocks.len());
        self.take(needed, &mut table.blocks)
    }

    /// Gives the table's blocks back. A block returns to the pool when its last owner gives it back.
    pub fn release(&mut self, table: BlockTable) {
        for block in table.blocks {
            let owners = &mut self.owners[block.index()];
            *owners -= 1;
            if *owners == 0 {
                self.free.push(block);
            }
        }
    }

    /// A second table with the first `tokens` tokens of `table`. Full blocks are shared; a partial last block is copied,
    /// because both sides will write the rest of it.
    ///
    /// From here on neither side may write a position below `tokens`.
    pub fn fork(&mut self, table: &BlockTable, tokens: usize) -> Result<BlockTable, OutOfBlocks> {
        assert!(tokens <= table.capacity_tokens(), "fork at token {tokens} of {}", table.capacity_tokens());
        let (shared, rest) = table.blocks.split_at(tokens / BLOCK_TOKENS);
        let mut blocks = shared.to_vec();
        if !tokens.is_multiple_of(BLOCK_TOKENS) {
            self.take(1, &mut blocks)?;
            self.copy_block(rest[0], blocks[shared.len()]);
        }
        for block in shared {
            self.owners[block.index()] += 1;
        }
        Ok(BlockTable { blocks })
    }

    /// Stores one token's K and V in one layer. `row`: `[G, 2, K]`, per head its K, then its V.
    pub fn write_row(&mut self, layer: usize, table: &BlockTable, position: usize, row: &[f16]) {
        let layout = self.layout;
        let block = self.writable(table, position);
        let bytes = self.bytes_of(layer, block);
        scatter(&layout, &mut self.bytes_mut()[bytes], position % BLOCK_TOKENS, &layout.new_row(row));
    }

    /// One token's K and V in one layer, `[G, 2, K]`, exactly.
    pub fn row(&self, layer: usize, table: &BlockTable, position: usize) -> Vec<f16> {
        let (layout, slot) = (self.layout, position % BLOCK_TOKENS);
        let mut half_rows = vec![f16::ZERO; (slot + 1) * layout.head_width];
        let mut row = Vec::with_capacity(layout.row_elements());
        let block = self.block(layer, table.blocks[position / BLOCK_TOKENS]);
        for kv_head in 0..layout.kv_heads {
            for half in Half::BOTH {
                layout.read_half(kv_head, half, block, slot + 1, &mut half_rows);
                row.extend_from_slice(&half_rows[slot * layout.head_width..]);
            }
        }
        row
    }

    /// Stores many tokens' K and V in one layer, on all threads of `threads`. `data`: a [new row](KvLayout::new_row_bytes) for
    /// each of `rows`.
    ///
    /// One thread writes all rows of a block, in the order of `rows`.
    pub fn write_rows(&mut self, layer: usize, rows: &[RowPlace], data: &[u8], threads: &rayon::ThreadPool) {
        let layout = self.layout;
        let row_bytes = layout.new_row_bytes();
        assert_eq!(data.len(), rows.len() * row_bytes, "bytes of {} rows", rows.len());
        let mut writes: Vec<(BlockId, usize)> =
            rows.iter().enumerate().map(|(row, place)| (self.writable(place.table, place.position), row)).collect();
        writes.sort_unstable();

        // The layer is cut into one slice per written block, so that threads hold disjoint parts of it.
        let mut remaining = &mut self.layer_mut(layer)[..];
        let mut cut = 0;
        let mut blocks = Vec::new();
        for writes in writes.chunk_by(|a, b| a.0 == b.0) {
            let index = writes[0].0.index();
            let (_, from_block) = remaining.split_at_mut((index - cut) * layout.block_bytes());
            let (block, after) = from_block.split_at_mut(layout.block_bytes());
            blocks.push((block, writes));
            remaining = after;
            cut = index + 1;
        }
        threads.install(|| {
            blocks.into_par_iter().for_each(|(block, writes)| {
                for &(_, row) in writes {
                    let slot = rows[row].position % BLOCK_TOKENS;
                    scatter(&layout, block, slot, &data[row * row_bytes..][..row_bytes]);
                }
            });
        });
    }

    /// Fills the blocks of sequences with made-up keys and values, in -0.5..0.5, which depend on the sequence's number, the layer
    /// and the place in the sequence.
    pub(crate) fn make_up(&mut self, tables: &[(u64, &BlockTable)], threads: &rayon::ThreadPool) {
        let layout = self.layout;
        let block_bytes = layout.block_bytes();
        // Each block is a window of one stretch of noise: f16 of that range, or integers (whose scales are set below).
        let noise: Vec<u8> = (0..2 * block_bytes as u64 + 65_536)
            .flat_map(|at| {
                let mixed = (at + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let mixed = mixed ^ mixed >> 31;
                match layout.dtype {
                    KvDtype::F16 => f16::from_f32((mixed >> 40) as f32 / (1u64 << 24) as f32 - 0.5).to_le_bytes(),
                    KvDtype::Int8 => [(mixed >> 40) as u8, (mixed >> 48) as u8],
                }
            })
            .collect();
        let mut wanted: Vec<Option<(u64, u64)>> = vec![None; self.total_blocks()];
        for (number, table) in tables {
            for (place, block) in table.blocks.iter().enumerate() {
                wanted[block.index()] = Some((*number, place as u64));
            }
        }
        for layer in 0..layout.layers {
            let blocks = self.layer_mut(layer);
            threads.install(|| {
                blocks.par_chunks_exact_mut(block_bytes).zip(&wanted).for_each(|(block, wanted)| {
                    let Some((number, place)) = wanted else { return };
                    let mixed = (number * 1_000_003 + place * 8191 + layer as u64 * 127 + 1)
                        .wrapping_mul(0x94d0_49bb_1331_11eb);
                    let start = (mixed >> 20) as usize % ((noise.len() - block_bytes) / 2) * 2;
                    block.copy_from_slice(&noise[start..start + block_bytes]);
                    let scales = block[layout.elements_bytes()..].as_chunks_mut::<2>().0;
                    scales.fill(INT8_NOISE.to_le_bytes());
                });
            });
        }
    }

    /// One layer of a block, [`block_bytes`](KvLayout::block_bytes): `[G, 2]` halves, then their scales. Slots that its owner has not written hold
    /// anything, NaN included.
    pub fn block(&self, layer: usize, block: BlockId) -> &[u8] {
        &self.bytes()[self.bytes_of(layer, block)]
    }

    /// Writes the table's blocks to `file`, all layers, and releases them.
    ///
    /// Blocks shared with another table are written too, but stay in use there: only the others become free.
    pub fn spill(&mut self, table: BlockTable, file: &mut SpillFile) -> Result<SpilledTable, SpillError> {
        assert_eq!(file.layout, self.layout, "the spill file was made for another layout");
        let mut slots = Vec::with_capacity(table.blocks.len());
        for &block in &table.blocks {
            let slot = file.take_slot();
            slots.push(slot);
            for layer in 0..self.layout.layers {
                if let Err(cause) = file.write(slot, layer, self.block(layer, block)) {
                    file.discard(SpilledTable { slots });
                    return Err(SpillError { cause, table });
                }
            }
        }
        self.release(table);
        Ok(SpilledTable { slots })
    }

    /// Brings a spilled table back, bit for bit, in blocks of its own, and frees its space in the file.
    pub fn restore(&mut self, spilled: SpilledTable, file: &mut SpillFile) -> Result<BlockTable, RestoreError> {
        assert_eq!(file.layout, self.layout, "the spill file was made for another layout");
        let mut table = BlockTable::new();
        if let Err(out_of_blocks) = self.take(spilled.slots.len(), &mut table.blocks) {
            return Err(RestoreError { cause: out_of_blocks.into(), spilled });
        }
        for (&block, &slot) in table.blocks.iter().zip(&spilled.slots) {
            for layer in 0..self.layout.layers {
                let bytes = self.bytes_of(layer, block);
                if let Err(cause) = file.read(slot, layer, &mut self.bytes_mut()[bytes]) {
                    self.release(table);
                    return Err(RestoreError { cause: cause.into(), spilled });
                }
            }
        }
        file.discard(spilled);
        Ok(table)
    }

    /// Moves `needed` free blocks to the end of `blocks`, or none.
    fn take(&mut self, needed: usize, blocks: &mut Vec<BlockId>) -> Result<(), OutOfBlocks> {
        let free = self.free.len();
        let Some(first) = free.checked_sub(needed) else { return Err(OutOfBlocks { needed, free }) };
        for block in self.free.drain(first..).rev() {
            self.owners[block.index()] = 1;
            blocks.push(block);
        }
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        for layer in 0..self.layout.layers {
            let source = self.bytes_of(layer, from);
            let target = self.bytes_of(layer, to).start;
            self.bytes_mut().copy_within(source, target);
        }
    }

    /// The block of a position that is about to be written.
    fn writable(&self, table: &BlockTable, position: usize) -> BlockId {
        let block = table.blocks[position / BLOCK_TOKENS];
        debug_assert_eq!(self.owners[block.index()], 1, "position {position} is written in a block with other owners");
        block
    }

    fn bytes_of(&self, layer: usize, block: BlockId) -> Range<usize> {
        assert!(layer < self.layout.layers, "layer {layer} of {}", self.layout.layers);
        let start = (layer * self.total_blocks() + block.index()) * self.layout.block_bytes();
        start..start + self.layout.block_bytes()
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is that long; while `self` is shared nothing writes it.
        unsafe { std::slice::from_raw_parts(self.pool.start.as_ptr(), self.pool.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is that long. While `self` is borrowed for writing, nobody else reads it through Rust but uploads,
        // and those read only tokens that nothing writes any more (`Machine::upload_kv`).
        unsafe { std::slice::from_raw_parts_mut(self.pool.start.as_ptr(), self.pool.bytes) }
    }

    fn layer_mut(&mut self, layer: usize) -> &mut [u8] {
        assert!(layer < self.layout.layers, "layer {layer} of {}", self.layout.layers);
        let bytes = self.total_blocks() * self.layout.block_bytes();
        &mut self.bytes_mut()[layer * bytes..][..bytes]
    }
}

/// Scale of made-up integers: -128 .. 127 of it are -0.5 .. 0.5.
const INT8_NOISE: f16 = f16::from_bits(7 << 10);

/// `block`: one layer of a block; `row`: a new row. K and V of a head go to the same slot of their halves.
fn scatter(layout: &KvLayout, block: &mut [u8], slot: usize, row: &[u8]) {
    let (width, half_row) = (layout.width_in_fours(), layout.new_half_row_bytes());
    let (elements, scales) = block.split_at_mut(layout.elements_bytes());
    let halves = elements.chunks_exact_mut(layout.half_bytes()).zip(Half::BOTH.into_iter().cycle());
    for (index, ((elements, half), new)) in halves.zip(row.chunks_exact(half_row)).enumerate() {
        match layout.dtype {
            KvDtype::F16 => elements[slot * half_row..][..half_row].copy_from_slice(new),
            KvDtype::Int8 => {
                let row = &new[..width];
                match half {
                    Half::Keys => {
                        let group = &mut elements[slot / KEY_GROUP * KEY_GROUP * width..][..KEY_GROUP * width];
                        let (lines, fours) = (group.as_chunks_mut::<{ 4 * KEY_GROUP }>().0, row.as_chunks::<4>().0);
                        for (line, four) in lines.iter_mut().zip(fours) {
                            let four = four.map(|integer| integer.wrapping_add(KEY_EXCESS));
                            line[4 * (slot % KEY_GROUP)..][..4].copy_from_slice(&four);
                        }
                    }
                    Half::Values => {
                        let fours = &mut elements[slot / 4 * 4 * width..][..4 * width];
                        for (four, integer) in fours.as_chunks_mut::<4>().0.iter_mut().zip(row) {
                            four[slot % 4] = *integer;
                        }
                    }
                }
                scales[2 * (index * BLOCK_TOKENS + slot)..][..2].copy_from_slice(&new[half_row - 4..][..2]);
            }
        }
    }
}

/// A preempted sequence's place in a [`SpillFile`]. Goes back through [`KvCache::restore`] or [`SpillFile::discard`].
#[derive(Debug, PartialEq, Eq)]
pub struct SpilledTable {
    slots: Vec<u64>,
}

impl SpilledTable {
    /// Blocks that restoring takes.
    pub fn n_blocks(&self) -> usize {
        self.slots.len()
    }
}

/// Where preempted sequences' blocks wait: a file without a name, so that a killed process leaves nothing behind.
///
/// The file is a row of slots of one block each (all layers); free slots are filled before the file grows, so it stays as
/// large as the most blocks that were ever spilled at a time. It is made at the first spill: a run that never preempts
/// needs no disk. Bytes are in the machine's own order, as no other process reads them.
#[derive(Debug)]
pub struct SpillFile {
    layout: KvLayout,
    directory: PathBuf,
    file: Option<File>,
    n_slots: u64,
    free: Vec<u64>,
}

impl SpillFile {
    /// Nothing is written, nor `directory` looked at, before the first spill.
    pub fn new(directory: impl Into<PathBuf>, layout: KvLayout) -> Self {
        Self { layout, directory: directory.into(), file: None, n_slots: 0, free: Vec::new() }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Size of all slots, used and free: what the file has grown to, unless its last write failed.
    pub fn size_bytes(&self) -> u64 {
        self.n_slots * self.layout.bytes_per_block() as u64
    }

    /// Frees the space of a sequence that will not come back.
    pub fn discard(&mut self, spilled: SpilledTable) {
        // Reversed, so that the next table finds them in file order.
        self.free.extend(spilled.slots.into_iter().rev());
    }

    fn take_slot(&mut self) -> u64 {
        self.free.pop().unwrap_or_else(|| {
            self.n_slots += 1;
            self.n_slots - 1
        })
    }

    fn write(&mut self, slot: u64, layer: usize, bytes: &[u8]) -> Result<(), KvError> {
        if self.file.is_none() {
            let file = tempfile::tempfile_in(&self.directory).map_err(|e| self.error("creating it".into(), e))?;
            self.file = Some(file);
        }
        let offset = self.offset(slot, layer);
        self.at(offset).and_then(|mut file| file.write_all(bytes)).map_err(|source| {
            let size = self.size_bytes();
            self.error(format!("writing {} bytes at offset {offset} of {size}", bytes.len()), source)
        })
    }

    fn read(&mut self, slot: u64, layer: usize, bytes: &mut [u8]) -> Result<(), KvError> {
        let offset = self.offset(slot, layer);
        self.at(offset)
            .and_then(|mut file| file.read_exact(bytes))
            .map_err(|source| self.error(format!("reading {} bytes at offset {offset}", bytes.len()), source))
    }

    fn at(&mut self, offset: u64) -> io::Result<&File> {
        let mut file = self.file.as_ref().expect("a slot was taken, so the file was made");
        file.seek(SeekFrom::Start(offset))?;
        Ok(file)
    }

    fn offset(&self, slot: u64, layer: usize) -> u64 {
        slot * self.layout.bytes_per_block() as u64 + (layer * self.layout.block_bytes()) as u64
    }

    fn error(&self, action: String, source: io::Error) -> KvError {
        KvError::Spill { directory: self.directory.clone(), action, source }
    }
}
