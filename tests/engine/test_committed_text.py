"""CommittedText: what was given out is never wrong, and all of it together is the answer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmserve.engine.text import CommittedText
from dllmserve.engine.tokenizer import AnswerText, Tokenizer, load_tokenizer
from dllmserve.models.loader import find_model
from tests.checkpoints import byte_tokenizer

VOCABULARY = {"bytes": 260, "embedded": 4096, "metaspace": 268}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bytes", "metaspace"):
        (folder / kind).mkdir()
    byte_tokenizer(folder / "bytes", chat=False)
    metaspace(folder / "metaspace")
    places = {**{k: folder / k for k in ("bytes", "metaspace")}, "embedded": find_model("tiny")}
    found = {kind: load_tokenizer(place) for kind, place in places.items()}
    return {kind: tokenizer for kind, tokenizer in found.items() if tokenizer is not None}


def metaspace(folder: Path) -> None:
    """A tokenizer like SentencePiece's: blanks belong to words, the first one is dropped, and
    bytes stand for characters that it does not know."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    words = ["<unk>", "\u2581", "\u2581a", "\u2581EN", "E", "N", "D", "a", "b", "\u2581b", "é"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{i:02X}>" for i in range(256))])}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<end>"])
    fast.save(str(folder / "tokenizer.json"))


def grown(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], cuts: list[int]
) -> tuple[list[str], str]:
    """The pieces of an answer that grows as an engine commits it, and its whole text.

    The engine looks for stop strings whenever something was committed; what ends an answer is
    never reported as a piece.
    """
    answer = AnswerText(tokenizer)
    text, pieces, start = CommittedText(tokenizer, stops), [], 0
    for end in [*sorted({c for c in cuts if c < len(ids)}), len(ids)]:
        whole, _, stopped = answer.read(ids[:end], stops)
        if stopped or end == len(ids):
            pieces.append(text.finish(whole))
            return pieces, whole
        pieces.append(text.add(ids[start:end]))
        start = end
    raise AssertionError("an answer has an end")


STOPS = st.lists(
    st.one_of(
        st.sampled_from(["END", "aab", "é", "aé", "ENDE", " a", "\n\n", "ab", "ba", "🙂"]),
        st.text("abEND é🙂", min_size=1, max_size=4),
    ),
    max_size=3,
)
TEXTS = st.text("aabEND é✓🙂\n ", max_size=30)


@pytest.mark.parametrize("kind", VOCABULARY)
@settings(max_examples=150)
@given(data=st.data())
def test_pieces_are_the_answer(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    # what an untrained model writes: half characters, special tokens. Not where bytes are
    # fallbacks: there a wrong byte makes the right ones before it unreadable
    most = 0 if kind == "metaspace" else 30
    wild = st.lists(st.integers(0, VOCABULARY[kind] - 1), max_size=most)
    ids = data.draw(
        st.tuples(TEXTS.map(tokenizer.encode), wild, TEXTS.map(tokenizer.encode)).map(
            lambda parts: [token for part in parts for token in part]
        )
    )
    stops = data.draw(STOPS)
    cuts = data.draw(st.lists(st.integers(1, 40), max_size=12))
    pieces, whole = grown(tokenizer, ids, stops, cuts)
    # so nothing that was given out had to be taken back for a stop string
    assert "".join(pieces) == whole
    assert not any(stop in whole for stop in stops)


def test_characters_come_whole(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    text = CommittedText(tokenizer, [])
    pieces = [text.add([token]) for token in tokenizer.encode("aé✓🙂")]
    assert pieces == ["a", "", "é", "", "", "✓", "", "", "", "🙂"]
    # bytes that never become a character are given at the end
    text = CommittedText(tokenizer, [])
    half = tokenizer.encode("a🙂")[:3]
    assert [text.add([token]) for token in half] == ["a", "", ""]
    assert text.finish(tokenizer.decode(half)) == "\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    text = CommittedText(tokenizer, ["END", "xEx"])
    assert text.add(tokenizer.encode("oneEN")) == "one"
    assert text.add(tokenizer.encode("E")) == "EN"
    assert text.add(tokenizer.encode("NxE")) == "EN"
    assert text.finish("oneENENxE") == "xE"
    text = CommittedText(tokenizer, ["END"])
    assert text.add(tokenizer.encode("oneEN")) == "one"
    assert text.finish("one") == ""


def test_the_first_word_keeps_its_place(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["metaspace"]
    text = CommittedText(tokenizer, [])
    assert [text.add([token]) for token in (2, 9, 2)] == ["a", " b", " a"]
