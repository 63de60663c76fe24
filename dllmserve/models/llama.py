"""Llama (Meta), and the layers, config fields and tensor names that many models have of it.

Source of the fields and names: configuration_llama.py and modeling_llama.py of transformers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from dllmserve.core.model_spec import NO_MASK, ExpertSpec, ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.experts import Experts
from dllmserve.layers.modules import Attention, Build, Embedding, Head, Mlp, RMSNorm
from dllmserve.models.config import eos_ids, need, one_of, refuse, rope, rotary_dim, window
from dllmserve.models.decoder import Block, Decoder

#: traits of an autoregressive model
CAUSAL: Mapping[str, Any] = {
    "geometry": "causal",
    "block_length": 1,
    "mask_id": NO_MASK,
    "logit_shift": 1,
}


def blocks(
    config: Mapping[str, Any], default: int, names: tuple[str, ...] = ("block_size", "block_length")
) -> dict[str, Any]:
    """Traits of a block-causal model: its geometry, and the length by one of these names."""
    return {"geometry": "block", "block_length": int(one_of(config, names, default))}


def mask_id(config: Mapping[str, Any], default: int) -> int:
    """The mask id of a model whose published files lack it, or call it by either name."""
    return int(one_of(config, ("mask_token_id", "mask_id"), default))


def ends(config: Mapping[str, Any], default: int) -> tuple[int, ...]:
    """End ids of a model whose published files may lack them."""
    known = default < int(config.get("vocab_size") or 0)
    return eos_ids(config) or ((default,) if known else ())


class LlamaLike(Decoder):
    """A decoder with the layers, fields and names of Llama; a subclass says what differs.

    Attributes:
        name: the architecture.
        only: options, and the one value that is supported.
        inside, embedding_name, head_name: names of the decoder, of the embedding in it, and of the
            LM head in the checkpoint.
        head_norms: queries and keys are normalised in each head.
        partial_rotary: some dimensions of each head alone may be rotated.
        default_head_dim: where head_dim is absent; None for width over heads.
    """

    name: ClassVar[str]
    only: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu"}
    inside: ClassVar[str] = "model"
    embedding_name: ClassVar[str] = "embed_tokens"
    head_name: ClassVar[str] = "lm_head"
    head_norms: ClassVar[bool] = False
    partial_rotary: ClassVar[bool] = False
    default_head_dim: ClassVar[int | None] = None

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        at = build.inside(self.inside)
        self.embedding = Embedding(at, self.embedding_name)
        self.blocks = [
            self._block(at.inside(f"layers.{i}"), i) for i in range(self.spec.num_layers)
        ]
        self.norm = RMSNorm(at, "norm")
        self.head = Head(build, self.head_name, self.embedding)

    def _block(self, at: Build, layer: int) -> Block:
        """LlamaDecoderLayer."""
        experts = self.spec.experts
        return Block(
            RMSNorm(at, "input_layernorm"),
            self._attention(at, layer),
            RMSNorm(at, "post_attention_layernorm"),
            self._mlp(at, layer),
            pooled=bool(experts and experts.capacity and experts.layers[layer]),
        )

    def _attention(self, at: Build, layer: int) -> Attention:
        """LlamaAttention."""
        norms = ("q_norm", "k_norm") if self.spec.head_norms else None
        inside = at.inside("self_attn")
        return Attention(
            inside, layer, q="q_proj", k="k_proj", v="v_proj", out="o_proj", norms=norms
        )

    def _mlp(self, at: Build, layer: int) -> Callable[..., Tensor]:
        """LlamaMLP, or the layer's experts."""
        experts = self.spec.experts
        if experts is not None and experts.layers[layer]:
            return self._experts(at, experts)
        return Mlp(at.inside("mlp"), gate="gate_proj", up="up_proj", down="down_proj")

    def _experts(self, at: Build, experts: ExpertSpec) -> Experts:
        """A layer's experts, by their names in Qwen3's mixtures of experts."""
        return Experts(at, experts)

    @classmethod
    @abstractmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fields of the ModelSpec that are not Llama's: mask_id, geometry, ..."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a config.json with Llama's fields."""
        refuse(config, cls.name, cls.only)
        window(config, cls.name)
        width = int(need(config, "hidden_size", cls.name))
        heads = int(need(config, "num_attention_heads", cls.name))
        kv = int(config.get("num_key_value_heads") or heads)
        if heads % kv:
            raise UnsupportedModelError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv}"
            )
        head_dim = config.get("head_dim", cls.default_head_dim)
        if head_dim is None and width % heads:
            raise UnsupportedModelError(
                f"hidden_size={width} is not a multiple of num_attention_heads={heads}"
            )
        vocab = int(need(config, "vocab_size", cls.name))
        theta, scaling = rope(config, partial=cls.partial_rotary)
        head_dim = int(head_dim or width // heads)
        return ModelSpec(
            architecture=cls.name,
            vocab_size=vocab,
            embedding_size=vocab,
            hidden_size=width,
            num_layers=int(need(config, "num_hidden_layers", cls.name)),
            num_heads=heads,
            num_kv_heads=kv,
            head_dim=head_dim,
            rotary_dim=rotary_dim(config, head_dim) % head_dim if cls.partial_rotary else 0,
            mlp_size=int(need(config, "intermediate_size", cls.name)),
            max_model_len=int(need(config, "max_position_embeddings", cls.name)),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
            **{
                "eos_ids": eos_ids(config),
                "head_norms": cls.head_norms,
                **cls.traits(config),
            },
        )


#: options of models that transformers' Llama code runs
LLAMA_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class Llama(LlamaLike):
    """LlamaForCausalLM: Llama 2 and 3, and the many models that are saved as such."""

    name = "LlamaForCausalLM"
    only = LLAMA_ONLY

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of an autoregressive model."""
        return CAUSAL
