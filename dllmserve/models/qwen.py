"""Qwen 2, 2.5 and 3 (Alibaba): Llama's layers, with a bias on q, k, v or with norms of each head.

Source of the fields and names: modeling_qwen2.py, modeling_qwen3.py and modeling_qwen3_moe.py of
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dllmserve.models.config import expert_spec, need, one_of
from dllmserve.models.llama import CAUSAL, LlamaLike


class Qwen2(LlamaLike):
    """Qwen2ForCausalLM: Qwen 2 and 2.5, with a bias on q, k and v."""

    name = "Qwen2ForCausalLM"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of an autoregressive model."""
        return {**CAUSAL, "qkv_bias": True}


class Qwen3(LlamaLike):
    """Qwen3ForCausalLM: queries and keys are normalised in each head, before they are rotated."""

    name = "Qwen3ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_bias": False}
    head_norms = True
    default_head_dim: ClassVar[int | None] = 128

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of an autoregressive model."""
        return CAUSAL


class Qwen3Moe(Qwen3):
    """Qwen3MoeForCausalLM: Qwen3 with experts, in all layers or in some."""

    name = "Qwen3MoeForCausalLM"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of an autoregressive model, and experts."""
        # files of transformers 5 have another name
        count = one_of(config, ("num_experts", "num_local_experts"), None)
        dense = set(config.get("mlp_only_layers") or ())
        step = int(config.get("decoder_sparse_step") or 1)
        experts = expert_spec(
            layers=tuple(
                i not in dense and (i + 1) % step == 0
                for i in range(int(need(config, "num_hidden_layers", cls.name)))
            ),
            count=int(need({"num_experts": count}, "num_experts", cls.name)),
            per_token=int(need(config, "num_experts_per_tok", cls.name)),
            size=int(need(config, "moe_intermediate_size", cls.name)),
            normalize=bool(config.get("norm_topk_prob", False)),
        )
        return {**CAUSAL, "experts": experts}
