"""The Triton kernels against torch, at LLaDA-8B's shapes, on a CUDA device.

    python -m benchmarks.kernels

Median times of one call, with a cold L2, of the kernel, of the torch operations that it
replaces, and of those under torch.compile where that is an alternative. Prints a table for
people and one JSON line. Exit code 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.decoding.stats import RowParams, row_stats
from dllmserve.layers.ops import LayerOps
from dllmserve.layers.triton import TritonOps

WIDTH, MLP, HEADS, HEAD_DIM, VOCAB, MASK_ID = 4096, 12288, 32, 128, 126464, 126336
ROWS = (32, 512, 2048, 8192)
STATS_ROWS = (32, 512, 1024)
LINEAR_ROWS = (32, 512, 2048)

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        bytes: that have to be moved at least.
        flops: of a product, else 0.
    """

    name: str
    rows: int
    bytes: int
    kernel: Run
    eager: Run
    compiled: Run | None = None
    flops: int = 0


@dataclass(frozen=True)
class Result:
    """Median microseconds; rates are the kernel's."""

    name: str
    rows: int
    kernel_us: float
    eager_us: float
    compiled_us: float | None
    gb_s: float
    tflop_s: float | None


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device="cuda").to(dtype)


def layer_cases(rows: int) -> Iterator[Case]:
    """add_rms_norm, rotate and gated on bf16 activations."""
    device = torch.device("cuda")
    plain, fused = (kind(HEAD_DIM, 5e5, 4096, device) for kind in (LayerOps, TritonOps))
    x, h, weight = random(rows, WIDTH), random(rows, WIDTH), random(WIDTH)
    add_norm = torch.compile(plain.add_norm, dynamic=False)
    yield Case(
        "add_rms_norm",
        rows,
        4 * x.nbytes,
        lambda: fused.add_norm(x, h, weight, 1e-5),
        lambda: plain.add_norm(x, h, weight, 1e-5),
        lambda: add_norm(x, h, weight, 1e-5),
    )
    heads = random(rows, 3 * HEADS, HEAD_DIM)  # q, k and v; q and k are rotated
    positions = torch.arange(rows, device=device) % 4096
    angles, count = plain.at(positions), 2 * HEADS
    rotate = torch.compile(plain.rotate, dynamic=False)
    yield Case(
        "rotate",
        rows,
        2 * heads[:, :count].nbytes,
        lambda: fused.rotate(heads, count, (positions,)),
        lambda: plain.rotate(heads, count, angles),
        lambda: rotate(heads, count, angles),
    )
    wide = random(rows, 2 * MLP)
    gated = torch.compile(plain.gated, dynamic=False)
    yield Case(
        "gated",
        rows,
        wide.nbytes * 3 // 2,
        lambda: fused.gated(wide),
        lambda: plain.gated(wide),
        lambda: gated(wide),
    )


def linear_case(rows: int) -> Case:
    """The float32 product, against cuBLAS without TF32."""
    from dllmserve.kernels.linear import invariant_linear

    x = random(rows, WIDTH, dtype=torch.float32)
    weight = random(WIDTH, WIDTH, dtype=torch.float32)
    return Case(
        "invariant_linear",
        rows,
        2 * x.nbytes + weight.nbytes,
        lambda: invariant_linear(x, weight, None),
        lambda: F.linear(x, weight),
        flops=2 * rows * WIDTH * WIDTH,
    )


def stats_cases(rows: int) -> Iterator[Case]:
    """Statistics of bf16 logits, with margin and entropy and without."""
    from dllmserve.kernels.stats import fused_row_stats

    z = random(rows, VOCAB) * 3
    for temperature in (0.0, 1.0):
        params = RowParams(
            temperature=torch.full((rows,), temperature, dtype=torch.float64, device="cuda"),
            top_p=torch.ones(rows, dtype=torch.float64, device="cuda"),
            top_k=torch.zeros(rows, dtype=torch.int64, device="cuda"),
            tempered=torch.zeros(rows, dtype=torch.bool, device="cuda"),
            keys=torch.arange(rows, device="cuda") * 7919,
        )
        for needs in (frozenset[str](), frozenset({"margin", "entropy"})):
            kind = "sampled" if temperature else "greedy"
            options: dict[str, Any] = {
                "mask_id": MASK_ID,
                "sampled": temperature > 0,
                "needs": needs,
            }

            def kernel(p: RowParams = params, o: dict[str, Any] = options) -> None:
                fused_row_stats(z, p, **o)

            def eager(p: RowParams = params, o: dict[str, Any] = options) -> None:
                row_stats(z, p, filtered=False, **o)

            yield Case(f"stats {kind}{' all' if needs else ''}", rows, z.nbytes, kernel, eager)


def cases(most: int) -> Iterator[Case]:
    """All cases with up to ``most`` rows, one at a time, for the memory's sake."""
    for rows in (r for r in ROWS if r <= most):
        yield from layer_cases(rows)
    for rows in (r for r in LINEAR_ROWS if r <= most):
        yield linear_case(rows)
    for rows in (r for r in STATS_ROWS if r <= most):
        yield from stats_cases(rows)


def measure(case: Case, compiled: bool) -> Result:
    """Median times of a case."""
    from triton.testing import do_bench

    def microseconds(run: Run) -> float:
        run()  # compiles
        return 1e3 * float(do_bench(run, return_mode="median"))

    kernel = microseconds(case.kernel)
    return Result(
        name=case.name,
        rows=case.rows,
        kernel_us=kernel,
        eager_us=microseconds(case.eager),
        compiled_us=microseconds(case.compiled) if case.compiled and compiled else None,
        gb_s=case.bytes / kernel / 1e3,
        tflop_s=case.flops / kernel / 1e6 if case.flops else None,
    )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="Triton kernels against torch")
    parser.add_argument("--rows", type=int, default=max(ROWS), help="leave larger sizes out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    print(f"{'kernel':<20}{'rows':>6}{'kernel':>11}{'eager':>11}{'compiled':>11}{'':>9}{'':>9}")
    with torch.inference_mode():
        for case in cases(args.rows):
            r = measure(case, not args.no_compile)
            results.append(r)
            compiled = f"{r.compiled_us:>8.1f} us" if r.compiled_us else " " * 11
            flops = f"  {r.tflop_s:.1f} TFLOP/s" if r.tflop_s else ""
            print(
                f"{r.name:<20}{r.rows:>6}{r.kernel_us:>8.1f} us{r.eager_us:>8.1f} us{compiled}"
                f"{r.gb_s:>9.0f} GB/s{flops}",
                flush=True,
            )
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({**device, "results": [asdict(r) for r in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
