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

from dataclasses import dataclass, field, replace

from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import ConfigError
from dllmserve.parallel.vocab import first_id, splits_of

#: rows and columns of a whole parameter
Cut = tuple[slice, slice]
_ALL = slice(None)


@dataclass(frozen=True)
class Partition:
    """A rank's share of a model.

    Args:
        spec: the whole model.
        rank, size: this rank, of so many.
        exact: cut by rows, see above.

    Attributes:
        local: dimensions of the share: heads, K,V heads, MLP and embedding rows.

    Raises:
        ConfigError: the model cannot be shared by so many.
    """

    spec: ModelSpec
    rank: int = 0
    size: int = 1
    exact: bool = True
    local: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        spec, size = self.spec, self.size
        if not divides(spec, size):
            raise ConfigError(
                f"tensor_parallel_size={size} does not fit the model: it has to divide "
                f"{spec.num_heads} heads, {spec.num_kv_heads} K,V heads, hidden size "
                f"{spec.hidden_size} and MLP size {spec.mlp_size}, and to leave each rank one of "
                f"{splits_of(spec.embedding_size)} parts of the vocabulary; what works: "
                f"{', '.join(map(str, sizes(spec)))}"
            )
        start, stop = self._vocab
        object.__setattr__(
            self,
            "local",
            replace(
                spec,
                num_heads=spec.num_heads // size,
                num_kv_heads=spec.num_kv_heads // size,
                mlp_size=spec.mlp_size // size,
                embedding_size=stop - start,
            ),
        )

    @property
    def _vocab(self) -> tuple[int, int]:
        size = self.spec.embedding_size
        return first_id(size, self.rank, self.size), first_id(size, self.rank + 1, self.size)

    def cuts(self, kind: str) -> list[Cut]:
        """The parts of a whole parameter that this rank holds, to be put below each other.

        Args:
            kind: "embed", "head", "qkv", "qkv_bias", "out", "gate_up", "down", or a norm.
        """
        spec = self.spec
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        if kind in ("embed", "head"):
            return [(slice(*self._vocab), _ALL)]
        if kind in ("qkv", "qkv_bias"):
            return [(self._part(start, n), _ALL) for start, n in ((0, q), (q, kv), (q + kv, kv))]
        if kind == "gate_up":
            return [(self._part(start, spec.mlp_size), _ALL) for start in (0, spec.mlp_size)]
        if kind in ("out", "down"):
            if self.exact:
                return [(self._part(0, spec.hidden_size), _ALL)]
            return [(_ALL, self._part(0, q if kind == "out" else spec.mlp_size))]
        return [(_ALL, _ALL)]

    def _part(self, start: int, length: int) -> slice:
        """This rank's part of ``length`` rows or columns from ``start`` on."""
        share = length // self.size
        return slice(start + self.rank * share, start + (self.rank + 1) * share)


def divides(spec: ModelSpec, size: int) -> bool:
    """Whether so many ranks can share the model."""
    whole = (spec.num_heads, spec.num_kv_heads, spec.hidden_size, spec.mlp_size)
    return not any(n % size for n in whole) and size <= splits_of(spec.embedding_size)


def sizes(spec: ModelSpec) -> list[int]:
    """Every tensor_parallel_size that the model can have."""
    return [n for n in range(1, spec.num_kv_heads + 1) if divides(spec, n)]
