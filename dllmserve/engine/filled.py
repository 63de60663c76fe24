"""Templates: from the pieces that people write to a row with holes, and back to texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dllmserve.core.infill import check_total
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request
from dllmserve.core.rows import ends_of
from dllmserve.engine.tokenizer import Tokenizer, prompt_ids
from dllmserve.errors import PromptError
from dllmserve.holes import Hole, Holes
from dllmserve.outputs import FilledHole, RequestOutput, TokenLogprob

#: texts, token ids, and what is to be filled
Template = Sequence[str | Sequence[int] | Hole]


def template_row(tokenizer: Tokenizer | None, template: Any, name: str) -> tuple[list[int], Holes]:
    """Ids of a template's row, 0 where it has holes, and the holes.

    Texts become ids one by one. A text at the very start gets what the tokenizer puts before a
    plain prompt, no other piece gets anything.

    Args:
        tokenizer: the checkpoint's, or None.
        template: a list of texts, lists of ids, and holes.
        name: what errors call it.

    Raises:
        TokenizerError: a text, but the checkpoint has no tokenizer.
        PromptError: something else is in it, or no hole, or no valid Unicode text.
        InvalidParameterError: the holes are too long.
    """
    if isinstance(template, (str, bytes)) or not isinstance(template, Sequence):
        raise PromptError(
            f"{name} must be a list of pieces (texts, lists of token ids, dllmserve.Hole), got "
            f"{type(template).__name__}"
        )
    row, holes, total = list[int](), list[tuple[int, Hole]](), 0
    for place, piece in enumerate(template):
        if isinstance(piece, Hole):
            total += piece.length
            check_total(total)  # before the row has them
            holes.append((len(row), piece))
            row += [0] * piece.length
        else:
            row += _piece_ids(tokenizer, piece, f"{name}[{place}]", first=place == 0)
    if not holes:
        raise PromptError(
            f"{name} has no hole: put a dllmserve.Hole(length) where text is wanted, over HTTP "
            '{"hole": length}'
        )
    return row, tuple(holes)


def _piece_ids(tokenizer: Tokenizer | None, piece: Any, name: str, *, first: bool) -> list[int]:
    if isinstance(piece, int):
        raise PromptError(f"{name} is {piece!r}: give token ids as a list, [{piece!r}]")
    if isinstance(piece, str) and tokenizer is not None:
        ids = tokenizer.encode(piece, special=False)
        return [*tokenizer.prefix_ids, *ids] if first else ids
    return prompt_ids(tokenizer, piece, name)


def with_holes(
    output: RequestOutput, request: Request, spec: ModelSpec, tokenizer: Tokenizer | None
) -> RequestOutput:
    """The output of a request that filled holes.

    Args:
        output: its tokens from the first hole on, what is told of each, and their text.
        request: the request.
        spec: the model.
        tokenizer: None for checkpoints without one; texts are then "".
    """
    start, ends = request.canvas.start, ends_of(request.params, spec)
    given, answer = list(request.canvas.ids), output.token_ids
    row = [*given[:start], *answer, *given[start + len(answer) :]]
    behind = len(row) - start - len(answer)
    steps = [*[0] * start, *output.steps, *[0] * behind]
    said: list[TokenLogprob] | None = None
    if output.logprobs is not None:
        said = [*map(_unsaid, given[:start]), *output.logprobs]
        said += map(_unsaid, given[start + len(answer) :])
    holes, kept, at, ended = list[FilledHole](), list[int](), 0, True
    for low, hole in request.holes:
        own = row[low : min(low + hole.length, start + len(answer))]
        if hole.may_end:
            own = own[: _ended(own, ends)]
            ended &= len(own) < hole.length or own[-1] in ends
        high = low + len(own)
        # stop strings cut the text of a single hole
        text = output.text if request.params.stop_strings else _decode(tokenizer, own)
        logprobs = None if said is None else said[low:high]
        holes.append(FilledHole(hole.name, text, own, steps[low:high], logprobs))
        kept += range(at, high)
        at = low + hole.length
    kept += range(at, len(row))
    ids = [row[place] for place in kept]
    text = _decode(tokenizer, ids)
    if request.params.stop_strings:
        text = _decode(tokenizer, row[:start]) + output.text + _decode(tokenizer, row[at:])
    early = ended and any(hole.may_end for _, hole in request.holes)
    stopped = output.finish_reason == "stop" if request.params.stop_strings else early
    return replace(
        output,
        text=text,
        token_ids=ids,
        finish_reason="stop" if stopped else "length",
        completion_tokens=sum(len(hole.token_ids) for hole in holes),
        steps=[steps[place] for place in kept],
        logprobs=None if said is None else [said[place] for place in kept],
        holes=tuple(holes),
    )


def _unsaid(token: int) -> TokenLogprob:
    """Of a token that was given."""
    return {"token_id": token, "logprob": None, "top": []}


def _ended(ids: Sequence[int], ends: Sequence[int]) -> int:
    """How many of the ids belong to a hole that may end early: up to its first end id."""
    return next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))


def _decode(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    return "" if tokenizer is None else tokenizer.decode(ids)
