//! The full Mixtral tokenizer against published ids: `mixtral/8x7b-tokenizer.json`, `vectors/…` below the data folder.

use std::path::Path;

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
        trial("request::qwen3_chat_template", qwen3_template),
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
        assert_eq!(&tokenizer.encode(text, false)?, ids, "{text:?}");
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
