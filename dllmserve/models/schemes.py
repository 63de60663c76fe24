"""What config.json says of how a checkpoint is quantized, for :mod:`dllmserve.models.quantized`.

Sources of the fields: ``QuantizationConfig`` of compressed-tensors, ``FineGrainedFP8Config`` and
``GPTQConfig`` of transformers, ``QuantizeConfig`` of GPTQModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dllmserve.models.config import quantization_settings

#: rows and columns of a matrix that share a scale; 0 for all of them
Rectangle = tuple[int, int]
READ = (
    "What is read: compressed-tensors (float-quantized, int-quantized, naive-quantized with 8 "
    "bits; pack-quantized with 4 or 8), fp8 with scales, gptq with 4 or 8 bits"
)
_TENSOR, _CHANNEL = (0, 0), (1, 0)
_BITS = (4, 8)
#: formats of compressed-tensors, and types of the numbers in each
_FORMATS: Mapping[str, tuple[str, ...]] = {
    "float-quantized": ("float",),
    "int-quantized": ("int",),
    "naive-quantized": ("float", "int"),
    "pack-quantized": ("int",),
}
_KINDS = {"float": "F8_E4M3", "int": "I8"}


class NotReadError(ValueError):
    """A format that is not read; the message says which, as the rest of a sentence."""


@dataclass(frozen=True)
class Scheme:
    """How the matrices of quantized modules are stored.

    Attributes:
        layout: "plain" (a number of eight bits each), "packed" (compressed-tensors' words) or
            "gptq".
        kinds: dtypes of matrices in the layout "plain", as safetensors calls them.
        bits: of packed numbers; a file's shapes say which of them.
        rectangles: of "plain" and "packed".
        groups: inputs that share a scale in the layout "gptq"; -1 for all.
        symmetric: there are no zero points.
        ordered: files must say which group each input is in.
        zeros_less_one: zero points are stored less one.
    """

    layout: str
    kinds: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    rectangles: tuple[Rectangle, ...] = ()
    groups: tuple[int, ...] = ()
    symmetric: bool = True
    ordered: bool = False
    zeros_less_one: bool = False


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json; None if it speaks of no quantization.

    Raises:
        NotReadError: it speaks of one that is not read.

    Example:
        >>> read_scheme({"quantization_config": {"quant_method": "gptq", "bits": 4}}).bits
        (4,)
    """
    given = quantization_settings(config)
    if not given:
        return None
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        names = ", ".join(_METHODS)
        raise NotReadError(f"quant_method is {method!r}, and none of {names}")
    return _METHODS[method](given)


def _compressed_tensors(given: Mapping[str, Any]) -> Scheme:
    form = given.get("format")
    if not isinstance(form, str) or form not in _FORMATS:
        raise NotReadError(f"format is {form!r}, and none of {', '.join(_FORMATS)}")
    sparsity = given.get("sparsity_config") or {}
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") != "dense"):
        raise NotReadError("sparsity_config says that weights are sparse")
    if given.get("transform_config"):
        raise NotReadError("transform_config says that weights are rotated")
    weights = list(_weights(given, form))
    kinds = {_KINDS[args["type"]] for args in weights}
    symmetric = {args.get("symmetric", True) is not False for args in weights}
    if len(symmetric) > 1:
        raise NotReadError("some of its config_groups have zero points, and others have none")
    return Scheme(
        layout="packed" if form == "pack-quantized" else "plain",
        kinds=tuple(sorted(kinds)),
        bits=tuple(dict.fromkeys(args["num_bits"] for args in weights)),
        rectangles=tuple(dict.fromkeys(map(_rectangle, weights))),
        symmetric=symmetric == {True},
        ordered=all(args.get("actorder") in ("group", "dynamic", True) for args in weights),
    )


def _weights(given: Mapping[str, Any], form: str) -> Iterator[dict[str, Any]]:
    """The settings of the weights of each group."""
    groups = given.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise NotReadError("config_groups is no object")
    for name, group in groups.items():
        args = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(args, dict):
            raise NotReadError(f"config_groups.{name} quantizes no weights")
        if (group.get("format") or form) != form:
            raise NotReadError(
                f"config_groups.{name} has the format {group['format']!r}, not {form!r}"
            )
        kind, bits = str(args.get("type", "int")).lower(), args.get("num_bits", 8)
        args = {**args, "type": kind, "num_bits": bits}
        allowed = _BITS if form == "pack-quantized" else (8,)
        if kind not in _FORMATS[form] or not _is_one(bits, allowed):
            raise NotReadError(
                f"config_groups.{name} has weights of type {kind!r} with {bits!r} bits"
            )
        yield args
    if not groups:
        raise NotReadError("config_groups is empty")


def _rectangle(args: Mapping[str, Any]) -> Rectangle:
    """What shares a scale."""
    size = args.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = args.get("strategy") or inferred
    if strategy == "block":
        return _block(args.get("block_structure"), "block_structure")
    if strategy == "group":
        return 1, _positive(size, "group_size")
    if strategy not in ("tensor", "channel"):
        raise NotReadError(f"strategy is {strategy!r}, and none of tensor, channel, group, block")
    return _CHANNEL if strategy == "channel" else _TENSOR


def _fp8(given: Mapping[str, Any]) -> Scheme:
    form = given.get("fmt", "e4m3")
    if form != "e4m3":
        raise NotReadError(f"fmt is {form!r}, and not 'e4m3'")
    block = given.get("weight_block_size")
    shapes = (_TENSOR, _CHANNEL) if block is None else (_block(block, "weight_block_size"),)
    return Scheme(layout="plain", kinds=("F8_E4M3",), rectangles=shapes)


def _gptq(given: Mapping[str, Any]) -> Scheme:
    form = given.get("checkpoint_format") or given.get("format") or "gptq"
    if given.get("is_marlin_format"):
        form = "marlin"
    if form not in ("gptq", "gptq_v2"):
        raise NotReadError(f"checkpoint_format is {form!r}, and none of gptq, gptq_v2")
    if given.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise NotReadError(f"pack_dtype is {given['pack_dtype']!r}, and not 'int32'")
    # settings of some modules, by expressions that their names match
    some = given.get("dynamic") or {}
    if not isinstance(some, dict):
        raise NotReadError("dynamic is no object")
    each = [given, *(s for s in some.values() if isinstance(s, dict))]
    bits = [s.get("bits", given.get("bits")) for s in each]
    for number in bits:
        if not _is_one(number, _BITS):
            raise NotReadError(f"bits is {number!r}, and none of 4, 8")
    sizes = [s.get("group_size", given.get("group_size", -1)) for s in each]
    return Scheme(
        layout="gptq",
        bits=tuple(dict.fromkeys(bits)),
        groups=tuple(dict.fromkeys(s if s == -1 else _positive(s, "group_size") for s in sizes)),
        symmetric=False,
        ordered=all(s.get("desc_act", given.get("desc_act")) for s in each),
        zeros_less_one=form == "gptq",
    )


def _is_one(value: object, allowed: tuple[int, ...]) -> bool:
    return isinstance(value, int) and value in allowed


def _positive(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise NotReadError(f"{name} is {value!r}, and not over 0")
    return value


def _block(value: object, name: str) -> Rectangle:
    """Rows and columns; older files of compressed-tensors have them as "128x128"."""
    parts = value.split("x") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise NotReadError(f"{name} is {value!r}, and not two numbers")
    rows, columns = (int(n) if isinstance(n, str) and n.isdigit() else n for n in parts)
    return _positive(rows, name), _positive(columns, name)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
}
