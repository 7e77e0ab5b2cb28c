//! `fulmen plan`: needs neither weights nor, for a machine by name, an adapter.

use libtest_mimic::{Failed, Trial};

use crate::common::*;

const S1_PADDED: [&str; 10] =
    ["plan", "--paper", "--shape", "mixtral-8x7b", "--hardware", "t4", "--prompt-len", "418", "--gen-len", "128"];

fn one_json_object() -> Result<(), Failed> {
    let plan = fulmen(S1_PADDED).words(["--json"]).run().ends(0).json();
    assert_eq!(
        (&plan["micro_batch"], &plan["micro_batches"], &plan["sequences"]),
        (&36.into(), &14.into(), &504.into())
    );
    let near = |pointer: &str, expected: f64| {
        let value =
            plan.pointer(pointer).and_then(|value| value.as_f64()).unwrap_or_else(|| panic!("{pointer} in {plan}"));
        assert!((value / expected - 1.0).abs() < 2e-3, "{pointer} is {value}");
    };
    near("/step_seconds", 5.248);
    near("/tokens_per_second", 96.79);
    near("/resident_weights", 0.000_375_9);
    near("/turning_points/p1", 46.57);
    near("/device_memory/allowed", 0.86 * 15.0 * 1_073_741_824.0);
    near("/host_memory/experts", 90.16e9);
    assert_eq!(plan["plateau"], serde_json::json!({ "first": 14, "last": 14 }));
    assert_eq!((&plan["attention"], &plan["binding_roof"]), (&"cpu".into(), &"link".into()));
    assert_eq!(plan["binding"], "link-bound: 84.0 GiB over 16.0 GiB/s take 5.25 s");
    Ok(())
}

fn a_table_for_people() -> Result<(), Failed> {
    fulmen(S1_PADDED).run().ends(0).prints([
        "504 sequences in 14 micro-batches of 36",
        "0 whole of 8 in each layer",
        "12.9 GiB of 12.9 GiB (86 % of 15.0 GiB)",
        "84.0 GiB  experts",
        "96.8 tok/s in decode",
        "link-bound: 84.0 GiB over 16.0 GiB/s take 5.25 s",
        "1 GiB/s more over the link: +6.3 %",
    ]);
    let plateau =
        ["plan", "--paper", "--shape", "Mixtral-8x7B", "--hardware", "T4", "--prompt-len", "256", "--gen-len", "50"];
    fulmen(plateau).run().ends(0).prints(["684 sequences", "(19 to 41 micro-batches are predicted exactly equal"]);
    let plan = fulmen(plateau).words(["--json"]).run().ends(0).json();
    assert_eq!(plan["plateau"], serde_json::json!({ "first": 19, "last": 41 }));
    // A folder's config.json does as well as a name.
    let words = ["plan", "--paper", "--hardware", "t4", "--prompt-len", "8", "--gen-len", "8", "--json"];
    let plan = fulmen(words).words([example("model").to_str().expect("a path")]).run().ends(0).json();
    assert_eq!((&plan["model"], &plan["shape"]["layers"]), (&"model".into(), &4.into()));
    assert_eq!(plan["resident_weights"], 1.0, "all of the shipped model fits");
    Ok(())
}

fn a_picture() -> Result<(), Failed> {
    let folder = Folder::new();
    let file = folder.path("roofline.svg");
    fulmen(S1_PADDED).path("--svg", &file).run().ends(0).prints(["504 sequences"]);
    let svg = std::fs::read_to_string(&file)?;
    let shown = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/roofline.svg");
    assert_eq!(svg, std::fs::read_to_string(shown)?, "docs/roofline.svg is this picture");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    for text in
        ["experts, N = 504", "attention, on the host", "P1 46.6", "P2 169", "GPU 65.0 TFLOP/s", "link 16.0 GiB/s"]
    {
        assert!(svg.contains(text), "{text} is not in {svg}");
    }
    fulmen(S1_PADDED).path("--svg", &folder.path("no/such/folder.svg")).run().ends(1).says(["--svg", "folder.svg"]);
    Ok(())
}

fn every_setting_beside_what_was_published() -> Result<(), Failed> {
    let page = fulmen(["plan", "--paper", "--published"]).run().ends(0).stdout;
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/predictions.md");
    assert_eq!(page, std::fs::read_to_string(file)?);
    Ok(())
}

fn what_cannot_be_planned_is_refused() -> Result<(), Failed> {
    let paper = |words: [&str; 8]| fulmen(["plan", "--paper"]).words(words).run().prints_nothing();
    fulmen(["plan", "--shape", "dbrx"]).run().ends(2).prints_nothing().says(["--prompt-len", "--workload"]);
    fulmen(["plan", "--paper"]).run().ends(2).prints_nothing().says(["--shape", "mixtral-8x7b", "gpt-oss-20b"]);
    fulmen(["plan", "--paper", "--shape", "dbrx"]).run().ends(2).says(["--hardware", "t4", "rtx4090"]);
    fulmen(["plan", "--paper", "--shape", "dbrx", "--hardware", "l4"]).run().ends(2).says(["--prompt-len"]);
    fulmen(["plan", "--paper", "--shape", "gpt-5"]).run().ends(2).says(["--shape", "gpt-5", "qwen3-30b-a3b"]);
    fulmen(["plan", "--published"]).run().ends(2).says(["--published", "--paper"]);
    fulmen(["plan", "--paper", "--published", "--shape", "dbrx"]).run().ends(2).says(["--published", "--shape"]);
    let ran = paper(["--shape", "dbrx", "--hardware", "t4", "--prompt-len", "77", "--gen-len", "1"]).ends(2);
    ran.says(["--gen-len is 1; it must be 2 to"]);
    let ran = paper(["--shape", "mixtral-8x22b", "--hardware", "l4", "--prompt-len", "77", "--gen-len", "128"]).ends(1);
    ran.says(["no policy fits l4", "of host memory (experts 24", "147 GiB are allowed, 80 % of 184 GiB"]);
    let nowhere = ["plan", "--paper", "nowhere", "--hardware", "t4", "--prompt-len", "8", "--gen-len", "8"];
    fulmen(nowhere).run().ends(1).prints_nothing().says(["nowhere"]);
    Ok(())
}

const OWN: [&str; 9] =
    ["plan", "--shape", "mixtral-8x7b", "--hardware", "l4", "--prompt-len", "418", "--gen-len", "128"];
/// Less to choose from, where what is chosen is not the question.
const FEW: [&str; 6] = ["--micro-batches", "2", "--expert-groups", "2", "--page-size", "32MiB"];

fn own_mode_as_a_table() -> Result<(), Failed> {
    let ran = fulmen(OWN).words(FEW).words(["--runners-up", "2"]).run().ends(0);
    ran.prints([
        " of 8 experts resident, ring of ",
        " GiB  experts that stream",
        "link-bound: ",
        "1 GiB more of host memory: +",
        "1 GB/s more over the link: +",
        "flags     --schedule grouped --max-num-seqs ",
        "assumed of them: 50 % of the GPU's FLOP/s",
        "behind    ",
        "its h2d works ",
    ]);
    Ok(())
}

fn own_mode_as_json_and_its_flags() -> Result<(), Failed> {
    let folder = Folder::new();
    let file = folder.path("policy.json");
    let plan = fulmen(OWN).words(FEW).words(["--json"]).path("--save-policy", &file).run().ends(0).json();
    assert_eq!(
        (&plan["mode"], &plan["binding_roof"], &plan["policy"]["attention"]),
        (&"own".into(), &"link".into(), &"cpu".into())
    );
    let number = |pointer: &str| {
        plan.pointer(pointer).and_then(|value| value.as_f64()).unwrap_or_else(|| panic!("{pointer} in {plan}"))
    };
    assert!(number("/device_bytes/needed") <= number("/device_bytes/allowed"));
    assert!(number("/host_bytes/needed") <= number("/host_bytes/allowed"));
    assert!(number("/step_seconds") >= number("/lanes/to_device"));
    let saved: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    assert_eq!(saved, plan["policy"], "--save-policy writes what is planned");
    // The flags that are printed give the same policy again.
    let flags: Vec<String> = plan["flags"]
        .as_array()
        .expect("flags")
        .iter()
        .flat_map(|flag| flag.as_str().expect("text").split(' ').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let mut call = fulmen(OWN).words(["--json"]);
    for flag in &flags {
        call = call.words([flag]);
    }
    let again = call.run().ends(0).json();
    assert_eq!(again["policy"], plan["policy"]);
    assert_eq!(again["tokens_per_second"], plan["tokens_per_second"]);
    assert_eq!(again["search"]["fitting"], 1);
    Ok(())
}

fn own_mode_as_a_picture() -> Result<(), Failed> {
    let folder = Folder::new();
    let file = folder.path("plan.svg");
    fulmen(OWN).words(FEW).path("--svg", &file).run().ends(0);
    let svg = std::fs::read_to_string(&file)?;
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!((svg.matches("<svg ").count(), svg.matches("</svg>").count()), (3, 3), "two pictures in one");
    for text in ["P1 ", "P2 ", "host memory", "predicted: ", "post_attention", ">h2d<", ">cpu<"] {
        assert!(svg.contains(text), "{text} is not in {svg}");
    }
    Ok(())
}

/// Lengths from flags, from a trace, from a batch file with its tokenizer.
fn own_mode_for_a_workload() -> Result<(), Failed> {
    let folder = Folder::new();
    let trace = folder.path("trace.csv");
    std::fs::write(&trace, "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,100,10\nthen,300,30\n")?;
    let on = ["plan", "--hardware", "rtx3060", "--json"];
    let plan = fulmen(on).words(["--shape", "mixtral-8x7b"]).words(FEW).path("--workload", &trace).run().ends(0).json();
    assert_eq!((&plan["workload"]["prompt_tokens"], &plan["workload"]["requests"]), (&200.0.into(), &2.into()));
    assert!(plan["run_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "an end is predicted: {plan}");
    assert!(plan["policy"]["max_sequences"].as_u64() <= Some(2), "no more sequences than requests");
    let model = example("model");
    let batch = fulmen(on)
        .words([model.to_str().expect("a path")])
        .path("--workload", &example("tasks.jsonl"))
        .run()
        .ends(0)
        .json();
    assert_eq!(batch["workload"]["requests"], 360);
    assert_eq!(batch["policy"]["resident_experts"], 8, "all of the shipped model fits");
    fulmen(on).words(["--shape", "dbrx"]).path("--workload", &example("tasks.jsonl")).run().ends(2).says(["tokenizer"]);
    fulmen(on).words(["--shape", "dbrx"]).path("--workload", &folder.path("none.csv")).run().ends(1).says(["none.csv"]);
    Ok(())
}

fn own_mode_refuses_with_numbers() -> Result<(), Failed> {
    let on = ["plan", "--shape", "dbrx", "--hardware", "t4", "--prompt-len", "77", "--gen-len", "32"];
    fulmen(on)
        .words(["--gpu-memory", "3GiB"])
        .run()
        .ends(1)
        .prints_nothing()
        .says(["no policy fits", "3.00 GiB are allowed"]);
    fulmen(on).words(["--micro-batches", "300"]).run().ends(2).says(["--micro-batches is 300"]);
    fulmen(on).words(["--margin", "100"]).run().ends(2).says(["--margin"]);
    Ok(())
}

pub fn anywhere() -> Vec<Trial> {
    vec![
        Trial::test("plan::own_mode_as_a_table", own_mode_as_a_table),
        Trial::test("plan::own_mode_as_json_and_its_flags", own_mode_as_json_and_its_flags),
        Trial::test("plan::own_mode_as_a_picture", own_mode_as_a_picture),
        Trial::test("plan::own_mode_for_a_workload", own_mode_for_a_workload),
        Trial::test("plan::own_mode_refuses_with_numbers", own_mode_refuses_with_numbers),
        Trial::test("plan::one_json_object", one_json_object),
        Trial::test("plan::a_table_for_people", a_table_for_people),
        Trial::test("plan::a_picture", a_picture),
        Trial::test("plan::every_setting_beside_what_was_published", every_setting_beside_what_was_published),
        Trial::test("plan::what_cannot_be_planned_is_refused", what_cannot_be_planned_is_refused),
    ]
}

/// Measured, searched for, run, kept, and run again; and refused where it is of something else.
fn measured_searched_and_kept() -> Result<(), Failed> {
    let folder = Folder::new();
    let (profile, policy) = (folder.path("profile.json"), folder.path("policy.json"));
    let model = example("model");
    let model = model.to_str().expect("a path");
    fulmen(["calibrate", "--seconds", "2", model]).path("--output", &profile).run().ends(0).says([
        "stages of a layer",
        "link    ",
        "profile ",
    ]);
    // Attention on the GPU rounds differently.
    let hello = ["--prompt", "Rule: X +", "--max-tokens", "4", "--temperature", "0", "--attention", "cpu"];
    let plain = generate(hello).run().ends(0).says(["policy  the defaults", "fulmen calibrate"]);
    let searched = generate(hello).path("--profile", &profile).path("--save-policy", &policy).run().ends(0);
    let searched = searched.says(["policy  best of ", "tok/s predicted", "predicted / measured"]);
    let kept = generate(hello).path("--policy", &policy).run().ends(0);
    assert_eq!(plain.stdout, searched.stdout, "a policy changes time, never tokens");
    assert_eq!(plain.stdout, kept.stdout);
    // What the flags say wins.
    let wins = folder.path("wins.json");
    let flags = ["--max-num-seqs", "3", "--micro-batches", "3"];
    generate(hello).words(flags).path("--policy", &policy).path("--save-policy", &wins).run().ends(0);
    let wins: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&wins)?)?;
    assert_eq!((&wins["max_sequences"], &wins["micro_batches"]), (&3.into(), &3.into()));
    // `plan` takes the same profile for this machine, and refuses it for other layers.
    let words = ["plan", "--prompt-len", "20", "--gen-len", "8"];
    fulmen(words)
        .words([model])
        .path("--profile", &profile)
        .run()
        .ends(0)
        .prints(["this one: ", "as `fulmen calibrate` measured it"]);
    let refused = fulmen(words).words(["--shape", "olmoe-1b-7b"]).path("--profile", &profile).run().ends(1);
    refused.says(["another kind of model", "(here:", "fulmen calibrate"]);
    fulmen(words).words([model]).run().ends(1).says([
        "nothing was measured on this machine",
        "fulmen calibrate",
        "--hardware",
    ]);
    std::fs::write(&profile, "{}")?;
    generate(hello).path("--profile", &profile).run().ends(1).says(["profile.json"]);
    Ok(())
}

pub fn on_adapter() -> Vec<Trial> {
    vec![Trial::test("plan::measured_searched_and_kept", measured_searched_and_kept)]
}
