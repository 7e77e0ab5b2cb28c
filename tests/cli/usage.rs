//! Command lines: what is refused and with which code, what the commands without a model show, and what needs a machine that
//! is not there.

use std::path::Path;

use fulmen::gpu::list_adapters;
use libtest_mimic::{Failed, Trial};
use serde_json::Value;

use crate::common::*;

/// Exit code 2, the option by name, nothing on stdout, nothing opened.
fn wrong_command_lines_end_with_2() -> Result<(), Failed> {
    let model = example("model");
    let batch = |words: [&str; 2]| {
        run_batch(&example("tasks.jsonl"), Path::new("never")).words(words).run().ends(2).prints_nothing()
    };
    batch(["--shard", "3/3"]).says(["--shard", "3/3", "the last one of 3 is 2/3"]);
    batch(["--shard", "half"]).says(["--shard", "i/n"]);
    batch(["--kv-memory", "lots"]).says(["--kv-memory", "lots"]);
    batch(["--attention", "tpu"]).says(["--attention", "tpu", "cpu, gpu"]);
    batch(["--limit", "-1"]).says(["-1"]);
    batch(["--no-such-flag", "1"]).says(["--no-such-flag"]);
    batch(["--resume", "--overwrite"]).says(["--resume", "--overwrite"]);
    run_batch(Path::new("-"), Path::new("never")).words(["--strict"]).run().ends(2).says(["--strict", "stdin"]);

    fulmen(["no-such-command"]).run().ends(2).says(["no-such-command"]);
    fulmen([]).run().ends(2).says(["Usage: fulmen", "run-batch"]);
    fulmen(["run-batch", "-i", "-"]).run().ends(2).says(["--model", "--output-file"]);
    fulmen(["devices", "--log-level", "fulmen=loud"]).run().ends(2).says(["--log-level", "fulmen=loud"]);
    fulmen(["devices"]).env("RUST_LOG", "fulmen=loud").run().ends(2).says(["RUST_LOG", "fulmen=loud"]);

    let generate = |words: [&str; 4]| generate(words).run().ends(2).prints_nothing();
    generate(["--prompt", "X", "--temperature", "-1"]).says(["temperature", "-1"]);
    generate(["--prompt", "X", "--num-completions", "3"]).says(["--json"]);
    generate(["--prompt", "X", "--logprobs", "1"]).says(["--json"]);
    generate(["--prompt", "X", "--chat", "Y"]).says(["--prompt", "--chat"]);
    generate(["--prompt", "X", "--system", "Y"]).says(["--prompt", "--system"]);
    fulmen(["generate", "--prompt", ""]).path("-m", &model).run().ends(2).says(["prompt is empty"]);
    fulmen(["generate"]).path("-m", &model).run().ends(2).says(["prompt is empty"]);
    fulmen(["generate"]).path("-m", &model).stdin(b"\xff").run().ends(1).says(["stdin is not UTF-8"]);
    Ok(())
}

/// Help and version are data, with code 0. Every command has a help that names its options.
fn help_is_on_stdout() -> Result<(), Failed> {
    fulmen(["--version"]).run().ends(0).prints(["fulmen ", env!("CARGO_PKG_VERSION")]);
    fulmen(["--help"]).run().ends(0).prints(["generate", "run-batch", "plan", "inspect", "devices", "score"]);
    let helps = [
        ("run-batch", ["--input-file", "--resume", "--gpu-memory"]),
        ("generate", ["--prompt", "--temperature", "--max-tokens"]),
        ("plan", ["--paper", "--shape", "--hardware"]),
        ("inspect", ["--model", "--json", "--chat-template"]),
        ("devices", ["--json", "--log-level", "--help"]),
        ("score", ["--results", "--answers", "--json"]),
    ];
    for (command, options) in helps {
        fulmen([command, "--help"]).run().ends(0).prints(options);
    }
    Ok(())
}

fn inspect_shows_the_model() -> Result<(), Failed> {
    let inspect = || fulmen(["inspect"]).path("--model", &example("model"));
    inspect().run().ends(0).prints([
        "MixtralForCausalLM",
        "L 4",
        "D 128",
        "H 4 query, G 2 key/value, K 32 wide",
        "E 8 per layer, A 2 per token, F 192 wide",
        "V 450",
        "2.68 million total",
        "144 KiB each, 3 matrices of 48.0 KiB; 32 in all",
        "1.00 KiB per token in f16",
        "tokenizer   450 entries",
        "chat_template.jinja",
        "{%- for message in messages %}",
    ]);
    let summary = inspect().words(["--json"]).run().ends(0).json();
    assert_eq!(summary["architecture"], "MixtralForCausalLM");
    assert_eq!((&summary["shape"]["layers"], &summary["shape"]["experts"]), (&4.into(), &8.into()));
    assert_eq!(summary["experts"]["largest_matrix_bytes"], 48 << 10);
    assert_eq!(summary["kv_bytes_per_token"]["f16"], 1024);
    assert_eq!(summary["tokenizer_vocab"], 450);
    assert!(summary["chat_template"].as_str().is_some_and(|template| template.contains("add_generation_prompt")));
    let given = inspect().words(["--json", "--chat-template", "{{ messages[0].content }}"]).run().ends(0).json();
    assert_eq!(given["chat_template"], "{{ messages[0].content }}");
    Ok(())
}

/// `score` counts right, wrong and missing answers of each kind.
fn score_counts_by_kind() -> Result<(), Failed> {
    let folder = Folder::new();
    let result = |id: &str, text: &str| {
        let body = serde_json::json!({"choices": [{"index": 0, "text": text}]});
        serde_json::json!({"custom_id": id, "response": {"status_code": 200, "body": body}, "error": null})
    };
    let answer = |id: &str, kind: &str| serde_json::json!({"custom_id": id, "kind": kind, "answer": "X +"});
    let results = folder.lines("results.jsonl", &[result("a", " X +\n"), result("b", "Y"), result("c", "X +")]);
    let answers = folder
        .lines("answers.jsonl", &[answer("a", "one"), answer("b", "one"), answer("c", "two"), answer("d", "two")]);
    let score = || fulmen(["score"]).path("--results", &results).path("--answers", &answers);
    let report = score().words(["--json"]).run().ends(0).json();
    let tally = |kind: &str| ["right", "wrong", "missing"].map(|name| report[kind]["tally"][name].as_u64());
    assert_eq!(tally("one"), [Some(1), Some(1), Some(0)]);
    assert_eq!(tally("two"), [Some(1), Some(0), Some(1)]);
    score().words(["--show", "2"]).run().ends(0).prints(["one", "50.0%"]).says(["a ", "right", "b ", "wrong"]);
    let broken = folder.write("broken.jsonl", "{\"custom_id\": \"a\"\n");
    let ran = fulmen(["score"]).path("--results", &broken).path("--answers", &answers).run().ends(1);
    ran.says(["broken.jsonl, line 1"]);
    Ok(())
}

/// A full disk, a reader that has gone: data that cannot be written ends with a message.
fn stdout_that_takes_nothing_is_an_error() -> Result<(), Failed> {
    let inspect = || fulmen(["inspect"]).path("--model", &example("model"));
    if let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") {
        inspect().stdout(full).run().ends(1).says(["error: writing to stdout: No space left on device"]);
    }
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    inspect().stdout(writer).run().ends(1).says(["error: writing to stdout: Broken pipe"]);
    Ok(())
}

/// Files that are not there or cannot be made: said by option and path, before anything is opened.
fn input_that_cannot_be_read() -> Result<(), Failed> {
    let folder = Folder::new();
    let nowhere = folder.path("nowhere.jsonl");
    let ran = run_batch(&nowhere, &folder.path("out.jsonl")).run().ends(1);
    ran.says(["--input-file", "nowhere.jsonl", "No such file"]);
    run_batch(&folder.path("."), &folder.path("out.jsonl")).run().ends(1).says(["--input-file", "is a folder"]);
    assert!(!folder.path("out.jsonl").exists(), "nothing is written where nothing can be read");
    Ok(())
}

/// A machine without a driver, as the loader sees it.
fn without_a_driver(call: Call) -> Ran {
    let folder = Folder::new();
    let none = folder.write("none.json", "{}");
    call.env("VK_DRIVER_FILES", &none).env("VK_ICD_FILENAMES", &none).run()
}

fn no_adapter_answers() -> Result<(), Failed> {
    let folder = Folder::new();
    let output = folder.path("out.jsonl");
    let calls = [
        fulmen(["devices"]),
        fulmen(["devices", "--json"]),
        generate(["--prompt", "X"]),
        run_batch(&example("tasks.jsonl"), &output),
    ];
    for call in calls {
        let ran = without_a_driver(call).ends(1).prints_nothing();
        ran.says(["error: no Vulkan adapter answers", "install a driver", "mesa-vulkan-drivers"]);
    }
    assert!(!output.exists(), "no output is made");
    without_a_driver(fulmen(["inspect"]).path("--model", &example("model"))).ends(0);
    Ok(())
}

fn devices_lists_the_adapters() -> Result<(), Failed> {
    let adapters = list_adapters();
    fulmen(["devices"]).run().ends(0).prints([&format!("0: {}", adapters[0].name), "largest binding"]);
    let listed = fulmen(["devices", "--json"]).run().ends(0).json();
    let listed = listed.as_array().expect("a list");
    assert_eq!(listed.len(), adapters.len());
    for (value, adapter) in listed.iter().zip(&adapters) {
        assert_eq!((&value["name"], &value["index"]), (&Value::from(adapter.name.clone()), &adapter.index.into()));
    }
    Ok(())
}

/// Budgets that are too small and devices that are not there are refused before loading, in numbers.
fn machines_that_do_not_do_are_refused() -> Result<(), Failed> {
    let refuse = |words: [&str; 2]| generate(["--prompt", "X"]).words(words).run().prints_nothing();
    let ran = refuse(["--gpu-memory", "1MiB"]).ends(1);
    ran.says(["error: no policy fits", "weights that stay 619 KiB", "1.00 MiB are allowed", "--gpu-memory sets it"]);
    let ran = refuse(["--host-memory", "1MiB"]).ends(1);
    ran.says(["error: no policy fits", "host memory", "1.00 MiB are allowed", "--host-memory"]);
    refuse(["--kv-memory", "1KiB"]).ends(1).says(["error: no policy fits", "1.00 KiB are allowed", "--kv-memory"]);
    let name = &list_adapters()[0].name;
    let there = format!("there are: 0: {name}");
    for device in ["99", "no such card"] {
        refuse(["--device", device]).ends(1).says([&format!("no adapter matches '{device}'"), &there]);
    }
    refuse(["--max-num-seqs", "0"]).ends(2).says(["--max-num-seqs is 0; it must be 1 to"]);
    refuse(["--max-model-len", "4096"]).ends(2).says(["--max-model-len is 4096; it must be 1 to 1024"]);
    refuse(["--resident-experts", "9"]).ends(2).says(["--resident-experts is 9; it must be 0 to 8"]);
    refuse(["--isa", "neonish"]).ends(2).says(["--isa", "neonish"]);
    // A flag stands above its variable, and the variable above nothing.
    let ran = generate(["--prompt", "X"]).env("FULMEN_GPU_MEMORY", "1MiB").run().ends(1);
    ran.says(["1.00 MiB are allowed"]);
    let ran = generate(["--prompt", "X", "--gpu-memory", "2MiB"]).env("FULMEN_GPU_MEMORY", "1MiB").run().ends(1);
    ran.says(["2.00 MiB are allowed"]);
    Ok(())
}

/// Found out before the model is loaded, and nothing that was there is touched.
fn output_that_cannot_be_written() -> Result<(), Failed> {
    let folder = Folder::new();
    let input = folder.lines("in.jsonl", &short_tasks(1));
    let refuse = |output: &Path| run_batch(&input, output).run().ends(1).prints_nothing();
    refuse(&folder.path("no folder/out.jsonl")).says([
        "cannot be opened for writing",
        "there is no folder",
        "no folder",
    ]);
    refuse(&folder.path(".")).says(["cannot be opened for writing", "directory"]);
    refuse(&folder.path("in.jsonl/out.jsonl")).says(["cannot be opened for writing", "Not a directory"]);
    refuse(&input).says(["is both the input and the output"]);
    let existing = folder.write("existing.jsonl", "my notes\n");
    refuse(&existing).says(["existing.jsonl: exists and has 9 bytes", "--resume", "--overwrite"]);
    let ran = run_batch(&input, &existing).words(["--resume"]).run().ends(1);
    ran.says(["existing.jsonl: line 1 is not a result", "--resume will not append"]);
    assert_eq!(std::fs::read_to_string(&existing)?, "my notes\n");
    run_batch(&input, Path::new("-")).words(["--resume"]).run().ends(1).says(["standard output cannot be resumed"]);
    run_batch(&input, &existing).words(["--overwrite"]).run().ends(0);
    assert_eq!(results(&existing).len(), 1);
    Ok(())
}

pub fn anywhere() -> Vec<Trial> {
    vec![
        Trial::test("usage::wrong_command_lines_end_with_2", wrong_command_lines_end_with_2),
        Trial::test("usage::help_is_on_stdout", help_is_on_stdout),
        Trial::test("usage::inspect_shows_the_model", inspect_shows_the_model),
        Trial::test("usage::score_counts_by_kind", score_counts_by_kind),
        Trial::test("usage::stdout_that_takes_nothing_is_an_error", stdout_that_takes_nothing_is_an_error),
        Trial::test("usage::input_that_cannot_be_read", input_that_cannot_be_read),
        Trial::test("usage::no_adapter_answers", no_adapter_answers),
    ]
}

pub fn on_adapter() -> Vec<Trial> {
    vec![
        Trial::test("usage::devices_lists_the_adapters", devices_lists_the_adapters),
        Trial::test("usage::machines_that_do_not_do_are_refused", machines_that_do_not_do_are_refused),
        Trial::test("usage::output_that_cannot_be_written", output_that_cannot_be_written),
    ]
}
