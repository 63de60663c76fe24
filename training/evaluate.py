"""Held-out items, and decoding them in large packed batches to score them."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from tokenizers import Tokenizer

from training.batches import Template
from training.model import Net
from training.tasks import EVAL_LEVELS, MAKERS, draw, needle_eval, number_eval, score
from training.tokenizer import EOS, EOT, MASK


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out item; ``task`` carries the record count for lookups (``needle-16``)."""

    task: str
    prompt: str
    answer: str
    gen_length: int


def questions(tokenizer: Tokenizer, count: int, seed: int = 20240) -> list[Question]:
    """Draw ``count`` held-out items a task; the window of a task is its longest answer, in blocks
    of 32.
    """
    found: list[Question] = []
    names = (
        [t for t in MAKERS if t not in ("chat", "needle")]
        + [f"needle-{n}" for n in EVAL_LEVELS]
        + ["needle-id8"]
    )
    for name in names:
        rng = random.Random(f"{seed}-{name}")
        kind, _, level = name.partition("-")
        maker = MAKERS[kind]
        if kind == "needle":
            maker = number_eval if level.startswith("id") else needle_eval
        items = [draw(maker, rng, int(level.removeprefix("id") or 0), True) for _ in range(count)]
        longest = max(len(tokenizer.encode(item.answer).ids) for item in items) + 1
        window = -(-longest // 32) * 32
        found += [Question(name, item.prompt, item.answer, window) for item in items]
    return found


@dataclass(frozen=True, slots=True)
class Setting:
    """How to decode: block length, tokens a step, and the confidence from which tokens are
    committed at once.
    """

    block: int = 32
    tokens: int = 1
    threshold: float = 0.0


def _fill_block(
    net: Net, rows: list[list[int]], heads: list[int], begin: int, size: int, setting: Setting
) -> int:
    """Decode one block of every row in place; returns the number of network calls."""
    device = net.embed.device
    edges = [0, *accumulate(len(row) for row in rows)]
    ids = torch.tensor([token for row in rows for token in row], device=device)
    place = torch.tensor([p for row in rows for p in range(len(row))], device=device)
    starts = torch.tensor(edges, device=device, dtype=torch.int32)
    firsts = torch.tensor(
        [edge + head + begin for edge, head in zip(edges, heads, strict=False)], device=device
    )
    block = firsts[:, None] + torch.arange(size, device=device)
    widest, calls = max(len(row) for row in rows), 0
    while True:
        masked = ids[block] == MASK
        if not bool(masked.any()):
            break
        calls += 1
        h = net.hidden(ids, place, starts, widest, False, False)
        logits = net.logits(h[block.flatten() - 1])
        logits[:, MASK] = -torch.inf
        best, guess = logits.softmax(-1).view(*block.shape, -1).max(-1)
        best = best.masked_fill(~masked, -1.0)
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = masked & (rank < setting.tokens)
        if setting.threshold > 0:
            chosen = masked & ((rank < 1) | (best > setting.threshold))
        ids[block[chosen]] = guess[chosen]
    done = ids.tolist()
    for k, row in enumerate(rows):
        row[:] = done[edges[k] : edges[k + 1]]
    return calls


@torch.no_grad()
def decode(
    net: Net, prompts: list[list[int]], window: int, setting: Setting
) -> tuple[list[list[int]], float]:
    """Decode a batch of equal windows; returns the windows and the mean number of network calls an
    item used.

    Calls are counted a batch: with a threshold, an item waits for the slowest of its batch.
    """
    rows = [prompt + [MASK] * window for prompt in prompts]
    active, calls = list(range(len(rows))), 0
    for begin in range(0, window, setting.block):
        size = min(setting.block, window - begin)
        part = [rows[k] for k in active]
        calls += len(part) * _fill_block(
            net, part, [len(prompts[k]) for k in active], begin, size, setting
        )
        # A finished answer needs no further blocks: the rest is fill.
        active = [
            k for k in active if not {EOT, EOS} & set(rows[k][len(prompts[k]) + begin :][:size])
        ]
        if not active:
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)], calls / len(
        rows
    )


def cut(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of a window up to the end of the turn."""
    stop = next((k for k, token in enumerate(ids) if token in (EOT, EOS, MASK)), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=False)


@torch.no_grad()
def evaluate(
    net: Net, tokenizer: Tokenizer, items: list[Question], setting: Setting, chunk: int = 120_000
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Score items; returns accuracy and mean calls a task, and a few wrong answers for the log."""
    template = Template(tokenizer)
    prompts = [template.prompt([("user", tokenizer.encode(item.prompt).ids)]) for item in items]
    right: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    wrong: list[str] = []
    order = sorted(range(len(items)), key=lambda k: (items[k].task, k))
    while order:
        part: list[int] = []
        size = 0
        while order and size < chunk and (not part or items[order[0]].task == items[part[0]].task):
            part.append(order.pop(0))
            size += len(prompts[part[-1]]) + items[part[-1]].gen_length
        windows, mean = decode(net, [prompts[k] for k in part], items[part[0]].gen_length, setting)
        for k, ids in zip(part, windows, strict=True):
            item, text = items[k], cut(ids, tokenizer)
            ok = score(item.task, item.prompt, item.answer, text)
            right[item.task] += ok
            calls[item.task] += mean
            count[item.task] += 1
            if not ok and sum(w.startswith(item.task) for w in wrong) < 2:
                wrong.append(
                    f"{item.task}: {item.prompt[-90:]!r} -> {text!r} (want {item.answer!r})"
                )
    return {t: right[t] / count[t] for t in count}, {t: calls[t] / count[t] for t in count}, wrong


@torch.no_grad()
def teacher_forced(net: Net, tokenizer: Tokenizer, items: list[Question]) -> dict[str, float]:
    """Exact match of causal greedy decoding: it is right just when every next token is right given
    the answer.
    """
    template = Template(tokenizer)
    device = net.embed.device
    right: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    for task in dict.fromkeys(item.task for item in items):
        edges: list[int] = [0]
        flat: list[int] = []
        pos: list[int] = []
        spans: list[tuple[int, int]] = []
        for item in (i for i in items if i.task == task):
            prompt = template.prompt([("user", tokenizer.encode(item.prompt).ids)])
            answer = [*tokenizer.encode(item.answer).ids, EOT]
            spans.append((edges[-1] + len(prompt), edges[-1] + len(prompt) + len(answer)))
            flat += prompt + answer
            pos += range(len(prompt) + len(answer))
            edges.append(len(flat))
        ids, starts = (
            torch.tensor(flat, device=device),
            torch.tensor(edges, device=device, dtype=torch.int32),
        )
        widest = max(b - a for a, b in pairwise(edges))
        h = net.hidden(ids, torch.tensor(pos, device=device), starts, widest, True, False)
        rows = torch.cat([torch.arange(a, b) for a, b in spans]).to(device)
        hit = (net.logits(h[rows - 1]).argmax(-1) == ids[rows]).tolist()
        at = 0
        for a, b in spans:
            right[task] += all(hit[at : at + b - a])
            count[task] += 1
            at += b - a
    return {t: right[t] / count[t] for t in count}
