"""The template: an input and questions about it as a prompt, and an answer whose labels are slots.

With a chat template the prompt is a user's message, and the answer is the assistant's turn that
follows it, up to its end; without one the answer follows the prompt's text. For two questions::

    Read the text. Then answer every question about it with the label of one of its options.

    Text:
    The parcel arrived with a broken lid.

    Question 1: Something is broken. (yes or no)

    Question 2: Which team should handle this?
    A: billing - Invoices, refunds, payments
    B: shipping

    Answer with a line for each question: its number, a colon and the label.

    1: _
    2: _

Tokens of the two slots, ``_``, are what is read. What users wrote holds no control tokens of a chat
template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dllmserve.decisions.labels import LabelMaker, Labels
from dllmserve.decisions.questions import Question
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import ContextLengthError

_ASK = "Read the text. Then answer every question about it with the label of one of its options."
_TELL = "Answer with a line for each question: its number, a colon and the label."
#: characters that a token stands for at most, on average, in a text that is tokenised at all
_CHARACTERS = 16


@dataclass(frozen=True)
class Reading:
    """A canvas, and what is to be read of it in one forward.

    Attributes:
        ids: tokens; what they are in holes does not matter.
        holes: positions to fill, ascending.
        asked: for each hole the ids whose log-probabilities are wanted; () for a hole that is only
            to be masked.
    """

    ids: list[int]
    holes: tuple[int, ...]
    asked: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Line:
    """A question's line of the answer.

    Attributes:
        ids: its tokens.
        slots: places of its slots in it.
        codes: of each option, in the order of the question's, the ids of its label.
    """

    ids: list[int]
    slots: tuple[int, ...]
    codes: tuple[tuple[int, ...], ...]

    def next_ids(self, written: tuple[int, ...]) -> tuple[int, ...]:
        """What may stand in the slot behind those that are written."""
        depth = len(written)
        return tuple(dict.fromkeys(c[depth] for c in self.codes if c[:depth] == written))


@dataclass(frozen=True)
class Page:
    """A prompt with some of a request's questions.

    Attributes:
        prompt: ids up to where the answer begins.
        lines: of the answer, by the question's number in the request.
        end: ids behind the last line.
    """

    prompt: list[int]
    lines: Mapping[int, Line]
    end: tuple[int, ...]

    def __len__(self) -> int:
        """Positions of the whole canvas."""
        return len(self.prompt) + sum(len(line.ids) for line in self.lines.values()) + len(self.end)

    def together(
        self, asked: Sequence[int], written: Mapping[int, tuple[int, ...]]
    ) -> tuple[Reading, list[int]]:
        """The whole answer, with every slot that is not written masked.

        Args:
            asked: questions whose next slot is to be read.
            written: ids in the slots of questions, from the first slot on.

        Returns:
            The reading, and for each question the number of its hole.
        """
        ids, holes, wanted = list(self.prompt), list[int](), list[tuple[int, ...]]()
        found: dict[int, int] = {}
        for number, line in self.lines.items():
            start, own = len(ids), written.get(number, ())
            ids += line.ids
            for depth, slot in enumerate(line.slots):
                if depth < len(own):
                    ids[start + slot] = own[depth]
                    continue
                read = depth == len(own) and number in asked
                if read:
                    found[number] = len(holes)
                holes.append(start + slot)
                wanted.append(line.next_ids(own) if read else ())
        reading = Reading([*ids, *self.end], tuple(holes), tuple(wanted))
        return reading, [found[number] for number in asked]

    def alone(self, number: int, written: Mapping[int, tuple[int, ...]]) -> Reading:
        """Up to a question's next slot, and of the lines before it those that are written whole."""
        ids = list(self.prompt)
        for other, line in self.lines.items():
            own = written.get(other, ())
            if other >= number or len(own) < len(line.slots):
                continue
            start = len(ids)
            ids += line.ids
            for slot, id in zip(line.slots, own, strict=True):
                ids[start + slot] = id
        line, own, start = self.lines[number], written.get(number, ()), len(ids)
        slot = line.slots[len(own)]
        ids += line.ids[: slot + 1]
        for place, id in zip(line.slots, own, strict=False):
            ids[start + place] = id
        return Reading(ids, (start + slot,), (line.next_ids(own),))


class Template:
    """Makes pages for one checkpoint.

    Args:
        tokenizer: the checkpoint's.
        end_id: what ends a turn, or a text; None without one.
        room: most positions of a canvas.
    """

    def __init__(self, tokenizer: Tokenizer, end_id: int | None, room: int) -> None:
        self._tokenizer, self._room = tokenizer, room
        self._maker = LabelMaker(lambda text: tokenizer.encode(text, special=False))
        chat = tokenizer.has_chat_template
        self._end = (end_id,) if chat and end_id is not None else ()

    def pages(
        self, input: str, questions: Sequence[Question], turns: Sequence[int], most: int
    ) -> list[Page]:
        """Pages that have room for all questions, as many on each as fit, in their order.

        Args:
            input: what is asked about.
            questions: at least one.
            turns: how many options are moved from the head of each question's list to its end.
            most: pages that there may be.

        Raises:
            ContextLengthError: the input does not fit with one of the questions, or there are too
                many pages.
            TokenizerError: the tokenizer has no labels of one token.
            PromptError: a text is no valid Unicode, or holds a character that is a control token.
        """
        self._check_characters(input, questions)
        labels = [self._maker.labels(question) for question in questions]
        blocks = [_block(*asked) for asked in zip(questions, labels, turns, strict=True)]
        sizes = [len(self._tokenizer.encode(block, special=False)) + 12 for block in blocks]
        base = len(self._prompt(input, []))
        pages, start = list[Page](), 0
        while start < len(questions):
            if len(pages) == most:
                raise ContextLengthError(
                    f"{len(questions)} questions need more than {most} prompts of {self._room} "
                    "tokens, each with the whole input: ask fewer, or shorten the input"
                )
            end, used = start, base
            while end < len(questions) and (end == start or used + sizes[end] <= self._room):
                used += sizes[end]
                end += 1
            page = self._page(input, blocks, labels, range(start, end), turns)
            while len(page) > self._room and end - start > 1:  # the sizes are near the truth only
                end -= max(1, (end - start) // 16)
                page = self._page(input, blocks, labels, range(start, end), turns)
            self._check_room(len(page), start)
            pages.append(page)
            start = end
        return pages

    def _page(
        self,
        input: str,
        blocks: Sequence[str],
        labels: Sequence[Labels],
        numbers: range,
        turns: Sequence[int],
    ) -> Page:
        lines = {}
        for place, number in enumerate(numbers, 1):
            own = labels[number]
            ids, slots = self._maker.line(place, own)
            count, shift = len(own.names), 0 if own.fixed else turns[number]
            codes = tuple(own.codes[(option - shift) % count] for option in range(count))
            lines[number] = Line(ids, slots, codes)
        return Page(self._prompt(input, [blocks[n] for n in numbers]), lines, self._end)

    def _prompt(self, input: str, blocks: Sequence[str]) -> list[int]:
        asked = [f"Question {place}: {block}" for place, block in enumerate(blocks, 1)]
        text = "\n\n".join([_ASK, f"Text:\n{input}", *asked, _TELL])
        if self._tokenizer.has_chat_template:
            message = {"role": "user", "content": text}
            return self._tokenizer.encode_chat([message], literal_contents=True)
        return self._tokenizer.encode(f"{text}\n\n")

    def _check_characters(self, input: str, questions: Sequence[Question]) -> None:
        """Refuse texts that cannot fit before they are tokenised."""
        limit = _CHARACTERS * self._room
        for number, question in enumerate(questions):
            said = [question.instructions]
            said += [o.text + (o.description or "") for o in question.options]
            count = len(input) + sum(map(len, said))
            if count > limit:
                raise ContextLengthError(
                    f"the input and questions[{number}] have {count} characters, over the {limit} "
                    f"that {self._room} tokens could hold: shorten them"
                )

    def _check_room(self, tokens: int, number: int) -> None:
        if tokens > self._room:
            raise ContextLengthError(
                f"the input and questions[{number}] take {tokens} tokens, over the {self._room} "
                "that a request may have here: shorten them, or raise max_model_len or "
                "max_num_batched_tokens"
            )


def _block(question: Question, labels: Labels, turn: int) -> str:
    """A question as the prompt shows it, with its options behind it."""
    count = len(question.options)
    order = [(place + turn) % count for place in range(count)]
    words = question.kind == "predicate" and labels.fixed
    if words and not any(option.description for option in question.options):
        first, second = (labels.names[option] for option in order)
        return f"{question.instructions} ({first} or {second})"
    lines = [question.instructions] if question.instructions else []
    for place, number in enumerate(order):
        option = question.options[number]
        label = labels.names[number if labels.fixed else place]
        said = [text for text in ("" if words else option.text, option.description) if text]
        lines.append(f"{label}: {' - '.join(said)}" if said else label)
    return "\n".join(lines)
