//! Every instruction set of this machine against `reference::attention`.
//!
//! A [`Case`] puts sequences into a cache in which everything that a row must not read is NaN: slots past its context,
//! blocks of nobody, outputs before the call.

use fulmen::cpu::attention::{DecodeRow, SPAN_TOKENS, attend};
use fulmen::cpu::isa::Isa;
use fulmen::memory::kv_cache::{BLOCK_TOKENS, BlockTable, KvCache, KvLayout, RowPlace};
use fulmen::model::AttentionShape;
use fulmen::policy::KvDtype;
use fulmen::reference;
use half::f16;

use crate::common::{Random, threads};

const LAYERS: usize = 2;
const LAYER: usize = 1;

fn shape(q_heads: usize, kv_heads: usize, head_width: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape { q_heads, kv_heads, head_width, window, scale: (head_width as f32).powf(-0.5) }
}

struct Sequence {
    context: usize,
    table: BlockTable,
    q: Vec<f32>,
    /// `[C, G, K]`, as the cache holds them.
    keys: Vec<f32>,
    values: Vec<f32>,
}

struct Case {
    shape: AttentionShape,
    /// `[H]`
    sinks: Option<Vec<f32>>,
    cache: KvCache,
    sequences: Vec<Sequence>,
}

impl Case {
    fn new(shape: AttentionShape, contexts: &[usize], seed: u64) -> Self {
        Self::with_dtype(shape, contexts, seed, KvDtype::F16)
    }

    fn with_dtype(shape: AttentionShape, contexts: &[usize], seed: u64, dtype: KvDtype) -> Self {
        let AttentionShape { kv_heads, head_width, .. } = shape;
        let mut random = Random::new(seed);
        let layout = KvLayout { layers: LAYERS, kv_heads, head_width, dtype };
        let n_blocks = contexts.iter().map(|&context| KvLayout::blocks_for(context)).sum::<usize>() + 3;
        let mut cache = KvCache::new(layout, n_blocks).unwrap();
        poison(&mut cache);

        let mut sequences: Vec<Sequence> = contexts
            .iter()
            .map(|&context| Sequence {
                context,
                table: BlockTable::new(),
                q: random.f32s(shape.q_heads * head_width),
                keys: Vec::new(),
                values: Vec::new(),
            })
            .collect();
        // Sequences grow in turns, so that their blocks lie apart from each other and out of order.
        for position in 0..contexts.iter().copied().max().unwrap_or(0) {
            for sequence in &mut sequences {
                if position < sequence.context {
                    cache.reserve(&mut sequence.table, position + 1).unwrap();
                    let row = random.f16s(layout.row_elements());
                    cache.write_row(LAYER, &sequence.table, position, &row);
                    let row = cache.row(LAYER, &sequence.table, position);
                    for head in row.chunks_exact(2 * head_width) {
                        let (key, value) = head.split_at(head_width);
                        sequence.keys.extend(key.iter().map(|x| x.to_f32()));
                        sequence.values.extend(value.iter().map(|x| x.to_f32()));
                    }
                }
            }
        }
        Self { shape, sinks: None, cache, sequences }
    }

    /// Attends the sequences `which`, in that order.
    fn attend(&self, isa: Isa, n_threads: usize, which: &[usize]) -> Vec<Vec<f32>> {
        let width = self.shape.q_heads * self.shape.head_width;
        let mut outputs = vec![vec![f32::NAN; width]; which.len()];
        let mut rows: Vec<DecodeRow> = which
            .iter()
            .map(|&i| &self.sequences[i])
            .zip(&mut outputs)
            .map(|(Sequence { q, context, table, .. }, out)| DecodeRow { q, out, context: *context, table })
            .collect();
        attend(isa, &self.cache, LAYER, &self.shape, self.sinks.as_deref(), &mut rows, &threads(n_threads));
        outputs
    }

    fn reference(&self, sequence: usize) -> Vec<f32> {
        let Sequence { q, keys, values, .. } = &self.sequences[sequence];
        reference::attention::attention(&self.shape, self.sinks.as_deref(), q, keys, values)
    }

    fn check(&self, isa: Isa) {
        let all: Vec<usize> = (0..self.sequences.len()).collect();
        for (i, ours) in self.attend(isa, 2, &all).iter().enumerate() {
            let worst = largest_difference(ours, &self.reference(i));
            let context = self.sequences[i].context;
            let tolerance = match self.cache.layout().dtype {
                KvDtype::F16 => TOLERANCE,
                KvDtype::Int8 => INT8_TOLERANCE,
            };
            assert!(worst <= tolerance, "{isa}, {:?}, context {context}: off by {worst:e}", self.shape);
        }
    }
}

/// Both sides read the same f16 K and V, so only f32 arithmetic differs. With |q|, |k|, |v| <= 1 and scale = K^-1/2:
/// * a score is a sum of K / lanes products per lane and log2(lanes) more, of sqrt(K) / 4 in magnitudes on average: for
///   K = 128 and 4 lanes, 34 roundings of at most 2.8 · 2^-24, and they mostly cancel: about 1e-6. The weight takes it as
///   a relative error; exp adds some ulp.
/// * a weighted mean of values of at most 1 takes the mean of these errors over its tokens, which cancel again.
const TOLERANCE: f32 = 2e-6;

/// Over 8-bit rows, queries and weights are rounded to 16 bits, by 2^-16 of the largest of a head or block, at most. Each
/// element of a query takes a score with it by K^-1/2 2^-16 |k|, so together by sqrt(K) 2^-16 |k| if all had one sign, and by 2^-16 / 3
/// as they mostly cancel; weights by as much once more. A hundredth of what 8 bits of K and V have cost.
const INT8_TOLERANCE: f32 = 4e-5;

/// NaN on one side only is infinitely far.
fn largest_difference(ours: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(ours.len(), expected.len());
    let difference = |(a, b): (&f32, &f32)| match (a.is_nan(), b.is_nan()) {
        (true, true) => 0.0,
        (false, false) => (a - b).abs(),
        _ => f32::INFINITY,
    };
    ours.iter().zip(expected).map(difference).fold(0.0, f32::max)
}

/// Fills every slot of every block with NaN, through the front door.
fn poison(cache: &mut KvCache) {
    let mut table = BlockTable::new();
    let tokens = cache.total_blocks() * BLOCK_TOKENS;
    cache.reserve(&mut table, tokens).unwrap();
    let rows: Vec<RowPlace> = (0..tokens).map(|position| RowPlace { table: &table, position }).collect();
    let row = cache.layout().new_row(&vec![f16::NAN; cache.layout().row_elements()]);
    let data = row.repeat(tokens);
    for layer in 0..LAYERS {
        cache.write_rows(layer, &rows, &data, &threads(1));
    }
    cache.release(table);
}

#[test]
fn agrees_with_the_reference_at_every_context_around_blocks() {
    let contexts: Vec<usize> = (1..=3 * BLOCK_TOKENS + 1).chain([127, 211, 257]).collect();
    for isa in Isa::available() {
        Case::new(shape(4, 2, 32, None), &contexts, 1).check(isa);
    }
}

/// One span, one and a token, several; some begin inside one.
#[test]
fn agrees_with_the_reference_over_spans() {
    let contexts = [SPAN_TOKENS - 1, SPAN_TOKENS, SPAN_TOKENS + 1, 3 * SPAN_TOKENS - 5, 3 * SPAN_TOKENS + 40];
    for isa in Isa::available() {
        for dtype in KvDtype::ALL {
            for window in [None, Some(30), Some(SPAN_TOKENS + 9)] {
                let mut case = Case::with_dtype(shape(3, 1, 16, window), &contexts, 41, dtype);
                case.check(isa);
                case.sinks = Some(vec![0.5, -0.5, 3.0]);
                case.check(isa);
            }
        }
    }
}

/// 8-bit rows: against the reference over what the cache holds, every width and tile; and how far that is from f16 rows.
#[test]
fn integers_agree_with_the_reference_over_what_the_cache_holds() {
    let contexts = [1, 2, 31, 32, 33, 47, 64, 65, 101];
    for isa in Isa::available() {
        for head_width in [2, 10, 32, 64, 80, 128] {
            for heads_per_group in [1, 2, 3, 4, 7, 8, 11] {
                let shape = shape(2 * heads_per_group, 2, head_width, None);
                let seed = (head_width * 100 + heads_per_group) as u64;
                let case = Case::with_dtype(shape, &contexts, seed, KvDtype::Int8);
                case.check(isa);
                // Elements are at most 1, so off by 9/16 · 1/127 = 0.0044 at most, and values by as much; scores by
                // sqrt(K) 0.0044 |q| / 2 in the mean if all errors had one sign, which takes weights by that relative error.
                let of_f16 = Case::new(shape, &contexts, seed);
                for (i, context) in contexts.iter().enumerate() {
                    let [ours, theirs] = [&case, &of_f16].map(|case| case.attend(isa, 1, &[i]).remove(0));
                    let off = largest_difference(&ours, &theirs);
                    let allowed = 0.0045 + 0.0045 * (head_width as f32).sqrt();
                    assert!(off > 0.0 && off < allowed, "{isa}, K {head_width}, context {context}: off by {off}");
                }
            }
        }
    }
}

/// The largest integers throughout: their sums fit 32 bits at any width.
#[test]
fn integers_of_the_widest_heads_do_not_overflow() {
    for isa in Isa::available() {
        for head_width in [512, 1024] {
            let mut case = Case::with_dtype(shape(4, 1, head_width, None), &[33], 1, KvDtype::Int8);
            let Sequence { table, q, keys, values, .. } = &mut case.sequences[0];
            q.fill(1.0);
            // 127 of the scale.
            let largest = f16::from_f32(127.0 / 128.0);
            keys.fill(largest.to_f32());
            values.fill(largest.to_f32());
            for position in 0..33 {
                case.cache.write_row(LAYER, table, position, &vec![largest; 2 * head_width]);
            }
            case.check(isa);
            // A score that wrapped around would be negative, and this sink above it.
            case.sinks = Some(vec![0.0; 4]);
            case.check(isa);
        }
    }
}

/// Widths below, at and off the registers of every level; head counts that need every form of tile.
#[test]
fn agrees_with_the_reference_for_every_width_and_grouping() {
    let contexts = [1, 2, 31, 32, 33, 47, 64, 65, 101];
    for isa in Isa::available() {
        for head_width in [2, 10, 32, 64, 80, 128] {
            for heads_per_group in [1, 2, 3, 4, 7, 8] {
                let seed = (head_width * 100 + heads_per_group) as u64;
                Case::new(shape(2 * heads_per_group, 2, head_width, None), &contexts, seed).check(isa);
            }
        }
    }
}

#[test]
fn a_window_hides_what_lies_before_it() {
    let contexts: Vec<usize> = (1..=5 * BLOCK_TOKENS + 1).collect();
    for (isa, dtype) in Isa::available().into_iter().flat_map(|isa| KvDtype::ALL.map(|dtype| (isa, dtype))) {
        for (window, head_width) in [(1, 10), (24, 64), (32, 10), (33, 64), (65, 64)] {
            let shape = shape(3, 1, head_width, Some(window));
            let mut case = Case::with_dtype(shape, &contexts, window as u64, dtype);
            // Not only without weight: not read.
            for Sequence { context, table, .. } in &case.sequences {
                for position in 0..shape.first_visible(*context) {
                    case.cache.write_row(LAYER, table, position, &vec![f16::NAN; 2 * head_width]);
                }
            }
            case.check(isa);
        }
    }
}

/// Sinks far below the scores, among them, and above: they take all of a row, or nothing. They belong to query heads.
#[test]
fn sinks_take_their_share_and_have_no_value() {
    let contexts = [1, 2, 31, 32, 33, 65, 101];
    for isa in Isa::available() {
        for (q_heads, kv_heads, window) in [(2, 2, None), (6, 2, Some(24)), (8, 1, None), (7, 1, Some(33))] {
            let mut case = Case::new(shape(q_heads, kv_heads, 10, window), &contexts, 31);
            let without = case.attend(isa, 1, &[3]);
            case.sinks = Some((0..q_heads).map(|head| [-40.0, 0.3, 2.5, 30.0][head % 4]).collect());
            case.check(isa);
            let with = case.attend(isa, 1, &[3]);
            let head = |rows: &[Vec<f32>], head: usize| rows[0][head * 10..][..10].to_vec();
            assert_eq!(head(&with, 0), head(&without, 0), "{isa}: a sink far below changes no bit");
            assert_ne!(head(&with, 1), head(&without, 1), "{isa}");
            // |score| is at most sqrt(10), so 101 tokens get at most 101 e^(3.2 - 30) of a row.
            if q_heads > 3 {
                assert!(head(&with, 3).iter().all(|x| x.abs() < 1e-9), "{isa}: {:?}", head(&with, 3));
            }
        }
    }
}

/// Scores up to some hundred: most weights are 0, the largest score comes late or early, and sums are rescaled.
#[test]
fn large_scores_neither_overflow_nor_lose_the_largest() {
    for isa in Isa::available() {
        let mut case = Case::new(shape(4, 1, 64, None), &[1, 40, 200], 5);
        case.shape.scale = 40.0;
        for (i, ours) in case.attend(isa, 1, &[0, 1, 2]).iter().enumerate() {
            let worst = largest_difference(ours, &case.reference(i));
            // Scores reach 300: their rounding alone, 34 · 300 · 2^-24 at worst, is a relative error of the weights.
            assert!(worst <= 6e-4, "{isa}, row {i}: off by {worst:e}");
        }
    }
}

/// A row alone, among 17 others, in another order, on 1 and on 4 threads: the same bits.
#[test]
fn a_row_depends_on_nothing_but_itself() {
    let mut random = Random::new(11);
    let mut contexts: Vec<usize> = (0..18).map(|_| 1 + random.below(150)).collect();
    // Alone it is the work of all threads, among others of one.
    contexts[7] = 5 * SPAN_TOKENS + 77;
    let forward: Vec<usize> = (0..18).collect();
    let backward: Vec<usize> = (0..18).rev().collect();
    for (isa, dtype) in Isa::available().into_iter().flat_map(|isa| KvDtype::ALL.map(|dtype| (isa, dtype))) {
        for shape in [shape(8, 2, 80, None), shape(3, 1, 10, Some(33)), shape(1, 1, 64, Some(3 * SPAN_TOKENS))] {
            let case = Case::with_dtype(shape, &contexts, 12, dtype);
            let [one, three] = [1, 3].map(|n_threads| case.attend(isa, n_threads, &[7]).remove(0));
            assert_eq!(bits(&one), bits(&three), "{isa}, {dtype}: on 1 and on 3 threads");
            for n_threads in [1, 4] {
                let together = case.attend(isa, n_threads, &forward);
                let reversed = case.attend(isa, n_threads, &backward);
                for row in forward.iter().copied() {
                    let [alone] = &case.attend(isa, n_threads, &[row])[..] else { panic!("one row gives one output") };
                    assert_eq!(bits(alone), bits(&together[row]), "{isa}, row {row} among others, {n_threads} threads");
                    assert_eq!(bits(alone), bits(&reversed[17 - row]), "{isa}, row {row} in reverse order");
                }
            }
        }
    }
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|x| x.to_bits()).collect()
}

/// NaN and infinities come out where the reference has NaN, and nowhere else.
#[test]
fn what_is_not_a_number_reaches_the_output() {
    let context = 70;
    let shape = shape(6, 2, 10, None);
    let row_elements = 2 * 2 * 10;
    for (isa, dtype) in Isa::available().into_iter().flat_map(|isa| KvDtype::ALL.map(|dtype| (isa, dtype))) {
        for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
            // First and last token, both sides of a block boundary; K and V of the second head.
            for (position, element) in [0, 31, 32, 69].into_iter().flat_map(|p| [(p, 25), (p, 35)]) {
                let mut case = Case::with_dtype(shape, &[context], 21, dtype);
                let Sequence { table, keys, values, .. } = &mut case.sequences[0];
                let head = |half: &[f32], g: usize| half[(position * 2 + g) * 10..][..10].to_vec();
                let rows = [head(keys, 0), head(values, 0), head(keys, 1), head(values, 1)].concat();
                let mut row: Vec<f16> = rows.into_iter().map(f16::from_f32).collect();
                assert_eq!(row.len(), row_elements);
                row[element] = bad;
                case.cache.write_row(LAYER, table, position, &row);
                // The whole row of that head, where its scale is no number.
                let half = if element < 30 { keys } else { values };
                let half = &mut half[(position * 2 + 1) * 10..][..10];
                match dtype {
                    KvDtype::F16 => half[element % 10] = bad.to_f32(),
                    KvDtype::Int8 => half.fill(f32::NAN),
                }

                let [ours] = &case.attend(isa, 1, &[0])[..] else { panic!("one row gives one output") };
                let expected = case.reference(0);
                for (j, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
                    let same = ours.is_nan() == expected.is_nan() && ours.is_infinite() == expected.is_infinite();
                    assert!(same, "{isa}, {bad} at token {position}, element {element}: out[{j}] {ours} {expected}");
                }
                if bad.is_nan() {
                    assert!(ours.iter().any(|x| x.is_nan()), "{isa}: NaN at token {position} was swallowed");
                }
            }
        }
        let mut case = Case::with_dtype(shape, &[context], 22, dtype);
        case.sequences[0].q[10] = f32::NAN;
        let [ours] = &case.attend(isa, 1, &[0])[..] else { panic!("one row gives one output") };
        assert!(ours[10..20].iter().all(|x| x.is_nan()), "{isa}: NaN in the query of head 1");
        assert!(ours[..10].iter().chain(&ours[20..]).all(|x| x.is_finite()), "{isa}: NaN spread to other heads");
    }
}

#[test]
fn no_rows_are_no_work() {
    let case = Case::new(shape(2, 1, 2, None), &[1], 3);
    for isa in Isa::available() {
        assert!(case.attend(isa, 1, &[]).is_empty());
    }
}

#[test]
fn levels_are_found_by_name_and_others_refused_with_the_choice() {
    for isa in Isa::available() {
        assert_eq!(Isa::from_name(isa.name()).unwrap(), isa);
    }
    assert_eq!(Isa::available().last(), Some(&Isa::best()));
    let error = Isa::from_name("mmx").unwrap_err().to_string();
    assert!(error.contains("`mmx`") && error.contains("portable"), "{error}");
}
