"""The bidirectional pre-norm decoder that LLaDA and Dream share.

Weights that are multiplied with the same input are stored as one matrix: q, k, v
together, gate and up together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllmserve.core.model_spec import ModelSpec
from dllmserve.layers.ops import Angles, choose_ops
from dllmserve.layers.rotary import Rotary
from dllmserve.models.base import AttentionContext, Target


class Decoder(nn.Module):
    """Embedding, layers and final norm; the LM head is a weight, applied elsewhere.

    Args:
        spec: the model's dimensions.
        dtype, device: of the parameters, which are left uninitialised.
        max_len: positions that the rotary tables cover.
        kernels: "torch" or "triton", see :func:`dllmserve.layers.ops.choose_ops`.

    Attributes:
        ops: the operations that the layers are made of.

    Example:
        ``hidden = decoder(ids, positions, context)`` with ids and positions [N] int64
        gives [N, hidden_size]; ``hidden @ decoder.head_weight.T`` are the logits.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
        kernels: str = "torch",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.q_size = spec.num_heads * spec.head_dim
        self.kv_size = spec.num_kv_heads * spec.head_dim
        rotary = Rotary(spec.head_dim, spec.rope_theta, max_len, device)
        self.ops = choose_ops(kernels, rotary)
        for name, shape in parameter_shapes(spec).items():
            data = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))

    @property
    def head_weight(self) -> Tensor:
        """[embedding_size, hidden_size]: the LM head, or the embedding if they are tied."""
        return self.weight("embed" if self.spec.tied_head else "head")

    def weight(self, name: str) -> Tensor:
        """A parameter by name."""
        return self.get_parameter(name)

    def bias(self, name: str) -> Tensor | None:
        """A bias, or None where the model has none."""
        return self._parameters.get(name)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run N packed tokens of any number of requests.

        Args:
            ids: [N] int64 token ids.
            positions: [N] int64 canvas positions.
            context: attention for this step.
            rows: [M] int64, the tokens whose result is wanted; None for all of them. What
                follows the last layer's attention is computed for these alone.

        Returns:
            [M, hidden_size] (or [N, hidden_size]) after the final norm.
        """
        ops, eps = self.ops, self.spec.norm_eps
        x = F.embedding(ids, self.weight("embed"))
        angles = ops.at(positions)
        # every residual addition runs together with the norm that follows it
        normed, h = ops.add_norm(x, None, self.weight(self._norm_before(0)), eps)
        for layer in range(self.spec.num_layers):
            wanted = rows if layer == self.spec.num_layers - 1 else None
            x = self._attention(layer, normed, angles, context, wanted)
            if wanted is not None:
                h = h[wanted]
            normed, h = ops.add_norm(x, h, self.weight(f"l{layer}_mlp_norm"), eps)
            x = self._mlp(layer, normed)
            normed, h = ops.add_norm(x, h, self.weight(self._norm_before(layer + 1)), eps)
        return normed

    def _norm_before(self, layer: int) -> str:
        """The norm before a layer's attention, or after the last layer."""
        return f"l{layer}_attn_norm" if layer < self.spec.num_layers else "norm"

    def _attention(
        self,
        layer: int,
        x: Tensor,  # [N, d]
        angles: Angles,
        context: AttentionContext,
        rows: Tensor | None,  # [M] int64
    ) -> Tensor:
        spec, ops = self.spec, self.ops
        qkv = ops.linear(x, self.weight(f"l{layer}_qkv"), self.bias(f"l{layer}_qkv_bias"))
        heads = qkv.view(x.shape[0], -1, spec.head_dim)
        split = spec.num_heads + spec.num_kv_heads
        turned = ops.rotate(heads, split, angles)  # q and k together
        q, k = turned[:, : spec.num_heads], turned[:, spec.num_heads :]
        out = context.attend(layer, q, k, heads[:, split:])
        flat = out.reshape(x.shape[0], self.q_size)
        if rows is not None:
            flat = flat[rows]
        return ops.linear(flat, self.weight(f"l{layer}_out"), None)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        wide = self.ops.linear(x, self.weight(f"l{layer}_gate_up"), None)
        return self.ops.linear(self.ops.silu_mul(wide), self.weight(f"l{layer}_down"), None)


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every decoder parameter."""
    d, m = spec.hidden_size, spec.mlp_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.embedding_size, d)}
    for i in range(spec.num_layers):
        shapes[f"l{i}_attn_norm"] = (d,)
        shapes[f"l{i}_qkv"] = (q + 2 * kv, d)
        shapes[f"l{i}_out"] = (d, q)
        shapes[f"l{i}_mlp_norm"] = (d,)
        shapes[f"l{i}_gate_up"] = (2 * m, d)
        shapes[f"l{i}_down"] = (d, m)
        if spec.qkv_bias:
            shapes[f"l{i}_qkv_bias"] = (q + 2 * kv,)
    shapes["norm"] = (d,)
    if not spec.tied_head:
        shapes["head"] = (spec.embedding_size, d)
    return shapes


def layer_targets(spec: ModelSpec, layer: int, names: dict[str, str]) -> dict[str, Target]:
    """Targets of one layer's tensors.

    Args:
        names: checkpoint stem of each part: attn_norm, q, k, v, out, mlp_norm, gate, up,
            down. ".weight" (and ".bias" for q, k, v where the spec says so) is added here.
    """
    d, m = spec.hidden_size, spec.mlp_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    # part -> parameter, first row, rows
    parts = {
        "q": ("qkv", 0, q),
        "k": ("qkv", q, kv),
        "v": ("qkv", q + kv, kv),
        "out": ("out", 0, d),
        "gate": ("gate_up", 0, m),
        "up": ("gate_up", m, m),
        "down": ("down", 0, d),
    }
    columns = {"out": q, "down": m}
    targets = {
        f"{names[part]}.weight": Target(f"l{layer}_{part}", 0, (d,))
        for part in ("attn_norm", "mlp_norm")
    }
    for part, (parameter, start, rows) in parts.items():
        full = f"l{layer}_{parameter}"
        shape = (rows, columns.get(part, d))
        targets[f"{names[part]}.weight"] = Target(full, start, shape)
        if parameter == "qkv" and spec.qkv_bias:
            targets[f"{names[part]}.bias"] = Target(f"{full}_bias", start, (rows,))
    return targets
