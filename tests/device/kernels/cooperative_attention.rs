//! Prompt attention on cooperative matrices: held to what the portable kernel is held to, but that queries and weights are f16. Ignored
//! where the adapter has no such matrices.

use fulmen::gpu::{GpuError, Recorder};
use fulmen::kernels::cooperative::prompt_attention::{fits, record, tile_tokens};
use fulmen::kernels::paged_attention::{Bindings, Row, Shape};
use fulmen::kernels::prompt_attention::tiles;
use libtest_mimic::Trial;

use super::attention::{self, Attention, Heads, WINDOWS};
use crate::common::{has_cooperative_matrices, upload};

const PROMPT: Attention = Attention {
    name: "cooperative/prompt_attention",
    record: |recorder, shape, rows, bindings| in_tiles(recorder, shape, rows, bindings, tile_tokens(shape)),
    fits,
    // Not whole matrices either.
    odd_width: 24,
    // Queries of size 4 rounded to 11 bits put each term of a score off by up to 4 * 2^-12, one independent of the other: a score by some
    // 3 * 4 * 2^-12 * sqrt(K) / sqrt(K), all weights by as much; and weights are rounded to 11 bits. Values are below 1, and what is off
    // in the weights is off in the total too.
    tolerance: |_| 2.0 * (12.0 * 2f32.powi(-12) + 2f32.powi(-11)),
};

fn in_tiles(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    rows: &[Row],
    bindings: Bindings<'_>,
    most_tokens: u32,
) -> Result<(), GpuError> {
    let tiles = tiles(rows, most_tokens);
    record(recorder, shape, (upload(&tiles).whole(), tiles.len()), bindings)
}

pub fn trials() -> Vec<Trial> {
    let there = has_cooperative_matrices();
    let trial = |name: &str, test: fn()| {
        let trial = Trial::test(format!("cooperative::prompt_attention::{name}"), move || {
            test();
            Ok(())
        });
        match there {
            true => trial,
            false => trial.with_kind("ignored: no cooperative matrices").with_ignored_flag(true),
        }
    };
    vec![
        trial("matches_reference", || attention::matches_reference(PROMPT, &attention::CONTEXTS, 35)),
        trial("a_row_alone_has_the_bits_it_has_among_others", || attention::rows_are_independent(PROMPT)),
        trial("other_rows_stay_untouched", || attention::other_rows_stay_untouched(PROMPT)),
        trial("nan_reaches_those_who_see_it_and_nobody_else", || attention::nan_propagates(PROMPT)),
        trial("where_a_prompt_is_cut_changes_no_bit", || attention::cuts_change_nothing(PROMPT)),
        trial("tiles_change_no_bit", || {
            let three = |recorder: &mut Recorder<'_>, shape: &Shape, rows: &[Row], bindings: Bindings<'_>| {
                in_tiles(recorder, shape, rows, bindings, 3)
            };
            for window in WINDOWS {
                let heads = Heads { q_heads: 4, kv_heads: 2, head_width: 64, window };
                let want = attention::in_chunks(PROMPT, heads, 101, 101);
                let got = attention::in_chunks(Attention { record: three, ..PROMPT }, heads, 101, 101);
                assert_eq!(got, want, "tiles of 3 tokens, window {window}");
            }
        }),
        trial("queries_of_any_size_match_reference", || attention::sizes_match_reference(PROMPT)),
    ]
}
