use fulmen::kernels::router_topk::{Params, record};
use fulmen::reference::router_topk::router_topk;
use libtest_mimic::Trial;

use crate::common::{Random, assert_close, assert_untouched, bits, download, poisoned, run, upload};

/// Ids and weights. What lies behind them stayed untouched.
fn route(logits: &[f32], n_experts: usize, n_chosen: usize, renormalise: bool) -> (Vec<u32>, Vec<f32>) {
    let n_rows = logits.len() / n_experts;
    let n_out = n_rows * n_chosen;
    let (ids, weights) = (poisoned(n_out + 70), poisoned(n_out + 70));
    let params = Params {
        n_rows: n_rows as u32,
        n_experts: n_experts as u32,
        n_chosen: n_chosen as u32,
        renormalise: renormalise as u32,
    };
    let logits = upload(logits);
    run(|recorder| record(recorder, params, logits.whole(), ids.whole(), weights.whole()));
    let (id_words, weight_words): (Vec<u32>, Vec<u32>) = (download(ids.whole()), download(weights.whole()));
    (n_out..n_out + 70).for_each(|i| assert_untouched("router_topk ids", &id_words, i));
    (n_out..n_out + 70).for_each(|i| assert_untouched("router_topk weights", &weight_words, i));
    (id_words[..n_out].to_vec(), weight_words[..n_out].iter().map(|word| f32::from_bits(*word)).collect())
}

/// E and A.
const SIZES: [(usize, usize); 12] =
    [(1, 1), (2, 1), (2, 2), (3, 2), (8, 2), (16, 4), (60, 4), (64, 8), (65, 3), (128, 8), (256, 16), (16, 16)];

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("router_topk::matches_reference", || {
            for (n_experts, n_chosen) in SIZES {
                for (n_rows, renormalise) in [(0, true), (1, false), (7, true), (67, true), (67, false)] {
                    let mut random = Random::new((n_experts * 100 + n_rows) as u64);
                    let logits: Vec<f32> = random.values(n_rows * n_experts).iter().map(|v| 5.0 * v).collect();
                    let (ids, weights) = route(&logits, n_experts, n_chosen, renormalise);
                    let (want_ids, want) = router_topk(&logits, n_experts, n_chosen, renormalise);
                    assert_eq!(ids, want_ids, "E{n_experts} A{n_chosen} T{n_rows}");
                    // exp of 0 to -10 has 3 + 2 * 10 units in the last place; then the sum of E terms.
                    assert_close("weights", &weights, &want, |i| want[i] * (50 + n_experts) as f32 * 2f32.powi(-24));
                }
            }
            Ok(())
        }),
        Trial::test("router_topk::of_equal_logits_the_lower_index_comes_first", || {
            for (n_experts, n_chosen) in SIZES {
                let mut random = Random::new(n_experts as u64);
                // Four different values, both zeros among them: they are equal.
                let logits: Vec<f32> = (0..20 * n_experts).map(|_| [-1.5, -0.0, 0.0, 2.0][random.below(4)]).collect();
                let (ids, _) = route(&logits, n_experts, n_chosen, true);
                assert_eq!(ids, router_topk(&logits, n_experts, n_chosen, true).0, "E{n_experts} A{n_chosen}");
            }
            Ok(())
        }),
        Trial::test("router_topk::takes_logits_of_any_size", || {
            let logits = [3e38, -3e38, 1e-45, 3.3e38, -1e-45, 0.0, f32::NEG_INFINITY, -1.0];
            let (ids, weights) = route(&logits, 8, 8, true);
            assert_eq!(ids, [3, 0, 2, 5, 4, 7, 1, 6]);
            assert_eq!(weights, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
            Ok(())
        }),
        Trial::test("router_topk::ids_stay_distinct_and_in_range_whatever_the_logits", || {
            for (n_experts, n_chosen) in SIZES {
                let mut random = Random::new(n_experts as u64);
                let odd = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
                let logits: Vec<f32> = (0..30 * n_experts).map(|_| odd[random.below(odd.len())]).collect();
                let (ids, weights) = route(&logits, n_experts, n_chosen, true);
                for (t, row) in logits.chunks_exact(n_experts).enumerate() {
                    let mut ids = ids[t * n_chosen..][..n_chosen].to_vec();
                    assert!(ids.iter().all(|id| (*id as usize) < n_experts), "{ids:?}");
                    ids.sort();
                    ids.dedup();
                    assert_eq!(ids.len(), n_chosen, "an id occurs twice");
                    if row.iter().any(|v| v.is_nan()) {
                        let weights = &weights[t * n_chosen..][..n_chosen];
                        assert!(weights.iter().all(|w| w.is_nan()), "{row:?} gave {weights:?}");
                    }
                }
            }
            Ok(())
        }),
        Trial::test("router_topk::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, n_experts, n_chosen) = (23, 67, 5);
            let logits = Random::new(51).values(n_rows * n_experts);
            let (ids, weights) = route(&logits, n_experts, n_chosen, true);
            for (t, row) in logits.chunks_exact(n_experts).enumerate() {
                let (own_ids, own_weights) = route(row, n_experts, n_chosen, true);
                assert_eq!(own_ids, ids[t * n_chosen..][..n_chosen]);
                assert_eq!(bits(&own_weights), bits(&weights[t * n_chosen..][..n_chosen]));
            }
            Ok(())
        }),
    ]
}
