"""Reading config.json: fields that must be there, options that are refused, ids, angles, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dllmserve.errors import UnsupportedModelError

#: kinds of rope_scaling that change nothing if their factor is 1
_NEUTRAL_AT_ONE = ("linear", "dynamic", "yarn", "llama3")


def need(config: Mapping[str, Any], name: str, architecture: str) -> Any:
    """``config[name]``, or an error that names the missing field."""
    if config.get(name) is None:
        raise UnsupportedModelError(f"config.json of {architecture} lacks the field {name!r}")
    return config[name]


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
    """The rotary base: ``rope_theta``, or inside ``rope_parameters`` in newer files.

    Raises:
        UnsupportedModelError: ``rope_scaling`` or ``rope_parameters`` would change angles.
    """
    inner = None
    for field in ("rope_scaling", "rope_parameters"):
        given = config.get(field) or {}
        if not isinstance(given, Mapping):
            raise TypeError(f"{field} must be an object or null, got {given!r}")
        _check_rope(field, given, config)
        inner = inner or given.get("rope_theta")
    if (config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor={config['partial_rotary_factor']} is not supported (only 1)"
        )
    return float(config.get("rope_theta") or inner or 10000.0)


def _check_rope(field: str, given: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise unless a scaling leaves all angles as they are."""
    kind = given.get("rope_type") or given.get("type") or "default"
    neutral = kind == "default" and not any(isinstance(value, dict) for value in given.values())
    if kind in _NEUTRAL_AT_ONE:
        # they stretch positions by the factor, or from a shorter length on
        longest = config.get("max_position_embeddings") or config.get("max_sequence_length") or 0
        shorter = (given.get("original_max_position_embeddings") or longest) < longest
        neutral = given.get("factor") == 1 and not (kind == "dynamic" and shorter)
        neutral = neutral and (given.get("attention_factor") or 1) == 1
    if not neutral or (given.get("partial_rotary_factor") or 1) != 1:
        raise UnsupportedModelError(
            f"{field} with rope_type={kind!r} is not supported (only 'default', or a factor of 1 "
            f"that changes nothing), got {dict(given)!r}"
        )


def quantization(config: Mapping[str, Any]) -> str | None:
    """The name of the quantization that config.json speaks of, or None."""
    for field in ("quantization_config", "quantization", "compression_config"):
        given = config.get(field)
        if not isinstance(given, dict) or not given:
            continue
        bits = next(_bits(given), None)
        # transformers writes quant_method; MLX has no more than bits and group_size
        name = given.get("quant_method") or ("MLX" if field == "quantization" else "unknown method")
        return f"{name}, {bits} bits" if bits is not None else str(name)
    return None


def _bits(settings: dict[str, Any]) -> Iterator[int]:
    if isinstance(settings.get("bits"), int):
        yield settings["bits"]
    if settings.get("load_in_4bit"):
        yield 4
    if settings.get("load_in_8bit"):
        yield 8
