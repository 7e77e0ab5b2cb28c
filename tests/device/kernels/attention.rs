//! What the kernels of paged attention are held to: sequences in shuffled blocks, everything else poisoned.

use fulmen::gpu::{GpuError, Recorder};
use fulmen::kernels::BLOCK_TOKENS;
use fulmen::kernels::paged_attention::{Bindings, Row, Shape};
use fulmen::model::AttentionShape;
use fulmen::reference::paged_attention::{PagedRow, paged_attention};
use half::f16;

use crate::common::{Random, assert_close, assert_untouched, download, poisoned, run, upload};

/// Entry of a block table that must not be followed.
const NO_BLOCK: u32 = u32::MAX;

/// A way to attend rows.
#[derive(Clone, Copy)]
pub struct Attention {
    pub name: &'static str,
    /// Makes its lists of the rows, uploads them, and records.
    pub record: fn(&mut Recorder<'_>, &Shape, &[Row], Bindings<'_>) -> Result<(), GpuError>,
    /// It can do this shape.
    pub fits: fn(&Shape) -> bool,
    /// A head width that is no power of two.
    pub odd_width: usize,
    /// How far an output may be from the reference, by head width.
    pub tolerance: fn(f32) -> f32,
}

/// Heads and window.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_width: usize,
    /// 0: none.
    pub window: usize,
}

impl Heads {
    /// As the kernels see it, over rows of queries, keys and values.
    fn kernel_shape(self, has_sinks: bool) -> Shape {
        let Heads { q_heads, kv_heads, head_width, window } = self;
        Shape {
            q_heads: q_heads as u32,
            kv_heads: kv_heads as u32,
            head_width: head_width as u32,
            q_stride: ((q_heads + 2 * kv_heads) * head_width) as u32,
            window: window as u32,
            scale: self.shape().scale,
            has_sinks,
        }
    }

    fn shape(self) -> AttentionShape {
        let Heads { q_heads, kv_heads, head_width, window } = self;
        let scale = 1.0 / (head_width as f32).sqrt();
        AttentionShape { q_heads, kv_heads, head_width, window: (window != 0).then_some(window), scale }
    }
}

/// Sequences whose KV lies in shuffled blocks. Slots past a sequence's end and blocks that nobody owns hold NaN; blocks that
/// no row needs, as they lie before the window, are in no table.
pub struct Sequences {
    heads: Heads,
    /// `[H]`
    sinks: Option<Vec<f32>>,
    /// On `q · k`, beside the usual factor.
    scale: f32,
    /// Per sequence, its context and the first entry of its table.
    tables: Vec<(usize, u32)>,
    block_table: Vec<u32>,
    kv_blocks: Vec<f16>,
}

impl Sequences {
    /// `rows` is how many of each sequence's last tokens will be attended: what only tokens before them see is left out.
    pub fn new(random: &mut Random, heads: Heads, contexts: &[usize], rows: usize) -> Self {
        let n_needed: usize = contexts.iter().map(|context| context.div_ceil(BLOCK_TOKENS)).sum();
        let mut free: Vec<u32> = (0..n_needed as u32 + 3).collect();
        let block_values = heads.kv_heads * 2 * BLOCK_TOKENS * heads.head_width;
        let mut kv_blocks = vec![f16::NAN; free.len() * block_values];
        let (mut tables, mut block_table) = (Vec::new(), Vec::new());
        for context in contexts {
            // A table starts anywhere.
            block_table.push(NO_BLOCK);
            tables.push((*context, block_table.len() as u32));
            let unseen = match heads.window {
                0 => 0,
                window => context.saturating_sub(rows - 1 + window),
            };
            for first_token in (0..*context).step_by(BLOCK_TOKENS) {
                if first_token + BLOCK_TOKENS <= unseen {
                    block_table.push(NO_BLOCK);
                    continue;
                }
                let block = free.swap_remove(random.below(free.len()));
                block_table.push(block);
                for lane in 0..heads.kv_heads * 2 {
                    for token in unseen.saturating_sub(first_token)..BLOCK_TOKENS.min(context - first_token) {
                        let line = block as usize * block_values + (lane * BLOCK_TOKENS + token) * heads.head_width;
                        kv_blocks[line..][..heads.head_width].fill_with(|| f16::from_f32(random.unit()));
                    }
                }
            }
        }
        block_table.push(NO_BLOCK);
        Self { heads, sinks: None, scale: 1.0, tables, block_table, kv_blocks }
    }

    /// The last `n` tokens of every sequence, as rows of qkv in order.
    pub fn last_rows(&self, n: usize) -> Vec<Row> {
        let rows = self.tables.iter().flat_map(|(context, first_block)| {
            (context - n.min(*context)..*context).map(|position| (position as u32, *first_block))
        });
        (0..).zip(rows).map(|(row, (position, first_block))| Row { row, position, first_block }).collect()
    }

    /// `[T, q_stride]`: query heads, and NaN where K and V of the rows would be.
    pub fn qkv(&self, random: &mut Random, n_rows: usize) -> (Vec<f32>, usize) {
        let Heads { q_heads, kv_heads, head_width, .. } = self.heads;
        let q_stride = (q_heads + 2 * kv_heads) * head_width;
        let mut qkv = vec![f32::NAN; n_rows * q_stride];
        for row in qkv.chunks_exact_mut(q_stride) {
            // Twice the size of trained ones, so that the weights of tokens differ much.
            row[..q_heads * head_width].fill_with(|| 4.0 * random.unit());
        }
        (qkv, q_stride)
    }

    /// `[T, H, K]` as words, of a dispatch over `rows`; `n_rows` is T. The rest stays poisoned.
    pub fn attend(&self, attention: Attention, qkv: &[f32], rows: &[Row], n_rows: usize) -> Vec<u32> {
        let Heads { q_heads, head_width, .. } = self.heads;
        let n_out = n_rows * q_heads * head_width;
        let shape = self.heads.kernel_shape(self.sinks.is_some());
        let shape = Shape { scale: self.scale * shape.scale, ..shape };
        let (qkv, block_table) = (upload(qkv), upload(&self.block_table));
        let (kv_blocks, out) = (upload(&self.kv_blocks), poisoned(n_out + 70));
        let sinks = upload(self.sinks.as_deref().unwrap_or(&[f32::NAN]));
        let bindings = Bindings {
            qkv: qkv.whole(),
            block_table: block_table.whole(),
            kv_blocks: kv_blocks.whole(),
            out: out.whole(),
            sinks: sinks.whole(),
        };
        run(|recorder| (attention.record)(recorder, &shape, rows, bindings));
        let mut words: Vec<u32> = download(out.whole());
        (n_out..words.len()).for_each(|i| assert_untouched(attention.name, &words, i));
        words.truncate(n_out);
        words
    }

    fn reference(&self, (qkv, q_stride): (&[f32], usize), rows: &[Row]) -> Vec<f32> {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| PagedRow {
                q: &qkv[row.row as usize * q_stride..][..self.heads.q_heads * self.heads.head_width],
                position: row.position as usize,
                blocks: &self.block_table[row.first_block as usize..],
            })
            .collect();
        let shape = self.heads.shape();
        let shape = AttentionShape { scale: self.scale * shape.scale, ..shape };
        paged_attention(&shape, self.sinks.as_deref(), &rows, &self.kv_blocks, BLOCK_TOKENS)
    }
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|word| f32::from_bits(*word)).collect()
}

/// Around blocks, one token, several blocks.
pub const CONTEXTS: [usize; 7] = [1, 31, 32, 33, 64, 97, 257];

/// H, G and K: groups of one to 33 query heads, widths of one pair, of no power of two, of one stage and of several.
const HEADS: [(usize, usize, usize); 12] = [
    (1, 1, 2),
    (4, 4, 10),
    (6, 2, 32),
    (8, 2, 32),
    (5, 1, 66),
    (9, 1, 10),
    (33, 1, 4),
    (6, 2, 24),
    (9, 3, 64),
    (4, 1, 128),
    (12, 2, 128),
    (2, 1, 256),
];

pub const WINDOWS: [usize; 4] = [0, 1, 24, 33];

/// The last `n` tokens of every context with all heads and windows, against the reference.
pub fn matches_reference(attention: Attention, contexts: &[usize], n: usize) {
    let mut tried = 0;
    for (q_heads, kv_heads, head_width) in HEADS {
        for window in WINDOWS {
            let heads = Heads { q_heads, kv_heads, head_width, window };
            let mut random = Random::new((q_heads * 1000 + head_width * 10 + window) as u64);
            let mut sequences = Sequences::new(&mut random, heads, contexts, n);
            if (q_heads + window).is_multiple_of(2) {
                // From far below all scores to above most of them.
                sequences.sinks = Some((0..q_heads).map(|head| [-30.0, 0.5, 3.0, 12.0][head % 4]).collect());
            }
            if !(attention.fits)(&heads.kernel_shape(sequences.sinks.is_some())) {
                continue;
            }
            tried += 1;
            let rows = sequences.last_rows(n);
            let (qkv, q_stride) = sequences.qkv(&mut random, rows.len());
            let want = sequences.reference((&qkv, q_stride), &rows);
            let with = if sequences.sinks.is_some() { "with sinks" } else { "without sinks" };
            let what = format!("{} {heads:?} {with}", attention.name);
            let got = sequences.attend(attention, &qkv, &rows, rows.len());
            let allowed = (attention.tolerance)(head_width as f32);
            assert_close(&what, &floats(&got), &want, |_| allowed);
        }
    }
    assert!(tried >= 16, "{}: {tried} shapes fit", attention.name);
}

/// Of kernels whose products and sums are f32. Terms of q · k are of size 1, so a score is good to K * 2^-24 * K / sqrt(K), and exp to some
/// 20 * 2^-24: the weights are that much off in both the sum and the total; and sums of up to 600 tokens, of values below 1.
pub fn f32_tolerance(head_width: f32) -> f32 {
    (2.0 * head_width.powf(1.5) + 600.0) * 2f32.powi(-24)
}

/// Each row alone, and at other rows of qkv and out, has the bits it has among others.
pub fn rows_are_independent(attention: Attention) {
    for window in WINDOWS {
        let heads = Heads { q_heads: 6, kv_heads: 2, head_width: attention.odd_width, window };
        let mut random = Random::new(61);
        let mut sequences = Sequences::new(&mut random, heads, &CONTEXTS, 2);
        sequences.sinks = (window != 0).then(|| random.values(heads.q_heads));
        let rows = sequences.last_rows(2);
        let (qkv, q_stride) = sequences.qkv(&mut random, rows.len());
        let together = sequences.attend(attention, &qkv, &rows, rows.len());
        let width = heads.q_heads * heads.head_width;
        for row in &rows {
            let own = &qkv[row.row as usize * q_stride..][..q_stride];
            let alone = sequences.attend(attention, own, &[Row { row: 0, ..*row }], 1);
            assert_eq!(alone, together[row.row as usize * width..][..width], "{row:?}, window {window}");
        }
    }
}

/// Only the rows that are asked for are written.
pub fn other_rows_stay_untouched(attention: Attention) {
    let heads = Heads { q_heads: 4, kv_heads: 2, head_width: attention.odd_width, window: 0 };
    let width = heads.q_heads * heads.head_width;
    let mut random = Random::new(62);
    let sequences = Sequences::new(&mut random, heads, &CONTEXTS, 1);
    let rows = sequences.last_rows(1);
    let (qkv, _) = sequences.qkv(&mut random, rows.len());
    let all = sequences.attend(attention, &qkv, &rows, rows.len());
    for asked in [&rows[..0], &rows[2..3], &[rows[5], rows[1]]] {
        let got = sequences.attend(attention, &qkv, asked, rows.len());
        for i in 0..got.len() {
            if asked.iter().any(|row| row.row as usize == i / width) {
                assert_eq!(got[i], all[i], "element {i}");
            } else {
                assert_untouched(attention.name, &got, i);
            }
        }
    }
}

/// A NaN in a visible K or V of one KV head, or in a query, reaches exactly the heads and rows that see it.
pub fn nan_propagates(attention: Attention) {
    let k = attention.odd_width;
    let heads = Heads { q_heads: 6, kv_heads: 2, head_width: k, window: 40 };
    for poisoned_token in [20, 56, 57, 95, 96] {
        for which in 0..2 {
            let mut random = Random::new(63);
            let mut sequences = Sequences::new(&mut random, heads, &[97, 97], 60);
            let rows = sequences.last_rows(60);
            let (qkv, _) = sequences.qkv(&mut random, rows.len());
            let clean = sequences.attend(attention, &qkv, &rows, rows.len());
            // KV head 1 of the second sequence.
            let table = sequences.tables[1].1 as usize;
            let block = sequences.block_table[table + poisoned_token / BLOCK_TOKENS] as usize;
            let line = ((block * 2 + 1) * 2 + which) * BLOCK_TOKENS + poisoned_token % BLOCK_TOKENS;
            sequences.kv_blocks[line * k + 3] = f16::NAN;
            let got = sequences.attend(attention, &qkv, &rows, rows.len());
            for i in 0..got.len() {
                let (row, head, j) = (&rows[i / (6 * k)], i % (6 * k) / k, i % k);
                let sees = row.first_block as usize == table
                    && (poisoned_token..poisoned_token + 40).contains(&(row.position as usize))
                    && head >= 3
                    && (which == 0 || j == 3);
                if sees {
                    assert!(f32::from_bits(got[i]).is_nan(), "token {poisoned_token}: element {i} is not NaN");
                } else {
                    assert_eq!(got[i], clean[i], "token {poisoned_token}: element {i}");
                }
            }
        }
    }
}

/// All rows of a prompt attended in chunks of `chunk` rows, each chunk with its own rows of qkv and out.
pub fn in_chunks(attention: Attention, heads: Heads, context: usize, chunk: usize) -> Vec<u32> {
    let mut random = Random::new(64);
    let sequences = Sequences::new(&mut random, heads, &[context], context);
    let rows = sequences.last_rows(context);
    let (qkv, q_stride) = sequences.qkv(&mut random, context);
    let chunks = rows.chunks(chunk).zip(qkv.chunks(chunk * q_stride)).flat_map(|(rows, qkv)| {
        let rows: Vec<Row> = (0..).zip(rows).map(|(t, row)| Row { row: t, ..*row }).collect();
        sequences.attend(attention, qkv, &rows, rows.len())
    });
    chunks.collect()
}

/// A prompt attended in chunks of any length has the bits of the whole.
pub fn cuts_change_nothing(attention: Attention) {
    for window in WINDOWS {
        let heads = Heads { q_heads: 4, kv_heads: 2, head_width: attention.odd_width, window };
        let whole = in_chunks(attention, heads, 101, 101);
        for chunk in [1, 7, 31, 32, 33, 64, 100] {
            assert_eq!(in_chunks(attention, heads, 101, chunk), whole, "chunks of {chunk}, window {window}");
        }
    }
}

/// Queries far beyond f16's range, and far below it, with a factor that brings their scores back to the usual size.
pub fn sizes_match_reference(attention: Attention) {
    for size in [1e6f32, 1e-6] {
        let heads = Heads { q_heads: 4, kv_heads: 2, head_width: 32, window: 0 };
        let mut random = Random::new(65);
        let mut sequences = Sequences::new(&mut random, heads, &CONTEXTS, 3);
        sequences.scale = 1.0 / size;
        let rows = sequences.last_rows(3);
        let (mut qkv, q_stride) = sequences.qkv(&mut random, rows.len());
        qkv.iter_mut().for_each(|q| *q *= size);
        let want = sequences.reference((&qkv, q_stride), &rows);
        let got = sequences.attend(attention, &qkv, &rows, rows.len());
        let allowed = (attention.tolerance)(heads.head_width as f32);
        assert_close(&format!("{}, queries of size {size}", attention.name), &floats(&got), &want, |_| allowed);
    }
}
