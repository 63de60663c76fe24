"""Which values of SamplingParams do not go together, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dllmserve.catalog import CACHES, RULES

#: parameters that change nothing where they are 0 or None, which a cache reads or does not
REFRESH = ("refresh_delay", "refresh_every", "refresh_window")

#: rules that read min_tokens_per_step
MIN_TOKENS = ("threshold_strict", "dynamic")


def refusals(params: Any) -> Iterator[str]:
    """What would have to be ignored silently: why it is refused."""
    rule, sparse, takes = params.unmask, params.sparse, CACHES[params.cache].takes
    for name, usual in (("remasking", "low_confidence"), ("schedule", "uniform")):
        value = getattr(params, name)
        if value != usual and rule != "steps":
            yield f"{name}={value!r} works with unmask='steps' only, got unmask={rule!r}"
    asked = [n for n in ("regex", "json_schema", "choice") if getattr(params, n) is not None]
    if len(asked) > 1:
        yield f"{' and '.join(asked)} exclude each other: an answer matches one of them"
    if params.constrained and params.stop_strings:
        yield f"stop cuts a text that has to match {asked[0]}: leave one of them out"
    if params.confidence_eos_eot_inf and params.remasking == "random":
        yield (
            "confidence_eos_eot_inf=True changes confidences, which remasking='random' does "
            "not read: leave one of them out"
        )
    if sparse is not None and params.cache != "none":
        yield (
            f"a SparseConfig and cache={params.cache!r} exclude each other: "
            "use cache='none' with sparse attention, or no SparseConfig"
        )
    if params.cache == "sub_block" and params.sub_block_length is None:
        yield (
            "cache='sub_block' computes parts of a block alone: give sub_block_length, which has "
            "to divide the block length"
        )
    if sparse is not None and RULES[rule].revokes:
        yield (
            f"unmask={rule!r} does not work with sparse attention, which keeps a part of the "
            "canvas alone: leave the SparseConfig out"
        )
    if params.confidence not in RULES[rule].confidence:
        named = RULES[rule].confidence
        yield f"unmask={rule!r} needs confidence={_listed(named)}, got {params.confidence!r}"
    compares = rule in ("threshold", "threshold_strict", "threshold_dinfer", "dynamic")
    if compares and params.confidence == "neg_entropy" and params.threshold > 0:
        yield (
            "confidence='neg_entropy' is never above 0, so threshold must be <= 0 "
            f"(for example -0.1), got {params.threshold:g}"
        )
    for name in REFRESH:
        if getattr(params, name) and name not in takes:
            caches = [n for n, info in CACHES.items() if name in info.takes]
            yield (
                f"{name}={getattr(params, name)} needs cache={_listed(caches)}, which are for full "
                f"attention, got cache={params.cache!r}"
            )
    yield from _of_ends(params)
    if RULES[rule].revokes:
        yield from _of_revoking(params)
    yield from _of_edits(params)
    if RULES[rule].noise:
        yield from _of_noise(params, asked)


def _of_noise(params: Any, asked: Sequence[str]) -> Iterator[str]:
    """A rule that writes a canvas at once, of draws that each know the others' noise alone."""
    rule = params.unmask
    if asked:
        yield (
            f"{asked[0]} does not work with unmask={rule!r}: the tokens of a canvas are taken all "
            "at once, each by itself, so nothing says that they match together"
        )
    if params.confidence_eos_eot_inf:
        yield (
            f"confidence_eos_eot_inf=True says what is written last, and unmask={rule!r} writes a "
            "canvas at once: leave it out"
        )
    if params.t_min > params.t_max:
        yield (
            f"t_min={params.t_min:g} is over t_max={params.t_max:g}: temperatures fall from t_max "
            "to t_min"
        )


def _of_ends(params: Any) -> Iterator[str]:
    """What stops at an end id, and what stands behind it."""
    if params.early_end and params.ignore_eos:
        yield (
            "early_end=True and ignore_eos=True exclude each other: one stops at an end id, "
            "the other goes on behind it"
        )
    if params.end_padding and not params.early_end:
        yield (
            "end_padding=True says what stands behind an end id that early_end=True looks for: "
            "give early_end, or leave end_padding out"
        )
    if params.end_padding and params.constrained:
        yield (
            "end_padding=True writes over what stands behind an end id, and does not work with "
            "regex, json_schema and choice: leave one of them out"
        )
    if params.end_padding and not CACHES[params.cache].block:
        yield (
            "end_padding=True replaces tokens whose K,V have to be computed again: it works with "
            f"cache={_listed(_of_blocks())}, got {params.cache!r}"
        )


def _of_revoking(params: Any) -> Iterator[str]:
    """A rule that masks positions again needs the K,V of the whole canvas at hand."""
    rule = params.unmask
    if params.cfg_scale > 0:
        yield f"unmask={rule!r} works without guidance only, got cfg_scale={params.cfg_scale:g}"
    if params.early_end:
        yield (f"early_end=True does not work with unmask={rule!r}, which may take an end id back")
    if not CACHES[params.cache].whole:
        caches = [name for name, info in CACHES.items() if info.whole]
        yield f"unmask={rule!r} works with cache={_listed(caches)}, got {params.cache!r}"


def _of_edits(params: Any) -> Iterator[str]:
    """Edits need a rule and a cache that compute a block as a whole, and nothing final in it."""
    rule, edits = params.unmask, params.edits
    if params.min_tokens_per_step > 1 and rule not in MIN_TOKENS:
        yield (
            f"min_tokens_per_step={params.min_tokens_per_step} works with unmask="
            f"{_listed(MIN_TOKENS)}, got unmask={rule!r}"
        )
    if params.penalty_lambda > 0 and rule != "joint":
        yield (
            f"penalty_lambda={params.penalty_lambda:g} works with unmask='joint' only, got "
            f"unmask={rule!r}"
        )
    if not edits:
        if params.max_edit_steps != type(params).max_edit_steps:
            yield (
                f"max_edit_steps={params.max_edit_steps} counts steps that edit: give an "
                "edit_threshold, too"
            )
        return
    given = editing(params)
    if not RULES[rule].edits:
        known = [name for name, info in RULES.items() if info.edits]
        yield f"{given} works with unmask={_listed(known)}, got unmask={rule!r}"
    if params.sparse is not None:
        yield (
            f"{given} does not work with sparse attention, which keeps a part of the canvas alone: "
            "leave the SparseConfig out"
        )
    if params.constrained:
        yield (
            f"{given} does not work with regex, json_schema and choice, which write tokens for "
            "good: leave one of them out"
        )
    if params.early_end:
        yield (
            f"early_end=True does not work with {given}, since edits may replace an end id: leave "
            "early_end out"
        )
    if not CACHES[params.cache].block:
        yield f"{given} works with cache={_listed(_of_blocks())}, got {params.cache!r}"


def editing(params: Any) -> str:
    """What asks for edits, as errors name it."""
    if params.unmask == "joint":
        return "unmask='joint', which edits,"
    return f"edit_threshold={params.edit_threshold:g}"


def _of_blocks() -> list[str]:
    """Caches with which each forward computes all of its block."""
    return [name for name, info in CACHES.items() if info.block and info.named]


def _listed(names: Sequence[str]) -> str:
    """Names as errors write them.

    Example:
        >>> _listed(["none", "dual"])
        "'none' or 'dual'"
    """
    return " or ".join(map(repr, names))
