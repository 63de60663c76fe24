"""Which values of SamplingParams do not go together, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dllmserve.catalog import CACHES, RULES

#: parameters that change nothing where they are 0 or None, which a cache reads or does not
REFRESH = ("refresh_delay", "refresh_every", "refresh_window")


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
        named = " or ".join(map(repr, RULES[rule].confidence))
        yield f"unmask={rule!r} needs confidence={named}, got {params.confidence!r}"
    compares = rule in ("threshold", "threshold_strict", "threshold_dinfer", "dynamic")
    if compares and params.confidence == "neg_entropy" and params.threshold > 0:
        yield (
            "confidence='neg_entropy' is never above 0, so threshold must be <= 0 "
            f"(for example -0.1), got {params.threshold:g}"
        )
    for name in REFRESH:
        if getattr(params, name) and name not in takes:
            caches = " or ".join(repr(n) for n, info in CACHES.items() if name in info.takes)
            yield (
                f"{name}={getattr(params, name)} needs cache={caches}, which are for full "
                f"attention, got cache={params.cache!r}"
            )
    if params.early_end and params.ignore_eos:
        yield (
            "early_end=True and ignore_eos=True exclude each other: one stops at an end id, "
            "the other goes on behind it"
        )
    if RULES[rule].revokes:
        yield from _of_revoking(params)


def _of_revoking(params: Any) -> Iterator[str]:
    """A rule that masks positions again needs the K,V of the whole canvas at hand."""
    rule = params.unmask
    if params.cfg_scale > 0:
        yield f"unmask={rule!r} works without guidance only, got cfg_scale={params.cfg_scale:g}"
    if params.early_end:
        yield (f"early_end=True does not work with unmask={rule!r}, which may take an end id back")
    if not CACHES[params.cache].whole:
        caches = " or ".join(repr(name) for name, info in CACHES.items() if info.whole)
        yield f"unmask={rule!r} works with cache={caches}, got {params.cache!r}"
