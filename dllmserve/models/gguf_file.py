"""GGUF files of the llama architecture: what they say, and their tensors by Llama's names.

Source of the format: gguf.md of ggml, read by the package ``gguf``; of names and of the order of
rows: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllmserve._needs import missing
from dllmserve.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, WeightsError

#: tensor types that are read
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)


class GgufFile:
    """A file that is open for reading.

    Example:
        >>> GgufFile(Path("model-q4.gguf")).fields["general.architecture"]
        'llama'

    Attributes:
        path: the file.
        fields: its metadata, by name.
        names: names of its tensors.

    Raises:
        ConfigError: the package ``gguf`` is missing.
        ModelNotFoundError: there is no such file.
        UnsupportedModelError: another architecture, a part of a split file, unknown tensors.
        WeightsError: no GGUF file, or one that is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _reader(path)
        try:
            self.fields: Mapping[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        except _BROKEN as error:
            raise WeightsError(f"the metadata of {path} cannot be read: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        found = self.fields.get("general.architecture")
        if found != "llama":
            raise UnsupportedModelError(
                f"{path} is of the architecture {found!r}; GGUF files of 'llama' are read"
            )
        if (split := int(self.fields.get("split.count") or 0)) > 1:
            raise UnsupportedModelError(_split_error(path, split))
        self._check_types()
        self.names = tuple(self._tensors)

    def _check_types(self) -> None:
        for tensor in self._tensors.values():
            if tensor.tensor_type.name not in TYPES:
                raise UnsupportedModelError(
                    f"{self.path}: {tensor.name} is of the type {tensor.tensor_type.name}; these "
                    f"are read: {', '.join(TYPES)}"
                )

    def need(self, name: str) -> Any:
        """A field that must be there."""
        if self.fields.get(name) is None:
            raise UnsupportedModelError(f"{self.path} has no field {name}")
        return self.fields[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, outputs first, as torch has it."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def kinds(self) -> set[str]:
        """Types of its matrices."""
        return {t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1}

    def tensor(self, name: str) -> Tensor:
        """A tensor's numbers in float32, rows in the order of the file."""
        from gguf import dequantize

        found = self._tensors[name]
        values = dequantize(found.data, found.tensor_type)
        return torch.from_numpy(values.astype("float32")).reshape(self.shape(name))


def llama_name(name: str) -> str | None:
    """The name of a tensor in Llama's checkpoints; None for one that they do not have.

    Example:
        >>> llama_name("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
    """
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return _OUTER.get(name)
    inner = _INNER.get(match[2])
    return f"model.layers.{match[1]}.{inner}.weight" if inner else None


def unpermuted(matrix: Tensor, heads: int) -> Tensor:
    """Rows of Q or K in transformers' order: halves of a head, where GGUF has pairs.

    Args:
        matrix: [heads * head_dim, width], rows 2i and 2i + 1 of a head rotated together.
        heads: so many.

    Returns:
        The same rows; i and i + head_dim / 2 of a head are rotated together.
    """
    rows, width = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def _split_error(path: Path, count: int) -> str:
    return (
        f"{path} is one of {count} parts; merge them first (llama.cpp: llama-gguf-split --merge): "
        "one whole file is read"
    )


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(missing("converting", error.name or "gguf", "gguf")) from error
    if not path.is_file():
        raise ModelNotFoundError(f"there is no file {path}")
    if match := _SPLIT.search(path.name):
        raise UnsupportedModelError(_split_error(path, int(match[1])))
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise WeightsError(f"{path} is no GGUF file: it begins with {start!r}, not with b'GGUF'")
    try:
        return GGUFReader(path)
    except _BROKEN as error:
        raise WeightsError(
            f"{path} is cut short or broken ({error}); download it again. Tensors of these types "
            f"are read: {', '.join(TYPES)}"
        ) from error
