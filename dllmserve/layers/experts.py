"""Experts: MLPs of which each token takes a few, in place of one MLP.

Ranks share them in one of two ways. Each expert's inner dimension is cut like an MLP's; or experts
are divided between ranks, and what a token's experts on all ranks give is summed over them.

In float32 the number of ranks changes no bit that is ours, see
:mod:`dllmserve.parallel.partition`. With cut experts, ranks join the inner rows of all pairs of a
token and an expert, compute some of the outputs each, and join those. With divided experts they
exchange the rows of all pairs, so that every rank adds up each token's rows in the order of its
choice; a sum of one row and zeros is that row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.kernels.e4m3 import Rows, Scaled
from dllmserve.layers.modules import Build, Mlp, Part
from dllmserve.layers.ops import Routed
from dllmserve.parallel.group import join

_ALL = slice(None)
_NAMES = ("gate_proj", "up_proj", "down_proj")


def _stacked(rows: Rows, count: int) -> Rows:
    """The rows of ``count`` matrices [count * n, k], or [count, .., k], as [count, n, k]."""
    if isinstance(rows, Scaled):
        return rows.stacked(count)
    return rows.view(count, -1, rows.shape[-1])


class Experts:
    """A router, its experts, and the expert that every token takes beside them, if there is one.

    That one is stored as one more expert where its width is the others' and experts are not
    divided between ranks; else it is an MLP.

    Args:
        build: that of the layer.
        experts: the model's.
        inside: what holds ``experts`` in the layer, in the checkpoint; "" for the layer itself.
        gate: name of the router's matrix in the layer; ``gate`` inside if it is not given.
        factors: name of what each expert's weights are multiplied by, if there is such a thing.
        stacked: ``gate_up_proj`` [E, 2m, d] and ``down_proj`` [E, d, m] hold those of all experts.
        bias: name of the router's bias in the layer.
        shared: name of the shared expert in the layer.

    Attributes:
        gate: [E, d], whole on every rank.
        bias: [E] float32, whole on every rank, or None.
        factors: [E], whole on every rank, or None.
        gate_up: [E', 2m, d] of the rank's experts: gate's rows of an expert, then up's.
        down: [E', d, m]; of some outputs alone where ranks cut it by rows.
        shared: an MLP, or None.
    """

    def __init__(
        self,
        build: Build,
        experts: ExpertSpec,
        *,
        inside: str = "mlp",
        gate: str = "",
        factors: str = "",
        stacked: bool = False,
        bias: str = "",
        shared: str = "",
    ) -> None:
        part = build.partition
        self._spec, self._ops, self._group = experts, build.ops, build.group
        self._activation = build.spec.activation
        self._exact, self._divided = part.exact, part.expert_parallel
        width, count = build.spec.hidden_size, experts.count
        router = f"{gate or f'{inside}.gate'}.weight"
        self.gate = build.weight(Part(router, (count, width), (_ALL, _ALL)))
        self.bias: Tensor | None = None
        self.factors: Tensor | None = None
        if factors:
            self.factors = build.weight(Part(factors, (count,), (_ALL,)), ones=True)
        if experts.bias:
            self.bias = build.weight(Part(bias, (count,), (_ALL,)), dtype=torch.float32)
        at = f"{inside}.experts" if inside else "experts"
        names = [f"{at}.{e}" for e in range(count)]
        self.shared: Mlp | None = None
        own = part.share(count) if self._divided else slice(0, count)
        self._held = range(own.start, own.stop)
        if experts.shared_size == experts.size and not self._divided:
            names.append(shared)
            self._held = range(count + 1)
        elif experts.shared_size:
            gate, up, down = (f"{shared}.{name}" for name in _NAMES)
            self.shared = Mlp(build, gate=gate, up=up, down=down, inner=experts.shared_size)
        if stacked:
            self._store_stacked(build, at)
        else:
            self._store(build, names)

    def _store(self, build: Build, names: list[str]) -> None:
        """Make the stacked weights of the experts with these names."""
        part, width, size = build.partition, build.spec.hidden_size, self._spec.size
        inner = _ALL if self._divided else part.share(size)
        into, out = (inner, _ALL), (_ALL, inner)
        if self._exact and not self._divided:
            out = (part.share(width), _ALL)  # by rows
        gate_up, down = [], []
        mine = self._held
        for number, name in enumerate(names):
            gate, up, below = (f"{name}.{matrix}.weight" for matrix in _NAMES)
            # of another rank's expert there are no rows
            cut = into if number in mine else (slice(0, 0), _ALL)
            gate_up += [Part(gate, (size, width), cut), Part(up, (size, width), cut)]
            cut = out if number in mine else (slice(0, 0), _ALL)
            down.append(Part(below, (width, size), cut))
        self.gate_up = _stacked(build.matrix(*gate_up), len(mine))
        self.down = _stacked(build.matrix(*down), len(mine))

    def _store_stacked(self, build: Build, name: str) -> None:
        """Make them of the two tensors that hold those of all experts."""
        part, width, size, mine = (
            build.partition,
            build.spec.hidden_size,
            self._spec.size,
            self._held,
        )
        count = self._spec.count
        inner = slice(0, size) if self._divided else part.share(size)
        halves = inner, slice(size + inner.start, size + inner.stop)
        shape, gate_up = (count, 2 * size, width), f"{name}.gate_up_proj"
        rows = build.matrix(
            *(Part(gate_up, shape, (slice(e, e + 1), half, _ALL)) for e in mine for half in halves)
        )
        self.gate_up = _stacked(rows, len(mine))
        by_rows = self._exact and not self._divided
        cut = (part.share(width), _ALL) if by_rows else (_ALL, inner)
        held = slice(mine.start, mine.stop)
        self.down = build.matrix(Part(f"{name}.down_proj", (count, width, size), (held, *cut)))

    def __call__(
        self, x: Tensor, windows: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """[N, d] -> [N, d].

        Args:
            x: [N, d] what the experts see.
            windows: [N] int64 numbers of the tokens' windows, all of whose tokens are here, if the
                experts have a capacity.
            seen: [N, d] what the router sees; x if it is not given.
        """
        routed = self._ops.route(
            *(x if seen is None else seen, self.gate, self.bias, self._spec, self._held),
            windows,
            self.factors,
        )
        if self._divided:
            out = self._from_all_ranks(x, routed)
        else:
            out = self._cut(x, routed)
        return out if self.shared is None else out + self.shared(x)

    def _cut(self, x: Tensor, routed: Routed) -> Tensor:
        """Of experts whose inner dimension is cut."""
        ops, group = self._ops, self._group
        inner = ops.expert_up(x, routed, self.gate_up, self._activation)
        if self._exact:
            inner = join(group, inner, 1)
        out = ops.combine(ops.expert_down(inner, routed, self.down), routed)
        if self._exact:
            return join(group, out, 1)
        return group.all_reduce(out)

    def _from_all_ranks(self, x: Tensor, routed: Routed) -> Tensor:
        """Of experts that are divided between ranks."""
        ops, group = self._ops, self._group
        inner = ops.expert_up(x, routed, self.gate_up, self._activation)
        rows = ops.expert_down(inner, routed, self.down)
        if not self._exact:
            return group.all_reduce(ops.combine(rows, routed))
        every = group.all_reduce(torch.where(routed.mine.view(-1, 1), rows, 0.0))
        return ops.combine(every, routed._replace(held=range(self._spec.count)))
