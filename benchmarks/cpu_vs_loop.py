"""The engine against the plain loop, on this CPU, in one run.

    python -m benchmarks.cpu_vs_loop

Both sides decode the same prompts with the same weights, dtype and thread count, one
token a step. The plain loop is LLaDA's generate restated in tests/oracles, batched: a
forward over the whole canvas in every step. The engine uses the dual cache (and, for
reference, no cache). Prints a table for people and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dllmserve import LLM, SamplingParams
from dllmserve.models.loader import find_model
from tests.oracles import llada
from tests.oracles.models import OracleModel, load, shift


class PlainLoop:
    """The oracle model as LLaDA's generate calls it; a shifted model is shifted here."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        self.model: OracleModel = load(find_model(path), dtype=dtype)
        self.mask_id = self.model.mask_id

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of tokens [B, L]."""
        logits = self.model(tokens)
        return shift(logits) if self.model.shifted else logits


def median_seconds(run: Callable[[int], Any], answer: int, warm: int, repeats: int) -> float:
    """Median wall time of ``run(answer)``, after a warm-up call with a shorter answer."""
    run(warm)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(answer)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Seeded random prompts."""
    generator = torch.Generator().manual_seed(0)
    # the first ids are special tokens
    return torch.randint(16, vocab, (count, length), generator=generator).tolist()


def measure(llm: LLM, loop: PlainLoop, n: int, args: argparse.Namespace) -> dict[str, float]:
    """Output tokens per second of each side for n concurrent requests."""
    ids = prompts(n, args.prompt, llm.spec.vocab_size)
    tokens = n * args.answer
    rates = {}
    for cache in ("dual", "none"):

        def engine(answer: int, cache: str = cache) -> None:
            params = SamplingParams(
                temperature=0.0,
                gen_length=answer,
                steps=answer,
                block_length=args.block,
                cache=cache,
                ignore_eos=True,
            )
            llm.generate(ids, params, use_tqdm=False)

        repeats = args.repeats if cache == "dual" else 1
        seconds = median_seconds(engine, args.answer, args.block, repeats)
        rates[f"engine_{cache}"] = tokens / seconds

    def plain(answer: int) -> None:
        batch = torch.tensor(ids)
        llada.generate(loop, batch, steps=answer, gen_length=answer, block_length=args.block)

    rates["plain_loop"] = tokens / median_seconds(plain, args.answer, args.block, 1)
    rates["ratio"] = rates["engine_dual"] / rates["plain_loop"]
    return rates


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()

    llm = LLM(args.model, device="cpu", dtype=args.dtype)
    loop = PlainLoop(args.model, getattr(torch, args.dtype))
    results = {n: measure(llm, loop, n, args) for n in args.concurrency}
    print(
        f"{args.model}, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'n':>4} {'plain loop':>11} {'engine none':>12} {'engine dual':>12} {'dual/loop':>10}")
    for n, r in results.items():
        print(
            f"{n:>4} {r['plain_loop']:>11.1f} {r['engine_none']:>12.1f} "
            f"{r['engine_dual']:>12.1f} {r['ratio']:>9.2f}x"
        )
    record = {"benchmark": "cpu_vs_loop", "machine": platform.processor(), **vars(args)}
    print(json.dumps({**record, "tokens_per_second": results}))


if __name__ == "__main__":
    main()
