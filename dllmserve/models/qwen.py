"""Qwen 2, 2.5 and 3 (Alibaba): Llama's layers, with a bias on q, k, v or with norms of each head.

Source of the fields and names: modeling_qwen2.py and modeling_qwen3.py of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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
