//! Batch lines: what is read, what is refused and in which words, what is written, and what a killed run leaves.

use std::collections::HashSet;
use std::io::{BufReader, Cursor};
use std::path::Path;

use fulmen::request::batch_file::*;
use fulmen::request::chat_template::{ChatTemplate, ChatTemplateError, Message};
use fulmen::request::tokenizer::SpecialTokens;
use fulmen::request::{
    Completion, FinishReason, PositionLogprobs, RequestError, SamplingParams, StopReason, TokenLogprob,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::small_tokenizers::sentence_piece;

fn parse(line: &Value) -> Result<BatchLine, LineError> {
    BatchLine::parse(3, line.to_string().as_bytes())
}

fn chat(body: Value) -> Result<BatchLine, LineError> {
    let mut all = json!({"messages": [{"role": "user", "content": "hi"}]});
    all.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    parse(&json!({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": all}))
}

fn completions(body: Value) -> Result<BatchLine, LineError> {
    let mut all = json!({"prompt": "hi"});
    all.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    parse(&json!({"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": all}))
}

fn sampling(line: Result<BatchLine, LineError>) -> SamplingParams {
    line.unwrap().to_sampling(&GenerationDefaults::default()).unwrap()
}

#[test]
fn the_line_of_openai_s_documentation() {
    let line = br#"{"custom_id":"request-1","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":64}}"#;
    let line = BatchLine::parse(1, line).unwrap();
    assert_eq!((line.custom_id.as_str(), line.endpoint()), ("request-1", Endpoint::Chat));
    let Body::Chat(chat) = &line.body else { panic!() };
    assert_eq!((chat.model.as_deref(), &chat.messages[..]), (Some("m"), &[Message::new("user", "hi")][..]));
    assert_eq!(chat.sampling, SamplingFields { max_tokens: Some(64), ..Default::default() });
}

#[test]
fn without_url_the_body_tells() {
    let line = |body: Value| parse(&json!({"custom_id": "c", "body": body}));
    assert_eq!(line(json!({"prompt": "x"})).unwrap().endpoint(), Endpoint::Completions);
    let messages = json!([{"role": "user", "content": "x"}]);
    assert_eq!(line(json!({"messages": messages})).unwrap().endpoint(), Endpoint::Chat);
    assert!(line(json!({"messages": messages, "prompt": "x"})).unwrap_err().message.contains("both"));
    assert!(line(json!({})).unwrap_err().message.contains("neither"));
}

#[test]
fn prompts_are_a_text_or_tokens() {
    let prompt = |value: Value| match completions(json!({"prompt": value})) {
        Ok(BatchLine { body: Body::Completions(body), .. }) => Ok(body.prompt),
        Ok(_) => panic!(),
        Err(error) => Err(error.message),
    };
    assert_eq!(prompt(json!("x")), Ok(Prompt::Text("x".into())));
    assert_eq!(prompt(json!(["x"])), Ok(Prompt::Text("x".into())));
    assert_eq!(prompt(json!([1, 2])), Ok(Prompt::Tokens(vec![1, 2])));
    assert_eq!(prompt(json!([[1, 2]])), Ok(Prompt::Tokens(vec![1, 2])));
    for (value, word) in [
        (json!(["x", "y"]), "2 prompts"),
        (json!([[1], [2]]), "2 prompts"),
        (json!(""), "empty"),
        (json!([""]), "empty"),
        (json!([]), "empty"),
        (json!([[]]), "empty"),
        (json!([1, "x"]), "not a token id"),
        (json!([1.5]), "not a token id"),
        (json!([-1]), "not a token id"),
        (json!([4_294_967_296u64]), "not a token id"),
        (json!([[[1]]]), "not a token id"),
        (json!([null]), "null"),
        (json!(5), "number"),
        (json!(null), "missing"),
    ] {
        let message = prompt(value.clone()).unwrap_err();
        assert!(message.contains(word), "{value}: {message}");
    }
}

#[test]
fn every_sampling_field_arrives() {
    let params = sampling(completions(json!({
        "n": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7, "stop": ["a", "b"], "stop_token_ids": [5],
        "include_stop_str_in_output": true, "ignore_eos": true, "max_tokens": 9, "min_tokens": 2, "logprobs": 3,
        "logit_bias": {"11": -2, "12": 1.5}, "skip_special_tokens": false,
    })));
    let expected = SamplingParams {
        n: 3,
        temperature: 0.5,
        top_k: 4,
        top_p: 0.75,
        min_p: 0.25,
        repetition_penalty: 1.5,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        seed: 7,
        stop: vec!["a".into(), "b".into()],
        stop_token_ids: vec![5],
        include_stop_str_in_output: true,
        ignore_eos: true,
        max_tokens: Some(9),
        min_tokens: 2,
        logprobs: Some(3),
        logit_bias: vec![(11, -2.0), (12, 1.5)],
        skip_special_tokens: false,
    };
    assert_eq!(params, expected);
    assert_eq!(sampling(completions(json!({}))), SamplingParams::default());
    assert_eq!(sampling(chat(json!({}))), SamplingParams { max_tokens: None, ..Default::default() });
    assert_eq!(sampling(chat(json!({"max_completion_tokens": 5}))).max_tokens, Some(5));
    assert_eq!(sampling(chat(json!({"logprobs": true, "top_logprobs": 4}))).logprobs, Some(4));
    assert_eq!(sampling(chat(json!({"logprobs": true}))).logprobs, Some(0));
    assert_eq!(sampling(chat(json!({"logprobs": false, "top_logprobs": 0}))).logprobs, None);
    assert_eq!(sampling(chat(json!({"stop": "x"}))).stop, ["x"]);
    assert_eq!(sampling(chat(json!({"top_k": -1}))).top_k, 0);
    assert_eq!(sampling(chat(json!({"seed": -1}))).seed, u64::MAX);
    assert_eq!(sampling(chat(json!({"temperature": null, "stop": null, "tools": null}))).temperature, 1.0);
}

#[test]
fn the_request_then_the_checkpoint_then_vllm() {
    let file = json!({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 100, "do_sample": true,
                      "eos_token_id": [2, 3], "bos_token_id": 1, "transformers_version": "4"});
    let defaults = GenerationDefaults::from_json(file).unwrap();
    assert_eq!(defaults.eos_token_ids, [2, 3]);
    let params = chat(json!({"top_k": 5})).unwrap().to_sampling(&defaults).unwrap();
    assert_eq!((params.temperature, params.top_k, params.top_p, params.min_p), (0.6, 5, 0.95, 0.0));
    assert_eq!(params.max_tokens, Some(100));
    let params = completions(json!({})).unwrap().to_sampling(&GenerationDefaults { seed: 9, ..defaults }).unwrap();
    assert_eq!((params.max_tokens, params.seed), (Some(100), 9));

    let file = json!({"do_sample": false, "temperature": 0.6, "top_p": 0.5, "eos_token_id": 2});
    let greedy = GenerationDefaults::from_json(file).unwrap();
    assert_eq!((greedy.temperature, greedy.top_p, &greedy.eos_token_ids[..]), (Some(0.0), None, &[2][..]));

    let error = chat(json!({"min_tokens": 200}))
        .unwrap()
        .to_sampling(&GenerationDefaults::from_json(json!({"max_new_tokens": 100})).unwrap());
    let error = error.unwrap_err();
    assert!(error.message.contains("max_tokens=100") && error.line_number == 3, "{error}");
    assert!(GenerationDefaults::from_json(json!({"top_p": 2})).unwrap_err().contains("top_p"));
    assert!(GenerationDefaults::from_json(json!({"eos_token_id": "x"})).unwrap_err().contains("eos_token_id"));

    let folder = tempfile::tempdir().unwrap();
    assert_eq!(GenerationDefaults::open(folder.path()).unwrap(), GenerationDefaults::default());
    std::fs::write(folder.path().join("generation_config.json"), r#"{"temperature": -1}"#).unwrap();
    let message = GenerationDefaults::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("generation_config.json: temperature must be non-negative"), "{message}");
}

#[test]
fn faults_are_named() {
    use LineErrorCode::*;
    let raw = |line: &[u8]| BatchLine::parse(1, line).unwrap_err();
    assert_eq!(raw(b"{\"custom_id\":\"a\",\"bo").code, InvalidJson);
    assert_eq!(raw(b"[1]").code, InvalidJson);
    assert_eq!(raw(b"{\"custom_id\":\"\xff\"}").message, "not UTF-8 at byte 14 of the line");
    assert_eq!(raw(br#"{"custom_id":"\ud800"}"#).code, InvalidJson);
    assert_eq!(raw(br#"{"custom_id":"a","body":{"prompt":"x","temperature":1e999}}"#).code, InvalidJson);

    let messages = json!([{"role": "user", "content": "x"}]);
    let body = json!({"messages": messages});
    let cases = [
        (parse(&json!({"body": body})), InvalidCustomId, "missing"),
        (parse(&json!({"custom_id": 5, "body": body})), InvalidCustomId, "a number"),
        (parse(&json!({"custom_id": "", "body": body})), InvalidCustomId, "empty"),
        (parse(&json!({"custom_id": "a"})), InvalidValue, "body is missing"),
        (parse(&json!({"custom_id": "a", "body": []})), InvalidValue, "a list"),
        (parse(&json!({"custom_id": "a", "method": "GET", "body": body})), InvalidMethod, "GET"),
        (parse(&json!({"custom_id": "a", "url": "/v1/embeddings", "body": body})), InvalidUrl, "/v1/embeddings"),
        (parse(&json!({"custom_id": "a", "params": 1, "body": body})), UnknownField, "params"),
        (chat(json!({"messages": []})), InvalidValue, "messages is empty"),
        (chat(json!({"messages": null})), InvalidValue, "messages is missing"),
        (chat(json!({"messages": "hi"})), InvalidValue, "a string"),
        (chat(json!({"messages": [{"role": "user"}]})), InvalidValue, "messages[0]: content is missing"),
        (chat(json!({"temprature": 1, "zap": 2})), UnknownField, "\"temprature\", \"zap\""),
        (chat(json!({"stream": true})), UnsupportedField, "stream: true"),
        (chat(json!({"tools": [{"type": "function"}]})), UnsupportedField, "tools"),
        (chat(json!({"response_format": {"type": "json_object"}})), UnsupportedField, "response_format"),
        (chat(json!({"best_of": 4})), UnsupportedField, "best_of"),
        (chat(json!({"prompt": "x"})), UnknownField, "prompt"),
        (completions(json!({"messages": messages})), UnknownField, "messages"),
        (completions(json!({"echo": true, "logprobs": 1})), UnsupportedField, "echo"),
        (completions(json!({"suffix": "x"})), UnsupportedField, "suffix"),
        (completions(json!({"logprobs": true})), InvalidValue, "logprobs"),
        (completions(json!({"logprobs": 21})), InvalidValue, "max allowed: 20"),
        (chat(json!({"logprobs": 5})), InvalidValue, "true or false"),
        (chat(json!({"top_logprobs": 5})), InvalidValue, "needs logprobs: true"),
        (chat(json!({"temperature": -1})), InvalidValue, "temperature must be non-negative, got -1."),
        (chat(json!({"temperature": "1"})), InvalidValue, "temperature must be a number, got a string"),
        (chat(json!({"temperature": 1e300})), InvalidValue, "finite"),
        (chat(json!({"top_p": 0})), InvalidValue, "top_p"),
        (chat(json!({"top_k": -2})), InvalidValue, "top_k"),
        (chat(json!({"n": 0})), InvalidValue, "n must be at least 1"),
        (chat(json!({"n": 1_000_000})), InvalidValue, "n must be"),
        (chat(json!({"n": 1.5})), InvalidValue, "n must be an integer"),
        (chat(json!({"max_tokens": 0})), InvalidValue, "max_tokens must be at least 1"),
        (chat(json!({"max_tokens": 1, "max_completion_tokens": 2})), InvalidValue, "differ"),
        (chat(json!({"max_tokens": 1, "min_tokens": 2})), InvalidValue, "min_tokens"),
        (chat(json!({"seed": 0.5})), InvalidValue, "seed"),
        (chat(json!({"stop": [1]})), InvalidValue, "stop"),
        (chat(json!({"stop": ""})), InvalidValue, "empty string"),
        (chat(json!({"stop_token_ids": ["x"]})), InvalidValue, "stop_token_ids"),
        (chat(json!({"logit_bias": {"x": 1}})), InvalidValue, "\"x\" is not a token id"),
        (chat(json!({"logit_bias": {"1": "x"}})), InvalidValue, "a string"),
        (chat(json!({"logit_bias": {"1": 101}})), InvalidValue, "[-100, 100]"),
        (chat(json!({"user": 1})), InvalidValue, "user"),
        (chat(json!({"metadata": 1})), InvalidValue, "metadata"),
        (chat(json!({"model": 1})), InvalidValue, "model"),
        (chat(json!({"chat_template_kwargs": 1})), InvalidValue, "chat_template_kwargs"),
    ];
    for (i, (line, code, words)) in cases.into_iter().enumerate() {
        let error = line.expect_err(words);
        assert!(error.code == code && error.message.contains(words), "case {i}: {:?} {error}", error.code);
    }
    let error = chat(json!({"n": 0})).unwrap_err();
    assert_eq!(error.to_string(), "line 3 (c): n must be at least 1 and at most 16384, got 0.");
}

#[test]
fn what_asks_for_nothing_is_let_through() {
    chat(json!({
        "stream": false, "stream_options": null, "tools": [], "tool_choice": "none", "parallel_tool_calls": true,
        "response_format": {"type": "text"}, "store": false, "user": "u", "metadata": {"k": "v"}, "best_of": 1,
        "service_tier": "auto", "modalities": ["text"], "detokenize": true, "chat_template_kwargs": {"x": 1},
    }))
    .unwrap();
    completions(json!({"suffix": null, "best_of": 1, "echo": true, "use_beam_search": false})).unwrap();
}

#[test]
fn a_line_becomes_a_request() {
    let tokenizer = sentence_piece();
    let template = ChatTemplate::from_source(
        "t".into(),
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
         {{ m.content }}{% endfor %}{{ suffix }}{% if add_generation_prompt %} a{% endif %}",
        tokenizer.special_tokens().clone(),
    )
    .unwrap();
    let defaults = GenerationDefaults::default();
    let request =
        |line: Result<BatchLine, LineError>| line.unwrap().to_request(&tokenizer, Ok(&template), &defaults, 310);
    let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();

    let chat_line =
        chat(json!({"messages": [{"role": "user", "content": "the"}], "chat_template_kwargs": {"suffix": "."}}));
    let prompt = request(chat_line).unwrap().prompt;
    assert_eq!((prompt[0], text(&prompt).as_str()), (1, "<s> the. a"), "one <s>: the template's");
    let prompt = request(completions(json!({"prompt": "the"}))).unwrap().prompt;
    assert_eq!((prompt[0], text(&prompt).as_str()), (1, "<s> the"));
    let prompt = request(completions(json!({"prompt": "the", "add_special_tokens": false}))).unwrap().prompt;
    assert_eq!(text(&prompt), "the");
    assert_eq!(request(completions(json!({"prompt": [5, 309]}))).unwrap().prompt, [5, 309]);

    let refused = |line| request(line).unwrap_err();
    assert!(refused(completions(json!({"prompt": [310]}))).message.contains("token id 310 is out of vocabulary"));
    assert!(refused(completions(json!({"logit_bias": {"310": 1}}))).message.contains("out of vocabulary"));
    let error = refused(chat(json!({"messages": [{"role": "system", "content": "x"}]})));
    assert_eq!(error.code, LineErrorCode::ChatTemplate);
    assert_eq!(error.message, "the model's chat template refuses these messages: no system");
    let missing = ChatTemplateError::Missing { folder: "m".into() };
    let error = chat(json!({})).unwrap().to_request(&tokenizer, Err(&missing), &defaults, 310).unwrap_err();
    assert!(error.message.contains("--chat-template FILE"), "{error}");
}

fn completion(index: usize, text: &str) -> Completion {
    let tokenizer = sentence_piece();
    let (the, byte) = (tokenizer.token_id("▁the").unwrap(), 3 + 0xe5);
    let logprob = |token, logprob| TokenLogprob { token, logprob };
    Completion {
        index,
        text: text.into(),
        token_ids: vec![the, byte],
        finish_reason: FinishReason::Stop,
        stop_reason: Some(StopReason::Text(".".into())),
        logprobs: Some(vec![
            PositionLogprobs { chosen: logprob(the, -0.5), top: vec![logprob(the, -0.5), logprob(3, -1.5)] },
            PositionLogprobs { chosen: logprob(byte, f32::NEG_INFINITY), top: vec![logprob(the, -0.25)] },
        ]),
    }
}

#[test]
fn chat_results() {
    let line = chat(json!({})).unwrap();
    let output = OutputLine::success(&line, &[completion(0, " the")], 9, &sentence_piece(), "served", 17);
    let value = serde_json::to_value(&output).unwrap();
    let name = value["id"].as_str().unwrap().strip_prefix("batch_req_").unwrap().to_string();
    let the = json!({"token": " the", "logprob": -0.5, "bytes": [32, 116, 104, 101]});
    let expected = json!({
        "id": format!("batch_req_{name}"), "custom_id": "c", "error": null,
        "response": {"status_code": 200, "request_id": format!("req_{name}"), "body": {
            "id": format!("chatcmpl-{name}"), "object": "chat.completion", "created": 17, "model": "served",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": " the"},
                "logprobs": {"content": [
                    {"token": " the", "logprob": -0.5, "bytes": [32, 116, 104, 101],
                     "top_logprobs": [the, {"token": "\0", "logprob": -1.5, "bytes": [0]}]},
                    {"token": "\u{FFFD}", "logprob": -9999.0, "bytes": [229],
                     "top_logprobs": [{"token": " the", "logprob": -0.25, "bytes": [32, 116, 104, 101]}]}]},
                "finish_reason": "stop", "stop_reason": "."}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}},
    });
    assert_eq!(value, expected);
    assert_eq!(OutputLine::success(&line, &[completion(0, " the")], 9, &sentence_piece(), "served", 17), output);
}

#[test]
fn completions_results() {
    let line = completions(json!({"prompt": "Hé"})).unwrap();
    let result = |line: &BatchLine| {
        let completions = [completion(0, "x"), Completion { logprobs: None, stop_reason: None, ..completion(1, "y") }];
        serde_json::to_value(OutputLine::success(line, &completions, 2, &sentence_piece(), "m", 0)).unwrap()
    };
    let body = &result(&line)["response"]["body"];
    assert_eq!((&body["object"], &body["choices"][0]["text"]), (&json!("text_completion"), &json!("x")));
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({"text_offset": [0, 4], "tokens": [" the", "\u{FFFD}"], "token_logprobs": [-0.5, -9999.0],
               "top_logprobs": [{" the": -0.5, "\0": -1.5}, {" the": -0.25, "\u{FFFD}": -9999.0}]})
    );
    assert_eq!(body["choices"][1]["logprobs"], Value::Null);
    assert_eq!(body["usage"]["completion_tokens"], 4);
    let echoed = completions(json!({"prompt": "Hé", "echo": true})).unwrap();
    let body = &result(&echoed)["response"]["body"];
    assert_eq!(body["choices"][0]["text"], "Héx");
    assert_eq!(body["choices"][0]["logprobs"]["text_offset"], json!([2, 6]));
}

#[test]
fn error_results() {
    let value = serde_json::to_value(OutputLine::from(&chat(json!({"n": 0})).unwrap_err())).unwrap();
    assert_eq!((&value["custom_id"], &value["response"]), (&json!("c"), &Value::Null));
    assert_eq!(value["error"]["code"], "invalid_request");
    assert_eq!(value["error"]["line"], 3);
    let error = RequestError::TooLong { needed: 9, limit: "8 positions".into() };
    let value = serde_json::to_value(OutputLine::failure(&chat(json!({})).unwrap(), &error)).unwrap();
    assert_eq!(value["error"]["code"], "context_length_exceeded");
    let value = serde_json::to_value(OutputLine::from(&BatchLine::parse(8, b"{").unwrap_err())).unwrap();
    assert_eq!(value["custom_id"], Value::Null);
}

fn line(id: &str) -> String {
    json!({"custom_id": id, "body": {"prompt": "x"}}).to_string()
}

fn names(text: &str, options: ReadOptions) -> Vec<String> {
    let reader = BatchReader::new(Cursor::new(text.as_bytes().to_vec()), options);
    reader
        .map(|line| match line {
            Ok(line) => format!("{}:{}", line.line_number, line.custom_id),
            Err(BatchReadError::Line(error)) => format!("{}!{}", error.line_number, error.code.as_str()),
            Err(error) => panic!("{error}"),
        })
        .collect()
}

#[test]
fn the_reader_goes_on_after_bad_lines() {
    let (a, b, c) = (line("a"), line("b"), line("c"));
    let text = format!("\u{FEFF}{a}\r\n\n  \t\nnonsense\n{b}\n{a}\n{c}");
    assert_eq!(names(&text, Default::default()), ["1:a", "4!invalid_json_line", "5:b", "6!duplicate_custom_id", "7:c"]);
    let limited = ReadOptions { limit: Some(2), ..Default::default() };
    assert_eq!(names(&text, limited), ["1:a", "4!invalid_json_line"]);
    // The name of a bad line is taken as well.
    let bad = json!({"custom_id": "a", "body": {}}).to_string();
    assert_eq!(names(&format!("{bad}\n{a}\n"), Default::default()), ["1!invalid_request", "2!duplicate_custom_id"]);
}

#[test]
fn a_long_line_is_passed_over() {
    let long = json!({"custom_id": "long", "body": {"prompt": "x".repeat(5000)}}).to_string();
    let text = format!("{}\n{long}\n{}\n", line("a"), line("b"));
    let options = ReadOptions { max_line_bytes: 1000, ..Default::default() };
    assert_eq!(names(&text, options.clone()), ["1:a", "2!line_too_long", "3:b"]);
    // Through a small buffer too.
    let reader = BatchReader::new(BufReader::with_capacity(7, text.as_bytes()), options);
    let messages: Vec<String> = reader.filter_map(|line| line.err().map(|error| error.to_string())).collect();
    assert_eq!(messages, [format!("line 2: {} bytes long; at most 1000 are read", long.len())]);
}

#[test]
fn an_unreadable_input_ends_the_reading() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("unplugged"))
        }
    }
    let mut reader = BatchReader::new(BufReader::new(Broken), ReadOptions::default());
    assert!(matches!(reader.next(), Some(Err(BatchReadError::Io { after_line: 0, .. }))));
    assert!(reader.next().is_none());
}

#[test]
fn shards_are_disjoint_and_together_complete() {
    let text: String =
        (0..10).map(|i| if i == 4 { "\n".into() } else { format!("{}\n", line(&i.to_string())) }).collect();
    let mut all = HashSet::new();
    for shard in ["0/3", "1/3", "2/3"] {
        let options = ReadOptions { shard: shard.parse().unwrap(), ..Default::default() };
        let names = names(&text, options);
        assert_eq!(names.len(), 3);
        all.extend(names);
    }
    assert_eq!(all.len(), 9);
    for (text, words) in
        [("3/3", "the last one of 3 is 2/3"), ("0/0", "none"), ("1", "i/n"), ("-1/2", "i/n"), ("a/b", "i/n")]
    {
        let message = text.parse::<Shard>().unwrap_err();
        assert!(message.contains(words), "{message}");
    }
    assert_eq!("1/4".parse::<Shard>().unwrap().to_string(), "1/4");
}

#[test]
fn strict_finds_every_fault() {
    let text = format!("{}\nnonsense\n{}\n{}\n", line("a"), line("b"), line("a"));
    let reader = BatchReader::new(text.as_bytes(), ReadOptions::default());
    let found = validate_all(reader, |line| match line.custom_id.as_str() {
        "b" => Err(line.error(LineErrorCode::InvalidValue, "too long")),
        _ => Ok(()),
    })
    .unwrap();
    assert_eq!(found.lines, 4);
    assert_eq!(found.faults.iter().map(|fault| fault.line_number).collect::<Vec<_>>(), [2, 3, 4]);
}

fn success(id: &str) -> OutputLine {
    let line = BatchLine::parse(1, line(id).as_bytes()).unwrap();
    OutputLine::success(&line, &[completion(0, id)], 1, &sentence_piece(), "m", 0)
}

fn open(output: &Path, existing: Existing) -> Result<(ResultWriter, Finished), WriterError> {
    ResultWriter::open(output, None, Path::new("-"), existing)
}

#[test]
fn resuming_finds_what_is_finished_and_drops_a_torn_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.jsonl");
    let (mut writer, finished) = open(&path, Existing::Refuse).unwrap();
    assert!(finished.is_empty());
    writer.write(&success("a")).unwrap();
    // The second line with the name "b" failed, before the first one finished.
    let duplicate = LineError {
        line_number: 3,
        custom_id: Some("b".into()),
        code: LineErrorCode::DuplicateCustomId,
        message: "x".into(),
    };
    writer.write(&OutputLine::from(&duplicate)).unwrap();
    writer.sync().unwrap();
    let whole = std::fs::read(&path).unwrap();
    assert!(matches!(open(&path, Existing::Resume), Err(WriterError::Locked { .. })));
    drop(writer);

    let message = open(&path, Existing::Refuse).unwrap_err().to_string();
    assert!(message.contains("--resume") && message.contains("--overwrite"), "{message}");

    let input = format!("{}\n{}\n{}\n{}\n", line("a"), line("b"), line("b"), line("c"));
    let next = serde_json::to_vec(&success("c")).unwrap();
    for torn in [&b""[..], &next[..next.len() / 2], &next[..1], &[0; 100]] {
        std::fs::write(&path, [&whole, torn].concat()).unwrap();
        let (mut writer, finished) = open(&path, Existing::Resume).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        assert!(finished.len() == 2 && finished.has_result("a") && !finished.has_result("b") && finished.has_error(3));
        assert_eq!(names(&input, ReadOptions { finished, ..Default::default() }), ["2:b", "4:c"]);
        writer.write(&success("b")).unwrap();
        drop(writer);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().filter(|line| serde_json::from_str::<OutputLine>(line).is_ok()).count(), 3);
    }
    // Whole but for its end: kept.
    std::fs::write(&path, [&whole[..], &next].concat()).unwrap();
    let (mut writer, finished) = open(&path, Existing::Resume).unwrap();
    assert!(finished.has_result("c"));
    writer.write(&success("d")).unwrap();
    drop(writer);
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 4);

    let (writer, finished) = open(&path, Existing::Overwrite).unwrap();
    drop(writer);
    assert!(finished.is_empty() && std::fs::read(&path).unwrap().is_empty());
}

#[test]
fn resuming_destroys_no_foreign_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes");
    for text in ["a letter", "a letter\nand more", "{\"custom_id\":\"a\",\"body\":{}}\n", "{}\n", "[1]\n"] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(open(&path, Existing::Resume), Err(WriterError::NotResults { line: 1, .. })), "{text}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn wrong_paths_are_found_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.jsonl");
    std::fs::write(&path, "input").unwrap();
    let message = open(&folder.path().join("none/out"), Existing::Refuse).unwrap_err().to_string();
    assert!(message.contains("there is no folder"), "{message}");
    let again = folder.path().join(".").join("x.jsonl");
    let error = ResultWriter::open(&again, None, &path, Existing::Overwrite).unwrap_err();
    assert!(error.to_string().ends_with("is both the input and the output"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "input");
    let new = folder.path().join("new");
    let error = ResultWriter::open(&new, Some(&new), &path, Existing::Refuse).unwrap_err();
    assert!(error.to_string().ends_with("is both the output and the error file"), "{error}");
    assert!(matches!(open(Path::new("-"), Existing::Resume), Err(WriterError::ResumeStdout)));
}

#[test]
fn errors_have_their_own_file_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (output, errors) = (folder.path().join("out"), folder.path().join("err"));
    let open = |existing| ResultWriter::open(&output, Some(&errors), Path::new("in"), existing).unwrap();
    let (mut writer, _) = open(Existing::Refuse);
    writer.write(&success("a")).unwrap();
    writer.write(&OutputLine::from(&BatchLine::parse(7, b"{").unwrap_err())).unwrap();
    drop(writer);
    assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 1);
    assert!(std::fs::read_to_string(&errors).unwrap().contains("invalid_json_line"));
    let (_, finished) = open(Existing::Resume);
    assert!(finished.has_result("a") && finished.has_error(7));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let (mut writer, _) = open(Path::new("/dev/full"), Existing::Refuse).unwrap();
    let error = writer.write(&success("a")).unwrap_err();
    assert!(matches!(error, WriterError::Write { .. }), "{error}");
}

/// JSON with the dialect's names in it.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..30).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    let name = prop_oneof![
        4 => prop::sample::select(vec![
            "custom_id", "body", "url", "method", "messages", "prompt", "role", "content", "type", "text", "stop", "n",
            "temperature", "logprobs", "logit_bias", "max_tokens", "min_tokens", "top_k", "seed", "stream", "echo", "7",
        ]).prop_map(String::from),
        1 => ".{0,6}",
    ];
    leaf.prop_recursive(4, 40, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((name.clone(), inner), 0..8)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_bytes_are_lines_or_faults(bytes in prop::collection::vec(any::<u8>(), 0..300), limit in 0usize..80) {
        let options = ReadOptions { max_line_bytes: limit, ..Default::default() };
        for line in BatchReader::new(bytes.as_slice(), options) {
            let readable = !matches!(line, Err(BatchReadError::Io { .. }));
            prop_assert!(readable);
        }
    }

    #[test]
    fn any_json_is_a_line_or_a_fault(value in any_json(), body in any_json()) {
        let tokenizer = sentence_piece();
        let template = ChatTemplate::from_source("t".into(), "{{ messages[0].content }}", SpecialTokens::default()).unwrap();
        for value in [value, json!({"custom_id": "x", "body": body})] {
            match parse(&value) {
                Ok(line) => {
                    let _ = line.to_request(&tokenizer, Ok(&template), &GenerationDefaults::default(), 310);
                }
                Err(error) => {
                    let output = OutputLine::from(&error);
                    let text = serde_json::to_string(&output).unwrap();
                    prop_assert!(!text.contains('\n'));
                    prop_assert_eq!(serde_json::from_str::<OutputLine>(&text).unwrap(), output);
                }
            }
            let _ = GenerationDefaults::from_json(value);
        }
    }

    /// Whatever is in the texts, a result is one line and reads back as it was.
    #[test]
    fn results_read_back(id in "\\PC{1,9}|[\\n\\u{2028}\\u{0}\"]{1,5}", text in ".{0,20}|[\\n\\r\\u{2028}]{1,5}", chat_line: bool) {
        let body = if chat_line { json!({"messages": [{"role": "user", "content": "x"}]}) } else { json!({"prompt": "x"}) };
        let line = parse(&json!({"custom_id": id, "body": body})).unwrap();
        prop_assert_eq!(&line.custom_id, &id);
        let output = OutputLine::success(&line, &[completion(0, &text)], 1, &sentence_piece(), "m", 5);
        let written = serde_json::to_string(&output).unwrap();
        prop_assert!(!written.contains('\n'));
        prop_assert_eq!(serde_json::from_str::<OutputLine>(&written).unwrap(), output);
    }

    /// A file cut anywhere resumes to its whole lines.
    #[test]
    fn a_run_killed_anywhere_resumes(cut in any::<prop::sample::Index>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let (mut writer, _) = open(&path, Existing::Refuse).unwrap();
        for id in ["a", "b", "c"] {
            writer.write(&success(id)).unwrap();
        }
        drop(writer);
        let bytes = std::fs::read(&path).unwrap();
        let cut = cut.index(bytes.len() + 1);
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let (writer, finished) = open(&path, Existing::Resume).unwrap();
        drop(writer);
        let left = std::fs::read(&path).unwrap();
        prop_assert!(bytes.starts_with(&left) && (left.is_empty() || left.ends_with(b"\n")));
        prop_assert_eq!(left.iter().filter(|&&byte| byte == b'\n').count(), finished.len());
        prop_assert!(left.len() <= cut + 1 && cut - left.len().min(cut) < bytes.len() / 3 + 1);
    }
}
