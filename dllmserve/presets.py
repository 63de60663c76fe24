"""Quality presets: named values of SamplingParams, chosen from the measured frontier.

How they were measured, and what they cost, is in docs/decoding.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dllmserve._values import BLOCK_LENGTH, MAX_STEPS, Filled, NotGiven, rank
from dllmserve.catalog import CACHES, RULES

#: a model with blocks of its own keeps those
_BLOCK = NotGiven(BLOCK_LENGTH)
#: what "exact" stands for besides its steps
_EXACT: dict[str, Any] = {
    "unmask": Filled("steps"),
    "cache": "none",
    "block_length": _BLOCK,
}

#: what both faster presets share: cost that does not grow with gen_length, and blocks that end
#: when the model is sure
_SURE: dict[str, Any] = {
    "unmask": Filled("threshold"),
    "block_length": _BLOCK,
    "suffix_window": NotGiven(32),
    "early_end": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "exact": _EXACT,
    "balanced": {**_SURE, "threshold": 0.9, "cache": Filled("dual")},
    "fast": {**_SURE, "threshold": 0.8, "cache": Filled("rolling")},
}


def preset(quality: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a preset.

    Args:
        quality: a key of PRESETS.
        given: the user's gen_length, block_length and unmask, if they were given.

    Example:
        >>> preset("exact", {"gen_length": 48})["steps"]
        64
    """
    values = dict(PRESETS[quality])
    if given.get("unmask", values["unmask"]) == "steps":
        block = given.get("block_length", values["block_length"])
        # an engine may have a block length of its own
        values["steps"] = NotGiven(steps_for(given.get("gen_length", 128), block))
    return values


def filled(params: Any, given: Collection[str]) -> dict[str, Any]:
    """The values of a preset that fill in what was not given.

    Args:
        params: SamplingParams with a quality.
        given: names of the fields that were given.
    """
    if "max_tokens" in given and rank(params.max_tokens):
        given = {*given, "gen_length"}
    chosen = ("gen_length", "block_length", "unmask")
    values = preset(params.quality, {n: getattr(params, n) for n in chosen if n in given})
    # what is given may rule a part of the preset out; a rule that is not known revokes nothing
    revokes = params.unmask in RULES and RULES[params.unmask].revokes
    edits = params.edits or params.unmask == "joint"
    if params.ignore_eos or revokes or edits:
        values.pop("early_end", None)
    rule = params.unmask if "unmask" in given else values["unmask"]
    if edits and params.quality != "exact" and not RULES[rule].edits:
        values["unmask"] = "threshold_strict"
    cache = CACHES[values["cache"]]
    if (revokes and not cache.whole) or ((edits or params.end_padding) and not cache.block):
        values["cache"] = Filled("dual")
    return {name: value for name, value in values.items() if name not in given}


def steps_for(length: int, block: int | None, tokens: int = 1) -> int:
    """Steps for an answer in which each writes so many tokens.

    They are spread evenly over the blocks, however short the last one is; those that a block does
    not need cost nothing.

    Args:
        length: of the answer, in tokens.
        block: length of its blocks; None is one block.
        tokens: that a step writes, at most.

    Example:
        >>> steps_for(48, 32), steps_for(64, None, 4)
        (64, 16)
    """
    block = min(block or length, length)
    return min(-(-length // block) * -(-block // tokens), MAX_STEPS)


def same_pace(steps: int, length: int, old: int | None, new: int) -> int:
    """What :func:`steps_for` gives with blocks of another length, and no more tokens a step.

    Args:
        steps: of an answer with the old blocks.
        length: of the answer, in tokens.
        old, new: length of its blocks; None is one block.

    Example:
        >>> same_pace(steps_for(48, 32, 4), 48, 32, 8)
        12
    """
    old = min(old or length, length)
    each = max(steps // -(-length // old), 1)
    return steps_for(length, new, -(-old // each))
