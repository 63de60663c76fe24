"""Decoding with token edits as a plain loop over one row: everything is computed in every forward.

Sources: LLaDA2.1's `generate`, kept in ZHZisZZ/dllm (`editing_threshold`, `max_post_steps`,
`num_to_transfer`), and JointThreshold of SGLang 0.5.23 (`penalty_lambda`), whose last forward of a
block that is out of budget changes nothing and is left out. The mask id is never proposed, so no
loop is without end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_rules import proposal
from .models import KV, OracleModel
from .windows import block_mask


@dataclass(frozen=True)
class Settings:
    """Numbers of a request; ``quotas`` of each block say what its first forwards write at least."""

    threshold: float
    edit_threshold: float
    max_edit_steps: int = 16
    least: int = 1
    penalty: float = 0.0
    quotas: tuple[tuple[int, ...], ...] = ()


@dataclass
class Row:
    """A row that is filled.

    Attributes:
        ids: of all positions; what they are where ``masked`` does not matter.
        window: see :class:`dllmserve.core.canvas.Canvas`.
        cache: "none", or Fast-dLLM's "prefix" or "dual" of a model that is not shifted.
        steps: the forward that wrote each token last; 0 where it was given.
        logprobs: of each token, by that forward.
        forwards, edits: in all.
    """

    model: OracleModel
    ids: list[int]
    masked: list[bool]
    window: int = 0
    cache: str = "none"
    steps: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: int = 0
    edits: int = 0
    kv: list[KV] = field(default_factory=list)

    def decode(self, blocks: Sequence[range], s: Settings, ends: Sequence[int] = ()) -> list[int]:
        """Fill the blocks in turn, up to the first with an end id; the ids."""
        fills = list(self.masked)
        self.steps, self.logprobs = [0] * len(self.ids), [0.0] * len(self.ids)
        for index, block in enumerate(blocks):
            quotas = s.quotas[index] if s.quotas else ()
            self._block(block, [i for i in block if fills[i]], s, quotas)
            if any(self.ids[i] in ends for i in block if fills[i]):
                break
        return self.ids

    def _block(self, block: range, mine: list[int], s: Settings, quotas: tuple[int, ...]) -> None:
        number, post = 0, 0
        while True:
            open_ = [i for i in mine if self.masked[i]]
            if not open_:
                if post == s.max_edit_steps:
                    return
                post += 1
            shown = self._shown()
            raw = self._logits(block, shown, number == 0)
            z = raw.clone()
            for i in block[1:]:
                z[i, shown[i - 1]] -= s.penalty
            self.forwards += 1
            found = {i: proposal(z[i], self.model.mask_id) for i in mine}
            quota = quotas[number] if number < len(quotas) else 0
            number += 1
            order = sorted(open_, key=lambda i: -found[i][1])
            sure = sum(found[i][1] > s.threshold for i in open_)
            chosen = order[: max(sure, s.least, quota)]
            edited = [
                i
                for i in mine
                if i not in open_ and found[i][0] != self.ids[i] and found[i][1] > s.edit_threshold
            ]
            for i in chosen + edited:
                self.ids[i], self.masked[i] = found[i][0], False
                self.steps[i] = self.forwards
                self.logprobs[i] = float(raw[i].double().log_softmax(dim=-1)[self.ids[i]])
            self.edits += len(edited)
            if not open_ and not edited:
                return

    def _shown(self) -> list[int]:
        pairs = zip(self.ids, self.masked, strict=True)
        return [self.model.mask_id if masked else token for token, masked in pairs]

    def _logits(self, block: range, shown: list[int], entering: bool) -> Tensor:
        """Logits [positions, V] at which each position is read."""
        if self.cache != "none" and not entering:
            return self._reused(block, shown)
        end, sees = len(shown), None
        if self.window:
            end = min(-(-block.stop // self.window) * self.window, end)
            sees = block_mask(0, end, self.window)
        out = self.model.forward(torch.tensor([shown[:end]]), sees=sees)
        self.kv = out.kv
        z = out.logits[0]
        return torch.cat([z[:1], z[:-1]]) if self.model.shifted else z

    def _reused(self, block: range, shown: list[int]) -> Tensor:
        """The same, of the block and what a cache computes with it."""
        start, dual = block.start, self.cache == "dual"
        end = block.stop if dual else len(shown)
        past = self.kv if dual else [(k[:, :, :start], v[:, :, :start]) for k, v in self.kv]
        ids, places = torch.tensor([shown[start:end]]), torch.arange(start, end)
        z = self.model.forward(ids, places, past, start if dual else None).logits[0]
        return torch.cat([z.new_zeros(start, z.shape[1]), z])
