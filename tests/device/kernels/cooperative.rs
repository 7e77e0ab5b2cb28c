//! Products on cooperative matrices: against the references, to what f16 operands may be off by, and against each other bit for bit: no
//! tile and no number of rows changes a sum. Ignored where the adapter has no such matrices.

use fulmen::checkpoint::Dtype;
use fulmen::gpu::Buffer;
use fulmen::kernels::cooperative::{Tile, expert_down, expert_gate_up, matmul};
use fulmen::kernels::half_rows::{self, HalfRows, padded};
use fulmen::kernels::slabs::Place;
use fulmen::kernels::{expert_down as portable_down, expert_gate_up as portable_gate_up};
use fulmen::reference::expert_down::expert_down as reference_down;
use fulmen::reference::expert_gate_up::{Finish, expert_gate_up as reference_gate_up};
use fulmen::reference::matmul::matmul as reference_matmul;
use fulmen::tune::{Operation, candidates};
use libtest_mimic::Trial;

use super::experts::{Matrices, Routing, SHAPES, matrices};
use crate::common::{
    DTYPES, Random, assert_close, assert_untouched, bits, download, if_cooperative, poisoned, run, upload,
    upload_weights,
};

/// The buffers that rows of f16 take.
struct Halves {
    rows: Buffer,
    scales: Buffer,
}

impl Halves {
    fn new(n_rows: usize, n_in: usize) -> Self {
        Self { rows: poisoned(n_rows * padded(n_in as u32) as usize / 2), scales: poisoned(n_rows) }
    }

    fn rows(&self) -> HalfRows<'_> {
        HalfRows { rows: self.rows.whole(), scales: self.scales.whole() }
    }
}

/// `[T, n_out]`, with `residual` to add to.
fn product(tile: Tile, dtype: Dtype, x: &[f32], w: &[f32], n_in: usize, residual: Option<&[f32]>) -> Vec<f32> {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    let (w, _) = upload_weights(dtype, w);
    let x = upload(x);
    let y = residual.map_or_else(|| poisoned(n_rows * n_out + 70), upload);
    let halves = Halves::new(n_rows, n_in);
    let params = matmul::Params::dense(n_rows as u32, n_out as u32, n_in as u32);
    let params = matmul::Params { accumulate: residual.is_some() as u32, ..params };
    run(|recorder| {
        half_rows::record(recorder, half_rows::Params::dense(n_rows as u32, n_in as u32), x.whole(), halves.rows())?;
        matmul::record(recorder, dtype, tile, params, halves.rows(), w.whole(), y.whole())
    });
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

/// A few of them, so that a trial ends in seconds: bits are compared between all at one size.
fn some_tiles(operation: Operation) -> Vec<Tile> {
    candidates::all(operation).into_iter().step_by(5).collect()
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
                let tiles =
                    if n_in == 256 { candidates::all(Operation::Matmul) } else { some_tiles(Operation::Matmul) };
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
            let large = candidates::all(Operation::Matmul)
                .into_iter()
                .find(|tile| tile.rows == 128)
                .expect("there is a large one");
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

/// `[T * A, F]` by sorted position, as words.
fn gate_up(
    tile: Tile,
    dtype: Dtype,
    x: &[f32],
    d_model: usize,
    routing: &Routing,
    places: &[Place],
    [gate, up]: [&Matrices; 2],
) -> Vec<u32> {
    let expert_width = gate.values[0].len() / d_model;
    let n_out = routing.n_assignments() * expert_width;
    let n_rows = x.len() / d_model;
    let (x, permutation, offsets) = (upload(x), upload(&routing.permutation), upload(&routing.offsets));
    let (places, h) = (upload(places), poisoned(n_out + 70));
    let halves = Halves::new(n_rows, d_model);
    let (n, e, a) = (routing.n_assignments() as u32, gate.values.len() as u32, routing.n_chosen as u32);
    let params = portable_gate_up::Params::plain(n, e, a, d_model as u32, expert_width as u32);
    let bindings = expert_gate_up::Bindings {
        x: halves.rows(),
        permutation: permutation.whole(),
        offsets: offsets.whole(),
        places: places.whole(),
        h: h.whole(),
        gate: gate.slabs(),
        up: up.slabs(),
        bias: places.whole(),
    };
    run(|recorder| {
        half_rows::record(recorder, half_rows::Params::dense(n_rows as u32, d_model as u32), x.whole(), halves.rows())?;
        expert_gate_up::record(recorder, (dtype, false), tile, params, bindings)
    });
    let mut words: Vec<u32> = download(h.whole());
    (n_out..words.len()).for_each(|i| assert_untouched("cooperative expert_gate_up", &words, i));
    words.truncate(n_out);
    words
}

/// `[T * A, D]` by assignment, as words.
fn down(
    tile: Tile,
    dtype: Dtype,
    h: &[f32],
    expert_width: usize,
    routing: &Routing,
    places: &[Place],
    down: &Matrices,
) -> Vec<u32> {
    let d_model = down.values[0].len() / expert_width;
    let n_out = routing.n_assignments() * d_model;
    let (h, permutation, offsets) = (upload(h), upload(&routing.permutation), upload(&routing.offsets));
    let (places, y) = (upload(places), poisoned(n_out + 70));
    let halves = Halves::new(routing.n_assignments(), expert_width);
    let (n, e) = (routing.n_assignments() as u32, down.values.len() as u32);
    let params = portable_down::Params::plain(n, e, d_model as u32, expert_width as u32);
    let bindings = expert_down::Bindings {
        h: halves.rows(),
        permutation: permutation.whole(),
        offsets: offsets.whole(),
        places: places.whole(),
        y: y.whole(),
        down: down.slabs(),
        bias: places.whole(),
    };
    run(|recorder| {
        half_rows::record(recorder, half_rows::Params::dense(n, expert_width as u32), h.whole(), halves.rows())?;
        expert_down::record(recorder, (dtype, false), tile, params, bindings)
    });
    let mut words: Vec<u32> = download(y.whole());
    (n_out..words.len()).for_each(|i| assert_untouched("cooperative expert_down", &words, i));
    words.truncate(n_out);
    words
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|word| f32::from_bits(*word)).collect()
}

fn expert_trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for dtype in DTYPES {
        trials.push(Trial::test(
            format!("cooperative::expert_gate_up_matches_reference_and_no_tile_changes_bits::{}", dtype.name()),
            move || {
                for (n_rows, n_chosen, n_experts, d_model, expert_width) in SHAPES {
                    let mut random = Random::new((n_rows * 1000 + d_model) as u64);
                    let x = random.values(n_rows * d_model);
                    let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
                    let (kinds, places) = matrices(&mut random, dtype, n_experts, expert_width * d_model, 2, &[]);
                    let (gate, up) = (&kinds[0], &kinds[1]);
                    let (offsets, permutation) = (&routing.offsets, &routing.permutation);
                    let values = [&gate.values[..], &up.values];
                    let want = reference_gate_up(&x, d_model, n_chosen, offsets, permutation, values, Finish::PLAIN);
                    let mut allowed = Vec::new();
                    for (position, assignment) in permutation.iter().enumerate() {
                        let expert = routing.expert_of(position);
                        let x = &x[*assignment as usize / n_chosen * d_model..][..d_model];
                        let sums = |w: &[f32]| (reference_matmul(x, w, d_model), tolerances(x, w, d_model));
                        let ((gate, gate_off), (up, up_off)) = (sums(&gate.values[expert]), sums(&up.values[expert]));
                        for f in 0..expert_width {
                            let (g, u) = (1.1 * gate_off[f], up_off[f]);
                            let product = gate[f].abs() * up[f].abs();
                            allowed.push(g * up[f].abs() + u * gate[f].abs() + g * u + 2e-6 * product);
                        }
                    }
                    let mut first: Option<Vec<u32>> = None;
                    for tile in some_tiles(Operation::GateUp) {
                        let what = format!("{tile} T{n_rows} A{n_chosen} E{n_experts} D{d_model} F{expert_width}");
                        let got = gate_up(tile, dtype, &x, d_model, &routing, &places, [gate, up]);
                        assert_close(&what, &floats(&got), &want, |i| allowed[i]);
                        assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{what}: the tile changed bits");
                    }
                }
                Ok(())
            },
        ));
        trials.push(Trial::test(
            format!("cooperative::expert_down_matches_reference_and_no_tile_changes_bits::{}", dtype.name()),
            move || {
                for (n_rows, n_chosen, n_experts, d_model, expert_width) in SHAPES {
                    let mut random = Random::new((n_rows * 1000 + d_model) as u64);
                    let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
                    let h = random.values(routing.n_assignments() * expert_width);
                    let (kinds, places) = matrices(&mut random, dtype, n_experts, d_model * expert_width, 1, &[]);
                    let (offsets, permutation) = (&routing.offsets, &routing.permutation);
                    let want = reference_down(&h, expert_width, d_model, offsets, permutation, &kinds[0].values, None);
                    let mut allowed = vec![0.0; want.len()];
                    for (position, assignment) in permutation.iter().enumerate() {
                        let w = &kinds[0].values[routing.expert_of(position)];
                        let off = tolerances(&h[position * expert_width..][..expert_width], w, expert_width);
                        allowed[*assignment as usize * d_model..][..d_model].copy_from_slice(&off);
                    }
                    let mut first: Option<Vec<u32>> = None;
                    for tile in some_tiles(Operation::Down) {
                        let what = format!("{tile} T{n_rows} A{n_chosen} E{n_experts} D{d_model} F{expert_width}");
                        let got = down(tile, dtype, &h, expert_width, &routing, &places, &kinds[0]);
                        assert_close(&what, &floats(&got), &want, |i| allowed[i]);
                        assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{what}: the tile changed bits");
                    }
                }
                Ok(())
            },
        ));
    }
    trials.push(Trial::test("cooperative::leaves_the_rows_of_absent_experts_as_they_are", || {
        let (n_rows, n_chosen, n_experts, d_model, expert_width) = (50, 2, 6, 24, 33);
        let seeded = || Random::new(35);
        let x = seeded().values(n_rows * d_model);
        let routing = Routing::random(&mut seeded(), n_rows, n_chosen, n_experts);
        let make = |absent| matrices(&mut seeded(), Dtype::F16, n_experts, expert_width * d_model, 2, absent);
        let (all, all_places) = make(&[]);
        for absent in [&[0][..], &[1, 2], &[0, 1, 2, 3, 4, 5]] {
            let (_, places) = make(absent);
            for tile in some_tiles(Operation::GateUp) {
                let run =
                    |places: &[Place]| gate_up(tile, Dtype::F16, &x, d_model, &routing, places, [&all[0], &all[1]]);
                let (full, got) = (run(&all_places), run(&places));
                for i in 0..got.len() {
                    if absent.contains(&routing.expert_of(i / expert_width)) {
                        assert_untouched("cooperative expert_gate_up", &got, i);
                    } else {
                        assert_eq!(got[i], full[i], "element {i}, {absent:?} absent");
                    }
                }
            }
        }
        Ok(())
    }));
    trials
}

pub fn trials() -> Vec<Trial> {
    if_cooperative(matmul_trials().into_iter().chain(expert_trials()).collect())
}
