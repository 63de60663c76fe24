"""Nemotron-Labs-Diffusion (NVIDIA): Ministral 3's layers, which are Llama's with scaled angles.

A block is filled as a whole, and everything before it has K and V of a causal mask. Source of the
fields and names: modeling_nemotron_labs_diffusion.py of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dllmserve.models.config import need
from dllmserve.models.llama import LLAMA_ONLY, LlamaLike, blocks, mask_id


class Nemotron(LlamaLike):
    """NemotronLabsDiffusionModel, earlier MinistralDiffEncoderModel."""

    name = "NemotronLabsDiffusionModel"
    only: ClassVar[Mapping[str, Any]] = {**LLAMA_ONLY, "sliding_window": None}
    inside = "encoder"
    head_name = "diffusion_head"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask; angles are always scaled, so a file must say how."""
        if not config.get("rope_scaling"):
            need(config, "rope_parameters", cls.name)
        return {
            **blocks(config, 32, ("block_size", "canvas_length")),
            "causal_context": True,
            "mask_id": mask_id(config, 100),
        }
