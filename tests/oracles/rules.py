"""The unmask rules of one row, in scalar loops.

Every rule takes the row's scores and its mask flags and returns the chosen slots, ascending. Equal
scores are ordered by position, lower first; upstream leaves that to `torch.topk`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch


def split(n: int, steps: int) -> list[int]:
    """LLaDA `get_num_transfer_tokens`: n masks over the steps, the remainder to the first ones."""
    return [n // steps + (1 if t < n % steps else 0) for t in range(steps)]


def dream_count(n: int, step: int, steps: int, eps: float = 1e-3) -> int:
    """Dream `_sample`: how many of the n masks left are revealed at this step, in float32."""
    if step == steps - 1:
        return n
    times = torch.linspace(1, eps, steps + 1)
    return int(torch.tensor(float(n)) * (1 - times[step + 1] / times[step]))


def dream_counts(n: int, steps: int, eps: float = 1e-3) -> list[int]:
    """The counts of all steps, where each revealed slot stays revealed."""
    counts: list[int] = []
    for step in range(steps):
        counts.append(dream_count(n - sum(counts), step, steps, eps))
    return counts


def ranked(scores: Sequence[float], masked: Sequence[bool]) -> list[int]:
    """Masked slots by falling score."""
    slots = [i for i, open_ in enumerate(masked) if open_]
    return sorted(slots, key=lambda i: (-scores[i], i))


def steps(confidence: Sequence[float], masked: Sequence[bool], count: int) -> list[int]:
    """The fixed schedule (LLaDA `generate`): the `count` most confident slots."""
    return sorted(ranked(confidence, masked)[:count])


def sequential(masked: Sequence[bool], count: int) -> list[int]:
    """SDAR `sequential`: the `count` leftmost slots."""
    return [i for i, open_ in enumerate(masked) if open_][:count]


def dynamic(
    confidence: Sequence[float], masked: Sequence[bool], tau: float, count: int
) -> list[int]:
    """SDAR `low_confidence_dynamic`: all above tau, or the `count` best if those are more."""
    high = [i for i, open_ in enumerate(masked) if open_ and confidence[i] > tau]
    return high if len(high) >= count else sorted(ranked(confidence, masked)[:count])


def threshold(confidence: Sequence[float], masked: Sequence[bool], tau: float) -> list[int]:
    """Fast-dLLM `get_transfer_index`: the best slot always, any other iff c >= tau."""
    order = ranked(confidence, masked)
    return sorted(i for rank, i in enumerate(order) if rank == 0 or confidence[i] >= tau)


def factor(confidence: Sequence[float], masked: Sequence[bool], f: float) -> list[int]:
    """Fast-dLLM `get_transfer_index_dynamic`: rank j passes while c_j >= 1 - f / (j + 1).

    Kept as upstream runs, not as meant: a failure at the last rank still reveals all slots, and so
    does a failure at rank 2 of 2.
    """
    order = ranked(confidence, masked)
    n = len(order)
    if n == 0:
        return []
    stop = n - 1  # upstream's loop variable keeps its last value when no rank fails
    for j in range(2, n + 1):  # rank 1 is compared with -1 and never fails
        if confidence[order[j - 1]] < 1 - f / (j + 1):
            stop = j - 1
            break
    if stop in (0, n - 1):
        stop += 1
    return sorted(order[:stop])


def entropy_bound(entropy: Sequence[float], masked: Sequence[bool], gamma: float) -> list[int]:
    """EB sampling: by rising entropy, slot j iff the entropies before it sum to at most gamma."""
    order = ranked([-h for h in entropy], masked)
    chosen: list[int] = []
    spent = 0.0
    for slot in order:
        if chosen and spent > gamma:
            break
        chosen.append(slot)
        spent += entropy[slot]
    return sorted(chosen)


def threshold_strict(
    confidence: Sequence[float], masked: Sequence[bool], tau: float, least: int = 1
) -> list[int]:
    """SGLang `LowConfidence`: every c > tau; the best slot only where there is none.

    LLaDA2.1 writes the `least` best (its `num_to_transfer`) where fewer are above tau.
    """
    order = ranked(confidence, masked)
    sure = [i for i in order if confidence[i] > tau]
    return sorted(sure if len(sure) >= least else order[:least])


def factor_strict(confidence: Sequence[float], masked: Sequence[bool], f: float) -> list[int]:
    """Fast-dLLM's factor as meant: the first rank that fails ends it and is not written."""
    order = ranked(confidence, masked)
    chosen = order[:1]
    for j in range(2, len(order) + 1):
        if confidence[order[j - 1]] < 1 - f / (j + 1):
            break
        chosen.append(order[j - 1])
    return sorted(chosen)


def runs(masked: Sequence[bool]) -> list[list[int]]:
    """The slots of each maximal run of masks; the block's edges end a run."""
    found: list[list[int]] = []
    for i, open_ in enumerate(masked):
        if open_ and i > 0 and masked[i - 1]:
            found[-1].append(i)
        elif open_:
            found.append([i])
    return found


def hierarchy(
    confidence: Sequence[float], masked: Sequence[bool], tau: float, low: float
) -> list[int]:
    """dInfer `HierarchyDecoder` without its remasking: one slot a run, and whatever is sure."""
    chosen = set(ranked(confidence, masked)[:1])
    chosen |= {i for i, open_ in enumerate(masked) if open_ and confidence[i] > tau}
    for run in runs(masked):
        best = min(run, key=lambda i: (-confidence[i], i))
        if confidence[best] > low:
            chosen.add(best)
    return sorted(chosen)


def credit_threshold(confidence: Sequence[float], masked: Sequence[bool], tau: float) -> list[int]:
    """dInfer's threshold: it drops to just below the best slot, so that one always passes."""
    order = ranked(confidence, masked)
    if not order:
        return []
    bound = min(tau, confidence[order[0]] - 1e-5)
    return sorted(i for i in order if confidence[i] >= bound)


def klass(
    confidence: Sequence[float],
    masked: Sequence[bool],
    calm: Sequence[int],
    tau: float,
    history: int,
) -> list[int]:
    """KLASS: sure slots whose distribution has been calm for `history` forwards, or the best.

    `calm` counts a slot's latest forwards in a row whose KL was below the threshold; the first
    forward of a block has no KL, so it counts as none.
    """
    order = ranked(confidence, masked)
    stable = [i for i in order if calm[i] >= history and confidence[i] > tau]
    return sorted(stable or order[:1])


def wino(
    confidence: Sequence[float],
    masked: Sequence[bool],
    back: Sequence[float],  # back-confidence of the token that a slot holds
    written: Sequence[bool],  # by an earlier forward, so it may be masked again
    last_accept: int,
    tau: float,
    tau_back: float,
) -> tuple[list[int], list[int], int]:
    """WINO: slots written now, slots masked again, and the next forward's `last_accept`.

    Fewer are masked again than the forward before has accepted, or it would never end.
    """
    order = ranked(confidence, masked)
    cap = min(max(7 * len(order) // 10, 5), 20)
    accepted = [i for i in order if confidence[i] > tau][:cap] or order[:1]
    suspects: list[int] = []
    if len(accepted) > 1:
        doubted = [open_ and back[i] < tau_back for i, open_ in enumerate(written)]
        suspects = ranked([-b for b in back], doubted)
        if len(suspects) >= last_accept:
            suspects = suspects[: last_accept - 1]
    return sorted(accepted), sorted(suspects), len(accepted)


def segments(start: int, length: int, block: int) -> list[tuple[int, int]]:
    """The [start, end) of each block of an answer; the length must be a multiple of the block."""
    if length % block:
        raise ValueError(f"gen_length {length} is not a multiple of block_length {block}")
    edges = range(start, start + length + 1, block)
    return list(pairwise(edges))
