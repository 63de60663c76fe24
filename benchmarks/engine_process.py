"""The engine in its own process, with and without streams, on shapes of a large model.

    python -m benchmarks.engine_process --requests 1 16 64

Runs alternate between requests whose ids are reported as they come and requests whose answer
comes at once. Output tokens per second; the first run of each size warms up and is left out.
Compare with `dllmserve bench throughput` of the same shapes in the same session.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

from dllmserve import AsyncLLM, SamplingParams


def prompts(count: int, length: int) -> list[list[int]]:
    """Prompts that differ; what they say does not matter to random weights."""
    return [[(7 * i + j) % 1000 + 10 for j in range(length)] for i in range(count)]


async def rate(llm: AsyncLLM, ids: list[list[int]], params: SamplingParams, stream: bool) -> float:
    """Output tokens per second of requests that are submitted together."""
    began = time.perf_counter()
    calls = [llm.submit(llm.check(prompt, params), stream=stream) for prompt in ids]
    outputs = await asyncio.gather(*(call.output() for call in calls))
    return sum(o.completion_tokens for o in outputs) / (time.perf_counter() - began)


async def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians by number of requests."""
    params = SamplingParams(
        temperature=0.0,
        gen_length=args.answer,
        steps=args.answer,
        block_length=32,
        cache="dual",
        ignore_eos=True,
    )
    found: dict[str, dict[str, float]] = {}
    options = {"load_format": "dummy", "max_model_len": args.prompt + args.answer}
    async with AsyncLLM(args.model, **options) as llm:
        for count in args.requests:
            ids = prompts(count, args.prompt)
            await rate(llm, ids, params, False)
            rates: dict[str, list[float]] = {"whole": [], "stream": []}
            for _ in range(args.runs):
                for name, values in rates.items():
                    values.append(await rate(llm, ids, params, name == "stream"))
            found[str(count)] = {n: statistics.median(v) for n, v in rates.items()}
            print(f"n={count}: {found[str(count)]}", flush=True)
    return found


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llada-8b")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    record = {"benchmark": "engine_process", **vars(args)}
    print(json.dumps({**record, "tokens_per_second": asyncio.run(measure(args))}))


if __name__ == "__main__":
    main()
