"""inclusionAI/dInfer's loops over a model with full attention, without a cache.

`BlockWiseDiffusionLLM` with its threshold, hierarchy and credit decoders, and a copy of Fast-dLLM.
Upstream to the letter, but for hierarchy and credit, whose proposals are never the mask id.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import rules
from .block_rules import BlockRule, Settings
from .sampling import Rule

#: ids of a whole row to its logits [n, V]
Logits = Callable[[list[int]], Tensor]
#: logits [B, V] of a block and its masks, to the tokens that slots get
Decide = Callable[[Tensor, list[bool]], dict[int, int]]


@dataclass
class Row:
    """The prompt and the answer; forwards counts upstream's, wasted ones among them."""

    logits: Logits
    mask_id: int
    ids: list[int]
    forwards: int = 0
    trace: list[list[int]] = field(default_factory=list)

    def masks(self, start: int, end: int) -> list[bool]:
        """Which of [start, end) are masked."""
        return [token == self.mask_id for token in self.ids[start:end]]

    def step(self, start: int, end: int, decide: Decide) -> None:
        """One forward over the row, and what it writes into [start, end)."""
        z = self.logits(self.ids)[start:end]
        self.forwards += 1
        for slot, token in decide(z, self.masks(start, end)).items():
            self.ids[start + slot] = token


def proposals(z: Tensor, dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """Best token of each row of logits [B, V], and its probability."""
    tokens = z.argmax(dim=-1)
    p = z.to(dtype).softmax(dim=-1)
    return tokens.tolist(), p.gather(1, tokens[:, None])[:, 0].tolist()


def threshold(tau: float, mask_id: int, use_float64: bool) -> Decide:
    """`ThresholdParallelDecoder`: slots that propose the mask id do not take part."""

    def decide(z: Tensor, masked: list[bool]) -> dict[int, int]:
        tokens, c = proposals(z, torch.float64 if use_float64 else torch.float32)
        open_ = [m and t != mask_id for m, t in zip(masked, tokens, strict=True)]
        return {i: tokens[i] for i in rules.credit_threshold(c, open_, tau)}

    return decide


def remembering(settings: Settings, size: int, mask_id: int) -> Decide:
    """`HierarchyDecoder` and `CreditThresholdParallelDecoder` of one block."""
    rule = BlockRule(settings, size, mask_id, [])

    def decide(z: Tensor, masked: list[bool]) -> dict[int, int]:
        rows = {i: row for i, row in enumerate(z) if masked[i]}
        return rule.decide(rows, masked, [], None).writes

    return decide


def block_wise(
    row: Row,
    decoder: Callable[[int], Decide],  # of a block of so many slots
    *,
    gen_length: int,
    block_length: int,
    eos_id: int = -1,
    early_stop: bool = False,
    start_block_align: bool = False,
    maximum_unroll: int = 4,
    expected_tpf: int = 8,
) -> list[int]:
    """`BlockWiseDiffusionLLM.generate`: ids behind the prompt, without end ids."""
    prompt = len(row.ids)
    row.ids += [row.mask_id] * gen_length
    first = prompt // block_length * block_length if start_block_align else prompt
    for start in range(first, len(row.ids), block_length):
        end = min(start + block_length, len(row.ids))
        decide = decoder(end - start)
        while any(masked := row.masks(start, end)):
            for _ in range(max(min(sum(masked) // expected_tpf, maximum_unroll), 1)):
                row.step(start, end, decide)
        if eos_id in row.ids[max(start, prompt) : end]:
            if early_stop:
                row.ids[end:] = [eos_id] * (len(row.ids) - end)
            break
    return [token for token in row.ids[prompt:] if token != eos_id]


def fast_dllm(
    row: Row,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    threshold: float | None = None,
    factor: float | None = None,
    early_stop: bool = False,
    eos_id: int = -1,
) -> list[int]:
    """dInfer's copy of Fast-dLLM's loop: ids behind the prompt."""
    prompt = len(row.ids)
    row.ids += [row.mask_id] * gen_length
    blocks = rules.segments(prompt, gen_length, block_length)
    for start, end in blocks:
        counts = rules.split(sum(row.masks(start, end)), steps // len(blocks))
        while any(row.masks(start, end)):
            rule: Rule = partial(rules.steps, count=counts.pop(0)) if counts else _none
            if factor is not None:
                rule = partial(rules.factor, f=factor)
            elif threshold is not None:
                rule = partial(rules.threshold, tau=threshold)
            row.step(start, end, partial(_ruled, rule))
            if early_stop and eos_id in row.ids[prompt:]:
                behind = row.ids.index(eos_id, prompt)
                row.ids[behind:] = [eos_id] * (len(row.ids) - behind)
        if early_stop and eos_id in row.ids[prompt:]:
            break
    return row.ids[prompt:]


def _ruled(rule: Rule, z: Tensor, masked: list[bool]) -> dict[int, int]:
    tokens, c = proposals(z, torch.float64)
    return {i: tokens[i] for i in rule(c, masked)}


def _none(_confidence: list[float], _masked: list[bool]) -> list[int]:
    raise RuntimeError("a mask-id proposal outlived the schedule: upstream fails here")
