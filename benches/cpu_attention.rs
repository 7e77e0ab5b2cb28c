//! Decode attention on the CPU, in the heads of Mixtral 8x7B: does it run at the speed of memory?
//!
//! For every level and context, rows enough to read 512 MiB of K and V once, far more than caches hold. Checks one row
//! against the reference, then times whole calls of `attend`; filling the cache and making tables is outside. Prints the
//! best rate beside that of a plain read of the same bytes, measured in the same run on as many threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use fulmen::cpu::attention::{DecodeRow, attend};
use fulmen::cpu::isa::Isa;
use fulmen::memory::kv_cache::{BLOCK_TOKENS, BlockTable, KvCache, KvLayout, RowPlace};
use fulmen::model::AttentionShape;
use fulmen::reference;
use half::f16;
use rayon::prelude::*;

const SHAPE: AttentionShape =
    AttentionShape { q_heads: 32, kv_heads: 8, head_width: 128, window: None, scale: 0.088_388_35 };
const LAYOUT: KvLayout = KvLayout { layers: 1, kv_heads: SHAPE.kv_heads, head_width: SHAPE.head_width };
const READ_BYTES: usize = 512 << 20;
const CONTEXTS: [usize; 3] = [128, 512, 2048];

fn main() {
    let threads = rayon::ThreadPoolBuilder::new().build().expect("a pool of threads");
    let mut cache = KvCache::new(LAYOUT, READ_BYTES / LAYOUT.bytes_per_block()).expect("512 MiB");
    let whole = fill(&mut cache, &threads);
    let ceiling = plain_read_bytes_per_s(&cache, &whole, &threads);
    cache.release(whole);
    println!("plain read: {:.1} GB/s on {} threads", ceiling / 1e9, threads.current_num_threads());

    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let mut group = criterion.benchmark_group("cpu_attention");
    group.throughput(Throughput::Bytes(READ_BYTES as u64));
    for context in CONTEXTS {
        let n_rows = READ_BYTES / (context * LAYOUT.bytes_per_token());
        let tables: Vec<BlockTable> = (0..n_rows)
            .map(|_| {
                let mut table = BlockTable::new();
                cache.reserve(&mut table, context).expect("the rows fill the cache just so");
                table
            })
            .collect();
        let q: Vec<f32> = (0..n_rows * SHAPE.q_heads * SHAPE.head_width).map(value).collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; q.len()];
            attend_all(isa, &cache, context, &tables, &q, &mut out, &threads);
            check_last_row(&cache, context, &tables, &q, &out);
            let mut best = Duration::MAX;
            group.bench_function(BenchmarkId::new(isa.name(), context), |bencher| {
                bencher.iter_custom(|iterations| {
                    let times = (0..iterations).map(|_| {
                        let start = Instant::now();
                        attend_all(isa, &cache, context, &tables, &q, &mut out, &threads);
                        best = best.min(start.elapsed());
                        start.elapsed()
                    });
                    times.sum()
                });
            });
            if best < Duration::MAX {
                let rate = READ_BYTES as f64 / best.as_secs_f64();
                let percent = 100.0 * rate / ceiling;
                println!(
                    "{isa}, context {context}, {n_rows} rows: {:.1} GB/s of K and V, {percent:.0} % of a plain read",
                    rate / 1e9
                );
            }
        }
        tables.into_iter().for_each(|table| cache.release(table));
    }
    group.finish();
}

fn attend_all(
    isa: Isa,
    cache: &KvCache,
    context: usize,
    tables: &[BlockTable],
    q: &[f32],
    out: &mut [f32],
    threads: &rayon::ThreadPool,
) {
    let width = SHAPE.q_heads * SHAPE.head_width;
    let rows = tables.iter().zip(q.chunks_exact(width)).zip(out.chunks_exact_mut(width));
    let mut rows: Vec<DecodeRow> = rows.map(|((table, q), out)| DecodeRow { q, out, context, table }).collect();
    attend(isa, cache, 0, &SHAPE, None, &mut rows, threads);
}

/// -1 .. 1, different for any two neighbours.
fn value(i: usize) -> f32 {
    (i.wrapping_mul(0x9e37_79b1) >> 8 & 0xffff) as f32 / 32768.0 - 1.0
}

/// Writes every slot; the table of all blocks.
fn fill(cache: &mut KvCache, threads: &rayon::ThreadPool) -> BlockTable {
    let mut table = BlockTable::new();
    let tokens = cache.total_blocks() * BLOCK_TOKENS;
    cache.reserve(&mut table, tokens).expect("all blocks are free");
    let positions: Vec<usize> = (0..tokens).collect();
    for positions in positions.chunks(64 * BLOCK_TOKENS) {
        let rows: Vec<RowPlace> = positions.iter().map(|&position| RowPlace { table: &table, position }).collect();
        let first = positions[0];
        let data: Vec<f16> = (0..rows.len() * LAYOUT.row_elements()).map(|i| f16::from_f32(value(first + i))).collect();
        cache.write_rows(0, &rows, &data, threads);
    }
    table
}

fn check_last_row(cache: &KvCache, context: usize, tables: &[BlockTable], q: &[f32], out: &[f32]) {
    let width = SHAPE.q_heads * SHAPE.head_width;
    let table = tables.last().expect("at least one row");
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for token in 0..context {
        let block = cache.block(0, table.blocks()[token / BLOCK_TOKENS]);
        for head in 0..SHAPE.kv_heads {
            let rows = LAYOUT.keys(head);
            let row = token % BLOCK_TOKENS * SHAPE.head_width;
            keys.extend(block[rows.start + row..][..SHAPE.head_width].iter().map(|x| x.to_f32()));
            values.extend(block[rows.end + row..][..SHAPE.head_width].iter().map(|x| x.to_f32()));
        }
    }
    let expected = reference::attention::attention(&SHAPE, None, &q[q.len() - width..], &keys, &values);
    for (ours, expected) in out[out.len() - width..].iter().zip(expected) {
        assert!((ours - expected).abs() <= 1e-5, "context {context}: {ours} instead of {expected}");
    }
}

/// The best of some passes over the blocks of `table`, after one to warm up.
fn plain_read_bytes_per_s(cache: &KvCache, table: &BlockTable, threads: &rayon::ThreadPool) -> f64 {
    let pass = || -> u64 {
        threads.install(|| {
            let blocks = table.blocks().par_iter();
            let words = blocks.map(|&block| bytemuck::cast_slice::<f16, u64>(cache.block(0, block)));
            words
                .map(|words| words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)))
                .reduce(|| 0, u64::wrapping_add)
        })
    };
    black_box(pass());
    let times = (0..5).map(|_| {
        let start = Instant::now();
        black_box(pass());
        start.elapsed()
    });
    READ_BYTES as f64 / times.min().expect("five passes").as_secs_f64()
}
