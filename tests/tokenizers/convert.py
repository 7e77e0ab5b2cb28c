#!/usr/bin/env python3
"""Write the tokenizer.json of a model whose tokenizer is published in another form. Standard library only.

    python3 convert.py qwen3      DATA OUT    vocab.json, merges.txt, added_tokens.json
    python3 convert.py dbrx       DATA OUT    cl100k_base.tiktoken
    python3 convert.py gpt_oss    DATA OUT    o200k_base.tiktoken
    python3 convert.py mixtral_v3 DATA OUT    a SentencePiece model with control pieces (Mixtral-8x22B-Instruct)

DATA is the folder of public files that the tests name FULMEN_DATA; OUT is the file to write. Tests compare what comes out with
ids that the originals gave.
"""

import base64
import json
import struct
import sys
from pathlib import Path

# OpenAI's tiktoken, tiktoken_ext/openai_public.py; Qwen's from its tokenizer.json.
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
          r"|\s+(?!\S)|\s")
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
         r"|\s+")
DBRX_SPECIAL = {
    "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276, "<|pad|>": 100277, "<|im_start|>": 100278, "<|im_end|>": 100279,
}
GPT_OSS_SPECIAL = {
    "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003,
    "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}


def added(special: dict[str, int]) -> list[dict]:
    return [{"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for text, id in sorted(special.items(), key=lambda entry: entry[1])]


def byte_level(regex: str, normalizer, vocab: dict[str, int], merges: list, special: dict[str, int], ranked: bool):
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added(special), "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ranked,
                  "vocab": vocab, "merges": merges},
    }


def byte_alphabet() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def splits(piece, ids: dict) -> list:
    """Every pair of pieces that this one can be merged of, the earliest first."""
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    return sorted((pair for pair in pairs if pair[0] in ids and pair[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]]))


def from_ranks(path: Path, regex: str, special: dict[str, int]):
    ranks = {}
    for line in path.read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    alphabet = byte_alphabet()

    def spelt(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.get)
    merges = [[spelt(left), spelt(right)] for token in ordered for left, right in splits(token, ranks)]
    vocab = {spelt(token): ranks[token] for token in ordered}
    return byte_level(regex, None, vocab | special, merges, special, ranked=True)


def qwen3(data: Path):
    folder = data / "qwen3_moe"
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = json.loads((folder / "added_tokens.json").read_text())
    return byte_level(QWEN2, {"type": "NFC"}, vocab, merges, special, ranked=False)


def fields(message: bytes):
    """Number and value of each field of a protobuf message: varints, fixed 32 bits, and bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        elif kind == 1:
            value, at = message[at:at + 8], at + 8
        elif kind == 2:
            length = varint()
            value, at = message[at:at + length], at + length
        else:
            value, at = message[at:at + 4], at + 4
        yield key >> 3, value


def mixtral_v3(data: Path):
    """Without the dummy prefix: the template writes the spaces."""
    model = (data / "mixtral/mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    unknown, control = 2, 3
    pieces = []
    for number, value in fields(model):
        if number == 1:  # a piece: text, score, type
            piece = dict(fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, 1)))
    vocab = {text: id for id, (text, _, _) in enumerate(pieces)}
    special = {text: id for id, (text, _, kind) in enumerate(pieces) if kind in (unknown, control)}
    normal = [text for text, _, kind in pieces if kind == 1]
    ids = {text: vocab[text] for text in normal}
    ordered = sorted(normal, key=lambda text: (-pieces[vocab[text]][1], vocab[text]))
    merges = [list(pair) for text in ordered for pair in splits(text, ids)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added(special),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges},
    }


def main():
    name, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    document = {
        "qwen3": lambda: qwen3(data),
        "dbrx": lambda: from_ranks(data / "cl100k/cl100k_base.tiktoken", CL100K, DBRX_SPECIAL),
        "gpt_oss": lambda: from_ranks(data / "gpt_oss/o200k_base.tiktoken", O200K, GPT_OSS_SPECIAL),
        "mixtral_v3": lambda: mixtral_v3(data),
    }[name]()
    out.write_text(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
