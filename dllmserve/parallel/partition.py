"""Partition: which part of a model's weights and state a rank holds.

Attention is cut by heads, an MLP and each expert by its inner dimension (or experts are divided
between ranks, see :mod:`dllmserve.layers.experts`), embedding and LM head by the vocabulary. What
follows attention and the MLP's activation is cut in one of two ways:

- by columns (half precision): each rank multiplies what it has, and the products are summed
  over ranks (Megatron-LM, arXiv 1909.08053). Two exchanges a layer.
- by rows (float32): each rank gathers the whole input and computes some of the outputs. Then
  every output is one dot product on one rank, whatever their number, so the number of ranks
  changes no bit where the product's own order of summation is fixed. Four exchanges a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from dllmserve.core.model_spec import ExpertSpec, ModelSpec
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
        expert_parallel: ranks divide experts between them, in place of cutting each.

    Raises:
        ConfigError: the model cannot be shared by so many.
    """

    spec: ModelSpec
    group: Group = SOLO
    exact: bool = True
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        spec, size = self.spec, self.group.size
        if self.expert_parallel and spec.experts is None:
            raise ConfigError(
                f"expert_parallel=True divides experts, of which {spec.architecture} has none: "
                "leave it out"
            )
        if not divides(spec, size, self.expert_parallel):
            raise ConfigError(
                f"tensor_parallel_size={size} does not fit the model: it has to divide "
                f"{spec.num_heads} heads, {_kv_heads_names(spec)} K,V heads, hidden size "
                f"{spec.hidden_size}, {_inner_names(spec, self.expert_parallel)}, and to leave "
                f"each rank one of {splits_of(spec.embedding_size)} parts of the vocabulary; what "
                f"works: {', '.join(map(str, sizes(spec, self.expert_parallel)))}"
            )

    @cached_property
    def local(self) -> ModelSpec:
        """Dimensions of the share: heads, K,V heads, MLP, embedding rows; weights not counted."""
        return replace(
            self.spec,
            num_heads=self.spec.num_heads // self.group.size,
            num_kv_heads=self.spec.num_kv_heads // self.group.size,
            attention=tuple(
                replace(layer, num_kv_heads=layer.num_kv_heads // self.group.size)
                for layer in self.spec.attention
            ),
            mlp_size=self.spec.mlp_size // self.group.size,
            experts=self._experts(),
            embedding_size=self.vocab.stop - self.vocab.start,
            weights=0,
        )

    def _experts(self) -> ExpertSpec | None:
        """Dimensions of the rank's experts."""
        experts, size = self.spec.experts, self.group.size
        if experts is None:
            return None
        shared = experts.shared_size // size
        if self.expert_parallel:
            return replace(experts, count=experts.count // size, shared_size=shared)
        return replace(experts, size=experts.size // size, shared_size=shared)

    @property
    def vocab(self) -> VocabShard:
        """This rank's rows of the embedding and of the LM head."""
        return VocabShard(self.spec.embedding_size, self.group)

    def share(self, length: int) -> slice:
        """This rank's part of so many heads, rows or columns."""
        share, rank = length // self.group.size, self.group.rank
        return slice(rank * share, (rank + 1) * share)


def _inner(spec: ModelSpec, expert_parallel: bool) -> dict[str, int]:
    """What ranks divide of MLPs and experts, by its name."""
    experts = spec.experts
    if experts is None:
        return {"MLP size": spec.mlp_size}
    number = {"number of experts": experts.count} if expert_parallel else {}
    sizes = {
        "MLP size": 0 if experts.everywhere else spec.mlp_size,
        "expert size": 0 if expert_parallel else experts.size,
        "shared expert's size": experts.shared_size,
    }
    return number | {name: size for name, size in sizes.items() if size}


def _inner_names(spec: ModelSpec, expert_parallel: bool) -> str:
    return ", ".join(f"{name} {size}" for name, size in _inner(spec, expert_parallel).items())


def _kv_heads(spec: ModelSpec) -> set[int]:
    """Numbers of K,V heads of the layers."""
    return {layer.num_kv_heads for layer in spec.layers}


def _kv_heads_names(spec: ModelSpec) -> str:
    return " and ".join(map(str, sorted(_kv_heads(spec))))


def divides(spec: ModelSpec, size: int, expert_parallel: bool = False) -> bool:
    """Whether so many ranks can share the model."""
    inner = _inner(spec, expert_parallel).values()
    whole = (spec.num_heads, *_kv_heads(spec), spec.hidden_size, *inner)
    return not any(n % size for n in whole) and size <= splits_of(spec.embedding_size)


def sizes(spec: ModelSpec, expert_parallel: bool = False) -> list[int]:
    """Every tensor_parallel_size that the model can have."""
    most = min(_kv_heads(spec))
    return [n for n in range(1, most + 1) if divides(spec, n, expert_parallel)]
