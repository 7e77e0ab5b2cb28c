//! `generate`: one prompt, as text or as JSON, the same either way.

use libtest_mimic::{Failed, Trial};
use serde_json::Value;

use crate::common::*;

const PROMPT: &str = "Rule: X + Y\nReplace: X by plum, Y by fig\nAnswer:";

fn choice(ran: &Ran, index: usize) -> Value {
    ran.json()["choices"][index].clone()
}

/// From an argument and from stdin, as text and as JSON: one text. With it, the numbers on stderr.
fn one_text_however_it_is_asked_for() -> Result<(), Failed> {
    let shown = generate(["--prompt", PROMPT, "--temperature", "0"]).run().ends(0);
    assert_eq!(shown.stdout.trim(), "plum + fig");
    let shown = shown.says(["adapter ", "device ", "prompt tokens, ", "tok/s)"]);
    let json = generate(["--temperature", "0", "--json"]).stdin(PROMPT).run().ends(0);
    let body = json.json();
    assert_eq!(format!("{}\n", choice(&json, 0)["text"].as_str().expect("a text")), shown.stdout);
    assert_eq!((&body["object"], &body["choices"][0]["finish_reason"]), (&"text_completion".into(), &"stop".into()));
    let usage = &body["usage"];
    let count = |name: &str| usage[name].as_u64().expect("a count");
    assert_eq!(count("prompt_tokens") + count("completion_tokens"), count("total_tokens"), "{usage}");
    Ok(())
}

/// The template is rendered: the model was trained on it and answers right. Streamed and as JSON, the same.
fn chat_goes_through_the_template() -> Result<(), Failed> {
    let message = "Rule: X + Y\nReplace: X by plum, Y by fig";
    let system = "Answer with one line and nothing else.";
    let shown = generate(["--chat", message, "--system", system, "--temperature", "0"]).run().ends(0);
    assert_eq!(shown.stdout.trim(), "plum + fig");
    // `--chat` without a text reads it from stdin.
    let json = generate(["--system", system, "--temperature", "0", "--json", "--chat"]).stdin(message).run().ends(0);
    let body = json.json();
    assert_eq!(body["object"], "chat.completion");
    let content = choice(&json, 0)["message"]["content"].as_str().expect("a text").to_owned();
    assert_eq!(format!("{content}\n"), shown.stdout);
    Ok(())
}

/// The same seed gives the same text, another seed another; streamed or not.
fn seeds_reproduce() -> Result<(), Failed> {
    let with_seed = |seed: &str| {
        let words = ["--prompt", "X", "-n", "12", "--ignore-eos", "--temperature", "1.5", "--seed", seed];
        generate(words).run().ends(0).stdout
    };
    let seven = with_seed("7");
    assert_eq!(seven, with_seed("7"));
    assert_ne!(seven, with_seed("8"));
    Ok(())
}

/// Three completions, all different, with the log-probabilities of what was chosen.
fn several_completions_with_logprobs() -> Result<(), Failed> {
    let words = ["--prompt", "X", "-n", "6", "--ignore-eos", "--temperature", "1.5", "--num-completions", "3"];
    let ran = generate(words).words(["--logprobs", "2", "--json"]).run().ends(0);
    let body = ran.json();
    let choices = body["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 3);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!((&choice["index"], &choice["finish_reason"]), (&index.into(), &"length".into()));
        let logprobs = &choice["logprobs"];
        let lengths = ["tokens", "token_logprobs", "text_offset", "top_logprobs"].map(|name| {
            let list = logprobs[name].as_array().expect("a list");
            list.len()
        });
        assert_eq!(lengths, [6; 4], "{logprobs}");
        let all_negative = |value: &Value| value.as_f64().is_some_and(|logprob| logprob <= 0.0);
        assert!(logprobs["token_logprobs"].as_array().is_some_and(|list| list.iter().all(all_negative)), "{logprobs}");
        let tops = logprobs["top_logprobs"].as_array().expect("a list");
        assert!(tops.iter().all(|top| top.as_object().is_some_and(|top| (2..=3).contains(&top.len()))), "{logprobs}");
    }
    assert_eq!(body["usage"]["completion_tokens"], 18);
    Ok(())
}

/// A stop text ends the completion, is not part of it, and is told.
fn stop_texts_end_completions() -> Result<(), Failed> {
    let words = ["--prompt", PROMPT, "--temperature", "0", "--stop", " +", "--stop", "nowhere"];
    let shown = generate(words).run().ends(0);
    assert_eq!(shown.stdout.trim(), "plum");
    let json = generate(words).words(["--json"]).run().ends(0);
    let choice = choice(&json, 0);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&"stop".into(), &" +".into()));
    assert_eq!(format!("{}\n", choice["text"].as_str().expect("a text")), shown.stdout);
    Ok(())
}

/// Without -n a completion goes on until the context is full, and says so.
fn full_contexts_end_completions() -> Result<(), Failed> {
    let words = ["--prompt", PROMPT, "--ignore-eos", "--max-model-len", "32", "--json"];
    let ran = generate(words).run().ends(0);
    let usage = ran.json()["usage"].clone();
    assert_eq!((&usage["total_tokens"], &choice(&ran, 0)["finish_reason"]), (&32.into(), &"length".into()));
    let ran = generate(["--prompt", &"X ".repeat(50), "--max-model-len", "32"]).run().ends(1);
    ran.says(["error: prompt of ", "does not fit", "room for 32 tokens"]);
    Ok(())
}

pub fn on_adapter() -> Vec<Trial> {
    vec![
        Trial::test("generate::one_text_however_it_is_asked_for", one_text_however_it_is_asked_for),
        Trial::test("generate::chat_goes_through_the_template", chat_goes_through_the_template),
        Trial::test("generate::seeds_reproduce", seeds_reproduce),
        Trial::test("generate::several_completions_with_logprobs", several_completions_with_logprobs),
        Trial::test("generate::stop_texts_end_completions", stop_texts_end_completions),
        Trial::test("generate::full_contexts_end_completions", full_contexts_end_completions),
    ]
}
