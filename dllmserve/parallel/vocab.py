"""VocabShard: which part of the vocabulary a rank holds, and how parts are put together.

The vocabulary is cut into splits, whose number does not depend on the number of ranks, and a
rank holds whole splits. What is summed over a row of logits is summed split by split, and the
sums of all splits are then joined in one order: so of the same logits the result is the same,
bit for bit, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.parallel.group import SOLO, Group

#: splits of a large vocabulary, of which so many ranks can have a share
SPLITS = 16
#: what the ids in a split are a multiple of, so that no tile of a product lies in two parts; in a
#: vocabulary of some size, rows of half precision begin at cache lines, too
_ALIGNED, _LINE, _LARGE = 32, 64, 4096


def split_width(size: int) -> int:
    """Ids in a split of a vocabulary of ``size`` ids; the last may have fewer.

    Example:
        >>> split_width(126464), split_width(300)
        (7936, 32)
    """
    aligned = _LINE if size >= _LARGE else _ALIGNED
    return -(-size // (SPLITS * aligned)) * aligned


def splits_of(size: int) -> int:
    """Splits of a vocabulary of ``size`` ids."""
    return -(-size // split_width(size))


def first_split(size: int, rank: int, ranks: int) -> int:
    """First split of a rank; that of rank ``ranks`` is the number of splits."""
    return splits_of(size) * rank // ranks


def first_id(size: int, rank: int, ranks: int) -> int:
    """First id of a rank; that of rank ``ranks`` is the size of the vocabulary."""
    return min(first_split(size, rank, ranks) * split_width(size), size)


@dataclass(frozen=True)
class VocabShard:
    """A rank's part of the vocabulary.

    Args:
        size: ids of the whole vocabulary.
        group: the ranks that share it.

    Attributes:
        width: ids in a split.
        start, stop: this rank's ids.

    Example:
        >>> shard = VocabShard(300)
        >>> shard.start, shard.stop
        (0, 300)
    """

    size: int
    group: Group = SOLO
    width: int = field(init=False)
    start: int = field(init=False)
    stop: int = field(init=False)

    def __post_init__(self) -> None:
        rank, ranks = self.group.rank, self.group.size
        object.__setattr__(self, "width", split_width(self.size))
        object.__setattr__(self, "start", first_id(self.size, rank, ranks))
        object.__setattr__(self, "stop", first_id(self.size, rank + 1, ranks))

    @property
    def ranks(self) -> int:
        """Ranks that share the vocabulary."""
        return self.group.size

    @property
    def counts(self) -> list[int]:
        """Splits of each rank."""
        firsts = [first_split(self.size, r, self.ranks) for r in range(self.ranks + 1)]
        return [b - a for a, b in pairwise(firsts)]

    def ids(self, columns: int, device: torch.device) -> Tensor:
        """Ids of the first ``columns`` columns of this rank's logits: [columns] int64."""
        return torch.arange(self.start, self.start + columns, device=device)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ids of any shape, and which of them this rank holds.

        What it does not hold gets some other column, not the same for all.
        """
        inside = (ids >= self.start) & (ids < self.stop)
        return (ids - self.start) % (self.stop - self.start), inside

    def split(self, z: Tensor, fill: float) -> Tensor:
        """Logits [n, V of this rank] by split: [n, S, width], with ``fill`` behind the end."""
        missing = -z.shape[1] % self.width
        if missing:
            z = F.pad(z, (0, missing), value=fill)
        return z.view(len(z), -1, self.width)

    def join(self, parts: Tensor) -> Tensor:
        """What each rank has of its splits [n, f, S], for all splits: [n, f, all S]."""
        if self.ranks == 1:
            return parts
        counts = self.counts
        most = max(counts)
        if parts.shape[2] < most:
            parts = F.pad(parts, (0, most - parts.shape[2]))
        found = self.group.all_gather(parts)
        return torch.cat([found[r, :, :, :c] for r, c in enumerate(counts)], dim=2)

    def join_logits(self, z: Tensor) -> Tensor:
        """The whole rows of logits [n, V], from this rank's columns [n, V of this rank]."""
        bounds = [first_id(self.size, r, self.ranks) for r in range(self.ranks + 1)]
        widths = [b - a for a, b in pairwise(bounds)]
        found = self.group.all_gather(F.pad(z, (0, max(widths) - z.shape[1])))
        return torch.cat([found[r, :, :w] for r, w in enumerate(widths)], dim=1)


def best_of(scores: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """The values of the best-scoring rank.

    Args:
        scores: [ranks, n]; the first of equal ones wins, and NaN counts as the largest.
        values: [ranks, n] each.

    Returns:
        [n] each.
    """
    winner = scores.argmax(dim=0, keepdim=True)
    return [value.gather(0, winner)[0] for value in values]
