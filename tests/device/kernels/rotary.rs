use fulmen::gpu::Buffer;
use fulmen::kernels::BLOCK_TOKENS;
use fulmen::kernels::rotary::{Bindings, NO_SLOT, Params, record};
use fulmen::reference::rotary::{rope_table, rotate};
use half::f16;
use libtest_mimic::Trial;

use crate::common::{Random, assert_untouched, bits, download, poisoned, run, upload};

/// One dispatch and what it left behind.
struct Case {
    /// H, G, K
    heads: (usize, usize, usize),
    qkv: Vec<f32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    table: Vec<f32>,
    n_blocks: usize,
    /// 0: none.
    clip: f32,
}

struct Outcome {
    qkv: Vec<f32>,
    /// `[T, G, 2, K/2]` words
    kv_rows: Vec<u32>,
    /// `[blocks, G, 2, BLOCK_TOKENS, K/2]` words
    kv_blocks: Vec<u32>,
}

const THETA: f32 = 1e6;

impl Case {
    fn random(n_rows: usize, heads: (usize, usize, usize), seed: u64) -> Case {
        let (q_heads, kv_heads, head_width) = heads;
        let mut random = Random::new(seed);
        let n_positions = 50;
        let n_blocks = n_rows.div_ceil(BLOCK_TOKENS) + 1;
        // Slots without order and without repeats; every fifth row has none.
        let slots = (0..n_rows)
            .map(|t| if t % 5 == 3 { NO_SLOT } else { ((t * 37 + 11) % (n_blocks * BLOCK_TOKENS - 1)) as u32 })
            .collect::<Vec<_>>();
        Case {
            heads,
            qkv: random.values(n_rows * (q_heads + 2 * kv_heads) * head_width),
            positions: (0..n_rows).map(|_| random.below(n_positions) as u32).collect(),
            slots,
            table: rope_table(head_width, THETA, n_positions),
            n_blocks,
            clip: 0.0,
        }
    }

    fn n_rows(&self) -> usize {
        self.positions.len()
    }

    fn row_width(&self) -> usize {
        let (q_heads, kv_heads, head_width) = self.heads;
        (q_heads + 2 * kv_heads) * head_width
    }

    /// (cos, sin) of row t.
    fn turns(&self, t: usize) -> &[f32] {
        let (_, _, head_width) = self.heads;
        &self.table[self.positions[t] as usize * head_width..][..head_width]
    }

    fn run(&self) -> Outcome {
        let (q_heads, kv_heads, head_width) = self.heads;
        let n_row_words = self.n_rows() * kv_heads * head_width;
        let qkv = upload(&self.qkv);
        let kv_rows = poisoned(n_row_words + 70);
        let kv_blocks = poisoned(self.n_blocks * kv_heads * BLOCK_TOKENS * head_width);
        let inputs: [Buffer; 3] = [upload(&self.positions), upload(&self.table), upload(&self.slots)];
        let params = Params {
            n_rows: self.n_rows() as u32,
            q_heads: q_heads as u32,
            kv_heads: kv_heads as u32,
            head_width: head_width as u32,
            clip: self.clip,
        };
        let bindings = Bindings {
            qkv: qkv.whole(),
            positions: inputs[0].whole(),
            rope_table: inputs[1].whole(),
            kv_slots: inputs[2].whole(),
            kv_rows: kv_rows.whole(),
            kv_blocks: kv_blocks.whole(),
        };
        run(|recorder| record(recorder, params, bindings));
        let mut rows: Vec<u32> = download(kv_rows.whole());
        (n_row_words..rows.len()).for_each(|i| assert_untouched("kv_rows", &rows, i));
        rows.truncate(n_row_words);
        let mut qkv: Vec<f32> = download(qkv.whole());
        qkv.truncate(self.qkv.len());
        Outcome { qkv, kv_rows: rows, kv_blocks: download(kv_blocks.whole()) }
    }
}

impl Outcome {
    /// The `side`-th (0: K, 1: V) row of kv head g of row t, widened.
    fn kv_row(&self, case: &Case, t: usize, g: usize, side: usize) -> Vec<f16> {
        let (_, kv_heads, head_width) = case.heads;
        halves(&self.kv_rows[((t * kv_heads + g) * 2 + side) * head_width / 2..][..head_width / 2])
    }
}

fn halves(words: &[u32]) -> Vec<f16> {
    words.iter().flat_map(|word| [f16::from_bits(*word as u16), f16::from_bits((word >> 16) as u16)]).collect()
}

fn check(what: &str, case: &Case) {
    let (q_heads, kv_heads, head_width) = case.heads;
    let outcome = case.run();
    for t in 0..case.n_rows() {
        let clip = if case.clip == 0.0 { f32::INFINITY } else { case.clip };
        let unclipped = &case.qkv[t * case.row_width()..][..case.row_width()];
        let before: Vec<f32> = unclipped.iter().map(|v| v.clamp(-clip, clip)).collect();
        let after = &outcome.qkv[t * case.row_width()..][..case.row_width()];
        let head = |h: usize| &before[h * head_width..][..head_width];
        for h in 0..q_heads {
            let want = rotate(head(h), case.turns(t));
            for (j, want) in want.iter().enumerate() {
                let got = after[h * head_width + j];
                // Two products of values up to 1, one of them and the sum rounded to f32.
                assert!(
                    (got - want).abs() <= 2f32.powi(-23),
                    "{what} row {t} q head {h} element {j}: {got} for {want}"
                );
            }
        }
        let kept = q_heads * head_width;
        assert_eq!(bits(&after[kept..]), bits(&unclipped[kept..]), "{what} row {t}: k and v stay in qkv");
        for g in 0..kv_heads {
            let want = rotate(head(q_heads + g), case.turns(t));
            for (j, (got, want)) in outcome.kv_row(case, t, g, 0).iter().zip(want).enumerate() {
                // Half an f16 step of a value below 2, and the two f32 roundings.
                let allowed = (want.abs() * 2f32.powi(-11)).max(2f32.powi(-25)) + 2f32.powi(-23);
                let error = (got.to_f32() - want).abs();
                assert!(error <= allowed, "{what} row {t} k head {g} element {j}: {got} for {want}");
            }
            let want: Vec<f16> = head(q_heads + kv_heads + g).iter().map(|v| f16::from_f32(*v)).collect();
            assert_eq!(outcome.kv_row(case, t, g, 1), want, "{what} row {t} v head {g}");
        }
    }
    // Blocks: exactly the slots of the rows, with the words of kv_rows; all else untouched.
    let half = head_width / 2;
    for i in 0..case.n_blocks * kv_heads * 2 * BLOCK_TOKENS * half {
        let (j, token, side) = (i % half, i / half % BLOCK_TOKENS, i / half / BLOCK_TOKENS % 2);
        let (g, block) = (i / half / BLOCK_TOKENS / 2 % kv_heads, i / half / BLOCK_TOKENS / 2 / kv_heads);
        let slot = (block * BLOCK_TOKENS + token) as u32;
        match case.slots.iter().position(|s| *s == slot) {
            Some(t) => {
                let word = outcome.kv_rows[((t * kv_heads + g) * 2 + side) * half + j];
                assert_eq!(
                    outcome.kv_blocks[i], word,
                    "{what}: row {t} in slot {slot}, head {g}, side {side}, word {j}"
                );
            }
            None => assert_untouched(what, &outcome.kv_blocks, i),
        }
    }
}

/// Values where rounding to f16 is decided: every f16 boundary's neighbourhood in one sign, ties both ways, subnormals,
/// overflow, and what is no number.
fn hard_values() -> Vec<f32> {
    let mut values = vec![f32::INFINITY, f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0x7fbf_e000), f32::MAX];
    values.extend([0.0, f32::from_bits(1), f32::MIN_POSITIVE]);
    for bits in (0..0x7c00u16).step_by(7).chain([0x3ff, 0x400, 0x401, 0x7bff]) {
        let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32().min(65536.0));
        let tie = ((low as f64 + high as f64) / 2.0) as f32;
        values.extend([low, tie, f32::from_bits(tie.to_bits() - 1), f32::from_bits(tie.to_bits() + 1)]);
    }
    let mut random = Random::new(31);
    values.extend((0..2000).map(|_| f32::from_bits(random.bits() as u32 & 0x7fff_ffff)));
    values.extend(values.clone().iter().map(|v| -v));
    values
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("rotary::matches_reference", || {
            for (n_rows, heads) in [
                (0, (2, 1, 8)),
                (1, (1, 1, 2)),
                (3, (4, 2, 6)),
                (2, (3, 3, 10)),
                (7, (8, 2, 16)),
                (70, (4, 1, 32)),
                (2, (32, 8, 128)),
            ] {
                check(&format!("{n_rows} rows of {heads:?}"), &Case::random(n_rows, heads, n_rows as u64 + 40));
            }
            Ok(())
        }),
        Trial::test("rotary::clamps_before_it_turns", || {
            for clip in [0.3, 0.999, 1e-3] {
                let mut case = Case::random(7, (4, 2, 10), 45);
                case.clip = clip;
                check(&format!("clip {clip}"), &case);
            }
            // What is no number is not made one.
            let mut case = Case::random(2, (1, 1, 4), 46);
            case.clip = 0.5;
            (case.qkv[1], case.qkv[4], case.qkv[10]) = (f32::NAN, f32::NAN, f32::NAN);
            let outcome = case.run();
            assert!(outcome.qkv[1].is_nan() && outcome.qkv[3].is_nan(), "{:?}", &outcome.qkv[..4]);
            assert!(outcome.kv_row(&case, 0, 0, 0)[0].is_nan() && outcome.kv_row(&case, 0, 0, 1)[2].is_nan());
            Ok(())
        }),
        // Nothing is lost against the CPU's own rounding, so K and V may be stored by either side.
        Trial::test("rotary::rounds_to_f16_as_the_cpu_does", || {
            let values = hard_values();
            let head_width = 64;
            let n_rows = values.len().div_ceil(head_width);
            let mut v = values.clone();
            v.resize(n_rows * head_width, 1.0);
            let qkv =
                v.chunks_exact(head_width).flat_map(|v| [vec![0.5; head_width], vec![0.25; head_width], v.to_vec()]);
            let case = Case {
                heads: (1, 1, head_width),
                qkv: qkv.flatten().collect(),
                positions: vec![0; n_rows],
                slots: vec![NO_SLOT; n_rows],
                table: rope_table(head_width, THETA, 1),
                n_blocks: 1,
                clip: 0.0,
            };
            let outcome = case.run();
            for (t, v) in v.chunks_exact(head_width).enumerate() {
                for (got, v) in outcome.kv_row(&case, t, 0, 1).iter().zip(v) {
                    let want = f16::from_f32(*v);
                    assert_eq!(got.to_bits(), want.to_bits(), "{v:e} ({:08x}) becomes {got}, not {want}", v.to_bits());
                }
            }
            Ok(())
        }),
        Trial::test("rotary::position_zero_turns_nothing", || {
            let mut case = Case::random(5, (3, 2, 12), 50);
            case.positions.fill(0);
            let outcome = case.run();
            assert_eq!(bits(&outcome.qkv), bits(&case.qkv));
            Ok(())
        }),
        Trial::test("rotary::a_row_alone_has_the_bits_it_has_among_others", || {
            let case = Case::random(9, (4, 2, 20), 51);
            let together = case.run();
            let (_, kv_heads, head_width) = case.heads;
            for t in 0..case.n_rows() {
                let alone = Case {
                    heads: case.heads,
                    qkv: case.qkv[t * case.row_width()..][..case.row_width()].to_vec(),
                    positions: vec![case.positions[t]],
                    slots: vec![case.slots[t]],
                    table: case.table.clone(),
                    n_blocks: case.n_blocks,
                    clip: case.clip,
                }
                .run();
                assert_eq!(bits(&alone.qkv), bits(&together.qkv[t * case.row_width()..][..case.row_width()]));
                let words = kv_heads * head_width;
                assert_eq!(alone.kv_rows, together.kv_rows[t * words..][..words]);
            }
            Ok(())
        }),
    ]
}
