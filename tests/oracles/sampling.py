"""What the single-row scripts share: proposals, their confidence, and the write into the row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# u(row, position, step) -> [V] in (0, 1): one draw per vocabulary entry. Positions are absolute,
# prompt included; steps count forwards since the row's start, zero-transfer ones included.
Uniform = Callable[[int, int, int], Tensor]
# (confidence [Q], masked [Q]) -> chosen offsets
Rule = Callable[[list[float], list[bool]], list[int]]


class Step(NamedTuple):
    """One step of one row, for tests that want more than the final tokens."""

    row: int
    eligible: Tensor  # [L] bool, masked slots that the rule could choose
    proposals: Tensor  # [L] int64, the current token where not eligible
    selected: Tensor  # [L] bool


def gumbel(z: Tensor, temperature: float, u: Tensor) -> Tensor:
    """LLaDA `add_gumbel_noise` of logits [V]: exp(z) / (-ln u)^T in float64."""
    return z.double().exp() / (-u.double().log()) ** temperature


@dataclass
class Row:
    """A canvas under decoding: prompt, then masks."""

    tokens: Tensor  # [L] int64
    mask_id: int
    row: int = 0
    temperature: float = 0.0
    uniform: Uniform | None = None
    precision: torch.dtype = torch.float32  # of the softmax that gives the confidence
    trace: list[Step] | None = None
    step: int = 0

    def masks(self, start: int, end: int) -> int:
        """How many slots of [start, end) are still masked."""
        return int((self.tokens[start:end] == self.mask_id).sum())

    def propose(self, z: Tensor, first: int) -> tuple[Tensor, list[float]]:
        """Tokens [Q] and their clean probability, from logits z [Q, V] of positions first.. ."""
        proposals = z.argmax(dim=-1)
        if self.temperature > 0:
            if self.uniform is None:
                raise ValueError("temperature > 0 needs a uniform function")
            for j in range(z.shape[0]):
                noise = self.uniform(self.row, first + j, self.step)
                proposals[j] = gumbel(z[j], self.temperature, noise).argmax()
        p = z.to(self.precision).softmax(dim=-1)
        return proposals, p.gather(-1, proposals[:, None])[:, 0].tolist()

    def advance(self, z: Tensor, first: int, end: int, rule: Rule) -> int:
        """One step: logits z [Q, V] of positions first.., candidates before `end`.

        Returns how many slots were chosen. A proposal may be the mask id itself: the slot then
        stays masked and the choice is spent, as upstream.
        """
        proposals, confidence = self.propose(z[: end - first], first)
        masked = (self.tokens[first:end] == self.mask_id).tolist()
        return self.write(proposals, masked, first, rule(confidence, masked))

    def write(self, proposals: Tensor, masked: list[bool], first: int, chosen: list[int]) -> int:
        """Writes the chosen proposals [Q] of positions first.. and records the step."""
        eligible = torch.zeros_like(self.tokens, dtype=torch.bool)
        eligible[first : first + len(masked)] = torch.tensor(masked)
        full = self.tokens.clone()
        full[first : first + len(masked)] = proposals
        full = torch.where(eligible, full, self.tokens)
        selected = torch.zeros_like(eligible)
        for offset in chosen:
            selected[first + offset] = True
        self.tokens = torch.where(selected, full, self.tokens)
        if self.trace is not None:
            self.trace.append(Step(self.row, eligible, full, selected))
        self.step += 1
        return len(chosen)


def canvas(prompt: Tensor, gen_length: int, mask_id: int) -> Tensor:
    """The prompt [..., P] followed by gen_length masks: [..., P + G]."""
    masks = prompt.new_full((*prompt.shape[:-1], gen_length), mask_id)
    return torch.cat([prompt, masks], dim=-1)
