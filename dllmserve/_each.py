"""One value per prompt: from what callers give for all prompts at once, or for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllmserve._settings import with_sparse
from dllmserve._values import SparseConfig
from dllmserve.errors import InvalidParameterError, InvalidRequestError
from dllmserve.sampling_params import SamplingParams


def each_params(
    sampling: Any,
    sparse: Any,
    count: int,
    name: str = "sparse_configs",
    prompts: str = "prompts",
) -> list[SamplingParams]:
    """Parameters of each prompt, with the SparseConfig that was given beside them."""
    params = _one_each("sampling_params", sampling, SamplingParams, count, prompts=prompts)
    configs = _one_each(name, sparse, SparseConfig, count, optional=True)
    pairs = list(zip(params, configs, strict=True))
    # mostly all are one and the same, and are checked once
    different = {(id(p), id(s)): (p, s) for p, s in pairs}
    made = {key: with_sparse(*pair) for key, pair in different.items()}
    return [made[id(p), id(s)] for p, s in pairs]


def _one_each(
    name: str,
    given: Any,
    kind: type[Any],
    count: int,
    *,
    optional: bool = False,
    prompts: str = "prompts",
) -> list[Any]:
    """One value per prompt, from a single value or a list of the right length."""
    if given is None or isinstance(given, kind):
        default = None if optional else kind()
        return [given if given is not None else default] * count
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise InvalidParameterError(
            f"{name} must be a {kind.__name__} or a list of them, got {type(given).__name__}"
        )
    if len(given) != count:
        raise InvalidRequestError(f"{name} has {len(given)} entries for {count} {prompts}")
    for place, item in enumerate(given):
        if not isinstance(item, kind) and not (optional and item is None):
            raise InvalidParameterError(
                f"{name}[{place}] must be a {kind.__name__}, got {type(item).__name__}"
            )
    return list(given)
