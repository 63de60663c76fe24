"""Fast-dLLM v2 (NVIDIA): Qwen2.5's layers with a block-causal mask, logits shifted by one.

Source of the fields and names: configuration.py and modeling.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.llama import blocks, mask_id
from dllmserve.models.qwen import Qwen2


class FastDllm(Qwen2):
    """Fast_dLLM_QwenForCausalLM. Position i's hidden state predicts token i + 1."""

    name = "Fast_dLLM_QwenForCausalLM"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask; published files have no mask id, upstream's code has this one."""
        return {
            **blocks(config, 32, ("bd_size", "block_size")),
            "mask_id": mask_id(config, 151665),
            "logit_shift": 1,
            "qkv_bias": True,
        }
