"""One model on several GPUs, and several engines: speed against one GPU, in one run.

    python -m benchmarks.multi_gpu --tensor-parallel 1 2 4 --data-parallel 2

Workload W: n requests at once, prompts of 256 random ids, answers of 128 in blocks of 32,
greedy, one token a step; "dual" with the dual cache, "sparse" with half of the context kept.
Random weights at the model's shapes. Each figure is the median of --rounds after a warm-up.
Prints a table for people and one JSON line. Exit code 2 if there are not enough GPUs.

On a CPU (``--device cpu --model tiny``) it shows that everything runs, and no speed-up.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.async_llm import AsyncLLM
from dllmserve.core.budget import size_text
from dllmserve.parallel.torch_group import TorchGroup
from dllmserve.process.ranks import make_store, open_store

PROMPT, ANSWER, BLOCK = 256, 128, 32
Job = tuple[list[list[int]], SamplingParams, SparseConfig | None]


def job(kind: str, count: int, vocabulary: int, answer: int) -> Job:
    """The requests of a workload."""
    rng = random.Random(count)
    prompts = [[rng.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(count)]
    params = SamplingParams(
        temperature=0.0,
        gen_length=answer,
        steps=answer,
        block_length=BLOCK,
        cache="dual" if kind == "dual" else "none",
        ignore_eos=True,
    )
    return prompts, params, None if kind == "dual" else SparseConfig(retention_ratio=0.5)


def tokens_per_second(llm: LLM, work: Job, rounds: int) -> float:
    """Median of some rounds, after one that captures and compiles."""
    prompts, params, sparse = work
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        llm.generate(prompts, params, sparse, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
    return len(prompts) * params.gen_length / statistics.median(seconds[1:])


def memory_used(devices: int) -> list[int]:
    """Bytes that are in use on each of the first GPUs."""
    used = []
    for index in range(devices):
        free, total = torch.cuda.mem_get_info(index)
        used.append(total - free)
    return used


def measure_ranks(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Speeds, weights and memory with ``size`` ranks."""
    with LLM(args.model, tensor_parallel_size=size, **engine_options(args)) as llm:
        found: dict[str, Any] = {"ranks": size, "weights": llm.plan.memory.weights}
        for kind in ("dual", "sparse"):
            for count in args.requests:
                work = job(kind, count, llm.spec.vocab_size - 1, args.answer)
                speed = tokens_per_second(llm, work, args.rounds)
                found[f"{kind} n={count}"] = speed
                print(f"N={size}, {kind}, n={count}: {speed:.1f}", file=sys.stderr, flush=True)
        if llm.plan.device.type == "cuda":
            found["memory_used"] = memory_used(size)
        layers, width = llm.spec.num_layers, llm.spec.hidden_size
        cuda = llm.plan.device.type == "cuda"
    del llm
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    if size > 1 and cuda:
        found["exchange_us"] = {
            rows: exchange_us(size, rows, width, 2 * layers + 1) for rows in (BLOCK, 64 * BLOCK)
        }
    return found


def exchange_us(size: int, rows: int, width: int, count: int) -> float:
    """Microseconds of a step's all-reduces of [rows, width] bfloat16, in a CUDA graph."""
    store, port = make_store(size)
    shape = [str(n) for n in (size, port, rows, width, count)]
    command = [sys.executable, "-m", "benchmarks.multi_gpu", "--exchange"]
    others = [subprocess.Popen([*command, str(rank), *shape]) for rank in range(1, size)]
    try:
        return _time_exchange(TorchGroup(store, 0, size, torch.device("cuda", 0), 60.0), shape)
    finally:
        for other in others:
            other.wait(60)


def join_exchange(numbers: Sequence[str]) -> int:
    """Another rank of :func:`exchange_us`."""
    rank, (size, port) = int(numbers[0]), map(int, numbers[1:3])
    torch.cuda.set_device(rank)
    group = TorchGroup(open_store(port, size), rank, size, torch.device("cuda", rank), 60.0)
    _time_exchange(group, numbers[1:])
    return 0


def _time_exchange(group: TorchGroup, shape: Sequence[str]) -> float:
    _, _, rows, width, count = map(int, shape)
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=f"cuda:{group.rank}")
    group.all_reduce(x)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(count):
            group.all_reduce(x)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    del graph
    group.abort()
    return statistics.median(times) * 1e6


async def measure_engines(args: argparse.Namespace, engines: int) -> float:
    """Tokens a second of ``--many`` requests at once to so many engines."""
    options = engine_options(args)
    async with AsyncLLM(args.model, data_parallel_size=engines, **options) as llm:
        vocabulary = llm.info.spec.vocab_size - 1
        prompts, params, _ = job("dual", args.many, vocabulary, args.answer)
        seconds = []
        for _ in range(args.rounds + 1):
            began = time.perf_counter()
            await asyncio.gather(*(llm.generate(prompt, params) for prompt in prompts))
            seconds.append(time.perf_counter() - began)
    speed = args.many * params.gen_length / statistics.median(seconds[1:])
    print(f"M={engines}, n={args.many}: {speed:.1f}", file=sys.stderr, flush=True)
    return speed


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of every engine."""
    random_weights = args.model != "tiny"
    return {
        "device": args.device,
        "dtype": "bfloat16" if args.device != "cpu" else "float32",
        "load_format": "dummy" if random_weights else "auto",
        "max_model_len": PROMPT + max(ANSWER, args.answer),
    }


def show(results: list[dict[str, Any]], engines: dict[int, float], many: int) -> None:
    """A table of speeds, with the ratio to the first line."""
    first = results[0] if results else {}
    names = [name for name in first if "n=" in name]
    print(f"{'tokens/s':<12}" + "".join(f"{name:>22}" for name in names))
    for found in results:
        cells = (f"{found[n]:>12.1f} ({found[n] / first[n]:>4.2f} x)" for n in names)
        print(f"N={found['ranks']:<10}" + "".join(f"{cell:>22}" for cell in cells))
    for found in results:
        used = ", ".join(size_text(n) for n in found.get("memory_used", ()))
        exchange = found.get("exchange_us", {})
        parts = [f"weights {size_text(found['weights'])}", *([f"in use {used}"] if used else [])]
        parts += [f"all-reduces of {rows} rows {us:.0f} us a step" for rows, us in exchange.items()]
        print(f"N={found['ranks']}: {'; '.join(parts)}")
    for count, speed in engines.items():
        ratio = speed / engines[1]
        print(f"M={count}, n={many}: {speed:.1f} tokens/s ({ratio:.2f} x one engine)")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="several GPUs against one")
    parser.add_argument("--model", default="llada-8b", help="a name, id or directory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tensor-parallel", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--data-parallel", type=int, nargs="*", default=[])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--many", type=int, default=128, help="requests for --data-parallel")
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exchange", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.exchange:
        return join_exchange(args.exchange)
    if args.device == "auto" and not torch.cuda.is_available():
        args.device = "cpu"
    needed = max([1, *args.tensor_parallel, *args.data_parallel])
    if args.device != "cpu" and torch.cuda.device_count() < needed:
        print(f"this needs {needed} GPUs, and there are {torch.cuda.device_count()}")
        return 2
    results = [measure_ranks(args, size) for size in args.tensor_parallel]
    counts = [1, *args.data_parallel] if args.data_parallel else []
    engines = {count: asyncio.run(measure_engines(args, count)) for count in counts}
    show(results, engines, args.many)
    name = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
    print(json.dumps({"device": name, "ranks": results, "engines": engines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
