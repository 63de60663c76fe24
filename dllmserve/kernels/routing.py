"""Routing of a mixture of experts: which experts a token takes, and with what weight.

Two launches: logits, and choices. The second also says where each expert finds its pairs, by
counting up the number of those that came before; in which order they come is left open, and nothing
depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from dllmserve.core.model_spec import ExpertSpec

_LOWEST = tl.constexpr(float("-inf"))
_NONE = tl.constexpr(-(2**31))
#: more than the number of any expert
_LAST = tl.constexpr(0xFFFF)


# numbers of tokens must not choose the machine code
@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    depth: tl.tensor,
    experts: tl.tensor,
    held: tl.tensor,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    HELD: tl.constexpr,
) -> None:
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):  # nothing is counted before this is over
        e = tl.arange(0, HELD)
        tl.store(counts_ptr + e, e * 0, mask=e < held)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    k = tl.arange(0, DEPTH)
    token_ok, expert_ok = (token < num_tokens)[:, None], (expert < experts)[:, None]
    x_place = x_ptr + token.to(tl.int64)[:, None] * depth + k[None, :]
    gate_place = gate_ptr + expert[:, None] * depth + k[None, :]
    total = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    for low in range(0, depth, DEPTH):
        inside = (k < depth - low)[None, :]
        x = tl.load(x_place + low, mask=token_ok & inside, other=0.0)
        gate = tl.load(gate_place + low, mask=expert_ok & inside, other=0.0)
        total = tl.dot(x, tl.trans(gate), total, input_precision="ieee")
    place = logits_ptr + token.to(tl.int64)[:, None] * experts + expert[None, :]
    tl.store(place, total, mask=token_ok & (expert < experts)[None, :])


@triton.jit
def _scores(
    logits: tl.tensor,
    bias: tl.tensor,
    top: tl.tensor,  # of a token's logits
    total: tl.tensor,  # of exp(logit - top)
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What weights are made of, and what the choice looks at."""
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        score = tl.exp(logits - top) / total
    chosen = score
    if BIAS != 0:
        chosen = score + bias
    if BIAS == 2:
        score = chosen
    return score, chosen


@triton.jit
def _weights(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    ids: tl.tensor,
    routed: tl.tensor,  # which of them are experts
    top: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FACTORS: tl.constexpr,
) -> tl.tensor:
    """What a token's experts count."""
    own = tl.load(logits_ptr + ids, mask=routed, other=0.0)
    bias = tl.load(bias_ptr + ids, mask=routed, other=0.0)
    weights, _ = _scores(own, bias, top, total, SIGMOID, BIAS)
    weights = tl.where(routed, weights, 0.0)
    if NORMALIZE:
        weights = tl.div_rn(weights, tl.sum(weights, 0) + 1e-20)
    weights = weights * scale
    if FACTORS:
        weights *= tl.load(factors_ptr + ids, mask=routed, other=0.0).to(tl.float32)
    return weights


@triton.jit
def _ordered(key: tl.tensor, real: tl.tensor) -> tl.tensor:
    """Keys float32 as int32 of the same order, which a warp reduces in one instruction.

    What is not a number comes behind all that is, and what is not real behind that, so choices
    are different in any case.
    """
    key = tl.where(key == key, key, _LOWEST) + 0.0  # -0 equals 0
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NONE)


@triton.jit
def _take_best(keys: tl.tensor, place: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The place of the largest key, of equal ones the first, and the keys without it."""
    best = tl.max(keys, 0)
    one = tl.min(tl.where(keys == best, place, _LAST), 0)
    return one, tl.where(place == one, _NONE, keys)


@triton.jit
def _in_best_groups(
    key: tl.tensor,  # [GROUPS, SIZE]
    real: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP: tl.constexpr,
) -> tl.tensor:
    """Which experts are in the groups whose two largest keys add up to most."""
    group, place = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    key = tl.where(real & (key == key), key, _LOWEST)
    first = tl.max(key, 1)
    here = tl.min(tl.where(key == first[:, None], place[None, :], SIZE), 1)
    second = tl.max(tl.where(place[None, :] == here[:, None], _LOWEST, key), 1)
    worth = _ordered(first + second, group < groups)
    kept = group < 0
    for _ in range(TOP):
        one, worth = _take_best(worth, group)
        kept = kept | (group == one)
    return real & kept[:, None]


@triton.jit
def _list_pairs(
    counts_ptr: tl.tensor,
    order_ptr: tl.tensor,
    place: tl.tensor,  # [SLOTS] of each choice's expert among those held; outside them: not held
    slot: tl.tensor,
    pair: tl.tensor,
    token: tl.tensor,
    num_tokens: tl.tensor,
    held: tl.tensor,  # routed experts that are
    CHOICES: tl.constexpr,
    SHARED: tl.constexpr,
) -> None:
    """Count a token's pairs, and note each in its expert's order."""
    counted = (slot < CHOICES) & (place >= 0) & (place < held)
    rank = tl.atomic_add(counts_ptr + place, 1, mask=counted)
    if SHARED != 0:  # every token takes it, so nothing has to be counted
        rank = tl.where(slot == CHOICES, token, rank)
        place = tl.where(slot == CHOICES, held, place)
        counted = counted | (slot == CHOICES)
        if token == 0:
            tl.store(counts_ptr + held, num_tokens)
    tl.store(order_ptr + place.to(tl.int64) * num_tokens + rank, pair.to(tl.int32), mask=counted)


# numbers of tokens must not choose the machine code
@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    order_ptr: tl.tensor,
    num_tokens: tl.tensor,
    experts: tl.tensor,
    groups: tl.tensor,
    first_held: tl.tensor,
    held: tl.tensor,
    scale: tl.tensor,
    CHOICES: tl.constexpr,
    SHARED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FACTORS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    token, size = tl.program_id(0), experts // groups
    logits_ptr += token.to(tl.int64) * experts
    place = tl.arange(0, SIZE)[None, :]
    expert = tl.arange(0, GROUPS)[:, None] * size + place
    real = (place < size) & (expert < experts)
    logits = tl.load(logits_ptr + expert, mask=real, other=_LOWEST)
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0)
    top = tl.max(tl.max(logits, 1), 0)
    total = tl.sum(tl.sum(tl.exp(logits - top), 1), 0)
    _, key = _scores(logits, bias, top, total, SIGMOID, BIAS)
    if TOP != 0:
        real = _in_best_groups(key, real, groups, GROUPS, SIZE, TOP)
    keys = tl.reshape(_ordered(key, real), (GROUPS * SIZE,))
    number = tl.reshape(expert, (GROUPS * SIZE,))
    slot = tl.arange(0, SLOTS)
    ids = slot * 0
    for choice in range(CHOICES):
        one, keys = _take_best(keys, number)
        ids = tl.where(slot == choice, one, ids)
    routed = slot < CHOICES
    weights = _weights(
        *(logits_ptr, bias_ptr, factors_ptr, ids, routed, top, total, scale),
        *(SIGMOID, BIAS, NORMALIZE, FACTORS),
    )
    if SHARED != 0:
        ids = tl.where(slot == CHOICES, experts, ids)
        weights = tl.where(slot == CHOICES, 1.0, weights)
    at = token.to(tl.int64) * (CHOICES + SHARED) + slot
    tl.store(ids_ptr + at, ids, mask=slot < CHOICES + SHARED)
    tl.store(weights_ptr + at, weights, mask=slot < CHOICES + SHARED)
    place = tl.where(slot < CHOICES + SHARED, ids - first_held, -1)
    _list_pairs(counts_ptr, order_ptr, place, slot, at, token, num_tokens, held, CHOICES, SHARED)


class Choices(NamedTuple):
    """What tokens take, and where experts find it; K pairs a token, E' experts on this rank.

    Attributes:
        ids: [N, K] int32 experts, a shared one (number E) last.
        weights: [N, K] float32.
        counts: [E'] int32 pairs of each expert.
        order: [E', N] int32, the pairs of each expert, n * K + j; undefined behind them.
    """

    ids: Tensor
    weights: Tensor
    counts: Tensor
    order: Tensor


def _logits(x: Tensor, gate: Tensor, counts: Tensor) -> Tensor:
    """The router's product [N, E] float32; ``counts`` are set to 0."""
    (tokens, depth), count = x.shape, len(gate)
    logits = torch.empty((tokens, count), dtype=torch.float32, device=x.device)
    exact = x.dtype == torch.float32
    # measured on an H200 with 256 experts: 5 us up to 512 tokens, 8 for 2,048
    tile, each = (16, 16) if exact else (64, 16 if tokens <= 1024 else 64)
    _logits_kernel[(max(triton.cdiv(tokens, tile), 1), triton.cdiv(count, each))](
        *(x, gate, logits, counts, tokens, depth, count, len(counts)),
        TOKENS=tile,
        EXPERTS=each,
        DEPTH=32 if exact else 128,
        HELD=triton.next_power_of_2(len(counts)),
        num_warps=4,
        num_stages=3 if exact else 4,
    )
    return logits


def choose_experts(
    x: Tensor,  # [N, d]
    gate: Tensor,  # [E, d]
    bias: Tensor | None,  # [E] float32
    experts: ExpertSpec,
    held: range,
    factors: Tensor | None = None,  # [E]
) -> Choices:
    """The experts of each token. Ties go to the lower number.

    Args:
        x, gate: of one dtype, contiguous; logits are float32 in any case.
        bias: of scores, if the model has one.
        experts: how they are chosen.
        held: those that this rank has; pairs of others are in no expert's order. With number E
            among them, that is a shared one, which every token takes.
        factors: of each expert, which its weights are multiplied by.
    """
    tokens, count = len(x), experts.count
    shared, stored = int(count in held), len(held)
    pairs = experts.per_token + shared

    def room(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=x.device)

    found = Choices(
        ids=room(tokens, pairs),
        weights=room(tokens, pairs, dtype=torch.float32),
        counts=room(stored),
        order=room(stored, tokens),
    )
    logits = _logits(x, gate, found.counts)
    if tokens:
        grouped = experts.groups > experts.top_groups
        groups = experts.groups if grouped else 1
        _choose_kernel[(tokens,)](
            *(logits, logits if bias is None else bias),
            *(logits if factors is None else factors, *found),
            *(tokens, count, groups, held.start, stored - shared, experts.scale),
            CHOICES=experts.per_token,
            SHARED=shared,
            SIGMOID=experts.score == "sigmoid",
            BIAS=("", "choice", "weights").index(experts.bias),
            NORMALIZE=experts.normalize,
            FACTORS=factors is not None,
            GROUPS=triton.next_power_of_2(groups),
            SIZE=triton.next_power_of_2(count // groups),
            TOP=experts.top_groups if grouped else 0,
            SLOTS=triton.next_power_of_2(pairs),
            num_warps=1,
        )
    return found
