use fulmen::checkpoint::Dtype;
use fulmen::kernels::qk_norm::{Params, record};
use fulmen::reference::qk_norm::qk_norm;
use libtest_mimic::Trial;

use crate::common::{DTYPES, Random, assert_close, bits, download, run, upload, upload_weights};

const EPS: f32 = 1e-5;

/// Segments of rows, and where they are.
#[derive(Debug, Clone, Copy)]
struct Shape {
    n_rows: usize,
    n_segments: usize,
    width: usize,
    stride: usize,
    offset: usize,
}

fn normed(dtype: Dtype, x: &[f32], gain: &[f32], shape: Shape) -> Vec<f32> {
    let (gain, _) = upload_weights(dtype, gain);
    let x = upload(x);
    let params = Params {
        n_rows: shape.n_rows as u32,
        n_segments: shape.n_segments as u32,
        width: shape.width as u32,
        stride: shape.stride as u32,
        offset: shape.offset as u32,
        eps: EPS,
    };
    run(|recorder| record(recorder, dtype, params, gain.whole(), x.whole()));
    download(x.whole())
}

fn matches_reference(dtype: Dtype, shape: Shape) {
    let Shape { n_rows, n_segments, width, stride, offset } = shape;
    let mut random = Random::new((n_rows * 1000 + width) as u64);
    let (x, gain) = (random.values(n_rows * stride + 70), random.values(width));
    let (_, gain) = upload_weights(dtype, &gain);
    let got = normed(dtype, &x, &gain, shape);
    let want = qk_norm(&x[..n_rows * stride], &gain, EPS, n_segments, stride, offset);
    // The sum of squares has `width` terms, each rounded at most that often; root, quotient and products add a few.
    let relative = (width as f32 + 8.0) * 2f32.powi(-24);
    let what = format!("{dtype:?} {shape:?}");
    assert_close(&what, &got[..n_rows * stride], &want, |i| {
        let inside = (offset..offset + n_segments * width).contains(&(i % stride));
        if inside { relative * want[i].abs() } else { 0.0 }
    });
    assert_eq!(bits(&got[n_rows * stride..]), bits(&x[n_rows * stride..]), "{what}: behind the rows");
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("qk_norm::matches_reference", || {
            for dtype in DTYPES {
                for n_rows in [0, 1, 5] {
                    for (n_segments, width, stride, offset) in [
                        (1, 1, 1, 0),
                        (3, 10, 50, 20),
                        (2, 63, 130, 3),
                        (1, 64, 64, 0),
                        (1, 2048, 2100, 52),
                        (4, 65, 300, 7),
                    ] {
                        matches_reference(dtype, Shape { n_rows, n_segments, width, stride, offset });
                    }
                }
            }
            Ok(())
        }),
        Trial::test("qk_norm::a_row_alone_has_the_bits_it_has_among_others", || {
            let shape = Shape { n_rows: 9, n_segments: 3, width: 37, stride: 120, offset: 4 };
            let mut random = Random::new(5);
            let (x, gain) = (random.values(9 * 120), random.values(37));
            let together = normed(Dtype::Bf16, &x, &gain, shape);
            for (row, expected) in x.chunks_exact(120).zip(together.chunks_exact(120)) {
                let alone = normed(Dtype::Bf16, row, &gain, Shape { n_rows: 1, ..shape });
                assert_eq!(bits(&alone), bits(expected));
            }
            Ok(())
        }),
    ]
}
