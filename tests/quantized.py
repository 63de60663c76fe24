"""Golden checkpoints written in the formats of quantized ones, beside what they stand for.

compressed-tensors writes its own formats here, and says what they stand for. The others are written
by definition, and what is read of them was compared once, equal to the last bit, with

- GPTQ: matrices that AutoGPTQ 0.7.1 packed and multiplied with the identity (``qlinear_cuda``),
- groups by "weight_g_idx": what compressed-tensors 0.9.4 packed and unpacked; 0.20 cannot any more,
- "weight_scale_inv": what transformers 5.24 dequantises where blocks divide a matrix.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.checkpoints import Config, Tensors, write

E4M3 = torch.float8_e4m3fn
#: what is left as it is
KEPT = ("wte", "embed", "mlp.gate.weight")
Writer = Callable[[Tensor], tuple[Tensors, Tensor]]


@dataclass(frozen=True)
class Format:
    """A format: quantization_config, and a matrix's tensors with what they stand for."""

    settings: Config
    write: Writer


def is_quantized(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in KEPT)


def write_both(golden: Path, folder: Path, form: Format, shards: int = 3) -> tuple[Path, Path]:
    """The checkpoint in this format, and an ordinary one of what it stands for.

    Tensors of a module lie in different shards.
    """
    settings = json.loads((golden / "config.json").read_text())
    quantized: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(golden / "model.safetensors").items():
        plain[name] = quantized[name] = tensor
        if is_quantized(name, tensor):
            parts, plain[name] = form.write(tensor)
            del quantized[name]
            module = name.removesuffix("weight")
            quantized |= {module + part: data.contiguous() for part, data in parts.items()}
    plain = {name: tensor.contiguous() for name, tensor in plain.items()}
    first = write(
        folder / "quantized", settings | {"quantization_config": form.settings}, quantized, shards
    )
    return first, write(folder / "plain", settings, plain)


def usable(scale: Tensor) -> Tensor:
    """Without zeros, of rows that hold nothing else."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def rewritten(folder: Path, edit: Callable[[Tensors], object], **changes: object) -> Path:
    """The checkpoint with other tensors in one file, and other settings of its quantization."""
    given: Tensors = {}
    for path in folder.glob("*.safetensors"):
        given |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(given)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    return write(folder, config, given)


def spread(numbers: Tensor, shape: torch.Size, size: tuple[int, int]) -> Tensor:
    """[R, C] a number for each rectangle, as a number for each element of ``shape``."""
    rows, columns = numbers.repeat_interleave(size[0], 0), size[1]
    return rows.repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def extremes(matrix: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each rectangle, and zero: [R, C] each."""
    height, width = size
    above = [block.split(width, 1) for block in matrix.split(height, 0)]
    low = torch.tensor([[float(b.min().clamp(max=0)) for b in row] for row in above])
    high = torch.tensor([[float(b.max().clamp(min=0)) for b in row] for row in above])
    return low, high


def rectangle(args: QuantizationArgs, matrix: Tensor) -> tuple[int, int]:
    if args.strategy == "block":
        assert args.block_structure is not None
        return args.block_structure[0], args.block_structure[1]
    rows, columns = matrix.shape
    sizes = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size)}
    return sizes[str(args.strategy)]


def by_library(form: str, dtype: torch.dtype = torch.float32, **settings: object) -> Format:
    """A format of compressed-tensors, written and read by it."""
    args = QuantizationArgs.model_validate(settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    whole = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["embed"])
    compressor = BaseCompressor.get_value_from_registry(form)
    most = 448.0 if args.type == "float" else 2.0 ** (args.num_bits - 1) - 1

    def write(matrix: Tensor) -> tuple[Tensors, Tensor]:
        low, high = extremes(matrix, rectangle(args, matrix))
        scale = usable(torch.maximum(high, -low) / most).to(dtype)
        given = {"weight": matrix.to(dtype)}
        if not args.symmetric:
            scale = usable((high - low) / (2 * most + 1)).to(dtype)
            zero = (-1 - most - low / scale).round().clamp(-1 - most, most)
            given["weight_zero_point"] = zero.to(torch.int8)
        given["weight_scale"] = scale
        if args.strategy == "tensor":
            given = {n: t if n == "weight" else t.reshape(1) for n, t in given.items()}
        parts = compressor.compress(given, scheme)
        return parts, compressor.decompress(parts, scheme)["weight"]

    return Format(json.loads(whole.model_dump_json()), write)


def by_order(bits: int, group: int) -> Format:
    """pack-quantized, whose inputs are in groups by ``weight_g_idx``."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "actorder": "group",
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

    def write(matrix: Tensor) -> tuple[Tensors, Tensor]:
        columns, most = matrix.shape[1], 2 ** (bits - 1) - 1
        order = shuffled(columns, group)
        sizes = [matrix[:, order == g].abs().amax(1) for g in range(columns // group)]
        scale = usable(torch.stack(sizes, dim=1) / most)
        numbers = (matrix / scale[:, order]).round().clamp(-most - 1, most)
        parts = {
            "weight_packed": pack_to_int32(numbers.to(torch.int8), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(matrix.shape),
            "weight_g_idx": order.to(torch.int32),
        }
        return parts, numbers * scale[:, order]

    return Format(settings, write)


def shuffled(columns: int, group: int) -> Tensor:
    """The group of each input [columns], in no order."""
    mixed = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return (torch.arange(columns) // group)[mixed]


def fp8(block: tuple[int, int] | None, name: str, **settings: object) -> Format:
    """``quant_method`` "fp8"; one scale, or one for each block."""
    given = {"quant_method": "fp8", "activation_scheme": "dynamic", **settings}
    if block is not None:
        given |= {"weight_block_size": list(block), "modules_to_not_convert": ["embed"]}

    def write(matrix: Tensor) -> tuple[Tensors, Tensor]:
        size = block or (matrix.shape[0], matrix.shape[1])
        low, high = extremes(matrix, size)
        scale = usable(torch.maximum(high, -low) / 448)
        wide = spread(scale, matrix.shape, size)
        numbers = (matrix / wide).to(E4M3)
        parts = {"weight": numbers, name: scale if block else scale[0, 0]}
        if settings.get("activation_scheme") == "static":
            parts["input_scale"] = torch.tensor(0.5)
        return parts, numbers.float() * wide

    return Format(given, write)


def packed_rows(numbers: Tensor, bits: int, *, less_one: bool = False) -> Tensor:
    """[n, m] to [n * bits / 32, m] int32: the first number of a word is in its lowest bits.

    Less one, words have a one taken from the place of each number, as GPTQModel does it.
    """
    each = 32 // bits
    words = torch.zeros(-(-numbers.shape[0] // each), numbers.shape[1], dtype=torch.int64)
    for row, number in enumerate(numbers.long() & (1 << bits) - 1):
        words[row // each] |= number << bits * (row % each)
    if less_one:
        words = words - sum(1 << bits * place for place in range(each))
    return (words & 2**32 - 1).sub(2**31).to(torch.int32) ^ -(2**31)


def gptq(bits: int, group: int, *, desc_act: bool = False, version: str = "gptq") -> Format:
    """GPTQ with zero points of its own; its scales are float16 in files."""
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": version,
        "lm_head": True,
    }

    def write(matrix: Tensor) -> tuple[Tensors, Tensor]:
        columns, most = matrix.shape[1], 2**bits - 1
        size = columns if group == -1 else group
        order = shuffled(columns, size) if desc_act else torch.arange(columns) // size
        parts = [matrix[:, order == g] for g in range(-(-columns // size))]
        low = torch.stack([part.amin(1).clamp(max=0) for part in parts])  # [groups, rows]
        high = torch.stack([part.amax(1).clamp(min=0) for part in parts])
        scale = usable(((high - low) / most).half())
        zero = (-low / scale).round().clamp(0, most)
        numbers = (matrix.T / scale[order] + zero[order]).round().clamp(0, most)  # [columns, rows]
        held = {
            "qweight": packed_rows(numbers, bits),
            "qzeros": packed_rows(zero.T, bits, less_one=version == "gptq").T,
            "scales": scale,
            "g_idx": order.to(torch.int32),
        }
        return held, (scale[order].float() * (numbers - zero[order])).T

    return Format(settings, write)


def save_by_library(golden: Path, folder: Path, form: str) -> Any:
    """Save a model of transformers with compressed-tensors; the model, as its files are read."""
    args = {"num_bits": 8, "type": "float", "strategy": "channel"}
    if form == "pack-quantized":
        args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    scheme = QuantizationScheme.model_validate(
        {
            "targets": ["Linear"],
            "weights": args,
            "input_activations": inputs if form == "float-quantized" else None,
        }
    )
    model = AutoModelForCausalLM.from_pretrained(golden, dtype=torch.float32)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    assert scheme.weights is not None
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight = module.weight.detach()
            low, high = extremes(weight, rectangle(scheme.weights, weight))
            most = 7 if form == "pack-quantized" else 448
            module.weight_scale.data.copy_(torch.maximum(high, -low) / most)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return model


_FLOAT, _INT = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
_GROUP = {"type": "int", "strategy": "group", "group_size": 16}
_FORMATS: dict[str, Callable[[], Format]] = {
    "fp8-tensor": lambda: by_library("float-quantized", strategy="tensor", **_FLOAT),
    "fp8-channel": lambda: by_library("float-quantized", strategy="channel", **_FLOAT),
    "fp8-block": lambda: by_library(
        "float-quantized", strategy="block", block_structure=[24, 40], **_FLOAT
    ),
    "fp8-weights-alone": lambda: by_library("naive-quantized", strategy="channel", **_FLOAT),
    "int8-tensor": lambda: by_library("int-quantized", strategy="tensor", **_INT),
    "int8-channel": lambda: by_library("int-quantized", strategy="channel", **_INT),
    "int8-zeros": lambda: by_library("int-quantized", strategy="channel", symmetric=False, **_INT),
    "int8-group": lambda: by_library("int-quantized", num_bits=8, symmetric=False, **_GROUP),
    "int4-group": lambda: by_library("pack-quantized", num_bits=4, **_GROUP),
    "int4-group-zeros": lambda: by_library("pack-quantized", num_bits=4, symmetric=False, **_GROUP),
    "int4-channel": lambda: by_library(
        "pack-quantized", num_bits=4, type="int", strategy="channel"
    ),
    "packed8-channel": lambda: by_library("pack-quantized", strategy="channel", **_INT),
    "packed8-zeros": lambda: by_library(
        "pack-quantized", strategy="channel", symmetric=False, **_INT
    ),
    "int4-order": lambda: by_order(4, 16),
    "block-scales": lambda: fp8((128, 128), "weight_scale_inv"),
    "small-blocks": lambda: fp8((16, 32), "weight_scale_inv"),
    "fp8-static": lambda: fp8(None, "weight_scale", activation_scheme="static"),
    "fp8-one-inverse": lambda: fp8(None, "weight_scale_inv"),
    "gptq4": lambda: gptq(4, 16),
    "gptq4-v2": lambda: gptq(4, 16, version="gptq_v2"),
    "gptq4-order": lambda: gptq(4, 16, desc_act=True),
    "gptq4-whole": lambda: gptq(4, -1),
    "gptq8": lambda: gptq(8, 16),
    "gptq8-v2-order": lambda: gptq(8, 16, desc_act=True, version="gptq_v2"),
}
NAMES = tuple(_FORMATS)


@cache
def formats(name: str) -> Format:
    return _FORMATS[name]()
