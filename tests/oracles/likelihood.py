"""LLaDA's bound of an answer's log-probability: one forward a sample, nothing shared.

Source: ML-GSAI/LLaDA eval_llada.py, `get_loglikelihood` and `suffix_greedy_prediction`. Which
positions each sample masks is given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .models import OracleModel, shift
from .windows import block_mask, pieces


def logs(model: OracleModel, ids: Sequence[int], sees: Tensor | None = None) -> Tensor:
    """Natural log-probabilities [L, V] float64 of a row."""
    z = model.forward(torch.tensor([list(ids)]), sees=sees).logits.double()
    return (shift(z) if model.shifted else z)[0].log_softmax(dim=-1)


def bound(
    model: OracleModel, prompt: list[int], answer: list[int], samples: Sequence[Sequence[int]]
) -> float:
    """The mean over samples of the masked tokens' log-probabilities, over the masked share."""
    total = 0.0
    for masked in samples:
        row = [*prompt, *answer]
        for place in masked:
            row[len(prompt) + place] = model.mask_id
        found = logs(model, row)
        one = sum(float(found[len(prompt) + p, answer[p]]) for p in masked)
        total += one / (len(masked) / len(answer))
    return total / len(samples)


def block_bound(
    model: OracleModel,
    prompt: list[int],
    answer: list[int],
    window: int,
    samples: Sequence[Sequence[Sequence[int]]],
) -> float:
    """The sum of the bounds of an answer's parts, each behind all tokens before it.

    What follows the answer in its last window is masked.

    Args:
        samples: of each part of :func:`pieces`, the places in it that each sample masks.
    """
    given, total = len(prompt), 0.0
    length = given + len(answer)
    end = -(-length // window) * window
    for inside, own in zip(
        pieces(given, end, window, window, model.shifted), samples, strict=False
    ):
        part = [p for p in inside if p < length]
        if not part:
            break
        seen = (inside.start // window + 1) * window
        # read at the position before, which lies in the window before
        if model.shifted and len(inside) == 1 and inside.start % window == 0:
            seen = inside.start
        for masked in own:
            row = [*prompt, *answer, *[model.mask_id] * (end - length)]
            for place in masked:
                row[part[place]] = model.mask_id
            z = model.forward(torch.tensor([row[:seen]]), sees=block_mask(0, seen, window))
            found = z.logits[0].double().log_softmax(dim=-1)
            places = [part[place] for place in masked]
            one = sum(float(found[p - int(model.shifted), answer[p - given]]) for p in places)
            total += one / (len(masked) / len(part)) / len(own)
    return total


def greedy(model: OracleModel, prompt: list[int], length: int) -> list[int]:
    """One token a forward over the whole answer, the surest first."""
    row, given = [*prompt, *[model.mask_id] * length], len(prompt)
    open_ = set(range(given, given + length))
    while open_:
        found = logs(model, row)
        found[:, model.mask_id] = -torch.inf
        place = max(sorted(open_), key=lambda p: float(found[p].max()))
        row[place] = int(found[place].argmax())
        open_.remove(place)
    return row[given:]
