"""Requests that fill holes: what their parameters mean, and their canvases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dllmserve._values import MAX_GEN_LENGTH, MAX_STEPS, NotGiven, rank
from dllmserve.catalog import RULES
from dllmserve.core.canvas import Canvas, Range, framed_canvas, template_canvas, window_template
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.rows import ends_of
from dllmserve.errors import InvalidParameterError, PromptError
from dllmserve.holes import Holes
from dllmserve.sampling_params import SamplingParams


def ranges_of(holes: Holes) -> tuple[Range, ...]:
    """Ranges of positions to fill; holes that touch are one.

    Example:
        >>> from dllmserve.holes import Hole
        >>> ranges_of(((2, Hole(3)), (5, Hole(1)), (9, Hole(2))))
        ((2, 6), (9, 11))
    """
    found = list[Range]()
    for start, hole in holes:
        low = found.pop()[0] if found and found[-1][1] == start else start
        found.append((low, start + hole.length))
    return tuple(found)


def template_params(
    params: SamplingParams, holes: Holes, length: int, spec: ModelSpec
) -> SamplingParams:
    """Parameters of a request that fills holes, with what follows from them.

    The answer's length is that of all holes together. ``steps_per_block`` says how many forwards
    a window takes; ``steps`` are spread evenly over all windows of the row, those without a hole
    among them.

    Args:
        params: as they were given.
        holes: of the row.
        length: of the row.
        spec: the model.

    Raises:
        InvalidParameterError: they do not go with holes.
    """
    total = sum(hole.length for _, hole in holes)
    _check(params, holes, total, spec)
    changed: dict[str, Any] = {"gen_length": total}
    if isinstance(params.suffix_window, NotGiven):
        changed["suffix_window"] = None
    if spec.geometry == "full":
        block = params.block_length
        if block is None or isinstance(block, NotGiven):
            block = changed["block_length"] = (not params.sparse and spec.block_length) or None
        if RULES[params.unmask].quota and params.steps_per_block is None:
            window = min(_window(replace(params, block_length=block), length), length)
            changed["steps_per_block"] = _forwards(params, window, length)
    return replace(params, **changed)


def _window(params: SamplingParams, length: int) -> int:
    """Positions of the windows into which a row of so many is cut."""
    if params.block_length is None and params.sparse is None:
        return length
    return params.resolved_block_length


def _forwards(params: SamplingParams, window: int, length: int) -> int:
    """Forwards of a window, from the steps of an answer."""
    if not isinstance(params.steps, NotGiven):
        return -(-params.steps // -(-length // window))
    # nobody gave them: what a preset, or a server, says of the tokens of a step counts
    block = min(params.resolved_block_length, params.gen_length)
    each = max(params.steps // -(-params.gen_length // block), 1)
    return min(-(-window // -(-block // each)), MAX_STEPS)


def check_total(positions: int) -> None:
    """Raise InvalidParameterError if the holes of a row have more than a request may ask for."""
    if positions > MAX_GEN_LENGTH:
        raise InvalidParameterError(
            f"the holes have more than {MAX_GEN_LENGTH} positions: make them shorter, or fill them "
            "in several requests"
        )


def _check(params: SamplingParams, holes: Holes, total: int, spec: ModelSpec) -> None:
    """Refuse what says nothing to a request that fills holes, or contradicts them."""
    err = InvalidParameterError
    check_total(total)
    given = rank(params.gen_length) or rank(params.max_tokens)
    if given and params.gen_length != total:
        raise err(
            f"{params.length_name}={params.gen_length} contradicts the holes, which have {total} "
            "positions: leave it out, since each Hole has its length"
        )
    if params.constrained:
        asked = [n for n in ("regex", "json_schema", "choice") if getattr(params, n) is not None]
        raise err(
            f"{asked[0]} of SamplingParams is what a whole answer matches: give it to the Hole"
        )
    if params.suffix_window is not None and not isinstance(params.suffix_window, NotGiven):
        raise err(
            f"suffix_window={params.suffix_window} leaves out what stands behind a block, which "
            "holes are filled to fit: leave it out"
        )
    may_end = any(hole.may_end for _, hole in holes)
    if params.stop_strings and not (may_end and len(holes) == 1):
        raise err(
            "stop ends the text of a single hole that may end early: leave it out, or give one "
            "Hole with fill='up_to'"
        )
    if may_end and not (ends_of(params, spec) or params.stop_strings):
        why = "ignore_eos=True" if params.ignore_eos else "a model without end ids"
        raise err(
            f"fill='up_to' ends a hole at an end id, and with {why} there is none: give "
            "stop_token_ids, or use fill='exact'"
        )


def hole_canvas(
    ids: Sequence[int], holes: Holes, params: SamplingParams, spec: ModelSpec, name: str
) -> Canvas:
    """The canvas of a row with holes, as the model's geometry wants it.

    Args:
        ids: the row; what they are in holes does not matter.
        holes: of the row.
        params: settled.
        spec: the model.
        name: of the row, in errors.

    Raises:
        PromptError: the model cannot see what stands behind a hole.
    """
    ranges = ranges_of(holes)
    if spec.geometry == "full":
        return template_canvas(ids, ranges, _window(params, row_length(ids, holes)))
    block, part = params.resolved_block_length, params.sub_block_length
    _check_sight(row_length(ids, holes), ranges, block, spec, name)
    if spec.causal_context:
        ((start, end),) = ranges
        return framed_canvas(ids[:start], end - start, block, whole=spec.noise)
    return window_template(ids, ranges, block, spec.logit_shift, part, short=spec.short_blocks)


def row_length(ids: Sequence[int], holes: Holes) -> int:
    """Positions of a row, of which the last hole may not be among the ids."""
    return max(len(ids), *(start + hole.length for start, hole in holes))


def _check_sight(
    length: int, ranges: tuple[Range, ...], block: int, spec: ModelSpec, name: str
) -> None:
    """Refuse holes with given tokens behind them that are not seen where the hole begins."""
    causal = spec.geometry == "causal" or spec.causal_context
    kind = "this" if spec.causal_context else "an autoregressive"
    if causal and not ranges[0][0]:
        raise PromptError(
            f"{name} begins with a hole, and {kind} model needs a token before the hole"
        )
    if ranges == ((ranges[0][0], length),):
        return  # nothing is given behind it
    way = "put the hole at the end, or use a model with full attention"
    if causal:
        raise PromptError(
            f"{name} has tokens behind a hole, and {kind} model does not see what stands behind a "
            f"position: {way}"
        )
    # behind the last of these positions all are holes
    last = ranges[-1][0] - 1 if ranges[-1][1] == length else length - 1
    for start, end in ranges:
        # the first position of a window is read in the window before, if logits are shifted
        sight = start // block * block + block if start % block or not spec.logit_shift else start
        if end <= last and last >= sight:
            raise PromptError(
                f"{name} has a hole from position {start} on and a token behind it at position "
                f"{last}: this block-causal model fills the hole from what it sees there, which "
                f"are positions before {sight} (blocks of {block}): {way}"
            )
