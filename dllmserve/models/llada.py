"""LLaDA (ML-GSAI): Llama-like layers without a causal mask. Covers LLaDA-8B and 1.5.

Source of the fields and tensor names: configuration_llada.py and modeling_llada.py of
the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.modules import Attention, Build, Embedding, Head, Mlp, RMSNorm
from dllmserve.models.config import eos_ids, need, refuse, rope_theta
from dllmserve.models.decoder import Block, Decoder

_ONLY = {
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "rope": True,
    "rope_full_precision": True,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "include_bias": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "alibi": False,
    "clip_qkv": None,
}
#: transformers' names of fields, which files that other programs wrote may have instead
_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}


class Llada(Decoder):
    """LLaDAModel of modeling_llada.py, with the names of its weights."""

    name = "LLaDAModelLM"

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        at = build.inside("model.transformer")
        self.embedding = Embedding(at, "wte")
        self.blocks = [_block(at.inside(f"blocks.{i}"), i) for i in range(self.spec.num_layers)]
        self.norm = RMSNorm(at, "ln_f")
        self.head = Head(at, "ff_out", self.embedding)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a LLaDA config.json."""
        renamed = {own: config[name] for name, own in _NAMES.items() if name in config}
        config = {**renamed, **config}
        refuse(config, cls.name, _ONLY)
        width = int(need(config, "d_model", cls.name))
        heads = int(need(config, "n_heads", cls.name))
        if width % heads:
            raise UnsupportedModelError(f"d_model={width} is not a multiple of n_heads={heads}")
        vocab = int(need(config, "vocab_size", cls.name))
        return ModelSpec(
            architecture=cls.name,
            vocab_size=vocab,
            embedding_size=int(config.get("embedding_size") or vocab),
            hidden_size=width,
            num_layers=int(need(config, "n_layers", cls.name)),
            num_heads=heads,
            num_kv_heads=_kv_heads(config, heads),
            head_dim=width // heads,
            mlp_size=_mlp_size(config, width),
            max_model_len=int(need(config, "max_sequence_length", cls.name)),
            rope_theta=rope_theta(config),
            norm_eps=float(config.get("rms_norm_eps") or 1e-5),
            mask_id=int(need(config, "mask_token_id", cls.name)),
            eos_ids=eos_ids(config),
            qkv_bias=bool(config.get("include_qkv_bias", False)),
            tied_head=bool(config.get("weight_tying", False)),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        )


def _block(at: Build, layer: int) -> Block:
    """LLaDALlamaBlock."""
    return Block(
        RMSNorm(at, "attn_norm"),
        Attention(at, layer, q="q_proj", k="k_proj", v="v_proj", out="attn_out"),
        RMSNorm(at, "ff_norm"),
        Mlp(at, gate="ff_proj", up="up_proj", down="ff_out"),
    )


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("n_kv_heads") is not None:
        kv = int(config["n_kv_heads"])
    else:
        kv = 1 if config.get("multi_query_attention") else heads
    if kv < 1 or heads % kv:
        raise UnsupportedModelError(f"n_heads={heads} is not a multiple of n_kv_heads={kv}")
    return kv


def _mlp_size(config: Mapping[str, Any], width: int) -> int:
    if config.get("mlp_hidden_size") is not None:
        return int(config["mlp_hidden_size"])
    return int(config.get("mlp_ratio") or 4) * width
