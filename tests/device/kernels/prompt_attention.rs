use fulmen::gpu::{GpuError, Recorder};
use fulmen::kernels::paged_attention::{Bindings, Row, Shape};
use fulmen::kernels::prompt_attention::{record, tile_tokens, tiles};
use libtest_mimic::Trial;

use super::attention::{self, Attention, Heads, WINDOWS};
use crate::common::upload;

pub const PROMPT: Attention = Attention {
    name: "prompt_attention",
    record: |recorder, shape, rows, bindings| in_tiles(recorder, shape, rows, bindings, tile_tokens(shape)),
    fits: |_| true,
    odd_width: 34,
    tolerance: attention::f32_tolerance,
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
    let trial = |name: &str, test: fn()| {
        Trial::test(format!("prompt_attention::{name}"), move || {
            test();
            Ok(())
        })
    };
    vec![
        trial("matches_reference", || attention::matches_reference(PROMPT, &attention::CONTEXTS, 35)),
        trial("a_row_alone_has_the_bits_it_has_among_others", || attention::rows_are_independent(PROMPT)),
        trial("other_rows_stay_untouched", || attention::other_rows_stay_untouched(PROMPT)),
        trial("nan_reaches_those_who_see_it_and_nobody_else", || attention::nan_propagates(PROMPT)),
        trial("where_a_prompt_is_cut_changes_no_bit", || attention::cuts_change_nothing(PROMPT)),
        trial("queries_of_any_size_match_reference", || attention::sizes_match_reference(PROMPT)),
        trial("tiles_change_no_bit", || {
            let three = |recorder: &mut Recorder<'_>, shape: &Shape, rows: &[Row], bindings: Bindings<'_>| {
                in_tiles(recorder, shape, rows, bindings, 3)
            };
            for window in WINDOWS {
                let heads = Heads { q_heads: 4, kv_heads: 2, head_width: 18, window };
                let want = attention::in_chunks(PROMPT, heads, 101, 101);
                let got = attention::in_chunks(Attention { record: three, ..PROMPT }, heads, 101, 101);
                assert_eq!(got, want, "tiles of 3 tokens, window {window}");
            }
        }),
        trial("tiles_have_every_row_once_and_the_heaviest_first", || {
            let run = |row: u32, position: u32, first_block: u32, n: u32| {
                (0..n).map(move |i| Row { row: row + i, position: position + i, first_block })
            };
            // Two sequences side by side, a third one's later chunk, and a gap.
            let rows: Vec<Row> =
                run(0, 0, 0, 10).chain(run(10, 0, 5, 3)).chain(run(13, 40, 9, 7)).chain(run(30, 47, 9, 1)).collect();
            let tiles = tiles(&rows, 4);
            assert!(tiles.is_sorted_by_key(|tile| std::cmp::Reverse(tile.position + tile.n_tokens)), "{tiles:?}");
            assert!(tiles.iter().all(|tile| (1..=4).contains(&tile.n_tokens)), "{tiles:?}");
            let mut of_tiles: Vec<Row> =
                tiles.iter().flat_map(|tile| run(tile.row, tile.position, tile.first_block, tile.n_tokens)).collect();
            of_tiles.sort_by_key(|row| row.row);
            assert_eq!(of_tiles, rows);
        }),
    ]
}
