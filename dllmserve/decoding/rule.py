"""UnmaskRule: a pure function from a step's statistics to what is written now.

Rules never see logits and never loop over requests: they get [n, W] tensors, n rows of
one step with blocks up to W long, and return [n, W] tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dllmserve.sampling_params import FLOATS

#: ``key [n, W] floating, count [n] int64, eligible [n, W] bool -> [n, W] bool``: see
#: :func:`write_best`, of which it is a faster twin
PickBest = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RuleView:
    """What a rule sees of n requests whose blocks are at most W long.

    Attributes:
        eligible: [n, W] bool, positions that are masked and may be written.
        tokens: [n, W] int64, the proposed token of each position.
        confidence: [n, W] float64, -inf where not eligible.
        entropy: [n, W] float64 in nats, +inf where not eligible; None unless asked for.
        quota: [n] int64, tokens that a fixed schedule writes in this step.
        floats: [n, len(FLOATS)] float64, the requests' own parameters.
        pick: what :func:`write_best` picks positions with; None for torch operations.
        kl: [n, W] float64 in nats, divergence of the position's distribution from that of the
            block's last forward; +inf where there is none. None unless asked for.
        back: [n, W] float64, probability of a written position's token as a blind span sees it;
            +inf where nothing is scored. None unless asked for.
        memory: what the rule left behind in the block's last forward; None unless it has a
            memory.
        edits: what :func:`edited` needs; None if no request may edit.
        canvas: what a rule for canvases of noise needs; None unless asked for.
    """

    eligible: Tensor
    tokens: Tensor
    confidence: Tensor
    entropy: Tensor | None
    quota: Tensor
    floats: Tensor
    pick: PickBest | None = None
    kl: Tensor | None = None
    back: Tensor | None = None
    memory: Memory | None = None
    edits: Edits | None = None
    canvas: CanvasView | None = None

    def parameter(self, name: str) -> Tensor:
        """[n, 1] float64, a number of SamplingParams, of every request."""
        return self.floats[:, FLOATS.index(name)][:, None]

    @property
    def threshold(self) -> Tensor:
        """[n, 1] float64."""
        return self.parameter("threshold")

    @property
    def least(self) -> Tensor:
        """[n] int64, tokens that a step writes at least (``min_tokens_per_step``)."""
        return self.parameter("min_tokens_per_step")[:, 0].long()


@dataclass(frozen=True)
class Edits:
    """Written tokens that may be replaced.

    Attributes:
        current: [n, W] int64, what stands there; undefined elsewhere.
        prob: [n, W] float64, probability of the token that is proposed in its place; -inf where
            none may be replaced.
    """

    current: Tensor
    prob: Tensor


@dataclass(frozen=True)
class CanvasView:
    """Canvases of noise; ``RuleView.tokens`` are then the likeliest tokens.

    Attributes:
        step: [n] int64, forwards that the canvas has had before this one.
        drawn: [n, W] int64, a draw from each position's distribution.
        noise: [n, W] int64, fresh noise.
    """

    step: Tensor
    drawn: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Memory:
    """What a rule keeps from forward to forward of a block, on the device.

    Attributes:
        row: [n] float64, one number a request.
        cells: [n, W] float64, one number a position.
    """

    row: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Update:
    """Result of a rule.

    Attributes:
        tokens: [n, W] int64.
        write: [n, W] bool, where they go.
        remask: [n, W] bool, written positions that are masked again; None for none.
        memory: what the rule keeps; None if it keeps nothing.
        draft: [n, W] int64, what positions that stay open hold in the next forward; None where that
            is the mask.
    """

    tokens: Tensor
    write: Tensor
    remask: Tensor | None = None
    memory: Memory | None = None
    draft: Tensor | None = None


class UnmaskRule(Protocol):
    """One decoding rule. Add a file with a class and a line in :mod:`dllmserve.catalog`.

    Contract: write only eligible positions, and at least one of each row that has any;
    no host synchronisation. A rule that masks positions again must come to an end all the same.
    """

    def apply(self, view: RuleView) -> Update:
        """Decide what is written in this step."""
        ...


def rank_of(key: Tensor) -> Tensor:
    """Rank of every position when sorted by ``key`` [n, W], largest first.

    Ties go to the lower position, which torch.topk leaves open.

    Returns:
        [n, W] int64, 0 is the largest.
    """
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    places = torch.arange(key.shape[-1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def write_best(view: RuleView, key: Tensor, count: Tensor) -> Update:
    """Write the ``count`` [n] (at least one) eligible positions with the largest key."""
    if view.pick is not None:
        return Update(tokens=view.tokens, write=view.pick(key, count, view.eligible))
    count = count.clamp(min=1)
    write = (rank_of(key) < count[:, None]) & view.eligible
    return Update(tokens=view.tokens, write=write)


def edited(view: RuleView) -> Tensor | None:
    """Written tokens [n, W] bool that give way to the proposed ones (LLaDA2.1's token editing).

    Those whose proposal is another token with a probability above ``edit_threshold``. None if no
    request may edit.
    """
    if view.edits is None:
        return None
    sure = view.edits.prob > view.parameter("edit_threshold")
    return sure & (view.tokens != view.edits.current)
