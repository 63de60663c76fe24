"""LLaDA2.0 and 2.1 (inclusionAI): a mixture of experts with a block-causal mask.

Source of the fields and names: modeling_llada2_moe.py of the public checkpoints. As there, the
router always computes in float32, scores are sigmoids, its bias decides the choice alone, and the
weights of a token's experts are normalised, whatever ``router_dtype``,
``moe_router_enable_expert_bias`` and ``norm_topk_prob`` say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.experts import Experts
from dllmserve.layers.modules import Attention, Build
from dllmserve.models.config import expert_spec, need
from dllmserve.models.llama import LlamaLike, blocks, ends, mask_id

#: ids that the published config.json files lack
MASK_ID, END_ID = 156895, 156892
#: fields of LLaDA2.2, whose router chooses experts for a block, and whose edits move tokens
_LATER = ("expert_capacity", "delete_token_id", "split_token_id")


class Llada2(LlamaLike):
    """LLaDA2MoeModelLM."""

    name = "LLaDA2MoeModelLM"
    only: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "norm_head": False,
        "norm_softmax": False,
        "score_function": "sigmoid",
        "use_rmsnorm": True,
        "using_split_qkv_in_self_attention": False,
    }
    embedding_name = "word_embeddings"
    partial_rotary = True

    def _attention(self, at: Build, layer: int) -> Attention:
        """LLaDA2MoeAttention: q, k and v are rows of one matrix."""
        norms = ("query_layernorm", "key_layernorm") if self.spec.head_norms else None
        inside = at.inside("attention")
        return Attention(inside, layer, packed="query_key_value", out="dense", norms=norms)

    def _experts(self, at: Build, experts: ExpertSpec) -> Experts:
        """LLaDA2MoeSparseMoeBlock."""
        return Experts(at, experts, bias="mlp.gate.expert_bias", shared="mlp.shared_experts")

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Block, mask, ends, biases, norms and experts."""
        for field in _LATER:
            if config.get(field) is not None:
                raise UnsupportedModelError(
                    f"{cls.name} with {field}={config[field]!r} is not supported: LLaDA2.0 and 2.1 "
                    "run, LLaDA2.2's choice of experts for a block and its edits that move tokens "
                    "do not"
                )
        layers = int(need(config, "num_hidden_layers", cls.name))
        dense = int(config.get("first_k_dense_replace") or 0)
        size = int(need(config, "moe_intermediate_size", cls.name))
        each = int(need(config, "num_experts_per_tok", cls.name))
        groups = int(config.get("n_group") or 1)
        experts = expert_spec(
            layers=tuple(i >= dense for i in range(layers)),
            count=int(need(config, "num_experts", cls.name)),
            per_token=each,
            size=size,
            shared_size=size * int(config.get("num_shared_experts") or 0),
            score="sigmoid",
            normalize=each > 1,
            scale=float(config.get("routed_scaling_factor") or 1.0),
            bias="choice",
            groups=groups,
            top_groups=int(config.get("topk_group") or groups),
        )
        return {
            **blocks(config, 32),
            "mask_id": mask_id(config, MASK_ID),
            "eos_ids": ends(config, END_ID),
            "qkv_bias": bool(config.get("use_qkv_bias", False)),
            "out_bias": bool(config.get("use_bias", False)),
            "head_norms": bool(config.get("use_qk_norm", True)),
            "experts": experts,
        }
