"""LLaDA-MoE (inclusionAI): a mixture of experts without a causal mask.

Its model_type is LLaDA's, so its architecture tells them apart. Source of the fields and names:
modeling_lladamoe.py of the public checkpoints. As there, scores are softmaxes, weights are not
normalised, a bias of the scores is also in the weights, and heads are as wide as hidden size over
their number, whatever ``moe_router_score_function``, ``routed_scaling_factor``,
``router_num_group``, ``norm_topk_prob`` and ``head_dim`` say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dllmserve.core.model_spec import ExpertSpec, ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.experts import Experts
from dllmserve.layers.modules import Build
from dllmserve.models.config import expert_spec, need
from dllmserve.models.llada2 import END_ID, MASK_ID
from dllmserve.models.llama import LlamaLike, ends, mask_id


class LladaMoe(LlamaLike):
    """LLaDAMoEModelLM."""

    name = "LLaDAMoEModelLM"
    only: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "clip_qkv": None,
    }
    partial_rotary = True

    def _experts(self, at: Build, experts: ExpertSpec) -> Experts:
        """LLaDAMoESparseMoeBlock; the shared expert is the layer's."""
        return Experts(at, experts, bias="mlp.expert_bias", shared="shared_expert")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a LLaDA-MoE config.json."""
        size = config.get("dense_intermediate_size")
        if size is None:  # which a model without a dense layer need not have
            experts = all(_layers(config))
            other = "expert_intermediate_size" if experts else "dense_intermediate_size"
            size = need(config, other, cls.name)
        return super().read({**config, "head_dim": None, "intermediate_size": size})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Mask, ends, norms and experts."""
        bias = config.get("moe_router_enable_expert_bias")
        experts = expert_spec(
            layers=_layers(config),
            count=int(need(config, "num_experts", cls.name)),
            per_token=int(need(config, "num_experts_per_tok", cls.name)),
            size=int(need(config, "expert_intermediate_size", cls.name)),
            shared_size=int(config.get("shared_expert_intermediate_size") or 0),
            bias="weights" if bias else "",
        )
        return {
            "mask_id": mask_id(config, MASK_ID),
            "eos_ids": ends(config, END_ID),
            "head_norms": bool(config.get("qk_layernorm", False)),
            "experts": experts,
        }


def _layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers have experts."""
    count = int(need(config, "num_hidden_layers", LladaMoe.name))
    given = need(config, "moe_layer_freq", LladaMoe.name)
    if not isinstance(given, list) or len(given) < count:
        raise UnsupportedModelError(
            f"{LladaMoe.name} with moe_layer_freq={given!r} is not supported: it must be a list "
            f"with a number for each of the {count} layers"
        )
    return tuple(int(value) != 0 for value in given[:count])
