"""What each part of the GPU engine is worth, in one run on one device.

    python -m benchmarks.ablations                         # LLaDA-8B shapes, random weights
    python -m benchmarks.ablations --only graphs,phases    # some of it
    python -m benchmarks.ablations --model tiny --requests 4 --gen-length 32   # on a CPU

Parts: "logits" (the LM head's logits whole or in chunks: peak memory and the requests that
fit beside them), "phases" (refreshes and reuse in one forward or in separate ones, for
requests in step and for requests that are not), "heads" (dense, sparse per head, sparse
shared), "graphs" (CUDA graphs or one launch per kernel). Greedy, K,V cache dual unless said.
Prints a table for people and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.core.budget import size_text
from dllmserve.tools.bench.workload import prompt_vocabulary

PROMPT, BLOCK = 256, 32
Row = dict[str, Any]
Jobs = tuple[list[list[int]], list[SamplingParams], list[SparseConfig | None]]


class Ablations:
    """Engines of one model with different options."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cuda = torch.cuda.is_available()

    def engine(self, **options: Any) -> LLM:
        """A fresh engine; the one before has to be gone."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        args = self.args
        shapes = {} if args.model == "tiny" else {"load_format": "dummy"}
        longest = -(-2 * (PROMPT + args.gen_length) // 256) * 256
        given = {"max_model_len": longest, "max_num_seqs": args.requests, **shapes, **options}
        return LLM(args.model, **given)

    def jobs(
        self, llm: LLM, count: int, sparse: SparseConfig | None = None, *, ragged: bool = False
    ) -> Jobs:
        """Equal requests, or ``ragged`` ones whose blocks do not begin together."""
        ids, draw = prompt_vocabulary(llm.spec), random.Random(0)
        gen, per_step = self.args.gen_length, self.args.tokens_per_step
        prompts, params = [], []
        for _ in range(count):
            length = draw.randint(PROMPT // 4, 2 * PROMPT - PROMPT // 4) if ragged else PROMPT
            answer = draw.randint(gen // 2, gen + gen // 2) if ragged else gen
            prompts.append(draw.choices(ids, k=length))
            params.append(
                SamplingParams(
                    temperature=0.0,
                    gen_length=answer,
                    steps=max(answer // per_step, 1),
                    block_length=BLOCK,
                    cache="none" if sparse else "dual",
                    ignore_eos=True,
                )
            )
        return prompts, params, [sparse] * count

    def speed(self, llm: LLM, jobs: Jobs) -> float:
        """Output tokens per second: median of ``runs`` after a warm-up."""
        values = []
        for number in range(self.args.runs + 1):  # the first warms up
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            outputs = llm.generate(*jobs, use_tqdm=False)
            seconds = time.perf_counter() - start
            if number:
                values.append(sum(len(o["token_ids"]) for o in outputs) / seconds)
        return statistics.median(values)

    def logits(self) -> Iterator[Row]:
        """Whole logits of a step's masked rows, and of all its rows, against chunks."""
        n, canvas = self.args.requests, PROMPT + self.args.gen_length
        for rows, name in ((1024, "chunks of 1024"), (n * BLOCK, "all masked rows at once"),
                           (n * canvas, "all rows at once, as without a plan")):  # fmt: skip
            llm = self.engine(max_logit_rows=max(rows, 2))
            memory = llm.plan.memory
            per_request = canvas * llm.spec.kv_values() * llm.plan.dtype.itemsize
            row: Row = {
                "variant": name,
                "logits": size_text(memory.logits),
                "requests that fit": (memory.allowed - memory.fixed) // per_request,
            }
            row["tokens/s"] = self.speed(llm, self.jobs(llm, n))
            if self.cuda:
                row["peak memory"] = size_text(torch.cuda.max_memory_allocated())
            yield row
            del llm

    def phases(self) -> Iterator[Row]:
        """Requests in step, and three times as many of mixed lengths with staggered blocks."""
        n = self.args.requests
        limit = 4 * (PROMPT + self.args.gen_length)
        llm = self.engine()
        scheduler = llm._engine.scheduler  # the engine stays, only its packing changes
        limits = scheduler.limits
        for name, changes in (
            ("auto", {"phases": "auto"}),
            ("mixed", {"phases": "mixed"}),
            ("separate", {"phases": "separate"}),
            (f"mixed, {limit} refresh tokens", {"phases": "mixed", "max_refresh_tokens": limit}),
        ):
            scheduler.limits = replace(limits, **changes)
            yield {
                "variant": name,
                "in step": self.speed(llm, self.jobs(llm, n)),
                "staggered": self.speed(llm, self.jobs(llm, 3 * n, ragged=True)),
            }

    def heads(self) -> Iterator[Row]:
        """Attention over everything, over what each head likes, over what all like."""
        llm = self.engine()
        n, canvas = self.args.requests, PROMPT + self.args.gen_length
        sparse = SparseConfig(retention_ratio=0.5, delay_step=1)
        for name, config in (
            ("dense", None),
            ("sparse, per head", sparse),
            ("sparse, shared", replace(sparse, head_select=False)),
        ):
            kept = config.keep(canvas - BLOCK) if config else canvas
            yield {
                "variant": name,
                "K,V slots a request": kept,
                "tokens/s": self.speed(llm, self.jobs(llm, n, config)),
                "tokens/s alone": self.speed(llm, self.jobs(llm, 1, config)),
            }

    def graphs(self) -> Iterator[Row]:
        """One call per step, or one per kernel."""
        for eager in (False, True):
            llm = self.engine(enforce_eager=eager)
            row: Row = {"variant": "one launch per kernel" if eager else "CUDA graphs"}
            for count in sorted({1, 16, self.args.requests}):
                if count <= self.args.requests:
                    row[f"n={count}"] = self.speed(llm, self.jobs(llm, count))
            yield row
            del llm


PARTS = ("logits", "phases", "heads", "graphs")


def show(title: str, rows: list[Row]) -> None:
    """A table of one part."""
    print(f"\n{title}")
    cells = [[_text(v) for v in row.values()] for row in rows]
    names = list(rows[0])
    widths = [max(len(c) for c in column) for column in zip(names, *cells, strict=True)]
    for line in (names, *cells):
        print("  " + "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llada-8b", help="shapes with random weights, or tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{args.model} on {device}, torch {torch.__version__}: prompt {PROMPT}, answer "
        f"{args.gen_length}, block {BLOCK}, {args.tokens_per_step} tokens a step, "
        f"{args.requests} requests; output tokens per second, median of {args.runs}"
    )
    ablations = Ablations(args)
    record: dict[str, Any] = {"device": device, **vars(args)}
    for name in wanted:
        record[name] = list(getattr(ablations, name)())
        show(name, record[name])
        sys.stdout.flush()
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
