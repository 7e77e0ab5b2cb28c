use fulmen::checkpoint::Dtype;
use fulmen::gpu::Variant;
use fulmen::kernels::cooperative;
use fulmen::kernels::expert_down::{Bindings, EXPERT_DOWN, Params, record};
use fulmen::kernels::slabs::Place;
use fulmen::reference::expert_down::expert_down;
use libtest_mimic::Trial;

use super::experts::{
    Extents, Form, Halves, Matrices, ProductError, Routing, SHAPES, f32_error, matrices, matrices_at,
};
use crate::common::{DTYPES, Random, assert_close, assert_untouched, download, poisoned, run, upload};

/// `[T * A, D]` by assignment, as words. What lies behind it stayed untouched.
fn down(form: &Form, h: &[f32], expert_width: usize, routing: &Routing, places: &[Place], down: &Matrices) -> Vec<u32> {
    let d_model = down.values[0].len() / expert_width;
    let n_out = routing.n_assignments() * d_model;
    let (h, permutation, offsets) = (upload(h), upload(&routing.permutation), upload(&routing.offsets));
    let (places, y) = (upload(places), poisoned(n_out + 70));
    let (n_assignments, n_experts) = (routing.n_assignments() as u32, down.values.len() as u32);
    let params = Params::plain(n_assignments, n_experts, d_model as u32, expert_width as u32);
    let (permutation, offsets, bias) = (permutation.whole(), offsets.whole(), places.whole());
    let (places, down) = (places.whole(), down.slabs());
    match form {
        Form::Portable(variant) => {
            let bindings = Bindings { h: h.whole(), permutation, offsets, places, y: y.whole(), down, bias };
            run(|recorder| record(recorder, variant, params, bindings));
        }
        Form::Cooperative { weights, tile, aligned_slots } => {
            let halves = match tile.takes_rows_by_expert() {
                true => Halves::by_expert(&h, true, routing, expert_width),
                false => Halves::of(&h, routing.n_assignments(), expert_width),
            };
            let bindings = Bindings { h: halves.rows(), permutation, offsets, places, y: y.whole(), down, bias };
            run(|recorder| {
                cooperative::expert_down::record(recorder, (*weights, *aligned_slots), *tile, params, bindings)
            });
        }
    }
    let mut words: Vec<u32> = download(y.whole());
    (n_out..words.len()).for_each(|i| assert_untouched("expert_down", &words, i));
    words.truncate(n_out);
    words
}

/// Every form against the reference, and against the first one bit for bit.
pub fn matches_reference(dtype: Dtype, shapes: &[Extents], forms: &[Form], error: ProductError) {
    let alignment = forms.iter().map(Form::alignment).max().expect("there are forms");
    for &(n_rows, n_chosen, n_experts, d_model, expert_width) in shapes {
        let mut random = Random::new((n_rows * 1000 + d_model) as u64);
        let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
        let h = random.values(routing.n_assignments() * expert_width);
        let elements = d_model * expert_width;
        let (kinds, places) = matrices_at(alignment, &mut random, dtype, n_experts, elements, 1, &[]);
        let matrices = &kinds[0];
        let (offsets, permutation) = (&routing.offsets, &routing.permutation);
        let want = expert_down(&h, expert_width, d_model, offsets, permutation, &matrices.values, None);
        let mut allowed = vec![0.0; want.len()];
        for (position, assignment) in permutation.iter().enumerate() {
            let w = &matrices.values[routing.expert_of(position)];
            let off = error(&h[position * expert_width..][..expert_width], w, expert_width);
            allowed[*assignment as usize * d_model..][..d_model].copy_from_slice(&off);
        }
        let mut first: Option<Vec<u32>> = None;
        for form in forms {
            let what = format!("{form:?} T{n_rows} A{n_chosen} E{n_experts} D{d_model} F{expert_width}");
            let got = down(form, &h, expert_width, &routing, &places, matrices);
            let floats: Vec<f32> = got.iter().map(|word| f32::from_bits(*word)).collect();
            assert_close(&what, &floats, &want, |i| allowed[i]);
            assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{what}: the tile changed bits");
        }
    }
}

/// What belongs to an expert without a place is not written, and all else as if it had one. Forms for f16.
pub fn leaves_absent_rows(forms: &[Form]) {
    let (n_rows, n_chosen, n_experts, d_model, expert_width) = (50, 2, 6, 33, 19);
    for absent in [&[0][..], &[1, 2], &[3], &[0, 1, 2, 3, 4, 5]] {
        let seeded = || Random::new(32);
        let routing = Routing::random(&mut seeded(), n_rows, n_chosen, n_experts);
        let h = seeded().values(routing.n_assignments() * expert_width);
        let make = |absent| matrices(&mut seeded(), Dtype::F16, n_experts, d_model * expert_width, 1, absent);
        let (all, all_places) = make(&[]);
        let (_, places) = make(absent);
        for form in forms {
            let full = down(form, &h, expert_width, &routing, &all_places, &all[0]);
            let got = down(form, &h, expert_width, &routing, &places, &all[0]);
            for i in 0..got.len() {
                if absent.contains(&(routing.ids[i / d_model] as usize)) {
                    assert_untouched("expert_down", &got, i);
                } else {
                    assert_eq!(got[i], full[i], "element {i}, {absent:?} absent");
                }
            }
        }
    }
}

/// The portable kernel's variants.
fn forms(dtype: Dtype) -> Vec<Form> {
    EXPERT_DOWN.variants().into_iter().filter(|variant| variant.weights == dtype).map(Form::Portable).collect()
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = DTYPES
        .into_iter()
        .map(|dtype| {
            Trial::test(format!("expert_down::matches_reference_with_every_tile::{}", dtype.name()), move || {
                matches_reference(dtype, &SHAPES, &forms(dtype), f32_error);
                Ok(())
            })
        })
        .collect();
    trials.extend([
        Trial::test("expert_down::a_row_alone_has_the_bits_it_has_among_others", || {
            let (n_rows, n_chosen, n_experts, d_model, expert_width) = (41, 2, 5, 45, 37);
            let mut random = Random::new(31);
            let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
            let h = random.values(routing.n_assignments() * expert_width);
            let (kinds, places) = matrices(&mut random, Dtype::Bf16, n_experts, d_model * expert_width, 1, &[]);
            let form = Form::Portable(Variant::new(Dtype::Bf16));
            let together = down(&form, &h, expert_width, &routing, &places, &kinds[0]);
            for (position, assignment) in routing.permutation.iter().enumerate() {
                let own = Routing::new(vec![routing.expert_of(position) as u32], 1, n_experts);
                let h = &h[position * expert_width..][..expert_width];
                let alone = down(&form, h, expert_width, &own, &places, &kinds[0]);
                assert_eq!(alone, together[*assignment as usize * d_model..][..d_model], "position {position}");
            }
            Ok(())
        }),
        Trial::test("expert_down::leaves_the_rows_of_absent_experts_as_they_are", || {
            leaves_absent_rows(&forms(Dtype::F16));
            Ok(())
        }),
    ]);
    trials
}
