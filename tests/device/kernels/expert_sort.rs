use fulmen::kernels::expert_sort::{Params, record};
use fulmen::reference::expert_sort::expert_sort;
use libtest_mimic::Trial;

use crate::common::{Random, assert_untouched, download, poisoned, run, upload};

/// Offsets and permutation. What lies behind them stayed untouched.
fn sort(ids: &[u32], n_experts: usize) -> (Vec<u32>, Vec<u32>) {
    let (offsets, permutation) = (poisoned(n_experts + 1 + 70), poisoned(ids.len() + 70));
    let params = Params { n_assignments: ids.len() as u32, n_experts: n_experts as u32 };
    let ids_gpu = upload(ids);
    run(|recorder| record(recorder, params, ids_gpu.whole(), offsets.whole(), permutation.whole()));
    let cut = |words: Vec<u32>, n: usize| {
        (n..words.len()).for_each(|i| assert_untouched("expert_sort", &words, i));
        words[..n].to_vec()
    };
    let there = ids.iter().filter(|id| (**id as usize) < n_experts).count();
    (cut(download(offsets.whole()), n_experts + 1), cut(download(permutation.whole()), there))
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("expert_sort::matches_reference", || {
            for n_assignments in [0, 1, 2, 31, 32, 33, 97, 255, 256, 257, 1021, 8192] {
                for n_experts in [1, 2, 3, 8, 16, 128, 256] {
                    let mut random = Random::new((n_assignments * 1000 + n_experts) as u64);
                    let ids: Vec<u32> = (0..n_assignments).map(|_| random.below(n_experts) as u32).collect();
                    assert_eq!(sort(&ids, n_experts), expert_sort(&ids, n_experts), "{n_assignments} on {n_experts}");
                }
            }
            Ok(())
        }),
        Trial::test("expert_sort::rows_that_are_not_there_go_nowhere", || {
            let mut random = Random::new(7);
            for n_experts in [1, 8, 256] {
                let ids: Vec<u32> = (0..700)
                    .map(|_| if random.below(3) == 0 { u32::MAX } else { random.below(n_experts) as u32 })
                    .collect();
                assert_eq!(sort(&ids, n_experts), expert_sort(&ids, n_experts), "{n_experts} experts");
            }
            Ok(())
        }),
        Trial::test("expert_sort::one_expert_takes_all", || {
            for expert in [0, 5, 7] {
                let ids = vec![expert; 700];
                assert_eq!(sort(&ids, 8), expert_sort(&ids, 8), "expert {expert}");
            }
            Ok(())
        }),
    ]
}
