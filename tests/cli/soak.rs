//! A long batch on a model so small that only the machinery costs: every line is answered once, memory stays flat, and a run that is
//! killed, starved of KV blocks and resumed says what an undisturbed one says.
//!
//! `FULMEN_SOAK_REQUESTS` sets the number of requests (`make soak`: 50,000); without it a small one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fulmen::checkpoint::Synthetic;
use fulmen::model::{ModelConfig, Shape, presets};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::common::*;

const FEW_REQUESTS: usize = 600;
/// One line in so many is no request.
const BAD_LINE_EVERY: usize = 97;

/// 0.09 M active parameters, with the shipped model's tokenizer.
fn tiny_model(folder: &Folder) -> PathBuf {
    let base = presets::mixtral_tiny();
    let shape = Shape {
        layers: 2,
        d_model: 64,
        q_heads: 4,
        kv_heads: 2,
        head_width: 16,
        experts: 4,
        experts_per_token: 2,
        expert_width: 48,
        vocab: 450,
    };
    let config = ModelConfig { shape, max_positions: 128, ..base };
    let model = folder.path("tiny");
    Synthetic::new(config).write(&model, &mut |_, _| {}).expect("written");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(example("model").join(file), model.join(file)).expect("copied");
    }
    model
}

/// xorshift64*: the same batch on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Short prompts of the shipped tasks' words, answers of 1 to 16 tokens, greedy and sampled, with and without stop strings; among
/// them lines that are cut off, have no prompt, or ask for what is not supported.
fn batch(n: usize) -> String {
    let tasks = std::fs::read_to_string(example("answers.jsonl")).expect("shipped answers");
    let words: Vec<String> = tasks
        .split(|c: char| !c.is_ascii_alphabetic())
        .filter(|word| (2..8).contains(&word.len()))
        .map(str::to_owned)
        .collect();
    let mut random = Random(0x50a4);
    let mut text = String::new();
    for number in 0..n {
        let id = format!("request {number}");
        if number % BAD_LINE_EVERY == BAD_LINE_EVERY - 1 {
            text += &match number / BAD_LINE_EVERY % 3 {
                0 => format!("{{\"custom_id\": \"{id}\", \"body\": {{\"prompt\": \"cut off\n"),
                1 => completion(&id, json!({"max_tokens": 4})).to_string() + "\n",
                _ => completion(&id, json!({"prompt": "a", "best_of": 7})).to_string() + "\n",
            };
            continue;
        }
        let prompt: Vec<&str> = (0..1 + random.below(8)).map(|_| words[random.below(words.len())].as_str()).collect();
        let mut body = json!({"prompt": prompt.join(" "), "max_tokens": 1 + random.below(16)});
        match random.below(4) {
            0 => body["temperature"] = json!(0),
            1 => (body["temperature"], body["seed"]) = (json!(0.9), json!(random.below(1000))),
            2 => (body["temperature"], body["ignore_eos"]) = (json!(0), json!(true)),
            _ => (body["temperature"], body["stop"]) = (json!(1.3), json!(["a", "or"])),
        }
        text += &(completion(&id, body).to_string() + "\n");
    }
    text
}

fn run(model: &Path, input: &Path, output: &Path) -> Call {
    fulmen(["run-batch", "--json-summary", "--max-num-seqs", "256", "--max-model-len", "64"])
        .path("--model", model)
        .path("-i", input)
        .path("-o", output)
        .deadline(Duration::from_secs(900))
}

/// Resident memory of a run at moments of its life, until it ends.
fn watch(running: &mut Running) -> Vec<u64> {
    let (mut samples, mut last) = (Vec::new(), Instant::now());
    while !running.has_ended() {
        if last.elapsed() > Duration::from_millis(200) {
            samples.extend(running.resident_bytes());
            last = Instant::now();
        }
    }
    samples
}

fn a_long_batch_survives() -> Result<(), Failed> {
    let n = match std::env::var("FULMEN_SOAK_REQUESTS") {
        Ok(text) => text.parse()?,
        Err(_) => FEW_REQUESTS,
    };
    let folder = Folder::new();
    let model = tiny_model(&folder);
    let input = folder.write("in.jsonl", batch(n));
    let (calm, stormy) = (folder.path("calm.jsonl"), folder.path("stormy.jsonl"));

    let mut running = run(&model, &input, &calm).start();
    let memory = watch(&mut running);
    running.finish().ends(3); // some lines are no requests
    // From a third of the run on memory does not grow: what requests leave behind would be seen.
    if memory.len() >= 30 {
        let (third, most) = (memory[memory.len() / 3], *memory.iter().max().expect("samples"));
        assert!(most < third + third / 10 + (8 << 20), "resident memory grew from {third} to {most} bytes");
    }

    // Eleven blocks of 32 tokens for 256 sequences: they push each other out; experts go through a ring of two.
    let starved = || {
        run(&model, &input, &stormy)
            .words(["--kv-memory", "90KiB", "--resident-experts", "1", "--ring-experts", "2", "--page-size", "8KiB"])
            .words(["--micro-batches", "3"])
    };
    let mut running = starved().start();
    running.wait_for_lines(&stormy, n / 2);
    running.signal(libc::SIGKILL);
    assert_eq!(running.finish().code, None);
    let ran = starved().words(["--resume"]).run().ends(3);
    let summary = ran.summary();
    assert!(summary["already_finished"].as_u64().expect("a number") >= n as u64 / 2 - 1, "{summary}");
    assert!(summary["preemptions"].as_u64().expect("a number") > 0, "sequences push each other out: {summary}");

    let (calm, stormy) = (results(&calm), results(&stormy)); // each custom_id once
    assert_eq!(calm.len(), n);
    let bad = calm.values().filter(|line: &&Value| !line["error"].is_null()).count();
    assert_eq!(bad, n / BAD_LINE_EVERY, "every other line is answered");
    for (id, line) in &calm {
        assert_eq!(stormy.get(id), Some(line), "{id} is as in a run that nobody disturbed");
    }
    assert_eq!(stormy.len(), n);
    Ok(())
}

pub fn on_adapter() -> Vec<Trial> {
    vec![Trial::test("soak::a_long_batch_survives", a_long_batch_survives)]
}
