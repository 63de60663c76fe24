"""The bytes of tokens, against what tokenizers decode."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import dllmserve
from dllmserve.constraints.compile import compile_grammar
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.engine.other_tokenizers import PythonCodec
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import TokenizerError
from tests.oracles.grammar import Fillings, allowed_sets

TINY = Path(dllmserve.__file__).parent / "assets" / "tiny"


def byte_level() -> Tokenizer:
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE({**letters, "ab": 256, "Ġa": 257, "ÃĤ": 258}, [("a", "b")]))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    made.add_tokens([AddedToken("<think>"), AddedToken("a b é")])
    return made


def pieces() -> dict[str, int]:
    words = ["<unk>", "▁", "▁a", "a", "b", "▁▁", "é", "▁日本", "a▁b", "<0x", "▁▁b"]
    return {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}


def llama() -> Tokenizer:
    made = Tokenizer(models.BPE(pieces(), [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken("<unk>", special=True)])
    return made


def metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(pieces(), []))
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "ab": 2, "é": 3}, unk_token="a"))


MADE: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte fallback, strips one blank": llama,
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "no decoder": words,
}


def text_of(words: Vocabulary, ids: list[int]) -> bytes:
    """What some tokens are; the first one that has bytes begins the text."""
    found = b""
    pieces = words.first or words.pieces
    for id in ids:
        if words.pieces[id] is not None:
            found += pieces[id] or b""
            pieces = words.pieces
    return found


@pytest.mark.parametrize("name", MADE)
def test_as_decoded(name: str) -> None:
    fast = MADE[name]()
    words, rng = Vocabulary.of_tokenizer(fast), random.Random(0)
    checked = 0
    for _ in range(3000):
        ids = [rng.randrange(len(words)) for _ in range(rng.randint(1, 4))]
        data = text_of(words, ids)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        assert fast.decode(ids, skip_special_tokens=True) == text, ids
        checked += 1
    assert checked > 100


def test_special_tokens_have_no_bytes_and_others_that_were_added_have() -> None:
    fast = byte_level()
    words = Vocabulary.of_tokenizer(fast)
    assert words.pieces[fast.token_to_id("<|end|>")] is None
    assert words.pieces[fast.token_to_id("<think>")] == b"<think>"
    assert words.pieces[fast.token_to_id("a b é")] == "a b é".encode()
    assert words.first is None


def test_the_embedded_model() -> None:
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    words, rng = tokenizer.vocabulary, random.Random(1)
    assert len(words) == 4096 and words.first is None
    for _ in range(500):
        ids = [rng.randrange(4096) for _ in range(8)]
        assert tokenizer.decode(ids) == text_of(words, ids).decode(errors="replace")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
    ids=lambda d: type(d).__name__,
)
def test_decoders_that_look_at_neighbours_are_refused(decoder: Any) -> None:
    fast = words()
    fast.decoder = decoder
    with pytest.raises(TokenizerError, match="constraints do not work with this tokenizer"):
        Vocabulary.of_tokenizer(fast)


def test_python_tokenizers_are_refused() -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(TokenizerError, match="Other is Python code"):
        PythonCodec(Other()).vocabulary()


def test_keys_name_the_bytes() -> None:
    one, same = Vocabulary([b"a", None, b"b"]), Vocabulary([b"a", b"", b"b"])
    assert one.key == same.key
    assert len({one.key, Vocabulary([b"a", b"b", None]).key, Vocabulary([b"ab"]).key}) == 3
    stripped = Vocabulary([b" a", b"b"], first=[b"a", b"b"])
    assert stripped.key != Vocabulary([b" a", b"b"]).key == stripped.inside().key


ROWS = (
    ["m"],
    ["m", "m"],
    ["m", "m", "m"],
    ["m", "a", "m"],
    ["s", "m"],
    ["a", "m", "m"],
    ["m", "e"],
)


@pytest.mark.parametrize("pattern", ["a b?", " a", "(a|b| )*", "é|a", "", "  a", "b(a| a)*"])
@pytest.mark.parametrize("ends", [(), (6,)])
@pytest.mark.parametrize("strips", [True, False])
def test_a_text_may_begin_otherwise(pattern: str, ends: tuple[int, ...], strips: bool) -> None:
    """Decoders that strip a blank: allowed sets against all fillings."""
    pieces = [b" ", b" a", b"a", b"b", b"\xc3", b"\xa9", None, b"  ", None]
    first = [p and p.removeprefix(b" ") for p in pieces] if strips else None
    mask, names = 8, {"m": 8, "a": 2, "s": 0, "e": 6}
    vocabulary = Vocabulary(pieces, first)
    grammar = compile_grammar(
        regex=pattern, vocabulary=vocabulary, vocab_size=9, mask_id=mask, end_ids=ends
    )
    tried = Fillings(pieces, lambda t: re.fullmatch(pattern, t) is not None, ends, first)
    for named in ROWS:
        row = [names[name] for name in named]
        expected, found = tried.allowed(row, mask), allowed_sets(grammar, row, mask)
        assert found[0] == expected[0], row
        assert not expected[0] or found == expected, row
