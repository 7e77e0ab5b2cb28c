#!/usr/bin/env python3
"""Small symbol puzzles of three kinds, after the idea of HELM's synthetic reasoning scenario.

A *rule* is a row of variables (X, Y, Z) and signs (+ - * =). Putting words for the variables gives a *result*.

    pattern_match          several rules and one result   ->  the rule that gives the result
    variable_substitution  a rule and words               ->  the result
    induction              two results of one rule        ->  the rule

Every task has exactly one right answer. In pattern_match no other listed rule can give the result, whatever words one
puts. In induction the variables are named X, Y, Z in the order in which they appear; two places hold the same
variable exactly when they hold the same word in both results.

A task is asked in one of two forms: as text to be continued (ending in "Answer:"), or as a conversation. Either may
show up to three solved tasks of the same kind first.

Run as a script, this writes the held-out tasks and their answers:

    python tasks.py --out ..       # ../tasks.jsonl, ../answers.jsonl
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

KINDS = ("pattern_match", "variable_substitution", "induction")
VARIABLES = ("X", "Y", "Z")
SIGNS = ("+", "-", "*", "=")
WORDS = ("otter", "heron", "lynx", "badger", "falcon", "bison", "gecko", "moose", "raven", "camel", "tiger", "squid",
         "lemon", "cherry", "plum", "mango", "fig", "papaya", "olive", "lime", "date", "melon", "quince", "guava")

HELD_OUT_SEED = 20240917
HELD_OUT_PER_KIND = 120

# How a task may be worded; {…} are its parts. The first wording of each kind is the shortest.
WORDINGS = {
    "pattern_match": (
        "Rules: {rules}\nResult: {result}",
        "Which rule gives the result?\nRules: {rules}\nResult: {result}",
    ),
    "variable_substitution": (
        "Rule: {rule}\nReplace: {words}",
        "What does the rule give?\nRule: {rule}\nReplace: {words}",
    ),
    "induction": (
        "Results: {results}",
        "Which rule gives both results?\nResults: {results}",
    ),
}
SYSTEM_MESSAGES = ("You solve small puzzles.", "Answer with one line and nothing else.")


@dataclass(frozen=True)
class Task:
    kind: str
    question: str
    answer: str
    key: tuple  # the task itself, whatever its wording and the order of its parts


@dataclass(frozen=True)
class Prompt:
    """One task as it is asked, after `shown` solved ones."""
    chat: bool
    shown: tuple[Task, ...]
    task: Task
    system: str | None = None  # only with chat

    def text(self) -> str:
        assert not self.chat
        return "".join(text for text, _ in self.pieces()[:-1])

    def messages(self) -> list[dict]:
        assert self.chat
        out = [{"role": "system", "content": self.system}] if self.system else []
        for t in self.shown:
            out += [{"role": "user", "content": t.question}, {"role": "assistant", "content": t.answer}]
        return out + [{"role": "user", "content": self.task.question}]

    def pieces(self) -> list[tuple[str, bool]]:
        """The prompt and its answer as (text, is answer). The text of a conversation is what chat_template.jinja
        makes of messages(); bos is not part of it, eos is."""
        out = []
        if self.chat:
            head = f"<|system|>\n{self.system}\n" if self.system else ""
            for t in (*self.shown, self.task):
                out += [(f"{head}<|user|>\n{t.question}\n<|assistant|>\n", False), (f"{t.answer}</s>", True)]
                head = "\n"
        else:
            head = ""
            for t in (*self.shown, self.task):
                out += [(f"{head}{t.question}\nAnswer:", False), (f" {t.answer}", True)]
                head = "\n\n"
            out[-1] = (out[-1][0] + "</s>", True)
        return out


# ---- rules -----------------------------------------------------------------------------------------------------------

def random_rule(rng: random.Random) -> list[str]:
    rule = rng.choices(VARIABLES, k=rng.randint(2, 4)) + rng.choices(SIGNS, k=rng.randint(1, 3))
    rng.shuffle(rule)
    return rule


def variables_of(rule: list[str]) -> list[str]:
    return sorted(set(rule) & set(VARIABLES))


def substitute(rule: list[str], words: dict[str, list[str]]) -> list[str]:
    return [w for part in rule for w in words.get(part, [part])]


def can_give(rule: list[str], result: list[str], most_words: int = 2) -> bool:
    """Whether some words, one or two per variable, turn the rule into the result."""
    def match(i, j, words):
        if i == len(rule):
            return j == len(result)
        part = rule[i]
        if part in SIGNS:
            return j < len(result) and result[j] == part and match(i + 1, j + 1, words)
        if part in words:
            w = words[part]
            return result[j:j + len(w)] == w and match(i + 1, j + len(w), words)
        for n in range(1, most_words + 1):
            w = result[j:j + n]
            if len(w) == n and not set(w) & set(SIGNS) and match(i + 1, j + n, words | {part: w}):
                return True
        return False

    return match(0, 0, {})


# ---- tasks -----------------------------------------------------------------------------------------------------------

def pattern_match(rng: random.Random) -> Task:
    rule = random_rule(rng)
    result = substitute(rule, {v: rng.choices(WORDS, k=rng.randint(1, 2)) for v in variables_of(rule)})
    rules, wanted = [rule], rng.randint(2, 4)
    for _ in range(12):
        if len(rules) == wanted:
            break
        other = rule[:]
        if rng.random() < 0.3:  # near misses: another variable or another sign in one place
            at = rng.randrange(len(other))
            other[at] = rng.choice(VARIABLES if other[at] in VARIABLES else SIGNS)
        else:
            rng.shuffle(other)
        if other not in rules and not can_give(other, result):
            rules.append(other)
    if len(rules) == 1:
        return pattern_match(rng)
    rng.shuffle(rules)
    shown, result = [" ".join(r) for r in rules], " ".join(result)
    question = rng.choice(WORDINGS["pattern_match"]).format(rules=" | ".join(shown), result=result)
    return Task("pattern_match", question, " ".join(rule), ("pattern_match", *sorted(shown), result))


def variable_substitution(rng: random.Random) -> Task:
    rule = random_rule(rng)
    words = {v: rng.choices(WORDS, k=rng.randint(1, 2)) for v in variables_of(rule)}
    listed = [f"{v} by {' '.join(w)}" for v, w in words.items()]
    rng.shuffle(listed)
    question = rng.choice(WORDINGS["variable_substitution"]).format(rule=" ".join(rule), words=", ".join(listed))
    return Task("variable_substitution", question, " ".join(substitute(rule, words)),
                ("variable_substitution", " ".join(rule), *sorted(listed)))


def induction(rng: random.Random) -> Task:
    rule = random_rule(rng)
    first, second = ([substitute(rule, words) for words in
                      ({v: [rng.choice(WORDS)] for v in variables_of(rule)} for _ in range(2))])
    name, answer = {}, []
    for a, b in zip(first, second):
        answer.append(a if a in SIGNS else name.setdefault((a, b), VARIABLES[len(name)] if len(name) < 3 else "?"))
    results = [" ".join(first), " ".join(second)]
    question = rng.choice(WORDINGS["induction"]).format(results=" | ".join(results))
    return Task("induction", question, " ".join(answer), ("induction", *sorted(results)))


MAKE = {"pattern_match": pattern_match, "variable_substitution": variable_substitution, "induction": induction}


def random_task(rng: random.Random, kind: str, excluded: frozenset = frozenset()) -> Task:
    """A task of this kind that is not one of the excluded."""
    while True:
        task = MAKE[kind](rng)
        if task.key not in excluded:
            return task


def random_prompt(rng: random.Random, task: Task, excluded: frozenset = frozenset()) -> Prompt:
    n = rng.choices((0, 1, 2, 3), weights=(12, 4, 2, 1))[0]
    shown = tuple(random_task(rng, task.kind, excluded) for _ in range(n))
    if rng.random() < 0.5:
        return Prompt(False, shown, task)
    return Prompt(True, shown, task, rng.choice((None, *SYSTEM_MESSAGES)))


def held_out() -> list[tuple[str, Prompt]]:
    """(custom_id, prompt) of the tasks that no model is trained on, always the same, kinds mixed."""
    rng, seen, tasks = random.Random(HELD_OUT_SEED), set(), []
    for kind in KINDS:
        for n in range(1, HELD_OUT_PER_KIND + 1):
            task = random_task(rng, kind, frozenset(seen))
            seen.add(task.key)
            tasks.append((f"{kind}-{n:04}", task))
    out = [(name, random_prompt(rng, task, frozenset(seen))) for name, task in tasks]
    rng.shuffle(out)
    return out


# ---- files -----------------------------------------------------------------------------------------------------------

def request_line(custom_id: str, prompt: Prompt) -> dict:
    """A line of an OpenAI Batch input file."""
    url, asked = (("/v1/chat/completions", {"messages": prompt.messages()}) if prompt.chat
                  else ("/v1/completions", {"prompt": prompt.text()}))
    body = {"model": "fulmen-tiny", **asked, "max_tokens": 64, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent)
    out = parser.parse_args().out
    prompts = held_out()
    with open(out / "tasks.jsonl", "w") as tasks, open(out / "answers.jsonl", "w") as answers:
        for custom_id, p in prompts:
            tasks.write(json.dumps(request_line(custom_id, p)) + "\n")
            answers.write(json.dumps({"custom_id": custom_id, "kind": p.task.kind, "answer": p.task.answer}) + "\n")
    print(f"{len(prompts)} tasks, {sum(p.chat for _, p in prompts)} as conversations")


if __name__ == "__main__":
    main()
