"""The bidirectional pre-norm decoder that LLaDA and Dream share.

Weights that are multiplied with the same input are stored as one matrix: q, k, v
together, gate and up together. A rank of several has a part of each matrix, see
:mod:`dllmserve.parallel.partition`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllmserve.core.model_spec import ModelSpec
from dllmserve.layers.ops import Angles, choose_ops
from dllmserve.layers.rotary import Rotary
from dllmserve.models.base import AttentionContext, Target
from dllmserve.parallel.group import SOLO, Group, join
from dllmserve.parallel.partition import Partition
from dllmserve.parallel.vocab import VocabShard

#: a layer's matrices, and the parts of each as checkpoints have them
_MATRICES = {
    "qkv": ("q", "k", "v"),
    "out": ("out",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


class Decoder(nn.Module):
    """Embedding, layers and final norm; the LM head is a weight, applied elsewhere.

    Args:
        partition: the model's dimensions, and this rank's part of them.
        dtype, device: of the parameters, which are left uninitialised.
        max_len: positions that the rotary tables cover.
        kernels: "torch" or "triton", see :func:`dllmserve.layers.ops.choose_ops`.
        group: the ranks that share the model.

    Attributes:
        spec: dimensions of the whole model.
        partition, group: as given.
        vocab: this rank's ids.
        ops: the operations that the layers are made of.

    Example:
        ``hidden = decoder(ids, positions, context)`` with ids and positions [N] int64
        gives [N, hidden_size]; ``hidden @ decoder.head_weight.T`` are the logits.
    """

    def __init__(
        self,
        partition: Partition,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
        kernels: str = "torch",
        group: Group = SOLO,
    ) -> None:
        super().__init__()
        self.partition, self.group = partition, group
        self.spec: ModelSpec = partition.spec
        self.vocab = VocabShard(self.spec.embedding_size, group)
        local = partition.local
        self._heads, self._kv_heads = local.num_heads, local.num_kv_heads
        rotary = Rotary(local.head_dim, local.rope_theta, max_len, device)
        self.ops = choose_ops(kernels, rotary)
        for name, shape in parameter_shapes(partition).items():
            data = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the LM head, or of the embedding if they are tied: [v, d]."""
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
        x = self._embed(ids)
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

    def _embed(self, ids: Tensor) -> Tensor:
        """[N, d]; every embedding comes from the one rank that has it."""
        table = self.weight("embed")
        if self.group.size == 1:
            return F.embedding(ids, table)
        columns, mine = self.vocab.locate(ids)
        found = F.embedding(columns, table).masked_fill(~mine[:, None], 0.0)
        return self.group.all_reduce(found)

    def _join(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ W.T`` [N, d] of the whole matrix, from this rank's part of x and of W."""
        group, linear = self.group, self.ops.linear
        if group.size == 1:
            return linear(x, weight, None)
        if self.partition.exact:
            return join(group, linear(join(group, x, 1), weight, None), 1)
        return group.all_reduce(linear(x, weight, None))

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
        ops, heads = self.ops, self._heads
        qkv = ops.linear(x, self.weight(f"l{layer}_qkv"), self.bias(f"l{layer}_qkv_bias"))
        vectors = qkv.view(x.shape[0], -1, self.spec.head_dim)
        split = heads + self._kv_heads
        turned = ops.rotate(vectors, split, angles)  # q and k together
        q, k = turned[:, :heads], turned[:, heads:]
        out = context.attend(layer, q, k, vectors[:, split:])
        flat = out.reshape(x.shape[0], heads * self.spec.head_dim)
        if rows is not None:
            flat = flat[rows]
        return self._join(flat, self.weight(f"l{layer}_out"))

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        wide = self.ops.linear(x, self.weight(f"l{layer}_gate_up"), None)
        return self._join(self.ops.silu_mul(wide), self.weight(f"l{layer}_down"))


def whole_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole model."""
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


def parameter_shapes(partition: Partition) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a rank."""
    shapes = {}
    for name, whole in whole_shapes(partition.spec).items():
        cuts = partition.cuts(kind_of(name))
        rows = sum(_length(rows, whole[0]) for rows, _ in cuts)
        shapes[name] = (rows, *(_length(cuts[0][1], n) for n in whole[1:]))
    return shapes


def kind_of(parameter: str) -> str:
    """A parameter's name without its layer."""
    layer, _, kind = parameter.partition("_")
    return kind if layer[1:].isdigit() else parameter


def take(partition: Partition, parameter: str, whole: Tensor) -> Tensor:
    """A rank's part of a whole parameter."""
    cuts = partition.cuts(kind_of(parameter))
    return torch.cat([whole[cut[: whole.dim()]] for cut in cuts])


def _length(part: slice, whole: int) -> int:
    return len(range(whole)[part])


def table_target(partition: Partition, parameter: str) -> Target:
    """The target of the embedding or the LM head, by rows of the vocabulary."""
    shape = (partition.spec.embedding_size, partition.spec.hidden_size)
    return Target(parameter, 0, shape, partition.cuts(parameter)[0])


def layer_targets(partition: Partition, layer: int, names: dict[str, str]) -> dict[str, Target]:
    """Targets of one layer's tensors.

    Args:
        partition: the model and a rank's part of it.
        names: checkpoint stem of each part: attn_norm, q, k, v, out, mlp_norm, gate, up,
            down. ".weight" (and ".bias" for q, k, v where the spec says so) is added here.
    """
    spec = partition.spec
    d, m = spec.hidden_size, spec.mlp_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rows = {"q": q, "k": kv, "v": kv, "out": d, "gate": m, "up": m, "down": d}
    columns = {"out": q, "down": m}
    targets = {
        f"{names[part]}.weight": Target(f"l{layer}_{part}", 0, (d,))
        for part in ("attn_norm", "mlp_norm")
    }
    for kind, parts in _MATRICES.items():
        first = start = 0  # of the part's rows, in the whole parameter and in the rank's
        for part, (taken, across) in zip(parts, partition.cuts(kind), strict=True):
            low, high, _ = taken.indices(first + rows[part])
            cut = (slice(low - first, high - first), across)
            shape = (rows[part], columns.get(part, d))
            targets[f"{names[part]}.weight"] = Target(f"l{layer}_{kind}", start, shape, cut)
            if kind == "qkv" and spec.qkv_bias:
                bias = Target(f"l{layer}_qkv_bias", start, shape[:1], cut)
                targets[f"{names[part]}.bias"] = bias
            first, start = first + rows[part], start + high - low
    return targets
