"""Any unmask rule under any refresh policy, one prompt after another, greedy and in float32.

What a forward computes is in spans.py, what it writes in block_rules.py, WINO's shadow in wino.py;
here are the canvas's end, the early end of an answer and the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import rules, wino
from .block_rules import BlockRule, Settings
from .ends import NO_ENDS, Ends
from .models import OracleModel
from .spans import JUST_WRITTEN, PROMPT, UNWRITTEN, Block, Policy, Slots, Span, Store, choose


class Result(NamedTuple):
    """One decoded answer and what it took."""

    tokens: list[int]
    forwards: int
    computed: int  # query tokens over all forwards, shadows included
    writes: list[int]  # per forward: by how many slots the masks became fewer


def blocks_of(prompt: int, gen_length: int, block_length: int) -> list[Block]:
    """The answer's blocks from left to right; the last one may be shorter."""
    starts = range(prompt, prompt + gen_length, block_length)
    return [
        Block(
            start,
            min(start + block_length, prompt + gen_length),
            start - block_length if start > prompt else None,
        )
        for start in starts
    ]


def schedules(blocks: list[Block], steps: int | None) -> list[list[int]]:
    """Quotas of each block: steps as even as can be, at least one, without empty ones."""
    if steps is None:
        return [[] for _ in blocks]
    shares = rules.split(steps, len(blocks))
    return [
        [count for count in rules.split(block.end - block.start, max(share, 1)) if count]
        for block, share in zip(blocks, shares, strict=True)
    ]


@dataclass
class Request:
    """One prompt under decoding."""

    model: OracleModel
    policy: Policy
    blocks: list[Block]
    prompt: int
    slots: Slots
    store: Store
    eos_ids: tuple[int, ...] = ()  # empty: the whole answer is filled
    shadowed: bool = False
    computed: int = 0
    forwards: int = 0

    def first_end(self) -> int | None:
        """Position of the first end id that is written, masks before it or not."""
        for p in range(self.prompt, len(self.slots.tokens)):
            if not self.slots.masked[p] and self.slots.tokens[p] in self.eos_ids:
                return p
        return None

    def limit(self, block: Block) -> int:
        """The end of the canvas that forwards of this block see."""
        end = len(self.slots.tokens)
        if self.policy.suffix_window is not None:
            end = min(end, block.end + self.policy.suffix_window)
        stop = self.first_end()
        if stop is not None:
            (last,) = (b.end for b in self.blocks if b.start <= stop < b.end)
            end = min(end, max(last, block.end))
        return end

    def forward(self, block: Block, t: int) -> tuple[dict[int, Tensor], Tensor | None]:
        """Logits [V] of the block's masked slots, by offset, and the shadow's logits [B, V]."""
        limit = self.limit(block)
        span = choose(self.policy, self.slots, self.store, block, t, self.forwards, limit)
        z, shadow = self._logits(span, block, limit)
        row_of = {p: j for j, p in enumerate(span.rows)}
        masked = [p for p in range(block.start, block.end) if self.slots.masked[p]]
        shift = self.policy.shift  # position 0 has no query before it, so it is its own
        return {p - block.start: z[row_of[max(p - shift, 0)]] for p in masked}, shadow

    def _logits(self, span: Span, block: Block, limit: int) -> tuple[Tensor, Tensor | None]:
        tokens = [self.slots.tokens[p] for p in span.rows]
        size = block.end - block.start if self.shadowed else 0
        past = self.store.past(span.rows, limit, size)
        shadow: Tensor | None = None
        if self.shadowed:
            z, kv, shadow = wino.forward(self.model, tokens, span.rows, past, block, limit)
        else:
            places = None if past is None else span.rows
            out = self.model.forward(torch.tensor([tokens]), torch.tensor(span.rows), past, places)
            z, kv = out.logits[0], out.kv
        if span.stored:
            self.store.keep(span.rows, kv)
        self.computed += len(span.rows) + size
        return z, shadow

    def write(self, position: int, token: int) -> None:
        """Writes a token in the present forward."""
        self.slots.write(position, token, self.forwards)
        self.store.drift[position] = JUST_WRITTEN

    def fill(self) -> None:
        """Nothing behind an end id matters: its masks become that id."""
        stop = self.first_end()
        if stop is None:
            return
        for p in range(stop, len(self.slots.tokens)):
            if self.slots.masked[p]:
                self.write(p, self.slots.tokens[stop])

    def ended(self) -> int | None:
        """Position of the first end id, once everything before it is written."""
        stop = self.first_end()
        return None if stop is None or any(self.slots.masked[:stop]) else stop


def begin(
    model: OracleModel, prompt: Sequence[int], policy: Policy, gen_length: int, block_length: int
) -> Request:
    """A request whose answer is all masks."""
    size = len(prompt)
    slots = Slots(
        list(prompt) + [model.mask_id] * gen_length,
        [False] * size + [True] * gen_length,
        [PROMPT] * size + [UNWRITTEN] * gen_length,
    )
    layer = model.dims.layers // 2 if policy.cache == "drift" else None
    store = Store(size + gen_length, layer)
    blocks = blocks_of(size, gen_length, block_length)
    return Request(model, policy, blocks, size, slots, store)


def decode(
    request: Request, settings: Settings, quotas: list[list[int]], ends: Ends = NO_ENDS
) -> Result:
    """Runs the blocks one after the other, until the answer ends."""
    slots, prompt, mask_id = request.slots, request.prompt, request.model.mask_id
    writes: list[int] = []
    for block, counts in zip(request.blocks, quotas, strict=True):
        start, end = block.start, block.end
        given = [writer == PROMPT for writer in slots.writer[start:end]]
        rule = BlockRule(settings, end - start, mask_id, counts, ends, given)
        t = 0
        while any(slots.masked[start:end]):
            before = sum(slots.masked)
            z, shadow = request.forward(block, t)
            decision = rule.decide(z, slots.masked[start:end], slots.tokens[start:end], shadow)
            for offset, token in decision.writes.items():
                request.write(start + offset, token)
            for offset in decision.erased:
                slots.erase(start + offset, mask_id)
            request.fill()
            writes.append(before - sum(slots.masked))
            t += 1
            request.forwards += 1
            stop = request.ended()
            if stop is not None:
                answer = slots.tokens[prompt : stop + 1]
                return Result(answer, request.forwards, request.computed, writes)
    return Result(slots.tokens[prompt:], request.forwards, request.computed, writes)


@torch.inference_mode()
def generate(
    model: OracleModel,
    prompts: Sequence[Sequence[int]],
    *,
    gen_length: int,
    block_length: int,
    unmask: str,
    cache: str,
    threshold: float = 0.9,
    factor: float = 1.0,
    entropy_bound: float = 0.1,
    low_threshold: float = 0.4,
    kl_threshold: float = 0.01,
    kl_history: int = 2,
    threshold_back: float = 0.9,
    refresh_delay: int = 0,
    refresh_every: int | None = None,
    refresh_window: int = 0,
    refresh_share: float = 0.25,
    suffix_window: int | None = None,
    early_end: bool = False,
    eos_ids: Sequence[int] = (),
    steps: int | None = None,
    ends: Ends = NO_ENDS,
) -> list[Result]:
    """Decodes each prompt alone; without `early_end` the whole answer is filled."""
    if unmask == "steps" and steps is None:
        raise ValueError('unmask="steps" needs steps')
    if unmask == "wino" and cache not in ("none", "dual"):
        raise ValueError(f'unmask="wino" does not work with cache {cache!r}')
    settings = Settings(
        unmask,
        threshold=threshold,
        factor=factor,
        entropy_bound=entropy_bound,
        low_threshold=low_threshold,
        kl_threshold=kl_threshold,
        kl_history=kl_history,
        threshold_back=threshold_back,
    )
    policy = Policy(
        cache,
        delay=refresh_delay,
        every=refresh_every,
        window=refresh_window,
        share=refresh_share,
        suffix_window=suffix_window,
        shift=int(model.shifted),
    )
    results: list[Result] = []
    for prompt in prompts:
        request = begin(model, prompt, policy, gen_length, block_length)
        request.eos_ids = tuple(eos_ids) if early_end else ()
        request.shadowed = unmask == "wino"
        results.append(decode(request, settings, schedules(request.blocks, steps), ends))
    return results
