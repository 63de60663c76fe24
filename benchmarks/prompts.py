"""What long prompts cost: many that are alike, and one beside requests that decode.

    python -m benchmarks.prompts sdar-8b

"shared": requests with one system prompt, with the prefix cache and without it; requests per
second. "beside": a long prompt arrives while others decode; milliseconds between two blocks (of an
autoregressive model: tokens) of theirs before it and until its first token, and its time to that
token. The second of two rounds counts, so that kernels and graphs are there. Random weights and
random prompts; prints a table and one JSON line. Block-causal and autoregressive shapes alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from typing import Any

from dllmserve import LLM, SamplingParams
from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore


def ids(draw: random.Random, count: int, vocabulary: int) -> list[int]:
    """A random prompt."""
    return [draw.randrange(vocabulary // 2) for _ in range(count)]


def sampling(length: int, steps: int | None) -> SamplingParams:
    """Greedy, and as long as it says."""
    return SamplingParams(
        temperature=0.0, gen_length=length, steps_per_block=steps, ignore_eos=True
    )


def shared(args: argparse.Namespace, caching: bool) -> dict[str, Any]:
    """Requests per second of prompts that begin alike."""
    length = args.system + args.own + args.answer
    llm = LLM(
        args.model,
        load_format="dummy",
        max_num_seqs=args.at_once,
        max_model_len=length + 64,
        prefix_caching=caching,
    )
    draw, words = random.Random(1), llm.spec.vocab_size
    for _ in range(2):
        system = ids(draw, args.system, words)
        prompts = [[*system, *ids(draw, args.own, words)] for _ in range(args.requests)]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling(args.answer, args.steps), use_tqdm=False)
        seconds = time.perf_counter() - start
    found = sum(output["usage"]["cached_tokens"] for output in outputs)
    return {
        "prefix_caching": caching,
        "requests_per_second": args.requests / seconds,
        "cached": found / sum(map(len, prompts)),
    }


class Watch:
    """When blocks of requests that decode are done."""

    def __init__(self, requests: list[Request], block: int) -> None:
        self._requests, self._block = requests, block
        self._last: dict[Request, tuple[float, int]] = {}

    def gaps(self, now: float) -> list[float]:
        """Seconds per block of the requests that have finished any since the last call."""
        found = []
        for request in self._requests:
            done = request.progress.frontier // self._block
            when, count = self._last.setdefault(request, (now, done))
            if done > count:
                found.append((now - when) / (done - count))
                self._last[request] = now, done
        return found


def beside(engine: EngineCore, args: argparse.Namespace) -> dict[str, Any]:
    """Time between blocks of requests that decode, before a long prompt and beside it."""
    draw, words = random.Random(2), engine.spec.vocab_size
    params = sampling(400, args.steps)
    others = [
        engine.make_request(ids(draw, 256, words), params, stream=True) for _ in range(args.others)
    ]
    for other in others:
        engine.add(other)
    watch, steps = Watch(others, engine.spec.block_length), 0
    before, during = list[float](), list[float]()
    long: Request | None = None
    came = first = 0.0
    until = 0
    while engine.has_work:
        events, steps = engine.step(), steps + 1
        now = time.perf_counter()
        if long is not None and not first and any(r is long for r, _ in events.streamed):
            # blocks that it has held up may end a little later
            first, until = now - came, steps + engine.spec.block_length
        gaps = watch.gaps(now)
        if long is None and steps > args.others:
            before += gaps
        elif long is not None and (not first or steps < until):
            during += gaps
        if steps == args.others + 100:
            long = engine.make_request(ids(draw, args.long, words), params, stream=True)
            engine.add(long)
            came = time.perf_counter()
    return {
        "before_ms": 1e3 * statistics.median(before),
        "beside_ms": 1e3 * statistics.median(during),
        "beside_most_ms": 1e3 * max(during),
        "times": statistics.median(during) / statistics.median(before),
        "first_token_ms": 1e3 * first,
    }


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name, default, text in (
        ("requests", 1000, "requests with the same system prompt"),
        ("system", 2000, "its tokens"),
        ("own", 32, "tokens of each prompt behind it"),
        ("answer", 32, "tokens of each answer"),
        ("at-once", 128, "max_num_seqs"),
        ("others", 64, "requests that decode beside the long prompt"),
        ("long", 4000, "its tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--steps", type=int, default=None, help="steps_per_block")
    args = parser.parse_args()
    rates = []
    for caching in (False, True):
        rates.append(shared(args, caching))
        gc.collect()
        print(rates[-1], flush=True)
    llm = LLM(
        args.model,
        load_format="dummy",
        max_num_seqs=args.others + 1,
        max_model_len=max(args.long + 512, 1024),
    )
    for _ in range(2):
        latency = beside(llm._engine, args)
    print(latency)
    print(json.dumps({"model": args.model, "shared": rates, "beside": latency}))


if __name__ == "__main__":
    main()
