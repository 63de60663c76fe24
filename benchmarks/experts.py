"""The expert layer alone, beside its floor and beside torch's grouped product, on a CUDA device.

    python -m benchmarks.experts [llada2-mini] [sdar-30b-a3b] ...

A layer is routing, the two products and the weighted sum, as a step runs them, replayed from CUDA
graphs with random bf16 weights and tokens. Its floor is the longer of two times: reading the
weights of the experts that the tokens chose, at the rate of a copy measured in the same run, and
computing, at the rate of a square product measured there too. ``torch._grouped_mm`` is called twice
on rows that are sorted by expert beforehand, so its time leaves out the routing, the sorting, the
gate's activation and the sum. Medians; prints a table and one JSON line. Exit code 2 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dllmserve.core.model_spec import ExpertSpec, ModelSpec
from dllmserve.layers.triton import TritonOps
from dllmserve.models.loader import ASSETS, read_spec

TOKENS = (4, 32, 128, 512, 2048, 8192)
SHAPES = ("llada2-mini", "llada-moe-7b", "sdar-30b-a3b")


@dataclass(frozen=True)
class Result:
    """Milliseconds of one layer.

    Attributes:
        touched: experts that the tokens chose, the shared one included.
        route, up, down, combine: parts of the layer, each alone.
        grouped_mm: the products by torch, without what is around them.
    """

    shapes: str
    tokens: int
    touched: int
    floor: float
    layer: float
    route: float
    up: float
    down: float
    combine: float
    grouped_mm: float


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of a replay of a graph of calls."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(run, rep=40, return_mode="median"))


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes and FLOP per millisecond of a copy and of a square product."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / float(do_bench(lambda: target.copy_(source), return_mode="median"))
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    product = float(do_bench(lambda: square @ square, return_mode="median"))
    return copied, 2 * 8192**3 / product


class Layer:
    """An expert layer with random weights."""

    def __init__(self, spec: ModelSpec, experts: ExpertSpec, device: torch.device) -> None:
        self.ops = TritonOps(2, 1.0, 1, device)
        self.experts, self.width = experts, spec.hidden_size
        self.shared = int(experts.shared_size == experts.size)
        self.held = range(experts.count + self.shared)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

        self.gate = weight(experts.count, self.width)
        self.bias = torch.randn(experts.count, device=device) * 0.01 if experts.bias else None
        self.gate_up = weight(len(self.held), 2 * experts.size, self.width)
        self.down = weight(len(self.held), self.width, experts.size)

    def measure(self, name: str, tokens: int, bandwidth: float, rate: float) -> Result:
        """All figures of a number of tokens."""
        ops, gate_up, down = self.ops, self.gate_up, self.down
        x = torch.randn(tokens, self.width, device=down.device, dtype=torch.bfloat16)

        def route() -> Any:
            return ops.route(x, self.gate, self.bias, self.experts, self.held)

        def layer() -> Any:
            to = route()
            return ops.combine(ops.expert_down(ops.expert_up(x, to, gate_up), to, down), to)

        to = route()
        inner = ops.expert_up(x, to, gate_up)
        rows = ops.expert_down(inner, to, down)
        ids = to.ids.flatten().long()
        by_expert, choices = ids.argsort(), to.ids.shape[1]
        counts = ids.bincount(minlength=len(self.held))
        ends, touched = counts.cumsum(0).int(), int((counts > 0).sum())
        sorted_x, sorted_inner = x[by_expert // choices], inner[by_expert]

        def grouped() -> Any:
            torch._grouped_mm(sorted_x, gate_up.transpose(1, 2), offs=ends)
            return torch._grouped_mm(sorted_inner, down.transpose(1, 2), offs=ends)

        per_expert = 3 * self.experts.size * self.width
        floor = max(2 * touched * per_expert / bandwidth, 2 * ids.numel() * per_expert / rate)
        times = [
            milliseconds(run)
            for run in (
                layer,
                route,
                lambda: ops.expert_up(x, to, gate_up),
                lambda: ops.expert_down(inner, to, down),
                lambda: ops.combine(rows, to),
                grouped,
            )
        ]
        return Result(name, tokens, touched, floor, *times)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    names = parser.parse_args().shapes
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.manual_seed(0)
    bandwidth, rate = ceilings(device)
    print(f"copy {bandwidth / 1e9:.2f} TB/s, product {rate / 1e9:.0f} TFLOP/s")
    found = []
    for name in names:
        spec = read_spec(json.loads((ASSETS / name / "config.json").read_text()))
        if spec.experts is None:
            print(f"{name} has no experts", file=sys.stderr)
            return 2
        layer = Layer(spec, spec.experts, device)
        for tokens in TOKENS:
            result = layer.measure(name, tokens, bandwidth, rate)
            found.append(result)
            print(
                f"{name} {tokens:5d} tokens, {result.touched:3d} experts: {result.layer:.4f} ms, "
                f"{100 * result.floor / result.layer:.0f} % of the floor {result.floor:.4f} (route "
                f"{result.route:.4f}, up {result.up:.4f}, down {result.down:.4f}, combine "
                f"{result.combine:.4f}); torch._grouped_mm {result.grouped_mm:.4f}",
                flush=True,
            )
        del layer
    print(json.dumps({"benchmark": "experts", "results": [asdict(r) for r in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
