use fulmen::kernels::BLOCK_TOKENS;
use fulmen::kernels::kv_quantise::{Bindings, Params, record};
use fulmen::kernels::rotary::NO_SLOT;
use fulmen::memory::kv_cache::KvLayout;
use fulmen::policy::KvDtype;
use fulmen::reference::kv_quantise::{dequantised, quantise};
use half::f16;
use libtest_mimic::Trial;

use crate::common::{Random, assert_untouched, download, poisoned, run, upload};

/// Rows of [G, 2, K] through the kernel: the new rows, and the blocks.
fn quantised(
    kv_heads: usize,
    head_width: usize,
    rows: &[Vec<f16>],
    slots: &[u32],
    n_blocks: usize,
) -> (Vec<u32>, Vec<u32>) {
    let layout = layout(kv_heads, head_width);
    let n_words = rows.len() * layout.new_row_bytes() / 4;
    let flat: Vec<f16> = rows.concat();
    let (kv_rows, kv_slots) = (upload(&flat), upload(slots));
    let new_rows = poisoned(n_words + 70);
    let kv_blocks = poisoned(n_blocks * kv_heads * BLOCK_TOKENS * head_width);
    let params = Params { n_rows: rows.len() as u32, kv_heads: kv_heads as u32, head_width: head_width as u32 };
    let bindings = Bindings {
        kv_rows: kv_rows.whole(),
        kv_slots: kv_slots.whole(),
        new_rows: new_rows.whole(),
        kv_blocks: kv_blocks.whole(),
    };
    run(|recorder| record(recorder, params, bindings));
    let mut words: Vec<u32> = download(new_rows.whole());
    (n_words..words.len()).for_each(|i| assert_untouched("new rows", &words, i));
    words.truncate(n_words);
    (words, download(kv_blocks.whole()))
}

fn layout(kv_heads: usize, head_width: usize) -> KvLayout {
    KvLayout { layers: 1, kv_heads, head_width, dtype: KvDtype::Int8 }
}

/// The bits of the host's own quantisation, in the rows and in the blocks; nothing else is written.
fn check(kv_heads: usize, head_width: usize, rows: &[Vec<f16>]) {
    let what = format!("{} rows, G {kv_heads}, K {head_width}", rows.len());
    let n_blocks = rows.len().div_ceil(BLOCK_TOKENS) + 1;
    let slots: Vec<u32> = (0..rows.len())
        .map(|t| if t % 5 == 3 { NO_SLOT } else { ((t * 37 + 11) % (n_blocks * BLOCK_TOKENS - 1)) as u32 })
        .collect();
    let (words, blocks) = quantised(kv_heads, head_width, rows, &slots, n_blocks);
    let expected: Vec<u8> = rows.iter().flat_map(|row| layout(kv_heads, head_width).new_row(row)).collect();
    let row_bytes = layout(kv_heads, head_width).new_row_bytes();
    for (t, (got, want)) in
        bytemuck::cast_slice::<u32, u8>(&words).chunks(row_bytes).zip(expected.chunks(row_bytes)).enumerate()
    {
        assert_eq!(got, want, "{what}: row {t}, {:?}", rows[t]);
    }
    let half = head_width / 2;
    for i in 0..blocks.len() {
        let (j, token, side) = (i % half, i / half % BLOCK_TOKENS, i / half / BLOCK_TOKENS % (2 * kv_heads));
        let slot = (i / half / BLOCK_TOKENS / (2 * kv_heads) * BLOCK_TOKENS + token) as u32;
        let Some(t) = slots.iter().position(|s| *s == slot) else {
            assert_untouched(&what, &blocks, i);
            continue;
        };
        let (integers, scale) = quantise(&rows[t][side * head_width..][..head_width]);
        for (k, bits) in [(2 * j, blocks[i] as u16), (2 * j + 1, (blocks[i] >> 16) as u16)] {
            let (got, want) = (f16::from_bits(bits), dequantised(integers[k], scale));
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(same, "{what}: row {t} in slot {slot}, side {side}, element {k}: {got} for {want}");
        }
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("kv_quantise::has_the_bits_of_the_reference", || {
            let mut random = Random::new(61);
            for (n_rows, kv_heads, head_width) in
                [(0, 1, 8), (1, 1, 2), (3, 2, 6), (2, 3, 10), (40, 2, 16), (5, 1, 80), (2, 8, 128), (1, 1, 322)]
            {
                let values = |n: usize| random.values(n).into_iter().map(f16::from_f32).collect::<Vec<_>>();
                let mut values = values;
                let rows: Vec<Vec<f16>> = (0..n_rows).map(|_| values(kv_heads * 2 * head_width)).collect();
                check(kv_heads, head_width, &rows);
            }
            Ok(())
        }),
        // Every largest element that there is, with elements on ties and beside them.
        Trial::test("kv_quantise::has_the_bits_of_the_reference_at_every_scale", || {
            let mut random = Random::new(62);
            let row = |bits: u16, random: &mut Random| -> Vec<f16> {
                let largest = f16::from_bits(bits);
                let (_, scale) = quantise(&[largest]);
                let mut side = |sign: f32| -> Vec<f16> {
                    let any = f16::from_bits(random.below(bits as usize + 1) as u16);
                    let tie = f16::from_f32(scale.to_f32() * (0.5 + random.below(126) as f32));
                    let beside = f16::from_bits(tie.to_bits().saturating_add(1));
                    let kept = |x: f16| if x.to_f32() <= largest.to_f32() { x } else { f16::ZERO };
                    vec![
                        f16::from_f32(-sign * largest.to_f32()),
                        any,
                        kept(tie),
                        f16::from_f32(sign * kept(beside).to_f32()),
                    ]
                };
                [side(1.0), side(-1.0)].concat()
            };
            let rows: Vec<Vec<f16>> =
                (0..0x7c00).step_by(3).chain(0x7b00..0x7c00).map(|bits| row(bits, &mut random)).collect();
            check(1, 4, &rows);
            Ok(())
        }),
        Trial::test("kv_quantise::what_is_not_finite_takes_its_row", || {
            for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                let mut row = vec![f16::ONE; 2 * 2 * 6];
                row[8] = bad;
                check(2, 6, &[row.clone(), vec![f16::ZERO; 24], row]);
            }
            Ok(())
        }),
        Trial::test("kv_quantise::a_row_alone_has_the_bits_it_has_among_others", || {
            let mut random = Random::new(63);
            let rows: Vec<Vec<f16>> =
                (0..7).map(|_| random.values(2 * 2 * 10).into_iter().map(f16::from_f32).collect()).collect();
            let (together, _) = quantised(2, 10, &rows, &[NO_SLOT; 7], 1);
            let row_words = together.len() / 7;
            for (t, row) in rows.iter().enumerate() {
                let (alone, _) = quantised(2, 10, std::slice::from_ref(row), &[NO_SLOT], 1);
                assert_eq!(alone, together[t * row_words..][..row_words], "row {t}");
            }
            Ok(())
        }),
    ]
}
