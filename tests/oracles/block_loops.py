"""Loops of upstream's scripts over a block-causal model, which keep nothing between forwards.

LLaDA2.0's and LLaDA2.1's `generate`, SGLang's `LowConfidence` and `JointThreshold`, diffusers'
`LLaDA2Pipeline`, SDAR's `block_diffusion_generate`, and greedy autoregression.

Each is upstream's to the letter unless `sane` says otherwise, which is what an engine does: masks
are flags and the mask id is never proposed; an answer ends at its first end id, looked for behind
the prompt alone, and is never longer than asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import rules

#: ids of a row to its logits [n, V], where a token sees its block and earlier ones
Logits = Callable[[list[int]], Tensor]


@dataclass
class Answer:
    """What a loop returns, and how it came about.

    Attributes:
        ids: behind the prompt.
        forwards: of the model, prefills apart.
        canvas: all that was behind the prompt when the loop ended.
        trace: of each forward, the block's number, its masks, slots written and tokens edited.
    """

    ids: list[int]
    forwards: int
    canvas: list[int]
    trace: list[list[int]]


@dataclass
class Canvas:
    """One row: the prompt, and masks up to the end of the last block."""

    logits: Logits
    mask_id: int
    block: int
    prompt: list[int]
    sane: bool = False
    ids: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    forwards: int = 0
    trace: list[list[int]] = field(default_factory=list)

    def starts(self, length: int) -> range:
        """Where the blocks of an answer begin, after laying out the row."""
        end = -(-(len(self.prompt) + length) // self.block) * self.block
        self.ids = self.prompt + [self.mask_id] * (end - len(self.prompt))
        self.masked = [i >= len(self.prompt) for i in range(end)]
        if not self.sane:
            self.masked = [token == self.mask_id for token in self.ids]
        return range(len(self.prompt) // self.block * self.block, end, self.block)

    def forward(self, start: int) -> Tensor:
        """Logits [B, V] of a block, against all before it."""
        self.forwards += 1
        end = start + self.block
        row = [self.mask_id if m else t for t, m in zip(self.ids[:end], self.masked, strict=False)]
        return self.logits(row)[start:]

    def propose(self, z: Tensor) -> tuple[list[int], list[float]]:
        """Token and confidence of each slot, from logits [B, V]."""
        candidates = z.clone()
        if self.sane:
            candidates[:, self.mask_id] = -torch.inf
        tokens = candidates.argmax(dim=-1)
        return tokens.tolist(), z.softmax(dim=-1).gather(1, tokens[:, None])[:, 0].tolist()

    def masks(self, start: int) -> list[bool]:
        """Which slots of a block are masked."""
        return self.masked[start : start + self.block]

    def edits(
        self, start: int, tokens: list[int], confidence: list[float], bound: float, fixed: int
    ) -> list[int]:
        """Written slots of a block, at `fixed` or behind, that are surely something else."""
        return [
            i
            for i, masked in enumerate(self.masks(start))
            if not masked
            and start + i >= fixed
            and confidence[i] > bound
            and tokens[i] != self.ids[start + i]
        ]

    def write(
        self, start: int, tokens: list[int], filled: Sequence[int], edited: Sequence[int] = ()
    ) -> None:
        """Put proposals into slots; the mask id leaves a slot masked, or makes it so."""
        self.note(start, filled, edited)
        for i in (*filled, *edited):
            self.ids[start + i] = tokens[i]
            self.masked[start + i] = tokens[i] == self.mask_id

    def note(self, start: int, filled: Sequence[int], edited: Sequence[int]) -> None:
        """A forward's line of the trace, before anything is written."""
        masks = sum(self.masks(start))
        self.trace.append([start // self.block, masks, len(filled), len(edited)])

    def end(self, eos_id: int, low: int | None = None, high: int | None = None) -> int | None:
        """The first end id of [low, high), by default of all behind the prompt."""
        low = len(self.prompt) if low is None else low
        found = self.ids[low:high]
        return low + found.index(eos_id) if eos_id in found else None

    def finished(self, end: int) -> bool:
        """Whether nothing of the answer is masked before a position."""
        return not any(self.masked[len(self.prompt) : end])

    def answer(self, stop: int | None, length: int | None) -> Answer:
        """Up to and with the end id at `stop`, and no more than `length` if that is given."""
        behind = self.ids[len(self.prompt) :]
        cut = max(stop + 1 - len(self.prompt), 0) if stop is not None else None
        return Answer(behind[:cut][:length], self.forwards, behind, self.trace)


def quotas(block: int, steps: int) -> list[int]:
    """Tokens of each forward of a block: from its length, not from its masks."""
    return rules.split(block, steps) if steps else []


def llada20(
    canvas: Canvas,
    *,
    gen_length: int,
    steps: int = 32,
    threshold: float = 0.95,
    minimal_topk: int = 1,
    eos_early_stop: bool = False,
    eos_id: int = -1,
) -> Answer:
    """LLaDA2.0 `generate`."""
    total = min(steps, gen_length // minimal_topk)
    counts = quotas(canvas.block, max(total, 1) if canvas.sane else total)
    for start in canvas.starts(gen_length):
        for count in counts:
            if not any(canvas.masks(start)):
                break
            tokens, confidence = canvas.propose(canvas.forward(start))
            chosen = rules.dynamic(confidence, canvas.masks(start), threshold, count)
            canvas.write(start, tokens, chosen)
            if not eos_early_stop:
                continue
            if canvas.sane:
                stop = canvas.end(eos_id)
                if stop is not None and canvas.finished(stop):
                    return canvas.answer(stop, gen_length)
            elif eos_id in [tokens[i] for i in chosen]:
                stop = canvas.end(eos_id, 0)
                if stop is not None and canvas.finished(stop):
                    return canvas.answer(stop, None)
        if canvas.end(eos_id, None, start + canvas.block) is not None:
            break
    return canvas.answer(canvas.end(eos_id), gen_length)


def llada21(
    canvas: Canvas,
    *,
    gen_length: int,
    threshold: float = 0.95,
    editing_threshold: float = 0.9,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    eos_early_stop: bool = False,
    eos_id: int = -1,
    bound: int = 10_000,
) -> Answer:
    """LLaDA2.1 `generate`; without `sane` it may never end, and fails after so many forwards."""
    if canvas.sane:
        num_to_transfer = max(num_to_transfer, 1)
    for start in canvas.starts(gen_length):
        post = 0
        while True:
            masked = canvas.masks(start)
            post += not any(masked)
            if post > max_post_steps:
                break
            tokens, confidence = canvas.propose(canvas.forward(start))
            filled = rules.dynamic(confidence, masked, threshold, num_to_transfer)
            edited = canvas.edits(start, tokens, confidence, editing_threshold, len(canvas.prompt))
            canvas.write(start, tokens, filled, edited)
            if not any(masked) and not edited:
                break
            if canvas.forwards > bound:
                raise RuntimeError("upstream never ends here")
        end = start + canvas.block
        if eos_early_stop and canvas.finished(end) and canvas.end(eos_id, None, end) is not None:
            break
    return canvas.answer(canvas.end(eos_id), gen_length)


def diffusers_llada2(
    canvas: Canvas,
    *,
    gen_length: int,
    num_inference_steps: int = 32,
    threshold: float = 0.7,
    editing_threshold: float | None = 0.5,
    max_post_steps: int = 16,
    minimal_topk: int = 1,
    eos_early_stop: bool = True,
    eos_id: int = -1,
) -> Answer:
    """diffusers' `LLaDA2Pipeline` over a model that is block-causal."""
    steps = min(num_inference_steps, gen_length // minimal_topk)
    editing = editing_threshold if editing_threshold and editing_threshold > 0 else None
    for start in canvas.starts(gen_length):
        post = 0
        counts = quotas(canvas.block, steps)
        while True:
            masked = canvas.masks(start)
            post += not any(masked)
            tokens, confidence = canvas.propose(canvas.forward(start))
            filled = []
            if any(masked):
                filled = rules.dynamic(confidence, masked, threshold, counts.pop(0))
            edited = []
            if editing is not None:
                edited = canvas.edits(start, tokens, confidence, editing, len(canvas.prompt))
            canvas.write(start, tokens, filled, edited)
            if eos_early_stop and eos_id in [tokens[i] for i in (*filled, *edited)]:
                stop = canvas.end(eos_id, 0)
                if stop is not None and stop >= len(canvas.prompt) and canvas.finished(stop):
                    return canvas.answer(None, gen_length)
            if not counts if any(masked) else not edited or post > max_post_steps:
                break
    return canvas.answer(None, gen_length)


Step = Callable[[int], bool]  # one step in a block that starts there; whether it is done


def sglang(
    canvas: Canvas, step: Callable[[int], Step], max_steps: int, length: int, eos_id: int
) -> Answer:
    """SGLang's run over blocks and its rule of the end; `step(start)` is made for each block."""
    stop: int | None = None
    for start in canvas.starts(length):
        done = step(start)
        for _ in range(max_steps):
            if done(start):
                break
        else:
            canvas.forward(start)
        fresh = max(start, len(canvas.prompt))
        stop = canvas.end(eos_id, fresh, start + canvas.block)
        if stop is not None:
            break
    return canvas.answer(stop, length)


def low_confidence(
    canvas: Canvas, *, length: int, threshold: float = 0.95, eos_id: int = -1
) -> Answer:
    """SGLang's `LowConfidence`; a block's last forward is over its final tokens."""

    def advance(start: int) -> bool:
        masked = canvas.masks(start)
        tokens, confidence = canvas.propose(canvas.forward(start))
        canvas.write(start, tokens, rules.threshold_strict(confidence, masked, threshold))
        return not any(masked)

    return sglang(canvas, lambda _: advance, canvas.block + 1, length, eos_id)


def joint_threshold(
    canvas: Canvas,
    *,
    length: int,
    threshold: float = 0.5,
    edit_threshold: float = 0.0,
    max_post_edit_steps: int = 16,
    penalty_lambda: float = 0.0,
    eos_id: int = -1,
) -> Answer:
    """SGLang's `JointThreshold`."""

    def in_block(start: int) -> Step:
        post = 0
        prompt = start + canvas.masks(start).index(True)  # slots before were never masked

        def advance(start: int) -> bool:
            nonlocal post
            masked = canvas.masks(start)
            z = canvas.forward(start)
            if penalty_lambda > 0:
                z = z.clone()
                for j in range(1, canvas.block):
                    before = canvas.mask_id if masked[j - 1] else canvas.ids[start + j - 1]
                    z[j, before] -= penalty_lambda
            tokens, confidence = canvas.propose(z)
            filled = rules.threshold_strict(confidence, masked, threshold)
            edited = canvas.edits(start, tokens, confidence, edit_threshold, prompt)
            post += not any(masked)
            if post > max_post_edit_steps:  # the edits that it found are left alone
                canvas.note(start, filled, edited)
                return True
            canvas.write(start, tokens, filled, edited)
            return not filled and not edited

        return advance

    steps = canvas.block + max_post_edit_steps + 1
    return sglang(canvas, in_block, steps, length, eos_id)


def sdar(
    canvas: Canvas,
    *,
    gen_length: int,
    denoising_steps: int,
    remasking_strategy: str,
    confidence_threshold: float = 0.85,
    stop_ids: Sequence[int] = (),
) -> Answer:
    """SDAR `block_diffusion_generate`, known tokens kept; its commits are not counted."""
    counts = quotas(canvas.block, denoising_steps)
    for start in canvas.starts(gen_length):
        for count in counts:
            masked = canvas.masks(start)
            if not any(masked):
                break
            tokens, confidence = canvas.propose(canvas.forward(start))
            if remasking_strategy == "sequential":
                chosen = rules.sequential(masked, count)
            elif remasking_strategy == "low_confidence_static":
                chosen = rules.steps(confidence, masked, count)
            else:
                chosen = rules.dynamic(confidence, masked, confidence_threshold, count)
            canvas.write(start, tokens, chosen)
        if any(canvas.end(i, None, start + canvas.block) is not None for i in stop_ids):
            break
    ends = [end for i in stop_ids if (end := canvas.end(i)) is not None]
    return canvas.answer(min(ends, default=None), gen_length)


def greedy(logits: Logits, prompt: list[int], length: int, stop_ids: Sequence[int]) -> list[int]:
    """The likeliest token after the other, by a model that sees what is before."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length:
        ids.append(int(logits(ids)[-1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]
