"""Messages to the ranks: what comes out is what went in."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dllmserve.catalog import RULES
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, RowSelect, Track
from dllmserve.process.messages import Admit, Execute, decode_to_worker, encode
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
    found = decode_to_worker(encode(Execute(plan)))
    assert isinstance(found, Execute) and found.plan == plan
    assert all(type(e.last) is bool and type(e.span) is Span for e in found.plan.entries)


@given(ROWS)
def test_rows(row: RowInit) -> None:
    found = decode_to_worker(encode(Admit(row)))
    assert isinstance(found, Admit) and found.row == row
    assert type(found.row.track) is Track and found.row.prompt == row.prompt


def test_every_bit_of_a_number_arrives() -> None:
    """Whole floats stay floats, and -0.0 is not 0.0."""
    floats = (1.0, -0.0, 5e-324, float("inf"), 0.1)
    row = RowInit(0, [1], 2, floats, (2**63 - 1,), (), [], "margin", True, False, RowSelect())
    found = decode_to_worker(encode(Admit(row)))
    assert isinstance(found, Admit)
    assert [x.hex() for x in found.row.floats] == [x.hex() for x in floats]
