//! What the shipped model cannot show, since it is a Mixtral: that no policy changes a bit of the other families, that MXFP4 is the
//! same weights as bf16, and that the goldens notice a fault in each part that only these families use.

use std::path::{Path, PathBuf};

use fulmen::gpu::ShaderPatch;
use fulmen::plan::Wishes;
use fulmen::policy::AttentionPlace::{self, Cpu, Gpu};
use libtest_mimic::{Failed, Trial};

use crate::goldens::{Answers, Golden, TOLERANCE, answer, answer_with, worst_error};

fn folder(golden: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(golden)
}

fn assert_same_bits(what: &str, got: &Answers, want: &Answers) {
    assert_eq!(got.tokens, want.tokens, "{what}");
    assert_eq!(got.logits.len(), want.logits.len(), "{what}");
    for (place, want) in &want.logits {
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got.logits[place]), bits(want), "{what}: {place:?}");
    }
}

/// Two requests, in rings of two sizes, pages that cut matrices and scales, whole prompts and chunks, one group and two.
fn no_policy_changes_a_bit(golden: &str) {
    let folder = folder(golden);
    let golden = Golden::open(&folder);
    let requests = || vec![golden.request("first"), golden.request("second")];
    for attention in [Cpu, Gpu] {
        let plain = answer(&folder, Wishes { attention: Some(attention), ..Wishes::default() }, requests());
        let cut = Wishes {
            attention: Some(attention),
            resident_experts: Some(0),
            ring_experts: Some(3),
            prompt_chunk: Some(7),
            page_bytes: Some(600),
            ..Wishes::default()
        };
        assert_same_bits("streamed", &answer(&folder, cut, requests()), &plain);
    }
}

struct Fault {
    golden: &'static str,
    kernel: &'static str,
    what: &'static str,
    from: &'static str,
    to: &'static str,
    attention: AttentionPlace,
}

const fn fault(
    golden: &'static str,
    kernel: &'static str,
    what: &'static str,
    from: &'static str,
    to: &'static str,
) -> Fault {
    Fault { golden, kernel, what, from, to, attention: Cpu }
}

const FAULTS: &[Fault] = &[
    fault("dbrx", "layer_norm", "the mean left in", "(quad - mean) * scale * gain", "quad * scale * gain"),
    fault("dbrx", "rotary", "no clip", "params.clip == 0.0", "params.clip >= 0.0"),
    fault(
        "dbrx",
        "expert_down",
        "columns of w2 off by one",
        "= output * params.row",
        "= (max(output, 1u) - 1u) * params.row",
    ),
    fault("qwen3_moe", "qk_norm", "heads unscaled", "* scale *", "*"),
    fault("olmoe", "router_topk", "weights renormalised", "params.renormalise != 0u", "params.renormalise == 0u"),
    fault("gpt_oss", "add_bias", "no biases", "+= bias[column]", "+= 0.0 * bias[column]"),
    fault("gpt_oss", "prompt_attention", "no sinks", "params.has_sinks != 0u", "params.has_sinks == 2u"),
    Fault {
        attention: Gpu,
        ..fault("gpt_oss", "decode_combine", "no sinks", "params.has_sinks != 0u", "params.has_sinks == 2u")
    },
    fault("gpt_oss", "expert_gate_up", "no biases", "params.biased != 0u", "params.biased == 2u"),
    fault("gpt_oss", "expert_gate_up", "no limit", "params.limit == 0.0", "params.limit >= 0.0"),
    fault("gpt_oss", "expert_gate_up", "gate for up", "element + params.up_first", "element"),
    fault("gpt_oss", "expert_down", "no biases", "params.biased != 0u", "params.biased == 2u"),
    fault("gpt_oss_mxfp4", "expert_gate_up", "scales of other blocks", "i >> 5u", "i >> 6u"),
    fault("gpt_oss_mxfp4", "expert_down", "high half for low half", "vec4(0u, 4u, 8u, 12u)", "vec4(4u, 0u, 12u, 8u)"),
];

fn is_noticed(fault: &Fault) -> Result<(), Failed> {
    let golden = Golden::open(&folder(fault.golden));
    let patch = ShaderPatch { kernel: fault.kernel.to_owned(), from: fault.from.to_owned(), to: fault.to.to_owned() };
    let wishes = Wishes { attention: Some(fault.attention), ..Wishes::default() };
    // The golden's own text is fed, so that an early wrong token does not end the comparison.
    let mut request = golden.request("golden");
    request.prompt = golden.ids[..golden.ids.len() - 4].to_vec();
    request.params.max_tokens = Some(4);
    let answers = answer_with(&folder(fault.golden), wishes, vec![patch], vec![request]);
    let wrong = answers.tokens["golden"] != golden.ids[golden.ids.len() - 4..];
    let (error, _) = worst_error(&golden, &answers);
    if !wrong && error <= TOLERANCE {
        return Err(format!("logits are off by {error:.1e} at most: the fault goes unnoticed").into());
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for golden in ["dbrx_odd_sizes", "qwen3_moe_odd_sizes", "olmoe_clip", "gpt_oss_odd_sizes", "gpt_oss_mxfp4"] {
        trials.push(Trial::test(format!("families::no_policy_changes_a_bit::{golden}"), move || {
            no_policy_changes_a_bit(golden);
            Ok(())
        }));
    }
    trials.push(Trial::test("families::mxfp4_has_the_bits_of_the_same_weights_in_bf16", || {
        let golden = Golden::open(&folder("gpt_oss"));
        for attention in [Cpu, Gpu] {
            let wishes = Wishes { attention: Some(attention), ..Wishes::default() };
            let of = |name: &str| answer(&folder(name), wishes, vec![golden.request("golden")]);
            assert_same_bits("MXFP4", &of("gpt_oss_mxfp4"), &of("gpt_oss"));
        }
        Ok(())
    }));
    trials.extend(FAULTS.iter().map(|fault| {
        let name = format!("families::{}::notices {}: {}", fault.golden, fault.kernel, fault.what);
        Trial::test(name, move || is_noticed(fault))
    }));
    trials
}
