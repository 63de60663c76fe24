"""Group: what the ranks of one model say to each other in the middle of a step.

Everything that is decided in a step follows from numbers that all ranks have, so ranks
exchange sums and concatenations of tensors, and never a decision.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Group:
    """The ranks of one model, as one of them sees them.

    This class is a model on one device, which has nobody to talk to; or a rank's place among
    several, by which sizes can be worked out before it is connected to the others:
    :class:`dllmserve.parallel.torch_group.TorchGroup` is.

    All ranks call the same methods in the same order, with tensors of the same shape.

    Args:
        rank, size: this rank, of so many.

    Attributes:
        captures: whether the exchanges may be part of a CUDA graph.
    """

    captures = True

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of x, of any shape. ``x`` may be overwritten."""
        self._refuse_others()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The x [...] of all ranks: [size, ...]."""
        self._refuse_others()
        return x[None]

    def _refuse_others(self) -> None:
        if self.size > 1:
            raise RuntimeError(f"rank {self.rank} of {self.size} is not connected to the others")


SOLO = Group()


def join(group: Group, x: Tensor, dim: int) -> Tensor:
    """The shards x of all ranks, put together along ``dim`` in the order of ranks."""
    if group.size == 1:
        return x
    shards = group.all_gather(x).movedim(0, dim)
    return shards.flatten(dim, dim + 1)


def smallest(group: Group, value: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers; waits for the device."""
    if group.size == 1:
        return value
    return int(group.all_gather(torch.tensor([value], device=device)).min())
