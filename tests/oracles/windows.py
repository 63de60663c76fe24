"""Block-causal decoding as plain loops over one prompt: by any rule, and with v2's block cache.

The first computes everything in every forward. The second is Fast-dLLM v2's `generate`; source:
modeling.py of Efficient-Large-Model/Fast_dLLM_v2_7B (`use_block_cache=True`), with two differences
that the engine has everywhere: a mask is a flag and no id, and the mask id is never proposed. A
model whose logits are not shifted begins a window without the token that a shifted one takes from
the forward that stores the window before.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_rules import BlockRule, Settings, proposal
from .models import KV, OracleModel
from .rules import threshold_strict


def block_mask(start: int, end: int, size: int) -> Tensor:
    """Which of positions 0 .. end - 1 each query of start .. end - 1 sees, blocks cut from 0."""
    place = torch.arange(end)
    return place[None, :] // size <= place[start:, None] // size


def pieces(given: int, end: int, window: int, part: int, shifted: bool) -> list[range]:
    """Positions that are filled one group after another: sub-blocks of windows, from ``given`` on.

    The logits of a window's first position stand in the window before if they are shifted: it is
    filled by itself then, unless its window begins with given tokens.
    """
    found = []
    for low in range(given // window * window, end, window):
        for start in range(low, low + window, part):
            inside = range(max(start, given), start + part)
            if shifted and start == low >= given:
                found.append(range(low, low + 1))
                inside = range(low + 1, low + part)
            if len(inside) > 0:
                found.append(inside)
    return found


def by_rule(
    model: OracleModel,
    prompt: list[int],
    length: int,
    window: int,
    settings: Settings,
    *,
    part: int | None = None,
    steps: int | None = None,
) -> tuple[list[int], int]:
    """The first ``length`` tokens of an answer, and the forwards that decide tokens of it."""
    given = len(prompt)
    end = -(-(given + length) // window) * window
    ids = prompt + [model.mask_id] * (end - given)
    masked = [False] * given + [True] * (end - given)
    forwards = fill(model, ids, masked, given + length, window, settings, part=part, steps=steps)
    return ids[given : given + length], forwards


def fill(
    model: OracleModel,
    ids: list[int],
    masked: list[bool],
    asked: int,
    window: int,
    settings: Settings,
    *,
    part: int | None = None,
    steps: int | None = None,
) -> int:
    """Fills the masks of a row, until none is left before position ``asked``; the forwards."""
    forwards, start, end = 0, masked.index(True), len(ids)
    given = [not m for m in masked]
    count = steps or window
    quotas = [window // count + (t < window % count) for t in range(count)]
    for group in pieces(start, end, window, part or window, model.shifted):
        inside = range(group.start, min(group.stop, end))
        own = [given[i] for i in inside]
        rule = BlockRule(settings, len(inside), model.mask_id, quotas, given=own)
        seen = min((inside.start // window + 1) * window, end)
        while any(masked[:asked]) and any(masked[i] for i in inside):
            out = model.forward(torch.tensor([ids[:seen]]), sees=block_mask(0, seen, window))
            z = {
                slot: out.logits[0, max(i - int(model.shifted), 0)]
                for slot, i in enumerate(inside)
                if masked[i]
            }
            open_ = [masked[i] for i in inside]
            written = rule.decide(z, open_, [ids[i] for i in inside], None).writes
            for slot, token in written.items():
                ids[inside[slot]], masked[inside[slot]] = token, False
            forwards += 1
    return forwards


@dataclass
class BlockCacheLoop:
    """One answer: windows, sub-blocks, and how many forwards computed which of them.

    Attributes:
        ids: the prompt and the answer, with what masks are shown as in masked positions.
        whole, small: forwards over a window, and over a sub-block.
    """

    model: OracleModel
    prompt: list[int]
    window: int
    part: int
    threshold: float
    ids: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    whole: int = 0
    small: int = 0

    def decode(self, length: int) -> list[int]:
        """The first ``length`` tokens of the answer."""
        given = len(self.prompt)
        end = -(-(given + length) // self.window) * self.window
        self.ids = self.prompt + [self.model.mask_id] * (end - given)
        self.masked = [False] * given + [True] * (end - given)
        for low in range(given // self.window * self.window, end, self.window):
            self._fill_window(low, self._stored(low))
        return self.ids[given : given + length]

    def _stored(self, low: int) -> list[KV] | None:
        """Exact K,V of the windows before ``low``, whose forward may decide ``low`` itself."""
        if low == 0:
            return None
        mask = block_mask(0, low, self.window)
        out = self.model.forward(torch.tensor([self.ids[:low]]), sees=mask)
        if self.model.shifted and self.masked[low]:
            self._write(low, *proposal(out.logits[0, -1], self.model.mask_id)[:1])
        return out.kv

    def _fill_window(self, low: int, past: list[KV] | None) -> None:
        cache: list[KV] | None = None
        for start in range(low, low + self.window, self.part):
            inside = range(start, start + self.part)
            while any(self.masked[i] for i in inside):
                if cache is None or self.masked[start]:
                    first, last = low, low + self.window
                    out = self._forward(first, last, past, None)
                    cache = out if past is None else _joined(past, out, first)
                    self.whole += 1
                else:
                    first, last = start, start + self.part
                    cache = _joined(cache, self._forward(first, last, cache, first), first)
                    self.small += 1
                self._decide(inside, first)

    def _forward(
        self, first: int, last: int, past: list[KV] | None, overwrite_at: int | None
    ) -> list[KV]:
        out = self.model.forward(
            torch.tensor([self.ids[first:last]]), torch.arange(first, last), past, overwrite_at
        )
        self._logits = out.logits[0]
        return out.kv

    def _decide(self, inside: range, first: int) -> None:
        rows = [max(i - first - int(self.model.shifted), 0) for i in inside]
        found = [proposal(self._logits[row], self.model.mask_id) for row in rows]
        masked = [self.masked[i] for i in inside]
        for k in threshold_strict([c for _, c in found], masked, self.threshold):
            self._write(inside[k], found[k][0])

    def _write(self, position: int, token: int) -> None:
        self.ids[position], self.masked[position] = token, False


def _joined(past: list[KV], fresh: list[KV], at: int) -> list[KV]:
    """K,V whose rows from ``at`` on, as many as there are fresh ones, are the fresh ones."""
    joined = []
    for old, new in zip(past, fresh, strict=True):
        pairs = zip(old, new, strict=True)
        k, v = (torch.cat([a[:, :, :at], b, a[:, :, at + b.shape[2] :]], dim=2) for a, b in pairs)
        joined.append((k, v))
    return joined
