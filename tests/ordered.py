"""Products and attention with one order of summation, in place of the library's.

A library picks its algorithm by the size of a product, so on a CPU the last bits of a row depend
on how many rows are beside it. With these, which are slow, all other arithmetic can be held to
its promise: a row's numbers are the same bits wherever it stands, and whoever computes it.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum of two tensors: every result is one sum over one contiguous row of products."""
    inputs, out = equation.split("->")
    order = out + "".join(sorted(set(inputs) - set(out) - {","}))

    def laid_out(x: Tensor, names: str) -> Tensor:
        x = x.permute([names.index(name) for name in order if name in names])
        return x[tuple(slice(None) if name in names else None for name in order)]

    left, right = inputs.split(",")
    products = (laid_out(a, left) * laid_out(b, right)).contiguous()
    return products.flatten(len(out)).sum(dim=-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear of x [N, d]."""
    out = einsum("nd,od->no", x, weight)
    return out if bias is None else out + bias


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention of [b, H, n, D]."""
    scores = einsum("bhnd,bhmd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return einsum("bhnm,bhmd->bhnd", scores.softmax(dim=-1), v)


def use_ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of a torch engine on a CPU, until the test ends."""
    monkeypatch.setattr(torch, "einsum", einsum)
    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
