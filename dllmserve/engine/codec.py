"""Codecs: text to ids and back with the tokenizers library, or with a tokenizer in Python."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dllmserve.errors import PromptError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast


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


class Codec(Protocol):
    """What a tokenizer has to do; every method may be called by many threads at once."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text; ``special`` adds what the tokenizer puts around a plain prompt."""
        ...

    def encode_literally(self, text: str) -> list[int]:
        """Ids of a text in which no added token is looked for."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        ...

    def added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokens that are found in a text before anything else is done with it, by id."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of a token, or None."""
        ...


class FastCodec:
    """The tokenizers library. Nothing here changes the tokenizer, so threads can share it.

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
        """See Codec."""
        return list(self._fast.encode(text, add_special_tokens=special).ids)

    def encode_literally(self, text: str) -> list[int]:
        """See Codec."""
        fast = self._fast
        if fast.normalizer is not None:
            text = fast.normalizer.normalize_str(text)
        words = [text]
        if fast.pre_tokenizer is not None:
            words = [word for word, _ in fast.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in fast.model.tokenize(word)]

    def decode(self, ids: list[int]) -> str:
        """See Codec."""
        return str(self._fast.decode(ids, skip_special_tokens=True))

    def added_tokens(self) -> Mapping[int, AddedToken]:
        """See Codec."""
        found: Mapping[int, AddedToken] = self._fast.get_added_tokens_decoder()
        return found

    def token_id(self, text: str) -> int | None:
        """See Codec."""
        found: int | None = self._fast.token_to_id(text)
        return found


class PythonCodec:
    """A tokenizer of transformers that is Python code, a checkpoint's own perhaps.

    Nobody says of such code that threads can share it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = dict(tokenizer.get_vocab())
        # a model may propose ids that only pad its LM head; Python tokenizers fail on them
        self._known = frozenset(self._vocabulary.values())
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool) -> list[int]:
        """See Codec."""
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=special))

    def encode_literally(self, text: str) -> list[int]:
        """See Codec."""
        with self._lock:
            return list(
                self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            )

    def decode(self, ids: list[int]) -> str:
        """See Codec."""
        known = [i for i in ids if i in self._known]
        with self._lock:
            return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def added_tokens(self) -> Mapping[int, AddedToken]:
        """See Codec."""
        from tokenizers import AddedToken

        found = dict(self._tokenizer.added_tokens_decoder)
        for text in self._tokenizer.all_special_tokens:  # some classes keep theirs to themselves
            place = self._vocabulary.get(text)
            if place is not None and place not in found:
                found[place] = AddedToken(text, special=True)
        return found

    def token_id(self, text: str) -> int | None:
        """See Codec."""
        return self._vocabulary.get(text)
