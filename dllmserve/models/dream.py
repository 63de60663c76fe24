"""Dream (DreamLM): Qwen2 layers without a causal mask, logits shifted by one. DreamReasoner.

Position i's hidden state predicts token i + 1, as in the autoregressive model that Dream
was adapted from. Source of the fields and names: configuration_dream.py and
modeling_dream.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.config import need
from dllmserve.models.llama import LlamaLike, blocks
from dllmserve.models.qwen import Qwen3


class Dream(LlamaLike):
    """DreamModel of modeling_dream.py; its weights have Qwen2's names."""

    name = "DreamModel"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mask, and what it has of Qwen2."""
        mask_id = int(need(config, "mask_token_id", cls.name))
        return {"mask_id": mask_id, "logit_shift": 1, "qkv_bias": True}


class DreamReasoner(Qwen3):
    """DreamForCausalLM, of Qwen3's layers with a block-causal mask; its logits are not shifted."""

    name = "DreamForCausalLM"
    default_head_dim = None

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask."""
        return {**blocks(config, 32), "mask_id": int(need(config, "mask_token_id", cls.name))}
