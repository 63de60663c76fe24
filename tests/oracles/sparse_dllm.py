"""OpenMOSS/Sparse-dLLM `llada_generate.py`, and dLLM-Serve's per-head selection.

Each block starts with full forwards; at step `delay_step` a share of the K,V outside the block is
kept, and later steps forward the block alone over [kept, block].
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import rules
from .models import KV, Forward, OracleModel
from .rules import segments, split
from .sampling import Row, Step, Uniform, canvas


def max_pool(scores: list[float], kernel: int) -> list[float]:
    """Max over a window of `kernel` slots around each one, cut at the ends."""
    reach = kernel // 2
    starts = range(-reach, len(scores) - reach)
    return [max(scores[max(0, start) : start + kernel]) for start in starts]


def greatest(scores: list[float], count: int, ties: str) -> list[int]:
    """The indices of the `count` greatest scores, ascending.

    Max-pooling repeats its maxima, so the cut nearly always falls inside a run of equal scores.
    ties="topk" keeps those that upstream keeps: whatever `torch.topk` picks on a CPU from exactly
    this row (padding the row changes its pick). ties="position" keeps the lower positions.
    """
    if ties == "topk":
        return sorted(torch.tensor(scores, dtype=torch.float32).topk(count).indices.tolist())
    if ties == "position":
        return rules.steps(scores, [True] * len(scores), count)
    raise ValueError(f"ties {ties!r} is neither 'topk' nor 'position'")


class Eviction(NamedTuple):
    """How a block's cache is chosen."""

    ratio: float = 0.5
    kernel: int = 3
    head_select: bool = False
    ties: str = "topk"


def by_attention(
    q: Tensor, k: Tensor, outside: list[int], count: int, kernel: int, head_select: bool
) -> list[list[int]]:
    """Kept candidates of each K,V head, ascending, by the most weight that any query gives them.

    q [Q, H, D] of the block, k [N, kv_heads, D] of the whole canvas, both rotated; `outside` are
    the candidates, of which places are returned. Ties go to the lower position.
    """
    kv_heads = k.shape[1]
    best = torch.zeros(kv_heads, len(outside))
    for head in range(q.shape[1]):
        own = head * kv_heads // q.shape[1]
        for query in q[:, head]:
            weights = (k[:, own] @ query / q.shape[2] ** 0.5).softmax(dim=0)
            best[own] = torch.maximum(best[own], weights[outside])
    if not head_select:
        best = best.amax(dim=0, keepdim=True).expand(kv_heads, -1)
    rows = best.tolist()
    return [greatest(max_pool(row, kernel), count, "position") for row in rows]


def select(q: Tensor, k: Tensor, how: Eviction) -> list[list[int]]:
    """Kept candidates of each K,V head, ascending, from rotated q [Q, H, D] and k [N, kv_heads, D].

    A candidate's score is its product with the block's mean query. `head_select`: each K,V head
    pools and picks by itself, its query heads reduced by max; otherwise one set for all heads,
    the query heads averaged. Pooling runs over the candidates as given, so across the block's gap.
    """
    ratio, kernel, head_select, ties = how
    kv_heads = k.shape[1]
    mean = q.mean(dim=0).view(kv_heads, -1, q.shape[2])  # [kv_heads, group, D]
    scores = torch.einsum("hgd,nhd->hgn", mean, k)
    keep = min(max(int(k.shape[0] * ratio), 0), k.shape[0])
    if head_select:
        per_head = scores.amax(dim=1)  # [kv_heads, N]
        return [greatest(max_pool(row, kernel), keep, ties) for row in per_head.tolist()]
    shared = greatest(max_pool(scores.mean(dim=(0, 1)).tolist(), kernel), keep, ties)
    return [shared] * kv_heads


def evict(out: Forward, start: int, end: int, how: Eviction) -> list[KV]:
    """The kept share of a full forward's K,V outside [start, end), [1, kv_heads, keep, D] each."""
    kept: list[KV] = []
    for (k, v), q in zip(out.kv, out.queries, strict=True):
        outside = [i for i in range(k.shape[2]) if not start <= i < end]  # prefix, then suffix
        k, v = k[0, :, outside], v[0, :, outside]  # [kv_heads, N, D]
        block = q[0, :, start:end].transpose(0, 1)  # [Q, heads, D]
        chosen = select(block, k.transpose(0, 1), how)
        heads = range(k.shape[0])
        kept_k = torch.stack([k[h, chosen[h]] for h in heads])
        kept_v = torch.stack([v[h, chosen[h]] for h in heads])
        kept.append((kept_k[None], kept_v[None]))
    return kept


@torch.inference_mode()
def generate(
    model: OracleModel,
    prompts: Tensor,  # [B, P] int64
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    retention_ratio: float = 0.5,
    pool_kernel: int = 3,
    delay_step: int = 1,
    head_select: bool = False,
    ties: str = "topk",
    cache_block_len: int | None = None,
    temperature: float = 0.0,
    uniform: Uniform | None = None,
    trace: list[Step] | None = None,
) -> Tensor:
    """The generated ids [B, G]; rows are decoded one by one, as upstream's batch of one.

    Steps before `delay_step` are full, the one at `delay_step` is full and builds the cache,
    later ones reuse it (upstream has 1 only). The schedule is LLaDA's, without early exit.
    `cache_block_len` (default block_length) is upstream's `config.block_len`, shipped as 32 and
    independent of generate's block_length: scores come from the queries of that many positions
    from the block's start, and none of those positions is a candidate, even beyond the block.
    """
    how = Eviction(retention_ratio, pool_kernel, head_select, ties)
    blocks = segments(prompts.shape[1], gen_length, block_length)
    answers: list[Tensor] = []
    for index, prompt in enumerate(prompts):
        tokens = canvas(prompt, gen_length, model.mask_id)
        row = Row(tokens, model.mask_id, index, temperature, uniform, trace=trace)
        for start, end in blocks:
            kept: list[KV] = []
            positions = torch.arange(start, end)
            counts = split(row.masks(start, end), steps // len(blocks))
            for t, count in enumerate(counts):
                rule = partial(rules.steps, count=count)
                if t <= delay_step:
                    out = model.forward(row.tokens[None])
                    row.advance(out.logits[0], 0, end, rule)
                    if t == delay_step:
                        kept = evict(out, start, start + (cache_block_len or block_length), how)
                else:
                    out = model.forward(row.tokens[None, start:end], positions, kept)
                    row.advance(out.logits[0], start, end, rule)
        answers.append(row.tokens[prompts.shape[1] :])
    return torch.stack(answers)
