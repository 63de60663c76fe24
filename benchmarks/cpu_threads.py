"""Threads on a CPU that other programs use too: how long one answer takes, and a batch of 16.

    python -m benchmarks.cpu_threads --busy 0 2 --rounds 5

Every setting runs in a process of its own, in turn, so that all of them meet the same
neighbours; ``--busy`` adds programs that do nothing but count, while an answer is timed:

- ``chosen``: as the engine chooses, in a process that has not loaded torch before.
- ``torch first``: as it chooses where the program has loaded torch before.
- ``one``: one thread.
- ``busy wait``: a thread for each core, and waiting as the thread library does by itself.

Seconds are of the answer alone, without loading the model. Prints the median, the least and
the greatest of all rounds for people, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from dllmserve.cores import allowed_cpus

SETTINGS = ("chosen", "torch first", "one", "busy wait")
MEASURES = ("answer, one token a step", "answer, balanced", "16 x 16 tokens, dual cache")
#: no neighbour outlives its measurement by more than this
_SPIN_S = 60
_SPIN = f"import time; end = time.time() + {_SPIN_S}\nwhile time.time() < end: pass"
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measure(setting: str, busy: int) -> dict[str, float]:
    """Seconds of each measure; runs in a process of its own."""
    if setting in ("torch first", "busy wait"):
        import torch  # noqa: F401  before the engine has a say
    from dllmserve import LLM, SamplingParams

    threads = {"one": 1, "busy wait": len(allowed_cpus())}.get(setting)
    llm = LLM("tiny", device="cpu", threads=threads)
    question = [{"role": "user", "content": "Sort the numbers: 9 41 7"}]
    slow = SamplingParams(temperature=0.0, gen_length=64, steps=64, block_length=32)
    balanced = SamplingParams(temperature=0.0, gen_length=64, quality="balanced")
    many = SamplingParams(
        temperature=0.0, gen_length=16, steps=16, block_length=16, cache="dual", ignore_eos=True
    )
    prompts = [[16 + (7 * row + place) % 1000 for place in range(64)] for row in range(16)]
    runs: dict[str, Callable[[], object]] = {
        MEASURES[0]: lambda: llm.chat(question, slow, use_tqdm=False),
        MEASURES[1]: lambda: llm.chat(question, balanced, use_tqdm=False),
        MEASURES[2]: lambda: llm.generate(prompts, many, use_tqdm=False),
    }
    runs[MEASURES[1]]()  # the first has everything else to do as well
    neighbours = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(busy)]
    seconds = {}
    try:
        time.sleep(0.5)
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - begin
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    return seconds


def in_a_process(setting: str, busy: int) -> dict[str, float]:
    """The same in a new process, without the thread variables of this one."""
    kept = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    command = [sys.executable, "-m", "benchmarks.cpu_threads", "--measure", setting]
    done = subprocess.run(
        [*command, "--busy", str(busy)], env=kept, stdout=subprocess.PIPE, check=True, text=True
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="busy neighbours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.busy[0])))
        return
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    for busy in args.busy:
        rows = {s: {m: list[float]() for m in MEASURES} for s in args.settings}
        for _ in range(args.rounds):
            for setting in args.settings:
                measured = in_a_process(setting, busy)
                print(f"{busy} busy, {setting}: {measured}", file=sys.stderr, flush=True)
                for name, seconds in measured.items():
                    rows[setting][name].append(round(seconds, 3))
        print(f"{len(allowed_cpus())} CPUs, {busy} busy neighbours; seconds: median (least-most)")
        for setting, columns in rows.items():
            cells = [
                f"{name}: {statistics.median(s):.2f} ({min(s):.2f}-{max(s):.2f})"
                for name, s in columns.items()
            ]
            print(f"  {setting:<12}", "; ".join(cells), flush=True)
        found[busy] = rows
    print(json.dumps({"benchmark": "cpu_threads", "cpus": len(allowed_cpus()), "seconds": found}))


if __name__ == "__main__":
    main()
