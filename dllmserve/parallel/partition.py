"""Partition: which part of a model's weights and state a rank holds.

Attention is cut by heads, the MLP by its inner dimension, embedding and LM head by the
vocabulary. What follows attention and the MLP's activation is cut in one of two ways:

- by columns (half precision): each rank multiplies what it has, and the products are summed
  over ranks (Megatron-LM, arXiv 1909.08053). Two exchanges a layer.
- by rows (float32): each rank gathers the whole input and computes some of the outputs. Then
  every output is one dot product on one rank, whatever their number, so the number of ranks
  changes no bit where the product's own order of summation is fixed. Four exchanges a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import ConfigError
from dllmserve.parallel.group import SOLO, Group
from dllmserve.parallel.vocab import VocabShard, splits_of


@dataclass(frozen=True)
class Partition:
    """A rank's share of a model.

    Args:
        spec: the whole model.
        group: this rank, of so many.
        exact: cut by rows, see above.

    Raises:
        ConfigError: the model cannot be shared by so many.
    """

    spec: ModelSpec
    group: Group = SOLO
    exact: bool = True

    def __post_init__(self) -> None:
        spec, size = self.spec, self.group.size
        if not divides(spec, size):
            raise ConfigError(
                f"tensor_parallel_size={size} does not fit the model: it has to divide "
                f"{spec.num_heads} heads, {spec.num_kv_heads} K,V heads, hidden size "
                f"{spec.hidden_size} and MLP size {spec.mlp_size}, and to leave each rank one of "
                f"{splits_of(spec.embedding_size)} parts of the vocabulary; what works: "
                f"{', '.join(map(str, sizes(spec)))}"
            )

    @cached_property
    def local(self) -> ModelSpec:
        """Dimensions of the share: heads, K,V heads, MLP, embedding rows; weights not counted."""
        return replace(
            self.spec,
            num_heads=self.spec.num_heads // self.group.size,
            num_kv_heads=self.spec.num_kv_heads // self.group.size,
            mlp_size=self.spec.mlp_size // self.group.size,
            embedding_size=self.vocab.stop - self.vocab.start,
            weights=0,
        )

    @property
    def vocab(self) -> VocabShard:
        """This rank's rows of the embedding and of the LM head."""
        return VocabShard(self.spec.embedding_size, self.group)

    def share(self, length: int) -> slice:
        """This rank's part of so many heads, rows or columns."""
        share, rank = length // self.group.size, self.group.rank
        return slice(rank * share, (rank + 1) * share)


def divides(spec: ModelSpec, size: int) -> bool:
    """Whether so many ranks can share the model."""
    whole = (spec.num_heads, spec.num_kv_heads, spec.hidden_size, spec.mlp_size)
    return not any(n % size for n in whole) and size <= splits_of(spec.embedding_size)


def sizes(spec: ModelSpec) -> list[int]:
    """Every tensor_parallel_size that the model can have."""
    return [n for n in range(1, spec.num_kv_heads + 1) if divides(spec, n)]
