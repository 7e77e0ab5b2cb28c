//! How fast this machine reads memory, and how near to that CPU attention comes: for `fulmen calibrate` and `cargo bench`.
//!
//! In: heads, a way to keep K and V, threads. Out: bytes per second of plain reads and of K and V under attention, over the same
//! memory, turn by turn on the same threads, so that what else the machine does meets both; medians.
//!
//! Cold: a [`Probe`] holds one pool of blocks, several times the last-level cache where memory allows, and every measurement
//! passes over all of it before it comes back to a byte. Attention does so in calls of as many rows as are asked for.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use half::f16;

use super::attention::{DecodeRow, attend};
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::isa::Level;
use crate::memory::host_memory;
use crate::memory::kv_cache::{BLOCK_TOKENS, BlockTable, Half, KvCache, KvError, KvLayout};
use crate::model::AttentionShape;
use crate::policy::KvDtype;
use crate::reference;

/// Bytes of the pool by the last-level cache: enough that what is left there of the last pass does not show.
const CACHES: u64 = 4;

/// Bytes of the pool at least.
const LEAST_BYTES: u64 = 512 << 20;

/// A thread takes so many bytes at a time of a plain read: the time of some hundred task switches.
const READ_CHUNK: usize = 1 << 20;

/// Threads that are worth a try on `cores` cores: powers of two, all, and three quarters of all. A few threads can be enough to
/// fill the memory channels, and more of them be in each other's way.
pub fn thread_counts(cores: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|bit| 1 << bit).take_while(|n| *n < cores);
    let mut counts: Vec<usize> = powers.chain([cores * 3 / 4, cores]).filter(|n| *n > 0).collect();
    counts.sort_unstable();
    counts.dedup();
    counts
}

/// A pool of made-up keys and values.
#[derive(Debug)]
pub struct Probe {
    shape: AttentionShape,
    cache: KvCache,
}

/// Decode attention as it was measured. Rates are medians of passes over the whole pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionRate {
    pub context: usize,
    /// Rows of each call.
    pub rows: usize,
    /// Bytes of K and V per second.
    pub bytes_per_s: f64,
    /// Of a plain read, measured turn by turn with attention.
    pub read_bytes_per_s: f64,
    /// Median of attention's rate over the read's, pass by pass.
    pub share_of_read: f64,
    /// Cached tokens that a second attends to, in one layer.
    pub tokens_per_s: f64,
    /// Largest difference of a row from the reference.
    pub largest_error: f32,
}

impl Probe {
    /// A pool that is larger than the caches and holds `rows` contexts of `tokens`, as far as a quarter of the memory that is
    /// available allows.
    pub fn new(
        shape: AttentionShape,
        dtype: KvDtype,
        rows: usize,
        tokens: usize,
        threads: &rayon::ThreadPool,
    ) -> Result<Self, KvError> {
        let layout = KvLayout { layers: 1, kv_heads: shape.kv_heads, head_width: shape.head_width, dtype };
        let wanted = (CACHES * host_memory::last_level_cache_bytes().unwrap_or(0)).max(LEAST_BYTES);
        let wanted = wanted.max((rows * KvLayout::blocks_for(tokens) * layout.bytes_per_block()) as u64);
        let bytes = wanted.min(host_memory::available_bytes().map_or(u64::MAX, |bytes| bytes / 4));
        Self::with_bytes(shape, dtype, bytes as usize, threads)
    }

    /// A pool of so many bytes: one that caches hold shows what the cores can do without waiting for memory.
    pub fn with_bytes(
        shape: AttentionShape,
        dtype: KvDtype,
        bytes: usize,
        threads: &rayon::ThreadPool,
    ) -> Result<Self, KvError> {
        let layout = KvLayout { layers: 1, kv_heads: shape.kv_heads, head_width: shape.head_width, dtype };
        let n_blocks = (bytes / layout.bytes_per_block()).max(1);
        let mut cache = KvCache::new(layout, n_blocks)?;
        let mut table = BlockTable::new();
        cache.reserve(&mut table, n_blocks * BLOCK_TOKENS).expect("all blocks are free");
        cache.make_up(&[(0, &table)], threads);
        cache.release(table);
        Ok(Self { shape, cache })
    }

    /// Bytes of the pool.
    pub fn bytes(&self) -> usize {
        self.cache.total_blocks() * self.cache.layout().bytes_per_block()
    }

    /// Seconds of one plain read of the pool.
    pub fn read_seconds(&self, threads: &rayon::ThreadPool) -> f64 {
        let bytes = self.cache.all_bytes();
        let next = AtomicUsize::new(0);
        let start = Instant::now();
        threads.scope(|scope| {
            for _ in 0..threads.current_num_threads() {
                scope.spawn(|_| {
                    let mut sum = 0u64;
                    while let Some(chunk) = bytes.chunks(READ_CHUNK).nth(next.fetch_add(1, Ordering::Relaxed)) {
                        sum = sum.wrapping_add(read(Isa::best(), chunk));
                    }
                    black_box(sum);
                });
            }
        });
        start.elapsed().as_secs_f64()
    }

    /// Bytes per second of plain reads: the median of `passes`, after one to warm up.
    pub fn read_rate(&self, threads: &rayon::ThreadPool, passes: usize) -> f64 {
        threads.install(|| {
            self.read_seconds(threads);
            let mut rates: Vec<f64> = (0..passes).map(|_| self.bytes() as f64 / self.read_seconds(threads)).collect();
            median(&mut rates)
        })
    }

    /// Attends `rows` rows of `context` tokens a call, over the whole pool, `passes` times, and compares a row with the reference.
    /// Fewer rows, where the pool holds no more. None where it does not hold one.
    pub fn attention(
        &mut self,
        isa: Isa,
        context: usize,
        rows: usize,
        passes: usize,
        threads: &rayon::ThreadPool,
    ) -> Option<AttentionRate> {
        let n_rows = self.cache.total_blocks() / KvLayout::blocks_for(context);
        let rows = rows.min(n_rows);
        let n_rows = n_rows.checked_div(rows)? * rows;
        let tables: Vec<BlockTable> = (0..n_rows)
            .map(|_| {
                let mut table = BlockTable::new();
                self.cache.reserve(&mut table, context).expect("counted above");
                table
            })
            .collect();
        let width = self.shape.q_heads * self.shape.head_width;
        let q: Vec<f32> = (0..n_rows * width).map(made_up_query).collect();
        let mut out = vec![f32::NAN; q.len()];
        let tokens = (n_rows * context) as f64;
        let bytes = tokens * self.cache.layout().bytes_per_token() as f64;
        let pass = |out: &mut [f32]| {
            let each = tables.iter().zip(q.chunks_exact(width)).zip(out.chunks_exact_mut(width));
            let mut each: Vec<DecodeRow> = each.map(|((table, q), out)| DecodeRow { q, out, context, table }).collect();
            let start = Instant::now();
            for rows in each.chunks_mut(rows) {
                attend(isa, &self.cache, 0, &self.shape, None, rows, threads);
            }
            bytes / start.elapsed().as_secs_f64()
        };
        let (mut rates, mut reads, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        // From one of the pool's threads, so that waking a pool that sleeps is no part of a call.
        threads.install(|| {
            pass(&mut out);
            for _ in 0..passes {
                let read = self.bytes() as f64 / self.read_seconds(threads);
                let rate = pass(&mut out);
                rates.push(rate);
                reads.push(read);
                shares.push(rate / read);
            }
        });
        let last = q.len() - width..q.len();
        let largest_error = self.error_of(context, &tables[n_rows - 1], &q[last.clone()], &out[last]);
        tables.into_iter().for_each(|table| self.cache.release(table));
        let bytes_per_s = median(&mut rates);
        Some(AttentionRate {
            context,
            rows,
            bytes_per_s,
            read_bytes_per_s: median(&mut reads),
            share_of_read: median(&mut shares),
            tokens_per_s: bytes_per_s * tokens / bytes,
            largest_error,
        })
    }

    /// Bytes of K and V per second where memory is no limit: `rows` rows that share one context, which caches should hold. The
    /// median of `passes` calls; None where the pool does not hold the context.
    pub fn attention_in_cache(
        &mut self,
        isa: Isa,
        context: usize,
        rows: usize,
        passes: usize,
        threads: &rayon::ThreadPool,
    ) -> Option<f64> {
        let mut table = BlockTable::new();
        self.cache.reserve(&mut table, context).ok()?;
        let width = self.shape.q_heads * self.shape.head_width;
        let q: Vec<f32> = (0..rows * width).map(made_up_query).collect();
        let mut out = vec![f32::NAN; q.len()];
        let each = q.chunks_exact(width).zip(out.chunks_exact_mut(width));
        let mut each: Vec<DecodeRow> = each.map(|(q, out)| DecodeRow { q, out, context, table: &table }).collect();
        let bytes = (rows * context * self.cache.layout().bytes_per_token()) as f64;
        let mut rates: Vec<f64> = (0..passes)
            .map(|_| {
                let start = Instant::now();
                attend(isa, &self.cache, 0, &self.shape, None, &mut each, threads);
                bytes / start.elapsed().as_secs_f64()
            })
            .collect();
        self.cache.release(table);
        Some(median(&mut rates))
    }

    /// How far the last KV head's query heads of a row are from the reference.
    fn error_of(&self, context: usize, table: &BlockTable, q: &[f32], out: &[f32]) -> f32 {
        let heads = self.shape.heads_per_group();
        let one_head = AttentionShape { q_heads: heads, kv_heads: 1, ..self.shape };
        let width = self.shape.head_width;
        let layout = self.cache.layout();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut half_rows = vec![f16::ZERO; BLOCK_TOKENS * width];
        for block in table.blocks() {
            let block = self.cache.block(0, *block);
            for (half, into) in [(Half::Keys, &mut keys), (Half::Values, &mut values)] {
                layout.read_half(layout.kv_heads - 1, half, block, BLOCK_TOKENS, &mut half_rows);
                into.extend(half_rows.iter().map(|x| x.to_f32()));
            }
        }
        keys.truncate(context * width);
        values.truncate(context * width);
        let last = q.len() - heads * width..q.len();
        let expected = reference::attention::attention(&one_head, None, &q[last.clone()], &keys, &values);
        let off = |(a, b): (&f32, &f32)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() };
        out[last].iter().zip(&expected).map(off).fold(0.0, f32::max)
    }
}

/// -1 .. 1, different for any two neighbours.
fn made_up_query(i: usize) -> f32 {
    (i.wrapping_mul(0x9e37_79b1) >> 8 & 0xffff) as f32 / 32768.0 - 1.0
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Reads all of `bytes`, in order.
fn read(isa: Isa, bytes: &[u8]) -> u64 {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where its instructions do.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni => unsafe { read_avx512(bytes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx2Vnni => unsafe { read_avx2(bytes) },
        _ => read_lines(bytes),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_avx512(bytes: &[u8]) -> u64 {
    read_lines(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(bytes: &[u8]) -> u64 {
    read_lines(bytes)
}

/// Sums 64-bit words; a sum for each word of four cache lines, so that additions do not wait for each other.
#[inline(always)]
fn read_lines(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 32];
    for words in bytemuck::cast_slice::<u8, u64>(bytes).chunks_exact(32) {
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_counts_end_with_all_cores() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(16), [1, 2, 4, 8, 12, 16]);
        assert_eq!(thread_counts(6), [1, 2, 4, 6]);
    }

    #[test]
    fn every_level_reads_every_word() {
        let words: Vec<u64> = (0..4096u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        let expected = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        for isa in Isa::available() {
            assert_eq!(read(isa, bytemuck::cast_slice(&words)), expected, "{isa}");
        }
    }

    #[test]
    fn what_is_measured_is_attention() {
        let shape = AttentionShape { q_heads: 4, kv_heads: 2, head_width: 16, window: None, scale: 0.25 };
        let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for dtype in KvDtype::ALL {
            let layout = KvLayout { layers: 1, kv_heads: 2, head_width: 16, dtype };
            let mut probe = Probe::with_bytes(shape, dtype, 40 * layout.bytes_per_block(), &threads).unwrap();
            let rate = probe.attention(Isa::best(), 70, 4, 3, &threads).unwrap();
            assert_eq!((rate.context, rate.rows), (70, 4));
            assert!(rate.largest_error < 1e-5, "{dtype}: {rate:?}");
            assert!(rate.bytes_per_s > 0.0 && rate.read_bytes_per_s > 0.0 && rate.share_of_read > 0.0, "{rate:?}");
            assert!(probe.attention(Isa::best(), 41 * BLOCK_TOKENS, 1, 1, &threads).is_none());
        }
    }
}
