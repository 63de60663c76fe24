"""LLaDA (ML-GSAI): Llama-like layers without a causal mask. Covers LLaDA-8B and 1.5.

Source of the fields and tensor names: configuration_llada.py and modeling_llada.py of
the public checkpoints.
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
    "attn_norm": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}

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


class _Llada:
    """See :class:`dllmserve.models.base.ModelDefinition`."""

    name = "LLaDAModelLM"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Read a LLaDA config.json."""
        refuse(config, self.name, _ONLY)
        width = int(need(config, "d_model", self.name))
        heads = int(need(config, "n_heads", self.name))
        if width % heads:
            raise UnsupportedModelError(f"d_model={width} is not a multiple of n_heads={heads}")
        vocab = int(need(config, "vocab_size", self.name))
        return ModelSpec(
            architecture=self.name,
            vocab_size=vocab,
            embedding_size=int(config.get("embedding_size") or vocab),
            hidden_size=width,
            num_layers=int(need(config, "n_layers", self.name)),
            num_heads=heads,
            num_kv_heads=_kv_heads(config, heads),
            head_dim=width // heads,
            mlp_size=_mlp_size(config, width),
            max_model_len=int(need(config, "max_sequence_length", self.name)),
            rope_theta=rope_theta(config),
            norm_eps=float(config.get("rms_norm_eps") or 1e-5),
            mask_id=int(need(config, "mask_token_id", self.name)),
            eos_ids=eos_ids(config),
            pad_id=config.get("pad_token_id"),
            bos_id=config.get("bos_token_id"),
            qkv_bias=bool(config.get("include_qkv_bias", False)),
            tied_head=bool(config.get("weight_tying", False)),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        )

    def targets(self, partition: Partition) -> dict[str, Target]:
        """Tensor names of modeling_llada.py."""
        spec = partition.spec
        targets = {"model.transformer.wte.weight": table_target(partition, "embed")}
        for i in range(spec.num_layers):
            stems = {k: f"model.transformer.blocks.{i}.{v}" for k, v in _STEMS.items()}
            targets.update(layer_targets(partition, i, stems))
        targets["model.transformer.ln_f.weight"] = Target("norm", 0, (spec.hidden_size,))
        if not spec.tied_head:
            targets["model.transformer.ff_out.weight"] = table_target(partition, "head")
        return targets

    def ignored(self, name: str, spec: ModelSpec) -> bool:
        """Rotary tables, and a second copy of a tied head."""
        return "rotary_emb" in name or (
            spec.tied_head and name == "model.transformer.ff_out.weight"
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


LLADA = _Llada()
