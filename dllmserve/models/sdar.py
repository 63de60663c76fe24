"""SDAR (JetAstra): Qwen3's layers with a block-causal mask. TraDo and TraceRL are the same.

Source of the fields and names: modeling_sdar.py and modeling_sdar_moe.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.llama import blocks, mask_id
from dllmserve.models.qwen import Qwen3, Qwen3Moe


class Sdar(Qwen3):
    """SDARForCausalLM. Its logits are those of the position itself."""

    name = "SDARForCausalLM"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask; those of the published checkpoints where config.json has none."""
        return _traits(config)


class SdarMoe(Qwen3Moe):
    """SDARMoeForCausalLM: the same, with experts."""

    name = "SDARMoeForCausalLM"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of SDAR, and experts."""
        return {**super().traits(config), **_traits(config)}


def _traits(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**blocks(config, 4), "mask_id": mask_id(config, 151669), "logit_shift": 0}
