"""Nemotron-Labs-Diffusion (NVIDIA): Ministral 3's layers, which are Llama's with scaled angles.

A block is filled as a whole, and everything before it has K and V of a causal mask. Source of the
fields and names: modeling_nemotron_labs_diffusion.py of the public checkpoints.

Its ``generate`` (causal_context=True, the default) is what the engine does: a causal forward over
the prompt, whose last logits propose the first token of a block that begins behind it; forwards
over the block, which sees all of itself, and whose logits are those of the position itself; a
causal forward over the finished block, whose last logits propose the next block's first token. With
a threshold, a position is written whose confidence is at least that, and always the best one; else
the masks that the block begins with are shared out over the steps. An answer whose length is no
multiple of the block's ends in a shorter block, as in mlx-vlm; ``generate`` refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dllmserve.errors import UnsupportedModelError
from dllmserve.models.llama import LLAMA_ONLY, LlamaLike, blocks, mask_id


class Nemotron(LlamaLike):
    """NemotronLabsDiffusionModel."""

    name = "NemotronLabsDiffusionModel"
    only: ClassVar[Mapping[str, Any]] = {**LLAMA_ONLY, "sliding_window": None, "dlm_type": "llada"}
    inside = "encoder"
    head_name = "diffusion_head"

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block and mask; angles are always scaled, so a file must say how."""
        if not (config.get("rope_parameters") or config.get("rope_scaling")):
            raise UnsupportedModelError(
                f"config.json of {cls.name} lacks the field 'rope_parameters' "
                "(in files of transformers 4: 'rope_scaling')"
            )
        return {
            **blocks(config, 32, ("block_size", "canvas_length")),
            "causal_context": True,
            "short_blocks": True,
            "mask_id": mask_id(config, 100),
        }


class MinistralDiffEncoder(Nemotron):
    """The same under its earlier name."""

    name = "MinistralDiffEncoderModel"
