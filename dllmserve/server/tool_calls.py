"""Calls of tools in answers: read from their text, and told in OpenAI's shape."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dllmserve.engine.tool_form import ToolForm


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        kind: "text" to read, "call" for the beginning of one, "arguments" for a part of its JSON.
        text: the text, the name or the part.
        call: number of the call; -1 of a text.
    """

    kind: Literal["text", "call", "arguments"]
    text: str
    call: int = -1


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        name: of the function.
        arguments: a JSON object, as the model wrote it.
        id: by which its answer will name it.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def told(self, index: int | None = None) -> dict[str, Any]:
        """An entry of tool_calls; in a stream it has an index."""
        numbered = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**numbered, "id": self.id, "type": "function", "function": function}


class CallReader:
    r"""Reads the text of one answer as it comes.

    Args:
        form: how calls are written.
        names: of the tools that may be called; no others are read as calls.

    Example:
        >>> from dllmserve.engine.tool_form import OWN
        >>> reader = CallReader(OWN, {'add'})  # doctest: +SKIP
        >>> reader.add('Hm.<tool_call>\n{"name": "add", "arguments": {"a"')  # doctest: +SKIP
        [Piece('text', 'Hm.'), Piece('call', 'add', 0), Piece('arguments', '{"a"', 0)]
    """

    def __init__(self, form: ToolForm, names: Iterable[str]) -> None:
        self._form = form
        self._heads = {form.head(name): name for name in sorted(names)}
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""
        self._calls = 0
        self._depth = 0
        self._quoted = self._escaped = False

    def add(self, text: str) -> list[Piece]:
        """The pieces that have become certain with some more text."""
        self._held += text
        return list(self._pieces())

    def finish(self) -> list[Piece]:
        """What is left once the text is complete."""
        pieces = list(self._pieces())
        if self._held and self._state in ("text", "head"):
            pieces.append(Piece("text", self._held))
        self._held = ""
        return pieces

    def _pieces(self) -> Iterator[Piece]:
        steps = {
            "text": self._text,
            "head": self._head,
            "arguments": self._arguments,
            "tail": self._tail,
        }
        while self._held:
            state, held = self._state, self._held
            piece = steps[state]()
            if piece is not None and piece.text:
                yield piece
            if (self._state, self._held) == (state, held):
                return

    def _text(self) -> Piece | None:
        """Text up to where a call may begin."""
        before, held = self._form.before, self._held
        place = held.find(before)
        if place >= 0:
            self._state = "head"
        else:
            sizes = range(min(len(before) - 1, len(held)), 0, -1)
            place = len(held) - next((n for n in sizes if before.startswith(held[-n:])), 0)
        self._held = held[place:]
        return Piece("text", held[:place])

    def _head(self) -> Piece | None:
        """The name of a call."""
        for head, name in self._heads.items():
            if self._held.startswith(head):
                self._held = self._held[len(head) :]
                self._state, self._calls = "arguments", self._calls + 1
                return Piece("call", name, self._calls - 1)
        if any(head.startswith(self._held) for head in self._heads):
            return None
        # no call of a tool that is there
        first, self._held, self._state = self._held[0], self._held[1:], "text"
        return Piece("text", first)

    def _arguments(self) -> Piece | None:
        """A part of a JSON object, up to its end."""
        size = len(self._held)
        for place, c in enumerate(self._held, 1):
            if self._quoted:
                self._quoted = self._escaped or c != '"'
                self._escaped = c == "\\" and not self._escaped
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if not self._depth:
                    self._state, size = "tail", place
                    break
        text, self._held = self._held[:size], self._held[size:]
        return Piece("arguments", text, self._calls - 1)

    def _tail(self) -> None:
        """The end of a call, and what stands before the next one."""
        rest = self._form.after + self._form.separator
        following = rest + self._form.before
        if self._held.startswith(following):
            self._held, self._state = self._held[len(rest) :], "head"
        elif not following.startswith(self._held):
            # an answer may end with the last call, and with nothing else
            self._held, self._state = self._held.removeprefix(self._form.after), "text"


@dataclass(frozen=True)
class Calls:
    """How the answers of a request call tools.

    Attributes:
        form: how calls are written.
        names: of the tools that may be called.
        older: the answer has a function_call in place of tool_calls.
    """

    form: ToolForm
    names: frozenset[str]
    older: bool = False

    def reader(self) -> CallReader:
        """For one answer."""
        return CallReader(self.form, self.names)

    def read(self, text: str) -> tuple[str | None, list[Call]]:
        """The text and the calls of a whole answer; the text is None beside calls alone."""
        reader = self.reader()
        pieces = reader.add(text) + reader.finish()
        calls = []
        for piece in pieces:
            if piece.kind == "call":
                parts = (p.text for p in pieces if (p.kind, p.call) == ("arguments", piece.call))
                calls.append(Call(piece.text, "".join(parts)))
        said = "".join(piece.text for piece in pieces if piece.kind == "text")
        return said or (None if calls else ""), calls

    def message(self, text: str) -> dict[str, Any]:
        """The message of a whole answer."""
        content, calls = self.read(text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls and self.older:
            return message | {"function_call": calls[0].told()["function"]}
        return message | ({"tool_calls": [call.told() for call in calls]} if calls else {})

    @property
    def called(self) -> str:
        """Why an answer ended that calls tools."""
        return "function_call" if self.older else "tool_calls"

    def delta(self, piece: Piece) -> dict[str, Any]:
        """The delta of a stream for a piece."""
        if piece.kind == "text":
            return {"content": piece.text}
        begins = piece.kind == "call"
        if begins:
            call = Call(piece.text, "").told(piece.call)
        else:
            call = {"index": piece.call, "function": {"arguments": piece.text}}
        return {"function_call": call["function"]} if self.older else {"tool_calls": [call]}
