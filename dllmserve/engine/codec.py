"""Codecs: text to ids and back with the tokenizers library; which tokens control what is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dllmserve.errors import PromptError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    from dllmserve.constraints.vocabulary import Vocabulary

#: roles of messages, as templates know them
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def valid_text(text: str) -> str:
    """The text itself.

    Raises:
        PromptError: it holds lone surrogates, which are no characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the prompt is not valid Unicode text: {error}") from error
    return text


class Codec:
    """A tokenizer of the tokenizers library; every method may be called by many threads at once.

    Nothing here changes the tokenizer, so threads can share it. A subclass is another kind.

    Args:
        fast: the tokenizer; padding and truncation are switched off.
        added: tokens that other files list; those that are there already are left out.
    """

    def __init__(self, fast: Fast, added: Iterable[AddedToken] = ()) -> None:
        fast.no_padding()
        fast.no_truncation()
        there = {token.content for token in fast.get_added_tokens_decoder().values()}
        missing = [token for token in added if token.content not in there]
        if missing:
            fast.add_tokens(missing)
        self._fast = fast

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text; ``special`` adds what the tokenizer puts around a plain prompt."""
        return list(self._fast.encode(text, add_special_tokens=special).ids)

    def encode_literally(self, text: str) -> list[int]:
        """Ids of a text in which no added token is looked for."""
        fast = self._fast
        if fast.normalizer is not None:
            text = fast.normalizer.normalize_str(text)
        words = [text]
        if fast.pre_tokenizer is not None:
            words = [word for word, _ in fast.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in fast.model.tokenize(word)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._fast.decode(ids, skip_special_tokens=True))

    def added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokens that are found in a text before anything else is done with it, by id."""
        found: Mapping[int, AddedToken] = self._fast.get_added_tokens_decoder()
        return found

    def vocabulary(self) -> Vocabulary:
        """The bytes of every token, for constraints.

        Raises:
            TokenizerError: they cannot be known.
        """
        from dllmserve.constraints.vocabulary import Vocabulary

        return Vocabulary.of_tokenizer(self._fast)

    def token_id(self, text: str) -> int | None:
        """The id of a token, or None."""
        found: int | None = self._fast.token_to_id(text)
        return found


class Controls:
    """The control tokens of a tokenizer: its added tokens, whatever list names them.

    Left out are added tokens that are ordinary text: blanks, and words and single characters that
    are neither special nor written by a chat template.

    Args:
        codec: the tokenizer.
        templates: the sources of its chat templates.

    Attributes:
        tokens: id and token, by the token's text.
        pattern: finds one in a text.
    """

    def __init__(self, codec: Codec, templates: Iterable[str]) -> None:
        source = "\0".join((*templates, *ROLES)).casefold()
        self.tokens = {
            token.content: (id, token)
            for id, token in codec.added_tokens().items()
            if _is_control(token, source)
        }
        # the longest first, so that a token that contains another one is taken whole
        longest = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")

    def first(self, text: str) -> int | None:
        """Id of the first control token in a text, or None."""
        found = self.pattern.search(text)
        return None if found is None else self.tokens[found[0]][0]


def _is_control(token: AddedToken, templates: str) -> bool:
    text = token.content
    if not text or text.isspace():
        return False
    if token.special:
        return True
    if len(text) == 1:
        return not text.isalnum() and text in templates
    return not text.isalnum() or text.casefold() in templates
