"""Control tokens: which they are, and prompts in which only the template writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dllmserve.engine.codec import Codec
from dllmserve.engine.marked import ROLES, Marks
from dllmserve.errors import PromptError

if TYPE_CHECKING:
    from tokenizers import AddedToken

#: characters that a vocabulary may lack; normalizers drop some of them
_RARE = "\U0010fffd\U0001f642\u65e5\u2603\u0e5b"


class Controls:
    """The control tokens of a tokenizer: its added tokens, whatever list names them.

    Left out are added tokens that are ordinary text: blanks, and words and single characters that
    are neither special nor written by a chat template.

    Args:
        codec: the tokenizer.
        templates: the sources of its chat templates.

    Attributes:
        marks: for the texts of users while a template is rendered.
    """

    def __init__(self, codec: Codec, templates: Iterable[str]) -> None:
        source = "\0".join((*templates, *ROLES)).casefold()
        self._codec = codec
        self._tokens = {
            token.content: (id, token)
            for id, token in codec.added_tokens().items()
            if _is_control(token, source)
        }
        # characters that the vocabulary lacks may all become one of them, such as <unk>
        unknown = [id for character in _RARE for id in codec.encode_literally(character)]
        self._ids = frozenset(id for id, _ in self._tokens.values()).difference(unknown)
        # the longest first, so that a token that contains another one is taken whole
        longest = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._whole_words = any(token.single_word for _, token in self._tokens.values())
        self.marks = Marks(self._tokens)

    def first(self, text: str) -> int | None:
        """Id of the first control token in a text, or None."""
        found = self._pattern.search(text)
        return None if found is None else self._tokens[found[0]][0]

    def encode(self, marked: str) -> list[int]:
        """Ids of a rendered prompt, in which control tokens that hold marks are ordinary text.

        Raises:
            PromptError: a character that the tokenizer can read as a control token only.
        """
        text = self.marks.plain(marked)
        written = list(self._pattern.finditer(marked))
        places = [match.span() for match in written]
        # a token that must stand alone could be hidden by a letter beside it
        if not self._whole_words and places == [m.span() for m in self._pattern.finditer(text)]:
            ids = self._codec.encode(text, False)
            # the tokenizer may read a control token into other characters
            if self._among(ids) == self._among([self._tokens[m[0]][0] for m in written]):
                return ids
        return list(self._pieces(text, written))

    def _pieces(self, text: str, written: list[re.Match[str]]) -> Iterator[int]:
        """The template's control tokens, and what is in between by itself."""
        place, strips = 0, False
        for match in written:
            id, token = self._tokens[match[0]]
            between = text[place : match.start()]
            between = between.lstrip() if strips else between
            yield from self._ordinary(between.rstrip() if token.lstrip else between)
            yield id
            place, strips = match.end(), token.rstrip
        rest = text[place:]
        yield from self._ordinary(rest.lstrip() if strips else rest)

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a text that is to hold no control token."""
        if not text:
            return []
        ids = self._codec.encode(text, False)
        return self._literal(text) if self._among(ids) else ids

    def _literal(self, text: str) -> list[int]:
        ids = self._codec.encode_literally(text)
        if not self._among(ids):
            return ids
        if len(text) == 1:
            raise PromptError(
                f"the messages hold {text!r}, which this tokenizer can read as a special token only"
            )
        # the vocabulary itself holds the token: halves of a text do not hold it whole
        middle = len(text) // 2
        return self._literal(text[:middle]) + self._literal(text[middle:])

    def _among(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self._ids]


def _is_control(token: AddedToken, templates: str) -> bool:
    text = token.content
    if not text or text.isspace():
        return False
    if token.special:
        return True
    if len(text) == 1:
        return not text.isalnum() and text in templates
    return not text.isalnum() or text.casefold() in templates
