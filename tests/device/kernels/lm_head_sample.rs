use fulmen::kernels::lm_head_sample::{Params, Sample, record};
use fulmen::reference::lm_head_sample::lm_head_sample;
use libtest_mimic::Trial;

use crate::common::{Random, assert_untouched, download, poisoned, run, upload};

const WORDS: usize = size_of::<Sample>() / 4;

fn samples(logits: &[f32], vocab: usize) -> Vec<Sample> {
    let n_rows = logits.len() / vocab;
    let (logits, out) = (upload(logits), poisoned((n_rows + 3) * WORDS));
    let params = Params { n_rows: n_rows as u32, vocab: vocab as u32 };
    run(|recorder| record(recorder, params, logits.whole(), out.whole()));
    let words: Vec<u32> = download(out.whole());
    (n_rows * WORDS..words.len()).for_each(|i| assert_untouched("lm_head_sample", &words, i));
    bytemuck::pod_collect_to_vec(&words[..n_rows * WORDS])
}

fn check(what: &str, logits: &[f32], vocab: usize) {
    let (got, want) = (samples(logits, vocab), lm_head_sample(logits, vocab));
    assert_eq!(got.len(), want.len(), "{what}");
    for (row, (got, want)) in got.iter().zip(&want).enumerate() {
        let what = format!("{what}, row {row}: {got:?}, reference {want:?}");
        assert_eq!((got.id, got.nan), (want.id.unwrap_or(u32::MAX), want.nan as u32), "{what}");
        assert_eq!(got.max, want.max, "{what}");
        if want.log_sum_exp.is_infinite() {
            assert_eq!(got.log_sum_exp as f64, want.log_sum_exp, "{what}");
            continue;
        }
        // Each term is off by its own rounding (2^-24), that of logit - max (up to 2^-24 of a difference of at most 2 max,
        // times the term) and exp's 3 + 2 |x| ulp; the sum of V positive terms by V / 256 + 8 roundings, or 8 + 6. The logarithm turns
        // relative into absolute, and the last addition rounds to the result's size.
        let largest = logits[row * vocab..][..vocab].iter().filter(|l| l.is_finite()).fold(0f32, |a, l| a.max(l.abs()));
        let roundings = 16.0 + 6.0 * largest as f64 + vocab as f64 / 256.0;
        let allowed = roundings * 2f64.powi(-24) + 4.0 * want.log_sum_exp.abs() * 2f64.powi(-24);
        assert!((got.log_sum_exp as f64 - want.log_sum_exp).abs() <= allowed, "{what}: allowed {allowed}");
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("lm_head_sample::matches_reference", || {
            for (n_rows, vocab) in [(0, 8), (1, 1), (3, 2), (2, 255), (5, 256), (2, 257), (7, 1009), (2, 32000)] {
                let mut random = Random::new((n_rows * 1000 + vocab) as u64);
                let logits: Vec<f32> = random.values(n_rows * vocab).iter().map(|v| 20.0 * v).collect();
                check(&format!("{n_rows} rows of {vocab}"), &logits, vocab);
            }
            Ok(())
        }),
        Trial::test("lm_head_sample::the_first_of_equal_logits_wins", || {
            let mut random = Random::new(21);
            let wide = [(0, 599), (255, 256), (1, 257), (5, 4 + 256), (300, 301)].map(|pair| (600, pair));
            let narrow = [(0, 449), (63, 64), (1, 65), (5, 4 + 64), (300, 301)].map(|pair| (450, pair));
            for (vocab, (first, second)) in wide.into_iter().chain(narrow) {
                for value in [3.5f32, -0.25, 1e-42] {
                    let mut logits: Vec<f32> = random.values(vocab).iter().map(|v| value - 1.0 - v.abs()).collect();
                    (logits[first], logits[second]) = (value, value);
                    check(&format!("{first} and {second} at {value}"), &logits, vocab);
                    assert_eq!(samples(&logits, vocab)[0].id, first as u32);
                }
                let mut logits = vec![-1.0; vocab];
                (logits[first], logits[second]) = (-0.0, 0.0);
                assert_eq!(samples(&logits, vocab)[0].id, first as u32, "minus zero equals zero");
            }
            Ok(())
        }),
        Trial::test("lm_head_sample::reports_nan_and_infinity", || {
            let mut random = Random::new(22);
            let nans = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)];
            for (vocab, places) in [(523, [0, 255, 256, 522]), (450, [0, 63, 64, 449])] {
                for nan in nans {
                    for at in places {
                        let mut logits = random.values(3 * vocab);
                        logits[vocab + at] = nan;
                        check(&format!("{:08x} at {at} of the second row", nan.to_bits()), &logits, vocab);
                    }
                }
                check("nothing but NaN", &vec![f32::NAN; vocab], vocab);
                check("nothing but minus infinity", &vec![f32::NEG_INFINITY; vocab], vocab);
                for infinity in [f32::INFINITY, f32::NEG_INFINITY] {
                    let mut logits = random.values(vocab);
                    logits[400] = infinity;
                    check(&format!("one {infinity}"), &logits, vocab);
                }
            }
            Ok(())
        }),
        Trial::test("lm_head_sample::a_row_alone_has_the_bits_it_has_among_others", || {
            for vocab in [777, 450] {
                let logits = Random::new(23).values(6 * vocab);
                let together = samples(&logits, vocab);
                for (row, expected) in logits.chunks_exact(vocab).zip(together) {
                    assert_eq!(samples(row, vocab), [expected]);
                }
            }
            Ok(())
        }),
    ]
}
