"""`generate` of Nemotron-Labs-Diffusion and of Stable-DiffCoder, as plain loops over one prompt.

Sources: modeling_nemotron_labs_diffusion.py of the public checkpoints (with `causal_context`, its
default) and the modeling code of Stable-DiffCoder's. Everything is computed in every forward, from
masks that say which position sees which. As in the engine, a mask is a flag and no id, the mask id
is never proposed, and lengths need not be multiples of a block, whose last is then shorter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_rules import proposal

#: ids [n] and which positions each sees [n, n] to logits [n, V]
Logits = Callable[[Tensor, Tensor], Tensor]
#: confidences and masks of a block, and the block's forward, to the offsets that are written
Choice = Callable[[Sequence[float], Sequence[bool], int], list[int]]


@dataclass
class Loop:
    """One answer.

    Attributes:
        logits: the model.
        mask_id: what it is fed at masked positions.
        choose: which positions of a block a forward writes.
        ids, masked: of the prompt and the answer.
        forwards: that decide tokens.
    """

    logits: Logits
    mask_id: int
    choose: Choice
    ids: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    forwards: int = 0

    def start(self, prompt: list[int], length: int) -> int:
        """Where the answer ends."""
        self.ids = prompt + [self.mask_id] * length
        self.masked = [False] * len(prompt) + [True] * length
        self.forwards = 0
        return len(self.ids)

    def seed(self, position: int) -> None:
        """Write what a causal forward over all before a position proposes for it."""
        sees = torch.ones(position, position).tril().bool()
        row = self.logits(torch.tensor(self.ids[:position]), sees)[-1]
        self.ids[position], self.masked[position] = proposal(row, self.mask_id)[0], False
        self.forwards += 1

    def fill(self, low: int, high: int, sees: Tensor) -> None:
        """Write positions ``low .. high - 1``, by forwards over all before ``high``."""
        inside = range(low, high)
        for step in range(high - low):
            masked = [self.masked[i] for i in inside]
            if not any(masked):
                return
            rows = self.logits(torch.tensor(self.ids[:high]), sees[:high, :high])[low:]
            found = [proposal(row, self.mask_id) for row in rows]
            for k in self.choose([c for _, c in found], masked, step):
                self.ids[low + k], self.masked[low + k] = found[k][0], False
            self.forwards += 1


def framed(loop: Loop, prompt: list[int], length: int, block: int) -> list[int]:
    """Nemotron: what is before a block sees causally, the block all of itself."""
    end = loop.start(prompt, length)
    for low in range(len(prompt), end, block):
        high = min(low + block, end)
        loop.seed(low)
        sees = torch.ones(high, high).tril().bool()
        sees[low:] = True
        loop.fill(low, high, sees)
    return loop.ids[len(prompt) :]


def block_causal(loop: Loop, prompt: list[int], length: int, block: int) -> list[int]:
    """Stable-DiffCoder: a position sees its block, cut from 0, and earlier ones."""
    end = loop.start(prompt, length)
    place = torch.arange(end) // block
    sees = place[None, :] <= place[:, None]
    for low in range(len(prompt) // block * block, end, block):
        loop.fill(low, min(low + block, end), sees)
    return loop.ids[len(prompt) :]
