"""Readings as requests: what is asked for fits what each geometry fills."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.validator import RequestValidator
from dllmserve.decisions.questions import predicate
from dllmserve.decisions.reading import How
from dllmserve.decisions.requests import Decider
from dllmserve.decisions.template import Reading
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.outputs import RequestOutput
from tests.helpers import PLAIN, SHIFTED

LIMITS = Limits(
    max_model_len=2048,
    max_num_seqs=4,
    max_num_batched_tokens=2048,
    max_logit_rows=64,
    page_size=16,
    num_pages=128,
)
BASE = replace(PLAIN, vocab_size=260, embedding_size=260, mask_id=259, max_model_len=2048)
BLOCKS = replace(BASE, geometry="block", block_length=4)
SPECS = {
    "full": BASE,
    "shifted": replace(BASE, logit_shift=SHIFTED.logit_shift),
    "full in blocks": replace(BASE, block_length=32),
    "blocks": BLOCKS,
    "shifted blocks": replace(BLOCKS, logit_shift=1, block_length=8),
    "short blocks": replace(BLOCKS, short_blocks=True),
    "frames": replace(BLOCKS, causal_context=True, logit_shift=1),
    "causal": replace(BASE, geometry="causal", logit_shift=1, mask_id=-1),
}


def decider(spec: ModelSpec, folder: Path) -> Decider:
    return Decider(load_tokenizer(folder), spec, LIMITS)


@pytest.mark.parametrize("name", SPECS)
def test_every_geometry_fills_what_is_asked_for(name: str, byte_checkpoint: Path) -> None:
    spec = SPECS[name]
    made, make = decider(spec, byte_checkpoint), RequestValidator(spec, LIMITS, True).request
    for length in range(20, 40):
        ids = [7] * length
        holes = (5, 6, 9) if spec.geometry == "full" else (length - 1,)
        asked = tuple((i, i + 1) for i in range(len(holes)))
        request = made.request(Reading(ids, holes, asked), partial(make, 0))
        assert len(request.candidates) == sum(request.masks) >= len(holes)
        assert request.candidates[: len(holes)] == asked
        assert not any(request.candidates[len(holes) :])
        if spec.geometry == "full":
            assert request.quotas == ((3,),)  # one forward
            assert len(request.canvas) == length
        else:
            assert request.canvas.start == length - 1


def output(count: int) -> RequestOutput:
    return RequestOutput("", [1], "length", 10, 1, 1, 4, candidate_logprobs=[[0.0, -1.0]] * count)


def test_readings_come_in_waves_and_are_counted(byte_checkpoint: Path) -> None:
    questions = [predicate(f"{i}?") for i in range(10)]
    for name, at_once, sizes in (
        ("full", 4, [1]),
        ("causal", 4, [1, 4, 4, 1]),  # the first stores the prompt that all have in common
        ("causal", 100, [1, 9]),
        ("blocks", 100, [1, 9]),
    ):
        made = decider(SPECS[name], byte_checkpoint)
        waves = made.run("Hm.", questions, How(), at_once=at_once)
        found, seen = made.advance(waves, None), []
        while isinstance(found, list):
            seen.append(len(found))
            found = made.advance(waves, [output(len(r.holes)) for r in found])
        chances, cost = found
        assert seen == sizes and len(chances) == 10
        assert cost.output_tokens == 10
        assert (cost.input_tokens, cost.cached_tokens) == (10 * sum(sizes), 4 * sum(sizes))
        assert cost.forward_passes == sum(sizes)
