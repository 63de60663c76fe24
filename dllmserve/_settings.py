"""What fills in fields of SamplingParams that were not given, and what is given beside them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from dllmserve._values import SparseConfig, Usual
from dllmserve.errors import InvalidParameterError

#: what unmask="joint" takes where nobody says more, as SGLang's JointThreshold
JOINT = {"threshold": 0.5, "edit_threshold": 0.0}
#: and unmask="renoise", as DiffusionGemma's own generation
RENOISE_BOUND = 0.1


def filled(params: Any, given: Collection[str]) -> dict[str, Any]:
    """Values for what was not given: those of a preset, and what a rule has of its own.

    Args:
        params: SamplingParams that are being made.
        given: names of fields.
    """
    values = dict[str, Any]()
    if params.quality is not None:
        from dllmserve.presets import filled as of_preset

        values = of_preset(params, given)
    if params.unmask == "joint":
        values |= {name: value for name, value in JOINT.items() if name not in given}
        if params.edit_threshold is None:  # the rule is nothing without
            values["edit_threshold"] = JOINT["edit_threshold"]
    if params.unmask == "renoise" and isinstance(params.entropy_bound, Usual):
        values["entropy_bound"] = Usual(RENOISE_BOUND)
    return values


def with_sparse(params: Any, sparse: SparseConfig | None) -> Any:
    """Parameters with a SparseConfig that was given beside them.

    Raises:
        InvalidParameterError: they have another, or do not work with one.
    """
    if sparse is None or sparse == params.sparse:
        return params
    if params.sparse is not None:
        raise InvalidParameterError(
            "a SparseConfig in the SamplingParams and another one beside them contradict each "
            "other: give one of them"
        )
    return replace(params, sparse=sparse)
