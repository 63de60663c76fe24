"""Naive LLaDA and Dream forwards, straight from a checkpoint's config.json and safetensors.

Upstream: GSAI-ML/LLaDA `modeling_llada.py` (`LLaDAModelLM`) and Dream-org/Dream `modeling_dream.py`
(`DreamModel`). Attention is bidirectional and unmasked, but for callers that hide keys themselves;
rotary tables and norms run in float32.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

KV = tuple[Tensor, Tensor]  # rotated K and V of one layer, each [B, kv_heads, N, head_dim]

LLADA_NAMES = {
    "layer": "model.transformer.blocks.{}.",
    "embed": "model.transformer.wte",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "attn_norm": "attn_norm",
    "mlp_norm": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
DREAM_NAMES = {
    "layer": "model.layers.{}.",
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# What the naive LLaDA block below computes; another value would silently change the function.
LLADA_FIXED = {
    "rope": True,
    "alibi": False,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "multi_query_attention": None,
}


class Dims(NamedTuple):
    """The numbers of a checkpoint that its weight shapes do not tell."""

    layers: int
    heads: int
    kv_heads: int
    eps: float
    theta: float
    tied: bool
    mask_id: int
    shifted: bool  # row i of the logits predicts position i + 1 (Dream)


class Forward(NamedTuple):
    """What one forward over Q tokens gives; K, V and queries are those of the Q tokens alone."""

    logits: Tensor  # [B, Q, V], raw: before any shift
    kv: list[KV]  # per layer, [B, kv_heads, Q, head_dim]
    queries: list[Tensor]  # per layer, after rotary, [B, heads, Q, head_dim]


def read_dims(config: Mapping[str, Any]) -> Dims:
    """Reads a config.json of either family; `architectures` decides, since model types collide."""
    name = config["architectures"][0]
    if name == "LLaDAModelLM":
        for key, value in LLADA_FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"oracle knows no {key}={config[key]!r}")
        heads = config["n_heads"]
        return Dims(
            layers=config["n_layers"],
            heads=heads,
            kv_heads=config.get("n_kv_heads") or heads,
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
            tied=config.get("weight_tying", False),
            mask_id=config["mask_token_id"],
            shifted=False,
        )
    if name == "DreamModel":
        if config.get("rope_scaling"):
            raise ValueError("oracle knows no rope_scaling")
        return Dims(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
            tied=config.get("tie_word_embeddings", False),
            mask_id=config["mask_token_id"],
            shifted=True,
        )
    raise ValueError(f"oracle knows no architecture {name!r}")


def shift(z: Tensor) -> Tensor:
    """Dream's shift of logits [B, L, V]: row i takes row i - 1, row 0 repeats itself."""
    return torch.cat([z[:, :1], z[:, :-1]], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Half-split rotary embedding of x [B, H, Q, D] by angles [B or 1, 1, Q, R / 2].

    Only the first R of D dimensions turn.
    """
    half = angles.shape[-1]
    low, high, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1).to(x.dtype)


class OracleModel:
    """A bidirectional transformer of either family; calling it gives raw logits [B, L, V].

    V is the head's row count (LLaDA: embedding_size, which may exceed vocab_size), as upstream.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.dims = read_dims(config)
        self.names = DREAM_NAMES if self.dims.shifted else LLADA_NAMES
        self.weights = weights
        self.mask_id = self.dims.mask_id
        self.shifted = self.dims.shifted

    def __call__(self, tokens: Tensor) -> Tensor:
        """Raw logits [B, L, V] of whole sequences [B, L] at positions 0..L-1."""
        return self.forward(tokens).logits

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,  # [B, Q] int64
        positions: Tensor | None = None,  # [Q] or [B, Q], absolute; default 0..Q-1
        past: Sequence[KV] | None = None,  # per layer, [B, kv_heads, N, head_dim], K rotated
        overwrite_at: int | Sequence[int] | None = None,
        sees: Tensor | None = None,  # [Q, keys] bool; default: every query sees every key
    ) -> Forward:
        """One forward of Q tokens over [past, Q] keys, or over `past` with Q rows replaced.

        With `overwrite_at`, rows [overwrite_at, overwrite_at + Q) give way to the fresh ones
        (Fast-dLLM's dual cache), or the Q rows that it lists, in any order; otherwise the fresh
        rows follow. `past` itself is not changed.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = F.embedding(tokens, self.weights[self.names["embed"] + ".weight"])
        angles = self._angles(positions, self._turning(hidden.shape[-1] // self.dims.heads))
        fresh: list[KV] = []
        queries: list[Tensor] = []
        for layer in range(self.dims.layers):
            prefix = self.names["layer"].format(layer)
            normed = self._norm(hidden, prefix + self.names["attn_norm"])
            q = rotate(self._heads(normed, prefix, "q"), angles)
            k = rotate(self._heads(normed, prefix, "k"), angles)
            v = self._heads(normed, prefix, "v")
            fresh.append((k, v))
            queries.append(q)
            if past is not None:
                k = merge(past[layer][0], k, overwrite_at)
                v = merge(past[layer][1], v, overwrite_at)
            hidden = hidden + self._linear(self._attend(q, k, v, sees), prefix + self.names["o"])
            hidden = hidden + self._mlp(hidden, prefix)
        hidden = self._norm(hidden, self.names["final_norm"])
        head = self.names["embed" if self.dims.tied else "head"]
        return Forward(F.linear(hidden, self.weights[head + ".weight"]), fresh, queries)

    def _turning(self, head_dim: int) -> int:
        return head_dim

    def _angles(self, positions: Tensor, turning: int) -> Tensor:
        exponents = torch.arange(0, turning, 2, device=positions.device).float() / turning
        inverse = 1.0 / (self.dims.theta**exponents)  # [R / 2]
        angles = positions.float()[..., None] * inverse  # [Q, R / 2] or [B, Q, R / 2]
        return angles.view(-1, 1, *angles.shape[-2:])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        # Biases are found, not configured: Dream has them on Q, K, V; LLaDA's configs allow them.
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.dims.eps)
        return wide.to(x.dtype) * self.weights[name + ".weight"]

    def _heads(self, x: Tensor, prefix: str, which: str) -> Tensor:
        count = self.dims.heads if which == "q" else self.dims.kv_heads
        flat = self._linear(x, prefix + self.names[which])  # [B, Q, count * D]
        return flat.view(*flat.shape[:-1], count, -1).transpose(1, 2)  # [B, count, Q, D]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None) -> Tensor:
        group = self.dims.heads // self.dims.kv_heads  # query heads that share one K,V head
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return out.transpose(1, 2).flatten(2)  # [B, Q, H * D]

    def _mlp(self, hidden: Tensor, prefix: str) -> Tensor:
        normed = self._norm(hidden, prefix + self.names["mlp_norm"])
        gate = F.silu(self._linear(normed, prefix + self.names["gate"]))
        up = self._linear(normed, prefix + self.names["up"])
        return self._linear(gate * up, prefix + self.names["down"])


def merge(past: Tensor, fresh: Tensor, overwrite_at: int | Sequence[int] | None) -> Tensor:
    """Keys or values [B, kv_heads, *, D] that a query sees: appended, or replaced in a copy."""
    if overwrite_at is None:
        return torch.cat([past, fresh], dim=2)
    if isinstance(overwrite_at, int):
        overwrite_at = range(overwrite_at, overwrite_at + fresh.shape[2])
    merged = past.clone()
    merged[:, :, list(overwrite_at)] = fresh
    return merged


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> OracleModel:
    """Loads a Hugging Face directory (config.json and one or more *.safetensors)."""
    config, weights = read(path, device)
    return OracleModel(config, {name: w.to(dtype) for name, w in weights.items()})


def read(path: str | Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a Hugging Face directory, as they are in its files."""
    folder = Path(path)
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(shard, device=device))
    return json.loads((folder / "config.json").read_text()), weights
