//! Full tokenizers and chat forms against published ids and renderings below the data folder. Tokenizers that are published in
//! another form than tokenizer.json are converted by `tests/tokenizers/convert.py`, which needs a `python3`.

use std::path::Path;
use std::process::Command;

use fulmen::request::chat_template::{ChatTemplate, Message};
use fulmen::request::tokenizer::{SpecialTokens, TextStream, Tokenizer};
use libtest_mimic::{Failed, Trial};
use serde_json::{Map, Value};

/// Ignored, with the reason as their kind, where there is no data folder.
pub fn trials(data: Option<&Path>) -> Vec<Trial> {
    let trial = |name: &str, run: fn(&Path) -> Result<(), Failed>| match data {
        Some(data) => {
            let data = data.to_path_buf();
            Trial::test(name, move || run(&data))
        }
        None => Trial::test(name, || Ok(())).with_kind("FULMEN_DATA names no folder").with_ignored_flag(true),
    };
    vec![
        trial("request::mixtral_ids_of_mt_bench", mixtral_ids),
        trial("request::mistral_common_conversation", mistral_common),
        trial("request::olmoe_ids_of_mt_bench", olmoe_ids),
        trial("request::qwen3_ids_of_mt_bench", |data| same_ids(data, &converted(data, "qwen3")?, "qwen3")),
        trial("request::dbrx_ids_of_mt_bench", |data| same_ids(data, &converted(data, "dbrx")?, "dbrx")),
        trial("request::gpt_oss_ids_of_mt_bench", |data| same_ids(data, &converted(data, "gpt_oss")?, "gpt_oss")),
        trial("request::qwen2_ids_of_llama_cpp", qwen2_ids),
        trial("request::mistral_common_conversation_of_8x22b", mistral_common_v3),
        trial("request::qwen3_chat_template", qwen3_template),
        trial("request::harmony_renderings", harmony_renderings),
        trial("request::harmony_conversations", harmony_conversations),
    ]
}

fn json(path: &Path) -> Result<Value, Failed> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn tokenizer(path: &Path) -> Result<Tokenizer, Failed> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")].into_iter().collect();
    Ok(Tokenizer::from_json(&bytes, special)?)
}

/// The tokenizer.json that the script makes of a model's own files.
fn converted(data: &Path, name: &str) -> Result<Tokenizer, Failed> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("tokenizer.json");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizers/convert.py");
    let status = Command::new("python3").arg(&script).args([name.as_ref(), data.as_os_str(), out.as_os_str()]).status();
    match status {
        Ok(status) if status.success() => tokenizer(&out),
        Ok(status) => Err(format!("{} {name}: {status}", script.display()).into()),
        Err(error) => Err(format!("python3 is needed to convert the tokenizer: {error}").into()),
    }
}

fn mixtral_ids(data: &Path) -> Result<(), Failed> {
    same_ids(data, &tokenizer(&data.join("mixtral/8x7b-tokenizer.json"))?, "mixtral")
}

fn olmoe_ids(data: &Path) -> Result<(), Failed> {
    same_ids(data, &tokenizer(&data.join("olmoe/allenai_gpt-neox-olmo-dolma-v1_5.json"))?, "olmoe")
}

/// Ids of all texts; and the text back, whole and as a stream.
fn same_ids(data: &Path, tokenizer: &Tokenizer, name: &str) -> Result<(), Failed> {
    let vectors = json(&data.join("vectors/token_ids_mtbench_5_tokenizers.json"))?;
    let texts: Vec<String> = serde_json::from_value(vectors["texts"].clone())?;
    let ids: Vec<Vec<u32>> = serde_json::from_value(vectors[name].clone())?;
    assert!(texts.len() >= 160 && texts.len() == ids.len());
    for (text, ids) in texts.iter().zip(&ids) {
        let encoded = tokenizer.encode(text, false)?;
        // The vectors' encoder took marks in a text for text; a rendered template has them as tokens.
        if text.contains("<|im_start|>") && encoded.len() < ids.len() {
            assert_eq!(tokenizer.decode(&encoded, false)?, *text);
            continue;
        }
        assert_eq!(&encoded, ids, "{text:?}");
        let decoded = tokenizer.decode(ids, false)?;
        let mut stream = TextStream::new(tokenizer, false);
        let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        streamed.extend(stream.finish());
        assert_eq!(streamed, decoded, "{text:?}");
    }
    Ok(())
}

/// One space in front of each answer is all that mistral-common's pieces have beyond the published template's text.
fn mistral_common(data: &Path) -> Result<(), Failed> {
    let tokenizer = tokenizer(&data.join("mixtral/8x7b-tokenizer.json"))?;
    let folder = data.join("vectors/mistral-common-samples");
    let sample = json(&folder.join("no_tools.sample.json"))?;
    let messages = sample["messages"].as_array().ok_or("no messages")?;
    let messages = messages.iter().map(Message::from_json).collect::<Result<Vec<_>, _>>()?;
    let expected: Vec<u32> = serde_json::from_value(json(&folder.join("no_tools.tokens_v1.json"))?["tokens"].clone())?;
    let source = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
        {{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}\
        {% endif %}{% endfor %}";
    let template = ChatTemplate::from_source("test".into(), source, tokenizer.special_tokens().clone())?;
    let text = template.render(&messages, true, &Map::new())?;
    assert_eq!(tokenizer.encode(&text, false)?, expected);
    Ok(())
}

/// llama.cpp's vectors for the same vocabulary: texts between marks, ids line by line.
fn qwen2_ids(data: &Path) -> Result<(), Failed> {
    let tokenizer = converted(data, "qwen3")?;
    let read =
        |suffix: &str| std::fs::read_to_string(data.join("vectors").join(format!("ggml-vocab-qwen2.gguf.{suffix}")));
    let (texts, ids) = (read("inp")?, read("out")?);
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let ids: Vec<&str> = ids.lines().collect();
    let n = ids.len();
    assert!(n >= 40 && (texts.len() == n || texts.len() == n + 1), "{} texts, {n} lines of ids", texts.len());
    for (text, ids) in texts.iter().zip(ids) {
        let ids = ids.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>()?;
        assert_eq!(tokenizer.encode(text, false)?, ids, "{text:?}");
    }
    Ok(())
}

/// [INST] and [/INST] are tokens of their own here, and the template has the spaces.
fn mistral_common_v3(data: &Path) -> Result<(), Failed> {
    let tokenizer = converted(data, "mixtral_v3")?;
    let folder = data.join("vectors/mistral-common-samples");
    let sample = json(&folder.join("no_tools.sample.json"))?;
    let messages = sample["messages"].as_array().ok_or("no messages")?;
    let messages = messages.iter().map(Message::from_json).collect::<Result<Vec<_>, _>>()?;
    let source = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
        {{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}\
        {% endif %}{% endfor %}";
    let template = ChatTemplate::from_source("test".into(), source, tokenizer.special_tokens().clone())?;
    let text = template.render(&messages, true, &Map::new())?;
    let published = std::fs::read_to_string(folder.join("no_tools.text_v3.txt"))?;
    assert_eq!(text, published.trim_end().replace('▁', " "));
    let expected: Vec<u32> = serde_json::from_value(json(&folder.join("no_tools.tokens_v3.json"))?["tokens"].clone())?;
    assert_eq!(tokenizer.encode(&text, false)?, expected);
    Ok(())
}

/// Ids of the tokens that mark a harmony conversation.
const HARMONY: [(&str, u32); 7] = [
    ("<|return|>", 200002),
    ("<|constrain|>", 200003),
    ("<|channel|>", 200005),
    ("<|start|>", 200006),
    ("<|end|>", 200007),
    ("<|message|>", 200008),
    ("<|call|>", 200012),
];

/// Every rendered conversation: its marks are single tokens, all else is text, and it comes back as it was. Two files hold ids.
fn harmony_renderings(data: &Path) -> Result<(), Failed> {
    let tokenizer = converted(data, "gpt_oss")?;
    let (mut texts, mut lists) = (0, 0);
    for entry in std::fs::read_dir(data.join("vectors/harmony"))? {
        let path = entry?.path();
        let content = std::fs::read_to_string(&path)?;
        let (text, ids) = if content.starts_with(|c: char| c.is_ascii_digit()) {
            lists += 1;
            let ids = content.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>()?;
            (tokenizer.decode(&ids, false)?, ids)
        } else {
            texts += 1;
            let ids = tokenizer.encode(&content, false)?;
            assert_eq!(tokenizer.decode(&ids, false)?, content, "{}", path.display());
            (content, ids)
        };
        assert_eq!(tokenizer.encode(&text, false)?, ids, "{}", path.display());
        for (mark, id) in HARMONY {
            let n = ids.iter().filter(|found| **found == id).count();
            assert_eq!(n, text.matches(mark).count(), "{}: {mark}", path.display());
        }
        assert!(ids.contains(&200008), "{}: no message", path.display());
    }
    assert!(texts >= 15 && lists >= 1, "{texts} texts, {lists} lists of ids");
    Ok(())
}

/// Harmony's frame as a template, over the conversations of which the renderings were made: earlier turns lose what was thought,
/// the last one keeps it.
fn harmony_conversations(data: &Path) -> Result<(), Failed> {
    let source = "\
        {%- set last_user = namespace(index=-1) %}\
        {%- for message in messages %}{% if message.role == 'user' %}{% set last_user.index = loop.index0 %}{% endif %}\
        {%- endfor %}\
        {%- for message in messages %}\
        {%- if message.role == 'assistant' %}\
        {%- if message.reasoning_content and (keep_thinking or loop.index0 > last_user.index) %}\
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.reasoning_content + '<|end|>' }}{% endif %}\
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}\
        {%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}\
        {%- endfor %}\
        {%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}";
    let template = ChatTemplate::from_source("harmony".into(), source, SpecialTokens::default())?;
    let published = |name: &str| std::fs::read_to_string(data.join("vectors/harmony").join(format!("{name}.txt")));
    let system = |effort: &str, channels: &str| {
        Message::new(
            "system",
            format!(
                "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: \
                 {effort}\n\n# Valid channels: {channels}. Channel must be included for every message."
            ),
        )
    };
    let all = "analysis, commentary, final";
    let sum = || Message::new("user", "What is 2 + 2?");
    let capital = || Message::new("user", "What is the capital of the largest country in the world?");
    let mut answer = Message::new("assistant", "2 + 2 equals 4.");
    answer.reasoning_content = Some("User asks a simple question: \"What is 2 + 2?\" The answer: 4.".into());
    let candy = Message::new("user", "What is the best place to eat candy in the world?");
    let next = Message::new("user", "What about 9 / 2?");
    let turns = vec![sum(), answer, next];
    for (name, messages, keep) in [
        ("test_simple_convo", vec![system("medium", all), sum()], false),
        ("test_reasoning_system_message_no_instruction", vec![system("high", "analysis, final"), candy], false),
        ("test_reasoning_system_message", vec![system("medium", "analysis, final"), sum()], false),
        ("test_simple_convo_high_effort_no_instruction", vec![system("high", all), capital()], false),
        ("test_simple_convo_low_effort_no_instruction", vec![system("low", all), capital()], false),
        ("test_dropping_cot_by_default", turns.clone(), false),
        ("test_preserve_cot", turns, true),
    ] {
        let arguments: Map<String, Value> = [("keep_thinking".to_owned(), keep.into())].into_iter().collect();
        assert_eq!(template.render(&messages, true, &arguments)?, published(name)?, "{name}");
    }
    Ok(())
}

/// The template with the most Python in it: it compiles, and draws both forms of the assistant's turn.
fn qwen3_template(data: &Path) -> Result<(), Failed> {
    let config = json(&data.join("qwen3_moe/qwen3-tokenizer_config.json"))?;
    let source = config["chat_template"].as_str().ok_or("no chat_template")?;
    let template = ChatTemplate::from_source("qwen3".into(), source, SpecialTokens::default())?;
    let mut earlier = Message::new("assistant", "<think>\nhm\n</think>\n\nYes.");
    let messages = vec![
        Message::new("system", "Be brief."),
        Message::new("user", "Hi"),
        earlier.clone(),
        Message::new("user", "Bye"),
    ];
    let start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
        <|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(template.render(&messages, true, &Map::new())?, start);
    let quiet: Map<String, Value> = [("enable_thinking".to_string(), false.into())].into_iter().collect();
    assert_eq!(template.render(&messages, true, &quiet)?, format!("{start}<think>\n\n</think>\n\n"));
    earlier.content = "Yes.".into();
    earlier.reasoning_content = Some("hm".into());
    let messages = [Message::new("user", "Hi"), earlier];
    let expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nYes.<|im_end|>\n";
    assert_eq!(template.render(&messages, false, &Map::new())?, expected);
    Ok(())
}
