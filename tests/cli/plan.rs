//! `fulmen plan --paper`: needs neither model nor adapter.

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
    fulmen(["plan", "--shape", "dbrx"]).run().ends(1).prints_nothing().says(["not there yet", "--paper", "--hardware"]);
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

pub fn anywhere() -> Vec<Trial> {
    vec![
        Trial::test("plan::one_json_object", one_json_object),
        Trial::test("plan::a_table_for_people", a_table_for_people),
        Trial::test("plan::a_picture", a_picture),
        Trial::test("plan::every_setting_beside_what_was_published", every_setting_beside_what_was_published),
        Trial::test("plan::what_cannot_be_planned_is_refused", what_cannot_be_planned_is_refused),
    ]
}
