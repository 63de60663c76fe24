"""Suites: built-in lists of settings, the first of each the baseline."""

from __future__ import annotations

from typing import Any

from dllmserve.presets import PRESETS

#: sets ``steps`` from the length of each answer
TOKENS_PER_STEP = "tokens_per_step"
#: turns sparse attention on or off, or holds fields of SparseConfig
SPARSE = "sparse"

Settings = dict[str, dict[str, Any]]

_STEPS: dict[str, Any] = {"unmask": "steps", TOKENS_PER_STEP: 1}
_ATTENTION: dict[str, Any] = {"score": "attention", "pool_kernel": 1}
_ONE = {"one token a step": _STEPS}


def _rule(name: str, field: str, *values: float, **more: Any) -> Settings:
    """A rule with several values of one field."""
    return {f"{name} {value:g}": {"unmask": name, field: value, **more} for value in values}


#: every rule, from careful to bold
_FRONTIER: Settings = {
    **_ONE,
    **{f"{n} tokens a step": {**_STEPS, TOKENS_PER_STEP: n} for n in (2, 4, 8, 16, 32)},
    **_rule("threshold", "threshold", 0.99, 0.9, 0.8, 0.6, 0.2),
    **_rule("threshold_strict", "threshold", 0.9),
    **_rule("factor", "factor", 1.0),
    **_rule("factor_strict", "factor", 0.25, 1.0),
    **_rule("entropy_bound", "entropy_bound", 0.02, 0.15, 0.5, 1.5),
    **_rule("hierarchy", "threshold", 0.9, low_threshold=0.4),
    **_rule("credit", "threshold", 0.9),
    **_rule("klass", "threshold", 0.9, 0.6, kl_history=1),
    **_rule("wino", "threshold", 0.6, 0.3),
}

#: every refresh policy and sparse attention, one token a step
_CACHES: Settings = {
    **_ONE,
    **{f"suffix {n}": {**_STEPS, "suffix_window": n} for n in (0, 32)},
    "suffix 32, early end": {**_STEPS, "suffix_window": 32, "early_end": True},
    **{name: {**_STEPS, "cache": name} for name in ("prefix", "dual", "rolling", "delayed")},
    "dual, delay 1": {**_STEPS, "cache": "dual", "refresh_delay": 1},
    "dual, every 8": {**_STEPS, "cache": "dual", "refresh_every": 8},
    "dual, window 16": {**_STEPS, "cache": "dual", "refresh_window": 16},
    "rolling, suffix 32": {**_STEPS, "cache": "rolling", "suffix_window": 32},
    "drift 0.25": {**_STEPS, "cache": "drift", "refresh_share": 0.25},
    "sparse 0.5": {**_STEPS, SPARSE: {"retention_ratio": 0.5}},
    "sparse 0.5 shared": {**_STEPS, SPARSE: {"retention_ratio": 0.5, "head_select": False}},
    "attention 0.5": {**_STEPS, SPARSE: {"retention_ratio": 0.5, **_ATTENTION}},
    "attention 0.5, min 64": {
        **_STEPS,
        SPARSE: {"retention_ratio": 0.5, "min_keep": 64, **_ATTENTION},
    },
}

#: name -> settings by name
SUITES: dict[str, Settings] = {
    "frontier": _FRONTIER,
    "caches": _CACHES,
    "quality": {name: {"quality": name} for name in PRESETS},
}
