"""Policies: which span each step asks for, and that spans stay inside what was reserved."""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.cache.policy import CachePolicy
from dllmserve.catalog import CACHES
from dllmserve.core.plan import Span, StepEntry, StepPlan, Store
from dllmserve.core.request import Request
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig
from tests.helpers import PLAIN, SHIFTED, prompt_request


def policy(name: str) -> CachePolicy:
    made: CachePolicy = CACHES[name].load()()
    return made


def request(name: str, prompt: int, gen: int, block: int, **sparse: object) -> Request:
    config = SparseConfig(**sparse) if name == "sparse" else None
    cache = "none" if config else name
    params = SamplingParams(
        gen_length=gen, steps=gen, block_length=block, cache=cache, sparse=config
    )
    return prompt_request(0, [1] * prompt, params)


def span_at(name: str, one: Request, block: int, step: int, shifted: bool = False) -> Span:
    one.progress.block, one.progress.step_in_block = block, step
    return policy(name).span(one, SHIFTED if shifted else PLAIN, row=5)


WHOLE = {"row": 5, "q_start": 0, "q_len": 30, "keep": 0}


@pytest.mark.parametrize("shifted", [False, True])
def test_none_recomputes_everything(shifted: bool) -> None:
    one = request("none", 10, 20, 8)
    for step in range(3):
        span = span_at("none", one, 1, step, shifted)
        assert span == Span(**WHOLE, ctx_len=0, store=Store.NONE, blk_off=18, blk_len=8)
    assert policy("none").slots(one, PLAIN) == 0


@pytest.mark.parametrize("name", ["prefix", "dual"])
def test_block_entry_writes_the_whole_canvas(name: str) -> None:
    one = request(name, 10, 20, 8)
    for block, blk_len in enumerate((8, 8, 4)):
        span = span_at(name, one, block, 0)
        assert span == Span(
            **WHOLE, ctx_len=0, store=Store.POSITIONS, blk_off=10 + 8 * block, blk_len=blk_len
        )
    assert policy(name).slots(one, PLAIN) == 30


@pytest.mark.parametrize(("shifted", "first"), [(False, 18), (True, 17)])
def test_reuse(shifted: bool, first: int) -> None:
    one = request("prefix", 10, 20, 8)
    block = {"blk_off": 18 - first, "blk_len": 8, "keep": 0, "row": 5}
    assert span_at("prefix", one, 1, 1, shifted) == Span(
        q_start=first, q_len=30 - first, ctx_len=first, store=Store.NONE, **block
    )
    assert span_at("dual", one, 1, 1, shifted) == Span(
        q_start=first, q_len=26 - first, ctx_len=30, store=Store.POSITIONS, **block
    )


@pytest.mark.parametrize(
    ("head_select", "mode"), [(True, Store.SELECT_PER_HEAD), (False, Store.SELECT_SHARED)]
)
def test_sparse_phases(head_select: bool, mode: Store) -> None:
    one = request("sparse", 10, 20, 8, delay_step=2, head_select=head_select, default_block_len=8)
    assert [span_at("sparse", one, 0, step).store for step in range(4)] == [0, 0, mode, 0]
    keep = (30 - 8) // 2
    assert span_at("sparse", one, 0, 2).keep == keep
    assert span_at("sparse", one, 0, 3) == Span(5, 10, 8, keep, 0, 0, 0, 8)
    # a shifted model recomputes the token before the block, which therefore never competes
    assert span_at("sparse", one, 1, 3, shifted=True) == Span(5, 17, 9, 10, 0, 0, 1, 8)
    assert policy("sparse").slots(one, PLAIN) == (30 - 4 - 4) // 2 + 2


def test_a_wide_window_leaves_fewer_candidates() -> None:
    one = request("sparse", 10, 20, 8, default_block_len=12, retention_ratio=1.0)
    assert span_at("sparse", one, 0, 1).keep == 30 - 12
    assert span_at("sparse", one, 1, 1).keep == 30 - 12
    assert span_at("sparse", one, 2, 1).keep == 30 - 4  # cut at the end of the canvas


def test_the_sparse_policy_needs_a_config() -> None:
    one = request("none", 4, 4, 4)
    with pytest.raises(ValueError, match="without a SparseConfig"):
        policy("sparse").span(one, PLAIN, 0)


@given(
    st.sampled_from(sorted(name for name, info in CACHES.items() if not info.windowed)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 50),
    st.floats(0.0, 1.0),
    st.integers(1, 50),
    st.integers(0, 3),
    st.booleans(),
)
def test_spans_are_valid_and_covered_by_the_reservation(
    name: str,
    prompt: int,
    gen: int,
    block: int,
    ratio: float,
    window: int,
    delay: int,
    shifted: bool,
) -> None:
    one = request(
        name, prompt, gen, block, retention_ratio=ratio, default_block_len=window, delay_step=delay
    )
    spec = SHIFTED if shifted else PLAIN
    slots = policy(name).slots(one, spec)
    assert not policy(name).unsupported(spec)
    written = 0
    for index, length in enumerate(one.masks):
        one.progress.block = index
        one.progress.masks_left = length
        for step in count():
            one.progress.step_in_block = step
            span = policy(name).span(one, spec, row=0)
            StepPlan((StepEntry(span, None, length, "steps"),)).validate(100)
            assert (span.blk_start, span.blk_end) == one.blocks[index]
            assert max(span.ctx_len, span.keep) <= slots
            one.progress.forwards += 1
            if span.store in (Store.POSITIONS, Store.AHEAD):
                assert span.q_start + span.reach <= slots
                written = max(written, span.q_start + span.q_len)
            elif span.selects:
                written = span.keep
            assert span.ctx_len <= written or span.ctx_len == 0  # nothing unwritten is read
            if step > delay + 1:
                break
