#!/usr/bin/env python3
"""Extract small test vectors, and a small tokenizer that reproduces them, from the full Mixtral tokenizer.

    python make_extract.py DATA        # or FULMEN_DATA=DATA python make_extract.py

DATA holds mixtral/8x7b-tokenizer.json, vectors/token_ids_mtbench_5_tokenizers.json and
vectors/mistral-common-samples/. Written here:

    mixtral_extract.json             texts with their ids, and a conversation with its ids in two chat forms
    mixtral_reduced_tokenizer.json   the tokenizer.json of Mixtral-8x7B with most of its vocabulary left out

The reduced tokenizer keeps the ids of the full one. It keeps the special tokens, the 256 byte tokens, the single
characters that occur, and every merge whose two parts and result can come up inside the extract's texts, so that a
merge is missed by no text: for each word, all pieces of it that are in the full vocabulary stay. This is checked:
both tokenizers give the same ids for every text of the extract.

Run with tokenizers 0.23.2 and jinja2 3.1.6.
"""

import json
import os
import sys
from pathlib import Path

import jinja2
from tokenizers import Tokenizer

HERE = Path(__file__).parent
MAX_TEXTS, MAX_CHARS = 25, 260

# Two forms of the chat template of Mixtral-8x7B-Instruct-v0.1. The first is its tokenizer_config.json as published:
# no space before the answers, so that one differs from mistral-common's text in spaces. The second is the later form,
# system message included, which renders mistral-common's text exactly.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

CHAT_TEMPLATE_LATER = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

SOURCES = [
    {"part": "texts", "source": "lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl, "
     "commit 0e6d3e4beaab66f4d3f93db72541a4abab8af28d; the edge cases are our own", "licence": "Apache-2.0"},
    {"part": "texts[].ids", "source": "the tokenizer.json of Mixtral-8x7B-v0.1 run by tokenizers",
     "licence": "our own output"},
    {"part": "chat", "source": "mistralai/mistral-common, tests/data/samples/no_tools, "
     "commit bc022b91aa1c3b1fb771ac70931ae0009dbf9bad", "licence": "Apache-2.0"},
    {"part": "chat_template, chat_template_later", "source": "tokenizer_config.json of "
     "mistralai/Mixtral-8x7B-Instruct-v0.1, transcribed; checked by what they render", "licence": "Apache-2.0"},
    {"part": "mixtral_reduced_tokenizer.json", "source": "tokenizer.json of mistralai/Mixtral-8x7B-v0.1, reduced",
     "licence": "Apache-2.0"},
]


def v1_pieces(messages: list[dict]) -> list[str]:
    """The texts that mistral-common encodes one by one for its v1 form. None of them holds bos or eos."""
    return [f"[INST] {m['content']} [/INST]" if m["role"] == "user" else m["content"] for m in messages]


def v1_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    ids = [1]
    for m, piece in zip(messages, v1_pieces(messages)):
        ids += tokenizer.encode(piece, add_special_tokens=False).ids + ([2] if m["role"] == "assistant" else [])
    return ids


def rendered(template: str, messages: list[dict]) -> str:
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=messages, bos_token="<s>", eos_token="</s>", raise_exception=raise_exception)


def reduce(full: dict, texts: list[str]) -> dict:
    """The tokenizer with only what the texts can touch."""
    vocab, merges = full["model"]["vocab"], full["model"]["merges"]
    longest = max(map(len, vocab))
    keep = {t for t, i in vocab.items() if i < 259}
    for text in texts:
        text = "▁" + text.replace(" ", "▁")
        for start in range(len(text)):
            for stop in range(start + 1, min(len(text), start + longest) + 1):
                if text[start:stop] in vocab:
                    keep.add(text[start:stop])

    def parts(merge):
        return merge.split(" ") if isinstance(merge, str) else merge

    kept_merges = [m for m in merges if {*parts(m), "".join(parts(m))} <= keep]
    model = full["model"] | {"vocab": {t: i for t, i in vocab.items() if t in keep}, "merges": kept_merges}
    return full | {"model": model}


def main():
    data = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["FULMEN_DATA"])
    path = data / "mixtral/8x7b-tokenizer.json"
    full, full_json = Tokenizer.from_file(str(path)), json.loads(path.read_text())
    vectors = json.loads((data / "vectors/token_ids_mtbench_5_tokenizers.json").read_text())
    samples = data / "vectors/mistral-common-samples"

    pairs = list(zip(vectors["texts"], vectors["mixtral"]))
    questions, edge_cases = pairs[:160], pairs[160:]
    short = [p for p in questions if len(p[0]) <= MAX_CHARS]
    chosen = short[::len(short) // MAX_TEXTS][:MAX_TEXTS] + edge_cases
    messages = [{"role": m["role"], "content": m["content"]}
                for m in json.loads((samples / "no_tools.sample.json").read_text())["messages"]]
    tokens = {v: json.loads((samples / f"no_tools.tokens_{v}.json").read_text())["tokens"] for v in ("v1", "v3")}
    text = {v: (samples / f"no_tools.text_{v}.txt").read_text() for v in ("v1", "v3")}

    for t, ids in chosen:
        assert full.encode(t, add_special_tokens=False).ids == ids, t
    assert v1_ids(full, messages) == tokens["v1"]
    # Special tokens are parsed and every text between two of them gets the tokenizer's leading space. So the template's
    # text has mistral-common's ids except at the answers, which follow "[/INST]" without a space: one token each.
    text_of = {"chat_template": rendered(CHAT_TEMPLATE, messages), "later": rendered(CHAT_TEMPLATE_LATER, messages)}
    assert text_of["later"] == text["v1"].replace("▁", " ")
    assert text_of["chat_template"].replace(" ", "") == text["v1"].replace("▁", "")
    whole = full.encode(text_of["chat_template"], add_special_tokens=False).ids
    differ = [(a, b) for a, b in zip(whole, tokens["v1"], strict=True) if a != b]
    assert len(differ) == sum(m["role"] == "assistant" for m in messages)

    extract = {
        "sources": SOURCES,
        "note": "ids are without bos. chat.v1: ids = [1] + each piece encoded on its own, [2] after each answer. "
                "chat.rendered.text is what chat_template makes of the messages, chat.rendered.ids that text encoded "
                "whole, special tokens parsed and no bos added: equal to chat.v1 but for the spaces before answers, "
                "so for one token of each answer. chat.rendered_later.text is what chat_template_later makes: "
                "chat.v1.text with spaces for '▁'. chat.v3 belongs to the 32768-entry tokenizer of "
                "Mixtral-8x22B-Instruct and is here for its "
                "form; the reduced tokenizer cannot make its ids.",
        "texts": [{"text": t, "ids": ids} for t, ids in chosen],
        "chat_template": CHAT_TEMPLATE, "chat_template_later": CHAT_TEMPLATE_LATER,
        "bos_token": "<s>", "eos_token": "</s>",
        "chat": {
            "messages": messages,
            "rendered": {"text": text_of["chat_template"], "ids": whole},
            "rendered_later": {"text": text_of["later"]},
            "v1": {"pieces": v1_pieces(messages), "text": text["v1"], "ids": tokens["v1"]},
            "v3": {"text": text["v3"], "ids": tokens["v3"]},
        },
    }
    all_texts = [t for t, _ in chosen] + v1_pieces(messages) + [*text_of.values()]
    reduced_json = reduce(full_json, all_texts)
    out = HERE / "mixtral_reduced_tokenizer.json"
    out.write_text(json.dumps(reduced_json, ensure_ascii=False, separators=(",", ":")) + "\n")
    reduced = Tokenizer.from_file(str(out))
    for t in all_texts:
        assert reduced.encode(t, add_special_tokens=False).ids == full.encode(t, add_special_tokens=False).ids, t
        assert reduced.encode(t).ids == full.encode(t).ids, t
    assert v1_ids(reduced, messages) == tokens["v1"]
    (HERE / "mixtral_extract.json").write_text(json.dumps(extract, ensure_ascii=False, separators=(",", ":"))
                                               .replace('},{"text"', '},\n{"text"') + "\n")
    print(f"{len(chosen)} texts, {sum(len(ids) for _, ids in chosen)} ids; "
          f"{len(reduced_json['model']['vocab'])} entries, {len(reduced_json['model']['merges'])} merges")


if __name__ == "__main__":
    main()
