"""What HTTP and the engine's own process cost: the server against LLM.generate, in one run.

    python -m benchmarks.server_overhead

Both sides answer the same prompts with the same settings and threads, many at once:
LLM.generate in this process, and `dllmserve serve` with as many clients as it has rows, each
of which sends its next request when it has its answer. The rate is that of forward passes,
counted for each request. Rounds alternate; medians are compared. The clients run on the same
machine, so what they cost is the server's loss, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.served import served
from dllmserve import LLM, SamplingParams
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.tools.bench.serve.http import HttpClient, Reply


@contextmanager
def server(model: str) -> Iterator[int]:
    """A server with the embedded model; gives its port once it is ready."""
    options = [model, "--log-level", "warning", "--device", "cpu", "--max-requests", "1024"]
    with tempfile.TemporaryDirectory() as state, served(options, {"XDG_STATE_HOME": state}) as port:
        yield port


def forwards_of(body: bytes, stream: bool) -> int:
    """Forward passes that an answer reports."""
    if not stream:
        return int(json.loads(body)["usage"]["forward_passes"])
    last = [line for line in body.split(b"\n\n") if line.startswith(b"data: {")][-1]
    return int(json.loads(last.removeprefix(b"data: "))["usage"]["forward_passes"])


async def load(
    port: int, prompts: list[list[int]], fields: dict[str, object], clients: int, stream: bool
) -> float:
    """Forward passes per second, summed over requests."""
    client = HttpClient(f"http://127.0.0.1:{port}", {})
    left = list(prompts)
    forwards = 0
    extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}

    async def work() -> None:
        nonlocal forwards
        while left:
            body = json.dumps({"prompt": left.pop(0), **fields, **extra}).encode()
            reply = Reply()
            await client.exchange("POST", "/v1/completions", body, reply)
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {bytes(reply.body[:300])!r}")
            forwards += forwards_of(bytes(reply.body), stream)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    seconds = time.perf_counter() - began
    await client.close()
    return forwards / seconds


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    """Forward passes per second, summed over requests."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(int(o["usage"]["forward_passes"]) for o in outputs) / seconds


def make_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    words = "the president of the people has said that our country is free and great".split()
    texts = [" ".join(words[i % 7 :] * (1 + i % 5)) for i in range(count)]
    return [tokenizer.encode(text) for text in texts]


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--cache", default="dual")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    llm = LLM(args.model, device="cpu")
    assert llm.tokenizer is not None
    prompts = make_prompts(llm.tokenizer, args.requests)
    fields = {
        "temperature": 0.0,
        "gen_length": args.answer,
        "steps": args.answer,
        "block_length": args.block,
        "cache": args.cache,
        "ignore_eos": True,
    }
    params = SamplingParams(**fields)
    rates: dict[str, list[float]] = {"generate": [], "whole": [], "stream": []}
    with server(args.model) as port:
        generate(llm, prompts[: args.clients], params)
        asyncio.run(load(port, prompts[: args.clients], fields, args.clients, False))
        for _ in range(args.rounds):
            rates["generate"].append(generate(llm, prompts, params))
            for name in ("whole", "stream"):
                run = load(port, prompts, fields, args.clients, name == "stream")
                rates[name].append(asyncio.run(run))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{args.model}, {args.clients} clients, {torch.get_num_threads()} threads")
    for name, value in medians.items():
        share = 100 * value / medians["generate"]
        print(f"{name:>9}: {value:8.1f} forwards/s {share:6.1f} %   {rates[name]}")
    print(json.dumps({"benchmark": "server_overhead", **vars(args), "forwards_per_second": rates}))


if __name__ == "__main__":
    main()
