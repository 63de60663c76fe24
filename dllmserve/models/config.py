"""Reading config.json: fields that must be there, options that are refused, ids, angles, ..."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dllmserve.core.model_spec import ExpertSpec, RopeScaling
from dllmserve.errors import UnsupportedModelError

#: where a mask id that the engine's options give is put, and looked for first
MASK_FIELD = "mask_token_id"


def need(config: Mapping[str, Any], name: str, architecture: str) -> Any:
    """``config[name]``, or an error that names the missing field."""
    if config.get(name) is None:
        way_out = ": give mask_id (--mask-id)" if name == MASK_FIELD else ""
        raise UnsupportedModelError(
            f"config.json of {architecture} lacks the field {name!r}{way_out}"
        )
    return config[name]


def one_of(config: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The first of these fields that is there, for what checkpoints call by several names."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def refuse(config: Mapping[str, Any], architecture: str, allowed: Mapping[str, Any]) -> None:
    """Raise unless every option in ``allowed`` has its allowed value or is absent."""
    for name, value in allowed.items():
        given = config.get(name)
        if given == "swish":
            given = "silu"  # two names of one function
        if given is not None and given != value:
            raise UnsupportedModelError(
                f"{architecture} with {name}={given!r} is not supported (only {value!r})"
            )


def eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """eos_token_id as a tuple (it may be one id, a list or absent).

    Those of the tokenizer and its chat template come later: see :mod:`dllmserve.engine.tokenizer`.
    """
    value = config.get("eos_token_id")
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise TypeError(f"eos_token_id must be a token id, a list of them or null, got {value!r}")
    return tuple(dict.fromkeys(ids))


def rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base of a model whose angles nothing else changes; see :func:`rope`.

    Raises:
        UnsupportedModelError: ``rope_scaling`` or ``rope_parameters`` would change angles.
    """
    theta, scaling = rope(config)
    if scaling is not None:
        raise UnsupportedModelError(
            f"rope_scaling or rope_parameters with rope_type={scaling.kind!r} is not supported "
            f"(only 'default', or a factor of 1 that changes nothing), got {scaling!r}"
        )
    return theta


def rope(config: Mapping[str, Any], *, partial: bool = False) -> tuple[float, RopeScaling | None]:
    """The rotary base, and what else angles depend on.

    Files of transformers 4 have ``rope_theta`` and ``rope_scaling``, those of transformers 5
    ``rope_parameters`` with the base inside.

    Args:
        config: the file.
        partial: some dimensions alone may be rotated, see :func:`rotary_dim`.

    Raises:
        UnsupportedModelError: angles that no layer here computes.
    """
    field, inner = "rope_scaling", None
    given: Mapping[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name) or {}
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be an object or null, got {value!r}")
        if value:
            field, given, inner = name, value, value.get("rope_theta") or inner
    parts = (config.get("partial_rotary_factor"), given.get("partial_rotary_factor"))
    for part in () if partial else parts:
        if (part or 1) != 1:
            raise UnsupportedModelError(
                f"{field}: partial_rotary_factor={part} is not supported (only 1)"
            )
    theta = float(config.get("rope_theta") or inner or 10000.0)
    return theta, _scaling(field, given, config, theta)


def rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """So many first dimensions of each head are rotated: those of ``partial_rotary_factor``."""
    inside = config.get("rope_parameters") or {}
    factor = one_of({**inside, **config}, ("partial_rotary_factor",), 1.0)
    if not 0 < factor <= 1 or int(head_dim * factor) == 0:
        raise UnsupportedModelError(
            f"partial_rotary_factor={factor} is not supported: it must be over 0 and at most 1, "
            f"and rotate some of the {head_dim} dimensions of a head"
        )
    return int(head_dim * factor)


def expert_spec(**fields: Any) -> ExpertSpec:
    """An ExpertSpec whose numbers fit each other.

    Raises:
        UnsupportedModelError: they do not.
    """
    spec = ExpertSpec(**fields)
    in_group = spec.count // max(spec.groups, 1)
    if not (
        spec.size > 0
        and spec.shared_size >= 0
        and 0 < spec.top_groups <= spec.groups
        and spec.count == in_group * spec.groups
        and (spec.groups == spec.top_groups or in_group > 1)
        and 0 < spec.per_token <= in_group * spec.top_groups
    ):
        raise UnsupportedModelError(
            f"config.json: {spec.per_token} of {spec.count} experts of size {spec.size}, chosen in "
            f"{spec.top_groups} of {spec.groups} groups, cannot be: groups must be equal and have "
            "two experts each, and the groups chosen must have as many as a token takes"
        )
    if "capacity" in fields and not spec.per_token <= spec.capacity <= spec.count:
        raise UnsupportedModelError(
            f"config.json: expert_capacity={spec.capacity} must be at least the {spec.per_token} "
            f"experts of a token and at most all {spec.count}"
        )
    return spec


def _scaling(
    field: str, given: Mapping[str, Any], config: Mapping[str, Any], theta: float
) -> RopeScaling | None:
    """None if all angles stay as they are."""
    kind = given.get("rope_type") or given.get("type") or "default"
    longest = config.get("max_position_embeddings") or config.get("max_sequence_length") or 0
    name = "original_max_position_embeddings"
    original = config.get(name) or given.get(name)
    length, factor = original or longest, given.get("factor")
    if kind == "yarn" and factor is None and original:
        factor = longest / original
    low, high = given.get("low_freq_factor") or 0, given.get("high_freq_factor") or 0
    if kind == "yarn":
        low, high = given.get("beta_slow") or 1, given.get("beta_fast") or 32
    runs = {
        "default": not any(isinstance(value, dict) for value in given.values()),  # of each layer
        "linear": (factor or 0) > 0,
        "llama3": factor == 1 or ((factor or 0) > 0 and 0 < low < high and length > 0),
        "yarn": (factor or 0) > 0 and length > 0 and theta > 1,
        "dynamic": factor == 1 and length >= longest,  # it does nothing then
    }
    beta = float(given.get("llama_4_scaling_beta") or 0)
    if not runs.get(kind, False) or (beta and not length):
        raise UnsupportedModelError(
            f"{field} with rope_type={kind!r} is not supported (only 'default', 'linear', "
            f"'llama3' and 'yarn', each with its own fields), got {dict(given)!r}"
        )
    scaling = RopeScaling(
        kind=kind,
        factor=1.0 if kind == "default" else float(factor or 0),
        original_len=int(length),
        low=float(low),
        high=float(high),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(float(factor or 0), given) if kind == "yarn" else 1.0,
        query_beta=beta,
    )
    return None if scaling.factor == scaling.attention_factor == 1 and not beta else scaling


def _attention_factor(factor: float, given: Mapping[str, Any]) -> float:
    """YaRN's: as given, or grown with the factor."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    above, below = given.get("mscale"), given.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)


def window(config: Mapping[str, Any], architecture: str) -> None:
    """Raise if any position would not see all others; a window may be switched on and be none."""
    types = set(config.get("layer_types") or ())
    if types - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{architecture} with layer_types {', '.join(sorted(map(str, types)))} is not supported"
        )
    if not config.get("use_sliding_window") or types == {"full_attention"}:
        return
    size, first = config.get("sliding_window"), config.get("max_window_layers")
    if "sliding_window" in config and size is None:
        return
    if first is not None and int(first) >= int(need(config, "num_hidden_layers", architecture)):
        return  # it begins behind the last layer
    if size is None or int(size) < int(need(config, "max_position_embeddings", architecture)):
        raise UnsupportedModelError(
            f"{architecture} with use_sliding_window and sliding_window={size} is not supported"
        )


def quantization(config: Mapping[str, Any]) -> str | None:
    """The name of the quantization that config.json speaks of, or None."""
    given = quantization_settings(config)
    if not given:
        return None
    bits = next(_bits(given), None)
    # transformers writes quant_method; MLX has no more than bits and group_size
    mlx = given is config.get("quantization")
    name = given.get("quant_method") or ("MLX" if mlx else "unknown method")
    return f"{name}, {bits} bits" if bits is not None else str(name)


def quantization_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of quantization; empty if it says nothing."""
    for field in ("quantization_config", "quantization", "compression_config"):
        given = config.get(field)
        if isinstance(given, dict) and given:
            return given
    return {}


def _bits(settings: dict[str, Any]) -> Iterator[int]:
    if isinstance(settings.get("bits"), int):
        yield settings["bits"]
    if settings.get("load_in_4bit"):
        yield 4
    if settings.get("load_in_8bit"):
        yield 8
