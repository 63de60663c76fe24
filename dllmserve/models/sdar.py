"""SDAR (JetAstra), dense: Qwen3's layers with a block-causal mask. TraDo and TraceRL are the same.

Source of the fields and names: modeling_sdar.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.models.llama import blocks, mask_id
from dllmserve.models.qwen import Qwen3


class Sdar(Qwen3):
    """SDARForCausalLM. Its logits are those of the position itself."""

    name = "SDARForCausalLM"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask; those of the published checkpoints where config.json has none."""
        return {**blocks(config, 4), "mask_id": mask_id(config, 151669)}
