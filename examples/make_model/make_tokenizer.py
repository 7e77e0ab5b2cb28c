#!/usr/bin/env python3
"""Make the tokenizer of the example model: a byte-level BPE learnt from the tasks.

    python make_tokenizer.py       # ../model/{tokenizer,tokenizer_config,special_tokens_map}.json

All 256 bytes are in the vocabulary, so any text can be encoded and decoded again. The chat template is
../model/chat_template.jinja, written by hand; tokenizer_config.json holds a copy of it, as is usual.
"""

import argparse
import json
import random
from pathlib import Path

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tasks

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
MOST_ENTRIES = 480  # the words of the tasks are whole tokens before that is reached
CONTEXT = 1024


def render_chat(template: str, messages: list[dict], add_generation_prompt: bool = True) -> str:
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return env.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>",
        raise_exception=raise_exception)


def train() -> Tokenizer:
    rng = random.Random(7)
    prompts = (tasks.random_prompt(rng, tasks.random_task(rng, rng.choice(tasks.KINDS))) for _ in range(20000))
    corpus = [p.text() if not p.chat else "\n".join(m["content"] for m in p.messages()) for p in prompts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([*corpus, *tasks.SYSTEM_MESSAGES * 500], trainers.BpeTrainer(
        vocab_size=MOST_ENTRIES, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    bos = SPECIAL.index("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)])
    return tokenizer


def check(tokenizer: Tokenizer, template: str):
    """Any text survives a round trip, and a prompt cut into pieces has the ids of the whole."""
    texts = ["", " ", "a  b\n\n c\t", "Größe 🙂 日本語 \u0000 \U0010ffff", "don't can't  'll", "X+Y = 3.14159", "\r\n\r\n"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text, text
    longest = shortest = None
    for _, p in tasks.held_out():
        pieces = p.pieces()
        whole = (render_chat(template, p.messages()) if p.chat else "<s>" + p.text()) + pieces[-1][0]
        parts = [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in pieces]
        assert tokenizer.encode(whole, add_special_tokens=False).ids == [1] + sum(parts, []), whole
        assert tokenizer.decode(parts[-1]).strip() == p.task.answer
        n = 1 + sum(map(len, parts[:-1]))
        longest, shortest = max(longest or n, n), min(shortest or n, n)
    print(f"{tokenizer.get_vocab_size()} entries; held-out prompts of {shortest} to {longest} tokens")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "model")
    out = parser.parse_args().out
    template = (out / "chat_template.jinja").read_text()
    tokenizer = train()
    check(tokenizer, template)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    added = {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                      "special": True} for i, t in enumerate(SPECIAL)}
    config = {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, **names,
              "additional_special_tokens": list(SPECIAL[3:]), "chat_template": template,
              "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(
        json.dumps({**names, "additional_special_tokens": list(SPECIAL[3:])}, indent=2) + "\n")


if __name__ == "__main__":
    main()
