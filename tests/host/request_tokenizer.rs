//! Text ⇄ tokens: what is certain comes out at once, and never anything else.

use fulmen::request::tokenizer::{CompletionText, SpecialTokens, StopMatcher, TextStream, Tokenizer, TokenizerError};
use fulmen::request::{Completion, FinishReason, RequestError, RequestOutput, SamplingParams, StopReason};
use proptest::prelude::*;

use crate::small_tokenizers::{UNALIGNED_ID, byte_level, sentence_piece};

fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::new(tokenizer, true);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap_or_default()).collect();
    pieces.push(stream.finish().unwrap_or_default());
    pieces
}

#[test]
fn a_missing_tokenizer_says_what_and_where() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
    let message = Tokenizer::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains("there is a tokenizer.model"), "{message}");
    assert!(message.contains(&folder.path().display().to_string()), "{message}");
    let message = Tokenizer::open(&folder.path().join("nowhere")).unwrap_err().to_string();
    assert!(message.contains("no such folder"), "{message}");

    std::fs::write(folder.path().join("tokenizer.json"), "{\"version\":").unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(matches!(error, TokenizerError::Malformed { .. }), "{error}");
}

#[test]
fn special_tokens_are_strings_or_objects_and_the_config_wins() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("special_tokens_map.json", r#"{"bos_token":"<old>","unk_token":{"content":"<unk>","lstrip":false}}"#);
    write(
        "tokenizer_config.json",
        r#"{"bos_token":{"content":"<s>"},"eos_token":"</s>","pad_token":null,"add_bos_token":true}"#,
    );
    let special = SpecialTokens::open(folder.path()).unwrap();
    let all: Vec<_> = special.iter().collect();
    assert_eq!(all, [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]);
    assert_eq!(special.get("pad_token"), None);

    write("tokenizer_config.json", r#"{"eos_token":{"id":2}}"#);
    let message = SpecialTokens::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("eos_token") && message.contains("tokenizer_config.json"), "{message}");
}

#[test]
fn encoding_adds_special_tokens_only_when_asked_and_is_never_cut() {
    // The file of this tokenizer asks for a truncation to four tokens.
    let tokenizer = sentence_piece();
    let plain = tokenizer.encode("the the the the the the", false).unwrap();
    assert_eq!(plain.len(), 6);
    let special = tokenizer.encode("the", true).unwrap();
    assert_eq!(special[0], 1);
    assert_eq!(tokenizer.encode("<s>the", false).unwrap(), special, "written out in the text");
    assert_eq!(tokenizer.decode(&special, true).unwrap(), "the");
    assert_eq!(tokenizer.decode(&special, false).unwrap(), "<s> the");
    assert_eq!(tokenizer.decode(&[4_000_000_000], false).unwrap(), "");
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(3));
}

#[test]
fn a_token_alone_has_its_space_and_its_bytes() {
    let tokenizer = sentence_piece();
    let id = tokenizer.token_id("▁the").unwrap();
    assert_eq!(tokenizer.token_text(id).unwrap(), " the");
    assert_eq!(tokenizer.token_bytes(3 + 0xe5).unwrap(), [0xe5]);
    assert_eq!(tokenizer.token_text(3 + 0xe5).unwrap(), "\u{FFFD}");
    assert_eq!(tokenizer.token_text(2).unwrap(), "</s>");
    assert_eq!(tokenizer.token_text(1_000_000), None);
    let tokenizer = byte_level();
    for byte in 0..=255u8 {
        assert_eq!(tokenizer.token_bytes(u32::from(byte)).unwrap(), [byte]);
    }
    assert_eq!(tokenizer.vocab_size(), 262);
}

#[test]
fn half_a_character_waits() {
    let tokenizer = sentence_piece();
    let ids = tokenizer.encode("a 🚀日本", false).unwrap();
    let rocket = ["", "", "", "🚀"];
    assert_eq!(pieces(&tokenizer, &ids), ["a", " ", rocket[0], rocket[1], rocket[2], rocket[3], "日本", ""]);
    // Cut in the middle, the bytes are marked at the end and not before.
    assert_eq!(pieces(&tokenizer, &ids[..5]), ["a", " ", "", "", "", "\u{FFFD}\u{FFFD}\u{FFFD}"]);
}

#[test]
fn tokens_that_never_end_with_a_character_still_stream() {
    let tokenizer = byte_level();
    let mut ids = vec![0xe5];
    ids.extend([UNALIGNED_ID; 500]);
    let pieces = pieces(&tokenizer, &ids);
    assert_eq!(pieces[0], "");
    assert!(pieces[1..=500].iter().all(|piece| piece == "叫"));
    assert_eq!(pieces[501], "\u{FFFD}");
}

#[test]
fn special_tokens_have_no_text_unless_asked() {
    let tokenizer = sentence_piece();
    let ids = [tokenizer.token_id("▁the").unwrap(), 2, tokenizer.token_id("▁a").unwrap()];
    assert_eq!(pieces(&tokenizer, &ids).concat(), "the a");
    let mut stream = TextStream::new(&tokenizer, false);
    let text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
    assert_eq!(text, "the</s> a");
}

#[test]
fn a_completion_is_cut_at_its_stop_string() {
    let tokenizer = sentence_piece();
    let ids = tokenizer.encode("the 🚀. a", false).unwrap();
    for (include, expected) in [(false, "the "), (true, "the 🚀.")] {
        let stop = vec!["🚀.".to_string()];
        let params = SamplingParams { stop, include_stop_str_in_output: include, ..Default::default() };
        let mut text = CompletionText::new(&tokenizer, &params);
        let stopped = ids.iter().position(|&id| text.push(id).is_some()).unwrap();
        assert_eq!(tokenizer.token_text(ids[stopped]).unwrap(), ".");
        assert_eq!(text.finish(), (expected.to_string(), None));
    }
    // Half a character at the end, and a stop string made of what it turns into.
    let params = SamplingParams { stop: vec!["\u{FFFD}".into()], ..Default::default() };
    let mut text = CompletionText::new(&tokenizer, &params);
    assert_eq!(text.push(3 + 0xe5), None);
    assert_eq!(text.finish(), (String::new(), Some(StopReason::Text("\u{FFFD}".into()))));
}

fn run(stops: &[&str], include: bool, chunks: &[&str]) -> (String, Option<String>) {
    let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
    let mut matcher = StopMatcher::new(&stops, include);
    let mut text = String::new();
    let mut stopped = None;
    for chunk in chunks {
        let step = matcher.push(chunk);
        text += &step.text;
        stopped = stopped.or(step.stopped);
    }
    text += &matcher.finish();
    (text, stopped)
}

#[test]
fn the_first_complete_stop_string_wins() {
    assert_eq!(run(&["\n\n"], false, &["a\n", "b\n", "\nc"]), ("a\nb".into(), Some("\n\n".into())));
    assert_eq!(run(&["\n\n"], true, &["a\n", "b\n", "\nc"]), ("a\nb\n\n".into(), Some("\n\n".into())));
    assert_eq!(run(&["abcd", "bc"], false, &["xabcd"]), ("xa".into(), Some("bc".into())));
    assert_eq!(run(&["bc", "abc"], false, &["xabcd"]), ("x".into(), Some("abc".into())), "the longer of two");
    assert_eq!(run(&["aab"], false, &["aa", "aab"]), ("aa".into(), Some("aab".into())), "overlapping beginnings");
    assert_eq!(run(&["xyz"], false, &["ax", "y"]), ("axy".into(), None), "withheld text comes out at the end");
    assert_eq!(run(&["", "é"], false, &["è"]), ("è".into(), None), "same first byte, another character");
}

#[test]
fn only_what_may_begin_a_stop_string_is_withheld() {
    let mut matcher = StopMatcher::new(&["###".into(), "Q:".into()], false);
    let steps: Vec<String> = ["a#", "#b", "Q", "x"].iter().map(|chunk| matcher.push(chunk).text).collect();
    assert_eq!(steps, ["a", "##b", "", "Qx"]);
}

/// What the matcher's doc says, by looking at every beginning of the whole text.
fn oracle(stops: &[String], include: bool, text: &str) -> String {
    let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
    for end in ends {
        let complete = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
        if let Some(longest) = complete.map(|stop| stop.len()).max() {
            return text[..if include { end } else { end - longest }].to_string();
        }
    }
    text.to_string()
}

proptest! {
    #[test]
    fn a_valid_text_streams_to_itself(text in "[a-z .,日本叫é🚀\u{FFFD}\\n]{0,40}") {
        let tokenizer = byte_level();
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(pieces(&tokenizer, &ids).concat(), text.clone());
        let tokenizer = sentence_piece();
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, true).unwrap());
        prop_assert_eq!(pieces(&tokenizer, &ids).concat(), text);
    }

    #[test]
    fn any_bytes_stream_to_their_decoding(ids in prop::collection::vec(0u32..264, 0..80)) {
        let tokenizer = byte_level();
        prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn mostly_broken_bytes_stream_to_their_decoding(
        ids in prop::collection::vec(prop::sample::select(vec![0xe5, 0x8f, 0xab, 0xff, 0xf0, UNALIGNED_ID]), 0..80),
    ) {
        let tokenizer = byte_level();
        prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, true).unwrap());
    }

    /// Runs of invalid bytes may differ (the module's doc says how): but nothing is lost, nothing panics.
    #[test]
    fn any_byte_fallback_ids_stream(ids in prop::collection::vec(0u32..310, 0..80)) {
        let tokenizer = sentence_piece();
        let text = pieces(&tokenizer, &ids).concat();
        let decoded = tokenizer.decode(&ids, true).unwrap();
        let plain = |text: &str| text.chars().filter(char::is_ascii_lowercase).collect::<String>();
        let typed: String = ids.iter().filter(|&&id| id > 258).filter_map(|&id| tokenizer.token_text(id)).collect();
        prop_assert!(plain(&text).len() >= plain(&typed).len());
        if !decoded.contains('\u{FFFD}') {
            prop_assert_eq!(text, decoded);
        }
    }

    #[test]
    fn stopping_does_not_depend_on_the_chunks(
        stops in prop::collection::vec("[abé]{0,4}", 0..4),
        text in "[abcé]{0,30}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        include: bool,
    ) {
        let places: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| *cut.get(&places)).chain([0, text.len()]).collect();
        cuts.sort_unstable();
        let chunks: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        let names: Vec<&str> = stops.iter().map(String::as_str).collect();
        let whole = run(&names, include, &[&text]);
        prop_assert_eq!(&run(&names, include, &chunks), &whole);
        prop_assert_eq!(whole.0, oracle(&stops, include, &text));
    }

    #[test]
    fn any_file_is_opened_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let _ = Tokenizer::from_json(&bytes, SpecialTokens::default());
    }
}

/// Texts made after a run are those that come piece by piece: without the token that ended a completion, and never where a stop string
/// had the say.
#[test]
fn texts_that_a_run_left_are_made_later() {
    let tokenizer = sentence_piece();
    let ids = tokenizer.encode("the then he", false).unwrap();
    let completion = |finish_reason| Completion {
        index: 0,
        text: String::new(),
        token_ids: ids.clone(),
        finish_reason,
        stop_reason: None,
        logprobs: None,
    };
    let both = vec![completion(FinishReason::Length), completion(FinishReason::Stop)];
    let output = |stop: &[&str], result| RequestOutput {
        custom_id: "a".into(),
        params: SamplingParams { stop: stop.iter().map(|stop| stop.to_string()).collect(), ..Default::default() },
        prompt_tokens: 1,
        result,
    };
    let texts = |mut output: RequestOutput| -> Vec<String> {
        output.make_texts(&tokenizer);
        output.result.into_iter().flatten().map(|completion| completion.text).collect()
    };
    let [whole, but_one] = [&ids[..], &ids[..ids.len() - 1]].map(|ids| pieces(&tokenizer, ids).concat());
    assert!(whole.len() > but_one.len() && !but_one.is_empty());
    assert_eq!(texts(output(&[], Ok(both.clone()))), [whole, but_one]);
    assert_eq!(texts(output(&["x"], Ok(both))), ["", ""], "the run has made them");
    assert_eq!(texts(output(&[], Err(RequestError::Invalid("no".into())))), [""; 0]);
}
