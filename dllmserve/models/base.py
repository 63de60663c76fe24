"""ModelDefinition: what a supported architecture has to say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.parallel.partition import Cut, Partition


class AttentionContext(Protocol):
    """What a model's forward needs from the step: attention with its cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q [N, Hq, D], k and v [N, Hkv, D] (rotated) -> [N, Hq, D]."""
        ...


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor, or a rank's part of it, goes: some rows of a parameter.

    Attributes:
        parameter: name in the decoder.
        start: first row (dimension 0).
        shape: shape that the checkpoint tensor must have.
        cut: rows and columns of it that are wanted.
    """

    parameter: str
    start: int
    shape: tuple[int, ...]
    cut: Cut = (slice(None), slice(None))

    @property
    def index(self) -> tuple[slice, ...]:
        """What is wanted of a checkpoint tensor."""
        return self.cut[: len(self.shape)]


class ModelDefinition(Protocol):
    """One architecture. Add a file with one of these and a line in registry.MODELS."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Read config.json. Raises UnsupportedModelError on options we do not run."""
        ...

    def targets(self, partition: Partition) -> dict[str, Target]:
        """Every tensor that the checkpoint must hold, and where a rank's part of it goes."""
        ...

    def ignored(self, name: str, spec: ModelSpec) -> bool:
        """True for tensors that a checkpoint may hold and that nothing needs."""
        ...


def need(config: Mapping[str, Any], name: str, architecture: str) -> Any:
    """``config[name]``, or an error that names the missing field."""
    if config.get(name) is None:
        raise UnsupportedModelError(f"config.json of {architecture} lacks the field {name!r}")
    return config[name]


def refuse(config: Mapping[str, Any], architecture: str, allowed: Mapping[str, Any]) -> None:
    """Raise unless every option in ``allowed`` has its allowed value or is absent."""
    for name, value in allowed.items():
        given = config.get(name)
        if given is not None and given != value:
            raise UnsupportedModelError(
                f"{architecture} with {name}={given!r} is not supported (only {value!r})"
            )


def eos_ids(config: Mapping[str, Any], extra: tuple[int, ...] = ()) -> tuple[int, ...]:
    """eos_token_id as a tuple (it may be one id, a list or absent), plus ``extra``."""
    value = config.get("eos_token_id")
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys([*(int(i) for i in ids), *extra]))


def rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base: ``rope_theta``, or inside ``rope_parameters`` in newer files."""
    nested = config.get("rope_parameters") or {}
    kind = nested.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedModelError(f"rope_type={kind!r} is not supported (only 'default')")
    return float(config.get("rope_theta") or nested.get("rope_theta") or 10000.0)
