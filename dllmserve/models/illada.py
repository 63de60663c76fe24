"""iLLaDA (ML-GSAI, ByteDance Seed): Llama's layers, fields and names without a causal mask.

Source of the fields and names: modeling_illada.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dllmserve.models.llama import LLAMA_ONLY, LlamaLike, mask_id


class Illada(LlamaLike):
    """ILLaDAForCausalLM. Its logits are those of the position itself."""

    name = "ILLaDAForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**LLAMA_ONLY, "layer_norm_eps": None}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mask, which published files do not name."""
        return {"mask_id": mask_id(config, 5)}
