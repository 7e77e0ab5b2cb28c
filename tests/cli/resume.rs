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

pub fn on_adapter() -> Vec<Trial> {
    vec![
        Trial::test("resume::stopped_runs_are_resumed", stopped_runs_are_resumed),
        Trial::test("resume::a_signal_while_opening_means_resume_too", a_signal_while_opening_means_resume_too),
    ]
}
