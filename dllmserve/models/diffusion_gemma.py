"""DiffusionGemma (Google): a causal encoder and a canvas of noise, of the same weights.

Source of the fields and names: configuration_diffusion_gemma.py and modeling_diffusion_gemma.py of
transformers. The text model alone: pictures are not read.

What is stored, the prompt and finished canvases, passes as in a causal model. A canvas that is
filled passes the same layers, whose last factor is another number then, and begins with a mixture
of its ids and what the forward before thought of each position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllmserve.core.model_spec import NO_MASK, AttentionSpec, ExpertSpec, ModelSpec
from dllmserve.errors import UnsupportedModelError
from dllmserve.layers.experts import Experts
from dllmserve.layers.modules import (
    Attention,
    AttentionContext,
    Build,
    Embedding,
    Head,
    Mlp,
    Part,
    RMSNorm,
)
from dllmserve.layers.ops import Angles, rotary_of
from dllmserve.models.config import eos_ids, expert_spec, need, one_of, refuse
from dllmserve.models.decoder import CanvasTokens, Decoder

NAME = "DiffusionGemmaForBlockDiffusion"
FULL, SLIDING = "full_attention", "sliding_attention"
#: of five layers that slide one does not, unless config.json says otherwise
_PATTERN = 6
_ROTATION: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
_ONLY = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": "vision",  # that is of pictures
    "tie_word_embeddings": True,
}
_ALL = slice(None)


class Layer:
    """A layer: attention, then an MLP and experts side by side, each between norms of its own.

    Args:
        build: of the decoder.
        root: of the model.
        number: the layer's.
    """

    def __init__(self, build: Build, root: Build, number: int) -> None:
        name, spec = f"layers.{number}", build.spec
        at = build.inside(name)
        self.attention = Attention(
            at.inside("self_attn"),
            number,
            q="q_proj",
            k="k_proj",
            v="v_proj",
            out="o_proj",
            norms=("q_norm", "k_norm"),
            value_norm=True,
        )
        self.before = RMSNorm(at, "input_layernorm")
        self.behind = RMSNorm(at, "post_attention_layernorm")
        self.mlp = Mlp(at.inside("mlp"), gate="gate_proj", up="up_proj", down="down_proj")
        self.before_mlp = RMSNorm(at, "pre_feedforward_layernorm")
        self.behind_all = RMSNorm(at, "post_feedforward_layernorm")
        self.experts: Experts | None = None
        if spec.experts is not None:
            self.experts = Experts(
                at,
                spec.experts,
                gate="router.proj",
                stacked="experts",
                factors="router.per_expert_scale",
            )
            scale = Part("router.scale", (spec.hidden_size,), (_ALL,))
            self.router_scale = at.weight(scale, ones=True)
            self.behind_mlp = RMSNorm(at, "post_feedforward_layernorm_1")
            self.before_experts = RMSNorm(at, "pre_feedforward_layernorm_2")
            self.behind_experts = RMSNorm(at, "post_feedforward_layernorm_2")
        # of a canvas, and of what is encoded
        owners = ("model.decoder", "model.encoder.language_model")
        names = [f"{owner}.{name}.layer_scalar" for owner in owners]
        self.factors = root.weight(*(Part(n, (1,), (_ALL,)) for n in names), ones=True)
        self._add_norm, self._eps = build.ops.add_norm, spec.norm_eps
        self._root = spec.hidden_size**-0.5
        self.number, self.rotary = number, rotary_of(spec.layers[number])

    def __call__(
        self,
        h: Tensor,  # [N, d]
        angles: Angles,
        context: AttentionContext,
        which: Tensor,  # [N] int64, 0 for tokens of a canvas, 1 for others
        rows: Tensor | None,  # [M] int64
    ) -> Tensor:
        """[N, d], or [M, d] of the tokens ``rows``."""
        x = self.attention(self.before(h, None)[0], angles, context, rows)
        if rows is not None:
            h, which = h[rows], which[rows]
        x, h = self.before_mlp(self.behind(x, None)[0], h)
        x = self._with_experts(self.mlp(x), h)
        return (x + h) * self.factors[which][:, None]

    def _with_experts(self, x: Tensor, h: Tensor) -> Tensor:
        """What the layer adds to h: from the MLP's output x, and from experts."""
        if self.experts is None:
            return self.behind_all(x, None)[0]
        # the router looks at h by a norm of its own
        scored = self._add_norm(h, None, self.router_scale * self._root, self._eps)[0]
        y = self.experts(self.before_experts(h, None)[0], scored=scored)
        x, y = self.behind_mlp(x, None)[0], self.behind_experts(y, None)[0]
        return self.behind_all(x, y)[0]


class DiffusionGemma(Decoder):
    """DiffusionGemmaForBlockDiffusion."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        spec, at = build.spec, build.inside("model.decoder")
        # pictures, and the encoder's copies of what the decoder has
        build.ignored.extend(("vision_tower", "embed_vision", "model.encoder.language_model."))
        self.embedding = Embedding(at, "embed_tokens")
        inside = at.inside("self_conditioning")
        self.condition = Mlp(inside, gate="gate_proj", up="up_proj", down="down_proj")
        self.before_condition = RMSNorm(inside, "pre_norm")
        self.layers = [Layer(at, build, i) for i in range(spec.num_layers)]
        self.norm = RMSNorm(at, "norm")
        self.head = Head(build, "lm_head", self.embedding)
        self._ones = torch.ones(spec.hidden_size, dtype=build.dtype, device=build.device)
        # rounded to the weights' dtype, as upstream
        self._scale = float(torch.tensor(spec.hidden_size**0.5, dtype=build.dtype))

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        context: AttentionContext,
        rows: Tensor | None = None,
        canvas: CanvasTokens | None = None,
    ) -> Tensor:
        """See :class:`Decoder`."""
        if canvas is None:
            raise ValueError("the tokens of canvases are not known")
        angles = {r: self.ops.at(positions, r) for r in {x.rotary for x in self.layers}}
        h, which = self._mixed(self.embedding(ids) * self._scale, canvas), (~canvas.mine).long()
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            wanted = rows if number == last else None
            h = layer(h, angles[layer.rotary], context, which, wanted)
        return self.norm(h, None)[0]

    def _mixed(self, e: Tensor, canvas: CanvasTokens) -> Tensor:
        """Embeddings [N, d]; those of canvases with what the forward before thought."""
        x = self.before_condition(canvas.expected * self._scale, None)[0]
        # the norm's residual would be overwritten
        mixed = self.ops.add_norm(e + self.condition(x), None, self._ones, self.spec.norm_eps)[0]
        return torch.where(canvas.mine[:, None], mixed, e)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read config.json, whose text_config has most."""
        text = need(config, "text_config", NAME)
        if not isinstance(text, Mapping):
            raise TypeError(f"text_config must be an object, got {text!r}")
        refuse(text, NAME, _ONLY)
        refuse(config, NAME, {"tie_word_embeddings": True})
        vocab = int(need(text, "vocab_size", NAME))
        heads = int(need(text, "num_attention_heads", NAME))
        attention = _attention(text)
        for layer in attention:
            if heads % layer.num_kv_heads:
                raise UnsupportedModelError(
                    f"num_attention_heads={heads} is not a multiple of num_key_value_heads="
                    f"{layer.num_kv_heads}"
                )
        return ModelSpec(
            architecture=NAME,
            vocab_size=vocab,
            embedding_size=vocab,
            hidden_size=int(need(text, "hidden_size", NAME)),
            num_layers=len(attention),
            num_heads=heads,
            num_kv_heads=attention[0].num_kv_heads,
            head_dim=attention[0].head_dim,
            attention=attention,
            query_scale=1.0,
            mlp_size=int(need(text, "intermediate_size", NAME)),
            max_model_len=int(one_of(text, ("max_position_embeddings",), 131072)),
            rope_theta=attention[0].rope_theta,
            norm_eps=float(text.get("rms_norm_eps") or 1e-6),
            head_norms=True,
            activation="gelu_tanh",
            logit_cap=float(one_of(text, ("final_logit_softcapping",), 30.0)),
            noise=True,
            mask_id=NO_MASK,
            eos_ids=eos_ids(config) or eos_ids(text),
            geometry="block",
            block_length=int(one_of(config, ("canvas_length",), 256)),
            causal_context=True,
            tied_head=True,
            dtype=str(one_of({**text, **config}, ("torch_dtype", "dtype"), "bfloat16")),
            experts=_experts(text, len(attention)),
        )


def _experts(text: Mapping[str, Any], layers: int) -> ExpertSpec | None:
    """Experts beside the MLP of every layer, if there are any."""
    if text.get("num_experts") is None:
        return None
    return expert_spec(
        layers=(True,) * layers,
        count=int(text["num_experts"]),
        per_token=int(need(text, "top_k_experts", NAME)),
        size=int(need(text, "moe_intermediate_size", NAME)),
        normalize=True,
    )


def _attention(text: Mapping[str, Any]) -> tuple[AttentionSpec, ...]:
    """How each layer attends."""
    count = int(need(text, "num_hidden_layers", NAME))
    kinds = list(text.get("layer_types") or ())
    if not kinds:
        kinds = [SLIDING if (i + 1) % _PATTERN else FULL for i in range(count)]
    if len(kinds) < count or {*kinds} - {SLIDING, FULL}:
        raise UnsupportedModelError(
            f"layer_types of {NAME} must name {SLIDING!r} or {FULL!r} for each of {count} layers, "
            f"got {kinds!r}"
        )
    kinds = [*kinds[: count - 1], FULL]  # transformers makes the last one so
    return tuple(_layer(text, number, kind) for number, kind in enumerate(kinds))


def _layer(text: Mapping[str, Any], number: int, kind: str) -> AttentionSpec:
    """One layer; what differs of full ones is in fields of two spellings."""
    own: Mapping[str, Any] = {}
    if kind == FULL:
        older = {
            "head_dim": one_of(text, ("global_head_dim",), 512),
            "num_key_value_heads": text.get("num_global_key_value_heads"),
        }
        own = (text.get("per_layer_config") or {}).get(str(number), older)
    head_dim = int(one_of({**text, **_present(own)}, ("head_dim",), 256))
    heads = int(need({**text, **_present(own)}, "num_key_value_heads", NAME))
    angles = {**_ROTATION[kind], **((text.get("rope_parameters") or {}).get(kind) or {})}
    return AttentionSpec(
        num_kv_heads=heads,
        head_dim=head_dim,
        window=0 if kind == FULL else int(one_of(text, ("sliding_window",), 512)),
        rope_theta=float(angles["rope_theta"]),
        turned=_turned(angles, head_dim),
        key_is_value=kind == FULL,
    )


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _turned(angles: Mapping[str, Any], head_dim: int) -> int:
    """How many pairs of a head's dimensions are rotated; 0 for all."""
    kind = angles.get("rope_type", "default")
    share = float(angles.get("partial_rotary_factor", 1.0))
    pairs = int(share * head_dim // 2)
    if kind == "proportional" and 0 < pairs <= head_dim // 2:
        return pairs if pairs < head_dim // 2 else 0
    if kind == "default" and share == 1.0:
        return 0
    raise UnsupportedModelError(
        f"rope_parameters of {NAME} with {dict(angles)!r} are not supported: rope_type is "
        "'default', or 'proportional' with a partial_rotary_factor that rotates something"
    )
