//! Products on cooperative matrices: against the references, to what f16 operands may be off by, and against each other bit for bit: no
//! tile and no number of rows changes a sum. Ignored where the adapter has no such matrices.

use fulmen::checkpoint::Dtype;
use fulmen::kernels::cooperative::{Tile, matmul};
use fulmen::reference::matmul::matmul as reference_matmul;
use fulmen::tune::{Operation, candidates};
use libtest_mimic::Trial;

use super::experts::{Extents, Form, Halves, SHAPES};
use super::{expert_down, expert_gate_up};
use crate::common::{
    DTYPES, Random, assert_close, assert_untouched, bits, download, has_matrices, if_cooperative, if_matrices,
    if_workgroup_matrices, poisoned, run, upload, upload_weights,
};

/// `[T, n_out]`, with `residual` to add to.
fn product(tile: Tile, dtype: Dtype, x: &[f32], w: &[f32], n_in: usize, residual: Option<&[f32]>) -> Vec<f32> {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    let (w, _) = upload_weights(dtype, w);
    let x = upload(x);
    let y = residual.map_or_else(|| poisoned(n_rows * n_out + 70), upload);
    let halves = Halves::of(&x, n_rows, n_in);
    let params = matmul::Params::dense(n_rows as u32, n_out as u32, n_in as u32);
    let params = matmul::Params { accumulate: residual.is_some() as u32, ..params };
    run(|recorder| matmul::record(recorder, dtype, tile, params, halves.rows(), w.whole(), y.whole()));
    let words: Vec<u32> = download(y.whole());
    (n_rows * n_out..words.len()).for_each(|i| assert_untouched("cooperative matmul", &words, i));
    words[..n_rows * n_out].iter().map(|word| f32::from_bits(*word)).collect()
}

/// What rounding both operands to f16 may change, `2^-10 * sum |x w|`, what is too small for f16 beside the row's greatest value or
/// among the weights, and `n_in * 2^-23 * sum |x w|` for the sums: devices need not round every addition to nearest.
fn tolerances(x: &[f32], w: &[f32], n_in: usize) -> Vec<f32> {
    let magnitudes = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<_>>();
    let sums = reference_matmul(&magnitudes(x), &magnitudes(w), n_in);
    let greatest = |row: &[f32]| row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let n_out = w.len() / n_in;
    let relative = 2f32.powi(-10) + n_in as f32 * 2f32.powi(-23);
    (0..sums.len())
        .map(|i| {
            let x = &x[i / n_out * n_in..][..n_in];
            let w = &w[i % n_out * n_in..][..n_in];
            let small = n_in as f32 * greatest(x) * (2f32.powi(-14) + 2f32.powi(-28) * greatest(w));
            relative * sums[i] + if w.iter().any(|v| v.abs() < 2f32.powi(-14)) { small } else { 1e-30 }
        })
        .collect()
}

/// (rows, outputs, inputs): none, one, primes, and around tiles and steps; inputs that are and are not multiples of eight.
const PRODUCTS: [(usize, usize, usize); 10] = [
    (0, 8, 8),
    (1, 1, 1),
    (3, 5, 7),
    (15, 31, 16),
    (17, 33, 40),
    (65, 129, 72),
    (130, 257, 256),
    (31, 64, 264),
    (5, 300, 512),
    (200, 70, 1000),
];

/// A few of them, so that a trial ends in seconds: bits are compared between all at one size. Emulated matrices take small ones of every form,
/// which fit a software driver's workgroup memory and are soon compiled.
fn some_tiles(operation: Operation) -> Vec<Tile> {
    if has_matrices() {
        return candidates::all(operation).into_iter().step_by(5).collect();
    }
    let mut tiles = vec![
        Tile::new(16, 32, 64, 16, 16),
        Tile { unit: 8, prefetch: false, ..Tile::new(32, 32, 64, 32, 16) },
        Tile { unit: 8, buffers: 2, ..Tile::new(32, 64, 32, 16, 32) },
    ];
    if matches!(operation, Operation::GateUp | Operation::Down) {
        tiles.extend([Tile::solo(16, 16, 32, 1), Tile::solo(48, 32, 32, 2), Tile::direct(48, 32, 32, 48, 16)]);
    }
    tiles
}

fn all_tiles(operation: Operation) -> Vec<Tile> {
    if has_matrices() { candidates::all(operation) } else { some_tiles(operation) }
}

fn matmul_trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for dtype in DTYPES {
        let name = format!("cooperative::matmul_matches_reference_and_no_tile_changes_bits::{}", dtype.name());
        trials.push(Trial::test(name, move || {
            for (n_rows, n_out, n_in) in PRODUCTS {
                let mut random = Random::new((n_rows * 1000 + n_in) as u64);
                let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
                let (_, w) = upload_weights(dtype, &w);
                let (want, allowed) = (reference_matmul(&x, &w, n_in), tolerances(&x, &w, n_in));
                let mut first: Option<Vec<u32>> = None;
                let tiles = if n_in == 256 { all_tiles(Operation::Matmul) } else { some_tiles(Operation::Matmul) };
                for tile in tiles {
                    let what = format!("{tile} {dtype:?} {n_rows}x{n_out}x{n_in}");
                    let got = product(tile, dtype, &x, &w, n_in, None);
                    assert_close(&what, &got, &want, |i| allowed[i]);
                    assert_eq!(bits(&got), *first.get_or_insert_with(|| bits(&got)), "{what}: the tile changed bits");
                }
            }
            Ok(())
        }));
    }
    trials.extend([
        Trial::test("cooperative::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, n_out, n_in) = (150, 75, 200);
            let mut random = Random::new(31);
            let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
            let large = all_tiles(Operation::Matmul).into_iter().max_by_key(|tile| tile.rows).expect("there are tiles");
            let small = candidates::all(Operation::Matmul)
                .into_iter()
                .find(|tile| tile.rows == 16)
                .expect("there is a small one");
            let together = product(large, Dtype::Bf16, &x, &w, n_in, None);
            for (row, expected) in x.chunks_exact(n_in).zip(together.chunks_exact(n_out)).step_by(13) {
                assert_eq!(bits(&product(small, Dtype::Bf16, row, &w, n_in, None)), bits(expected));
            }
            Ok(())
        }),
        // f16 ends at 65,504.
        Trial::test("cooperative::takes_activations_of_a_million", || {
            let (n_rows, n_out, n_in) = (20, 70, 300);
            let mut random = Random::new(32);
            let x: Vec<f32> =
                (0..n_rows * n_in).map(|i| random.unit() * [1e6, 1.0, 3e-8, 1e20][i / n_in % 4]).collect();
            let (_, w) = upload_weights(Dtype::Bf16, &random.values(n_out * n_in));
            let (want, allowed) = (reference_matmul(&x, &w, n_in), tolerances(&x, &w, n_in));
            for tile in some_tiles(Operation::Matmul) {
                let got = product(tile, Dtype::Bf16, &x, &w, n_in, None);
                assert_close(&tile.to_string(), &got, &want, |i| allowed[i]);
            }
            Ok(())
        }),
        // One weight to a row of the matrix, ones for x: what comes out is the weight as f16.
        Trial::test("cooperative::weights_beyond_f16_are_rounded_as_documented", || {
            let weights: Vec<f32> =
                (-30..18).map(|exponent| 1.5 * 2f32.powi(exponent)).chain([0.0, 65504.0, 1e5, -1e30]).collect();
            let n_in = 32;
            let w: Vec<f32> = weights.iter().flat_map(|w| std::iter::once(*w).chain(vec![0.0; n_in - 1])).collect();
            for dtype in [Dtype::Bf16, Dtype::F32] {
                let (_, stored) = upload_weights(dtype, &weights);
                for tile in some_tiles(Operation::Matmul) {
                    let got = product(tile, dtype, &vec![1.0; n_in], &w, n_in, None);
                    for (got, w) in got.iter().zip(&stored) {
                        let half = half::f16::from_f32(*w).to_f32();
                        let fits = match w.abs() {
                            // Flushed to 0, or rounded.
                            size if size < 2f32.powi(-14) => *got == 0.0 || *got == half,
                            // Infinite times the zeros beside the ones would be NaN; there are ones alone.
                            size if size > 65504.0 => !got.is_finite(),
                            _ => *got == half,
                        };
                        assert!(fits, "{tile} {dtype:?}: {w:e} became {got:e}, f16 has {half:e}");
                    }
                }
            }
            Ok(())
        }),
        Trial::test("cooperative::keeps_nan_and_infinity_in_their_row", || {
            let (n_rows, n_out, n_in) = (18, 33, 19);
            let mut random = Random::new(33);
            let (mut x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
            for tile in some_tiles(Operation::Matmul) {
                let clean = product(tile, Dtype::F32, &x, &w, n_in, None);
                let kept = (x[3 * n_in + 18], x[16 * n_in]);
                (x[3 * n_in + 18], x[16 * n_in]) = (f32::NAN, f32::INFINITY);
                let got = product(tile, Dtype::F32, &x, &w, n_in, None);
                (x[3 * n_in + 18], x[16 * n_in]) = kept;
                for row in 0..n_rows {
                    let (got, clean) = (&got[row * n_out..][..n_out], &clean[row * n_out..][..n_out]);
                    match row {
                        3 => assert!(got.iter().all(|v| v.is_nan()), "row 3: {got:?}"),
                        16 => assert!(got.iter().all(|v| !v.is_finite()), "row 16: {got:?}"),
                        _ => assert_eq!(bits(got), bits(clean), "row {row}"),
                    }
                }
            }
            Ok(())
        }),
        Trial::test("cooperative::accumulate_adds_the_finished_sum", || {
            let (n_rows, n_out, n_in) = (17, 35, 40);
            let mut random = Random::new(34);
            let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
            let residual = random.values(n_rows * n_out);
            for tile in some_tiles(Operation::Matmul) {
                let sums = product(tile, Dtype::Bf16, &x, &w, n_in, None);
                let got = product(tile, Dtype::Bf16, &x, &w, n_in, Some(&residual));
                let want: Vec<f32> = residual.iter().zip(&sums).map(|(residual, sum)| residual + sum).collect();
                assert_eq!(bits(&got), bits(&want), "{tile}");
            }
            Ok(())
        }),
    ]);
    trials
}

/// The tile in SPIR-V against the reference, and against a tile of the template bit for bit: whole tiles, its long loop with and without a rest,
/// and rows, matrices and residuals that it leaves to the other; on its own, and as a part of wider rows.
fn workgroup_trials() -> Vec<Trial> {
    let shapes = [
        (1, 256, 64),
        (127, 512, 192),
        (128, 256, 64),
        (128, 256, 512),
        (256, 768, 1088),
        (384, 512, 2048),
        (129, 256, 576),
        (300, 768, 1088),
        (5, 256, 2048),
        (130, 300, 64),
        (3, 256, 72),
    ];
    let trial = |dtype: Dtype| {
        let name = format!("cooperative::matrices_of_a_workgroup_give_the_bits_of_tiles::{}", dtype.name());
        Trial::test(name, move || {
            for (n_rows, n_out, n_in) in shapes {
                let mut random = Random::new((n_rows * 1000 + n_in) as u64);
                let (x, w) = (random.values(n_rows * n_in), random.values(n_out * n_in));
                let (_, w) = upload_weights(dtype, &w);
                let (want, allowed) = (reference_matmul(&x, &w, n_in), tolerances(&x, &w, n_in));
                let what = format!("{dtype:?} {n_rows}x{n_out}x{n_in}");
                let got = product(Tile::WORKGROUP, dtype, &x, &w, n_in, None);
                assert_close(&what, &got, &want, |i| allowed[i]);
                assert_eq!(bits(&got), bits(&product(Tile::MANY, dtype, &x, &w, n_in, None)), "{what}");
                let residual = random.values(n_rows * n_out);
                let [ours, theirs] = [Tile::WORKGROUP, Tile::MANY]
                    .map(|tile| bits(&product(tile, dtype, &x, &w, n_in, Some(&residual))));
                assert_eq!(ours, theirs, "{what}, added");
                let [ours, theirs] = [Tile::WORKGROUP, Tile::MANY].map(|tile| part_of_rows(tile, dtype, &x, &w, n_in));
                assert_eq!(ours, theirs, "{what}, as a part");
            }
            Ok(())
        })
    };
    vec![trial(Dtype::Bf16), trial(Dtype::F16)]
}

/// All words of a poisoned `[T, n_out + 10]` of which columns `3 .. 3 + n_out` are the product.
fn part_of_rows(tile: Tile, dtype: Dtype, x: &[f32], w: &[f32], n_in: usize) -> Vec<u32> {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    let (w, _) = upload_weights(dtype, w);
    let x = upload(x);
    let y = poisoned(n_rows * (n_out + 10));
    let halves = Halves::of(&x, n_rows, n_in);
    let params = matmul::Params::dense(n_rows as u32, n_out as u32, n_in as u32);
    let params = matmul::Params { y_stride: n_out as u32 + 10, y_offset: 3, ..params };
    run(|recorder| matmul::record(recorder, dtype, tile, params, halves.rows(), w.whole(), y.whole()));
    download(y.whole())
}

/// Of an operation, with units of weights as they come and wherever they lie.
fn forms(operation: Operation, weights: Dtype) -> Vec<Form> {
    let tiles = some_tiles(operation).into_iter();
    tiles
        .flat_map(|tile| [false, true].map(|aligned_slots| Form::Cooperative { weights, tile, aligned_slots }))
        .collect()
}

fn expert_trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for dtype in DTYPES {
        trials.extend([
            Trial::test(
                format!("cooperative::expert_gate_up_matches_reference_and_no_tile_changes_bits::{}", dtype.name()),
                move || {
                    expert_gate_up::matches_reference(dtype, &SHAPES, &forms(Operation::GateUp, dtype), tolerances);
                    Ok(())
                },
            ),
            Trial::test(
                format!("cooperative::expert_down_matches_reference_and_no_tile_changes_bits::{}", dtype.name()),
                move || {
                    expert_down::matches_reference(dtype, &SHAPES, &forms(Operation::Down, dtype), tolerances);
                    Ok(())
                },
            ),
        ]);
    }
    // What the trials above do, with so few tiles and shapes that emulated matrices take seconds.
    const FEW_SHAPES: [Extents; 3] = [SHAPES[2], SHAPES[5], SHAPES[11]];
    let form = |tile| Form::Cooperative { weights: Dtype::Bf16, tile, aligned_slots: true };
    let with_others = move |others: [Tile; 2]| [Tile::solo(16, 16, 16, 1), others[0], others[1]].map(form);
    trials.extend([
        Trial::test("cooperative::few_rows_gate_up_matches_reference_and_no_tile_changes_bits", move || {
            let forms = with_others([Tile::solo(16, 16, 32, 1), Tile::direct(32, 16, 16, 16, 16)]);
            expert_gate_up::matches_reference(Dtype::Bf16, &FEW_SHAPES, &forms, tolerances);
            Ok(())
        }),
        Trial::test("cooperative::few_rows_down_matches_reference_and_no_tile_changes_bits", move || {
            let forms = with_others([Tile::solo(32, 32, 16, 1), Tile::direct(16, 32, 16, 16, 16)]);
            expert_down::matches_reference(Dtype::Bf16, &FEW_SHAPES, &forms, tolerances);
            Ok(())
        }),
        Trial::test("cooperative::expert_gate_up_leaves_the_rows_of_absent_experts_as_they_are", || {
            expert_gate_up::leaves_absent_rows(&forms(Operation::GateUp, Dtype::F16));
            Ok(())
        }),
        Trial::test("cooperative::expert_down_leaves_the_rows_of_absent_experts_as_they_are", || {
            expert_down::leaves_absent_rows(&forms(Operation::Down, Dtype::F16));
            Ok(())
        }),
    ]);
    trials
}

pub fn trials() -> Vec<Trial> {
    // With emulated matrices all of them take a quarter of an hour: those that need no large product or few tiles stand for them.
    let quick = |trial: &Trial| {
        trial.name().ends_with("accumulate_adds_the_finished_sum") || trial.name().starts_with("cooperative::few_rows_")
    };
    let (few, many) = matmul_trials().into_iter().chain(expert_trials()).partition(quick);
    let mut trials = if_cooperative(few);
    trials.extend(if_matrices(many));
    trials.extend(if_workgroup_matrices(workgroup_trials()));
    trials
}
