"""Regular expressions against Python's own."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from dllmserve.constraints.compile import language
from dllmserve.constraints.dfa import Dfa, complement, intersection
from dllmserve.constraints.nfa import automaton
from dllmserve.constraints.nodes import ANY_TEXT
from dllmserve.constraints.regex import parse
from dllmserve.constraints.utf8 import ByteDfa, to_bytes
from dllmserve.errors import InvalidParameterError
from tests.constraints.checks import random_text

LETTERS = "ab0_ é\n日😀٣"


def random_regex(rng: random.Random, depth: int) -> str:
    def atom() -> str:
        kind = rng.random()
        if kind < 0.45:
            return re.escape(rng.choice(LETTERS))
        if kind < 0.55:
            return rng.choice([r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "."])
        if kind < 0.7 or not depth:
            parts = ["a", "b", "a-b", r"\d", r"\W", "é", "0-9", "日", r"\s", r"\n"]
            return f"[{rng.choice(['', '^'])}{''.join(rng.choices(parts, k=rng.randint(1, 3)))}]"
        name = rng.randint(0, 10**9)
        return f"{rng.choice(['(', '(?:', f'(?P<n{name}>'])}{random_regex(rng, depth - 1)})"

    counts = ["", "", "", "*", "+", "?", "{2}", "{,2}", "{1,3}", "{2,}", "*?", "??", "{1,2}?"]
    branches = rng.choice([1, 1, 2, 3])
    return "|".join(
        "".join(atom() + rng.choice(counts) for _ in range(rng.randint(0, 3)))
        for _ in range(branches)
    )


def samples(seed: int, count: int) -> Iterator[tuple[str, random.Random]]:
    rng = random.Random(seed)
    while count:
        pattern = random_regex(rng, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                re.compile(pattern)
            except re.error:
                continue
        count -= 1
        yield pattern, rng


def accepts(dfa: ByteDfa, data: bytes) -> bool:
    state = dfa.start
    for byte in data:
        state = int(dfa.delta[state, dfa.kinds[byte]])
    return bool(dfa.accepting[state])


def made(pattern: str) -> Dfa | None:
    try:
        return language(regex=pattern)
    except InvalidParameterError as error:
        assert "too large" in str(error), pattern
        return None


@pytest.mark.parametrize("seed", range(4))
def test_as_python(seed: int) -> None:
    seen = 0
    for pattern, rng in samples(seed, 80):
        dfa = made(pattern)
        if dfa is None:
            continue
        for _ in range(25):
            text = "".join(rng.choices(LETTERS, k=rng.randint(0, 5)))
            assert dfa.accepts(text) == (re.fullmatch(pattern, text) is not None), (pattern, text)
        if not dfa.empty:
            text = random_text(dfa, rng, 6)
            assert re.fullmatch(pattern, text), (pattern, text)
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("seed", range(2))
def test_bytes_are_those_of_the_characters(seed: int) -> None:
    for pattern, rng in samples(100 + seed, 40):
        dfa = made(pattern)
        if dfa is None or dfa.empty:
            continue
        try:
            found = to_bytes(dfa)
        except InvalidParameterError:
            continue
        text = random_text(dfa, rng, 5).encode()
        assert accepts(found, text)
        for _ in range(30):
            data = bytearray(text or b"a")
            data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                expected = dfa.accepts(data.decode())
            except UnicodeDecodeError:
                expected = False
            assert accepts(found, bytes(data)) == expected, (pattern, bytes(data))


def test_every_character() -> None:
    """All code points, in categories and their negations."""
    for pattern in (r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", ".", "[^\\Wa]", "[\\d\\s]"):
        found = language(regex=pattern)
        row = found.accepting[found.delta[found.start]]
        matched = np.flatnonzero(row[found.alphabet.of_code_points()])
        every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
        assert matched.tolist() == [ord(m[0]) for m in re.finditer(pattern, every)]


def test_overlong_and_surrogate_bytes_are_no_text() -> None:
    found = to_bytes(language(regex="(?:.|\n)"))
    for data in (
        b"\xc0\x80",
        b"\xe0\x80\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\x80",
        b"\xff",
    ):
        assert not accepts(found, data)
    for c in (
        "\x00",
        "\x7f",
        "\x80",
        "\u07ff",
        "\u0800",
        "\ud7ff",
        "\ue000",
        "\U00010000",
        "\U0010ffff",
    ):
        assert accepts(found, c.encode())


SEARCHES = [
    "a",
    "^a",
    "a$",
    "^a$",
    "^a|b$",
    "(^a|b)c",
    "a(b|c$)",
    "^(a|b$)",
    "(^|b)a",
    "(a|^b)$",
    "^^a$$",
    "",
]


@pytest.mark.parametrize("pattern", SEARCHES)
def test_search(pattern: str) -> None:
    found = automaton(parse(pattern, "pattern", search=ANY_TEXT))
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abc", k=rng.randint(0, 4)))
        assert found.accepts(text) == (re.search(pattern, text) is not None), text


@pytest.mark.parametrize("seed", range(2))
def test_sets_of_texts(seed: int) -> None:
    """Intersections and complements."""
    before: tuple[str, Dfa] | None = None
    for pattern, rng in samples(200 + seed, 40):
        dfa = made(pattern)
        if dfa is None:
            continue
        others = complement(dfa)
        both = None if before is None else intersection(dfa, before[1])
        for _ in range(20):
            text = "".join(rng.choices(LETTERS, k=rng.randint(0, 4)))
            assert others.accepts(text) != dfa.accepts(text)
            if both is not None and before is not None:
                assert both.accepts(text) == (dfa.accepts(text) and before[1].accepts(text))
        assert intersection(dfa, others).empty
        assert complement(others).states == dfa.states
        before = pattern, dfa


@pytest.mark.parametrize("seed", range(2))
def test_the_automaton_is_the_smallest(seed: int) -> None:
    """No two states accept the same texts, by plain refinement."""
    for pattern, _ in samples(300 + seed, 30):
        dfa = made(pattern)
        if dfa is None or dfa.states > 200:
            continue
        groups = [int(a) for a in dfa.accepting]
        while True:
            keys = [(groups[q], *(groups[t] for t in dfa.delta[q])) for q in range(len(groups))]
            names = {key: i for i, key in enumerate(dict.fromkeys(keys))}
            new = [names[key] for key in keys]
            if len(set(new)) == len(set(groups)):
                break
            groups = new
        assert len(set(groups)) == dfa.states + 1, pattern


REFUSED = {
    r"(?i)a": "flags, here re.IGNORECASE",
    r"(?i:a)b": "flags, here re.IGNORECASE",
    r"(?s).": "flags, here re.DOTALL",
    r"(?m)^a": "flags, here re.MULTILINE",
    r"(?a)\w": "flags, here re.ASCII",
    r"a(?=b)": "lookaround",
    r"a(?!b)": "lookaround",
    r"(?<=a)b": "lookaround",
    r"(?<!a)b": "lookaround",
    r"(?!)": "lookaround",
    r"(a)\1": "back references",
    r"(?P<x>a)(?P=x)": "back references",
    r"\bword\b": "word boundaries",
    r"a*+": "possessive quantifiers",
    r"(?>a)": "atomic groups",
    r"(a)?(?(1)b|c)": "conditionals",
    r"a^b": r"the anchor \^ inside",
    r"a$b": r"the anchor \$ inside",
    "a$\n": r"the anchor \$ inside",
    r"(^a)*": r"the anchor \^ inside",
    r"a\Zb": r"the anchor \\Z inside",
    r"(a": "is no regular expression: missing \\)",
    r"\p{L}": "is no regular expression: bad escape",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_refused_by_name(pattern: str) -> None:
    with pytest.raises(InvalidParameterError, match=REFUSED[pattern]) as caught:
        language(regex=pattern)
    assert repr(pattern) in str(caught.value)


def test_anchors_at_the_ends_say_nothing() -> None:
    for pattern in ("^(?:yes|no)$", r"\A(?:yes|no)\Z", "(^yes|^no)$", "^yes$|^no$", "(?:yes|no)"):
        found = language(regex=pattern)
        assert found.accepts("yes") and found.accepts("no") and not found.accepts("yesno")
