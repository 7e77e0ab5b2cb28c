use fulmen::gpu::{GpuError, Recorder};
use fulmen::kernels::decode_attention::{Parts, SPLIT_TOKENS, Scratch, parts_of, record, scratch_bytes};
use fulmen::kernels::paged_attention::{Bindings, Row, Shape};
use libtest_mimic::Trial;

use super::attention::{self, Attention};
use crate::common::{poisoned, upload};

const DECODE: Attention = Attention {
    name: "decode_attention",
    record: |recorder, shape, rows, bindings| in_batches(recorder, shape, rows, bindings, 100),
    fits: |_| true,
    odd_width: 34,
    tolerance: attention::f32_tolerance,
};

/// Around blocks and parts.
const CONTEXTS: [usize; 9] = [1, 31, 32, 33, 97, 255, 256, 257, 600];

fn in_batches(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    rows: &[Row],
    bindings: Bindings<'_>,
    most_parts: usize,
) -> Result<(), GpuError> {
    let parts = Parts::new(rows, shape.window, most_parts);
    let [states, sums] =
        scratch_bytes(shape.q_heads as usize, shape.head_width as usize).map(|n| poisoned(most_parts * n as usize / 4));
    let (list, wholes) = (upload(&parts.parts), upload(&parts.wholes));
    let scratch = Scratch { states: states.whole(), sums: sums.whole() };
    record(recorder, shape, &parts.batches, [list.whole(), wholes.whole()], scratch, bindings)
}

/// The greatest number of parts that a test's rows have.
fn most_parts() -> usize {
    parts_of(600)
}

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn()| {
        Trial::test(format!("decode_attention::{name}"), move || {
            test();
            Ok(())
        })
    };
    vec![
        trial("matches_reference", || attention::matches_reference(DECODE, &CONTEXTS, 1)),
        trial("a_row_alone_has_the_bits_it_has_among_others", || attention::rows_are_independent(DECODE)),
        trial("other_rows_stay_untouched", || attention::other_rows_stay_untouched(DECODE)),
        trial("nan_reaches_those_who_see_it_and_nobody_else", || attention::nan_propagates(DECODE)),
        // Scratch that one row fills: every row is a batch of its own, over what the one before it left.
        trial("small_batches_match_reference", || {
            let record = |recorder: &mut Recorder<'_>, shape: &Shape, rows: &[Row], bindings: Bindings<'_>| {
                in_batches(recorder, shape, rows, bindings, most_parts())
            };
            attention::matches_reference(Attention { record, ..DECODE }, &CONTEXTS, 1);
        }),
        trial("parts_cover_what_is_visible_and_batches_fit", || {
            let rows: Vec<Row> =
                [0, 255, 256, 599, 5000].map(|position| Row { row: position, position, first_block: position }).into();
            for window in [0, 1, 128, 300] {
                let all = Parts::new(&rows, window, 24);
                let mut batched = Vec::new();
                for batch in &all.batches {
                    assert!(batch.n_parts <= 24, "{batch:?}");
                    for whole in &all.wholes[batch.first_row as usize..][..batch.n_rows as usize] {
                        let first = (batch.first_part + whole.first_part) as usize;
                        batched.push((whole.row, &all.parts[first..][..whole.n_parts as usize]));
                    }
                }
                assert_eq!(batched.len(), rows.len(), "window {window}");
                for (row, (whole, parts)) in rows.iter().zip(batched) {
                    assert_eq!(whole, row.row);
                    assert!(parts.iter().all(|part| part.row == row.row && part.position == row.position));
                    let numbers: Vec<u32> = parts.iter().map(|part| part.number).collect();
                    let begin = if window == 0 { 0 } else { (row.position + 1).saturating_sub(window) };
                    let want: Vec<u32> = (begin / SPLIT_TOKENS..=row.position / SPLIT_TOKENS).collect();
                    assert_eq!(numbers, want, "position {}, window {window}", row.position);
                }
            }
        }),
    ]
}
