"""Log-probabilities of rows of logits, for requests that ask for them.

They are of the model's own distribution: after guidance, before bias and other edits, temperature,
top-p and top-k, and over all rows of the LM head, so they can be compared between requests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllmserve.decoding.stats import log_total
from dllmserve.parallel.vocab import VocabShard

#: numbers of likeliest tokens that a step may work out; each makes steps of another shape
_SIZES = (0, 5, 20)
_LOW = 0xFFFFFFFF
_SIGN = 0x7FFFFFFF


class Wanted(NamedTuple):
    """What is wanted of rows, and so the columns of :func:`row_logprobs`.

    Attributes:
        likely: of so many of the likeliest tokens.
        candidates: of so many tokens that the request names.
    """

    likely: int
    candidates: int = 0

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return 2 + 2 * self.likely + self.candidates


def rounded(likely: int) -> int:
    """The number of likeliest tokens that is worked out where so many are wanted.

    Example:
        >>> [rounded(k) for k in (0, 1, 5, 6, 20)]
        [0, 5, 5, 20, 20]
    """
    return next((size for size in _SIZES if size >= likely), likely)


def row_logprobs(
    z: Tensor,  # [n, v] logits of this rank's ids
    token: Tensor,  # [n] int64
    wanted: Wanted,
    candidates: Tensor | None,  # [n, wanted.candidates] int64 ids, -1 for none
    shard: VocabShard,
) -> Tensor:
    """Natural logarithms of probabilities.

    Returns:
        [n, wanted.columns] float64: the token, its logarithm, the ids of the likeliest tokens (-1
        behind the last one of a small vocabulary), their logarithms, those of the candidates.
        Ties go to the lower id.
    """
    z = z.float()
    total = log_total(z, shard)  # [n, 1] float64
    parts = [token[:, None].double(), _values(z, token[:, None], shard) - total]
    if wanted.likely:
        ids, values = _likeliest(z, wanted.likely, shard)
        parts += [ids.double(), values.double() - total]
    if wanted.candidates and candidates is not None:
        parts.append(_values(z, candidates, shard) - total)
    return torch.cat(parts, dim=1)


def _values(z: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """Logits [n, k] float64 of ids [n, k], whichever rank has them; -inf where the id is -1."""
    columns, mine = shard.locate(ids)
    found = shard.group.all_reduce(z.gather(1, columns).masked_fill(~mine, 0.0))
    return found.double().masked_fill(ids < 0, -torch.inf)


def _likeliest(z: Tensor, count: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Ids [n, count] int64 and logits [n, count] float32, the largest first.

    Sorted by integers that hold the logit and, below it, the id, so that none are equal.
    """
    bits = (z + 0.0).view(torch.int32)  # -0 equals 0
    ordered = (bits ^ ((bits >> 31) & _SIGN)).long()
    keys = (ordered << 32) + (_LOW - shard.ids(z.shape[1], z.device))
    keys = _largest(keys, count)
    if shard.ranks > 1:
        keys = _largest(shard.group.all_gather(keys).movedim(0, 1).flatten(1), count)
    none = keys == torch.iinfo(torch.int64).min
    high = (keys >> 32).int()
    values = (high ^ ((high >> 31) & _SIGN)).view(torch.float32).masked_fill(none, -torch.inf)
    return (_LOW - (keys & _LOW)).masked_fill(none, -1), values


def _largest(keys: Tensor, count: int) -> Tensor:
    """The largest keys [n, count] int64 in order, the least integer behind the last."""
    found = keys.topk(min(count, keys.shape[1]), dim=1).values
    missing = count - found.shape[1]
    return torch.nn.functional.pad(found, (0, missing), value=torch.iinfo(torch.int64).min)
