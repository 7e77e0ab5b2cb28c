use fulmen::checkpoint::Dtype;
use fulmen::kernels::layer_norm::{Params, record};
use fulmen::reference::layer_norm::layer_norm;
use libtest_mimic::Trial;

use crate::common::{
    DTYPES, Random, assert_close, assert_untouched, bits, download, poisoned, run, upload, upload_weights,
};

const EPS: f32 = 1e-5;

/// Runs the kernel over `x`: `[T, D]`. What lies behind the result must stay as it was.
fn normed(dtype: Dtype, x: &[f32], gain: &[f32]) -> Vec<f32> {
    let d_model = gain.len();
    let (gain, _) = upload_weights(dtype, gain);
    let (x_gpu, y) = (upload(x), poisoned(x.len() + 70));
    let params = Params { n_rows: (x.len() / d_model) as u32, d_model: d_model as u32, eps: EPS };
    run(|recorder| record(recorder, dtype, params, x_gpu.whole(), gain.whole(), y.whole()));
    let words: Vec<u32> = download(y.whole());
    (x.len()..x.len() + 70).for_each(|i| assert_untouched("layer_norm", &words, i));
    words[..x.len()].iter().map(|word| f32::from_bits(*word)).collect()
}

fn matches_reference(dtype: Dtype, n_rows: usize, d_model: usize) {
    let what = format!("{dtype:?} {n_rows} rows of {d_model}");
    let mut random = Random::new((n_rows * 1000 + d_model) as u64);
    let (x, gain) = (random.values(n_rows * d_model), random.values(d_model));
    let (_, gain) = upload_weights(dtype, &gain);
    let y = normed(dtype, &x, &gain);
    let want = layer_norm(&x, &gain, EPS);
    // Mean and sum of squares have D terms, each rounded at most D times: D * 2^-24 of their size. x lies in -1..1 and so
    // does its mean; what the mean is off by reaches y times the scale and the gain. Division, root and products add a few.
    let relative = (d_model as f32 + 8.0) * 2f32.powi(-24);
    assert_close(&what, &y, &want, |i| {
        let row = &x[i / d_model * d_model..][..d_model];
        let mean = row.iter().sum::<f32>() / d_model as f32;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / d_model as f32;
        relative * (want[i].abs() + (gain[i % d_model] / (variance + EPS).sqrt()).abs())
    });
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("layer_norm::matches_reference", || {
            for dtype in DTYPES {
                for (n_rows, d_model) in [(0, 8), (1, 1), (3, 7), (2, 63), (5, 64), (2, 65), (17, 257), (2, 4096)] {
                    matches_reference(dtype, n_rows, d_model);
                }
            }
            Ok(())
        }),
        Trial::test("layer_norm::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, d_model) = (9, 131);
            let mut random = Random::new(5);
            let (x, gain) = (random.values(n_rows * d_model), random.values(d_model));
            let together = normed(Dtype::Bf16, &x, &gain);
            for (row, expected) in x.chunks_exact(d_model).zip(together.chunks_exact(d_model)) {
                assert_eq!(bits(&normed(Dtype::Bf16, row, &gain)), bits(expected));
            }
            Ok(())
        }),
    ]
}
