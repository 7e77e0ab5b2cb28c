use fulmen::checkpoint::Dtype;
use fulmen::gpu::Variant;
use fulmen::kernels::expert_gate_up::{Bindings, EXPERT_GATE_UP, Params, record};
use fulmen::kernels::slabs::Place;
use fulmen::reference::expert_gate_up::{Finish, expert_gate_up};
use fulmen::reference::matmul::matmul;
use libtest_mimic::Trial;

use super::experts::{Matrices, Routing, SHAPES, matrices};
use crate::common::{DTYPES, Random, assert_close, assert_untouched, download, poisoned, run, upload};

/// `[T * A, F]` by sorted position, as words. What lies behind it stayed untouched.
fn gate_up(
    variant: &Variant,
    x: &[f32],
    d_model: usize,
    routing: &Routing,
    places: &[Place],
    gate: &Matrices,
    up: &Matrices,
) -> Vec<u32> {
    let expert_width = gate.values[0].len() / d_model;
    let n_out = routing.n_assignments() * expert_width;
    let (x, permutation, offsets) = (upload(x), upload(&routing.permutation), upload(&routing.offsets));
    let (places, h) = (upload(places), poisoned(n_out + 70));
    let (n_assignments, n_experts) = (routing.n_assignments() as u32, gate.values.len() as u32);
    let params = Params::plain(n_assignments, n_experts, routing.n_chosen as u32, d_model as u32, expert_width as u32);
    let bindings = Bindings {
        x: x.whole(),
        permutation: permutation.whole(),
        offsets: offsets.whole(),
        places: places.whole(),
        h: h.whole(),
        gate: gate.slabs(),
        up: up.slabs(),
        bias: places.whole(),
    };
    run(|recorder| record(recorder, variant, params, bindings));
    let mut words: Vec<u32> = download(h.whole());
    (n_out..words.len()).for_each(|i| assert_untouched("expert_gate_up", &words, i));
    words.truncate(n_out);
    words
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|word| f32::from_bits(*word)).collect()
}

/// What f32 may be off by. Both sums of D terms: `D * 2^-24 * sum |x w|`. silu grows by at most 1.1 times its argument, the
/// product takes each error times the other factor, and exp has 3 + 2 |g| units in the last place, where |g| stays below 16.
fn tolerances(x: &[f32], d_model: usize, routing: &Routing, gate: &Matrices, up: &Matrices) -> Vec<f32> {
    let magnitudes = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<_>>();
    let rounding = d_model as f32 * 2f32.powi(-24);
    let mut allowed = Vec::new();
    for (position, assignment) in routing.permutation.iter().enumerate() {
        let expert = routing.expert_of(position);
        let x = &x[*assignment as usize / routing.n_chosen * d_model..][..d_model];
        let sums = |w: &[f32]| (matmul(x, w, d_model), matmul(&magnitudes(x), &magnitudes(w), d_model));
        let ((gate, gate_sizes), (up, up_sizes)) = (sums(&gate.values[expert]), sums(&up.values[expert]));
        for f in 0..gate.len() {
            let (gate_error, up_error) = (1.1 * rounding * gate_sizes[f], rounding * up_sizes[f]);
            let product = gate[f].abs() * up[f].abs();
            allowed.push(gate_error * up[f].abs() + up_error * gate[f].abs() + gate_error * up_error + 2e-6 * product);
        }
    }
    allowed
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = DTYPES
        .into_iter()
        .map(|dtype| {
            Trial::test(format!("expert_gate_up::matches_reference_with_every_tile::{}", dtype.name()), move || {
                for (n_rows, n_chosen, n_experts, d_model, expert_width) in SHAPES {
                    let mut random = Random::new((n_rows * 1000 + d_model) as u64);
                    let x = random.values(n_rows * d_model);
                    let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
                    let (kinds, places) = matrices(&mut random, dtype, n_experts, expert_width * d_model, 2, &[]);
                    let (gate, up) = (&kinds[0], &kinds[1]);
                    let (offsets, permutation) = (&routing.offsets, &routing.permutation);
                    let matrices = [&gate.values[..], &up.values];
                    let want = expert_gate_up(&x, d_model, n_chosen, offsets, permutation, matrices, Finish::PLAIN);
                    let allowed = tolerances(&x, d_model, &routing, gate, up);
                    let mut first: Option<Vec<u32>> = None;
                    for variant in EXPERT_GATE_UP.variants().iter().filter(|variant| variant.weights == dtype) {
                        let what = format!("{variant:?} T{n_rows} A{n_chosen} E{n_experts} D{d_model} F{expert_width}");
                        let got = gate_up(variant, &x, d_model, &routing, &places, gate, up);
                        assert_close(&what, &floats(&got), &want, |i| allowed[i]);
                        assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{what}: the tile changed bits");
                    }
                }
                Ok(())
            })
        })
        .collect();
    trials.extend([
        Trial::test("expert_gate_up::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, n_chosen, n_experts, d_model, expert_width) = (41, 2, 5, 37, 45);
            let mut random = Random::new(21);
            let x = random.values(n_rows * d_model);
            let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
            let (kinds, places) = matrices(&mut random, Dtype::Bf16, n_experts, expert_width * d_model, 2, &[]);
            let variant = Variant::new(Dtype::Bf16);
            let together = gate_up(&variant, &x, d_model, &routing, &places, &kinds[0], &kinds[1]);
            for row in 0..n_rows {
                let own = routing.of_row(row);
                let x = &x[row * d_model..][..d_model];
                let alone = gate_up(&variant, x, d_model, &own, &places, &kinds[0], &kinds[1]);
                for (position, rank) in own.permutation.iter().enumerate() {
                    let assignment = (row * n_chosen) as u32 + rank;
                    let there = routing.permutation.iter().position(|a| *a == assignment).expect("it is sorted in");
                    assert_eq!(
                        alone[position * expert_width..][..expert_width],
                        together[there * expert_width..][..expert_width]
                    );
                }
            }
            Ok(())
        }),
        Trial::test("expert_gate_up::leaves_the_rows_of_absent_experts_as_they_are", || {
            let (n_rows, n_chosen, n_experts, d_model, expert_width) = (50, 2, 6, 19, 33);
            for absent in [&[0][..], &[1, 2], &[3], &[0, 1, 2, 3, 4, 5]] {
                let seeded = || Random::new(22);
                let x = seeded().values(n_rows * d_model);
                let routing = Routing::random(&mut seeded(), n_rows, n_chosen, n_experts);
                let make = |absent| matrices(&mut seeded(), Dtype::F16, n_experts, expert_width * d_model, 2, absent);
                let (all, all_places) = make(&[]);
                let (_, places) = make(absent);
                for variant in EXPERT_GATE_UP.variants().iter().filter(|variant| variant.weights == Dtype::F16) {
                    let full = gate_up(variant, &x, d_model, &routing, &all_places, &all[0], &all[1]);
                    let got = gate_up(variant, &x, d_model, &routing, &places, &all[0], &all[1]);
                    for i in 0..got.len() {
                        if absent.contains(&routing.expert_of(i / expert_width)) {
                            assert_untouched("expert_gate_up", &got, i);
                        } else {
                            assert_eq!(got[i], full[i], "element {i}, {absent:?} absent");
                        }
                    }
                }
            }
            Ok(())
        }),
        // A row that overflowed must not reach its neighbours through the tile they share.
        Trial::test("expert_gate_up::keeps_nan_in_its_row", || {
            let (n_rows, d_model, expert_width) = (11, 19, 33);
            let mut random = Random::new(23);
            let mut x = random.values(n_rows * d_model);
            let routing = Routing::random(&mut random, n_rows, 1, 1);
            let (kinds, places) = matrices(&mut random, Dtype::F32, 1, expert_width * d_model, 2, &[]);
            let variant = Variant::new(Dtype::F32);
            let clean = gate_up(&variant, &x, d_model, &routing, &places, &kinds[0], &kinds[1]);
            x[3 * d_model + 18] = f32::NAN;
            let got = gate_up(&variant, &x, d_model, &routing, &places, &kinds[0], &kinds[1]);
            for row in 0..n_rows {
                let (got, clean) =
                    (&got[row * expert_width..][..expert_width], &clean[row * expert_width..][..expert_width]);
                if row == 3 {
                    assert!(floats(got).iter().all(|v| v.is_nan()), "row 3: {got:?}");
                } else {
                    assert_eq!(got, clean, "row {row}");
                }
            }
            Ok(())
        }),
    ]);
    trials
}
