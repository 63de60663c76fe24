"""Request: blocks, quotas and rows of a job; and the rows of the state table it fills."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dllmserve._settings import with_sparse
from dllmserve.core.request import Request, Status
from dllmserve.core.rows import IntField, RowSelect, row_inits
from dllmserve.sampling_params import FLOATS, SamplingParams
from dllmserve.sparse.state import SparseConfig
from tests.helpers import PLAIN, prompt_request


def make(params: SamplingParams, sparse: SparseConfig | None = None) -> Request:
    return prompt_request(3, [5, 6, 7], with_sparse(params, sparse), seed=9)


@pytest.mark.parametrize(
    ("block_length", "sparse", "blocks"),
    [
        (None, None, (20,)),
        (8, None, (8, 8, 4)),
        (None, SparseConfig(default_block_len=6), (6, 6, 6, 2)),
        (8, SparseConfig(default_block_len=6), (8, 8, 4)),
        (64, None, (20,)),
    ],
)
def test_blocks(
    block_length: int | None, sparse: SparseConfig | None, blocks: tuple[int, ...]
) -> None:
    one = make(SamplingParams(gen_length=20, steps=20, block_length=block_length), sparse)
    assert one.masks == blocks
    assert one.progress.masks_left == blocks[0]
    ranges = one.blocks
    assert ranges[0][0] == one.prompt_len == 3
    assert ranges[-1][1] == one.canvas_len == 23
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    assert one.status is Status.WAITING


def test_only_the_steps_rule_has_quotas() -> None:
    assert make(SamplingParams(gen_length=8, steps=3)).quotas == ((3, 3, 2),)
    assert make(SamplingParams(gen_length=8, unmask="threshold")).quotas == ()


def test_guidance_takes_a_second_row_whose_prompt_is_masked() -> None:
    one = make(SamplingParams(gen_length=8, steps=8, cfg_scale=0.5, temperature=0.7, top_k=4))
    one.row, one.uncond_row = 4, 2
    assert one.rows_needed == 2
    first, second = row_inits(one, replace(PLAIN, mask_id=99))
    assert (first.row, first.ids) == (4, [5, 6, 7])
    assert (second.row, second.ids) == (2, [99] * 3)
    assert first.floats == second.floats
    assert first.floats[FLOATS.index("cfg_scale")] == 0.5
    assert first.ints[IntField.SEED] == 9
    assert first.sampled
    assert first.filtered


def test_sparse_settings_reach_the_row() -> None:
    (init,) = row_inits(
        make(SamplingParams(gen_length=8), SparseConfig(pool_kernel=5, default_block_len=6)), PLAIN
    )
    assert init.select == RowSelect(pool_kernel=5, window=6)
    assert len(init.floats) == len(FLOATS)
    assert len(init.ints) == len(IntField)
