"""Bodies are counted before they are parsed, and there is one way to read them."""

import gc
import json
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from dllmserve.messages import template_messages
from dllmserve.server.failures import ApiError
from dllmserve.server.openai_bodies import ChatRequest, conversation_of
from dllmserve.server.strict_json import (
    MAX_DEPTH,
    MAX_VALUES,
    Size,
    check_texts,
    measure,
    parse,
)

MOST = 1 << 20
MIB = 1 << 20


def refusal(body: bytes, most_numbers: int = MOST) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, most_numbers)
    assert caught.value.status == 400
    return caught.value


def walk(value: Any, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Of every value what it counts, and how deep it lies; a name of a member is a text."""
    yield int(not isinstance(value, int) or isinstance(value, bool)), depth
    if isinstance(value, list | dict):
        depth += 1
        yield 0, depth
        for item in value.values() if isinstance(value, dict) else value:
            yield from walk(item, depth)
        if isinstance(value, dict):
            yield len(value), depth


def document(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind == 8:
        names = rng.sample(['a"', "b\\", "[", "e", '\\\\"{', "é😀", "true", ","], rng.randrange(5))
        return {name: document(rng, depth + 1) for name in names}
    if kind == 7:
        return [document(rng, depth + 1) for _ in range(rng.randrange(5))]
    text = "".join(rng.choices('ab"\\[]{}:,é😀\n\u2028tfn.e', k=rng.randrange(8)))
    values: tuple[Any, ...] = (None, True, False, rng.randrange(-999, 99999), 1.5, 1e300, text)
    return values[kind]


def test_what_is_counted_is_there() -> None:
    rng = random.Random(3)
    for ascii_only in (True, False):
        for indent in (None, 1):
            for _ in range(500):
                value = document(rng)
                data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
                found = list(walk(value))
                size = measure(data)
                # 1e+300 is counted once, but for the sign
                assert size.values == sum(count for count, _ in found), data
                assert size.depth == max(depth for _, depth in found), data
                assert parse(data, MOST) == value


def test_members_and_commas() -> None:
    assert measure(b'{"a": {"b": [1, 2, 3]}, "a,:": ","}')[1:4] == (3, 3, 3)
    assert measure(b"") == Size(0, 0, 0, 0, 0)
    assert measure(b"true") == (*measure(b"null")[:4], 4)


def work(call: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, while another is running."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


#: what makes parsers and expressions slow
AWKWARD = [
    *(b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b" ", b"e", b"-", b"\0", b"\xff", b"1"),
    *(b'\\"', b"\\\\", b'"\\', b'"\\"', b'""', b'["', b'{"a":', b'"a":1,', b"[]", b"true", b"1e5,"),
    *(b"\\u0041", b"\\ud800", b"\\n", "😀".encode()),
]


@pytest.mark.parametrize("piece", AWKWARD)
@pytest.mark.parametrize("frame", [b"%b", b'"%b', b'"%b"', b'{"prompt": [%b]}'])
def test_counting_is_a_few_calls_whatever_the_bytes(piece: bytes, frame: bytes) -> None:
    body = frame % (piece * (MIB // len(piece)))
    assert work(lambda: measure(body)) < 40


def lists(element: bytes, size: int = 2 * MIB) -> bytes:
    return b'{"a":[' + b",".join([element] * (size // (len(element) + 1))) + b"]}"


HEAVY = [b'"ab"', b'"a"', b"[]", b"{}", b"[[]]", b'{"a":1}', b"1.5", b"1e5", b"true", b"null"]


@pytest.mark.parametrize("element", HEAVY)
def test_many_values_are_refused_before_they_are_made(element: bytes) -> None:
    body = lists(element)
    tracemalloc.start()
    error = refusal(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"over the limit of {MAX_VALUES}" in error.message
    assert peak < 3 * len(body)


def test_the_limit_of_values() -> None:
    body = [[]] * (MAX_VALUES - 1)
    assert len(parse(json.dumps(body).encode(), 0)) == MAX_VALUES - 1
    assert str(MAX_VALUES + 1) in refusal(json.dumps([*body, []]).encode()).message


NUMBERS = [b"1", b"-1", b"-9", b"300", b"1234", b"-999", b"12345", b"123456789"]


@pytest.mark.parametrize("element", NUMBERS)
def test_numbers_take_no_ten_times_their_text(element: bytes) -> None:
    body = lists(element, MIB)
    tracemalloc.start()
    value = parse(body, MOST)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(value["a"]) == {int(element)}
    assert peak < 8.5 * len(body) + 3 * MIB  # the table of small numbers


def test_the_limit_of_numbers() -> None:
    ids = b"[" + b"7," * (1000 + MAX_VALUES) + b"7]"
    assert len(parse(ids, 1000)) == 1001 + MAX_VALUES
    error = refusal(ids, 999)
    assert error.code == "context_length_exceeded" and "over the 999" in error.message


def test_the_limit_of_depth() -> None:
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        body = opened * MAX_DEPTH + "1" + closed * MAX_DEPTH
        assert parse(body.encode(), MOST)
        message = refusal((opened + body + closed).encode()).message
        assert "nested too deeply" in message and str(MAX_DEPTH) in message
    assert "nested too deeply" in refusal(b"[" * 2 * MIB).message
    assert parse(b'{"a":"' + b"[" * MIB + b'"}', MOST)["a"] == "[" * MIB


TWICE = [
    (b'{"prompt": "a", "prompt": "a"}', "prompt", "prompt"),
    (b'{"n": 1, "prompt": "a", "n": 1, "n": 2}', "n", "n"),
    # the same name, written in another way
    (b'{"prompt": "a", "\\u0070rompt": "b"}', "prompt", "prompt"),
    (b'{"a": {"deep": [{"x": 1, "y": 2, "x": 3}]}}', "x", None),
    (b'[{"a": 1}, {"b": {}, "b": {}}]', "b", None),
    (b'{"": 1, "": 2}', "", ""),
    (b'{"a\\n": 1, "a\\n": 2}', "a\\n", "a\\n"),
    (b'{"\\ud800": 1, "\\ud800": 2}', "\\ud800", "\\ud800"),
]


@pytest.mark.parametrize(("body", "name", "param"), TWICE)
def test_members_that_are_given_twice(body: bytes, name: str, param: str | None) -> None:
    error = refusal(body)
    assert f"'{name}' twice" in error.message
    assert (error.code, error.param) == ("invalid_json", param)


def test_equal_names_of_other_objects_are_no_doubles() -> None:
    body = b'{"a": {"a": [{"a": 1}, {"a": ":\\":"}]}, "A": {}, "a ": 1}'
    assert parse(body, MOST) == json.loads(body)


UNREADABLE = [
    (b"NaN", "it has NaN"),
    (b'{"a": [-Infinity]}', "it has -Infinity"),
    (b'{"a": Infinity}', "it has Infinity"),
    (b'{"a": }', "from character 7 on"),
    (b"{'a': 1}", "from character 2 on"),
    (b'{"a": 1,}', "from character"),
    (b'{"a": 1} {}', "from character 10 on"),
    (b'{"a": "\n"}', "from character"),
    (b" ", "from character 2 on"),
    (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    (b'{"a": "\xe9"}', "byte 7 (0xe9)"),
    (b'{"a": "\xed\xa0\x80"}', "byte 7 (0xed)"),
    (b'{"a": "\xc3', "byte 7 (0xc3)"),
    (b'\xef\xbb\xbf{"a": "\xe9"}', "byte 10 (0xe9)"),
    ('{"a": 1}'.encode("utf-16"), "byte 0 (0xff)"),
    ('{"a": 1}'.encode("utf-16-le"), "UTF-8"),
    ('{"a": 1}'.encode("utf-32-be"), "UTF-8"),
]


@pytest.mark.parametrize(("body", "text"), UNREADABLE)
def test_what_is_no_json(body: bytes, text: str) -> None:
    error = refusal(body)
    assert text in error.message and error.code == "invalid_json"


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse(b'\xef\xbb\xbf{"a": "\xc3\xa9"}', MOST) == {"a": "é"}


@pytest.mark.parametrize("tail", [b"", b"}", b',"a":1}', b',"b":NaN}', b',"c":"\xff"}', b",]"])
def test_a_refused_body_is_free_at_once(tail: bytes) -> None:
    body = b'{"a":"' + b"x" * MIB + b'"' + tail
    gc.disable()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with suppress(ApiError):
            parse(body, MOST)
        assert tracemalloc.get_traced_memory()[0] - before < MIB // 2
    finally:
        tracemalloc.stop()
        gc.enable()


def test_json_inside_of_texts_is_counted_together() -> None:
    half = json.dumps({"a": [[]] * (MAX_VALUES // 2)})
    check_texts([half, "no JSON", '"', ""], "messages")
    for texts in ([half, half], ["1," * (MAX_VALUES + 1)], ["[" * (MAX_DEPTH + 1)]):
        with pytest.raises(ApiError) as caught:
            check_texts(texts, "messages")
        assert (caught.value.status, caught.value.param) == (400, "messages")


def test_arguments_of_calls_are_bounded_where_they_are_parsed() -> None:
    def asked(*arguments: str) -> ChatRequest:
        calls = [{"function": {"name": "f", "arguments": text}} for text in arguments]
        old = {"role": "assistant", "function_call": {"name": "f", "arguments": arguments[0]}}
        said = [{"role": "assistant", "tool_calls": calls}, old]
        return ChatRequest.model_validate({"messages": said})

    fine = asked('{"a": [1]}', "{oops")
    read = [m.model_dump(exclude_none=True) for m in fine.messages]
    assert conversation_of(fine.messages) == template_messages(read)
    third = json.dumps({"a": [[]] * (MAX_VALUES // 3)})
    for wrong in (asked(third, third), asked('{"a":' * 900 + "1" + "}" * 900)):
        with pytest.raises(ApiError, match="JSON inside of messages"):
            conversation_of(wrong.messages)
