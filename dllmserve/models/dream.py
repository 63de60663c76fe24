"""Dream (DreamLM): Qwen2 layers without a causal mask, logits shifted by one.

Position i's hidden state predicts token i + 1, as in the autoregressive model that Dream
was adapted from. Source of the fields and names: configuration_dream.py and
modeling_dream.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.modules import Attention, Build, Embedding, Head, Mlp, RMSNorm
from dllmserve.models.config import eos_ids, need, refuse, rope_theta
from dllmserve.models.decoder import Block, Decoder


class Dream(Decoder):
    """DreamModel of modeling_dream.py, with the names of its weights (Qwen2's)."""

    name = "DreamModel"

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        at = build.inside("model")
        self.embedding = Embedding(at, "embed_tokens")
        self.blocks = [_block(at.inside(f"layers.{i}"), i) for i in range(self.spec.num_layers)]
        self.norm = RMSNorm(at, "norm")
        self.head = Head(build, "lm_head", self.embedding)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a Dream config.json."""
        refuse(config, cls.name, {"hidden_act": "silu"})
        _refuse_window(config)
        width = int(need(config, "hidden_size", cls.name))
        heads = int(need(config, "num_attention_heads", cls.name))
        kv = int(config.get("num_key_value_heads") or heads)
        if heads % kv:
            raise UnsupportedModelError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv}"
            )
        head_dim = config.get("head_dim")
        if head_dim is None and width % heads:
            raise UnsupportedModelError(
                f"hidden_size={width} is not a multiple of num_attention_heads={heads}"
            )
        vocab = int(need(config, "vocab_size", cls.name))
        return ModelSpec(
            architecture=cls.name,
            vocab_size=vocab,
            embedding_size=vocab,
            hidden_size=width,
            num_layers=int(need(config, "num_hidden_layers", cls.name)),
            num_heads=heads,
            num_kv_heads=kv,
            head_dim=int(head_dim or width // heads),
            mlp_size=int(need(config, "intermediate_size", cls.name)),
            max_model_len=int(need(config, "max_position_embeddings", cls.name)),
            rope_theta=rope_theta(config),
            norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            mask_id=int(need(config, "mask_token_id", cls.name)),
            eos_ids=eos_ids(config),
            logit_shift=1,
            qkv_bias=True,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        )


def _block(at: Build, layer: int) -> Block:
    """DreamDecoderLayer."""
    attention, mlp = at.inside("self_attn"), at.inside("mlp")
    return Block(
        RMSNorm(at, "input_layernorm"),
        Attention(attention, layer, q="q_proj", k="k_proj", v="v_proj", out="o_proj"),
        RMSNorm(at, "post_attention_layernorm"),
        Mlp(mlp, gate="gate_proj", up="up_proj", down="down_proj"),
    )


def _refuse_window(config: Mapping[str, Any]) -> None:
    """Raise if any position would not see all others; a window may be switched on and be none."""
    if not config.get("use_sliding_window"):
        return
    window, first = config.get("sliding_window"), config.get("max_window_layers")
    if "sliding_window" in config and window is None:
        return
    if first is not None and int(first) >= int(need(config, "num_hidden_layers", "DreamModel")):
        return  # it begins behind the last layer
    if window is None or int(window) < int(need(config, "max_position_embeddings", "DreamModel")):
        raise UnsupportedModelError(
            f"DreamModel with use_sliding_window and sliding_window={window} is not supported"
        )
