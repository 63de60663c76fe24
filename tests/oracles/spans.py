"""Which rows of one request's canvas a forward computes: the caches and when they are refreshed.

A forward computes some canvas positions and attends to the stored K,V of the others. Here the
computed ones are always a plain list, and a cache differs from another in that list only.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .models import KV

CACHES = ("none", "prefix", "dual", "rolling", "delayed", "drift")
PROMPT = -1  # the forward that wrote a prompt token: before all others
UNWRITTEN = -2
JUST_WRITTEN = 4.0  # above any 1 - cos: the stored V is still that of a mask
UNKNOWN = 1.0  # drift of a position that was computed once


@dataclass(frozen=True)
class Policy:
    """A cache, its refreshes and how much of the canvas it may see."""

    cache: str
    delay: int = 0
    every: int | None = None
    window: int = 0
    share: float = 0.25
    suffix_window: int | None = None
    shift: int = 0  # 1: the logits of position p come from the query at p - 1

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise ValueError(f"cache {self.cache!r} is none of {CACHES}")
        if self.cache in ("rolling", "drift") and self.delay:
            raise ValueError(f"cache {self.cache!r} knows no refresh_delay")

    def refreshes(self, t: int) -> bool:
        """Whether the block's forward t brings the stored K,V up to date."""
        if t <= self.delay:
            return True
        return self.every is not None and (t - self.delay) % self.every == 0


class Block(NamedTuple):
    """Canvas positions [start, end), and where the block before starts."""

    start: int
    end: int
    before: int | None


@dataclass
class Slots:
    """What stands on the canvas; masked is a flag, since a prompt may contain the mask id."""

    tokens: list[int]
    masked: list[bool]
    writer: list[int]  # the request's forward that wrote the token, PROMPT or UNWRITTEN

    def write(self, position: int, token: int, forward: int) -> None:
        self.tokens[position], self.masked[position] = token, False
        self.writer[position] = forward

    def erase(self, position: int, mask_id: int) -> None:
        self.tokens[position], self.masked[position] = mask_id, True
        self.writer[position] = UNWRITTEN


@dataclass
class Store:
    """K,V of canvas positions as they were last computed, and how much V moved then."""

    length: int
    layer: int | None = None  # whose V tells the drift; None: nobody asks for it
    kv: list[KV] = field(default_factory=list)  # per layer, [1, kv_heads, length, head_dim]
    seen: set[int] = field(default_factory=set)
    drift: dict[int, float] = field(default_factory=dict)

    def past(self, rows: list[int], limit: int, extra: int) -> list[KV] | None:
        """Stored K,V of [0, limit) and `extra` empty rows; None if all are computed anew."""
        if rows == list(range(limit)):
            return None
        if not set(range(limit)) <= self.seen | set(rows):
            raise RuntimeError("a forward would attend to positions that were never computed")
        padded: list[KV] = []
        for k, v in self.kv:
            empty = k.new_zeros(1, k.shape[1], extra, k.shape[3])
            padded.append(
                (torch.cat([k[:, :, :limit], empty], 2), torch.cat([v[:, :, :limit], empty], 2))
            )
        return padded

    def keep(self, rows: list[int], fresh: list[KV]) -> None:
        """Replaces the K,V of these positions; `fresh` may have further rows behind theirs."""
        if not self.kv:
            for k, v in fresh:
                shape = (1, k.shape[1], self.length, k.shape[3])
                self.kv.append((k.new_zeros(shape), v.new_zeros(shape)))
        if self.layer is not None:
            for j, p in enumerate(rows):
                new, old = fresh[self.layer][1][0, :, j], self.kv[self.layer][1][0, :, p]
                self.drift[p] = moved(new, old) if p in self.seen else UNKNOWN
        for (k, v), (fresh_k, fresh_v) in zip(self.kv, fresh, strict=True):
            k[:, :, rows] = fresh_k[:, :, : len(rows)]
            v[:, :, rows] = fresh_v[:, :, : len(rows)]
        self.seen |= set(rows)


def moved(new: Tensor, old: Tensor) -> float:
    """1 - cos of two values [kv_heads, head_dim], all heads as one vector, in whole 1/4096."""
    a, b = new.flatten(), old.flatten()
    drift = float(1 - (a * b).sum() / (a.norm() * b.norm()))
    return max(math.floor(drift * 4096), 0) / 4096


class Span(NamedTuple):
    """Ascending positions of one forward, and whether their K,V are stored."""

    rows: list[int]
    stored: bool


def cut(first: int, last: int, limit: int) -> list[int]:
    """Positions [first, last) inside [0, limit)."""
    return list(range(max(first, 0), min(last, limit)))


def choose(
    policy: Policy, slots: Slots, store: Store, block: Block, t: int, forward: int, limit: int
) -> Span:
    """The rows of the block's forward t, the request's forward `forward`, over [0, limit)."""
    first = block.start - policy.shift  # earliest query that gives logits of the block
    cache = policy.cache
    if cache == "none":
        return Span(cut(0, limit, limit), stored=False)
    if policy.refreshes(t):
        if cache == "rolling" and t == 0 and block.before is not None:
            # what lies behind the block is stored already, unless the window has just opened it
            last = block.end if policy.suffix_window is None else limit
            return Span(cut(block.before - policy.shift, last, limit), stored=True)
        if cache == "drift" and store.seen:
            return Span(drifted(policy, store, cut(first, block.end, limit), limit), stored=True)
        return Span(cut(0, limit, limit), stored=True)
    if cache == "prefix":
        return Span(cut(first - policy.window, limit, limit), stored=False)
    if cache == "delayed":
        return Span(delayed(policy, slots, block, forward), stored=True)
    return Span(cut(first - policy.window, block.end + policy.window, limit), stored=True)


def drifted(policy: Policy, store: Store, own: list[int], limit: int) -> list[int]:
    """The block's own rows, all that were never computed, and the others that moved most."""
    others = [p for p in range(limit) if p not in own]
    new = [p for p in others if p not in store.seen]  # a suffix window has just opened these
    old = sorted((p for p in others if p in store.seen), key=lambda p: (-store.drift[p], p))
    count = math.ceil(policy.share * len(others))
    return sorted(own + new + old[:count])


def delayed(policy: Policy, slots: Slots, block: Block, forward: int) -> list[int]:
    """Masked slots, and those that the forward before wrote: a token is stored one step late."""
    inside = range(block.start, block.end)
    masked = [p for p in inside if slots.masked[p]]
    latest = [p for p in inside if slots.writer[p] == forward - 1]
    if not policy.shift:
        return sorted(masked + latest)
    rows = cut(block.start - 1, block.end, block.end)
    needed = {p for p in rows if slots.masked[p] or p + 1 in masked}
    order = sorted(rows, key=lambda p: (p not in needed, -slots.writer[p], p))
    return sorted(order[: 2 * len(masked) + len(latest)])
