//! Made-up weights: the same bytes however they are asked for, of every published shape, and routers that choose as real ones do.

use fulmen::checkpoint::Synthetic;
use fulmen::checkpoint::synthetic::Random;
use fulmen::checkpoint::synthetic::routing::{biases, loads};
use fulmen::model::presets;

#[test]
fn any_piece_has_the_bytes_of_the_whole() {
    let mut config = presets::mixtral_tiny();
    config.keep_layers(2);
    let synthetic = Synthetic::new(config);
    let mut random = Random::new(5);
    for tensor in synthetic.inventory().tensors() {
        let bytes = tensor.bytes();
        let mut whole = vec![0; bytes as usize];
        synthetic.fill(tensor.role, 0..bytes, &mut whole);
        for _ in 0..5 {
            let start = random.bits() % (bytes / 2) * 2;
            let end = start + 2 + random.bits() % ((bytes - start) / 2) * 2;
            let mut piece = vec![0; (end.min(bytes) - start) as usize];
            synthetic.fill(tensor.role, start..end.min(bytes), &mut piece);
            assert!(piece == whole[start as usize..end.min(bytes) as usize], "{}: {start}..{end}", tensor.name);
        }
    }
}

/// Every tensor of the six shapes has values; MXFP4's scales are near those of the other weights.
#[test]
fn the_six_published_shapes_are_made_up() {
    for name in presets::NAMES {
        let mut config = presets::preset(name).expect("a published shape");
        config.keep_layers(2);
        let synthetic = Synthetic::new(config);
        for tensor in synthetic.inventory().tensors() {
            let start = tensor.bytes() / 2 / 64 * 64;
            let mut bytes = vec![0; (tensor.bytes() - start).min(4096) as usize];
            synthetic.fill(tensor.role, start..start + bytes.len() as u64, &mut bytes);
            if tensor.name.ends_with("_scales") {
                assert!(bytes.iter().all(|exponent| (115..127).contains(exponent)), "{name} {}", tensor.name);
            } else if !tensor.name.contains("o_proj.bias") && !tensor.name.contains("down_proj_bias") {
                assert!(bytes.iter().any(|byte| *byte != 0), "{name} {} is all zeros", tensor.name);
            }
        }
    }
}

/// With the biases, seeded noise falls on the experts as the published counts say.
#[test]
fn routers_choose_as_real_ones_do() {
    for (experts, chosen) in [(8, 2), (64, 8), (16, 4), (128, 8), (32, 4)] {
        for layer in 0..3 {
            let loads = loads(experts, layer);
            assert!((loads.iter().sum::<f64>() / experts as f64 - 1.0).abs() < 1e-9, "loads have mean 1");
            let biases = biases(&loads, chosen);
            let mut random = Random::new(77 + layer as u64);
            let (mut counts, samples) = (vec![0usize; experts], 20_000);
            for _ in 0..samples {
                let mut order: Vec<(f32, usize)> = (0..experts).map(|e| (random.normal() + biases[e], e)).collect();
                order.sort_by(|a, b| b.0.total_cmp(&a.0));
                order[..chosen].iter().for_each(|(_, e)| counts[*e] += 1);
            }
            for (expert, (load, count)) in loads.iter().zip(counts).enumerate() {
                let share = count as f64 * experts as f64 / (samples * chosen) as f64;
                // Sampling noise of both sides: a few parts in a hundred of the mean.
                assert!(
                    (share - load).abs() < 0.12 + 0.1 * load,
                    "{experts} experts, layer {layer}: {expert} has {share:.2}, wanted {load:.2}"
                );
            }
        }
    }
}
