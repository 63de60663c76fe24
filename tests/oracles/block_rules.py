"""Unmask rules with what they remember inside a block: schedule, credit, calm slots, doubts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import rules
from .ends import NO_ENDS, Ends

RULES = (
    "steps",
    "threshold",
    "threshold_strict",
    "factor",
    "factor_strict",
    "entropy_bound",
    "hierarchy",
    "credit",
    "klass",
    "wino",
)
FIRST_ACCEPT = 30  # WINO's "forward before" of a block's first one


@dataclass(frozen=True)
class Settings:
    """A rule's name and parameters."""

    unmask: str
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    low_threshold: float = 0.4
    kl_threshold: float = 0.01
    kl_history: int = 2
    threshold_back: float = 0.9

    def __post_init__(self) -> None:
        if self.unmask not in RULES:
            raise ValueError(f"unmask {self.unmask!r} is none of {RULES}")


class Decision(NamedTuple):
    """Offsets in the block: tokens to write, and slots to mask again."""

    writes: dict[int, int]
    erased: list[int]


def proposal(z: Tensor, mask_id: int, ends: Ends = NO_ENDS) -> tuple[int, float]:
    """The likeliest token other than the mask id, and its probability, from logits z [V]."""
    others = z.double().clone()
    others[mask_id] = -torch.inf
    token = int(others.argmax())
    return token, float(ends.after(z.double(), 0.0).softmax(dim=-1)[token])


def entropy(z: Tensor) -> float:
    """Of the whole distribution, mask id included, in nats."""
    return float(torch.special.entr(z.double().softmax(dim=-1)).sum())


def divergence(z: Tensor, before: Tensor) -> float:
    """KL(p || p before) of two logits [V], in nats."""
    p = z.double().log_softmax(dim=-1)
    terms = p.exp() * (p - before.double().log_softmax(dim=-1))
    return float(terms[p > -torch.inf].sum())  # what is struck out has no share


class BlockRule:
    """One rule over the forwards of one block."""

    def __init__(
        self,
        settings: Settings,
        size: int,
        mask_id: int,
        counts: list[int],
        ends: Ends = NO_ENDS,
        given: Sequence[bool] | None = None,  # slots that were never masked
    ) -> None:
        self.given = given or [False] * size
        self.settings = settings
        self.ends = ends
        self.mask_id = mask_id
        self.counts = counts  # the schedule of unmask="steps"
        self.t = 0
        self.credit: dict[int, Tensor] = {}  # slot -> [V] float64
        self.before: dict[int, Tensor] = {}  # slot -> the forward before's logits [V]
        self.calm = [0] * size
        self.last_accept = FIRST_ACCEPT

    def decide(
        self,
        z: dict[int, Tensor],  # masked slot -> logits [V]
        masked: list[bool],
        tokens: list[int],
        shadow: Tensor | None,  # [B, V], for "wino"
    ) -> Decision:
        """What the block's next forward writes."""
        z = {slot: self.ends.before(row) for slot, row in z.items()}
        if self.settings.unmask == "credit":
            z = {slot: self._credited(slot, row) for slot, row in z.items()}
        proposed, confidence, spread = [0] * len(masked), [0.0] * len(masked), [0.0] * len(masked)
        for slot, row in z.items():
            proposed[slot], confidence[slot] = proposal(row, self.mask_id, self.ends)
            spread[slot] = entropy(row)
        erased: list[int] = []
        if shadow is not None:
            shadow = self.ends.after(self.ends.before(shadow), 0.0)
            back = [float(shadow[i].double().softmax(-1)[tokens[i]]) for i in range(len(masked))]
            written = [not (o or g) for o, g in zip(masked, self.given, strict=True)]
            tau, tau_back = self.settings.threshold, self.settings.threshold_back
            chosen, erased, self.last_accept = rules.wino(
                confidence, masked, back, written, self.last_accept, tau, tau_back
            )
        else:
            self._watch(z)
            chosen = self._chosen(confidence, spread, masked)
        self.t += 1
        return Decision({slot: proposed[slot] for slot in chosen}, erased)

    def _credited(self, slot: int, z: Tensor) -> Tensor:
        # the raw logits' best token gains, whatever is proposed
        wide = z.double()
        credit = self.credit.setdefault(slot, torch.zeros_like(wide))
        credit *= 0.8
        token, p = proposal(z, self.mask_id)
        credit[token] += p**0.2
        return wide + 0.7 * (1 + credit).log()

    def _watch(self, z: dict[int, Tensor]) -> None:
        # only masked slots are followed: they have logits in every forward, and none that is
        # written comes back
        for slot, row in z.items():
            if slot in self.before:
                still = divergence(row, self.before[slot]) < self.settings.kl_threshold
                self.calm[slot] = self.calm[slot] + 1 if still else 0
        self.before = dict(z)

    def _chosen(
        self, confidence: list[float], spread: list[float], masked: list[bool]
    ) -> list[int]:
        s = self.settings
        match s.unmask:
            case "steps":
                return rules.steps(confidence, masked, self.counts[self.t])
            case "threshold":
                return rules.threshold(confidence, masked, s.threshold)
            case "threshold_strict":
                return rules.threshold_strict(confidence, masked, s.threshold)
            case "factor":
                return rules.factor(confidence, masked, s.factor)
            case "factor_strict":
                return rules.factor_strict(confidence, masked, s.factor)
            case "entropy_bound":
                return rules.entropy_bound(spread, masked, s.entropy_bound)
            case "hierarchy":
                return rules.hierarchy(confidence, masked, s.threshold, s.low_threshold)
            case "credit":
                return rules.credit_threshold(confidence, masked, s.threshold)
        return rules.klass(confidence, masked, self.calm, s.threshold, s.kl_history)
