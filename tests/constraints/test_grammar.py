"""Grammars over tokens: against brute force, their classes, bounds, bytes and cache."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dllmserve.constraints import limits
from dllmserve.constraints.cache import GrammarCache
from dllmserve.constraints.compile import compile_grammar, grammar_key
from dllmserve.constraints.grammar import TokenGrammar
from dllmserve.constraints.graph import NEVER
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.errors import InvalidParameterError
from tests.constraints.test_regex import samples
from tests.oracles.grammar import Fillings, allowed_sets

PARTS = ["a", "b", "0", "_", " ", "é", "\n", "日", "😀", "٣", "ab", "a0", " a", "b_"]


def random_vocabulary(rng: random.Random) -> list[bytes | None]:
    found: list[bytes | None] = [p.encode() for p in rng.sample(PARTS, 5)]
    found += [b"\xc3", b"\xa9", "日".encode()[:2], "日".encode()[2:], "é".encode() + b"a"]
    found += [b"", None, None, None]
    rng.shuffle(found)
    return found


def compiled(
    pattern: str, pieces: list[bytes | None] | None = None, **options: object
) -> TokenGrammar:
    words = Vocabulary([bytes([b]) for b in range(256)] if pieces is None else pieces)
    arguments: dict[str, object] = {"vocab_size": len(words) + 2, "mask_id": len(words)}
    return compile_grammar(regex=pattern, vocabulary=words, **{**arguments, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_allowed_sets_of_random_grammars(seed: int) -> None:
    """Random expressions, vocabularies and canvases against all fillings."""
    feasible = 0
    for pattern, rng in samples(400 + seed, 25):
        pieces = random_vocabulary(rng)
        empty = [i for i, piece in enumerate(pieces) if not piece]
        mask, ends = empty[0], rng.choice([(), (empty[1],), (empty[1], empty[2])])
        try:
            grammar = compiled(pattern, pieces, mask_id=mask, end_ids=ends, vocab_size=16)
        except InvalidParameterError as error:
            assert re.search("too large|satisfied by no text", str(error))
            continue
        tried = Fillings(pieces, lambda t, p=pattern: re.fullmatch(p, t) is not None, ends)
        for _ in range(6):
            row = [
                mask if rng.random() < 0.7 else rng.randrange(14) for _ in range(rng.randint(1, 3))
            ]
            expected, found = tried.allowed(row, mask), allowed_sets(grammar, row, mask)
            assert found[0] == expected[0], (pattern, row)
            assert not expected[0] or found == expected, (pattern, row)
            feasible += expected[0]
    assert feasible > 10


def test_classes_and_states() -> None:
    """No two classes are equal, no state is useless, and the numbers beside the table are right."""
    for pattern, rng in samples(500, 40):
        pieces = random_vocabulary(rng)
        try:
            g = compiled(pattern, pieces, end_ids=(len(pieces) + 1,))
        except InvalidParameterError:
            continue
        assert g.delta.dtype == g.class_of.dtype == g.least.dtype == np.int32
        assert len({column.tobytes() for column in g.delta.T.copy()}) == g.classes
        assert (g.delta[:, 0] == g.states).all() and (g.delta[-1] == g.states).all()
        assert not g.accepting[-1] and g.least[-1] == NEVER
        assert (g.least[:-1] < NEVER).all() and ((g.least == 0) == g.accepting).all()
        reached, todo = {g.start}, [g.start]
        while todo:
            for new in {int(t) for t in g.delta[todo.pop()]} - reached:
                reached.add(new)
                todo.append(new)
        assert reached >= set(range(g.states))
        assert g.size.sum() == len(g.class_of) == len(pieces) + 2
        for kind in range(g.classes):
            ids = np.flatnonzero(g.class_of == kind)
            assert len(ids) == g.size[kind] and ids.min(initial=len(g.class_of)) == (
                g.first[kind] if len(ids) else len(g.class_of)
            )


def test_ends() -> None:
    g = compiled("ab*", end_ids=(3, 257))
    a, b = ord("a"), ord("b")
    ends = [g.walk(ids) for ids in ([a, 3], [a, b, 257], [a, 3, 257, 3])]
    assert len(set(ends)) == 1 and g.accepting[ends[0]]
    assert g.walk([3]) == g.walk([a, 3, b]) == g.states
    assert g.class_of[3] == g.class_of[257] != 0  # 3 is a byte, too, and ends all the same
    assert g.class_of[256] == 0  # the mask
    exact = compiled("ab*")
    assert exact.walk([a, 257]) == exact.states and exact.class_of[257] == 0
    assert g.least[g.start] == 1


def test_choice() -> None:
    words = Vocabulary([b"y", b"es", b"no", b" yes", b"."])
    g = compile_grammar(choice=("yes", "no", "n.o"), vocabulary=words, vocab_size=5, mask_id=9)
    assert g.accepting[g.walk([0, 1])] and g.accepting[g.walk([2])]
    assert g.class_of[3] == g.class_of[4] == 0


def test_ids_past_the_tokenizer_or_the_model() -> None:
    words = Vocabulary([b"a", b"b", b"a"])
    g = compile_grammar(regex="[ab]", vocabulary=words, vocab_size=2, mask_id=7, end_ids=(9, 1))
    assert g.class_of.tolist() == [1, 2]
    g = compile_grammar(regex="[ab]", vocabulary=words, vocab_size=6, mask_id=0)
    assert g.class_of.tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("pattern", ["a{3}|b*", r"\w{1,9}", '"[^"]*"', ".{0,50}"])
def test_bytes_and_back(pattern: str) -> None:
    g = compiled(pattern, end_ids=(257,))
    copy = TokenGrammar.from_bytes(g.to_bytes())
    assert copy == g and hash(copy) == hash(g) and copy.key == g.key and copy.start == g.start
    for name in ("delta", "class_of", "accepting", "least", "first", "size"):
        mine, theirs = getattr(g, name), getattr(copy, name)
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    assert len(g.to_bytes()) < g.nbytes


def test_the_same_input_gives_the_same_grammar_everywhere() -> None:
    code = (
        "import sys, hashlib\n"
        "from tests.constraints.test_grammar import compiled\n"
        r"g = compiled(r'(\w+ ){1,3}[0-9]*', end_ids=(257,))" + "\n"
        "sys.stdout.write(hashlib.sha256(g.to_bytes()).hexdigest())\n"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(runs) == 1 and len(runs.pop()) == 64


def test_keys_name_all_that_goes_in() -> None:
    words, others = Vocabulary([b"a", b"b"]), Vocabulary([b"b", b"a"])
    base = {"vocabulary": words, "vocab_size": 2, "mask_id": 5, "end_ids": (1, 0)}
    keys = [
        grammar_key(regex="a", **base),  # type: ignore[arg-type]
        grammar_key(json_schema="a", **base),  # type: ignore[arg-type]
        grammar_key(choice=("a",), **base),  # type: ignore[arg-type]
        grammar_key(choice=("a", "b"), **base),  # type: ignore[arg-type]
        grammar_key(regex="a", **{**base, "vocabulary": others}),  # type: ignore[arg-type]
        grammar_key(regex="a", **{**base, "vocab_size": 3}),  # type: ignore[arg-type]
        grammar_key(regex="a", **{**base, "mask_id": 4}),  # type: ignore[arg-type]
        grammar_key(regex="a", **{**base, "end_ids": ()}),  # type: ignore[arg-type]
    ]
    assert len(set(keys)) == len(keys)
    same = {**base, "end_ids": (0, 1)}
    assert grammar_key(regex="a", **same) == keys[0]  # type: ignore[arg-type]


LARGE = {
    "((a{1,100}){1,100}b){1,100}": "positions",
    r"\w{1,200}": "states",
    "(a|b)*a(a|b){30}": "states|work",
    "(a?){9999}": "positions|work",
    "(){999999999}": "positions",
    ".{0,99999}": "positions",
    ".{0,20000}": "states",
}


@pytest.mark.parametrize("pattern", LARGE)
def test_what_is_too_large_says_so(pattern: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidParameterError, match="the constraint is too large") as caught:
        compiled(pattern)
    assert re.search(LARGE[pattern], str(caught.value))
    assert re.search(r"is [\d,]+ or more, and at most [\d,]+ are possible; use", str(caught.value))
    assert time.monotonic() - started < 30  # it takes a second or two


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_TABLE", 50)
    with pytest.raises(InvalidParameterError, match=r"states times .* is"):
        compiled("(a|b|c){9}d{20}")
    monkeypatch.undo()
    monkeypatch.setattr(limits, "MAX_PAIRS", 50)
    with pytest.raises(InvalidParameterError, match="the work of its tokens"):
        compiled("(a|b|c){9}d{20}", [b"a", b"ab", b"abc", b"abcd", b"aaaa"])
    monkeypatch.undo()
    monkeypatch.setattr(limits, "MAX_MOVES", 50)
    with pytest.raises(InvalidParameterError, match="the size of its tokens' maps"):
        compiled("(a|b|c){9}d{20}", [b"a", b"ab", b"abc", b"abcd", b"aaaa"])


def test_nothing_fits() -> None:
    with pytest.raises(InvalidParameterError, match="regex is satisfied by no text at all"):
        compiled("[^\\s\\S]")
    with pytest.raises(InvalidParameterError, match="no text that this model's tokens can make"):
        compiled("abc", [b"a", b"b"])
    words = Vocabulary([b"a"])
    with pytest.raises(InvalidParameterError, match="one of regex, json_schema, choice"):
        compile_grammar(vocabulary=words, vocab_size=1, mask_id=2)
    with pytest.raises(InvalidParameterError, match="got 2"):
        compile_grammar(regex="a", choice=("a",), vocabulary=words, vocab_size=1, mask_id=2)


def test_a_large_vocabulary() -> None:
    """A long schema with as many tokens as models have; seconds, where it takes a half."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz" * 4 + "ETAOIN.,;:!?-()[]{}\"'0123456789/\\_@"
    texts = {bytes([b]) for b in range(256)}
    while len(texts) < 126_000:
        word = "".join(rng.choices(letters, k=rng.randint(2, 9)))
        texts.add((rng.choice(["", " ", "é", "日"]) + word).encode())
    words = Vocabulary(sorted(texts))
    item = {"type": "string", "maxLength": 100}
    schema = {"type": "array", "items": item, "minItems": 1, "maxItems": 6}
    started = time.monotonic()
    g = compile_grammar(
        json_schema=json.dumps(schema),
        vocabulary=words,
        vocab_size=126_464,
        mask_id=126_336,
        end_ids=(126_081,),
    )
    assert time.monotonic() - started < 10
    assert 3_000 < g.states < 10_000 and g.classes < 1_000


def test_cache_makes_once() -> None:
    cache, calls, gate = GrammarCache(), [], threading.Event()

    def make() -> TokenGrammar:
        calls.append(threading.get_ident())
        gate.wait(10)
        return compiled("ab")

    found: list[TokenGrammar] = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.get("k", make))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert cache.find("k") is None  # does not wait
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1 and len(found) == 8 and all(g is found[0] for g in found)
    assert cache.find("k") is found[0] and len(cache) == 1 and cache.nbytes == found[0].nbytes


def test_cache_hands_on_errors_and_keeps_none() -> None:
    cache, gate, errors = GrammarCache(), threading.Event(), []

    def fail() -> TokenGrammar:
        gate.wait(10)
        raise InvalidParameterError("no")

    def ask() -> None:
        try:
            cache.get("k", fail)
        except InvalidParameterError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 4 and len(cache) == 0
    assert cache.get("k", lambda: compiled("a")).states


def test_cache_drops_the_least_recently_used() -> None:
    one = compiled("ab")
    cache = GrammarCache(capacity=int(2.5 * one.nbytes))
    for key in ("a", "b"):
        cache.get(key, lambda: one)
    assert cache.find("a") is one
    cache.get("c", lambda: one)
    assert [cache.find(key) is one for key in "abc"] == [True, False, True]
    assert cache.nbytes <= int(2.5 * one.nbytes)
    small = GrammarCache(capacity=10)
    assert small.get("a", lambda: one) is one and len(small) == 0


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.01)
    with pytest.raises(InvalidParameterError, match=r"takes more than 0\.01 seconds to compile"):
        compiled("(a|b)*a(a|b){12}")
    monkeypatch.undo()
    assert compiled("(a|b)*a(a|b){5}").states
