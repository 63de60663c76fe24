"""Stable-DiffCoder (ByteDance Seed): Llama's layers with a block-causal mask.

Source of the fields and names: modeling code of the public checkpoints, a subclass of
transformers' LlamaForCausalLM whose ``generate`` has the block length and the mask id as defaults.
It cuts the last block where the answer ends, and shares out the masks of each block over the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.llama import LLAMA_ONLY, LlamaLike, blocks, mask_id


class StableDiffcoder(LlamaLike):
    """StableDiffcoderForCausalLM. Its logits are those of the position itself."""

    name = "StableDiffcoderForCausalLM"
    only = LLAMA_ONLY

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask, which published files do not name."""
        return {**blocks(config, 4), "short_blocks": True, "mask_id": mask_id(config, 5)}
