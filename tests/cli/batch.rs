//! `run-batch`: the same bytes whatever the policy and however the file is cut, and one answer for every line.

use std::path::Path;
use std::sync::OnceLock;

use fulmen::request::tokenizer::Tokenizer;
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::common::*;

/// Twelve requests of many kinds: greedy, sampled, several completions, penalties, log-probabilities, past eos.
pub fn mixed_lines() -> Vec<Value> {
    let mut lines = short_tasks(12);
    for (index, line) in lines.iter_mut().enumerate() {
        let chat = line["url"] == "/v1/chat/completions";
        let body = line["body"].as_object_mut().expect("an object");
        let more = match index % 6 {
            1 => json!({"temperature": 0.8, "n": 2, "seed": 7}),
            2 => json!({"temperature": 1.3, "top_p": 0.95}),
            3 if chat => json!({"repetition_penalty": 1.1, "logprobs": true, "top_logprobs": 2}),
            3 => json!({"repetition_penalty": 1.1, "logprobs": 2}),
            5 => json!({"ignore_eos": true, "max_tokens": 14}),
            _ => json!({}),
        };
        body.extend(more.as_object().expect("an object").clone());
    }
    lines
}

/// Results of [`mixed_lines`] at the defaults: what every other way of running them must give.
pub fn mixed_results() -> &'static Results {
    static RESULTS: OnceLock<Results> = OnceLock::new();
    RESULTS.get_or_init(|| {
        let folder = Folder::new();
        let input = folder.lines("in.jsonl", &mixed_lines());
        let output = folder.path("out.jsonl");
        let ran = run_batch(&input, &output).run().ends(0).prints_nothing();
        ran.says(["adapter ", "device ", "host ", "12 lines answered, 0 of them with errors"]);
        let results = results(&output);
        assert_eq!(results.len(), 12);
        results
    })
}

fn assert_same(what: &str, got: &Results, want: &Results) {
    for (id, line) in want {
        assert_eq!(got.get(id), Some(line), "{what}: {id}");
    }
    assert_eq!(got.len(), want.len(), "{what}: number of lines");
}

fn gives_the_same<const N: usize>(words: [&'static str; N]) -> impl FnOnce() -> Result<(), Failed> + Send + 'static {
    move || {
        let folder = Folder::new();
        let input = folder.lines("in.jsonl", &mixed_lines());
        let output = folder.path("out.jsonl");
        run_batch(&input, &output).words(words).run().ends(0).prints_nothing();
        assert_same(&words.join(" "), &results(&output), mixed_results());
        Ok(())
    }
}

/// What is right is known: all greedy answers are.
fn answers_are_right() -> Result<(), Failed> {
    let answers = right_answers();
    let greedy = short_tasks(12);
    for (index, line) in greedy.iter().enumerate().filter(|(index, _)| matches!(index % 6, 0 | 4)) {
        let id = line["custom_id"].as_str().expect("a name");
        let result = &mixed_results()[id];
        assert_eq!(text(result).trim(), answers[id], "{index}: {id}");
        let choice = &result["response"]["body"]["choices"][0];
        assert_eq!((&choice["finish_reason"], &result["error"]), (&json!("stop"), &Value::Null));
    }
    Ok(())
}

/// So little KV memory that sequences are put away in the middle, and brought back.
fn preemption_changes_nothing() -> Result<(), Failed> {
    let folder = Folder::new();
    let tokenizer = Tokenizer::open(&example("model"))?;
    let text: String = short_tasks(12).iter().filter_map(|task| task["body"]["prompt"].as_str()).collect();
    let tokens = tokenizer.encode(&text, true)?;
    // A prompt of one block of 32 tokens, of which each sequence is first expected to generate another: two blocks each are
    // there, and all of them go on to a third.
    let line = |index: usize| {
        let body = json!({
            "prompt": tokens[10 * index..10 * index + 32], "max_tokens": 35 + index, "ignore_eos": true,
            // Where a stop string might end it, nobody knows its length beforehand, and room is given by expectation.
            "temperature": index % 2, "stop": "no such word",
        });
        completion(&format!("long {index}"), body)
    };
    let input = folder.lines("in.jsonl", &[0, 1, 2].map(line));
    let run = |kv_memory: &str| {
        let output = folder.path(kv_memory);
        let ran = run_batch(&input, &output).words(["--json-summary", "--kv-memory", kv_memory]).run().ends(0);
        (results(&output), ran.summary())
    };
    let (base, summary) = run("1MiB");
    assert_eq!((&summary["preemptions"], &summary["generated_tokens"]), (&json!(0), &json!(35 + 36 + 37)), "{summary}");
    let (squeezed, summary) = run("192KiB"); // six blocks of 32 KiB
    assert!(summary["preemptions"].as_u64() > Some(0), "sequences are preempted: {summary}");
    assert!(summary["spilled_blocks"].as_u64() > Some(0), "{summary}");
    assert_same("--kv-memory 192KiB", &squeezed, &base);
    Ok(())
}

/// Shards are disjoint and together the whole; --limit takes the first lines.
fn shards_make_the_whole() -> Result<(), Failed> {
    let folder = Folder::new();
    let lines = mixed_lines();
    let input = folder.lines("in.jsonl", &lines);
    let mut whole = Results::new();
    for shard in ["0/3", "1/3", "2/3"] {
        let output = folder.path(&shard.replace('/', " of "));
        run_batch(&input, &output).words(["--shard", shard]).run().ends(0).says(["4 lines answered"]);
        for (id, line) in results(&output) {
            assert!(whole.insert(id.clone(), line).is_none(), "{id} is in one shard");
        }
    }
    assert_same("three shards", &whole, mixed_results());

    let output = folder.path("limited.jsonl");
    run_batch(&input, &output).words(["--limit", "3", "--shard", "1/2"]).run().ends(0);
    let limited = results(&output);
    for index in [1, 3, 5] {
        let id = lines[index]["custom_id"].as_str().expect("a name");
        assert_eq!(limited.get(id), Some(&mixed_results()[id]), "line {index} is one of the first of shard 1/2");
    }
    assert_eq!(limited.len(), 3);
    Ok(())
}

/// `-i - -o -`: stdout has the results and nothing else. A pipe as a named input is read once too.
fn pipes_in_and_out() -> Result<(), Failed> {
    let bytes: String = mixed_lines().iter().map(|line| format!("{line}\n")).collect();
    let dash = Path::new("-");
    let ran = run_batch(dash, dash).words(["--json-summary"]).stdin(bytes.clone()).run().ends(0);
    assert_eq!(ran.summary()["answered"], 12);
    assert_same("-i - -o -", &results_of(&ran.stdout), mixed_results());

    let folder = Folder::new();
    let output = folder.path("out.jsonl");
    run_batch(Path::new("/dev/stdin"), &output).words(["--limit", "2"]).stdin(bytes).run().ends(0);
    assert_eq!(results(&output).len(), 2, "-i /dev/stdin");
    Ok(())
}

/// Another place of decode attention rounds differently; greedy answers of the shipped model are far from ties.
fn attention_on_the_gpu_gives_the_same_texts() -> Result<(), Failed> {
    let folder = Folder::new();
    let tasks = short_tasks(12);
    let input = folder.lines("in.jsonl", &tasks);
    let output = folder.path("out.jsonl");
    let ran = run_batch(&input, &output).words(["--attention", "gpu"]).run().ends(0);
    ran.says(["decode attention on the GPU"]);
    let (results, answers) = (results(&output), right_answers());
    assert_eq!(results.len(), tasks.len());
    for (id, result) in &results {
        assert_eq!(text(result).trim(), answers[id], "{id}");
    }
    Ok(())
}

/// Every kind of bad line, each answered by name, among good ones that go on. Exit code 3.
fn bad_lines_are_answered_among_good_ones() -> Result<(), Failed> {
    let folder = Folder::new();
    let good = |id: &str| completion(id, json!({"prompt": "Rule: X +\nReplace: X by plum\nAnswer:", "temperature": 0}));
    let with = |id: &str, body: Value| completion(id, body).to_string();
    let chat = |id: &str, more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Rule: X"}]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}).to_string()
    };
    // The line, what it is called in the results, its code, parts of its message.
    let bad: Vec<(Vec<u8>, &str, &str, &[&str])> = vec![
        (b"{\"custom_id\": \"x\xff\"}".to_vec(), "line 2", "invalid_json_line", &["UTF-8", "byte 16"]),
        (b"{\"custom_id\": \"cut\", \"body\": {\"pro".to_vec(), "line 3", "invalid_json_line", &["EOF"]),
        (with("first", json!({"prompt": "X"})).into(), "first again", "duplicate_custom_id", &["earlier"]),
        (
            with("cold", json!({"prompt": "X", "temperature": -1})).into(),
            "cold",
            "invalid_request",
            &["temperature", "-1"],
        ),
        (chat("tools", json!({"tools": [{"type": "function"}]})).into(), "tools", "unsupported_parameter", &["tools"]),
        (
            chat("format", json!({"response_format": {"type": "json_object"}})).into(),
            "format",
            "unsupported_parameter",
            &["response_format"],
        ),
        (with("typo", json!({"prompt": "X", "temprature": 1})).into(), "typo", "unknown_parameter", &["temprature"]),
        (with("empty", json!({"prompt": ""})).into(), "empty", "invalid_request", &["prompt is empty"]),
        (with("token", json!({"prompt": [1, 450]})).into(), "token", "invalid_request", &["450", "vocabulary"]),
        (
            chat("role", json!({"messages": [{"role": "wizard", "content": "X"}]})).into(),
            "role",
            "chat_template",
            &["Unknown role: wizard"],
        ),
        (
            with("long", json!({"prompt": "X ".repeat(600)})).into(),
            "long",
            "context_length_exceeded",
            &["does not fit", "64"],
        ),
        (
            with("short", json!({"prompt": "X ".repeat(80)})).into(),
            "short",
            "context_length_exceeded",
            &["does not fit", "64"],
        ),
    ];
    let mut file = format!("{}\n", good("first")).into_bytes();
    for (line, ..) in &bad {
        file.extend(line.iter().chain(b"\n"));
    }
    file.extend(b"\n\n"); // blank lines are none
    file.extend(good("last").to_string().bytes()); // without a line end
    let input = folder.write("in.jsonl", &file);
    let check = |results: &Results| {
        for (_, name, code, parts) in &bad {
            let line = results.get(*name).unwrap_or_else(|| panic!("{name} is answered: {results:?}"));
            let error = &line["error"];
            assert_eq!(error["code"], *code, "{line}");
            assert!(line["response"].is_null(), "{line}");
            let message = error["message"].as_str().expect("a message");
            for part in *parts {
                assert!(message.contains(part), "{part:?} is not in {line}");
            }
        }
    };
    let output = folder.path("out.jsonl");
    let ran = run_batch(&input, &output).words(["--max-model-len", "64"]).run().ends(3);
    ran.says(["14 lines answered, 12 of them with errors"]);
    let together = results(&output);
    check(&together);
    assert_eq!(together.len(), bad.len() + 2);
    assert_eq!(text(&together["first"]), text(&together["last"]));

    let (output, errors) = (folder.path("results.jsonl"), folder.path("errors.jsonl"));
    let call = || run_batch(&input, &output).path("--error-file", &errors).words(["--max-model-len", "64"]);
    call().run().ends(3);
    check(&results(&errors));
    assert_eq!(results(&errors).len(), bad.len());
    assert_eq!(results(&output).keys().collect::<Vec<_>>(), ["first", "last"]);
    // All is answered, the errors too: --resume has nothing to do, and the exit code speaks of the whole file.
    call().words(["--resume"]).run().ends(3).says(["14 lines are finished already", "0 lines answered"]);
    assert_eq!((results(&errors).len(), results(&output).len()), (bad.len(), 2));

    // --strict names the bad lines and does nothing.
    let before = std::fs::read(&output).expect("results");
    let ran = call().words(["--strict", "--overwrite"]).run().ends(1);
    ran.says(["line 2: not UTF-8", "line 5 (cold): temperature", "of 14 lines are bad"]);
    assert_eq!(std::fs::read(&output).expect("results"), before, "--strict comes before --overwrite");
    Ok(())
}

/// A disk that is full ends the run with a message.
fn a_full_disk_ends_the_run() -> Result<(), Failed> {
    let folder = Folder::new();
    let input = folder.lines("in.jsonl", &short_tasks(2));
    let full = Path::new("/dev/full");
    if full.exists() {
        run_batch(&input, full).run().ends(1).says(["error: /dev/full: writing failed: No space left on device"]);
    }
    Ok(())
}

/// A line that comes is answered though the input stays open; a run that waits for the next one can be stopped.
#[cfg(unix)]
fn a_slow_pipe_holds_nothing_up() -> Result<(), Failed> {
    use std::io::Write;
    use std::os::unix::ffi::OsStrExt;

    let folder = Folder::new();
    let (input, output) = (folder.path("in.fifo"), folder.path("out.jsonl"));
    let name = std::ffi::CString::new(input.as_os_str().as_bytes())?;
    // SAFETY: the name ends with a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0, "a pipe with a name");
    let lines = short_tasks(2);
    let mut running = run_batch(&input, &output).start();
    // Opens when the command does.
    let mut pipe = std::fs::OpenOptions::new().write(true).open(&input)?;
    for (n, line) in lines.iter().enumerate() {
        writeln!(pipe, "{line}")?;
        running.wait_for_lines(&output, n + 1);
    }
    running.signal(libc::SIGTERM);
    running.finish().ends(75).says(["2 lines answered, 0 of them with errors", "--resume goes on"]);
    drop(pipe);
    assert_eq!(results(&output).len(), 2);
    Ok(())
}

pub fn on_adapter() -> Vec<Trial> {
    vec![
        #[cfg(unix)]
        Trial::test("batch::a_slow_pipe_holds_nothing_up", a_slow_pipe_holds_nothing_up),
        Trial::test("batch::one_sequence_at_a_time", gives_the_same(["--max-num-seqs", "1"])),
        Trial::test("batch::preemption_changes_nothing", preemption_changes_nothing),
        Trial::test("batch::shards_make_the_whole", shards_make_the_whole),
        Trial::test("batch::three_sequences", gives_the_same(["--max-num-seqs", "3"])),
        Trial::test("batch::sixty_four_sequences", gives_the_same(["--max-num-seqs", "64"])),
        Trial::test("batch::prompts_in_pieces_of_7", gives_the_same(["--prompt-chunk", "7"])),
        Trial::test("batch::prompts_in_pieces_of_64", gives_the_same(["--prompt-chunk", "64"])),
        Trial::test(
            "batch::streamed_experts",
            gives_the_same(["--resident-experts", "0", "--ring-experts", "3", "--page-size", "10000"]),
        ),
        Trial::test("batch::pipes_in_and_out", pipes_in_and_out),
        Trial::test("batch::answers_are_right", answers_are_right),
        Trial::test("batch::attention_on_the_gpu_gives_the_same_texts", attention_on_the_gpu_gives_the_same_texts),
        Trial::test("batch::bad_lines_are_answered_among_good_ones", bad_lines_are_answered_among_good_ones),
        Trial::test("batch::a_full_disk_ends_the_run", a_full_disk_ends_the_run),
    ]
}
