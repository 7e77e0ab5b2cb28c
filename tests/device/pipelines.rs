//! Kernels that are compiled before anyone dispatches them.

use std::sync::Arc;

use fulmen::checkpoint::Dtype;
use fulmen::gpu::{Kernel, Pipelines, ShaderPatch, Variant};
use fulmen::kernels::embed::EMBED;
use fulmen::kernels::matmul::MATMUL;
use libtest_mimic::Trial;

use crate::common::pipelines;

fn variants() -> Vec<(&'static Kernel, Variant)> {
    let tiles = [16, 32, 64].map(|rows| Variant::new(Dtype::Bf16).with("TILE_ROWS", rows));
    tiles.into_iter().map(|variant| (&MATMUL, variant)).chain([(&EMBED, Variant::new(Dtype::F16))]).collect()
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("pipelines::whoever_comes_while_a_kernel_compiles_gets_it", || {
            let of_its_own = Arc::new(Pipelines::new(pipelines().gpu().clone()));
            let preparing = of_its_own.prepare_ahead(variants());
            for (kernel, variant) in variants() {
                of_its_own.prepare(kernel, &variant).expect("it compiles");
            }
            drop(preparing);
            Ok(())
        }),
        Trial::test("pipelines::what_fails_ahead_fails_again_for_who_needs_it", || {
            let from = "no such text".to_owned();
            let patch = ShaderPatch { kernel: EMBED.name.to_owned(), from, to: String::new() };
            let patched = Arc::new(Pipelines::with_patches(pipelines().gpu().clone(), vec![patch]));
            let preparing = patched.prepare_ahead(variants());
            for (kernel, variant) in variants() {
                let result = patched.prepare(kernel, &variant);
                assert_eq!(result.is_err(), kernel.name == EMBED.name, "{}: {result:?}", kernel.name);
            }
            drop(preparing);
            Ok(())
        }),
        Trial::test("pipelines::the_rest_is_left_when_it_is_dropped", || {
            let of_its_own = Arc::new(Pipelines::new(pipelines().gpu().clone()));
            drop(of_its_own.prepare_ahead(variants()));
            // Its threads have gone, and let go of the pipelines.
            assert_eq!(Arc::strong_count(&of_its_own), 1);
            Ok(())
        }),
    ]
}
