"""Plans and rows as bytes of plain integers, from rank 0 to the others.

Every message is a list of int64 in the machine's byte order: ranks share a host. The first is
its kind. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import IntEnum

from dllmserve.catalog import RULES
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, RowSelect, Track
from dllmserve.sampling_params import CONFIDENCE

_FIELDS = len(Span._fields)
_NO_SPAN = (0,) * _FIELDS
_RULES = tuple(RULES)
_RULE_NUMBERS = {name: number for number, name in enumerate(_RULES)}
#: integers of an entry: its three spans, and what else there is to say
_ENTRY = 3 * _FIELDS + 5


class Kind(IntEnum):
    """What a message asks for."""

    PLAN = 1
    ROW = 2
    STOP = 3
    #: the rest is the text of what a call returned on rank 0
    RETURNED = 4


def encode_plan(plan: StepPlan) -> bytes:
    """A plan as a message.

    Example:
        >>> decode_plan(memoryview(encode_plan(StepPlan(()))).cast("q"))
        StepPlan(entries=())
    """
    numbers = [int(Kind.PLAN)]
    for entry in plan.entries:
        numbers += entry.span
        numbers += entry.uncond or _NO_SPAN
        numbers += entry.shadow or _NO_SPAN
        numbers += (
            entry.masks,
            _RULE_NUMBERS[entry.rule],
            entry.last,
            entry.uncond is not None,
            entry.shadow is not None,
        )
    return array("q", numbers).tobytes()


def decode_plan(numbers: Sequence[int]) -> StepPlan:
    """The plan of a message of kind PLAN."""
    entries = []
    for start in range(1, len(numbers), _ENTRY):
        spans = [Span(*numbers[start + i * _FIELDS : start + (i + 1) * _FIELDS]) for i in range(3)]
        masks, rule, last, guided, shadowed = numbers[start + 3 * _FIELDS : start + _ENTRY]
        entries.append(
            StepEntry(
                span=spans[0],
                uncond=spans[1] if guided else None,
                masks=masks,
                rule=_RULES[rule],
                last=bool(last),
                shadow=spans[2] if shadowed else None,
            )
        )
    return StepPlan(tuple(entries))


def encode_row(init: RowInit) -> bytes:
    """A row of a new request as a message."""
    select = init.select
    lists: tuple[Sequence[int], ...] = (
        init.prompt,
        _bits(init.floats),
        init.ints,
        init.quotas,
        init.pages,
        [token for token, _ in init.bias],
        _bits([value for _, value in init.bias]),
        init.last,
        init.history,
    )
    numbers = [
        int(Kind.ROW),
        init.row,
        init.gen_length,
        CONFIDENCE.index(init.confidence),
        init.sampled,
        init.filtered,
        select.pool_kernel,
        select.window,
        select.attention,
        int(init.track),
    ]
    for values in lists:
        numbers.append(len(values))
        numbers += values
    return array("q", numbers).tobytes()


def decode_row(numbers: Sequence[int]) -> RowInit:
    """The row of a message of kind ROW."""
    row, gen_length, confidence, sampled, filtered = numbers[1:6]
    pool_kernel, window, attention, track = numbers[6:10]
    lists, place = [], 10
    while place < len(numbers):
        end = place + 1 + numbers[place]
        lists.append(list(numbers[place + 1 : end]))
        place = end
    prompt, floats, ints, quotas, pages, tokens, values, last, history = lists
    return RowInit(
        row=row,
        prompt=prompt,
        gen_length=gen_length,
        floats=_floats(floats),
        ints=tuple(ints),
        quotas=tuple(quotas),
        pages=pages,
        confidence=CONFIDENCE[confidence],
        sampled=bool(sampled),
        filtered=bool(filtered),
        select=RowSelect(pool_kernel, window, bool(attention)),
        bias=tuple(zip(tokens, _floats(values), strict=True)),
        last=tuple(last),
        track=Track(track),
        history=tuple(history),
    )


def encode_kind(kind: Kind, text: str = "") -> bytes:
    """A message of a kind without numbers, and its text."""
    return array("q", (kind,)).tobytes() + text.encode()


def read(data: bytes) -> tuple[Kind, list[int], str]:
    """Kind, all numbers and text of a message."""
    numbers: array[int] = array("q")
    numbers.frombytes(data[:8])
    kind = Kind(numbers[0])
    if kind is Kind.RETURNED:
        return kind, [], data[8:].decode()
    numbers.frombytes(data[8:])
    return kind, numbers.tolist(), ""


def _bits(values: Sequence[float]) -> list[int]:
    """The bits of float64 numbers, as integers."""
    return list(memoryview(array("d", values).tobytes()).cast("q"))


def _floats(bits: Sequence[int]) -> tuple[float, ...]:
    """The inverse."""
    return tuple(memoryview(array("q", bits).tobytes()).cast("d"))
