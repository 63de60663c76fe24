"""What lm-eval asks about given texts, in token ids. Imports no lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dllmserve.core.model_spec import ModelSpec
from dllmserve.sampling_params import SamplingParams


def moved_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Blanks at the end of a context begin the continuation instead, as in lm-eval.

    Example:
        >>> moved_spaces("The people ", "of")
        ('The people', ' of')
    """
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def greedy_params(length: int, spec: ModelSpec) -> SamplingParams:
    """One token a forward, the surest of the whole answer first (LLaDA's greedy check)."""
    params = SamplingParams(temperature=0.0, gen_length=length, ignore_eos=True)
    if spec.geometry != "full":
        return params
    return replace(params, steps=length, block_length=length)


def rolling(ids: Sequence[int], prefix: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """A text in pieces, each behind what is given of it, so that every token is in one.

    Each fills ``most`` positions; the last one has as much before it as fits.

    Args:
        ids: of the text.
        prefix: what stands before the first token.
        most: positions of a context and a piece.

    Example:
        >>> list(rolling([1, 2, 3, 4, 5], 0, 3))
        [([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5])]
    """
    row, size = [prefix, *ids], most - 1
    for low in range(1, len(row), size):
        high = min(low + size, len(row))
        yield row[max(high - most, 0) : low], row[low:high]
