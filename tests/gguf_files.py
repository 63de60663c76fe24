"""Small GGUF files of the llama architecture, and the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

WIDTH, HEADS, KV, MLP, LAYERS = 256, 4, 2, 256, 2
HEAD = WIDTH // HEADS
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<s>", "</s>"]
SHAPES = {
    "attn_q": (HEADS * HEAD, WIDTH),
    "attn_k": (KV * HEAD, WIDTH),
    "attn_v": (KV * HEAD, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD),
    "ffn_gate": (MLP, WIDTH),
    "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
}
FIELDS: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 2) + [3, 3],
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.bos_token_id": len(TOKENS) - 2,
    "tokenizer.ggml.eos_token_id": len(TOKENS) - 1,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def matrices(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors by their GGUF names."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in SHAPES.items()}
        shapes |= {f"blk.{layer}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes["output_norm"] = (WIDTH,)
    return {
        f"{n}.weight": (draw.standard_normal(s) * 0.1 + (len(s) == 1)).astype(np.float32)
        for n, s in shapes.items()
    }


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of a matrix in a type; random ones where the package packs none."""
    from gguf import GGMLQuantizationType, quantize

    if kind not in ("Q4_K", "Q6_K"):
        return quantize(values, GGMLQuantizationType[kind])
    size, scales = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}[kind]
    rows, width = values.shape
    draw = np.random.default_rng(width)
    blocks = draw.integers(0, 256, (rows, width // 256, size), dtype=np.uint8)
    for at in scales:
        blocks[:, :, at : at + 2] = np.array([1e-3], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(
    path: Path,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """Write a file; fields have ``__`` for dots, and None drops one. Returns its numbers."""
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize

    writer = GGUFWriter(path, architecture)
    given = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    for name, value in given.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    numbers = {}
    for name, values in (matrices() if tensors is None else tensors).items():
        as_type = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = packed(values, kind) if values.ndim > 1 else values
        numbers[name] = dequantize(data, as_type).astype(np.float32).reshape(values.shape)
        writer.add_tensor(name, data, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers
