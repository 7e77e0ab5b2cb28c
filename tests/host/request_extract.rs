//! A real tokenizer and chat form in small: `tests/tokenizers/` holds an extract of Mixtral's, and what it has to give.

use std::path::PathBuf;

use fulmen::request::chat_template::{ChatTemplate, Message};
use fulmen::request::tokenizer::{SpecialTokens, TextStream, Tokenizer};
use serde::Deserialize;
use serde_json::Map;

#[derive(Deserialize)]
struct Extract {
    texts: Vec<TextIds>,
    chat_template: String,
    chat_template_later: String,
    bos_token: String,
    eos_token: String,
    chat: Chat,
}

#[derive(Deserialize)]
struct TextIds {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<serde_json::Value>,
    rendered: TextIds,
    rendered_later: RenderedLater,
    v1: FormV1,
}

#[derive(Deserialize)]
struct RenderedLater {
    text: String,
}

#[derive(Deserialize)]
struct FormV1 {
    pieces: Vec<String>,
    ids: Vec<u32>,
}

fn open() -> (Extract, Tokenizer) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizers");
    let extract = std::fs::read(folder.join("mixtral_extract.json")).unwrap();
    let extract: Extract = serde_json::from_slice(&extract).unwrap();
    let special: SpecialTokens =
        [("bos_token", &extract.bos_token), ("eos_token", &extract.eos_token)].into_iter().collect();
    let json = std::fs::read(folder.join("mixtral_reduced_tokenizer.json")).unwrap();
    (extract, Tokenizer::from_json(&json, special).unwrap())
}

#[test]
fn texts_have_their_ids_and_stream_back() {
    let (extract, tokenizer) = open();
    assert!(extract.texts.len() > 30);
    for TextIds { text, ids } in &extract.texts {
        assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        let with_bos: Vec<u32> = [1].into_iter().chain(ids.iter().copied()).collect();
        assert_eq!(tokenizer.encode(text, true).unwrap(), with_bos, "{text:?}");
        let decoded = tokenizer.decode(ids, true).unwrap();
        let mut stream = TextStream::new(&tokenizer, true);
        let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        streamed.extend(stream.finish());
        assert_eq!(streamed, decoded);
        assert_eq!(&decoded, text);
    }
}

#[test]
fn conversations_have_their_text_and_ids() {
    let (extract, tokenizer) = open();
    let messages: Vec<Message> = extract.chat.messages.iter().map(|m| Message::from_json(m).unwrap()).collect();
    let render = |source: &str| {
        let template = ChatTemplate::from_source("extract".into(), source, tokenizer.special_tokens().clone()).unwrap();
        template.render(&messages, true, &Map::new()).unwrap()
    };
    let text = render(&extract.chat_template);
    assert_eq!(text, extract.chat.rendered.text);
    assert_eq!(tokenizer.encode(&text, false).unwrap(), extract.chat.rendered.ids);
    assert_eq!(render(&extract.chat_template_later), extract.chat.rendered_later.text);

    // mistral-common's own form: each piece encoded alone, </s> after each answer.
    let mut ids = vec![1];
    for (i, piece) in extract.chat.v1.pieces.iter().enumerate() {
        ids.extend(tokenizer.encode(piece, false).unwrap());
        ids.extend((i % 2 == 1).then_some(2));
    }
    assert_eq!(ids, extract.chat.v1.ids);
}
