//! Messages → text, as transformers would write it.

use fulmen::request::chat_template::{ChatTemplate, ChatTemplateError, Message};
use fulmen::request::tokenizer::SpecialTokens;
use serde_json::{Map, Value, json};

fn special() -> SpecialTokens {
    [("bos_token", "<s>"), ("eos_token", "</s>")].into_iter().collect()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_source("test".into(), source, special()).unwrap()
}

fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message::new(role, content)).collect()
}

fn render(source: &str, turns: &[(&str, &str)], arguments: Value) -> Result<String, ChatTemplateError> {
    let arguments = arguments.as_object().cloned().unwrap_or_default();
    template(source).render(&messages(turns), true, &arguments)
}

/// mistralai/Mixtral-8x7B-Instruct-v0.1's.
const MIXTRAL: &str = "{{ bos_token }}{% for message in messages %}\
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
    {% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
    {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

#[test]
fn mixtral() {
    let turns = [("user", "Hi <b>"), ("assistant", "Hello"), ("user", "Bye")];
    assert_eq!(render(MIXTRAL, &turns, json!({})).unwrap(), "<s>[INST] Hi <b> [/INST]Hello</s>[INST] Bye [/INST]");
}

#[test]
fn raise_exception_reaches_the_user() {
    let error = render(MIXTRAL, &[("user", "a"), ("user", "b")], json!({})).unwrap_err();
    assert!(matches!(&error, ChatTemplateError::Raised(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the model's chat template refuses these messages: \
         Conversation roles must alternate user/assistant/user/assistant/..."
    );
    // Inside a macro and a loop as well.
    let source = "{% macro m() %}{% for x in [1] %}{{ raise_exception('deep') }}{% endfor %}{% endmacro %}{{ m() }}";
    assert!(matches!(render(source, &[], json!({})).unwrap_err(), ChatTemplateError::Raised(m) if m == "deep"));
}

/// Blocks on lines of their own leave no blank lines; the arguments of a request are variables.
#[test]
fn chat_ml_with_arguments() {
    let source = "{%- if messages[0].role == 'system' %}\n    {{- messages[0].content.strip() + '\\n' }}\n{%- endif %}\n\
        {% for message in messages %}\n    {% if message.role == 'system' %}{% continue %}{% endif %}\n\
        <|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\n\
        {% if add_generation_prompt %}\n<|im_start|>assistant\n\
        {% if enable_thinking is defined and enable_thinking is false %}\n<think>\n\n</think>\n\n{% endif %}\n{% endif %}\n";
    let turns = [("system", " Be brief. "), ("user", "Hi")];
    assert_eq!(
        render(source, &turns, json!({"enable_thinking": false})).unwrap(),
        "Be brief.\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
    assert_eq!(
        render(source, &turns, json!({})).unwrap(),
        "Be brief.\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        template(source).render(&messages(&turns), false, &Map::new()).unwrap(),
        "Be brief.\n<|im_start|>user\nHi<|im_end|>\n"
    );
}

#[test]
fn python_is_understood() {
    let cases = [
        ("{{ 'a,b'.split(',')|join('-') }}", "a-b"),
        ("{{ '  x'.lstrip() ~ 'Hello'.startswith('He') }}", "xTrue"),
        ("{{ {'b': [1, 2.5, none], 'a': '<é\"'} | tojson }}", r#"{"b": [1, 2.5, null], "a": "<é\""}"#),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "x=1"),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("{{ none }}{{ false }}{{ tools is none }}{{ missing }}", "NoneFalseTrue"),
        ("{% generation %}x{%- endgeneration -%} y", "xy"),
        ("{{ messages[::-1] | length }}{{ bos_token }}", "0<s>"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source, &[], json!({})).unwrap(), expected, "{source}");
    }
    let today = render("{{ strftime_now('%Y-%m-%d') }}", &[], json!({})).unwrap();
    assert!(today.len() == 10 && today.as_str() > "2024", "{today}");
}

#[test]
fn errors_name_the_template_and_the_line() {
    let message = ChatTemplate::from_source("x.jinja".into(), "a\n{% if %}", special()).unwrap_err().to_string();
    assert!(message.starts_with("x.jinja: ") && message.contains("line 2"), "{message}");
    let message = render("{{ messages.foo.bar }}", &[], json!({})).unwrap_err().to_string();
    assert!(message.starts_with("test: ") && message.contains("line 1"), "{message}");
    for name in ["messages", "bos_token", "tools"] {
        let message = render("x", &[], json!({name: 1})).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn the_first_source_wins() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let open = |given: Option<&str>| {
        let template = ChatTemplate::open(folder.path(), given, &special())?;
        template.render(&[], false, &Map::new())
    };
    let message = open(None).unwrap_err().to_string();
    assert!(message.contains("no chat template") && message.contains("--chat-template FILE"), "{message}");

    std::fs::write(path("chat_template.json"), r#"{"chat_template": "json"}"#).unwrap();
    assert_eq!(open(None).unwrap(), "json");
    let named =
        r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]}"#;
    std::fs::write(path("tokenizer_config.json"), named).unwrap();
    assert_eq!(open(None).unwrap(), "named");
    std::fs::write(path("tokenizer_config.json"), r#"{"chat_template": "config"}"#).unwrap();
    assert_eq!(open(None).unwrap(), "config");
    std::fs::write(path("chat_template.jinja"), "jinja").unwrap();
    assert_eq!(open(None).unwrap(), "jinja");
    std::fs::write(path("mine.jinja"), "file").unwrap();
    assert_eq!(open(path("mine.jinja").to_str()).unwrap(), "file");
    assert_eq!(open(Some("{{ 'string' }}")).unwrap(), "string");
    let message = open(Some("no/such.jinja")).unwrap_err().to_string();
    assert!(message.contains("no/such.jinja"), "{message}");

    std::fs::remove_file(path("chat_template.jinja")).unwrap();
    std::fs::write(path("tokenizer_config.json"), r#"{"chat_template": [{"name": "rag", "template": "t"}]}"#).unwrap();
    let message = open(None).unwrap_err().to_string();
    assert!(message.contains("rag"), "{message}");
}

#[test]
fn messages_are_read_or_refused_by_name() {
    let read = |value: Value| Message::from_json(&value);
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
    assert_eq!(read(parts).unwrap(), Message::new("user", "a\nb"));
    let recorded = json!({"role": "assistant", "content": "x", "tool_calls": null, "refusal": null});
    assert_eq!(read(recorded).unwrap(), Message::new("assistant", "x"));
    for (value, word) in [
        (json!("hi"), "object"),
        (json!({"content": "x"}), "role"),
        (json!({"role": null, "content": "x"}), "role"),
        (json!({"role": "user"}), "content"),
        (json!({"role": "user", "content": null}), "content"),
        (json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), "image_url"),
        (json!({"role": "user", "content": ["x"]}), "part"),
        (json!({"role": "user", "content": "x", "tool_calls": [{}]}), "tool_calls"),
        (json!({"role": "user", "content": "x", "colour": 1}), "colour"),
    ] {
        let message = read(value.clone()).unwrap_err();
        assert!(message.contains(word), "{value}: {message}");
    }
}
