//! Every kernel against its reference: odd sizes, every dtype and tunable, poisoned outputs; and a row's bits alone against
//! its bits among other rows.

mod add_bias;
mod attention;
mod cooperative;
mod cooperative_attention;
mod copy_rows;
mod decode_attention;
mod decode_combine;
mod embed;
mod expert_combine;
mod expert_down;
mod expert_gate_up;
mod expert_sort;
mod experts;
mod half_rows;
mod kv_quantise;
mod layer_norm;
mod lm_head_sample;
mod matmul;
mod mxfp4;
mod prompt_attention;
mod qk_norm;
mod rms_norm;
mod rotary;
mod router_topk;

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(add_bias::trials());
    trials.extend(cooperative::trials());
    trials.extend(cooperative_attention::trials());
    trials.extend(copy_rows::trials());
    trials.extend(decode_attention::trials());
    trials.extend(decode_combine::trials());
    trials.extend(embed::trials());
    trials.extend(expert_combine::trials());
    trials.extend(expert_down::trials());
    trials.extend(expert_gate_up::trials());
    trials.extend(expert_sort::trials());
    trials.extend(half_rows::trials());
    trials.extend(kv_quantise::trials());
    trials.extend(layer_norm::trials());
    trials.extend(lm_head_sample::trials());
    trials.extend(matmul::trials());
    trials.extend(mxfp4::trials());
    trials.extend(prompt_attention::trials());
    trials.extend(qk_norm::trials());
    trials.extend(rms_norm::trials());
    trials.extend(rotary::trials());
    trials.extend(router_topk::trials());
    trials
}
