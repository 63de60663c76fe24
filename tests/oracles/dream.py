"""Dream `generation_utils.py` `_sample`: no blocks, counts from t in linspace(1, eps).

Rows are decoded one by one. Upstream takes one count for a whole batch, from the mean of its mask
counts; the two agree wherever the rows hold the same number of masks.
"""

import torch
from torch import Tensor

from . import rules
from .models import OracleModel, shift
from .sampling import Row, Step, canvas

ALGORITHMS = ("maskgit_plus", "entropy", "topk_margin")


def filtered(z: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits [Q, V] with the tokens outside top-p, then outside top-k, at the lowest float."""
    lowest = torch.finfo(z.dtype).min
    if top_p is not None and top_p < 1:
        values, order = z.sort(dim=-1, descending=True)
        p = values.softmax(dim=-1)
        # A token goes if those *before* it already hold more than top_p: the one that crosses
        # the bound stays, and the first always does.
        drop = p.cumsum(dim=-1).roll(1, dims=-1) > top_p
        drop[:, 0] = False
        z = z.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), lowest)
    if top_k is not None:
        kth = z.topk(min(top_k, z.shape[-1]), dim=-1).values[:, -1:]
        z = z.masked_fill(z < kth, lowest)
    return z


def confidences(p: Tensor, alg: str) -> Tensor:
    """Confidence [Q] of probabilities [Q, V] under one of the algorithms."""
    if alg == "maskgit_plus":
        return p.max(dim=-1).values
    if alg == "topk_margin":
        best = p.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
    if alg == "entropy":
        return (p * (p + 1e-10).log()).sum(dim=-1)
    raise ValueError(f"alg {alg!r} is none of {ALGORITHMS}")


@torch.inference_mode()
def generate(
    model: OracleModel,
    prompts: Tensor,  # [B, P] int64
    *,
    steps: int,
    gen_length: int,
    alg: str = "maskgit_plus",
    eps: float = 1e-3,
    top_p: float | None = None,
    top_k: int | None = None,
    trace: list[Step] | None = None,
) -> Tensor:
    """The generated ids [B, G], greedy (temperature 0; top_p and top_k still shape p)."""
    answers: list[Tensor] = []
    for index, prompt in enumerate(prompts):
        tokens = canvas(prompt, gen_length, model.mask_id)
        row = Row(tokens, model.mask_id, index, trace=trace)
        for step in range(steps):
            z = filtered(shift(model(row.tokens[None]))[0], top_p, top_k)  # [L, V]
            p = z.softmax(dim=-1)
            masked = (row.tokens == model.mask_id).tolist()
            count = rules.dream_count(sum(masked), step, steps, eps)
            chosen = rules.steps(confidences(p, alg).tolist(), masked, count)
            row.write(p.argmax(dim=-1), masked, 0, chosen)
        answers.append(row.tokens[prompts.shape[1] :])
    return torch.stack(answers)
