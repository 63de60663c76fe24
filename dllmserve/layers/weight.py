"""Weights: which of the checkpoint's tensors they are made of, and a rank's part of each.

A module says once of each of its weights which tensors it is made of, their shapes and how
ranks cut them. Sizes, loading, random weights and the forward all follow from that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.layers.ops import LayerOps
from dllmserve.parallel.group import Group
from dllmserve.parallel.partition import Partition
from dllmserve.parallel.vocab import VocabShard


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, and what a rank holds of it.

    Attributes:
        name, shape: in the checkpoint.
        cut: the rank's part of each dimension.

    Example:
        >>> Part("up.weight", (6, 4), (slice(2, 4), slice(None))).held
        (2, 4)
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
        data: [rows of all parts, ...].
        parts: the tensors, from the first row on.
        ones: what it holds in a model without a checkpoint: ones, or random numbers.
    """

    data: Tensor
    parts: tuple[Part, ...]
    ones: bool

    def places(self) -> Iterator[tuple[Part, Tensor]]:
        """Each part, and the rows of ``data`` where it belongs."""
        rows = torch.split(self.data, [part.held[0] for part in self.parts])
        return zip(self.parts, rows, strict=True)


@dataclass(frozen=True)
class Build:
    """What the modules of a rank's model are made with.

    Attributes:
        partition: the model's dimensions, the ranks, and this rank's share.
        dtype, device: of the weights.
        ops: the operations that the modules are made of.
        prefix: what the names of weights in the checkpoint begin with.
        weights: of the modules made so far.
        ignored: parts of names of tensors that a checkpoint may hold and that nothing needs.
    """

    partition: Partition
    dtype: torch.dtype
    device: torch.device
    ops: LayerOps
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

    def weight(self, *parts: Part, ones: bool = False) -> Tensor:
        """An uninitialised weight of parts that differ in their rows alone, see :class:`Weight`."""
        shape = (sum(part.held[0] for part in parts), *parts[0].held[1:])
        data = torch.empty(shape, dtype=self.dtype, device=self.device)
        named = tuple(replace(part, name=self.prefix + part.name) for part in parts)
        self.weights.append(Weight(data, named, ones))
        return data
