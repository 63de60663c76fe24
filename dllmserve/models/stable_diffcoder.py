"""Stable-DiffCoder (ByteDance Seed): Llama's layers with a block-causal mask.

Source of the fields and names: modeling code of the public checkpoints, a subclass of
transformers' LlamaForCausalLM whose ``generate`` has the block length and the mask id as defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.config import one_of
from dllmserve.models.llama import LLAMA_ONLY, LlamaLike


class StableDiffcoder(LlamaLike):
    """StableDiffcoderForCausalLM. Its logits are those of the position itself."""

    name = "StableDiffcoderForCausalLM"
    only = LLAMA_ONLY

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask, which published files do not name."""
        return {
            "geometry": "block",
            "block_length": int(one_of(config, ("block_size", "block_length"), 4)),
            "mask_id": int(one_of(config, ("mask_token_id", "mask_id"), 5)),
        }
