#!/usr/bin/env python3
"""Train the example model and write it as a Hugging Face folder; then judge it with transformers.

    python make_tokenizer.py && python tasks.py      # first: tokenizer, held-out tasks
    python train.py                                  # ../model/{config.json, model-*.safetensors, ...}

The model is a MixtralForCausalLM. Training uses a compact module of its own that computes every expert for every
token, which on a GPU is faster than choosing at this size; the weights are written under the published names, and the
final figures come from transformers' MixtralForCausalLM, in f32, loaded from the written folder.

The loss is taken on the answers alone (those of the solved tasks shown first included) plus a router balance loss, so
that every expert is used. No held-out task is trained on: the generator rejects them, and the tasks that reach a batch
are checked against them once more.
"""

import argparse
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

import tasks
from make_tokenizer import CONTEXT, render_chat

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the data workers are parallel already

PAD, BOS, EOS = 0, 1, 2
LEAST_EXPERT_SHARE = 0.02
LEAST_ACCURACY = 0.98  # on at least two kinds


@dataclass(frozen=True)
class Shape:
    vocab: int
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 192
    experts: int = 8
    top_k: int = 2
    theta: float = 10000.0
    eps: float = 1e-5


# ---- the model -------------------------------------------------------------------------------------------------------

def rms_norm(x, gain, eps):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s

        def matrix(*shape, fan_in, scale=1.0):
            return nn.Parameter(torch.randn(*shape) * (scale / math.sqrt(fan_in)))

        d, q, kv = s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim
        out = 1 / math.sqrt(2 * s.layers)
        self.attn_norm, self.moe_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.q, self.k, self.v = matrix(q, d, fan_in=d), matrix(kv, d, fan_in=d), matrix(kv, d, fan_in=d)
        self.o = matrix(d, q, fan_in=q, scale=out)
        self.gate = matrix(s.experts, d, fan_in=d, scale=0.5)
        self.w1, self.w3 = matrix(s.experts * s.ffn, d, fan_in=d), matrix(s.experts * s.ffn, d, fan_in=d)
        self.w2 = matrix(s.experts * s.ffn, d, fan_in=s.ffn, scale=out)  # of each expert, transposed

    def attention(self, x, cos, sin):
        s, (b, t, _) = self.s, x.shape

        def turn(v):
            v = v.float()
            a, b = v.chunk(2, -1)
            return v * cos + torch.cat((-b, a), -1) * sin

        q = turn(F.linear(x, self.q).view(b, t, s.heads, s.head_dim).transpose(1, 2))
        k = turn(F.linear(x, self.k).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2))
        v = F.linear(x, self.v).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        group = s.heads // s.kv_heads
        k, v = k.to(v.dtype).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        # Padding is at the end, so the causal mask hides it from every real token.
        a = F.scaled_dot_product_attention(q.to(v.dtype), k, v, is_causal=True)
        return F.linear(a.transpose(1, 2).reshape(b, t, -1), self.o)

    def moe(self, x, real):
        s, n = self.s, x.shape[0] * x.shape[1]
        x = x.reshape(n, -1)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.gate).softmax(-1)
        chosen, index = p.topk(s.top_k, -1)
        share = torch.zeros_like(p).scatter(-1, index, chosen / chosen.sum(-1, keepdim=True))
        inner = F.silu(F.linear(x, self.w1)) * F.linear(x, self.w3)
        inner = (inner.view(n, s.experts, s.ffn) * share[..., None].to(inner.dtype)).view(n, -1)
        # Load balance as in the Switch Transformer, over real tokens: 1 when all experts are used alike.
        m = real.reshape(n, 1).float()
        used = ((share > 0) * m).sum(0) / (m.sum() * s.top_k)
        balance = s.experts * (used * (p * m).sum(0) / m.sum()).sum()
        return inner @ self.w2.to(inner.dtype), balance

    def forward(self, x, cos, sin, real):
        x = x + self.attention(rms_norm(x, self.attn_norm, self.s.eps), cos, sin)
        m, balance = self.moe(rms_norm(x, self.moe_norm, self.s.eps), real)
        return x + m.view_as(x), balance


class Model(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.1)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        self.head = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.02)

    def forward(self, ids):
        """ids [B, T] -> final hidden states [B, T, D] (before the head), balance loss."""
        s = self.s
        freq = s.theta ** (-torch.arange(0, s.head_dim, 2, device=ids.device).float() / s.head_dim)
        angle = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * freq
        cos, sin = (torch.cat((f, f), -1) for f in (angle.cos(), angle.sin()))
        x, real, balance = self.embed[ids], ids != PAD, 0.0
        for layer in self.layers:
            x, b = layer(x, cos, sin, real)
            balance = balance + b
        return rms_norm(x, self.norm, s.eps), balance

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], most: int = 24) -> list[list[int]]:
        """Greedy answers without eos, by full recomputation; a second opinion on transformers' generate."""
        rows, done = [p[:] for p in prompts], [False] * len(prompts)
        for _ in range(most):
            ids = torch.tensor([r + [PAD] * (max(map(len, rows)) - len(r)) for r in rows], device=self.head.device)
            last = torch.tensor([len(r) - 1 for r in rows], device=self.head.device)
            h, _ = self(ids)
            best = F.linear(h[torch.arange(len(rows)), last], self.head).argmax(-1).tolist()
            for i, token in enumerate(best):
                done[i] = done[i] or token == EOS
                if not done[i]:
                    rows[i].append(token)
            if all(done):
                break
        return [r[len(p):] for r, p in zip(rows, prompts)]


# ---- data ------------------------------------------------------------------------------------------------------------

class Batches(torch.utils.data.IterableDataset):
    """Endless batches (ids, is_answer, sequences, held-out tasks met) of about `tokens` tokens, of like lengths."""

    def __init__(self, tokenizer_path: Path, tokens: int, seed: int):
        self.tokenizer_path, self.tokens, self.seed = tokenizer_path, tokens, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        held_out = frozenset(p.task.key for _, p in tasks.held_out())
        while True:
            rows, leaks = [], []
            pieces, owners = [], []
            for n in range(8192):
                # The harder kinds more often.
                kind = rng.choices(tasks.KINDS, weights=(4, 3, 2))[0]
                prompt = tasks.random_prompt(rng, tasks.random_task(rng, kind, held_out), held_out)
                leaks.append(sum(t.key in held_out for t in (*prompt.shown, prompt.task)))
                for text, is_answer in prompt.pieces():
                    pieces.append(text)
                    owners.append((n, is_answer))
                rows.append(([BOS], [0]))
            for e, (n, is_answer) in zip(tokenizer.encode_batch_fast(pieces, add_special_tokens=False), owners):
                rows[n][0].extend(e.ids)
                rows[n][1].extend([int(is_answer)] * len(e.ids))
            order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))
            batches, start = [], 0
            while start < len(order):
                stop, widest = start, 0
                while stop < len(order):
                    width = -(-len(rows[order[stop]][0]) // 8) * 8
                    if stop > start and width * (stop + 1 - start) > self.tokens:
                        break
                    widest, stop = width, stop + 1
                batches.append((order[start:stop], widest))
                start = stop
            rng.shuffle(batches)
            for members, width in batches:
                ids = np.full((len(members), width), PAD, np.int64)
                answer = np.zeros((len(members), width), bool)
                for i, n in enumerate(members):
                    ids[i, :len(rows[n][0])], answer[i, :len(rows[n][1])] = rows[n]
                yield torch.from_numpy(ids), torch.from_numpy(answer), len(members), sum(leaks[n] for n in members)


# ---- training --------------------------------------------------------------------------------------------------------

def train(s: Shape, args, device: str) -> Model:
    torch.manual_seed(args.seed)
    model = Model(s).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98), fused=device == "cuda")
    loader = torch.utils.data.DataLoader(
        Batches(args.out / "tokenizer.json", args.batch_tokens, args.seed), batch_size=None,
        num_workers=args.workers, prefetch_factor=8, pin_memory=device == "cuda")
    begin, sequences, leaks, window = time.time(), 0, 0, []
    for step, (ids, answer, count, leaked) in enumerate(loader):
        done = (time.time() - begin) / (60 * args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 300)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        ids, answer = ids.to(device, non_blocking=True), answer.to(device, non_blocking=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            h, balance = model(ids)
            wanted = answer[:, 1:]
            logits = F.linear(h[:, :-1][wanted], model.head).float()
        target = ids[:, 1:][wanted]
        loss = F.cross_entropy(logits, target)
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        sequences, leaks = sequences + count, leaks + leaked
        if step % args.log_every == 0:
            right = (logits.argmax(-1) == target).float().mean().item()
            print(f"step {step:6} {time.time() - begin:6.1f} s  {sequences:9} sequences  loss {loss.item():.4f}  "
                  f"answer tokens right {right:.4f}  balance {balance.item() / s.layers:.4f}", flush=True)
    print(f"trained on {sequences} sequences in {step} steps, {leaks} held-out tasks among them", flush=True)
    assert leaks == 0
    return model


def export(model: Model, out: Path) -> None:
    """Weights in bf16 under the published names, in two shards, and the configuration."""
    s, tensors = model.s, {}

    def put(name, t):
        tensors[name] = t.detach().to(torch.bfloat16).cpu().contiguous()

    put("model.embed_tokens.weight", model.embed)
    for i, layer in enumerate(model.layers):
        p = f"model.layers.{i}"
        put(f"{p}.input_layernorm.weight", layer.attn_norm)
        for name in "qkvo":
            put(f"{p}.self_attn.{name}_proj.weight", getattr(layer, name))
        put(f"{p}.post_attention_layernorm.weight", layer.moe_norm)
        put(f"{p}.block_sparse_moe.gate.weight", layer.gate)
        for e in range(s.experts):
            rows = slice(e * s.ffn, (e + 1) * s.ffn)
            put(f"{p}.block_sparse_moe.experts.{e}.w1.weight", layer.w1[rows])
            put(f"{p}.block_sparse_moe.experts.{e}.w2.weight", layer.w2[rows].T)
            put(f"{p}.block_sparse_moe.experts.{e}.w3.weight", layer.w3[rows])
    put("model.norm.weight", model.norm)
    put("lm_head.weight", model.head)

    size = {name: t.numel() * 2 for name, t in tensors.items()}
    total, seen, shards = sum(size.values()), 0, ({}, {})
    for name, t in tensors.items():
        shards[seen * 2 >= total][name] = t
        seen += size[name]
    weight_map = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in shard}
    (out / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n")

    from transformers import GenerationConfig, MixtralConfig
    MixtralConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        num_local_experts=s.experts, num_experts_per_tok=s.top_k, rms_norm_eps=s.eps, max_position_embeddings=CONTEXT,
        sliding_window=None, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": s.theta}, dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(out)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(out)


# ---- judging ---------------------------------------------------------------------------------------------------------

def generate(model, prompts: list[list[int]], device: str, batch: int = 120) -> list[list[int]]:
    """Greedy answers by transformers, without eos."""
    order, out = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[PAD] * (width - len(prompts[i])) + prompts[i] for i in part], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=device)
        made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64)[:, width:].tolist()
        for i, row in zip(part, made):
            out[i] = row[:row.index(EOS)] if EOS in row else row
    return out


@torch.no_grad()
def judge(own: Model, out: Path, device: str) -> dict:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def load(**changes):
        config = AutoConfig.from_pretrained(out)
        for name, value in changes.items():
            setattr(config, name, value)
        return AutoModelForCausalLM.from_pretrained(
            out, config=config, dtype=torch.float32, attn_implementation="eager",
            experts_implementation="eager").to(device).eval()

    tokenizer, theirs = Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)
    template = (out / "chat_template.jinja").read_text()
    held_out = [p for _, p in tasks.held_out()]
    prompts, differing = [], 0
    for p in held_out:
        if p.chat:
            text = theirs.apply_chat_template(p.messages(), tokenize=False, add_generation_prompt=True)
            assert text == render_chat(template, p.messages())
            prompts.append(tokenizer.encode(text, add_special_tokens=False).ids)
            differing += theirs(text, add_special_tokens=False)["input_ids"] != prompts[-1]
        else:
            prompts.append(tokenizer.encode(p.text()).ids)
            differing += theirs(p.text())["input_ids"] != prompts[-1]
    print(f"prompts that AutoTokenizer encodes otherwise: {differing}")

    def accuracy(answers):
        right = Counter()
        for p, ids in zip(held_out, answers):
            right[p.task.kind, p.chat] += tokenizer.decode(ids).strip() == p.task.answer
        asked = Counter((p.task.kind, p.chat) for p in held_out)
        per_kind = {k: round(sum(right[k, c] for c in (False, True)) / tasks.HELD_OUT_PER_KIND, 4) for k in tasks.KINDS}
        forms = {form: round(sum(right[k, c] for k in tasks.KINDS) / sum(asked[k, c] for k in tasks.KINDS), 4)
                 for form, c in (("completion", False), ("chat", True))}
        return per_kind | forms

    model = load()
    answers = generate(model, prompts, device)
    report = {"parameters": sum(p.numel() for p in model.parameters()), "accuracy": accuracy(answers),
              "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
              "answer_tokens": [min(map(len, answers)), max(map(len, answers))]}
    for p, ids in zip(held_out, answers):
        if tokenizer.decode(ids).strip() != p.task.answer:
            print(f"wrong: {p.task.question!r} -> {tokenizer.decode(ids)!r}, right is {p.task.answer!r}")

    # The module that was trained, from the rounded weights, in f32, must say the same.
    for p in own.parameters():
        p.copy_(p.to(torch.bfloat16).float())
    second = [a for start in range(0, len(prompts), 120) for a in own.greedy(prompts[start:start + 120])]
    report["same_answers_as_training_module"] = round(sum(a == b for a, b in zip(answers, second)) / len(answers), 4)

    # How often each expert is chosen, and the closest calls.
    used, margins = torch.zeros(own.s.layers, own.s.experts), []
    for prompt, answer in zip(prompts, answers):
        o = model(torch.tensor([prompt + answer], device=device), output_router_logits=True, use_cache=False)
        for i, r in enumerate(o.router_logits):
            used[i] += F.one_hot(r.topk(own.s.top_k, -1).indices, own.s.experts).sum((0, 1)).cpu()
        top = o.logits[0, len(prompt) - 1:].topk(2, -1).values
        margins += (top[:, 0] - top[:, 1]).tolist()
    share = used / used.sum(-1, keepdim=True)
    report["expert_share"] = [[round(x, 3) for x in row] for row in share.tolist()]
    report["least_logit_margin"] = round(min(margins), 4)
    report["margin_percentile_1"] = round(float(np.percentile(margins, 1)), 3)

    # A model that still answers right when computed wrongly would test nothing.
    report["accuracy_if_wrong"] = {
        "one expert instead of two": accuracy(generate(load(num_experts_per_tok=1), prompts, device)),
        "rope theta 1e6": accuracy(generate(load(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
                                            prompts, device)),
    }
    wrong = load()
    for layer in wrong.model.layers:
        for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            proj.weight.copy_(proj.weight.roll(own.s.head_dim, 0))
    report["accuracy_if_wrong"]["kv heads exchanged"] = accuracy(generate(wrong, prompts, device))
    wrong = load()
    for layer in wrong.model.layers:
        layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(1, 0))
    report["accuracy_if_wrong"]["experts off by one"] = accuracy(generate(wrong, prompts, device))
    return report


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "model")
    parser.add_argument("--minutes", type=float, default=4.8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--no-assert", action="store_true", help="a short run need not reach the targets")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(vocab=Tokenizer.from_file(str(args.out / "tokenizer.json")).get_vocab_size())
    model = train(shape, args, device)
    export(model, args.out)
    report = judge(model, args.out, device)
    print(json.dumps(report, indent=1), flush=True)
    if not args.no_assert:
        assert min(map(min, report["expert_share"])) >= LEAST_EXPERT_SHARE
        assert sum(report["accuracy"][k] >= LEAST_ACCURACY for k in tasks.KINDS) >= 2


if __name__ == "__main__":
    main()
