"""The Dream-type network for training: flat packed tokens, weights of all layers stacked.

Stacking the layers lets the optimizer orthogonalise each kind of matrix in one batched product.
Everything but the
attention works on flat rows, so a compiled piece sees one shape whatever the sequence lengths are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network."""

    vocab: int = 4096
    hidden: int = 384
    layers: int = 7
    heads: int = 6
    kv_heads: int = 2
    inner: int = 960
    theta: float = 10000.0
    eps: float = 1e-6
    longest: int = 2048

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, computed in fp32 and returned in the input's type."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split form; ``x`` is (tokens, heads, head_dim)."""
    half = x.shape[-1] // 2
    wide = x.float()
    swapped = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)).to(x.dtype)


def before_attention(
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    bq: Tensor,
    wk: Tensor,
    bk: Tensor,
    wv: Tensor,
    bv: Tensor,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections and rotary positions."""
    h = rms(x, norm, eps)
    q = F.linear(h, wq, bq).view(x.shape[0], -1, dim)
    k = F.linear(h, wk, bk).view(x.shape[0], -1, dim)
    v = F.linear(h, wv, bv).view(x.shape[0], -1, dim)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(
    x: Tensor,
    a: Tensor,
    wo: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    """Output projection, residual, and the gated MLP."""
    x = x + F.linear(a.reshape(x.shape[0], -1), wo)
    h = rms(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, causal: bool) -> Tensor:
    """Attention within each packed sequence; ``starts`` are offsets, the total length last."""
    if q.is_cuda:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, causal, False
        )[0]
        return out
    pieces = []
    edges = starts.tolist()
    for a, b in itertools.pairwise(edges):
        q1, k1, v1 = (t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        piece = F.scaled_dot_product_attention(q1, k1, v1, is_causal=causal, enable_gqa=True)
        pieces.append(piece.squeeze(0).transpose(0, 1))
    return torch.cat(pieces)


def head_loss(
    rows: Tensor, norm: Tensor, head: Tensor, target: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted mean loss, and per row the loss and whether the best guess is right."""
    logits = F.linear(rms(rows, norm, eps), head.to(rows.dtype)).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    right = logits.detach().argmax(-1) == target
    return (losses * weight).sum() / weight.sum().clamp(min=1.0), losses.detach(), right


MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")


class Net(nn.Module):
    """Stacked parameters; ``hidden`` runs the layers, the head is applied by the caller where it
    is needed.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, n, dim = shape.hidden, shape.layers, shape.head_dim
        kv = shape.kv_heads * dim

        def stack(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(n, rows, columns) * scale * columns**-0.5)

        self.embed = nn.Parameter(torch.randn(shape.vocab, d))
        self.wq, self.wk, self.wv = stack(d, d, 1.0), stack(kv, d, 1.0), stack(kv, d, 1.0)
        self.wo = stack(d, d, (2 * n) ** -0.5)
        self.gate, self.up = stack(shape.inner, d, 1.0), stack(shape.inner, d, 1.0)
        self.down = stack(d, shape.inner, (2 * n) ** -0.5)
        self.bq, self.bk, self.bv = (nn.Parameter(torch.zeros(n, r)) for r in (d, kv, kv))
        self.norm1, self.norm2 = nn.Parameter(torch.ones(n, d)), nn.Parameter(torch.ones(n, d))
        self.norm = nn.Parameter(torch.ones(d))
        self.head = nn.Parameter(torch.randn(shape.vocab, d) * 0.02)
        angles = torch.arange(shape.longest)[:, None] * shape.theta ** (
            -torch.arange(0, dim, 2) / dim
        )
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1), persistent=False)
        self.bf16 = False  # On a CPU: compute in bf16 as on a GPU.
        self.before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self.after: Callable[..., Tensor] = after_attention
        self.loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = head_loss

    def compile_pieces(self) -> None:
        """Compile the pieces; each is compiled once and serves all layers."""
        self.before = torch.compile(before_attention, dynamic=False)
        self.after = torch.compile(after_attention, dynamic=False)
        self.loss = torch.compile(head_loss, dynamic=False)

    def hidden(
        self, ids: Tensor, pos: Tensor, starts: Tensor, longest: int, causal: bool, fast: bool
    ) -> Tensor:
        """Run the layers on flat tokens; ``fast`` uses the compiled pieces."""
        before, after = (self.before, self.after) if fast else (before_attention, after_attention)
        dtype = torch.bfloat16 if ids.is_cuda or self.bf16 else torch.float32
        x = F.embedding(ids, self.embed).to(dtype)
        cos, sin = self.cos[pos], self.sin[pos]
        names = ("wq", "bq", "wk", "bk", "wv", "bv", "wo", "gate", "up", "down")
        cast = {name: getattr(self, name).to(dtype).unbind(0) for name in names}
        norm1, norm2 = self.norm1.unbind(0), self.norm2.unbind(0)
        dim, eps = self.shape.head_dim, self.shape.eps
        for i in range(self.shape.layers):
            w = {name: values[i] for name, values in cast.items()}
            q, k, v = before(
                x,
                norm1[i],
                w["wq"],
                w["bq"],
                w["wk"],
                w["bk"],
                w["wv"],
                w["bv"],
                cos,
                sin,
                dim,
                eps,
            )
            a = attend(q, k, v, starts, longest, causal)
            x = after(x, a, w["wo"], norm2[i], w["gate"], w["up"], w["down"], eps)
        return x

    def logits(self, rows: Tensor) -> Tensor:
        """Final norm and head, in fp32."""
        return F.linear(rms(rows, self.norm, self.shape.eps), self.head.to(rows.dtype)).float()


def attention_error(device: torch.device) -> float:
    """Largest relative error of packed attention and its gradients against the plain form (a
    start-up check).
    """
    torch.manual_seed(0)
    edges = [0, 40, 40 + 130, 512]
    starts = torch.tensor(edges, dtype=torch.int32, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = [
        torch.randn(512, heads, 64, device=device, dtype=dtype).requires_grad_()
        for heads in (6, 2, 2)
    ]
    plain = [t.detach().float().cpu().requires_grad_() for t in qkv]
    worst = 0.0
    for causal in (False, True):
        out = attend(qkv[0], qkv[1], qkv[2], starts, 342, causal)
        want = attend(plain[0], plain[1], plain[2], starts.cpu(), 342, causal)
        weight = torch.randn_like(want)
        grads = torch.autograd.grad((out.float() * weight.to(device)).sum(), qkv)
        wanted = torch.autograd.grad((want * weight).sum(), plain)
        for mine, other in zip((out, *grads), (want, *wanted), strict=True):
            worst = max(
                worst,
                float(
                    (mine.detach().float().cpu() - other.detach()).norm() / other.detach().norm()
                ),
            )
    return worst
