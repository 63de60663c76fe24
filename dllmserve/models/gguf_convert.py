"""A GGUF file of the llama architecture becomes a directory with config.json and safetensors."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllmserve.errors import ConfigError, UnsupportedModelError, WeightsError
from dllmserve.models.gguf_file import GgufFile, llama_name, unpermuted
from dllmserve.models.gguf_tokenizer import tokenizer_files
from dllmserve.models.llama import Llama

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
#: bytes of one file of weights
_MOST = 4_000_000_000
_FREQUENCIES = "rope_freqs.weight"


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    most: int = _MOST,
) -> str:
    """Write a GGUF file's model as a checkpoint; one tensor is in memory at a time.

    Args:
        source: the file.
        target: the directory, which must not exist or be empty.
        dtype: of the weights: float16, bfloat16, float32; None for float16 if the file is
            quantized, and for its own otherwise.
        force: a checkpoint that is there is replaced.
        report: told how many tensors of how many are written.
        most: bytes of tensors in one file.

    Returns:
        The dtype that was written.

    Raises:
        ConfigError: a wrong dtype, a directory that is in use.
        UnsupportedModelError, WeightsError, TokenizerError: see :class:`GgufFile`.

    Example:
        >>> convert(Path("model-q4.gguf"), Path("model"))
        'float16'
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_target(target, force)
    file = GgufFile(source)
    dtype = dtype or _own_dtype(file)
    config = _config(file, dtype)
    names = _names(file, config)
    tokenizer, tokenizer_config = tokenizer_files(file.fields)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as place:
        folder = Path(place) / "new"
        folder.mkdir()
        _write_weights(file, folder, names, config, report, most)
        _write_json(folder / "config.json", config)
        ends = {k: v for k, v in config.items() if k.endswith("_token_id")}
        _write_json(folder / "generation_config.json", ends | _ends(file))
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
        if force and target.exists():
            os.replace(target, Path(place) / "old")
        os.replace(folder, target)
    return dtype


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is no directory")
    if not any(target.iterdir()):
        return
    if not force:
        raise ConfigError(f"{target} is not empty; --force replaces a checkpoint")
    if not (target / "config.json").is_file():
        raise ConfigError(f"{target} holds no config.json: what is no checkpoint is not replaced")


def _own_dtype(file: GgufFile) -> str:
    kinds = file.kinds()
    plain = {"F32": "float32", "BF16": "bfloat16"}
    return plain.get(next(iter(kinds)), "float16") if len(kinds) == 1 else "float16"


def _short(value: float) -> float:
    """The shortest number that is the same in float32, which GGUF has: 1e-05."""
    return float(str(np.float32(value)))


def _config(file: GgufFile, dtype: str) -> dict[str, Any]:
    """The config.json."""
    if int(file.fields.get("llama.expert_count") or 0):
        raise UnsupportedModelError(f"{file.path} has experts; dense llama models are read")
    if "token_embd.weight" not in file.names:
        raise WeightsError(f"{file.path} has no tensor token_embd.weight")
    heads = int(file.need("llama.attention.head_count"))
    width = int(file.need("llama.embedding_length"))
    head_dim = int(file.fields.get("llama.attention.key_length") or width // heads)
    rotated = int(file.fields.get("llama.rope.dimension_count") or head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(f"{file.path} rotates {rotated} of {head_dim} dimensions")
    ids = {
        f"{short}_token_id": file.fields.get(f"tokenizer.ggml.{name}_token_id")
        for short, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    theta = _short(file.fields.get("llama.rope.freq_base") or 10000.0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": int(file.need("llama.feed_forward_length")),
        "num_hidden_layers": int(file.need("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.fields.get("llama.attention.head_count_kv") or heads),
        "head_dim": head_dim,
        "vocab_size": file.shape("token_embd.weight")[0],
        "max_position_embeddings": int(file.need("llama.context_length")),
        "rms_norm_eps": _short(file.need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, head_dim, theta),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.names,
        "torch_dtype": dtype,
        **{name: number for name, number in ids.items() if number is not None},
    }
    Llama.read(config)  # what cannot be run is said before anything is written
    return config


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = file.fields.get("llama.rope.scaling.type") or "none"
    if kind == "linear":
        factor = _short(file.need("llama.rope.scaling.factor"))
        return {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise UnsupportedModelError(f"{file.path}: rope scaling {kind!r}; 'linear' is read")
    if _FREQUENCIES not in file.names:
        return None
    given = file.tensor(_FREQUENCIES)
    scaling = {
        "rope_type": "llama3",
        "factor": _short(float(given.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = _llama3(scaling["factor"], head_dim, theta)
    if given.shape != wanted.shape or not torch.allclose(given, wanted, rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path}: {_FREQUENCIES} is not Llama 3's (factors 1 and 4, 8192 positions)"
        )
    return scaling


def _llama3(factor: Any, head_dim: int, theta: float) -> Tensor:
    """What Llama 3 divides its frequencies by: [head_dim / 2]."""
    lengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((8192 / lengths - 1) / 3).clamp(0, 1)
    found: Tensor = (1 / ((1 - smooth) / factor + smooth)).float()
    return found


def _ends(file: GgufFile) -> dict[str, Any]:
    """The end ids, a turn's end among them."""
    ids = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    found = list(dict.fromkeys(number for number in ids if number is not None))
    return {"eos_token_id": found if len(found) > 1 else found[0]} if found else {}


def _names(file: GgufFile, config: Mapping[str, Any]) -> dict[str, str]:
    """Names in the checkpoint, by those in the file."""
    names = dict[str, str]()
    for name in file.names:
        if name == _FREQUENCIES:
            continue
        found = llama_name(name)
        if found is None:
            raise UnsupportedModelError(f"{file.path}: {name} is no tensor of Llama's layers")
        names[name] = found
    inside = range(config["num_hidden_layers"])
    parts = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
    needed = {f"blk.{i}.{part}.weight" for i in inside for part in parts} | {"output_norm.weight"}
    if absent := sorted(needed - {*names}):
        raise WeightsError(f"{file.path} has no tensor {absent[0]} ({len(absent)} are missing)")
    return names


def _rows(file: GgufFile, name: str, config: Mapping[str, Any]) -> Tensor:
    """A tensor with its rows in transformers' order, in the checkpoint's dtype."""
    tensor = file.tensor(name)
    heads = {".attn_q.": "num_attention_heads", ".attn_k.": "num_key_value_heads"}
    for part, count in heads.items():
        if part in name:
            if len(tensor) != config[count] * config["head_dim"]:
                raise WeightsError(f"{file.path}: {name} has {len(tensor)} rows, not {count} heads")
            tensor = unpermuted(tensor, config[count])
    found: Tensor = tensor.to(getattr(torch, config["torch_dtype"])).contiguous()
    if not found.isfinite().all():
        raise WeightsError(
            f"{file.path}: {name} has numbers that {config['torch_dtype']} does not hold; "
            "--dtype float32 may"
        )
    return found


def _write_weights(
    file: GgufFile,
    folder: Path,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    report: Callable[[int, int], None],
    most: int,
) -> None:
    """Files of safetensors, written from front to back, and their index if there are several."""
    size = getattr(torch, config["torch_dtype"]).itemsize
    sizes = {name: math.prod(file.shape(name)) * size for name in names}
    groups = _groups(sizes, most)
    index, done = dict[str, str](), 0
    for number, group in enumerate(groups, start=1):
        part = f"model-{number:05}-of-{len(groups):05}.safetensors"
        part = part if len(groups) > 1 else "model.safetensors"
        with (folder / part).open("wb") as out:
            out.write(_header(file, group, names, sizes, DTYPES[config["torch_dtype"]]))
            for name in group:
                out.write(_rows(file, name, config).view(torch.uint8).numpy().data)
                index[names[name]] = part
                done += 1
                report(done, len(names))
    if len(groups) > 1:
        total = {"total_size": sum(sizes.values())}
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index}
        )


def _groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    groups, room = list[list[str]](), 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def _header(
    file: GgufFile,
    group: Iterable[str],
    names: Mapping[str, str],
    sizes: Mapping[str, int],
    kind: str,
) -> bytes:
    """The length and the JSON that a file of safetensors begins with."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in group:
        where = [at, at + sizes[name]]
        entries[names[name]] = {"dtype": kind, "shape": file.shape(name), "data_offsets": where}
        at = where[1]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
