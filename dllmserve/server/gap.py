"""Answers in a gap: text that is inserted between what stands before and what stands behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dllmserve._values import NotGiven
from dllmserve.async_llm import AsyncLLM
from dllmserve.core.request import Request
from dllmserve.core.rows import ends_of
from dllmserve.holes import Hole
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.service import Service


async def before_ids(service: Service, prompt: str | list[int], name: str, owner: str) -> list[int]:
    """Ids of what stands before a gap: of a text, with what begins a prompt; errors name it."""
    row, _ = await service.template_row([prompt, Hole(1)], name, owner)
    return row[:-1]


async def behind_ids(service: Service, suffix: str, name: str, owner: str) -> list[int]:
    """Ids of a text that stands behind a gap; errors name it."""
    row, _ = await service.template_row([Hole(1), suffix], name, owner)
    return row[1:]


async def in_gap(
    llm: AsyncLLM,
    before: list[int],
    behind: list[int],
    choices: Sequence[SamplingParams],
    name: str,
) -> list[Request]:
    """Checked requests for answers in a gap; an answer may end before it fills its length.

    Args:
        llm: the engines.
        before, behind: token ids.
        choices: parameters of each answer; what it has to match is asked of the gap.
        name: of the whole, in errors.

    Raises:
        DllmServeError: it cannot be answered; see :meth:`AsyncLLM.check`.
    """
    requests, first = list[Request](), choices[0]
    ends = ends_of(first, llm.info.spec) or first.stop_strings
    hole = Hole(
        int(first.gen_length),
        regex=first.regex,
        json_schema=first.json_schema,
        choice=first.choice,
        fill="up_to" if ends else "exact",
    )
    row, holes = [*before, *[0] * hole.length, *behind], ((len(before), hole),)
    for choice in choices:
        params = _of_gap(choice, llm)
        if not requests:
            await llm.prepare(params, holes)
        requests.append(llm.check(row, params, holes=holes, name=name))
    return requests


def _of_gap(params: SamplingParams, llm: AsyncLLM) -> SamplingParams:
    """Parameters without what the gap has to match, and with the blocks of an answer."""
    block = params.block_length
    if isinstance(block, NotGiven):  # a template would be one window, and text comes in blocks
        block = llm.info.spec.block_length or int(block)
    return replace(params, regex=None, json_schema=None, choice=None, block_length=block)
