use fulmen::checkpoint::Dtype;
use fulmen::gpu::Variant;
use fulmen::kernels::matmul::{MATMUL, Params, record};
use fulmen::reference::matmul::matmul;
use libtest_mimic::Trial;

use crate::common::{
    DTYPES, Random, assert_close, assert_untouched, bits, download, poisoned, run, upload, upload_weights,
};

/// `[T, n_out]` of contiguous rows.
fn product(variant: &Variant, x: &[f32], w: &[f32], n_out: usize, n_in: usize) -> Vec<f32> {
    let n_rows = x.len() / n_in;
    let (w, _) = upload_weights(variant.weights, w);
    let (x, y) = (upload(x), poisoned(n_rows * n_out + 70));
    let params = Params::dense(n_rows as u32, n_out as u32, n_in as u32);
    run(|recorder| record(recorder, variant, params, x.whole(), w.whole(), y.whole()));
    let words: Vec<u32> = download(y.whole());
    (n_rows * n_out..words.len()).for_each(|i| assert_untouched("matmul", &words, i));
    words[..n_rows * n_out].iter().map(|word| f32::from_bits(*word)).collect()
}

/// What f32 may be off by: each of `n_in` terms is rounded at most `n_in` times, `n_in * 2^-24 * sum |x w|` in all.
fn tolerances(x: &[f32], w: &[f32], n_in: usize) -> Vec<f32> {
    let magnitudes = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<_>>();
    let sums = matmul(&magnitudes(x), &magnitudes(w), n_in);
    sums.iter().map(|sum| n_in as f32 * 2f32.powi(-24) * sum).collect()
}

/// (rows, outputs, inputs): none, one, primes, and every tile and step with one less and one more.
const SHAPES: [(usize, usize, usize); 11] = [
    (0, 8, 8),
    (1, 1, 1),
    (3, 5, 7),
    (15, 31, 15),
    (16, 32, 16),
    (17, 33, 17),
    (33, 65, 31),
    (63, 127, 33),
    (64, 128, 48),
    (65, 129, 53),
    (2, 257, 300),
];

/// Every tile for bf16, and the first and the last for the others: a tile sees the dtype only through one function, and
/// lavapipe compiles each variant for more than a second.
fn variants() -> Vec<Variant> {
    let extremes = |variant: &Variant| {
        let of_dtype = MATMUL.variants().into_iter().filter(|v| v.weights == variant.weights).collect::<Vec<_>>();
        [of_dtype.first(), of_dtype.last()].contains(&Some(variant))
    };
    MATMUL.variants().into_iter().filter(|variant| variant.weights == Dtype::Bf16 || extremes(variant)).collect()
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("matmul::matches_reference_and_no_tile_changes_bits", || {
            for (n_rows, n_out, n_in) in SHAPES {
                let mut random = Random::new((n_rows * 1000 + n_in) as u64);
                let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
                for dtype in DTYPES {
                    let (_, w) = upload_weights(dtype, &w);
                    let want = matmul(&x, &w, n_in);
                    let allowed = tolerances(&x, &w, n_in);
                    let default = product(&Variant::new(dtype), &x, &w, n_out, n_in);
                    for variant in variants().iter().filter(|variant| variant.weights == dtype) {
                        let what = format!("{variant:?} {n_rows}x{n_out}x{n_in}");
                        let got = product(variant, &x, &w, n_out, n_in);
                        assert_close(&what, &got, &want, |i| allowed[i]);
                        assert_eq!(bits(&got), bits(&default), "{what}: the tile changed bits");
                    }
                }
            }
            Ok(())
        }),
        Trial::test("matmul::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, n_out, n_in) = (37, 45, 83);
            let mut random = Random::new(11);
            let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
            let variant = Variant::new(Dtype::Bf16);
            let together = product(&variant, &x, &w, n_out, n_in);
            for (row, expected) in x.chunks_exact(n_in).zip(together.chunks_exact(n_out)) {
                assert_eq!(bits(&product(&variant, row, &w, n_out, n_in)), bits(expected));
            }
            Ok(())
        }),
        // A row that overflowed must not reach its neighbours through the tile they share.
        Trial::test("matmul::keeps_nan_and_infinity_in_their_row", || {
            let (n_rows, n_out, n_in) = (18, 33, 19);
            let mut random = Random::new(12);
            let (mut x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
            let variant = Variant::new(Dtype::F32);
            let clean = product(&variant, &x, &w, n_out, n_in);
            (x[3 * n_in + 18], x[16 * n_in]) = (f32::NAN, f32::INFINITY);
            let got = product(&variant, &x, &w, n_out, n_in);
            for row in 0..n_rows {
                let (got, clean) = (&got[row * n_out..][..n_out], &clean[row * n_out..][..n_out]);
                match row {
                    3 => assert!(got.iter().all(|v| v.is_nan()), "row 3: {got:?}"),
                    16 => assert!(got.iter().all(|v| !v.is_finite()), "row 16: {got:?}"),
                    _ => assert_eq!(bits(got), bits(clean), "row {row}"),
                }
            }
            Ok(())
        }),
        Trial::test("matmul::reads_and_writes_columns_of_wider_rows", || {
            let (n_rows, n_out, n_in) = (19, 37, 21);
            let (x_stride, x_offset, y_stride, y_offset) = (30, 4, 50, 9);
            let mut random = Random::new(13);
            let (x, w) = (random.values(n_rows * x_stride), random.values(n_out * n_in));
            let narrow: Vec<f32> = x.chunks_exact(x_stride).flat_map(|row| &row[x_offset..][..n_in]).copied().collect();
            for variant in variants() {
                let expected = product(&variant, &narrow, &w, n_out, n_in);
                let (w_gpu, _) = upload_weights(variant.weights, &w);
                let (x_gpu, y) = (upload(&x), poisoned(n_rows * y_stride));
                let params = Params {
                    x_stride: x_stride as u32,
                    x_offset: x_offset as u32,
                    y_stride: y_stride as u32,
                    y_offset: y_offset as u32,
                    ..Params::dense(n_rows as u32, n_out as u32, n_in as u32)
                };
                run(|recorder| record(recorder, &variant, params, x_gpu.whole(), w_gpu.whole(), y.whole()));
                let words: Vec<u32> = download(y.whole());
                for (i, word) in words.iter().enumerate() {
                    let (row, column) = (i / y_stride, i % y_stride);
                    if (y_offset..y_offset + n_out).contains(&column) {
                        let expected = expected[row * n_out + column - y_offset];
                        assert_eq!(*word, expected.to_bits(), "{variant:?} row {row} column {column}");
                    } else {
                        assert_untouched("matmul", &words, i);
                    }
                }
            }
            Ok(())
        }),
        // The sum is finished before it is added: one rounding more, and the same bits as an addition on the host.
        Trial::test("matmul::accumulate_adds_the_finished_sum", || {
            let (n_rows, n_out, n_in) = (17, 35, 40);
            let mut random = Random::new(14);
            let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
            let residual = random.values(n_rows * n_out);
            for variant in variants() {
                let sums = product(&variant, &x, &w, n_out, n_in);
                let (w_gpu, _) = upload_weights(variant.weights, &w);
                let (x_gpu, y) = (upload(&x), upload(&residual));
                let params = Params { accumulate: 1, ..Params::dense(n_rows as u32, n_out as u32, n_in as u32) };
                run(|recorder| record(recorder, &variant, params, x_gpu.whole(), w_gpu.whole(), y.whole()));
                let got: Vec<f32> = download(y.whole());
                let want: Vec<f32> = residual.iter().zip(&sums).map(|(residual, sum)| residual + sum).collect();
                assert_eq!(bits(&got), bits(&want), "{variant:?}");
            }
            Ok(())
        }),
        // Longest sum of the six shapes: no limit on loop iterations may cut it short.
        Trial::test("matmul::sums_to_the_end_of_the_longest_row", || {
            let n_in = 16384;
            let mut random = Random::new(15);
            let (x, w) = (random.values(n_in), random.values(3 * n_in));
            let (_, w) = upload_weights(Dtype::Bf16, &w);
            let (want, allowed) = (matmul(&x, &w, n_in), tolerances(&x, &w, n_in));
            for variant in variants().iter().filter(|variant| variant.weights == Dtype::Bf16) {
                let got = product(variant, &x, &w, 3, n_in);
                // Far below the worst case, so that a missing tail is seen: random signs add up like a walk.
                assert_close(&format!("{variant:?}"), &got, &want, |i| allowed[i] / 100.0);
            }
            Ok(())
        }),
    ]
}
