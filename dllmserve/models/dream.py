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
from dllmserve.models.base import Target, eos_ids, need, refuse, rope_theta
from dllmserve.models.decoder import layer_targets, table_target
from dllmserve.parallel.partition import Partition

_STEMS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

_ONLY = {"hidden_act": "silu"}


class _Dream:
    """See :class:`dllmserve.models.base.ModelDefinition`."""

    name = "DreamModel"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Read a Dream config.json."""
        refuse(config, self.name, _ONLY)
        _refuse_window(config)
        width = int(need(config, "hidden_size", self.name))
        heads = int(need(config, "num_attention_heads", self.name))
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
        vocab = int(need(config, "vocab_size", self.name))
        return ModelSpec(
            architecture=self.name,
            vocab_size=vocab,
            embedding_size=vocab,
            hidden_size=width,
            num_layers=int(need(config, "num_hidden_layers", self.name)),
            num_heads=heads,
            num_kv_heads=kv,
            head_dim=int(head_dim or width // heads),
            mlp_size=int(need(config, "intermediate_size", self.name)),
            max_model_len=int(need(config, "max_position_embeddings", self.name)),
            rope_theta=rope_theta(config),
            norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            mask_id=int(need(config, "mask_token_id", self.name)),
            eos_ids=eos_ids(config),
            pad_id=config.get("pad_token_id"),
            bos_id=config.get("bos_token_id"),
            logit_shift=1,
            qkv_bias=True,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        )

    def targets(self, partition: Partition) -> dict[str, Target]:
        """Tensor names of modeling_dream.py (Qwen2's)."""
        spec = partition.spec
        targets = {"model.embed_tokens.weight": table_target(partition, "embed")}
        for i in range(spec.num_layers):
            stems = {k: f"model.layers.{i}.{v}" for k, v in _STEMS.items()}
            targets.update(layer_targets(partition, i, stems))
        targets["model.norm.weight"] = Target("norm", 0, (spec.hidden_size,))
        if not spec.tied_head:
            targets["lm_head.weight"] = table_target(partition, "head")
        return targets

    def ignored(self, name: str, spec: ModelSpec) -> bool:
        """Rotary tables, and a second copy of a tied head."""
        return "rotary_emb" in name or (spec.tied_head and name == "lm_head.weight")


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


DREAM = _Dream()
