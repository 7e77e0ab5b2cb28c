//! Runs that are stopped in the middle: what is written is whole, and `--resume` does the rest and nothing twice.

use libtest_mimic::{Failed, Trial};
use serde_json::json;

use crate::batch::{mixed_lines, mixed_results};
use crate::common::*;

/// Killed, then terminated, then interrupted, each time resumed; a line is torn by hand on the way.
fn stopped_runs_are_resumed() -> Result<(), Failed> {
    let folder = Folder::new();
    let input = folder.lines("in.jsonl", &mixed_lines());
    let output = folder.path("out.jsonl");
    // One at a time, so that there is a middle.
    let call = || run_batch(&input, &output).words(["--max-num-seqs", "1"]);

    let mut running = call().start();
    running.wait_for_lines(&output, 2);
    running.signal(libc::SIGKILL);
    let ran = running.finish();
    assert_eq!(ran.code, None, "killed: {ran:?}");

    // As a kill in the middle of a write, or a full disk, leaves it.
    let written = std::fs::read(&output).expect("results");
    let whole = written.iter().filter(|byte| **byte == b'\n').count();
    let last_start = written[..written.len() - 1].iter().rposition(|byte| *byte == b'\n').expect("two lines") + 1;
    let torn = last_start + (written.len() - last_start) / 2;
    std::fs::write(&output, &written[..torn]).expect("written");
    let kept = whole - 1;

    let mut running = call().words(["--resume"]).start();
    running.wait_for_message(&format!("resuming: {kept} lines are finished already"));
    running.wait_for_lines(&output, kept + 2);
    running.signal(libc::SIGTERM);
    running.finish().ends(75).says(["interrupted; the same command with --resume goes on"]);
    let after_term = results(&output).len();
    assert!(after_term < 12, "stopped in the middle, with {after_term} lines");

    let mut running = call().words(["--resume", "--json-summary"]).start();
    running.wait_for_lines(&output, after_term + 1);
    running.signal(libc::SIGINT);
    let ran = running.finish().ends(75);
    assert_eq!((&ran.summary()["interrupted"], &ran.summary()["already_finished"]), (&json!(true), &json!(after_term)));
    let after_int = results(&output).len();
    assert!(after_int < 12, "stopped in the middle, with {after_int} lines");

    // The rest may run under another policy.
    let ran = run_batch(&input, &output).words(["--resume", "--json-summary"]).run().ends(0);
    let summary = ran.summary();
    assert_eq!(summary["already_finished"], after_int, "{summary}");
    assert_eq!(summary["answered"], 12 - after_int, "{summary}");
    let resumed = results(&output); // each custom_id once
    for (id, line) in mixed_results() {
        assert_eq!(resumed.get(id), Some(line), "{id} is as in a run that nobody stopped");
    }
    assert_eq!(resumed.len(), 12);
    Ok(())
}

/// A signal that comes while the model opens ends the run with the same code; nothing has been written.
fn a_signal_while_opening_means_resume_too() -> Result<(), Failed> {
    let folder = Folder::new();
    let input = folder.lines("in.jsonl", &short_tasks(1));
    let output = folder.path("out.jsonl");
    let mut running = run_batch(&input, &output).start();
    running.wait_for_message("adapter ");
    running.signal(libc::SIGTERM);
    running.finish().ends(75);
    assert!(!output.exists() || results(&output).is_empty());
    Ok(())
}

/// A device that is lost in the middle: a message, exit code 75, what was finished is there, and a resumed run does the rest.
fn a_lost_device_is_resumed() -> Result<(), Failed> {
    let folder = Folder::new();
    let input = folder.lines("in.jsonl", &mixed_lines());
    let output = folder.path("out.jsonl");
    let call = || run_batch(&input, &output).words(["--max-num-seqs", "1"]);
    let ran = call().env("FULMEN_TEST_FAULTS", "lost-after=1500").run().ends(75);
    ran.says(["the device was lost"]);
    let before = results(&output).len();
    assert!((1..12).contains(&before), "lost in the middle, with {before} lines");
    run_batch(&input, &output).words(["--resume"]).run().ends(0);
    let resumed = results(&output);
    for (id, line) in mixed_results() {
        assert_eq!(resumed.get(id), Some(line), "{id} is as in a run whose device stayed");
    }
    call().env("FULMEN_TEST_FAULTS", "gremlins").words(["--overwrite"]).run().ends(2).says(["no test fault"]);
    Ok(())
}

/// A shard that is cut short while its experts stream from the disk: the message names page, file and offset, the lines that had
/// finished are there and whole, and with the file mended a resumed run does the rest.
fn a_source_that_fails_is_resumed() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    let shard = model.join("model-00002-of-00002.safetensors");
    let whole = std::fs::read(&shard)?;
    let input = folder.lines("in.jsonl", &mixed_lines());
    let output = folder.path("out.jsonl");
    let call = || {
        fulmen(["run-batch", "--max-num-seqs", "1", "--resident-experts", "0", "--ring-experts", "3"])
            .words(["--page-size", "20KiB", "--page-source", "staged"])
            .path("--model", &model)
            .path("-i", &input)
            .path("-o", &output)
    };
    let mut running = call().start();
    running.wait_for_lines(&output, 2);
    std::fs::File::options().write(true).open(&shard)?.set_len(1 << 20)?;
    running.finish().ends(1).says(["error: page ", "model-00002-of-00002.safetensors", "offset"]);
    let finished = results(&output);
    assert!((2..12).contains(&finished.len()), "in the middle, with {} lines", finished.len());

    std::fs::write(&shard, whole)?;
    let ran = call().words(["--resume", "--json-summary"]).run().ends(0);
    assert_eq!(ran.summary()["already_finished"], finished.len());
    let resumed = results(&output); // each custom_id once
    assert_eq!(resumed.len(), 12);
    for (id, line) in mixed_results() {
        assert_eq!(resumed.get(id), Some(line), "{id} is as in a run whose files stayed");
        assert!(finished.get(id).is_none_or(|before| before == line), "{id} was whole");
    }
    Ok(())
}

/// What ran when, as a trace that a viewer opens and as a picture; and a bench of schedules in small.
fn traces_and_timelines_are_written() -> Result<(), Failed> {
    let folder = Folder::new();
    let input = folder.lines("in.jsonl", &short_tasks(3));
    let (trace, picture) = (folder.path("trace.json"), folder.path("lanes.svg"));
    run_batch(&input, &folder.path("out.jsonl"))
        .words(["--ring-experts", "4", "--resident-experts", "1", "--page-size", "20KiB", "--schedule", "cgopipe"])
        .path("--trace-file", &trace)
        .path("--timeline", &picture)
        .run()
        .ends(0)
        .says(["pages   from imported memory", "across the link: "]);
    let events: serde_json::Value = serde_json::from_slice(&std::fs::read(&trace)?)?;
    let events = events.as_array().expect("a list of events");
    let named = |name: &str| events.iter().filter(|event| event["cat"] == name).count();
    assert!(named("page") > 10 && named("experts") > 10 && named("attention") > 10, "{} events", events.len());
    let page = events.iter().find(|event| event["cat"] == "page").expect("a page");
    assert!(page["args"]["bytes"].as_u64().expect("bytes") > 0 && page["dur"].as_f64().expect("a duration") >= 0.0);
    let tracks: std::collections::BTreeSet<u64> =
        events.iter().filter_map(|event| event["tid"].as_u64().filter(|_| event["ph"] == "X")).collect();
    assert!(tracks.len() >= 3, "{tracks:?}");
    let picture = std::fs::read_to_string(&picture)?;
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>") && picture.contains("h2d"));

    let ran = fulmen(["bench", "pipeline", "--synthetic", "mixtral-tiny", "--layers", "3", "--max-num-seqs", "6"])
        .words(["--micro-batches", "3", "--resident-experts", "0", "--ring-experts", "16", "--passes", "2"])
        .words(["--warm-up", "1", "--json", "--schedules", "flexgen+relay,flexgen,cgopipe+copies,grouped"])
        .run()
        .ends(0);
    let document = ran.json();
    let schedules = document["schedules"].as_array().expect("schedules");
    assert_eq!(schedules.len(), 4);
    assert_eq!(schedules[0]["schedule"], "flexgen+relay");
    for schedule in schedules {
        assert!(schedule["tokens_per_second"].as_f64().expect("a rate") > 0.0, "{schedule}");
        assert!(schedule["page_bytes"].as_u64().expect("bytes") > 0, "{schedule}");
    }
    for command in ["pipeline", "predict"] {
        let refused = fulmen(["bench", command, "--synthetic", "mixtral-tiny", "--policy", "kept.json"]).run();
        refused.ends(2).says(["--policy", "policies of its own"]);
    }
    fulmen(["bench", "pipeline", "--synthetic", "mixtral-huge"]).run().ends(2).says(["mixtral-8x7b"]);
    fulmen(["bench", "pipeline", "--synthetic", "mixtral-8x7b", "--layers", "33"]).run().ends(2).says(["1 to 32"]);
    Ok(())
}

/// A made-up checkpoint as files is one that opens like any other.
fn synthesized_checkpoints_open() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.path("made-up");
    fulmen(["synthesize", "mixtral-tiny", "--layers", "2"]).path("-o", &model).run().ends(0);
    fulmen(["inspect"]).path("-m", &model).run().ends(0).prints(["mixtral"]);
    for name in fulmen::model::presets::NAMES {
        fulmen(["inspect", "--synthetic", name]).run().ends(0).prints(["pages"]);
    }
    fulmen(["inspect", "--synthetic", "dbrx"]).path("-m", &model).run().ends(2);
    fulmen(["synthesize", "mixtral-tiny"]).path("-o", &model).run().ends(1).says(["exists"]);
    fulmen(["synthesize", "dbrx"]).path("-o", &folder.path("other")).run().ends(1).says(["only Mixtral"]);
    Ok(())
}

pub fn on_adapter() -> Vec<Trial> {
    vec![
        Trial::test("resume::stopped_runs_are_resumed", stopped_runs_are_resumed),
        Trial::test("resume::a_lost_device_is_resumed", a_lost_device_is_resumed),
        Trial::test("resume::a_source_that_fails_is_resumed", a_source_that_fails_is_resumed),
        Trial::test("resume::traces_and_timelines_are_written", traces_and_timelines_are_written),
        Trial::test("resume::synthesized_checkpoints_open", synthesized_checkpoints_open),
        Trial::test("resume::a_signal_while_opening_means_resume_too", a_signal_while_opening_means_resume_too),
    ]
}
