"""The speed of quality presets on a large model, at the embedded model's pace of writing.

    python -m benchmarks.replay --record benchmarks/patterns.json     # on any machine, minutes
    python -m benchmarks.replay --patterns benchmarks/patterns.json   # LLaDA-8B shapes, a GPU

Random weights are never sure of a token, so they say nothing about how many tokens a forward
writes. The first command answers held-out items with the embedded model and records, for every
block, how many positions each forward wrote. The second lets requests with random weights write
just as many, block by block, with the presets' caches: all costs are real, and the pace is
measured. Since a preset's real rule is not known beforehand, the host waits for every step.

Prints a table and one JSON line: answer tokens per second, median of the runs after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request
from dllmserve.presets import PRESETS
from dllmserve.tools.bench.workload import prompt_vocabulary
from dllmserve.tools.evaluation.items import held_out, select

PROMPT, GEN, BLOCK = 256, 128, 32
#: tokens of an answer that are timed where nothing is cached
PART = 12
Pattern = tuple[int, ...]
#: written one token a forward, without a preset: the baselines
ONE_BY_ONE: Pattern = (1,) * BLOCK
#: about what Fast-dLLM reports for LLaDA-8B at threshold 0.9 (arXiv 2505.22618): 3 to 5
FOUR_AT_ONCE: Pattern = (4,) * (BLOCK // 4)


class Recorder:
    """Follows the masks of every row, from plan to plan."""

    def __init__(self) -> None:
        self.patterns: list[Pattern] = []
        self._open: dict[int, tuple[int, list[int]]] = {}  # row -> block start, masks

    def __call__(self, plan: StepPlan) -> None:
        """Take a launched plan."""
        for entry in plan.entries:
            row, start, masks = entry.span.row, entry.span.blk_start, entry.masks
            known = self._open.get(row)
            if known is not None and known[0] == start and masks < known[1][-1]:
                known[1].append(masks)
                continue
            self._close(row)
            self._open[row] = (start, [masks])

    def finish(self) -> list[Pattern]:
        """All patterns of full blocks."""
        for row in list(self._open):
            self._close(row)
        return [p for p in self.patterns if sum(p) == BLOCK]

    def _close(self, row: int) -> None:
        if row in self._open:
            left = [*self._open.pop(row)[1], 0]  # the last forward wrote all that was left
            self.patterns.append(tuple(a - b for a, b in pairwise(left)))


def record(path: Path, limit: int) -> None:
    """Answer held-out items with every preset but the exact one, and write their patterns."""
    llm = LLM("tiny", seed=0)
    items = select(held_out(), limit=limit)
    found: dict[str, Any] = {"items": len(items), "patterns": {}}
    for name in PRESETS:
        if name == "exact":
            continue
        recorder = Recorder()
        llm._engine.observers.append(recorder)
        params = [
            SamplingParams(temperature=0.0, gen_length=item.gen_length, quality=name)
            for item in items
        ]
        llm.chat([list(map(dict, item.messages)) for item in items], params, use_tqdm=False)
        llm._engine.observers.remove(recorder)
        patterns = recorder.finish()
        counts: dict[Pattern, int] = {}
        for pattern in patterns:
            counts[pattern] = counts.get(pattern, 0) + 1
        found["patterns"][name] = [[list(p), n] for p, n in sorted(counts.items())]
        mean = sum(map(len, patterns)) / len(patterns)
        print(f"{name}: {len(patterns)} blocks, {BLOCK / mean:.1f} tokens a forward")
    path.write_text(json.dumps(found) + "\n")


def speeds(llm: LLM, fields: dict[str, Any], patterns: list[Pattern], args: Any) -> list[float]:
    """Answer tokens per second for each number of requests."""
    draw, ids = random.Random(0), prompt_vocabulary(llm.spec)
    engine, found = llm._engine, []
    for count in args.requests:
        values = []
        for run in range(args.runs + 1):
            requests = []
            for _ in range(count):
                params = SamplingParams(temperature=0.0, gen_length=GEN, steps=GEN, **fields)
                request = engine.make_request(draw.choices(ids, k=PROMPT), params, None)
                request.quotas = tuple(draw.choice(patterns) for _ in request.blocks)
                requests.append(request)
            # one token a forward over the whole canvas takes minutes, and every forward costs
            # the same: a part of the answer is enough
            tokens = count * (PART if fields["cache"] == "none" else GEN)
            seconds = timed(llm, requests, tokens)
            if run:
                values.append(tokens / seconds)
        found.append(statistics.median(values))
    return found


def timed(llm: LLM, requests: list[Request], tokens: int) -> float:
    """Seconds until the requests have ``tokens`` tokens together; the rest is dropped."""
    engine, written = llm._engine, 0
    left = {request.id: GEN for request in requests}
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work and written < tokens:
        engine.step()
        for request in requests:
            progress = request.progress
            later = sum(request.blocks[progress.block + 1 :])
            now = 0 if request.launched else progress.masks_left + later
            written += left[request.id] - now
            left[request.id] = now
    seconds = time.perf_counter() - start
    for request in requests:
        engine.abort(request)
    return seconds


def cases(patterns: dict[str, list[Pattern]]) -> dict[str, tuple[dict[str, Any], list[Pattern]]]:
    """Name, fields of SamplingParams and patterns of everything that is measured."""

    def fields(quality: str) -> dict[str, Any]:
        kept = ("cache", "block_length", "suffix_window")
        return {k: v for k, v in PRESETS[quality].items() if k in kept} | {"ignore_eos": True}

    found = {
        "exact": (fields("exact"), [ONE_BY_ONE]),
        "exact steps, dual cache": ({**fields("exact"), "cache": "dual"}, [ONE_BY_ONE]),
    }
    for name, own in patterns.items():
        found[name] = (fields(name), own)
        found[f"{name}, 4 tokens a forward"] = (fields(name), [FOUR_AT_ONCE])
    return found


def measure(args: Any) -> None:
    """Replay all cases in one engine."""
    recorded = json.loads(Path(args.patterns).read_text())["patterns"]
    patterns = {
        name: [tuple(pattern) for pattern, count in found for _ in range(count)]
        for name, found in recorded.items()
    }
    shapes = {} if args.model == "tiny" else {"load_format": "dummy"}
    # the presets' rules cannot be foreseen: no step is launched ahead of a report
    llm = LLM(args.model, max_model_len=512, steps_per_sync=1, seed=0, **shapes)
    rows: dict[str, list[float]] = {}
    print(f"{'':34}" + "".join(f"{f'n={n}':>10}" for n in args.requests))
    for name, (fields, own) in cases(patterns).items():
        rows[name] = speeds(llm, fields, own, args)
        print(f"{name:34}" + "".join(f"{value:>10.1f}" for value in rows[name]), flush=True)
    figures = {"benchmark": "replay", "model": args.model, "requests": args.requests}
    print(json.dumps({**figures, "device": str(llm.plan.device), "tokens_per_s": rows}))


def main() -> None:
    """Record patterns, or replay them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, help="write patterns of the embedded model here")
    parser.add_argument("--limit", type=int, default=80, help="items a task to record")
    parser.add_argument("--patterns", default="benchmarks/patterns.json")
    parser.add_argument("--model", default="llada-8b")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if args.record:
        record(args.record, args.limit)
    else:
        measure(args)


if __name__ == "__main__":
    main()
