"""Tiny-A2D (dllm-hub): Llama and Qwen models that were trained on without their causal mask.

Source of the fields and names: dllm/pipelines/a2d of ZHZisZZ/dllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.config import need, one_of
from dllmserve.models.llama import Llama, blocks, mask_id
from dllmserve.models.qwen import Qwen2, Qwen3


def _seen(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The geometry: with blocks where config.json has their size, as its BD3LM models need."""
    given = one_of(config, ("block_size", "block_length"), None)
    return {} if given is None else blocks(config, given)


class A2dLlama(Llama):
    """A2DLlamaLMHeadModel. Its logits are those of the position itself."""

    name = "A2DLlamaLMHeadModel"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mask, and blocks if there are any."""
        return {**_seen(config), "mask_id": int(need(config, "mask_token_id", cls.name))}


class A2dQwen2(Qwen2):
    """A2DQwen2LMHeadModel; the mask is the first id behind Qwen 2.5's own."""

    name = "A2DQwen2LMHeadModel"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mask, and blocks if there are any."""
        return {**_seen(config), "mask_id": mask_id(config, 151665), "qkv_bias": True}


class A2dQwen3(Qwen3):
    """A2DQwen3LMHeadModel; the mask is the first id behind Qwen 3's own."""

    name = "A2DQwen3LMHeadModel"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mask, and blocks if there are any."""
        return {**_seen(config), "mask_id": mask_id(config, 151669)}
