"""A plan checks its own contract."""

from typing import Any

import pytest

from dllmserve.core.plan import Mask, NewPage, Part, Span, SpanField, StepEntry, StepPlan, Store

GOOD = Span(0, 2, 6, 8, int(Store.POSITIONS), 0, 1, 4)


def entry(uncond: bool = False, masks: int = 2, **changes: Any) -> StepEntry:
    span = GOOD._replace(**changes)
    twin = span._replace(row=span.row + 10) if uncond else None
    return StepEntry(span, twin, masks, "steps")


def test_derived_positions() -> None:
    assert (GOOD.blk_start, GOOD.blk_end, GOOD.refresh) == (3, 7, False)
    assert GOOD._replace(q_start=0, ctx_len=6).refresh


def test_order_of_spans_and_totals() -> None:
    plan = StepPlan((entry(), entry(row=1, uncond=True), entry(row=2, uncond=True)))
    plan.validate(16)
    assert [s.row for s in plan.spans] == [0, 1, 2, 11, 12]
    assert plan.guided == 2
    assert plan.tokens == 30
    assert [e.logit_rows for e in plan.entries] == [2, 4, 4]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((entry(uncond=True), entry(row=1)), "guidance must come last"),
        ((entry(), entry()), "row appears twice"),
        ((entry(q_len=0, blk_len=0),), "query range outside the canvas"),
        ((entry(q_start=-1),), "query range outside the canvas"),
        ((entry(q_start=11),), "query range outside the canvas"),
        ((entry(blk_off=-1),), "block outside the query range"),
        ((entry(blk_len=6),), "block outside the query range"),
        ((entry(store=9),), "bad store"),
        ((entry(keep=-1),), "bad store, keep"),
        ((entry(ctx_len=-1),), "bad store, keep or ctx_len"),
        ((entry(mask=3),), "bad mask"),
        ((entry(mask=Mask.STAIR),), "bad mask"),
        ((entry(head=4),), "bad part"),
        ((entry(must=-1),), "bad part"),
        ((entry(head=Part.NONE),), "decides nothing has a block"),
        ((entry(store=Store.AHEAD),), "nothing of the step reads what is stored ahead"),
        ((entry(pick=9),), "bad choice of queries"),
        ((entry(masks=5),), "5 masks in a block of 4"),
        ((entry(masks=-1),), "-1 masks in a block of 4"),
    ],
)
def test_broken_plans(entries: tuple[StepEntry, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepPlan(entries).validate(16)


def test_columns_are_the_fields_in_order() -> None:
    assert tuple(field.name.lower() for field in SpanField) == Span._fields
    assert [*SpanField] == [*range(len(Span._fields))]


def test_a_part_of_a_plan_keeps_its_pages() -> None:
    """Whichever part of a step runs first, the pages have to be there."""
    plan = StepPlan((entry(), entry(row=1)), (NewPage(1, 0, 7),))
    assert plan.part(1) == StepPlan((entry(row=1),), (NewPage(1, 0, 7),))
