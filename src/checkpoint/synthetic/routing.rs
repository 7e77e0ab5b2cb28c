//! How often real models choose each expert: what synthetic routers are made to imitate.
//!
//! Selections counted over 208,896 tokens of C4 in layers 0, 7 and 15, from the routing data that the OLMoE authors published
//! (allenai/OLMoE). Mixtral's loads lie within 0.6 and 1.2 of the mean, OLMoE's between 0.2 and 3.

/// Mixtral-8x7B, 2 of 8.
const MIXTRAL: [[u32; 8]; 3] = [
    [
        56_947, 49_733, 50_426, 49_453, 52_127, 57_956, 42_632, 58_518,
    ],
    [
        50_706, 54_716, 51_313, 50_515, 56_215, 49_525, 53_315, 51_487,
    ],
    [
        47_396, 58_718, 55_366, 32_510, 55_049, 57_385, 57_170, 54_198,
    ],
];

/// OLMoE-1B-7B, 8 of 64.
const OLMOE: [[u32; 64]; 3] = [
    [
        15_352, 21_772, 20_835, 24_412, 23_628, 26_641, 29_203, 26_722, 19_913, 39_597, 26_514, 34_849, 26_801,
        20_892, 23_094, 26_147, 26_575, 30_730, 22_133, 32_099, 26_444, 17_538, 34_253, 7_824, 29_910, 23_444, 27_802,
        21_787, 19_032, 26_270, 27_031, 21_951, 20_512, 28_248, 23_013, 23_583, 27_137, 24_637, 28_386, 25_982,
        22_654, 78_768, 21_904, 25_227, 26_183, 22_559, 30_535, 22_656, 25_947, 24_586, 25_340, 33_103, 18_673,
        19_662, 20_839, 25_277, 21_179, 35_391, 39_219, 26_893, 28_965, 28_557, 22_371, 21_987,
    ],
    [
        33_614, 69_402, 5_232, 16_547, 18_407, 39_519, 20_771, 10_923, 19_187, 19_969, 20_388, 19_820, 16_514, 33_695,
        22_703, 33_556, 24_080, 10_990, 55_941, 29_873, 27_706, 15_059, 26_146, 33_641, 27_067, 43_673, 33_269,
        18_021, 15_655, 27_960, 29_476, 31_832, 24_485, 31_229, 20_392, 14_140, 25_469, 26_366, 32_023, 20_448,
        23_217, 31_045, 16_209, 20_788, 25_985, 12_965, 43_770, 34_276, 34_785, 18_858, 20_600, 16_185, 28_327,
        39_100, 19_808, 20_383, 31_948, 27_193, 13_853, 37_476, 29_847, 29_569, 24_771, 25_022,
    ],
    [
        21_567, 10_721, 45_568, 33_681, 24_993, 19_514, 13_654, 65_258, 16_187, 7_740, 39_707, 13_287, 11_855, 41_070,
        21_711, 38_844, 12_823, 17_813, 11_637, 9_210, 27_376, 56_399, 20_065, 34_506, 16_668, 55_641, 49_360, 43_711,
        30_799, 10_879, 16_855, 23_390, 6_522, 4_969, 13_755, 15_191, 20_133, 9_403, 34_001, 33_361, 23_069, 23_551,
        34_269, 17_759, 5_961, 26_921, 36_127, 30_020, 33_805, 38_881, 14_660, 44_053, 29_930, 15_615, 34_983, 38_092,
        42_438, 14_563, 24_141, 27_169, 24_080, 33_180, 30_947, 27_130,
    ],
];

/// Load of each of `experts` experts of a layer against their mean. A count of experts that was not measured takes its
/// loads from OLMoE's, evenly spread over their sorted values.
pub fn loads(experts: usize, layer: usize) -> Vec<f64> {
    let relative = |counts: &[u32]| {
        let mean = counts.iter().map(|n| *n as f64).sum::<f64>() / counts.len() as f64;
        counts.iter().map(|n| *n as f64 / mean).collect::<Vec<f64>>()
    };
    match experts {
        8 => relative(&MIXTRAL[layer % MIXTRAL.len()]),
        64 => relative(&OLMOE[layer % OLMOE.len()]),
        _ => {
            let mut sorted = OLMOE[layer % OLMOE.len()];
            sorted.sort_unstable();
            let spread: Vec<u32> = (0..experts).map(|e| sorted[(2 * e + 1) * sorted.len() / (2 * experts)]).collect();
            relative(&spread)
        }
    }
}

/// What to add to standard normal router logits so that the best `chosen` of them fall on the experts in proportion to
/// `loads`. Found by iteration on seeded samples, so it is the same on every machine.
pub fn biases(loads: &[f64], chosen: usize) -> Vec<f32> {
    const SAMPLES: usize = 4096;
    const ROUNDS: usize = 40;
    let experts = loads.len();
    let mut random = super::Random::new(0x5eed);
    let noise: Vec<f32> = (0..SAMPLES * experts).map(|_| random.normal()).collect();
    let mut biases = vec![0.0f32; experts];
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for _ in 0..ROUNDS {
        let mut counts = vec![0usize; experts];
        for sample in noise.chunks_exact(experts) {
            let logit = |e: &usize| sample[*e] + biases[*e];
            order.clear();
            order.extend(0..experts);
            if chosen < experts {
                order.select_nth_unstable_by(chosen - 1, |a, b| logit(b).total_cmp(&logit(a)));
            }
            for e in &order[..chosen] {
                counts[*e] += 1;
            }
        }
        for ((bias, load), count) in biases.iter_mut().zip(loads).zip(counts) {
            let share = count.max(1) as f64 * experts as f64 / (SAMPLES * chosen) as f64;
            *bias += 0.5 * (load / share).ln() as f32;
        }
    }
    biases
}
