"""Write the weights in the Hugging Face layout of Dream, in bf16 shards, with the configuration
files.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import Net, Shape
from training.tokenizer import BOS, EOS, EOT, MASK, PAD

_PARTS = {
    "wq": "self_attn.q_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "wk": "self_attn.k_proj.weight",
    "bk": "self_attn.k_proj.bias",
    "wv": "self_attn.v_proj.weight",
    "bv": "self_attn.v_proj.bias",
    "wo": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "norm1": "input_layernorm.weight",
    "norm2": "post_attention_layernorm.weight",
}
_SINGLE = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
SHARDS = 2


def tensors(net: Net) -> dict[str, Tensor]:
    """All weights under their public names, in bf16 on the CPU."""
    named = {public: getattr(net, name) for name, public in _SINGLE.items()}
    for i in range(net.shape.layers):
        named |= {
            f"model.layers.{i}.{public}": getattr(net, name)[i] for name, public in _PARTS.items()
        }
    return {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in named.items()
    }


def load(net: Net, folder: Path) -> None:
    """Read exported weights back."""
    named: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        named |= load_file(path)
    with torch.no_grad():
        for name, public in _SINGLE.items():
            getattr(net, name).copy_(named[public])
        for name, public in _PARTS.items():
            for i in range(net.shape.layers):
                getattr(net, name)[i].copy_(named[f"model.layers.{i}.{public}"])


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.longest,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def export(net: Net, folder: Path) -> None:
    """Write shards, their index, ``config.json`` and ``generation_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    named = tensors(net)
    total = sum(t.numel() * 2 for t in named.values())
    shards: list[dict[str, Tensor]] = [{}]
    for name in sorted(named):
        used = sum(t.numel() * 2 for t in shards[-1].values())
        if used >= total / SHARDS and len(shards) < SHARDS:
            shards.append({})
        shards[-1][name] = named[name]
    index: dict[str, str] = {}
    for k, shard in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    files: dict[str, object] = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index},
        "config.json": _config(net.shape),
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": [EOS, EOT],
            "pad_token_id": PAD,
            "mask_token_id": MASK,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
