"""Naive forward of DiffusionGemma's text model.

Upstream: models/diffusion_gemma of transformers 5.24.0 (eager attention). One sequence at a time,
every head by itself, every token's experts by themselves.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

KV = tuple[Tensor, Tensor]  # [tokens, heads, D] each


def norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    """``x * (mean(x^2) + eps)^-0.5 * weight`` over the last dimension."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps) ** -0.5 * weight


def sees(positions: Tensor, count: int, window: int, filling: bool) -> Tensor:
    """Which of ``count`` keys, at positions 0.., the queries at ``positions`` see: [Q, count]."""
    keys = torch.arange(count)[None, :]
    at = positions[:, None]
    base = positions.min() if filling else at
    behind = torch.ones_like(keys, dtype=torch.bool) if filling else keys <= at
    return behind & ((keys > base - window) if window else True)


class Gemma:
    """The model; ``encode`` keeps K and V of text that stays, ``decode`` fills a canvas."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.text, self.weights = config["text_config"], weights
        self.eps = self.text["rms_norm_eps"]
        self.kept: list[list[KV]] = [[] for _ in range(self.text["num_hidden_layers"])]

    def encode(self, ids: list[int]) -> None:
        """Keep what tokens behind those before leave: a prompt, or a finished canvas."""
        start = sum(len(k) for k, _ in self.kept[0])
        self._layers(self._embed(ids), torch.arange(start, start + len(ids)), filling=False)

    def decode(self, canvas: list[int], thought: Tensor | None = None) -> Tensor:
        """Capped logits [C, V]; ``thought`` [C, V] are those that the forward before tempered."""
        table, size = self.weights["model.decoder.embed_tokens.weight"], self.text["hidden_size"]
        soft = torch.zeros(len(canvas), size)
        if thought is not None:
            soft = thought.softmax(dim=-1) @ table * size**0.5
        at = "model.decoder.self_conditioning."
        n = norm(soft, self.weights[at + "pre_norm.weight"], self.eps)
        x = norm(self._embed(canvas) + self._mlp(n, at), 1.0, self.eps)
        start = sum(len(k) for k, _ in self.kept[0])
        x = self._layers(x, torch.arange(start, start + len(canvas)), filling=True)
        z = norm(x, self.weights["model.decoder.norm.weight"], self.eps) @ table.T
        return 30 * torch.tanh(z / 30)

    def _embed(self, ids: list[int]) -> Tensor:
        table = self.weights["model.decoder.embed_tokens.weight"]
        return table[torch.tensor(ids)] * self.text["hidden_size"] ** 0.5

    def _layers(self, x: Tensor, positions: Tensor, filling: bool) -> Tensor:
        side = "decoder" if filling else "encoder.language_model"
        for layer in range(self.text["num_hidden_layers"]):
            at = f"model.decoder.layers.{layer}."

            def normed(x: Tensor, name: str, at: str = at) -> Tensor:
                return norm(x, self.weights[f"{at}{name}layernorm.weight"], self.eps)

            attended = self._attend(normed(x, "input_"), layer, positions, filling)
            x = x + normed(attended, "post_attention_")
            one = self._mlp(normed(x, "pre_feedforward_"), at + "mlp.")
            two = self._experts(x, norm(x, self._two(at, "pre"), self.eps), at)
            both = norm(one, self._two(at, "post", 1), self.eps)
            both = both + norm(two, self._two(at, "post"), self.eps)
            x = x + normed(both, "post_feedforward_")
            x = x * self.weights[f"model.{side}.layers.{layer}.layer_scalar"]
        return x

    def _two(self, at: str, which: str, number: int = 2) -> Tensor:
        return self.weights[f"{at}{which}_feedforward_layernorm_{number}.weight"]

    def _mlp(self, x: Tensor, at: str) -> Tensor:
        gate, up = (x @ self.weights[f"{at}{name}_proj.weight"].T for name in ("gate", "up"))
        return F.gelu(gate, approximate="tanh") * up @ self.weights[at + "down_proj.weight"].T

    def _experts(self, x: Tensor, inputs: Tensor, at: str) -> Tensor:
        read = norm(x, self.weights[at + "router.scale"] * x.shape[1] ** -0.5, self.eps)
        scores = (read @ self.weights[at + "router.proj.weight"].T).softmax(dim=-1)
        gate_up = self.weights[at + "experts.gate_up_proj"]
        down = self.weights[at + "experts.down_proj"]
        out = torch.zeros_like(x)
        for token, row in enumerate(scores):
            best, ids = row.topk(self.text["top_k_experts"])
            shares = best / best.sum() * self.weights[at + "router.per_expert_scale"][ids]
            for share, e in zip(shares, ids.tolist(), strict=True):
                gate, up = (gate_up[e] @ inputs[token]).chunk(2)
                out[token] += share * (down[e] @ (F.gelu(gate, approximate="tanh") * up))
        return out

    def _attend(self, x: Tensor, layer: int, positions: Tensor, filling: bool) -> Tensor:
        at, text = f"model.decoder.layers.{layer}.self_attn.", self.text
        full = text["layer_types"][layer] == "full_attention"
        own = text | text["per_layer_config"].get(str(layer), {})
        dim = own["head_dim"]

        def of(name: str) -> Tensor:
            flat = x @ self.weights[f"{at}{name}_proj.weight"].T
            return flat.view(len(x), -1, dim)

        q = rotate(norm(of("q"), self.weights[at + "q_norm.weight"], self.eps), positions, full)
        k = rotate(norm(of("k"), self.weights[at + "k_norm.weight"], self.eps), positions, full)
        v = norm(of("k" if full else "v"), 1.0, self.eps)
        kept = [*self.kept[layer], (k, v)]
        if not filling:
            self.kept[layer] = kept
        keys, values = (torch.cat(parts) for parts in zip(*kept, strict=True))
        window = 0 if full else text["sliding_window"]
        visible = sees(positions, len(keys), window, filling)
        flat = attended(q, keys, values, visible, 1.0).flatten(1)
        return flat @ self.weights[at + "o_proj.weight"].T


def rotate(heads: Tensor, positions: Tensor, full: bool) -> Tensor:
    """Heads [N, H, D] turned by their positions; of a full layer the first quarter of pairs."""
    dim = heads.shape[-1]
    frequencies = (1e6 if full else 1e4) ** (-torch.arange(0, dim, 2) / dim)
    if full:
        frequencies[int(0.25 * dim // 2) :] = 0
    angles = (positions[:, None] * frequencies)[:, None, :]
    low, high = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention [Q, Hq, D] of q over k and v [K, Hkv, D] that ``visible`` [Q, K] admits."""
    group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * scale
        out[:, head] = (
            scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ v[:, head // group]
        )
    return out


def load(folder: str | Path) -> Gemma:
    """The model of a Hugging Face directory."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return Gemma(config, load_file(Path(folder) / "model.safetensors"))
