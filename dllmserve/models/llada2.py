"""LLaDA2.0, 2.1 and 2.2 (inclusionAI): a mixture of experts with a block-causal mask.

Source of the fields and names: modeling_llada2_moe.py of the public checkpoints. As there, the
router always computes in float32, scores are sigmoids, its bias decides the choice alone, and the
weights of a token's experts are normalised, whatever ``router_dtype``,
``moe_router_enable_expert_bias`` and ``norm_topk_prob`` say.

LLaDA2.2 differs in two ways. Its router has a capacity: a block admits so many experts, those that
score best in any of its tokens, and there are no groups. And it can propose to delete a token, or
to insert one before it, which moves what follows in the block. Nothing here moves tokens, so these
two proposals are never made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.experts import Experts
from dllmserve.layers.modules import Attention, Build
from dllmserve.models.config import expert_spec, need, one_of
from dllmserve.models.llama import LlamaLike, blocks, ends, mask_id

#: ids that the published config.json files lack
MASK_ID, END_ID = 156895, 156892
#: fields of LLaDA2.2 with ids of proposals that would move tokens
_MOVING = ("delete_token_id", "split_token_id")


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
        block, mask = blocks(config, 32), mask_id(config, MASK_ID)
        return {
            **block,
            "mask_id": mask,
            "eos_ids": ends(config, END_ID),
            "never_ids": tuple(_moving_ids(config, {mask, *ends(config, END_ID)})),
            "qkv_bias": bool(config.get("use_qkv_bias", False)),
            "out_bias": bool(config.get("use_bias", False)),
            "head_norms": bool(config.get("use_qk_norm", True)),
            "experts": cls._expert_spec(config, int(block["block_length"])),
        }

    @classmethod
    def _expert_spec(cls, config: Mapping[str, Any], block: int) -> ExpertSpec:
        """Experts, and what a block of so many tokens admits of them."""
        layers = int(need(config, "num_hidden_layers", cls.name))
        dense = int(config.get("first_k_dense_replace") or 0)
        size = int(need(config, "moe_intermediate_size", cls.name))
        each = int(need(config, "num_experts_per_tok", cls.name))
        chosen: dict[str, int] = {}
        if config.get("expert_capacity") is None:
            chosen["groups"] = int(config.get("n_group") or 1)
            chosen["top_groups"] = int(config.get("topk_group") or chosen["groups"])
        else:
            chosen |= {"capacity": int(config["expert_capacity"]), "window": block}
        return expert_spec(
            layers=tuple(i >= dense for i in range(layers)),
            count=int(need(config, "num_experts", cls.name)),
            per_token=each,
            size=size,
            shared_size=size * int(config.get("num_shared_experts") or 0),
            score="sigmoid",
            normalize=each > 1,
            scale=float(one_of(config, ("routed_scaling_factor",), 1.0)),
            bias="choice",
            **chosen,
        )


def _moving_ids(config: Mapping[str, Any], taken: Collection[int]) -> Iterator[int]:
    """Ids of proposals that would move tokens."""
    vocab = int(need(config, "vocab_size", Llada2.name))
    for field in _MOVING:
        if config.get(field) is None:
            continue
        token = int(config[field])
        if token in taken or not 0 <= token < vocab:
            raise UnsupportedModelError(
                f"config.json: {field}={token} is the mask's, an end's or outside the vocabulary "
                f"0..{vocab - 1}"
            )
        yield token
