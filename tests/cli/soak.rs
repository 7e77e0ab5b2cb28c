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

const FEW_REQUESTS: usize = 1500;
/// KV blocks of 32 tokens in the starved run: for fewer sequences than there could be, yet wide enough passes that fifty thousand
/// requests end.
fn starved_blocks(n: usize) -> usize {
    if n < 5000 { 192 } else { 512 }
}

/// KiB of such a block of the model below, both layers together.
const BLOCK_KIB: usize = 4;
/// One line in so many is no request.
const BAD_LINE_EVERY: usize = 97;

/// 0.05 M active parameters, with the shipped model's tokenizer.
fn tiny_model(folder: &Folder) -> PathBuf {
    let base = presets::mixtral_tiny();
    let shape = Shape {
        layers: 2,
        d_model: 32,
        q_heads: 2,
        kv_heads: 1,
        head_width: 16,
        experts: 4,
        experts_per_token: 2,
        expert_width: 32,
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
/// them lines that are cut off, have no prompt, or ask for what is not supported. Now and then as many as fill the starved run's pool
/// come one after the other whose prompts fill most of a block and whose answers are longer than was to be expected: then blocks run
/// out.
fn batch(n: usize) -> String {
    let blocks = starved_blocks(n);
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
        let prompt_of = |random: &mut Random, n: usize| {
            (0..n).map(|_| words[random.below(words.len())].as_str()).collect::<Vec<_>>().join(" ")
        };
        if (5 * blocks..13 * blocks / 2).contains(&(number % (15 * blocks))) {
            let body = json!({"prompt": prompt_of(&mut random, 7), "max_tokens": 16, "temperature": 0});
            text += &(completion(&id, body).to_string() + "\n");
            continue;
        }
        // Mostly a few tokens, up to 40.
        let n_words = if random.below(4) == 0 { 1 + random.below(8) } else { 1 + random.below(2) };
        let mut body = json!({"prompt": prompt_of(&mut random, n_words), "max_tokens": 1 + random.below(16)});
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

/// Passes wide enough to spread what a pass costs whatever its rows.
fn run(model: &Path, input: &Path, output: &Path) -> Call {
    fulmen(["run-batch", "--json-summary", "--max-model-len", "64", "--max-num-seqs", "1024"])
        .words(["--max-num-batched-tokens", "2048"])
        .path("--model", model)
        .path("-i", input)
        .path("-o", output)
        .deadline(Duration::from_secs(1800))
}

/// Resident memory of a run at moments of its life.
struct Watch {
    samples: Vec<u64>,
    last: Instant,
}

impl Watch {
    fn new() -> Self {
        Self { samples: Vec::new(), last: Instant::now() }
    }

    fn look(&mut self, running: &Running) {
        if self.last.elapsed() > Duration::from_millis(200) {
            self.samples.extend(running.resident_bytes());
            self.last = Instant::now();
        }
    }

    fn until_the_end(&mut self, running: &mut Running) {
        while !running.has_ended() {
            self.look(running);
        }
    }

    /// From a third of the run on memory does not grow: what requests leave behind would be seen. Returns tenths of the run in words.
    fn is_flat(&self) -> String {
        let n = self.samples.len();
        if n >= 30 {
            let (third, most) = (self.samples[n / 3], *self.samples.iter().max().expect("samples"));
            assert!(most < third + third / 10 + (8 << 20), "resident memory grew from {third} to {most} bytes");
        }
        let at = |tenth: usize| self.samples.get(tenth * n.saturating_sub(1) / 10).map_or(0, |bytes| bytes >> 20);
        let tenths: Vec<String> = (0..=10).map(|tenth| at(tenth).to_string()).collect();
        format!("resident MiB over its time: {}", tenths.join(" "))
    }
}

/// Processor time of all commands that have ended, in seconds.
fn processor_seconds() -> f64 {
    // SAFETY: all bits zero are a valid `rusage`, and the call fills one in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage), 0, "times are there");
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn number(summary: &Value, field: &str) -> f64 {
    summary[field].as_f64().unwrap_or_else(|| panic!("{field} is a number in {summary}"))
}

fn say(what: &str, summary: &Value, memory: &str) {
    let (answered, seconds) = (number(summary, "answered"), number(summary, "elapsed_seconds"));
    println!(
        "soak, {what}: {answered} requests in {seconds:.1} s = {:.0} requests/s; {} passes of up to {} sequences, {} preemptions; no \
         lane busy {:.1} % of the time; {memory}",
        answered / seconds,
        summary["passes"],
        summary["peak_sequences"],
        summary["preemptions"],
        100.0 * (1.0 - number(summary, "any_busy_seconds") / seconds),
    );
}

fn a_long_batch_survives() -> Result<(), Failed> {
    let n = match std::env::var("FULMEN_SOAK_REQUESTS") {
        Ok(text) => text.parse()?,
        Err(_) => FEW_REQUESTS,
    };
    let started = Instant::now();
    let folder = Folder::new();
    let model = tiny_model(&folder);
    let input = folder.write("in.jsonl", batch(n));
    let (calm, stormy) = (folder.path("calm.jsonl"), folder.path("stormy.jsonl"));

    let (mut running, mut memory) = (run(&model, &input, &calm).start(), Watch::new());
    memory.until_the_end(&mut running);
    let ran = running.finish().ends(3); // some lines are no requests
    say("undisturbed", &ran.summary(), &memory.is_flat());

    // Too few blocks of 32 tokens for as many sequences: they push each other out; experts go through a ring of two.
    let kv_memory = format!("{}KiB", starved_blocks(n) * BLOCK_KIB);
    let starved = || {
        run(&model, &input, &stormy)
            .words(["--kv-memory", &kv_memory, "--resident-experts", "1", "--ring-experts", "2", "--page-size", "8KiB"])
            .words(["--micro-batches", "3"])
    };
    let (mut running, mut memory) = (starved().start(), Watch::new());
    running.wait_for_lines_and(&stormy, n / 2, |running| memory.look(running));
    running.signal(libc::SIGKILL);
    assert_eq!(running.finish().code, None);
    println!("soak, starved: killed after {} lines; {}", n / 2, memory.is_flat());
    let (mut running, mut memory) = (starved().words(["--resume"]).start(), Watch::new());
    memory.until_the_end(&mut running);
    let ran = running.finish().ends(3);
    let summary = ran.summary();
    say("starved and resumed", &summary, &memory.is_flat());
    assert!(number(&summary, "already_finished") >= n as f64 / 2.0 - 1.0, "{summary}");
    assert!(number(&summary, "preemptions") > 0.0, "sequences push each other out: {summary}");
    println!(
        "soak: {n} requests twice in {:.0} s, {:.0} s of processor time",
        started.elapsed().as_secs_f64(),
        processor_seconds()
    );

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
