//! Experts whose weights lie otherwise than one tensor for each matrix, MXFP4 among them. Sums have one order whatever the
//! layout, so results must have the very bits that the same values give in plain f32.

use fulmen::checkpoint::Dtype;
use fulmen::gpu::{Access::*, Buffer, Kernel, Part, Slice, Variant};
use fulmen::kernels::expert_down::{self, EXPERT_DOWN};
use fulmen::kernels::expert_gate_up::{self, EXPERT_GATE_UP};
use fulmen::kernels::slabs::{Layout, N_SLABS, Place};
use fulmen::model::expert_layout::MXFP4_BLOCK;
use fulmen::model::{Activation, ExpertLayout, Shape};
use fulmen::reference::expert_down::expert_down;
use fulmen::reference::expert_gate_up::{Finish, expert_gate_up};
use fulmen::reference::mxfp4::{mxfp4, mxfp4_value};
use libtest_mimic::Trial;

use super::experts::Routing;
use crate::common::{Random, assert_close, bits, download, poisoned, run, upload, weight_bytes};

/// Writes the bits of every code under every scale.
static DECODE: Kernel = Kernel {
    name: "mxfp4 decoder",
    parts: &[
        Part::Weight,
        Part::MadeFor(|_| {
            "
@group(0) @binding(0) var<storage, read> words: array<vec2<u32>>; // eight codes, four scales
@group(0) @binding(1) var<storage, read_write> one_by_one: array<u32>;
@group(0) @binding(2) var<storage, read_write> by_quads: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let word = words[id.x];
    let scale = id.y; // which of the four
    for (var i = 0u; i < 8u; i++) {
        let at = (id.x * 4u + scale) * 8u + i;
        one_by_one[at] = mxfp4_bits((word.x >> (4u * i)) & 15u, (word.y >> (8u * scale)) & 255u);
        let quad = bitcast<vec4<u32>>(mxfp4_quad(word.x, word.y, scale * 32u + i / 4u * 4u));
        by_quads[at] = quad[i % 4u];
    }
}
"
            .to_owned()
        }),
    ],
    bindings: &[Read, ReadWrite, ReadWrite],
    param_bytes: 0,
    params: &[],
    tunables: &[],
};

fn every_code_and_scale() {
    // Word pairs: all codes in two words, all scales in 64.
    let codes = [0x7654_3210u32, 0xfedc_ba98];
    let scales: Vec<u32> = (0..64u32).map(|i| (0..4).map(|j| (4 * i + j) << (8 * j)).sum()).collect();
    let pairs: Vec<[u32; 2]> = codes.iter().flat_map(|codes| scales.iter().map(move |s| [*codes, *s])).collect();
    let n = pairs.len() * 4 * 8;
    assert_eq!(n, 16 * 256);
    let (words, one_by_one, by_quads) = (upload(&pairs), poisoned(n), poisoned(n));
    run(|recorder| {
        let workgroups = [pairs.len() as u32 / 64, 4, 1];
        let bindings = [words.whole(), one_by_one.whole(), by_quads.whole()];
        recorder.dispatch(&DECODE, &Variant::new(Dtype::Mxfp4), &[0u32; 0], &bindings, workgroups)
    });
    for (what, got) in [("alone", download::<u32>(one_by_one.whole())), ("in a quad", download(by_quads.whole()))] {
        for (i, got) in got.iter().enumerate() {
            let (pair, scale, code) = (i / 32, i / 8 % 4, i % 8);
            let scale = (pairs[pair][1] >> (8 * scale)) as u8;
            let code = (pairs[pair][0] >> (4 * code)) as u8 & 15;
            let want = mxfp4_value(code, scale);
            let same = if want.is_nan() { f32::from_bits(*got).is_nan() } else { *got == want.to_bits() };
            assert!(same, "code {code} under scale {scale}, {what}: {got:08x} for {want:e}");
        }
    }
}

/// One slot per expert, spread over the slabs with gaps of NaN.
struct Slots {
    slabs: Vec<Buffer>,
    places: Vec<Place>,
}

impl Slots {
    /// With one seed, slots of one size lie at the same places.
    fn new(seed: u64, experts: &[Vec<u8>]) -> Slots {
        let mut random = Random::new(seed);
        let mut slabs = vec![Vec::<u8>::new(); N_SLABS];
        let mut places = Vec::new();
        for bytes in experts {
            let slab = random.below(N_SLABS);
            let gap = 1 + random.below(5);
            slabs[slab].extend([0xff; 4].repeat(gap));
            places.push(Place { slab: slab as u32, offset_words: slabs[slab].len() as u32 / 4 });
            slabs[slab].extend(bytes);
            let padding = bytes.len().next_multiple_of(4) - bytes.len();
            slabs[slab].extend(&[0xff; 4][..padding]);
        }
        let slabs = slabs.into_iter().map(|bytes| upload(&[bytes, vec![0xff; 4]].concat())).collect();
        Slots { slabs, places }
    }

    fn bindings(&self) -> [Slice<'_>; N_SLABS] {
        std::array::from_fn(|slab| self.slabs[slab].whole())
    }
}

/// gate, up `[F, D]` and down `[D, F]` of an expert, and its gate and down slot (up's is empty, or as gate's) as `layout` has them.
struct Expert {
    values: [Vec<f32>; 3],
    slots: [Vec<u8>; 3],
}

impl Expert {
    fn new(random: &mut Random, layout: ExpertLayout, d: usize, f: usize) -> Expert {
        match layout {
            ExpertLayout::Mxfp4 => {
                // Scales from 2^-9 to 2^2.
                let mut matrix = |rows: usize, columns: usize| {
                    let blocks: Vec<u8> = (0..rows * columns / 2).map(|_| random.bits() as u8).collect();
                    let scales: Vec<u8> =
                        (0..rows * columns / MXFP4_BLOCK).map(|_| 118 + random.below(12) as u8).collect();
                    (mxfp4(&blocks, &scales), [blocks, scales].concat())
                };
                let (gate_up, gate_up_slot) = matrix(2 * f, d);
                let (down, down_slot) = matrix(d, f);
                let every_other =
                    |odd: usize| gate_up.chunks_exact(d).skip(odd).step_by(2).flatten().copied().collect();
                Expert { values: [every_other(0), every_other(1), down], slots: [gate_up_slot, Vec::new(), down_slot] }
            }
            _ => {
                let mut bf16 = |n: usize| Dtype::Bf16.read_all(&weight_bytes(Dtype::Bf16, &random.values(n)));
                let values = [bf16(f * d), bf16(f * d), bf16(d * f)];
                let [gate, up, down] = &values;
                let untransposed: Vec<f32> = (0..f * d).map(|i| down[i % d * f + i / d]).collect();
                let interleaved = (0..d * f).flat_map(|i| [gate[i % f * d + i / f], up[i % f * d + i / f]]);
                let slots = match layout {
                    ExpertLayout::Interleaved => [interleaved.collect(), Vec::new(), untransposed],
                    ExpertLayout::Stacked => [gate.clone(), up.clone(), untransposed],
                    ExpertLayout::Separate => values.clone(),
                    ExpertLayout::Mxfp4 => unreachable!("above"),
                };
                Expert { values, slots: slots.map(|values| weight_bytes(Dtype::Bf16, &values)) }
            }
        }
    }
}

/// T, A, E, D, F. MXFP4 has whole blocks of D and of F.
const SHAPES: [(usize, usize, usize, usize, usize); 4] =
    [(1, 2, 3, 32, 32), (7, 2, 5, 64, 96), (33, 1, 2, 96, 32), (70, 3, 4, 160, 64)];
const ODD_SHAPES: [(usize, usize, usize, usize, usize); 4] =
    [(1, 1, 1, 1, 1), (7, 2, 5, 17, 33), (33, 1, 2, 66, 129), (70, 3, 4, 35, 31)];

/// Both kernels over `layout`, with biases and both activations: the bits of plain f32 in every tile, and the reference's values.
fn layouts_agree(layout: ExpertLayout, dtype: Dtype) {
    let shapes = if dtype == Dtype::Mxfp4 { SHAPES } else { ODD_SHAPES };
    for (n_rows, n_chosen, n_experts, d, f) in shapes {
        let what = format!("{layout:?} T{n_rows} A{n_chosen} E{n_experts} D{d} F{f}");
        let mut random = Random::new((n_rows * 1000 + d) as u64);
        let routing = Routing::random(&mut random, n_rows, n_chosen, n_experts);
        let experts: Vec<Expert> = (0..n_experts).map(|_| Expert::new(&mut random, layout, d, f)).collect();
        let values = |kind: usize| experts.iter().map(|expert| expert.values[kind].clone()).collect::<Vec<_>>();
        let slots = |kind: usize| experts.iter().map(|expert| expert.slots[kind].clone()).collect::<Vec<_>>();
        let plain = |kind: usize| values(kind).iter().map(|v| weight_bytes(Dtype::F32, v)).collect::<Vec<_>>();
        let x = random.values(n_rows * d);
        let gate_up_bias = random.values(n_experts * f * 2);
        let down_bias = random.values(n_experts * d);
        let shape = Shape {
            layers: 1,
            d_model: d,
            q_heads: 1,
            kv_heads: 1,
            head_width: 2,
            experts: n_experts,
            experts_per_token: n_chosen,
            expert_width: f,
            vocab: 1,
        };
        let (assignments, offsets) = (upload(&routing.permutation), upload(&routing.offsets));

        for (activation, limit) in [(Activation::SwiGlu, 0.0), (Activation::ClampedSwiGlu { limit: 0.75 }, 0.75)] {
            let params = expert_gate_up::Params {
                biased: 1,
                limit,
                ..expert_gate_up::Params::plain(
                    routing.n_assignments() as u32,
                    n_experts as u32,
                    n_chosen as u32,
                    d as u32,
                    f as u32,
                )
            };
            let (x, bias) = (upload(&x), upload(&gate_up_bias));
            let gate_up = |variant: &Variant, params: expert_gate_up::Params, gate: &Slots, up: &Slots| -> Vec<f32> {
                let (places, h) = (upload(&gate.places), poisoned(routing.n_assignments() * f));
                let bindings = expert_gate_up::Bindings {
                    x: x.whole(),
                    permutation: assignments.whole(),
                    offsets: offsets.whole(),
                    places: places.whole(),
                    h: h.whole(),
                    gate: gate.bindings(),
                    up: up.bindings(),
                    bias: bias.whole(),
                };
                run(|recorder| expert_gate_up::record(recorder, variant, params, bindings));
                download(h.whole())
            };
            let seed = random.bits();
            let (gate, up) = (Slots::new(seed, &plain(0)), Slots::new(seed, &plain(1)));
            let want = gate_up(&Variant::new(Dtype::F32), params, &gate, &up);
            let gate = Slots::new(seed, &slots(0));
            let up = if layout.gate_holds_up() { Slots::new(seed, &slots(0)) } else { Slots::new(seed, &slots(1)) };
            let params = params.with_layout(Layout::gate_up(layout, &shape));
            for variant in EXPERT_GATE_UP.variants().iter().filter(|variant| variant.weights == dtype) {
                let got = gate_up(variant, params, &gate, &up);
                assert_eq!(bits(&got), bits(&want), "{what}: {activation:?}, {variant:?}");
            }
            let (offsets, permutation) = (&routing.offsets, &routing.permutation);
            let reference = expert_gate_up(
                &download::<f32>(x.whole())[..n_rows * d],
                d,
                n_chosen,
                offsets,
                permutation,
                [&values(0), &values(1)],
                Finish { bias: Some(&gate_up_bias), activation },
            );
            // The plain layout is held to its own bounds elsewhere; here biases and activation must be the reference's. Sums of
            // D terms of size 24 at most (6 * 2^2), times the other factor.
            let allowed = (d as f32 * 2f32.powi(-24)) * (24 * d) as f32 * 2.0;
            assert_close(&what, &want, &reference, |i| allowed * (1.0 + reference[i].abs()));
        }

        let h = random.values(routing.n_assignments() * f);
        let params = expert_down::Params {
            biased: 1,
            ..expert_down::Params::plain(routing.n_assignments() as u32, n_experts as u32, d as u32, f as u32)
        };
        let (h_gpu, bias) = (upload(&h), upload(&down_bias));
        let down = |variant: &Variant, params: expert_down::Params, down: &Slots| -> Vec<f32> {
            let (places, y) = (upload(&down.places), poisoned(routing.n_assignments() * d));
            let bindings = expert_down::Bindings {
                h: h_gpu.whole(),
                permutation: assignments.whole(),
                offsets: offsets.whole(),
                places: places.whole(),
                y: y.whole(),
                down: down.bindings(),
                bias: bias.whole(),
            };
            run(|recorder| expert_down::record(recorder, variant, params, bindings));
            download(y.whole())
        };
        let want = down(&Variant::new(Dtype::F32), params, &Slots::new(7, &plain(2)));
        let packed = Slots::new(8, &slots(2));
        let params = params.with_layout(Layout::down(layout, &shape));
        for variant in EXPERT_DOWN.variants().iter().filter(|variant| variant.weights == dtype) {
            assert_eq!(bits(&down(variant, params, &packed)), bits(&want), "{what}: down, {variant:?}");
        }
        let reference = expert_down(&h, f, d, &routing.offsets, &routing.permutation, &values(2), Some(&down_bias));
        let allowed = f as f32 * 2f32.powi(-24) * (24 * f) as f32;
        assert_close(&what, &want, &reference, |_| allowed);
    }
}

pub fn trials() -> Vec<Trial> {
    let layouts = [
        ("separate_with_biases", ExpertLayout::Separate, Dtype::Bf16),
        ("stacked", ExpertLayout::Stacked, Dtype::Bf16),
        ("interleaved", ExpertLayout::Interleaved, Dtype::Bf16),
        ("mxfp4", ExpertLayout::Mxfp4, Dtype::Mxfp4),
    ];
    let decode = Trial::test("mxfp4::every_code_and_scale_has_the_bits_of_the_definition", || {
        every_code_and_scale();
        Ok(())
    });
    let layouts = layouts.into_iter().map(|(name, layout, dtype)| {
        Trial::test(format!("expert_layouts::{name}_has_the_bits_of_plain_f32"), move || {
            layouts_agree(layout, dtype);
            Ok(())
        })
    });
    std::iter::once(decode).chain(layouts).collect()
}
