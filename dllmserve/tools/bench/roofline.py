"""The roofline: what this device could do at best, and how long a run would take then.

The floor of a step is the longer of two times: its arithmetic at the measured rate of a
large matrix product, and one read of the weights and of each row's cached K,V at the measured
copy bandwidth. Of experts those are read that the step's tokens touch. What is written, activations
and logits are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from dllmserve.core.budget import GIB
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Mask, Span, StepPlan, Store
from dllmserve.engine.machine import device_memory
from dllmserve.kernels.e4m3 import library_product, scaled
from dllmserve.models.loader import outline
from dllmserve.parallel.partition import Partition

#: bytes of the copied buffer: far more than any cache holds
_COPY_BYTES = {"cuda": 2 * GIB, "cpu": GIB // 8}
#: rows and columns of the multiplied matrices
_MATRIX = {"cuda": 8192, "cpu": 1024}
_WARMUP, _REPEATS = 3, 9
#: no experts have been counted
NONE_COUNTED: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    Attributes:
        bytes_per_second: of a device copy, read and written bytes together.
        flop_per_second: of a square matrix product in the engine's dtype.
        copy_bytes: size of the copied buffer.
        matrix_size: rows and columns of the matrices.
        scaled_flop_per_second: of that product in e4m3; None where nothing is quantized.
    """

    bytes_per_second: float
    flop_per_second: float
    copy_bytes: int
    matrix_size: int
    scaled_flop_per_second: float | None = None


@dataclass(frozen=True)
class AttentionCost:
    """Layers that attend alike.

    Attributes:
        window: that a query sees up to its own position, see
            :class:`~dllmserve.core.model_spec.AttentionSpec`; 0 for all.
        flop: FLOP of one query that attends to one key, all heads of these layers.
        kv_values: numbers of K and V of one token, of these layers.
    """

    window: int
    flop: int
    kv_values: int

    @staticmethod
    def of(spec: ModelSpec) -> tuple[AttentionCost, ...]:
        """Those of a model, by their windows."""
        windows = sorted({layer.window for layer in spec.layers})
        groups = [[layer for layer in spec.layers if layer.window == window] for window in windows]
        return tuple(
            AttentionCost(
                window,
                # scores and weighted sum, 2 each
                sum(4 * spec.num_heads * layer.head_dim for layer in group),
                sum(2 * layer.num_kv_heads * layer.head_dim for layer in group),
            )
            for window, group in zip(windows, groups, strict=True)
        )


@dataclass(frozen=True)
class ModelCost:
    """Numbers that a step's cost follows from.

    Attributes:
        layer_weights: weights of all layers' matrices, but for routed experts.
        head_weights: weights of the LM head; of a model with canvases of noise also of the
            embedding, by which each forward multiplies what it thought of a position.
        attention: of the layers.
        weight_bytes: bytes per number of the LM head, and of K and V.
        matrix_bytes: bytes per weight of the layers (routers, which stay as they are, included).
        expert_layers: layers with experts.
        experts: routed experts of each of these.
        per_token: of which a token takes so many.
        expert_weights: weights of one.
    """

    layer_weights: int
    head_weights: int
    attention: tuple[AttentionCost, ...]
    weight_bytes: int
    matrix_bytes: int
    expert_layers: int = 0
    experts: int = 0
    per_token: int = 0
    expert_weights: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, weight_bytes: int, quantization: str | None = None) -> ModelCost:
        """Costs of a model whose weights take ``weight_bytes`` bytes each, if not quantized."""
        model = outline(Partition(spec))
        tables = (model.embedding.weight, model.head.weight)
        matrices = [w for w in model.weights if len(w.data.shape) > 1]
        matrices = [w for w in matrices if all(w.data is not t for t in tables)]
        experts = spec.experts
        layers, count = (sum(experts.layers), experts.count) if experts is not None else (0, 0)
        each = 3 * spec.hidden_size * experts.size if experts is not None else 0
        return cls(
            layer_weights=sum(w.numbers for w in matrices) - layers * count * each,
            expert_layers=layers,
            experts=count,
            per_token=0 if experts is None else experts.per_token,
            expert_weights=each,
            head_weights=model.head.weight.numel() * (2 if spec.noise else 1),
            attention=AttentionCost.of(spec),
            weight_bytes=weight_bytes,
            matrix_bytes=weight_bytes if quantization is None else 1,
        )

    def flop(self, plan: StepPlan) -> int:
        """Floating-point operations of a step; a multiplication and an addition are two."""
        attention = sum(
            kind.flop * sum(attended_pairs(span, kind.window) for span in plan.spans)
            for kind in self.attention
        )
        return self.layer_flop(plan) + 2 * head_rows(plan) * self.head_weights + attention

    def layer_flop(self, plan: StepPlan) -> int:
        """Of these those of the layers' matrices, which may be quantized."""
        layers = self.layer_weights + self.expert_layers * self.per_token * self.expert_weights
        return 2 * plan.tokens * layers

    def uniform_experts(self, tokens: int) -> float:
        """Experts that so many tokens touch, all layers together, if each is as likely as another.

        Example:
            One layer of 4 experts, of which a token takes 2: 1 token touches 2, 2 tokens 3.
        """
        if not self.expert_layers:
            return 0.0
        missed: float = (1 - self.per_token / self.experts) ** tokens
        return self.expert_layers * self.experts * (1 - missed)

    def experts_of(self, plan: StepPlan, touched: Mapping[int, float]) -> float:
        """Experts that a step touches, all layers together; see ``bytes_read``."""
        tokens = plan.tokens
        return touched[tokens] if tokens in touched else self.uniform_experts(tokens)

    def bytes_read(self, plan: StepPlan, touched: Mapping[int, float] = NONE_COUNTED) -> int:
        """Bytes that a step has to read: of the weights once, of cached K,V for each row.

        Args:
            plan: of the step.
            touched: experts that steps of so many tokens touch, all layers together, as counted;
                for other steps see ``uniform_experts``.
        """
        head = self.head_weights if head_rows(plan) else 0
        cached = sum(
            kind.kv_values * sum(cached_keys(span, kind.window) for span in plan.spans)
            for kind in self.attention
        )
        experts = self.experts_of(plan, touched)
        layers = self.layer_weights + round(experts * self.expert_weights)
        return layers * self.matrix_bytes + (head + cached) * self.weight_bytes

    def floor_seconds(
        self,
        plans: Iterable[StepPlan],
        ceilings: Ceilings,
        touched: Mapping[int, float] = NONE_COUNTED,
    ) -> float:
        """Seconds that the steps take at least, one after the other; see ``bytes_read``."""
        return sum(
            max(
                self.compute_seconds(plan, ceilings),
                self.bytes_read(plan, touched) / ceilings.bytes_per_second,
            )
            for plan in plans
        )

    def compute_seconds(self, plan: StepPlan, ceilings: Ceilings) -> float:
        """Seconds that a step's operations take at least."""
        layers = self.layer_flop(plan)
        fast = ceilings.scaled_flop_per_second or ceilings.flop_per_second
        return layers / fast + (self.flop(plan) - layers) / ceilings.flop_per_second


@dataclass(frozen=True)
class Floor:
    """The roofline of a model on a device.

    Attributes:
        cost: of the model.
        ceilings: of the device.
        touched: experts that steps touch, see :meth:`ModelCost.bytes_read`.
    """

    cost: ModelCost
    ceilings: Ceilings
    touched: Mapping[int, float]

    def seconds(self, plans: Iterable[StepPlan]) -> float:
        """Seconds that the steps take at least, one after the other."""
        return self.cost.floor_seconds(plans, self.ceilings, self.touched)

    def experts(self, plans: Sequence[StepPlan], touched: Mapping[int, float]) -> float | None:
        """Experts that a step touches in a layer with experts, on average; None without experts."""
        if not self.cost.expert_layers or not plans:
            return None
        every = sum(self.cost.experts_of(plan, touched) for plan in plans)
        return every / len(plans) / self.cost.expert_layers


def cached_keys(span: Span, window: int = 0) -> int:
    """Cached keys that a span sees: those that it does not overwrite, and that are in its window.

    A layer with a window sees ``window - 1`` positions before a span that begins behind them.
    """
    found = span.ctx_len
    if span.store == Store.POSITIONS:  # a fresh key takes the slot of its position
        found -= max(min(span.ctx_len, span.q_start + span.q_len) - span.q_start, 0)
    return min(found, window - 1) if window else found


def attended_keys(span: Span, window: int = 0) -> int:
    """Keys that a span sees: cached ones it does not overwrite, and its own."""
    if span.store == Store.AHEAD:  # its own are in their slots before it attends
        return span.ctx_len
    return cached_keys(span, window) + span.q_len


def attended_pairs(span: Span, window: int = 0) -> int:
    """Pairs of a query of a span and a key that it sees.

    Example:
        >>> attended_pairs(Span(0, 2, 3, 2, Store.POSITIONS, mask=Mask.STAIR, mask_arg=1), window=4)
        11
    """
    keys = attended_keys(span, window)
    if span.mask != Mask.STAIR:
        return span.q_len * keys
    if window:  # causal: query p sees the last ``window`` positions up to its own
        last = span.q_start + span.q_len
        below = max(min(last, window) - span.q_start, 0)  # queries with fewer positions than that
        first = span.q_start + 1
        return below * first + below * (below - 1) // 2 + (span.q_len - below) * window
    # a query sees nothing behind its own block
    first, last, block = span.q_start, span.q_start + span.q_len, span.mask_arg
    pairs = span.q_len * keys
    for end in range((first // block + 1) * block, last, block):
        pairs -= (end - max(end - block, first)) * (last - end)
    return pairs


def head_rows(plan: StepPlan) -> int:
    """Rows of a step that go through the LM head."""
    return sum(entry.logit_rows for entry in plan.entries)


#: a smaller product says nothing about the device
_LEAST_MATRIX = 1024


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, quantization: str | None = None
) -> Ceilings:
    """Measure copy bandwidth and matrix product rate; medians, after a warm-up."""
    copy_bytes, size = _COPY_BYTES[device.type], _MATRIX[device.type]
    free = device_memory(device)[1]
    copy_bytes = min(copy_bytes, free // 8)  # two buffers, beside whatever else there is
    while size > _LEAST_MATRIX and 3 * size**2 * dtype.itemsize > free // 4:
        size //= 2
    copy, product = _copy_seconds(copy_bytes, device), _product_seconds(size, dtype, device)
    fast = None
    if quantization is not None:
        fast = 2 * size**3 / _scaled_seconds(size, dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine is about to plan with what is free
    return Ceilings(2 * copy_bytes / copy, 2 * size**3 / product, copy_bytes, size, fast)


def _copy_seconds(size: int, device: torch.device) -> float:
    # filled, because a CPU maps memory that was never written to one page of zeros
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(0)
    return _median_seconds(lambda: target.copy_(source), device)


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    # random, because zeros draw less power and run at higher clocks
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    return _median_seconds(lambda: torch.mm(left, right, out=out), device)


def _scaled_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (scaled(torch.randn(size, size, dtype=dtype, device=device)) for _ in range(2))
    return _median_seconds(lambda: library_product(left, right), device)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    for _ in range(_WARMUP):
        work()
    timed = _cuda_seconds if device.type == "cuda" else _host_seconds
    return statistics.median(timed(work, device) for _ in range(_REPEATS))


def _host_seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(work: Callable[[], object], device: torch.device) -> float:
    event: Any = torch.cuda.Event  # torch gives it no types
    with torch.cuda.device(device):
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
