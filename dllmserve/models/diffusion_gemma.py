"""DiffusionGemma (Google): Gemma 4's text layers, which fill a canvas of random ids.

Source of the fields and names: configuration_diffusion_gemma.py and modeling_diffusion_gemma.py of
transformers 5.24. Text that stays, the prompt and each finished canvas, is encoded with a causal
mask; a canvas sees all of itself. Both have the same weights, but for a scalar of each layer. Text
is all that is run here: the tensors of the vision tower are left where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dllmserve.core.model_spec import NO_MASK, AttentionSpec, ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.experts import Experts
from dllmserve.layers.modules import Attention, AttentionContext, Build, Embedding, Head, Mlp, Part
from dllmserve.layers.ops import LayerOps, Sandwich
from dllmserve.models.config import eos_ids, expert_spec, need, one_of, refuse
from dllmserve.models.decoder import CanvasTokens, Decoder

_NAME = "DiffusionGemmaForBlockDiffusion"
_ALL = slice(None)
_FULL, _SLIDING = "full_attention", "sliding_attention"
#: rotary angles of files that do not say them
_ROPE: Mapping[str, Mapping[str, Any]] = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}
#: what ``per_layer_config`` may say of a layer
_OVER = frozenset({"head_dim", "num_key_value_heads"})


@dataclass(frozen=True)
class GemmaBlock:
    """A layer: attention, then an MLP and experts side by side; norms before and after each.

    Attributes:
        attention: the layer's; its input is normalised by the layer before.
        middle: norms around the addition of what attention gives.
        mlp, experts: both read the stream behind it, each by a norm of its own; so does the router.
        end: norms around the addition of what these give, and the first one of the next layer.
        turning: index of the operations with the layer's rotary tables.
    """

    attention: Attention
    middle: Sandwich
    mlp: Mlp
    experts: Experts
    end: Sandwich
    turning: int


class DiffusionGemma(Decoder):
    """DiffusionGemmaForBlockDiffusion."""

    only: ClassVar[Mapping[str, Any]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
    }

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        spec, at = self.spec, build.inside("model").inside("decoder")
        self.embedding = Embedding(at, "embed_tokens")
        # upstream rounds it to the weights' dtype
        self._scale = float(torch.tensor(spec.hidden_size**0.5, dtype=build.dtype))
        inside = at.inside("self_conditioning")
        self._before_condition = _norm(inside, "pre_norm.weight")
        self._condition = Mlp(inside, gate="gate_proj", up="up_proj", down="down_proj")
        layers = [at.inside(f"layers.{i}") for i in range(spec.num_layers)]
        firsts = [_norm(layer, "input_layernorm.weight") for layer in layers]
        self._first, nexts = firsts[0], [*firsts[1:], _norm(at, "norm.weight")]
        kinds = list(dict.fromkeys(map(_turn, spec.layers)))
        self._turning = [_ops(build, *kind) for kind in kinds]
        self.layers = [
            _block(replace(layer, ops=self._turning[kind]), i, then, kind)
            for i, (layer, then) in enumerate(zip(layers, nexts, strict=True))
            for kind in [kinds.index(_turn(spec.layers[i]))]
        ]
        #: [layers] each: of canvases that are filled, and of what is encoded
        self._scalars = [
            build.weight(
                *(
                    Part(f"model.{name}.layers.{i}.layer_scalar", (1,), (_ALL,))
                    for i in range(spec.num_layers)
                ),
                ones=True,
            )
            for name in ("decoder", "encoder.language_model")
        ]
        self.head = Head(build, "lm_head", self.embedding)
        # the vision tower, and second copies of weights that encoder and decoder share
        build.ignored.append("model.encoder.")

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        context: AttentionContext,
        rows: Tensor | None = None,
        canvas: CanvasTokens | None = None,
    ) -> Tensor:
        """See :class:`Decoder`."""
        ops, eps = self.ops, self.spec.norm_eps
        own, encoders = self._scalars
        h = self.embedding(ids) * self._scale
        scalars = encoders[:, None].expand(-1, len(ids))  # [layers, N]
        if canvas is not None:
            h = torch.where(canvas.mine[:, None], self._conditioned(h, canvas.expected), h)
            scalars = torch.where(canvas.mine, own[:, None], encoders[:, None])
        angles = [turning.at(positions) for turning in self._turning]
        x = ops.wide_norm(h, self._first, eps)
        for layer, block in enumerate(self.layers):
            wanted = rows if layer == len(self.layers) - 1 else None
            scalar = scalars[layer]
            x = block.attention(x, angles[block.turning], context, wanted)
            if wanted is not None:
                h, scalar = h[wanted], scalar[wanted]
            (x, y, seen), h = ops.sandwich((x,), h, block.middle)
            outs = block.mlp(x), block.experts(y, seen=seen)
            (x,), h = ops.sandwich(outs, h, block.end, scalar)
        return x

    def _conditioned(self, h: Tensor, expected: Tensor) -> Tensor:
        """The input [N, d] of a canvas: its embeddings, and what the forward before expected."""
        ops, eps = self.ops, self.spec.norm_eps
        soft = ops.wide_norm(expected * self._scale, self._before_condition, eps)
        return ops.wide_norm(h + self._condition(soft), None, eps)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a DiffusionGemma config.json, whose ``text_config`` is what is read."""
        text = need(config, "text_config", _NAME)
        if not isinstance(text, Mapping):
            raise TypeError(f"text_config must be an object, got {text!r}")
        refuse(text, _NAME, cls.only)
        refuse(config, _NAME, {"tie_word_embeddings": True})
        layers = int(need(text, "num_hidden_layers", _NAME))
        vocab = int(need(text, "vocab_size", _NAME))
        return ModelSpec(
            architecture=_NAME,
            vocab_size=vocab,
            embedding_size=vocab,
            hidden_size=int(need(text, "hidden_size", _NAME)),
            num_layers=layers,
            num_heads=int(need(text, "num_attention_heads", _NAME)),
            num_kv_heads=int(need(text, "num_key_value_heads", _NAME)),
            head_dim=int(need(text, "head_dim", _NAME)),
            mlp_size=int(need(text, "intermediate_size", _NAME)),
            max_model_len=int(need(text, "max_position_embeddings", _NAME)),
            rope_theta=_angles(text, _SLIDING, 2)[0],
            norm_eps=float(one_of(text, ("rms_norm_eps",), 1e-6)),
            mask_id=NO_MASK,
            eos_ids=tuple(dict.fromkeys(eos_ids(config) + eos_ids(text))),
            geometry="block",
            block_length=int(one_of(config, ("canvas_length",), 256)),
            causal_context=True,
            noise=True,
            attention=tuple(_attention(text, layers)),
            query_scale=1.0,
            head_norms=True,
            tied_head=True,
            dtype=str(one_of({**text, **config}, ("dtype", "torch_dtype"), "bfloat16")),
            experts=expert_spec(
                layers=(True,) * layers,
                count=int(need(text, "num_experts", _NAME)),
                per_token=int(need(text, "top_k_experts", _NAME)),
                size=int(need(text, "moe_intermediate_size", _NAME)),
                normalize=True,
                beside=True,
            ),
            activation="gelu_tanh",
            logit_cap=_cap(text),
        )


def _cap(text: Mapping[str, Any]) -> float:
    """Logits stay under it; files that upstream saves do not say it."""
    cap = float(one_of(text, ("final_logit_softcapping",), 30.0))
    if not cap > 0:
        raise UnsupportedModelError(
            f"config.json: final_logit_softcapping is {cap}; it must be over 0"
        )
    return cap


def _norm(at: Build, name: str) -> Tensor:
    """The weight of a norm [d], whole on every rank."""
    return at.weight(Part(name, (at.spec.hidden_size,), (_ALL,)), ones=True)


def _turn(layer: AttentionSpec) -> tuple[int, float, int]:
    """What rotary tables depend on."""
    return layer.head_dim, layer.rope_theta, layer.turned


def _ops(build: Build, head_dim: int, theta: float, turned: int) -> LayerOps:
    """Operations with these rotary tables; the model's own where they are the same."""
    spec = build.spec
    if (head_dim, theta, turned) == (spec.head_dim, spec.rope_theta, 0):
        return build.ops
    return build.ops.turning(head_dim, theta, turned)


def _block(at: Build, layer: int, then: Tensor, turning: int) -> GemmaBlock:
    """DiffusionGemmaDecoderTextLayer; ``then`` is the norm behind it."""
    spec, names = at.spec, {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    experts = spec.experts
    if experts is None:
        raise UnsupportedModelError(f"{_NAME} without experts is not supported")
    inside = at.inside("self_attn")
    attention = Attention(inside, layer, **names, norms=("q_norm", "k_norm"), wide=True)
    before = "pre_feedforward_layernorm"
    reads = (f"{before}.weight", f"{before}_2.weight", "router.scale")
    middle = Sandwich(
        branches=(),
        after=_norm(at, "post_attention_layernorm.weight"),
        then=tuple(_norm(at, name) for name in reads),
        factors=(1.0, 1.0, spec.hidden_size**-0.5),
        eps=spec.norm_eps,
    )
    behind = "post_feedforward_layernorm"
    end = Sandwich(
        branches=(_norm(at, f"{behind}_1.weight"), _norm(at, f"{behind}_2.weight")),
        after=_norm(at, f"{behind}.weight"),
        then=(then,),
        factors=(1.0,),
        eps=spec.norm_eps,
    )
    mlp = Mlp(at.inside("mlp"), gate="gate_proj", up="up_proj", down="down_proj")
    routed = Experts(
        at,
        experts,
        inside="",
        gate="router.proj",
        factors="router.per_expert_scale",
        stacked=True,
    )
    return GemmaBlock(attention, middle, mlp, routed, end, turning)


def _kinds(text: Mapping[str, Any], layers: int) -> list[str]:
    """``layer_types`` of the first layers: as given, or five sliding ones before each full one."""
    given = text.get("layer_types")
    if given is None:
        given = [_SLIDING if (i + 1) % 6 else _FULL for i in range(layers)]
    if not isinstance(given, list) or set(map(str, given)) - {_SLIDING, _FULL}:
        raise UnsupportedModelError(
            f"{_NAME} with layer_types={given!r} is not supported (only a list of {_SLIDING!r} and "
            f"{_FULL!r})"
        )
    if len(given) < layers:
        raise UnsupportedModelError(
            f"config.json: layer_types has {len(given)} layers, and num_hidden_layers is {layers}"
        )
    return [*given[:-1], _FULL][:layers]  # as upstream, whatever the last one is called


def _overrides(text: Mapping[str, Any], kinds: list[str]) -> dict[int, Mapping[str, Any]]:
    """What layers have of their own, by their numbers; in either spelling."""
    if "per_layer_config" not in text:
        own = {"head_dim": one_of(text, ("global_head_dim",), 512)}
        if text.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = text["num_global_key_value_heads"]
        return {i: own for i, kind in enumerate(kinds) if kind == _FULL}
    found = dict[int, Mapping[str, Any]]()
    for index, own in (text["per_layer_config"] or {}).items():
        if set(own) - _OVER:
            raise UnsupportedModelError(
                f"{_NAME} with per_layer_config of {', '.join(sorted(set(own) - _OVER))} is not "
                f"supported (only {' and '.join(sorted(_OVER))})"
            )
        found[int(index)] = own
    return found


def _attention(text: Mapping[str, Any], layers: int) -> Iterator[AttentionSpec]:
    """Attention of each layer."""
    heads, kinds = int(need(text, "num_attention_heads", _NAME)), _kinds(text, layers)
    overrides = _overrides(text, kinds)
    window = int(one_of(text, ("sliding_window",), 512))
    if window < 1:
        raise UnsupportedModelError(f"config.json: sliding_window is {window}; it must be over 0")
    for layer, kind in enumerate(kinds):
        own = {**text, **overrides.get(layer, {})}
        kv, dim = int(need(own, "num_key_value_heads", _NAME)), int(need(own, "head_dim", _NAME))
        if kv < 1 or heads % kv:
            raise UnsupportedModelError(
                f"layer {layer}: num_attention_heads={heads} is not a multiple of "
                f"num_key_value_heads={kv}"
            )
        if dim < 2 or dim % 2:
            raise UnsupportedModelError(f"layer {layer}: head_dim={dim} is odd or under 2")
        theta, turned = _angles(text, kind, dim)
        yield AttentionSpec(
            num_kv_heads=kv,
            head_dim=dim,
            window=window if kind == _SLIDING else 0,
            rope_theta=theta,
            turned=turned,
            key_is_value=kind == _FULL,
        )


def _angles(text: Mapping[str, Any], kind: str, head_dim: int) -> tuple[float, int]:
    """The rotary base of a kind of layers, and how many pairs of a head turn; 0 for all."""
    given = (text.get("rope_parameters") or _ROPE).get(kind) or {}
    theta, name = float(given.get("rope_theta") or 10_000.0), given.get("rope_type") or "default"
    part, factor = (
        float(one_of(given, (field,), 1.0)) for field in ("partial_rotary_factor", "factor")
    )
    pairs = int(part * head_dim // 2)
    runs = {"default": part == 1, "proportional": 0 < part <= 1 and pairs > 0}
    if not runs.get(name, False) or factor != 1 or theta <= 0:
        raise UnsupportedModelError(
            f"{_NAME} with rope_parameters of {kind} {dict(given)!r} is not supported (only "
            "'default', or 'proportional' with partial_rotary_factor up to 1 that turns something, "
            "and no factor)"
        )
    return theta, pairs % (head_dim // 2)
