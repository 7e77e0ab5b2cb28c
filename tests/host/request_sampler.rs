//! One row of logits → one token: each step on logits made by hand, and the draw by its frequencies.

use fulmen::request::SamplingParams;
use fulmen::request::sampler::{LogitsError, TokenCounts, sample, stream_seed, uniform};
use proptest::prelude::*;

const INF: f32 = f32::INFINITY;

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

fn token(logits: &[f32], params: &SamplingParams, counts: &TokenCounts, position: usize, seed: u64) -> u32 {
    sample(logits, params, counts, &[], position, seed).unwrap().token
}

/// Which tokens come up in many draws, and how often.
fn frequencies(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    const DRAWS: usize = 40_000;
    let mut counts = vec![0u32; logits.len()];
    let seed = stream_seed(7, "frequencies", 0);
    for position in 0..DRAWS {
        counts[token(logits, params, &TokenCounts::default(), position, seed) as usize] += 1;
    }
    counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
}

/// Chi-square of 40,000 draws against weights, relative to its standard deviation above the mean.
fn assert_drawn_as(logits: &[f32], params: &SamplingParams, weights: &[f64]) {
    let sum: f64 = weights.iter().sum();
    let mut chi2 = 0.0;
    let mut kinds = 0.0;
    for (drawn, weight) in frequencies(logits, params).into_iter().zip(weights) {
        let expected = weight / sum;
        if expected == 0.0 {
            assert_eq!(drawn, 0.0, "a token that was cut came up: {params:?}");
            continue;
        }
        chi2 += (drawn - expected).powi(2) / expected * 40_000.0;
        kinds += 1.0;
    }
    // Mean k-1, variance 2(k-1): the seeds are fixed, so this either holds or is a defect.
    assert!(chi2 <= kinds - 1.0 + 4.0 * f64::sqrt(2.0 * kinds), "chi2 {chi2} of {kinds} kinds: {params:?}");
}

/// Logits whose softmax at temperature 1 is 0.4, 0.3, 0.2, 0.1, in mixed order.
fn four() -> [f32; 4] {
    [0.2f32, 0.4, 0.1, 0.3].map(f32::ln)
}

#[test]
fn draws_follow_the_softmax() {
    assert_drawn_as(&four(), &SamplingParams::default(), &[0.2, 0.4, 0.1, 0.3]);
    let hot = SamplingParams { temperature: 2.0, ..Default::default() };
    assert_drawn_as(&four(), &hot, &[0.2, 0.4, 0.1, 0.3].map(f64::sqrt));
    let cold = SamplingParams { temperature: 0.5, ..Default::default() };
    assert_drawn_as(&four(), &cold, &[0.04, 0.16, 0.01, 0.09]);
    let many: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.3).collect();
    let weights: Vec<f64> = many.iter().map(|&x| f64::from(x).exp()).collect();
    assert_drawn_as(&many, &SamplingParams::default(), &weights);
}

#[test]
fn cuts_are_exact() {
    let with = |f: fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        f(&mut params);
        params
    };
    assert_drawn_as(&four(), &with(|p| p.top_k = 2), &[0.0, 0.4, 0.0, 0.3]);
    assert_drawn_as(&four(), &with(|p| p.top_k = 9), &[0.2, 0.4, 0.1, 0.3]);
    // 0.4 + 0.3 is not yet 0.75.
    assert_drawn_as(&four(), &with(|p| p.top_p = 0.75), &[0.2, 0.4, 0.0, 0.3]);
    assert_drawn_as(&four(), &with(|p| p.top_p = 0.65), &[0.0, 0.4, 0.0, 0.3]);
    assert_drawn_as(&four(), &with(|p| p.top_p = 1e-9), &[0.0, 1.0, 0.0, 0.0]);
    // A half of 0.4 is 0.2; at f32's rounding of the logarithms the bound is set just beside it.
    assert_drawn_as(&four(), &with(|p| p.min_p = 0.49), &[0.2, 0.4, 0.0, 0.3]);
    assert_drawn_as(&four(), &with(|p| p.min_p = 0.51), &[0.0, 0.4, 0.0, 0.3]);
    assert_drawn_as(&four(), &with(|p| p.min_p = 1.0), &[0.0, 1.0, 0.0, 0.0]);
    // top_p is a share of what top_k left: 0.4 of 0.7 is 0.57.
    assert_drawn_as(&four(), &with(|p| (p.top_k, p.top_p) = (2, 0.55)), &[0.0, 1.0, 0.0, 0.0]);
    // Cuts look at the distribution after temperature: 0.16 of 0.30 at 0.5.
    assert_drawn_as(&four(), &with(|p| (p.temperature, p.top_p) = (0.5, 0.52)), &[0.0, 1.0, 0.0, 0.0]);
    // A share that needs more than the first selection of the search.
    let flat = vec![0.0; 300];
    let mut weights = vec![1.0; 300];
    weights[150..].fill(0.0);
    assert_drawn_as(&flat, &with(|p| p.top_p = 0.499), &weights);
}

#[test]
fn ties_go_to_the_lowest_id() {
    assert_eq!(token(&[1.0, 3.0, 3.0, -0.0], &greedy(), &TokenCounts::default(), 0, 0), 1);
    assert_eq!(token(&[-0.0, 0.0], &greedy(), &TokenCounts::default(), 0, 0), 0);
    let top_k = SamplingParams { top_k: 2, ..Default::default() };
    assert_drawn_as(&[0.0, -0.0, 0.0, 0.0], &top_k, &[1.0, 1.0, 0.0, 0.0]);
    let params = SamplingParams { logprobs: Some(3), ..greedy() };
    let sampled = sample(&[1.0, 2.0, 2.0, 1.0], &params, &TokenCounts::default(), &[], 0, 0).unwrap();
    let top: Vec<u32> = sampled.logprobs.unwrap().top.iter().map(|entry| entry.token).collect();
    assert_eq!(top, [1, 2, 0]);
}

/// What the penalties leave, seen through the frequencies of a flat start.
#[test]
fn penalties_follow_their_formulas() {
    let mut counts = TokenCounts::new(&[0, 1]);
    for generated in [1, 2, 2, 2] {
        counts.push(generated);
    }
    let logits = [2.0, -2.0, 1.0, 0.5];
    let adjusted = |params: SamplingParams| {
        // The largest bias that does not move the greedy choice away from a token measures its logit: bisect.
        let value = |of: u32| {
            let (mut low, mut high) = (-50.0f32, 50.0);
            for _ in 0..40 {
                let middle = (low + high) / 2.0;
                let mut row = logits.to_vec();
                row.push(middle);
                for (other, x) in row.iter_mut().enumerate().take(4) {
                    if other as u32 != of {
                        *x = f32::NEG_INFINITY;
                    }
                }
                let chosen = token(&row, &SamplingParams { temperature: 0.0, ..params.clone() }, &counts, 0, 0);
                if chosen == of { low = middle } else { high = middle }
            }
            (low * 1000.0).round() / 1000.0
        };
        [0, 1, 2, 3].map(value)
    };
    let base = SamplingParams::default;
    assert_eq!(adjusted(base()), logits);
    // Prompt and generated, once each: positive divided, negative multiplied.
    assert_eq!(adjusted(SamplingParams { repetition_penalty: 2.0, ..base() }), [1.0, -4.0, 0.5, 0.5]);
    // Generated only.
    assert_eq!(adjusted(SamplingParams { presence_penalty: 0.5, ..base() }), [2.0, -2.5, 0.5, 0.5]);
    assert_eq!(adjusted(SamplingParams { frequency_penalty: 0.5, ..base() }), [2.0, -2.5, -0.5, 0.5]);
    // Bias first, then penalties.
    let both = SamplingParams { repetition_penalty: 2.0, logit_bias: vec![(1, 4.0)], ..base() };
    assert_eq!(adjusted(both), [1.0, 1.0, 0.5, 0.5]);
}

#[test]
fn logit_bias_moves_the_choice_and_foreign_ids_do_nothing() {
    let params = SamplingParams { logit_bias: vec![(2, 100.0), (99, 100.0)], ..greedy() };
    assert_eq!(token(&[5.0, 1.0, 0.0], &params, &TokenCounts::default(), 0, 0), 2);
}

#[test]
fn no_end_before_min_tokens() {
    let params = SamplingParams { min_tokens: 2, stop_token_ids: vec![1], ..greedy() };
    let at = |position| sample(&[9.0, 8.0, 1.0], &params, &TokenCounts::default(), &[0], position, 0).unwrap().token;
    assert_eq!([at(0), at(1), at(2)], [2, 2, 0]);
    let error = sample(&[9.0, 8.0], &params, &TokenCounts::default(), &[0], 0, 0).unwrap_err();
    assert_eq!(error, LogitsError::NothingLeft { vocab: 2 });
}

#[test]
fn what_is_no_number_is_an_error_and_infinities_are_not() {
    let counts = TokenCounts::default();
    for params in [greedy(), SamplingParams::default()] {
        let error = sample(&[0.0, f32::NAN, 1.0], &params, &counts, &[], 0, 0).unwrap_err();
        assert_eq!(error, LogitsError::NotANumber { token: 1 });
        assert_eq!(token(&[0.0, -INF, INF, 1.0], &params, &counts, 0, 0), 2);
        assert_eq!(token(&[-INF, -INF, -3e38], &params, &counts, 0, 0), 2);
        let error = sample(&[-INF, -INF], &params, &counts, &[], 0, 0).unwrap_err();
        assert_eq!(error, LogitsError::NothingLeft { vocab: 2 });
        assert!(sample(&[], &params, &counts, &[], 0, 0).is_err());
    }
    assert_drawn_as(&[INF, 0.0, INF, -INF], &SamplingParams::default(), &[1.0, 0.0, 1.0, 0.0]);
    assert_drawn_as(&[f32::MAX, f32::MIN], &SamplingParams { temperature: 2e-5, ..Default::default() }, &[1.0, 0.0]);
}

#[test]
fn log_probabilities_are_of_the_untouched_row() {
    let logits = four();
    let params = SamplingParams {
        temperature: 0.1,
        top_k: 1,
        logit_bias: vec![(2, 100.0)],
        logprobs: Some(2),
        ..Default::default()
    };
    let sampled = sample(&logits, &params, &TokenCounts::default(), &[], 0, 0).unwrap();
    let logprobs = sampled.logprobs.unwrap();
    assert_eq!((sampled.token, logprobs.chosen.token), (2, 2));
    let close = |entry: fulmen::request::TokenLogprob, p: f64| (f64::from(entry.logprob) - p.ln()).abs() < 1e-6;
    assert!(close(logprobs.chosen, 0.1));
    assert_eq!(logprobs.top.iter().map(|entry| entry.token).collect::<Vec<_>>(), [1, 3]);
    assert!(close(logprobs.top[0], 0.4) && close(logprobs.top[1], 0.3));
    let none = SamplingParams { logprobs: Some(0), ..greedy() };
    let sampled = sample(&logits, &none, &TokenCounts::default(), &[], 0, 0).unwrap();
    assert_eq!(sampled.logprobs.unwrap().top, []);
    // An impossible token has a log-probability too.
    let all = SamplingParams { logprobs: Some(20), ..greedy() };
    let sampled = sample(&[0.0, -INF], &all, &TokenCounts::default(), &[], 0, 0).unwrap();
    assert_eq!(sampled.logprobs.unwrap().top[1].logprob, -INF);
}

/// A seed is a promise: these numbers may not change between versions. They come from a second implementation, in Python.
#[test]
fn streams_are_fixed() {
    assert_eq!(stream_seed(0, "request-1", 0), STREAM);
    let first: Vec<u32> = (0..8).map(|i| (uniform(STREAM, i) * 1000.0) as u32).collect();
    assert_eq!(first, FIRST);
}

const STREAM: u64 = 3_743_208_679_835_546_263;
const FIRST: [u32; 8] = [189, 609, 573, 241, 498, 508, 3, 109];

#[test]
fn streams_differ_in_each_part_of_their_name() {
    let mut seeds = std::collections::HashSet::new();
    for seed in [0, 1, u64::MAX] {
        for id in ["", "a", "b", "ab", "a\0", "a\0\0\0\0\0\0\0", "request-1", "request-2", "request-10"] {
            for n in 0..10 {
                assert!(seeds.insert(stream_seed(seed, id, n)), "{seed} {id:?} {n}");
            }
        }
    }
}

/// Kolmogorov's distance over positions of one stream, and over the first numbers of many streams.
#[test]
fn numbers_are_uniform() {
    let along: Vec<f64> = (0..20_000).map(|position| uniform(stream_seed(1, "x", 0), position)).collect();
    let across: Vec<f64> = (0..20_000).map(|i| uniform(stream_seed(1, &format!("request-{i}"), 0), 0)).collect();
    for mut numbers in [along, across] {
        numbers.sort_unstable_by(f64::total_cmp);
        let n = numbers.len() as f64;
        let distance = numbers.iter().enumerate().map(|(i, x)| (x - i as f64 / n).abs()).fold(0.0, f64::max);
        assert!(distance < 1.63 / n.sqrt(), "{distance}"); // 1 % level
        assert!(numbers[0] >= 0.0 && *numbers.last().unwrap() < 1.0);
    }
}

#[test]
fn the_greedy_id_of_the_gpu_is_enough_unless_something_else_is_asked() {
    assert!(!greedy().needs_logits());
    let needs = |f: fn(&mut SamplingParams)| {
        let mut params = greedy();
        f(&mut params);
        params.needs_logits()
    };
    assert!(needs(|p| p.temperature = 0.5));
    assert!(needs(|p| p.repetition_penalty = 1.1));
    assert!(needs(|p| p.presence_penalty = 0.1));
    assert!(needs(|p| p.frequency_penalty = -0.1));
    assert!(needs(|p| p.logit_bias = vec![(0, 1.0)]));
    assert!(needs(|p| p.logprobs = Some(0)));
    assert!(needs(|p| p.min_tokens = 1));
    assert!(!needs(|p| (p.top_k, p.top_p, p.min_p) = (5, 0.5, 0.5)));
}

#[test]
fn values_out_of_range_are_refused_in_known_words() {
    let message = |f: fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        f(&mut params);
        params.validate(100).unwrap_err()
    };
    assert_eq!(SamplingParams::default().validate(100), Ok(()));
    assert_eq!(message(|p| p.temperature = -1.0), "temperature must be non-negative, got -1.");
    assert_eq!(message(|p| p.temperature = f32::NAN), "temperature must be a finite number, got NaN.");
    assert_eq!(message(|p| p.top_p = 0.0), "top_p must be in (0, 1], got 0.");
    assert_eq!(message(|p| p.top_p = f32::NAN), "top_p must be in (0, 1], got NaN.");
    assert_eq!(message(|p| p.min_p = 1.5), "min_p must be in [0, 1], got 1.5.");
    assert_eq!(message(|p| p.repetition_penalty = 0.0), "repetition_penalty must be greater than zero, got 0.");
    assert_eq!(message(|p| p.presence_penalty = 3.0), "presence_penalty must be in [-2, 2], got 3.");
    assert_eq!(message(|p| p.max_tokens = Some(0)), "max_tokens must be at least 1, got 0.");
    assert_eq!(message(|p| p.min_tokens = 17), "min_tokens must be less than or equal to max_tokens=16, got 17.");
    assert_eq!(message(|p| p.stop = vec![String::new()]), "stop cannot contain an empty string.");
    assert!(message(|p| p.n = 0).contains("n must be at least 1"));
    assert!(message(|p| p.logprobs = Some(21)).contains("greater than max allowed: 20"));
    assert!(message(|p| p.logit_bias = vec![(1, 101.0)]).contains("[-100, 100]"));
    assert!(message(|p| p.logit_bias = vec![(100, 1.0)]).contains("out of vocabulary"));
    assert!(message(|p| p.stop_token_ids = vec![100]).contains("out of vocabulary"));
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let chances = (0.0f32..3.0, 0usize..20, 0.01f32..=1.0, 0.0f32..=1.0);
    let penalties = (0.1f32..3.0, -2.0f32..=2.0, -2.0f32..=2.0);
    (chances, penalties, any::<bool>()).prop_map(|((temperature, top_k, top_p, min_p), (r, p, f), logprobs)| {
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty: r,
            presence_penalty: p,
            frequency_penalty: f,
            logprobs: logprobs.then_some(5),
            ..Default::default()
        }
    })
}

proptest! {
    /// Rows in another order, tokens counted in another order: the same tokens.
    #[test]
    fn a_sample_depends_on_its_own_sequence_only(
        rows in prop::collection::vec(prop::collection::vec(-10.0f32..10.0, 300), 1..6),
        params in any_params(),
        generated in prop::collection::vec(0u32..300, 0..50),
    ) {
        let sample_row = |i: usize, tokens: &mut dyn Iterator<Item = &u32>| {
            let mut counts = TokenCounts::new(&[1, 2, 3]);
            tokens.for_each(|&token| counts.push(token));
            sample(&rows[i], &params, &counts, &[], generated.len(), stream_seed(3, &format!("r{i}"), 0)).unwrap()
        };
        let forwards: Vec<_> = (0..rows.len()).map(|i| sample_row(i, &mut generated.iter())).collect();
        let backwards: Vec<_> = (0..rows.len()).rev().map(|i| sample_row(i, &mut generated.iter().rev())).collect();
        prop_assert_eq!(forwards, backwards.into_iter().rev().collect::<Vec<_>>());
    }

    /// Any row gives a token that may be chosen, or an error.
    #[test]
    fn any_row(
        row in prop::collection::vec(prop_oneof![any::<f32>(), Just(INF), Just(-INF), Just(0.0)], 0..200),
        params in any_params(),
        position: usize,
        seed: u64,
    ) {
        match sample(&row, &params, &TokenCounts::new(&[0, 5, 1000]), &[0], position, seed) {
            Ok(sampled) => {
                prop_assert!(row[sampled.token as usize] > -INF);
                if let Some(logprobs) = sampled.logprobs {
                    prop_assert!(logprobs.top.iter().chain([&logprobs.chosen]).all(|entry| entry.logprob <= 0.0));
                }
            }
            Err(LogitsError::NotANumber { token }) => prop_assert!(row[token as usize].is_nan()),
            Err(LogitsError::NothingLeft { .. }) => {}
        }
    }

    #[test]
    fn a_cut_that_removes_nothing_does_not_change_the_draw(
        row in prop::collection::vec(-5.0f32..5.0, 1..300),
        seed: u64,
    ) {
        // exp(-10) is more than min_p.
        let cut = SamplingParams { top_k: row.len(), min_p: 1e-9, ..Default::default() };
        let counts = TokenCounts::default();
        prop_assert_eq!(
            token(&row, &SamplingParams::default(), &counts, 0, seed),
            token(&row, &cut, &counts, 0, seed)
        );
    }
}
