use fulmen::kernels::expert_combine::{Params, record};
use fulmen::reference::expert_combine::expert_combine;
use libtest_mimic::Trial;

use crate::common::{Random, assert_close, assert_untouched, bits, download, poisoned, run, upload};

fn combine(x: &[f32], weights: &[f32], y: &[f32], n_chosen: usize, d_model: usize) -> Vec<f32> {
    let params = Params { n_rows: (x.len() / d_model) as u32, n_chosen: n_chosen as u32, d_model: d_model as u32 };
    let stream = poisoned(x.len() + 70);
    crate::common::pipelines().gpu().write(&stream, 0, bytemuck::cast_slice(x));
    let (weights, y) = (upload(weights), upload(y));
    run(|recorder| record(recorder, params, weights.whole(), y.whole(), stream.whole()));
    let words: Vec<u32> = download(stream.whole());
    (x.len()..words.len()).for_each(|i| assert_untouched("expert_combine", &words, i));
    words[..x.len()].iter().map(|word| f32::from_bits(*word)).collect()
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("expert_combine::matches_reference", || {
            for (n_rows, n_chosen, d_model) in
                [(0, 2, 8), (1, 1, 1), (3, 2, 63), (5, 4, 64), (7, 3, 65), (64, 2, 128), (17, 8, 257)]
            {
                let mut random = Random::new((n_rows * 1000 + d_model) as u64);
                let (x, weights) = (random.values(n_rows * d_model), random.values(n_rows * n_chosen));
                let y = random.values(n_rows * n_chosen * d_model);
                let want = expert_combine(&x, &weights, &y, n_chosen, d_model);
                let got = combine(&x, &weights, &y, n_chosen, d_model);
                // A + 1 terms of at most 1, each rounded at most A + 1 times.
                let terms = (n_chosen + 1) as f32;
                assert_close("expert_combine", &got, &want, |_| terms * terms * 2f32.powi(-24));
            }
            Ok(())
        }),
        Trial::test("expert_combine::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, n_chosen, d_model) = (19, 3, 67);
            let mut random = Random::new(41);
            let (x, weights) = (random.values(n_rows * d_model), random.values(n_rows * n_chosen));
            let y = random.values(n_rows * n_chosen * d_model);
            let together = combine(&x, &weights, &y, n_chosen, d_model);
            for row in 0..n_rows {
                let alone = combine(
                    &x[row * d_model..][..d_model],
                    &weights[row * n_chosen..][..n_chosen],
                    &y[row * n_chosen * d_model..][..n_chosen * d_model],
                    n_chosen,
                    d_model,
                );
                assert_eq!(bits(&alone), bits(&together[row * d_model..][..d_model]), "row {row}");
            }
            Ok(())
        }),
    ]
}
