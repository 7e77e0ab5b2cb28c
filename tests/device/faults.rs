//! One fault per kernel, planted in its source: the shipped model's accuracy falls, so the demo's number means something.

use fulmen::gpu::ShaderPatch;
use fulmen::policy::AttentionPlace::{self, Cpu, Gpu};
use libtest_mimic::{Failed, Trial};

use crate::generate::accuracy_with;

const N_TASKS: u64 = 32;
/// Untouched, the model answers nearly all of them.
const RIGHT: f64 = 0.95;
/// With a fault it does not.
const WRONG: f64 = 0.90;

struct Fault {
    kernel: &'static str,
    what: &'static str,
    from: &'static str,
    to: &'static str,
    attention: AttentionPlace,
}

const FAULTS: &[Fault] = &[
    Fault {
        kernel: "embed",
        what: "rows off by one",
        from: "ids[row] *",
        to: "(max(ids[row], 1u) - 1u) *",
        attention: Cpu,
    },
    Fault { kernel: "rms_norm", what: "rows unscaled", from: "* scale *", to: "*", attention: Cpu },
    Fault {
        kernel: "matmul",
        what: "weight rows off by one",
        from: "column * params.n_in + k",
        to: "(max(column, 1u) - 1u) * params.n_in + k",
        attention: Cpu,
    },
    Fault {
        kernel: "rotary",
        what: "no rotation",
        from: "rope_table[positions[row] * half + j]",
        to: "vec2(1.0, 0.0)",
        attention: Cpu,
    },
    Fault {
        kernel: "prompt_attention",
        what: "heads off by one",
        from: "block_table[tile.z + block] * params.kv_heads + kv_head)",
        to: "block_table[tile.z + block] * params.kv_heads + (kv_head + 1u) % params.kv_heads)",
        attention: Cpu,
    },
    Fault {
        kernel: "decode_attention",
        what: "values off by one row",
        from: "1u, token, begin, end, octet)",
        to: "1u, max(token, 1u) - 1u, begin, end, octet)",
        attention: Gpu,
    },
    Fault { kernel: "decode_combine", what: "sums undivided", from: "sum / total", to: "sum", attention: Gpu },
    Fault {
        kernel: "router_topk",
        what: "experts off by one",
        from: "ids[at] = chosen[lane];",
        to: "ids[at] = (chosen[lane] + 1u) % params.n_experts;",
        attention: Cpu,
    },
    Fault {
        kernel: "expert_sort",
        what: "rows off by one",
        from: "permutation[next] = a;",
        to: "permutation[next] = (a + 2u) % params.n_assignments;",
        attention: Cpu,
    },
    Fault {
        kernel: "expert_gate_up",
        what: "weight rows of gate off by one",
        from: "gate_quad(tile.place, element,",
        to: "gate_quad(tile.place, element - min(feature, 1u) * params.row_stride,",
        attention: Cpu,
    },
    Fault {
        kernel: "expert_down",
        what: "weight rows off by one",
        from: "down_quad(tile.place, element,",
        to: "down_quad(tile.place, element - min(output, 1u) * params.row_stride,",
        attention: Cpu,
    },
    Fault {
        kernel: "expert_combine",
        what: "the first expert left out",
        from: "var rank = 0u;",
        to: "var rank = 1u;",
        attention: Cpu,
    },
    Fault {
        kernel: "lm_head_sample",
        what: "ids off by one",
        from: "Sample(ids[0],",
        to: "Sample(ids[0] + 1u,",
        attention: Cpu,
    },
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("faults::without_one_the_tasks_are_solved", || {
        for attention in [Cpu, Gpu] {
            let accuracy = accuracy_with(Vec::new(), attention, N_TASKS);
            assert!(accuracy >= RIGHT, "{attention:?}: {accuracy:.3}");
        }
        Ok(())
    })];
    trials.extend(FAULTS.iter().map(|fault| {
        let name = format!("faults::{}: {}", fault.kernel, fault.what);
        Trial::test(name, move || -> Result<(), Failed> {
            let (kernel, from, to) = (fault.kernel.to_owned(), fault.from.to_owned(), fault.to.to_owned());
            let accuracy = accuracy_with(vec![ShaderPatch { kernel, from, to }], fault.attention, N_TASKS);
            assert!(accuracy < WRONG, "accuracy is {accuracy:.3}: the fault goes unnoticed");
            Ok(())
        })
    }));
    trials
}
