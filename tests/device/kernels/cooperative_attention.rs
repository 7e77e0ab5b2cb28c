//! Prompt attention on cooperative matrices: held to what the portable kernel is held to, but that queries and weights are f16. Ignored
//! where the adapter has no such matrices.

use fulmen::gpu::{GpuError, Recorder};
use fulmen::kernels::cooperative::prompt_attention::{Cut, record};
use fulmen::kernels::paged_attention::{Bindings, Row, Shape};
use fulmen::kernels::prompt_attention::tiles;
use libtest_mimic::Trial;

use super::attention::{self, Attention, Heads, WINDOWS};
use crate::common::{has_matrices, if_cooperative, if_matrices, upload};

/// The cut that the shape takes; with emulated matrices one that a software driver has workgroup memory for.
fn own_cut(shape: &Shape) -> Cut {
    if has_matrices() { Cut::of(shape) } else { Cut { subgroups: 4, prefetch: true } }
}

const PROMPT: Attention = Attention {
    name: "cooperative/prompt_attention",
    record: |recorder, shape, rows, bindings| by(recorder, shape, own_cut(shape), None, rows, bindings),
    fits: |shape| own_cut(shape).fits(shape),
    // Not whole matrices either.
    odd_width: 24,
    // Queries of size 4 rounded to 11 bits put each term of a score off by up to 4 * 2^-12, one independent of the other: a score by some
    // 3 * 4 * 2^-12 * sqrt(K) / sqrt(K), all weights by as much; and weights are rounded to 11 bits. Values are below 1, and what is off
    // in the weights is off in the total too.
    tolerance: |_| 2.0 * (12.0 * 2f32.powi(-12) + 2f32.powi(-11)),
};

fn by(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    cut: Cut,
    most_tokens: Option<u32>,
    rows: &[Row],
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let tiles = tiles(rows, most_tokens.unwrap_or(cut.tile_tokens(shape)));
    record(recorder, shape, cut, (upload(&tiles).whole(), tiles.len()), bindings)
}

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn()| {
        Trial::test(format!("cooperative::prompt_attention::{name}"), move || {
            test();
            Ok(())
        })
    };
    // With emulated matrices these two take minutes.
    let mut trials = if_matrices(vec![
        trial("matches_reference", || attention::matches_reference(PROMPT, &attention::CONTEXTS, 35)),
        trial("no_cut_changes_a_bit", || {
            type Record = fn(&mut Recorder<'_>, &Shape, &[Row], Bindings<'_>) -> Result<(), GpuError>;
            let cuts: [(&str, Record); 5] = [
                ("tiles of 3 tokens", |r, shape, rows, bindings| by(r, shape, own_cut(shape), Some(3), rows, bindings)),
                ("1 subgroup", |r, shape, rows, bindings| {
                    by(r, shape, Cut { subgroups: 1, prefetch: true }, None, rows, bindings)
                }),
                ("2 subgroups, no prefetch", |r, shape, rows, bindings| {
                    by(r, shape, Cut { subgroups: 2, prefetch: false }, None, rows, bindings)
                }),
                ("4 subgroups, no prefetch", |r, shape, rows, bindings| {
                    by(r, shape, Cut { subgroups: 4, prefetch: false }, None, rows, bindings)
                }),
                ("8 subgroups", |r, shape, rows, bindings| {
                    by(r, shape, Cut { subgroups: 8, prefetch: true }, None, rows, bindings)
                }),
            ];
            for window in WINDOWS {
                let heads = Heads { q_heads: 4, kv_heads: 2, head_width: 64, window };
                let want = attention::in_chunks(PROMPT, heads, 101, 101);
                for (what, record) in cuts {
                    let got = attention::in_chunks(Attention { record, ..PROMPT }, heads, 101, 101);
                    assert_eq!(got, want, "{what}, window {window}");
                }
            }
        }),
    ]);
    trials.extend(if_cooperative(vec![
        trial("a_row_alone_has_the_bits_it_has_among_others", || attention::rows_are_independent(PROMPT)),
        trial("other_rows_stay_untouched", || attention::other_rows_stay_untouched(PROMPT)),
        trial("nan_reaches_those_who_see_it_and_nobody_else", || attention::nan_propagates(PROMPT)),
        trial("where_a_prompt_is_cut_changes_no_bit", || attention::cuts_change_nothing(PROMPT)),
        trial("queries_of_any_size_match_reference", || attention::sizes_match_reference(PROMPT)),
    ]));
    trials
}
