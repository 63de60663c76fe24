"""Reproduce the embedded model's held-out scores.

    python -m benchmarks.scores                           # threshold 0.9, every item
    python -m benchmarks.scores --unmask steps --limit 20 # one token a step, 20 items a task

Both are columns of the model card. The first takes minutes on two CPU cores; one token a
step takes 20 to 50 times as long.

Each task has an exact scorer (dllmserve/assets/scoring.py). Prints exact match per task
with its 95 % interval (Wilson), forward passes and tokens per forward, then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

from dllmserve import LLM, SamplingParams
from dllmserve.assets.scoring import score
from dllmserve.models.loader import ASSETS

HELD_OUT = ASSETS / "tiny" / "heldout.jsonl.gz"


def read_items(path: Path, limit: int) -> dict[str, list[dict[str, Any]]]:
    """Held-out items by task, the first ``limit`` of each (0: all)."""
    items: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            items.setdefault(item["task"], []).append(item)
    return {task: found[: limit or None] for task, found in sorted(items.items())}


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z, p = 1.96, hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def sampling(args: argparse.Namespace, gen_length: int) -> SamplingParams:
    """Greedy decoding by the options, for an answer of up to ``gen_length`` tokens."""
    return SamplingParams(
        temperature=0.0,
        gen_length=gen_length,
        steps=max(1, gen_length // args.tokens_per_step),
        block_length=args.block_length,
        cache=args.cache,
        unmask=args.unmask,
        threshold=args.threshold,
    )


def main() -> None:
    """Parse options, generate, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--limit", type=int, default=0, help="items a task; 0 is all of them")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--cache", default="none", choices=["none", "prefix", "dual"])
    parser.add_argument("--unmask", default="threshold", choices=["steps", "threshold"])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    llm = LLM(args.model, dtype=args.dtype, device=args.device, max_num_seqs=16)
    report: dict[str, Any] = {}
    print(
        f"{'task':<12} {'n':>5} {'exact':>7} {'95 % interval':>15} {'forwards':>9} {'tok/fwd':>8}"
    )
    for task, items in read_items(HELD_OUT, args.limit).items():
        if args.tasks and task not in args.tasks:
            continue
        start = time.perf_counter()
        outputs = llm.chat(
            [[{"role": "user", "content": item["prompt"]}] for item in items],
            [sampling(args, item["gen_length"]) for item in items],
            use_tqdm=False,
        )
        hits = sum(
            score(task, item["prompt"], item["answer"], out["text"])
            for item, out in zip(items, outputs, strict=True)
        )
        n = len(items)
        forwards = sum(o["usage"]["forward_passes"] for o in outputs)
        tokens = sum(o["usage"]["completion_tokens"] for o in outputs)
        low, high = wilson(hits, n)
        report[task] = {
            "n": n,
            "accuracy": hits / n,
            "interval": [low, high],
            "forwards_per_answer": forwards / n,
            "tokens_per_forward": tokens / forwards,
            "seconds": time.perf_counter() - start,
        }
        print(
            f"{task:<12} {n:>5} {hits / n:>7.1%} {low:>7.1%}-{high:<7.1%} "
            f"{forwards / n:>9.1f} {tokens / forwards:>8.2f}",
            flush=True,
        )
    print(json.dumps({"benchmark": "scores", **vars(args), "tasks": report}))


if __name__ == "__main__":
    main()
