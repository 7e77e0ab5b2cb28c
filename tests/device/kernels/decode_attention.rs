use fulmen::kernels::decode_attention::{DECODE_ATTENTION, record};
use libtest_mimic::Trial;

use super::attention::{self, Attention, Heads, WINDOWS};
use super::prompt_attention::PROMPT;

const DECODE: Attention = Attention { kernel: &DECODE_ATTENTION, record };

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn()| {
        Trial::test(format!("decode_attention::{name}"), move || {
            test();
            Ok(())
        })
    };
    vec![
        trial("matches_reference_with_every_tunable", || attention::matches_reference(DECODE, 1)),
        trial("a_row_alone_has_the_bits_it_has_among_others", || attention::rows_are_independent(DECODE)),
        trial("other_rows_stay_untouched", || attention::other_rows_stay_untouched(DECODE)),
        trial("nan_reaches_those_who_see_it_and_nobody_else", || attention::nan_propagates(DECODE)),
        trial("a_token_has_the_bits_it_would_have_in_a_prompt", || {
            for window in WINDOWS {
                let heads = Heads { q_heads: 6, kv_heads: 2, head_width: 18, window };
                let prompt = attention::in_chunks(PROMPT, heads, 70, 70);
                assert_eq!(attention::in_chunks(DECODE, heads, 70, 1), prompt, "window {window}");
            }
        }),
    ]
}
