"""What models are composed of: norm, matrices, embedding, LM head, attention, MLP.

A module takes its dimensions from the spec, and its names in the checkpoint from the model;
".weight" and ".bias" are added here. How ranks share it is its own matter, see
:mod:`dllmserve.parallel.partition`.

Modules are plain classes that hold plain tensors: calling a ``torch.nn.Module``, and looking up
what it holds, takes microseconds, and a step calls some hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from dllmserve.layers.ops import Angles
from dllmserve.layers.weight import Build, Part
from dllmserve.parallel.group import join

_ALL = slice(None)


class RMSNorm:
    """``x / rms(x) * weight``, together with the addition before it; whole on every rank."""

    def __init__(self, build: Build, name: str) -> None:
        part = Part(f"{name}.weight", (build.spec.hidden_size,), (_ALL,))
        self.weight = build.weight(part, ones=True)
        self._eps, self._add_norm = build.spec.norm_eps, build.ops.add_norm

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of ``h = residual + x``, and h, both [N, d]; without a residual h is x."""
        return self._add_norm(x, residual, self.weight, self._eps)


class Linear:
    """``x @ W.T + b``; each rank computes its share of the outputs.

    Matrices that are multiplied with the same x are one weight, and so one product.

    Args:
        build: the rank's.
        inputs: width of x.
        outputs: rows of each matrix, by its name.
        bias: whether each matrix has one.
        by_columns: cut the inputs instead, see :class:`JoinedLinear`.
    """

    def __init__(
        self,
        build: Build,
        inputs: int,
        outputs: Mapping[str, int],
        *,
        bias: bool = False,
        by_columns: bool = False,
    ) -> None:
        share = build.partition.share
        matrices, biases = [], []
        for name, rows in outputs.items():
            cut = (_ALL, share(inputs)) if by_columns else (share(rows), _ALL)
            matrices.append(Part(f"{name}.weight", (rows, inputs), cut))
            biases.append(Part(f"{name}.bias", (rows,), cut[:1]))
        self.weight = build.weight(*matrices)
        self.bias = build.weight(*biases) if bias else None
        self._product = build.ops.linear

    def __call__(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, this rank's outputs], those of one matrix after the other's."""
        return self._product(x, self.weight, self.bias)


class JoinedLinear(Linear):
    """``x @ W.T`` of the whole matrix on every rank, from each rank's share of x and of W."""

    def __init__(self, build: Build, inputs: int, outputs: int, name: str) -> None:
        self._exact, self._group = build.partition.exact, build.group
        super().__init__(build, inputs, {name: outputs}, by_columns=not self._exact)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, this rank's inputs] -> [N, outputs]."""
        group = self._group
        if group.size == 1:
            return super().__call__(x)
        if self._exact:
            return join(group, super().__call__(join(group, x, 1)), 1)
        return group.all_reduce(super().__call__(x))


def _table(build: Build, name: str) -> Tensor:
    """A weight with a row for each of this rank's ids: [v, d]."""
    shape = (build.spec.embedding_size, build.spec.hidden_size)
    mine = slice(build.vocab.start, build.vocab.stop)
    return build.weight(Part(f"{name}.weight", shape, (mine, _ALL)))


class Embedding:
    """Ids to vectors."""

    def __init__(self, build: Build, name: str) -> None:
        self.weight = _table(build, name)
        self._vocab, self._group = build.vocab, build.group

    def __call__(self, ids: Tensor) -> Tensor:
        """[N] int64 -> [N, d]; every vector comes from the one rank that has it."""
        if self._group.size == 1:
            return F.embedding(ids, self.weight)
        columns, mine = self._vocab.locate(ids)
        found = F.embedding(columns, self.weight).masked_fill(~mine[:, None], 0.0)
        return self._group.all_reduce(found)


class Head:
    """The LM head's weight [v, d], the embedding's if they are tied; the runtime applies it."""

    def __init__(self, build: Build, name: str, embedding: Embedding) -> None:
        tied = build.spec.tied_head
        self.weight = embedding.weight if tied else _table(build, name)
        if tied:  # of which checkpoints may hold a second copy
            build.ignored.append(f"{build.prefix}{name}.weight")


class AttentionContext(Protocol):
    """What a model's forward needs from the step: attention with its cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q [N, Hq, D], k and v [N, Hkv, D] (rotated) -> [N, Hq, D]."""
        ...


class Attention:
    """Heads with rotated queries and keys; the context attends. A rank has a share of the heads.

    ``layer`` is the layer's index, by which the context finds its K and V.
    """

    def __init__(self, build: Build, layer: int, *, q: str, k: str, v: str, out: str) -> None:
        spec, local = build.spec, build.partition.local
        width, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(build, spec.hidden_size, {q: width, k: kv, v: kv}, bias=spec.qkv_bias)
        self.out = JoinedLinear(build, width, spec.hidden_size, out)
        self._layer, self._rotate = layer, build.ops.rotate
        self._heads, self._head_dim = local.num_heads, spec.head_dim
        self._rotated = local.num_heads + local.num_kv_heads

    def __call__(
        self,
        x: Tensor,  # [N, d]
        angles: Angles,
        context: AttentionContext,
        rows: Tensor | None,  # [M] int64
    ) -> Tensor:
        """[N, d], or [M, d] of the tokens ``rows``; K and V of all N are stored in any case."""
        heads, count = self._heads, self._rotated
        vectors = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        turned = self._rotate(vectors, count, angles)  # q and k together
        q, k, v = turned[:, :heads], turned[:, heads:], vectors[:, count:]
        flat = context.attend(self._layer, q, k, v).reshape(x.shape[0], heads * self._head_dim)
        return self.out(flat if rows is None else flat[rows])


class Mlp:
    """``down(silu(gate(x)) * up(x))``; a rank has a share of the inner dimension."""

    def __init__(self, build: Build, *, gate: str, up: str, down: str) -> None:
        width, inner = build.spec.hidden_size, build.spec.mlp_size
        self.gate_up = Linear(build, width, {gate: inner, up: inner})
        self.down = JoinedLinear(build, inner, width, down)
        self._silu_mul = build.ops.silu_mul

    def __call__(self, x: Tensor) -> Tensor:
        """[N, d] -> [N, d]."""
        return self.down(self._silu_mul(self.gate_up(x)))
