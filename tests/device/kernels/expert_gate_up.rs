use fulmen::checkpoint::Dtype;
use fulmen::gpu::Variant;
use fulmen::kernels::cooperative;
use fulmen::kernels::expert_gate_up::{Bindings, EXPERT_GATE_UP, Params, record};
use fulmen::kernels::slabs::Place;
use fulmen::reference::expert_gate_up::{Finish, expert_gate_up};
use fulmen::reference::matmul::matmul;
use libtest_mimic::Trial;

use super::experts::{
    Extents, Form, Halves, Matrices, ProductError, Routing, SHAPES, f32_error, matrices, matrices_at,
};
use crate::common::{DTYPES, Random, assert_close, assert_untouched, download, poisoned, run, upload};

/// `[T * A, F]` by sorted position, as words. What lies behind it stayed untouched.
fn gate_up(
    form: &Form,
    x: &[f32],
    d_model: usize,
    routing: &Routing,
    places: &[Place],
    gate: &Matrices,
    up: &Matrices,
) -> Vec<u32> {
    let expert_width = gate.values[0].len() / d_model;
    let n_out = routing.n_assignments() * expert_width;
    let n_rows = x.len() / d_model;
    let (x, permutation, offsets) = (upload(x), upload(&routing.permutation), upload(&routing.offsets));
    let (places, h) = (upload(places), poisoned(n_out + 70));
    let (n_assignments, n_experts) = (routing.n_assignments() as u32, gate.values.len() as u32);
    let params = Params::plain(n_assignments, n_experts, routing.n_chosen as u32, d_model as u32, expert_width as u32);
    let (permutation, offsets, bias) = (permutation.whole(), offsets.whole(), places.whole());
    let (places, gate, up) = (places.whole(), gate.slabs(), up.slabs());
    match form {
        Form::Portable(variant) => {
            let bindings = Bindings { x: x.whole(), permutation, offsets, places, h: h.whole(), gate, up, bias };
            run(|recorder| record(recorder, variant, params, bindings));
        }
        Form::Cooperative { weights, tile, aligned_slots } => {
            let halves = match tile.takes_rows_by_expert() {
                true => Halves::by_expert(&x, false, routing, d_model),
                false => Halves::of(&x, n_rows, d_model),
            };
            let bindings = Bindings { x: halves.rows(), permutation, offsets, places, h: h.whole(), gate, up, bias };
            run(|recorder| {
                cooperative::expert_gate_up::record(recorder, (*weights, *aligned_slots), *tile, params, bindings)
            });
        }
    }
    let mut words: Vec<u32> = download(h.whole());
    (n_out..words.len()).for_each(|i| assert_untouched("expert_gate_up", &words, i));
    words.truncate(n_out);
    words
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|word| f32::from_bits(*word)).collect()
}

/// What it may be off by where both products are off by `error`. silu grows by at most 1.1 times its argument, the product takes each
/// error times the other factor, and exp has 3 + 2 |g| units in the last place, where |g| stays below 16.
fn tolerances(
    error: ProductError,
    x: &[f32],
    d_model: usize,
    routing: &Routing,
    gate: &Matrices,
    up: &Matrices,
) -> Vec<f32> {
    let mut allowed = Vec::new();
    for (position, assignment) in routing.permutation.iter().enumerate() {
        let expert = routing.expert_of(position);
        let x = &x[*assignment as usize / routing.n_chosen * d_model..][..d_model];
        let sums = |w: &[f32]| (matmul(x, w, d_model), error(x, w, d_model));
        let ((gate, gate_error), (up, up_error)) = (sums(&gate.values[expert]), sums(&up.values[expert]));
        for f in 0..gate.len() {
            let (gate_error, up_error) = (1.1 * gate_error[f], up_error[f]);
            let product = gate[f].abs() * up[f].abs();
            allowed.push(gate_error * up[f].abs() + up_error * gate[f].abs() + gate_error * up_error + 2e-6 * product);
        }
    }
    allowed
}

/// Every form against the reference, and against the first one bit for bit.
pub fn matches_reference(dtype: Dtype, shapes: &[Extents], forms: &[Form], error: ProductError) {
    let alignment = forms.iter().map(Form::alignment).max().expect("there are forms");
    for &(n_rows, n_chosen, n_experts, d_model, expert_width) in shapes {
        let mut random = Random::new((n_rows * 1000 + d_model) as u64);
        let x = random.values(n_rows * d_model);
        let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
        let elements = expert_width * d_model;
        let (kinds, places) = matrices_at(alignment, &mut random, dtype, n_experts, elements, 2, &[]);
        let (gate, up) = (&kinds[0], &kinds[1]);
        let (offsets, permutation) = (&routing.offsets, &routing.permutation);
        let values = [&gate.values[..], &up.values];
        let want = expert_gate_up(&x, d_model, n_chosen, offsets, permutation, values, Finish::PLAIN);
        let allowed = tolerances(error, &x, d_model, &routing, gate, up);
        let mut first: Option<Vec<u32>> = None;
        for form in forms {
            let what = format!("{form:?} T{n_rows} A{n_chosen} E{n_experts} D{d_model} F{expert_width}");
            let got = gate_up(form, &x, d_model, &routing, &places, gate, up);
            assert_close(&what, &floats(&got), &want, |i| allowed[i]);
            assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{what}: the tile changed bits");
        }
    }
}

/// What belongs to an expert without a place is not written, and all else as if it had one. Forms for f16.
pub fn leaves_absent_rows(forms: &[Form]) {
    let (n_rows, n_chosen, n_experts, d_model, expert_width) = (50, 2, 6, 19, 33);
    for absent in [&[0][..], &[1, 2], &[3], &[0, 1, 2, 3, 4, 5]] {
        let seeded = || Random::new(22);
        let x = seeded().values(n_rows * d_model);
        let routing = Routing::random(&mut seeded(), n_rows, n_chosen, n_experts);
        let make = |absent| matrices(&mut seeded(), Dtype::F16, n_experts, expert_width * d_model, 2, absent);
        let (all, all_places) = make(&[]);
        let (_, places) = make(absent);
        for form in forms {
            let full = gate_up(form, &x, d_model, &routing, &all_places, &all[0], &all[1]);
            let got = gate_up(form, &x, d_model, &routing, &places, &all[0], &all[1]);
            for i in 0..got.len() {
                if absent.contains(&routing.expert_of(i / expert_width)) {
                    assert_untouched("expert_gate_up", &got, i);
                } else {
                    assert_eq!(got[i], full[i], "element {i}, {absent:?} absent");
                }
            }
        }
    }
}

/// The portable kernel's variants.
fn forms(dtype: Dtype) -> Vec<Form> {
    EXPERT_GATE_UP.variants().into_iter().filter(|variant| variant.weights == dtype).map(Form::Portable).collect()
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = DTYPES
        .into_iter()
        .map(|dtype| {
            Trial::test(format!("expert_gate_up::matches_reference_with_every_tile::{}", dtype.name()), move || {
                matches_reference(dtype, &SHAPES, &forms(dtype), f32_error);
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
            let form = Form::Portable(Variant::new(Dtype::Bf16));
            let together = gate_up(&form, &x, d_model, &routing, &places, &kinds[0], &kinds[1]);
            for row in 0..n_rows {
                let own = routing.of_row(row);
                let x = &x[row * d_model..][..d_model];
                let alone = gate_up(&form, x, d_model, &own, &places, &kinds[0], &kinds[1]);
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
            leaves_absent_rows(&forms(Dtype::F16));
            Ok(())
        }),
        // A row that overflowed must not reach its neighbours through the tile they share.
        Trial::test("expert_gate_up::keeps_nan_in_its_row", || {
            let (n_rows, d_model, expert_width) = (11, 19, 33);
            let mut random = Random::new(23);
            let mut x = random.values(n_rows * d_model);
            let routing = Routing::random(&mut random, n_rows, 1, 1);
            let (kinds, places) = matrices(&mut random, Dtype::F32, 1, expert_width * d_model, 2, &[]);
            let form = Form::Portable(Variant::new(Dtype::F32));
            let clean = gate_up(&form, &x, d_model, &routing, &places, &kinds[0], &kinds[1]);
            x[3 * d_model + 18] = f32::NAN;
            let got = gate_up(&form, &x, d_model, &routing, &places, &kinds[0], &kinds[1]);
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
