//! What the host does: attention, storing of keys and values, reads, and schedules.

use std::time::Duration;

use half::f16;
use rayon::prelude::*;

use super::link::Copies;
use super::{CalibrateError, Request, grid, pool, steady};
use crate::cpu::attention::{DecodeRow, attend};
use crate::execute::machine::attention_scale;
use crate::memory::kv_cache::{BlockTable, KvCache, KvError, KvLayout, RowPlace};
use crate::model::{AttentionShape, ModelConfig};
use crate::policy::{KvDtype, RowPath, ScheduleKind, SpreadLayers};
use crate::profile::{CONTENTION_TOKENS, Contention, Curve, Host, ThreadCurve};
use crate::schedule::{ChunkShape, MicroBatchShape, PassShape, build, check};

/// Contexts that attention is measured with.
const CONTEXTS: [usize; 3] = [64, 512, 2048];
/// Turns in which attention and pages are measured alone and beside each other.
const BESIDE_ROUNDS: usize = 5;

/// Keys and values of one layer, more than caches hold.
pub struct Attention {
    cache: KvCache,
    shape: AttentionShape,
    isa: crate::cpu::isa::Isa,
}

fn layout(config: &ModelConfig, kv: KvDtype) -> KvLayout {
    KvLayout { layers: 1, ..KvLayout::new(&config.shape, kv) }
}

/// Numbers of threads: powers of two, three quarters, all.
fn thread_grid(all: usize) -> Vec<usize> {
    let mut threads: Vec<usize> = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < all).collect();
    threads.extend([all * 3 / 4, all]);
    threads.retain(|n| *n > 0);
    threads.sort_unstable();
    threads.dedup();
    threads
}

impl Attention {
    /// Keys and values kept so.
    pub fn open(request: &Request<'_>, kv: KvDtype) -> Result<Attention, CalibrateError> {
        let config = request.config;
        let layout = layout(config, kv);
        let most: u64 = if request.software() { 32 << 20 } else { 2 << 30 };
        let blocks = (most.min(request.host_bytes / 8) as usize / layout.bytes_per_block()).max(CONTEXTS[2] / 32 + 1);
        let shape = AttentionShape {
            q_heads: config.shape.q_heads,
            kv_heads: config.shape.kv_heads,
            head_width: config.shape.head_width,
            window: None,
            scale: attention_scale(config),
        };
        Ok(Attention { cache: KvCache::new(layout, blocks)?, shape, isa: request.isa })
    }

    /// As many sequences of `context` tokens as the cache holds, with made-up keys and values.
    fn sequences(&mut self, context: usize, threads: &rayon::ThreadPool) -> Result<Vec<BlockTable>, CalibrateError> {
        let n = (self.cache.total_blocks() / KvLayout::blocks_for(context)).max(1);
        let mut tables: Vec<BlockTable> = (0..n).map(|_| BlockTable::new()).collect();
        for table in &mut tables {
            self.cache.reserve(table, context).map_err(KvError::Warm)?;
        }
        let numbered: Vec<(u64, &BlockTable)> = (0..).zip(&tables).collect();
        self.cache.make_up(&numbered, threads);
        Ok(tables)
    }

    fn release(&mut self, tables: Vec<BlockTable>) {
        tables.into_iter().for_each(|table| self.cache.release(table));
    }

    /// Seconds in which `tables` attend, each over `context` tokens.
    fn attend(&self, tables: &[BlockTable], context: usize, threads: &rayon::ThreadPool, most: Duration) -> f64 {
        let width = self.shape.q_heads * self.shape.head_width;
        let q = vec![0.01f32; tables.len() * width];
        let mut out = vec![0f32; tables.len() * width];
        let done = steady(most, |n| {
            for _ in 0..n {
                let rows = tables.iter().zip(q.chunks_exact(width)).zip(out.chunks_exact_mut(width));
                let mut rows: Vec<DecodeRow<'_>> =
                    rows.map(|((table, q), out)| DecodeRow { q, out, context, table }).collect();
                attend(self.isa, &self.cache, 0, &self.shape, None, &mut rows, threads);
            }
            Ok::<(), std::convert::Infallible>(())
        });
        match done {
            Ok(seconds) => seconds,
            Err(never) => match never {},
        }
    }

    /// Rates over context by threads, up to `all` of them; and a task over hardly anything.
    pub fn rates(&mut self, request: &Request<'_>, all: usize) -> Result<(Vec<ThreadCurve>, f64), CalibrateError> {
        let token_bytes = self.cache.layout().bytes_per_token() as f64;
        let everyone = pool(all)?;
        let pools = pools(all)?;
        let mut attention: Vec<(usize, Vec<(f64, f64)>)> = pools.iter().map(|(n, _)| (*n, Vec::new())).collect();
        let mut task_seconds = 0.0;
        for context in CONTEXTS {
            let tables = self.sequences(context, &everyone)?;
            for ((threads, pool), (_, points)) in pools.iter().zip(&mut attention) {
                // Few threads take long over much: a part of the sequences is as cold.
                let n = (tables.len() * threads / all).max(1);
                let seconds = self.attend(&tables[..n], context, pool, request.point());
                points.push((context as f64, (n * context) as f64 * token_bytes / seconds));
            }
            if context == CONTEXTS[0] {
                task_seconds = self.attend(&tables[..1], 1, &everyone, request.point());
            }
            self.release(tables);
        }
        let curves = attention.into_iter().map(|(threads, points)| {
            let bytes_per_s = Curve::try_from(points)
                .map_err(|cause| CalibrateError::Curve { what: "attention on the CPU", cause })?;
            Ok(ThreadCurve { threads, bytes_per_s })
        });
        Ok((curves.collect::<Result<_, CalibrateError>>()?, task_seconds))
    }

    /// Seconds in which new keys and values are stored, over rows of as many sequences.
    pub fn store(&mut self, request: &Request<'_>, all: usize) -> Result<Curve, CalibrateError> {
        let threads = &pool(all)?;
        let tables = self.sequences(64, threads)?;
        let layout = self.cache.layout();
        let row = layout.new_row(&vec![f16::from_f32(0.5); layout.row_elements()]);
        let mut points = Vec::new();
        for rows in grid(1.0, 8.0, tables.len().min(2048) as f64) {
            let n_rows = rows as usize;
            let data = row.repeat(n_rows);
            let cache = &mut self.cache;
            let places: Vec<RowPlace<'_>> =
                tables[..n_rows].iter().map(|table| RowPlace { table, position: 40 }).collect();
            let stored = steady(request.point(), |n| {
                (0..n).for_each(|_| cache.write_rows(0, &places, &data, threads));
                Ok::<(), std::convert::Infallible>(())
            });
            match stored {
                Ok(seconds) => points.push((rows, seconds)),
                Err(never) => match never {},
            }
        }
        self.release(tables);
        Curve::rising(points).map_err(|cause| CalibrateError::Curve { what: "storing keys and values", cause })
    }

    /// How attention with `threads` threads and pages slow each other down, in turns with either alone: what else the machine does comes
    /// and goes. Other factors are left as they are.
    pub fn beside(
        &mut self,
        request: &Request<'_>,
        threads: usize,
        copies: &Copies,
        others: Contention,
    ) -> Result<Contention, CalibrateError> {
        let threads = pool(threads)?;
        let tables = self.sequences(CONTENTION_TOKENS, &threads)?;
        let most = request.point().max(Duration::from_millis(100));
        let bytes = (tables.len() * CONTENTION_TOKENS * self.cache.layout().bytes_per_token()) as f64;
        let mut rounds = Vec::new();
        for _ in 0..BESIDE_ROUNDS {
            let alone = self.attend(&tables, CONTENTION_TOKENS, &threads, most);
            let page = copies.page_seconds();
            let (beside, page_beside) =
                copies.beside(|| Ok(self.attend(&tables, CONTENTION_TOKENS, &threads, most)))?;
            let pages = page_beside.map_or(1.0, |beside| (beside / page).max(1.0));
            rounds.push([(beside / alone).max(1.0), pages, bytes / alone, copies.page_bytes() / page]);
        }
        self.release(tables);
        let median = |of: usize| {
            let mut values: Vec<f64> = rounds.iter().map(|round| round[of]).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Ok(Contention {
            attention_beside_pages: median(0),
            pages_beside_attention: median(1),
            attention_bytes_per_s: median(2),
            page_bytes_per_s: median(3),
            ..others
        })
    }
}

/// A pool for each number of threads that is tried.
fn pools(all: usize) -> Result<Vec<(usize, rayon::ThreadPool)>, CalibrateError> {
    thread_grid(all).into_iter().map(|n| Ok((n, pool(n)?))).collect()
}

/// Bytes that plain loads read per second, over threads.
pub fn reads(request: &Request<'_>, all: usize) -> Result<Curve, CalibrateError> {
    let pools = pools(all)?;
    let most: u64 = if request.software() { 64 << 20 } else { 2 << 30 };
    let words = vec![1u64; (most.min(request.host_bytes / 8) / 8) as usize];
    let mut points = Vec::new();
    for (threads, pool) in &pools {
        let part = &words[..(words.len() * threads).div_ceil(pools.last().map_or(1, |last| last.0))];
        let portion = part.len().div_ceil(8 * threads).max(1);
        let read = steady(request.point(), |n| {
            for _ in 0..n {
                let sum: u64 = pool.install(|| {
                    part.par_chunks(portion)
                        .map(|words| words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)))
                        .sum()
                });
                std::hint::black_box(sum);
            }
            Ok::<(), std::convert::Infallible>(())
        });
        match read {
            Ok(seconds) => points.push((*threads as f64, 8.0 * part.len() as f64 / seconds)),
            Err(never) => match never {},
        }
    }
    Curve::try_from(points).map_err(|cause| CalibrateError::Curve { what: "reads", cause })
}

/// Time in which a pass's schedule is built and checked, over its tasks.
pub fn schedules(request: &Request<'_>) -> Host {
    let rows =
        MicroBatchShape { gpu_attention: false, cpu_attention: true, kv_to_device: false, sampled: true, workspace: 0 };
    let mut points = Vec::new();
    for micro_batches in [1, 4, 16] {
        let shape = PassShape {
            layers: 32,
            micro_batches: vec![rows; micro_batches],
            groups: (0..micro_batches).map(|one| one..one + 1).collect(),
            chunks: vec![ChunkShape { pages: (0..8).map(|page| page..page + 1).collect() }],
            kept: SpreadLayers::default(),
            kept_pages: 0,
            streamed: 8,
            ring: 16,
            loaded_pages: 0,
            load_ahead: true,
            rows: RowPath::Kernels,
            relay: false,
        };
        let tasks = build(ScheduleKind::Grouped, &shape).tasks.len();
        let checked = steady(request.point(), |n| {
            (0..n).try_for_each(|_| check(&build(ScheduleKind::Grouped, &shape), &shape).map(|_| ()))
        });
        points.push((tasks as f64, checked.expect("the builder's schedules are sound")));
    }
    let schedule = Curve::rising(points).expect("more micro-batches have more tasks");
    Host { schedule, task_seconds: hand_over(request) }
}

/// Time in which one thread tells another, by a lock and a condition, that a task has been started.
fn hand_over(request: &Request<'_>) -> f64 {
    use std::sync::{Condvar, Mutex};
    let (turn, changed) = (Mutex::new(0u64), Condvar::new());
    let wait_for = |mine: u64| {
        let mut turn = turn.lock().expect("nobody panics");
        while *turn != mine {
            turn = changed.wait(turn).expect("nobody panics");
        }
        *turn += 1;
        changed.notify_all();
    };
    let mut first = 0;
    let told = steady(request.point(), |n| {
        let begin = first;
        first += 2 * n as u64;
        std::thread::scope(|scope| {
            scope.spawn(|| (0..n as u64).for_each(|i| wait_for(begin + 2 * i + 1)));
            (0..n as u64).for_each(|i| wait_for(begin + 2 * i));
        });
        Ok::<(), std::convert::Infallible>(())
    });
    match told {
        Ok(seconds) => seconds / 2.0,
        Err(never) => match never {},
    }
}
