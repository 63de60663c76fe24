"""The bytes of every token, from what its tokenizer's decoder does with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dllmserve.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


@dataclass(frozen=True, eq=False)
class Level:
    """All beginnings of tokens of one length, in bytes.

    Attributes:
        parent: [n] index of the beginning that is one byte shorter, in the level before.
        byte: [n] the last byte.
        ids: [k] tokens that are such a beginning as a whole.
        nodes: [k] which one.
    """

    parent: NDArray[np.int32]
    byte: NDArray[np.uint8]
    ids: NDArray[np.int32]
    nodes: NDArray[np.int32]


class Vocabulary:
    """The bytes of every id of a tokenizer.

    Args:
        pieces: bytes of every id, wherever it stands; None for an id without text, such as a
            special one. An empty piece is as None: it could be repeated for ever.
        first: bytes of every id at the very beginning of a text, where they differ: some decoders
            strip a leading space.

    Example:
        >>> Vocabulary([b"a", b" b", None], first=[b"a", b"b", None]).pieces[1]
        b' b'
    """

    def __init__(
        self, pieces: Sequence[bytes | None], first: Sequence[bytes | None] | None = None
    ) -> None:
        self.pieces: tuple[bytes | None, ...] = tuple(piece or None for piece in pieces)
        self.first: tuple[bytes | None, ...] | None = None
        if first is not None:
            pairs = zip(first, self.pieces, strict=True)
            found = tuple(None if piece is None else at_start for at_start, piece in pairs)
            self.first = None if found == self.pieces else found

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def key(self) -> str:
        """Names the bytes of all ids."""
        digest = hashlib.sha256()
        for pieces in (self.pieces, self.first or ()):
            digest.update(len(pieces).to_bytes(8, "little"))
            for piece in pieces:
                digest.update((0 if piece is None else len(piece) + 1).to_bytes(4, "little"))
                digest.update(piece or b"")
        return digest.hexdigest()

    def inside(self) -> Vocabulary:
        """The same for a text that does not begin where the decoded text does."""
        return self if self.first is None else Vocabulary(self.pieces)

    @cached_property
    def opening(self) -> Vocabulary:
        """What ids are at the very beginning of a text, as a vocabulary."""
        return self if self.first is None else Vocabulary(self.first)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Beginnings of all tokens by their length, from one byte on."""
        ids = np.array([i for i, piece in enumerate(self.pieces) if piece], np.int32)
        texts = [piece for piece in self.pieces if piece]
        lengths = np.array([len(text) for text in texts], np.int64)
        data = np.frombuffer(b"".join(texts), np.uint8)
        starts = np.cumsum(lengths) - lengths
        nodes = np.zeros(len(ids), np.int64)
        found, depth = [], 0
        while len(ids):
            keys = nodes * 256 + data[starts + depth]
            unique, nodes = np.unique(keys, return_inverse=True)
            depth += 1
            whole = lengths == depth
            parent, byte = np.divmod(unique, 256)
            found.append(
                Level(
                    parent.astype(np.int32),
                    byte.astype(np.uint8),
                    ids[whole],
                    nodes[whole].astype(np.int32),
                )
            )
            ids, nodes, lengths, starts = (a[~whole] for a in (ids, nodes, lengths, starts))
        return tuple(found)

    @classmethod
    def of_tokenizer(cls, fast: Fast) -> Vocabulary:
        """The vocabulary of a tokenizer of the tokenizers library.

        Special tokens, which decoding leaves out, have no bytes. The decoder itself is never asked:
        it cannot say what a part of a character is.

        Raises:
            TokenizerError: the decoder does what depends on neighbouring tokens.
        """
        added = fast.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special}
        decoder = fast.decoder
        rule = _Decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        ids = fast.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        pieces: list[bytes | None] = [None] * size
        first: list[bytes | None] = [None] * size
        for token, id in ids.items():
            if id not in special:
                pieces[id], first[id] = rule.bytes_of(token)
        return cls(pieces, first)


def _byte_map() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a character that can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _byte_map()


class _Decoder:
    """What a decoder does with one token, as far as that does not depend on others.

    Args:
        decoder: its description in tokenizer.json; without one, tokens are joined by spaces.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        self._steps: list[Callable[[str | bytes], str | bytes]] = []
        self._at_start: list[Callable[[bytes], bytes]] = []
        self._joined = decoder is None
        self._fused = False
        self._marks = ""
        parts = [] if decoder is None else [decoder]
        while parts:
            part = parts.pop(0)
            if part["type"] == "Sequence":
                parts = [*part["decoders"], *parts]
            else:
                self._add(part)

    def bytes_of(self, token: str) -> tuple[bytes, bytes]:
        """Of a token: anywhere, and as the first of a text."""
        if self._joined:
            return b" " + token.encode(), token.encode()
        return self._run(token), self._first(token)

    def _run(self, token: str) -> bytes:
        value: str | bytes = token
        for step in self._steps:
            value = step(value)
        return value if isinstance(value, bytes) else value.encode()

    def _first(self, token: str) -> bytes:
        piece = self._run(token.replace(self._marks, "") if self._marks else token)
        for strip in self._at_start:
            piece = strip(piece)
        return piece

    def _add(self, part: dict[str, Any]) -> None:
        kind = part["type"]
        if kind == "ByteLevel" and not self._fused:
            self._steps.append(_from_byte_level)
            self._fused = True
        elif kind == "ByteFallback" and not self._fused:
            self._steps.append(_from_byte_fallback)
        elif kind == "Fuse":
            self._fused = True
        elif kind == "Metaspace" and not self._fused:
            mark, blank = part["replacement"], " "
            self._steps.append(lambda value: _replaced(value, mark, blank))
            if part.get("prepend_scheme", "always") != "never":
                self._marks = mark
        elif kind == "Replace" and "String" in part["pattern"] and not self._fused:
            old, new = part["pattern"]["String"], part["content"]
            self._steps.append(lambda value: _replaced(value, old, new))
        elif kind == "Strip" and len(part["content"].encode()) == 1 and self._strips(part):
            content, most = part["content"].encode(), part["start"]
            self._at_start.append(lambda piece: _stripped(piece, content, most))
        else:
            raise TokenizerError(
                f"constraints do not work with this tokenizer: its decoder {kind} ({part}) makes "
                "of a token what depends on its neighbours, or is not known"
            )

    def _strips(self, part: dict[str, Any]) -> bool:
        """Whether it takes at most one character from the beginning of the whole text."""
        return self._fused and part["stop"] == 0 and part["start"] <= 1


def _from_byte_level(value: str | bytes) -> str | bytes:
    if isinstance(value, bytes):
        return value
    found = [_BYTES.get(c) for c in value]
    known = [byte for byte in found if byte is not None]
    return bytes(known) if len(known) == len(found) else value.encode()


def _from_byte_fallback(value: str | bytes) -> str | bytes:
    match = _BYTE.fullmatch(value) if isinstance(value, str) else None
    return value if match is None else bytes([int(match[1], 16)])


def _replaced(value: str | bytes, old: str, new: str) -> str | bytes:
    if isinstance(value, bytes):
        return value
    return value.replace(old, new)


def _stripped(piece: bytes, content: bytes, most: int) -> bytes:
    for _ in range(most):
        piece = piece.removeprefix(content)
    return piece
