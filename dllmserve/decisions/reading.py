"""Readings: from questions to a probability for each option, without knowing who runs forwards.

:func:`decide` is a generator. It yields the canvases that are to be read next, which do not depend
on each other, and is sent what was read of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from dllmserve._checks import check_choice, check_int
from dllmserve.decisions.questions import Question
from dllmserve.decisions.template import Line, Page, Reading, Template
from dllmserve.errors import InvalidParameterError

#: most orders of the options that are averaged
MAX_ORDERS = 32
#: most canvases of a round
MAX_READINGS = 4096

#: for each canvas, for each of its holes, log-probabilities of the ids that were asked for
Found = Sequence[Sequence[Sequence[float]]]
#: ids in the slots of questions, from the first on
_Written = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class How:
    """How questions are read.

    Attributes:
        reading: "parallel" (all in one forward, none sees the answer to another) or "sequential"
            (each sees the answers to those before it, which costs a forward for each).
        orders: over how many orders of its options each question's probabilities are averaged;
            each is a reading of its own. The lists are turned, not shuffled.

    Raises:
        InvalidParameterError: neither.
    """

    reading: str = "parallel"
    orders: int = 1

    def __post_init__(self) -> None:
        check_choice(InvalidParameterError, "reading", self.reading, ("parallel", "sequential"))
        check_int(InvalidParameterError, "orders", self.orders, 1, MAX_ORDERS)


def decide(
    template: Template,
    input: str,
    questions: Sequence[Question],
    how: How,
    *,
    together: bool,
    most: int = MAX_READINGS,
) -> Generator[list[Reading], Found, list[list[float]]]:
    """Read the probabilities of all options.

    Args:
        template: of the checkpoint.
        input: what is asked about.
        questions: at least one.
        how: how they are read.
        together: whether a forward can read slots anywhere in an answer, as those of models with
            full attention can. Otherwise each slot is the end of a canvas of its own.
        most: canvases that a round may have.

    Returns:
        For each question the probabilities of its options, which add up to 1.

    Raises:
        ContextLengthError, TokenizerError, PromptError: see :meth:`Template.pages`.
        InvalidParameterError: sequential reading needs more than one page, or a round has too many
            canvases.
    """
    orders = []
    for turned in range(how.orders):
        turns = [_turn(turned, how.orders, len(q.options)) for q in questions]
        left = most // how.orders if together else most
        orders.append(_Order(template.pages(input, questions, turns, left), turns))
    numbers = list(range(len(questions)))
    groups = [numbers]
    if how.reading == "sequential":
        if any(len(order.pages) > 1 for order in orders):
            raise InvalidParameterError(
                "reading='sequential' needs all questions in one prompt, and they do not fit: ask "
                "fewer, or use 'parallel'"
            )
        groups = [[number] for number in numbers]
    found: dict[int, list[float]] = {}
    for group in groups:
        yield from _read(orders, group, together, most)
        for number in group:
            found[number] = _average([(o.turns[number], o.chances(number)) for o in orders])
            best = max(range(len(found[number])), key=found[number].__getitem__)
            for order in orders:
                order.written[number] = order.line(number).codes[best]
    return [found[number] for number in numbers]


class _Order:
    """All questions with their options in one order, and what has been read of them.

    Attributes:
        pages: that hold the questions.
        turns: by question.
        written: answers that are known.
        logs: of each question, log-probabilities of what may follow the ids of a label that stand
            already.
    """

    def __init__(self, pages: Sequence[Page], turns: Sequence[int]) -> None:
        self.pages, self.turns = pages, turns
        self.written: _Written = {}
        self.logs: defaultdict[int, dict[tuple[int, ...], dict[int, float]]] = defaultdict(dict)
        self._page = {number: page for page in pages for number in page.lines}

    def line(self, number: int) -> Line:
        """A question's line."""
        return self._page[number].lines[number]

    def page(self, number: int) -> Page:
        """A question's page."""
        return self._page[number]

    def chances(self, number: int) -> list[float]:
        """Probabilities of a question's options: the product over the slots of their labels."""
        line, logs = self.line(number), self.logs[number]
        sums = [
            math.fsum(logs[code[:depth]][code[depth]] for depth in range(len(code)))
            for code in line.codes
        ]
        return _softmax(sums)


#: a slot to read: of a question in an order, behind ids of its label that stand already
_Slot = tuple[_Order, int, tuple[int, ...]]


def _read(
    orders: Sequence[_Order], group: Sequence[int], together: bool, most: int
) -> Generator[list[Reading], Found, None]:
    """Read a group of questions, slot after slot: labels of two slots take a second round.

    The second slot is read once behind each id of the first one, so that the two are a label.
    """
    slots: list[_Slot] = [(order, number, ()) for order in orders for number in group]
    while slots:
        canvases = list(_together(slots) if together else map(_alone, slots))
        if len(canvases) > most:
            raise InvalidParameterError(
                f"the questions take {len(canvases)} canvases at once, over the {most} that there "
                "may be: ask fewer questions, or with fewer options or orders"
            )
        found = yield [reading for reading, _ in canvases]
        for (_, places), logs in zip(canvases, found, strict=True):
            for (order, number, start), hole in places:
                ids = order.line(number).next_ids(start)
                order.logs[number][start] = dict(zip(ids, logs[hole], strict=True))
        slots = [
            (order, number, (*start, id))
            for order, number, start in slots
            if len(start) + 1 < len(order.line(number).slots)
            for id in order.line(number).next_ids(start)
        ]


#: a canvas, and which of its holes is which slot
_Canvas = tuple[Reading, list[tuple[_Slot, int]]]


def _together(slots: Sequence[_Slot]) -> Iterator[_Canvas]:
    """A canvas for all first slots of a page; each second slot has one of its own."""
    pages: dict[int, list[_Slot]] = {}
    for slot in slots:
        order, number, start = slot
        if start:
            reading, holes = order.page(number).together([number], {**order.written, number: start})
            yield reading, [(slot, holes[0])]
        else:
            pages.setdefault(id(order.page(number)), []).append(slot)
    for group in pages.values():
        order = group[0][0]
        asked = [number for _, number, _ in group]
        reading, holes = order.page(asked[0]).together(asked, order.written)
        yield reading, list(zip(group, holes, strict=True))


def _alone(slot: _Slot) -> _Canvas:
    order, number, start = slot
    return order.page(number).alone(number, {**order.written, number: start}), [(slot, 0)]


def _turn(order: int, orders: int, count: int) -> int:
    """How far a list of options is turned: evenly where there are more options than orders."""
    return order * count // orders if count > orders else order % count


def _average(turned: Sequence[tuple[int, list[float]]]) -> list[float]:
    """Mean probabilities; every turn of the list counts once, however often it was read."""
    by_turn = dict(turned)
    columns = zip(*by_turn.values(), strict=True)
    return _normal([math.fsum(column) / len(by_turn) for column in columns])


def _softmax(logs: Sequence[float]) -> list[float]:
    most = max(logs)
    return _normal([math.exp(log - most) for log in logs])


def _normal(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]
