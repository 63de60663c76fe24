"""Messages to the ranks: what comes out is what went in."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dllmserve.catalog import RULES
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, RowSelect, Track
from dllmserve.ranks.wire import (
    Kind,
    decode_plan,
    decode_row,
    encode_kind,
    encode_plan,
    encode_row,
    read,
)
from dllmserve.sampling_params import CONFIDENCE

NUMBERS = st.integers(0, 2**31 - 1)
SPANS = st.builds(Span, *[NUMBERS] * len(Span._fields))
FLOATS = st.floats(allow_nan=False)
WIDE = st.integers(-(2**63), 2**63 - 1)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=5)


ENTRIES = st.builds(
    StepEntry,
    span=SPANS,
    uncond=st.none() | SPANS,
    masks=NUMBERS,
    rule=st.sampled_from(list(RULES)),
    last=st.booleans(),
    shadow=st.none() | SPANS,
)
ROWS = st.builds(
    RowInit,
    row=NUMBERS,
    prompt=some(NUMBERS),
    gen_length=NUMBERS,
    floats=some(FLOATS).map(tuple),
    ints=some(WIDE).map(tuple),
    quotas=some(NUMBERS).map(tuple),
    pages=some(NUMBERS),
    confidence=st.sampled_from(CONFIDENCE),
    sampled=st.booleans(),
    filtered=st.booleans(),
    select=st.builds(RowSelect, NUMBERS, NUMBERS, st.booleans()),
    bias=some(st.tuples(NUMBERS, FLOATS)).map(tuple),
    last=some(NUMBERS).map(tuple),
    track=st.sampled_from(Track),
    history=some(NUMBERS).map(tuple),
)


@given(some(ENTRIES))
def test_plans(entries: list[StepEntry]) -> None:
    plan = StepPlan(tuple(entries))
    kind, numbers, _ = read(encode_plan(plan))
    assert kind is Kind.PLAN
    assert decode_plan(numbers) == plan
    assert all(type(e.last) is bool for e in decode_plan(numbers).entries)


@given(ROWS)
def test_rows(row: RowInit) -> None:
    kind, numbers, _ = read(encode_row(row))
    assert kind is Kind.ROW
    assert decode_row(numbers) == row


@given(st.text().filter(lambda text: text.isprintable()))
def test_texts(text: str) -> None:
    assert read(encode_kind(Kind.RETURNED, text)) == (Kind.RETURNED, [], text)
    assert read(encode_kind(Kind.STOP))[0] is Kind.STOP
