"""Messages to the ranks: what comes out is what went in."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dllmserve.catalog import EDITS, RULES
from dllmserve.core.plan import NewPage, Span, StepEntry, StepPlan
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
    step=st.integers(-1, 9),
    quota=NUMBERS,
    last=st.booleans(),
    blind=st.none() | SPANS,
    fills=NUMBERS,
)
PAIRS = some(st.tuples(NUMBERS, FLOATS)).map(tuple)
ROWS = st.builds(
    RowInit,
    row=NUMBERS,
    ids=some(NUMBERS),
    holes=some(st.tuples(NUMBERS, NUMBERS)).map(tuple),
    floats=some(FLOATS).map(tuple),
    ints=some(WIDE).map(tuple),
    ends=some(NUMBERS).map(tuple),
    confidence=st.sampled_from(CONFIDENCE),
    sampled=st.booleans(),
    filtered=st.booleans(),
    select=st.builds(RowSelect, NUMBERS, NUMBERS, st.booleans()),
    edits=st.dictionaries(
        st.sampled_from(list(EDITS)), some(st.tuples(NUMBERS, FLOATS)).map(tuple)
    ),
    last=some(NUMBERS).map(tuple),
    track=st.sampled_from(Track),
    history=some(NUMBERS).map(tuple),
    logprobs=st.none() | NUMBERS,
    candidates=some(some(NUMBERS).map(tuple)).map(tuple),
)


PAGES = some(st.builds(NewPage, NUMBERS, NUMBERS, NUMBERS))


@given(some(ENTRIES), PAGES)
def test_plans(entries: list[StepEntry], pages: list[NewPage]) -> None:
    plan = StepPlan(tuple(entries), tuple(pages))
    found = decode_to_worker(encode(Execute(plan)))
    assert isinstance(found, Execute) and found.plan == plan
    assert all(type(e.last) is bool and type(e.span) is Span for e in found.plan.entries)


@given(ROWS)
def test_rows(row: RowInit) -> None:
    found = decode_to_worker(encode(Admit(row)))
    assert isinstance(found, Admit) and found.row == row
    assert type(found.row.track) is Track and found.row.ids == row.ids


def test_every_bit_of_a_number_arrives() -> None:
    """Whole floats stay floats, and -0.0 is not 0.0."""
    floats = (1.0, -0.0, 5e-324, float("inf"), 0.1)
    row = RowInit(0, [1], ((1, 3),), floats, (2**63 - 1,), (), "margin", True, False, RowSelect())
    found = decode_to_worker(encode(Admit(row)))
    assert isinstance(found, Admit)
    assert [x.hex() for x in found.row.floats] == [x.hex() for x in floats]
