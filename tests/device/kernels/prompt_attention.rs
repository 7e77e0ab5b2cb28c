use fulmen::kernels::prompt_attention::{PROMPT_ATTENTION, record};
use libtest_mimic::Trial;

use super::attention::{self, Attention, Heads, WINDOWS};

pub const PROMPT: Attention = Attention { kernel: &PROMPT_ATTENTION, record };

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn()| {
        Trial::test(format!("prompt_attention::{name}"), move || {
            test();
            Ok(())
        })
    };
    vec![
        trial("matches_reference_with_every_tunable", || attention::matches_reference(PROMPT, 35)),
        trial("a_row_alone_has_the_bits_it_has_among_others", || attention::rows_are_independent(PROMPT)),
        trial("other_rows_stay_untouched", || attention::other_rows_stay_untouched(PROMPT)),
        trial("nan_reaches_those_who_see_it_and_nobody_else", || attention::nan_propagates(PROMPT)),
        trial("where_a_prompt_is_cut_changes_no_bit", || {
            for window in WINDOWS {
                let heads = Heads { q_heads: 4, kv_heads: 2, head_width: 18, window };
                let whole = attention::in_chunks(PROMPT, heads, 101, 101);
                for chunk in [1, 7, 31, 32, 33, 64, 100] {
                    assert_eq!(
                        attention::in_chunks(PROMPT, heads, 101, chunk),
                        whole,
                        "chunks of {chunk}, window {window}"
                    );
                }
            }
        }),
    ]
}
