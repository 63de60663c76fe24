"""What models are composed of: weights; norm, matrices, embedding, LM head, attention, MLP.

A module says once of each of its weights which of the checkpoint's tensors it is made of, their
shapes and how ranks cut them. Sizes, loading, random weights and the forward all follow from that.
It takes its dimensions from the spec, and its names in the checkpoint from the model; ".weight" and
".bias" are added here. How ranks share it is its own matter, see
:mod:`dllmserve.parallel.partition`.

Modules are plain classes that hold plain tensors: calling a ``torch.nn.Module``, and looking up
what it holds, takes microseconds, and a step calls some hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.core.model_spec import ModelSpec
from dllmserve.kernels.e4m3 import E4M3, Rows, Scaled, fill
from dllmserve.layers.ops import Angles, HeadNorms, LayerOps
from dllmserve.parallel.group import Group, join
from dllmserve.parallel.partition import Partition
from dllmserve.parallel.vocab import VocabShard

_ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, and what a rank holds of it.

    Attributes:
        name, shape: in the checkpoint.
        cut: the rank's part of each dimension.

    Example:
        >>> Part("up.weight", (6, 4), (slice(2, 4), slice(None))).held
        (2, 4)

    A tensor may have several parts, such as the rows of q, of k and of v in one packed matrix;
    and a rank may hold none of a part, which is then cut to no rows.
    """

    name: str
    shape: tuple[int, ...]
    cut: tuple[slice, ...]

    @property
    def held(self) -> tuple[int, ...]:
        """Shape of what the rank holds."""
        return tuple(len(range(n)[part]) for n, part in zip(self.shape, self.cut, strict=True))


@dataclass(frozen=True)
class Weight:
    """Tensors of the checkpoint below each other.

    Attributes:
        data: [rows of all parts, ...], or those in e4m3.
        parts: the tensors, from the first row on.
        ones: what it holds in a model without a checkpoint: ones, or random numbers.
    """

    data: Rows
    parts: tuple[Part, ...]
    ones: bool

    @property
    def numbers(self) -> int:
        """How many it has, factors of rows not counted."""
        return self.data.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are in, or are made of."""
        return self.data.dtype

    def places(self) -> Iterator[tuple[Part, Rows]]:
        """Each part, and the rows of ``data`` where it belongs."""
        counts = [part.held[0] for part in self.parts]
        if not isinstance(self.data, Scaled):
            return zip(self.parts, torch.split(self.data, counts), strict=True)
        data, scale = (torch.split(x, counts) for x in self.data[:2])
        kind = self.data.dtype
        rows = (Scaled(d, s, kind) for d, s in zip(data, scale, strict=True))
        return zip(self.parts, rows, strict=True)


def put(to: Rows, source: Tensor) -> None:
    """Copy rows of a checkpoint into their place."""
    if isinstance(to, Scaled):
        fill(to, source)
    else:
        to.copy_(source)


@dataclass(frozen=True)
class Build:
    """What the modules of a rank's model are made with.

    Attributes:
        partition: the model's dimensions, the ranks, and this rank's share.
        dtype, device: of the weights.
        ops: the operations that the modules are made of.
        quantization: "fp8" has matrices in e4m3, see :mod:`dllmserve.kernels.e4m3`; None none.
        prefix: what the names of weights in the checkpoint begin with.
        weights: of the modules made so far.
        ignored: parts of names of tensors that a checkpoint may hold and that nothing needs.
    """

    partition: Partition
    dtype: torch.dtype
    device: torch.device
    ops: LayerOps
    quantization: str | None = None
    prefix: str = ""
    weights: list[Weight] = field(default_factory=list)
    ignored: list[str] = field(default_factory=lambda: ["rotary_emb"])

    @property
    def spec(self) -> ModelSpec:
        """Dimensions of the whole model."""
        return self.partition.spec

    @property
    def group(self) -> Group:
        """The ranks that share the model."""
        return self.partition.group

    @property
    def vocab(self) -> VocabShard:
        """This rank's ids."""
        return self.partition.vocab

    def inside(self, name: str) -> Build:
        """For the modules of a module of that name in the checkpoint."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def weight(self, *parts: Part, ones: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised weight of parts that differ in their rows alone, see :class:`Weight`."""
        shape = (sum(part.held[0] for part in parts), *parts[0].held[1:])
        data = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        named = tuple(replace(part, name=self.prefix + part.name) for part in parts)
        self.weights.append(Weight(data, named, ones))
        return data

    def matrix(self, *parts: Part) -> Rows:
        """An uninitialised weight that products are made with, in eight bits if that is asked for.

        Its last dimension is what is summed over.
        """
        if self.quantization is None:
            return self.weight(*parts)
        data = self.weight(*parts, dtype=E4M3)
        scale = torch.empty(data.shape[:-1], dtype=torch.float32, device=self.device)
        whole = Scaled(data, scale, self.dtype)
        self.weights[-1] = replace(self.weights[-1], data=whole)
        return whole


class RMSNorm:
    """``x / rms(x) * weight``, together with the addition before it; whole on every rank."""

    def __init__(self, build: Build, name: str) -> None:
        part = Part(f"{name}.weight", (build.spec.hidden_size,), (_ALL,))
        self.weight = build.weight(part, ones=True)
        self._eps, self._add_norm = build.spec.norm_eps, build.ops.add_norm
        #: whether what reads the norm takes it in e4m3
        self.scales = False

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Rows, Tensor]:
        """The norm of ``h = residual + x``, and h, both [N, d]; without a residual h is x."""
        return self._add_norm(x, residual, self.weight, self._eps, self.scales)


class Linear:
    """``x @ W.T + b``; each rank computes its share of the outputs.

    Matrices that are multiplied with the same x are one weight, and so one product.

    Args:
        build: the rank's.
        inputs: width of x.
        outputs: rows of each matrix, by its name.
        bias: whether each matrix has one.
        packed: the name of the one matrix in which all of them lie below each other; "" if each is
            a matrix by itself.
        by_columns: cut the inputs instead, see :class:`JoinedLinear`.
    """

    def __init__(
        self,
        build: Build,
        inputs: int,
        outputs: Mapping[str, int],
        *,
        bias: bool = False,
        packed: str = "",
        by_columns: bool = False,
    ) -> None:
        share = build.partition.share
        matrices, biases, above = [], [], 0
        for name, rows in outputs.items():
            mine = share(rows)
            cut = (_ALL, share(inputs)) if by_columns else (mine, _ALL)
            height = rows
            if packed:
                name, height = packed, sum(outputs.values())
                cut = (slice(above + mine.start, above + mine.stop), _ALL)
                above += rows
            matrices.append(Part(f"{name}.weight", (height, inputs), cut))
            biases.append(Part(f"{name}.bias", (height,), cut[:1]))
        self.weight = build.matrix(*matrices)
        self.bias = build.weight(*biases) if bias else None
        self._product = build.ops.linear

    @property
    def scales(self) -> bool:
        """Whether its product is one of numbers in e4m3."""
        return isinstance(self.weight, Scaled)

    def __call__(self, x: Rows) -> Tensor:
        """[N, inputs] -> [N, this rank's outputs], those of one matrix after the other's."""
        return self._product(x, self.weight, self.bias)


class JoinedLinear(Linear):
    """``x @ W.T`` of the whole matrix on every rank, from each rank's share of x and of W."""

    def __init__(
        self, build: Build, inputs: int, outputs: int, name: str, *, bias: bool = False
    ) -> None:
        self._exact, self._group = build.partition.exact, build.group
        super().__init__(build, inputs, {name: outputs}, bias=bias, by_columns=not self._exact)
        if self._group.rank and not self._exact:
            self.bias = None  # the first rank adds it to the sum

    def __call__(self, x: Rows) -> Tensor:
        """[N, this rank's inputs] -> [N, outputs]."""
        group = self._group
        if group.size == 1:
            return super().__call__(x)
        if self._exact and isinstance(x, Tensor):
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

    Args:
        build: the rank's.
        layer: its index, by which the context finds its K and V.
        q, k, v, out: names of the matrices.
        packed: name of the one matrix that q, k and v are rows of, if they are.
        norms: names of the norms over each head of the queries and of the keys, if there are any;
            whole on every rank.
        wide: these cast behind the weight, and each head of the values is normalised as well,
            without one (Gemma).
    """

    def __init__(
        self,
        build: Build,
        layer: int,
        *,
        out: str,
        q: str = "q",
        k: str = "k",
        v: str = "v",
        packed: str = "",
        norms: tuple[str, str] | None = None,
        wide: bool = False,
    ) -> None:
        spec, own, self._ops = build.spec, build.spec.layers[layer], build.ops
        heads, kv_heads = (n // build.group.size for n in (spec.num_heads, own.num_kv_heads))
        width, kv = spec.num_heads * own.head_dim, own.num_kv_heads * own.head_dim
        matrices = {q: width, k: kv} | ({} if own.key_is_value else {v: kv})
        self.qkv = Linear(build, spec.hidden_size, matrices, bias=spec.qkv_bias, packed=packed)
        self.norms: HeadNorms | None = None
        if norms is not None:
            parts = [Part(f"{name}.weight", (own.head_dim,), (_ALL,)) for name in norms]
            of_q, of_k = (build.weight(part, ones=True) for part in parts)
            self.norms = HeadNorms(of_q, of_k, heads, spec.norm_eps, wide)
        self.out = JoinedLinear(build, width, spec.hidden_size, out, bias=spec.out_bias)
        self._layer = layer
        self._heads, self._head_dim = heads, own.head_dim
        self._rotated = heads + kv_heads
        #: behind which the values are: the keys themselves, before anything is done to them
        self._behind = heads if own.key_is_value else self._rotated
        self._value_eps = spec.norm_eps if wide else None

    def __call__(
        self,
        x: Rows,  # [N, d]
        angles: Angles,
        context: AttentionContext,
        rows: Tensor | None,  # [M] int64
    ) -> Tensor:
        """[N, d], or [M, d] of the tokens ``rows``; K and V of all N are stored in any case."""
        heads, count = self._heads, self._rotated
        vectors = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        v = vectors[:, self._behind :]
        if self._value_eps is not None:
            v = self._ops.wide_norm(v, None, self._value_eps)  # before keys are changed in place
        turned = self._ops.rotate(vectors, count, angles, self.norms)  # q and k together
        q = self._ops.scale_queries(turned[:, :heads], angles)
        flat = context.attend(self._layer, q, turned[:, heads:], v).reshape(
            x.shape[0], heads * self._head_dim
        )
        return self.out(flat if rows is None else flat[rows])


class Mlp:
    """``down(act(gate(x)) * up(x))``; a rank has a share of the inner dimension.

    Args:
        build: the rank's.
        gate, up, down: names of the matrices.
        inner: the inner dimension; the model's ``mlp_size`` if it is not given.
    """

    def __init__(
        self, build: Build, *, gate: str, up: str, down: str, inner: int | None = None
    ) -> None:
        width, inner = build.spec.hidden_size, inner or build.spec.mlp_size
        self.gate_up = Linear(build, width, {gate: inner, up: inner})
        self.down = JoinedLinear(build, inner, width, down)
        self._gated, self._activation = build.ops.gated, build.spec.activation

    def __call__(self, x: Rows) -> Tensor:
        """[N, d] -> [N, d]."""
        wide = self.gate_up(x)
        return self.down(self._gated(wide, self._activation, self.down.scales))
