"""Tiny checkpoints for tests, written as config.json and safetensors.

Tensor names come from the oracles, so nothing here knows the package's own names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.models import DREAM_NAMES, LLADA_NAMES

Config = dict[str, Any]
Tensors = dict[str, Tensor]

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'error' %}{{ raise_exception('no errors') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


#: families with Llama's fields and tensor names: what their config.json also has
LIKE_LLAMA: Mapping[str, Config] = {
    "dream": {"architectures": ["DreamModel"]},
    "sdar": {"architectures": ["SDARForCausalLM"], "block_size": 4},
    "fast-dllm": {"architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 8},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "mask_token_id": None},
}
#: of these, those with biases on q, k, v, and those whose heads are normalised
BIASED, NORMALISED = ("dream", "fast-dllm"), ("sdar", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a random checkpoint."""

    family: str
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    layers: int = 2
    mlp: int = 40
    vocab: int = 61
    extra_rows: int = 0  # embedding_size - vocab_size
    mask_id: int = 60
    eos_ids: tuple[int, ...] = (59,)
    tied: bool = False
    bias: bool = False  # LLaDA only; BIASED families always have it
    max_len: int = 256
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def config(shape: Shape) -> Config:
    """config.json of the family."""
    eos = list(shape.eos_ids) if len(shape.eos_ids) > 1 else shape.eos_ids[0]
    both: Config = {
        "vocab_size": shape.vocab,
        "mask_token_id": shape.mask_id,
        "eos_token_id": eos,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    if shape.family in LIKE_LLAMA:
        assert not shape.extra_rows and not shape.bias
        return both | {
            "hidden_size": shape.width,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "num_hidden_layers": shape.layers,
            "intermediate_size": shape.mlp,
            "max_position_embeddings": shape.max_len,
            "tie_word_embeddings": shape.tied,
            **LIKE_LLAMA[shape.family],
            **({"head_dim": shape.head_dim} if shape.family in NORMALISED else {}),
        }
    return both | {
        "architectures": ["LLaDAModelLM"],
        "d_model": shape.width,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "n_layers": shape.layers,
        "mlp_hidden_size": shape.mlp,
        "embedding_size": shape.vocab + shape.extra_rows,
        "max_sequence_length": shape.max_len,
        "include_qkv_bias": shape.bias,
        "weight_tying": shape.tied,
    }


def random_tensors(shape: Shape) -> Tensors:
    """Seeded weights with well spread logits; the mask id is hardly ever the best."""
    generator = torch.Generator().manual_seed(shape.seed)
    names = DREAM_NAMES if shape.family in LIKE_LLAMA else LLADA_NAMES
    width, rows = shape.width, shape.vocab + shape.extra_rows

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    q, kv = width, shape.kv_heads * shape.head_dim
    sizes = {
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
        "gate": (shape.mlp, width),
        "up": (shape.mlp, width),
        "down": (width, shape.mlp),
    }
    tensors: Tensors = {names["embed"] + ".weight": normal(rows, width)}
    for layer in range(shape.layers):
        prefix = names["layer"].format(layer)
        for part, size in sizes.items():
            gain = 3.0 if part in "qk" else 1.0  # attention that picks
            tensors[f"{prefix}{names[part]}.weight"] = normal(*size, scale=gain / size[1] ** 0.5)
            if part in "qkv" and (shape.bias or shape.family in BIASED):
                tensors[f"{prefix}{names[part]}.bias"] = normal(size[0], scale=0.3)
        if shape.family in NORMALISED:
            for part in ("q_norm", "k_norm"):
                norm = 2 + normal(shape.head_dim, scale=0.5)
                tensors[f"{prefix}self_attn.{part}.weight"] = norm
        for part in ("attn_norm", "mlp_norm"):
            tensors[f"{prefix}{names[part]}.weight"] = 1 + normal(width, scale=0.1)
    tensors[names["final_norm"] + ".weight"] = 1 + normal(width, scale=0.1)
    if shape.tied:
        tensors[names["embed"] + ".weight"][shape.mask_id] *= 0.05
    else:
        head = normal(rows, width, scale=0.5)
        head[shape.mask_id] = 0.0
        tensors[names["head"] + ".weight"] = head
    return tensors


def constant_logits(logits: list[float]) -> tuple[Config, Tensors]:
    """A LLaDA whose masked positions all have the given logits; the last id is the mask.

    Attention and MLP add nothing, so the hidden state is the mask's normalised embedding.
    """
    shape = Shape(
        family="llada",
        heads=1,
        kv_heads=1,
        head_dim=4,
        layers=1,
        vocab=len(logits),
        mask_id=len(logits) - 1,
        eos_ids=(0,),
        max_len=1024,
    )
    tensors = {name: torch.zeros_like(t) for name, t in random_tensors(shape).items()}
    tensors[LLADA_NAMES["embed"] + ".weight"][:] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    tensors[LLADA_NAMES["final_norm"] + ".weight"][:] = 1.0
    # the normalised embedding is (2, 0, 0, 0), but for eps
    tensors[LLADA_NAMES["head"] + ".weight"][:, 0] = torch.tensor(logits) / 2
    return config(shape) | {"rms_norm_eps": 1e-12}, tensors


def write(folder: Path, settings: Mapping[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """Write a checkpoint; more than one shard gets an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({n: tensors[n] for n in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_random(folder: Path, shape: Shape, shards: int = 1) -> Path:
    """Write a random checkpoint."""
    return write(folder, config(shape), random_tensors(shape), shards)


def byte_tokenizer(folder: Path, *, chat: bool) -> None:
    """Add a byte-level tokenizer: ids 0..255 are bytes, 256 ends, 257..258 are roles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|mask|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: Config = {"eos_token": {"content": "<|end|>"}}
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_byte_model(folder: Path, family: str = "llada", max_len: int = 256) -> Path:
    """Write a random checkpoint over bytes, with a tokenizer and a chat template."""
    shape = Shape(family=family, vocab=260, mask_id=259, eos_ids=(256,), seed=9, max_len=max_len)
    write_random(folder, shape)
    byte_tokenizer(folder, chat=True)
    return folder
