"""Muon for the stacked matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.model import MATRICES, Net


def orthogonalise(g: Tensor) -> Tensor:
    """Push the singular values of a stack of matrices towards one (five Newton-Schulz rounds)."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
    out: Tensor = (x.mT if tall else x).to(g.dtype)
    return out


def muon_step(weight: Tensor, grad: Tensor, momentum: Tensor, lr: Tensor, decay: float) -> None:
    """One Nesterov-momentum step on a stack of matrices."""
    momentum.lerp_(grad, 0.05)
    update = orthogonalise(grad.lerp(momentum, 0.95))
    scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
    weight.mul_(1 - lr * decay).sub_(update * (lr * scale))


class Optimizer:
    """Both optimizers behind one ``step(lr)``; ``lr`` is the relative rate, 1 at the plateau."""

    def __init__(self, net: Net, muon_lr: float, adam_lr: float, compiled: bool) -> None:
        self.matrices = [getattr(net, name) for name in MATRICES]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.muon_lr = muon_lr
        small = [net.bq, net.bk, net.bv, net.norm1, net.norm2, net.norm]
        groups = [
            {"params": [net.embed], "base": 3 * adam_lr},
            {"params": [net.head], "base": adam_lr},
            {"params": small, "base": adam_lr},
        ]
        self.adam = torch.optim.AdamW(
            groups,
            lr=adam_lr,
            betas=(0.9, 0.98),
            eps=1e-10,
            weight_decay=0.0,
            fused=net.embed.is_cuda,
        )
        self.everything = list(net.parameters())
        self.rate = torch.zeros((), device=net.embed.device)
        self.update: Callable[..., None] = (
            torch.compile(muon_step, dynamic=False) if compiled else muon_step
        )

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update and clear the gradients; returns the gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.everything, 1.0, foreach=True)
        self.rate.fill_(self.muon_lr * lr)
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            self.update(weight, weight.grad, momentum, self.rate, 0.01)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * lr
        self.adam.step()
        for p in self.everything:
            p.grad = None
        return norm

    def state(self) -> dict[str, object]:
        """What a resume needs."""
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load(self, state: dict[str, object]) -> None:
        """Take over a saved state."""
        momenta = state["momenta"]
        assert isinstance(momenta, list)
        for mine, saved in zip(self.momenta, momenta, strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
